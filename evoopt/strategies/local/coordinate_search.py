"""Coordinate search: one number at a time is searched with the rest held; solves separable functions.

Sources: Brent, "Algorithms for minimization without derivatives" (1973), chapter 5, for the steps that converge;
Langerman, Seront, Bersini, "S.T.E.P.: the easiest way to optimize a function", CEC 1994, for those that look elsewhere:
the interval in which the flattest parabola would hold something better is halved. Both were run on the axes in turn by
Posik, "BBOB-benchmarking two variants of the line-search algorithm", GECCO 2009 companion.

Every number has a list of its values that were tried, and of what each gains over the base, the best point so far. If
the function is separable, a list stays true when the base moves along another axis; so nothing need be asked twice. Two
values are asked twice all the same, to see whether it is: `ended` says so if it is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, settle, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static

GOLDEN = (3 - 5**0.5) / 2
WIDTH = 8.0  # of the interval of a number without bounds, in units of `spread`
FINEST = 1e-9  # smallest step, in units of the interval; 1e-5 in float32
LOOK = 4  # every so many steps of a number that still converges look elsewhere
TESTS = (3, 8)  # turns in which one number asks again what it knows
ROUNDING = 100  # floats by which a gain may differ
BETTER = 1e-2  # how much better than the best a far interval should be, in units of the lower quartile of the gains


class State(NamedTuple):
    """What was tried of every number."""

    at: Array  # (d, m), values in ascending order; +inf where there are none yet
    gain: Array  # (d, m), the objective there less the base's; +inf likewise
    base: Array  # (d,), the best point
    value: Array  # (); +inf until it is answered
    low: Array  # (d,)
    high: Array  # (d,)
    step: Array  # () int32, values tried of all numbers
    separable: Array  # () bool, no gain has turned out to depend on other numbers
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class CoordinateSearch:
    """One number at a time; see `coordinate_search`."""

    popsize: int = static()
    lower: Any
    upper: Any
    spread: float
    memory: int = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 1)
        check_popsize(self.memory, 8, name="memory")

    def init(self, params: Params, key: Key) -> State:
        del key
        check_sigma(self.spread, "spread")
        x, unravel = trees.ravel(trees.searchable(params))
        walls = variation.box(self.lower, self.upper, unravel)
        edge = WIDTH / 2 * jnp.asarray(self.spread, x.dtype)
        low, high = x - edge, x + edge
        if walls is not None:
            free = jnp.isinf(walls[0])
            low, high = jnp.where(free, low, walls[0]), jnp.where(free, high, walls[1])
            x = jnp.clip(x, low, high)
        blank = jnp.full((x.size, self.memory), jnp.inf, x.dtype)
        at, gain = blank.at[:, 0].set(x), blank.at[:, 0].set(0)
        inf, zero = jnp.asarray(jnp.inf, x.dtype), jnp.zeros((), jnp.int32)
        return State(at, gain, x, inf, low, high, zero, jnp.asarray(True), unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        noises.replayable(key)  # nothing is drawn
        d = state.base.size
        axis = self._axes(state)
        rows = (state.at[axis], state.gain[axis], state.low[axis], state.high[axis])
        turn = (state.step + jnp.arange(self.popsize, dtype=jnp.int32)) // d
        trial = jax.vmap(_tried)(*rows, turn)
        worst = jnp.argmax(jnp.where(jnp.isfinite(rows[1]), rows[1], -jnp.inf), axis=1)
        trial = jnp.where(self._tests(state), jnp.take_along_axis(rows[0], worst[:, None], axis=1)[:, 0], trial)
        x = jnp.where(jnp.arange(d, dtype=jnp.int32) == axis[:, None], trial[:, None], state.base)
        # One candidate is the start itself until its value is known.
        return Population(state.unravel, x.at[0].set(jnp.where(jnp.isposinf(state.value), state.base, x[0])))

    def _axes(self, state: State) -> Array:
        """The numbers whose turn it is, (n,) int32."""
        return (state.step + jnp.arange(self.popsize, dtype=jnp.int32)) % state.base.size

    def _tests(self, state: State) -> Array:
        """Which candidates ask again what the worst value of their number gains, (n,) bool."""
        d = state.base.size
        step = state.step + jnp.arange(self.popsize, dtype=jnp.int32)
        return (step == TESTS[0] * d) | (step == TESTS[1] * d + d // 2)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers)).astype(state.value.dtype)
        x, axis = population.genomes, self._axes(state)
        begins = jnp.isposinf(state.value)  # the first candidate is the start
        values = jnp.where(answered(values), values, jnp.inf)
        value = jnp.where(begins, values[0], state.value)
        tried = jnp.take_along_axis(x, axis[:, None], axis=1)[:, 0]
        gain = jnp.where(jnp.isfinite(value), values - value, jnp.inf)
        at, gains = state.at, state.gain
        before = jnp.max(jnp.where(jnp.isfinite(gains[axis]), gains[axis], -jnp.inf), axis=1)
        exact = jnp.sqrt(jnp.finfo(values.dtype).eps) * jnp.abs(before) + ROUNDING * _spacing(values)
        other = self._tests(state) & jnp.isfinite(gain) & (jnp.abs(gain - before) > exact)
        for i in range(self.popsize):
            row = jax.tree.map(lambda a, j=axis[i]: a[j], (at, gains))
            new_at, new_gain = _inserted(*row, tried[i], gain[i])
            skip = begins & (i == 0)
            at = at.at[axis[i]].set(jnp.where(skip, row[0], new_at))
            gains = gains.at[axis[i]].set(jnp.where(skip, row[1], new_gain))
        i = jnp.argmin(values)
        better = values[i] < value
        shift = jnp.where(better, values[i] - value, 0)  # what the base gains along its axis, the list there loses
        gains = gains.at[axis[i]].add(-shift)
        new = state._replace(
            at=at,
            gain=gains,
            separable=state.separable & ~other.any(),
            base=jnp.where(better, x[i], state.base),
            value=jnp.where(better, values[i], value),
            step=state.step + jnp.where(begins, self.popsize - 1, self.popsize).astype(jnp.int32),
        )
        return settle(state, new, values)

    def ended(self, state: State) -> Array:
        """Whether the function has turned out not to be separable: () bool. The search goes on, if it is let."""
        return ~state.separable

    def recommend(self, state: State) -> Params:
        return state.unravel(state.base)


def _spacing(values: Array) -> Array:
    """The distance between the floats around each value."""
    return jnp.finfo(values.dtype).eps * jnp.abs(jnp.where(jnp.isfinite(values), values, 0))


def _tried(at: Array, gain: Array, low: Array, high: Array, turn: Array) -> Array:
    """The next value of a number, of which `turn` were tried: (). The ends first."""
    finest = (high - low) * jnp.asarray(max(FINEST, 100 * float(jnp.finfo(at.dtype).eps)), at.dtype)
    b = jnp.argmin(gain)
    near, narrow = _near(at, gain, b, low, high, finest)
    far = _far(at, gain, finest)
    look = narrow | (turn % LOOK == LOOK - 1)
    ends = jnp.where(turn == 0, low, high)
    here = jnp.where(gain[b] < 0, at[b], jnp.where(look, far, near))  # better than the base, with another base: again
    return jnp.where(turn < 2, ends, here)


def _near(at: Array, gain: Array, b: Array, low: Array, high: Array, finest: Array) -> tuple[Array, Array]:
    """The next value next to the best one, at[b], and whether its neighbours are as near as can be: (), () bool."""
    x, y = at[b], gain[b]
    left, right = at[jnp.maximum(b - 1, 0)], at[jnp.minimum(b + 1, at.size - 1)]
    has_left, has_right = b > 0, jnp.isfinite(right)
    left, right = jnp.where(has_left, left, low), jnp.where(has_right, right, high)
    p, q = x - left, right - x
    u, v = gain[jnp.maximum(b - 1, 0)] - y, gain[jnp.minimum(b + 1, at.size - 1)] - y
    # the vertex of the parabola through three points
    below = 2 * (u * q + v * p)
    vertex = x + (u * q**2 - v * p**2) / jnp.where(below > 0, below, 1)
    inside = has_left & has_right & (below > 0) & jnp.isfinite(vertex) & (vertex > left) & (vertex < right)
    long, short = jnp.maximum(p, q), jnp.minimum(p, q)
    side = jnp.where(q > p, 1, -1).astype(x.dtype)
    # Where one neighbour is much nearer than the other, the far one is brought nearer; else a golden section.
    golden = x + side * jnp.where(short > finest, jnp.minimum(GOLDEN * long, 10 * short), GOLDEN * long)
    use = inside & (long < 100 * short) & (jnp.abs(vertex - x) > finest)
    point = jnp.where(use, vertex, jnp.where(inside & (jnp.abs(vertex - x) <= finest), x + side * finest, golden))
    return jnp.clip(point, low, high), long <= 4 * finest


def _far(at: Array, gain: Array, finest: Array) -> Array:
    """The middle of the interval of the least difficulty (Langerman et al., section 3): ()."""
    ok = jnp.isfinite(gain)
    least = jnp.min(gain)
    some = jnp.nanquantile(jnp.where(ok, gain, jnp.nan), 0.25)
    aim = least - jnp.maximum(BETTER * (some - least), jnp.finfo(gain.dtype).tiny)
    root = jnp.sqrt(jnp.maximum(gain - aim, 0))
    width = at[1:] - at[:-1]
    difficulty = (root[1:] + root[:-1]) / jnp.where(width > 4 * finest, width, jnp.inf)
    usable = jnp.isfinite(at[1:]) & (width > 4 * finest)
    i = jnp.argmin(jnp.where(usable, jnp.where(jnp.isnan(difficulty), jnp.inf, difficulty), jnp.inf))
    return (at[i] + jnp.where(jnp.isfinite(at[i + 1]), at[i + 1], at[i])) / 2


def _inserted(at: Array, gain: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Lists with another value in its place; if they are full, the worst one gives way."""
    again = at == x
    place = jnp.where(again.any(), jnp.argmax(again), jnp.argmax(jnp.where(jnp.isinf(at), jnp.inf, gain)))
    at, gain = at.at[place].set(x), gain.at[place].set(y)
    order = jnp.argsort(at)
    return at[order], gain[order]


def coordinate_search(
    popsize: int = 1, *, lower: Params = None, upper: Params = None, spread: float = 1.0, memory: int = 128
) -> CoordinateSearch:
    """One number at a time: Brent's steps, and now and then a look elsewhere (STEP). For separable functions.

    Args:
        popsize: numbers tried at once, each with the rest at the base.
        lower, upper: numbers, or trees like the parameters; None for no bounds.
        spread: the scale of numbers without bounds: they are searched within four times it.
        memory: values kept of each number.

    Raises:
        ValueError: for bounds of which only one is there, or that are crossed.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> rastrigin = lambda x: jnp.sum((x - 1) ** 2 + 20 * jnp.sin(jnp.pi * (x - 1)) ** 2)
    >>> strategy = coordinate_search(lower=-5.0, upper=5.0)
    >>> bool(minimize(rastrigin, jnp.zeros(3), strategy, evaluations=400).best_value < 1e-4)
    True
    """
    return CoordinateSearch(popsize, lower, upper, spread, memory)
