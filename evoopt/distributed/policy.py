"""How a generation is cut into slices, and what becomes of those that are late."""

from __future__ import annotations

import dataclasses

from evoopt.types import error

STRAGGLERS = ("wait", "resubmit", "drop")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a generation is cut, and when another worker is asked too. Only `timeout` and `drop` give evaluations up.

    Attributes:
        slice: micro-batches a slice. None: as many as take `slice_seconds`, fewer towards a generation's end, and never
            so few that workers wait for the driver.
        slice_seconds: the time that a slice aims at. A call costs about a millisecond, so this is well above it.
        stragglers: `wait` for them; `resubmit` their candidates to idle workers, where the first answer counts (the
            bits stay the same, because an evaluation is a function); `drop` the slowest, whose values are then NaN.
        patience: multiple of the median time after which an idle worker takes over a straggler's candidates.
        drop: the fraction of a generation that `drop` does not wait for. It depends on timing, so the run does too.
        deadline: seconds after which a slice is given to another worker too, idle or not; the first one goes on. It
            doubles each time. None: ten times what the slice should take, at least 30.
        first_deadline: the same for a worker's first slice, which waits for compilation.
        timeout: seconds that one candidate may take, compilation aside; then its worker is replaced, its value is
            NaN, and the log names it. None, the default: any time.
        deaths: workers that may die on a slice before it is suspected and cut in halves, down to one candidate.

    Raises:
        ValueError: a number that is not positive, or a `drop` that does not fit `stragglers`.
    """

    slice: int | None = None
    slice_seconds: float = 0.1
    stragglers: str = "resubmit"
    patience: float = 3.0
    drop: float = 0.0
    deadline: float | None = None
    first_deadline: float = 600.0
    deaths: int = 2
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.stragglers not in STRAGGLERS:
            raise error(f"stragglers as one of {', '.join(STRAGGLERS)}", repr(self.stragglers), "a misspelt policy")
        if (self.drop > 0) != (self.stragglers == "drop") or not 0 <= self.drop < 1:
            got = f"stragglers={self.stragglers!r} with drop={self.drop}"
            raise error(
                "a fraction drop in (0, 1) with stragglers='drop', none otherwise", got, "one without the other"
            )
        for name in ("slice", "slice_seconds", "patience", "deadline", "first_deadline", "timeout", "deaths"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise error(f"{name} > 0", str(number), "a sign slipped, or None was meant")
