"""SHADE, L-SHADE and jSO: JADE with a memory of successes, and a population that shrinks with the budget.

Sources: Tanabe, Fukunaga, "Success-history based parameter adaptation for differential evolution", CEC 2013 (SHADE);
"Improving the search performance of SHADE using linear population size reduction", CEC 2014 (L-SHADE); Brest, Maucec,
Boskovic, "Single objective real-parameter optimization: algorithm jSO", CEC 2017, and its authors' program.

The population is not resized: its rows are sorted, and those from `size` on are inactive. An inactive row repeats the
best vector, and answers to it are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategies.populations.variation import Trial
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class Rules(NamedTuple):
    """The differences between the three. `progress` is the share of the budget used, ()."""

    popsize: Callable[[int], int]  # dimension -> popsize
    best: Callable[[Key, int, Array, Array], Array]  # key, n, size, progress -> how many count as best, (n,)
    limits: Callable[[Array, Array, Array], tuple[Array, Array]]  # F, CR, progress -> F, CR
    pull: Callable[[Array, Array], Array]  # F, progress -> F_w
    mean_rate: Callable[[Array, Array], Array]  # shares, CR -> the mean to remember; negative fixes CR = 0 for good
    remembered: float  # the share of an old memory kept when it is overwritten
    start: tuple[float, float]  # the initial memory of F and CR
    last: float | None  # the fixed value of the last memory, never overwritten
    apart: float  # the share of the budget during which a parent is not its own best


def _plain(weight: Array, rate: Array, progress: Array) -> tuple[Array, Array]:
    del progress
    return weight, rate


def _random_best(key: Key, n: int, size: Array, progress: Array) -> Array:
    del progress  # SHADE, section III.C: p_i from U[2 / N, 0.2]
    low = 2 / size
    p = low + jnp.maximum(0.2 - low, 0) * variation.uniforms(key, (n,), size.dtype)
    return jnp.maximum(jnp.round(p * size), 2)


def _fixed_best(key: Key, n: int, size: Array, progress: Array) -> Array:
    del key, progress  # L-SHADE: p = 0.11
    return jnp.full(n, jnp.maximum(jnp.round(0.11 * size), 2))


def _falling_best(key: Key, n: int, size: Array, progress: Array) -> Array:
    del key  # jSO: p falls from 0.25 to half, here every generation, in its program when the population shrinks
    return jnp.full(n, jnp.maximum(jnp.round(0.25 * (1 - 0.5 * progress) * size), 2))


def _jso_limits(weight: Array, rate: Array, progress: Array) -> tuple[Array, Array]:
    rate = jnp.where(progress < 0.25, jnp.maximum(rate, 0.7), rate)
    rate = jnp.where(progress < 0.5, jnp.maximum(rate, 0.6), rate)
    return jnp.where(progress < 0.6, jnp.minimum(weight, 0.7), weight), rate


def _jso_pull(weight: Array, progress: Array) -> Array:
    return weight * jnp.where(progress < 0.2, 0.7, jnp.where(progress < 0.4, 0.8, 1.2)).astype(weight.dtype)


def _arithmetic(shares: Array, rates: Array) -> Array:
    return jnp.sum(shares * rates)  # SHADE: mean_WA


def _lehmer_or_zero(shares: Array, rates: Array) -> Array:
    # L-SHADE, algorithm 1: if every success had CR = 0, the memory is closed for good, here by a negative number.
    # (Its program loses this, because it clears the memory before checking.)
    closed = jnp.max(jnp.where(shares > 0, rates, 0)) == 0
    return jnp.where(closed, -1, variation.lehmer(shares, rates))


SHADE_RULES = Rules(
    lambda d: 100, _random_best, _plain, lambda weight, progress: weight, _arithmetic, 0.0, (0.5, 0.5), None, 0.0
)
LSHADE_RULES = Rules(
    lambda d: 18 * d, _fixed_best, _plain, lambda weight, progress: weight, _lehmer_or_zero, 0.0, (0.5, 0.5), None, 0.0
)
JSO_RULES = Rules(
    lambda d: round(25 * math.log(d) * math.sqrt(d)),
    _falling_best,
    _jso_limits,
    _jso_pull,
    _lehmer_or_zero,
    0.5,
    (0.3, 0.8),
    0.9,
    0.5,
)


class State(NamedTuple):
    """The state of the search."""

    x: Array  # (n, d), the parents, best first; from `size` on they are inactive
    values: Array  # (n,), of the parents; +inf until they are answered
    archive: Array  # (a, d), beaten parents, the first `count` in use
    count: Array  # () int32
    weights: Array  # (h,), M_F
    rates: Array  # (h,), M_CR; negative where closed
    cursor: Array  # () int32, the memory to overwrite next
    evaluations: Array  # () int32, evaluations of active rows
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class SHADE:
    """Success-history based adaptive differential evolution; see `shade`, `l_shade`, `jso`."""

    popsize: int | None = static()
    budget: float | None  # evaluations over which the population shrinks; None if it does not
    memory: int = static()  # H
    archive: float = static()  # capacity of the archive, in populations
    least: int = static()  # N_min
    rules: Rules = static()
    spread: float
    lower: Any
    upper: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.least, 4, name="least")
        check_popsize(self.memory, 1, name="memory")
        if self.popsize is not None:
            check_popsize(self.popsize, self.least)
        if isinstance(self.budget, (int, float)) and self.budget < 1:
            raise error("a budget of at least 1 evaluation", str(self.budget), "a budget computed by subtraction")

    def init(self, params: Params, key: Key) -> State:
        n = self.popsize or max(self.rules.popsize(trees.size(params)), self.least)
        x, unravel = variation.scattered(params, key, n, self.spread, self.lower, self.upper)
        zero, real = jnp.zeros((), jnp.int32), jnp.result_type(float)
        archive = jnp.zeros((max(1, round(self.archive * n)), x.shape[1]), x.dtype)
        weights, rates = (jnp.full(self.memory, m, real) for m in self.rules.start)
        return State(x, variation.unknown(n), archive, zero, weights, rates, zero, zero, zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        keys = jax.random.split(noises.replayable(key), 8)
        x, (n, d), real, rules = state.x, state.x.shape, state.rates.dtype, self.rules
        size, progress = self._size(state), self._progress(state)
        i = jnp.arange(n, dtype=jnp.int32)
        r = variation.integers(keys[0], (n,), self.memory)
        mean_weight, mean_rate = state.weights[r], state.rates[r]
        if rules.last is not None:
            last = r == self.memory - 1
            mean_weight, mean_rate = jnp.where(last, rules.last, mean_weight), jnp.where(last, rules.last, mean_rate)
        rate = jnp.clip(mean_rate + 0.1 * variation.gaussians(keys[1], (n,), real), 0, 1)  # CR_i = randn(M_CR, 0.1)
        rate = jnp.where(mean_rate < 0, 0, rate)
        weight = variation.cauchy(keys[2], mean_weight)  # F_i = randc(M_F, 0.1)
        weight, rate = rules.limits(weight, rate, progress)
        best = rules.best(keys[3], n, size.astype(real), progress).astype(jnp.int32)
        own = (i < best) & (progress < rules.apart)
        pbest = variation.integers(keys[4], (n,), best - own.astype(jnp.int32))  # rows are best first
        pbest = pbest + (own & (pbest >= i)).astype(jnp.int32)
        mutant = variation.current_to_pbest(
            keys[5], x, size, state.archive, state.count, pbest, weight, rules.pull(weight, progress)
        )
        trial = jnp.where(variation.binomial(keys[6], rate, d), mutant, x)
        trial = variation.midpoint(trial, x, variation.box(self.lower, self.upper, state.unravel))
        trial = jnp.where(state.generation == 0, x, trial)  # the first generation evaluates the parents themselves
        trial = jnp.where((i < size)[:, None], trial, x[0])
        slot = variation.integers(keys[7], (n,), self._capacity(state, size))
        active = None if self.budget is None else i < size
        return Population(variation.decoding(state.unravel), Trial(trial, weight, rate, slot), active)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        genome, size, n = population.genomes, self._size(state), state.x.shape[0]
        values = jnp.where(jnp.arange(n, dtype=jnp.int32) < size, values, jnp.nan)  # inactive rows were not asked
        new = values.astype(state.values.dtype)
        won = answered(new) & (new <= state.values)
        better = answered(new) & (new < state.values) & (state.generation > 0)
        capacity = self._capacity(state, size)
        archive, count = variation.archived(state.archive, state.count, capacity, state.x, better, genome.slot)

        shares = variation.gains(state.values, new, better).astype(genome.rate.dtype)  # w_k
        old_weight, old_rate = state.weights[state.cursor], state.rates[state.cursor]
        keep = self.rules.remembered
        weight = keep * old_weight + (1 - keep) * variation.lehmer(shares, genome.weight)
        rate = keep * old_rate + (1 - keep) * self.rules.mean_rate(shares, genome.rate)
        rate = jnp.where(old_rate < 0, old_rate, rate)
        learned = better.any()
        at = lambda memory, new: memory.at[state.cursor].set(jnp.where(learned, new, memory[state.cursor]))
        cursor = jnp.where(learned, (state.cursor + 1) % self.memory, state.cursor)

        x = jnp.where(won[:, None], genome.x, state.x)
        kept = jnp.where(won, new, state.values)
        order = jnp.argsort(
            jnp.where(jnp.arange(n, dtype=jnp.int32) < size, kept, jnp.inf)
        )  # stable: inactive rows stay behind
        told_state = State(
            x[order],
            kept[order],
            archive,
            count,
            at(state.weights, weight),
            at(state.rates, rate),
            cursor,
            state.evaluations + size,
            state.generation + 1,
            state.unravel,
            state.unanswered,
        )
        shrunk = self._capacity(told_state, self._size(told_state))
        return settle(state, told_state._replace(count=jnp.minimum(count, shrunk)), values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        # F and CR did not make the points: a success repeats what the memory has.
        n = len(population)
        weight, rate = (jnp.full(n, m[state.cursor]) for m in (state.weights, jnp.maximum(state.rates, 0)))
        return variation.moved(
            population, points, variation.box(self.lower, self.upper, state.unravel), weight=weight, rate=rate
        )

    def recommend(self, state: State) -> Params:
        return state.unravel(state.x[0])

    def _progress(self, state: State) -> Array:
        used = state.evaluations.astype(state.rates.dtype)
        if self.budget is None:
            return jnp.zeros_like(used)
        return jnp.minimum(used / jnp.asarray(self.budget, used.dtype), 1)

    def _size(self, state: State) -> Array:
        n, real = state.x.shape[0], state.rates.dtype
        if self.budget is None:
            return jnp.asarray(n, jnp.int32)
        shrunk = jnp.round((self.least - n) * self._progress(state) + jnp.asarray(n, real))  # L-SHADE, equation (10)
        return shrunk.astype(jnp.int32)

    def _capacity(self, state: State, size: Array) -> Array:
        exact = jnp.round(self.archive * size.astype(state.rates.dtype)).astype(jnp.int32)
        return jnp.clip(exact, 1, state.archive.shape[0])


def shade(popsize: int = 100, *, memory: int = 100, spread: float = 1.0, lower: Any = None, upper: Any = None) -> SHADE:
    """SHADE (Tanabe and Fukunaga 2013): a population of fixed size, with F and CR drawn around a memory of successes.

    Args:
        popsize: candidates per generation, at least 4.
        memory: H, how many pairs of means are remembered; the popsize in the paper.
        spread: standard deviation of the first population around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first population is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), shade(30), generations=150)
    >>> result.best_value < 1e-6
    True
    """
    return SHADE(popsize, None, memory, 1.0, 4, SHADE_RULES, spread, lower, upper)


def l_shade(
    popsize: int | None = None,
    *,
    budget: float,
    memory: int = 6,
    archive: float = 2.6,
    least: int = 4,
    spread: float = 1.0,
    lower: Any = None,
    upper: Any = None,
) -> SHADE:
    """L-SHADE (Tanabe and Fukunaga 2014): SHADE whose population shrinks linearly with the evaluations used.

    Args:
        popsize: candidates of the first generation; 18 times the dimension by default.
        budget: evaluations after which `least` candidates are left.
        memory: H, how many pairs of means are remembered.
        archive: the archive's capacity, in populations.
        least: the smallest population, at least 4.
        spread: standard deviation of the first population around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first population is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> strategy = l_shade(budget=4000)
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), strategy, generations=200)
    >>> result.best_value < 1e-8
    True
    """
    return SHADE(popsize, budget, memory, archive, least, LSHADE_RULES, spread, lower, upper)


def jso(
    popsize: int | None = None, *, budget: float, spread: float = 1.0, lower: Any = None, upper: Any = None
) -> SHADE:
    """The jSO algorithm (Brest, Maucec, Boskovic 2017): L-SHADE with limits on F and CR and a growing pull.

    Args:
        popsize: candidates of the first generation; 25 ln(d) sqrt(d) by default.
        budget: evaluations after which 4 candidates are left.
        spread: standard deviation of the first population around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first population is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> strategy = jso(budget=4000)
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), strategy, generations=200)
    >>> result.best_value < 1e-8
    True
    """
    return SHADE(popsize, budget, 5, 1.0, 4, JSO_RULES, spread, lower, upper)
