"""Environments as objectives: the same numbers as a loop by hand, in memory that does not grow."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt.envs import brax, functions, gymnax, libraries, normalization, policies, rollout
from evoopt.envs.normalization import Moments
from evoopt.envs.rollout import Environment, Task

KEY = jax.random.key(0)


def walk(size=2, limit=1000):
    """The reward is the action, observations are random; an episode ends after `limit` steps, then all is NaN."""

    def reset(key):
        return 0, jax.random.normal(key, (size,)) + 3

    def step(state, action, key):
        over = state >= limit
        observation = jnp.where(over, jnp.nan, jax.random.normal(key, (size,)) + 3)
        return state + 1, observation, jnp.where(over, jnp.nan, jnp.sum(action)), state + 1 == limit

    return Environment(reset, step, (size,), 1)


def population(task, n=6, scale=1.0):
    """Several sets of parameters around the policy's start."""
    start = task.init(KEY)
    leaves, structure = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noise = [scale * jax.random.normal(k, (n, *x.shape)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.map(jnp.add, start, structure.unflatten(noise))


def evaluate(task, params, context, each=None):
    return jax.jit(jax.vmap(task, (0, None, None if each is None else 0)))(params, context, each)


def row(params, i):
    return jax.tree.map(lambda leaf: leaf[i], params)


def by_hand(task, params, context, reset, step):
    """For each candidate, the returns of its episodes and the observations seen: loops over the environment itself.

    step: (state, action, key) -> (state, observation, reward, done).
    """

    @jax.jit
    def act(params, state, observation, memory, key):
        if context.observations is not None:
            observation = normalization.normalize(context.observations, observation)
        action, memory = task.policy.step(params, observation, memory)
        with jax.numpy_dtype_promotion("standard"):  # other people's code
            return *step(state, action, key), memory

    @jax.jit
    def start(key):
        with jax.numpy_dtype_promotion("standard"):
            return reset(key)

    for i in range(len(jax.tree.leaves(params)[0])):
        returns, seen = [], []
        for key in jax.random.split(jax.random.split(context.key)[1], task.episodes):
            reset_key, step_key = jax.random.split(key)
            state, observation = start(reset_key)
            total, memory = 0.0, task.policy.carry
            for t in range(task.episode_length):
                seen.append(observation)
                now = jax.random.fold_in(step_key, t)
                state, observation, reward, done, memory = act(row(params, i), state, observation, memory, now)
                total += float(reward)
                if done:
                    break
            returns.append(total)
        yield i, returns, np.stack(seen)


def gymnax_by_hand(name, action_of):
    import gymnax as library

    env, params = library.make(name)

    def step(state, action, key):
        observation, state, reward, done, _ = env.step_env(key, state, action_of(action), params)
        return state, observation, reward, done

    return lambda key: env.reset_env(key, params)[::-1], step


CASES = [
    ("CartPole-v1", policies.mlp(4, 2, (8,), squash=None), jnp.argmax, {"episode_length": 80}),
    (
        "CartPole-v1",
        lambda params, x: (x @ params > 0).astype(jnp.int32),
        lambda action: action,
        {"episode_length": 80},
    ),
    ("Pendulum-v1", policies.gru(3, 1, 8), lambda action: 2 * action, {"episode_length": 40, "episodes": 2}),
]


@pytest.mark.parametrize(("name", "policy", "action_of", "options"), CASES)
def test_the_return_and_the_moments_are_those_of_a_loop_by_hand(name, policy, action_of, options):
    task = gymnax.make(name, policy, **{"episodes": 3, **options})
    params = population(task, 4) if task.policy.init else jax.random.normal(KEY, (4, 4))
    context = dataclasses.replace(
        task.context(jax.random.key(3)),
        observations=Moments(
            jnp.float32(100), jnp.full(task.observation_size, 0.1), jnp.full(task.observation_size, 0.5)
        ),
    )
    values, aux = evaluate(task, params, context)
    after = task.update(context, aux)
    everything = []
    for i, returns, seen in by_hand(task, params, context, *gymnax_by_hand(name, action_of)):
        np.testing.assert_allclose(values[i], -np.mean(returns), rtol=2e-4)
        np.testing.assert_allclose(aux["steps"][i], len(seen))
        np.testing.assert_allclose(aux["length"][i] * task.episodes, len(seen), rtol=1e-6)
        everything.append(seen)
    seen = np.concatenate(everything)
    # 100 earlier observations of mean 0.1 and variance 0.5, and those seen now
    both = np.concatenate(
        [np.full((50, seen.shape[1]), 0.1 - 0.5**0.5), np.full((50, seen.shape[1]), 0.1 + 0.5**0.5), seen]
    )
    assert after.observations.count == len(both)
    np.testing.assert_allclose(after.observations.mean, both.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(after.observations.var, both.var(0), rtol=1e-3)


def test_brax_fast_is_a_loop_by_hand():
    from brax import envs

    env = envs.get_environment("fast")
    policy = lambda params, x: params["a"] - params["b"] * x[:1]
    task = brax.make("fast", policy, episode_length=20, descriptor=lambda state: state.pipeline_state.x.pos[:2])
    params = {"a": jnp.array([0.02, 1.0, -1.0]), "b": jnp.array([1.0, 0.0, 0.0])}
    context = task.context(KEY)
    values, aux = evaluate(task, params, context)
    for i in range(3):
        state, total = env.reset(KEY), 0.0
        for _ in range(20):
            observation = jnp.clip(state.obs, -10, 10)  # no observations yet: the policy sees them as they are
            with jax.numpy_dtype_promotion("standard"):
                state = env.step(state, policy(row(params, i), observation))
            total += float(state.reward)
        np.testing.assert_allclose(values[i], -total, rtol=1e-5)
        np.testing.assert_allclose(aux["descriptor"][i], state.pipeline_state.x.pos[:2], rtol=1e-5)
    assert len(set(values.tolist())) == 3


def test_brax_physics_is_a_loop_by_hand():
    """Inverted double pendulum: candidates fall at different times."""
    from brax import envs

    env = envs.get_environment("inverted_double_pendulum", backend="spring")
    task = brax.make("inverted_double_pendulum", episode_length=60)
    params, context = population(task, 3, 0.3), task.context(KEY)
    values, aux = evaluate(task, params, context)
    reset = lambda key: (lambda state: (state, state.obs))(env.reset(key))

    def step(state, action, key):
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done

    for i, returns, seen in by_hand(task, params, context, reset, step):
        np.testing.assert_allclose(values[i], -returns[0], rtol=1e-3)
        assert aux["length"][i] == len(seen) < 60
    system, states, totals = task.trajectory(row(params, 0), context, KEY)
    assert system is not None
    assert len(states) == len(totals) > 2
    assert states[0].x.pos.shape == (3, 3)
    assert task.dt == pytest.approx(0.02)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_nothing_counts_after_the_end(block, monkeypatch):
    monkeypatch.setattr(rollout, "BLOCK", block)
    one = lambda params, observation: jnp.ones(1) + params
    task = Task(walk(limit=9), one, episode_length=200, descriptor=lambda state: jnp.float32(state)[None])
    value, aux = jax.jit(task)(jnp.zeros(()), task.context(KEY))
    assert value == -9
    assert aux["length"] == 9
    assert aux["steps"] == 9
    assert aux["observations"].count == 9
    assert jnp.isfinite(aux["observations"].mean).all()
    assert aux["descriptor"] == 9


@pytest.mark.parametrize(("repeat", "length"), [(4, 200), (2, 7), (10, 200)])
def test_an_episode_may_end_in_the_midst_of_a_repeated_action(repeat, length):
    one = lambda params, observation: jnp.ones(1) + params
    task = Task(walk(limit=9), one, episode_length=length, action_repeat=repeat)
    value, aux = jax.jit(task)(jnp.zeros(()), task.context(KEY))
    assert -value == aux["length"] == min(9, length)
    assert aux["observations"].count == -(-min(9, length) // repeat)


def test_one_at_a_time_or_all_at_once():
    task = gymnax.make("CartPole-v1", episode_length=100)
    params, context = population(task), task.context(KEY)
    together, alone = (
        evaluate(task, params, context),
        jax.jit(lambda p: jax.lax.map(lambda x: task(x, context), p))(params),
    )
    assert len(set(together[0].tolist())) > 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, alone)


def test_memory_does_not_grow_with_the_episode():
    def temporary(length):
        task = gymnax.make("Pendulum-v1", policies.mlp(3, 1), episode_length=length)
        compiled = jax.jit(jax.vmap(task, (0, None))).lower(population(task, 16), task.context(KEY)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1000) <= 1.02 * temporary(100)


def test_common_random_numbers():
    task = gymnax.make("Pendulum-v1", episode_length=30)
    context = task.context(KEY)
    twins = jax.tree.map(lambda x: jnp.stack([x] * 3), task.init(KEY))
    values, aux = evaluate(task, twins, context)
    assert task.each(context, 3) is None
    assert len(set(values.tolist())) == 1
    later = task.update(context, aux)
    fresh = dataclasses.replace(later, observations=context.observations)
    assert evaluate(task, twins, fresh)[0][0] != values[0]  # the next generation meets new episodes

    task = gymnax.make("Pendulum-v1", episode_length=30, common_random_numbers=False)
    each = task.each(context, 3)
    values, aux = evaluate(task, twins, context, each)
    assert len(set(values.tolist())) == 3
    again, _ = jax.jit(task)(task.init(KEY), context, each[1])
    np.testing.assert_allclose(again, values[1], rtol=1e-5)
    with pytest.raises(ValueError, match="exactly where common_random_numbers is False"):
        task(task.init(KEY), context)


def test_no_two_episodes_share_a_key():
    """`fold_in(key, i)` is `split(key)[i]`: a context that went on by one and drew by the other would repeat itself."""
    task = gymnax.make("CartPole-v1", episodes=4)
    context, keys = task.context(KEY), []
    for _ in range(5):
        after, now = rollout._keys(context)
        keys += [
            context.key,
            now,
            *jax.random.split(now, 4),
            *(k for e in jax.random.split(now, 4) for k in jax.random.split(e)),
        ]
        context = dataclasses.replace(context, key=after)
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == len(keys)


def test_context_keeps_its_types_and_update_takes_any_order():
    task = gymnax.make("CartPole-v1")
    params, context = population(task, 32), task.context(KEY)
    update = jax.jit(lambda context, aux: task.update(context, aux))
    _, aux = evaluate(task, params, context)
    after = update(context, aux)
    assert jax.tree.map(jax.typeof, context) == jax.tree.map(jax.typeof, after)
    back = update(context, jax.tree.map(lambda x: x[::-1], aux))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.observations, back.observations)


def test_a_nan_return_is_no_answer_and_poisons_nothing():
    """Candidate 1's reward is NaN; candidate 2's observations are infinite."""

    def step(state, action, key):
        reward = jnp.where(action[0] == 1, jnp.nan, 1.0)
        return state, jnp.where(action == 2, jnp.inf, jax.random.normal(key, (1,))), reward, jnp.array(False)

    environment = Environment(lambda key: (0.0, jnp.zeros(1)), step, (1,), 1)
    task = Task(environment, lambda params, observation: params, episode_length=10)
    params, context = jnp.arange(4.0)[:, None], task.context(KEY)
    values, aux = evaluate(task, params, context)
    assert jnp.isnan(values).tolist() == [False, True, False, False]
    after = task.update(context, aux)
    _, clean = evaluate(task, params[::3], context)
    expected = task.update(context, clean)
    assert after.observations.count == 20
    jax.tree.map(np.testing.assert_array_equal, after.observations, expected.observations)
    nobody = jax.tree.map(lambda x: x[1:2], aux)
    jax.tree.map(np.testing.assert_array_equal, task.update(after, nobody).observations, after.observations)


def test_moments_keep_their_digits():
    """A mean of 1000 standard deviations, 20 generations, in float32."""
    data = np.random.default_rng(0).normal(1000, 1, (20, 16, 50, 3)).astype(np.float32)
    moments = normalization.empty((3,))
    observe = jax.jit(
        lambda m, x: jax.lax.scan(lambda m, x: (normalization.observe(m, x, jnp.array(True)), None), m, x)[0]
    )
    for generation in data:
        rows = jax.vmap(observe, (None, 0))(normalization.empty((3,)), jnp.asarray(generation))
        moments = normalization.merge(moments, rows)
    flat = data.reshape(-1, 3).astype(np.float64)
    assert moments.count == len(flat)
    np.testing.assert_allclose(moments.mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.var, flat.var(0), rtol=1e-3)
    z = jax.vmap(lambda x: normalization.normalize(moments, x))(jnp.asarray(data.reshape(-1, 3)))
    assert abs(float(z.mean())) < 1e-3
    assert float(z.std()) == pytest.approx(1, abs=1e-3)


def test_large_counts_still_move():
    rows = Moments(jnp.full(64, 16.0), jnp.ones((64, 1)), jnp.ones((64, 1)))
    moments = Moments(jnp.float32(2e8), jnp.zeros(1), jnp.ones(1))
    after = moments
    for _ in range(10):
        after = normalization.merge(after, rows)
    assert after.count - moments.count == 10 * 1024
    np.testing.assert_allclose(after.mean, 10240 / 2e8, rtol=1e-3)
    full = Moments(jnp.float32(normalization.MAX_COUNT), jnp.zeros(1), jnp.ones(1))
    after = normalization.merge(full, rows)
    assert after.count == full.count
    assert 0 < after.mean < 1e-5


def test_the_policy_sees_normalized_observations():
    """The reward is what the policy sees."""
    task = Task(walk(size=1), lambda params, observation: params * observation, episode_length=1, episodes=50)
    raw = dataclasses.replace(task, normalize_observations=False)
    assert raw.context(KEY).observations is None
    assert -jax.jit(raw)(jnp.ones(1), raw.context(KEY))[0] == pytest.approx(3, abs=0.5)
    mean = jax.jit(lambda context: -task(jnp.ones(1), context)[0])
    context = task.context(KEY)
    assert mean(context) == pytest.approx(3, abs=0.5)  # nothing known yet
    _, aux = evaluate(task, jnp.ones((4, 1)), context)
    context = task.update(context, aux)
    assert mean(context) == pytest.approx(0, abs=0.5)
    far = dataclasses.replace(context, observations=Moments(jnp.float32(9), jnp.zeros(1), jnp.full(1, 1e-6)))
    assert mean(far) == 10  # clipped


def test_memory_starts_anew_in_every_episode():
    count = policies.Policy(lambda params, observation, carry: (carry + 1, carry + 1), carry=np.zeros(1, np.float32))
    task = Task(walk(limit=5), count, episodes=3, episode_length=100)
    value, aux = jax.jit(task)(None, task.context(KEY))
    assert value == -(1 + 2 + 3 + 4 + 5)
    assert aux["steps"] == 15
    assert not count.carry.any()


def test_evaluate_and_trajectory_are_the_same_episodes():
    task = gymnax.make("CartPole-v1")
    params, context = row(population(task), 1), task.context(KEY)
    tested = task.evaluate(params, context, KEY, episodes=5)
    assert tested["returns"].shape == tested["lengths"].shape == (5,)
    system, states, returns = task.trajectory(params, context, jax.random.split(KEY, 5)[2])
    assert system.max_steps_in_episode == 500
    assert len(states) == len(returns) == tested["lengths"][2] + 1
    assert returns[0] == 0
    assert returns[-1] == tested["returns"][2]
    assert [int(state.time) for state in states] == list(range(len(states)))
    _, states, returns = task.trajectory(params, context, jax.random.split(KEY, 5)[2], steps=4)
    assert len(states) == 5


def test_describe_is_plain_and_sizes_are_right():
    task = brax.make("fast", action_repeat=2, episodes=3, episode_length=100)
    described = task.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["environment"] == "fast"
    assert described["backend"] == "spring"
    assert (task.observation_size, task.action_size, task.steps_per_evaluation) == (2, 1, 300)
    assert jax.jit(lambda task: task.steps_per_evaluation)(task) == 300  # a pytree without leaves
    hash(task)


def test_every_gymnax_action_reaches_the_environment():
    low = gymnax.make("Pendulum-v1", lambda params, x: jnp.full(1, params), episode_length=1)
    context = low.context(KEY)
    cost = [float(low(jnp.float32(a), context)[0]) for a in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(np.diff(cost), [0.001 * 1, 0.001 * 3], rtol=1e-2)  # torques 0, 1, 2: 0.001 u^2


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        (lambda: brax.make("hoper"), ValueError, ["expected a Brax environment", "'hoper'", "'hopper'"]),
        (lambda: brax.make("fast", backend="mujoco"), ValueError, ["expected a Brax backend", "'mujoco'"]),
        (lambda: brax.make("hopper", wind=3), TypeError, ["options of hopper", "wind"]),
        (lambda: brax.make("fast", obs_mode="dict_state"), ValueError, ["one array", "state"]),
        (lambda: gymnax.make("CartPole"), ValueError, ["expected a Gymnax environment", "'CartPole-v1'"]),
        (lambda: gymnax.make("CartPole-v1", wind=3), TypeError, ["options of CartPole-v1", "wind"]),
        (lambda: brax.make("fast", episodes=0), ValueError, ["episodes of at least 1", "episodes=0"]),
        (lambda: brax.make("fast", policies.mlp(2, 3)), ValueError, ["to 1 numbers", "shape (3,)"]),
        (lambda: brax.make("fast", policies.mlp(3, 1)), ValueError, ["shape (2,)", "which raised", "(2, 1)"]),
        (lambda: brax.make("fast", {"w": 0.0}), TypeError, ["expected a Policy", "dict"]),
        (lambda: brax.make("fast", lambda p, x: p).init(KEY), TypeError, ["a policy with init", "Policy(apply, init)"]),
    ],
)
def test_errors_say_what_was_expected_what_came_and_why(call, kind, parts):
    with pytest.raises(kind) as raised:
        call()
    text = str(raised.value)
    assert all(part in text for part in ["expected ", "\ngot ", "\nusual cause: ", *parts]), text


@pytest.mark.parametrize("module", [brax, gymnax])
def test_a_missing_extra_says_how_to_install_it(module, monkeypatch):
    extra = module.__name__.split(".")[-1]
    for name in [name for name in sys.modules if name == extra or name.startswith(f"{extra}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install evoopt-jax\[{extra}\]"):
        module.make("anything")


def test_imports_are_lazy_and_quiet():
    code = (
        "import sys, evoopt.envs; from evoopt.envs import brax, gymnax, policies, functions\n"
        "assert not {'brax', 'gymnax', 'mujoco'} & set(sys.modules)\n"
        "brax.make('inverted_pendulum'); gymnax.make('CartPole-v1')\n"
    )
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_others_print_besides_passes(capsys, monkeypatch, tmp_path):
    (tmp_path / "talkative.py").write_text("print('Failed to import warp: x')\nprint('hello')\n")
    monkeypatch.syspath_prepend(tmp_path)
    libraries.load("talkative")
    assert capsys.readouterr().out == "hello\n"


OPTIMA = [
    (functions.sphere, jnp.zeros(4)),
    (functions.ellipsoid, jnp.zeros(4)),
    (functions.rosenbrock, jnp.ones(4)),
    (functions.rastrigin, jnp.zeros(4)),
    (functions.ackley, jnp.zeros(4)),
    (functions.himmelblau, jnp.array([3.0, 2.0])),
    (functions.beale, jnp.array([3.0, 0.5])),
]


@pytest.mark.parametrize(("f", "x_opt"), OPTIMA)
def test_functions_are_least_at_their_optimum(f, x_opt):
    assert f(x_opt) == 0
    around = x_opt + jax.random.uniform(KEY, (200, len(x_opt)), minval=-0.5, maxval=0.5)
    values = jax.vmap(f)(around)
    assert values.shape == (200,)
    assert (values > 0).all()
    moved = functions.shifted(f, jnp.full(len(x_opt), 0.5))
    assert moved(x_opt + 0.5) == 0
    turned = functions.rotated(f, KEY, len(x_opt))
    np.testing.assert_allclose(turned(jax.random.orthogonal(KEY, len(x_opt)).T @ x_opt), 0, atol=1e-4)
    assert turned(around[0]) != values[0] or f is functions.sphere


def test_functions_have_their_published_values():
    x = jnp.array([0.5, -1.5, 2.0])
    np.testing.assert_allclose(functions.ellipsoid(x), 0.25 + 1e3 * 2.25 + 1e6 * 4, rtol=1e-5)
    np.testing.assert_allclose(
        functions.rastrigin(x), 30 + sum(v * v - 10 * np.cos(2 * np.pi * v) for v in x.tolist()), rtol=1e-5
    )
    xs = np.asarray(x, float)
    ackley = -20 * np.exp(-0.2 * np.sqrt((xs**2).mean())) - np.exp(np.cos(2 * np.pi * xs).mean()) + 20 + np.e
    np.testing.assert_allclose(functions.ackley(x), ackley, rtol=1e-5)
    assert functions.rosenbrock(jnp.array([-1.0, 1.0, 2.0])) == 4 + 100
    assert functions.himmelblau(jnp.zeros(2)) == 170
    np.testing.assert_allclose(functions.beale(jnp.zeros(2)), 1.5**2 + 2.25**2 + 2.625**2)
