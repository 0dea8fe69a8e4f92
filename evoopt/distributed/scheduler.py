"""Which worker evaluates which candidates, and what becomes of an answer: decisions only, no processes and no clock.

The scheduler is told what happened and when (`join`, `leave`, `answer`, `refuse`), and says what to do (`assign`,
`overdue`). The same events at the same times give the same decisions, so every fault can be played to it by a test.

A job is one generation of n candidates. It is cut into slices of whole micro-batches, because a micro-batch of one
fixed shape is what has the same bits everywhere (DESIGN, rule 7). The first answer to a candidate counts; answers that
come twice, late or from nowhere are counted and dropped. Only a slice that killed its workers is cut finer, down to the
one candidate that does it: its row is then quarantined, that is, left without an answer.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import logging
import math
import statistics
from typing import Any

import numpy as np

from evoopt.types import error

LOG = logging.getLogger("evoopt.distributed")
STRAGGLERS = ("wait", "resubmit", "drop")
LEAST_DEADLINE = 30.0  # seconds; below this a busy machine looks like a hung one
MULTIPLE_OF_EXPECTED = 10.0  # a slice that takes so many times what it should is lost
TICK = 1e-6  # seconds past a moment, so that rounding can't make it seem still to come
REMEMBERED = 63  # answers whose durations the median is taken over


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a generation is cut, and when patience ends.

    Attributes:
        slice: micro-batches a slice. None: as many as take `slice_seconds`, fewer towards a generation's end.
        slice_seconds: what a slice aims at. A call costs about a millisecond, so well above that.
        stragglers: `wait` for them; `resubmit` their candidates to idle workers, the first answer counts (the bits stay
            the same, because an evaluation is a function); `drop` the slowest, whose values are then NaN.
        patience: multiple of the median time after which an idle worker takes over a straggler's candidates.
        drop: the fraction of a generation that `drop` does not wait for. It depends on timing, so the run does too.
        deadline: seconds after which a worker that does not answer is given up and replaced. None: ten times what the
            slice should take, at least 30.
        first_deadline: the same for a worker's first answer, which waits for compilation.
        deaths: workers a slice may kill before it is suspected and cut in halves, down to one candidate.
    """

    slice: int | None = None
    slice_seconds: float = 0.1
    stragglers: str = "resubmit"
    patience: float = 3.0
    drop: float = 0.0
    deadline: float | None = None
    first_deadline: float = 600.0
    deaths: int = 2

    def __post_init__(self) -> None:
        if self.stragglers not in STRAGGLERS:
            raise error(f"stragglers as one of {', '.join(STRAGGLERS)}", repr(self.stragglers), "a misspelt policy")
        if (self.drop > 0) != (self.stragglers == "drop") or not 0 <= self.drop < 1:
            got = f"stragglers={self.stragglers!r} with drop={self.drop}"
            raise error(
                "a fraction drop in (0, 1) with stragglers='drop', none otherwise", got, "one without the other"
            )
        numbers = {k: getattr(self, k) for k in ("slice", "slice_seconds", "patience", "deadline", "first_deadline")}
        for name, number in {**numbers, "deaths": self.deaths}.items():
            if number is not None and not number > 0:
                raise error(f"{name} > 0", str(number), "a sign slipped, or None was meant")


@dataclasses.dataclass(frozen=True)
class Ticket:
    """One slice on one worker: candidates `start` up to `stop` of a job."""

    number: int
    job: int
    worker: str
    start: int
    stop: int
    sent: float


@dataclasses.dataclass
class Counters:
    """What happened since the start; all but `answers` is zero on a quiet day."""

    answers: int = 0  # candidates whose answer counted
    resubmissions: int = 0  # slices sent again: lost, overdue, or taken over from a straggler
    duplicates: int = 0  # answers whose candidates had all been answered
    late: int = 0  # answers to a job that is over
    foreign: int = 0  # answers to a ticket that was never given out
    deaths: int = 0  # workers lost while the run was on
    overdue: int = 0  # of them, those that missed a deadline
    joins: int = 0
    refusals: int = 0  # slices that came back unevaluated
    quarantined: int = 0  # candidates that kill their workers
    dropped: int = 0  # candidates that were too slow
    failed: int = 0  # candidates whose evaluation raised


@dataclasses.dataclass
class Tally:
    """One worker's share."""

    joined: float
    answers: int = 0  # candidates
    slices: int = 0
    seconds: float = 0.0  # that it spent evaluating, by its own clock
    lost: int = 0  # slices it never answered


class _Worker:
    def __init__(self, now: float) -> None:
        self.queue: collections.deque[Ticket] = collections.deque()  # in the order in which it works on them
        self.front_since = now  # when it began with the first of them
        self.answered = 0


class _Job:
    def __init__(self, n: int, batch: int) -> None:
        self.n, self.batch = n, batch
        self.open = np.ones(n, bool)  # candidates without an answer
        self.left = n
        self.hands = np.zeros(n, np.int16)  # workers that have each candidate in hand
        self.deaths = np.zeros(n, np.int32)  # workers that died on each candidate's slice
        self.pending: list[tuple[int, int]] = [(0, n)]
        self.quarantined: list[int] = []


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
        self.workers: dict[str, _Worker] = {}
        self.tallies: dict[str, Tally] = {}
        self.jobs: dict[int, _Job] = {}
        self._tickets: dict[int, Ticket] = {}  # of open jobs, those of lost workers too
        self._live: dict[int, str] = {}  # ticket in hand -> its worker
        self._idle: dict[str, None] = {}  # workers with empty hands, in the order in which they became so
        self._single: dict[str, None] = {}  # workers with one ticket
        self._numbers = self._job_numbers = 0
        self._durations: collections.deque[float] = collections.deque(maxlen=REMEMBERED)  # seconds a candidate
        self._first: float | None = None  # the same of an answer that waited for compilation
        self._look = math.inf  # when the first straggler is one
        self._due: list[tuple[float, str, int]] = []  # heap of (deadline, worker, ticket), some out of date

    # What happened ------------------------------------------------------------

    def begin(self, n: int, batch: int, now: float, skip: np.ndarray | None = None) -> int:
        """A new job of n candidates in micro-batches of `batch`; those in `skip` (n,) bool need no answer."""
        del now
        self._job_numbers += 1
        job = self.jobs[self._job_numbers] = _Job(n, batch)
        if skip is not None:
            job.open &= ~skip
            job.left = int(job.open.sum())
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

    def join(self, worker: str, now: float) -> None:
        """A worker is ready. Joining twice is joining once."""
        if worker not in self.workers:
            self.workers[worker] = _Worker(now)
            self._idle[worker] = None
            self.tallies.setdefault(worker, Tally(now))
            self.counters.joins += 1

    def leave(self, worker: str, now: float, reason: str = "", blame: bool = True) -> None:
        """A worker is gone. With `blame`, the slice it worked on may be the cause: not so if its whole node went."""
        if worker not in self.workers:
            return
        del now
        gone = self.workers.pop(worker)
        self._idle.pop(worker, None)
        self._single.pop(worker, None)
        self.counters.deaths += 1
        self.tallies[worker].lost += len(gone.queue)
        for ticket in gone.queue:
            self._out_of_hand(ticket)
        for place, ticket in enumerate(gone.queue):
            if job := self.jobs.get(ticket.job):
                if blame and place == 0:
                    self._blame(job, ticket, worker, reason)
                else:
                    self._again(job, ticket)

    def answer(self, number: int, now: float, seconds: float) -> np.ndarray:
        """An answer to ticket `number`, evaluated in `seconds`: the candidates for which it is the first one."""
        self._free(number, now, seconds)
        ticket = self._tickets.get(number)
        if ticket is None:
            known = 0 < number <= self._numbers
            self.counters.late += known
            self.counters.foreign += not known
            return np.zeros(0, np.int64)
        job = self.jobs[ticket.job]
        first = ticket.start + np.flatnonzero(job.open[ticket.start : ticket.stop])
        job.open[first] = False
        job.left -= len(first)
        tally = self.tallies[ticket.worker]
        tally.seconds += seconds
        tally.slices += 1
        tally.answers += len(first)
        self.counters.answers += len(first)
        self.counters.duplicates += not len(first)
        return first

    def refuse(self, number: int, now: float) -> None:
        """A slice came back unevaluated through no fault of its own; its worker lives."""
        ticket = self._tickets.get(number)
        held = number in self._live
        self._free(number, now, None)
        if held:
            self.counters.refusals += 1
            if ticket is not None:
                self._again(self.jobs[ticket.job], ticket)

    # What to do ------------------------------------------------------------

    def assign(self, now: float) -> list[Ticket]:
        """The slices to send now, in this order."""
        tickets: list[Ticket] = []
        for number, job in self.jobs.items():
            self._trim(job)
            while job.pending:
                size = self._size(job)
                ahead = sum(stop - start for start, stop in job.pending) >= size * len(self.workers)
                worker = self._least_busy(2 if ahead else 1)  # two, while there is plenty, hides the way to the worker
                if worker is None:
                    break
                tickets.append(self._ticket(number, worker, *self._cut(job, size), now))
        if self.policy.stragglers == "resubmit" and not any(job.pending for job in self.jobs.values()):
            tickets += self._taken_over(now)
        return tickets

    def overdue(self, now: float) -> list[str]:
        """The workers that missed their deadline; each is to be killed and has left already."""
        late = []
        while self._due and self._due[0][0] <= now:
            _, name, number = heapq.heappop(self._due)
            if self._front(name) == number:
                due = self.workers[name].front_since + self._deadline(self.workers[name])
                if due <= now:
                    late.append(name)
                else:
                    heapq.heappush(self._due, (due, name, number))
        for name in late:
            w = self.workers[name]
            self.counters.overdue += 1
            text = f"no answer for {now - w.front_since:.1f} s, the deadline was {self._deadline(w):.1f} s"
            LOG.warning("worker %s: %s", name, text)
            self.leave(name, now, text)
        return late

    def wake(self, now: float) -> float:
        """Seconds until something is to be done if nothing happens: infinite without work in hand."""
        while self._due and self._front(self._due[0][1]) != self._due[0][2]:
            heapq.heappop(self._due)
        times = [self._due[0][0]] if self._due else []
        times += [self._look] if self._idle and self.policy.stragglers == "resubmit" else []
        return max(0.0, min(times, default=math.inf) - now) + TICK

    def recompiling(self) -> None:
        """The workers get another objective: their first answers wait for compilation again."""
        self._durations.clear()
        self._first = None
        for w in self.workers.values():
            w.answered = 0

    @property
    def rate(self) -> float | None:
        """Median seconds a candidate, None before the first answer."""
        return statistics.median(self._durations) if self._durations else self._first

    # ------------------------------------------------------------

    def _ticket(self, job: int, worker: str, start: int, stop: int, now: float) -> Ticket:
        self._numbers += 1
        ticket = self._tickets[self._numbers] = Ticket(self._numbers, job, worker, start, stop, now)
        self._live[ticket.number] = worker
        self.jobs[job].hands[start:stop] += 1
        w = self.workers[worker]
        w.queue.append(ticket)
        if len(w.queue) == 1:
            self._turn_to(worker, w, now)
        self._sort(worker, w)
        self._look = min(self._look, self._patience_ends(ticket))
        return ticket

    def _free(self, number: int, now: float, seconds: float | None) -> None:
        """The worker that has the ticket in hand turns to its next one."""
        name = self._live.get(number)
        if name is None:
            return
        w = self.workers[name]
        ticket = next(t for t in w.queue if t.number == number)
        in_turn = ticket is w.queue[0]
        w.queue.remove(ticket)
        self._out_of_hand(ticket)
        self._sort(name, w)
        if seconds is not None:
            each = seconds / (ticket.stop - ticket.start)
            if w.answered:
                self._durations.append(each)
                self._look = self._look if len(self._durations) > 1 else now
            else:  # it waited for compilation
                self._first = each
            w.answered += 1
        if w.queue and in_turn:
            self._turn_to(name, w, now)

    def _turn_to(self, name: str, w: _Worker, now: float) -> None:
        """The worker begins with the first ticket of its queue; from now on its deadline counts."""
        w.front_since = now
        heapq.heappush(self._due, (now + self._deadline(w), name, w.queue[0].number))

    def _front(self, name: str) -> int | None:
        w = self.workers.get(name)
        return w.queue[0].number if w is not None and w.queue else None

    def _out_of_hand(self, ticket: Ticket) -> None:
        del self._live[ticket.number]
        if job := self.jobs.get(ticket.job):
            job.hands[ticket.start : ticket.stop] -= 1

    def _sort(self, name: str, w: _Worker) -> None:
        self._idle.pop(name, None)
        self._single.pop(name, None)
        if len(w.queue) < 2:
            (self._single if w.queue else self._idle)[name] = None

    def _least_busy(self, depth: int) -> str | None:
        if self._idle:
            return next(iter(self._idle))
        return next(iter(self._single)) if self._single and depth > 1 else None

    def _trim(self, job: _Job) -> None:
        """Take out of the pending ranges what was answered meanwhile."""
        if job.left == job.n and not job.deaths.any():
            return
        trimmed = []
        for start, stop in job.pending:
            rows = np.flatnonzero(job.open[start:stop])
            if len(rows):  # from the first to the last open one, at whole micro-batches unless it is under suspicion
                first, last = start + int(rows[0]), start + int(rows[-1]) + 1
                if not self._suspected(job, first, last):
                    first, last = first - first % job.batch, min(job.n, last + -last % job.batch)
                trimmed.append((max(first, start), min(last, stop)))
        job.pending = trimmed

    def _suspected(self, job: _Job, start: int, stop: int) -> bool:
        return bool((job.deaths[start:stop] >= self.policy.deaths).any())

    def _size(self, job: _Job) -> int:
        """Candidates in the next slice: whole micro-batches."""
        if self.policy.slice is not None:
            return self.policy.slice * job.batch
        remaining = sum(stop - start for start, stop in job.pending)
        share = remaining / max(1, len(self.workers))
        rate = self.rate
        if rate is None:
            size = share / 4  # nothing is known yet: small ones, to learn from
        else:
            wanted = self.policy.slice_seconds / max(rate, 1e-9)
            size = share if wanted >= share else min(wanted, share / 2)
        return max(1, math.ceil(size / job.batch)) * job.batch

    def _cut(self, job: _Job, size: int) -> tuple[int, int]:
        start, stop = job.pending[0]
        if stop - start <= size or self._suspected(job, start, stop):
            job.pending.pop(0)
            return start, stop
        middle = start + size - (start + size) % job.batch
        middle = middle if middle > start else min(stop, start + size)
        job.pending[0] = (middle, stop)
        if middle >= stop:
            job.pending.pop(0)
        return start, middle

    def _again(self, job: _Job, ticket: Ticket) -> None:
        """Put what is open of a lost ticket back, unless another worker has it in hand."""
        rows = slice(ticket.start, ticket.stop)
        if not (job.open[rows] & (job.hands[rows] == 0)).any():
            return
        job.pending.insert(0, (ticket.start, ticket.stop))
        self.counters.resubmissions += 1

    def _blame(self, job: _Job, ticket: Ticket, worker: str, reason: str) -> None:
        rows = slice(ticket.start, ticket.stop)
        job.deaths[rows] += job.open[rows]
        if not job.open[rows].any():
            return
        if not self._suspected(job, ticket.start, ticket.stop):
            return self._again(job, ticket)
        if ticket.stop - ticket.start == 1:
            job.open[ticket.start] = False
            job.left -= 1
            job.quarantined.append(ticket.start)
            self.counters.quarantined += 1
            LOG.warning(
                "candidate %d is quarantined (its value is NaN): %d workers died on it, the last was %s: %s",
                ticket.start, job.deaths[ticket.start], worker, reason,
            )  # fmt: skip
            return
        middle = (ticket.start + ticket.stop) // 2
        if ticket.stop - ticket.start > job.batch:  # at a micro-batch while there are several
            middle = ticket.start + max(1, (middle - ticket.start) // job.batch) * job.batch
        job.pending[:0] = [(ticket.start, middle), (middle, ticket.stop)]
        self.counters.resubmissions += 2
        return

    def _deadline(self, w: _Worker) -> float:
        policy, ticket = self.policy, w.queue[0]
        if not w.answered:
            return max(policy.first_deadline, policy.deadline or 0.0)
        if policy.deadline is not None:
            return policy.deadline
        return max(LEAST_DEADLINE, MULTIPLE_OF_EXPECTED * (self.rate or 0.0) * (ticket.stop - ticket.start))

    def _patience_ends(self, ticket: Ticket) -> float:
        if not self._durations:  # nobody knows yet how long one takes
            return math.inf
        expected = (self.rate or 0.0) * (ticket.stop - ticket.start)
        return ticket.sent + self.policy.patience * max(expected, self.policy.slice_seconds)

    def _taken_over(self, now: float) -> list[Ticket]:
        """Idle workers take over what others have had in hand for too long, the oldest first, and only once."""
        if not self._idle or now < self._look:
            return []
        tickets: list[Ticket] = []
        self._look = math.inf
        for old in sorted((t for w in self.workers.values() for t in w.queue), key=lambda t: t.number):
            job, rows = self.jobs.get(old.job), slice(old.start, old.stop)
            if job is None or not job.open[rows].any() or job.hands[rows].max() > 1:
                continue
            worker = self._least_busy(1)
            if worker is None or now < self._patience_ends(old):
                self._look = min(self._look, self._patience_ends(old))
                continue
            self.counters.resubmissions += 1
            tickets.append(self._ticket(old.job, worker, old.start, old.stop, now))
        return tickets

    def facts(self) -> dict[str, Any]:
        """The counters, as a row of metrics."""
        return dataclasses.asdict(self.counters)
