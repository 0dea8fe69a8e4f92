"""Conservative zeroth-order descent: a step is taken only if it beats staying, and backwards if that is best.

Source: Zhang et al., "Revisiting zeroth-order optimization for memory-efficient LLM fine-tuning: a benchmark", ICML
2024, arXiv 2402.11592, ZO-SGD-Cons: with g the slope along z, the best of theta, theta - eta g z and theta + eta g z.
That takes two generations here, one that measures g and one that tries the three: five forward passes per step. Data
that change with the generation change between the two, not among the three points compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, told
from evoopt.checks import check_sigma
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree


class State(NamedTuple):
    """The state of the search."""

    mean: Params
    trying: Array  # () bool, whether to try the step along `address`; otherwise measure a slope
    address: Any  # the address of z
    length: Array  # () float32, eta g
    unanswered: Array  # () int32, generations without a usable answer


@pytree
class Conservative:
    """Descent that stays where no step is better; see `zo_conservative`."""

    sigma: float
    learning_rate: float
    noise: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_sigma(self.sigma)

    def init(self, params: Params, key: Key) -> State:
        address = jax.tree.map(lambda a: a[0], self.noise.addresses(noises.replayable(key), 1))
        zero = jnp.zeros((), jnp.float32)
        mean = probes.movable(params, self.sigma)
        return State(mean, jnp.zeros((), bool), address, zero, jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        fresh = jax.tree.map(lambda a: a[0], self.noise.addresses(noises.replayable(key), 1))
        address = trees.where(state.trying, state.address, fresh)
        scale = jnp.where(state.trying, state.length, -jnp.asarray(self.sigma, jnp.float32))
        lengths = scale * jnp.array([0.0, -1.0, 1.0], jnp.float32)  # the signs of a genome, here steps along z
        three = jax.tree.map(lambda a: jnp.broadcast_to(a, (3, *a.shape)), address)
        decode = sampling.Perturbed(state.mean, 1.0, None, self.noise)
        # Measuring does not need the value of staying.
        return Population(decode, sampling.Genome(three, lengths), jnp.array([False, True, True]) | state.trying)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        stay, first, second = values
        # Measuring: the candidates are at +sigma and -sigma.
        pair = sampling.antithetic.used(jnp.stack([first, second]))
        (g,) = probes.average(probes.slopes(jnp.stack([first, second]), self.sigma))
        length = (self.learning_rate * g).astype(jnp.float32)
        # Trying: stay, -eta g, +eta g. If the answer for staying is lost, no step can be called better.
        ranked = jnp.where(answered(values), values, jnp.inf)
        best = jnp.argmin(ranked)
        taken = jnp.where(state.trying & answered(stay), population.genomes.sign[best], 0)
        addresses = jax.tree.map(lambda a: a[:1], population.genomes.address)
        mean = probes.step(state.mean, self.noise, addresses, -taken[None])
        address = jax.tree.map(lambda a: a[0], addresses)
        new = State(mean, ~state.trying, address, jnp.where(state.trying, 0, length), state.unanswered)
        compared = jnp.where(answered(stay), ranked, jnp.nan)
        return probes.settle_in_place(state, new, jnp.where(state.trying, compared, jnp.concatenate([pair, pair[:1]])))

    def recommend(self, state: State) -> Params:
        return state.mean


def zo_conservative(*, sigma: float = 1e-3, learning_rate: float = 1e-6, noise: Any = noises.gaussian) -> Conservative:
    """Conservative ZO (Zhang et al. 2024): the best of staying, a step and its opposite; two generations per step.

    Args:
        sigma: length of a probe, in units of the parameters.
        learning_rate: constant; one that is too large costs evaluations, but not the run.
        noise: `gaussian`, `rademacher`, or any other noise addressed by keys.

    >>> from evoopt import minimize
    >>> strategy = zo_conservative(learning_rate=0.2)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=400)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return Conservative(sigma, learning_rate, noise)
