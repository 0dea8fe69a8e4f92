"""Zeroth-order strategies against NumPy re-statements of their equations, fed the same noise; their estimates' moments.

The letters of the checks are those of the list they come from: d moments, e subspaces, f replayed moments, j unrolls
in truncations, k ZO-AdaMU, l offloading. That the direction updated is the direction probed (b) and that probing leaves
no trace (a) is a rule of tests/test_contract.py, over the case table.
"""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evoopt import noise, shaping, strategies, trees, wrappers
from evoopt.recipes.black_box_tuning import black_box_tuning
from evoopt.recipes.offload import Offloaded, sequential
from evoopt.run.checkpoint import digest
from evoopt.strategies.zeroth_order import probes

START = {"b": np.array([0.3, -1.0]), "w": np.array([[1.0, -0.5, 2.0], [0.25, 2.0, -1.5]])}
D = 8
TARGET = np.array([-0.7, 2.0, -1.0, 0.5, 3.0, 1.4, -2.2, 0.9])
CURVATURE = np.array([1.0, 3.0, 0.5, 2.0, 5.0, 0.7, 1.5, 2.5])
S = 0.05  # sigma


lozo, subzero, persistent_es = (
    importlib.import_module(f"evoopt.strategies.{name}")
    for name in ("zeroth_order.lozo", "zeroth_order.subzero", "gaussian.persistent_es")
)


def vector(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def vectors(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(tree)], axis=1)


def tree(x):
    return {"b": x[:2], "w": x[2:].reshape(2, 3)}


def loss(x):
    """A quartic bowl without symmetry: third moments matter."""
    y = (x - TARGET) * CURVATURE**0.5
    return (y**2).sum(-1) + 0.1 * y[..., 0] * y[..., 5] + 0.01 * (y**4).sum(-1)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def start():
    return jax.tree.map(jnp.asarray, START)


@jax.jit
def asked(strategy, state, key):
    """The population, and its candidates as vectors (n, d)."""
    population = strategy.ask(state, key)
    candidates = population.decoded()
    return population, jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(candidates)], axis=1)


@jax.jit
def begun(strategy):
    return strategy.init(start(), jax.random.key(0))


@jax.jit
def told(strategy, state, population, values):
    return strategy.tell(state, population, values)


def map_numpy(pair):
    return pair[0], np.asarray(pair[1], np.float64)


def follow(strategy, twin, steps=12, lose=None, tolerance=1e-9):
    """`steps` of both, the twin given the candidates and their values; yields the state after each."""
    state = begun(strategy)
    for i, key in enumerate(jax.random.split(jax.random.key(1), steps)):
        population, candidates = map_numpy(asked(strategy, state, key))
        values = loss(candidates)
        if lose is not None and i % 3 == 1:
            values[lose] = np.nan
        state = told(strategy, state, population, jnp.asarray(values))
        twin.update(candidates, values)
        got = vector(strategy.recommend(state))
        np.testing.assert_allclose(got, twin.x, rtol=0, atol=tolerance * np.abs(twin.x).max())
        yield state
    assert loss(twin.x) < 0.99 * loss(vector(START))  # the rates do something


def drain(*args, **options):
    return list(follow(*args, **options))[-1]


def pairs(candidates, values, sigma=S):
    """(z, g) of the pairs that were answered: central differences along the directions read off the candidates."""
    z = (candidates[0::2] - candidates[1::2]) / (2 * sigma)
    g = (values[0::2] - values[1::2]) / (2 * sigma)
    return z[~np.isnan(g)], g[~np.isnan(g)]


# ---- d: moments of the estimates, over many keys ----

KEYS = jax.random.split(jax.random.key(7), 20_000)
SLOPE = np.array([1.0, -2.0, 0.5, 1.5, -0.7, 1.2, 0.3, -0.9])


def estimates(strategy, f, keys=KEYS):
    """Minus the step from START over the learning rate, for many keys: (keys, d)."""
    state = begun(strategy)

    @jax.jit
    @jax.vmap
    def one(key):
        population = strategy.ask(state, key)
        after = strategy.tell(state, population, jax.vmap(f)(population.decoded()))
        return jnp.concatenate(
            [x.reshape(-1) for x in jax.tree.leaves(jax.tree.map(jnp.subtract, state.mean, after.mean))]
        )

    return np.asarray(one(keys)) / float(strategy.learning_rate)


def linear(params):
    return jnp.asarray(SLOPE) @ (jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(params)]) - vector(START))


def check_mean(samples, expected, errors=4.0, precision=0.1):
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert error.max() < precision * np.abs(expected).max()
    assert (np.abs(samples.mean(axis=0) - expected) < errors * error).all(), (samples.mean(axis=0), expected)


@pytest.mark.parametrize(("kind", "extra"), [(noise.gaussian, 1), (noise.rademacher, -1)], ids=["gaussian", "signs"])
@pytest.mark.parametrize("two_sided", [True, False])
def test_the_estimate_has_its_moments(kind, extra, two_sided):
    """E g = gradient, E |g|^2 = (d + n + 1) / n |gradient|^2 for Gaussian and (d + n - 1) / n for signs."""
    n = 3
    popsize = 2 * n if two_sided else n + 1
    strategy = strategies.mezo(popsize, sigma=S, learning_rate=1.0, two_sided=two_sided, noise=kind)
    samples = estimates(strategy, linear)
    check_mean(samples, SLOPE)
    check_mean((samples**2).sum(1, keepdims=True), (D + n + extra) / n * (SLOPE**2).sum())


# ---- MeZO and its variants ----


class MeZO:
    """Malladi et al. 2023, algorithm 1: theta - eta (g z + wd theta), averaged over the seeds; wd not for vectors."""

    def __init__(self, eta, wd=0.0, shape=lambda g: g):
        self.x, self.eta, self.shape = vector(START), eta, shape
        self.wd = wd * vector({"b": np.zeros(2), "w": np.ones((2, 3))})

    def update(self, candidates, values):
        z, g = pairs(candidates, values)
        self.x = self.x - self.eta * (self.shape(g) @ z / len(g) + self.wd * self.x)


def test_mezo_is_algorithm_1():
    for popsize in (2, 6):
        drain(strategies.mezo(popsize, sigma=S, learning_rate=0.02, weight_decay=0.3), MeZO(0.02, 0.3))
    state = drain(strategies.mezo(6, sigma=S, learning_rate=0.02), MeZO(0.02), lose=[1, 4])
    assert int(state.unanswered) == 0
    drain(strategies.comparison_descent(4, sigma=S, learning_rate=0.05), MeZO(0.05, shape=np.sign))


def test_weight_decay_follows_a_mask():
    strategy = strategies.mezo(sigma=S, learning_rate=0.1, weight_decay=0.5, decayed=lambda p: {"b": True, "w": False})
    state = begun(strategy)
    after = told(strategy, state, asked(strategy, state, jax.random.key(1))[0], jnp.ones(2)).mean
    np.testing.assert_allclose(after["b"], 0.95 * START["b"])
    np.testing.assert_array_equal(after["w"], START["w"])


class OneSided:
    """g = (l_i - l_0) / eps, the first candidate at the parameters."""

    def __init__(self, eta):
        self.x, self.eta = vector(START), eta

    def update(self, candidates, values):
        np.testing.assert_allclose(candidates[0], self.x)
        z, g = (candidates[1:] - self.x) / S, (values[1:] - values[0]) / S
        ok = ~np.isnan(g)
        self.x = self.x - self.eta * g[ok] @ z[ok] / ok.sum()


def test_one_sided_mezo_shares_the_value_at_the_center():
    drain(strategies.mezo(5, sigma=S, learning_rate=0.02, two_sided=False), OneSided(0.02), lose=[2])
    drain(strategies.mezo(2, sigma=S, learning_rate=0.01, two_sided=False, noise=noise.rademacher), OneSided(0.01))


def test_without_the_center_nothing_is_measured():
    strategy = strategies.mezo(5, sigma=S, learning_rate=0.02, two_sided=False)
    state = begun(strategy)
    population, _ = asked(strategy, state, jax.random.key(1))
    after = told(strategy, state, population, jnp.array([jnp.nan, 1.0, 2.0, 3.0, 4.0]))
    assert int(after.unanswered) == 1
    assert digest(after.mean) == digest(state.mean)


class Residual:
    """g_t = (L(theta_t + eps z_t) - L(theta_(t-1) + eps z_(t-1))) / eps."""

    def __init__(self, eta):
        self.x, self.eta, self.last = vector(START), eta, None

    def update(self, candidates, values):
        z = (candidates[0] - self.x) / S
        if self.last is not None:
            self.x = self.x - self.eta * (values[0] - self.last) / S * z
        self.last = values[0]


def test_one_point_differs_from_the_step_before():
    twin = Residual(5e-4)
    for _ in follow(strategies.one_point(sigma=S, learning_rate=5e-4), twin, 40, tolerance=1e-5):
        pass  # the last value is kept in float32


# f: moments by replay are the stored ones while the window reaches back to the start


@pytest.mark.parametrize(("kind", "popsize"), [(noise.gaussian, 2), (noise.rademacher, 4)], ids=["gaussian", "signs"])
def test_replayed_moments_are_the_stored_ones(popsize, kind):
    stored = lambda optimizer: strategies.spsa(
        popsize, sigma=S, learning_rate=0.05, optimizer=optimizer, noise=kind, regenerate=True
    )
    options = {"sigma": S, "learning_rate": 0.05, "window": 14, "noise": kind}
    for one, two in [
        (strategies.mezo_momentum(popsize, **options), stored(optax.ema(0.9, debias=False))),
        (strategies.mezo_adam(popsize, **options), stored(optax.scale_by_adam())),
    ]:
        a, b = (s.init(start(), jax.random.key(0)) for s in (one, two))
        for i, key in enumerate(jax.random.split(jax.random.key(1), 14)):
            (p, candidates), (q, _) = map_numpy(asked(one, a, key)), asked(two, b, key)
            values = loss(candidates) if i != 5 else np.full(popsize, np.nan)  # a lost step leaves no trace
            a, b = told(one, a, p, jnp.asarray(values)), told(two, b, q, jnp.asarray(values))
            np.testing.assert_allclose(vector(a.mean), vector(b.mean), atol=1e-5 * np.abs(vector(b.mean)).max())
        assert int(a.unanswered) == int(b.unanswered) == 1
        assert np.abs(vector(a.mean) - vector(START)).max() > 0.1


def test_a_short_window_leaves_out_the_oldest():
    """After 5 steps, a window of 2 is a history of the last 2: m = (1 - b) (b g z of step 4 + g z of step 5)."""
    strategy = strategies.mezo_momentum(sigma=S, learning_rate=0.1, momentum=0.8, window=2)
    state, steps = begun(strategy), []
    for key in jax.random.split(jax.random.key(1), 5):
        (population, candidates), before = map_numpy(asked(strategy, state, key)), vector(state.mean)
        z, g = pairs(candidates, loss(candidates))
        steps.append(g[0] * z[0])
        state = told(strategy, state, population, jnp.asarray(loss(candidates)))
    expected = before - 0.1 * 0.2 * (0.8 * steps[3] + steps[4])
    np.testing.assert_allclose(vector(state.mean), expected, rtol=1e-6)


# ---- unrolls in truncations (check j) ----


LENGTH, TRUNCATION = 15, 10  # an inner run of 15 steps in generations of 10: every other end is inside one


def unrolled(strategy, keys, pairs, length=LENGTH, truncation=TRUNCATION):
    """Estimates (pairs, truncations, 2) over two runs of x <- 0.9 x + theta with losses (x - 1)^2; theta stays.

    x has two coordinates, the second starts at -1.
    """
    begin, truncations = jnp.array([0.0, -1.0]), 2 * length // truncation

    def one(key):
        state, inner, g = strategy.init(jnp.array([0.05, 0.3]), key), (jnp.stack([begin] * 2), jnp.zeros(2, int)), []

        def run(candidate, x, t):
            def step(carry, _):
                x, t, before, after, ended = carry
                x = 0.9 * x + candidate
                loss = jnp.sum((x - 1.0) ** 2)
                before, after, t = before + jnp.where(ended, 0.0, loss), after + jnp.where(ended, loss, 0.0), t + 1
                end = t == length
                return (jnp.where(end, begin, x), jnp.where(end, 0, t), before, after, ended | end), None

            carry, _ = jax.lax.scan(step, (x, t, 0.0, 0.0, False), None, length=truncation)
            x, t, before, after, ended = carry
            return (before, ended, jnp.where(ended & (t > 0), after, jnp.nan)), (x, t)

        for k in jax.random.split(key, truncations):
            population = strategy.ask(state, k)
            answers, inner = jax.vmap(run)(population.decoded(), *inner)
            g.append(strategy.estimate(state, population, answers))
            state = strategy.tell(state, population, answers)
        return jnp.stack(g)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(keys, pairs)), np.float64)


def true_gradient(length=LENGTH):
    def loss(theta):
        x, total = jnp.array([0.0, -1.0]), 0.0
        for _ in range(length):
            x = 0.9 * x + theta
            total += jnp.sum((x - 1.0) ** 2)
        return total

    return np.asarray(jax.grad(loss)(jnp.array([0.05, 0.3])), np.float64)


@pytest.mark.parametrize("recipe", ["pes", "nres"])
def test_persistent_estimates_are_unbiased_also_where_runs_end_inside_truncations(recipe):
    n, exact = 20_000, true_gradient()
    estimates = unrolled(getattr(strategies, recipe)(2, learning_rate=0.0), jax.random.key(3), n).sum(axis=1) / 2
    error = estimates.std(axis=0) / np.sqrt(n)
    assert (error < 0.08 * np.abs(exact)).all()
    assert (np.abs(estimates.mean(axis=0) - exact) < 4 * error).all()


@pytest.mark.slow
def test_reused_noise_varies_less_than_persistent_noise():
    """Over the estimates of single truncations, ten to a run: what workers at different places of their runs give."""
    nres, pes = (
        unrolled(strategy(2, learning_rate=0.0), jax.random.key(3), 10_000, 20, 2).var(axis=0).mean(axis=0)
        for strategy in (strategies.nres, strategies.pes)
    )
    assert nres.sum() < 0.95 * pes.sum(), (nres, pes)


def test_an_estimate_from_the_last_truncation_only_is_biased():
    """Truncated ES: plain ES asked of each truncation. Persistent noise is what mends it."""

    class Truncated(persistent_es.PersistentES):
        def _perturbations(self, state, population):
            return population.genomes[::2], population.genomes[::2]

    plain = strategies.pes(2, learning_rate=0.0)
    truncated = Truncated(2, plain.sigma, 0.0, False, plain.optimizer)
    n, exact = 20_000, true_gradient()
    estimates = unrolled(truncated, jax.random.key(3), n).sum(axis=1) / 2
    assert (np.abs(estimates.mean(axis=0) - exact) > 10 * estimates.std(axis=0) / np.sqrt(n)).any()


def test_answers_of_another_shape_are_refused():
    strategy = strategies.pes(8)
    state = strategy.init(jnp.ones(3), jax.random.key(0))
    losses = jnp.ones(8)
    with pytest.raises(ValueError, match=r"(?s)expected losses.*got.*usual cause"):
        strategy.tell(state, strategy.ask(state, jax.random.key(1)), (losses, jnp.ones(4, bool), losses))


def test_whole_runs_need_no_memory():
    """Losses alone are those of whole runs: PES, NRES and plain ES are one."""
    told_of = []
    for strategy in (strategies.pes(8, learning_rate=0.1), strategies.nres(8, learning_rate=0.1)):
        state = strategy.init(jnp.ones(3), jax.random.key(0))
        for key in jax.random.split(jax.random.key(1), 4):
            population = strategy.ask(state, key)
            state = strategy.tell(state, population, jnp.sum(population.decoded() ** 2, axis=1))
        assert not np.asarray(state.total).any()
        told_of.append(np.asarray(state.mean))
    np.testing.assert_array_equal(*told_of)


# ---- ZO-AdaMU (check k) ----


class AdaMU:
    """Jiang et al. 2024, algorithm 1 with the schedule of the module's docstring; draws are given, not read off."""

    def __init__(self, eta, borders, phi, signed=False):
        self.x, self.m, self.t = vector(START), np.zeros(D), 0
        self.eta, self.borders, self.phi, self.signed = eta, borders, phi, signed

    def anneal(self, phi):
        t1, t2, t3 = self.borders
        if self.t < t1:
            return 1.0
        t = min(self.t, t2)
        angle = np.pi * min(1, (t - t1) / (t3 - phi * (t - t1) * (t3 - t2) / (t2 - t1)))
        return max(0.01, 0.5 + 0.5 * np.cos(angle))

    def perturbation(self, z1, z2):
        alpha, b1, b2 = map(self.anneal, self.phi)
        fresh, old = np.sqrt(alpha) * z1, self.m + np.sqrt(1 - alpha) * z2
        return b1 * fresh + (1 - b1) * old, b2 * fresh**2 + (1 - b2) * old**2

    def step(self, m, v, values):
        g = (values[0] - values[1]) / (2 * S)
        self.x = self.x - self.eta * g * m / np.sqrt(v + 1e-8)
        self.m = np.sign(g) * m if self.signed else m
        self.t += 1


@pytest.mark.parametrize("signed", [False, True])
def test_zo_adamu_is_algorithm_1(signed):
    borders, phi = (3.0, 12.0, 18.0), (0.1, 1.0, 1.5)
    strategy = strategies.zo_adamu(18, sigma=S, learning_rate=0.01, signed_momentum=signed)
    twin = AdaMU(0.01, borders, phi, signed)
    state = begun(strategy)
    draw = jax.jit(lambda key: jax.vmap(trees.flatten)(noise.gaussian.rows(key, 2, start())))
    for key in jax.random.split(jax.random.key(1), 18):
        population, candidates = map_numpy(asked(strategy, state, key))
        m, v = twin.perturbation(*np.asarray(draw(key)))
        np.testing.assert_allclose(candidates, twin.x + S * np.stack([m, -m]), atol=1e-6)
        state = told(strategy, state, population, jnp.asarray(loss(candidates)))
        twin.step(m, v, loss(candidates))
        np.testing.assert_allclose(vector(state.mean), twin.x, atol=1e-5)
        np.testing.assert_allclose(vector(state.momentum), twin.m, atol=1e-5)
        assert int(state.steps) == twin.t
    assert loss(twin.x) < loss(vector(START))


def test_the_schedule_ends_where_figure_1_does():
    """k: borders of 1/6, 2/3 and 1 end at .473, .146 and the floor, whatever the number of leaves; it starts at 1."""
    strategy = strategies.zo_adamu(20_000)
    ends = lambda t: [float(w) for w in strategy.weights(jnp.asarray(t))]
    assert ends(0) == ends(3333) == [1.0, 1.0, 1.0]
    for t in (13_334, 16_000, 20_000, 50_000):
        np.testing.assert_allclose(ends(t), [0.473, 0.146, 0.01], atol=5e-4)
    middle = np.array([ends(t) for t in range(3000, 14_000, 500)])
    assert (np.diff(middle, axis=0) <= 1e-7).all(), "it never turns round"
    assert all(w == pytest.approx(0.01) for w in [strategies.zo_adamu(100, phi=(9.0,) * 3).weights(jnp.asarray(99))][0])


def test_adamu_is_bounded_and_starts_finite():
    """k: |m| / sqrt(v) <= 1.69 in the last phase, by Cauchy and Schwarz; the first phase is steps of the sign."""
    from evoopt.strategies.zeroth_order.zo_adamu import adapted

    z1, z2, momentum = jax.random.normal(jax.random.key(0), (3, 50_000), jnp.float32)
    momentum = 3 * momentum
    last = strategies.zo_adamu(20_000).weights(jnp.asarray(20_000))
    ratio = np.abs(adapted(z1, z2, momentum, last))
    assert 1.6 < ratio.max() <= np.sqrt(0.1464466**2 / 0.01 + 0.8535534**2 / 0.99) < 1.70
    first = adapted(z1, z2, jnp.zeros_like(z1), strategies.zo_adamu(20_000).weights(jnp.asarray(0)))
    assert np.isfinite(first).all()
    np.testing.assert_allclose(first[np.abs(z1) > 0.01], np.sign(z1)[np.abs(z1) > 0.01], atol=1e-3)


def of_the_paper(x, y):
    """The functions of the paper's plots."""
    return jnp.stack(
        [
            jnp.abs(x) + jnp.abs(y),
            jnp.abs(x + y) + jnp.abs(x - y) / 10,
            (x + y) ** 2 + (x - y) ** 2 / 10,
            jnp.abs(x) / 10 + jnp.abs(y),
        ]
    )


def test_adamu_converges_on_the_functions_of_the_paper():
    """k: the median of five runs from (1.1, -0.8) is below about three times what was measured."""
    strategy = strategies.zo_adamu(1500)
    rates, aims = jnp.array([0.02, 0.02, 0.01, 0.02], jnp.float32), [0.15, 0.25, 3e-4, 0.06]

    def run(i, key):
        mine = dataclasses.replace(strategy, learning_rate=rates[i])

        def step(state, key):
            population = mine.ask(state, key)
            return mine.tell(state, population, jax.vmap(lambda p: of_the_paper(*p)[i])(population.decoded())), None

        state = mine.init(jnp.array([1.1, -0.8], jnp.float32), key)
        return of_the_paper(*jax.lax.scan(step, state, jax.random.split(key, 1500))[0].mean)[i]

    runs = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
    reached = np.asarray(jax.jit(runs)(jnp.arange(4), jax.random.split(jax.random.key(2), 5)))
    assert (np.median(reached, axis=1) < aims).all(), reached


# ---- the others, each against its equations ----


class FZOO:
    """Dang et al. 2025, the released form: theta - eta / (N s) sum (l_i - l_0) u_i, s the biased deviation of l_i."""

    def __init__(self, eta):
        self.x, self.eta = vector(START), eta

    def update(self, candidates, values):
        u = (candidates[1:] - self.x) / S
        np.testing.assert_allclose(np.abs(u), 1, atol=1e-9)
        ok = ~np.isnan(values[1:])
        probed, u = values[1:][ok], u[ok]
        self.x = self.x - self.eta / (len(probed) * probed.std()) * (probed - values[0]) @ u


def test_fzoo_normalises_by_the_deviation_of_its_values():
    drain(strategies.fzoo(6, sigma=S, learning_rate=0.05), FZOO(0.05), lose=[3])
    strategy = strategies.fzoo(4, sigma=S, learning_rate=0.05)
    state = begun(strategy)
    population, _ = asked(strategy, state, jax.random.key(1))
    assert digest(told(strategy, state, population, jnp.full(4, 2.0)).mean) == digest(state.mean), (
        "no deviation, no step"
    )
    values = jnp.array([3.0, 1.0, 2.0, 5.0])
    one, ten = (vector(told(strategy, state, population, scale * values).mean) for scale in (1.0, 10.0))
    np.testing.assert_allclose(one, ten, rtol=1e-12, err_msg="the scale of the values changes nothing")


class HiZOO:
    """Zhao et al. 2025, algorithm 1; the step along the probe that was made, H updated from the same three values."""

    def __init__(self, eta, h, wd):
        self.x, self.H, self.eta, self.h = vector(START), np.ones(D), eta, h
        self.wd = wd * vector({"b": np.zeros(2), "w": np.ones((2, 3))})

    def update(self, candidates, values):
        np.testing.assert_allclose(candidates[0], self.x, atol=1e-12)
        step = (candidates[1] - candidates[2]) / (2 * S)  # z / sqrt(H)
        z = step * np.sqrt(self.H)
        l0, plus, minus = values
        curvature = abs(plus + minus - 2 * l0) * self.H * z**2 / (2 * S**2)
        self.x = self.x - self.eta * ((plus - minus) / (2 * S) * step + self.wd * self.x)
        self.H = (1 - self.h) * self.H + self.h * curvature


def test_hizoo_is_algorithm_1():
    strategy = strategies.hizoo(sigma=S, learning_rate=0.03, smoothing=0.05, weight_decay=0.1)
    twin = HiZOO(0.03, 0.05, 0.1)
    for state in follow(strategy, twin):
        np.testing.assert_allclose(vector(state.hessian), twin.H, rtol=1e-7)
    assert twin.H.max() / twin.H.min() > 1.5
    population, _ = asked(strategy, state, jax.random.key(9))
    lost = told(strategy, state, population, jnp.array([jnp.nan, 1.0, 2.0]))
    assert digest(lost) == digest(state._replace(unanswered=jnp.int32(1))), "without the center nothing is known"


class Sparse:
    """Liu et al. 2024: z on |theta| <= h only, h the quantile at the start, the mask of the parameters as they are."""

    def __init__(self, eta, density):
        self.x, self.eta = vector(START), eta
        self.h = np.r_[np.inf, np.inf, np.full(6, np.quantile(np.abs(START["w"]), density))]

    def update(self, candidates, values):
        mask = np.abs(self.x) <= self.h
        z, g = pairs(candidates, values)
        assert (z[:, ~mask] == 0).all()
        assert (z[:, mask] != 0).all()
        self.x = self.x - self.eta * g @ z / len(g)


def test_sparse_mezo_masks_by_the_unperturbed_parameters():
    twin = Sparse(0.05, 0.5)
    drain(strategies.sparse_mezo(4, sigma=0.3, learning_rate=0.05, sparsity=0.5), _Scaled(twin, 0.3), 20)
    assert (np.abs(twin.x) > twin.h).sum() > 3, "some weights grew out of the mask, and stay"


class _Scaled:
    """A twin that was written for S, at another sigma."""

    def __init__(self, twin, sigma):
        self.twin, self.sigma = twin, sigma

    @property
    def x(self):
        return self.twin.x

    def update(self, candidates, values):  # differences over 2 S: the candidates are drawn in by S / sigma
        middle = (candidates[0::2] + candidates[1::2]) / 2
        middle = np.repeat(middle, 2, axis=0)
        slope = np.repeat((values[0::2] - values[1::2]) / 2, 2) * np.tile([1, -1], len(values) // 2)
        self.twin.update(middle + (candidates - middle) * S / self.sigma, slope * S / self.sigma)


class LOZO:
    """Chen et al. 2025, algorithms 1 and 2: W - eta / r N V^T, N <- b N + (1 - b) g U, turned when V is drawn anew."""

    def __init__(self, eta, rank, momentum):
        self.x, self.eta, self.rank, self.b = vector(START), eta, rank, momentum
        self.N, self.n, self.V = np.zeros((2, rank)), np.zeros(2), None

    def update(self, candidates, values, V):
        z, g = pairs(candidates, values)
        if self.V is not None and not np.array_equal(V, self.V):
            self.N = self.N @ self.V.T @ V / 3
        self.V = V
        U = z[0, 2:].reshape(2, 3) @ np.linalg.pinv(V.T)
        np.testing.assert_allclose(U @ V.T, z[0, 2:].reshape(2, 3), atol=1e-9)
        self.N = self.b * self.N + (1 - self.b) * g[0] * U
        self.n = self.b * self.n + (1 - self.b) * g[0] * z[0, :2]
        self.x = self.x - self.eta * np.r_[self.n, (self.N @ V.T / self.rank).ravel()]


@pytest.mark.parametrize(("momentum", "interval"), [(0.0, 3), (0.6, 3), (0.6, 1)])
def test_lozo_keeps_v_and_turns_the_momentum(momentum, interval):
    strategy = strategies.lozo_m(sigma=S, learning_rate=0.02, rank=2, interval=interval, momentum=momentum)
    twin = LOZO(0.02, 2, momentum)
    state, bases = begun(strategy), []
    for key in jax.random.split(jax.random.key(1), 8):
        population, candidates = map_numpy(asked(strategy, state, key))
        fresh, basis = (a[0] for a in population.genomes.address)
        _, v = population.decode.noise.factors(
            (fresh, noise.gaussian.seeds(basis, 1, state.mean["w"])), state.mean["w"]
        )
        bases.append(np.asarray(v))
        state = told(strategy, state, population, jnp.asarray(loss(candidates)))
        twin.update(candidates, loss(candidates), bases[-1])
        np.testing.assert_allclose(vector(state.mean), twin.x, rtol=1e-9)
        np.testing.assert_allclose(state.momentum["w"], twin.N, rtol=1e-7, atol=1e-9)
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(bases)]
    three = [True, True, False, True, True, False, True]
    assert same == (three if interval == 3 else [False] * 7), "V serves as many steps"
    assert interval == 1 or loss(twin.x) < loss(vector(START))


def test_subzero_probes_orthonormal_subspaces():
    strategy = strategies.subzero(sigma=S, learning_rate=0.02, rank=2, interval=3)
    twin, state, directions = MeZO(0.02), begun(strategy), []
    for key in jax.random.split(jax.random.key(1), 8):
        population, candidates = map_numpy(asked(strategy, state, key))
        directions.append(pairs(candidates, loss(candidates))[0][0, 2:].reshape(2, 3))
        state = told(strategy, state, population, jnp.asarray(loss(candidates)))
        twin.update(candidates, loss(candidates))
        np.testing.assert_allclose(vector(state.mean), twin.x, rtol=1e-9)
    rows = [np.linalg.svd(z)[2][2] for z in directions]  # the direction that U S V^T (2, 3) of rank 2 leaves out
    same = [np.isclose(abs(a @ b), 1) for a, b in itertools.pairwise(rows)]
    assert same == [True, True, False, True, True, False, True], "U and V serve three steps"


class SVRG:
    """Gautam et al. 2024, algorithm 2, the large batch gathered over generations; data shift the target."""

    def __init__(self, eta1, eta2, interval, batches):
        self.x = self.anchor = vector(START)
        self.eta1, self.eta2, self.q, self.k, self.place = eta1, eta2, interval, batches, 0

    def update(self, candidates, values):
        gathering = self.place < self.k
        centers = (candidates[0::2] + candidates[1::2]) / 2
        z, g = pairs(candidates, values)
        if gathering:
            if self.place == 0:
                self.anchor, self.z, self.sums = self.x, z, []
            np.testing.assert_allclose(z, self.z, atol=1e-6)
            np.testing.assert_allclose(centers, [self.anchor] * 2, atol=1e-5)
            self.sums.append(g)
            if self.place == self.k - 1:
                self.G = np.mean(self.sums, axis=0) @ self.z / 2
                self.x = self.x - self.eta1 * self.G
        else:
            np.testing.assert_allclose(centers, [self.x, self.anchor], atol=1e-5)
            np.testing.assert_allclose(z[0], z[1], atol=1e-6)
            self.x = self.x - self.eta2 * (g[0] * z[0] - g[1] * z[1] + self.G)
        self.place = (self.place + 1) % (self.k + self.q - 1)


def test_svrg_takes_its_differences_along_one_direction():
    strategy = strategies.mezo_svrg(sigma=S, learning_rate=0.01, snapshot_rate=0.02, interval=3, batches=2)
    drain(strategy, SVRG(0.02, 0.01, 3, 2), tolerance=1e-6)  # slopes are summed in float32


def test_svrg_has_less_variance_where_only_the_data_vary():
    """At the snapshot itself the noise of the batch cancels: g(theta; B) = g(theta'; B), and the step is that of G."""
    strategy = strategies.mezo_svrg(sigma=S, learning_rate=0.01, snapshot_rate=0.0, interval=2, batches=1)
    state = begun(strategy)
    population, candidates = map_numpy(asked(strategy, state, jax.random.key(1)))
    state = told(strategy, state, population, jnp.asarray(loss(candidates)))
    steps = []
    for shift in (0.0, 5.0):
        population, candidates = map_numpy(asked(strategy, state, jax.random.key(2)))
        steps.append(vector(told(strategy, state, population, jnp.asarray(loss(candidates + shift))).mean))
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-9)
    assert np.abs(steps[0] - vector(state.mean)).max() > 1e-3


class AdaMM:
    """Chen et al. 2019, algorithm 1: g = d / (q mu) sum (f(x + mu u) - f(x)) u on the unit sphere, and AMSGrad."""

    def __init__(self, eta, b1, b2, upper):
        self.x, self.m, self.v, self.top = vector(START), np.zeros(D), np.zeros(D), np.full(D, 1e-7)
        self.eta, self.b1, self.b2, self.upper = eta, b1, b2, upper

    def update(self, candidates, values):
        u = (candidates[1:] - self.x) / S
        np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, rtol=1e-9)
        g = D / (len(u) * S) * (values[1:] - values[0]) @ u
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        self.top = np.maximum(self.top, self.v)
        self.x = np.minimum(self.x - self.eta * self.m / np.sqrt(self.top), self.upper)


def test_zo_adamm_divides_by_the_greatest_second_moment_and_stays_in_the_box():
    strategy = strategies.zo_adamm(5, sigma=S, learning_rate=0.1, b1=0.8, b2=0.5, upper=2.0)
    twin = AdaMM(0.1, 0.8, 0.5, 2.0)
    drain(strategy, twin)
    assert (twin.top > twin.v).any()
    assert (twin.x == 2.0).any()


class Sign:
    """Liu et al. 2019: the sign of every coordinate of the averaged estimate."""

    def __init__(self, eta):
        self.x, self.eta = vector(START), eta

    def update(self, candidates, values):
        z, g = pairs(candidates, values)
        self.x = self.x - self.eta * np.sign(g @ z)


def test_zo_sign_sgd_takes_the_sign_of_every_coordinate():
    drain(strategies.zo_sign_sgd(4, sigma=S, learning_rate=0.05), Sign(0.05))


class Conservative:
    """Zhang et al. 2024: the best of staying, theta - eta g z and theta + eta g z."""

    def __init__(self, eta):
        self.x, self.eta, self.step, self.kept = vector(START), eta, None, []

    def update(self, candidates, values):
        if self.step is None:
            z = (candidates[1] - candidates[2]) / (2 * S)
            self.step = self.eta * (values[1] - values[2]) / (2 * S) * z
        else:
            tried = np.stack([self.x, self.x - self.step, self.x + self.step])
            np.testing.assert_allclose(candidates, tried, atol=1e-5)
            self.kept.append(int(np.argmin(values)))
            self.x, self.step = tried[self.kept[-1]], None


def test_conservative_steps_are_taken_only_if_they_help():
    strategy = strategies.zo_conservative(sigma=S, learning_rate=0.05)
    twin, values = Conservative(0.05), []
    for state in follow(strategy, twin, 24, tolerance=1e-6):  # lengths are kept in float32
        values.append(loss(vector(state.mean)))
    assert {0, 1} <= set(twin.kept)
    assert (np.diff(values) <= 1e-9).all()
    population, candidates = asked(strategy, state, jax.random.key(0))
    assert population.active.tolist() == [False, True, True]  # 2 + 3 forward passes a step
    trying = told(strategy, state, population, jnp.array([jnp.nan, 3.0, 1.0]))
    population, candidates = asked(strategy, trying, jax.random.key(1))
    for values, best in ([2.0, 3.0, 1.0], 2), ([2.0, 1.0, jnp.nan], 1), ([2.0, jnp.nan, 3.0], 0):
        after = told(strategy, trying, population, jnp.array(values))
        np.testing.assert_allclose(vector(after.mean), candidates[best], atol=1e-9)
        assert not after.trying
    after = told(strategy, trying, population, jnp.array([jnp.nan, 1.0, 3.0]))
    assert digest(after) == digest(trying._replace(unanswered=jnp.int32(1))), "nothing is better than what is not known"


# ---- e: low-rank noise and random subspaces ----


@pytest.mark.parametrize("name", ["mezo", "lozo", "subzero", "sparse_mezo", "eggroll"])
def test_stacks_of_layers_move_along_their_probe(name):
    """What was evaluated, also through virtual leaves, is the direction of the step, of stacks and vectors too."""
    from evoopt import virtual

    keys = jax.random.split(jax.random.key(3), 3)
    shapes = {"layers": (3, 40, 48), "w": (64, 32), "b": (7,)}
    x = {k: jax.random.normal(key, shape, jnp.float32) for key, (k, shape) in zip(keys, shapes.items(), strict=True)}
    strategy = strategies.eggroll(2) if name == "eggroll" else getattr(strategies, name)(learning_rate=1e-3)

    @jax.jit
    def step(state):
        population = strategy.ask(state, jax.random.key(1))
        first = population[0]
        made = first
        if hasattr(population.decode, "virtual"):
            made = virtual.materialised(population.decode.virtual(jax.tree.map(lambda g: g[0], population.genomes)))
        return first, made, strategy.recommend(strategy.tell(state, population, jnp.array([3.0, 1.0])))

    state = jax.jit(strategy.init)(x, jax.random.key(0))
    first, made, after = step(state)
    for k in x:
        np.testing.assert_allclose(made[k], first[k], atol=1e-6)
        moved, z = (np.asarray(y[k] - x[k], np.float64).ravel() for y in (after, first))
        assert moved @ z / np.linalg.norm(moved) / np.linalg.norm(z) < -0.999, k


@pytest.mark.parametrize("name", ["lozo", "subzero", "eggroll"])
def test_low_rank_estimates_have_the_gradient_as_their_mean(name):
    """Over U and V too: E of U V^T <U V^T, G> / r, of the scaled U S V^T and of a b^T / sqrt(r) is G, c = 1."""
    options = {"lozo": {"rank": 2}, "subzero": {"rank": 2}, "eggroll": {"rank": 2, "utility": shaping.identity}}[name]
    recipe = {"popsize": 2, "sigma": S, "learning_rate": 1.0, **options}
    check_mean(estimates(getattr(strategies, name)(**recipe), linear), SLOPE)


@pytest.mark.parametrize("kind", [noise.Kept(1, lozo.lazy), noise.Kept(2, subzero.subspace)], ids=["lozo", "subzero"])
def test_leaves_and_layers_of_one_shape_have_noise_of_their_own(kind):
    layers = {"stack": jnp.zeros((2, 3, 4)), "norm": jnp.zeros((2, 4))}
    like = {"a": jnp.zeros((3, 4)), "b": jnp.zeros((3, 4)), "layers": layers}
    rows = jax.vmap(lambda a: kind.draw(a, like))(kind.addresses(jax.random.key(0), 2))["layers"]
    assert all(np.linalg.matrix_rank(z) <= kind.rank for z in rows["stack"].reshape(-1, 3, 4))
    assert np.linalg.matrix_rank(rows["norm"].reshape(4, 4)) == 4, "stacked vectors are no matrix"
    draw = jax.vmap(lambda key: kind.draw(jax.tree.map(lambda a: a[0], kind.addresses(key, 1)), like))
    z = draw(KEYS[:1500])
    stack = z["layers"]["stack"]
    slices = [np.asarray(x).reshape(1500, -1) for x in (z["a"], z["b"], stack[:, 0], stack[:, 1])]
    for i in range(4):
        np.testing.assert_allclose(slices[i].var(), kind.rank if kind.make is lozo.lazy else 1.0, rtol=0.1)
        for j in range(i):
            assert abs((slices[i] * slices[j]).mean()) < 4 / np.sqrt(1500)


# ---- blocks in turn, random subspaces, black-box tuning ----


def test_blocks_are_searched_in_turn_and_a_lost_generation_is_asked_again():
    search = wrappers.alternating(strategies.snes(8))
    state = search.init({"p": jnp.arange(12.0).reshape(3, 4)}, jax.random.key(0))
    for i in range(4):
        population, candidates = map_numpy(asked(search, state, jax.random.key(i)))
        moved = np.abs(candidates.reshape(8, 3, 4) - np.asarray(state.params["p"])).max(axis=(0, 2))
        assert (moved > 0).tolist() == [j == i % 3 for j in range(3)]
        lost = told(search, state, population, jnp.full(8, jnp.nan))
        assert (int(lost.turn), int(lost.unanswered)) == (i % 3, 1)
        after = told(search, state, population, jnp.asarray((candidates**2).sum(1)))
        change = np.abs(np.asarray(after.params["p"] - state.params["p"])).max(axis=1)
        assert (change > 0).tolist() == [j == i % 3 for j in range(3)]
        state = after
    with pytest.raises(ValueError, match="blocks as leading axis"):
        search.init({"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))}, jax.random.key(0))


def test_a_subspace_is_spanned_by_its_columns():
    params = start()
    search = wrappers.subspace(strategies.snes(6), 3, scale=0.5)
    state = search.init(params, jax.random.key(0))
    columns = vectors(noise.gaussian.rows(state.key, 3, params))
    population, candidates = asked(search, state, jax.random.key(1))
    u = np.asarray(jax.vmap(population.decode.decode)(population.genomes), np.float64)
    np.testing.assert_allclose(candidates, vector(params) + 0.5 * u @ columns, atol=1e-6)
    np.testing.assert_array_equal(vector(search.recommend(state)), vector(params))
    descent = wrappers.subspace(strategies.gradient(optax.sgd(0.1)), 3, scale=0.5)
    state = descent.init(params, jax.random.key(0))
    population = descent.ask(state, jax.random.key(1))
    slope = tree(jnp.asarray(SLOPE))
    after = descent.tell(state, population, (jnp.zeros(1), jax.tree.map(lambda g: g[None], slope)))
    np.testing.assert_allclose(
        after.inner.mean, -0.1 * 0.5 * vectors(noise.gaussian.rows(state.key, 3, params)) @ SLOPE, rtol=1e-5
    )


def test_black_box_tuning_starts_at_the_prompts_and_scales_each_layer():
    std = jnp.array([0.01, 1.0])
    search = black_box_tuning(6, dimension=5, sigma=0.5, alpha=2.0, std=std)
    prompts = jax.random.normal(jax.random.key(3), (2, 4, 50), jnp.float32)
    state = search.init(prompts, jax.random.key(0))
    np.testing.assert_allclose(search.recommend(state), prompts, rtol=1e-6)
    for layer in (0, 1):
        population, candidates = asked(search, state, jax.random.key(layer))
        moved = np.asarray(candidates).reshape(-1, 2, 4, 50)[:, layer] - np.asarray(prompts)[layer]
        # A z with z ~ N(0, sigma^2 I): entries alpha std / (sqrt(d) sigma) times sqrt(d) sigma
        np.testing.assert_allclose(moved.std(), 2.0 * std[layer], rtol=0.4)
        state = told(search, state, population, jnp.arange(6.0))
        np.testing.assert_allclose(search.recommend(state)[layer], prompts[layer] + moved[0], atol=1e-5)


# ---- l: offloading ----

KEY = jax.random.split(jax.random.key(5), 3)
MODEL = {
    "embed": lambda p, x: p["table"][x],
    "block": lambda p, h: h + jnp.tanh(h @ p["w"] + p["b"]),
    "head": lambda p, h, x: jnp.mean(jax.nn.logsumexp(h @ p, -1) - (h @ p)[:, 0]),
}


def model_params(layers=4, width=16):
    normal = lambda key, shape: np.asarray(jax.random.normal(key, shape, jnp.float32) * shape[-2] ** -0.5)
    return {
        "embed": {"table": normal(KEY[0], (30, width))},
        "blocks": {"w": normal(KEY[1], (layers, width, width)), "b": np.zeros((layers, width), np.float32)},
        "head": normal(KEY[2], (width, 30)),
    }


@pytest.mark.parametrize(
    "width", [16, pytest.param(48, marks=pytest.mark.slow)]
)  # below and above the size from which leaves are virtual
def test_the_offloaded_run_is_the_plain_run_bit_for_bit(width):
    with jax.enable_x64(False):
        kind = noise.gaussian if width == 16 else noise.rademacher
        strategy = strategies.mezo(4, sigma=1e-2, learning_rate=1e-2, weight_decay=0.01, noise=kind)
        params = model_params(width=width)
        model, objective = Offloaded(strategy, params, **MODEL), sequential(**MODEL)
        state = strategy.init(params, KEY[0])
        ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell)
        evaluate = jax.jit(lambda population, x: population.map(objective, x))
        for i in range(4):
            x, key = jnp.arange(8) + i, jax.random.key(i)
            population = ask(state, key)
            values = evaluate(population, x)
            offloaded = model.step(key, x)
            np.testing.assert_array_equal(offloaded, values)
            if i == 2:  # a lost step
                values, model._pending = jnp.full(4, jnp.nan), model._tell(population, jnp.full(4, jnp.nan))
            state = tell(state, population, values)
            if i == 1:
                assert float(model.value(x)) == float(jax.jit(objective)(state.mean, x))
        assert digest(jax.tree.map(jnp.asarray, model.params)) == digest(state.mean)
        assert np.abs(vector(state.mean) - vector(params)).max() > 1e-3
        np.testing.assert_array_equal(
            vector(params), vector(model_params(width=width))
        )  # what was given is not touched


def test_offloaded_blocks_are_not_all_on_the_device():
    with jax.enable_x64(False):
        params = model_params(layers=12, width=64)
        block, peaks = params["blocks"]["w"][0].nbytes, []
        before = sum(x.nbytes for x in jax.live_arrays())
        alive = lambda layer: peaks.append(sum(x.nbytes for x in jax.live_arrays()) - before)
        model = Offloaded(strategies.mezo(sigma=1e-2, learning_rate=1e-2), params, **MODEL, watch=alive)
        for i in range(2):
            model.step(jax.random.key(i), jnp.arange(8))
        resident = sum(x.nbytes for x in model._resident.values())
        activations = 4 * 2 * 8 * 64 * 4
        assert len(peaks) == 24
        assert max(peaks) <= resident + 3 * block + activations < 0.5 * sum(x.nbytes for x in jax.tree.leaves(params))


def test_offloaded_blocks_may_be_on_the_disk(tmp_path):
    with jax.enable_x64(False):
        params = model_params()
        blocks = np.asarray(params["blocks"]["w"])
        file = np.memmap(tmp_path / "blocks", blocks.dtype, "w+", shape=blocks.shape)
        file[:] = blocks
        on_disk = params | {"blocks": params["blocks"] | {"w": file}}
        strategy = strategies.mezo(sigma=1e-2, learning_rate=1e-2)
        models = Offloaded(strategy, params, **MODEL), Offloaded(strategy, on_disk, **MODEL, copy=False)
        for i in range(2):
            a, b = (model.step(jax.random.key(i), jnp.arange(8)) for model in models)
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(models[0].params["blocks"]["w"], models[1].params["blocks"]["w"])
        assert np.abs(np.asarray(file) - blocks).max() > 0, "the file itself is updated"


@pytest.mark.parametrize("make", [lambda: strategies.zo_adamu(100), strategies.hizoo], ids=["zo_adamu", "hizoo"])
def test_a_step_with_state_like_the_parameters_copies_neither(make):
    """A few layers beside the parameters and the one tree that is kept of their size; a copy of either would be 1."""
    with jax.enable_x64(False):
        params = {"layers": jnp.zeros((24, 64, 64))}
        strategy = make()
        state = trees.strong(strategy.init(params, KEY[0]))

        def step(state, key):
            population = strategy.ask(state, key)
            return strategy.tell(state, population, jnp.arange(len(population), dtype=jnp.float32))

        memory = jax.jit(step, donate_argnums=0).lower(state, KEY[1]).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.5 * params["layers"].nbytes


def test_offloading_refuses_what_it_cannot_place():
    params = model_params()
    for wrong in ({"blocks": params["blocks"]}, params | {"blocks": [np.zeros((2, 3)), np.zeros((3, 3))]}):
        with pytest.raises(ValueError, match=r"(?s)expected.*got.*usual cause"):
            Offloaded(strategies.mezo(), wrong, **MODEL)


# ---- bad input ----


def test_probes_that_rounding_loses_are_refused():
    params = {"w": jnp.full((8, 8), 0.02, jnp.bfloat16), "norm": jnp.ones(8, jnp.bfloat16)}
    for make in (strategies.mezo, strategies.mezo_adam, strategies.zo_adamu, strategies.one_point):
        with pytest.raises(ValueError, match=r"(?s)0.00012.*bfloat16.*'w'.*sigma=5e-05"):
            make(sigma=5e-5).init(params, jax.random.key(0))
        make(sigma=1e-3).init(params, jax.random.key(0))  # the norms alone are too coarse: 8 of 72
    with pytest.raises(ValueError, match="even popsize"):
        strategies.mezo(3)
    with pytest.raises(ValueError, match="sigma > 0"):
        strategies.mezo(sigma=0.0)
    with pytest.raises(ValueError, match="T1 < T2 < T3"):
        strategies.zo_adamu(borders=(3, 2, 5))


# ---- what a convex loss, a short run and an unstacked model do not show ----


def test_hizoo_sees_curvature_without_its_sign():
    """At a saddle l+ + l- - 2 l is negative; H stays positive, for its root is the length of a probe."""
    strategy = strategies.hizoo(sigma=S, learning_rate=0.0, smoothing=0.5)
    state = begun(strategy)
    population, candidates = map_numpy(asked(strategy, state, jax.random.key(3)))
    z = (candidates[1] - candidates[2]) / (2 * S)
    new = told(strategy, state, population, jnp.array([1.0, 0.9, 0.8]))
    np.testing.assert_allclose(vector(new.hessian), 0.5 + 0.5 * 0.3 * z**2 / (2 * S**2), rtol=1e-6)


def test_subzero_has_orthonormal_bases():
    seed, (m, n), rank = (jax.random.key(1), jax.random.key(2)), (7, 5), 2
    left, v = (np.asarray(x) for x in subzero.subspace(seed, (m, n), rank, jnp.float64))
    np.testing.assert_allclose(v.T @ v, np.eye(rank), atol=1e-12)
    middle = np.asarray(subzero.noises.normals(seed[0], rank * rank, jnp.float64)).reshape(rank, rank)
    u = left @ np.linalg.inv(middle) * rank / np.sqrt(m * n)
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-9)


def test_the_correction_of_a_short_window_is_that_of_the_window():
    """Of two equal estimates the moments are these estimates, however many steps came before."""
    strategy = strategies.mezo_adam(window=2)
    update = strategy._update(jnp.int32(50), jnp.asarray(1.0))
    moved = update(jnp.zeros(3), lambda past: past, jnp.full((2, 3), 0.5))
    np.testing.assert_allclose(moved, -1.0, rtol=1e-6)


def test_decay_leaves_stacked_biases_and_scales_alone():
    stack = {"w": jnp.ones((3, 8, 4)), "b": jnp.ones((3, 4)), "scale": jnp.ones((3, 8))}
    pulled = probes.matrices({"layers": stack, "head": jnp.ones((8, 4)), "bias": jnp.ones(4)})
    assert pulled == {"layers": {"w": True, "b": False, "scale": False}, "head": True, "bias": False}
