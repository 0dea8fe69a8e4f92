"""QAOA for Max-Cut by particle swarms with an Adam step, on Erdos-Renyi and Watts-Strogatz graphs.

The quantum approximate optimization algorithm (Farhi, Goldstone, Gutmann, arXiv 1411.4028) prepares
prod_l exp(-i beta_l B) exp(-i gamma_l C) |+>, C the number of cut edges and B the sum of Pauli X, and its 2 p angles
are to make the expectation of C large: a rugged landscape for a classical optimizer. Here the state of up to some
fifteen qubits is simulated, so that the objective is JAX and its gradient is there; without it
(`adam_swarm(difference=...)`), as on a device, the swarm estimates it. Setting:
Bhat, Wang, Parampalli, arXiv 2506.06790.

    python examples/qaoa_maxcut.py --qubits 10 --depth 3
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import minimize, strategies


def erdos_renyi(n: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Edges (m, 2): every pair with probability p."""
    pairs = np.array([(i, j) for i in range(n) for j in range(i + 1, n)])
    return pairs[rng.random(len(pairs)) < p]


def watts_strogatz(n: int, k: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Edges (m, 2): a ring of n nodes with k neighbours each, whose far ends move with probability p."""
    edges = {(i, (i + j) % n) for i in range(n) for j in range(1, k // 2 + 1)}
    known = {frozenset(e) for e in edges}
    for i, j in sorted(edges):
        if rng.random() < p:
            free = [t for t in range(n) if t != i and frozenset((i, t)) not in known]
            if free:
                known.remove(frozenset((i, j)))
                known.add(frozenset((i, int(rng.choice(free)))))
    return np.array(sorted(tuple(sorted(e)) for e in known))


def cuts(edges: np.ndarray, n: int) -> np.ndarray:
    """The number of edges cut by each of the 2^n assignments, (2^n,)."""
    bits = (np.arange(2**n)[:, None] >> np.arange(n)[::-1]) & 1
    return (bits[:, edges[:, 0]] != bits[:, edges[:, 1]]).sum(axis=1)


def approximation_ratio(angles: dict[str, jax.Array], cut: jax.Array, n: int) -> jax.Array:
    """<C> / max C of the state with these angles: ()."""
    state = jnp.full(2**n, 2 ** (-n / 2), jnp.complex64)

    def layer(state: jax.Array, angle: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        gamma, beta = angle
        state = state * jnp.exp(-1j * gamma.astype(jnp.complex64) * cut.astype(jnp.complex64))
        cos, sin = jnp.cos(beta).astype(jnp.complex64), -1j * jnp.sin(beta).astype(jnp.complex64)
        for qubit in range(n):  # exp(-i beta X) on each
            pair = state.reshape(2**qubit, 2, -1)
            state = (cos * pair + sin * pair[:, ::-1]).reshape(-1)
        return state, None

    state, _ = jax.lax.scan(layer, state, (angles["gamma"], angles["beta"]))
    return jnp.sum(jnp.abs(state) ** 2 * cut) / cut.max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qubits", type=int, default=8)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--generations", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    n, depth = args.qubits, args.depth
    rng = np.random.default_rng(0)
    graphs = {"Erdos-Renyi": erdos_renyi(n, 0.5, rng), "Watts-Strogatz": watts_strogatz(n, 4, 0.3, rng)}
    box: dict[str, Any] = {"lower": {"gamma": 0.0, "beta": 0.0}, "upper": {"gamma": np.pi, "beta": np.pi / 2}}
    swarms = {
        "Adam swarm, gradient": lambda: strategies.adam_swarm(16, learning_rate=0.02, **box),
        "Adam swarm, estimated": lambda: strategies.adam_swarm(16, learning_rate=0.02, difference=0.02, **box),
        "fully informed swarm": lambda: strategies.fully_informed_swarm(16, **box),
        "particle swarm": lambda: strategies.particle_swarm(16, **box),
        "random search": lambda: strategies.random_search(16, **box),
    }
    start = {"gamma": jnp.full(depth, 0.5), "beta": jnp.full(depth, 0.3)}
    for graph, edges in graphs.items():
        cut = jnp.asarray(cuts(edges, n), jnp.float32)
        print(f"{graph}: {n} nodes, {len(edges)} edges, largest cut {int(cut.max())}, depth {depth}")
        for name, make in swarms.items():
            loss = lambda angles, cut=cut: -approximation_ratio(angles, cut, n)
            runs = [
                minimize(loss, start, make(), key=seed, generations=args.generations, progress=False)
                for seed in range(args.seeds)
            ]
            ratios = [-r.best_value for r in runs]
            median, worst, used = np.median(ratios), min(ratios), runs[0].evaluations
            print(f"  {name:24s} ratio {median:.4f} (worst {worst:.4f}) in {used} evaluations")


if __name__ == "__main__":
    main()
