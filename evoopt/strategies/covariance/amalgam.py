"""AMaLGaM-univariate: a Gaussian estimated from the best candidates, its variances adapted, its mean sent ahead.

Source: Bosman, Grahl, Thierens, "Benchmarking parameter-free AMaLGaM on functions with and without noise", Evolutionary
Computation 21 (2013), sections 2 and 3: adaptive variance scaling (AVS), triggered by the standard-deviation ratio
(SDR), and the anticipated mean shift (AMS).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import injection, shaping, stopping
from evoopt.answers import answered, as_values, best_place, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.stopping import Dispersion
from evoopt.strategies.covariance import recombination
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static

SELECTED = 0.35  # tau
DECREASE = 0.9  # eta^DEC; eta^INC is its inverse
SHIFT = 2.0  # delta^AMS


class State(NamedTuple):
    """The state of AMaLGaM over d parameters."""

    mean: Array  # (d,)
    sigma: Array  # (d,), standard deviations without the multiplier
    multiplier: Array  # (), c^Multiplier of the variances
    shift: Array  # (d,), the mean's move in the last generation
    elite: Array  # (d,), the best candidate
    elite_value: Array  # (), +inf before the first answer
    still: Array  # () int32, generations without improvement (NIS)
    unanswered: Array  # () int32, generations without a finite answer
    unravel: Any  # vector (d,) -> parameters; no leaves


@pytree
class Sample:
    """decode: y (d,) -> mean + y."""

    mean: Array
    unravel: Any

    def __call__(self, y: Array) -> Params:
        return self.unravel(self.mean + y)


@pytree
class AMaLGaM:
    """Univariate AMaLGaM; see `amalgam`."""

    popsize: int | None = static()
    sigma: float
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        if self.popsize is not None:
            check_popsize(self.popsize, 6)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean, unravel = recombination.flattened(params)
        zero, one, count = jnp.zeros_like(mean), jnp.ones((), mean.dtype), jnp.zeros((), jnp.int32)
        sigma = jnp.asarray(self.sigma, mean.dtype) + zero
        return State(mean, sigma, one, zero, mean, one * jnp.inf, count, count, unravel)

    def ask(self, state: State, key: Key) -> Population:
        d = state.mean.shape[0]
        n = self.popsize or max(6, math.ceil(10 * math.sqrt(d)))  # table 1
        y = jnp.sqrt(state.multiplier) * state.sigma * recombination.standard_normals(key, n, d, state.mean.dtype)
        moved = int(SELECTED / 2 * n)  # alpha^AMS (n - 1): half of those selected may be moved ones
        ahead = SHIFT * state.multiplier * state.shift
        y = y + jnp.where(jnp.arange(n)[:, None] < moved, ahead, 0)
        return Population(Sample(state.mean, state.unravel), y)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        y, dtype, d = population.genomes, state.mean.dtype, state.mean.shape[0]
        ok = answered(values)
        # The elite survives without being asked again: it takes the last place in the generation.
        x = jnp.concatenate([y, (state.elite - state.mean)[None]])  # relative to the old mean
        all_values = jnp.concatenate([jnp.where(ok, values.astype(dtype), jnp.nan), state.elite_value[None]])
        all_values = jnp.where(jnp.isposinf(all_values) & (jnp.arange(len(x)) == len(y)), jnp.nan, all_values)
        rank, m = shaping.rank(all_values), answered(all_values).sum().astype(dtype)
        chosen = jnp.maximum(jnp.floor(SELECTED * m), 1)
        w = jnp.where((rank.astype(dtype) < chosen) & answered(all_values), 1 / chosen, 0).astype(dtype)

        better = ok & (values.astype(dtype) < state.elite_value)
        first = jnp.isinf(state.elite_value)  # nothing to improve on
        improved = better.any() & ~first
        average = jnp.where(better[:, None], y, 0).sum(axis=0) / jnp.maximum(better.sum(), 1).astype(dtype)
        ratio = (jnp.abs(average) / (jnp.sqrt(state.multiplier) * state.sigma)).max()  # SDR
        longest = 25 + d  # NIS^MAX
        c = state.multiplier
        up = jnp.maximum(c, 1) * jnp.where(ratio > 1, 1 / DECREASE, 1)
        still = jnp.where(improved | first, 0, state.still + (c <= 1).astype(jnp.int32))
        down = jnp.where((c > 1) | (still >= longest), c * DECREASE, c)
        down = jnp.where((still < longest) & (down < 1), 1, down)
        multiplier = jnp.where(first, c, jnp.where(improved, up, down))
        multiplier = jnp.clip(multiplier, 1e-10, 1e10)  # the paper's run ends at 1e-10; a strategy goes on

        # After long stagnation the search closes in on the best, as in the authors' program.
        shift = jnp.where(multiplier < 1, x[jnp.argmin(rank)], w @ x)
        variance = w @ (x - shift) ** 2  # around the new mean

        i = best_place(values)
        record = better.any()
        elite = jnp.where(record, state.mean + y[i], state.elite)
        elite_value = jnp.where(record, values[i].astype(dtype), state.elite_value)
        sigma = jnp.maximum(jnp.sqrt(variance), jnp.finfo(dtype).tiny * 2.0**20)
        new = State(
            state.mean + shift, sigma, multiplier, shift, elite, elite_value, still,
            state.unanswered, state.unravel,
        )  # fmt: skip
        return recombination.keep(state, new, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        # No step is shortened: the elite has to be the point that has its value.
        y = injection.vectors(points, state.mean.dtype) - state.mean
        return injection.placed(population, points, y)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.mean)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria; principal axes are coordinates."""
        std = jnp.sqrt(state.multiplier) * state.sigma
        return stopping.diagonal(state.mean, std, state.shift, i)


def amalgam(popsize: int | None = None, *, sigma: float = 1.0) -> AMaLGaM:
    """AMaLGaM with a univariate Gaussian (Bosman, Grahl, Thierens 2013). Time and memory O(n d).

    Deviation: the start is a Gaussian around the parameters, not uniform over a box as in the paper. For the paper's
    restarts see `evoopt.wrappers.ipop` and `bipop`.

    Args:
        popsize: candidates per generation, at least 6; None means 10 sqrt(d).
        sigma: initial standard deviation of every coordinate, in units of the parameters.

    Raises:
        ValueError: for a popsize below 6 or a sigma that is not positive.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(5), amalgam(), generations=400, target=1e-8).reason
    'target'
    """
    check_sigma(sigma)
    return AMaLGaM(popsize, sigma)
