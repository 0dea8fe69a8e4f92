"""Guided ES: directions that lie partly in the subspace of surrogate gradients.

Source: Maheswaranathan, Metz, Tucker, Choi, Sohl-Dickstein, "Guided evolutionary strategies: augmenting random search
with surrogate gradients", ICML 2019, algorithm 1. Without a surrogate, the strategy's own past estimates span the
subspace: Meier, Mujika, Gauy, Steger, "Improving gradient estimation in evolutionary strategies with past descent
directions", arXiv 1910.05268.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from evoopt import noise as noises
from evoopt import shaping, trees
from evoopt.answers import as_values, count, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.shaping import Utility
from evoopt.strategies.first_order.updates import adam, descend
from evoopt.strategies.gaussian import sampling
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The state of guided ES."""

    mean: Params
    history: Array  # (k, d), the last surrogate gradients, newest first
    opt_state: Any
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class GuidedES:
    """Antithetic evolution strategy whose covariance is stretched along k surrogate gradients."""

    popsize: int = static()
    subspace: int = static()  # k
    sigma: float
    learning_rate: float
    mix: float  # alpha: 1 means only the full space, 0 only the subspace
    surrogate: Callable[[Params], Params] | None  # a pytree callable: the mean -> a surrogate gradient
    optimizer: optax.GradientTransformation = static()
    utility: Utility = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2, even=True)
        if self.subspace < 1:
            raise error("a subspace of at least 1 dimension", str(self.subspace), "for no subspace, use openai_es")

    def init(self, params: Params, key: Key) -> State:
        mean = trees.searchable(params)
        x = trees.flatten(mean)
        # Random directions until surrogate gradients arrive: until then the search is isotropic.
        history = jax.vmap(trees.flatten)(noises.gaussian.rows(noises.replayable(key), self.subspace, x))
        if self.surrogate is not None:
            history = self._push(history, trees.flatten(self.surrogate(mean)))
        return State(mean, history, trees.strong(self.optimizer.init(mean)), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        k, d = state.history.shape
        basis = jnp.linalg.qr(state.history.T)[0]  # U, (d, min(k, d)), orthonormal
        k = basis.shape[1]
        half = self.popsize // 2
        z = noises.gaussian.rows(noises.fold_in(key, 0), half, state.history[0])  # (n / 2, d)
        z_guided = noises.gaussian.rows(noises.fold_in(key, 1), half, basis[0])  # (n / 2, k)
        # eps ~ sigma N(0, Sigma), Sigma = alpha / d I + (1 - alpha) / k U U^T
        mix = jnp.asarray(self.mix, z.dtype)
        eps = jnp.sqrt(mix / d) * z + jnp.sqrt((1 - mix) / k) * z_guided @ basis.T
        eps = jnp.asarray(self.sigma, z.dtype) * eps
        return Population(sampling.Moved(state.mean), jnp.stack([eps, -eps], axis=1).reshape(-1, d))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        used = sampling.antithetic.used(values)
        weights = sampling.antithetic.weigh(values, self.utility)
        # g = beta / (2 sigma^2 P) sum_i eps_i (f(x + eps_i) - f(x - eps_i)), beta in the learning rate, 2 P = m
        scale = 1 / (self.sigma**2 * count(used))
        g = noises.weighted_rows(population.genomes, weights * scale).astype(state.history.dtype)
        _, unravel = trees.ravel(state.mean)
        updates, opt_state = descend(self.optimizer, unravel(g), state.opt_state, state.mean)
        mean = jax.tree.map(lambda m, u: m - jnp.asarray(self.learning_rate * u, m.dtype), state.mean, updates)
        guide = g if self.surrogate is None else trees.flatten(self.surrogate(mean))
        history = self._push(state.history, guide)
        return settle(state, State(mean, history, opt_state, state.unanswered), used)

    def recommend(self, state: State) -> Params:
        return state.mean

    def _push(self, history: Array, guide: Array) -> Array:
        # A zero or non-finite guide has no direction: keep the older ones.
        length = jnp.linalg.norm(guide)
        usable = jnp.isfinite(length) & (length > 0)
        unit = guide / jnp.where(usable, length, 1)
        return jnp.where(usable, jnp.concatenate([unit[None], history[:-1]]), history)


def guided_es(
    popsize: int = 32,
    *,
    surrogate: Callable[[Params], Params] | None = None,
    subspace: int = 4,
    mix: float = 0.5,
    sigma: float = 0.1,
    learning_rate: float = 0.05,
    optimizer: optax.GradientTransformation | None = None,
    utility: Utility = shaping.z_score,
) -> GuidedES:
    """Guided ES (Maheswaranathan et al. 2019). Memory: (popsize + subspace) times the parameters.

    Args:
        popsize: candidates per generation, 2 P in the paper, even.
        surrogate: parameters -> a gradient that points roughly the right way (of a cheaper loss, a truncated unroll);
            None uses the strategy's own last estimates.
        subspace: k, the number of surrogate gradients kept.
        mix: alpha, the share of the full space: 1/2 in the paper.
        sigma: length of a perturbation, in units of the parameters: E |eps|^2 = sigma^2.
        learning_rate: the optimizer's.
        optimizer: an optax transformation of the gradient without its learning rate; Adam by default.
        utility: fitness shaping. The paper uses unshaped values: `shaping.identity`.

    >>> from evoopt import minimize
    >>> f = lambda x: jnp.sum((x - 1.0) ** 2)
    >>> result = minimize(f, jnp.zeros(20), guided_es(16, surrogate=jax.grad(lambda x: f(x) + x[0])), generations=100)
    >>> bool(f(result.recommended) < 0.1)
    True
    """
    optimizer = adam() if optimizer is None else optimizer
    surrogate = None if surrogate is None else Partial(surrogate)
    return GuidedES(popsize, subspace, sigma, learning_rate, mix, surrogate, optimizer, utility)
