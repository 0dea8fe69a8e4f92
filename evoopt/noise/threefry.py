"""Random numbers with random access: element j of a draw depends on its key and on j, and on nothing else.

This is Threefry-2x32-20 in counter mode, with the constants of `jax.random` and the same `fold_in`. It is written out
here so that XLA fuses generator, transformation and consumer into one loop without a buffer of bits: on a CPU that
draws nearly three times as many normals a second as `jax.random.normal` (`benchmarks/noise.py`).

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from evoopt.types import Array, Key, error

T = TypeVar("T")

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Salmon et al. 2011, table 2, 2x32
PARITY = np.uint32(0x1BD11BDA)  # Skein's constant for the third key word
STORED = 2048  # draws of at least this many numbers are made before their use: fusing them into it would be slower


def _seeded(seed: int) -> Key:
    """The key of any integer: `jax.random.key` where it fits into 32 bits, otherwise a key made of its digest.

    JAX would drop the upper bits, and give -1 the key of 2^32 - 1.
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
        TypeError: for a key of another generator. Under `vmap`, rbg keys give other noise than the same keys one at a
            time, so a candidate could not be replayed.
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
    """Threefry-2x32-20: two random words from a key (k0, k1) and a counter (x0, x1), all uint32."""
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


def once(key: Key) -> Key:
    """`key`, computed before what uses it: XLA would derive it again for every element."""
    data = jax.lax.optimization_barrier(jax.random.key_data(key))
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def computed(draw: Callable[[], T]) -> T:
    """`draw()`, computed before what uses it, in a loop of one trip whose length XLA can't see.

    A barrier is not enough: XLA drops it before fusion, and would draw again for every row that uses a factor.
    """
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(draw))
    return jax.lax.fori_loop(0, jax.lax.optimization_barrier(jnp.int32(1)), lambda _, __: draw(), zero)


def stored(draw: Callable[[], Array]) -> Array:
    """`draw()`, drawn once into memory if it is large enough for that to pay (`STORED`).

    Numbers fused into a reduction are drawn one by one, not a vector at a time.
    """
    return computed(draw) if math.prod(jax.eval_shape(draw).shape) >= STORED else draw()


def words(key: Key, n: int) -> tuple[Array, Array]:
    """n pairs of independent uniform uint32; pair j depends on (key, j) only."""
    return words_at(key, jnp.arange(n, dtype=jnp.uint32))


def words_at(key: Key, j: Array) -> tuple[Array, Array]:
    """The pairs at places `j` (uint32, any shape) of `words(key, n)`, for any n."""
    k0, k1 = jax.random.key_data(key)
    return _threefry(k0, k1, j, jnp.zeros_like(j))


def normals(key: Key, n: int, dtype: DTypeLike = jnp.float32) -> Array:
    """n standard normals by inversion, |z| < 5.5 (float64: 8.3); narrower types are rounded from float32."""
    return _to_normals(*words(key, n), dtype)


def _to_normals(high: Array, low: Array, dtype: DTypeLike) -> Array:
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
    # Always true. Without it XLA folds the constant into a later product with z, but not in all programs: a candidate
    # alone would differ by a bit from the same candidate in a batch.
    return jnp.where(jnp.abs(u) < 1, z, 0)


def signs(key: Key, n: int, dtype: DTypeLike = jnp.float32) -> Array:
    """n random signs, -1 or +1, 32 from a word: sign j is bit j // w of word j % w, with w = ceil(n / 32)."""
    return _bits(_packed(key, n)[None, :], jnp.arange(32, dtype=jnp.uint32)[:, None], dtype).reshape(-1)[:n]


def _packed(key: Key, n: int) -> Array:
    # Without the barrier XLA would compute the word again for each of its 32 bits.
    return jax.lax.optimization_barrier(words(key, -(-n // 32))[0])


def _bits(word: Array, bit: Array, dtype: DTypeLike) -> Array:
    one = np.uint32(0x3F800000)  # 1.0; the chosen bit becomes its sign, which is cheaper than a conversion
    sign = ((word >> bit) << np.uint32(31)) | one
    return jax.lax.bitcast_convert_type(sign, jnp.float32).astype(dtype)


class Parts(NamedTuple):
    """How to draw parts of `sample(key, n, dtype)` with the bits that they have in the whole."""

    prepare: Callable[[Key, int], Any]  # (key, n) -> what all parts share
    at: Callable[[Any, int, Array, DTypeLike], Array]  # (prepared, n, places (...) uint32, dtype) -> (...)
    lanes: int  # numbers that one word gives, n / lanes apart
    block: Callable[[Key, int, Array, int, DTypeLike], Array]  # (key, n, start, m, dtype) -> (lanes, m)


def _normals_at(key: Key, n: int, j: Array, dtype: DTypeLike) -> Array:
    return _to_normals(*words_at(key, j), dtype)


def _normals_block(key: Key, n: int, start: Array, m: int, dtype: DTypeLike) -> Array:
    return _normals_at(key, n, start.astype(jnp.uint32) + jnp.arange(m, dtype=jnp.uint32)[None], dtype)


def _signs_at(packed: Array, n: int, j: Array, dtype: DTypeLike) -> Array:
    w = np.uint32(packed.shape[0])
    return _bits(packed[j % w], j // w, dtype)


def _signs_block(key: Key, n: int, start: Array, m: int, dtype: DTypeLike) -> Array:
    word = words_at(key, start.astype(jnp.uint32) + jnp.arange(m, dtype=jnp.uint32))[0]
    return _bits(jax.lax.optimization_barrier(word)[None], jnp.arange(32, dtype=jnp.uint32)[:, None], dtype)


PARTS: dict[Callable[..., Array], Parts] = {
    normals: Parts(lambda key, n: key, _normals_at, 1, _normals_block),
    signs: Parts(_packed, _signs_at, 32, _signs_block),
}
"""Distributions whose parts can be drawn alone; of others the whole is drawn, and cut."""
