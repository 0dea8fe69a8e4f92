"""Brax environments as objectives.

>>> from evoopt.envs import brax
>>> objective = brax.make("fast", episode_length=10)
>>> context = objective.context(jax.random.key(0))
>>> value, aux = objective(objective.init(jax.random.key(1)), context)
>>> value.shape, int(aux["steps"])
((), 10)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evoopt.envs.libraries import foreign, known, load
from evoopt.envs.policies import Policy
from evoopt.envs.rollout import Environment, Task
from evoopt.types import Array, Key, error

BACKENDS = ("generalized", "mjx", "positional", "spring")


def names() -> list[str]:
    """The registered environments, with those of `brax.envs.register_environment`.

    >>> "hopper" in names()
    True
    """
    return sorted(load("brax.envs")._envs)


def make(
    name: str,
    policy: Policy | Callable[..., Any] | None = None,
    *,
    backend: str = "spring",
    episode_length: int = 1000,
    action_repeat: int = 1,
    episodes: int = 1,
    common_random_numbers: bool = True,
    normalize_observations: bool = True,
    descriptor: Callable[[Any], Array] | None = None,
    **options: Any,
) -> Task:
    """The objective of a policy in the Brax environment `name`; see `Task` for what it answers.

    policy: by default `policies.linear`, from the environment's observations to its actions, numbers in [-1, 1].
        Actuators clip what is beyond, but the control cost that many rewards have counts it unclipped.
    backend: the physics: "spring" is the fastest, "generalized" the most accurate; "positional", "mjx".
    descriptor: from the environment's `brax.envs.State`.
    options: for the environment's constructor, as in `exclude_current_positions_from_observation=False`.

    Raises ImportError without Brax, ValueError for an unknown name or backend, TypeError for an unknown option.

    >>> make("fast").describe()["policy"]
    'linear(2, 1)'
    """
    return Task(
        _environment(name, backend, options),
        policy,
        episode_length=episode_length,
        action_repeat=action_repeat,
        episodes=episodes,
        common_random_numbers=common_random_numbers,
        normalize_observations=normalize_observations,
        descriptor=descriptor,
    )


def _environment(name: str, backend: str, options: dict[str, Any]) -> Environment:
    known("a Brax environment", name, names())
    known("a Brax backend", backend, BACKENDS)
    with foreign():
        try:
            env = load("brax.envs").get_environment(name, backend=backend, **options)
        except TypeError as refused:
            raise error(f"options of {name}", f"{refused}", "an option of another environment", TypeError) from refused
        observation = jax.eval_shape(env.reset, jax.random.key(0)).obs
        if not hasattr(observation, "shape"):
            raise error(
                "observations that are one array",
                f"observations with the keys {sorted(observation)}",
                "an environment made for asymmetric or pixel observations",
            )
        action_size, dt = int(env.action_size), getattr(env, "dt", None)  # "fast" has neither dt nor sys

    def reset(key: Key) -> tuple[Any, Array]:
        with foreign():
            state = env.reset(key)
        return state, state.obs

    def step(state: Any, action: Array, key: Key) -> tuple[Any, Array, Array, Array]:
        with foreign():
            state = env.step(state, action)
        return state, state.obs, state.reward, jnp.asarray(state.done)

    return Environment(
        reset,
        step,
        observation.shape,
        action_size,
        dt=None if dt is None else float(dt),
        frame=lambda state: state.pipeline_state,
        system=getattr(env, "sys", None),
        options={"environment": name, "backend": backend, **options},
    )
