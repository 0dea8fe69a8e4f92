"""Objectives in Python and evaluation by workers: a generation at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import constraints
from evoopt.answers import WithAux, as_floats, plain, split
from evoopt.population import Population
from evoopt.run import keys, programs
from evoopt.run.offset import Offset
from evoopt.run.points import arrays
from evoopt.run.problem import Carry, Problem, after, begun, feasibility, host_statistics, reached, violation, watchable
from evoopt.types import Key, Params


class Stepped:
    """A generation at a time; what a host objective answers stays float64. `Host` and `Spread` say who evaluates."""

    def __init__(self, problem: Problem, evaluate: Any) -> None:
        p = problem
        self.problem, self._evaluate, self.offset = p, evaluate, Offset()
        # Asking and telling are programs of their own, the same ones that replicas run.
        self.strategy = programs.Bound(p.strategy)
        update, summarize = p.update, p.summarize
        # Wrapped: methods of objects that have no hash can't be compiled as they are.
        self._updated = programs.jit(lambda *given: update(*given)) if update else lambda context, aux: context
        uses: Any = (update, summarize, p.strategy)
        self._after = programs.jit(lambda *given: after(*given, *uses)) if p.jit else None

    def start(self, params: Params, key: Key, context: Any) -> Carry:
        """The carry to begin with."""
        p = self.problem
        # Traced with the parameters and hyperparameters as they are, which `init` checks where they are known.
        state = jax.eval_shape(lambda key: p.strategy.init(params, key), key)
        self.population = jax.eval_shape(p.strategy.ask, state, key)
        # The best value of an objective on the host is float64, which JAX may not have.
        value: Any = jnp.asarray(jnp.inf, jnp.result_type(float)) if p.jit else np.asarray(np.inf)
        made = begun(p.strategy, self.strategy.init(params, key), context, value, p.keep_best, p.update is not None)
        watch = self.strategy.watching(made.state, len(self.population)) if p.stop is not None else None
        return made._replace(watch=watch)

    @property
    def n(self) -> int:
        """The candidates of a generation, active or not."""
        return len(self.population)

    def asked(self, carry: Carry) -> int:
        """How many candidates the next generation evaluates; computed only where that may change."""
        if self.population.active is None:
            return len(self.population)
        return int(self._ask(carry).asked())

    def _ask(self, carry: Carry) -> Population:
        return self.strategy.ask_at(carry.state, self.problem.key, int(carry.generation))

    def advance(self, carry: Carry, steps: int, asked: int, left: int) -> tuple[Carry, list[dict[str, Any]]]:
        """At most `steps` generations and `left` evaluations, `asked` of them in the first."""
        p, rows = self.problem, []
        for _ in range(steps):
            if asked > left:
                break
            population = self._ask(carry)
            answers, aux = self._evaluate(population, carry)
            if self._after is not None:
                answers = constraints.told(p.strategy, population, answers)
                state = self.strategy.tell(carry.state, population, answers)
                carry, row = self._after(carry, state, population, answers, aux)
                row = {k: np.asarray(v).tolist() for k, v in row.items()}
                carry = self._watched(carry, watchable(answers, p.strategy), row["evaluations"])
            else:
                carry, row = self._told(carry, population, answers, aux)
            rows.append({"generation": int(carry.generation), **row})
            asked = rows[-1]["evaluations"]
            left -= asked
            if p.target is not None and reached(carry, p.target, p.strategy):
                break
            if carry.watch is not None and np.asarray(carry.watch.ended).any():
                break
        return carry, rows

    def _watched(self, carry: Carry, values: Any, asked: int) -> Carry:
        """The carry after stopping criteria have seen these values."""
        if carry.watch is None:
            return carry
        return carry._replace(watch=self.strategy.watched(carry.watch, carry.state, values, asked, self.problem.stop))

    def _told(self, carry: Carry, population: Population, answers: Any, aux: Any) -> tuple[Carry, dict[str, Any]]:
        """As `after`, for values in float64: what is told is their difference from the offset."""
        p = self.problem
        values, violations, grads = self._parts(population, answers)
        before = self.offset.value
        (state, watch), difference = self.offset.told((carry.state, carry.watch), values)
        narrow = None if violations is None else violations.astype(difference.dtype)
        answers = constraints.joined(difference, narrow, grads)
        if p.evaluator is not None and hasattr(p.evaluator, "told"):
            p.evaluator.told(answers, moved=self.offset.value != before)
        state = self.strategy.tell(state, population, answers)
        asked = len(values) if population.active is None else int(population.asked())
        row = host_statistics(values) | {"evaluations": asked}
        best, seen, best_value = carry.best, carry.best_context, float(carry.best_value)
        # As `answers.best_place`, which would round these float64 values.
        place = np.argmin(np.where(np.isnan(values) | np.isneginf(values), np.inf, values))
        value, worst, better = row["best"], carry.best_violation, row["best"] < best_value
        if violations is not None:
            totals = p.strategy.violated(violations)
            row |= {name: x.item() for name, x in feasibility(values, totals).items()}
            place = constraints.best(values, totals)
            value = float(values[place])
            better = constraints.better(value, totals[place], best_value, violation(carry, p.strategy))
            worst = violations[place] if better else worst
        if better:
            best_value = value
            if p.keep_best:
                # As `decode` gives it, for the state; what objectives in Python get may hold text.
                (best,) = arrays(population, np.array([place]))
                best = jax.tree.map(jnp.asarray, best)
                seen = None if seen is None else carry.context
        row["best_so_far"] = best_value
        if p.summarize:
            found = p.summarize(jnp.asarray(values, jnp.result_type(float)), aux)
            row |= {name: np.asarray(x).tolist() for name, x in found.items()}
        context = self._updated(carry.context, aux)
        generation: Any = np.int32(int(carry.generation) + 1)  # of NumPy, like the value: JAX may not have float64
        new = Carry(state, context, generation, best, np.asarray(best_value), seen, worst, watch)
        return self._watched(new, watchable(answers, p.strategy), asked), row

    def _parts(self, population: Population, answers: Any) -> tuple[Any, Any, tuple]:
        """(values, violations or None, gradients), float64, of what `host_answers` or workers gave."""
        if constraints.reads(self.problem.strategy):
            answers = constraints.apart(self.problem.strategy, answers, population)
        elif not isinstance(answers, tuple):
            answers = plain(answers)  # refuses violations
        return constraints.parts(answers)


class Host:
    """The engine of an objective in Python: it is called with NumPy arrays, one candidate after the other."""

    def __init__(self, problem: Problem) -> None:
        self.problem, stepped = problem, Stepped(problem, self._evaluate)
        self._stepped = stepped
        self.start, self.advance, self.asked, self.offset = (
            stepped.start, stepped.advance, stepped.asked, stepped.offset,
        )  # fmt: skip
        self.warm = True

    @property
    def n(self) -> int:
        return self._stepped.n

    def _evaluate(self, population: Population, carry: Carry) -> tuple[Any, Any]:
        p, places = self.problem, population.places()
        args, own = p.arguments(carry.context, len(population))
        answers = []
        for place, candidate in zip(places, population, strict=True):
            mine = () if own is None else (jax.tree.map(lambda x, i=place: x[i], own),)
            answers.append(p.f(candidate, *args, *mine))
        return p.apart(host_answers(answers, population, p.strategy))


class Spread:
    """The engine of an evaluator: candidates go to workers or devices."""

    def __init__(self, problem: Problem) -> None:
        # An objective in Python answers by itself what the strategy asks, as for `Host`.
        answering = constraints.Paired(problem.f) if constraints.reads(problem.strategy) else problem.f
        self.problem, self._oracle = problem, problem.oracle if problem.jit else answering
        self._stepped = Stepped(problem, self._evaluate)
        self.asked, self.offset, self.warm = self._stepped.asked, self._stepped.offset, False

    @property
    def n(self) -> int:
        return self._stepped.n

    def start(self, params: Params, key: Key, context: Any) -> Carry:
        """The carry to begin with, where the evaluator wants it."""
        return self.problem.evaluator.place(self._stepped.start(params, key, context))

    def advance(self, carry: Carry, steps: int, asked: int, left: int) -> tuple[Carry, list[dict[str, Any]]]:
        """At most `steps` generations and `left` evaluations, `asked` of them in the first."""
        carry, rows = self._stepped.advance(carry, steps, asked, left)
        rows[-1]["evaluation"] = self.problem.evaluator.metrics()
        return carry, rows

    def _evaluate(self, population: Population, carry: Carry) -> tuple[Any, Any]:
        p, key = self.problem, keys.generation_key(self.problem.key, int(carry.generation))
        args, own = p.arguments(carry.context, len(population))
        answers = p.evaluator(
            population, self._oracle, *args, each=own, batch_size=p.batch_size, jit=p.jit,
            source=(p.strategy, carry.state, key),
        )  # fmt: skip
        return p.apart(answers)


def host_answers(given: list[Any], population: Population, strategy: Any) -> Any:
    """What a Python objective answered for the active candidates, as the answers of all n: (n,), (values, gradients).

    With violations for a strategy that reads them, and with an aux where it has one, as `WithAux`.
    """
    stacked = lambda rows: jax.tree.map(
        lambda *leaves: population.widened(np.stack([np.asarray(x) for x in leaves])), *rows
    )
    answers, extras = zip(*map(split, given), strict=True) if given else ((), ())
    reads, n = constraints.reads(strategy), len(given)
    answers = answers if reads else [plain(answer) for answer in answers]
    pairs = [isinstance(answer, tuple) for answer in answers]
    if reads:
        told: Any = constraints.gathered(strategy, answers, population)
    elif pairs and all(pairs):  # of a first-order strategy
        values = population.widened(as_floats([answer[0] for answer in answers], n))
        told = (values, stacked([answer[1] for answer in answers]))
    else:
        told = population.widened(as_floats(answers, n))
    whole = next((aux for aux in extras if aux is not None), None)
    if whole is None:
        return told
    lost = jax.tree.map(_nothing, whole)
    return WithAux(told, stacked([lost if aux is None else aux for aux in extras]))


def _nothing(x: Any) -> np.ndarray:
    """The aux of a candidate without an answer."""
    x = np.asarray(x)
    return np.full(x.shape, np.nan, x.dtype) if np.issubdtype(x.dtype, np.floating) else np.zeros_like(x)
