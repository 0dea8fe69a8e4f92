"""The Gaussian-process kit against NumPy and SciPy, and Bayesian optimization by its rules and by what it finds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from evoopt import minimize, trees
from evoopt.strategies import bayesian_optimization
from evoopt.strategies.local import gaussian_process as gp
from evoopt.strategies.local.bayesian_optimization import LONGEST, first, spread_evenly, warped

D, N, ROOM = 3, 12, 16
RANDOM = np.random.default_rng(4)
X = RANDOM.random((ROOM, D)).astype(np.float32)
Y = np.sin(5 * X[:, 0]).astype(np.float32) + X[:, 1]
THERE = np.arange(ROOM) % 4 != 3  # 12 of the 16
DATA = gp.Data(jnp.asarray(X), jnp.asarray(Y - Y.mean()), jnp.asarray(THERE))
SCALES = gp.Scales(jnp.log(jnp.asarray([0.3, 0.6, 2.0])), jnp.log(jnp.asarray(1e-3)))


def kernel(a, b):
    """Matern-5/2, pair by pair."""
    k = np.empty((len(a), len(b)))
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            r = np.sqrt(5 * sum(((p - q) / np.exp(np.asarray(SCALES.lengths))) ** 2))
            k[i, j] = (1 + r + r**2 / 3) * np.exp(-r)
    return k


def twin():
    """Covariance, points and values in float64, only of what is there."""
    x, y = X[THERE].astype(float), np.asarray(DATA.values)[THERE].astype(float)
    return kernel(x, x) + np.eye(N) * (np.exp(float(SCALES.noise)) + float(gp._jitter(jnp.float32))), x, y


def test_the_evidence_and_the_posterior_are_those_of_the_points_that_are_there():
    covariance, x, y = twin()
    evidence = -scipy.stats.multivariate_normal(np.zeros(N), covariance).logpdf(y) - N / 2 * np.log(2 * np.pi)
    lengths = np.exp(np.asarray(SCALES.lengths, float))
    prior = -scipy.stats.lognorm.logpdf(lengths, np.sqrt(3), scale=np.exp(np.sqrt(2)) * np.sqrt(D)).sum()
    prior -= D * (np.log(np.sqrt(3)) + np.log(2 * np.pi) / 2)  # constants, which the loss leaves out
    noise = ((float(SCALES.noise) + 6) / 2) ** 2 / 2
    np.testing.assert_allclose(gp.loss(SCALES, DATA), evidence + prior + noise, rtol=1e-4)
    at = RANDOM.random((5, D))
    mean, std = gp.posterior(gp.conditioned(DATA, SCALES), jnp.asarray(at, jnp.float32))
    k = kernel(x, at)
    np.testing.assert_allclose(mean, k.T @ np.linalg.solve(covariance, y), rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(std**2, 1 - np.einsum("ij,ij->j", k, np.linalg.solve(covariance, k)), atol=2e-4)


def test_a_fit_is_better_than_where_it_began_and_finds_what_matters():
    begin = gp.scales(D, jnp.float32)
    process = jax.jit(gp.fit)(DATA, begin)
    assert float(gp.loss(process.scales, DATA)) < float(gp.loss(begin, DATA)) - 1
    lengths = np.exp(np.asarray(process.scales.lengths))
    assert lengths[0] < lengths[2] / 3  # the third number changes nothing
    assert jax.tree.all(jax.tree.map(lambda g: jnp.isfinite(g).all(), jax.grad(gp.loss)(begin, DATA)))


@pytest.mark.parametrize("z", [-12.0, -4.0, -1.001, -0.999, 0.0, 2.0])
def test_the_expected_improvement_is_its_integral(z):
    improvement = lambda t: max(z - t, 0.0) * scipy.stats.norm.pdf(t)
    whole = scipy.integrate.quad(improvement, -40, z, epsabs=0, limit=200)[0]
    np.testing.assert_allclose(gp._log_h(jnp.asarray(z)), np.log(whole), rtol=2e-3, atol=2e-3)


def test_warped_values_have_their_order_and_size():
    y = jnp.asarray([3.0, np.inf, 1e30, 1.0, 7.0, np.nan])
    found = warped(gp.Data(jnp.zeros((6, 1)), y, jnp.asarray([True] * 5 + [False])))
    here = np.asarray(found.values, float)[:5]
    assert np.argsort(here[[3, 0, 4, 2]]).tolist() == [0, 1, 2, 3]
    assert here[1] == here[2]  # infinity is the worst finite value
    np.testing.assert_allclose([here.mean(), here.std()], [0, 1], atol=1e-5)
    by_hand = np.log1p(np.array([2.0, 1e30, 1e30, 0.0, 6.0]) / 1.5)  # the first quartile of 0, 2, 6 and 1e30
    np.testing.assert_allclose(here, (by_hand - by_hand.mean()) / by_hand.std(), rtol=1e-4)


def test_the_first_design_is_even():
    x = np.asarray(spread_evenly(jnp.arange(64), jnp.asarray([0.1, 0.7])))
    assert np.histogramdd(x, bins=4, range=[(0, 1)] * 2)[0].min() >= 2  # of 4 in the mean
    assert scipy.stats.qmc.discrepancy(x) < 0.004  # random points: 0.01


ASK, TELL = (jax.jit(lambda strategy, *given, name=name: getattr(strategy, name)(*given)) for name in ("ask", "tell"))


def after(state, strategy, values):
    for value in values:
        population = ASK(strategy, state, jax.random.key(0))
        state = TELL(strategy, state, population, jnp.asarray([value]))
    return state


def test_the_trust_region_grows_and_shrinks_as_in_turbo():
    strategy = bayesian_optimization(lower=0.0, upper=1.0, memory=16)
    state = trees.strong(strategy.init(jnp.full(2, 0.5), jax.random.key(0)))
    state = after(state, strategy, [9.0] * first(2))
    state = state._replace(length=jnp.asarray(0.5))
    state = after(state, strategy, [8.0, 7.0])
    assert (float(state.length), int(state.successes)) == (0.5, 2)
    state = after(state, strategy, [6.0])
    assert (float(state.length), int(state.successes)) == (1.0, 0)
    state = after(state, strategy, [6.0] * 4)  # max(4, d) failures
    assert (float(state.length), int(state.failures)) == (0.5, 0)
    state = after(state._replace(length=jnp.asarray(0.5**7)), strategy, [6.0] * 4)
    assert float(state.length) == LONGEST  # it looks everywhere again


def test_proposals_stay_in_the_box_and_differ():
    strategy = bayesian_optimization(4, lower=[-1.0, 10.0], upper=[1.0, 11.0], memory=16)
    f = lambda x: (x[0] - 1) ** 2 + x[1]  # best in a corner
    result = minimize(f, jnp.asarray([0.0, 10.5]), strategy, generations=5)
    np.testing.assert_allclose(np.asarray(result.best), [1.0, 10.0], atol=0.05)
    early = minimize(f, jnp.asarray([0.0, 10.5]), strategy, generations=1)
    x = np.asarray(strategy.ask(early.state, jax.random.key(1)).decoded())
    assert (np.abs(x[:, 0]) <= 1).all()
    assert ((x[:, 1] >= 10) & (x[:, 1] <= 11)).all()
    assert len(np.unique(x.round(5), axis=0)) == 4


def test_what_is_beyond_the_memory_is_the_worst():
    strategy = bayesian_optimization(lower=0.0, upper=1.0, memory=4)
    state = trees.strong(strategy.init(jnp.full(2, 0.5), jax.random.key(0)))
    state = after(state, strategy, [5.0, 1.0, 4.0, np.nan, 3.0, 2.0])
    assert sorted(np.asarray(state.data.values).tolist()) == [1.0, 2.0, 3.0, 4.0]
    assert bool(state.data.there.all())


def test_thirty_evaluations_of_a_curved_valley_are_worth_hundreds_at_random():
    f = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    strategy = bayesian_optimization(lower=-2.0, upper=2.0, memory=40)
    found = [float(minimize(f, jnp.asarray([-1.0, 1.0]), strategy, evaluations=30, key=i).best_value) for i in range(3)]
    assert np.median(found) < 0.3
