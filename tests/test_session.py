"""The ask/tell loop: what is to be evaluated, answers of every kind, seeds, and going on after pickle and save."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evoopt import Session, minimize, strategies, wrappers
from evoopt.noise import replayable
from evoopt.run import checkpoint
from evoopt.run.checkpoint import digest

X0 = {"gain": np.ones(2, np.float32), "offset": 0.0}
REFUSED = r"(?s)expected .*got .*usual cause"


def f(x):
    return float(np.sum((x["gain"] - 2.5) ** 2) + (x["offset"] + 1.0) ** 2)


def run(session, generations=3):
    for _ in range(generations):
        generation = session.ask()
        session.tell(generation, [f(x) for x in generation])
    return session


def ipop():
    return wrappers.bounded(wrappers.ipop(strategies.snes(16), 6), -5.0, 5.0)


# --- a generation


def test_a_generation_is_its_active_candidates():
    generation = Session(ipop(), X0).ask()
    candidates = list(generation)
    assert len(candidates) == len(generation) == 6 < len(generation.population)
    for i in (0, 5, -1, np.int64(2)):
        assert digest(generation[i]) == digest(candidates[i]), "the same bits one by one"
    assert digest(generation[1:4]) == digest(candidates[1:4])
    assert isinstance(generation[0]["gain"], np.ndarray)
    with pytest.raises(IndexError):
        generation[6]


def test_answers_are_any_numbers_in_a_row():
    values = [4.0, 3.0, 2.0, 1.0, 6.0, 5.0]
    session = Session(ipop(), X0)
    generation = session.ask()

    def after(answers):
        again = copy.copy(session)
        again.tell(generation, answers)
        return digest(again.state)

    expected = after(values)
    kinds = (tuple(values), iter(values), (v for v in values), np.array(values), np.float16(values), jnp.array(values),
             np.array(values)[:, None], dict(enumerate(values)).values(), [int(v) for v in values])  # fmt: skip
    for answers in kinds:
        assert after(answers) == expected
    assert after([*values, *[None] * 10]) == expected, "one for each place, asked for or not"
    assert after(np.array([*values, *[7.0] * 10])) == expected, "what was not asked for is not told"
    lost = after([4.0, None, 2.0, 1.0, np.nan, 5.0])
    assert lost == after([4.0, -np.inf, 2.0, 1.0, None, 5.0]) != expected


def test_two_probes_are_told_by_a_tuple_too():
    session = Session(strategies.mezo(learning_rate=0.1), np.zeros(3))
    tuples, lists = copy.copy(session), copy.copy(session)
    tuples.tell(session.ask(), (1.0, 2.0))
    lists.tell(session.ask(), [1.0, 2.0])
    assert digest(tuples.state) == digest(lists.state) != digest(session.state)
    first_order = Session(strategies.gradient(optax.sgd(0.1)), np.zeros(3))
    first_order.tell(first_order.ask(), ([1.0], np.ones((1, 3), np.float32)))
    np.testing.assert_allclose(first_order.recommend(), -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([1.0] * 5, ValueError), ((1.0, 2.0), ValueError), (iter([1.0] * 7), ValueError), (range(15), ValueError),
        (1.0, TypeError), ("123456", TypeError), (dict.fromkeys(range(6), 1.0), TypeError),
        ({1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, TypeError), ([None] * 6, TypeError), (["1"] * 6, TypeError),
        ([[1.0, 2.0]] * 6, TypeError), (np.ones((6, 2)), TypeError), ([1j] * 6, TypeError), (None, TypeError),
    ],
)  # fmt: skip
def test_answers_that_are_refused_change_nothing(answers, kind):
    session = Session(ipop(), X0)
    before = digest(session.state)
    with pytest.raises(kind, match=REFUSED):
        session.tell(session.ask(), answers)
    assert (digest(session.state), session.number, session.offset.value) == (before, 0, 0.0)


def test_gradients_that_do_not_fit_change_nothing():
    session = Session(strategies.gradient(optax.sgd(0.1)), np.zeros(3))
    with pytest.raises((ValueError, TypeError)):
        session.tell(session.ask(), ([1e9 + 1], np.ones((1, 4), np.float32)))
    assert (session.number, session.offset.value) == (0, 0.0)


def test_candidates_in_place_of_the_generation_are_refused():
    session = Session(strategies.snes(8), X0)
    generation = session.ask()
    for wrong in (list(generation), generation.population, 0):
        with pytest.raises(TypeError, match=REFUSED):
            session.tell(wrong, [1.0] * 8)


# --- what is no strategy, and seeds


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        (strategies.cma_es, r"call it, cma_es\(\)"),
        ("cma_es", r"strategies.cma_es\(\)"),
        (type(strategies.snes(8)), r"snes\(\)"),
        (sys.modules["evoopt.strategies.gaussian.snes"], r"snes\(\)"),
        (optax.adam(1e-3), r"gradient\(optax.adam"),
        (None, "usual cause"),
        (X0, "usual cause"),
    ],
    ids=["recipe", "name", "class", "module", "optax", "nothing", "parameters"],
)
def test_what_is_no_strategy_is_refused_everywhere(what, cause):
    places = {
        "minimize": lambda: minimize(f, X0, what, generations=1),
        "Session": lambda: Session(what, X0),
        "alternating": lambda: wrappers.alternating(what),
        "augmented_lagrangian": lambda: wrappers.augmented_lagrangian(what, 1),
        "feasibility_rules": lambda: wrappers.feasibility_rules(what, 1),
        "penalized_bounds": lambda: wrappers.penalized_bounds(what, 0.0, 1.0),
        "resampled": lambda: wrappers.resampled(what, 0.0, 1.0),
        "smoothed": lambda: wrappers.smoothed(what, 0.0, 1.0),
        "averaged": lambda: wrappers.averaged(what),
        "best_so_far": lambda: wrappers.best_so_far(what),
        "bipop": lambda: wrappers.bipop(what),
        "adaptive_popsize": lambda: wrappers.adaptive_popsize(what),
        "noisy": lambda: wrappers.noisy(what),
        "reevaluated": lambda: wrappers.reevaluated(what, 2),
        "repeated": lambda: wrappers.repeated(what, 2),
        "bounded": lambda: wrappers.bounded(what, 0.0, 1.0),
        "choices": lambda: wrappers.choices(what, 3),
        "ipop": lambda: wrappers.ipop(what),
        "masked": lambda: wrappers.masked(what, True),
        "reparameterized": lambda: wrappers.reparameterized(what, jnp.exp, jnp.log),
        "portfolio": lambda: wrappers.portfolio(what),
        "rounded": lambda: wrappers.rounded(what),
        "scheduled": lambda: wrappers.scheduled(what, sigma=lambda i: 1.0),
        "subspace": lambda: wrappers.subspace(what, 2),
        "surrogate": lambda: wrappers.surrogate(what),
    }
    assert set(places) == {"minimize", "Session", *wrappers.__all__}
    if what is None:
        del places["minimize"]  # it chooses
    for make in places.values():
        with pytest.raises(
            TypeError, match=f"(?s)expected a strategy.*usual cause.*{cause}|(?s:expected a strat.*{cause})"
        ):
            make()


def test_any_integer_is_a_seed():
    seeds = [0, 1, -1, -2, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**80), 10**400]
    assert len({digest(replayable(seed)) for seed in seeds}) == len(seeds)
    for same in (np.int64(7), np.uint8(7), np.array(7), jnp.int32(7), jax.random.key(7)):
        assert digest(replayable(same)) == digest(replayable(7))
    assert digest(jax.jit(replayable)(jnp.int32(7))) == digest(replayable(7))
    with jax.enable_x64(True):
        assert [digest(replayable(seed)) for seed in seeds[:8]] == BITS
    for wrong in (True, 1.5, "1", None, np.ones(2, int), np.random.default_rng(0)):
        with pytest.raises(TypeError, match=REFUSED):
            replayable(wrong)


BITS = [digest(replayable(seed)) for seed in [0, 1, -1, -2, 2**31, 2**32 - 1, 2**32, 2**63]]


@pytest.mark.parametrize(
    "objective",
    [
        lambda x: float(x[0]),
        lambda x: x[0] if x[0] > 0 else -x[0],
        lambda x: np.sum(np.asarray(x) ** 2),
        lambda x: [1.0, 2.0][(x[0] > 0).astype(int)],
        lambda x: x[x > 0].sum(),
        lambda x: x.item(0),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: float(f"{x[0]:.3f}"),
        lambda x: x.fill(0.0),
    ],
)
def test_an_objective_that_is_not_jax_is_told_so(objective):
    with pytest.raises(TypeError, match=f"{REFUSED}.*jit=False") as caught:
        minimize(objective, np.zeros(2), strategies.snes(8), generations=1)
    assert caught.value.__cause__ is not None


def test_other_errors_of_an_objective_are_its_own():
    def broken(x):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine") as caught:
        minimize(broken, np.zeros(2), strategies.snes(8), generations=1)
    assert "jit=False" not in str(caught.value)


# --- going on

AGAIN = {
    "pickle": lambda session: pickle.loads(pickle.dumps(session)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", AGAIN)
def test_a_loop_goes_on_with_the_same_bits(how):
    session = run(Session(wrappers.bounded(wrappers.bipop(strategies.cma_es(12), 6), -5.0, 5.0), X0, key=3))
    other = AGAIN[how](session)
    assert (digest(other.state), digest(other.key), other.number) == (digest(session.state), digest(session.key), 3)
    assert digest(run(other).state) == digest(run(session).state)


def test_copies_do_not_share_what_changes():
    session = run(Session(strategies.snes(8), X0))
    before = digest(session.state)
    other = copy.copy(session)
    generation = other.ask()
    other.tell(generation, [1e9 + f(x) for x in generation])
    assert other.offset.value != session.offset.value == 0.0
    assert (digest(session.state), session.number) == (before, 3)


def test_a_large_offset_is_pickled_and_saved(tmp_path):
    session = Session(strategies.snes(8), X0)
    told = lambda session: session.tell(g := session.ask(), [1e9 + f(x) for x in g])
    told(session)
    session.save(tmp_path)
    others = [pickle.loads(pickle.dumps(session)), Session.load(tmp_path, strategies.snes(8), X0)]
    for each in (session, *others):
        told(each)
    assert {digest(each.state) for each in others} == {digest(session.state)}


def test_save_and_load_go_on_with_the_same_bits(tmp_path):
    make = lambda: strategies.gradient(optax.adam(0.1))  # functions made in functions: no pickle could take them
    session, gradient = Session(make(), np.ones(2, np.float32), key=-5), lambda x: 2 * (x - 3)

    def go(session, generations):
        for _ in range(generations):
            g = session.ask()
            session.tell(g, (np.ones(1), np.stack([gradient(x) for x in g])))
        return digest(session.state)

    go(session, 4)
    session.save(tmp_path / "search")
    other = Session.load(tmp_path / "search", make(), np.ones(2, np.float32))
    assert (other.number, digest(other.key)) == (4, digest(session.key))
    assert go(other, 3) == go(session, 3)
    other.save(tmp_path / "search")
    assert Session.load(str(tmp_path / "search"), make(), np.ones(2)).number == 7
    assert not [p for p in (tmp_path / "search").rglob("*") if "pickle" in p.name or p.suffix == ".pkl"]


def test_what_was_saved_is_what_is_loaded(tmp_path):
    start = lambda key: jax.random.uniform(key, (2,), minval=-4.0)
    make = lambda n=16, sigma=1.0, start=start: wrappers.ipop(strategies.cma_es(n, sigma=sigma), 4, start=start)
    run_free = Session(make(), np.zeros(2), key=0)
    run_free.tell(run_free.ask(), [1.0, 2.0, 3.0, 4.0])
    run_free.save(tmp_path)
    Session.load(tmp_path, make(), np.zeros(2))
    elsewhere = lambda key: jax.random.uniform(key, (2,), minval=-5.0)
    for other in (make(n=32), make(sigma=0.5), make(start=elsewhere), strategies.cma_es(16)):
        with pytest.raises(ValueError, match=REFUSED):
            Session.load(tmp_path, other, np.zeros(2))
    with pytest.raises(ValueError, match=REFUSED):
        Session.load(tmp_path, make(), np.zeros(3))
    with pytest.raises(FileNotFoundError, match=REFUSED):
        Session.load(tmp_path / "nowhere", make(), np.zeros(2))
    with pytest.raises(TypeError, match=REFUSED):
        Session.load(tmp_path, strategies.cma_es, np.zeros(2))
    with pytest.raises(ValueError, match="an earlier search"):
        Session(make(), np.zeros(2)).save(tmp_path)
    assert checkpoint.steps(tmp_path) == [1], "nothing was written"


@dataclasses.dataclass
class Point:
    """Parameters of a class of one's own, with an aux field."""

    x: object
    name: str = "p"


jax.tree_util.register_dataclass(Point, data_fields=["x"], meta_fields=["name"])


def test_results_and_parameters_of_ones_own_pickle():
    strategy = wrappers.bounded(wrappers.bipop(strategies.cma_es(8), 4), -5.0, 5.0)
    result = minimize(lambda p: jnp.sum((p.x - 1) ** 2), Point(np.zeros(2)), strategy, generations=3)
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result), copy.copy(result)):
        assert digest((again.best, again.recommended, again.state)) == digest(
            (result.best, result.recommended, result.state)
        )
        assert (again.best.name, again.history, str(again)) == ("p", result.history, str(result))


def test_a_loop_goes_on_in_another_process(tmp_path):
    session = run(Session(strategies.snes(8), X0, key=1), 2)
    (tmp_path / "session.pickle").write_bytes(pickle.dumps(session))
    session.save(tmp_path / "saved")
    code = (
        "import pickle, numpy as np\nfrom evoopt import Session, strategies\nfrom evoopt.run.checkpoint import digest\n"
        "x0 = {'gain': np.ones(2, np.float32), 'offset': 0.0}\n"
        f"pickled = pickle.load(open({str(tmp_path / 'session.pickle')!r}, 'rb'))\n"
        f"for session in (pickled, Session.load({str(tmp_path / 'saved')!r}, strategies.snes(8), x0)):\n"
        "    g = session.ask()\n"
        "    session.tell(g, [float(np.sum((x['gain'] - 2.5) ** 2) + (x['offset'] + 1.0) ** 2) for x in g])\n"
        "    print(digest(session.state))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert set(out.stdout.split()) == {digest(run(session, 1).state)}
