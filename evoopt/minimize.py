"""The loop: budget, stopping, history, callbacks, checkpoints. Everything is minimised."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt import progress as bars
from evoopt import trees
from evoopt.population import Population
from evoopt.strategy import told
from evoopt.types import Array, Key, Objective, Params, error
from evoopt.utilities import answered, as_values, finite

DISPATCH = 512  # most generations in one dispatch
DISPATCH_SECONDS = 0.25  # a dispatch aims at this long, so that bar, callbacks and clock are looked at
AT_ONCE_BYTES = 1 << 28  # a population up to this size is evaluated at once unless batch_size says otherwise


class Carry(NamedTuple):
    """Everything that a run is: saved, restored, and carried from generation to generation."""

    state: Any
    context: Any
    generation: Array  # () int32, told so far
    best: Params | None  # the best candidate seen
    best_value: Array  # ()


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        best: the best candidate seen, None with `keep_best=False`.
        best_value: its value.
        recommended: the strategy's recommendation, for noisy objectives the better choice.
        evaluations: active candidates asked for, answered or not.
        generations: generations told.
        reason: `target`, `generations`, `evaluations`, `seconds`, `callback` or `interrupted`.
        history: one dict a generation: generation, evaluations, best, mean, median, worst, answered, best_so_far.
        state: the strategy's state.
        context: the objective's context.
        unanswered: generations in which no candidate had a finite value.
        seconds: wall-clock time, of earlier parts of a resumed run included.
    """

    best: Params | None
    best_value: float
    recommended: Params
    evaluations: int
    generations: int
    reason: str
    history: list[dict[str, Any]]
    state: Any
    context: Any
    unanswered: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"best value {self.best_value:.6g} after {self.evaluations} evaluations in {self.generations} generations "
            f"({self.seconds:.1f} s); stopped by {self.reason}"
        )


def minimize(
    f: Objective,
    x0: Params,
    strategy: Any,
    *,
    key: Key | int = 0,
    generations: int | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    target: float | None = None,
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
    progress: bool | None = None,
    label: str = "",
    display: str = "value",
    run: Any = None,
    checkpoint_seconds: float = 30.0,
) -> Result:
    """Minimise `f` from `x0` with `strategy`.

    Args:
        f: the objective. `f(params)`; with a context `f(params, context)`; with `each`, `f(params, context, each_i)`;
            it answers a scalar, with `update` or `summarize` (scalar, aux). A JAX function, or any Python callable with
            `jit=False`, which gets NumPy arrays and answers a float (for first-order strategies: (value, gradient)).
        x0: where to start: a pytree of float arrays.
        strategy: from `evoopt.strategies`.
        key: a threefry key or a seed. The same key gives the same run, bit for bit on the same machine.
        generations, evaluations, seconds: the budget; whichever is used up first. At least one, or a target.
        target: stop once a candidate's value is at most this.
        context: a pytree the objective needs and that is not searched: data, episode keys, running statistics.
        update: `context, aux -> context` after a generation; leaves of aux have leading axis n.
        each: `context, n -> pytree` with leading axis n, whose row i only candidate i gets.
        summarize: `values, aux -> dict of scalars` that are added to the history.
        totals: which of these scalars the history shows summed over the generations so far.
        batch_size: candidates evaluated at once. None: all, if they take less than 256 MB; otherwise one at a time.
        jit: False for an objective that is not JAX.
        evaluator: who evaluates the candidates: `evoopt.distributed.RayEvaluator(workers=8)`, or `ShardedEvaluator()`
            for the devices of this machine. `batch_size` is then the micro-batch of its workers (None: the evaluator's
            own), and any number of workers or devices gives the same bits. The evaluator is not closed.
        keep_best: keep the best candidate seen, at the cost of one more copy of the parameters.
        callbacks: called as `callback(carry, new_history_rows)` after every dispatch; True stops the run.
        every: callbacks come after every multiple of this, and maybe more often; None: about every quarter of a second.
        progress: True for a bar (on a terminal) or lines (elsewhere), False for none, None for a bar on a terminal.
        label, display: what the bar says; display="return" shows minus the value, as rewards are read.
        run: a run folder (`evoopt.runs.Run`): history and checkpoints go there, and a run that has checkpoints
            continues from its last one, bit for bit.
        checkpoint_seconds: time between checkpoints.

    Raises:
        ValueError: without a budget, with parameters that cannot be searched, with values of the wrong shape.

    >>> from evoopt.strategies import snes
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), snes(16), generations=500, target=1e-8)
    >>> result.reason, bool(result.best_value <= 1e-8)
    ('target', True)
    """
    key_init, key_run = jax.random.split(noises.replayable(key))
    state = trees.strong(jax.tree.map(jnp.copy, strategy.init(x0, key_init)))  # copied: x0 is not given away
    kind = _Spread if evaluator is not None else _Compiled if jit else _Host
    engine = kind(f, strategy, key_run, target, update, each, summarize, batch_size, keep_best)
    engine.evaluator, engine.jit = evaluator, jit  # for those that spread
    carry = engine.start(state, context)
    limit = _checked(generations, evaluations, seconds, target, engine.asked(carry))

    history: list[dict[str, Any]] = []
    spent = 0.0  # seconds of earlier parts of the run
    if run is not None:
        carry, history, spent = _restore(run, carry)
    done, reason = int(carry.generation), ""
    sums = {name: history[-1].get(name, 0) if history else 0 for name in ("evaluations", *totals)}
    budget = _ENDLESS if evaluations is None else evaluations
    begun = saved = time.monotonic()
    steps = 1
    sign, word = (-1.0, "best return") if display == "return" else (1.0, "best")
    elapsed = lambda: spent + time.monotonic() - begun

    name = label or type(strategy).__name__
    warm = False  # the first dispatch compiles, so its time says nothing of the next
    with _interrupts(run is not None) as interrupted, bars.meter(progress, name, sign=sign, word=word) as meter:
        while True:
            asked, left = engine.asked(carry), budget - sums["evaluations"]
            if reason := _finished(carry, done, limit, elapsed(), seconds, target, asked > left):
                break
            # Callbacks come after every multiple of `every`, so that what they do is the same however fast it goes.
            steps = max(1, min(steps, limit - done, every - done % every if every else DISPATCH, DISPATCH))
            before = time.monotonic()
            try:
                carry, rows = engine.advance(carry, steps, asked, min(left, _ENDLESS))
            except Exception:
                if run is not None and _whole(carry):  # the objective raised: what was learned before is kept
                    _save(run, carry, elapsed())
                raise
            took = time.monotonic() - before
            rate = sum(row["evaluations"] for row in rows) / took
            for row in rows:
                sums = {name: total + row[name] for name, total in sums.items()}
                row |= {**sums, "seconds": round(elapsed(), 3)}
            history += rows
            done = int(carry.generation)
            steps = min(2 * steps, max(1, int(len(rows) * DISPATCH_SECONDS / took))) if warm else 1
            warm = True
            if run is not None:
                run.append(rows)
                if time.monotonic() - saved >= checkpoint_seconds:
                    _save(run, carry, elapsed())
                    saved = time.monotonic()
            used = sums["evaluations"] / max(1, budget - asked + 1)  # the last generation must fit whole
            bounded = limit < _ENDLESS or seconds or evaluations is not None
            shares = (done / limit, used, elapsed() / seconds if seconds else 0.0)
            share = max(shares) if bounded else float("nan")
            meter.show(share, rows[-1], rate, note="" if evaluator is None else evaluator.status())
            stops = [callback(carry, rows) is True for callback in callbacks]  # every one is called
            if any(stops):
                reason = "callback"
                break
            if interrupted():
                reason = "interrupted"
                break
    if run is not None:
        _save(run, carry, elapsed())
    return Result(
        carry.best,
        float(carry.best_value),
        strategy.recommend(carry.state),
        sums["evaluations"],
        done,
        reason,
        history,
        carry.state,
        carry.context,
        int(getattr(carry.state, "unanswered", 0)),
        elapsed(),
    )


_ENDLESS = 2**31 - 1


def _checked(generations: Any, evaluations: Any, seconds: Any, target: Any, asked: int) -> int:
    """The most generations, once the budget makes sense; the first generation asks for `asked` evaluations."""
    for name, budget in (("generations", generations), ("evaluations", evaluations), ("seconds", seconds)):
        if budget is not None and budget < 0:
            raise error(f"{name} of at least 0", str(budget), "a budget computed by subtraction")
    if all(budget is None for budget in (generations, evaluations, seconds, target)):
        raise error("a budget: generations, evaluations or seconds, or a target", "none", "the argument was forgotten")
    if evaluations is not None and 0 < evaluations < asked:
        raise error(
            f"at least {asked} evaluations, one generation of this strategy",
            str(evaluations),
            "a budget in evaluations that was meant in generations",
        )
    return _ENDLESS if generations is None else int(generations)


def _finished(carry, done, limit, elapsed, seconds, target, spent) -> str:
    if target is not None and float(carry.best_value) <= target:
        return "target"
    if done >= limit:
        return "generations"
    if spent:
        return "evaluations"
    if seconds is not None and elapsed >= seconds:
        return "seconds"
    return ""


def _save(run: Any, carry: Carry, elapsed: float) -> None:
    run.save(carry, step=int(carry.generation), meta={"seconds": elapsed})


def restore(run: Any, f: Objective, x0: Params, strategy: Any, *, context: Any = None) -> Carry:
    """The carry of a run's newest checkpoint, for looking at it; the run folder is only read."""
    state = trees.strong(strategy.init(x0, jax.random.key(0)))
    like = _Engine(f, strategy, None, None, None, None, None, None, True)._carry(state, context, jnp.float32)
    return run.load(like).tree


def _whole(carry: Carry) -> bool:
    return not any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(carry))


def _restore(run: Any, carry: Carry) -> tuple[Carry, list[dict[str, Any]], float]:
    if run.steps():
        saved = run.load(carry)
        run.truncate(saved.step)
        # Copied: the loop gives its carry away, and NumPy memory is not JAX's to reuse.
        return jax.tree.map(jnp.copy, saved.tree), run.metrics(), float(saved.meta.get("seconds", 0.0))
    run.truncate(0)  # killed before its first checkpoint: from the start again
    return carry, [], 0.0


@contextlib.contextmanager
def _interrupts(saves: bool) -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the run between two dispatches, where the state is whole; a second one ends it at once.

    SIGTERM does the same where there is a run folder to save to; elsewhere it ends the process, as always.
    """
    asked: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    before = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, *([signal.SIGTERM] if saves else []))
    }
    try:
        yield lambda: bool(asked)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Engine:
    """What the engines share: asking, telling, and the row of a generation."""

    evaluator: Any = None
    jit = True
    _asked: Callable[[Carry], Any] | None = None

    def __init__(self, f, strategy, key, target, update, each, summarize, batch_size, keep_best) -> None:
        self.f, self.strategy, self.key, self.target = f, strategy, key, target
        self.update, self.each, self.summarize = update, each, summarize
        self.batch_size, self.at_once, self.keep_best = batch_size, False, keep_best
        self.has_aux = update is not None or summarize is not None

    def _ask(self, carry: Carry) -> Population:
        return self.strategy.ask(carry.state, noises.fold_in(self.key, carry.generation))

    def _tell(self, carry: Carry, population: Population, answers: Any, aux: Any) -> tuple[Carry, dict[str, Array]]:
        answers = told(population, answers)
        return self._told(carry, self.strategy.tell(carry.state, population, answers), population, answers, aux)

    def _told(
        self, carry: Carry, state: Any, population: Population, answers: Any, aux: Any
    ) -> tuple[Carry, dict[str, Array]]:
        """What is kept besides the state."""
        values = as_values(answers)
        context = self.update(carry.context, aux) if self.update else carry.context
        row = statistics(values) | {"evaluations": population.asked()}
        better = row["best"] < carry.best_value
        best = carry.best
        if self.keep_best:
            i = jnp.nanargmin(jnp.where(answered(values), values, jnp.inf))
            genome = jax.tree.map(lambda g: g[i], population.genomes)
            best = jax.lax.cond(better, lambda: population.decode(genome), lambda: carry.best)
        best_value = jnp.where(better, row["best"], carry.best_value)
        row["best_so_far"] = best_value
        if self.summarize:
            row |= self.summarize(values, aux)
        return Carry(state, context, carry.generation + 1, best, best_value), row

    def asked(self, carry: Carry) -> int:
        """How many candidates the next generation evaluates."""
        if self._asked is None:  # traced once; run only where the number may change
            population = jax.eval_shape(self._ask, carry)
            n = len(population)
            changes = population.active is not None
            self._asked = jax.jit(lambda carry: self._ask(carry).asked()) if changes else lambda carry: n
        return int(self._asked(carry))

    def _carry(self, state: Any, context: Any, dtype: Any) -> Carry:
        best = jax.tree.map(jnp.copy, self.strategy.recommend(state)) if self.keep_best else None
        context = jax.tree.map(jnp.copy, trees.strong(context))
        return Carry(state, context, jnp.zeros((), jnp.int32), best, jnp.asarray(jnp.inf, dtype))


def statistics(values: Array) -> dict[str, Array]:
    """best, mean, median, worst over the finite answers of a generation (NaN where there is none), and how many."""
    ok = jnp.isfinite(values)
    x = jnp.where(ok, values, jnp.nan)
    n = ok.sum()
    some = n > 0
    clean = finite(values)
    return {
        "best": jnp.where(some, jnp.min(values, where=ok, initial=jnp.inf), jnp.nan),
        "mean": jnp.where(some, jnp.where(ok, clean, 0).sum() / jnp.maximum(n, 1).astype(values.dtype), jnp.nan),
        "median": jnp.nanmedian(x),
        "worst": jnp.where(some, jnp.max(values, where=ok, initial=-jnp.inf), jnp.nan),
        "answered": answered(values).sum(),
    }


class _Compiled(_Engine):
    """Many generations a dispatch: a while loop whose length is an argument, so that one program serves all."""

    def start(self, state: Any, context: Any) -> Carry:
        population = jax.eval_shape(self.strategy.ask, state, self.key)
        if self.batch_size is None:
            self.at_once = len(population) * trees.size(self.strategy.recommend(state)) * 4 <= AT_ONCE_BYTES
        probe = self._carry(state, context, jnp.float32)
        dtype = jax.eval_shape(lambda c: as_values(self._evaluate(c)[1]), probe).dtype
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
        carry = probe._replace(best_value=probe.best_value.astype(dtype))
        rows = jax.eval_shape(lambda c: self._generation(c)[1], carry)
        self._empty = lambda: jax.tree.map(lambda s: jnp.zeros((DISPATCH, *s.shape), s.dtype), rows)
        self._advance = jax.jit(self._loop, donate_argnums=0)
        return carry

    def advance(self, carry: Carry, steps: int, asked: int, left: int) -> tuple[Carry, list[dict[str, Any]]]:
        """At most `steps` generations and `left` evaluations, `asked` of them in the first."""
        before = int(carry.generation)
        carry, rows = self._advance(carry, np.int32(steps), np.int32(asked), np.int32(left))
        done = int(carry.generation)
        columns = {name: np.asarray(column).tolist() for name, column in rows.items()}
        return carry, [
            {"generation": before + i + 1, **{name: column[i] for name, column in columns.items()}}
            for i in range(done - before)
        ]

    def _loop(self, carry: Carry, steps: Array, asked: Array, left: Array) -> tuple[Carry, dict[str, Array]]:
        def going(loop: Any) -> Array:
            i, asked, left, carry, _ = loop
            more = (i < steps) & (asked <= left)  # a generation is as large as the last: sizes change rarely
            return more if self.target is None else more & ~(carry.best_value <= self.target)

        def step(loop: Any) -> Any:
            i, _, left, carry, rows = loop
            carry, row = self._generation(carry)
            asked = jnp.asarray(row["evaluations"], jnp.int32)
            return i + 1, asked, left - asked, carry, jax.tree.map(lambda column, x: column.at[i].set(x), rows, row)

        start = (jnp.zeros((), jnp.int32), asked, left, carry, self._empty())
        return jax.lax.while_loop(going, step, start)[3:]

    def _generation(self, carry: Carry) -> tuple[Carry, dict[str, Array]]:
        return self._tell(carry, *self._evaluate(carry))

    def _evaluate(self, carry: Carry) -> tuple[Population, Any, Any]:
        population = self._ask(carry)
        oracle = self.strategy.oracle(self.f, has_aux=self.has_aux)
        args = () if carry.context is None and self.each is None else (carry.context,)
        own = self.each(carry.context, len(population)) if self.each else None
        if self.at_once:
            answers = population.vmap(oracle, *args, each=own)
        else:
            answers = population.map(oracle, *args, each=own, batch_size=self.batch_size)
        return (population, *answers) if self.has_aux else (population, answers, None)


class _Host(_Engine):
    """A generation at a time, the objective called from Python with NumPy arrays."""

    def start(self, state: Any, context: Any) -> Carry:
        self._ask_jit = jax.jit(self._ask)
        self._tell_jit = jax.jit(self._tell)
        return self._carry(state, context, jnp.result_type(float))

    def advance(self, carry: Carry, steps: int, asked: int, left: int) -> tuple[Carry, list[dict[str, Any]]]:
        """At most `steps` generations and `left` evaluations, `asked` of them in the first."""
        rows = []
        for _ in range(steps):
            if asked > left:
                break
            population = self._ask_jit(carry)
            args = () if carry.context is None and self.each is None else (carry.context,)
            own = self.each(carry.context, len(population)) if self.each else None
            asks = np.ones(len(population), bool) if population.active is None else np.asarray(population.active)
            answers = []
            for i, candidate in enumerate(population):
                mine = () if own is None else (jax.tree.map(lambda x, i=i: x[i], own),)
                answers.append(self.f(candidate, *args, *mine) if asks[i] else None)
            nothing = jax.tree.map(_nothing, answers[int(asks.argmax())])
            answers = [answer if asks[i] else nothing for i, answer in enumerate(answers)]
            aux = None
            if self.has_aux:
                answers, aux = ([a[0] for a in answers], _stack([a[1] for a in answers]))
            answers = _stack(answers) if isinstance(answers[0], tuple) else told(population, answers)
            carry, row = self._tell_jit(carry, population, answers, aux)
            rows.append({"generation": int(carry.generation), **{k: np.asarray(v).tolist() for k, v in row.items()}})
            asked = rows[-1]["evaluations"]
            left -= asked
            if self.target is not None and float(carry.best_value) <= self.target:
                break
        return carry, rows


def _nothing(x: Any) -> np.ndarray:
    """What a candidate that was not asked about answers in the place of x."""
    x = np.asarray(x)
    return np.full(x.shape, np.nan, x.dtype) if np.issubdtype(x.dtype, np.floating) else np.zeros_like(x)


class _Spread(_Engine):
    """A generation at a time, evaluated by workers. Asking and telling are programs of their own, those of replicas."""

    def start(self, state: Any, context: Any) -> Carry:
        self._ask_jit, self._tell_jit = jax.jit(self.strategy.ask), jax.jit(self.strategy.tell)
        self._told_jit = jax.jit(self._told)
        self._oracle = self.strategy.oracle(self.f, has_aux=self.has_aux)
        return self.evaluator.place(self._carry(state, context, jnp.result_type(float)))

    def advance(self, carry: Carry, steps: int, asked: int, left: int) -> tuple[Carry, list[dict[str, Any]]]:
        """At most `steps` generations and `left` evaluations, `asked` of them in the first."""
        rows = []
        for _ in range(steps):
            if asked > left:
                break
            key = noises.fold_in(self.key, carry.generation)
            population = self._ask_jit(carry.state, key)
            args = () if carry.context is None and self.each is None else (carry.context,)
            answers = self.evaluator(
                population, self._oracle, *args,
                each=self.each(carry.context, len(population)) if self.each else None,
                batch_size=self.batch_size, jit=self.jit, has_aux=self.has_aux,
                source=(self.strategy, carry.state, key),
            )  # fmt: skip
            answers, aux = answers if self.has_aux else (answers, None)
            answers = told(population, answers)
            state = self._tell_jit(carry.state, population, answers)
            carry, row = self._told_jit(carry, state, population, answers, aux)
            row = {k: np.asarray(v).tolist() for k, v in row.items()}
            rows.append({"generation": int(carry.generation), **row})
            asked = rows[-1]["evaluations"]
            left -= asked
            if self.target is not None and float(carry.best_value) <= self.target:
                break
        rows[-1]["evaluation"] = self.evaluator.metrics()
        return carry, rows


def _stack(rows: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *rows)
