"""One block at a time: each block has its own strategy, and the other blocks are held fixed meanwhile."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, error, pytree


class State(NamedTuple):
    """All blocks' states, and whose turn it is."""

    inner: Any  # every leaf has the blocks as leading axis
    params: Params  # every block as its strategy recommends it
    turn: Array  # () int32, the block to search next

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered.sum().astype(jnp.int32)


@pytree
class Inserted:
    """decode: genome of a block -> all blocks."""

    decode: Any
    params: Params
    turn: Array

    def __call__(self, genome: Any) -> Params:
        return jax.tree.map(lambda x, b: x.at[self.turn].set(b), self.params, self.decode(genome))


@pytree
class Alternating:
    """A strategy over blocks in turn; see `alternating`."""

    strategy: Any

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> State:
        params = trees.searchable(params)
        sizes = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(params)}
        if len(sizes) != 1 or None in sizes:
            raise error(
                "parameters whose leaves all have the blocks as leading axis",
                f"leading axes {sorted(map(str, sizes))}",
                "one prompt for all layers, or blocks of different sizes",
            )
        blocks = jax.tree.leaves(params)[0].shape[0]
        inner = jax.vmap(self.strategy.init)(params, jax.random.split(noises.replayable(key), blocks))
        return State(trees.strong(inner), params, jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        inner = self.strategy.ask(jax.tree.map(lambda x: x[state.turn], state.inner), key)
        return inner.with_decode(Inserted(inner.decode, state.params, state.turn))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        turn = state.turn
        if isinstance(answers, tuple):  # gradients are of all blocks
            values, grads = answers
            answers = (values, jax.tree.map(lambda g: g[:, turn], grads))
        inner = population.with_decode(population.decode.decode)  # type: ignore[attr-defined]
        before = jax.tree.map(lambda x: x[turn], state.inner)
        after = self.strategy.tell(before, inner, answers)
        answered = after.unanswered == before.unanswered  # if not, the block is asked again
        block = self.strategy.recommend(after)
        params = jax.tree.map(lambda x, b: x.at[turn].set(jnp.where(answered, b, x[turn])), state.params, block)
        blocks = jax.tree.leaves(params)[0].shape[0]
        inner_states = jax.tree.map(lambda x, new: x.at[turn].set(new), state.inner, after)
        return State(inner_states, params, jnp.where(answered, (turn + 1) % blocks, turn).astype(jnp.int32))

    def recommend(self, state: State) -> Params:
        return state.params


def alternating(strategy: Any) -> Alternating:
    """`strategy` on each block of the parameters separately, one generation each in turn.

    A block is a place on the leading axis, which all leaves share, such as a layer of a stack. Every block has its own
    state; while it is searched, the others are held where their strategies recommend them. This divides problems too
    large for one covariance matrix.

    Args:
        strategy: any strategy; its `unanswered` tells whether a block's turn is over.

    Raises:
        ValueError: at `init`, if the leaves' leading axes differ.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import snes
    >>> f = lambda x: jnp.sum((x - 1.0) ** 2) + (x[0, 0] - x[1, 1]) ** 2
    >>> minimize(f, jnp.zeros((2, 3)), alternating(snes(16)), generations=400).recommended.round(2).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    check_strategy(strategy)
    return Alternating(strategy)
