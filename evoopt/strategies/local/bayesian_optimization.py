"""Bayesian optimization: a Gaussian process of the values proposes where improvement is most expected.

Sources: Jones, Schonlau, Welch, "Efficient global optimization of expensive black-box functions", J. Global Optim. 13
(1998); the trust region is that of Eriksson et al., "Scalable global optimization via local Bayesian optimization",
NeurIPS 2019 (TuRBO-1), with expected improvement where TuRBO draws from the posterior. The points of a generation are
found one after the other, each as if those before had answered what the process expects (Ginsbourger, Le Riche, Carraro
2010, "kriging believer").

For objectives that take seconds: a generation takes some hundredths of a second, and more with `memory`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, best_place, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.local import gaussian_process as gp
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static
from evoopt.when import when

CANDIDATES = 1024  # whose expected improvement is looked at
CLIMBED = 8  # of them, from which it's followed uphill
CLIMB = 30  # steps
LONGEST = 2.0  # edge of the trust region, in units of the box: all of it, wherever the best point is
SHORTEST = 0.5**7
SUCCESSES = 3  # in a row, that double the trust region
WIDTH = 8.0  # of the box of a number without bounds, in units of `spread`


class State(NamedTuple):
    """What has been seen."""

    data: gp.Data  # y as it was answered
    scales: gp.Scales
    count: Array  # () int32, points of the first design so far
    length: Array  # (), edge of the trust region
    successes: Array  # () int32, in a row
    failures: Array  # () int32, evaluations in a row without a better value
    best: Array  # (d,), in units of the box
    best_value: Array  # ()
    low: Array  # (d,), the box
    width: Array  # (d,)
    bounded: Array  # (d,) bool, where the box is a wall
    shift: Array  # (d,), of the design
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


class _Proposing(NamedTuple):
    """What a generation is proposed from, and the generation: `when` takes a function of one tree."""

    state: State
    key: Array
    x: Array  # (n, d), in units of the box
    scales: gp.Scales


@pytree
class BayesianOptimization:
    """Expected improvement of a Gaussian process; see `bayesian_optimization`."""

    popsize: int = static()
    lower: Any
    upper: Any
    spread: float
    memory: int = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 1)
        check_popsize(self.memory, 2 * self.popsize, name="memory")

    def init(self, params: Params, key: Key) -> State:
        key = noises.replayable(key)
        x0, unravel = trees.ravel(trees.searchable(params))
        walls = variation.box(self.lower, self.upper, unravel)
        d, dtype = x0.size, x0.dtype
        edge = WIDTH * jnp.asarray(self.spread, dtype)
        low, width, bounded = x0 - edge / 2, jnp.full(d, edge), jnp.zeros(d, bool)
        if walls is not None:
            bounded = ~jnp.isinf(walls[0])
            low = jnp.where(bounded, walls[0], low)
            width = jnp.where(bounded, walls[1] - walls[0], width)
        zero = jnp.zeros((), jnp.int32)
        n = self.memory
        data = gp.Data(jnp.zeros((n, d), dtype), jnp.zeros(n, dtype), jnp.zeros(n, bool))
        best = jnp.clip((x0 - low) / width, 0, 1)
        return State(
            data, gp.scales(d, dtype), zero, jnp.asarray(LONGEST, dtype), zero, zero, best,
            jnp.asarray(jnp.inf, dtype), low, width, bounded, jax.random.uniform(key, (d,), dtype), unravel, zero,
        )  # fmt: skip

    def ask(self, state: State, key: Key) -> Population:
        x = self._proposed(state, noises.replayable(key)).x
        return Population(state.unravel, state.low + state.width * x)

    def _proposed(self, state: State, key: Key) -> _Proposing:
        d = state.best.size
        places = state.count + jnp.arange(self.popsize, dtype=jnp.int32)
        design = jnp.where((places == 0)[:, None], state.best, spread_evenly(places, state.shift))
        begun = _Proposing(state, key, design, state.scales)
        return when(state.count >= first(d), _propose, begun)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers)).astype(state.best_value.dtype)
        x = (population.genomes - state.low) / state.width
        ok = answered(values)
        # New points come in front; of those beyond the memory the worst are dropped.
        data = state.data
        y = jnp.concatenate([jnp.where(ok, values, 0), data.values])
        rows = gp.Data(jnp.concatenate([x, data.x]), y, jnp.concatenate([ok, data.there]))
        ranked = jnp.argsort(jnp.where(rows.there, rows.values, jnp.inf))
        in_order = jnp.argsort(~rows.there, stable=True)
        kept = jnp.where(rows.there.sum() > self.memory, ranked, in_order)[: self.memory]
        data = jax.tree.map(lambda a: a[kept], rows)
        i = best_place(values)
        better = ok[i] & (values[i] < state.best_value)
        seen = jnp.isfinite(state.best_value)
        margin = 1e-3 * jnp.abs(state.best_value)  # TuRBO's
        success = ok[i] & (values[i] < state.best_value - jnp.where(seen, margin, 0))
        modelled = state.count >= first(state.best.size)
        length, successes, failures = self._region(state, success)
        new = state._replace(
            data=data,
            scales=self._fitted(state, data),
            count=state.count + population.asked(),
            length=jnp.where(modelled, length, state.length),
            successes=jnp.where(modelled, successes, 0),
            failures=jnp.where(modelled, failures, 0),
            best=jnp.where(better, x[i], state.best),
            best_value=jnp.where(better, values[i], state.best_value),
        )
        return settle(state, new, values)

    def _fitted(self, state: State, data: gp.Data) -> gp.Scales:
        fitting = _Fitting(data, state.scales)
        due = state.count + self.popsize >= first(state.best.size)
        return when(due, _fit, fitting).scales

    def _region(self, state: State, success: Array) -> tuple[Array, Array, Array]:
        """Edge, successes and failures after a generation (Eriksson et al., section 3)."""
        d = state.best.size
        successes = jnp.where(success, state.successes + 1, 0)
        failures = jnp.where(success, 0, state.failures + self.popsize)
        grown, shrunk = successes >= SUCCESSES, failures >= max(4, d)
        length = state.length * jnp.where(grown, 2.0, jnp.where(shrunk, 0.5, 1.0)).astype(state.length.dtype)
        length = jnp.where(length < SHORTEST, LONGEST, jnp.minimum(length, LONGEST))  # it looks everywhere again
        return length, jnp.where(grown, 0, successes), jnp.where(shrunk, 0, failures)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        return variation.moved(population, points)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.low + state.width * state.best)


class _Fitting(NamedTuple):
    data: gp.Data
    scales: gp.Scales


def _fit(fitting: _Fitting) -> _Fitting:
    return fitting._replace(scales=gp.fit(warped(fitting.data), fitting.scales).scales)


def warped(data: gp.Data) -> gp.Data:
    """Values as the process sees them: log(1 + (y - best) / q) with mean 0 and variance 1; q is their first quartile.

    Ours: a process of the values themselves is spoilt by a few huge ones, and their ranks hide how much is gained.
    Infinite values are the worst finite one.
    """
    ok = data.there & jnp.isfinite(data.values)
    best = jnp.where(ok.any(), jnp.min(data.values, where=ok, initial=jnp.inf), 0)
    quartile = jnp.nanquantile(jnp.where(ok, data.values - best, jnp.nan), 0.25)
    y = jnp.log1p(jnp.where(ok, data.values - best, 0) / jnp.where(quartile > 0, quartile, 1))
    y = jnp.where(ok, y, y.max())
    n = jnp.maximum(data.there.sum(), 1).astype(y.dtype)
    mean = jnp.sum(y, where=data.there) / n
    deviation = jnp.sqrt(jnp.sum((y - mean) ** 2, where=data.there) / n)
    return data._replace(values=jnp.where(data.there, (y - mean) / jnp.where(deviation > 0, deviation, 1), 0))


def first(d: int) -> int:
    """The points of the first design."""
    return max(4, d + 1)


def spread_evenly(places: Array, shift: Array) -> Array:
    """Terms of an additive recurrence with low discrepancy, shifted: (n, d) in [0, 1).

    Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018): multiples of the powers of 1 / phi_d,
    where phi_d is the root of x^(d+1) = x + 1.
    """
    d = shift.size
    phi = 2.0
    for _ in range(60):
        phi = (1 + phi) ** (1 / (d + 1))
    steps = jnp.asarray(np.power(1 / phi, np.arange(1, d + 1)) % 1, shift.dtype)
    return (shift + places[:, None].astype(shift.dtype) * steps) % 1


def _propose(proposing: _Proposing) -> _Proposing:
    """Points of the largest expected improvement within the trust region, one after the other."""
    state, key, design, scales = proposing
    n = design.shape[0]
    data = warped(state.data)
    best = jnp.min(data.values, where=data.there, initial=jnp.inf)
    center = data.x[jnp.argmin(jnp.where(data.there, data.values, jnp.inf))]
    lengths = jnp.exp(scales.lengths)
    shape = jnp.clip(lengths / jnp.exp(scales.lengths.mean()), 0.1, 10)  # the region is longer where less changes
    half = state.length / 2 * shape
    low, high = center - half, center + half
    low = jnp.where(state.bounded | (state.length >= LONGEST), jnp.maximum(low, 0), low)
    high = jnp.where(state.bounded | (state.length >= LONGEST), jnp.minimum(high, 1), high)
    rows = gp.Data(
        jnp.concatenate([design, data.x]),
        jnp.concatenate([jnp.zeros(n, data.values.dtype), data.values]),
        jnp.concatenate([jnp.zeros(n, bool), data.there]),
    )

    def one(i: Array, carry: Any) -> Any:
        rows, x, best = carry
        process = gp.conditioned(rows, scales)
        point = _climbed(process, best, low, high, center, noises.fold_in(key, i))
        believed = gp.posterior(process, point[None])[0][0]
        rows = gp.Data(rows.x.at[i].set(point), rows.values.at[i].set(believed), rows.there.at[i].set(True))
        return rows, x.at[i].set(point), jnp.minimum(best, believed)  # there is nothing more to be gained there

    return proposing._replace(x=jax.lax.fori_loop(0, n, one, (rows, design, best))[1])


def _climbed(process: gp.Process, best: Array, low: Array, high: Array, center: Array, key: Array) -> Array:
    """The point within [low, high] of the largest expected improvement that was found: (d,)."""
    d = low.size
    key_even, key_near = jax.random.split(key)
    half = CANDIDATES // 2
    even = low + (high - low) * jax.random.uniform(key_even, (half, d), low.dtype)
    sizes = jnp.repeat(jnp.asarray([0.1, 0.01], low.dtype), half // 2)[:, None]
    near = center + (high - low) * sizes * jax.random.normal(key_near, (half, d), low.dtype)
    x = jnp.clip(jnp.concatenate([even, near]), low, high)
    good = lambda x: gp.log_expected_improvement(process, x, best)
    top = x[jnp.argsort(-good(x))[:CLIMBED]]
    slope = jax.grad(lambda x: good(x).sum())

    def step(i: Array, carry: Any) -> Any:  # Adam's direction, with steps that shrink
        x, first, second = carry
        g = slope(x)
        g = jnp.where(jnp.isfinite(g), g, 0)
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g**2
        size = 0.05 * (high - low) * (1 - i.astype(x.dtype) / CLIMB)
        return jnp.clip(x + size * first / (jnp.sqrt(second) + 1e-12), low, high), first, second

    end = jax.lax.fori_loop(0, CLIMB, step, (top, jnp.zeros_like(top), jnp.zeros_like(top)))[0]
    both = jnp.concatenate([top, end])
    return both[jnp.argmax(good(both))]


def bayesian_optimization(
    popsize: int = 1, *, lower: Params = None, upper: Params = None, spread: float = 1.0, memory: int = 200
) -> BayesianOptimization:
    """Expected improvement of a Gaussian process within a trust region, for objectives that take seconds.

    Args:
        popsize: points proposed together, as many as are evaluated at once.
        lower, upper: numbers, or trees like the parameters; None for no bounds.
        spread: the scale of numbers without bounds: the first points lie within four times it.
        memory: points that the process is fitted to; beyond it the worst are forgotten. Time grows with its cube.

    Raises:
        ValueError: for bounds of which only one is there, or that are crossed.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> strategy = bayesian_optimization(lower=-5.0, upper=5.0, memory=40)
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2), strategy, evaluations=30)
    >>> bool(result.best_value < 0.01)
    True
    """
    return BayesianOptimization(popsize, lower, upper, spread, memory)
