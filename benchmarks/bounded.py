"""BIPOP-CMA-ES in a box against pycma's: CEC 2022's first hybrid function, error after a budget of evaluations.

    python benchmarks/bounded.py --json results/bounded-cpu.json        # needs cma and ioh, of the extra `dev`

Ours is `bounded(bipop(cma_es(slots)))`: reflection at the walls, and slots that a run does not use are not
evaluated. pycma's is `fmin2` with its own transform of bounds and `bipop=True`. Both start at a point drawn uniformly
from the box, with the same step-size and first popsize.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cma
import ioh
import jax
import numpy as np
from common import header, parser, row, write

from evoopt import minimize
from evoopt.strategies import cma_es
from evoopt.wrappers import bipop, bounded

LOW, HIGH = -100.0, 100.0


def problem(name: str, d: int) -> tuple[Callable[[np.ndarray], float], float]:
    """The function, and its least value."""
    f = ioh.get_problem(name, 1, d, ioh.ProblemClass.REAL)
    return lambda x: float(f(np.asarray(x, float).tolist())), float(f.optimum.y)


def ours(f: Callable[[np.ndarray], float], x0: np.ndarray, sigma: float, slots: int, budget: int, seed: int) -> dict:
    """Best value, evaluations and restarts."""
    strategy = bounded(bipop(cma_es(slots, sigma=sigma)), LOW, HIGH)
    result = minimize(f, x0, strategy, key=seed, evaluations=budget, jit=False)
    return {"best": result.best_value, "evaluations": result.evaluations, "restarts": int(result.state.restarts)}


def peer(f: Callable[[np.ndarray], float], x0: np.ndarray, sigma: float, budget: int, seed: int) -> dict:
    """The same of pycma."""
    options = {"bounds": [LOW, HIGH], "maxfevals": budget, "seed": seed + 1, "verbose": -9}  # its seed 0 is the clock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, es = cma.fmin2(f, x0, sigma, options, restarts=9, bipop=True)
    return {"best": float(es.best.f), "evaluations": int(es.result.evaluations)}


def main() -> None:
    """One row a seed: the error of both."""
    p = parser(__doc__)
    p.add_argument("--function", default="CEC2022HybridFunction1")
    p.add_argument("--dimension", type=int, default=10)
    p.add_argument("--budget", type=int, default=30_000)
    p.add_argument("--slots", type=int, default=256)
    p.add_argument("--sigma", type=float, default=40.0)
    p.add_argument("--seeds", type=int, default=2)
    options = p.parse_args()
    jax.config.update("jax_enable_x64", True)
    chosen = {name: getattr(options, name) for name in ("function", "dimension", "budget", "slots", "sigma")}
    head = header(("cma", "ioh"), **chosen)
    f, least = problem(options.function, options.dimension)
    rows = []
    for seed in range(options.seeds):
        x0 = np.random.default_rng(seed).uniform(LOW, HIGH, options.dimension)
        here = ours(f, x0, options.sigma, options.slots, options.budget, seed)
        there = peer(f, x0, options.sigma, options.budget, seed)
        label = f"seed {seed}: {here['evaluations']} evaluations, {here['restarts']} restarts"
        rows.append(row(label, here["best"] - least, "error", there["best"] - least))
    write(options.json, head, rows)


if __name__ == "__main__":
    main()
