"""A strategy in, a strategy out: bounds, masks, subspaces, blocks in turn, the best so far."""

from evoopt.wrappers.alternating import alternating
from evoopt.wrappers.best_so_far import best_so_far
from evoopt.wrappers.masked import masked
from evoopt.wrappers.reparameterized import bounded, reparameterized
from evoopt.wrappers.restarts import bipop, ipop
from evoopt.wrappers.subspace import subspace

__all__ = ["alternating", "best_so_far", "bipop", "bounded", "ipop", "masked", "reparameterized", "subspace"]
