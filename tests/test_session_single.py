"""A session one candidate at a time: any order, late answers, points from elsewhere, and going on."""

import copy
import pickle
import random

import numpy as np
import optax
import pytest
from test_programs import compilations

from evoopt import Session, Stops, strategies, wrappers
from evoopt.run.checkpoint import digest

X0 = {"gain": np.ones(2, np.float32), "offset": 0.0}
GOAL = {"gain": np.array([2.5, 2.5], np.float32), "offset": np.float32(-1.0)}
REFUSED = r"(?s)expected .*got .*usual cause"


def f(x):
    return float(np.sum((x["gain"] - 2.5) ** 2) + (x["offset"] + 1.0) ** 2)


def cma(**options):
    return Session(strategies.cma_es(8, sigma=0.5), X0, key=3, **options)


def whole(session, generations):
    for _ in range(generations):
        generation = session.ask()
        session.tell(generation, [f(x) for x in generation])
    return session


def restarted():
    return Session(wrappers.bounded(wrappers.ipop(strategies.cma_es(16), 6), -5.0, 5.0), X0)


@pytest.mark.parametrize("make", [cma, restarted, lambda: Session(strategies.pgpe(8), X0)])
def test_one_at_a_time_in_any_order_is_a_generation_at_a_time(make):
    session, expected = make(), whole(make(), 4)
    shuffle = random.Random(1).shuffle
    for generation in range(4):
        n = len(session.ask())
        out = [*session.ask(2), *session.ask(n - 2)]
        shuffle(out)
        for i, candidate in enumerate(out):
            assert session.number == generation
            session.tell(candidate if i % 2 else candidate.ticket, f(candidate.params))
    assert session.number == 4
    assert digest(session.state) == digest(expected.state)
    assert digest(session.watch) == digest(expected.watch) if session.watch is not None else expected.watch is None
    assert (session.best_value, session.evaluations) == (expected.best_value, expected.evaluations)
    assert digest(session.best) == digest(expected.best)
    assert session.history == expected.history


def test_workers_never_wait_and_late_answers_count():
    """Four workers, one of them ten times slower: more candidates are out than a generation has."""
    session = cma()
    rng, out = random.Random(0), []
    while session.number < 60:
        while len(out) < 11:
            (candidate,) = session.ask(1)
            out.append(candidate)
        candidate = out.pop(rng.choice([0, 0, 0, 0, -1, -2]) if rng.random() < 0.9 else rng.randrange(len(out)))
        session.tell(candidate, f(candidate.params))
    assert session.best_value < 1e-2
    assert f(session.recommend()) < 1e-2
    assert len(session.history) == 60
    assert session.evaluations >= 60 * 8 - 8


def test_a_late_candidate_enters_the_next_generation():
    session = cma()
    out = session.ask(9)  # the last of them is a further draw
    assert len({digest(c.params) for c in out}) == 9
    for candidate in [*out[:7], out[8]]:
        session.tell(candidate, f(candidate.params))
    assert (session.number, session.history[0]["best"]) == (1, min(f(c.params) for c in [*out[:7], out[8]]))
    session.tell(out[7], -5.0)  # late, and the best of all
    assert (session.best_value, digest(session.best)) == (-5.0, digest(out[7].params))
    for candidate in session.ask(7):
        assert session.number == 1
        session.tell(candidate, f(candidate.params))
    assert (session.number, session.history[1]["best"], session.evaluations) == (2, -5.0, 16)


def test_a_further_draw_is_told_like_a_sample():
    """The generation's own candidates but one, and a further draw in its place: the update knows where it was."""
    session = cma()
    out = session.ask(9)
    moved = copy.copy(session)
    best = min(out, key=lambda c: f(c.params))
    for candidate in out[1:]:
        moved.tell(candidate, f(candidate.params))
    z = moved.state.mean - session.state.mean
    assert np.isfinite(np.asarray(z)).all()
    own = whole(cma(), 1)
    if best is not out[0] and best is not out[8]:  # the best weighs most in both
        toward = lambda state: float(np.dot(np.asarray(state.mean - session.state.mean), np.asarray(z)))
        assert toward(own.state) > 0


def test_strategies_that_take_no_points_know_late_ones_as_best_only():
    session, expected = Session(strategies.pgpe(8), X0, key=1), whole(Session(strategies.pgpe(8), X0, key=1), 1)
    out = session.ask(9)
    session.tell(out[8], -1.0)
    session.inject([GOAL], [-2.0])
    for candidate in out[:8]:
        session.tell(candidate, f(candidate.params))
    assert (session.number, session.best_value) == (1, -2.0)
    assert digest(session.state) == digest(expected.state)


# --- what is known


def test_known_points_are_handed_out_first_and_known_values_are_told():
    session = cma()
    session.inject([GOAL, X0])
    first, second, third = session.ask(3)
    assert digest(first.params) == digest(GOAL)
    assert digest(second.params["gain"]) == digest(np.ones(2, np.float32))
    assert digest(third.params) == digest(session.ask()[0])
    session.tell(first, f(first.params))
    assert session.best_value == 0.0
    other = cma()
    other.inject([GOAL], [f(GOAL)])
    for candidate in other.ask(7):
        other.tell(candidate, f(candidate.params))
    plain = whole(cma(), 1)
    assert other.number == 1
    distance = lambda s: f(s.recommend())
    assert distance(other) < distance(plain)
    assert other.history[0]["best"] == 0.0


def test_more_known_values_than_a_generation_are_several_generations():
    session = cma()
    rng = np.random.default_rng(0)
    known = [{"gain": rng.normal(2, 1, 2).astype(np.float32), "offset": float(rng.normal())} for _ in range(20)]
    session.inject(known, [f(x) for x in known])
    assert (session.number, len(session._desk.others), session.evaluations) == (2, 4, 20)
    assert session.best_value == min(f(x) for x in known)


@pytest.mark.parametrize(
    ("points", "values", "kind"),
    [
        ([{"gain": np.ones(2)}], None, ValueError), ([{**X0, "more": 1.0}], None, ValueError),
        ([{"gain": np.ones(3), "offset": 0.0}], None, ValueError), (X0, None, TypeError), (3.0, None, TypeError),
        ([{"gain": np.array([1.0, np.nan]), "offset": 0.0}], None, ValueError), ([X0], [1.0, 2.0], ValueError),
        ([{"gain": np.ones(2), "offset": "0"}], None, TypeError), ([X0], ["1"], TypeError),
        ([{"gain": np.full(2, 9.0, np.float32), "offset": 0.0}], None, ValueError),
    ],
)  # fmt: skip
def test_points_of_another_search_are_refused_and_nothing_is_lost(points, values, kind):
    session = Session(wrappers.bounded(strategies.cma_es(8), -5.0, 5.0), X0)
    (out,) = session.ask(1)
    before = pickle.dumps(session._desk.saved()[1])
    with pytest.raises(kind, match=REFUSED):
        session.inject(points, values)
    assert pickle.dumps(session._desk.saved()[1]) == before
    session.tell(out, 1.0)
    assert session.evaluations == 1


# --- what is refused


def test_a_ticket_is_told_once():
    session = cma()
    out = session.ask(3)
    session.tell(out[0], 1.0)
    for twice in (out[0], out[0].ticket):
        with pytest.raises(ValueError, match=f"{REFUSED}: an answer that was sent twice"):
            session.tell(twice, 2.0)
    with pytest.raises(ValueError, match=f"{REFUSED}: the ticket of another session"):
        session.tell(99, 1.0)
    other = Session(strategies.cma_es(8), X0, key=4).ask(3)
    with pytest.raises(ValueError, match=f"{REFUSED}: a candidate of another session"):
        session.tell(other[1], 1.0)
    for wrong in ("1", [1.0], np.ones(2), 1j):
        with pytest.raises(TypeError, match=REFUSED):
            session.tell(out[1], wrong)
    for ticket in (1.0, True, None, out[1].params):
        with pytest.raises(TypeError, match=REFUSED):
            session.tell(ticket, 1.0)
    with pytest.raises(ValueError, match=f"{REFUSED}: .*one by one"):
        session.tell(session.ask(), [1.0] * 8)
    session.tell(out[1], None)
    session.tell(out[2], 3.0)
    assert (session.evaluations, session.best_value, session.number) == (3, 1.0, 0)
    with pytest.raises(ValueError, match=REFUSED):
        session.ask(0)
    with pytest.raises(TypeError, match=REFUSED):
        Session(strategies.gradient(optax.sgd(0.1)), X0).ask(1)


def test_a_whole_generation_makes_the_candidates_that_are_out_late():
    session = cma()
    (one,) = session.ask(1)
    whole(session, 1)
    session.tell(one, f(one.params))
    assert (session.number, len(session._desk.others)) == (1, 1)


# --- going on


@pytest.mark.parametrize("how", ["pickle", "copy", "save"])
def test_candidates_that_are_out_are_kept(how, tmp_path):
    def begun():
        session = cma()
        out = session.ask(10)
        session.inject([GOAL])
        for candidate in [*out[:6], out[8], out[9]]:
            session.tell(candidate, f(candidate.params))
        return session, [*out[6:8], *session.ask(3)]

    def finish(session, out):
        for candidate in out:
            session.tell(candidate, f(candidate.params))
        for _ in range(20):
            (candidate,) = session.ask(1)
            session.tell(candidate, f(candidate.params))
        return session

    session, out = begun()
    if how == "save":
        session.save(tmp_path)
        other = Session.load(tmp_path, strategies.cma_es(8, sigma=0.5), X0)
    else:
        other = {"pickle": lambda s: pickle.loads(pickle.dumps(s)), "copy": copy.copy}[how](session)
    a, b = finish(session, out), finish(other, out)
    for name in ("number", "evaluations", "best_value", "history"):
        assert getattr(a, name) == getattr(b, name)
    assert digest((a.state, a.watch, a.best)) == digest((b.state, b.watch, b.best))


def test_stop_and_result():
    session = cma(stop=Stops(tolx=1e-2))
    assert (session.stop(), session.best, session.result().reason) == ({}, None, "open")
    while not session.stop():
        (candidate,) = session.ask(1)
        session.tell(candidate, f(candidate.params))
    (why,) = session.stop().values()
    assert (list(session.stop()), why.tolerance, why.measured < 1e-2) == (["tolx"], pytest.approx(1e-2), True)
    result = session.result()
    assert (result.reason, result.why, result.generations) == ("tolx", str(why), session.number)
    assert (result.best_value, result.evaluations) == (session.best_value, session.evaluations)
    assert len(result.history) == session.number
    assert digest(result.recommended) == digest(session.recommend())
    assert f(result.recommended) < 1e-2
    assert cma(stop=None).stop() == {}


def test_nothing_compiles_after_the_first_generation():
    """With more candidates out than a generation has, so that late ones come too."""
    session, out = Session(strategies.cma_es(9, sigma=0.4), X0), []

    def go(generations):
        rng = random.Random(2)
        while session.number < generations:
            out.extend(session.ask(12 - len(out)))
            candidate = out.pop(rng.randrange(len(out)))
            session.tell(candidate, f(candidate.params))
            session.stop()

    go(1)
    with compilations() as found:
        go(12)
    assert found == [0]


def test_one_at_a_time_under_constraints_is_a_generation_at_a_time():
    outside = lambda c: (float(np.sum(c**2)), [1.0 - float(c[0]), float(c[1]) - 2.0])
    make = lambda: Session(wrappers.augmented_lagrangian(strategies.cma_es(8), 2), np.array([3.0, 1.0], np.float32))
    whole, single = make(), make()
    for _ in range(12):
        generation = whole.ask()
        whole.tell(generation, [outside(c) for c in generation])
        for candidate in reversed(single.ask(8)):
            single.tell(candidate, outside(candidate.params))
    assert digest(single.state) == digest(whole.state)
    np.testing.assert_array_equal(single.best, whole.best)
    result = single.result()
    assert result.feasible
    assert (result.violation, single.history) == (0.0, whole.history)
    with pytest.raises(ValueError, match="expected violations of shape"):
        single.tell(single.ask(1)[0], (1.0, [0.0]))
    single.inject([np.array([1.0, 0.5], np.float32)], values=[(1.25, [0.0, -1.5])])
    np.testing.assert_array_equal(single.best, [1.0, 0.5] if whole.best_value > 1.25 else whole.best)
    assert pickle.loads(pickle.dumps(single)).result().feasible
