"""How a generation is cut into slices, and what becomes of those that are late."""

from __future__ import annotations

import dataclasses

from evoopt.types import error


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a generation is cut, and when another worker is asked too. Only `timeout` and `drop` give evaluations up.

    Attributes:
        slice: micro-batches a slice. None: as many as take `slice_seconds`, fewer towards a generation's end, and never
            so few that workers wait for the driver.
        slice_seconds: the time that a slice aims at. A call costs about a millisecond, so this is well above it.
        resubmit: whether idle workers get the candidates of stragglers too. The first answer counts; the bits stay the
            same, because an evaluation is a function.
        patience: multiple of the median time after which an idle worker takes over a straggler's candidates.
        drop: the fraction of a generation that is not waited for: the slowest candidates have no answer (NaN). It
            depends on timing, so the run does too. Above 0, nothing is resubmitted.
        deadline: seconds after which a slice is given to another worker too, idle or not; the first one goes on. It
            doubles each time. None: ten times what the slice should take, at least 30.
        first_deadline: the same for a worker's first slice, which waits for compilation.
        timeout: seconds that one candidate may take, compilation aside; then its worker is replaced, its value is
            NaN, and the log names it. None, the default: any time.
        deaths: workers that may die on a slice before it is suspected and cut in halves, down to one candidate.

    Raises:
        ValueError: a number that is not positive, or a `drop` outside [0, 1).
    """

    slice: int | None = None
    slice_seconds: float = 0.1
    resubmit: bool = True
    patience: float = 3.0
    drop: float = 0.0
    deadline: float | None = None
    first_deadline: float = 600.0
    deaths: int = 2
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise error("drop in [0, 1), a fraction of a generation", str(self.drop), "a percentage, or a slipped sign")
        for name in ("slice", "slice_seconds", "patience", "deadline", "first_deadline", "timeout", "deaths"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise error(f"{name} > 0", str(number), "a sign slipped, or None was meant")

    @property
    def helps(self) -> bool:
        """Whether idle workers take over what stragglers have."""
        return self.resubmit and self.drop == 0


def timed(policy: Policy | None, timeout: float | None) -> Policy:
    """`policy` with this timeout; without one, candidates that may time out are given out one at a time, and once."""
    if policy is None:
        policy = Policy() if timeout is None else Policy(slice=1, resubmit=False)
    return policy if timeout is None else dataclasses.replace(policy, timeout=timeout)
