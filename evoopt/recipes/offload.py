"""Models larger than the device: blocks stay on the host, and are updated, perturbed and run one at a time.

A zeroth-order step needs every block once. The block is copied to the device, gets the update of the previous step
(from that step's addresses and slopes), is run for every candidate with its noise, and is copied back. The parameters
cross the bus once each way in a step, and the device holds a few blocks, the rest of the model, and the activations of
the candidates.

Source: Wang, Chao, Liu, Zhang, Zheng, "ZO2: scalable zeroth-order fine-tuning for extremely large language models with
limited GPU memory", arXiv 2503.12668, algorithms 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.types import Array, Key, Objective, Params, error

PARTS = ("embed", "blocks", "head")


def sequential(embed: Callable[..., Any], block: Callable[..., Any], head: Callable[..., Any]) -> Objective:
    """The objective of a model in three parts, all of it on the device: what `Offloaded` computes piece by piece."""

    def objective(params: Params, *args: Any) -> Array:
        hidden, _ = jax.lax.scan(lambda h, p: (block(p, h), None), embed(params["embed"], *args), params["blocks"])
        return head(params["head"], hidden, *args)

    return objective


class Offloaded:
    """MeZO on parameters whose blocks are on the host; see the module.

    In float32 with full-rank noise the values and the parameters are those of `strategy` on `sequential(embed, block,
    head)`, bit for bit where XLA rounds a block alone as it does inside the scan (a test holds this on the CPU). With
    low-rank noise they agree to rounding: here a block's noise is made, there it is multiplied through.

    Args:
        strategy: `mezo` or `comparison_descent`; anything with their `update`, `noise`, `sigma` and `decayed`.
        params: {"embed": ..., "blocks": ..., "head": ...}; leaves of "blocks" have the layers as leading axis. Those
            with three axes or more stay on the host; the others (biases, scales) are small and stay on the device.
        embed: `embed(params["embed"], *args) -> hidden`.
        block: `block(a layer of params["blocks"], hidden) -> hidden`, with the shape it got.
        head: `head(params["head"], hidden, *args) -> value`.
        copy: False updates the given NumPy arrays of "blocks" in place, for example writable memory maps of a disk.
        watch: called with the number of the layer after each block, for example to measure memory.

    >>> from evoopt.strategies import mezo
    >>> params = {"embed": jnp.eye(2), "blocks": jnp.ones((3, 2, 2)), "head": jnp.ones(2)}
    >>> model = Offloaded(
    ...     mezo(learning_rate=1e-4), params,
    ...     embed=lambda p, x: x @ p, block=lambda p, h: jnp.tanh(h @ p), head=lambda p, h, x: jnp.sum(h @ p) ** 2,
    ... )
    >>> values = [model.step(jax.random.key(i), jnp.ones((1, 2))) for i in range(2)]
    >>> len(values[0]), bool(model.value(jnp.ones((1, 2))) < values[0].max())
    (2, True)

    Attributes:
        unanswered: steps in which no probe was usable.
    """

    def __init__(
        self,
        strategy: Any,
        params: Params,
        *,
        embed: Callable[..., Any],
        block: Callable[..., Any],
        head: Callable[..., Any],
        copy: bool = True,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        if not isinstance(params, dict) or sorted(params) != sorted(PARTS):
            raise error(
                f"parameters as a dict of {', '.join(PARTS)}", str(list(params)), "a model that is not in parts"
            )
        named, self._treedef = jax.tree_util.tree_flatten_with_path(params)
        layers = {np.shape(x)[0] if np.ndim(x) else 0 for path, x in named if path[0].key == "blocks"}
        if len(layers) != 1 or layers == {0}:
            raise error("blocks whose leaves all have the layers in front", f"lengths {layers}", "layers in a list")
        self.layers, self.strategy, self.unanswered = layers.pop(), strategy, 0
        self._watch = watch or (lambda layer: None)
        self._places = {p: [i for i, (path, _) in enumerate(named) if path[0].key == p] for p in PARTS}
        self._structure = {p: jax.tree.structure(params[p]) for p in PARTS}
        self._like = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for _, x in named]
        self._pulled = jax.tree.leaves(strategy.decayed(self._treedef.unflatten(self._like)))
        streamed = [i for i in self._places["blocks"] if noises.is_stack(self._like[i])]
        host = lambda x: np.array(x) if copy else x
        self._host = {i: host(named[i][1]) for i in streamed}
        self._resident = {i: jnp.array(x) for i, (_, x) in enumerate(named) if i not in streamed}
        self._pending: Any = None  # (addresses, weights, shrink) of the last step

        pick = lambda leaves, part, layer=None: self._structure[part].unflatten(
            [x if layer is None or i in streamed else x[layer] for i, x in leaves.items() if i in self._places[part]]
        )

        def begin(resident: Any, genome: Any, args: Any) -> Any:
            return embed(pick(self._probed(self._of(resident, "embed"), genome), "embed"), *args)

        def middle(mine: Any, resident: Any, layer: Array, genome: Any, hidden: Any) -> Any:
            leaves = self._probed(mine, genome, layer) | self._probed(self._of(resident, "blocks"), genome)
            return block(pick(dict(sorted(leaves.items())), "blocks", layer), hidden)

        def end(resident: Any, genome: Any, hidden: Any, args: Any) -> Any:
            return head(pick(self._probed(self._of(resident, "head"), genome), "head"), hidden, *args)

        self._begin, self._middle, self._end = jax.jit(begin), jax.jit(middle), jax.jit(end)
        self._update, self._tell = jax.jit(self._updated, donate_argnums=0), jax.jit(strategy.update)

    def step(self, key: Key, *args: Any) -> np.ndarray:
        """One step on the data `args`: the candidates' values (n,). Its update is applied during the next pass."""
        s = self.strategy
        scheme = probes.scheme(s.two_sided)
        population = sampling.sample(s.noise, scheme, noises.replayable(key), s.popsize, None, s.sigma, regenerate=True)
        genomes = [jax.tree.map(lambda g, j=j: g[j], population.genomes) for j in range(s.popsize)]
        values = jnp.stack(self._pass(genomes, args))
        used = scheme.used(values)
        self.unanswered += int(not bool(jnp.isfinite(used).any()))
        self._pending = self._tell(population, values)
        return np.asarray(values)

    def value(self, *args: Any) -> Array:
        """The value of the parameters themselves, after the pending update."""
        return self._pass([None], args)[0]

    def flush(self) -> None:
        """Apply the pending update to everything."""
        if self._pending is not None:
            self._resident = self._update(self._resident, self._pending)
            for layer in range(self.layers):
                self._store(layer, self._update(self._fetch(layer), self._pending, jnp.int32(layer)))
            self._pending = None

    @property
    def params(self) -> Params:
        """All parameters, up to date, as NumPy arrays."""
        self.flush()
        leaves = self._host | {i: np.asarray(x) for i, x in self._resident.items()}
        return self._treedef.unflatten([leaves[i] for i in range(len(leaves))])

    def _pass(self, genomes: list[Any], args: Any) -> list[Array]:
        pending, self._pending = self._pending, None
        update = (
            (lambda leaves, *layer: self._update(leaves, pending, *layer)) if pending else lambda leaves, *_: leaves
        )
        self._resident = update(self._resident)
        hidden = [self._begin(self._resident, genome, args) for genome in genomes]
        coming, going = self._fetch(0), None
        for layer in range(self.layers):
            number = jnp.int32(layer)
            block = update(coming, number)
            coming = self._fetch(layer + 1) if layer + 1 < self.layers else None  # on its way while this one is run
            hidden = [
                self._middle(block, self._resident, number, genome, h)
                for genome, h in zip(genomes, hidden, strict=True)
            ]
            if going is not None:
                self._store(*going)
            going = (layer, block) if pending else None
            self._watch(layer)
        if going is not None:
            self._store(*going)
        return [self._end(self._resident, genome, h, args) for genome, h in zip(genomes, hidden, strict=True)]

    def _fetch(self, layer: int) -> dict[int, Array]:
        # Copied: on a CPU the device would share the memory of the host's array, which is written to.
        return {i: jnp.array(x[layer]) for i, x in self._host.items()}

    def _store(self, layer: int, block: dict[int, Array]) -> None:
        for i, x in block.items():
            self._host[i][layer] = x

    def _of(self, leaves: dict[int, Array], part: str) -> dict[int, Array]:
        return {i: x for i, x in leaves.items() if i in self._places[part]}

    def _kinds(self) -> list[Any]:
        return self.strategy.noise.kinds(self._treedef.unflatten(self._like))

    def _probed(self, leaves: dict[int, Array], genome: Any, layer: Array | None = None) -> dict[int, Array]:
        """Leaves, or slices of a layer, + sign * sigma * z."""
        if genome is None:
            return leaves
        scale, kinds = self.strategy.sigma * genome.sign, self._kinds()

        def probed(i: int, x: Array) -> Array:
            if kinds[i] is None:
                return x
            if layer is None:
                return x + scale.astype(x.dtype) * noises.leaf(kinds[i], genome.address, i, x)
            return x + scale.astype(x.dtype) * kinds[i].slice(
                kinds[i].seeds(genome.address, i, self._like[i], layer), x
            )

        return {i: probed(i, x) for i, x in leaves.items()}

    def _updated(self, leaves: dict[int, Array], pending: Any, layer: Array | None = None) -> dict[int, Array]:
        """Leaves, or slices of a layer, after the update of the step before."""
        addresses, weights, shrink = pending
        kinds = self._kinds()

        def updated(i: int, x: Array) -> Array:
            kind, decay, narrow = kinds[i], shrink if self._pulled[i] else 0.0, noises.Narrow(x.dtype)
            if kind is None:
                return noises.decayed(x, decay, narrow)
            seeds = lambda address, place=layer: kind.seeds(address, i, self._like[i], place)
            terms = noises.Terms(seeds, addresses, -weights, decay)
            return noises.add_to_leaf(x, kind, terms, narrow, one_slice=layer is not None)

        return {i: updated(i, x) for i, x in leaves.items()}
