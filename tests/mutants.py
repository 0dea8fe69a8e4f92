"""Break the sources a line at a time and see a test turn red: `python tests/mutants.py [--only WORD ...]`.

Each mutant is applied in a copy of the tree and the tests of its subject are run. Half of them are mistakes that were
thought of (`NAMED`), half are drawn by a seeded operator from strategies, wrappers and scheduler (`drawn`). A mutant
that no test notices is printed with its line; the exit status is 1 unless it is listed in `EQUIVALENT` with the reason.

It takes some seconds of compiling for each mutant, an hour in all, so it is no part of the default suite.
"""

from __future__ import annotations

import argparse
import ast
import collections
import hashlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DRAWN = {  # mutants of the seeded operator
    "strategies/*/*.py": 30, "wrappers/*.py": 24,
    "distributed/scheduler.py": 4, "distributed/jobs.py": 4, "distributed/pace.py": 3, "distributed/crew.py": 2,
}  # fmt: skip
A_FILE = 2  # of them, at most so many in one file; of a single file all
TIMEOUT = 900  # seconds for the tests of one mutant; one that does not end counts as noticed
SEED = "1"


class Mutant(NamedTuple):
    """`old` stands once in the file and becomes `new`."""

    file: str  # below evoopt/
    old: str
    new: str
    name: str = ""

    @property
    def line(self) -> int:
        """Where it is; an error where `old` is not there, or not once."""
        text = (ROOT / "evoopt" / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"evoopt/{self.file}: {self.name or 'a mutant'} needs once, not {count} times: {self.old}")
        return text[: text.index(self.old)].count("\n") + 1

    def __str__(self) -> str:
        return f"evoopt/{self.file}:{self.line}: {self.name}\n  - {self.old.strip()}\n  + {self.new.strip()}"


NAMED = [
    Mutant(
        "strategies/covariance/recombination.py",
        "place = rank(values)",
        "place = jnp.where(rank(values) < 2, 1 - rank(values), rank(values))",
        "weights of the two best swapped",
    ),
    Mutant(
        "strategies/covariance/cma_es.py",
        "kept * state.covariance + c_1 * jnp.outer(path_c, path_c)",
        "kept * state.covariance",
        "no rank-one update",
    ),
    Mutant("strategies/covariance/cma_es.py", "< 2 + 4 / (d + 1)", "< 4 + 4 / (d + 1)", "h_sigma's border"),
    Mutant(
        "strategies/covariance/cma_es.py",
        "1 / (10 * d * (c_1 + c_mu))",
        "1 / (5 * d * (c_1 + c_mu))",
        "the lag doubled",
    ),
    Mutant(
        "strategies/populations/shade.py",
        "cursor = jnp.where(learned, (state.cursor + 1) % self.memory, state.cursor)",
        "cursor = (state.cursor + 1) % self.memory",
        "the memory's cursor moves without a success",
    ),
    Mutant(
        "strategies/populations/shade.py",
        "told_state._replace(count=jnp.minimum(count, shrunk))",
        "told_state",
        "the archive does not shrink",
    ),
    Mutant("strategies/populations/shade.py", "jnp.round(0.11 * size)", "jnp.round(0.2 * size)", "p of L-SHADE"),
    Mutant(
        "strategies/populations/shade.py", "0.25 * (1 - 0.5 * progress) * size", "0.25 * size", "p of jSO does not fall"
    ),
    Mutant(
        "strategies/populations/variation.py",
        " | (jnp.arange(d, dtype=jnp.int32) == sure)",
        "",
        "no coordinate is sure to cross over",
    ),
    Mutant(
        "strategies/populations/particle_swarm.py",
        "chi * (state.velocity + pull)",
        "chi * (state.velocity - pull)",
        "pull's sign",
    ),
    Mutant(
        "strategies/gaussian/snes.py",
        "state.mean, state.sigma, grad_mean,",
        "state.mean, jax.tree.map(lambda s, g: s * jnp.exp(rate / 2 * g), state.sigma, grad_sigma), grad_mean,",
        "sigma before the mean",
    ),
    Mutant(
        "strategies/gaussian/pgpe.py",
        "jnp.clip(-self.sigma_learning_rate * q",
        "jnp.clip(self.sigma_learning_rate * q",
        "sigma's sign",
    ),
    Mutant(
        "strategies/gaussian/evolution_strategy.py",
        "lambda m, u: m - jnp.asarray(self.learning_rate * u",
        "lambda m, u: m + jnp.asarray(self.learning_rate * u",
        "the step's sign",
    ),
    Mutant(
        "shaping.py",
        "rank / jnp.maximum(m - 1, 1) - 0.5, 0)",
        "0.5 - rank / jnp.maximum(m - 1, 1), 0)",
        "centered ranks reversed",
    ),
    Mutant(
        "strategies/populations/genetic_algorithm.py",
        "rank_class))[: self.parents]",
        "rank_class))[1 : self.parents + 1]",
        "truncation leaves out the best",
    ),
    Mutant(
        "strategies/populations/genetic_algorithm.py",
        "(parents.length >= self.chain)",
        "(parents.length > self.chain)",
        "parents are materialised one generation late",
    ),
    Mutant(
        "strategies/populations/diffusion_evolution.py",
        "gj - squares / (2 * (1 - alpha))",
        "gj - squares / (1 - alpha)",
        "weights of the origins",
    ),
    Mutant(
        "strategies/zeroth_order/probes.py",
        "lambda pulled: shrink if pulled else 0.0",
        "lambda pulled: shrink",
        "biases decay",
    ),
    Mutant(
        "strategies/zeroth_order/probes.py",
        "[not vector for vector in noises.are_vectors(params)]",
        "[x.ndim > 1 for x in jax.tree.leaves(params)]",
        "stacked biases and scales decay",
    ),
    Mutant("strategies/zeroth_order/zo_adamu.py", "- t1, 0, t2 - t1)", "- t1, 0, t3 - t1)", "frozen at T3"),
    Mutant(
        "strategies/zeroth_order/zo_adamu.py",
        "(steps / 6, 2 * steps / 3",
        "(steps / 3, 2 * steps / 3",
        "the first border",
    ),
    Mutant(
        "strategies/zeroth_order/lozo.py",
        "basis = trees.where(state.steps % self.interval == 0",
        "basis = trees.where((state.steps + 1) % self.interval == 0",
        "V is drawn a step early",
    ),
    Mutant(
        "strategies/zeroth_order/lozo.py",
        "turned = jnp.where(new_basis, old @ (before.T @ v) / v.shape[0], old)",
        "turned = old",
        "the momentum is not turned",
    ),
    Mutant(
        "strategies/zeroth_order/fzoo.py",
        "jnp.sqrt((spread**2).sum() / m)",
        "jnp.sqrt((spread**2).sum() / (m - 1))",
        "the unbiased deviation",
    ),
    Mutant("noise/low_rank.py", "self.rank**-0.5, z.dtype)", "self.rank**-1.0, z.dtype)", "low rank scaled by 1 / r"),
    Mutant(
        "strategies/gaussian/guided_es.py",
        "1 / (self.sigma**2 * count(used))",
        "1 / (self.sigma * count(used))",
        "sigma squared",
    ),
    Mutant(
        "strategies/gaussian/persistent_es.py",
        "jnp.where(ended[:, None], 0, total)",
        "total",
        "sums are not reset at the end",
    ),
    Mutant(
        "strategies/zeroth_order/hizoo.py",
        "jnp.abs(plus + minus - 2 * center)",
        "(plus + minus - 2 * center)",
        "signed curvature",
    ),
    Mutant(
        "strategies/zeroth_order/subzero.py",
        "jnp.linalg.qr(z[: m * rank].reshape(m, rank))[0]",
        "(z[: m * rank].reshape(m, rank) / math.sqrt(m))",
        "U is not orthonormal",
    ),
    Mutant(
        "strategies/zeroth_order/mezo_adam.py",
        "jnp.minimum(steps, self.window).astype(dtype)",
        "steps.astype(dtype)",
        "bias correction by all steps",
    ),
    Mutant("spaces/whole.py", "jnp.maximum(scale, least /", "jnp.maximum(1, least /", "a floor that forgets"),
    Mutant("spaces/whole.py", "weights[:, None] * (centers - v)", "weights[:, None] * (v - centers)", "off the center"),
    Mutant("spaces/mixed.py", "state.scale * (new.mean - old)", "(new.mean - old)", "M moves without A"),
    Mutant("spaces/categories.py", "given[:, None], q, state.q", "given[:, None], state.q, q", "who begins evenly"),
    Mutant("spaces/categories.py", "q = q + step / norm * gradient", "q = q + step * gradient", "the step of ASNG"),
    Mutant(
        "spaces/categories.py", "(weights[:, None, None] * (drawn - q))", "(drawn - q)", "categories without weights"
    ),
    Mutant(
        "wrappers/augmented_lagrangian.py",
        "lam = jnp.where(moves, lam + mu * g / DAMPING, lam)",
        "lam = jnp.where(moves, lam + mu * g, lam)",
        "multipliers without damping",
    ),
    Mutant(
        "wrappers/augmented_lagrangian.py",
        "(state.lam * g + state.mu * g**2 / 2)",
        "(state.lam * g + state.mu * g**2)",
        "twice the penalty",
    ),
    Mutant(
        "wrappers/feasibility_rules.py",
        "jnp.where(known & (totals > 0), infeasible, feasible)",
        "jnp.where(known, feasible, infeasible)",
        "violations do not count",
    ),
    Mutant(
        "wrappers/penalized_bounds.py",
        "jnp.where(first, 2 * typical, state.gamma)",
        "jnp.where(first, typical, state.gamma)",
        "the first weight of the penalty",
    ),
    Mutant(
        "wrappers/reevaluated.py",
        "(1 - self.memory) * state.uncertainty + self.memory *",
        "self.memory * state.uncertainty + (1 - self.memory) *",
        "uncertainty is forgotten the wrong way round",
    ),
    Mutant(
        "wrappers/adaptive_popsize.py",
        "jnp.exp(jnp.clip(beta * (gamma - agreement), -2, 2))",
        "jnp.exp(jnp.clip(beta * (agreement - gamma), -2, 2))",
        "the popsize grows where there is progress",
    ),
    Mutant(
        "constraints.py",
        "less = (total < than_total) | ((total == than_total) & (value < than_value))",
        "less = value < than_value",
        "an infeasible candidate is the best",
    ),
    Mutant(
        "injection.py",
        "jnp.minimum(1, allowed / jnp.maximum(norms(z), jnp.finfo(z.dtype).tiny))",
        "jnp.ones_like(norms(z))",
        "far points keep their length",
    ),
    Mutant(
        "wrappers/restarts.py",
        "jnp.asarray(self.factor, dtype) ** larger.astype(dtype)",
        "jnp.asarray(self.factor, dtype) * larger.astype(dtype)",
        "growth of the popsize",
    ),
    Mutant(
        "stopping.py",
        "(s.std < stops.tolx).all() & (s.path < stops.tolx).all()",
        "(s.std < stops.tolx).any()",
        "TOLX of any coordinate",
    ),
    Mutant(
        "stopping.py",
        "found = found & (told | ~is_value)",
        "found = found & (True | ~is_value)",
        "equal values from the start end a run",
    ),
    Mutant("strategies/local/gaussian_process.py", "(1 + r + r**2 / 3)", "(1 + r + r**2)", "another kernel"),
    Mutant("strategies/local/gaussian_process.py", "1 - (v**2).sum(axis=0)", "1 + 0 * (v**2).sum(axis=0)", "prior std"),
    Mutant("strategies/local/gaussian_process.py", "(best - mean) / std", "(mean - best) / std", "improves upwards"),
    Mutant("strategies/local/bayesian_optimization.py", "successes >= SUCCESSES", "successes > SUCCESSES", "a success"),
    Mutant("strategies/local/bayesian_optimization.py", "jnp.minimum(best, believed)", "best", "gained twice"),
    Mutant("strategies/local/nelder_mead.py", "value <= state.reflected_value", "value <= worst", "outside: any gain"),
    Mutant("strategies/local/nelder_mead.py", "1 + 2 / d, 0.75 - 1 / (2 * d)", "2.0, 0.5", "fixed coefficients"),
    Mutant(
        "strategies/local/nelder_mead.py",
        "~(value < state.reflected_value)",
        "(value < state.reflected_value)",
        "expansion",
    ),
    Mutant("strategies/local/quasi_newton.py", "v @ h @ v.T + rho", "v @ h @ v.T - rho", "sign of the update"),
    Mutant(
        "strategies/local/quasi_newton.py", "jnp.where(state.fresh, curvature", "jnp.where(False, curvature", "scale"
    ),
    Mutant("strategies/local/quasi_newton.py", "DECREASE * jnp.minimum(slope, 0)", "0 * slope", "no decrease needed"),
    Mutant("strategies/local/coordinate_search.py", ".add(-shift)", ".add(0 * shift)", "lists of another base"),
    Mutant(
        "strategies/local/coordinate_search.py", "(jnp.abs(gain - before) > exact)", "(gain > gain)", "all separable"
    ),
    Mutant("strategies/local/coordinate_search.py", "u * q**2 - v * p**2", "v * p**2 - u * q**2", "the other way"),
    Mutant("wrappers/portfolio.py", "used | stale | jnp", "used | jnp", "patience without end"),
    Mutant(
        "wrappers/portfolio.py", "best < state.best_value", "best > state.best_value", "the worst point is passed on"
    ),
    Mutant("injection.py", "jnp.minimum(1, allowed", "(1 + 0 * allowed", "steps from elsewhere are not shortened"),
    Mutant(
        "wrappers/best_so_far.py",
        "better = answered(value) & (value < state.value)",
        "better = value < state.value",
        "-inf wins",
    ),
    Mutant("wrappers/surrogate.py", ">= TAU)", ">= 0.5)", "less agreement"),
    Mutant("wrappers/surrogate.py", "(asked + 1) // 2", "asked", "batches double"),
    Mutant("wrappers/surrogate.py", "TRUNCATED * (count + 1)", "count", "the worst points are modelled"),
    Mutant("wrappers/surrogate.py", "lexsort((y, -population))", "lexsort((y, population))", "the oldest first"),
    Mutant("wrappers/surrogate.py", "(y - lowest)", "y", "told without an offset"),
    Mutant("wrappers/surrogate.py", "todo & (place >= first)", "todo & (place >= 0)", "asked in vain again"),
    Mutant("wrappers/surrogate.py", "forgotten = fresh &", "forgotten = ~fresh &", "restarts remember"),
    Mutant("wrappers/quadratic.py", "weights[:, None] * features(u)", "features(u)", "a regression without weights"),
    Mutant("wrappers/quadratic.py", "curvature = jnp.abs(curvature)", "curvature = curvature", "steps to saddles"),
    Mutant("wrappers/quadratic.py", "2 * jnp.diag(", "jnp.diag(", "half the curvature"),
    Mutant("wrappers/best_so_far.py", "& (value < state.value)", "& (value < jnp.inf)", "the newest best"),
    Mutant(
        "wrappers/averaged.py",
        "jnp.clip(steps.astype(jnp.float32), 1, self.window)",
        "jnp.maximum(steps.astype(jnp.float32), 1)",
        "no window",
    ),
    Mutant("wrappers/choices.py", "jnp.floor(u * k)", "jnp.round(u * k)", "choices are rounded"),
    Mutant("bounds.py", "jnp.mod(x - a, 2 * width)", "jnp.mod(x - a, width)", "folds by the width"),
    Mutant(
        "wrappers/reparameterized.py",
        "jax.vjp(self.transform, inner.decode(genome))[1](grad)[0]",
        "grad",
        "no chain rule",
    ),
    Mutant("envs/rollout.py", "jnp.where(alive, reward, 0)", "reward", "rewards after the end"),
    Mutant(
        "envs/rollout.py",
        "trees.where(alive, describe(state), episode.descriptor)",
        "describe(state)",
        "the descriptor after the end",
    ),
    Mutant("envs/normalization.py", "(within + (delta - shift) ** 2)", "within", "no variance between rows"),
    Mutant("run/checkpoint.py", "if text[:size] != _head(text[size:]):", "if False:", "the manifest's checksum"),
    Mutant(
        "run/checkpoint.py",
        'if hashlib.sha256(data).hexdigest() != spec["sha256"]:',
        "if False:",
        "the arrays' checksum",
    ),
    Mutant("run/trajectory.py", "if digest(start) != trajectory.start:", "if False:", "replay takes a changed base"),
    Mutant(
        "run/folder.py", 'row["generation"] <= generation)', 'row["generation"] < generation)', "truncates one too many"
    ),
    Mutant(
        "distributed/worker.py",
        "if message.expected and message.expected != self._marks:",
        "if False:",
        "a replica that differs",
    ),
    Mutant(
        "distributed/wire.py",
        "words.size) * jnp.uint32(0x9E3779B9)",
        "words.size) * jnp.uint32(0)",
        "a fingerprint without places",
    ),
    Mutant(
        "distributed/scheduler.py", "known = 0 < number <= self._numbers", "known = True", "a ticket never given out"
    ),
    Mutant(
        "run/folder.py",
        "if os.path.islink(path) and not os.path.realpath(path).startswith(home + os.sep):",
        "if False:",
        "links out of a run folder",
    ),
    Mutant(
        "envs/rollout.py", "jnp.where(lost, jnp.nan, episode.total)", "episode.total", "a policy shown NaN has a score"
    ),
]

# Mutants that change nothing that can be told, each with the reason: (file, old, new) as they are printed.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "wrappers/rounded.py",
        "return State(inner, state.key, state.steps + some.astype(jnp.int32))",
        "return State(inner, state.key, state.steps - some.astype(jnp.int32))",
    ): "the number is folded into a key: any that is another in each generation draws other bits",
}

CONTRACT, TWINS, POPULATION_TWINS = "tests/test_contract.py", "tests/test_twins.py", "tests/test_population_twins.py"
CMA, POPULATIONS, ZEROTH = "tests/test_cma.py", "tests/test_populations.py", "tests/test_zeroth_order.py"
LOCAL = "tests/test_local.py"
STATISTICS, FUZZ = "tests/test_statistics.py", "tests/test_fuzz.py"
SCHEDULING = ("tests/test_liveness.py", "tests/test_scheduler.py")
OTHERS = "tests/test_[bw]*.py"  # of wrappers and bounds
# The tests of each file: arguments of pytest, the files that kill much first.
TESTS: dict[str, tuple[str, ...]] = {
    "bounds.py": (OTHERS, CONTRACT, "-k", "bound or reflect or fold or wall"),
    "strategies/covariance/recombination.py": (CMA, "-k", "twin and not amalgam"),
    "strategies/populations/variation.py": (
        POPULATION_TWINS, POPULATIONS, "-k", "twin or crossover or distinct or archive",
    ),
    "shaping.py": ("tests/test_utilities.py",),
    "strategies/zeroth_order/probes.py": (ZEROTH, "-k", "decay or mezo or stacks"),
    "noise/low_rank.py": ("tests/test_virtual.py", "-k", "rank"),
    "run/checkpoint.py": ("tests/test_checkpoint.py", FUZZ),
    "run/trajectory.py": ("tests/test_finetune.py", FUZZ, "-k", "trajectory"),
    "run/folder.py": ("tests/test_runs.py", FUZZ),
    "envs/rollout.py": ("tests/test_own_environments.py", "tests/test_envs.py"),
    "envs/normalization.py": ("tests/test_envs.py", "-k", "moments or normalized"),
    **{f"distributed/{name}.py": SCHEDULING for name in ("scheduler", "jobs", "pace", "crew")},
    "distributed/worker.py": ("tests/test_scheduler.py",),
    "distributed/wire.py": ("tests/test_scheduler.py", "-k", "fingerprint"),
    "wrappers/alternating.py": (ZEROTH, CONTRACT, "-k", "blocks or alternating"),
    "wrappers/averaged.py": (CONTRACT, OTHERS, "-k", "averaged"),
    "wrappers/best_so_far.py": (CONTRACT, OTHERS, "-k", "best_so_far"),
    "wrappers/choices.py": (POPULATIONS, OTHERS, "-k", "choices"),
    "wrappers/masked.py": (CONTRACT, OTHERS, "-k", "masked"),
    "wrappers/reparameterized.py": (OTHERS, CONTRACT, "-k", "bounded or reflect or reparameterized or transformation"),
    "wrappers/restarts.py": (
        "tests/test_wrappers.py", CMA, CONTRACT, "-k", "tolx or ipop or bipop or restarts or stops or inactive",
    ),
    "injection.py": ("tests/test_moved.py", "-k", "far_point or drawn_step or mirrored or samples"),
    "stopping.py": (
        "tests/test_wrappers.py", CMA, "tests/test_restarts.py", "tests/test_stopping.py",
        "-k", "restarts or stops or stagnat or flat or named or tolx or equal_values",
    ),
    "spaces/whole.py": ("tests/test_spaces.py", "-k", "pycma or twin or freezes"),
    "spaces/mixed.py": ("tests/test_spaces.py", "-k", "twin"),
    "spaces/categories.py": ("tests/test_spaces.py", "-k", "twin or begins"),
    "constraints.py": ("tests/test_constraints.py", "-k", "best or least_violated or total"),
    "wrappers/augmented_lagrangian.py": ("tests/test_constraints.py", "-k", "pycma or optimum or equality"),
    "wrappers/feasibility_rules.py": ("tests/test_constraints.py", "-k", "rules or optimum"),
    "wrappers/penalized_bounds.py": ("tests/test_bounds.py", CONTRACT, "-k", "penalty or penalized or optimum_at"),
    "wrappers/resampled.py": ("tests/test_bounds.py", CONTRACT, "-k", "again or resampled or candidates_are_inside"),
    "wrappers/smoothed.py": ("tests/test_bounds.py", CONTRACT, "-k", "smooth or optimum_at"),
    "wrappers/adaptive_popsize.py": ("tests/test_noisy.py", CONTRACT, "-k", "popsize"),
    "wrappers/noisy.py": ("tests/test_noisy.py", "-k", "noisy or middle or ended"),
    "wrappers/reevaluated.py": ("tests/test_noisy.py", CONTRACT, "-k", "measure or evaluat or step_size"),
    "wrappers/repeated.py": ("tests/test_noisy.py", CONTRACT, "-k", "repeat or gradients"),
    "wrappers/step_size.py": ("tests/test_noisy.py", "-k", "step_size"),
    "wrappers/rounded.py": ("tests/test_finetune.py", CONTRACT, "-k", "rounding or rounded"),
    "wrappers/scheduled.py": (CONTRACT, OTHERS, "tests/test_finetune.py", "-k", "schedule"),
    "wrappers/subspace.py": (ZEROTH, CONTRACT, "-k", "subspace or black_box"),
    "wrappers/surrogate.py": ("tests/test_surrogate.py",),
    "wrappers/quadratic.py": ("tests/test_surrogate.py",),
    "strategies/covariance/amalgam.py": (CMA, "-k", "amalgam"),
    "strategies/covariance/cma_es.py": (CMA, CONTRACT, "-k", "cma_es or rates or popsize_large or decomposition"),
    "strategies/covariance/cr_fm_nes.py": (CMA, "-k", "cr_fm_nes"),
    "strategies/populations/differential_evolution.py": (POPULATION_TWINS, CONTRACT, "-k", "differential_evolution"),
    "strategies/populations/diffusion_evolution.py": (
        POPULATIONS, CONTRACT, "-k", "diffusion or origins or schedules or fitness",
    ),
    "strategies/gaussian/evolution_strategy.py": (TWINS, CONTRACT, "-k", "openai_es or ars or spsa"),
    "strategies/adapters/evosax.py": ("tests/test_evosax.py",),
    "strategies/zeroth_order/fzoo.py": (ZEROTH, CONTRACT, "-k", "fzoo"),
    "strategies/populations/genetic_algorithm.py": (TWINS, STATISTICS, CONTRACT, "-k", "deep_ga"),
    "strategies/populations/gesmr_ga.py": (POPULATION_TWINS, CONTRACT, "-k", "gesmr"),
    "strategies/gaussian/guided_es.py": (TWINS, STATISTICS, CONTRACT, "-k", "guided"),
    "strategies/zeroth_order/hizoo.py": (ZEROTH, CONTRACT, "-k", "hizoo"),
    "strategies/populations/jade.py": (POPULATION_TWINS, CONTRACT, "-k", "jade"),
    "strategies/covariance/lm_ma_es.py": (CMA, CONTRACT, "-k", "lm_ma_es"),
    "strategies/zeroth_order/lozo.py": (ZEROTH, CONTRACT, "-k", "lozo or low_rank"),
    "strategies/covariance/ma_es.py": (CMA, CONTRACT, "-k", "ma_es and not lm_ma_es"),
    "strategies/zeroth_order/mezo.py": (ZEROTH, CONTRACT, "-k", "mezo and not sparse and not adam or decay"),
    "strategies/zeroth_order/mezo_adam.py": (ZEROTH, CONTRACT, "-k", "moments or window or mezo_adam or mezo_momentum"),
    "strategies/zeroth_order/mezo_svrg.py": (ZEROTH, CONTRACT, "-k", "svrg"),
    "strategies/covariance/one_plus_one_es.py": (CMA, CONTRACT, "-k", "one_plus_one_es"),
    "strategies/zeroth_order/one_point.py": (ZEROTH, CONTRACT, "-k", "one_point"),
    "strategies/populations/particle_swarm.py": (POPULATION_TWINS, POPULATIONS, CONTRACT, "-k", "swarm or ring"),
    "strategies/gaussian/persistent_es.py": (ZEROTH, CONTRACT, "-k", "persistent or truncation or reused or pes"),
    "strategies/gaussian/pgpe.py": (TWINS, STATISTICS, CONTRACT, "-k", "pgpe and not masked"),
    "strategies/populations/random_search.py": (POPULATION_TWINS, CONTRACT, "-k", "random_search"),
    "strategies/populations/real_ga.py": (POPULATION_TWINS, POPULATIONS, CONTRACT, "-k", "real_ga or children or sbx"),
    "strategies/populations/samr_ga.py": (POPULATION_TWINS, CONTRACT, "-k", "samr"),
    "strategies/covariance/sep_cma_es.py": (CMA, CONTRACT, "-k", "sep_cma_es"),
    "strategies/populations/shade.py": (
        POPULATIONS, CONTRACT, "-k", "twin and shade or share_of_the_best or l_shade or shades",
    ),
    **{f"strategies/local/{name}.py": (LOCAL, "-k", name) for name in ("quasi_newton", "nelder_mead")},
    "strategies/local/coordinate_search.py": (LOCAL, "-k", "coordinate"),
    "wrappers/portfolio.py": (LOCAL, CONTRACT, "-k", "portfolio or phase"),
    "automatic.py": ("tests/test_automatic.py",),
    "strategies/local/bayesian_optimization.py": ("tests/test_bayesian.py",),
    "strategies/local/gaussian_process.py": ("tests/test_bayesian.py",),
    "strategies/local/hill_climbing.py": (POPULATION_TWINS, CONTRACT, "-k", "hill_climbing"),
    "strategies/gaussian/sampling.py": (TWINS, STATISTICS, CONTRACT, "-k", "openai_es or spsa or snes"),
    "strategies/local/simulated_annealing.py": (POPULATION_TWINS, CONTRACT, "-k", "simulated_annealing"),
    "strategies/gaussian/snes.py": (TWINS, STATISTICS, CONTRACT, "-k", "snes and not bounded"),
    "strategies/zeroth_order/sparse_mezo.py": (ZEROTH, CONTRACT, "-k", "sparse_mezo"),
    "strategies/zeroth_order/subzero.py": (ZEROTH, CONTRACT, "-k", "subzero or low_rank"),
    "strategies/covariance/xnes.py": (CMA, CONTRACT, "-k", "xnes"),
    "strategies/zeroth_order/zo_adamm.py": (ZEROTH, CONTRACT, "-k", "adamm or sign_sgd"),
    "strategies/zeroth_order/zo_adamu.py": (ZEROTH, CONTRACT, "-k", "adamu or figure_1"),
    "strategies/zeroth_order/zo_conservative.py": (ZEROTH, CONTRACT, "-k", "conservative"),
    **{f"strategies/{name}.py": (POPULATION_TWINS, CONTRACT, "-k", name) for name in ("hill_climbing",)},
    "strategies/first_order/gradient.py": (CONTRACT, "-k", "gradient and not bounded"),
}  # fmt: skip


# ---- the seeded operator ----

SWAPS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.Pow: ("**", "*"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.Mod: ("%", "//"), ast.FloorDiv: ("//", "%"),
}  # fmt: skip
NAMES = {"argmin": "argmax", "argmax": "argmin", "minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min",
         "sum": "mean", "mean": "sum", "any": "all", "all": "any", "exp": "expm1", "sqrt": "square",
         "isfinite": "isnan"}  # fmt: skip


def drawn() -> list[Mutant]:
    """Those whose line has the least hash, so that a change elsewhere draws no others."""
    chosen = []
    place = lambda file: f"{Path(file).parts[0]}/{Path(file).name}"  # moving a file to another family draws no others
    for pattern, count in DRAWN.items():
        files = [f for f in sorted((ROOT / "evoopt").glob(pattern)) if f.name != "__init__.py"]
        found = [m for f in files for m in mutants_of(f)]
        found.sort(key=lambda m: hashlib.sha256(repr((SEED, place(m.file), m.old, m.new)).encode()).digest())
        used: collections.Counter[str] = collections.Counter()
        for mutant in found:
            used[mutant.file] += 1
            if count > 0 and (used[mutant.file] <= A_FILE or len(files) == 1):
                chosen.append(mutant)
                count -= 1
    return chosen


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All one-line mutants of a file, of which the line stands once in it."""
    text, name = path.read_text(), str(path.relative_to(ROOT / "evoopt"))
    lines = text.split("\n")
    for row, start, stop, new, what in _sites(ast.parse(text), lines):
        line = lines[row - 1]
        if text.count(line) == 1:
            yield Mutant(name, line, line[:start] + new + line[stop:], what)


def _sites(tree: ast.Module, lines: list[str]) -> Iterator[tuple[int, int, int, str, str]]:
    """(row, first column, last, what comes there, why): in bodies of functions, neither in what is raised nor shown."""
    if not all(line.isascii() for line in lines):  # columns of `ast` are bytes
        lines[:] = [line.encode("ascii", "replace").decode() for line in lines]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name != "__post_init__":
            for statement in function.body:
                if not isinstance(statement, (ast.FunctionDef, ast.Raise)):
                    yield from _in(statement, lines)


def _in(node: ast.AST, lines: list[str]) -> Iterator[tuple[int, int, int, str, str]]:
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.FunctionDef)) or (isinstance(node, ast.If) and _raises(node)):
        return
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield from _between(node.left, node.right, *SWAPS[type(node.op)], lines)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield from _between(node.left, node.comparators[0], *SWAPS[type(node.ops[0])], lines)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        end = node.operand.col_offset if node.operand.lineno == node.lineno else node.col_offset
        if end > node.col_offset:
            yield node.lineno, node.col_offset, end, "", "a sign or a negation left out"
    elif isinstance(node, ast.Attribute) and node.attr in NAMES and node.lineno == node.end_lineno:
        end = node.end_col_offset or 0
        yield node.lineno, end - len(node.attr), end, NAMES[node.attr], f"{NAMES[node.attr]} for {node.attr}"
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        new = {True: "False", False: "True"}[node.value] if type(node.value) is bool else _other(node.value)
        yield node.lineno, node.col_offset, node.end_col_offset or 0, new, f"{new} for {node.value}"
    for child in ast.iter_child_nodes(node):
        yield from _in(child, lines)


def _other(number: float) -> str:
    return repr(2 * number or type(number)(1))


def _raises(node: ast.If) -> bool:
    return any(isinstance(inner, ast.Raise) for inner in ast.walk(node))


def _between(left: ast.expr, right: ast.expr, old: str, new: str, lines: list[str]) -> Iterator[Any]:
    """The operator between two expressions, where both are on one line."""
    if left.end_lineno != right.lineno:
        return
    start, stop = left.end_col_offset or 0, right.col_offset
    place = lines[right.lineno - 1].find(old, start, stop)
    if place >= 0:
        yield right.lineno, place, place + len(old), new, f"{new} for {old}"


# ---- the run ----


def survives(mutant: Mutant | None, tree: Path, tests: tuple[str, ...]) -> tuple[bool, float, str]:
    """Whether the tests pass with the mutant (None: without any) in the copy `tree`; the seconds, the last line."""
    begun = time.monotonic()
    path = None if mutant is None else tree / "evoopt" / mutant.file
    before = path.read_text() if path else ""
    if path and mutant:
        path.write_text(before.replace(mutant.old, mutant.new))
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "evoopt-mutants-cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **os.environ,
        "PYTHONPATH": str(tree),
    }
    marks = "not slow and not weights and not ray and not browser"  # what runs for every change
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", marks, *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode not in (0, 1, 2, 3):
            raise RuntimeError(f"no tests: {' '.join(tests)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        passed, said = done.returncode == 0, [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
        last = (said or done.stdout.splitlines() or [""])[-1]
    except subprocess.TimeoutExpired:
        passed, last = False, f"no end after {TIMEOUT} s"
    finally:
        if path:
            path.write_text(before)
    return passed, time.monotonic() - begun, last


def copied(place: Path) -> Path:
    """The tree without what no test needs."""
    kept = ("evoopt", "tests", "pyproject.toml", "README.md", "docs", "examples", "benchmarks", "Makefile")
    for name in kept:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, place / name)
    return place


def subject_of(file: str) -> tuple[str, ...]:
    """The arguments of pytest; patterns become the files that there are."""
    found = []
    for x in TESTS[file]:
        found += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(x)) if x.startswith("tests/") else [x]
    return tuple(found)


def main() -> None:
    """Apply every mutant; exit with 1 where an unlisted one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="mutants whose file or name has one of these")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print them and stop")
    options = parser.parse_args()
    chosen = [m for m in [*NAMED, *drawn()] if any(word in f"{m.file} {m.name}" for word in options.only)]
    if options.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        trees = [copied(Path(folder) / str(i)) for i in range(options.workers)]
        free = queue.SimpleQueue()
        for tree in trees:
            free.put(tree)

        def judge(mutant: Mutant | None, tests: tuple[str, ...]) -> tuple[bool, float, str]:
            tree = free.get()
            try:
                return survives(mutant, tree, tests)
            finally:
                free.put(tree)

        # Without a mutant first: tests that are red anyway would kill everything, and the cache is filled.
        subjects, red = sorted({subject_of(m.file) for m in chosen}), set()
        for tests, (passed, seconds, last) in zip(subjects, pool.map(lambda t: judge(None, t), subjects), strict=True):
            state = "ok" if passed else "RED WITHOUT A MUTANT"
            print(f"{state:10} {seconds:5.0f} s  {' '.join(tests)}  {last}", flush=True)
            red |= set() if passed else {tests}
        unjudged = [m for m in chosen if subject_of(m.file) in red]
        chosen = [m for m in chosen if m not in unjudged]
        survivors = 0
        results = pool.map(lambda m: judge(m, subject_of(m.file)), chosen)
        for mutant, (passed, seconds, last) in zip(chosen, results, strict=True):
            reason = EQUIVALENT.get((mutant.file, mutant.old.strip(), mutant.new.strip()))
            state = "killed" if not passed else "equivalent" if reason else "SURVIVED"
            survivors += state == "SURVIVED"
            print(f"{state:10} {seconds:5.0f} s  {mutant}\n  {reason or last}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survivors; {len(unjudged)} not judged, whose tests are red without them")
    sys.exit(survivors + len(unjudged) > 0)


if __name__ == "__main__":
    main()
