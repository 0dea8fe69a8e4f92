"""Environment steps a second through the engine against a hand-written vmap + scan of the bare Brax environment.

    python benchmarks/rollouts.py --json results/rollouts.json

Both sides step the same environment with the same linear policies for the same number of steps and return the sum of
rewards, which depends on the simulation. The engine's early exit (episodes that ended are not stepped further) is
reported apart: in the comparison episodes can't end, as every step counts on both sides.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from common import header, interleaved, parser, row, write

from evoopt import Population
from evoopt.envs import brax


def main() -> None:
    """Measure and print."""
    p = parser(__doc__)
    p.add_argument("--environments", default="inverted_double_pendulum,hopper")
    p.add_argument("--popsize", type=int, default=128)
    p.add_argument("--steps", type=int, default=200)
    options = p.parse_args()
    head = header(("brax",), popsize=options.popsize, steps=options.steps, repeats=options.repeats, backend="spring")
    rows = []
    for name in options.environments.split(","):
        rows += compare(name, options.popsize, options.steps, options.repeats)
    write(options.json, head, rows)


def compare(name: str, n: int, steps: int, repeats: int) -> list[dict]:
    """The rows of one environment."""
    import dataclasses

    from brax import envs

    task = brax.make(name, episode_length=steps, normalize_observations=False)
    immortal = dataclasses.replace(
        task.environment, step=lambda s, a, k, step=task.environment.step: (*step(s, a, k)[:3], jnp.zeros((), bool))
    )
    endless = dataclasses.replace(task, environment=immortal)
    bare = envs.get_environment(name, backend="spring")
    params = 0.1 * jax.random.normal(jax.random.key(0), (n, task.observation_size, task.action_size))
    context = task.context(jax.random.key(1))

    @jax.jit
    def engine(params):
        return Population(lambda w: {"w": w}, params).vmap(endless, context)[0]

    @jax.jit
    def engine_early(params):
        values, aux = Population(lambda w: {"w": w}, params).vmap(task, context)
        return values, aux["steps"].sum()

    @jax.jit
    def by_hand(params):
        key = jax.random.split(jax.random.split(context.key)[1], 1)[0]

        def rollout(w):
            def step(carry, _):
                state, total = carry
                state = bare.step(state, jnp.tanh(state.obs @ w))
                return (state, total + state.reward), None

            state = bare.reset(jax.random.split(key)[0])
            return -jax.lax.scan(step, (state, jnp.zeros(())), None, steps)[0][1]

        return jax.vmap(rollout)(params)

    seconds = {}
    for side, run in (("engine", engine), ("early", engine_early), ("hand", by_hand)):
        begin = time.perf_counter()
        jax.block_until_ready(run(params))
        seconds[side] = time.perf_counter() - begin
    different = float(jnp.abs(engine(params) - by_hand(params)).max())
    t = interleaved(
        {"engine": lambda: engine(params), "hand": lambda: by_hand(params), "early": lambda: engine_early(params)},
        repeats,
    )
    total = n * steps
    alive = int(engine_early(params)[1])
    first = row(f"{name} all steps", total / t["engine"], "steps/s", total / t["hand"], more_is_better=True)
    return [
        first
        | {"first_call_s": seconds["engine"], "peer_first_call_s": seconds["hand"], "returns_differ_by": different},
        row(f"{name} with early exit, time of a generation", t["early"] * 1e3, "ms", t["hand"] * 1e3)
        | {"steps_alive": alive, "steps_at_most": total},
    ]


if __name__ == "__main__":
    main()
