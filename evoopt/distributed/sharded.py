"""A population over the devices of one machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.population import Population
from evoopt.run import programs
from evoopt.strategy import value_and_grad
from evoopt.types import Answers, Objective, error


def sharded_map(
    population: Population,
    oracle: Objective,
    *args: Any,
    each: Any = None,
    batch_size: int | None = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> Answers:
    """`population.map(oracle, *args, each=each, batch_size=batch_size)`, candidates spread over devices.

    The population is padded to whole micro-batches for every device, and each device evaluates its own micro-batches by
    the program that one device would use: the answers have the same bits on any number of devices.

    Every call compiles; a run has a `ShardedEvaluator`, which does so once.

    Args:
        population: the candidates; `decode` and `args` are copied to every device.
        oracle: as in `Population.map`.
        *args: the same for all candidates.
        each: a pytree with leading axis n.
        batch_size: candidates that a device evaluates at once.
        mesh: a mesh whose first axis the candidates are spread over; others are the oracle's to use. By default one
            axis of all devices.

    >>> population = Population(lambda g: g, jnp.arange(5.0))
    >>> sharded_map(population, lambda x: x**2, batch_size=2).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    if mesh is None:
        mesh = jax.make_mesh((jax.device_count(),), ("population",), axis_types=(jax.sharding.AxisType.Auto,))
    return _answers(_program(oracle, batch_size, mesh), population, args, each, batch_size, mesh)


class ShardedEvaluator:
    """Evaluates populations on the devices of this machine: `minimize(..., evaluator=ShardedEvaluator())`.

    Every device holds the strategy's state and asks and tells by itself, so that a generation moves nothing between
    devices but the answers. They have the same bits on any number of devices.

    Args:
        devices: all by default.
        rows: how many of them share each candidate; a language task made with `rows_over="rows"` gives each of these
            its part of the batch. The others evaluate different candidates.

    Raises:
        ValueError: devices that `rows` does not divide.

    >>> from evoopt import minimize, strategies
    >>> with ShardedEvaluator() as evaluator:
    ...     search = strategies.snes(8)
    ...     found = minimize(lambda x: jnp.sum(x**2), jnp.ones(3), search, generations=50, evaluator=evaluator)
    >>> found.best_value < 1e-3
    True
    """

    def __init__(self, devices: Sequence[Any] | None = None, *, rows: int = 1) -> None:
        devices = jax.devices() if devices is None else list(devices)
        if rows < 1 or not devices or len(devices) % rows:
            cause = "more devices to share a candidate than there are, or a number that does not divide them"
            raise error(f"rows that divide the {len(devices)} devices", f"rows={rows}", cause)
        self.mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, rows), ("population", "rows"))
        self._last: tuple[Any, Any, Any] | None = None  # oracle, batch_size, program

    def __call__(
        self, population: Population, oracle: Callable[..., Any], *args: Any, each: Any = None,
        batch_size: int | None = None, jit: bool = True, source: Any = None,
    ) -> Answers:  # fmt: skip
        """As `Evaluator.__call__`: `population.map(oracle, *args, each=each, batch_size=batch_size)`, as NumPy arrays.

        Raises:
            ValueError: an objective in Python (`jit=False`), which no device can evaluate; gradients of candidates that
                several devices share.
        """
        if self.mesh.shape["rows"] > 1 and source is not None and source[0].oracle is value_and_grad:
            cause = "a gradient strategy, which needs one device a candidate: rows=1"
            raise error("a strategy that asks for values", type(source[0]).__name__, cause)
        if not jit:
            cause = "a Python objective runs in processes: RayEvaluator(workers=...)"
            raise error("an objective in JAX", "jit=False", cause)
        if self._last is None or self._last[:2] != (oracle, batch_size):
            self._last = (oracle, batch_size, _program(oracle, batch_size, self.mesh))
        return jax.device_get(_answers(self._last[2], population, args, each, batch_size, self.mesh))

    def place(self, carry: Any) -> Any:
        """A copy on every device."""
        return jax.device_put(carry, jax.NamedSharding(self.mesh, jax.P()))

    def status(self) -> str:
        """A few words for a progress bar."""
        n, rows = self.mesh.devices.shape
        return f"{n * rows} devices" + (f", {rows} a candidate" if rows > 1 else "")

    def metrics(self) -> dict[str, Any]:
        """What a row of metrics says of the evaluation."""
        return {"devices": self.mesh.size, "rows": self.mesh.devices.shape[1]}

    def __enter__(self) -> ShardedEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _program(oracle: Any, batch_size: int | None, mesh: jax.sharding.Mesh) -> Any:
    def shard(decode: Any, genomes: Any, active: Any, each: Any, args: Any) -> Answers:
        return Population(decode, genomes, active).map(oracle, *args, each=each, batch_size=batch_size)

    split, whole = jax.P(mesh.axis_names[0]), jax.P()
    specs = (whole, split, split, split, whole)
    return programs.jit(jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False))


def _answers(
    program: Any, population: Population, args: tuple, each: Any, batch_size: int | None, mesh: jax.sharding.Mesh
) -> Answers:
    n = len(population)
    padding = -n % (mesh.shape[mesh.axis_names[0]] * (batch_size or 1))
    pad = lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], padding, axis=0)]) if padding else x
    rows = jax.tree.map(pad, (population.genomes, population.active, each))
    place = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    decode, args = place((population.decode, args), jax.P())
    genomes, active, each = place(rows, jax.P(mesh.axis_names[0]))
    answers = program(decode, genomes, active, each, args)
    return jax.tree.map(lambda x: x[:n], answers)
