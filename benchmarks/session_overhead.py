"""What ask and tell of one candidate cost in a `Session` told one at a time, against pycma; without the objective."""

from __future__ import annotations

import time
from typing import Any

import cma
import jax
import numpy as np

from evoopt import Session
from evoopt.strategies import cma_es
from evoopt.strategies.covariance import recombination

D, GENERATIONS, SIGMA = 10, 60, 1.0
START = np.full(D, 2.0)
POPSIZE = recombination.default_popsize(D)
COMPILED = "/jax/core/compile/backend_compile_duration"


def f(x: Any) -> float:
    return float((np.asarray(x) ** 2 * np.arange(1, D + 1)).sum())


def ours(compiled: list[str]) -> float:
    """Seconds a candidate after the first generation, which compiles; `compiled` gets what is compiled after it."""
    session = Session(cma_es(POPSIZE, sigma=SIGMA), START, key=1, stop=None)
    for _ in range(POPSIZE):
        (one,) = session.ask(1)
        session.tell(one, f(one.params))
    compiled.clear()
    seconds = 0.0
    for _ in range(GENERATIONS * POPSIZE):
        begin = time.perf_counter()
        (one,) = session.ask(1)
        seconds += time.perf_counter() - begin
        value = f(one.params)
        begin = time.perf_counter()
        session.tell(one, value)
        seconds += time.perf_counter() - begin
    return seconds / (GENERATIONS * POPSIZE)


def theirs() -> float:
    """The same of pycma, by generations, which is how it is asked and told."""
    es = cma.CMAEvolutionStrategy(START, SIGMA, {"popsize": POPSIZE, "verbose": -9, "verb_log": 0, "seed": 1})
    es.tell(x := es.ask(), [f(point) for point in x])
    seconds = 0.0
    for _ in range(GENERATIONS):
        begin = time.perf_counter()
        x = es.ask()
        seconds += time.perf_counter() - begin
        values = [f(point) for point in x]
        begin = time.perf_counter()
        es.tell(x, values)
        seconds += time.perf_counter() - begin
    return seconds / (GENERATIONS * POPSIZE)


def seconds(repeats: int) -> tuple[float, float, int]:
    """Of ours and of pycma, medians of interleaved repeats; and the programs compiled after the first generation."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    pairs = [(ours(compiled), theirs()) for _ in range(repeats)]
    here, there = (float(np.median(side)) for side in zip(*pairs, strict=True))
    return here, there, len(compiled)
