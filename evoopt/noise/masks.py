"""Noise on some entries only: those of a mask, small ones, or some leaves and layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.noise import kinds
from evoopt.noise.kinds import Address, Kind, Like, Pick, Seed, Sliced, is_cut, is_low_rank
from evoopt.noise.layers import is_stack, stacks
from evoopt.noise.rounding import wide
from evoopt.types import Array, Key, Params, error, pytree, static


@pytree
class Masked:
    """Noise on entries where a mask is True, or where the parameter is small (Sparse-MeZO).

    Small means |w| <= threshold. That mask is computed from the parameters when needed and never stored, so `draw`
    takes the parameters themselves. Weights that grow above the threshold leave the mask.

    Source: Liu et al. 2024, "Sparse MeZO", arXiv 2402.15751, eq. 3 and algorithm 1.
    """

    noise: Sliced
    masks: Any = None  # a tree like the parameters, of bool arrays
    thresholds: Any = None  # a tree like the parameters, of numbers, or (layers,) for stacks: see `thresholds`

    def addresses(self, key: Key, n: int) -> Address:
        return self.noise.addresses(key, n)

    def draw(self, address: Address, like: Params) -> Params:
        return kinds.draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return kinds.draw_rows(self, key, n, like)

    def kinds(self, like: Params) -> list[Kind | None]:
        plain = self.noise.kinds(like)
        by = self.thresholds if self.masks is None else self.masks
        marks = jax.tree.structure(like).flatten_up_to(by)
        given = self.masks is not None
        return [None if k is None else _MaskedLeaf(k, jnp.asarray(m), given) for k, m in zip(plain, marks, strict=True)]

    def leaf(self, address: Address, i: int, like: Like) -> Array:
        raise error("draw(address, params)", f"leaf {i} alone", "only the whole tree tells which mask a leaf has")


@pytree
class _MaskedLeaf:
    """The noise of one leaf, masked. A seed is (seed of the noise, mask or threshold)."""

    noise: Kind
    mark: Array  # the mask, or the threshold
    given: bool = static()
    whole: bool = static(default=False)  # whether the mask is one bool for each layer

    @property
    def cut(self) -> bool:
        return self.noise.cut

    def seeds(self, address: Address, i: int, like: Like, layer: Array | None = None) -> Seed:
        mark = self.mark
        if is_cut(self.noise, like):
            mark = jnp.broadcast_to(mark, like.shape[:1]) if mark.ndim == 0 else mark
            mark = mark if layer is None else mark[layer]
        return self.noise.seeds(address, i, like, layer), mark

    def _mask(self, mark: Array, values: Any, pick: Pick, shape: tuple[int, ...]) -> Array:
        """The mask of some values of a slice; `pick` takes them from an array of its shape."""
        if self.given:
            return pick(jnp.broadcast_to(mark, shape))
        return jnp.abs(values) <= mark.astype(values.dtype)

    def slice(self, seed: Seed, like: Like) -> Array:
        return jnp.where(self._mask(seed[1], like, lambda x: x, like.shape), self.noise.slice(seed[0], like), 0)

    def prepare(self, seed: Seed, like: Like) -> Any:
        return self.noise.prepare(seed[0], like), seed[1]

    def part(self, prepared: Any, like: Like, places: Array, pick: Pick) -> Array:
        values = like if self.given else pick(like)  # type: ignore[arg-type]
        z = self.noise.part(prepared[0], like, places, pick)
        return jnp.where(self._mask(prepared[1], values, pick, like.shape), z, 0)

    @property
    def lanes(self) -> int:
        return self.noise.lanes

    def block(self, seed: Seed, like: Like, start: Array, values: Array) -> Array:
        pick = lambda x: jax.lax.dynamic_slice_in_dim(x.reshape(self.lanes, -1), start, values.shape[1], axis=1)
        z = self.noise.block(seed[0], like, start, values)
        return jnp.where(self._mask(seed[1], values, pick, like.shape), z, 0)

    @property
    def low_rank(self) -> bool:
        return self.whole and self.noise.low_rank

    def factors(self, seed: Seed, like: Like) -> tuple[Array, Array]:
        assert is_low_rank(self.noise)
        a, b = self.noise.factors(seed[0], like)
        return a * seed[1].reshape(()).astype(a.dtype), b


def thresholds(params: Params, density: float) -> Params:
    """Thresholds for `Masked`: |w| at the quantile `density` of each leaf, or of each layer of a stack.

    >>> float(thresholds({"w": jnp.arange(11.0)}, 0.5)["w"])
    5.0
    """
    if not 0 < density <= 1:
        raise error("a density in (0, 1]", str(density), "density is the fraction that is perturbed, not left out")

    def quantile(w: Array, stack: bool) -> Array:
        axes = tuple(range(1, w.ndim)) if stack and is_stack(w) else None
        return jnp.quantile(jnp.abs(w.astype(wide(w))), density, axis=axes)

    return jax.tree.map(quantile, params, jax.tree.structure(params).unflatten(stacks(params)))


@pytree
class Blocks:
    """Noise on some leaves, and on some layers of the stacks among them: block-coordinate search.

    >>> from evoopt.noise import gaussian
    >>> z = Blocks(gaussian, lambda name: name.startswith("head")).draw(
    ...     jax.random.key(0), {"body": jnp.zeros(3), "head": jnp.zeros(2)}
    ... )
    >>> bool((z["body"] == 0).all() and (z["head"] != 0).all())
    True
    """

    noise: Sliced
    chosen: Callable[[str], bool] = static(default=lambda name: True)  # by the name of a leaf, such as "layers/0/w"
    layers: Any = None  # (layers,) bool; an array, so that it may change from step to step

    def addresses(self, key: Key, n: int) -> Address:
        return self.noise.addresses(key, n)

    def draw(self, address: Address, like: Params) -> Params:
        return kinds.draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return kinds.draw_rows(self, key, n, like)

    def kinds(self, like: Params) -> list[Kind | None]:
        plain = self.noise.kinds(like)
        named = jax.tree_util.tree_leaves_with_path(like)
        return [
            self._layers(k, x) if k is not None and self.chosen(trees.path_name(path)) else None
            for k, (path, x) in zip(plain, named, strict=True)
        ]

    def _layers(self, kind: Kind, like: Array) -> Kind:
        if self.layers is None or like.ndim < 2 or like.shape[0] != len(self.layers):
            return kind
        mask = jnp.asarray(self.layers, bool).reshape(-1, *(1,) * (like.ndim - 1))
        return _MaskedLeaf(kind, mask, given=True, whole=is_cut(kind, like))

    def leaf(self, address: Address, i: int, like: Like) -> Array:
        raise error("draw(address, params)", f"leaf {i} alone", "only its name tells whether a leaf is chosen")
