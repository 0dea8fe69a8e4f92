"""Nodes that are lost, join and freeze: `ray.cluster_utils.Cluster` with two and three nodes on this machine."""

import os
import signal
import time

import psutil
import pytest
from cases import CASES
from test_ray import numbers, run, serial, up
from test_ray import pytestmark as marks

from evoopt.distributed import Policy, RayEvaluator, ray_map
from evoopt.distributed.ray.cluster import LOCAL_ENVIRONMENT, token

pytestmark = [*marks, pytest.mark.slow]


@pytest.fixture
def nodes(monkeypatch):
    """A cluster of a head without processors, to which tests add nodes."""
    for name, value in LOCAL_ENVIRONMENT.items():  # before Ray is imported
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", token())
    import ray
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized()

    small = {"include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, **small})
    cluster.small = {"object_store_memory": 80 << 20}
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def slow_objective(seconds):
    import jax
    import jax.numpy as jnp

    def pause(x):
        import time

        time.sleep(seconds)
        return x

    def objective(params):
        value = sum(jnp.sum((x - 1.7) ** 2) for x in jax.tree.leaves(params))
        return jax.pure_callback(pause, jax.ShapeDtypeStruct((), value.dtype), value, vmap_method="sequential")

    return objective


def test_a_node_removed_and_nodes_that_join(nodes):
    first, _ = (nodes.add_node(num_cpus=1, **nodes.small) for _ in range(2))
    strategy, oracle = CASES["openai_es"].make(), slow_objective(0.05)
    with RayEvaluator(address=nodes.address, policy=Policy(slice=1)) as evaluate:
        seen = {}

        def between(i):
            seen[i] = {w: t.answers for w, t in evaluate.scheduler.tallies.items()}
            if i == 1:  # both nodes are up
                while len(evaluate.scheduler.workers) < 2:
                    evaluate.turn(0.2)
            if i == 3:
                nodes.add_node(num_cpus=1, **nodes.small)
                deadline = time.monotonic() + 120
                up = lambda: evaluate.scheduler.counters.deaths and len(evaluate.scheduler.workers) == 2
                while not up() and time.monotonic() < deadline:
                    evaluate.turn(0.2)

        def removing(population, *args, **options):
            job = evaluate.submit(population, *args, **options)
            if len(seen) == 3:
                evaluate.turn(0.2)
                nodes.remove_node(first, allow_graceful=False)
            return evaluate.collect(job)

        state = run(removing, strategy, 8, oracle, between)
        assert state == serial(strategy, 8, oracle)
        assert evaluate.scheduler.counters.deaths == 1
        assert evaluate.scheduler.counters.quarantined == 0
        newest = list(evaluate.scheduler.tallies.values())[2:]
        assert any(tally.answers for tally in newest), "the node that joined was not used"
        assert len({evaluate.executor._nodes[w] for w in evaluate.scheduler.workers}) == 2


def test_a_frozen_worker_and_raylet_cost_two_deadlines_at_most(nodes):
    frozen, _ = (nodes.add_node(num_cpus=1, **nodes.small) for _ in range(2))
    strategy, oracle, deadline = CASES["snes"].make(), slow_objective(0.05), 3.0
    policy = Policy(slice=1, resubmit=False, deadline=deadline, first_deadline=60.0)
    stopped = []
    with RayEvaluator(2, nodes.address, policy=policy, start_timeout=20.0) as evaluate:

        def between(i):
            while i == 1 and len(evaluate.scheduler.workers) < 2:  # then both compile in this generation
                evaluate.turn(0.2)

        took = []

        def freezing(population, *args, **options):
            begun = time.monotonic()
            job = evaluate.submit(population, *args, **options)
            if len(took) == 2:
                raylet = next(p.process.pid for k, v in frozen.all_processes.items() if "raylet" in k for p in v)
                for pid in (raylet, *(c.pid for c in psutil.Process(raylet).children(recursive=True))):
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
            answers = evaluate.collect(job)
            took.append(time.monotonic() - begun)
            return answers

        try:
            state = run(freezing, strategy, 5, oracle, between)
        finally:
            for pid in stopped:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGCONT)
        assert state == serial(strategy, 5, oracle)
        assert evaluate.scheduler.counters.overdue >= 1
        assert took[2] < 2 * deadline
        assert max(took[3:]) < deadline


def test_three_nodes_workers_and_gpus_of_their_own(nodes):
    for _ in range(3):
        nodes.add_node(num_cpus=1, num_gpus=1, **nodes.small)

    def visible(x):
        import os

        return float(os.environ["CUDA_VISIBLE_DEVICES"])

    for workers in (1, 3):
        with RayEvaluator(
            workers, nodes.address, gpus=1, environment={"JAX_PLATFORMS": "cpu"}, policy=Policy(slice=1)
        ) as evaluate:
            for name in ("pgpe", "jade"):
                strategy = CASES[name].make()
                assert run(evaluate, strategy, 3) == serial(strategy, 3)
            assert evaluate(numbers(2), visible, jit=False).tolist() == [0, 0]
    assert len({facts["node_id"] for facts in evaluate.facts.values()}) == 3


def test_ray_map_with_two_then_three_workers_of_a_cluster_of_three(nodes):
    from evoopt.distributed.ray.evaluator import POOLS

    nodes.add_node(num_cpus=3, **nodes.small)
    square = lambda x: x**2
    try:
        for workers in (2, 3):  # the three need the processors of the two
            values = ray_map(numbers(5), square, batch_size=2, workers=workers, address=nodes.address)
            assert values.tolist() == [0, 1, 4, 9, 16]
            up(POOLS[nodes.address][1], workers)
    finally:
        POOLS.pop(nodes.address)[1].close()
