"""What a language model is made of: read from a Hugging Face `config.json`, without a weight being looked at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from evoopt.reading import short, understood
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
        ValueError: an architecture, activation, kind of positions or option that is not supported; a missing size, or
            one that no model has.
    """
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        cause = "a model of another architecture, or a config.json that is not a language model's"
        raise error(f"a model_type that is supported: {', '.join(sorted(FAMILIES))}", short(kind), cause)
    cause = "a config.json that was cut short, or one of sentence-transformers (the model's is beside it)"
    with understood(f"the config.json of a {kind} model", "a config.json that was damaged or edited by hand"):
        try:
            return FAMILIES[kind](found, masked_head)
        except KeyError as missing:
            names = short(", ".join(sorted(found)), 300)
            raise error(f"{missing} in the config.json of a {kind} model", names, cause) from missing


# The largest numbers that a model of today could have, times a hundred or more; larger ones are damage, and what is
# made from them would not fit into memory.
LAYERS, WIDTHS, ROWS = 10_000, 1 << 22, 1 << 30


def _size(found: Mapping[str, Any], name: str, most: int, default: Any = ...) -> int:
    """A whole number between 1 and `most`. A default stands for what is missing or null."""
    value = found[name] if default is ... else found.get(name)
    value = default if value is None and default is not ... else value
    if type(value) is not int or not 1 <= value <= most:
        cause = "a config.json that was damaged or edited by hand"
        raise error(f"{name} between 1 and {most:,} in config.json", short(value), cause)
    return value


def _number(found: Mapping[str, Any], name: str, default: Any = ...) -> float:
    """A number above 0."""
    value = found[name] if default is ... else found.get(name, default)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        cause = "a config.json that was damaged or edited by hand"
        raise error(f"{name} as a number above 0 in config.json", short(value), cause)
    return value


def _flag(found: Mapping[str, Any], name: str, default: bool) -> bool:
    value = found.get(name)
    if value is not None and type(value) is not bool:
        raise error(f"{name} true or false in config.json", short(value), "a file that was edited by hand")
    return default if value is None else value


def _heads(width: int, heads: int, kv_heads: int | None = None) -> int:
    """Numbers of a head, where they divide `width`; heads share keys and values in groups of one size."""
    if kv_heads is not None and heads % kv_heads:
        cause = "a config.json of another model"
        raise error("num_attention_heads that num_key_value_heads divides", f"{heads} and {kv_heads}", cause)
    if kv_heads is None and width % heads:
        raise error(f"heads that divide the width of {width}", str(heads), "a config.json of another model")
    return width // heads


def _llama(found: Mapping[str, Any], _: bool) -> Config:
    kind, heads = found["model_type"], _size(found, "num_attention_heads", WIDTHS)
    width, kv_heads = _size(found, "hidden_size", WIDTHS), _size(found, "num_key_value_heads", WIDTHS, heads)
    usual = 128 if kind == "qwen3" else max(1, _heads(width, heads, kv_heads))
    head_size = _size(found, "head_dim", 1 << 16, usual)
    if head_size % 2:
        raise error("an even head_dim, for rotary positions", str(head_size), "a config.json that was edited by hand")
    _only(found, "partial_rotary_factor", 1, 1.0, None)
    qkv = kind == "qwen2" or _flag(found, "attention_bias", False)
    return Config(
        family="llama",
        causal=True,
        layers=_size(found, "num_hidden_layers", LAYERS),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        hidden=_size(found, "intermediate_size", WIDTHS),
        vocabulary=_size(found, "vocab_size", ROWS),
        context=_size(found, "max_position_embeddings", ROWS, 2048),
        epsilon=_number(found, "rms_norm_eps", 1e-6),
        activation=_activation(found.get("hidden_act", "silu")),
        embedding_width=width,
        rms=True,
        frequencies=_frequencies(found, head_size),
        gated=True,
        qkv_bias=qkv,
        output_bias=_flag(found, "attention_bias", False) and kind != "qwen2",
        mlp_bias=_flag(found, "mlp_bias", False),
        qk_norm=kind == "qwen3",
        windows=_windows(found),
        tied=_flag(found, "tie_word_embeddings", False),
    )


def _gpt2(found: Mapping[str, Any], _: bool) -> Config:
    _only(found, "scale_attn_weights", True)
    _only(found, "scale_attn_by_inverse_layer_idx", False)
    _only(found, "add_cross_attention", False)
    width, heads = _size(found, "n_embd", WIDTHS), _size(found, "n_head", WIDTHS)
    return Config(
        family="gpt2",
        causal=True,
        layers=_size(found, "n_layer", LAYERS),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=_heads(width, heads),
        hidden=_size(found, "n_inner", WIDTHS, 4 * width),
        vocabulary=_size(found, "vocab_size", ROWS),
        context=_size(found, "n_positions", ROWS, 1024),
        epsilon=_number(found, "layer_norm_epsilon", 1e-5),
        activation=_activation(found.get("activation_function", "gelu_new")),
        embedding_width=width,
        positions=_size(found, "n_positions", ROWS, 1024),
        tied=_flag(found, "tie_word_embeddings", True),
    )


def _opt(found: Mapping[str, Any], _: bool) -> Config:
    _only(found, "layer_norm_elementwise_affine", True)
    width, heads = _size(found, "hidden_size", WIDTHS), _size(found, "num_attention_heads", WIDTHS)
    bias, before = _flag(found, "enable_bias", True), _flag(found, "do_layer_norm_before", True)
    return Config(
        family="opt",
        causal=True,
        layers=_size(found, "num_hidden_layers", LAYERS),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=_heads(width, heads),
        hidden=_size(found, "ffn_dim", WIDTHS),
        vocabulary=_size(found, "vocab_size", ROWS),
        context=_size(found, "max_position_embeddings", ROWS, 2048),
        epsilon=1e-5,
        activation=_activation(found.get("activation_function", "relu")),
        embedding_width=_size(found, "word_embed_proj_dim", WIDTHS, width),
        prenorm=before,
        final_norm=before and not found.get("_remove_final_layer_norm", False),
        positions=_size(found, "max_position_embeddings", ROWS, 2048) + 2,
        position_offset=2,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied=_flag(found, "tie_word_embeddings", True),
    )


def _bert(found: Mapping[str, Any], masked_head: bool) -> Config:
    _only(found, "is_decoder", False)
    _only(found, "position_embedding_type", "absolute", None)
    width, heads = _size(found, "hidden_size", WIDTHS), _size(found, "num_attention_heads", WIDTHS)
    bert = found["model_type"] == "bert"
    offset = 0 if bert else _padding(found) + 1  # RoBERTa's positions come after that of padding
    return Config(
        family="bert" if bert else "roberta",
        causal=False,
        layers=_size(found, "num_hidden_layers", LAYERS),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=_heads(width, heads),
        hidden=_size(found, "intermediate_size", WIDTHS),
        vocabulary=_size(found, "vocab_size", ROWS),
        context=_size({"context": _size(found, "max_position_embeddings", ROWS, 512) - offset}, "context", ROWS),
        epsilon=_number(found, "layer_norm_eps", 1e-12),
        activation=_activation(found.get("hidden_act", "gelu")),
        embedding_width=width,
        prenorm=False,
        final_norm=False,
        embedding_norm=True,
        positions=_size(found, "max_position_embeddings", ROWS, 512),
        position_offset=offset,
        types=_size(found, "type_vocab_size", WIDTHS, 2),
        tied=_flag(found, "tie_word_embeddings", True),
        masked_head=masked_head,
    )


def _padding(found: Mapping[str, Any]) -> int:
    value = found.get("pad_token_id", 1)
    if type(value) is not int or not 0 <= value < ROWS:
        raise error("pad_token_id, a row of the table, in config.json", short(value), "a file that was edited by hand")
    return value


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
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise error(f"an activation: {', '.join(ACTIVATIONS)}", short(name), "a model with an unusual MLP")
    return ACTIVATIONS[name]


def _only(found: Mapping[str, Any], name: str, *allowed: Any) -> None:
    """Refuse an option that changes the forward pass in a way that is not written here."""
    if found.get(name, allowed[0]) not in allowed:
        cause = "a variant of the architecture that is not supported"
        raise error(f"{name}={allowed[0]!r} in config.json", short(found[name]), cause)


def _windows(found: Mapping[str, Any]) -> tuple[int, ...]:
    """The sliding windows; absent is not null: Mistral's default is 4096, in the first version of its config."""
    layers, kind = _size(found, "num_hidden_layers", LAYERS), found["model_type"]
    window = found.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "llama" or window is None or (kind != "mistral" and not _flag(found, "use_sliding_window", False)):
        return ()
    window = _size({"sliding_window": window}, "sliding_window", ROWS)
    if kind == "mistral":
        return (window,) * layers
    first = found.get("max_window_layers", 28)
    if type(first) is not int:
        raise error("max_window_layers, a number of layers", short(first), "a file that was edited by hand")
    types = found.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        cause = "a variant of the architecture that is not supported, or a file that was edited by hand"
        raise error(f"{layers} layer_types, sliding_attention or full_attention", short(types), cause)
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def _frequencies(found: Mapping[str, Any], size: int) -> tuple[float, ...]:
    """Radians per token of each pair of a head's numbers (Su et al. 2021, "RoFormer", section 3.4.3)."""
    # Newer files have all in rope_parameters, older ones rope_theta and perhaps rope_scaling.
    options = found.get("rope_parameters") or {**(found.get("rope_scaling") or {})}
    theta = _number({"rope_theta": 10000.0, **found, **options}, "rope_theta")
    kind = options.get("rope_type", options.get("type", "default"))
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        return tuple(f / _number(options, "factor") for f in plain)
    if kind != "llama3":
        raise error(
            "rotary positions of the kind default, linear or llama3",
            short(kind),
            "a long-context variant of the model; its short-context sibling has plain positions",
        )
    # Llama 3.1: what turns less than once in the old context is slowed by `factor`, what turns often is left, with a
    # linear transition between the two.
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor")
    low, high, old, factor = (_number(options, name) for name in names)
    if high <= low:
        raise error("a high_freq_factor above low_freq_factor", f"{high} and {low}", "a file that was edited by hand")
    scaled = []
    for f in plain:
        share = min(max((old * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
        scaled.append((1 - share) * f / factor + share * f)
    return tuple(scaled)
