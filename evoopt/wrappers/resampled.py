"""Bounds by drawing again: candidates outside the box are replaced by new ones, the last ones mirrored."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from evoopt import bounds, trees
from evoopt import noise as noises
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, pytree, static
from evoopt.wrappers.reparameterized import Reflection, Reparameterized


@pytree
class Redrawn:
    """A strategy whose candidates outside the box are drawn again; see `resampled`."""

    strategy: Any
    lower: Any
    upper: Any
    tries: int = static()

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    @property
    def dispersion(self) -> Any:
        return self.strategy.dispersion

    @property
    def moved(self) -> Any:
        return self.strategy.moved

    def init(self, params: Params, key: Key) -> Any:
        return trees.strong(self.strategy.init(params, key))

    def ask(self, state: Any, key: Key) -> Population:
        key = noises.replayable(key)
        first = self.strategy.ask(state, key)
        # Candidates that are drawn one by one are replaced one by one. Those of other strategies belong together (pairs
        # at +z and -z, a shared direction): their generation is replaced as a whole where more of it lies inside.
        alone = hasattr(self.strategy, "dispersion") or hasattr(self.strategy, "moved")

        def going(loop: Any) -> Array:
            i, _, within = loop
            return (i <= self.tries) & ~within.all()

        def again(loop: Any) -> Any:
            i, population, within = loop
            other = self.strategy.ask(state, noises.fold_in(key, i))
            inside = self._within(other)
            if not alone:
                better = inside.sum() > within.sum()
                return i + 1, trees.where(better, other, population), jnp.where(better, inside, within)
            taken = inside & ~within
            rows = lambda new, old: jnp.where(taken.reshape(-1, *(1,) * (jnp.ndim(old) - 1)), new, old)
            genomes = jax.tree.map(rows, other.genomes, population.genomes)
            return i + 1, dataclasses.replace(population, genomes=genomes), within | inside

        start = (jnp.ones((), jnp.int32), trees.strong(first), self._within(first))
        return jax.lax.while_loop(going, again, start)[1]

    def _within(self, population: Population) -> Array:
        """Which candidates lie inside the box, (n,) bool, but for coordinates that it holds; those not asked count."""

        def one(genome: Any) -> Array:
            candidate = population.decode(genome)
            walls = bounds.sides(self.lower, self.upper, candidate)
            inside = []
            for x, wall in zip(jax.tree.leaves(candidate), walls, strict=True):
                low, high = (jnp.asarray(w).astype(x.dtype) for w in (wall.low, wall.high))
                inside.append((((x >= low) & (x <= high)) | (low == high)).all())
            return jnp.stack(inside).all()

        within = jax.vmap(one)(population.genomes)
        return within if population.active is None else within | ~population.active

    def tell(self, state: Any, population: Population, answers: Any) -> Any:
        return self.strategy.tell(state, population, answers)

    def recommend(self, state: Any) -> Params:
        return self.strategy.recommend(state)


def resampled(strategy: Any, lower: Params = None, upper: Params = None, *, tries: int = 20) -> Reparameterized:
    """`strategy` with candidates kept in [lower, upper]: one outside is drawn again, up to `tries` times.

    What is still outside after that is mirrored, as by `bounded`. Candidates that a distribution draws one by one (a
    strategy with `dispersion` or `moved`) are replaced one by one; for any other strategy the draw with the most
    candidates inside is taken. Where the optimum lies at a wall in many dimensions, nearly every candidate is outside.

    Args:
        strategy: any strategy, including first-order ones, whose one candidate is mirrored.
        lower, upper: numbers, or trees like the parameters; for an array, also a list of numbers. None means no wall;
            equal bounds hold a coordinate.
        tries: how often to draw again, at least 1.

    Raises:
        ValueError: if a bound is NaN or a lower bound is above its upper one; at `init` if the start is outside or the
            bounds do not fit the parameters.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> f = lambda x: jnp.sum((x - jnp.array([0.5, 3.0])) ** 2)
    >>> minimize(f, jnp.zeros(2), resampled(cma_es(8), -1.0, 1.0), generations=100).best.round(2).tolist()
    [0.5, 1.0]
    """
    check_strategy(strategy)
    check_popsize(tries, 1, name="tries")
    lower, upper = bounds.opened(lower, upper)
    redrawn = Redrawn(strategy, lower, upper, tries)
    return Reparameterized(redrawn, Reflection(lower, upper), Partial(bounds.inside, lower=lower, upper=upper))
