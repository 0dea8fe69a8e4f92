"""Expensive objectives: what ten evaluations for each number find, against Optuna's Gaussian-process sampler.

    python benchmarks/expensive.py --json results/expensive-cpu.json       # about 25 minutes on two cores

BBOB functions f1 to f20, function f in 4 + f mod 5 dimensions, a box of [-5, 5], one instance for each seed. The figure
is the share of the pairs (function, seed) in which ours ends lower, a tie counting half, after 5 and 10 evaluations for
each number; 0.5 is as good. Needs coco-experiment, optuna, and PyTorch for its sampler.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: matrices are small, threads only wait
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import numpy as np
from common import header, parser, row, write

from evoopt import minimize
from evoopt.strategies import bayesian_optimization

FUNCTIONS = range(1, 21)
EACH = 10  # evaluations for each number


def dimension(function: int) -> int:
    return 4 + function % 5


def ours(objective: Any, d: int, seed: int) -> None:
    strategy = bayesian_optimization(lower=-5.0, upper=5.0, memory=EACH * d)
    x0 = np.random.default_rng(seed).uniform(-4, 4, d)
    minimize(objective, x0, strategy, evaluations=EACH * d, jit=False, key=seed)


def optuna_gp(objective: Any, d: int, seed: int) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sampler is marked experimental
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed))
        study.optimize(
            lambda trial: objective(np.array([trial.suggest_float(f"x{i}", -5, 5) for i in range(d)])),
            n_trials=EACH * d,
        )


def found(side: Any, function: int, seed: int) -> list[float]:
    """The best f - f_opt after half of the evaluations and after all of them."""
    import cocoex

    d = dimension(function)
    problem = cocoex.BareProblem("bbob", function, d, seed + 1)
    best, seen = float(problem.best_value()), []

    def objective(x: Any) -> float:
        value = float(problem(np.array(x, float)))
        seen.append(value - best)
        return value

    side(objective, d, seed)
    return [min(seen[: EACH * d // 2]), min(seen)]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--seeds", type=int, default=5)
    args = p.parse_args()
    jax.config.update("jax_enable_x64", True)
    head = header(("optuna", "torch", "coco-experiment", "numpy"), seeds=args.seeds)
    results: dict[str, list[list[float]]] = {"ours": [], "optuna": []}
    seconds = dict.fromkeys(results, 0.0)
    for f in FUNCTIONS:
        for seed in range(args.seeds):
            for name, side in (("ours", ours), ("optuna", optuna_gp)):
                begin = time.perf_counter()
                results[name].append(found(side, f, seed))
                seconds[name] += time.perf_counter() - begin
        here, there = (np.median(np.array(x[-args.seeds :])[:, 1]) for x in results.values())
        print(f"  f{f} in {dimension(f)}-D: {here:.3g}, Optuna {there:.3g}", flush=True)
    here, there = (np.array(x) for x in results.values())
    wins = (here < there).mean(0) + (here == there).mean(0) / 2
    n = len(FUNCTIONS) * args.seeds
    write(
        args.json,
        head,
        [
            row(
                f"expensive, {EACH // 2} D evaluations, pairs won of {n}",
                float(wins[0]),
                "share",
                0.5,
                more_is_better=True,
            ),
            row(
                f"expensive, {EACH} D evaluations, pairs won of {n}", float(wins[1]), "share", 0.5, more_is_better=True
            ),
            row("expensive, wall-clock", seconds["ours"], "s", seconds["optuna"]),
        ],
    )


if __name__ == "__main__":
    main()
