"""A run as a few scalars a step: from the start and the values that were told, every later state can be made again.

`ask` is pure and `tell` the only write, so (strategy, start, key, values) is the whole run. Of a zeroth-order
fine-tuning that is 8 bytes a step: 20,000 steps take 160 KB, whatever the model's size. Replaying needs no forward pass
and no data.

A trajectory file is a line of JSON and the values as raw float32, nothing that could run code when read.
Source: Malladi et al. 2023 (MeZO), section 2.1; the paper stores a seed and 2 bytes a step.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt import trees
from evoopt.checks import check_strategy
from evoopt.reading import LIMIT, document, field, opened, reading, short, writing
from evoopt.run import keys, programs
from evoopt.run.checkpoint import digest, versions, write_file
from evoopt.types import Array, Key, Params, error

FORMAT = 1
GENERATOR = "threefry2x32 of evoopt.noise, 2"  # to be counted up when the noise of a key changes
MOST = 1 << 31  # bytes of a file: half a billion values
BLOCK = 256  # generations replayed by one call


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What a run was told.

    start: digest of the parameters it started from.
    strategy: the strategy as text, see `described`.
    key: the two words of the key that `minimize` had.
    end: digest of what the strategy recommended after the last generation.
    values: (generations, n) float32; NaN where a candidate had no answer.
    settings: plain JSON, whatever is needed to make strategy and start again.
    versions, generator: what the bits depend on besides.
    """

    start: str
    strategy: str
    key: tuple[int, int]
    end: str
    values: np.ndarray
    settings: dict[str, Any]
    versions: dict[str, str]
    generator: str = GENERATOR


def record(
    strategy: Any, x0: Params, key: Key | int, values: Sequence[Any], *, end: Params, settings: Any = None
) -> Trajectory:
    """The trajectory of a run of `minimize(f, x0, strategy, key=key)` whose generations were told `values`.

    Args:
        strategy, x0, key: as `minimize` had them.
        values: (generations, n), as the history has them with `summarize=told_values`.
        end: what the strategy recommended after them.
        settings: plain JSON, kept in the file.

    Raises:
        ValueError: for first-order strategies, whose answers are more than values.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import mezo
    >>> x0, strategy = jnp.zeros(3), mezo(learning_rate=0.05)
    >>> f = lambda x: jnp.sum((x - 1.0) ** 2)
    >>> result = minimize(f, x0, strategy, generations=40, summarize=told_values)
    >>> values = [row["values"] for row in result.history]
    >>> trajectory = record(strategy, x0, 0, values, end=result.recommended)
    >>> bool((replay(trajectory, strategy, x0) == result.recommended).all())
    True
    """
    if not is_told_values(strategy):
        cause = "a first-order strategy, whose gradients are no scalars"
        raise error("a strategy that is told values", type(strategy).__name__, cause)
    first, second = (int(word) for word in np.asarray(jax.random.key_data(noises.replayable(key))))
    try:
        table = np.asarray(values, np.float32).reshape(len(values), -1 if len(values) else 0)
    except (TypeError, ValueError) as reason:
        cause = "a history whose rows were edited, or a strategy that asks another number of candidates each time"
        raise error("as many values from each generation", short(reason), cause) from reason
    start = digest(trees.searchable(x0))
    return Trajectory(start, described(strategy), (first, second), digest(end), table, settings or {}, versions())


def is_told_values(strategy: Any) -> bool:
    """Whether a strategy's answers are plain values, so that they are all that a replay needs."""
    check_strategy(strategy)
    objective = lambda params: params
    return strategy.oracle(objective) is objective


def described(x: Any) -> str:
    """A strategy as text: names of classes and functions, and every number to its last bit.

    >>> from evoopt.strategies import mezo
    >>> described(mezo(learning_rate=0.1)) == described(mezo(learning_rate=0.1000001))
    False
    """
    if dataclasses.is_dataclass(x):
        fields = [f"{f.name}={described(getattr(x, f.name))}" for f in dataclasses.fields(x)]
        return f"{type(x).__name__}({', '.join(fields)})"
    if isinstance(x, (list, tuple)):
        return f"({', '.join(map(described, x))})"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{k}: {described(v)}" for k, v in sorted(x.items())) + "}"
    if hasattr(x, "dtype"):
        return f"array {digest(x)}"
    return x.__qualname__ if hasattr(x, "__qualname__") else repr(x) if _is_plain(x) else type(x).__name__


def _is_plain(x: Any) -> bool:
    return x is None or isinstance(x, (bool, int, float, str))


def told_values(values: Array, aux: Any) -> dict[str, Array]:
    """`summarize` of a run whose trajectory is wanted: the history gets the values of every candidate."""
    del aux
    return {"values": values}


def replay(
    trajectory: Trajectory,
    strategy: Any,
    x0: Params,
    *,
    generations: int | None = None,
    other_versions: bool = False,
    show: Callable[[int], None] | None = None,
) -> Params:
    """What the run recommended after `generations` (all of them by default), bit for bit.

    Args:
        trajectory: from `record` or `read`.
        strategy, x0: as the run had them.
        generations: how many are replayed.
        other_versions: try another version of JAX than the run had; its bits may differ, which the digest of the end
            then says.
        show: called with the number of generations done.

    Raises:
        ValueError: when the start differs in a bit, a shape, a dtype or a leaf, when the strategy's numbers differ,
            when the noise or the version of JAX is another, or when the end is not what the run had.
    """
    start = trees.searchable(x0)
    _check(trajectory, strategy, start, other_versions)
    last = len(trajectory.values)
    count = last if generations is None else generations
    if not 0 <= count <= last:
        raise error(f"generations of 0 to {last}", str(count), "a trajectory of a shorter run")
    found = _replayed(trajectory, strategy, start, count, show)
    if count == last and digest(found) != trajectory.end:
        cause = "another kind of processor or another version of JAX rounds differently; replay where it was recorded"
        raise error("the weights that the run ended with, bit for bit", "others", cause)
    return found


def write(path: str | Path, trajectory: Trajectory) -> Path:
    """Write the file `path`, whole or not at all."""
    values = np.ascontiguousarray(trajectory.values, "<f4")
    if values.nbytes + LIMIT > MOST:
        raise error(
            f"at most {(MOST - LIMIT) // 4:,} values", f"{values.size:,}", "a large popsize; record fewer steps"
        )
    header = {**dataclasses.asdict(trajectory), "values": list(values.shape), "format": FORMAT}
    try:
        text = json.dumps(header, allow_nan=False).encode()
        if len(text) >= LIMIT:
            raise ValueError(f"settings of {len(text):,} bytes")
    except (TypeError, ValueError) as reason:
        raise error("plain JSON as settings", str(reason), "an array or NaN among the settings") from reason
    path, body = Path(path), text + b"\n" + values.tobytes()
    with writing(path):
        write_file(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    return path


def read(path: str | Path) -> Trajectory:
    """The trajectory in the file `path`.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read.
        ValueError: a file that is none, is damaged or edited, or is of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"a trajectory file at '{path}'", "no file", "a misspelt path", FileNotFoundError)
    with reading(path), opened(path, link=True) as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST:
            raise error(f"a trajectory of at most {MOST:,} bytes", f"{size:,} in '{path}'", "a file of another kind")
        total = hashlib.sha256()
        checksum = file.readline(2 * total.digest_size + 1)
        start = file.tell()
        while part := file.read(1 << 20):
            total.update(part)
        if checksum != total.hexdigest().encode() + b"\n":
            cause = "a copy that was cut short, a number in it that was edited, or a file of another kind"
            raise error(f"a trajectory in '{path}'", "bytes that do not match their checksum", cause)
        file.seek(start)
        try:
            header = document(file.readline(LIMIT))
            if (found := field(header, "format", int)) == FORMAT:
                shape = _check_header(header, os.fstat(file.fileno()).st_size - file.tell())
                values = np.frombuffer(file.read(), "<f4").reshape(shape)
                return Trajectory(**{n: header[n] for n in _FIELDS}, key=tuple(header["key"]), values=values)
        except ValueError as reason:
            cause = "a file that something other than evoopt wrote"
            raise error(f"a trajectory in '{path}'", str(reason), cause) from reason
    raise error(f"a trajectory of format {FORMAT}", f"format {short(found)}", "a file of another version of evoopt")


_FIELDS = {"start": str, "strategy": str, "end": str, "settings": dict, "versions": dict, "generator": str}


def _check_header(header: Any, size: int) -> list[int]:
    """The shape of the `size` bytes of values, once everything else that a header has to say was found.

    Raises:
        ValueError: something is missing, or of another kind.
    """
    for name, kind in _FIELDS.items():
        field(header, name, kind)
    for name in header["versions"]:
        field(header["versions"], name, str)
    key, shape = field(header, "key", list), field(header, "values", list)
    if len(key) != 2 or not all(type(word) is int and 0 <= word < 2**32 for word in key):
        raise ValueError(f'"key" is {short(key)}, not two words of 32 bits')
    if len(shape) != 2 or not all(type(n) is int and n >= 0 for n in shape) or 4 * math.prod(shape) != size:
        raise ValueError(f'"values" is {short(shape)}, and {size:,} bytes follow')
    return shape


def _check(trajectory: Trajectory, strategy: Any, start: Params, other_versions: bool) -> None:
    if trajectory.generator != GENERATOR:
        cause = "another version of evoopt recorded it; its noise for the same key is another"
        raise error(f"a trajectory of the generator '{GENERATOR}'", short(trajectory.generator), cause)
    here = versions()["jax"]
    if trajectory.versions.get("jax") != here and not other_versions:
        cause = "programs of another version may round differently: install it, or try with other_versions=True"
        raise error(f"a trajectory of jax {here}", f"jax {short(trajectory.versions.get('jax'))}", cause)
    if (found := described(strategy)) != trajectory.strategy:
        cause = "a learning rate, sigma or another number that was changed; the file's settings have the right ones"
        raise error(f"the strategy that the run had, {trajectory.strategy[:1000]}", found, cause)
    if digest(start) != trajectory.start:
        got = f"{len(jax.tree.leaves(start))} leaves, {trees.size(start)} numbers, of which some bit differs"
        cause = "another model, another dtype, other leaves chosen, or a base that was fine-tuned since"
        raise error("the parameters that the run started from, bit for bit", got, cause)


def _replayed(trajectory: Trajectory, strategy: Any, start: Params, count: int, show: Any) -> Params:
    key = jax.random.wrap_key_data(jnp.asarray(trajectory.key, jnp.uint32), impl="threefry2x32")
    key_init, key_run = keys.run_keys(key)
    state = trees.strong(jax.tree.map(jnp.copy, strategy.init(start, key_init)))

    def generation(strategy: Any, i: Array, carry: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        state, first, values = carry
        strategy = programs.plain(strategy)
        population = strategy.ask(state, noises.fold_in(key_run, first + i))
        return strategy.tell(state, population, values[i]), first, values

    # As many trips as an argument says: one program for all blocks, and no loop of one trip that XLA would unroll.
    steps = lambda s, n, *carry: jax.lax.fori_loop(0, n, functools.partial(generation, s), carry)[0]
    run, held = programs.jit(steps, donate_argnums=2), programs.argument(strategy)
    for first in range(0, count, BLOCK):
        block = np.full((BLOCK, trajectory.values.shape[1]), np.nan, np.float32)
        part = trajectory.values[first : min(first + BLOCK, count)]
        block[: len(part)] = part
        state = run(held, np.int32(len(part)), state, np.int32(first), block)
        if show is not None:
            show(first + len(part))
    return strategy.recommend(state)
