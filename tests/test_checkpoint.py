"""Checkpoints: bit for bit, never garbage, never silent."""

import ast
import contextlib
import inspect
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import types
from evoopt.run import checkpoint
from evoopt.run.checkpoint import digest, latest, load, save, steps

PARTS = ("expected ", "\ngot ", "\nusual cause: ")
FLOATS = ["float16", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
INTEGERS = ["int8", "int16", "int32", "uint8", "uint16", "uint32", "int4", "bool"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Nobody pulls the plug here: that `_fsync` is called is tested, that the disk obeys is not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@types.pytree
class State:
    mean: jax.Array
    key: jax.Array
    counts: dict


def state(seed: int = 0) -> State:
    return State(
        mean=jnp.arange(3.0) + seed + 0.5,
        key=jax.random.key(seed),
        counts={"n": jnp.int32(seed), "empty": jnp.zeros((0, 2)), "flag": jnp.array(True)},
    )


def assert_three_parts(caught, *words):
    message = str(caught.value)
    assert all(part in message for part in PARTS), message
    for word in words:
        assert word in message, (word, message)


def bits(dtype: str, n: int, seed: int = 0) -> np.ndarray:
    """Random bit patterns, so also NaN with payloads, -0.0 and subnormal numbers."""
    raw = np.random.default_rng(seed).integers(0, 256, n * jnp.dtype(dtype).itemsize, dtype=np.uint8)
    return raw.view(jnp.dtype(dtype))


# ---- the way there and back ----


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (4, 128)])
def test_floats_come_back_bit_for_bit(tmp_path, dtype, shape):
    tree = {"x": jnp.asarray(bits(dtype, math.prod(shape)).reshape(shape))}
    save(tmp_path, tree, step=0)
    for like in (tree, jax.eval_shape(lambda: tree)):
        x = load(tmp_path, like).tree["x"]
        assert isinstance(x, jax.Array)
        assert (x.dtype, x.shape, x.weak_type) == (tree["x"].dtype, shape, False)
        assert np.asarray(x).tobytes() == np.asarray(tree["x"]).tobytes()


def test_special_floats_come_back_bit_for_bit(tmp_path):
    patterns = np.array([0x7FC00001, 0x7FA00001, 0xFFC12345, 0x80000000, 0x00000001, 0x7F800000, 0xFF800000], np.uint32)
    tree = [
        jnp.asarray(patterns.view(np.float32)),
        patterns.view(np.float32),
    ]  # NaN with payloads, -0.0, subnormal, inf
    save(tmp_path, tree, step=0)
    for x in load(tmp_path, tree).tree:
        assert np.asarray(x).view(np.uint32).tolist() == patterns.tolist()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_and_bools_come_back(tmp_path, dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 8, (3, 5)), dtype)
    save(tmp_path, x, step=0)
    back = load(tmp_path, x).tree
    assert back.dtype == x.dtype
    assert digest(back) == digest(x)


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_64_bits_under_x64(tmp_path, dtype):
    with jax.enable_x64(True):
        tree = {"x": jnp.asarray(bits(dtype, 7))}
        save(tmp_path, tree, step=0)
        assert digest(load(tmp_path, tree).tree) == digest(tree)
    assert load(tmp_path, {"x": np.zeros(7, dtype)}).tree["x"].tobytes() == bits(dtype, 7).tobytes()
    with pytest.raises(ValueError, match="x64") as caught:  # never rounded to 32 bits in silence
        load(tmp_path, {"x": jax.ShapeDtypeStruct((7,), dtype)})
    assert_three_parts(caught, dtype)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_come_back_as_keys(tmp_path, impl):
    tree = {"one": jax.random.key(3, impl=impl), "many": jax.random.split(jax.random.key(4, impl=impl), (2, 3))}
    save(tmp_path, tree, step=0)
    for like in (tree, jax.eval_shape(lambda: tree)):
        back = load(tmp_path, like).tree
        assert jax.random.key_impl(back["one"]) == impl
        assert digest(back) == digest(tree)
        assert (jax.random.normal(back["many"][1, 2]) == jax.random.normal(tree["many"][1, 2])).all()


def test_keys_of_another_implementation_are_refused(tmp_path):
    save(tmp_path, jax.random.key(0, impl="rbg"), step=0)
    with pytest.raises(ValueError, match="leaves") as caught:
        load(tmp_path, jax.random.key(0))
    assert_three_parts(caught, "key<rbg>[]", "key<fry>[]")


def test_numpy_and_python_leaves_keep_their_kind(tmp_path):
    nan = np.array([0x7FF8000000000123], np.uint64).view(np.float64)[0].item()
    tree = {"i": -(2**62), "f": -0.0, "nan": nan, "b": True, "c": 1 - 2j, "none": None, "generic": np.float32(1.5)}
    tree |= {"array": np.arange(4.0).reshape(2, 2).T, "big": np.arange(3, dtype=">i4"), "empty": np.zeros((0, 2))}
    save(tmp_path, tree, step=0)
    back = load(tmp_path, tree).tree
    assert {k: type(v) for k, v in back.items()} == {k: type(v) for k, v in tree.items()}
    assert digest(back) == digest(tree)
    assert math.copysign(1, back["f"]) == -1
    assert back["big"].tolist() == [0, 1, 2]
    back["array"][0, 0] = 9.0  # it can be written to


def test_leaves_over_several_devices_come_back_there(tmp_path):
    code = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from evoopt.run.checkpoint import digest, load, save
there = NamedSharding(jax.make_mesh((2,), ("i",), (jax.sharding.AxisType.Auto,)), P("i"))
spread = {{"x": jnp.arange(8.0), "k": jax.random.split(jax.random.key(0), 4)}}
tree = jax.device_put(spread, there) | {{"one": jnp.ones(3)}}
save({str(tmp_path)!r}, tree, step=0)
back = load({str(tmp_path)!r}, tree).tree
assert back["x"].sharding == there and back["k"].sharding == there and not back["one"].committed
assert digest(back) == digest(tree)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"})


def test_a_restored_array_can_be_donated(tmp_path):
    save(tmp_path, {"x": jnp.arange(1000.0)}, step=0)
    x = load(tmp_path, {"x": jnp.zeros(1000)}).tree["x"]
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(x)[-1] == 1000.0
    assert load(tmp_path, {"x": jnp.zeros(1000)}).tree["x"][-1] == 999.0


def test_meta_and_step_come_back(tmp_path):
    meta = {"best": 0.1, "none": None, "list": [1, "ä"], "nan": math.nan, "nested": {"10": 1, "9": -math.inf}}
    save(tmp_path, state(), step=np.int64(12), meta=meta)  # type: ignore[arg-type]
    found = load(tmp_path, state())
    assert (found.step, found.skipped) == (12, [])
    assert repr(found.meta) == repr(meta)
    manifest = json.loads((tmp_path / "step-00000012" / "manifest.json").read_text())
    assert manifest["format"] == checkpoint.FORMAT
    assert set(manifest["versions"]) == {"evoopt", "jax", "numpy", "python"}
    assert [leaf["path"] for leaf in manifest["leaves"]] == ["mean", "key", "counts/empty", "counts/flag", "counts/n"]
    assert manifest["leaves"][1]["prng"] == "threefry2x32"


def test_files_hold_the_bytes_and_no_code(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("loads", "load", "dumps", "dump", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    path = save(tmp_path, state(), step=0)
    load(tmp_path, state())
    leaves = jax.tree.leaves(state())
    data = [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]
    assert (path / "arrays.bin").read_bytes() == b"".join(x.tobytes() for x in data)  # no room for anything else
    assert sorted(os.listdir(path)) == ["arrays.bin", "manifest.json"]
    source = inspect.getsource(checkpoint)
    names = {
        a.name for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names
    }
    assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert "allow_pickle" not in source


# ---- which are kept, which is found ----


def test_the_last_ones_are_kept(tmp_path):
    for step in range(5):
        save(tmp_path, state(step), step=step, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    assert steps(tmp_path) == [3, 4]
    assert latest(tmp_path) == 4
    assert digest(load(tmp_path, state()).tree) == digest(state(4))
    assert digest(load(tmp_path, state(), step=3).tree) == digest(state(3))


def test_a_step_before_the_newest_is_not_removed_at_once(tmp_path):
    for step in (8, 9, 3):
        save(tmp_path, state(step), step=step, keep=1)
    assert steps(tmp_path) == [3, 9]


def test_more_than_eight_digits_are_sorted_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, state(), step=step)
    assert steps(tmp_path) == [99_999_999, 100_000_000]


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-old").mkdir()
    (tmp_path / "step-00000009.tmp").mkdir()  # left by a kill
    save(tmp_path, state(), step=1, keep=1)
    save(tmp_path, state(), step=2, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-00000002", "step-old"]


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, state(0), step=5)
    save(tmp_path, state(1), step=5)
    assert digest(load(tmp_path, state()).tree) == digest(state(1))
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_steps_of_no_folder(tmp_path):
    assert steps(tmp_path / "nothing") == []
    assert latest(tmp_path / "nothing") is None


# ---- corruption ----


@pytest.fixture
def two(tmp_path):
    """Two checkpoints, and the folder of the newer, which a test may damage."""
    save(tmp_path, state(1), step=1)
    return tmp_path, save(tmp_path, state(2), step=2)


def assert_falls_back(folder, newer, *words):
    with pytest.warns(UserWarning, match="was passed over") as caught:
        found = load(folder, state())
    assert (found.step, digest(found.tree)) == (1, digest(state(1)))
    (sentence,) = found.skipped
    assert [str(w.message) for w in caught] == [sentence]
    assert str(newer) in sentence
    assert all(word in sentence for word in words)
    assert newer.exists()


def places(whole, name):
    """Every byte of the arrays, the manifest's ends and every 17th byte between: the whole of it would take seconds."""
    n = len(whole)
    return range(n) if name == "arrays.bin" else sorted({*range(5), *range(5, n, 17), *range(n - 5, n)})


@pytest.mark.parametrize("name", ["arrays.bin", "manifest.json"])
def test_a_file_cut_anywhere_is_noticed(two, name):
    folder, newer = two
    whole = (newer / name).read_bytes()
    for size in places(whole, name):
        (newer / name).write_bytes(whole[:size])
        assert_falls_back(folder, newer, name)
    (newer / name).write_bytes(whole)
    assert load(folder, state()).step == 2


@pytest.mark.parametrize("name", ["arrays.bin", "manifest.json"])
def test_one_wrong_bit_is_noticed(two, name):
    folder, newer = two
    whole = (newer / name).read_bytes()
    rng = np.random.default_rng(0)
    for at in places(whole, name):
        wrong = bytearray(whole)
        wrong[at] ^= 1 << rng.integers(8)
        (newer / name).write_bytes(wrong)
        assert_falls_back(folder, newer, name)


@pytest.mark.parametrize("name", ["arrays.bin", "manifest.json"])
def test_missing_long_and_foreign_files_are_noticed(two, name):
    folder, newer = two
    whole = (newer / name).read_bytes()
    for other in (whole + b"\0", b"", b"{}", b"[" * 100_000, b"\xff\xfe", bytes(len(whole))):
        (newer / name).write_bytes(other)
        assert_falls_back(folder, newer, name)
    (newer / name).unlink()
    assert_falls_back(folder, newer, name)
    (newer / name).mkdir()
    assert_falls_back(folder, newer, name)


def test_a_checkpoint_under_another_steps_name_is_noticed(two):
    folder, newer = two
    shutil.rmtree(newer)
    shutil.copytree(folder / "step-00000001", newer)
    assert_falls_back(folder, newer, "step 1")


def test_no_intact_checkpoint(two):
    folder, newer = two
    (newer / "arrays.bin").unlink()
    with pytest.raises(ValueError, match="intact") as caught:
        load(folder, state(), step=2)  # that one was asked for; another will not do
    assert_three_parts(caught, "step-00000002", "arrays.bin")
    (folder / "step-00000001" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="intact") as caught:
        load(folder, state())
    assert_three_parts(caught, "step-00000001", "step-00000002")
    assert steps(folder) == [1, 2]


# ---- a kill, a power cut or a full disk at every moment ----


class Killed(BaseException):
    pass


def power_cut(folder, durable):
    """What was not fsynced is lost."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_ino not in durable:
            path.write_bytes(b"")


def interrupt(monkeypatch, folder, death, at):
    """Let the call number `at` of `_fsync` and `_rename` fail; return the calls, as they come."""
    calls, durable = [], {p.stat().st_ino for p in folder.rglob("*")}
    fsync, rename = checkpoint._fsync, checkpoint._rename

    def step(name, call, *paths):
        if len(calls) == at:
            calls.append("failed")
            if death is Killed:
                power_cut(folder, durable)
            raise death("now")
        calls.append((name, *(p.name for p in paths)))
        call(*paths)
        durable.add(paths[-1].stat().st_ino)

    monkeypatch.setattr(checkpoint, "_fsync", lambda path: step("fsync", fsync, path))
    monkeypatch.setattr(checkpoint, "_rename", lambda old, new: step("rename", rename, old, new))
    return calls


@pytest.mark.parametrize("death", [Killed, OSError])
@pytest.mark.parametrize(("before", "step"), [([1], 2), ([1, 2, 3], 4), ([2], 2), ([1, 2], 2), ([], 2)])
def test_an_interrupted_save_leaves_the_old_or_the_new(tmp_path, monkeypatch, death, before, step):
    for at in range(100):
        folder = tmp_path / str(at)
        folder.mkdir()
        for s in before:
            save(folder, state(s), step=s, keep=9)
        with monkeypatch.context() as patch:
            calls = interrupt(patch, folder, death, at)
            try:
                save(folder, state(7), step=step, keep=1)
                break
            except death as reason:
                if death is OSError:
                    assert_three_parts(type("", (), {"value": reason}), "full disk")
        assert calls[-1] == "failed"
        if before or steps(folder):
            found = load(folder, state())  # and no warning, which would be an error
            assert digest(found.tree) in (digest(state(before[-1] if before else 7)), digest(state(7)))
            committed = ("rename", f"step-{step:08d}.tmp", f"step-{step:08d}") in calls
            assert (digest(found.tree) == digest(state(7))) == committed
        save(folder, state(8), step=step, keep=1)  # the run is resumed
        assert os.listdir(folder) == [f"step-{step:08d}"]
        assert digest(load(folder, state()).tree) == digest(state(8))
    assert 4 < at < 99  # every call had its turn
    assert calls[-1] != "failed"


def test_two_interrupted_saves_of_one_step(tmp_path, monkeypatch):
    for first in range(3, 8):  # from when the old one steps aside
        for second in range(9):
            folder = tmp_path / f"{first}-{second}"
            folder.mkdir()
            save(folder, state(0), step=1)
            for number, at in ((1, first), (2, second)):
                with monkeypatch.context() as patch:
                    interrupt(patch, folder, Killed, at)
                    with contextlib.suppress(Killed):
                        save(folder, state(number), step=1)
                found = load(folder, state())
                assert digest(found.tree) in {digest(state(n)) for n in range(number + 1)}


def test_everything_is_durable_before_it_counts(tmp_path, monkeypatch):
    calls = interrupt(monkeypatch, tmp_path, Killed, None)
    save(tmp_path / "a" / "b", state(), step=1)
    assert calls == [
        ("fsync", "a"),
        ("fsync", tmp_path.name),
        ("fsync", "arrays.bin"),
        ("fsync", "manifest.json"),
        ("fsync", "step-00000001.tmp"),
        ("rename", "step-00000001.tmp", "step-00000001"),
        ("fsync", "b"),
    ]


def test_a_failed_save_frees_the_disk(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path, state(), step=1)
    assert_three_parts(caught, "step-00000001")
    assert os.listdir(tmp_path) == []


def test_write_file_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    for at in range(4):
        path.write_bytes(b"old")
        with monkeypatch.context() as patch:
            interrupt(patch, tmp_path, Killed, at)
            if at < 3:
                with pytest.raises(Killed):
                    checkpoint.write_file(path, b"new")
            else:
                checkpoint.write_file(path, b"new")
        assert path.read_bytes() == (b"old" if at < 2 else b"new")


# ---- mistakes, in three parts ----


def test_another_tree_is_refused(tmp_path):
    tree = {"layers": [{"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}], "n": jnp.int32(0)}
    path = save(tmp_path, tree, step=1)
    w, b = tree["layers"][0]["w"], tree["layers"][0]["b"]
    cases = {
        "'layers/0/w' is float32[3, 2] there, float32[4, 2] here": {
            "layers": [{"w": jnp.zeros((4, 2)), "b": b}],
            "n": tree["n"],
        },
        "'n' is int32[] there, float32[] here": tree | {"n": jnp.float32(0)},
        "'n' is int32[] there, int64[] here": tree | {"n": 0},
        "'extra' is absent there, float32[2] here": tree | {"extra": b},
        "'n' is int32[] there, absent here": {"layers": tree["layers"]},
        "'layers/0/weight' is absent there, float32[3, 2] here; 'layers/0/w' is": {
            "layers": [{"weight": w, "b": b}],
            "n": tree["n"],
        },
        "; 4 more": {str(i): b for i in range(4)},
    }
    for words, like in cases.items():
        for template in (like, jax.eval_shape(lambda like=like: like)) if "int64" not in words else (like,):
            with pytest.raises(ValueError, match="leaves in") as caught:
                load(tmp_path, template)
            assert_three_parts(caught, words, str(path))
    assert digest(load(tmp_path, tree).tree) == digest(tree)


def test_the_order_of_leaves_matters(tmp_path):
    @types.pytree
    class One:
        a: jax.Array
        b: jax.Array

    @types.pytree
    class Other:
        b: jax.Array
        a: jax.Array

    save(tmp_path, One(jnp.zeros(1), jnp.ones(1)), step=0)
    with pytest.raises(ValueError, match="the order of leaves"):
        load(tmp_path, Other(jnp.zeros(1), jnp.ones(1)))


def test_a_mismatch_is_an_error_not_a_fall_back(tmp_path):
    save(tmp_path, {"x": jnp.zeros(2)}, step=1)
    save(tmp_path, {"x": jnp.zeros(3)}, step=2)
    with pytest.raises(ValueError, match="float32"):
        load(tmp_path, {"x": jnp.zeros(2)})
    assert steps(tmp_path) == [1, 2]


def test_another_format_names_both(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    save(tmp_path, state(), step=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format") as caught:
        load(tmp_path, state())
    assert_three_parts(caught, "format 1", "format 7", "another version")
    assert steps(tmp_path) == [1]


def test_nothing_to_load(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError) as caught:
            load(folder, state())
        assert_three_parts(caught, str(folder))
    save(tmp_path, state(), step=3)
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path, state(), step=4)
    assert_three_parts(caught, "step 4", "steps 3")


@pytest.mark.parametrize("leaf", ["text", len, np.array(["a"]), np.array([None]), 2**63, -(2**64)])
def test_leaves_that_are_no_numbers_are_refused(tmp_path, leaf):
    with pytest.raises(TypeError) as caught:
        save(tmp_path / "new", {"a": [leaf]}, step=0)
    assert_three_parts(caught, "'a/0'", type(leaf).__name__)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("meta", [{"x": np.float32(1)}, {"f": len}, {(1, 2): 3}])
def test_meta_that_is_no_json_is_refused(tmp_path, meta):
    with pytest.raises(TypeError) as caught:
        save(tmp_path, state(), step=0, meta=meta)
    assert_three_parts(caught, "JSON")


def test_numbers_out_of_range_are_refused(tmp_path):
    for step, keep in ((-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="keep") as caught:
            save(tmp_path, state(), step=step, keep=keep)
        assert_three_parts(caught)
    with pytest.raises(TypeError):
        save(tmp_path, state(), step=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["file", "proc"])
def test_a_folder_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("")
    folder = "/proc/nothing" if where == "proc" else tmp_path / "file" / "under"
    with pytest.raises(OSError, match="to write") as caught:
        save(folder, state(), step=0)
    assert_three_parts(caught, str(folder))


# ---- digest ----


def test_digest_tells_states_apart():
    x = jnp.zeros(2)
    trees = [
        {"x": x},
        {"y": x},
        {"x": x, "y": x},
        {"x": jnp.zeros(3)},
        {"x": jnp.zeros((2, 1))},
        {"x": jnp.zeros(2, jnp.int32)},
        {"x": -x},
        {"x": jnp.array([0.0, jnp.nan])},
        {"x": jax.random.key(0)},
        {"x": jax.random.key(0, impl="rbg")},
        {},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest({"x": x}) == digest({"x": np.zeros(2, np.float32)}) == digest({"x": jnp.zeros(2)})


def test_no_warning_when_nothing_is_wrong(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(tmp_path, state(), step=0)
        load(tmp_path, state())
    assert not caught
