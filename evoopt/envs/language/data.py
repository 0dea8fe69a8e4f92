"""Text to arrays: JSON lines, templates, candidates, and rows of one shape.

`completion`, `classification` and `similarity` make a `Data`, which `tasks.Task` makes an objective of. All rows of a
data set are padded to one length, the longest rounded up, so that a run compiles once.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.envs.language.model import Model
from evoopt.envs.language.tokenizer import Tokenizer
from evoopt.reading import document, short
from evoopt.types import Array, Params, error

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """n rows of a task.

    arrays: every array has leading axis n.
    answer: (model, params, rows, shared) -> dict of arrays, leading axis that of `rows`: `loss` and `weight` (the loss
        of a set of rows is sum(loss) / sum(weight)), `prediction` and `label`, int32.
    labels: names of the labels, by number; () where rows have candidates of their own, or none.
    shared: arrays that all rows need.
    texts: the completions, for metrics of generated text; () for classification.
    rows: the rows that `texts` came from, for metrics that read more of them.
    new_tokens: how many are generated, at most.
    """

    arrays: dict[str, Array]
    answer: Callable[[Model, Params, dict[str, Array], dict[str, Array]], dict[str, Array]]
    labels: tuple[str, ...] = ()
    shared: dict[str, Array] = dataclasses.field(default_factory=dict)
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    rows: tuple[Row, ...] = ()
    new_tokens: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return self.arrays["tokens"].shape[-1]


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line; empty lines are passed over.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object (its number is said), or no row at all.
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
    return _some(rows, str(path))


def completion(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    prompt: str = "{prompt}",
    completion: str = "{completion}",
    end: bool = True,
    max_new_tokens: int | None = None,
    length: int | None = None,
    truncate: bool = False,
) -> Data:
    """Text to be continued: the loss is on the completion only, a mean over its tokens.

    A row's prediction is 1 where every token of the completion is the most likely one, that is where greedy generation
    would write it; its label is 1.

    prompt, completion: templates, filled from the row's fields. An empty prompt is the beginning of a text.
    end: put the end of text after the completion, where the tokenizer has one.
    max_new_tokens: how many tokens are generated for a metric of your own; None for as many as the longest completion
        has. A completion is only read by the loss then, and by metrics that compare with it.
    length: tokens a row is padded to; None for the longest, rounded up to a multiple of 8.
    truncate: cut what is too long at the beginning of the prompt.

    Raises:
        ValueError: no rows; a field that a row lacks; an empty completion; a row longer than the context or `length`;
            an encoder.
    """
    if not model.config.causal:
        raise error("a decoder", f"a {model.config.family} encoder", "continuing text is what encoders cannot")
    if max_new_tokens is not None and not 1 <= max_new_tokens <= model.config.context:
        cause = "a number meant for another model; what does not fit into the context is not generated"
        raise error(f"max_new_tokens between 1 and {model.config.context}, the context", str(max_new_tokens), cause)
    pairs, texts, rows = [], [], _some(rows)
    for i, row in enumerate(rows):
        text = _fill(completion, row, i)
        texts.append(text)
        before, after = _parts(tokenizer, _fill(prompt, row, i), text)
        if not after:
            raise error(f"a completion in row {i + 1}", repr(text), "an empty field, which leaves nothing to score")
        eos = tokenizer.special.get("eos")
        pairs.append((before, after + ([eos] if end and eos is not None and after[-1] != eos else [])))
    rows_of_ids = _cut(model, [(b + a, len(a)) for b, a in pairs], length, truncate)
    arrays = _arrays(model, tokenizer, [ids for ids, _ in rows_of_ids], length)
    n, most = len(pairs), max(len(a) for _, a in pairs)
    places, targets = np.zeros((n, most), np.int32), np.zeros((n, most), np.int32)
    for i, ((ids, scored), (_, after)) in enumerate(zip(rows_of_ids, pairs, strict=True)):
        places[i, :scored] = len(ids) - scored - 1 + np.arange(scored)  # the place before each scored token
        targets[i, :scored] = after
    scored = np.array([len(a) for _, a in pairs], np.int32)
    arrays |= {"places": places, "targets": targets, "scored": scored, "row": np.arange(n, dtype=np.int32)}
    return Data(
        _device(arrays), completion_answer, texts=tuple(texts), tokenizer=tokenizer, rows=tuple(rows),
        new_tokens=max_new_tokens or most,
    )  # fmt: skip


def completion_answer(model: Model, params: Params, rows: dict, shared: dict) -> dict[str, Array]:
    del shared
    states = model.hidden(params, rows["tokens"], _mask(rows))
    states = jnp.take_along_axis(states, rows["places"][..., None], axis=1)  # only what is scored meets the head
    logits = model.logits(params, states)
    scored = jnp.arange(logits.shape[1], dtype=jnp.int32) < rows["scored"][:, None]
    loss = jnp.where(scored, -_log_likelihood(logits, rows["targets"][..., None])[..., 0], 0).sum(1)
    right = (jnp.argmax(logits, -1).astype(jnp.int32) == rows["targets"]) | ~scored
    prediction = right.all(1).astype(jnp.int32)
    weight = rows["scored"].astype(jnp.float32)
    return {"loss": loss, "weight": weight, "prediction": prediction, "label": jnp.ones_like(prediction)}


def classification(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    prompt: str,
    candidates: Mapping[str, str] | None = None,
    label: str = "label",
    average: bool = True,
    length: int | None = None,
    truncate: bool = False,
) -> Data:
    """Classification by verbalisers: the candidate whose text is the most likely wins.

    A decoder compares the log-likelihoods of the candidates' tokens after the prompt, averaged over them or (with
    `average=False`) summed. An encoder with the head of masked language modelling compares the candidates, one token
    each, at the place of `{mask}` in the prompt. The loss is the cross-entropy of the label among the candidates.
    Where every candidate is one token, the prompt is read once for all.

    prompt: a template, as in "{text} It was" (with candidates such as " great") or "{text} It was {mask}.".
    candidates: label -> its text; None where each row has a list `candidates`, and its label is one of them or its
        number, from 0.
    label: the row's field with the label; other kinds than text are compared as `str(...)`.
    length, truncate: as in `completion`.

    Raises:
        ValueError: as `completion`; a label that is not among the candidates; fewer than two candidates; for an encoder
            a prompt without {mask}, or a candidate of several tokens.
    """
    rows = _some(rows)
    names, labels, texts = _labels(rows, candidates, label)
    if not model.config.causal:
        return _masked(model, tokenizer, rows, prompt, (names, labels, texts), length, truncate)
    parts = [[_parts(tokenizer, _fill(prompt, row, i), c) for c in texts[i]] for i, row in enumerate(rows)]
    for i, row in enumerate(parts):
        for (_, after), text in zip(row, texts[i], strict=True):
            if not after:
                raise error(f"candidates with at least one token in row {i + 1}", repr(text), "an empty text")
    n, k, most = len(rows), max(map(len, parts)), max(len(a) for row in parts for _, a in row)
    together = most == 1 and all(b == row[0][0] for row in parts for b, _ in row)
    ids = [(b + ([] if together else a), len(a)) for row in parts for b, a in (row[:1] if together else row)]
    cut = _cut(model, ids, length, truncate, keep=not together)
    arrays = _arrays(model, tokenizer, [x for x, _ in cut], length)
    sequences = 1 if together else k
    tokens = np.full((n, sequences, arrays["tokens"].shape[1]), tokenizer.pad, np.int32)
    lengths = np.ones((n, sequences), np.int32)
    targets, scored, valid = (np.zeros(s, np.int32) for s in ((n, k, most), (n, k), (n, k)))
    place = 0
    for i, row in enumerate(parts):
        for j in range(1 if together else len(row)):
            tokens[i, j], lengths[i, j] = arrays["tokens"][place], arrays["lengths"][place]
            place += 1
        for j, (_, after) in enumerate(row):
            targets[i, j, : len(after)], scored[i, j], valid[i, j] = after, len(after), 1
    ends = lengths if together else lengths - scored
    places = np.maximum(ends - 1, 0)[..., None] + np.arange(most, dtype=np.int32)
    arrays = {"tokens": tokens, "lengths": lengths, "places": np.minimum(places, tokens.shape[2] - 1),
              "targets": targets, "scored": scored, "valid": valid, "label": labels}  # fmt: skip
    answer = averaged_answer if average else summed_answer
    return Data(_device(arrays), answer, labels=names, tokenizer=tokenizer)


def averaged_answer(model: Model, params: Params, rows: dict, shared: dict) -> dict[str, Array]:
    del shared
    scores = _candidate_scores(model, params, rows) / jnp.maximum(rows["scored"], 1).astype(jnp.float32)
    return _chosen(scores, rows)


def summed_answer(model: Model, params: Params, rows: dict, shared: dict) -> dict[str, Array]:
    del shared
    return _chosen(_candidate_scores(model, params, rows), rows)


def _candidate_scores(model: Model, params: Params, rows: dict) -> Array:
    """Summed log-likelihoods (b, k) of the candidates."""
    b, s, t = rows["tokens"].shape
    flat = lambda x: x.reshape(b * s, *x.shape[2:])
    lengths = flat(rows["lengths"])[:, None]
    states = model.hidden(params, flat(rows["tokens"]), jnp.arange(t, dtype=jnp.int32) < lengths)
    states = jnp.take_along_axis(states, flat(rows["places"])[..., None], axis=1)
    logits = model.logits(params, states)  # (b s, c, vocabulary)
    logits = logits.reshape(b, s, *logits.shape[1:])
    targets = rows["targets"]
    if s == 1:  # one sequence serves all candidates, of a token each
        scores = _log_likelihood(logits[:, 0], targets.swapaxes(1, 2)).swapaxes(1, 2)  # (b, k, c)
    else:
        scores = _log_likelihood(logits, targets[..., None])[..., 0]
    scored = jnp.arange(scores.shape[-1], dtype=jnp.int32) < rows["scored"][..., None]
    return jnp.where(scored, scores, 0).sum(-1)


def _masked(model, tokenizer, rows, prompt, labelled, length, truncate) -> Data:
    """A masked prompt per row: the decoder's case of one token a candidate, at the place of the mask."""
    names, labels, texts = labelled
    mask = tokenizer.special.get("mask")
    if not model.has_head or mask is None:
        got = "an encoder without that head" if mask is not None else "a tokenizer without a mask token"
        cause = "a sentence encoder, whose embeddings are compared instead (data.similarity)"
        raise error("an encoder with the head of masked language modelling, for verbalisers", got, cause)
    word = tokenizer.backend.id_to_token(mask)
    ids = [tokenizer.encode(_fill(prompt, {**row, "mask": word}, i)) for i, row in enumerate(rows)]
    for i, row in enumerate(ids):
        if row.count(mask) != 1:
            cause = "for an encoder the prompt is like '{text} It was {mask}.'"
            raise error(f"one {{mask}} in the prompt of row {i + 1}", f"{row.count(mask)} in {prompt!r}", cause)
    cut = [x for x, _ in _cut(model, [(x, len(x) - x.index(mask)) for x in ids], length, truncate)]
    arrays = _arrays(model, tokenizer, cut, length)
    k = max(map(len, texts))
    targets, valid = np.zeros((len(rows), k, 1), np.int32), np.zeros((len(rows), k), np.int32)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            token = tokenizer.encode(text, special=False)
            if len(token) != 1:
                cause = "a long or rare word; for RoBERTa, a word without the blank before it (' great')"
                pieces = [tokenizer.backend.id_to_token(t) for t in token]
                raise error("candidates of one token, for an encoder", f"{text!r}, which is {pieces}", cause)
            targets[i, j, 0], valid[i, j] = token[0], 1
    places = np.array([x.index(mask) for x in cut], np.int32)[:, None, None]
    arrays = {"tokens": arrays["tokens"][:, None], "lengths": arrays["lengths"][:, None], "places": places,
              "targets": targets, "scored": valid, "valid": valid, "label": labels}  # fmt: skip
    return Data(_device(arrays), summed_answer, labels=names, tokenizer=tokenizer)


def similarity(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    candidates: Mapping[str, str],
    text: str = "{text}",
    label: str = "label",
    scale: float = 20.0,
    length: int | None = None,
    truncate: bool = False,
) -> Data:
    """Classification by a sentence encoder: the candidate sentence whose embedding is the nearest by cosine wins.

    An embedding is the mean of the last hidden states. The loss is the cross-entropy of the label among `scale` times
    the cosines (20 is what sentence encoders are trained with). The candidates are read again with every evaluation:
    their embeddings change with the parameters.

    candidates: label -> a sentence, as in {"negative": "It was terrible.", "positive": "It was great."}.
    text: a template. label, length, truncate: as in `classification`, but what is too long is cut at its end.

    Raises:
        ValueError: as `classification`.
    """
    rows = _some(rows)
    names, labels, texts = _labels(rows, candidates, label)
    ids = [tokenizer.encode(_fill(text, row, i)) for i, row in enumerate(rows)]
    arrays = _arrays(
        model, tokenizer, [x for x, _ in _cut(model, [(x, 1) for x in ids], length, truncate, end=True)], length
    )
    sentences = [tokenizer.encode(sentence) for sentence in texts[0]]
    shared = _arrays(model, tokenizer, [x for x, _ in _cut(model, [(x, 1) for x in sentences], None, False)], None)
    shared |= {"scale": np.asarray(scale, np.float32)}
    return Data(_device({**arrays, "label": labels}), similarity_answer, names, _device(shared), tokenizer=tokenizer)


def similarity_answer(model: Model, params: Params, rows: dict, shared: dict) -> dict[str, Array]:
    candidates = _embedding(model, params, shared)
    return _chosen(shared["scale"] * (_embedding(model, params, rows) @ candidates.T), rows)


def _embedding(model: Model, params: Params, rows: dict) -> Array:
    """Mean hidden states (b, width) of the tokens, of length 1, float32."""
    mask = _mask(rows)
    x = model.hidden(params, rows["tokens"], mask).astype(jnp.float32)
    mean = jnp.where(mask[..., None], x, 0).sum(1) / rows["lengths"][:, None].astype(jnp.float32)
    return mean * jax.lax.rsqrt(jnp.maximum(jnp.sum(mean**2, -1, keepdims=True), np.float32(1e-12)))


def _chosen(scores: Array, rows: dict) -> dict[str, Array]:
    """The answers of a classification from the scores (b, k), float32."""
    if "valid" in rows:
        scores = jnp.where(rows["valid"] > 0, scores, jnp.finfo(jnp.float32).min)
    loss = -_log_likelihood(scores, rows["label"][:, None])[:, 0]
    prediction = jnp.argmax(scores, -1).astype(jnp.int32)
    return {"loss": loss, "weight": jnp.ones_like(loss), "prediction": prediction, "label": rows["label"]}


def _log_likelihood(logits: Array, targets: Array) -> Array:
    """log softmax(logits)[targets] along the last axis: logits (..., v), targets (..., n)."""
    return jnp.take_along_axis(logits, targets, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _mask(rows: dict) -> Array:
    return jnp.arange(rows["tokens"].shape[-1], dtype=jnp.int32) < rows["lengths"][:, None]


def _some(rows: Sequence[Row], where: str = "the data") -> list:
    if not len(rows):
        raise error(f"at least one row in {where}", "none", "an empty file, or a split that left nothing over")
    return list(rows)


def _fill(template: str, row: Row, i: int) -> str:
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


def _parts(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the text after it, split as they are when read as one."""
    before, both = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    common = 0
    while common < min(len(before), len(both)) and before[common] == both[common]:
        common += 1
    before, after = both[:common], both[common:]
    if not before:  # something has to stand before the first token that is predicted
        before = [tokenizer.special.get("bos", tokenizer.special.get("eos", 0))]
    return before, after


def _labels(rows: list, candidates: Mapping[str, str] | None, field: str) -> tuple[tuple, np.ndarray, list[list[str]]]:
    """Names of the labels, each row's number among them, and each row's candidates."""
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


def _cut(
    model: Model, rows: list[tuple[list[int], int]], length: int | None, truncate: bool, *, end: bool = False,
    keep: bool = True,
) -> list[tuple[list[int], int]]:  # fmt: skip
    """Rows (ids, how many at the end are needed) that fit; the first token, which begins a text, always stays."""
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
    return [(shorter(ids) if len(ids) > limit else ids, needed) for ids, needed in rows]


def _arrays(model: Model, tokenizer: Tokenizer, rows: list[list[int]], length: int | None) -> dict[str, np.ndarray]:
    """Rows of ids as `tokens` (n, t), filled up on the right, and `lengths` (n,)."""
    lengths = np.array([len(ids) for ids in rows], np.int32)
    most = length or min(-(-int(lengths.max()) // 8) * 8, model.config.context)
    tokens = np.full((len(rows), most), tokenizer.pad, np.int32)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
    return {"tokens": tokens, "lengths": lengths}


def _device(arrays: dict[str, np.ndarray]) -> dict[str, Array]:
    """As arrays of JAX: those of NumPy would be written into every program that closes over them."""
    return {name: jnp.asarray(x) for name, x in arrays.items()}
