"""What `reset` and `step` of an environment must answer, said when a task is made or first traced, not inside JAX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.trees import path_name
from evoopt.types import Array, error

RESET = "reset(key) -> (state, observation)"
STEP = "step(state, action, key) -> (state, observation, reward, done)"
_UNKNOWN = (
    jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError,
)  # fmt: skip
ORDER = "(observation, state), the order of Gymnax; here the state comes first"


def check(environment: Any, names: list[str]) -> None:
    """Whether an object has what an `Environment` has.

    Raises:
        TypeError: it lacks something, or has something of another kind.
    """
    lacking = [name for name in names if not hasattr(environment, name)]
    if isinstance(environment, type) or lacking:
        got = f"the class {environment.__name__}" if isinstance(environment, type) else type(environment).__name__
        got += f", without {', '.join(lacking)}" if lacking else ""
        cause = "an environment of Gymnasium or another library, or a class where an instance is meant: give its reset "
        cause += "and step as functions to Environment(reset, step, observation_shape, action_size)"
        raise error("an Environment", got, cause, TypeError)
    shape, size = environment.observation_shape, environment.action_size
    whole = lambda n: isinstance(n, (int, np.integer)) and not isinstance(n, bool)
    if not (isinstance(shape, (tuple, list)) and all(whole(n) and n >= 0 for n in shape) and whole(size) and size >= 1):
        got = f"observation_shape={shape!r}, action_size={size!r}"
        cause = "a size where a shape is meant: (4,), not 4; or a shape where a size is meant: 2, not (2,)"
        raise error("observation_shape, a tuple of sizes, and action_size of at least 1", got, cause, TypeError)
    if not (callable(environment.reset) and callable(environment.step)):
        got = f"{type(environment.reset).__name__} and {type(environment.step).__name__}"
        raise error(f"two functions, {RESET} and {STEP}", got, "their results instead of the functions", TypeError)


def first(found: Any, shape: tuple[int, ...]) -> tuple[Any, Array]:
    """(state, observation), if that is what `reset` answered."""
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        cause = "(observation, info), as in Gymnasium; or a state that is not returned"
        raise error(RESET, _results(found), cause)
    state, observation = found
    observation = _observation(observation, shape, RESET, ORDER)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if _array(leaf) is None:
            cause = "text, a function or another object in the state: leave it out, or keep it outside"
            raise error(f"a state of arrays and numbers; {RESET}", f"{_said(leaf)} at '{path_name(path)}'", cause)
    return state, observation


def after(found: Any, before: Any, seen: Array) -> tuple[Any, Array, Array, Array]:
    """(state, observation, reward as a float, done as a bool), if that is what `step` answered.

    before, seen: the state that it got, and the last observation.
    """
    if not isinstance(found, (tuple, list)) or len(found) != 4:
        cause = "results as in Gymnasium (observation, reward, terminated, truncated, info) or Gymnax; here the state "
        cause += "comes first, and done is terminated | truncated"
        raise error(STEP, _results(found), cause)
    state, observation, reward, done = found
    observation = _observation(observation, seen.shape, STEP, ORDER)
    _fits(seen, observation, "an observation", "")
    reward = _scalar(reward, "reward", "a reward per part or of a batch: take its sum, or reward[0]")
    done = _scalar(done, "done", "a flag per part or of a batch: done.any(), or done[0]")
    _same(before, state)
    return state, observation, reward.astype(jnp.float32), done.astype(bool)


@contextmanager
def traced() -> Iterator[None]:
    """Around code of others that JAX traces: what needs a value that nobody has yet gets three parts."""
    try:
        yield
    except _UNKNOWN as reason:
        cause = (
            "a Python `if`, `float(...)` or NumPy on a state, action or observation: jnp.where and jax.numpy, or "
            "for an environment that is not JAX an objective of your own and minimize(..., jit=False)"
        )
        got = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
        raise error("a reset, step and policy that JAX can trace", got, cause, TypeError) from reason


def _array(x: Any) -> Array | None:
    """x as an array, if it is a number, a key or an array."""
    if isinstance(x, jax.Array):
        return x
    number = isinstance(x, (bool, int, float, complex, np.number, np.bool_))
    return jnp.asarray(x) if number or (isinstance(x, np.ndarray) and x.dtype.kind in "biufc") else None


def _observation(x: Any, shape: tuple[int, ...], of: str, order: str) -> Array:
    observation = _array(x)
    if observation is None:
        cause = f"{order}; or a list or dict of observations: jnp.array(...), jnp.concatenate(...)"
        raise error(f"an observation that is one array; {of}", _said(x), cause)
    if observation.shape != tuple(shape):
        cause = f"{order}; or an observation_shape that is not what reset and step answer"
        raise error(f"an observation of shape {tuple(shape)}; {of}", f"shape {observation.shape}", cause)
    return observation


def _scalar(x: Any, what: str, cause: str) -> Array:
    number = _array(x)
    if (
        number is None
        or number.shape
        or jnp.iscomplexobj(number)
        or jax.dtypes.issubdtype(number.dtype, jax.dtypes.extended)
    ):
        raise error(f"a {what} that is one number; {STEP}", _said(x), cause)
    return number


def _same(before: Any, state: Any) -> None:
    """Whether a state has the shapes of the one before, and numbers that fit in where those were."""
    expected = "a state whose structure and shapes never change"
    old, new = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (before, state))
    if jax.tree.structure(before) != jax.tree.structure(state):
        named = lambda paths: ", ".join(f"'{path_name(path)}'" for path in paths[:3]) or "others of the same names"
        gone, come = [p for p in old if p not in new], [p for p in new if p not in old]
        got = f"{named(gone)} before the step, {named(come)} after it" if gone or come else "another type of container"
        cause = f"an entry that reset leaves out or step adds; or {ORDER}"
        raise error(expected, got, cause)
    for path, leaf in new.items():
        was, now = jnp.asarray(old[path]), _array(leaf)
        if now is None:
            raise error(expected, f"{_said(leaf)} at '{path_name(path)}'", "an object that is no array in the state")
        if was.shape != now.shape:
            got = f"shape {was.shape} before the step and {now.shape} after it at '{path_name(path)}'"
            raise error(expected, got, "a history that grows: keep the last k in an array of fixed size; or a lost [0]")
        _fits(was, now, "a state", f" at '{path_name(path)}'")


def _fits(was: Array, now: Array, expected: str, where: str) -> None:
    """Whether numbers like `now` can stand where `was` did: it keeps its dtype, and 0.5 in an int would be 0."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    order = lambda x: next((i for i, kind in enumerate(kinds) if jnp.issubdtype(x.dtype, kind)), -1)
    if order(now) > order(was):
        got = f"{was.dtype} before the step and {now.dtype} after it{where}"
        raise error(f"{expected} whose kind of numbers never changes", got, "a reset that starts at 0, not at 0.0")


def _said(x: Any) -> str:
    if (array := _array(x)) is not None:
        return f"an array of shape {array.shape} and dtype {array.dtype}"
    return f"{x!r}"[:60] if x is None or isinstance(x, str) else f"a {type(x).__name__}"


def _results(found: Any) -> str:
    if isinstance(found, (tuple, list)):
        return f"{len(found)} results: {', '.join(map(_said, found[:6]))}"
    return f"one result, {_said(found)}"
