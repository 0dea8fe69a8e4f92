"""The protocol that every optimizer follows, and the oracles: what a strategy asks of the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax

from evoopt.answers import WithAux, plain, split
from evoopt.population import Population
from evoopt.types import Answers, Key, Objective, Params

State = TypeVar("State")


class Strategy(Protocol[State]):
    """An optimizer: it chooses points, the oracle answers, it updates. `ask` is pure; only `tell` changes state."""

    @property
    def oracle(self) -> Callable[..., Objective]:
        """`oracle(objective)`: what one candidate is asked: `value`, `value_and_grad` or `slope`."""
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


def value(objective: Objective) -> Objective:
    """The zeroth-order oracle: the objective's value."""
    return objective


def value_and_grad(objective: Objective) -> Objective:
    """The first-order oracle: (value, gradient)."""
    ask = jax.value_and_grad(_told_apart(objective), has_aux=True)

    def answer(*args: Any) -> Any:
        (value, aux), grad = ask(*args)
        return (value, grad) if aux is None else WithAux((value, grad), aux)

    return answer


def slope(objective: Objective) -> Objective:
    """The directional oracle for candidates (params, direction): (value, derivative along the direction)."""
    apart = _told_apart(objective)

    def answer(candidate: Any, *args: Any) -> Any:
        params, direction = candidate
        value, derivative, aux = jax.jvp(lambda p: apart(p, *args), (params,), (direction,), has_aux=True)
        return (value, derivative) if aux is None else WithAux((value, derivative), aux)

    return answer


def _told_apart(objective: Objective) -> Objective:
    """The objective with its answer as (value, aux)."""

    def apart(*args: Any) -> tuple[Any, Any]:
        answer, aux = split(objective(*args))
        return plain(answer), aux

    return apart
