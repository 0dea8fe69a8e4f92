"""Quasi-Newton search on finite differences: BFGS with a backtracking line search.

Sources: Nocedal and Wright, "Numerical Optimization", 2nd ed. (2006): algorithm 6.1 with the update (6.17), the first
scaling (6.20), and the line search of chapter 3.5 (Armijo's condition, quadratic interpolation). An update whose
curvature is not positive is left out, where Wolfe's second condition would ask for gradients within the line search.

The differences of a gradient are one generation, the points of the line search one each. A run that can go no further
begins again somewhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, best_place, settle, told
from evoopt.checks import check_sigma
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree

DECREASE = 1e-4  # c1, the share of the decrease along the slope that a step must bring
TRIES = 12  # points of one line search
LONGEST = 10.0  # of a first step, in units of sigma


class State(NamedTuple):
    """The state of a run, and of all of them."""

    x: Array  # (d,), where the gradient is
    value: Array  # (), there; +inf until it is answered
    gradient: Array  # (d,), at x, or at the point before while it is asked for
    inverse: Array  # (d, d), of the Hessian
    fresh: Array  # () bool, the inverse has seen no step
    last: Array  # (d,), the step that led to x; 0 if none
    direction: Array  # (d,)
    length: Array  # (), of the step along it that is tried next
    tries: Array  # () int32, in this line search; -1 while the gradient is asked for
    runs: Array  # () int32, that have ended
    start: Array  # (d,)
    best: Array  # (d,)
    best_value: Array  # ()
    key: Array  # of the starts
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class QuasiNewton:
    """BFGS on finite differences; see `quasi_newton`."""

    sigma: float
    lower: Any
    upper: Any
    oracle = staticmethod(value)
    restarting = True  # nothing but its budget ends it: see `stopping.restarts_itself`

    def init(self, params: Params, key: Key) -> State:
        check_sigma(self.sigma)
        x, unravel = trees.ravel(trees.searchable(params))
        variation.box(self.lower, self.upper, unravel)
        d, zero = x.size, jnp.zeros((), jnp.int32)
        inf = jnp.asarray(jnp.inf, x.dtype)
        nothing = jnp.zeros_like(x)
        return State(
            x, inf, nothing, jnp.eye(d, dtype=x.dtype), jnp.asarray(True), nothing, nothing, jnp.ones((), x.dtype),
            zero - 1, zero, x, x, inf, noises.replayable(key), unravel, zero,
        )  # fmt: skip

    def _walls(self, state: State) -> variation.Box:
        return variation.box(self.lower, self.upper, state.unravel)

    def _steps(self, state: State) -> Array:
        """The differences' steps, (d,): towards the farther wall, where there are walls."""
        eps = jnp.asarray(jnp.finfo(state.x.dtype).eps, state.x.dtype)
        h = jnp.sqrt(eps) * jnp.maximum(jnp.abs(state.x), jnp.asarray(self.sigma, state.x.dtype))
        walls = self._walls(state)
        return h if walls is None else jnp.where(state.x + h > walls[1], -h, h)

    def ask(self, state: State, key: Key) -> Population:
        noises.replayable(key)  # nothing is drawn
        d = state.x.size
        differences = jnp.concatenate([state.x[None], state.x + jnp.diag(self._steps(state))])
        trial = variation.clipped(state.x + state.length * state.direction, self._walls(state))
        asks = state.tries < 0
        x = jnp.where(asks, differences, trial)
        first = jnp.arange(d + 1, dtype=jnp.int32) == 0
        known = jnp.isfinite(state.value)
        return Population(state.unravel, x, jnp.where(asks, ~first | ~known, first))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers)).astype(state.value.dtype)
        i = best_place(values)
        better = answered(values[i]) & (values[i] < state.best_value)
        noted = state._replace(
            best=jnp.where(better, population.genomes[i], state.best),
            best_value=jnp.where(better, values[i], state.best_value),
        )
        asks = state.tries < 0
        new = trees.where(asks, self._turned(noted, values), self._tried(noted, population.genomes[0], values[0]))
        return settle(state, new, values)

    def _turned(self, state: State, values: Array) -> State:
        """The gradient is there: the inverse is updated, and a new direction is taken."""
        d = state.x.size
        value = jnp.where(jnp.isfinite(state.value), state.value, values[0])
        slopes = (values[1:] - value) / self._steps(state)
        gradient = jnp.where(jnp.isfinite(slopes), slopes, 0)
        s, y = state.last, gradient - state.gradient
        curvature = s @ y
        sound = curvature > 1e-10 * jnp.sqrt((s @ s) * (y @ y))
        scale = jnp.where(state.fresh, curvature / jnp.where(y @ y > 0, y @ y, 1), 1)  # (6.20)
        h = jnp.where(sound, scale, 1) * state.inverse
        rho = 1 / jnp.where(sound, curvature, 1)
        v = jnp.eye(d, dtype=s.dtype) - rho * jnp.outer(s, y)
        inverse = jnp.where(sound, v @ h @ v.T + rho * jnp.outer(s, s), state.inverse)  # (6.17)
        fresh = state.fresh & ~sound
        direction = -inverse @ gradient
        walls = self._walls(state)
        if walls is not None:  # what would leave the box is held
            out = ((state.x <= walls[0]) & (direction < 0)) | ((state.x >= walls[1]) & (direction > 0))
            direction = jnp.where(out, 0, direction)
        downhill = direction @ gradient < 0
        direction = jnp.where(downhill, direction, -gradient)
        size = jnp.sqrt(direction @ direction)
        sigma = jnp.asarray(self.sigma, s.dtype)
        length = jnp.where(fresh, jnp.minimum(1, sigma / jnp.where(size > 0, size, 1)), 1)
        lost = ~jnp.isfinite(value) | (size == 0)
        return self._begun_where(
            lost,
            state._replace(
                value=value, gradient=gradient, inverse=inverse, fresh=fresh, direction=direction, length=length,
                tries=jnp.zeros((), jnp.int32),
            ),
        )  # fmt: skip

    def _tried(self, state: State, x: Array, new: Array) -> State:
        """A point of the line search is answered."""
        new = jnp.where(answered(new), new, jnp.inf)
        step = x - state.x
        slope = state.gradient @ step
        gained = new <= state.value + DECREASE * jnp.minimum(slope, 0)
        # The minimum of the parabola through the value and slope at x and the value here (Nocedal and Wright 3.58).
        bend = new - state.value - slope
        factor = jnp.where((bend > 0) & jnp.isfinite(bend), -slope / (2 * jnp.where(bend > 0, bend, 1)), 0.5)
        shorter = state.length * jnp.clip(jnp.where(jnp.isfinite(new), factor, 0.1), 0.1, 0.5)
        accepted = state._replace(
            x=x, value=new, last=step, length=jnp.ones_like(state.length), tries=-jnp.ones((), jnp.int32)
        )
        # No progress that a float can hold: the run has ended.
        still = gained & (state.value - new <= 4 * jnp.finfo(new.dtype).eps * jnp.abs(new))
        again = state._replace(length=shorter, tries=state.tries + 1)
        failed = ~gained & (state.tries >= TRIES)
        # A direction of an old Hessian that leads nowhere: the steepest one is tried before the run ends.
        steepest = again._replace(
            inverse=jnp.eye(x.size, dtype=x.dtype), fresh=jnp.asarray(True), direction=-state.gradient,
            length=1 / jnp.sqrt(jnp.maximum(state.gradient @ state.gradient, jnp.finfo(x.dtype).tiny)) * 1e-3
            * jnp.asarray(self.sigma, x.dtype), tries=jnp.zeros((), jnp.int32),
        )  # fmt: skip
        again = trees.where(failed & ~state.fresh, steepest, again)
        return self._begun_where(still | (failed & state.fresh), trees.where(gained, accepted, again))

    def _begun_where(self, ended: Array, state: State) -> State:
        """The state, or where the run has ended, that of a new one from somewhere else."""
        key = noises.fold_in(state.key, state.runs)
        x = variation.drawn(self._walls(state), key, 1, state.start, self.sigma)[0]
        d = x.size
        nothing = jnp.zeros_like(x)
        fresh = state._replace(
            x=x, value=jnp.full_like(state.value, jnp.inf), gradient=nothing, inverse=jnp.eye(d, dtype=x.dtype),
            fresh=jnp.asarray(True), last=nothing, direction=nothing, length=jnp.ones_like(state.length),
            tries=-jnp.ones((), jnp.int32), runs=state.runs + 1,
        )  # fmt: skip
        return trees.where(ended, fresh, state)

    def ended(self, state: State) -> Array:
        """Whether a run has ended: () bool. Another one has begun, if it is let."""
        return state.runs > 0

    def recommend(self, state: State) -> Params:
        return state.unravel(state.best)


def quasi_newton(sigma: float = 1.0, *, lower: Params = None, upper: Params = None) -> QuasiNewton:
    """BFGS on finite differences with restarts (Nocedal and Wright 2006), for smooth functions of few numbers.

    A generation has room for d + 1 candidates: the d differences of a gradient are asked together, the points of a line
    search one at a time. Search in float64 if values are large: differences are of the size of its rounding.

    Args:
        sigma: the length of the first step, and the scale of a number from which differences are taken.
        lower, upper: numbers, or trees like the parameters; None for no bounds. Other runs start evenly in the box, or
            normally distributed around the start, by `sigma`.

    Raises:
        ValueError: for bounds of which only one is there, or that are crossed.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), quasi_newton(), evaluations=40)
    >>> bool(result.best_value < 1e-6)
    True
    """
    return QuasiNewton(sigma, lower, upper)
