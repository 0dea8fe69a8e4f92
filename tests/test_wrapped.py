"""Every wrapper around a strategy that asks for fewer candidates than it has places, and around a virtual one.

A wrapper must neither evaluate, nor count, nor hand out what is not active, and must not make a model that the strategy
inside never makes. What each wrapper has to make is listed here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import Session, minimize, noise, spaces, strategies, trees, virtual, wrappers
from evoopt.population import Population
from evoopt.recipes.black_box_tuning import black_box_tuning
from evoopt.types import pytree

X0 = {"b": np.full(2, 0.5, np.float32), "w": np.full((2, 3), 0.5, np.float32)}  # two blocks
KEY = jax.random.key(3)


@pytree
class Half:
    """SNES that asks about every second candidate; it has a sigma, so it can be restarted."""

    strategy: Any
    sigma: float = 1.0

    oracle = staticmethod(strategies.snes(8).oracle)

    def init(self, params, key):
        return self.strategy.init(params, key)

    def ask(self, state, key):
        population = self.strategy.ask(state, key)
        return population.with_active(jnp.arange(len(population)) % 2 == 0)

    def tell(self, state, population, answers):
        return self.strategy.tell(state, population, answers)

    def recommend(self, state):
        return self.strategy.recommend(state)


def double(tree):
    return jax.tree.map(lambda x: 2 * x, tree)


def halve(tree):
    return jax.tree.map(lambda x: x / 2, tree)


def constant(steps):
    return 1.0 + 0.0 * steps


def scheduled(strategy):
    field = "sigma" if hasattr(strategy, "sigma") else "spread" if hasattr(strategy, "spread") else "factor"
    return wrappers.scheduled(strategy, **{field: constant})


WRAPPED = {
    "adaptive_popsize": wrappers.adaptive_popsize,
    "alternating": wrappers.alternating,
    "augmented_lagrangian": functools.partial(wrappers.augmented_lagrangian, equality=0),
    "averaged": functools.partial(wrappers.averaged, window=20),
    "best_so_far": wrappers.best_so_far,
    "bipop": functools.partial(wrappers.bipop, popsize=4),
    "bounded": functools.partial(wrappers.bounded, lower=-1.0, upper=1.0),
    "choices": functools.partial(wrappers.choices, options={"b": 5, "w": 5}),
    "feasibility_rules": functools.partial(wrappers.feasibility_rules, equality=0),
    "ipop": functools.partial(wrappers.ipop, popsize=4),
    "masked": functools.partial(wrappers.masked, mask={"b": False, "w": True}),
    "noisy": wrappers.noisy,
    "penalized_bounds": functools.partial(wrappers.penalized_bounds, lower=-1.0, upper=1.0),
    "portfolio": wrappers.portfolio,
    "reevaluated": functools.partial(wrappers.reevaluated, most=2),
    "reparameterized": functools.partial(wrappers.reparameterized, transform=double, inverse=halve),
    "repeated": functools.partial(wrappers.repeated, k=2),
    "resampled": functools.partial(wrappers.resampled, lower=-1.0, upper=1.0),
    "rounded": wrappers.rounded,
    "scheduled": scheduled,
    "smoothed": functools.partial(wrappers.smoothed, lower=-1.0, upper=1.0),
    "subspace": functools.partial(wrappers.subspace, dimension=4),
    "surrogate": functools.partial(wrappers.surrogate, parallel=3),
}
RESTARTS = ("bipop", "ipop")
OF_DISTRIBUTIONS = ("penalized_bounds",)  # they refuse what has none, as restarts have and as L-SHADE has
ANSWERED_MORE = ("adaptive_popsize", "noisy", "reevaluated", "repeated", "surrogate")  # they ask for another number


def test_every_wrapper_is_here():
    assert set(WRAPPED) == set(wrappers.__all__), "a wrapper that is not tried around shrinking and virtual strategies"


def counted(strategy, start, generations=4):
    """Calls of the objective and what `minimize` counted, a generation each."""
    calls = []

    def f(x):
        calls.append(1)
        return float(sum(np.sum((np.asarray(leaf) - 0.25) ** 2) for leaf in jax.tree.leaves(x)))

    result = minimize(f, start, strategy, generations=generations, jit=False)
    totals = [0, *(row["evaluations"] for row in result.history)]
    assert len(calls) == result.evaluations == totals[-1]
    return np.diff(totals).tolist()


INNER = {
    "l_shade": (functools.partial(strategies.l_shade, 12, budget=36), [12, 9, 7, 6]),
    "ipop": (lambda: wrappers.ipop(strategies.snes(16), 4), [4, 4]),
}


def asked(strategy, start, generations=4):
    """How many candidates each generation asks about, in one program."""

    def generation(state, key):
        population = strategy.ask(state, key)
        return strategy.tell(state, population, jnp.arange(len(population), dtype=jnp.float32)), population.asked()

    run = lambda keys: jax.lax.scan(generation, trees.strong(strategy.init(start, KEY)), keys)[1]
    return jax.jit(run)(jax.random.split(KEY, generations)).tolist()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", [name for name in WRAPPED if name not in RESTARTS + ANSWERED_MORE + OF_DISTRIBUTIONS])
def test_only_what_is_active_is_asked_for(name, inner):
    make, sizes = INNER[inner]
    strategy = WRAPPED[name](make())
    start = {"b": np.zeros(2, np.int32), "w": np.zeros((2, 3), np.int32)} if name == "choices" else X0
    if name == "alternating":  # two blocks in turn, each of which shrinks by itself
        sizes = [n for n in sizes for _ in range(2)][: len(sizes)]
    assert asked(strategy, start, len(sizes)) == sizes


def test_what_is_asked_again_is_of_what_is_active():
    for name, (make, sizes) in INNER.items():
        assert asked(wrappers.repeated(make(), 2), X0, len(sizes)) == [2 * n for n in sizes], name
    once = wrappers.reevaluated(wrappers.ipop(strategies.snes(16), 4), 2)
    assert asked(once, X0, 1) == asked(wrappers.noisy(wrappers.ipop(strategies.snes(16), 4)), X0, 1) == [4 + 2]
    adapted = wrappers.adaptive_popsize(wrappers.ipop(strategies.cma_es(16), 4))
    assert asked(wrappers.surrogate(wrappers.ipop(strategies.snes(16), 4), parallel=3), X0, 1) == [4]
    assert asked(wrappers.surrogate(Half(strategies.snes(8)), parallel=3), X0, 1) == [4]
    assert asked(adapted, X0, 1) == asked(wrappers.noisy(wrappers.ipop(strategies.cma_es(16), 4)), X0, 1) == [4]


def test_only_what_is_active_is_evaluated_and_counted():
    make, sizes = INNER["l_shade"]
    strategy = wrappers.masked(wrappers.bounded(make(), -1.0, 1.0), {"b": False, "w": True})
    assert counted(strategy, X0) == sizes
    generation = Session(strategy, X0).ask()
    assert len(list(generation)) == len(generation) == int(generation.population.asked()) == sizes[0]


@pytest.mark.parametrize("name", RESTARTS)
def test_restarts_ask_about_what_the_strategy_inside_asks(name):
    strategy = WRAPPED[name](Half(strategies.snes(8)))
    assert counted(strategy, X0) == [2, 2, 2, 2]  # of the first 4, every second one
    loop = Session(wrappers.bounded(strategy, -1.0, 1.0), X0)
    for _ in range(2):
        loop.tell(loop.ask(), iter([1.0, 2.0]))
    assert int(strategy.evaluations(loop.state)) == 4


def test_a_box_around_black_box_tuning():
    strategy = wrappers.bounded(black_box_tuning(6, dimension=3), [[-1.0] * 6] * 2)
    assert asked(strategy, np.zeros((2, 6), np.float32)) == [6] * 4


def test_a_population_changes_only_what_it_is_asked_to():
    population = Population(lambda g: g, jnp.arange(4.0), jnp.array([True, False, True, False]))
    other = population.with_decode(lambda g: -g)
    assert [float(x) for x in other] == [0.0, -2.0]
    assert other.genomes is population.genomes
    assert (len(population), int(population.asked()), population.places().tolist()) == (4, 2, [0, 2])
    assert float(population[np.int64(3)]) == 3.0
    assert [float(x) for x in population[1:]] == [2.0]


# --- virtual candidates

MODEL = {
    "head": np.full((32, 40), 0.01, np.float32),
    "layers": np.full((3, 32, 32), 0.02, np.float32),
    "scale": np.ones(32, np.float32),
}
INPUT = jnp.ones((2, 32))


def network(params, x=INPUT):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return jnp.sum((x * params["scale"]) @ params["head"])


def probes(n=2):
    return strategies.mezo(n, sigma=0.05, learning_rate=0.01, noise=noise.LowRank(2))


def made(strategy):
    """What `network` makes of a candidate's leaves: {name: shape}; leaves that were never virtual too. Only traced."""
    log = virtual.Log()

    def run(strategy, key):  # bounds and everything else are traced, as in a program that is given its strategy
        population = strategy.ask(strategy.init(MODEL, key), key)
        decode = population.decode
        candidate = getattr(decode, "virtual", decode)(jax.tree.map(lambda g: g[0], population.genomes))
        logged = lambda x: dataclasses.replace(x, about=x.about._replace(log=log)) if virtual.is_virtual(x) else x
        candidate = jax.tree.map(logged, candidate, is_leaf=virtual.is_virtual)
        for name in ("head", "layers"):
            if not virtual.is_virtual(candidate[name]):
                log.found.append(virtual.Materialised(name, "", "", candidate[name].shape))
        return virtual.call(network, candidate)

    jax.eval_shape(run, strategy, KEY)
    return {found.leaf: found.shape for found in log.found}


ALL = {"head": (32, 40), "layers": (3, 32, 32)}
LAYERS = {"head": (32, 40), "layers": (32, 32)}  # of the stack one layer at a time
MADE = {
    # wrapper -> (how, what is made)
    "averaged": (WRAPPED["averaged"], {}),
    "best_so_far": (WRAPPED["best_so_far"], {}),
    "bipop": (functools.partial(wrappers.bipop, popsize=2), {}),
    "ipop": (functools.partial(wrappers.ipop, popsize=2), {}),
    "bounded": (WRAPPED["bounded"], LAYERS),
    "bounded nowhere": (functools.partial(wrappers.bounded, lower=-np.inf, upper=np.inf), {}),
    "bounded by None": (wrappers.bounded, {}),
    "bounded head": (
        functools.partial(wrappers.bounded, lower={"head": -0.02, "layers": None, "scale": -np.inf}),
        {"head": (32, 40)},
    ),
    "bounded stack on one side": (
        functools.partial(wrappers.bounded, upper={"head": np.full((32, 40), np.inf), "layers": 0.03, "scale": None}),
        {"layers": (32, 32)},
    ),
    "bounded by an array": (
        functools.partial(wrappers.bounded, lower={"head": None, "layers": np.full((32, 1), -1.0), "scale": None}),
        {"layers": (3, 32, 32)},
    ),
    "masked": (
        functools.partial(wrappers.masked, mask={"head": False, "layers": True, "scale": True}),
        {"head": (32, 40)},  # never virtual: it is not searched
    ),
    "reparameterized": (
        functools.partial(wrappers.reparameterized, transform=lambda p: {**p, "scale": 2 * p["scale"]}, inverse=dict),
        {},
    ),
    "reparameterized by exp": (
        functools.partial(
            wrappers.reparameterized,
            transform=lambda p: {**p, "head": jnp.exp(p["head"])},
            inverse=lambda p: {**p, "head": jnp.log(p["head"])},
        ),
        {"head": (32, 40)},
    ),
    "augmented_lagrangian": (WRAPPED["augmented_lagrangian"], {}),
    "feasibility_rules": (WRAPPED["feasibility_rules"], {}),
    "penalized_bounds": (None, ALL),  # of a distribution, which no large model has
    "portfolio": (None, ALL),  # candidates of several strategies as rows of one array
    "resampled": (WRAPPED["resampled"], LAYERS),
    "smoothed": (WRAPPED["smoothed"], ALL),
    "noisy": (wrappers.noisy, {}),
    "reevaluated": (WRAPPED["reevaluated"], {}),
    "repeated": (WRAPPED["repeated"], {}),
    "adaptive_popsize": (None, ALL),  # of a covariance, which no large model has
    "rounded": (WRAPPED["rounded"], {}),
    "scheduled": (lambda s: wrappers.scheduled(s, learning_rate=constant), {}),
    "subspace": (WRAPPED["subspace"], ALL),  # a sum of directions, each drawn and added
    "surrogate": (None, ALL),  # of a model with terms for each pair of parameters
    "alternating": (None, ALL),  # a block is put into the others
    "choices": (None, ALL),  # options are no perturbed weights
}


def test_what_every_wrapper_makes_is_listed():
    assert {name.split()[0] for name in MADE} == set(wrappers.__all__)


@pytest.mark.parametrize("name", [name for name, (wrap, _) in MADE.items() if wrap])
def test_what_is_made_of_a_virtual_model(name):
    wrap, expected = MADE[name]
    assert made(wrap(probes())) == expected


def test_a_model_that_is_searched_as_a_space_is_not_made():
    layers = {name: spaces.real(shape=x.shape, scale=2.0) for name, x in MODEL.items()}
    assert made(spaces.over(probes(), spaces.Space(layers))) == {}
    walls = layers | {"head": spaces.real(-1.0, 1.0, shape=MODEL["head"].shape)}
    assert made(spaces.over(probes(), spaces.Space(walls))) == {"head": (32, 40)}


@pytest.mark.parametrize("name", ["bounded", "reparameterized by exp"])
def test_a_virtual_model_has_the_values_of_its_arrays(name):
    strategy = MADE[name][0](probes())

    @jax.jit
    def values(key):
        population = strategy.ask(strategy.init(MODEL, key), key)
        return population.map(network), population.with_decode(lambda g: population.decode(g)).map(network)

    as_virtual, dense = values(KEY)
    np.testing.assert_allclose(as_virtual, dense, rtol=2e-5)
    assert float(jnp.ptp(dense)) > 0


def test_a_virtual_leaf_between_walls_is_what_its_array_is():
    """Whatever a model does with it: linear rules of virtual leaves must not pass by the walls."""
    uses = {
        "scaled": lambda w, x: x @ (w * 2), "divided": lambda w, x: x @ (w / 8), "negative": lambda w, x: x @ -w,
        "shifted": lambda w, x: x @ (w + 1), "less": lambda w, x: x @ (1 - w), "transposed": lambda w, x: x @ w.T,
        "rows": lambda w, x: w[jnp.array([0, 5, -1])] @ x[0], "cut": lambda w, x: x[:, :8] @ w[:8],
        "strided": lambda w, x: x[:, ::2] @ w[::2], "half": lambda w, x: x.astype("bfloat16") @ w.astype("bfloat16"),
        "joined": lambda w, x: x @ jnp.concatenate([w, w], axis=1), "reshaped": lambda w, x: w.reshape(-1)[:32] @ x[0],
        "summed": lambda w, x: w.sum(0) @ x[0], "split": lambda w, x: x @ jnp.split(w, 2, axis=1)[1],
    }  # fmt: skip
    for kind in (noise.LowRank(2), noise.gaussian):
        leaf = virtual.perturbed({"w": jnp.full((32, 32), 0.1)}, kind, kind.addresses(KEY, 1)[0], 1.0)["w"]
        walled = virtual.folded(leaf, -0.2, 0.3)
        array = walled.materialise()
        assert float(array.min()) >= -0.2 and float(array.max()) <= 0.3  # noqa: PT018
        got = jax.jit(lambda: {name: virtual.call(use, walled, INPUT) for name, use in uses.items()})()  # noqa: B023
        for name, use in uses.items():
            np.testing.assert_allclose(got[name], use(array, INPUT), rtol=2e-2 if name == "half" else 1e-4, atol=1e-4)
