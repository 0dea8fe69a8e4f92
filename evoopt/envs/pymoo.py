"""Problems of pymoo with one objective, their bounds, whole numbers and choices, and their constraints.

f = pymoo.problem(get_problem("g1"))
minimize(f, f.space(), feasibility_rules(differential_evolution()), evaluations=10_000, jit=False)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from evoopt import spaces
from evoopt.answers import Answer
from evoopt.envs.foreign import Problem, middle, single
from evoopt.types import error


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
    """A pymoo problem with named variables of several kinds: its space is a dict, and so are its candidates."""

    given: Any

    def __call__(self, candidate: dict[str, Any]) -> Any:
        x = {name: v.item() if isinstance(v, (np.ndarray, np.generic)) else v for name, v in candidate.items()}
        return _answer(self.given, np.array([x], object))

    def space(self) -> dict[str, Any]:
        """A dict of `evoopt.spaces` variables."""
        return {str(name): _variable(name, variable) for name, variable in self.given.vars.items()}


def problem(given: Any) -> Problem | Mixed:
    """A pymoo problem as an objective. `pymoo.core.problem.Problem(vars=...)` gives one over a dict.

    Violations are pymoo's G, which hold up to 0, then its H, which hold at 0.
    """
    single(given.n_obj, type(given).__name__)
    if getattr(given, "vars", None) is not None:
        return Mixed(given)
    if given.xl is None or given.xu is None:
        lower, upper = np.full(given.n_var, -np.inf), np.full(given.n_var, np.inf)
    else:
        lower, upper = (np.broadcast_to(np.array(x, float), given.n_var) for x in (given.xl, given.xu))
    whole = given.vtype in (int, bool) or (isinstance(given.vtype, type) and issubclass(given.vtype, np.integer))
    constrained = given.n_ieq_constr + given.n_eq_constr > 0
    # One evaluation gives both: the last one is kept, so that pymoo is asked once.
    last: list[Any] = [None, None]

    def asked(x: np.ndarray) -> Any:
        if last[0] is None or not np.array_equal(last[0], x):
            last[:] = x, _answer(given, np.rint(x).astype(int)[None] if whole else x[None])
        return last[1]

    return Problem(
        type(given).__name__,
        lambda x: asked(x).value if constrained else asked(x),
        lower,
        upper,
        middle(lower, upper),
        np.full(given.n_var, whole),
        (lambda x: asked(x).violation) if constrained else None,
        given.n_eq_constr,
    )


def _answer(given: Any, x: np.ndarray) -> Any:
    out = given.evaluate(x, return_as_dictionary=True)
    value = float(np.ravel(out["F"])[0])
    parts = [np.ravel(np.asarray(out[name], float)) for name in ("G", "H") if out.get(name) is not None]
    violation = np.concatenate(parts) if parts else np.zeros(0)
    return Answer(value, violation) if len(violation) else value


def _variable(name: Any, variable: Any) -> Any:
    kind = type(variable).__name__
    if kind == "Binary":
        return spaces.boolean()
    if kind == "Choice":
        return spaces.categorical(list(variable.options))
    if kind in ("Real", "Integer"):
        low, high = variable.bounds
        return spaces.real(float(low), float(high)) if kind == "Real" else spaces.integer(int(low), int(high))
    raise error("variables of pymoo's kinds Real, Integer, Choice, Binary", f"{kind} '{name}'", "a kind of your own")
