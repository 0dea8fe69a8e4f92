"""Gradient-free and evolutionary optimization in JAX: one ask/tell protocol for all of it."""

from typing import TYPE_CHECKING

from evoopt.lazy import lazily

if TYPE_CHECKING:
    from evoopt import distributed, envs, spaces, strategies, wrappers
    from evoopt.automatic import auto
    from evoopt.population import Population
    from evoopt.recipes.scipy_style import scipy_minimize
    from evoopt.run.folder import Run
    from evoopt.run.minimize import minimize
    from evoopt.run.result import Result
    from evoopt.run.session import Session
    from evoopt.stopping import Stop, Stops
    from evoopt.strategy import Strategy, slope, value, value_and_grad

__version__ = "0.1.0"
__all__ = [
    "Population",
    "Result",
    "Run",
    "Session",
    "Stop",
    "Stops",
    "Strategy",
    "auto",
    "distributed",
    "envs",
    "minimize",
    "scipy_minimize",
    "slope",
    "spaces",
    "strategies",
    "value",
    "value_and_grad",
    "wrappers",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "run.minimize": ("minimize",),
        "run.result": ("Result",),
        "run.session": ("Session",),
        "run.folder": ("Run",),
        "stopping": ("Stop", "Stops"),
        "population": ("Population",),
        "recipes.scipy_style": ("scipy_minimize",),
        "strategy": ("Strategy", "value", "value_and_grad", "slope"),
        "automatic": ("auto",),
        "strategies": (),
        "wrappers": (),
        "spaces": (),
        "envs": (),
        "distributed": (),
        "noise": (),
        "recipes": (),
    },
)
