"""Text to token ids and back: a thin cover of the `tokenizers` library, with the ids that have a meaning."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evoopt.reading import contents, document, short, understood
from evoopt.types import error

MOST = 1 << 28  # bytes of a tokenizer's file
SPECIAL = ("bos", "eos", "pad", "mask", "cls", "sep", "unk")
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """backend: a `tokenizers.Tokenizer`. special: ids by name ("bos", "eos", "pad", "mask", ...), those that there are.

    files: the files it came from, by name, which `save` writes again as they were.
    """

    backend: Any
    special: Mapping[str, int]
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def pad(self) -> int:
        """What fills rows up; it is masked, so that any id would do."""
        return self.special.get("pad", self.special.get("eos", 0))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; with `special` those the model expects around it, such as the beginning of text or [CLS]."""
        with understood(
            f"text that the tokenizer can split, not {short(text)}", "half a surrogate pair, or a damaged file"
        ):
            return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        with understood(f"ids of the tokenizer, not {short(list(ids))}", "a negative id, or a damaged file"):
            return self.backend.decode([int(i) for i in ids])

    def save(self, folder: str | Path) -> None:
        """Write the files into `folder`; of a tokenizer from a GGUF file, what `transformers` reads."""
        files = self.files
        if not {"tokenizer.json", "vocab.json", "vocab.txt"} & set(files):
            name = lambda i: self.backend.id_to_token(i)
            config = {f"{which}_token": name(i) for which, i in self.special.items()}
            config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            files = {
                **files,
                "tokenizer.json": self.backend.to_str(pretty=True).encode(),
                "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            }
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)


def need_tokenizers() -> Any:
    """The `tokenizers` library.

    Raises:
        ImportError: it is not installed.
    """
    # Its threads and JAX's would fork-warn at each other, and texts here are short.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as missing:
        cause = "the extra was not installed: pip install evoopt-jax[llm]"
        raise error("the package tokenizers", "none", cause, ImportError) from missing
    return tokenizers


def from_folder(folder: str | Path, found: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a Hugging Face folder; `found` is what its `config.json` holds.

    It is read from `tokenizer.json`, or from `vocab.json` and `merges.txt` (GPT-2, OPT), or from `vocab.txt` (BERT).

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: a file that is not a tokenizer.
    """
    tokenizers, folder = need_tokenizers(), Path(folder)
    cause = "a file that was cut short, a Git LFS pointer, or one that needs a newer version of tokenizers"
    with understood(f"a tokenizer in '{folder}'", cause):
        files = {name: contents(inside(folder, name), MOST, link=True) for name in FILES if (folder / name).is_file()}
        settings = _json(files, "tokenizer_config.json") | _json(files, "special_tokens_map.json")
        if "tokenizer.json" in files:
            backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        elif {"vocab.json", "merges.txt"} <= set(files):
            space = bool(settings.get("add_prefix_space", False))
            backend = tokenizers.ByteLevelBPETokenizer(
                str(folder / "vocab.json"), str(folder / "merges.txt"), add_prefix_space=space
            )._tokenizer
            if found.get("model_type") == "opt" or settings.get("add_bos_token"):  # its texts begin with it
                _begin(tokenizers, backend, found["bos_token_id"])
        elif "vocab.txt" in files:
            lower = bool(settings.get("do_lower_case", True))
            backend = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lower)._tokenizer
        else:
            got = f"none of them; there is {', '.join(sorted(p.name for p in folder.iterdir())[:12])}"
            cause = (
                "a model saved without its tokenizer, or with a sentencepiece file only: save it again by "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder) of transformers"
            )
            expected = f"tokenizer.json, vocab.json with merges.txt, or vocab.txt in '{folder}'"
            raise error(expected, got, cause, FileNotFoundError)
        backend.no_padding()  # rows are padded here, and what is too long is an error or cut on the left
        backend.no_truncation()
        return Tokenizer(backend, _special(backend, settings, found), files)


def inside(folder: str | Path, name: str) -> Path:
    """The file `name` of a model's folder: a link may lead to the blobs of the hub's cache, and nowhere else outside.

    What is read is written again when the model is saved, so that a link to a private file would publish it.

    Raises:
        OSError: `name` leads elsewhere.
    """
    folder = Path(folder)
    if Path(name).name != name or "\0" in name:
        cause = "an index of somebody else that names files outside of its folder"
        raise error(f"the name of a file in '{folder}'", short(name), cause, OSError)
    home, path = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    homes = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(path.is_relative_to(place) for place in homes):
        cause = "a folder of somebody else that names files outside of it; put the file itself there"
        raise error(f"a file in '{folder}'", f"{short(name)}, which is at '{path}'", cause, OSError)
    return folder / name


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    found = document(files.get(name, b"{}"))
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {short(found)}, not an object")
    return found


def _special(backend: Any, settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, int]:
    ids = {}
    for name in SPECIAL:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and backend.token_to_id(token) is not None:
            ids[name] = backend.token_to_id(token)
        elif type(i := found.get(f"{name}_token_id")) is int and 0 <= i < found["vocab_size"]:  # -1 stands for none
            ids[name] = i
    return ids


def _begin(tokenizers: Any, backend: Any, bos: int) -> None:
    token = backend.id_to_token(bos)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
    )


def from_bpe(
    tokens: Sequence[str], merges: Sequence[str], types: Sequence[int], *, kind: str, special: Mapping[str, int]
) -> Tokenizer:
    """A byte-level BPE tokenizer from the lists of a GGUF file.

    types: of each token: 3 for control tokens, 4 for words added by the user, as GGUF has them.
    kind: which regular expression splits the text into words, as GGUF's `tokenizer.ggml.pre` names it.

    Raises:
        ValueError: for a kind that is not known.
    """
    tokenizers = need_tokenizers()
    pre = tokenizers.pre_tokenizers
    byte_level = lambda use_regex: pre.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    split = lambda pattern: pre.Split(tokenizers.Regex(pattern), "isolated")
    if kind in ("gpt-2", "default"):
        splitting = byte_level(True)
    elif kind == "smollm":
        splitting = pre.Sequence([pre.Digits(individual_digits=True), byte_level(True)])
    elif kind in ("llama-bpe", "llama3", "qwen2"):
        digits = r"\p{N}" if kind == "qwen2" else r"\p{N}{1,3}"
        splitting = pre.Sequence([split(WORDS.format(digits=digits)), byte_level(False)])
    else:
        cause = "a GGUF file of another family; its Hugging Face folder has the tokenizer in full"
        raise error("tokenizer.ggml.pre: gpt-2, smollm, llama-bpe or qwen2", repr(kind), cause)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer, backend.decoder = splitting, tokenizers.decoders.ByteLevel()
    added = lambda token: tokenizers.AddedToken(token, normalized=False, special=True)
    backend.add_special_tokens([added(t) for t, kind in zip(tokens, types, strict=True) if kind == 3])
    backend.add_tokens(
        [tokenizers.AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == 4]
    )
    return Tokenizer(backend, dict(special))


# How Llama 3 and Qwen 2 split text into words; they differ in how many digits stay together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Raise ValueError unless every id of `tokenizer` is a row of the model's table.

    A model may have more rows than the tokenizer has ids: tables are often padded to a round number.
    """
    if tokenizer.size > vocabulary:
        raise error(
            f"a tokenizer for a model of {vocabulary} tokens",
            f"one with ids up to {tokenizer.size - 1}",
            "the tokenizer of another model, or tokens added without the model's table being resized",
        )
