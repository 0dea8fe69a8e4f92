"""Noise whose numbers are drawn independently of each other: normals or random signs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from evoopt.noise import kinds
from evoopt.noise.kinds import Address, Kind, Like, Pick, Seed
from evoopt.noise.layers import is_stack
from evoopt.noise.threefry import PARTS, Parts, fold_in, normals, once, signs
from evoopt.types import Array, Key, Params, pytree, static


@pytree
class Independent:
    """Every number of a direction drawn alone, with mean 0 and variance 1. It is the kind of its leaves itself.

    >>> z = gaussian.draw(jax.random.key(0), {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)})
    >>> z["w"].shape
    (3, 2)
    """

    sample: Callable[[Key, int, DTypeLike], Array] = static()  # (key, n, dtype) -> (n,)
    cut = True
    low_rank = False

    def addresses(self, key: Key, n: int) -> Address:
        return fold_in(key, jnp.arange(n))

    def draw(self, address: Address, like: Params) -> Params:
        return kinds.draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return kinds.draw_rows(self, key, n, like)

    def kinds(self, like: Params) -> list[Kind | None]:
        return kinds.by_leaf(self, self, like)

    def leaf(self, address: Address, i: int, like: Like) -> Array:
        """Leaf i of the direction of `address`; `like` gives shape and dtype."""
        return kinds.leaf(self, address, i, like)

    def seeds(self, address: Address, i: int, like: Like, layer: Array | None = None) -> Seed:
        key = once(fold_in(address, i))
        return once(fold_in(key, jnp.arange(like.shape[0]) if layer is None else layer)) if is_stack(like) else key

    def slice(self, seed: Seed, like: Like) -> Array:
        return self.sample(seed, math.prod(like.shape), like.dtype).reshape(like.shape)

    def prepare(self, seed: Seed, like: Like) -> Any:
        return self._parts().prepare(seed, like.size)

    def part(self, prepared: Any, like: Like, places: Array, pick: Pick) -> Array:
        del pick
        return self._parts().at(prepared, like.size, places, like.dtype)

    @property
    def lanes(self) -> int:
        return self._parts().lanes

    def block(self, seed: Seed, like: Like, start: Array, values: Array) -> Array:
        return self._parts().block(seed, like.size, start, values.shape[1], values.dtype)

    def _parts(self) -> Parts:
        whole = lambda key, n: self.sample(key, n, jnp.float32)
        block = lambda key, n, start, m, dtype: jax.lax.dynamic_slice(whole(key, n), (start,), (m,))[None].astype(dtype)
        return PARTS.get(self.sample) or Parts(whole, lambda z, n, j, dtype: z[j].astype(dtype), 1, block)


gaussian = Independent(normals)
"""Standard normals."""

rademacher = Independent(signs)
"""Random signs, -1 or +1: ten times as fast to draw on a CPU."""
