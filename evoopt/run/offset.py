"""Values of a Python objective that float32 could not tell apart.

A search computes in JAX's float type, float32 unless x64 is on; an objective on the host answers in float64. Values
such as 1e9 + 1e-3 would all be equal in float32, and the search would stand still. So host values are kept in float64,
and what a strategy is told is their difference from an offset, which moves only when float32 would swallow it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# State fields that hold values told earlier; they move with the offset. A test finds a strategy whose field is missing.
REMEMBERED = (
    "value", "values", "best_value", "parent_value", "elite_value", "run_best", "recent_best",
    "long_history", "highest", "first_median", "least_median", "last_value", "fitness", "best_fitness", "reference",
    "reflected_value",
)  # fmt: skip
RESOLUTION = 2.0**-12  # the spread of a generation must be this many times above the rounding of its largest value


class Offset:
    """What is subtracted from host values before a strategy of narrower floats is told them.

    >>> offset, state = Offset(), None
    >>> state, values = offset.told(state, np.array([1e9 + 0.25, 1e9]))
    >>> offset.value, values.tolist()
    (1000000000.0, [0.25, 0.0])
    """

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def told(self, state: Any, values: np.ndarray) -> tuple[Any, np.ndarray]:
        """The state, its remembered values moved where the offset moved, and the values to tell it.

        The offset becomes the best of these values once their spread is too small for the float type to resolve.
        """
        dtype = np.dtype(jnp.result_type(float))
        ok = np.isfinite(values)
        if dtype == np.float64 or not ok.any():
            return state, (values - self.value).astype(dtype)
        finite = values[ok]
        most = np.abs(finite - self.value).max()
        spread = finite.max() - finite.min()
        if np.spacing(np.asarray(min(most, np.finfo(dtype).max), dtype)) > spread * RESOLUTION and most > 0:
            new = float(finite.min())
            state, self.value = shifted(state, new - self.value), new
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite
            return state, (values - self.value).astype(dtype)


def shifted(state: Any, by: float) -> Any:
    """`state` with all the values it remembers less `by`."""

    def moved(path: tuple, leaf: Any) -> Any:
        names = [getattr(key, "name", None) for key in path]
        if not any(name in REMEMBERED for name in names) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return (np.asarray(leaf, np.float64) - by).astype(leaf.dtype)

    if by == 0 or state is None:
        return state
    return jax.tree_util.tree_map_with_path(moved, state)
