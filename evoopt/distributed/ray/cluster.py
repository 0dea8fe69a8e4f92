"""The Ray cluster that this process is connected to: started here or found, watched, and ended by its last user.

A cluster that is started here listens on loopback only, asks for a token, shows no dashboard and reports no usage.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import queue
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evoopt.types import error

HEAD_SECONDS = 3.0  # between two looks at whether the head of the cluster is there
ASK_SECONDS = 10.0  # for a question to the cluster; without a head, Ray's calls hang
SLOT = "evoopt_worker"  # what workers take of a cluster that was started here: it has as many as one likes
# Switches that Ray reads when it is imported. The first keeps every port on 127.0.0.1: what its name says is one side
# of "no cluster of several machines here", and the only switch that does it (a test looks at the ports).
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def package() -> Any:
    """The package `ray`, imported at the last moment, so that its switches can be set before."""
    try:
        import ray
    except ImportError as reason:
        cause = "an installation without it: pip install 'evoopt-jax[ray]'"
        raise error(
            "the package ray (2.54 or newer), to evaluate on several workers", str(reason), cause, ImportError
        ) from None
    return ray


class User(Protocol):
    """Whoever has workers on the cluster."""

    def close(self) -> None:
        """End them, and leave the cluster."""
        ...


class Cluster:
    """What this process is connected to, and who uses it. A process has one: `CLUSTER`."""

    def __init__(self) -> None:
        self.users: set[User] = set()
        self.owned = False  # connected by us, so it is for us to disconnect
        self.own: Path | None = None  # the folder of a cluster that was started here
        self.head: Head | None = None

    def join(self, user: User) -> None:
        """One more user; from now on the head is watched."""
        self.users.add(user)
        if self.head is None and (address := _head_address()):
            self.head = Head(address)

    def leave(self, user: User) -> None:
        """One user less; the last one disconnects, and ends a cluster that was started here."""
        self.users.discard(user)
        if self.users:
            return
        if self.head is not None:
            self.head.stop()
            self.head = None
        if self.owned:
            self.owned = False
            package().shutdown()
        if self.own is not None:
            shutil.rmtree(self.own, ignore_errors=True)
            self.own = None

    def close(self) -> None:
        """End all users."""
        for user in list(self.users):
            user.close()

    @property
    def lost(self) -> bool:
        """Whether nobody listens any more where the head was."""
        return self.head is not None and self.head.gone

    def connect(self, address: str, timeout: float) -> None:
        """Find a running cluster, unless this process is connected already.

        Raises:
            ConnectionError: nobody answers there, or something else does.
        """
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and not address.startswith("ray://"):
            try:
                socket.create_connection((host, int(port)), timeout=timeout).close()
            except OSError as reason:
                raise error(
                    f"a Ray cluster at {address}",
                    f"{reason} (waited at most {timeout:g} s)",
                    "its head is not started (`ray start --head`), another port, or a firewall in between",
                    ConnectionError,
                ) from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray = package()
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
        self.owned = True

    def start_here(self, workers: int | None, needs: dict[str, float], object_store: int, allow_network: bool) -> None:
        """Start a cluster on this machine, unless there is one already.

        Args:
            workers: how many it is to have room for.
            needs: what each takes.
            object_store: bytes of shared memory.
            allow_network: whether its ports may be open to others.

        Raises:
            RuntimeError: Ray was imported or started in a way that opens ports to the network.
        """
        imported = sys.modules.get("ray") is not None
        if imported and sys.modules["ray"].is_initialized():
            if not self.owned and not allow_network:
                _check_loopback()
            return
        late = {k: v for k, v in LOCAL_ENVIRONMENT.items() if imported and os.environ.get(k) != v}
        if late and not allow_network:  # half a switch would be worse than none
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
        self.own = Path(_folder())
        if not late and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN_PATH"] = token()
        ray = package()
        cores = os.cpu_count() or 1
        wanted = math.ceil((workers or max(1, int(cores / max(needs["CPU"], 1e-9)))) * needs["CPU"])
        custom = {k: v * (workers or 1) for k, v in needs.items() if k not in ("CPU", "GPU")}
        with warnings.catch_warnings(), _handlers_kept():  # Ray forks only to start other programs
            warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
            try:
                ray.init(
                    num_cpus=max(1, wanted), resources={**custom, SLOT: 1e6}, include_dashboard=False,
                    log_to_driver=False, logging_level="critical", object_store_memory=object_store,
                    _temp_dir=str(self.own / "r"),
                )  # fmt: skip
            except BaseException:  # nobody uses what did not start, so nobody would remove its folder
                shutil.rmtree(self.own, ignore_errors=True)
                self.own = None
                raise
        self.owned = True


CLUSTER = Cluster()
atexit.register(CLUSTER.close)  # before Ray's own, which would leave our folder


class Head:
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
        """Ask no more."""
        self._stopped.set()


class Room(NamedTuple):
    """What the nodes that are alive have, by their ids."""

    total: dict[str, dict[str, float]]
    free: dict[str, dict[str, float]]

    def fits(self, needs: dict[str, float], resources: dict[str, dict[str, float]] | None = None) -> int:
        """How many workers fit into what is free (or into other `resources`)."""
        resources = self.free if resources is None else resources
        fit = lambda node: min(int(node.get(k, 0) / v + 1e-9) for k, v in needs.items())
        return sum(fit(resources.get(name, node)) for name, node in self.total.items())


def room() -> Room | None:
    """Ask the nodes; None where they do not answer in time."""
    nodes = _in_time(package().nodes, ASK_SECONDS)
    if nodes is None:
        return None
    total = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    return Room(total, _in_time(_available, ASK_SECONDS) or {})


@functools.cache  # Ray reads it once a process
def token() -> str:
    """A file with a new token, that only this user can read and that goes when the process ends."""
    folder = _folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return str(path)


def _folder() -> str:
    """A new folder with a short name, for sockets; those of processes that were killed are removed."""
    root = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    for old in root.glob("ev[0-9]*-*"):
        pid = old.name[2:].split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"ev{os.getpid()}-", dir=root)


def _check_loopback() -> None:
    """Raise for a Ray that was started before, on an address that others can reach."""
    there = package().util.get_node_ip_address()
    if not there.startswith("127."):
        raise error(
            "Ray on 127.0.0.1 alone",
            f"a Ray that was started before, on {there}",
            "ray.init() above the evaluator: leave it out, or say allow_network=True",
            RuntimeError,
        )


def _head_address() -> str | None:
    address = getattr(package().get_runtime_context(), "gcs_address", "")
    return address if address.rpartition(":")[2].isdigit() else None


def _available() -> dict[str, dict[str, float]]:
    """What is free on each node."""
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()


def _in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """`ask()`, or None where it raises or takes too long."""
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
