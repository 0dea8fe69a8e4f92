"""Search strategies on BBOB: COCO's own instances, in float64, all problems of a dimension at once.

    python benchmarks/bbob.py --strategy cma_es --restarts bipop --dimensions 5 --budget 1000 --json FILE
    python benchmarks/bbob.py --dimensions 5,20 --budget 1000 --lengths FOLDER     # keep the run lengths, and then
    python benchmarks/bbob.py --plot ecdf.png --of FOLDER                          # draw all that are in the folder

Runs of one dimension advance together: `ask` and `tell` are vmapped over blocks of runs, values come from cocoex on
the host, one call for each run's active candidates. A run that reached 1e-8 or used up its budget is dropped. Runs are
grouped by their popsize in a few sizes, so that a run of 8 candidates does not pay for one of 512; the largest group
advances first, so that blocks are full, and while the host evaluates one block the device tells another.

Needs coco-experiment; for the published figures cocopp (and six, which it does not declare); matplotlib for `--plot`;
cma for `--peer`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import importlib.util
import json
import os
import pathlib
import pickle
import platform
import time
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # float64, and the values come from the host anyway
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # operations are small: threads only wait

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import auto, noise, strategies, trees, wrappers
from evoopt.answers import Answer
from evoopt.spaces import Space, over, real
from evoopt.stopping import Stop
from evoopt.strategies.covariance import recombination
from evoopt.wrappers.portfolio import Portfolio
from evoopt.wrappers.restarts import Restarts
from evoopt.wrappers.restarts import State as RestartsState
from evoopt.wrappers.surrogate import Surrogate

TARGETS = 10 ** np.arange(2, -8.1, -0.2)  # COCO's 51, in f - f_opt
PRECISION = 1e-8
FEASIBLE = 1e-8  # the most by which a constraint may be violated
BLOCK = 128  # runs in one dispatch; one shape for each popsize, so compilation stays short
GROWTH = 4  # between popsizes that are compiled
ROOM = 16  # popsizes of a surrogate's restarts grow up to this many times the first
ALWAYS_SOLVED = (1, 2, 5, 6, 7, 8, 9, 10, 11, 13, 14)
# Published share of (function, run) pairs at 1e-8 within 1e2, 1e3, 1e4 D evaluations: the COCO archive.
PUBLISHED = {
    ("IPOP-ACTCMA-ES", 5): (0.042, 0.542, 0.778),
    ("IPOP-ACTCMA-ES", 10): (0.047, 0.492, 0.686),
    ("IPOP-ACTCMA-ES", 20): (0.047, 0.436, 0.639),
    ("BIPOP-CMA-ES", 5): (0.047, 0.508, 0.769),
    ("BIPOP-CMA-ES", 10): (0.042, 0.439, 0.683),
    ("BIPOP-CMA-ES", 20): (0.042, 0.261, 0.583),
}


@dataclasses.dataclass
class Run:
    """One problem and what was seen on it."""

    function: int
    dimension: int
    instance: int
    problem: Any  # (n, d) -> (n,), or with k constraints (n, 1 + k)
    optimum: float
    constraints: int = 0
    noise_free: Any = None  # (evaluations before, n) -> (n,), f - f_opt without noise; None where answers have none
    evaluations: int = 0
    best: float = np.inf  # f - f_opt
    trace: list = dataclasses.field(default_factory=list)  # (evaluation, f - f_opt) of every improvement

    def saw(self, gaps: np.ndarray) -> None:
        """Note f - f_opt of the next evaluations, in their order."""
        for i in np.flatnonzero(gaps < self.best):
            if gaps[i] < self.best:
                self.best = float(gaps[i])
                self.trace.append((self.evaluations + int(i) + 1, self.best))
        self.evaluations += len(gaps)

    def gaps(self, answers: np.ndarray) -> np.ndarray:
        """f - f_opt of answers (n,), or (n, 1 + k) with k constraints; infinite where a constraint is violated."""
        if self.noise_free:
            return self.noise_free(self.evaluations, len(answers))
        if not self.constraints:
            return answers - self.optimum
        return np.where(answers[:, 1:].max(axis=1) <= FEASIBLE, answers[:, 0] - self.optimum, np.inf)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        answers = self.problem(x)
        self.saw(self.gaps(answers))
        return answers

    def reached(self, target: float) -> float:
        """Evaluations until f - f_opt <= target; inf if never."""
        return next((float(n) for n, gap in self.trace if gap <= target), np.inf)


def problems(functions: list[int], dimension: int, instances: list[int]) -> list[Run]:
    import cocoex

    runs = []
    for f in functions:
        for i in instances:
            p = cocoex.BareProblem("bbob", f, dimension, i)
            runs.append(Run(f, dimension, i, p, float(p.best_value())))
    return runs


def uniform(dimension: int, key: Any) -> Any:
    return jax.random.uniform(key, (dimension,), jnp.float64, minval=-4.0, maxval=4.0)


def build(
    name: str, restarts: str, dimension: int, popsize: int | None, budget: int, surrogate: bool = False
) -> tuple[Any, int]:
    """The strategy and the candidates that its first generation has room for."""
    if name == "auto":
        space = Space({"x": real(-5.0, 5.0, shape=(dimension,))})
        choice = auto(parallel=popsize or 1).chosen(space, budget)
        print(choice.why)
        return over(choice.strategy, space), room(choice.strategy, space.origin())
    make = getattr(strategies, name)
    start = functools.partial(uniform, dimension)
    takes = make.__code__.co_varnames[: make.__code__.co_argcount + make.__code__.co_kwonlyargcount]
    options: dict[str, Any] = {"sigma": 2.0} if "sigma" in takes else {}
    if "budget" in takes:
        options["budget"] = float(budget)
    if "lower" in takes and "upper" in takes:
        options |= {"lower": -5.0, "upper": 5.0}
    if restarts == "none":
        strategy = make(popsize, **options) if popsize else make(**options)
        return strategy, room(strategy, jnp.zeros(dimension))
    n = popsize or recombination.default_popsize(dimension)
    wrap = {"ipop": wrappers.ipop, "bipop": wrappers.bipop}[restarts]
    if surrogate:  # its state holds a population, so there is one program for all popsizes
        return wrappers.surrogate(wrap(make(ROOM * n, **options), n, start=start)), ROOM * n
    return dataclasses.replace(wrap(make(n, **options), n, start=start), most=8192), n


def in_box(dimension: int) -> Any:
    """key -> a start drawn evenly from [-4, 4], in the units of the space that `auto` searches."""
    space = Space({"x": real(-5.0, 5.0, shape=(dimension,))})
    return lambda key: space.located({"x": uniform(dimension, key)})


def room(strategy: Any, start: Any) -> int:
    """The candidates of a generation, active or not; of restarts, those of the first run."""
    if isinstance(strategy, Portfolio):
        return max(room(phase.strategy, start) for phase in strategy.phases)
    if isinstance(strategy, Restarts):
        return strategy.popsize or recombination.default_popsize(trees.size(start))
    state = jax.eval_shape(strategy.init, start, jax.random.key(0))
    return len(jax.eval_shape(strategy.ask, state, jax.random.key(0)))


class Packing:
    """States of several runs as one matrix, so that taking rows of it is one operation and not one for each leaf."""

    def __init__(self, states: Any) -> None:
        self.leaves, self.treedef = jax.tree.flatten(jax.eval_shape(lambda: states))
        self.keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in self.leaves]

    def pack(self, states: Any) -> jax.Array:
        leaves = [
            jax.random.key_data(x) if key else x for x, key in zip(jax.tree.leaves(states), self.keys, strict=True)
        ]
        parts = [x.reshape(x.shape[0], -1).astype(jnp.float64) for x in leaves]
        ends = np.cumsum([x.shape[1] for x in parts]).tolist()
        rows = jnp.zeros((parts[0].shape[0], ends[-1]))  # written part by part: concatenating so many is slow
        for x, end in zip(parts, ends, strict=True):
            rows = jax.lax.dynamic_update_slice(rows, x, (0, end - x.shape[1]))
        return rows

    def unpack(self, rows: jax.Array) -> Any:
        out, at = [], 0
        for leaf, key in zip(self.leaves, self.keys, strict=True):
            shape = (*leaf.shape[1:], 2) if key else leaf.shape[1:]
            size = int(np.prod(shape, dtype=int))
            x = rows[:, at : at + size].reshape(rows.shape[0], *shape)
            at += size
            wrap = lambda x: jax.random.wrap_key_data(x.astype(jnp.uint32), impl="threefry2x32")
            out.append(wrap(x) if key else x.astype(leaf.dtype))
        return self.treedef.unflatten(out)


def resized(strategy: Any, size: int) -> Any:
    """`strategy` with room for `size` candidates, whatever wraps the restarts; itself without restarts."""
    if isinstance(strategy, Portfolio):
        last = strategy.phases[-1]
        phases = (*strategy.phases[:-1], dataclasses.replace(last, strategy=resized(last.strategy, size)))
        return dataclasses.replace(strategy, phases=phases)
    if not hasattr(strategy, "strategy") or isinstance(strategy, Surrogate):  # its state holds a population
        return strategy
    if isinstance(strategy, Restarts):
        return dataclasses.replace(strategy, strategy=_with_popsize(strategy.strategy, size))
    return dataclasses.replace(strategy, strategy=resized(strategy.strategy, size))


def _with_popsize(strategy: Any, size: int) -> Any:
    if hasattr(strategy, "popsize"):
        return dataclasses.replace(strategy, popsize=size)
    return dataclasses.replace(strategy, strategy=_with_popsize(strategy.strategy, size))


def restarts_state(state: Any) -> Any:
    """The state of the restarts within that of their wrappers; None without restarts."""
    if isinstance(state, RestartsState):
        return state
    inner = (restarts_state(part) for part in state) if isinstance(state, tuple) else ()
    return next((found for found in inner if found is not None), None)


def vectors(candidates: Any) -> Any:
    """Candidates, each leaf with leading axis n, as (n, d) float64: the leaves side by side."""
    leaves = [x.reshape(x.shape[0], -1).astype(jnp.float64) for x in jax.tree.leaves(candidates)]
    return jnp.concatenate(leaves, axis=1)


class Engine:
    """`ask` and `tell` of blocks of runs, compiled once for each popsize.

    Args:
        strategy: with restarts or without, in wrappers.
        popsize: the active candidates of the first generation.
        runs: how many.
        start: key -> the start of a run.
        seed: of all runs.
        constraints: columns of an answer after the value.
        block: runs in one dispatch.
    """

    def __init__(
        self, strategy: Any, popsize: int, runs: int, start: Any, seed: int, constraints: int = 0, block: int = BLOCK
    ) -> None:
        self.strategy, self.constraints, self.block = strategy, constraints, block
        self.first, self.seconds_compiling = popsize, 0.0
        key = jax.random.key(seed, impl="threefry2x32")
        key_start, key_init, key_run = jax.random.split(key, 3)
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        self.keys = fold(key_run, jnp.arange(runs + 1))
        starts = jax.vmap(start)(jax.random.split(key_start, runs + 1))
        begin = time.perf_counter()
        states = trees.strong(jax.jit(jax.vmap(strategy.init))(starts, fold(key_init, jnp.arange(runs + 1))))
        self.restarted = restarts_state(states) is not None
        self.packing = Packing(states)
        self.states = jax.block_until_ready(jax.jit(self.packing.pack)(states))
        self.seconds_compiling += time.perf_counter() - begin
        self.compiled: dict[int, Any] = {}

    def size(self, popsize: int) -> int:
        """The compiled popsize that serves a run of `popsize` candidates."""
        size = self.first
        while size < popsize:
            size *= GROWTH
        return size

    def functions(self, size: int) -> Any:
        if size in self.compiled:
            return self.compiled[size]
        strategy = resized(self.strategy, size)

        def ask(states: Any, index: Any, generations: Any) -> Any:
            rows = self.packing.unpack(states[index])
            keys = jax.vmap(noise.fold_in)(self.keys[index], generations)
            population = jax.vmap(strategy.ask)(rows, keys)
            return population, jax.vmap(lambda p: (vectors(p.decoded()), p.wanted()))(population)

        def tell(states: Any, index: Any, population: Any, answers: Any) -> Any:
            told = Answer(answers[..., 0], answers[..., 1:]) if self.constraints else answers
            rows = jax.vmap(strategy.tell)(self.packing.unpack(states[index]), population, told)
            popsize = restarts_state(rows).popsize if self.restarted else jnp.full(index.shape, size)
            return states.at[index].set(self.packing.pack(rows)), popsize

        begin = time.perf_counter()
        index = np.full(self.block, self.keys.shape[0] - 1)
        generations = np.zeros(self.block, np.int32)
        ask_jit = jax.jit(ask).lower(self.states, index, generations).compile()
        population, _ = ask_jit(self.states, index, generations)
        values = np.zeros((self.block, size, *((1 + self.constraints,) if self.constraints else ())))
        tell_jit = jax.jit(tell, donate_argnums=0).lower(self.states, index, population, values).compile()
        self.seconds_compiling += time.perf_counter() - begin
        self.compiled[size] = ask_jit, tell_jit
        return self.compiled[size]


def solve(
    strategy: Any,
    popsize: int,
    runs: list[Run],
    budget: int,
    seed: int,
    *,
    start: Any = None,
    precision: float = PRECISION,
    block_size: int = BLOCK,
) -> dict[str, Any]:
    """Advance all runs until they are solved to `precision` or have used up `budget` evaluations each.

    All have the same dimension and as many constraints. They begin at `start(key)`, uniformly in [-4, 4] without it.
    """
    last, constraints = len(runs), runs[0].constraints
    start = start or functools.partial(uniform, runs[0].dimension)
    engine = Engine(strategy, popsize, last, start, seed, constraints, block_size)
    popsizes, generations = np.full(last + 1, popsize), np.zeros(last + 1, np.int32)
    columns = (1 + constraints,) if constraints else ()
    best = np.full(last, np.inf)
    free = np.ones(last, bool)  # neither finished nor in a block
    host, blocks, begin = 0.0, 0, time.perf_counter()

    def next_block() -> Any:
        """A block of free runs of one size, dispatched; None where all are finished or in a block."""
        sizes = np.array([engine.size(n) if f else 0 for n, f in zip(popsizes, free, strict=False)])
        if not free.any():
            return None
        size = np.bincount(sizes[free]).argmax()
        part = np.flatnonzero(sizes == size)[:block_size]
        free[part] = False
        index = np.full(block_size, last)
        index[: len(part)] = part
        ask, tell = engine.functions(int(size))
        return int(size), part, index, tell, ask(engine.states, index, generations[index])

    def released(part: np.ndarray, now: Any) -> None:
        """The runs of a told block are free again, those that go on."""
        popsizes[part] = np.asarray(now)[: len(part)]
        generations[part] += 1
        free[part] = [runs[r].best > precision and runs[r].evaluations < budget for r in part]

    block, told = next_block(), None
    while block is not None:
        size, part, index, tell, (population, (decoded, active)) = block
        x, active = np.array(decoded), np.asarray(active)  # a copy of x: cocoex refuses read-only arrays
        at = time.perf_counter()
        values = np.full((block_size, size, *columns), np.nan)
        for row, r in enumerate(part):
            places = np.flatnonzero(active[row])[: budget - runs[r].evaluations]
            n = len(places)
            if not n:
                continue
            values[row, places] = runs[r].problem(x[row, places])
            gaps = runs[r].gaps(values[row, places])
            if np.nanmin(gaps) < best[r]:
                runs[r].saw(gaps)
                best[r] = runs[r].best
            else:
                runs[r].evaluations += n
        host += time.perf_counter() - at
        if told:
            released(*told)
        block = next_block()  # before the tell, so that it is there when the host needs it
        engine.states, now = tell(engine.states, index, population, values)
        told, blocks = (part, now), blocks + 1
        if block is None:
            released(*told)
            block, told = next_block(), None
    wall = time.perf_counter() - begin
    reasons = {}
    if engine.restarted:
        counts = np.asarray(restarts_state(engine.packing.unpack(engine.states)).reasons)[: len(runs)].sum(axis=0)
        reasons = {Stop(i).name.lower(): int(n) for i, n in enumerate(counts) if n}
    return {
        "wall": wall,
        "host": host,
        "compiling": engine.seconds_compiling,
        "blocks": blocks,
        "stops": reasons,
    }


def peer(functions: list[int], dimension: int, instances: list[int], budget: int, seed: int) -> tuple[list[Run], float]:
    """What pycma with IPOP restarts does on the same problems, one after the other."""
    import cma

    runs = problems(functions, dimension, instances)
    rng = np.random.default_rng(seed)
    begin = time.perf_counter()
    for run in runs:
        popsize = recombination.default_popsize(dimension)
        while run.best > PRECISION and run.evaluations < budget:
            options = {"popsize": popsize, "verbose": -9, "seed": int(rng.integers(1, 2**31)), "verb_log": 0}
            es = cma.CMAEvolutionStrategy(rng.uniform(-4, 4, dimension), 2.0, options)
            while not es.stop() and run.best > PRECISION and run.evaluations < budget:
                x = es.ask()
                es.tell(x, list(run.evaluate(np.asarray(x))))
            popsize *= 2
    return runs, time.perf_counter() - begin


def share(runs: list[Run], budget: float, target: float = PRECISION) -> float:
    return float(np.mean([run.reached(target) <= budget for run in runs]))


def ecdf(runs: list[Run], budget: float) -> float:
    """The share of (run, target) pairs reached, over COCO's 51 targets."""
    return float(np.mean([[run.reached(t) <= budget for t in TARGETS] for run in runs]))


def archive(algorithm: str, dimension: int) -> dict[int, np.ndarray]:
    """Run lengths to 1e-8 of a published algorithm, from the cocopp wheel: function -> (15,), NaN where unsolved."""
    spec = importlib.util.find_spec("cocopp")
    if spec is None or not spec.submodule_search_locations:
        return {}
    files = list(pathlib.Path(spec.submodule_search_locations[0]).rglob("pprldistrever_1e-8.pickle.gz"))
    with gzip.open(files[0]) as file:
        data = pickle.load(file, encoding="latin1")[algorithm]
    return {
        f: np.asarray(data[f][dimension][0], float).reshape(-1)[1:] for f in data if f <= 24 and dimension in data[f]
    }


def ratio_to_archive(runs: list[Run], algorithm: str, dimension: int) -> float | None:
    """Geometric mean of median evaluations over the published ones, on functions that are always solved."""
    published = archive(algorithm, dimension)
    logs = []
    for f in ALWAYS_SOLVED:
        ours = [run.reached(PRECISION) for run in runs if run.function == f]
        if ours and f in published:
            logs.append(np.log(np.median(ours)) - np.log(np.nanmedian(published[f])))
    return float(np.exp(np.mean(logs))) if logs and np.isfinite(logs).all() else None


def write_coco(runs: list[Run], folder: pathlib.Path, name: str) -> None:
    """The runs as .info, .dat and .tdat files that `cocopp.main` reads."""
    by = {}
    for run in runs:
        by.setdefault((run.function, run.dimension), []).append(run)
    for (f, d), group in by.items():
        data = folder / f"data_f{f}"
        data.mkdir(parents=True, exist_ok=True)
        stem = f"bbobexp_f{f}_DIM{d}"
        entries, dat, tdat = [], [], []
        for run in group:
            head = (
                "% function evaluation | noise-free fitness - Fopt "
                f"({run.optimum:.12e}) | best noise-free fitness - Fopt | measured fitness | best measured fitness"
            )
            line = lambda n, gap, run=run: (
                f"{n} {gap:+.9e} {gap:+.9e} {gap + run.optimum:+.9e} {gap + run.optimum:+.9e}"
            )
            dat.append(head)
            crossed = np.inf
            for n, gap in run.trace:
                level = np.floor(5 * np.log10(max(gap, 1e-30)))  # a line for every fifth of a decade
                if level < crossed:
                    dat.append(line(n, gap))
                    crossed = level
            tdat.append(head)
            steps = np.unique(np.floor(10 ** np.arange(0, np.log10(max(run.evaluations, 1)) + 1e-9, 0.05)).astype(int))
            at, gap = 0, run.trace[0][1]
            for n in [*steps.tolist(), run.evaluations]:
                while at < len(run.trace) and run.trace[at][0] <= n:
                    gap = run.trace[at][1]
                    at += 1
                tdat.append(line(n, gap))
            entries.append(f"{run.instance}:{run.evaluations}|{run.best:.1e}")
        (data / f"{stem}.dat").write_text("\n".join(dat) + "\n")
        (data / f"{stem}.tdat").write_text("\n".join(tdat) + "\n")
        info = folder / f"bbobexp_f{f}.info"
        block = (
            f"funcId = {f}, DIM = {d}, Precision = {PRECISION:.3e}, algId = '{name}'\n% evoopt\n"
            f"data_f{f}/{stem}.dat, {', '.join(entries)}\n"
        )
        info.write_text((info.read_text() if info.exists() else "") + block)


class Lengths(NamedTuple):
    """Evaluations of every run to each of the 51 targets, (runs, 51), inf where never, and in all, (runs,)."""

    label: str
    dimension: int
    reached: np.ndarray
    evaluations: np.ndarray


def lengths(label: str, runs: list[Run]) -> Lengths:
    reached = np.array([[run.reached(t) for t in TARGETS] for run in runs])
    return Lengths(label, runs[0].dimension, reached, np.array([run.evaluations for run in runs]))


def save_lengths(folder: pathlib.Path, found: Lengths) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{found.label.replace(' ', '-')}-{found.dimension}D.npz"
    np.savez_compressed(file, **found._asdict())


def load_lengths(folder: pathlib.Path) -> list[Lengths]:
    found = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file, allow_pickle=False) as data:
            found.append(Lengths(str(data["label"]), int(data["dimension"]), data["reached"], data["evaluations"]))
    return found


def plot(results: list[Lengths], file: pathlib.Path) -> None:
    """Against evaluations / D, for each dimension: above the share of runs at 1e-8, with the published ones of the
    COCO archive; below the ECDF over the 51 targets.
    """
    from matplotlib.figure import Figure

    dimensions = sorted({found.dimension for found in results})
    figure = Figure(figsize=(4.4 * len(dimensions), 6.2), layout="constrained")
    axes = figure.subplots(2, len(dimensions), squeeze=False, sharey=True, sharex="col")
    colors = [f"C{i}" for i in range(10)]
    labels = sorted({found.label for found in results})

    def curve(axis: Any, reached: np.ndarray, pairs: int, end: float, **style: Any) -> None:
        reached = np.sort(reached[np.isfinite(reached)])
        x = np.concatenate([reached, [max(end, reached[-1] if len(reached) else end)]])
        axis.step(x, np.minimum(np.arange(1, len(x) + 1), len(reached)) / pairs, where="post", **style)

    for column, d in enumerate(dimensions):
        top, bottom = axes[:, column]
        end = max(found.evaluations.max() for found in results if found.dimension == d) / d
        for found in results:
            if found.dimension == d:
                style = {"color": colors[labels.index(found.label)], "label": found.label, "linewidth": 1.8}
                last = found.evaluations.max() / d
                curve(top, found.reached[:, -1] / d, len(found.reached), last, **style)
                curve(bottom, found.reached.ravel() / d, found.reached.size, last, **style)
        for name, dash in (("IPOP-ACTCMA-ES", ":"), ("DE-F-AUC", "--")):
            published = archive(name, d)
            if published:
                all_runs = np.concatenate([published[f] for f in sorted(published)]) / d
                shown = np.where(all_runs <= end, all_runs, np.inf)
                style = {"color": "#555555", "linestyle": dash, "label": f"{name}, published", "linewidth": 1.2}
                curve(top, shown, len(all_runs), end, **style)
        top.set(xscale="log", title=f"{d}-D", ylim=(0, 1))
        bottom.set(xlabel="evaluations / dimension")
        for axis in (top, bottom):
            axis.grid(color="#e3e6ea")
            axis.spines[["top", "right"]].set_visible(False)
        top.legend(fontsize="small", frameon=False, loc="upper left")
    axes[0, 0].set_ylabel("share of runs solved to 1e-8")
    axes[1, 0].set_ylabel("share of (run, target) pairs, 51 targets")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def numbers(text: str) -> list[int]:
    """`1-3,7` -> [1, 2, 3, 7]."""
    out = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        out += range(int(low), int(high or low) + 1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="cma_es", choices=["auto", *sorted(strategies.__all__)])
    parser.add_argument("--restarts", default="bipop", choices=["none", "ipop", "bipop"])
    parser.add_argument("--surrogate", action="store_true", help="a model ranks the candidates (lq-CMA-ES)")
    parser.add_argument(
        "--popsize", type=int, help="candidates of the first run, for auto those evaluated at once; else the default"
    )
    parser.add_argument("--dimensions", type=numbers, default=[5], help="such as 2,5,10,20")
    parser.add_argument("--functions", type=numbers, default=numbers("1-24"))
    parser.add_argument("--instances", type=numbers, default=numbers("1-15"))
    parser.add_argument("--budget", type=float, default=1000, help="evaluations over the dimension, for each run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--coco", type=pathlib.Path, help="a folder for files that cocopp.main reads")
    parser.add_argument("--plot", type=pathlib.Path, help="a .png or .svg of the ECDFs")
    parser.add_argument("--lengths", type=pathlib.Path, help="a folder that keeps the run lengths for a later plot")
    parser.add_argument("--of", type=pathlib.Path, help="only draw what is in this folder of run lengths")
    parser.add_argument("--peer", type=numbers, help="instances that pycma with IPOP runs too, for the wall-clock")
    args = parser.parse_args()
    if args.of:
        plot(load_lengths(args.of), args.plot or pathlib.Path("ecdf.png"))
        return
    if args.coco and any(args.coco.glob("*.info")):
        parser.error(f"{args.coco} holds runs already: give a new folder")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / "results" / "compiled"))

    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, seed {args.seed}")
    label = args.strategy if args.restarts == "none" or args.strategy == "auto" else f"{args.strategy} {args.restarts}"
    label += " surrogate" if args.surrogate else ""
    rows: list[dict[str, Any]] = []
    pictures: list[Lengths] = []
    for d in args.dimensions:
        budget = int(args.budget * d)
        runs = problems(args.functions, d, args.instances)
        strategy, popsize = build(args.strategy, args.restarts, d, args.popsize, budget, args.surrogate)
        start = in_box(d) if args.strategy == "auto" else None
        info = solve(strategy, popsize, runs, budget, args.seed, start=start)
        total = sum(run.evaluations for run in runs)
        pictures.append(lengths(label, runs))
        if args.lengths:
            save_lengths(args.lengths, pictures[-1])
        print(
            f"\n{label}, {d}-D, {len(runs)} runs, budget {budget}: {total} evaluations in {info['wall']:.1f} s "
            f"(of it compiling {info['compiling']:.1f} s, objective {info['host']:.1f} s), "
            f"{info['blocks']} blocks of {BLOCK}"
        )
        print("runs ended by", info["stops"])
        add = lambda name, value, unit, peer=None, ratio=None: rows.append(
            {"name": name, "value": value, "unit": unit, "peer": peer, "ratio": ratio}
        )
        for factor in (50, 100, 1000, 10000, 100000):
            if factor > args.budget:
                break
            solved, published = share(runs, factor * d), PUBLISHED.get(("IPOP-ACTCMA-ES", d), ())
            there = next((x for n, x in zip((100, 1000, 10000), published, strict=False) if n == factor), None)
            targets = ecdf(runs, factor * d)
            print(f"  {factor:6d} D: solved to 1e-8 {solved:.3f} (IPOP-ACTCMA-ES {there}), 51 targets {targets:.3f}")
            name = f"{label} {d}-D {factor} D solved to 1e-8"
            add(name, solved, "share of runs", there, solved / there if there else None)
        ratio = ratio_to_archive(runs, "IPOP-ACTCMA-ES", d)
        if ratio is not None:
            print(f"  evaluations to 1e-8 over IPOP-ACTCMA-ES's on functions always solved: {ratio:.3f}")
            add(f"{label} {d}-D evaluations over IPOP-ACTCMA-ES", ratio, "geometric mean", 1.0, 1 / ratio)
        by_function = {
            f: float(np.mean([r.reached(PRECISION) < np.inf for r in runs if r.function == f])) for f in args.functions
        }
        print("  solved by function:", " ".join(f"f{f} {x:.2f}" for f, x in by_function.items()))
        add(f"{label} {d}-D wall-clock", info["wall"], "s")
        if args.peer:
            theirs, seconds = peer(args.functions, d, args.peer, budget, args.seed)
            scaled = seconds * len(runs) / len(theirs)
            pictures.append(lengths("pycma ipop", theirs))
            print(
                f"  pycma IPOP: {len(theirs)} runs in {seconds:.1f} s, {scaled:.0f} s for {len(runs)}: "
                f"{scaled / info['wall']:.1f} times ours; {scaled / (info['wall'] - info['compiling']):.1f} without "
                f"compilation; solved {share(theirs, budget):.3f}"
            )
            add(f"{label} {d}-D wall-clock against pycma", info["wall"], "s", scaled, scaled / info["wall"])
        if args.coco:
            write_coco(runs, args.coco, label.replace(" ", "-"))
    if args.plot:
        plot(pictures, args.plot)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
