"""Who has the workers, and what is said of them: the protocol between the evaluator and processes, or a simulation."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from evoopt.distributed.worker import Message, Reply


class Joined(NamedTuple):
    """A worker is ready."""

    worker: str
    facts: dict[str, Any]  # node, pid, ...


class Left(NamedTuple):
    """A worker is gone."""

    worker: str
    reason: str
    blame: bool = True  # whether the slice it worked on may be the cause


class Stalled(NamedTuple):
    """The operating system says that a worker lives and does not run, as one that was stopped."""

    worker: str
    reason: str


class Began(NamedTuple):
    """A worker has loaded what a slice needs, and is at its first candidate: a timeout counts from now."""

    worker: str
    number: int


class Answered(NamedTuple):
    """A slice came back; `size` is the bytes that it took on the wire."""

    worker: str
    number: int
    reply: Reply
    size: int = 0


class Content(NamedTuple):
    """A part of a message, ready to be sent."""

    payload: Any
    size: int


class Executor(Protocol):
    """Something that has workers: processes on this or other machines, or none at all in tests.

    It may also have `send_many(sends) -> bytes of each`, which is given all sends of a moment; `more()`, which starts
    one more worker where there is room; `call_seconds`, the driver's time for one call; and `ready_made`, True where
    candidates for an objective in Python are decoded by the driver, with the bits that they have without workers.
    """

    def start(self) -> None:
        """Get the first workers going; called once."""
        ...

    def now(self) -> float:
        """Seconds, by a clock that never goes back."""
        ...

    def encode(self, content: Any, what: str) -> Content:
        """The content as it is sent. Raises a sentence about `what` if it can't be sent."""
        ...

    def send(self, worker: str, number: int, message: Message) -> int:
        """Have a worker evaluate; the answer comes as `Answered` with this number. Bytes, without the parts."""
        ...

    def poll(self, seconds: float) -> list[Any]:
        """What happened: `Joined`, `Left`, `Stalled`, `Began`, `Answered`. Waits up to `seconds` for something."""
        ...

    def kill(self, worker: str) -> None:
        """Give a worker up and start another one instead."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...
