"""Tiny language models and tokenizers for the tests: as files, and in memory."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from evoopt.envs.language.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data" / "language"
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "mask": 3, "unk": 4}
WORDS = [
    "it", "was", "a", "film", "good", "bad", "great", "terrible", "dull", "fine", "the", "end", ".", "x", "y", "z",
    "one", "two", "three", "four", "five", "six", "not", "very", "plot", "dog", "cat",
]  # fmt: skip


def maker():
    """The script that made the references; what it draws the weights with is what the tests draw them with."""
    spec = importlib.util.spec_from_file_location("make_language_references", DATA / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = sorted(maker().CASES)


def reference(case):
    return json.loads((DATA / f"{case}.json").read_text())


def write_folder(folder, case, *, tokenizer=False, **settings):
    """The folder of a reference's model, as transformers would have saved it."""
    from safetensors.numpy import save_file

    found = reference(case)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: maker().weight(name, tuple(shape)) for name, shape in found["shapes"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**found["config"], **settings}))
    if tokenizer:
        words().save(folder)
    return folder


def words(bos=True):
    """A tokenizer of 32 ids: five special ones, and a word each."""
    import tokenizers

    names = {**{f"[{name.upper()}]": i for name, i in SPECIAL.items()}, **{w: i + 5 for i, w in enumerate(WORDS)}}
    assert len(names) == 32
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([f"[{name.upper()}]" for name in SPECIAL])
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", 1)]
        )
    return Tokenizer(backend, SPECIAL)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
