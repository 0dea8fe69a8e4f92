"""Time of ask + tell against evosax 0.3.2: same algorithm, popsize and dimension, one process, interleaved, float32.

    python benchmarks/overhead.py --json results/overhead.json

A generation is ask, the candidates as arrays (n, d), and tell with given values: the same work on both sides. `single`
calls compiled ask and tell from Python; `scan` is a whole run in one program with the sphere as objective. Compilation
is reported apart and not counted. With regenerated noise nothing is stored and candidates are decoded one at a time
within one program: its rows are time and peak memory (XLA's own account) of a whole generation, evaluation included.

`--group search` does the same for the CMA-ES family, differential and diffusion evolution, genetic algorithms, swarms
and baselines, and times a generation of CMA-ES at d = 1000 against pycma's. Three of evosax's algorithms are other
ones, with less to do: its swarm has two random numbers a particle instead of two a coordinate, its genetic algorithm
crosses over without SBX and mutates by a normal, and its xNES exponentiates the entries of the matrix instead of it.
"""

from __future__ import annotations

import inspect
import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import header, interleaved, parser, row, write

from evoopt import noise, strategies
from evoopt.noise import fold_in

SIZES = {
    "gradient": ((10, 16), (1_000, 64), (100_000, 256), (1_000_000, 64)),
    "search": ((10, 16), (100, 64), (1_000, 256)),
}
LEAST = {"gradient": 1, "search": 26}  # generations of a timing; 26: two lags of CMA-ES's decompositions at d = 1000
PEERS = {  # evosax's class of the same algorithm
    "gradient": {"openai_es": "Open_ES", "pgpe": "PGPE", "snes": "SNES"},
    "search": {
        "cma_es": "CMA_ES",
        "sep_cma_es": "Sep_CMA_ES",
        "ma_es": "MA_ES",
        "lm_ma_es": "LM_MA_ES",
        "cr_fm_nes": "CR_FM_NES",
        "xnes": "xNES",
        "amalgam": "iAMaLGaM_Univariate",
        "differential_evolution": "DifferentialEvolution",
        "real_ga": "SimpleGA",
        "samr_ga": "SAMR_GA",
        "gesmr_ga": "GESMR_GA",
        "particle_swarm": "PSO",
        "diffusion_evolution": "DiffusionEvolution",
        "random_search": "RandomSearch",
        "hill_climbing": "HillClimbing",
        "simulated_annealing": "SimulatedAnnealing",
    },
}


def sphere(x: Any) -> Any:
    """Sum of squares; candidates are read once."""
    return jnp.sum((x - 1.0) ** 2)


def ours(name: str, n: int, **options: Any) -> Any:
    """The strategy with evosax's defaults: plain SGD at 1e-3, sigma 1 for OpenAI-ES, Adam 1e-3 for PGPE."""
    if name == "openai_es":
        return strategies.openai_es(n, sigma=1.0, learning_rate=1e-3, optimizer=optax.identity(), **options)
    if name == "pgpe":
        return strategies.pgpe(n, sigma=1.0, learning_rate=1e-3, optimizer=optax.identity(), **options)
    if name == "snes":
        return strategies.snes(n, **options)
    if name == "diffusion_evolution":
        return strategies.diffusion_evolution(n, steps=100)
    if name == "gesmr_ga":
        return strategies.gesmr_ga(n, groups=groups(n))
    return getattr(strategies, name)(n)


def groups(n: int) -> int:
    """The number of groups of GESMR nearest to sqrt(n): evosax wants a divisor of n - 1."""
    return min((g for g in range(1, n) if (n - 1) % g == 0), key=lambda g: abs(g - math.sqrt(n)))


def peers(name: str, n: int, d: int) -> Any:
    """evosax's class of the same algorithm, with the metrics it would compute for nobody switched off."""
    from evosax.algorithms import algorithms

    cls = algorithms[(PEERS["gradient"] | PEERS["search"])[name]]
    quiet = lambda key, population, fitness, state, params: {}
    options = {"optimizer": optax.sgd(1e-3)} if name == "pgpe" else {}
    options |= {"num_groups": groups(n)} if name == "gesmr_ga" else {}
    options |= {"sampling_fn": partial(jax.random.normal, shape=(d,))} if name == "random_search" else {}
    return cls(population_size=n, solution=jnp.zeros(d), metrics_fn=quiet, **options)


def started(peer: Any, key: Any, start: Any, params: Any, n: int) -> Any:
    """The peer's first state; half of evosax's classes start from a population instead of a point."""
    if "population" in inspect.signature(peer.init).parameters:
        return peer.init(key, jax.random.normal(key, (n, start.size)), jnp.arange(n, dtype=jnp.float32), params)
    return peer.init(key, start, params)


def measure(name: str, d: int, n: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of one algorithm at one size."""
    key, start = jax.random.key(0), jnp.zeros(d)
    options = {"regenerate": False} if name in PEERS["gradient"] else {}
    strategy, peer = ours(name, n, **options), peers(name, n, d)
    params = peer.default_params
    values = jax.random.normal(jax.random.key(5), (n,))

    @jax.jit
    def ask(state, key):
        population = strategy.ask(state, key)
        return population, population.decoded()

    tell = jax.jit(strategy.tell)
    state = strategy.init(start, key)
    peer_state = started(peer, key, start, params, n)

    def our_single(keys):
        s = state
        for k in keys:
            population, candidates = ask(s, k)
            s = tell(s, population, values)
        return s, candidates

    def peer_single(keys):
        s = peer_state
        for k in keys:
            candidates, s = peer.ask(k, s, params)
            s, _ = peer.tell(k, candidates, values, s, params)
        return s, candidates

    @jax.jit
    def our_scan(keys):
        def step(s, k):
            population = strategy.ask(s, k)
            return strategy.tell(s, population, population.vmap(sphere)), None

        return jax.lax.scan(step, state, keys)[0]

    @jax.jit
    def peer_scan(keys):
        def step(s, k):
            candidates, s = peer.ask(k, s, params)
            return peer.tell(k, candidates, jax.vmap(sphere)(candidates), s, params)[0], None

        return jax.lax.scan(step, peer_state, keys)[0]

    rows = []
    least = LEAST["gradient" if name in PEERS["gradient"] else "search"]
    for kind, most, mine, theirs in (("single", 300, our_single, peer_single), ("scan", 5000, our_scan, peer_scan)):
        first = {side: _seconds(run, jax.random.split(key, least)) for side, run in (("ours", mine), ("peer", theirs))}
        again = sum(_seconds(run, jax.random.split(key, least)) for run in (mine, theirs))
        count = max(least, min(most, int(least * 2 / again)))  # both sides together about two seconds
        keys = jax.random.split(key, count)
        keys = list(keys) if kind == "single" else keys
        runs = {"ours": partial(mine, keys), "peer": partial(theirs, keys)}
        for run in runs.values():
            jax.block_until_ready(run())
        t = interleaved(runs, repeats)
        label = f"{name} d={d} n={n} {kind}"
        r = row(label, t["ours"] / count * 1e3, "ms/gen", t["peer"] / count * 1e3)
        rows.append(r | {"first_call_s": first["ours"], "peer_first_call_s": first["peer"]})
    return rows


def _seconds(run: Any, *arguments: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - begin


def regenerated(d: int, n: int, repeats: int) -> list[dict[str, Any]]:
    """Time and memory of a whole generation when noise is drawn again, against evosax's, at one size."""
    rows = []
    key, start = jax.random.key(0), jnp.zeros(d)
    for name, kind in (
        ("openai_es", "gaussian"),
        ("openai_es", "rademacher"),
        ("pgpe", "gaussian"),
        ("snes", "gaussian"),
    ):
        options = {"noise": getattr(noise, kind)} if name == "openai_es" else {}
        strategy, peer = ours(name, n, regenerate=True, **options), peers(name, n, d)
        params = peer.default_params

        def mine(state, key, strategy=strategy):
            population = strategy.ask(state, key)
            return strategy.tell(state, population, population.map(sphere))

        def theirs(state, key, peer=peer, params=params):
            candidates, state = peer.ask(key, state, params)
            return peer.tell(fold_in(key, 1), candidates, jax.vmap(sphere)(candidates), state, params)[0]

        a, b = strategy.init(start, key), peer.init(key, start, params)
        mine_c, theirs_c = (jax.jit(f).lower(s, key).compile() for f, s in ((mine, a), (theirs, b)))
        memory = [
            (m.temp_size_in_bytes + m.output_size_in_bytes + m.argument_size_in_bytes) / 2**20
            for m in (_memory(c) for c in (mine_c, theirs_c))
        ]
        jax.block_until_ready((mine_c(a, key), theirs_c(b, key)))
        t = interleaved({"ours": partial(mine_c, a, key), "peer": partial(theirs_c, b, key)}, repeats)
        label = f"{name} d={d} n={n} regenerated {kind}"
        rows.append(row(f"{label} time", t["ours"] * 1e3, "ms/gen", t["peer"] * 1e3))
        rows.append(row(f"{label} memory", memory[0], "MiB", memory[1]))
    return rows


def _memory(compiled: Any) -> Any:
    return compiled.memory_analysis()


def against_pycma(d: int, repeats: int) -> list[dict[str, Any]]:
    """A generation of CMA-ES against pycma's, both from Python and with their lazy decompositions, values given."""
    import cma

    rows = []
    for dtype in ("float32", "float64"):
        jax.config.update("jax_enable_x64", dtype == "float64")
        strategy = strategies.cma_es(sigma=1.0)
        state = jax.tree.map(jnp.copy, strategy.init(jnp.zeros(d, dtype), jax.random.key(0)))  # to be given away
        ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell, donate_argnums=0)
        n = len(jax.eval_shape(strategy.ask, state, jax.random.key(0)))
        values = np.random.default_rng(0).normal(size=n)
        es = cma.CMAEvolutionStrategy(np.zeros(d), 1.0, {"popsize": n, "verbose": -9, "seed": 1})
        keys = list(jax.random.split(jax.random.key(1), 26))  # decompositions are 13 generations apart at d = 1000
        held = {"state": state}

        answers = jnp.asarray(values, dtype)

        def mine(held=held, ask=ask, tell=tell, keys=keys, answers=answers):
            for key in keys:
                population = ask(held["state"], key)
                held["state"] = tell(held["state"], population, answers)
            return held["state"]

        def theirs(es=es, values=values, keys=keys):
            for _ in keys:
                es.tell(es.ask(), list(values))

        jax.block_until_ready(mine())
        theirs()
        t = interleaved({"ours": mine, "peer": theirs}, repeats)
        label = f"cma_es d={d} n={n} {dtype} against pycma (float64)"
        rows.append(row(label, t["ours"] / len(keys) * 1e3, "ms/gen", t["peer"] / len(keys) * 1e3))
    jax.config.update("jax_enable_x64", False)
    return rows


def main() -> None:
    """Run everything and print the geometric means."""
    p = parser(__doc__)
    p.add_argument("--group", default="gradient", choices=list(SIZES))
    p.add_argument("--sizes", help="dxn, comma-separated")
    p.add_argument("--strategies", help="comma-separated; all by default. In search, pycma: CMA-ES against it")
    options = p.parse_args()
    head = header(("evosax", "optax", "cma"), repeats=options.repeats, seeds=[0])
    sizes = SIZES[options.group]
    if options.sizes:
        sizes = [(int(d), int(n)) for d, n in (size.split("x") for size in options.sizes.split(","))]
    names = [*PEERS[options.group], "pycma"] if options.strategies is None else options.strategies.split(",")
    rows = [r for name in names if name != "pycma" for d, n in sizes for r in measure(name, d, n, options.repeats)]
    for kind in ("single", "scan") if rows else ():
        ratios = [r["ratio"] for r in rows if r["name"].endswith(kind)]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        rows.append(row(f"geometric mean of ratios, {kind}", mean, "ratio"))
        rows.append(row(f"least ratio, {kind}", min(ratios), "ratio"))
    if options.group == "gradient":
        rows += regenerated(*max(sizes), options.repeats)
    elif "pycma" in names:
        rows += against_pycma(max(sizes)[0], options.repeats)
    write(options.json, head, rows)


if __name__ == "__main__":
    main()
