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
from evoopt import stopping, trees
from evoopt.answers import as_values, best_place, settle, told
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.stopping import Stop, Stops, Watch
from evoopt.strategies.covariance import recombination
from evoopt.types import Array, Key, Params, error, pytree, static
from evoopt.when import when


class State(NamedTuple):
    """Where the restarted search is."""

    search: Any  # the wrapped strategy's state
    popsize: Array  # () int32, active candidates
    watch: Watch  # over this run
    limit: Array  # () int32, generations this run may take
    small: Array  # () bool, a BIPOP run with small popsize
    key: Array  # of everything random about restarts
    start: Params  # the first run's starting point
    total: Array  # () int32, generations of all runs
    evaluations: Array  # () int32, of this run; inactive candidates are none
    evaluations_small: Array  # () int32, of finished small runs
    evaluations_large: Array  # () int32, of finished large runs
    restarts: Array  # () int32
    larger: Array  # () int32, how often the large popsize was increased
    best: Params  # the best candidate of all runs
    best_value: Array  # ()
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
    restarting = True  # nothing but its budget ends it: see `stopping.restarts_itself`
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
        return State(
            search=inner, popsize=count(n), watch=self._begun(params, n), limit=stopping.most_generations(d, count(n)),
            small=jnp.asarray(True), key=key, start=params, total=count(0), evaluations=count(0),
            evaluations_small=count(0), evaluations_large=count(0), restarts=count(0), larger=count(0), best=params,
            best_value=jnp.asarray(jnp.inf, dtype), reason=count(0), reasons=jnp.zeros(len(Stop), jnp.int32),
            unanswered=count(0),
        )  # fmt: skip

    def _begun(self, params: Params, n: int) -> Watch:
        dtype, d = recombination.flattened(params)[0].dtype, trees.size(params)
        return stopping.begun(d, n, jnp.asarray(self.strategy.sigma, dtype), distribution=self._has_width)

    @property
    def _has_width(self) -> bool:
        return hasattr(self.strategy, "dispersion")

    @property
    def stops(self) -> Stops:
        """The tolerances that end a run."""
        return Stops(
            tolx=self.tolx, tolfun=self.tolfun, tolfunhist=self.tolfunhist, tolconditioncov=self.tolconditioncov,
            tolfacupx=self.tolfacupx, tolupsigma=self.tolupsigma,
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
        new, reason = self._observe(state._replace(search=inner), population, values)
        new = when(reason != Stop.NONE, _restarted, _Ended(trees.strong(self), new, reason)).state
        return settle(state, new, values)

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        return lambda state, population, points: moved(state.search, population, points)

    @property
    def running_dispersion(self) -> Any:
        """The width of the running search's distribution; by a `dispersion` the whole search would end."""
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        return lambda state, i: dispersion(state.search, i)

    def recommend(self, state: State) -> Params:
        """The best candidate of all runs; before the first answer, the starting point."""
        return state.best

    def evaluations(self, state: State) -> Array:
        """Evaluations of all runs so far, without those of generations that nobody answered: ()."""
        return state.evaluations + state.evaluations_small + state.evaluations_large

    def _most(self, inner: Any) -> int:
        return len(jax.eval_shape(self.strategy.ask, inner, jax.eval_shape(lambda: jax.random.key(0))))

    def _observe(self, state: State, population: Population, values: Array) -> tuple[State, Array]:
        """The state after a generation, and why the run ends now: `Stop.NONE` if it goes on."""
        d, n, generation = trees.size(state.start), state.popsize, state.watch.generation + 1
        width = self.strategy.dispersion(state.search, generation) if self._has_width else None
        mean = None if width is None else width.mean
        watch = stopping.observe(state.watch, values, mean, d, n, self.stops, total=state.total)
        reason = stopping.first(stopping.met(watch, width, d, n, self.stops))
        reason = jnp.where((reason == Stop.NONE) & (watch.generation >= state.limit), Stop.MAXITER, reason)
        i = best_place(values)
        best = watch.recent_best[0]
        candidate = population.decode(jax.tree.map(lambda g: g[i], population.genomes))
        better = best < state.best_value
        new = state._replace(
            watch=watch,
            total=state.total + 1,
            evaluations=state.evaluations + population.asked(),
            best=trees.where(better, candidate, state.best),
            best_value=jnp.where(better, best, state.best_value),
        )
        return new, reason.astype(jnp.int32)

    def _restart(self, state: State, reason: Array) -> State:
        d, most = trees.size(state.start), self.most or self._most(state.search)
        key_start, key_init, key_size, key_sigma = jax.random.split(noises.fold_in(state.key, state.restarts + 1), 4)
        first = self.popsize or recombination.default_popsize(d)
        done_small = state.evaluations_small + jnp.where(state.small, state.evaluations, 0)
        done_large = state.evaluations_large + jnp.where(state.small, 0, state.evaluations)
        small = jnp.asarray(self.two_regimes) & (done_small < done_large)
        larger = state.larger + jnp.where(small, 0, 1)
        dtype = state.watch.sigma.dtype
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
        zero = jnp.zeros((), jnp.int32)
        fresh = self._begun(state.start, first)._replace(sigma=sigma)
        return state._replace(
            search=trees.strong(inner), popsize=n, watch=fresh, limit=limit, small=small, evaluations=zero,
            evaluations_small=done_small, evaluations_large=done_large, restarts=state.restarts + 1, larger=larger,
            reason=reason, reasons=state.reasons.at[reason].add(1),
        )  # fmt: skip


class _Ended(NamedTuple):
    """A run that has ended, with all that a restart needs: `when` takes a function of one tree."""

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
