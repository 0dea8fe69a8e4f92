"""Search only some of the leaves; the others stay fixed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from evoopt import injection, trees
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The inner state, and the leaves that are not searched."""

    inner: Any
    fixed: list[Array]

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class Merged:
    """decode: genome -> the whole tree. Fixed leaves are shared by all candidates."""

    decode: Any
    fixed: list[Array]
    chosen: tuple[bool, ...] = static()
    treedef: Any = static()

    def __call__(self, genome: Any) -> Params:
        return self._merged(self.decode(genome))

    def virtual(self, genome: Any) -> Params:
        return self._merged(getattr(self.decode, "virtual", self.decode)(genome))

    def _merged(self, free: Params) -> Params:
        parts, fixed = zip(self.treedef.flatten_up_to(free), self.chosen, strict=True), iter(self.fixed)
        return self.treedef.unflatten([part if chosen else next(fixed) for part, chosen in parts])


@pytree
class Masked:
    """A strategy over the chosen leaves; see `masked`."""

    strategy: Any
    chosen: tuple[bool, ...] = static()
    treedef: Any = static()

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> State:
        leaves, treedef = jax.tree.flatten(params)
        if treedef != self.treedef:
            raise error(f"parameters like the mask: {self.treedef}", str(treedef), "a mask made for another model")
        fixed = trees.strong([x for x, c in zip(leaves, self.chosen, strict=True) if not c])
        return State(self.strategy.init(self._free(leaves), key), fixed)

    def _free(self, leaves: list[Any]) -> Params:
        """The searched leaves under their names in the whole tree, because a stack of layers is known by its name."""
        return self.treedef.unflatten([x if c else None for x, c in zip(leaves, self.chosen, strict=True)])

    def ask(self, state: State, key: Key) -> Population:
        inner = self.strategy.ask(state.inner, key)
        return inner.with_decode(Merged(inner.decode, state.fixed, self.chosen, self.treedef))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        if isinstance(answers, tuple):  # gradients are of the whole tree
            values, grads = answers
            answers = (values, self._free(jax.tree.leaves(grads)))
        inner = population.with_decode(population.decode.decode)  # type: ignore[attr-defined]
        return State(self.strategy.tell(state.inner, inner, answers), state.fixed)

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        free = lambda point: self._free(jax.tree.leaves(point))
        return lambda state, population, points: injection.through(moved, state.inner, population, points, free)

    @property
    def dispersion(self) -> Any:
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        return lambda state, i: dispersion(state.inner, i)

    def recommend(self, state: State) -> Params:
        return Merged(lambda free: free, state.fixed, self.chosen, self.treedef)(self.strategy.recommend(state.inner))


def masked(strategy: Any, mask: Params) -> Masked:
    """`strategy` over the leaves where `mask` is True; the fixed leaves may have any dtype.

    Args:
        strategy: any strategy.
        mask: a tree of bools like the parameters.

    Raises:
        ValueError: if no leaf is chosen, or at `init` if the parameters have another structure.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> from evoopt.strategies import snes
    >>> f = lambda p: jnp.sum((p["w"] - 1.0) ** 2 + (p["scale"] - 1.0) ** 2)
    >>> search = masked(snes(16), {"w": True, "scale": False})
    >>> best = minimize(f, {"w": jnp.zeros(2), "scale": jnp.zeros(2)}, search, generations=200).recommended
    >>> best["w"].round(2).tolist(), best["scale"].tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """
    check_strategy(strategy)
    chosen, treedef = jax.tree.flatten(mask)
    if not any(chosen):
        raise error(
            "a mask that chooses at least one leaf", "only False", "the mask of frozen leaves was given instead"
        )
    return Masked(strategy, tuple(bool(c) for c in chosen), treedef)
