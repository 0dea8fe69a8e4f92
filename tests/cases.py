"""The case table of the contract test: one row for every strategy, and for wrapper combinations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from conftest import START

from evoopt import noise, strategies, wrappers


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make a strategy, and what it claims."""

    make: Callable[[], Any]
    reaches: float = 1.0  # value after 150 generations from 22.75
    rank_invariant: bool = False  # a monotone transform of the values changes no bit
    scale: str = "sigma"  # a hyperparameter that is a leaf, "" where there is none
    own_genomes: bool = True  # tell needs nothing of decode
    slow: bool = False


CASES: dict[str, Case] = {
    "openai_es": Case(lambda: strategies.openai_es(16, sigma=0.1, learning_rate=0.1), rank_invariant=True),
    "openai_es regenerated": Case(
        lambda: strategies.openai_es(16, sigma=0.1, learning_rate=0.1, regenerate=True), rank_invariant=True
    ),
    "openai_es rademacher": Case(
        lambda: strategies.openai_es(16, sigma=0.1, learning_rate=0.1, noise=noise.rademacher), rank_invariant=True
    ),
    "openai_es orthogonal": Case(
        lambda: strategies.openai_es(16, sigma=0.1, learning_rate=0.1, noise=noise.Orthogonal(noise.gaussian, 8)),
        rank_invariant=True,
    ),
    "ars": Case(lambda: strategies.ars(16, top=4, learning_rate=0.1)),
    "spsa": Case(lambda: strategies.spsa(8, sigma=0.01, learning_rate=0.05)),
    "pgpe": Case(lambda: strategies.pgpe(16, learning_rate=0.1), rank_invariant=True, scale="learning_rate"),
    "pgpe regenerated": Case(
        lambda: strategies.pgpe(16, learning_rate=0.1, regenerate=True), rank_invariant=True, scale="learning_rate"
    ),
    "snes": Case(lambda: strategies.snes(16), 1e-3, rank_invariant=True, scale="learning_rate"),
    "guided_es": Case(lambda: strategies.guided_es(16, learning_rate=0.1)),
    "deep_ga": Case(lambda: strategies.deep_ga(16, sigma=0.2, chain=4), rank_invariant=True),
    "gradient": Case(lambda: strategies.gradient(optax.adam(0.1)), scale=""),
    "bounded snes": Case(
        lambda: wrappers.bounded(strategies.snes(16), -4.0, 4.0), 1e-3, True, scale="", own_genomes=False
    ),
    "bounded gradient": Case(
        lambda: wrappers.bounded(strategies.gradient(optax.adam(0.1)), -4.0, 4.0), scale="", own_genomes=False
    ),
    "masked openai_es": Case(
        lambda: wrappers.masked(strategies.openai_es(16, sigma=0.1, learning_rate=0.1), {"w": True, "b": False}),
        2.5, True, scale="", own_genomes=False,
    ),  # fmt: skip
    "best_so_far bounded masked pgpe": Case(
        lambda: wrappers.best_so_far(
            wrappers.masked(
                wrappers.bounded(strategies.pgpe(16, learning_rate=0.1), -4.0, 4.0), {"w": True, "b": False}
            )
        ),
        2.5, True, scale="", own_genomes=False,
    ),  # fmt: skip
}


def structure() -> Any:
    """The parameters all cases search."""
    return START
