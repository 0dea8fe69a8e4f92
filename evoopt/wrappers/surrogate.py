"""Surrogate-assisted search: a model ranks a population of which few candidates are evaluated. lq-CMA-ES.

Source: Hansen, "A global surrogate assisted CMA-ES", GECCO 2019: algorithm 1 and table 1, with the constants of pycma
4.5 (`fitness_models`) where they differ. A linear or quadratic model of all recent points orders a population; the best
of the model are evaluated, and the model is fitted anew, until it orders the last points as the objective does
(Kendall's tau). Then the strategy is told the model's values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.answers import answered, best_place, settle, told
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.shaping import rank
from evoopt.types import Array, Key, Params, error, pytree, static
from evoopt.when import when
from evoopt.wrappers import quadratic
from evoopt.wrappers.quadratic import Quadratic

TAU = 0.85  # the least agreement of model and objective
RECENT = 15  # points over which they must agree, at least
KEPT = 2  # points that are kept, in units of the full model's terms
TRUNCATED = 0.75  # of the points, the best, enter the model
ENOUGH = 1.1  # points that a kind of model needs, in units of its terms
LEAST = 4  # points that a model is fitted to at once
HEAVIEST = 20  # weight of the best point in the regression, where the worst has 1


class Archive(NamedTuple):
    """Points and their values: the newest population first, and of a population the best first."""

    x: Array  # (m, d)
    values: Array  # (m,), inf where there is none
    population: Array  # (m,) int32, the number of the population; -1 where there is none


class State(NamedTuple):
    """The inner state, the population that is being evaluated, and what is known of the objective."""

    search: Any  # the wrapped strategy's state
    genomes: Any  # of the population in work
    values: Array  # (n,), its answers so far, NaN elsewhere
    done: Array  # (n,) bool, asked so far
    archive: Archive
    model: Quadratic
    optimum: Array  # (d,), of the model
    populations: Array  # () int32, told to the strategy
    popsize: Array  # () int32, the most candidates of a population so far
    evaluations: Array  # () int32
    best: Params  # the best candidate that was evaluated
    best_value: Array  # ()
    unanswered: Array  # () int32, batches without a finite answer
    settled: Array  # () int32, of them those before the last answer


def kendall(a: Array, b: Array, some: Array) -> Array:
    """Kendall's tau-b of a and b (n,) where `some` is True: (); 0 where either is constant.

    >>> ones = jnp.ones(4, bool)
    >>> round(float(kendall(jnp.arange(4.0), jnp.array([0.0, 2.0, 1.0, 3.0]), ones)), 3)
    0.667
    """
    rises, falls = (op(b[:, None], b) for op in (jnp.less, jnp.greater))
    up = (a[:, None] < a) & (some[:, None] & some)
    rise_b = rises & (some[:, None] & some)
    agree = (up & rises).sum() - (up & falls).sum()
    norm = jnp.sqrt(up.sum().astype(a.dtype)) * jnp.sqrt(rise_b.sum().astype(a.dtype))
    return jnp.where(norm > 0, agree.astype(a.dtype) / jnp.where(norm > 0, norm, 1), 0)


def agreement(model: Quadratic, archive: Archive, recent: Array, most: int) -> Array:
    """Kendall's tau of model and objective over the `recent` first points of the archive: (); 0 for fewer than 3.

    At most `most` are looked at.
    """
    x, y, population = jax.tree.map(lambda a: a[:most], archive)
    some = (population >= 0) & (jnp.arange(y.shape[0], dtype=jnp.int32) < recent)
    tau = kendall(y, model(x).astype(y.dtype), some)
    return jnp.where(some.sum() > 2, tau, 0)


def modelled(archive: Archive) -> tuple[Quadratic, Array]:
    """The model of the archive, and where its optimum is."""
    x, y, population = archive
    count = (population >= 0).sum().astype(x.dtype)
    terms = jnp.asarray(quadratic.terms(x.shape[1]), x.dtype)
    kind = (TRUNCATED * count >= ENOUGH * terms[1:]).sum().astype(jnp.int32)
    # The worst are left out where there are enough; weights fall linearly with the rank.
    used = jnp.minimum(count, jnp.floor(jnp.maximum(terms[kind] + 2, TRUNCATED * (count + 1))))
    place = rank(jnp.where(population >= 0, y, jnp.nan)).astype(x.dtype)
    weights = HEAVIEST - (HEAVIEST - 1) * place / jnp.maximum(used - 1, 1)
    model = quadratic.fit(x, y, jnp.where(place < used, weights, 0).astype(x.dtype), kind)
    return model, quadratic.optimum(model, x[0])


def grown(archive: Archive, x: Array, y: Array, number: Array, limit: Array) -> Archive:
    """The archive with the points x (n, d) whose y (n,) is finite, of the newest population, and at most `limit`."""
    ok, m = jnp.isfinite(y), archive.values.shape[0]
    population = jnp.concatenate([jnp.where(ok, number, -1).astype(jnp.int32), archive.population])
    y = jnp.concatenate([jnp.where(ok, y, jnp.inf).astype(archive.values.dtype), archive.values])
    order = jnp.lexsort((y, -population))[:m]
    kept = (population[order] >= 0) & (jnp.arange(m, dtype=jnp.int32) < limit)
    x = jnp.concatenate([x, archive.x])[order]
    return Archive(
        jnp.where(kept[:, None], x, 0), jnp.where(kept, y[order], jnp.inf), jnp.where(kept, population[order], -1)
    )  # fmt: skip


def cleared(archive: Archive) -> Archive:
    """The archive without points."""
    return Archive(
        jnp.zeros_like(archive.x), jnp.full_like(archive.values, jnp.inf), jnp.full_like(archive.population, -1)
    )


def estimates(y: Array, values: Array, done: Array) -> Array:
    """Values to tell a strategy, (n,): the model's y, moved so that the least is the least true one.

    Args:
        y: (n,) of the model; NaN for candidates that are not wanted.
        values: (n,) of the objective, of which one is finite; NaN where it did not answer.
        done: (n,) bool, which candidates it was asked about.
    """
    y = jnp.where(done & ~jnp.isfinite(values), jnp.nan, y)
    least = jnp.min(values, where=jnp.isfinite(values), initial=jnp.inf)
    lowest = jnp.min(y, where=jnp.isfinite(y), initial=jnp.inf)
    return jnp.where(jnp.isposinf(values), values, (y - lowest).astype(values.dtype) + least)


@pytree
class Surrogate:
    """A strategy whose candidates a model ranks; see `surrogate`."""

    strategy: Any
    parallel: int = static()

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    def init(self, params: Params, key: Key) -> State:
        params = trees.searchable(params)
        search = trees.strong(self.strategy.init(params, key))
        population = self.strategy.ask(search, key)
        x, n = trees.flatten(params), len(population)
        d, real, zero = x.shape[0], jnp.result_type(float), jnp.zeros((), jnp.int32)
        m = max(KEPT * quadratic.terms(d)[quadratic.FULL], n)
        archive = Archive(jnp.zeros((m, d), x.dtype), jnp.full(m, jnp.inf, real), jnp.full(m, -1, jnp.int32))
        return State(
            search, trees.strong(population.genomes), jnp.full(n, jnp.nan, real), jnp.zeros(n, bool), archive,
            quadratic.empty(d, x.dtype), x, zero, zero, zero, params, jnp.asarray(jnp.inf, real), zero, zero,
        )  # fmt: skip

    def ask(self, state: State, key: Key) -> Population:
        population = self.strategy.ask(state.search, key)
        wanted = population.wanted()
        fresh, state = self._begun(state, wanted)
        population = self._injected(state, population)
        population = population.with_genomes(trees.where(fresh, population.genomes, state.genomes))
        return population.with_active(self._batch(state, _points(population), wanted)[2])

    def tell(self, state: State, population: Population, answers: Any) -> State:
        answers = told(population, answers)
        if isinstance(answers, tuple):
            raise error("values", "values and gradients", "a first-order strategy, which needs no model", TypeError)
        # Who is wanted depends on the state alone, and `active` says who was asked.
        wanted = self.strategy.ask(state.search, jax.random.key(0, impl="threefry2x32")).wanted()
        old, (_, state) = state, self._begun(state, wanted)
        x = _points(population)
        place, first, asked = self._batch(state, x, wanted)
        asked = asked if population.active is None else population.active
        y = jnp.where(asked & answered(answers), answers, jnp.nan).astype(state.values.dtype)
        done = state.done | asked | (place < first)  # those passed over had no answer
        values = jnp.where(asked, y, state.values)
        popsize = jnp.maximum(state.popsize, _count(wanted))
        kept = jnp.maximum(KEPT * quadratic.terms(x.shape[1])[quadratic.FULL], popsize)
        archive = grown(state.archive, x, y, state.populations, kept)
        model, optimum = modelled(archive)
        i = best_place(y)
        candidate = population.decode(jax.tree.map(lambda g: g[i], population.genomes))
        better = y[i] < state.best_value
        new = state._replace(
            genomes=population.genomes, values=values, done=done, archive=archive, model=model, optimum=optimum,
            popsize=popsize, evaluations=state.evaluations + _count(asked), settled=state.unanswered,
            best=trees.where(better, candidate, state.best), best_value=jnp.where(better, y[i], state.best_value),
        )  # fmt: skip
        whole = ~(wanted & ~done).any()
        recent = jnp.maximum(RECENT, jnp.minimum(6 * _count(done & wanted) // 5, 3 * _count(wanted) // 4))
        ended = (agreement(model, archive, recent, max(RECENT, 3 * len(population) // 4)) >= TAU) | whole
        estimated = estimates(jnp.where(wanted, model(x), jnp.nan), values, done)
        given = jnp.where(whole, values, estimated)
        new = when(ended, _advanced, _Ended(trees.strong(self), new, population.with_active(wanted), given)).state
        return settle(old, new, y)

    def _begun(self, state: State, wanted: Array) -> tuple[Array, State]:
        """Whether a new population is evaluated, and the state for that."""
        todo = _count(wanted & ~state.done)
        fresh = ~state.done.any() | (self._passed(state, wanted) >= todo)  # all that is left was asked in vain
        # A larger population is that of a restart: what was learned elsewhere is forgotten.
        forgotten = fresh & (_count(wanted) > state.popsize)
        empty = quadratic.empty(state.optimum.shape[0], state.optimum.dtype)
        return fresh, state._replace(
            values=jnp.where(fresh, jnp.nan, state.values),
            done=~fresh & state.done,
            archive=trees.where(forgotten, cleared(state.archive), state.archive),
            model=trees.where(forgotten, empty, state.model),
        )

    def _injected(self, state: State, population: Population) -> Population:
        """The population with the model's optimum in its first place, where the strategy can take it in."""
        if not hasattr(self.strategy, "moved"):
            return population
        points = population.decoded()
        unravel = trees.ravel(jax.tree.map(lambda x: x[0], points))[1]
        known = (state.archive.population[0] >= 0) & jnp.isfinite(state.optimum).all()
        put = lambda x, o: x.at[0].set(jnp.where(known, o, x[0]))
        return self.strategy.moved(state.search, population, jax.tree.map(put, points, unravel(state.optimum)))

    def _size(self, state: State, wanted: Array) -> Array:
        """Candidates of the next batch: half as many as were asked so far, () int32."""
        asked, known = _count(state.done & wanted), _count(state.archive.population >= 0)
        begin = 1 + jnp.maximum(_count(wanted) // 50, LEAST - known)
        return jnp.maximum(jnp.where(asked > 0, (asked + 1) // 2, begin), self.parallel)

    def _passed(self, state: State, wanted: Array) -> Array:
        """Candidates that were asked in vain since the last answer, () int32."""
        return (state.unanswered - state.settled) * self._size(state, wanted)

    def _batch(self, state: State, x: Array, wanted: Array) -> tuple[Array, Array, Array]:
        """Each candidate's place by the model, the place from which on they are asked, and who is: (n,), (), (n,)."""
        todo = wanted & ~state.done
        y = state.model(x)
        place = rank(jnp.where(todo, jnp.where(jnp.isfinite(y), y, jnp.inf), jnp.nan))
        first = self._passed(state, wanted) % jnp.maximum(_count(todo), 1)
        return place, first, todo & (place >= first) & (place < first + self._size(state, wanted))

    @property
    def dispersion(self) -> Any:
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        return lambda state, i: dispersion(state.search, i)

    def recommend(self, state: State) -> Params:
        """The best candidate that was evaluated; before the first answer, the starting point."""
        return state.best


class _Ended(NamedTuple):
    """A population that is ranked, with all that telling it needs: `when` takes a function of one tree."""

    surrogate: Surrogate
    state: State
    population: Population
    values: Array


def _advanced(ended: _Ended) -> _Ended:
    state = ended.state
    search = ended.surrogate.strategy.tell(state.search, ended.population, ended.values)
    done, values = jnp.zeros_like(state.done), jnp.full_like(state.values, jnp.nan)
    new = state._replace(search=trees.strong(search), done=done, values=values, populations=state.populations + 1)
    return ended._replace(state=new)


def _count(which: Array) -> Array:
    return which.sum().astype(jnp.int32)


def _points(population: Population) -> Array:
    """The candidates as vectors (n, d)."""
    return jax.vmap(trees.flatten)(population.decoded())


def surrogate(strategy: Any, *, parallel: int = 1) -> Surrogate:
    """lq-CMA-ES (Hansen 2019): a model of the objective says which of a population's candidates need an evaluation.

    A linear model is fitted to all recent points, a quadratic one as soon as there are enough; the best candidate by
    the model is evaluated, then half as many again as so far, until model and objective order the last 15 points or
    more alike (Kendall's tau of 0.85). Then the strategy is told the model's values, and the model's optimum is a
    candidate of its next population where the strategy takes one in (`moved`). So a generation of the run is a batch
    of few candidates, often one; the others are not active. It pays where a few thousand evaluations are all there are.

    Restarts go inside, `surrogate(ipop(cma_es(64), 8))`, and bounds outside. The full model has (d + 1) (d + 2) / 2
    terms, so a batch costs time O(d^6) and memory O(d^4): for up to about 40 parameters.

    Args:
        strategy: any strategy that reads values.
        parallel: candidates of a batch, at least: as many as are evaluated at the same time.

    Raises:
        ValueError: for a `parallel` below 1.
        TypeError: for something that is not a strategy, or, at `tell`, one that reads gradients.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> bent = lambda x: jnp.sum(10.0 ** jnp.arange(4) * (x - 1.0) ** 2)
    >>> result = minimize(bent, jnp.zeros(4), surrogate(cma_es(sigma=0.5)), generations=200, target=1e-4)
    >>> result.reason, result.evaluations < 100
    ('target', True)
    """
    check_strategy(strategy)
    check_popsize(parallel, 1, name="parallel")
    return Surrogate(strategy, parallel)
