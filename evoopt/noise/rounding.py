"""Sums over half-precision parameters: taken in float32, and rounded once, to the nearest or at random."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from evoopt.noise.threefry import fold_in, words
from evoopt.types import Array, Key


def wide(x: Any) -> Any:
    """The dtype for sums over `x`: its own, or float32 where a narrower one would lose the small terms."""
    return x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.float32


def stochastic_round(x: Array, key: Key, dtype: DTypeLike) -> Array:
    """x in a narrower `dtype`, rounded up or down at random so that its mean is x; the same key rounds the same way.

    Rounding to the nearest loses updates far below the spacing of the weights; this keeps them on average. Numbers that
    `dtype` has stay as they are, NaN and infinities too, and a finite x never becomes infinite.

    Source: Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep learning with limited numerical precision", ICML 2015.

    >>> import jax
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


@dataclasses.dataclass(frozen=True)
class Narrow:
    """How a sum over a leaf is rounded to the dtype of the leaf."""

    dtype: Any
    key: Key | None = None  # to round at random with; None rounds to the nearest

    @property
    def at_random(self) -> bool:
        return self.key is not None and wide(self) != self.dtype

    def at(self, *place: Array) -> Narrow:
        """The same for a part of the leaf, with a key of its own."""
        return self if self.key is None else Narrow(self.dtype, functools.reduce(fold_in, place, self.key))

    def __call__(self, x: Array) -> Array:
        return x.astype(self.dtype) if self.key is None else stochastic_round(x, self.key, self.dtype)


class Rounding:
    """What `rounding` yields: its key, and which sums were rounded with it."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.calls = 0
        self.rounded: list[Array] = []  # the leaves that `add_weighted` gave

    def narrows(self, leaves: list[Array]) -> list[Narrow]:
        """How the sums over the leaves of some parameters are rounded, each with a key of its own."""
        key, self.calls = fold_in(self.key, self.calls), self.calls + 1
        return [Narrow(x.dtype, fold_in(key, i)) for i, x in enumerate(leaves)]


_rounding: contextvars.ContextVar[Rounding | None] = contextvars.ContextVar("rounding", default=None)


@contextlib.contextmanager
def rounding(key: Key) -> Iterator[Rounding]:
    """Inside it `add_weighted` rounds its sums at random (`stochastic_round`), slice by slice, wherever it is called.

    So a step of half-precision parameters needs no float32 copy of them. It acts while a program is traced.
    """
    made = Rounding(key)
    token = _rounding.set(made)
    try:
        yield made
    finally:
        _rounding.reset(token)


def current() -> Rounding | None:
    """The innermost `rounding`."""
    return _rounding.get()
