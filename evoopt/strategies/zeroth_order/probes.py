"""What zeroth-order strategies share: slopes from finite differences, and steps along noise that is drawn again.

A probe of direction z is one difference of values; its slope is a scalar. Strategies keep (address of z, slope) and
never z: what a step is made of is drawn again from the addresses that the probes were drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, count, finite
from evoopt.checks import check_popsize, check_sigma
from evoopt.noise.kinds import Noise
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.types import Array, Key, Params, error

Mask = Callable[[Params], Params]


def movable(params: Params, sigma: Any) -> Params:
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
        with jax.ensure_compile_time_eval():  # a number that is known under `jit` too
            rms = float(jnp.sqrt(jnp.mean(jnp.square(leaf.astype(noises.wide(leaf))))))
        gap = spacing(rms, leaf.dtype)
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
    return float(kind.smallest_subnormal) if x == 0 else float(kind.eps) * 2.0 ** math.floor(math.log2(x))


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


def settle_in_place(old: Any, new: Any, used: Array, moved: tuple[str, ...] = ("mean",)) -> Any:
    """As `answers.settle`, but fields of the size of the parameters are taken from `new` as they are.

    To choose between the old and the new parameters would keep both. A step without an answer has to leave them as they
    are by itself: its weights are 0.
    """
    some = jnp.isfinite(used).any()
    kept = {f: trees.where(some, getattr(new, f), getattr(old, f)) for f in new._fields if f not in moved}
    kept["unanswered"] = old.unanswered + jnp.where(some, 0, 1).astype(jnp.int32)
    return new._replace(**kept)


def matrices(params: Params) -> Params:
    """Which leaves weight decay pulls: neither biases nor the scales of norms, also where these are stacked.

    That is all leaves with two axes or more, except those with two in a stack of layers (`noise.name_stacks`).
    """
    return jax.tree.structure(params).unflatten([not vector for vector in noises.are_vectors(params)])


def step(
    mean: Params, noise: Noise, addresses: Any, weights: Array, shrink: Any = 0.0, mask: Mask | None = None
) -> Params:
    """(1 - shrink) mean - sum_j weights_j z_j, slice by slice; only leaves that `mask` chooses shrink."""
    decay = 0.0 if mask is None else jax.tree.map(lambda pulled: shrink if pulled else 0.0, mask(mean))
    return noises.add_weighted(mean, noise, addresses, -weights, decay=decay)


def by_slice(update: Callable[..., tuple], *params: Params) -> tuple:
    """New trees from `update(i, layer, *slices) -> slices`: leaf by leaf, and stacks of layers in place, one at a time.

    Args:
        update: gets the number of the leaf, the layer of a stack (None where it is none), and that slice of each tree.
        *params: trees of one structure; the leaves of all are stacks where those of the first are.
    """
    _, treedef = jax.tree.flatten(params[0])
    columns, stacks = [], noises.stacks(params[0])
    for i, xs in enumerate(zip(*(treedef.flatten_up_to(p) for p in params), strict=True)):
        if not (stacks[i] and noises.is_stack(xs[0])):
            columns.append(tuple(update(i, None, *xs)))
            continue

        def layer(place: Array, xs: tuple, i: int = i) -> tuple:
            # All are cut before any is put back; otherwise XLA keeps a second copy of each tree.
            cut = lambda: tuple(jax.lax.dynamic_index_in_dim(x, place, keepdims=False) for x in xs)
            new = update(i, place, *noises.computed(cut))
            put = jax.lax.dynamic_update_index_in_dim
            return tuple(put(x, n.astype(x.dtype), place, 0) for x, n in zip(xs, new, strict=True))

        columns.append(jax.lax.fori_loop(0, xs[0].shape[0], layer, xs))
    return tuple(treedef.unflatten(column) for column in zip(*columns, strict=True))


def drawer(noise: Noise, params: Params) -> Callable[..., Array]:
    """`draw(address, i, layer, like)`: z of one slice, for `by_slice`; `like` is that slice of the parameters.

    Raises:
        TypeError: for noise that can only be drawn as a whole.
    """
    if not isinstance(noise, noises.Sliced):
        raise error(
            "noise whose leaves can be drawn one at a time: gaussian, rademacher, LowRank, ...",
            type(noise).__name__,
            "orthogonal directions need all the leaves at once",
            TypeError,
        )
    leaves, kinds = jax.tree.leaves(params), noise.kinds(params)

    def draw(address: Any, i: int, layer: Array | None, like: Array) -> Array:
        kind = kinds[i]
        if kind is None:
            return jnp.zeros(like.shape, like.dtype)
        return kind.slice(kind.seeds(address, i, leaves[i], layer), like)

    return draw


def pairs(noise: noises.Kept, mean: Params, sigma: Any, keys: tuple[Key, Key], popsize: int) -> Population:
    """A generation of pairs along popsize / 2 directions of the first key, all with the second key, which is kept."""
    steps = jnp.repeat(noises.fold_in(keys[0], jnp.arange(popsize // 2)), 2)
    sign = jnp.tile(jnp.array([1.0, -1.0], jnp.float32), popsize // 2)
    genomes = sampling.Genome((steps, jnp.broadcast_to(keys[1], (popsize,))), sign)
    return Population(sampling.Perturbed(mean, sigma, None, noise), genomes)
