"""Episodes as an objective: an `Environment` and a policy make a `Task`.

Nothing here depends on where the environment comes from. `brax.py` and `gymnax.py` adapt theirs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import trees
from evoopt.answers import WithAux
from evoopt.envs import normalization, policies, protocol
from evoopt.envs.environment import Environment
from evoopt.envs.normalization import Moments
from evoopt.types import Array, Key, Params, error, pytree

# Decisions between two checks whether any episode is still alive. Under vmap a check selects the whole state of every
# candidate, which is expensive after every step and negligible after this many.
BLOCK = 25
CONFIRMING = 16  # new episodes that a best candidate is tested in


@pytree
class Context:
    """What changes between generations and is not searched."""

    key: Key  # of this generation's episodes
    observations: Moments | None  # over all generations; None where observations are not normalized


@pytree
class Episode:
    """What an episode keeps while it runs. Its size does not depend on the number of steps."""

    alive: Array  # (), bool
    total: Array  # (), the return so far
    length: Array  # (), int32, environment steps so far
    observations: Moments | None  # of what the policy saw
    descriptor: Array | None  # after the last step alive


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The objective of a policy in an environment: `task(params, context) -> WithAux(value, aux)`, for one candidate.

    value is minus the mean return over `episodes` episodes. It is NaN if the return is not finite, or if the policy was
    shown NaN. aux is a dict:

    - `return`, `length`: means over the episodes; `steps`: environment steps simulated, int32;
    - `observations`: the moments of what the policy saw, if observations are normalized;
    - `descriptor`: `descriptor(state)` after the last step, mean over the episodes, if there is a descriptor.

    Steps after the end of an episode do not count. Memory does not grow with the length of the episodes.

    environment: an `Environment`.
    policy: a `Policy` or a function `apply(params, observation) -> action`; by default `policies.linear`.
    episode_length: the most environment steps of an episode.
    action_repeat: how many environment steps share one action.
    episodes: the number for each candidate in each generation.
    common_random_numbers: True gives all candidates of a generation the same episodes, so that only what they do makes
        a difference. False gives each its own: `task(params, context, each_i)`, with row i of `task.each(context, n)`.
    normalize_observations: the policy sees running standard deviations from the running mean, clipped to ±10.
    descriptor: state -> vector, for quality-diversity.

    Raises ValueError for sizes below 1, for a policy whose actions do not have the shape (action_size,), and for an
    environment whose `reset` or `step` returns the wrong things; TypeError if it is not an environment.
    """

    environment: Environment
    policy: Any = None  # a Policy, once made
    _: dataclasses.KW_ONLY
    episode_length: int = 1000
    action_repeat: int = 1
    episodes: int = 1
    common_random_numbers: bool = True
    normalize_observations: bool = True
    descriptor: Callable[[Any], Array] | None = None

    def __post_init__(self) -> None:
        for name in ("episode_length", "action_repeat", "episodes"):
            if getattr(self, name) < 1:
                raise error(f"{name} of at least 1", f"{name}={getattr(self, name)}", "a size computed by division")
        protocol.check(self.environment, [field.name for field in dataclasses.fields(Environment)])
        squash = None if self.environment.discrete else jnp.tanh
        linear = lambda: policies.linear(self.observation_size, self.action_size, squash=squash)
        policy = linear() if self.policy is None else policies.as_policy(self.policy)
        object.__setattr__(self, "policy", policy)
        with protocol.traced():
            if policy.init is None:  # what it answers is not known before there are parameters
                jax.eval_shape(lambda key: self._reset(key), jax.random.key(0))
            else:
                self._check(policy.init)
                jax.eval_shape(self._decision, jax.random.key(0))

    def _decision(self, key: Key) -> Any:
        """The first decision of an episode. Tracing it finds errors minutes before a run would."""
        start, decide = self._episode(self.init(key), self.context(key).observations, key)
        return decide(start)

    def _reset(self, key: Key) -> tuple[Any, Array]:
        return protocol.first(self.environment.reset(key), self.environment.observation_shape)

    def _check(self, init: Callable[[Key], Params]) -> None:
        """Compare the policy's sizes with the environment's, by tracing it once."""
        shape, size = self.environment.observation_shape, self.environment.action_size
        try:
            observation = jax.ShapeDtypeStruct(shape, jnp.float32)
            see = lambda observation: self.policy.step(init(jax.random.key(0)), observation, self.policy.carry)[0]
            action = jax.eval_shape(see, observation)
        except (TypeError, ValueError) as mismatch:
            got = f"{self.policy.name}, which raised: {mismatch}"
        else:
            if action.shape == (size,) or jnp.issubdtype(action.dtype, jnp.integer):
                return
            got = f"{self.policy.name}, whose actions have shape {action.shape}"
        raise error(
            f"a policy from observations of shape {shape} to {size} numbers",
            got,
            f"a policy made for another environment; the sizes here are ({self.observation_size}, {size})",
        )

    @property
    def observation_size(self) -> int:
        """Numbers in an observation."""
        return int(np.prod(self.environment.observation_shape))

    @property
    def action_size(self) -> int:
        """How many numbers the policy answers; for discrete actions, how many actions there are."""
        return self.environment.action_size

    @property
    def steps_per_evaluation(self) -> int:
        """The most environment steps of one candidate in one generation."""
        return self.episodes * self.episode_length

    @property
    def dt(self) -> float | None:
        """Seconds between two states of `trajectory`."""
        return None if self.environment.dt is None else self.environment.dt * self.action_repeat

    def describe(self) -> dict[str, Any]:
        """The settings of this objective, for a configuration file."""
        names = ("episode_length", "action_repeat", "episodes", "common_random_numbers", "normalize_observations")
        sizes = {"observation_size": self.observation_size, "action_size": self.action_size}
        numbers = {name: getattr(self, name) for name in names}
        return {**self.environment.options, "policy": self.policy.name, **sizes, **numbers}

    def init(self, key: Key) -> Params:
        """Parameters of the policy to start from."""
        if self.policy.init is None:
            raise error(
                "a policy with init",
                f"the function {self.policy.name}",
                "a bare function does not say how its parameters start: write Policy(apply, init), or pass your own",
                TypeError,
            )
        return self.policy.init(key)

    def context(self, key: Key) -> Context:
        """The context of the first generation: `key` for its episodes, no observations yet."""
        shape = self.environment.observation_shape
        return Context(key, normalization.empty(shape) if self.normalize_observations else None)

    def each(self, context: Context, n: int) -> Key | None:
        """The keys (n,) of n candidates; None with common random numbers."""
        return None if self.common_random_numbers else jax.random.split(_keys(context)[1], n)

    def update(self, context: Context, aux: Mapping[str, Any]) -> Context:
        """The next generation's context, from all aux of this one: every leaf has leading axis n."""
        observations = context.observations
        if observations is not None:
            observations = normalization.merge(observations, aux["observations"], jnp.isfinite(aux["return"]))
        return Context(_keys(context)[0], observations)

    def __call__(self, params: Params, context: Context, each: Key | None = None) -> WithAux:
        """Value and aux of one candidate in the episodes of `context`."""
        if (each is None) != self.common_random_numbers:
            raise error(
                "`each`, a key of the candidate's own, exactly where common_random_numbers is False",
                f"common_random_numbers={self.common_random_numbers} and each={each}",
                "an objective called without a row of objective.each(context, n), or with one it has no use for",
            )
        keys = jax.random.split(_keys(context)[1] if each is None else each, self.episodes)
        done = self._episodes(params, context.observations, keys)
        mean = done.total.mean()
        aux: dict[str, Any] = {
            "return": mean,
            "length": done.length.mean(dtype=jnp.float32),
            "steps": done.length.sum(),
        }
        if done.observations is not None:
            shape = self.environment.observation_shape
            aux["observations"] = normalization.merge(normalization.empty(shape), done.observations)
        if done.descriptor is not None:
            aux["descriptor"] = done.descriptor.mean(0)
        return WithAux(jnp.where(jnp.isfinite(mean), -mean, jnp.nan), aux)

    def evaluate(self, params: Params, context: Context, key: Key, *, episodes: int = 16) -> dict[str, Array]:
        """Test one candidate in new episodes: `returns` and `lengths`, (episodes,). The context does not change."""
        keys = jax.random.split(key, episodes)
        done = _jit_episodes(self, params, context.observations, keys)
        return {"returns": done.total, "lengths": done.length}

    def confirm(self, params: Params, context: Context, key: Key) -> tuple[float, int]:
        """(minus the mean return over 16 new episodes, the number of evaluations that costs); see `minimize`."""
        returns = self.evaluate(params, context, key, episodes=CONFIRMING)["returns"]
        return -float(returns.mean()), -(-CONFIRMING // self.episodes)

    def trajectory(
        self, params: Params, context: Context, key: Key, *, steps: int | None = None
    ) -> tuple[Any, list[Any], np.ndarray]:
        """(system, states, returns) of one episode, for a replay.

        states: the first state, then one after every action (with `action_repeat` k, after every k steps) until the
            episode ends or has had `steps` environment steps. Leaves are NumPy arrays.
        returns: (len(states),), the return up to each state; the last is that of the episode.
        """
        steps = self.episode_length if steps is None else min(steps, self.episode_length)
        decisions = -(-steps // self.action_repeat)
        frames, totals, alive = jax.device_get(
            _jit_trajectory(self, params, context.observations, key, decisions=decisions)
        )
        count = 1 + int(alive.sum())
        states = [jax.tree.map(lambda leaf, i=i: leaf[i], frames) for i in range(count)]
        return self.environment.system, states, totals[:count]

    def _episodes(self, params: Params, moments: Moments | None, keys: Key) -> Episode:
        """One episode per key, leading axis len(keys)."""
        decisions = -(-self.episode_length // self.action_repeat)
        block = -(-decisions // -(-decisions // BLOCK))  # as even as possible: little is simulated past the end

        def run(key: Key) -> Episode:
            start, decide = self._episode(params, moments, key)
            blocks = lambda carry: jax.lax.fori_loop(0, block, lambda _, carry: decide(carry), carry)
            return jax.lax.while_loop(lambda carry: carry[-1].alive, blocks, start)[-1]

        with protocol.traced():
            return jax.vmap(run)(keys)

    def _episode(self, params: Params, moments: Moments | None, key: Key) -> tuple[Any, Callable[[Any], Any]]:
        """The carry (state, observation, memory, Episode) an episode starts with, and one decision: carry -> carry."""
        reset_key, step_key = jax.random.split(key)
        describe = self.descriptor or (lambda state: None)

        def decide(carry: Any) -> Any:
            state, observation, memory, episode = carry
            # A policy that was shown NaN has no score, whatever its reward; the last observation is shown to nobody.
            lost = episode.alive & jnp.isnan(observation).any()
            episode = dataclasses.replace(episode, total=jnp.where(lost, jnp.nan, episode.total))
            if moments is None:
                seen = observation
            else:
                seen = normalization.normalize(moments, observation)
                sums = normalization.observe(episode.observations, observation, episode.alive)
                episode = dataclasses.replace(episode, observations=sums)
            action, memory = self.policy.step(params, seen, memory)
            now = (state, observation, episode)
            if self.action_repeat == 1:
                state, observation, episode = step(now, action)
            else:  # a loop: the physics are compiled once, not action_repeat times
                state, observation, episode = jax.lax.fori_loop(
                    0, self.action_repeat, lambda _, now: jax.tree.map(_like, step(now, action), now), now
                )
            return state, observation, memory, episode

        def step(now: tuple[Any, Array, Episode], action: Any) -> tuple[Any, Array, Episode]:
            state, seen, episode = now
            # XLA drops this key where the environment does not use it.
            key = jax.random.fold_in(step_key, episode.length)
            found = self.environment.step(state, action, key)
            state, observation, reward, done = protocol.after(found, state, seen)
            alive = episode.alive
            length = episode.length + alive.astype(jnp.int32)
            episode = Episode(
                alive=alive & ~done & (length < self.episode_length),
                total=episode.total + jnp.where(alive, reward, 0),
                length=length,
                observations=episode.observations,
                descriptor=trees.where(alive, describe(state), episode.descriptor),
            )
            return state, observation, episode

        state, observation = self._reset(reset_key)
        seen = None if moments is None else normalization.empty(observation.shape)
        zero = jnp.zeros((), jnp.float32)
        episode = Episode(jnp.array(True), zero, jnp.zeros((), jnp.int32), seen, describe(state))
        start = trees.strong((state, observation, self.policy.carry, episode))
        return start, lambda carry: jax.tree.map(_like, decide(carry), start)


def _keys(context: Context) -> tuple[Key, Key]:
    """(the next generation's key, this one's); not by fold_in, whose keys are those of a split."""
    after, now = jax.random.split(context.key)
    return after, now


def _like(new: Any, old: Array) -> Array:
    """`new` with the dtype of `old`: environments answer a Python 0.0 here and an array there."""
    return new if jax.typeof(new) == jax.typeof(old) else jnp.asarray(new, old.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _jit_episodes(task: Task, params: Params, moments: Moments | None, keys: Key) -> Episode:
    return task._episodes(params, moments, keys)


@functools.partial(jax.jit, static_argnums=0, static_argnames="decisions")
def _jit_trajectory(task: Task, params: Params, moments: Moments | None, key: Key, *, decisions: int) -> Any:
    """Frames and returns, (decisions + 1, ...), and whether the episode was alive before each decision."""
    start, decide = task._episode(params, moments, key)
    view = lambda carry: (task.environment.frame(carry[0]), carry[-1].total)

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        after = decide(carry)
        return after, (*view(after), carry[-1].alive)

    _, (frames, totals, alive) = jax.lax.scan(body, start, length=decisions)
    prepend = lambda x, xs: jnp.concatenate([jnp.asarray(x, xs.dtype)[None], xs])
    return *jax.tree.map(prepend, view(start), (frames, totals)), alive
