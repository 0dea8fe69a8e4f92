"""The loop between the scheduler, which decides, and an executor, which has the workers.

A generation's candidates reach the workers in one of two ways. *Candidates*: what they share (`decode`) once a worker
and generation, the genomes by slice. *Replicas*: a worker holds the strategy's state, is sent the n values of the
generation before and a key, tells and asks by itself, and evaluates its slices: 8 n bytes, whatever the number of
parameters. Driver and worker compare a checksum of state and population; a worker that differs is sent the state again.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.distributed import wire
from evoopt.distributed.jobs import LOG, Ticket
from evoopt.distributed.policy import Policy
from evoopt.distributed.scheduler import Scheduler
from evoopt.distributed.worker import Message, Reply, Task, blank, compiled, put
from evoopt.population import Population
from evoopt.types import Answers, Key, error

MODES = ("auto", "candidates", "replicas")
REPLICAS_FROM = 1 << 18  # bytes a worker and generation from which replicas are chosen
BEHIND = 16  # generations that a replica may lag and still be caught up by values alone
TOLD_OF_FAILURES = 10  # evaluations that raised, in the log
KEPT_FAILURES = 100  # tracebacks that a generation keeps
REFUSALS = 3  # of one slice by one worker, after which the worker is replaced
REFUSED = 12  # times that one slice may come back from anywhere
BAD = 3  # failures that only one worker had, after which it is replaced
AGREED = 8  # failures that another worker confirmed, after which a failure counts at once
MORE_AFTER = 60.0  # seconds between two calls for one more worker, doubled each time
REPICKLED = 64 << 20  # bytes of an objective up to which it is looked at for changes in every generation


class Joined(NamedTuple):
    """A worker is ready."""

    worker: str
    facts: dict[str, Any]  # node, pid, ...


class Left(NamedTuple):
    """A worker is gone."""

    worker: str
    reason: str
    blame: bool = True  # whether the slice it worked on may be the cause


class Stalled(NamedTuple):
    """The operating system says of a worker that it lives and does not run, as one that was stopped."""

    worker: str
    reason: str


class Answered(NamedTuple):
    """A slice came back; `size` is the bytes that it took on the wire."""

    worker: str
    number: int
    reply: Reply
    size: int = 0


class Content(NamedTuple):
    """A part of a message, ready to be sent."""

    payload: Any
    size: int


class Executor(Protocol):
    """Something that has workers: processes on this or other machines, or none at all in tests."""

    def start(self) -> None:
        """Get the first workers going; called once."""
        ...

    def now(self) -> float:
        """Seconds of a clock that only rises."""
        ...

    def encode(self, content: Any, what: str) -> Content:
        """What is sent in its place. Raises a sentence about `what` if it can't be sent."""
        ...

    def send(self, worker: str, number: int, message: Message) -> int:
        """Have a worker evaluate; the answer comes as `Answered` with this number. Bytes besides the parts'."""
        ...

    def poll(self, seconds: float) -> list[Any]:
        """What happened: `Joined`, `Left`, `Stalled`, `Answered`. Waits up to `seconds` for something."""
        ...

    def kill(self, worker: str) -> None:
        """Give a worker up, and get another one in its place."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...

    # It may also have `send_many(sends) -> bytes of each`, which is given all sends of a moment; `more()`, which starts
    # one more worker where there is room; and `call_seconds`, the driver's time for one call.


class Source(NamedTuple):
    """Where a population came from, by which a replica can ask it itself: `population = strategy.ask(state, key)`."""

    strategy: Any
    state: Any
    key: Key


@dataclasses.dataclass
class Job:
    """A generation under way."""

    number: int
    population: Population
    packed: Any  # genomes and each, as NumPy arrays
    needs: dict[str, int]
    contents: dict[str, Content]
    replicas: bool
    key: Any = None
    state: Any = None
    expected: tuple[int, ...] = ()
    has_aux: bool = False
    out: Any = None
    skip: np.ndarray | None = None
    failures: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)
    tickets: dict[int, Ticket] = dataclasses.field(default_factory=dict)
    missing: list[int] = dataclasses.field(default_factory=list)
    jit: bool = True
    failed: int = 0  # candidates whose evaluation raised
    tried: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)  # candidate -> (worker, traceback)
    refused: collections.Counter[tuple[int, str]] = dataclasses.field(default_factory=collections.Counter)
    broken: dict[int, str] = dataclasses.field(default_factory=dict)  # start of a slice -> the worker that can't do it


class Evaluator:
    """Evaluates populations by an executor's workers; a drop-in for `Population.map`.

    The answers have the same bits with any number of workers and whatever happens to them: evaluation runs in
    micro-batches of one fixed shape, and the first answer to a candidate is the only one that counts.

    Args:
        executor: who evaluates.
        policy: how a generation is cut, and when patience ends.
        batch_size: candidates a worker evaluates at once, unless a call says otherwise.
        mode: `candidates`, `replicas`, or `auto`, which chooses replicas where a generation's candidates would be more
            than 256 kB a worker, the caller says where they come from, and the answers are plain values.
        errors: `nan`: a candidate whose evaluation raises has no answer, and is named in the log; `raise`: the first
            one ends the run. If all raise, that is an error in both.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy | None = None,
        *,
        batch_size: int | None = None,
        mode: str = "auto",
        errors: str = "nan",
    ) -> None:
        for name, value, known in (("mode", mode, MODES), ("errors", errors, ("nan", "raise"))):
            if value not in known:
                raise error(f"{name} as one of {', '.join(known)}", repr(value), "a misspelt word")
        self.executor, self.scheduler = executor, Scheduler(policy or Policy())
        self.batch_size, self.mode, self.errors = batch_size, mode, errors
        self.facts: dict[str, dict[str, Any]] = {}
        self.sent: collections.Counter[str] = collections.Counter()  # bytes to each worker
        self.received: collections.Counter[str] = collections.Counter()
        self.resent_states = 0  # replicas that differed
        self.states_sent = 0
        self._differing: collections.Counter[str] = collections.Counter()  # times in a row
        self._jobs: dict[int, Job] = {}
        self._known: dict[str, dict[str, int]] = {}
        self._task: tuple[Any, Content] | None = None
        self._args: tuple[tuple, Content] | None = None
        self._shape: tuple[Any, Content] | None = None  # of decode
        self._versions: collections.Counter[str] = collections.Counter()
        self._history: dict[int, Any] = {}  # job -> the answers that were told
        self._keys: dict[int, Any] = {}
        self._plain = False
        self._fell_back = False
        self._mark: Callable[..., Any] | None = None
        self._told_failures = 0
        self._started = False
        self._agreed = 0  # failures that two workers had
        self._bad: collections.Counter[str] = collections.Counter()  # failures that only this worker had
        self._latest = 0  # the job whose answers are told next
        self._more_at, self._more_wait = 0.0, MORE_AFTER
        self._own, self._slices = 0.0, 0  # seconds spent here on slices, and how many

    def __call__(self, population: Population, oracle: Callable[..., Any], *args: Any, **options: Any) -> Answers:
        """`population.map(oracle, *args, each=each, batch_size=batch_size)`, by the workers: `submit` and `collect`.

        Raises:
            RuntimeError: an evaluation can't be done anywhere, or all of them raise: with worker, node and candidate.
        """
        return self.collect(self.submit(population, oracle, *args, **options))

    def submit(
        self,
        population: Population,
        oracle: Callable[..., Any],
        *args: Any,
        each: Any = None,
        batch_size: int | None = None,
        jit: bool = True,
        has_aux: bool = False,
        source: Source | tuple | None = None,
    ) -> Job:
        """Begin a generation without waiting for it; `collect` waits.

        Args:
            population: the candidates.
            oracle: `strategy.oracle(objective)`; any callable that can be pickled. Keep the same object for a run.
            *args: the same for all candidates; sent again where they changed, also in place.
            each: a pytree with leading axis n, of which candidate i gets row i.
            batch_size: candidates a worker evaluates at once; the evaluator's by default.
            jit: False for an oracle that is no JAX function: it gets NumPy arrays and answers a float.
            has_aux: the oracle answers (answer, aux), as with `strategy.oracle(objective, has_aux=True)`.
            source: (strategy, state, key) that the population was asked from, which replicas need.
        """
        if not self._started:
            self.executor.start()
            self._started = True
        size = batch_size if batch_size is not None else self.batch_size
        if size is not None and size < 1:
            raise error("batch_size of at least 1", str(size), "a division that rounded down to zero")
        source = None if source is None else Source(*source)
        n = len(population)
        genomes, each = wire.pack((population.genomes, each))
        decode = wire.pack(population.decode)
        replicas = self._replicated(source, wire.nbytes(decode), wire.nbytes(genomes))
        self._set_task(Task(oracle, jit, size, source.strategy if source else None))
        self._set_args(args)
        needs = {"task": self._versions["task"], "args": self._versions["args"]}
        assert self._task
        assert self._args
        contents = {"task": self._task[1], "args": self._args[1]}
        skip = None
        if population.active is not None:  # a micro-batch without an active candidate is not evaluated
            active = np.asarray(population.active)
            whole = np.pad(active, (0, -n % (size or 1))).reshape(-1, size or 1).any(axis=1)
            skip = ~np.repeat(whole, size or 1)[:n]
        number = self.scheduler.begin(n, size or 1, self.executor.now(), skip)
        job = Job(number, population, (genomes, each), needs, contents, replicas, has_aux=has_aux, skip=skip, jit=jit)
        if replicas:
            assert source is not None
            assert self._mark is not None
            job.expected = self._mark(source.state, population)
            job.state, job.key = source.state, wire.pack(source.key)
            self._keys[number] = job.key
        self._send_as(job, "replica" if replicas else "decode")
        self._jobs[number] = job
        self._assign()
        return job

    def collect(self, job: Job, fraction: float = 1.0) -> Answers:
        """Wait for a generation, or a fraction of it: the answers, with leading axis n, NaN where there is none."""
        allowed = int((1.0 - fraction) * len(job.population))
        try:
            while not self.scheduler.finished(job.number) and self.scheduler.jobs[job.number].left > allowed:
                self.turn()
        finally:
            job.missing = self.scheduler.end(job.number)
            del self._jobs[job.number]
        n = len(job.population)
        if job.out is None:
            if job.failures:
                candidate, where, text = job.failures[0]
                raise self._raised(candidate, where, text, f"all {job.failed} evaluations raised; the first: ")
            if job.missing:
                raise error(
                    "an answer to at least one candidate of the generation",
                    f"none of {n}: their workers died, or they took longer than the timeout",
                    "an objective that ends its process, or a timeout shorter than an evaluation",
                    RuntimeError,
                )
            if not job.jit and n:
                raise error(
                    "a value for at least one candidate", "None for all", "an objective without `return`", TypeError
                )
            job.out = np.full(n, np.nan, jnp.result_type(float))
        # A Python objective's values stay float64, whatever JAX's float type is.
        answers = jax.tree.map(jnp.asarray, job.out) if job.jit else job.out
        self._plain = len(jax.tree.leaves(answers[0] if job.has_aux else answers)) == 1
        if job.population.active is not None:
            active, where = (jnp if job.jit else np).asarray(job.population.active), jnp.where if job.jit else np.where
            at = lambda x: active.reshape(-1, *(1,) * (x.ndim - 1))
            inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
            answers = jax.tree.map(lambda x: where(at(x), x, np.nan) if inexact(x) else x, answers)
        self._latest = job.number
        if job.number in self._keys:
            self._history[job.number] = wire.pack(answers[0] if job.has_aux else answers)
            for old in [k for k in self._keys if k < job.number - BEHIND]:
                self._keys.pop(old)
                self._history.pop(old, None)
        return answers

    def told(self, answers: Answers, *, moved: bool = False) -> None:
        """What the strategy was told of the last generation, where that is not what `collect` answered.

        Replicas are told the same. With `moved` the state was changed too, and replicas are sent it again.
        """
        if moved:
            self._history.pop(self._latest, None)
        elif self._latest in self._history:
            self._history[self._latest] = wire.pack(answers)

    def place(self, carry: Any) -> Any:
        """Where a run's carry is to be before its first generation: where it is."""
        return carry

    def turn(self, longest: float = 1.0) -> None:
        """Send what is to be sent, and wait up to `longest` seconds for something to happen."""
        self._assign()
        now = self.executor.now()
        for event in self.executor.poll(min(self.scheduler.wake(now), longest)):
            self._happened(event)
        now = self.executor.now()
        for worker in self.scheduler.overdue(now):
            self._known.pop(worker, None)
            self.executor.kill(worker)
        if self.scheduler.all_late and now >= self._more_at and (more := getattr(self.executor, "more", None)):
            self._more_at, self._more_wait = now + self._more_wait, 2 * self._more_wait
            more()

    def close(self) -> None:
        """End the workers."""
        if self._started:
            self.executor.close()
            self._started = False

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def status(self) -> str:
        """A few words for a progress bar."""
        c = self.scheduler.counters
        alive = len(self.scheduler.workers)
        parts = [f"{alive} worker{'' if alive == 1 else 's'}"]
        parts += [f"{number} {word}" for number, word in (
            (c.resubmissions, "resubmitted"), (c.deaths, "lost"), (c.quarantined, "quarantined"), (c.failed, "raised")
        ) if number]  # fmt: skip
        return ", ".join(parts)

    def metrics(self) -> dict[str, Any]:
        """The counters since the start, for a row of metrics; `workers` has them by worker."""
        return {
            **self.scheduler.facts(),
            "alive": len(self.scheduler.workers),
            "resent_states": self.resent_states,
            "bytes_sent": self.sent.total(),
            "bytes_received": self.received.total(),
        }

    def workers(self) -> dict[str, dict[str, Any]]:
        """Each worker's share: of those that are alive, of the last that were lost, and `earlier`, of the others."""
        shares = {**self.scheduler.tallies, "earlier": self.scheduler.crew.lost}
        return {
            name: {
                "node": self.facts.get(name, {}).get("node", ""), "alive": name in self.scheduler.workers,
                "answers": tally.answers, "slices": tally.slices, "lost": tally.lost,
                "seconds": round(tally.seconds, 3), "bytes_sent": self.sent[name],
                "bytes_received": self.received[name],
            } for name, tally in shares.items() if name != "earlier" or tally.slices or tally.lost
        }  # fmt: skip

    # ------------------------------------------------------------

    def _replicated(self, source: Source | None, decode: int, genomes: int) -> bool:
        if self.mode == "replicas" and source is None:
            cause = "evaluate(population, oracle, source=(strategy, state, key)) was meant"
            raise error("the source of the population, which replicas ask themselves", "None", cause)
        if self.mode == "candidates" or source is None or self._fell_back:
            return False
        share = decode + genomes / max(1, len(self.scheduler.workers))
        return self.mode == "replicas" or (self._plain and share >= REPLICAS_FROM)

    def _set_task(self, task: Task) -> None:
        before = self._task
        if before is not None and before[0] == task and not self._may_have_changed(before[1]):
            return
        content = self.executor.encode(task, "the objective")
        if before is not None and before[0] == task and content.payload is task:
            return  # nothing is pickled: the workers have the object itself
        if before is not None and (content is before[1] or _same_bytes(content.payload, before[1].payload)):
            self._task = (task, before[1])  # an oracle made anew, the same in every bit
            return
        self._versions["task"] += 1
        self._task = (task, content)
        self._args = None  # a worker forgets all with a new task
        self._history.clear()
        self._known = {worker: {} for worker in self._known}
        self._mark = compiled(task).mark
        self.scheduler.recompiling()

    def _may_have_changed(self, content: Content) -> bool:
        """Whether an objective is to be pickled again: an object whose fields change between generations is sent again.

        A large one is not: data belong in the arguments.
        """
        return content.size <= REPICKLED

    def _set_args(self, args: tuple) -> None:
        leaves, treedef = jax.tree.flatten(args)
        marks = [_mark_of(leaf) for leaf in leaves]
        if self._args is not None:
            old, _ = self._args
            if len(old) == len(marks) + 1 and old[0] == treedef and all(map(_same, old[1:], marks)):
                return
        self._versions["args"] += 1
        self._args = ((treedef, *marks), self.executor.encode(wire.pack(args), "the objective's arguments"))

    def _send_as(self, job: Job, part: str) -> None:
        job.replicas = part == "replica"
        job.needs = {k: v for k, v in job.needs.items() if k in ("task", "args")}
        if job.replicas:
            job.needs[part] = job.number
        else:
            leaves, shape = jax.tree.flatten(job.population.decode)
            if self._shape is None or self._shape[0] != shape:
                self._versions["shape"] += 1
                places = shape.unflatten(range(len(leaves)))
                self._shape = (shape, self.executor.encode(places, "the population's decode"))
            job.needs = {**job.needs, "shape": self._versions["shape"], part: job.number}
            job.contents["shape"] = self._shape[1]
            job.contents["decode"] = self.executor.encode(wire.pack(leaves), "the population's decode")
            job.expected = ()

    def _assign(self) -> None:
        begun, self.scheduler.pace.call_seconds = time.perf_counter(), getattr(self.executor, "call_seconds", 0.0)
        if self.scheduler.pace.call_seconds and self._slices:
            self.scheduler.pace.call_seconds += self._own / self._slices
        sends = []
        for ticket in self.scheduler.assign(self.executor.now()):
            job = self._jobs[ticket.job]
            job.tickets[ticket.number] = ticket
            known = self._known.setdefault(ticket.worker, {})
            parts = []
            for name, version in job.needs.items():
                if known.get(name) != version:
                    content = self._replica(job, known) if name == "replica" else job.contents[name]
                    if name == "task":
                        known.clear()
                    parts.append((name, version, content.payload))
                    self.sent[ticket.worker] += content.size
                    known[name] = version
            rows = slice(ticket.start, ticket.stop)
            genomes, each = job.packed
            own = (None if job.replicas else wire.rows(genomes, rows), wire.rows(each, rows))
            message = Message(
                job.number, ticket.start, ticket.stop, tuple(parts), tuple(job.needs.items()), own, job.expected
            )
            sends.append((ticket.worker, ticket.number, message))
        self._own += time.perf_counter() - begun
        self._slices += len(sends)
        if sends and (many := getattr(self.executor, "send_many", None)):
            sizes = many(sends)
        else:
            sizes = [self.executor.send(*each) for each in sends]
        for (worker, *_), size in zip(sends, sizes, strict=True):
            self.sent[worker] += size

    def _replica(self, job: Job, known: dict[str, int]) -> Content:
        """What brings a worker's replica from where it is to `job`: values if they lead there, else the state."""
        at = known.get("replica")
        path = [k for k in self._keys if at is not None and at <= k <= job.number]
        if at is not None and path and path[0] == at and all(k in self._history for k in path[:-1]):
            name = f"replica from {at}"
            if name not in job.contents:
                steps = tuple((self._history[a], self._keys[b]) for a, b in itertools.pairwise(path))
                job.contents[name] = self.executor.encode((None, steps), "the values of a generation")
            return job.contents[name]
        self.states_sent += 1
        if "state" not in job.contents:
            state = (wire.pack(job.state), ((None, job.key),))
            job.contents["state"] = self.executor.encode(state, "the strategy's state")
        return job.contents["state"]

    def _happened(self, event: Any) -> None:
        now = self.executor.now()
        if isinstance(event, Joined):
            self.facts[event.worker] = event.facts
            self.scheduler.join(event.worker, now, str(event.facts.get("node", "")))
        elif isinstance(event, Left):
            if event.worker in self.scheduler.workers:
                LOG.warning("worker %s is lost: %s", self._where(event.worker), event.reason)
            self._forget(event.worker)
            self.scheduler.leave(event.worker, now, event.reason, event.blame)
        elif isinstance(event, Stalled):
            self.scheduler.stall(event.worker, now, event.reason)
        else:
            self.received[event.worker] += event.size
            self._answered(event, now)

    def _answered(self, event: Answered, now: float) -> None:
        reply = event.reply
        job = next((j for j in self._jobs.values() if event.number in j.tickets), None)
        if job is None:
            self.scheduler.answer(event.number, now, reply.seconds)  # late or foreign: counted there
            return
        if event.worker not in self.scheduler.workers and (
            reply.refused or reply.differs or reply.error or reply.failures
        ):
            self.scheduler.counters.late += 1  # its slices were given to others when it went
            return
        ticket = job.tickets[event.number]
        where = self._where(event.worker)
        if reply.refused or reply.differs or (reply.start, reply.stop) != (ticket.start, ticket.stop):
            return self._refused(job, ticket, event, where, now)
        self._differing.pop(event.worker, None)
        if reply.error:
            return self._broken(job, ticket, event.worker, where, reply.error, now)
        again = self._to_be_tried(job, ticket, event.worker, reply)
        first = self.scheduler.answer(event.number, now, reply.seconds, again)
        failed = {candidate for candidate, _ in reply.failures}
        for candidate, text in reply.failures:
            if candidate in first:
                self._failed(job, candidate, where, text)
        for candidate in [c for c in job.tried if c in first and c not in failed]:  # it has an answer elsewhere
            worker, text = job.tried.pop(candidate)
            last = _said(text)
            LOG.warning("candidate %d raised on worker %s only: %s", candidate, self._where(worker), last)
            self._suspect(worker, now, f"{BAD} candidates raised there that others evaluate, the last one {last}")
        if reply.answers is not None and len(first):
            self._fill(job, reply, np.array([i for i in first if i not in failed], np.int64), where)

    def _to_be_tried(self, job: Job, ticket: Ticket, worker: str, reply: Reply) -> list[int]:
        """The candidates that raised here and are to be tried once on another worker before that counts."""
        whole = len(reply.failures) == ticket.stop - ticket.start and len(reply.failures) > 1
        if len(self.scheduler.workers) < 2 or (self._agreed >= AGREED and not whole):
            return []
        again = []
        for candidate, text in reply.failures:
            if candidate not in job.tried:
                job.tried[candidate] = (worker, text)
                again.append(candidate)
            elif job.tried[candidate][0] != worker:
                self._agreed += 1
        return again

    def _suspect(self, worker: str, now: float, reason: str) -> None:
        """A failure that only this worker had: after some of them it is replaced."""
        self._bad[worker] += 1
        if self._bad[worker] >= BAD and worker in self.scheduler.workers:
            self._replace(worker, now, reason)

    def _replace(self, worker: str, now: float, reason: str) -> None:
        LOG.warning("worker %s is replaced: %s", self._where(worker), reason)
        self.scheduler.counters.bad_workers += 1
        self._forget(worker)
        self.scheduler.leave(worker, now, reason, blame=False)
        self.executor.kill(worker)

    def _forget(self, worker: str) -> None:
        for kept in (self._known, self._bad, self._differing):
            kept.pop(worker, None)
        gone = [name for name in self.sent if name not in self.scheduler.tallies]
        for counter in (self.sent, self.received):
            counter["earlier"] += sum(counter.pop(name, 0) for name in gone if name != "earlier")
        for name in gone:
            self.facts.pop(name, None)

    def _refused(self, job: Job, ticket: Ticket, event: Answered, where: str, now: float) -> None:
        """A slice came back unevaluated: it is sent again, with all that the worker may lack; not for ever."""
        reply, worker = event.reply, event.worker
        known = self._known.get(worker, {})
        if reply.differs:
            known.pop("replica", None)
            self._differs(job, worker, where)
        else:
            known.clear()
            LOG.warning("worker %s could not evaluate: %s; it is sent all again", where, reply.refused)
        self.scheduler.refuse(event.number, now)
        job.refused[ticket.start, worker] += not reply.differs
        everywhere = sum(count for (start, _), count in job.refused.items() if start == ticket.start)
        if everywhere >= REFUSED:
            raise self._raised(range(ticket.start, ticket.stop), where, f"refused {everywhere} times: {reply.refused}")
        if job.refused[ticket.start, worker] >= REFUSALS and worker in self.scheduler.workers:
            self._replace(worker, now, f"it sent the same slice back {REFUSALS} times: {reply.refused}")

    def _broken(self, job: Job, ticket: Ticket, worker: str, where: str, text: str, now: float) -> None:
        """A slice can't be evaluated on this worker: once more on another one, then it is an error."""
        before = job.broken.get(ticket.start)
        if len(self.scheduler.workers) < 2 or (before is not None and before != worker):
            raise self._raised(range(ticket.start, ticket.stop), where, text)
        job.broken[ticket.start] = worker
        last = _said(text)
        LOG.warning("worker %s could not evaluate a slice: %s; another worker tries", where, last)
        self.scheduler.refuse(ticket.number, now, worker)
        self._suspect(worker, now, f"it could not evaluate {BAD} slices: {last}")

    def _fill(self, job: Job, reply: Reply, first: np.ndarray, where: str) -> None:
        if job.out is None:
            job.out = blank(reply.answers, len(job.population))
        shapes = lambda tree: jax.tree.map(lambda x: (x.shape[1:], x.dtype), tree)
        if jax.tree.structure(job.out) != jax.tree.structure(reply.answers) or shapes(job.out) != shapes(reply.answers):
            raise error(
                f"answers like those of the other candidates: {shapes(job.out)}",
                f"{shapes(reply.answers)} for candidates {reply.start} to {reply.stop - 1}, worker {where}",
                "an objective whose answer's shape or type depends on the candidate",
            )
        take = first - reply.start
        put(job.out, first, jax.tree.map(lambda x: x[take], reply.answers))

    def _differs(self, job: Job, worker: str, where: str) -> None:
        self.resent_states += 1
        LOG.warning("worker %s: its replica differs from the driver's state; it is sent the state again", where)
        self._differing[worker] += 1
        if self._differing[worker] > 2 and job.replicas:  # not even the state itself leads to the same population
            LOG.warning("worker %s asks another population from the same state: candidates are sent from now on", where)
            self._fell_back = True
            self._send_as(job, "decode")

    def _failed(self, job: Job, candidate: int, where: str, text: str) -> None:
        if len(job.failures) < KEPT_FAILURES:
            job.failures.append((candidate, where, text))
        job.failed += 1
        self.scheduler.counters.failed += 1
        if self.errors == "raise":
            raise self._raised(candidate, where, text)
        self._told_failures += 1
        if self._told_failures <= TOLD_OF_FAILURES:
            LOG.warning(
                "candidate %d has no answer, its evaluation on worker %s raised %s", candidate, where, _said(text)
            )

    def _raised(self, candidates: Any, where: str, text: str, prefix: str = "") -> Exception:
        if isinstance(candidates, range):
            what = f"candidates {candidates.start} to {candidates.stop - 1}"
        else:
            what = f"candidate {candidates}"
        return error(
            "a value for every candidate",
            f"{prefix}an exception for {what} on worker {where}:\n{text.strip()}",
            "an objective that fails here too: call it with one candidate before spreading it",
            RuntimeError,
        )

    def _where(self, worker: str) -> str:
        facts = self.facts.get(worker, {})
        return f"{worker} (node {facts.get('node', 'unknown')}, process {facts.get('pid', 'unknown')})"


def _said(text: str) -> str:
    """The line of a traceback that names the exception; its message may have several."""
    lines = text.strip().splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith("  File ")), default=-1)
    return next((line for line in lines[last + 1 :] if line and not line[0].isspace()), lines[-1])


def _mark_of(leaf: Any) -> Any:
    """By what a changed argument is told: arrays of JAX by themselves, others by their bytes."""
    if isinstance(leaf, jax.Array):
        return leaf
    if type(leaf) in (bool, int, float, complex, str, bytes):
        return (type(leaf), repr(leaf))
    if (type(leaf) is np.ndarray or isinstance(leaf, np.generic)) and not leaf.dtype.hasobject:
        return (type(leaf), leaf.dtype, leaf.shape, hashlib.blake2b(leaf.tobytes()).digest())
    return object()  # something else, such as a masked array or a table, has more than its numbers: sent every time


def _same_bytes(a: Any, b: Any) -> bool:
    return isinstance(a, bytes) and isinstance(b, bytes) and a == b


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, jax.Array) or isinstance(b, jax.Array) else a == b
