"""Evolution strategies for truncated unrolls: a generation evaluates one truncation of a long inner run.

Each pair of candidates continues its own inner run from generation to generation, so a truncation's loss depends on
all perturbations since the run began. An estimate from the last perturbation alone is biased (truncated ES); one from
their sum is not.

Sources: Vicol, Metz, Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with persistent
evolution strategies", ICML 2021 (PES). Li, Harrison, Sohl-Dickstein, Smith, Metz, "Noise-reuse in online
evolution strategies", NeurIPS 2023 (NRES). Both are one estimator, with noise drawn per truncation or per run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, count, settle, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.first_order.updates import adam, descend
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The state of the search, with the perturbations of every pair's inner run."""

    mean: Params
    held: Array  # (pairs, d), epsilon of the last truncation
    total: Array  # (pairs, d), xi: the sum of the perturbations since the pair's inner run began
    begins: Array  # (pairs,) bool, whether an inner run has ended since epsilon was drawn
    opt_state: Any
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class PersistentES:
    """Antithetic pairs whose inner runs continue; see `pes` and `nres`. Memory: 2 popsize times the parameters."""

    popsize: int = static()
    sigma: float
    learning_rate: float
    reuse: bool = static()  # one perturbation for a whole inner run instead of one for each truncation
    optimizer: optax.GradientTransformation = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2, even=True)
        check_sigma(self.sigma)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean = trees.searchable(params)
        zero = jnp.zeros((self.popsize // 2, trees.size(mean)), trees.flatten(mean).dtype)
        begins = jnp.ones(self.popsize // 2, bool)
        return State(mean, zero, zero, begins, trees.strong(self.optimizer.init(mean)), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        eps = noises.gaussian.rows(noises.replayable(key), self.popsize // 2, state.held[0])
        eps = jnp.asarray(self.sigma, eps.dtype) * eps
        if self.reuse:
            eps = jnp.where(state.begins[:, None], eps, state.held)
        return Population(sampling.Moved(state.mean), jnp.stack([eps, -eps], axis=1).reshape(self.popsize, -1))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        answers = told(population, answers)
        eps, total = self._perturbations(state, population)
        grad = self.estimate(state, population, answers)
        updates, opt_state = descend(self.optimizer, grad, state.opt_state, state.mean)
        mean = jax.tree.map(lambda m, u: m - jnp.asarray(self.learning_rate * u, m.dtype), state.mean, updates)
        _, ended, after = self._slopes(answers)
        # A run that began inside this truncation was perturbed by epsilon; one about to begin, by nothing yet.
        total = jnp.where((ended & answered(after))[:, None], eps, jnp.where(ended[:, None], 0, total))
        new = State(mean, eps, total, ended, opt_state, state.unanswered)
        return settle(state, new, sampling.antithetic.used(as_values(answers)))

    def estimate(self, state: State, population: Population, answers: Any) -> Params:
        """A generation's gradient, shaped like the parameters: the mean over the answered pairs.

        g = ((l+ - l-) xi + (l'+ - l'-) epsilon) / (2 sigma^2), with l the losses of the inner runs under way and l'
        those of runs that began inside the truncation.
        """
        before, _, after = self._slopes(told(population, answers))
        eps, total = self._perturbations(state, population)
        along = lambda g, rows: noises.weighted_rows(rows, jnp.where(jnp.isnan(g), 0, g) / (self.sigma * count(before)))
        _, unravel = trees.ravel(state.mean)
        return unravel((along(before, total) + along(after, eps)).astype(state.held.dtype))

    def recommend(self, state: State) -> Params:
        return state.mean

    def _perturbations(self, state: State, population: Population) -> tuple[Array, Array]:
        """This truncation's epsilon and xi, each (pairs, d)."""
        eps = population.genomes[::2]
        fresh = state.begins[:, None] if self.reuse else True
        return eps, state.total + jnp.where(fresh, eps, 0)

    def _slopes(self, answers: Any) -> tuple[Array, Array, Array]:
        """For each pair: the slope of the run under way, whether it ended, and the slope of the run that began."""
        if not isinstance(answers, tuple):
            before = probes.slopes(answers, self.sigma)
            return before, jnp.ones(before.shape, bool), jnp.full_like(before, jnp.nan)
        if [jnp.shape(x) for x in answers] != [(self.popsize,)] * 3:
            raise error(
                f"losses ({self.popsize},), or (losses, ended, after), each of that shape",
                str([jnp.shape(x) for x in answers]),
                "ends given for each pair instead of for each candidate",
            )
        values, ended, after = answers
        before, after = (probes.slopes(x, self.sigma) for x in (values, after))
        return before, ended[::2], jnp.where(ended[::2], after, jnp.nan)


def pes(
    popsize: int = 64,
    *,
    sigma: float = 0.01,
    learning_rate: float = 1e-2,
    optimizer: optax.GradientTransformation | None = None,
) -> PersistentES:
    """Persistent evolution strategies (Vicol et al. 2021): unbiased however short the truncations are.

    The caller keeps the inner states, two for each pair, and carries them across `tell`; both sides of a pair see the
    same data and keys. Answers are (losses, ended, after), each (n,): the loss of the run under way, whether it ended,
    and the loss from the next run's start to the truncation's end, NaN if no run began inside the truncation. Losses
    alone are those of whole runs. Start runs at different times to spread their ends over the generations.

    Args:
        popsize: candidates per generation, two for each inner run; even.
        sigma: standard deviation of the perturbation, in units of the parameters.
        learning_rate: the optimizer's.
        optimizer: an optax transformation of the gradient without its learning rate; Adam by default.

    Raises:
        ValueError: for an odd popsize, a sigma that is not positive, or answers of another shape.

    Ten steps of x <- 0.5 x + theta with a loss (x - 1)^2 each, five at a time; the best theta is near 0.5:

    >>> def truncation(theta, x):
    ...     def step(x, _):
    ...         x = 0.5 * x + theta
    ...         return x, (x - 1.0) ** 2
    ...     x, losses = jax.lax.scan(step, x, None, length=5)
    ...     return losses.sum(), x
    >>> strategy = pes(32, learning_rate=0.02)
    >>> state, inner = strategy.init(jnp.zeros(()), jax.random.key(0)), jnp.zeros(32)
    >>> for i in range(200):
    ...     population = strategy.ask(state, jax.random.key(i))
    ...     losses, inner = population.vmap(truncation, each=inner)
    ...     ended = jnp.full(32, i % 2 == 1)
    ...     state = strategy.tell(state, population, (losses, ended, jnp.full(32, jnp.nan)))
    ...     inner = jnp.where(ended, 0.0, inner)
    >>> bool(abs(strategy.recommend(state) - 0.53) < 0.03)
    True
    """
    return _persistent(popsize, sigma, learning_rate, False, optimizer)


def nres(
    popsize: int = 64,
    *,
    sigma: float = 0.01,
    learning_rate: float = 1e-2,
    optimizer: optax.GradientTransformation | None = None,
) -> PersistentES:
    """Noise-reuse evolution strategies (Li et al. 2023): one perturbation for a whole inner run.

    Its variance is lower than that of PES when a run has many truncations.

    Arguments, answers and errors are those of `pes`. A run that begins inside a truncation draws its perturbation with
    the next one and is paired with the sum of both, which keeps the estimate unbiased.

    >>> nres(4).reuse
    True
    """
    return _persistent(popsize, sigma, learning_rate, True, optimizer)


def _persistent(popsize: int, sigma: float, learning_rate: float, reuse: bool, optimizer: Any) -> PersistentES:
    optimizer = adam() if optimizer is None else optimizer
    return PersistentES(popsize, sigma, learning_rate, reuse, optimizer)
