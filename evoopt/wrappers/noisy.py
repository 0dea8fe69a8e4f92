"""One word for a noisy objective: it chooses what treats the noise, and recommends what is not a lucky draw."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.answers import as_values
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, pytree, static
from evoopt.wrappers import step_size
from evoopt.wrappers.adaptive_popsize import adaptive_popsize
from evoopt.wrappers.reevaluated import reevaluated

MOST = 8  # evaluations of one candidate, where its popsize can't adapt
LEVEL = 0.1  # weight of a generation's median in the level of a run


class State(NamedTuple):
    """The inner state, and the middle of the distribution's last places."""

    inner: Any
    mean: Params  # of this run's distributions, each weighted by the inverse of its variance
    weight: Array  # (), the sum of weights, of which the newest is 1
    width: Array  # (), standard deviation of the newest
    level: Array  # (), the median value lately, of this run
    steps: Array  # () int32, generations of this run
    other: Params  # the middle of the best earlier run
    other_level: Array  # (), +inf without one

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class Noisy:
    """A strategy with a treatment of noise; see `noisy`."""

    strategy: Any  # what was chosen
    window: float
    confirmations: int = static()  # evaluations of the recommendation that `minimize` makes at the end

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    def init(self, params: Params, key: Key) -> State:
        inner = trees.strong(self.strategy.init(params, key))
        real = lambda x: jnp.asarray(x, jnp.result_type(float))
        mean, width = self._middle(inner)
        return State(
            inner, mean, real(0), width.astype(real(0).dtype), real(jnp.inf), jnp.zeros((), jnp.int32), mean,
            real(jnp.inf),
        )  # fmt: skip

    def _middle(self, inner: Any) -> tuple[Params, Array]:
        """What the strategy inside recommends, and its distribution's width; 1 without one."""
        strategy, state = step_size.innermost(self.strategy.strategy, inner.inner)
        place, width = strategy.recommend(state), jnp.ones(())
        if hasattr(strategy, "dispersion"):
            std = strategy.dispersion(state, jnp.zeros((), jnp.int32)).std
            width = jnp.sqrt((std**2).mean())
        return place, width

    def _restarts(self, inner: Any) -> Array:
        return inner.inner.restarts if hasattr(inner.inner, "restarts") else jnp.zeros((), jnp.int32)

    def ask(self, state: State, key: Key) -> Population:
        return self.strategy.ask(state.inner, key)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        inner = self.strategy.tell(state.inner, population, answers)
        values = jnp.asarray(as_values(answers))
        values = jnp.where(jnp.isfinite(values), values, jnp.nan).astype(state.level.dtype)
        if population.active is not None:
            values = jnp.where(population.active, values, jnp.nan)
        some, begun = jnp.isfinite(values).any(), self._restarts(inner) != self._restarts(state.inner)
        dtype = state.weight.dtype

        # A run that has ended may be the best so far.
        better = begun & (state.level < state.other_level)
        other = trees.where(better, state.mean, state.other)
        other_level = jnp.where(better, state.level, state.other_level)
        before = jnp.where(begun, 0, state.weight)
        steps = jnp.where(begun, 0, state.steps)

        place, width = self._middle(inner)
        width = width.astype(dtype)
        keep = 1 - 1 / jnp.asarray(self.window, dtype)
        weight = 1 + keep * before * (width / jnp.maximum(state.width, jnp.finfo(dtype).tiny)) ** 2
        weight = jnp.where(jnp.isfinite(weight), weight, 1)
        if not hasattr(step_size.innermost(self.strategy.strategy, inner.inner)[0], "dispersion"):
            weight = jnp.ones_like(weight)  # one candidate is not the middle of anything
        toward = lambda old, x: old + (x - old) / weight.astype(old.dtype)
        mean = jax.tree.map(toward, state.mean, place)
        median = jnp.nanmedian(values)
        rate = jnp.maximum(LEVEL, 1 / (steps + 1).astype(dtype))
        level = jnp.where(steps == 0, median, state.level + rate * (median - state.level))
        # After a restart the values still are those of the run that ended: the next generation begins the new one.
        fresh = State(
            inner, place, jnp.zeros_like(weight), width, jnp.full_like(level, jnp.inf), jnp.zeros_like(steps),
            other, other_level,
        )  # fmt: skip
        gone_on = State(inner, mean, weight, width, level, steps + 1, other, other_level)
        return trees.where(some, trees.where(begun, fresh, gone_on), state._replace(inner=inner))

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        return lambda state, population, points: moved(state.inner, population, points)

    @property
    def dispersion(self) -> Any:
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        return lambda state, i: dispersion(state.inner, i)

    def recommend(self, state: State) -> Params:
        """The middle of the last distributions, of the run whose values were best."""
        return trees.where(state.other_level < state.level, state.other, state.mean)


def noisy(strategy: Any, *, window: int = 100, confirmations: int = 16) -> Noisy:
    """`strategy` for an objective with noise.

    The rule, from measurements on COCO's noisy suite (`benchmarks/problems.py --suite bbob-noisy`):

    - CMA-ES, and restarts of it: `adaptive_popsize`. A larger population averages noise and keeps all its evaluations
      different, which is worth more than repeats.
    - any other strategy that reads values: `reevaluated`, with up to 8 evaluations of each candidate, and a larger
      step-size where those are not enough.

    What it recommends is the mean of about the last `window` centres of its distribution, each weighted by the inverse
    of the distribution's variance: in a search that converges, the newest; in one that wanders about the optimum, all.
    Strategies without a distribution recommend what they always do. `minimize` evaluates the recommendation
    `confirmations` times at the end, within the budget; `best` is then this point and `best_value` the mean of these
    answers.

    For noise that a key decides, see common random numbers in `repeated`; for bounds, `bounded(noisy(cma_es()), ...)`.
    First-order strategies average their answers by `repeated`, and their places by `averaged`.

    Args:
        strategy: cma_es(), ipop(cma_es(512), 32), snes(16), ...: see the rule. `popsize` of cma_es is the largest.
        window: generations, at least 1.
        confirmations: evaluations at the end of a run, at least 1.

    Raises:
        ValueError: for a window or confirmations below 1.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> f = lambda x, key, own: jnp.sum((x - 1.0) ** 2) + jax.random.normal(own)
    >>> renewed = lambda key, aux: jax.random.split(key, 1)[0]
    >>> options = {"context": jax.random.key(1), "each": jax.random.split, "update": renewed, "evaluations": 6000}
    >>> result = minimize(f, jnp.zeros(3), noisy(cma_es()), **options)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.3)
    True
    """
    check_strategy(strategy)
    check_popsize(window, 1, name="window")
    check_popsize(confirmations, 1, name="confirmations")
    inner = strategy
    while getattr(inner, "restarting", False):
        inner = inner.strategy
    chosen = adaptive_popsize(strategy) if hasattr(inner, "travelled") else reevaluated(strategy, MOST)
    return Noisy(chosen, float(window), confirmations)
