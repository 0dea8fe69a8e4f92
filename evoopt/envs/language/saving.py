"""Models to files: a Hugging Face folder, and a prefix as a folder for PEFT."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.envs.language import layouts, transformer
from evoopt.envs.language.config import Config
from evoopt.envs.language.model import Model
from evoopt.envs.language.tokenizer import Tokenizer
from evoopt.trees import path_name
from evoopt.types import Params, error

SHARD_BYTES = 4 << 30  # of one file; while it is written, its tensors are in memory twice


def save(path: str | Path, model: Model, params: Params, tokenizer: Tokenizer | None = None) -> Path:
    """Write `params` as a Hugging Face folder, which `transformers` and `load` read.

    LoRA's factors are multiplied into their weights. The dtype is that of the parameters. Weights that the model does
    not use (such as a pooler) are written unchanged.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        ValueError: other leaves or shapes than those of the model, or a prefix among them (see `save_prefix`).
        OSError: it cannot be written; nothing is left behind.
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

    `PeftModel.from_pretrained(transformers_model, path)` puts it before the layers of a decoder, and `load_prefix`
    reads it back. In a row of its tensor, the keys of a layer are followed by its values. `base` is the folder of the
    model, for `AutoPeftModel`.

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


def folded(params: Params) -> Params:
    """`params` with every `lora` multiplied into its weight, `w + scale a b`, and rounded once.

    Raises:
        ValueError: there is a prefix, which is not a weight.
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


def _leaves(config: Config, params: Params) -> dict[str, Any]:
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wanted, got = transformer.shapes(config), {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if wanted != got:
        different = sorted(set(wanted.items()) ^ set(got.items()))[:4]
        cause = "the trainable tree instead of the whole (merge it first), or another model's parameters"
        raise error(f"the model's {len(wanted)} leaves", f"{len(got)}, of which differ: {different}", cause)
    return leaves


def _shared_mode(file: Path) -> None:
    """Give `file` the mode of files made by `open`: safetensors makes its own readable by nobody else."""
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
