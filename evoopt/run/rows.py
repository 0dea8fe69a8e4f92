"""Rows of a file such as metrics.jsonl: one JSON object a line, which somebody else may have written."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

from evoopt.reading import LIMIT, document, field, opened, reading, short
from evoopt.types import error

# Fields that are numbers wherever they occur: counters, and values, of which there may be a list.
COUNTERS = {"evaluations", "steps", "seconds", "answered", "skipped", "streak", "feasible"}
VALUES = {"best", "mean", "median", "worst", "best_so_far", "q25", "q75", "values", "loss", "accuracy", "f1", "metric"}
VALUES |= {"violation"}
MOST = 1 << 35  # bytes of metrics
WARNED = 3  # lines that get a warning of their own; a file of another kind has a million that are no rows


def read(path: Path, stacklevel: int) -> list[tuple[bytes, dict[str, Any]]]:
    """The rows of a file, each with the line it was read from. The first few lines that are no rows are warned about.

    A last line that was cut short by a kill is left out without one.
    """
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
                row = decoded(document(line))
                check(row)
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


def check(row: Any) -> None:
    """Check that a row has its generation, and numbers in every field that is computed with.

    Raises:
        ValueError: a field that is not a number.
    """
    if not 0 <= field(row, "generation", int) < 2**63:
        raise ValueError(f"generation {row['generation']}")
    for name in COUNTERS & row.keys():
        if not is_number(row[name]) or not math.isfinite(row[name]):
            raise ValueError(f'"{name}" is {short(row[name])}, no finite number')
    for name in VALUES & row.keys():
        if not all(map(is_number, row[name] if type(row[name]) is list else [row[name]])):
            raise ValueError(f'"{name}" is {short(row[name])}, no number')


def is_number(x: Any) -> bool:
    """Whether `x` is a float, or an integer of 64 bits; a bool is not."""
    return type(x) is float or (type(x) is int and abs(x) < 2**63)


def encoded(x: Any) -> Any:
    """`x` as plain JSON: NaN as null, infinities as text, arrays as lists."""
    if hasattr(x, "tolist"):  # numbers and arrays of numpy and JAX
        x = x.tolist()
    if isinstance(x, dict):
        return {str(k): encoded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [encoded(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise error(
        "numbers, text, lists and dicts in a row", f"{type(x).__name__}", "a state or a function in the history"
    )


def decoded(x: Any) -> Any:
    """What `encoded` was given."""
    if isinstance(x, dict):
        return {k: decoded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [decoded(v) for v in x]
    return math.nan if x is None else {"Infinity": math.inf, "-Infinity": -math.inf}.get(x, x) if type(x) is str else x
