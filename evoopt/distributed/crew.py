"""The workers as the scheduler sees them: what each has in hand, who is free, and what each has done."""

from __future__ import annotations

import collections
import dataclasses

from evoopt.distributed.jobs import Ticket

KEPT = 32  # lost workers whose shares are kept one by one


@dataclasses.dataclass
class Tally:
    """One worker's share."""

    joined: float
    node: str = ""
    answers: int = 0  # candidates
    slices: int = 0
    seconds: float = 0.0  # that it spent evaluating, by its own clock
    lost: int = 0  # slices it never answered

    def add(self, other: Tally) -> None:
        """Take in another's share."""
        self.answers += other.answers
        self.slices += other.slices
        self.seconds += other.seconds
        self.lost += other.lost


class Worker:
    """One worker."""

    def __init__(self, now: float) -> None:
        self.queue: collections.deque[Ticket] = collections.deque()  # in the order in which it works on them
        self.front_since = now  # when it began with the first of them
        self.answered = 0
        self.loaded = False  # whether it said that it has loaded and compiled all
        self.late = False  # whether what it has in hand was given to others too
        self.grace = 1.0  # multiple of the deadline, doubled each time it is missed


class Crew:
    """All workers by name."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.tallies: dict[str, Tally] = {}
        self.lost = Tally(0.0)  # the shares of lost workers together
        self.holder: dict[int, str] = {}  # ticket in hand -> its worker
        self.idle: dict[str, None] = {}  # workers with empty hands, in the order in which they became so
        self.single: dict[str, None] = {}  # workers with one ticket

    def join(self, name: str, now: float, node: str) -> None:
        """A new worker, on this node."""
        self.workers[name] = Worker(now)
        self.idle[name] = None
        self.tallies.setdefault(name, Tally(now, node))

    def remove(self, name: str) -> Worker:
        """Forget a worker; its queue is what it never answered."""
        gone = self.workers.pop(name)
        self.idle.pop(name, None)
        self.single.pop(name, None)
        self.tallies[name].lost += len(gone.queue)
        for ticket in gone.queue:
            del self.holder[ticket.number]
        lost = [other for other in self.tallies if other not in self.workers]
        for other in lost[:-KEPT]:  # rows do not grow with the workers that were lost
            self.lost.add(self.tallies.pop(other))
        return gone

    def give(self, ticket: Ticket) -> bool:
        """A worker gets a ticket: whether it has no other, and begins at once."""
        w = self.workers[ticket.worker]
        self.holder[ticket.number] = ticket.worker
        w.queue.append(ticket)
        self.sort(ticket.worker)
        return len(w.queue) == 1

    def take(self, number: int) -> tuple[Ticket, bool]:
        """Take a ticket out of its worker's hands: it, and whether the worker was at it."""
        name = self.holder.pop(number)
        w = self.workers[name]
        ticket = next(t for t in w.queue if t.number == number)
        at_it = ticket is w.queue[0]
        w.queue.remove(ticket)
        self.sort(name)
        return ticket, at_it

    def front(self, name: str) -> int | None:
        """The ticket that a worker is at."""
        w = self.workers.get(name)
        return w.queue[0].number if w is not None and w.queue else None

    def sort(self, name: str) -> None:
        """Note whether a worker is free, after its hands or its lateness changed."""
        w = self.workers[name]
        self.idle.pop(name, None)
        self.single.pop(name, None)
        if len(w.queue) < 2 and not w.late:
            (self.single if w.queue else self.idle)[name] = None

    def least_busy(self, depth: int, avoid: str = "") -> str | None:
        """The worker to get the next slice, one with fewer than `depth`; `avoid` itself where there is no other."""
        if self.idle:
            other = next((name for name in self.idle if not self._avoided(name, avoid)), None)
            return other if other is not None or len(self.workers) > 1 else avoid
        return next((name for name in self.single if not self._avoided(name, avoid)), None) if depth > 1 else None

    def _avoided(self, name: str, avoid: str) -> bool:
        """Whether `name` is the worker to avoid, or shares its node while there are other nodes."""
        if not avoid or name == avoid:
            return bool(avoid)
        away = self.tallies.get(avoid, self.lost).node  # it may be gone already
        there = lambda worker: self.tallies[worker].node
        return there(name) == away and any(there(other) != away for other in self.workers)
