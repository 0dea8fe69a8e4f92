"""Four virtual devices give the bits of one."""

import jax
import jax.numpy as jnp
import pytest
from cases import CASES
from conftest import START, quadratic

from evoopt import minimize, strategies
from evoopt.distributed import LocalEvaluator, ShardedEvaluator, sharded_map
from evoopt.run.checkpoint import digest


@pytest.mark.parametrize(
    "name",
    [
        "openai_es",
        "deep_ga",
        "openai_es regenerated",
        "openai_es orthogonal",
        "pgpe",
        "snes",
    ],
)
def test_sharded_is_unsharded_bit_for_bit(name):
    assert jax.device_count() == 4
    strategy = CASES[name].make()
    mesh = lambda n: jax.sharding.Mesh(jax.devices()[:n], ("population",))
    states = {}
    for devices in (1, 2, 4):
        state = strategy.init(START, jax.random.key(0))
        for i in range(3):
            population = jax.jit(strategy.ask)(state, jax.random.key(i))
            values = sharded_map(population, strategy.oracle(quadratic), batch_size=4, mesh=mesh(devices))
            state = jax.jit(strategy.tell)(state, population, jax.device_put(values, jax.devices()[0]))
        states[devices] = digest(state)
    assert len(set(states.values())) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: strategies.snes(12),
        lambda: strategies.l_shade(12, budget=36),  # not all are active
    ],
)
def test_a_run_over_devices_has_the_bits_of_one(make):
    states = set()
    for evaluator in (LocalEvaluator(), *(ShardedEvaluator(jax.devices()[:n]) for n in (1, 2, 4))):
        with evaluator:
            found = minimize(quadratic, START, make(), generations=3, evaluator=evaluator, batch_size=2)
        states.add(digest(jax.device_get((found.state, found.best))))
    assert len(states) == 1
    with pytest.raises(ValueError, match="jit=False"):
        minimize(lambda x: 0.0, START, strategies.snes(4), generations=1, jit=False, evaluator=ShardedEvaluator())
    with pytest.raises(ValueError, match="divide the 4 devices"):
        ShardedEvaluator(rows=3)


def test_populations_that_do_not_divide_are_padded():
    strategy = CASES["snes"].make()
    population = strategy.ask(strategy.init(START, jax.random.key(0)), jax.random.key(1))[:13]
    each = jnp.arange(13.0)
    values = sharded_map(population, lambda p, shift, e: quadratic(p) + shift + e, 100.0, each=each, batch_size=2)
    expected = population.map(lambda p, e: quadratic(p) + 100.0 + e, each=each, batch_size=2)
    assert values.shape == (13,)
    assert jnp.allclose(values, expected)
