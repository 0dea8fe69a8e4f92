"""Run folders: `runs/<name>/` with `config.json`, `metrics.jsonl`, `checkpoints/` and `curves.png`."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from evoopt.checks import nearest
from evoopt.reading import LIMIT, contents, document, field, reading, writing
from evoopt.run import checkpoint, curves
from evoopt.run import rows as rowfile
from evoopt.run.checkpoint import Checkpoint, write_file
from evoopt.types import error


class Run:
    """The folder of one run. `create` makes one, `open` finds one. One process at a time writes, any number read.

    The methods that write take the folder's lock. It is released by `close`, at the end of a `with` block, or when the
    process ends, in whatever way.

    >>> import math, tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as root:
    ...     with Run.create(root, None, {"strategy": "cma_es", "seed": 0}) as run:
    ...         run.append([{"generation": 0, "best": 1.5}, {"generation": 1, "best": math.nan}])
    ...         path = run.save({"x": np.ones(3)}, step=0)
    ...         run.truncate(0)
    ...     again = Run.open(run.path)
    ...     print(again.path.name, again.config["seed"], again.metrics(), again.load({"x": np.zeros(3)}).tree)
    cma_es-1 0 [{'generation': 0, 'best': 1.5}] {'x': array([1., 1., 1.])}
    """

    def __init__(self, path: Path, config: dict[str, Any], versions: dict[str, str]):
        self.path, self.config, self.versions = path, config, versions
        self.kept: dict[str, Any] = {}  # goes into the meta of every checkpoint: totals, what run it is
        self.about: dict[str, Any] = {}  # what identifies the run in addition to the arguments of `minimize`
        self.force = False
        self._unlock: weakref.finalize | None = None

    @classmethod
    def create(cls, root: str | Path, name: str | None, config: dict[str, Any]) -> Run:
        """Make the folder `root/name` and lock it. Without a name, take a free one such as `cma_es-ant-3`.

        A free name is made from "strategy", "env" and "objective" of `config`, which is plain JSON. It is stored with
        the versions of evoopt, JAX, numpy and Python.

        Raises:
            FileExistsError: `root/name` exists and is not empty.
            OSError: it cannot be written.
            ValueError: a name with a slash, or a `config` that is not JSON.
        """
        if name is not None and (name in ("", ".", "..") or "/" in name):
            raise error("a name for a run: one folder's name", repr(name), "a path; its folder is the argument `root`")
        try:
            text = json.dumps({"config": config, "versions": checkpoint.versions()}, indent=2, allow_nan=False)
        except (TypeError, ValueError) as reason:
            cause = "an array, a function or NaN among the settings; give text, finite numbers, lists, dicts"
            raise error("plain JSON as config", str(reason), cause) from reason
        root = Path(root)
        path = root / (name or "run")
        if name is not None and path.is_dir() and any(path.iterdir()):
            cause = f"it was run before: `evoopt resume {path}` continues it; another name starts a new one"
            raise error(f"no run at '{path}' yet", "a folder that is not empty", cause, FileExistsError)
        if len(text) > LIMIT:
            raise error(
                f"a config of at most {LIMIT:,} bytes", f"{len(text):,}", "data among the settings; name a file"
            )
        with writing(path):
            root.mkdir(parents=True, exist_ok=True)
            path = _numbered(root, config) if name is None else path
            path.mkdir(exist_ok=True)
        run = cls(path, json.loads(text)["config"], checkpoint.versions())
        try:
            run.lock()
            with writing(path):
                (path / "checkpoints").mkdir(exist_ok=True)
                (path / "metrics.jsonl").touch()
                write_file(path / "config.json", text.encode())  # last: a folder with it is a whole run folder
                checkpoint._fsync(root)
        except OSError:
            run.close()
            shutil.rmtree(path, ignore_errors=True)  # it was ours and empty; half of it is of no use
            raise
        return run

    @classmethod
    def open(cls, path: str | Path, *, force: bool = False) -> Run:
        """The run in the folder `path`, to read or to resume. The lock is not taken yet.

        With `force`, `minimize` continues the run even with another strategy, key, version or device, and so with
        other bits.

        Raises:
            FileNotFoundError: no such folder, or no run in it; the message suggests similar names.
            ValueError: its config.json is damaged.
        """
        path = Path(path)
        try:
            with reading(path / "config.json"):
                found = document(contents(path / "config.json"))
            config, recorded = field(found, "config", dict), field(found, "versions", dict)
            for name in recorded:
                field(recorded, name, str)
            run = cls(path, config, recorded)
            run.force = force
            return run
        except (FileNotFoundError, NotADirectoryError):
            names = sorted(p.parent.name for p in path.parent.glob("*/config.json"))
            near = nearest(path.name, names) or names[-3:]
            got = "a folder without config.json" if path.is_dir() else "no such folder"
            cause = f"a name misspelt; in '{path.parent}' there is {', '.join(near)}" if near else "another directory"
            raise error(f"a run folder at '{path}'", got, cause, FileNotFoundError) from None
        except ValueError as reason:
            cause = "edited by hand, or a copy that was cut short; the checkpoints may still be good"
            raise error(f'"config" and "versions" in \'{path}/config.json\'', str(reason), cause) from reason

    def lock(self) -> None:
        """Take the lock, and keep it until `close`. Nothing happens if this object has it already.

        Raises:
            BlockingIOError: another process has it, or another `Run` object of this one.
            OSError: the folder cannot be written, or contains a link that leads out of it.
        """
        if self._unlock is not None and self._unlock.alive:
            return
        _refuse_links(self.path)
        with writing(self.path / "lock"):
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel takes it back when the process ends
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            cause = "the run still goes on elsewhere: wait for it, stop it, or `close` the other Run object"
            here = " (this process)" if holder == str(os.getpid()) else ""
            got = f"process {holder}{here} writes it"
            raise error(f"'{self.path}' for one process alone", got, cause, BlockingIOError) from None
        self._unlock = weakref.finalize(self, os.close, descriptor)
        with writing(self.path / "lock"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Release the lock. The object can still read; when it writes it takes the lock again."""
        if self._unlock is not None:
            self._unlock()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows to metrics.jsonl, one JSON object per line, in one write. Each has an integer "generation".

        The file is valid JSON for all numbers: NaN (or None) is written as null and read back as NaN; infinities are
        written as "Infinity" and "-Infinity" and read back as numbers.

        Raises:
            ValueError: a row has no generation, or something that JSON cannot hold.
            OSError: the file cannot be written.
        """
        rows = [rowfile.encoded(row) for row in rows]
        for row in rows:
            try:
                rowfile.check(rowfile.decoded(row))
            except ValueError as reason:
                cause = "rows that do not come from the history"
                raise error('an integer "generation" in each row, and numbers', str(reason), cause) from reason
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.lock()
        with writing(self._metrics), open(self._metrics, "ab+", buffering=0) as file:
            size = file.tell()
            file.seek(max(size - 1, 0))
            if size and file.read() != b"\n":  # a line that a kill cut short must not swallow the next one
                file.truncate(self._metrics.read_bytes().rfind(b"\n") + 1)
            if file.write(data) != len(data):
                raise OSError("only a part of it was written")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl. A last line cut short by a kill is skipped, any other bad line with a warning."""
        return [row for _, row in self._lines()]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of another file like metrics.jsonl in this folder; none if there is no such file."""
        return [row for _, row in rowfile.read(self.path / name, 3)]

    def truncate(self, generation: int) -> None:
        """Drop the rows after `generation`. A resumed run does so, or it would write some generations twice.

        Raises:
            OSError: the file cannot be written; it is unchanged.
        """
        self.lock()
        kept = b"".join(line + b"\n" for line, row in self._lines() if row["generation"] <= generation)
        with writing(self._metrics):
            write_file(self._metrics, kept)

    def write(self, name: str, content: Any) -> None:
        """Write `content` as JSON to the file `name` in the folder, replacing an earlier one."""
        self.lock()
        path = self.path / name
        with writing(path):
            write_file(path, (json.dumps(content, indent=1) + "\n").encode())

    def save(self, tree: Any, step: int, meta: dict[str, Any] | None = None, keep: int = 3) -> Path:
        """Save a checkpoint of `tree`, after syncing the metrics to disk. See `evoopt.run.checkpoint.save`."""
        self.lock()
        with writing(self._metrics):
            checkpoint._fsync(self._metrics)
        return checkpoint.save(
            self.path / "checkpoints", tree, step=step, meta={**self.kept, **(meta or {})}, keep=keep
        )

    def steps(self) -> list[int]:
        """The generations with a checkpoint, oldest first."""
        return checkpoint.steps(self.path / "checkpoints")

    def load(
        self, like: Any, step: int | None = None, check: Callable[[dict[str, Any]], Any] | None = None
    ) -> Checkpoint:
        """The newest intact checkpoint, or the one of `step`. See `evoopt.run.checkpoint.load`."""
        return checkpoint.load(self.path / "checkpoints", like, step=step, check=check)

    def plot(self) -> Path:
        """Draw the metrics as `curves.png`, over "steps" if the rows have them, else over "evaluations".

        The band around the mean is from "q25" to "q75", or from "best" to "worst" where there are no quartiles. Values
        are drawn negated, as returns, if the config says `"display": "return"`. The picture of a fine-tuning shows the
        held-out split (`evaluations.jsonl`) over the means of the batches. Without metrics the axes are empty.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: the file cannot be written.
        """
        path = self.path / "curves.png"
        png = curves.png(self.path.name, self.config, self.metrics(), self.rows("evaluations.jsonl"))
        with writing(path):
            write_file(path, png)
        return path

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        return rowfile.read(self._metrics, 4)


def _refuse_links(folder: Path) -> None:
    """Refuse links out of the folder: in somebody else's folder, writing to one would change a file elsewhere."""
    home = os.path.realpath(folder)
    for root, folders, files in os.walk(home):
        for path in (os.path.join(root, name) for name in (*folders, *files)):
            if os.path.islink(path) and not os.path.realpath(path).startswith(home + os.sep):
                cause = "a run folder of somebody else; or parts moved to another disk: move the whole run folder"
                raise error(f"'{folder}' without links out of it", f"'{path}' -> '{os.readlink(path)}'", cause, OSError)


def _numbered(root: Path, config: dict[str, Any]) -> Path:
    """A new folder whose name says what `config` is about, with the first free number."""
    parts = [config[k] for k in ("strategy", "env", "objective") if isinstance(config.get(k), str)]
    stem = re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-.")[:80] or "run"
    number = 1
    while True:
        try:
            (path := root / f"{stem}-{number}").mkdir()  # making it makes it ours, whoever else is counting
            return path
        except FileExistsError:
            number += 1
