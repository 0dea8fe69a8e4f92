"""One strategy of each family on every kind of problem, and every strategy on a space, as far as shapes tell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import CASES

from evoopt import minimize, spaces, strategies, trees, wrappers
from evoopt.answers import Answer
from evoopt.spaces import categorical, conditional, integer, real
from evoopt.stopping import Stop

FAMILIES = {
    "gaussian": lambda: strategies.snes(8),
    "covariance": lambda: strategies.cma_es(),
    "populations": lambda: strategies.differential_evolution(8),
    "zeroth_order": lambda: strategies.mezo(4, sigma=0.1, learning_rate=0.05),
    "local": lambda: strategies.hill_climbing(8),
    "first_order": lambda: strategies.gradient(optax.adam(0.1)),
    "adapters": lambda: strategies.from_evosax("PSO", 8),
}
REAL_ONLY = {"zeroth_order": "genomes are keys", "first_order": "derivatives"}
FAMILY = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES]
START = jnp.array([1.0, 0.75])
STOPPED = {stop.name.lower() for stop in Stop}

MIXED = {
    "kernel": categorical(["linear", "rbf", "poly"]),
    "gamma": conditional(real(1e-3, 10.0, log=True), on="kernel", equal="rbf"),
    "degree": integer(1, 6),
    "shift": real(low=-1.0),
}
REALS = spaces.Space({"b": real(), "w": real(shape=(3, 2), scale=2.0)})


def mixed(candidate):
    """Best at the rbf kernel (1), degree 4, gamma 0.5, shift at its wall."""
    gamma = jnp.where(candidate["kernel"] == 1, jnp.log(candidate["gamma"] / 0.5) ** 2, 3.0)
    whole = (candidate["degree"].astype(jnp.float32) - 4.0) ** 2
    return gamma + whole + (candidate["shift"] + 2.0) ** 2


def bowl(x):
    return jnp.sum((x + 0.25) ** 2)


@pytest.mark.parametrize("family", FAMILY)
def test_a_mixed_space(family):
    strategy = FAMILIES[family]()
    if family in REAL_ONLY:
        with pytest.raises(ValueError, match=REAL_ONLY[family]) as refused:
            minimize(mixed, MIXED, strategy, generations=1)
        assert str(refused.value).startswith("expected")
        assert "usual cause" in str(refused.value)
        return
    result = minimize(mixed, MIXED, strategy, generations=30, key=2)
    space = spaces.Space(MIXED)
    assert space.contains(result.best)
    assert space.contains(result.recommended)
    assert ("gamma" in result.best) == (result.best["kernel"] == "rbf")
    assert result.best_value < float(mixed(space.decode(space.origin())))


@pytest.mark.parametrize("family", FAMILY)
def test_one_sided_bounds(family):
    strategy = wrappers.bounded(FAMILIES[family](), lower=[0.5, -jnp.inf])
    result = minimize(bowl, START, strategy, generations=20, key=1)
    assert result.best[0] >= 0.5
    assert result.recommended[0] >= 0.5
    assert result.best_value < 2.5625


@pytest.mark.parametrize("family", FAMILY)
def test_a_constraint(family):
    rules = (
        wrappers.feasibility_rules if family in ("populations", "local", "adapters") else wrappers.augmented_lagrangian
    )
    strategy = rules(FAMILIES[family](), 1)
    outside = lambda x: Answer(bowl(x), violation=0.5 - x[:1])  # x[0] >= 0.5
    result = minimize(outside, START, strategy, generations=40, key=1)
    assert result.feasible
    assert result.violation == 0.0
    assert result.best[0] >= 0.5
    assert 0.5625 <= result.best_value < 2.5625
    assert "feasible" in str(result)


@pytest.mark.parametrize("family", [name for name in FAMILY if name.values[0] != "first_order"])
def test_noise(family):
    noise = lambda x, key, own: bowl(x) + 0.1 * jax.random.normal(own)
    renewed = lambda key, aux: jax.random.fold_in(key, 1)
    strategy = wrappers.noisy(FAMILIES[family](), confirmations=4)
    options = {"context": jax.random.key(1), "each": jax.random.split, "update": renewed}
    result = minimize(noise, START, strategy, generations=20, key=1, **options)
    assert (result.best == result.recommended).all()  # what was evaluated again
    assert float(bowl(result.recommended)) < 2.5625


@pytest.mark.parametrize("family", FAMILY)
def test_a_search_ends_by_itself_or_goes_on(family):
    flat = lambda x: 0.0 * jnp.sum(x)  # nothing to learn
    result = minimize(flat, START, FAMILIES[family](), generations=400, key=1)
    on = minimize(flat, START, FAMILIES[family](), generations=400, key=1, stop=None)
    assert on.reason == "generations"
    assert result.reason == "generations" or (result.reason in STOPPED and result.why)


def rows():
    return [pytest.param(name, id=name.replace(" ", "-")) for name in CASES]


@pytest.mark.parametrize("name", rows())
def test_over_a_space_a_population_is_what_it_was(name):
    """What a candidate is, which are asked, and that none is made: nothing of it is lost."""
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
