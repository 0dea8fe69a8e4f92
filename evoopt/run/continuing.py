"""A run folder that has checkpoints: where the run goes on, and whether it is the same run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evoopt import stopping, trees
from evoopt.reading import field, short
from evoopt.run import identity
from evoopt.run.checkpoint import versions
from evoopt.run.problem import Carry, begun
from evoopt.types import Key, Objective, Params, error


def restore(run: Any, f: Objective, x0: Params, strategy: Any, *, context: Any = None) -> Carry:
    """The carry of a run's newest checkpoint, for inspection; the run folder is only read."""
    _begun_with(run)
    changes = callable(getattr(f, "update", None))

    def start(key: Key) -> Carry:
        state = trees.strong(strategy.init(x0, key))
        watch = stopping.watching(strategy, state, len(strategy.ask(state, key)))
        made = begun(strategy, state, context, jnp.asarray(jnp.inf, jnp.float32), keep_best=True, changes=changes)
        return made._replace(watch=watch)

    like = jax.eval_shape(start, jax.random.key(0))
    return run.load(like, check=lambda meta: None if meta.get("watched") else like._replace(watch=None)).tree


def continued(
    run: Any, carry: Carry, what: dict[str, Any], watching: Callable[[Any], Any]
) -> tuple[Carry, list[dict[str, Any]], dict[str, Any]]:
    """The carry and history at a run folder's last checkpoint, and the meta saved with it.

    A run may go on with another `stop`: `watching(state)` is the watch that begins or was saved, whichever is missing.
    """
    if not run.steps():
        run.truncate(0)  # killed before its first checkpoint, so it starts over
        return carry, [], {}

    def check(meta: dict[str, Any]) -> Carry:
        _check_meta(run, meta)
        _same_run(run, meta.get("identity"), what)
        return carry._replace(watch=watching(carry.state) if meta.get("watched") else None)

    saved = run.load(carry, check=check)
    run.truncate(saved.step)
    history = run.metrics()
    if len(history) != saved.step:
        warnings.warn(
            f"'{run.path}/metrics.jsonl' has {len(history)} of the {saved.step} rows up to the checkpoint: it was lost "
            "or cut. The totals go on from the checkpoint; the missing rows stay missing.",
            stacklevel=3,
        )
    # Copied, because the loop donates its carry, and NumPy memory is not JAX's to reuse.
    copy = lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x
    found = jax.tree.map(copy, saved.tree)
    watch = found.watch if found.watch is not None else watching(found.state)
    return found._replace(watch=None if carry.watch is None else watch), history, saved.meta


def _check_meta(run: Any, meta: dict[str, Any]) -> None:
    """Check that a checkpoint's meta is what `minimize` writes, which a valid checksum does not show."""
    try:
        field(meta, "seconds", float, default=0.0)
        field(meta, "offset", float, default=0.0)
        field(meta, "watched", bool, default=False)
        field(meta, "identity", dict, None, default=None)
        totals = field(meta, "totals", dict, default={})
        for name in totals:
            if not 0 <= field(totals, name, int, float) < 2**63:
                raise ValueError(f'"{name}" is {short(totals[name])}, no count')
    except ValueError as reason:
        cause = "a run folder that something other than `minimize` wrote"
        raise error(f"totals and seconds in the checkpoint of '{run.path}'", str(reason), cause) from reason


def _begun_with(run: Any) -> None:
    """Warn if config.json records other versions than these."""
    now = versions()
    names = [name for name in ("evoopt", "jax") if name in run.versions]
    differ = identity.differences({n: run.versions[n] for n in names}, {n: now[n] for n in names})
    if differ:
        warnings.warn(f"'{run.path}' was begun with other versions: {'; '.join(differ)}", stacklevel=5)


def _same_run(run: Any, then: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raise, or warn if forced, when a run folder is continued as another run."""
    if then is None:  # written by an earlier version
        then, now = {"versions": run.versions}, {"versions": {k: now["versions"].get(k) for k in run.versions}}
    else:
        _begun_with(run)
    differ = [line if len(line) <= 200 else f"{line[:197]}..." for line in identity.differences(then, now)]
    differ = differ if len(differ) <= 10 else [*differ[:10], f"{len(differ) - 10} more"]
    minor = [line for line in differ if line.startswith(("versions.python", "versions.numpy"))]
    major = [line for line in differ if line not in minor]
    if minor or (major and getattr(run, "force", False)):
        warnings.warn(f"'{run.path}' continues, but not as it was: {'; '.join(major + minor)}", stacklevel=4)
    if major and not getattr(run, "force", False):
        raise error(
            f"the run of '{run.path}' as it was started, so that it continues bit for bit",
            "; ".join(major),
            "another key, strategy, setting, version or machine; Run.open(path, force=True), or "
            "`evoopt resume --force`, continues anyway",
        )
