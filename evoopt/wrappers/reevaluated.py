"""Uncertainty handling: some candidates are evaluated again, and what rank changes reveal of the noise is treated.

Source: Hansen, Niederberger, Guzzella and Koumoutsakos, "A method for handling uncertainty in evolutionary
optimization with an application to feedback control of combustion", IEEE Trans. Evol. Comp. 13(1), 2009 (UH-CMA-ES).

The population has one row for each evaluation that there may be: `most` blocks of n candidates, then `most` blocks of
those that are measured. What is not wanted in a generation is not active, and is neither evaluated nor counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.answers import answered, told
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.shaping import rank
from evoopt.strategies.covariance import recombination
from evoopt.types import Array, Key, Params, error, pytree, static
from evoopt.wrappers import step_size
from evoopt.wrappers.repeated import Combine, mean

SHARE = 0.1  # r_lambda, the part of the candidates that is measured; at least two of them
ALPHA_T = 1.5  # growth of the evaluations for each candidate
THETA = 0.2  # rank changes up to this centile of all possible ones, in halves, are no sign of noise


class State(NamedTuple):
    """The inner state, and what is known of the noise."""

    inner: Any
    uncertainty: Array  # (), s: above 0, noise decides ranks
    evaluations: Array  # (), t_eval, of each candidate; the whole part counts
    widest: Array  # (), the step-size at the start, above which noise raises none

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


class Measured(NamedTuple):
    """What rank changes say."""

    uncertainty: Array  # (), the mean over the measured candidates
    order: Array  # (n,) int32, the rank of each candidate by both evaluations, 0 for the best


def limit(place: Array, m: Array, most: int, theta: Any = THETA) -> Array:
    """The theta 50-th centile of |1 - R|, ..., |2 m - 1 - R|: a rank change from R that chance may bring.

    Args:
        place: R, (n,), 1 for the best of the 2 m.
        m: (), candidates.
        most: the largest m.
        theta: from 0 to 2.
    """
    others = jnp.arange(1, 2 * most, dtype=place.dtype)
    count = (2 * m - 1).astype(place.dtype)
    distances = jnp.sort(jnp.where(others <= count, jnp.abs(others - place[:, None]), jnp.inf), axis=1)
    at = jnp.clip(
        jnp.asarray(theta, count.dtype) / 2 * count - 0.5, 0, count - 1
    )  # of centiles, the definition that pycma has
    low = jnp.floor(at).astype(jnp.int32)
    high = jnp.minimum(low + 1, count.astype(jnp.int32) - 1)
    return distances[:, low] + (at - low.astype(at.dtype)) * (distances[:, high] - distances[:, low])


def measure(old: Array, new: Array, theta: Any = THETA) -> Measured:
    """The uncertainty measurement: the paper's algorithm 2.

    Args:
        old: (n,), the values; NaN for candidates that are not there.
        new: (n,), values of new evaluations; NaN for candidates that were not evaluated again.
        theta: see `limit`.
    """
    n, dtype = old.shape[0], old.dtype
    again = answered(new) & answered(old)
    m = answered(old).sum()
    both = jnp.concatenate([old, jnp.where(again, new, old)])
    place = rank(both)
    first, second = place[:n].astype(dtype) + 1, place[n:].astype(dtype) + 1
    change = first - second - jnp.sign(first - second)  # Delta_i
    change = jnp.where(both[:n] == both[n:], 0, change)  # on a plateau, the order of ties is no change
    later, sooner = (first < second).astype(dtype), (first > second).astype(dtype)
    limits = limit(second - later, m, n, theta) + limit(first - sooner, m, n, theta)
    each = 2 * jnp.abs(change) - limits  # a term of s
    uncertainty = jnp.where(again, each, 0).sum() / jnp.maximum(again.sum(), 1).astype(dtype)
    # By the sum of both ranks; ties by the rank change, then by the mean value.
    value = jnp.where(again, (old + both[n:]) / 2, old)
    absent = ~answered(old)
    order = jnp.lexsort((value, jnp.abs(change), jnp.where(absent, jnp.inf, first + second)))
    ranks = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
    return Measured(uncertainty.astype(dtype), ranks)


@pytree
class Reevaluated:
    """A strategy with uncertainty handling; see `reevaluated`."""

    strategy: Any
    most: int = static()
    combine: Combine = static()
    alpha: float | None
    theta: float
    memory: float

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> State:
        inner = self.strategy.init(params, key)
        sigma, dtype = step_size.of(inner), jnp.result_type(float)
        if sigma is None and self.most == 1:
            raise error(
                "a strategy whose state has a sigma, or most above 1",
                f"{type(self.strategy).__name__} with most=1",
                "neither the step-size nor the evaluations of a candidate can grow",
            )
        widest = jnp.zeros((), dtype) if sigma is None else sigma.astype(dtype)
        return State(inner, jnp.zeros((), dtype), jnp.ones((), dtype), widest)

    def ask(self, state: State, key: Key) -> Population:
        population = self.strategy.ask(state.inner, key)
        n = len(population)
        active = population.wanted()
        # r_lambda lambda on average: the fraction is a chance
        wanted = jnp.maximum(SHARE * active.sum().astype(jnp.float32), 2.0)
        chance = jax.random.uniform(noises.fold_in(noises.replayable(key), MEASURE))
        wanted = jnp.floor(wanted) + (chance < wanted - jnp.floor(wanted)).astype(jnp.float32)
        place = jnp.cumsum(active)[: self._measured(n)]  # among the active ones, from 1
        again = active[: self._measured(n)] & (place <= wanted.astype(place.dtype))
        times = jnp.arange(self.most, dtype=jnp.int32)[:, None] < state.evaluations.astype(jnp.int32)
        rows = jnp.concatenate([(times & active).reshape(-1), (times & again).reshape(-1)])
        places = jnp.arange(n, dtype=jnp.int32)
        places = jnp.concatenate([jnp.tile(places, self.most), jnp.tile(places[: self._measured(n)], self.most)])
        return population[places].with_active(rows)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = told(population, answers)
        if isinstance(values, tuple):
            raise error(
                "values", "values and gradients", "a first-order strategy: `repeated` averages its answers", TypeError
            )
        n = self._candidates(len(population))
        values = jnp.where(answered(values) & population.active, values, jnp.nan)
        old = self.combine(values[: n * self.most].reshape(self.most, n))
        new = self.combine(values[n * self.most :].reshape(self.most, -1))
        new = jnp.full(n, jnp.nan, old.dtype).at[: new.shape[0]].set(new)
        seen = measure(old, new, self.theta)
        # The strategy gets the values of this generation in the order of both evaluations.
        ordered = jnp.sort(jnp.where(answered(old), old, jnp.nan))[seen.order]
        inner_population = population[:n]
        inner = self.strategy.tell(state.inner, inner_population, jnp.where(answered(old), ordered, jnp.nan))
        some = answered(new).any() & jnp.isfinite(values).any()
        return self._treated(state._replace(inner=inner), seen.uncertainty, some)

    def recommend(self, state: State) -> Params:
        return self.strategy.recommend(state.inner)

    def _treated(self, state: State, measured: Array, some: Array) -> State:
        """Algorithm 3: more evaluations of each candidate, or, where there are most, a larger step-size."""
        dtype = state.uncertainty.dtype
        s = (1 - self.memory) * state.uncertainty + self.memory * measured.astype(dtype)
        s = jnp.where(some, s, state.uncertainty)
        noisy, full = s > 0, state.evaluations >= self.most
        times = jnp.where(noisy, state.evaluations * ALPHA_T, state.evaluations / ALPHA_T)
        times = jnp.where(some, jnp.clip(times, 1, self.most), state.evaluations)
        alpha = self.alpha
        if alpha is None:
            alpha = 1 + 2 / (recombination.flattened(self.strategy.recommend(state.inner))[0].shape[0] + 10)
        sigma = step_size.of(state.inner)
        room = 1 if sigma is None else jnp.maximum(state.widest / sigma.astype(dtype), 1)
        factor = jnp.where(some & noisy & full, jnp.minimum(jnp.asarray(alpha, dtype), room), 1).astype(dtype)
        return State(step_size.scaled(state.inner, factor), s, times.astype(dtype), state.widest)

    def _measured(self, n: int) -> int:
        """Room for the candidates that are measured, of n."""
        return min(n, max(2, int(SHARE * n) + 1))

    def _candidates(self, rows: int) -> int:
        """The candidates in a population of so many rows."""
        return next(n for n in range(1, rows + 1) if (n + self._measured(n)) * self.most == rows)


MEASURE = 0x6E6F6973  # folded into the generation's key for how many are measured


def reevaluated(
    strategy: Any,
    most: int = 1,
    *,
    combine: Combine = mean,
    alpha: float | None = None,
    theta: float = THETA,
    memory: float = 1.0,
) -> Reevaluated:
    """`strategy` with the uncertainty handling of UH-CMA-ES (Hansen et al. 2009).

    Each generation a tenth of the candidates, and at least two, is evaluated again. If their ranks change more than
    chance would let them, all candidates are evaluated half as often again, up to `most` times, and from there on the
    step-size grows, which raises the signal. If not, evaluations are saved again. `state.uncertainty` is the measure.

    Two deviations from the paper: candidates are evaluated again where they are, not beside it, as a genome may be of
    any kind; and noise never raises the step-size above that at the start, so that it stays finite where all is noise.

    Args:
        strategy: any strategy that reads values; restarts and other wrappers go inside.
        most: evaluations of one candidate, at most; it takes rows for them in the population, 1.1 n `most`.
        combine: of a candidate's evaluations; see `repeated`.
        alpha: growth of the step-size in a noisy generation; None is 1 + 2 / (d + 10).
        theta: rank changes up to the theta 50-th centile of possible ones are accepted.
        memory: weight of the newest measurement, c_s.

    Raises:
        ValueError: for a `most` below 1, or at `init` if neither a step-size nor evaluations can grow.
        TypeError: for something that is not a strategy.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> def noisy(x, key, own):
    ...     return jnp.sum((x - 1.0) ** 2) + 0.1 * jax.random.normal(own)
    >>> keys, renewed = jax.random.split, lambda key, aux: jax.random.split(key, 1)[0]
    >>> options = {"context": jax.random.key(1), "each": keys, "update": renewed, "evaluations": 5000}
    >>> result = minimize(noisy, jnp.zeros(3), reevaluated(cma_es(10), 20), **options)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.2)
    True
    """
    check_strategy(strategy)
    check_popsize(most, 1, name="most")
    return Reevaluated(strategy, most, combine, alpha, theta, memory)
