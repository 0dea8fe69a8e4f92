"""Calling any JAX function with virtual parameters, and asking what it would make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax

from evoopt import noise as noises
from evoopt import trees
from evoopt.noise.kinds import Address, Sliced
from evoopt.types import Params
from evoopt.virtual import rules as _rules  # noqa: F401 (importing them registers them)
from evoopt.virtual.leaves import About, Log, Materialised, is_virtual, materialised, virtual

DENSE = "perturbed from the start: its step-size is no single number"


def call(function: Callable[..., Any], params: Params, *args: Any, **kwargs: Any) -> Any:
    """`function(params, *args, **kwargs)`, where leaves of `params` may be virtual. The result has arrays only."""
    if not any(is_virtual(x) for x in _leaves(params)):
        return function(params, *args, **kwargs)
    return materialised(quax.quaxify(function)(params, *args, **kwargs))


def transformed(transform: Callable[[Params], Params], params: Params) -> Params:
    """`transform(params)`; virtual leaves stay virtual if all primitives that meet them have rules."""
    return quax.quaxify(transform)(params) if any(is_virtual(x) for x in _leaves(params)) else transform(params)


def _leaves(tree: Params) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_virtual)


def perturbed(params: Params, noise: Sliced, address: Address, scale: Any, *, log: Log | None = None) -> Params:
    """`params + scale * z(address)`, with virtual leaves where that saves memory.

    Args:
        params: the parameters. Vectors, leaves with fewer than 1024 numbers, and leaves whose scale is not a single
            number become perturbed arrays. Leaves that the noise does not perturb stay as they are.
        noise: noise that is drawn slice by slice: `gaussian`, `rademacher`, `LowRank(...)`, `Masked(...)`, ...
        address: the address of one direction, a row of `noise.addresses(key, n)`.
        scale: a number, or a tree like `params`.
        log: what `explain` collects in.

    >>> from evoopt.noise import LowRank
    >>> noise, params = LowRank(2), {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}
    >>> address = jax.random.key(0)
    >>> model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    >>> y = call(model, perturbed(params, noise, address, 0.1), jnp.ones(64))
    >>> dense = jax.tree.map(lambda w, z: w + 0.1 * z, params, noise.draw(address, params))
    >>> bool(jnp.allclose(y, model(dense, jnp.ones(64)), atol=1e-5))
    True
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    scales = treedef.flatten_up_to(trees.like(scale, params))
    vectors = noises.are_vectors(params)
    new = []
    for i, ((path, x), kind, s, vector) in enumerate(zip(named, noise.kinds(params), scales, vectors, strict=True)):
        if kind is None:
            new.append(x)
        elif noises.is_large(x) and not vector and jnp.ndim(s) == 0:
            about = About(trees.path_name(path), noises.is_cut(kind, x), log)
            new.append(virtual(x, kind, kind.seeds(address, i, x), s, about))
        else:
            if log is not None and noises.is_large(x) and not vector:
                log.found.append(Materialised(trees.path_name(path), "nothing", DENSE, x.shape))
            new.append(x + jnp.asarray(s, x.dtype) * noises.leaf(kind, address, i, x))
    return treedef.unflatten(new)


def explain(
    function: Callable[..., Any], params: Params, *args: Any, noise: Sliced = noises.gaussian
) -> list[Materialised]:
    """Which virtual leaves `function(params, *args)` would make whole, for which primitive, and where. Nothing is run.

    Args:
        function: the model or objective.
        params: the parameters, arrays or `jax.ShapeDtypeStruct`.
        *args: the other arguments of the function.
        noise: the noise of the leaves.

    >>> params = {"w": jnp.ones((64, 64))}
    >>> explain(lambda p, x: x @ p["w"], params, jnp.ones(64))
    []
    >>> [(m.leaf, m.primitive) for m in explain(lambda p: jnp.sum(p["w"] ** 2), params)]
    [('w', 'integer_pow')]
    """
    log = Log()

    def run(params: Params, args: Any) -> Any:
        return call(function, perturbed(params, noise, jax.random.key(0, impl="threefry2x32"), 1.0, log=log), *args)

    jax.eval_shape(run, params, args)
    return log.found
