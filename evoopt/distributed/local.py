"""Workers that are not processes: they evaluate here, on a simulated clock, and fail as they are told to.

They serve runs in one process, whose bits are the reference for all others; tests of every fault that a cluster can
have; and simulations of clusters that nobody has.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from evoopt.distributed import wire
from evoopt.distributed.evaluator import Evaluator
from evoopt.distributed.executor import Answered, Content, Joined, Left, Stalled
from evoopt.distributed.policy import Policy
from evoopt.distributed.worker import Message, Reply, Worker
from evoopt.types import error


class Fate(NamedTuple):
    """What becomes of a slice: it takes `seconds`, and then `ends` in one of these ways.

    - `answer`; `twice`: the answer comes again after `later` seconds;
    - `die`: the worker dies; `late`: so it does, and the answer comes after `later` seconds; `node`: it dies with its
      node, and nobody is to blame;
    - `hang`: the worker never does anything again; `stop`: nor does this one, and its system says that it is stopped;
    - `lose`: the answer is lost on its way; `refuse`: the slice comes back unevaluated; `break`: it can't be evaluated
      on this worker; `foreign`: an answer that nobody asked for comes too.
    """

    ends: str = "answer"
    seconds: float = 0.0
    later: float = 1.0


class LocalExecutor:
    """Evaluates in this process; time is simulated and passes only in `poll`.

    Args:
        workers: how many at the start.
        fate: (worker, message, how many slices were sent before) -> `Fate`; by default all is answered at once.
        restart: seconds until a killed or dead worker is replaced; None: it is not.
        joins: (seconds, worker) of workers that come later.
        evaluate: another evaluation than a `Worker`'s, for simulations: message -> reply.
    """

    def __init__(
        self,
        workers: int = 1,
        fate: Callable[[str, Message, int], Fate] | None = None,
        *,
        restart: float | None = 1.0,
        joins: Iterable[tuple[float, str]] = (),
        evaluate: Callable[[Message], Reply] | None = None,
    ) -> None:
        if workers < 1:
            raise error("at least one worker", str(workers), "a count that was computed")
        self.clock = 0.0
        self._pressed = False
        self._fate, self._restart, self._evaluate = fate or (lambda *_: Fate()), restart, evaluate
        self._events: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self._free: dict[str, float] = {}  # when each worker is done with what it has; infinite: it hangs
        self._workers: dict[str, Worker] = {}
        self._names = itertools.count()
        self.sends = 0
        for _ in range(workers):
            self._at(0.0, Joined(f"w{next(self._names)}", {"node": "here"}))
        for seconds, worker in joins:
            self._at(seconds, Joined(worker, {"node": "here"}))

    def start(self) -> None:
        """Nothing: the workers join at the first poll."""

    def now(self) -> float:
        """Simulated seconds."""
        return self.clock

    def encode(self, content: Any, what: str) -> Content:
        """The content itself, for nothing travels."""
        del what
        return Content(content, wire.nbytes(list(_arrays(content))))

    def send(self, worker: str, number: int, message: Message) -> int:
        """Decide the slice's fate."""
        fate = self._fate(worker, message, self.sends)
        self.sends += 1
        begins = max(self.clock, self._free.get(worker, float("inf")))
        ends = begins + fate.seconds
        answer = Answered(worker, number, _Evaluation(message, fate.seconds))  # type: ignore[arg-type]
        if ends == float("inf"):
            return 0  # it hangs, or it is dead and the driver does not know yet
        if fate.ends in ("hang", "stop"):
            self._free[worker] = float("inf")
            if fate.ends == "stop":
                self._at(ends, Stalled(worker, "it was told to"))
            return 0
        replied = lambda **how: answer._replace(reply=Reply(message.start, message.stop, 0.0, **how))
        if fate.ends == "break":
            self._at(ends, replied(error="ModuleNotFoundError: no module here"))
        if fate.ends == "refuse":
            self._at(ends, replied(refused="it was told to"))
        self._free[worker] = ends
        if fate.ends in ("answer", "twice", "foreign"):
            self._at(ends, answer)
        if fate.ends == "twice":
            self._at(ends + fate.later, answer)
        if fate.ends == "foreign":
            self._at(ends, answer._replace(number=number + 1_000_000))
        if fate.ends == "lose":
            self._at(ends, replied(refused="the answer was lost"))
        if fate.ends in ("die", "late", "node"):
            self._free[worker] = float("inf")
            self._at(ends, Left(worker, "it was told to", blame=fate.ends != "node"))
        if fate.ends == "late":
            self._at(ends + fate.later, answer)
        return wire.nbytes(list(_arrays(message.rows)))

    def poll(self, seconds: float) -> list[Any]:
        """The next thing that happens, if within `seconds`; the clock goes there."""
        until = self.clock + seconds
        if not self._events or self._events[0][0] > until:
            if self._restart is None and not self._events and all(free == float("inf") for free in self._free.values()):
                cause = "every worker died or hangs, and none is replaced (restart=None)"
                raise error("workers that are alive", "none, and none that will come", cause, RuntimeError)
            self.clock = until
            return []
        when, _, event = heapq.heappop(self._events)
        self.clock = max(self.clock, when)
        if isinstance(event, Joined):
            self._workers[event.worker], self._free[event.worker] = Worker(lambda: self._pressed), self.clock
        elif isinstance(event, Left):
            self._gone(event.worker)
        elif isinstance(event, Answered) and isinstance(event.reply, _Evaluation):
            with self._watching():
                reply = event.reply.run(self._evaluate or self._worker(event.worker).evaluate)
            return [event._replace(reply=reply)]
        return [event]

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Note Ctrl-C while an objective runs in this thread, so that one that it raises itself is told from it."""
        self._pressed = False
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            yield
            return

        def handler(number: int, frame: Any) -> None:
            self._pressed = True
            before(number, frame)

        signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def more(self) -> None:
        """One more worker, because all others have been silent for long."""
        self._at(self.clock + (self._restart or 0.0), Joined(f"w{next(self._names)}", {"node": "here"}))

    def kill(self, worker: str) -> None:
        """Forget a worker, and restart it under another name."""
        # Answers of its that are under way still come, as they may over a network.
        self._gone(worker)

    def close(self) -> None:
        """Forget all workers."""
        self._workers.clear()
        self._events.clear()

    def _gone(self, worker: str) -> None:
        self._free.pop(worker, None)
        if self._restart is not None:
            self._at(self.clock + self._restart, Joined(f"w{next(self._names)}", {"node": "here"}))

    def _worker(self, name: str) -> Worker:
        return self._workers[name]

    def _at(self, when: float, event: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))


class _Evaluation:
    """An evaluation that happens when its answer arrives, once."""

    def __init__(self, message: Message, seconds: float) -> None:
        self.message, self.seconds, self.reply = message, seconds, None

    def run(self, evaluate: Callable[[Message], Reply]) -> Reply:
        if self.reply is None:
            self.reply = evaluate(self.message)._replace(seconds=self.seconds)
        return self.reply


def _arrays(content: Any) -> list[Any]:
    import jax
    import numpy as np

    keep = (np.ndarray, wire.KeyData)
    return [x for x in jax.tree.leaves(content, is_leaf=lambda x: isinstance(x, keep)) if isinstance(x, keep)]


def LocalEvaluator(  # noqa: N802  (a recipe that reads like the class it makes)
    workers: int = 1,
    fate: Callable[[str, Message, int], Fate] | None = None,
    *,
    policy: Policy | None = None,
    batch_size: int | None = None,
    replicate: bool | None = None,
    raise_errors: bool = False,
    **options: Any,
) -> Evaluator:
    """An `Evaluator` in this process: the reference that spread evaluations equal, bit for bit.

    >>> import jax.numpy as jnp
    >>> from evoopt import Population
    >>> evaluate = LocalEvaluator(workers=3, batch_size=2)
    >>> evaluate(Population(lambda g: g, jnp.arange(5.0)), lambda x: x**2).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    executor = LocalExecutor(workers, fate, **options)
    return Evaluator(executor, policy, batch_size=batch_size, replicate=replicate, raise_errors=raise_errors)
