"""Every algorithm of evosax keeps the protocol, and gives evosax's own numbers."""

import functools
import pickle
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import START as WEAK_START
from conftest import quadratic

from evoopt import minimize, noise, trees
from evoopt.strategies.adapters.evosax import TELL, from_evosax

algorithms = pytest.importorskip("evosax.algorithms").algorithms

START = trees.strong(WEAK_START)
D = trees.size(START)
LENGTH = 5  # generations in one compiled scan
QUICK = ("CMA_ES", "Open_ES", "PSO", "SV_Open_ES")  # one of each kind
POPSIZES = {"LM_MA_ES": 8}  # above 2d its paths are square roots of negative numbers
# Two means, of which one starts off the start, and the default sgd(1e-3) hardly moves either.
HARDLY_MOVES = {"SV_Open_ES"}


def is_slow(name):
    return () if name in QUICK else pytest.mark.slow


def finite(tree):
    return jax.tree.map(lambda x: np.isfinite(x), tree)


def same(a, b):
    return all(
        np.array_equal(x, y, equal_nan=True) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module", params=[pytest.param(name, marks=is_slow(name)) for name in algorithms])
def case(request):
    """One algorithm, one compiled scan over LENGTH generations, and the runs that the tests look at."""
    name = request.param
    strategy = from_evosax(name, POPSIZES.get(name, 16))
    n = strategy.popsize
    traces = []

    def step(state, row):
        key, failure = row
        population = strategy.ask(state, key)
        candidates = population.decoded()
        values = population.map(quadratic, batch_size=n) + failure
        return strategy.tell(state, population, values), (candidates, values)

    @jax.jit
    def scan(state, keys, failures):
        traces.append(1)
        return jax.lax.scan(step, state, (keys, failures))

    def run(state, seed=1, column=None, failure=jnp.nan):
        failures = np.zeros((LENGTH, n), np.float32)
        failures[:, slice(0) if column is None else column] = failure
        return scan(state, jax.random.split(jax.random.key(seed), LENGTH), failures)

    first = strategy.init(START, jax.random.key(0))
    clean, asked = run(first)
    return SimpleNamespace(
        name=name, strategy=strategy, n=n, traces=traces, run=run, first=first, clean=clean, asked=asked
    )


def test_ask_is_repeatable_and_types_never_change(case):
    again, asked = case.run(case.first)
    assert same((again, asked), (case.clean, case.asked))
    assert trees.types(case.clean) == trees.types(case.first)
    assert jax.tree.structure(case.clean) == jax.tree.structure(case.first)
    assert len(case.traces) == 1


def test_candidates_are_like_x0(case):
    candidates, values = case.asked
    one = jax.tree.map(lambda c: c[0, 0], candidates)
    assert trees.types(one) == trees.types(START)
    assert values.shape == (LENGTH, case.n)
    assert all(x.all() for x in jax.tree.leaves(finite(candidates)))
    assert any(np.ptp(c[0], axis=0).all() for c in jax.tree.leaves(candidates))  # they differ
    assert trees.types(case.strategy.recommend(case.first)) == trees.types(START)
    assert same(case.strategy.recommend(case.first), START)


def test_a_lost_candidate_poisons_nothing_and_never_wins(case):
    lost, (candidates, _) = case.run(case.first, column=3)
    assert all(x.all() for x in jax.tree.leaves(finite(candidates)))
    kept = jax.tree.map(lambda c, x: (x | ~c).all(), finite(case.clean.evosax), finite(lost.evosax))
    assert all(jax.tree.leaves(kept))
    assert int(lost.unanswered) == int(lost.rejected) == 0
    for failure in (-jnp.inf, jnp.inf):
        assert same(case.run(case.first, column=3, failure=failure)[0], lost)


def test_without_answers_nothing_changes(case):
    for state in (case.first, case.clean):
        after, _ = case.run(state, column=slice(None))
        assert int(after.unanswered) == LENGTH
        assert same(after._replace(unanswered=state.unanswered), state)


def test_it_gets_better(case):
    state = case.clean
    for seed in range(2, 13):
        state, _ = case.run(state, seed)
    found = float(quadratic(case.strategy.recommend(state)))
    assert np.isfinite(found)
    assert int(state.rejected) == int(state.unanswered) == 0
    assert (found < float(quadratic(START))) == (case.name not in HARDLY_MOVES)
    assert len(case.traces) == 1


# ---- evosax's own numbers ----


@pytest.mark.parametrize("name", ["Open_ES", "CMA_ES", "SimpleGA"])
def test_the_numbers_are_those_of_evosax(name):
    strategy, key = from_evosax(name, 16), jax.random.key(0)
    state = strategy.init(START, key)
    with jax.numpy_dtype_promotion("standard"):
        direct = algorithms[name](population_size=16, solution=state.start)
        params = direct.default_params
        theirs = None if name == "SimpleGA" else direct.init(key, state.start, params)
        for key in jax.random.split(jax.random.key(1), 3):
            population, told = strategy.ask(state, key), noise.fold_in(key, TELL)
            values = jax.vmap(quadratic)(population.decoded())
            state = strategy.tell(state, population, values)
            if theirs is None:  # the first population is ours
                theirs = direct.init(told, population.genomes, values, params)
            else:
                asked, theirs = direct.ask(key, theirs, params)
                assert same(asked, population.genomes)
                theirs, _ = direct.tell(told, asked, values, theirs, params)
            assert same(theirs, state.evosax)


# ---- what is special ----


def test_both_names_and_the_class_are_the_same_strategy():
    assert from_evosax("LES", 8) == from_evosax("LearnedES", 8) == from_evosax(algorithms["LES"], 8)
    strategy = from_evosax("SNES", 8, params={"std_init": 0.5})
    assert hash(strategy) == hash(from_evosax("SNES", 8, params={"std_init": 0.5}))
    assert pickle.loads(pickle.dumps(strategy)) == strategy


def test_mixed_types_come_back():
    x0 = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones((), jnp.float16), "c": jnp.ones((1, 2))}
    strategy = from_evosax("SimpleGA", 4)
    state = strategy.init(x0, jax.random.key(0))
    population = strategy.ask(state, jax.random.key(1))
    assert state.start.dtype == population.genomes.dtype == jnp.float32
    assert trees.types(population[0]) == trees.types(strategy.recommend(state)) == trees.types(x0)


def test_x64():
    with jax.enable_x64(True):
        strategy, x0 = from_evosax("SNES", 8), {"a": jnp.ones(2), "b": jnp.ones(3, jnp.float32)}
        state = strategy.init(x0, jax.random.key(0))
        population = strategy.ask(state, jax.random.key(1))
        after = strategy.tell(state, population, jnp.arange(8.0))
        assert state.start.dtype == jnp.float64
        assert trees.types(after) == trees.types(state)
        assert trees.types(population[0]) == trees.types(x0)


def test_the_first_generation_is_spread_around_the_start():
    for name in ("DifferentialEvolution", "RandomSearch"):
        strategy = from_evosax(name, 200, spread=0.1)
        state = strategy.init(jnp.full(3, 5.0), jax.random.key(0))
        rows = strategy.ask(state, jax.random.key(1)).decoded()
        np.testing.assert_allclose(rows.mean(0), 5.0, atol=0.04)  # 5 standard errors
        np.testing.assert_allclose(rows.std(0), 0.1, atol=0.03)
        assert (name == "RandomSearch") or (rows[0] == 5.0).all()


def test_stein_variational_populations_share_the_popsize():
    partial = functools.partial(algorithms["SV_Open_ES"], num_populations=4)
    for strategy, means in ((from_evosax("SV_Open_ES", 16), 2), (from_evosax(partial, 16), 4)):
        state = strategy.init(START, jax.random.key(0))
        assert state.evosax.mean.shape == (means, D)
        assert (state.evosax.mean[0] == state.start).all()
        assert (state.evosax.mean[1] != state.start).all()
        assert len(strategy.ask(state, jax.random.key(1))) == 16


def test_an_update_that_evosax_makes_nan_is_dropped():
    result = minimize(quadratic, START, from_evosax("LM_MA_ES", 16), generations=3)
    assert int(result.state.rejected) == 3
    assert same(result.recommended, START)
    assert np.isfinite(result.best_value)


@pytest.mark.slow
def test_cma_es_outlives_its_convergence():
    result = minimize(quadratic, START, from_evosax("CMA_ES", 16), generations=600)  # sigma would be NaN since 400
    assert int(result.state.rejected) > 0
    assert float(quadratic(result.recommended)) < 1e-10


def test_hyperparameters_can_be_mapped_over():
    def first(std):
        strategy = from_evosax("SNES", 8, params={"std_init": std})
        return strategy.ask(strategy.init(jnp.zeros(3), jax.random.key(0)), jax.random.key(1)).decoded()

    one, ten = jax.vmap(first)(jnp.array([1.0, 10.0]))
    np.testing.assert_allclose(10 * one, ten, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind", "word"),
    [
        (("CMAES", 16), {}, ValueError, "CMA_ES"),
        (("cma-es", 16), {}, ValueError, "CMA_ES"),
        (("xyzzy", 16), {}, ValueError, "SimpleGA"),
        ((3, 16), {}, TypeError, "its name"),
        (("ARS", 15), {}, ValueError, "must be even"),
        (("ESMC", 15), {}, ValueError, "even"),
        (("SNES", 1), {}, ValueError, "at least 2"),
        (("SNES", 8.0), {}, TypeError, "int"),
        (("SV_CMA_ES", 15), {}, ValueError, "num_populations=2"),
        (("GESMR_GA", 16), {"num_groups": 4}, ValueError, "divisible"),
        (("SNES", 16), {"params": {"sigma": 1.0}}, ValueError, "std_init"),
        (("Open_ES", 16), {"learning_rate": 1.0}, ValueError, "optimizer"),
        (("EvoTF_ES", 16), {"model_config": {}}, TypeError, "partial"),
    ],
)
def test_errors_have_three_parts(arguments, keywords, kind, word):
    with pytest.raises(kind, match=word) as caught:
        from_evosax(*arguments, **keywords)
    assert all(part in str(caught.value) for part in ("expected ", "\ngot ", "\nusual cause: "))


def test_evosax_is_imported_late_and_its_absence_explained():
    code = """
import sys
import evoopt, evoopt.strategies, evoopt.strategies.adapters.evosax as adapter
assert "evosax" not in sys.modules and "flax" not in sys.modules
sys.modules["evosax"] = None
try:
    adapter.from_evosax("CMA_ES", 16)
except ImportError as problem:
    assert "pip install evoopt-jax[evosax]" in str(problem), problem
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
