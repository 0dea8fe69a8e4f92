"""A generation's candidates: what they share is stored once, what differs n times, and neither is materialised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from evoopt.types import Answers, Objective, Params, error, pytree

Genome = TypeVar("Genome")

ITERATED_AT_ONCE = 64  # candidates decoded together by `for candidate in population`


@pytree
class Population(Generic[Genome]):
    """n candidates: `decode(genomes[i])` is candidate i.

    >>> population = Population(lambda g: {"w": g}, jnp.arange(4.0))
    >>> population.map(lambda p: p["w"] ** 2).tolist()
    [0.0, 1.0, 4.0, 9.0]
    >>> [float(candidate["w"]) for candidate in population[:2]]
    [0.0, 1.0]
    """

    decode: Callable[[Genome], Params]  # a pytree callable, e.g. Partial(perturbed, mean, sigma)
    genomes: Genome  # every leaf has leading axis n

    def map(self, oracle: Objective, *args: Any, each: Any = None, batch_size: int | None = None) -> Answers:
        """`oracle(candidate, *args)` for every candidate; with `each`, `oracle(candidate, *args, each_i)`.

        Args:
            oracle: what is asked of a candidate, e.g. `strategy.oracle(objective)`.
            *args: the same for all candidates, e.g. a batch of data.
            each: a pytree with leading axis n, of which candidate i gets row i; None for nothing.
            batch_size: candidates evaluated at once. None is one at a time, in the memory of one evaluation. The
                population is evaluated in micro-batches of exactly this size (the last one padded), so that a slice
                of whole micro-batches has the same bits wherever it is evaluated.

        Returns:
            The answers, each leaf with leading axis n.
        """

        def one(row: Any) -> Any:
            genome, own = row
            return oracle(self.decode(genome), *args, *(() if each is None else (own,)))

        rows = (self.genomes, each)
        if batch_size is None:
            return jax.lax.map(one, rows)
        n, size = len(self), batch_size
        if size < 1:
            raise error("batch_size of at least 1", str(size), "a division that rounded down to zero")
        padding = -n % size
        if padding:  # repeats of the last row: valid candidates, whose answers are dropped
            rows = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], padding, axis=0)]), rows)
        batches = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
        if n + padding == size:
            return jax.tree.map(lambda x: x[:n], jax.vmap(one)(rows))
        answers = jax.lax.map(jax.vmap(one), batches)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], answers)

    def decoded(self) -> Params:
        """All candidates, each leaf with leading axis n: the memory of n times the parameters."""
        return jax.vmap(self.decode)(self.genomes)

    def __getitem__(self, index: Any) -> Any:
        """A sub-population for a slice or an array of places, which shares `decode`; a candidate for an int."""
        genomes = jax.tree.map(lambda g: g[index], self.genomes)
        return self.decode(genomes) if isinstance(index, int) else dataclasses.replace(self, genomes=genomes)

    def __len__(self) -> int:
        return jax.tree.leaves(self.genomes)[0].shape[0]

    def __iter__(self) -> Iterator[Params]:
        """The decoded candidates, as NumPy arrays in the structure of the parameters."""
        for start in range(0, len(self), ITERATED_AT_ONCE):
            block = jax.device_get(self[start : start + ITERATED_AT_ONCE].decoded())
            for i in range(min(ITERATED_AT_ONCE, len(self) - start)):
                yield jax.tree.map(lambda x, i=i: x[i], block)
