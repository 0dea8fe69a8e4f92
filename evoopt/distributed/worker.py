"""What a worker does, in an actor or in this process: evaluate slices, and keep a replica of the strategy's state."""

from __future__ import annotations

import dataclasses
import functools
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.answers import Answer, WithAux, number, plain
from evoopt.distributed import wire
from evoopt.population import Population
from evoopt.run import programs


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What does not change between generations. `batch` is the micro-batch; None evaluates one at a time.

    Two are equal if they hold the very same objects: a strategy with arrays in it has no other equality.
    """

    oracle: Callable[..., Any]
    jit: bool
    batch: int | None
    strategy: Any = None  # with it a worker can hold a replica

    def _identity(self) -> tuple:
        return id(self.oracle), self.jit, self.batch, id(self.strategy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


class Message(NamedTuple):
    """A slice to evaluate. Parts come only when the worker does not have them yet, and are kept."""

    job: int
    start: int  # of its candidates among all n
    stop: int
    parts: tuple[tuple[str, int, Any], ...]  # (name, version, content): task, args, shape and decode, replica
    needs: tuple[tuple[str, int], ...]  # (name, version) of all that it is evaluated with
    rows: Any = None  # (genomes, each) of the slice, packed; in replicas each alone
    expected: tuple[int, ...] = ()  # checksums of state and population that a replica must have


class Reply(NamedTuple):
    """Its answers, or why there are none."""

    start: int
    stop: int
    seconds: float
    answers: Any = None  # packed, leading axis stop - start; None if no candidate has an answer
    failures: tuple[tuple[int, str], ...] = ()  # (candidate, traceback) of evaluations that raised
    error: str = ""  # the slice as a whole could not be evaluated here
    refused: str = ""  # the worker lacks something: send it again
    differs: bool = False  # its replica is not the driver's


BUILT_ON = {"task": (), "args": ("task",), "shape": ("task",), "decode": ("task", "shape"), "replica": ("task",)}


class Worker:
    """Evaluates `Message`s."""

    def __init__(self, pressed: Callable[[], bool] = lambda: False) -> None:
        self._pressed = pressed  # whether somebody pressed Ctrl-C here: then a KeyboardInterrupt is not the objective's
        self._versions: dict[str, int] = {}
        self._task: Task | None = None
        self._programs: Any = None
        self._args: tuple = ()
        self._shape: Any = None
        self._decode: Any = None
        self._state: Any = None
        self._population: Any = None
        self._marks: tuple[int, ...] = ()

    def evaluate(self, message: Message) -> Reply:
        """The answers of a slice. It never raises, so that what went wrong is told with its place."""
        begun = time.perf_counter()
        reply = Reply(message.start, message.stop, 0.0)
        try:
            needs = dict(message.needs)
            for name, version, content in message.parts:  # one whose base was lost on its way is lacking too
                if all(self._versions.get(base) == needs.get(base) for base in BUILT_ON[name]):
                    self._install(name, version, content)
            lacking = [name for name, version in message.needs if self._versions.get(name) != version]
            if lacking:
                return reply._replace(refused=f"{', '.join(lacking)} of another version")
            if message.expected and message.expected != self._marks:
                self._versions.pop("replica", None)
                return reply._replace(differs=True)
            answers, failures = self._evaluate(message)
        except BaseException as raised:
            if isinstance(raised, KeyboardInterrupt) and self._pressed():
                raise
            return reply._replace(error=traceback.format_exc(), seconds=time.perf_counter() - begun)
        return reply._replace(answers=answers, failures=failures, seconds=time.perf_counter() - begun)

    def _install(self, name: str, version: int, content: Any) -> None:
        if name == "task":
            self._task, self._versions, self._programs = content, {}, compiled(content)
        elif name == "args":
            self._args = jax.device_put(wire.unpack(content))
        elif name == "shape":  # sent once: a function that came again would be another one, compiled anew
            self._shape = jax.tree.structure(content)
        elif name == "decode":
            self._decode = self._shape.unflatten(jax.device_put(wire.unpack(content)))
        elif not self._advance(content):
            return
        self._versions[name] = version

    def _advance(self, content: tuple) -> bool:
        """(state or None, ((answers, key), ...)): each pair's answers are told to the population before, then asked.

        False where there is no replica that could advance.
        """
        state, steps = content
        if state is None and "replica" not in self._versions:
            return False
        if state is not None:
            self._state = jax.device_put(wire.unpack(state))
        for answers, key in steps:
            if answers is not None:
                self._state = self._programs.tell(self._state, self._population, jax.tree.map(jnp.asarray, answers))
            self._population = self._programs.ask(self._state, wire.unpack(key))
        self._marks = self._programs.mark(self._state, self._population)
        return True

    def _evaluate(self, message: Message) -> tuple[Any, tuple[tuple[int, str], ...]]:
        assert self._task is not None
        size = self._task.batch or 1
        genomes, each = message.rows
        decode = self._population.decode if message.expected else self._decode
        one = self._compiled_batch if self._task.jit else self._python_batch
        answers, failures = [], []
        for first in range(message.start - message.start % size, message.stop, size):
            low, high = max(first, message.start), min(first + size, message.stop)
            # A micro-batch has its one shape and each candidate its one place in it, also where only some are asked.
            places = np.clip(np.arange(first, first + size), low, high - 1) - message.start
            own = lambda tree, places=places: wire.unpack(wire.rows(tree, places))
            if message.expected:  # of the replica's own population, of which nothing leaves the device
                batch = self._programs.take(self._population.genomes, places + message.start)
            else:
                batch = own(genomes)
            part, failed = one(decode, batch, own(each), range(low - first, high - first))
            failures += [(first + place, text) for place, text in failed]
            answers.append((low, high, part))
        return _joined(answers, message.start, message.stop), tuple(failures)

    def _compiled_batch(self, decode: Any, genomes: Any, each: Any, places: range) -> tuple[Any, list]:
        try:
            answers = jax.tree.map(np.asarray, self._programs.run(decode, genomes, each, self._args))
            return _valued(jax.tree.map(lambda x: x[places.start : places.stop], answers)), []
        except Exception as problem:
            jax.eval_shape(
                self._programs.run, decode, genomes, each, self._args
            )  # raises if it is no candidate's fault
            if len(places) == 1:
                return None, [(places.start, f"{type(problem).__name__}: {problem}")]
        parts, failures = [], []
        for place in places:
            alone = lambda tree, place=place: jax.tree.map(lambda x: x[np.full(len(x), place)], tree)
            part, failed = self._compiled_batch(decode, alone(genomes), alone(each), range(place, place + 1))
            parts.append((place, place + 1, part))
            failures += failed
        return _joined(parts, places.start, places.stop), failures

    def _python_batch(self, decode: Any, genomes: Any, each: Any, places: range) -> tuple[Any, list]:
        assert self._task is not None
        candidates = jax.device_get(self._programs.run(decode, genomes))
        present = getattr(decode, "present", lambda candidate: candidate)
        args, each = jax.device_get((self._args, each))
        parts, failures = [], []
        for place in places:
            pick = lambda tree, place=place: jax.tree.map(lambda x: x[place], tree)
            try:
                answer = self._task.oracle(present(pick(candidates)), *args, *(() if each is None else (pick(each),)))
                parts.append((place, place + 1, None if answer is None else _row(answer)))
            except BaseException as raised:  # an exit that an objective raises is its own, and no reason to die
                if isinstance(raised, KeyboardInterrupt) and self._pressed():
                    raise
                parts.append((place, place + 1, None))
                failures.append((place, traceback.format_exc()))
        return _joined(parts, places.start, places.stop), failures


class Programs(NamedTuple):
    """A task, compiled."""

    run: Callable[..., Any]  # a micro-batch: its answers, or for an objective in Python its candidates
    ask: Callable[..., Any] | None = None
    tell: Callable[..., Any] | None = None
    mark: Callable[..., tuple[int, ...]] | None = None
    take: Callable[..., Any] | None = None


@functools.lru_cache(maxsize=4)  # workers in one process share their programs
def compiled(task: Task) -> Programs:
    """The programs that a worker runs: always a whole micro-batch, so that all workers run the same ones."""

    def evaluate(decode: Any, genomes: Any, each: Any, args: tuple) -> Any:
        return Population(decode, genomes).map(task.oracle, *args, each=each, batch_size=task.batch)

    def decoded(decode: Any, genomes: Any) -> Any:
        return Population(decode, genomes).decoded()

    run = programs.jit(evaluate if task.jit else decoded)
    if task.strategy is None:
        return Programs(run)
    take = jax.jit(lambda tree, places: jax.tree.map(lambda x: x[places], tree))
    bound = programs.Bound(task.strategy)
    return Programs(run, bound.ask, bound.tell, _marks(task.strategy), take)


def _marks(strategy: Any) -> Callable[[Any, Any], tuple[int, ...]]:
    """A compiled (state, population) -> checksums of both, by which replicas are compared."""
    compiled = jax.jit(lambda state, population: jnp.concatenate([
        wire.fingerprint((strategy, state)), wire.fingerprint((population.decode, population.genomes))
    ]))  # fmt: skip
    return lambda state, population: tuple(np.asarray(compiled(state, population)).tolist())


def _row(answer: Any) -> Any:
    """The answer of a Python objective as one row: its value, which comes first, in float64; the rest as arrays."""
    if isinstance(answer, WithAux):
        return WithAux(_row(answer.answer), jax.tree.map(lambda x: np.asarray(x)[None], answer.aux))
    if isinstance(answer, Answer) and answer.violation is not None:
        return Answer(_row(answer.value), np.asarray(answer.violation, np.float64)[None])
    answer = plain(answer)
    if not isinstance(answer, tuple):
        return np.array([number(answer, "the candidate")])
    value, *rest = answer
    return (_row(value), *(jax.tree.map(lambda x: np.asarray(x)[None], x) for x in rest))


def _valued(answers: Any) -> Any:
    """The values, which come first, as floats, so that NaN can stand among them."""
    leaves, treedef = jax.tree.flatten(answers)
    first = leaves[0] if jnp.issubdtype(leaves[0].dtype, jnp.floating) else leaves[0].astype(np.float32)
    return treedef.unflatten([first, *leaves[1:]])


def blank(like: Any, n: int) -> Any:
    """n rows without an answer: NaN, and zero in integers."""
    kind = lambda x: np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
    return jax.tree.map(lambda x: np.full((n, *x.shape[1:]), kind(x), x.dtype), like)


def _joined(parts: list[tuple[int, int, Any]], start: int, stop: int) -> Any:
    """The parts' answers in their places, NaN where there is none; None if nowhere."""
    like = next((part for _, _, part in parts if part is not None), None)
    if like is None:
        return None
    whole = blank(like, stop - start)
    for low, high, part in parts:
        if part is not None:
            put(whole, slice(low - start, high - start), part)
    return whole


def put(whole: Any, index: Any, part: Any) -> None:
    """Write rows into every leaf, in place."""
    for w, x in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        w[index] = x
