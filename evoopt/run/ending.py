"""A run that has ended by itself, in words: which criterion, and by which numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from evoopt import stopping
from evoopt.run import programs
from evoopt.run.problem import Carry
from evoopt.stopping import Dispersion, Stop, Stops, Watch


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


def why(strategy: Any, carry: Carry, n: int, stops: Stops | None) -> str:
    """The same in words; "" while it goes on."""
    found = reasons(programs.Bound(strategy), carry.watch, carry.state, n, stops)
    return str(next(iter(found.values()))) if found else ""


def reasons(bound: programs.Bound, watch: Watch | None, state: Any, n: int, stops: Stops | None) -> dict[str, Why]:
    """All criteria that have ended a run of n candidates a generation, by name; none while it goes on."""
    if watch is None or stops is None or not np.asarray(watch.ended).any():
        return {}
    strategy = programs.plain(bound.strategy)
    d, distribution = stopping.dimension(strategy, state)
    width = bound.width(state, int(watch.generation)) if distribution else None
    ended = [Stop(int(i)) for i in np.flatnonzero(np.asarray(watch.ended))]
    return {stop.name.lower(): _why(stop, watch, width, d, n, stops) for stop in ended}


def _why(stop: Stop, watch: Watch, width: Dispersion | None, d: int, n: int, stops: Stops) -> Why:
    name = stop.name.lower()
    tolerance = float(getattr(stops, name, 0.0))
    window, spread = (float(x) for x in stopping.recent(watch, d, n))
    last, generation = float(watch.spread), int(watch.generation)
    below = f"below {name}={tolerance:g}"
    if width is not None:
        std, path = (np.asarray(x, np.float64) for x in (width.std, width.path))
        real = np.dtype(width.mean.dtype)
        lost = int((np.asarray(width.mean) == np.asarray(width.mean) + real.type(0.2) * np.asarray(width.std)).sum())
        widest, ratio = float(std.max()), float(width.longest) / float(width.shortest)
        of_width = {
            Stop.TOLFACUPX: (
                widest / float(watch.sigma),
                "a standard deviation has grown {:.3g}-fold, above "
                f"tolfacupx={tolerance:g}: sigma was far too small, or there is no minimum",
            ),
            Stop.TOLX: (
                max(widest, float(np.abs(path).max())),
                "all standard deviations and the evolution path are at most {:.3g}, " + below,
            ),
            Stop.TOLXSTAGNATION: (
                generation - int(watch.anchored),
                f"the mean has stayed within about {tolerance:g} for " + "{:.0f} generations",
            ),
            Stop.TOLUPSIGMA: (
                float(width.sigma) / float(width.longest) / float(watch.sigma),
                "sigma has grown {:.3g}-fold against the longest axis, above " + f"tolupsigma={tolerance:g}",
            ),
            Stop.NOEFFECTCOORD: (
                lost,
                "a fifth of a standard deviation changes no bit of {:.0f} " + f"of {d} coordinates in {real}",
            ),
            Stop.NOEFFECTAXIS: (0.0, f"a tenth of a principal axis changes no bit of the mean in {real}"),
            Stop.TOLCONDITIONCOV: (
                ratio**2,
                "the covariance has a condition number of {:.3g}, above " + f"tolconditioncov={tolerance:g}",
            ),
        }
    else:
        of_width = {}
    progress = float(watch.first_median) - float(watch.least_median)
    best_at = int(watch.run_best_at)
    words = of_width | {
        Stop.TOLFUN: (
            max(last, spread),
            f"the last values, and the best of the last {window:.0f} generations, are within " + "{:.3g}, " + below,
        ),
        Stop.TOLFUNHIST: (
            spread,
            f"the best values of the last {window:.0f} generations are within " + "{:.3g}, " + below,
        ),
        Stop.TOLSTAGNATION: (
            generation - best_at,
            "best and median have not improved over a long time; the best is {:.0f} generations old",
        ),
        Stop.TOLFLATFITNESS: (
            int(watch.flat),
            "three quarters of the candidates have had the same value for {:.0f} generations",
        ),
        Stop.TOLFUNREL: (
            last / progress if progress else 0.0,
            "the values of the last generation are within {:.3g} of all progress, " + below,
        ),
    }
    measured, sentence = words[stop]
    return Why(stop, float(measured), tolerance, sentence.format(measured))
