"""Keys on the host: those of a run and its generations without a program, and in forms that pickle."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.types import Key


def run_keys(key: Key) -> tuple[Key, Key]:
    """The keys of a run: that of `init`, and that which is folded with the number of each generation.

    They are those of `jax.random.split(key)`, without a program of their own.

    >>> key = jax.random.key(7)
    >>> bool((jax.random.key_data(run_keys(key)[1]) == jax.random.key_data(jax.random.split(key)[1])).all())
    True
    """
    return generation_key(key, 0), generation_key(key, 1)


def generation_key(key: Key, number: int) -> Key:
    """`jax.random.fold_in(key, number)` on the host, in microseconds."""
    k0, k1 = np.asarray(jax.random.key_data(key)).tolist()
    folded: Any = np.array(_threefry(k0, k1, 0, int(number)), np.uint32)
    return jax.random.wrap_key_data(folded, impl="threefry2x32")


def _threefry(k0: int, k1: int, x0: int, x1: int) -> tuple[int, int]:
    """Threefry-2x32-20 (see `evoopt.noise`) of one counter in Python's integers."""
    mask, keys = 0xFFFFFFFF, (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = (x0 + k0) & mask, (x1 + k1) & mask
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = (x0 + x1) & mask
            x1 = (((x1 << rotation) | (x1 >> (32 - rotation))) & mask) ^ x0
        x0 = (x0 + keys[(group + 1) % 3]) & mask
        x1 = (x1 + keys[(group + 2) % 3] + group + 1) & mask
    return x0, x1


@dataclasses.dataclass(frozen=True)
class KeyData:
    """A PRNG key that pickles."""

    implementation: str
    data: np.ndarray


def without_keys(tree: Any) -> Any:
    """`tree` with NumPy arrays, and keys as their data, which pickle and copy exactly."""

    def plain(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return np.asarray(x)
        return KeyData(str(jax.random.key_impl(x)), np.asarray(jax.random.key_data(x)))

    return jax.tree.map(plain, tree)


def with_keys(tree: Any) -> Any:
    """The inverse of `without_keys`: JAX arrays and keys again."""

    def array(x: Any) -> Any:
        if isinstance(x, KeyData):
            return jax.random.wrap_key_data(jnp.asarray(x.data), impl=x.implementation)
        return jnp.asarray(x) if isinstance(x, np.ndarray) else x

    return jax.tree.map(array, tree, is_leaf=lambda x: isinstance(x, KeyData))
