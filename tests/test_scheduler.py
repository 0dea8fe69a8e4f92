"""The scheduler under every order of events, and evaluation in this process under every fault."""

import json
import logging

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import START, quadratic
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from evoopt import minimize, strategies
from evoopt.answers import WithAux
from evoopt.distributed import LocalEvaluator, Policy, steady_state, wire
from evoopt.distributed.local import Fate
from evoopt.distributed.scheduler import Scheduler
from evoopt.population import Population
from evoopt.run.checkpoint import digest
from evoopt.run.programs import Bound

THREE_PARTS = r"(?s)expected.*got.*usual cause"


class AnyOrder(RuleBasedStateMachine):
    """Workers come, go, answer twice, late, never, or for tickets nobody gave out."""

    policies = (
        Policy(deadline=5.0, first_deadline=5.0),
        Policy(slice=1, resubmit=False, deadline=5.0, first_deadline=9.0),
        Policy(slice=3, deaths=1),
        Policy(drop=0.25),
    )

    def __init__(self):
        super().__init__()
        self.now, self.names, self.foreign, self.late = 0.0, 0, 0, 0
        self.scheduler = None
        self.tickets, self.first, self.blamed = [], {}, {}

    def do(self):
        for ticket in self.scheduler.assign(self.now):
            assert ticket.worker in self.scheduler.workers
            job = self.scheduler.jobs[ticket.job]
            assert 0 <= ticket.start < ticket.stop <= job.n
            if not (job.deaths[ticket.start : ticket.stop] >= self.scheduler.policy.deaths).any():
                assert ticket.start % job.batch == 0
                assert ticket.stop % job.batch == 0 or ticket.stop == job.n, "a slice cuts a micro-batch"
            self.tickets.append(ticket)

    @precondition(lambda self: self.scheduler is None)
    @rule(policy=st.sampled_from(policies))
    def make(self, policy):
        self.scheduler = Scheduler(policy)

    @precondition(lambda self: self.scheduler and len(self.scheduler.jobs) < 2)
    @rule(n=st.integers(1, 40), batch=st.integers(1, 8), skip=st.booleans())
    def begin(self, n, batch, skip):
        mask = np.arange(n) >= (n // (2 * batch)) * batch if skip else None
        job = self.scheduler.begin(n, batch, self.now, mask)
        self.first[job], self.blamed[job] = np.zeros(n, int), 0
        self.do()

    @precondition(lambda self: self.scheduler and len(self.scheduler.workers) < 4)
    @rule()
    def join(self):
        self.scheduler.join(f"w{self.names}", self.now)
        self.names += 1
        self.do()

    @precondition(lambda self: self.scheduler and self.scheduler.workers)
    @rule(data=st.data(), blame=st.booleans())
    def leave(self, data, blame):
        self.scheduler.leave(data.draw(st.sampled_from(sorted(self.scheduler.workers))), self.now, "gone", blame)
        self.do()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def answer(self, data):  # any ticket ever given out: in turn or not, again, after its worker died, after its job
        ticket = data.draw(st.sampled_from(self.tickets))
        self.now += 0.1
        first = self.scheduler.answer(ticket.number, self.now, 0.1)
        assert ((first >= ticket.start) & (first < ticket.stop)).all()
        if ticket.job in self.scheduler.jobs:
            self.first[ticket.job][first] += 1
            assert (self.first[ticket.job] <= 1).all(), "an answer counted twice"
        else:
            self.late += 1
            assert not len(first)
        self.do()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def refuse(self, data):
        self.scheduler.refuse(data.draw(st.sampled_from(self.tickets)).number, self.now)
        self.do()

    @precondition(lambda self: self.scheduler)
    @rule(number=st.sampled_from([-1, 0, 10**6]))
    def answer_of_nobody(self, number):
        assert not len(self.scheduler.answer(number, self.now, 0.1))
        self.foreign += 1

    @precondition(lambda self: self.scheduler)
    @rule(seconds=st.floats(0.1, 7.0))
    def time_passes(self, seconds):
        self.now += seconds
        before = set(self.scheduler.workers)
        assert not self.scheduler.overdue(self.now), "time is not death"
        assert before == set(self.scheduler.workers)
        self.do()

    @precondition(lambda self: self.scheduler and self.scheduler.workers)
    @rule(data=st.data())
    def stall(self, data):
        self.scheduler.stall(data.draw(st.sampled_from(sorted(self.scheduler.workers))), self.now)
        self.do()

    @precondition(lambda self: self.scheduler and any(map(self.scheduler.finished, self.scheduler.jobs)))
    @rule()
    def end(self):
        self.finish(next(job for job in self.scheduler.jobs if self.scheduler.finished(job)))
        self.do()

    def finish(self, job):
        quarantined = len(self.scheduler.jobs[job].quarantined)
        skipped = self.scheduler.jobs[job].n - quarantined - int(self.first[job].sum())
        missing = self.scheduler.end(job)
        assert not self.first[job][missing].any(), "a candidate with an answer is called missing"
        assert len(missing) <= skipped + quarantined

    @invariant()
    def nothing_is_lost(self):
        if self.scheduler is None:
            return
        assert (self.scheduler.counters.foreign, self.scheduler.counters.late) == (self.foreign, self.late)
        for number, job in self.scheduler.jobs.items():
            held, late = np.zeros(job.n, int), np.zeros(job.n, int)
            for worker in self.scheduler.workers.values():
                assert len(worker.queue) <= 2
                for ticket in worker.queue:
                    if ticket.job == number:
                        (late if worker.late else held)[ticket.start : ticket.stop] += 1
            assert (held == job.hands).all()
            for part in job.pending:
                held[part.start : part.stop] += 1
            assert held[job.open].all(), "a candidate that nobody evaluates and nobody will, but a worker that is late"
            assert job.open.sum() == job.left

    def teardown(self):
        if self.scheduler is None:
            return
        self.scheduler.join("good", self.now)
        for _ in range(400):  # one worker that answers all is enough
            self.now += 0.1
            for worker in set(self.scheduler.workers) - {"good"}:
                self.scheduler.leave(worker, self.now, blame=False)
            self.do()
            mine = list(self.scheduler.workers["good"].queue)
            if not mine:
                break
            for ticket in mine:
                if ticket.job in self.scheduler.jobs:
                    self.first[ticket.job][self.scheduler.answer(ticket.number, self.now, 0.1)] += 1
                else:
                    self.scheduler.answer(ticket.number, self.now, 0.1)
        for job in list(self.scheduler.jobs):
            assert self.scheduler.finished(job)
            self.finish(job)


AnyOrder.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
)
TestAnyOrder = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")(AnyOrder.TestCase)


# Bits ------------------------------------------------------------

SNES = strategies.snes(22)
ASK, TELL = jax.jit(SNES.ask), jax.jit(SNES.tell)
WHOLE = jax.jit(lambda population: population.map(quadratic, batch_size=4))


def run(evaluate, generations=4):
    state = SNES.init(START, jax.random.key(0))
    for i in range(generations):
        key = jax.random.key(i)
        population = ASK(state, key)
        state = TELL(state, population, evaluate(population, (SNES, state, key)))
    return digest(state)


REFERENCE = []


def reference():
    REFERENCE[:] = REFERENCE or [run(lambda population, source: WHOLE(population))]
    return REFERENCE[0]


def spread(replicate=None, fate=None, policy=None, **options):
    evaluate = LocalEvaluator(fate=fate, policy=policy, batch_size=4, replicate=replicate, **options)
    return evaluate, run(lambda population, source: evaluate(population, quadratic, source=source))


ENDS = ("answer", "twice", "late", "die", "node", "hang", "lose", "foreign")


@settings(max_examples=16, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    replicate=st.booleans(),
    workers=st.integers(1, 4),
    slice_=st.sampled_from([None, 1, 2, 5]),
    resubmit=st.booleans(),
    fates=st.lists(st.tuples(st.sampled_from(ENDS), st.floats(0.01, 3.0), st.floats(0.0, 9.0)), max_size=30),
)
def test_the_same_bits_whatever_happens(replicate, workers, slice_, resubmit, fates):
    policy = Policy(slice=slice_, resubmit=resubmit, deadline=4.0, first_deadline=8.0, deaths=20)
    fate = lambda worker, message, i: Fate(*fates[i]) if i < len(fates) else Fate("answer", 0.1)
    evaluate, state = spread(replicate, fate, policy, workers=workers)
    assert state == reference()
    assert evaluate.scheduler.counters.answers == 4 * 22
    assert evaluate.scheduler.counters.quarantined == evaluate.scheduler.counters.dropped == 0


def test_a_replica_that_differs_is_sent_the_state_again(caplog):
    evaluate = LocalEvaluator(2, batch_size=4, replicate=True, policy=Policy(slice=1))

    def disturbed(population, source):
        if evaluate.scheduler.counters.joins:
            worker = evaluate.executor._workers["w1"]
            worker._state = worker._state._replace(mean=jax.tree.map(lambda x: x + 1, worker._state.mean))
        return evaluate(population, quadratic, source=source)

    assert run(disturbed) == reference()
    assert evaluate.replicas.resent_states == 3
    assert evaluate.replicas.states_sent == 2 + 3
    assert "differs from the driver's state" in caplog.text


def test_a_worker_that_asks_differently_gets_candidates(caplog):
    evaluate = LocalEvaluator(1, batch_size=4, replicate=True)

    def disturbed(population, source):
        strategy, state, key = source
        return evaluate(population, quadratic, source=(strategy, state, jax.random.fold_in(key, 1)))

    assert run(disturbed) == reference()
    assert "candidates are sent from now on" in caplog.text


def test_replicas_are_sent_n_values_and_little_else():
    n, policy = 256, Policy(slice=8)
    strategy = strategies.openai_es(n, sigma=0.1, learning_rate=0.1, regenerate=True)
    state = strategy.init(jnp.ones(3_000), jax.random.key(0))
    bound = Bound(strategy)
    sent = {}
    for mode in ("candidates", "replicas"):
        evaluate = LocalEvaluator(2, batch_size=8, replicate=mode == "replicas", policy=policy)
        for i in range(4):
            key = jax.random.key(i)
            population = bound.ask(state, key)
            before = dict(evaluate.sent)
            values = evaluate(population, jnp.sum, source=(strategy, state, key))
            state = bound.tell(state, population, values)
        sent[mode] = max(evaluate.sent[worker] - before[worker] for worker in before)
    assert sent["replicas"] <= 8 * n + 1000
    assert sent["candidates"] > 4 * 3_000


def test_replicas_are_chosen_where_candidates_are_large(monkeypatch):
    monkeypatch.setattr("evoopt.distributed.replicas.REPLICAS_FROM", 3_000)
    for size, chosen in ((10, False), (1_000, True)):
        strategy = strategies.openai_es(4, sigma=0.1, learning_rate=0.1, regenerate=True)
        state = strategy.init(jnp.ones(size), jax.random.key(0))
        evaluate = LocalEvaluator()
        for _ in range(2):  # the first generation shows that its answers are plain values
            population = jax.jit(strategy.ask)(state, jax.random.key(1))
            job = evaluate.submit(population, jnp.sum, source=(strategy, state, jax.random.key(1)))
            evaluate.collect(job)
        assert job.replicas is chosen


# Faults of single candidates ------------------------------------------------------------


def numbers(n):
    return Population(lambda g: g, jnp.arange(float(n)))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("bad", [0, 9, 21])
def test_a_candidate_that_kills_is_found_by_bisection(batch, bad, caplog):
    deadly = lambda worker, message, i: Fate("die" if message.start <= bad < message.stop else "answer", 0.1)
    evaluate = LocalEvaluator(3, deadly, batch_size=batch)
    values = np.asarray(evaluate(numbers(22), lambda x: x**2))
    assert np.isnan(values[bad])
    assert (np.delete(values, bad) == np.delete(np.arange(22.0) ** 2, bad)).all()
    assert evaluate.scheduler.counters.quarantined == 1
    assert evaluate.scheduler.counters.deaths <= 2 + 5
    assert f"candidate {bad} has no value" in caplog.text


def test_deaths_of_nodes_blame_nobody():
    fate = lambda worker, message, i: Fate("node" if i < 12 else "answer", 0.1)
    evaluate = LocalEvaluator(2, fate, policy=Policy(slice=1))
    assert evaluate(numbers(4), lambda x: x).tolist() == [0, 1, 2, 3]
    assert evaluate.scheduler.counters.quarantined == 0


def test_an_evaluation_that_raises_has_no_answer_and_is_named(caplog):
    def f(x):
        if x == 5:
            raise ZeroDivisionError("at five")
        return float(x)

    evaluate = LocalEvaluator(2, batch_size=4)
    values = evaluate(numbers(10), f, jit=False)
    assert jnp.isnan(values).nonzero()[0].tolist() == [5]
    assert "candidate 5" in caplog.text
    assert "node here" in caplog.text
    assert "ZeroDivisionError: at five" in caplog.text
    with pytest.raises(RuntimeError, match=r"(?s)candidate 5 on worker w\d \(node here.*ZeroDivisionError") as stop:
        LocalEvaluator(batch_size=4, raise_errors=True)(numbers(10), f, jit=False)
    assert "expected" in str(stop.value)


def test_a_raise_inside_a_compiled_evaluation_is_found_too(caplog):
    def check(x):
        if x == 5:
            raise ZeroDivisionError("at five")
        return x

    def f(x):
        return jax.pure_callback(check, jax.ShapeDtypeStruct((), jnp.float32), x, vmap_method="sequential")

    values = LocalEvaluator(batch_size=4)(numbers(10), f)
    assert jnp.isnan(values).nonzero()[0].tolist() == [5]
    assert values[6] == 6
    assert "candidate 5" in caplog.text


def test_if_all_raise_that_is_an_error():
    with pytest.raises(RuntimeError, match=r"(?s)all 3 evaluations raised.*NameError.*usual cause"):
        LocalEvaluator()(numbers(3), lambda x: nowhere, jit=False)  # type: ignore[name-defined] # noqa: F821
    with pytest.raises(RuntimeError, match=r"(?s)candidates 0 to 2 on worker w0.*TracerBoolConversion"):
        LocalEvaluator(batch_size=3)(numbers(3), lambda x: x if x > 1 else 0.0)


def test_answers_of_wrong_shape_or_kind_are_errors():
    ragged = lambda x: np.zeros(2) if x == 3 else 0.0
    with pytest.raises(RuntimeError, match=r"(?s)candidate 3.*one real number.*answers a vector"):
        LocalEvaluator(policy=Policy(slice=1), raise_errors=True)(numbers(5), ragged, jit=False)
    with pytest.raises(ValueError, match=r"shape \(16, 2\)"):
        minimize(lambda x: x, jnp.ones(2), strategies.snes(16), generations=1, evaluator=LocalEvaluator())
    with pytest.raises(RuntimeError, match="an objective that answers text"):
        LocalEvaluator()(numbers(2), lambda x: "much", jit=False)
    with pytest.raises(TypeError, match="without `return`"):
        LocalEvaluator()(numbers(2), lambda x: None, jit=False)


# Patience ------------------------------------------------------------


def slow(worker, message, i):
    return Fate("answer", 100.0 if worker == "w0" and i > 3 else 1.0)


def test_workers_have_a_second_slice_in_hand_while_there_is_plenty():
    scheduler = Scheduler(Policy(slice=1))
    scheduler.begin(6, batch=1, now=0.0)
    for worker in "ab":
        scheduler.join(worker, now=0.0)
    assert [t.worker for t in scheduler.assign(now=0.0)] == ["a", "b", "a", "b"]
    assert scheduler.assign(now=0.0) == []


def test_policies_for_stragglers():
    times, values = {}, {}
    for name, policy in {
        "wait": Policy(slice=1, resubmit=False, deadline=1e6),
        "resubmit": Policy(slice=1, deadline=1e6),
        "drop": Policy(slice=1, drop=0.2, deadline=1e6),
    }.items():
        evaluate = LocalEvaluator(3, slow, policy=policy)
        values[name] = np.asarray(evaluate(numbers(20), lambda x: x))
        times[name] = evaluate.executor.clock
    assert times["wait"] > 100 > 15 > times["resubmit"]
    assert times["drop"] <= times["resubmit"]
    assert (values["wait"] == np.arange(20)).all()
    assert (values["resubmit"] == np.arange(20)).all()
    assert 1 <= np.isnan(values["drop"]).sum() <= 4


def test_what_a_hung_worker_has_is_given_to_another_at_its_deadline():
    fate = lambda worker, message, i: Fate("hang" if i == 5 else "answer", 0.5)
    evaluate = LocalEvaluator(2, fate, policy=Policy(slice=1, resubmit=False, deadline=3.0, first_deadline=3.0))
    assert evaluate(numbers(12), lambda x: x).tolist() == list(range(12))
    assert evaluate.scheduler.counters.overdue == 1
    assert evaluate.executor.clock < 2 * 3.0


def test_a_worker_that_joins_is_used_at_once():
    fate = lambda *_: Fate("answer", 1.0)
    evaluate = LocalEvaluator(1, fate, joins=[(3.0, "late")], policy=Policy(slice=1))
    evaluate(numbers(12), lambda x: x)
    assert evaluate.scheduler.tallies["late"].answers >= 4
    assert evaluate.workers()["late"]["answers"] >= 4
    assert evaluate.executor.clock < 9


def test_nobody_left_is_an_error_not_a_wait():
    evaluate = LocalEvaluator(1, lambda *_: Fate("die", 0.1), restart=None)
    with pytest.raises(RuntimeError, match=THREE_PARTS):
        evaluate(numbers(3), lambda x: x)


def test_candidates_that_are_not_active_are_not_evaluated():
    asked = []
    population = Population(lambda g: g, jnp.arange(12.0), jnp.arange(12) < 5)
    values = LocalEvaluator(batch_size=2)(population, lambda x: asked.append(float(x)) or 1.0, jit=False)
    assert jnp.isnan(values).nonzero()[0].tolist() == list(range(5, 12))
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]  # 5 is in the micro-batch of 4


# In the loop ------------------------------------------------------------


def test_minimize_with_an_evaluator(tmp_path):
    from evoopt.run.folder import Run

    def f(x, context, each):
        return WithAux(jnp.sum((x - context["goal"]) ** 2) + 0.01 * each, {"x": x})

    strategy = strategies.openai_es(16, sigma=0.1, learning_rate=0.1)

    def search(evaluator, run=None, generations=6):
        return minimize(
            f, jnp.ones(3), strategy, key=3, generations=generations,
            context={"goal": jnp.array(2.0)}, each=lambda context, n: jnp.arange(n, dtype=jnp.float32),
            update=lambda context, aux: {"goal": context["goal"] + 0.001 * aux["x"].mean()},
            batch_size=4, evaluator=evaluator, run=run,
        )  # fmt: skip

    bits = lambda result: digest((result.state, result.context, result.best, result.best_value))
    alone = search(LocalEvaluator())
    fate = lambda worker, message, i: Fate(("answer", "die", "answer", "twice", "answer")[i % 5], 0.1)
    assert bits(search(LocalEvaluator(3, fate, replicate=True, policy=Policy(slice=1, deaths=9)))) == bits(alone)
    with Run.create(tmp_path, "run", {}) as run:
        search(LocalEvaluator(2), run, generations=3)
    with Run.open(run.path) as run:
        assert bits(search(LocalEvaluator(3), run)) == bits(alone)
        workers = json.loads((run.path / "workers.json").read_text())
    assert {w["node"] for w in workers.values()} == {"here"}
    assert sum(w["answers"] for w in workers.values()) == 3 * 16


def test_minimize_spreads_python_objectives(capsys):
    f = lambda x: float(np.sum((np.asarray(x) - 2.0) ** 2))
    results = [
        minimize(f, jnp.ones(3), strategies.snes(8), jit=False, generations=4, evaluator=evaluator, progress=True)
        for evaluator in (None, LocalEvaluator(3))
    ]
    assert len({digest((r.state, r.best)) for r in results}) == 1
    assert "3 workers" in capsys.readouterr().err


# Without a barrier ------------------------------------------------------------


def steady(workers, fate=None, strategy=None, **options):
    strategy = strategy or SNES
    state = strategy.init(START, jax.random.key(0))
    evaluate = LocalEvaluator(workers, fate, policy=Policy(slice=1, deaths=9))
    told = list(steady_state(evaluate, strategy, state, quadratic, key=3, batch_size=4, **options))
    return evaluate, told


def test_steady_state_waits_for_nobody_and_keeps_its_bits():
    seconds = lambda worker, message, i: 0.1 + 0.9 * (message.start == 8)  # one slice of each generation is slow
    slow = lambda *a: Fate("answer", seconds(*a))
    faulty = lambda w, m, i: Fate(("answer", "die", "answer", "twice", "lose")[i % 5], seconds(w, m, i))
    digests, clocks = set(), {}
    for name, workers, fate in (("one", 1, None), ("three", 3, slow), ("faulty", 3, faulty)):
        evaluate, told = steady(workers, fate, tells=8)
        digests.add(digest(told[-1].state))
        clocks[name] = evaluate.executor.clock
    assert len(digests) == 1
    assert [t.staleness for t in told] == [0] + 7 * [1]
    barrier, _ = steady(3, slow, tells=8, ahead=1)
    assert clocks["three"] < 0.8 * barrier.executor.clock


def test_steady_state_with_partial_answers_still_finds_the_optimum():
    slow = lambda worker, message, i: Fate("answer", 5.0 if i % 7 == 0 else 0.1)
    for strategy in (SNES, strategies.openai_es(22, sigma=0.1, learning_rate=0.1)):
        _, told = steady(3, slow, strategy, tells=40, fraction=0.7)
        assert {t.answered for t in told} <= set(range(16, 23))
        assert min(t.answered for t in told) < 22
        assert float(quadratic(strategy.recommend(told[-1].state))) < 0.25 * float(quadratic(START))
    for options in ({"ahead": 0}, {"fraction": 0.0}, {"tells": -1}):
        with pytest.raises(ValueError, match=THREE_PARTS):
            steady(1, **{"tells": 1, **options})


# Parts ------------------------------------------------------------


def test_what_travels_arrives_the_same():
    tree = {
        "key": jax.random.split(jax.random.key(3), 4),
        "weak": jnp.asarray(2.5),
        "half": jnp.ones((4, 2), jnp.bfloat16),
        "flag": jnp.array([True, False, True, True]),
        "number": 3,
    }
    back = jax.tree.map(jnp.asarray, wire.unpack(wire.pack(tree)))
    assert jax.tree.map(jax.typeof, back) == jax.tree.map(lambda x: jax.typeof(jnp.asarray(x)), tree)
    assert digest(back) == digest(jax.tree.map(jnp.asarray, tree))
    keys = wire.unpack(wire.rows(wire.pack(tree["key"]), slice(1, 3)))
    assert (jax.random.key_data(keys) == jax.random.key_data(tree["key"][1:3])).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32", "key"])
def test_a_fingerprint_changes_with_every_bit_and_place(dtype):
    base = jnp.zeros(40, "uint32" if dtype == "key" else dtype)
    changed = [base.at[i].set(True if dtype == "bool" else 1) for i in range(40)]
    trees = [{"a": base}, {"a": base, "b": base}, {"a": base[:39]}, *({"a": x} for x in changed)]
    trees += [{"a": base, "b": changed[0]}, {"a": changed[0], "b": base}]
    if dtype == "key":
        trees = [
            jax.tree.map(lambda x: jax.random.wrap_key_data(x[: len(x) // 2 * 2].reshape(-1, 2)), t) for t in trees
        ]
        del trees[2]
    mark = jax.jit(wire.fingerprint)
    assert len({tuple(np.asarray(mark(t)).tolist()) for t in trees}) == len(trees)


def test_bad_policies_are_refused():
    for options in ({"drop": 1.0}, {"drop": -0.1}, {"slice": 0}, {"deadline": -1.0}, {"deaths": 0}):
        with pytest.raises(ValueError, match=THREE_PARTS):
            Policy(**options)
    with pytest.raises(ValueError, match=THREE_PARTS):
        LocalEvaluator(0)
    with pytest.raises(ValueError, match=THREE_PARTS):
        LocalEvaluator(replicate=True)(numbers(3), lambda x: x)
    with pytest.raises(ValueError, match=THREE_PARTS):
        LocalEvaluator(batch_size=0)(numbers(3), lambda x: x)


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.WARNING, "evoopt.distributed")


def test_a_function_in_decode_travels_once():
    evaluate, scale = LocalEvaluator(2), 2.0
    population = Population(lambda g: g * scale, jnp.arange(4.0))
    for _ in range(3):
        assert evaluate(population, jnp.negative, batch_size=2).tolist() == [0, -2, -4, -6]
    assert evaluate.parts.versions["shape"] == 1
