"""A model and data as an objective: `task(x, batch) -> WithAux(value, aux)`, with batches that any step can draw again.

>>> import tokenizers
>>> from evoopt.envs import language
>>> from evoopt.run.minimize import minimize
>>> from evoopt.strategies import spsa
>>> words = {word: i for i, word in enumerate("[BOS] a b good bad".split())}
>>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[BOS]"))
>>> backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
>>> tokenizer, model = language.Tokenizer(backend, {"bos": 0}), language.tiny()
>>> rows = [{"text": "a a b", "label": "+"}, {"text": "b a", "label": "-"}]
>>> answers = {"+": " good", "-": " bad"}
>>> data = language.data.classification(model, tokenizer, rows, prompt="{text}", candidates=answers)
>>> x, merge = language.trainable.lora(model.init(jax.random.key(0), scale=0.3), jax.random.key(1), rank=2)
>>> task = Task(model, data, merge, batch_size=2)
>>> search = spsa(sigma=1e-2, learning_rate=0.3)
>>> found = minimize(task, x, search, context=task.context(jax.random.key(2)), update=task.update, generations=200)
>>> found.history[-1]["mean"] < found.history[0]["mean"]
True
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from evoopt.answers import WithAux
from evoopt.envs.language.data import Data
from evoopt.envs.language.model import Model
from evoopt.noise import fold_in
from evoopt.population import looped
from evoopt.types import Array, Key, Params, error, pytree

Metric = Callable[[Any, Any], float]


@pytree
class Batch:
    """The rows of one step. What a run needs to draw all later ones is `key` and `step`."""

    key: Key
    step: Array  # (), int32
    rows: dict[str, Array]  # leading axis batch_size


def accuracy(prediction: Array, label: Array) -> Array:
    """The share of rows whose prediction is the label: ()."""
    return jnp.mean((prediction == label).astype(jnp.float32))


def f1(prediction: Array, label: Array, classes: int) -> Array:
    """The mean over the classes of F1 = 2 tp / (2 tp + fp + fn), classes that are nowhere left out: ()."""
    one = jnp.arange(classes, dtype=jnp.int32)[:, None]
    p, t = prediction[None] == one, label[None] == one
    both, either = (p & t).sum(1).astype(jnp.float32), (p.sum(1) + t.sum(1)).astype(jnp.float32)
    scores = 2 * both / jnp.maximum(either, 1)
    return scores.sum() / jnp.maximum((either > 0).sum(), 1).astype(jnp.float32)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The objective of `data` for `model`: `task(x, batch) -> WithAux(value, aux)`, a float32 and a dict of them.

    aux has `loss` and `accuracy` of the batch, whatever the value is.

    model, data: from `language.load`, `data.classification` and its siblings.
    merge: trainable tree -> parameters, from `trainable`; None where all parameters are searched.
    batch_size: rows of a step, drawn without repetition within an epoch.
    micro_batch: rows that are in the model at once, a divisor of `batch_size`; None for all. The rows' losses are
        summed in float32 after the last of them. A gradient through several micro-batches has the memory of one.
    metric: what is minimised: "loss"; or minus "accuracy", minus "f1" (macro), or minus your own
        `metric(predictions, labels) -> float`, any Python. It gets NumPy arrays of label numbers (n,); for `completion`
        data lists of texts: what the model generates greedily (see `data.completion(max_new_tokens=)`), and the
        completions.
        One with an argument `rows` is also given the rows of the file: `metric(texts, completions, rows=[...])`.
    members: candidates that `minimize` evaluates at once where its `batch_size` does not say. A candidate may be small
        (LoRA, a prefix), but every one takes the activations of `micro_batch` rows.
    rows_over: the axis of a mesh of devices that share a batch, each with as many of its micro-batches, inside
        `ShardedEvaluator(rows=...)`, whose axis is "rows". Their answers are gathered before they are summed: the same
        bits on any number of devices. Not for gradients.

    In `minimize(task, x, strategy, context=task.context(key), update=task.update, ...)` the batch is the context, and
    every candidate of a generation sees the same one.

    Raises:
        ValueError: a batch larger than the data, a micro-batch that does not divide it, an unknown metric.
    """

    model: Model
    data: Data
    merge: Callable[[Params], Params] | None = None
    _: dataclasses.KW_ONLY
    batch_size: int = 16
    micro_batch: int | None = None
    metric: str | Metric = "loss"
    rows_over: str | None = None
    members: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.data):
            cause = "a small file; a batch has no row twice"
            raise error(f"a batch_size between 1 and {len(self.data)}, the rows", str(self.batch_size), cause)
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            cause = "micro-batches have one size, so that a run compiles once"
            got = f"micro_batch={self.micro_batch}, batch_size={self.batch_size}"
            raise error("a micro_batch that divides the batch_size", got, cause)
        if not callable(self.metric) and self.metric not in ("loss", "accuracy", "f1"):
            raise error("a metric: loss, accuracy, f1, or a function", repr(self.metric), "a misspelt name")
        if self.metric == "f1" and not self.data.labels:
            cause = "text, or rows with candidates of their own; pass a function instead"
            raise error("data with the same labels in all rows, for f1", "none", cause)
        if self.merge is not None and not isinstance(self.merge, Partial):  # a bare function is no pytree
            object.__setattr__(self, "merge", Partial(self.merge))

    def context(self, key: Key) -> Batch:
        """The batch of the first step; `key` shuffles the rows."""
        return self.batch(key, jnp.zeros((), jnp.int32))

    def update(self, batch: Batch, aux: Any) -> Batch:
        """The batch of the next step, whatever the answers were."""
        del aux
        return self.batch(batch.key, batch.step + 1)

    def batch(self, key: Key, step: Array) -> Batch:
        """The batch of any step: a step needs no other to be drawn.

        Every epoch is shuffled by its own key; what is left over at its end, less than a batch, is not seen in it.
        """
        n, per_epoch = len(self.data), len(self.data) // self.batch_size
        epoch, place = step // per_epoch, (step % per_epoch) * self.batch_size
        order = jax.random.permutation(fold_in(key, epoch), n)
        chosen = jax.lax.dynamic_slice(order, (place,), (self.batch_size,))
        return Batch(key, step, {name: x[chosen] for name, x in self.data.arrays.items()})

    def __call__(self, x: Params, batch: Batch) -> WithAux:
        """The value, loss and accuracy of one candidate on one batch."""
        answers = self._answers(x, batch.rows, self.micro_batch)
        loss = answers["loss"].sum() / answers["weight"].sum()
        aux = {"loss": loss, "accuracy": accuracy(answers["prediction"], answers["label"])}
        return WithAux(self._value(x, batch.rows, answers, aux), aux)

    def _value(self, x: Params, rows: dict, answers: dict, aux: dict) -> Array:
        if self.metric == "loss":
            return aux["loss"]
        if self.metric == "accuracy":
            return -aux["accuracy"]
        if self.metric == "f1":
            return -f1(answers["prediction"], answers["label"], len(self.data.labels))
        if self.data.texts:
            given = (self._generated(x, rows), rows["row"])
        else:
            given = (answers["prediction"], answers["label"])
        call = lambda *args: np.float32(self._own(*args))
        return -jax.pure_callback(call, jax.ShapeDtypeStruct((), jnp.float32), *given, vmap_method="sequential")

    def _own(self, found: Any, right: Any) -> float:
        """The task's own metric of predictions and labels, or of generated ids (n, steps) and numbers of rows (n,)."""
        own: Any = self.metric
        if self.data.texts:
            places = np.asarray(right).tolist()
            more = {"rows": [self.data.rows[i] for i in places]} if _takes_rows(own) else {}
            return own(_texts(self.data, np.asarray(found)), [self.data.texts[i] for i in places], **more)
        return own(np.asarray(found), np.asarray(right))

    def _answers(self, x: Params, rows: dict, size: int | None) -> dict[str, Array]:
        """What `data.answer` says of all rows, `size` at a time."""
        params = x if self.merge is None else self.merge(x)
        n = len(jax.tree.leaves(rows)[0])
        size = n if size is None else size
        if self.rows_over is None and size == n:
            return self.data.answer(self.model, params, rows, self.data.shared)
        # Checkpointed: a gradient keeps the rows of a micro-batch and computes the rest again.
        one = jax.checkpoint(lambda p, part: self.data.answer(self.model, p, part, self.data.shared))
        parts = jax.tree.map(lambda y: y.reshape(n // size, size, *y.shape[1:]), rows)
        if self.rows_over is None:
            answers = jax.lax.map(lambda part: one(params, part), parts)
        else:
            answers = self._shared(lambda part: one(params, part), parts, n // size)
        return jax.tree.map(lambda y: y.reshape(n, *y.shape[2:]), answers)

    def _shared(self, one: Callable[[Any], Any], parts: dict, count: int) -> dict[str, Array]:
        """`one` of every micro-batch, each on one of the devices of `rows_over`."""
        assert self.rows_over is not None
        devices = jax.lax.axis_size(self.rows_over)
        if count % devices:
            got = f"{count}, of {self.batch_size} rows with micro_batch={self.micro_batch}"
            cause = "a micro_batch that is not a divisor of batch_size / rows"
            raise error(f"micro-batches for each of {devices} devices that share a batch", got, cause)
        share = count // devices
        first = jax.lax.axis_index(self.rows_over) * share
        mine = jax.tree.map(lambda y: jax.lax.dynamic_slice_in_dim(y, first, share), parts)
        return jax.lax.all_gather(looped(one, mine), self.rows_over, tiled=True)

    def _generated(self, x: Params, rows: dict) -> Array:
        return _continued(self.model, self.data.new_tokens, _end(self.data), self.merge, x, rows)

    def evaluate(self, x: Params, data: Data | None = None, *, size: int | None = None) -> dict[str, Any]:
        """`loss`, `accuracy` and (with labels) `f1` over all rows of `data`, by default the task's own, as floats.

        A metric of your own is called once with all rows: `metric`. `predictions` (n,) are in the dict too.
        size: rows at once; None for micro_batch or batch_size.
        """
        task = self if data is None else dataclasses.replace(self, data=data, batch_size=1, micro_batch=None,
                                                             metric="loss", rows_over=None)  # fmt: skip
        size = min(size or self.micro_batch or self.batch_size, len(task.data))
        parts, generated = [], []
        texts = callable(self.metric) and task.data.texts
        for start in range(0, len(task.data), size):
            place = np.minimum(np.arange(start, start + size), len(task.data) - 1)  # the last one is filled up
            rows = {name: y[place] for name, y in task.data.arrays.items()}
            answers = jax.device_get(_jit_answers(self.model, task.data.answer, self.merge, x, rows, task.data.shared))
            parts.append(jax.tree.map(lambda y, start=start: y[: len(task.data) - start], answers))
            if texts:
                ids = jax.device_get(
                    _jit_generated(self.model, task.data.new_tokens, _end(task.data), self.merge, x, rows)
                )
                generated.append(ids[: len(task.data) - start])
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        found = {
            "loss": float(whole["loss"].sum(dtype=np.float64) / whole["weight"].sum(dtype=np.float64)),
            "accuracy": float(np.mean(whole["prediction"] == whole["label"])),
            "predictions": whole["prediction"],
        }
        if callable(self.metric):
            own = dataclasses.replace(task, metric=self.metric)
            pair = (whole["prediction"], whole["label"])
            if texts:
                pair = (np.concatenate(generated), task.data.arrays["row"])
            found["metric"] = float(own._own(*pair))
        if task.data.labels:
            found["f1"] = float(
                f1(jnp.asarray(whole["prediction"]), jnp.asarray(whole["label"]), len(task.data.labels))
            )
        return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jit_answers(model: Model, answer: Any, merge: Any, x: Params, rows: dict, shared: dict) -> dict[str, Array]:
    return answer(model, x if merge is None else merge(x), rows, shared)


def _takes_rows(metric: Callable) -> bool:
    try:
        return "rows" in inspect.signature(metric).parameters
    except (TypeError, ValueError):  # a built-in function without a signature
        return False


def _end(data: Data) -> int:
    return -1 if data.tokenizer is None else data.tokenizer.special.get("eos", -1)


def _continued(model: Model, steps: int, end: int, merge: Any, x: Params, rows: dict) -> Array:
    params = x if merge is None else merge(x)
    return generate(model, params, rows["tokens"], rows["places"][:, 0] + 1, steps=steps, end=end)


_jit_generated = jax.jit(_continued, static_argnums=(0, 1, 2))


def generate(model: Model, params: Params, tokens: Array, lengths: Array, *, steps: int, end: int = -1) -> Array:
    """Greedy continuations (b, steps) of `tokens` (b, t) up to `lengths` (b,), as ids.

    Without a cache: every step reads the whole text again, so that it works with any parameters, virtual ones too, at
    the cost of `steps` forward passes. `end` is written where the model's context has no room left.

    >>> import jax
    >>> from evoopt.envs.language.model import tiny
    >>> model = tiny()
    >>> ids = generate(model, model.init(jax.random.key(0)), jnp.ones((1, 8), jnp.int32), jnp.array([3]), steps=4)
    >>> ids.shape
    (1, 4)
    """
    (b, t), prefix = tokens.shape, params.get("prefix")
    room = model.config.context - (0 if prefix is None else prefix["k"].shape[1])
    tokens = jnp.pad(tokens, ((0, 0), (0, max(0, min(t + steps, room) - t))))
    t = tokens.shape[1]
    row = jnp.arange(b, dtype=jnp.int32)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        tokens, written = carry
        read = jnp.minimum(lengths + i, t)
        states = model.hidden(params, tokens, jnp.arange(t, dtype=jnp.int32) < read[:, None])
        new = jnp.argmax(model.logits(params, states[row, read - 1]), -1).astype(tokens.dtype)
        new = jnp.where(lengths + i > t, jnp.asarray(end, tokens.dtype), new)  # the one before could not be read
        return tokens.at[row, read].set(new, mode="drop"), written.at[:, i].set(new)

    return jax.lax.fori_loop(0, steps, step, (tokens, jnp.zeros((b, steps), tokens.dtype)))[1]


def _texts(data: Data, ids: np.ndarray) -> list[str]:
    """Generated ids as texts, each up to its end."""
    assert data.tokenizer is not None
    end = _end(data)
    rows: list[Sequence[int]] = [row[: row.index(end)] if end in row else row for row in ids.tolist()]
    return [data.tokenizer.decode(row) for row in rows]
