"""Half-precision parameters whose updates are rounded at random, so that small steps arrive on average."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, pytree


class State(NamedTuple):
    """The inner state in the dtypes of the parameters, and what the next rounding needs."""

    inner: Any
    key: Key  # (), the same for the whole run
    steps: Array  # () int32, generations told

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class Rounded:
    """A strategy whose half-precision state is updated in float32 and rounded at random; see `rounded`.

    No strategy knows of this. A step in place has to be rounded inside `noises.add_weighted`, slice by slice, because
    a float32 sum that left it would be a copy of the parameters. So `tell` says how to round in a context, while it
    is traced. Other leaves were rounded to the nearest, which their type does not show: if there are any, the state
    is told once more in float32 and rounded here. To declare which strategies step in place would take a parameter of
    `tell` in each of them and in every wrapper, and for `EvolutionStrategy` it depends on whether a generation's
    noise is stored.
    """

    strategy: Any

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> State:
        key = noises.replayable(key)
        return State(
            self.strategy.init(params, noises.fold_in(key, 0)), noises.fold_in(key, 1), jnp.zeros((), jnp.int32)
        )

    def ask(self, state: State, key: Key) -> Population:
        return self.strategy.ask(state.inner, key)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        key = noises.fold_in(state.key, state.steps)  # told again, it rounds the same way: replicas and replays agree
        with noises.rounding(key) as rounding:
            inner = self.strategy.tell(state.inner, population, answers)
        fine = [*rounding.rounded, *jax.tree.leaves(state.inner)]  # rounded at random, or left as they were
        if any(_is_narrow(x) and all(x is not y for y in fine) for x in jax.tree.leaves(inner)):
            inner = self._widened(state, population, answers, key)  # some were rounded to the nearest
        some = inner.unanswered == state.unanswered  # a generation that nobody answered changes nothing
        return State(inner, state.key, state.steps + some.astype(jnp.int32))

    def _widened(self, state: State, population: Population, answers: Any, key: Key) -> Any:
        """The inner state, all of which was float32 while it was told."""
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_narrow(x) else x, state.inner)
        new = self.strategy.tell(wide, population, answers)
        leaves, treedef = jax.tree.flatten(state.inner)
        rounded = [
            noises.stochastic_round(y, noises.fold_in(key, i), x.dtype) if _is_narrow(x) else y
            for i, (x, y) in enumerate(zip(leaves, treedef.flatten_up_to(new), strict=True))
        ]
        return treedef.unflatten(rounded)

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


def _is_narrow(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32


def rounded(strategy: Any) -> Rounded:
    """`strategy` for bfloat16 or float16 parameters, not for integers (see `choices`): small steps are kept on average.

    Rounded to the nearest, an update of rms 1e-6 alters one in a hundred bfloat16 weights of size 0.02; rounded at
    random, it arrives in all of them on average. The rounding has a key, so a run can be replayed. Strategies that
    update their parameters in place (MeZO, FZOO, ...) round them slice by slice; while others take a step, their state
    exists once more in float32. Float32 parameters are left alone.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import mezo
    >>> x0, target = jnp.zeros(64, jnp.bfloat16), 0.5
    >>> f = lambda x: jnp.mean((x.astype(jnp.float32) - target) ** 2)
    >>> result = minimize(f, x0, rounded(mezo(32, sigma=0.02, learning_rate=0.2)), generations=400)
    >>> result.recommended.dtype.name, bool(f(result.recommended) < 0.01)
    ('bfloat16', True)
    """
    check_strategy(strategy)
    return Rounded(strategy)
