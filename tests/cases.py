"""The case table of the contract test: one row for every strategy, and for wrapper combinations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from evoopt import noise, spaces, strategies, wrappers
from evoopt.answers import Answer, told
from evoopt.recipes.black_box_tuning import black_box_tuning
from evoopt.strategy import value
from evoopt.types import pytree


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make a strategy, and what it claims."""

    make: Callable[[], Any]
    reaches: float = 1.0  # value after 150 generations from 22.75
    rank_invariant: bool = False  # a monotone transform of the values changes no bit
    scale: str = "sigma"  # a hyperparameter that is a leaf, "" where there is none
    draws: bool = True  # its candidates depend on the key
    own_genomes: bool = True  # tell needs nothing of decode
    ties: bool = False  # values of a quadratic tie often, and rounding decides their order
    probe: Callable[[], Any] | None = None  # the strategy with one or few probes a step, and nothing that pulls besides
    still: bool = True  # the probe moves by differences only: no momentum, no snapshot
    along: str = "span"  # a step lies in the span of the probes so far, or has the "signs" of its one probe


CASES: dict[str, Case] = {
    "openai_es": Case(lambda: strategies.openai_es(16, sigma=0.1, learning_rate=0.1), rank_invariant=True),
    "openai_es regenerated": Case(
        lambda: strategies.openai_es(16, sigma=0.1, learning_rate=0.1, regenerate=True), rank_invariant=True
    ),
    "openai_es rademacher": Case(
        lambda: strategies.openai_es(16, sigma=0.1, learning_rate=0.1, noise=noise.rademacher),
        rank_invariant=True,
        ties=True,
    ),
    "openai_es orthogonal": Case(
        lambda: strategies.openai_es(16, sigma=0.1, learning_rate=0.1, noise=noise.Orthogonal(noise.gaussian, 8)),
        rank_invariant=True,
    ),
    "ars": Case(lambda: strategies.ars(16, top=4, learning_rate=0.1), scale="learning_rate"),
    "spsa": Case(
        lambda: strategies.spsa(8, sigma=0.01, learning_rate=0.05), probe=lambda: strategies.spsa(learning_rate=0.1)
    ),
    "pgpe": Case(lambda: strategies.pgpe(16, learning_rate=0.1), rank_invariant=True, scale="learning_rate"),
    "pgpe regenerated": Case(
        lambda: strategies.pgpe(16, learning_rate=0.1, regenerate=True), rank_invariant=True, scale="learning_rate"
    ),
    "snes": Case(lambda: strategies.snes(16), 1e-3, rank_invariant=True, scale="learning_rate"),
    "guided_es": Case(lambda: strategies.guided_es(16, learning_rate=0.1)),
    "pes": Case(
        lambda: strategies.pes(16, learning_rate=0.1),
        probe=lambda: strategies.pes(2, learning_rate=0.1, optimizer=optax.identity()),
    ),
    "nres": Case(
        lambda: strategies.nres(16, learning_rate=0.1),
        probe=lambda: strategies.nres(2, learning_rate=0.1, optimizer=optax.identity()),
    ),
    "deep_ga": Case(lambda: strategies.deep_ga(16, sigma=0.2, chain=4), rank_invariant=True),
    "gradient": Case(lambda: strategies.gradient(optax.adam(0.1)), scale=""),
    "bounded snes": Case(
        lambda: wrappers.bounded(strategies.snes(16), -4.0, 4.0), 1e-3, True, scale="", own_genomes=False
    ),
    "smoothed snes": Case(
        lambda: wrappers.smoothed(strategies.snes(16), -4.0, 4.0), 1e-3, True, scale="", own_genomes=False
    ),
    "penalized_bounds cma_es": Case(
        lambda: wrappers.penalized_bounds(strategies.cma_es(16), -4.0, 4.0), 1e-3, scale="", own_genomes=False
    ),
    "resampled cma_es": Case(
        lambda: wrappers.resampled(strategies.cma_es(16), -4.0, 4.0), 1e-3, True, scale="", own_genomes=False
    ),
    "bounded gradient": Case(
        lambda: wrappers.bounded(strategies.gradient(optax.adam(0.1)), -4.0, 4.0), scale="", own_genomes=False
    ),
    "masked openai_es": Case(
        lambda: wrappers.masked(strategies.openai_es(16, sigma=0.1, learning_rate=0.1), {"w": True, "b": False}),
        2.5,
        True,
        scale="",
        own_genomes=False,
    ),
    "averaged scheduled mezo": Case(
        lambda: wrappers.averaged(
            wrappers.scheduled(
                strategies.mezo(8, learning_rate=0.1), learning_rate=optax.cosine_decay_schedule(0.1, 200)
            ),
            20,
        ),
        scale="",
        own_genomes=False,
    ),
    "rounded mezo": Case(lambda: wrappers.rounded(strategies.mezo(8, learning_rate=0.1)), scale="", own_genomes=False),
    "best_so_far bounded masked pgpe": Case(
        lambda: wrappers.best_so_far(
            wrappers.masked(
                wrappers.bounded(strategies.pgpe(16, learning_rate=0.1), -4.0, 4.0), {"w": True, "b": False}
            )
        ),
        2.5,
        True,
        scale="",
        own_genomes=False,
    ),
}


@pytree
class Held:
    """A strategy that reads violations, told values alone: of a constraint that holds where w[0, 1] >= 0 and b <= 1."""

    strategy: Any
    oracle = staticmethod(value)

    def init(self, params: Any, key: Any) -> Any:
        return self.strategy.init(params, key)

    def ask(self, state: Any, key: Any) -> Any:
        return self.strategy.ask(state, key)

    def tell(self, state: Any, population: Any, answers: Any) -> Any:
        violation = lambda params: jnp.stack([-params["w"][0, 1], params["b"] - 1])
        violations = jax.vmap(violation)(population.decoded())
        return self.strategy.tell(state, population, Answer(told(population, answers), violations))

    def recommend(self, state: Any) -> Any:
        return self.strategy.recommend(state)


CASES |= {
    "augmented_lagrangian cma_es": Case(
        lambda: Held(wrappers.augmented_lagrangian(strategies.cma_es(16), 2)), 2.0, scale="", own_genomes=False
    ),
    "feasibility_rules differential_evolution": Case(
        lambda: Held(wrappers.feasibility_rules(strategies.differential_evolution(32), 2)),
        5.0,
        scale="",
        own_genomes=False,
    ),
}


def blocks(params: Any) -> Any:
    """The parameters as two blocks of four numbers, one of them idle."""
    return jnp.concatenate([params["b"][None], params["w"].reshape(-1), jnp.zeros(1)]).reshape(2, 4)


def whole(blocks: Any) -> Any:
    return {"b": blocks[0, 0], "w": blocks.reshape(-1)[1:7].reshape(3, 2)}


def row(
    recipe: str, *arguments: Any, reaches: float = 1.0, rank: bool = False, scale: str = "", **options: Any
) -> Case:
    """A case of a recipe whose state is its own."""
    make = lambda: getattr(strategies, recipe)(*arguments, **options)
    return Case(make, reaches, rank, scale, own_genomes=False)


def probing(case: Case, recipe: str, *arguments: Any, along: str = "span", still: bool = True, **options: Any) -> Case:
    """The case with what probes it, for the rule that the direction updated is the direction probed."""
    make = lambda: getattr(strategies, recipe)(*arguments, **options)
    return dataclasses.replace(case, probe=make, along=along, still=still)


def still(case: Case) -> Case:
    """The case of a strategy that draws nothing."""
    return dataclasses.replace(case, draws=False)


CASES |= {
    "amalgam": row("amalgam", 16, reaches=3.0),
    "cma_es": row("cma_es", 16, reaches=1e-3, rank=True),
    "sep_cma_es": row("sep_cma_es", 16, reaches=1e-3, rank=True),
    "ma_es": row("ma_es", 16, reaches=1e-3, rank=True),
    "lm_ma_es": row("lm_ma_es", 16, reaches=1e-3, rank=True),
    "cr_fm_nes": row("cr_fm_nes", 16, reaches=1e-3),
    "xnes": row("xnes", 16, reaches=1e-2, rank=True),
    "one_plus_one_es": row("one_plus_one_es"),
    "bipop cma_es": Case(lambda: wrappers.bipop(strategies.cma_es(16)), 1e-2, scale="", own_genomes=False),
    "surrogate cma_es": Case(lambda: wrappers.surrogate(strategies.cma_es(16)), 1e-3, scale="", own_genomes=False),
    "repeated mezo": Case(
        lambda: wrappers.repeated(strategies.mezo(8, learning_rate=0.1), 2), scale="", own_genomes=False
    ),
    "reevaluated cma_es": Case(
        lambda: wrappers.reevaluated(strategies.cma_es(16), 2), 1e-2, True, scale="", own_genomes=False
    ),
    "noisy snes": Case(lambda: wrappers.noisy(strategies.snes(16)), 2.0, scale="", own_genomes=False),
    "adaptive_popsize ipop cma_es": Case(
        lambda: wrappers.adaptive_popsize(wrappers.ipop(strategies.cma_es(32), 16)), 1e-2, scale="", own_genomes=False
    ),
    "noisy cma_es": Case(lambda: wrappers.noisy(strategies.cma_es(48)), 1e-2, scale="", own_genomes=False),
    "portfolio hill_climbing ipop cma_es": Case(
        lambda: wrappers.portfolio((strategies.hill_climbing(4), 40), wrappers.ipop(strategies.cma_es(16))),
        1e-2,
        scale="",
        own_genomes=False,
    ),
    "ipop cma_es": Case(lambda: wrappers.ipop(strategies.cma_es(16)), 1e-2, scale="", own_genomes=False),
    "differential_evolution": row("differential_evolution", 32, reaches=2.0, scale="weight"),
    "jade": row("jade", 32, reaches=2.0),
    "shade": row("shade", 32, reaches=2.0),
    "l_shade": row("l_shade", 32, budget=3200, reaches=2.0),
    "jso": row("jso", 32, budget=3200, reaches=2.0),
    "diffusion_evolution": row("diffusion_evolution", 128, steps=150, reaches=15.0),
    "real_ga": row("real_ga", 32, reaches=2.0),
    "samr_ga": row("samr_ga", 32),
    "gesmr_ga": row("gesmr_ga", 32, reaches=3.0),
    "particle_swarm": row("particle_swarm", 32),
    "fully_informed_swarm": row("fully_informed_swarm", 32),
    "adam_swarm": row("adam_swarm", 32, reaches=2.0),
    "random_search": row("random_search", 32, spread=2.0, reaches=15.0),
    "bayesian_optimization": row("bayesian_optimization", 4, memory=24, reaches=15.0),
    "coordinate_search": still(row("coordinate_search", reaches=1e-2)),
    "quasi_newton": still(row("quasi_newton", reaches=1e-4)),
    "nelder_mead": still(row("nelder_mead", reaches=1.0)),
    "hill_climbing": row("hill_climbing", 16, reaches=2.0),
    "simulated_annealing": row("simulated_annealing", 16, reaches=5.0),
}


def in_space(strategy: Any, variable: Any) -> Any:
    """`strategy` over a space whose u is the parameters, but for `b`, which is `variable`."""
    return spaces.over(strategy, {"w": spaces.real(scale=1.0, shape=(3, 2)), "b": variable})


CASES |= {
    "over cma_es": Case(
        lambda: in_space(strategies.cma_es(16), spaces.categorical([0.3, -0.7])),
        1e-3,
        True,
        scale="",
        own_genomes=False,
    ),
    "over differential_evolution": Case(
        lambda: in_space(strategies.differential_evolution(32), spaces.categorical([0.3, -0.7])),
        2.0,
        scale="",
        own_genomes=False,
    ),
    "over openai_es": Case(
        lambda: in_space(strategies.openai_es(16, sigma=0.1, learning_rate=0.1), spaces.real(-4.0, 4.0, scale=1.0)),
        rank_invariant=True,
        scale="",
        own_genomes=False,
    ),
}

CASES["alternating subspace as in black_box_tuning"] = Case(
    lambda: wrappers.reparameterized(black_box_tuning(8, dimension=6), whole, blocks),
    scale="",
    own_genomes=False,
)

STEP = "learning_rate"
CASES |= {
    "mezo": probing(row("mezo", learning_rate=0.05, scale=STEP), "mezo", sigma=0.1, learning_rate=0.1),
    "mezo one-sided rademacher": probing(
        row("mezo", 17, learning_rate=0.1, two_sided=False, noise=noise.rademacher, reaches=1e-3, scale=STEP),
        "mezo",
        2,
        sigma=0.1,
        learning_rate=0.1,
        two_sided=False,
        noise=noise.rademacher,
    ),
    "mezo 8 probes": row("mezo", 16, learning_rate=0.2, weight_decay=0.01, scale=STEP),
    "comparison_descent": probing(
        row("comparison_descent", 8, learning_rate=0.05, rank=True, scale=STEP),
        "comparison_descent",
        learning_rate=0.1,
    ),
    "one_point": probing(
        row("one_point", sigma=0.1, learning_rate=0.005, reaches=22.0, scale=STEP),
        "one_point",
        learning_rate=0.1,
        still=False,
    ),
    "mezo_momentum": probing(
        row("mezo_momentum", learning_rate=0.05, window=24, scale=STEP),
        "mezo_momentum",
        learning_rate=0.1,
        window=2,
        still=False,
    ),
    "mezo_adam": probing(
        row("mezo_adam", 4, learning_rate=0.1, window=8, scale=STEP), "mezo_adam", window=1, along="signs"
    ),
    "zo_adamu": probing(row("zo_adamu", 150, learning_rate=0.03, scale=STEP), "zo_adamu", 2, along="signs"),
    "zo_sign_sgd": probing(
        row("zo_sign_sgd", 8, learning_rate=0.1, scale=STEP), "zo_sign_sgd", learning_rate=0.1, along="signs"
    ),
    "eggroll": probing(
        row("eggroll", 16, sigma=0.1, learning_rate=0.05, scale=STEP),
        "eggroll",
        2,
        sigma=0.1,
        learning_rate=0.1,
    ),
    "hizoo": probing(row("hizoo", learning_rate=0.05, smoothing=1e-2, scale=STEP), "hizoo", learning_rate=0.1),
    "fzoo": probing(row("fzoo", learning_rate=0.1, scale=STEP), "fzoo", 3, learning_rate=0.1),
    "sparse_mezo": probing(
        row("sparse_mezo", learning_rate=0.1, sparsity=0.5, reaches=22.0, scale=STEP),
        "sparse_mezo",
        learning_rate=0.1,
    ),
    "lozo": probing(
        row("lozo", learning_rate=0.05, interval=3, scale=STEP),
        "lozo",
        learning_rate=0.1,
        rank=1,
        interval=2,
    ),
    "lozo_m": row("lozo_m", learning_rate=0.03, interval=20, momentum=0.5, scale=STEP),
    "subzero": probing(
        row("subzero", learning_rate=0.05, interval=3, scale=STEP),
        "subzero",
        learning_rate=0.1,
        rank=1,
        interval=2,
    ),
    "zo_adamm": probing(
        row("zo_adamm", 5, learning_rate=0.1, scale=STEP),
        "zo_adamm",
        2,
        learning_rate=0.1,
        b1=0.0,
        along="signs",
    ),
    "zo_conservative": probing(
        row("zo_conservative", learning_rate=0.1, scale=STEP), "zo_conservative", learning_rate=0.1
    ),
    "mezo_svrg": probing(
        row("mezo_svrg", learning_rate=0.03, snapshot_rate=0.03, batches=2, interval=3, scale=STEP),
        "mezo_svrg",
        learning_rate=0.1,
        snapshot_rate=0.1,
        batches=1,
        still=False,
    ),
}

# evosax's own defaults: with plain SGD at 1e-3 some hardly move, which is not ours to mend.
EVOSAX = strategies.from_evosax
POPSIZES = {"LM_MA_ES": 8}  # evosax's is NaN for a popsize above 2 d
REACHES = {"SV_Open_ES": 40.0, "iAMaLGaM_Univariate": 40.0}  # these do not get below the start


def _evosax_names() -> list[str]:
    try:
        from evosax.algorithms import algorithms
    except ImportError:
        return []
    return list(algorithms)


CASES |= {
    f"from_evosax {name}": Case(
        functools.partial(EVOSAX, name, POPSIZES.get(name, 16)),
        REACHES.get(name, 22.6),
        scale="",
        own_genomes=False,
    )
    for name in _evosax_names()
}
