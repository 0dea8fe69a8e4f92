"""The protocol every optimizer here speaks, and the oracles: what a strategy asks of the objective."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evoopt import trees
from evoopt.population import Population
from evoopt.types import Answers, Array, Key, Objective, Params, error
from evoopt.utilities import as_values

State = TypeVar("State")


class Strategy(Protocol[State]):
    """An optimizer: it chooses points, the oracle answers, it updates. `ask` is pure, `tell` the only write."""

    @property
    def oracle(self) -> Callable[..., Objective]:
        """`oracle(objective, has_aux=False)`: what is asked of one candidate. `value`, `value_and_grad` or `slope`."""
        ...

    def init(self, params: Params, key: Key) -> State:
        """The state to start from at `params`."""
        ...

    def ask(self, state: State, key: Key) -> Population:
        """A generation's candidates; the same (state, key) gives the same ones."""
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


def told(population: Population, answers: Answers) -> Any:
    """The answers as arrays, after checking that there is one value per candidate. A list of floats will do.

    Raises:
        ValueError: when the values are not (n,).
        TypeError: when they are not numbers.
    """
    n = len(population)
    if isinstance(answers, list):
        try:
            answers = np.asarray(answers, jnp.result_type(float))
        except (TypeError, ValueError) as problem:
            raise error(
                f"{n} numbers",
                f"a list that is none: {problem}",
                "an objective that answers None or an array",
                TypeError,
            ) from problem
    answers = jax.tree.map(jnp.asarray, answers)
    values = as_values(answers)
    if jnp.shape(values) != (n,):
        raise error(
            f"values of shape ({n},), one for each candidate",
            f"shape {jnp.shape(values)}",
            "an objective that answers a vector, or the answers of a slice told with the whole population",
        )
    if not jnp.issubdtype(values.dtype, jnp.floating) or jnp.finfo(values.dtype).bits < 32:  # bfloat16 counts to 256
        values = values.astype(jnp.float32)
        answers = (values, *answers[1:]) if isinstance(answers, tuple) else values
    return answers


def settle(old: State, new: State, values: Array) -> State:
    """`new`, unless no candidate had a finite answer: then `old`, with that generation counted in `unanswered`.

    Every state has a field `unanswered`, () int32.
    """
    any_answer = jnp.isfinite(values).any()
    kept = trees.where(any_answer, new, old)
    count = old.unanswered + jnp.where(any_answer, 0, 1).astype(jnp.int32)  # type: ignore[attr-defined]
    return kept._replace(unanswered=count)  # type: ignore[attr-defined]


def descend(
    optimizer: optax.GradientTransformation, grad: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """(updates, opt_state) of an optax transformation, which promotes dtypes the standard way whatever the caller's."""
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(grad, opt_state, params)


def check_strategy(strategy: Any) -> None:
    """Raise the three-part error for what is no strategy: a name, a recipe that was not called, an optimizer."""
    methods = ("init", "ask", "tell", "recommend")
    if not isinstance(strategy, type) and all(callable(getattr(strategy, name, None)) for name in methods):
        return
    name = getattr(strategy, "__name__", type(strategy).__name__).split(".")[-1]
    if isinstance(strategy, optax.GradientTransformation):
        cause = "an optax optimizer: wrap it, gradient(optax.adam(1e-3))"
    elif isinstance(strategy, str):
        cause = f"a name, as on the command line: import the recipe and call it, evoopt.strategies.{strategy}()"
    elif isinstance(strategy, types.ModuleType):
        cause = f"the module of a recipe: import the recipe from evoopt.strategies and call it, {name}()"
    elif isinstance(strategy, type):
        recipe = strategy.__module__.split(".")[-1]
        cause = f"a class: a strategy is made by its recipe, such as {recipe}()"
    elif callable(strategy):
        cause = f"the recipe itself: call it, {name}()"
    else:
        cause = "arguments in another order, or an object without init, ask, tell and recommend"
    raise error("a strategy, such as cma_es()", repr(strategy)[:80], cause, TypeError)


def check_popsize(popsize: int, least: int, *, even: bool = False, name: str = "popsize") -> None:
    """Raise the three-part error for a popsize that is too small, or odd where candidates come in pairs."""
    if not isinstance(popsize, (int, np.integer)) or isinstance(popsize, bool):
        raise error(f"{name} as an int", repr(popsize), "a division with / where // was meant", TypeError)
    if popsize < least:
        raise error(f"{name} of at least {least}", str(popsize), "fewer candidates than the algorithm's equations need")
    if even and popsize % 2:
        raise error(f"an even {name}", str(popsize), "antithetic sampling asks in pairs, one at +z and one at -z")


def check_sigma(sigma: Any, name: str = "sigma") -> None:
    """Raise the three-part error for a step-size that is not a positive number; tracers and arrays pass."""
    if isinstance(sigma, (int, float, np.number)) and not 0 < sigma < float("inf"):
        raise error(f"{name} > 0, a standard deviation", str(sigma), "a sign slipped, or a range with equal ends")


class Dispersion(NamedTuple):
    """How wide a search distribution is; strategies that have one answer it from `dispersion(state, i)`."""

    mean: Array  # (d,)
    sigma: Array  # (), the step-size
    std: Array  # (d,), standard deviation of each coordinate, sigma included
    path: Array  # (d,), the evolution path, sigma included
    axis: Array  # (d,), principal axis i modulo d, one standard deviation long
    shortest: Array  # (), length of the shortest principal axis over sigma
    longest: Array  # (), length of the longest principal axis over sigma
