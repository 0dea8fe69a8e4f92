"""When a search has ended by itself: the criteria of pycma 4.5, with its defaults, and what they look at.

`Stop` names the criteria, `Stops` holds their tolerances, and `Watch` is what has to be remembered of a run. A strategy
that has a search distribution says how wide it is by the optional method `dispersion(state, i) -> Dispersion`.

`minimize` and `Session` end by `judged`; `wrappers.ipop` and `bipop` restart by `met`.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import trees
from evoopt.answers import answered
from evoopt.types import Array, pytree
from evoopt.when import when

LONGEST = 2**31 - 2**10  # generations that an int32 counts, as a float32 too
EVERY = 5  # generations between two entries of the long history, as in pycma
HISTORY = 4096  # entries of a history at most: with many parameters pycma's would be longer than the parameters
LARGE = 1 << 20  # parameters above which a distribution is not looked at: its width would be a copy of the model


class Stop(enum.IntEnum):
    """Why a run ended; named as in pycma."""

    NONE = 0
    TOLFACUPX = 1  # a coordinate's std grew tolfacupx-fold: sigma was far too small to start with
    TOLX = 2  # all stds and the evolution path are below tolx
    TOLFUN = 3  # the values of this generation and of the last ones are within tolfun
    TOLFUNHIST = 4  # the best values of the last generations are within tolfunhist
    TOLSTAGNATION = 5  # best and median have not improved over a long time
    TOLXSTAGNATION = 6  # the mean has hardly moved over a long time
    TOLUPSIGMA = 7  # sigma grew against the longest axis: creeping
    NOEFFECTCOORD = 8  # a fifth of a std changes no bit of some coordinate
    NOEFFECTAXIS = 9  # a tenth of a principal axis changes no bit of the mean
    TOLCONDITIONCOV = 10  # condition number of the covariance
    TOLFLATFITNESS = 11  # three quarters of a generation have the same value, twice in a row
    MAXITER = 12  # generations of one run; only with restarts
    TOLFUNREL = 13  # a generation's values are within tolfunrel of all progress so far


@pytree
class Stops:
    """The tolerances of `Stop`, each of which ends a run by itself. All are numbers: other ones compile nothing.

    tolx: in units of the parameters. tolfun, tolfunhist: in units of the values. tolfunrel: a share of the medians'
    progress. tolconditioncov: of the covariance. tolfacupx, tolupsigma: factors. tolstagnation: in units of pycma's
    100 + 100 d^1.5 / n generations. tolxstagnation: a distance that the mean stays within. tolflatfitness: generations.

    0 switches tolx, tolfun, tolfunhist, tolfunrel and tolxstagnation off, infinity the others. They are pycma's,
    except tolfacupx, which is 1e3 there and where we restart: a sigma that was far too small to begin with is no reason
    to give up where nothing else is tried.

    >>> Stops(tolfun=1e-6).tolfun
    1e-06
    """

    tolx: float = 1e-11
    tolfun: float = 1e-11
    tolfunhist: float = 1e-12
    tolfunrel: float = 0.0
    tolconditioncov: float = 1e14
    tolfacupx: float = 1e10
    tolupsigma: float = 1e20
    tolstagnation: float = 1.0
    tolxstagnation: float = 1e-9
    tolflatfitness: float = 1.0


class Dispersion(NamedTuple):
    """The width of a search distribution; strategies that have one return it from `dispersion(state, i)`."""

    mean: Array  # (d,)
    sigma: Array  # (), the step-size
    std: Array  # (d,), standard deviation of each coordinate, sigma included
    path: Array  # (d,), the evolution path, sigma included
    axis: Array  # (d,), principal axis i modulo d, one standard deviation long
    shortest: Array  # (), length of the shortest principal axis, in units of sigma
    longest: Array  # (), length of the longest principal axis, in units of sigma


def diagonal(mean: Array, std: Array, path: Array, i: Array) -> Dispersion:
    """The width of a distribution whose principal axes are the coordinates; its step-size is the largest std."""
    axis = jnp.where(jnp.arange(std.shape[0], dtype=jnp.int32) == i % std.shape[0], std, 0)
    largest = std.max()
    return Dispersion(mean, largest, std, path, axis, std.min() / largest, jnp.ones_like(largest))


class History(NamedTuple):
    """Best and median of every fifth generation, the newest first."""

    best: Array  # (k,)
    median: Array  # (k,)
    entries: Array  # () int32, how many there have been


class Entry(NamedTuple):
    """A generation on its way into the history."""

    best: Array
    median: Array
    history: History


class Window(NamedTuple):
    """The part of a history whose halves are compared."""

    period: Array  # () int32, generations; see `patience`
    history: History
    stagnated: Array  # () bool


class Size(NamedTuple):
    """A `Dispersion` as a few numbers, all (); 0 where there is none."""

    std: Any = 0.0  # the largest
    path: Any = 0.0  # its largest coordinate
    condition: Any = 0.0  # of the covariance
    growth: Any = 0.0  # of sigma over the longest axis
    lost: Any = 0.0  # coordinates in which a fifth of a std changes no bit


def sized(s: Dispersion, dtype: Any) -> Size:
    """The numbers of a width."""
    lost = (s.mean == s.mean + 0.2 * s.std).sum()
    numbers = s.std.max(), jnp.abs(s.path).max(), (s.longest / s.shortest) ** 2, s.sigma / s.longest, lost
    return Size(*(jnp.asarray(x).astype(dtype) for x in numbers))


class Watch(NamedTuple):
    """What the criteria look at in one run. Histories have the newest entry first."""

    sigma: Array  # (), the step-size it started from
    generation: Array  # () int32
    run_best: Array  # ()
    run_best_at: Array  # () int32, the generation that found it
    highest: Array  # (), the largest finite value; -inf before the first
    first_median: Array  # (), NaN before the first
    least_median: Array  # ()
    spread: Array  # (), worst less best value of the last generation
    recent_best: Array  # (h,), best of the last generations
    long_history: History  # of every fifth generation
    stagnated: Array  # () bool, at the last entry the newer half of a long window was no better than the older
    flat: Array  # () int32, generations in a row with flat values
    anchor: Array  # (d,), a mean the search has stayed close to; (0,) without a distribution
    anchored: Array  # () int32, the generation of the anchor
    ended: Array  # (len(Stop),) bool, the criteria that have ended the run
    size: Size  # of the distribution at last, for what is said about it


def remember(entry: Entry) -> Entry:
    """Add the entry to its history."""
    push = lambda history, x: jnp.concatenate([x[None], history[:-1]])
    best, median, entries = entry.history
    history = History(push(best, entry.best), push(median, entry.median), entries + 1)
    return entry._replace(history=history)


def compare(window: Window) -> Window:
    """Set `stagnated`: whether the newer half of a long window of the history is no better than the older half."""
    best, median, entries = window.history
    place = jnp.arange(best.shape[0], dtype=jnp.int32)
    # pycma's window grows without end; here it ends with the history.
    half = jnp.minimum(jnp.maximum(window.period // 10, entries // 10), best.shape[0] // 2)

    newer, older = place < half, (place >= half) & (place < 2 * half)
    rows = [jnp.where(part, h, jnp.inf) for h in (median, best) for part in (newer, older)]
    h = jnp.sort(jnp.stack(rows))  # one program sorts all four
    middle = (h[:, (half - 1) // 2] + h[:, half // 2]) / 2
    worse = (middle[0] >= middle[1]) & (middle[2] >= middle[3])
    return window._replace(stagnated=(entries > 100) & (2 * half < entries) & worse)


def most_generations(d: int, n: Array) -> Array:
    """The most generations of one run with n candidates in d dimensions, where restarts follow: () int32."""
    most = 100 + 150.0 * (d + 3) ** 2 / jnp.sqrt(n.astype(jnp.float32))
    return jnp.minimum(most, LONGEST).astype(jnp.int32)


def patience(d: int, n: Array, factor: Any = 1.0) -> Array:
    """The generations over which n candidates in d dimensions may stagnate: () int32."""
    period = (100 + min(int(100 * d**1.5), LONGEST) // n).astype(jnp.float32)
    return jnp.clip(period * jnp.asarray(factor, jnp.float32), 0, LONGEST).astype(jnp.int32)


def begun(d: int, n: int, sigma: Array, *, distribution: bool) -> Watch:
    """Nothing seen yet of a run of n candidates in d dimensions, in the float type of `sigma`."""
    number = lambda x: jnp.asarray(x, sigma.dtype)
    zero, inf = jnp.zeros((), jnp.int32), number(jnp.inf)
    k = min(HISTORY, max(200, 2 * (int(100 + 100 * d**1.5 / n) // 10)))
    blank = lambda m: jnp.full(m, jnp.nan, sigma.dtype)
    return Watch(
        sigma=sigma, generation=zero, run_best=inf, run_best_at=zero, highest=-inf, first_median=number(jnp.nan),
        least_median=inf, spread=inf, recent_best=blank(min(HISTORY, int(10 + 30 * d / n))),
        long_history=History(blank(k), blank(k), zero), stagnated=jnp.asarray(False), flat=zero,
        anchor=jnp.full(d if distribution else 0, jnp.inf, sigma.dtype), anchored=zero,
        ended=jnp.zeros(len(Stop), bool), size=Size(*[number(0)] * 5),
    )  # fmt: skip


def observe(
    watch: Watch, values: Array, mean: Array | None, d: int, n: Array, stops: Stops, *, total: Array | None = None
) -> Watch:
    """`watch` after another generation.

    Args:
        values: (n,), of the generation, NaN where there is no answer.
        mean: the distribution's mean after it, (d,); None without one.
        d, n: parameters, and candidates asked.
        total: generations of all runs before this one, by which runs under `vmap` agree when to look back; None: of
            this run.
    """
    dtype = watch.run_best.dtype
    ordered = jnp.sort(jnp.where(answered(values), values, jnp.nan)).astype(dtype)  # no answer comes last
    m = jnp.maximum(answered(values).sum(), 1).astype(jnp.int32)
    best, worst = ordered[0], ordered[m - 1]
    median = (ordered[(m - 1) // 2] + ordered[m // 2]) / 2
    generation = watch.generation + 1
    better = best < watch.run_best
    flat = best == ordered[jnp.minimum(3 * m // 4, m - 1)]
    anchor, anchored = watch.anchor, watch.anchored
    if mean is not None:
        # the allowance grows with the root of the time that the mean stayed
        stay = (generation - anchored).astype(dtype) / (20 + 0.1 * generation.astype(dtype))
        allowed = jnp.asarray(stops.tolxstagnation, dtype) * jnp.sqrt(jnp.maximum(1, stay))
        left = ~(jnp.sqrt(((mean.astype(dtype) - anchor) ** 2).sum()) <= allowed)
        anchor, anchored = jnp.where(left, mean.astype(dtype), anchor), jnp.where(left, generation, anchored)
    due = ((watch.generation if total is None else total) + 1) % EVERY == 0
    history = when(due, remember, Entry(best, median, watch.long_history)).history
    run_best_at = jnp.where(better, generation, watch.run_best_at)
    # The medians are expensive, and needed only where the best is old.
    period = patience(d, n, stops.tolstagnation)
    old_enough = (generation > 5 * d + 100 * d // n) & (generation - run_best_at > period // 2)
    stagnated = when(due & old_enough, compare, Window(period, history, jnp.asarray(False))).stagnated
    highest = jnp.max(ordered, where=jnp.isfinite(ordered), initial=-jnp.inf)
    return watch._replace(
        generation=generation,
        run_best=jnp.where(better, best, watch.run_best),
        run_best_at=run_best_at,
        highest=jnp.maximum(watch.highest, highest),
        first_median=jnp.where(jnp.isnan(watch.first_median), median, watch.first_median),
        least_median=jnp.fmin(watch.least_median, median),
        spread=worst - best,
        recent_best=jnp.concatenate([best[None], watch.recent_best[:-1]]),
        long_history=history,
        stagnated=jnp.where(due, stagnated, watch.stagnated & old_enough),
        flat=jnp.where(flat, watch.flat + 1, 0),
        anchor=anchor,
        anchored=anchored,
    )


def recent(watch: Watch, d: int, n: Any) -> tuple[Array, Array]:
    """How many of the last generations' best values count, () int32, and the largest less the smallest of them, ()."""
    window = jnp.minimum(watch.generation, 10 + 30 * d // n)
    h, inside = watch.recent_best, jnp.arange(watch.recent_best.shape[0], dtype=jnp.int32) < window
    return window, jnp.max(h, where=inside, initial=-jnp.inf) - jnp.min(h, where=inside, initial=jnp.inf)


def met(watch: Watch, width: Dispersion | None, d: int, n: Array, stops: Stops) -> Array:
    """Which criteria hold, (len(Stop),) bool; those of a distribution only if its width is given."""
    stops = jax.tree.map(lambda x: jnp.asarray(x, watch.sigma.dtype), stops)
    window, spread = recent(watch, d, n)
    progress = watch.first_median - watch.least_median
    found = {
        Stop.TOLFUN: (watch.spread < stops.tolfun) & (spread < stops.tolfun),
        Stop.TOLFUNHIST: (window > 9) & (spread < stops.tolfunhist),
        Stop.TOLSTAGNATION: watch.stagnated,
        Stop.TOLFLATFITNESS: watch.flat.astype(spread.dtype) > stops.tolflatfitness,
        Stop.TOLFUNREL: watch.spread < stops.tolfunrel * progress,
    }
    if width is not None:
        s = Dispersion(*(x.astype(watch.sigma.dtype) for x in width))
        found |= {
            Stop.TOLFACUPX: (s.std > watch.sigma * stops.tolfacupx).any(),
            Stop.TOLX: (s.std < stops.tolx).all() & (s.path < stops.tolx).all(),
            Stop.TOLXSTAGNATION: watch.generation - watch.anchored > 20 + watch.generation // 10,
            Stop.TOLUPSIGMA: s.sigma / s.longest > watch.sigma * stops.tolupsigma,
            Stop.NOEFFECTCOORD: (s.mean == s.mean + 0.2 * s.std).any(),
            Stop.NOEFFECTAXIS: (s.mean == s.mean + 0.1 * s.axis).all(),
            Stop.TOLCONDITIONCOV: s.longest > jnp.sqrt(stops.tolconditioncov) * s.shortest,
        }
    return jnp.stack([jnp.asarray(found.get(stop, False)) for stop in Stop])


def first(met: Array) -> Array:
    """The `Stop` that comes first of those met, () int32; NONE if there is none."""
    return jnp.where(met.any(), jnp.argmax(met), Stop.NONE).astype(jnp.int32)


def judged(strategy: Any, watch: Watch, width: Dispersion | None, d: int, n: Any, stops: Stops) -> Array:
    """Which criteria end a search that has no restarts to fall back on, (len(Stop),) bool.

    - Equal values say nothing in a run that has never seen two different ones: a reward that nobody has found yet is
      no convergence. So criteria of values wait for a second value.
    - Flat generations end it after as many as the history of best values counts, 10 + 30 d / n. pycma stops after two,
      because a restart is cheap; a plateau of an integer or a rare reward lasts longer than that.
    - One candidate a generation is always flat, and the parent that it has to beat may stay for long.
    - Without a distribution nothing but the values tells, and strategies differ in what a best value of a generation
      is. Only TOLFUN is left: all candidates, and all generations of the window, have the same value.
    - Under constraints values may rise while a search comes nearer: only its distribution tells.
    """
    found = met(watch, width, d, n, stops)
    of_values = [Stop.TOLFUN, Stop.TOLFUNHIST, Stop.TOLSTAGNATION, Stop.TOLFLATFITNESS, Stop.TOLFUNREL]
    is_value = np.isin(np.arange(len(Stop)), of_values)
    told = (watch.run_best < watch.highest) & (not hasattr(strategy, "violated"))
    found = found & (told | ~is_value)
    is_flat, stays = (np.arange(len(Stop)) == stop for stop in (Stop.TOLFLATFITNESS, Stop.TOLXSTAGNATION))
    several = jnp.asarray(n) > 1
    found = found & (((watch.flat > 10 + 30 * d // n) & several) | ~is_flat) & (several | ~stays)
    return found if width is not None else found & (np.arange(len(Stop)) == Stop.TOLFUN)


def numbers(stops: Stops | None) -> Stops | None:
    """The tolerances in the default float type, so that programs are the same whatever they were written as."""
    return jax.tree.map(lambda x: np.asarray(x, jnp.result_type(float)), stops)


def restarts_itself(strategy: Any) -> bool:
    """Whether a strategy, or one that it wraps, begins again by itself where it has ended: nothing else may end it."""
    inner = getattr(strategy, "strategy", None)
    return bool(getattr(strategy, "restarting", False)) or (inner is not None and restarts_itself(inner))


def dimension(strategy: Any, state: Any) -> tuple[int, bool]:
    """How many numbers are searched, and whether their distribution is looked at."""
    if hasattr(strategy, "dispersion"):
        d = jax.eval_shape(strategy.dispersion, state, jnp.zeros((), jnp.int32)).mean.shape[0]
        if d <= LARGE:
            return d, True
    return trees.size(jax.eval_shape(strategy.recommend, state)), False


def watching(strategy: Any, state: Any, n: int) -> Watch | None:
    """The watch over a run of any strategy, of n candidates a generation; None for one that restarts by itself."""
    if restarts_itself(strategy):
        return None
    d, distribution = dimension(strategy, state)
    real = jnp.result_type(float)
    sigma = strategy.dispersion(state, jnp.zeros((), jnp.int32)).sigma if distribution else jnp.ones(())
    return begun(d, n, sigma.astype(real), distribution=distribution)


def watched(strategy: Any, watch: Watch, state: Any, values: Array, n: Array, stops: Stops) -> Watch:
    """`watch` after a generation of n candidates that was told to `strategy`, which is now in `state`.

    A generation without a finite answer changes nothing.
    """
    d, distribution = dimension(strategy, state)
    width = strategy.dispersion(state, watch.generation + 1) if distribution else None
    new = observe(watch, values, None if width is None else width.mean, d, n, stops)
    new = new._replace(ended=judged(strategy, new, width, d, n, stops))
    if width is not None:
        new = new._replace(size=sized(width, new.sigma.dtype))
    return trees.where(jnp.isfinite(values).any(), new, watch)


def rejudged(strategy: Any, watch: Watch, state: Any, n: Array, stops: Stops) -> Watch:
    """`watch` by other tolerances."""
    d, distribution = dimension(strategy, state)
    width = strategy.dispersion(state, watch.generation) if distribution else None
    judgement = judged(strategy, watch, width, d, n, stops)
    return watch._replace(ended=jnp.where(watch.generation > 0, judgement, False))
