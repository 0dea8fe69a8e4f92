"""A space: a tree of variables and fixed values, as what a strategy searches and what an objective gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import checks
from evoopt.spaces import numbers
from evoopt.spaces.kinds import Categorical, Conditional, Integer, Real, is_variable
from evoopt.types import Array, error


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A value that is not searched."""

    value: Any

    @property
    def coordinates(self) -> None:
        return None

    @property
    def numeric(self) -> bool:
        return isinstance(self.value, (bool, int, float, np.ndarray, np.generic, jax.Array))

    def code(self, x: Any, name: str) -> Any:
        if not (x is self.value or np.array_equal(x, self.value) or (self.numeric and self._close(x))):
            raise error(f"the fixed value {self.value!r} at '{name}'", repr(x)[:60], "a value of another space")
        return _as_array(self.value) if self.numeric else self.value

    def _close(self, x: Any) -> bool:
        return isinstance(x, (np.ndarray, np.generic, jax.Array)) and np.array_equal(x, _as_array(self.value))

    def show(self, x: Any) -> Any:
        return self.value


def _as_array(x: Any) -> np.ndarray:
    """A fixed number as objectives in JAX get it: in the types of JAX."""
    return np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))


class Condition:
    """Where a variable exists: `on` is its parent's name, `codes` what objectives in JAX see of the parent then."""

    def __init__(self, on: str, codes: np.ndarray) -> None:
        self.on, self.codes = on, codes

    def holds(self, parent: Array) -> Array:
        return (parent[..., None] == jnp.asarray(self.codes, parent.dtype)).any(axis=-1)


@dataclasses.dataclass(init=False, eq=False, repr=False)  # whose field is what a checkpoint compares
class Space:
    """A tree (dicts, lists, tuples) of variables and fixed values. Hashable; equal where the trees are.

    A strategy searches u, a dict of float arrays by the variables' names (the keys to them, joined by "/"), in units of
    their scales: `cma_es(sigma=1.0)`, `differential_evolution(spread=1.0)` are right as they stand. u = 0 is the start.

    Three forms of one candidate: u; what an objective in JAX gets (`decode`), whose structure is always the same:
    numbers where choices are numbers, otherwise the place of the choice, what does not exist at its start, no text; and
    what one in Python gets (`presented`): the choices themselves, and no key for what does not exist.

    >>> from evoopt.spaces import categorical, conditional, integer, real
    >>> space = Space({
    ...     "kernel": categorical(["linear", "rbf"]),
    ...     "gamma": conditional(real(1e-3, 1e3, log=True), on="kernel", equal="rbf"),
    ...     "degree": integer(1, 5),
    ... })
    >>> space.start(), space.size
    ({'kernel': 'linear', 'degree': 3}, 3)
    >>> space.presented(space.decode(space.encode({"kernel": "rbf", "gamma": 1.0, "degree": 5})))
    {'kernel': 'rbf', 'gamma': 1.0, 'degree': 5}

    Raises:
        ValueError: for two variables of one name, and for conditions on what is not there, has no such value, or in a
            circle.
    """

    tree: Any

    def __init__(self, tree: Any) -> None:
        self.tree = tree.tree if isinstance(tree, Space) else tree
        self.variables: dict[str, Any] = {}
        self.conditions: dict[str, Condition] = {}
        given: dict[str, Conditional] = {}
        for name, leaf in _leaves(self.tree):
            if name in self.variables:
                cause = 'a "/" in a key, which separates the keys in names'
                raise error("variables of different names", f"'{name}' twice", cause)
            if isinstance(leaf, Conditional):
                given[name], leaf = leaf, leaf.variable
            self.variables[name] = leaf if is_variable(leaf) else Fixed(leaf)
        if not self.variables:
            raise error("a tree of variables", repr(tree)[:60], "an empty dict")
        for name in self._ordered(given):
            self.conditions[name] = self._condition(name, given[name])
        self.free = {name: v for name, v in self.variables.items() if v.coordinates is not None}
        self._frozen = _frozen(self.tree)

    def _ordered(self, given: dict[str, Conditional]) -> list[str]:
        """The conditional variables, parents first."""
        done: list[str] = []
        for name in given:
            way = []
            while name in given and name not in done:
                if name in way:
                    circle = " -> ".join([*way[way.index(name) :], name])
                    raise error("conditions that end at a variable without one", circle, "two that exist only by turns")
                way.append(name)
                name = given[name].on
            done += reversed(way)
        return done

    def _condition(self, name: str, given: Conditional) -> Condition:
        parent = self.variables.get(given.on)
        if parent is None:
            near = checks.nearest(given.on, self.variables)
            cause = f"misspelt: {', '.join(near)}" if near else "the choice instead of the name of the variable"
            raise error(f"a variable '{given.on}' on which '{name}' is conditional", "none of that name", cause)
        if not isinstance(parent, (Categorical, Integer)) or parent.shape != ():
            got = f"{type(parent).__name__.lower()} {getattr(parent, 'shape', '')}".strip()
            cause = "a condition on a number: make the range a choice of its own"
            raise error(f"'{given.on}', on which '{name}' is conditional, to be one choice or whole number", got, cause)
        codes = [parent.code(value, given.on) for value in given.equal]
        return Condition(given.on, np.stack(codes))

    def __repr__(self) -> str:
        return f"Space({self.tree!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self._frozen == other._frozen

    def __hash__(self) -> int:
        return hash(self._frozen)

    def __reduce__(self) -> Any:
        return Space, (self.tree,)

    @property
    def size(self) -> int:
        """d, the number of coordinates of u."""
        return sum(int(np.prod(v.coordinates)) for v in self.free.values())

    def start(self) -> Any:
        """The candidate to begin with, as an objective in Python gets it."""
        return self.presented(jax.device_get(self.decode(self.origin())))

    def origin(self) -> dict[str, np.ndarray]:
        """The u of the start: zeros."""
        return {name: np.zeros(v.coordinates, numbers.real_kind()) for name, v in self.free.items()}

    def encode(self, candidate: Any) -> dict[str, Array]:
        """The u that decodes to a candidate, in either form; what does not exist is at its start.

        Raises:
            ValueError: if the candidate is not in the space.
            TypeError: if it holds something else than numbers and choices.
        """
        values = self._coded(candidate)
        u = self.origin()
        return {
            name: jnp.asarray(v.encode(values[name]) if name in values else u[name]) for name, v in self.free.items()
        }

    def located(self, candidate: Any) -> dict[str, Array]:
        """As `encode`, in JAX, of what `decode` gave; nothing is checked."""
        values = {name: leaf for name, leaf in _leaves(candidate) if name in self.free}
        return {name: v.encode(values[name]) for name, v in self.free.items()}

    def checked(self, u: Any) -> dict[str, Any]:
        """`u`, after checking that it has the names and shapes of this space.

        Raises:
            ValueError: naming what it lacks.
        """
        wanted = {name: v.coordinates for name, v in self.free.items()}
        given = {name: np.shape(x) for name, x in u.items()} if isinstance(u, dict) else {}
        if given != wanted:
            name = next((n for n in wanted if given.get(n) != wanted[n]), None)
            got = f"more: {', '.join(sorted(given.keys() - wanted.keys()))}" if name is None else f"{given.get(name)}"
            expected = "the u of this space" if name is None else f"'{name}' of shape {wanted[name]} in u"
            raise error(expected, got, "a candidate instead of its u: space.encode(candidate)")
        return u

    def decode(self, u: Mapping[str, Any]) -> Any:
        """u -> what an objective in JAX gets. Any u, infinite or NaN too, gives a candidate inside."""
        return self.built({name: v.decode(u[name]) for name, v in self.free.items()})

    def opened(self, u: dict[str, Array]) -> Any:
        """As `decode`, where a number without bounds is what u says, NaN too: linear, so that it may stay virtual."""
        free = lambda v: isinstance(v, Real) and v.low is None and v.high is None and not v.log
        return self.built({name: v.linear(u[name]) if free(v) else v.decode(u[name]) for name, v in self.free.items()})

    def built(self, values: dict[str, Array]) -> Any:
        """The candidate of these values of the free variables, with what does not exist at its start."""
        values = self.everything(values)
        for name, exists in self.existing(values).items():
            variable = self.variables[name]
            if name in self.free:
                first = variable.decode(jnp.zeros(variable.coordinates, numbers.real_kind()))
                values[name] = jnp.where(exists, values[name], first)
        return _built(self.tree, lambda name: values.get(name, _ABSENT))

    def everything(self, values: dict[str, Array]) -> dict[str, Array]:
        """The values, with those of fixed numbers."""
        fixed = {name: v for name, v in self.variables.items() if name not in self.free}
        known = {name: v for name, v in fixed.items() if not isinstance(v, Fixed) or v.numeric}
        return {**{name: _constant(v) for name, v in known.items()}, **values}

    def existing(self, values: dict[str, Array]) -> dict[str, Array]:
        """Whether each conditional variable exists, () bool."""
        found: dict[str, Array] = {}
        for name, condition in self.conditions.items():  # parents first
            holds = condition.holds(values[condition.on])
            found[name] = holds & found[condition.on] if condition.on in found else holds
        return found

    def presented(self, candidate: Any) -> Any:
        """What an objective in Python gets: choices, ints, floats, bools, and no key for what does not exist.

        Args:
            candidate: what `decode` gave.
        """
        values = {name: np.asarray(leaf) for name, leaf in _leaves(candidate) if leaf is not None}
        existing = self._existing(values)

        def shown(name: str) -> Any:
            if not existing.get(name, True):
                return _ABSENT
            variable = self.variables[name]
            return variable.show(values.get(name))

        return _built(self.tree, shown)

    def _existing(self, values: dict[str, np.ndarray]) -> dict[str, bool]:
        """As `existing`, of arrays of NumPy."""
        found: dict[str, bool] = {}
        for name, condition in self.conditions.items():
            holds = bool((values[condition.on] == condition.codes).any()) if condition.on in values else False
            found[name] = holds and found.get(condition.on, True)
        return found

    def contains(self, candidate: Any) -> bool:
        """Whether a candidate, in either form, is in the space."""
        try:
            self._coded(candidate)
        except (ValueError, TypeError):
            return False
        return True

    def _coded(self, candidate: Any) -> dict[str, np.ndarray]:
        """The values of a candidate by name, as arrays; raises for a candidate that is not in the space."""
        given = {name: leaf for name, leaf in _leaves(candidate, self.variables) if leaf is not _ABSENT}
        if unknown := [name for name in given if name not in self.variables]:
            near = checks.nearest(unknown[0], self.variables)
            cause = f"misspelt: {', '.join(near)}" if near else "a candidate of another space"
            raise error(
                f"the variables of this space: {numbers.short(', '.join(self.variables))}", f"'{unknown[0]}'", cause
            )
        values: dict[str, Any] = {}
        for name, variable in self.variables.items():
            absent = name not in given or (given[name] is None and not _takes_none(variable))
            if not absent:
                values[name] = variable.code(given[name], name)
        existing = self._existing(values)
        for name, variable in self.variables.items():
            text = isinstance(variable, Fixed) and not variable.numeric
            if name not in values and existing.get(name, True) and not text:
                raise error(f"a value of '{name}'", "none", "a candidate of another space, or a key left out")
        return values


_ABSENT = object()


def _takes_none(variable: Any) -> bool:
    return (isinstance(variable, Fixed) and variable.value is None) or None in getattr(variable, "choices", ())


def _constant(variable: Any) -> Array:
    """The one value of what has no coordinates and is a number."""
    if isinstance(variable, Fixed):
        return jnp.asarray(_as_array(variable.value))
    if isinstance(variable, Categorical):
        return variable.value(jnp.zeros(variable.shape, jnp.int32))
    return variable.decode(jnp.zeros(getattr(variable, "shape", (1,)), numbers.real_kind()))


def _leaves(tree: Any, stops: Any = (), path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The leaves with their names. What has a name in `stops` is a leaf whatever it is."""
    name = "/".join(path) or "."
    if isinstance(tree, dict) and name not in stops:
        for key, part in tree.items():
            yield from _leaves(part, stops, (*path, str(key)))
    elif isinstance(tree, (list, tuple)) and name not in stops:
        for i, part in enumerate(tree):
            yield from _leaves(part, stops, (*path, str(i)))
    else:
        yield name, tree


def _built(tree: Any, value: Callable[[str], Any], path: tuple[str, ...] = ()) -> Any:
    """The tree with a value for each leaf. Where there is none a dict has no key, a list or tuple has None."""
    name = "/".join(path) or "."
    if isinstance(tree, dict):
        parts = {key: _built(part, value, (*path, str(key))) for key, part in tree.items()}
        return {key: part for key, part in parts.items() if part is not _ABSENT}
    if isinstance(tree, (list, tuple)):
        listed = [_built(part, value, (*path, str(i))) for i, part in enumerate(tree)]
        listed = [None if part is _ABSENT else part for part in listed]
        return type(tree)(*listed) if hasattr(tree, "_fields") else type(tree)(listed)
    return value(name)


def _frozen(tree: Any) -> Any:
    """The tree as something that can be hashed."""
    if isinstance(tree, dict):
        return dict, tuple((key, _frozen(part)) for key, part in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree), tuple(_frozen(part) for part in tree)
    if isinstance(tree, Conditional):
        return Conditional, _frozen(tree.variable), tree.on, tree.equal
    if isinstance(tree, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(tree)
        return array.shape, str(array.dtype), array.tobytes()
    try:
        hash(tree)
    except TypeError:
        raise error(
            "fixed values that are hashable, or arrays", repr(tree)[:60], "an object that changes", TypeError
        ) from None
    return (
        type(tree),
        tree,
        repr(tree) if is_variable(tree) else None,
    )  # 1 == 1.0 == True, of which JAX makes different types


def is_space(x: Any) -> bool:
    """Whether something is searched as a space: a `Space`, or a tree with a variable."""
    return isinstance(x, Space) or any(is_variable(leaf) for _, leaf in _leaves(x))
