"""GESMR: a genetic algorithm and a population of mutation rates, each judged by the best change in its group.

Source: Kumar, Liu, Miikkulainen, Stone, "Effective mutation rate adaptation through group elite selection", GECCO 2022,
arXiv 2204.04817; equation numbers are those cited in evosax's program.

Choices left open by the sources: the best rate survives unchanged, like the best candidate (evosax mutates it too); the
first rates differ, so that selection has a choice from the start (evosax's are equal).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class Genome(NamedTuple):
    """A candidate, its parent, and the mutation rate of its group."""

    x: Array  # (n, d)
    parent: Array  # (n,) int32, the place of its parent
    sigma: Array  # (n,)


class State(NamedTuple):
    """The state of the genetic algorithm."""

    x: Array  # (n, d), best first
    values: Array  # (n,); +inf until they are answered
    sigmas: Array  # (k,), mutation rates, best first
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class GESMR:
    """Genetic algorithm with group elite selection of mutation rates; see `gesmr_ga`."""

    popsize: int = static()
    groups: int = static()
    parents: int = static()
    parent_groups: int = static()
    sigma: float
    factor: float  # tau
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2)
        for name, number, most in (
            ("groups", self.groups, self.popsize - 1),
            ("parents", self.parents, self.popsize),
            ("parent_groups", self.parent_groups, self.groups),
        ):
            check_popsize(number, 1, name=name)
            if number > most:
                raise error(f"at most {most} {name}", str(number), "a small popsize")

    def init(self, params: Params, key: Key) -> State:
        x, unravel = variation.scattered(params, key, self.popsize, self.sigma)
        values, zero = variation.unknown(self.popsize), jnp.zeros((), jnp.int32)
        sigmas = self.sigma * jnp.logspace(-1, 1, self.groups, dtype=values.dtype)
        return State(x, values, sigmas.at[0].set(self.sigma), zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        keys = jax.random.split(noises.replayable(key), 4)
        x, sigmas, n = state.x, state.sigmas, self.popsize
        place = variation.integers(keys[0], (self.groups,), self.parent_groups)
        step = 2 * variation.uniforms(keys[1], (self.groups,), sigmas.dtype) - 1
        mutated = sigmas[place] * jnp.asarray(self.factor, sigmas.dtype) ** step  # (6), (7): tau^U(-1, 1)
        mutated = mutated.at[0].set(sigmas[0])  # the elite rate stays
        mutated = jnp.where(state.generation <= 1, sigmas, mutated)  # the first rates are used unchanged once
        sigma = mutated[self._group()]
        parent = variation.integers(keys[2], (n,), self.parents)  # (3)
        child = x[parent] + sigma.astype(x.dtype)[:, None] * variation.gaussians(keys[3], x.shape, x.dtype)  # (4)
        same = (jnp.arange(n) == 0) | (state.generation == 0)  # the elite, and the first generation
        child, parent = jnp.where(same[:, None], x, child), jnp.where(same, jnp.arange(n, dtype=jnp.int32), parent)
        return Population(variation.decoding(state.unravel), Genome(child, parent, sigma))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        genome, n = population.genomes, self.popsize
        new = values.astype(state.values.dtype)
        new = variation.elite_kept(new, state.values[0], genome.x[0], state.x[0])
        change = new - state.values[genome.parent]
        change = jnp.where(answered(new) & jnp.isfinite(change) & (jnp.arange(n) > 0), change, jnp.inf)
        # (5): a group's best change, not the mean: mutations are mostly harmful and would drive every rate to 0.
        best = jax.ops.segment_min(change, self._group(), self.groups)
        used = jax.ops.segment_max(genome.sigma, self._group(), self.groups)
        sigmas = jnp.where(jnp.isfinite(best).any(), used[jnp.argsort(best)], state.sigmas)
        place, kept = variation.survivors(new, state.values, 0, n)
        x = jnp.concatenate([genome.x, state.x])[place]
        return settle(state, State(x, kept, sigmas, state.generation + 1, state.unravel, state.unanswered), values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        # A point is no mutation: its group gains by it only if it is better than the best.
        return variation.moved(population, points, parent=jnp.zeros_like(population.genomes.parent))

    def recommend(self, state: State) -> Params:
        return state.unravel(state.x[0])

    def _group(self) -> Array:
        """The group of every row, (n,). Row 0 is the elite, whose change does not count."""
        return jnp.maximum(jnp.arange(self.popsize) - 1, 0) * self.groups // (self.popsize - 1)


def gesmr_ga(
    popsize: int = 128,
    *,
    groups: int | None = None,
    parents: int | None = None,
    parent_groups: int | None = None,
    sigma: float = 0.1,
    factor: float = 2.0,
) -> GESMR:
    """Group elite selection of mutation rates (Kumar et al. 2022).

    Args:
        popsize: candidates per generation; one of them is the elite, asked again.
        groups: K, the number of mutation rates; the square root of the popsize by default.
        parents: how many of the best have children; half of the popsize by default.
        parent_groups: how many of the best rates survive; half of the groups by default.
        sigma: middle of the initial rates, which are standard deviations in units of the parameters; the others are
            spaced evenly in the logarithm from a tenth to ten times this.
        factor: tau; a mutation rate is multiplied by tau^U(-1, 1).

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), gesmr_ga(64), generations=150)
    >>> result.best_value < 1e-4
    True
    """
    groups = max(1, math.isqrt(popsize)) if groups is None else groups
    parents = max(1, popsize // 2) if parents is None else parents
    parent_groups = max(1, groups // 2) if parent_groups is None else parent_groups
    return GESMR(popsize, groups, parents, parent_groups, sigma, factor)
