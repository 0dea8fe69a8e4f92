"""Which worker evaluates which candidates, and what becomes of an answer: decisions only, no processes and no clock.

The scheduler is told what happened and when (`join`, `leave`, `answer`, `refuse`), and says what to do (`assign`,
`overdue`). The same events at the same times give the same decisions, so every fault can be played to it by a test.

A job is one generation of n candidates (`jobs`). It is cut into slices of whole micro-batches, because a micro-batch of
one fixed shape is what has the same bits everywhere (DESIGN, rule 7). The first answer to a candidate counts; answers
that come twice, late or from nowhere are counted and dropped.

Time is not death. A slice that is overdue (`pace`) is given to another worker (`crew`) too, and whoever answers first
is heard: the bits are the same. Only a worker that dies puts its slice under suspicion. A slice that killed its workers
is cut finer, down to the one candidate that does it: its row is then quarantined, that is, left without an answer.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from evoopt.distributed.crew import Crew, Tally, Worker
from evoopt.distributed.jobs import Job, Ticket
from evoopt.distributed.pace import Pace
from evoopt.distributed.policy import Policy

LOG = logging.getLogger("evoopt.distributed")
TICK = 1e-6  # seconds past a moment, so that rounding can't make it seem still to come


@dataclasses.dataclass
class Counters:
    """What happened since the start. On a quiet day all but `answers` and `shared` are zero."""

    answers: int = 0  # candidates whose answer counted
    resubmissions: int = 0  # slices sent again because they were lost or overdue
    shared: int = 0  # slices that an idle worker began too, near a generation's end
    duplicates: int = 0  # answers whose candidates had all been answered
    late: int = 0  # answers to a job that is over
    foreign: int = 0  # answers to a ticket that was never given out
    deaths: int = 0  # workers lost while the run was on
    overdue: int = 0  # slices that missed a deadline, and were given to another worker too
    timeouts: int = 0  # candidates that took longer than the policy's timeout
    joins: int = 0
    refusals: int = 0  # slices that came back unevaluated
    quarantined: int = 0  # candidates that kill their workers
    dropped: int = 0  # candidates that were too slow
    failed: int = 0  # candidates whose evaluation raised
    bad_workers: int = 0  # workers that were replaced because they alone failed


class Scheduler:
    """The state of all slices.

    >>> scheduler = Scheduler(Policy(slice=2))
    >>> job = scheduler.begin(8, batch=2, now=0.0)
    >>> scheduler.join("a", now=0.0)
    >>> scheduler.join("b", now=0.0)
    >>> tickets = scheduler.assign(now=0.0)
    >>> [(t.worker, t.start, t.stop) for t in tickets]
    [('a', 0, 4), ('b', 4, 8)]
    >>> scheduler.leave("a", now=1.0, reason="killed")
    >>> scheduler.answer(tickets[1].number, now=2.0, seconds=1.0).tolist()
    [4, 5, 6, 7]
    >>> [(t.worker, t.start, t.stop) for t in scheduler.assign(now=2.0)]
    [('b', 0, 4)]
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.counters = policy, Counters()
        self.crew = Crew()
        self.pace = Pace(policy, self.crew)
        self.jobs: dict[int, Job] = {}
        self._tickets: dict[int, Ticket] = {}  # of open jobs, those of lost workers too
        self._numbers = self._job_numbers = 0

    @property
    def workers(self) -> dict[str, Worker]:
        """Those that are ready."""
        return self.crew.workers

    @property
    def tallies(self) -> dict[str, Tally]:
        """The shares of those that are ready, and of the last that were lost."""
        return self.crew.tallies

    # What happened ------------------------------------------------------------

    def begin(self, n: int, batch: int, now: float, skip: np.ndarray | None = None) -> int:
        """A new job of n candidates in micro-batches of `batch`; those in `skip` (n,) bool need no answer."""
        del now
        self._job_numbers += 1
        self.jobs[self._job_numbers] = Job(n, batch, self.policy.deaths, skip)
        return self._job_numbers

    def end(self, job: int) -> list[int]:
        """Forget a job; answers that are still under way are late from now on. The candidates without an answer."""
        ended = self.jobs.pop(job)
        self._tickets = {k: t for k, t in self._tickets.items() if t.job != job}
        missing = np.flatnonzero(ended.open).tolist()
        self.counters.dropped += len(missing)
        return sorted(missing + ended.quarantined)

    def finished(self, job: int) -> bool:
        """Whether no more answers are waited for."""
        j = self.jobs[job]
        return j.left <= int(self.policy.drop * j.n)

    def join(self, worker: str, now: float, node: str = "") -> None:
        """A worker is ready, on this node. Joining twice is joining once."""
        if worker not in self.workers:
            self.crew.join(worker, now, node)
            self.counters.joins += 1

    def leave(self, worker: str, now: float, reason: str = "", blame: bool = True) -> None:
        """A worker is gone. With `blame`, the slice it worked on may be the cause: not so if its whole node went."""
        if worker not in self.workers:
            return
        del now
        gone = self._remove(worker)
        self.counters.deaths += 1
        for place, ticket in enumerate(gone.queue):
            if job := self.jobs.get(ticket.job):
                if place == 0 and job.died(ticket, blame):
                    died = f"{job.deaths[ticket.start]} workers died on it, the last was {worker}: {reason}"
                    self.counters.quarantined += self._narrow(job, ticket, died)
                else:
                    self._again(job, ticket)

    def stall(self, worker: str, now: float, reason: str = "") -> None:
        """A worker lives and does nothing, as one that is stopped: what it has in hand is given to others too."""
        if worker in self.workers and self.workers[worker].queue and not self.workers[worker].late:
            self._give_to_others(worker, now, reason or "it does nothing")

    def began(self, number: int, now: float) -> None:
        """The worker that has this ticket is at its first candidate: what it loaded before does not count."""
        name = self.crew.holder.get(number)
        if name is not None and self.crew.front(name) == number:
            self.workers[name].loaded = True
            self.pace.begins(name, now)

    def answer(self, number: int, now: float, seconds: float, failed: Collection[int] = ()) -> np.ndarray:
        """An answer to ticket `number`, evaluated in `seconds`: the candidates for which it is the first one.

        Those in `failed` stay open: another worker is to try them.
        """
        self._free(number, now, seconds)
        ticket = self._tickets.get(number)
        if ticket is None:
            known = 0 < number <= self._numbers
            self.counters.late += known
            self.counters.foreign += not known
            return np.zeros(0, np.int64)
        job = self.jobs[ticket.job]
        first = job.answered(ticket, [i for i in failed if job.open[i]])
        self.tallies.get(ticket.worker, self.crew.lost).add(Tally(now, "", len(first), 1, seconds))
        self.counters.answers += len(first)
        self.counters.duplicates += not len(first)
        return first

    def refuse(self, number: int, now: float, avoid: str = "") -> None:
        """A slice came back unevaluated through no fault of its own; its worker lives, and `avoid` won't get it."""
        ticket = self._tickets.get(number)
        held = number in self.crew.holder
        self._free(number, now, None)
        if held:
            self.counters.refusals += 1
            if ticket is not None:
                self._again(self.jobs[ticket.job], ticket, avoid)

    def recompiling(self) -> None:
        """The workers get another objective: their first answers wait for compilation again."""
        self.pace.recompiling()

    # What to do ------------------------------------------------------------

    def assign(self, now: float) -> list[Ticket]:
        """The slices to send now, in this order."""
        tickets: list[Ticket] = []
        for number, job in self.jobs.items():
            job.trim()
            place = 0
            while place < len(job.pending):
                size = self.pace.size(job)
                ahead = job.waiting >= size * len(self.workers)
                # Two, while there is plenty, hide the way to the worker.
                worker = self.crew.least_busy(2 if ahead else 1, job.pending[place].avoid)
                if worker is not None:
                    tickets.append(self._ticket(number, worker, *job.cut(size, place), now))
                elif job.pending[place].avoid and len(self.workers) > 1:
                    place += 1  # its turn comes when another worker is free
                else:
                    break
        if self.policy.helps and not any(job.pending for job in self.jobs.values()):
            tickets += self._taken_over(now)
        return tickets

    def overdue(self, now: float) -> list[str]:
        """Give overdue slices to other workers too. The workers that took longer than the policy's timeout.

        These are to be killed, and have left already.
        """
        expired = []
        while (name := self.pace.next_due(now)) is not None:
            w = self.workers[name]
            if (limit := self.pace.limit(w)) is not None and now >= w.front_since + limit:
                expired.append(name)
                self._expire(name, now)
                continue
            if w.front_since + w.grace * self.pace.deadline(w) <= now:
                self._give_to_others(name, now, f"no answer for {now - w.front_since:.1f} s")
                w.grace *= 2
            self.pace.look_again(name)
        return expired

    def wake(self, now: float) -> float:
        """Seconds until something is to be done if nothing happens: infinite without work in hand."""
        times = [self.pace.first_due()]
        waits = any(job.pending for job in self.jobs.values())  # for another worker; nothing is taken over meanwhile
        times += [self.pace.look] if self.crew.idle and not waits and self.policy.helps else []
        return max(0.0, min(times, default=math.inf) - now) + TICK

    @property
    def all_late(self) -> bool:
        """Whether no worker is left that one would wait for, while there is something to do."""
        late = [w.late for w in self.workers.values()]
        return bool(late) and all(late) and any(job.left for job in self.jobs.values())

    def facts(self) -> dict[str, Any]:
        """The counters, as a row of metrics."""
        return dataclasses.asdict(self.counters)

    # ------------------------------------------------------------

    def _ticket(self, job: int, worker: str, start: int, stop: int, now: float) -> Ticket:
        self._numbers += 1
        ticket = self._tickets[self._numbers] = Ticket(self._numbers, job, worker, start, stop, now)
        self._in_hand(ticket, 1)
        if self.crew.give(ticket):
            self.pace.begins(worker, now)
        self.pace.look = min(self.pace.look, self.pace.patience_ends(ticket))
        return ticket

    def _in_hand(self, ticket: Ticket, more: int) -> None:
        """One worker more or less has these candidates in hand and is not late."""
        if job := self.jobs.get(ticket.job):
            job.hands[ticket.rows] += more

    def _free(self, number: int, now: float, seconds: float | None) -> None:
        """The worker that has the ticket in hand turns to its next one."""
        name = self.crew.holder.get(number)
        if name is None:
            return
        w = self.workers[name]
        ticket, at_it = self.crew.take(number)
        if not w.late:
            self._in_hand(ticket, -1)
        else:  # it works after all
            w.late, w.grace = False, w.grace if seconds is None else 1.0
            for other in w.queue:
                self._in_hand(other, 1)
            self.crew.sort(name)
        if seconds is not None:
            self.pace.took(w, ticket, seconds, now)
        if w.queue and at_it:
            self.pace.begins(name, now)

    def _remove(self, name: str) -> Worker:
        gone = self.crew.remove(name)
        for ticket in gone.queue if not gone.late else ():
            self._in_hand(ticket, -1)
        return gone

    def _again(self, job: Job, ticket: Ticket, avoid: str = "") -> None:
        self.counters.resubmissions += job.again(ticket, avoid)

    def _narrow(self, job: Job, ticket: Ticket, why: str) -> bool:
        alone = job.narrow(ticket, why)
        if not alone:
            self.counters.resubmissions += 2
        return alone

    def _give_to_others(self, name: str, now: float, reason: str) -> None:
        """What a worker has in hand goes to others too; it keeps working on it."""
        del now
        w = self.workers[name]
        self.counters.overdue += not w.late
        if not w.late:
            LOG.warning("worker %s: %s; what it has in hand is given to another worker too", name, reason)
            for ticket in w.queue:
                self._in_hand(ticket, -1)
            w.late = True
            self.crew.sort(name)
        for ticket in w.queue:
            if job := self.jobs.get(ticket.job):
                self._again(job, ticket, name)

    def _expire(self, name: str, now: float) -> None:
        """The candidate, or one of the slice, took longer than the timeout: its worker goes, and the slice is cut."""
        w = self._remove(name)
        text = f"more than the timeout of {self.policy.timeout:g} s a candidate, {now - w.front_since:.1f} s in all"
        LOG.warning("worker %s: %s", name, text)
        for place, ticket in enumerate(w.queue):
            if job := self.jobs.get(ticket.job):
                if place:
                    self._again(job, ticket)
                elif job.open[ticket.rows].any():
                    self.counters.timeouts += self._narrow(job, ticket, f"the last worker was {name}: {text}")

    def _taken_over(self, now: float) -> list[Ticket]:
        """Idle workers take over what others have had in hand for too long, the oldest first, and only once."""
        if not self.crew.idle or now < self.pace.look:
            return []
        tickets: list[Ticket] = []
        self.pace.look = math.inf
        for old in sorted((t for w in self.workers.values() for t in w.queue), key=lambda t: t.number):
            job = self.jobs.get(old.job)
            if job is None or not job.open[old.rows].any() or job.hands[old.rows].max() > 1:
                continue
            worker = self.crew.least_busy(1, old.worker)
            if worker is None or now < self.pace.patience_ends(old):
                self.pace.look = min(self.pace.look, self.pace.patience_ends(old))
                continue
            self.counters.shared += 1
            tickets.append(self._ticket(old.job, worker, old.start, old.stop, now))
        return tickets
