"""Policies: functions from an observation to an action, with or without memory.

A policy is any `apply(params, observation) -> action`; a `Policy` adds how its parameters start and what it remembers.
The three here answer actions in [-1, 1], by tanh; `squash=None` leaves the output as it is, for logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evoopt.types import Array, Key, Params, error

orthogonal = jax.nn.initializers.orthogonal()
lecun = jax.nn.initializers.lecun_normal()
# A start near the middle of the actions, where tanh is not saturated; at zero the layers before it would not matter.
SMALL = 0.01


# Hashed by identity: policies are static in jit, and `carry` holds arrays.
@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """How to act: `apply(params, observation) -> action`, or with memory `apply(params, observation, carry)`.

    apply: without memory it returns the action; with memory (action, carry).
    init: `init(key) -> params`, a pytree of float32.
    carry: the memory at the start of every episode, a pytree of arrays; None for a policy without memory.
    name: for people.
    """

    apply: Callable[..., Any]
    init: Callable[[Key], Params] | None = None
    carry: Any = None
    name: str = "custom"

    def step(self, params: Params, observation: Array, carry: Any) -> tuple[Any, Any]:
        """(action, carry), for both kinds."""
        if self.carry is None:
            return self.apply(params, observation), None
        return self.apply(params, observation, carry)


def as_policy(policy: Any) -> Policy:
    """A `Policy` as it is; a function `apply(params, observation)` as a policy without memory."""
    if isinstance(policy, Policy):
        return policy
    if not callable(policy):
        raise error(
            "a Policy, or a function apply(params, observation) -> action",
            f"{type(policy).__name__}",
            "parameters passed as the policy; they are what the objective is called with",
            TypeError,
        )
    return Policy(policy, name=getattr(policy, "__name__", "custom"))


def _dense(key: Key, rows: int, columns: int, scale: float = 1.0) -> dict[str, Array]:
    return {"w": scale * lecun(key, (rows, columns), jnp.float32), "b": jnp.zeros(columns, jnp.float32)}


def _squashed(squash: Callable[[Array], Array] | None, x: Array) -> Array:
    return x if squash is None else squash(x)


def linear(
    observation_size: int,
    action_size: int,
    *,
    bias: bool = False,
    scale: float = 0.0,
    squash: Callable[[Array], Array] | None = jnp.tanh,
) -> Policy:
    """One matrix, `squash(observation @ w)`: the policy of ARS (Mania et al. 2018), which starts at zero.

    scale: standard deviation of the start, for searches that cannot leave zero.

    >>> policy = linear(3, 2)
    >>> params = policy.init(jax.random.key(0))
    >>> policy.apply(params, jnp.ones(3)).tolist()
    [0.0, 0.0]
    """

    def init(key: Key) -> Params:
        params = {"w": scale * jax.random.normal(key, (observation_size, action_size), jnp.float32)}
        return params | ({"b": jnp.zeros(action_size, jnp.float32)} if bias else {})

    def apply(params: Params, observation: Array) -> Array:
        action = jnp.ravel(observation) @ params["w"]
        return _squashed(squash, action + params["b"] if bias else action)

    return Policy(apply, init, name=f"linear({observation_size}, {action_size}{', bias=True' if bias else ''})")


def mlp(
    observation_size: int,
    action_size: int,
    hidden: tuple[int, ...] = (32, 32),
    *,
    squash: Callable[[Array], Array] | None = jnp.tanh,
) -> Policy:
    """Layers of tanh units, Lecun normal at the start with a small last layer.

    >>> policy = mlp(3, 2, hidden=(8,))
    >>> policy.apply(policy.init(jax.random.key(0)), jnp.ones(3)).shape
    (2,)
    """
    sizes = (observation_size, *hidden, action_size)

    def init(key: Key) -> Params:
        scales = [1.0] * len(hidden) + [SMALL]
        keys = jax.random.split(key, len(scales))
        return [_dense(*layer) for layer in zip(keys, sizes[:-1], sizes[1:], scales, strict=True)]

    def apply(params: Params, observation: Array) -> Array:
        x = jnp.ravel(observation)
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return _squashed(squash, x @ params[-1]["w"] + params[-1]["b"])

    return Policy(apply, init, name=f"mlp({observation_size}, {action_size}, hidden={tuple(hidden)})")


def gru(
    observation_size: int,
    action_size: int,
    hidden: int = 32,
    *,
    squash: Callable[[Array], Array] | None = jnp.tanh,
) -> Policy:
    """A gated recurrent unit (Cho et al. 2014, the reset gate after the product, as in cuDNN) and a linear output.

    >>> policy = gru(3, 2, hidden=8)
    >>> action, carry = policy.apply(policy.init(jax.random.key(0)), jnp.ones(3), policy.carry)
    >>> action.shape, carry.shape
    ((2,), (8,))
    """

    def init(key: Key) -> Params:
        input_key, recurrent_key, output_key = jax.random.split(key, 3)
        gates = [orthogonal(k, (hidden, hidden), jnp.float32) for k in jax.random.split(recurrent_key, 3)]
        return {
            "input": _dense(input_key, observation_size, 3 * hidden),
            "recurrent": {"w": jnp.concatenate(gates, axis=1), "b": jnp.zeros(3 * hidden, jnp.float32)},
            "output": _dense(output_key, hidden, action_size, SMALL),
        }

    def apply(params: Params, observation: Array, carry: Array) -> tuple[Array, Array]:
        x, h, out = params["input"], params["recurrent"], params["output"]
        x_reset, x_update, x_new = jnp.split(jnp.ravel(observation) @ x["w"] + x["b"], 3)
        h_reset, h_update, h_new = jnp.split(carry @ h["w"] + h["b"], 3)
        update = jax.nn.sigmoid(x_update + h_update)
        new = jnp.tanh(x_new + jax.nn.sigmoid(x_reset + h_reset) * h_new)
        carry = (1 - update) * new + update * carry
        return _squashed(squash, carry @ out["w"] + out["b"]), carry

    return Policy(apply, init, jnp.zeros(hidden), f"gru({observation_size}, {action_size}, hidden={hidden})")
