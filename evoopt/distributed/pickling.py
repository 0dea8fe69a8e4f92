"""What travels to processes of this machine as bytes, and an error that says why something can't.

With cloudpickle, which Ray brings too, functions of a script or a notebook travel by value, and a worker needs no
script. Without it functions travel by name: a worker then runs the driver's script, as `multiprocessing` does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable
from typing import Any

from evoopt.types import error


@functools.cache
def by_value() -> Callable[[Any], bytes] | None:
    """cloudpickle's `dumps`, or None where neither it nor Ray is installed."""
    for name in ("cloudpickle", "ray.cloudpickle"):
        with contextlib.suppress(ImportError):
            if importlib.util.find_spec(name.partition(".")[0]):
                return importlib.import_module(name).dumps
    return None


def pickled(content: Any, what: str) -> bytes:
    """The content as bytes.

    Raises:
        TypeError: it can't be pickled; the error calls it `what`.

    >>> import threading
    >>> pickled(threading.Lock(), "the objective")
    Traceback (most recent call last):
        ...
    TypeError: expected the objective that can be pickled, to be sent to workers
    got <unlocked _thread.lock object at ...> (TypeError: cannot pickle '_thread.lock' object)
    usual cause: an open file, lock, window or simulator that it closes over: make it in the initializer, on the worker
    """
    target = getattr(content, "oracle", content)
    try:
        data = (by_value() or pickle.dumps)(content)
    except Exception as reason:
        cause = "an open file, lock, window or simulator that it closes over: make it in the initializer, on the worker"
        if by_value() is None:
            cause = (
                "a lambda, or a function defined in another function: define it at the top of a module, or "
                "`pip install cloudpickle`, which sends functions by value"
            )
        got = f"{repr(target)[:200]} ({type(reason).__name__}: {reason})"
        raise error(f"{what} that can be pickled, to be sent to workers", got, cause, TypeError) from None
    if by_value() is None and script() is None and b"__main__" in data:
        raise error(
            f"{what} from a module that workers can import",
            f"{repr(target)[:200]}, defined in a notebook or at a prompt",
            "no cloudpickle, which sends functions by value: `pip install cloudpickle`, or put it into a module",
            TypeError,
        )
    return data


def script() -> str | None:
    """The file of the program that runs, if it is one."""
    return getattr(sys.modules["__main__"], "__file__", None)
