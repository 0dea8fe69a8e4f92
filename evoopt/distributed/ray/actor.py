"""What runs in a worker's process. It does not know Ray, so that a test can run it in its own process."""

from __future__ import annotations

import os
import pickle
import platform
import socket
import traceback
from collections.abc import Callable
from typing import Any

import jax

from evoopt.distributed.worker import Reply, Worker
from evoopt.run.checkpoint import versions as package_versions

CONFIG = (  # of JAX, that the numbers depend on
    "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_default_matmul_precision",
    "jax_default_prng_impl", "jax_threefry_partitionable",
)  # fmt: skip


def setup(initializer: bytes) -> bytes:
    """What every worker of a driver begins with: the driver's configuration and versions, and a pickled initializer."""
    config = {name: getattr(jax.config, name) for name in CONFIG if hasattr(jax.config, name)}
    return pickle.dumps((config, initializer, versions()))


def versions() -> dict[str, str]:
    """What must be the same on driver and workers."""
    import jaxlib

    return {**package_versions(), "jaxlib": jaxlib.__version__, "python": platform.python_version()}


class Actor:
    """A `Worker` that is told by bytes what to do.

    Args:
        fetch: the bytes behind a reference to the object store.
        begins: see `Worker`.
    """

    def __init__(self, fetch: Callable[[Any], bytes], begins: Callable[[], None] = lambda: None) -> None:
        self._fetch = fetch
        self._worker = Worker(begins=begins)

    def begin(self, setup: bytes) -> dict[str, Any]:
        """Take over the driver's configuration, and call the initializer if the versions are the driver's."""
        facts: dict[str, Any] = {"node": socket.gethostname(), "pid": os.getpid(), "error": "", "versions": {}}
        try:
            config, initializer, expected = pickle.loads(setup)
            for name, value in config.items():
                jax.config.update(name, value)
            facts["versions"] = versions()
            if facts["versions"] == expected and (initialize := pickle.loads(initializer)) is not None:
                initialize()
        except BaseException:
            facts["error"] = traceback.format_exc()
        return facts

    def evaluate(self, head: bytes, contents: list[Any]) -> bytes:
        """A pickled `Message` without its contents, which are bytes or [reference], to a pickled `Reply`."""
        message = pickle.loads(head)
        try:
            parts = []
            for (name, version, _), content in zip(message.parts, contents, strict=True):
                data = self._fetch(content[0]) if isinstance(content, list) else content
                parts.append((name, version, pickle.loads(data)))
            return pickle.dumps(self._worker.evaluate(message._replace(parts=tuple(parts))))
        except BaseException:  # also what an argument raises while it is unpickled
            return pickle.dumps(Reply(message.start, message.stop, 0.0, error=traceback.format_exc()))


def remote(ray: Any) -> Any:
    """The class that Ray starts. It travels by value, so that a node without evoopt can say so."""

    class EvooptWorker:
        def begin(self, setup: bytes) -> dict[str, Any]:
            import os
            import socket
            import traceback

            import ray

            facts = {"node": socket.gethostname(), "pid": os.getpid(), "error": "", "versions": {}}
            try:
                from evoopt.distributed.ray.actor import Actor

                self.actor = Actor(ray.get)
                facts = self.actor.begin(setup)
            except BaseException:
                facts["error"] = traceback.format_exc()
            return {**facts, "node_id": ray.get_runtime_context().get_node_id(), "gpus": ray.get_gpu_ids()}

        def evaluate(self, head: bytes, contents: list) -> bytes:
            return self.actor.evaluate(head, contents)

    return ray.remote(EvooptWorker)
