"""Populations of vectors over a space, with operators for what is not real.

Whole numbers are rounded up or down by chance, so that their expectation is the vector's; choices are drawn again with
a small probability, because differences and crossover do not make what no member has. What is told is the point that
was evaluated.

Source: Li et al., "Mixed integer evolution strategies for parameter optimization", Evolutionary Computation 21 (2013),
section 3.3 (uniform reset of nominal variables).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.injection import through
from evoopt.population import Population
from evoopt.spaces.kinds import Categorical, Integer
from evoopt.spaces.plain import Decoded
from evoopt.spaces.space import Space
from evoopt.strategies.populations import variation
from evoopt.types import Array, Key, Params, pytree, static


@pytree
class Native:
    """A population strategy over a space; see `over`."""

    strategy: Any
    space: Space = static()

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    def init(self, params: Params, key: Key) -> Any:
        return self.strategy.init(self.space.checked(params), key)

    def ask(self, state: Any, key: Key) -> Population:
        key = noises.replayable(key)
        inner = self.strategy.ask(state, key)
        keys = jax.random.split(noises.fold_in(key, _OPERATORS), len(inner))
        points = jax.vmap(self._varied)(inner.decoded(), keys)
        inner = self.strategy.moved(state, inner, points)
        return inner.with_decode(Decoded(inner.decode, self.space))

    def tell(self, state: Any, population: Population, answers: Any) -> Any:
        return self.strategy.tell(state, population.with_decode(population.decode.inner), answers)

    def moved(self, state: Any, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        return through(self.strategy.moved, state, population, points, self.space.located, "inner")

    def recommend(self, state: Any) -> Params:
        return self.space.decode(self.strategy.recommend(state))

    def _varied(self, u: dict[str, Array], key: Key) -> dict[str, Array]:
        """u after rounding by chance and resetting choices, as the u of its candidate."""
        values, free = {}, self.space.free
        rate = 1 / len(free)
        for i, (name, variable) in enumerate(sorted(free.items())):
            own = noises.fold_in(key, i)
            kind, shape = u[name].dtype, getattr(variable, "shape", ())
            if isinstance(variable, Integer):
                values[name] = variable.drawn(u[name], variation.uniforms(own, shape, kind))
            elif isinstance(variable, Categorical):
                drawn, reset = jax.random.split(own)
                other = variation.integers(drawn, shape, variable.k)
                again = variation.uniforms(reset, shape, kind) < rate / _elements(shape)
                values[name] = variable.value(jnp.where(again, other, variable.index(u[name])))
            else:
                values[name] = variable.decode(u[name])
        existing = self.space.existing(self.space.everything(values))
        told = {name: v.encode(values[name]).astype(u[name].dtype) for name, v in free.items()}
        # What does not exist keeps its u, so that it is there when it exists again.
        return {name: jnp.where(existing[name], told[name], u[name]) if name in existing else told[name] for name in u}


def _elements(shape: tuple[int, ...]) -> int:
    return trees.size(jax.ShapeDtypeStruct(shape, jnp.float32))


_OPERATORS = 0x6F706572  # folded into the key for the operators
