"""Everything that an accelerator must show, in the order of its importance, within a limit of time.

    python benchmarks/gpu.py --minutes 8 --json results/gpu.json
    python benchmarks/gpu.py --rehearse

Each part is another benchmark with its own limit of time, in a process of its own, so that one that hangs or fails
costs the others nothing. The rows are written after each part, so nothing is lost when the time runs out. All parts
share a cache of compiled programs. `--rehearse` runs every part as small as it goes, on whatever device there is: two
minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import header, parser, write

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Part:
    """A benchmark to run."""

    name: str
    seconds: float  # its limit, within the whole
    command: tuple[str, ...]  # a script here and its arguments
    rehearsal: tuple[str, ...]  # the same, as small as it goes


SMALL_MODEL = ("--layers", "1", "--vocabulary", "64", "--batch", "1", "--tokens", "8", "--repeats", "1")
PARTS = (
    Part(
        "zeroth-order step and members",
        180,
        ("zeroth_order.py", "--repeats", "3", "--members", "64", "--member-tokens", "8", "128"),
        ("zeroth_order.py", *SMALL_MODEL, "--members", "2", "--member-tokens", "4"),
    ),
    Part(
        "bits: slices, batches, replay",
        120,
        ("exactness.py",),
        ("exactness.py", "--only", "snes,mezo"),
    ),
    Part(
        "control policies",
        200,
        ("neuroevolution.py", "--environments", "brax:ant", "--popsize", "256", "--seeds", "1", "--repeats", "1"),
        (
            "neuroevolution.py", "--environments", "gymnax:Pendulum-v1", "--popsize", "4", "--seeds", "1",
            "--generations", "1", "--episode-length", "5", "--repeats", "1",
        ),
    ),
    Part(
        "ask and tell against evosax",
        120,
        ("overhead.py", "--strategies", "openai_es,snes", "--sizes", "1000x1000,64x1000000", "--repeats", "3"),
        ("overhead.py", "--strategies", "snes", "--sizes", "4x4", "--repeats", "1"),
    ),
    Part(
        "ask and tell of search strategies against evosax",
        120,
        ("overhead.py", "--group", "search", "--strategies", "cma_es,differential_evolution", "--sizes", "1000x256"),
        (
            "overhead.py", "--group", "search", "--strategies", "differential_evolution", "--sizes", "4x8",
            "--repeats", "1",
        ),
    ),
)  # fmt: skip


def run(part: Part, seconds: float, rehearse: bool) -> tuple[list[dict[str, Any]], str]:
    """The rows of a part, and how it ended."""
    script, *arguments = part.rehearsal if rehearse else part.command
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / script), *arguments, "--json", str(out)]
        begun = time.monotonic()
        try:
            ended = subprocess.run(command, timeout=seconds, cwd=HERE.parent)
            how = "done" if ended.returncode == 0 else f"failed with status {ended.returncode}"
        except subprocess.TimeoutExpired:
            how = f"cut off after {seconds:.0f} s"
        rows = json.loads(out.read_text())[1:] if out.exists() else []
    took = time.monotonic() - begun
    return [{**row, "part": part.name} for row in rows], f"{how}, {took:.0f} s"


def main() -> None:
    """Run the parts."""
    p = parser(__doc__)
    p.add_argument(
        "--minutes", type=float, default=8.0, help="after this long no part is begun, and the last is cut off"
    )
    p.add_argument("--rehearse", action="store_true", help="run every part as small as it goes")
    p.add_argument("--only", action="append", metavar="WORD", help="run the parts whose names have this word")
    options = p.parse_args()
    # Not on a temporary file system of this run: the next run of the script finds the programs too.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parent / ".jax-cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # The header touches the device; without this, the process would hold all of its memory while the parts run.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    head = header((), minutes=options.minutes, rehearsal=options.rehearse)
    end = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    ends: list[tuple[str, str]] = []
    for part in PARTS:
        if options.only and not any(word in part.name for word in options.only):
            continue
        left = end - time.monotonic()
        if left <= 0:
            ends.append((part.name, "not begun: the time was up"))
            continue
        print(f"\n== {part.name}", flush=True)
        found, how = run(part, min(left, part.seconds), options.rehearse)
        rows += found
        ends.append((part.name, how))
        write(options.json, {**head, "parts": dict(ends)}, rows)
    print("\n" + "\n".join(f"{name:52} {how}" for name, how in ends))
    if options.rehearse and any(not how.startswith("done") for _, how in ends):
        sys.exit(1)


if __name__ == "__main__":
    main()
