"""Particle swarms: with constriction, on a ring or fully connected, fully informed, and with an added gradient step.

Sources: Kennedy, Eberhart, "Particle swarm optimization", ICNN 1995; Clerc, Kennedy, "The particle swarm - explosion,
stability, and convergence in a multidimensional complex space", IEEE TEVC 6 (2002), type 1'' with its chi; Kennedy,
Mendes, "Population structure and particle swarm performance", CEC 2002 (ring); Mendes, Kennedy, Neves, "The fully
informed particle swarm: simpler, maybe better", IEEE TEVC 8 (2004), equations (3) to (5); Bhat, Wang, Parampalli, "Adam
assisted fully informed particle swarm optimization based parameter prediction for the quantum approximate optimization
algorithm", arXiv 2506.06790 (the gradient step; Kingma, Ba, "Adam", 2015).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, settle, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.first_order.updates import adam, descend
from evoopt.strategies.populations import variation
from evoopt.strategy import value, value_and_grad
from evoopt.types import Array, Key, Params, error, pytree, static

Pull = Callable[[Key, Array, Array, Array, int | None, Array], Array]


def own_and_best(key: Key, x: Array, best: Array, values: Array, radius: int | None, phi: Array) -> Array:
    """U(0, phi/2) (p_i - x_i) + U(0, phi/2) (p_g - x_i): a particle's own best place and its neighbours', (n, d)."""
    n = x.shape[0]
    if radius is None:
        leader = best[jnp.argmin(values)]
    else:
        near = (jnp.arange(n)[:, None] + jnp.arange(-radius, radius + 1)) % n
        leader = best[near[jnp.arange(n), jnp.argmin(values[near], axis=1)]]

    def drawn() -> Array:
        u_own, u_best = variation.uniform_pairs(key, x.shape, x.dtype)
        return phi / 2 * (u_own * (best - x) + u_best * (leader - x))

    return noises.stored(drawn)


def fully_informed(key: Key, x: Array, best: Array, values: Array, radius: int | None, phi: Array) -> Array:
    """sum_k U(0, phi / K) (p_k - x_i) over the K neighbours of particle i, itself excluded: (n, d)."""
    del values
    n = x.shape[0]
    offsets = jnp.arange(1, n) if radius is None else jnp.array([o for o in range(-radius, radius + 1) if o])

    def neighbour(total: Array, step: Any) -> Any:
        offset, key = step
        u = variation.uniforms(key, x.shape, x.dtype)
        return total + u * (jnp.roll(best, -offset, axis=0) - x), None

    total, _ = jax.lax.scan(neighbour, jnp.zeros_like(x), (offsets, jax.random.split(key, len(offsets))))
    return phi / len(offsets) * total


class Genome(NamedTuple):
    """A particle, or a probe of the objective beside it."""

    x: Array  # (m, d), the point to evaluate
    particle: Array  # (m, d), the particle's position
    velocity: Array  # (m, d)


class State(NamedTuple):
    """The state of the swarm."""

    x: Array  # (n, d)
    velocity: Array  # (n, d)
    best: Array  # (n, d), the best place of every particle
    values: Array  # (n,), the values there; +inf until they are answered
    correction: Any  # (n, d), the next gradient step; () without gradients
    opt_state: Any
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class ParticleSwarm:
    """Particle swarm optimization; see `particle_swarm`, `fully_informed_swarm`, `adam_swarm`."""

    popsize: int = static()
    pull: Pull = static()
    phi: float
    radius: int | None = static()
    optimizer: optax.GradientTransformation | None = static()
    learning_rate: float
    difference: float | None  # half the distance between two probes; None if the objective gives the gradient
    spread: float
    lower: Any
    upper: Any

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2)
        if self.radius is not None and not 1 <= self.radius <= (self.popsize - 1) // 2:
            expected = f"1 <= radius <= {(self.popsize - 1) // 2}, so that neighbours differ"
            raise error(expected, f"radius={self.radius}", "a small popsize")
        if isinstance(self.phi, (int, float)) and self.phi <= 4:
            raise error("phi above 4", str(self.phi), "c1 = c2 = 2; the usual value is 4.1")

    @property
    def oracle(self) -> Any:
        return value if self.optimizer is None or self.difference is not None else value_and_grad

    def init(self, params: Params, key: Key) -> State:
        x, unravel = variation.scattered(params, key, self.popsize, self.spread, self.lower, self.upper)
        step, opt_state = (), ()
        if self.optimizer is not None:
            step, opt_state = jnp.zeros_like(x), trees.strong(self.optimizer.init(x))
        zero = jnp.zeros((), jnp.int32)
        return State(x, jnp.zeros_like(x), x, variation.unknown(self.popsize), step, opt_state, zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        key_pull, key_probe = jax.random.split(noises.replayable(key))
        phi = jnp.asarray(self.phi, state.x.dtype)
        chi = 2 / (phi - 2 + jnp.sqrt(phi**2 - 4 * phi))  # Clerc and Kennedy's constriction, 0.7298 for 4.1
        pull = self.pull(key_pull, state.x, state.best, state.values, self.radius, phi)
        velocity = chi * (state.velocity + pull)
        x = state.x + velocity
        if self.optimizer is not None:
            x = x + state.correction
        box = variation.box(self.lower, self.upper, state.unravel)
        if box is not None:  # stopped by the wall
            inside = (x >= box[0]) & (x <= box[1])
            x, velocity = jnp.clip(x, *box), jnp.where(inside, velocity, 0)
        first = state.generation == 0  # evaluates the initial positions
        x, velocity = jnp.where(first, state.x, x), jnp.where(first, state.velocity, velocity)
        genome = Genome(x, x, velocity)
        if self.optimizer is not None and self.difference is not None:
            delta = self._probes(x, key_probe)
            asked = jnp.concatenate([x, x + delta, x - delta])
            genome = Genome(asked, *(jnp.tile(a, (3, 1)) for a in (x, velocity)))
        return Population(variation.decoding(state.unravel), genome)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        answers = told(population, answers)
        values, genome, n = as_values(answers), population.genomes, self.popsize
        x, velocity = genome.particle[:n], genome.velocity[:n]
        new = values[:n].astype(state.values.dtype)
        better = answered(new) & (new < state.values)
        best = jnp.where(better[:, None], x, state.best)
        kept = jnp.where(better, new, state.values)
        step, opt_state = state.correction, state.opt_state
        if self.optimizer is not None:
            gradient = self._gradient(genome, answers).astype(x.dtype)
            updates, opt_state = descend(self.optimizer, gradient, opt_state, x)
            step = jnp.asarray(-self.learning_rate, x.dtype) * updates
        new_state = State(
            x, velocity, best, kept, step, opt_state, state.generation + 1, state.unravel, state.unanswered
        )
        return settle(state, new_state, values)

    @property
    def moved(self) -> Any:
        """The particles at other points, with their velocities; see `evoopt.injection`. Probes can't be moved."""
        if self.optimizer is not None and self.difference is not None:
            raise AttributeError("moved")  # a probe belongs to its particle
        return self._moved

    def _moved(self, state: State, population: Population, points: Params) -> Population:
        box = variation.box(self.lower, self.upper, state.unravel)
        new = variation.moved(population, points, box)
        return new.with_genomes(new.genomes._replace(particle=new.genomes.x))

    def recommend(self, state: State) -> Params:
        return state.unravel(state.best[jnp.argmin(state.values)])

    def _probes(self, x: Array, key: Key) -> Array:
        return jnp.asarray(self.difference, x.dtype) * noises.signs(key, x.size, x.dtype).reshape(x.shape)

    def _gradient(self, genome: Genome, answers: Any) -> Array:
        """The gradient at every particle, (n, d); 0 without an answer."""
        if self.difference is None:
            gradient = jax.vmap(trees.flatten)(answers[1])
        else:  # SPSA: (f(x + delta) - f(x - delta)) / 2 delta_j, delta_j = +-c
            _, plus, minus = jnp.split(as_values(answers), 3)
            delta = jnp.split(genome.x - genome.particle, 3)[1]
            gradient = (plus - minus).astype(delta.dtype)[:, None] / (2 * jnp.where(delta == 0, jnp.inf, delta))
        return jnp.where(jnp.isfinite(gradient).all(axis=1, keepdims=True), gradient, 0)


def particle_swarm(
    popsize: int = 40,
    *,
    phi: float = 4.1,
    radius: int | None = None,
    spread: float = 1.0,
    lower: Any = None,
    upper: Any = None,
) -> ParticleSwarm:
    """Particle swarm optimization with constriction (Clerc and Kennedy 2002).

    Args:
        popsize: particles.
        phi: the sum of the two pulls, above 4.
        radius: None for a single neighbourhood, 1 for the ring of Kennedy and Mendes, which is slower and safer.
        spread: standard deviation of the first swarm around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first swarm is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), particle_swarm(20), generations=150)
    >>> result.best_value < 1e-6
    True
    """
    return ParticleSwarm(popsize, own_and_best, phi, radius, None, 0.0, None, spread, lower, upper)


def fully_informed_swarm(
    popsize: int = 40,
    *,
    phi: float = 4.1,
    radius: int | None = 1,
    spread: float = 1.0,
    lower: Any = None,
    upper: Any = None,
) -> ParticleSwarm:
    """The fully informed particle swarm (Mendes, Kennedy and Neves 2004): all neighbours pull alike.

    Args:
        popsize: particles.
        phi: the sum of all pulls, above 4.
        radius: 1 for the ring, which is the paper's best along with its square; None for all, in O(n^2 d) time.
        spread: standard deviation of the first swarm around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first swarm is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), fully_informed_swarm(20), generations=300)
    >>> result.best_value < 1e-6
    True
    """
    return ParticleSwarm(popsize, fully_informed, phi, radius, None, 0.0, None, spread, lower, upper)


def adam_swarm(
    popsize: int = 20,
    *,
    learning_rate: float = 0.01,
    difference: float | None = None,
    phi: float = 4.1,
    radius: int | None = 1,
    optimizer: optax.GradientTransformation | None = None,
    spread: float = 1.0,
    lower: Any = None,
    upper: Any = None,
) -> ParticleSwarm:
    """The fully informed swarm with an Adam step for every particle (Bhat et al. 2025): x <- x + v - Adam's step.

    Only the abstract and a summary of this paper were at hand. They give the idea, a swarm whose particles also take
    Adam's step (equations 16 to 19 of its third version); the combination is ours, and the swarm is that of
    `fully_informed_swarm`, with constriction instead of the paper's inertia weight.

    Args:
        popsize: particles.
        learning_rate: rate of the gradient step.
        difference: None for a differentiable objective: the answers are (value, gradient), as from `value_and_grad`.
            A number: the gradient is estimated from two probes at this distance along random signs (SPSA), which takes
            three candidates per particle.
        phi, radius: as in `fully_informed_swarm`.
        optimizer: an optax transformation without its learning rate; Adam by default.
        spread: standard deviation of the first swarm around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first swarm is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), adam_swarm(10), generations=300)
    >>> result.best_value < 1e-6
    True
    """
    optimizer = adam() if optimizer is None else optimizer
    if difference is not None:
        check_sigma(difference, "difference")
    return ParticleSwarm(
        popsize, fully_informed, phi, radius, optimizer, learning_rate, difference, spread, lower, upper
    )
