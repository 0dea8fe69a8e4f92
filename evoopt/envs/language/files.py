"""Models from files: a Hugging Face folder or a GGUF file. `saving` writes them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from evoopt.envs.language import config as configs
from evoopt.envs.language import gguf, layouts, transformer
from evoopt.envs.language import tokenizer as tokenizers
from evoopt.envs.language.config import Config
from evoopt.envs.language.model import Model
from evoopt.reading import contents, document, field, opened, reading, short, understood
from evoopt.types import Params, error

Tensors = Mapping[str, Callable[[], np.ndarray]]  # name -> what reads it
HEADER_BYTES = 1 << 25  # of a safetensors file, a hundred thousand tensors and more


def load(path: str | Path, *, dtype: Any = None, tokenizer: bool = True) -> tuple[Model, Params, Any]:
    """(model, params, tokenizer) of a Hugging Face folder or a GGUF file.

    From a folder, only `config.json`, `*.safetensors` (one file, or several with an index) and the tokenizer's files
    are read; no code in it is run. Llama, Mistral, Qwen 2, 2.5 and 3, GPT-2, OPT, and the encoders BERT, RoBERTa,
    XLM-RoBERTa and CamemBERT are supported; as GGUF, llama, qwen2 and qwen3 in any quantization.

    dtype: type of the parameters; None for that of the file (for GGUF: float32).
    tokenizer: False for a folder without one; the third result is then None.

    While the model loads, at most one leaf is in memory twice.

    Raises:
        ImportError: safetensors, tokenizers or gguf is not installed; they are in the extra `llm`.
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: an unsupported architecture or variant; a tensor that is missing or does not have the shape that
            `config.json` says; a tokenizer with more ids than the model has.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        found, tensors, words = gguf.read(path, tokenizer=tokenizer)
    else:
        found = _settings(path)
        configs.from_hf(found)  # an unsupported model is refused before its weights are looked for
        tensors = _safetensors(path)
        words = tokenizers.from_folder(path, found) if tokenizer else None
    model, params = _built(found, tensors, dtype)
    if words is not None:
        tokenizers.check(words, model.config.vocabulary)
    return model, params, words


def load_prefix(path: str | Path) -> Params:
    """The prefix in a folder of `save_prefix` or of PEFT: `merge({"prefix": ...})` of `trainable.prefix` takes it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: an adapter of another kind, or a prefix behind a projection.
    """
    from safetensors.numpy import load_file

    path = Path(path)
    if not (path / "adapter_config.json").is_file():
        cause = "the folder of the model, above it; or another kind of run"
        raise error(f"adapter_config.json in '{path}'", "none", cause, FileNotFoundError)
    settings = _document(path, "adapter_config.json")
    kind = settings.get("peft_type")
    if kind != "PREFIX_TUNING" or settings.get("prefix_projection"):
        got = f"{kind}{', projected' if settings.get('prefix_projection') else ''}"
        raise error("an adapter of the kind PREFIX_TUNING, without projection", got[:60], "LoRA, or prompt tuning")
    file = tokenizers.inside(path, "adapter_model.safetensors")
    with reading(file), understood(f"a prefix in '{path}'", "files that were cut short or edited by hand"):
        places, layers, heads = (
            field(settings, name, int) for name in ("num_virtual_tokens", "num_layers", "num_attention_heads")
        )
        _check_header(file)
        rows = load_file(file)["prompt_embeddings"]
        parts = rows.reshape(places, layers, 2, heads, -1).transpose(2, 1, 0, 3, 4)
        return {"k": jnp.asarray(parts[0]), "v": jnp.asarray(parts[1])}


def _settings(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        cause = "a name on a hub, which is not looked up here: download it first; or a misspelt path"
        raise error("a Hugging Face folder or a GGUF file", f"'{folder}', which is neither", cause, FileNotFoundError)
    file = folder / "config.json"
    if not file.is_file():
        got = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "an empty folder"
        cause = "a folder above or below the model's"
        raise error(f"config.json in '{folder}'", got, cause, FileNotFoundError)
    found = _document(folder, "config.json")
    if "quantization_config" in found:
        cause = "a checkpoint for another engine; take the unquantized one, or a GGUF file"
        raise error("weights that are not quantized", "a quantization_config in config.json", cause)
    return found


def _document(folder: Path, name: str) -> dict[str, Any]:
    path = tokenizers.inside(folder, name)
    with reading(path), understood(f"JSON in '{path}'", "a file that was cut short or edited by hand"):
        found = document(contents(path, link=True))
        if not isinstance(found, dict):
            raise ValueError(f"{short(found)}, not an object")
        return found


def _safetensors(folder: Path) -> Tensors:
    try:
        from safetensors import safe_open
    except ImportError as missing:
        cause = "the extra was not installed: pip install evoopt-jax[llm]"
        raise error("the package safetensors", "none", cause, ImportError) from missing
    index = folder / "model.safetensors.index.json"
    places: dict[str, Any] = {}  # tensor -> its file
    if index.is_file():
        places = _document(folder, index.name).get("weight_map") or {}
        if type(places) is not dict or not places or not all(isinstance(name, str) for name in places.values()):
            cause = "a file that was cut short or edited by hand"
            raise error(f"a weight_map from tensors to files in '{index}'", short(places), cause)
        files = [tokenizers.inside(folder, name) for name in sorted(set(places.values()))]
    else:
        files = [tokenizers.inside(folder, "model.safetensors")]
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for file in files:
        if not file.is_file():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:12])
            cause = "a download that was not finished, or weights as pytorch_model.bin: save_pretrained converts them"
            raise error(f"'{file.name}' in '{folder}'", there, cause, FileNotFoundError)
        cause = "a download that was cut short, or a Git LFS pointer instead of the file"
        with reading(file), understood(f"a safetensors file at '{file}'", cause):
            _check_header(file)
            weights = safe_open(file, "np")
            for name in weights.keys():  # noqa: SIM118 (it is not a dict)
                if name in tensors:
                    raise ValueError(f"the tensor {short(name)}, which an earlier file has too")
                tensors[name] = lambda weights=weights, name=name: weights.get_tensor(name)
    if missing := [name for name in places if name not in tensors][:3]:
        cause = "a download that was not finished, or an index of other weights"
        raise error(f"the tensors that '{index}' names", f"no {short(', '.join(missing), 200)}", cause)
    return tensors


def _check_header(file: Path) -> None:
    """Refuse a name that occurs twice. The library does not: it takes the last."""
    with opened(file, link=True) as f:
        length = int.from_bytes(f.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError(f"a header of {length:,} bytes")
        document(f.read(length))


def _built(found: dict[str, Any], tensors: Tensors, dtype: Any) -> tuple[Model, Params]:
    config = configs.from_hf(found)
    modern = lambda name: re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"\.beta$", ".bias", name))
    tensors = {modern(name): read for name, read in tensors.items()}
    base = layouts.BASES[config.family]
    bare = not any(name.startswith(base) for name in tensors)
    if bare:
        tensors = {name if name.startswith("lm_head.") else base + name: read for name, read in tensors.items()}
    if layouts.MASKED_HEADS.get(config.family) in tensors:
        config = dataclasses.replace(config, masked_head=True)
    names, used, leaves = layouts.NAMES[config.family], set(), {}
    shapes = transformer.shapes(config)
    _check_layers(config, tensors, [layouts.source(names[path]).name for path in shapes])
    for path, shape in shapes.items():
        source = layouts.source(names[path])
        stacked = "{}" in source.name
        each = [source.name.format(i) for i in range(shape[0])] if stacked else [source.name]
        leaf = None
        for i, name in enumerate(each):
            x = _tensor(tensors, name, source, shape[1:] if stacked else shape)
            if leaf is None:
                leaf = np.empty(shape, dtype or x.dtype)
            leaf[i if stacked else ...] = x
        used.update(each)
        assert leaf is not None
        leaves[path] = jnp.asarray(leaf)
    used |= {layouts.source(names["head/w"]).name}  # of a tied model: a copy of the token table
    unused = [name for name in tensors if name not in used and not layouts.DERIVED.fullmatch(name)]
    rest = {name: _read(tensors, name) for name in unused}
    return Model(config, found, rest, bare), transformer.nested(leaves)


def _check_layers(config: Config, tensors: Tensors, templates: list[str]) -> None:
    """Check that there are as many layers as `config` says, before memory for that many is allocated."""
    stacked = [template for template in templates if "{}" in template]
    numbers = {template: _numbers(template, tensors) for template in stacked}
    wanted = set(range(config.layers))
    for template, there in numbers.items():
        if there and there != wanted:
            odd = sorted(there ^ wanted)
            cause = "a config.json that belongs to other weights, or files that are not complete"
            one = template.format(odd[0])
            if odd[0] in wanted:
                raise error(f"the tensor '{one}'", f"others of {len(there)} layers", cause)
            got = f"{len(there)} of them, with '{one}'"
            raise error(f"the tensor '{template.format('N')}' of {config.layers} layers", got, cause)


def _numbers(template: str, tensors: Tensors) -> set[int]:
    start, end = template.split("{}")
    inner = (n[len(start) : len(n) - len(end)] for n in tensors if n.startswith(start) and n.endswith(end))
    return {int(x) for x in inner if x.isascii() and x.isdigit() and len(x) < 10 and str(int(x)) == x}


def _tensor(tensors: Tensors, name: str, source: layouts.Source, shape: tuple[int, ...]) -> np.ndarray:
    """Our part of the tensor `name`, as (in, out), checked."""
    if name not in tensors:
        near = [n for n in tensors if n.rsplit(".", 2)[-2:] == name.rsplit(".", 2)[-2:]][:3] or list(tensors)[:3]
        cause = "a config.json that belongs to other weights, or files that are not complete"
        raise error(f"the tensor '{name}'", f"others, such as {', '.join(near)}", cause)
    x = _read(tensors, name)
    x = x.T if source.transposed else x
    got = (*x.shape[:-1], x.shape[-1] // source.parts) if x.ndim else ()
    if got != shape or (x.ndim and x.shape[-1] % source.parts) or not jnp.issubdtype(x.dtype, jnp.floating):
        cause = "a config.json that belongs to other weights, or weights quantized to integers"
        raise error(f"floats of shape {shape} from '{name}'", f"{x.dtype} of shape {got}", cause)
    return x[..., source.part * shape[-1] : (source.part + 1) * shape[-1]] if source.parts > 1 else x


def _read(tensors: Tensors, name: str) -> np.ndarray:
    cause = "a type of numbers that NumPy lacks (8 bits and less), or a damaged file"
    with understood(f"the tensor {short(name)} as an array", cause):
        return tensors[name]()
