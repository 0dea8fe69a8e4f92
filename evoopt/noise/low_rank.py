"""Matrices of low rank: a direction of an (m, n) weight costs rank (m + n) numbers instead of m n."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from evoopt.noise import kinds
from evoopt.noise.independent import gaussian
from evoopt.noise.kinds import Address, Kind, Like, Pick, Seed
from evoopt.noise.rounding import wide
from evoopt.noise.threefry import fold_in, normals
from evoopt.types import Array, Key, Params, error, pytree, static

UNROLLED = 8  # up to this rank, products are written as sums of outer products, which XLA fuses into what adds them


@pytree
class LowRank:
    """Matrices of low rank: z = a b^T / sqrt(rank), a (m, rank) and b (n, rank) standard normal; mean 0, covariance I.

    Slices with more than two axes are seen as the matrix with the smallest m + n. Vectors are dense Gaussian: leaves
    with fewer than two axes, and those of a stack with two (see `name_stacks`).

    Source: Sarkar et al. 2025, "Evolution strategies at the hyperscale", arXiv 2511.16652 (EGGROLL), eq. for E_i.
    """

    rank: int = static(default=1)
    cut = True
    low_rank = True
    lanes = 1

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise error("a rank of at least 1", repr(self.rank), "full rank is `gaussian`, not a rank of 0")

    def addresses(self, key: Key, n: int) -> Address:
        return fold_in(key, jnp.arange(n))

    def draw(self, address: Address, like: Params) -> Params:
        return kinds.draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return kinds.draw_rows(self, key, n, like)

    def kinds(self, like: Params) -> list[Kind | None]:
        return kinds.by_leaf(self, gaussian, like)

    def leaf(self, address: Address, i: int, like: Like) -> Array:
        """Leaf i as a matrix, or a stack of matrices; a vector if it has fewer than two axes."""
        return kinds.leaf(gaussian if len(like.shape) < 2 else self, address, i, like)

    def seeds(self, address: Address, i: int, like: Like, layer: Array | None = None) -> Seed:
        return gaussian.seeds(address, i, like, layer)

    def factors(self, seed: Seed, like: Like) -> tuple[Array, Array]:
        k = split(like.shape)
        m, n = math.prod(like.shape[:k]), math.prod(like.shape[k:])
        z = normals(seed, (m + n) * self.rank, wide(like))
        a = z[: m * self.rank] * np.asarray(self.rank**-0.5, z.dtype)
        return a.reshape(*like.shape[:k], self.rank), z[m * self.rank :].reshape(*like.shape[k:], self.rank)

    def slice(self, seed: Seed, like: Like) -> Array:
        return outer(*self.factors(seed, like)).astype(like.dtype)

    def prepare(self, seed: Seed, like: Like) -> Any:
        return self.factors(seed, like)

    def part(self, prepared: Any, like: Like, places: Array, pick: Pick) -> Array:
        del pick
        a, b = prepared
        return at(a, b, places).astype(like.dtype)

    def block(self, seed: Seed, like: Like, start: Array, values: Array) -> Array:
        a, b = self.factors(seed, like)
        return at(a, b, columns(start, values)).astype(like.dtype)


def at(a: Array, b: Array, places: Array) -> Array:
    """a b^T at places (uint32) of the slice, counted in row-major order."""
    a, b = (f.reshape(-1, f.shape[-1]) for f in (a, b))
    return jnp.sum(a[places // b.shape[0]] * b[places % b.shape[0]], axis=-1)


def columns(start: Array, values: Array) -> Array:
    """The places (1, m) of a block that begins at `start`, of a kind with one lane."""
    return start.astype(jnp.uint32) + jnp.arange(values.shape[1], dtype=jnp.uint32)[None]


def split(shape: tuple[int, ...]) -> int:
    """How many of the first axes of a slice are the rows of its matrix: as many as make rows + columns smallest."""
    return min(range(1, max(len(shape), 2)), key=lambda s: math.prod(shape[:s]) + math.prod(shape[s:]))


def outer(a: Array, b: Array) -> Array:
    """sum_r a[..., r] b[..., r], every axis of a before every axis of b."""
    spread = lambda x: x.reshape(*x.shape, *(1,) * (b.ndim - 1))
    if a.shape[-1] <= UNROLLED:
        return sum(spread(a[..., r]) * b[..., r] for r in range(a.shape[-1]))  # type: ignore[return-value]
    return jnp.tensordot(a, b, axes=(-1, -1), precision="highest")
