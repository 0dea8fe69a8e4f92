"""What pycma and cmaes do on the runs of `coco.py`, one after the other: each with restarts and doubled popsizes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from bbob import PRECISION, Run
from coco import box

from evoopt.strategies.covariance import recombination

SIGMA = 2.0
Search = Callable[[Run, int, Any, int, Callable[[], bool]], None]  # run, popsize, generator, seed, whether it is over


def restarted(search: Search, runs: list[Run], budget: int, seed: int, precision: float = PRECISION) -> None:
    """Run `search` on each, again and again with twice the popsize, until it is solved or has used up its budget."""
    for run in runs:
        # Another seed for each problem, and the same whichever problems run beside it.
        rng = np.random.default_rng([seed, run.function, run.dimension, run.instance])
        over = lambda run=run: run.best <= precision or run.evaluations >= budget
        popsize = recombination.default_popsize(run.dimension)
        while not over():
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                search(run, popsize, rng, int(rng.integers(1, 2**31)), over)
            popsize *= 2


def start(run: Run, rng: Any) -> np.ndarray:
    return rng.uniform(-4, 4, run.dimension)


def pycma(run: Run, popsize: int, rng: Any, seed: int, over: Callable[[], bool]) -> None:
    """pycma in the box, by its transformation of bounds."""
    import cma

    low, high, _ = box(run)
    options = {"popsize": popsize, "verbose": -9, "verb_log": 0, "seed": seed, "bounds": [list(low), list(high)]}
    es = cma.CMAEvolutionStrategy(start(run, rng), SIGMA, options)
    while not es.stop() and not over():
        x = es.ask()
        es.tell(x, list(run.evaluate(np.asarray(x))))


def cmaes(run: Run, popsize: int, rng: Any, seed: int, over: Callable[[], bool]) -> None:
    """cmaes' CMA in the box, by resampling."""
    from cmaes import CMA

    low, high, _ = box(run)
    bounds = np.column_stack([low, high])
    es = CMA(mean=start(run, rng), sigma=SIGMA, bounds=bounds, population_size=popsize, seed=seed)
    while not es.should_stop() and not over():
        x = [es.ask() for _ in range(popsize)]
        es.tell(list(zip(x, run.evaluate(np.asarray(x)).tolist(), strict=True)))


def pycma_constrained(run: Run, popsize: int, rng: Any, seed: int, over: Callable[[], bool]) -> None:
    """pycma's augmented Lagrangian, a feasible point sought first and at the end, as in `fmin_con2`."""
    import cma

    class OverError(Exception):
        pass

    def constraints(x: Any) -> list[float]:  # always asked before the value: one evaluation of both
        if over():
            raise OverError
        nonlocal last
        last = run.evaluate(np.asarray(x)[None])[0]
        return last[1:].tolist()

    last = np.zeros(1)
    fitness = cma.ConstrainedFitnessAL(
        lambda x: float(last[0]), constraints, find_feasible_first=True, archives=False, logging=0
    )
    options = {"popsize": popsize, "verbose": -9, "verb_log": 0, "seed": seed, "tolstagnation": 0}
    es = cma.CMAEvolutionStrategy(start(run, rng), SIGMA, options)
    with contextlib.suppress(OverError):
        while not es.stop() and not over():
            x = es.ask()
            es.tell(x, [fitness(point) for point in x])
            fitness.update(es)
        fitness.find_feasible(es)


def mixed_start(run: Run, rng: Any) -> tuple[np.ndarray, np.ndarray]:
    """A start in the box, and a quarter of the range of each variable."""
    low, high, k = box(run)
    x = rng.uniform(low, high)
    x[:k] = np.round(x[:k])
    return x, (high - low) / 4


def pycma_integers(run: Run, popsize: int, rng: Any, seed: int, over: Callable[[], bool]) -> None:
    """pycma with `integer_variables` and bounds."""
    import cma

    low, high, k = box(run)
    x0, stds = mixed_start(run, rng)
    options = {
        "popsize": popsize, "verbose": -9, "verb_log": 0, "seed": seed, "bounds": [list(low), list(high)],
        "integer_variables": list(range(k)), "CMA_stds": list(stds),
    }  # fmt: skip
    es = cma.CMAEvolutionStrategy(x0, 1.0, options)
    while not es.stop() and not over():
        x = es.ask()
        es.tell(x, list(run.evaluate(np.asarray(x))))


def cmawm(run: Run, popsize: int, rng: Any, seed: int, over: Callable[[], bool]) -> None:
    """cmaes' CMA-ES with margin."""
    from cmaes import CMAwM

    low, high, k = box(run)
    x0, stds = mixed_start(run, rng)
    steps = np.where(np.arange(run.dimension) < k, 1.0, 0.0)
    bounds = np.column_stack([low, high])
    es = CMAwM(x0, 1.0, bounds, steps, cov=np.diag(stds**2), population_size=popsize, seed=seed)
    while not es.should_stop() and not over():
        x, told = (np.asarray(part) for part in zip(*[es.ask() for _ in range(popsize)], strict=True))
        es.tell(list(zip(told, run.evaluate(x).tolist(), strict=True)))


def catcmawm(run: Run, popsize: int, rng: Any, seed: int, over: Callable[[], bool]) -> None:
    """cmaes' CatCMA with margin: variables of two values as categories, which its authors recommend."""
    from cmaes import CatCMAwM

    low, high, k = box(run)
    sizes = (high - low)[:k].astype(int) + 1
    binary, other = np.flatnonzero(sizes == 2), np.flatnonzero(sizes > 2)
    es = CatCMAwM(
        x_space=np.column_stack([low, high])[k:].tolist(),
        z_space=[list(range(sizes[i])) for i in other],
        c_space=[2] * len(binary),
        population_size=popsize,
        seed=seed,
    )
    while not es.should_stop() and not over():
        asked = [es.ask() for _ in range(popsize)]
        x = np.zeros((popsize, run.dimension))
        x[:, k:] = [s.x for s in asked]
        x[:, other] = [s.z for s in asked]
        x[:, binary] = [np.argmax(np.asarray(s.c), axis=1) for s in asked]
        es.tell(list(zip(asked, run.evaluate(x).tolist(), strict=True)))


def pycma_free(run: Run, popsize: int, rng: Any, seed: int, over: Callable[[], bool]) -> None:
    """pycma without bounds."""
    import cma

    es = cma.CMAEvolutionStrategy(start(run, rng), SIGMA, _quiet(popsize, seed))
    while not es.stop() and not over():
        x = es.ask()
        es.tell(x, list(run.evaluate(np.asarray(x))))


def pycma_noise_handler(run: Run, popsize: int, rng: Any, seed: int, over: Callable[[], bool]) -> None:
    """pycma with its `NoiseHandler`, up to 30 evaluations of a candidate."""
    import cma

    es = cma.CMAEvolutionStrategy(start(run, rng), SIGMA, _quiet(popsize, seed))
    handler = cma.NoiseHandler(run.dimension, [1, 1, 30])
    one = lambda x: float(run.evaluate(np.asarray(x)[None])[0])
    while not es.stop() and not over():
        x, values = es.ask_and_eval(one, evaluations=int(handler.evaluations))
        es.tell(x, values)
        es.sigma *= handler(x, values, one, es.ask)


def _quiet(popsize: int, seed: int) -> dict[str, Any]:
    return {"popsize": popsize, "verbose": -9, "verb_log": 0, "seed": seed}
