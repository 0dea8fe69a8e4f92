"""What travels between driver and workers: trees of arrays without JAX objects, and a checksum of a tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.run.keys import KeyData
from evoopt.types import Array


def pack(tree: Any) -> Any:
    """The tree with NumPy arrays instead of JAX's; `unpack` gives it back with the same types and bits."""
    return jax.tree.map(_packed, tree)


def unpack(tree: Any) -> Any:
    """The tree that was packed, ready for a compiled function."""
    restored = lambda x: jax.random.wrap_key_data(jnp.asarray(x.data), impl=x.implementation)
    is_key = lambda x: isinstance(x, KeyData)
    return jax.tree.map(lambda x: restored(x) if is_key(x) else x, tree, is_leaf=is_key)


def _packed(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return KeyData(str(jax.random.key_impl(x)), np.asarray(jax.random.key_data(x)))
    array = np.asarray(x)
    return array.item() if x.weak_type and array.ndim == 0 else array  # a Python number is weak again where it arrives


def rows(tree: Any, index: Any) -> Any:
    """Rows of a packed tree, along the leading axis of each leaf."""
    one = lambda x: KeyData(x.implementation, x.data[index]) if isinstance(x, KeyData) else x[index]
    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, KeyData))


def nbytes(tree: Any) -> int:
    """Bytes of the arrays in a packed tree."""
    size = lambda x: (x.data if isinstance(x, KeyData) else np.asarray(x)).nbytes
    return sum(size(x) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, KeyData)))


def fingerprint(tree: Any) -> Array:
    """A checksum uint32[2] of every bit of the leaves and their places: against accidents, not against malice.

    It is a sum of integers, so that it is the same in whatever order and on whatever device it is computed, and it
    costs one pass over the memory; call it under jit.

    >>> a, b = fingerprint({"x": jnp.zeros(3)}), fingerprint({"x": jnp.zeros(3).at[1].set(-0.0)})
    >>> bool((a == b).all())
    False
    """
    total = jnp.zeros(2, jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = _words(jnp.asarray(leaf))
        place = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9) + jnp.uint32(number + 1)
        lanes = [_mix(words ^ _mix(place ^ jnp.uint32(lane))).sum(dtype=jnp.uint32) for lane in (0, 0x85EBCA6B)]
        total = total + jnp.stack(lanes)
    return total


def _words(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = x.dtype.itemsize * 8
    x = jax.lax.bitcast_convert_type(x, {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32))
    return x.reshape(-1).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3, which spreads a changed bit over the word."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))
