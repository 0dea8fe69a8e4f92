"""The loop between the scheduler, which decides, and an executor, which has the workers.

A generation's candidates reach the workers in one of two ways. *Candidates*: what they share (`decode`) once a worker
and generation, the genomes by slice. *Replicas*: a worker holds the strategy's state, is sent the n values of the
generation before and a key, tells and asks by itself, and evaluates its slices: 8 n bytes, whatever the number of
parameters. Driver and worker compare a checksum of state and population; a worker that differs is sent the state again.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.distributed import wire
from evoopt.distributed.scheduler import LOG, Policy, Scheduler, Ticket
from evoopt.distributed.worker import Message, Reply, Task, blank, compiled, put
from evoopt.population import Population
from evoopt.types import Answers, Key, error

MODES = ("auto", "candidates", "replicas")
REPLICAS_FROM = 1 << 18  # bytes a worker and generation from which replicas are chosen
BEHIND = 16  # generations that a replica may lag and still be caught up by values alone
TOLD_OF_FAILURES = 10  # evaluations that raised, in the log


class Joined(NamedTuple):
    """A worker is ready."""

    worker: str
    facts: dict[str, Any]  # node, pid, ...


class Left(NamedTuple):
    """A worker is gone."""

    worker: str
    reason: str
    blame: bool = True  # whether the slice it worked on may be the cause


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
        """What happened: `Joined`, `Left`, `Answered`. Waits up to `seconds` for something."""
        ...

    def kill(self, worker: str) -> None:
        """Give a worker up, and get another one in its place."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


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
            *args: the same for all candidates; sent again only if an array of it is another one.
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
        job = Job(number, population, (genomes, each), needs, contents, replicas, has_aux=has_aux, skip=skip)
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
                raise self._raised(candidate, where, text, f"all {len(job.failures)} evaluations raised; the first: ")
            job.out = np.full(n, np.nan, jnp.result_type(float))
        answers = jax.tree.map(jnp.asarray, job.out)
        self._plain = len(jax.tree.leaves(answers[0] if job.has_aux else answers)) == 1
        if job.population.active is not None:
            active = jnp.asarray(job.population.active)
            at = lambda x: active.reshape(-1, *(1,) * (x.ndim - 1))
            inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
            answers = jax.tree.map(lambda x: jnp.where(at(x), x, jnp.nan) if inexact(x) else x, answers)
        if job.number in self._keys:
            self._history[job.number] = wire.pack(answers[0] if job.has_aux else answers)
            for old in [k for k in self._keys if k < job.number - BEHIND]:
                self._keys.pop(old)
                self._history.pop(old, None)
        return answers

    def place(self, carry: Any) -> Any:
        """Where a run's carry is to be before its first generation: where it is."""
        return carry

    def turn(self, longest: float = 1.0) -> None:
        """Send what is to be sent, and wait up to `longest` seconds for something to happen."""
        self._assign()
        now = self.executor.now()
        for event in self.executor.poll(min(self.scheduler.wake(now), longest)):
            self._happened(event)
        for worker in self.scheduler.overdue(self.executor.now()):
            self._known.pop(worker, None)
            self.executor.kill(worker)

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
        """The counters since the start, in all and by worker, for a row of metrics."""
        return {
            **self.scheduler.facts(),
            "alive": len(self.scheduler.workers),
            "resent_states": self.resent_states,
            "bytes_sent": self.sent.total(),
            "bytes_received": self.received.total(),
            "workers": {
                name: {
                    "node": self.facts.get(name, {}).get("node", ""), "alive": name in self.scheduler.workers,
                    "answers": tally.answers, "slices": tally.slices, "lost": tally.lost,
                    "seconds": round(tally.seconds, 3), "bytes_sent": self.sent[name],
                    "bytes_received": self.received[name],
                } for name, tally in self.scheduler.tallies.items()
            },
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
        if before is not None and before[0] == task:
            return
        content = self.executor.encode(task, "the objective")
        if before is not None and isinstance(content.payload, bytes) and content.payload == before[1].payload:
            self._task = (task, before[1])  # an oracle made anew, the same in every bit
            return
        self._versions["task"] += 1
        self._task = (task, content)
        self._args = None  # a worker forgets all with a new task
        self._history.clear()
        self._known = {worker: {} for worker in self._known}
        self._mark = compiled(task).mark
        self.scheduler.recompiling()

    def _set_args(self, args: tuple) -> None:
        leaves, treedef = jax.tree.flatten(args)
        if self._args is not None:
            old, _ = self._args
            if len(old) == len(leaves) + 1 and old[0] == treedef and all(map(lambda a, b: a is b, old[1:], leaves)):
                return
        self._versions["args"] += 1
        self._args = ((treedef, *leaves), self.executor.encode(wire.pack(args), "the objective's arguments"))

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
            self.sent[ticket.worker] += self.executor.send(ticket.worker, ticket.number, message)

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
            self.scheduler.join(event.worker, now)
        elif isinstance(event, Left):
            if event.worker in self.scheduler.workers:
                LOG.warning("worker %s is lost: %s", self._where(event.worker), event.reason)
            self._known.pop(event.worker, None)
            self.scheduler.leave(event.worker, now, event.reason, event.blame)
        else:
            self.received[event.worker] += event.size
            self._answered(event, now)

    def _answered(self, event: Answered, now: float) -> None:
        reply = event.reply
        job = next((j for j in self._jobs.values() if event.number in j.tickets), None)
        if job is None:
            self.scheduler.answer(event.number, now, reply.seconds)  # late or foreign: counted there
            return
        ticket = job.tickets[event.number]
        where = self._where(event.worker)
        if reply.refused or reply.differs or (reply.start, reply.stop) != (ticket.start, ticket.stop):
            known = self._known.get(event.worker, {})
            if reply.differs:
                known.pop("replica", None)
                self._differs(job, event.worker, where)
            else:
                known.clear()
                LOG.warning("worker %s could not evaluate: %s; it is sent all again", where, reply.refused)
            self.scheduler.refuse(event.number, now)
            return
        self._differing.pop(event.worker, None)
        if reply.error:
            raise self._raised(range(ticket.start, ticket.stop), where, reply.error)
        first = self.scheduler.answer(event.number, now, reply.seconds)
        for candidate, text in reply.failures:
            if candidate in first:
                self._failed(job, candidate, where, text)
        if reply.answers is not None and len(first):
            self._fill(job, reply, first, where)

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
        job.failures.append((candidate, where, text))
        self.scheduler.counters.failed += 1
        if self.errors == "raise":
            raise self._raised(candidate, where, text)
        self._told_failures += 1
        if self._told_failures <= TOLD_OF_FAILURES:
            last = text.strip().splitlines()[-1]
            LOG.warning("candidate %d has no answer, its evaluation on worker %s raised %s", candidate, where, last)

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
