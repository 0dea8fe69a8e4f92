"""Restarts: a search that has ended starts again with another number of candidates. IPOP and BIPOP.

Sources: Auger and Hansen, "A restart CMA evolution strategy with increasing population size", CEC 2005 (IPOP); Hansen,
"Benchmarking a BI-population CMA-ES on the BBOB-2009 function testbed", GECCO 2009 (BIPOP). `stopping` decides when
a run ends.

Nothing is resized. The popsize of the wrapped strategy is the largest possible one, and `popsize` of the state says how
many candidates are active. The others are rows without an answer (NaN): every strategy leaves them out of its update,
and `Population.map` does not evaluate them (in whole micro-batches). Any strategy with a field `sigma` can be wrapped.
One with `dispersion` also stops because of its distribution, any other because of values alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, best_place, settle, told
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.strategies.covariance import recombination
from evoopt.strategies.covariance.recombination import Dispersion
from evoopt.types import Array, Key, Params, error, pytree, static
from evoopt.wrappers import stopping
from evoopt.wrappers.stopping import Stop


class State(NamedTuple):
    """Where the restarted search is. Histories have the newest entry first."""

    search: Any  # the wrapped strategy's state
    popsize: Array  # () int32, active candidates
    sigma: Array  # (), what this run started from
    limit: Array  # () int32, generations this run may take
    small: Array  # () bool, a BIPOP run with small popsize
    key: Array  # of everything random about restarts
    start: Params  # the first run's starting point
    generation: Array  # () int32, of this run
    total: Array  # () int32, generations of all runs
    evaluations: Array  # () int32, of this run; inactive candidates are none
    evaluations_small: Array  # () int32, of finished small runs
    evaluations_large: Array  # () int32, of finished large runs
    restarts: Array  # () int32
    larger: Array  # () int32, how often the large popsize was increased
    best: Params  # the best candidate of all runs
    best_value: Array  # ()
    run_best: Array  # (), of this run
    run_best_at: Array  # () int32, the generation that found it
    recent_best: Array  # (h,), best of the last generations
    long_best: Array  # (k,), best of every fifth generation
    long_median: Array  # (k,), median of every fifth generation
    entries: Array  # () int32, how many of those there have been
    stagnated: Array  # () bool, at the last of them the newer half of a long window was no better than the older
    flat: Array  # () int32, generations in a row with flat values
    anchor: Array  # (d,), a mean the search has stayed close to
    anchored: Array  # () int32, the generation of the anchor
    reason: Array  # () int32, the `Stop` of the last finished run
    reasons: Array  # (len(Stop),) int32, how many runs ended for each
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class Restarts:
    """Restarts of `strategy`; see `ipop` and `bipop`."""

    strategy: Any
    popsize: int | None = static()
    two_regimes: bool = static()
    factor: float
    tolx: float
    tolfun: float
    tolfunhist: float
    tolconditioncov: float
    tolfacupx: float
    tolupsigma: float
    start: Callable[[Key], Params] | None = static()
    most: int | None = static(default=None)  # active candidates a run may grow to; None: the wrapped popsize

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    def init(self, params: Params, key: Key) -> State:
        key = noises.replayable(key)
        params = trees.searchable(params)
        inner = trees.strong(self.strategy.init(params, noises.fold_in(key, 0)))
        d, most = trees.size(params), self._most(inner)
        n = self.popsize or recombination.default_popsize(d)
        if n > most:
            raise error(
                f"a wrapped strategy with a popsize of at least {n}, the active candidates of the first run",
                f"popsize {most}",
                "the wrapped strategy's popsize is the most candidates there can be: make it 2^k times the first",
            )
        dtype = recombination.flattened(params)[0].dtype
        count = lambda x: jnp.asarray(x, jnp.int32)
        inf, k = jnp.asarray(jnp.inf, dtype), min(4096, max(200, 2 * (int(100 + 100 * d**1.5 / n) // 10)))
        return State(
            search=inner, popsize=count(n), sigma=jnp.asarray(self.strategy.sigma, dtype),
            limit=stopping.most_generations(d, count(n)), small=jnp.asarray(True), key=key, start=params,
            generation=count(0), total=count(0), evaluations=count(0), evaluations_small=count(0),
            evaluations_large=count(0), restarts=count(0), larger=count(0), best=params, best_value=inf, run_best=inf,
            run_best_at=count(0), recent_best=jnp.full(int(10 + 30 * d / n), jnp.nan, dtype),
            long_best=jnp.full(k, jnp.nan, dtype), long_median=jnp.full(k, jnp.nan, dtype), entries=count(0),
            stagnated=jnp.asarray(False), flat=count(0),
            anchor=jnp.full(d, jnp.inf, dtype), anchored=count(0), reason=count(0),
            reasons=jnp.zeros(len(Stop), jnp.int32), unanswered=count(0),
        )  # fmt: skip

    def ask(self, state: State, key: Key) -> Population:
        population = self.strategy.ask(state.search, key)
        return population.with_active(_active(population, state.popsize))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        answers = told(population, answers)
        active = _active(population, state.popsize)
        population = population.with_active(active)
        answers = jax.tree.map(lambda a: _masked(a, active), answers)
        values = as_values(answers)
        inner = self.strategy.tell(state.search, population, answers)
        new, shape = self._observe(state._replace(search=inner), population, values)
        reason = self._reason(new, shape)
        new = recombination.when(reason != Stop.NONE, _restarted, _Ended(trees.strong(self), new, reason)).state
        return settle(state, new, values)

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        return lambda state, population, points: moved(state.search, population, points)

    def recommend(self, state: State) -> Params:
        """The best candidate of all runs; before the first answer, the starting point."""
        return state.best

    def evaluations(self, state: State) -> Array:
        """Evaluations of all runs so far, without those of generations that nobody answered: ()."""
        return state.evaluations + state.evaluations_small + state.evaluations_large

    def _most(self, inner: Any) -> int:
        return len(jax.eval_shape(self.strategy.ask, inner, jax.eval_shape(lambda: jax.random.key(0))))

    def _observe(self, state: State, population: Population, values: Array) -> tuple[State, Any]:
        dtype = state.best_value.dtype
        ordered = jnp.sort(jnp.where(answered(values), values, jnp.nan)).astype(dtype)  # no answer comes last
        m = jnp.maximum(answered(values).sum(), 1).astype(jnp.int32)
        best, worst = ordered[0], ordered[m - 1]
        median = (ordered[(m - 1) // 2] + ordered[m // 2]) / 2
        shape = stopping.Extremes(best, worst, m)
        generation, total = state.generation + 1, state.total + 1
        i = best_place(values)
        candidate = population.decode(jax.tree.map(lambda g: g[i], population.genomes))
        better, run_better = best < state.best_value, best < state.run_best
        push = lambda history, x: jnp.concatenate([x[None], history[:-1]])
        flat = best == ordered[jnp.minimum(3 * m // 4, m - 1)]
        anchor, anchored = state.anchor, state.anchored
        if hasattr(self.strategy, "dispersion"):
            mean = self.strategy.dispersion(state.search, generation).mean
            # the allowance grows with the root of the time that the mean stayed
            stay = (generation - anchored).astype(dtype) / (20 + 0.1 * generation.astype(dtype))
            patience = jnp.sqrt(jnp.maximum(1, stay))
            left = ~(jnp.sqrt(((mean.astype(dtype) - anchor) ** 2).sum()) <= stopping.TOLXSTAGNATION * patience)
            anchor, anchored = jnp.where(left, mean.astype(dtype), anchor), jnp.where(left, generation, anchored)
        due = total % stopping.EVERY == 0  # of all runs together, so that runs under vmap agree
        history = stopping.History(state.long_best, state.long_median, state.entries)
        history = recombination.when(due, stopping.remember, stopping.Entry(best, median, history)).history
        run_best_at = jnp.where(run_better, generation, state.run_best_at)
        # The medians are expensive, and needed only where the best is old.
        d, period = trees.size(state.start), stopping.tolstagnation(trees.size(state.start), state.popsize)
        old_enough = (generation > 5 * d + 100 * d // state.popsize) & (generation - run_best_at > period // 2)
        window = stopping.Window(period, history, jnp.asarray(False))
        stagnated = recombination.when(due & old_enough, stopping.compare, window).stagnated
        return state._replace(
            anchor=anchor,
            anchored=anchored,
            generation=generation,
            total=total,
            evaluations=state.evaluations + population.asked(),
            best=trees.where(better, candidate, state.best),
            best_value=jnp.where(better, best, state.best_value),
            run_best=jnp.where(run_better, best, state.run_best),
            run_best_at=run_best_at,
            recent_best=push(state.recent_best, best),
            long_best=history.best,
            long_median=history.median,
            entries=history.entries,
            stagnated=jnp.where(due, stagnated, state.stagnated & old_enough),
            flat=jnp.where(flat, state.flat + 1, 0),
        ), shape

    def _reason(self, state: State, shape: Any) -> Array:
        """Why this run ends now, NONE if it goes on; updates nothing."""
        d, n, dtype = trees.size(state.start), state.popsize, state.sigma.dtype
        window = jnp.minimum(state.generation, 10 + 30 * d // n)
        recent = jnp.arange(state.recent_best.shape[0], dtype=jnp.int32) < window
        h = state.recent_best
        spread = jnp.max(h, where=recent, initial=-jnp.inf) - jnp.min(h, where=recent, initial=jnp.inf)
        stops = {
            Stop.TOLFUN: (shape.worst - shape.best < self.tolfun) & (spread < self.tolfun),
            Stop.TOLFUNHIST: (window > 9) & (spread < self.tolfunhist),
            Stop.TOLSTAGNATION: state.stagnated,
            Stop.TOLFLATFITNESS: state.flat > 1,
            Stop.MAXITER: state.generation >= state.limit,
        }
        if hasattr(self.strategy, "dispersion"):
            s: Dispersion = self.strategy.dispersion(state.search, state.generation)
            s = Dispersion(*(x.astype(dtype) for x in s))
            mean = s.mean
            stops |= {
                Stop.TOLFACUPX: (s.std > state.sigma * self.tolfacupx).any(),
                Stop.TOLX: (s.std < self.tolx).all() & (s.path < self.tolx).all(),
                Stop.TOLXSTAGNATION: state.generation - state.anchored > 20 + state.generation // 10,
                Stop.TOLUPSIGMA: s.sigma / s.longest > state.sigma * self.tolupsigma,
                Stop.NOEFFECTCOORD: (mean == mean + 0.2 * s.std).any(),
                Stop.NOEFFECTAXIS: (mean == mean + 0.1 * s.axis).all(),
                Stop.TOLCONDITIONCOV: s.longest > jnp.sqrt(self.tolconditioncov) * s.shortest,
            }
        met = jnp.stack([jnp.asarray(stops.get(stop, False)) for stop in Stop])
        return jnp.where(met.any(), jnp.argmax(met), Stop.NONE).astype(jnp.int32)

    def _restart(self, state: State, reason: Array) -> State:
        d, most = trees.size(state.start), self.most or self._most(state.search)
        key_start, key_init, key_size, key_sigma = jax.random.split(noises.fold_in(state.key, state.restarts + 1), 4)
        first = self.popsize or recombination.default_popsize(d)
        done_small = state.evaluations_small + jnp.where(state.small, state.evaluations, 0)
        done_large = state.evaluations_large + jnp.where(state.small, 0, state.evaluations)
        small = jnp.asarray(self.two_regimes) & (done_small < done_large)
        larger = state.larger + jnp.where(small, 0, 1)
        dtype = state.sigma.dtype
        growth = jnp.asarray(self.factor, dtype) ** larger.astype(dtype)
        # BIPOP: popsize first * growth^(U^2), sigma 10^(-2 U), half the budget of the large runs
        power = jnp.where(small, jax.random.uniform(key_size, dtype=dtype) ** 2, 1)
        n = jnp.clip((first * growth**power + 1e-6).astype(jnp.int32), first, most)
        shrink = jnp.where(small, 0.01 ** jax.random.uniform(key_sigma, dtype=dtype), 1)
        limit = stopping.most_generations(d, n)
        limit = jnp.where(small, jnp.minimum(limit, done_large // (2 * n)), limit)
        sigma = jnp.asarray(self.strategy.sigma, dtype) * shrink
        params = self.start(key_start) if self.start else state.start
        inner = dataclasses.replace(self.strategy, sigma=sigma).init(params, key_init)
        blank = lambda x: jnp.full_like(x, jnp.nan)
        zero = jnp.zeros((), jnp.int32)
        return state._replace(
            search=trees.strong(inner), popsize=n, sigma=sigma, limit=limit, small=small, generation=zero,
            evaluations=zero, evaluations_small=done_small, evaluations_large=done_large, restarts=state.restarts + 1,
            larger=larger, run_best=jnp.full_like(state.run_best, jnp.inf), run_best_at=zero,
            recent_best=blank(state.recent_best), long_best=blank(state.long_best),
            long_median=blank(state.long_median), entries=zero, stagnated=jnp.zeros((), bool), flat=zero,
            anchor=jnp.full_like(state.anchor, jnp.inf), anchored=zero, reason=reason,
            reasons=state.reasons.at[reason].add(1),
        )  # fmt: skip


class _Ended(NamedTuple):
    """A run that has ended, with all that a restart needs: `recombination.when` takes a function of one tree."""

    restarts: Restarts
    state: State
    reason: Array


def _restarted(ended: _Ended) -> _Ended:
    return ended._replace(state=ended.restarts._restart(ended.state, ended.reason))


def _masked(a: Array, active: Array) -> Array:
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return a
    return jnp.where(active.reshape(-1, *(1,) * (a.ndim - 1)), a, jnp.nan)


def _active(population: Population, popsize: Array) -> Array:
    """The first `popsize` candidates, of those that the wrapped strategy wants evaluated."""
    first = jnp.arange(len(population), dtype=jnp.int32) < popsize
    return first if population.active is None else first & population.active


def ipop(
    strategy: Any,
    popsize: int | None = None,
    *,
    factor: float = 2.0,
    start: Callable[[Key], Params] | None = None,
    tolx: float = 1e-11,
    tolfun: float = 1e-11,
    tolfunhist: float = 1e-12,
    tolconditioncov: float = 1e14,
    tolfacupx: float = 1e3,
    tolupsigma: float = 1e20,
) -> Restarts:
    """Restarts with `factor` times as many candidates each (Auger and Hansen 2005).

    Args:
        strategy: the strategy to restart, with a field `sigma`. Its popsize is the largest that a run may have.
        popsize: active candidates of the first run; None is 4 + floor(3 ln d).
        factor: growth of the popsize with each restart.
        start: key -> the starting point of a run; None starts every run where the first one started.
        tolx, tolfun, tolfunhist, tolconditioncov, tolfacupx, tolupsigma: see `stopping.Stop`. They are absolute, in
            units of the parameters or of the values.

    Raises:
        ValueError: the first run needs more candidates than the wrapped strategy has.

    In the state, `reasons` counts how often each `Stop` ended a run; `evaluations(state)` counts evaluations.

    >>> import jax, jax.numpy as jnp
    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> strategy = ipop(cma_es(32, sigma=0.5), 8, start=lambda key: jax.random.uniform(key, (3,), minval=-4, maxval=4))
    >>> rastrigin = lambda x: jnp.sum((x - 1) ** 2 + 20 * jnp.sin(jnp.pi * (x - 1)) ** 2)
    >>> result = minimize(rastrigin, jnp.full(3, 4.0), strategy, generations=2000, target=1e-3)
    >>> result.reason, int(result.state.restarts) > 0
    ('target', True)
    """
    return _build(
        strategy, popsize, False, factor, start, tolx, tolfun, tolfunhist, tolconditioncov, tolfacupx, tolupsigma
    )


def bipop(
    strategy: Any,
    popsize: int | None = None,
    *,
    factor: float = 2.0,
    start: Callable[[Key], Params] | None = None,
    tolx: float = 1e-11,
    tolfun: float = 1e-11,
    tolfunhist: float = 1e-12,
    tolconditioncov: float = 1e14,
    tolfacupx: float = 1e3,
    tolupsigma: float = 1e20,
) -> Restarts:
    """Restarts in two regimes that share the evaluations: growing popsizes, and small popsizes with small sigmas.

    Hansen 2009. Arguments, errors and the state are those of `ipop`.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), bipop(cma_es(32), 8), generations=300)
    >>> bool(result.best_value < 1e-10), Stop(int(result.state.reason)) is not Stop.NONE
    (True, True)
    """
    return _build(
        strategy, popsize, True, factor, start, tolx, tolfun, tolfunhist, tolconditioncov, tolfacupx, tolupsigma
    )


def _build(
    strategy: Any, popsize: int | None, two_regimes: bool, factor: float, start: Any, *tolerances: float
) -> Restarts:
    check_strategy(strategy)
    if popsize is not None:
        check_popsize(popsize, 2)
    if not hasattr(strategy, "sigma"):
        raise error(
            "a strategy with a field sigma, which every restart sets",
            type(strategy).__name__,
            "a wrapper around the strategy: put the restarts inside it",
            TypeError,
        )
    if isinstance(factor, (int, float)) and factor < 1:
        raise error("factor >= 1", str(factor), "its inverse was meant")
    return Restarts(strategy, popsize, two_regimes, factor, *tolerances, start=start)  # type: ignore[call-arg]
