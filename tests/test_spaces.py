"""Spaces: every candidate is inside, encode is the inverse of decode, and every strategy searches every variable."""

from __future__ import annotations

import functools
import importlib.util
import math
import pickle
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import Run, Session, minimize, strategies, wrappers
from evoopt.spaces import (
    Space,
    boolean,
    categorical,
    conditional,
    integer,
    numbers,
    over,
    permutation,
    real,
    simplex,
    whole,
)
from evoopt.spaces import categories as cats

THREE = r"(?s)expected .*\ngot .*\nusual cause: "


def random_variable(rng):
    """A variable of any kind; shapes are few, so that few programs are compiled."""
    low = float(np.float32(rng.normal() * 10.0 ** rng.integers(-3, 4)))
    high = low + float(np.float32(abs(rng.normal()) * 10.0 ** rng.integers(-3, 4) + 1e-3 * abs(low) + 1e-3))
    shape = [(), (), (2,)][rng.integers(3)]
    kind = rng.integers(12)
    if kind == 0:
        return real(low, high, shape=shape)
    if kind == 1:
        return real(low, shape=shape)
    if kind == 2:
        return real(high=high)
    if kind == 3:
        return real(start=low)
    if kind == 4:
        return real(abs(low) + 1e-6, (abs(low) + 1e-6) * 10.0 ** rng.uniform(0.1, 6), log=True, shape=shape)
    if kind == 5:
        return integer(int(low), int(low) + int(rng.integers(1, 10_000)), shape=shape)
    if kind == 6:
        return integer(1, int(rng.integers(2, 30_000)), log=True)
    if kind == 7:
        return categorical(["a", "b", "c", None][: rng.integers(2, 5)], shape=shape)
    if kind == 8:
        return categorical([0.1, 0.25, 10][: rng.integers(2, 4)])
    if kind == 9:
        return boolean(bool(rng.integers(2)))
    return permutation(4) if kind == 10 else simplex(3)


def random_space(rng):
    tree = {f"v{i}": random_variable(rng) for i in range(rng.integers(1, 6))}
    tree["kernel"] = categorical(["rbf", "poly", "none"])
    tree["deep"] = {"on": conditional(random_variable(rng), on="kernel", equal=("rbf", "poly")), "fixed": 2.5}
    tree["list"] = [conditional(boolean(), on="kernel", equal="rbf"), "text"]
    tree["twice"] = conditional(integer(1, 5), on="list/0", equal=True)
    return Space(tree)


def random_u(space, rng, n):
    """n points, some of them where no search should be."""
    u = {}
    for name, zero in space.origin().items():
        x = rng.normal(size=(n, *zero.shape)) * 10.0 ** rng.integers(-2, 3, size=(n, *(1,) * zero.ndim))
        x[0], x[1], x[2], x[3], x[4] = math.inf, -math.inf, math.nan, 3e38, -1e-38
        u[name] = x.astype(zero.dtype)
    return u


def is_inside(variable, x):
    """(n, ...) values as an objective in JAX gets them; independent of how they are made."""
    x = np.asarray(x)
    kind = type(variable).__name__
    if kind == "Real":
        low = -math.inf if variable.low is None else variable.low
        high = math.inf if variable.high is None else variable.high
        return np.isfinite(x).all() and (x.astype(float) >= low).all() and (x.astype(float) <= high).all()
    if kind == "Integer":
        return x.dtype == np.int32 and (x >= variable.low).all() and (x <= variable.high).all()
    if kind == "Categorical":
        allowed = np.arange(len(variable.choices), dtype=np.int32) if variable.table is None else variable.table
        return x.dtype == allowed.dtype and np.isin(x, allowed.astype(x.dtype)).all()
    if kind == "Permutation":
        return (np.sort(x, axis=-1) == np.arange(variable.n)).all()
    return (x >= 0).all() and np.allclose(x.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(("first", "spaces"), [(0, 12), pytest.param(12, 188, marks=pytest.mark.slow)])
def test_ten_thousand_candidates_of_two_hundred_spaces_are_inside_and_encode_is_the_inverse(first, spaces):
    for seed in range(first, first + spaces):
        rng = np.random.default_rng(seed)
        space = random_space(rng)
        candidates = jax.vmap(space.decode)(random_u(space, rng, 50))
        again = jax.vmap(space.decode)(jax.vmap(space.located)(candidates))
        flat = lambda tree: {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x)
                             for p, x in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip
        a, b = flat(candidates), flat(again)
        for name, variable in space.free.items():
            assert is_inside(variable, a[name]), (name, variable)
            if type(variable).__name__ in ("Real", "Simplex"):
                size = np.abs(a[name]) + np.abs(np.asarray(getattr(variable, "start", 1.0))) + 1e-37
                size = size + np.abs(a[name] * np.log(size)) if getattr(variable, "log", False) else size
                off = np.abs(a[name].astype(float) - b[name]) / size
                assert (off < 8 * np.finfo(np.float32).eps).all(), (name, variable, off.max())
            else:
                assert (a[name] == b[name]).all(), (name, variable)
        one = jax.tree.map(lambda x: np.asarray(x[7]), candidates)
        shown = space.presented(one)
        assert space.contains(shown)
        assert space.contains(one)
        assert ("on" in shown["deep"]) == (shown["kernel"] != "none")
        assert (shown["list"][0] is not None) == (shown["kernel"] == "rbf")
        assert ("twice" in shown) == bool(shown["list"][0])
        assert (shown["deep"]["fixed"], shown["list"][1]) == (2.5, "text")
        kept = pickle.loads(pickle.dumps(space))
        assert kept == space
        assert hash(kept) == hash(space)
        assert kept.presented(one).keys() == shown.keys()


def test_encode_of_what_python_sees():
    space = Space({"k": categorical([None, (1, 2), "x"]), "n": integer(-5, 5), "p": permutation(3), "b": boolean()})
    candidate = {"k": (1, 2), "n": -5, "p": [2, 0, 1], "b": True}
    shown = space.presented(jax.device_get(space.decode(space.encode(candidate))))
    assert shown["p"].tolist() == candidate["p"]
    assert {**shown, "p": 0} == {**candidate, "p": 0}
    assert type(shown["n"]) is int
    assert type(shown["b"]) is bool
    assert all((np.asarray(x) == 0).all() for x in space.encode(space.start()).values())


def test_the_start_is_where_u_is_0_and_one_unit_is_a_quarter_of_the_range():
    space = Space({"x": real(2.0, 6.0, start=5.0), "n": integer(0, 7), "e": real(1e-4, 1.0, log=True), "o": real(3.0)})
    assert space.start() == {"x": 5.0, "n": 3, "e": pytest.approx(1e-2), "o": 4.0}
    u = {name: x + 0.5 for name, x in space.origin().items()}
    moved = space.presented(jax.device_get(space.decode(u)))
    assert moved == {"x": 5.5, "n": 4, "e": pytest.approx(1e-2 * 1e4 ** (1 / 8)), "o": 6.0}


def test_what_does_not_exist_has_no_influence():
    space = Space({"k": categorical(["a", "b"]), "x": conditional(real(0.0, 1.0), on="k", equal="b")})
    u = lambda k, x: {"k": jnp.float32(k), "x": jnp.float32(x)}
    assert space.decode(u(0, 0.7)) == space.decode(u(0, -9.0)) == {"k": 0, "x": 0.5}
    assert space.decode(u(2, 0.8))["x"] == pytest.approx(0.7)
    assert space.presented(jax.device_get(space.decode(u(0, 0.7)))) == {"k": "a"}


def test_reals_stay_within_bounds_that_their_type_does_not_hold():
    low, high = 0.7, 0.7000001
    x = np.asarray(jax.vmap(real(low, high).decode)(jnp.linspace(-50, 50, 1001)))
    assert (x.astype(float) >= low).all()
    assert (x.astype(float) <= high).all()


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: real(1.0, 0.0), ValueError, "low <= high"),
        (lambda: real(0.0, math.nan), ValueError, "NaN"),
        (lambda: real("0", 1.0), TypeError, "low as a number"),
        (lambda: real(np.zeros(2), 1.0), TypeError, "low as a number"),
        (lambda: real(0.0, 1.0, log=True), ValueError, "low > 0 with log"),
        (lambda: real(0.0, 1.0, start=3.0), ValueError, "start within"),
        (lambda: real(0.0, 1.0, start=[0.1, 0.2]), ValueError, "shape"),
        (lambda: real(0.0, 1.0, scale=-1.0), ValueError, "scale > 0"),
        (lambda: integer(0, 2.5), ValueError, "whole"),
        (lambda: integer(5, 1), ValueError, "low <= high"),
        (lambda: integer(0, 2**40), ValueError, "2\\^30"),
        (lambda: integer(0, 5, log=True), ValueError, "low >= 1 with log"),
        (lambda: integer(0, 5, start=9), ValueError, "start within"),
        (lambda: categorical([]), ValueError, "at least one choice"),
        (lambda: categorical("abc"), TypeError, "list of choices"),
        (lambda: categorical([1, 2, 1]), ValueError, "all differ"),
        (lambda: categorical([[1], [2]]), TypeError, "hashable"),
        (lambda: categorical([1.0, math.nan]), ValueError, "NaN"),
        (lambda: categorical(["a", "b"], start="c"), ValueError, "one of"),
        (lambda: permutation(0), ValueError, "at least 1"),
        (lambda: simplex(1.5), ValueError, "whole"),
        (lambda: conditional(real(), on=3, equal=1), TypeError, "name of a variable"),
        (lambda: conditional(real(), on="k", equal=()), ValueError, "at least one value"),
        (lambda: Space({}), ValueError, "a tree of variables"),
        (lambda: Space({"a": {"b": real()}, "a/b": real()}), ValueError, "'a/b' twice"),
        (lambda: Space({"kernel": real(), "x": conditional(real(), on="kernl", equal=1)}), ValueError, "kernel"),
        (lambda: Space({"k": real(), "x": conditional(real(), on="k", equal=1)}), ValueError, "one choice"),
        (lambda: Space({"k": boolean(), "x": conditional(real(), on="k", equal="yes")}), ValueError, "one of"),
        (
            lambda: Space({"a": conditional(boolean(), "b", True), "b": conditional(boolean(), "a", True)}),
            ValueError,
            "a -> b -> a|b -> a -> b",
        ),
        (lambda: over(strategies.cma_es(8), {"a": 1.0}), ValueError, "something to search"),
        (lambda: over(strategies.deep_ga(8), {"n": integer(0, 5)}), ValueError, "genomes are keys"),
        (lambda: over(strategies.mezo(2), {"n": permutation(5)}), ValueError, "genomes are keys"),
        (lambda: over(strategies.gradient(None), {"n": boolean()}), ValueError, "derivatives"),
    ],
)
def test_bad_input_is_refused_in_three_parts(make, kind, says):
    with pytest.raises(kind, match=THREE) as raised:
        make()
    assert re.search(says, str(raised.value)), str(raised.value)


def test_bad_candidates_are_refused_in_three_parts():
    space = Space({"x": real(0.0, 1.0), "k": categorical(["rbf", "poly"]), "n": integer(1, 3)})
    good = {"x": 0.5, "k": "rbf", "n": 2}
    assert space.contains(good)
    for change in ({"x": 1.5}, {"x": "a"}, {"x": math.nan}, {"k": "rfb"}, {"n": 2.5}, {"n": 7}, {"m": 1}):
        with pytest.raises((ValueError, TypeError), match=THREE):
            space.encode({**good, **change})
        assert not space.contains({**good, **change})
    with pytest.raises(ValueError, match=THREE + "a candidate of another space"):
        space.encode({"x": 0.5})
    with pytest.raises(ValueError, match=THREE + "a candidate instead of its u"):
        over(strategies.cma_es(8), space).init({"x": jnp.zeros(())}, jax.random.key(0))


def test_a_start_that_rounding_put_outside_is_clipped_with_a_warning():
    with pytest.warns(UserWarning, match="rounded into"):
        assert real(0.1, 0.7, start=0.7 + 1e-8).start == 0.7


def test_one_value_is_fixed():
    space = Space(
        {"a": real(2.0, 2.0), "b": integer(3, 3), "c": categorical(["only"]), "d": permutation(1), "x": real()}
    )
    assert list(space.free) == ["x"]
    assert {**space.start(), "d": 0} == {"a": 2.0, "b": 3, "c": "only", "d": 0, "x": 0.0}
    assert jax.tree.map(lambda x: str(x.dtype), space.decode(space.origin())) == {
        "a": "float32", "b": "int32", "c": "int32", "d": "int32", "x": "float32",
    }  # fmt: skip


def test_centering_and_the_floor_are_those_of_pycma():
    """M's further way against the mean of a population that pycma centered; no deviation is below the floor."""
    centered = pytest.importorskip("cma.integer_centering").IntegerCentering
    rng = np.random.default_rng(3)
    d, weights = 4, np.array([0.5, 0.3, 0.2, 0.0], np.float32)
    for _ in range(20):
        m, v = rng.normal(size=d), rng.normal(size=(4, d)) * 1.3
        x = [row.copy() for row in v]
        centered(list(range(d)), correct_bias=False)(x, m)
        cells, own = np.round(v), np.round(m)
        got = whole.centering(*(jnp.asarray(a, jnp.float32) for a in (v, cells, cells, own, weights)))
        np.testing.assert_allclose(got, weights @ (np.asarray(x) - v), atol=1e-5)
    std, scale = jnp.array([1e-6, 0.1, 1.0, 1e-6]), jnp.array([1.0, 3.0, 1.0, 1.0])
    wide = whole.widened(scale, std, jnp.array([1.0, 1.0, 2.0, 0.0]), jnp.float32(2.0))
    np.testing.assert_allclose(wide * std, [0.2, 0.3, 1.0, 1e-6], rtol=1e-5)
    few = whole.widened(scale, std, jnp.ones(4), jnp.float32(0.4))  # min(0.2, mu_eff / d)
    np.testing.assert_allclose(few * std, [0.1, 0.3, 1.0, 0.1], rtol=1e-5)


def test_a_mixed_search_moves_as_its_twin_in_numpy():
    """Candidates M + A (x - m), M moved by A (m' - m) and to middles of cells, the strategy alone as the Gaussian."""
    space = Space({"n": integer(-3, 3, scale=1.0, start=1), "x": real(start=0.5, scale=1.0)})
    plain, mixed = strategies.cma_es(8, sigma=0.7), over(strategies.cma_es(8, sigma=0.7), space)
    mine = plain.init({"n": jnp.zeros(()), "x": jnp.zeros(())}, jax.random.key(0))
    state = mixed.init(space.origin(), jax.random.key(0))
    big_m, a = np.zeros(2), np.ones(2)
    ask = {s: jax.jit(s.ask) for s in (plain, mixed)}
    tell = {s: jax.jit(s.tell) for s in (plain, mixed)}
    mirrored = lambda v: 7 - np.abs((v + 4.5) % 14 - 7) - 4.5  # at -4.5 and 2.5
    folded = lambda v: np.clip(np.floor(mirrored(v) + 0.5), -4, 2)
    for g in range(50):
        key = jax.random.key(10 + g)
        samples, population = ask[plain](mine, key), ask[mixed](state, key)
        x = np.stack([np.asarray(samples.decoded()[name]) for name in ("n", "x")], axis=1).astype(float)
        m = np.asarray(mine.mean, float)
        v = np.where([True, False], big_m + a * (x - m), x)
        told = population.decoded()
        cells = folded(v[:, 0])
        assert np.asarray(told["n"]).tolist() == (cells + 1).tolist()
        np.testing.assert_allclose(told["x"], v[:, 1] + 0.5, atol=1e-4)
        values = jnp.asarray((np.asarray(told["n"], np.float32) + 1.7) ** 2 + np.asarray(told["x"] - 2.2) ** 2)
        mine, state = tell[plain](mine, samples, values), tell[mixed](state, population, values)
        moved = np.asarray(mine.mean, float) - m
        std = np.asarray(plain.dispersion(mine, 0).std)
        w = np.maximum(math.log(4.5) - np.log(np.argsort(np.argsort(values)) + 1.0), 0)
        w /= w.sum()
        middle = (w * np.where(cells != folded(big_m[0]), cells - mirrored(v[:, 0]), 0)).sum()
        big_m = np.clip(big_m + a * moved + [middle, 0], [-4.5, -np.inf], [2.5, np.inf])
        a[0] = max(a[0], min(0.2, 1 / (w**2).sum() / 2) / std[0])
        np.testing.assert_allclose(state.mean[0], big_m[0], atol=1e-3)
        np.testing.assert_allclose(state.scale[0], a[0], rtol=1e-2)
        big_m[1] = float(state.mean[1])
    assert a[0] > 2, "the floor had something to do"
    assert int(mixed.recommend(state)["n"]) == -2


def test_categories_learn_as_their_twin_in_numpy():
    """CatCMA's update of q with ASNG (arXiv 2405.09962, section 3; ICML 2019, algorithm 1), one category at a time."""
    sizes, n = (3, 2, 4), 6
    state = cats.initial(sizes, np.dtype(np.float32))
    q = [np.full(k, 1 / k) for k in sizes]
    s = [np.zeros(k - 1) for k in sizes]
    gamma, trust = 0.0, 1.0
    for g in range(40):
        choices = np.asarray(cats.sampled(state, jax.random.key(g), n))
        assert (choices < sizes).all()
        values = (choices != [2, 0, 1]).sum(axis=1) + 0.01 * np.arange(n)
        weights = np.zeros(n)
        weights[np.argsort(values)[:3]] = [0.5, 0.3, 0.2]
        state = cats.learned(state, sizes, jnp.asarray(choices), jnp.asarray(weights, jnp.float32))
        gradient = [sum(w * (np.eye(k)[c] - p) for w, c in zip(weights, choices[:, j], strict=True))
                    for j, (k, p) in enumerate(zip(sizes, q, strict=True))]  # fmt: skip
        signal = [d[:-1] / np.sqrt(p[:-1]) + np.sqrt(p[:-1]) * d[:-1].sum() / (p[-1] + np.sqrt(p[-1]))
                  for d, p in zip(gradient, q, strict=True)]  # fmt: skip
        norm = np.sqrt(sum((x**2).sum() for x in signal)) + 1e-30
        delta = 1 / trust
        beta = delta / np.sqrt(sum(sizes) - 3)
        for j, k in enumerate(sizes):
            s[j] = (1 - beta) * s[j] + np.sqrt(beta * (2 - beta)) * signal[j] / norm
            least = (1 - 0.73 ** (1 / 3)) / (k - 1)
            p = np.maximum(q[j] + delta / norm * gradient[j], least)
            q[j] = p - (p.sum() - 1) * (p - least) / (p.sum() - least * k)
        gamma = (1 - beta) ** 2 * gamma + beta * (2 - beta)
        trust = max(trust * np.exp(beta * (gamma - sum((x**2).sum() for x in s) / 1.5)), 1 / np.sqrt(6))
        for j, k in enumerate(sizes):
            np.testing.assert_allclose(state.q[j, :k], q[j], atol=1e-4)
            assert (np.asarray(state.q[j, k:]) == 0).all()
        np.testing.assert_allclose(state.trust, trust, rtol=1e-3)
    assert np.argmax(np.asarray(state.q), axis=1).tolist() == [2, 0, 1]


MIXED = {
    "x": real(-5.0, 5.0, start=2.5),
    "rate": real(1e-5, 1e-1, log=True),
    "open": real(0.2),
    "n": integer(0, 20),
    "width": integer(1, 500, log=True),
    "kernel": categorical(["linear", "rbf", "poly"]),
    "gamma": conditional(real(0.0, 1.0), on="kernel", equal=("rbf", "poly")),
    "flag": boolean(),
    "order": permutation(3),
    "shares": simplex(3),
    "drop": categorical([0.1, 0.3, 0.7], shape=(2,)),
    "fixed": 3,
    "name": "text",
}


def loss(p):
    """The sum of the terms of the variables that are there; 0 at the values below."""
    number = lambda name: jnp.asarray(p[name], jnp.float32)
    terms = {
        "x": lambda: (p["x"] - 0.7) ** 2,
        "rate": lambda: (jnp.log10(p["rate"]) + 3.3) ** 2,
        "open": lambda: (p["open"] - 1.3) ** 2,
        "n": lambda: 0.1 * (number("n") - 13) ** 2,
        "width": lambda: jnp.log(number("width") / 60) ** 2,
        "kernel": lambda: jnp.where(p["kernel"] == 1, 0.0, 2.0),
        "gamma": lambda: (p["gamma"] - 0.8) ** 2,
        "flag": lambda: jnp.where(p["flag"], 0.0, 1.0),
        "order": lambda: 0.3 * jnp.asarray((p["order"] != jnp.array([2, 0, 1])).sum(), jnp.float32),
        "shares": lambda: ((p["shares"] - jnp.array([0.2, 0.3, 0.5])) ** 2).sum(),
        "drop": lambda: jnp.abs(p["drop"] - jnp.array([0.3, 0.7])).sum(),
    }
    return functools.reduce(jnp.add, [term() for name, term in terms.items() if name in p])


def test_a_mixed_problem_is_solved():
    result = minimize(loss, MIXED, strategies.cma_es(16), key=1, evaluations=9600)
    space, best = Space(MIXED), result.best
    assert space.contains(best)
    assert space.contains(result.recommended)
    assert result.best_value < 1e-6
    assert {n: best[n] for n in ("n", "width", "kernel", "flag", "fixed", "name")} == {
        "n": 13, "width": 60, "kernel": "rbf", "flag": True, "fixed": 3, "name": "text",
    }  # fmt: skip
    assert best["order"].tolist() == [2, 0, 1]
    assert best["drop"].tolist() == [0.3, 0.7]


FEW = {name: MIXED[name] for name in ("x", "n", "kernel", "gamma", "order")}


@pytest.mark.parametrize(
    ("strategy", "reaches"),
    [
        (strategies.differential_evolution(64), 1e-4),
        (strategies.real_ga(64), 1e-2),
        (strategies.random_search(64), 0.5),
        (strategies.snes(32), 1e-4),
        *(
            pytest.param(strategy, reaches, marks=pytest.mark.slow)
            for strategy, reaches in [
                (wrappers.ipop(strategies.cma_es(64)), 1e-2),
                (strategies.particle_swarm(32), 1.0),
                (strategies.openai_es(32, sigma=0.5, learning_rate=0.1), 2.5),
                (strategies.ma_es(16), 1e-4),
                (strategies.sep_cma_es(16), 1e-4),
                (strategies.one_plus_one_es(), 1.0),
                (strategies.amalgam(64), 1.0),
                (strategies.cr_fm_nes(32), 1e-2),
                (strategies.l_shade(64, budget=6400), 1e-2),
                (strategies.hill_climbing(32), 1.0),
                (strategies.simulated_annealing(32), 1.0),
            ]
        ),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "ask") else "",
)
def test_every_strategy_searches_every_variable(strategy, reaches):
    result = minimize(loss, FEW, strategy, key=1, evaluations=6400)
    space = Space(FEW)
    assert space.contains(result.best)
    assert space.contains(result.recommended)
    assert result.best_value < reaches
    if reaches <= 1e-2:
        assert (result.best["n"], result.best["kernel"], result.best["order"].tolist()) == (13, "rbf", [2, 0, 1])


def host_loss(p):
    """As an objective in Python sees it: gamma is there only with its kernels."""
    assert ("gamma" in p) == (p["kernel"] != "linear")
    assert type(p["n"]) is int
    assert type(p["x"]) is float
    return abs(p["x"] - 0.7) + abs(p["n"] - 13) / 5 + (p["kernel"] != "rbf") + abs(p.get("gamma", 0.0) - 0.8)


def test_an_objective_in_python_gets_what_is_presented():
    result = minimize(host_loss, MIXED, strategies.cma_es(16), key=0, generations=40, jit=False)
    assert result.best_value < 0.5
    assert host_loss(result.best) == pytest.approx(result.best_value)
    session = Session(strategies.cma_es(16), MIXED, key=0)
    for _ in range(3):
        generation = session.ask()
        session.tell(generation, [host_loss(candidate) for candidate in generation])
    assert Space(MIXED).contains(session.recommend())
    again = pickle.loads(pickle.dumps(session))
    assert [c["n"] for c in again.ask()] == [c["n"] for c in session.ask()]


def test_workers_give_the_same_bits():
    from evoopt.distributed import LocalEvaluator

    serial = minimize(host_loss, MIXED, strategies.cma_es(8), key=0, generations=5, jit=False)
    spread = minimize(
        host_loss, MIXED, strategies.cma_es(8), key=0, generations=5, jit=False,
        evaluator=LocalEvaluator(2, raise_errors=True),
    )  # fmt: skip
    assert str(spread.best) == str(serial.best)
    assert spread.best_value == serial.best_value


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_ray_gives_the_same_bits():
    from evoopt.distributed import RayEvaluator

    # Made here, because workers can't import the tests.
    f = lambda p: abs(p["x"] - 0.7) + abs(p["n"] - 13) / 5 + (p["kernel"] != "rbf") + abs(p.get("gamma", 0.0) - 0.8)
    serial = minimize(f, MIXED, strategies.cma_es(8), key=0, generations=5, jit=False)
    with RayEvaluator(2, object_store=100 << 20) as evaluator:
        spread = minimize(f, MIXED, strategies.cma_es(8), key=0, generations=5, jit=False, evaluator=evaluator)
    assert str(spread.best) == str(serial.best)


def test_a_run_continues_and_another_space_is_refused_by_name(tmp_path):
    space = {"x": real(-1.0, 1.0), "n": integer(0, 9), "k": categorical(["a", "b", "c"])}
    f = lambda p: (p["x"] - 0.3) ** 2 + jnp.abs(jnp.asarray(p["n"] - 4, jnp.float32)) + jnp.where(p["k"] == 2, 0.0, 1.0)
    whole = minimize(f, space, strategies.cma_es(8), key=1, generations=12)
    first = Run.create(tmp_path, "run", {})
    minimize(f, space, strategies.cma_es(8), key=1, generations=5, run=first)
    first.close()
    resumed = minimize(f, space, strategies.cma_es(8), key=1, generations=12, run=Run.open(tmp_path / "run"))
    assert resumed.best == whole.best
    assert resumed.best_value == whole.best_value
    with pytest.raises(ValueError, match=THREE) as raised:
        minimize(f, {**space, "n": integer(0, 10)}, strategies.cma_es(8), key=1, generations=12,
                 run=Run.open(tmp_path / "run"))  # fmt: skip
    assert "n.high" in str(raised.value)

    session = Session(strategies.cma_es(8), space, key=0)
    session.tell(session.ask(), np.arange(8.0))
    session.save(tmp_path / "session")
    again = Session.load(tmp_path / "session", strategies.cma_es(8), space)
    assert again.recommend() == session.recommend()
    with pytest.raises(ValueError, match=THREE) as raised:
        Session.load(tmp_path / "session", strategies.cma_es(8), {**space, "k": categorical(["a", "b", "d", "e"])})
    assert "k.choices" in str(raised.value)


def test_no_whole_number_freezes():
    """After a long time at one value, with sigma at nothing, the other values are still tried."""
    space = Space({"x": real(start=1.0), "n": integer(0, 5), "b": boolean(), "k": categorical(["a", "b", "c"])})
    strategy = over(strategies.cma_es(10), space)

    @jax.jit
    def step(state, key):
        population = strategy.ask(state, key)
        p = population.decoded()
        values = (p["x"] - 0.3) ** 2 + jnp.abs(p["n"] - 2).astype(jnp.float32) + p["b"] + (p["k"] != 1)
        return strategy.tell(state, population, values), p

    state, seen, small = strategy.init(space.origin(), jax.random.key(0)), [], 1.0
    with jax.numpy_dtype_promotion("standard"):
        for g in range(300):
            state, p = step(state, jax.random.key(g))
            seen += [p] if g >= 200 else []
            small = float(state.inner.sigma) if g == 200 else small
    assert small < 1e-3
    tried = {name: set(np.concatenate([np.asarray(p[name]) for p in seen]).tolist()) for name in ("n", "b", "k")}
    assert tried["n"] >= {1, 2, 3}
    assert tried["b"] == {False, True}
    assert tried["k"] == {0, 1, 2}
    assert strategy.recommend(state)["n"] == 2


def test_points_enter_from_elsewhere():
    """`moved`: the candidates are the points (up to rounding), others keep their genomes, `active` survives."""
    space = Space({"x": real(-4.0, 4.0), "n": integer(0, 9), "b": boolean(), "k": categorical(["a", "b", "c"])})
    point = {"x": 0.5, "n": 3, "b": True, "k": "c"}
    arrays = space.decode(space.encode(point))
    for inner in (strategies.cma_es(8), strategies.differential_evolution(8)):
        strategy = over(inner, space)
        state = strategy.init(space.origin(), jax.random.key(0))
        population = jax.jit(strategy.ask)(state, jax.random.key(1)).with_active(jnp.arange(8) < 6)
        points = jax.tree.map(lambda all_, one: all_.at[2].set(one), population.decoded(), arrays)
        new = jax.jit(strategy.moved)(state, population, points)
        assert space.presented(jax.device_get(new[2])) == {**point, "x": pytest.approx(0.5, abs=1e-5)}
        for i in (0, 1, 3, 7):
            assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), new[i], population[i]))
        assert new.active.tolist() == population.active.tolist()


def test_populations_are_told_the_points_that_were_evaluated():
    """Whole numbers are whole, choices are corners in the genomes; both operators act; the box is that of the space."""
    space = Space({"x": real(-4.0, 4.0), "n": integer(0, 9), "k": categorical(["a", "b", "c"]), "o": real(1.0)})
    strategy = over(strategies.random_search(4000), space)
    state = strategy.init(space.origin(), jax.random.key(0))
    population = jax.jit(strategy.ask)(state, jax.random.key(1))
    told = jax.vmap(population.decode.inner)(population.genomes)
    found = population.decoded()
    for name, u in jax.vmap(space.located)(found).items():
        np.testing.assert_allclose(told[name], u, atol=1e-6, err_msg=name)
    for name, k in (("n", 10), ("k", 3)):  # evenly spread over the space
        counts = np.bincount(np.asarray(found[name]), minlength=k)
        assert (np.abs(counts - 4000 / k) < 5 * math.sqrt(4000 / k)).all(), (name, counts)
    assert float(jnp.abs(found["x"]).max()) > 3.9
    n = integer(0, 9, start=4, scale=1.0)
    up = jax.vmap(n.drawn)(jnp.full(2000, 0.25), jax.random.uniform(jax.random.key(2), (2000,)))
    assert set(np.asarray(up).tolist()) == {4, 5}
    assert float(up.mean()) == pytest.approx(4.25, abs=0.04)


def test_a_category_begins_where_it_is_told_to():
    """Half of the first candidates have the choice that was given, or an encoded one; others are tried too."""
    space = Space({"x": real(), "k": categorical(list("abcd")), "m": categorical(["a", "b", "c"], "b")})
    strategy = over(strategies.cma_es(400), space)
    ask = jax.jit(lambda u, key: strategy.ask(strategy.init(u, key), key).decoded())
    counts = lambda drawn, k: np.bincount(np.asarray(drawn), minlength=k) / 400
    found = ask(space.origin(), jax.random.key(0))
    np.testing.assert_allclose(counts(found["k"], 4), 0.25, atol=0.1)  # more than 4 standard errors
    np.testing.assert_allclose(counts(found["m"], 3), [0.25, 0.5, 0.25], atol=0.1)
    found = ask(space.encode({"x": 0.0, "k": "d", "m": "c"}), jax.random.key(1))
    np.testing.assert_allclose(counts(found["k"], 4), [1 / 6, 1 / 6, 1 / 6, 0.5], atol=0.1)
    np.testing.assert_allclose(counts(found["m"], 3), [0.25, 0.25, 0.5], atol=0.1)
    start = {"x": 0.0, "k": "d", "m": "c"}
    state = strategy.init(space.encode(start), jax.random.key(0))
    assert space.presented(jax.device_get(strategy.recommend(state))) == start


def test_a_category_alone_and_an_order_alone():
    result = minimize(
        lambda p: (p["k"] != jnp.array([2, 0, 1, 3])).sum().astype(jnp.float32),
        {"k": categorical(["a", "b", "c", "d"], shape=(4,))}, strategies.cma_es(), key=0, evaluations=3000, target=0.0,
    )  # fmt: skip
    assert result.best["k"].tolist() == ["c", "a", "b", "d"]
    order = minimize(
        lambda p: jnp.abs(p["o"] - jnp.array([3, 1, 4, 0, 2])).sum().astype(jnp.float32),
        {"o": permutation(5)}, strategies.cma_es(12), key=0, evaluations=3000, target=0.0,
    )  # fmt: skip
    assert order.best["o"].tolist() == [3, 1, 4, 0, 2]


def test_float64_and_a_variable_alone():
    with jax.enable_x64(True):
        x = Space(real(1.0, 2.0)).decode(Space(real(1.0, 2.0)).origin() | {".": jnp.float64(0.4)})
        assert x.dtype == np.float64
        assert float(x) == pytest.approx(1.6, rel=1e-15)
    assert numbers.real_kind() == np.float32


def test_gradients_go_through_a_real_space():
    import optax

    space = {"w": real(-2.0, 2.0, shape=(3,)), "s": real(1e-3, 1e3, log=True)}
    f = lambda p: ((p["w"] - jnp.array([0.3, -1.2, 1.9])) ** 2).sum() + (jnp.log(p["s"]) - 2.0) ** 2
    with warnings.catch_warnings():
        result = minimize(f, space, strategies.gradient(optax.adam(0.05)), generations=400)
    np.testing.assert_allclose(result.recommended["w"], [0.3, -1.2, 1.9], atol=1e-2)
    assert result.recommended["s"] == pytest.approx(math.exp(2.0), rel=1e-2)
