"""Return against environment steps and against seconds, median and quartiles over seeds.

    python benchmarks/neuroevolution.py --json results/neuroevolution.json --plot results/neuroevolution.png

On a GPU, Brax ant under the protocol of EvoJAX's table (population 256, 1200 iterations, episodes of 1000 steps; its
best is 6726 for OpenAI-ES, on the Brax of that time, so the figure is a bar and not a comparison of equals):

    python benchmarks/neuroevolution.py --environments brax:ant --backend generalized --policy mlp \
        --popsize 256 --generations 1200 --episode-length 1000 --seeds 5 --json results/ant.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from common import header, parser, row, write

from evoopt import minimize, strategies
from evoopt.envs import policies

SETTINGS = {"openai_es": {"sigma": 0.05, "learning_rate": 0.03}}
# policy, generations and steps of an episode in which learning shows; the command line overrules them.
SETUPS = {
    "brax:inverted_double_pendulum": ("linear", 150, 200),
    "brax:hopper": ("linear", 100, 300),
    "gymnax:Pendulum-v1": ("mlp", 600, 200),
}


def main() -> None:
    """Run all seeds and print medians and quartiles."""
    p = parser(__doc__)
    p.add_argument("--environments", default=",".join(SETUPS))
    p.add_argument("--backend", default="spring")
    p.add_argument("--strategy", default="openai_es")
    p.add_argument("--policy", help="linear, mlp or gru; by default what suits the environment, as with the next two")
    p.add_argument("--generations", type=int)
    p.add_argument("--episode-length", type=int)
    p.add_argument("--popsize", type=int, default=64)
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--plot", metavar="FILE", help="curves of all environments")
    options = p.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / "results" / "compiled"))
    head = header(("brax", "gymnax"), **{k: v for k, v in vars(options).items() if k not in ("json", "plot")})
    rows, curves = [], {}
    for name in options.environments.split(","):
        policy, generations, length = SETUPS.get(name, ("mlp", 100, 1000))
        chosen = {
            "policy": options.policy or policy,
            "generations": options.generations or generations,
            "episode_length": options.episode_length or length,
        }
        curves[name] = measure(name, argparse.Namespace(**{**vars(options), **chosen}))
        best = curves[name]["test"]
        rows.append(row(f"{name} test return, median of {options.seeds} seeds", float(np.median(best)), "return"))
        quartiles = [float(np.percentile(best, q)) for q in (25, 75)]
        rows[-1] |= {"quartiles": quartiles, "seconds": float(np.median(curves[name]["seconds"][:, -1]))}
        rows[-1]["steps"] = float(np.median(curves[name]["steps"][:, -1]))
        rows[-1] |= chosen
        rows[-1]["first_call_s"] = curves[name]["first_call"]
        rows[-1]["curve"] = {
            axis: np.median(curves[name][axis], 0).round(2).tolist() for axis in ("steps", "seconds", "returns")
        }
    write(options.json, head, rows)
    if options.plot:
        plot(curves, options.plot)


def measure(name: str, options) -> dict:
    """Returns (seeds, generations) with the steps and seconds at which they were reached, compilation taken out."""
    import importlib

    package, environment = name.split(":")
    envs = importlib.import_module(f"evoopt.envs.{package}")
    extra = {"backend": options.backend} if package == "brax" else {}
    task = envs.make(environment, episode_length=options.episode_length, **extra)
    squash = {"squash": None} if task.environment.discrete else {}
    policy = getattr(policies, options.policy)(task.observation_size, task.action_size, **squash)
    task = envs.make(environment, policy, episode_length=options.episode_length, **extra)
    strategy = getattr(strategies, options.strategy)(options.popsize, **SETTINGS.get(options.strategy, {}))
    found = {"returns": [], "steps": [], "seconds": [], "test": []}
    first_call = 0.0
    for seed in range(options.seeds):
        keys = jax.random.split(jax.random.key(seed), 4)
        begin = time.perf_counter()
        result = minimize(
            task, task.init(keys[0]), strategy, key=keys[2], context=task.context(keys[1]), update=task.update,
            summarize=lambda values, aux: {"steps": aux["steps"].sum()}, totals=("steps",),
            generations=options.generations, progress=False,
        )  # fmt: skip
        history = result.history
        seconds = np.array([r["seconds"] for r in history])
        first_call = max(first_call, seconds[0]) if seed == 0 else first_call
        found["returns"].append([-r["mean"] for r in history])
        found["steps"].append([r["steps"] for r in history])
        found["seconds"].append(seconds - seconds[0])
        test = task.evaluate(result.recommended, result.context, keys[3], episodes=32)["returns"]
        found["test"].append(float(test.mean()))
        print(f"  {name} seed {seed}: {found['test'][-1]:.1f} in {time.perf_counter() - begin:.0f} s", flush=True)
    return {k: np.array(v) for k, v in found.items()} | {"first_call": float(first_call)}


def plot(curves: dict, path: str) -> None:
    """Median and quartiles, against steps above and seconds below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(4.2 * len(curves), 6.4), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, data) in enumerate(curves.items()):
        low, middle, high = np.percentile(data["returns"], [25, 50, 75], axis=0)
        for line, (axis, label) in enumerate(
            (("steps", "environment steps"), ("seconds", "seconds after compilation"))
        ):
            x, ax = np.median(data[axis], 0), axes[line, column]
            ax.plot(x, middle, color="#d9662b")
            ax.fill_between(x, low, high, color="#d9662b", alpha=0.2, linewidth=0)
            ax.set_xlabel(label)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.grid(color="#e3e6ea")
            ax.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(name, loc="left", fontweight="bold")
    for line in (0, 1):
        axes[line, 0].set_ylabel("mean return of the generation")
    figure.savefig(path)


if __name__ == "__main__":
    main()
