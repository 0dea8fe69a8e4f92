"""Checkpoints of any pytree of arrays: raw bytes and a JSON manifest, with nothing that could run code when read.

A checkpoint is a folder `step-00000123/` with `arrays.bin` (the leaves' bytes, one after another) and `manifest.json`.
It is written under another name, made durable, then renamed: a kill or a power cut leaves either the old checkpoint or
the new one. Only one process writes a folder at a time (`evoopt.Run` has a lock for that); any number may read it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.reading import LIMIT, contents, document, field, opened, short, writing
from evoopt.trees import path_name
from evoopt.types import error

FORMAT = 1  # checkpoint format; in every format manifest.json begins with the sha256 of the rest and has "format"
_NAME = re.compile(r"step-([0-9]{8,})(\.old)?")  # .old: about to be replaced by a newer one of the same step
_PYTHON = (bool, int, float, complex)


class Checkpoint(NamedTuple):
    """What `load` found; `skipped` has one sentence for each newer, corrupt checkpoint that was passed over."""

    step: int
    tree: Any
    meta: dict[str, Any]
    skipped: list[str]


class _CorruptError(Exception):
    pass


def _fsync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut. Tests replace this one and `_rename`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(old: Path, new: Path) -> None:
    os.rename(old, new)


def write_file(path: Path, data: bytes) -> None:
    """Replace the file `path` with `data`, durably, and either whole or not at all. A link there is not followed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        file.write(data)
    _fsync(temporary)
    _rename(temporary, path)
    _fsync(path.parent)


def versions() -> dict[str, str]:
    """The versions that results depend on, for the record."""
    try:
        own = importlib.metadata.version("evoopt-jax")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"evoopt": own, "jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}


def save(folder: str | Path, tree: Any, *, step: int, meta: dict[str, Any] | None = None, keep: int = 3) -> Path:
    """Write `tree` (arrays, typed PRNG keys, Python numbers) and `meta` (JSON, NaN allowed) as `folder/step-.../`.

    A checkpoint of the same step is replaced. The last `keep` of the steps up to this one stay; later ones, left from
    before a restart at an earlier step, are not touched.

    Raises:
        TypeError: if a leaf is not a number or key, or `meta` is not JSON.
        ValueError: if `step` is below 0 or `keep` below 1.
        OSError: if the folder cannot be written; the checkpoints it held are still there.

    >>> import tempfile
    >>> state = {"mean": jnp.arange(3.0), "key": jax.random.key(0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, state, step=7, meta={"best": 0.5})
    ...     found = load(folder, jax.eval_shape(lambda: state))
    >>> path.name, found.step, found.meta, digest(found.tree) == digest(state)
    ('step-00000007', 7, {'best': 0.5}, True)
    """
    step = operator.index(step)  # accepts a NumPy or JAX integer, but not 2.5
    if step < 0 or keep < 1:
        cause = "keep=0 would remove the checkpoint that was just written"
        raise error("step >= 0 and keep >= 1", f"step={step}, keep={keep}", cause)
    manifest = {"format": FORMAT, "versions": versions(), "step": step, "meta": meta or {}, "leaves": _specs(tree)}
    try:
        json.dumps(meta)
    except (TypeError, ValueError) as reason:
        cause = "arrays belong in the tree; numpy numbers need float(...) or int(...)"
        raise error("plain JSON as meta", str(reason), cause, TypeError) from reason
    target = Path(folder) / f"step-{step:08d}"
    with writing(target):
        _write(target, tree, manifest)
        _clean(target.parent, [s for s in steps(folder) if s <= step][-keep:][0])
    return target


def load(
    folder: str | Path, like: Any, *, step: int | None = None, check: Callable[[dict[str, Any]], Any] | None = None
) -> Checkpoint:
    """Read the newest intact checkpoint in `folder`, or that of `step`; corrupt ones are passed over with a warning.

    `like` is a tree of the same structure: arrays, or their shapes from `jax.eval_shape`. Its numpy arrays and Python
    numbers are restored as such, all other leaves as JAX arrays, spread over several devices if those of `like` are.
    `check` is called with the checkpoint's meta before anything else is looked at. It may raise, or return the tree
    that is the like of this checkpoint, where checkpoints differ.

    Raises:
        FileNotFoundError: if there is no checkpoint, or none of `step`.
        ValueError: if all are corrupt, or the newest intact one has another format, or other leaves, shapes or dtypes
            than `like`. Nothing is deleted or changed.
    """
    found = [(s, path) for s, path in _found(Path(folder)) if step is None or s == step]
    if not found:
        wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        got = f"steps {', '.join(map(str, steps(folder)))}" if steps(folder) else "none, or no such folder"
        cause = "another folder than the run wrote to, or a run that ended before its first checkpoint"
        raise error(f"{wanted} in '{folder}'", got, cause, FileNotFoundError)
    skipped = []
    for s, path in found:
        try:
            manifest = _manifest(path, s)
            other = None if check is None else check(manifest["meta"])
            alike = like if other is None else other
            _compare(path, manifest["leaves"], alike)
            tree = _arrays(path / "arrays.bin", manifest["leaves"], alike)
        except (_CorruptError, OSError) as reason:
            sentence = "; ".join(str(reason).splitlines())  # the reason may itself have three parts
            skipped.append(f"the checkpoint '{path}' was passed over: {sentence}")
            continue
        for sentence in skipped:
            warnings.warn(sentence, stacklevel=2)
        return Checkpoint(s, tree, manifest["meta"], skipped)
    cause = "a copy that was cut short, or a failing disk; nothing was deleted"
    raise error(f"an intact checkpoint in '{folder}'", "; ".join(skipped), cause)


def steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in `folder`, ascending, intact or not; empty if there is no such folder."""
    return sorted({s for s, _ in _found(Path(folder))})


def latest(folder: str | Path) -> int | None:
    """The highest of `steps`."""
    return max(steps(folder), default=None)


def digest(tree: Any) -> str:
    """A sha256 over every leaf's path, dtype, shape and bytes: equal if two states are equal, bit for bit.

    >>> digest({"x": jnp.float32(0.0)}) == digest({"x": jnp.float32(-0.0)})
    False
    """
    total = hashlib.sha256()
    for spec, leaf in zip(_specs(tree), jax.tree.leaves(tree), strict=True):
        total.update(json.dumps(spec).encode() + b"\n")
        total.update(_bytes(leaf))
    return total.hexdigest()


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint, newest first; one being replaced comes after its replacement."""
    matches = [(_NAME.fullmatch(name), folder / name) for name in (os.listdir(folder) if folder.is_dir() else [])]
    return sorted(((int(m[1]), p) for m, p in matches if m), key=lambda x: (-x[0], x[1].suffix))


def _write(target: Path, tree: Any, manifest: dict[str, Any]) -> None:
    temporary, folder = target.with_suffix(".tmp"), target.parent
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for p in made:
        _fsync(p.parent)
    _clean(folder, 0)
    temporary.mkdir()
    try:
        with open(temporary / "arrays.bin", "wb") as file:
            for spec, leaf in zip(manifest["leaves"], jax.tree.leaves(tree), strict=True):
                data = _bytes(leaf)
                file.write(data)
                spec["sha256"] = hashlib.sha256(data).hexdigest()
        body = json.dumps(manifest, indent=1)[1:].encode()
        if len(body) > LIMIT - 100:  # too long to be read again
            got, cause = f"{len(body):,}", "arrays as lists in meta; they belong in the tree"
            raise error(f"a manifest of less than {LIMIT:,} bytes", got, cause)
        (temporary / "manifest.json").write_bytes(_head(body) + body)
        for path in (temporary / "arrays.bin", temporary / "manifest.json", temporary):
            _fsync(path)
        if target.exists():  # a folder cannot be renamed over another: the old one moves aside, where `load` finds it
            _rename(target, target.with_suffix(".old"))
        _rename(temporary, target)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # frees a full disk
        raise
    _fsync(folder)


def _clean(folder: Path, first: int) -> None:
    """Remove checkpoints before step `first`, replaced ones, and the unfinished remains of a kill."""
    for left_over in folder.glob("step-*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    for s, path in _found(folder):
        if s < first or (path.suffix and path.with_suffix("").exists()):
            doomed = path.with_name(path.name + ".tmp")  # a half-removed one must not look like a checkpoint
            _rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _specs(tree: Any) -> list[dict[str, Any]]:
    """Path, shape and dtype of each leaf, and a key's implementation, which only an array knows."""
    specs = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf) if type(leaf) in _PYTHON else leaf
        dtype = getattr(array, "dtype", None)
        good = _is_key(array) or (dtype is not None and (jnp.issubdtype(dtype, np.number) or dtype == np.bool_))
        if not good or (type(leaf) is int and leaf.bit_length() > 63):
            cause = "functions and strings in a state: declare such fields static(); integers must fit in 64 bits"
            got = f"{type(leaf).__name__}, dtype {dtype}"
            raise error(f"an array, a key or a number at '{path_name(path)}'", got, cause, TypeError)
        specs.append({"path": path_name(path), "shape": list(array.shape), "dtype": array.dtype.name})
        if _is_key(array) and isinstance(array, jax.Array):
            specs[-1]["prng"] = str(jax.random.key_impl(array))
    return specs


def _bytes(leaf: Any) -> memoryview:
    """The leaf's bytes, in C order and native byte order."""
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    return np.ascontiguousarray(array, dtype=array.dtype.name).reshape(-1).view(np.uint8).data


def _head(body: bytes) -> bytes:
    return b'{"sha256": "%s",' % hashlib.sha256(body).hexdigest().encode()


def _manifest(path: Path, step: int) -> dict[str, Any]:
    if path.is_symlink():
        raise _CorruptError("it is a link")
    try:
        text = contents(path / "manifest.json")
        size = len(_head(b""))
        if text[:size] != _head(text[size:]):
            raise _CorruptError("manifest.json does not match its checksum")
        manifest = document(text)
        found = field(manifest, "format", int)
        if found == FORMAT:
            _check_manifest(manifest, step)
            return manifest
    except ValueError as reason:
        raise _CorruptError(f"manifest.json: {reason}") from reason
    writer = manifest.get("versions")
    writer = short(writer.get("evoopt")) if type(writer) is dict else "unknown"
    got = f"format {short(found)} in '{path}', by evoopt {writer}"
    cause = f"another version of evoopt wrote it (here: {versions()['evoopt']}); use that one"
    raise error(f"a checkpoint of format {FORMAT}", got, cause)


def _check_manifest(manifest: dict[str, Any], step: int) -> None:
    """Check that a manifest has everything needed later. Its checksum shows damage, not who wrote it.

    Raises:
        ValueError: naming what is missing or wrong.
    """
    if field(manifest, "step", int) != step:
        raise ValueError(f"it is of step {short(manifest['step'])}")
    field(manifest, "meta", dict)
    for leaf in field(manifest, "leaves", list):
        for name in ("path", "dtype", "sha256"):
            field(leaf, name, str)
        field(leaf, "prng", str, default=None)
        shape = field(leaf, "shape", list)
        if not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise ValueError(f"the shape {short(shape)} of {short(leaf['path'])}")


def _compare(path: Path, specs: list[dict[str, Any]], like: Any) -> None:
    there = [(s["path"], f"{s['dtype']}{s['shape']}") for s in specs]
    here = [(s["path"], f"{s['dtype']}{s['shape']}") for s in _specs(like)]
    if here != there:
        saved, wanted = dict(there), dict(here)
        names = [n for n in wanted | saved if wanted.get(n) != saved.get(n)]
        cut = lambda text: text if len(text) <= 160 else f"{text[:160]}..."
        differ = [
            f"'{cut(n)}' is {cut(saved.get(n, 'absent'))} there, {wanted.get(n, 'absent')} here" for n in names[:3]
        ]
        differ += [f"{len(names) - 3} more"] * (len(names) > 3) or ["the order of leaves"] * (not names)
        cause = "another strategy, popsize, model or jax_enable_x64 than the run was started with"
        raise error(f"this tree's {len(here)} leaves in '{path}'", "; ".join(differ), cause)


def _arrays(path: Path, specs: list[dict[str, Any]], like: Any) -> Any:
    leaves, treedef = jax.tree.flatten(like)
    with opened(path) as file:
        size, wanted = os.fstat(file.fileno()).st_size, sum(map(_size, leaves))
        if size != wanted:  # checked before anything is allocated
            how = "longer" if size > wanted else "shorter"
            raise _CorruptError(f"arrays.bin is {how} than was written: {size:,} bytes, not {wanted:,}")
        restored = [_read(file, spec, leaf) for spec, leaf in zip(specs, leaves, strict=True)]
    return treedef.unflatten(restored)


def _stored(like: Any) -> Any:
    """Shape and dtype in the file of a leaf like this."""
    if type(like) in _PYTHON:
        return np.asarray(like)
    return jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like


def _size(like: Any) -> int:
    stored = _stored(like)
    return math.prod(stored.shape) * np.dtype(stored.dtype).itemsize


def _read(file: Any, spec: dict[str, Any], like: Any) -> Any:
    """The next leaf, checked. The size allocated follows from `like`, never from the file."""
    stored = _stored(like)
    array = np.empty(stored.shape, stored.dtype.name)
    data = array.reshape(-1).view(np.uint8).data
    if file.readinto(data) != data.nbytes:
        raise _CorruptError("arrays.bin is shorter than was written")
    if hashlib.sha256(data).hexdigest() != spec["sha256"]:
        raise _CorruptError(f"arrays.bin does not match its checksum at '{spec['path']}'")
    if type(like) in _PYTHON:
        return array.item()
    if isinstance(like, (np.ndarray, np.generic)):
        return array if isinstance(like, np.ndarray) else array[()]
    if (possible := jax.dtypes.canonicalize_dtype(array.dtype)) != array.dtype:
        cause = "jax_enable_x64 is off here and was on when the checkpoint was written"
        raise error(f"to restore {array.dtype} at '{spec['path']}'", f"{possible} only", cause)
    value = _wrapped(array, spec, like) if _is_key(like) else array
    sharding = getattr(like, "sharding", None)
    # A leaf that was on one device is not pinned to it: a pinned leaf could not meet arrays elsewhere.
    spread = sharding if sharding is not None and len(sharding.device_set) > 1 else None
    return jax.device_put(value, spread, may_alias=False)


def _wrapped(array: np.ndarray, spec: dict[str, Any], like: Any) -> Any:
    """Keys like `like`, of the implementation named in the manifest."""
    try:
        keys = jax.random.wrap_key_data(jnp.array(array), impl=spec["prng"])
    except (KeyError, TypeError, ValueError):
        keys = array
    if keys.dtype != like.dtype:
        raise _CorruptError(f"manifest.json: no keys {like.dtype} by {short(spec.get('prng'))} at '{spec['path']}'")
    return keys
