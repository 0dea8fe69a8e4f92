"""What a model answers to rows of arrays: losses and predictions. The other half of `data`, which makes the arrays.

Every function takes (model, params, rows, shared) and returns the dict of arrays that `data.Data` describes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.envs.language.model import Model
from evoopt.types import Array, Params


def completed(model: Model, params: Params, rows: dict, shared: dict) -> dict[str, Array]:
    """The log-likelihood of a completion after its prompt."""
    del shared
    states = model.hidden(params, rows["tokens"], _mask(rows))
    states = jnp.take_along_axis(
        states, rows["places"][..., None], axis=1
    )  # the head is only applied to what is scored
    logits = model.logits(params, states)
    scored = jnp.arange(logits.shape[1], dtype=jnp.int32) < rows["scored"][:, None]
    loss = jnp.where(scored, -_log_likelihood(logits, rows["targets"][..., None])[..., 0], 0).sum(1)
    right = (jnp.argmax(logits, -1).astype(jnp.int32) == rows["targets"]) | ~scored
    prediction = right.all(1).astype(jnp.int32)
    weight = rows["scored"].astype(jnp.float32)
    return {"loss": loss, "weight": weight, "prediction": prediction, "label": jnp.ones_like(prediction)}


def averaged(model: Model, params: Params, rows: dict, shared: dict) -> dict[str, Array]:
    """The candidates compared by the mean log-likelihood of their tokens."""
    del shared
    scores = _candidate_scores(model, params, rows) / jnp.maximum(rows["scored"], 1).astype(jnp.float32)
    return _chosen(scores, rows)


def summed(model: Model, params: Params, rows: dict, shared: dict) -> dict[str, Array]:
    """The candidates compared by the summed log-likelihood of their tokens."""
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


def similar(model: Model, params: Params, rows: dict, shared: dict) -> dict[str, Array]:
    """The candidates compared by the cosine of their embeddings with that of the text."""
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
