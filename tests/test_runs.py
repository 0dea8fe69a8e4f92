"""Run folders: nothing twice, nothing lost that was promised, one writer."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt.run import checkpoint
from evoopt.run.checkpoint import digest
from evoopt.run.curves import held_out
from evoopt.run.folder import Run

PARTS = ("expected ", "\ngot ", "\nusual cause: ")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Nobody pulls the plug here: that `_fsync` is called is tested, that the disk obeys is not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def row(generation: int, **more) -> dict:
    value = 100.0 / (generation + 1)
    return {
        "generation": generation,
        "evaluations": 64 * (generation + 1),
        "best": value,
        "mean": 2 * value,
        "median": 1.9 * value,
        "worst": 4 * value,
        "best_so_far": value,
        "answered": 64,
        "seconds": 0.5,
    } | more


@pytest.fixture
def run(tmp_path):
    with Run.create(tmp_path, "first", {"strategy": "cma_es", "seed": 3}) as run:
        yield run


def assert_three_parts(caught, *words):
    message = str(caught.value)
    assert all(part in message for part in PARTS), message
    for word in words:
        assert word in message, (word, message)


# ---- making and finding ----


def test_a_new_run_can_be_opened_again(tmp_path):
    config = {"strategy": "cma_es", "options": {"popsize": 64, "sigma": 0.1}, "seed": None, "list": [1, 2]}
    with Run.create(tmp_path / "runs", "first", config) as run:
        assert run.path == tmp_path / "runs" / "first"
        assert sorted(os.listdir(run.path)) == ["checkpoints", "config.json", "lock", "metrics.jsonl"]
    again = Run.open(str(run.path))
    assert again.config == run.config == config
    assert again.versions == checkpoint.versions()
    assert again.metrics() == []
    assert repr(again) == f"Run('{run.path}')"


def test_names_are_made_and_never_collide(tmp_path):
    config = {"strategy": "cma_es", "env": "brax/ant v2"}
    names = []
    for _ in range(3):
        with Run.create(tmp_path, None, config) as run:
            names.append(run.path.name)
    assert names == ["cma_es-brax-ant-v2-1", "cma_es-brax-ant-v2-2", "cma_es-brax-ant-v2-3"]
    with Run.create(tmp_path, None, {"seed": 1, "env": "../.."}) as run:
        assert run.path == tmp_path / "run-1"
    with Run.create(tmp_path, None, {"strategy": "s" * 500}) as run:
        assert run.path.exists()


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with Run.create(tmp_path, "empty", {}) as run:
        assert Run.open(run.path).config == {}


def test_a_folder_with_something_in_it_is_refused(run):
    before = sorted(os.listdir(run.path))
    with pytest.raises(FileExistsError) as caught:
        Run.create(run.path.parent, "first", {})
    assert_three_parts(caught, str(run.path), f"evoopt resume {run.path}")
    assert sorted(os.listdir(run.path)) == before
    assert Run.open(run.path).config["seed"] == 3


@pytest.mark.parametrize("name", ["given", None])
@pytest.mark.parametrize("where", ["file", "proc"])
def test_a_folder_that_cannot_be_written(tmp_path, where, name):
    (tmp_path / "file").write_text("")
    root = "/proc/nothing" if where == "proc" else tmp_path / "file"
    with pytest.raises(OSError, match="to write") as caught:
        Run.create(root, name, {})
    assert_three_parts(caught, str(root), "read-only")


def test_a_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match="to write") as caught:
        Run.create(tmp_path, "taken", {})
    assert_three_parts(caught, "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/a"])
def test_a_name_is_one_folder(tmp_path, name):
    with pytest.raises(ValueError, match="name") as caught:
        Run.create(tmp_path, name, {})
    assert_three_parts(caught, repr(name))


@pytest.mark.parametrize("value", [len, jnp.zeros(2), math.nan, {(1, 2): 3}])
def test_a_config_that_is_no_json_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="plain JSON") as caught:
        Run.create(tmp_path / "runs", "x", {"key": value})
    assert_three_parts(caught)
    assert not (tmp_path / "runs").exists()


def test_opening_what_is_not_there_suggests_names(run):
    root = run.path.parent
    for name in ("second", "cma_es-sphere-1"):
        Run.create(root, name, {}).close()
    (root / "other").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        Run.open(root / "frist")
    assert_three_parts(caught, "no such folder", "there is first", str(root))
    with pytest.raises(FileNotFoundError) as caught:
        Run.open(root / "qqqq")
    assert_three_parts(caught, "cma_es-sphere-1, first, second")
    with pytest.raises(FileNotFoundError) as caught:
        Run.open(root / "other")
    assert_three_parts(caught, "a folder without config.json")
    for path in (root / "nothing" / "here", root / "first" / "config.json"):
        with pytest.raises(FileNotFoundError) as caught:
            Run.open(path)
        assert_three_parts(caught, str(path))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b'{"config": 3, "versions": {}}', b'{"config": {}}', b"null"]
)
def test_a_damaged_config_is_refused(run, text):
    (run.path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        Run.open(run.path)
    assert_three_parts(caught)


def test_a_kill_while_creating_leaves_no_half_config(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(checkpoint, "_rename", die)
    with pytest.raises(Killed):
        Run.create(tmp_path, "x", {})
    with pytest.raises(FileNotFoundError) as caught:
        Run.open(tmp_path / "x")
    assert_three_parts(caught, "a folder without config.json")


# ---- metrics ----


def test_rows_come_back_as_they_were(run):
    run.append([row(0), row(1)])
    run.append([row(2)])
    run.append([])
    assert run.metrics() == Run.open(run.path).metrics() == [row(0), row(1), row(2)]
    assert len((run.path / "metrics.jsonl").read_bytes().splitlines()) == 3


def test_numbers_that_json_lacks(run):
    values = {"best": math.nan, "mean": math.inf, "worst": -math.inf, "front": [[1.0, math.nan], [math.inf]]}
    run.append([row(0, **values, name="a\nb", ok=True)])
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    plain = json.loads(line, parse_constant=refuse)
    assert (plain["best"], plain["mean"], plain["worst"]) == (None, "Infinity", "-Infinity")
    (back,) = run.metrics()
    assert repr({k: back[k] for k in values}) == repr(values)
    assert (back["name"], back["ok"]) == ("a\nb", True)


def test_numbers_of_numpy_and_jax_are_welcome(run):
    run.append([{"generation": np.int64(4), "best": jnp.float32(0.1), "worst": np.float64("inf"), "mean": jnp.ones(2)}])
    assert run.metrics() == [{"generation": 4, "best": float(np.float32(0.1)), "worst": math.inf, "mean": [1.0, 1.0]}]


@pytest.mark.parametrize("bad", [{}, {"generation": 1.0}, {"generation": True}, {"generation": 1, "f": len}])
def test_bad_rows_are_refused_together_with_their_neighbours(run, bad):
    with pytest.raises(ValueError, match="row") as caught:
        run.append([row(0), bad])
    assert_three_parts(caught)
    assert run.metrics() == []


def test_a_line_cut_by_a_kill_is_left_out_and_swallows_nothing(run):
    run.append([row(0), row(1)])
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        before = [row(0)] if size >= first else []
        assert run.metrics() == before
        run.append([row(7)])
        assert run.metrics() == [*before, row(7)]
    path.write_bytes(whole + bytes(50))  # what a power cut may leave
    run.append([row(7)])
    assert run.metrics() == [row(0), row(1), row(7)]


def test_a_bad_line_in_the_middle_is_left_out_with_a_warning(run):
    run.append([row(0)])
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write("garbage\n[1]\n{}\n")
    run.append([row(1)])
    with pytest.warns(UserWarning, match=r"line [234] of '.*metrics\.jsonl' is not a row") as caught:
        assert run.metrics() == [row(0), row(1)]
    assert len(caught) == 3
    assert caught[0].filename == __file__


def test_a_disk_that_takes_a_part_only(run, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[: len(data) // 2])

    run.append([row(0)])
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, mode, buffering: Short(path, mode))
        with pytest.raises(OSError, match="a part") as caught:
            run.append([row(1)])
    assert_three_parts(caught, "metrics.jsonl", "full disk")
    run.append([row(1)])
    assert run.metrics() == [row(0), row(1)]


def test_truncate_drops_what_comes_after(run):
    run.append([row(g) for g in range(6)])
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"generation": 2, "be')
    kept = (run.path / "metrics.jsonl").read_bytes().splitlines()[:4]
    run.truncate(3)
    assert (run.path / "metrics.jsonl").read_bytes().splitlines() == kept  # not even reworded
    run.append([row(4)])
    assert run.metrics() == [row(g) for g in range(5)]
    run.truncate(-1)
    assert run.metrics() == []
    assert not list(run.path.glob("*.tmp"))


def test_truncate_is_whole_or_not_at_all(run, monkeypatch):
    run.append([row(0), row(1)])

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("_fsync", "_rename"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with pytest.raises(OSError, match="No space") as caught:
                run.truncate(0)
        assert_three_parts(caught, "metrics.jsonl")
        assert run.metrics() == [row(0), row(1)]


# ---- checkpoints ----


def test_checkpoints_go_where_they_belong(run):
    tree = {"x": jnp.arange(3.0), "key": jax.random.key(1)}
    path = run.save(tree, 4, {"evaluations": 256})
    assert path == run.path / "checkpoints" / "step-00000004"
    found = Run.open(run.path).load(jax.eval_shape(lambda: tree))
    assert (found.step, found.meta, digest(found.tree)) == (4, {"evaluations": 256}, digest(tree))
    for step in range(5, 9):
        run.save(tree, step, keep=2)
    assert checkpoint.steps(run.path / "checkpoints") == [7, 8]
    assert run.load(tree, 7).step == 7


def test_metrics_are_durable_before_the_checkpoint(run, monkeypatch):
    calls = []
    real = checkpoint._fsync
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: (calls.append(path.name), real(path)))
    run.append([row(0)])
    run.save({"x": jnp.zeros(1)}, 0)
    assert calls[0] == "metrics.jsonl"


# ---- one writer ----


def test_a_second_run_object_may_read_but_not_write(run):
    run.append([row(0)])
    other = Run.open(run.path)
    assert other.metrics() == [row(0)]
    for write in (lambda: other.append([row(1)]), lambda: other.truncate(0), lambda: other.save({}, 0), other.lock):
        with pytest.raises(BlockingIOError) as caught:
            write()
        assert_three_parts(caught, str(run.path), f"process {os.getpid()} (this process)", "close")
    run.close()
    other.append([row(1)])
    with pytest.raises(BlockingIOError):
        run.append([row(2)])
    other.close()
    other.close()
    run.lock()
    run.lock()
    assert [r["generation"] for r in run.metrics()] == [0, 1]


def test_a_run_that_is_forgotten_gives_its_lock_back(tmp_path):
    Run.create(tmp_path, "x", {})
    Run.open(tmp_path / "x").lock()
    Run.open(tmp_path / "x").lock()


WRITER = """
import sys, itertools, numpy as np
from evoopt.run.folder import Run
run = Run.create(sys.argv[1], "killed", {})
for g in itertools.count():
    run.append([{"generation": g, "evaluations": g}])
    run.save({"x": np.full(10_000, float(g)), "g": g}, g)
    print(g, flush=True)
"""


def test_a_killed_run_is_resumed(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        while int(writer.stdout.readline()) < 3:
            pass
        with pytest.raises(BlockingIOError) as caught:
            Run.open(tmp_path / "killed").append([row(0)])
        assert_three_parts(caught, f"process {writer.pid} writes it")
        time.sleep(0.05)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    with Run.open(tmp_path / "killed") as run:
        found = run.load({"x": np.zeros(10_000), "g": 0})
        assert (found.tree["x"] == found.tree["g"]).all()
        assert found.step == found.tree["g"] >= 3
        run.truncate(found.step)
        run.append([row(found.step + 1)])
        assert [r["generation"] for r in run.metrics()] == list(range(found.step + 2))
        run.save(found.tree, found.step + 1)


# ---- curves ----


def pixels(path):
    matplotlib = pytest.importorskip("matplotlib.image")
    return matplotlib.imread(path)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0)],
        [row(g) for g in range(30)],
        [row(g, steps=1000 * g, q25=1.0, q75=2.0) for g in range(3)],
        [row(g, best=math.nan, mean=math.inf, worst=-math.inf, best_so_far=math.nan) for g in range(3)],
        [{"generation": g} for g in range(3)],
        [row(g, **dict.fromkeys(("best", "mean", "worst", "best_so_far"), 10.0 ** (-g))) for g in range(9)],
    ],
    ids=["none", "one", "many", "steps", "nothing finite", "nothing at all", "decades"],
)
def test_curves_are_drawn(tmp_path, rows):
    imported = set(sys.modules)
    with Run.create(tmp_path, "a $name_1", {"display": "return" if len(rows) == 30 else "value"}) as run:
        run.append(rows)
    path = Run.open(run.path).plot()
    assert path == run.path / "curves.png"
    assert pixels(path).shape == (720, 1200, 4)
    assert "matplotlib.pyplot" not in set(sys.modules) - imported


def drawn(rows, returns=False, held_out=()):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from evoopt.run.curves import draw

    draw(axes := figure.add_subplot(), rows, "name", returns, dict(held_out))
    return axes, {line.get_label(): line for line in axes.lines}


def test_what_the_curves_show():
    rows = [row(g, steps=1000 * g) for g in range(20)]
    axes, lines = drawn(rows)
    assert axes.get_yscale() == "linear"
    assert "value" in axes.get_ylabel()
    assert axes.get_xlabel() == "environment steps"
    assert lines["best so far"].get_xdata().tolist() == [1000 * g for g in range(20)]
    assert lines["mean"].get_ydata().tolist() == [r["mean"] for r in rows]
    axes, lines = drawn(rows, returns=True)
    assert "return" in axes.get_ylabel()
    assert lines["mean"].get_ydata().tolist() == [-r["mean"] for r in rows]
    assert drawn([row(0), row(2000)])[0].get_yscale() == "log"
    assert drawn([row(0), row(2000)], returns=True)[0].get_yscale() == "linear"
    assert drawn([row(0), row(2000, best=-1.0)])[0].get_yscale() == "linear"
    assert drawn([row(0), row(1)])[0].get_xlabel() == "evaluations"


def test_the_held_out_split_is_drawn_over_the_batches(tmp_path):
    pytest.importorskip("matplotlib.figure")
    rows = [row(g) for g in range(1, 21)]
    _, lines = drawn(rows, held_out={0: 0.9, 10: 0.6, 20: 0.7})
    assert sorted(lines) == ["batches", "held out"]
    at = [0, rows[9]["evaluations"], rows[19]["evaluations"]]
    assert list(lines["held out"].get_xdata()) == at
    assert lines["held out"].get_ydata().tolist() == [0.9, 0.6, 0.7]
    found = '{"generation": 0, "loss": null, "accuracy": 0.5, "metric": 0.25}\n'
    found += '{"generation": 3, "loss": 0.4, "accuracy": 1}\n'
    for metric, expected in (("loss", {3: 0.4}), ("accuracy", {0: -0.5, 3: -1}), ("mine:f", {0: -0.25})):
        with Run.create(tmp_path, metric[:4], {"metric": metric}) as run:
            (run.path / "evaluations.jsonl").write_text(found)
            assert held_out(run.config, run.rows("evaluations.jsonl")) == expected
            run.append(rows)
            assert run.plot().exists()


def test_an_outlier_does_not_press_the_curves_flat():
    axes, _ = drawn([row(g, worst=1e9 if g == 3 else 500.0) for g in range(20)])
    assert axes.get_ylim()[1] < 500


def test_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError) as caught:
        run.plot()
    assert_three_parts(caught, "pip install evoopt-jax[plots]")
