"""Programs are kept: what compiles once, what must not be taken for the same, and the cache on disk."""

import collections
import contextlib
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES

from evoopt import Session, minimize, strategies
from evoopt.run import keys, programs, threads
from evoopt.run.compiled import Compiled
from evoopt.run.problem import Problem

X0 = np.zeros(4)
COMPILED = "/jax/core/compile/backend_compile_duration"
_counts = [0]
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: _count(name))


def _count(name):
    _counts[0] += name == COMPILED


@contextlib.contextmanager
def compilations():
    """A list that has the number of programs compiled inside, once that is left."""
    found, before = [], _counts[0]
    yield found
    found.append(_counts[0] - before)


def shifted(by, power=2):
    """A new function each time."""
    return lambda x: jnp.sum((x - by) ** power)


def run(f, *, seed=0, sigma=0.5, **options):
    return minimize(f, X0, strategies.cma_es(8, sigma=sigma), key=seed, **{"generations": 20, **options})


def test_the_second_call_compiles_nothing():
    """Neither with another seed, budget, target, hyperparameter or constant, nor with the lambda written again."""
    data = np.arange(4.0)
    first = run(shifted(jnp.asarray(data)))
    again = [
        lambda: run(shifted(jnp.asarray(data))),
        lambda: run(shifted(jnp.asarray(data)), seed=1),
        lambda: run(shifted(jnp.asarray(data)), generations=700),
        lambda: run(shifted(jnp.asarray(data)), evaluations=80),
        lambda: run(shifted(jnp.asarray(data)), target=1e-3),
        lambda: run(shifted(jnp.asarray(data)), sigma=0.25),
        lambda: run(shifted(jnp.asarray(3.0 * data))),
    ]
    for call in again:
        with compilations() as found:
            result = call()
        assert found == [0]
    with compilations() as found:
        assert run(shifted(jnp.asarray(data))).best_value == first.best_value
    assert found == [0]
    assert result.best_value != first.best_value  # other data, other values


def test_the_second_call_of_a_python_objective_compiles_nothing():
    f = lambda x: float(np.sum((x - 1.0) ** 2))
    for strategy in (strategies.cma_es(8, sigma=0.5), strategies.snes(8)):
        minimize(f, X0, strategy, generations=3, jit=False)
        with compilations() as found:
            minimize(lambda x: 2 * f(x), X0, strategy, generations=5, jit=False, key=1)
            session = Session(strategy, X0, key=5)
            session.tell(generation := session.ask(), [f(x) for x in generation])
        assert found == [0]


def test_what_computes_something_else_is_another_program():
    class Objective:
        power = 2
        scale = 1.0

        def __call__(self, x):
            return jnp.sum(jnp.abs(x - 1.0) ** self.power) * self.scale

    f = Objective()
    values = [run(f).best_value]
    for name, value in (("power", 4), ("scale", 8.0), ("scale", 1.0), ("power", 2)):
        setattr(f, name, value)  # in place, between two calls
        values.append(run(f).best_value)
    assert values[0] == values[-1]
    assert values[1] == values[3]
    assert len(set(values[:3])) == 3
    assert run(shifted(1.0)).best_value != run(shifted(1.0, power=4)).best_value
    assert run(lambda x: jnp.sum(jnp.copysign(x, 0.0))).best_value == run(lambda x: jnp.sum(jnp.abs(x))).best_value
    assert run(lambda x: jnp.sum(jnp.copysign(x, -0.0))).best_value < 0


PAIRS = {
    "the same": (lambda x: jnp.tanh(x).sum(), lambda y: jnp.tanh(y).sum(), True),
    "a relu": (lambda x: jax.nn.relu(x).sum(), lambda x: jax.nn.relu(x).sum(), True),
    "a scan": (
        lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)[0].sum(),
        lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)[0].sum(),
        True,
    ),
    "another length": (
        lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)[0].sum(),
        lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=4)[0].sum(),
        False,
    ),
    "another body": (
        lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)[0].sum(),
        lambda x: jax.lax.scan(lambda c, _: (jnp.cos(c), None), x, None, length=3)[0].sum(),
        False,
    ),
    "operands swapped": (lambda x: (x[0] - x[1]), lambda x: (x[1] - x[0]), False),
    "a literal": (lambda x: (x * 2.0).sum(), lambda x: (x * 3.0).sum(), False),
    "the sign of zero": (lambda x: jnp.copysign(x, 0.0).sum(), lambda x: jnp.copysign(x, -0.0).sum(), False),
    "an axis": (lambda x: jnp.stack([x, 2 * x]).max(0).sum(), lambda x: jnp.stack([x, 2 * x]).max(1).sum(), False),
    "one more step": (lambda x: jnp.sin(x).sum(), lambda x: jnp.sin(jnp.sin(x)).sum(), False),
    "what comes out": (lambda x: (x.sum(), x.max()), lambda x: (x.max(), x.sum()), False),
    "its structure": (lambda x: (x.sum(), x.max()), lambda x: [x.sum(), x.max()], False),
    "a precision": (
        lambda x: jnp.dot(x, x, precision="highest"),
        lambda x: jnp.dot(x, x, precision="default"),
        False,
    ),
    "arrays inside": (lambda x: (x * jnp.arange(4.0)).sum(), lambda x: (x * jnp.arange(4.0)).sum(), True),
    "a callback": (
        lambda x: jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct((), jnp.float32), x[0]),
        lambda x: jax.pure_callback(lambda v: 2 * v, jax.ShapeDtypeStruct((), jnp.float32), x[0]),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_function_is_known_by_what_it_computes(name):
    f, g, equal = PAIRS[name]
    x = jnp.array([0.5, -0.25, 3.0, 1.0])
    (first, arrays), (second, others) = programs.Traced.of(f, x), programs.Traced.of(g, x)
    assert (first == second) is equal
    if equal:
        assert hash(first) == hash(second)
    for traced, consts, whole in ((first, arrays, f), (second, others, g)):
        if name != "a callback":
            assert jax.tree.leaves(traced(consts, x)) == jax.tree.leaves(whole(x))


def test_derivatives_are_those_of_the_objective():
    @jax.custom_jvp
    def f(x):
        return x**2

    f.defjvp(lambda primals, tangents: (primals[0] ** 2, 5.0 * tangents[0]))
    start = np.ones(3, np.float32)
    stepped = minimize(lambda x: f(x).sum(), start, strategies.gradient(optax.sgd(0.1)), generations=1)
    assert np.allclose(stepped.recommended, 0.5)
    plain = minimize(lambda x: (x**2).sum(), start, strategies.gradient(optax.sgd(0.1)), generations=1)
    assert np.allclose(plain.recommended, 0.8)


def test_a_strategy_that_is_no_pytree_is_never_taken_for_another():
    class Line:
        """Moves by `step`."""

        oracle = staticmethod(lambda objective: objective)

        def __init__(self, step):
            self.step, self.inner = step, strategies.snes(4)

        def init(self, params, key):
            return self.inner.init(params, key)

        def ask(self, state, key):
            return self.inner.ask(state, key)

        def tell(self, state, population, answers):
            new = self.inner.tell(state, population, answers)
            return new._replace(mean=jax.tree.map(lambda m: m + self.step, state.mean))

        def recommend(self, state):
            return self.inner.recommend(state)

    line = Line(1.0)
    f = lambda x: jnp.sum(x**2)
    assert np.allclose(minimize(f, X0, line, generations=2).recommended, 2.0)
    line.step = 3.0
    assert np.allclose(minimize(f, X0, line, generations=2).recommended, 6.0)


def test_hyperparameters_are_checked_though_they_are_arguments():
    with pytest.raises(ValueError, match="spread"):
        minimize(lambda x: jnp.sum(x**2), X0, strategies.random_search(8, spread=0.0), generations=1)
    with pytest.raises(ValueError, match="finite"):
        minimize(lambda x: jnp.sum(x**2), np.full(3, np.nan), strategies.snes(8), generations=1)
    with pytest.raises(ValueError, match="bfloat16"):
        minimize(lambda x: jnp.sum(x**2), jnp.ones(8, jnp.bfloat16), strategies.mezo(sigma=1e-6), generations=1)


def test_equal_recipes_are_equal():
    """So a recipe that is called again finds its programs."""
    own = {"gradient", "bounded gradient", "averaged scheduled mezo"}  # rows that make an optimizer or a schedule
    new = {name for name, case in CASES.items()
           if jax.tree.structure(case.make()) != jax.tree.structure(case.make())}  # fmt: skip
    assert new <= own | {name for name in CASES if name.startswith("alternating subspace")}


def test_keys_of_a_run_are_jaxs():
    for seed in (0, 1, 2**31, 2**32 - 1):
        key = jax.random.key(seed, impl="threefry2x32")
        data = lambda key: jax.random.key_data(key).tolist()
        assert [data(k) for k in keys.run_keys(key)] == [data(k) for k in jax.random.split(key)]
        for number in (0, 1, 77, 2**31, 2**32 - 1):
            assert data(keys.generation_key(key, number)) == data(jax.random.fold_in(key, number))


def test_few_programs_are_kept():
    """A sweep over objectives does not fill the memory."""
    table, made = collections.OrderedDict(), []
    for i in range(3 * programs.KEPT):
        programs.kept(table, i, lambda i=i: made.append(i) or object())
    assert len(table) == programs.KEPT
    assert programs.kept(table, i, lambda: pytest.fail("it is there")) is table[i]


def test_one_program_for_the_loop():
    engine = Compiled(Problem(shifted(1.0), strategies.cma_es(8), jax.random.key(0)))
    carry = engine.start(X0, jax.random.key(1), None)
    assert engine.lowered(carry).as_text().count("stablehlo.while") >= 1
    with compilations() as found:
        for steps in (1, 5, 300):
            carry, rows = engine.advance(carry, steps, 8, 10**6)
            assert len(rows) == steps
    assert found[0] <= 1


# --- the cache on disk

PROGRAM = """
import sys, numpy as np, jax, jax.numpy as jnp
{before}
from evoopt import minimize, strategies
hits = [0, 0]
def seen(name, **_):
    hits[0] += name == "/jax/compilation_cache/cache_hits"
    hits[1] += name == "/jax/compilation_cache/cache_misses"
jax.monitoring.register_event_listener(seen)
print(minimize(lambda x: jnp.sum((x - 1.0) ** 2), np.zeros(3), strategies.snes(8), generations=5).best_value, *hits)
"""


def process(home, *, before="", **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "EVOOPT"))}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": "", **environment}
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", PROGRAM.format(before=before)]
    found = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home)
    assert found.returncode == 0, found.stderr
    value, hits, misses = found.stdout.split()
    return float(value), int(hits), int(misses), found.stderr


def entries(home):
    return sorted((home / ".cache" / "evoopt").glob("programs-*/*-cache"))


def test_programs_are_kept_on_disk_and_damaged_ones_are_made_again(tmp_path):
    value, hits, misses, said = process(tmp_path)
    assert hits == 0
    assert misses > 0
    assert "EVOOPT_CACHE=off" in said
    assert len(said.splitlines()) == 1
    assert entries(tmp_path)
    assert process(tmp_path)[:3] == (value, misses, 0)
    for i, path in enumerate(entries(tmp_path)):  # cut short, or other bytes
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if i % 2 else b"\x00" * len(data))
    again, _, _, said = process(tmp_path)
    assert again == value
    assert said == ""


def test_the_cache_can_be_turned_off_moved_or_is_the_users_own(tmp_path):
    value = process(tmp_path, EVOOPT_CACHE="off")[0]
    assert not (tmp_path / ".cache").exists()
    assert process(tmp_path, EVOOPT_CACHE=str(tmp_path / "mine"))[0] == value
    assert list((tmp_path / "mine").glob("programs-*/*"))
    own = tmp_path / "own"
    before = f"jax.config.update('jax_compilation_cache_dir', {str(own)!r})"
    assert process(tmp_path, before=before)[3] == ""
    assert not (tmp_path / ".cache").exists()


def test_two_processes_write_at_once(tmp_path):
    found = []
    both = [threading.Thread(target=lambda: found.append(process(tmp_path)[0])) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(found) == 2
    assert found[0] == found[1] == process(tmp_path)[0]


# --- LAPACK's threads


def test_threads_are_limited_inside_and_given_back():
    jnp.linalg.eigh(jnp.eye(3)).eigenvalues.block_until_ready()
    libraries = threads._libraries()
    assert libraries
    before = [one.get_num_threads() for one in libraries]
    with threads.limited(100):
        assert {one.get_num_threads() for one in libraries} == {1}
    with pytest.raises(RuntimeError), threads.limited(100):
        raise RuntimeError
    with threads.limited(5000):
        assert all(1 <= one.get_num_threads() <= count for one, count in zip(libraries, before, strict=True))
    assert [one.get_num_threads() for one in libraries] == before
    run(shifted(1.0))
    assert [one.get_num_threads() for one in libraries] == before


def test_the_rows_of_a_matrix_decide():
    state = {"mean": jnp.zeros(700), "covariance": jnp.zeros((40, 40)), "population": jnp.zeros((300, 20))}
    assert threads.rows(state) == 40
    assert threads.rows({"mean": jnp.zeros(7)}) == 0
