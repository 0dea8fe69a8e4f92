"""Best means best, and a run that is not the same run says so."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from evoopt import minimize, strategies
from evoopt.answers import WithAux
from evoopt.cli.main import main
from evoopt.envs import policies
from evoopt.envs.rollout import Environment, Task
from evoopt.run.folder import Run

key = jax.random.key


def line(**options):
    """A point that is to be brought to 0; observations are a hundred times as large as positions."""

    def reset(k):
        x = jax.random.uniform(k, (), minval=-1.0, maxval=1.0)
        return x, (100 * x)[None]

    def step(x, a, k):
        y = x - 0.2 * a[0]
        return y, (100 * y)[None], -(y**2), jnp.abs(y) > 3

    return Task(Environment(reset, step, (1,), 1), policies.linear(1, 1), episode_length=30, **options)


@pytest.fixture(scope="module")
def best():
    task = line()
    return task, minimize(task, task.init(key(0)), strategies.snes(8), context=task.context(key(1)), generations=40)


def test_the_best_candidate_comes_with_the_context_it_scored_under(best):
    task, result = best
    seen = task.evaluate(result.best, result.best_context, key(7), episodes=64)["returns"].mean()
    assert float(seen) > -0.6  # with the statistics of the end: -2.66
    assert result.best_context.observations.count < result.context.observations.count


def test_the_best_value_of_a_noisy_objective_is_no_lucky_one(best):
    task, result = best
    new = -task.evaluate(result.best, result.best_context, key(8), episodes=64)["returns"].mean()
    assert result.best_value > 0.3 * float(new)  # was 0.0018, a hundredth
    assert result.evaluations == 40 * 8 + 16


def test_a_task_brings_its_own_update_and_each():
    task = line(common_random_numbers=False)
    result = minimize(task, task.init(key(0)), strategies.snes(8), generations=2)
    assert result.context.observations.count > 0


def test_a_lucky_episode_is_no_target():
    class Lucky:
        def __call__(self, x, context):
            return WithAux(jnp.where(jax.random.uniform(context) < 0.9, -100.0, jnp.sum(x**2)), {})

        def update(self, context, aux):
            return jax.random.split(context)[0]

        def confirm(self, params, context, key):
            asked.append(key)
            return float(jnp.sum(params**2)), 16

    asked = []
    result = minimize(
        Lucky(), jnp.ones(2), strategies.snes(8), context=key(0), target=-50.0, generations=5, progress=False
    )
    assert result.reason == "generations"
    assert result.best_value >= 0
    assert 1 <= len(asked) <= 6
    assert result.history[-1]["evaluations"] == 40 + 16 * (len(asked) - 1)
    assert result.evaluations == 40 + 16 * len(asked)


def f(x):
    return jnp.sum((x - 1.0) ** 2)


@pytest.fixture
def begun(tmp_path):
    with Run.create(tmp_path, "run", {"popsize": 8}) as run:
        minimize(f, jnp.zeros(2), strategies.snes(8), key=3, generations=2, run=run)
    return run.path


@pytest.mark.parametrize(
    ("strategy", "seed", "names"),
    [
        (strategies.snes(8), 4, ["key"]),
        (strategies.snes(16), 3, ["popsize", "8 then, 16 now"]),
        (strategies.snes(8, sigma=0.5), 3, ["sigma"]),
        (strategies.cma_es(8), 3, ["strategy.type", "CMAES"]),
    ],
)
def test_another_run_is_refused_and_names_what_differs(begun, strategy, seed, names):
    with Run.open(begun) as run, pytest.raises(ValueError, match="expected the run") as problem:
        minimize(f, jnp.zeros(2), strategy, key=seed, generations=4, run=run)
    for part in ("got", "usual cause", "--force", *names):
        assert part in str(problem.value)


def test_with_force_another_run_goes_on_with_a_warning(begun):
    with Run.open(begun, force=True) as run, pytest.warns(UserWarning, match="not as it was: key"):
        result = minimize(f, jnp.zeros(2), strategies.snes(8), key=4, generations=4, run=run)
    assert result.generations == 4
    with Run.open(begun) as run:  # a larger budget and other times between checkpoints are no differences
        more = {"generations": 6, "checkpoint_seconds": 0.0, "callbacks": [lambda *_: None]}
        assert minimize(f, jnp.zeros(2), strategies.snes(8), key=4, run=run, **more).generations == 6


def test_another_machine_is_refused(begun, monkeypatch):
    from evoopt.run import identity

    monkeypatch.setattr(identity, "versions", lambda: {**Run.open(begun).versions, "jax": "0.4.1"})
    with Run.open(begun) as run, pytest.raises(ValueError, match=r"versions\.jax: .* then, 0\.4\.1 now"):
        minimize(f, jnp.zeros(2), strategies.snes(8), key=3, generations=4, run=run)


def test_other_versions_in_config_json_are_noticed(begun):
    found = json.loads((begun / "config.json").read_text())
    found["versions"] |= {"evoopt": "0.0.1", "jax": "0.4.1"}
    (begun / "config.json").write_text(json.dumps(found))
    with Run.open(begun) as run, pytest.warns(UserWarning, match=r"evoopt: 0\.0\.1 then.*jax: 0\.4\.1 then"):
        minimize(f, jnp.zeros(2), strategies.snes(8), key=3, generations=4, run=run)


def test_another_environment_is_another_run(tmp_path):
    with Run.create(tmp_path, "run", {}) as run:
        minimize(line(), line().init(key(0)), strategies.snes(8), generations=1, run=run)
        other = line(episodes=2)
        with pytest.raises(ValueError, match=r"objective\.episodes: 1 then, 2 now"):
            minimize(other, other.init(key(0)), strategies.snes(8), generations=2, run=run)


@pytest.mark.parametrize("kept", [0, 1])
def test_totals_survive_a_lost_or_cut_metrics_file(begun, kept):
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text("".join(lines[:kept]))
    with Run.open(begun) as run, pytest.warns(UserWarning, match="lost or cut"):
        result = minimize(f, jnp.zeros(2), strategies.snes(8), key=3, generations=4, run=run)
    assert result.evaluations == 32
    assert [row["evaluations"] for row in result.history[kept:]] == [24, 32]


def test_handlers_that_a_library_takes_are_taken_back():
    taken = signal.getsignal(signal.SIGINT)

    def grabs(carry, rows):
        if carry.generation == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    result = minimize(f, jnp.zeros(2), strategies.snes(8), generations=9, every=1, callbacks=[grabs])
    assert result.reason == "interrupted"
    assert signal.getsignal(signal.SIGINT) == taken


def test_a_return_is_shown_as_one(best):
    assert "best return" in str(minimize(f, jnp.zeros(2), strategies.snes(8), generations=1, display="return"))


POLE = ["evolve", "gymnax:CartPole-v1", "--popsize", "8", "--set", "episode_length=20", "--no-replay"]


def ends(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--set", "episode_length=abc"], ["episode_length=VALUE, a whole number", "abc"]),
        (["--set", "episode_length=1.5"], ["a whole number"]),
        (["--set", "sigma=foo"], ["sigma=VALUE, a number"]),
        (["--set", "sigma=nan"], ["sigma=VALUE, a number"]),
        (["--set", "hidden=64,64"], ["--policy mlp", "--policy gru"]),
        (["--policy", "gru", "--set", "hidden=64,64"], ["hidden=VALUE, a whole number"]),
        (["--policy", "mlp", "--set", "hidden=a,b"], ["whole numbers with commas"]),
        (["--set", "common_random_numbers=maybe"], ["true or false"]),
        (["--set", "popsize=8"], ["--popsize"]),
        (["--set", "policy=mlp"], ["--policy"]),
        (["--set", "rank=2"], ["--strategy eggroll"]),
        (["--set", "descriptor=abs"], ["Python"]),
        (["--micro-batch", "-1"], ["--micro-batch of at least 1"]),
    ],
)
def test_a_setting_of_the_wrong_kind_or_place_says_so(settings, words, tmp_path, capsys):
    code, said = ends([*POLE, *settings, "--runs", tmp_path / "runs"], capsys)
    assert code == 2
    for word in (*words, "expected", "got", "usual cause"):
        assert word in said.err
    assert not (tmp_path / "runs").exists()


def test_every_package_of_environments_is_named(capsys):
    said = ends(["evolve", "gym:CartPole-v1"], capsys)[1].err
    assert "brax" in said
    assert "gymnax" in said


def test_strategies_are_listed_in_groups(capsys):
    main(["list", "strategies"])
    control, tuning = capsys.readouterr().out.split("fine-tuning of language models:")
    assert "openai_es" in control
    assert "mezo" not in control
    assert "mezo" in tuning
    listed = {row.split()[0] for row in (control + tuning).splitlines() if row.startswith("  ")}
    assert listed == set(strategies.__all__) - {"from_evosax"}


def test_the_command_line_says_what_differs_and_stops_with_a_status(tmp_path, capsys, monkeypatch):
    from evoopt import minimize as loop

    def at_once(which):
        real = sys.modules["evoopt.run.interrupts"].Interrupts.arm
        count = []

        def arm(self):
            real(self)
            count.append(1)
            if len(count) == 3:
                os.kill(os.getpid(), which)

        monkeypatch.setattr(sys.modules["evoopt.run.interrupts"].Interrupts, "arm", arm)

    assert callable(loop)
    run = tmp_path / "pole"
    at_once(signal.SIGTERM)
    code, said = ends([*POLE, "--runs", tmp_path, "--name", "pole", "--budget", "9000"], capsys)
    assert code == 143
    assert f"`evoopt resume {run}`" in said.out
    assert "compiling" in said.err
    assert Run.open(run).steps()
    monkeypatch.undo()
    at_once(signal.SIGINT)
    code, said = ends(["resume", run], capsys)
    assert code == 130
    assert "best candidate over 16 new episodes" in said.out
    monkeypatch.undo()
    config = (run / "config.json").read_text()
    edited = config.replace('"popsize": 8', '"popsize": 4').replace('"20"', '"30"')
    (run / "config.json").write_text(edited)
    code, said = ends(["resume", run], capsys)
    assert code == 2
    for word in ("config.popsize: 8 then, 4 now", "episode_length: 20 then, 30 now", "--force"):
        assert word in said.err


def test_a_strangers_folder_runs_no_code_of_its_own(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    words = dict.fromkeys(("model", "prompt", "train", "dtype", "update", "schedule"), "x")
    config = {
        "objective": "finetune-x", "data": str(tmp_path / "rows.jsonl"), "eval": None, "task": "completion",
        "candidates": {}, "metric": "this:d", "strategy": "mezo", "popsize": None, "budget": "9", "batch_size": 1,
        "micro_batch": None, "eval_every": 1, "patience": 1, "seed": 0, "settings": {}, "display": "value", **words,
    }  # fmt: skip
    with Run.create(tmp_path, "theirs", config) as run:
        path = run.path
    for more in ([], ["--metric", "that:d"]):
        code, said = ends(["resume", path, *more], capsys)
        assert code == 2
        assert "expected --metric this:d" in said.err
    assert "this" not in sys.modules


def test_the_version_is_said_without_jax():
    code = "import sys; sys.argv = ['evoopt', '--version']; from evoopt.__main__ import main; main()\n"
    code += "print([m for m in ('jax', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0].startswith("evoopt ")
    assert out.splitlines()[1] == "[]"
