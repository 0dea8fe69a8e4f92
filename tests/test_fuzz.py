"""Whatever bytes a file has, its reader answers or refuses in three parts: 300 damaged copies of each format."""

import hashlib
import importlib
import json
import os
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutations import answered_or_refused, json_mutations, mutations

from evoopt.cli import evolve, parts, shared
from evoopt.cli.main import main
from evoopt.run import checkpoint, identity, trajectory
from evoopt.run.folder import Run
from evoopt.strategies import mezo

STATE = {
    "mean": jnp.arange(3.0),
    "key": jax.random.key(0),
    "n": jnp.int32(4),
    "seconds": 1.5,
    "empty": np.zeros(0),
}
LIKE = jax.eval_shape(lambda: STATE) | {"seconds": 0.0, "empty": np.zeros(0)}
CONFIG = {
    "objective": "gymnax:CartPole-v1", "strategy": "snes", "popsize": 8, "policy": "mlp", "budget": "10", "seed": 0,
    "target": None, "settings": {"sigma": "0.1", "noise": "gaussian"}, "display": "return", "micro_batch": 4,
}  # fmt: skip
TUNING = {
    "objective": "finetune-model", "model": "m", "data": "d", "eval": None, "prompt": None, "candidates": {"good": "x"},
    "task": "similarity", "metric": "loss", "train": "full", "strategy": "mezo", "popsize": None, "budget": "10",
    "batch_size": 16, "micro_batch": None, "dtype": "float32", "update": "stochastic", "schedule": "constant",
    "eval_every": 100, "patience": 20, "seed": 0, "settings": {"sigma": "0.1"}, "display": "value",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Nobody pulls the plug here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def forged(body: bytes, head: str) -> bytes:
    """A body under a checksum that fits."""
    return head.replace("SUM", hashlib.sha256(body).hexdigest()).encode() + body


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path, STATE, step=1, meta={"seconds": 3.5})
    return tmp_path, checkpoint.save(tmp_path, STATE | {"n": jnp.int32(5)}, step=2, meta={"seconds": 4.5})


def check_load(folder: Path, exact: bool) -> str:
    """The state of step 2, or a named warning and that of step 1; a refusal, which only another format deserves."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = answered_or_refused(lambda: checkpoint.load(folder, LIKE))
    if found is None:
        return "refused"
    assert len(caught) == len(found.skipped) == 2 - found.step
    assert all("step-00000002' was passed over: " in str(w.message) for w in caught)
    if exact or found.step == 1:
        assert checkpoint.digest(found.tree) == checkpoint.digest(STATE | {"n": jnp.int32(3 + found.step)})
    assert type(found.meta) is dict
    return "read" if found.step == 2 else "passed over"


@pytest.mark.parametrize("name", ["manifest.json", "arrays.bin"])
def test_a_damaged_checkpoint_is_passed_over(saved, name):
    folder, newer = saved
    whole = (newer / name).read_bytes()
    for data in mutations(whole, seed=1, count=150):
        (newer / name).write_bytes(data)
        assert check_load(folder, exact=True) == ("read" if data == whole else "passed over")


def test_a_forged_manifest_is_passed_over_or_refused(saved):
    folder, newer = saved
    text = (newer / "manifest.json").read_bytes()
    body = b"{" + text[len(b'{"sha256": "",') + 64 :]
    outcomes = []
    for data in json_mutations(body, seed=2):
        (newer / "manifest.json").write_bytes(forged(data[1:], '{"sha256": "SUM",'))
        outcomes.append(check_load(folder, exact=True))
    assert min(map(outcomes.count, ("read", "passed over", "refused"))) > 20


@pytest.fixture
def told(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    start = jnp.arange(3.0)
    made = trajectory.record(mezo(), start, 3, values, end=start, settings={"task": "x", "rank": 4})
    return trajectory.write(tmp_path / "trajectory.bin", made), made


def test_a_damaged_trajectory_is_refused(told):
    path, _ = told
    whole = path.read_bytes()
    for data in mutations(whole, seed=3):
        path.write_bytes(data)
        assert (answered_or_refused(lambda: trajectory.read(path)) is None) == (data != whole)


def test_a_forged_trajectory_is_read_as_one_or_refused(told):
    path, made = told
    text, _, data = path.read_bytes().split(b"\n", 1)[1].partition(b"\n")
    read = 0
    for header in json_mutations(text, seed=4):
        path.write_bytes(forged(header + b"\n" + data, "SUM\n"))
        found = answered_or_refused(lambda: trajectory.read(path))
        if found is not None:
            read += 1
            assert found.values.tobytes() == made.values.tobytes()
            assert {type(x) for x in (found.start, found.strategy, found.end, found.generator)} == {str}
            assert all(type(word) is int and 0 <= word < 2**32 for word in found.key)
            assert type(found.settings) is type(found.versions) is dict
            answered_or_refused(lambda found=found: trajectory.replay(found, mezo(), jnp.zeros(3)))
    assert 20 < read < 200


@pytest.fixture
def run(tmp_path):
    with Run.create(tmp_path, "run", CONFIG) as run:
        yield run


@pytest.mark.parametrize("damage", [mutations, json_mutations])
def test_a_damaged_config_is_read_or_refused(run, damage):
    path = run.path / "config.json"
    for data in damage(path.read_bytes(), seed=5):
        path.write_bytes(data)
        found = answered_or_refused(lambda: Run.open(run.path))
        assert found is None or type(found.config) is dict is type(found.versions)


@pytest.mark.parametrize(("config", "kinds"), [(CONFIG, evolve.KINDS), (TUNING, parts.KINDS)])
def test_the_settings_of_a_run_are_of_their_kinds(config, kinds):
    kept = 0
    for data in json_mutations(json.dumps(config), seed=8):
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            continue
        if answered_or_refused(lambda found=found: shared.checked(found, kinds, "x") or True):
            kept += 1
            if config is CONFIG:
                answered_or_refused(lambda found=found: shared.budget(found["budget"]))
                for name in ("strategy", "policy"):
                    answered_or_refused(lambda found=found, name=name: shared.one_of(name, found[name], ["a", "b"]))
    assert 20 < kept < 200


@pytest.mark.parametrize("found", [{"members": "4"}, {"members": 0}, {"members": None}, {"devices": 1}])
def test_what_a_run_may_leave_out_is_of_its_kind_where_it_is_said(found):
    shared.checked(TUNING | {"members": 4, "devices": True}, parts.KINDS, "x")
    name = next(iter(found))
    with pytest.raises(ValueError, match=rf'"{name}" is .*\nusual cause: '):
        shared.checked(TUNING | found, parts.KINDS, "x")


def test_what_is_noted_with_a_checkpoint_is_of_its_kinds(run):
    """Totals, seconds and what run it is: read where a run is continued."""
    module = importlib.import_module("evoopt.run.continuing")
    now = identity.of_run(mezo(), jax.random.key(0), jnp.zeros(3))
    meta = json.dumps({"seconds": 1.5, "offset": 2.0, "totals": {"evaluations": 40, "steps": 1000}, "identity": now})
    read = 0
    for data in json_mutations(meta, seed=9):
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            continue

        def resumed(found=found):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # another Python
                module._check_meta(run, found)
                module._same_run(run, found.get("identity"), now)
            return True

        read += answered_or_refused(resumed) is True
    assert 5 < read < 250


def rows() -> list[bytes]:
    row = {"evaluations": 8, "best": 0.5, "mean": 1.0, "worst": None, "best_so_far": 0.5, "answered": 8, "seconds": 0.1}
    return [json.dumps({"generation": g, **row, "values": [1.0, None, "Infinity"]}).encode() for g in range(6)]


def read_rows(run: Run, data: bytes) -> list[dict]:
    (run.path / "metrics.jsonl").write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run.metrics()
        run.truncate(3)
        assert repr(run.metrics()) == repr([row for row in found if row["generation"] <= 3])
    assert len(caught) <= 8  # a file of another kind has no warning for each of its lines
    for row in found:
        assert type(row["generation"]) is int
        assert row["generation"] >= 0
        for name in ("evaluations", "best", "mean", "best_so_far", "answered", "seconds"):
            assert type(row.get(name, 0)) in (int, float) or name in ("best", "mean", "best_so_far")
    return found


def test_damaged_metrics_lose_the_lines_that_were_damaged(run):
    whole = b"\n".join(rows()) + b"\n"
    for data in mutations(whole, seed=6):
        read_rows(run, data)


def test_metrics_of_another_kind_lose_the_rows_that_are_none(run):
    first, *others = rows()
    for number, line in enumerate(json_mutations(first, seed=7)):
        found = read_rows(run, b"\n".join([line, *others, b""]))
        assert [row["generation"] for row in found[-5:]] == [1, 2, 3, 4, 5]
        if number % 150 == 0:
            run.plot()


# ---- nothing leads out of a folder, nothing waits ----


def replace(path: Path, by: str, tmp_path: Path) -> Path:
    """`path` becomes a link to the same bytes elsewhere, a pipe, or a folder; what a link leads to."""
    elsewhere = tmp_path / "elsewhere"
    if by == "link":
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    elif by == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.unlink()
        path.mkdir()
    return elsewhere


@pytest.mark.parametrize("by", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["manifest.json", "arrays.bin", ""])
def test_a_checkpoint_is_its_own_files(saved, tmp_path, name, by):
    folder, newer = saved
    if not name and by != "link":
        return
    replace(newer / name, by, tmp_path)
    assert check_load(folder, exact=True) == "passed over"


@pytest.mark.parametrize("by", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "evaluations.jsonl"])
def test_a_run_reads_its_own_files(run, tmp_path, name, by):
    (run.path / "evaluations.jsonl").write_text('{"generation": 0, "loss": 1.5}\n')
    replace(run.path / name, by, tmp_path)
    read = {"config.json": lambda: Run.open(run.path), "metrics.jsonl": run.metrics, "evaluations.jsonl": run.plot}
    with pytest.raises(OSError, match=r"a link to|something else") as caught:
        read[name]()
    assert answered_or_refused(read[name]) is None, caught


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "checkpoints", "checkpoints/step-00000001.tmp", "model"])
def test_a_run_writes_into_its_own_folder(tmp_path, name):
    victim = tmp_path / "victim"
    Run.create(tmp_path, "run", CONFIG).close()
    run, link = Run.open(tmp_path / "run"), tmp_path / "run" / name
    if link.is_dir():
        link.rmdir()
    link.unlink(missing_ok=True)
    victim.mkdir() if "." not in name and name != "lock" else victim.write_text("mine")
    before = os.stat(victim)
    link.symlink_to(victim)
    for write in (run.lock, lambda: run.append([{"generation": 0}]), lambda: run.save({"x": np.zeros(1)}, step=1)):
        with pytest.raises(OSError, match="without links out of it"):
            write()
    assert os.stat(victim) == before
    assert victim.is_dir() or victim.read_text() == "mine"


def test_a_link_in_the_way_of_a_file_is_replaced(tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in ("x", "x.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    checkpoint.write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_run_folder_may_be_reached_by_a_link(run, tmp_path):
    run.append([{"generation": 0}])
    run.close()
    (tmp_path / "latest").symlink_to(run.path)
    (run.path / "newest").symlink_to("checkpoints")  # leads nowhere else
    with Run.open(tmp_path / "latest") as again:
        again.append([{"generation": 1}])
        assert len(again.metrics()) == 2


def test_a_huge_file_of_holes_is_refused_at_once(run, saved, told):
    folder, newer = saved
    for path in (newer / "manifest.json", newer / "arrays.bin", run.path / "config.json", told[0], run._metrics):
        os.truncate(path, 1 << 40)
    assert answered_or_refused(run.metrics) is answered_or_refused(lambda: trajectory.read(told[0])) is None
    assert check_load(folder, exact=True) == "passed over"
    assert answered_or_refused(lambda: Run.open(run.path)) is None


@pytest.mark.parametrize("at", range(6))
def test_a_full_disk_leaves_no_half_run(tmp_path, monkeypatch, at):
    calls = []

    def full(real):
        def call(*args, **kwargs):
            calls.append(real)
            if len(calls) == at + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    for name in ("ftruncate", "pwrite"):
        monkeypatch.setattr(os, name, full(getattr(os, name)))
    for name in ("_fsync", "_rename"):
        monkeypatch.setattr(checkpoint, name, full(getattr(checkpoint, name)))
    with pytest.raises(OSError, match="No space left on device") as caught:
        Run.create(tmp_path, None, CONFIG)
    assert answered_or_refused(lambda: (_ for _ in ()).throw(caught.value)) is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["resume", "replay"])
@pytest.mark.parametrize("name", ["objective", "strategy", "policy", "noise", "utility", "optimizer", "budget"])
def test_a_run_of_somebody_else_names_no_code(tmp_path, monkeypatch, capsys, command, name):
    (tmp_path / "stranger.py").write_text("raise SystemExit('code of a stranger')")
    monkeypatch.syspath_prepend(tmp_path)
    place = {"noise": "settings", "utility": "settings", "optimizer": "settings"}.get(name)
    prefix = {"objective": "brax:" if command == "replay" else "", "strategy": "evosax:"}.get(name, "")
    for word in ("stranger", "stranger:f", "stranger.f", "__import__"):
        given = {name: prefix + word}
        config = CONFIG | {"objective": "brax:fast" if command == "replay" else "gymnax:CartPole-v1"}
        config |= {"strategy": "openai_es"}
        Run.create(tmp_path, None, config | ({place: given} if place else given)).close()
        with pytest.raises(SystemExit) as caught:
            main([command, str(max(tmp_path.glob("*/config.json"), key=os.path.getmtime).parent)])
        assert caught.value.code == 2
    assert capsys.readouterr().err.count("usual cause: ") == 4
    assert "stranger" not in sys.modules
