"""What a language model is made of: read from a Hugging Face `config.json`, without a weight being looked at."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from evoopt.types import error


@dataclasses.dataclass(frozen=True)
class Config:
    """A transformer's sizes and choices; hashable. The field names are those of this package, not of `config.json`.

    family: whose tensor names its files have, a key of `layouts.NAMES`.
    causal: a decoder; otherwise an encoder, where every token sees every other.
    width, hidden: numbers per token between and inside the blocks; heads share `kv_heads` keys and values.
    context: most tokens in a sequence.
    positions: rows of a learned table of positions, of which the first `position_offset` belong to no token; 0 for
        rotary positions, which have `frequencies` (radians per token, head_size / 2 of them).
    types: rows of the token-type table of BERT, of which only the first is used here.
    embedding_width: of the token table, where it differs from `width` (OPT-350M).
    windows: per layer, how many tokens back a token sees (itself included), 0 for all; () where none has a window.
    prenorm: norms before attention and MLP, in the residual branch; otherwise after the sum, as in BERT.
    tied: the output head is the token table. masked_head: an encoder has the head of masked language modelling.
    """

    family: str
    causal: bool
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    context: int
    epsilon: float
    activation: str
    embedding_width: int
    rms: bool = False
    prenorm: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    positions: int = 0
    position_offset: int = 0
    frequencies: tuple[float, ...] = ()
    types: int = 0
    gated: bool = False
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    tied: bool = True
    masked_head: bool = False


def from_hf(found: Mapping[str, Any], *, masked_head: bool = False) -> Config:
    """The `Config` of what a `config.json` holds; `masked_head` says whether an encoder's files have that head.

    Raises:
        ValueError: an architecture, activation, kind of positions or option that is not supported; a missing size.
    """
    kind = found.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1)
        raise error(
            f"a model_type that is supported: {', '.join(sorted(FAMILIES))}",
            repr(kind) + (f" (is it {near[0]}?)" if near else ""),
            "a model of another architecture, or a config.json that is not a language model's",
        )
    try:
        return FAMILIES[kind](found, masked_head)
    except KeyError as missing:
        cause = "a config.json that was cut short, or one of sentence-transformers (the model's is beside it)"
        raise error(f"{missing} in the config.json of a {kind} model", f"{sorted(found)}", cause) from missing


def _llama(found: Mapping[str, Any], _: bool) -> Config:
    kind, heads = found["model_type"], found["num_attention_heads"]
    head_size = found.get("head_dim") or (128 if kind == "qwen3" else found["hidden_size"] // heads)
    _only(found, "partial_rotary_factor", 1, 1.0, None)
    qkv = kind == "qwen2" or bool(found.get("attention_bias", False))
    return Config(
        family="llama",
        causal=True,
        layers=found["num_hidden_layers"],
        width=found["hidden_size"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_size=head_size,
        hidden=found["intermediate_size"],
        vocabulary=found["vocab_size"],
        context=found.get("max_position_embeddings", 2048),
        epsilon=found.get("rms_norm_eps", 1e-6),
        activation=_activation(found.get("hidden_act", "silu")),
        embedding_width=found["hidden_size"],
        rms=True,
        frequencies=_frequencies(found, head_size),
        gated=True,
        qkv_bias=qkv,
        output_bias=bool(found.get("attention_bias", False)) and kind != "qwen2",
        mlp_bias=bool(found.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        windows=_windows(found),
        tied=bool(found.get("tie_word_embeddings", False)),
    )


def _gpt2(found: Mapping[str, Any], _: bool) -> Config:
    _only(found, "scale_attn_weights", True)
    _only(found, "scale_attn_by_inverse_layer_idx", False)
    _only(found, "add_cross_attention", False)
    width, heads = found["n_embd"], found["n_head"]
    return Config(
        family="gpt2",
        causal=True,
        layers=found["n_layer"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        hidden=found.get("n_inner") or 4 * width,
        vocabulary=found["vocab_size"],
        context=found.get("n_positions", 1024),
        epsilon=found.get("layer_norm_epsilon", 1e-5),
        activation=_activation(found.get("activation_function", "gelu_new")),
        embedding_width=width,
        positions=found.get("n_positions", 1024),
        tied=bool(found.get("tie_word_embeddings", True)),
    )


def _opt(found: Mapping[str, Any], _: bool) -> Config:
    _only(found, "layer_norm_elementwise_affine", True)
    width, heads = found["hidden_size"], found["num_attention_heads"]
    bias, before = bool(found.get("enable_bias", True)), bool(found.get("do_layer_norm_before", True))
    return Config(
        family="opt",
        causal=True,
        layers=found["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        hidden=found["ffn_dim"],
        vocabulary=found["vocab_size"],
        context=found.get("max_position_embeddings", 2048),
        epsilon=1e-5,
        activation=_activation(found.get("activation_function", "relu")),
        embedding_width=found.get("word_embed_proj_dim") or width,
        prenorm=before,
        final_norm=before and not found.get("_remove_final_layer_norm", False),
        positions=found.get("max_position_embeddings", 2048) + 2,
        position_offset=2,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied=bool(found.get("tie_word_embeddings", True)),
    )


def _bert(found: Mapping[str, Any], masked_head: bool) -> Config:
    _only(found, "is_decoder", False)
    _only(found, "position_embedding_type", "absolute", None)
    width, heads = found["hidden_size"], found["num_attention_heads"]
    bert = found["model_type"] == "bert"
    offset = 0 if bert else found.get("pad_token_id", 1) + 1  # RoBERTa's positions come after that of padding
    return Config(
        family="bert" if bert else "roberta",
        causal=False,
        layers=found["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        hidden=found["intermediate_size"],
        vocabulary=found["vocab_size"],
        context=found.get("max_position_embeddings", 512) - offset,
        epsilon=found.get("layer_norm_eps", 1e-12),
        activation=_activation(found.get("hidden_act", "gelu")),
        embedding_width=width,
        prenorm=False,
        final_norm=False,
        embedding_norm=True,
        positions=found.get("max_position_embeddings", 512),
        position_offset=offset,
        types=found.get("type_vocab_size", 2),
        tied=bool(found.get("tie_word_embeddings", True)),
        masked_head=masked_head,
    )


FAMILIES: dict[Any, Callable[[Mapping[str, Any], bool], Config]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "camembert": _bert,
}

# The names of config.json that mean the same function. "gelu" is by the error function, the others by tanh.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise error(f"an activation: {', '.join(ACTIVATIONS)}", repr(name), "a model with an unusual MLP")
    return ACTIVATIONS[name]


def _only(found: Mapping[str, Any], name: str, *allowed: Any) -> None:
    """Refuse an option that changes the forward pass in a way that is not written here."""
    if found.get(name, allowed[0]) not in allowed:
        cause = "a variant of the architecture that is not supported"
        raise error(f"{name}={allowed[0]!r} in config.json", f"{found[name]!r}", cause)


def _windows(found: Mapping[str, Any]) -> tuple[int, ...]:
    """The sliding windows; absent is not null: Mistral's default is 4096, in the first version of its config."""
    layers, kind = found["num_hidden_layers"], found["model_type"]
    window = found.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "llama" or window is None or (kind != "mistral" and not found.get("use_sliding_window", False)):
        return ()
    if kind == "mistral":
        return (window,) * layers
    first = found.get("max_window_layers", 28)
    types = found.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def _frequencies(found: Mapping[str, Any], size: int) -> tuple[float, ...]:
    """Radians per token of each pair of a head's numbers (Su et al. 2021, "RoFormer", section 3.4.3)."""
    # Newer files have all in rope_parameters, older ones rope_theta and perhaps rope_scaling.
    options = found.get("rope_parameters") or {**(found.get("rope_scaling") or {})}
    theta = options.get("rope_theta", found.get("rope_theta", 10000.0))
    kind = options.get("rope_type", options.get("type", "default"))
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        return tuple(f / options["factor"] for f in plain)
    if kind != "llama3":
        raise error(
            "rotary positions of the kind default, linear or llama3",
            repr(kind),
            "a long-context variant of the model; its short-context sibling has plain positions",
        )
    # Llama 3.1: what turns less than once in the old context is slowed by `factor`, what turns often is left, with a
    # linear transition between the two.
    low, high, old = (
        options["low_freq_factor"],
        options["high_freq_factor"],
        options["original_max_position_embeddings"],
    )
    scaled = []
    for f in plain:
        share = min(max((old * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
        scaled.append((1 - share) * f / options["factor"] + share * f)
    return tuple(scaled)
