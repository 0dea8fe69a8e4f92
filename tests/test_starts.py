"""`minimize(..., starts=n)`: several runs of which the best is the result."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import minimize, strategies, wrappers
from evoopt.run.checkpoint import digest

REFUSED = r"(?s)expected .*got .*usual cause"


def hills(x):
    """Two valleys, the deeper one far from the start; with no zero and no symmetry."""
    near, far = jnp.sum((x - 0.3) ** 2) + 1.5, 0.5 * jnp.sum((x + 4.0) ** 2) + 0.25
    return jnp.minimum(near, far)


def test_the_best_of_several_starts_is_the_result():
    start = lambda key: jax.random.uniform(key, (3,), minval=-6.0, maxval=1.0)
    alone = minimize(hills, jnp.zeros(3), strategies.cma_es(8, sigma=0.2), generations=150)
    found = minimize(hills, jnp.zeros(3), strategies.cma_es(8, sigma=0.2), generations=150, starts=6, start=start)
    assert alone.best_value > 1.4
    assert found.best_value < 0.26
    np.testing.assert_allclose(found.best, -4.0, atol=1e-2)
    values = [s.best_value for s in found.starts]
    assert (len(values), min(values)) == (6, found.best_value)
    assert max(values) > 1.4
    assert found.evaluations == sum(s.evaluations for s in found.starts)
    best = found.starts[int(np.argmin(values))]
    assert (best.reason, best.why, best.generations) == (found.reason, found.why, found.generations)
    assert len(found.history) == found.generations
    assert found.history[-1]["evaluations"] == best.evaluations
    assert digest(found.starts[0].x0) == digest(jnp.zeros(3))
    again = pickle.loads(pickle.dumps(found))
    assert digest([s.key for s in again.starts]) == digest([s.key for s in found.starts])


def test_each_run_is_the_one_it_would_be_alone():
    strategy = wrappers.bounded(strategies.cma_es(6, sigma=0.5), -5.0, 5.0)
    options = {"generations": 30, "stop": None}
    found = minimize(hills, jnp.zeros(2), strategy, starts=4, **options)
    for run in found.starts:
        alone = minimize(hills, run.x0, strategy, key=run.key, **options)
        np.testing.assert_allclose(run.best_value, alone.best_value, rtol=1e-4)
        np.testing.assert_allclose(run.best, alone.best, rtol=1e-3, atol=1e-3)
        assert (run.evaluations, run.generations, run.reason) == (alone.evaluations, 30, "generations")
    first = minimize(hills, jnp.zeros(2), strategy, **options)
    np.testing.assert_allclose(found.starts[0].best_value, first.best_value, rtol=1e-4)
    assert len({digest(np.asarray(s.x0)) for s in found.starts}) == 4
    assert all((np.abs(s.x0) <= 5).all() for s in found.starts)


def test_host_objectives_go_one_after_the_other_with_the_same_bits_as_alone():
    calls = []

    def f(x):
        calls.append(1)
        return float(hills(x))

    strategy = strategies.cma_es(6, sigma=0.5)
    found = minimize(f, np.zeros(2), strategy, evaluations=200, starts=3, jit=False)
    assert len(calls) == found.evaluations <= 200
    for run in found.starts:
        alone = minimize(f, run.x0, strategy, key=run.key, evaluations=200 // 3, jit=False)
        assert digest(alone.best) == digest(run.best)
        assert (alone.best_value, alone.reason) == (run.best_value, run.reason)


@pytest.mark.parametrize("jit", [True, False])
def test_all_end_where_one_reaches_the_target(jit):
    f = hills if jit else lambda x: float(hills(x))
    options = {"generations": 400, "target": 1.6, "starts": 4, "jit": jit}
    found = minimize(f, np.full(2, 0.5), strategies.cma_es(6, sigma=0.3), **options)
    assert found.reason == "target"
    assert found.best_value <= 1.6
    if jit:
        assert {s.reason for s in found.starts} <= {"target", "another"}
        assert len({s.generations for s in found.starts}) == 1, "together"


def test_the_evaluations_are_shared():
    found = minimize(hills, jnp.zeros(2), strategies.cma_es(6), evaluations=100, starts=4, stop=None)
    assert [s.evaluations for s in found.starts] == [24] * 4
    assert found.reason == "evaluations"


def test_starts_that_cannot_be():
    strategy = strategies.cma_es(6)
    with pytest.raises(ValueError, match=REFUSED):
        minimize(hills, jnp.zeros(2), strategy, generations=5, starts=0)
    with pytest.raises(ValueError, match=REFUSED):
        minimize(hills, jnp.zeros(2), strategy, starts=3)
    with pytest.raises(ValueError, match=REFUSED):
        minimize(hills, jnp.zeros(2), strategy, evaluations=12, starts=3)
    with pytest.raises(ValueError, match=REFUSED):
        minimize(hills, jnp.zeros(2), strategy, generations=5, starts=3, run=object())
