"""The protocol that every optimizer follows, and the oracles: what a strategy asks of the objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax

from evoopt.population import Population
from evoopt.types import Answers, Key, Objective, Params

if TYPE_CHECKING:
    import optax  # takes a quarter of a second, which strategies without it need not wait for

State = TypeVar("State")


class Strategy(Protocol[State]):
    """An optimizer: it chooses points, the oracle answers, it updates. `ask` is pure; only `tell` changes state."""

    @property
    def oracle(self) -> Callable[..., Objective]:
        """`oracle(objective, has_aux=False)`: what one candidate is asked: `value`, `value_and_grad` or `slope`."""
        ...

    def init(self, params: Params, key: Key) -> State:
        """The initial state, at `params`."""
        ...

    def ask(self, state: State, key: Key) -> Population:
        """A generation's candidates; the same (state, key) gives the same candidates."""
        ...

    def tell(self, state: State, population: Population, answers: Answers) -> State:
        """The state after the population's answers: values (n,), or a tuple that starts with them."""
        ...

    def recommend(self, state: State) -> Params:
        """The point to use if the search ended now."""
        ...


def value(objective: Objective, has_aux: bool = False) -> Objective:
    """The zeroth-order oracle: the objective's value."""
    del has_aux  # (value, aux) is passed on as it is
    return objective


def value_and_grad(objective: Objective, has_aux: bool = False) -> Objective:
    """The first-order oracle: (value, gradient)."""
    ask = jax.value_and_grad(objective, has_aux=has_aux)
    if not has_aux:
        return ask

    def answer(*args: Any) -> Any:
        (value, aux), grad = ask(*args)
        return (value, grad), aux

    return answer


def slope(objective: Objective, has_aux: bool = False) -> Objective:
    """The directional oracle for candidates (params, direction): (value, derivative along the direction)."""

    def answer(candidate: Any, *args: Any) -> Any:
        params, direction = candidate
        value, derivative, *aux = jax.jvp(lambda p: objective(p, *args), (params,), (direction,), has_aux=has_aux)
        return ((value, derivative), aux[0]) if has_aux else (value, derivative)

    return answer


@functools.cache
def adam() -> optax.GradientTransformation:
    """Adam's direction, the optimizer of recipes that are given none: one object, so that equal recipes are equal."""
    import optax

    return optax.scale_by_adam()


def descend(
    optimizer: optax.GradientTransformation, grad: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """(updates, opt_state) of an optax transformation, under standard dtype promotion whatever the caller uses."""
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(grad, opt_state, params)
