"""Any strategy over a space: it moves u, candidates are what u decodes to."""

from __future__ import annotations

from typing import Any

import jax

from evoopt.injection import through
from evoopt.population import Population, transform_virtual
from evoopt.spaces.space import Space
from evoopt.types import Key, Params, pytree, static


@pytree
class Decoded:
    """decode: genome -> the candidate of its u."""

    inner: Any
    space: Space = static()

    def __call__(self, genome: Any) -> Params:
        return self.space.decode(self.inner(genome))

    def virtual(self, genome: Any) -> Params:
        """The same candidate; numbers without bounds stay virtual, all else is made whole."""
        return transform_virtual(self.space.opened, getattr(self.inner, "virtual", self.inner)(genome))

    def present(self, candidate: Params) -> Any:
        """What an objective in Python gets."""
        return self.space.presented(candidate)


@pytree
class Plain:
    """A strategy over a space; see `over`."""

    strategy: Any
    space: Space = static()

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> Any:
        return self.strategy.init(self.space.checked(params), key)

    def ask(self, state: Any, key: Key) -> Population:
        inner = self.strategy.ask(state, key)
        return inner.with_decode(Decoded(inner.decode, self.space))

    def tell(self, state: Any, population: Population, answers: Any) -> Any:
        inner = population.with_decode(population.decode.inner)  # type: ignore[attr-defined]
        if isinstance(answers, tuple):  # the chain rule brings gradients to u

            def pull(genome: Any, grad: Params) -> Params:
                return jax.vjp(self.space.decode, inner.decode(genome))[1](grad)[0]

            answers = (answers[0], jax.vmap(pull)(inner.genomes, answers[1]))
        return self.strategy.tell(state, inner, answers)

    def recommend(self, state: Any) -> Params:
        return self.space.decode(self.strategy.recommend(state))

    @property
    def moved(self) -> Any:
        moved, back = self.strategy.moved, self.space.located  # an AttributeError where the strategy has none
        return lambda state, population, points: through(moved, state, population, points, back, "inner")

    @property
    def dispersion(self) -> Any:
        """The width of the strategy's distribution, in units of u."""
        return self.strategy.dispersion
