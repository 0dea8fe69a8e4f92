"""Simulated annealing: chains that also move uphill, less and less often.

Source: Kirkpatrick, Gelatt, Vecchi, "Optimization by simulated annealing", Science 220 (1983), with geometric cooling;
acceptance: Metropolis, Rosenbluth, Rosenbluth, Teller, Teller 1953. For real parameters, steps shrink with the
temperature: Corana, Marchesi, Martini, Ridella 1987 adapt them; here they follow a schedule, which needs no statistics.
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
from evoopt.types import Array, Key, Params, error, pytree, static


class Genome(NamedTuple):
    """A proposal and the number that decides whether it is accepted."""

    x: Array  # (n, d)
    luck: Array  # (n,), uniform in [0, 1)


class State(NamedTuple):
    """Where the chains are."""

    x: Array  # (n, d)
    values: Array  # (n,); +inf until they are answered
    best: Array  # (d,), the best candidate so far
    best_value: Array  # ()
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class SimulatedAnnealing:
    """Independent annealed chains; see `simulated_annealing`."""

    popsize: int = static()
    temperature: float
    cooling: float
    sigma: float
    shrinking: float
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 1)
        for name in ("cooling", "shrinking"):
            factor = getattr(self, name)
            if isinstance(factor, (int, float)) and not 0 < factor <= 1:
                raise error(f"{name} in (0, 1]", str(factor), "a rate given as 1 - rate")

    def init(self, params: Params, key: Key) -> State:
        check_sigma(self.temperature, "temperature")
        x, unravel = variation.scattered(params, key, self.popsize, self.sigma)
        values, zero = variation.unknown(self.popsize), jnp.zeros((), jnp.int32)
        return State(x, values, x[0], values[0], zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        key_step, key_luck = jax.random.split(noises.replayable(key))
        x, real = state.x, state.values.dtype
        sigma = self.sigma * jnp.asarray(self.shrinking, real) ** state.generation.astype(real)
        proposal = x + sigma.astype(x.dtype) * variation.gaussians(key_step, x.shape, x.dtype)
        proposal = jnp.where(state.generation == 0, x, proposal)  # the first generation evaluates the starting points
        return Population(
            variation.decoding(state.unravel), Genome(proposal, variation.uniforms(key_luck, (self.popsize,), real))
        )

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        new, real, genome = values.astype(state.values.dtype), state.values.dtype, population.genomes
        temperature = self.temperature * jnp.asarray(self.cooling, real) ** state.generation.astype(real)
        rise = new - state.values
        uphill = genome.luck < jnp.exp(-rise / jnp.maximum(temperature, jnp.finfo(real).tiny))  # Metropolis
        moved = answered(new) & ((new <= state.values) | uphill)
        x, kept = jnp.where(moved[:, None], genome.x, state.x), jnp.where(moved, new, state.values)
        i = jnp.argmin(kept)
        better = kept[i] < state.best_value
        best, best_value = jnp.where(better, x[i], state.best), jnp.where(better, kept[i], state.best_value)
        return settle(
            state, State(x, kept, best, best_value, state.generation + 1, state.unravel, state.unanswered), values
        )

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        return variation.moved(population, points)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.best)


def simulated_annealing(
    popsize: int = 16,
    *,
    temperature: float = 1.0,
    cooling: float = 0.97,
    sigma: float = 0.5,
    shrinking: float = 0.985,
) -> SimulatedAnnealing:
    """Simulated annealing (Kirkpatrick et al. 1983): `popsize` independent chains with a geometric schedule.

    Args:
        popsize: chains.
        temperature: initial temperature, in units of the values: a rise that large is accepted with probability 1/e.
        cooling: factor of the temperature per generation.
        sigma: initial standard deviation of a step and of the chains' starts, in units of the parameters.
        shrinking: factor of sigma per generation; the root of `cooling` suits a smooth valley. 1 is the classic choice.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), simulated_annealing(), generations=500)
    >>> result.best_value < 1e-3
    True
    """
    return SimulatedAnnealing(popsize, temperature, cooling, sigma, shrinking)
