"""Objectives in JAX: many generations a dispatch, in one compiled loop that is kept for the next call."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import constraints, stopping, trees
from evoopt import noise as noises
from evoopt.answers import Answer, plain, split
from evoopt.population import Population
from evoopt.run import programs, threads
from evoopt.run.problem import DISPATCH, Carry, Problem, after, begun, reached, watchable
from evoopt.stopping import Stops
from evoopt.types import Array, Key, Params

AT_ONCE_BYTES = 1 << 28  # a population up to this size is evaluated at once unless batch_size says otherwise


class Plain:
    """A function that is called as it is, and not known by what it computes."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f

    def __call__(self, consts: list[Array], *args: Any) -> Any:
        return self.f(*args)


Piece = programs.Traced | Plain


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What is constant in a loop. Each piece is called with the arrays that it closes over first."""

    n: int  # candidates
    oracle: Piece
    update: Piece | None
    each: Piece | None
    summarize: Piece | None
    takes_context: bool
    batch_size: int | None
    at_once: bool
    keep_best: bool
    watches: bool  # whether stopping criteria may end the loop
    dtype: Any  # of values


class Program:
    """The loop, compiled at its first call. All that may differ from call to call is an argument."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.used = pieces, False
        self.begin = programs.jit(self._begin)
        self.advance = programs.jit(self._loop, donate_argnums=2)
        self.count = programs.jit(self._count)

    def _begin(self, strategy: Any, params: Params, key: Key, context: Any) -> Carry:
        strategy, pieces = programs.plain(strategy), self.pieces
        state = trees.strong(strategy.init(params, key))
        value = jnp.asarray(jnp.inf, pieces.dtype)
        made = begun(strategy, state, context, value, pieces.keep_best, pieces.update is not None)
        return made._replace(watch=stopping.watching(strategy, state, pieces.n) if pieces.watches else None)

    def _count(self, strategy: Any, state: Any, key: Key, generation: Array) -> Array:
        return programs.plain(strategy).ask(state, noises.fold_in(key, generation)).asked()

    def _loop(
        self, strategy: Any, consts: dict[str, list[Array]], carry: Carry, key: Key,
        steps: Array, asked: Array, left: Array, target: Array, stops: Stops | None,
    ) -> tuple[Carry, dict[str, Array]]:  # fmt: skip
        """At most `steps` generations and `left` evaluations, `asked` of them in the first; a row for each."""
        generation = functools.partial(self.generation, programs.plain(strategy), consts, key, stops)
        shapes = jax.eval_shape(generation, carry)[1]
        empty = jax.tree.map(lambda s: jnp.zeros((DISPATCH, *s.shape), s.dtype), shapes)

        def going(loop: Any) -> Array:
            i, asked, left, carry, _ = loop
            more = (i < steps) & (asked <= left)  # a generation is as large as the last: sizes change rarely
            return more & ~finished(carry, target, programs.plain(strategy))

        def step(loop: Any) -> Any:
            i, _, left, carry, rows = loop
            carry, row = generation(carry)
            asked = jnp.asarray(row["evaluations"], jnp.int32)
            return i + 1, asked, left - asked, carry, jax.tree.map(lambda column, x: column.at[i].set(x), rows, row)

        return jax.lax.while_loop(going, step, (jnp.zeros((), jnp.int32), asked, left, carry, empty))[3:]

    def generation(
        self, strategy: Any, consts: dict[str, list[Array]], key: Key, stops: Stops | None, carry: Carry
    ) -> tuple[Carry, dict[str, Array]]:
        pieces = self.pieces
        given = {name: functools.partial(piece, consts[name]) for name in consts if (piece := getattr(pieces, name))}
        population: Population = strategy.ask(carry.state, noises.fold_in(key, carry.generation))
        args = (carry.context,) if pieces.takes_context else ()
        own = given["each"](carry.context) if pieces.each else None
        if pieces.at_once:
            answers = population.vmap(given["oracle"], *args, each=own)
        else:
            answers = population.map(given["oracle"], *args, each=own, batch_size=pieces.batch_size)
        answers, aux = split(answers)
        answers = constraints.told(strategy, population, answers)
        state = strategy.tell(carry.state, population, answers)
        carry, row = after(
            carry, state, population, answers, aux, given.get("update"), given.get("summarize"), strategy
        )
        if carry.watch is not None:
            n, values = jnp.asarray(row["evaluations"], jnp.int32), watchable(answers, strategy)
            watch = stopping.watched(strategy, carry.watch, state, values, n, stops)  # type: ignore[arg-type]
            carry = carry._replace(watch=watch)
        return carry, row


def finished(carry: Carry, target: Array, strategy: Any) -> Array:
    """Whether the run has reached its target, or ended by itself: () bool."""
    met = reached(carry, target, strategy)
    return met if carry.watch is None else met | carry.watch.ended.any()


class Compiled:
    """The engine of an objective in JAX."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.strategy = problem, programs.argument(problem.strategy)

    def start(self, params: Params, key: Key, context: Any) -> Carry:
        """The carry to begin with; the programs are found or made."""
        p = self.problem
        # Traced with the parameters and hyperparameters as they are, which `init` checks where they are known.
        state = jax.eval_shape(lambda key: trees.strong(p.strategy.init(params, key)), key)
        population = jax.eval_shape(p.strategy.ask, state, key)
        n = len(population)
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)
        candidate = jax.eval_shape(lambda some: some.decode(first(some.genomes)), population)
        # What is as large as a model may be virtual, which the objective itself has to see.
        large = hasattr(population.decode, "virtual") and any(noises.is_large(x) for x in jax.tree.leaves(candidate))
        piece = (lambda f, *args: (Plain(f), [])) if large else programs.Traced.of

        context = trees.strong(context)
        args, own = p.arguments(context, n) if p.each is None else ((context,), None)
        pieces: dict[str, Any] = dict.fromkeys(("oracle", "update", "each", "summarize"))
        self._consts: dict[str, list[Array]] = {}
        if p.each is not None:
            each = p.each
            pieces["each"], self._consts["each"] = piece(lambda context: each(context, n), context)
            own = jax.eval_shape(lambda context: each(context, n), context)
        mine = () if own is None else (jax.eval_shape(first, own),)
        pieces["oracle"], self._consts["oracle"] = piece(p.oracle, candidate, *args, *mine)
        one = functools.partial(pieces["oracle"], self._consts["oracle"])
        answers = jax.eval_shape(lambda *given: one(*given), candidate, *args, *mine)
        answers, aux = p.apart(answers)
        value, violation, _ = constraints.parts(answers)
        if violation is not None and not constraints.reads(p.strategy):
            plain(Answer(value, violation))  # says that they are not for this strategy
        dtype = value.dtype if hasattr(value, "dtype") else jnp.float32
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
        rows = jax.tree.map(lambda s: jax.ShapeDtypeStruct((n, *s.shape), s.dtype), aux)
        if p.update is not None:
            pieces["update"], self._consts["update"] = piece(p.update, context, rows)
        if p.summarize is not None:
            values = jax.ShapeDtypeStruct((n,), jnp.promote_types(dtype, jnp.float32))
            pieces["summarize"], self._consts["summarize"] = piece(p.summarize, values, rows)
        at_once = p.batch_size is None and n * trees.size(candidate) * 4 <= AT_ONCE_BYTES
        found = Pieces(
            n, **pieces, takes_context=bool(args), batch_size=p.batch_size, at_once=at_once,
            keep_best=p.keep_best, watches=p.stop is not None and not stopping.restarts_itself(p.strategy), dtype=dtype,
        )  # fmt: skip
        lasts = not large and not isinstance(self.strategy, programs.Fixed)
        shapes = jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x))), (params, context))
        where = (found, jax.tree.structure(self.strategy), str(shapes))
        self.program = programs.kept(_programs, where, lambda: Program(found)) if lasts else Program(found)
        self._consts = {name: jax.device_put(consts) for name, consts in self._consts.items()}
        self._changes = population.active is not None
        self._target = np.asarray(jnp.nan if p.target is None else p.target, dtype)
        if large:  # `recommend` gives the parameters themselves, of which a program would make a copy
            made = trees.strong(jax.tree.map(jnp.copy, p.strategy.init(params, key)))
            watch = jax.tree.map(jnp.copy, stopping.watching(p.strategy, made, n)) if found.watches else None
            value = jnp.asarray(jnp.inf, dtype)
            return begun(p.strategy, made, context, value, p.keep_best, p.update is not None)._replace(watch=watch)
        return self.program.begin(self.strategy, params, key, context)

    @property
    def n(self) -> int:
        """The candidates of a generation, active or not."""
        return self.program.pieces.n

    @property
    def warm(self) -> bool:
        """Whether the loop was compiled by an earlier call."""
        return self.program.used

    def asked(self, carry: Carry) -> int:
        """How many candidates the next generation evaluates; computed only where that may change."""
        if not self._changes:
            return self.program.pieces.n
        return int(self.program.count(self.strategy, carry.state, self.problem.key, carry.generation))

    def lowered(self, carry: Carry) -> Any:
        """The loop as it will be compiled, for looking at it."""
        return self.program.advance.lower(*self._arguments(carry, 1, 1, 1))

    def _arguments(self, carry: Carry, steps: int, asked: int, left: int) -> tuple:
        numbers = (np.int32(steps), np.int32(asked), np.int32(left), self._target)
        return self.strategy, self._consts, carry, self.problem.key, *numbers, self.problem.stop

    def advance(self, carry: Carry, steps: int, asked: int, left: int) -> tuple[Carry, list[dict[str, Any]]]:
        """At most `steps` generations and `left` evaluations, `asked` of them in the first."""
        before = int(carry.generation)
        with threads.limited(threads.rows(carry.state)):
            given = self._arguments(carry, steps, asked, left)
            carry, rows = jax.block_until_ready(self.program.advance(*given))
        self.program.used = True
        done = int(carry.generation)
        columns = {name: np.asarray(column).tolist() for name, column in rows.items()}
        return carry, [
            {"generation": before + i + 1, **{name: column[i] for name, column in columns.items()}}
            for i in range(done - before)
        ]


_programs: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
