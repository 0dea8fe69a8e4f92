"""How long a run may go on."""

from __future__ import annotations

from typing import Any

from evoopt.types import error

ENDLESS = 2**31 - 1


def checked(generations: Any, evaluations: Any, seconds: Any, target: Any, asked: int) -> int:
    """The limit on generations, after checking the budget; the first generation asks for `asked` evaluations."""
    for name, budget in (("generations", generations), ("evaluations", evaluations), ("seconds", seconds)):
        if budget is not None and budget < 0:
            raise error(f"{name} of at least 0", str(budget), "a budget computed by subtraction")
    if all(budget is None for budget in (generations, evaluations, seconds, target)):
        raise error("a budget: generations, evaluations or seconds, or a target", "none", "the argument was forgotten")
    if evaluations is not None and 0 < evaluations < asked:
        raise error(
            f"at least {asked} evaluations, one generation of this strategy",
            str(evaluations),
            "a budget in generations given as evaluations",
        )
    return ENDLESS if generations is None else int(generations)
