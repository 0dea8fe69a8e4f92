"""The covariance strategies: twins in NumPy, pycma's own state, evaluations to a target, restarts, and bad input."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import stopping, strategies
from evoopt.envs import functions
from evoopt.stopping import Stop
from evoopt.strategies import cma_es, sep_cma_es, xnes
from evoopt.strategies.covariance import recombination
from evoopt.wrappers import averaged, bipop, ipop

OPTIMUM = np.array([0.7, -1.3, 0.4, 1.9, -0.6])
MAKERS = {
    name: getattr(strategies, name)
    for name in ("amalgam", "cma_es", "cr_fm_nes", "lm_ma_es", "ma_es", "one_plus_one_es", "sep_cma_es", "xnes")
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def rotated_ellipsoid(d, seed=0, condition=1e6):
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    scales = condition ** (np.arange(d) / max(d - 1, 1))
    return lambda x: (scales * (x @ rotation.T) ** 2).sum(-1)


def generations(strategy, x0, f, n=30):
    """Generations under jit: the states and what was asked and answered."""
    ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell)
    state = strategy.init(jnp.asarray(x0), jax.random.key(0))
    out = []
    for key in jax.random.split(jax.random.key(1), n):
        population = ask(state, key)
        x = np.asarray(population.decoded())
        values = f(x)
        state = tell(state, population, jnp.asarray(values))
        genomes = population.genomes
        out.append((np.asarray(getattr(genomes, "z", genomes)), x, values, state))
    return out


def close(ours, theirs, rtol=1e-6):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


# --- twins: written from the papers, one candidate after the other


class Hansen:
    """CMA-ES of the tutorial's figure 6, with pycma's c_sigma, damping and h_sigma; sorted, looped, in C^(-1/2)."""

    def __init__(self, x0, sigma, n):
        d = len(x0)
        self.d, self.n, self.m, self.sigma = d, n, np.array(x0, float), sigma
        self.c, self.ps, self.pc, self.g = np.eye(d), np.zeros(d), np.zeros(d), 0
        raw = [math.log((n + 1) / 2) - math.log(i) for i in range(1, n + 1)]
        self.mu = sum(r > 0 for r in raw)
        plus, minus = raw[: self.mu], raw[self.mu :]
        mu_eff, mu_minus = sum(plus) ** 2 / sum(r * r for r in plus), sum(minus) ** 2 / sum(r * r for r in minus)
        self.mu_eff = mu_eff
        self.cs = min(0.5, (mu_eff + 2) / (d + mu_eff + 3))
        self.ds = 1 + 2 * max(0, max(1, 3 * (1 - 0.5 ** (d / 9))) * math.sqrt((mu_eff - 1) / (d + 1)) - 1) + self.cs
        self.cc = (4 + mu_eff / d) / (d + 4 + 2 * mu_eff / d)
        self.c1 = min(1, n / 6) * 2 / ((d + 1.3) ** 2 + mu_eff)
        self.cmu = min(1 - self.c1, 2 * (0.25 + mu_eff - 2 + 1 / mu_eff) / ((d + 2) ** 2 + mu_eff))
        alpha = min(1 + self.c1 / self.cmu, 1 + 2 * mu_minus / (mu_eff + 2), (1 - self.c1 - self.cmu) / (d * self.cmu))
        self.w = [r / sum(plus) for r in plus] + [alpha * r / -sum(minus) for r in minus]

    def tell(self, x, values):
        d, eigenvalues, b = self.d, *np.linalg.eigh(self.c)
        inverse_root = b @ np.diag(eigenvalues**-0.5) @ b.T
        y = [(x[i] - self.m) / self.sigma for i in np.argsort(values)]
        y_w = sum(w * yi for w, yi in zip(self.w[: self.mu], y, strict=False))
        self.m = self.m + self.sigma * y_w
        self.g += 1
        self.ps = (1 - self.cs) * self.ps + math.sqrt(self.cs * (2 - self.cs) * self.mu_eff) * inverse_root @ y_w
        h = (self.ps @ self.ps) / (1 - (1 - self.cs) ** (2 * self.g)) / d < 2 + 4 / (d + 1)
        self.pc = (1 - self.cc) * self.pc + h * math.sqrt(self.cc * (2 - self.cc) * self.mu_eff) * y_w
        total = np.zeros((d, d))
        for w, yi in zip(self.w, y, strict=True):
            if w < 0:
                w = w * d / np.linalg.norm(inverse_root @ yi) ** 2
            total += w * np.outer(yi, yi)
        keep = 1 + self.c1 * (1 - h) * self.cc * (2 - self.cc) - self.c1 - self.cmu * sum(self.w)
        self.c = keep * self.c + self.c1 * np.outer(self.pc, self.pc) + self.cmu * total
        chi = math.sqrt(2) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
        self.sigma *= math.exp(min(1, self.cs / self.ds * (np.linalg.norm(self.ps) / chi - 1)))


@pytest.mark.parametrize(("d", "n"), [(5, 8), (4, 30), (7, 5)])
def test_cma_es_equals_its_twin(x64, d, n):
    f = rotated_ellipsoid(d)
    twin = Hansen(np.ones(d), 0.5, n)
    for _, x, values, state in generations(cma_es(n, sigma=0.5), np.ones(d), f):
        twin.tell(x, values)
        for ours, theirs in ((state.mean, twin.m), (state.covariance, twin.c), (state.path_sigma, twin.ps)):
            close(ours, theirs)
        close(state.path_c, twin.pc)
        close(state.sigma, twin.sigma)


def test_cma_es_equals_pycma(x64, monkeypatch):
    """Mean, sigma, C and both paths of pycma fed the same samples; 30 generations."""
    cma = pytest.importorskip("cma")
    exact = lambda d: math.sqrt(2) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    monkeypatch.setattr(cma.utilities.math.Mh, "chiN", staticmethod(exact))  # pycma's is right to 5e-5
    d, n, f = 6, 9, rotated_ellipsoid(6, seed=2)
    es = cma.CMAEvolutionStrategy(np.ones(d), 0.5, {"popsize": n, "verbose": -9, "seed": 1})
    es.sm.C = np.eye(d)  # pycma starts with diagonal entries that differ by 1e-5
    es.sm.D, es.sm.B, es.sm._inverse_root_C = np.ones(d), np.eye(d), None
    for _, x, values, state in generations(cma_es(n, sigma=0.5), np.ones(d), f):
        es.ask()
        es.tell(list(x), list(values), check_points=False)  # else long steps are cut
        close(state.mean, es.mean)
        close(state.sigma, es.sigma)
        close(state.path_sigma, es.adapt_sigma.ps)
        close(state.path_c, es.pc)
        close(state.covariance, es.sm.C)


@pytest.mark.parametrize(("d", "n"), [(2, 6), (5, 8), (5, 200), (20, 12), (40, 1000), (3, 4)])
def test_rates_are_pycmas(x64, d, n):
    """Weights, learning rates and damping, large popsizes included."""
    cma = pytest.importorskip("cma")
    from evoopt.strategies.covariance.cma_es import rates

    options = {"popsize": n, "verbose": -9, "CMA_mirrors": 0}
    es = cma.CMAEvolutionStrategy(np.zeros(d), 1, options)
    es.adapt_sigma.initialize(es)
    ours = rates(recombination.logarithmic(jnp.arange(n, dtype=float), jnp.float64), d)
    close(ours.weights, np.asarray(es.sp.weights))
    their = es.sm.parameters(mueff=es.sp.weights.mueff, lam=n)
    for mine, theirs in (
        (ours.c_1, their["c1"]), (ours.c_mu, their["cmu"]), (ours.c_c, es.sp.cc),
        (ours.c_sigma, es.adapt_sigma.cs), (ours.d_sigma, es.adapt_sigma.damps),
    ):  # fmt: skip
        close(mine, theirs)


def test_sep_cma_es_equals_its_twin(x64):
    d, n = 5, 10
    scales = 10.0 ** np.arange(d)
    f = lambda x: (scales * (x - 0.3) ** 2).sum(-1)
    raw = [max(0, math.log((n + 1) / 2) - math.log(i)) for i in range(1, n + 1)]
    w = np.array(raw) / sum(raw)
    mu = 1 / (w**2).sum()
    cs, cc = (mu + 2) / (d + mu + 3), 4 / (d + 4)
    ds = 1 + 2 * max(0, math.sqrt((mu - 1) / (d + 1)) - 1) + cs
    ccov = 2 / (mu * (d + math.sqrt(2)) ** 2) + (1 - 1 / mu) * min(1, (2 * mu - 1) / ((d + 2) ** 2 + mu))
    ccov *= (d + 2) / 3
    m, sigma, c, ps, pc = np.ones(d), 0.5, np.ones(d), np.zeros(d), np.zeros(d)
    chi = math.sqrt(2) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    for g, (_, x, values, state) in enumerate(generations(sep_cma_es(n, sigma=0.5), np.ones(d), f)):
        y = (x[np.argsort(values)] - m) / sigma
        y_w = w @ y
        m = m + sigma * y_w
        ps = (1 - cs) * ps + math.sqrt(cs * (2 - cs) * mu) * y_w / np.sqrt(c)
        h = np.linalg.norm(ps) / math.sqrt(1 - (1 - cs) ** (2 * g + 2)) < (1.4 + 2 / (d + 1)) * chi
        pc = (1 - cc) * pc + h * math.sqrt(cc * (2 - cc) * mu) * y_w
        c = (1 - ccov) * c + ccov / mu * pc**2 + ccov * (1 - 1 / mu) * (w @ y**2)
        sigma *= math.exp(min(1, cs / ds * (np.linalg.norm(ps) / chi - 1)))
        for ours, theirs in ((state.mean, m), (state.variances, c), (state.path_sigma, ps), (state.sigma, sigma)):
            close(ours, theirs)


def test_xnes_equals_its_twin(x64):
    from scipy.linalg import expm

    d, n = 4, 12
    f = rotated_ellipsoid(d, condition=100)
    raw = [max(0, math.log(n / 2 + 1) - math.log(i)) for i in range(1, n + 1)]
    u = np.array(raw) / sum(raw) - 1 / n
    eta = (9 + 3 * math.log(d)) / (5 * d * math.sqrt(d))
    m, sigma, b = np.ones(d), 0.5, np.eye(d)
    for s, _, values, state in generations(xnes(n, sigma=0.5), np.ones(d), f):
        s = s[np.argsort(values)]
        g_delta = sum(ui * si for ui, si in zip(u, s, strict=True))
        g_m = sum(ui * (np.outer(si, si) - np.eye(d)) for ui, si in zip(u, s, strict=True))
        g_sigma = np.trace(g_m) / d
        m = m + sigma * b @ g_delta
        sigma *= math.exp(eta / 2 * g_sigma)
        b = b @ expm(eta / 2 * (g_m - g_sigma * np.eye(d)))
        for ours, theirs in ((state.mean, m), (state.sigma, sigma), (state.matrix, b)):
            close(ours, theirs)


def test_ma_es_equals_its_twin(x64):
    d, n = 5, 10
    f = rotated_ellipsoid(d, condition=1e4)
    raw = [max(0, math.log((n + 1) / 2) - math.log(i)) for i in range(1, n + 1)]
    w = np.array(raw) / sum(raw)
    mu = 1 / (w**2).sum()
    cs, c1 = (mu + 2) / (mu + d + 5), 2 / ((d + 1.3) ** 2 + mu)
    cw = min(1 - c1, 2 * (mu + 1 / mu - 2) / ((d + 2) ** 2 + mu))
    ds = 1 + cs + 2 * max(0, math.sqrt((mu - 1) / (d + 1)) - 1)
    y, sigma, m, s, eye = np.ones(d), 0.5, np.eye(d), np.zeros(d), np.eye(d)
    chi = math.sqrt(2) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    for z, _, values, state in generations(strategies.ma_es(n, sigma=0.5), np.ones(d), f):
        z = z[np.argsort(values)]
        y = y + sigma * m @ (w @ z)
        s = (1 - cs) * s + math.sqrt(mu * cs * (2 - cs)) * (w @ z)
        zz = sum(wi * np.outer(zi, zi) for wi, zi in zip(w, z, strict=True))
        m = m @ (eye + c1 / 2 * (np.outer(s, s) - eye) + cw / 2 * (zz - eye))
        sigma *= math.exp(min(1, cs / ds * (np.linalg.norm(s) / chi - 1)))
        for ours, theirs in ((state.mean, y), (state.sigma, sigma), (state.matrix, m)):
            close(ours, theirs)


def test_cr_fm_nes_equals_its_twin(x64):
    """With the paper's weights, learning rates and natural gradient written out for one sample after the other."""
    from scipy.optimize import brentq

    d, n = 8, 12
    f = lambda x: rotated_ellipsoid(d, condition=100)(x - 3)
    a = brentq(lambda a: (1 + a * a) * math.exp(a * a / 2) / 0.24 - 10 - d, 0, 10)
    alpha = a * min(1, math.sqrt(n / d))
    hat = np.array([max(0, math.log(n / 2 + 1) - math.log(i)) for i in range(1, n + 1)])
    w_rank = hat / hat.sum() - 1 / n
    mu = 1 / ((w_rank + 1 / n) ** 2).sum()
    cs, cc = (mu + 2) / (d + mu + 5), (4 + mu / d) / (d + 4 + 2 * mu / d)
    c1 = 2 / ((d + 1.3) ** 2 + mu) * (d - 5) / 6
    eta_b = math.tanh((min(0.02 * n, 3 * math.log(d)) + 5) / (0.23 * d + 25))
    chi = math.sqrt(2) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    strategy = strategies.cr_fm_nes(n, sigma=0.3)
    start = strategy.init(jnp.ones(d), jax.random.key(0))
    m, sigma, scale, v, ps, pc = np.ones(d), 0.3, np.ones(d), np.asarray(start.v), np.zeros(d), np.zeros(d)
    phases = set()
    for z, x, values, state in generations(strategy, np.ones(d), f):
        order = np.argsort(values)
        z, x = z[order], x[order]
        ps = (1 - cs) * ps + math.sqrt(cs * (2 - cs) * mu) * w_rank @ z
        norm = np.linalg.norm(ps)
        far = hat * np.exp(alpha * np.linalg.norm(z, axis=1))
        w = far / far.sum() - 1 / n if norm >= chi else w_rank
        phases.add(bool(norm >= chi))
        slow = math.tanh((0.024 * n + 0.7 * d + 20) / (d + 12))
        fast = 2 * math.tanh((0.025 * n + 0.75 * d + 10) / (d + 4))
        eta = 1 if norm >= chi else slow if norm >= 0.1 * chi else fast
        y = [(xi - m) / sigma / scale for xi in x]
        shift = w @ (x - m)
        pc = (1 - cc) * pc + math.sqrt(cc * (2 - cc) * mu) * shift / sigma
        m = m + shift
        v2, bar = v @ v, v / np.linalg.norm(v)
        g = 1 + v2
        al = min(1, math.sqrt(v2**2 + (2 * g - math.sqrt(g)) / (bar**2).max()) / (2 + v2))
        b = -(1 - al**2) * v2**2 / g + 2 * al**2
        h = 2 - (b + 2 * al**2) * bar**2
        add_v, add_d = np.zeros(d), np.zeros(d)
        for yi, wi in [*zip(y, eta_b * w, strict=True), (pc / scale, c1)]:
            t = yi * (yi @ bar) - bar / 2 * ((yi @ bar) ** 2 + g)
            s = yi**2 - v2 / g * (yi @ bar) * yi * bar - 1
            s = s - al / g * ((2 + v2) * bar * t - v2 * (bar @ t) * bar**2)
            s = s / h - b / (1 + b * bar**2 @ (bar**2 / h)) * (s @ (bar**2 / h)) * bar**2 / h
            t = t - al * ((2 + v2) * bar * s - (s @ bar**2) * bar)
            add_v, add_d = add_v + wi * t, add_d + wi * s
        root = lambda scale, v: np.exp(np.log(scale).mean() + math.log(1 + v @ v) / (2 * d))
        v, scale = v + add_v / math.sqrt(v2), scale * (1 + add_d)
        gs = w @ (z**2 - 1).sum(axis=1) / d
        sigma *= math.exp(eta / 2 * gs)
        scale = scale / root(scale, v)
        for ours, theirs in ((state.mean, m), (state.sigma, sigma), (state.v, v), (state.scales, scale)):
            close(ours, theirs)
    assert phases == {True, False}


def test_lm_ma_es_equals_its_twin(x64):
    """Loshchilov et al. 2019, algorithm 1; d is large enough for its constants."""
    d, n, memory = 30, 6, 4
    f = rotated_ellipsoid(d, condition=100)
    raw = [max(0, math.log((n + 1) / 2) - math.log(i)) for i in range(1, n + 1)]
    w = np.array(raw) / sum(raw)
    mu, cs = 1 / (w**2).sum(), 2 * n / d
    cd, cc = [1 / (1.5**i * d) for i in range(memory)], [n / (4**i * d) for i in range(memory)]
    y, sigma, path, m = np.ones(d), 0.5, np.zeros(d), np.zeros((memory, d))
    strategy = strategies.lm_ma_es(n, sigma=0.5, memory=memory)
    for t, (z, x, values, state) in enumerate(generations(strategy, np.ones(d), f)):
        step = z.copy()
        for k in range(n):
            for i in range(min(t, memory)):
                step[k] = (1 - cd[i]) * step[k] + cd[i] * m[i] * (m[i] @ step[k])
        close(x, y + sigma * step)
        best = np.argsort(values)
        z_w = w @ z[best]
        y = y + sigma * w @ step[best]
        path = (1 - cs) * path + math.sqrt(mu * cs * (2 - cs)) * z_w
        for i in range(memory):
            m[i] = (1 - cc[i]) * m[i] + math.sqrt(mu * cc[i] * (2 - cc[i])) * z_w
        sigma *= math.exp(cs / 2 * (path @ path / d - 1))
        for ours, theirs in ((state.mean, y), (state.sigma, sigma), (state.directions, m), (state.path, path)):
            close(ours, theirs)


def test_one_plus_one_es_equals_its_twin(x64):
    """Auger 2009: 1.5 after a success, its -1/4th power after a failure."""
    d, f = 4, rotated_ellipsoid(4, condition=10)
    x, value, sigma, successes = np.ones(d), f(np.ones(d)), 0.5, 0
    out = generations(strategies.one_plus_one_es(sigma=0.5), np.ones(d), f, 60)
    close(out[0][1][0], x)  # the start itself is asked first
    for z, child, values, state in out[1:]:
        close(child[0], x + sigma * z[0])
        success = values[0] <= value
        sigma *= 1.5 if success else 1.5**-0.25
        x, value = (child[0], values[0]) if success else (x, value)
        successes += success
        for ours, theirs in ((state.parent, x), (state.parent_value, value), (state.sigma, sigma)):
            close(ours, theirs)
    assert 5 < successes < 50


def test_amalgam_equals_its_twin(x64):
    """Bosman et al. 2013 with the elite kept apart; on a bowl with a flat bottom, so that improvements end."""
    d, n = 3, 20
    f = lambda x: np.maximum((np.array([1.0, 3.0, 9.0]) * (x - 0.3) ** 2).sum(-1), 0.05)
    mean, sigma, c, shift, still = np.ones(d), np.full(d, 0.5), 1.0, np.zeros(d), 0
    elite, elite_value, phases = None, np.inf, set()
    for _, x, values, state in generations(strategies.amalgam(n, sigma=0.5), np.ones(d), f, 60):
        every = [*zip(values, x, strict=True), *([] if elite is None else [(elite_value, elite)])]
        every.sort(key=lambda pair: pair[0])  # stable: of equals the elite comes last
        chosen = np.array([xi for _, xi in every[: int(0.35 * len(every))]])
        better = x[values < elite_value]
        if elite is not None:
            if len(better):
                ratio = (np.abs(better.mean(axis=0) - mean) / (math.sqrt(c) * sigma)).max()
                c, still = max(c, 1) * (1 / 0.9 if ratio > 1 else 1), 0
            else:
                still += c <= 1
                if c > 1 or still >= 25 + d:
                    c *= 0.9
                if c < 1 and still < 25 + d:
                    c = 1.0
        phases.add(float(np.sign(c - 1)))
        new = every[0][1] if c < 1 else chosen.mean(axis=0)
        if values.min() < elite_value:
            elite, elite_value = x[values.argmin()], values.min()
        shift, mean = new - mean, new
        sigma = np.sqrt(((chosen - mean) ** 2).mean(axis=0))
        for ours, theirs in (
            (state.mean, mean), (state.sigma, sigma), (state.multiplier, c), (state.shift, shift),
            (state.elite, elite), (state.elite_value, elite_value),
        ):  # fmt: skip
            close(ours, theirs)
        assert int(state.still) == still
    assert phases == {-1.0, 0.0, 1.0}


def test_amalgam_anticipates_the_mean_shift(x64):
    """Half of the selected ones are moved by twice the last shift, times the multiplier."""
    strategy, d, n = strategies.amalgam(20, sigma=0.5), 3, 20
    state = strategy.init(jnp.zeros(d), jax.random.key(0))
    moved = state._replace(shift=jnp.array([1.0, -2.0, 3.0]), multiplier=jnp.asarray(1.5))
    still = moved._replace(shift=jnp.zeros(d))
    a, b = (np.asarray(strategy.ask(s, jax.random.key(1)).decoded()) for s in (moved, still))
    close(a - b, np.where(np.arange(n)[:, None] < 3, 2 * 1.5 * np.array([1.0, -2.0, 3.0]), 0))
    assert 0.4 < b.std() / math.sqrt(1.5) < 0.6


def test_amalgam_grows_on_a_slope():
    """Adaptive variance scaling: improvements beyond one standard deviation widen the search, so it runs downhill."""
    strategy = strategies.amalgam(30, sigma=0.1)
    out = generations(strategy, np.zeros(4, np.float32), lambda x: -x.sum(-1), 30)
    assert float(out[-1][-1].multiplier) > 3
    assert float(out[-1][-1].mean.sum()) > 30


# --- evaluations to a target

SEEDS = 16
# Evaluations to 1e-8 from (-1, ..., -1) with sigma 1 in 5 dimensions: bounds on the median of 16 seeds, and how many of
# them must get there. Bounds are the measured median -+ 15-20 % (its standard error is below 5 %); CMA-ES's agree with
# the published 650-750 on BBOB's sphere and 1500-1900 on its ellipsoids and Rosenbrock. CR-FM-NES's author's program
# (crfmnes 1.0.0) needs 472, 1296 and 2584 on the three functions in its row, ours 508, 1284 and 2500.
SPHERE, ELLIPSOID, ROTATED, ROSENBROCK, TILTED = range(5)
ACCEPTANCE = {
    "amalgam": (800, {SPHERE: (640, 930, 16), ELLIPSOID: (980, 1420, 16), TILTED: (1480, 2200, 15)}),
    "cma_es": (400, {SPHERE: (560, 770, 16), ROTATED: (1220, 1640, 16), ROSENBROCK: (1520, 2080, 15)}),
    "cr_fm_nes": (600, {SPHERE: (440, 630, 16), ELLIPSOID: (1050, 1460, 16), ROSENBROCK: (2050, 2900, 14)}),
    "lm_ma_es": (1200, {SPHERE: (730, 1020, 16), TILTED: (1380, 1950, 16), ROSENBROCK: (3700, 5500, 13)}),
    "ma_es": (500, {SPHERE: (600, 820, 16), ROTATED: (1590, 2140, 16), ROSENBROCK: (1750, 2420, 14)}),
    # no covariance: what is ill-conditioned stays unsolved, here as published
    "one_plus_one_es": (2500, {SPHERE: (300, 405, 16), TILTED: (1300, 1850, 16), ELLIPSOID: (math.inf, math.inf, 0)}),
    "sep_cma_es": (500, {SPHERE: (520, 710, 16), ELLIPSOID: (1130, 1530, 16), TILTED: (1100, 1520, 16)}),
    "xnes": (700, {SPHERE: (1300, 1730, 16), ROTATED: (2000, 2700, 16), ROSENBROCK: (2300, 3300, 13)}),
}


def evaluations(strategy, which, most, target=1e-8):
    """Evaluations until the target, inf where it was missed, of 16 seeds on each of the functions: (functions, 16)."""
    d, optimum = len(OPTIMUM), jnp.asarray(OPTIMUM)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(3).normal(size=(d, d)))[0])
    tilted = lambda x: jnp.sum(jnp.asarray([1.0, 3.0, 9.0, 27.0, 81.0]) * (rotation @ (x - optimum)) ** 2)
    all_functions = [
        functions.shifted(functions.sphere, optimum), functions.shifted(functions.ellipsoid, optimum),
        lambda x: functions.ellipsoid(rotation @ (x - optimum)), functions.rosenbrock, tilted,
    ]  # fmt: skip
    chosen = [all_functions[i] for i in which]

    def run(key, function):
        key_init, key_run = jax.random.split(key)
        state = strategy.init(jnp.full(d, -1.0), key_init)

        def step(carry):
            state, i, best = carry
            population = strategy.ask(state, jax.random.fold_in(key_run, i))
            f = lambda genome: jnp.stack([f(population.decode(genome)) for f in chosen])[function]
            values = jax.vmap(f)(population.genomes)
            return strategy.tell(state, population, values), i + 1, jnp.minimum(best, values.min())

        going = lambda carry: (carry[1] < most) & (carry[2] > target)
        _, i, best = jax.lax.while_loop(going, step, (state, jnp.int32(0), jnp.asarray(jnp.inf)))
        return jnp.where(best <= target, i.astype(float), jnp.inf)

    n = len(
        jax.eval_shape(strategy.ask, jax.eval_shape(strategy.init, jnp.zeros(d), jax.random.key(0)), jax.random.key(0))
    )
    keys = jax.random.split(jax.random.key(7), SEEDS)
    runs = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))(keys, jnp.arange(len(chosen)))
    return np.asarray(runs) * n


@pytest.mark.parametrize("name", ACCEPTANCE)
def test_evaluations_to_a_target(x64, name):
    most, rows = ACCEPTANCE[name]
    found = evaluations(MAKERS[name](sigma=1.0), list(rows), most)
    for (low, high, solved), taken in zip(rows.values(), found, strict=True):
        assert np.isfinite(taken).sum() >= solved
        assert low <= np.median(taken) <= high, (np.median(taken), np.sort(taken))


# --- properties


def states(name, popsize=None, d=5, x0=None):
    strategy = MAKERS[name](sigma=0.5) if name == "one_plus_one_es" else MAKERS[name](popsize, sigma=0.5)
    state = strategy.init(jnp.ones(d) if x0 is None else x0, jax.random.key(0))
    ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell)
    for key in jax.random.split(jax.random.key(1), 5):  # into the search, where nothing is the identity any more
        population = ask(state, key)
        state = tell(state, population, jax.vmap(functions.ellipsoid)(population.decoded()))
    return strategy, state, ask, tell


def same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "one_plus_one_es"])
def test_order_missing_answers_and_bad_values(name):
    """Candidates may come in any order, be lost, or be bad: the state stays finite, and the same where it should."""
    _, state, ask, tell = states(name, 12)
    population = ask(state, jax.random.key(5))
    values = jax.vmap(functions.ellipsoid)(population.decoded())
    new = tell(state, population, values)
    # the order of the candidates says nothing
    order = jnp.asarray(np.random.default_rng(0).permutation(12))
    same(tell(state, population[order], values[order]), new, rtol=2e-4, atol=1e-5)
    # ranks, not values; +inf is the worst
    if name != "amalgam":  # which compares values with its elite's
        same(tell(state, population, jnp.exp(values / values.max())), new, rtol=0)
    worst = values.at[values.argmax()].set(jnp.inf)
    told = tell(state, population, worst)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(told))
    # no answer, in three ways: the same bits
    lost = values.at[3].set(jnp.nan)
    same(tell(state, population, lost), tell(state, population, values.at[3].set(-jnp.inf)), rtol=0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tell(state, population, lost)))
    nothing = tell(state, population, jnp.full(12, jnp.nan))
    assert int(nothing.unanswered) == 1
    same(nothing._replace(unanswered=state.unanswered), state, rtol=0)
    equal = tell(state, population, jnp.ones(12))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(equal))
    one = tell(state, population, jnp.full(12, jnp.nan).at[4].set(1.0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(one))


@pytest.mark.parametrize("name", ["cma_es", "lm_ma_es", "xnes"])
def test_unanswered_candidates_count_as_a_smaller_population(name):
    """12 candidates of which the last four are lost are 8 candidates: weights and learning rates are made from m."""
    _, state, ask, tell = states(name, 12)
    strategy = dataclasses.replace(MAKERS[name](sigma=0.5), popsize=8)
    key = jax.random.key(5)
    population, smaller = ask(state, key), strategy.ask(state, key)
    rows = jax.tree.map(lambda g: g[:8], population.genomes)
    same(rows, smaller.genomes, rtol=1e-5, atol=1e-6)
    values = jax.vmap(functions.ellipsoid)(population.decoded())
    whole = tell(state, population, values.at[8:].set(jnp.nan))
    same(whole, jax.jit(strategy.tell)(state, smaller, values[:8]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("d", [1, 3])
def test_one_dimension_and_trees(name, d):
    params = {"b": jnp.ones((), jnp.bfloat16), "w": jnp.ones(d - 1)} if d > 1 else {"b": jnp.ones(())}
    strategy = MAKERS[name](sigma=0.5)
    f = lambda p: sum(jnp.sum((x.astype(jnp.float32) - 0.25) ** 2) for x in jax.tree.leaves(p))

    @jax.jit
    def search(state):
        def step(state, key):
            population = strategy.ask(state, key)
            return strategy.tell(
                state, population, jax.vmap(lambda g: f(population.decode(g)))(population.genomes)
            ), None

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(2), 150))[0]

    state = strategy.init(params, jax.random.key(0))
    end = search(state)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, end)
    best = strategy.recommend(end)
    assert jax.tree.structure(best) == jax.tree.structure(params)
    assert f(best) < 1e-3


@pytest.mark.parametrize("name", MAKERS)
def test_float32_survives_convergence(name):
    """5000 generations on spheres at 0 and at 3: the first underflows, the second ends in rounding."""
    strategy = MAKERS[name](sigma=0.5)

    def search(center):
        state = strategy.init(jnp.full(5, center + 1.0), jax.random.key(0))

        def step(state, key):
            population = strategy.ask(state, key)
            values = jax.vmap(lambda g: jnp.sum((population.decode(g) - center) ** 2))(population.genomes)
            return strategy.tell(state, population, values), values.min()

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 5000))

    state, best = jax.jit(jax.vmap(search))(jnp.array([0.0, 3.0]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert (best[:, -1] < 1e-9).all()
    assert (state.sigma > 0).all()
    if name == "cma_es":
        assert (state.stalled > 100).all()


def test_popsize_large_against_d():
    """LM-MA-ES's constants of line 2 leave [0, 2] when popsize > d; nothing may become NaN."""
    for name in ("lm_ma_es", "cma_es"):
        _, state, ask, tell = states(name, 64, d=3)
        for key in jax.random.split(jax.random.key(9), 5):
            population = ask(state, key)
            state = tell(state, population, jax.vmap(functions.ellipsoid)(population.decoded()))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state)), name


def test_vmap_over_runs_is_each_run_alone(x64):
    strategy = cma_es(8, sigma=0.5)
    f = lambda x: functions.rosenbrock(x)

    def run(key):
        state = strategy.init(jnp.zeros(4), key)

        def step(state, key):
            population = strategy.ask(state, key)
            return strategy.tell(
                state, population, jax.vmap(lambda g: f(population.decode(g)))(population.genomes)
            ), None

        return jax.lax.scan(step, state, jax.random.split(key, 20))[0]

    keys = jax.random.split(jax.random.key(3), 3)
    together, alone = jax.jit(jax.vmap(run))(keys), jax.jit(run)(keys[1])
    close(together.mean[1], np.asarray(alone.mean), 1e-8)
    close(together.covariance[1], np.asarray(alone.covariance), 1e-8)


def test_decomposition_waits_at_the_tutorials_lag():
    """At d = 200 with few candidates B stays for several generations; C moves in each."""
    strategy = cma_es(6, sigma=0.5)
    state = strategy.init(jnp.ones(200), jax.random.key(0))
    ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell)
    changes = []
    for key in jax.random.split(jax.random.key(1), 12):
        population = ask(state, key)
        new = tell(state, population, jax.vmap(functions.ellipsoid)(population.decoded()))
        changes.append(bool((new.axes != state.axes).any()))
        assert (new.covariance != state.covariance).any()
        state = new
    from evoopt.strategies.covariance.cma_es import rates

    r = rates(recombination.logarithmic(jnp.arange(6.0), jnp.float32), 200)
    gap = int(max(1, math.floor(1 / (10 * 200 * float(r.c_1 + r.c_mu)))))
    assert gap > 1
    assert changes == [(g + 1) % gap == 0 for g in range(12)]


def test_generations_without_information_are_counted():
    """All values alike, or a step of 0.2 standard deviations that rounding swallows at every coordinate."""
    from evoopt.strategies.covariance.cma_es import stalled

    strategy = cma_es(6, sigma=1e-3)
    old = strategy.init(jnp.ones(4), jax.random.key(0))._replace(stalled=jnp.int32(7))
    step = lambda std: old._replace(covariance=old.covariance * std**2)  # 2e-4 std against an ulp of 1.2e-7 at 1
    values, flat = jnp.arange(6.0), jnp.ones(6).at[2].set(jnp.nan)
    assert [int(stalled(old, step(std), values)) for std in (1.0, 1e-2, 1e-4)] == [0, 0, 8]
    assert int(stalled(old, step(1.0), flat)) == 8


def test_cr_fm_nes_starts_with_v_of_length_one():
    """v from N(0, I / d)."""
    strategy, keys = strategies.cr_fm_nes(8), jax.random.split(jax.random.key(0), 64)
    v = jax.jit(jax.vmap(lambda key: strategy.init(jnp.zeros(40), key).v))(keys)
    assert 0.9 < float((v**2).sum(axis=1).mean()) < 1.1


def test_when_skips_under_vmap():
    calls = []

    def f(x):
        jax.debug.callback(lambda: calls.append(1))
        return x + 1

    go = jax.jit(jax.vmap(lambda p, x: recombination.when(p, f, x)))
    np.testing.assert_array_equal(go(jnp.array([False, False]), jnp.zeros(2)), [0, 0])
    jax.effects_barrier()
    assert not calls
    np.testing.assert_array_equal(go(jnp.array([True, False]), jnp.zeros(2)), [1, 0])
    jax.effects_barrier()
    assert calls


# --- restarts


def restarted(strategy, f, generations, x0=None, seed=1):
    x0 = jnp.full(3, 2.0) if x0 is None else x0

    @jax.jit
    def search(state):
        def step(state, key):
            population = strategy.ask(state, key)
            new = strategy.tell(state, population, population.map(f, batch_size=len(population)))
            return new, (new.popsize, new.restarts, new.reason)

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(seed), generations))

    return search(strategy.init(x0, jax.random.key(0)))


def test_ipop_doubles_and_counts_only_active_candidates():
    state, (popsize, restarts, _) = restarted(ipop(cma_es(32), 4), lambda x: jnp.sum((x - 1) ** 2), 600)
    popsize, restarts = np.asarray(popsize), np.asarray(restarts)
    for r in range(restarts.max() + 1):
        assert set(popsize[restarts == r]) == {min(4 * 2**r, 32)}
    before = np.r_[4, popsize[:-1]]
    assert int(ipop(cma_es(32), 4).evaluations(state)) == before.sum()
    assert int(state.reasons.sum()) == restarts[-1] > 3
    assert float(state.best_value) < 1e-10
    np.testing.assert_allclose(state.best, 1, atol=1e-4)


def test_inactive_rows_change_nothing():
    """A population of 32 of which 8 are active is a population of 8."""
    f = lambda x: functions.rosenbrock(x)
    small, _ = restarted(ipop(cma_es(8), 8), f, 40)
    padded, _ = restarted(ipop(cma_es(32), 8), f, 40)
    np.testing.assert_allclose(padded.search.mean, small.search.mean, rtol=1e-3, atol=1e-4)
    assert int(padded.evaluations) == int(small.evaluations) == 320


def test_inactive_micro_batches_are_not_evaluated():
    calls = []

    def f(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(x**2)

    strategy = ipop(cma_es(32), 8)
    population = strategy.ask(strategy.init(jnp.ones(3), jax.random.key(0)), jax.random.key(1))
    values = jax.jit(lambda p: p.map(f))(population)
    jax.effects_barrier()
    assert len(calls) == 8
    assert np.isfinite(values).tolist() == [True] * 8 + [False] * 24


def test_bipop_splits_evaluations():
    f = lambda x: jnp.sum((x - 1) ** 2 + 20 * jnp.sin(jnp.pi * (x - 1)) ** 2)
    state, (popsize, _, _) = restarted(bipop(cma_es(64), 6), f, 3000)
    small, large = int(state.evaluations_small), int(state.evaluations_large)
    assert int(state.restarts) > 5
    assert 0.3 < small / large < 3
    assert set(np.asarray(popsize).tolist()) - {6, 12, 24, 48, 64}  # small runs have sizes in between


STOPS = [  # the objective, tolerances, and the stop they must lead to
    (lambda x: 0.0 * x.sum(), {"tolfun": 0.0, "tolfunhist": 0.0}, Stop.TOLFLATFITNESS),
    (lambda x: jnp.sum((x - 1) ** 2), {"tolfun": 1e-3}, Stop.TOLFUN),
    (lambda x: jnp.sum((x - 1) ** 2), {"tolfunhist": 1e-2}, Stop.TOLFUNHIST),
    (lambda x: jnp.sum((x - 1) ** 2), {"tolx": 1e-2}, Stop.TOLX),
    (lambda x: -jnp.sum(x), {}, Stop.TOLFACUPX),
    (lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1.0, 1e3, 1e6])), {"tolconditioncov": 1e3}, Stop.TOLCONDITIONCOV),
    (lambda x: jnp.sum((x - 1) ** 2), {"tolfun": 0.0, "tolfunhist": 0.0}, Stop.NOEFFECTAXIS),
]


def test_stops_are_named():
    """All in one vmap: tolerances are leaves."""
    names = ("tolfun", "tolfunhist", "tolx", "tolconditioncov")
    default = ipop(cma_es(8), 8)
    options = {name: jnp.array([o.get(name, getattr(default, name)) for _, o, _ in STOPS]) for name in names}

    def search(which, options):
        strategy = dataclasses.replace(default, **options)
        f = lambda x: jnp.stack([f(x) for f, _, _ in STOPS])[which]
        return restarted(strategy, f, 400)[0].reasons

    reasons = jax.jit(jax.vmap(search))(jnp.arange(len(STOPS)), options)
    for (_, _, expected), found in zip(STOPS, reasons, strict=True):
        assert found[expected] > 0, (expected.name, [Stop(i).name for i in np.flatnonzero(found)])


def test_the_other_stops_are_named_too():
    """Those that take long to come about, each from a state in which nothing else is amiss."""
    strategy = ipop(cma_es(8, sigma=0.5), 8)
    state = strategy.init(jnp.ones(3), jax.random.key(0))
    watch = state.watch
    watch = watch._replace(
        generation=jnp.int32(200), anchored=jnp.int32(199), spread=jnp.float32(1),
        recent_best=jnp.arange(watch.recent_best.shape[0], dtype=jnp.float32), first_median=jnp.float32(9),
        least_median=jnp.float32(0),
    )  # fmt: skip
    search = state.search
    creeping = search._replace(
        sigma=jnp.float32(1e15), covariance=1e-30 * search.covariance, lengths=1e-15 * search.lengths
    )
    for stop, (seen, at, stops) in {
        Stop.NONE: (watch, search, strategy.stops),
        Stop.TOLSTAGNATION: (watch._replace(stagnated=jnp.asarray(True)), search, strategy.stops),
        Stop.TOLXSTAGNATION: (watch._replace(anchored=jnp.int32(159)), search, strategy.stops),
        Stop.TOLUPSIGMA: (watch, creeping, strategy.stops),
        Stop.NOEFFECTCOORD: (watch, search._replace(mean=jnp.array([1.0, 1e9, 1.0])), strategy.stops),
        Stop.TOLFUNREL: (watch, search, stopping.Stops(tolfunrel=0.2)),
    }.items():
        width = strategy.strategy.dispersion(at, seen.generation)
        assert Stop(int(stopping.first(stopping.met(seen, width, 3, jnp.int32(8), stops)))) is stop
    ending = state._replace(limit=jnp.int32(1))
    _, reason = strategy._observe(ending, strategy.ask(ending, jax.random.key(1)), jnp.arange(8.0))
    assert Stop(int(reason)) is Stop.MAXITER


def test_restarts_of_a_strategy_without_dispersion():
    state, _ = restarted(ipop(strategies.snes(16), 8), lambda x: jnp.sum((x - 1) ** 2), 400)
    assert int(state.restarts) > 0
    assert float(state.best_value) < 1e-8


def test_restarts_start_anew():
    start = lambda key: jax.random.uniform(key, (3,), minval=-4, maxval=4)
    state, _ = restarted(ipop(cma_es(16), 8, start=start), lambda x: 0.0 * x.sum(), 20)
    assert int(state.restarts) > 3
    assert float(jnp.abs(state.search.mean - 2).max()) > 0.5


# --- bad input


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_sigma_must_be_positive(name, sigma):
    with pytest.raises(ValueError, match="expected sigma > 0") as caught:
        MAKERS[name](sigma=sigma)
    assert "usual cause" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "one_plus_one_es"])
def test_popsize_too_small(name):
    with pytest.raises(ValueError, match="popsize of at least"):
        MAKERS[name](1)


def test_restarts_bad_input():
    with pytest.raises(ValueError, match="popsize of at least 8"):
        ipop(cma_es(4), 8).init(jnp.ones(3), jax.random.key(0))
    with pytest.raises(TypeError, match="field sigma"):
        ipop(averaged(cma_es(16)))
    with pytest.raises(ValueError, match="factor >= 1"):
        ipop(cma_es(16), 8, factor=0.5)
