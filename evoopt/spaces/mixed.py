"""Strategies with a distribution over a space: whole numbers that never freeze, categories with their own distribution.

Numbers (whole ones and two-way choices too) and the keys of orders are coordinates of the strategy; `whole` says how
whole numbers and orders are kept from freezing. A category of more than two choices has no coordinates: `categories`
learns its probabilities beside the strategy's distribution, from the same ranking. When that was chosen, one-hot
coordinates took 8 times as many evaluations: SphereCOM, EllipsoidCOM, SphereCLO and EllipsoidCLO of the CatCMA paper
with 5 numbers and 5 categories of 5 choices to 1e-8 took 1090, 1900, 1135 and 1935 (medians of 10 seeds) against 8764,
17318, 8722 and 17871; `cmaes.CatCMA` takes 1024, 2692, 1091 and 2629.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import bounds, injection, trees
from evoopt import noise as noises
from evoopt.answers import answered, as_values, best_place, told
from evoopt.population import Population
from evoopt.spaces import categories, numbers, whole
from evoopt.spaces.kinds import Categorical, Integer, Permutation
from evoopt.spaces.space import Space
from evoopt.stopping import Dispersion
from evoopt.strategies.covariance import recombination
from evoopt.types import Array, Key, Params, pytree, static

MOST_MARGIN = 0.2  # of neighbours in an order, where 1 / (d popsize) is more: in one or two dimensions


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which variables are coordinates and which have a distribution of their own."""

    space: Space

    @property
    def numbers(self) -> dict[str, Any]:
        """The variables that are coordinates, in the order of the vector."""
        found = {n: v for n, v in self.space.free.items() if not isinstance(v, Categorical) or v.k == 2}
        return dict(sorted(found.items()))

    @property
    def choices(self) -> dict[str, Categorical]:
        """The categories of more than two choices."""
        return {n: v for n, v in sorted(self.space.free.items()) if n not in self.numbers}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of choices of each category, elements of arrays one by one."""
        return tuple(v.k for v in self.choices.values() for _ in range(int(np.prod(v.shape))))

    @property
    def integers(self) -> dict[str, Integer]:
        """The coordinates that are whole numbers."""
        whole = {n: v.places if isinstance(v, Categorical) else v for n, v in self.numbers.items()}
        return {n: v for n, v in whole.items() if isinstance(v, Integer)}

    @property
    def whole(self) -> np.ndarray:
        """Which coordinates are whole numbers, (d,) bool."""
        return self._vector(lambda n, v: np.full(v.coordinates, n in self.integers)).astype(bool)

    @property
    def held(self) -> np.ndarray:
        """Which coordinates go through M and A, (d,) bool: whole numbers, and the keys of orders."""
        orders = self._vector(lambda n, v: np.full(v.coordinates, isinstance(v, Permutation)))
        return self.whole | orders.astype(bool)

    def orders(self) -> Iterator[slice]:
        """Where the vector has the keys of each order."""
        at = 0
        for v in self.numbers.values():
            d = int(np.prod(v.coordinates))
            if isinstance(v, Permutation):
                yield slice(at, at + d)
            at += d

    @property
    def walls(self) -> tuple[np.ndarray, np.ndarray]:
        """Where whole numbers end, (d,); infinite for the others."""
        side = lambda i: self._vector(lambda n, v: v.box()[i] if n in self.integers else np.full(v.coordinates, np.inf))
        low, high = side(0), side(1)
        return np.where(self.whole, low, -np.inf), high

    def _vector(self, one: Any) -> np.ndarray:
        return np.concatenate([np.asarray(one(n, v)).reshape(-1) for n, v in self.numbers.items()] or [np.zeros(0)])

    def cells(self, vector: Array) -> tuple[Array, Array, Array]:
        """The whole numbers of a vector, where their cells' middles are and the steps between them, each (d,).

        For other coordinates 0, the vector, and 0.
        """
        u = self.tree(vector)
        kind, found = vector.dtype, []
        for n in self.numbers:
            if n in self.integers:
                i = self.integers[n].decode(u[n])
                found.append((i, self.integers[n].encode(i).astype(kind), self.integers[n].step(u[n])))
            else:
                found.append((jnp.zeros(u[n].shape, jnp.int32), u[n], jnp.zeros_like(u[n])))
        one, two, three = (jnp.concatenate([part.reshape(-1) for part in parts]) for parts in zip(*found, strict=True))
        return one, two, three

    def first(self, u: dict[str, Array]) -> tuple[Array, Array]:
        """The choices of u, (c,) int32, and whether a user chose them: by a `start`, or by a u elsewhere, (c,) bool."""
        places = {n: v.index(jnp.asarray(u[n])) for n, v in self.choices.items()}
        given = {n: v.given | (jnp.asarray(u[n]) != 0).any(axis=-1) for n, v in self.choices.items()}
        places, given = (jnp.concatenate([of[n].reshape(-1) for n in self.choices]) for of in (places, given))
        return places, given

    def start(self) -> dict[str, np.ndarray]:
        """The u that the strategy starts from: of the numbers; idle coordinates where there are none."""
        origin = self.space.origin()
        return {n: origin[n] for n in self.numbers} or {"": np.zeros(len(self.sizes), numbers.real_kind())}

    def clipped(self, vector: Array) -> Array:
        """A mean with whole numbers in their range. Candidates fold: were all beyond the end alike, it would widen."""
        return jnp.clip(vector, *(side.astype(vector.dtype) for side in self.walls))

    def tree(self, vector: Array) -> dict[str, Array]:
        """A vector (d,) as u of the numbers."""
        shapes = {n: v.coordinates for n, v in self.numbers.items()}
        ends = np.cumsum([int(np.prod(s)) for s in shapes.values()])[:-1].tolist()
        parts = jnp.split(vector, ends) if shapes else []
        return {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}

    def candidate(self, vector: Array, drawn: Array | None) -> Any:
        """The candidate of a vector (d,) and of choices (c,)."""
        u = self.tree(vector) if self.numbers else {}
        values = {n: v.decode(u[n]) for n, v in self.numbers.items()}
        at = 0
        for n, v in self.choices.items():
            count = int(np.prod(v.shape))
            values[n] = v.value(drawn[at : at + count].reshape(v.shape))  # type: ignore[index]
            at += count
        return self.space.built(values)


class Genome(NamedTuple):
    """A candidate: what the strategy made of it, and the choices."""

    inner: Any
    choices: Array | None  # (c,) int32, None without categories


class State(NamedTuple):
    """The strategy's state, the distribution that candidates come from, and the best candidate."""

    inner: Any
    mean: Array  # (d,), M; where nothing is held it is the strategy's
    scale: Array  # (d,), A; 1 where numbers are not whole
    categories: categories.State | None
    best: Params
    value: Array  # (), of the best

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class Drawn:
    """decode: genome -> candidate at M + A (x - m), with its choices."""

    inner: Any
    center: Array  # (d,), m
    mean: Array
    scale: Array
    layout: Layout = static()

    def vector(self, genome: Genome) -> Array:
        """v, (d,)."""
        x = trees.flatten(self.inner(genome.inner))
        # Only what is held goes through M, so the others have the bits of a search without it.
        return jnp.where(self.layout.held, self.mean + self.scale * (x - self.center), x) if self.layout.numbers else x

    def __call__(self, genome: Genome) -> Params:
        return self.layout.candidate(self.vector(genome), genome.choices)

    def present(self, candidate: Params) -> Any:
        """What an objective in Python gets."""
        return self.layout.space.presented(candidate)


@pytree
class Mixed:
    """A strategy with a distribution over a space; see `over`."""

    strategy: Any
    space: Space = static()

    @property
    def layout(self) -> Layout:
        return Layout(self.space)

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    def init(self, params: Params, key: Key) -> State:
        layout = self.layout
        self.space.checked(params)
        u = {n: params[n] for n in layout.numbers} or layout.start()
        inner = trees.strong(self.strategy.init(u, key))
        mean = self._width(inner).mean
        cats = None
        if layout.sizes:
            cats = categories.initial(layout.sizes, np.dtype(mean.dtype))
            cats = categories.started(cats, layout.sizes, *layout.first(params))
        most = None if cats is None else _likeliest(cats)
        start = self.space.decode(params) if cats is None else layout.candidate(mean, most)
        inf = jnp.full((), jnp.inf, jnp.result_type(float))
        return State(self._centered(inner), mean, jnp.ones_like(mean), cats, start, inf)

    def ask(self, state: State, key: Key) -> Population:
        inner = self.strategy.ask(state.inner, key)
        center = self._mean(state.inner)
        drawn = None
        if state.categories is not None:
            drawn = categories.sampled(state.categories, noises.fold_in(noises.replayable(key), _CHOICES), len(inner))
        decode = Drawn(inner.decode, center, state.mean, state.scale, self.layout)
        return inner.with_decode(decode).with_genomes(Genome(inner.genomes, drawn))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        answers = told(population, answers)
        values, layout, genomes = as_values(answers), self.layout, population.genomes
        inner = self.strategy.tell(state.inner, _inner(population), answers)
        weights = recombination.logarithmic(values, state.mean.dtype)
        mean, scale = state.mean, state.scale
        if layout.numbers:
            mean, scale = self._corrected(state, inner, population, weights)
        cats = state.categories
        if cats is not None:
            cats = categories.learned(cats, layout.sizes, genomes.choices, weights.positive)
            cats = trees.where(_restarted(state.inner, inner), categories.initial(layout.sizes, cats.q.dtype), cats)
        i = best_place(values)
        value = values[i].astype(state.value.dtype)
        better = answered(value) & (value < state.value)
        candidate = population.decode(jax.tree.map(lambda g: g[i], genomes))
        new = State(
            self._centered(inner), mean, scale, cats,
            trees.where(better, candidate, state.best), jnp.where(better, value, state.value),
        )  # fmt: skip
        return trees.where(jnp.isfinite(values).any(), new, state)._replace(inner=new.inner)

    @property
    def moved(self) -> Any:
        """The candidates at other points, for injection; see `evoopt.injection`."""
        moved = self.strategy.moved  # an AttributeError where the strategy has none

        def all_moved(state: State, population: Population, points: Params) -> Population:
            decode: Any = population.decode
            layout, inner = self.layout, _inner(population)
            stays, u = injection.same(population, points), jax.vmap(self.space.located)(points)
            kept = lambda old, new: jnp.where(stays.reshape(-1, *(1,) * (old.ndim - 1)), old, new.astype(old.dtype))
            choices = population.genomes.choices
            if choices is not None:
                places = [layout.space.free[n].index(u[n]).reshape(len(population), -1) for n in layout.choices]
                choices = kept(choices, jnp.concatenate(places, axis=1))
            if layout.numbers:
                v = injection.vectors({n: u[n] for n in layout.numbers}, decode.mean.dtype)
                x = jnp.where(layout.held, decode.center + (v - decode.mean) / decode.scale, v)
                inner = moved(state.inner, inner, jax.tree.map(kept, inner.decoded(), jax.vmap(layout.tree)(x)))
            new = population.with_decode(Drawn(inner.decode, decode.center, decode.mean, decode.scale, layout))
            return new.with_genomes(Genome(inner.genomes, choices))

        return all_moved

    def recommend(self, state: State) -> Params:
        """The middle of the distribution and the likeliest choices, if that is what the strategy recommends of its own;
        otherwise the best candidate.
        """
        middle = trees.flatten(self.strategy.recommend(state.inner)) == self._mean(state.inner)
        most = None if state.categories is None else _likeliest(state.categories)
        return trees.where(middle.all(), self.layout.candidate(state.mean, most), state.best)

    @property
    def dispersion(self) -> Any:
        """The width of the distribution that candidates come from, in units of u. Without numbers there is none."""
        if not self.layout.numbers or not hasattr(self.strategy, "dispersion"):
            raise AttributeError("dispersion")
        return self._dispersion

    def _dispersion(self, state: State, i: Array) -> Dispersion:
        inner = self.strategy.dispersion(state.inner, i)
        a = state.scale
        return inner._replace(mean=state.mean, std=a * inner.std, path=a * inner.path, axis=a * inner.axis)

    def _width(self, inner: Any) -> Dispersion:
        width = getattr(self.strategy, "running_dispersion", None) or self.strategy.dispersion
        return width(inner, jnp.zeros((), jnp.int32))

    def _mean(self, inner: Any) -> Array:
        return self._width(inner).mean

    def _corrected(self, state: State, inner: Any, population: Population, weights: Any) -> tuple[Array, Array]:
        """M and A after the strategy moved."""
        layout = self.layout
        decode: Any = population.decode  # a `Drawn`
        old, new = self._mean(state.inner), self._width(inner)
        kind = new.mean.dtype
        if not layout.held.any():
            return new.mean, state.scale
        mean, scale = state.mean + state.scale * (new.mean - old), state.scale
        if layout.whole.any():
            # Folded, as they are decoded: what is beyond an end takes no part in centering.
            v = bounds.fold(jax.vmap(decode.vector)(population.genomes), *layout.walls)
            cells, centers, _ = jax.vmap(layout.cells)(v)
            own, _, steps = layout.cells(state.mean)
            mean = layout.clipped(mean + whole.centering(v, cells, centers, own, weights.positive))
            scale = jnp.where(layout.whole, whole.widened(scale, new.std, steps, weights.mu_eff), scale)
        again = _restarted(state.inner, inner)
        mean, scale = jnp.where(again, new.mean, mean), jnp.where(again, jnp.ones_like(mean), scale)
        alpha = jnp.minimum(MOST_MARGIN, 1 / (len(layout.held) * population.asked().astype(kind)))
        for keys in layout.orders():
            mean = mean.at[keys].set(whole.swappable(mean[keys], new.std[keys], alpha))
        sound = layout.held & jnp.isfinite(mean) & jnp.isfinite(scale)
        mean = jnp.where(sound, mean, jnp.where(layout.held, state.mean, new.mean))
        return mean, jnp.where(sound, scale, state.scale)

    def _centered(self, inner: Any) -> Any:
        """The strategy with its mean at 0 in what is held, where M takes its part: however small sigma becomes,
        floats hold steps from 0. A state that keeps its mean elsewhere stays as it is.
        """
        mean, held = getattr(inner, "mean", None), self.layout.held
        if mean is None or getattr(mean, "shape", None) != held.shape or not held.any():
            return inner
        return inner._replace(mean=jnp.where(held, 0, mean))


def _inner(population: Population) -> Population:
    """The strategy's own population."""
    return population.with_decode(population.decode.inner).with_genomes(population.genomes.inner)  # type: ignore[attr-defined]


def _likeliest(cats: categories.State) -> Array:
    return jnp.argmax(cats.q, axis=1).astype(jnp.int32)


def _restarted(old: Any, new: Any) -> Array:
    """Whether a strategy that restarts began again: its distribution is another one."""
    if not hasattr(new, "restarts"):
        return jnp.asarray(False)
    return new.restarts != old.restarts


_CHOICES = 0x63686F69  # folded into the key for the choices
