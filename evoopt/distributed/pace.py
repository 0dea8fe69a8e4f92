"""How long evaluations take, and when one that is under way is to be looked at."""

from __future__ import annotations

import collections
import heapq
import math
import statistics

from evoopt.distributed.crew import Crew, Worker
from evoopt.distributed.jobs import Job, Ticket
from evoopt.distributed.policy import Policy

LEAST_DEADLINE = 30.0  # seconds; below this a busy machine looks like a hung one
MULTIPLE_OF_EXPECTED = 10.0  # a slice that takes this many times what it should goes to another worker too
REMEMBERED = 63  # answers whose durations the median is taken over
ROUNDS = 6.0  # with at most so many rounds of calls in a generation, each worker gets its part in one slice


class Pace:
    """What was measured, and the deadlines that follow from it and the policy."""

    def __init__(self, policy: Policy, crew: Crew) -> None:
        self.policy, self.crew = policy, crew
        self.durations: collections.deque[float] = collections.deque(maxlen=REMEMBERED)  # seconds a candidate
        self.first: float | None = None  # the same of an answer that waited for compilation
        self.look = math.inf  # when the first straggler is one
        self.call_seconds = 0.0  # the driver's time for one call: workers wait for it in turn
        self._due: list[tuple[float, str, int]] = []  # heap of (deadline, worker, ticket), some out of date

    @property
    def rate(self) -> float | None:
        """Median seconds a candidate, None before the first answer."""
        return statistics.median(self.durations) if self.durations else self.first

    def took(self, w: Worker, ticket: Ticket, seconds: float, now: float) -> None:
        """A worker answered a slice."""
        each = seconds / len(ticket)
        if w.answered:
            self.durations.append(each)
            self.look = self.look if len(self.durations) > 1 else now
        else:  # it waited for compilation
            self.first = each
        w.answered += 1

    def recompiling(self) -> None:
        """Every worker's next answer waits for compilation."""
        self.durations.clear()
        self.first = None
        for w in self.crew.workers.values():
            w.answered = 0
            w.loaded = False
            w.grace = 1.0

    def size(self, job: Job) -> int:
        """Candidates in the next slice: whole micro-batches."""
        if self.policy.slice is not None:
            return self.policy.slice * job.batch
        workers = max(1, len(self.crew.workers))
        share = job.waiting / workers
        rate = self.rate
        if rate is None:
            size = share / 4  # nothing is known yet: small ones, to learn from
        else:
            # All workers are served in turn, so a slice takes at least as long as a round of calls. Where that leaves a
            # worker few slices, it gets its part of the job in one: the driver would be busy throughout otherwise.
            least = self.call_seconds * len(self.crew.workers) / max(rate, 1e-9)
            part = job.n / workers
            least = part if part <= ROUNDS * least else least
            wanted = max(self.policy.slice_seconds / max(rate, 1e-9), least)
            size = max(least, share if wanted >= share else min(wanted, share / 2))
        return max(1, math.ceil(size / job.batch)) * job.batch

    def begins(self, name: str, now: float) -> None:
        """A worker begins with the first ticket of its queue; from now on its deadline counts."""
        self.crew.workers[name].front_since = now
        self.look_again(name)

    def look_again(self, name: str) -> None:
        """Note when something is to be done about a worker that does not answer."""
        w = self.crew.workers[name]
        times = [w.grace * self.deadline(w)]
        times += [] if (limit := self.limit(w)) is None else [limit]
        heapq.heappush(self._due, (w.front_since + min(times), name, w.queue[0].number))

    def next_due(self, now: float) -> str | None:
        """A worker whose moment has come, if any; each moment is told once."""
        while self._due and self._due[0][0] <= now:
            _, name, number = heapq.heappop(self._due)
            if self.crew.front(name) == number:
                return name
        return None

    def first_due(self) -> float:
        """The moment of the next one."""
        while self._due and self.crew.front(self._due[0][1]) != self._due[0][2]:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else math.inf

    def deadline(self, w: Worker) -> float:
        """Seconds after which another worker gets what this one has begun, too."""
        if not w.answered:
            return max(self.policy.first_deadline, self.policy.deadline or 0.0)
        if self.policy.deadline is not None:
            return self.policy.deadline
        return max(LEAST_DEADLINE, MULTIPLE_OF_EXPECTED * (self.rate or 0.0) * len(w.queue[0]))

    def limit(self, w: Worker) -> float | None:
        """Seconds until the policy's timeout for what the worker has begun; compilation comes on top."""
        if self.policy.timeout is None:
            return None
        return self.policy.timeout * len(w.queue[0]) + (0.0 if w.answered or w.loaded else self.policy.first_deadline)

    def patience_ends(self, ticket: Ticket) -> float:
        """When an idle worker may take over a straggler's ticket."""
        if not self.durations:  # nobody knows yet how long one takes
            return math.inf
        expected = (self.rate or 0.0) * len(ticket)
        return ticket.sent + self.policy.patience * max(expected, self.policy.slice_seconds)
