"""Choices: a strategy on continuous vectors searches over discrete ones, decoded for evaluation.

Source: Awad, Mallik, Hutter, "Differential evolution for neural architecture search", arXiv 2012.06400, section 3: the
population stays continuous, in the unit cube, and is rounded to choices only for evaluation, so the strategy's
operators are unchanged and equal choices do not collapse the population.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evoopt import injection, trees
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, error, pytree


def _along(options: Any, treedef: Any) -> list[Any]:
    """The options of each leaf: how many there are, or an array or list of them."""
    array = lambda o: (jnp if any(isinstance(x, Tracer) for x in o) else np).asarray(o)
    return [array(o) if isinstance(o, list | tuple) else o for o in treedef.flatten_up_to(options)]


def _count(options: Any) -> Any:
    return options if np.ndim(options) == 0 else np.shape(options)[0]


@pytree
class Chosen:
    """decode: genome -> choices. A coordinate u with k options chooses option floor(k u), in [0, k - 1]."""

    inner: Any
    options: Any  # a tree like the parameters: numbers of options, or arrays (k,) of them

    def __call__(self, genome: Any) -> Params:
        return self.choose(self.inner(genome))

    def choose(self, unit: Params) -> Params:
        """Coordinates in [0, 1] -> indices, or the options themselves."""

        def one(u: Array, option: Any) -> Array:
            k = jnp.asarray(_count(option), u.dtype)
            index = jnp.clip(jnp.floor(u * k), 0, k - 1).astype(jnp.int32)
            return index if np.ndim(option) == 0 else jnp.asarray(option)[index]

        leaves, treedef = jax.tree.flatten(unit)
        return treedef.unflatten([one(u, o) for u, o in zip(leaves, _along(self.options, treedef), strict=True)])

    def unchoose(self, chosen: Params) -> Params:
        """Indices or options -> the middle of what chooses them; the nearest option stands for what is none."""

        def one(x: Array, option: Any) -> Array:
            k = _count(option)
            index = x if np.ndim(option) == 0 else jnp.abs(x[..., None] - jnp.asarray(option)).argmin(axis=-1)
            real = jnp.result_type(float)
            return (index.astype(real) + 0.5) / jnp.asarray(k, real)

        leaves, treedef = jax.tree.flatten(chosen)
        return treedef.unflatten([one(x, o) for x, o in zip(leaves, _along(self.options, treedef), strict=True)])


@pytree
class Choices:
    """A strategy over choices; see `choices`."""

    strategy: Any
    options: Any

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    def init(self, params: Params, key: Key) -> Any:
        treedef = jax.tree.structure(params)
        try:
            counts = treedef.unflatten([_count(o) for o in _along(self.options, treedef)])
        except (ValueError, TypeError) as reason:
            raise error(
                f"indices to start from with the structure of the options, {jax.tree.structure(self.options)}",
                f"{treedef}",
                "one option too many or too few",
            ) from reason

        def unit(path: tuple, index: Any, k: int) -> Array:
            name = trees.path_name(path)
            if not isinstance(k, Tracer) and not (k >= 1 and np.isfinite(k) and k == np.floor(k)):
                cause = "an empty list of options, or a range of numbers instead of how many there are"
                raise error(f"a whole number of options at '{name}', at least 1", str(k), cause)
            if not jnp.issubdtype(jnp.result_type(index), jnp.integer):
                got, cause = f"dtype {jnp.result_type(index)}", "the option itself instead of its index"
                raise error(f"an index to start from at '{name}'", got, cause, TypeError)
            known = not isinstance(index, Tracer) and not isinstance(k, Tracer)
            if known and not (np.clip(np.asarray(index), 0, int(k) - 1) == np.asarray(index)).all():
                raise error(f"an index in [0, {k - 1}] at '{name}'", str(index), "counting from 1")
            real = jnp.result_type(float)
            return (jnp.asarray(index).astype(real) + 0.5) / k

        return self.strategy.init(jax.tree_util.tree_map_with_path(unit, params, counts), key)

    def ask(self, state: Any, key: Key) -> Population:
        population = self.strategy.ask(state, key)
        return population.with_decode(Chosen(population.decode, self.options))

    def tell(self, state: Any, population: Population, answers: Any) -> Any:
        return self.strategy.tell(state, population.with_decode(population.decode.inner), answers)

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        back = lambda point: Chosen(None, self.options).unchoose(point)
        return lambda state, population, points: injection.through(moved, state, population, points, back, "inner")

    @property
    def dispersion(self) -> Any:
        return self.strategy.dispersion  # of what the strategy searches; an AttributeError where it has none

    def recommend(self, state: Any) -> Params:
        return Chosen(None, self.options).choose(self.strategy.recommend(state))


def choices(strategy: Any, options: Any) -> Choices:
    """Let `strategy` search over discrete choices, as neural architecture search does: every parameter is one.

    For choices beside numbers, choices that are text, whole numbers with an order, or conditions, take a space
    (`evoopt.spaces`), which also keeps what distributions (CMA-ES and its kin) choose from freezing.

    The strategy searches the unit cube: give it `lower=0.0, upper=1.0` if it takes bounds; coordinates outside choose
    the nearest option. The initial parameters are indices of any shape: an array (7,) of indices with 5 options is
    seven choices among five.

    Args:
        strategy: any strategy on float parameters.
        options: a tree like the parameters. A number k gives indices 0 to k - 1; an array or list (k,) its entries.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> from evoopt import strategies
    >>> options = {"operation": 5, "width": jnp.array([16.0, 32.0, 64.0])}
    >>> start = {"operation": jnp.zeros(4, jnp.int32), "width": 0}
    >>> loss = lambda a: jnp.sum(jnp.abs(a["operation"] - jnp.array([3, 1, 4, 1]))) + jnp.abs(a["width"] - 32.0)
    >>> strategy = choices(strategies.differential_evolution(20, lower=0.0, upper=1.0), options)
    >>> result = minimize(loss, start, strategy, generations=60)
    >>> result.best["operation"].tolist(), float(result.best["width"])
    ([3, 1, 4, 1], 32.0)
    """
    check_strategy(strategy)
    for option in jax.tree.leaves(options):
        if not isinstance(option, Tracer) and np.asarray(option).dtype.kind not in "iuf":
            cause = "names: give how many there are, and let the objective look up the name by its index"
            raise error("a number of options, or arrays of numbers", repr(option)[:80], cause, TypeError)
    return Choices(strategy, options)
