"""The kinds of variables: how each is searched, by floats u, and what it gives an objective.

One unit of u is a sensible initial standard deviation, and u = 0 is the start. `decode` takes any u, infinite or NaN
too, to a value inside, in JAX; `encode` takes a value back to its u; `code` checks a value that a user wrote and makes
it an array; `show` makes an array what objectives in Python get. Where `coordinates` is None there is one value only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import bounds
from evoopt.spaces import numbers
from evoopt.spaces.numbers import Nested
from evoopt.types import Array, error


@dataclasses.dataclass(frozen=True)
class Real:
    """Real numbers; see `real`."""

    low: float | None
    high: float | None
    log: bool
    start: Nested
    scale: float
    shape: tuple[int, ...]

    @property
    def coordinates(self) -> tuple[int, ...] | None:
        return None if self.low is not None and self.low == self.high else self.shape

    def walls(self, kind: Any) -> tuple[Any, Any]:
        """The bounds in a float type, rounded inwards; the largest numbers of that type where there is none."""
        most = np.finfo(kind).max
        low, high = (side if bound is None else bound for bound, side in ((self.low, -most), (self.high, most)))
        if self.log and self.low is None:
            low = np.finfo(kind).tiny
        return numbers.above(low, kind), numbers.below(high, kind)

    def _position(self, x: Any, kind: Any) -> Any:
        return np.asarray(np.log(x) if self.log else x, kind)

    def _range(self, kind: Any) -> tuple[Any, Any]:
        """Where positions fold: the bounds as positions, infinite where there is none."""
        low = -math.inf if self.low is None else self._position(self.low, kind)
        return low, math.inf if self.high is None else self._position(self.high, kind)

    def decode(self, u: Array) -> Array:
        kind = u.dtype
        position = self.linear(numbers.known(u))
        position = bounds.fold(position, *self._range(kind))
        return jnp.clip(jnp.exp(position) if self.log else position, *self.walls(kind))

    def linear(self, u: Array) -> Array:
        """Where u is before it is folded, in logarithms where `log`."""
        return jnp.asarray(self._position(self.start, u.dtype)) + np.asarray(self.scale, u.dtype) * u

    def encode(self, x: Any) -> Array:
        x = jnp.asarray(x)
        position = jnp.log(x) if self.log else x
        return (position - self._position(self.start, x.dtype)) / np.asarray(self.scale, x.dtype)

    def box(self) -> tuple[Any, Any]:
        if self.low is None or self.high is None:
            return np.full(self.shape, -np.inf), np.full(self.shape, np.inf)
        center = self._position(self.start, float)
        sides = ((position - center) / self.scale for position in self._range(float))
        low, high = (np.broadcast_to(side, self.shape) for side in sides)
        return low, high

    def code(self, x: Any, name: str) -> np.ndarray:
        """A value as the array that objectives in JAX get; raises for what is not one."""
        kind = numbers.real_kind()
        x = numbers.array(x, self.shape, name)
        low, high = (np.asarray(side, float) for side in self.walls(kind))
        if not numbers.within(x, low, high, kind):
            raise error(f"'{name}' within {numbers.interval(self.low, self.high)}", numbers.short(x), OUTSIDE)
        return np.clip(x, low, high).astype(kind)

    def show(self, x: np.ndarray) -> Any:
        return x.item() if self.shape == () else x


@dataclasses.dataclass(frozen=True)
class Integer:
    """Whole numbers; see `integer`."""

    low: int
    high: int
    log: bool
    start: Nested
    scale: float
    shape: tuple[int, ...]

    @property
    def coordinates(self) -> tuple[int, ...] | None:
        return None if self.low == self.high else self.shape

    # Without log, positions count from the start, so that numbers near it are exact whatever they are.
    def _position(self, x: Any, kind: Any) -> Any:
        return np.log(x).astype(kind) if self.log else np.asarray(x - np.asarray(self.start), kind)

    def decode(self, u: Array) -> Array:
        return self._rounded(u, np.asarray(0.5, u.dtype))

    def drawn(self, u: Array, uniform: Array) -> Array:
        """As `decode`, rounded up with the probability of what lies behind the point (stochastic rounding)."""
        return self._rounded(u, uniform)

    def _rounded(self, u: Array, up: Any) -> Array:
        kind, start = u.dtype, np.asarray(self.start)
        center = np.log(start).astype(kind) if self.log else np.zeros((), kind)
        walls = self._position(self.low - 0.5, kind), self._position(self.high + 0.5, kind)
        position = bounds.fold(jnp.asarray(center) + np.asarray(self.scale, kind) * numbers.known(u), *walls)
        if self.log:
            return jnp.clip(jnp.floor(jnp.exp(position) + up), self.low, self.high).astype(jnp.int32)
        least, most = (jnp.asarray(side - start, jnp.int32) for side in (self.low, self.high))
        return jnp.clip(jnp.floor(position + up).astype(jnp.int32), least, most) + jnp.asarray(start, jnp.int32)

    def encode(self, x: Any) -> Array:
        kind, x = numbers.real_kind(), jnp.asarray(x, jnp.int32)
        scale = np.asarray(self.scale, kind)
        if self.log:
            return (jnp.log(x.astype(kind)) - np.log(np.asarray(self.start)).astype(kind)) / scale
        return (x - jnp.asarray(self.start, jnp.int32)).astype(kind) / scale

    def step(self, u: Array) -> Array:
        """From one whole number to the next, in units of u; with `log` as wide as the cell of u."""
        scale = np.asarray(self.scale, u.dtype)
        if not self.log:
            return jnp.full_like(u, 1 / scale)
        i, half = self.decode(u).astype(u.dtype), np.asarray(0.5, u.dtype)
        return (jnp.log(i + half) - jnp.log(i - half)) / scale

    def box(self) -> tuple[Any, Any]:
        center = np.log(np.asarray(self.start)) if self.log else np.zeros(())
        walls = (self._position(x, float) for x in (self.low - 0.5, self.high + 0.5))
        low, high = (np.broadcast_to((wall - center) / self.scale, self.shape) for wall in walls)
        return low, high

    def code(self, x: Any, name: str) -> np.ndarray:
        x = numbers.array(x, self.shape, name)
        if not ((x >= self.low) & (x <= self.high) & (x == np.round(x))).all():
            expected = f"'{name}' a whole number within {numbers.interval(self.low, self.high)}"
            raise error(expected, numbers.short(x), OUTSIDE)
        return x.astype(np.int32)

    def show(self, x: np.ndarray) -> Any:
        return x.item() if self.shape == () else x


@dataclasses.dataclass(frozen=True)
class Categorical:
    """One of several choices; see `categorical`."""

    choices: tuple[Hashable, ...]
    start: Nested  # places of choices
    shape: tuple[int, ...]
    given: bool = False  # whether a user said where to start

    @property
    def k(self) -> int:
        return len(self.choices)

    @property
    def coordinates(self) -> tuple[int, ...] | None:
        """Two choices are one coordinate, more have one each."""
        return None if self.k == 1 else self.shape if self.k == 2 else (*self.shape, self.k)

    @property
    def table(self) -> np.ndarray | None:
        """The choices as an array (k,), None if they are not all numbers."""
        if all(isinstance(c, (bool, np.bool_)) for c in self.choices):
            return np.asarray(self.choices, bool)
        if not all(isinstance(c, (int, float, np.number)) and not isinstance(c, bool) for c in self.choices):
            return None
        whole = all(isinstance(c, (int, np.integer)) and abs(c) < 2**31 for c in self.choices)  # type: ignore[arg-type]
        return np.asarray(self.choices, np.int32 if whole else numbers.real_kind())

    @property
    def places(self) -> Integer:
        """Two choices as the whole numbers 0 and 1."""
        return Integer(0, 1, False, self.start, 0.5, self.shape)

    def _first(self, kind: Any) -> np.ndarray:
        return (np.asarray(self.start)[..., None] == np.arange(self.k)).astype(kind)

    def index(self, u: Array) -> Array:
        """u -> place of the choice, int32."""
        if self.k == 2:
            return self.places.decode(u)
        return jnp.argmax(numbers.known(u) + self._first(u.dtype), axis=-1).astype(jnp.int32)

    def value(self, index: Array) -> Array:
        """Place of the choice -> what objectives in JAX get: the choice where all are numbers, otherwise its place."""
        return index if self.table is None else jnp.asarray(self.table)[index]

    def decode(self, u: Array) -> Array:
        return self.value(self.index(u))

    def place(self, x: Any) -> Array:
        """The inverse of `value`."""
        x = jnp.asarray(x)
        if self.table is None:
            return x.astype(jnp.int32)
        return jnp.argmax(x[..., None] == jnp.asarray(self.table), axis=-1).astype(jnp.int32)

    def encode(self, x: Any) -> Array:
        return self.encode_index(self.place(x))

    def encode_index(self, index: Array) -> Array:
        kind = numbers.real_kind()
        if self.k == 2:
            return self.places.encode(index)
        return (index[..., None] == jnp.arange(self.k, dtype=jnp.int32)).astype(kind) - self._first(kind)

    def box(self) -> tuple[Any, Any]:
        return self.places.box() if self.k == 2 else (-self._first(float), 1 - self._first(float))

    def code(self, x: Any, name: str) -> np.ndarray:
        places = self._places(x, name)
        return places if self.table is None else self.table[places]

    def _places(self, x: Any, name: str) -> np.ndarray:
        if self.shape == ():
            return np.asarray(self._one(x, name), np.int32)
        cells = np.asarray(x) if isinstance(x, (np.ndarray, jax.Array)) else numbers.filled(self.shape, x, name)
        if cells.shape != self.shape:
            raise error(f"choices of shape {self.shape} at '{name}'", f"shape {cells.shape}", "one choice for several")
        flat = [self._one(cell, name) for cell in cells.reshape(-1)]
        return np.asarray(flat, np.int32).reshape(self.shape)

    def _one(self, x: Any, name: str) -> int:
        """The place of one choice: the choice itself, or what objectives in JAX get."""
        got = numbers.item(x)
        if self.table is not None and isinstance(x, (np.ndarray, np.generic)):
            found = np.flatnonzero(self.table == np.asarray(got, self.table.dtype))
        elif self.table is None and isinstance(x, (np.ndarray, np.integer)) and isinstance(got, int):
            found = [got] if 0 <= got < self.k else []
        else:
            found = [i for i, c in enumerate(self.choices) if numbers.same(c, got)]
        if len(found) == 0:
            raise error(f"one of {numbers.short(self.choices)} at '{name}'", repr(got)[:60], "a choice misspelt")
        return int(found[0])

    def show(self, x: np.ndarray) -> Any:
        places = np.asarray(x) if self.table is None else np.argmax(x[..., None] == self.table, axis=-1)
        if self.shape == ():
            return self.choices[int(places)]
        shown = np.empty(self.shape, object)
        for at in np.ndindex(self.shape):
            shown[at] = self.choices[int(places[at])]
        return shown if self.table is None else np.asarray(shown.tolist())


@dataclasses.dataclass(frozen=True)
class Permutation:
    """An order of 0 to n - 1; see `permutation`."""

    n: int

    @property
    def coordinates(self) -> tuple[int, ...] | None:
        return (self.n,) if self.n > 1 else None

    def decode(self, u: Array) -> Array:
        return jnp.argsort(numbers.known(u), stable=True).astype(jnp.int32)

    def encode(self, x: Any) -> Array:
        # The keys have the mean 0 and the standard deviation 1, as those that are drawn at first.
        kind, x = numbers.real_kind(), jnp.asarray(x, jnp.int32)
        ranks = (np.arange(self.n) - (self.n - 1) / 2) / math.sqrt((self.n**2 - 1) / 12)
        keys = jnp.zeros(self.n, kind).at[x].set(ranks.astype(kind))
        return jnp.where((x == jnp.arange(self.n, dtype=jnp.int32)).all(), jnp.zeros(self.n, kind), keys)

    def box(self) -> tuple[Any, Any]:
        return np.full(self.n, -math.sqrt(3)), np.full(self.n, math.sqrt(3))

    def code(self, x: Any, name: str) -> np.ndarray:
        x = numbers.array(x, (self.n,), name)
        if not (np.sort(x) == np.arange(self.n)).all():
            cause = "counting from 1, or a number that is there twice"
            raise error(f"each number from 0 to {self.n - 1} once at '{name}'", numbers.short(x), cause)
        return x.astype(np.int32)

    def show(self, x: np.ndarray) -> Any:
        return x


@dataclasses.dataclass(frozen=True)
class Simplex:
    """n shares that sum to 1; see `simplex`."""

    n: int

    @property
    def coordinates(self) -> tuple[int, ...] | None:
        return (self.n,) if self.n > 1 else None

    def decode(self, u: Array) -> Array:
        share = np.asarray(1 / self.n, u.dtype)
        # In quarters of the largest, so that no sum overflows; a u so large leaves nothing of the others.
        most = np.asarray(np.finfo(u.dtype).max / (4 * self.n), u.dtype)
        x = jnp.abs(share + jnp.clip(numbers.known(u), -most, most) * share / 2)
        total = x.sum(axis=-1, keepdims=True)
        return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), share)

    def encode(self, x: Any) -> Array:
        x = jnp.asarray(x)
        share = np.asarray(1 / self.n, x.dtype)
        return (x - share) / (share / 2)

    def box(self) -> tuple[Any, Any]:
        return np.full(self.n, -2.0), np.full(self.n, 2.0 * (self.n - 1))

    def code(self, x: Any, name: str) -> np.ndarray:
        kind = numbers.real_kind()
        x = numbers.array(x, (self.n,), name)
        if not (x >= 0).all() or abs(x.sum() - 1) > 4 * self.n * np.finfo(kind).eps:
            raise error(f"{self.n} shares at '{name}' that sum to 1", numbers.short(x), "percentages, or weights")
        return x.astype(kind)

    def show(self, x: np.ndarray) -> Any:
        return x


@dataclasses.dataclass(frozen=True)
class Conditional:
    """A variable that exists only under a choice; see `conditional`."""

    variable: Any  # or a fixed value
    on: str
    equal: tuple[Hashable, ...]


VARIABLES = (Real, Integer, Categorical, Permutation, Simplex)
OUTSIDE = "a value in other units, or from another space"


def is_variable(x: Any) -> bool:
    return isinstance(x, (*VARIABLES, Conditional))
