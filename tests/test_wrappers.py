"""What single wrappers promise, on runs where the wrong promise would show."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evoopt import minimize, stopping, strategies, wrappers
from evoopt.stopping import Stop

KEY = jax.random.key(0)


def test_best_so_far_is_the_best_and_not_the_newest():
    strategy = wrappers.best_so_far(strategies.snes(4))
    ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell)
    state = strategy.init(jnp.zeros(2), KEY)
    asked = []
    told = ([3.0, 1.0, 2.0, 4.0], [5.0, 6.0, 1.5, 7.0], [np.nan, -np.inf, np.inf, 1.0], [0.5, 9.0, 9.0, 9.0])
    for i, values in enumerate(told):
        population = ask(state, jax.random.key(i))
        asked.append(population.decoded())
        state = tell(state, population, jnp.array(values))
        best = asked[3][0] if i == 3 else asked[0][1]  # the second and the third generation are no better
        np.testing.assert_allclose(strategy.recommend(state), best, rtol=1e-5)


def test_averaged_forgets_by_its_window():
    strategy = wrappers.averaged(strategies.gradient(optax.sgd(1.0)), 2)
    tell = jax.jit(strategy.tell)
    state = strategy.init(jnp.zeros(1), KEY)
    population = strategy.ask(state, KEY)
    expected = []
    for step, mean in zip((-1.0, -2.0, -3.0, 0.0), (1.0, 2.0, 4.0, 5.0), strict=True):  # recommendations 1, 3, 6, 6
        state = tell(state, population, (jnp.ones(1), jnp.full((1, 1), step)))
        expected.append(mean)
        assert strategy.recommend(state).tolist() == [mean], expected
    lost = tell(state, population, (jnp.full(1, jnp.nan), jnp.ones((1, 1))))
    assert strategy.recommend(lost).tolist() == [5.0], "a generation that nobody answered is not averaged"


def test_tolx_takes_all_stds_and_the_path():
    strategy = wrappers.ipop(strategies.cma_es(8, sigma=0.5), 8)
    state = strategy.init(jnp.zeros(3), KEY)
    recent = jnp.arange(state.watch.recent_best.shape[0], dtype=jnp.float32)
    watch = state.watch._replace(
        generation=jnp.int32(200), anchored=jnp.int32(199), recent_best=recent, spread=jnp.float32(1)
    )
    wide = strategy.strategy.dispersion(state.search, watch.generation)

    def reason(std, path):
        narrow = wide._replace(std=jnp.array(std), path=jnp.array(path))
        return Stop(int(stopping.first(stopping.met(watch, narrow, 3, jnp.int32(8), strategy.stops))))

    tiny, some = 1e-13, 1e-3
    assert reason([tiny] * 3, [tiny] * 3) is Stop.TOLX
    assert reason([tiny, some, tiny], [tiny] * 3) is Stop.NONE, "one coordinate is still wide"
    assert reason([tiny] * 3, [tiny, some, tiny]) is Stop.NONE, "the path still moves"


def test_a_gradient_goes_through_the_transformation():
    """Of f(exp(u)) the step of u is along exp(u) f'(exp(u))."""
    start = np.array([1.0, 2.0], np.float32)
    inner = strategies.gradient(optax.sgd(0.1))
    wrapped = wrappers.reparameterized(inner, transform=jnp.exp, inverse=jnp.log)
    result = minimize(lambda x: jnp.sum((x - 3.0) ** 2), start, wrapped, generations=1)
    expected = np.exp(np.log(start) - 0.1 * start * 2 * (start - 3))
    np.testing.assert_allclose(result.recommended, expected, rtol=1e-5)
