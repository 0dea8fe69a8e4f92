"""Workers as processes of this machine, by the standard library alone.

A worker is a fresh interpreter, never a fork, because forking conflicts with JAX's threads. It leads a process group of
its own: Ctrl-C in a terminal reaches the driver only, and a worker that is given up goes with all that it started.
`process_worker` is what runs in it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from evoopt.checks import check_popsize
from evoopt.distributed import initializers
from evoopt.distributed.evaluator import Evaluator
from evoopt.distributed.executor import Answered, Began, Content, Joined, Left
from evoopt.distributed.pickling import by_value, pickled, script
from evoopt.distributed.policy import Policy, timed
from evoopt.distributed.process_worker import HEADER, refuse_in_script
from evoopt.distributed.ray.actor import setup, versions
from evoopt.distributed.worker import Message
from evoopt.types import error

LOG = logging.getLogger("evoopt.distributed")
CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from evoopt.distributed.process_worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
FAILED_STARTS = 3  # in a row make an error if no worker ever started, ten times as many in any case
TEND_SECONDS = 0.5  # between two looks at whether processes live
END_SECONDS = 1.0  # to end by itself when it is told to; then it is killed
READ = 1 << 20  # bytes read at once


class ProcessExecutor:
    """The processes of one evaluator. See `ProcessEvaluator` for the arguments."""

    ready_made = True

    def __init__(
        self,
        workers: int,
        initializer: Callable[[], Any] | None = None,
        *,
        timed: bool = False,
        environment: dict[str, str] | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        check_popsize(workers, 1, name="workers")
        self.workers, self._initializer, self._timed = workers, initializer, timed
        self._environment, self._start_timeout = environment or {}, start_timeout
        self._names = itertools.count()
        self._processes: dict[str, Process] = {}
        self._selector = selectors.DefaultSelector()
        self._tended, self._failed_starts, self._joined_ever = 0.0, 0, False
        self._start_after = 0.0
        # What is not closed ends with the program, or when nobody can use it any more.
        self._finalizer = weakref.finalize(self, _end_all, self._processes, os.getpid())

    # As evoopt.distributed.executor.Executor says ------------------------------------------------------------

    def start(self) -> None:
        """Get the processes going."""
        refuse_in_script()
        started = pickled(partial(initializers.begin, self._initializer), "the initializer")
        self._setup = pickle.dumps((None if by_value() else script(), self._timed, setup(started)))
        self._tend()

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def encode(self, content: Any, what: str) -> Content:
        """Pickled."""
        data = pickled(content, what)
        return Content(data, len(data))

    def send(self, worker: str, number: int, message: Message) -> int:
        """Queue a slice; what the socket has no room for now goes when it has."""
        contents = [content for _, _, content in message.parts]
        head = pickle.dumps(message._replace(parts=tuple((name, version, None) for name, version, _ in message.parts)))
        process = self._processes[worker]
        process.send(pickle.dumps((number, head, contents)))
        self._listen(worker, process)
        return len(head)

    def poll(self, seconds: float) -> list[Any]:
        """Starts, answers and deaths; starts replacements in between."""
        events: list[Any] = []
        if self.now() - self._tended >= TEND_SECONDS:
            events += self._tend()
        for key, mask in self._selector.select(0.0 if events else max(0.0, min(seconds, TEND_SECONDS))):
            worker, process = key.data, self._processes.get(key.data)
            if process is None:
                continue
            if mask & selectors.EVENT_WRITE:
                process.flush()
                self._listen(worker, process)
            if mask & selectors.EVENT_READ:
                alive = process.read()
                for frame in process.frames():
                    events += self._received(worker, process, frame)
                if not alive and worker in self._processes:
                    events += self._died(worker)
        return events

    def kill(self, worker: str) -> None:
        """End a process and all that it started, and start another one."""
        if process := self._forget(worker):
            process.end()
        self._tended = 0.0

    def close(self) -> None:
        """End all processes: those that are idle by themselves, the others after a second."""
        for worker in list(self._processes):
            self._selector.unregister(self._processes[worker].wire)
        _end_all(self._processes, os.getpid())

    # ------------------------------------------------------------

    def _start(self) -> None:
        worker = f"w{next(self._names)}"
        process = self._processes[worker] = Process({**self._variables(), **self._environment}, self.now())
        process.send(self._setup)
        self._selector.register(process.wire, selectors.EVENT_READ, worker)
        self._listen(worker, process)

    def _variables(self) -> dict[str, str]:
        """The driver's, for processes that share a machine: each its part of the cores, and no GPU unless told."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        part = str(max(1, cores // self.workers))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), part)
        return {**threads, **os.environ, "JAX_PLATFORMS": "cpu"}

    def _listen(self, worker: str, process: Process) -> None:
        """Have the selector wait for room in the socket where something is to go."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.outgoing else 0)
        self._selector.modify(process.wire, events, worker)

    def _tend(self) -> list[Any]:
        """The deaths that the socket does not show; processes where some are missing."""
        self._tended = now = self.now()
        events: list[Any] = []
        for worker, process in list(self._processes.items()):
            if not process.joined and now - process.since > self._start_timeout:
                self._start_failed(worker, f"not ready within {self._start_timeout:g} s")
            elif process.popen.poll() is not None and not process.readable():
                events += self._died(worker)
        if now >= self._start_after:
            while len(self._processes) < self.workers:
                self._start()
        return events

    def _received(self, worker: str, process: Process, frame: bytes) -> list[Any]:
        kind, *rest = pickle.loads(frame)
        if kind == "began":
            return [Began(worker, *rest)]
        if kind == "answered":
            number, reply = rest
            return [Answered(worker, number, pickle.loads(reply), len(frame))]
        (facts,) = rest
        if not facts["error"] and facts["versions"] != versions():
            facts["error"] = f"other versions than the driver's: {facts['versions']}, {versions()} there"
        if facts["error"]:
            self._start_failed(worker, facts["error"])
            return []
        process.joined, self._joined_ever, self._failed_starts = True, True, 0
        return [Joined(worker, facts)]

    def _died(self, worker: str) -> list[Any]:
        process = self._processes[worker]
        reason = process.end()
        if not process.joined:
            self._start_failed(worker, f"its process {reason}")
            return []
        self._forget(worker)
        self._tended = 0.0
        return [Left(worker, f"its process {reason}")]

    def _start_failed(self, worker: str, text: str) -> None:
        self.kill(worker)
        self._failed_starts += 1
        most = min(FAILED_STARTS, self.workers) if not self._joined_ever else 10 * FAILED_STARTS
        if self._failed_starts >= most:
            raise error(
                "worker processes that start",
                f"worker {worker} failed:\n{text.strip()}",
                "an initializer that fails there, a module that it can't import, or too little memory",
                RuntimeError,
            )
        LOG.warning("worker %s failed to start: %s", worker, text.strip().splitlines()[-1])
        self._start_after = self.now() + TEND_SECONDS * self._failed_starts  # the next try waits longer

    def _forget(self, worker: str) -> Process | None:
        process = self._processes.pop(worker, None)
        if process is not None:
            self._selector.unregister(process.wire)
        return process


class Process:
    """A worker's process and our end of its socket, which never makes us wait."""

    def __init__(self, environment: dict[str, str], now: float) -> None:
        self.since, self.joined = now, False
        self.outgoing, self._incoming = bytearray(), bytearray()
        self.wire, theirs = socket.socketpair()
        self.wire.setblocking(False)
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps([os.path.abspath(p) for p in sys.path])]
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", CODE, *arguments],
                env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        finally:
            theirs.close()

    def send(self, frame: bytes) -> None:
        """A frame goes as far as it can now, the rest by `flush`."""
        self.outgoing += HEADER.pack(len(frame)) + frame
        self.flush()

    def flush(self) -> None:
        """Send what the socket has room for. A process that is gone is noticed by reading."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self.outgoing:
                del self.outgoing[: self.wire.send(self.outgoing)]
            return
        if self.popen.poll() is not None:
            self.outgoing.clear()

    def read(self) -> bool:
        """Take what has come; False if nothing will come any more."""
        try:
            while data := self.wire.recv(READ):
                self._incoming += data
                if len(data) < READ:
                    return True
            return False
        except BlockingIOError:
            return True
        except ConnectionError:
            return False

    def readable(self) -> bool:
        """Whether something has come that was not read."""
        try:
            return bool(self.wire.recv(1, socket.MSG_PEEK))
        except (BlockingIOError, ConnectionError):
            return False

    def frames(self) -> list[bytes]:
        """The whole frames that have come."""
        frames = []
        while len(self._incoming) >= HEADER.size:
            (size,) = HEADER.unpack(self._incoming[: HEADER.size])
            if len(self._incoming) < HEADER.size + size:
                break
            frames.append(bytes(self._incoming[HEADER.size : HEADER.size + size]))
            del self._incoming[: HEADER.size + size]
        return frames

    def end(self) -> str:
        """Kill it with all that it started, and say how it ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.popen.returncode is None:  # its number is still its own
                status = self._status()
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()
                self.wire.close()
                return status
        self.popen.wait()
        self.wire.close()
        return _said(self.popen.returncode or 0)

    def _status(self) -> str:
        """How it ended by itself, if it did; it stays a zombie, whose number and group nobody else gets."""
        ended = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return "was ended"
        return _said(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


def _said(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _end_all(processes: dict[str, Process], owner: int) -> None:
    """End processes; a fork of their driver leaves them alone."""
    if os.getpid() != owner:
        return
    for process in processes.values():
        with contextlib.suppress(OSError):
            process.send(b"")
    until = time.monotonic() + END_SECONDS
    for process in processes.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.joined and not process.outgoing:
                process.popen.wait(max(0.0, until - time.monotonic()))
        process.end()
    processes.clear()


def ProcessEvaluator(  # noqa: N802  (a recipe that reads like the class it makes)
    workers: int,
    initializer: Callable[[], Any] | None = None,
    timeout: float | None = None,
    *,
    policy: Policy | None = None,
    batch_size: int | None = None,
    replicate: bool | None = None,
    raise_errors: bool = False,
    environment: dict[str, str] | None = None,
    start_timeout: float = 120.0,
) -> Evaluator:
    """An `Evaluator` whose workers are processes of this machine: no cluster, no package besides.

        with ProcessEvaluator(4) as evaluate:
            result = minimize(f, x0, cma_es(), evaluations=1000, jit=False, evaluator=evaluate)

    The result has the same bits as without it. A process that dies is replaced; a candidate that kills its process
    `policy.deaths` times has no value (NaN) and is named in the log. Nothing is left behind after Ctrl-C, nor if this
    program is killed. No `if __name__ == "__main__":` is needed where cloudpickle is installed (Ray brings it); without
    it the objective is a function of a module or of a script with that guard.

    Args:
        workers: how many processes. Each takes a second or two to start, and 200 MB.
        initializer: called once in each worker before it evaluates, to open a simulator or load data. The objective
            finds what it returned by `evoopt.distributed.initialized()`.
        timeout: seconds that a candidate may take. Then its process is killed with all that it started, and replaced;
            its value is NaN, and the log names it. Loading does not count, compilation neither (see `Policy`). With it,
            candidates are given out one at a time, and to one worker only, unless a policy says otherwise.
        policy: how a generation is cut, and when patience ends.
        batch_size, replicate, raise_errors: see `Evaluator`.
        environment: variables of the processes, besides the driver's. By default JAX_PLATFORMS=cpu, and where they are
            not set OMP_NUM_THREADS, OPENBLAS_NUM_THREADS and MKL_NUM_THREADS, so that each has its part of the cores.
            (BLAS rounds sums of more than some 10,000 terms differently with another number of threads.)
        start_timeout: seconds until a process that is not ready is given up.

    Raises (at the first evaluation):
        RuntimeError: processes that do not start, or whose initializer raises.
        TypeError: an objective that cannot be pickled.
    """
    policy = timed(policy, timeout)
    executor = ProcessExecutor(
        workers, initializer, timed=policy.timeout is not None, environment=environment, start_timeout=start_timeout
    )
    return Evaluator(executor, policy, batch_size=batch_size, replicate=replicate, raise_errors=raise_errors)
