"""From text to rows of tokens: JSON lines, templates, labels, and rows padded to one length."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from evoopt.envs.language.model import Model
from evoopt.envs.language.tokenizer import Tokenizer
from evoopt.reading import document, short
from evoopt.types import Array, error

Row = Mapping[str, Any]


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object per line; empty lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object (the message has its number), or no row at all.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"a file of JSON lines at '{path}'", "no file", "a misspelt path", FileNotFoundError)
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = document(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, not an object")
        except ValueError as reason:
            expected = f'a JSON object, as in {{"text": "...", "label": "..."}}, in line {number} of \'{path}\''
            cause = "a file that is one JSON list, or CSV; or a line that was cut in two"
            raise error(expected, f"{line[:60]!r}: {reason}", cause) from reason
        rows.append(row)
    return some(rows, str(path))


def some(rows: Sequence[Row], where: str = "the data") -> list:
    """The rows as a list, of which there must be one."""
    if not len(rows):
        raise error(f"at least one row in {where}", "none", "an empty file, or a split that left nothing over")
    return list(rows)


def fill(template: str, row: Row, i: int) -> str:
    """`template` with the fields of row i.

    Raises:
        ValueError: a field that the row lacks, or that is not text.
    """
    try:
        for _, name, _, _ in _FORMATTER.parse(template):
            if name is not None:
                _text(_FORMATTER.get_field(name, (), row)[0], name, i)
        return template.format_map(row)
    except _NoTextError as reason:
        raise error(*reason.args) from None
    except KeyError as missing:
        cause = "a template made for another file"
        raise error(f"the field {missing} in row {i + 1}", f"the fields {sorted(row)}", cause) from missing
    except (ValueError, IndexError, TypeError, AttributeError) as reason:
        cause = "a brace that is not a field's is written twice: {{"
        raise error("a template with fields such as {text}", f"{template!r}: {reason}", cause) from reason


_FORMATTER = string.Formatter()


class _NoTextError(Exception):
    """The three parts of an error about a row."""


def _text(found: Any, name: str, i: int) -> str:
    """`found`, which is text: a null would be trained on as the word "None"."""
    if not isinstance(found, str):
        cause = "a null or a number that was not converted when the file was written: str(...) there, or leave it out"
        raise _NoTextError(
            f"text in the field '{name}' of row {i + 1}", f"{short(found)}, a {type(found).__name__}", cause
        )
    return found


def split(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the text after it, split as they are when read as one."""
    before, both = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    common = 0
    while common < min(len(before), len(both)) and before[common] == both[common]:
        common += 1
    before, after = both[:common], both[common:]
    if not before:  # the first predicted token needs one before it
        before = [tokenizer.special.get("bos", tokenizer.special.get("eos", 0))]
    return before, after


def labels(rows: list, candidates: Mapping[str, str] | None, field: str) -> tuple[tuple, np.ndarray, list[list[str]]]:
    """(names of the labels, the number of each row's label (n,), the candidates of each row)."""
    texts, numbers = [], np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        if field not in row:
            cause = "another field's name: give it as label=..."
            raise error(f"the field '{field}' in row {i + 1}", f"the fields {sorted(row)}", cause)
        if candidates is None and not isinstance(row.get("candidates"), list):
            cause = "either every row has a list `candidates`, or candidates={label: text} is given"
            raise error(f"a list 'candidates' in row {i + 1}", f"the fields {sorted(row)}", cause)
        try:
            own = [
                _text(c, "candidates", i) for c in (row["candidates"] if candidates is None else candidates.values())
            ]
        except _NoTextError as reason:
            raise error(*reason.args) from None
        names = [str(name) for name in candidates] if candidates is not None else own
        if len(own) < 2:
            raise error("at least two candidates", f"{own} in row {i + 1}", "with one there is nothing to choose")
        found = row[field]
        if not isinstance(found, (str, int, float)):
            cause = "a row without a label, or one with several"
            raise error(f"a label in the field '{field}' of row {i + 1}", short(found), cause)
        if candidates is None and type(found) is int and 0 <= found < len(own):
            numbers[i] = found
        elif str(found) in names:
            numbers[i] = names.index(str(found))
        else:
            cause = "another spelling, or a label that the candidates do not cover"
            raise error(f"a label among {names}", f"{found!r} in row {i + 1}", cause)
        texts.append(own)
    return tuple(map(str, candidates)) if candidates is not None else (), numbers, texts


def cut(
    model: Model, rows: list[tuple[list[int], int]], length: int | None, truncate: bool, *, end: bool = False,
    keep: bool = True,
) -> list[tuple[list[int], int]]:  # fmt: skip
    """Rows (ids, how many at the end must stay), cut where they are too long. The first token always stays.

    length: tokens of a row, at most; None for the context of the model.
    truncate: False raises where a row is too long.
    end: cut at the end of a text, not at its beginning.
    """
    limit = min(length or model.config.context, model.config.context)
    long = [i for i, (ids, _) in enumerate(rows) if len(ids) > limit]
    if not long:
        return rows
    worst = max(long, key=lambda i: len(rows[i][0]))
    needed = max(rows[i][1] for i in long) if keep else 0
    if not truncate or needed > limit - 2:
        which = "the context" if limit == model.config.context else "length="
        cause = (
            "long texts; with truncate=True they are cut"
            if not truncate
            else "what must stay, such as a completion, is as long"
        )
        got = f"{len(long)} of {len(rows)} longer, the longest {len(rows[worst][0])}"
        raise error(f"sequences of at most {limit} tokens ({which})", got, cause)
    shorter = lambda ids: ids[: limit - 1] + ids[-1:] if end else ids[:1] + ids[len(ids) - limit + 1 :]
    return [(shorter(ids) if len(ids) > limit else ids, at_the_end) for ids, at_the_end in rows]


def padded(model: Model, tokenizer: Tokenizer, rows: list[list[int]], length: int | None) -> dict[str, np.ndarray]:
    """Rows of ids as `tokens` (n, t), padded on the right, and `lengths` (n,)."""
    lengths = np.array([len(ids) for ids in rows], np.int32)
    most = length or min(-(-int(lengths.max()) // 8) * 8, model.config.context)
    tokens = np.full((len(rows), most), tokenizer.pad, np.int32)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
    return {"tokens": tokens, "lengths": lengths}


def on_device(arrays: dict[str, np.ndarray]) -> dict[str, Array]:
    """The arrays as JAX arrays. NumPy arrays would be written into every program that closes over them."""
    return {name: jnp.asarray(x) for name, x in arrays.items()}
