"""Random directions: drawn from a key, in part or whole, alone or in a batch, with the same bits.

A direction has the structure of the parameters. Leaf i has the key `fold_in(key, i)`, layer l of a stack of layers the
key `fold_in(fold_in(key, i), l)`, and element j of those is the j-th output of Threefry-2x32-20 in counter mode, so
nothing depends on what else is drawn. A stack is what a model scans over. Its name says so: its leaves are under
`layers`, `blocks`, or another name given to `name_stacks`. No shape does, for an attention kernel has three axes too.

Threefry is written out here, with the same constants as `jax.random` (and the same `fold_in`). Element j depends on
counter j only, so XLA fuses generator, transformation and consumer into one loop without a buffer of bits: nearly 3
times as many normals a second as `jax.random.normal` on a CPU (`benchmarks/noise.py`).

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evoopt import trees
from evoopt.types import Array, Key, Params, error, pytree, static

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Salmon et al. 2011, table 2, 2x32
STORED = 2048  # numbers from which on a draw is cheaper than to be fused into what uses it
PARITY = np.uint32(0x1BD11BDA)  # Skein's constant for the third key word


def _seeded(seed: int) -> Key:
    """The key of any integer: that of `jax.random.key` where it fits, else of its digest.

    JAX would cut off what does not fit, and give -1 the key of 2^32 - 1.
    """
    if 0 <= seed < 2**32:
        return jax.random.key(seed, impl="threefry2x32")
    data = hashlib.sha256(str(seed).encode()).digest()[:8]
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(data, np.uint32)), impl="threefry2x32")


def _is_integer(x: Any) -> bool:
    known = isinstance(x, (int, np.integer, jax.Array, np.ndarray)) and not isinstance(x, bool)
    return known and np.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.integer)


def replayable(key: Any) -> Key:
    """`key` as a typed threefry key; an integer is a seed.

    Raises:
        TypeError: for a key of another generator. The noise of rbg keys under `vmap` differs from the same keys drawn
            one at a time, so a candidate could not be replayed.
    """
    if _is_integer(key):
        return jax.random.key(key, impl="threefry2x32") if isinstance(key, Tracer) else _seeded(int(key))
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        if getattr(key, "shape", ())[-1:] == (2,) and key.dtype == jnp.uint32:
            return jax.random.wrap_key_data(key, impl="threefry2x32")
        raise error(
            "a PRNG key or an integer seed",
            repr(key)[:80],
            "a NumPy generator, or a key split one time too many",
            TypeError,
        )
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise error(
            "a threefry2x32 key: its noise can be drawn again, in any batch, bit for bit",
            f"a key of '{jax.random.key_impl(key)}', whose noise under vmap is not that of the keys one at a time",
            "jax_default_prng_impl was set to rbg; make the key with jax.random.key(seed, impl='threefry2x32')",
            TypeError,
        )
    return key


def _threefry(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32-20: key (k0, k1) and counter (x0, x1) of uint32 to two random words."""
    keys = (k0, k1, k0 ^ k1 ^ PARITY)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def fold_in(key: Key, i: Array | int) -> Key:
    """The same key as `jax.random.fold_in(key, i)`, fused with what consumes it."""
    k0, k1 = jnp.moveaxis(jax.random.key_data(key), -1, 0)
    i = jnp.asarray(i, jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack(_threefry(k0, k1, jnp.zeros_like(i), i), axis=-1), impl="threefry2x32")


def _once(key: Key) -> Key:
    """`key`, computed before what uses it: XLA would derive it again for every element."""
    data = jax.lax.optimization_barrier(jax.random.key_data(key))
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def computed(draw: Callable[[], Any]) -> Any:
    """`draw()`, computed before what uses it, in a loop that makes one trip by a number XLA can't see.

    XLA drops optimization barriers before it fuses, and then draws again for every row that uses a factor.
    """
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(draw))
    return jax.lax.fori_loop(0, jax.lax.optimization_barrier(jnp.int32(1)), lambda _, __: draw(), zero)


def stored(draw: Callable[[], Array]) -> Array:
    """`draw()`, drawn once into memory: `computed` where it is of a size for which that pays.

    Fused into a reduction, numbers are drawn one after the other instead of a vector of them at a time.
    """
    return computed(draw) if math.prod(jax.eval_shape(draw).shape) >= STORED else draw()


def words(key: Key, n: int) -> tuple[Array, Array]:
    """n pairs of independent uniform uint32; pair j depends on (key, j) only."""
    return words_at(key, jnp.arange(n, dtype=jnp.uint32))


def words_at(key: Key, j: Array) -> tuple[Array, Array]:
    """Pairs number `j` (any shape, uint32) of `words(key, n)`, for any n."""
    k0, k1 = jax.random.key_data(key)
    return _threefry(k0, k1, j, jnp.zeros_like(j))


def normals(key: Key, n: int, dtype: Any = jnp.float32) -> Array:
    """n standard normals by inversion, |z| < 5.5 (float64: 8.2); types narrower than float32 are rounded from it."""
    return _to_normals(*words(key, n), dtype)


def _to_normals(high: Array, low: Array, dtype: Any) -> Array:
    if dtype == jnp.float64:
        bits = (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
        u = jax.lax.bitcast_convert_type(bits, jnp.int64).astype(jnp.float64) * 2.0**-63
        u = jnp.clip(u, -1 + 2.0**-53, 1 - 2.0**-53)  # rounding may reach +-1, where the inverse is infinite
        return _inverse_normal(u)
    u = jax.lax.bitcast_convert_type(high, jnp.int32).astype(jnp.float32) * np.float32(2.0**-31)
    u = jnp.clip(u, np.float32(-1 + 2.0**-24), np.float32(1 - 2.0**-24))
    return _inverse_normal(u).astype(dtype)


def _inverse_normal(u: Array) -> Array:
    """u uniform in (-1, 1) to normal: sqrt(2) erfinv(u)."""
    z = jax.lax.erf_inv(u) * np.asarray(math.sqrt(2), u.dtype)
    # Always true. Without it XLA moves the constant into a product that the consumer makes of z, in some programs and
    # not in others, and a candidate alone would differ by a bit from the same candidate in a batch.
    return jnp.where(jnp.abs(u) < 1, z, 0)


def signs(key: Key, n: int, dtype: Any = jnp.float32) -> Array:
    """n random signs, -1 or +1, 32 to a word: sign j is bit j // w of word j % w, w = ceil(n / 32)."""
    return _bits(_packed(key, n)[None, :], jnp.arange(32, dtype=jnp.uint32)[:, None], dtype).reshape(-1)[:n]


def _packed(key: Key, n: int) -> Array:
    # The barrier keeps XLA from computing the word again for each of its 32 bits.
    return jax.lax.optimization_barrier(words(key, -(-n // 32))[0])


def _bits(word: Array, bit: Array, dtype: Any) -> Array:
    one = np.uint32(0x3F800000)  # 1.0; the chosen bit becomes its sign, which is cheaper than a conversion
    sign = ((word >> bit) << np.uint32(31)) | one
    return jax.lax.bitcast_convert_type(sign, jnp.float32).astype(dtype)


class Parts(NamedTuple):
    """How parts of `sample(key, n, dtype)` are drawn, with the bits they have in the whole."""

    prepare: Callable[[Key, int], Any]  # (key, n) -> what all parts share
    at: Callable[[Any, int, Array, Any], Array]  # (prepared, n, places (...) uint32, dtype) -> (...)
    lanes: int  # numbers that come at once, n / lanes apart
    block: Callable[[Key, int, Array, int, Any], Array]  # (key, n, start, m, dtype) -> (lanes, m), columns start + j


def _normals_at(key: Key, n: int, j: Array, dtype: Any) -> Array:
    return _to_normals(*words_at(key, j), dtype)


def _normals_block(key: Key, n: int, start: Array, m: int, dtype: Any) -> Array:
    return _normals_at(key, n, start.astype(jnp.uint32) + jnp.arange(m, dtype=jnp.uint32)[None], dtype)


def _signs_at(packed: Array, n: int, j: Array, dtype: Any) -> Array:
    w = np.uint32(packed.shape[0])
    return _bits(packed[j % w], j // w, dtype)


def _signs_block(key: Key, n: int, start: Array, m: int, dtype: Any) -> Array:
    word = words_at(key, start.astype(jnp.uint32) + jnp.arange(m, dtype=jnp.uint32))[0]
    return _bits(jax.lax.optimization_barrier(word)[None], jnp.arange(32, dtype=jnp.uint32)[:, None], dtype)


PARTS: dict[Any, Parts] = {
    normals: Parts(lambda key, n: key, _normals_at, 1, _normals_block),
    signs: Parts(_packed, _signs_at, 32, _signs_block),
}


_STACKS = {"layers", "blocks"}  # names under which leaves have the layers of a model as their first axis


def name_stacks(*names: str) -> None:
    """Say that leaves under these names are stacks of layers, which the model scans over, as those under `layers` are.

    For the whole process, and before the search begins: directions of stacks are drawn layer by layer, so they are
    other directions, and only what is cut by `scan` can stay virtual layer by layer.

    >>> params = {"decoder": {"w": jnp.zeros((4, 8, 8)), "b": jnp.zeros((4, 8))}}
    >>> stacks(params)
    [False, False]
    >>> name_stacks("decoder")
    >>> stacks(params)
    [True, True]
    """
    for name in names:
        if not isinstance(name, str) or not name:
            cause = "a path: give the one name in it that stands for the stack"
            raise error("names of parts of the parameters, as in 'decoder'", repr(name), cause, TypeError)
    _STACKS.update(names)


def stacks(params: Params) -> list[bool]:
    """Which leaves have the layers of a model as their first axis.

    Those under a name that says so, where all that is under it has the same first axis, and a matrix is among it. A
    list of layers, or a dict of numbered ones, is no stack.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    name = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))
    parts: dict[str, list[int]] = {}  # a part of the tree that may be a stack -> its leaves
    for i, (path, _) in enumerate(named):
        names = [name(key) for key in path]
        for place, word in enumerate(names):
            if word in _STACKS and not _numbered(names[place + 1 :]):
                parts.setdefault(trees.path_name(path[: place + 1]), []).append(i)
                break
    found = [False] * len(named)
    for leaves in parts.values():
        shapes = [named[i][1].shape for i in leaves]
        if all(len(s) for s in shapes) and len({s[0] for s in shapes}) == 1 and any(len(s) >= 3 for s in shapes):
            for i, shape in zip(leaves, shapes, strict=True):
                found[i] = len(shape) >= 2
    return found


def _numbered(names: list[str]) -> bool:
    return bool(names) and names[0].isdigit()


def is_stack(leaf: Any) -> bool:
    """Whether a leaf of a kind that is `cut` is drawn layer by layer: it has three or more axes."""
    return len(leaf.shape) >= 3


def is_cut(kind: Any, leaf: Any) -> bool:
    """Whether a leaf is a stack of layers, each with a key of its own."""
    return is_stack(leaf) and getattr(kind, "cut", True)


@pytree
class Whole:
    """The noise of a leaf with three or more axes that is no stack: one slice, whatever its shape."""

    kind: Any
    cut = False

    def seeds(self, address: Any, i: int, like: Any, layer: Array | None = None) -> Any:
        assert layer is None, "a leaf that is no stack has no layers"
        return self.kind.seeds(address, i, jax.ShapeDtypeStruct((math.prod(like.shape), 1), like.dtype))

    def slice(self, seed: Any, like: Any) -> Array:
        return self.kind.slice(seed, like)

    def prepare(self, seed: Any, like: Any) -> Any:
        return self.kind.prepare(seed, like)

    def part(self, prepared: Any, like: Any, places: Array, pick: Callable[[Array], Array]) -> Array:
        return self.kind.part(prepared, like, places, pick)

    @property
    def lanes(self) -> int:
        return self.kind.lanes

    def block(self, seed: Any, like: Any, start: Array, values: Array) -> Array:
        return self.kind.block(seed, like, start, values)

    @property
    def low_rank(self) -> bool:
        return self.kind.low_rank

    def factors(self, seed: Any, like: Any) -> tuple[Array, Array]:
        return self.kind.factors(seed, like)


def by_leaf(kind: Any, vectors: Any, like: Params) -> list[Any]:
    """The noise of each leaf: `kind`, `vectors` for biases and scales, and as a whole what is no stack."""
    leaves = jax.tree.leaves(like)
    given = [vectors if vector else kind for vector in are_vectors(like)]
    wholes = [is_stack(x) and not stack for x, stack in zip(leaves, stacks(like), strict=True)]
    return [Whole(k) if whole else k for k, whole in zip(given, wholes, strict=True)]


LARGE = 1024  # numbers of a leaf from which on it is worth not to make it


def is_large(leaf: Any) -> bool:
    """Whether a leaf may be virtual: a matrix or a stack, and not small."""
    return len(leaf.shape) >= 2 and math.prod(leaf.shape) >= LARGE


def are_vectors(params: Params) -> list[bool]:
    """Which leaves are biases or scales: fewer than two axes, or (layers, d) in a stack."""
    leaves = zip(jax.tree.leaves(params), stacks(params), strict=True)
    return [len(x.shape) < 2 + stack for x, stack in leaves]


def draw(noise: Any, address: Any, like: Params) -> Params:
    """The direction of `address`: each leaf from its kind of noise, 0 for leaves that are not perturbed."""
    leaves, treedef = jax.tree.flatten(like)
    kinds = enumerate(noise.kinds(like))
    return treedef.unflatten(
        [
            jnp.zeros(x.shape, x.dtype) if k is None else leaf(k, address, i, x)
            for (i, k), x in zip(kinds, leaves, strict=True)
        ]
    )


def leaf(kind: Any, address: Any, i: int, like: Any) -> Array:
    """Leaf i of the direction of `address`."""
    seeds = kind.seeds(address, i, like)
    if not is_cut(kind, like):
        return kind.slice(seeds, like)
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.vmap(lambda s: kind.slice(s, jax.ShapeDtypeStruct(like.shape[1:], like.dtype)))(seeds)
    return jax.vmap(kind.slice)(seeds, like)


@pytree
class Noise:
    """A distribution of directions with mean 0 and covariance I, addressed by keys.

    Every kind of noise draws a leaf in slices: a layer of a stack, or the leaf where it is none. A slice needs its
    seed, and the slice of the parameters it is for; a stack of seeds is cut along with the weights.

    >>> z = gaussian.draw(jax.random.key(0), {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)})
    >>> z["w"].shape
    (3, 2)
    """

    sample: Callable[[Key, int, Any], Array] = static()  # (key, n, dtype) -> (n,)

    def addresses(self, key: Key, n: int) -> Any:
        """What n directions need to be drawn again; every leaf has leading axis n."""
        return fold_in(key, jnp.arange(n))

    def draw(self, address: Any, like: Params) -> Params:
        """One direction, with the structure, shapes and dtypes of `like`."""
        return draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        """The n directions of `addresses(key, n)` at once; every leaf has leading axis n."""
        return jax.vmap(lambda a: self.draw(a, like))(self.addresses(key, n))

    def kinds(self, like: Params) -> list[Any]:
        """The noise of each leaf; None for a leaf that is not perturbed."""
        return by_leaf(self, self, like)

    def leaf(self, address: Key, i: int, like: Any) -> Array:
        """Leaf i of the direction of `address`; `like` gives shape and dtype."""
        return leaf(self, address, i, like)

    def seeds(self, address: Key, i: int, like: Any, layer: Array | None = None) -> Any:
        """The seed of leaf i; of a stack the seeds of its layers with a leading axis, or the seed of one layer."""
        key = _once(fold_in(address, i))
        return _once(fold_in(key, jnp.arange(like.shape[0]) if layer is None else layer)) if is_stack(like) else key

    def slice(self, seed: Any, like: Any) -> Array:
        """z of a slice, with the shape and dtype of `like`."""
        return self.sample(seed, math.prod(like.shape), like.dtype).reshape(like.shape)

    def prepare(self, seed: Any, like: Any) -> Any:
        """What `part` takes in the place of the seed."""
        return self._parts().prepare(seed, like.size)

    def part(self, prepared: Any, like: Any, places: Array, pick: Callable[[Array], Array]) -> Array:
        """z of some places of a slice, counted in row-major order (uint32); `pick` takes them from an array like it."""
        del pick
        return self._parts().at(prepared, like.size, places, like.dtype)

    @property
    def lanes(self) -> int:
        """A slice is cheapest to draw in blocks of (lanes, m) numbers, the lanes size / lanes apart."""
        return self._parts().lanes

    def block(self, seed: Any, like: Any, start: Array, values: Array) -> Array:
        """z (lanes, m) of columns start, start + 1, ... of a slice seen as (lanes, size / lanes); `values` there."""
        return self._parts().block(seed, like.size, start, values.shape[1], values.dtype)

    low_rank = False  # whether `factors(seed, like)` gives (a, b) with z = a b^T

    def _parts(self) -> Parts:
        whole = lambda key, n: self.sample(key, n, jnp.float32)
        block = lambda key, n, start, m, dtype: jax.lax.dynamic_slice(whole(key, n), (start,), (m,))[None].astype(dtype)
        return PARTS.get(self.sample) or Parts(whole, lambda z, n, j, dtype: z[j].astype(dtype), 1, block)


gaussian = Noise(normals)
rademacher = Noise(signs)


@pytree
class LowRank:
    """Matrices of low rank: z = a b^T / sqrt(rank), a (m, rank) and b (n, rank) standard normal; mean 0, covariance I.

    An (m, n) weight costs rank (m + n) numbers. Slices with more axes are seen as the matrix with the smallest m + n.
    Vectors are dense Gaussian: leaves with fewer than two axes, and those of a stack with two (see `name_stacks`).

    Source: Sarkar et al. 2025, "Evolution strategies at the hyperscale", arXiv 2511.16652 (EGGROLL), eq. for E_i.
    """

    rank: int = static(default=1)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise error("a rank of at least 1", repr(self.rank), "full rank is `gaussian`, not a rank of 0")

    def addresses(self, key: Key, n: int) -> Any:
        return fold_in(key, jnp.arange(n))

    def draw(self, address: Any, like: Params) -> Params:
        return draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return jax.vmap(lambda a: self.draw(a, like))(self.addresses(key, n))

    def kinds(self, like: Params) -> list[Any]:
        return by_leaf(self, gaussian, like)

    def leaf(self, address: Any, i: int, like: Any) -> Array:
        """Leaf i as a matrix, or a stack of matrices; a vector where it has fewer than two axes."""
        return leaf(gaussian if len(like.shape) < 2 else self, address, i, like)

    def seeds(self, address: Key, i: int, like: Any, layer: Array | None = None) -> Any:
        return gaussian.seeds(address, i, like, layer)

    low_rank = True

    def factors(self, seed: Any, like: Any) -> tuple[Array, Array]:
        """(a, b): a has the first axes of the slice and b the others, then the rank. At least float32."""
        k = split(like.shape)
        m, n = math.prod(like.shape[:k]), math.prod(like.shape[k:])
        z = normals(seed, (m + n) * self.rank, wide(like))
        a = z[: m * self.rank] * np.asarray(self.rank**-0.5, z.dtype)
        return a.reshape(*like.shape[:k], self.rank), z[m * self.rank :].reshape(*like.shape[k:], self.rank)

    def slice(self, seed: Any, like: Any) -> Array:
        return outer(*self.factors(seed, like)).astype(like.dtype)

    def prepare(self, seed: Any, like: Any) -> Any:
        return self.factors(seed, like)

    def part(self, prepared: Any, like: Any, places: Array, pick: Callable[[Array], Array]) -> Array:
        del pick
        a, b = (f.reshape(-1, self.rank) for f in prepared)
        return jnp.sum(a[places // b.shape[0]] * b[places % b.shape[0]], axis=-1).astype(like.dtype)

    lanes = 1

    def block(self, seed: Any, like: Any, start: Array, values: Array) -> Array:
        places = start.astype(jnp.uint32) + jnp.arange(values.shape[1], dtype=jnp.uint32)[None]
        return self.part(self.factors(seed, like), like, places, lambda x: x)


def split(shape: tuple[int, ...]) -> int:
    """How many axes of a slice are the rows of its matrix, so that rows + columns is smallest."""
    return min(range(1, max(len(shape), 2)), key=lambda s: math.prod(shape[:s]) + math.prod(shape[s:]))


UNROLLED = 8  # ranks summed as outer products: XLA fuses these into what adds them, and no matrix of z is made


def outer(a: Array, b: Array) -> Array:
    """sum_r a[..., r] b[..., r], every axis of a before every axis of b."""
    spread = lambda x: x.reshape(*x.shape, *(1,) * (b.ndim - 1))
    if a.shape[-1] <= UNROLLED:
        return sum(spread(a[..., r]) * b[..., r] for r in range(a.shape[-1]))  # type: ignore[return-value]
    return jnp.tensordot(a, b, axes=(-1, -1), precision="highest")


@pytree
class Masked:
    """Noise on some entries only: those where a mask is True, or whose parameter is small (Sparse-MeZO).

    A direction has covariance I on the entries it perturbs. Small means |w| <= threshold: the mask is computed from the
    parameters where it is needed and never stored, so `draw` takes the parameters themselves. Weights that grow over
    the threshold leave the mask.

    Source: Liu et al. 2024, "Sparse MeZO", arXiv 2402.15751, eq. 3 and algorithm 1.
    """

    noise: Any
    masks: Any = None  # a tree like the parameters of bool arrays
    thresholds: Any = None  # a tree like the parameters of numbers, or of (layers,) for stacks: see `thresholds`

    def addresses(self, key: Key, n: int) -> Any:
        return self.noise.addresses(key, n)

    def draw(self, address: Any, like: Params) -> Params:
        return draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return jax.vmap(lambda a: self.draw(a, like))(self.addresses(key, n))

    def kinds(self, like: Params) -> list[Any]:
        kinds = self.noise.kinds(like)
        by = self.thresholds if self.masks is None else self.masks
        marks = jax.tree.structure(like).flatten_up_to(by)
        given = self.masks is not None
        return [None if k is None else _MaskedLeaf(k, jnp.asarray(m), given) for k, m in zip(kinds, marks, strict=True)]

    def leaf(self, address: Any, i: int, like: Any) -> Array:
        raise error("draw(address, params)", f"leaf {i} alone", "which mask a leaf has is known of the whole tree only")


@pytree
class _MaskedLeaf:
    """Noise of one leaf, masked."""

    noise: Any
    mark: Array  # the mask, or the threshold
    given: bool = static()
    whole: bool = static(default=False)  # whether the mask is of whole layers

    @property
    def cut(self) -> bool:
        return getattr(self.noise, "cut", True)

    def seeds(self, address: Any, i: int, like: Any, layer: Array | None = None) -> Any:
        mark = self.mark
        if is_cut(self.noise, like):
            mark = jnp.broadcast_to(mark, like.shape[:1]) if mark.ndim == 0 else mark
            mark = mark if layer is None else mark[layer]
        return self.noise.seeds(address, i, like, layer), mark

    def _mask(self, mark: Array, values: Array, pick: Callable[[Array], Array], shape: Any) -> Array:
        """The mask of some values of a slice of a shape; `pick` takes them from an array like the slice."""
        if self.given:
            return pick(jnp.broadcast_to(mark, shape))
        return jnp.abs(values) <= mark.astype(values.dtype)

    def slice(self, seed: Any, like: Any) -> Array:
        return jnp.where(self._mask(seed[1], like, lambda x: x, like.shape), self.noise.slice(seed[0], like), 0)

    def prepare(self, seed: Any, like: Any) -> Any:
        return self.noise.prepare(seed[0], like), seed[1]

    def part(self, prepared: Any, like: Any, places: Array, pick: Callable[[Array], Array]) -> Array:
        values = like if self.given else pick(like)
        z = self.noise.part(prepared[0], like, places, pick)
        return jnp.where(self._mask(prepared[1], values, pick, like.shape), z, 0)

    @property
    def lanes(self) -> int:
        return self.noise.lanes

    def block(self, seed: Any, like: Any, start: Array, values: Array) -> Array:
        pick = lambda x: jax.lax.dynamic_slice_in_dim(x.reshape(self.lanes, -1), start, values.shape[1], axis=1)
        z = self.noise.block(seed[0], like, start, values)
        return jnp.where(self._mask(seed[1], values, pick, like.shape), z, 0)

    @property
    def low_rank(self) -> bool:
        return self.whole and self.noise.low_rank

    def factors(self, seed: Any, like: Any) -> tuple[Array, Array]:
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
    """Noise on some leaves only, and on some layers of the stacks among them: block-coordinate search.

    >>> z = Blocks(gaussian, lambda name: name.startswith("head")).draw(
    ...     jax.random.key(0), {"body": jnp.zeros(3), "head": jnp.zeros(2)}
    ... )
    >>> bool((z["body"] == 0).all() and (z["head"] != 0).all())
    True
    """

    noise: Any
    chosen: Callable[[str], bool] = static(default=lambda name: True)  # of a leaf's name, as in "layers/0/w"
    layers: Any = None  # (layers,) bool, which of a stack; an array, so it may change from step to step

    def addresses(self, key: Key, n: int) -> Any:
        return self.noise.addresses(key, n)

    def draw(self, address: Any, like: Params) -> Params:
        return draw(self, address, like)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return jax.vmap(lambda a: self.draw(a, like))(self.addresses(key, n))

    def kinds(self, like: Params) -> list[Any]:
        kinds = self.noise.kinds(like)
        named = jax.tree_util.tree_leaves_with_path(like)
        return [
            self._layers(k, x) if k is not None and self.chosen(trees.path_name(path)) else None
            for k, (path, x) in zip(kinds, named, strict=True)
        ]

    def _layers(self, kind: Any, like: Any) -> Any:
        if self.layers is None or like.ndim < 2 or like.shape[0] != len(self.layers):
            return kind
        mask = jnp.asarray(self.layers, bool).reshape(-1, *(1,) * (like.ndim - 1))
        return _MaskedLeaf(kind, mask, given=True, whole=is_cut(kind, like))

    def leaf(self, address: Any, i: int, like: Any) -> Array:
        raise error("draw(address, params)", f"leaf {i} alone", "whether a leaf is chosen is known by its name only")


@pytree
class Orthogonal:
    """Directions that are orthogonal within groups of `group`, each with the length it would have had without.

    Exact for Gaussian noise: a group of independent normal rows has independent lengths and Haar-distributed
    directions (Choromanski et al. 2018, "Structured evolution with compact architectures", Gaussian orthogonal
    exploration). The address of a direction is (its group's key, its place), so it is drawn alone at the cost of
    drawing and orthogonalizing its group, O(group^2 d). At most d directions can be orthogonal: a group is cut at d.
    On a GPU the library decomposes one group and several at once by different programs, whose last bits may differ.
    """

    noise: Noise = static(default=gaussian)
    group: int = static(default=32)

    def addresses(self, key: Key, n: int) -> Any:
        groups = -(-n // self.group)
        keys = jnp.repeat(jax.random.split(key, groups), self.group)[:n]
        return keys, jnp.tile(jnp.arange(self.group), groups)[:n]

    def draw(self, address: Any, like: Params) -> Params:
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
    """The rows (m, d), m <= d, made orthogonal in their order, each with its length."""
    z = rows.astype(wide(rows))  # there is no QR of narrower types
    q, r = jnp.linalg.qr(z.T)
    # LAPACK leaves the signs of R's diagonal as they come. Only with positive ones is Q Haar-distributed, of mean 0.
    q = q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)
    return (q.T * jnp.linalg.norm(z, axis=1, keepdims=True)).astype(rows.dtype)


def weighted_sum(
    draw: Callable[[Any], Params], addresses: Any, weights: Any, like: Params, of: Callable[[Params], Any] = lambda z: z
) -> Any:
    """sum_j weights_j of(z_j), one direction at a time into a running sum: memory O(d), any n.

    Args:
        draw: address -> direction; the identity where `addresses` are the directions themselves.
        addresses: of n directions, every leaf with leading axis n.
        weights: a tree like `of(z)` up to a prefix, leaves (n,); one array (n,) weighs all alike.
        like: the parameters.
        of: what is summed, z itself by default; `lambda z: (z, squares(z))` sums two things in one pass.
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


CHUNK = 1 << 19  # numbers of a large leaf that are updated at once, if they are not less than a sixteenth of it


def chunk_of(size: int, at_least: int) -> int:
    """How many of `size` numbers to work on at once: few enough for the memory, enough for a GPU to be busy."""
    return max(at_least, size // 16)


def add_weighted(params: Params, noise: Any, addresses: Any, weights: Array, *, decay: Any = 0.0) -> Params:
    """(1 - decay) params + sum_j weights_j z_j, slice by slice: in place where the caller donates `params`.

    Nothing of the size of the parameters is made: one layer's noise is alive at a time, a large matrix is updated
    `CHUNK` numbers at a time, and low-rank noise is summed as one product (m, n rank) x (n rank, columns). Sums are
    float32 and rounded once, to the dtype of the leaf: to the nearest, or at random inside `rounding`.

    Args:
        params: the parameters, also those that masks by magnitude are computed from.
        noise: the noise.
        addresses: of n directions, every leaf with leading axis n.
        weights: (n,).
        decay: of every leaf, a number or a tree like `params`.

    >>> params, addresses = {"w": jnp.ones((3, 2))}, gaussian.addresses(jax.random.key(0), 4)
    >>> add_weighted(params, gaussian, addresses, jnp.full(4, 0.1))["w"].shape
    (3, 2)
    """
    leaves, treedef = jax.tree.flatten(params)
    decays = treedef.flatten_up_to(trees.like(decay, params))
    if hasattr(noise, "kinds"):
        kinds, totals = noise.kinds(params), [None] * len(leaves)
    else:
        total = weighted_sum(lambda a: noise.draw(a, params), addresses, weights, params)
        kinds, totals = [None] * len(leaves), treedef.flatten_up_to(total)
    at_random = _rounding.get()
    narrows = [_to(x.dtype) for x in leaves] if at_random is None else at_random.narrows(leaves)
    new = []
    for i, (x, kind, d, total, narrow) in enumerate(zip(leaves, kinds, decays, totals, narrows, strict=True)):
        if kind is None:
            unmoved = total is None and isinstance(d, (int, float)) and d == 0
            kept = _kept(x, d)
            new.append(x if unmoved else narrow(kept if total is None else kept + total))
            continue
        seeds = lambda address, layer=None, kind=kind, i=i, x=x: kind.seeds(address, i, x, layer)
        add = _add_stack if is_cut(kind, x) else _add_slice
        new.append(add(x, kind, seeds, (addresses, weights, d), narrow))
    if at_random is not None:
        at_random.rounded += new
    return treedef.unflatten(new)


Narrow = Callable[..., Array]  # (sum, *place) -> the sum in the dtype of its leaf; the place is that of a part in it


def _to(dtype: Any) -> Narrow:
    return lambda x, *place: x.astype(dtype)


class Rounding:
    """What `rounding` yields."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.calls = 0
        self.rounded: list[Array] = []  # leaves whose sums were rounded

    def narrows(self, leaves: list[Any]) -> list[Narrow]:
        """How the sums of leaves of parameters are rounded, each by a key of its own."""
        key, self.calls = fold_in(self.key, self.calls), self.calls + 1

        def narrow(x: Array, *place: Any, i: int, dtype: Any) -> Array:
            k = fold_in(key, i)
            for p in place:
                k = fold_in(k, p)
            return stochastic_round(x, k, dtype)

        return [functools.partial(narrow, i=i, dtype=x.dtype) for i, x in enumerate(leaves)]


_rounding: contextvars.ContextVar[Rounding | None] = contextvars.ContextVar("rounding", default=None)


@contextlib.contextmanager
def rounding(key: Key) -> Iterator[Rounding]:
    """Inside it `add_weighted` rounds its sums at random (`stochastic_round`), slice by slice, wherever it is called.

    So a step of half-precision parameters needs no float32 copy of them. It holds while a program is traced.
    """
    made = Rounding(key)
    token = _rounding.set(made)
    try:
        yield made
    finally:
        _rounding.reset(token)


def _is_rounded(x: Any) -> bool:
    return wide(x) != x.dtype and _rounding.get() is not None


def _kept(x: Array, decay: Any) -> Array:
    """(1 - decay) x, wide."""
    x = x.astype(wide(x))
    # Without decay not even multiplied by one: the product could be contracted with the sum that follows.
    return x if isinstance(decay, (int, float)) and decay == 0 else x - jnp.asarray(decay, x.dtype) * x


def _add_stack(x: Array, kind: Any, seeds: Callable[..., Any], terms: tuple[Any, Array, Any], narrow: Narrow) -> Array:
    addresses, weights, decay = terms
    like = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    fused = not _is_rounded(x)  # what is rounded at random is not fused, and would be stored wide
    if fused and len(weights) == 1 and not kind.low_rank:  # one pass over the stack: no noise is stored
        total = slice_sum(lambda a: jax.vmap(kind.slice)(seeds(a), x), addresses, weights, x)
        return (_kept(x, decay) + total).astype(x.dtype)
    if fused and kind.low_rank:
        factors = lambda: jax.vmap(jax.vmap(lambda s: kind.factors(s, like)), 1)(jax.vmap(seeds)(addresses))
        if len(weights) * jax.eval_shape(factors)[0].shape[-1] <= UNROLLED:  # as well, with the factors drawn before
            total = lambda w, a, b: outer(*_weighted_factors(a, b, weights)).reshape(w.shape)
            sums = jax.vmap(lambda w, a, b: _kept(w, decay) + total(w, a, b))
            return sums(x, *computed(factors)).astype(x.dtype)

    def layer(place: Array, x: Array) -> Array:
        w = jax.lax.dynamic_index_in_dim(x, place, keepdims=False)
        own = lambda x, *part: narrow(x, place, *part)
        new = _add_slice(w, kind, lambda address: seeds(address, place), terms, own)
        return jax.lax.dynamic_update_index_in_dim(x, new, place, 0)

    return jax.lax.fori_loop(0, x.shape[0], layer, x)


def _add_slice(w: Array, kind: Any, seeds: Callable[..., Any], terms: tuple[Any, Array, Any], narrow: Narrow) -> Array:
    if kind.low_rank:
        return _add_low_rank(w, kind, seeds, terms, narrow)
    addresses, weights, decay = terms
    if w.size <= CHUNK or w.size % kind.lanes or (len(weights) == 1 and not _is_rounded(w)):
        total = slice_sum(lambda a: kind.slice(seeds(a), w), addresses, weights, w)
        return narrow(_kept(w, decay) + total)
    like = jax.ShapeDtypeStruct(w.shape, w.dtype)

    def chunk(start: Array, m: int, view: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(view, start, m, axis=1)
        total = slice_sum(lambda a: kind.block(seeds(a), like, start, part), addresses, weights, part)
        return jax.lax.dynamic_update_slice_in_dim(view, narrow(_kept(part, decay) + total, start), start, axis=1)

    view = w.reshape(kind.lanes, -1)
    columns = chunk_of(w.size, CHUNK) // kind.lanes
    return chunked(chunk, view.shape[1], min(view.shape[1], columns), view).reshape(w.shape)


def chunked(chunk: Callable[[Array, int, Array], Array], n: int, m: int, x: Array) -> Array:
    """`chunk(start, m, x)` for starts 0, m, 2m, ... below n, the last one shorter."""
    x = jax.lax.fori_loop(0, n // m, lambda i, x: chunk(i * m, m, x), x)
    return chunk(jnp.int32(n - n % m), n % m, x) if n % m else x


def slice_sum(draw: Callable[[Any], Array], addresses: Any, weights: Array, like: Any) -> Array:
    """sum_j weights_j draw(address_j), one at a time, with the shape of `like`, at least float32."""
    dtype = wide(like)
    weigh = lambda a, w: w.astype(dtype) * draw(a).astype(dtype)
    if len(weights) == 1:  # no sum of which to keep a buffer
        return weigh(jax.tree.map(lambda a: a[0], addresses), weights[0])
    add = lambda total, row: (total + weigh(*row), None)
    return jax.lax.scan(add, jnp.zeros(like.shape, dtype), (addresses, weights))[0]


DIRECTIONS = 256  # low-rank directions summed in one product


def _add_low_rank(
    w: Array, kind: Any, seeds: Callable[..., Any], terms: tuple[Any, Array, Any], narrow: Narrow
) -> Array:
    addresses, weights, decay = terms
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
            return jax.lax.dynamic_update_slice_in_dim(matrix, narrow(new, start, place), place, 0)

        return chunked(rows, len(matrix), max(1, min(len(matrix), chunk_of(w.size, CHUNK) // columns)), matrix)

    matrix = add(jnp.int32(0), size, matrix, decay)
    if n > size:  # decayed once, and rounded once for each product
        matrix = chunked(lambda start, m, x: add(start + size, m, x), n - size, size, matrix)
    return matrix.reshape(w.shape)


def _weighted_factors(a: Array, b: Array, weights: Array) -> tuple[Array, Array]:
    """The factors of n directions, weighed, as (rows, n rank) and (columns, n rank)."""
    flat = lambda f: jnp.moveaxis(f.reshape(len(f), -1, f.shape[-1]), 1, 0).reshape(-1, len(f) * f.shape[-1])
    return flat(a * weights.astype(a.dtype).reshape(-1, *(1,) * (a.ndim - 1))), flat(b)


def wide(x: Any) -> Any:
    """The dtype in which sums over `x` are taken: its own, or float32 where bfloat16 would lose the small terms."""
    return x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.float32


def stochastic_round(x: Array, key: Key, dtype: Any) -> Array:
    """x in a narrower `dtype`, rounded up or down at random so that the mean is x; the same key rounds the same way.

    An update far below the spacing of the weights, which rounding to the nearest would lose, then arrives on average.
    What is representable stays, NaN and infinities too; a finite x never becomes infinite.

    Source: Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep learning with limited numerical precision", ICML 2015.

    >>> x = jnp.full((10_000,), 1 + 2.0**-10)  # bfloat16 has 1 and 1 + 2^-7 here
    >>> rounded = stochastic_round(x, jax.random.key(0), jnp.bfloat16).astype(jnp.float32)
    >>> sorted(set(rounded.tolist())), bool(abs(rounded.mean() - x.mean()) < 1e-4)
    ([1.0, 1.0078125], True)
    """
    if jnp.finfo(dtype).nmant >= jnp.finfo(x.dtype).nmant:
        return x.astype(dtype)
    near = x.astype(dtype)
    near = jnp.where(jnp.isfinite(x) & jnp.isinf(near), jnp.copysign(jnp.finfo(dtype).max, near), near)
    back = near.astype(x.dtype)
    far = jnp.nextafter(near, jnp.where(x > back, jnp.inf, -jnp.inf).astype(dtype))  # the neighbour beyond x
    far = jnp.where(jnp.isinf(far), near, far)
    share = jnp.abs(x - back) / jnp.abs(far.astype(x.dtype) - back)  # 0 / 0 where nothing is to be rounded
    uniform = (words(key, x.size)[0] >> 8).astype(x.dtype).reshape(x.shape) * np.asarray(2.0**-24, x.dtype)
    return jnp.where(uniform < share, far, near)
