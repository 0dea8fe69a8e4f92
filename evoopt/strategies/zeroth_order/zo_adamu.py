"""ZO-AdaMU: momentum and adaptivity in the perturbation instead of in the gradient estimate.

Source: Jiang, Chen, Pan, Shi, Peng, Zhang et al., "ZO-AdaMU optimizer: adapting perturbation by the momentum and
uncertainty in zeroth-order optimization", AAAI 2024. This implements algorithm 1; it does not claim the published
results, whose released code cannot run. Where text, figure and algorithm differ:

- The second argument of N(0, sqrt(alpha)) is a standard deviation, as in the code.
- The schedule of eq. 7 as printed neither starts at 1 nor matches figure 1. Here it is
  max(floor, 1/2 + 1/2 cos(pi min(1, (t - T1) / (T3 - phi (t - T1) (T3 - T2) / (T2 - T1))))) between T1 and T2,
  1 before and frozen after. With the figure's borders T/6, 2T/3, T and phi = 0.1, 1, 1.5 it ends at .473, .146, .01 for
  alpha, beta1, beta2, the figure's .47, .146, .01. The text swaps the phi of alpha and beta1, and gives a constant
  .9 for the last phase, which is the momentum's weight 1 - beta1.
- The ratio is cut at 1, so that a large phi cannot turn the cosine back past pi.
- The floor is kept, because the bound |m| / sqrt(v) <= sqrt(beta1^2 / beta2 + (1 - beta1)^2 / (1 - beta2)), 1.70 at the
  end of the default schedule, grows without limit as beta2 goes to 0.
- The denominator is sqrt(v + 1e-8), as in algorithm 1; eq. 6 prints v^2.
- The step follows the perturbation that was probed, and the schedule advances once per step. The released code probes
  and updates with different mixtures, and advances once per tensor.
- `signed_momentum` is in the released code but not in the text: it keeps sign(g) m as the momentum. Without it the
  momentum ignores the loss and is a random walk of the perturbation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.answers import as_values, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static

SMALL = 1e-8  # sigma under the root of algorithm 1


class State(NamedTuple):
    """The state of ZO-AdaMU. The second moment is not part of it: it depends only on the current step's draws."""

    mean: Params
    momentum: Params  # m from the last step
    steps: Array  # () int32, steps taken
    unanswered: Array  # () int32, steps without a usable probe


def mixed(z1: Array, z2: Array, momentum: Array, weights: tuple[Array, Array, Array]) -> Array:
    """m_t = beta1 z' + (1 - beta1) z'', the perturbation."""
    _, b1, _ = weights
    fresh, old = _draws(z1, z2, momentum, weights)
    return b1 * fresh + (1 - b1) * old


def adapted(z1: Array, z2: Array, momentum: Array, weights: tuple[Array, Array, Array]) -> Array:
    """m_t / sqrt(v_t + 1e-8), v_t = beta2 z'^2 + (1 - beta2) z''^2."""
    b2 = weights[2]
    fresh, old = _draws(z1, z2, momentum, weights)
    v = b2 * fresh * fresh + (1 - b2) * old * old
    return mixed(z1, z2, momentum, weights) / jnp.sqrt(v + SMALL)


def _draws(z1: Array, z2: Array, momentum: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """The draws z' around 0 and z'' around the momentum, from two standard normals."""
    alpha = weights[0]
    return jnp.sqrt(alpha) * z1, momentum + jnp.sqrt(1 - alpha) * z2


def anneal(t: Any, phi: Any, borders: tuple[Any, Any, Any], floor: float = 0.01) -> Array:
    """The weight at step t: 1 before the first border, a cosine between the first and second, then frozen.

    >>> [round(float(anneal(t, 1.0, (10, 40, 60))), 3) for t in (0, 10, 25, 40, 99)]
    [1.0, 1.0, 0.794, 0.146, 0.146]
    """
    t1, t2, t3 = (jnp.asarray(b, jnp.float32) for b in borders)
    since = jnp.clip(jnp.asarray(t, jnp.float32) - t1, 0, t2 - t1)
    denominator = t3 - phi * since * (t3 - t2) / (t2 - t1)
    ratio = jnp.where(denominator > 0, jnp.minimum(1.0, since / jnp.where(denominator > 0, denominator, 1)), 1.0)
    return jnp.maximum(floor, 0.5 + 0.5 * jnp.cos(jnp.pi * ratio))


@pytree
class ZOAdaMU:
    """Perturbations adapted by momentum and uncertainty; see `zo_adamu`."""

    sigma: float
    learning_rate: float
    borders: tuple[Any, Any, Any]  # T1 < T2 < T3, in steps
    phi: tuple[Any, Any, Any]  # of alpha, beta1, beta2
    floor: float
    signed_momentum: bool = static()
    noise: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if all(isinstance(b, (int, float)) for b in self.borders) and not sorted(set(self.borders)) == [*self.borders]:
            raise error("borders T1 < T2 < T3 in steps", str(self.borders), "borders as shares, or too few steps")

    def init(self, params: Params, key: Key) -> State:
        del key
        mean, zero = probes.movable(params, self.sigma), jnp.zeros((), jnp.int32)
        return State(mean, jax.tree.map(jnp.zeros_like, mean), zero, zero)

    def weights(self, steps: Array) -> tuple[Array, Array, Array]:
        """alpha, beta1, beta2 after `steps` steps."""
        alpha, b1, b2 = (anneal(steps, phi, self.borders, self.floor) for phi in self.phi)
        return alpha, b1, b2

    def direction(self, state: State, f: Any) -> noises.Elementwise:
        """The noise f(z', z'', momentum)."""
        return noises.Elementwise(self.noise, (state.momentum,), self.weights(state.steps), f, draws=2)

    def ask(self, state: State, key: Key) -> Population:
        key, noise = noises.replayable(key), self.direction(state, mixed)
        return sampling.sample(noise, sampling.antithetic, key, 2, state.mean, self.sigma, regenerate=True)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        (g,) = probes.average(probes.slopes(values, self.sigma))
        address = jax.tree.map(lambda a: a[0], population.genomes.address)
        used = sampling.antithetic.used(values)
        some = jnp.isfinite(used).any()
        # From slices of the momentum: a drawer of `direction` would hold all of it, which is a second copy.
        draw, weights = probes.drawer(self.noise, state.mean), self.weights(state.steps)

        def update(i: int, layer: Array | None, mean: Array, momentum: Array) -> tuple[Array, Array]:
            z1, z2 = (draw(jax.tree.map(lambda a, k=k: a[k], address), i, layer, mean) for k in range(2))
            alpha, b1, b2 = (w.astype(mean.dtype) for w in weights)
            m = mixed(z1, z2, momentum, (alpha, b1, b2))
            step = (self.learning_rate * g).astype(mean.dtype) * adapted(z1, z2, momentum, (alpha, b1, b2))
            kept = jnp.where(g < 0, -m, m) if self.signed_momentum else m
            return mean - step, jnp.where(some, kept, momentum)  # a step without an answer changes nothing

        mean, momentum = probes.by_slice(update, state.mean, state.momentum)
        new = State(mean, momentum, state.steps + 1, state.unanswered)
        return probes.settle_in_place(state, new, used, ("mean", "momentum"))

    def recommend(self, state: State) -> Params:
        return state.mean


def zo_adamu(
    steps: int = 20_000,
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-6,
    borders: tuple[float, float, float] | None = None,
    phi: tuple[float, float, float] = (0.1, 1.0, 1.5),
    floor: float = 0.01,
    signed_momentum: bool = False,
    noise: Any = noises.gaussian,
) -> ZOAdaMU:
    """ZO-AdaMU, algorithm 1 (Jiang et al. 2024): two forward passes per step, one more copy of the parameters.

    The module's docstring lists differences from the paper's text. On toy problems without noise it does not beat MeZO.

    Args:
        steps: length of the whole run; the default borders are shares of it.
        sigma: epsilon in the paper, the scale of a probe in units of the parameters.
        learning_rate: constant. The step is g m / sqrt(v), so at first it is about as long as a sign step.
        borders: (T1, T2, T3) in steps; steps / 6, 2 steps / 3, steps by default, as in figure 1.
        phi: sets how low alpha, beta1 and beta2 end.
        floor: the smallest value of these weights.
        signed_momentum: keep sign(g) m as momentum, as the released code does.
        noise: `gaussian` as in the paper, or any other noise whose leaves can be drawn one at a time.

    Raises:
        ValueError: for borders that do not rise, or at `init` for a sigma that the parameters' dtype rounds away.

    >>> from evoopt import minimize
    >>> strategy = zo_adamu(2000, learning_rate=0.01)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=2000)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    check_popsize(steps, 1, name="steps")
    borders = (steps / 6, 2 * steps / 3, float(steps)) if borders is None else borders
    return ZOAdaMU(sigma, learning_rate, borders, phi, floor, signed_momentum, noise)
