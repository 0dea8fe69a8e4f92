"""One algorithm, one file. `__all__` is the registry: command line, tests and benchmarks are generated from it."""

from evoopt.strategies.amalgam import amalgam
from evoopt.strategies.cma_es import cma_es
from evoopt.strategies.cr_fm_nes import cr_fm_nes
from evoopt.strategies.differential_evolution import differential_evolution
from evoopt.strategies.diffusion_evolution import diffusion_evolution
from evoopt.strategies.evolution_strategy import ars, eggroll, openai_es, spsa, zo_sign_sgd
from evoopt.strategies.evosax import from_evosax
from evoopt.strategies.fzoo import fzoo
from evoopt.strategies.genetic_algorithm import deep_ga
from evoopt.strategies.gesmr_ga import gesmr_ga
from evoopt.strategies.gradient import gradient
from evoopt.strategies.guided_es import guided_es
from evoopt.strategies.hill_climbing import hill_climbing
from evoopt.strategies.hizoo import hizoo
from evoopt.strategies.jade import jade
from evoopt.strategies.lm_ma_es import lm_ma_es
from evoopt.strategies.lozo import lozo, lozo_m
from evoopt.strategies.ma_es import ma_es
from evoopt.strategies.mezo import comparison_descent, mezo
from evoopt.strategies.mezo_adam import mezo_adam, mezo_momentum
from evoopt.strategies.mezo_svrg import mezo_svrg
from evoopt.strategies.one_plus_one_es import one_plus_one_es
from evoopt.strategies.one_point import one_point
from evoopt.strategies.particle_swarm import adam_swarm, fully_informed_swarm, particle_swarm
from evoopt.strategies.persistent_es import nres, pes
from evoopt.strategies.pgpe import pgpe
from evoopt.strategies.random_search import random_search
from evoopt.strategies.real_ga import real_ga
from evoopt.strategies.samr_ga import samr_ga
from evoopt.strategies.sep_cma_es import sep_cma_es
from evoopt.strategies.shade import jso, l_shade, shade
from evoopt.strategies.simulated_annealing import simulated_annealing
from evoopt.strategies.snes import snes
from evoopt.strategies.sparse_mezo import sparse_mezo
from evoopt.strategies.subzero import subzero
from evoopt.strategies.xnes import xnes
from evoopt.strategies.zo_adamm import zo_adamm
from evoopt.strategies.zo_adamu import zo_adamu
from evoopt.strategies.zo_conservative import zo_conservative

__all__ = [
    "adam_swarm",
    "amalgam",
    "ars",
    "cma_es",
    "comparison_descent",
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
    "nres",
    "one_plus_one_es",
    "one_point",
    "openai_es",
    "particle_swarm",
    "pes",
    "pgpe",
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
