"""Several starts of one search: together in one program where the objective is JAX, one after the other elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt import spaces, stopping, trees
from evoopt.checks import check_popsize, check_strategy
from evoopt.run import cache, ending, keys, programs
from evoopt.run import progress as bars
from evoopt.run.budget import ENDLESS, checked
from evoopt.run.compiled import Compiled, Program, finished
from evoopt.run.points import arrays
from evoopt.run.problem import DISPATCH, Carry, Problem, feasibility_of, reached
from evoopt.run.result import Result, Start
from evoopt.run.tracing import jax_only
from evoopt.types import Array, Key, Objective, Params, error

POINTS = 0x73746172  # folded into the key for the points to start from
RUNS = 1 << 16  # and from here on for the keys of the runs
SECONDS = 0.25  # target length of a dispatch


def minimize_from(
    minimize: Callable[..., Result],
    f: Objective,
    x0: Params,
    strategy: Any,
    starts: int,
    start: Callable[[Key], Params] | None,
    options: dict[str, Any],
) -> Result:
    """What `minimize` does with `starts`: the best run's result, with all of them in `starts`.

    Each run is that of `minimize(f, its x0, strategy, key=its key)` with an equal share of the evaluations. The first
    starts at x0 with the key that was given.

    Args:
        minimize: the function itself, for runs one after the other.
        starts, start: how many, and where from: key -> point; None: candidates of the strategy's first distribution.
        options: the other arguments of `minimize`.

    Raises:
        ValueError: for less than one start, or arguments that belong to a single run.
    """
    check_popsize(starts, 1, name="starts")
    check_strategy(strategy)
    if options["run"] is not None:
        cause = "one run folder for several runs: give each its own, or keep the result"
        raise error("starts without a run folder", "run=", cause)
    cache.enable()
    key = noises.replayable(options["key"])
    x0, strategy, space = spaces.entered(x0, strategy)
    points = _points(x0, strategy, space, starts, start, key)
    each = [key if i == 0 else keys.generation_key(key, RUNS + i) for i in range(starts)]
    own = ("context", "update", "each", "summarize", "evaluator")
    alone = any(options[name] is not None for name in own) or len(options["callbacks"]) or not options["jit"]
    hidden = any(callable(getattr(f, name, None)) for name in ("context", "update", "each", "confirm"))
    if alone or hidden or not options["keep_best"]:
        found = _in_turn(minimize, f, points, strategy, each, options)
    else:
        found = _together(f, points, strategy, each, options)
    shown = (lambda point: point) if space is None else space.presented
    every = [dataclasses.replace(s, best=shown(s.best)) for s in found.starts or []]
    return dataclasses.replace(found, best=shown(found.best), recommended=shown(found.recommended), starts=every)


def _points(
    x0: Params, strategy: Any, space: Any, n: int, start: Callable[[Key], Params] | None, key: Key
) -> list[Params]:
    """Where the runs start: the first at x0."""
    key = keys.generation_key(key, POINTS)
    inside = (lambda point: point) if space is None else space.encode
    if start is not None:
        return [x0, *(inside(start(keys.generation_key(key, i))) for i in range(1, n))]
    bound = programs.Bound(strategy)
    state = bound.init(x0, keys.generation_key(key, 0))
    points: list[Params] = []
    while len(points) < n - 1:
        population = bound.ask_at(state, key, len(points))
        # From the last on: the first candidate of some strategies is the start itself.
        some = population.places()[::-1][: n - 1 - len(points)]
        points.extend(inside(p) for p in arrays(population, some))
    alike = jax.tree.structure(points[0]) == jax.tree.structure(x0) if points else True
    if not alike or any(not jnp.issubdtype(np.asarray(x).dtype, jnp.floating) for x in jax.tree.leaves(points)):
        cause = "a wrapper whose candidates are not what it starts from, such as choices"
        raise error("start=, a function key -> where a run starts", "starts alone", cause)
    return [x0, *points]


def _in_turn(
    minimize: Callable[..., Result], f: Objective, points: list[Params], strategy: Any, each: list[Key],
    options: dict[str, Any],
) -> Result:  # fmt: skip
    """One run after the other; once the target is reached the rest has nothing to do."""
    n, begun, results = len(points), time.monotonic(), []
    share = {} if options["evaluations"] is None else {"evaluations": options["evaluations"] // n}
    for i, (point, key) in enumerate(zip(points, each, strict=True)):
        if (seconds := options["seconds"]) is not None:
            share["seconds"] = max(0.0, seconds - (time.monotonic() - begun)) / (n - i)
        results.append(minimize(f, point, strategy, **{**options, **share, "key": key}))
        if results[-1].reason in ("target", "interrupted", "terminated"):
            break
    starts = [
        Start(point, key, r.best, r.best_value, r.evaluations, r.generations, r.reason, r.why)
        for point, key, r in zip(points, each, results, strict=False)
    ]
    order = lambda r: (r.violation or 0.0, math.inf if math.isnan(r.best_value) else r.best_value)
    best = min(results, key=order)
    total = sum(r.evaluations for r in results)
    return dataclasses.replace(best, starts=starts, evaluations=total, seconds=time.monotonic() - begun)


class Batch:
    """The loop over all runs, compiled at its first call."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.begin = programs.jit(jax.vmap(program._begin, in_axes=(None, 0, 0, None)))
        self.advance = programs.jit(self._loop, donate_argnums=2)

    def _loop(
        self, strategy: Any, consts: Any, carry: Carry, keys: Array, spent: Array, asked: Array, steps: Array,
        limit: Array, budget: Array, target: Array, stops: Any,
    ) -> tuple:  # fmt: skip
        """At most `steps` generations of all runs that have not ended, until one reaches the target."""
        one = functools.partial(self.program.generation, programs.plain(strategy), consts)
        every = jax.vmap(lambda key, carry: one(key, stops, carry))
        shapes = jax.eval_shape(every, keys, carry)[1]
        empty = jax.tree.map(lambda s: jnp.zeros((DISPATCH, *s.shape), s.dtype), shapes)

        def going(carry: Carry, spent: Array, asked: Array) -> Array:
            ended = jax.vmap(lambda c: finished(c, target, programs.plain(strategy)))(carry)
            return ~ended & (carry.generation < limit) & (asked <= budget - spent)

        met = jax.vmap(lambda c: reached(c, target, programs.plain(strategy)))

        def more(loop: Any) -> Array:
            i, carry, spent, asked, _, _ = loop
            return (i < steps) & going(carry, spent, asked).any() & ~met(carry).any()

        def step(loop: Any) -> Any:
            i, carry, spent, asked, rows, ran = loop
            goes = going(carry, spent, asked)
            new, row = every(keys, carry)
            carry = jax.vmap(trees.where)(goes, new, carry)
            now = row["evaluations"].astype(jnp.int32)
            put = lambda column, x: column.at[i].set(x)
            spent, asked = spent + jnp.where(goes, now, 0), jnp.where(goes, now, asked)
            return i + 1, carry, spent, asked, jax.tree.map(put, rows, row), put(ran, goes)

        ran = jnp.zeros((DISPATCH, spent.shape[0]), bool)
        first = (jnp.zeros((), jnp.int32), carry, spent, asked, empty, ran)
        return jax.lax.while_loop(more, step, first)


def _together(f: Objective, points: list[Params], strategy: Any, each: list[Key], options: dict[str, Any]) -> Result:
    """All runs in one program, a generation of each at a time."""
    n, begun, target = len(points), time.monotonic(), options["target"]
    size = options["batch_size"] if options["batch_size"] is not None else getattr(f, "members", None)
    stops = stopping.numbers(options["stop"])
    problem = Problem(f, strategy, each[0], target, batch_size=size, stop=stops)
    engine = Compiled(problem)
    inits, runs = zip(*map(keys.run_keys, each), strict=True)
    with jax_only(True):
        first = engine.start(points[0], inits[0], None)
        asked = engine.asked(first)
        limit = checked(options["generations"], options["evaluations"], options["seconds"], target, n * asked)
        budget = ENDLESS if options["evaluations"] is None else options["evaluations"] // n
        batch, held = Batch(engine.program), engine.strategy
        stack = lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves])
        carry = batch.begin(held, jax.tree.map(stack, *map(trees.strong, points)), jnp.stack(inits), None)
        spent, sizes, run_keys = np.zeros(n, np.int32), np.full(n, asked, np.int32), jnp.stack(runs)
        histories: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        steps, warm, ended = 1, False, ""
        name = options["label"] or type(strategy).__name__
        sign, word = (-1.0, "best return") if options["display"] == "return" else (1.0, "best")
        with bars.meter(options["progress"], name, sign=sign, word=word) as meter:
            while True:
                if options["seconds"] is not None and time.monotonic() - begun >= options["seconds"]:
                    ended = "seconds"
                    break
                before = time.monotonic()
                numbers = (np.int32(steps), np.int32(limit), np.int32(budget), engine._target, stops)
                done, carry, spent, sizes, rows, ran = jax.block_until_ready(
                    batch.advance(held, engine._consts, carry, run_keys, spent, sizes, *numbers)
                )
                took, done = time.monotonic() - before, int(done)
                if done == 0:
                    break
                _append(histories, jax.tree.map(np.asarray, rows), np.asarray(ran), done, time.monotonic() - begun)
                latest = min((h[-1] for h in histories if h), key=lambda row: row["best_so_far"])
                meter.show(float("nan"), latest, sum(map(int, np.asarray(ran)[:done].sum(axis=1))) / took)
                steps = max(1, min(2 * steps, DISPATCH, int(done * SECONDS / took))) if warm else 1
                warm = True
    return _best(problem, points, each, carry, np.asarray(spent), sizes, histories, ended, limit, budget, begun)


def _append(histories: list[list[dict[str, Any]]], rows: Any, ran: np.ndarray, done: int, seconds: float) -> None:
    for i, history in enumerate(histories):
        for t in np.flatnonzero(ran[:done, i]):
            row = {name: column[t, i].tolist() for name, column in rows.items()}
            total = row["evaluations"] + (history[-1]["evaluations"] if history else 0)
            history.append({"generation": len(history) + 1, **row, "evaluations": total, "seconds": round(seconds, 3)})


def _best(
    problem: Problem, points: list[Params], each: list[Key], carries: Carry, spent: np.ndarray, sizes: Any,
    histories: list[list[dict[str, Any]]], ended: str, limit: int, budget: int, begun: float,
) -> Result:  # fmt: skip
    """The best run's result, and what became of the others."""
    runs = [jax.tree.map(lambda x, i=i: x[i], carries) for i in range(len(points))]

    def reason(i: int) -> str:
        carry = runs[i]
        if problem.target is not None and reached(carry, problem.target, problem.strategy):
            return "target"
        if name := ending.name(carry.watch):
            return name
        if int(carry.generation) >= limit:
            return "generations"
        return "evaluations" if int(sizes[i]) > budget - int(spent[i]) else ended or "another"

    starts = [
        Start(point, key, c.best, float(c.best_value), int(spent[i]), int(c.generation), reason(i),
              ending.why(c, problem.stop))
        for i, (point, key, c) in enumerate(zip(points, each, runs, strict=True))
    ]  # fmt: skip
    values = np.array([s.best_value for s in starts])
    held = [feasibility_of(problem.strategy, c) for c in runs]
    worst = np.array([x.get("violation", 0.0) for x in held])
    i = int(np.lexsort((np.where(np.isnan(values), np.inf, values), worst))[0])
    carry, state = runs[i], runs[i].state
    return Result(
        carry.best, starts[i].best_value, programs.Bound(problem.strategy).recommend(state), int(spent.sum()),
        starts[i].generations, starts[i].reason, histories[i], state, None, int(getattr(state, "unanswered", 0)),
        time.monotonic() - begun, why=starts[i].why, starts=starts, **held[i],
    )  # fmt: skip
