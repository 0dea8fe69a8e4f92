"""What travels as bytes, and an error that says why something can't."""

from __future__ import annotations

import io
from typing import Any

from evoopt.distributed.ray.cluster import package
from evoopt.types import error


def pickled(content: Any, what: str) -> bytes:
    """The content as bytes.

    Raises:
        TypeError: it can't be pickled; the error calls it `what`, and names the innermost object that is the reason.
    """
    try:
        return package().cloudpickle.dumps(content)
    except Exception as reason:
        raise _unpicklable(content, what, reason) from None


def _unpicklable(content: Any, what: str, reason: Exception) -> Exception:
    from ray.util import inspect_serializability

    target = getattr(content, "oracle", content)
    found = ""
    try:
        _, failures = inspect_serializability(target, print_file=io.StringIO())
        names = [f"{'.'.join(f.path)} ({type(f.obj).__name__}), held by {f.parent!r}" for f in failures]
        found = "; ".join(sorted(names))
    except Exception:  # it only looks for a better sentence
        pass
    return error(
        f"{what} that can be pickled, to be sent to workers",
        f"{found or target!r} ({type(reason).__name__}: {reason})",
        "an open file, lock, window or simulator that it closes over: make it in the initializer, on the worker",
        TypeError,
    )
