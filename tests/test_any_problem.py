"""One strategy of each family on every kind of problem, and every strategy on a space, as far as shapes tell."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES

from evoopt import minimize, noise, spaces, strategies, trees, wrappers
from evoopt.spaces import categorical, conditional, integer, real

FAMILIES = {
    "gaussian": lambda: strategies.snes(8),
    "covariance": lambda: strategies.cma_es(8),
    "populations": lambda: strategies.differential_evolution(8),
    "zeroth_order": lambda: strategies.mezo(4, sigma=0.1, learning_rate=0.05),
    "local": lambda: strategies.hill_climbing(8),
    "first_order": lambda: strategies.gradient(optax.adam(0.1)),
    "adapters": lambda: strategies.from_evosax("PSO", 8),
}
REAL_ONLY = {"zeroth_order": "genomes are keys", "first_order": "derivatives"}
FAMILY = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES]

MIXED = {
    "kernel": categorical(["linear", "rbf", "poly"]),
    "gamma": conditional(real(1e-3, 10.0, log=True), on="kernel", equal="rbf"),
    "degree": integer(1, 6),
    "shift": real(low=-1.0),
}


def mixed(candidate):
    """Best at the rbf kernel (1), degree 4, gamma 0.5, shift at its wall."""
    gamma = jnp.where(candidate["kernel"] == 1, jnp.log(candidate["gamma"] / 0.5) ** 2, 3.0)
    whole = (candidate["degree"].astype(jnp.float32) - 4.0) ** 2
    return gamma + whole + (candidate["shift"] + 2.0) ** 2


@pytest.mark.parametrize("family", FAMILY)
def test_a_mixed_space(family):
    strategy = FAMILIES[family]()
    if family in REAL_ONLY:
        with pytest.raises(ValueError, match=REAL_ONLY[family]) as refused:
            minimize(mixed, MIXED, strategy, generations=1)
        assert str(refused.value).startswith("expected") and "usual cause" in str(refused.value)
        return
    result = minimize(mixed, MIXED, strategy, generations=30, key=2)
    space = spaces.Space(MIXED)
    assert space.contains(result.best) and space.contains(result.recommended)
    assert ("gamma" in result.best) == (result.best["kernel"] == "rbf")
    assert result.best_value < float(mixed(space.decode(space.origin())))


@pytest.mark.parametrize("family", FAMILY)
def test_one_sided_bounds(family):
    strategy = wrappers.bounded(FAMILIES[family](), lower=[0.5, -jnp.inf])
    result = minimize(lambda x: jnp.sum((x + 0.25) ** 2), jnp.array([1.0, 0.75]), strategy, generations=20, key=1)
    assert result.best[0] >= 0.5 and result.recommended[0] >= 0.5
    assert result.best_value < 2.5625
"""Every strategy: what a candidate is, which are asked, and that none is made, stay as they are over a space."""


def rows():
    return [pytest.param(name, id=name.replace(" ", "-")) for name in CASES]


REALS = spaces.Space({"b": real(), "w": real(shape=(3, 2), scale=2.0)})


@pytest.mark.parametrize("name", rows())
def test_over_a_space_a_population_is_what_it_was(name):
    case = CASES[name]
    strategy = case.make()
    over = spaces.over(strategy, REALS)
    key = jax.random.key(0)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    origin = trees.strong(REALS.origin())
    state = jax.eval_shape(lambda key: trees.strong(over.init(origin, key)), key)
    population = jax.eval_shape(over.ask, state, key)
    alone = jax.eval_shape(lambda key: strategy.ask(strategy.init(origin, key), key), key)
    assert len(population) == len(alone)
    assert (population.active is None) == (alone.active is None)
    if hasattr(alone.decode, "virtual"):
        assert hasattr(population.decode, "virtual")
    n = len(population)
    halved = population.with_active(jax.ShapeDtypeStruct((n,), bool))
    answers = jax.eval_shape(
        lambda population: population.map(over.oracle(lambda p: p["b"] ** 2 + (p["w"] ** 2).sum())), halved
    )
    again = jax.eval_shape(over.tell, state, halved, answers)
    assert shapes(again) == shapes(state)
