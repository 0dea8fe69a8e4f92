"""Where the weights are in Hugging Face's files: path in our tree -> name of the tensor, one table per family.

`{}` is the number of the layer; `.T` at the end says that the file has (out, in) where we have (in, out); `[1/3]` that
ours is the second of three equal parts of the last axis.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Source(NamedTuple):
    name: str  # with {} for the layer
    transposed: bool
    part: int
    parts: int


def source(template: str) -> Source:
    """The parts of a template.

    >>> source("h.{}.attn.c_attn.weight[1/3]")
    Source(name='h.{}.attn.c_attn.weight', transposed=False, part=1, parts=3)
    """
    found = re.fullmatch(r"(.*?)(\.T)?(?:\[(\d)/(\d)\])?", template)
    assert found
    return Source(found[1], bool(found[2]), int(found[3] or 0), int(found[4] or 1))


def _linear(path: str, name: str) -> dict[str, str]:
    return {f"{path}/w": f"{name}.weight.T", f"{path}/b": f"{name}.bias"}


def _norm(path: str, name: str) -> dict[str, str]:
    return {f"{path}/scale": f"{name}.weight", f"{path}/b": f"{name}.bias"}


_LLAMA = {
    "embed/tokens": "model.embed_tokens.weight",
    **_norm("layers/attention_norm", "model.layers.{}.input_layernorm"),
    **_linear("layers/q", "model.layers.{}.self_attn.q_proj"),
    **_linear("layers/k", "model.layers.{}.self_attn.k_proj"),
    **_linear("layers/v", "model.layers.{}.self_attn.v_proj"),
    **_linear("layers/o", "model.layers.{}.self_attn.o_proj"),
    **_norm("layers/q_norm", "model.layers.{}.self_attn.q_norm"),
    **_norm("layers/k_norm", "model.layers.{}.self_attn.k_norm"),
    **_norm("layers/mlp_norm", "model.layers.{}.post_attention_layernorm"),
    **_linear("layers/gate", "model.layers.{}.mlp.gate_proj"),
    **_linear("layers/up", "model.layers.{}.mlp.up_proj"),
    **_linear("layers/down", "model.layers.{}.mlp.down_proj"),
    **_norm("norm", "model.norm"),
    "head/w": "lm_head.weight.T",
}

_GPT2 = {  # its linear maps are stored as (in, out), and q, k, v in one
    "embed/tokens": "transformer.wte.weight",
    "embed/positions": "transformer.wpe.weight",
    **_norm("layers/attention_norm", "transformer.h.{}.ln_1"),
    **{
        f"layers/{which}/{ours}": f"transformer.h.{{}}.attn.c_attn.{theirs}[{i}/3]"
        for i, which in enumerate("qkv")
        for ours, theirs in (("w", "weight"), ("b", "bias"))
    },
    "layers/o/w": "transformer.h.{}.attn.c_proj.weight",
    "layers/o/b": "transformer.h.{}.attn.c_proj.bias",
    **_norm("layers/mlp_norm", "transformer.h.{}.ln_2"),
    "layers/up/w": "transformer.h.{}.mlp.c_fc.weight",
    "layers/up/b": "transformer.h.{}.mlp.c_fc.bias",
    "layers/down/w": "transformer.h.{}.mlp.c_proj.weight",
    "layers/down/b": "transformer.h.{}.mlp.c_proj.bias",
    **_norm("norm", "transformer.ln_f"),
    "head/w": "lm_head.weight.T",
}

_OPT = {
    "embed/tokens": "model.decoder.embed_tokens.weight",
    "embed/positions": "model.decoder.embed_positions.weight",
    **_linear("embed/project_in", "model.decoder.project_in"),
    **_linear("embed/project_out", "model.decoder.project_out"),
    **_norm("layers/attention_norm", "model.decoder.layers.{}.self_attn_layer_norm"),
    **_linear("layers/q", "model.decoder.layers.{}.self_attn.q_proj"),
    **_linear("layers/k", "model.decoder.layers.{}.self_attn.k_proj"),
    **_linear("layers/v", "model.decoder.layers.{}.self_attn.v_proj"),
    **_linear("layers/o", "model.decoder.layers.{}.self_attn.out_proj"),
    **_norm("layers/mlp_norm", "model.decoder.layers.{}.final_layer_norm"),
    **_linear("layers/up", "model.decoder.layers.{}.fc1"),
    **_linear("layers/down", "model.decoder.layers.{}.fc2"),
    **_norm("norm", "model.decoder.final_layer_norm"),
    "head/w": "lm_head.weight.T",
}


def _encoder(base: str) -> dict[str, str]:
    return {
        "embed/tokens": f"{base}.embeddings.word_embeddings.weight",
        "embed/positions": f"{base}.embeddings.position_embeddings.weight",
        "embed/types": f"{base}.embeddings.token_type_embeddings.weight",
        **_norm("embed/norm", f"{base}.embeddings.LayerNorm"),
        **_linear("layers/q", f"{base}.encoder.layer.{{}}.attention.self.query"),
        **_linear("layers/k", f"{base}.encoder.layer.{{}}.attention.self.key"),
        **_linear("layers/v", f"{base}.encoder.layer.{{}}.attention.self.value"),
        **_linear("layers/o", f"{base}.encoder.layer.{{}}.attention.output.dense"),
        **_norm("layers/attention_norm", f"{base}.encoder.layer.{{}}.attention.output.LayerNorm"),
        **_linear("layers/up", f"{base}.encoder.layer.{{}}.intermediate.dense"),
        **_linear("layers/down", f"{base}.encoder.layer.{{}}.output.dense"),
        **_norm("layers/mlp_norm", f"{base}.encoder.layer.{{}}.output.LayerNorm"),
    }


_BERT = {
    **_encoder("bert"),
    **_linear("head/dense", "cls.predictions.transform.dense"),
    **_norm("head/norm", "cls.predictions.transform.LayerNorm"),
    "head/b": "cls.predictions.bias",
    "head/w": "cls.predictions.decoder.weight.T",
}

_ROBERTA = {
    **_encoder("roberta"),
    **_linear("head/dense", "lm_head.dense"),
    **_norm("head/norm", "lm_head.layer_norm"),
    "head/b": "lm_head.bias",
    "head/w": "lm_head.decoder.weight.T",
}

NAMES = {"llama": _LLAMA, "gpt2": _GPT2, "opt": _OPT, "bert": _BERT, "roberta": _ROBERTA}
# The part of a name that a file of the bare model, without its head, leaves out.
BASES = {"llama": "model.", "gpt2": "transformer.", "opt": "model.", "bert": "bert.", "roberta": "roberta."}
MASKED_HEADS = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}
# Tensors that follow from others: copies of tied weights, and constants that older versions stored.
DERIVED = re.compile(
    r".*(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|embeddings\.position_ids)|(cls\.predictions|lm_head)\.decoder\.bias"
)
GGUF = {  # of the architectures llama, qwen2 and qwen3, as names of Hugging Face's Llama
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
