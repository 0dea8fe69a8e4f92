"""Data sets of language tasks.

`completion`, `classification` and `similarity` turn rows of text into a `Data`, and `tasks.Task` turns that into an
objective. All rows are padded to the length of the longest, rounded up, so that a run compiles once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evoopt.envs.language import prepare, scoring
from evoopt.envs.language.model import Model
from evoopt.envs.language.prepare import Row, read
from evoopt.envs.language.tokenizer import Tokenizer
from evoopt.types import Array, Params, error

__all__ = ["Data", "classification", "completion", "read", "similarity"]


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """n rows of a task.

    arrays: every array has leading axis n.
    answer: (model, params, rows, shared) -> dict of arrays, leading axis that of `rows`: `loss` and `weight` (the loss
        of a set of rows is sum(loss) / sum(weight)), `prediction` and `label`, int32.
    labels: names of the labels, by number; () where rows have candidates of their own, or none.
    shared: arrays that all rows need.
    texts: the completions, for metrics of generated text; () for classification.
    rows: the rows that `texts` came from, for metrics that read other fields of them.
    new_tokens: the most tokens that are generated.
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
    """Text to continue. The loss is the mean over the tokens of the completion only.

    The prediction of a row is 1 if every token of the completion is the most likely one, so that greedy generation
    would write it; the label is 1.

    prompt, completion: templates that are filled from the fields of a row. An empty prompt is the start of a text.
    end: put the end-of-text token after the completion, if the tokenizer has one.
    max_new_tokens: how many tokens to generate for a metric of your own; None for the length of the longest completion.
    length: pad rows to this many tokens; None for the longest row, rounded up to a multiple of 8.
    truncate: cut rows that are too long, at the beginning of the prompt.

    Raises:
        ValueError: no rows; a row without one of the fields, with an empty completion, or longer than the context or
            `length`; an encoder.
    """
    if not model.config.causal:
        raise error("a decoder", f"a {model.config.family} encoder", "continuing text is what encoders cannot")
    if max_new_tokens is not None and not 1 <= max_new_tokens <= model.config.context:
        cause = "a number meant for another model; what does not fit into the context is not generated"
        raise error(f"max_new_tokens between 1 and {model.config.context}, the context", str(max_new_tokens), cause)
    pairs, texts, rows = [], [], prepare.some(rows)
    for i, row in enumerate(rows):
        text = prepare.fill(completion, row, i)
        texts.append(text)
        before, after = prepare.split(tokenizer, prepare.fill(prompt, row, i), text)
        if not after:
            raise error(f"a completion in row {i + 1}", repr(text), "an empty field, which leaves nothing to score")
        eos = tokenizer.special.get("eos")
        pairs.append((before, after + ([eos] if end and eos is not None and after[-1] != eos else [])))
    rows_of_ids = prepare.cut(model, [(b + a, len(a)) for b, a in pairs], length, truncate)
    arrays = prepare.padded(model, tokenizer, [ids for ids, _ in rows_of_ids], length)
    n, most = len(pairs), max(len(a) for _, a in pairs)
    places, targets = np.zeros((n, most), np.int32), np.zeros((n, most), np.int32)
    for i, ((ids, scored), (_, after)) in enumerate(zip(rows_of_ids, pairs, strict=True)):
        places[i, :scored] = len(ids) - scored - 1 + np.arange(scored)  # the place before each scored token
        targets[i, :scored] = after
    scored = np.array([len(a) for _, a in pairs], np.int32)
    arrays |= {"places": places, "targets": targets, "scored": scored, "row": np.arange(n, dtype=np.int32)}
    return Data(
        prepare.on_device(arrays), scoring.completed, texts=tuple(texts), tokenizer=tokenizer, rows=tuple(rows),
        new_tokens=max_new_tokens or most,
    )  # fmt: skip


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
    """Classification by verbalisers: the candidate with the most likely text wins.

    A decoder compares the log-likelihoods of the candidates' tokens after the prompt, averaged over them or (with
    `average=False`) summed. An encoder with the head of masked language modelling compares the candidates, one token
    each, at the place of `{mask}` in the prompt. The loss is the cross-entropy of the label among the candidates.
    If every candidate is one token, the prompt is read once for all of them.

    prompt: a template, as in "{text} It was" (with candidates such as " great") or "{text} It was {mask}.".
    candidates: label -> its text; None if each row has a list `candidates`, and a label that is one of them or its
        number, from 0.
    label: the field with the label. A label that is not text is compared as `str(...)`.
    length, truncate: as in `completion`.

    Raises:
        ValueError: as `completion`; a label that is not among the candidates; fewer than two candidates; for an encoder
            a prompt without {mask}, or a candidate of several tokens.
    """
    rows = prepare.some(rows)
    names, labels, texts = prepare.labels(rows, candidates, label)
    if not model.config.causal:
        return _masked(model, tokenizer, rows, prompt, (names, labels, texts), length, truncate)
    parts = [
        [prepare.split(tokenizer, prepare.fill(prompt, row, i), c) for c in texts[i]] for i, row in enumerate(rows)
    ]
    for i, row in enumerate(parts):
        for (_, after), text in zip(row, texts[i], strict=True):
            if not after:
                raise error(f"candidates with at least one token in row {i + 1}", repr(text), "an empty text")
    n, k, most = len(rows), max(map(len, parts)), max(len(a) for row in parts for _, a in row)
    together = most == 1 and all(b == row[0][0] for row in parts for b, _ in row)
    ids = [(b + ([] if together else a), len(a)) for row in parts for b, a in (row[:1] if together else row)]
    cut = prepare.cut(model, ids, length, truncate, keep=not together)
    arrays = prepare.padded(model, tokenizer, [x for x, _ in cut], length)
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
    answer = scoring.averaged if average else scoring.summed
    return Data(prepare.on_device(arrays), answer, labels=names, tokenizer=tokenizer)


def _masked(model, tokenizer, rows, prompt, labelled, length, truncate) -> Data:
    """A masked prompt per row: the decoder's case of one token a candidate, at the place of the mask."""
    names, labels, texts = labelled
    mask = tokenizer.special.get("mask")
    if not model.has_head or mask is None:
        got = "an encoder without that head" if mask is not None else "a tokenizer without a mask token"
        cause = "a sentence encoder, whose embeddings are compared instead (data.similarity)"
        raise error("an encoder with the head of masked language modelling, for verbalisers", got, cause)
    word = tokenizer.backend.id_to_token(mask)
    ids = [tokenizer.encode(prepare.fill(prompt, {**row, "mask": word}, i)) for i, row in enumerate(rows)]
    for i, row in enumerate(ids):
        if row.count(mask) != 1:
            cause = "for an encoder the prompt is like '{text} It was {mask}.'"
            raise error(f"one {{mask}} in the prompt of row {i + 1}", f"{row.count(mask)} in {prompt!r}", cause)
    cut = [x for x, _ in prepare.cut(model, [(x, len(x) - x.index(mask)) for x in ids], length, truncate)]
    arrays = prepare.padded(model, tokenizer, cut, length)
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
    return Data(prepare.on_device(arrays), scoring.summed, labels=names, tokenizer=tokenizer)


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
    """Classification by a sentence encoder: the candidate sentence with the nearest embedding, by cosine, wins.

    An embedding is the mean of the last hidden states. The loss is the cross-entropy of the label among `scale` times
    the cosines (sentence encoders are trained with 20). The candidates are embedded again in every evaluation, because
    their embeddings change with the parameters.

    candidates: label -> a sentence, as in {"negative": "It was terrible.", "positive": "It was great."}.
    text: a template.
    label, length, truncate: as in `classification`, but a text that is too long is cut at its end.

    Raises:
        ValueError: as `classification`.
    """
    rows = prepare.some(rows)
    names, labels, texts = prepare.labels(rows, candidates, label)
    ids = [tokenizer.encode(prepare.fill(text, row, i)) for i, row in enumerate(rows)]
    arrays = prepare.padded(
        model, tokenizer, [x for x, _ in prepare.cut(model, [(x, 1) for x in ids], length, truncate, end=True)], length
    )
    sentences = [tokenizer.encode(sentence) for sentence in texts[0]]
    shared = prepare.padded(
        model, tokenizer, [x for x, _ in prepare.cut(model, [(x, 1) for x in sentences], None, False)], None
    )
    shared |= {"scale": np.asarray(scale, np.float32)}
    return Data(
        prepare.on_device({**arrays, "label": labels}),
        scoring.similar,
        names,
        prepare.on_device(shared),
        tokenizer=tokenizer,
    )
