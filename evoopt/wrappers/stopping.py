"""When a run of `restarts` ends: the criteria of pycma 4.5, with its defaults, and the history that they look at."""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax.numpy as jnp

from evoopt.types import Array

TOLXSTAGNATION = 1e-9  # a mean that stays within this distance for long has stagnated, as in pycma
LONGEST = 2**31 - 2**10  # generations that an int32 counts, as a float32 too
EVERY = 5  # generations between two entries of the long history, as in pycma


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
    MAXITER = 12  # generations of one run


class Extremes(NamedTuple):
    """The extreme values of a generation, without those that were not answered."""

    best: Array
    worst: Array
    m: Array  # () int32, how many there are


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

    period: Array  # () int32, generations; see `tolstagnation`
    history: History
    stagnated: Array  # () bool


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

    def middle(h: Array, low: Array) -> Array:
        h = jnp.sort(jnp.where((place >= low) & (place < low + half), h, jnp.inf))
        return (h[(half - 1) // 2] + h[half // 2]) / 2

    worse = (middle(median, 0 * half) >= middle(median, half)) & (middle(best, 0 * half) >= middle(best, half))
    return window._replace(stagnated=(entries > 100) & (2 * half < entries) & worse)


def most_generations(d: int, n: Array) -> Array:
    """The most generations of one run with n candidates in d dimensions: () int32."""
    most = 100 + 150.0 * (d + 3) ** 2 / jnp.sqrt(n.astype(jnp.float32))
    return jnp.minimum(most, LONGEST).astype(jnp.int32)


def tolstagnation(d: int, n: Array) -> Array:
    """The generations over which n candidates in d dimensions may stagnate: () int32."""
    return 100 + min(int(100 * d**1.5), LONGEST) // n
