"""Noise that is made from other noise and the state of a strategy, or from two keys of which one is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evoopt.noise import kinds, low_rank
from evoopt.noise.independent import gaussian
from evoopt.noise.kinds import Address, Kind, Like, Pick, Seed, Sliced, is_cut
from evoopt.noise.rounding import wide
from evoopt.noise.threefry import fold_in
from evoopt.types import Array, Key, Params, pytree, static


@pytree
class Elementwise:
    """f(z_1, ..., z_k, a_1, ..., scalars), element by element: k draws of a noise, and trees a like the parameters.

    The trees are the state of a strategy, such as a preconditioner. An address is k addresses of the noise.
    """

    noise: Sliced
    trees: tuple[Params, ...]
    scalars: Any
    f: Callable[..., Array] = static()
    draws: int = static(default=1)

    def addresses(self, key: Key, n: int) -> Address:
        return jax.tree.map(lambda a: a.reshape(n, self.draws, *a.shape[1:]), self.noise.addresses(key, n * self.draws))

    def draw(self, address: Address, like: Params) -> Params:
        return kinds.draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return kinds.draw_rows(self, key, n, like)

    def kinds(self, like: Params) -> list[Kind | None]:
        columns = zip(*(jax.tree.leaves(tree) for tree in self.trees), strict=True)
        each = zip(self.noise.kinds(like), columns, strict=True)
        return [None if k is None else _Elements(k, arrays, self.scalars, self.f, self.draws) for k, arrays in each]


@pytree
class _Elements:
    """`Elementwise` noise of one leaf. A seed is (k seeds of the noise, the slices of the trees, scalars)."""

    noise: Kind
    arrays: tuple[Array, ...]
    scalars: Any
    f: Callable[..., Array] = static()
    draws: int = static()

    low_rank = False

    @property
    def cut(self) -> bool:
        return self.noise.cut

    def seeds(self, address: Address, i: int, like: Like, layer: Array | None = None) -> Seed:
        each = [jax.tree.map(lambda a, k=k: a[k], address) for k in range(self.draws)]
        whole = is_cut(self.noise, like) and layer is None  # then everything has the layers as its leading axis
        scalars = jax.tree.map(
            lambda s: jnp.broadcast_to(s, (like.shape[0],)) if whole else jnp.asarray(s), self.scalars
        )
        arrays = self.arrays if layer is None else tuple(x[layer] for x in self.arrays)
        return [self.noise.seeds(a, i, like, layer) for a in each], arrays, scalars

    def slice(self, seed: Seed, like: Like) -> Array:
        return self._made(seed, [self.noise.slice(s, like) for s in seed[0]], lambda x: x)

    def prepare(self, seed: Seed, like: Like) -> Any:
        return [self.noise.prepare(s, like) for s in seed[0]], seed[1], seed[2]

    def part(self, prepared: Any, like: Like, places: Array, pick: Pick) -> Array:
        return self._made(prepared, [self.noise.part(p, like, places, pick) for p in prepared[0]], pick)

    @property
    def lanes(self) -> int:
        return self.noise.lanes

    def block(self, seed: Seed, like: Like, start: Array, values: Array) -> Array:
        pick = lambda x: jax.lax.dynamic_slice_in_dim(x.reshape(self.lanes, -1), start, values.shape[1], axis=1)
        return self._made(seed, [self.noise.block(s, like, start, values) for s in seed[0]], pick)

    def _made(self, seed: Seed, z: list[Array], pick: Pick) -> Array:
        scalars = jax.tree.map(lambda s: s.astype(z[0].dtype), seed[2])
        return self.f(*z, *(pick(x) for x in seed[1]), scalars)


@pytree
class Kept:
    """Low-rank matrices a b^T from two keys, one drawn every step and one kept for many; vectors are Gaussian.

    An address is (key of the step, key that is kept). Genomes carry both, so that a step is along what was probed, even
    if the second key has just changed.
    """

    rank: int = static()
    make: Callable[..., tuple[Array, Array]] = static()  # (seeds of both keys, (m, n), rank, dtype) -> (m, r), (n, r)

    cut = True
    low_rank = True
    lanes = 1

    def addresses(self, key: Key, n: int) -> Address:
        return fold_in(key, jnp.arange(n)), jnp.broadcast_to(fold_in(key, n), (n,))

    def draw(self, address: Address, like: Params) -> Params:
        return kinds.draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return kinds.draw_rows(self, key, n, like)

    def kinds(self, like: Params) -> list[Kind | None]:
        return kinds.by_leaf(self, Fresh(), like)

    def seeds(self, address: Address, i: int, like: Like, layer: Array | None = None) -> Seed:
        step, kept = address
        return gaussian.seeds(step, i, like, layer), gaussian.seeds(kept, i, like, layer)

    def factors(self, seed: Seed, like: Like) -> tuple[Array, Array]:
        k = low_rank.split(like.shape)
        first, last = like.shape[:k], like.shape[k:]
        a, b = self.make(seed, (math.prod(first), math.prod(last)), self.rank, wide(like))
        return a.reshape(*first, -1), b.reshape(*last, -1)

    def slice(self, seed: Seed, like: Like) -> Array:
        return low_rank.outer(*self.factors(seed, like)).astype(like.dtype)

    def prepare(self, seed: Seed, like: Like) -> Any:
        return self.factors(seed, like)

    def part(self, prepared: Any, like: Like, places: Array, pick: Pick) -> Array:
        del pick
        a, b = prepared
        return low_rank.at(a, b, places).astype(like.dtype)

    def block(self, seed: Seed, like: Like, start: Array, values: Array) -> Array:
        a, b = self.factors(seed, like)
        return low_rank.at(a, b, low_rank.columns(start, values)).astype(like.dtype)


@pytree
class Fresh:
    """Gaussian noise of a vector, from the first key of an address of `Kept`."""

    cut = True
    low_rank = False
    lanes = 1

    def seeds(self, address: Address, i: int, like: Like, layer: Array | None = None) -> Seed:
        return gaussian.seeds(address[0], i, like, layer)

    def slice(self, seed: Seed, like: Like) -> Array:
        return gaussian.slice(seed, like)

    def prepare(self, seed: Seed, like: Like) -> Any:
        return gaussian.prepare(seed, like)

    def part(self, prepared: Any, like: Like, places: Array, pick: Pick) -> Array:
        return gaussian.part(prepared, like, places, pick)

    def block(self, seed: Seed, like: Like, start: Array, values: Array) -> Array:
        return gaussian.block(seed, like, start, values)
