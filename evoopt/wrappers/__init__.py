"""A strategy in, a strategy out: bounds, choices, masks, subspaces, strategies in turn, schedules, averages."""

from evoopt.wrappers.adaptive_popsize import adaptive_popsize
from evoopt.wrappers.alternating import alternating
from evoopt.wrappers.augmented_lagrangian import augmented_lagrangian
from evoopt.wrappers.averaged import averaged
from evoopt.wrappers.best_so_far import best_so_far
from evoopt.wrappers.choices import choices
from evoopt.wrappers.feasibility_rules import feasibility_rules
from evoopt.wrappers.masked import masked
from evoopt.wrappers.noisy import noisy
from evoopt.wrappers.penalized_bounds import penalized_bounds
from evoopt.wrappers.portfolio import portfolio
from evoopt.wrappers.reevaluated import reevaluated
from evoopt.wrappers.reparameterized import bounded, reparameterized
from evoopt.wrappers.repeated import repeated
from evoopt.wrappers.resampled import resampled
from evoopt.wrappers.restarts import bipop, ipop
from evoopt.wrappers.rounded import rounded
from evoopt.wrappers.scheduled import scheduled
from evoopt.wrappers.smoothed import smoothed
from evoopt.wrappers.subspace import subspace
from evoopt.wrappers.surrogate import surrogate

__all__ = [
    "adaptive_popsize", "alternating", "augmented_lagrangian", "averaged", "best_so_far", "bipop", "bounded",
    "choices", "feasibility_rules", "ipop", "masked", "noisy", "penalized_bounds", "portfolio", "reevaluated",
    "reparameterized", "repeated", "resampled", "rounded", "scheduled", "smoothed", "subspace",
    "surrogate",
]  # fmt: skip
