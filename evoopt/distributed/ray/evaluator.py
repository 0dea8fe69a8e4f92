"""Evaluators whose workers are Ray actors, on this machine or on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from evoopt.distributed.evaluator import Evaluator
from evoopt.distributed.policy import Policy
from evoopt.distributed.ray.cluster import CLUSTER
from evoopt.distributed.ray.executor import RayExecutor
from evoopt.population import Population
from evoopt.types import Answers


def RayEvaluator(  # noqa: N802  (a recipe that reads like the class it makes)
    workers: int | None = None,
    address: str | None = None,
    *,
    batch_size: int | None = None,
    replicate: bool | None = None,
    raise_errors: bool = False,
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
    """An `Evaluator` whose workers are Ray actors: `evaluate(population, oracle)` instead of `population.map`.

        with RayEvaluator(workers=8, batch_size=16) as evaluate:
            ...
            answers = evaluate(population, strategy.oracle(objective))

    Args:
        workers: how many. None: as many as there is room for, and more when nodes join.
        address: of a running cluster, `host:port` or `auto`. None: RAY_ADDRESS, else one is started on this machine.
        batch_size: candidates a worker evaluates at once; None evaluates one at a time.
        replicate: whether workers hold replicas or are sent candidates; None chooses. See `Evaluator`.
        raise_errors: whether the first evaluation that raises ends the run. See `Evaluator`.
        policy: slices, stragglers, deadlines: `evoopt.distributed.Policy`.
        cpus, gpus, resources: what each worker takes; a worker sees only its own GPUs.
        environment: variables of the workers' processes. JAX_* and XLA_* of the driver are passed on; a worker without
            a GPU is told JAX_PLATFORMS=cpu, one with a GPU XLA_PYTHON_CLIENT_PREALLOCATE=false.
        initializer: called once on each worker before it evaluates: data sets, simulators.
        connect_timeout: seconds until an address that does not answer is an error.
        start_timeout: seconds without any worker until that is an error.
        object_store: bytes of shared memory, of a cluster started here.
        allow_network: whether Ray may listen where others can reach it: one that was started before, or one that is
            started here after `import ray`, too late to keep its ports on 127.0.0.1.

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
    return Evaluator(executor, policy, batch_size=batch_size, replicate=replicate, raise_errors=raise_errors)


POOLS: dict[str | None, tuple[int | None, Evaluator]] = {}  # address -> the workers that stay for the next `ray_map`


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

    Args:
        population: the candidates.
        oracle: any callable that can be pickled. Keep the same object from call to call.
        *args: the same for all candidates.
        each: a pytree with leading axis n, of which candidate i gets row i.
        batch_size: candidates a worker evaluates at once.
        jit: False for an oracle that is no JAX function.
        workers: how many. Those of the last call stay if it is the same number, or None; otherwise new ones are started
            instead. None in the first call: as many as there is room for.
        address: of a running cluster. None: RAY_ADDRESS, otherwise one is started on this machine.
    """
    evaluator = _pool(workers, address)
    return evaluator(population, oracle, *args, each=each, batch_size=batch_size, jit=jit)


def _pool(workers: int | None, address: str | None) -> Evaluator:
    """The workers at this address. Another number of them is another evaluator, on the same cluster."""
    where = address or os.environ.get("RAY_ADDRESS")
    before = POOLS.get(where)
    if before is not None and workers in (None, before[0]):
        return before[1]
    executor = RayExecutor(workers, address)
    if before is not None:
        CLUSTER.users.add(executor)  # so that the cluster outlives those who leave it
        before[1].close()
    POOLS[where] = workers, Evaluator(executor)
    return POOLS[where][1]
