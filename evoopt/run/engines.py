"""Who runs the generations of `minimize`: one compiled loop, this process one candidate at a time, or workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_floats, as_values, best_place, finite, told
from evoopt.population import Population
from evoopt.run.offset import Offset
from evoopt.types import Array, Key, Objective, Params

DISPATCH = 512  # most generations in one dispatch
AT_ONCE_BYTES = 1 << 28  # a population up to this size is evaluated at once unless batch_size says otherwise


class Carry(NamedTuple):
    """Everything that a run is: saved, restored, and carried from generation to generation."""

    state: Any
    context: Any
    generation: Array  # () int32, told so far
    best: Params | None  # the best candidate seen
    best_value: Array  # ()
    best_context: Any = None  # the context it was seen in; None where contexts do not change


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be minimised, and how its answers are used: the arguments of `minimize`."""

    f: Objective
    strategy: Any
    key: Key  # of the run
    target: float | None = None
    update: Callable[[Any, Any], Any] | None = None
    each: Callable[[Any, int], Any] | None = None
    summarize: Callable[[Array, Any], dict[str, Array]] | None = None
    batch_size: int | None = None
    keep_best: bool = True
    jit: bool = True
    evaluator: Any = None

    @property
    def has_aux(self) -> bool:
        return self.update is not None or self.summarize is not None

    @property
    def oracle(self) -> Callable[..., Any]:
        """What a candidate is asked."""
        return self.strategy.oracle(self.f, has_aux=self.has_aux)

    def ask(self, state: Any, generation: Array) -> Population:
        """The candidates of a generation."""
        return self.strategy.ask(state, noises.fold_in(self.key, generation))

    def arguments(self, context: Any, n: int) -> tuple[tuple, Any]:
        """What the objective gets besides a candidate: the same for all, and a row for each."""
        args = () if context is None and self.each is None else (context,)
        return args, self.each(context, n) if self.each else None

    def begin(self, state: Any, context: Any, value: Any) -> Carry:
        """The carry of a run that has told nothing; `value` is its infinite best value."""
        best = jax.tree.map(jnp.copy, self.strategy.recommend(state)) if self.keep_best else None
        copied = lambda: jax.tree.map(jnp.copy, trees.strong(context))
        seen = copied() if self.keep_best and self.update is not None else None
        return Carry(state, copied(), jnp.zeros((), jnp.int32), best, value, seen)


def engine(problem: Problem) -> Any:
    """Who runs the generations of `problem`."""
    if problem.evaluator is not None:
        return Spread(problem)
    return Compiled(problem) if problem.jit else Host(problem)


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


def host_statistics(values: np.ndarray) -> dict[str, Any]:
    """The same of float64 values on the host."""
    ok = values[np.isfinite(values)]
    found = {"best": np.min, "mean": np.mean, "median": np.median, "worst": np.max}
    row: dict[str, Any] = {name: float(f(ok)) if len(ok) else float("nan") for name, f in found.items()}
    return row | {"answered": int((~(np.isnan(values) | np.isneginf(values))).sum())}


class _Asked:
    """How many candidates the next generation evaluates; traced once, run only where the number may change."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._count: Callable[[Any, Array], Any] | None = None

    def __call__(self, carry: Carry) -> int:
        if self._count is None:
            population = jax.eval_shape(self.problem.ask, carry.state, carry.generation)
            n = len(population)
            ask = self.problem.ask
            changes = population.active is not None
            self._count = jax.jit(lambda state, i: ask(state, i).asked()) if changes else lambda state, i: n
        return int(self._count(carry.state, carry.generation))


def _kept(
    problem: Problem, carry: Carry, state: Any, population: Population, answers: Any, aux: Any
) -> tuple[Carry, dict[str, Array]]:
    """What a generation leaves besides the state: context, best candidate, the row of metrics."""
    values = as_values(answers)
    context = problem.update(carry.context, aux) if problem.update else carry.context
    row = statistics(values) | {"evaluations": population.asked()}
    better = row["best"] < carry.best_value
    best = (carry.best, carry.best_context)
    if problem.keep_best:
        i = best_place(values)
        genome = jax.tree.map(lambda g: g[i], population.genomes)
        seen = None if carry.best_context is None else carry.context
        best = jax.lax.cond(better, lambda: (population.decode(genome), seen), lambda: best)
    best_value = jnp.where(better, row["best"], carry.best_value)
    row["best_so_far"] = best_value
    if problem.summarize:
        row |= problem.summarize(values, aux)
    return Carry(state, context, carry.generation + 1, best[0], best_value, best[1]), row


class Compiled:
    """Many generations a dispatch: a while loop whose length is an argument, so that one program serves all."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.asked, self.at_once = problem, _Asked(problem), False

    def start(self, state: Any, context: Any) -> Carry:
        p = self.problem
        population = jax.eval_shape(p.strategy.ask, state, p.key)
        if p.batch_size is None:
            self.at_once = len(population) * trees.size(p.strategy.recommend(state)) * 4 <= AT_ONCE_BYTES
        carry = p.begin(state, context, jnp.asarray(jnp.inf, jnp.float32))
        dtype = jax.eval_shape(lambda c: as_values(self._evaluate(c)[1]), carry).dtype
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
        carry = carry._replace(best_value=carry.best_value.astype(dtype))
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
        target = self.problem.target

        def going(loop: Any) -> Array:
            i, asked, left, carry, _ = loop
            more = (i < steps) & (asked <= left)  # a generation is as large as the last: sizes change rarely
            return more if target is None else more & ~(carry.best_value <= target)

        def step(loop: Any) -> Any:
            i, _, left, carry, rows = loop
            carry, row = self._generation(carry)
            asked = jnp.asarray(row["evaluations"], jnp.int32)
            return i + 1, asked, left - asked, carry, jax.tree.map(lambda column, x: column.at[i].set(x), rows, row)

        start = (jnp.zeros((), jnp.int32), asked, left, carry, self._empty())
        return jax.lax.while_loop(going, step, start)[3:]

    def _generation(self, carry: Carry) -> tuple[Carry, dict[str, Array]]:
        population, answers, aux = self._evaluate(carry)
        answers = told(population, answers)
        state = self.problem.strategy.tell(carry.state, population, answers)
        return _kept(self.problem, carry, state, population, answers, aux)

    def _evaluate(self, carry: Carry) -> tuple[Population, Any, Any]:
        p = self.problem
        population = p.ask(carry.state, carry.generation)
        args, own = p.arguments(carry.context, len(population))
        if self.at_once:
            answers = population.vmap(p.oracle, *args, each=own)
        else:
            answers = population.map(p.oracle, *args, each=own, batch_size=p.batch_size)
        return (population, *answers) if p.has_aux else (population, answers, None)


class _Stepped:
    """A generation at a time, by an `evaluate` of one's own; what a host objective answers stays float64."""

    def __init__(self, problem: Problem, evaluate: Callable[..., Any]) -> None:
        p = problem
        self.problem, self._evaluate, self.asked, self.offset = p, evaluate, _Asked(p), Offset()
        # Asking and telling are programs of their own, the same ones that replicas run.
        self._ask, self._tell = jax.jit(p.strategy.ask), jax.jit(p.strategy.tell)
        self._kept = jax.jit(lambda *given: _kept(p, *given))
        self._pick = jax.jit(lambda population, i: population.decode(jax.tree.map(lambda g: g[i], population.genomes)))
        update = p.update
        # Wrapped: methods of objects that have no hash can't be compiled as they are.
        self._updated = jax.jit(lambda *given: update(*given)) if update else lambda context, aux: context

    def advance(self, carry: Carry, steps: int, asked: int, left: int) -> tuple[Carry, list[dict[str, Any]]]:
        """At most `steps` generations and `left` evaluations, `asked` of them in the first."""
        p, rows = self.problem, []
        for _ in range(steps):
            if asked > left:
                break
            key = noises.fold_in(p.key, carry.generation)
            population = self._ask(carry.state, key)
            answers, aux = self._evaluate(population, carry, key)
            if p.jit:
                answers = told(population, answers)
                state = self._tell(carry.state, population, answers)
                carry, row = self._kept(carry, state, population, answers, aux)
                row = {k: np.asarray(v).tolist() for k, v in row.items()}
            else:
                carry, row = self._told(carry, population, answers, aux)
            rows.append({"generation": int(carry.generation), **row})
            asked = rows[-1]["evaluations"]
            left -= asked
            if p.target is not None and float(carry.best_value) <= p.target:
                break
        return carry, rows

    def _told(self, carry: Carry, population: Population, answers: Any, aux: Any) -> tuple[Carry, dict[str, Any]]:
        """As `_kept`, for values in float64: what is told is their difference from the offset."""
        p = self.problem
        values, *grads = answers if isinstance(answers, tuple) else (answers,)
        before = self.offset.value
        state, difference = self.offset.told(carry.state, values)
        if p.evaluator is not None and hasattr(p.evaluator, "told"):
            p.evaluator.told((difference, *grads) if grads else difference, moved=self.offset.value != before)
        state = self._tell(state, population, (difference, *grads) if grads else difference)
        row = host_statistics(values) | {"evaluations": int(population.asked())}
        best, seen, best_value = carry.best, carry.best_context, float(carry.best_value)
        if row["best"] < best_value:
            best_value = row["best"]
            if p.keep_best:
                ok = ~(np.isnan(values) | np.isneginf(values))
                best = self._pick(population, np.int32(np.argmin(np.where(ok, values, np.inf))))
                seen = None if seen is None else carry.context
        row["best_so_far"] = best_value
        if p.summarize:
            found = p.summarize(jnp.asarray(values, jnp.result_type(float)), aux)
            row |= {name: np.asarray(x).tolist() for name, x in found.items()}
        context = self._updated(carry.context, aux)
        held: Any = np.asarray(best_value)  # float64, which JAX may not have
        return Carry(state, context, carry.generation + 1, best, held, seen), row

    def infinite(self) -> Any:
        """The best value to start from: float64 for an objective on the host."""
        return jnp.asarray(jnp.inf, jnp.result_type(float)) if self.problem.jit else np.asarray(np.inf)


class Host:
    """The objective is called from Python with NumPy arrays, one candidate after the other."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self._stepped = problem, _Stepped(problem, self._evaluate)
        self.advance, self.asked, self.offset = self._stepped.advance, self._stepped.asked, self._stepped.offset

    def start(self, state: Any, context: Any) -> Carry:
        return self.problem.begin(state, context, self._stepped.infinite())

    def _evaluate(self, population: Population, carry: Carry, key: Key) -> tuple[Any, Any]:
        del key
        p, places = self.problem, population.places()
        args, own = p.arguments(carry.context, len(population))
        answers = []
        for place, candidate in zip(places, population, strict=True):
            mine = () if own is None else (jax.tree.map(lambda x, i=place: x[i], own),)
            answers.append(p.f(candidate, *args, *mine))
        return host_answers(answers, population, p.has_aux)


def host_answers(answers: list[Any], population: Population, has_aux: bool) -> tuple[Any, Any]:
    """What a Python objective answered for the active candidates: (values or (values, gradients), aux), n rows each."""
    stacked = lambda rows: jax.tree.map(
        lambda *leaves: population.widened(np.stack([np.asarray(x) for x in leaves])), *rows
    )
    aux = None
    if has_aux and (whole := [answer for answer in answers if answer is not None]):
        lost = (None, jax.tree.map(_nothing, whole[0][1]))
        each = [lost if answer is None else answer for answer in answers]
        answers, aux = [answer for answer, _ in each], stacked([extra for _, extra in each])
    pairs = [isinstance(answer, tuple) for answer in answers]
    if pairs and all(pairs):  # of a first-order strategy
        values = as_floats([answer[0] for answer in answers], len(answers))
        return (population.widened(values), stacked([answer[1] for answer in answers])), aux
    return population.widened(as_floats(answers, len(answers))), aux


def _nothing(x: Any) -> np.ndarray:
    """The aux of a candidate without an answer."""
    x = np.asarray(x)
    return np.full(x.shape, np.nan, x.dtype) if np.issubdtype(x.dtype, np.floating) else np.zeros_like(x)


class Spread:
    """Candidates are evaluated by workers or devices."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self._stepped, self._oracle = problem, _Stepped(problem, self._evaluate), problem.oracle
        self.asked, self.offset = self._stepped.asked, self._stepped.offset

    def start(self, state: Any, context: Any) -> Carry:
        return self.problem.evaluator.place(self.problem.begin(state, context, self._stepped.infinite()))

    def advance(self, carry: Carry, steps: int, asked: int, left: int) -> tuple[Carry, list[dict[str, Any]]]:
        """At most `steps` generations and `left` evaluations, `asked` of them in the first."""
        carry, rows = self._stepped.advance(carry, steps, asked, left)
        rows[-1]["evaluation"] = self.problem.evaluator.metrics()
        return carry, rows

    def _evaluate(self, population: Population, carry: Carry, key: Key) -> tuple[Any, Any]:
        p = self.problem
        args, own = p.arguments(carry.context, len(population))
        answers = p.evaluator(
            population, self._oracle, *args, each=own, batch_size=p.batch_size, jit=p.jit, has_aux=p.has_aux,
            source=(p.strategy, carry.state, key),
        )  # fmt: skip
        return answers if p.has_aux else (answers, None)
