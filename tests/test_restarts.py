"""When a run of `ipop` and `bipop` ends, on states that are made by hand: what a whole search passes too rarely."""

import jax
import jax.numpy as jnp
import pytest

from evoopt.strategies import cma_es
from evoopt.wrappers import ipop
from evoopt.wrappers.stopping import TOLXSTAGNATION, Extremes, Stop

KEY = jax.random.key(0)
WIDE = Extremes(jnp.float32(0.0), jnp.float32(1.0), jnp.int32(8))  # best and worst value of a generation


@pytest.mark.parametrize(("generation", "stop"), [(9, Stop.NONE), (10, Stop.TOLFUNHIST), (500, Stop.TOLFUNHIST)])
def test_a_flat_history_counts_from_its_tenth_value(generation, stop):
    strategy = ipop(cma_es(8), 8, tolfunhist=1e-3)
    state = strategy.init(jnp.ones(3), KEY)
    state = state._replace(generation=jnp.int32(generation), recent_best=jnp.ones_like(state.recent_best))
    assert Stop(int(strategy._reason(state, WIDE))) is stop


@pytest.mark.parametrize(
    ("moved", "stays", "anchored"), [(1.5, 4, True), (3.0, 4, False), (1.5, 1, False), (0.9, 1, True)]
)
def test_the_allowance_grows_with_the_root_of_the_time_that_the_mean_stayed(moved, stays, anchored):
    """Of `stays` times 60 generations, in the 400th."""
    strategy = ipop(cma_es(8), 8)
    state = strategy.init(jnp.zeros(3), KEY)
    since = jnp.int32(400 - 60 * stays)
    state = state._replace(
        generation=jnp.int32(399), anchored=since, anchor=jnp.zeros(3).at[1].set(moved * TOLXSTAGNATION)
    )
    new, _ = strategy._observe(state, strategy.ask(state, KEY), jnp.arange(8.0))
    assert int(new.anchored) == (since if anchored else 400)
