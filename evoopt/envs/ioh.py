"""Problems of IOHexperimenter (`ioh`): BBOB, PBO, and problems that were wrapped by it.

f = ioh.problem(ioh_package.get_problem(1, 1, 10, ProblemClass.BBOB))
minimize(f, f.space(), cma_es(), evaluations=5000, target=f.optimum + 1e-8, jit=False)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evoopt.envs.foreign import Problem, middle, single


def problem(given: Any) -> Problem:
    """An `ioh` problem, with its loggers if it has some, as an objective: minus the value where it is to be maximised.

    Constraints that it has are part of its value, as ioh enforces them.
    """
    single(getattr(given.meta_data, "n_objectives", 1), given.meta_data.name)
    lower, upper = (np.array(side, float) for side in (given.bounds.lb, given.bounds.ub))
    whole = np.issubdtype(np.asarray(given.bounds.lb).dtype, np.integer)
    sign = -1.0 if given.meta_data.optimization_type.name in ("MAX", "Maximization") else 1.0
    cast = (lambda x: np.rint(x).astype(int).tolist()) if whole else (lambda x: x)
    best = float(given.optimum.y)
    return Problem(
        given.meta_data.name,
        lambda x: sign * float(given(cast(x))),
        lower,
        upper,
        middle(lower, upper),
        np.full(len(lower), bool(whole)),
        optimum=sign * best if np.isfinite(best) else None,
    )
