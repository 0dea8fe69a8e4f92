"""A generation's candidates: what they share is stored once, what differs n times, and neither is materialised."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from evoopt.types import Answers, Array, Objective, Params, error, pytree

Genome = TypeVar("Genome")

ITERATED_AT_ONCE = 64  # candidates decoded together by `for candidate in population`


@runtime_checkable
class Unmade(Protocol):
    """An array that is not there: a leaf of `evoopt.virtual`, asked for without importing quax, which takes a while."""

    def materialise(self) -> Array: ...


def has_virtual(candidate: Params) -> bool:
    """Whether any leaf is virtual."""
    unmade = lambda x: isinstance(x, Unmade)
    return any(unmade(x) for x in jax.tree.leaves(candidate, is_leaf=unmade))


def ask_virtual(oracle: Objective, candidate: Params, *args: Any) -> Any:
    """`oracle(candidate, *args)`, under `quax` if leaves of the candidate are virtual."""
    if not has_virtual(candidate):
        return oracle(candidate, *args)
    from evoopt.virtual import call

    return call(oracle, candidate, *args)


def transform_virtual(transform: Any, candidate: Params) -> Params:
    """`transform(candidate)`, whose virtual leaves stay virtual if the transform lets them.

    A transform with a method `virtual` decides itself.
    """
    if not has_virtual(candidate):
        return transform(candidate)
    if hasattr(transform, "virtual"):
        return transform.virtual(candidate)
    from evoopt.virtual import transformed

    return transformed(transform, candidate)


def looped(f: Callable[[Any], Any], rows: Any) -> Any:
    """`jax.lax.map(f, rows)`, of which a row has the same bits among any number of others. Not for reverse mode.

    XLA removes a loop that it knows to make a single trip, and rounds differently for it; so this one makes a number of
    trips that XLA can't see, with room for two.
    """
    n = len(jax.tree.leaves(rows)[0])
    shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], rows))
    empty = jax.tree.map(lambda s: jnp.zeros((max(n, 2), *s.shape), s.dtype), shapes)
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), rows) if n == 1 else rows
    trips = jax.lax.optimization_barrier(jnp.int32(n))

    def trip(i: Array, answers: Any) -> Any:
        return jax.tree.map(lambda a, x: a.at[i].set(x), answers, f(jax.tree.map(lambda x: x[i], rows)))

    return jax.tree.map(lambda x: x[:n], jax.lax.fori_loop(0, trips, trip, empty))


@pytree
class Population(Generic[Genome]):
    """n candidates: `decode(genomes[i])` is candidate i.

    >>> population = Population(lambda g: {"w": g}, jnp.arange(4.0))
    >>> population.map(lambda p: p["w"] ** 2).tolist()
    [0.0, 1.0, 4.0, 9.0]
    >>> [float(candidate["w"]) for candidate in population[:2]]
    [0.0, 1.0]
    """

    decode: Callable[[Genome], Params]  # a pytree callable, e.g. Partial(perturbed, mean, sigma); it may also have
    # `virtual(genome)`, the same candidate with leaves that are never made, which `map` and `vmap` then ask
    genomes: Genome  # every leaf has leading axis n
    active: Any = None  # (n,) bool, which candidates are to be evaluated; None for all

    def __post_init__(self) -> None:
        if isinstance(self.decode, types.FunctionType):  # a bare function is no pytree and could not enter a jit
            object.__setattr__(self, "decode", Partial(self.decode))

    def map(self, oracle: Objective, *args: Any, each: Any = None, batch_size: int | None = None) -> Answers:
        """`oracle(candidate, *args)` for every candidate; with `each`, `oracle(candidate, *args, each_i)`.

        Args:
            oracle: what is asked of a candidate, e.g. `strategy.oracle(objective)`.
            *args: the same for all candidates, e.g. a batch of data.
            each: a pytree with leading axis n, of which candidate i gets row i; None for nothing.
            batch_size: candidates evaluated at once. None is one at a time, in the memory of one evaluation. The
                population is evaluated in micro-batches of exactly this size (the last one padded), so that a slice
                of whole micro-batches has the same bits wherever it is evaluated.

        Returns:
            The answers, each leaf with leading axis n; NaN for candidates that are not active. Micro-batches without an
            active candidate are not evaluated.
        """
        if self.active is not None:
            return self._map_active(oracle, args, each, batch_size or 1)

        one = self._asking(oracle, args, each)
        n, size = len(self), 1 if batch_size is None else batch_size
        if size < 1:
            raise error("batch_size of at least 1", str(size), "a division that rounded down to zero")
        # Padded with repeats of the last row: valid candidates, whose answers are dropped.
        batches = -(-n // size)
        padding = batches * size - n
        pad = lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], padding, axis=0)]) if padding else x
        rows = jax.tree.map(lambda x: pad(x).reshape(batches, *(() if batch_size is None else (size,)), *x.shape[1:]),
                            (self.genomes, each))  # fmt: skip
        answers = looped(one if batch_size is None else jax.vmap(one), rows)
        flat = 1 if batch_size is None else 2
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[flat:])[:n], answers)

    def vmap(self, oracle: Objective, *args: Any, each: Any = None) -> Answers:
        """As `map`, all candidates at once: the fastest where they fit, in the memory of n evaluations."""
        return self._masked(jax.vmap(self._asking(oracle, args, each))((self.genomes, each)))

    def _map_active(self, oracle: Objective, args: tuple, each: Any, size: int) -> Answers:
        whole, n = dataclasses.replace(self, active=None), len(self)
        padding = -n % size
        active = jnp.concatenate([self.active, jnp.zeros(padding, bool)]).reshape(-1, size)
        place = jnp.minimum(jnp.arange(n + padding), n - 1).reshape(-1, size)
        rows = lambda tree, i: jax.tree.map(lambda x: x[i], tree)

        def evaluate(i: Array) -> Answers:
            return whole[i].map(oracle, *args, each=None if each is None else rows(each, i), batch_size=size)

        shapes = jax.eval_shape(evaluate, place[0])
        skip = lambda i: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        answers = jax.lax.map(lambda x: jax.lax.cond(x[1].any(), evaluate, skip, x[0]), (place, active))
        return self._masked(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], answers))

    def _masked(self, answers: Answers) -> Answers:
        """The answers, with NaN for candidates that are not active."""
        row = lambda x: self.wanted().reshape(-1, *(1,) * (x.ndim - 1))
        masked = lambda x: jnp.where(row(x), x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        return answers if self.active is None else jax.tree.map(masked, answers)

    def _asking(self, oracle: Objective, args: tuple, each: Any) -> Callable[[Any], Any]:
        virtual = getattr(self.decode, "virtual", None)

        def one(row: Any) -> Any:
            genome, own = row
            own = () if each is None else (own,)
            if virtual is None:
                return oracle(self.decode(genome), *args, *own)
            return ask_virtual(oracle, virtual(genome), *args, *own)

        return one

    def with_decode(self, decode: Callable[[Genome], Params]) -> Population:
        """The same candidates through another `decode`; everything else is kept."""
        return dataclasses.replace(self, decode=decode)

    def with_genomes(self, genomes: Genome) -> Population:
        """Other candidates in the same places, of which the same are active."""
        return dataclasses.replace(self, genomes=genomes)

    def with_active(self, active: Array) -> Population:
        """The same candidates, of which those where `active` (n,) is False are not evaluated."""
        return dataclasses.replace(self, active=active)

    def wanted(self) -> Array:
        """Which candidates are to be evaluated, (n,) bool."""
        return jnp.ones(len(self), bool) if self.active is None else self.active

    def asked(self) -> Array:
        """How many candidates are to be evaluated, () int32."""
        return jnp.asarray(len(self) if self.active is None else self.active.sum(), jnp.int32)

    def places(self) -> np.ndarray:
        """Which candidates are to be evaluated: their places, in order."""
        return np.arange(len(self)) if self.active is None else np.flatnonzero(np.asarray(self.active))

    def counted(self, answers: Any) -> int:
        """How many answers to expect: one for each place if that many came, otherwise one for each active candidate."""
        given = len(answers) if hasattr(answers, "__len__") else -1
        return len(self) if given == len(self) else int(self.asked())

    def widened(self, rows: np.ndarray) -> np.ndarray:
        """Rows for each active candidate as rows for each place: NaN (or 0) for those that were not asked."""
        if self.active is None or len(rows) == len(self):
            return rows
        whole = np.full((len(self), *rows.shape[1:]), np.nan if rows.dtype.kind == "f" else 0, rows.dtype)
        whole[self.places()] = rows
        return whole

    def decoded(self) -> Params:
        """All candidates, each leaf with leading axis n: the memory of n times the parameters."""
        return jax.vmap(self.decode)(self.genomes)

    def __getitem__(self, index: Any) -> Any:
        """A sub-population for a slice or an array of places, which shares `decode`; a candidate for an int."""
        genomes = jax.tree.map(lambda g: g[index], self.genomes)
        if isinstance(index, (int, np.integer)):
            return self.decode(genomes)
        active = None if self.active is None else self.active[index]
        return dataclasses.replace(self, genomes=genomes, active=active)

    def __len__(self) -> int:
        return jax.tree.leaves(self.genomes)[0].shape[0]

    def __iter__(self) -> Iterator[Params]:
        """The candidates to be evaluated, decoded, as NumPy arrays; in the form that `decode.present` gives, if any."""
        yield from self.candidates(self.places())

    def candidates(self, places: np.ndarray) -> Iterator[Params]:
        """The candidates at these places, as iterating gives them, bit for bit."""
        present = getattr(self.decode, "present", lambda candidate: candidate)
        for start in range(0, len(places), ITERATED_AT_ONCE):
            some = places[start : start + ITERATED_AT_ONCE]
            # One shape for all blocks, so that one program decodes them.
            padded = np.resize(some, min(ITERATED_AT_ONCE, len(self)))
            leaves, treedef = jax.tree.flatten(jax.device_get(_decoded(self.decode, self.genomes, padded)))
            yield from (present(treedef.unflatten([x[i] for x in leaves])) for i in range(len(some)))


@jax.jit
def _decoded(decode: Callable[[Any], Params], genomes: Any, places: Array) -> Params:
    return jax.vmap(decode)(jax.tree.map(lambda g: g[places], genomes))
