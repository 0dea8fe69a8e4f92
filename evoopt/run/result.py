"""What a run has come to."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from evoopt.run import keys
from evoopt.types import Params


@dataclasses.dataclass(frozen=True)
class Start:
    """One of several runs; `minimize(f, x0, strategy, key=key)` with its share of the budget is this run alone.

    Attributes:
        x0, key: what it began with.
        best, best_value, evaluations, generations, reason, why: as in `Result`; the reason is `another` where another
            run reached the target.
    """

    x0: Params
    key: Any
    best: Params | None
    best_value: float
    evaluations: int
    generations: int
    reason: str
    why: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: keys.without_keys(x) for name, x in self.__dict__.items()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update({name: keys.with_keys(x) for name, x in kept.items()})


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        best: the best candidate seen, None with `keep_best=False`; under constraints, the best feasible one, and the
            one that violates them least while none is feasible; of a strategy for noise, its recommendation.
        best_value: its value; for a noisy objective that has `confirm`, and of a strategy for noise (`wrappers.noisy`),
            the mean of new evaluations.
        best_context: the context of `best`: a policy acts by the observation statistics of its time.
        recommended: the strategy's recommendation, the better choice for noisy objectives; it is not evaluated, so
            under constraints it may be infeasible even if `best` is not.
        evaluations: active candidates asked for, answered or not.
        generations: generations told.
        reason: `target`, `generations`, `evaluations`, `seconds`, `callback`, `interrupted` (Ctrl-C), `terminated`
            (SIGTERM), `unanswered`; or the criterion of a run that has ended by itself, such as `tolx`: see `Stop`.
        why: the criterion in words, with its numbers; "" for other reasons.
        chosen: the strategy that `auto` took, and why; "" for one that was given.
        history: one dict per generation: generation, evaluations, best, mean, median, worst, answered, best_so_far;
            under constraints also feasible (how many) and violation (the least).
        state: the strategy's state.
        context: the objective's context.
        unanswered: generations in which no candidate had a finite value.
        seconds: wall-clock time, including earlier parts of a resumed run.
        starts: all runs of `minimize(..., starts=n)`, of which this is the best; None without. `evaluations` and
            `seconds` are of all.
        feasible: whether `best` is feasible; None for a strategy that does not read violations.
        violation: its total violation, 0.0 where it is feasible.
        violations: (k,), each of its violations, as the objective answered them.
    """

    best: Params | None
    best_value: float
    recommended: Params
    evaluations: int
    generations: int
    reason: str
    history: list[dict[str, Any]]
    state: Any
    context: Any
    unanswered: int
    seconds: float
    best_context: Any = None
    display: str = "value"
    why: str = ""
    chosen: str = ""
    starts: list[Start] | None = None
    feasible: bool | None = None
    violation: float | None = None
    violations: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: keys.without_keys(x) for name, x in self.__dict__.items()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update({name: keys.with_keys(x) for name, x in kept.items()})

    def __str__(self) -> str:
        if self.generations and self.unanswered == self.generations:
            return f"no candidate was answered in {self.generations} generations; stopped by {self.reason}"
        word, sign = ("return", -1.0) if self.display == "return" else ("value", 1.0)
        held = "" if self.feasible is None else " feasible" if self.feasible else " infeasible"
        by = f", violated by {self.violation:.3g}," if self.feasible is False else ""
        return (
            f"best{held} {word} {sign * self.best_value:.6g}{by} after {self.evaluations} evaluations "
            f"in {self.generations} generations ({self.seconds:.1f} s); stopped by {self.reason}"
            + (f": {self.why}" if self.why else "")
        )
