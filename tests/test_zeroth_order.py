"""Zeroth-order strategies against NumPy re-statements of their equations, fed the same noise; their estimates' moments.

The letters of the checks are those of the list they come from: d moments, e subspaces, f replayed moments, k ZO-AdaMU,
l offloading. That the direction updated is the direction probed (b) and that probing leaves no trace (a) is a rule of
tests/test_contract.py, over the case table.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evoopt import noise, strategies, trees
from evoopt.checkpoint import digest

START = {"b": np.array([0.3, -1.0]), "w": np.array([[1.0, -0.5, 2.0], [0.25, 2.0, -1.5]])}
D = 8
TARGET = np.array([-0.7, 2.0, -1.0, 0.5, 3.0, 1.4, -2.2, 0.9])
CURVATURE = np.array([1.0, 3.0, 0.5, 2.0, 5.0, 0.7, 1.5, 2.5])
S = 0.05  # sigma


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
def told(strategy, state, population, values):
    return strategy.tell(state, population, values)


def map_numpy(pair):
    return pair[0], np.asarray(pair[1], np.float64)


def follow(strategy, twin, steps=12, lose=None, tolerance=1e-9):
    """`steps` of both, the twin given the candidates and their values; yields the state after each."""
    state = strategy.init(start(), jax.random.key(0))
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
    state = strategy.init(start(), jax.random.key(0))
    after = strategy.tell(state, strategy.ask(state, jax.random.key(1)), jnp.ones(2)).mean
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
    state = strategy.init(start(), jax.random.key(0))
    population = strategy.ask(state, jax.random.key(1))
    after = strategy.tell(state, population, jnp.array([jnp.nan, 1.0, 2.0, 3.0, 4.0]))
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
    state, steps = strategy.init(start(), jax.random.key(0)), []
    for key in jax.random.split(jax.random.key(1), 5):
        (population, candidates), before = map_numpy(asked(strategy, state, key)), vector(state.mean)
        z, g = pairs(candidates, loss(candidates))
        steps.append(g[0] * z[0])
        state = told(strategy, state, population, jnp.asarray(loss(candidates)))
    expected = before - 0.1 * 0.2 * (0.8 * steps[3] + steps[4])
    np.testing.assert_allclose(vector(state.mean), expected, rtol=1e-6)


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
    state = strategy.init(start(), jax.random.key(0))
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
    from evoopt.strategies.zo_adamu import adapted

    z1, z2, momentum = jax.random.normal(jax.random.key(0), (3, 50_000)) * jnp.array([[1.0], [1.0], [3.0]])
    last = strategies.zo_adamu(20_000).weights(jnp.asarray(20_000))
    ratio = np.abs(adapted(z1, z2, momentum, last))
    assert 1.6 < ratio.max() <= np.sqrt(0.1464466**2 / 0.01 + 0.8535534**2 / 0.99) < 1.70
    first = adapted(z1, z2, jnp.zeros(50_000), strategies.zo_adamu(20_000).weights(jnp.asarray(0)))
    np.testing.assert_allclose(first, np.sign(z1), atol=1e-3)


FUNCTIONS = {  # of the paper's plots; value reached from (1, -0.8) turned a little, about three times what was measured
    "|x|+|y|": (lambda x, y: abs(x) + abs(y), 0.02, 0.05),
    "|x+y|+|x-y|/10": (lambda x, y: abs(x + y) + abs(x - y) / 10, 0.02, 0.2),
    "(x+y)^2+(x-y)^2/10": (lambda x, y: (x + y) ** 2 + (x - y) ** 2 / 10, 0.01, 0.1),
    "|x|/10+|y|": (lambda x, y: abs(x) / 10 + abs(y), 0.02, 0.2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_adamu_converges_on_the_functions_of_the_paper(name):
    f, rate, aim = FUNCTIONS[name]
    strategy = strategies.zo_adamu(1500, learning_rate=rate)

    @jax.jit
    @jax.vmap
    def run(key):
        def step(state, key):
            population = strategy.ask(state, key)
            return strategy.tell(state, population, jax.vmap(lambda p: f(*p))(population.decoded())), None

        state = strategy.init(jnp.array([1.1, -0.8], jnp.float32), key)
        return f(*jax.lax.scan(step, state, jax.random.split(key, 1500))[0].mean)

    reached = np.asarray(run(jax.random.split(jax.random.key(2), 5)))
    assert np.median(reached) < aim, reached


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


# ---- d: moments of the estimates, over many keys ----

KEYS = jax.random.split(jax.random.key(7), 20_000)
SLOPE = np.array([1.0, -2.0, 0.5, 1.5, -0.7, 1.2, 0.3, -0.9])


def estimates(strategy, f, keys=KEYS):
    """Minus the step from START over the learning rate, for many keys: (keys, d)."""
    state = strategy.init(start(), jax.random.key(0))

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
