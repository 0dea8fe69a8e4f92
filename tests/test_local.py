"""Local strategies against readable twins, SciPy, and the run lengths that they were measured to have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from evoopt import Session, minimize, strategies, wrappers
from evoopt.wrappers.portfolio import Phase

X0 = np.array([-1.2, 1.0, 0.4])


def valley(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + (x[2] + 0.5 * x[0]) ** 2


def asked(strategy, f, x0, evaluations):
    """Points in the order in which they are evaluated, and the session."""
    session, points = Session(strategy, x0, key=3, stop=None), []
    while len(points) < evaluations:
        generation = session.ask()
        new = [np.array(x) for x in generation]
        session.tell(generation, [float(f(x)) for x in new])
        points += new
    return np.array(points[:evaluations]), session


@pytest.fixture
def float64():
    with jax.enable_x64():
        yield


# --- Nelder-Mead


def test_nelder_mead_asks_what_scipy_asks(float64):
    seen = []

    def f(x):
        seen.append(np.array(x))
        return valley(x)

    simplex = np.concatenate([X0[None], X0 + 0.5 * np.eye(3)])
    options = {"initial_simplex": simplex, "adaptive": True, "maxfev": 150, "xatol": 0, "fatol": 0}
    scipy.optimize.minimize(f, X0, method="Nelder-Mead", options=options)
    ours, _ = asked(strategies.nelder_mead(0.5), valley, X0, 150)
    np.testing.assert_allclose(ours[:149], np.array(seen)[:149], rtol=1e-8)


def test_nelder_mead_shrinks_around_the_best_vertex(float64):
    values = iter([0.0, 1.0, 2.0, 3.0, 3.0])  # reflected: worse than all; contracted: no better

    def f(x):
        return next(values)

    points, session = asked(strategies.nelder_mead(1.0), f, np.zeros(2), 5)
    best = points[0]
    generation = session.ask()
    shrunk = np.array(list(generation))
    np.testing.assert_allclose(shrunk, best + 0.5 * (points[1:3] - best))


def test_nelder_mead_shrinks_where_a_contraction_is_worse_than_the_reflection():
    values = iter([0.0, 1.0, 4.0, 3.0, 3.5])  # reflected: between second and worst; contracted: better than the worst
    _, session = asked(strategies.nelder_mead(1.0), lambda x: next(values), np.zeros(2), 5)
    assert len(list(session.ask())) == 2


def test_nelder_mead_begins_again_elsewhere(float64):
    strategy = strategies.nelder_mead(1.0, lower=-5.0, upper=5.0)
    points, session = asked(strategy, lambda x: float(((x - 1) ** 2).sum()), np.zeros(2), 400)
    assert bool(strategy.ended(session.state))
    assert int(session.state.runs) >= 1
    assert (np.abs(points) <= 5).all()
    np.testing.assert_allclose(session.recommend(), [1, 1], atol=1e-7)


# --- quasi-Newton


def bfgs(f, x, sigma, evaluations):
    """BFGS on forward differences, step by step: the points in order. Nocedal and Wright, algorithm 6.1."""
    points, d, eps = [], len(x), np.finfo(float).eps

    def ask(x):
        points.append(np.array(x))
        return f(x)

    value, inverse, fresh, s, before = ask(x), np.eye(d), True, None, None
    while len(points) < evaluations:
        h = np.sqrt(eps) * np.maximum(np.abs(x), sigma)
        gradient = np.array([(ask(x + h[i] * np.eye(d)[i]) - value) / h[i] for i in range(d)])
        if s is not None and s @ (gradient - before) > 0:
            y = gradient - before
            inverse = inverse * (s @ y) / (y @ y) if fresh else inverse
            v = np.eye(d) - np.outer(s, y) / (s @ y)
            inverse, fresh = v @ inverse @ v.T + np.outer(s, s) / (s @ y), False
        direction = -inverse @ gradient
        length = min(1, sigma / np.linalg.norm(direction)) if fresh else 1.0
        while len(points) < evaluations:
            new, slope = ask(x + length * direction), length * (gradient @ direction)
            if new <= value + 1e-4 * slope:
                break
            length *= np.clip(-slope / (2 * (new - value - slope)), 0.1, 0.5)
        s, before, x, value = length * direction, gradient, x + length * direction, new
    return np.array(points[:evaluations])


def test_quasi_newton_asks_what_its_twin_asks(float64):
    ours, _ = asked(strategies.quasi_newton(0.5), valley, X0, 70)
    np.testing.assert_allclose(ours, bfgs(valley, X0, 0.5, 70), rtol=1e-5, atol=1e-6)


def test_quasi_newton_takes_no_step_that_gains_too_little():
    for slope_share, tries in ((1e-5, 1), (1e-3, -1)):  # of the decrease along the slope; Armijo's share is 1e-4
        session = Session(strategies.quasi_newton(), np.zeros(1), stop=None)
        generation = session.ask()
        session.tell(generation, [float(x[0]) for x in generation])  # slope 1
        generation = session.ask()
        (x,) = generation
        session.tell(generation, [float(slope_share * x[0])])
        assert int(session.state.tries) == tries


def test_quasi_newton_asks_a_gradient_in_one_generation_and_lines_one_by_one():
    strategy = strategies.quasi_newton()
    session = Session(strategy, np.zeros(4))
    sizes = []
    for _ in range(4):
        generation = session.ask()
        sizes.append(len(list(generation)))
        session.tell(generation, [float(((x - 1) ** 2).sum()) for x in generation])
    assert sizes == [5, 1, 4, 1]


def test_quasi_newton_solves_what_it_should_in_so_many_evaluations(float64):
    count = lambda f, x0: minimize(f, x0, strategies.quasi_newton(), evaluations=4000, target=1e-8).evaluations
    ellipsoid = lambda x: jnp.sum(jnp.asarray(10.0 ** np.linspace(0, 6, 5)) * (x - 1) ** 2)
    assert count(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(5)) < 30  # measured: 19
    assert count(ellipsoid, jnp.zeros(5)) < 400
    assert count(lambda x: valley(x), jnp.asarray(X0)) < 300


def test_quasi_newton_ends_where_nothing_is_gained_and_stays_in_the_box(float64):
    strategy = strategies.quasi_newton(lower=[0.0, -1.0], upper=[1.0, 2.0])
    points, session = asked(strategy, lambda x: float(x[0] + (x[1] - 5) ** 2), np.array([0.5, 0.0]), 200)
    assert bool(strategy.ended(session.state))
    np.testing.assert_allclose(session.recommend(), [0.0, 2.0], atol=1e-7)
    assert ((points >= [0, -1]) & (points <= [1, 2])).all()


# --- coordinate search


def terms(x):
    """Separable, with many local minima."""
    return jnp.sum((x - 1.3) ** 2 + 10 * (1 - jnp.cos(2 * jnp.pi * (x - 1.3))))


def test_coordinate_search_solves_separable_functions(float64):
    strategy = strategies.coordinate_search(lower=-5.0, upper=5.0)
    count = lambda f, d: minimize(f, jnp.full(d, -2.7), strategy, evaluations=300 * d, target=1e-8).evaluations / d
    assert count(lambda x: jnp.sum((x - 1.3) ** 2), 4) < 8  # measured: 5
    assert count(lambda x: jnp.sum(jnp.asarray([1.0, 1e2, 1e4, 1e6]) * jnp.abs(x - 1.3) ** 2.5), 4) < 60
    assert count(terms, 4) < 150
    assert count(lambda x: jnp.sum(x), 4) <= 300  # the wall


def test_coordinate_search_finds_the_wall():
    strategy = strategies.coordinate_search(lower=-5.0, upper=5.0)
    result = minimize(lambda x: jnp.sum(x), jnp.zeros(3), strategy, evaluations=12)
    assert np.asarray(result.best).tolist() == [-5.0] * 3


@pytest.mark.parametrize("popsize", [1, 3])
def test_coordinate_search_tells_what_is_separable(float64, popsize):
    strategy = strategies.coordinate_search(popsize, lower=-5.0, upper=5.0)
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    apart = minimize(terms, jnp.full(4, -2.0), strategy, evaluations=60)
    together = minimize(lambda x: terms(turned @ x), jnp.full(4, -2.0), strategy, evaluations=60)
    assert not bool(strategy.ended(apart.state))
    assert bool(strategy.ended(together.state))
    early = minimize(lambda x: terms(turned @ x), jnp.full(4, -2.0), strategy, evaluations=20)
    assert bool(strategy.ended(early.state))  # by the first test, in the fourth turn


def test_coordinate_search_moves_one_number_and_never_asks_twice_but_to_test(float64):
    points, session = asked(strategies.coordinate_search(lower=-5.0, upper=5.0), terms, np.full(3, 0.2), 90)
    again = 90 - len(np.unique(points, axis=0))
    assert again <= 4
    best = np.array([terms(x) for x in points])
    for i in range(1, 90):
        base = points[:i][np.argmin(best[:i])]
        assert (points[i] != base).sum() <= 1
    at, gain = np.asarray(session.state.at), np.asarray(session.state.gain)
    there = np.isfinite(at)
    assert all((np.diff(row[ok]) > 0).all() for row, ok in zip(at, there, strict=True))
    base = np.asarray(session.state.base)
    for i in range(3):  # the lists are true of the base as it is now
        for x, g in zip(at[i][there[i]], gain[i][there[i]], strict=True):
            other = base.copy()
            other[i] = x
            np.testing.assert_allclose(terms(other) - terms(base), g, atol=1e-9)


# --- in turn


def test_a_portfolio_goes_on_from_the_best_point():
    strategy = wrappers.portfolio((strategies.hill_climbing(4), 40), strategies.cma_es(6, sigma=1e-3))
    assert isinstance(strategy.phases[0], Phase)
    session = Session(strategy, np.zeros(3), key=1, stop=None)
    f = lambda x: float(((x - 1) ** 2).sum())
    seen = []
    for _ in range(10):
        generation = session.ask()
        seen += list(generation)
        session.tell(generation, [f(x) for x in generation])
    assert int(session.state.phase) == 1
    best = min(seen, key=f)
    generation = session.ask()
    assert len(list(generation)) == 6
    assert np.abs(np.array(list(generation)) - best).max() < 0.01


def test_a_phase_ends_by_itself_or_where_it_is_stale():
    turned = lambda x: (x[0] - x[1]) ** 2 + (x[0] + x[1] - 1) ** 2 / 9
    strategy = wrappers.portfolio(strategies.coordinate_search(lower=-5.0, upper=5.0), strategies.snes(8))
    assert int(minimize(turned, jnp.full(2, 3.0), strategy, evaluations=60).state.phase) == 1
    stale = wrappers.portfolio((strategies.random_search(4), float("inf"), 12), strategies.snes(8))
    assert int(minimize(lambda x: jnp.sum(x**2), jnp.zeros(2), stale, evaluations=12).state.phase) == 0
    assert int(minimize(lambda x: jnp.sum(x**2), jnp.zeros(2), stale, evaluations=40).state.phase) == 1


@pytest.mark.parametrize(
    ("phases", "cause"),
    [
        ((), "empty list"),
        ((strategies.snes(8), strategies.cma_es(8)), "bare strategy in the midst"),
        ((wrappers.augmented_lagrangian(strategies.cma_es(8), 1),), "inside augmented_lagrangian"),
    ],
)
def test_what_is_no_portfolio_is_refused(phases, cause):
    with pytest.raises((ValueError, TypeError), match=f"(?s)expected.*usual cause.*{cause}"):
        wrappers.portfolio(*phases)


ON_THE_HOST = {
    "nelder_mead": lambda: strategies.nelder_mead(),
    "quasi_newton": lambda: strategies.quasi_newton(),
    "coordinate_search": lambda: strategies.coordinate_search(lower=-4.0, upper=4.0),
    "bayesian_optimization": lambda: strategies.bayesian_optimization(lower=-4.0, upper=4.0, memory=32),
    "surrogate": lambda: wrappers.surrogate(strategies.cma_es(8)),
    "portfolio": lambda: wrappers.portfolio((strategies.nelder_mead(), 20), strategies.cma_es(8)),
}


@pytest.mark.parametrize("name", ON_THE_HOST)
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_values_of_the_host_one_by_one_are_told_apart(name, offset):
    """What is told is a difference from an offset, which moves: what a state remembers must move with it."""
    f = lambda x: float(((np.asarray(x, float) - 0.3) ** 2).sum()) + offset
    result = minimize(f, np.zeros(2), ON_THE_HOST[name](), evaluations=60 if name != "bayesian_optimization" else 24,
                      jit=False, stop=None)  # fmt: skip
    assert result.best_value - offset < 0.02
