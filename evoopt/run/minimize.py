"""The loop: budget, stopping, history, callbacks, checkpoints. Everything is minimised."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt import spaces, stopping, trees
from evoopt.answers import number
from evoopt.automatic import auto, settled, usual
from evoopt.checks import check_strategy
from evoopt.run import cache, confirming, ending, identity, keys, programs
from evoopt.run import progress as bars
from evoopt.run.budget import ENDLESS, checked
from evoopt.run.compiled import Compiled
from evoopt.run.continuing import continued
from evoopt.run.interrupts import interrupts_kept
from evoopt.run.problem import DISPATCH, Carry, Problem, feasibility_of, reached
from evoopt.run.result import Result as Result
from evoopt.run.starts import minimize_from
from evoopt.run.stepped import Host, Spread
from evoopt.run.tracing import jax_only
from evoopt.stopping import Stops
from evoopt.types import Array, Key, Objective, Params

DISPATCH_SECONDS = 0.25  # target length of a dispatch, after which bar, callbacks and clock get their turn
PLATEAU = 1e5  # size from which equal values are more likely rounded than equal
STOPS = Stops()
UNANSWERED = 100  # initial generations without a finite answer after which a run with no other budget ends


def minimize(
    f: Objective,
    x0: Params,
    strategy: Any = None,
    *,
    key: Key | int = 0,
    generations: int | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    target: float | None = None,
    starts: int | None = None,
    start: Callable[[Key], Params] | None = None,
    stop: Stops | None = STOPS,
    context: Any = None,
    update: Callable[[Any, Any], Any] | None = None,
    each: Callable[[Any, int], Any] | None = None,
    summarize: Callable[[Array, Any], dict[str, Array]] | None = None,
    totals: Sequence[str] = (),
    batch_size: int | None = None,
    jit: bool = True,
    evaluator: Any = None,
    keep_best: bool = True,
    callbacks: Sequence[Callable[[Carry, list[dict[str, Any]]], Any]] = (),
    every: int | None = None,
    progress: bool | bars.Meter | None = None,
    label: str = "",
    display: str = "value",
    run: Any = None,
    checkpoint_seconds: float = 30.0,
) -> Result:
    """Minimise `f` from `x0` with `strategy`.

    Args:
        f: the objective: `f(params)`; with a context, `f(params, context)`; with `each`, `f(params, context, each_i)`.
            It returns a scalar, or `evoopt.answers.WithAux(scalar, aux)` for `update` and `summarize`. It is a JAX
            function, or with `jit=False` any Python callable, which gets NumPy arrays and returns any real number, kept
            in float64 ((value, gradient) for first-order strategies). To maximise, return minus the value. For a
            strategy that reads violations it returns `evoopt.answers.Answer(value, violation)`, or that pair. If f has
            an attribute `context(key)`, `update` or `each`, as tasks do, it is used unless given here. If it has
            `confirm(params, context, key) -> (value, evaluations)`, it is noisy: a target counts as reached once the
            confirmed value of the best candidate reaches it.
        x0: where to start: a pytree of float arrays; or a space (`evoopt.spaces`): a tree of variables.
        strategy: from `evoopt.strategies`; or `evoopt.auto()` with what is known of the problem. None is `auto()`, and
            a run without a budget or target then has one of 1000 evaluations for each number. `Result.chosen` says what
            was taken, and why.
        key: a threefry key or a seed. The same key gives the same run, bit for bit on the same machine.
        generations, evaluations, seconds: the budget; the run ends when any is used up. Give at least one, or a target.
        target: stop once a candidate's value is at most this, and it is feasible.
        starts: this many runs, of which the result is the best; `Result.starts` has all. They advance together in one
            program where the objective is JAX, else one after the other; the evaluations are shared equally, and all
            end where one reaches the target. The first starts at x0.
        start: `key -> parameters` of the other starts; None scatters them around x0 as the strategy's candidates.
        stop: when the search has ended by itself: the tolerances of `evoopt.Stop`, such as `Stops(tolx=1e-6)`. None
            goes on until the budget is used up. Strategies without a search distribution end only when all values have
            become the same; those that restart by themselves do not end.
        context: a pytree that the objective needs but that is not searched: data, episode keys, running statistics.
        update: `context, aux -> context` after a generation; leaves of aux have leading axis n. None: that of f.
        each: `context, n -> pytree` with leading axis n; only candidate i gets row i. None: that of f.
        summarize: `values, aux -> dict of scalars` to add to the history.
        totals: those of these scalars that the history sums over the generations so far.
        batch_size: candidates evaluated at once. None: f's `members`, if it has that; otherwise all, if they take less
            than 256 MB; otherwise one at a time.
        jit: False for an objective that is not JAX.
        evaluator: evaluates the candidates: `evoopt.distributed.RayEvaluator(workers=8)`, or `ShardedEvaluator()` for
            the devices of this machine. `batch_size` is then its workers' micro-batch (None: the evaluator's own), and
            any number of workers or devices gives the same bits. The evaluator is not closed.
        keep_best: keep the best candidate seen, at the cost of one more copy of the parameters.
        callbacks: called as `callback(carry, new_history_rows)` after every dispatch; returning True stops the run.
        every: run callbacks after every multiple of this, maybe more often; None: about every quarter of a second.
        progress: True for a bar (on a terminal) or lines (elsewhere), False for none, None for a bar on a terminal;
            or your own meter (`evoopt.run.progress.Meter`).
        label, display: text of the bar; display="return" shows minus the value, as rewards are read.
        run: a run folder (`evoopt.run.folder.Run`) for history and checkpoints. A run that has checkpoints continues
            from the last one, bit for bit. A different strategy, key, jax version or device is refused, unless the
            folder was opened with `force=True`.
        checkpoint_seconds: time between checkpoints.

    Raises:
        ValueError: without a budget, or for parameters that cannot be searched, values of the wrong shape, or the run
            folder of another run.
        TypeError: for something that is not a strategy, an objective that is not JAX (without `jit=False`), or answers
            that are not numbers.

    >>> from evoopt.strategies import snes
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), snes(16), generations=500, target=1e-8)
    >>> result.reason, bool(result.best_value <= 1e-8)
    ('target', True)
    """
    strategy, chosen = settled(
        auto() if strategy is None else strategy, x0, None if evaluations is None else evaluations / (starts or 1)
    )
    if chosen and generations is evaluations is seconds is target is None:
        evaluations = usual(x0) * (starts or 1)
    if starts is not None:
        options = {
            "key": key, "generations": generations, "evaluations": evaluations, "seconds": seconds, "target": target,
            "stop": stop, "context": context, "update": update, "each": each, "summarize": summarize, "totals": totals,
            "batch_size": batch_size, "jit": jit, "evaluator": evaluator, "keep_best": keep_best,
            "callbacks": callbacks, "every": every, "progress": progress, "label": label, "display": display,
            "run": run,
        }  # fmt: skip
        return dataclasses.replace(minimize_from(minimize, f, x0, strategy, starts, start, options), chosen=chosen)
    check_strategy(strategy)
    x0, strategy, space = spaces.entered(x0, strategy)
    cache.enable()
    key = noises.replayable(key)
    key_init, key_run = keys.run_keys(key)
    own = lambda name: getattr(f, name) if callable(getattr(f, name, None)) else None
    if context is None and (begin := own("context")):
        context = begin(keys.generation_key(key, _CONTEXT))
    if batch_size is None and evaluator is None:
        batch_size = getattr(f, "members", None)
    problem = Problem(
        f, strategy, key_run, target, update or own("update"), each or own("each"), summarize, batch_size, keep_best,
        jit, evaluator, stopping.numbers(stop),
    )  # fmt: skip
    engine: Any = Spread(problem) if evaluator is not None else Compiled(problem) if jit else Host(problem)
    with jax_only(jit):
        carry = engine.start(x0, key_init, context)
    limit = checked(generations, evaluations, seconds, target, engine.asked(carry))

    history: list[dict[str, Any]] = []
    spent, steps, sums = 0.0, 1, dict.fromkeys(("evaluations", *totals), 0)  # `spent`: seconds of earlier parts
    if run is not None:
        what = {**identity.of_run(strategy, key, x0), "batch_size": batch_size, "jit": jit, **run.about}
        what |= {"objective": identity.describe(said())} if (said := own("describe")) else {}
        bound = programs.Bound(strategy)
        carry, history, meta = continued(run, carry, what, lambda state: bound.watching(state, engine.n))
        if carry.watch is not None:
            carry = carry._replace(watch=bound.rejudged(carry.watch, carry.state, engine.asked(carry), problem.stop))
        spent = float(meta.get("seconds", 0.0))
        sums |= {name: total for name, total in meta.get("totals", {}).items() if name in sums}
        run.kept = {"identity": what, "totals": sums, "watched": carry.watch is not None}
        if hasattr(engine, "offset"):
            engine.offset.value = float(meta.get("offset", 0.0))
    confirm = own("confirm") if keep_best else None
    shown = (lambda candidate: candidate) if space is None else space.presented
    if confirm is not None and space is not None and not jit:
        confirm = spaces.Presented(confirm, space)
    again = confirming.of(problem, lambda state: _recommended(strategy, state)) if keep_best and not confirm else None
    confirm = confirm or again
    done, reason = int(carry.generation), ""
    budget = total = ENDLESS if evaluations is None else evaluations
    if again is not None and budget > again.times + engine.asked(carry):
        budget -= again.times  # kept for the end
    endless = generations is None and evaluations is None and seconds is None
    begun = saved = time.monotonic()
    sign, word = (-1.0, "best return") if display == "return" else (1.0, "best")
    elapsed = lambda: spent + time.monotonic() - begun

    def save() -> None:
        assert run is not None
        offset = {"offset": engine.offset.value} if hasattr(engine, "offset") else {}
        run.kept = {**run.kept, "totals": sums, **offset}
        run.save(carry, step=int(carry.generation), meta={"seconds": elapsed()})
        if shares := getattr(evaluator, "workers", None):
            run.write("workers.json", shares())

    name = label or type(strategy).__name__
    warm = engine.warm  # a first dispatch that compiles does not predict the time of the next
    with interrupts_kept(run is not None) as interrupts, bars.meter(progress, name, sign=sign, word=word) as meter:
        while True:
            interrupts.arm()
            asked, left = engine.asked(carry), budget - sums["evaluations"]
            unanswered = int(getattr(carry.state, "unanswered", 0))
            if endless and done == unanswered >= UNANSWERED:
                reason = "unanswered"
                break
            if reason := _finished(carry, done, limit, elapsed(), seconds, target, asked > left, strategy):
                break
            if reason := ending.name(carry.watch):
                break
            # Callbacks come after every multiple of `every`, so that their effect does not depend on speed.
            steps = max(1, min(steps, limit - done, every - done % every if every else DISPATCH, DISPATCH))
            before = time.monotonic()
            try:
                with jax_only(jit and not warm):
                    carry, rows = engine.advance(carry, steps, asked, min(left, ENDLESS))
            except Exception:
                if run is not None and _whole(carry):  # the objective raised: keep earlier progress
                    save()
                raise
            took = time.monotonic() - before
            if jit and rows[0]["generation"] == 1:
                _warn_of_rounding(rows[0], carry.best_value.dtype)
            rate = sum(row["evaluations"] for row in rows) / took
            if confirm and target is not None and reached(carry, target, strategy):
                carry, cost = _confirmed(confirm, carry, context, key_run)
                rows[-1] |= {"evaluations": rows[-1]["evaluations"] + cost, "confirmed": float(carry.best_value)}
            for row in rows:
                sums = {name: total + row[name] for name, total in sums.items()}
                row |= {**sums, "seconds": round(elapsed(), 3)}
            history += rows
            done = int(carry.generation)
            steps = min(2 * steps, max(1, int(len(rows) * DISPATCH_SECONDS / took))) if warm else 1
            warm = True
            if run is not None:
                run.append(rows)
                run.kept = {**run.kept, "totals": sums}  # callbacks save too
                if time.monotonic() - saved >= checkpoint_seconds:
                    save()
                    saved = time.monotonic()
            used = sums["evaluations"] / max(1, budget - asked + 1)  # the last generation must fit entirely
            bounded = limit < ENDLESS or seconds or evaluations is not None
            shares = (done / limit, used, elapsed() / seconds if seconds else 0.0)
            share = max(shares) if bounded else float("nan")
            meter.show(share, rows[-1], rate, note="" if evaluator is None else evaluator.status())
            stops = [callback(carry, rows) is True for callback in callbacks]  # calls all of them
            if any(stops):
                reason = "callback"
                break
            if reason := interrupts.reason():
                break
    if run is not None:
        save()
    best_value, spent_last = float(carry.best_value), 0
    if confirm and reason != "target" and done > unanswered:
        # A lucky answer is not a best value. If the budget has no room to confirm it, the value stays as answered.
        carry = carry if again is None else again.chosen(carry)
        confirmed, cost = _confirmed(confirm, carry, context, key_run)
        if sums["evaluations"] + cost <= total:
            best_value, spent_last = float(confirmed.best_value), cost
    return Result(
        None if carry.best is None else shown(carry.best),
        best_value,
        shown(_recommended(strategy, carry.state)),
        sums["evaluations"] + spent_last,
        done,
        reason,
        history,
        carry.state,
        carry.context,
        int(getattr(carry.state, "unanswered", 0)),
        elapsed(),
        carry.context if carry.best_context is None else carry.best_context,
        display,
        why=ending.why(carry, problem.stop),
        chosen=chosen,
        **feasibility_of(strategy, carry),
    )


def _recommended(strategy: Any, state: Any) -> Params:
    """The recommendation, computed in one program unless the model is large, where that would copy it."""
    large = trees.size(state) > 1 << 20
    return strategy.recommend(state) if large else programs.Bound(strategy).recommend(state)


def _warn_of_rounding(row: dict[str, Any], dtype: Any) -> None:
    """Warn if the first generation's values are so large that their type swallows the differences."""
    most, spread = max(abs(row["best"]), abs(row["worst"])), row["worst"] - row["best"]
    if not np.isfinite(most) or row["answered"] < 2:
        return
    if 0 < spread <= 16 * jnp.finfo(dtype).eps * most or (spread == 0 and most >= PLATEAU):
        warnings.warn(
            f"the values of the first generation are all about {row['best']:.8g}: {np.dtype(dtype).name} may not tell "
            "them apart. Subtract the constant in them, or search in float64 (docs/float64.md).",
            stacklevel=3,
        )


_CONTEXT = 0x636F6E74  # folded into the key for the context that an objective makes itself


def _finished(carry, done, limit, elapsed, seconds, target, spent, strategy) -> str:
    if target is not None and reached(carry, target, strategy):
        return "target"
    if done >= limit:
        return "generations"
    if spent:
        return "evaluations"
    if seconds is not None and elapsed >= seconds:
        return "seconds"
    return ""


def _confirmed(confirm: Any, carry: Carry, context: Any, key: Key) -> tuple[Carry, int]:
    """The carry with the best candidate's value from new evaluations, and their number."""
    seen = context if carry.best_context is None else carry.best_context
    if isinstance(confirm, confirming.Again):
        seen = carry.context  # another noise than the one that it won by
    value, cost = confirm(carry.best, seen, noises.fold_in(noises.fold_in(key, carry.generation), 1 << 31))
    best = number(value, "the best candidate")
    best = np.inf if np.isnan(best) else best
    kind = np.asarray if isinstance(carry.best_value, np.ndarray) else jnp.asarray
    return carry._replace(best_value=kind(best, carry.best_value.dtype)), int(cost)


def _whole(carry: Carry) -> bool:
    return not any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(carry))
