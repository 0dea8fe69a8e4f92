"""An ask/tell loop with tickets, for objectives outside JAX: answers told twice or to another generation fail."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.population import Population
from evoopt.types import Answers, Key, Params, error


class Generation(NamedTuple):
    """One generation's candidates and the ticket its answers must carry; iterates over the candidates."""

    number: int
    population: Population

    def __iter__(self) -> Iterator[Params]:  # type: ignore[override]
        return iter(self.population)

    def __len__(self) -> int:
        return len(self.population)


@functools.cache
def compiled(strategy: Any) -> tuple[Any, Any]:
    """The strategy's `ask` and `tell` under jit, for hosts that call them one at a time."""
    return jax.jit(strategy.ask), jax.jit(strategy.tell)


class Loop:
    """Holds the state of a search over generations that are evaluated elsewhere.

    >>> from evoopt.strategies import snes
    >>> loop = Loop(snes(16), [1.0, 2.0], key=0)
    >>> for _ in range(200):
    ...     generation = loop.ask()
    ...     values = [float(sum((x - 3) ** 2 for x in candidate)) for candidate in generation]
    ...     loop.tell(generation, values)
    >>> [round(float(x), 2) for x in loop.recommend()]
    [3.0, 3.0]

    Attributes:
        state: the strategy's state.
        number: generations told so far.
    """

    def __init__(self, strategy: Any, params: Params, *, key: Key | int = 0) -> None:
        self.strategy, self.key, self.number = strategy, noises.replayable(key), 0
        key_init, self._key_run = jax.random.split(self.key)
        self.state = trees.strong(strategy.init(params, key_init))
        self._ask, self._tell = jax.jit(strategy.ask), jax.jit(strategy.tell)

    def ask(self) -> Generation:
        """The current generation; the same one until it is told."""
        return Generation(self.number, self._ask(self.state, noises.fold_in(self._key_run, self.number)))

    def tell(self, generation: Generation, answers: Answers) -> None:
        """Update the state by the answers of `generation`: n floats in its order, NaN where there is none.

        Raises:
            ValueError: if that generation was told already, or is not the one last asked for. The state is unchanged.
        """
        if generation.number != self.number:
            raise error(
                f"the answers of generation {self.number}",
                f"those of generation {generation.number}",
                "the same answers told twice, or answers that came late from another worker",
            )
        if isinstance(answers, list):
            from evoopt.strategy import told

            answers = told(generation.population, answers)
        self.state = self._tell(self.state, generation.population, jax.tree.map(jnp.asarray, answers))
        self.number += 1

    def recommend(self) -> Params:
        """The point to use if the search ended now."""
        return self.strategy.recommend(self.state)
