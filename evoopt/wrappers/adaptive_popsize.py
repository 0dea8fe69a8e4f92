"""The popsize adapts to noise and ruggedness: it grows where updates contradict each other, and falls where they agree.

Source: Nishida and Akimoto, "PSA-CMA-ES: CMA-ES with population size adaptation", GECCO 2018. An evolution path of the
distribution's own parameters is compared with its length under random ranks. One deviation: that length is not the
paper's closed approximation, which holds for one strategy's constants, but is measured: the same generation is also
told with random ranks, and the mean of the squared lengths is taken over the last generations.

As in `restarts`, nothing is resized: candidates beyond the popsize are rows that are not active.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, told
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.strategies.covariance import recombination
from evoopt.types import Array, Key, Params, error, pytree, static
from evoopt.wrappers import step_size

FIRST = 4  # times 4 + floor(3 ln d) is the least popsize, unless it is given
ROOM = 16  # times the least is the largest one, unless the strategy has a popsize
MEMORY = 0.8  # of the squared length under random ranks


class State(NamedTuple):
    """The inner state, and what its updates agree on."""

    inner: Any
    popsize: Array  # () int32, active candidates, without restarts inside
    real: Array  # (), the popsize before rounding
    least: Array  # () int32
    path: Array  # (k,), p_theta
    gamma: Array  # (), its expected squared length under random ranks; 0 at the beginning
    neutral: Array  # (), the squared length of one step under random ranks
    key: Array
    generation: Array  # () int32

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


def best_step_size(popsize: Array, most: int, d: int) -> Array:
    """rho: the best step-size for log-rank weights of `popsize` candidates, up to a factor, ()."""
    i = jnp.arange(1, most + 1).astype(jnp.float32)
    m = popsize.astype(jnp.float32)
    inside = i <= m
    raw = jnp.where(inside, jnp.maximum(jnp.log((m + 1) / 2) - jnp.log(i), 0), 0)
    w = raw / jnp.maximum(raw.sum(), 1e-30)
    mu = 1 / (w * w).sum()
    expected = -ndtri(jnp.clip((i - 0.375) / (m + 0.25), 1e-6, 1 - 1e-6))  # of normal order statistics (Blom)
    c = (w * jnp.where(inside, expected, 0)).sum()
    return c * d * mu / (d - 1 + c * c * mu)


@pytree
class AdaptivePopsize:
    """A strategy whose popsize adapts; see `adaptive_popsize`."""

    strategy: Any
    popsize: int | None = static()
    alpha: float
    beta: float
    most: int | None = static(default=None)  # the largest popsize; None: the rows that there are

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    @property
    def _restarting(self) -> bool:
        return bool(getattr(self.strategy, "restarting", False))

    def _least(self, d: int) -> int:
        return self.popsize or FIRST * recombination.default_popsize(d)

    def _wide(self, d: int) -> Any:
        """The strategy with rows for the largest popsize."""
        if self._restarting or getattr(self.strategy, "popsize", 0) is not None:
            return self.strategy
        return dataclasses.replace(self.strategy, popsize=ROOM * self._least(d))

    def init(self, params: Params, key: Key) -> State:
        key = noises.replayable(key)
        d = trees.size(trees.searchable(params))
        wide = self._wide(d)
        inner = trees.strong(wide.init(params, key))
        rows = len(jax.eval_shape(wide.ask, inner, jax.eval_shape(lambda: jax.random.key(0))))
        least = jnp.asarray(inner.popsize if self._restarting else self._least(d), jnp.int32)
        if not self._restarting and rows < self._least(d):
            raise error(
                f"a strategy with a popsize of at least {self._least(d)}, the least there can be",
                f"popsize {rows}",
                "the wrapped strategy's popsize is the largest there can be: leave it out, or make it larger",
            )
        path = jax.eval_shape(self._travelled, inner, inner)
        zero = jnp.zeros((), path.dtype)
        # The first generations follow the popsize of the restarts inside, or the least one.
        return State(
            inner, least, least.astype(path.dtype), least, jnp.zeros(path.shape, path.dtype), zero, zero, key,
            jnp.zeros((), jnp.int32),
        )  # fmt: skip

    def _travelled(self, old: Any, new: Any) -> Array:
        strategy, old = step_size.innermost(self.strategy, old)
        return strategy.travelled(old, step_size.innermost(self.strategy, new)[1])

    def ask(self, state: State, key: Key) -> Population:
        d = trees.size(jax.eval_shape(self.strategy.recommend, state.inner))
        population = self._wide(d).ask(state.inner, key)
        return population if self._restarting else self._sized(population, state.popsize)

    def _sized(self, population: Population, popsize: Array) -> Population:
        first = jnp.arange(len(population), dtype=jnp.int32) < popsize
        return population.with_active(first if population.active is None else first & population.active)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = told(population, answers)
        if isinstance(values, tuple):
            raise error("values", "values and gradients", "a first-order strategy, which has no population", TypeError)
        if not self._restarting:
            population = self._sized(population, state.popsize)
        values = jnp.where(population.active, values, jnp.nan)
        inner = self.strategy.tell(state.inner, population, values)
        begun = inner.restarts != state.inner.restarts if self._restarting else jnp.asarray(False)

        key = noises.fold_in(state.key, state.generation)
        chance = jnp.where(answered(values), jax.random.uniform(key, values.shape, values.dtype), jnp.nan)
        strategy, before = step_size.innermost(self.strategy, state.inner)
        beside = strategy.tell(before, population, chance)
        length = (strategy.travelled(before, beside) ** 2).sum()
        neutral = jnp.where(state.gamma > 0, MEMORY * state.neutral + (1 - MEMORY) * length, length)

        beta, dtype = jnp.asarray(self.beta, state.path.dtype), state.path.dtype
        step = self._travelled(state.inner, inner) / jnp.sqrt(jnp.maximum(neutral, jnp.finfo(dtype).tiny))
        path = (1 - beta) * state.path + jnp.sqrt(beta * (2 - beta)) * step  # p_theta
        gamma = (1 - beta) ** 2 * state.gamma + beta * (2 - beta)
        agreement = (path**2).sum() / jnp.asarray(self.alpha, dtype)
        most = self.most or (self.strategy.most if self._restarting else None) or len(population)
        real = state.real * jnp.exp(jnp.clip(beta * (gamma - agreement), -2, 2))  # no jump of more than e^2
        real = jnp.clip(real, state.least.astype(dtype), most)
        old, new = inner.popsize if self._restarting else state.popsize, jnp.round(real).astype(jnp.int32)
        d = trees.size(jax.eval_shape(self.strategy.recommend, state.inner))
        larger = best_step_size(new, most, d) / best_step_size(old, most, d)

        good = jnp.isfinite(values).any() & jnp.isfinite(path).all() & ~begun
        larger = jnp.where(good, larger, 1)
        neutral = neutral * jnp.where(
            new == old, 1, old.astype(dtype) / new.astype(dtype)
        )  # a step's is as 1 / popsize
        chosen = jnp.where(good, new, old)
        inner = step_size.scaled(inner, larger)
        if self._restarting:
            inner = inner._replace(popsize=chosen)
        pick = lambda a, b: jnp.where(good, a, jnp.where(begun, jnp.zeros_like(b), b))
        return State(
            inner, chosen, jnp.where(begun, old.astype(dtype), jnp.where(good, real, state.real)),
            jnp.where(begun, old, state.least), pick(path, state.path), pick(gamma, state.gamma),
            pick(neutral, state.neutral), state.key,
            state.generation + jnp.isfinite(values).any().astype(jnp.int32),
        )  # fmt: skip

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        return lambda state, population, points: moved(state.inner, population, points)

    @property
    def dispersion(self) -> Any:
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        return lambda state, i: dispersion(state.inner, i)

    def recommend(self, state: State) -> Params:
        return self.strategy.recommend(state.inner)


def adaptive_popsize(
    strategy: Any, popsize: int | None = None, *, alpha: float = 1.4, beta: float = 0.4
) -> AdaptivePopsize:
    """`strategy`, whose popsize grows under noise and on rugged functions, and falls where there is progress.

    Nishida and Akimoto 2018. A generation costs a second `tell` of the strategy, with random ranks. Candidates that are
    not active are not evaluated, except that without a `batch_size` `minimize` computes all of them at once.

    Args:
        strategy: `cma_es()`, or restarts of it: `ipop(cma_es(512), 32)`, whose popsize after each restart is then the
            least one. Its popsize is the largest there can be; None is 16 times the least.
        popsize: the least and first one; None is 4 (4 + floor(3 ln d)), four times that of CMA-ES. On the hardest of
            COCO's noisy functions it solved .31 in 5-D (36 runs, 1e4 D evaluations), and .22 from once that, as the
            paper starts.
        alpha: popsizes grow while the path is shorter than the root of alpha times that of random ranks.
        beta: rate of the path and of the popsize.

    Raises:
        ValueError: for a popsize below 2, or at `init` for a strategy with fewer rows.
        TypeError: for a strategy that does not say how far its distribution travels.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> noisy = lambda x, key, own: jnp.sum((x - 1.0) ** 2) + 0.1 * jax.random.normal(own)
    >>> renewed = lambda key, aux: jax.random.split(key, 1)[0]
    >>> options = {"context": jax.random.key(1), "each": jax.random.split, "update": renewed, "evaluations": 6000}
    >>> result = minimize(noisy, jnp.zeros(3), adaptive_popsize(cma_es()), **options)
    >>> int(result.state.popsize) > 28, bool(jnp.abs(result.recommended - 1.0).max() < 0.2)
    (True, True)
    """
    check_strategy(strategy)
    if popsize is not None:
        check_popsize(popsize, 2)
    inner = strategy
    while getattr(inner, "restarting", False):
        inner = inner.strategy
    if not hasattr(inner, "travelled"):
        raise error(
            "a strategy with a method `travelled`: cma_es, or restarts of it",
            type(inner).__name__,
            "a wrapper between them, which goes outside, or a strategy that adapts no covariance: use `reevaluated`",
            TypeError,
        )
    return AdaptivePopsize(strategy, popsize, alpha, beta)
