"""Whose fault a failure is: the candidate's if another worker fails too, the worker's if others succeed."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from evoopt.distributed.worker import Reply
from evoopt.types import error

if TYPE_CHECKING:
    from evoopt.distributed.generation import Generation

REFUSALS = 3  # a worker that sends one slice back so often is replaced
REFUSED = 12  # a slice that comes back so often, from anywhere, is an error
BAD = 3  # a worker with so many failures that no other has is replaced; so is the only one, if they are in a row
AGREED = 8  # after so many failures that another worker confirmed, a failure counts at once


class Faults:
    """What is known about workers that failed."""

    def __init__(self) -> None:
        self._confirmed = 0  # failures that two workers had
        self._bad: collections.Counter[str] = collections.Counter()  # failures that only this worker had
        self._in_a_row: collections.Counter[str] = collections.Counter()  # failures since its last answer

    def to_be_tried(self, generation: Generation, worker: str, reply: Reply, alone: bool) -> list[int]:
        """The candidates that raised on this worker and are tried on another one before that counts.

        Where it is the only worker, another one must be started. That is done once a generation, and only while it may
        be the worker's fault: it answers nothing any more, and no failure was ever confirmed.
        """
        n, failures = reply.stop - reply.start, len(reply.failures)
        self._in_a_row[worker] = self._in_a_row[worker] + failures if failures == n else 0
        if alone:
            doubtful = not self._confirmed and not generation.tried and self._in_a_row[worker] >= BAD
        else:
            doubtful = self._confirmed < AGREED or (failures == n and failures > 1)
        again = []
        for candidate, text in reply.failures:
            if candidate in generation.tried:
                self._confirmed += generation.tried[candidate][0] != worker
            elif doubtful:
                generation.tried[candidate] = (worker, text)
                again.append(candidate)
        return again

    def suspect(self, worker: str) -> bool:
        """A failure that only this worker had: whether it is to be replaced."""
        self._bad[worker] += 1
        return self._bad[worker] >= BAD

    def forget(self, worker: str) -> None:
        """A worker is gone."""
        self._bad.pop(worker, None)
        self._in_a_row.pop(worker, None)


def raised(candidates: int | range, where: str, text: str, prefix: str = "") -> Exception:
    """The error for candidates that can't be evaluated."""
    if isinstance(candidates, range):
        what = f"candidates {candidates.start} to {candidates.stop - 1}"
    else:
        what = f"candidate {candidates}"
    return error(
        "a value for every candidate",
        f"{prefix}an exception for {what} on worker {where}:\n{text.strip()}",
        "an objective that fails here too: call it with one candidate before spreading it",
        RuntimeError,
    )


def said(text: str) -> str:
    """The line of a traceback that names the exception; its message may have several."""
    lines = text.strip().splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith("  File ")), default=-1)
    return next((line for line in lines[last + 1 :] if line and not line[0].isspace()), lines[-1])
