"""The picture of a run: values over evaluations or environment steps, as a PNG file."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from evoopt.run.rows import is_number
from evoopt.types import error

Rows = list[dict[str, Any]]


def png(name: str, config: dict[str, Any], metrics: Rows, evaluations: Rows) -> bytes:
    """The curves of the run `name` with that configuration, as the bytes of a file.

    metrics: the rows of metrics.jsonl.
    evaluations: the rows of evaluations.jsonl, of a fine-tuning.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would open windows and keep every figure
    except ImportError as reason:
        cause = "an installation without it: pip install evoopt-jax[plots]"
        raise error("matplotlib, to draw curves", str(reason), cause, ImportError) from reason
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    draw(axes, metrics, title(name, config), config.get("display") == "return", held_out(config, evaluations))
    draw_accuracy(axes, metrics, evaluations)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def title(name: str, config: dict[str, Any]) -> str:
    """The name of a run with its objective, trained part and strategy, in at most 70 characters."""
    said = [config.get(key) for key in ("objective", "strategy", "train")]
    what, strategy, train = (x if type(x) is str else "" for x in said)
    words = [what, f"({train})" if train else "", f"by {strategy}" if strategy else ""]
    more = " ".join(word for word in words if word)
    return f"{name}: {more}"[:70] if more else name


def held_out(config: dict[str, Any], evaluations: Rows) -> dict[int, float]:
    """Generation -> the value on the held-out split of a fine-tuning, lower is better; empty if there is no split."""
    metric = config.get("metric")
    metric = metric if type(metric) is str and metric else "loss"
    metric = "metric" if ":" in metric else metric  # a function MODULE:FUNCTION
    sign = 1 if metric == "loss" else -1
    found = {row["generation"]: row.get(metric, math.nan) for row in evaluations}
    return {g: sign * value for g, value in found.items() if is_number(value) and not math.isnan(value)}


def draw(axes: Any, rows: Rows, name: str, returns: bool, held_out: dict[int, float]) -> None:
    """Draw best, mean and band of every generation; of a fine-tuning, the held-out value and the batches.

    returns: draw values negated, as returns.
    held_out: from the function of that name; empty for a run that is not a fine-tuning.
    """
    from matplotlib.ticker import EngFormatter

    def column(key: str, sign: float = 1.0) -> np.ndarray:
        found = [row.get(key) for row in rows]
        y = np.array([x if is_number(x) else math.nan for x in found], float)
        return np.where(np.abs(y) < 1e100, sign * y, np.nan)  # larger numbers cannot be drawn to scale

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


def draw_accuracy(axes: Any, rows: Rows, evaluations: Rows) -> None:
    """Draw the held-out accuracy of a fine-tuning, with its own axis on the right."""
    place = {0: 0.0} | {row["generation"]: row["evaluations"] for row in rows if is_number(row.get("evaluations"))}
    found = {place[row["generation"]]: row["accuracy"] for row in evaluations
             if row["generation"] in place and is_number(row.get("accuracy"))}  # fmt: skip
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
