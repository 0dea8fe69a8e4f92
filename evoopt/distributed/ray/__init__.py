"""Workers as long-lived Ray actors, on this machine or on a cluster.

One actor a worker, and the driver's own deadlines and resubmission: plain Ray tasks hang for as long as a hung node
does (measured with Ray 2.60: minutes, also for fresh tasks), actors elsewhere go on. Ray is asked for processes, for
carrying bytes, and whether a process is dead; what is evaluated where, and again, is decided by
`evoopt.distributed.scheduler`.

A cluster that is started here listens on loopback only, asks for a token, shows no dashboard and reports no usage.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import itertools
import math
import os
import pickle
import platform
import queue
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax

from evoopt.distributed.evaluator import Answered, Content, Evaluator, Joined, Left, Stalled
from evoopt.distributed.jobs import LOG
from evoopt.distributed.policy import Policy
from evoopt.distributed.worker import Message, Reply
from evoopt.population import Population
from evoopt.run.checkpoint import versions
from evoopt.types import Answers, error

INLINE = 1 << 16  # bytes from which a content goes through the object store, once for all workers
TEND_SECONDS = 1.0  # between two looks at whether there is room for more workers
FAILED_STARTS = 3  # in a row, after which a failing start is an error if no worker ever started
GET_SECONDS = 10.0  # to fetch an answer that is ready; longer, its node hangs
STOPPED_SECONDS = 10.0  # that the system says of a worker's process that it is stopped, before others help
HEAD_SECONDS = 3.0  # between two looks at whether the head of the cluster is there
SLOT = "evoopt_worker"  # what workers take of a cluster that was started here: it has as many as one likes
# Switches that Ray reads when it is imported. The first keeps every port on 127.0.0.1: what its name says is one side
# of "no cluster of several machines here", and the only switch that does it (a test looks at the ports).
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CONFIG = (  # of JAX, that the numbers depend on
    "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_default_matmul_precision",
    "jax_default_prng_impl", "jax_threefry_partitionable",
)  # fmt: skip


@functools.cache  # Ray reads it once a process
def _token() -> str:
    """A file with a new token, that only this user can read and that goes when the process ends."""
    folder = _folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return str(path)


def _folder() -> str:
    """A new folder with a short name, for sockets; those of processes that were killed go."""
    root = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    for old in root.glob("ev[0-9]*-*"):
        pid = old.name[2:].split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"ev{os.getpid()}-", dir=root)


class _Cluster:
    """The one cluster that this process is connected to, and the executors that use it."""

    users: ClassVar[set[RayExecutor]] = set()
    owned = False  # connected by us, so it is for us to disconnect
    own: Path | None = None  # the folder of a cluster that was started here
    head: _Head | None = None

    @classmethod
    def leave(cls, executor: RayExecutor) -> None:
        """The last to leave turns off the lights."""
        cls.users.discard(executor)
        if cls.users:
            return
        if cls.head is not None:
            cls.head.stop()
            cls.head = None
        if cls.owned:
            cls.owned = False
            _ray().shutdown()
        if cls.own is not None:
            shutil.rmtree(cls.own, ignore_errors=True)
            cls.own = None

    @classmethod
    def close(cls) -> None:
        for executor in list(cls.users):
            executor.close()


atexit.register(_Cluster.close)  # before Ray's own, which would leave our folder


class _Head:
    """Asks now and then whether the cluster's head still listens: without it, Ray ends this process after a minute."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address, self._at, self.gone = address, (host, int(port)), False
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="evoopt-head", daemon=True).start()

    def _watch(self) -> None:
        refused = 0
        while not self._stopped.wait(HEAD_SECONDS):
            try:
                socket.create_connection(self._at, timeout=10).close()
                refused = 0
            except ConnectionRefusedError:  # the system's word: nobody listens there any more
                refused += 1
            except OSError:
                pass  # a slow network is no death
            self.gone = refused >= 2

    def stop(self) -> None:
        self._stopped.set()


def _ray() -> Any:
    """The package `ray`, imported at the last moment, so that its switches can be set before."""
    try:
        import ray
    except ImportError as reason:
        cause = "an installation without it: pip install 'evoopt-jax[ray]'"
        raise error(
            "the package ray (2.54 or newer), to evaluate on several workers", str(reason), cause, ImportError
        ) from None
    return ray


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

    # As evoopt.distributed.evaluator.Executor says ------------------------------------------------------------

    def start(self) -> None:
        """Connect, check that there is room, and get the actors going."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        if address is None:
            self._start_here()
        else:
            self._connect(address)
        _Cluster.users.add(self)
        if _Cluster.head is None and (where := _head_address()):
            _Cluster.head = _Head(where)
        self._class = _actor_class()
        self._setup = self._made_setup()
        there = self._room()
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
        ray = _ray()
        try:
            data = ray.cloudpickle.dumps(content)
        except Exception as reason:
            raise _unpicklable(content, what, reason) from None
        mark = hashlib.blake2b(data).digest()
        if what not in self._encoded or self._encoded[what][0] != mark:  # put into the store once
            self._encoded[what] = mark, Content(data if len(data) < INLINE else [ray.put(data)], len(data))
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
        ray = _ray()
        if self.now() - self._tended >= TEND_SECONDS:
            self._tend()
        if _Cluster.head is not None and _Cluster.head.gone:
            raise error(
                f"the head of the Ray cluster at {_Cluster.head.address}",
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
                events += self._answered(reference)
        self._seconds[0] += time.perf_counter() - begun
        return events

    def more(self) -> None:
        """One more worker, if there is room for it."""
        if _Cluster.own is not None or self._room() > len(self._actors):
            self._target += 1
            self._tended = -math.inf

    def _look_at_processes(self) -> list[Any]:
        """The workers of this machine whose processes are stopped, by the system's word."""
        events, now = [], self.now()
        for worker, pid in self._processes.items():
            if not _is_stopped(pid):
                self._stopped.pop(worker, None)
            elif now - self._stopped.setdefault(worker, now) >= STOPPED_SECONDS:
                self._stopped[worker] = now
                events.append(Stalled(worker, f"its process {pid} is stopped"))
        return events

    def kill(self, worker: str) -> None:
        """Give an actor up, also where its node no longer answers, and start another."""
        actor = self._actors.get(worker)
        self._forget(worker)
        if actor is not None:
            with contextlib.suppress(Exception):  # it, or the head that would end it, may be gone already
                _ray().kill(actor, no_restart=True)
        self._tended = -math.inf

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized() and not (_Cluster.head is not None and _Cluster.head.gone):
            for worker, actor in list(self._actors.items()):
                self._forget(worker)
                with contextlib.suppress(Exception):  # it may be gone already
                    ray.kill(actor, no_restart=True)
        if self in _Cluster.users:
            _Cluster.leave(self)

    # ------------------------------------------------------------

    def _start_here(self) -> None:
        imported = sys.modules.get("ray") is not None
        if imported and sys.modules["ray"].is_initialized():
            if not _Cluster.owned and not self._allow_network:
                self._check_loopback()
            return
        late = {k: v for k, v in LOCAL_ENVIRONMENT.items() if imported and os.environ.get(k) != v}
        if late and not self._allow_network:  # half a switch would be worse than none
            text = " ".join(f"{k}={v}" for k, v in late.items())
            raise error(
                "Ray on 127.0.0.1 alone, with a token: its switches are read when it is imported",
                f"ray was imported before, without {text}",
                "`import ray` above the evaluator: leave it out, set these variables before Python starts, or say "
                "allow_network=True",
                RuntimeError,
            )
        if not late:
            for name, value in LOCAL_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        _Cluster.own = Path(_folder())
        if not late and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN_PATH"] = _token()
        ray = _ray()
        cores = os.cpu_count() or 1
        wanted = math.ceil((self.workers or max(1, int(cores / max(self.needs["CPU"], 1e-9)))) * self.needs["CPU"])
        custom = {k: v * (self.workers or 1) for k, v in self.needs.items() if k not in ("CPU", "GPU")}
        with warnings.catch_warnings(), _handlers_kept():  # Ray forks only to start other programs
            warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
            try:
                ray.init(
                    num_cpus=max(1, wanted), resources={**custom, SLOT: 1e6}, include_dashboard=False,
                    log_to_driver=False, logging_level="critical", object_store_memory=self._object_store,
                    _temp_dir=str(_Cluster.own / "r"),
                )  # fmt: skip
            except BaseException:  # nobody uses what did not start, so nobody would remove its folder
                shutil.rmtree(_Cluster.own, ignore_errors=True)
                _Cluster.own = None
                raise
        _Cluster.owned = True

    def _check_loopback(self) -> None:
        """Raise for a Ray that was started before, on an address that others can reach."""
        there = _ray().util.get_node_ip_address()
        if not there.startswith("127."):
            raise error(
                "Ray on 127.0.0.1 alone",
                f"a Ray that was started before, on {there}",
                "ray.init() above the evaluator: leave it out, or say allow_network=True",
                RuntimeError,
            )

    def _connect(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and not address.startswith("ray://"):
            try:
                socket.create_connection((host, int(port)), timeout=self._connect_timeout).close()
            except OSError as reason:
                raise error(
                    f"a Ray cluster at {address}",
                    f"{reason} (waited at most {self._connect_timeout:g} s)",
                    "its head is not started (`ray start --head`), another port, or a firewall in between",
                    ConnectionError,
                ) from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray = _ray()
        if ray.is_initialized():
            return
        try:
            with _handlers_kept():
                ray.init(address=address, log_to_driver=False, logging_level="critical")
        except Exception as reason:
            raise error(
                f"a Ray cluster at {address}, of this Python and Ray",
                f"{type(reason).__name__}: {reason}",
                "no cluster is running there, versions that differ, or a token that is missing (RAY_AUTH_MODE=token)",
                ConnectionError,
            ) from reason
        _Cluster.owned = True

    def _made_setup(self) -> bytes:
        try:
            initializer = _ray().cloudpickle.dumps(self._initializer)
        except Exception as reason:
            raise _unpicklable(self._initializer, "the initializer", reason) from None
        config = {name: getattr(jax.config, name) for name in CONFIG if hasattr(jax.config, name)}
        return pickle.dumps((config, initializer, _versions()))

    def _options(self) -> dict[str, Any]:
        passed = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))}
        if self.needs["GPU"]:
            passed.pop("JAX_PLATFORMS", None)
            # The driver, and other workers where a GPU is shared, need memory of it too.
            passed.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        else:
            passed["JAX_PLATFORMS"] = "cpu"  # Ray hides the GPUs from a worker that asked for none
        custom = {k: v for k, v in self.needs.items() if k not in ("CPU", "GPU")}
        cpus = self.needs["CPU"]
        if _Cluster.own is not None:  # nobody else is on it: the cores are ours to share, also among evaluators
            cpus, custom = 0, {**custom, SLOT: 1.0}
        return {
            "num_cpus": cpus, "num_gpus": self.needs["GPU"], "resources": custom or None,
            "runtime_env": {"env_vars": {**passed, **self._environment}}, "max_restarts": 0, "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }  # fmt: skip

    def _room(self) -> int:
        """How many workers fit, besides those that others have, on the nodes that are alive."""
        nodes = _in_time(_ray().nodes, GET_SECONDS)
        if nodes is None:
            return 0
        alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
        free = _in_time(_available, GET_SECONDS) or {}
        names = {k for k, v in self.needs.items() if v} | {"CPU", "GPU"}
        self._resources = [{k: node[k] for k in sorted(names) if k in node} for node in alive.values()]
        # One that needs nothing takes a core in this count.
        needs = {k: v for k, v in self.needs.items() if v} or {"CPU": 1.0}
        if _Cluster.own is not None:
            needs = {k: v for k, v in needs.items() if k != "CPU"}
            cores = int((os.cpu_count() or 1) / max(self.needs["CPU"], 1e-9)) if self.needs["CPU"] else 1
            if not needs:
                return self.workers or max(1, cores)
        fit = lambda node: min(int(node.get(k, 0) / v + 1e-9) for k, v in needs.items())
        mine = sum(1 for worker in self._actors if self._nodes.get(worker))  # they hold what they need already
        return sum(fit(free.get(name, node)) for name, node in alive.items()) + mine

    def _tend(self) -> None:
        """Start actors where some are missing, give up starts that take too long."""
        self._tended = now = self.now()
        if self.workers is None and _Cluster.own is None:
            self._target = max(1, self._room())
        for reference, (worker, since) in list(self._starting.items()):
            if now - since > self._start_timeout:
                LOG.warning("worker %s did not start within %g s, on a node that hangs or is full", worker, now - since)
                del self._starting[reference]
                self.kill(worker)
        while len(self._actors) < self._target:
            worker = f"w{next(self._names)}"
            actor = self._actors[worker] = self._class.options(**self._options()).remote()
            self._starting[actor.begin.remote(self._setup)] = (worker, now)
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
            facts = _ray().get(reference, timeout=GET_SECONDS)
        except Exception as reason:
            self._start_failed(worker, "unknown", _first_line(reason))
            return []
        if facts["error"]:
            self._start_failed(worker, facts["node"], facts["error"])
            return []
        theirs, ours = facts["versions"], _versions()
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

    def _answered(self, reference: Any) -> list[Any]:
        ray = _ray()
        worker, number = self._working.pop(reference)
        try:
            data = ray.get(reference, timeout=GET_SECONDS)
        except Exception as reason:
            return self._failed_call(worker, number, reason)
        return [Answered(worker, number, pickle.loads(data), len(data))]

    def _failed_call(self, worker: str, number: int, reason: Exception) -> list[Any]:
        """A call that gave no answer: the answer was lost on its way, or the worker is gone, of whatever it died."""
        lost = _ray().exceptions
        if isinstance(reason, (lost.ObjectLostError, lost.GetTimeoutError)):  # as with the node that held it
            return [Answered(worker, number, Reply(-1, -1, 0.0, refused=_first_line(reason)))]
        actor = self._actors.get(worker)
        self._forget(worker)
        if actor is not None:  # it may live on where Ray only thinks that it is gone
            with contextlib.suppress(Exception):
                _ray().kill(actor, no_restart=True)
        self._tended = -math.inf
        node = any(words in str(reason) for words in ("node has died", "node was terminated", "node died"))
        return [Left(worker, _first_line(reason), blame=not node)]

    def _forget(self, worker: str) -> None:
        self._actors.pop(worker, None)
        for kept in (self._processes, self._stopped, self._nodes):
            kept.pop(worker, None)
        for references in (self._starting, self._working):
            for reference in [r for r, (name, _) in references.items() if name == worker]:
                del references[reference]


def _actor_class() -> Any:
    """The actor, defined in here so that it travels by value and imports nothing before its environment is set."""

    class EvooptWorker:
        def begin(self, setup: bytes) -> dict[str, Any]:
            import os
            import pickle
            import socket
            import traceback

            import ray

            context = ray.get_runtime_context()
            facts = {
                "node": socket.gethostname(), "pid": os.getpid(), "node_id": context.get_node_id(),
                "gpus": ray.get_gpu_ids(), "error": "", "versions": {},
            }  # fmt: skip
            try:
                config, initializer, expected = pickle.loads(setup)
                import jax

                for name, value in config.items():
                    jax.config.update(name, value)
                from evoopt.distributed.ray import _versions
                from evoopt.distributed.worker import Worker

                facts["versions"] = _versions()
                if facts["versions"] == expected and (initialize := pickle.loads(initializer)) is not None:
                    initialize()
                self.worker = Worker()
            except BaseException:
                facts["error"] = traceback.format_exc()
            return facts

        def evaluate(self, head: bytes, contents: list) -> bytes:
            import pickle
            import traceback

            import ray

            message = pickle.loads(head)
            try:
                parts = []
                for (name, version, _), content in zip(message.parts, contents, strict=True):
                    data: Any = ray.get(content[0]) if isinstance(content, list) else content
                    parts.append((name, version, pickle.loads(data)))
                return pickle.dumps(self.worker.evaluate(message._replace(parts=tuple(parts))))
            except BaseException:  # also what an argument raises while it is unpickled
                from evoopt.distributed.worker import Reply

                return pickle.dumps(Reply(message.start, message.stop, 0.0, error=traceback.format_exc()))

    return _ray().remote(EvooptWorker)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts, and would end the process where a run wants to save."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if here else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """`ask()`, or None where it raises or takes too long: without a head, Ray's calls hang."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def asked() -> None:
        try:
            found.put(ask())
        except Exception:
            found.put(None)

    threading.Thread(target=asked, name="evoopt-ask", daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return None


def _available() -> dict[str, dict[str, float]]:
    """What is free on each node."""
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()


def _head_address() -> str | None:
    address = getattr(_ray().get_runtime_context(), "gcs_address", "")
    return address if address.rpartition(":")[2].isdigit() else None


def _is_stopped(pid: int) -> bool:
    """Whether the system says of a process of this machine that it is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def _versions() -> dict[str, str]:
    """What must be the same on driver and workers."""
    import jaxlib

    return {**versions(), "jaxlib": jaxlib.__version__, "python": platform.python_version()}


def _first_line(reason: BaseException) -> str:
    lines = [line.strip() for line in str(reason).strip().splitlines() if line.strip()]
    cause = next(
        (line for line in lines if "because" in line or "exit type" in line.lower()), lines[0] if lines else ""
    )
    return f"{type(reason).__name__}: {cause.split(' Some common causes')[0][:300]}"


def _unpicklable(content: Any, what: str, reason: Exception) -> Exception:
    """The error for something that can't travel, with the innermost object that can't."""
    import io

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


def RayEvaluator(  # noqa: N802  (a recipe that reads like the class it makes)
    workers: int | None = None,
    address: str | None = None,
    *,
    batch_size: int | None = None,
    mode: str = "auto",
    errors: str = "nan",
    policy: Policy | None = None,
    cpus: float = 1,
    gpus: float = 0,
    resources: dict[str, float] | None = None,
    environment: dict[str, str] | None = None,
    initializer: Callable[[], Any] | None = None,
    connect_timeout: float = 30.0,
    start_timeout: float = 120.0,
    object_store: int = 256 << 20,
    allow_network: bool = False,
) -> Evaluator:
    """An `Evaluator` whose workers are Ray actors: `evaluate(population, oracle)` in the place of `population.map`.

        with RayEvaluator(workers=8, batch_size=16) as evaluate:
            ...
            answers = evaluate(population, strategy.oracle(objective))

    Args:
        workers: how many. None: as many as there is room for, and more when nodes join.
        address: of a running cluster, `host:port` or `auto`. None: RAY_ADDRESS, else one is started on this machine.
        batch_size: candidates a worker evaluates at once; None evaluates one at a time.
        mode: what travels: `candidates`, `replicas`, or `auto`. See `Evaluator`.
        errors: what becomes of an evaluation that raises: `nan` or `raise`. See `Evaluator`.
        policy: slices, stragglers, deadlines: `evoopt.distributed.Policy`.
        cpus, gpus, resources: what each worker takes; a worker sees only its own GPUs.
        environment: variables of the workers' processes. JAX_* and XLA_* of the driver are passed on; a worker without
            a GPU is told JAX_PLATFORMS=cpu, one with a GPU XLA_PYTHON_CLIENT_PREALLOCATE=false.
        initializer: called once on each worker before it evaluates: data sets, simulators.
        connect_timeout: seconds until an address that does not answer is an error.
        start_timeout: seconds without any worker until that is an error.
        object_store: bytes of shared memory, of a cluster started here.
        allow_network: use a Ray that was started before on an address that others can reach, or that is started here
            although `import ray` came too early to keep its ports on 127.0.0.1.

    Several evaluators of a process share one cluster; the last one that is closed ends it. What is not closed is closed
    when the process ends. What an objective prints goes to the worker's log in Ray's folder.

    Raises (at the first evaluation):
        ImportError: Ray is not installed.
        ConnectionError: nobody answers at the address.
        RuntimeError: fewer resources than asked for; workers that do not start; versions that differ.
        TypeError: an objective that cannot be pickled, and which object it is.
    """
    executor = RayExecutor(
        workers, address,
        cpus=cpus, gpus=gpus, resources=resources, environment=environment, initializer=initializer,
        connect_timeout=connect_timeout, start_timeout=start_timeout, object_store=object_store,
        allow_network=allow_network,
    )  # fmt: skip
    return Evaluator(executor, policy, batch_size=batch_size, mode=mode, errors=errors)


_SHARED: dict[tuple[int | None, str | None], Evaluator] = {}


def ray_map(
    population: Population,
    oracle: Callable[..., Any],
    *args: Any,
    each: Any = None,
    batch_size: int | None = None,
    jit: bool = True,
    workers: int | None = None,
    address: str | None = None,
) -> Answers:
    """`population.map(oracle, *args, each=each, batch_size=batch_size)` by Ray workers that stay for the next call.

    For resources, deadlines or replicas make a `RayEvaluator`.
    """
    evaluator = _SHARED.setdefault((workers, address), RayEvaluator(workers, address))
    return evaluator(population, oracle, *args, each=each, batch_size=batch_size, jit=jit)
