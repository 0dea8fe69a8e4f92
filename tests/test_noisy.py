"""Noise: repeats, uncertainty handling, and what chooses among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import minimize, trees
from evoopt.run.checkpoint import digest
from evoopt.run.folder import Run
from evoopt.strategies import cma_es, differential_evolution, gradient, openai_es, snes
from evoopt.wrappers import adaptive_popsize, averaged, bounded, ipop, noisy, reevaluated, repeated
from evoopt.wrappers.adaptive_popsize import best_step_size
from evoopt.wrappers.reevaluated import measure
from evoopt.wrappers.repeated import median

KEY = jax.random.key(0)
measured = jax.jit(measure)
TARGET = jnp.array([1.5, -0.5, 2.5, -1.0])


def sphere(x):
    return jnp.sum((x - TARGET) ** 2)


def noisy_run(strategy, noise, evaluations, seed=0, start=TARGET + 2.0):
    """Distance of the recommendation to the target; `noise(key, value)` is a noisy value, each of its own key."""
    f = lambda x, key, own: noise(own, sphere(x))
    result = minimize(
        f, start, strategy, key=seed, context=jax.random.key(seed + 7), each=lambda key, n: jax.random.split(key, n),
        update=lambda key, aux: jax.random.split(key, 1)[0], evaluations=evaluations,
    )  # fmt: skip
    return float(jnp.linalg.norm(result.recommended - TARGET)), result


def additive(key, value):
    return value + 0.3 * jax.random.normal(key)


def readable_measure(old, new, theta):
    """Hansen et al. 2009, algorithm 2, in plain loops: all candidates are there, `new` is None where not again."""
    n = len(old)
    again = [i for i in range(n) if new[i] is not None]
    second = [old[i] if new[i] is None else new[i] for i in range(n)]
    ordered = sorted(range(2 * n), key=lambda j: [*old, *second][j])  # sorted is stable
    place = {j: r + 1 for r, j in enumerate(ordered)}
    first, later = [place[i] for i in range(n)], [place[n + i] for i in range(n)]
    change = [a - b - np.sign(a - b) for a, b in zip(first, later, strict=True)]

    def centile(data, p):
        data, at = sorted(data), p * len(data) / 100 - 0.5
        if at <= 0 or at >= len(data) - 1:
            return data[0] if at <= 0 else data[-1]
        i = int(at)
        return (i + 1 - at) * data[i] + (at - i) * data[i + 1]

    def allowed(place):
        return centile([abs(r - place) for r in range(1, 2 * n)], theta * 50)

    terms = [
        2 * abs(change[i]) - allowed(later[i] - (second[i] > old[i])) - allowed(first[i] - (old[i] > second[i]))
        for i in again
    ]
    by = sorted(range(n), key=lambda i: (first[i] + later[i], abs(change[i]), (old[i] + second[i]) / 2))
    return sum(terms) / len(again), [by.index(i) for i in range(n)]


@pytest.mark.parametrize("theta", [0.2, 1.0])
@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_the_measure_is_the_papers(noise, theta):
    rng = np.random.default_rng(int(100 * noise))
    for n, k in ((6, 2), (12, 3), (40, 5)):
        old = rng.standard_normal(n).astype(np.float32)
        new = [np.float32(x + noise * rng.standard_normal()) if i < k else None for i, x in enumerate(old)]
        s, order = readable_measure(old.tolist(), [None if x is None else float(x) for x in new], theta)
        found = measured(jnp.array(old), jnp.array([np.nan if x is None else x for x in new]), theta)
        np.testing.assert_allclose(found.uncertainty, s, rtol=1e-5)
        assert found.order.tolist() == order


def test_the_measure_is_twice_that_of_pycma():
    """With pycma's theta; it halves the sum."""
    cma = pytest.importorskip("cma")
    rng = np.random.default_rng(3)
    handler = cma.NoiseHandler(4)
    handler.cum = 1.0
    for noise in (0.05, 0.5, 2.0):
        old = rng.standard_normal(16)
        handler.idx = np.array([0, 1, 2])
        handler.fit, handler.fitre = old.tolist(), old.tolist()
        for i in handler.idx:
            handler.fitre[i] += noise * rng.standard_normal()
        again = np.full(16, np.nan)
        again[:3] = handler.fitre[:3]
        theirs, _ = handler.update_measure()
        found = measured(jnp.array(old, jnp.float32), jnp.array(again, jnp.float32), handler.theta)
        np.testing.assert_allclose(found.uncertainty, 2 * theirs, atol=1e-4)


def test_missing_candidates_and_plateaus_do_not_look_like_noise():
    old = jnp.array([0.3, 2.0, 1.0, 0.1, 5.0])
    new = jnp.array([2.5, 0.2, jnp.nan, jnp.nan, jnp.nan])
    whole = measured(old, new)
    wider = measured(jnp.concatenate([old, jnp.full(4, jnp.nan)]), jnp.concatenate([new, jnp.full(4, jnp.nan)]))
    assert float(whole.uncertainty) == float(wider.uncertainty) > 0
    assert wider.order[:5].tolist() == whole.order.tolist()
    flat = measured(jnp.ones(8), jnp.ones(8).at[3:].set(jnp.nan))
    assert float(flat.uncertainty) <= 0
    nothing = measured(jnp.full(4, jnp.nan), jnp.full(4, jnp.nan))
    assert float(nothing.uncertainty) == 0


def test_repeats_are_averaged_and_missing_ones_left_out():
    strategy, inner = repeated(snes(4), 3), snes(4)
    state = strategy.init(jnp.ones(2), KEY)
    population = strategy.ask(state, KEY)
    assert len(population) == 12
    candidates = population.decoded()
    np.testing.assert_array_equal(candidates.reshape(3, 4, 2)[0], candidates.reshape(3, 4, 2)[2])
    values = jnp.array([1.0, 2, 3, jnp.nan, 3, jnp.nan, 3, jnp.nan, 5, 4, -jnp.inf, jnp.nan])
    told = strategy.tell(state, population, values)
    mean = inner.tell(state, inner.ask(state, KEY), jnp.array([3.0, 3, 3, jnp.nan]))
    for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(mean), strict=True):
        np.testing.assert_array_equal(a, b)
    outlier = jnp.array([1.0, 2, 3, 4, 1, 2, 3, 4, 1e9, 2, 3, 4])
    told = repeated(snes(4), 3, median).tell(state, population, outlier)
    plain = inner.tell(state, inner.ask(state, KEY), jnp.array([1.0, 2, 3, 4]))
    np.testing.assert_array_equal(told.mean, plain.mean)


def test_gradients_are_averaged_too():
    optax = pytest.importorskip("optax")
    strategy = repeated(gradient(optax.sgd(0.5)), 2)
    state = strategy.init(jnp.array([1.0, 2.0]), KEY)
    population = strategy.ask(state, KEY)
    answers = (jnp.array([1.0, 1.0]), jnp.array([[2.0, 0.0], [0.0, 4.0]]))
    np.testing.assert_allclose(strategy.recommend(strategy.tell(state, population, answers)), [0.5, 1.0])


def test_only_what_is_wanted_is_evaluated():
    """20 candidates and two measured, once; after a noisy generation at most `most` times as many."""
    strategy = reevaluated(cma_es(20), 3)
    state = strategy.init(jnp.zeros(3), KEY)
    population = strategy.ask(state, KEY)
    assert len(population) == 3 * (20 + 3)
    assert int(population.asked()) == 22
    full = strategy.ask(state._replace(evaluations=jnp.float32(3.0)), KEY)
    assert int(full.asked()) == 66
    _, result = noisy_run(strategy, additive, 2000)
    assert 2000 - 66 < result.evaluations <= 2000
    assert result.history[-1]["evaluations"] == result.evaluations


def test_evaluations_grow_under_noise_and_fall_without():
    strategy = reevaluated(cma_es(10), 8)
    _, loud = noisy_run(strategy, additive, 6000)
    assert float(loud.state.evaluations) > 4
    _, quiet = noisy_run(strategy, lambda key, value: value, 3000)
    assert float(quiet.state.evaluations) == 1
    assert float(quiet.state.uncertainty) < 0


def test_a_step_size_grows_under_noise_and_never_beyond_the_start():
    strategy = reevaluated(cma_es(10, sigma=0.5))
    with_noise, result = noisy_run(strategy, lambda key, value: jax.random.normal(key), 3000)
    _, alone = noisy_run(cma_es(10, sigma=0.5), additive, 4000)
    assert np.isfinite(with_noise)
    assert float(result.state.inner.sigma) > 0.05
    _, handled = noisy_run(strategy, additive, 4000)
    assert float(handled.state.inner.sigma) > 4 * float(alone.state.sigma)
    state = strategy.init(jnp.zeros(4), KEY)
    state = state._replace(inner=state.inner._replace(sigma=jnp.float32(0.49)))
    treated = strategy._treated(state, jnp.float32(1.0), jnp.asarray(True))
    assert float(treated.inner.sigma) == 0.5
    wide = state._replace(inner=state.inner._replace(sigma=jnp.float32(2.0)))
    assert float(strategy._treated(wide, jnp.float32(1.0), jnp.asarray(True)).inner.sigma) == 2.0


def test_wrapped_step_sizes_are_found():
    strategy = reevaluated(ipop(cma_es(16, sigma=0.5), 8))
    state = trees.strong(strategy.init(jnp.zeros(4), KEY))
    assert int(strategy.ask(state, KEY).asked()) == 8 + 2
    state = state._replace(inner=state.inner._replace(search=state.inner.search._replace(sigma=jnp.float32(0.1))))
    treated = strategy._treated(state, jnp.float32(1.0), jnp.asarray(True))
    np.testing.assert_allclose(treated.inner.search.sigma, 0.1 * (1 + 2 / 14), rtol=1e-6)
    assert float(treated.inner.watch.sigma) == 0.5


def readable_rho(n, d):
    """Nishida and Akimoto 2018: the best step-size of n candidates, from weights and normal order statistics."""
    import statistics

    w = np.array([max(np.log((n + 1) / 2) - np.log(i), 0) for i in range(1, n + 1)])
    w /= w.sum()
    mu = 1 / (w**2).sum()
    c = sum(-w[i - 1] * statistics.NormalDist().inv_cdf((i - 0.375) / (n + 0.25)) for i in range(1, n + 1))
    return c * d * mu / (d - 1 + c**2 * mu)


def test_the_popsize_follows_the_papers_path():
    """Against the paper's update in NumPy, given the steps and their squared lengths under random ranks."""
    strategy, inner = adaptive_popsize(cma_es(512), 16), cma_es(512)
    state = trees.strong(strategy.init(TARGET + 1.0, KEY))
    alpha, beta = 1.4, 0.4
    path, gamma, real, popsize, neutral = 0.0, 0.0, 16.0, 16, None
    tell = jax.jit(strategy.tell)
    for i in range(6):
        population = strategy.ask(state, jax.random.fold_in(KEY, i))
        assert int(population.asked()) == popsize == int(state.popsize)
        values = population.map(sphere) if i < 3 else jax.random.normal(jax.random.fold_in(KEY, 100 + i), (512,))
        new = tell(state, population, values)
        within = jnp.where(population.active, values, jnp.nan)
        old, moved = state.inner, inner.tell(state.inner, population, within)

        covariance = lambda s: np.float64(s.sigma) ** 2 * np.asarray(s.covariance, np.float64)
        power, axes = np.linalg.eigh(np.asarray(old.covariance, np.float64))
        whiten = axes @ np.diag(power**-0.5) @ axes.T / np.float64(old.sigma)

        def length(to, old=old, whiten=whiten, covariance=covariance):
            mean = whiten @ (np.asarray(to.mean, np.float64) - np.asarray(old.mean, np.float64))
            change = whiten @ (covariance(to) - covariance(old)) @ whiten.T / np.sqrt(2)
            return np.concatenate([mean, change.ravel()])

        chance = jax.random.uniform(jax.random.fold_in(state.key, i), (512,))
        beside = inner.tell(old, population, jnp.where(population.active, chance, jnp.nan))
        squared = (length(beside) ** 2).sum()
        neutral = squared if neutral is None else 0.8 * neutral + 0.2 * squared
        path = (1 - beta) * path + np.sqrt(beta * (2 - beta)) * length(moved) / np.sqrt(neutral)
        gamma = (1 - beta) ** 2 * gamma + beta * (2 - beta)
        real = np.clip(real * np.exp(beta * (gamma - (path**2).sum() / alpha)), 16, 512)
        before, popsize = popsize, round(real)
        neutral *= before / popsize

        np.testing.assert_allclose(new.gamma, gamma, rtol=1e-5)
        np.testing.assert_allclose((new.path**2).sum(), (path**2).sum(), rtol=2e-3)
        np.testing.assert_allclose(new.real, real, rtol=2e-3)
        assert int(new.popsize) == popsize
        larger = readable_rho(popsize, 4) / readable_rho(before, 4)
        np.testing.assert_allclose(new.inner.sigma, np.float64(moved.sigma) * larger, rtol=1e-4)
        state = new
    assert popsize > 20  # noise alone makes it grow


def test_the_best_step_size_is_the_papers():
    for n, d in ((8, 5), (33, 10), (512, 3)):
        np.testing.assert_allclose(best_step_size(jnp.int32(n), 512, d), readable_rho(n, d), rtol=1e-4)


def test_popsizes_grow_under_noise_and_fall_without_and_begin_again_with_restarts():
    _, loud = noisy_run(adaptive_popsize(cma_es(128), 16), additive, 3000)
    _, quiet = noisy_run(adaptive_popsize(cma_es(128), 16), lambda key, value: value, 1500)
    assert int(loud.state.popsize) > 60 > 30 > int(quiet.state.popsize) >= 16
    strategy = adaptive_popsize(ipop(cma_es(64, sigma=0.5), 8))
    state = trees.strong(strategy.init(jnp.zeros(4), KEY))
    inner = state.inner._replace(popsize=jnp.int32(40), watch=state.inner.watch._replace(flat=jnp.int32(99)))
    state = state._replace(inner=inner, real=jnp.float32(40.0), gamma=jnp.float32(0.5), path=state.path + 1.0)
    new = jax.jit(strategy.tell)(state, strategy.ask(state, KEY), jnp.ones(64))  # flat: the run ends
    assert int(new.inner.restarts) == 1
    assert (int(new.inner.popsize), int(new.popsize), int(new.least), float(new.real)) == (16, 16, 16, 16.0)
    assert float(jnp.abs(new.path).max()) == float(new.gamma) == 0.0
    assert float(new.inner.search.sigma) == 0.5


def test_noisy_gets_closer_where_cma_es_stagnates():
    """On a sphere under constant noise, the mean over seeds; without noise it still converges."""
    ours = [noisy_run(noisy(cma_es(128)), additive, 4000, seed)[0] for seed in range(4)]
    plain = [noisy_run(cma_es(), additive, 4000, seed)[0] for seed in range(4)]
    assert np.mean(ours) < 0.5 * np.mean(plain), (ours, plain)
    assert np.mean(ours) < 0.15
    without, _ = noisy_run(noisy(cma_es(128)), lambda key, value: value, 4000)
    assert without < 1e-4


def test_the_middle_is_weighted_by_the_inverse_of_the_variance():
    """Of a distribution that shrinks, the newest counts; of one that stays, all do: against sums in NumPy."""
    strategy = noisy(cma_es(64), window=10)
    state = trees.strong(strategy.init(TARGET + 1.0, KEY))
    tell, places, weights = jax.jit(strategy.tell), [], []
    for i in range(8):
        population = strategy.ask(state, jax.random.fold_in(KEY, i))
        state = tell(state, population, population.map(sphere))
        inner = state.inner.inner
        places.append(np.asarray(inner.mean, np.float64))
        weights.append(1 / (np.float64(inner.sigma) ** 2 * np.diag(inner.covariance).mean()))
    weights = np.array(weights) * 0.9 ** np.arange(8)[::-1]
    np.testing.assert_allclose(state.mean, weights @ np.array(places) / weights.sum(), rtol=1e-4)
    np.testing.assert_array_equal(strategy.recommend(state), state.mean)
    better = state._replace(other=jnp.full(4, 7.0), other_level=state.level - 1.0)
    assert strategy.recommend(better).tolist() == [7.0] * 4


def test_an_ended_run_is_remembered_if_its_values_were_better():
    strategy = noisy(ipop(cma_es(64, sigma=0.5), 16))
    state = trees.strong(strategy.init(jnp.zeros(4), KEY))
    tell = jax.jit(strategy.tell)
    state = tell(state, strategy.ask(state, KEY), jnp.arange(64.0))
    assert float(state.level) == 7.5  # the median of the 16 that are active
    watch = state.inner.inner.watch._replace(flat=jnp.int32(99))
    inner = state.inner._replace(inner=state.inner.inner._replace(watch=watch))
    new = tell(state._replace(inner=inner), strategy.ask(state, KEY), jnp.ones(64))
    assert (float(new.other_level), int(new.steps), float(new.level)) == (7.5, 0, float("inf"))
    np.testing.assert_array_equal(strategy.recommend(new), state.mean)


def test_the_rule_of_noisy():
    assert type(noisy(cma_es()).strategy).__name__ == "AdaptivePopsize"
    assert type(noisy(ipop(cma_es(64), 32)).strategy).__name__ == "AdaptivePopsize"
    for other in (snes(8), differential_evolution(8), bounded(cma_es(8), -1.0, 1.0)):
        assert type(noisy(other).strategy).__name__ == "Reevaluated"


@pytest.mark.parametrize("jit", [True, False])
def test_the_best_of_a_noisy_run_is_evaluated_again_within_the_budget(jit):
    calls, rng = [], np.random.default_rng(0)

    def host(x):
        calls.append(np.array(x))
        return float(np.sum((x - np.asarray(TARGET)) ** 2) + rng.standard_normal())

    strategy = bounded(noisy(snes(8), confirmations=10), -5.0, 5.0)
    if jit:
        _, result = noisy_run(strategy, lambda key, value: value + jax.random.normal(key), 500)
    else:
        result = minimize(host, np.asarray(TARGET) + 1.0, strategy, evaluations=500, jit=False)
        assert len(calls) == result.evaluations
        np.testing.assert_array_equal(np.array(calls[-10:]), np.tile(np.asarray(result.best), (10, 1)))
    assert 400 < result.evaluations <= 500
    np.testing.assert_array_equal(result.best, result.recommended)
    true = float(sphere(result.best))
    assert abs(result.best_value - true) < 1.2  # the mean of ten answers
    assert result.history[-1]["best_so_far"] < true - 1.2  # the best answer was luck


def test_a_lucky_answer_does_not_reach_a_target():
    _, result = noisy_run(noisy(snes(8), confirmations=10), lambda key, value: value + jax.random.normal(key), 400)
    assert result.history[-1]["best_so_far"] < -1.5
    f = lambda x, key, own: sphere(x) + jax.random.normal(own)
    again = minimize(
        f, TARGET + 2.0, noisy(snes(8), confirmations=10), context=jax.random.key(7), evaluations=400, target=-1.5,
        each=lambda key, n: jax.random.split(key, n), update=lambda key, aux: jax.random.split(key, 1)[0],
    )  # fmt: skip
    assert again.reason == "evaluations"
    assert again.evaluations <= 400


def test_a_noisy_run_resumes_bit_for_bit(tmp_path):
    f = lambda x: sphere(x) * (1 + jnp.sin(1e4 * x.sum()))
    go = lambda generations, run=None: minimize(
        f, TARGET + 2.0, noisy(ipop(cma_es(64), 16)), generations=generations, run=run, stop=None
    )
    whole = go(40)
    with Run.create(tmp_path, "run", {"display": "value"}) as run:
        go(25, run)
        path = run.path
    with Run.open(path) as run:
        resumed = go(40, run)
    assert digest(resumed.state) == digest(whole.state)
    assert resumed.best_value == whole.best_value


def test_averages_of_a_reevaluated_strategy():
    """Wrappers compose: the step-size inside `averaged` is found."""
    strategy = reevaluated(averaged(cma_es(8, sigma=0.5)))
    state = trees.strong(strategy.init(jnp.zeros(4), KEY))
    assert float(state.widest) == 0.5


def test_bad_input_is_refused_in_three_parts():
    three = r"(?s)expected.*got.*usual cause"
    with pytest.raises(ValueError, match=three):
        repeated(snes(4), 0)
    with pytest.raises(TypeError, match=three):
        repeated(snes(4), 2, "median")
    with pytest.raises(ValueError, match=three):
        reevaluated(snes(4), 0)
    with pytest.raises(ValueError, match=three):
        reevaluated(openai_es(8)).init(jnp.zeros(3), KEY)
    with pytest.raises(TypeError, match=three):
        adaptive_popsize(snes(8))
    with pytest.raises(TypeError, match=three):
        adaptive_popsize(bounded(cma_es(64), -1.0, 1.0))
    with pytest.raises(ValueError, match=three):
        adaptive_popsize(cma_es(8)).init(jnp.zeros(3), KEY)
    with pytest.raises(ValueError, match=three):
        noisy(snes(8), confirmations=0)
    strategy = reevaluated(cma_es(8))
    state = strategy.init(jnp.zeros(3), KEY)
    with pytest.raises(TypeError, match=three):
        strategy.tell(state, strategy.ask(state, KEY), (jnp.zeros(10), jnp.zeros((10, 3))))
