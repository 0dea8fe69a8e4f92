"""Gradient-free and evolutionary optimization in JAX: one ask/tell protocol for all of it."""

from evoopt.loop import Loop as Loop
from evoopt.minimize import Result as Result
from evoopt.minimize import minimize as minimize
from evoopt.population import Population as Population
from evoopt.strategy import Strategy as Strategy

__version__ = "0.1.0"
