"""When a run of `ipop` and `bipop` ends, on states that are made by hand: what a whole search passes too rarely."""

import jax
import jax.numpy as jnp
import pytest

from evoopt import stopping
from evoopt.stopping import Stop
from evoopt.strategies import cma_es
from evoopt.wrappers import ipop

KEY = jax.random.key(0)


@pytest.mark.parametrize(("generation", "stop"), [(9, Stop.NONE), (10, Stop.TOLFUNHIST), (500, Stop.TOLFUNHIST)])
def test_a_flat_history_counts_from_its_tenth_value(generation, stop):
    strategy = ipop(cma_es(8), 8, tolfunhist=1e-3)
    state = strategy.init(jnp.ones(3), KEY)
    watch = state.watch._replace(
        generation=jnp.int32(generation), spread=jnp.float32(1), anchored=jnp.int32(generation)
    )
    watch = watch._replace(recent_best=jnp.ones_like(watch.recent_best))
    width = strategy.strategy.dispersion(state.search, watch.generation)
    assert Stop(int(stopping.first(stopping.met(watch, width, 3, jnp.int32(8), strategy.stops)))) is stop


@pytest.mark.parametrize(
    ("moved", "stays", "anchored"), [(1.5, 4, True), (3.0, 4, False), (1.5, 1, False), (0.9, 1, True)]
)
def test_the_allowance_grows_with_the_root_of_the_time_that_the_mean_stayed(moved, stays, anchored):
    """Of `stays` times 60 generations, in the 400th."""
    strategy = ipop(cma_es(8), 8)
    state = strategy.init(jnp.zeros(3), KEY)
    since = jnp.int32(400 - 60 * stays)
    away = jnp.zeros(3).at[1].set(moved * strategy.stops.tolxstagnation)
    watch = state.watch._replace(generation=jnp.int32(399), anchored=since, anchor=away)
    new, _ = strategy._observe(state._replace(watch=watch), strategy.ask(state, KEY), jnp.arange(8.0))
    assert int(new.watch.anchored) == (since if anchored else 400)
