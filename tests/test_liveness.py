"""Time is not death, and no failure loops for ever: every fault of a worker, played on the simulated clock."""

import contextlib
import functools
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from evoopt.distributed import LocalEvaluator, Policy
from evoopt.distributed.evaluator import Evaluator
from evoopt.distributed.executor import Content, Joined
from evoopt.distributed.jobs import Job, Ticket
from evoopt.distributed.local import Fate, LocalExecutor
from evoopt.distributed.parts import mark_of, same
from evoopt.distributed.scheduler import Scheduler
from evoopt.population import Population

HOUR = 3600.0


def numbers(n):
    return Population(lambda g: g, jnp.arange(float(n)))


def evaluated(evaluate, n, f=float):
    return np.asarray(evaluate(numbers(n), f, jit=False))


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.WARNING, "evoopt.distributed")


def test_stragglers_wake_the_driver_only_where_idle_workers_help():
    for resubmit, soon in ((True, True), (False, False)):
        scheduler = Scheduler(Policy(slice=1, resubmit=resubmit))
        scheduler.begin(1, 1, 0.0)
        for name in ("a", "b"):
            scheduler.join(name, 0.0)
        scheduler.assign(0.0)
        scheduler.pace.look = 5.0
        assert (scheduler.wake(1.0) < 5.0) is soon


def test_a_suspected_slice_is_cut_at_a_micro_batch():
    for start, stop, middle in ((8, 24, 16), (4, 12, 8), (8, 20, 12), (4, 8, 6), (4, 7, 5)):
        job = Job(24, 4, suspicious=1)
        job.pending.clear()
        assert not job.narrow(Ticket(1, 1, "a", start, stop, 0.0), "")
        assert [(r.start, r.stop) for r in job.pending] == [(start, middle), (middle, stop)]


def test_another_objective_is_given_time_to_compile():
    scheduler = Scheduler(Policy(slice=1, resubmit=False))
    scheduler.join("a", 0.0)
    for recompiled, deadline in ((True, 600), (False, 30), (True, 600)):
        if recompiled:
            scheduler.recompiling()
        job = scheduler.begin(1, 1, 0.0)
        (ticket,) = scheduler.assign(0.0)
        assert round(scheduler.wake(0.0)) == deadline
        scheduler.answer(ticket.number, 0.0, 0.1)
        scheduler.end(job)


def test_stragglers_are_looked_for_once_a_duration_is_known():
    scheduler = Scheduler(Policy(slice=1))
    scheduler.join("a", 0.0)
    worker, ticket, looks = scheduler.workers["a"], Ticket(1, 1, "a", 0, 1, 0.0), []
    for now in (1.0, 2.0, 3.0):  # the first one waited for compilation
        scheduler.pace.took(worker, ticket, 0.1, now)
        looks.append(scheduler.pace.look)
    assert looks == [np.inf, 2.0, 2.0]


@pytest.mark.parametrize(("workers", "seconds"), [(4, HOUR), (4, 660.0), (1, HOUR), (3, 3 * HOUR)])
def test_slow_evaluations_are_never_lost(workers, seconds):
    slow = lambda worker, message, i: Fate("answer", seconds * (message.stop - message.start))
    evaluate = LocalEvaluator(workers, slow, batch_size=1)
    assert evaluated(evaluate, 16).tolist() == list(range(16))
    counters = evaluate.scheduler.counters
    assert (counters.deaths, counters.quarantined, counters.dropped, counters.failed) == (0, 0, 0, 0)


def test_one_candidate_a_thousand_times_slower_than_the_rest():
    slow = lambda worker, message, i: Fate(
        "answer", 0.1 * (message.stop - message.start) + 100 * (message.start <= 5 < message.stop)
    )
    evaluate = LocalEvaluator(4, slow, batch_size=1)
    for _ in range(3):
        assert evaluated(evaluate, 16).tolist() == list(range(16))
    assert evaluate.scheduler.counters.deaths == 0


def random_schedules(schedules, seed):
    """How many candidates the default policy loses under random delays of 1 ms to 3 h, deaths and stops."""
    chance, lost = np.random.default_rng(seed), 0
    ends = ["answer", "node", "lose", "twice", "late", "stop", "die", "foreign"]
    for _ in range(schedules):
        workers, n, batch = int(chance.integers(1, 6)), int(chance.integers(1, 24)), int(chance.integers(1, 4))
        deadly, blamed = chance.random() < 0.5, []

        def fate(worker, message, i, deadly=deadly, blamed=blamed):
            seconds = 10 ** chance.uniform(-3, np.log10(3 * HOUR))
            end = str(chance.choice(ends, p=[0.6, 0.1, *[0.05] * 6])) if deadly and i < 30 else "answer"
            if end in ("late", "die"):  # one process dies by chance; the second one on the same slice is its doing
                end = "node" if blamed else end
                blamed.append(i)
            return Fate(end, seconds, later=seconds)

        values = evaluated(LocalEvaluator(workers, fate, batch_size=batch), n)
        lost += int(n - (values == np.arange(n)).sum())
    return lost


def test_random_delays_lose_nothing():
    assert random_schedules(60, 0) == 0


@pytest.mark.slow
def test_ten_thousand_random_schedules_lose_nothing():
    assert random_schedules(10_000, 1) == 0


def test_a_timeout_is_named_and_costs_its_candidate_alone(caplog):
    slow = lambda worker, message, i: Fate("answer", 1.0 + 1e6 * (message.start <= 3 < message.stop))
    evaluate = LocalEvaluator(2, slow, batch_size=1, policy=Policy(timeout=10.0, first_deadline=50.0))
    values = evaluated(evaluate, 8)
    assert np.flatnonzero(np.isnan(values)).tolist() == [3]
    assert evaluate.scheduler.counters.timeouts == 1
    assert "candidate 3 has no value (NaN)" in caplog.text
    assert "timeout of 10 s" in caplog.text


def test_a_generation_that_nobody_answered_is_an_error():
    with pytest.raises(RuntimeError, match=r"(?s)expected.*none of 3.*usual cause"):
        evaluated(LocalEvaluator(2, lambda *_: Fate("die", 0.1)), 3)
    with pytest.raises(RuntimeError, match=r"(?s)none of 2.*timeout"):
        evaluated(LocalEvaluator(1, lambda *_: Fate("answer", 1e9), policy=Policy(timeout=1.0, first_deadline=1.0)), 2)


def test_a_stopped_worker_is_helped_at_once_and_not_blamed():
    fate = lambda worker, message, i: Fate("stop" if worker == "w0" else "answer", 1.0)
    evaluate = LocalEvaluator(2, fate, batch_size=1, policy=Policy(slice=1))
    assert evaluated(evaluate, 6).tolist() == list(range(6))
    assert evaluate.executor.clock < 60
    assert evaluate.scheduler.counters.deaths == evaluate.scheduler.counters.quarantined == 0
    assert evaluated(LocalEvaluator(1, lambda w, m, i: Fate("stop" if i == 0 else "answer", 1.0)), 4).tolist() == [
        0,
        1,
        2,
        3,
    ]


class Own(BaseException):
    """Not an Exception, as the timeouts of some libraries."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, Own, MemoryError])
def test_whatever_an_objective_raises_is_no_answer(kind):
    def f(x):
        if x == 5:
            raise kind("at five")
        return float(x)

    for workers in (1, 2):
        evaluate = LocalEvaluator(workers, batch_size=4)
        values = evaluated(evaluate, 16, f)
        assert np.flatnonzero(np.isnan(values)).tolist() == [5]
        assert evaluate.scheduler.counters.deaths == 0
        assert evaluate.executor.sends < 30


def test_a_worker_that_alone_fails_is_replaced_and_its_candidates_go_to_others(caplog):
    """A full disk or a lost GPU on one worker."""
    evaluate, done = LocalEvaluator(2, batch_size=1, policy=Policy(slice=1)), []
    real = evaluate.executor._worker

    def worker(name):
        def broken(message):
            reply = real(name).evaluate(message)
            lost = tuple((i, "OSError: no space left on device") for i in range(message.start, message.stop))
            return reply._replace(answers=None, failures=lost)

        done.append(name)
        return real(name) if name != "w0" else type("Broken", (), {"evaluate": staticmethod(broken)})

    evaluate.executor._worker = worker
    assert evaluated(evaluate, 16).tolist() == list(range(16))
    assert evaluate.scheduler.counters.bad_workers == 1
    assert "raised on worker w0" in caplog.text
    assert "w0" in caplog.text
    assert "is replaced" in caplog.text
    assert "w0" not in evaluate.scheduler.workers


def test_a_module_that_one_worker_lacks_is_no_end_of_the_run(caplog):
    fate = lambda worker, message, i: Fate("break" if worker == "w0" else "answer", 0.1)
    evaluate = LocalEvaluator(2, fate, batch_size=1, policy=Policy(slice=1))
    assert evaluated(evaluate, 16).tolist() == list(range(16))
    assert evaluate.scheduler.counters.bad_workers == 1
    assert "another worker tries" in caplog.text
    with pytest.raises(RuntimeError, match=r"(?s)candidates 0 to .*no module here.*usual cause"):
        evaluated(LocalEvaluator(2, lambda *_: Fate("break", 0.1)), 4)
    with pytest.raises(RuntimeError, match="no module here"):
        evaluated(LocalEvaluator(1, lambda *_: Fate("break", 0.1)), 4)


def test_the_only_worker_that_breaks_is_replaced():
    """A lost GPU: a replacement can finish the run."""
    fate = lambda worker, message, i: Fate("break" if worker == "w0" else "answer", 0.1)
    for workers, joins in ((1, ()), (1, [(5.0, "late")])):
        evaluate = LocalEvaluator(workers, fate, batch_size=1, joins=joins)
        assert evaluated(evaluate, 16).tolist() == list(range(16))
        assert evaluate.scheduler.counters.bad_workers == 1
        assert "w0" not in evaluate.scheduler.workers
    evaluate = LocalEvaluator(1, lambda *_: Fate("break", 0.1))
    with pytest.raises(RuntimeError, match=r"(?s)candidates 0 to .*on worker w0 .*then on worker w\d .*no module here"):
        evaluated(evaluate, 4)
    assert evaluate.executor.sends < 10
    assert len(evaluate.scheduler.tallies) <= 3


def failing(evaluate, bad):
    """Every evaluation raises on the workers in `bad`."""
    real = evaluate.executor._worker

    def worker(name):
        def broken(message):
            lost = tuple((i, "OSError: no space left on device") for i in range(message.start, message.stop))
            return real(name).evaluate(message)._replace(answers=None, failures=lost)

        return type("Broken", (), {"evaluate": staticmethod(broken)}) if bad(name) else real(name)

    evaluate.executor._worker = worker
    return evaluate


@pytest.mark.parametrize(("batch", "slices", "unseen"), [(1, 1, 2), (1, None, 0), (8, None, 0)])
def test_the_only_worker_on_which_all_raises_is_replaced(batch, slices, unseen, caplog):
    """A full disk. Three failures in a row make it clear; those before, answered one by one, are lost."""
    evaluate = LocalEvaluator(1, batch_size=batch, policy=Policy(slice=slices))
    values = evaluated(failing(evaluate, lambda name: name == "w0"), 16)
    lost = np.isnan(values)
    assert lost.sum() == unseen
    assert (values[~lost] == np.arange(16)[~lost]).all()
    assert evaluate.scheduler.counters.bad_workers == 1
    assert "no other worker is up" in caplog.text
    assert evaluated(evaluate, 16).tolist() == list(range(16))


def test_an_objective_that_always_raises_costs_one_replacement():
    evaluate = failing(LocalEvaluator(1, batch_size=1), lambda name: True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"(?s)all 16 evaluations raised.*no space left"):
            evaluated(evaluate, 16)
    assert evaluate.scheduler.counters.bad_workers == 1
    assert evaluate.executor.sends < 3 * 16 + 4


def test_refusals_are_bounded():
    fate = lambda worker, message, i: Fate("refuse" if worker == "w0" else "answer", 0.1)
    evaluate = LocalEvaluator(2, fate, batch_size=1, policy=Policy(slice=1, resubmit=False))
    assert evaluated(evaluate, 16).tolist() == list(range(16))
    evaluate = LocalEvaluator(2, lambda *_: Fate("refuse", 0.1))
    with pytest.raises(RuntimeError, match=r"(?s)refused 12 times.*usual cause"):
        evaluated(evaluate, 4)
    assert evaluate.executor.sends < 60


def test_arguments_that_change_in_place_are_seen():
    data, evaluate = np.zeros(3), LocalEvaluator(2)
    for i in range(3):
        data[:] = i
        assert np.asarray(
            evaluate(numbers(2), lambda x, d: x + d["a"][0].sum(), {"a": [data]}, jit=False)
        ).tolist() == [3 * i, 3 * i + 1]


def test_objects_that_change_between_generations_are_pickled_again():
    import pickle

    class Shifted:
        t = 0.0

        def __call__(self, x):
            return x + self.t

    f, evaluate = Shifted(), LocalEvaluator(2)
    evaluate.executor.encode = lambda content, what: Content(
        data := pickle.dumps(repr(vars(f))), len(data)
    )  # as a cluster
    seen = []
    for t in (0.0, 0.0, 100.0, 100.0):
        f.t = t
        with contextlib.suppress(Exception):
            evaluate.submit(numbers(2), f, jit=False)
        seen.append(evaluate.parts.versions["task"])
    assert seen == [1, 1, 2, 2]


def test_rows_of_metrics_do_not_grow_with_the_workers_lost():
    fate = lambda worker, message, i: Fate("node" if i % 3 == 0 else "answer", 0.1)
    evaluate = LocalEvaluator(2, fate, batch_size=1, policy=Policy(slice=1))
    sizes = []
    for _ in range(12):
        evaluated(evaluate, 24)
        sizes.append(len(str(evaluate.metrics())))
    assert evaluate.scheduler.counters.deaths > 60
    assert max(sizes) < 600
    assert len(evaluate.workers()) < 40
    assert sum(w["answers"] for w in evaluate.workers().values()) == 12 * 24
    quiet = LocalEvaluator(3, lambda *_: Fate("answer", 0.1))
    evaluated(quiet, 50)
    assert quiet.status() == "3 workers"


def test_the_log_names_the_exception_and_not_its_last_line(caplog):
    def f(x):
        raise ValueError("first\nsecond") if x == 1 else RuntimeError("other")

    with pytest.raises(RuntimeError):
        evaluated(LocalEvaluator(1), 2, f)
    assert "raised ValueError: first" in caplog.text


def test_own_time_does_not_grow_with_the_population():
    """Reads of whole-population arrays a call, not seconds: at most a few, for a million candidates."""
    scheduler = Scheduler(Policy(slice=100))
    scheduler.begin(1_000_000, 1, 0.0)
    for i in range(50):
        scheduler.join(f"w{i}", 0.0)
    scanned = []
    job = scheduler.jobs[1]

    class Watched(np.ndarray):
        def __getitem__(self, index):
            if isinstance(index, slice):
                scanned.append((index.stop or len(self)) - (index.start or 0))
            return super().__getitem__(index)

    job.open, job.deaths = job.open.view(Watched), job.deaths.view(Watched)
    tickets, now = scheduler.assign(0.0), 0.0
    for _ in range(200):
        now += 0.01
        scheduler.answer(tickets.pop(0).number, now, 0.01)
        tickets += scheduler.assign(now)
    assert max(scanned) <= 1000
    assert functools.reduce(int.__add__, scanned) < 200 * 1000


def test_a_node_that_lacks_a_module_is_no_end_of_the_run():
    """All workers of one node fail alike: the other node is asked before it counts."""
    bad = ("w0", "w1", "w2", "w3")
    executor = LocalExecutor(1, lambda worker, *_: Fate("break" if worker in bad else "answer", 0.1), restart=None)
    executor._events.clear()
    for name in (*bad, "good"):
        executor._at(0.0, Joined(name, {"node": "other" if name == "good" else "bad"}))
    evaluate = Evaluator(executor, Policy(slice=1), batch_size=1)
    assert evaluated(evaluate, 16).tolist() == list(range(16))


def test_nodes_that_go_without_end_are_no_endless_loop():
    with pytest.raises(RuntimeError, match=r"(?s)none of 3.*usual cause"):
        evaluated(LocalEvaluator(2, lambda *_: Fate("node", 0.1), batch_size=1), 3)


def test_a_task_in_the_object_store_is_sent_once():
    evaluate, kept = LocalEvaluator(1), {}
    evaluate.executor.encode = lambda content, what: kept.setdefault(what, Content([what], 1 << 20))
    f = float
    for _ in range(3):
        with contextlib.suppress(Exception):
            evaluate.submit(numbers(2), f, jit=False)
    assert evaluate.parts.versions["task"] == 1


def test_arguments_that_are_more_than_their_numbers_are_always_sent():
    table, structured = np.ma.array([1.0, 2.0]), np.array([(1, [2])], [("a", int), ("b", object)])
    for leaf in (table, structured, 2**70 + 0.5j, object()):
        assert same(mark_of(leaf), mark_of(leaf)) == isinstance(leaf, complex)
    assert not same(mark_of(1), mark_of(True))
    assert not same(mark_of(0.0), mark_of(-0.0))
    assert not same(mark_of(np.zeros(2)), mark_of(np.zeros((2, 1))))


def test_a_worker_gets_its_part_of_a_short_job_in_one_slice():
    scheduler = Scheduler(Policy())
    for i in range(100):
        scheduler.join(f"w{i}", 0.0)
        scheduler.workers[f"w{i}"].answered = 1
    scheduler.pace.durations.append(0.05)
    scheduler.pace.call_seconds = 0.01
    job = scheduler.begin(1000, 1, 0.0)
    tickets = scheduler.assign(0.0)
    assert [t.stop - t.start for t in tickets] == [10] * 100
    assert not scheduler.jobs[job].pending


def test_the_driver_does_not_spin_while_a_slice_waits_for_another_worker():
    scheduler = Scheduler(Policy(slice=1))
    for name in ("a", "b"):
        scheduler.join(name, 0.0)
    scheduler.begin(2, 1, 0.0)
    tickets = scheduler.assign(0.0)
    for ticket in [t for t in tickets if t.worker == "a"]:
        scheduler.answer(ticket.number, 1.0, 1.0, failed=[ticket.start])
    assert not [t for t in scheduler.assign(1.0) if t.worker == "a"]
    scheduler.pace.look = 0.5
    assert scheduler.wake(1.0) > 1.0


def test_a_deadline_doubles_each_time_it_is_missed():
    scheduler = Scheduler(Policy(slice=1, resubmit=False, deadline=10.0, first_deadline=10.0))
    scheduler.join("a", 0.0)
    scheduler.begin(1, 1, 0.0)
    scheduler.assign(0.0)
    now, moments = 0.0, []
    for _ in range(4):
        now += scheduler.wake(now)
        assert scheduler.overdue(now) == []
        moments.append(round(now))
    assert moments == [10, 20, 40, 80]
