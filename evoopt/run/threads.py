"""LAPACK's threads: fewer of them where they would wait for cores that others use.

JAX decomposes matrices on the CPU by SciPy's OpenBLAS, whose threads spin while they wait for each other. Where another
process is busy, two threads took 79 ms for the eigenvectors of 100 x 100 and 272 ms for 200 x 200; one took .6 and
2.5 ms. From about 512 on more threads help, as many as there are free cores.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax

SMALL = 64  # rows of a matrix; below, OpenBLAS takes one thread by itself
LARGE = 512  # rows of a matrix; up to here one thread is as fast as several


@functools.cache
def _libraries() -> list[Any]:
    """The libraries that JAX calls; NumPy's own, which an objective may use, is another one."""
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().lib_controllers
    return [one for one in found if one.user_api == "blas" and "numpy.libs" not in one.filepath]


def free_cores() -> int:
    """Cores that nobody used in the last minute, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, round(cores + 1 - os.getloadavg()[0])) if hasattr(os, "getloadavg") else cores


@contextlib.contextmanager
def limited(rows: int) -> Iterator[None]:
    """LAPACK with as many threads as matrices of `rows` rows need; afterwards as many as it had."""
    if jax.default_backend() != "cpu" or "scipy.linalg" not in sys.modules:  # JAX imports it with the first matrix
        yield
        return
    before = [(one, one.get_num_threads()) for one in _libraries()]
    most = 1 if rows < LARGE else free_cores()
    for one, count in before:
        one.set_num_threads(min(most, count))
    try:
        yield
    finally:
        for one, count in before:
            one.set_num_threads(count)


def rows(state: Any) -> int:
    """The rows of the largest matrix in `state` that may be decomposed; 0 where there is none."""
    sides = [min(x.shape[-2:]) for x in jax.tree.leaves(state) if getattr(x, "ndim", 0) >= 2]
    return max(sides, default=0)
