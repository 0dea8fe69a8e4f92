"""Gymnax environments as objectives.

>>> from evoopt.envs import gymnax
>>> objective = gymnax.make("CartPole-v1")
>>> context = objective.context(jax.random.key(0))
>>> value, aux = objective(objective.init(jax.random.key(1)), context)  # always to the left: not for long
>>> 8 <= int(aux["steps"]) <= 11, int(aux["steps"]) == -int(value)
(True, True)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.envs.libraries import foreign, known, load
from evoopt.envs.policies import Policy
from evoopt.envs.rollout import Environment, Task
from evoopt.types import Array, Key, error

# What the constructor of an environment downloads where it is not yet: folder, files, where from.
MNIST = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz",
         "t10k-labels-idx1-ubyte.gz")  # fmt: skip
DOWNLOADS = {"MNISTBandit-bsuite": (Path("/tmp/mnist"), MNIST, "https://storage.googleapis.com/cvdf-datasets/mnist/")}


def names() -> list[str]:
    """The registered environments.

    >>> "CartPole-v1" in names()
    True
    """
    return sorted(load("gymnax").registered_envs)


def make(
    name: str,
    policy: Policy | Callable[..., Any] | None = None,
    *,
    env_params: Any = None,
    episode_length: int | None = None,
    action_repeat: int = 1,
    episodes: int = 1,
    common_random_numbers: bool = True,
    normalize_observations: bool = True,
    descriptor: Callable[[Any], Array] | None = None,
    **options: Any,
) -> Task:
    """The objective of a policy in the Gymnax environment `name`; see `Task` for what it answers.

    policy: by default `policies.linear`. For n discrete actions it answers n numbers, of which the largest acts (pass
        `squash=None`: tanh ties large ones), or an integer; for bounded ones it answers numbers in [-1, 1], which are
        scaled to the bounds.
    env_params: the environment's parameters, by default its own.
    episode_length: by default `max_steps_in_episode` of the parameters.
    descriptor: from the environment's state.
    options: for the environment's constructor.

    Raises ImportError without Gymnax, ValueError for an unknown name, TypeError for an unknown option, OSError for the
    one environment that would download its data.
    """
    environment, limit = _environment(name, env_params, episode_length, options)
    return Task(
        environment,
        policy,
        episode_length=limit,
        action_repeat=action_repeat,
        episodes=episodes,
        common_random_numbers=common_random_numbers,
        normalize_observations=normalize_observations,
        descriptor=descriptor,
    )


def _environment(name: str, params: Any, length: int | None, options: dict[str, Any]) -> tuple[Environment, int]:
    known("a Gymnax environment", name, names())
    folder, files, source = DOWNLOADS.get(name, (Path(), (), ""))
    if missing := [file for file in files if not (folder / file).is_file()]:
        cause = f"an environment that would download them at its first use; fetch them from {source} yourself"
        raise error(f"the data of {name} in '{folder}'", f"no {', '.join(missing)}", cause, FileNotFoundError)
    with foreign():
        try:
            env, defaults = load("gymnax").make(name, **options)
        except TypeError as refused:
            raise error(f"options of {name}", f"{refused}", "an option of another environment", TypeError) from refused
        params = defaults if params is None else params
        if length is not None:  # the environment's own limit must not come earlier
            params = params.replace(max_steps_in_episode=length)
        space = env.action_space(params)
        observation = jax.eval_shape(env.reset_env, jax.random.key(0), params)[0]
    discrete = hasattr(space, "n")

    def action_of(output: Array) -> Array:
        if discrete:
            chosen = output if jnp.issubdtype(output.dtype, jnp.integer) else jnp.argmax(output)
            return chosen.reshape(()).astype(space.dtype)
        low, high = (np.asarray(side, float) for side in np.broadcast_arrays(space.low, space.high))
        walled = np.isfinite(low) & np.isfinite(high)  # an action without bounds is taken as it is
        middle = np.where(walled, (np.where(walled, high, 0) + np.where(walled, low, 0)) / 2, 0)
        half = np.where(walled, (np.where(walled, high, 0) - np.where(walled, low, 0)) / 2, 1)
        return jnp.asarray(middle + half * output.reshape(space.shape)).astype(space.dtype)

    def reset(key: Key) -> tuple[Any, Array]:
        with foreign():
            observation, state = env.reset_env(key, params)
        return state, jnp.asarray(observation, jnp.float32)

    def step(state: Any, action: Array, key: Key) -> tuple[Any, Array, Array, Array]:
        with foreign():
            observation, state, reward, over, _ = env.step_env(key, state, action_of(action), params)
            done = over | env.is_truncated(state, params)
        return state, jnp.asarray(observation, jnp.float32), jnp.asarray(reward), jnp.asarray(done)

    size = int(space.n) if discrete else int(np.prod(space.shape))
    described = {"environment": name, **options}
    shape, limit = observation.shape, int(params.max_steps_in_episode)
    return Environment(reset, step, shape, size, discrete=discrete, system=params, options=described), limit
