"""Which strategy is taken where none is given, and that it is said."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import Session, auto, minimize
from evoopt.answers import Answer
from evoopt.automatic import TABLE
from evoopt.cli.main import main
from evoopt.envs.functions import himmelblau
from evoopt.spaces import categorical, integer, real

MIXED = {"x": real(-1.0, 1.0), "n": integer(0, 9), "kind": categorical(["a", "b", "c"])}


def sphere(x):
    return jnp.sum((x - 1.0) ** 2)


@pytest.mark.parametrize(
    ("given", "x0", "evaluations", "taken"),
    [
        ({"several": True}, np.zeros(2), 1000, "diffusion_evolution"),
        ({"constraints": 2}, np.zeros(2), 1000, "augmented_lagrangian(ipop(cma_es))"),
        ({"noisy": True}, np.zeros(2), 1000, "noisy(ipop(cma_es))"),
        ({}, np.zeros(300_000), 10**6, "openai_es"),
        ({}, np.zeros(3000), 10**6, "sep_cma_es"),
        ({}, MIXED, 1000, "ipop(cma_es)"),
        ({}, {"x": real(-1.0, 1.0, shape=(4,))}, 80, "bayesian_optimization"),
        ({}, np.zeros(10), 500, "coordinate_search, surrogate(bipop(cma_es))"),
        ({}, np.zeros(10), 10_000, "coordinate_search, surrogate(bipop(cma_es))"),
        ({}, np.zeros(20), 20_000, "coordinate_search, a local search, bipop(cma_es)"),
        ({}, np.zeros(10), 10**6, "coordinate_search, a local search, bipop(cma_es)"),
        ({"parallel": 64}, np.zeros(10), 10_000, "bipop(cma_es)"),
    ],
)
def test_the_first_rule_that_holds_is_taken(given, x0, evaluations, taken):
    choice = auto(**given).chosen(x0, evaluations)
    assert choice.rule.what == taken
    assert f"{evaluations:.6g} evaluations" in choice.why
    assert choice.rule.when in choice.why


def test_the_last_rule_always_holds():
    assert TABLE[-1].holds(auto().facts(np.zeros(3)))


def test_what_was_taken_is_said_and_the_same_each_time():
    results = [minimize(sphere, jnp.zeros(3), evaluations=90, key=4) for _ in range(2)]
    assert results[0].chosen == results[1].chosen != ""
    assert np.array_equal(*(np.asarray(result.best) for result in results))
    assert results[0].best_value < 1e-6


def test_no_budget_is_a_budget():
    result = minimize(sphere, jnp.zeros(2), target=None)
    assert 1900 < result.evaluations <= 2000
    assert result.best_value < 1e-6


def test_a_space_a_session_and_several_starts_take_one_too():
    f = lambda c: (c["x"] - 0.5) ** 2 + jnp.abs(c["n"].astype(float) - 3.0) + jnp.where(c["kind"] == 1, 0.0, 1.0)
    found = minimize(f, MIXED, evaluations=600)
    best: Any = found.best
    assert (int(best["n"]), best["kind"]) == (3, "b")
    session = Session(auto(evaluations=100), np.zeros(2))
    assert "coordinate_search" in session.chosen == session.result().chosen
    for _ in range(60):
        (one,) = session.ask(1)
        session.tell(one, float(sphere(one.params)))
    assert session.best_value < 1e-3
    several = minimize(sphere, jnp.zeros(2), auto(parallel=8), starts=2, evaluations=800)
    assert len(several.starts or ()) == 2
    assert several.chosen.startswith("bipop")
    given = minimize(sphere, jnp.zeros(2), starts=2, evaluations=400)
    assert "200 evaluations" in given.chosen


def test_a_generation_is_as_wide_as_what_runs_at_once():
    strategy = auto(parallel=40).chosen(np.zeros(5), 10_000).strategy
    assert int(strategy.init(jnp.zeros(5), 0).popsize) == 40


def test_nothing_at_once_is_refused():
    with pytest.raises(ValueError, match=r"(?s)expected parallel.*usual cause"):
        auto(parallel=0)


def test_explain_prints_the_table_and_the_choice(capsys):
    main(["explain", "--numbers", "5", "--evaluations", "5000", "--noisy"])
    out = capsys.readouterr().out
    assert "-> the objective is noisy: noisy(ipop(cma_es))" in out
    assert out.count("\n") >= len(TABLE)


def test_several_solutions_stay_in_the_population():
    """Himmelblau's four optima in a box: with the default spread two are kept."""
    optima = np.array([[3, 2], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]])
    kept = []
    for seed in range(3):
        space = {"x": real(-6.0, 6.0), "y": real(-6.0, 6.0)}
        result = minimize(lambda c: himmelblau(jnp.stack([c["x"], c["y"]])), space, auto(several=True), key=seed,
                          evaluations=512 * 25)  # fmt: skip
        u = result.state.mean * 3.0 * 1.5  # of the space, whose unit is a quarter of the range; the start is 0
        near = np.linalg.norm(np.asarray(u)[:, None] - optima, axis=2) < 0.5
        kept.append((near.sum(axis=0) >= 5).sum())
    assert min(kept) >= 3


def test_noise_and_constraints_are_searched_by_what_is_taken():
    values = np.random.default_rng(3)
    noisy = minimize(lambda x: float(((x - 1) ** 2).sum() + 0.1 * values.normal()), np.zeros(3), auto(noisy=True),
                     evaluations=2000, jit=False)  # fmt: skip
    assert np.abs(np.asarray(noisy.best) - 1).max() < 0.25
    f = lambda x: Answer(jnp.sum(x**2), violation=jnp.stack([1.0 - x[0]]))
    held = minimize(f, jnp.asarray([3.0, 1.0]), auto(constraints=1), evaluations=2000)
    assert held.feasible
    assert abs(held.best_value - 1) < 1e-3
