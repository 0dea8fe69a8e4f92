"""Population strategies against NumPy programs from the papers' equations, one candidate after the other.

The same keys give both the same random numbers; after each of 30 generations both must hold the same population.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import noise, strategies
from evoopt.strategies.populations import differential_evolution as de
from evoopt.strategies.populations import variation

D, N, STEPS = 5, 12, 30
OPTIMUM = np.array([0.6, -0.8, 1.1, 0.3, -0.5])
BOX = {"lower": -1.2, "upper": 1.5}  # narrow, so that it is left often


def objective(x):
    return ((x - OPTIMUM) ** 2 * [1.0, 3.0, 0.5, 2.0, 5.0]).sum(axis=-1) + 0.3 * np.abs(x[..., 0] * x[..., 1])


def uniforms(key, *shape):
    return np.asarray(variation.uniforms(key, shape, jnp.float64))


def integers(key, shape, size):
    return np.asarray(variation.integers(key, shape, size))


def normals(key, *shape):
    return np.asarray(variation.gaussians(key, shape, jnp.float64))


def without(n, *taken):
    return [j for j in range(n) if j not in taken]


def midpoint(v, parent):
    low, high = BOX["lower"], BOX["upper"]
    return np.where(v < low, (low + parent) / 2, np.where(v > high, (high + parent) / 2, v))


def generations(strategy, x0=None, box=False):
    """Yields the state before, the key, the candidates, their values, and the state after each generation.

    After each, the best candidate so far must be what is recommended.
    """
    least = np.inf
    state = jax.jit(strategy.init)(jnp.full(D, 0.25) if x0 is None else x0, jax.random.key(3))
    ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell)
    for key in jax.random.split(jax.random.key(4), STEPS):
        population = ask(state, key)
        x = np.array(population.decoded())
        if box:
            assert (x >= BOX["lower"]).all()
            assert (x <= BOX["upper"]).all()
        new = tell(state, population, jnp.asarray(objective(x)))
        least = min(least, objective(x)[: strategy.popsize].min())  # a swarm probes beside its particles
        close(objective(np.array(strategy.recommend(new))), least)
        yield state, key, x, objective(x), new
        state = new


def close(ours, twin):
    np.testing.assert_allclose(ours, twin, rtol=1e-6, atol=1e-12)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


MUTATIONS = {
    "rand_1": lambda x, i, best, a, b, c, f: x[a] + f * (x[b] - x[c]),
    "best_1": lambda x, i, best, a, b, c, f: best + f * (x[a] - x[b]),
    "current_to_best_1": lambda x, i, best, a, b, c, f: x[i] + f * (best - x[i]) + f * (x[a] - x[b]),
}


@pytest.mark.parametrize(
    ("mutation", "crossover"),
    [("rand_1", "binomial"), ("best_1", "exponential"), ("current_to_best_1", "binomial")],
)
def test_differential_evolution_equals_its_twin(mutation, crossover):
    """Storn and Price 1997."""
    f, cr = 0.7, 0.6
    strategy = strategies.differential_evolution(
        N, weight=f, crossover_rate=cr, mutation=getattr(de, mutation), crossover=getattr(variation, crossover), **BOX
    )
    x = values = None
    for state, key, asked, found, new in generations(strategy, box=True):
        if x is None:
            x, values = np.array(state.x), found
            close(asked, x)
            continue
        keys = jax.random.split(key, 4)
        draws = [integers(k, (N,), N - 1 - j) for j, k in enumerate(keys[:3])]
        split = jax.random.split(keys[3])
        trials = []
        for i in range(N):
            r = []
            for draw in draws:
                r.append(without(N, i, *r)[draw[i]])
            v, u = MUTATIONS[mutation](x, i, x[values.argmin()], *r, f), x[i].copy()
            if crossover == "binomial":
                each, sure = uniforms(split[0], N, D)[i], integers(split[1], (N, 1), D)[i, 0]
                for j in range(D):
                    if each[j] < cr or j == sure:
                        u[j] = v[j]
            else:
                j, length, luck = integers(split[0], (N, 1), D)[i, 0], 0, uniforms(split[1], N)[i]
                while length < D and (length == 0 or 1 - luck < cr**length):  # one more with probability CR
                    u[(j + length) % D], length = v[(j + length) % D], length + 1
            trials.append(midpoint(u, x[i]))
        close(asked, trials)
        for i in range(N):
            if found[i] <= values[i]:
                x[i], values[i] = trials[i], found[i]
        close(new.x, x)
    close(strategy.recommend(new), x[values.argmin()])
    assert values.min() < 0.05 * objective(np.full(D, 0.25))


def test_jade_equals_its_twin():
    """Zhang and Sanderson 2009, table I."""
    c, x, values, archive, m_cr, m_f = 0.2, None, None, [], 0.5, 0.5
    for state, key, asked, found, new in generations(
        strategies.jade(N, learning_rate=c, greediness=0.25, **BOX), box=True
    ):
        if x is None:
            x, values, trials, made = np.array(state.x), np.full(N, np.inf), np.array(state.x), None
        else:
            keys = jax.random.split(key, 6)
            cr = np.clip(m_cr + 0.1 * normals(keys[0], N), 0, 1)
            below = 0.5 - np.arctan(m_f / 0.1) / np.pi  # F is drawn again while it is not positive
            f = m_f + 0.1 * np.tan(np.pi * (below + (1 - below) * uniforms(keys[1], N) - 0.5))
            f, best = np.minimum(f, 1), integers(keys[2], (N,), 3)
            k1, k2 = jax.random.split(keys[3])
            d1, d2 = integers(k1, (N,), N - 1), integers(k2, (N,), N + len(archive) - 2)
            k1, k2 = jax.random.split(keys[4])
            each, sure, made, trials = uniforms(k1, N, D), integers(k2, (N, 1), D)[:, 0], (cr, f), []
            for i in range(N):
                r1 = without(N, i)[d1[i]]
                pool = [x[j] for j in without(N, i, r1)] + archive
                v = midpoint(x[i] + f[i] * (x[best[i]] - x[i]) + f[i] * (x[r1] - pool[d2[i]]), x[i])
                trials.append(np.where((each[i] < cr[i]) | (np.arange(D) == sure[i]), v, x[i]))
        close(asked, trials)
        won = [i for i in range(N) if found[i] < values[i]]
        if made and won:
            slot = integers(keys[5], (N,), N)
            for i in won:
                if len(archive) < N:
                    archive.append(x[i].copy())
                else:
                    archive[slot[i]] = x[i].copy()
            cr, f = (np.array(m)[won] for m in made)
            m_cr, m_f = (1 - c) * m_cr + c * cr.mean(), (1 - c) * m_f + c * (f**2).sum() / f.sum()
        for i in won:
            x[i], values[i] = trials[i], found[i]
        order = np.argsort(values, kind="stable")
        x, values = x[order], values[order]
        close(new.x, x)
        close((new.mean_rate, new.mean_weight), (m_cr, m_f))
        close(new.archive[: len(archive)], archive if archive else np.zeros((0, D)))
    assert len(archive) == N


def test_samr_equals_its_twin():
    """A mutation rate mutates before it is used; the best stays as it is."""
    parents, tau, x = 4, 1.5, None
    for state, key, asked, found, new in generations(strategies.samr_ga(N, parents=parents, sigma=0.3, factor=tau)):
        if x is None:
            x, sigma = np.array(state.members.x), np.full(N, 0.3)
        else:
            k = jax.random.split(key, 3)
            place, step, z = integers(k[0], (N,), parents), 2 * uniforms(k[1], N) - 1, normals(k[2], N, D)
            old, sigma_old = x, sigma
            sigma = np.array([sigma_old[0], *(sigma_old[place] * tau**step)[1:]])
            x = np.array([old[0], *(old[place[i]] + sigma[i] * z[i] for i in range(1, N))])
        close(asked, x)
        order = np.argsort(found, kind="stable")
        x, sigma = x[order], sigma[order]
        close(new.members.x, x)
        close(new.members.sigma, sigma)
    assert sigma.max() < 0.3


def test_gesmr_equals_its_twin():
    """A rate is judged by the best change of its group: Kumar et al. 2022, equations (3) to (7)."""
    n, groups, parents, kept, tau, x = 13, 4, 5, 2, 1.5, None
    strategy = strategies.gesmr_ga(n, groups=groups, parents=parents, parent_groups=kept, sigma=0.3, factor=tau)
    for g, (state, key, asked, found, new) in enumerate(generations(strategy)):
        if x is None:
            x, values, rates = np.array(state.x), None, np.array([0.3, *0.3 * np.logspace(-1, 1, groups)[1:]])
            close(state.sigmas, rates)
        else:
            k = jax.random.split(key, 4)
            place, step = integers(k[0], (groups,), kept), 2 * uniforms(k[1], groups) - 1
            if g > 1:
                rates = np.array([rates[0], *(rates[place] * tau**step)[1:]])
            parent, z = integers(k[2], (n,), parents), normals(k[3], n, D)
            x = np.array([x[0], *(x[parent[i]] + rates[(i - 1) // 3] * z[i] for i in range(1, n))])
            change = [min(found[i] - values[parent[i]] for i in range(1 + 3 * k, 4 + 3 * k)) for k in range(groups)]
            rates = rates[np.argsort(change, kind="stable")]
        close(asked, x)
        order = np.argsort(found, kind="stable")
        x, values = x[order], found[order]
        close(new.x, x)
        close(new.sigmas, rates)


@pytest.mark.parametrize("kind", ["global", "ring", "informed", "adam"])
def test_swarms_equal_their_twin(kind):
    """Clerc and Kennedy 2002 (constriction), Mendes et al. 2004 (fully informed); Kingma and Ba 2015 for the step."""
    n, phi, rate = 8, 4.3, 0.02
    chi = 2 / (phi - 2 + np.sqrt(phi**2 - 4 * phi))
    strategy = {
        "global": lambda: strategies.particle_swarm(n, phi=phi, **BOX),
        "ring": lambda: strategies.particle_swarm(n, phi=phi, radius=1, **BOX),
        "informed": lambda: strategies.fully_informed_swarm(n, phi=phi, radius=2, **BOX),
        "adam": lambda: strategies.adam_swarm(n, phi=phi, learning_rate=rate, difference=0.01, **BOX),
    }[kind]()
    x = None
    for t, (state, key, asked, found, new) in enumerate(generations(strategy)):
        key_pull, key_probe = jax.random.split(key)
        if x is None:
            x = np.array(state.x)
            v, best, values, m, s, step = 0 * x, x.copy(), np.full(n, np.inf), 0 * x, 0 * x, 0 * x
        else:
            pull = np.zeros((n, D))
            if kind in ("global", "ring"):
                u = np.asarray(variation.uniform_pairs(key_pull, (n, D), jnp.float64))
                for i in range(n):
                    near = range(n) if kind == "global" else [(i - 1) % n, i, (i + 1) % n]
                    leader = best[min(near, key=lambda j: values[j])]
                    pull[i] = phi / 2 * (u[0][i] * (best[i] - x[i]) + u[1][i] * (leader - x[i]))
            else:
                offsets = [-2, -1, 1, 2] if kind == "informed" else [-1, 1]
                for o, k in zip(offsets, jax.random.split(key_pull, len(offsets)), strict=True):
                    u = uniforms(k, n, D)
                    for i in range(n):
                        pull[i] += phi / len(offsets) * u[i] * (best[(i + o) % n] - x[i])
            v = chi * (v + pull)
            x = x + v - step
            outside = (x < BOX["lower"]) | (x > BOX["upper"])
            x, v = np.clip(x, BOX["lower"], BOX["upper"]), np.where(outside, 0, v)
        if kind == "adam":
            delta = 0.01 * np.asarray(noise.signs(key_probe, n * D, jnp.float64)).reshape(n, D)
            close(asked, np.concatenate([x, x + delta, x - delta]))
            g = (found[n : 2 * n] - found[2 * n :])[:, None] / (2 * delta)
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            step = rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(s / (1 - 0.999 ** (t + 1))) + 1e-8)
        else:
            close(asked, x)
        for i in range(n):
            if found[i] < values[i]:
                best[i], values[i] = x[i], found[i]
        for ours, twin in ((new.x, x), (new.velocity, v), (new.best, best), (new.values, values)):
            close(ours, twin)
    close(strategy.recommend(new), best[values.argmin()])


def test_simulated_annealing_equals_its_twin():
    """Metropolis' acceptance at a temperature that falls geometrically."""
    x, uphill = None, 0
    strategy = strategies.simulated_annealing(6, temperature=2.0, cooling=0.9, sigma=0.5, shrinking=0.95)
    for t, (state, key, asked, found, new) in enumerate(generations(strategy)):
        k = jax.random.split(key)
        if x is None:
            x, values = np.array(state.x), np.full(6, np.inf)
        proposal = x if t == 0 else x + 0.5 * 0.95**t * normals(k[0], 6, D)
        close(asked, proposal)
        luck, x = uniforms(k[1], 6), x.copy()
        for i in range(6):
            if found[i] <= values[i] or luck[i] < np.exp(-(found[i] - values[i]) / (2 * 0.9**t)):
                uphill += found[i] > values[i]
                x[i], values[i] = proposal[i], found[i]
        close(new.x, x)
        close(new.values, values)
    assert uphill > 5


def test_hill_climbing_equals_its_twin():
    """The best neighbour, if it is better; the step doubles after a success and halves after a failure."""
    x, value, sigma = np.full(D, 0.25), np.inf, 0.4
    for _, key, asked, found, new in generations(strategies.hill_climbing(4, sigma=0.4), jnp.asarray(x)):
        near = x + sigma * normals(key, 4, D)
        if value == np.inf:
            near[0] = x
        close(asked, near)
        i = found.argmin()
        sigma *= 2 if found[i] < value else 0.5
        if found[i] < value:
            x, value = near[i], found[i]
        close(new.x, x)
        close(new.sigma, sigma)


@pytest.mark.parametrize("box", [{}, BOX], ids=["normal", "box"])
def test_random_search_equals_its_twin(box):
    x0, best, value = np.full(D, 0.25), None, np.inf
    for t, (_, key, asked, found, new) in enumerate(generations(strategies.random_search(4, spread=0.7, **box))):
        low, high = BOX["lower"], BOX["upper"]
        x = low + (high - low) * uniforms(key, 4, D) if box else x0 + 0.7 * normals(key, 4, D)
        if t == 0:
            x[0] = x0
        close(asked, x)
        if found.min() < value:
            best, value = x[found.argmin()], found.min()
        close(new.best, best)


def test_real_ga_selects_and_keeps_as_it_says():
    """Tournament and truncation draw their parents; the children replace the old but for the best `elites` of them."""
    from evoopt.strategies.populations import real_ga as ga

    key = jax.random.key(0)
    # the smallest place of two: P(at least j) = (1 - j / n)^2
    places = np.asarray(ga.tournament(2)(key, 10, 40000))
    for j in (1, 3, 6, 9):
        np.testing.assert_allclose((places >= j).mean(), (1 - j / 10) ** 2, atol=0.01)
    places = np.asarray(ga.truncation(0.3)(key, 10, 3000))
    assert set(places) == {0, 1, 2}
    strategy, x, values = strategies.real_ga(N, elites=2, **BOX), np.zeros((0, D)), np.zeros(0)
    for _, _, asked, found, new in generations(strategy, box=True):
        old = zip(values[:2], x[:2], strict=True)
        everyone = sorted([*zip(found, asked, strict=True), *old], key=lambda p: p[0])[:N]
        values, x = np.array([p[0] for p in everyone]), np.array([p[1] for p in everyone])
        close(new.values, values)
        close(new.x, x)
