"""Checks of a user's arguments; each raises a helpful three-part error."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Any

import numpy as np

from evoopt.types import error


def check_strategy(strategy: Any) -> None:
    """Raise a three-part error unless given a strategy; it knows names, uncalled recipes, classes and optimizers."""
    methods = ("init", "ask", "tell", "recommend")
    if not isinstance(strategy, type) and all(callable(getattr(strategy, name, None)) for name in methods):
        return
    name = getattr(strategy, "__name__", type(strategy).__name__).split(".")[-1]
    if all(callable(getattr(strategy, name, None)) for name in ("init", "update")):
        cause = "an optax optimizer: wrap it, gradient(optax.adam(1e-3))"
    elif isinstance(strategy, str):
        cause = f"a name, as on the command line: import the recipe and call it, evoopt.strategies.{strategy}()"
    elif isinstance(strategy, types.ModuleType):
        cause = f"the module of a recipe: import the recipe from evoopt.strategies and call it, {name}()"
    elif isinstance(strategy, type):
        recipe = strategy.__module__.split(".")[-1]
        cause = f"a class: a strategy is made by its recipe, such as {recipe}()"
    elif callable(strategy):
        cause = f"the recipe itself: call it, {name}()"
    else:
        cause = "arguments in another order, or an object without init, ask, tell and recommend"
    raise error("a strategy, such as cma_es()", repr(strategy)[:80], cause, TypeError)


def check_popsize(popsize: int, least: int, *, even: bool = False, name: str = "popsize") -> None:
    """Raise the three-part error for a popsize that is too small, or odd when candidates come in pairs."""
    if not isinstance(popsize, (int, np.integer)) or isinstance(popsize, bool):
        raise error(f"{name} as an int", repr(popsize), "a division with / where // was meant", TypeError)
    if popsize < least:
        raise error(f"{name} of at least {least}", str(popsize), "fewer candidates than the algorithm's equations need")
    if even and popsize % 2:
        raise error(f"an even {name}", str(popsize), "antithetic sampling asks in pairs, one at +z and one at -z")


def check_sigma(sigma: Any, name: str = "sigma") -> None:
    """Raise the three-part error for a step-size that is not a positive number; tracers and arrays pass."""
    if isinstance(sigma, (int, float, np.number)) and not 0 < sigma < float("inf"):
        raise error(f"{name} > 0, a standard deviation", str(sigma), "a wrong sign, or a range with equal ends")


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The entries of `names` closest to `name`: at most three, nearest first.

    >>> nearest("cma-es", ["cma_es", "snes", "ma_es", "lozo"])
    ['cma_es', 'ma_es', 'snes']
    """
    spelled = {one.lower().replace("-", "_"): one for one in names}
    close = difflib.get_close_matches(str(name).lower().replace("-", "_"), spelled, n=3, cutoff=0.4)
    return [spelled[one] for one in close]
