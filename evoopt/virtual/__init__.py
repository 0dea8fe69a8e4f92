"""Virtual parameters: arrays that act like `weight + scale * z` and are never made.

A population of perturbed models must not cost population x parameters. `perturbed` makes a tree whose large leaves know
(weight, seeds of the noise, scale), and `call` runs any JAX function of such a tree, unchanged, under `quax.quaxify`:
every primitive that meets a virtual leaf is handed to a rule of this file.

- Low-rank noise: x (W + s a b^T) = x W + (x s a) b^T in every layout of `dot_general`; transpose, conversion, reshape,
  slices, gathered rows, sums and products with scalars act on W, a and b. Under `vmap` over members x W is one product.
  Where they are small, the factors of all layers of a stack are drawn before `scan` cuts it.
- Full-rank noise: a stack of layers is cut by `scan` and perturbed layer by layer, so that the noise of one layer is
  alive at a time. Of a large matrix that is no stack (an embedding, an output head) only the rows that are gathered, or
  one chunk of a product, are perturbed at a time.
- A primitive without a rule makes the one leaf that it meets. `explain` lists which leaves, by what, and where.

Weights are only read, so probing needs no restoring and nothing drifts.
"""

# pyright: reportAttributeAccessIssue=false
# (rules are given the base class of leaves; which of the two it is, they ask)

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import numpy as np
import quax
from jax._src import core, source_info_util
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.typing import ArrayLike
from quax._compat import unpack_scan_args
from quax._primitives import scan_quax
from quax._trace import _QuaxTrace

from evoopt import bounds, trees
from evoopt import noise as noises
from evoopt.types import Array, Params

AHEAD = 20  # factors of a stack are drawn for all layers at once where they are so many times smaller than its weights
DENSE = "perturbed from the start: its step-size is no single number"
CHUNK = 1 << 19  # numbers of a large matrix of full-rank noise that are perturbed at once


class Materialised(NamedTuple):
    """A leaf that a primitive without a rule has made: whole, or one layer at a time inside a scan."""

    leaf: str  # its name in the parameters, as in "layers/0/w"
    primitive: str
    where: str  # file, line and function of the model
    shape: tuple[int, ...]  # of what was made


class About(NamedTuple):
    """What a leaf knows of itself for `explain`."""

    name: str
    layer: bool  # a stack, or what `scan` has cut from one
    log: Any = None


@dataclasses.dataclass(eq=False)
class _Log:
    """Hashed by identity, so that no trace cached for another call answers for this one."""

    found: list[Materialised] = dataclasses.field(default_factory=list)


def call(function: Callable[..., Any], params: Params, *args: Any, **kwargs: Any) -> Any:
    """`function(params, *args, **kwargs)`, where leaves of `params` may be virtual. Arrays come out."""
    if not any(isinstance(x, Leaf) for x in _leaves(params)):
        return function(params, *args, **kwargs)
    out = quax.quaxify(function)(params, *args, **kwargs)
    return materialised(out)


def transformed(transform: Callable[[Params], Params], params: Params) -> Params:
    """`transform(params)`, where leaves stay virtual whose primitives all have rules."""
    return quax.quaxify(transform)(params) if any(is_virtual(x) for x in _leaves(params)) else transform(params)


def materialised(tree: Params) -> Params:
    """`tree` with arrays in the place of virtual leaves."""
    make = lambda x: x.materialise() if isinstance(x, Leaf) else x
    return jax.tree.map(make, tree, is_leaf=lambda x: isinstance(x, Leaf))


def _leaves(tree: Params) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Leaf))


def perturbed(params: Params, noise: Any, address: Any, scale: Any, *, log: Any = None) -> Params:
    """`params + scale * z(address)`, with virtual leaves where that saves memory.

    Args:
        params: the parameters. Leaves with fewer than two axes or 1024 numbers, and leaves whose scale is not a single
            number, are perturbed as they are; leaves that the noise leaves alone stay what they are.
        noise: `gaussian`, `rademacher`, `LowRank(...)`, `Masked(...)` or `Blocks(...)`.
        address: of one direction, one row of `noise.addresses(key, n)`.
        scale: a number, or a tree like `params`.
        log: where `explain` collects.

    >>> from evoopt.noise import LowRank
    >>> noise, params = LowRank(2), {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}
    >>> address = jax.random.key(0)
    >>> model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    >>> y = call(model, perturbed(params, noise, address, 0.1), jnp.ones(64))
    >>> dense = jax.tree.map(lambda w, z: w + 0.1 * z, params, noise.draw(address, params))
    >>> bool(jnp.allclose(y, model(dense, jnp.ones(64)), atol=1e-5))
    True
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    scales = treedef.flatten_up_to(trees.like(scale, params))
    vectors = noises.are_vectors(params)
    new = []
    for i, ((path, x), kind, s, vector) in enumerate(zip(named, noise.kinds(params), scales, vectors, strict=True)):
        if kind is None:
            new.append(x)
        elif noises.is_large(x) and not vector and jnp.ndim(s) == 0:
            new.append(
                _virtual(
                    x, kind, kind.seeds(address, i, x), s, About(trees.path_name(path), noises.is_cut(kind, x), log)
                )
            )
        else:
            if log is not None and noises.is_large(x) and not vector:
                log.found.append(Materialised(trees.path_name(path), "nothing", DENSE, x.shape))
            new.append(x + jnp.asarray(s, x.dtype) * noises.leaf(kind, address, i, x))
    return treedef.unflatten(new)


def explain(
    function: Callable[..., Any], params: Params, *args: Any, noise: Any = noises.gaussian
) -> list[Materialised]:
    """Which virtual leaves `function(params, *args)` would make whole, by which primitive, and where. Nothing is run.

    Args:
        function: the model or objective.
        params: the parameters, arrays or `jax.ShapeDtypeStruct`.
        *args: what else the function takes.
        noise: the noise of the leaves.

    >>> params = {"w": jnp.ones((64, 64))}
    >>> explain(lambda p, x: x @ p["w"], params, jnp.ones(64))
    []
    >>> [(m.leaf, m.primitive) for m in explain(lambda p: jnp.sum(p["w"] ** 2), params)]
    [('w', 'integer_pow')]
    """
    log = _Log()

    def run(params: Params, args: Any) -> Any:
        return call(function, perturbed(params, noise, jax.random.key(0, impl="threefry2x32"), 1.0, log=log), *args)

    jax.eval_shape(run, params, args)
    return log.found


# ---- leaves ----


def _default(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
    return primitive.bind(*[_made(x, primitive) for x in values], **params)


def _made(x: Any, primitive: Any) -> Any:
    """`x` as an array, with a line in the log if it was virtual."""
    if not isinstance(x, Virtual | Factored):
        return x
    if x.about.log is not None:
        x.about.log.found.append(Materialised(x.about.name, primitive.name, _where(), x.shape))
    return x.materialise()


def _where() -> str:
    """The line of the model that is being traced."""
    for f in source_info_util.user_frames(source_info_util.current().traceback):
        if not f.file_name.startswith((__file__, *quax.__path__)):
            return f"{f.file_name}:{f.start_line} ({f.function_name})"
    return "unknown"


class Leaf(quax.ArrayValue):
    """An array that is not there."""

    default = staticmethod(_default)


class Virtual(Leaf):
    """`weight + scale * z`, transposed and converted, whose z is drawn from its seeds where it is needed.

    Of a stack, every array here has the layers as its leading axis: `scan` cuts it into one `Virtual` for each layer.
    """

    weight: Array
    seeds: Any
    scale: Array  # (), of a stack (layers,)
    kind: Any = eqx.field(static=True)  # the noise of this leaf, without arrays
    order: tuple[int, ...] = eqx.field(static=True)  # how the axes of a slice are transposed
    to: Any = eqx.field(static=True)  # the dtype
    about: About = eqx.field(static=True)
    walls: Any = None  # (low, high), each () or of a stack (layers,), at which the sum is mirrored

    @property
    def is_stack(self) -> bool:
        return self.scale.ndim == 1

    def aval(self) -> Any:
        shape = self.weight.shape
        cut = self.scale.ndim
        return core.ShapedArray((*shape[:cut], *(shape[cut + i] for i in self.order)), self.to)

    def materialise(self) -> Array:
        def one(weight: Array, seed: Any, scale: Array, walls: Any) -> Array:
            sum_ = _within(weight + scale * self.kind.slice(seed, weight), walls)
            return sum_.transpose(self.order).astype(self.to)

        return (jax.vmap(one) if self.is_stack else one)(self.weight, self.seeds, self.scale, self.walls)

    def window(self, starts: Sequence[Any], sizes: Sequence[int]) -> Array:
        """The part of a slice that begins at `starts` and has a shape, both as transposed."""
        back = np.argsort(self.order)
        starts, sizes = [starts[i] for i in back], [sizes[i] for i in back]
        pick = lambda x: jax.lax.dynamic_slice(x, starts, sizes)
        places = jnp.zeros(sizes, jnp.uint32)
        for axis, start in enumerate(starts):
            along = jax.lax.broadcasted_iota(jnp.uint32, sizes, axis) + jnp.asarray(start).astype(jnp.uint32)
            places = places + along * np.uint32(math.prod(self.weight.shape[axis + 1 :]))
        return self.part(pick(self.weight), places, pick).transpose(self.order).astype(self.to)

    def part(self, weight: Array, places: Array, pick: Callable[[Array], Array]) -> Array:
        z = self.kind.part(self.kind.prepare(self.seeds, self.weight), self.weight, places, pick)
        return _within(weight + self.scale * z, self.walls)


def _within(x: Array, walls: Any) -> Array:
    return x if walls is None else bounds.fold(x, *walls)


def is_virtual(x: Any) -> bool:
    """Whether `x` is a virtual leaf."""
    return isinstance(x, Leaf)


def folded(x: Any, low: Any, high: Any) -> Any:
    """`x` mirrored at its walls: a virtual leaf where it is used, if the walls are numbers; else it is made."""
    if not isinstance(x, Virtual) or x.walls is not None or jnp.ndim(low) or jnp.ndim(high):
        return bounds.fold(materialised(x), low, high)
    walls = tuple(jnp.asarray(wall, x.weight.dtype) for wall in (low, high))
    if x.is_stack:
        walls = tuple(jnp.broadcast_to(wall, x.scale.shape) for wall in walls)
    return dataclasses.replace(x, walls=walls)


class Factored(Leaf):
    """`weight + a b^T`: low-rank noise, drawn.

    The last `len(rows)` axes of the weight belong to a (True) or to b (False), in their order; axes before these are a
    batch that all three have in front. The last axis of a and of b is the rank.
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
        return core.ShapedArray(self.weight.shape, self.weight.dtype)

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
        """f(array, axis) applied to the weight and to the factor the axis belongs to."""
        a, b = self.a, self.b
        if axis < self.batch:
            a, b = f(a, axis), f(b, axis)
        elif self.rows[axis - self.batch]:
            a = f(a, self.factor_axis(axis))
        else:
            b = f(b, self.factor_axis(axis))
        return dataclasses.replace(self, weight=f(self.weight, axis), a=a, b=b)


def _virtual(x: Array, kind: Any, seeds: Any, scale: Any, about: About) -> Virtual:
    scale = jnp.asarray(scale, x.dtype)
    stack = noises.is_cut(kind, x)
    kind = jax.tree.map(lambda _: None, kind)  # its arrays are in the seeds
    scales = jnp.broadcast_to(scale, x.shape[:1]) if stack else scale
    return Virtual(x, seeds, scales, kind, tuple(range(len(x.shape) - stack)), x.dtype, about)


def _drawn(x: Leaf) -> Leaf:
    """Low-rank noise as its factors; other noise, and what is mirrored at walls, as it is."""
    if not isinstance(x, Virtual) or not x.kind.low_rank or x.walls is not None:
        return x
    split = noises.split(x.weight.shape[x.scale.ndim :])
    rows = tuple(i < split for i in range(len(x.order)))
    wide = jnp.promote_types(x.weight.dtype, jnp.float32)

    def one(weight: Array, seed: Any, scale: Array) -> tuple[Array, Array]:
        a, b = x.kind.factors(seed, weight)
        return a * scale.astype(wide), b

    a, b = noises.computed(lambda: (jax.vmap(one) if x.is_stack else one)(x.weight, x.seeds, x.scale))
    plain = Factored(x.weight, a, b, rows, x.about)
    return _convert(_transpose(plain, (*range(plain.batch), *(plain.batch + i for i in x.order))), x.to)


def _drawn_ahead(x: Any) -> Any:
    """`_drawn`, for all layers of a stack: drawn in a scan, the factors of each layer would be a loop in it."""
    if not isinstance(x, Virtual) or not x.kind.low_rank:
        return x
    layer = jax.ShapeDtypeStruct(x.weight.shape[1:], x.weight.dtype)
    factors = jax.eval_shape(lambda s: x.kind.factors(jax.tree.map(lambda leaf: leaf[0], s), layer), x.seeds)
    return _drawn(x) if AHEAD * sum(f.size for f in factors) <= math.prod(layer.shape) else x


# ---- rules ----


def _rule(primitive: Any, *more: Any) -> Callable[[Any], Any]:
    """Register `rule(leaf, *others, **params)`; where it answers NotImplemented the leaf is made."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for p in (primitive, *more):

            @quax.register(p)
            def _(x: Leaf, *others: ArrayLike | quax.ArrayValue, _p=p, **params):
                if any(isinstance(y, Leaf) for y in others):
                    others = tuple(_made(y, _p) for y in others)
                out = rule(x, *others, **params)
                if out is NotImplemented and _drawn(x) is not x:
                    out = rule(_drawn(x), *others, **params)
                return _default(_p, (x, *others), params) if out is NotImplemented else out

        return rule

    return register


def _convert(x: Any, dtype: Any) -> Any:
    if isinstance(x, Virtual):
        return dataclasses.replace(x, to=np.dtype(dtype))
    return dataclasses.replace(x, weight=x.weight.astype(dtype))


@_rule(primitives.convert_element_type_p)
def _(x: Leaf, *, new_dtype: Any, **_: Any) -> Any:
    return _convert(x, new_dtype) if jnp.issubdtype(new_dtype, jnp.floating) else NotImplemented


@_rule(primitives.copy_p, primitives.stop_gradient_p, primitives.sharding_constraint_p)
def _(x: Leaf, **_: Any) -> Leaf:
    return x


def _transpose(x: Any, permutation: Sequence[int]) -> Any:
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


@_rule(primitives.transpose_p)
def _(x: Leaf, *, permutation: Sequence[int]) -> Any:
    return _transpose(x, permutation)


@_rule(primitives.squeeze_p)
def _(x: Leaf, *, dimensions: Sequence[int]) -> Any:
    shape = x.shape
    return _reshape(x, tuple(n for i, n in enumerate(shape) if i not in dimensions))


@_rule(primitives.reshape_p)
def _(x: Leaf, *, new_sizes: Sequence[int], dimensions: Any = None, **_: Any) -> Any:
    return NotImplemented if dimensions is not None else _reshape(x, tuple(new_sizes))


@_rule(primitives.broadcast_in_dim_p)
def _(x: Leaf, *others: Any, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any) -> Any:
    added = [n for i, n in enumerate(shape) if i not in broadcast_dimensions]
    grown = any(shape[d] != n for d, n in zip(broadcast_dimensions, x.shape, strict=True))
    return NotImplemented if others or grown or any(n != 1 for n in added) else _reshape(x, tuple(shape))


def _reshape(x: Any, shape: tuple[int, ...]) -> Any:
    if shape == x.shape:
        return x
    first = lambda tree: jax.tree.map(lambda f: f[0], tree)
    if isinstance(x, Virtual):
        if x.is_stack and x.shape == (1, *shape):
            alone = first((x.seeds, x.scale, x.walls))
            return dataclasses.replace(x, weight=x.weight[0], seeds=alone[0], scale=alone[1], walls=alone[2])
        return NotImplemented
    cut = x.batch
    if cut and x.shape == (1, *shape):
        return Factored(x.weight[0], x.a[0], x.b[0], x.rows, x.about)
    if shape[:cut] != x.shape[:cut]:
        return NotImplemented
    rows: list[bool] = []  # axes of 1 come and go; those of a group, all of one factor, merge or split
    for old, new in _groups(x.shape[cut:], shape[cut:]):
        of = {x.rows[i] for i in old}
        if len(of) > 1:
            return NotImplemented
        rows += [of.pop() if of else True] * len(new)
    sizes = lambda mine: [n for n, r in zip(shape[cut:], rows, strict=True) if r == mine]
    factor = lambda f, mine: f.reshape(*f.shape[:cut], *sizes(mine), f.shape[-1])
    return Factored(x.weight.reshape(shape), factor(x.a, True), factor(x.b, False), tuple(rows), x.about)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Places of axes in `old` and in `new` with the same product, as small groups as there are; axes of 1 alone."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            groups.append(([i], []))
            i += 1
        elif j < len(new) and new[j] == 1:
            groups.append(([], [j]))
            j += 1
        else:
            first, second, m, n = [i], [j], old[i], new[j]
            while m != n:
                if m < n:
                    first.append(first[-1] + 1)
                    m *= old[first[-1]]
                else:
                    second.append(second[-1] + 1)
                    n *= new[second[-1]]
            groups.append((first, second))
            i, j = first[-1] + 1, second[-1] + 1
    return groups


@_rule(primitives.slice_p)
def _(x: Leaf, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Any) -> Any:
    sizes = [n - i for i, n in zip(start_indices, limit_indices, strict=True)]
    if strides is None or all(step == 1 for step in strides):
        return _sliced(x, start_indices, sizes)
    whole = all(step == 1 for step in strides[1:])
    if isinstance(x, Virtual) and not (x.is_stack and whole and tuple(sizes[1:]) == x.shape[1:]):
        return NotImplemented  # low-rank noise is drawn, and comes again as its factors; other noise is made
    some = lambda f, axis, i: jax.lax.slice_in_dim(f, start_indices[i], limit_indices[i], strides[i], axis)
    if isinstance(x, Virtual):
        weight, seeds, scale, walls = jax.tree.map(lambda f: some(f, 0, 0), (x.weight, x.seeds, x.scale, x.walls))
        return dataclasses.replace(x, weight=weight, seeds=seeds, scale=scale, walls=walls)
    for i in range(x.ndim):
        x = x.on(i, lambda f, axis, i=i: some(f, axis, i))
    return x


@_rule(primitives.dynamic_slice_p)
def _(x: Leaf, *starts: Any, slice_sizes: Sequence[int]) -> Any:
    # A slice that would leave the array is moved back into it.
    inside = [jnp.clip(s, 0, n - size) for s, n, size in zip(starts, x.shape, slice_sizes, strict=True)]
    return _sliced(x, inside, slice_sizes)


def _sliced(x: Any, starts: Sequence[Any], sizes: Sequence[int]) -> Any:
    if isinstance(x, Factored):
        for axis, (start, n) in enumerate(zip(starts, sizes, strict=True)):
            if n != x.shape[axis]:
                x = x.on(axis, lambda f, i, s=start, n=n: jax.lax.dynamic_slice_in_dim(f, s, n, i))
        return x
    if not x.is_stack:
        return NotImplemented if x.kind.low_rank else x.window(starts, sizes)
    if tuple(sizes[1:]) != x.shape[1:]:
        return NotImplemented
    some = lambda f: jax.lax.dynamic_slice_in_dim(f, starts[0], sizes[0])
    seeds, scale, walls = jax.tree.map(some, (x.seeds, x.scale, x.walls))
    return dataclasses.replace(x, weight=some(x.weight), seeds=seeds, scale=scale, walls=walls)


@_rule(jax.lax.split_p)
def _(x: Leaf, *, sizes: Sequence[int], axis: int) -> Any:
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    part = lambda start, n: _sliced(
        x, [start if i == axis else 0 for i in range(x.ndim)], [n if i == axis else m for i, m in enumerate(x.shape)]
    )
    parts = [part(start, n) for start, n in zip(starts, sizes, strict=True)]
    return NotImplemented if any(p is NotImplemented for p in parts) else parts


@_rule(primitives.gather_p)
def _(x: Any, indices: Array, **params: Any) -> Any:
    """Whole rows of a table, as an embedding is read: by an index, or by the `vmap` of a slice at (index, 0).

    Of a stack, whole layers: the experts that a router chose, each with its seed.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if isinstance(x, Virtual) and x.is_stack:
        return _layers(x, indices, params)
    whole = 0 in numbers.start_index_map and tuple(sizes) == (1, *x.shape[1:])
    if numbers.operand_batching_dims or not whole or numbers.collapsed_slice_dims not in ((), (0,)):
        return NotImplemented
    asked = indices[..., numbers.start_index_map.index(0)]
    rows = jnp.clip(asked, 0, x.shape[0] - 1)

    def there(probed: Array, plain: Array) -> Array:
        """What is out of bounds is for the gather of the weight to decide: a fill value has no noise."""
        if params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
            return probed
        inside = jnp.expand_dims((asked >= 0) & (asked < x.shape[0]), numbers.offset_dims)
        return jnp.where(inside, probed, plain.astype(probed.dtype))

    axes = [i for i in range(x.ndim) if i not in numbers.collapsed_slice_dims]  # of a row
    pick = lambda table: primitives.gather_p.bind(table, indices, **params)
    if isinstance(x, Virtual):
        if x.is_stack or x.kind.low_rank or x.order != tuple(range(x.ndim)):
            return NotImplemented
        size = math.prod(x.shape[1:])
        inside = jnp.arange(size, dtype=jnp.uint32).reshape([sizes[i] for i in axes])
        last = range(rows.ndim, rows.ndim + inside.ndim)
        places = jnp.expand_dims(rows.astype(jnp.uint32) * np.uint32(size), last) + inside
        plain = pick(x.weight)
        return there(x.part(plain, jnp.moveaxis(places, last, numbers.offset_dims), pick), plain).astype(x.to)
    if x.batch:
        return NotImplemented
    weight = pick(x.weight)
    mine = x.rows[0]  # the factor that has the rows
    table, other = (x.a, x.b) if mine else (x.b, x.a)
    table = table[rows]  # (..., axes of the table's factor but the first, rank)
    table = jnp.expand_dims(table, rows.ndim) if 0 in axes else table
    ids, rank = [*range(100, 100 + rows.ndim)], 1000
    of = lambda side: [i for i in axes if x.rows[i] == side]
    out = [*ids]
    for place, axis in zip(numbers.offset_dims, axes, strict=True):
        out.insert(place, axis)
    delta = _contract(table, [*ids, *of(mine), rank], other, [*of(not mine), rank], out)
    return there((weight.astype(delta.dtype) + delta).astype(weight.dtype), weight)


def _layers(x: Virtual, indices: Array, params: dict[str, Any]) -> Any:
    """Layers of a stack by a vector of numbers, as a stack; NotImplemented for any other gather."""
    numbers = params["dimension_numbers"]
    chosen = (
        tuple(numbers.start_index_map) == (0,) and tuple(numbers.collapsed_slice_dims) == (0,) and indices.ndim == 2
        and tuple(params["slice_sizes"]) == (1, *x.shape[1:]) and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == tuple(range(1, x.ndim))
        and params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP
    )  # fmt: skip
    if not chosen:
        return NotImplemented
    rows = jnp.clip(indices[:, 0], 0, x.shape[0] - 1)
    weight, seeds, scale, walls = jax.tree.map(lambda f: f[rows], (x.weight, x.seeds, x.scale, x.walls))
    return dataclasses.replace(x, weight=weight, seeds=seeds, scale=scale, walls=walls)


def _contract(x: Array, x_axes: list[int], y: Array, y_axes: list[int], out: list[int]) -> Array:
    """einsum of two arrays with numbered axes. Sums over few products are written out, so that XLA fuses them."""
    summed = [i for i in x_axes if i not in out]
    if len(summed) == 1 and summed[0] in y_axes and x.shape[x_axes.index(summed[0])] <= noises.UNROLLED:
        (k,) = summed

        def spread(f: Array, axes: list[int], place: int) -> Array:
            f, axes = jax.lax.index_in_dim(f, place, axes.index(k), keepdims=False), [i for i in axes if i != k]
            f = f.transpose([axes.index(i) for i in out if i in axes])
            return jnp.expand_dims(f, [place for place, i in enumerate(out) if i not in axes])

        ranks = range(x.shape[x_axes.index(k)])
        return sum(spread(x, x_axes, r) * spread(y, y_axes, r) for r in ranks)  # type: ignore[return-value]
    return jnp.einsum(x, x_axes, y, y_axes, out)


def _dot(x: Any, y: Any, first: bool, dimension_numbers: Any, params: dict[str, Any]) -> Any:
    """dot_general of a leaf and an array; `first` says whether the leaf is the left one."""
    (contract_l, contract_r), (batch_l, batch_r) = dimension_numbers
    contract, batch = (contract_l, batch_l) if first else (contract_r, batch_r)
    contract_y, batch_y = (contract_r, batch_r) if first else (contract_l, batch_l)
    product = lambda w, y: primitives.dot_general_p.bind(
        *((w, y) if first else (y, w)), dimension_numbers=dimension_numbers, **params
    )
    free = [i for i in range(x.ndim) if i not in (*contract, *batch)]
    # Axes of the result: the batch, the free ones of the left, the free ones of the right. Numbered 0, 1, ... where
    # they are the leaf's, 100, 101, ... where they are the array's.
    free_y = [100 + i for i in range(y.ndim) if i not in (*contract_y, *batch_y)]
    out = [*batch, *free, *free_y] if first else [*batch, *free_y, *free]
    if isinstance(x, Factored):
        return _dot_factored(x, y, product, out, dict(zip((*contract_y, *batch_y), (*contract, *batch), strict=True)))
    if x.is_stack or x.kind.low_rank:
        return NotImplemented
    if x.about.layer or math.prod(x.shape) <= CHUNK:
        return product(x.materialise(), y)
    axis = max(free or range(x.ndim), key=lambda i: x.shape[i])
    if axis not in free:
        return NotImplemented
    whole = jax.eval_shape(product, jax.ShapeDtypeStruct(x.shape, x.dtype), y)
    n = x.shape[axis]
    m = max(1, min(n, noises.chunk_of(math.prod(x.shape), CHUNK) * n // math.prod(x.shape)))
    sizes = [m if i == axis else k for i, k in enumerate(x.shape)]

    def chunk(i: Array, total: Array) -> Array:
        start = jnp.minimum(i * m, n - m)  # the last one overlaps the one before it, with the same numbers
        part = product(x.window([start if i == axis else 0 for i in range(x.ndim)], sizes), y)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, out.index(axis))

    return jax.lax.fori_loop(0, -(-n // m), chunk, jnp.zeros(whole.shape, whole.dtype))


def _dot_factored(x: Factored, y: Array, product: Callable[..., Array], out: list[int], shared: dict[int, int]) -> Any:
    base = product(x.weight, y)
    cut, rank = x.batch, 1000  # axes are numbered: the leaf's own, the array's from 100, and the rank's
    if any(i < cut and i not in out for i in range(x.ndim)):
        return NotImplemented  # a sum over layers
    axes = {side: [*range(cut), *(cut + i for i, r in enumerate(x.rows) if r == side), rank] for side in (True, False)}
    y_axes = [shared.get(i, 100 + i) for i in range(y.ndim)]
    summed = lambda side: math.prod(x.shape[i] for i in axes[side] if i != rank and i not in out)
    one = summed(True) >= summed(False)  # the factor that takes up most of y comes first
    f, g = (x.a, x.b) if one else (x.b, x.a)
    kept = [i for i in y_axes if i in out or i in axes[not one]]
    middle = [*kept, *(i for i in axes[one] if i not in kept and (i in out or i == rank))]
    with_rank = jnp.einsum(y, y_axes, f.astype(y.dtype), axes[one], middle, preferred_element_type=g.dtype)
    if not x.about.layer and base.size > CHUNK and out == middle[:-1] + axes[not one][:-1]:
        # An output head, whose logits can be as large as the model: the sum is made in the place of the product. As an
        # expression XLA would add again for some uses of it, and keep the product for them beside the sum.
        with_rank, g = with_rank.reshape(-1, g.shape[-1]), g.reshape(-1, g.shape[-1])

        def rows(start: Array, m: int, total: Array) -> Array:
            part, t = (jax.lax.dynamic_slice_in_dim(z, start, m) for z in (total, with_rank))
            part = (part.astype(g.dtype) + noises.outer(t, g)).astype(base.dtype)
            return jax.lax.dynamic_update_slice_in_dim(total, part, start, 0)

        matrix = base.reshape(-1, len(g))
        most = noises.chunk_of(matrix.size, CHUNK) // len(g)
        total = noises.chunked(rows, len(matrix), max(1, min(len(matrix), most)), matrix)
        return total.reshape(base.shape)
    delta = _contract(with_rank, middle, g, axes[not one], out)
    return (base.astype(delta.dtype) + delta).astype(base.dtype)


@quax.register(primitives.dot_general_p)
def _(x: Leaf, y: ArrayLike, *, dimension_numbers: Any, **params: Any) -> Any:
    return _dot_or_make(x, jnp.asarray(y), True, dimension_numbers, params)


@quax.register(primitives.dot_general_p)
def _(y: ArrayLike, x: Leaf, *, dimension_numbers: Any, **params: Any) -> Any:
    return _dot_or_make(x, jnp.asarray(y), False, dimension_numbers, params)


@quax.register(primitives.dot_general_p)
def _(x: Leaf, y: Leaf, *, dimension_numbers: Any, **params: Any) -> Any:
    made = _made(y, primitives.dot_general_p)  # two virtual leaves: the second is made
    return _dot_or_make(x, made, True, dimension_numbers, params)


def _dot_or_make(x: Leaf, y: Array, first: bool, dimension_numbers: Any, params: dict[str, Any]) -> Any:
    result = _dot(x, y, first, dimension_numbers, params)
    if result is NotImplemented:
        result = _dot(_drawn(x), y, first, dimension_numbers, params) if _drawn(x) is not x else result
    if result is NotImplemented:
        made = _made(x, primitives.dot_general_p)
        pair = (made, y) if first else (y, made)
        return primitives.dot_general_p.bind(*pair, dimension_numbers=dimension_numbers, **params)
    return result


def _linear(x: Any) -> Any:
    """`x` in a form in which sums and products act on weight and noise apart; None where it has none.

    Not where a conversion or a wall comes between, nor where the noise depends on the weight, as a mask by size does.
    """
    x = _drawn(x)
    if isinstance(x, Factored):
        return x
    plain = isinstance(x.kind, noises.Independent) or (
        isinstance(x.kind, noises.Whole) and isinstance(x.kind.kind, noises.Independent)
    )
    return x if plain and x.walls is None and x.to == x.weight.dtype else None


def _scaled(x: Any, c: Any, weight: Array) -> Any:
    """The leaf whose weight is `weight` and whose noise is c times that of `x`, for a number c."""
    if isinstance(x, Factored):
        return dataclasses.replace(x, weight=weight, a=x.a * jnp.asarray(c, x.a.dtype))
    return dataclasses.replace(x, weight=weight, scale=x.scale * jnp.asarray(c, x.scale.dtype))


def _arithmetic(x: Leaf, primitive: Any, change: Callable[[Array], Array], c: Any, made: Callable[[Array], Any]) -> Any:
    """`made` of the leaf as an array, or the leaf with its weight changed and its noise multiplied by c."""
    form = _linear(x)
    return made(_made(x, primitive)) if form is None else _scaled(form, c, change(form.weight))


def _fits(x: Leaf, y: Any) -> bool:
    """Whether y can be added to the weight: a number, or an array like a leaf that is not transposed."""
    transposed = isinstance(x, Virtual) and x.order != tuple(range(len(x.order)))
    return jnp.ndim(y) == 0 or (jnp.shape(y) == x.shape and not transposed)


def _times(x: Leaf, y: Any, primitive: Any) -> Any:
    product = lambda w: primitive.bind(w, y)
    if jnp.ndim(y):
        return product(_made(x, primitive))
    return _arithmetic(x, primitive, product, y, product)


def _plus(x: Leaf, y: Any, primitive: Any) -> Any:
    total = lambda w: primitive.bind(w, y)
    return _arithmetic(x, primitive, total, 1, total) if _fits(x, y) else total(_made(x, primitive))


for _primitive, _of in ((primitives.mul_p, _times), (primitives.add_p, _plus), (primitives.add_jaxvals_p, _plus)):

    @quax.register(_primitive)
    def _(x: Leaf, y: ArrayLike, *, _p=_primitive, _of=_of, **_: Any) -> Any:
        return _of(x, y, _p)

    @quax.register(_primitive)
    def _(y: ArrayLike, x: Leaf, *, _p=_primitive, _of=_of, **_: Any) -> Any:
        return _of(x, y, _p)


@quax.register(primitives.sub_p)
def _(x: Leaf, y: ArrayLike, **_: Any) -> Any:
    rest = lambda w: primitives.sub_p.bind(w, y)
    return _arithmetic(x, primitives.sub_p, rest, 1, rest) if _fits(x, y) else rest(_made(x, primitives.sub_p))


@quax.register(primitives.sub_p)
def _(y: ArrayLike, x: Leaf, **_: Any) -> Any:
    rest = lambda w: primitives.sub_p.bind(y, w)
    fits = _fits(x, y) and (jnp.ndim(y) > 0 or x.ndim == 0)
    change = rest if fits else lambda w: primitives.sub_p.bind(jnp.broadcast_to(jnp.asarray(y, w.dtype), w.shape), w)
    return _arithmetic(x, primitives.sub_p, change, -1, rest) if _fits(x, y) else rest(_made(x, primitives.sub_p))


@quax.register(primitives.div_p)
def _(x: Leaf, y: ArrayLike, **_: Any) -> Any:
    quotient = lambda w: primitives.div_p.bind(w, y)
    if jnp.ndim(y):
        return quotient(_made(x, primitives.div_p))
    return _arithmetic(x, primitives.div_p, quotient, 1 / jnp.asarray(y), quotient)


@_rule(primitives.neg_p)
def _(x: Leaf, **_: Any) -> Any:
    form = _linear(x)
    return NotImplemented if form is None else _scaled(form, -1, -form.weight)


# ---- what calls functions ----


@quax.register(primitives.scan_p, precedence=1)
def _(*args: ArrayLike | quax.ArrayValue, **params: Any) -> Any:
    """A stack is cut by `scan`; what is no stack (a matrix that is scanned over its rows) is made first."""
    consts, carry, xs = unpack_scan_args(args, params)
    uncut = lambda x: not (x.is_stack if isinstance(x, Virtual) else x.batch if isinstance(x, Factored) else True)
    xs = [_made(x, primitives.scan_p) if uncut(x) else _drawn_ahead(x) for x in xs]
    return scan_quax(*consts, *carry, *xs, **params)


@quax.register(primitives.remat_p)
def _(*args: ArrayLike | quax.ArrayValue, jaxpr: Any, **params: Any) -> Any:
    """Nothing is differentiated through virtual leaves, so there is nothing to compute again."""
    if not any(isinstance(x, quax.ArrayValue) for x in args):
        return primitives.remat_p.bind(*args, jaxpr=jaxpr, **params)
    return quax.quaxify(jaxpr_as_fun(ClosedJaxpr(jaxpr, ())))(*args)


def _primal(self: Any, primitive: Any, function: Any, fwd: Any, bwd: Any, tracers: Any, **params: Any) -> Any:
    del primitive, fwd, bwd, params
    with core.set_current_trace(self):
        return function.call_wrapped(*tracers)


if "process_custom_vjp_call" not in vars(_QuaxTrace):  # quax 0.4 refuses functions with a derivative of their own
    _QuaxTrace.process_custom_vjp_call = _primal  # type: ignore[method-assign]
