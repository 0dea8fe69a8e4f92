"""Problems of COCO (`cocoex`): bbob, bbob-boxed, bbob-constrained, bbob-mixint, bbob-largescale, bbob-noisy.

suite = cocoex.Suite("bbob-mixint", "", "dimensions:5")
f = coco.problem(suite[0])
minimize(f, f.space(), cma_es(), evaluations=5000, jit=False)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evoopt.envs.foreign import Problem, single


def problem(given: Any) -> Problem:
    """A `cocoex` problem, observed or not, as an objective. Keep `given`, its suite or its observer alive meanwhile.

    Its whole numbers come first. COCO counts evaluations of values and of constraints by itself, each candidate once.
    """
    single(given.number_of_objectives, given.id)
    lower, upper = (np.array(side, float) for side in (given.lower_bounds, given.upper_bounds))
    constrained = given.number_of_constraints > 0
    return Problem(
        given.id,
        lambda x: float(given(x)),
        lower,
        upper,
        np.array(given.initial_solution, float),
        np.arange(given.dimension) < given.number_of_integer_variables,
        (lambda x: np.asarray(given.constraint(x), float)) if constrained else None,
    )
