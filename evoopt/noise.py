"""Random directions: drawn from a key, in part or whole, alone or in a batch, with the same bits.

A direction has the structure of the parameters. Leaf i has the key `fold_in(key, i)`, slice l of a leaf with three or
more axes (a stack of layers) the key `fold_in(fold_in(key, i), l)`, and element j of those is the j-th output of
Threefry-2x32-20 in counter mode: nothing depends on what else is drawn.

Threefry is written out here, with the same constants as `jax.random` (and the same `fold_in`). Element j depends on
counter j only, so XLA fuses generator, transformation and consumer into one loop without a buffer of bits: 3 to 4 times
as many normals a second as `jax.random.normal` on a CPU (`benchmarks/noise.py`).

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import trees
from evoopt.types import Array, Key, Params, error, pytree, static

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Salmon et al. 2011, table 2, 2x32
PARITY = np.uint32(0x1BD11BDA)  # Skein's constant for the third key word


def replayable(key: Any) -> Key:
    """`key` as a typed threefry key; an int is a seed.

    Raises:
        TypeError: for a key of another generator. The noise of rbg keys under `vmap` differs from the same keys drawn
            one at a time, so a candidate could not be replayed.
    """
    if isinstance(key, int):
        return jax.random.key(key, impl="threefry2x32")
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


def words(key: Key, n: int) -> tuple[Array, Array]:
    """n pairs of independent uniform uint32; pair j depends on (key, j) only."""
    k0, k1 = jax.random.key_data(key)
    counter = jnp.arange(n, dtype=jnp.uint32)
    return _threefry(k0, k1, counter, jnp.zeros_like(counter))


def normals(key: Key, n: int, dtype: Any = jnp.float32) -> Array:
    """n standard normals by inversion, |z| < 5.5 (float64: 8.2); types narrower than float32 are rounded from it."""
    high, low = words(key, n)
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
    w = -(-n // 32)
    # The barrier keeps XLA from computing the word again for each of its 32 bits.
    packed = jax.lax.optimization_barrier(words(key, w)[0])
    bits = (packed[None, :] >> jnp.arange(32, dtype=jnp.uint32)[:, None]) & 1
    return (1 - 2 * bits.astype(jnp.int32)).reshape(-1)[:n].astype(dtype)


@pytree
class Noise:
    """A distribution of directions with mean 0 and covariance I, addressed by keys.

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
        leaves, treedef = jax.tree.flatten(like)
        return treedef.unflatten([self.leaf(address, i, leaf) for i, leaf in enumerate(leaves)])

    def leaf(self, key: Key, i: int, like: Any) -> Array:
        """Leaf i of the direction of `key`; `like` gives shape and dtype."""
        key, shape = _once(fold_in(key, i)), like.shape
        if len(shape) < 3:
            return self.sample(key, math.prod(shape), like.dtype).reshape(shape)
        layer_keys = _once(fold_in(key, jnp.arange(shape[0])))
        return jax.vmap(lambda k: self.sample(k, math.prod(shape[1:]), like.dtype))(layer_keys).reshape(shape)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        """The n directions of `addresses(key, n)` at once; every leaf has leading axis n."""
        return jax.vmap(lambda a: self.draw(a, like))(self.addresses(key, n))


gaussian = Noise(normals)
rademacher = Noise(signs)


@pytree
class Orthogonal:
    """Directions that are orthogonal within groups of `group`, each with the length it would have had without.

    Exact for Gaussian noise: a group of independent normal rows has independent lengths and Haar-distributed
    directions (Choromanski et al. 2018, "Structured evolution with compact architectures", Gaussian orthogonal
    exploration). The address of a direction is (its group's key, its place), so it is drawn alone at the cost of
    drawing and orthogonalizing its group, O(group^2 d). At most d directions can be orthogonal: a group is cut at d.
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
    wide = rows.astype(_wide(rows))  # there is no QR of narrower types
    q, r = jnp.linalg.qr(wide.T)
    # LAPACK leaves the signs of R's diagonal as they come. Only with positive ones is Q Haar-distributed, of mean 0.
    q = q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)
    return (q.T * jnp.linalg.norm(wide, axis=1, keepdims=True)).astype(rows.dtype)


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
        weighted = lambda w, t: jax.tree.map(lambda x: w.astype(_wide(x)) * x.astype(_wide(x)), t)
        return jax.tree.map(jnp.add, total, jax.tree.map(weighted, weight, of(draw(address)))), None

    shapes = jax.eval_shape(lambda: of(trees.strong(like)))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, _wide(s)), shapes)
    return jax.lax.scan(add, zero, (addresses, weights))[0]


def weighted_rows(rows: Params, weights: Array) -> Params:
    """sum_j weights_j rows_j as a matrix product: every leaf of `rows` has leading axis n, `weights` is (n,)."""
    return jax.tree.map(lambda r: jnp.tensordot(weights.astype(_wide(r)), r.astype(_wide(r)), axes=1), rows)


def _wide(x: Any) -> Any:
    return x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.float32  # bfloat16 sums lose the small terms


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
