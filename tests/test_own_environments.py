"""Environments of one's own: what Python answers is taken, what is no answer is said in three parts."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt.envs import gymnax, policies
from evoopt.envs.rollout import Environment, Task

KEY = jax.random.key(0)
POINT = policies.Policy(lambda params, x: params, lambda key: jnp.zeros(1))


def reset(key):
    return jnp.zeros(2), jnp.ones(3)


def step(state, action, key):
    return state + action[0], jnp.ones(3), 1.0, False


def task(reset=reset, step=step, policy=None, shape=(3,), size=1, **options):
    return Task(Environment(reset, step, shape, size), policy, episode_length=5, **options)


# ---- answers of Python and NumPy ----


REWARDS = [1.0, 1, True, np.float64(1), np.float16(1), np.int8(1), np.ones(()), jnp.int32(1)]
DONE = [False, 0, np.False_, np.int64(0), np.zeros(()), jnp.array(0.0)]


@pytest.mark.parametrize(
    ("reward", "done", "repeat"), [(True, False, 2), *((r, False, 1) for r in REWARDS), *((1.0, d, 1) for d in DONE)]
)
def test_numbers_of_any_kind_are_rewards_and_ends(reward, done, repeat):
    t = task(step=lambda state, action, key: (state, np.ones(3), reward, done), action_repeat=repeat)
    value, aux = jax.eval_shape(t, t.init(KEY), t.context(KEY))
    assert (value.shape, value.dtype, aux["steps"].dtype) == ((), jnp.float32, jnp.int32)


def test_a_python_environment_gives_its_return():
    """Everything at once: Python numbers for state, reward and end, a NumPy observation, three steps of five."""
    t = task(lambda key: (0, np.ones(3)), lambda s, a, key: (s + 1, np.ones(3), 2, s == 2))
    value, aux = jax.jit(t)(t.init(KEY), t.context(KEY))
    assert (float(value), int(aux["steps"])) == (-6.0, 3)
    always = task(step=lambda s, a, key: (s, jnp.ones(3), True, True))
    value, aux = jax.jit(always)(always.init(KEY), always.context(KEY))
    assert (float(value), int(aux["steps"])) == (-1.0, 1)


# ---- what is no answer ----


def answers(*found):
    return lambda *_: found if len(found) != 1 else found[0]


CASES = {
    "another library's": (
        lambda: Task(SimpleNamespace(reset=reset, step=step)), "without observation_shape", "Gymnasium"),
    "a class": (lambda: Task(Environment), "the class Environment", "an instance is meant"),
    "none": (lambda: Task(None), "NoneType", "Gymnasium"),
    "results in place of functions": (lambda: task(reset=(0, 1)), "tuple and function", "instead of the functions"),
    "a size as shape": (lambda: task(shape=3), "observation_shape=3", "(4,), not 4"),
    "a shape as size": (lambda: task(size=(1,)), "action_size=(1,)", "2, not (2,)"),
    "no actions": (lambda: task(size=0), "action_size=0", ""),
    "reset without state": (lambda: task(answers(jnp.ones(3))), "one result", "a state that is not returned"),
    "reset with info": (lambda: task(answers(0, jnp.ones(3), {})), "3 results", "Gymnasium"),
    "reset the other way round": (lambda: task(answers(jnp.ones(3), {"x": 0})), "a dict", "the state comes first"),
    "arrays the other way round": (
        lambda: task(answers(jnp.ones(3), jnp.ones(2))), "shape (2,)", "the state comes first"),
    "observation in a list": (lambda: task(answers(0, [1.0, 1.0, 1.0])), "a list", "jnp.array"),
    "observations of strings": (lambda: task(answers(0, np.array(["a"] * 3))), "a ndarray", ""),
    "observation None": (lambda: task(answers(0, None)), "None", ""),
    "text in the state": (lambda: task(answers({"name": "x"}, jnp.ones(3))), "'x' at 'name'", "text"),
    "as in Gymnasium": (lambda: task(step=answers(jnp.ones(3), 1.0, False, False, {})), "5 results", "Gymnasium"),
    "as in Gymnax": (
        lambda: task(step=answers(jnp.ones(3), jnp.zeros(2), 1.0, False)), "shape (2,)", "state comes first"),
    "step without done": (lambda: task(step=answers(jnp.zeros(2), jnp.ones(3), 1.0)), "3 results", ""),
    "step without return": (lambda: task(step=answers(None)), "None", ""),
    "a reward in an array": (
        lambda: task(step=answers(jnp.zeros(2), jnp.ones(3), jnp.ones(1), False)), "shape (1,)", "reward[0]"),
    "a reward None": (lambda: task(step=answers(jnp.zeros(2), jnp.ones(3), None, False)), "None", "reward"),
    "a complex reward": (lambda: task(step=answers(jnp.zeros(2), jnp.ones(3), 1j, False)), "complex", "reward"),
    "done in an array": (
        lambda: task(step=answers(jnp.zeros(2), jnp.ones(3), 1.0, jnp.zeros(1, bool))), "shape (1,)", "done[0]"),
    "another observation": (
        lambda: task(step=answers(jnp.zeros(2), jnp.ones(4), 1.0, False)), "shape (4,)", "observation_shape"),
    "a state that grows": (
        lambda: task(step=lambda s, a, k: (jnp.append(s, 0.0), jnp.ones(3), 1.0, False)),
        "(3,) after it at '.'", "grows"),
    "a state with more": (
        lambda: task(answers({"x": 0}, jnp.ones(3)), answers({"x": 0, "t": 1}, jnp.ones(3), 1.0, False)),
        "'t' after it", "step adds"),
    "another container": (
        lambda: task(answers((0, 1), jnp.ones(3)), answers([0, 1], jnp.ones(3), 1.0, False)), "container", ""),
    "a state that was whole": (
        lambda: task(answers(0, jnp.ones(3)), lambda s, a, k: (s / 2, jnp.ones(3), 1.0, False)),
        "int32 before", "0.0"),
    "a flag that counts": (
        lambda: task(answers(False, jnp.ones(3)), lambda s, a, k: (s.astype(jnp.int32) + 1, jnp.ones(3), 1.0, False)),
        "bool before", "0.0"),
    "an observation that was whole": (
        lambda: task(answers(0, jnp.ones(3, jnp.int32)), answers(0, jnp.ones(3), 1.0, False), POINT,
                     normalize_observations=False), "int32 before", "0.0"),
    "an object in the state": (lambda: task(answers(object(), jnp.ones(3))), "a object at '.'", "another object"),
    "an action without an axis": (
        lambda: task(policy=policies.Policy(lambda p, x: p, lambda key: jnp.zeros(()))), "shape ()", "policy"),
    "an action of two axes": (
        lambda: task(policy=policies.Policy(lambda p, x: p, lambda key: jnp.zeros((1, 1)))), "shape (1, 1)", "policy"),
    "if": (lambda: task(step=lambda s, a, k: (s, jnp.ones(3), 1.0, bool(s[0] > 1))), "TracerBool", "jit=False"),
    "NumPy": (lambda: task(step=lambda s, a, k: (np.sin(s), jnp.ones(3), 1.0, False)), "TracerArray", "jit=False"),
    "if in reset": (
        lambda: task(lambda k: (0, jnp.ones(3)) if jax.random.uniform(k) > 0 else None, policy=lambda p, x: p),
        "TracerBool", "jit=False"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_environment_is_said_in_three_parts(case):
    call, got, cause = CASES[case]
    with pytest.raises((ValueError, TypeError), match=r"(?s)^expected .*\ngot .*\nusual cause: ") as raised:
        call()
    text = str(raised.value)
    assert got in text
    assert cause in text.split("usual cause: ")[1] or cause in text.split("\ngot ")[0]


@pytest.mark.parametrize("case", ["as in Gymnasium", "a reward in an array", "a state that grows", "if"])
def test_a_policy_without_init_meets_the_same_errors_when_it_is_called(case, monkeypatch):
    """Before there are parameters, nobody knows what such a policy answers."""
    monkeypatch.setattr(f"{__name__}.task", lambda *args, **options: task_without_init(*args, **options))
    made = CASES[case][0]()
    with pytest.raises((ValueError, TypeError), match=r"(?s)^expected .*\ngot .*\nusual cause: "):
        made(jnp.zeros(1), made.context(KEY))


def task_without_init(reset=reset, step=step):
    return Task(Environment(reset, step, (3,), 1), lambda params, observation: params, episode_length=5)


# ---- observations that are none ----


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("repeat", [1, 2])
def test_a_policy_that_was_shown_nan_has_no_score(normalize, repeat):
    """By the sign of its action a candidate is shown NaN at the third decision, at the end only, or never."""

    def step(state, action, key):
        t, last = state + 1, 4 * repeat
        nan = jnp.where(action[0] > 0, t == 2 * repeat, (action[0] < 0) & (t == last))
        return t, jnp.where(nan, jnp.nan, jnp.ones(3)), 1.0, t == last

    environment = Environment(lambda key: (0, jnp.ones(3)), step, (3,), 1)
    options = {"episode_length": 20, "normalize_observations": normalize, "action_repeat": repeat}
    t = Task(environment, lambda params, observation: params, **options)
    values, aux = jax.vmap(t, (0, None))(jnp.array([[1.0], [-1.0], [0.0]]), t.context(KEY))
    np.testing.assert_array_equal(values, [jnp.nan, -4.0 * repeat, -4.0 * repeat])
    if normalize:
        assert t.update(t.context(KEY), aux).observations.count == 8  # of the two that answered


def test_nan_after_reset_is_no_answer():
    t = task(lambda key: (jnp.zeros(2), jnp.full(3, jnp.nan)))
    assert jnp.isnan(t(t.init(KEY), t.context(KEY))[0])


# ---- gymnax ----


def test_an_environment_that_would_download_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setitem(gymnax.DOWNLOADS, "MNISTBandit-bsuite", (tmp_path, gymnax.MNIST, "https://here/"))
    with pytest.raises(OSError, match=r"(?s)expected the data of MNIST.*got no train.*usual cause: .*https://here/"):
        gymnax.make("MNISTBandit-bsuite")


def test_what_gymnax_downloads_is_known():
    """Its loader's folder, files and address, as its source has them."""
    source = Path(gymnax.load("gymnax.utils.load_mnist").__file__).read_text()
    for folder, files, address in gymnax.DOWNLOADS.values():
        assert all(f'"{text}"' in source for text in (str(folder), *files, address))
