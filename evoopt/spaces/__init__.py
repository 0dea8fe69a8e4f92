"""What is searched: trees of real and whole numbers, choices, orders and shares, some of them conditional."""

from evoopt.spaces.kinds import is_variable
from evoopt.spaces.space import Space, is_space
from evoopt.spaces.variables import boolean, categorical, conditional, integer, permutation, real, simplex
from evoopt.spaces.wrapping import Presented, entered, over

__all__ = [
    "Presented", "Space", "boolean", "categorical", "conditional", "entered", "integer", "is_space", "is_variable",
    "over", "permutation", "real", "simplex",
]  # fmt: skip
