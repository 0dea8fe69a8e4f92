"""Every algorithm of evosax behind the protocol: its long tail, and its learned optimizers with their bundled weights.

Source: Lange, "evosax: JAX-based evolution strategies", arXiv 2212.04180; written against evosax 0.3.2.

evosax's `ask` changes the state too. Here it is pure: the state as asked, and the key, travel with the population, in its
`decode`, to `tell`. evosax sees vectors (d,) in the default float type; structure and types of the candidates are ours.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.population import Population
from evoopt.strategy import check_popsize, settle, told, value
from evoopt.types import Array, Key, Params, error, pytree, static
from evoopt.utilities import as_values

TELL = 2**32 - 1  # folded into the key of `ask` for `tell`; evosax splits and folds with small numbers only
TRIAL = 1024  # dimensions of the algorithm that is built to see whether its arguments are accepted

_as_evosax = functools.partial(jax.numpy_dtype_promotion, "standard")  # evosax mixes types; ours may be strict


class State(NamedTuple):
    """Where the algorithm is."""

    start: Array  # (d,), where the search began
    unravel: trees.Unravel  # vector (d,) -> params; without leaves
    inner: Any  # evosax's own state
    started: Array  # () bool, whether there was a first generation
    unanswered: Array  # () int32, generations without a finite answer
    rejected: Array  # () int32, generations whose update was dropped because evosax made it NaN or infinite


@pytree
class Asked:
    """decode: vector (d,) -> params. It also carries what `ask` did to the state, for `tell`."""

    state: State
    key: Key

    def __call__(self, genome: Array) -> Params:
        return self.state.unravel(genome)


@pytree
class Evosax:
    """An evosax algorithm; see `from_evosax`."""

    algorithm: Any = static()  # called with population_size, solution, metrics_fn and the options
    popsize: int = static()
    options: tuple[tuple[str, Any], ...] = static()  # of the constructor
    names: tuple[str, ...] = static()  # of the hyperparameters that are not the default
    values: tuple[Any, ...]  # of these
    spread: float
    oracle = staticmethod(value)

    def init(self, params: Params, key: Key) -> State:
        key = noises.replayable(key)
        with _as_evosax():
            x, unravel = trees.ravel(trees.searchable(params))
            x = x.astype(jnp.result_type(float))
            algorithm, hyper = self._built(x.size)
            if _has_population(algorithm):  # placeholders: evosax starts from an evaluated population
                n = self.popsize
                inner = algorithm.init(key, jnp.tile(x, (n, 1)), jnp.full(n, jnp.inf, x.dtype), hyper)
            elif _has_means(algorithm):  # equal means would not repel each other
                means = self._around(x, noises.fold_in(key, TELL), algorithm.num_populations)
                inner = algorithm.init(key, means, hyper)
            else:
                inner = algorithm.init(key, x, hyper)
        zero = jnp.zeros((), jnp.int32)
        return State(x, unravel, trees.strong(inner), jnp.zeros((), bool), zero, zero)

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        x = state.start
        algorithm, hyper = self._built(x.size)
        with _as_evosax():
            like = (jax.ShapeDtypeStruct((self.popsize, x.size), x.dtype), state.inner)
            ask = lambda: _typed(algorithm.ask(key, state.inner, hyper), like)
            if _has_population(algorithm):
                first = lambda: (self._around(x, key, self.popsize), state.inner)
                genomes, inner = jax.lax.cond(state.started, ask, first)
            else:
                genomes, inner = ask()
            if "sampling_fn" in _arguments(self.algorithm) and "sampling_fn" not in dict(self.options):
                genomes = x + jnp.asarray(self.spread, x.dtype) * genomes  # random search: around x, not around 0
        return Population(Asked(state._replace(inner=inner), key), genomes)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        x, asked, key = population.genomes, population.decode.state, noises.fold_in(population.decode.key, TELL)
        algorithm, hyper = self._built(x.shape[1])
        y = _worst_for_none(values).astype(x.dtype)
        with _as_evosax():
            if _has_means(algorithm):  # evosax asks with one leading axis, and wants two in `tell`
                x = x.reshape(algorithm.num_populations, -1, x.shape[1])
            tell = lambda: _typed(algorithm.tell(key, x, y, asked.inner, hyper)[0], asked.inner)
            if _has_population(algorithm):
                start = lambda: _typed(algorithm.init(key, x, y, hyper), asked.inner)
                inner = jax.lax.cond(asked.started, tell, start)
            else:
                inner = tell()
        broken = _broken(state.inner, inner)
        kept = trees.where(broken, state.inner, inner)
        rejected = state.rejected + broken.astype(jnp.int32)
        return settle(state, State(state.start, state.unravel, kept, state.started | ~broken, state.unanswered, rejected), values)

    def recommend(self, state: State) -> Params:
        algorithm, _ = self._built(state.start.size)
        if _has_population(algorithm):
            x = state.inner.best_solution
        elif _has_means(algorithm):
            x = state.inner.mean[jnp.argmin(state.inner.best_fitness)]
        else:
            x = state.inner.mean
        return state.unravel(x)

    def _built(self, d: int) -> tuple[Any, Any]:
        algorithm, hyper = _build(self.algorithm, self.popsize, self.options, d, jnp.result_type(float))
        typed = lambda new, default: jnp.asarray(new, jnp.result_type(default))
        new = {n: jax.tree.map(typed, v, getattr(hyper, n)) for n, v in zip(self.names, self.values, strict=True)}
        return algorithm, hyper.replace(**new)

    def _around(self, x: Array, key: Key, n: int) -> Array:
        """n points (n, d) around x, the first of them x."""
        z = jax.random.normal(key, (n, x.size), x.dtype).at[0].set(0)
        return x + jnp.asarray(self.spread, x.dtype) * z


def _has_population(algorithm: Any) -> bool:
    return hasattr(algorithm, "get_population")  # of evosax's PopulationBasedAlgorithm


def _has_means(algorithm: Any) -> bool:
    return hasattr(algorithm, "num_populations")  # of the Stein variational ones


def _arguments(algorithm: Any) -> Any:
    return inspect.signature(algorithm).parameters


def _no_metrics(*_: Any) -> dict:
    return {}


@functools.lru_cache(maxsize=256)
def _build(algorithm: Any, popsize: int, options: Any, d: int, dtype: Any) -> tuple[Any, Any]:
    """evosax's object and its default hyperparameters: one object for all calls, for evosax compiles once for each."""
    names, options = _arguments(algorithm), {"metrics_fn": _no_metrics} | dict(options)
    if "num_populations" in names:
        options.setdefault("num_populations", 2)
        popsize //= options["num_populations"]
    if "sampling_fn" in names:
        options.setdefault("sampling_fn", functools.partial(jax.random.normal, shape=(d,), dtype=dtype))
    with jax.ensure_compile_time_eval(), _as_evosax():  # so that no tracer stays in the object
        built = algorithm(population_size=popsize, solution=jnp.zeros(d, dtype), **options)
        return built, built.default_params


def _typed(new: Any, old: Any) -> Any:
    """`new` with the types of `old`: evosax's counters and scalars come back weakly typed."""
    return jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), new, old)


def _worst_for_none(values: Array) -> Array:
    ok = jnp.isfinite(values)
    return jnp.where(ok, values, jnp.where(ok.any(), jnp.max(values, where=ok, initial=-jnp.inf), 0))


def _broken(old: Any, new: Any) -> Array:
    """Whether a number that was finite no longer is: (). evosax starts some fields at NaN or infinity."""
    lost = jax.tree.map(lambda o, n: (jnp.isfinite(o) & ~jnp.isfinite(n)).any(), old, new)
    return jnp.stack(jax.tree.leaves(lost)).any()
