"""Weighted sums of directions, and steps along them that are added to the parameters in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.noise.kinds import Address, Kind, LowRankKind, Noise, Seed, Sliced, is_cut, is_low_rank
from evoopt.noise.low_rank import UNROLLED, outer, split
from evoopt.noise.rounding import Narrow, current, wide
from evoopt.noise.threefry import computed
from evoopt.types import Array, Params

CHUNK = 1 << 19  # numbers of a large leaf that are updated at once, unless a sixteenth of it is more
DIRECTIONS = 256  # low-rank directions summed in one product


def weighted_sum(
    draw: Callable[[Address], Params],
    addresses: Address,
    weights: Any,
    like: Params,
    of: Callable[[Params], Any] = lambda z: z,
) -> Any:
    """sum_j weights_j of(z_j), one direction at a time: memory O(d), whatever n is.

    Args:
        draw: address -> direction; the identity if `addresses` are the directions themselves.
        addresses: of n directions, every leaf with leading axis n.
        weights: (n,), or a tree of such arrays that is a prefix of the tree `of(z)`.
        like: the parameters.
        of: what is summed, by default z itself; `lambda z: (z, squares(z))` sums two things in one pass.
    """

    def add(total: Any, row: Any) -> tuple[Any, None]:
        address, weight = row
        weighted = lambda w, t: jax.tree.map(lambda x: w.astype(wide(x)) * x.astype(wide(x)), t)
        return jax.tree.map(jnp.add, total, jax.tree.map(weighted, weight, of(draw(address)))), None

    shapes = jax.eval_shape(lambda: of(trees.strong(like)))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s)), shapes)
    return jax.lax.scan(add, zero, (addresses, weights))[0]


def weighted_rows(rows: Params, weights: Array) -> Params:
    """sum_j weights_j rows_j as a matrix product: every leaf of `rows` has leading axis n, `weights` is (n,)."""
    product = lambda r: jnp.tensordot(weights.astype(wide(r)), r.astype(wide(r)), axes=1, precision="highest")
    return jax.tree.map(product, rows)


def chunk_of(size: int, at_least: int) -> int:
    """How many of `size` numbers to work on at once: few enough for the memory, enough to keep a GPU busy."""
    return max(at_least, size // 16)


def chunked(chunk: Callable[[Array, int, Array], Array], n: int, m: int, x: Array) -> Array:
    """`chunk(start, m, x)` for starts 0, m, 2m, ... below n; the last chunk may be shorter."""
    x = jax.lax.fori_loop(0, n // m, lambda i, x: chunk(i * m, m, x), x)
    return chunk(jnp.int32(n - n % m), n % m, x) if n % m else x


def slice_sum(draw: Callable[[Address], Array], addresses: Address, weights: Array, like: Any) -> Array:
    """sum_j weights_j draw(address_j), one at a time, with the shape of `like`, at least float32."""
    dtype = wide(like)
    weigh = lambda a, w: w.astype(dtype) * draw(a).astype(dtype)
    if len(weights) == 1:  # a sum of one needs no buffer
        return weigh(jax.tree.map(lambda a: a[0], addresses), weights[0])
    add = lambda total, row: (total + weigh(*row), None)
    return jax.lax.scan(add, jnp.zeros(like.shape, dtype), (addresses, weights))[0]


def add_weighted(params: Params, noise: Noise, addresses: Address, weights: Array, *, decay: Any = 0.0) -> Params:
    """(1 - decay) params + sum_j weights_j z_j, slice by slice: in place if the caller donates `params`.

    With `Sliced` noise nothing of the size of the parameters is made: one layer's noise is alive at a time, a large
    matrix is updated `CHUNK` numbers at a time, and low-rank noise is summed as one product (m, n rank) x (n rank,
    columns). Sums are float32 and rounded once, to the dtype of the leaf: to the nearest, or at random inside
    `rounding`.

    Args:
        params: the parameters; masks by size are computed from them too.
        noise: what the directions are drawn from.
        addresses: of n directions, every leaf with leading axis n.
        weights: (n,).
        decay: a number, or a tree like `params` with one number for each leaf.

    >>> from evoopt.noise import gaussian
    >>> params, addresses = {"w": jnp.ones((3, 2))}, gaussian.addresses(jax.random.key(0), 4)
    >>> add_weighted(params, gaussian, addresses, jnp.full(4, 0.1))["w"].shape
    (3, 2)
    """
    leaves, treedef = jax.tree.flatten(params)
    decays = treedef.flatten_up_to(trees.like(decay, params))
    kinds: list[Kind | None] = [None] * len(leaves)
    totals: list[Array | None] = [None] * len(leaves)
    if isinstance(noise, Sliced):
        kinds = noise.kinds(params)
    else:
        totals = treedef.flatten_up_to(weighted_sum(lambda a: noise.draw(a, params), addresses, weights, params))
    at_random = current()
    narrows = [Narrow(x.dtype) for x in leaves] if at_random is None else at_random.narrows(leaves)
    new = []
    for i, (x, kind, d, total, narrow) in enumerate(zip(leaves, kinds, decays, totals, narrows, strict=True)):
        if total is not None:
            new.append(narrow(_kept(x, d) + total))
        elif kind is None:
            new.append(decayed(x, d, narrow))
        else:
            seeds = lambda address, layer=None, kind=kind, i=i, x=x: kind.seeds(address, i, x, layer)
            new.append(add_to_leaf(x, kind, Terms(seeds, addresses, weights, d), narrow))
    if at_random is not None:
        at_random.rounded += new
    return treedef.unflatten(new)


class Terms(NamedTuple):
    """What is added to one leaf, or to one slice of it."""

    seeds: Callable[..., Seed]  # (address, layer=None) -> the seeds of a stack, or the seed of a slice
    addresses: Address  # of n directions
    weights: Array  # (n,)
    decay: Any  # a number


def decayed(x: Array, decay: Any, narrow: Narrow) -> Array:
    """(1 - decay) x: `add_weighted` for a leaf that is not perturbed."""
    return x if isinstance(decay, (int, float)) and decay == 0 else narrow(_kept(x, decay))


def add_to_leaf(x: Array, kind: Kind, terms: Terms, narrow: Narrow, *, one_slice: bool = False) -> Array:
    """`add_weighted` for one leaf, or for one slice of it."""
    return (_add_slice if one_slice or not is_cut(kind, x) else _add_stack)(x, kind, terms, narrow)


def _kept(x: Array, decay: Any) -> Array:
    """(1 - decay) x, wide."""
    x = x.astype(wide(x))
    # Without decay there is no product at all, not even by one: XLA could contract it with the sum that follows.
    return x if isinstance(decay, (int, float)) and decay == 0 else x - jnp.asarray(decay, x.dtype) * x


def _add_stack(x: Array, kind: Kind, terms: Terms, narrow: Narrow) -> Array:
    seeds, addresses, weights, decay = terms
    like = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    fused = not narrow.at_random  # rounding at random is not fused: the whole sum would be stored wide
    if fused and len(weights) == 1 and not kind.low_rank:  # one pass over the stack: no noise is stored
        total = slice_sum(lambda a: jax.vmap(kind.slice)(seeds(a), x), addresses, weights, x)
        return (_kept(x, decay) + total).astype(x.dtype)
    if fused and is_low_rank(kind):
        factors = lambda: jax.vmap(jax.vmap(lambda s: kind.factors(s, like)), 1)(jax.vmap(seeds)(addresses))
        if len(weights) * jax.eval_shape(factors)[0].shape[-1] <= UNROLLED:  # also one pass, the factors drawn before
            total = lambda w, a, b: outer(*_weighted_factors(a, b, weights)).reshape(w.shape)
            sums = jax.vmap(lambda w, a, b: _kept(w, decay) + total(w, a, b))
            return sums(x, *computed(factors)).astype(x.dtype)

    def layer(place: Array, x: Array) -> Array:
        w = jax.lax.dynamic_index_in_dim(x, place, keepdims=False)
        own = terms._replace(seeds=lambda address: seeds(address, place))
        new = _add_slice(w, kind, own, narrow.at(place))
        return jax.lax.dynamic_update_index_in_dim(x, new, place, 0)

    return jax.lax.fori_loop(0, x.shape[0], layer, x)


def _add_slice(w: Array, kind: Kind, terms: Terms, narrow: Narrow) -> Array:
    if is_low_rank(kind):
        return _add_low_rank(w, kind, terms, narrow)
    seeds, addresses, weights, decay = terms
    if w.size <= CHUNK or w.size % kind.lanes or (len(weights) == 1 and not narrow.at_random):
        total = slice_sum(lambda a: kind.slice(seeds(a), w), addresses, weights, w)
        return narrow(_kept(w, decay) + total)
    like = jax.ShapeDtypeStruct(w.shape, w.dtype)

    def chunk(start: Array, m: int, view: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(view, start, m, axis=1)
        total = slice_sum(lambda a: kind.block(seeds(a), like, start, part), addresses, weights, part)
        new = narrow.at(start)(_kept(part, decay) + total)
        return jax.lax.dynamic_update_slice_in_dim(view, new, start, axis=1)

    view = w.reshape(kind.lanes, -1)
    columns = chunk_of(w.size, CHUNK) // kind.lanes
    return chunked(chunk, view.shape[1], min(view.shape[1], columns), view).reshape(w.shape)


def _add_low_rank(w: Array, kind: LowRankKind, terms: Terms, narrow: Narrow) -> Array:
    seeds, addresses, weights, decay = terms
    like = jax.ShapeDtypeStruct(w.shape, w.dtype)
    matrix = w.reshape(math.prod(w.shape[: split(w.shape)]), -1)
    n, size, columns = len(weights), min(len(weights), DIRECTIONS), matrix.shape[1]

    def add(start: Array, count: int, matrix: Array, decay: Any = 0.0) -> Array:
        some = lambda x: jax.lax.dynamic_slice_in_dim(x, start, count)
        a, b = computed(lambda: jax.vmap(lambda s: kind.factors(seeds(s), like))(jax.tree.map(some, addresses)))
        a, b = _weighted_factors(a, b, some(weights))

        def rows(place: Array, m: int, matrix: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(matrix, place, m)
            new = _kept(part, decay) + outer(jax.lax.dynamic_slice_in_dim(a, place, m), b)
            return jax.lax.dynamic_update_slice_in_dim(matrix, narrow.at(start, place)(new), place, 0)

        return chunked(rows, len(matrix), max(1, min(len(matrix), chunk_of(w.size, CHUNK) // columns)), matrix)

    matrix = add(jnp.int32(0), size, matrix, decay)
    if n > size:  # decayed once, and rounded once for each product
        matrix = chunked(lambda start, m, x: add(start + size, m, x), n - size, size, matrix)
    return matrix.reshape(w.shape)


def _weighted_factors(a: Array, b: Array, weights: Array) -> tuple[Array, Array]:
    """The factors of n directions, weighed, as (rows, n rank) and (columns, n rank)."""
    flat = lambda f: jnp.moveaxis(f.reshape(len(f), -1, f.shape[-1]), 1, 0).reshape(-1, len(f) * f.shape[-1])
    return flat(a * weights.astype(a.dtype).reshape(-1, *(1,) * (a.ndim - 1))), flat(b)
