"""What workers keep between slices, and get again when it changed: objective, arguments, a population's shape."""

from __future__ import annotations

import collections
import hashlib
from typing import Any

import jax
import numpy as np

from evoopt.distributed import wire
from evoopt.distributed.executor import Content, Executor
from evoopt.distributed.worker import Task

REPICKLED = 64 << 20  # bytes; a larger objective is not looked at for changes in every generation


class Parts:
    """The newest version of each part, and which versions each worker has."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.versions: collections.Counter[str] = collections.Counter()
        self.known: dict[str, dict[str, int]] = {}  # worker -> part -> version
        self._task: tuple[Task, Content] | None = None
        self._args: tuple[list[Any], Content] | None = None
        self._shape: tuple[Any, Content] | None = None  # of decode

    @property
    def needs(self) -> dict[str, int]:
        """The versions that every generation needs."""
        return {name: self.versions[name] for name in ("task", "args")}

    @property
    def contents(self) -> dict[str, Content]:
        """What they are."""
        assert self._task is not None
        assert self._args is not None
        return {"task": self._task[1], "args": self._args[1]}

    def set_task(self, task: Task) -> bool:
        """The objective and how it is called: whether it is another one, of which workers know nothing yet.

        An object whose fields change between generations is sent again, so it is pickled each time; a large one is not:
        data belong in the arguments.
        """
        before = self._task
        if before is not None and before[0] == task and before[1].size > REPICKLED:
            return False
        content = self.executor.encode(task, "the objective")
        if before is not None and before[0] == task and content.payload is task:
            return False  # nothing is pickled: the workers have the object itself
        if before is not None and (content is before[1] or _same_bytes(content.payload, before[1].payload)):
            self._task = (task, before[1])  # an oracle made anew, the same in every bit
            return False
        self.versions["task"] += 1
        self._task = (task, content)
        self._args = None  # a worker forgets all with a new task
        self.known = {worker: {} for worker in self.known}
        return True

    def set_args(self, args: tuple) -> None:
        """The objective's arguments, a new version if they changed, also in place."""
        leaves, treedef = jax.tree.flatten(args)
        marks = [treedef, *map(mark_of, leaves)]
        if self._args is not None:
            old, _ = self._args
            if len(old) == len(marks) and old[0] == treedef and all(map(same, old[1:], marks[1:])):
                return
        self.versions["args"] += 1
        self._args = (marks, self.executor.encode(wire.pack(args), "the objective's arguments"))

    def set_shape(self, shape: Any) -> Content:
        """The tree structure of a population's `decode`, which holds its function."""
        if self._shape is None or self._shape[0] != shape:
            self.versions["shape"] += 1
            places = shape.unflatten(range(shape.num_leaves))
            self._shape = (shape, self.executor.encode(places, "the population's decode"))
        return self._shape[1]


def mark_of(leaf: Any) -> Any:
    """What shows that an argument changed: a JAX array is its own mark, other arrays are known by their bytes."""
    if isinstance(leaf, jax.Array):
        return leaf
    if type(leaf) in (bool, int, float, complex, str, bytes):
        return (type(leaf), repr(leaf))
    if (type(leaf) is np.ndarray or isinstance(leaf, np.generic)) and not leaf.dtype.hasobject:
        return (type(leaf), leaf.dtype, leaf.shape, hashlib.blake2b(leaf.tobytes()).digest())
    return object()  # something else, such as a masked array or a table, has more than its numbers: sent every time


def same(a: Any, b: Any) -> bool:
    """Whether two marks are of the same argument."""
    return a is b if isinstance(a, jax.Array) or isinstance(b, jax.Array) else a == b


def _same_bytes(a: Any, b: Any) -> bool:
    return isinstance(a, bytes) and isinstance(b, bytes) and a == b
