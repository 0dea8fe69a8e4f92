"""Populations of stored vectors: how they start, draw members, mix, and stay in a box.

Shared by differential evolution, genetic algorithms and swarms. A population is an array (n, d); the searched
parameters are any pytree (`trees.ravel`). Nothing here takes more than O(n d) memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evoopt import bounds, injection, trees
from evoopt import noise as noises
from evoopt.answers import answered
from evoopt.checks import check_sigma
from evoopt.population import Population
from evoopt.types import Array, Key, Params, error

Box = tuple[Any, Any] | None  # lower and upper, (d,), as NumPy arrays unless traced
Crossover = Callable[[Key, Array, int], Array]  # key, rate (n,), d -> coordinates of the mutant, (n, d) bool


def uniforms(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Uniform numbers in [0, 1) with float32's or float64's precision; narrower types are rounded from float32."""
    return noises.stored(lambda: uniform_pairs(key, shape, dtype)[0])


def uniform_pairs(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> tuple[Array, Array]:
    """Two arrays of uniforms for the work of one, if one expression uses both: put that into `noise.stored`."""
    if dtype == jnp.float64:
        first, second = (jax.random.uniform(k, shape, dtype) for k in jax.random.split(key))
        return first, second
    u, v = ((word >> 8).astype(jnp.float32) * np.float32(2.0**-24) for word in noises.words(key, math.prod(shape)))
    return u.astype(dtype).reshape(shape), v.astype(dtype).reshape(shape)


def integers(key: Key, shape: tuple[int, ...], size: Any) -> Array:
    """Uniform places in a population: int32 in range(size), even where 64 bits are the default."""
    return jax.random.randint(key, shape, 0, size, jnp.int32)


def gaussians(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Standard normals of any shape."""
    return noises.stored(lambda: noises.normals(key, math.prod(shape), dtype).reshape(shape))


def box(lower: Any, upper: Any, unravel: trees.Unravel) -> Box:
    """The bounds as vectors (d,), from a number or a tree like the parameters; None if there are none at all.

    A coordinate with both sides infinite has no bounds.

    Raises:
        ValueError: if only one side is open (None or infinite), so that nothing can be drawn uniformly; if the
            structure is not that of the parameters; or if lower < upper fails.
    """
    if lower is None and upper is None:
        return None
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*unravel.dtypes, jnp.float32)  # as in `trees.flatten`
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in zip(unravel.shapes, unravel.dtypes, strict=True)]
    walls = bounds.sides(lower, upper, unravel.treedef.unflatten(shapes))
    for name, low, high, _ in walls:
        if isinstance(low, Tracer) or isinstance(high, Tracer):
            continue
        with np.errstate(over="ignore"):
            a, b = low.astype(dtype), high.astype(dtype)
            drawable = np.isfinite(b - a) | (np.isneginf(a) & np.isposinf(b))
        if not drawable.all():
            raise error(
                f"finite bounds at '{name}', or both infinite: this strategy draws uniformly between them",
                " ".join(f"lower={low}, upper={high}".split())[:80],
                "a one-sided constraint: wrap a strategy without bounds, bounded(cma_es(), lower, upper)",
            )
    if all(wall.free for wall in walls):
        return None

    def flat(side: list[Any]) -> Any:
        xp = jnp if any(isinstance(b, Tracer) for b in side) else np  # NumPy arrays stay known under `jit`
        with np.errstate(over="ignore"):
            wide = [xp.broadcast_to(xp.asarray(b).astype(dtype), s) for b, s in zip(side, unravel.shapes, strict=True)]
        return xp.concatenate([b.reshape(-1) for b in wide])

    return flat([wall.low for wall in walls]), flat([wall.high for wall in walls])


def clipped(x: Array, walls: Box) -> Array:
    """x (..., d) moved to the walls where it is beyond them."""
    return x if walls is None else jnp.clip(x, *walls)


def drawn(walls: Box, key: Key, n: int, center: Array, spread: Any) -> Array:
    """n vectors (n, d): uniform between bounds; normal around `center` (d,) for a coordinate without bounds."""
    shape, dtype = (n, center.size), center.dtype
    around = lambda key: center + jnp.asarray(spread, dtype) * gaussians(key, shape, dtype)
    if walls is None:
        check_sigma(spread, "spread")
        return around(key)
    free = jnp.isinf(walls[0])
    low, width = jnp.where(free, 0, walls[0]), jnp.where(free, 1, walls[1] - walls[0])
    x = low + width * uniforms(key, shape, dtype)
    if not isinstance(walls[0], Tracer) and not np.isinf(np.asarray(walls[0])).any():
        return x
    check_sigma(spread, "spread")
    return jnp.where(free, around(noises.fold_in(key, 1)), x)


def scattered(
    params: Params, key: Key, n: int, spread: Any, lower: Any = None, upper: Any = None
) -> tuple[Array, trees.Unravel]:
    """An initial population (n, d), and the map from a row back to the parameters.

    Uniform between bounds; normal around `params` with standard deviation `spread` where there are none. The first row
    is `params` themselves, moved into the bounds if they lie outside.
    """
    key = noises.replayable(key)
    x0, unravel = trees.ravel(trees.searchable(params))
    walls = box(lower, upper, unravel)  # type: ignore[arg-type]
    x = drawn(walls, key, n, x0, spread)
    x0 = clipped(x0, walls)
    return x.at[0].set(x0), unravel  # type: ignore[return-value]


def midpoint(x: Array, parents: Array, bounds: Box) -> Array:
    """x (n, d) with every coordinate outside the box replaced by the middle of its parent and the bound it passed."""
    if bounds is None:
        return x
    lower, upper = bounds
    x = jnp.where(x < lower, (lower + parents) / 2, x)
    return jnp.where(x > upper, (upper + parents) / 2, x)


def distinct(key: Key, size: Any, taken: Sequence[Array]) -> Array:
    """For every row, an index from range(size), uniform over those not `taken`, which are distinct: (n,)."""
    ascending = jnp.sort(jnp.stack(taken), axis=0)
    drawn = integers(key, taken[0].shape, size - len(taken))
    for place in ascending:  # the k-th number that is not taken
        drawn = drawn + (drawn >= place).astype(drawn.dtype)
    return drawn


def binomial(key: Key, rate: Array, d: int) -> Array:
    """Every coordinate with probability `rate`, and one random coordinate for certain: (n, d) bool."""
    key_each, key_sure = jax.random.split(key)
    n = rate.shape[0]
    sure = integers(key_sure, (n, 1), d)
    return (uniforms(key_each, (n, d), rate.dtype) < rate[:, None]) | (jnp.arange(d, dtype=jnp.int32) == sure)


def exponential(key: Key, rate: Array, d: int) -> Array:
    """A cyclic run of coordinates from a random start, longer than l with probability rate^l: (n, d) bool."""
    key_start, key_length = jax.random.split(key)
    n = rate.shape[0]
    start = integers(key_start, (n, 1), d)
    u = 1 - uniforms(key_length, (n,), rate.dtype)  # (0, 1]
    length = 1 + jnp.floor(jnp.log(u) / jnp.minimum(jnp.log(rate), -jnp.finfo(rate.dtype).tiny))
    return (jnp.arange(d, dtype=jnp.int32) - start) % d < jnp.clip(length, 1, d).astype(jnp.int32)[:, None]


class Trial(NamedTuple):
    """The genome of adaptive differential evolution: a trial vector and the numbers that made it."""

    x: Array  # (n, d)
    weight: Array  # (n,), F
    rate: Array  # (n,), CR
    slot: Array  # (n,) int32, the place in a full archive that the beaten parent would take


def decoding(unravel: trees.Unravel) -> Callable[[Any], Params]:
    """The `decode` for genomes whose field `x` is the vector."""
    return jax.tree_util.Partial(_decode, unravel)


def _decode(unravel: trees.Unravel, genome: Any) -> Params:
    return unravel(genome.x)


def cauchy(key: Key, location: Array, scale: float = 0.1) -> Array:
    """A Cauchy number for every location, redrawn while it is not above 0, and cut at 1: (n,).

    Equation: JADE (Zhang, Sanderson 2009), section III.C. One draw does it, by inverting the distribution given F > 0.
    """
    above = 0.5 + jnp.arctan(location / scale) / jnp.pi  # P(F > 0)
    tail = above * (1 - uniforms(key, location.shape, location.dtype))  # P(F > f), in (0, above]
    drawn = location + scale / jnp.tan(jnp.pi * tail)
    return jnp.clip(drawn, jnp.finfo(location.dtype).tiny, 1)


def current_to_pbest(
    key: Key, x: Array, size: Any, archive: Array, count: Array, pbest: Array, weight: Array, pull: Array
) -> Array:
    """DE/current-to-pbest/1 with archive: v = x + F_w (x_pbest - x) + F (x_r1 - x~_r2), (n, d).

    Args:
        key: draws r1 and r2.
        x: (n, d), whose first `size` rows are the population.
        archive: beaten parents, the first `count` in use; r2 is drawn from both x and archive.
        pbest: (n,), places in x.
        weight, pull: (n,), F and F_w.
    """
    key_1, key_2 = jax.random.split(key)
    i = jnp.arange(x.shape[0], dtype=jnp.int32)
    r1 = distinct(key_1, size, [i])
    r2 = distinct(key_2, size + count, [i, r1])
    other = jnp.where((r2 < size)[:, None], x[r2], archive[r2 - size])  # JAX clamps indices out of range
    weight, pull = (w.astype(x.dtype)[:, None] for w in (weight, pull))
    return x + pull * (x[pbest] - x) + weight * (x[r1] - other)


def archived(archive: Array, count: Array, capacity: Any, x: Array, beaten: Array, slot: Array) -> tuple[Array, Array]:
    """The archive (a, d) after the beaten rows of x (n, d) were added one by one, and its number of rows.

    Rows are appended while there is room; then each takes the place `slot`, and the last one to take a place stays.
    """
    n = beaten.shape[0]
    turn = count + jnp.cumsum(beaten, dtype=jnp.int32) - 1
    place = jnp.where(turn < capacity, turn, slot)
    last = jax.ops.segment_max(jnp.where(beaten, jnp.arange(n, dtype=jnp.int32), -1), place, archive.shape[0])
    archive = jnp.where((last >= 0)[:, None], x[jnp.maximum(last, 0)], archive)
    return archive, jnp.minimum(count + beaten.sum(dtype=jnp.int32), capacity)


def gains(old: Array, new: Array, better: Array) -> Array:
    """How much each success improved on its parent, as a share of all: (n,), sum 1, 0 for failures.

    A parent without a value (+inf) counts as beaten by the largest improvement on a parent with one.
    """
    gain = jnp.where(better, old - new, 0)
    most = jnp.max(gain, where=jnp.isfinite(gain), initial=0)
    gain = jnp.where(jnp.isfinite(gain), gain / jnp.where(most > 0, most, 1), 1)
    return gain / jnp.maximum(gain.sum(), jnp.finfo(gain.dtype).tiny)


def lehmer(weights: Array, numbers: Array) -> Array:
    """The weighted Lehmer mean sum w s^2 / sum w s: (); 0 if all weights are 0."""
    total = jnp.sum(weights * numbers)
    return jnp.sum(weights * numbers**2) / jnp.where(total > 0, total, 1)


def survivors(new: Array, old: Array, elites: int, n: int) -> tuple[Array, Array]:
    """The places of the n survivors among the new rows followed by the old ones, best first, and their values.

    The answered new rows compete with the first `elites` old ones; if these are too few, other old rows fill up.
    """
    values = jnp.concatenate([jnp.where(answered(new), new, jnp.inf), old])
    rank_class = jnp.concatenate([jnp.where(answered(new), 0, 2), jnp.where(jnp.arange(old.shape[0]) < elites, 0, 1)])
    place = jnp.lexsort((values, rank_class))[:n]
    # The fillers may be better than an elite, so sort again.
    place = place[jnp.argsort(values[place])]
    return place, values[place]


def moved(population: Population, points: Params, walls: Box = None, **others: Array) -> Population:
    """`population` at `points`, moved into the box; see `evoopt.injection`. Genomes are vectors, or have them as `x`.

    Args:
        others: what other fields of the genomes become where a candidate moves.
    """
    genomes = population.genomes
    named = hasattr(genomes, "_replace")
    x = injection.vectors(points, (genomes.x if named else genomes).dtype)
    x = x if walls is None else jnp.clip(x, *walls)
    return injection.placed(population, points, genomes._replace(x=x, **others) if named else x)


def elite_kept(new: Array, value: Array, row: Array, elite: Array) -> Array:
    """New values (n,), where an elite that was asked again in row 0 keeps its value if no answer came."""
    known = jnp.where((row == elite).all(), value, jnp.inf)  # another point may have been moved there
    return new.at[0].set(jnp.where(answered(new[0]), new[0], known))


def unknown(n: int) -> Array:
    """The values of n vectors not yet evaluated: +inf, in the default float type."""
    return jnp.full(n, jnp.inf, jnp.result_type(float))
