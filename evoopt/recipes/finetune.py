"""Fine-tuning: `minimize` on a language task, with what such a run needs in addition.

The held-out split is evaluated at intervals, and the parameters that do best on it are kept. Steps without a finite
loss are counted; too many in a row end the run. The run is recorded as a trajectory, from which its result can be
rebuilt.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt.reading import writing
from evoopt.run import checkpoint, trajectory
from evoopt.run import progress as bars
from evoopt.run.checkpoint import write_file
from evoopt.run.minimize import Carry, Result, minimize
from evoopt.run.trajectory import Trajectory
from evoopt.types import Array, Key, Params, error

LEARNED = 1e-3  # a loss below this has no more to learn from
WINDOW = 10  # batches that are averaged
CLEAR = 0.25  # share of the loss at the start that a loss may rise without being called diverged
Row = dict[str, Any]
Score = Callable[[Row], Any]  # of an evaluation; the least is the best


class Finetuned(NamedTuple):
    """How a fine-tuning ended."""

    params: Params  # the trainable tree: the best on the held-out split, else the last
    generation: int  # after how many generations that was
    evaluations: list[Row]  # generation, loss, accuracy, f1 (with labels) of the held-out split; empty without one
    skipped: int  # generations whose losses were lost
    trajectory: Trajectory | None  # of `params`; None for a first-order strategy or an incomplete history
    result: Result  # of `minimize`
    diverged: str = ""  # why the run is no success, in words; "" where nothing speaks against it


def finetune(
    task: Any,
    x: Params,
    strategy: Any,
    *,
    key: Key | int = 0,
    held_out: Any = None,
    every: int = 100,
    score: Score | None = None,
    patience: int = 20,
    run: Any = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Finetuned:
    """Minimise `task` from `x` with `strategy`.

    Args:
        task: `evoopt.envs.language.Task`, or anything with its `context`, `update` and `evaluate`.
        x: the trainable tree.
        strategy: from `evoopt.strategies`. Zeroth-order ones give a trajectory.
        key: a threefry key or a seed, for the batches and the search.
        held_out: data to evaluate before the first, after every `every`-th and after the last generation.
        every: generations between two evaluations.
        score: an evaluation -> its score; the lowest is the best. By default the highest metric wins if the task has a
            metric of your own, and otherwise the highest accuracy, then the lowest loss.
        patience: the run ends after this many generations in a row that change nothing: their losses are NaN, or all
            probes have the same loss, because the model no longer depends on its weights.
        run: a run folder (`evoopt.Run`). If it has checkpoints the run continues, bit for bit. Evaluations are written
            to its `evaluations.jsonl`, the best parameters to its folder `best`.
        settings: plain JSON that is stored in the trajectory.
        **options: options of `minimize`: the budget, progress, label, checkpoint_seconds, batch_size (candidates
            evaluated at once, by default `task.members`), ...

    Without `held_out`, a run that ended for that reason returns the last parameters whose loss was finite.

    Warns:
        UserWarning: a resumed run whose history lacks generations; it has no trajectory.
    """
    key_data, key_run = jax.random.split(noises.replayable(key))
    replayable = trajectory.is_told_values(strategy)
    score = score or (highest_metric if callable(getattr(task, "metric", None)) else most_accurate)
    watch = _Watch(task, x, strategy, held_out, every, score, patience, run)
    watch.begin()
    options.setdefault("stop", None)  # the loss of a batch says nothing about convergence
    word = "value of the last batches" if watch.own_metric else "loss of the last batches"
    watch.meter = bars.meter(options.pop("progress", None), options.get("label") or type(strategy).__name__, word=word)
    result = minimize(
        task, x, strategy, key=key_run, context=task.context(key_data), update=task.update,
        summarize=_summary if replayable else _first_order_summary, keep_best=False, callbacks=[watch], progress=watch,
        every=every, run=run, **options,
    )  # fmt: skip
    watch.end(result)
    values = _told(result) if replayable else None
    params, generation = watch.best, watch.best_generation
    if held_out is None:
        params, generation = result.recommended, result.generations
        if values is not None and watch.lost_patience():
            generation = last_good(values, flat=watch.flat >= patience)
            whole = trajectory.record(strategy, x, key_run, values, end=result.recommended)
            params = trajectory.replay(whole, strategy, x, generations=generation)
    made = None
    if values is not None:
        made = trajectory.record(strategy, x, key_run, values[:generation], end=params, settings=settings)
    why = watch.why() or ("" if watch.own_metric else diverged(result.history, watch.rows))
    return Finetuned(params, generation, watch.rows, result.unanswered, made, result, why)


def _told(result: Result) -> list[Any] | None:
    """What the strategy was told in each generation; None, with a warning, if the history lacks some of it."""
    values = [row["values"] for row in result.history if "values" in row]
    if len(values) == result.generations:
        return values
    warnings.warn(
        f"the history has the values of {len(values)} of {result.generations} generations, so no trajectory is "
        "recorded; usual cause: a metrics.jsonl that was cut or edited before the run was resumed",
        stacklevel=3,
    )
    return None


def last_good(values: Sequence[Any], *, flat: bool = False) -> int:
    """How many generations to replay so that the parameters still have a finite loss: all before the last answered one.

    With `flat`, a generation whose probes all have the same value counts as unanswered.
    """
    answered = [i for i, row in enumerate(values) if np.isfinite(np.asarray(row, float)).any()]
    answered = [i for i in answered if not (flat and is_flat({"values": values[i]}))]
    return answered[-1] if answered else 0


def is_flat(row: Row) -> bool:
    """Whether all probes of a generation had the same loss, and one too large for a model that has learned it all."""
    values = np.asarray(row.get("values", ()), float)
    return bool(values.size > 1 and (values == values[0]).all() and abs(values[0]) > LEARNED)


def diverged(history: Sequence[Row], evaluations: Sequence[Row] = ()) -> str:
    """Why a run counts as diverged, in words: its losses end clearly above where they began. "" if they do not.

    Clearly means by a quarter of the loss, and by more than batches differ. A held-out loss that rises while the loss
    of the batches falls is something else: overfitting.

    >>> diverged([{"mean": 0.7}] * 10 + [{"mean": 2.0}] * 30)
    'the loss of the last 10 batches is 2, that of the first 0.7'
    >>> diverged([{"mean": 0.7}] * 10 + [{"mean": 0.5}] * 30)
    ''
    """
    means = np.array([mean for row in history if math.isfinite(mean := row.get("mean", math.nan))], float)
    n = max(1, min(WINDOW, len(means) // 4))
    if len(means) >= 4:
        first, last = means[:n], means[-n:]
        noise = math.sqrt((first.var() + last.var()) / n) if n > 1 else abs(first[0])
        if last.mean() - first.mean() > max(CLEAR * abs(first.mean()), 4 * noise):
            return f"the loss of the last {n} batches is {last.mean():.4g}, that of the first {first.mean():.4g}"
    held_out = [row["loss"] for row in evaluations]
    falls = len(means) >= 4 and means[-n:].mean() < means[:n].mean()
    if len(held_out) > 1 and not falls and not held_out[-1] <= held_out[0] * (1 + CLEAR):
        return f"the held-out loss ends at {held_out[-1]:.4g}, after {held_out[0]:.4g} at the start"
    return ""


def most_accurate(row: Row) -> Any:
    """The score of the highest accuracy, then the lowest loss."""
    return (-row["accuracy"], row["loss"])


def highest_metric(row: Row) -> Any:
    """The score of the highest value of the task's own metric, then the lowest loss."""
    return (-row["metric"], row["loss"])


def lowest_loss(row: Row) -> Any:
    """The score of the lowest loss; that of NaN is infinite."""
    return row["loss"] if math.isfinite(row["loss"]) else math.inf


def _first_order_summary(values: Array, aux: Any) -> dict[str, Array]:
    del values
    return {"accuracy": jnp.nanmean(aux["accuracy"])}


def _summary(values: Array, aux: Any) -> dict[str, Array]:
    return _first_order_summary(values, aux) | trajectory.told_values(values, aux)


def _lost_at_the_end(rows: list[Row]) -> int:
    """How many of the last generations lacked a value."""
    whole = [np.isfinite(np.asarray(row.get("values", row["best"]), float)).all() for row in rows]
    return next((i for i, ok in enumerate(reversed(whole)) if ok), len(rows))


class _Watch:
    """The callback of a run: evaluates, keeps the best parameters, counts lost steps."""

    def __init__(self, task, x, strategy, held_out, every, score, patience, run) -> None:
        self.task, self.x, self.strategy, self.held_out = task, x, strategy, held_out
        self.every, self.score, self.patience, self.run = every, score, patience, run
        self.rows: list[Row] = []
        self.best: Params = None
        self.best_generation = 0
        self.skipped = self.streak = 0  # generations that were lost so far, and how many of them the last ones
        self.flat = 0  # how many of the last generations had one loss for all probes
        self.own_metric = getattr(task, "metric", "loss") != "loss"  # equal scores of a batch are usual then
        self.meter: Any = None
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """Evaluate zero-shot, or read what an earlier part of the run evaluated and which of its steps were lost."""
        done = (self.run.steps() or [0])[-1] if self.run is not None else 0
        lost = [row for row in self._read("lost.jsonl") if row["generation"] <= done]
        if lost:
            self._write("lost.jsonl", lost)
            self.skipped, self.streak = lost[-1]["skipped"], lost[-1]["streak"]
            self.flat = lost[-1].get("flat", 0)
        if self.held_out is None:
            return
        self.rows = [row for row in self._read("evaluations.jsonl") if row["generation"] <= done]
        self._write("evaluations.jsonl", self.rows)
        if not self.rows:
            self._evaluate(self.x, 0)
            return
        try:
            self.best_generation = min(self.rows, key=self._order)["generation"]
        except LookupError as reason:
            cause = "evaluations by another metric than the run is resumed with, or a file that was edited"
            raise error("rows in evaluations.jsonl that can be compared", f"none of {reason}", cause) from reason
        like = jax.tree.map(jnp.asarray, self.x)
        self.best = checkpoint.load(self._folder, like, step=self.best_generation).tree

    def __call__(self, carry: Carry, rows: list[Row]) -> bool:
        generation = int(carry.generation)
        if self.held_out is not None and generation % self.every == 0 and generation > self.rows[-1]["generation"]:
            self._evaluate(self.strategy.recommend(carry.state), generation)
            if self.run is not None:  # never behind what was evaluated: resumed, the run finds the best again
                self.run.save(carry, step=generation, meta={"seconds": rows[-1]["seconds"]})
        self.recent.extend(row["mean"] for row in rows)
        before, self.skipped = (self.skipped, self.streak, self.flat), int(getattr(carry.state, "unanswered", 0))
        new = self.skipped - before[0]
        self.streak = self.streak + new if new == len(rows) else min(new, _lost_at_the_end(rows))
        flat = [is_flat(row) and not self.own_metric for row in rows]
        last = next((i for i, one in enumerate(reversed(flat)) if not one), len(rows))
        self.flat = self.flat + last if last == len(rows) else last
        if before != (self.skipped, self.streak, self.flat):  # a resumed run goes on counting from here
            line = {"generation": generation, "skipped": self.skipped, "streak": self.streak, "flat": self.flat}
            self._write("lost.jsonl", [*self._read("lost.jsonl"), line])
        return self.lost_patience()

    def lost_patience(self) -> bool:
        return max(self.streak, self.flat) >= self.patience

    def why(self) -> str:
        """Why the last steps are no success, in words."""
        if self.streak >= self.patience:
            return f"{self.streak} steps in a row had no finite loss"
        if self.flat >= self.patience:
            return f"all probes of {self.flat} steps in a row had the same loss: the weights no longer matter"
        return ""

    def show(self, share: float, row: Row, rate: float, note: str = "") -> None:
        """As a meter, show the mean loss of the last batches and the held-out loss; the best batch was only lucky."""
        assert self.meter is not None
        smooth = float(np.mean(self.recent)) if self.recent else row["mean"]
        held_out = f"held-out loss {self.rows[-1]['loss']:.4g}" if self.rows else ""
        self.meter.show(share, row | {"best_so_far": smooth}, rate, ", ".join(x for x in (held_out, note) if x))

    def __enter__(self) -> _Watch:
        assert self.meter is not None
        self.meter.__enter__()
        return self

    def __exit__(self, *what: object) -> None:
        assert self.meter is not None
        self.meter.__exit__(*what)

    def end(self, result: Result) -> None:
        if self.held_out is not None and self.rows[-1]["generation"] < result.generations:
            self._evaluate(result.recommended, result.generations)

    def _evaluate(self, x: Params, generation: int) -> None:
        found = self.task.evaluate(x, self.held_out)
        row = {"generation": generation, **{k: v for k, v in found.items() if k != "predictions"}}
        if not self.rows or self._order(row) < min(map(self._order, self.rows)):
            self.best, self.best_generation = jax.tree.map(jnp.copy, x), generation  # a copy: the loop gives x away
            if self.run is not None:
                checkpoint.save(self._folder, self.best, step=generation, keep=2)
        self.rows.append(row)
        self._write("evaluations.jsonl", self.rows)

    def _order(self, row: Row) -> Any:
        score = self.score(row)
        return (not np.isfinite(np.asarray(score, float)).all(), score, row["generation"])  # NaN never wins

    @property
    def _folder(self) -> Any:
        return self.run.path / "best"

    def _read(self, name: str) -> list[Row]:
        return [] if self.run is None else self.run.rows(name)

    def _write(self, name: str, rows: list[Row]) -> None:
        if self.run is None:
            return
        plain = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
        lines = [json.dumps({k: plain(v) for k, v in row.items()}) + "\n" for row in rows]
        path = self.run.path / name
        with writing(path):
            write_file(path, "".join(lines).encode())
