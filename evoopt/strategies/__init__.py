"""One algorithm, one file. `__all__` is the registry: docs, command line, tests and benchmarks are generated from it."""

from evoopt.strategies.evolution_strategy import ars, openai_es, spsa
from evoopt.strategies.genetic_algorithm import deep_ga
from evoopt.strategies.gradient import gradient
from evoopt.strategies.guided_es import guided_es
from evoopt.strategies.pgpe import pgpe
from evoopt.strategies.snes import snes

__all__ = ["ars", "deep_ga", "gradient", "guided_es", "openai_es", "pgpe", "snes", "spsa"]
