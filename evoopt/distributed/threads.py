"""Workers as threads of this process, for objectives that wait: for a simulator, a service, a file."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from evoopt.checks import check_popsize
from evoopt.distributed import initializers, wire
from evoopt.distributed.evaluator import Evaluator
from evoopt.distributed.executor import Answered, Began, Content, Joined, Left
from evoopt.distributed.policy import Policy, timed
from evoopt.distributed.worker import Message, Worker
from evoopt.types import error


class ThreadExecutor:
    """The threads of one evaluator. See `ThreadEvaluator` for the arguments."""

    ready_made = True

    def __init__(self, workers: int, initializer: Callable[[], Any] | None = None) -> None:
        check_popsize(workers, 1, name="workers")
        self.workers, self._initializer = workers, initializer
        self._names = itertools.count()
        self._inboxes: dict[str, queue.SimpleQueue[Any]] = {}
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def start(self) -> None:
        """Get the threads going."""
        for _ in range(self.workers):
            self._start()

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def encode(self, content: Any, what: str) -> Content:
        """The content itself, for nothing travels."""
        del what
        keep = (np.ndarray, wire.KeyData)
        leaves = jax.tree.leaves(content, is_leaf=lambda x: isinstance(x, keep))
        return Content(content, wire.nbytes([x for x in leaves if isinstance(x, keep)]))

    def send(self, worker: str, number: int, message: Message) -> int:
        """Put a slice into the thread's queue."""
        self._inboxes[worker].put((number, message))
        return 0

    def poll(self, seconds: float) -> list[Any]:
        """What happened, after waiting for something."""
        events = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=max(0.0, seconds)))
            while True:
                events.append(self._events.get_nowait())
        for event in events:
            if isinstance(event, Left):  # an initializer that raised, in no thread that may be replaced
                cause = "a simulator that can't be opened twice"
                raise error("an initializer that returns", f"\n{event.reason.strip()}", cause, RuntimeError)
        return [event for event in events if event.worker in self._inboxes]

    def kill(self, worker: str) -> None:
        """Forget a thread, which can't be ended from outside, and start another one."""
        if inbox := self._inboxes.pop(worker, None):
            inbox.put(None)
            self._start()

    def close(self) -> None:
        """Tell all threads to end after what they are at."""
        for inbox in self._inboxes.values():
            inbox.put(None)
        self._inboxes.clear()

    def _start(self) -> None:
        name = f"t{next(self._names)}"
        inbox = self._inboxes[name] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(name, inbox), name=f"evoopt-{name}", daemon=True).start()

    def _work(self, name: str, inbox: queue.SimpleQueue[Any]) -> None:
        try:
            initializers.begin(self._initializer)
        except BaseException:
            self._events.put(Left(name, traceback.format_exc()))
            return
        at = [0]
        worker = Worker(begins=lambda: self._events.put(Began(name, at[0])))
        self._events.put(Joined(name, {"node": "here"}))
        while (given := inbox.get()) is not None:
            at[0], message = given
            self._events.put(Answered(name, at[0], worker.evaluate(message)))


def ThreadEvaluator(  # noqa: N802  (a recipe that reads like the class it makes)
    workers: int,
    initializer: Callable[[], Any] | None = None,
    timeout: float | None = None,
    *,
    policy: Policy | None = None,
    batch_size: int | None = None,
    raise_errors: bool = False,
) -> Evaluator:
    """An `Evaluator` whose workers are threads: for objectives that wait, or that leave Python while they compute.

    Nothing is pickled, so that any callable will do; it is called by several threads at once. One that computes in
    Python gains nothing here: `ProcessEvaluator`. The result has the same bits as without it.

    Args:
        workers: how many threads.
        initializer: called once in each thread; the objective finds what it returned by
            `evoopt.distributed.initialized()`.
        timeout: seconds that a candidate may take; then its value is NaN, and the log names it. A thread can't be
            killed: it goes on beside the one that replaces it, so a process that it waits for should have its own.
        policy, batch_size, raise_errors: see `Evaluator`.

    >>> import jax.numpy as jnp
    >>> from evoopt import Population
    >>> with ThreadEvaluator(2) as evaluate:
    ...     evaluate(Population(lambda g: g, jnp.arange(4.0)), lambda x: float(x) ** 2, jit=False).tolist()
    [0.0, 1.0, 4.0, 9.0]
    """
    policy = timed(policy, timeout)
    return Evaluator(ThreadExecutor(workers, initializer), policy, batch_size=batch_size, raise_errors=raise_errors)
