"""MeZO-SVRG: zeroth-order descent in which estimates at a snapshot reduce the noise of the data.

Every q steps: snapshot theta' <- theta, G <- SPSA(theta'; a large batch), theta <- theta - eta_1 G; otherwise
theta <- theta - eta_2 (g(theta; B) - g(theta'; B) + G), with one direction and one batch for both differences.

Source: Gautam, Park, Zhou, Raman, Ha, "Variance-reduced zeroth-order methods for fine-tuning language models", ICML
2024, arXiv 2404.08080, algorithm 2. The released code's snapshot is an alias of the live parameters, its two estimates
use different directions, and its large batch is a mini-batch; its rule that divides both rates when the loss rises is
not part of the algorithm and is left out.

A generation's candidates share the loop's batch. An estimate on a large batch is therefore gathered over `batches`
generations that ask at the same points, each answered on its own batch: their mean is the answer on the large batch,
and the loop need not know. A cycle is `batches` such generations and q - 1 steps. G is kept as (address, slope) pairs,
so the snapshot is the only other copy of the parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import as_values, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The state of MeZO-SVRG."""

    mean: Params
    snapshot: Params
    addresses: Any  # addresses of G's directions; leaves (popsize / 2, ...)
    slopes: Array  # (popsize / 2,) float32, sums of their slopes over the batches so far
    answers: Array  # (popsize / 2,) int32, the number of batches in each sum
    place: Array  # () int32, the next generation's place in the cycle
    unanswered: Array  # () int32, generations without a usable probe


class Genome(NamedTuple):
    """The point, the direction, and the side of a candidate."""

    address: Any
    sign: Array  # () float32
    at_snapshot: Array  # () bool


@pytree
class Around:
    """decode: genome -> mean or snapshot, + sign * sigma * z."""

    mean: Params
    snapshot: Params
    sigma: Any
    noise: Any

    def __call__(self, genome: Genome) -> Params:
        point = trees.where(genome.at_snapshot, self.snapshot, self.mean)
        return sampling.Perturbed(point, self.sigma, None, self.noise)(sampling.Genome(genome.address, genome.sign))

    def virtual(self, genome: Genome) -> Params:
        """The same candidate with virtual leaves."""
        point = trees.where(genome.at_snapshot, self.snapshot, self.mean)
        decode = sampling.Perturbed(point, self.sigma, None, self.noise)
        return decode.virtual(sampling.Genome(genome.address, genome.sign))


@pytree
class MeZOSVRG:
    """Variance-reduced MeZO; see `mezo_svrg`."""

    popsize: int = static()  # 4 n
    sigma: float
    learning_rate: float  # eta_2
    snapshot_rate: float  # eta_1
    interval: int  # q
    batches: int  # generations that gather G
    noise: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 4)
        check_sigma(self.sigma)
        if self.popsize % 4:
            raise error("a popsize that 4 divides", str(self.popsize), "pairs at the snapshot were not counted")
        for name, n in (("interval", self.interval), ("batches", self.batches)):
            if isinstance(n, int):
                check_popsize(n, 1, name=name)

    def init(self, params: Params, key: Key) -> State:
        mean, n = probes.movable(params, self.sigma), self.popsize // 2
        addresses = self.noise.addresses(noises.replayable(key), n)
        zero = jnp.zeros((), jnp.int32)
        return State(mean, mean, addresses, jnp.zeros(n, jnp.float32), jnp.zeros(n, jnp.int32), zero, zero)

    def ask(self, state: State, key: Key) -> Population:
        pairs = self.popsize // 2
        fresh = self.noise.addresses(noises.replayable(key), pairs)
        gathering = state.place < self.batches
        anchors = trees.where(state.place == 0, fresh, state.addresses)
        # Stepping: half of the pairs are at the parameters, half at the snapshot, along the same directions.
        half = jnp.arange(pairs) % (pairs // 2)
        address = trees.where(gathering, anchors, jax.tree.map(lambda a: a[half], fresh))
        at_snapshot = gathering | (jnp.arange(pairs) >= pairs // 2)
        twice = lambda tree: jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), tree)
        sign = jnp.tile(jnp.array([1.0, -1.0], jnp.float32), pairs)
        decode = Around(state.mean, state.snapshot, jnp.asarray(self.sigma), self.noise)
        return Population(decode, Genome(twice(address), sign, twice(at_snapshot)))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        pairs = self.popsize // 2
        gathering, last = state.place < self.batches, state.place == self.batches - 1
        g, used = probes.slopes(values, self.sigma), sampling.antithetic.used(values)
        asked = probes.directions(population)
        # Gathering: sums over the batches, from 0 at the first.
        old = lambda x: jnp.where(state.place == 0, jnp.zeros_like(x), x)
        slopes = old(state.slopes) + jnp.where(jnp.isnan(g), 0, g).astype(jnp.float32)
        counts = old(state.answers) + (~jnp.isnan(g)).astype(jnp.int32)
        addresses = trees.where(gathering, asked, state.addresses)
        slopes, counts = jnp.where(gathering, slopes, state.slopes), jnp.where(gathering, counts, state.answers)
        # G, as weights (pairs,)
        large = probes.average(jnp.where(counts > 0, slopes / jnp.maximum(counts, 1).astype(slopes.dtype), jnp.nan))
        # Stepping: g(theta; B) - g(theta'; B) along each direction with both answers.
        difference = g[: pairs // 2] - g[pairs // 2 :]
        rate = jnp.where(gathering, jnp.where(last, self.snapshot_rate, 0.0), self.learning_rate)
        small = jnp.where(gathering, 0, self.learning_rate * probes.average(difference))
        first = jax.tree.map(lambda a: a[: pairs // 2], asked)
        usable = jnp.where(gathering, used, jnp.where(jnp.isnan(difference).all(), jnp.nan, used))
        rate = jnp.where(jnp.isfinite(usable).any(), rate, 0)  # a generation without an answer changes nothing
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, addresses)
        weights = jnp.concatenate([small, (rate * large).astype(small.dtype)])
        mean = probes.step(state.mean, self.noise, both, weights)
        place = (state.place + 1) % (self.batches + self.interval - 1)
        place = jnp.asarray(place, jnp.int32)
        snapshot = trees.where(place == 0, mean, state.snapshot)
        new = State(mean, snapshot, addresses, slopes, counts, place, state.unanswered)
        return probes.settle_in_place(state, new, usable)

    def recommend(self, state: State) -> Params:
        return state.mean


def mezo_svrg(
    popsize: int = 4,
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-6,
    snapshot_rate: float = 1e-3,
    interval: int = 2,
    batches: int = 8,
    noise: Any = noises.gaussian,
) -> MeZOSVRG:
    """MeZO-SVRG (Gautam et al. 2024): four forward passes per step, and one more copy of the parameters, the snapshot.

    Args:
        popsize: 4 n forward passes per generation: n pairs at the parameters and n at the snapshot, or 2 n pairs at the
            snapshot while the large batch is gathered.
        sigma: length of a probe, in units of the parameters.
        learning_rate: eta_2, the rate of the corrected steps.
        snapshot_rate: eta_1, the rate of the step along the large batch's estimate.
        interval: q: one step along the large batch's estimate and q - 1 corrected ones.
        batches: generations that make up a large batch; 1 if the objective sees all the data every time.
        noise: `gaussian`, `rademacher`, or any other noise addressed by keys.

    >>> from evoopt import minimize
    >>> strategy = mezo_svrg(learning_rate=0.02, snapshot_rate=0.02, batches=1)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=600)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return MeZOSVRG(popsize, sigma, learning_rate, snapshot_rate, interval, batches, noise)
