"""Tasks: losses and scores as computed by hand, batches that can be drawn again, and what is said of bad data."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_language import SPECIAL, log_softmax, words

from evoopt.envs import language
from evoopt.envs.language import data, tasks, trainable
from evoopt.envs.language.tasks import Task
from evoopt.run import checkpoint
from evoopt.run.compiled import Compiled
from evoopt.run.minimize import minimize
from evoopt.run.problem import Problem
from evoopt.strategies import eggroll, gradient

KEY = jax.random.key(5)
TOKENIZER = words()
LABELS = {"+": " good", "-": " bad"}
ROWS = [
    {"text": "a fine film", "label": "+"},
    {"text": "not very good the plot", "label": "-"},
    {"text": "it was", "label": "-"},
    {"text": "great end", "label": "+"},
    {"text": "the end was good", "label": "+"},
    {"text": "dull", "label": "-"},
    {"text": "one two three four five six", "label": "+"},
]


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def made(kind="llama", **sizes):
    """A tiny model whose answers are not all alike."""
    model = language.tiny(kind, **sizes)
    draw = np.random.RandomState(1).standard_normal
    return model, jax.tree.map(lambda s: jnp.array(0.3 * draw(s.shape), s.dtype), jax.eval_shape(model.init, KEY))


MODEL, PARAMS = made()
ENCODER, ENCODER_PARAMS = made("bert")
POLAR = {"prompt": "{text} it was", "candidates": LABELS}


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, ids, length):
    """Hidden states and logits of one text in a row of 24: one program for all texts."""
    states = model.hidden(params, ids[None], jnp.arange(24)[None] < length)
    return states[0], model.logits(params, states)[0]


def whole(task, x=PARAMS):
    """(value, aux) of all rows at once."""
    rows = task.data.arrays
    value, aux = jax.jit(task)(x, tasks.Batch(KEY, jnp.int32(0), rows))
    return float(value), {k: float(v) for k, v in aux.items()}


def by_hand(ids, model=MODEL, params=PARAMS):
    """log p of the next token (of a masked one for encoders) at every place of one text, (t, vocabulary)."""
    return log_softmax(read(model, params, jnp.array(ids + [0] * (24 - len(ids)), jnp.int32), len(ids))[1][: len(ids)])


def test_completion_is_scored_on_the_completion_only():
    rows = [{"prompt": "it was", "completion": " a good film"}, {"prompt": "", "completion": " the end"}]
    found = data.completion(MODEL, TOKENIZER, rows)
    word = lambda text: TOKENIZER.encode(text, special=False)
    total, tokens, right = 0.0, 0, []
    for row in rows:
        before, after = [1, *word(row["prompt"])], [*word(row["completion"]), SPECIAL["eos"]]
        logp = by_hand(before + after)
        at = len(before) - 1 + np.arange(len(after))
        total, tokens = total - logp[at, after].sum(), tokens + len(after)
        right.append((logp[at].argmax(-1) == after).all())
    value, aux = whole(Task(MODEL, found, batch_size=2))
    assert value == pytest.approx(total / tokens, rel=1e-5)
    assert aux["accuracy"] == np.mean(right)
    assert found.texts == (" a good film", " the end")
    without = data.completion(MODEL, TOKENIZER, rows, end=False)
    assert without.arrays["scored"].tolist() == [3, 2]


@pytest.mark.parametrize("average", [True, False])
def test_candidates_of_several_tokens(average):
    candidates = {"+": " very good", "-": " bad bad bad"}
    found = data.classification(MODEL, TOKENIZER, ROWS, prompt="{text} it was", candidates=candidates, average=average)
    assert found.arrays["tokens"].shape[1] == 2
    scores = np.zeros((len(ROWS), 2))
    for i, row in enumerate(ROWS):
        for j, text in enumerate(candidates.values()):
            before, after = TOKENIZER.encode(row["text"] + " it was"), TOKENIZER.encode(text, special=False)
            logp = by_hand(before + after)[len(before) - 1 + np.arange(len(after)), after]
            scores[i, j] = logp.mean() if average else logp.sum()
    check(found, scores)


def check(found, scores, model=MODEL, params=PARAMS):
    labels = [list(LABELS).index(row["label"]) for row in ROWS]
    expected = -log_softmax(scores)[np.arange(len(ROWS)), labels].mean()
    value, aux = whole(Task(model, found, batch_size=len(ROWS)), params)
    assert value == pytest.approx(expected, rel=1e-5)
    assert aux["accuracy"] == pytest.approx(np.mean(scores.argmax(-1) == labels))
    assert found.labels == ("+", "-")


def test_candidates_of_one_token_read_the_prompt_once():
    found = data.classification(MODEL, TOKENIZER, ROWS, **POLAR)
    assert found.arrays["tokens"].shape == (len(ROWS), 1, 16)
    ids = [TOKENIZER.encode(c, special=False)[0] for c in LABELS.values()]
    check(found, np.array([by_hand(TOKENIZER.encode(row["text"] + " it was"))[-1, ids] for row in ROWS]))


def test_candidates_of_the_rows():
    rows = [
        {"text": "a", "candidates": [" good", " bad", " very dull"], "label": 2},
        {"text": "the", "candidates": [" dog", " cat"], "label": " cat"},
    ]
    found = data.classification(MODEL, TOKENIZER, rows, prompt="{text}")
    assert found.arrays["label"].tolist() == [2, 1]
    assert found.arrays["valid"].tolist() == [[1, 1, 1], [1, 1, 0]]
    answers = jax.jit(lambda rows: found.answer(MODEL, PARAMS, rows, {}))(found.arrays)
    ids = [TOKENIZER.encode(c, special=False)[0] for c in (" dog", " cat")]
    scores = by_hand(TOKENIZER.encode("the"))[-1, ids]
    assert float(answers["loss"][1]) == pytest.approx(
        -log_softmax(scores)[1], rel=1e-5
    )  # the third one is no candidate
    with pytest.raises(ValueError, match="the same labels in all rows"):
        Task(MODEL, found, batch_size=2, metric="f1")


def test_masked_verbalisers():
    found = data.classification(ENCODER, TOKENIZER, ROWS, prompt="{text} it was {mask} .", candidates=LABELS)
    ids = [TOKENIZER.encode(c, special=False)[0] for c in LABELS.values()]
    scores = []
    for row in ROWS:
        text = TOKENIZER.encode(row["text"] + " it was [MASK] .")
        scores.append(by_hand(text, ENCODER, ENCODER_PARAMS)[text.index(SPECIAL["mask"]), ids])
    check(found, np.array(scores), ENCODER, ENCODER_PARAMS)


def test_similarity():
    sentences = {"+": "it was great", "-": "it was terrible"}
    found = data.similarity(ENCODER, TOKENIZER, ROWS, candidates=sentences, scale=7.0)

    def embedding(text):
        ids = TOKENIZER.encode(text)
        filled = jnp.array(ids + [0] * (24 - len(ids)), jnp.int32)
        mean = np.asarray(read(ENCODER, ENCODER_PARAMS, filled, len(ids))[0], np.float64)[: len(ids)].mean(0)
        return mean / np.linalg.norm(mean)

    near = np.stack([embedding(s) for s in sentences.values()])
    check(found, 7.0 * np.stack([embedding(row["text"]) for row in ROWS]) @ near.T, ENCODER, ENCODER_PARAMS)


def test_micro_batches_change_neither_value_nor_gradient_and_save_memory():
    found = data.classification(MODEL, TOKENIZER, ROWS * 16, **POLAR)
    batch = Task(MODEL, found, batch_size=64).context(KEY)
    answers, peak = {}, {}
    for size in (None, 8):
        task = Task(MODEL, found, batch_size=64, micro_batch=size)
        step = jax.jit(jax.value_and_grad(lambda p, b, task=task: task(p, b)[0])).lower(PARAMS, batch).compile()
        answers[size], peak[size] = step(PARAMS, batch), step.memory_analysis().temp_size_in_bytes
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), answers[8], answers[None])
    assert peak[8] < 0.5 * peak[None], peak


def test_metrics():
    found = data.classification(MODEL, TOKENIZER, ROWS, **POLAR)
    prediction, label = np.array([0, 1, 1, 0, 0, 1, 1], np.int32), np.array([0, 1, 0, 0, 1, 1, 0], np.int32)
    answers = {"prediction": jnp.array(prediction), "label": jnp.array(label)}
    aux = {"loss": jnp.float32(0.25), "accuracy": tasks.accuracy(**answers)}
    value = lambda metric: float(Task(MODEL, found, batch_size=7, metric=metric)._value(PARAMS, {}, answers, aux))
    assert value("loss") == 0.25
    assert value("accuracy") == pytest.approx(-4 / 7)
    scores = []
    for c in (0, 1):  # F1 of each class, from its definition
        tp = ((prediction == c) & (label == c)).sum()
        precision, recall = tp / (prediction == c).sum(), tp / (label == c).sum()
        scores.append(2 * precision * recall / (precision + recall))
    assert value("f1") == pytest.approx(-np.mean(scores), rel=1e-6)


def test_metric_of_the_user():
    found = data.classification(MODEL, TOKENIZER, ROWS, **POLAR)
    seen = []

    def own(predictions, labels):
        assert type(predictions) is type(labels) is np.ndarray
        seen.append((predictions.tolist(), labels.tolist()))
        return float(sum(predictions == labels)) + 0.5

    value, aux = whole(Task(MODEL, found, batch_size=len(ROWS), metric=own, micro_batch=1))
    assert len(seen) == 1
    assert seen[0][1] == found.arrays["label"].tolist()
    assert value == -(7 * np.float32(aux["accuracy"]) + 0.5)


def test_a_metric_of_your_own_on_a_held_out_split():
    rows = [{"prompt": "it was", "completion": " a good film"}, {"prompt": "the", "completion": " end"}] * 2
    texts = data.completion(MODEL, TOKENIZER, rows)
    seen = []

    def own(predictions, right):
        seen.append((list(predictions), list(right)))
        return len(seen) / 4

    task = Task(MODEL, texts, batch_size=2, metric=own)
    found = task.evaluate(PARAMS, texts, size=3)
    assert found["metric"] == 0.25
    assert seen[0][1] == [" a good film", " end"] * 2
    value, _ = whole(dataclasses.replace(task, batch_size=4))
    assert seen[1] == seen[0]
    assert value == -0.5
    assert "metric" not in Task(MODEL, texts, batch_size=2).evaluate(PARAMS)


def test_f1_leaves_out_classes_that_are_nowhere():
    p, t = jnp.array([0, 0, 1], jnp.int32), jnp.array([0, 1, 1], jnp.int32)
    assert float(tasks.f1(p, t, 5)) == pytest.approx(2 / 3)


def test_metric_of_generated_text():
    rows = [{"prompt": "it was", "completion": " a good film"}, {"prompt": "the", "completion": " end"}]
    found = data.completion(MODEL, TOKENIZER, rows)
    seen = []

    def overlap(texts, references):
        seen.append((texts, references))
        return float(np.mean([len(set(a.split()) & set(b.split())) for a, b in zip(texts, references, strict=True)]))

    value, _ = whole(Task(MODEL, found, batch_size=2, metric=overlap))
    expected = []
    for row in rows:  # greedy, one token after the other
        ids = TOKENIZER.encode(row["prompt"])
        for _ in range(4):
            ids.append(int(by_hand(ids)[-1].argmax()))
        ids = ids[1 + len(row["prompt"].split()) :]
        expected.append(TOKENIZER.decode(ids[: ids.index(2)] if 2 in ids else ids))
    assert seen == [(expected, [" a good film", " end"])]
    assert value == -overlap(*seen[0])


def test_batches_are_random_access_and_cover_an_epoch():
    found = data.classification(MODEL, TOKENIZER, ROWS, **POLAR)
    marked = data.Data({**found.arrays, "row": jnp.arange(len(ROWS), dtype=jnp.int32)}, found.answer, found.labels)
    task = Task(MODEL, marked, batch_size=3)
    batch, orders = task.context(KEY), []
    for step in range(6):
        assert equal(batch, task.batch(KEY, jnp.int32(step)))
        assert all(bool((batch.rows[k] == marked.arrays[k][batch.rows["row"]]).all()) for k in batch.rows)
        orders.append(batch.rows["row"].tolist())
        batch = task.update(batch, None)
    epochs = [orders[i] + orders[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({row for epoch in epochs for row in epoch}) == 7  # what is left over differs between epochs


def test_a_batch_is_saved_and_restored(tmp_path):
    task = Task(MODEL, data.classification(MODEL, TOKENIZER, ROWS, **POLAR), batch_size=3)
    later = task.batch(KEY, jnp.int32(7))
    checkpoint.save(tmp_path, later, step=7)
    assert equal(checkpoint.load(tmp_path, task.context(KEY)).tree, later)


def test_a_gradient_learns_the_rows():
    found = data.classification(MODEL, TOKENIZER, ROWS, **POLAR)
    x, merge = trainable.lora(PARAMS, KEY, rank=2, targets=("q", "v", "up", "down"))
    task = Task(MODEL, found, merge, batch_size=7)
    result = minimize(
        task, x, gradient(optax.adam(3e-2)), context=task.context(KEY), update=task.update, generations=60
    )
    before, after = task.evaluate(x, size=4), task.evaluate(result.recommended, size=4)
    assert after["accuracy"] == after["f1"] == 1.0 > before["accuracy"]
    assert after["loss"] < 0.1 < before["loss"]
    assert after["predictions"].tolist() == found.arrays["label"].tolist()  # seven rows, in parts of four


def test_evaluation_counts_every_row_once():
    task = Task(MODEL, data.classification(MODEL, TOKENIZER, ROWS, **POLAR), batch_size=2)
    value, aux = whole(task)
    answers = task.evaluate(PARAMS, size=3)
    assert answers["loss"] == pytest.approx(value, rel=1e-5)
    assert answers["accuracy"] == pytest.approx(aux["accuracy"])


def test_long_texts_are_cut_where_it_hurts_least():
    rows = [{"text": "one two three four five six " * 4 + "end", "label": "+"}] * 2
    with pytest.raises(ValueError, match=r"at most 24 tokens \(the context\)"):
        data.classification(MODEL, TOKENIZER, rows, **POLAR)
    found = data.classification(MODEL, TOKENIZER, rows, **POLAR, truncate=True)
    ids = found.arrays["tokens"][0, 0].tolist()
    assert ids[0] == SPECIAL["bos"]
    assert TOKENIZER.decode(ids).endswith("six end it was")
    assert len(ids) == 24
    found = data.classification(MODEL, TOKENIZER, rows, **POLAR, truncate=True, length=8)
    assert found.length == 8
    found = data.similarity(ENCODER, TOKENIZER, rows, candidates=LABELS, truncate=True, length=8)
    assert TOKENIZER.decode(found.arrays["tokens"][0].tolist()).startswith("one two")
    with pytest.raises(ValueError, match="what must stay"):
        data.completion(MODEL, TOKENIZER, [{"prompt": "a", "completion": rows[0]["text"]}], truncate=True)


# Bad data: three parts, and the row by its number


def refused(expected, made, kind=ValueError):
    with pytest.raises(kind, match=expected) as caught:
        made()
    assert str(caught.value).count("\n") == 2
    assert "usual cause" in str(caught.value)
    return str(caught.value)


def test_bad_files(tmp_path):
    file = tmp_path / "rows.jsonl"
    refused("a file of JSON lines", lambda: data.read(file), FileNotFoundError)
    file.write_text("\n \n")
    refused("at least one row", lambda: data.read(file))
    file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert data.read(file) == ROWS
    file.write_text('{"text": "a"}\n\n{"text": "b}\n')
    refused("in line 3", lambda: data.read(file))
    file.write_text('{"text": "a"}\n["b"]\n')
    assert "a list, not an object" in refused("in line 2", lambda: data.read(file))
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    refused("in line 2", lambda: data.read(file))


def test_bad_rows():
    polar = lambda rows, **options: data.classification(MODEL, TOKENIZER, rows, **{**POLAR, **options})
    refused("at least one row in the data", lambda: polar([]))
    refused(r"a label among \['\+', '-'\]", lambda: polar([*ROWS, {"text": "a", "label": "neutral"}]))
    refused("the field 'label' in row 2", lambda: polar([ROWS[0], {"text": "a"}]))
    refused("the field 'text' in row 2", lambda: polar([ROWS[0], {"texts": "a", "label": "+"}]))
    refused("a list 'candidates' in row 1", lambda: polar(ROWS, candidates=None))
    refused("at least two candidates", lambda: polar(ROWS, candidates={"+": " good"}))
    refused("candidates with at least one token", lambda: polar(ROWS, candidates={"+": " good", "-": ""}))
    refused("a template with fields", lambda: polar(ROWS, prompt="{text"))
    encoder = lambda **options: data.classification(ENCODER, TOKENIZER, ROWS, **{**POLAR, **options})
    refused(r"one \{mask\} in the prompt of row 1", encoder)
    masked = "{text} {mask}"
    refused("candidates of one token", lambda: encoder(prompt=masked, candidates={"+": "very good", "-": "bad"}))
    bare = language.Model(language.config.from_hf(ENCODER.source), {})
    refused("the head of masked language modelling", lambda: data.classification(bare, TOKENIZER, ROWS, **POLAR))
    refused("a completion in row 1", lambda: data.completion(MODEL, TOKENIZER, [{"prompt": "a", "completion": ""}]))
    refused("a decoder", lambda: data.completion(ENCODER, TOKENIZER, ROWS))


def test_bad_tasks():
    found = data.classification(MODEL, TOKENIZER, ROWS, **POLAR)
    refused("a batch_size between 1 and 7", lambda: Task(MODEL, found, batch_size=16))
    refused("a micro_batch that divides", lambda: Task(MODEL, found, batch_size=6, micro_batch=4))
    refused("a metric: loss", lambda: Task(MODEL, found, batch_size=6, metric="acuracy"))


def test_text_is_generated_past_a_full_row_and_ends_where_the_context_does():
    """A long and a short prompt in one array: what is written is what the model writes of each by itself."""
    rows = [
        {"prompt": "it", "completion": " a good film the end . x y"},
        {"prompt": "it was a film good bad great dull fine the end . x y z one two three", "completion": " end"},
    ]  # fmt: skip
    seen = []
    metric = lambda texts, right: seen.append(texts) or 0.0
    found = data.completion(MODEL, TOKENIZER, rows, end=False)
    assert (found.length, found.new_tokens) == (24, 8)
    task = Task(MODEL, found, batch_size=2, metric=metric)
    whole(task)
    task.evaluate(PARAMS)
    expected = []
    for row in rows:
        ids, start = TOKENIZER.encode(row["prompt"]), len(TOKENIZER.encode(row["prompt"]))
        while len(ids) < min(start + 8, MODEL.config.context + 1):  # the last token is written, though never read
            ids.append(int(by_hand(ids)[-1].argmax()))
        ids = ids[start:]
        expected.append(TOKENIZER.decode(ids[: ids.index(2)] if 2 in ids else ids))
    assert seen == [expected, expected]


def test_how_much_is_generated_and_rows_for_the_metric():
    rows = [
        {"prompt": "it was", "completion": " good", "rules": ["x"]},
        {"prompt": "the", "completion": " end", "rules": []},
    ]
    found = data.completion(MODEL, TOKENIZER, rows, max_new_tokens=5)
    seen = []

    def metric(texts, completions, rows):
        seen.append((completions, rows))
        return float(len(rows))

    task = Task(MODEL, found, batch_size=2, metric=metric)
    assert whole(task)[0] == -2
    assert task.evaluate(PARAMS)["metric"] == 2
    assert seen == [([" good", " end"], rows)] * 2
    tokens = found.arrays["tokens"]
    assert tasks.generate(MODEL, PARAMS, tokens, found.arrays["lengths"], steps=found.new_tokens).shape == (2, 5)
    refused("max_new_tokens between 1 and 24", lambda: data.completion(MODEL, TOKENIZER, rows, max_new_tokens=0))


@pytest.mark.parametrize("value", [None, ["a"], {"a": "b"}, 3, 0.5, True])
def test_what_is_no_text_is_refused(value):
    """A null would be trained on as the word "None"."""
    polar = lambda row: data.classification(MODEL, TOKENIZER, [*ROWS, row], **POLAR)
    refused(f"the field 'text' of row {len(ROWS) + 1}", lambda: polar({"text": value, "label": "+"}))
    rows = [{"prompt": "a", "completion": value}]
    refused("the field 'completion' of row 1", lambda: data.completion(MODEL, TOKENIZER, rows))
    own = [{"text": "a", "label": 0, "candidates": ["a", value]}]
    refused("the field 'candidates' of row 1", lambda: data.classification(MODEL, TOKENIZER, own, prompt="{text}"))
    if not isinstance(value, (int, float)):
        refused("the field 'label' of row", lambda: polar({"text": "a", "label": value}))
    taken = data.completion(MODEL, TOKENIZER, [{"prompt": ["x", "it was"], "completion": " a"}], prompt="{prompt[1]}")
    assert len(taken) == 1


def test_members_are_evaluated_one_at_a_time():
    """Trained numbers may be few, activations are not: 256 members x 16 rows took 845 MB of temporaries at once."""
    x, merge = trainable.lora(PARAMS, jax.random.key(1), rank=2)
    found = data.classification(MODEL, TOKENIZER, ROWS, **POLAR)

    def temporaries(popsize, **options):
        task = Task(MODEL, found, merge, batch_size=4, **options)
        problem = Problem(task, eggroll(popsize), jax.random.key(0), update=task.update, batch_size=task.members,
                          keep_best=False)  # fmt: skip
        engine = Compiled(problem)
        carry = engine.start(x, jax.random.key(0), task.context(jax.random.key(2)))
        program = engine.lowered(carry).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(64) < 1.5 * temporaries(2)
    assert temporaries(64, members=64) > 3 * temporaries(64)
    minimized = minimize(Task(MODEL, found, merge, batch_size=4), x, eggroll(4), generations=1, keep_best=False)
    assert minimized.evaluations == 4
