"""Test functions: x of shape (d,) -> the value, (); the least value is 0.

`himmelblau` and `beale` are functions of two numbers. `shifted` and `rotated` take away what makes a test easy: an
optimum at zero, and coordinates that can be searched one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from evoopt.types import Array, Key

Function = Callable[[Array], Array]


def sphere(x: Array) -> Array:
    """Sum of squares; optimum at 0."""
    return jnp.sum(x**2)


def ellipsoid(x: Array) -> Array:
    """Squares with weights from 1 to 10^6, evenly spread in the logarithm; optimum at 0."""
    return jnp.sum(10.0 ** (6 * jnp.linspace(0, 1, x.shape[0], dtype=x.dtype)) * x**2)


def rosenbrock(x: Array) -> Array:
    """A narrow curved valley (Rosenbrock 1960), for d >= 2; optimum at 1.

    >>> rosenbrock(jnp.ones(5)).item()
    0.0
    """
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def rastrigin(x: Array) -> Array:
    """A bowl with about 10^d local optima in [-5, 5]^d; optimum at 0."""
    return jnp.sum(x**2 + 20 * jnp.sin(jnp.pi * x) ** 2)  # = 10 (1 - cos 2 pi x), without its cancellation


def ackley(x: Array) -> Array:
    """A funnel with ripples (Ackley 1987); optimum at 0."""
    distance, ripples = jnp.sqrt(jnp.mean(x**2)), jnp.mean(jnp.cos(2 * jnp.pi * x))
    return -20 * jnp.expm1(-0.2 * distance) - jnp.e * jnp.expm1(ripples - 1)  # expm1: nothing cancels at the optimum


def himmelblau(x: Array) -> Array:
    """Four optima of value 0, one of them at (3, 2) (Himmelblau 1972)."""
    a, b = x
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2


def beale(x: Array) -> Array:
    """Flat, with steep corners (Beale 1958); optimum at (3, 0.5)."""
    a, b = x
    return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2


def shifted(f: Function, x_opt: Array) -> Function:
    """`f(x - x_opt)`: an optimum at 0 moves to `x_opt`, any other by it.

    >>> shifted(sphere, jnp.array([1.0, 2.0]))(jnp.array([1.0, 2.0])).item()
    0.0
    """
    return lambda x: f(x - x_opt)


def rotated(f: Function, key: Key, d: int) -> Function:
    """`f(R x)` with R a random rotation or reflection of d dimensions, uniform (Haar) over them."""
    rotation = jax.random.orthogonal(key, d)
    return lambda x: f(rotation @ x)
