"""The simplex search of Nelder and Mead with coefficients that depend on the dimension, and restarts.

Sources: Nelder and Mead, "A simplex method for function minimization", Computer Journal 7 (1965), as stated by
Lagarias et al., SIAM J. Optim. 9 (1998); the coefficients are those of Gao and Han, "Implementing the Nelder-Mead
simplex algorithm with adaptive parameters", Comput. Optim. Appl. 51 (2012), equation (4.1).

The first simplex and a shrunk one are asked as one generation, all else is one candidate at a time. A simplex that has
shrunk to nothing begins again somewhere else.
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

FIRST, REFLECT, EXPAND, OUTSIDE, INSIDE, SHRINK = range(6)  # what is asked
FLAT = 8.0  # floats by which the values of an ended simplex differ at most
NARROW = 1e-9  # of an ended simplex, in units of sigma; in float32 by its precision


class State(NamedTuple):
    """The state of a run, and of all of them."""

    simplex: Array  # (d + 1, d), the best vertex first
    values: Array  # (d + 1,)
    asks: Array  # () int32, which step is asked for
    reflected_value: Array  # (), value of the reflected point
    runs: Array  # () int32, that have ended
    start: Array  # (d,)
    best: Array  # (d,)
    best_value: Array  # ()
    key: Array  # of the starts
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class NelderMead:
    """The simplex search; see `nelder_mead`."""

    sigma: float
    lower: Any
    upper: Any
    oracle = staticmethod(value)
    restarting = True  # nothing but its budget ends it: see `stopping.restarts_itself`

    def init(self, params: Params, key: Key) -> State:
        check_sigma(self.sigma)
        x, unravel = trees.ravel(trees.searchable(params))
        variation.box(self.lower, self.upper, unravel)
        zero, inf = jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, x.dtype)
        return State(
            self._simplex(x, unravel), jnp.full(x.size + 1, jnp.inf, x.dtype), zero + FIRST, inf, zero, x, x, inf,
            noises.replayable(key), unravel, zero,
        )  # fmt: skip

    def _walls(self, state: State) -> variation.Box:
        return variation.box(self.lower, self.upper, state.unravel)

    def _simplex(self, x: Array, unravel: Any) -> Array:
        """A simplex around x: one step along each axis, away from the nearer wall."""
        walls = variation.box(self.lower, self.upper, unravel)
        step = jnp.full_like(x, self.sigma)
        if walls is not None:
            step = jnp.where(x - walls[0] > walls[1] - x, -step, step)
        return jnp.concatenate([x[None], x + jnp.diag(step)])

    def ask(self, state: State, key: Key) -> Population:
        noises.replayable(key)  # nothing is drawn
        d = state.start.size
        shrunk = state.simplex[0] + _coefficients(d)[2] * (state.simplex - state.simplex[0])
        whole = jnp.where(state.asks == SHRINK, shrunk, state.simplex)
        several = (state.asks == FIRST) | (state.asks == SHRINK)
        x = jnp.where(several, whole, self._point(state))
        x = variation.clipped(x, self._walls(state))
        first = jnp.arange(d + 1, dtype=jnp.int32) == 0
        active = jnp.where(several, (state.asks == FIRST) | ~first, first)
        return Population(state.unravel, x, active)

    def _point(self, state: State) -> Array:
        """The point that is asked: (d,). Lagarias et al., (2.4) to (2.7)."""
        expand, contract, _ = _coefficients(state.start.size)
        centroid = state.simplex[:-1].mean(axis=0)
        away = centroid - state.simplex[-1]
        factors = jnp.asarray([0.0, 1.0, expand, contract, -contract, 0.0], away.dtype)
        return centroid + factors[state.asks] * away

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers)).astype(state.values.dtype)
        x = population.genomes
        i = best_place(values)
        better = answered(values[i]) & (values[i] < state.best_value)
        state_after = state._replace(
            best=jnp.where(better, x[i], state.best), best_value=jnp.where(better, values[i], state.best_value)
        )
        values = jnp.where(answered(values), values, jnp.inf)
        several = (state.asks == FIRST) | (state.asks == SHRINK)
        every = jnp.where(state.asks == SHRINK, values.at[0].set(state.values[0]), values)
        new, taken, asks = self._judged(state, values[0])
        simplex = jnp.where(
            several, x.at[0].set(jnp.where(state.asks == SHRINK, state.simplex[0], x[0])), state.simplex
        )
        fits = jnp.where(several, every, state.values)
        # The worst vertex gives way to the point that was taken.
        simplex = jnp.where(several | ~taken, simplex, simplex.at[-1].set(new[0]))
        fits = jnp.where(several | ~taken, fits, fits.at[-1].set(new[1]))
        order = jnp.argsort(fits, stable=True)
        reflected = jnp.where(state.asks == REFLECT, values[0], state.reflected_value)
        after = state_after._replace(
            simplex=simplex[order],
            values=fits[order],
            asks=jnp.where(several | taken, REFLECT, asks).astype(jnp.int32),
            reflected_value=reflected,
        )
        return settle(state, self._restarted(after), values)

    def _judged(self, state: State, value: Array) -> tuple[tuple[Array, Array], Array, Array]:
        """The point and value that take the worst place, whether they do, and else what is asked next."""
        best, second, worst = state.values[0], state.values[-2], state.values[-1]
        walls = self._walls(state)
        x = variation.clipped(self._point(state), walls)
        back = variation.clipped(self._point(state._replace(asks=jnp.asarray(REFLECT, jnp.int32))), walls)
        asks = state.asks
        keeps_reflected = (asks == EXPAND) & ~(value < state.reflected_value)
        taken = jnp.where(
            asks == REFLECT,
            (value >= best) & (value < second),
            jnp.where(asks == EXPAND, True, jnp.where(asks == OUTSIDE, value <= state.reflected_value, value < worst)),
        )
        following = jnp.where(
            asks == REFLECT, jnp.where(value < best, EXPAND, jnp.where(value < worst, OUTSIDE, INSIDE)), SHRINK
        )
        point = jnp.where(keeps_reflected, back, x), jnp.where(keeps_reflected, state.reflected_value, value)
        return point, taken, following

    def _restarted(self, state: State) -> State:
        """The state, or that of a run from somewhere else where this one has ended."""
        f, x = state.values, state.simplex
        eps = jnp.finfo(x.dtype).eps
        asked = state.asks == REFLECT
        spacing = eps * jnp.maximum(jnp.abs(f[0]), jnp.finfo(x.dtype).tiny)
        flat = jnp.isfinite(f[0]) & (f[-1] - f[0] <= FLAT * spacing)
        finest = jnp.asarray(max(NARROW, 10 * float(eps)), x.dtype) * jnp.asarray(self.sigma, x.dtype)
        narrow = jnp.abs(x - x[0]).max() <= finest
        ended = asked & (flat | narrow | ~jnp.isfinite(f[0]))
        begin = variation.drawn(self._walls(state), noises.fold_in(state.key, state.runs), 1, state.start, self.sigma)[
            0
        ]
        fresh = state._replace(
            simplex=self._simplex(begin, state.unravel), values=jnp.full_like(f, jnp.inf),
            asks=jnp.asarray(FIRST, jnp.int32), runs=state.runs + 1,
        )  # fmt: skip
        return trees.where(ended, fresh, state)

    def ended(self, state: State) -> Array:
        """Whether a run has ended: () bool. Another one has begun, if it is let."""
        return state.runs > 0

    def recommend(self, state: State) -> Params:
        return state.unravel(state.best)


def _coefficients(d: int) -> tuple[float, float, float]:
    """Of expansion, contraction and shrinking (Gao and Han, 4.1); those of Nelder and Mead in 2 dimensions."""
    d = max(d, 2)
    return 1 + 2 / d, 0.75 - 1 / (2 * d), 1 - 1 / d


def nelder_mead(sigma: float = 1.0, *, lower: Params = None, upper: Params = None) -> NelderMead:
    """The simplex search of Nelder and Mead with adaptive coefficients (Gao and Han 2012), and restarts.

    A generation has room for d + 1 candidates, the first simplex; most have one. For few numbers, and for values that
    are not smooth or not exact.

    Args:
        sigma: the edges of the first simplex.
        lower, upper: numbers, or trees like the parameters; None for no bounds. Points outside are moved to the wall.
            Other runs start evenly in the box, or normally distributed around the start, by `sigma`.

    Raises:
        ValueError: for bounds of which only one is there, or that are crossed.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2), nelder_mead(), evaluations=100)
    >>> bool(result.best_value < 1e-6)
    True
    """
    return NelderMead(sigma, lower, upper)
