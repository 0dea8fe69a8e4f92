"""Which worker evaluates which candidates, and what becomes of an answer: decisions only, no processes and no clock.

The scheduler is told what happened and when (`join`, `leave`, `answer`, `refuse`), and says what to do (`assign`,
`overdue`). The same events at the same times give the same decisions, so every fault can be played to it by a test.

A job is one generation of n candidates. It is cut into slices of whole micro-batches, because a micro-batch of one
fixed shape is what has the same bits everywhere (DESIGN, rule 7). The first answer to a candidate counts; answers that
come twice, late or from nowhere are counted and dropped.

Time is not death. A slice that is overdue is given to another worker too, and whoever answers first is heard: the bits
are the same. Only a worker that dies puts its slice under suspicion. A slice that killed its workers is cut finer, down
to the one candidate that does it: its row is then quarantined, that is, left without an answer.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import logging
import math
import statistics
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from evoopt.types import error

LOG = logging.getLogger("evoopt.distributed")
STRAGGLERS = ("wait", "resubmit", "drop")
LEAST_DEADLINE = 30.0  # seconds; below this a busy machine looks like a hung one
MULTIPLE_OF_EXPECTED = 10.0  # a slice that takes so many times what it should is given to another worker too
TICK = 1e-6  # seconds past a moment, so that rounding can't make it seem still to come
REMEMBERED = 63  # answers whose durations the median is taken over
ROUNDS = 6.0  # rounds of calls in a generation, up to which each worker gets its part in one slice
UNBLAMED = 64  # times that a slice may be lost with whole nodes, after which it is blamed all the same
KEPT = 32  # lost workers whose shares are kept one by one


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a generation is cut, and when another worker is asked too. No number here loses an evaluation but `timeout`.

    Attributes:
        slice: micro-batches a slice. None: as many as take `slice_seconds`, fewer towards a generation's end, and never
            so few that workers wait for the driver.
        slice_seconds: the time that a slice aims at. A call costs about a millisecond, so well above that.
        stragglers: `wait` for them; `resubmit` their candidates to idle workers, the first answer counts (the bits stay
            the same, because an evaluation is a function); `drop` the slowest, whose values are then NaN.
        patience: multiple of the median time after which an idle worker takes over a straggler's candidates.
        drop: the fraction of a generation that `drop` does not wait for. It depends on timing, so the run does too.
        deadline: seconds after which a slice is given to another worker too, idle or not; the first one goes on. It
            doubles each time. None: ten times what the slice should take, at least 30.
        first_deadline: the same for a worker's first slice, which waits for compilation.
        timeout: seconds that one candidate may take, besides compilation; then its worker is replaced, its value is
            NaN, and the log names it. None, the default: any time.
        deaths: workers that may die on a slice before it is suspected and cut in halves, down to one candidate.
    """

    slice: int | None = None
    slice_seconds: float = 0.1
    stragglers: str = "resubmit"
    patience: float = 3.0
    drop: float = 0.0
    deadline: float | None = None
    first_deadline: float = 600.0
    deaths: int = 2
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.stragglers not in STRAGGLERS:
            raise error(f"stragglers as one of {', '.join(STRAGGLERS)}", repr(self.stragglers), "a misspelt policy")
        if (self.drop > 0) != (self.stragglers == "drop") or not 0 <= self.drop < 1:
            got = f"stragglers={self.stragglers!r} with drop={self.drop}"
            raise error(
                "a fraction drop in (0, 1) with stragglers='drop', none otherwise", got, "one without the other"
            )
        numbers = {
            k: getattr(self, k) for k in ("slice", "slice_seconds", "patience", "deadline", "first_deadline", "timeout")
        }
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


@dataclasses.dataclass
class Tally:
    """One worker's share."""

    joined: float
    node: str = ""
    answers: int = 0  # candidates
    slices: int = 0
    seconds: float = 0.0  # that it spent evaluating, by its own clock
    lost: int = 0  # slices it never answered


class _Worker:
    def __init__(self, now: float) -> None:
        self.queue: collections.deque[Ticket] = collections.deque()  # in the order in which it works on them
        self.front_since = now  # when it began with the first of them
        self.answered = 0
        self.late = False  # whether what it has in hand was given to others too
        self.grace = 1.0  # multiple of the deadline, doubled each time it is missed


class _Range(NamedTuple):
    """Candidates to hand out."""

    start: int
    stop: int
    again: bool = False  # handed out before: some may be answered by now, some under suspicion
    avoid: str = ""  # a worker that is not to get them


class _Job:
    def __init__(self, n: int, batch: int) -> None:
        self.n, self.batch = n, batch
        self.open = np.ones(n, bool)  # candidates without an answer
        self.left = n
        self.hands = np.zeros(n, np.int16)  # workers that have each candidate in hand, and are not late
        self.deaths = np.zeros(n, np.int32)  # workers that died on each candidate's slice
        self.losses = np.zeros(n, np.int32)  # the same where the whole node went
        self.pending: list[_Range] = [_Range(0, n)]
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
        self.call_seconds = 0.0  # the driver's time for one call: workers wait for it in turn
        self.lost = Tally(0.0)  # the shares of lost workers together
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

    def join(self, worker: str, now: float, node: str = "") -> None:
        """A worker is ready, on this node. Joining twice is joining once."""
        if worker not in self.workers:
            self.workers[worker] = _Worker(now)
            self._idle[worker] = None
            self.tallies.setdefault(worker, Tally(now, node))
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
                rows = slice(ticket.start, ticket.stop)
                job.losses[rows] += place == 0
                if place == 0 and (blame or job.losses[rows].max() > UNBLAMED):
                    self._blame(job, ticket, worker, reason)
                else:
                    self._again(job, ticket)

    def _remove(self, worker: str) -> _Worker:
        gone = self.workers.pop(worker)
        self._idle.pop(worker, None)
        self._single.pop(worker, None)
        self.tallies[worker].lost += len(gone.queue)
        for ticket in gone.queue:
            self._out_of_hand(ticket, gone)
        lost = [name for name in self.tallies if name not in self.workers]
        for name in lost[:-KEPT]:  # rows do not grow with the workers that were lost
            old = self.tallies.pop(name)
            self.lost.answers += old.answers
            self.lost.slices += old.slices
            self.lost.seconds += old.seconds
            self.lost.lost += old.lost
        return gone

    def stall(self, worker: str, now: float, reason: str = "") -> None:
        """A worker lives and does nothing, as one that is stopped: what it has in hand is given to others too."""
        if worker in self.workers and self.workers[worker].queue and not self.workers[worker].late:
            self._give_to_others(worker, now, reason or "it does nothing")

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
        first = ticket.start + np.flatnonzero(job.open[ticket.start : ticket.stop])
        if len(failed):
            tried = [i for i in failed if job.open[i]]
            first = first[~np.isin(first, tried)]
            job.pending[:0] = [_Range(i, i + 1, True, ticket.worker) for i in tried]
        job.open[first] = False
        job.left -= len(first)
        tally = self.tallies.get(ticket.worker, self.lost)
        tally.seconds += seconds
        tally.slices += 1
        tally.answers += len(first)
        self.counters.answers += len(first)
        self.counters.duplicates += not len(first)
        return first

    def refuse(self, number: int, now: float, avoid: str = "") -> None:
        """A slice came back unevaluated through no fault of its own; its worker lives, and `avoid` won't get it."""
        ticket = self._tickets.get(number)
        held = number in self._live
        self._free(number, now, None)
        if held:
            self.counters.refusals += 1
            if ticket is not None:
                self._again(self.jobs[ticket.job], ticket, avoid)

    # What to do ------------------------------------------------------------

    def assign(self, now: float) -> list[Ticket]:
        """The slices to send now, in this order."""
        tickets: list[Ticket] = []
        for number, job in self.jobs.items():
            self._trim(job)
            place = 0
            while place < len(job.pending):
                size = self._size(job)
                ahead = sum(r.stop - r.start for r in job.pending) >= size * len(self.workers)
                # Two, while there is plenty, hide the way to the worker.
                worker = self._least_busy(2 if ahead else 1, job.pending[place].avoid)
                if worker is not None:
                    tickets.append(self._ticket(number, worker, *self._cut(job, size, place), now))
                elif job.pending[place].avoid and len(self.workers) > 1:
                    place += 1  # its turn comes when another worker is free
                else:
                    break
        if self.policy.stragglers == "resubmit" and not any(job.pending for job in self.jobs.values()):
            tickets += self._taken_over(now)
        return tickets

    def overdue(self, now: float) -> list[str]:
        """Give overdue slices to other workers too. The workers that took longer than the policy's timeout.

        These are to be killed, and have left already.
        """
        expired = []
        while self._due and self._due[0][0] <= now:
            _, name, number = heapq.heappop(self._due)
            if self._front(name) != number:
                continue
            w = self.workers[name]
            if (limit := self._limit(w)) is not None and w.front_since + limit <= now:
                expired.append(name)
                self._expire(name, now)
                continue
            if w.front_since + w.grace * self._deadline(w) <= now:
                self._give_to_others(name, now, f"no answer for {now - w.front_since:.1f} s")
                w.grace *= 2
            self._look_again(name, w)
        return expired

    def _give_to_others(self, name: str, now: float, reason: str) -> None:
        """What a worker has in hand goes to others too; it keeps working on it."""
        del now
        w = self.workers[name]
        self.counters.overdue += not w.late
        if not w.late:
            LOG.warning("worker %s: %s; what it has in hand is given to another worker too", name, reason)
            for ticket in w.queue:
                if job := self.jobs.get(ticket.job):
                    job.hands[ticket.start : ticket.stop] -= 1
            w.late = True
            self._sort(name, w)
        for ticket in w.queue:
            if job := self.jobs.get(ticket.job):
                self._again(job, ticket, name)

    def _expire(self, name: str, now: float) -> None:
        """The candidate, or one of the slice, took longer than the timeout: its worker goes, and the slice is cut."""
        w = self.workers[name]
        text = f"more than the timeout of {self.policy.timeout:g} s a candidate, {now - w.front_since:.1f} s in all"
        LOG.warning("worker %s: %s", name, text)
        self._remove(name)
        for place, ticket in enumerate(w.queue):
            if job := self.jobs.get(ticket.job):
                if place:
                    self._again(job, ticket)
                elif job.open[ticket.start : ticket.stop].any():
                    self.counters.timeouts += self._narrow(job, ticket, f"the last worker was {name}: {text}")

    def wake(self, now: float) -> float:
        """Seconds until something is to be done if nothing happens: infinite without work in hand."""
        while self._due and self._front(self._due[0][1]) != self._due[0][2]:
            heapq.heappop(self._due)
        times = [self._due[0][0]] if self._due else []
        waits = any(job.pending for job in self.jobs.values())  # for another worker; nothing is taken over meanwhile
        times += [self._look] if self._idle and not waits and self.policy.stragglers == "resubmit" else []
        return max(0.0, min(times, default=math.inf) - now) + TICK

    def recompiling(self) -> None:
        """The workers get another objective: their first answers wait for compilation again."""
        self._durations.clear()
        self._first = None
        for w in self.workers.values():
            w.answered = 0
            w.grace = 1.0

    @property
    def all_late(self) -> bool:
        """Whether no worker is left that one would wait for, while there is something to do."""
        late = [w.late for w in self.workers.values()]
        return bool(late) and all(late) and any(job.left for job in self.jobs.values())

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
        self._out_of_hand(ticket, w)
        if w.late:  # it works after all
            w.late, w.grace = False, w.grace if seconds is None else 1.0
            for other in w.queue:
                if job := self.jobs.get(other.job):
                    job.hands[other.start : other.stop] += 1
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
        self._look_again(name, w)

    def _look_again(self, name: str, w: _Worker) -> None:
        """When something is to be done about the worker if it does not answer."""
        times = [w.grace * self._deadline(w)]
        times += [] if (limit := self._limit(w)) is None else [limit]
        heapq.heappush(self._due, (w.front_since + min(times), name, w.queue[0].number))

    def _limit(self, w: _Worker) -> float | None:
        """Seconds until the policy's timeout for what the worker has begun; compilation comes on top."""
        if self.policy.timeout is None:
            return None
        ticket = w.queue[0]
        return self.policy.timeout * (ticket.stop - ticket.start) + (0.0 if w.answered else self.policy.first_deadline)

    def _front(self, name: str) -> int | None:
        w = self.workers.get(name)
        return w.queue[0].number if w is not None and w.queue else None

    def _out_of_hand(self, ticket: Ticket, w: _Worker) -> None:
        del self._live[ticket.number]
        if not w.late and (job := self.jobs.get(ticket.job)):
            job.hands[ticket.start : ticket.stop] -= 1

    def _sort(self, name: str, w: _Worker) -> None:
        self._idle.pop(name, None)
        self._single.pop(name, None)
        if len(w.queue) < 2 and not w.late:
            (self._single if w.queue else self._idle)[name] = None

    def _least_busy(self, depth: int, avoid: str = "") -> str | None:
        """The worker to get the next slice; any one, where `avoid` is all there is."""
        if self._idle:
            other = next((name for name in self._idle if not self._avoided(name, avoid)), None)
            return other if other is not None or len(self.workers) > 1 else avoid
        return next((name for name in self._single if not self._avoided(name, avoid)), None) if depth > 1 else None

    def _avoided(self, name: str, avoid: str) -> bool:
        """Whether `name` is the worker to avoid, or shares its node while there are other nodes."""
        if not avoid or name == avoid:
            return bool(avoid)
        away = self.tallies.get(avoid, self.lost).node  # it may be gone already
        there = lambda worker: self.tallies[worker].node
        return there(name) == away and any(there(other) != away for other in self.workers)

    def _trim(self, job: _Job) -> None:
        """Take out of the pending ranges what was answered meanwhile."""
        if not any(r.again for r in job.pending):
            return
        trimmed = []
        for r in job.pending:
            if not r.again:
                trimmed.append(r)
                continue
            rows = np.flatnonzero(job.open[r.start : r.stop])
            if len(rows):  # from the first to the last open one, at whole micro-batches unless it is under suspicion
                first, last = r.start + int(rows[0]), r.start + int(rows[-1]) + 1
                if not self._suspected(job, first, last) and not r.avoid:
                    first, last = first - first % job.batch, min(job.n, last + -last % job.batch)
                trimmed.append(r._replace(start=max(first, r.start), stop=min(last, r.stop)))
        job.pending = trimmed

    def _suspected(self, job: _Job, start: int, stop: int) -> bool:
        return bool((job.deaths[start:stop] >= self.policy.deaths).any())

    def _size(self, job: _Job) -> int:
        """Candidates in the next slice: whole micro-batches."""
        if self.policy.slice is not None:
            return self.policy.slice * job.batch
        remaining = sum(r.stop - r.start for r in job.pending)
        share = remaining / max(1, len(self.workers))
        rate = self.rate
        if rate is None:
            size = share / 4  # nothing is known yet: small ones, to learn from
        else:
            # All workers are served in turn, so a slice takes at least as long as a round of calls. Where that leaves a
            # worker few slices, it gets its part of the job in one: the driver would be busy throughout otherwise.
            least = self.call_seconds * len(self.workers) / max(rate, 1e-9)
            part = job.n / max(1, len(self.workers))
            least = part if part <= ROUNDS * least else least
            wanted = max(self.policy.slice_seconds / max(rate, 1e-9), least)
            size = max(least, share if wanted >= share else min(wanted, share / 2))
        return max(1, math.ceil(size / job.batch)) * job.batch

    def _cut(self, job: _Job, size: int, place: int = 0) -> tuple[int, int]:
        r = job.pending[place]
        if r.stop - r.start <= size or (r.again and self._suspected(job, r.start, r.stop)):
            job.pending.pop(place)
            return r.start, r.stop
        middle = r.start + size - (r.start + size) % job.batch
        middle = middle if middle > r.start else min(r.stop, r.start + size)
        job.pending[place] = r._replace(start=middle)
        if middle >= r.stop:
            job.pending.pop(place)
        return r.start, middle

    def _again(self, job: _Job, ticket: Ticket, avoid: str = "") -> None:
        """Put what is open of a lost ticket back, unless another worker has it in hand."""
        rows = slice(ticket.start, ticket.stop)
        if not (job.open[rows] & (job.hands[rows] == 0)).any():
            return
        if any(r.again and r.start <= ticket.start and ticket.stop <= r.stop for r in job.pending):
            return  # it waits already
        job.pending.insert(0, _Range(ticket.start, ticket.stop, True, avoid))
        self.counters.resubmissions += 1

    def _blame(self, job: _Job, ticket: Ticket, worker: str, reason: str) -> None:
        rows = slice(ticket.start, ticket.stop)
        job.deaths[rows] += job.open[rows]
        if not job.open[rows].any():
            return
        if not self._suspected(job, ticket.start, ticket.stop):
            return self._again(job, ticket)
        deaths = f"{job.deaths[ticket.start]} workers died on it, the last was {worker}: {reason}"
        self.counters.quarantined += self._narrow(job, ticket, deaths)

    def _narrow(self, job: _Job, ticket: Ticket, why: str) -> bool:
        """Cut a slice in halves; whether it was one candidate, which has no value then."""
        if ticket.stop - ticket.start == 1:
            job.open[ticket.start] = False
            job.left -= 1
            job.quarantined.append(ticket.start)
            LOG.warning("candidate %d has no value (NaN): %s", ticket.start, why)
            return True
        middle = (ticket.start + ticket.stop) // 2
        if ticket.stop - ticket.start > job.batch:  # at a micro-batch while there are several
            middle = ticket.start + max(1, (middle - ticket.start) // job.batch) * job.batch
        job.pending[:0] = [_Range(ticket.start, middle, True), _Range(middle, ticket.stop, True)]
        self.counters.resubmissions += 2
        return False

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
            worker = self._least_busy(1, old.worker)
            if worker is None or now < self._patience_ends(old):
                self._look = min(self._look, self._patience_ends(old))
                continue
            self.counters.shared += 1
            tickets.append(self._ticket(old.job, worker, old.start, old.stop, now))
        return tickets

    def facts(self) -> dict[str, Any]:
        """The counters, as a row of metrics."""
        return dataclasses.asdict(self.counters)
