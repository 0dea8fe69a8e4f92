"""Progress of a run: a bar with rate, best value and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

LINE_SECONDS = 10.0  # time between plain lines


class Meter(Protocol):
    """Something that shows a run's progress."""

    def __enter__(self) -> Meter: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, share: float, row: dict[str, Any], rate: float, note: str = "") -> None:
        """Show the `share` of the budget in [0, 1] (NaN without one), the newest metrics, evaluations/s, and a note."""
        ...


def meter(
    progress: bool | Meter | None, label: str, *, sign: float = 1.0, word: str = "best", out: TextIO | None = None
) -> Meter:
    """A bar, lines, nothing, or your own meter. `progress=None` shows a bar on a terminal and nothing elsewhere."""
    if progress is not None and not isinstance(progress, bool):
        return progress
    stream: TextIO = out or sys.stderr
    if progress is False or (progress is None and not stream.isatty()):
        return Silent()
    return Bar(label, sign, word, stream) if stream.isatty() else Lines(label, sign, word, stream)


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def show(self, share: float, row: dict[str, Any], rate: float, note: str = "") -> None: ...


def duration(seconds: float) -> str:
    """'1:05' or '2:03:04'; '-:--' if unknown."""
    if not 0 <= seconds < 1e7:
        return "-:--"
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def quantity(x: float) -> str:
    """A number in at most six characters: 1234 -> '1.23k'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


class Lines:
    """A plain line at the start, one every ten seconds, and one at the end."""

    def __init__(self, label: str, sign: float, word: str, out: TextIO) -> None:
        self.label, self.sign, self.word, self.out = label, sign, word, out

    def __enter__(self) -> Lines:
        self.start, self.last, self.text, self.printed = time.monotonic(), -1e9, "", ""
        print(f"{self.label}  compiling ...", file=self.out, flush=True)  # which may take minutes
        return self

    def __exit__(self, *_: object) -> None:
        if self.text != self.printed:
            print(self.text, file=self.out, flush=True)

    def show(self, share: float, row: dict[str, Any], rate: float, note: str = "") -> None:
        now = time.monotonic()
        elapsed = now - self.start
        left = elapsed * (1 - share) / share if share > 0 else float("nan")
        self.text = (
            f"{self.label}  generation {row['generation']}  {self.word} {self.sign * row['best_so_far']:.6g}"
            f"  mean {self.sign * row['mean']:.6g}  {quantity(rate)} evaluations/s"
            f"{'  ' if note else ''}{note}  elapsed {duration(elapsed)}  left {duration(left)}"
        )
        if now - self.last >= LINE_SECONDS:
            self.last, self.printed = now, self.text
            print(self.text, file=self.out, flush=True)


class Bar:
    """A rich progress bar."""

    def __init__(self, label: str, sign: float, word: str, out: TextIO) -> None:
        from rich import progress as rp
        from rich.console import Console

        self.sign, self.word = sign, word
        self.bar = rp.Progress(
            rp.TextColumn("[bold]{task.description}"),
            rp.BarColumn(bar_width=None),
            rp.TaskProgressColumn(),
            rp.TextColumn("{task.fields[best]}"),
            rp.TextColumn("[dim]{task.fields[rate]}"),
            rp.TimeElapsedColumn(),
            rp.TextColumn("<"),
            rp.TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(file=out),
            expand=True,
        )
        self.label = label

    def __enter__(self) -> Bar:
        self.bar.start()
        self.task = self.bar.add_task(self.label, total=1.0, best=f"{self.word} -", rate="compiling ...")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, share: float, row: dict[str, Any], rate: float, note: str = "") -> None:
        best = f"{self.word} [bold green]{self.sign * row['best_so_far']:.5g}[/]  mean {self.sign * row['mean']:.5g}"
        total, completed = (None, 0.0) if share != share else (1.0, min(share, 1.0))
        self.bar.update(
            self.task,
            best=best,
            rate=f"{quantity(rate)} evals/s{', ' if note else ''}{note}",
            total=total,
            completed=completed,
        )
