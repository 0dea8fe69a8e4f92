"""Boxes: the fold at the walls against exact arithmetic, open sides, and what is refused wherever a bound is taken."""

from __future__ import annotations

import functools
import math
import types
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as draws

from evoopt import Session, bounds, minimize, strategies, wrappers
from evoopt.run.checkpoint import digest
from evoopt.wrappers.penalized_bounds import PenalizedBounds
from evoopt.wrappers.reparameterized import Reflection

INF = math.inf
REFUSED = r"(?s)expected .*got .*usual cause"
KEY = jax.random.key(0)
BOXED = {
    "differential_evolution": lambda **box: strategies.differential_evolution(8, **box),
    "jade": lambda **box: strategies.jade(8, **box),
    "shade": lambda **box: strategies.shade(8, **box),
    "l_shade": lambda **box: strategies.l_shade(8, budget=100, **box),
    "real_ga": lambda **box: strategies.real_ga(8, **box),
    "particle_swarm": lambda **box: strategies.particle_swarm(8, **box),
    "random_search": lambda **box: strategies.random_search(8, **box),
}


def mirrored(u: float, low: float, high: float) -> Fraction:
    """U in [low, high], by mirrors, exactly; of floats or of infinite sides."""
    if low <= u <= high:
        return Fraction(u)
    if high == INF:
        return 2 * Fraction(low) - Fraction(u)
    if low == -INF:
        return 2 * Fraction(high) - Fraction(u)
    x, a, width = Fraction(u), Fraction(low), Fraction(high) - Fraction(low)
    offset = (x - a) % (2 * width)
    return a + min(offset, 2 * width - offset)


HUGE = float(np.float32(1e30))
NUMBERS = draws.one_of(
    draws.floats(-HUGE, HUGE, width=32, allow_subnormal=False),
    draws.floats(-2048, 2048, width=32, allow_subnormal=False),
)
LOWS = draws.floats(-1000, 1000, width=32, allow_subnormal=False)


@given(
    u=NUMBERS,
    low=draws.floats(-1e3, 1e3, width=32),
    width=draws.floats(0.125, 1e3, width=32),
    open_=draws.integers(0, 3),
)
@example(u=1.75, low=0.0, width=1.0, open_=0)  # beyond one width: 0.25, and 0.75 were the period one width
@example(u=-0.25, low=0.0, width=1.0, open_=0)
@example(u=2.5, low=0.0, width=1.0, open_=0)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_fold_is_reflection_at_the_walls(u, low, width, open_):
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            x, a = dtype(u), dtype(low) if open_ in (0, 1) else dtype(-INF)
            b = dtype(dtype(low) + dtype(width)) if open_ in (0, 2) else dtype(INF)
            got = np.asarray(FOLD(jnp.asarray(x), jnp.asarray(a), jnp.asarray(b)))
            assert got.dtype == dtype
            assert a <= got <= b
            if a <= x <= b:
                assert got == x, "inside nothing changes, bit for bit"
            else:  # as exact as u itself, whose last bits are all there is of its place in the box
                slack = 8 * np.spacing(max(abs(x), abs(dtype(low)), abs(dtype(width))))
                exact = float(mirrored(float(x), float(a), float(b)))
                period = 2 * (float(b) - float(a)) if open_ == 0 else INF
                apart = abs(float(got) - exact)
                assert slack >= period or apart <= slack, (x, a, b, got, exact)


def fold(u, low, high):
    return bounds.fold(u, jnp.asarray(low).astype(u.dtype), jnp.asarray(high).astype(u.dtype))


FOLD = jax.jit(fold)
SLOPES = jax.jit(jax.vmap(jax.grad(fold), in_axes=(0, None, None)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_fold_is_finite_and_inside_whatever_comes(dtype):
    most = float(jnp.finfo(dtype).max)
    points = jnp.asarray([-INF, -most, -3.0, -1.0, 0.0, 1.0, 3.0, most, INF], dtype)
    boxes = [(-1.0, 1.0), (0.0, INF), (-INF, 0.0), (-most, most), (-most / 2, most / 2), (0.0, most), (1.0, 1.0 + 1e-9)]
    for low, high in boxes:
        got = np.asarray(FOLD(points, low, high), np.float64)
        low, high = (float(jnp.asarray(x, dtype)) for x in (low, high))
        assert ((got >= low) & (got <= high) & ~np.isnan(got)).all(), (low, high, got)
        assert (np.abs(np.asarray(SLOPES(points[1:-1], low, high), float)) <= 1).all()  # and so none is NaN
    assert bounds.fold(points, -INF, INF).tolist() == points.tolist()
    assert bool(jnp.isnan(bounds.fold(jnp.asarray([jnp.nan], dtype), 0.0, 1.0)).all())


def test_reflection_leaves_what_has_no_wall_alone():
    u = {"a": jnp.array([-3.0, 3.0]), "b": jnp.array(5.0)}
    folded = Reflection(*bounds.opened({"a": [None, 1.0], "b": -np.inf}, {"a": [-1.0, 2.0], "b": None}))(u)
    assert folded["a"].tolist() == [-3.0, 1.0]
    assert folded["b"] is u["b"]


# --- searches with open sides


@pytest.mark.parametrize(
    ("low", "high", "best"), [(0.0, INF, [0.0, 1.0]), (-INF, 0.0, [-1.0, 0.0]), (None, None, [-1.0, 1.0])]
)
def test_open_sides_are_searched(low, high, best):
    loop = Session(wrappers.bounded(strategies.snes(16, sigma=0.5), low, high), np.zeros(2), key=0)
    for _ in range(60):
        generation = loop.ask()
        candidates = np.stack(list(generation))
        assert np.isfinite(candidates).all()
        assert (candidates >= (-INF if low is None else low)).all()
        assert (candidates <= (INF if high is None else high)).all()
        loop.tell(generation, ((candidates - [-1.0, 1.0]) ** 2).sum(axis=1))
    np.testing.assert_allclose(loop.recommend(), best, atol=0.02)


def test_the_gradient_of_a_mirror_turns_round():
    """The chain rule through the fold: beyond the wall the way downhill is the other way."""
    strategy = wrappers.bounded(strategies.gradient(optax.sgd(0.25)), -1.0, 1.0)
    state = strategy.init(jnp.array([0.5, 0.9]), KEY)
    state = state._replace(mean=jnp.array([0.5, 1.5]))  # the second one is seen at 0.5
    population = strategy.ask(state, KEY)
    assert population.decoded().tolist() == [[0.5, 0.5]]
    after = strategy.tell(state, population, (jnp.ones(1), jnp.ones((1, 2))))
    assert after.mean.tolist() == [0.25, 1.75]


@pytest.mark.parametrize("name", BOXED)
def test_boxes_to_draw_from(name):
    make = BOXED[name]
    for box in ({"lower": 0.0, "upper": INF}, {"lower": 0.0}, {"upper": [1.0, 2.0]}, {"lower": 0.0, "upper": 1e39},
                {"lower": -3e38, "upper": 3e38}, {"lower": [0.0, -INF], "upper": [1.0, 1.0]}):  # fmt: skip
        with pytest.raises(ValueError, match=REFUSED):
            jax.eval_shape(lambda k, box=box: make(**box).init(np.ones(2), k), KEY)


@pytest.mark.parametrize("name", ["differential_evolution", "real_ga", "particle_swarm", "random_search"])
def test_a_box_with_an_open_coordinate(name):
    make = BOXED[name]
    x, box = np.array([0.5, 7.0], np.float32), {"lower": [0.0, -INF], "upper": [1.0, INF]}

    @jax.jit
    def run(strategy, key):
        state = strategy.init(x, key)
        asked = [strategy.ask(state, key).decoded()]
        for i in range(2):
            population = strategy.ask(state, jax.random.fold_in(key, i))
            asked.append(population.decoded())
            state = strategy.tell(state, population, jnp.sum(asked[-1] ** 2, axis=1))
        return jnp.concatenate(asked)

    some = np.asarray(run(make(**box), KEY))
    assert np.isfinite(some).all()
    assert (some[:, 0] >= 0).all() and (some[:, 0] <= 1).all()  # noqa: PT018
    assert 1 < np.abs(some[:, 1] - 7.0).max() < 60, "spread around the start where there are no bounds"
    nowhere, free = jax.jit(lambda key: (make(lower=-INF, upper=INF).init(x, key), make().init(x, key)))(KEY)
    assert digest(nowhere) == digest(free)


TREE = {"w": np.ones((2, 3), np.float32), "b": np.float32(1.0)}


@pytest.mark.parametrize(
    ("lower", "upper", "match"),
    [
        (math.nan, 1.0, "NaN"),
        (0.0, {"w": np.full((2, 3), np.nan), "b": 1.0}, "NaN"),
        (-INF, -INF, "same side"),
        (2.0, 1.0, "wrong order"),
        (INF, None, "wrong order|lower < upper"),
        (0.0, np.array([[2.0, 2.0, -1.0]]), "wrong order|structure"),
        ({"w": 0.0, "b": 0.0}, {"w": [[2.0, 2.0, -1.0]], "b": 2.0}, "wrong order"),
        (1.0, 1.0 + 1e-9, "float32"),
        (0.0, {"w": np.full(2, 2.0), "b": 2.0}, r"\(2, 3\) at 'w'.*shape \(2,\)"),
        (0.0, {"w": 2.0}, "structure"),
        ([0.0, 0.0], 2.0, "structure"),
        ("0", 2.0, "numbers as lower"),
        (0.0, {"w": [[2.0], [2.0, 2.0]], "b": 2.0}, "numbers as upper|structure|shape"),
        (object(), 2.0, "numbers as lower"),
        (1.5, 2.0, "a start within the bounds at 'b'"),
        (None, {"w": 2.0, "b": 0.5}, "a start within the bounds at 'b'"),
    ],
)
def test_bounds_that_are_refused(lower, upper, match):
    """In three parts, by `bounded` and by a strategy with a box of its own; the same under `jit`."""
    makers = [
        lambda: wrappers.bounded(strategies.snes(8), lower, upper),
        lambda: strategies.zo_adamm(lower=lower, upper=upper),  # moves the start into its box
    ]
    for make in makers[: 1 if "start" in match else 2]:
        run = lambda key, make=make: make().init(TREE, key)
        with pytest.raises((ValueError, TypeError), match=f"(?s)expected.*({match})") as caught:
            jax.eval_shape(run, KEY)
        assert "usual cause" in str(caught.value)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (0.0, {"w": np.full((2, 3), 2.0), "b": 2.0}),
        ({"w": 0.0, "b": None}, 2.0),
        ({"w": [[0.0, None, -INF]] * 2, "b": 0}, None),
        ({"w": np.zeros(3), "b": np.float64(0.0)}, {"w": [2.0, 2.0, 2.0], "b": INF}),
        (np.int64(0), 1e39),
    ],
)
def test_bounds_of_many_kinds_are_the_same_box(lower, upper):
    strategy = wrappers.bounded(strategies.snes(8), lower, upper)
    candidates = jax.jit(lambda key: strategy.ask(strategy.init(TREE, key), key).decoded())(KEY)
    assert candidates["w"].shape == (8, 2, 3)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(candidates))
    column = candidates["w"][:, :, 0]
    assert float(column.min()) >= 0


# --- starts under jit


def test_init_under_jit_has_the_bits_of_init():
    """Several starts in one program, and a whole run in one program, from parameters that are known."""
    x0 = np.array([0.5, -0.5])
    strategy = wrappers.bounded(strategies.snes(8), -1.0, 1.0)
    keys = jax.random.split(KEY, 3)
    several = jax.jit(jax.vmap(lambda key: strategy.init(x0, key).mean))(keys)
    assert several.tolist() == [strategy.init(x0, key).mean.tolist() for key in keys]
    for bad in (np.array([0.5, np.nan]), np.array([0.5, 2.0])):
        with pytest.raises(ValueError, match=REFUSED):
            jax.jit(lambda key, bad=bad: strategy.init(bad, key))(KEY)

    @jax.jit
    def run(key):
        def generation(state, key):
            population = strategy.ask(state, key)
            return strategy.tell(state, population, population.vmap(lambda x: jnp.sum(x**2))), None

        return strategy.recommend(jax.lax.scan(generation, strategy.init(x0, key), jax.random.split(key, 60))[0])

    assert float(jnp.abs(run(KEY)).max()) < 0.05


def test_every_strategy_starts_under_jit():
    from cases import CASES
    from conftest import START

    x0 = jax.tree.map(np.asarray, START)
    for case in (case for name, case in CASES.items() if not name.startswith("from_evosax")):
        jax.eval_shape(lambda key, case=case: case.make().init(x0, key), KEY)  # raises where a number is not known


def test_choices_take_lists_and_refuse_what_is_no_number_of_options():
    options = {"layers": [1.0, 2.0, 4.0], "kind": 3}
    strategy = wrappers.choices(strategies.snes(8), options)
    candidates = strategy.ask(strategy.init({"layers": np.int32(1), "kind": 0}, KEY), KEY).decoded()
    assert set(candidates["layers"].tolist()) <= {1.0, 2.0, 4.0}
    for bad in (INF, math.nan, 2.5, 0, ["adam", "sgd"]):
        with pytest.raises((ValueError, TypeError), match=REFUSED):
            wrappers.choices(strategies.snes(8), bad).init(0, KEY)
    f = lambda x: float(x["layers"] + x["kind"])
    result = minimize(f, {"layers": 2, "kind": 2}, strategy, generations=20, jit=False)
    assert (float(result.best["layers"]), int(result.best["kind"])) == (1.0, 0)


# --- other ways to stay inside

WAYS = {name: getattr(wrappers, name) for name in ("bounded", "smoothed", "penalized_bounds", "resampled")}
GOAL = np.array([0.5, 3.0, -4.0, -0.3])  # of which the box holds the first and the last


def valley(x):
    return jnp.sum(jnp.array([1.0, 10.0, 2.0, 5.0]) * (x - GOAL) ** 2)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("lower", [-1.0, [-1.0, -INF, -1.0, -0.3]], ids=["box", "a side open and one held"])
def test_an_optimum_at_the_walls_is_found(name, lower):
    with jax.enable_x64(True):
        start = np.array([0.0, 0.0, 0.0, -0.3])
        strategy = WAYS[name](strategies.cma_es(sigma=0.3), lower, [1.0, 1.0, INF, -0.3 if lower != -1.0 else INF])
        least = float(valley(np.array([0.5, 1.0, -1.0, -0.3])))
        result = minimize(valley, start, strategy, generations=600, target=least + 1e-8)
        assert result.reason == "target"
        assert abs(float(valley(result.recommended)) - least) < 1e-3
        if lower != -1.0:
            assert float(result.best[3]) == -0.3


@pytest.mark.parametrize("name", ["bounded", "smoothed"])
def test_a_gradient_finds_the_optimum_at_the_walls(name):
    with jax.enable_x64(True):
        shrinking = optax.sgd(optax.exponential_decay(0.04, 100, 0.5))
        strategy = WAYS[name](strategies.gradient(shrinking), -1.0, 1.0)
        least = float(valley(np.clip(GOAL, -1.0, 1.0)))
        result = minimize(valley, np.zeros(4), strategy, generations=4000, target=least + 1e-8)
        assert result.reason == "target"


@pytest.mark.parametrize("name", WAYS)
def test_candidates_are_inside_and_held_where_bounds_are_equal(name):
    strategy = WAYS[name](strategies.cma_es(8, sigma=2.0), {"w": [[-1.0, 0.5]], "b": -INF}, {"w": [[1.0, 0.5]], "b": 2})
    x0 = {"w": np.array([[0.2, 0.5]], np.float32), "b": np.float32(0.0)}
    state = strategy.init(x0, KEY)
    tell = jax.jit(strategy.tell)
    for i in range(3):
        population = strategy.ask(state, jax.random.key(i))
        some = population.decoded()
        assert (np.abs(some["w"][:, 0, 0]) <= 1).all()
        assert (some["w"][:, 0, 1] == 0.5).all()
        assert (some["b"] <= 2).all()
        state = tell(state, population, jnp.sum((some["w"][:, 0] - 3) ** 2, 1) + some["b"] ** 2)
    recommended = strategy.recommend(state)
    assert float(recommended["w"][0, 1]) == 0.5
    assert float(recommended["w"][0, 0]) <= 1


@pytest.mark.parametrize("name", WAYS)
def test_a_start_that_passes_a_wall_by_rounding_is_moved_to_it(name):
    strategy = WAYS[name](strategies.cma_es(8), [0.0, 0.1], [1.0, 0.3])
    with pytest.warns(UserWarning, match="passes a bound by rounding"):
        strategy.init(np.array([0.5, np.nextafter(np.float32(0.3), 1)], np.float32), KEY)
    with pytest.raises(ValueError, match=r"(?s)a start within the bounds.*usual cause"):
        strategy.init(np.array([0.5, 0.30001], np.float32), KEY)


def test_the_smooth_map_is_that_of_pycma_and_its_inverse_leads_back():
    peer = pytest.importorskip("cma").BoundTransform([[0.0, -1.0, None, -30.0], [None, None, 2.0, None]])
    low, high = np.array([0.0, -1.0, -INF, -30.0]), np.array([INF, INF, 2.0, INF])
    box = np.array([-1.0, 0.0]), pytest.importorskip("cma").BoundTransform([[-1.0], [0.0]])
    with jax.enable_x64(True):
        for u in np.random.default_rng(0).normal(0, 3, (40, 4)):
            x = bounds.smooth(jnp.asarray(u), low, high)
            np.testing.assert_allclose(x, peer.transform(u), atol=1e-12)
            back = bounds.smooth_inverse(x, low, high)
            np.testing.assert_allclose(bounds.smooth(back, low, high), x, atol=1e-12)
        u = np.linspace(-3, 3, 101)
        np.testing.assert_allclose(bounds.smooth(jnp.asarray(u), *box[0]), box[1].transform(u), atol=1e-12)
        middle = jnp.linspace(-0.94, -0.06, 9)
        assert (bounds.smooth(middle, *box[0]) == middle).all()
        assert (bounds.smooth_inverse(middle, *box[0]) == middle).all()
        slopes = jax.vmap(jax.grad(lambda u: bounds.smooth(u, -1.0, 0.0)))(jnp.linspace(-1.05, 0.05, 1101))
        assert float(jnp.abs(jnp.diff(slopes)).max()) < 0.02  # continuous
        assert float(slopes.min()) >= 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_smooth_map_is_finite_and_inside_whatever_comes(dtype):
    most = float(jnp.finfo(dtype).max)
    points = jnp.asarray([-INF, -most, -3.0, -1.0, 0.0, 1.0, 3.0, most, INF], dtype)
    for low, high in [(-1.0, 1.0), (0.0, INF), (-INF, 0.0), (-most, most), (1.0, 1.0), (2.0, 2.001)]:
        got = np.asarray(bounds.smooth(points, low, high), np.float64)
        low, high = (float(jnp.asarray(x, dtype)) for x in (low, high))
        assert ((got >= low) & (got <= high)).all(), (low, high, got)


def test_the_penalty_is_that_of_pycma():
    """Its weights over some generations, from the same values and distributions."""
    peer = pytest.importorskip("cma").BoundPenalty([[-1.0], [1.0]])
    with jax.enable_x64(True):
        strategy = wrappers.penalized_bounds(strategies.cma_es(8, sigma=0.5), -1.0, 1.0)
        assert isinstance(strategy, PenalizedBounds)
        state = strategy.init(np.array([0.9, 0.0, -0.5]), KEY)
        same = types.SimpleNamespace(geno=lambda x: x, pheno=lambda x: x, isidentity=True, fixed_values=None)
        f = lambda x: float(np.sum((x - np.array([6.0, 0.2, -5.0])) ** 2))
        weighty = 0
        seen = PenalizedBounds(With(strategy.strategy, lambda state, population, values: values), -1.0, 1.0)
        told = jax.jit(lambda *given: seen.tell(*given).inner)
        tell, ask = jax.jit(strategy.tell), jax.jit(strategy.ask)
        at_first, raw = (
            jax.jit(lambda s: strategy.dispersion(s, 0)),
            jax.jit(lambda p: p.with_decode(p.decode.decode).decoded()),
        )
        for i in range(40):
            population = ask(state, jax.random.key(i))
            values = np.array([f(x) for x in population])
            at = at_first(state)
            es = types.SimpleNamespace(
                N=3, sigma=1.0, sm=types.SimpleNamespace(variances=np.asarray(at.std) ** 2), mean=np.asarray(at.mean),
                gp=same, popsize=8, countiter=i + 1, more_to_write=[],
                sp=types.SimpleNamespace(weights=types.SimpleNamespace(mueff=MU_EFF)),
            )  # fmt: skip
            peer.update(values, es)
            outside = np.asarray(raw(population))
            np.testing.assert_allclose(told(state, population, values), values + peer(outside, None, same), rtol=1e-10)
            state = tell(state, population, jnp.asarray(values))
            weighty += bool(np.any(peer.gamma != 1))
        assert weighty > 20
        np.testing.assert_allclose(state.gamma, peer.gamma, rtol=1e-9)


MU_EFF = float(1 / np.sum((w := (raw := np.log(4.5) - np.log(np.arange(1, 5))) / raw.sum()) ** 2))


class With:
    """A strategy with another `tell`."""

    def __init__(self, strategy, tell):
        self.strategy, self.tell = strategy, tell

    def __getattr__(self, name):
        return getattr(self.strategy, name)


def test_candidates_outside_are_drawn_again_one_by_one():
    low, high = np.array([-0.5, -INF], np.float32), np.array([0.5, 0.0], np.float32)
    plain = strategies.cma_es(64, sigma=1.0)
    state = plain.init(jnp.zeros(2), KEY)
    (first,) = [np.asarray(plain.ask(state, KEY).decoded())]
    inside = ((first >= low) & (first <= high)).all(1)
    one = wrappers.resampled(plain, low, high, tries=1)
    many = wrappers.resampled(plain, low, high, tries=100)
    ask = functools.partial(jax.jit(lambda s, key: s.ask(s.init(jnp.zeros(2), key), key)))
    again = np.asarray(plain.ask(state, jax.random.fold_in(KEY, 1)).decoded())
    better = ((again >= low) & (again <= high)).all(1) & ~inside
    assert 0 < inside.sum() < 40
    population = ask(one, KEY)
    got, raw = np.asarray(population.decoded()), np.asarray(jax.vmap(population.decode.decode)(population.genomes))
    assert (got[inside] == first[inside]).all()
    assert (got[better] == again[better]).all()
    assert (raw[~inside & ~better] == first[~inside & ~better]).all()  # to be mirrored
    population = ask(many, KEY)
    raw = np.asarray(jax.vmap(population.decode.decode)(population.genomes))
    assert ((raw >= low) & (raw <= high)).all()
    assert (np.asarray(population.decoded()) == raw).all()


def test_generations_that_belong_together_are_drawn_again_as_a_whole():
    strategy = wrappers.resampled(strategies.mezo(8, sigma=0.3), -0.1, 0.5)
    state = strategy.init(jnp.zeros(3), KEY)
    population = strategy.ask(state, KEY)
    pairs = np.asarray(jax.vmap(population.decode.decode)(population.genomes)).reshape(-1, 2, 3)
    np.testing.assert_allclose(pairs.mean(1), 0.0, atol=1e-6)


def test_a_penalty_needs_a_distribution():
    with pytest.raises(TypeError, match=r"(?s)a strategy with a distribution.*got.*usual cause.*bounded"):
        wrappers.penalized_bounds(strategies.differential_evolution(8), -1.0, 1.0)
    with pytest.raises(ValueError, match=REFUSED):
        wrappers.resampled(strategies.cma_es(8), -1.0, 1.0, tries=0)
