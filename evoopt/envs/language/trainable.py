"""What of a model is searched: `(x, merge)`, the trainable tree and the way from it to all parameters.

A strategy searches `x`; `merge(x)` puts it into the frozen parameters, by reference: it copies and computes nothing, so
that leaves which are virtual stay so, and the frozen part is in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from evoopt.envs.language import transformer
from evoopt.envs.language.model import Model
from evoopt.trees import path_name
from evoopt.types import Array, Key, Params, error

Trainable = tuple[Params, Partial]
THEIRS = {  # names that transformers and PEFT have for our linear maps
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down", "fc1": "up", "fc2": "down", "c_fc": "up", "query": "q", "key": "k", "value": "v",
    "c_attn": "q", "c_proj": "o", "dense": "o",
}  # fmt: skip


def full(params: Params) -> Trainable:
    """Everything."""
    return params, Partial(overlay, {})


def subset(params: Params, wanted: Callable[[str], bool]) -> Trainable:
    """The leaves of whose path `wanted` is true, as in `lambda path: path.startswith("layers/q/")`.

    Raises:
        ValueError: when there is none.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    chosen = {path: leaf for path, leaf in leaves.items() if wanted(path)}
    if not chosen:
        got = f"none of {', '.join(list(leaves)[:8])} ..."
        raise error("at least one leaf to train", got, "paths are like 'layers/q/w'; a model without biases")
    frozen = {path: leaf for path, leaf in leaves.items() if path not in chosen}
    return transformer.nested(chosen), Partial(overlay, transformer.nested(frozen))


def biases_and_norms(params: Params) -> Trainable:
    """The biases of the layers and the scales of their norms: about a thousandth of a model.

    BitFit (Ben Zaken et al. 2022) trains the biases only; many a Llama has none.
    """
    return subset(params, lambda path: path.startswith("layers/") and path.endswith(("/b", "/scale")))


def lora(
    params: Params, key: Key, *, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = ("q", "v")
) -> Trainable:
    """Low-rank additions `w + (alpha / rank) a b` to the weights `targets` of every layer (Hu et al. 2022).

    a (layers, in, rank) is uniform in ±1/sqrt(in), b (layers, rank, out) is zero: `merge(x)` is the model as it was.
    Both are float32. `targets` are names of linear maps: q, k, v, o, gate, up, down. Defaults: the paper's experiments
    and MeZO's.

    Raises:
        ValueError: a target the model lacks, or a rank below 1 or above the weight's.
    """
    there = [name for name, p in params["layers"].items() if "w" in p]
    x: Params = {"layers": {}}
    frozen = {**params, "layers": dict(params["layers"])}
    for i, name in enumerate(targets):
        if name not in there:
            theirs = next((ours for ours in there if THEIRS.get(str(name)) == ours), None)
            cause = f"another library's name of the same map, which is '{theirs}' here" if theirs else "a misspelt name"
            raise error(f"targets among {', '.join(there)}", repr(name), cause)
        layers, m, n = params["layers"][name]["w"].shape
        if not 1 <= rank <= min(m, n):
            raise error(f"a rank between 1 and {min(m, n)}", f"rank={rank}", f"'{name}' has {m} inputs, {n} outputs")
        a = jax.random.uniform(jax.random.fold_in(key, i), (layers, m, rank), jnp.float32, -1.0, 1.0) * m**-0.5
        x["layers"][name] = {"lora": {"a": a, "b": jnp.zeros((layers, rank, n), jnp.float32)}}
        scale = jnp.full((layers,), alpha / rank, jnp.float32)
        frozen["layers"][name] = {**params["layers"][name], "lora": {"scale": scale}}
    return x, Partial(overlay, frozen)


def prefix(model: Model, params: Params, key: Key, *, length: int = 5, tokens: Array | None = None) -> Trainable:
    """Keys and values of `length` places that stand before every sequence, in every layer (Li and Liang 2021).

    They start as those of real tokens (MeZO, Malladi et al. 2023, appendix E.5): of `tokens` (length,), or of random
    ones. A decoder then answers as if these tokens had been prepended. They are float32, (layers, length, kv_heads,
    head_size).

    Raises:
        ValueError: a length below 1 or above what the context has room for.
    """
    c = model.config
    if tokens is None:
        tokens = jax.random.randint(key, (max(length, 1),), 0, c.vocabulary, jnp.int32)
    if not 1 <= len(tokens) < c.context:
        raise error(f"a prefix of 1 to {c.context - 1} places", str(len(tokens)), "the context has to hold text too")
    k, v = transformer.keys_and_values(c, params, jnp.asarray(tokens, jnp.int32)[None])
    x = {"prefix": {"k": k[:, 0].astype(jnp.float32), "v": v[:, 0].astype(jnp.float32)}}
    return x, Partial(overlay, params)


def overlay(frozen: Params, x: Params) -> Params:
    """`frozen` with the leaves of `x` added or put in their place; both are dicts of dicts."""
    if not isinstance(x, dict):
        return x
    below = frozen if isinstance(frozen, dict) else {}
    return {**below, **{name: overlay(below.get(name, {}), leaf) for name, leaf in x.items()}}
