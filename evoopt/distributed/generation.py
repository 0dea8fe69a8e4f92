"""One generation under way in the evaluator: what is sent of it, and the answers that are in."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.answers import split
from evoopt.distributed import wire
from evoopt.distributed.executor import Content
from evoopt.distributed.faults import raised
from evoopt.distributed.jobs import Ticket
from evoopt.distributed.worker import Message, Reply, blank, put
from evoopt.population import Population
from evoopt.types import Answers, Key, error


class Source(NamedTuple):
    """Where a population came from; with it a replica asks for itself: `population = strategy.ask(state, key)`."""

    strategy: Any
    state: Any
    key: Key


@dataclasses.dataclass
class Generation:
    """A population, what has become of its slices, and what they answered. `number` is that of the scheduler's job."""

    number: int
    population: Population
    packed: Any  # genomes and each, as NumPy arrays
    needs: dict[str, int]  # part -> version
    contents: dict[str, Content]
    source: Source | None = None
    jit: bool = True
    expected: tuple[int, ...] = ()  # checksums of state and population
    replicas: bool = False
    out: Any = None  # the answers, from the first one on
    tickets: dict[int, Ticket] = dataclasses.field(default_factory=dict)
    missing: list[int] = dataclasses.field(default_factory=list)
    failed: int = 0  # candidates whose evaluation raised
    failures: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)  # (candidate, where, traceback)
    tried: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)  # candidate -> (worker, traceback)
    refused: collections.Counter[tuple[int, str]] = dataclasses.field(default_factory=collections.Counter)
    broken: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)  # start of a slice -> (worker, where)

    def by_candidates(self, shape: int) -> None:
        """Slices are evaluated with the population's `decode`, of this version of its shape."""
        self._on_top({"shape": shape, "decode": self.number})
        self.replicas, self.expected = False, ()

    def by_replicas(self, expected: tuple[int, ...]) -> None:
        """Slices are evaluated by replicas, which must have these checksums."""
        self._on_top({"replica": self.number})
        self.replicas, self.expected = True, expected

    def _on_top(self, parts: dict[str, int]) -> None:
        self.needs = {**{k: v for k, v in self.needs.items() if k in ("task", "args")}, **parts}

    def message(self, ticket: Ticket, parts: list[tuple[str, int, Any]]) -> Message:
        """What a worker is sent for a slice."""
        genomes, each = self.packed
        own = (None if self.replicas else wire.rows(genomes, ticket.rows), wire.rows(each, ticket.rows))
        needs = tuple(self.needs.items())
        return Message(self.number, ticket.start, ticket.stop, tuple(parts), needs, own, self.expected)

    def fill(self, reply: Reply, first: np.ndarray, where: str) -> None:
        """Take the answers of the candidates `first` from a reply.

        Raises:
            ValueError: answers of another shape or type than those of other candidates.
        """
        if self.out is None:
            self.out = blank(reply.answers, len(self.population))
        shapes = lambda tree: jax.tree.map(lambda x: (x.shape[1:], x.dtype), tree)
        alike = jax.tree.structure(self.out) == jax.tree.structure(reply.answers)
        if not alike or shapes(self.out) != shapes(reply.answers):
            raise error(
                f"answers like those of the other candidates: {shapes(self.out)}",
                f"{shapes(reply.answers)} for candidates {reply.start} to {reply.stop - 1}, worker {where}",
                "an objective whose answer's shape or type depends on the candidate",
            )
        take = first - reply.start
        put(self.out, first, jax.tree.map(lambda x: x[take], reply.answers))

    def answers(self) -> Answers:
        """All of them, with leading axis n, NaN where there is none.

        Raises:
            RuntimeError: every evaluation raised, or nobody answered.
            TypeError: an objective that returned nothing.
        """
        n = len(self.population)
        if self.out is None:
            self._check_some(n)
            self.out = np.full(n, np.nan, jnp.result_type(float))
        # A Python objective's values stay float64, whatever JAX's float type is.
        answers = jax.tree.map(jnp.asarray, self.out) if self.jit else self.out
        if self.population.active is not None:
            lib = jnp if self.jit else np
            active = lib.asarray(self.population.active)
            at = lambda x: active.reshape(-1, *(1,) * (x.ndim - 1))
            inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
            answers = jax.tree.map(lambda x: lib.where(at(x), x, np.nan) if inexact(x) else x, answers)
        return answers

    def values(self, answers: Answers) -> Answers:
        """The answers without aux."""
        return split(answers)[0]

    def _check_some(self, n: int) -> None:
        if self.failures:
            candidate, where, text = self.failures[0]
            raise raised(candidate, where, text, f"all {self.failed} evaluations raised; the first: ")
        if self.missing:
            raise error(
                "an answer to at least one candidate of the generation",
                f"none of {n}: their workers died, or they took longer than the timeout",
                "an objective that ends its process, or a timeout shorter than an evaluation",
                RuntimeError,
            )
        if not self.jit and n:
            raise error(
                "a value for at least one candidate", "None for all", "an objective without `return`", TypeError
            )


def unneeded(population: Population, size: int) -> np.ndarray | None:
    """The candidates (n,) bool that need no evaluation: those in micro-batches without an active one."""
    if population.active is None:
        return None
    n, active = len(population), np.asarray(population.active)
    whole = np.pad(active, (0, -n % size)).reshape(-1, size).any(axis=1)
    return ~np.repeat(whole, size)[:n]
