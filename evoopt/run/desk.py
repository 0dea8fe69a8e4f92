"""The candidates of a session that are out, and the answers that have come in: pure bookkeeping on the host."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from evoopt.population import Population
from evoopt.types import Params, error

DRAWN = 0  # in the generation itself; 1, 2, ... are further draws of the same distribution
INJECTED = -1

Answered = tuple[float, list[float] | None]  # a value, and the violations that came with it


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """One candidate and the ticket that its answer must carry.

    Attributes:
        ticket: its number in the session.
        params: what to evaluate, NumPy arrays in the structure of the parameters; of a space, as objectives get it.
    """

    ticket: int
    params: Params


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One generation's candidates and the ticket that its answers must carry.

    Iteration, `len` and indexing see only the candidates to evaluate: a strategy that shrinks or restarts keeps places
    for more. `population` has all of them.
    """

    number: int
    population: Population

    def __iter__(self) -> Iterator[Params]:
        return iter(self.population)

    def __len__(self) -> int:
        return int(self.population.asked())

    def __getitem__(self, i: Any) -> Any:
        """Candidate i of those to evaluate, with the same bits as by iteration; a list of them for a slice."""
        some = list(self.population.candidates(np.atleast_1d(self.population.places()[i])))
        return some if isinstance(i, slice) else some[0]


@dataclasses.dataclass(frozen=True)
class Out:
    """A candidate that is out: where it comes from."""

    point: Params  # NumPy arrays, as the strategy decodes it
    number: int  # the generation whose distribution it is of
    draw: int  # DRAWN, a further draw, or INJECTED
    place: int  # in that draw


@dataclasses.dataclass
class Desk:
    """What a session remembers between the first candidate of a generation that is handed out and its last answer."""

    out: dict[int, Out] = dataclasses.field(default_factory=dict)  # by ticket
    next_ticket: int = 0
    handed: int = 0  # candidates of this generation's draws that were handed out
    own: dict[int, Answered] = dataclasses.field(default_factory=dict)  # this generation's answers by place
    others: list[tuple[Params, Answered]] = dataclasses.field(default_factory=list)  # known points that wait to be told
    first: collections.deque[Params] = dataclasses.field(default_factory=collections.deque)  # handed out next

    def __copy__(self) -> Desk:
        return Desk(**{f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def hand(self, out: Out) -> int:
        """The ticket of a candidate that goes out."""
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        self.out[ticket] = out
        return ticket

    def find(self, ticket: Any) -> Out:
        """Whose ticket it is.

        Raises:
            ValueError: for one that was never handed out, or was told.
            TypeError: for something that is no ticket.
        """
        if not isinstance(ticket, (int, np.integer)) or isinstance(ticket, bool):
            cause = "the candidate's parameters instead of the candidate"
            raise error("a candidate or its ticket, an int", f"{type(ticket).__name__}", cause, TypeError)
        if (found := self.out.get(int(ticket))) is not None:
            return found
        some = ", ".join(map(str, list(self.out)[:5])) or "none"
        expected = f"the ticket of one of the {len(self.out)} candidates that are out: {some}"
        if 0 <= ticket < self.next_ticket:
            cause = "an answer that was sent twice, or a candidate that two workers had"
            raise error(expected, f"ticket {ticket}, which was told already", cause)
        raise error(expected, f"ticket {ticket}, which nobody was given", "the ticket of another session")

    def closed(self) -> None:
        """A generation was told: nothing of the next one is out."""
        self.handed, self.own = 0, {}

    def filled(self, places: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray | None, Params | None, np.ndarray]:
        """The answers of a generation of n places, of which `places` are asked: values, violations or None, points and
        which of them count.

        Known points take the places without an answer; they are gone from the desk then.
        """
        mask, given = np.zeros(n, bool), dict(self.own)
        free = [int(p) for p in places if int(p) not in self.own]
        taken, self.others = self.others[: len(free)], self.others[len(free) :]
        rows: dict[int, Params] = {}
        for place, (point, answer) in zip(free, taken, strict=False):
            rows[place], given[place], mask[place] = point, answer, True
        values = np.array([given[i][0] if i in given else np.nan for i in range(n)])
        some = [violation for _, violation in given.values() if violation is not None]
        none = [np.nan] * len(some[0]) if some else None
        violations = np.array([given[i][1] if i in given else none for i in range(n)], float) if some else None
        if not taken:
            return values, violations, None, mask
        blank = jax.tree.map(np.zeros_like, taken[0][0])
        points = jax.tree.map(lambda *leaves: np.stack(leaves), *(rows.get(i, blank) for i in range(n)))
        return values, violations, points, mask

    def saved(self) -> tuple[list[Params], dict[str, Any]]:
        """The points, and everything else as plain JSON."""
        points = [out.point for out in self.out.values()] + [p for p, _ in self.others] + list(self.first)
        meta = {
            "out": [[ticket, out.number, out.draw, out.place] for ticket, out in self.out.items()],
            "others": [[*answer] for _, answer in self.others],
            "first": len(self.first),
            "own": [[place, *answer] for place, answer in self.own.items()],
            "next_ticket": self.next_ticket,
            "handed": self.handed,
        }
        return points, meta

    @classmethod
    def loaded(cls, points: list[Params], meta: dict[str, Any]) -> Desk:
        """The inverse of `saved`."""
        rows = iter(points)
        out = {ticket: Out(next(rows), *rest) for ticket, *rest in meta["out"]}
        others: list[tuple[Params, Answered]] = [(next(rows), (v, w)) for v, w in meta["others"]]
        own: dict[int, Answered] = {place: (v, w) for place, v, w in meta["own"]}
        first = collections.deque(next(rows) for _ in range(meta["first"]))
        return cls(out, meta["next_ticket"], meta["handed"], own, others, first)
