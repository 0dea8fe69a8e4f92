"""JADE: differential evolution towards one of the best, with an archive; F and CR are learned from successes.

Source: Zhang, Sanderson, "JADE: adaptive differential evolution with optional external archive", IEEE Transactions on
Evolutionary Computation 13 (2009), table I and equations (6) to (12).

Deviation: when the archive is full, a beaten parent replaces a random entry (as in L-SHADE's program), whereas JADE
first adds all and then removes random ones. The two differ only for parents beaten in the same generation.
"""

from __future__ import annotations

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
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of JADE."""

    x: Array  # (n, d), the parents, best first
    values: Array  # (n,), of the parents; +inf until they are answered
    archive: Array  # (n, d), beaten parents, the first `count` in use
    count: Array  # () int32
    mean_weight: Array  # (), mu_F
    mean_rate: Array  # (), mu_CR
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class JADE:
    """Adaptive differential evolution with an archive; see `jade`."""

    popsize: int = static()
    learning_rate: float  # c
    greediness: float  # p
    spread: float
    lower: Any
    upper: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 4)  # a parent, r1, r2, and one of the best

    def init(self, params: Params, key: Key) -> State:
        n = self.popsize
        x, unravel = variation.scattered(params, key, n, self.spread, self.lower, self.upper)
        half, zero = jnp.full((), 0.5, jnp.result_type(float)), jnp.zeros((), jnp.int32)
        return State(x, variation.unknown(n), jnp.zeros_like(x), zero, half, half, zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        keys = jax.random.split(noises.replayable(key), 6)
        x, (n, d), real = state.x, state.x.shape, state.mean_rate.dtype
        rate = jnp.clip(state.mean_rate + 0.1 * variation.gaussians(keys[0], (n,), real), 0, 1)  # (8)
        weight = variation.cauchy(keys[1], jnp.full(n, state.mean_weight))  # (10)
        best = jnp.maximum(jnp.round(self.greediness * n), 1).astype(jnp.int32)
        pbest = variation.integers(keys[2], (n,), best)  # rows are best first
        mutant = variation.current_to_pbest(  # (7)
            keys[3], x, n, state.archive, state.count, pbest, weight, weight
        )
        mutant = variation.midpoint(mutant, x, variation.box(self.lower, self.upper, state.unravel))
        trial = jnp.where(variation.binomial(keys[4], rate, d), mutant, x)
        slot = variation.integers(keys[5], (n,), n)
        trial = jnp.where(state.generation == 0, x, trial)  # the first generation evaluates the parents themselves
        return Population(variation.decoding(state.unravel), Trial(trial, weight, rate, slot))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        genome = population.genomes
        new = values.astype(state.values.dtype)
        first = state.generation == 0
        won = answered(new) & (new < state.values)  # table I, line 17: a tie keeps the parent
        better = won & ~first
        archive, count = variation.archived(state.archive, state.count, self.popsize, state.x, better, genome.slot)
        n_won, c = jnp.maximum(better.sum(), 1).astype(genome.rate.dtype), self.learning_rate
        success = better.astype(genome.rate.dtype)
        rate = (1 - c) * state.mean_rate + c * jnp.sum(success * genome.rate) / n_won  # (9)
        weight = (1 - c) * state.mean_weight + c * variation.lehmer(success, genome.weight)  # (11), (12)
        learned = better.any()
        x = jnp.where(won[:, None], genome.x, state.x)
        new = jnp.where(won, new, state.values)
        order = jnp.argsort(new)
        new_state = State(
            x[order],
            new[order],
            archive,
            count,
            jnp.where(learned, weight, state.mean_weight).astype(state.mean_weight.dtype),
            jnp.where(learned, rate, state.mean_rate).astype(state.mean_rate.dtype),
            state.generation + 1,
            state.unravel,
            state.unanswered,
        )
        return settle(state, new_state, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        # F and CR did not make the points: nothing is to be learned from them.
        n = len(population)
        weight, rate = jnp.full(n, state.mean_weight), jnp.full(n, state.mean_rate)
        return variation.moved(
            population, points, variation.box(self.lower, self.upper, state.unravel), weight=weight, rate=rate
        )

    def recommend(self, state: State) -> Params:
        return state.unravel(state.x[0])


def jade(
    popsize: int = 100,
    *,
    learning_rate: float = 0.1,
    greediness: float = 0.05,
    spread: float = 1.0,
    lower: Any = None,
    upper: Any = None,
) -> JADE:
    """JADE with archive (Zhang and Sanderson 2009).

    Args:
        popsize: candidates per generation, at least 4; the paper has 30 for d <= 10, 100 for d = 30, 400 for d = 100.
        learning_rate: c, how fast the means of F and CR follow successes; 1/c is a life span in generations.
        greediness: p, the share of the best that trials are drawn towards.
        spread: standard deviation of the first population around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first population is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), jade(30), generations=150)
    >>> result.best_value < 1e-6
    True
    """
    return JADE(popsize, learning_rate, greediness, spread, lower, upper)
