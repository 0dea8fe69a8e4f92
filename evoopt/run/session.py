"""An ask/tell loop with tickets, for objectives outside JAX: answers told twice, or to another generation, fail."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evoopt import constraints, spaces
from evoopt import noise as noises
from evoopt.answers import as_floats, plain
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.run import cache, checkpoint, keys, programs
from evoopt.run.identity import describe, differences
from evoopt.run.offset import Offset
from evoopt.types import Answers, Key, Params, error


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One generation's candidates and the ticket that its answers must carry.

    Iteration, `len` and indexing see only the candidates to evaluate: a strategy that shrinks or restarts keeps places
    for more. `population` has all of them.
    """

    number: int
    population: Population

    def __iter__(self) -> Iterator[Params]:
        return iter(self.population)

    def __len__(self) -> int:
        return int(self.population.asked())

    def __getitem__(self, i: Any) -> Any:
        """Candidate i of those to evaluate, with the same bits as by iteration; a list of them for a slice."""
        some = list(self.population.candidates(np.atleast_1d(self.population.places()[i])))
        return some if isinstance(i, slice) else some[0]


class Session:
    """Holds the state of a search over generations that are evaluated elsewhere.

    It can be pickled, copied, and saved without pickle (`save`, `load`); each continues with the same bits. To pickle
    nested functions, such as those in optax's optimizers, use cloudpickle; `save` takes any strategy.

    >>> from evoopt.strategies import snes
    >>> session = Session(snes(16), [1.0, 2.0], key=0)
    >>> for _ in range(200):
    ...     generation = session.ask()
    ...     values = [float(sum((x - 3) ** 2 for x in candidate)) for candidate in generation]
    ...     session.tell(generation, values)
    >>> [round(float(x), 2) for x in session.recommend()]
    [3.0, 3.0]

    Attributes:
        state: the strategy's state.
        number: generations told so far.
    """

    def __init__(self, strategy: Any, params: Params, *, key: Key | int = 0) -> None:
        check_strategy(strategy)
        params, strategy, self.space = spaces.entered(params, strategy)
        cache.enable()
        self.strategy, self.key, self.number = strategy, noises.replayable(key), 0
        self.offset = Offset()
        self._bind()
        key_init, _ = keys.run_keys(self.key)
        # Traced with concrete parameters and hyperparameters, because `init` can check only those.
        jax.eval_shape(lambda key: strategy.init(params, key), key_init)
        self.state = self._programs.init(params, key_init)

    def _bind(self) -> None:
        self._key_run = keys.run_keys(self.key)[1]
        self._programs = programs.Bound(self.strategy)

    def ask(self) -> Generation:
        """The current generation, the same one until it is told."""
        return Generation(self.number, self._programs.ask_at(self.state, self._key_run, self.number))

    def tell(self, generation: Generation, answers: Answers) -> None:
        """Update the state with the answers to `generation`; NaN or None stands for no answer.

        Args:
            generation: what `ask` returned.
            answers: any sequence or iterator of numbers, in the order of iteration: one for each candidate to evaluate,
                or one for each place in the population. For first-order strategies, (values, gradients); for one that
                reads violations, `Answer(values, violations)`, or a list of (value, violation). They are taken
                as float64: a large offset such as 1e9 costs nothing.

        Raises:
            ValueError: if the generation was already told, is not the one last asked for, or has another number of
                answers. The state is unchanged.
            TypeError: if answers are not numbers, or all are None.
        """
        if not isinstance(generation, Generation):
            raise error(
                "tell(generation, answers), with what `ask` returned",
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
        population = generation.population
        if constraints.reads(self.strategy):
            values, violations, rest = constraints.parts(constraints.apart(self.strategy, answers, population))
        else:
            (values, *rest), violations = answers if _is_pair(answers) else (plain(answers),), None
            values = population.widened(as_floats(values, population.counted(values)))
            rest = [jax.tree.map(lambda x: population.widened(np.asarray(x)), part) for part in rest]
        offset = Offset(self.offset.value)
        state, values = offset.told(self.state, values)
        violations = None if violations is None else violations.astype(values.dtype)
        # All at once, and last, so that a refused answer changes nothing.
        told = constraints.joined(values, violations, rest)
        self.state, self.offset = self._programs.tell(state, population, told), offset
        self.number += 1

    def recommend(self) -> Params:
        """The point to use if the search ended now."""
        recommended = self._programs.recommend(self.state)
        return recommended if self.space is None else self.space.presented(recommended)

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
        >>> checkpoint.digest(again.state) == checkpoint.digest(session.state)
        True
        """
        newest = checkpoint.latest(folder)
        if newest is not None and newest > self.number:
            raise error(
                f"a folder of this search, which is at generation {self.number}",
                f"a checkpoint of generation {newest} in '{folder}'",
                "the folder of an earlier search; `load` would find that search",
            )
        meta = {"offset": self.offset.value, "strategy": describe(self.strategy)}
        checkpoint.save(folder, {"state": self.state, "key": self.key}, step=self.number, meta=meta)

    @classmethod
    def load(cls, folder: str | Path, strategy: Any, params: Params) -> Session:
        """The session of the newest checkpoint in `folder`, which continues bit for bit.

        Raises:
            ValueError: if `strategy` or `params` are not those that were saved.
        """
        session = cls(strategy, params)

        def check(meta: dict[str, Any]) -> None:
            if differ := differences(meta.get("strategy"), describe(session.strategy)):
                cause = "another popsize, step-size, or space than before"
                raise error("the strategy that was saved", "; ".join(differ), cause)

        found = checkpoint.load(folder, {"state": session.state, "key": session.key}, check=check)
        session.state, session.key = (jax.tree.map(jax.numpy.asarray, found.tree[name]) for name in ("state", "key"))
        session.number, session.offset = found.step, Offset(float(found.meta.get("offset", 0.0)))
        session._bind()
        return session

    def __copy__(self) -> Session:
        """Another session in the same state; both continue independently and share compiled programs."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: Any) -> Session:
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"strategy": self.strategy, "space": self.space, "number": self.number}
        kept["offset"] = Offset(self.offset.value)
        return {**kept, **keys.without_keys({"key": self.key, "state": self.state})}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update({**kept, **keys.with_keys({name: kept[name] for name in ("key", "state")})})
        self._bind()


def _is_pair(answers: Any) -> bool:
    """Whether a tuple is (values, gradients) and not a tuple of numbers."""
    if not isinstance(answers, tuple) or len(answers) != 2:
        return False
    return isinstance(answers[0], list | tuple) or np.ndim(answers[0]) > 0
