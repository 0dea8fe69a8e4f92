"""The loop between the scheduler, which decides, and an executor, which has the workers.

A generation's candidates reach the workers in one of two ways. *Candidates*: what they share (`decode`) once a worker
and generation, the genomes by slice. *Replicas*: a worker holds the strategy's state, is sent the n values of the
generation before and a key, tells and asks by itself, and evaluates its slices: 8 n bytes, whatever the number of
parameters. Driver and worker compare a checksum of state and population; a worker that differs is sent the state again.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from evoopt.distributed import wire
from evoopt.distributed.books import Books
from evoopt.distributed.executor import Answered, Began, Executor, Joined, Left, Stalled
from evoopt.distributed.faults import BAD, REFUSALS, REFUSED, Faults, raised, said
from evoopt.distributed.generation import Generation, Source, unneeded
from evoopt.distributed.jobs import Ticket
from evoopt.distributed.outbox import Outbox
from evoopt.distributed.policy import Policy
from evoopt.distributed.scheduler import Scheduler
from evoopt.distributed.whole import whole
from evoopt.distributed.worker import Task, compiled
from evoopt.population import Population
from evoopt.types import Answers, error

LOG = logging.getLogger("evoopt.distributed")
TOLD_OF_FAILURES = 10  # evaluations that raised, in the log
KEPT_FAILURES = 100  # tracebacks that a generation keeps
MORE_AFTER = 60.0  # seconds between two calls for one more worker, doubled each time


class Evaluator:
    """Evaluates populations by an executor's workers; a drop-in for `Population.map`.

    The answers have the same bits with any number of workers and whatever happens to them: evaluation runs in
    micro-batches of one fixed shape, and the first answer to a candidate is the only one that counts.

    Args:
        executor: who evaluates.
        policy: how a generation is cut, and when patience ends.
        batch_size: candidates a worker evaluates at once, unless a call says otherwise.
        replicate: whether workers hold replicas of the strategy's state instead of being sent candidates. None: where a
            generation's candidates would be more than 256 kB a worker, the caller says where they come from, and the
            answers are plain values.
        raise_errors: whether the first evaluation that raises ends the run. Otherwise its candidate has no answer (NaN)
            and is named in the log. If all raise, that is an error in any case.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy | None = None,
        *,
        batch_size: int | None = None,
        replicate: bool | None = None,
        raise_errors: bool = False,
    ) -> None:
        self.executor, self.scheduler = executor, Scheduler(policy or Policy())
        self.batch_size, self.replicate, self.raise_errors = batch_size, replicate, raise_errors
        self.books, self.faults = Books(), Faults()
        self.outbox = Outbox(executor, self.scheduler, self.books)
        self.parts, self.replicas = self.outbox.parts, self.outbox.replicas
        self._generations: dict[int, Generation] = {}
        self._started = False
        self._logged_failures = 0
        self._more_at, self._more_wait = 0.0, MORE_AFTER

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
        source: Source | tuple | None = None,
    ) -> Generation:
        """Begin a generation without waiting for it; `collect` waits.

        Args:
            population: the candidates.
            oracle: `strategy.oracle(objective)`; any callable that can be pickled. Keep the same object for a run.
            *args: the same for all candidates; sent again where they changed, also in place.
            each: a pytree with leading axis n, of which candidate i gets row i.
            batch_size: candidates a worker evaluates at once; the evaluator's by default.
            jit: False for an oracle that is no JAX function: it gets NumPy arrays and answers a float.
            source: for replicas, the (strategy, state, key) that the population comes from. They ask and tell by
                `evoopt.run.programs.Bound(strategy)`; a driver that does so too has the same bits, and sends little.
        """
        if not self._started:
            self.executor.start()
            self._started = True
        size = batch_size if batch_size is not None else self.batch_size
        if size is not None and size < 1:
            raise error("batch_size of at least 1", str(size), "a division that rounded down to zero")
        if not jit and not self.replicate and getattr(self.executor, "ready_made", False):
            population, source = whole(population), None
        source = None if source is None else Source(*source)
        genomes, each = wire.pack((population.genomes, each))
        share = wire.nbytes(wire.pack(population.decode)) + wire.nbytes(genomes) / max(1, len(self.scheduler.workers))
        replicas = self.replicas.chosen(self.replicate, source, share)
        held = source is not None and self.replicate is not False  # a replica needs the strategy
        task = Task(oracle, jit, size, source.strategy if source and held else None)
        if self.parts.set_task(task):
            self.replicas.restart(compiled(task).mark)
            self.scheduler.recompiling()
        self.parts.set_args(args)
        number = self.scheduler.begin(len(population), size or 1, self.executor.now(), unneeded(population, size or 1))
        generation = Generation(number, population, (genomes, each), self.parts.needs, self.parts.contents, source, jit)
        if replicas:
            self.replicas.begin(generation)
        else:
            self.outbox.by_candidates(generation)
        self._generations[number] = generation
        self.outbox.assign(self._generations)
        return generation

    def collect(self, generation: Generation, fraction: float = 1.0) -> Answers:
        """Wait for a generation, or a fraction of it: the answers, with leading axis n, NaN where there is none."""
        number, allowed = generation.number, int((1.0 - fraction) * len(generation.population))
        try:
            while not self.scheduler.finished(number) and self.scheduler.jobs[number].left > allowed:
                self.turn()
        finally:
            generation.missing = self.scheduler.end(number)
            del self._generations[number]
        answers = generation.answers()
        self.replicas.collected(generation, answers)
        return answers

    def told(self, answers: Answers, *, moved: bool = False) -> None:
        """Say what the strategy was told of the last generation if that is not what `collect` answered.

        Replicas are told the same. With `moved` the state was changed too, and replicas are sent it again.
        """
        self.replicas.told(answers, moved)

    def place(self, carry: Any) -> Any:
        """Where a run's carry is to be before its first generation: where it is."""
        return carry

    def turn(self, longest: float = 1.0) -> None:
        """Send what is to be sent, and wait up to `longest` seconds for something to happen."""
        self.outbox.assign(self._generations)
        now = self.executor.now()
        for event in self.executor.poll(min(self.scheduler.wake(now), longest)):
            self._happened(event)
        now = self.executor.now()
        for worker in self.scheduler.overdue(now):
            self.parts.known.pop(worker, None)
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
            "resent_states": self.replicas.resent_states,
            "bytes_sent": self.books.sent.total(),
            "bytes_received": self.books.received.total(),
        }

    def workers(self) -> dict[str, dict[str, Any]]:
        """Each worker's share: of those that are alive, of the last that were lost, and `earlier`, of the others."""
        return self.books.shares(self.scheduler)

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What each worker said of itself: its node, its process."""
        return self.books.facts

    @property
    def sent(self) -> collections.Counter[str]:
        """Bytes to each worker."""
        return self.books.sent

    # What happened ------------------------------------------------------------

    def _happened(self, event: Any) -> None:
        now = self.executor.now()
        if isinstance(event, Joined):
            self.books.facts[event.worker] = event.facts
            self.scheduler.join(event.worker, now, str(event.facts.get("node", "")))
        elif isinstance(event, Left):
            if event.worker in self.scheduler.workers:
                LOG.warning("worker %s is lost: %s", self.books.where(event.worker), event.reason)
            self._forget(event.worker)
            self.scheduler.leave(event.worker, now, event.reason, event.blame)
        elif isinstance(event, Stalled):
            self.scheduler.stall(event.worker, now, event.reason)
        elif isinstance(event, Began):
            self.scheduler.began(event.number, now)
        else:
            self.books.received[event.worker] += event.size
            self._answered(event, now)

    def _answered(self, event: Answered, now: float) -> None:
        reply, worker = event.reply, event.worker
        generation = next((g for g in self._generations.values() if event.number in g.tickets), None)
        if generation is None:
            self.scheduler.answer(event.number, now, reply.seconds)  # late or foreign: counted there
            return
        if worker not in self.scheduler.workers and (reply.refused or reply.differs or reply.error or reply.failures):
            self.scheduler.counters.late += 1  # its slices were given to others when it went
            return
        ticket = generation.tickets[event.number]
        if reply.refused or reply.differs or (reply.start, reply.stop) != (ticket.start, ticket.stop):
            return self._refused(generation, ticket, event, now)
        self.replicas.agrees(worker)
        if reply.error:
            return self._broken(generation, ticket, worker, reply.error, now)
        alone = len(self.scheduler.workers) < 2
        again = self.faults.to_be_tried(generation, worker, reply, alone)
        first = self.scheduler.answer(event.number, now, reply.seconds, again)
        failed = {candidate for candidate, _ in reply.failures}
        for candidate, text in reply.failures:
            if candidate in first:
                self._failed(generation, candidate, worker, text)
        for candidate in [c for c in generation.tried if c in first and c not in failed]:  # it has an answer elsewhere
            other, text = generation.tried.pop(candidate)
            LOG.warning("candidate %d raised on worker %s only: %s", candidate, self.books.where(other), said(text))
            self._suspect(other, now, f"{BAD} candidates raised there that others evaluate, the last one {said(text)}")
        if reply.answers is not None and len(first):
            answered = np.array([i for i in first if i not in failed], np.int64)
            generation.fill(reply, answered, self.books.where(worker))
        if again and alone:
            last = said(reply.failures[-1][1])
            self._replace(worker, now, f"every evaluation raises there, and no other worker is up to try them: {last}")

    def _refused(self, generation: Generation, ticket: Ticket, event: Answered, now: float) -> None:
        """A slice came back unevaluated: it is sent again, with all that the worker may lack; not for ever."""
        reply, worker, where = event.reply, event.worker, self.books.where(event.worker)
        known = self.parts.known.get(worker, {})
        if reply.differs:
            known.pop("replica", None)
            LOG.warning("worker %s: its replica differs from the driver's state; it is sent the state again", where)
            if self.replicas.differs(worker) and generation.replicas:
                text = "worker %s asks another population from the same state: candidates are sent from now on"
                LOG.warning(text, where)
                self.replicas.give_up()
                self.outbox.by_candidates(generation)
        else:
            known.clear()
            LOG.warning("worker %s could not evaluate: %s; it is sent all again", where, reply.refused)
        self.scheduler.refuse(event.number, now)
        generation.refused[ticket.start, worker] += not reply.differs
        everywhere = sum(count for (start, _), count in generation.refused.items() if start == ticket.start)
        if everywhere >= REFUSED:
            text = f"refused {everywhere} times: {reply.refused}"
            raise raised(range(ticket.start, ticket.stop), where, text)
        if generation.refused[ticket.start, worker] >= REFUSALS and worker in self.scheduler.workers:
            self._replace(worker, now, f"it sent the same slice back {REFUSALS} times: {reply.refused}")

    def _broken(self, generation: Generation, ticket: Ticket, worker: str, text: str, now: float) -> None:
        """A slice can't be evaluated on this worker: once more on another one, then it is an error.

        Where there is no other, the worker is replaced: a lost GPU is no reason to end a run.
        """
        where = self.books.where(worker)
        before = generation.broken.get(ticket.start)
        if before is not None and before[0] != worker:
            raise raised(range(ticket.start, ticket.stop), f"{before[1]}, then on worker {where}", text)
        generation.broken[ticket.start] = (worker, where)
        LOG.warning("worker %s could not evaluate a slice: %s; another worker tries", where, said(text))
        self.scheduler.refuse(ticket.number, now, worker)
        if len(self.scheduler.workers) < 2:
            self._replace(worker, now, f"it could not evaluate a slice, and no other is up to try: {said(text)}")
        else:
            self._suspect(worker, now, f"it could not evaluate {BAD} slices: {said(text)}")

    def _failed(self, generation: Generation, candidate: int, worker: str, text: str) -> None:
        where = self.books.where(worker)
        if len(generation.failures) < KEPT_FAILURES:
            generation.failures.append((candidate, where, text))
        generation.failed += 1
        self.scheduler.counters.failed += 1
        if self.raise_errors:
            raise raised(candidate, where, text)
        self._logged_failures += 1
        if self._logged_failures <= TOLD_OF_FAILURES:
            LOG.warning(
                "candidate %d has no answer, its evaluation on worker %s raised %s", candidate, where, said(text)
            )

    def _suspect(self, worker: str, now: float, reason: str) -> None:
        if self.faults.suspect(worker) and worker in self.scheduler.workers:
            self._replace(worker, now, reason)

    def _replace(self, worker: str, now: float, reason: str) -> None:
        LOG.warning("worker %s is replaced: %s", self.books.where(worker), reason)
        self.scheduler.counters.bad_workers += 1
        self._forget(worker)
        self.scheduler.leave(worker, now, reason, blame=False)
        self.executor.kill(worker)

    def _forget(self, worker: str) -> None:
        self.parts.known.pop(worker, None)
        self.faults.forget(worker)
        self.replicas.agrees(worker)
        self.books.forget(self.scheduler)
