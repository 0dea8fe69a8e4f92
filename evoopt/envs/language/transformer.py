"""One transformer, decoder or encoder: what `Config` says. Plain functions of a tree of weights, layers under `scan`.

The tree: `embed` (`tokens`, `positions`, `types`, `norm`, `project_in`, `project_out`), `layers` (`attention_norm`,
`q`, `k`, `v`, `o`, `q_norm`, `k_norm`, `mlp_norm`, `gate`, `up`, `down`), `norm`, `head`. A leaf of `layers` has a
leading axis of layers. A linear map is `{"w": (in, out), "b": (out,)}` and is used as `x @ w + b`; a norm is
`{"scale", "b"}`.

Two additions to the tree change the model without copying a weight: `lora` beside a `w` (see `dense`) and `prefix`
beside `layers` (see `attention`).

Activations have the dtype of the token table. Norms and softmax are computed in float32, and logits are given in it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.envs.language.config import Config
from evoopt.types import Array, Key, Params, error

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """path -> shape of every leaf; leaves below `layers` have a leading axis of layers."""
    c, found = config, {}
    heads, kv = c.heads * c.head_size, c.kv_heads * c.head_size

    def norm(path: str, *size: int) -> None:
        found[f"{path}/scale"] = size
        if not c.rms:
            found[f"{path}/b"] = size

    def linear(path: str, *size: int, bias: bool) -> None:
        found[f"{path}/w"] = size
        if bias:
            found[f"{path}/b"] = (*size[:-2], size[-1])

    found["embed/tokens"] = (c.vocabulary, c.embedding_width)
    if c.positions:
        found["embed/positions"] = (c.positions, c.width)
    if c.types:
        found["embed/types"] = (c.types, c.width)
    if c.embedding_norm:
        norm("embed/norm", c.width)
    if c.embedding_width != c.width:
        linear("embed/project_in", c.embedding_width, c.width, bias=False)
        linear("embed/project_out", c.width, c.embedding_width, bias=False)
    n = c.layers
    norm("layers/attention_norm", n, c.width)
    linear("layers/q", n, c.width, heads, bias=c.qkv_bias)
    linear("layers/k", n, c.width, kv, bias=c.qkv_bias)
    linear("layers/v", n, c.width, kv, bias=c.qkv_bias)
    linear("layers/o", n, heads, c.width, bias=c.output_bias)
    if c.qk_norm:
        found["layers/q_norm/scale"] = found["layers/k_norm/scale"] = (n, c.head_size)
    norm("layers/mlp_norm", n, c.width)
    if c.gated:
        linear("layers/gate", n, c.width, c.hidden, bias=c.mlp_bias)
    linear("layers/up", n, c.width, c.hidden, bias=c.mlp_bias)
    linear("layers/down", n, c.hidden, c.width, bias=c.mlp_bias)
    if c.final_norm:
        norm("norm", c.width)
    if c.masked_head:
        linear("head/dense", c.width, c.width, bias=True)
        norm("head/norm", c.width)
        found["head/b"] = (c.vocabulary,)
    if not c.tied and (c.causal or c.masked_head):
        found["head/w"] = (c.embedding_width, c.vocabulary)
    return found


def nested(leaves: dict[str, Any]) -> Params:
    """`{"a/b": x}` as `{"a": {"b": x}}`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return tree


def init(config: Config, key: Key, *, scale: float = 0.02, dtype: Any = jnp.float32) -> Params:
    """Random weights: matrices and tables normal with deviation `scale`, biases zero, norms one."""
    found = shapes(config)
    drawn = [path for path in found if not path.endswith(("/scale", "/b"))]
    ends = np.cumsum([math.prod(found[path]) for path in drawn]).tolist()
    # One draw for all: outside of a jit every shape would be compiled by itself.
    parts = dict(zip(drawn, jnp.split(scale * jax.random.normal(key, (ends[-1],), dtype), ends[:-1]), strict=True))
    constant = lambda path, shape: np.full(shape, 1 if path.endswith("/scale") else 0, dtype)
    leaf = lambda path, shape: parts[path].reshape(shape) if path in parts else jnp.asarray(constant(path, shape))
    return nested({path: leaf(path, shape) for path, shape in found.items()})


def hidden(config: Config, params: Params, tokens: Array, mask: Array | None = None) -> Array:
    """The last hidden states (b, t, width) of `tokens` (b, t), int32.

    mask: (b, t) bool, false at padding, which comes after the tokens; None for none.
    """
    return _run(config, params, tokens, mask, collect=False)[0]


def keys_and_values(config: Config, params: Params, tokens: Array) -> tuple[Array, Array]:
    """What attention sees of `tokens` (b, t): keys and values, each (layers, b, t, kv_heads, head_size)."""
    return _run(config, params, tokens, None, collect=True)[1]


def logits(config: Config, params: Params, states: Array) -> Array:
    """Logits (..., vocabulary), float32, of hidden states (..., width).

    Raises:
        ValueError: for an encoder without the head of masked language modelling.
    """
    c = config
    if not (c.causal or c.masked_head):
        raise error(
            "a model with an output head: a decoder, or an encoder with the head of masked language modelling",
            f"a {c.family} encoder without one",
            "a sentence encoder; compare embeddings instead (tasks.similarity)",
        )
    x = states
    if c.masked_head:
        x = _norm(c, params["head"]["norm"], ACTIVATIONS[c.activation](dense(x, params["head"]["dense"])))
    if "project_out" in params["embed"]:
        x = dense(x, params["embed"]["project_out"])
    if c.tied:
        table = params["embed"]["tokens"]
        x = jnp.einsum("...d,vd->...v", x, table.astype(x.dtype))
    else:
        x = dense(x, {"w": params["head"]["w"]})
    x = x.astype(jnp.float32)
    return x + params["head"]["b"].astype(jnp.float32) if c.masked_head else x


def dense(x: Array, p: Params) -> Array:
    """`x @ w + b`; with `lora` (`a` (in, r), `b` (r, out), `scale` ()) as if w were `w + scale a b`."""
    y = x @ p["w"].astype(x.dtype)
    if "lora" in p:
        low = (x @ p["lora"]["a"].astype(x.dtype)) * p["lora"]["scale"].astype(x.dtype)
        y = y + low @ p["lora"]["b"].astype(x.dtype)
    return y + p["b"].astype(x.dtype) if "b" in p else y


def _norm(c: Config, p: Params, x: Array, *, rms: bool | None = None) -> Array:
    y = x.astype(jnp.float32)
    if not (c.rms if rms is None else rms):
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + np.float32(c.epsilon)) * p["scale"].astype(jnp.float32)
    return (y + p["b"].astype(jnp.float32) if "b" in p else y).astype(x.dtype)


def _run(c: Config, params: Params, tokens: Array, mask: Array | None, *, collect: bool) -> tuple[Array, Any]:
    prefix = params.get("prefix")
    start = prefix["k"].shape[1] if prefix is not None else 0  # the prefix stands before the tokens
    if start + tokens.shape[1] > c.context:
        got = f"{tokens.shape[1]}" + (f", and a prefix of {start}" if start else "")
        cause = "texts longer than the model was made for; shorten them (length=, truncate=True)"
        raise error(f"sequences of at most {c.context} tokens, the model's context", got, cause)
    places = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    x = _embed(c, params["embed"], tokens, places)
    turn = _rotation(c, places) if c.frequencies else None
    seen = jnp.arange(start + tokens.shape[1], dtype=jnp.int32)  # places of the keys
    visible = jnp.ones((1, len(places), len(seen)), bool)
    if c.causal:
        visible = visible & (seen[None, :] <= places[:, None])
    if mask is not None:
        everything = jnp.ones((mask.shape[0], start), bool)
        visible = visible & jnp.concatenate([everything, mask.astype(bool)], axis=1)[:, None, :]
    # int32 for the whole scan: 0 in `windows` is a window that reaches to the beginning.
    windows = jnp.array([w or 2**30 for w in c.windows], jnp.int32) if c.windows else None

    def block(x: Array, layer: Any) -> tuple[Array, Any]:
        p, window, own_prefix = layer
        see = visible if window is None else visible & (places[:, None] - seen[None, :] < window)
        y = _norm(c, p["attention_norm"], x) if c.prenorm else x
        y, keys_values = attention(c, p, y, see, turn, own_prefix)
        x = x + y if c.prenorm else _norm(c, p["attention_norm"], x + y)
        y = _mlp(c, p, _norm(c, p["mlp_norm"], x) if c.prenorm else x)
        x = x + y if c.prenorm else _norm(c, p["mlp_norm"], x + y)
        return x, keys_values if collect else None

    x, collected = jax.lax.scan(block, x, (params["layers"], windows, prefix))
    return (_norm(c, params["norm"], x) if c.final_norm else x), collected


def _embed(c: Config, p: Params, tokens: Array, places: Array) -> Array:
    x = jnp.take(p["tokens"], tokens, axis=0)
    if "project_in" in p:
        x = dense(x, p["project_in"])
    if c.positions:
        x = x + jnp.take(p["positions"], places + c.position_offset, axis=0).astype(x.dtype)
    if c.types:
        x = x + p["types"][0].astype(x.dtype)
    return _norm(c, p["norm"], x) if c.embedding_norm else x


def attention(
    c: Config, p: Params, x: Array, visible: Array, turn: Any, prefix: Params | None = None
) -> tuple[Array, tuple[Array, Array]]:
    """Attention of one layer on x (b, t, width), and the keys and values (b, t, kv_heads, head_size) of these tokens.

    visible: (1 or b, t, s) bool, which of the s = prefix + t places a token sees.
    turn: cosines and sines of the tokens' rotary positions; None for learned positions.
    prefix: `k` and `v`, each (places, kv_heads, head_size), as if such tokens stood before all sequences.
    """
    b, t, _ = x.shape
    split = lambda y, heads: y.reshape(b, t, heads, c.head_size)
    q, k, v = split(dense(x, p["q"]), c.heads), split(dense(x, p["k"]), c.kv_heads), split(dense(x, p["v"]), c.kv_heads)
    if c.qk_norm:
        q, k = _norm(c, p["q_norm"], q, rms=True), _norm(c, p["k_norm"], k, rms=True)
    if turn is not None:
        q, k = _turned(q, turn), _turned(k, turn)
    own = (k, v)
    if prefix is not None:
        before = lambda y: jnp.broadcast_to(y.astype(x.dtype)[None], (b, *y.shape))
        k = jnp.concatenate([before(prefix["k"]), k], axis=1)
        v = jnp.concatenate([before(prefix["v"]), v], axis=1)
    q = q.reshape(b, t, c.kv_heads, c.heads // c.kv_heads, c.head_size)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k).astype(jnp.float32) * np.float32(c.head_size**-0.5)
    # The least number rather than -inf: a row that sees nothing (padding) must not become NaN.
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    y = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1).astype(x.dtype), v)
    return dense(y.reshape(b, t, c.heads * c.head_size), p["o"]), own


def _rotation(c: Config, places: Array) -> tuple[Array, Array]:
    """Cosines and sines (t, 1, head_size / 2), float32."""
    angles = places.astype(jnp.float32)[:, None] * jnp.array(c.frequencies, jnp.float32)
    return jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]


def _turned(x: Array, turn: tuple[Array, Array]) -> Array:
    """x (b, t, heads, head_size) with number i of the first half and of the second turned as a pair."""
    cos, sin = (y.astype(x.dtype) for y in turn)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _mlp(c: Config, p: Params, x: Array) -> Array:
    act = ACTIVATIONS[c.activation]
    y = act(dense(x, p["gate"])) * dense(x, p["up"]) if c.gated else act(dense(x, p["up"]))
    return dense(y, p["down"])
