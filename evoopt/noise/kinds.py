"""What noise is: directions that are drawn from their addresses, in part or whole, with the same bits.

A direction has the structure of the parameters. It is never sent or kept, only its address. `Noise` is what a strategy
needs: addresses, and directions from them. Most noise is `Sliced` as well: each leaf of a direction has a `Kind`, which
draws it slice by slice. A slice is one layer of a stack, or a whole leaf that is no stack. Leaf i has the key
`fold_in(key, i)`, and layer l of a stack `fold_in(fold_in(key, i), l)`, so nothing depends on what else is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp

from evoopt.noise.layers import are_vectors, is_stack, stacks
from evoopt.types import Array, Key, Params, pytree

Address: TypeAlias = Any  # what one direction needs to be drawn again: a key, or a tuple of keys and places
Seed: TypeAlias = Any  # what one slice needs to be drawn again: a key, or a pytree with a key and other arrays
Like: TypeAlias = "Array | jax.ShapeDtypeStruct"  # shape and dtype of what is drawn
Pick: TypeAlias = Callable[[Array], Array]  # some entries of an array that is shaped like a slice


class Noise(Protocol):
    """A distribution of directions with mean 0 and covariance I (on the entries that it perturbs)."""

    def addresses(self, key: Key, n: int) -> Address:
        """The addresses of n directions; every leaf has leading axis n."""
        ...

    def draw(self, address: Address, like: Params) -> Params:
        """The direction of one address, with the structure, shapes and dtypes of `like`.

        `like` are the parameters themselves: some noise depends on their values.
        """
        ...

    def rows(self, key: Key, n: int, like: Params) -> Params:
        """The n directions of `addresses(key, n)` at once; every leaf has leading axis n."""
        ...


@runtime_checkable
class Sliced(Noise, Protocol):
    """Noise whose leaves can be drawn one at a time, and stacks layer by layer. `isinstance` answers whether it can.

    Only such noise can be virtual, and only along it can a step be made in place.
    """

    def kinds(self, like: Params) -> list[Kind | None]:
        """The noise of each leaf, in the order of `jax.tree.leaves`; None for a leaf that is not perturbed."""
        ...


class Kind(Protocol):
    """The noise of one leaf. Everything but `seeds` is about one slice, whose seed and `like` are given.

    `like` is that slice of the parameters; where a kind depends on their values (a mask by size) it must be the array.
    """

    @property
    def cut(self) -> bool:
        """Whether a leaf with three or more axes is a stack, each layer with a seed of its own."""
        ...

    @property
    def low_rank(self) -> bool:
        """Whether this is a `LowRankKind`, which has `factors` too."""
        ...

    @property
    def lanes(self) -> int:
        """How many numbers one random word gives; they lie size / lanes apart. See `block`."""
        ...

    def seeds(self, address: Address, i: int, like: Like, layer: Array | None = None) -> Seed:
        """The seed of leaf i, which is like `like` as a whole.

        Of a stack: the seeds of all layers, with a leading axis, or the seed of one layer.
        """
        ...

    def slice(self, seed: Seed, like: Like) -> Array:
        """z of the slice, with the shape and dtype of `like`."""
        ...

    def prepare(self, seed: Seed, like: Like) -> Any:
        """What `part` needs instead of the seed, so that it is computed once for many parts."""
        ...

    def part(self, prepared: Any, like: Like, places: Array, pick: Pick) -> Array:
        """z at some places of the slice, with the shape of `places`.

        Args:
            prepared: `prepare(seed, like)`.
            like: the slice.
            places: uint32, counted in row-major order.
            pick: takes the entries at `places` from an array like the slice.
        """
        ...

    def block(self, seed: Seed, like: Like, start: Array, values: Array) -> Array:
        """z (lanes, m) of the columns start, start + 1, ... of the slice seen as (lanes, size / lanes).

        This is the cheapest way to draw a part. `values` (lanes, m) are the parameters there.
        """
        ...


class LowRankKind(Kind, Protocol):
    """The noise of one leaf whose slices are products, z = a b^T."""

    def factors(self, seed: Seed, like: Like) -> tuple[Array, Array]:
        """(a, b), at least float32: a has the first axes of the slice, b the others (see `split`), then the rank."""
        ...


def is_low_rank(kind: Kind) -> TypeGuard[LowRankKind]:
    """Whether `kind` has `factors`."""
    return kind.low_rank


def is_cut(kind: Kind, leaf: Any) -> bool:
    """Whether a leaf is a stack of layers, each with a seed of its own."""
    return is_stack(leaf) and kind.cut


@pytree
class Whole:
    """The noise of a leaf with three or more axes that is no stack: one slice, whatever its shape."""

    kind: Kind
    cut = False

    def seeds(self, address: Address, i: int, like: Like, layer: Array | None = None) -> Seed:
        assert layer is None, "a leaf that is no stack has no layers"
        return self.kind.seeds(address, i, jax.ShapeDtypeStruct((math.prod(like.shape), 1), like.dtype))

    def slice(self, seed: Seed, like: Like) -> Array:
        return self.kind.slice(seed, like)

    def prepare(self, seed: Seed, like: Like) -> Any:
        return self.kind.prepare(seed, like)

    def part(self, prepared: Any, like: Like, places: Array, pick: Pick) -> Array:
        return self.kind.part(prepared, like, places, pick)

    @property
    def lanes(self) -> int:
        return self.kind.lanes

    def block(self, seed: Seed, like: Like, start: Array, values: Array) -> Array:
        return self.kind.block(seed, like, start, values)

    @property
    def low_rank(self) -> bool:
        return self.kind.low_rank

    def factors(self, seed: Seed, like: Like) -> tuple[Array, Array]:
        assert is_low_rank(self.kind)
        return self.kind.factors(seed, like)


def by_leaf(kind: Kind, vectors: Kind, like: Params) -> list[Kind | None]:
    """The noise of each leaf: `vectors` for biases and scales, `kind` for the others, in one slice if no stack."""
    leaves = jax.tree.leaves(like)
    given = [vectors if vector else kind for vector in are_vectors(like)]
    wholes = [is_stack(x) and not stack for x, stack in zip(leaves, stacks(like), strict=True)]
    return [Whole(k) if whole else k for k, whole in zip(given, wholes, strict=True)]


def draw(noise: Sliced, address: Address, like: Params) -> Params:
    """The direction of `address`: each leaf from its kind of noise, 0 for leaves that are not perturbed."""
    leaves, treedef = jax.tree.flatten(like)
    kinds = enumerate(noise.kinds(like))
    return treedef.unflatten(
        [
            jnp.zeros(x.shape, x.dtype) if k is None else leaf(k, address, i, x)
            for (i, k), x in zip(kinds, leaves, strict=True)
        ]
    )


def draw_rows(noise: Sliced, key: Key, n: int, like: Params) -> Params:
    """The n directions of `noise.addresses(key, n)` at once; every leaf has leading axis n."""
    return jax.vmap(lambda a: noise.draw(a, like))(noise.addresses(key, n))


def leaf(kind: Kind, address: Address, i: int, like: Like) -> Array:
    """Leaf i of the direction of `address`."""
    seeds = kind.seeds(address, i, like)
    if not is_cut(kind, like):
        return kind.slice(seeds, like)
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.vmap(lambda s: kind.slice(s, jax.ShapeDtypeStruct(like.shape[1:], like.dtype)))(seeds)
    return jax.vmap(kind.slice)(seeds, like)
