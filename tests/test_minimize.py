"""The loop: budgets, reasons, history, context, Python objectives, resume, and what it refuses."""

import io
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import START, quadratic

from evoopt import Session, minimize, strategies, wrappers
from evoopt.answers import Answer, WithAux
from evoopt.run import progress
from evoopt.run.checkpoint import digest
from evoopt.run.folder import Run

SNES = strategies.snes(16)


def test_the_reasons_for_stopping():
    run = lambda **budget: minimize(quadratic, START, SNES, **budget)
    assert run(generations=7).generations == 7
    result = run(evaluations=100)
    assert (result.reason, result.evaluations, result.generations) == ("evaluations", 96, 6)
    result = run(target=1e-3)
    assert result.reason == "target"
    assert result.best_value <= 1e-3
    assert result.history[-2]["best_so_far"] > 1e-3, "the generation that reaches the target is the last"
    assert run(seconds=0.0).generations == 0
    assert run(generations=10**6, seconds=0.3, stop=None).reason == "seconds"
    result = minimize(
        quadratic,
        START,
        SNES,
        generations=10**6,
        every=5,
        callbacks=[lambda c, rows: rows[-1]["generation"] >= 12],
    )
    assert (result.reason, result.generations <= 20) == ("callback", True)


@pytest.mark.parametrize("jit", [True, False])
def test_only_active_candidates_are_evaluations(jit):
    asked = []

    def f(x):
        asked.append(1)
        return float(np.sum((x - 1.5) ** 2))

    strategy = wrappers.ipop(strategies.cma_es(16), 4)  # 4 of 16 candidates are active until it restarts
    objective = (lambda x: jnp.sum((x - 1.5) ** 2)) if jit else f
    result = minimize(objective, jnp.zeros(2), strategy, evaluations=42, jit=jit)
    assert (result.evaluations, result.generations, result.reason) == (40, 10, "evaluations")
    assert [row["evaluations"] for row in result.history] == list(range(4, 44, 4))
    assert len(asked) == (0 if jit else 40)


def test_totals_are_running_sums():
    f = lambda x: WithAux(jnp.sum((x - 1) ** 2), jnp.int32(3))
    summarize = lambda values, aux: {"steps": aux.sum(), "once": aux.sum()}
    result = minimize(f, jnp.zeros(2), SNES, generations=3, summarize=summarize, totals=("steps",))
    assert [(row["steps"], row["once"]) for row in result.history] == [(48, 48), (96, 48), (144, 48)]


def test_history_and_best_are_of_the_candidates():
    seen = []

    def f(x):
        seen.append(float(np.sum((x - 1.5) ** 2)))
        return seen[-1]

    result = minimize(f, np.zeros(3, np.float32), SNES, generations=4, jit=False)
    rows = np.array(seen).reshape(4, 16)
    for row, values in zip(result.history, rows, strict=True):
        np.testing.assert_allclose(
            [row["best"], row["mean"], row["median"], row["worst"]],
            [values.min(), values.mean(), np.median(values), values.max()], rtol=1e-5,
        )  # fmt: skip
    assert [row["evaluations"] for row in result.history] == [16, 32, 48, 64]
    np.testing.assert_allclose(result.best_value, min(seen), rtol=1e-6)
    np.testing.assert_allclose(np.sum((result.best - 1.5) ** 2), min(seen), rtol=1e-5)


def test_the_run_does_not_depend_on_how_it_is_cut_into_dispatches():
    a = minimize(quadratic, START, SNES, generations=50, every=50)
    b = minimize(quadratic, START, SNES, generations=50, every=7)
    assert digest(a.state) == digest(b.state)
    drop = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert drop(a.history) == drop(b.history)


def test_a_python_objective_and_a_jax_one_agree():
    host = minimize(lambda p: float(quadratic(p)), START, SNES, generations=30, jit=False)
    device = minimize(quadratic, START, SNES, generations=30)
    assert np.isclose(host.best_value, device.best_value, rtol=1e-3)
    grad = jax.value_and_grad(quadratic)
    descended = minimize(lambda p: grad(p), START, strategies.gradient(optax.adam(0.1)), generations=150, jit=False)
    assert descended.best_value < 1e-2


def test_context_is_folded_once_a_generation_and_each_is_a_row():
    def f(x, context, own):
        return WithAux(jnp.sum((x - 1) ** 2), {"x": x, "own": own, "count": context["count"]})

    def update(context, aux):
        assert aux["x"].shape == (16, 2)
        return {"count": context["count"] + aux["own"].sum()}

    arguments = {
        "context": {"count": jnp.array(0.0)},
        "update": update,
        "each": lambda context, n: jnp.arange(n, dtype=jnp.float32),
        "summarize": lambda values, aux: {"count": aux["count"][0]},
        "generations": 3,
    }
    for jit in (True, False):
        result = minimize(f, jnp.zeros(2), SNES, jit=jit, **arguments)
        assert float(result.context["count"]) == 3 * 120
        assert [row["count"] for row in result.history] == [0, 120, 240]


def test_lost_evaluations_are_counted_and_do_no_harm():
    f = lambda x: jnp.where(x[0] > 0.2, jnp.nan, jnp.sum((x - jnp.array([0.1, 2.0])) ** 2))
    result = minimize(f, jnp.zeros(2), SNES, generations=300)
    assert result.best_value < 0.1  # from 4.0; the optimum lies near the edge of what is answered
    assert any(row["answered"] < 16 for row in result.history)
    nothing = minimize(lambda x: jnp.nan * x[0], jnp.zeros(2), SNES, generations=5)
    assert nothing.unanswered == 5
    assert nothing.best_value == np.inf
    assert np.array_equal(nothing.recommended, np.zeros(2))


@pytest.mark.parametrize("jit", [True, False])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, jit):
    f = quadratic if jit else lambda p: float(quadratic(p))
    whole = minimize(f, START, SNES, generations=40, jit=jit)
    with Run.create(tmp_path, "cut", {}) as run:
        minimize(f, START, SNES, generations=17, jit=jit, run=run)
        run.append([{"generation": 18, "best": 0.0}])  # written after the last checkpoint, before the kill
    with Run.open(tmp_path / "cut") as run:
        result = minimize(f, START, SNES, generations=40, jit=jit, run=run)
    assert digest(result.state) == digest(whole.state)
    assert result.best_value == whole.best_value
    drop = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert drop(result.history) == drop(whole.history)
    assert [row["generation"] for row in Run.open(tmp_path / "cut").metrics()] == list(range(1, 41))


def test_an_objective_that_raises_loses_nothing(tmp_path):
    calls = []

    def f(x):
        calls.append(1)
        if len(calls) == 16 * 5 + 3:
            raise RuntimeError("simulator died")
        return float(np.sum(x**2))

    with Run.create(tmp_path, "raises", {}) as run, pytest.raises(RuntimeError, match="simulator died"):
        minimize(f, np.ones(2, np.float32), SNES, generations=10, jit=False, run=run, every=1)
    assert Run.open(tmp_path / "raises").steps() == [5]


def test_ctrl_c_ends_between_two_dispatches():
    seen = []

    def press(carry, rows):
        seen.append(rows[-1]["generation"])
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    result = minimize(quadratic, START, SNES, seconds=60, callbacks=[press])
    assert result.reason == "interrupted"
    assert result.generations == seen[-1] > 0
    assert len(seen) <= 3
    assert np.isfinite(result.best_value)


def test_tickets_refuse_answers_of_another_generation():
    loop = Session(SNES, START, key=3)
    first = loop.ask()
    assert len(first) == 16
    values = [float(quadratic(candidate)) for candidate in first]
    loop.tell(first, values)
    before = digest(loop.state)
    with pytest.raises(ValueError, match=r"(?s)generation 1.*generation 0.*told twice"):
        loop.tell(first, values)
    second = loop.ask()
    with pytest.raises(ValueError, match="one for each candidate"):
        loop.tell(second, values[:-1])
    with pytest.raises(TypeError, match="one real number for candidate 15"):
        loop.tell(second, [None] * 15 + [{}])
    assert digest(loop.state) == before, "nothing is lost"
    loop.tell(second, values)


def test_what_minimize_refuses():
    with pytest.raises(ValueError, match="a budget"):
        minimize(quadratic, START, SNES)
    with pytest.raises(ValueError, match="at least 16 evaluations"):
        minimize(quadratic, START, SNES, evaluations=15)
    with pytest.raises(ValueError, match="generations of at least 0"):
        minimize(quadratic, START, SNES, generations=-1)
    with pytest.raises(ValueError, match="one for each candidate"):
        minimize(lambda x: x, jnp.zeros(3), SNES, generations=1)
    with pytest.raises(TypeError, match="floating-point"):
        minimize(quadratic, jnp.arange(3), SNES, generations=1)
    with pytest.raises(ValueError, match="at least one float number"):
        minimize(quadratic, {}, SNES, generations=1)
    with pytest.raises(ValueError, match="NaN"):
        minimize(quadratic, jnp.array([1.0, jnp.nan]), SNES, generations=1)
    with pytest.raises(ValueError, match="at least 2"):
        strategies.snes(1)
    with pytest.raises(ValueError, match="an even popsize"):
        strategies.openai_es(7)
    with pytest.raises(TypeError, match="as an int"):
        strategies.openai_es(8.0)  # type: ignore[arg-type]


def test_float64_where_it_is_on():
    with jax.enable_x64(True):
        start = jnp.zeros(3, jnp.float64)
        result = minimize(lambda x: jnp.sum((x - 1.5) ** 2), start, SNES, generations=400, stop=None)
        assert result.recommended.dtype == jnp.float64
        assert result.best_value < 1e-20


def test_plain_lines_and_the_bar():
    out = io.StringIO()
    row = {"generation": 3, "best_so_far": -5.0, "mean": -4.0}
    with progress.meter(True, "hopper", sign=-1, word="best return", out=out) as meter:
        meter.show(0.5, row, 1234.0)
    assert "hopper  generation 3  best return 5  mean 4  1.23k evaluations/s" in out.getvalue()
    assert progress.meter(None, "x", out=out).__class__ is progress.Silent

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with progress.meter(None, "hopper", out=out) as meter:
        meter.show(0.5, row | {"best_so_far": 5.0}, 1234.0)
    assert "hopper" in out.getvalue()
    assert "1.23k" in out.getvalue()


def test_values_that_float32_swallows_are_warned_about_once():
    f = lambda offset: lambda x: jnp.sum((x - 1.0) ** 2) + offset
    for offset in (1e9, 3e7):
        with pytest.warns(UserWarning, match="may not tell them apart") as seen:
            minimize(f(offset), jnp.zeros(3), strategies.snes(16), generations=30)
        assert len(seen) == 1
    minimize(f(1e3), jnp.zeros(3), strategies.snes(16), generations=30)
    minimize(lambda x: 0.0 * x.sum() + 7.0, jnp.zeros(3), strategies.snes(16), generations=3)


def test_offsets_are_no_obstacle_for_values_on_the_host():
    """float64 differences that float32 would swallow, in serial, by workers, and by replicas."""
    f = lambda x: float(np.sum((np.asarray(x, np.float64) - 1.0) ** 2)) + 1e9
    from evoopt.distributed import LocalEvaluator

    ends = []
    for evaluator in (None, LocalEvaluator(2), LocalEvaluator(3, replicate=True)):
        found = minimize(f, np.zeros(3), strategies.snes(16), generations=80, jit=False, evaluator=evaluator)
        assert np.abs(found.best - 1.0).max() < 1e-2
        assert 1e9 <= found.best_value < 1e9 + 1e-3
        ends.append(digest((found.state, found.best)))
    assert len(set(ends)) == 1


def test_an_ordinary_objective_is_searched_as_deep_as_before():
    """Far from the optimum with small steps, values differ little; near it they are tiny."""
    f = lambda x: float(np.sum(np.asarray(x, np.float64) ** 2))
    strategy = strategies.cma_es(8, sigma=0.01)
    found = minimize(f, np.full(2, 100.0), strategy, generations=400, jit=False, target=1e-20, stop=None)
    assert found.reason == "target"


def test_an_aux_is_told_from_a_gradient_by_its_type():
    f = lambda x: WithAux(jnp.sum((x - 1) ** 2), {"x": x})
    count = lambda values, aux: {"first": aux["x"][0, 0]}
    for oracle in (SNES, strategies.gradient(optax.sgd(0.1))):
        assert "first" in minimize(f, jnp.zeros(2), oracle, generations=2, summarize=count).history[0]
    host = lambda x: WithAux(float(np.sum((x - 1) ** 2)), {"x": x})
    assert "first" in minimize(host, np.zeros(2), SNES, generations=2, summarize=count, jit=False).history[0]
    both = lambda x: WithAux((float(np.sum((x - 1) ** 2)), 2 * (x - 1)), {"x": x})
    stepped = minimize(
        both, np.zeros(2), strategies.gradient(optax.sgd(0.1)), generations=1, summarize=count, jit=False
    )
    np.testing.assert_allclose(stepped.recommended, 0.2, rtol=1e-6)
    for jit in (True, False):
        with pytest.raises(TypeError, match=r"WithAux(.|\n)*usual cause"):
            minimize(lambda x: (jnp.sum(x), {"x": x}), np.zeros(2), SNES, generations=1, summarize=count, jit=jit)


def test_an_answer_that_says_more_than_a_strategy_reads_is_refused():
    value = lambda x: Answer(jnp.sum((x - 1) ** 2))
    plain = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2), SNES, generations=3)
    assert minimize(value, jnp.zeros(2), SNES, generations=3).best_value == plain.best_value
    assert minimize(value, np.zeros(2), SNES, generations=3, jit=False).best_value < 1
    assert minimize(value, jnp.zeros(2), strategies.gradient(optax.sgd(0.1)), generations=3).best_value < 1
    for more in ({"violation": jnp.ones(1)}, {"descriptor": jnp.ones(2)}):
        for jit in (True, False):
            with pytest.raises(TypeError, match=r"values alone(.|\n)*usual cause"):
                minimize(lambda x, more=more: Answer(jnp.sum(x), **more), np.zeros(2), SNES, generations=1, jit=jit)
