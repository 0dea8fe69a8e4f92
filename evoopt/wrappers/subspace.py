"""Search a random linear subspace through the start: a few numbers instead of many parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The inner state over u, and the parts of params = origin + scale A u."""

    inner: Any
    origin: Params
    key: Key  # (), key of A

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class Spanned:
    """u (k,) -> origin + scale sum_j u_j a_j, with the columns a_j of A redrawn one at a time."""

    origin: Params
    key: Key
    scale: Any
    noise: Any

    def __call__(self, u: Array) -> Params:
        weights = jnp.asarray(self.scale, u.dtype) * u
        return noises.add_weighted(self.origin, self.noise, self.noise.addresses(self.key, u.shape[0]), weights)


@pytree
class Decoded:
    """decode: genome -> the parameters of its u."""

    decode: Any
    spanned: Spanned

    def __call__(self, genome: Any) -> Params:
        return self.spanned(self.decode(genome))


@pytree
class Subspace:
    """A strategy in a random subspace; see `subspace`."""

    strategy: Any
    dimension: int = static()
    scale: float
    noise: Any

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> State:
        origin, (first, second) = trees.searchable(params), jax.random.split(noises.replayable(key))
        return State(self.strategy.init(jnp.zeros(self.dimension, jnp.float32), first), origin, second)

    def spanned(self, state: State) -> Spanned:
        return Spanned(state.origin, state.key, self.scale, self.noise)

    def ask(self, state: State, key: Key) -> Population:
        inner = self.strategy.ask(state.inner, key)
        return inner.with_decode(Decoded(inner.decode, self.spanned(state)))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        inner = population.with_decode(population.decode.decode)  # type: ignore[attr-defined]
        if isinstance(answers, tuple):  # the gradient is with respect to the parameters: the chain rule brings it to u
            pull = lambda genome, grad: jax.vjp(self.spanned(state), inner.decode(genome))[1](grad)[0]
            answers = (answers[0], jax.vmap(pull)(inner.genomes, answers[1]))
        return state._replace(inner=self.strategy.tell(state.inner, inner, answers))

    @property
    def dispersion(self) -> Any:
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        return lambda state, i: dispersion(state.inner, i)

    def recommend(self, state: State) -> Params:
        return self.spanned(state)(self.strategy.recommend(state.inner))


def subspace(strategy: Any, dimension: int, *, scale: float = 1.0, noise: Any = noises.gaussian) -> Subspace:
    """`strategy` over u (dimension,), where candidates are x0 + scale A u with random columns of A; it starts at u = 0.

    The columns are redrawn from their keys wherever they are needed, never stored: a candidate costs `dimension` draws
    of noise. Aghajanyan, Zettlemoyer, Gupta 2021: language models can be fine-tuned in a few hundred dimensions.

    Args:
        strategy: any strategy.
        dimension: dimension of the subspace.
        scale: standard deviation of a step of length 1 along one coordinate of u, in units of the parameters.
        noise: distribution of A: `gaussian`, `rademacher`, ...

    >>> from evoopt import minimize
    >>> from evoopt.strategies import snes
    >>> f = lambda x: (x.mean() - 3.0) ** 2
    >>> result = minimize(f, jnp.zeros(1000), subspace(snes(16), 5), generations=300)
    >>> bool(f(result.recommended) < 1e-4)
    True
    """
    check_strategy(strategy)
    if dimension < 1:
        raise error("a subspace of at least 1 dimension", str(dimension), "a division that rounded down to zero")
    return Subspace(strategy, dimension, scale, noise)
