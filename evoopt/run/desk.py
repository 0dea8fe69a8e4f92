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
    own: dict[int, float] = dataclasses.field(default_factory=dict)  # this generation's answers by place
    others: list[tuple[Params, float]] = dataclasses.field(default_factory=list)  # known points that wait to be told
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

    def filled(self, places: np.ndarray, n: int) -> tuple[np.ndarray, Params | None, np.ndarray]:
        """The answers of a generation of n places, of which `places` are asked: values, points and which of them count.

        Known points take the places without an answer; they are gone from the desk then.
        """
        values, mask = np.full(n, np.nan), np.zeros(n, bool)
        for place, value in self.own.items():
            values[place] = value
        free = [int(p) for p in places if int(p) not in self.own]
        taken, self.others = self.others[: len(free)], self.others[len(free) :]
        if not taken:
            return values, None, mask
        rows = {place: point for place, (point, _) in zip(free, taken, strict=False)}
        for place, (_, value) in zip(free, taken, strict=False):
            values[place], mask[place] = value, True
        blank = jax.tree.map(np.zeros_like, taken[0][0])
        points = jax.tree.map(lambda *leaves: np.stack(leaves), *(rows.get(i, blank) for i in range(n)))
        return values, points, mask

    def saved(self) -> tuple[list[Params], dict[str, Any]]:
        """The points, and everything else as plain JSON."""
        points = [out.point for out in self.out.values()] + [p for p, _ in self.others] + list(self.first)
        meta = {
            "out": [[ticket, out.number, out.draw, out.place] for ticket, out in self.out.items()],
            "others": [value for _, value in self.others],
            "first": len(self.first),
            "own": [[place, value] for place, value in self.own.items()],
            "next_ticket": self.next_ticket,
            "handed": self.handed,
        }
        return points, meta

    @classmethod
    def loaded(cls, points: list[Params], meta: dict[str, Any]) -> Desk:
        """The inverse of `saved`."""
        rows = iter(points)
        out = {ticket: Out(next(rows), *rest) for ticket, *rest in meta["out"]}
        others = [(next(rows), value) for value in meta["others"]]
        first = collections.deque(next(rows) for _ in range(meta["first"]))
        return cls(out, meta["next_ticket"], meta["handed"], dict(meta["own"]), others, first)
