"""Workers that hold the strategy's state, ask and tell by themselves, and are sent the values of a generation alone."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from typing import Any

import jax

from evoopt.distributed import wire
from evoopt.distributed.executor import Content, Executor
from evoopt.distributed.generation import Generation, Source
from evoopt.types import Answers, error

REPLICAS_FROM = 1 << 18  # bytes a worker and generation; candidates that need more are replaced by replicas
BEHIND = 16  # generations that a replica may lag and still be caught up by values alone
DIFFERENT = 2  # times in a row that a replica may differ; after that candidates are sent


class Replicas:
    """What a replica is sent, and whether replicas agree with the driver."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.states_sent = 0
        self.resent_states = 0  # to replicas that differed
        self._history: dict[int, Any] = {}  # generation -> the answers that the strategy was told
        self._keys: dict[int, Any] = {}  # generation -> the key that it was asked with
        self._latest = 0  # the generation whose answers are told next
        self._mark: Callable[..., tuple[int, ...]] | None = None  # checksums of state and population
        self._differing: collections.Counter[str] = collections.Counter()  # times in a row
        self._given_up = False
        self._plain = False  # whether the last answers were plain values

    def chosen(self, replicate: bool | None, source: Source | None, nbytes: float) -> bool:
        """Whether replicas are used where a generation's candidates are `nbytes` a worker."""
        if replicate and source is None:
            cause = "evaluate(population, oracle, source=(strategy, state, key)) was meant"
            raise error("the source of the population, which replicas ask themselves", "None", cause)
        if replicate is False or source is None or self._given_up:
            return False
        return bool(replicate) or (self._plain and nbytes >= REPLICAS_FROM)

    def restart(self, mark: Callable[..., tuple[int, ...]] | None) -> None:
        """Another objective or strategy: workers have forgotten their replicas."""
        self._mark = mark
        self._history.clear()

    def begin(self, generation: Generation) -> None:
        """Have a generation asked and evaluated by replicas."""
        assert generation.source is not None
        assert self._mark is not None
        generation.by_replicas(self._mark(generation.source.state, generation.population))
        self._keys[generation.number] = wire.pack(generation.source.key)

    def content(self, generation: Generation, at: int | None) -> Content:
        """What brings a replica from generation `at` to this one: values if they lead there, the state otherwise."""
        path = [k for k in self._keys if at is not None and at <= k <= generation.number]
        contents = generation.contents
        if path and path[0] == at and all(k in self._history for k in path[:-1]):
            name = f"replica from {at}"
            if name not in contents:
                steps = tuple((self._history[a], self._keys[b]) for a, b in itertools.pairwise(path))
                contents[name] = self.executor.encode((None, steps), "the values of a generation")
            return contents[name]
        self.states_sent += 1
        if "state" not in contents:
            assert generation.source is not None
            state = (wire.pack(generation.source.state), ((None, self._keys[generation.number]),))
            contents["state"] = self.executor.encode(state, "the strategy's state")
        return contents["state"]

    def collected(self, generation: Generation, answers: Answers) -> None:
        """A generation is over: its answers are what the strategy is told, unless `told` says otherwise."""
        values = generation.values(answers)
        self._plain = len(jax.tree.leaves(values)) == 1
        self._latest = generation.number
        if self._latest in self._keys:
            self._history[self._latest] = wire.pack(values)
            for old in [k for k in self._keys if k < self._latest - BEHIND]:
                self._keys.pop(old)
                self._history.pop(old, None)

    def told(self, answers: Answers, moved: bool) -> None:
        """The strategy was told something else; with `moved`, its state was changed too."""
        if moved:
            self._history.pop(self._latest, None)
        elif self._latest in self._history:
            self._history[self._latest] = wire.pack(answers)

    def differs(self, worker: str) -> bool:
        """A worker's replica differs: whether not even the state itself leads to the same population there."""
        self.resent_states += 1
        self._differing[worker] += 1
        return self._differing[worker] > DIFFERENT

    def agrees(self, worker: str) -> None:
        """A worker evaluated with what it holds, or is gone."""
        self._differing.pop(worker, None)

    def give_up(self) -> None:
        """Candidates are sent from now on."""
        self._given_up = True
