"""The package's common types, `@pytree`, and the one wording of errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax

Array = jax.Array
Key = jax.Array  # a typed threefry key, () or (n,)
Params = Any  # a pytree of float arrays: the thing being optimized
Answers = Any  # values (n,), or a tuple whose first entry is the values
Objective = Callable[..., Any]

T = TypeVar("T")


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """Declare a field of a `@pytree` that is not a leaf, such as a size or a function. It must be hashable."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are leaves, except those declared `static()`.

    >>> @pytree
    ... class Point:
    ...     x: float
    ...     name: str = static(default="origin")
    >>> jax.tree.leaves(Point(1.0))
    [1.0]
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def error(expected: str, got: str, cause: str, kind: type[Exception] = ValueError) -> Exception:
    """An exception in three parts; the caller raises it.

    >>> print(error("an even popsize", "popsize=7", "antithetic sampling asks in pairs"))
    expected an even popsize
    got popsize=7
    usual cause: antithetic sampling asks in pairs
    """
    return kind(f"expected {expected}\ngot {got}\nusual cause: {cause}")
