"""Leaves that are never made: what they know, and what can be done to them without making them.

`Virtual` holds the seeds of its noise and draws it where it is used. `Factored` holds low-rank noise as two factors.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax

from evoopt import bounds
from evoopt import noise as noises
from evoopt.noise.kinds import Kind, Pick, Seed
from evoopt.types import Array, Params
from evoopt.virtual.private import ShapedArray, line_of_the_model

AHEAD = 20  # factors are drawn for all layers of a stack at once if its weights are at least so many times larger


class Materialised(NamedTuple):
    """A leaf that a primitive without a rule has made: whole, or one layer at a time inside a scan."""

    leaf: str  # its name in the parameters, such as "layers/0/w"
    primitive: str
    where: str  # file, line and function of the model
    shape: tuple[int, ...]  # of what was made


@dataclasses.dataclass(eq=False)
class Log:
    """What `explain` collects. Hashed by identity, so that no trace that is cached for another call answers for it."""

    found: list[Materialised] = dataclasses.field(default_factory=list)


class About(NamedTuple):
    """What a leaf knows of itself for `explain`."""

    name: str
    layer: bool  # whether it is a stack, or was cut from one by `scan`
    log: Log | None = None


class Leaf(quax.ArrayValue):
    """An array that is not there: a `Virtual` or a `Factored` one."""

    @staticmethod
    def default(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """What a primitive without a rule does: it makes the leaf."""
        return primitive.bind(*[made(x, primitive) for x in values], **params)


class Virtual(Leaf):
    """`weight + scale * z`, transposed and converted, whose z is drawn from its seeds where it is needed.

    Of a stack, every array here has the layers as its leading axis: `scan` cuts it into one `Virtual` for each layer.
    """

    weight: Array
    seeds: Seed
    scale: Array  # (), of a stack (layers,)
    kind: Kind = eqx.field(static=True)  # the noise of this leaf, without arrays: they are in the seeds
    order: tuple[int, ...] = eqx.field(static=True)  # how the axes of a slice are transposed
    to: Any = eqx.field(static=True)  # the dtype
    about: About = eqx.field(static=True)
    walls: Any = None  # (low, high), each () or of a stack (layers,), at which the sum is mirrored

    @property
    def is_stack(self) -> bool:
        return self.scale.ndim == 1

    @property
    def is_transposed(self) -> bool:
        return self.order != tuple(range(len(self.order)))

    def aval(self) -> Any:
        shape = self.weight.shape
        cut = self.scale.ndim
        return ShapedArray((*shape[:cut], *(shape[cut + i] for i in self.order)), self.to)

    def materialise(self) -> Array:
        def one(weight: Array, seed: Seed, scale: Array, walls: Any) -> Array:
            sum_ = _within(weight + scale * self.kind.slice(seed, weight), walls)
            return sum_.transpose(self.order).astype(self.to)

        return (jax.vmap(one) if self.is_stack else one)(self.weight, self.seeds, self.scale, self.walls)

    def window(self, starts: Sequence[Any], sizes: Sequence[int]) -> Array:
        """The part of a slice that begins at `starts` and has the shape `sizes`, both as transposed."""
        back = np.argsort(self.order)
        starts, sizes = [starts[i] for i in back], [sizes[i] for i in back]
        pick = lambda x: jax.lax.dynamic_slice(x, starts, sizes)
        places = jnp.zeros(sizes, jnp.uint32)
        for axis, start in enumerate(starts):
            along = jax.lax.broadcasted_iota(jnp.uint32, sizes, axis) + jnp.asarray(start).astype(jnp.uint32)
            places = places + along * np.uint32(math.prod(self.weight.shape[axis + 1 :]))
        return self.part(pick(self.weight), places, pick).transpose(self.order).astype(self.to)

    def part(self, weight: Array, places: Array, pick: Pick) -> Array:
        """The entries of a slice at `places`, where its weight is `weight`; see `Kind.part`."""
        z = self.kind.part(self.kind.prepare(self.seeds, self.weight), self.weight, places, pick)
        return _within(weight + self.scale * z, self.walls)

    def layers(self, some: Callable[[Array], Array]) -> Virtual:
        """Of a stack the layers that `some` takes from every array of it."""
        weight, seeds, scale, walls = jax.tree.map(some, (self.weight, self.seeds, self.scale, self.walls))
        return dataclasses.replace(self, weight=weight, seeds=seeds, scale=scale, walls=walls)


class Factored(Leaf):
    """`weight + a b^T`: low-rank noise, drawn.

    The last `len(rows)` axes of the weight belong to a (True) or to b (False), in their order. The axes before
    these are a batch, with which all three begin. The last axis of a and of b is the rank.
    """

    weight: Array
    a: Array
    b: Array
    rows: tuple[bool, ...] = eqx.field(static=True)
    about: About = eqx.field(static=True)

    @property
    def batch(self) -> int:
        return self.weight.ndim - len(self.rows)

    def aval(self) -> Any:
        return ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self) -> Array:
        def one(weight: Array, a: Array, b: Array) -> Array:
            order = np.argsort(np.argsort([not r for r in self.rows], kind="stable"))
            return (weight.astype(a.dtype) + noises.outer(a, b).transpose(order)).astype(weight.dtype)

        for _ in range(self.batch):
            one = jax.vmap(one)
        return one(self.weight, self.a, self.b)

    def factor_axis(self, axis: int) -> int:
        """Which axis of its factor an axis of the weight is."""
        return self.batch + sum(r == self.rows[axis - self.batch] for r in self.rows[: axis - self.batch])

    def on(self, axis: int, f: Callable[[Array, int], Array]) -> Factored:
        """f(array, axis) applied to the weight and to the factor that the axis belongs to."""
        a, b = self.a, self.b
        if axis < self.batch:
            a, b = f(a, axis), f(b, axis)
        elif self.rows[axis - self.batch]:
            a = f(a, self.factor_axis(axis))
        else:
            b = f(b, self.factor_axis(axis))
        return dataclasses.replace(self, weight=f(self.weight, axis), a=a, b=b)


Either: TypeAlias = Virtual | Factored


def is_virtual(x: Any) -> bool:
    """Whether `x` is a virtual leaf."""
    return isinstance(x, Leaf)


def materialised(tree: Params) -> Params:
    """`tree` with arrays instead of virtual leaves."""
    make = lambda x: x.materialise() if isinstance(x, Leaf) else x
    return jax.tree.map(make, tree, is_leaf=is_virtual)


def made(x: Any, primitive: Any) -> Any:
    """`x` as an array, with a line in the log if it was virtual."""
    if not isinstance(x, Either):
        return x
    if x.about.log is not None:
        where = line_of_the_model(os.path.dirname(__file__) + os.sep)
        x.about.log.found.append(Materialised(x.about.name, primitive.name, where, x.shape))
    return x.materialise()


def virtual(x: Array, kind: Kind, seeds: Seed, scale: Any, about: About) -> Virtual:
    """`x + scale * z`, not made."""
    scale = jnp.asarray(scale, x.dtype)
    stack = noises.is_cut(kind, x)
    kind = jax.tree.map(lambda _: None, kind)
    scales = jnp.broadcast_to(scale, x.shape[:1]) if stack else scale
    return Virtual(x, seeds, scales, kind, tuple(range(len(x.shape) - stack)), x.dtype, about)


def folded(x: Any, low: Any, high: Any) -> Any:
    """`x` mirrored at its walls: a virtual leaf stays virtual if the walls are numbers, otherwise it is made."""
    if not isinstance(x, Virtual) or x.walls is not None or jnp.ndim(low) or jnp.ndim(high):
        return bounds.fold(materialised(x), low, high)
    walls = tuple(jnp.asarray(wall, x.weight.dtype) for wall in (low, high))
    if x.is_stack:
        walls = tuple(jnp.broadcast_to(wall, x.scale.shape) for wall in walls)
    return dataclasses.replace(x, walls=walls)


def _within(x: Array, walls: Any) -> Array:
    return x if walls is None else bounds.fold(x, *walls)


def drawn(x: Either) -> Either:
    """Low-rank noise as its factors; other noise, and what is mirrored at walls, as it is."""
    if not isinstance(x, Virtual) or not noises.is_low_rank(x.kind) or x.walls is not None:
        return x
    factors, split = x.kind.factors, noises.split(x.weight.shape[x.scale.ndim :])
    rows = tuple(i < split for i in range(len(x.order)))
    wide = jnp.promote_types(x.weight.dtype, jnp.float32)

    def one(weight: Array, seed: Seed, scale: Array) -> tuple[Array, Array]:
        a, b = factors(seed, weight)
        return a * scale.astype(wide), b

    a, b = noises.computed(lambda: (jax.vmap(one) if x.is_stack else one)(x.weight, x.seeds, x.scale))
    plain = Factored(x.weight, a, b, rows, x.about)
    return converted(transposed(plain, (*range(plain.batch), *(plain.batch + i for i in x.order))), x.to)


def drawn_ahead(x: Any) -> Any:
    """`drawn` for all layers of a stack: drawn inside a scan, the factors of each layer would be a loop in it."""
    if not isinstance(x, Virtual) or not noises.is_low_rank(x.kind):
        return x
    of, layer = x.kind.factors, jax.ShapeDtypeStruct(x.weight.shape[1:], x.weight.dtype)
    factors = jax.eval_shape(lambda s: of(jax.tree.map(lambda leaf: leaf[0], s), layer), x.seeds)
    return drawn(x) if AHEAD * sum(f.size for f in factors) <= math.prod(layer.shape) else x


def converted(x: Any, dtype: Any) -> Any:
    """The leaf with another dtype."""
    if isinstance(x, Virtual):
        return dataclasses.replace(x, to=np.dtype(dtype))
    return dataclasses.replace(x, weight=x.weight.astype(dtype))


def transposed(x: Either, permutation: Sequence[int]) -> Any:
    """The leaf with its axes in another order; NotImplemented where layers would not stay in front."""
    cut = x.scale.ndim if isinstance(x, Virtual) else x.batch
    if tuple(permutation[:cut]) != tuple(range(cut)):
        return NotImplemented
    order = [p - cut for p in permutation[cut:]]
    if isinstance(x, Virtual):
        return dataclasses.replace(x, order=tuple(x.order[p] for p in order))
    rows = tuple(x.rows[p] for p in order)

    def factor(f: Array, mine: bool) -> Array:
        axes = [x.factor_axis(p + cut) for p in order if x.rows[p] == mine]
        return f.transpose(*range(cut), *axes, f.ndim - 1)

    return Factored(x.weight.transpose(permutation), factor(x.a, True), factor(x.b, False), rows, x.about)
