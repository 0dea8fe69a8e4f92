"""What the benchmarks share: a header that says what ran where, interleaved timing, a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark has."""
    p = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    p.add_argument("--json", metavar="FILE", help="write the rows there: a list of {name, value, unit, peer, ratio}")
    p.add_argument("--repeats", type=int, default=5, help="interleaved repeats, of which the median counts")
    return p


def header(packages: Sequence[str], **facts: Any) -> dict[str, Any]:
    """The machine, the versions and what else belongs to a figure; printed."""
    device = jax.devices()[0]
    head = {
        "device": getattr(device, "device_kind", device.platform),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        **{name: metadata.version(name) for name in ("jax", *packages)},
        **facts,
    }
    print("  ".join(f"{k} {v}" for k, v in head.items()), flush=True)
    return head


def interleaved(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, run in turn so that a drifting machine meets all of them; each ran once before."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def row(
    name: str, value: float, unit: str, peer: float | None = None, *, more_is_better: bool = False
) -> dict[str, Any]:
    """A figure beside its peer's; a ratio above 1 means that ours is better. Printed."""
    ratio = None if peer is None else (value / peer if more_is_better else peer / value)
    line = f"{name:60} {value:12.4g} {unit:12}"
    print(line + ("" if ratio is None else f" peer {peer:12.4g}  ratio {ratio:6.2f}"), flush=True)
    return {"name": name, "value": value, "unit": unit, "peer": peer, "ratio": ratio}


def write(path: str | None, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the header and the rows as JSON."""
    if path:
        rows = [{"name": "header", "value": None, "unit": None, "peer": None, "ratio": None, **head}, *rows]
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")
