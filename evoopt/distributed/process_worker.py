"""What runs in a worker process of `ProcessEvaluator`.

Frames of bytes come and go over a socket. A thread reads them, so that the driver never waits for a worker that is
busy, and so that a worker ends at once, with all processes that it started, when its driver is gone.
"""

from __future__ import annotations

import atexit
import os
import pickle
import queue
import runpy
import signal
import socket
import struct
import sys
import threading
import time
import types
from typing import Any

from evoopt.distributed.ray.actor import Actor
from evoopt.run import cache
from evoopt.types import error

HEADER = struct.Struct("!Q")  # a frame's length
WATCH_SECONDS = 1.0  # between two looks at whether the driver lives
IN_SCRIPT = [False]  # whether the driver's script is being run here, for the functions in it


def refuse_in_script() -> None:
    """Raise if workers are asked for while a worker runs the driver's script."""
    if IN_SCRIPT[0]:
        raise error(
            'a script whose run is guarded by `if __name__ == "__main__":`',
            "workers asked for at its top level, where every worker would start workers",
            "no guard; or `pip install cloudpickle`, with which no worker needs the script",
            RuntimeError,
        )


def main(descriptor: int, driver: int) -> None:
    """Serve the driver, process `driver`, over a socket until it closes it."""
    os.set_inheritable(descriptor, False)  # a simulator must not hold it open
    wire = socket.socket(fileno=descriptor)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(wire, inbox), daemon=True).start()
    threading.Thread(target=_watch, args=(driver,), daemon=True).start()
    atexit.register(_end)  # first in, last out

    def send(*content: Any) -> None:
        data = pickle.dumps(content)
        wire.sendall(HEADER.pack(len(data)) + data)

    at = [0]  # the slice in hand

    def begins() -> None:
        """The first candidate of a slice is about to be evaluated."""
        if timed and at[0]:
            send("began", at[0])
            at[0] = 0

    script, timed, setup = pickle.loads(inbox.get())
    actor = Actor(lambda reference: reference, begins)
    cache.enable()
    failed = _run_script(script) if script else ""
    facts = {"node": socket.gethostname(), "pid": os.getpid(), "error": failed}
    send("joined", facts if failed else actor.begin(setup))
    while frame := inbox.get():
        at[0], head, contents = pickle.loads(frame)
        number = at[0]
        send("answered", number, actor.evaluate(head, contents))


def _read(wire: socket.socket, inbox: queue.SimpleQueue[bytes]) -> None:
    """Frames into the inbox; an empty one is the last. Without a driver there is nothing to do any more."""
    try:
        with wire.makefile("rb") as stream:
            while len(header := stream.read(HEADER.size)) == HEADER.size:
                inbox.put(stream.read(HEADER.unpack(header)[0]))
    except OSError:
        pass
    _end()


def _watch(driver: int) -> None:
    """End when the driver is gone, though somebody else holds its end of the socket."""
    while os.getppid() == driver:
        time.sleep(WATCH_SECONDS)
    _end()


def _end() -> None:
    """End this process and all that it started."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os.killpg(0, signal.SIGKILL)


def _run_script(path: str) -> str:
    """Make the functions of the driver's script known here; what went wrong, or ""."""
    import traceback

    IN_SCRIPT[0] = True
    try:
        module = types.ModuleType("__mp_main__")
        module.__dict__.update(runpy.run_path(path, run_name="__mp_main__"))
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    except BaseException:
        return traceback.format_exc()
    finally:
        IN_SCRIPT[0] = False
    return ""
