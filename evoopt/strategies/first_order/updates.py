"""What strategies do with a gradient: optax's transformations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from evoopt.types import Params


@functools.cache
def adam() -> optax.GradientTransformation:
    """Adam's direction, the optimizer of recipes that are given none: one object, so that equal recipes are equal."""
    return optax.scale_by_adam()


def descend(
    optimizer: optax.GradientTransformation, grad: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """(updates, opt_state) of an optax transformation, under standard dtype promotion whatever the caller uses."""
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(grad, opt_state, params)
