"""A language model: its configuration, and `apply`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from evoopt.envs.language import transformer
from evoopt.envs.language.config import Config, from_hf
from evoopt.types import Array, Key, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """The functions of a transformer, without its weights. Hashed by identity, so that it may be static in a jit.

    config: sizes and choices.
    source: what its `config.json` held, written again by `save`.
    rest: tensors of its files that `apply` does not use, such as a pooler.
    bare: its files name tensors as those of the model without head.

    >>> import jax
    >>> model = tiny()
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 32)
    """

    config: Config
    source: Mapping[str, Any]
    rest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bare: bool = False

    def init(self, key: Key, *, scale: float = 0.02, dtype: Any = jnp.float32) -> Params:
        """Random parameters."""
        return transformer.init(self.config, key, scale=scale, dtype=dtype)

    def hidden(self, params: Params, tokens: Array, mask: Array | None = None) -> Array:
        """The last hidden states (b, t, width) of `tokens` (b, t), int32; `mask` is false at padding, on the right."""
        return transformer.hidden(self.config, params, tokens, mask)

    def logits(self, params: Params, states: Array) -> Array:
        """Logits (..., vocabulary), float32, of hidden states (..., width). ValueError for a model without a head."""
        return transformer.logits(self.config, params, states)

    def apply(self, params: Params, tokens: Array, mask: Array | None = None) -> Array:
        """Logits (b, t, vocabulary) of a model with an output head, otherwise hidden states (b, t, width)."""
        states = self.hidden(params, tokens, mask)
        return self.logits(params, states) if self.has_head else states

    @property
    def has_head(self) -> bool:
        """Whether it answers logits."""
        return self.config.causal or self.config.masked_head


def tiny(kind: str = "llama", **sizes: Any) -> Model:
    """A model of `kind` ("llama", "gpt2", "opt", "bert", ...) for tests; `sizes` have the names of config.json."""
    common = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 24, "tie_word_embeddings": True,
    }  # fmt: skip
    if kind == "gpt2":
        common = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}
    if kind == "opt":
        common |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
    source = {"model_type": kind, **common, **sizes}
    return Model(from_hf(source, masked_head=kind in ("bert", "roberta")), source)
