"""Ctrl-C and SIGTERM end a run between two dispatches, where its state is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupts:
    """Ctrl-C and SIGTERM, kept for later."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.numbers, self.asked, self.before = numbers, [], {}

    def handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked.append(number)

    def arm(self) -> None:
        """Take the signals, again if another library has taken them since."""
        for which in self.numbers:
            if signal.getsignal(which) != self.handle:
                self.before.setdefault(which, signal.signal(which, self.handle))

    def reason(self) -> str:
        """Why the run should end, or "" if it should not."""
        return {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[self.asked[0]] if self.asked else ""


@contextlib.contextmanager
def interrupts_kept(saves: bool) -> Iterator[Interrupts]:
    """Ctrl-C ends the run between two dispatches, when the state is whole; a second Ctrl-C ends it at once.

    SIGTERM does the same if there is a run folder to save to; otherwise it ends the process, as usual.
    """
    here = threading.current_thread() is threading.main_thread()  # only the main thread may set handlers
    interrupts = Interrupts((signal.SIGINT, *([signal.SIGTERM] if saves else [])) if here else ())
    interrupts.arm()
    try:
        yield interrupts
    finally:
        for which, old in interrupts.before.items():
            signal.signal(which, old)
