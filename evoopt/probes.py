"""What zeroth-order strategies share: slopes from finite differences, and steps along noise that is drawn again.

A probe of direction z is one difference of values; its slope is a scalar. Strategies keep (address of z, slope) and
never z: what a step is made of is drawn again from the addresses that the probes were drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from evoopt import noise as noises
from evoopt import sampling, trees
from evoopt.population import Population
from evoopt.strategy import check_popsize, check_sigma
from evoopt.types import Array, Params, error
from evoopt.utilities import answered, count, finite

Mask = Callable[[Params], Params]


def start(params: Params, sigma: Any) -> Params:
    """`params` to start from, after checking that probes of `sigma` move them.

    Raises:
        ValueError: as `trees.searchable`; or when sigma is below the distance of neighbouring numbers, at the size that
            parameters have, for more than half of them: rounding would make another direction of the probe.
    """
    params = trees.searchable(params)
    coarse, largest = 0, (0, "", 0.0, None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not leaf.size or isinstance(leaf, Tracer) or not isinstance(sigma, (int, float)):
            continue
        rms = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(wide(leaf)))))
        gap = spacing(float(rms), leaf.dtype)
        if sigma < gap:
            coarse += leaf.size
            largest = max(largest, (leaf.size, trees.path_name(path), gap, leaf.dtype), key=lambda leaf: leaf[0])
    if 2 * coarse > trees.size(params):
        _, name, gap, dtype = largest
        raise error(
            f"sigma of at least {gap:.2g}, the distance of neighbouring {dtype} numbers at the size of '{name}'",
            f"sigma={sigma}, lost to rounding in {coarse} of {trees.size(params)} parameters",
            "half-precision parameters with a sigma made for float32; 1e-3 suits bfloat16 weights of about 0.02",
        )
    return params


def spacing(x: float, dtype: Any) -> float:
    """The distance from x to the next number of `dtype`.

    >>> spacing(0.02, jnp.bfloat16) == 2.0**-13
    True
    """
    kind = jnp.finfo(dtype)
    return float(kind.smallest_subnormal) if x == 0 else float(kind.eps) * 2.0 ** int(jnp.floor(jnp.log2(x)))


def wide(x: Any) -> Any:
    """The dtype in which sums over `x` are taken: its own, or float32 for narrower ones."""
    return x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.float32


def check(popsize: int, sigma: Any, two_sided: bool = True) -> None:
    """Raise the three-part error for a popsize or a sigma that probes cannot have."""
    check_popsize(popsize, 2, even=two_sided)
    check_sigma(sigma)


def scheme(two_sided: bool) -> sampling.Scheme:
    """Pairs at +z and -z, or one candidate at the mean and the others at +z."""
    return sampling.antithetic if two_sided else sampling.forward


def slopes(values: Array, sigma: Any, two_sided: bool = True) -> Array:
    """Directional derivatives (directions,) from values (n,); NaN where a value that the difference needs was lost.

    Two-sided: (l+ - l-) / (2 sigma). One-sided: (l - l_0) / sigma, with l_0 the first value.
    """
    x, ok = finite(values), answered(scheme(two_sided).used(values))
    if two_sided:
        return jnp.where(ok[::2], (x[::2] - x[1::2]) / (2 * sigma), jnp.nan)
    return jnp.where(ok[1:], (x[1:] - x[0]) / sigma, jnp.nan)


def directions(population: Population, two_sided: bool = True) -> Any:
    """The addresses of a generation's directions, in the order of `slopes`."""
    first = slice(None, None, 2) if two_sided else slice(1, None)
    return jax.tree.map(lambda a: a[first], population.genomes.address)


def average(g: Array) -> Array:
    """Weights (directions,) that make the mean over the probes that were answered: g / m, lost ones 0."""
    return jnp.where(jnp.isnan(g), 0, g) / count(g)


def matrices(params: Params) -> Params:
    """Which leaves weight decay pulls: those with at least two axes, so neither biases nor the scales of norms.

    Vectors of layers that are stacked have two axes: give a mask of your own for those.
    """
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def step(
    mean: Params, noise: Any, addresses: Any, weights: Array, shrink: Any = 0.0, mask: Mask | None = None
) -> Params:
    """(1 - shrink) mean - sum_j weights_j z_j, where only leaves that `mask` chooses shrink."""
    total = noises.weighted_sum(lambda a: noise.draw(a, mean), addresses, weights, mean)
    pulled = jax.tree.map(lambda _: False, mean) if mask is None else mask(mean)

    def moved(m: Array, z: Array, pull: bool) -> Array:
        x = m.astype(z.dtype)
        return ((x - jnp.asarray(shrink, z.dtype) * x if pull else x) - z).astype(m.dtype)

    return jax.tree.map(moved, mean, total, pulled)


def leaf_sum(noise: Any, addresses: Any, weights: Array, i: int, like: Array) -> Array:
    """sum_j weights_j z_j of leaf i only, in float32 at least: other leaves are not drawn."""
    dtype = wide(like)

    def add(total: Array, row: Any) -> tuple[Array, None]:
        address, weight = row
        return total + weight.astype(dtype) * noise.leaf(address, i, like).astype(dtype), None

    return jax.lax.scan(add, jnp.zeros(like.shape, dtype), (addresses, weights))[0]
