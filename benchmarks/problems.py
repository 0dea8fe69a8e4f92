"""Problems with bounds, constraints, integers and noise, a mixed space, and a loop that somebody owns, against peers.

    python benchmarks/problems.py --json results/problems-cpu.json                  # everything, about 40 minutes
    python benchmarks/problems.py --suite bbob-boxed --dimensions 5 --budget 1000 --instances 1-3
    python benchmarks/problems.py --suite mixed-space,session
    python benchmarks/problems.py --again ours                                      # peers from what was kept

Evaluation for evaluation on COCO's own suites, with the same seeds and budgets: ours and each peer restart with
doubled popsizes until the run is solved or its budget is used up. All of ours advance together, as in `bbob.py`. What
was run is kept in `--keep`, instance by instance, so an interrupted run goes on where it was.

Needs coco-experiment, cma and cmaes; optuna and scikit-learn for the mixed space.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: matrices are small, threads only wait
os.environ.setdefault("OMP_NUM_THREADS", "1")

import bbob
import coco
import coco_peers
import hyperparameters
import jax
import jax.numpy as jnp
import numpy as np
import session_overhead
from bbob import TARGETS, Run, numbers
from common import header, parser, row, write

from evoopt import spaces, wrappers
from evoopt.spaces import Space, integer, real
from evoopt.strategies import cma_es
from evoopt.strategies.covariance import recombination
from evoopt.wrappers.adaptive_popsize import FIRST, ROOM

Row = dict[str, Any]
EVALUATIONS = 200  # of the mixed space
RESTARTS = "ours BIPOP on bbob-boxed, otherwise IPOP; peers IPOP"
CONSTRAINED = 1e-6  # of a feasible point's value over the optimum
FLOAT_PRECISION = 1e-9  # relative, of a target


class Found(NamedTuple):
    """What one side found on some runs: (r,) function and instance, and evaluations to each target, inf where never."""

    function: np.ndarray
    instance: np.ndarray
    evaluations: np.ndarray  # (r,)
    reached: np.ndarray  # (r, 51)
    seconds: np.ndarray  # ()

    def share(self, budget: float) -> float:
        """The share of (run, target) pairs reached."""
        return float((self.reached <= budget).mean())

    def solved(self, budget: float, target: float) -> float:
        """The share of runs that reached this target."""
        return float((self.reached[:, np.argmin(np.abs(np.log(TARGETS / target)))] <= budget).mean())

    def of(self, keep: np.ndarray) -> Found:
        return Found._make([part[keep] for part in self[:-1]] + [self.seconds])


def found(runs: list[Run], seconds: float) -> Found:
    reached = [[run.reached(t * (1 + FLOAT_PRECISION)) for t in TARGETS] for run in runs]
    columns = zip(*((run.function, run.instance, run.evaluations) for run in runs), strict=True)
    return Found._make([*map(np.array, columns), np.array(reached), np.array(seconds)])


def joined(parts: list[Found]) -> Found:
    columns = list(zip(*parts, strict=True))[:-1]
    return Found._make([*map(np.concatenate, columns), np.array(sum(p.seconds for p in parts))])


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of COCO: how ours is built, who its peers are, how many instances at each budget."""

    name: str
    ours: Callable[[Run, int], tuple[Any, int, Any]]  # run, budget -> strategy, first popsize, start
    peers: dict[str, Callable[..., None]]
    rows: Callable[[str, Found, dict[str, Found], float], list[Row]]
    instances: dict[int, list[int]]  # evaluations over the dimension -> instances
    precision: float = bbob.PRECISION
    by_constraints: bool = False  # whether runs advance together only with as many constraints


def boxed(run: Run, budget: int) -> tuple[Any, int, Any]:
    """The default handling of bounds, around restarts."""
    n, start = recombination.default_popsize(run.dimension), functools.partial(bbob.uniform, run.dimension)
    inner = dataclasses.replace(wrappers.bipop(cma_es(n, sigma=coco_peers.SIGMA), n, start=start), most=8192)
    return wrappers.bounded(inner, -5.0, 5.0), n, start


def mixed_integer(run: Run, budget: int) -> tuple[Any, int, Any]:
    """A space, around restarts. Leaves stand side by side in the order of the problem's variables."""
    low, high, k = coco.box(run)
    space = Space(
        [integer(int(a), int(b)) for a, b in zip(low[:k], high[:k], strict=True)]
        + [real(a, b) for a, b in zip(low[k:].tolist(), high[k:].tolist(), strict=True)]
    )
    sides = {name: tuple(map(jnp.asarray, v.box())) for name, v in space.free.items()}

    def start(key: Any) -> Any:
        """u drawn evenly from the box, then at a whole number, as those of the peers."""
        keys = jax.random.split(key, len(sides))
        even = lambda key, box: jax.random.uniform(key, box[0].shape, jnp.float64, minval=box[0], maxval=box[1])
        u = {name: even(key, box) for key, (name, box) in zip(keys, sides.items(), strict=True)}
        return space.located(space.decode(u))

    n = recombination.default_popsize(run.dimension)
    inner = dataclasses.replace(wrappers.ipop(cma_es(n, sigma=1.0), n, start=start), most=8192)
    return spaces.over(inner, space), n, start


def constrained(run: Run, budget: int) -> tuple[Any, int, Any]:
    """The augmented Lagrangian, around restarts that go on where only values are alike."""
    n, start = recombination.default_popsize(run.dimension), functools.partial(bbob.uniform, run.dimension)
    inner = dataclasses.replace(
        wrappers.ipop(cma_es(n, sigma=coco_peers.SIGMA), n, start=start, tolfun=0.0, tolfunhist=0.0), most=8192
    )
    return wrappers.augmented_lagrangian(inner, run.constraints), n, start


def group_rows(label: str, ours: Found, peers: dict[str, Found], budget: float) -> list[Row]:
    """The share of runs with a feasible point within 1e-6 of the optimum: of each group of functions, and of all."""
    rows = []
    for name, theirs in peers.items():
        for group in coco.GROUPS:
            here, there = (
                side.of(np.array([coco.group(f) == group for f in side.function])) for side in (ours, theirs)
            )
            solved = here.solved(budget, CONSTRAINED), there.solved(budget, CONSTRAINED)
            rows.append(share_row(f"{label}, {group}, {name}", *solved, "runs"))
        solved = ours.solved(budget, CONSTRAINED), theirs.solved(budget, CONSTRAINED)
        rows.append(share_row(f"{label}, all, {name}", *solved, "runs"))
        targets = ours.share(budget), theirs.share(budget)
        rows.append(share_row(f"{label}, all, {name}", *targets, "targets"))
    return rows


def share_row(name: str, ours: float, theirs: float, unit: str) -> Row:
    """A row of two shares, either of which may be nothing."""
    if theirs:
        return row(name, ours, unit, theirs, more_is_better=True)
    return row(name, ours, unit) | {"peer": theirs, "ratio": 1.0 if ours == theirs else None}


def noisy(run: Run, budget: int) -> tuple[Any, int, Any]:
    """What `wrappers.noisy` chooses for restarts of CMA-ES."""
    start = functools.partial(bbob.uniform, run.dimension)
    n = FIRST * recombination.default_popsize(run.dimension)
    inner = dataclasses.replace(wrappers.ipop(cma_es(n, sigma=coco_peers.SIGMA), n, start=start), most=ROOM * n)
    return wrappers.adaptive_popsize(inner), n, start


# IPOP-ACTCMA-ES of the COCO archive, the best there: share of 450 runs at 1e-8 within 1e4 D evaluations.
ARCHIVED = {5: 0.587, 10: 0.509}


def solved_rows(label: str, ours: Found, peers: dict[str, Found], budget: float) -> list[Row]:
    """The share of runs solved to 1e-8, against each peer and, at 1e4 D, the best of the archive."""
    share = ours.solved(budget, bbob.PRECISION)
    error = np.sqrt(share * (1 - share) / len(ours.function))
    rows = [
        row(f"{label}, {name}", share, "solved to 1e-8", theirs.solved(budget, bbob.PRECISION), more_is_better=True)
        for name, theirs in peers.items()
    ]
    archived = ARCHIVED.get(next((d for d in ARCHIVED if f" {d}-D 10000 D" in label), 0))
    if archived:
        rows.append(
            row(f"{label}, IPOP-ACTCMA-ES of the archive", share, "solved to 1e-8", archived, more_is_better=True)
        )
    each = {int(f): ours.of(ours.function == f).solved(budget, bbob.PRECISION) for f in np.unique(ours.function)}
    print(f"    standard error {error:.3f};", " ".join(f"f{f} {x:.2f}" for f, x in each.items()))
    return rows


def share_rows(label: str, ours: Found, peers: dict[str, Found], budget: float) -> list[Row]:
    """The share of targets, against the best peer and then each."""
    values = {name: theirs.share(budget) for name, theirs in peers.items()}
    best = max(values, key=values.__getitem__)
    rows = [row(f"{label}, best peer {best}", ours.share(budget), "targets", values[best], more_is_better=True)]
    for name, theirs in peers.items():
        rows.append(row(f"{label}, {name}", ours.share(budget), "targets", values[name], more_is_better=True))
        lost = lacking(ours, theirs, budget)
        if lost:
            print(f"    fewer targets than {name} on", lost)
    solved = {name: round(theirs.solved(budget, 1e-8), 3) for name, theirs in peers.items()}
    print(f"    solved to 1e-8: ours {ours.solved(budget, 1e-8):.3f}, peers {solved}")
    return rows


def lacking(ours: Found, theirs: Found, budget: float) -> str:
    """The functions on which a peer reached more targets, and by how much of the share."""
    parts = []
    for f in np.unique(ours.function):
        gap = ours.of(ours.function == f).share(budget) - theirs.of(theirs.function == f).share(budget)
        if gap < -0.02:
            parts.append(f"f{f} {gap:.2f}")
    return " ".join(parts)


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "bbob-boxed",
            boxed,
            {"pycma": coco_peers.pycma, "cmaes": coco_peers.cmaes},
            share_rows,
            {1000: [1, 2, 3, 4, 5], 10000: [1, 2, 3, 4, 5]},
        ),
        Suite(
            "bbob-mixint",
            mixed_integer,
            {"pycma": coco_peers.pycma_integers, "CMAwM": coco_peers.cmawm, "CatCMAwM": coco_peers.catcmawm},
            share_rows,
            {1000: [1, 2, 3]},
        ),
        Suite(
            "bbob-constrained",
            constrained,
            {"pycma": coco_peers.pycma_constrained},
            group_rows,
            {1000: [1, 2, 3], 10000: [1]},
            precision=CONSTRAINED,
            by_constraints=True,
        ),
        Suite(
            "bbob-noisy",
            noisy,
            {"pycma": coco_peers.pycma_free, "pycma-noise-handler": coco_peers.pycma_noise_handler},
            solved_rows,
            {10000: [1, 2, 3]},  # pycma takes minutes an instance; the archive has 15: --instances 1-15
        ),
    )
}


def advanced(suite: Suite, dimension: int, budget: int, instances: list[int], *, seed: int) -> Found:
    """Ours on all problems, together."""
    runs = coco.runs(suite.name, dimension, instances)
    begin = time.perf_counter()
    parts = [runs]
    if suite.by_constraints:
        parts = [[r for r in runs if r.constraints == k] for k in sorted({r.constraints for r in runs})]
    for part in parts:
        strategy, popsize, start = suite.ours(part[0], budget)
        size = min(bbob.BLOCK, 8 * -(-len(part) // 8))
        info = bbob.solve(
            strategy, popsize, part, budget, seed, start=start, precision=suite.precision, block_size=size
        )
        print(f"    ours: {len(part)} runs, {info['wall']:.0f} s (compiling {info['compiling']:.0f}), {info['stops']}")
    return found(runs, time.perf_counter() - begin)


def peer(suite: Suite, name: str, dimension: int, budget: int, instances: list[int], *, seed: int) -> Found:
    """A peer on all problems, one after the other."""
    runs = coco.runs(suite.name, dimension, instances)
    begin = time.perf_counter()
    coco_peers.restarted(suite.peers[name], runs, budget, seed, suite.precision)
    return found(runs, time.perf_counter() - begin)


def kept(file: Path, again: bool, make: Callable[[list[int]], Found], instances: list[int]) -> Found:
    """What `file` holds, or what `make(instances)` gives, which is then kept there."""
    if file.exists() and not again:
        with np.load(file, allow_pickle=False) as data:
            return Found(**{field: data[field] for field in Found._fields})
    fresh = make(instances)
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".part.npz")
    np.savez_compressed(half, **fresh._asdict())
    half.rename(file)
    return fresh


def on_suite(suite: Suite, args: Any, save: Callable[[list[Row]], None]) -> None:
    """All rows of a suite."""
    plan = {b: args.instances or some for b, some in suite.instances.items() if not args.budget or b in args.budget}
    for d in args.dimensions:
        sides: dict[str, dict[int, Found]] = {}
        for factor in sorted(plan, reverse=True):
            longer = {i for more in plan if more > factor for i in plan[more]}
            instances = [i for i in plan[factor] if i not in longer]
            if not instances:
                continue
            stem = f"{suite.name}-{d}D-{factor}-seed{args.seed}"
            for name in args.peers or suite.peers:
                if name not in suite.peers:
                    continue
                again = name in args.again
                theirs = functools.partial(peer, suite, name, d, factor * d, seed=args.seed)
                parts = [kept(args.keep / f"{stem}-{name}-i{i}.npz", again, theirs, [i]) for i in instances]
                sides.setdefault(name, {})[factor] = joined(parts)
                print(f"    {name}: {d}-D {factor} D, {parts[0].seconds:.0f} s an instance", flush=True)
            some = "_".join(map(str, instances))
            make = functools.partial(advanced, suite, d, factor * d, seed=args.seed)
            ours = kept(args.keep / f"{stem}-ours-i{some}.npz", "ours" in args.again, make, instances)
            sides.setdefault("ours", {})[factor] = ours
        for factor in sorted(plan):
            whole = {name: joined([f for b, f in side.items() if b >= factor]) for name, side in sides.items()}
            ours = whole.pop("ours")
            label = f"{suite.name} {d}-D {factor} D, instances {span(ours.instance)}"
            save(suite.rows(label, ours, whole, factor * d))


def span(instances: np.ndarray) -> str:
    return ",".join(map(str, np.unique(instances)))


def on_mixed_space(args: Any, save: Callable[[list[Row]], None]) -> None:
    """Hyperparameters of a classifier: the regret after 200 evaluations, against the best that anyone saw."""
    curves: dict[str, np.ndarray] = {}
    for name in ("ours", *(args.peers or hyperparameters.SAMPLERS)):
        if name != "ours" and name not in hyperparameters.SAMPLERS:
            continue
        file, sides = args.keep / f"mixed-space-{name.replace(' ', '-')}.npy", []
        if file.exists() and name not in args.again:
            sides = list(np.load(file))
        for seed in range(len(sides), args.seeds):
            if name == "ours":
                sides.append(hyperparameters.search(EVALUATIONS, seed))
            else:
                sides.append(hyperparameters.optuna_search(name, EVALUATIONS, seed))
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.array(sides))
        curves[name] = np.array(sides[: args.seeds])
    least = min(float(c.min()) for c in curves.values())
    for n in (50, 100, EVALUATIONS):
        regret = {name: float(np.median(c[:, n - 1])) - least for name, c in curves.items()}
        save(
            [
                row(
                    f"mixed space, {n} evaluations, {args.seeds} seeds, {name}", regret["ours"], "median regret", theirs
                )
                for name, theirs in regret.items()
                if name != "ours"
            ]
        )


def on_session(args: Any, save: Callable[[list[Row]], None]) -> None:
    """A loop that somebody owns, told one candidate at a time: ask and tell of CMA-ES, without the objective."""
    here, there, compiled = session_overhead.seconds(args.repeats)
    label = f"Session told one at a time, {session_overhead.D}-D CMA-ES, ask and tell of a candidate"
    save([row(label, here * 1e6, "us", there * 1e6)])
    save([row("compilations after the first generation", compiled, "programs")])


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--suite", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    p.add_argument("--dimensions", type=numbers, default=[5, 10])
    p.add_argument("--instances", type=numbers, help="at every budget; by default fewer at the larger ones")
    p.add_argument("--budget", type=numbers, help="evaluations over the dimension, such as 1000,10000")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--seeds", type=int, default=20, help="of the mixed space")
    p.add_argument("--peers", type=lambda text: text.split(","), help="only these")
    p.add_argument("--keep", type=Path, default=Path(__file__).parents[1] / "results" / "problems")
    p.add_argument("--again", type=lambda text: text.split(","), default=[], help="sides to run again, such as ours")
    args = p.parse_args()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / "results" / "compiled"))
    head = header(
        ("coco-experiment", "cma", "cmaes", "optuna", "scikit-learn", "numpy"), seed=args.seed, restarts=RESTARTS
    )
    rows: list[Row] = []

    def save(more: list[Row]) -> None:
        rows.extend(more)
        write(args.json, head, rows)  # after each part, so that an interrupted run leaves what it has

    for name in args.suite:
        if name not in PARTS:
            sys.exit(f"no part '{name}': one of {', '.join(PARTS)}")
        PARTS[name](args, save)


PARTS: dict[str, Callable[[Any, Callable[[list[Row]], None]], None]] = {
    **{name: functools.partial(on_suite, suite) for name, suite in SUITES.items()},
    "mixed-space": on_mixed_space,
    "session": on_session,
}

if __name__ == "__main__":
    main()
