"""A session's checkpoints: its state, the candidates that are out, and what was told so far."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.run import checkpoint
from evoopt.run.desk import Desk
from evoopt.run.identity import describe, differences
from evoopt.run.offset import Offset
from evoopt.types import Params, error


def save(session: Any, folder: str | Path) -> None:
    """Write a checkpoint of `session` into `folder`."""
    newest = checkpoint.latest(folder)
    if newest is not None and newest > session.number:
        raise error(
            f"a folder of this search, which is at generation {session.number}",
            f"a checkpoint of generation {newest} in '{folder}'",
            "the folder of an earlier search; `load` would find that search",
        )
    rows, desk = session._desk.saved()
    best = session._best_point()
    kept = [*rows, *([] if best is None else [best])]
    meta = {
        "offset": session.offset.value, "strategy": describe(session.strategy), "desk": desk, "points": len(kept),
        "best": None if best is None else [session.best_value, session._total, session._violation],
        "evaluations": session.evaluations,
        "history": session.history, "seconds": time.time() - session._begun, "watched": session.watch is not None,
    }  # fmt: skip
    checkpoint.save(folder, _tree(session, kept), step=session.number, meta=meta)


def load(session: Any, folder: str | Path) -> Any:
    """`session`, which has just begun, as its newest checkpoint in `folder`."""

    def check(meta: dict[str, Any]) -> Any:
        if differ := differences(meta.get("strategy"), describe(session.strategy)):
            cause = "another popsize, step-size, or space than before"
            raise error("the strategy that was saved", "; ".join(differ), cause)
        blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), session._like())
        like = _tree(session, [blank] * int(meta.get("points", 0)))
        return {**like, "watch": session._watching() if meta.get("watched") else None}

    found = checkpoint.load(folder, {}, check=check)
    meta, n = found.meta, int(found.meta.get("points", 0))
    state, key, watch = (jax.tree.map(jnp.asarray, found.tree[name]) for name in ("state", "key", "watch"))
    rows = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), found.tree["points"]) for i in range(n)]
    session.state, session.key, session.number = state, key, found.step
    session.offset = Offset(float(meta.get("offset", 0.0)))
    if session.watch is not None and watch is not None:
        session.watch = watch
    if meta.get("best") is not None:
        (session.best_value, session._total, session._violation), session._best = meta["best"], rows.pop()
    if "desk" in meta:
        session._desk = Desk.loaded(rows, meta["desk"])
    session.evaluations, session.history = int(meta.get("evaluations", 0)), list(meta.get("history", []))
    session._begun = time.time() - float(meta.get("seconds", 0.0))
    session._bind()
    return session


def _tree(session: Any, rows: list[Params]) -> dict[str, Any]:
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows) if rows else None
    return {"state": session.state, "key": session.key, "watch": session.watch, "points": stacked}
