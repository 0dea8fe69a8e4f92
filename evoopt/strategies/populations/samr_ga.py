"""SAMR: a genetic algorithm whose members carry their own mutation rates, which themselves mutate before use.

Source: Clune, Misevic, Ofria, Lenski, Elena, Sanjuan, "Natural selection fails to optimize mutation rates for long-term
adaptation on rugged fitness landscapes", PLoS Comput. Biol. 4 (2008), in the form of the baseline of Kumar, Liu,
Miikkulainen, Stone, "Effective mutation rate adaptation through group elite selection", GECCO 2022.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import as_values, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class Genome(NamedTuple):
    """A candidate and its mutation rate."""

    x: Array  # (n, d)
    sigma: Array  # (n,), standard deviation of the mutation that made it; its children inherit and mutate it


class State(NamedTuple):
    """The state of the genetic algorithm."""

    members: Genome  # (n,), best first
    values: Array  # (n,); +inf until they are answered
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class SAMR:
    """Genetic algorithm with self-adapted mutation rates; see `samr_ga`."""

    popsize: int = static()
    parents: int = static()
    sigma: float
    factor: float  # tau
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2)
        check_popsize(self.parents, 1, name="parents")
        if self.parents > self.popsize:
            raise error(f"at most {self.popsize} parents, the popsize", str(self.parents), "a small popsize")

    def init(self, params: Params, key: Key) -> State:
        x, unravel = variation.scattered(params, key, self.popsize, self.sigma)
        values, zero = variation.unknown(self.popsize), jnp.zeros((), jnp.int32)
        sigma = jnp.full(self.popsize, self.sigma, values.dtype)
        return State(Genome(x, sigma), values, zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        keys = jax.random.split(noises.replayable(key), 3)
        (x, sigma), n = state.members, self.popsize
        place = variation.integers(keys[0], (n,), self.parents)
        step = 2 * variation.uniforms(keys[1], (n,), sigma.dtype) - 1
        new = sigma[place] * jnp.asarray(self.factor, sigma.dtype) ** step  # tau^U(-1, 1)
        child = x[place] + new.astype(x.dtype)[:, None] * variation.gaussians(keys[2], x.shape, x.dtype)
        same = (jnp.arange(n) == 0) | (state.generation == 0)  # the elite, and the first generation
        members = Genome(jnp.where(same[:, None], x, child), jnp.where(same, sigma, new))
        return Population(variation.decoding(state.unravel), members)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        new = values.astype(state.values.dtype)
        new = variation.elite_kept(new, state.values[0], population.genomes.x[0], state.members.x[0])
        place, kept = variation.survivors(new, state.values, 0, self.popsize)
        members = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[place], population.genomes, state.members)
        return settle(state, State(members, kept, state.generation + 1, state.unravel, state.unanswered), values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        return variation.moved(population, points)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.members.x[0])


def samr_ga(popsize: int = 128, *, parents: int | None = None, sigma: float = 0.1, factor: float = 2.0) -> SAMR:
    """Genetic algorithm with self-adapted mutation rates (Clune et al. 2008, as in Kumar et al. 2022).

    Args:
        popsize: candidates per generation; one of them is the elite, asked again.
        parents: how many of the best have children; half of the popsize by default.
        sigma: initial mutation rate, a standard deviation in units of the parameters.
        factor: tau; a mutation rate is multiplied by tau^U(-1, 1).

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), samr_ga(64), generations=150)
    >>> result.best_value < 1e-4
    True
    """
    return SAMR(popsize, max(1, popsize // 2) if parents is None else parents, sigma, factor)
