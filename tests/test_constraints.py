"""Constraints: the updates against pycma, the best feasible point in every engine, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evoopt import Run, Session, constraints, minimize, strategies, wrappers
from evoopt.answers import Answer, WithAux
from evoopt.distributed import LocalEvaluator
from evoopt.run.checkpoint import digest
from evoopt.wrappers.feasibility_rules import ordered

KEY = jax.random.key(0)
REFUSED = r"(?s)expected .*got .*usual cause"
START = np.array([3.0, 2.5, 2.0])  # violates both
BEST = [0.0, 1.0, 1.5]  # on both walls
LEAST = 4.25


def value(x):
    return jnp.sum((x - jnp.array([1.0, 2.0, 3.0], x.dtype)) ** 2)


def violation(x):
    """x0 + x1 is at most 1, and x2 at most 3/2."""
    return jnp.stack([x[0] + x[1] - 1, 2 * x[2] - 3])


def f(x):
    return Answer(value(x), violation(x))


def on_host(x):
    x = np.asarray(x, np.float64)
    return float(np.sum((x - [1.0, 2.0, 3.0]) ** 2)), [x[0] + x[1] - 1, 2 * x[2] - 3]


INNER = {
    "cma_es": lambda: strategies.cma_es(8),
    "snes": lambda: strategies.snes(16),
    "differential_evolution": lambda: strategies.differential_evolution(24),
    "gradient": lambda: strategies.gradient(optax.sgd(0.05)),
}
WRAPPERS = {name: getattr(wrappers, name) for name in ("augmented_lagrangian", "feasibility_rules")}


# --- the algorithms


@pytest.mark.parametrize(
    ("seed", "dimension", "equality", "shift"),
    [(0, 3, (False, False), 0.0), (1, 4, (False, True, False), 0.0), (2, 2, (False, False), 30.0)],
    ids=["inequalities", "an equality among them", "far outside"],
)
def test_the_multipliers_are_those_of_pycma(seed, dimension, equality, shift):
    peer = pytest.importorskip("cma").constraints_handler.AugmentedLagrangian(dimension, equality)
    peer.logging = 0
    random = np.random.default_rng(seed)
    normals = random.normal(size=(len(equality), dimension))
    goal = 2 * normals.sum(axis=0)  # beyond the walls
    with jax.enable_x64(True):
        strategy = wrappers.augmented_lagrangian(strategies.cma_es(8, sigma=0.7), equality)
        state = strategy.init(random.normal(size=dimension) + shift, KEY)
        ask, tell, plain = jax.jit(strategy.ask), jax.jit(strategy.tell), jax.jit(strategy.strategy.tell)
        decoded = jax.jit(lambda population: population.decoded())
        grown, shrunk = np.zeros(len(equality), bool), np.zeros(len(equality), bool)
        for i in range(100):
            population = ask(state, jax.random.key(i))
            x = np.asarray(decoded(population))
            values, g = np.sum((x - goal) ** 2, axis=1), x @ normals.T - 1
            told = np.array([v + sum(peer(row)) for v, row in zip(values, g, strict=True)])
            if not peer.is_initialized:
                peer.set_coefficients(values, g)
            best = int(np.argmin(told))
            peer.update(values[best], g[best])
            before, state = state, tell(state, population, Answer(values, g))
            np.testing.assert_allclose(state.lam, peer.lam, rtol=1e-6, atol=1e-9, err_msg=f"generation {i}")
            np.testing.assert_allclose(state.mu, peer.mu, rtol=1e-6, err_msg=f"generation {i}")
            if i > 0:  # so that rounding does not add up
                peer.lam, peer.mu = np.array(state.lam), np.array(state.mu)
            reference = float(values.min()) if i == 0 else float(before.reference)
            if i < 30:  # later ranks may differ by rounding
                expected = plain(before.inner, population, told - reference)
                np.testing.assert_allclose(state.inner.mean, expected.mean, rtol=1e-9, atol=1e-12)
            grown, shrunk = grown | np.asarray(state.mu > before.mu), shrunk | np.asarray(state.mu < before.mu)
        assert grown.any()
        assert shrunk.any()
        assert np.abs(np.asarray(state.changes)).max() > 0


def test_feasibility_rules_order_as_deb_does_and_always_alike():
    values = np.array([5.0, -3.0, 0.0, 1e30, -1e30, 2.0, np.inf, np.nan], np.float32)
    totals = np.array([0.0, 0.0, 2e-38, 1e-7, 1.00001e-7, 1e37, 0.0, 0.0], np.float32)
    told = np.asarray(ordered(jnp.asarray(values), jnp.asarray(totals)))
    assert np.argsort(told).tolist() == [1, 0, 2, 3, 4, 5, 6, 7]
    assert len(set(told[:7].tolist())) == 7
    assert told[:2].tolist() == [5.0, -3.0]
    alone = [float(ordered(jnp.asarray(values[i : i + 1]), jnp.asarray(totals[i : i + 1]))[0]) for i in range(6)]
    assert alone == told[:6].tolist(), "no candidate's number depends on the others"
    assert np.isfinite(told[:6].astype(np.float32).sum())


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_optimum_at_the_walls_is_found_from_an_infeasible_start(wrapper, name):
    strategy = WRAPPERS[wrapper](INNER[name](), 2, scale=[1.0, 2.0])
    with jax.enable_x64(True):
        result = minimize(f, START, strategy, generations=400)
    assert result.feasible is True
    assert result.violation == 0.0
    assert (result.violations <= 0).all()
    x = np.asarray(result.best)
    np.testing.assert_allclose(result.violations, [x[0] + x[1] - 1, 2 * x[2] - 3], atol=1e-6)
    rough = (
        0.5
        if (wrapper, name) in {("feasibility_rules", "snes"), ("augmented_lagrangian", "differential_evolution")}
        else 1e-2
    )
    assert result.best_value == pytest.approx(LEAST, abs=rough)
    assert str(result).startswith("best feasible value")
    rows = result.history
    assert rows[0]["feasible"] < 24
    assert rows[-1]["violation"] <= rows[0]["violation"]


def test_an_equality_is_met_exactly():
    """x0 + x1 = 1 and x2 <= 3/2, to within the tolerance, and the multipliers are the right ones."""
    with jax.enable_x64(True):
        strategy = wrappers.augmented_lagrangian(strategies.cma_es(), [True, False], tolerance=1e-7)
        result = minimize(f, START, strategy, generations=600)
        assert result.feasible
        assert abs(result.violations[0]) <= 1e-7
        np.testing.assert_allclose(result.recommended, BEST, atol=1e-5)
        np.testing.assert_allclose(result.state.lam, [2.0, 1.5], rtol=1e-3)
        assert result.best_value == pytest.approx(LEAST, abs=1e-6)


def test_where_nothing_is_feasible_the_least_violated_is_kept():
    nowhere = lambda x: Answer(jnp.sum(x**2), jnp.stack([x[0] + 1, 2 - x[0]]))  # together at least 3
    for name in WRAPPERS:
        result = minimize(
            nowhere, np.full(2, 0.3), WRAPPERS[name](strategies.cma_es(8), 2), generations=40, target=100.0
        )
        assert result.reason == "generations", "a target counts for feasible points alone"
        assert result.feasible is False
        assert result.violation == pytest.approx(3.0, abs=1e-5)
        assert "infeasible" in str(result)
        assert "violated by 3" in str(result)
        assert all(row["feasible"] == 0 for row in result.history)


def test_a_feasible_point_is_found_where_all_values_are_alike():
    ball = lambda x: (0 * x[0], jnp.stack([jnp.sum(x**2) - 1e-3]))
    result = minimize(ball, START, wrappers.augmented_lagrangian(strategies.cma_es(8), 1), generations=200, target=0.0)
    assert result.reason == "target"


def test_the_best_is_the_best_feasible_one_and_the_target_needs_it():
    """Values are low where the constraint is violated: the best value seen is not that of the best candidate."""
    with jax.enable_x64(True):
        strategy = wrappers.augmented_lagrangian(strategies.cma_es(8, sigma=0.3), 1)
        low = lambda x: (jnp.sum(x) - 7.0, 1 - x[:1])
        result = minimize(low, np.array([0.0, 1.0]), strategy, generations=3)
        hit = minimize(
            lambda x: (jnp.sum(x**2) - 7.0, 1 - x[:1]), np.zeros(2), strategy, generations=300, target=-5.999
        )
    assert min(row["best"] for row in result.history) < result.best_value or result.feasible is False
    assert hit.reason == "target"
    assert hit.feasible
    assert -6.0 <= hit.best_value <= -5.999


# --- engines and evaluators


def test_all_engines_and_evaluators_find_the_same():
    strategy = wrappers.augmented_lagrangian(strategies.cma_es(8), 2)
    keep = ("best", "median", "feasible", "violation", "best_so_far", "evaluations")
    with jax.enable_x64(True):
        runs = {
            "jax": minimize(f, START, strategy, generations=12),
            "host": minimize(on_host, START, strategy, generations=12, jit=False),
            "workers, jax": minimize(f, START, strategy, generations=12, evaluator=LocalEvaluator(3, batch_size=4)),
            "workers, host": minimize(on_host, START, strategy, generations=12, jit=False, evaluator=LocalEvaluator(3)),
            "replicas": minimize(
                on_host, START, strategy, generations=12, jit=False, evaluator=LocalEvaluator(2, replicate=True)
            ),
        }
    for name, result in runs.items():
        for mine, theirs in zip(result.history, runs["jax"].history, strict=True):
            assert [mine[k] for k in keep] == pytest.approx([theirs[k] for k in keep], rel=1e-9), name
        assert (result.feasible, result.violation) == (runs["jax"].feasible, runs["jax"].violation)
        np.testing.assert_allclose(result.violations, runs["jax"].violations, atol=1e-12)
        np.testing.assert_allclose(result.state.lam, runs["jax"].state.lam, rtol=1e-9)
    assert digest(runs["workers, host"].state) == digest(runs["replicas"].state)


def test_host_values_keep_small_differences_in_float32():
    """At 1e9 float32 tells nothing apart; multipliers and the best value are as without the offset."""
    strategy = wrappers.augmented_lagrangian(strategies.cma_es(8), 2)
    far = lambda x: Answer(on_host(x)[0] + 1e9, on_host(x)[1])
    result = minimize(far, START, strategy, generations=150, jit=False)
    assert result.feasible
    assert result.best_value - 1e9 == pytest.approx(LEAST, abs=1e-2)


def test_a_run_with_constraints_continues_bit_for_bit(tmp_path):
    for host in (False, True):
        g = on_host if host else f
        strategy = wrappers.feasibility_rules(strategies.differential_evolution(16), 2)
        whole = minimize(g, START, strategy, generations=14, jit=not host)
        with Run.create(tmp_path, str(host), {}) as run:
            path = run.path
            minimize(g, START, strategy, generations=6, jit=not host, run=run)
        with Run.open(path) as run:
            rest = minimize(g, START, strategy, generations=14, jit=not host, run=run)
        assert digest(rest.state) == digest(whole.state)
        assert rest.best_value == whole.best_value
        assert rest.violations.tolist() == whole.violations.tolist()
        same = lambda rows: [{k: row[k] for k in ("best", "feasible", "violation", "best_so_far")} for row in rows]
        assert same(rest.history) == same(whole.history)


def test_a_nan_is_no_answer_wherever_it_stands():
    strategy = wrappers.augmented_lagrangian(strategies.cma_es(8), 2)
    state = strategy.init(START, KEY)
    population = strategy.ask(state, KEY)
    answers = population.vmap(f)
    in_value = Answer(answers.value.at[2].set(jnp.nan), answers.violation)
    in_violation = Answer(answers.value, answers.violation.at[2, 1].set(jnp.nan))
    tell = jax.jit(strategy.tell)
    assert digest(tell(state, population, in_value)) == digest(tell(state, population, in_violation))
    worst = Answer(answers.value, answers.violation.at[2, 1].set(jnp.inf))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(strategy.recommend(tell(state, population, worst))))
    hidden = lambda x: Answer(value(x), jnp.where(x[0] > 1.5, jnp.nan, violation(x)))
    result = minimize(hidden, np.array([1.0, 2.0, 3.0]), strategy, generations=100)
    assert result.feasible
    assert result.best_value == pytest.approx(LEAST, abs=1e-2)
    host = lambda x: float("nan") if x[0] > 1.5 else None if x[0] > 1.4 else on_host(x)
    assert minimize(host, np.array([1.0, 2.0, 3.0]), strategy, generations=60, jit=False).feasible


def test_inactive_candidates_and_restarts_inside():
    inner = wrappers.ipop(strategies.cma_es(16, sigma=1.0), popsize=8)
    strategy = wrappers.augmented_lagrangian(wrappers.bounded(inner, -5.0, 5.0), 2)
    population = strategy.ask(strategy.init(START, KEY), KEY)
    answers = population.map(strategy.oracle(f), batch_size=4)
    assert jnp.isnan(answers.value).tolist() == [False] * 8 + [True] * 8
    assert jnp.isnan(answers.violation[:, 0]).tolist() == [False] * 8 + [True] * 8
    result = minimize(f, START, strategy, generations=100)
    assert result.history[0]["evaluations"] == 8
    assert result.best_value == pytest.approx(LEAST, abs=1e-2)
    outside = wrappers.bounded(WRAPPERS["augmented_lagrangian"](strategies.cma_es(8), 2), -5.0, 5.0)
    assert minimize(f, START, outside, generations=100).feasible
    outside = wrappers.bounded(WRAPPERS["augmented_lagrangian"](INNER["gradient"](), 2), -5.0, 5.0)
    assert minimize(f, START, outside, generations=200).best_value == pytest.approx(LEAST, abs=0.05)


def test_a_restart_begins_with_new_coefficients():
    strategy = wrappers.augmented_lagrangian(wrappers.ipop(strategies.cma_es(16, sigma=0.5), 8, tolx=1e-2), 1)
    state, told = strategy.init(jnp.full(2, 3.0), jax.random.key(0)), jax.jit(strategy.tell)
    kept = []
    for i in range(60):
        population = strategy.ask(state, jax.random.key(i))
        x = population.decoded()
        new = told(state, population, Answer(((x - 1.5) ** 2).sum(axis=1), 2 - x[:, :1]))
        kept.append((int(new.inner.restarts) > int(state.inner.restarts), float(new.mu[0]), int(new.updates)))
        state = new
    begun = [(mu, updates) for again, mu, updates in kept if again]
    assert set(begun) == {(0.0, 0)}
    assert any(mu > 0 for again, mu, _ in kept if not again)


def test_several_runs_in_one_program():
    strategy = wrappers.augmented_lagrangian(strategies.cma_es(8), 2)

    def run(key):
        def generation(state, key):
            population = strategy.ask(state, key)
            return strategy.tell(state, population, population.vmap(f)), None

        return strategy.recommend(jax.lax.scan(generation, strategy.init(START, key), jax.random.split(key, 80))[0])

    np.testing.assert_allclose(jax.jit(jax.vmap(run))(jax.random.split(KEY, 3)), [BEST] * 3, atol=0.05)


def test_what_an_objective_reports_besides_travels_along():
    strategy = wrappers.feasibility_rules(strategies.differential_evolution(8), 2)
    told = lambda x: WithAux((value(x), violation(x)), {"x0": x[0]})
    result = minimize(told, START, strategy, generations=3, summarize=lambda v, aux: {"least": aux["x0"].min()})
    assert all(np.isfinite(row["least"]) for row in result.history)


# --- a loop of one's own


def test_a_session_is_told_violations_in_several_forms():
    strategy = wrappers.augmented_lagrangian(strategies.cma_es(8), 2)
    states = []
    for form in ("pairs", "answers", "arrays", "pair of arrays"):
        session = Session(strategy, START, key=0)
        for _ in range(3):
            generation = session.ask()
            pairs = [on_host(x) for x in generation]
            values, rows = np.array([v for v, _ in pairs]), np.array([g for _, g in pairs])
            session.tell(generation, {
                "pairs": pairs, "answers": [Answer(v, g) for v, g in pairs], "arrays": Answer(values, rows),
                "pair of arrays": (values, rows),
            }[form])  # fmt: skip
        states.append(digest(session.state))
    assert len(set(states)) == 1
    before = session.ask()
    for bad in ([1.0] * 8, Answer(values, rows[:, :1]), [(1.0, [0.0])] * 8, Answer(values[:3], rows[:3])):
        with pytest.raises((ValueError, TypeError), match=REFUSED):
            session.tell(before, bad)
    assert digest(session.state) == states[0], "nothing is lost by a refused call"
    session.tell(before, pairs)


def test_gradients_of_an_own_loop():
    strategy = wrappers.augmented_lagrangian(INNER["gradient"](), 2)
    oracle = jax.jit(strategy.oracle(f))
    _, slopes = oracle(jnp.asarray(START, jnp.float32))
    np.testing.assert_allclose(slopes.value, 2 * (START - [1.0, 2.0, 3.0]))
    np.testing.assert_allclose(slopes.violation, [[1, 1, 0], [0, 0, 2]])
    session, state = Session(strategy, START, key=0), strategy.init(START, KEY)

    @jax.jit
    def step(state):
        population = strategy.ask(state, KEY)
        return strategy.tell(state, population, population.vmap(strategy.oracle(f)))

    for _ in range(3):
        state = step(state)
        generation = session.ask()
        row = lambda x: np.asarray(x)[None]
        answers = jax.tree.map(row, oracle(jnp.asarray(generation[0])))
        session.tell(generation, answers)
    np.testing.assert_allclose(session.recommend(), strategy.recommend(state), rtol=1e-5)


# --- what is refused


def test_answers_that_do_not_fit_are_refused():
    strategy = wrappers.augmented_lagrangian(strategies.cma_es(8), 2)
    for g in (value, lambda x: Answer(value(x), violation(x)[:1]), lambda x: Answer(value(x), x[0])):
        with pytest.raises((ValueError, TypeError), match=REFUSED):
            minimize(g, START, strategy, generations=1)
    for g in (lambda x: 1.0, lambda x: (1.0, [0.0]), lambda x: (1.0, [[0.0, 1.0]])):
        with pytest.raises((ValueError, TypeError), match=REFUSED):
            minimize(g, START, strategy, generations=1, jit=False)
    with pytest.raises(TypeError, match=r"(?s)values alone.*violations.*usual cause"):
        minimize(f, START, strategies.cma_es(8), generations=1)
    with pytest.raises(TypeError, match=REFUSED):
        minimize(lambda x: Answer(*on_host(x)), START, strategies.cma_es(8), generations=1, jit=False)
    with pytest.raises(TypeError, match=REFUSED):
        minimize(value, START, wrappers.augmented_lagrangian(INNER["gradient"](), 2), generations=1)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_arguments_that_are_refused(wrapper):
    make = WRAPPERS[wrapper]
    bad = [(True, {}), ("ab", {}), ([0.5], {}), (2, {"tolerance": -1.0}), (2, {"scale": [1.0]}), (2, {"scale": 0.0})]
    for equality, options in bad:
        with pytest.raises((ValueError, TypeError), match=REFUSED):
            make(strategies.cma_es(8), equality, **options)


def test_a_total_is_what_it_says_in_numpy_and_jax():
    some = constraints.Constraints((False, True, True), tolerance=0.1, scale=np.array([1.0, 2.0, 4.0]))
    g = np.array([[-1.0, 0.05, -0.1], [0.5, -0.3, 4.1], [1e-300, 0.0, 0.0]])
    np.testing.assert_allclose(some.total(g), [0.0, 0.5 + 0.1 + 1.0, 1e-300])
    np.testing.assert_allclose(some.total(jnp.asarray(g, jnp.float32)), [0.0, 1.6, 0.0], rtol=1e-6)
    assert some.total(g)[2] > 0, "float64 of the host is not rounded"
