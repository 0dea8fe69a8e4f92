"""A strategy in, a strategy out: bounds, masks, the best so far."""

from evoopt.wrappers.best_so_far import best_so_far
from evoopt.wrappers.masked import masked
from evoopt.wrappers.reparameterized import bounded, reparameterized
from evoopt.wrappers.restarts import bipop, ipop

__all__ = ["best_so_far", "bipop", "bounded", "ipop", "masked", "reparameterized"]
