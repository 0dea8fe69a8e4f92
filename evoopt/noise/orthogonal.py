"""Directions that are orthogonal to each other within groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.noise.independent import gaussian
from evoopt.noise.kinds import Address, Noise
from evoopt.noise.rounding import wide
from evoopt.types import Array, Key, Params, pytree, static


@pytree
class Orthogonal:
    """Directions that are orthogonal within groups of `group`; each keeps the length it was drawn with.

    Exact for Gaussian noise: a group of independent normal rows has independent lengths and Haar-distributed
    directions (Choromanski et al. 2018, "Structured evolution with compact architectures", Gaussian orthogonal
    exploration). The address of a direction is (its group's key, its place). To draw one alone costs as much as to
    draw and orthogonalize its group, O(group^2 d). At most d directions can be orthogonal, so larger groups are split.
    On a GPU, one group and several at once are decomposed by different programs, whose last bits may differ.
    """

    noise: Noise = static(default=gaussian)
    group: int = static(default=32)

    def addresses(self, key: Key, n: int) -> Address:
        groups = -(-n // self.group)
        keys = jnp.repeat(jax.random.split(key, groups), self.group)[:n]
        return keys, jnp.tile(jnp.arange(self.group), groups)[:n]

    def draw(self, address: Address, like: Params) -> Params:
        key, place = address
        return jax.tree.map(lambda rows: rows[place], self._group(key, like))

    def rows(self, key: Key, n: int, like: Params) -> Params:
        groups = -(-n // self.group)
        rows = jax.vmap(lambda k: self._group(k, like))(jax.random.split(key, groups))
        return jax.tree.map(lambda r: r.reshape(groups * self.group, *r.shape[2:])[:n], rows)

    def _group(self, key: Key, like: Params) -> Params:
        _, unravel = trees.ravel(like)
        z = jax.vmap(trees.flatten)(self.noise.rows(key, self.group, like))  # (group, d)
        d = z.shape[1]
        blocks = [z[i : i + d] for i in range(0, self.group, d)]
        return jax.vmap(unravel)(jnp.concatenate([_turned(b) for b in blocks]))


def _turned(rows: Array) -> Array:
    """The rows (m, d), m <= d, made orthogonal in their order; each keeps its length."""
    z = rows.astype(wide(rows))  # there is no QR of narrower types
    q, r = jnp.linalg.qr(z.T)
    # LAPACK leaves the signs of R's diagonal arbitrary. Only if they are positive is Q Haar-distributed, with mean 0.
    q = q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)
    return (q.T * jnp.linalg.norm(z, axis=1, keepdims=True)).astype(rows.dtype)
