"""COCO's suites with bounds, constraints, integers and noise, as runs of `bbob.py`; needs coco-experiment.

The optimum of these problems is told nowhere but in the header of the observer's `.tdat` files, so a suite is run once
into a temporary folder, one evaluation a problem, and the headers are read. What a noisy problem is without its noise
stands in the observer's `.dat` files, a line for each improvement of a fifth of a decade, which are read along.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bbob import Run

GROUPS = (  # of bbob-constrained: six numbers of constraints each
    "sphere", "separable ellipsoid", "linear slope", "rotated ellipsoid", "discus", "bent cigar", "different powers",
    "Rastrigin", "rotated Rastrigin",
)  # fmt: skip


def suite(name: str, dimension: int, instances: list[int]) -> Any:
    """The suite of one dimension, these instances, all functions."""
    import cocoex

    cocoex.log_level("warning")
    return cocoex.Suite(name, f"instances: {','.join(map(str, instances))}", f"dimensions: {dimension}")


@functools.cache
def optima(name: str, dimension: int, instances: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """(function, instance) -> the least (feasible) value."""
    import cocoex

    kind = name if name in ("bbob-constrained", "bbob-mixint") else "bbob"
    keys: dict[int, list[int]] = {}
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        cocoex.log_level("warning")
        observer = cocoex.Observer(kind, "result_folder: once")
        for problem in suite(name, dimension, list(instances)):
            problem.observe_with(observer)
            problem(problem.initial_solution)
            keys.setdefault(problem.id_function, []).append(problem.id_instance)
            problem.free()
        del observer
        for f, numbers in keys.items():
            (file,) = Path(folder).glob(f"exdata/once/data_f{f}/*_DIM{dimension}.tdat")
            values = [float(x) for x in re.findall(r"Fopt \(([^)]+)\)", file.read_text())]
            if len(values) != len(numbers):
                raise ValueError(f"{len(numbers)} headers in {file}, not {len(values)}")
            found |= {(f, i): value for i, value in zip(numbers, values, strict=True)}
    return found


class Rows:
    """A problem that takes candidates (n, d) and gives (n,), or (n, 1 + k) with k constraints."""

    def __init__(self, problem: Any, owner: Any) -> None:
        self.problem, self.owner = problem, owner  # a problem lives as long as its suite
        self.k = problem.number_of_constraints

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x)
        values = np.array([self.problem(row) for row in x])
        if not self.k:
            return values
        return np.column_stack([values, np.array([self.problem.constraint(row) for row in x])])


class Log:
    """(evaluations before, n) -> (n,), f - f_opt without noise of the last n; inf without an improvement."""

    def __init__(self, problem: Any, folder: Any, number: int) -> None:
        import cocoex

        self.folder = folder  # it lives as long as its files are read
        self.observer = cocoex.Observer("bbob", f"outer_folder: {folder.name} result_folder: {number}")
        problem.observe_with(self.observer)
        name = f"data_f{problem.id_function}/bbobexp_f{problem.id_function}_DIM{problem.dimension}.dat"
        self.file, self.lines = Path(folder.name) / str(number) / name, None

    def __call__(self, before: int, n: int) -> np.ndarray:
        if self.lines is None:
            self.lines = self.file.open()  # it is there after the first evaluation
        gaps = np.full(n, np.inf)
        for line in self.lines.read().splitlines():
            if line and not line.startswith("%"):
                evaluation, _, gap, *_ = line.split()
                gaps[int(evaluation) - 1 - before] = float(gap)
        return gaps


def noisy_runs(dimension: int, instances: list[int], functions: list[int] | None = None) -> list[Run]:
    """A run for each problem of bbob-noisy, f101 to f130, judged without noise."""
    owner, folder, found = suite("bbob-noisy", dimension, instances), tempfile.TemporaryDirectory(), []
    for i in range(len(owner)):
        p = owner[i]
        if functions is None or p.id_function in functions:
            log = Log(p, folder, i)
            found.append(Run(p.id_function, dimension, p.id_instance, Rows(p, owner), 0.0, noise_free=log))
    return found


def runs(name: str, dimension: int, instances: list[int], functions: list[int] | None = None) -> list[Run]:
    """A run for each problem of the suite."""
    if name == "bbob-noisy":
        return noisy_runs(dimension, instances, functions)
    best = optima(name, dimension, tuple(instances))
    owner = suite(name, dimension, instances)
    found = []
    for i in range(len(owner)):
        p = owner[i]
        if functions is None or p.id_function in functions:
            optimum = best[p.id_function, p.id_instance]
            k = p.number_of_constraints
            found.append(Run(p.id_function, dimension, p.id_instance, Rows(p, owner), optimum, constraints=k))
    return found


def box(run: Run) -> tuple[np.ndarray, np.ndarray, int]:
    """The bounds (d,) of a run's problem, and how many of its variables, the first ones, are integers."""
    p = run.problem.problem
    return np.array(p.lower_bounds, float), np.array(p.upper_bounds, float), int(p.number_of_integer_variables)


def group(function: int) -> str:
    """The group of a function of bbob-constrained."""
    return GROUPS[(function - 1) // 6]
