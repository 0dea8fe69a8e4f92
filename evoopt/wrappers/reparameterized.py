"""Search in another space: the strategy moves u, candidates are transform(u). Bounds are one such transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from evoopt import trees
from evoopt.population import Population
from evoopt.types import Array, Key, Params, error, pytree


@pytree
class Transformed:
    """decode: genome -> transform(decode(genome))."""

    decode: Any
    transform: Any

    def __call__(self, genome: Any) -> Params:
        return self.transform(self.decode(genome))


@pytree
class Reparameterized:
    """A strategy in another space; see `reparameterized`."""

    strategy: Any
    transform: Any  # a pytree callable, u -> params
    inverse: Any  # a pytree callable, params -> u

    def oracle(self, objective: Any, has_aux: bool = False) -> Any:
        return self.strategy.oracle(objective, has_aux=has_aux)

    def init(self, params: Params, key: Key) -> Any:
        return self.strategy.init(self.inverse(trees.searchable(params)), key)

    def ask(self, state: Any, key: Key) -> Population:
        inner = self.strategy.ask(state, key)
        return Population(Transformed(inner.decode, self.transform), inner.genomes)

    def tell(self, state: Any, population: Population, answers: Any) -> Any:
        inner = Population(population.decode.decode, population.genomes)  # type: ignore[attr-defined]
        if isinstance(answers, tuple):  # the gradient was asked for at transform(u): the chain rule brings it to u

            def pull(genome: Any, grad: Params) -> Params:
                return jax.vjp(self.transform, inner.decode(genome))[1](grad)[0]

            answers = (answers[0], jax.vmap(pull)(inner.genomes, answers[1]))
        return self.strategy.tell(state, inner, answers)

    def recommend(self, state: Any) -> Params:
        return self.transform(self.strategy.recommend(state))


def reparameterized(
    strategy: Any, transform: Callable[[Any], Params], inverse: Callable[[Params], Any]
) -> Reparameterized:
    """`strategy` over u, where candidates are `transform(u)`; it starts at `inverse(x0)`.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import snes
    >>> positive = reparameterized(snes(16), jnp.exp, jnp.log)
    >>> best = minimize(lambda x: jnp.sum((x - 3.0) ** 2), jnp.ones(2), positive, generations=300).recommended
    >>> best.round(2).tolist()
    [3.0, 3.0]
    """
    return Reparameterized(strategy, Partial(transform), Partial(inverse))


def reflect(lower: Params, upper: Params, u: Params) -> Params:
    """U folded into [lower, upper] as by mirrors at the walls: the identity inside."""

    def fold(u: Array, low: Any, high: Any) -> Array:
        low, high = jnp.asarray(low, u.dtype), jnp.asarray(high, u.dtype)
        width = high - low
        offset = jnp.mod(u - low, 2 * width)
        # Inside, u itself: folding by arithmetic would round it.
        folded = jnp.clip(low + width - jnp.abs(offset - width), low, high)
        return jnp.where((u >= low) & (u <= high), u, folded)

    return jax.tree.map(fold, u, trees.like(lower, u), trees.like(upper, u))


def _inside(lower: Params, upper: Params, params: Params) -> Params:
    for name, x, low, high in _named(params, lower, upper):
        if not isinstance(x, Tracer) and not bool(jnp.all((x >= low) & (x <= high))):
            raise error(
                f"a start within the bounds at '{name}', [{low}, {high}]",
                f"values from {float(jnp.min(x)):g} to {float(jnp.max(x)):g}",
                "bounds in other units than the parameters",
            )
    return params


def _named(params: Params, lower: Params, upper: Params) -> list[tuple[str, Any, Any, Any]]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    lows, highs = jax.tree.leaves(trees.like(lower, params)), jax.tree.leaves(trees.like(upper, params))
    return [(trees.path_name(p), x, a, b) for (p, x), a, b in zip(paths, lows, highs, strict=True)]


def bounded(strategy: Any, lower: Params, upper: Params) -> Reparameterized:
    """`strategy` with candidates kept in [lower, upper] by reflection at the walls.

    Inside the box nothing changes, so sigma keeps its meaning; a candidate that would leave comes back mirrored.

    Args:
        strategy: any strategy, first-order ones too.
        lower, upper: numbers, or trees like the parameters.

    Raises:
        ValueError: when a lower bound is not below its upper one, or the start is outside.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import snes
    >>> f = lambda x: jnp.sum((x - jnp.array([0.5, 3.0])) ** 2)
    >>> minimize(f, jnp.zeros(2), bounded(snes(16), -1.0, 1.0), generations=200).best.round(2).tolist()
    [0.5, 1.0]
    """
    lows, highs = jax.tree.leaves(lower), jax.tree.leaves(upper)
    if len(lows) == len(highs):
        for low, high in zip(lows, highs, strict=True):
            if not bool(np.all(np.asarray(low) < np.asarray(high))):
                raise error("lower < upper", f"lower={low}, upper={high}", "bounds in the wrong order, or equal")
    return Reparameterized(strategy, Partial(reflect, lower, upper), Partial(_inside, lower, upper))
