"""Evaluation by real Ray workers and their faults: the bits are those of one process.

Everything is defined inside functions, so that it travels to the workers by value. The in-process executor of
`test_scheduler.py` plays all orders of events; here is what only processes can show.
"""

import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from cases import CASES

from evoopt.distributed import LocalEvaluator, RayEvaluator, ray_map
from evoopt.population import Population
from evoopt.run.checkpoint import digest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),  # not imported yet: its
    # switches are read at import
    pytest.mark.ray,
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Ray's sockets at its end
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
THREE_PARTS = r"(?s)expected.*got.*usual cause"
START = {"w": jnp.ones((3, 2)), "b": jnp.array(0.3)}


def made():
    """An objective; made by a function, it is pickled by value."""
    import jax
    import jax.numpy as jnp

    def objective(params):
        return sum(jnp.sum((x - 1.7) ** 2) for x in jax.tree.leaves(params))

    return objective


OBJECTIVE = made()


def run(evaluate, strategy, generations=4, oracle=OBJECTIVE, between=lambda i: None):
    """The state after some generations, evaluated by `evaluate` in micro-batches of 4."""
    ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell)
    state = strategy.init(START, jax.random.key(0))
    for i in range(generations):
        between(i)
        key = jax.random.key(i)
        population = ask(state, key)
        answers = evaluate(population, strategy.oracle(oracle), batch_size=4, source=(strategy, state, key))
        state = tell(state, population, answers)
    return digest(state)


def serial(strategy, generations=4, oracle=OBJECTIVE):
    """The same by `Population.map` in this process."""
    whole = jax.jit(lambda population: population.map(strategy.oracle(oracle), batch_size=4))
    return run(lambda population, *_, **__: whole(population), strategy, generations)


def numbers(n):
    return Population(lambda g: g, jnp.arange(float(n)))


@pytest.fixture(scope="module")
def two():
    """Two workers on a cluster started as by default."""
    with RayEvaluator(2, object_store=100 << 20) as evaluate:
        evaluate(numbers(2), OBJECTIVE)
        while len(evaluate.scheduler.workers) < 2:
            evaluate.turn(0.2)
        yield evaluate


def test_ray_is_the_serial_run_bit_for_bit(two):
    for name, mode in (("openai_es", "candidates"), ("deep_ga", "replicas")):
        two.replicate = mode == "replicas"
        strategy = CASES[name].make()
        assert run(two, strategy) == serial(strategy), name
    two.replicate = None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cma_es", "jade", "gradient"])
def test_ray_is_the_serial_run_for_more_strategies(two, name):
    for mode in ("candidates", "replicas"):
        two.replicate = mode == "replicas"
        strategy = CASES[name].make()
        assert run(two, strategy) == serial(strategy)
    two.replicate = None


def test_every_listening_socket_is_on_loopback(two):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    words = " ".join(word for p in processes for word in p.cmdline())
    assert "gcs_server" in words
    assert "raylet" in words
    assert {two.facts[w]["pid"] for w in two.scheduler.workers} <= {p.pid for p in processes}
    listening = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) >= 5
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o077 == 0
    assert not any("dashboard" in p.name() for p in processes)


def test_a_killed_worker_changes_nothing_and_is_replaced(two):
    strategy = CASES["snes"].make()
    before = two.scheduler.counters.deaths

    def kill(i):
        if i == 2:
            os.kill(two.facts[next(iter(two.scheduler.workers))]["pid"], signal.SIGKILL)

    assert run(two, strategy, between=kill) == serial(strategy)
    deadline = time.monotonic() + 60
    while len(two.scheduler.workers) < 2 and time.monotonic() < deadline:
        two.turn(0.2)
    assert two.scheduler.counters.deaths == before + 1
    assert len(two.scheduler.workers) == 2


def test_poisoned_candidates_are_named(two, caplog):
    def raises(x):
        if x == 3:
            raise ZeroDivisionError("at three")
        return float(x)

    caplog.set_level(logging.WARNING, "evoopt.distributed")
    values = two(numbers(8), raises, jit=False, batch_size=2)
    assert jnp.isnan(values).nonzero()[0].tolist() == [3]
    for word in ("candidate 3", "worker w", f"node {socket.gethostname()}", "ZeroDivisionError: at three"):
        assert word in caplog.text


def test_what_cannot_travel_is_named(two):
    import threading

    lock = threading.Lock()
    words = r"(?s)expected the objective that can be pickled.*got .*lock \(lock\), held by.*initializer"
    with pytest.raises(TypeError, match=words):
        two(numbers(2), lambda x: float(x) if lock else 0.0, jit=False)


def test_what_an_objective_raises_ends_no_worker(two):
    own = type("Own", (BaseException,), {"__module__": "__main__"})  # so that it travels by value

    def f(x):
        if x == 5:
            raise KeyboardInterrupt
        if x == 6:
            raise SystemExit(3)
        if x == 7:
            raise own
        return 3_000_000_000 if x == 1 else float(x) + 1e9

    before = two.scheduler.counters.deaths
    values = two(numbers(16), f, jit=False)
    assert np.flatnonzero(np.isnan(values)).tolist() == [5, 6, 7]
    assert values[1] == 3_000_000_000
    assert values[2] == 1_000_000_002
    assert two.scheduler.counters.deaths == before


def test_arguments_and_objects_that_change_in_place_are_seen(two):
    class Shifted:
        t = 0.0

        def __call__(self, x, d):
            return x + self.t + d.sum()

    data, f = np.zeros(3), Shifted()
    for i in range(3):
        data[:], f.t = i, 100.0 * i
        assert two(numbers(2), f, data, jit=False).tolist() == [103.0 * i, 103.0 * i + 1]


def test_a_second_evaluator_lives_beside_the_first_and_ends_alone(two):
    with RayEvaluator(1) as other:
        assert other(numbers(3), lambda x: 2.0 * float(x), jit=False).tolist() == [0, 2, 4]
    assert two(numbers(3), lambda x: 3.0 * float(x), jit=False).tolist() == [0, 3, 6]


SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}  # before Ray is started


def test_ray_leaves_the_signals_alone(two):
    assert {number: signal.getsignal(number) for number in SIGNALS} == SIGNALS


@pytest.mark.parametrize(
    ("name", "left", "blame"),
    [
        ("RayActorError", True, True),
        ("OutOfMemoryError", True, True),
        ("WorkerCrashedError", True, True),
        ("ActorUnavailableError", True, True),
        ("RaySystemError", True, True),
        ("GetTimeoutError", False, False),
        ("ObjectLostError", False, False),
    ],
)
def test_every_failure_of_a_call_is_a_death_or_a_lost_answer(two, name, left, blame):
    import ray

    from evoopt.distributed.executor import Answered, Left
    from evoopt.distributed.ray.executor import without_answer

    plain = {"__init__": lambda self: None, "__str__": lambda self: "gone"}  # each of them is made of other things
    reason = type(name, (getattr(ray.exceptions, name),), plain)()
    event = without_answer("w9", 1, reason)
    assert isinstance(event, Left if left else Answered)
    assert not left or event.blame is blame


class NoRay:
    """Stands for the package where a cluster does not start, and where a call about an actor fails."""

    is_initialized = staticmethod(lambda: False)

    @staticmethod
    def init(**options):
        raise OSError("no space left on device")

    @staticmethod
    def kill(actor, no_restart):
        raise RuntimeError("the head is gone")


def test_a_cluster_that_does_not_start_leaves_nothing(monkeypatch):
    from evoopt.distributed.ray.cluster import CLUSTER

    monkeypatch.setitem(sys.modules, "ray", NoRay)
    monkeypatch.setattr(CLUSTER, "own", None)
    folders = lambda: set(Path("/tmp").glob(f"ev{os.getpid()}-*"))
    before = folders()
    with pytest.raises(OSError, match="no space left"):
        CLUSTER.start_here(1, {"CPU": 1.0}, 100 << 20, allow_network=True)
    assert folders() == before
    assert CLUSTER.own is None


def test_a_worker_whose_end_cannot_be_asked_for_is_given_up(monkeypatch):
    from evoopt.distributed.ray.executor import RayExecutor

    monkeypatch.setitem(sys.modules, "ray", NoRay)
    executor = RayExecutor(1)
    executor._actors["w0"] = object()
    executor.kill("w0")
    assert not executor._actors


def test_one_more_worker_is_asked_for_only_where_it_fits(monkeypatch):
    from evoopt.distributed.ray.cluster import CLUSTER
    from evoopt.distributed.ray.executor import RayExecutor

    monkeypatch.setattr(CLUSTER, "own", None)
    executor = RayExecutor(2)
    executor._actors, executor._target = {"w0": object(), "w1": object()}, 2
    for room, target in ((2, 2), (3, 3)):  # the room counts the two that there are
        monkeypatch.setattr(executor, "_room", lambda room=room: room)
        executor.more()
        assert executor._target == target


def test_a_ray_on_the_network_is_refused(two, monkeypatch):
    import ray

    from evoopt.distributed.ray.cluster import CLUSTER

    monkeypatch.setattr(CLUSTER, "owned", False)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    with pytest.raises(RuntimeError, match=r"(?s)127\.0\.0\.1 alone.*10\.0\.0\.7.*allow_network=True"):
        CLUSTER.start_here(1, {"CPU": 1.0}, 100 << 20, allow_network=False)
    CLUSTER.start_here(1, {"CPU": 1.0}, 100 << 20, allow_network=True)


@pytest.mark.slow
def test_resources_environment_and_initializer(two):
    def prepare():
        import builtins

        builtins.prepared = 40.0  # type: ignore[attr-defined]

    def f(x):
        import builtins
        import os

        return builtins.prepared + float(os.environ["OFFSET"])  # type: ignore[attr-defined]

    with RayEvaluator(1, cpus=0, environment={"OFFSET": "2"}, initializer=prepare) as evaluate:
        assert evaluate(numbers(2), f, jit=False).tolist() == [42, 42]


def test_a_failing_initializer_is_an_error_that_says_where(two):
    def fails():
        raise OSError("no data set at /data")

    evaluate = RayEvaluator(1, cpus=0, initializer=fails)
    words = rf"(?s)worker w0 on node {socket.gethostname()} failed.*no data set at /data.*usual cause"
    with pytest.raises(RuntimeError, match=words):
        evaluate(numbers(2), OBJECTIVE)


def test_more_than_there_is_is_refused(two):
    with pytest.raises(RuntimeError, match=r"(?s)9 workers of .*room for 0.*usual cause"):
        RayEvaluator(9, resources={"simulator": 1.0})(numbers(2), OBJECTIVE)
    with pytest.raises(RuntimeError, match=r"(?s)a worker of .*GPU.*room for 0"):
        RayEvaluator(gpus=1)(numbers(2), OBJECTIVE)


@pytest.mark.slow
def test_other_versions_are_refused(two, monkeypatch):
    from evoopt.distributed.ray import actor

    monkeypatch.setattr(actor, "versions", lambda real=actor.versions: {**real(), "jax": "0.0.1"})
    evaluate = RayEvaluator(1, cpus=0)
    with pytest.raises(RuntimeError, match=r"(?s)versions.*jax.*there, 0\.0\.1 here.*usual cause"):
        evaluate(numbers(2), OBJECTIVE)
    evaluate.close()


def test_an_address_where_nobody_is_fails_in_time():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"(?s)a Ray cluster at {address}.*waited at most 3 s.*ray start"):
        RayEvaluator(address=address, connect_timeout=3.0)(numbers(2), OBJECTIVE)
    assert time.monotonic() - begun < 30


def test_without_ray_it_says_what_to_install():
    code = "import sys; sys.modules['ray'] = None\n"
    code += "import evoopt.distributed as d, jax.numpy as jnp, evoopt\n"
    code += "try: d.RayEvaluator(1)(evoopt.Population(lambda g: g, jnp.ones(2)), jnp.sum)\n"
    code += "except ImportError as problem: print(problem)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'evoopt-jax[ray]'" in out
    assert "usual cause" in out


# The driver ------------------------------------------------------------

PROGRAM = """
import os, sys
import evoopt.run.checkpoint as checkpoint

WHEN = int(sys.argv[2])  # of the calls that make a checkpoint durable, the one that kills; -1: none
if WHEN >= 0:
    count = [0]
    def killing(real):
        def call(*args):
            if count[0] == WHEN:
                os.kill(os.getpid(), 9)
            count[0] += 1
            return real(*args)
        return call
    checkpoint._fsync, checkpoint._rename = killing(checkpoint._fsync), killing(checkpoint._rename)

import jax, jax.numpy as jnp
from evoopt import minimize, strategies
from evoopt.answers import WithAux
from evoopt.distributed import LocalEvaluator, Policy, RayEvaluator
from evoopt.run.folder import Run

def f(x, context):
    return WithAux(jnp.sum((x - 1.5) ** 2) + 0.1 * jax.random.normal(context["key"]), {"x": x})

def update(context, aux):
    return {"key": jax.random.split(context["key"])[0], "mean": 0.9 * context["mean"] + 0.1 * aux["x"].mean(0)}

root, name = sys.argv[1].rsplit("/", 1)
try:
    run = Run.open(sys.argv[1])
except FileNotFoundError:
    run = Run.create(root, name, {"display": "value"})
with run, EVALUATOR as evaluate:
    minimize(f, jnp.zeros(6), strategies.openai_es(8, sigma=0.1, learning_rate=0.1), update=update, generations=30,
             context={"key": jax.random.key(7), "mean": jnp.zeros(6)}, every=2, run=run, checkpoint_seconds=0.0,
             evaluator=evaluate, batch_size=2)
print("finished")
"""
LOCAL = PROGRAM.replace("EVALUATOR", "LocalEvaluator(3, policy=Policy(slice=1))")
RAY = PROGRAM.replace("EVALUATOR", "RayEvaluator(2, object_store=80 << 20, replicate=True)")


def start(program, path, when=-1):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(when)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finished(program, path):
    out, err = start(program, path).communicate(timeout=300)
    assert "finished" in out, err
    last = max((path / "checkpoints").glob("step-*"))
    return last.name, (last / "arrays.bin").read_bytes()


def killed_at_a_checkpoint(tmp_path, moments):
    whole = finished(LOCAL, tmp_path / "whole")
    for when in moments:
        process = start(LOCAL, tmp_path / "cut", when)
        process.communicate(timeout=300)
        assert process.returncode in (-signal.SIGKILL, 0)
    assert finished(LOCAL, tmp_path / "cut") == whole
    rows = [row["generation"] for row in opened(tmp_path / "cut")]
    assert rows == list(range(1, 31))


def opened(path):
    from evoopt.run.folder import Run

    return Run.open(path).metrics()


@pytest.mark.slow
def test_the_driver_killed_at_twenty_moments_of_checkpoints(tmp_path):
    killed_at_a_checkpoint(tmp_path, np.random.default_rng(0).integers(3, 40, 20).tolist())


@pytest.mark.slow
def test_the_driver_of_ray_workers_killed(tmp_path):
    whole = finished(LOCAL, tmp_path / "whole")
    for generation in (4, 16):
        process = start(RAY, tmp_path / "cut")
        deadline = time.monotonic() + 120
        folder = tmp_path / "cut" / "checkpoints"
        while time.monotonic() < deadline and process.poll() is None:
            if max((int(p.name[5:13]) for p in folder.glob("step-*[0-9]")), default=0) >= generation:
                break
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.communicate()
        _gone, alive = psutil.wait_procs(family, timeout=90)
        assert not alive, "Ray processes outlive their driver"
    assert finished(RAY, tmp_path / "cut") == whole


def test_no_pickle_is_read_from_a_run_folder(tmp_path, monkeypatch):
    import pickle

    from evoopt import minimize, strategies
    from evoopt.run.folder import Run

    folders = tmp_path / "runs"
    go = lambda run, n: minimize(
        OBJECTIVE, START, strategies.snes(8), generations=n, run=run, evaluator=LocalEvaluator(2), batch_size=2
    )
    with Run.create(folders, "run", {}) as run:
        go(run, 2)

    def refused(*args, **kwargs):
        raise AssertionError("pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    with Run.open(folders / "run") as run:
        go(run, 4)
    for path in folders.rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def test_ray_map_is_a_drop_in(two):
    from evoopt.distributed.ray.evaluator import POOLS

    POOLS[None] = None, two  # it would start workers of its own
    try:
        values = ray_map(numbers(5), lambda x: x**2, batch_size=2)
    finally:
        POOLS.clear()
    assert values.tolist() == [0, 1, 4, 9, 16]


def up(evaluate, workers):
    """Wait until so many are ready: their processes."""
    deadline = time.monotonic() + 120
    while len(evaluate.scheduler.workers) < workers and time.monotonic() < deadline:
        evaluate.turn(0.2)
    assert len(evaluate.scheduler.workers) == workers
    return {evaluate.facts[w]["pid"] for w in evaluate.scheduler.workers}


@pytest.mark.slow
def test_ray_map_with_two_then_three_workers(two):
    from evoopt.distributed.ray.evaluator import POOLS

    square, processes = lambda x: x**2, []
    try:
        for workers in (2, 3, None):
            assert ray_map(numbers(5), square, batch_size=2, workers=workers).tolist() == [0, 1, 4, 9, 16]
            processes.append(up(POOLS[None][1], workers or 3))
        assert processes[1] == processes[2]
        _, alive = psutil.wait_procs([psutil.Process(p) for p in processes[0] if psutil.pid_exists(p)], timeout=30)
        assert not alive, "workers that nobody uses any more"
    finally:
        POOLS.pop(None)[1].close()
    assert two(numbers(3), square).tolist() == [0, 1, 4]


@pytest.mark.slow
def test_the_guides_example_runs():
    guide = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    block += "\nassert abs(strategy.recommend(state) - 3.0).max() < 0.5\nprint('finished')"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=300)
    assert "finished" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_line_with_workers(tmp_path):
    def evoopt(*arguments, status=0):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-m", "evoopt", *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == status, done.stderr
        return done

    task = ("evolve", "gymnax:CartPole-v1", "--popsize", "16", "--set", "episode_length=50", "--seed", "3")
    out = evoopt(*task, "--budget", "3", "--name", "spread", "--workers", "2")
    assert "evaluated by 2 workers" in out.stdout
    assert "2 workers" in out.stderr
    evoopt("resume", "runs/spread", "--budget", "5")  # in this process
    evoopt(*task, "--budget", "5", "--name", "here", "--micro-batch", "2")
    state = lambda name: (tmp_path / "runs" / name / "checkpoints" / "step-00000005" / "arrays.bin").read_bytes()
    assert state("spread") == state("here")
    evoopt(*task, "--budget", "1", "--name", "alone")
    err = evoopt("resume", "runs/alone", "--budget", "2", "--workers", "2", status=2).stderr
    assert "expected workers for a run that was begun with some" in err
