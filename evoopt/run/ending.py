"""A run that has ended by itself, in words: which criterion, and by which numbers."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from evoopt.run.problem import Carry
from evoopt.stopping import Stop, Stops, Watch


@dataclasses.dataclass(frozen=True)
class Why:
    """Why a search has ended.

    Attributes:
        stop: the criterion.
        measured: what it compares.
        tolerance: with what.
        words: both in a sentence, which is also `str` of this.
    """

    stop: Stop
    measured: float
    tolerance: float
    words: str

    def __str__(self) -> str:
        return self.words


def name(watch: Watch | None) -> str:
    """The criterion that has ended a run, such as `tolx`; "" while it goes on."""
    ended = [] if watch is None else np.flatnonzero(np.asarray(watch.ended))
    return Stop(int(ended[0])).name.lower() if len(ended) else ""


def why(carry: Carry, stops: Stops | None) -> str:
    """The same in words; "" while it goes on."""
    found = reasons(carry.watch, stops)
    return str(next(iter(found.values()))) if found else ""


def reasons(watch: Watch | None, stops: Stops | None) -> dict[str, Why]:
    """All criteria that have ended a run, by name; none while it goes on."""
    if watch is None or stops is None or not np.asarray(watch.ended).any():
        return {}
    watch = Watch(*jax.tree.map(np.asarray, tuple(watch)))
    ended = [Stop(int(i)) for i in np.flatnonzero(watch.ended)]
    return {stop.name.lower(): _why(stop, watch, stops) for stop in ended}


def _why(stop: Stop, watch: Watch, stops: Stops) -> Why:
    """NumPy alone: a program for a sentence would take longer than the search."""
    name, size = stop.name.lower(), watch.size
    tolerance = float(getattr(stops, name, 0.0))
    generation, real = int(watch.generation), watch.sigma.dtype
    known = watch.recent_best[: max(1, generation)]
    known = known[~np.isnan(known)]
    spread, last = float(np.ptp(known)), float(watch.spread)
    progress = float(watch.first_median) - float(watch.least_median)
    names = {
        "below": f"below {name}={tolerance:g}", "above": f"above {name}={tolerance:g}", "tolerance": tolerance,
        "half": f"changes no bit in {real}", "k": len(known),
    }  # fmt: skip
    measured, words = {
        Stop.TOLFACUPX: (
            size.std / watch.sigma,
            "a standard deviation has grown {x:.3g}-fold, {above}: there is no minimum, or sigma was far too small",
        ),
        Stop.TOLX: (
            max(size.std, size.path),
            "all standard deviations and the evolution path are at most {x:.3g}, {below}",
        ),
        Stop.TOLFUN: (
            max(last, spread),
            "the last values, and the best of the last {k} generations, are within {x:.3g}, {below}",
        ),
        Stop.TOLFUNHIST: (
            spread,
            "the best values of the last {k} generations are within {x:.3g}, {below}",
        ),
        Stop.TOLSTAGNATION: (
            generation - int(watch.run_best_at),
            "best and median have not improved over a long time; the best is {x:.0f} generations old",
        ),
        Stop.TOLXSTAGNATION: (
            generation - int(watch.anchored),
            "the mean has stayed within about {tolerance:g} for {x:.0f} generations",
        ),
        Stop.TOLUPSIGMA: (
            size.growth / watch.sigma,
            "sigma has grown {x:.3g}-fold against the longest axis, {above}",
        ),
        Stop.NOEFFECTCOORD: (size.lost, "a fifth of a standard deviation {half} in {x:.0f} coordinates"),
        Stop.NOEFFECTAXIS: (size.lost, "a tenth of a principal axis {half}"),
        Stop.TOLCONDITIONCOV: (size.condition, "the covariance has a condition number of {x:.3g}, {above}"),
        Stop.TOLFLATFITNESS: (
            int(watch.flat),
            "three quarters of the candidates have had the same value for {x:.0f} generations",
        ),
        Stop.TOLFUNREL: (
            last / progress if progress else 0.0,
            "the last values are within {x:.3g} of all progress, {below}",
        ),
    }[stop]
    return Why(stop, float(measured), tolerance, words.format(x=float(measured), **names))
