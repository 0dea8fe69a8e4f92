"""Workers as processes and threads of this machine: the bits of a serial run, and what becomes of faults."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from jax.tree_util import Partial

from evoopt import minimize, spaces
from evoopt.distributed import Policy, ProcessEvaluator, ThreadEvaluator, initialized, pickling
from evoopt.population import Population
from evoopt.strategies import cma_es, gradient, openai_es, snes

START = {"w": jnp.ones((3, 2)), "b": jnp.array(0.3)}
THREE_PARTS = r"(?s)expected.*got.*usual cause"
POPULATION = Population(Partial(lambda g: g), jnp.arange(8.0))


def host(params):
    """Not JAX, and no zero at a simple place."""
    return float(np.sum((np.asarray(params["w"], np.float64) - 1.7) ** 2) + np.abs(params["b"] + 0.9) + 1e9)


def compiled(params):
    return jnp.sum((params["w"] - 1.7) ** 2) + jnp.abs(params["b"] + 0.9)


def at_three(x, kind):
    """Something happens at candidate 3, the same every time."""
    if int(x) == 3:
        if kind == "exit":
            os._exit(7)
        if kind == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "raise":
            raise ArithmeticError("three")
        if kind == "hang":
            time.sleep(1000)
    return float(x)


def once(x, folder):
    """The first call of each candidate ends its process."""
    path = os.path.join(folder, str(int(x)))
    if int(x) == 2 and not os.path.exists(path):
        with open(path, "w"):
            os._exit(1)
    return float(x) ** 2


def evaluate(evaluator, oracle, **options):
    return np.asarray(evaluator(POPULATION, oracle, jit=False, **options))


@pytest.fixture(scope="module")
def two():
    with ProcessEvaluator(2) as evaluator:
        yield evaluator


@pytest.mark.parametrize("make", [cma_es, snes, openai_es], ids=lambda x: x.__name__)
def test_host_objectives_have_the_bits_of_a_serial_run(make, two):
    serial, spread = (
        minimize(host, START, make(8), generations=5, jit=False, evaluator=evaluator) for evaluator in (None, two)
    )
    assert [row["best"] for row in serial.history] == [row["best"] for row in spread.history]
    assert serial.best["w"].tobytes() == spread.best["w"].tobytes()
    with ThreadEvaluator(3) as threads:
        again = minimize(host, START, make(8), generations=5, jit=False, evaluator=threads)
    assert [row["worst"] for row in serial.history] == [row["worst"] for row in again.history]


def settings(params):
    """A candidate of a space as an objective in Python gets it."""
    assert ("gamma" in params) == (params["kernel"] == "rbf")
    return abs(params.get("gamma", 3.0) - 0.7) + abs(params["degree"] - 4) + (params["kernel"] == "poly")


@pytest.mark.parametrize("make", [pytest.param(cma_es, marks=pytest.mark.slow), snes], ids=lambda x: x.__name__)
def test_candidates_of_a_space_arrive_as_they_are(make, two):
    space = {
        "kernel": spaces.categorical(["linear", "rbf", "poly"]),
        "gamma": spaces.conditional(spaces.real(1e-3, 1e3, log=True), on="kernel", equal="rbf"),
        "degree": spaces.integer(1, 5),
    }
    serial, spread = (
        minimize(settings, space, make(8), generations=5, jit=False, evaluator=evaluator) for evaluator in (None, two)
    )
    assert [row["best"] for row in serial.history] == [row["best"] for row in spread.history]
    assert serial.best == spread.best


def test_jax_objectives_have_the_bits_of_one_worker(two):
    histories = []
    with ThreadEvaluator(1) as one:
        for evaluator in (two, one):
            result = minimize(compiled, START, snes(8), generations=4, batch_size=2, evaluator=evaluator)
            histories.append([(row["best"], row["mean"]) for row in result.history])
    assert histories[0] == histories[1]


def test_first_order_strategies_get_their_gradients(two):
    import optax

    f = lambda x: (float((x**2).sum()), 2 * x)
    result = minimize(f, jnp.ones(3), gradient(optax.sgd(0.1)), generations=3, jit=False, evaluator=two)
    assert result.best_value == pytest.approx(3 * 0.8**4, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("exit", "exited with status 7"), pytest.param("segfault", "killed by SIGSEGV", marks=pytest.mark.slow)],
)
def test_a_candidate_that_kills_its_process_is_named_and_has_no_value(kind, words, caplog):
    with caplog.at_level(logging.WARNING, "evoopt.distributed"), ProcessEvaluator(2) as evaluator:
        values = evaluate(evaluator, Partial(at_three, kind=kind))
        assert np.isnan(values[3])
        assert np.delete(values, 3).tolist() == [0, 1, 2, 4, 5, 6, 7]
        assert evaluator.metrics()["quarantined"] == 1
        assert evaluator.metrics()["deaths"] <= 6  # the retries are bounded
        assert evaluate(evaluator, Partial(at_three, kind="nothing")).tolist() == list(range(8))
    assert "candidate 3 has no value" in caplog.text
    assert words in caplog.text


def test_a_death_that_is_no_candidates_fault_costs_nothing(tmp_path):
    with ProcessEvaluator(1) as evaluator:
        values = evaluate(evaluator, Partial(once, folder=str(tmp_path)))
        assert values.tolist() == [float(i) ** 2 for i in range(8)]
        assert evaluator.metrics()["deaths"] == 1


def test_exceptions_are_named_or_reach_the_user(two, caplog):
    raising = Partial(at_three, kind="raise")
    with caplog.at_level(logging.WARNING, "evoopt.distributed"):
        values = evaluate(two, raising)
    assert np.isnan(values[3])
    assert "candidate 3 has no answer" in caplog.text
    assert "ArithmeticError: three" in caplog.text
    with ThreadEvaluator(2, raise_errors=True) as threads, pytest.raises(RuntimeError, match="candidate 3"):
        evaluate(threads, raising)
    with pytest.raises(RuntimeError, match="all 8 evaluations raised"):
        evaluate(two, Partial(_always))


def _always(x):
    raise OSError("no licence")


@pytest.mark.parametrize("make", [ProcessEvaluator, ThreadEvaluator], ids=lambda x: x.__name__)
def test_a_timeout_ends_one_candidate_only(make, caplog):
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, "evoopt.distributed"), make(2, timeout=0.5) as evaluator:
        values = evaluate(evaluator, Partial(at_three, kind="hang"))
        assert np.isnan(values[3])
        assert np.delete(values, 3).tolist() == [0, 1, 2, 4, 5, 6, 7]
        assert evaluator.metrics()["timeouts"] == 1
        assert "candidate 3 has no value" in caplog.text
    assert time.monotonic() - begun < 60  # loading does not count, a first deadline of 600 s neither


def test_what_a_worker_started_goes_with_it(tmp_path):
    def starts(x, path=str(tmp_path / "pid")):
        import pathlib
        import subprocess
        import time

        if int(x) == 0:
            pathlib.Path(path).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
            time.sleep(1000)
        return float(x)

    with ProcessEvaluator(1, timeout=0.5) as evaluator:
        assert np.isnan(evaluate(evaluator, starts)[0])
    pid = int((tmp_path / "pid").read_text())
    _gone([pid])


def _gone(pids, seconds=20.0):
    until = time.monotonic() + seconds
    alive = lambda pid: psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def begins():
    return {"opened": os.getpid()}


def reads(x):
    return float(initialized()["opened"] == os.getpid()) + float(x)


@pytest.mark.parametrize("make", [ProcessEvaluator, ThreadEvaluator], ids=lambda x: x.__name__)
def test_an_initializer_is_called_in_each_worker(make):
    with make(2, begins) as evaluator:
        assert evaluate(evaluator, reads).tolist() == [i + 1.0 for i in range(8)]
    with pytest.raises(RuntimeError, match=THREE_PARTS):
        initialized()
    with make(1, _always_fails) as evaluator, pytest.raises(RuntimeError, match=r"(?s)expected.*no licence.*usual"):
        evaluate(evaluator, reads)


def _always_fails():
    raise OSError("no licence")


def test_messages_larger_than_a_socket_holds():
    """Slices wait in the driver while workers are busy and answers are as large."""
    from evoopt.answers import WithAux

    population = Population(Partial(lambda g: g), jnp.ones((6, 1 << 18)) * jnp.arange(6.0)[:, None])
    with ProcessEvaluator(2, policy=Policy(slice=1)) as evaluator:
        answers = evaluator(population, lambda x: WithAux(float(x[0]), x), jit=False)
    assert answers.answer.tolist() == list(range(6))
    np.testing.assert_array_equal(answers.aux, np.asarray(population.genomes))


def test_bad_arguments():
    with pytest.raises(ValueError, match=THREE_PARTS):
        ProcessEvaluator(0)
    with pytest.raises(TypeError, match=THREE_PARTS):
        ThreadEvaluator(1.5)
    with pytest.raises(ValueError, match=THREE_PARTS):
        ProcessEvaluator(1, timeout=-1.0)
    lock = threading.Lock()
    with ProcessEvaluator(1) as evaluator, pytest.raises(TypeError, match=r"(?s)expected.*lock.*initializer"):
        evaluate(evaluator, lambda x: lock.locked() or float(x))


def test_without_cloudpickle_functions_travel_by_name(monkeypatch):
    monkeypatch.setattr(pickling, "by_value", lambda: None)
    monkeypatch.setattr("evoopt.distributed.processes.by_value", lambda: None)
    monkeypatch.setattr("evoopt.distributed.processes.script", lambda: None)
    with ProcessEvaluator(1) as evaluator:
        assert evaluate(evaluator, Partial(at_three, kind="nothing")).tolist() == list(range(8))
        with pytest.raises(TypeError, match=r"(?s)expected.*got.*lambda.*top of a module.*cloudpickle"):
            evaluate(evaluator, lambda x: float(x))


SCRIPT = """
    import os, sys, time
    import jax.numpy as jnp
    from evoopt import minimize, spaces
    from evoopt.distributed import ProcessEvaluator, pickling, processes
    from evoopt.strategies import snes

    if {plain}:
        pickling.by_value = processes.by_value = lambda: None

    def f(x):
        if {slow}:
            print("pid", os.getpid(), flush=True)
            time.sleep(1000)
        return float((x ** 2).sum())

    def main():
        evaluator = ProcessEvaluator(2)
        result = minimize(f, jnp.ones(2), snes(4), generations=2, jit=False, evaluator=evaluator)
        print("done", result.generations)

    {run}
"""


def _script(tmp_path, run, plain=False, slow=False):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(SCRIPT.format(run=run, plain=plain, slow=slow)))
    return subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


GUARDED = 'if __name__ == "__main__": main()'


@pytest.mark.slow
@pytest.mark.parametrize(("run", "plain"), [("main()", False), (GUARDED, True)])
def test_programs_with_and_without_a_guard(tmp_path, run, plain):
    program = _script(tmp_path, run, plain)
    out, err = program.communicate(timeout=100)
    assert out.split() == ["done", "2"], err  # and it ended, with an evaluator that nobody closed


@pytest.mark.slow
def test_a_program_that_needs_a_guard_is_told(tmp_path):
    out, err = _script(tmp_path, "main()", plain=True).communicate(timeout=100)
    assert not out
    assert 'a script whose run is guarded by `if __name__ == "__main__":`' in err
    assert "usual cause" in err


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_no_worker_outlives_its_driver(tmp_path, how):
    program = _script(tmp_path, "main()", slow=True)
    pids = [int(program.stdout.readline().split()[1])]
    workers = [child.pid for child in psutil.Process(program.pid).children(recursive=True)]
    assert pids[0] in workers
    program.send_signal(how)
    if how == signal.SIGINT:  # the first one ends the run after this generation, the second at once
        time.sleep(0.2)
        program.send_signal(how)
    program.communicate(timeout=60)
    _gone(workers)
