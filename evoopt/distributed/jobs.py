"""One generation as the scheduler sees it: which candidates are open, in hand, suspected, and still to hand out."""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

import numpy as np

LOG = logging.getLogger("evoopt.distributed")
UNBLAMED = 64  # times that a slice may be lost with whole nodes; after that it is blamed all the same


@dataclasses.dataclass(frozen=True)
class Ticket:
    """One slice on one worker: candidates `start` up to `stop` of a job."""

    number: int
    job: int
    worker: str
    start: int
    stop: int
    sent: float

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """The rows of its candidates."""
        return slice(self.start, self.stop)


class Range(NamedTuple):
    """Candidates to hand out."""

    start: int
    stop: int
    again: bool = False  # handed out before: some may be answered by now, some under suspicion
    avoid: str = ""  # a worker that is not to get them


class Job:
    """n candidates in micro-batches of `batch`. Those in `skip` (n,) bool need no answer.

    A slice on which `suspicious` workers died is suspected.
    """

    def __init__(self, n: int, batch: int, suspicious: int, skip: np.ndarray | None = None) -> None:
        self.n, self.batch, self.suspicious = n, batch, suspicious
        self.open = np.ones(n, bool) if skip is None else ~skip  # candidates without an answer
        self.left = int(self.open.sum())
        self.hands = np.zeros(n, np.int16)  # workers that have each candidate in hand, and are not late
        self.deaths = np.zeros(n, np.int32)  # workers that died on each candidate's slice
        self.losses = np.zeros(n, np.int32)  # the same where the whole node went
        self.pending: list[Range] = [Range(0, n)]
        self.quarantined: list[int] = []

    @property
    def waiting(self) -> int:
        """Candidates to hand out, those that were answered meanwhile among them."""
        return sum(r.stop - r.start for r in self.pending)

    def answered(self, ticket: Ticket, failed: list[int]) -> np.ndarray:
        """The candidates of a slice that this answer closes; those that `failed` wait for another worker."""
        first = ticket.start + np.flatnonzero(self.open[ticket.rows])
        if failed:
            first = first[~np.isin(first, failed)]
            self.pending[:0] = [Range(i, i + 1, True, ticket.worker) for i in failed]
        self.open[first] = False
        self.left -= len(first)
        return first

    def suspected(self, start: int, stop: int) -> bool:
        """Whether candidates among these may be the death of workers."""
        return bool((self.deaths[start:stop] >= self.suspicious).any())

    def died(self, ticket: Ticket, blame: bool) -> bool:
        """A worker died on a slice: whether the slice is to be cut."""
        self.losses[ticket.rows] += 1
        if not blame and self.losses[ticket.rows].max() <= UNBLAMED:
            return False
        self.deaths[ticket.rows] += self.open[ticket.rows]
        return bool(self.open[ticket.rows].any()) and self.suspected(ticket.start, ticket.stop)

    def again(self, ticket: Ticket, avoid: str = "") -> bool:
        """Put what is open of a slice back, unless another worker has it in hand. Whether there was anything."""
        if not (self.open[ticket.rows] & (self.hands[ticket.rows] == 0)).any():
            return False
        if any(r.again and r.start <= ticket.start and ticket.stop <= r.stop for r in self.pending):
            return False  # it waits already
        self.pending.insert(0, Range(ticket.start, ticket.stop, True, avoid))
        return True

    def narrow(self, ticket: Ticket, why: str) -> bool:
        """Cut a slice in halves. True if it was a single candidate, which then has no value."""
        if len(ticket) == 1:
            self.open[ticket.start] = False
            self.left -= 1
            self.quarantined.append(ticket.start)
            LOG.warning("candidate %d has no value (NaN): %s", ticket.start, why)
            return True
        middle = (ticket.start + ticket.stop) // 2
        if len(ticket) > self.batch:  # at a micro-batch while there are several
            middle = ticket.start + max(1, (middle - ticket.start) // self.batch) * self.batch
        self.pending[:0] = [Range(ticket.start, middle, True), Range(middle, ticket.stop, True)]
        return False

    def trim(self) -> None:
        """Take out of the pending ranges what was answered meanwhile."""
        if not any(r.again for r in self.pending):
            return
        trimmed = []
        for r in self.pending:
            if not r.again:
                trimmed.append(r)
                continue
            rows = np.flatnonzero(self.open[r.start : r.stop])
            if len(rows):  # from the first to the last open one, at whole micro-batches unless it is under suspicion
                first, last = r.start + int(rows[0]), r.start + int(rows[-1]) + 1
                if not self.suspected(first, last) and not r.avoid:
                    first, last = first - first % self.batch, min(self.n, last + -last % self.batch)
                trimmed.append(r._replace(start=max(first, r.start), stop=min(last, r.stop)))
        self.pending = trimmed

    def cut(self, size: int, place: int) -> tuple[int, int]:
        """Take a slice of about `size` candidates off a pending range; a suspected range goes as it is."""
        r = self.pending[place]
        if r.stop - r.start <= size or (r.again and self.suspected(r.start, r.stop)):
            self.pending.pop(place)
            return r.start, r.stop
        middle = r.start + size - (r.start + size) % self.batch
        middle = middle if middle > r.start else min(r.stop, r.start + size)
        self.pending[place] = r._replace(start=middle)
        if middle >= r.stop:
            self.pending.pop(place)
        return r.start, middle
