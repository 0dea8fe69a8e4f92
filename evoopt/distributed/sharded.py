"""A population over the devices of one machine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from evoopt.population import Population
from evoopt.types import Answers, Objective


def sharded_map(
    population: Population,
    oracle: Objective,
    *args: Any,
    each: Any = None,
    batch_size: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> Answers:
    """`population.map(oracle, *args, each=each, batch_size=batch_size)`, candidates spread over devices.

    The population is padded to whole micro-batches for every device, and each device evaluates its own micro-batches by
    the program that one device would use: the answers have the same bits on any number of devices.

    Args:
        population: the candidates; `decode` and `args` are copied to every device.
        oracle: as in `Population.map`.
        *args: the same for all candidates.
        each: a pytree with leading axis n.
        batch_size: candidates that a device evaluates at once.
        mesh: a mesh with one axis; all devices by default.

    >>> population = Population(lambda g: g, jnp.arange(5.0))
    >>> sharded_map(population, lambda x: x**2, batch_size=2).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    if mesh is None:
        mesh = jax.make_mesh((jax.device_count(),), ("population",), axis_types=(jax.sharding.AxisType.Auto,))
    (axis,) = mesh.axis_names
    n = len(population)
    padding = -n % (mesh.size * batch_size)
    pad = lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], padding, axis=0)]) if padding else x
    genomes, each = jax.tree.map(pad, (population.genomes, each))
    split, whole = jax.P(axis), jax.P()

    def shard(decode: Any, genomes: Any, each: Any, args: Any) -> Answers:
        return Population(decode, genomes).map(oracle, *args, each=each, batch_size=batch_size)

    run = jax.shard_map(shard, mesh=mesh, in_specs=(whole, split, split, whole), out_specs=split, check_vma=False)
    place = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    decode, args = place((population.decode, args), whole)
    answers = jax.jit(run)(decode, *place((genomes, each), split), args)
    return jax.tree.map(lambda x: x[:n], answers)
