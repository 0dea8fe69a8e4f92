"""Every evosax algorithm behind this protocol, including its learned optimizers with their bundled weights.

Source: Lange, "evosax: JAX-based evolution strategies", arXiv 2212.04180; written against evosax 0.3.2.

In evosax, `ask` changes the state too. Here it is pure: the changed state travels to `tell` with the population, in
`decode`. evosax sees vectors (d,) in the default float type; candidates have the structure and types of the parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import as_values, settle, told
from evoopt.checks import check_popsize, nearest
from evoopt.population import Population
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static

TELL = 2**32 - 1  # folded into the key of `ask` for `tell`; evosax folds in small numbers only
TRIAL = 1024  # dimensions of the trial build that checks an algorithm's arguments

_as_evosax = functools.partial(jax.numpy_dtype_promotion, "standard")  # evosax mixes types; the caller may be strict


class State(NamedTuple):
    """The state of the algorithm."""

    start: Array  # (d,), the starting point
    unravel: Callable[[Array], Params]  # vector (d,) -> params; without leaves
    evosax: Any  # evosax's own state
    started: Array  # () bool, whether a generation was told
    unanswered: Array  # () int32, generations without a finite answer
    rejected: Array  # () int32, updates dropped because evosax made them NaN or infinite


@pytree
class Asked:
    """decode: vector (d,) -> params. It also carries the state that `ask` changed, for `tell`."""

    state: State
    key: Key

    def __call__(self, genome: Array) -> Params:
        return self.state.unravel(genome)


@pytree
class Evosax:
    """An evosax algorithm; see `from_evosax`."""

    spread: float
    values: tuple[Any, ...]  # of the hyperparameters that differ from their defaults
    names: tuple[str, ...] = static()  # of those hyperparameters
    algorithm: Any = static()  # called with population_size, solution, metrics_fn and the options
    popsize: int = static()
    options: tuple[tuple[str, Any], ...] = static()  # of the constructor
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
            like = (jax.ShapeDtypeStruct((self.popsize, x.size), x.dtype), state.evosax)
            ask = lambda: _typed(algorithm.ask(key, state.evosax, hyper), like)
            if _has_population(algorithm):
                first = lambda: (self._around(x, key, self.popsize), state.evosax)
                genomes, inner = jax.lax.cond(state.started, ask, first)
            else:
                genomes, inner = ask()
            if _required(self.algorithm, "sampling_fn") and "sampling_fn" not in dict(self.options):
                genomes = x + jnp.asarray(self.spread, x.dtype) * genomes  # random search: around x, not around 0
        return Population(Asked(state._replace(evosax=inner), key), genomes)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        x, asked, key = population.genomes, population.decode.state, noises.fold_in(population.decode.key, TELL)
        algorithm, hyper = self._built(x.shape[1])
        y = _worst_for_none(values).astype(x.dtype)
        with _as_evosax():
            if _has_means(algorithm):  # evosax has one leading axis in `ask` but two in `tell`
                x = x.reshape(algorithm.num_populations, -1, x.shape[1])
            tell = lambda: _typed(algorithm.tell(key, x, y, asked.evosax, hyper)[0], asked.evosax)
            if _has_population(algorithm):
                start = lambda: _typed(algorithm.init(key, x, y, hyper), asked.evosax)
                inner = jax.lax.cond(asked.started, tell, start)
            else:
                inner = tell()
        broken = _broken(state.evosax, inner)
        kept = trees.where(broken, state.evosax, inner)
        new = state._replace(
            evosax=kept, started=state.started | ~broken, rejected=state.rejected + broken.astype(jnp.int32)
        )
        return settle(state, new, values)

    def recommend(self, state: State) -> Params:
        algorithm, _ = self._built(state.start.size)
        if _has_population(algorithm):
            x = state.evosax.best_solution
        elif _has_means(algorithm):
            x = state.evosax.mean[jnp.argmin(state.evosax.best_fitness)]
        else:
            x = state.evosax.mean
        return state.unravel(x)

    def _built(self, d: int) -> tuple[Any, Any]:
        algorithm, hyper = _build(self.algorithm, self.popsize, self.options, d, jnp.result_type(float))
        typed = lambda new, default: jnp.asarray(new, jnp.result_type(default))
        new = {n: jax.tree.map(typed, v, getattr(hyper, n)) for n, v in zip(self.names, self.values, strict=True)}
        return algorithm, hyper.replace(**new)

    def _around(self, x: Array, key: Key, n: int) -> Array:
        """Points (n, d) around x; the first is x."""
        z = jax.random.normal(key, (n, x.size), x.dtype).at[0].set(0)
        return x + jnp.asarray(self.spread, x.dtype) * z


def _has_population(algorithm: Any) -> bool:
    return hasattr(algorithm, "get_population")  # as evosax's PopulationBasedAlgorithm has


def _has_means(algorithm: Any) -> bool:
    return hasattr(algorithm, "num_populations")  # as the Stein variational algorithms have


def _required(algorithm: Any, name: str) -> bool:
    argument = inspect.signature(algorithm).parameters.get(name)
    return argument is not None and argument.default is argument.empty


def _no_metrics(*_: Any) -> dict:
    return {}


@functools.lru_cache(maxsize=256)
def _build(algorithm: Any, popsize: int, options: Any, d: int, dtype: Any) -> tuple[Any, Any]:
    """An evosax object and its default hyperparameters, cached because evosax compiles once per object."""
    options = {"metrics_fn": _no_metrics} | dict(options)
    if _required(algorithm, "sampling_fn"):
        options.setdefault("sampling_fn", functools.partial(jax.random.normal, shape=(d,), dtype=dtype))
    if argument := inspect.signature(algorithm).parameters.get("num_populations"):
        default = 2 if argument.default is argument.empty else argument.default
        count = options.setdefault("num_populations", default)  # evosax's popsize is per population
        if popsize % count:
            raise error(f"a multiple of num_populations={count}", f"popsize={popsize}", "popsize counts all candidates")
        popsize //= count
    with jax.ensure_compile_time_eval(), _as_evosax():  # leaves no tracer in the object
        built = algorithm(population_size=popsize, solution=jnp.zeros(d, dtype), **options)
        return built, built.default_params


def _typed(new: Any, old: Any) -> Any:
    """`new` with the types of `old`: evosax returns its counters and scalars weakly typed."""
    return jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), new, old)


def _worst_for_none(values: Array) -> Array:
    ok = jnp.isfinite(values)
    return jnp.where(ok, values, jnp.where(ok.any(), jnp.max(values, where=ok, initial=-jnp.inf), 0))


def _broken(old: Any, new: Any) -> Array:
    """Whether a finite number ceased to be finite: (). evosax starts some fields at NaN or infinity."""
    lost = jax.tree.map(lambda o, n: (jnp.isfinite(o) & ~jnp.isfinite(n)).any(), old, new)
    return jnp.stack(jax.tree.leaves(lost)).any()


def _named(name: str) -> Any:
    try:
        from evosax.algorithms import algorithms
    except ImportError as problem:
        cause = "the extra was not installed: pip install evoopt-jax[evosax]"
        raise error("the package evosax", str(problem), cause, ImportError) from problem
    known = {a.__name__: a for a in algorithms.values()} | algorithms
    if name not in known:
        raise error(
            f"the name of an evosax algorithm, such as {', '.join(nearest(name, known)) or ', '.join(algorithms)}",
            repr(name),
            "the paper's name for it, or a name from another version of evosax",
        )
    return known[name]


def from_evosax(
    algorithm: Any, popsize: int, *, spread: float = 1.0, params: dict[str, Any] | None = None, **options: Any
) -> Evosax:
    """Any evosax algorithm.

    NaN, -inf and +inf reach evosax as the worst finite value of their generation: they neither win nor poison. An
    update that evosax itself makes NaN or infinite is dropped and counted in the state's `rejected` (for LM_MA_ES with
    a popsize above 2d, every update). Defaults are evosax's: many of its evolution strategies keep a step size of 1,
    and DiffusionEvolution stands still after its `num_generations`. GuidedES gets no outside gradients here.

    Args:
        algorithm: the class, its name (in `evosax.algorithms.algorithms`), or a `functools.partial` of the class.
        popsize: candidates per generation; for SV_CMA_ES and SV_Open_ES, those of all `num_populations` (2) together.
        spread: standard deviation around the start, in units of the parameters: for the first generation of
            population-based algorithms, the means of the Stein variational ones (the first of either is the start)
            and RandomSearch without a `sampling_fn`. Others have their own, often `params={"std_init": ...}`.
        params: hyperparameters to replace, by name; numbers, so that `jax.vmap` over them works.
        **options: arguments of evosax's constructor. Functions among them work on vectors (d,).

    Raises:
        ImportError: if evosax is not installed.
        ValueError: for unknown names, and for arguments that evosax's constructor refuses.
        TypeError: for an algorithm that is not callable, and for options that cannot be hashed.

    >>> from evoopt import minimize
    >>> strategy = from_evosax("CMA_ES", 16, params={"std_init": 0.5})
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=200, target=1e-8)
    >>> result.reason
    'target'
    """
    algorithm = _named(algorithm) if isinstance(algorithm, str) else algorithm
    if not callable(algorithm):
        cause = "an algorithm that was already constructed"
        raise error("an evosax class, or its name", type(algorithm).__name__, cause, TypeError)
    name, params = getattr(getattr(algorithm, "func", algorithm), "__name__", str(algorithm)), params or {}
    check_popsize(popsize, 2, even=name == "ESMC")  # ESMC asks for one fewer than an odd popsize
    known = set(inspect.signature(algorithm).parameters) - {"population_size", "solution"}
    _check_names(f"options of {name}", known, options)
    for option, given in options.items():
        try:
            hash(given)
        except TypeError as problem:
            cause = f"a dict or an array; pass it as functools.partial({name}, {option}=...)"
            raise error(f"a hashable {option}", type(given).__name__, cause, TypeError) from problem
    popsize, chosen = int(popsize), tuple(sorted(options.items()))
    try:
        _, hyper = _build(algorithm, popsize, chosen, TRIAL, jnp.result_type(float))
    except AssertionError as problem:
        raise error(f"what {name} accepts", f"popsize={popsize}, {options}", f"evosax says: {problem}") from problem
    _check_names(f"hyperparameters of {name}", hyper.__dataclass_fields__, params)
    return Evosax(spread, tuple(params.values()), tuple(params), algorithm, popsize, chosen)


def _check_names(what: str, known: Any, given: Any) -> None:
    if unknown := set(given) - set(known):
        raise error(f"{what}: {', '.join(sorted(known)) or 'none'}", ", ".join(unknown), "a name of another algorithm")
