"""Models from and to files: a Hugging Face folder, or a GGUF file to read from."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.envs.language import config as configs
from evoopt.envs.language import gguf, layouts, transformer
from evoopt.envs.language import tokenizer as tokenizers
from evoopt.envs.language.config import Config
from evoopt.envs.language.model import Model
from evoopt.envs.language.tokenizer import Tokenizer
from evoopt.reading import contents, document, field, opened, reading, short, understood
from evoopt.trees import path_name
from evoopt.types import Params, error

Tensors = Mapping[str, Callable[[], np.ndarray]]  # name -> what reads it
HEADER_BYTES = 1 << 25  # of a safetensors file, a hundred thousand tensors and more
SHARD_BYTES = 4 << 30  # of one file; while one is written, so much is in memory a second time


def load(path: str | Path, *, dtype: Any = None, tokenizer: bool = True) -> tuple[Model, Params, Any]:
    """(model, params, tokenizer) of a Hugging Face folder or a GGUF file.

    Of a folder, `config.json`, `*.safetensors` (in one file, or several with an index) and the tokenizer's files are
    read, nothing else; no code in it is run. Supported are Llama, Mistral, Qwen 2, 2.5 and 3, GPT-2, OPT, and the
    encoders BERT, RoBERTa, XLM-RoBERTa and CamemBERT; as GGUF llama, qwen2 and qwen3 with any of its quantizations.

    dtype: of the parameters; None for that of the file (of GGUF: float32).
    tokenizer: False for a folder without one; then None is returned in its place.

    While it loads, one leaf at most is in memory twice.

    Raises:
        ImportError: safetensors, tokenizers or gguf is not installed: they are in the extra `llm`.
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: an unsupported architecture or variant; a tensor that is missing or of another shape than
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


def save(path: str | Path, model: Model, params: Params, tokenizer: Tokenizer | None = None) -> Path:
    """Write `params` as a Hugging Face folder, which `transformers` and `load` read.

    LoRA's factors are multiplied into their weights. The dtype is that of the parameters; what the model does not use
    (such as a pooler) is written as it was.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        ValueError: a prefix among the parameters, which such a folder has no place for (see `save_prefix`); other
            leaves or shapes than the model's.
        OSError: it cannot be written; then there is no folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        cause = "a model was saved there before; choose another name, or remove it"
        raise error(f"no model at '{path}' yet", "a folder that is not empty, or a file", cause, FileExistsError)
    leaves = _leaves(model.config, folded(params))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a kill leaves the whole folder or none
    try:
        temporary.mkdir(parents=True)
        settings = {**model.source, "dtype": str(leaves["embed/tokens"].dtype)}
        settings.pop("torch_dtype", None)  # the older name of dtype
        (temporary / "config.json").write_text(json.dumps(settings, indent=2))
        _write(temporary, model, leaves)
        if tokenizer is not None:
            tokenizer.save(temporary)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as reason:
        cause = "a full disk, or a folder that is read-only or belongs to somebody else"
        raise error(f"to write '{path}'", f"{type(reason).__name__}: {reason}", cause, OSError) from reason
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def save_prefix(path: str | Path, model: Model, prefix: Params, base: str | None = None) -> Path:
    """Write a prefix, `{"k": ..., "v": ...}` of `trainable.prefix`, as a folder that the library PEFT reads.

    `PeftModel.from_pretrained(transformers_model, path)` puts it before the layers of a decoder; `load_prefix` reads it
    back. In a row of its tensor the keys of a layer are followed by its values. `base` is the folder of the model, for
    `AutoPeftModel`.

    Raises:
        FileExistsError: `path` exists.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    k, v = (np.asarray(prefix[name]) for name in ("k", "v"))  # (layers, places, kv_heads, head_size)
    layers, places, heads, size = k.shape
    rows = np.stack([k, v], axis=1).transpose(2, 0, 1, 3, 4).reshape(places, layers * 2 * heads * size)
    settings = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM" if model.config.causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": places,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    if path.exists():
        cause = "a prefix was saved there before; choose another name, or remove it"
        raise error(f"no folder at '{path}' yet", "one that exists", cause, FileExistsError)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a kill leaves the whole folder or none
    try:
        temporary.mkdir(parents=True)
        save_file({"prompt_embeddings": np.ascontiguousarray(rows)}, temporary / "adapter_model.safetensors")
        _shared_mode(temporary / "adapter_model.safetensors")
        (temporary / "adapter_config.json").write_text(json.dumps(settings, indent=2))
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


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


def folded(params: Params) -> Params:
    """`params` with every `lora` multiplied into the weight beside it, `w + scale a b`, rounded once.

    Raises:
        ValueError: for a prefix, which is no weight.
    """
    if "prefix" in params:
        cause = "prefix tuning: take the prefix out and write it with save_prefix, beside the base model"
        raise error("weights that a Hugging Face folder has a place for", "a prefix", cause)

    def fold(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "lora" not in tree:
            return {name: fold(below) for name, below in tree.items()}
        a, b, scale = (tree["lora"][name].astype(jnp.float32) for name in ("a", "b", "scale"))
        w = tree["w"].astype(jnp.float32) + (a * scale[:, None, None]) @ b
        return {**{name: x for name, x in tree.items() if name != "lora"}, "w": w.astype(tree["w"].dtype)}

    return fold(params)


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
        cause = "a download that was cut short, or a Git LFS pointer in the place of the file"
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
    """What the library lets pass: a name that is there twice, of which it takes the last."""
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
    """Whether there are as many layers as `config` says, before memory is asked for as many."""
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


def _leaves(config: Config, params: Params) -> dict[str, Any]:
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wanted, got = transformer.shapes(config), {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if wanted != got:
        different = sorted(set(wanted.items()) ^ set(got.items()))[:4]
        cause = "the trainable tree in the place of the whole (merge it first), or another model's parameters"
        raise error(f"the model's {len(wanted)} leaves", f"{len(got)}, of which differ: {different}", cause)
    return leaves


def _shared_mode(file: Path) -> None:
    """Give `file` the mode of files made by `open`: the library makes its own for nobody else to read."""
    neighbour = file.with_name(f"{file.name}.mode")
    neighbour.touch()
    file.chmod(neighbour.stat().st_mode & 0o777)
    neighbour.unlink()


def _write(folder: Path, model: Model, leaves: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    base = layouts.BASES[model.config.family]
    plan = list(_tensors_of(model, leaves))
    shards: list[list[int]] = [[]]
    size = 0
    for i, (_, nbytes, _) in enumerate(plan):
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(i)
        size += nbytes
    where = {}
    for s, shard in enumerate(shards):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{s + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for i in shard:
            name, _, read = plan[i]
            name = name.removeprefix(base) if model.bare else name
            arrays[name], where[name] = np.ascontiguousarray(read()), file
        save_file(arrays, folder / file, metadata={"format": "pt"})
        _shared_mode(folder / file)
    if len(shards) > 1:
        total = sum(nbytes for _, nbytes, _ in plan)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _tensors_of(model: Model, leaves: dict[str, Any]) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """(name, bytes, what makes it) of every tensor of the files."""
    parts: dict[str, list[str]] = {}
    for path in layouts.NAMES[model.config.family]:  # in this order: parts of one tensor follow each other
        if path in leaves:
            parts.setdefault(layouts.source(layouts.NAMES[model.config.family][path]).name, []).append(path)

    def make(paths: list[str], transposed: bool, layer: int | None) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            x = [np.asarray(leaves[p] if layer is None else leaves[p][layer]) for p in paths]
            x = x[0] if len(x) == 1 else np.concatenate(x, axis=-1)
            return x.T if transposed else x

        return read

    for name, paths in parts.items():
        transposed = layouts.source(layouts.NAMES[model.config.family][paths[0]]).transposed
        nbytes = sum(leaves[p].nbytes for p in paths)
        if "{}" in name:
            for i in range(model.config.layers):
                yield name.format(i), nbytes // model.config.layers, make(paths, transposed, i)
        else:
            yield name, nbytes, make(paths, transposed, None)
    for name, x in model.rest.items():
        yield name, x.nbytes, lambda x=x: x
