"""`over`: any strategy searches a space."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.checks import check_strategy
from evoopt.spaces.kinds import Real, Simplex
from evoopt.spaces.mixed import Mixed
from evoopt.spaces.native import Native
from evoopt.spaces.plain import Plain
from evoopt.spaces.space import Space, is_space
from evoopt.strategy import value
from evoopt.types import Params, error


def over(strategy: Any, space: Any) -> Any:
    """`strategy` searches `space`: a strategy whose candidates are those of the space, always inside it.

    `minimize` and `Session` do this by themselves where they are given a space instead of a start. Used alone, it is
    started with `space.encode(candidate)`, or `space.origin()`.

    - A strategy with a distribution (`dispersion`: CMA-ES and its kin): whole numbers and two-way choices are
      coordinates with a floor and centering (Marty et al. 2024), so that none freezes; neighbours in an order keep a
      chance to change places; a category with more choices has a distribution of its own beside the strategy's (CatCMA,
      Hamano et al. 2024).
    - A population of vectors (`moved`: differential evolution, genetic algorithms, swarms, random search): whole
      numbers are rounded by chance, choices drawn again with a small probability, and what is told is the point that
      was evaluated. One that takes bounds and has none gets those of the space, and begins evenly spread in it.
    - Any other, and one with a single candidate a generation that has no `moved`, moves u, and its candidates are what
      u decodes to.

    Raises:
        ValueError: for a strategy whose genomes are keys, or that asks for derivatives, and a space that is not real.

    >>> import jax
    >>> from evoopt.spaces import integer, real
    >>> from evoopt.strategies import cma_es
    >>> space = Space({"x": real(-1.0, 1.0), "n": integer(0, 9)})
    >>> strategy = over(cma_es(6), space)
    >>> population = strategy.ask(strategy.init(space.origin(), jax.random.key(0)), jax.random.key(1))
    >>> sorted(next(iter(population)))
    ['n', 'x']
    """
    check_strategy(strategy)
    space = space if isinstance(space, Space) else Space(space)
    if not space.free:
        raise error("a space with something to search", numbers_of(space), "every variable has one value only")
    real = all(isinstance(v, (Real, Simplex)) for v in space.free.values())
    several = real or _population(strategy, space) > 1  # one candidate has no rank, by which categories learn
    wide = several and (hasattr(strategy, "dispersion") or hasattr(strategy, "running_dispersion"))
    if wide and not real:
        return Mixed(strategy, space)
    if hasattr(strategy, "moved") and not wide:
        return Native(_boxed(strategy, space), space)
    return Plain(strategy, space)


def numbers_of(space: Space) -> str:
    return " ".join(repr(space).split())[:80]


def _population(strategy: Any, space: Space) -> int:
    """The number of candidates of a strategy; raises for one that searches real numbers only."""
    name = next(n for n, v in space.free.items() if not isinstance(v, (Real, Simplex)))
    what = type(space.free[name]).__name__.lower()
    expected = f"a strategy of values and vectors for '{name}', which is {what}"
    f = lambda x: x
    if strategy.oracle(f) is not f and strategy.oracle is not value:
        cause = "whole numbers, choices and orders have no derivative: cma_es() or differential_evolution()"
        raise error(expected, f"{type(strategy).__name__}, which asks for derivatives", cause)

    def asked() -> Any:
        key = jax.random.key(0)
        return strategy.ask(strategy.init({"u": jnp.zeros(4)}, key), key)

    population = jax.eval_shape(asked)
    leaves = jax.tree.leaves(population.genomes)
    keys = [x for x in leaves if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) or x.dtype == jnp.uint32]
    if keys:
        cause = "a strategy for large models: cma_es() or differential_evolution() hold vectors"
        raise error(expected, f"{type(strategy).__name__}, whose genomes are keys", cause)
    return len(population)


def _boxed(strategy: Any, space: Space) -> Any:
    """The strategy between the walls of the space, if it takes bounds and was given none."""
    if not all(hasattr(strategy, side) and getattr(strategy, side) is None for side in ("lower", "upper")):
        return strategy
    boxes = {name: v.box() for name, v in space.free.items()}
    sides = [{name: box[i] for name, box in boxes.items()} for i in (0, 1)]
    return dataclasses.replace(strategy, lower=sides[0], upper=sides[1])


def entered(x0: Params, strategy: Any) -> tuple[Params, Any, Space | None]:
    """What `minimize` and `Session` search where they are given a space: (start, strategy, space).

    Anything else is returned as it is, with None.
    """
    if not is_space(x0):
        return x0, strategy, None
    space = x0 if isinstance(x0, Space) else Space(x0)
    return trees.strong(space.origin()), over(strategy, space), space


@dataclasses.dataclass(frozen=True)
class Presented:
    """A function of a candidate as objectives in Python get it, for one as objectives in JAX get it."""

    f: Any
    space: Space

    def __call__(self, candidate: Params, *args: Any) -> Any:
        return self.f(self.space.presented(candidate), *args)
