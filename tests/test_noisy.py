"""Noise: repeats, uncertainty handling, and what chooses among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import minimize, trees
from evoopt.strategies import cma_es, gradient, openai_es, snes
from evoopt.wrappers import ipop, reevaluated, repeated
from evoopt.wrappers.reevaluated import measure
from evoopt.wrappers.repeated import median

KEY = jax.random.key(0)
TARGET = jnp.array([1.5, -0.5, 2.5, -1.0])


def sphere(x):
    return jnp.sum((x - TARGET) ** 2)


def noisy_run(strategy, noise, evaluations, seed=0, start=TARGET + 2.0):
    """Distance of the recommendation to the target; `noise(key, value)` is a noisy value, of its own key a candidate."""
    f = lambda x, key, own: noise(own, sphere(x))
    result = minimize(
        f, start, strategy, key=seed, context=jax.random.key(seed + 7), each=lambda key, n: jax.random.split(key, n),
        update=lambda key, aux: jax.random.split(key, 1)[0], evaluations=evaluations,
    )  # fmt: skip
    return float(jnp.linalg.norm(result.recommended - TARGET)), result


def additive(key, value):
    return value + 0.3 * jax.random.normal(key)


def readable_measure(old, new, theta):
    """Hansen et al. 2009, algorithm 2, in plain loops: for candidates that are all there; `new` is None where not again."""
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
        found = measure(jnp.array(old), jnp.array([np.nan if x is None else x for x in new]), theta)
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
        found = measure(jnp.array(old, jnp.float32), jnp.array(again, jnp.float32), handler.theta)
        # pycma takes the larger of no two limits: its amax is over an axis of one
        np.testing.assert_allclose(found.uncertainty, 2 * theirs, atol=1e-4)


def test_missing_candidates_and_plateaus_do_not_look_like_noise():
    old = jnp.array([0.3, 2.0, 1.0, 0.1, 5.0])
    new = jnp.array([2.5, 0.2, jnp.nan, jnp.nan, jnp.nan])
    whole = measure(old, new)
    wider = measure(jnp.concatenate([old, jnp.full(4, jnp.nan)]), jnp.concatenate([new, jnp.full(4, jnp.nan)]))
    assert float(whole.uncertainty) == float(wider.uncertainty) > 0
    assert wider.order[:5].tolist() == whole.order.tolist()
    flat = measure(jnp.ones(8), jnp.ones(8).at[3:].set(jnp.nan))
    assert float(flat.uncertainty) <= 0
    nothing = measure(jnp.full(4, jnp.nan), jnp.full(4, jnp.nan))
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
    plain, alone = noisy_run(cma_es(10, sigma=0.5), additive, 4000)
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
    assert float(treated.inner.sigma) == 0.5


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
