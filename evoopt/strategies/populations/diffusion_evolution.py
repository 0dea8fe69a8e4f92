"""Diffusion evolution: a population denoised towards fit members, each within its own neighbourhood.

Source: Zhang, Hartl, Hazan, Levin, "Diffusion models are evolutionary algorithms", arXiv 2410.02543 (ICLR 2025),
algorithm 1 (equations 5, 8 and 10) and, for the latent space, algorithm 2 (equation 12). Schedules: Nichol, Dhariwal,
arXiv 2102.09672 (cosine); Ho, Jain, Abbeel, arXiv 2006.11239 (DDPM), its sum of betas replaced by the integral; the
step: Song, Meng, Ermon, arXiv 2010.02502.

The estimator compares every member with every other. It runs over tiles of pairs with a running maximum, in logarithms,
so memory is O(n d) and nothing under- or overflows. The paper's program adds 1e-9 to every factor instead, which pulls
members without near neighbours to the mean of all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import injection, trees
from evoopt import noise as noises
from evoopt.answers import answered, as_values, best_place, finite, settle, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static

TILE = 512  # members on each side of a tile of pairs

Schedule = Callable[[int], np.ndarray]  # steps -> alpha (steps,), from nearly 1 (data) to nearly 0 (noise)
Mapping = Callable[[Array], Array]  # values (n,) -> ln g (n,)


def cosine(steps: int) -> np.ndarray:
    """Alpha = (1 + cos(pi t / T)) / 2, moved into [0.001, 0.999]."""
    alpha = (1 + np.cos(np.linspace(0, np.pi, steps))) / 2
    return (alpha + 1e-3) * (1 - 1e-3) / (1 + 1e-3)


def linear(steps: int) -> np.ndarray:
    """Alpha falls linearly from 1 - 1e-4 to 1e-8."""
    return np.linspace(1 - 1e-4, 1e-8, steps)


def ddpm(steps: int) -> np.ndarray:
    """Alpha = exp(-b u - c u^2), u = t / T: betas that grow linearly, from 1 - 1e-4 to 1e-4."""
    u = np.linspace(1 / steps, 1, steps)
    b, c = np.linalg.solve([[u[0], u[0] ** 2], [1, 1]], [-math.log(1 - 1e-4), -math.log(1e-4)])
    return np.exp(-b * u - c * u**2)


def negated(values: Array) -> Array:
    """The map g = -value, for objectives that are minus a nonnegative return."""
    return jnp.log(jnp.maximum(-values, 0))


@functools.cache
def power(exponent: float = 1.0, temperature: float = 1.0) -> Mapping:
    """The map g = (-value / temperature)^exponent, for objectives that are minus a nonnegative return."""
    return lambda values: exponent * jnp.log(jnp.maximum(-values / temperature, 0))


@functools.cache
def energy(temperature: float = 1.0) -> Mapping:
    """The map g = exp(-value / temperature), with the temperature in units of the values."""
    return lambda values: -values / temperature


@functools.cache
def relative_energy(temperature: float = 0.1) -> Mapping:
    """The map g = exp(-(value - best) / (temperature (median - best))): `energy` in each generation's own unit.

    Not in the paper, whose experiments give every objective its own temperature. Scaling or shifting the objective
    changes nothing, and selection does not fade as the population converges.
    """

    def log_g(values: Array) -> Array:
        best = jnp.nanmin(values)
        scale = jnp.nanmedian(values) - best
        return -(values - best) / (temperature * jnp.where(scale > 0, scale, 1))

    return log_g


class State(NamedTuple):
    """The state of diffusion evolution, with vectors in units of `spread` around the start."""

    mean: Array  # (n, d), the means of the next candidates
    deviation: Array  # (), sigma_t of the noise added to them
    center: Array  # (d,), the start
    projection: Array  # (k, d), rows of length 1; (0, d) without a latent space
    best: Array  # (d,), the best answered candidate
    best_value: Array  # ()
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


def origins(x: Array, z: Array, log_g: Array, alpha: Array) -> Array:
    """The estimates of x_0: averages of x (n, d) weighted by g_j N(z_i; sqrt(alpha) z_j, 1 - alpha), (n, d).

    Equation (8) of the paper; (12) if `z` (n, k) are latent coordinates instead of x.
    """
    n, d = x.shape
    tile = min(TILE, n)
    padding = -n % tile
    center = z.mean(axis=0)  # leaves distances as they are and shrinks their rounding errors
    log_g = jnp.pad(log_g, (0, padding), constant_values=-jnp.inf).reshape(-1, tile)
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, tile, d)
    z = jnp.pad(z, ((0, padding), (0, 0))).reshape(-1, tile, z.shape[1])
    root = jnp.sqrt(alpha)

    def row(zi: Array) -> Array:
        zi = zi - root * center

        def column(carry: Any, block: Any) -> Any:
            top, total, weighted = carry
            xj, zj, gj = block
            mu = root * (zj - center)
            if mu.shape[1] <= 8:  # term by term: exact, and as fast
                squares = sum((zi[:, None, k] - mu[None, :, k]) ** 2 for k in range(mu.shape[1]))
            else:  # |zi|^2 is the same factor for all j
                squares = jnp.sum(mu**2, axis=1) - 2 * jnp.matmul(zi, mu.T, precision="highest")
            logits = gj - squares / (2 * (1 - alpha))
            new = jnp.maximum(top, logits.max(axis=1))
            shift = jnp.where(jnp.isfinite(new), new, 0)  # 0 for a tile without answers
            weights, keep = jnp.exp(logits - shift[:, None]), jnp.exp(top - shift)
            weighted = keep[:, None] * weighted + jnp.matmul(weights, xj, precision="highest")
            return (new, keep * total + weights.sum(axis=1), weighted), None

        start = (jnp.full(tile, -jnp.inf, x.dtype), jnp.zeros(tile, x.dtype), jnp.zeros((tile, d), x.dtype))
        (_, total, weighted), _ = jax.lax.scan(column, start, (x, z, log_g))
        return weighted / jnp.where(total > 0, total, 1)[:, None]

    return jax.lax.map(row, z).reshape(-1, d)[:n]


@pytree
class DiffusionEvolution:
    """Diffusion evolution; see `diffusion_evolution`."""

    popsize: int = static()
    steps: int = static()
    spread: float
    noise: float
    schedule: Schedule = static()
    mapping: Mapping = static()
    latent: int | None = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2)
        check_popsize(self.steps, 2, name="steps")
        if self.latent is not None:
            check_popsize(self.latent, 1, name="latent")

    def init(self, params: Params, key: Key) -> State:
        check_sigma(self.spread, "spread")
        center, unravel = trees.ravel(trees.searchable(params))
        d, k, zero = center.size, self.latent or 0, jnp.zeros((), jnp.int32)
        projection = variation.gaussians(noises.replayable(key), (k, d), center.dtype)
        projection = projection / jnp.linalg.norm(projection, axis=1, keepdims=True)  # the paper: N(0, 1 / d)
        mean, one = jnp.zeros((self.popsize, d), center.dtype), jnp.ones((), center.dtype)  # x_T from N(0, I)
        value = variation.unknown(1)[0]
        return State(mean, one, center, projection, jnp.zeros_like(center), value, zero, unravel, zero)  # type: ignore

    def ask(self, state: State, key: Key) -> Population:
        noise = variation.gaussians(noises.replayable(key), state.mean.shape, state.mean.dtype)
        spread = jnp.asarray(self.spread, state.mean.dtype)
        decode = jax.tree_util.Partial(_placed, state.unravel, state.center, spread)
        return Population(decode, state.mean + state.deviation * noise)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        x = population.genomes
        ok = answered(values)
        log_g = self.mapping(jnp.where(ok, finite(values), jnp.nan)).astype(x.dtype)
        log_g = jnp.where(ok & ~jnp.isnan(log_g) & jnp.isfinite(values), log_g, -jnp.inf)  # +inf has no fitness
        log_g = jnp.where((log_g > -jnp.inf).any(), log_g, jnp.where(jnp.isfinite(values), 0, -jnp.inf))  # all g = 0

        alphas = jnp.asarray(self.schedule(self.steps), x.dtype)
        last = self.steps - 1
        alpha = alphas[jnp.maximum(last - state.generation, 0)]  # alpha_t
        before = alphas[jnp.maximum(last - state.generation - 1, 0)]  # alpha_{t-1}; after the last step nothing moves
        z = x if self.latent is None else jnp.matmul(x, state.projection.T, precision="highest")
        x0 = origins(x, z, log_g, alpha)
        eps = (x - jnp.sqrt(alpha) * x0) / jnp.sqrt(1 - alpha)  # (10)
        sigma = jnp.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before)) * jnp.asarray(self.noise, x.dtype)
        # (5): sqrt(alpha_{t-1}) x_0 + sqrt(1 - alpha_{t-1} - sigma^2) eps + sigma w; w is drawn by the next ask
        mean = jnp.sqrt(before) * x0 + jnp.sqrt(jnp.maximum(1 - before - sigma**2, 0)) * eps

        i = best_place(values)
        value = values[i].astype(state.best_value.dtype)
        better = ok[i] & (value < state.best_value)
        new = state._replace(
            mean=mean,
            deviation=sigma,
            best=jnp.where(better, x[i], state.best),
            best_value=jnp.where(better, value, state.best_value),
            generation=state.generation + 1,
        )
        return settle(state, new, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        x = injection.vectors(points, state.mean.dtype)
        x = (x - state.center) / jnp.asarray(self.spread, x.dtype)
        return injection.placed(population, points, x)

    def recommend(self, state: State) -> Params:
        return _placed(state.unravel, state.center, jnp.asarray(self.spread, state.best.dtype), state.best)


def _placed(unravel: trees.Unravel, center: Array, spread: Array, x: Array) -> Params:
    return unravel(center + spread * x)


def diffusion_evolution(
    popsize: int = 512,
    *,
    steps: int = 25,
    spread: float = 1.0,
    noise: float = 0.1,
    schedule: Schedule = cosine,
    mapping: Mapping | None = None,
    latent: int | None = None,
) -> DiffusionEvolution:
    """Diffusion evolution (Zhang et al. 2024): many optima at once, in a number of generations fixed beforehand.

    The population starts as noise and is denoised over `steps` generations; after that it stands still.

    Args:
        popsize: candidates per generation.
        steps: generations, the length of the schedule.
        spread: scale of the first population, N(0, I): the optima should lie within two or three times it.
        noise: factor of a step's noise: 1 is DDPM's, 0 deterministic, 0.1 the paper's.
        schedule: `cosine`, `linear`, `ddpm`, or a function steps -> alphas.
        mapping: values -> logarithms of fitness: `energy(temperature)`, `power(exponent)`, `negated`, or
            `relative_energy(0.1)`, the default because it needs no tuning to the objective.
        latent: compare members in a random projection to this many dimensions instead of the whole space. Use it above
            about ten dimensions, where members are so far apart that each sees only itself. 2 in the paper.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> from evoopt.envs.functions import himmelblau
    >>> result = minimize(himmelblau, jnp.zeros(2), diffusion_evolution(spread=4.0), generations=25)
    >>> result.best_value < 0.1
    True
    """
    mapping = relative_energy() if mapping is None else mapping
    return DiffusionEvolution(popsize, steps, spread, noise, schedule, mapping, latent)
