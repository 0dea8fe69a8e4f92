"""The genetic algorithm of Deep Neuroevolution: Gaussian mutation, truncation selection, elitism, genomes of seeds.

Source: Such, Madhavan, Conti, Lehman, Stanley, Clune, "Deep neuroevolution: genetic algorithms are a competitive
alternative for training deep neural networks for reinforcement learning", arXiv 1712.06567, algorithm 1 and the compact
encoding of equations (1) and (2).

A genome is a chain of mutation seeds: theta = base + sum_k sigma_k eps(seed_k), added in the order of the chain, so its
replay is exact. The paper's chains grow forever. Here they end at `chain` links: when a parent's chain is full, the
parents (not the population) are materialised as the bases of new, empty chains, which changes nothing in the search.
So a candidate costs 3 `chain` + 2 numbers and at most `chain` draws of noise, and the whole search the memory of
`parents` networks, whatever the popsize.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class Chain(NamedTuple):
    """A genome; with a leading axis, several."""

    base: Array  # () int32, the place of the network it starts from
    seeds: Array  # (chain, 2) uint32, key data of the mutations
    powers: Array  # (chain,) float32, sigma of each mutation
    length: Array  # () int32, links in use


class State(NamedTuple):
    """The state of the genetic algorithm."""

    bases: Params  # each leaf (parents, ...), the networks where chains start
    parents: Chain  # (parents,), best first
    values: Array  # (parents,), of the parents; +inf before the first generation
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class Replay:
    """decode: a chain -> its base plus its mutations, in order. Equation (1) of the paper."""

    bases: Params
    noise: Any = static()

    def __call__(self, genome: Chain) -> Params:
        def mutate(link: Array, params: Params) -> Params:
            key = jax.random.wrap_key_data(genome.seeds[link], impl="threefry2x32")
            eps = self.noise.draw(key, params)
            return jax.tree.map(lambda p, e: p + _half(genome.powers[link].astype(p.dtype)) * _half(e), params, eps)

        return jax.lax.fori_loop(0, genome.length, mutate, jax.tree.map(lambda b: b[genome.base], self.bases))


def _half(x: Array) -> Array:
    """X with half the digits. The product of two such numbers is exact, so a program that fuses it with the following
    sum (and rounds once) gives the same bits as one that does not: the replay of a chain is exact.
    """
    kind = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant // 2)


@pytree
class GeneticAlgorithm:
    """Mutation-only genetic algorithm with truncation selection; see `deep_ga`."""

    popsize: int = static()
    sigma: float  # mutation power
    parents: int = static()
    elites: int = static()
    chain: int = static()
    noise: Any = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2)
        check_popsize(self.parents, 1, name="parents")
        check_popsize(self.chain, 1, name="chain")
        if not (self.elites <= self.parents <= self.popsize and 0 <= self.elites < self.popsize):
            raise error(
                "elites <= parents <= popsize, and elites < popsize",
                f"elites={self.elites}, parents={self.parents}, popsize={self.popsize}",
                "a small popsize with the default number of parents",
            )

    def init(self, params: Params, key: Key) -> State:
        del key
        params, t = trees.searchable(params), self.parents
        parents = Chain(
            jnp.zeros(t, jnp.int32),
            jnp.zeros((t, self.chain, 2), jnp.uint32),
            jnp.zeros((t, self.chain), jnp.float32),
            jnp.zeros(t, jnp.int32),
        )
        bases = jax.tree.map(lambda p: jnp.repeat(p[None], t, axis=0), params)
        return State(bases, parents, jnp.full(t, jnp.inf, jnp.result_type(float)), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key_parent, key_mutation = jax.random.split(noises.replayable(key))
        n = self.popsize - self.elites
        place = jax.random.randint(key_parent, (n,), 0, self.parents)  # uniform among the parents
        seeds = jax.random.key_data(jax.random.split(key_mutation, n))

        def child(parent: Chain, seed: Array) -> Chain:
            link = parent.length
            return Chain(
                parent.base,
                parent.seeds.at[link].set(seed),
                parent.powers.at[link].set(jnp.asarray(self.sigma, jnp.float32)),
                link + 1,
            )

        children = jax.vmap(child)(jax.tree.map(lambda x: x[place], state.parents), seeds)
        elite = jax.tree.map(lambda x: x[: self.elites], state.parents)  # unchanged, and asked again
        genomes = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), elite, children)
        return Population(Replay(state.bases, self.noise), genomes)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        new = values.astype(state.values.dtype)
        # A lost elite keeps its old value: nothing speaks against it.
        kept = jnp.where(answered(new[: self.elites]), new[: self.elites], state.values[: self.elites])
        new = jnp.concatenate([kept, new[self.elites :]])
        # Truncation: the best answered candidates, filled up with the old parents if there are too few.
        pool = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), population.genomes, state.parents)
        pool_values = jnp.concatenate([new, state.values])
        rank_class = jnp.concatenate([jnp.where(answered(new), 0, 2), jnp.ones(self.parents, jnp.int32)])
        best = jnp.lexsort((pool_values, rank_class))[: self.parents]
        parents = jax.tree.map(lambda x: x[best], pool)
        bases, parents = jax.lax.cond(
            (parents.length >= self.chain).any(), self._rebase, lambda b, p: (b, p), state.bases, parents
        )
        return settle(state, State(bases, parents, pool_values[best], state.unanswered), values)

    def recommend(self, state: State) -> Params:
        best = jax.tree.map(lambda x: x[0], state.parents)
        return Replay(state.bases, self.noise)(best)

    def _rebase(self, bases: Params, parents: Chain) -> tuple[Params, Chain]:
        networks = jax.lax.map(Replay(bases, self.noise), parents)
        zeros = jax.tree.map(jnp.zeros_like, parents)
        return networks, zeros._replace(base=jnp.arange(self.parents, dtype=jnp.int32))


def deep_ga(
    popsize: int = 256,
    *,
    sigma: float = 0.05,
    parents: int | None = None,
    elites: int = 1,
    chain: int = 8,
    noise: Any = noises.gaussian,
) -> GeneticAlgorithm:
    """The genetic algorithm of Such et al. 2017.

    Deviation: the paper re-evaluates the ten best to find its one elite; here the elites are asked again in every
    generation, so a lucky one does not stay. The starting point replaces the paper's random networks.

    Args:
        popsize: candidates per generation, N + 1 in the paper (elites included).
        sigma: mutation power, in units of the parameters.
        parents: T, how many survive truncation; by default a fiftieth of the popsize, at least 4 (20 of 1000).
        elites: best parents kept unchanged.
        chain: mutations a genome may hold before parents are materialised.
        noise: distribution of a mutation.

    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), deep_ga(64, sigma=0.1), generations=100)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    parents = max(min(4, popsize), popsize // 50) if parents is None else parents
    return GeneticAlgorithm(popsize, sigma, parents, elites, chain, noise)
