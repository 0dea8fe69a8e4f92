"""What is sent to whom: the scheduler's tickets become messages, with the parts that a worker lacks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax

from evoopt.distributed import wire
from evoopt.distributed.books import Books
from evoopt.distributed.executor import Executor
from evoopt.distributed.generation import Generation
from evoopt.distributed.parts import Parts
from evoopt.distributed.replicas import Replicas
from evoopt.distributed.scheduler import Scheduler


class Outbox:
    """Sends slices, and measures the driver's time for them."""

    def __init__(self, executor: Executor, scheduler: Scheduler, books: Books) -> None:
        self.executor, self.scheduler, self.books = executor, scheduler, books
        self.parts, self.replicas = Parts(executor), Replicas(executor)
        self._own, self._slices = 0.0, 0  # seconds spent here on slices, and how many

    def by_candidates(self, generation: Generation) -> None:
        """The population is sent, not asked by replicas."""
        leaves, shape = jax.tree.flatten(generation.population.decode)
        generation.contents["shape"] = self.parts.set_shape(shape)
        generation.contents["decode"] = self.executor.encode(wire.pack(leaves), "the population's decode")
        generation.by_candidates(self.parts.versions["shape"])

    def assign(self, generations: Mapping[int, Generation]) -> None:
        """Send all slices that the scheduler gives out now."""
        begun, pace = time.perf_counter(), self.scheduler.pace
        pace.call_seconds = getattr(self.executor, "call_seconds", 0.0)
        if pace.call_seconds and self._slices:
            pace.call_seconds += self._own / self._slices
        sends = []
        for ticket in self.scheduler.assign(self.executor.now()):
            generation = generations[ticket.job]
            generation.tickets[ticket.number] = ticket
            message = generation.message(ticket, self._lacking(generation, ticket.worker))
            sends.append((ticket.worker, ticket.number, message))
        self._own += time.perf_counter() - begun
        self._slices += len(sends)
        if sends and (many := getattr(self.executor, "send_many", None)):
            sizes = many(sends)
        else:
            sizes = [self.executor.send(*each) for each in sends]
        for (worker, *_), size in zip(sends, sizes, strict=True):
            self.books.sent[worker] += size

    def _lacking(self, generation: Generation, worker: str) -> list[tuple[str, int, Any]]:
        """The parts that a worker does not have yet, as (name, version, payload)."""
        known = self.parts.known.setdefault(worker, {})
        lacking = []
        for name, version in generation.needs.items():
            if known.get(name) != version:
                replica = name == "replica"
                content = self.replicas.content(generation, known.get(name)) if replica else generation.contents[name]
                if name == "task":
                    known.clear()
                lacking.append((name, version, content.payload))
                self.books.sent[worker] += content.size
                known[name] = version
        return lacking
