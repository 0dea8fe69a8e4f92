"""`moved`: points from elsewhere in a population, as though they had been sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from conftest import START, TARGET, quadratic
from test_contract import harness, rows

from evoopt import injection, strategies, trees, wrappers
from evoopt.run.checkpoint import digest

KEY = jax.random.key(4)
MADE = {name: case.make() for name, case in CASES.items() if not name.startswith("evosax")}
MOVED = [name for name, strategy in MADE.items() if hasattr(strategy, "moved")]
GIVEN = [CASES[name] for name in MOVED]
GAUSSIAN = ["cma_es", "sep_cma_es", "ma_es", "xnes", "snes", "lm_ma_es", "cr_fm_nes", "amalgam"]
WRAPPED = {
    "masked": wrappers.masked(strategies.cma_es(8), {"w": True, "b": False}),
    "averaged scheduled": wrappers.averaged(wrappers.scheduled(strategies.snes(8), learning_rate=lambda i: 1.0)),
    "best_so_far rounded": wrappers.best_so_far(wrappers.rounded(strategies.sep_cma_es(8))),
    "snes regenerated": strategies.snes(8, regenerate=True),
    "adam_swarm of differences": strategies.adam_swarm(8, difference=0.1),
}


def sparing(row):
    """A strategy that shares its class with a quicker one is for the slow tests."""
    slow = {"l_shade", "jso", "fully_informed_swarm", "adam_swarm", "bipop cma_es"}
    return pytest.param(*row.values, marks=[*row.marks, pytest.mark.slow], id=row.id) if row.values[0] in slow else row


def begun(name):
    """A strategy past its first generations, its compiled `tell`, a generation's population, and its answers."""
    if name in MADE:  # compiled for the contract test anyway
        h = harness(name)
        return h.strategy, h.tell, h.state, h.population, h.answers
    strategy = WRAPPED[name]
    ask, tell = jax.jit(strategy.ask), jax.jit(lambda s, *given: s.tell(*given))
    evaluate = jax.jit(lambda population: population.vmap(quadratic))
    state = trees.strong(jax.jit(strategy.init)(START, KEY))
    for i in range(2):
        population = ask(state, jax.random.fold_in(KEY, i))
        state = tell(strategy, state, population, evaluate(population))
    population = ask(state, jax.random.fold_in(KEY, 2))
    return strategy, tell, state, population, evaluate(population)


def test_who_can_be_moved():
    covariance = {"cma_es", "sep_cma_es", "ma_es", "xnes", "lm_ma_es", "cr_fm_nes", "one_plus_one_es", "amalgam"}
    populations = {"differential_evolution", "jade", "shade", "l_shade", "jso", "diffusion_evolution", "real_ga",
                   "samr_ga", "gesmr_ga", "particle_swarm", "fully_informed_swarm", "adam_swarm", "random_search",
                   "hill_climbing", "bayesian_optimization", "simulated_annealing"}  # fmt: skip
    assert covariance | populations | {"snes", "bounded snes", "ipop cma_es", "bipop cma_es"} <= set(MOVED)
    for name in ("mezo", "openai_es", "pgpe", "gradient", "deep_ga", "averaged scheduled mezo", "bounded gradient"):
        assert name not in MOVED, "genomes that are keys, pairs or gradients stay where they are"
    assert not hasattr(WRAPPED["adam_swarm of differences"], "moved")


@pytest.mark.parametrize("name", [*map(sparing, rows(lambda case: case in GIVEN)), *list(WRAPPED)[:4]])
def test_a_population_moved_to_its_own_points_is_the_same_and_a_better_point_helps(name):
    strategy, tell, state, population, answers = begun(name)
    goal = TARGET if name != "masked" else {**TARGET, "b": START["b"]}

    @jax.jit
    def at_goal(state, population):
        which = jnp.arange(len(population)) == 1 % len(population)
        row = lambda x: which.reshape(-1, *(1,) * (x.ndim - 1))
        points = jax.tree.map(lambda x, t: jnp.where(row(x), t, x), population.decoded(), goal)
        oracle = strategy.oracle(quadratic)
        return strategy.moved(state, population, points), population._masked(jax.vmap(oracle)(points))

    stayed = jax.jit(lambda state, population: strategy.moved(state, population, population.decoded()))
    plain = tell(strategy, state, population, answers)
    stayed = tell(strategy, state, stayed(state, population), answers)
    moved, asked = at_goal(state, population)
    better = tell(strategy, state, moved, asked)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(stayed), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert trees.types(jax.tree.map(jnp.asarray, plain)) == trees.types(jax.tree.map(jnp.asarray, better))
    assert (moved.active is None) == (population.active is None)
    if moved.active is not None:
        assert (moved.active == population.active).all()
    assert digest(moved[0]) == digest(population[0]) or len(moved) == 1, "what is not moved stays, bit for bit"
    value = lambda state: float(quadratic(strategy.recommend(state)))
    if name != "diffusion_evolution":  # recommends what it has seen: so do others, but it stands still meanwhile
        assert value(better) < 0.95 * value(plain)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_points_that_are_samples_are_told_as_the_samples(name, monkeypatch):
    """Reversed: each point goes where another was drawn, so that every genome is computed from its point."""
    monkeypatch.setattr(injection, "reach", lambda d: 100.0)
    strategy, tell, state, population, values = begun(name)
    points = jax.tree.map(lambda x: x[::-1], population.decoded())
    expected = tell(strategy, state, population, values)
    moved = jax.jit(strategy.moved)(state, population, points)
    assert not injection.same(population, points).any()
    got = tell(strategy, state, moved, values[::-1])
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


def test_a_far_point_gives_its_direction_and_no_more_than_its_reach():
    """Hansen 2011: y = min(1, c_y / ||C^(-1/2) y||) (x - m) / sigma with c_y = sqrt(d) + 2 d / (d + 2)."""
    strategy, _, state, population, _ = begun("cma_es")
    points = population.decoded()
    far = jax.tree.map(lambda x: x.at[2].set(x[2] + 40.0), points)
    near = jax.tree.map(lambda x: x.at[5].add(0.01), far)
    z, y = (np.asarray(g, np.float64) for g in strategy.moved(state, population, near).genomes)
    c, m, sigma = (np.asarray(a, np.float64) for a in (state.covariance, state.mean, state.sigma))
    values, vectors = np.linalg.eigh(c)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    x = np.asarray(injection.vectors(near, jnp.float32), np.float64)
    c_y = np.sqrt(7) + 2 * 7 / 9
    for i in (2, 5):
        step = (x[i] - m) / sigma
        length = np.linalg.norm(root @ step)
        assert (length > c_y) == (i == 2)
        np.testing.assert_allclose(y[i], min(1, c_y / length) * step, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(z[i]), min(c_y, length), rtol=1e-4)
    others = [0, 1, 3, 4, *range(6, 16)]
    assert (z[others] == np.asarray(population.genomes.z)[others]).all()


def test_a_drawn_step_that_is_longer_is_not_shortened():
    z = jnp.array([[9.0, 0.0], [9.0, 0.0], [1e30, 1e30]])
    drawn = jnp.array([[0.0, 8.0], [0.0, 0.1], [0.0, 0.1]])
    reach = np.sqrt(2) + 1
    np.testing.assert_allclose(injection.shortening(z, drawn)[:2, 0], [8 / 9, reach / 9], rtol=1e-6)
    np.testing.assert_allclose(z[2] * injection.shortening(z, drawn)[2], reach / np.sqrt(2), rtol=1e-5)


def test_a_mirrored_candidate_stays_beyond_the_mirror():
    strategy = wrappers.bounded(strategies.cma_es(16, sigma=1.5), -1.0, 1.0)
    state = strategy.init(jnp.zeros(4), KEY)
    population = strategy.ask(state, KEY)
    inside = population.decoded()
    assert (jnp.abs(population.with_decode(population.decode.decode).decoded()) > 1).any()
    assert digest(strategy.moved(state, population, inside).genomes) == digest(population.genomes)
    other = strategy.moved(state, population, inside.at[3].set(0.25))
    np.testing.assert_allclose(other[3], 0.25, rtol=1e-6)


def test_choices_are_moved_by_index_and_by_option():
    options = {"kind": 5, "width": jnp.array([16.0, 32.0, 64.0])}
    strategy = wrappers.choices(strategies.differential_evolution(6, lower=0.0, upper=1.0), options)
    state = jax.jit(strategy.init)({"kind": jnp.zeros(4, jnp.int32), "width": 0}, KEY)
    population = jax.jit(strategy.ask)(state, KEY)
    points = population.decoded()
    points = {"kind": points["kind"].at[2].set(jnp.array([4, 0, 1, 3])), "width": points["width"].at[2].set(64.0)}
    moved = jax.jit(strategy.moved)(state, population, points)
    assert moved[2]["kind"].tolist() == [4, 0, 1, 3]
    assert float(moved[2]["width"]) == 64.0
    keep = jnp.array([0, 1, 3, 4, 5])
    assert (moved.genomes[keep] == population.genomes[keep]).all()


def test_points_end_inside_the_box_of_a_strategy_that_has_one():
    strategy = strategies.differential_evolution(6, lower=-1.0, upper=[2.0, 3.0])
    state = strategy.init(jnp.zeros(2), KEY)
    moved = strategy.moved(state, strategy.ask(state, KEY), jnp.full((6, 2), 2.5))
    np.testing.assert_array_equal(moved.decoded(), np.tile([2.0, 2.5], (6, 1)))


@pytest.mark.parametrize("name", ["samr_ga", "gesmr_ga"])
def test_a_point_in_the_place_of_the_elite_does_not_inherit_its_value(name):
    strategy, tell, state, population, values = begun(name)
    points = jax.tree.map(lambda x: x.at[0].set(x[0] + 30.0), population.decoded())
    lost = tell(strategy, state, strategy.moved(state, population, points), values.at[0].set(jnp.nan))
    assert float(quadratic(strategy.recommend(lost))) < 30
