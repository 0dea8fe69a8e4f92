"""What a worker's initializer made: the simulator or data set that an objective finds in its own worker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from evoopt.types import error

_HERE = threading.local()  # a worker is a thread of its own, or the main thread of its own process


def initialized() -> Any:
    """What this worker's initializer returned: `ProcessEvaluator(4, initializer=connect)`, `initialized()` in f.

    Raises:
        RuntimeError: no initializer was called here.

    >>> begin(lambda: {"simulator": "open"})
    >>> initialized()
    {'simulator': 'open'}
    >>> forget()
    """
    if not hasattr(_HERE, "made"):
        raise error(
            "a worker whose evaluator was given an initializer",
            f"a call in thread {threading.current_thread().name!r}, where none was called",
            "an evaluator without initializer=, or an objective that is called without an evaluator",
            RuntimeError,
        )
    return _HERE.made


def begin(initializer: Callable[[], Any] | None) -> None:
    """Call an initializer, and keep what it returns."""
    if initializer is not None:
        _HERE.made = initializer()


def forget() -> None:
    """Keep it no longer."""
    del _HERE.made
