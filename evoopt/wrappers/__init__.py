<<<<<<< HEAD
"""A strategy in, a strategy out: bounds, masks, the best so far, schedules, averages, random rounding."""

from evoopt.wrappers.averaged import averaged
=======
"""A strategy in, a strategy out: bounds, masks, subspaces, blocks in turn, the best so far."""

from evoopt.wrappers.alternating import alternating
>>>>>>> models
from evoopt.wrappers.best_so_far import best_so_far
from evoopt.wrappers.masked import masked
from evoopt.wrappers.reparameterized import bounded, reparameterized
from evoopt.wrappers.restarts import bipop, ipop
<<<<<<< HEAD
from evoopt.wrappers.rounded import rounded
from evoopt.wrappers.scheduled import scheduled

__all__ = [
    "averaged", "best_so_far", "bipop", "bounded", "ipop", "masked", "reparameterized", "rounded", "scheduled",
]  # fmt: skip
=======
from evoopt.wrappers.subspace import subspace

__all__ = ["alternating", "best_so_far", "bipop", "bounded", "ipop", "masked", "reparameterized", "subspace"]
>>>>>>> models
