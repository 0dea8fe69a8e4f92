"""A run killed at any moment continues as if it had never stopped: SIGKILL at random moments, in another process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evoopt.run.folder import Run

# A search with a context, slow enough to be killed in the middle: 400 generations, a checkpoint after every dispatch.
PROGRAM = """
import sys, time
import jax, jax.numpy as jnp
from evoopt import minimize, strategies
from evoopt.answers import WithAux
from evoopt.run.folder import Run

def f(x, context):
    return WithAux(jnp.sum((x - 1.5) ** 2) + 0.1 * jax.random.normal(context["key"]), {"x": x})

def update(context, aux):
    return {"key": jax.random.split(context["key"])[0], "mean": 0.9 * context["mean"] + 0.1 * aux["x"].mean(0)}

path = sys.argv[1]
root, name = path.rsplit("/", 1)
try:
    run = Run.open(path)
except FileNotFoundError:
    run = Run.create(root, name, {"display": "value"})
with run:
    context = {"key": jax.random.key(7), "mean": jnp.zeros(20)}
    minimize(f, jnp.zeros(20), strategies.STRATEGY, context=context, update=update, generations=400, every=4,
             callbacks=[lambda *_: time.sleep(0.01)], run=run, checkpoint_seconds=0.0)
print("finished")
"""


def start(program, path):
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def arrays(path):
    last = max((path / "checkpoints").glob("step-*"))
    return last.name, (last / "arrays.bin").read_bytes()


def rows(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run.open(path).metrics()]


def kill_and_resume(program, tmp_path, kills, seed):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(program, whole)
    out, err = process.communicate(timeout=300)
    assert "finished" in out, err
    chance = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = start(program, cut)
        deadline = time.monotonic() + 120
        while not any((cut / "checkpoints").glob("step-*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.8))
        if process.poll() is None:
            killed += 1
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    out, err = start(program, cut).communicate(timeout=300)
    assert "finished" in out, err
    assert arrays(cut) == arrays(whole), "other bits than the run that was not stopped"
    assert rows(cut) == rows(whole)
    assert [row["generation"] for row in rows(cut)] == list(range(1, 401)), "a line twice, or missing"
    assert killed, "the program ended before it was killed"


@pytest.mark.parametrize("strategy", ["openai_es(16)"])
def test_sigkill_at_random_moments(tmp_path, strategy):
    kill_and_resume(PROGRAM.replace("STRATEGY", strategy), tmp_path, kills=4, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deep_ga(16, chain=4)", "pgpe(16, regenerate=True)", "snes(16)"])
def test_sigkill_at_many_random_moments(tmp_path, strategy):
    kill_and_resume(PROGRAM.replace("STRATEGY", strategy), tmp_path, kills=12, seed=2)


def evoopt(*arguments, cwd, check=True):
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "evoopt", *arguments], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def test_the_command_line_evolves_resumes_and_lists(tmp_path):
    out = evoopt(
        "evolve", "gymnax:CartPole-v1", "--strategy", "openai_es", "--popsize", "16", "--budget", "4", "--name", "pole",
        "--policy", "mlp", "--set", "hidden=(8,)", "--set", "strategy.sigma=0.1", "--set", "episode_length=50",
        cwd=tmp_path,
    )  # fmt: skip
    assert "random policies" in out.stdout
    assert "generation 4" in out.stderr
    run = tmp_path / "runs" / "pole"
    assert {p.name for p in run.iterdir()} >= {"config.json", "metrics.jsonl", "checkpoints", "curves.png"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["generation"] for row in rows] == [1, 2, 3, 4]
    assert all(row["length"] <= 50 for row in rows)
    out = evoopt("resume", "runs/pole", "--budget", "6", cwd=tmp_path)
    assert "continuing after generation 4" in out.stdout
    whole = evoopt(
        "evolve", "gymnax:CartPole-v1", "--popsize", "16", "--budget", "6", "--name", "whole",
        "--policy", "mlp", "--set", "hidden=(8,)", "--set", "strategy.sigma=0.1", "--set", "episode_length=50",
        cwd=tmp_path,
    )  # fmt: skip
    assert whole.stdout.splitlines()[-2].split("return")[1:] == out.stdout.splitlines()[-2].split("return")[1:]
    assert arrays(run)[1] == arrays(tmp_path / "runs" / "whole")[1]
    strategies = evoopt("list", "strategies", cwd=tmp_path).stdout
    assert "openai_es" in strategies
    assert "Salimans" in strategies


def test_the_command_lines_errors_help(tmp_path, capsys, monkeypatch):
    from evoopt.cli.main import main

    monkeypatch.chdir(tmp_path)

    def said(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        text = capsys.readouterr().err
        for part in ("expected", "got", "usual cause"):
            assert part in text
        return text

    evolve = ("evolve", "gymnax:CartPole-v1")
    assert "CartPole-v1" in said("evolve", "gymnax:CartPole")
    assert "gymnax" in said("evolve", "gymnx:CartPole-v1")
    assert "brax:hopper" in said("evolve", "hopper")
    assert "openai_es" in said(*evolve, "--strategy", "opnai_es")
    assert "sigma" in said(*evolve, "--set", "sigm=0.1")
    assert "KEY=VALUE" in said(*evolve, "--set", "sigma")
    assert "90s" in said(*evolve, "--budget", "3 parsecs")
    assert "linear" in said(*evolve, "--policy", "lineer")
    assert "even" in said(*evolve, "--popsize", "7")
    assert "no such folder" in said("resume", "runs/nothing")
    Path("file").write_text("in the way")
    assert "file" in said(*evolve, "--runs", "file")
