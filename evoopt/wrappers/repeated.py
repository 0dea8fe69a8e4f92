"""Evaluate each candidate several times, and tell the mean: the plainest treatment of noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evoopt.answers import answered, as_values, told
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, error, pytree, static

Combine = Callable[[Array], Array]  # (k, n, ...), NaN where there is no answer -> (n, ...)


def mean(rows: Array) -> Array:
    """The mean of the repeats that were answered: (k, n, ...) -> (n, ...)."""
    return jnp.nanmean(rows, axis=0)


def median(rows: Array) -> Array:
    """Their median, which outliers leave where it is: (k, n, ...) -> (n, ...)."""
    return jnp.nanmedian(rows, axis=0)


@pytree
class Repeated:
    """A strategy whose candidates are evaluated k times each; see `repeated`."""

    strategy: Any
    k: int = static()
    combine: Combine = static()

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> Any:
        return self.strategy.init(params, key)

    def ask(self, state: Any, key: Key) -> Population:
        population = self.strategy.ask(state, key)
        return population[jnp.tile(jnp.arange(len(population), dtype=jnp.int32), self.k)]

    def tell(self, state: Any, population: Population, answers: Any) -> Any:
        answers = told(population, answers)
        n = len(population) // self.k
        ok = answered(as_values(answers))
        rows = lambda a: jnp.where(ok.reshape(-1, *(1,) * (a.ndim - 1)), a, jnp.nan).reshape(self.k, n, *a.shape[1:])
        return self.strategy.tell(state, population[:n], jax.tree.map(lambda a: self.combine(rows(a)), answers))

    def recommend(self, state: Any) -> Params:
        return self.strategy.recommend(state)


def repeated(strategy: Any, k: int, combine: Combine = mean) -> Repeated:
    """`strategy`, whose candidates are evaluated k times each and answered by the mean.

    The noise of the mean is that of one answer over the root of k; a population k times as large often does more for
    the same evaluations (`restarts.ipop`). Repeats without an answer are left out. The population has k blocks of n
    rows: row j n + i is repeat j of candidate i.

    Args:
        strategy: any strategy. Restarts go inside: they count rows.
        k: evaluations of each candidate, at least 1.
        combine: `mean` or `median` of this module, or another function of (k, n, ...), NaN where there is no answer.

    Raises:
        ValueError: for a k below 1.
        TypeError: for something that is not a strategy or not a function.

    Common random numbers: candidates that meet the same noise are compared without it. The noise comes from a key, that
    is the context (one key for all candidates of a generation) or a row of `each` (a key for each repeat, shared by all
    candidates of that repeat).

    >>> from evoopt import minimize
    >>> from evoopt.strategies import snes
    >>> noisy = lambda x, key, own: jnp.sum((x - 1.0) ** 2) * (1 + jax.random.normal(own))
    >>> keys = lambda key, n: jnp.repeat(jax.random.split(key, 4), n // 4)
    >>> renewed = lambda key, aux: jax.random.split(key, 1)[0]
    >>> options = {"context": jax.random.key(1), "each": keys, "update": renewed, "generations": 300}
    >>> result = minimize(noisy, jnp.zeros(3), repeated(snes(16), 4), **options)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-3)
    True
    """
    check_strategy(strategy)
    check_popsize(k, 1, name="k")
    if not callable(combine):
        raise error("a function, such as repeated.median", repr(combine)[:60], "its name as a string", TypeError)
    return Repeated(strategy, k, combine)
