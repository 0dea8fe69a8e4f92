"""What runs in a Ray worker, in this process and without Ray."""

import pickle
import sys

import numpy as np
import pytest
from jax.tree_util import Partial

from evoopt.distributed.ray import actor
from evoopt.distributed.worker import Message, Task

NAMES = ("task", "args", "shape", "decode")


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)


def squared(x):
    return float(x) ** 2


def itself(x):
    return x


def fails():
    raise OSError("no data set at /data")


def begun(fetch=bytes, initializer=None):
    worker = actor.Actor(fetch)
    return worker, worker.begin(actor.setup(pickle.dumps(initializer)))


def head():
    """Candidates 2 and 3 of a generation, with everything that a new worker lacks."""
    parts, needs = tuple((name, 1, None) for name in NAMES), tuple((name, 1) for name in NAMES)
    return pickle.dumps(Message(1, 2, 4, parts, needs, (np.array([2.0, 3.0]), None)))


def contents():
    return [pickle.dumps(x) for x in (Task(squared, False, 2), (), Partial(itself), [])]


def test_a_worker_begins_as_the_driver_says(monkeypatch):
    _, facts = begun()
    assert (facts["error"], facts["versions"]) == ("", actor.versions())
    assert "no data set at /data" in begun(initializer=fails)[1]["error"]
    other = actor.setup(pickle.dumps(fails))
    monkeypatch.setattr(actor, "versions", lambda: {"jax": "0.0.1"})
    facts = actor.Actor(bytes).begin(other)
    assert facts["versions"] == {"jax": "0.0.1"}
    assert facts["error"] == "", "the initializer ran although the versions differ"
    assert actor.Actor(bytes).begin(b"cut")["error"]


def test_a_slice_comes_and_its_answers_go_as_bytes():
    worker, _ = begun()
    reply = pickle.loads(worker.evaluate(head(), contents()))
    assert (reply.start, reply.stop, reply.error) == (2, 4, "")
    assert reply.answers.tolist() == [4.0, 9.0]


def test_large_parts_are_fetched():
    store = {"task": contents()[0]}
    worker, _ = begun(store.__getitem__)
    assert pickle.loads(worker.evaluate(head(), [["task"], *contents()[1:]])).answers.tolist() == [4.0, 9.0]
    assert "KeyError: 'lost'" in pickle.loads(worker.evaluate(head(), [["lost"], *contents()[1:]])).error


def test_a_part_that_can_not_be_unpickled_is_told():
    reply = pickle.loads(begun()[0].evaluate(head(), [b"cut", *contents()[1:]]))
    assert "UnpicklingError" in reply.error or "EOFError" in reply.error
    assert reply.answers is None
