"""What an environment is: two functions and the sizes of what they take and answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from evoopt.types import Array, Key


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """What an episode needs of an environment. Two functions written in JAX make one of your own.

    reset: `reset(key) -> (state, observation)`.
    step: `step(state, action, key) -> (state, observation, reward, done)`; the state is any pytree of arrays, whose
        shapes never change; reward and done are scalars of any kind, also of Python.
    observation_shape: shape of one observation.
    action_size: how many numbers the policy answers; for discrete actions, how many actions there are.
    discrete: True if the largest of these numbers chooses the action. Policies then answer without tanh, and `step`
        takes `jnp.argmax(action)`.
    dt: seconds between two steps; None where steps have no duration.
    frame: state -> what `Task.trajectory` collects.
    system: what a viewer needs in addition to the frames.
    options: what `Task.describe` reports.

    The policy has to move a point on a line to 0 and keep it there; an episode ends when the point leaves [-2, 2]:

    >>> import jax
    >>> from evoopt import minimize
    >>> from evoopt.envs.rollout import Task
    >>> from evoopt.strategies import snes
    >>> def reset(key):
    ...     x = jax.random.uniform(key, (), minval=-1.0, maxval=1.0)
    ...     return x, x[None]
    >>> def step(x, action, key):
    ...     x = x + 0.3 * action[0]
    ...     return x, x[None], -(x**2), abs(x) > 2
    >>> task = Task(Environment(reset, step, observation_shape=(1,), action_size=1), episode_length=20, episodes=4)
    >>> start, context = task.init(jax.random.key(0)), task.context(jax.random.key(1))
    >>> result = minimize(task, start, snes(16), context=context, update=task.update, generations=20)
    >>> test = lambda params, context: float(task.evaluate(params, context, jax.random.key(2))["returns"].mean())
    >>> test(start, context) < -3, test(result.recommended, result.context) > -2
    (True, True)
    """

    reset: Callable[[Key], tuple[Any, Array]]
    step: Callable[[Any, Any, Key], tuple[Any, Array, Array, Array]]
    observation_shape: tuple[int, ...]
    action_size: int
    discrete: bool = False
    dt: float | None = None
    frame: Callable[[Any], Any] = lambda state: state
    system: Any = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
