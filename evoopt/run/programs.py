"""Compiled programs, kept within the process: a search like an earlier one compiles nothing.

A program belongs to what is computed, not to the objects that were given: strategies are its arguments, and an
objective is known by its jaxpr, whose arrays are arguments too. So another seed, budget, hyperparameter or batch of
data, even the same lambda written again, finds the program of the call before; an objective that was changed in place
does not.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from evoopt import injection, stopping, trees
from evoopt import noise as noises
from evoopt.run import threads
from evoopt.types import Array, Key

KEPT = 32  # programs of each kind; the one that was not used for longest goes first


@functools.cache
def _options(platform: str) -> dict[str, Any]:
    # The emitters of fused loops that are the default in jax 0.10 take twice as long to compile a generation as the
    # others, and run no faster. From jax 0.11 on there is no choice.
    old = jax.__version__.startswith("0.10.")
    return {"xla_cpu_use_fusion_emitters": False} if platform == "cpu" and old else {}


def jit(f: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` as all programs of a search are compiled, so that the same ones have the same bits everywhere."""
    return jax.jit(f, compiler_options=_options(jax.default_backend()) or None, **options)


class Fixed:
    """A strategy that is no pytree of numbers, as the constant of a program that is not kept."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy


jax.tree_util.register_pytree_node(Fixed, lambda fixed: ((), fixed), lambda fixed, _: fixed)


def argument(strategy: Any) -> Any:
    """`strategy` as an argument of programs: its hyperparameters are numbers of the call, its structure is constant."""
    numbers = (int, float, np.number, np.ndarray, jax.Array)
    leaves = jax.tree.leaves(strategy)
    known = all(isinstance(leaf, numbers) and leaf is not strategy for leaf in leaves)
    return strategy if known else Fixed(strategy)


def plain(strategy: Any) -> Any:
    """The strategy of an argument."""
    return strategy.strategy if isinstance(strategy, Fixed) else strategy


class Steps:
    """The programs of a strategy by itself: `init`, `ask`, `tell`, `recommend`, each given the strategy first."""

    def __init__(self) -> None:
        self.init = jit(lambda strategy, params, key: trees.strong(plain(strategy).init(params, key)))
        self.ask = jit(lambda strategy, state, key: plain(strategy).ask(state, key))
        self.ask_at = jit(lambda strategy, state, key, i: plain(strategy).ask(state, noises.fold_in(key, i)))
        self.tell = jit(lambda strategy, state, population, answers: plain(strategy).tell(state, population, answers))
        self.moved = jit(_moved)
        self.watching = jit(lambda strategy, state, n: stopping.watching(plain(strategy), state, n), static_argnums=2)
        self.watched = jit(lambda strategy, *given: stopping.watched(plain(strategy), *given))
        self.rejudged = jit(lambda strategy, *given: stopping.rejudged(plain(strategy), *given))
        self.recommend = jit(lambda strategy, state: plain(strategy).recommend(state))


def _moved(strategy: Any, state: Any, population: Any, points: Any, mask: Array) -> Any:
    there = injection.chosen(~mask, population.decoded(), points)
    return plain(strategy).moved(state, population, there)


class Bound:
    """`Steps` of one strategy."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = argument(strategy)
        lasts = not isinstance(self.strategy, Fixed)
        self._rows: int | None = None
        self.steps = kept(_steps, jax.tree.structure(self.strategy), Steps) if lasts else Steps()

    def init(self, params: Any, key: Key) -> Any:
        return self.steps.init(self.strategy, params, key)

    def ask(self, state: Any, key: Key) -> Any:
        return self._run(self.steps.ask, state, key)

    def ask_at(self, state: Any, key: Key, number: int) -> Any:
        """As `ask` with `generation_key(key, number)`."""
        return self._run(self.steps.ask_at, state, key, np.uint32(number))

    def tell(self, state: Any, population: Any, answers: Any) -> Any:
        return self._run(self.steps.tell, state, population, answers)

    def moved(self, state: Any, population: Any, points: Any, mask: Any) -> Any:
        """The population with the candidates where `mask` (n,) is True at their points."""
        return self.steps.moved(self.strategy, state, population, points, mask)

    def watching(self, state: Any, n: int) -> Any:
        return self.steps.watching(self.strategy, state, n)

    def watched(self, watch: Any, state: Any, values: Any, n: int, stops: Any) -> Any:
        """`watch` after the values (n,) of a generation, of which n were asked for."""
        return self.steps.watched(self.strategy, watch, state, values, np.int32(n), stops)

    def rejudged(self, watch: Any, state: Any, n: int, stops: Any) -> Any:
        return self.steps.rejudged(self.strategy, watch, state, np.int32(n), stops)

    def recommend(self, state: Any) -> Any:
        return self.steps.recommend(self.strategy, state)

    def _run(self, step: Callable[..., Any], state: Any, *args: Any) -> Any:
        self._rows = threads.rows(state) if self._rows is None else self._rows
        if self._rows < threads.SMALL:
            return step(self.strategy, state, *args)
        with threads.limited(self._rows):
            return jax.block_until_ready(step(self.strategy, state, *args))


_steps: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()


def kept(table: collections.OrderedDict[Hashable, Any], key: Hashable, make: Callable[[], Any]) -> Any:
    """What `table` has for `key`; made where it has nothing, or where `key` cannot be looked up."""
    try:
        found = table.get(key)
    except TypeError:  # a field that has no hash
        return make()
    if found is None:
        found = table[key] = make()
    table.move_to_end(key)
    while len(table) > KEPT:
        table.popitem(last=False)
    return found


class Traced:
    """A function as what it computes: its jaxpr without the arrays that it closes over. Equal where these are.

    >>> first, arrays = Traced.of(lambda x, a=np.ones(2): x + a, np.zeros(2))
    >>> again, others = Traced.of(lambda x, b=np.full(2, 5.0): x + b, np.zeros(2))
    >>> first == again, again(others, np.zeros(2)).tolist()
    (True, [5.0, 5.0])
    """

    def __init__(self, jaxpr: Jaxpr, inputs: Any, outputs: Any) -> None:
        self.jaxpr, self.inputs, self.outputs = jaxpr, inputs, outputs

    @classmethod
    def of(cls, f: Callable[..., Any], *args: Any) -> tuple[Traced, list[Array]]:
        """`f` for arguments of these shapes, and the arrays that it closes over."""
        # A new function each time: JAX would take an object that was changed in place for the one it traced before.
        closed, shapes = jax.make_jaxpr(lambda *given: f(*given), return_shape=True)(*args)
        return cls(closed.jaxpr, jax.tree.structure(args), jax.tree.structure(shapes)), [*closed.consts]

    def __call__(self, consts: list[Array], *args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        return jax.tree.unflatten(self.outputs, jaxpr_as_fun(ClosedJaxpr(self.jaxpr, consts))(*leaves))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Traced):
            return NotImplemented
        trees = (self.inputs, self.outputs) == (other.inputs, other.outputs)
        return trees and _same_jaxpr(self.jaxpr, other.jaxpr)

    def __hash__(self) -> int:
        words = tuple(str(eqn.primitive) for eqn in self.jaxpr.eqns)
        return hash((words, tuple(str(v.aval) for v in self.jaxpr.invars), self.inputs, self.outputs))


# Functions by which a call is differentiated; what has them here is not, for derivatives were taken before.
_UNUSED = {"jvp_jaxpr_fun", "jvp_fun", "fwd_jaxpr_thunk", "bwd", "fwd"}


def _same_jaxpr(a: Jaxpr, b: Jaxpr) -> bool:
    """Whether two jaxprs are one but for the names of their variables. Never by mistake; some equal ones are missed."""
    if len(a.eqns) != len(b.eqns) or a.effects != b.effects:
        return False
    names: dict[Any, Any] = {}

    def bind(ours: Any, theirs: Any) -> bool:
        if len(ours) != len(theirs):
            return False
        for x, y in zip(ours, theirs, strict=True):
            if x.aval != y.aval:
                return False
            names[x] = y
        return True

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Literal) or isinstance(y, Literal):
            return type(x) is type(y) and x.aval == y.aval and _same(x.val, y.val)
        return names.get(x) is y

    def all_same(ours: Any, theirs: Any) -> bool:
        return len(ours) == len(theirs) and all(map(same, ours, theirs))

    if not (bind(a.constvars, b.constvars) and bind(a.invars, b.invars)):
        return False
    for x, y in zip(a.eqns, b.eqns, strict=True):
        if x.primitive is not y.primitive or not all_same(x.invars, y.invars) or x.params.keys() != y.params.keys():
            return False
        if not all(name in _UNUSED or _same(x.params[name], y.params[name]) for name in x.params):
            return False
        if not bind(x.outvars, y.outvars):
            return False
    return all_same(a.outvars, b.outvars)


def _same(a: Any, b: Any) -> bool:
    """Whether two parameters of a primitive are equal; what can't be compared is not."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, ClosedJaxpr):
        return _same_jaxpr(a.jaxpr, b.jaxpr) and _same(a.consts, b.consts)
    if isinstance(a, Jaxpr):
        return _same_jaxpr(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (np.ndarray, jax.Array)) and not jnp.issubdtype(a.dtype, jax.dtypes.extended):
        return a.shape == b.shape and a.dtype == b.dtype and _bytes(a) == _bytes(b)
    if isinstance(a, (float, complex, np.generic)):
        return _bytes(a) == _bytes(b)  # 0.0 is not -0.0
    try:
        return bool(a == b)
    except (TypeError, ValueError):
        return False


def _bytes(x: Any) -> bytes:
    return np.asarray(x).tobytes()
