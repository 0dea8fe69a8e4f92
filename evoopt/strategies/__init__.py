"""One algorithm, one file, in the folder of its family. `__all__` is the registry of all there are.

Command line, tests, tables and benchmarks are generated from it. A strategy is imported when it is first used.
"""

from typing import TYPE_CHECKING

from evoopt.lazy import lazily

if TYPE_CHECKING:
    from evoopt.strategies.adapters.evosax import from_evosax
    from evoopt.strategies.covariance.amalgam import amalgam
    from evoopt.strategies.covariance.cma_es import cma_es
    from evoopt.strategies.covariance.cr_fm_nes import cr_fm_nes
    from evoopt.strategies.covariance.lm_ma_es import lm_ma_es
    from evoopt.strategies.covariance.ma_es import ma_es
    from evoopt.strategies.covariance.one_plus_one_es import one_plus_one_es
    from evoopt.strategies.covariance.sep_cma_es import sep_cma_es
    from evoopt.strategies.covariance.xnes import xnes
    from evoopt.strategies.first_order.gradient import gradient
    from evoopt.strategies.gaussian.evolution_strategy import ars, eggroll, openai_es, spsa, zo_sign_sgd
    from evoopt.strategies.gaussian.guided_es import guided_es
    from evoopt.strategies.gaussian.persistent_es import nres, pes
    from evoopt.strategies.gaussian.pgpe import pgpe
    from evoopt.strategies.gaussian.snes import snes
    from evoopt.strategies.local.bayesian_optimization import bayesian_optimization
    from evoopt.strategies.local.coordinate_search import coordinate_search
    from evoopt.strategies.local.hill_climbing import hill_climbing
    from evoopt.strategies.local.nelder_mead import nelder_mead
    from evoopt.strategies.local.quasi_newton import quasi_newton
    from evoopt.strategies.local.simulated_annealing import simulated_annealing
    from evoopt.strategies.populations.differential_evolution import differential_evolution
    from evoopt.strategies.populations.diffusion_evolution import diffusion_evolution
    from evoopt.strategies.populations.genetic_algorithm import deep_ga
    from evoopt.strategies.populations.gesmr_ga import gesmr_ga
    from evoopt.strategies.populations.jade import jade
    from evoopt.strategies.populations.particle_swarm import adam_swarm, fully_informed_swarm, particle_swarm
    from evoopt.strategies.populations.random_search import random_search
    from evoopt.strategies.populations.real_ga import real_ga
    from evoopt.strategies.populations.samr_ga import samr_ga
    from evoopt.strategies.populations.shade import jso, l_shade, shade
    from evoopt.strategies.zeroth_order.fzoo import fzoo
    from evoopt.strategies.zeroth_order.hizoo import hizoo
    from evoopt.strategies.zeroth_order.lozo import lozo, lozo_m
    from evoopt.strategies.zeroth_order.mezo import comparison_descent, mezo
    from evoopt.strategies.zeroth_order.mezo_adam import mezo_adam, mezo_momentum
    from evoopt.strategies.zeroth_order.mezo_svrg import mezo_svrg
    from evoopt.strategies.zeroth_order.one_point import one_point
    from evoopt.strategies.zeroth_order.sparse_mezo import sparse_mezo
    from evoopt.strategies.zeroth_order.subzero import subzero
    from evoopt.strategies.zeroth_order.zo_adamm import zo_adamm
    from evoopt.strategies.zeroth_order.zo_adamu import zo_adamu
    from evoopt.strategies.zeroth_order.zo_conservative import zo_conservative

__all__ = [
    "adam_swarm",
    "amalgam",
    "ars",
    "bayesian_optimization",
    "cma_es",
    "comparison_descent",
    "coordinate_search",
    "cr_fm_nes",
    "deep_ga",
    "differential_evolution",
    "diffusion_evolution",
    "eggroll",
    "from_evosax",
    "fully_informed_swarm",
    "fzoo",
    "gesmr_ga",
    "gradient",
    "guided_es",
    "hill_climbing",
    "hizoo",
    "jade",
    "jso",
    "l_shade",
    "lm_ma_es",
    "lozo",
    "lozo_m",
    "ma_es",
    "mezo",
    "mezo_adam",
    "mezo_momentum",
    "mezo_svrg",
    "nelder_mead",
    "nres",
    "one_plus_one_es",
    "one_point",
    "openai_es",
    "particle_swarm",
    "pes",
    "pgpe",
    "quasi_newton",
    "random_search",
    "real_ga",
    "samr_ga",
    "sep_cma_es",
    "shade",
    "simulated_annealing",
    "snes",
    "sparse_mezo",
    "spsa",
    "subzero",
    "xnes",
    "zo_adamm",
    "zo_adamu",
    "zo_conservative",
    "zo_sign_sgd",
]

__getattr__, __dir__ = lazily(
    __name__,
    {  # of each family, which module has which recipes
        "gaussian.evolution_strategy": ("ars", "eggroll", "openai_es", "spsa", "zo_sign_sgd"),
        "gaussian.guided_es": ("guided_es",),
        "gaussian.persistent_es": ("nres", "pes"),
        "gaussian.pgpe": ("pgpe",),
        "gaussian.snes": ("snes",),
        "covariance.amalgam": ("amalgam",),
        "covariance.cma_es": ("cma_es",),
        "covariance.cr_fm_nes": ("cr_fm_nes",),
        "covariance.lm_ma_es": ("lm_ma_es",),
        "covariance.ma_es": ("ma_es",),
        "covariance.one_plus_one_es": ("one_plus_one_es",),
        "covariance.sep_cma_es": ("sep_cma_es",),
        "covariance.xnes": ("xnes",),
        "populations.differential_evolution": ("differential_evolution",),
        "populations.diffusion_evolution": ("diffusion_evolution",),
        "populations.genetic_algorithm": ("deep_ga",),
        "populations.gesmr_ga": ("gesmr_ga",),
        "populations.jade": ("jade",),
        "populations.particle_swarm": ("adam_swarm", "fully_informed_swarm", "particle_swarm"),
        "populations.random_search": ("random_search",),
        "populations.real_ga": ("real_ga",),
        "populations.samr_ga": ("samr_ga",),
        "populations.shade": ("jso", "l_shade", "shade"),
        "zeroth_order.fzoo": ("fzoo",),
        "zeroth_order.hizoo": ("hizoo",),
        "zeroth_order.lozo": ("lozo", "lozo_m"),
        "zeroth_order.mezo": ("comparison_descent", "mezo"),
        "zeroth_order.mezo_adam": ("mezo_adam", "mezo_momentum"),
        "zeroth_order.mezo_svrg": ("mezo_svrg",),
        "zeroth_order.one_point": ("one_point",),
        "zeroth_order.sparse_mezo": ("sparse_mezo",),
        "zeroth_order.subzero": ("subzero",),
        "zeroth_order.zo_adamm": ("zo_adamm",),
        "zeroth_order.zo_adamu": ("zo_adamu",),
        "zeroth_order.zo_conservative": ("zo_conservative",),
        "local.bayesian_optimization": ("bayesian_optimization",),
        "local.hill_climbing": ("hill_climbing",),
        "local.coordinate_search": ("coordinate_search",),
        "local.quasi_newton": ("quasi_newton",),
        "local.nelder_mead": ("nelder_mead",),
        "local.simulated_annealing": ("simulated_annealing",),
        "first_order.gradient": ("gradient",),
        "adapters.evosax": ("from_evosax",),
    },
)
