"""An ask/tell loop with tickets, for objectives outside JAX: by generations, or one candidate at a time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evoopt import constraints, spaces, stopping, trees
from evoopt import noise as noises
from evoopt.answers import as_floats, plain
from evoopt.automatic import settled
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.run import cache, desk, ending, keys, points, programs, saving
from evoopt.run.desk import Answered, Candidate, Desk, Generation, Out
from evoopt.run.ending import Why
from evoopt.run.offset import Offset
from evoopt.run.problem import feasibility, host_statistics, watchable
from evoopt.run.result import Result
from evoopt.stopping import Stops
from evoopt.types import Answers, Key, Params, error

STOPS = Stops()
DRAWS = 2  # keys of a run below this number are used otherwise: see `keys.run_keys`


class Session:
    """Holds the state of a search over candidates that are evaluated elsewhere.

    By generations: `ask()` gives one, `tell(generation, answers)` answers it. One at a time: `ask(n)` gives n
    candidates, and each is told as its answer comes, in any order, from any number of workers; a generation goes to the
    strategy as soon as it has as many answers as candidates. The state is the same either way, bit for bit, where the
    same candidates are answered. To maximise, tell minus the value.

    A session can be pickled, copied, and saved without pickle (`save`, `load`), with the candidates that are out; each
    continues with the same bits. To pickle nested functions, such as those in optax's optimizers, use cloudpickle;
    `save` takes any strategy.

    >>> from evoopt.strategies import snes
    >>> session = Session(snes(16), [1.0, 2.0], key=0)
    >>> f = lambda candidate: float(sum((x - 3) ** 2 for x in candidate))
    >>> for _ in range(100):
    ...     generation = session.ask()
    ...     session.tell(generation, [f(candidate) for candidate in generation])
    >>> while not session.stop():
    ...     one, other = session.ask(2)
    ...     session.tell(other, f(other.params))
    ...     session.tell(one.ticket, f(one.params))
    >>> [round(float(x), 2) for x in session.recommend()], "tolfun" in session.stop()
    ([3.0, 3.0], True)

    Attributes:
        state: the strategy's state.
        number: generations told so far.
        evaluations: answers told so far, injected ones too.
        history: one dict per generation, as in `Result`.
        best_value: the best value told, infinite before the first.
    """

    def __init__(self, strategy: Any, params: Params, *, key: Key | int = 0, stop: Stops | None = STOPS) -> None:
        """A search from `params`, which may be a space. `stop` has the tolerances of `stop()`; None: never."""
        strategy, self.chosen = settled(strategy, params, None)
        check_strategy(strategy)
        params, strategy, self.space = spaces.entered(params, strategy)
        cache.enable()
        self.strategy, self.key, self.number = strategy, noises.replayable(key), 0
        self.offset, self.stops, self._begun = Offset(), stopping.numbers(stop), time.time()
        self.evaluations, self.history = 0, []
        self.best_value, self._best = math.inf, None
        self._total, self._violation = math.inf, None  # by how much `best` violates constraints
        self._desk = Desk()
        self._bind()
        key_init, _ = keys.run_keys(self.key)
        # Traced with concrete parameters and hyperparameters, because `init` can check only those.
        jax.eval_shape(lambda key: strategy.init(params, key), key_init)
        self.state = self._programs.init(params, key_init)
        self._kind = trees.types(trees.strong(params))
        self.watch = None if stop is None else self._watching()

    def _watching(self) -> stopping.Watch | None:
        n = len(jax.eval_shape(self.strategy.ask, self.state, self.key))
        return self._programs.watching(self.state, n)

    def _bind(self) -> None:
        self._key_run = keys.run_keys(self.key)[1]
        self._programs = programs.Bound(self.strategy)
        self._draws: dict[int, tuple[Population, list[Params]]] = {}  # of this generation, made again when needed
        self._warm = False

    def ask(self, n: int | None = None) -> Any:
        """The current generation, the same one until it is told; or with `n`, a list of n single candidates.

        Injected points come first, then the generation's candidates, and when all of them are out, further draws from
        the same distribution: so no worker waits for another.

        Raises:
            ValueError: for an n below 1.
            TypeError: for candidates of a strategy that is told more than values, which goes by generations.
        """
        if n is None:
            return Generation(self.number, self._population(desk.DRAWN))
        check_popsize(n, 1, name="n")
        objective = lambda params: params
        asked = self.strategy.oracle(objective)
        if asked is not objective and not isinstance(asked, constraints.Paired):
            cause = "a first-order strategy: ask() for a generation, and tell (values, gradients)"
            raise error("a strategy that is told values", type(self.strategy).__name__, cause, TypeError)
        return [self._next() for _ in range(n)]

    def tell(self, generation: Any, answers: Answers) -> None:
        """Update the state with answers; NaN or None stands for no answer.

        Args:
            generation: what `ask()` returned; or a candidate of `ask(n)`, or its ticket.
            answers: any sequence or iterator of numbers, in the order of iteration: one for each candidate to evaluate,
                or one for each place in the population. For first-order strategies, (values, gradients); for one that
                reads violations, `Answer(values, violations)`, or a list of (value, violation). They are taken as
                float64: a large offset such as 1e9 costs nothing. For a single candidate, its value.

        A candidate whose generation was told without it is late: it counts for `best`, and enters the current
        generation as a point from elsewhere, if the strategy can take one (`moved`).

        Raises:
            ValueError: if the generation or the candidate was already told, or is not one of this session, or if there
                is another number of answers. The state is unchanged.
            TypeError: if answers are not numbers, or all of a generation's are None.
        """
        if isinstance(generation, (Candidate, int, np.integer)) and not isinstance(generation, bool):
            return self._tell_one(generation, constraints.single(self.strategy, answers))
        if not isinstance(generation, Generation):
            raise error(
                "tell(generation, answers), with what `ask` returned, or tell(candidate, value)",
                f"{type(generation).__name__} as the generation",
                "the candidates as a list, as in other libraries",
                TypeError,
            )
        if generation.number != self.number:
            raise error(
                f"the answers of generation {self.number}",
                f"those of generation {generation.number}",
                "the same answers told twice, or late answers from another worker",
            )
        if self._desk.own:
            cause = "ask() and ask(n) for the same generation; tell its other candidates one by one"
            got = f"{len(self._desk.own)} of its candidates were told one by one"
            raise error(f"generation {self.number} as a whole, or none of it", got, cause)
        population = generation.population
        if constraints.reads(self.strategy):
            values, violations, rest = constraints.parts(constraints.apart(self.strategy, answers, population))
        else:
            (values, *rest), violations = answers if _is_pair(answers) else (plain(answers),), None
            values = population.widened(as_floats(values, population.counted(values)))
            rest = [jax.tree.map(lambda x: population.widened(np.asarray(x)), part) for part in rest]
        self._told(population, values, rest, violations)
        self.evaluations += len(population.places())
        i, answer = self._leader(values, violations)
        self._see(answer, (population, i))

    def inject(self, given: Iterable[Params], values: Iterable[Any] | None = None) -> None:
        """Points that are known from elsewhere: with their values they are told as though they had been sampled.

        Without values they are handed out by the next `ask(n)`, before other candidates. A strategy that can't take
        points from elsewhere (it has no `moved`) knows them only as `best`.

        Args:
            given: points like the parameters; of a space, as objectives get them.
            values: one for each; for a strategy that reads violations, (value, violation).

        Raises:
            ValueError: for points of another structure, shape, or outside the bounds, or another number of values.
            TypeError: for points that are not numbers.
        """
        rows = points.checked(given, self)
        if values is None:
            self._desk.first.extend(rows)
            return
        told = [constraints.single(self.strategy, x) for x in points.as_many(values, len(rows))]
        for point, answer in zip(rows, told, strict=True):
            self.evaluations += 1
            self._see(answer, point)
            self._take(answer, point)
        self._close()

    def stop(self) -> dict[str, Why]:
        """Why the search has ended by itself: criterion -> its numbers, and a sentence by `str`. Empty: it goes on.

        Nothing is stopped by it: it is asked between candidates, and the session goes on if you do.
        """
        return ending.reasons(self.watch, self.stops)

    def recommend(self) -> Params:
        """The point to use if the search ended now."""
        return self._shown(self._programs.recommend(self.state))

    @property
    def best(self) -> Params | None:
        """The best candidate told, None before the first."""
        return None if (point := self._best_point()) is None else self._shown(point)

    def result(self) -> Result:
        """What the search has come to, as from `minimize`; `reason` is `open` while it goes on."""
        why = self.stop()
        reason = next(iter(why), "open")
        return Result(
            self.best, self.best_value, self.recommend(), self.evaluations, self.number, reason, [*self.history],
            self.state, None, int(self.state.unanswered), time.time() - self._begun,
            why="".join(str(w) for w in list(why.values())[:1]), chosen=self.chosen, **self._verdict(),
        )  # fmt: skip

    def _verdict(self) -> dict[str, Any]:
        if self._violation is None:
            return {}
        return {"feasible": self._total <= 0, "violation": self._total, "violations": np.array(self._violation)}

    # --- one candidate at a time

    def _population(self, draw: int) -> Population:
        return self._drawn(draw)[0]

    def _drawn(self, draw: int) -> tuple[Population, list[Params]]:
        """A draw of the current generation, and its candidates once they were decoded."""
        if draw not in self._draws:
            key = self._key_run if draw == desk.DRAWN else keys.generation_key(self.key, DRAWS + draw)
            self._draws[draw] = (self._programs.ask_at(self.state, key, self.number), [])
        return self._draws[draw]

    def _next(self) -> Candidate:
        if self._desk.first:
            out = Out(self._desk.first.popleft(), self.number, desk.INJECTED, 0)
            self._warm_up()
        else:
            places = self._population(desk.DRAWN).places()
            draw, i = divmod(self._desk.handed, len(places))
            population, rows = self._drawn(draw)
            if draw:
                self._warm_up()
            if not rows:
                rows.extend(points.arrays(population, places))
            out = Out(rows[i], self.number, draw, int(places[i]))
            self._desk.handed += 1
        return Candidate(self._desk.hand(out), self._shown(out.point))

    def _warm_up(self) -> None:
        """Compile what takes in points from elsewhere before the first of them is waited for."""
        if not self._warm and hasattr(self.strategy, "moved"):
            population = self._population(desk.DRAWN)
            n = len(population)
            like = jax.tree.map(lambda x: np.zeros((n, *x.shape), x.dtype), self._like())
            self._programs.moved(self.state, population, like, np.zeros(n, bool))
        self._warm = True

    def _tell_one(self, which: Any, answer: Answered) -> None:
        ticket = which.ticket if isinstance(which, Candidate) else which
        out = self._desk.find(ticket)
        if isinstance(which, Candidate) and not points.equal(which.params, self._shown(out.point)):
            cause = "a candidate of another session"
            raise error(f"candidate {ticket} as it was handed out", "other parameters under its ticket", cause)
        del self._desk.out[int(ticket)]
        self.evaluations += 1
        self._see(answer, out.point)
        if out.number == self.number and out.draw == desk.DRAWN:
            self._desk.own[out.place] = answer
        else:
            self._take(answer, out.point)
        self._close()

    def _leader(self, values: np.ndarray, violations: np.ndarray | None) -> tuple[int, Answered]:
        """The place and the answer of a generation's best candidate."""
        totals = np.zeros(len(values)) if violations is None else np.asarray(self.strategy.violated(violations))
        i = int(constraints.best(values, totals))
        return i, (float(values[i]), None if violations is None else violations[i].tolist())

    def _rank(self, answer: Answered) -> tuple[float, float]:
        """What is least for the best candidate: what it violates, then its value."""
        value, violation = answer
        total = 0.0 if violation is None else float(self.strategy.violated(np.array([violation]))[0])
        return (total, value) if math.isfinite(value) and not math.isnan(total) else (math.inf, math.inf)

    def _see(self, answer: Answered, point: Any) -> None:
        """Keep a candidate, (population, place) or its parameters, if it is the best so far."""
        if (rank := self._rank(answer)) < (self._total, self.best_value):
            (self._total, self.best_value), self._violation, self._best = rank, answer[1], point

    def _take(self, answer: Answered, point: Params) -> None:
        """Let the next generation that is told have a point from elsewhere, if the strategy can take it."""
        if hasattr(self.strategy, "moved") and not math.isnan(answer[0]):
            self._desk.others.append((point, answer))

    def _close(self) -> None:
        """Tell the strategy every generation that has its answers."""
        while True:
            population = self._population(desk.DRAWN)
            places = population.places()
            if len(self._desk.own) + len(self._desk.others) < len(places):
                return
            before = copy.copy(self._desk)
            values, violations, others, mask = self._desk.filled(places, len(population))
            try:
                if others is not None:
                    population = self._programs.moved(self.state, population, others, mask)
                self._told(population, values, [], violations)
            except BaseException:
                self._desk = before
                raise

    def _told(self, population: Population, values: np.ndarray, rest: Sequence[Any], violations: Any = None) -> None:
        """Tell the strategy a generation. All changes at once, and last, so that a refused answer changes nothing."""
        offset, asked = Offset(self.offset.value), len(population.places())
        (state, watch), difference = offset.told((self.state, self.watch), values)
        narrow = None if violations is None else violations.astype(difference.dtype)
        answers = constraints.joined(difference, narrow, rest)
        state = self._programs.tell(state, population, answers)
        if watch is not None:
            watch = self._programs.watched(watch, state, watchable(answers, self.strategy), asked, self.stops)
        self.state, self.watch, self.offset = state, watch, offset
        self.number += 1
        self._draws = {}
        self._desk.closed()
        row = {"generation": self.number, **host_statistics(values), "evaluations": asked}
        if violations is not None:
            row |= {name: x.item() for name, x in feasibility(values, self.strategy.violated(violations)).items()}
        leader = self._rank(self._leader(values, violations)[1])
        self.history.append({**row, "best_so_far": min((self._total, self.best_value), leader)[1]})

    def _shown(self, point: Params) -> Params:
        return point if self.space is None else self.space.presented(point)

    def _like(self) -> Params:
        return jax.eval_shape(self.strategy.recommend, self.state)

    def _best_point(self) -> Params | None:
        if isinstance(self._best, tuple) and len(self._best) == 2 and isinstance(self._best[0], Population):
            population, place = self._best
            (self._best,) = points.arrays(population, np.array([place]))
        return self._best

    # --- going on

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint into `folder`, whole or not at all. The folder keeps the last three, of one search.

        Raises:
            ValueError: if the folder has checkpoints newer than this session.

        >>> import tempfile
        >>> from evoopt.strategies import snes
        >>> session = Session(snes(16), [1.0, 2.0], key=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     session.save(folder)
        ...     again = Session.load(folder, snes(16), [1.0, 2.0])
        >>> bool((again.state.mean[0] == session.state.mean[0]).all()), again.number
        (True, 0)
        """
        saving.save(self, folder)

    @classmethod
    def load(cls, folder: str | Path, strategy: Any, params: Params, *, stop: Stops | None = STOPS) -> Session:
        """The session of the newest checkpoint in `folder`, which continues bit for bit.

        Raises:
            ValueError: if `strategy` or `params` are not those that were saved.
        """
        return saving.load(cls(strategy, params, stop=stop), folder)

    def __copy__(self) -> Session:
        """Another session in the same state; both continue independently and share compiled programs."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.history, new._desk, new._draws = [*self.history], copy.copy(self._desk), {}
        return new

    def __deepcopy__(self, memo: Any) -> Session:
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        self._best_point()  # not the whole population
        made = ("_programs", "_draws", "_warm", "_key_run")
        kept = {name: x for name, x in self.__dict__.items() if name not in made}
        return {**kept, **keys.without_keys({name: kept[name] for name in _ARRAYS})}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update({**kept, **keys.with_keys({name: kept[name] for name in _ARRAYS})})
        self._bind()


_ARRAYS = ("key", "state", "watch")  # of JAX; the rest of a session is NumPy's and Python's


def _is_pair(answers: Any) -> bool:
    """Whether a tuple is (values, gradients) and not a tuple of numbers."""
    if not isinstance(answers, tuple) or len(answers) != 2:
        return False
    return isinstance(answers[0], list | tuple) or np.ndim(answers[0]) > 0
