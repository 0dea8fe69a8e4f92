"""Black-box tuning of deep prompts: CMA-ES in a random subspace of every layer's prompt, layer by layer.

Source: Sun, He, Qian, Zhou, Huang, Qiu, "BBTv2: towards a gradient-free future with large language models", EMNLP
2022, arXiv 2205.11200, algorithm 1. A recipe over `cma_es` and the wrappers `subspace` and `alternating`: prompts
p_l = p0_l + A_l z_l, A_l ~ N(0, alpha std_l / (sqrt(dimension) sigma)), one generation of CMA-ES on z_l for each layer
in turn, the other layers fixed at their best. As there, a layer's best is the best candidate seen, whose value was
measured beside older prompts of the others. CMA-ES is our own in the place of pycma.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.checks import check_popsize, check_sigma
from evoopt.strategies import cma_es
from evoopt.types import Array, Params
from evoopt.wrappers import alternating, best_so_far, reparameterized, subspace


def black_box_tuning(
    popsize: int = 20,
    *,
    dimension: int = 500,
    sigma: float = 1.0,
    alpha: float = 1.0,
    std: Any = 1.0,
    noise: Any = noises.gaussian,
) -> Any:
    """BBTv2 (Sun et al. 2022) for prompts with one row a layer: every leaf has the layers as leading axis.

    The objective gets all layers' prompts, e.g. (layers, tokens, width), and puts each before its layer's input.
    A generation searches one layer. The paper's budget is 8,000 evaluations, with 50 tokens a layer.

    Args:
        popsize: candidates a generation.
        dimension: d of each layer's subspace.
        sigma: CMA-ES's first step-size.
        alpha: scale of the projection.
        std: of the word embeddings for the first layer and of the hidden states for the others: a number, or (layers,).
        noise: of the projections.

    Returns:
        A strategy over the prompts, which starts at the prompts it is given.

    >>> from evoopt import minimize
    >>> f = lambda prompts: jnp.sum((prompts.mean(axis=1) - jnp.array([1.0, -1.0])) ** 2)
    >>> result = minimize(f, jnp.zeros((2, 30)), black_box_tuning(8, dimension=4, std=0.5), generations=100)
    >>> bool(f(result.recommended) < 1e-2)
    True
    """
    check_popsize(popsize, 2)
    check_popsize(dimension, 1, name="dimension")
    check_sigma(sigma)
    scale = alpha / (math.sqrt(dimension) * sigma)
    layers = alternating(subspace(best_so_far(cma_es(popsize, sigma=sigma)), dimension, scale=scale, noise=noise))
    return reparameterized(layers, functools.partial(_times, std), functools.partial(_over, std))


def _times(std: Any, prompts: Params) -> Params:
    return jax.tree.map(lambda p: _rows(std, p) * p, prompts)


def _over(std: Any, prompts: Params) -> Params:
    return jax.tree.map(lambda p: p / _rows(std, p), prompts)


def _rows(std: Any, like: Array) -> Array:
    std = jnp.asarray(std, like.dtype)
    return std.reshape(-1, *(1,) * (like.ndim - 1)) if std.ndim else std
