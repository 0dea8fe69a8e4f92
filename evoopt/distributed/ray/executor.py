"""The evaluator's executor whose workers are Ray actors, one each."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evoopt.distributed.executor import Answered, Content, Joined, Left, Stalled
from evoopt.distributed.ray import actor
from evoopt.distributed.ray.cluster import CLUSTER, SLOT, package, room
from evoopt.distributed.ray.pickling import pickled
from evoopt.distributed.worker import Message, Reply
from evoopt.types import error

LOG = logging.getLogger("evoopt.distributed")
INLINE = 1 << 16  # bytes; a larger content goes through the object store, once for all workers
TEND_SECONDS = 1.0  # between two looks at whether there is room for more workers
FAILED_STARTS = 3  # in a row make an error if no worker ever started
GET_SECONDS = 10.0  # to fetch an answer that is ready; longer, its node hangs
STOPPED_SECONDS = 10.0  # that the system says of a worker's process that it is stopped, before others help
FREED_SECONDS = 10.0  # to wait for what ended workers held to be free again


class RayExecutor:
    """The actors of one evaluator. See `RayEvaluator` for the arguments."""

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        *,
        cpus: float = 1,
        gpus: float = 0,
        resources: dict[str, float] | None = None,
        environment: dict[str, str] | None = None,
        initializer: Callable[[], Any] | None = None,
        connect_timeout: float = 30.0,
        start_timeout: float = 120.0,
        object_store: int = 256 << 20,
        allow_network: bool = False,
    ) -> None:
        if workers is not None and workers < 1:
            raise error(
                "workers of at least 1, or None for as many as there is room for", str(workers), "a slipped sign"
            )
        self.workers, self.address = workers, address
        self.needs = {"CPU": cpus, "GPU": gpus, **(resources or {})}
        self._environment, self._initializer = environment or {}, initializer
        self._connect_timeout, self._start_timeout = connect_timeout, start_timeout
        self._object_store, self._allow_network = object_store, allow_network
        self._encoded: dict[str, tuple[bytes, Content]] = {}  # the last content of each kind, by its checksum
        self._processes: dict[str, int] = {}  # of workers on this machine
        self._stopped: dict[str, float] = {}  # since when the system says that they are stopped
        self._names = itertools.count()
        self._actors: dict[str, Any] = {}  # started or starting
        self._starting: dict[Any, tuple[str, float]] = {}  # reference -> worker, since when
        self._working: dict[Any, tuple[str, int]] = {}  # reference -> worker, ticket
        self._nodes: dict[str, str] = {}
        self._target = 0
        self._tended = -math.inf
        self._alone_since = 0.0
        self._failed_starts = 0
        self._joined_ever = False
        self._seconds = [0.0, 0]  # that calls took here, and how many

    # As evoopt.distributed.executor.Executor says ------------------------------------------------------------

    def start(self) -> None:
        """Connect, check that there is room, and get the actors going."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        if address is None:
            CLUSTER.start_here(self.workers, self.needs, self._object_store, self._allow_network)
        else:
            CLUSTER.connect(address, self._connect_timeout)
        CLUSTER.join(self)
        self._class = actor.remote(package())
        self._setup = actor.setup(pickled(self._initializer, "the initializer"))
        there = self._room_in_time()
        self._target = self.workers if self.workers is not None else there
        if there < self._target or there < 1:
            wanted = {k: v for k, v in self.needs.items() if v}
            every = f"{self._target} workers of {wanted} each" if self.workers else f"a worker of {wanted}"
            self.close()
            raise error(
                every,
                f"room for {there}: the nodes have {self._resources}",
                "fewer machines joined than were meant, or another job or evaluator holds them; workers=None takes "
                "what there is",
                RuntimeError,
            )
        self._alone_since = self.now()
        self._tend()

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def encode(self, content: Any, what: str) -> Content:
        """Pickled; large contents go to the object store once, and workers fetch them from there."""
        data = pickled(content, what)
        mark = hashlib.blake2b(data).digest()
        if what not in self._encoded or self._encoded[what][0] != mark:  # put into the store once
            payload = data if len(data) < INLINE else [package().put(data)]
            self._encoded[what] = mark, Content(payload, len(data))
        return self._encoded[what][1]

    @property
    def call_seconds(self) -> float:
        """The driver's mean time for a call, both ways."""
        total, calls = self._seconds
        return total / calls if calls >= 20 else 0.0

    def send(self, worker: str, number: int, message: Message) -> int:
        """One call of the worker's actor, which works on its calls in turn."""
        begun = time.perf_counter()
        contents = [content for _, _, content in message.parts]
        head = pickle.dumps(message._replace(parts=tuple((name, version, None) for name, version, _ in message.parts)))
        reference = self._actors[worker].evaluate.remote(head, contents)
        self._working[reference] = (worker, number)
        self._seconds[0] += time.perf_counter() - begun
        self._seconds[1] += 1
        return len(head)

    def poll(self, seconds: float) -> list[Any]:
        """Starts, answers and deaths; looks after replacements in between."""
        ray = package()
        if self.now() - self._tended >= TEND_SECONDS:
            self._tend()
        if CLUSTER.head is not None and CLUSTER.head.gone:
            raise error(
                f"the head of the Ray cluster at {CLUSTER.head.address}",
                "nobody listens there any more",
                "its machine or process ended; start it again, then continue the run: `evoopt resume RUN`",
                ConnectionError,
            )
        events: list[Any] = self._look_at_processes()
        references = [*self._starting, *self._working]
        if not references:
            time.sleep(min(seconds, TEND_SECONDS / 10))
            return events
        ready, rest = ray.wait(references, num_returns=1, timeout=min(seconds, TEND_SECONDS))
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        begun = time.perf_counter()
        for reference in ready:
            if reference in self._starting:
                events += self._started(reference)
            elif reference in self._working:
                events.append(self._answered(reference))
        self._seconds[0] += time.perf_counter() - begun
        return events

    def more(self) -> None:
        """One more worker, if there is room for it."""
        if CLUSTER.own is not None or self._room() > len(self._actors):
            self._target += 1
            self._tended = -math.inf

    def kill(self, worker: str) -> None:
        """Give an actor up, even if its node no longer answers, and start another."""
        ending = self._actors.get(worker)
        self._forget(worker)
        if ending is not None:
            with contextlib.suppress(Exception):  # it, or the head that would end it, may be gone already
                package().kill(ending, no_restart=True)
        self._tended = -math.inf

    def close(self) -> None:
        """End the actors, and the cluster if it was started here and nobody else uses it."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized() and not CLUSTER.lost:
            for worker in list(self._actors):
                self.kill(worker)
        if self in CLUSTER.users:
            CLUSTER.leave(self)

    # ------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        """What Ray is told of every actor."""
        passed = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))}
        if self.needs["GPU"]:
            passed.pop("JAX_PLATFORMS", None)
            # The driver, and other workers where a GPU is shared, need memory of it too.
            passed.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        else:
            passed["JAX_PLATFORMS"] = "cpu"  # Ray hides the GPUs from a worker that asked for none
        custom = {k: v for k, v in self.needs.items() if k not in ("CPU", "GPU")}
        cpus = self.needs["CPU"]
        if CLUSTER.own is not None:  # nobody else is on it: the cores are ours to share, also among evaluators
            cpus, custom = 0, {**custom, SLOT: 1.0}
        return {
            "num_cpus": cpus, "num_gpus": self.needs["GPU"], "resources": custom or None,
            "runtime_env": {"env_vars": {**passed, **self._environment}}, "max_restarts": 0, "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }  # fmt: skip

    def _room(self) -> int:
        """How many workers fit on the nodes that are alive, beside what others hold there."""
        return self._rooms()[0]

    def _rooms(self) -> tuple[int, int]:
        """How many workers fit beside what others hold, and how many would fit if these were gone."""
        there = room()
        if there is None:
            return 0, 0
        names = {k for k, v in self.needs.items() if v} | {"CPU", "GPU"}
        self._resources = [{k: node[k] for k in sorted(names) if k in node} for node in there.total.values()]
        # One that needs nothing takes a core in this count.
        needs = {k: v for k, v in self.needs.items() if v} or {"CPU": 1.0}
        if CLUSTER.own is not None:
            needs = {k: v for k, v in needs.items() if k != "CPU"}
            cores = int((os.cpu_count() or 1) / max(self.needs["CPU"], 1e-9)) if self.needs["CPU"] else 1
            if not needs:
                here = self.workers or max(1, cores)
                return here, here
        mine = sum(1 for worker in self._actors if self._nodes.get(worker))  # they hold what they need already
        return there.fits(needs) + mine, there.fits(needs, there.total)

    def _room_in_time(self) -> int:
        """The room there is; what another evaluator of ours held a moment ago is waited for."""
        begun, wanted = self.now(), self.workers or 1
        while True:
            free, total = self._rooms()
            if not free < wanted <= total or self.now() - begun > FREED_SECONDS:
                return free
            time.sleep(TEND_SECONDS / 5)

    def _tend(self) -> None:
        """Start actors where some are missing, give up starts that take too long."""
        self._tended = now = self.now()
        if self.workers is None and CLUSTER.own is None:
            self._target = max(1, self._room())
        for reference, (worker, since) in list(self._starting.items()):
            if now - since > self._start_timeout:
                LOG.warning("worker %s did not start within %g s, on a node that hangs or is full", worker, now - since)
                del self._starting[reference]
                self.kill(worker)
        while len(self._actors) < self._target:
            worker = f"w{next(self._names)}"
            started = self._actors[worker] = self._class.options(**self._options()).remote()
            self._starting[started.begin.remote(self._setup)] = (worker, now)
        if len(self._actors) > len(self._starting):
            self._alone_since = now
        elif now - self._alone_since > self._start_timeout:
            self._room()
            raise error(
                f"a worker of {self.needs} within {self._start_timeout:g} s",
                f"none started; the nodes have {self._resources}",
                "all nodes are lost, or other jobs hold what they have",
                RuntimeError,
            )

    def _started(self, reference: Any) -> list[Any]:
        worker, _ = self._starting.pop(reference)
        try:
            facts = package().get(reference, timeout=GET_SECONDS)
        except Exception as reason:
            self._start_failed(worker, "unknown", _first_line(reason))
            return []
        if facts["error"]:
            self._start_failed(worker, facts["node"], facts["error"])
            return []
        theirs, ours = facts["versions"], actor.versions()
        if theirs != ours:
            differ = {k: f"{theirs.get(k)} there, {ours[k]} here" for k in ours if theirs.get(k) != ours[k]}
            raise error(
                "the driver's versions on every worker, without which its numbers differ",
                f"worker {worker} on node {facts['node']}: {differ}",
                "an image or environment of another day",
                RuntimeError,
            )
        self._failed_starts, self._joined_ever = 0, True
        self._nodes[worker] = facts["node_id"]
        if facts["node"] == socket.gethostname():
            self._processes[worker] = facts["pid"]
        return [Joined(worker, facts)]

    def _start_failed(self, worker: str, node: str, text: str) -> None:
        LOG.warning("worker %s failed to start on node %s: %s", worker, node, text.strip().splitlines()[-1])
        self._failed_starts += 1
        self.kill(worker)
        if not self._joined_ever and self._failed_starts >= min(FAILED_STARTS, max(1, self._target)):
            raise error(
                "workers that start",
                f"worker {worker} on node {node} failed:\n{text.strip()}",
                "an initializer that fails there, or a package that is not installed there",
                RuntimeError,
            )
        self._tended = self.now() + TEND_SECONDS * (self._failed_starts - 1)  # the next try waits longer

    def _answered(self, reference: Any) -> Any:
        worker, number = self._working.pop(reference)
        try:
            data = package().get(reference, timeout=GET_SECONDS)
        except Exception as reason:
            event = without_answer(worker, number, reason)
            if isinstance(event, Left):
                self.kill(worker)  # it may live on where Ray only thinks that it is gone
            return event
        return Answered(worker, number, pickle.loads(data), len(data))

    def _look_at_processes(self) -> list[Any]:
        """The workers of this machine whose processes the system calls stopped."""
        events, now = [], self.now()
        for worker, pid in self._processes.items():
            if not _is_stopped(pid):
                self._stopped.pop(worker, None)
            elif now - self._stopped.setdefault(worker, now) >= STOPPED_SECONDS:
                self._stopped[worker] = now
                events.append(Stalled(worker, f"its process {pid} is stopped"))
        return events

    def _forget(self, worker: str) -> None:
        self._actors.pop(worker, None)
        for kept in (self._processes, self._stopped, self._nodes):
            kept.pop(worker, None)
        for references in (self._starting, self._working):
            for reference in [r for r, (name, _) in references.items() if name == worker]:
                del references[reference]


def without_answer(worker: str, number: int, reason: Exception) -> Any:
    """The event of a call that raised `reason`: its answer was lost on the way, or its worker died for any cause."""
    lost = package().exceptions
    if isinstance(reason, (lost.ObjectLostError, lost.GetTimeoutError)):  # as with the node that held it
        return Answered(worker, number, Reply(-1, -1, 0.0, refused=_first_line(reason)))
    node = any(words in str(reason) for words in ("node has died", "node was terminated", "node died"))
    return Left(worker, _first_line(reason), blame=not node)


def _first_line(reason: BaseException) -> str:
    lines = [line.strip() for line in str(reason).strip().splitlines() if line.strip()]
    cause = next(
        (line for line in lines if "because" in line or "exit type" in line.lower()), lines[0] if lines else ""
    )
    return f"{type(reason).__name__}: {cause.split(' Some common causes')[0][:300]}"


def _is_stopped(pid: int) -> bool:
    """Whether the system says of a process of this machine that it is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
