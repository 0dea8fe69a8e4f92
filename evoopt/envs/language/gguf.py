"""GGUF files as Hugging Face's names, settings and (out, in) matrices, dequantized one at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evoopt.envs.language import layouts
from evoopt.envs.language.tokenizer import Tokenizer, from_bpe
from evoopt.reading import opened, reading, understood
from evoopt.types import error

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def read(path: str | Path, *, tokenizer: bool = True) -> tuple[dict[str, Any], dict[str, Callable], Tokenizer | None]:
    """What `config.json` would hold, the tensors (called to be read, float32), and the tokenizer.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: not a GGUF file; an architecture, tokenizer or kind of rotary positions that is not supported.
    """
    try:
        import gguf
    except ImportError as missing:
        cause = "the extra was not installed: pip install evoopt-jax[llm]"
        raise error("the package gguf", "none", cause, ImportError) from missing
    with reading(Path(path)), understood(f"a GGUF file at '{path}'", "a download that was cut short"):
        _check(Path(path), gguf)
        return _found(path, gguf.GGUFReader(path), gguf, tokenizer)


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the kinds of plain values
TEXT, LIST = 8, 9
ENTRIES = 4_000_000  # in the lists of a header; a vocabulary of a million tokens has three, and merges


def _check(path: Path, gguf: Any) -> None:
    """Walk through the header: the library reads on beyond the end of a file, for as long as a count says.

    Raises:
        ValueError: counts and sizes that the file has no room for.
    """
    with opened(path, link=True) as file:
        size, left = os.fstat(file.fileno()).st_size, ENTRIES

        def take(n: int) -> bytes:
            if n > size - file.tell():
                raise ValueError(f"{n:,} bytes at {file.tell():,} of {size:,}")
            return file.read(n)

        number = lambda n=8: int.from_bytes(take(n), "little")

        def value(kind: int, deep: bool = False) -> None:
            nonlocal left
            if kind in SIZES:
                take(SIZES[kind])
            elif kind == TEXT:
                take(number())
            elif kind == LIST and not deep:
                inner, count = number(4), number()
                left -= count
                if left < 0:
                    raise ValueError(f"a list of {count:,} values")
                if inner in SIZES:
                    take(count * SIZES[inner])
                else:
                    for _ in range(count):
                        value(inner, True)
            else:
                raise ValueError(f"a value of kind {kind}")

        if take(4) != b"GGUF" or number(4) not in (2, 3):
            raise ValueError("it does not begin as one of version 2 or 3, little-endian")
        tensors, fields = number(), number()
        for _ in range(fields):
            take(number())
            value(number(4))
        for _ in range(tensors):
            take(number())
            if (axes := number(4)) > 4:
                raise ValueError(f"a tensor of {axes} axes")
            count = math.prod(number() for _ in range(axes))
            block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number(4))]
            if count // block * width + number() > size:
                raise ValueError(f"a tensor of {count:,} numbers")


def _found(
    path: str | Path, file: Any, gguf: Any, tokenizer: bool
) -> tuple[dict[str, Any], dict[str, Callable], Tokenizer | None]:
    fields = file.fields
    value = lambda name, default=None: fields[name].contents() if name in fields else default
    kind = value("general.architecture")
    if kind not in ARCHITECTURES:
        cause = "a model of another family; its Hugging Face folder may be supported"
        raise error(f"a GGUF file of {', '.join(ARCHITECTURES)}", f"architecture {kind!r}", cause)

    def of(name: str, *default: Any) -> Any:
        found = value(f"{kind}.{name}", *default)
        if found is None:
            raise error(f"'{kind}.{name}' in '{path}'", "no such field", "a file of an early version of GGUF")
        return found

    if of("rope.scaling.type", "none") != "none" or any(t.name.startswith("rope_freqs") for t in file.tensors):
        cause = "a model with stretched positions; its Hugging Face folder says how, GGUF only the result"
        raise error("plain rotary positions", f"rope scaling {of('rope.scaling.type', 'by rope_freqs')!r}", cause)
    heads = of("attention.head_count")
    if type(heads) is not int or heads < 1:
        raise ValueError(f"attention.head_count is {heads!r:.60}")
    ids = {name: value(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in
           (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}  # fmt: skip
    ids = {name: i for name, i in ids.items() if i is not None}
    tensors = {t.name: t for t in file.tensors}
    found = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": of("attention.key_length", of("embedding_length") // heads),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": round(of("attention.layer_norm_rms_epsilon", 1e-6), 12),  # stored as a float32
        "rope_theta": of("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        **{f"{name}_token_id": i for name, i in ids.items() if name != "unk"},
    }
    turned = {"attn_q": heads, "attn_k": found["num_key_value_heads"]} if kind == "llama" else {}

    def reader(tensor: Any, heads: int) -> Callable[[], np.ndarray]:
        return lambda: _untangled(gguf.dequantize(tensor.data, tensor.tensor_type), heads)

    named = {}
    for name, tensor in tensors.items():
        *block, ours, suffix = name.removeprefix("blk.").split(".")
        place = f"model.layers.{block[0]}." if block else ""
        if ours not in layouts.GGUF:
            raise error("tensors of a plain transformer", name, "a variant of the architecture that is not supported")
        named[f"{place}{layouts.GGUF[ours]}.{suffix}"] = reader(tensor, turned.get(ours, 0))
    words = _tokenizer(value, ids) if tokenizer else None
    return found, named, words


def _untangled(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order of Hugging Face: llama.cpp has the two of a rotary pair side by side for Llama."""
    x = np.asarray(x, np.float32)
    if not heads:
        return x
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _tokenizer(value: Callable[..., Any], ids: dict[str, int]) -> Tokenizer:
    if value("tokenizer.ggml.model") != "gpt2":
        cause = "a sentencepiece vocabulary; the Hugging Face folder's tokenizer.json has it in a form that can be read"
        raise error("a GGUF file with a byte-level BPE tokenizer", repr(value("tokenizer.ggml.model")), cause)
    tokens = value("tokenizer.ggml.tokens")
    types = value("tokenizer.ggml.token_type", [1] * len(tokens))
    pre = value("tokenizer.ggml.pre", "default")
    if not 0 < len(tokens) == len(types):
        raise ValueError(f"{len(tokens)} tokens of {len(types)} types")
    ids = {name: i for name, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}
    words = from_bpe(tokens, value("tokenizer.ggml.merges", []), types, kind=pre, special=ids)
    return dataclasses.replace(words, files=_beside(value, ids))


def _beside(value: Callable[..., Any], ids: dict[str, int]) -> dict[str, bytes]:
    """What `transformers` has in files beside the tokenizer: the chat's format, and how text is generated."""
    files = {}
    if isinstance(template := value("tokenizer.chat_template"), str):
        files["chat_template.jinja"] = template.encode()
    found: dict[str, Any] = {f"{name}_token_id": i for name, i in ids.items() if name != "unk"}
    turn = value("tokenizer.ggml.eot_token_id")  # the end of a turn of the chat, where it is not that of the text
    if type(turn) is int and turn != ids.get("eos") and "eos" in ids:
        found["eos_token_id"] = [ids["eos"], turn]
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    sampling = {ours: value(f"general.sampling.{theirs}") for theirs, ours in names.items()}
    sampling = {name: x for name, x in sampling.items() if x is not None}
    if sampling:
        found |= {"do_sample": True, **sampling}
    if found:
        files["generation_config.json"] = json.dumps(found, indent=2).encode()
    return files
