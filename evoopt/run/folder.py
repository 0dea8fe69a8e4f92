"""Run folders: `runs/<name>/` with `config.json`, `metrics.jsonl`, `checkpoints/` and `curves.png`."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from evoopt.checks import nearest
from evoopt.reading import LIMIT, contents, document, field, opened, reading, short, writing
from evoopt.run import checkpoint
from evoopt.run.checkpoint import Checkpoint, write_file
from evoopt.types import error

# What a row says in numbers, if it says it: counters, and values, of which there may be a list.
COUNTERS = {"evaluations", "steps", "seconds", "answered", "skipped", "streak"}
VALUES = {"best", "mean", "median", "worst", "best_so_far", "q25", "q75", "values", "loss", "accuracy", "f1", "metric"}
MOST = 1 << 35  # bytes of metrics
WARNED = 3  # lines of a file that are no rows and have a warning each; a file of another kind has a million of them


class Run:
    """One run's folder. `create` makes one, `open` finds one; one process at a time writes in it, any number read.

    The writing methods take the folder's lock, which goes back at `close`, at the end of a `with` block, or when the
    process ends in whatever way.

    >>> import tempfile
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
        self.about: dict[str, Any] = {}  # what else than the arguments of `minimize` makes it this run and no other
        self.force = False
        self._unlock: weakref.finalize | None = None

    @classmethod
    def create(cls, root: str | Path, name: str | None, config: dict[str, Any]) -> Run:
        """Make the folder `root/name`, or with no name one that is free, such as `cma_es-ant-3`, and lock it.

        Such a name is made from what `config` has under "strategy", "env" and "objective". `config` is plain JSON and
        is kept with the versions of evoopt, JAX, numpy and Python.

        Raises:
            FileExistsError: `root/name` exists and is not empty.
            OSError: it cannot be written.
            ValueError: a name with a slash, a `config` that is not JSON.
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
        """The run in the folder `path`, to read or to resume; the lock is not taken yet.

        With `force`, `minimize` continues it also as another run than it was: with another strategy, key, version or
        device, and so with other bits.

        Raises:
            FileNotFoundError: no such folder, or one that is no run's; names like it are suggested.
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
        """Become the one process that writes here, until `close`; nothing happens if this object is it already.

        Raises:
            BlockingIOError: another process is, or another `Run` of this one.
            OSError: the folder cannot be written, or has a link that leads out of it.
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
        """Give the lock back. Reading goes on working, and writing takes the lock again."""
        if self._unlock is not None:
            self._unlock()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows to metrics.jsonl, one JSON object a line, in one write. Each has its "generation", an integer.

        The file is valid JSON whatever the numbers: NaN (or None) is written as null and read back as NaN, infinities
        are written as "Infinity" and "-Infinity" and read back as numbers.

        Raises:
            ValueError: a row without its generation, or with something that has no place in JSON.
            OSError: the file cannot be written.
        """
        rows = [_encoded(row) for row in rows]
        for row in rows:
            try:
                _check_row(_decoded(row))
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
        """The rows of metrics.jsonl. A last line cut short by a kill is left out, any other bad line with a warning."""
        return [row for _, row in self._lines()]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of another file like metrics.jsonl in this folder; none where there is no such file."""
        return [row for _, row in _lines(self.path / name, 3)]

    def truncate(self, generation: int) -> None:
        """Drop the rows after `generation`, as a resumed run does, so that no generation is there twice.

        Raises:
            OSError: the file cannot be written; it is as it was.
        """
        self.lock()
        kept = b"".join(line + b"\n" for line, row in self._lines() if row["generation"] <= generation)
        with writing(self._metrics):
            write_file(self._metrics, kept)

    def write(self, name: str, content: Any) -> None:
        """Replace the file `name` in the folder by `content` as JSON."""
        self.lock()
        path = self.path / name
        with writing(path):
            write_file(path, (json.dumps(content, indent=1) + "\n").encode())

    def save(self, tree: Any, step: int, meta: dict[str, Any] | None = None, keep: int = 3) -> Path:
        """A checkpoint of `tree`; the metrics until now are made durable first. See `evoopt.run.checkpoint.save`."""
        self.lock()
        with writing(self._metrics):
            checkpoint._fsync(self._metrics)
        return checkpoint.save(
            self.path / "checkpoints", tree, step=step, meta={**self.kept, **(meta or {})}, keep=keep
        )

    def steps(self) -> list[int]:
        """The generations there are checkpoints of, oldest first."""
        return checkpoint.steps(self.path / "checkpoints")

    def load(
        self, like: Any, step: int | None = None, check: Callable[[dict[str, Any]], None] | None = None
    ) -> Checkpoint:
        """The newest intact checkpoint, or that of `step`. See `evoopt.run.checkpoint.load`."""
        return checkpoint.load(self.path / "checkpoints", like, step=step, check=check)

    def plot(self) -> Path:
        """Draw the metrics as `curves.png`, over "steps" if the rows have them, else over "evaluations".

        Of a fine-tuning, what was found on the held-out split (`evaluations.jsonl`) is drawn over the means of the
        batches; the best of batches that differ says nothing.

        Around the mean, the band is from "q25" to "q75", else from "best" to "worst". Values are drawn negated, as
        returns, if the config says `"display": "return"`. A folder without metrics gives empty axes.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure  # not pyplot, which would open windows and keep every figure
        except ImportError as reason:
            cause = "an installation without it: pip install evoopt-jax[plots]"
            raise error("matplotlib, to draw curves", str(reason), cause, ImportError) from reason
        figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
        returns = self.config.get("display") == "return"
        axes = figure.add_subplot()
        _draw(axes, self.metrics(), self._title(), returns, self._held_out())
        _draw_accuracy(axes, self.metrics(), self.rows("evaluations.jsonl"))
        png = io.BytesIO()
        figure.savefig(png, format="png")
        path = self.path / "curves.png"
        with writing(path):
            write_file(path, png.getvalue())
        return path

    def _title(self) -> str:
        said = [self.config.get(name) for name in ("objective", "strategy", "train")]
        what, strategy, train = (x if type(x) is str else "" for x in said)
        words = [what, f"({train})" if train else "", f"by {strategy}" if strategy else ""]
        more = " ".join(word for word in words if word)
        return f"{self.path.name}: {more}"[:70] if more else self.path.name

    def _held_out(self) -> dict[int, float]:
        """Generation -> what was minimised, on the held-out split of a fine-tuning; empty if there is none."""
        metric = self.config.get("metric")
        metric = metric if type(metric) is str and metric else "loss"
        metric = "metric" if ":" in metric else metric  # a function MODULE:FUNCTION
        sign = 1 if metric == "loss" else -1
        found = {row["generation"]: row.get(metric, math.nan) for row in self.rows("evaluations.jsonl")}
        return {g: sign * value for g, value in found.items() if _is_number(value) and not math.isnan(value)}

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        return _lines(self._metrics, 4)


def _refuse_links(folder: Path) -> None:
    """A folder of somebody else may have links in it, and what is written to them would be written elsewhere."""
    home = os.path.realpath(folder)
    for root, folders, files in os.walk(home):
        for path in (os.path.join(root, name) for name in (*folders, *files)):
            if os.path.islink(path) and not os.path.realpath(path).startswith(home + os.sep):
                cause = "a run folder of somebody else; or parts moved to another disk: move the whole run folder"
                raise error(f"'{folder}' without links out of it", f"'{path}' -> '{os.readlink(path)}'", cause, OSError)


def _lines(path: Path, stacklevel: int) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a file of rows that are rows, and what they say; a warning for each of the first few others."""
    lines, bad = [], 0
    if not os.path.lexists(path):
        return lines
    with reading(path), opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST:
            cause = "a file of another kind, or one with holes; a million generations take a hundredth of that"
            raise error(f"rows of at most {MOST:,} bytes in '{path}'", f"{size:,}", cause)
        for number, line in enumerate(iter(lambda: file.readline(LIMIT), b""), 1):
            if not line.endswith(b"\n") and len(line) < LIMIT:
                break  # cut short
            try:
                row = _decoded(document(line))
                _check_row(row)
                lines.append((line[:-1], row))
            except (ValueError, RecursionError):
                bad += 1
                if bad <= WARNED:
                    sentence = f"line {number} of '{path}' is not a row of metrics and was left out"
                    warnings.warn(sentence, stacklevel=stacklevel)
    if bad > WARNED:
        sentence = f"{bad - WARNED} more lines of '{path}' are not rows of metrics and were left out"
        warnings.warn(sentence, stacklevel=stacklevel)
    return lines


def _check_row(row: Any) -> None:
    """Whether all that is reckoned with in a row is a number.

    Raises:
        ValueError: what is not.
    """
    if not 0 <= field(row, "generation", int) < 2**63:
        raise ValueError(f"generation {row['generation']}")
    for name in COUNTERS & row.keys():
        if not _is_number(row[name]) or not math.isfinite(row[name]):
            raise ValueError(f'"{name}" is {short(row[name])}, no finite number')
    for name in VALUES & row.keys():
        if not all(map(_is_number, row[name] if type(row[name]) is list else [row[name]])):
            raise ValueError(f'"{name}" is {short(row[name])}, no number')


def _is_number(x: Any) -> bool:
    return type(x) is float or (type(x) is int and abs(x) < 2**63)


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


def _encoded(x: Any) -> Any:
    if hasattr(x, "tolist"):  # numbers and arrays of numpy and JAX
        x = x.tolist()
    if isinstance(x, dict):
        return {str(k): _encoded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_encoded(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise error(
        "numbers, text, lists and dicts in a row", f"{type(x).__name__}", "a state or a function in the history"
    )


def _decoded(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _decoded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_decoded(v) for v in x]
    return math.nan if x is None else {"Infinity": math.inf, "-Infinity": -math.inf}.get(x, x) if type(x) is str else x


def _draw_accuracy(axes: Any, rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    """The held-out accuracy of a fine-tuning, on an axis of its own at the right."""
    place = {0: 0.0} | {row["generation"]: row["evaluations"] for row in rows if _is_number(row.get("evaluations"))}
    found = {place[row["generation"]]: row["accuracy"] for row in evaluations
             if row["generation"] in place and _is_number(row.get("accuracy"))}  # fmt: skip
    if not found:
        return
    right = axes.twinx()
    label = "accuracy, held out (right)"
    right.plot(list(found), list(found.values()), color="#2e8b57", linewidth=1.6, marker="s", markersize=4, label=label)
    right.set(ylim=(-0.02, 1.02))
    right.set_ylabel("accuracy", fontsize=11)
    right.spines[["top"]].set_visible(False)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(
        lines, [line.get_label() for line in lines], loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4,
        frameon=False, fontsize=10, columnspacing=1.6,
    )  # fmt: skip


def _draw(axes: Any, rows: list[dict[str, Any]], name: str, returns: bool, held_out: dict[int, float]) -> None:
    from matplotlib.ticker import EngFormatter

    def column(key: str, sign: float = 1.0) -> np.ndarray:
        found = [row.get(key) for row in rows]
        y = np.array([x if _is_number(x) else math.nan for x in found], float)
        return np.where(np.abs(y) < 1e100, sign * y, np.nan)  # what is beyond cannot be drawn to scale

    sign = -1.0 if returns else 1.0
    over = "steps" if rows and all("steps" in row for row in rows) else "evaluations"
    quartiles = any("q25" in row for row in rows)
    low, high = (column(k, sign) for k in (("q25", "q75") if quartiles else ("best", "worst")))
    mean, best, best_so_far = (column(k, sign) for k in ("mean", "best", "best_so_far"))
    x, dot = column(over), "o" if len(rows) == 1 else None
    band = "quartiles" if quartiles else "best to worst"
    style = {"marker": dot, "drawstyle": "steps-post", "zorder": 4}
    if held_out:
        place = {0: 0.0} | {row["generation"]: at for row, at in zip(rows, x, strict=True)}
        known, best_so_far = [place.get(g, math.nan) for g in held_out], np.array(list(held_out.values()))
        axes.plot(known, best_so_far, color="#12355b", linewidth=2.2, marker="o", label="held out", zorder=4)
        axes.plot(x, mean, color="#d9662b", linewidth=0.8, alpha=0.5, marker=dot, label="batches", zorder=2)
        low = high = best = mean
    else:
        axes.plot(x, best_so_far, color="#12355b", linewidth=2.2, label="best so far", **style)
        axes.plot(x, best, color="#4a90d9", linewidth=1.2, marker=dot, label="best of the generation", zorder=3)
        axes.plot(x, mean, color="#d9662b", linewidth=1.4, marker=dot, label="mean", zorder=2)
        axes.fill_between(x, low, high, color="#d9662b", alpha=0.15, linewidth=0, label=band, zorder=1)

    lines = np.concatenate([mean, best, best_so_far])
    lines = lines[np.isfinite(lines)]
    if not lines.size:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no finite value yet", transform=axes.transAxes, ha="center", color="#667")
    elif not returns and lines.min() > 0 and lines.max() > 1000 * lines.min():
        axes.set_yscale("log")
    elif lines.max() > lines.min():  # the band may double the height, no more: an outlier must not press curves flat
        ends = np.concatenate([low, high])
        ends = np.append(ends[np.isfinite(ends)], lines)
        height = lines.max() - lines.min()
        bottom, top = max(ends.min(), lines.min() - height), min(ends.max(), lines.max() + height)
        axes.set_ylim(bottom - 0.04 * (top - bottom), top + 0.04 * (top - bottom))

    axes.set_title(name, loc="left", fontsize=14, fontweight="bold", pad=32, parse_math=False)
    axes.set_xlabel("environment steps" if over == "steps" else "evaluations", fontsize=11)
    axes.set_ylabel("return (higher is better)" if returns else "value (lower is better)", fontsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=10, columnspacing=1.6)
