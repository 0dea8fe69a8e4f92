"""Search without a barrier: the next generation is asked before the last one is all answered, so that nobody waits."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import constraints
from evoopt import noise as noises
from evoopt.checks import check_strategy
from evoopt.distributed.evaluator import Evaluator
from evoopt.run import programs
from evoopt.types import Answers, Key, error


class Told(NamedTuple):
    """One generation, told."""

    state: Any  # after it
    answers: Answers
    staleness: int  # generations told between its asking and its telling
    answered: int  # candidates with an answer


def steady_state(
    evaluator: Evaluator,
    strategy: Any,
    state: Any,
    oracle: Callable[..., Any],
    *args: Any,
    key: Key | int,
    tells: int,
    ahead: int = 2,
    fraction: float = 1.0,
    batch_size: int | None = None,
    jit: bool = True,
) -> Iterator[Told]:
    """Keep `ahead` generations under way; each is asked from the newest state, and told to the newest when it is in.

    A generation is told `ahead - 1` others later than in the ordinary loop, which a strategy sees as answers from where
    it was a moment ago. Evolution strategies, swarms, genetic algorithms and differential evolution bear that; line
    searches and anything that compares two generations do not. Generations are told in the order in which they were
    asked, so with `fraction=1` the result has the same bits with any number of workers and any timing. Candidates are
    sent, not replicas.

    Args:
        evaluator: from `evoopt.distributed`.
        strategy, state: the search, and where it begins.
        oracle: `strategy.oracle(objective)`.
        *args: the same for all candidates.
        key: a threefry key or a seed; generation i is asked with `fold_in(key, i)`.
        tells: generations to tell.
        ahead: generations under way; 1 is the ordinary loop.
        fraction: of a generation's candidates that are waited for; the others are NaN. Below 1 the result depends on
            timing.
        batch_size, jit: as for the evaluator.

    >>> import jax
    >>> from evoopt.distributed import LocalEvaluator
    >>> from evoopt.strategies import snes
    >>> strategy = snes(16)
    >>> state = strategy.init(jnp.zeros(3), jax.random.key(0))
    >>> sphere = lambda x: jnp.sum((x - 1.0) ** 2)
    >>> [t.staleness for t in steady_state(LocalEvaluator(), strategy, state, sphere, key=0, tells=4, batch_size=8)]
    [0, 1, 1, 1]
    """
    if tells < 0 or ahead < 1 or not 0 < fraction <= 1:
        got = f"tells={tells}, ahead={ahead}, fraction={fraction}"
        raise error("tells >= 0, ahead >= 1 and a fraction in (0, 1]", got, "a percentage, or a slipped sign")
    check_strategy(strategy)
    bound = programs.Bound(strategy)
    key = noises.replayable(key)
    under_way: collections.deque[tuple[int, Any]] = collections.deque()
    asked = 0
    for number in range(tells):
        while len(under_way) < ahead and asked < tells:
            population = bound.ask_at(state, key, asked)
            job = evaluator.submit(population, oracle, *args, batch_size=batch_size, jit=jit)
            under_way.append((number, job))
            asked += 1
        before, job = under_way.popleft()
        answers = constraints.told(strategy, job.population, evaluator.collect(job, fraction))
        state = bound.tell(state, job.population, answers)
        yield Told(state, answers, number - before, int(jnp.isfinite(constraints.parts(answers)[0]).sum()))
