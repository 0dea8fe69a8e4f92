"""The commands `evoopt finetune` and `evoopt replay-trajectory`, and `evoopt resume` of a fine-tuning run."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from evoopt.cli import parts, settings, shared
from evoopt.cli.names import STATUS, TASKS, TRAJECTORY
from evoopt.cli.parts import Base, Parts
from evoopt.types import error

CHOICES = (  # options that are entries of config.json as they are
    "task", "metric", "train", "strategy", "popsize", "budget", "batch_size", "micro_batch", "dtype", "update",
    "schedule", "eval_every", "patience", "seed", "members",
)  # fmt: skip


def finetune(options: argparse.Namespace) -> str:
    """Start a run. Returns why it ended."""
    shared.budget(options.budget)  # a bad budget is an error before anything is loaded
    config = {
        "objective": f"finetune-{Path(options.model).stem}",
        "model": os.path.abspath(options.model),
        "data": os.path.abspath(options.data),
        "eval": None if options.eval is None else os.path.abspath(options.eval),
        "prompt": options.prompt,
        "candidates": dict(settings.pair(text, "--candidate LABEL=TEXT") for text in options.candidate),
        **{name: getattr(options, name) for name in CHOICES},
        "settings": settings.read(options.set),
        "display": "value",
    }
    if shared.is_spread(options):
        config["devices"] = options.devices is not None
    made = parts.build(config)
    if config.get("devices") and config["micro_batch"] is None and (rows := _grid(options, made)[1]) > 1:
        config["micro_batch"] = max(1, config["batch_size"] // rows)
        made = parts.build(config)
    from evoopt.run.folder import Run

    with _evaluator(options, config, made) as evaluator, Run.create(options.runs, options.name, config) as run:
        return _go(run, config, made, evaluator)


def is_finetuning(config: dict[str, Any]) -> bool:
    """Whether a run's configuration is one of `evoopt finetune`."""
    return str(config.get("objective", "")).startswith("finetune-")


def resume(run: Any, config: dict[str, Any], options: argparse.Namespace) -> str:
    """Continue a run. Returns why it ended."""
    shared.checked(config, parts.KINDS, f"{run.path}/config.json")
    metric = config["metric"]
    if options.metric not in (None, metric) or (":" in metric and options.metric is None):
        got = "no --metric" if options.metric is None else f"--metric {options.metric}"
        cause = "a function runs code, and a run folder may be somebody else's; a resumed run keeps its metric"
        raise error(f"--metric {metric}, the metric of this run, once more", got, cause)
    made = parts.build(config)
    with run, _evaluator(options, config, made) as evaluator:
        run.lock()
        return _go(run, config, made, evaluator)


def _evaluator(options: argparse.Namespace, config: dict[str, Any], made: Parts) -> Any:
    if not config.get("devices"):
        return shared.evaluator(options, config.get("members"))
    if shared.is_spread(options) and options.devices is None:
        cause = "a run that was started with --devices continues on devices"
        raise error("--devices, or neither devices nor workers", "workers", cause)
    from evoopt.distributed import ShardedEvaluator

    devices, rows = _grid(options, made)
    return ShardedEvaluator(devices, rows=rows)


def _grid(options: argparse.Namespace, made: Parts) -> tuple[list[Any], int]:
    """The devices, and how many of them share a candidate: as few as keep all of them busy."""
    import jax

    devices = shared.devices(options.devices or "1")
    key = jax.random.key(0)
    n = len(jax.eval_shape(made.strategy.ask, made.strategy.init(made.base.x, key), key))
    return devices, len(devices) // math.gcd(len(devices), n)


def _go(run: Any, config: dict[str, Any], made: Parts, evaluator: Any) -> str:
    """Run, report, and write the model and the trajectory. Returns why it ended."""
    from evoopt import trees
    from evoopt.recipes.finetune import finetune
    from evoopt.run import checkpoint

    base, task = made.base, made.task
    sizes = f"{trees.size(base.x):,} of {trees.size(base.params):,} parameters"
    print(f"{config['objective']} by {config['strategy']}: {sizes}, {len(task.data)} rows; run folder {run.path}")
    numbers = {name: parts.own_number(made.strategy, name) for name in ("sigma", "learning_rate")}
    numbers = ", ".join(f"{name} {float(x):g}" for name, x in numbers.items() if isinstance(x, (int, float)))
    if numbers:
        print(f"{numbers}, for --train {config['train']} (--set changes them)")
    if run.steps():
        print(f"continuing after step {run.steps()[-1]}")
    sys.stdout.flush()
    digest = checkpoint.digest(base.params)
    run.about = {
        **shared.about({name: value for name, value in config.items() if name not in ("model", "data", "eval")}),
        "base model": digest,
        **{name: _file_digest(config[name]) for name in ("data", "eval")},
    }
    if made.held_out is not None and not run.steps():
        print("evaluating the held-out rows: compiling ...", file=sys.stderr, flush=True)
    tuned = finetune(
        task, base.x, made.strategy, key=config["seed"], held_out=made.held_out, every=config["eval_every"],
        score=made.score, patience=config["patience"], run=run, progress=True, label=config["objective"],
        settings={**config, "base": digest}, evaluator=evaluator,
        batch_size=config.get("members"), **shared.budget(config["budget"]),
    )  # fmt: skip
    reason = tuned.result.reason
    _report(run, tuned, evaluator)
    if reason == "terminated":
        return reason  # whoever sent SIGTERM does not wait for long
    _write_results(run, base, tuned)
    if tuned.diverged:
        known = "the best weights known are written" if tuned.evaluations else "its weights may be ruined"
        cause = "a learning rate or sigma that is too high; smaller steps: --set learning_rate=..."
        ended = error(f"a loss that falls, in run folder {run.path}", f"{tuned.diverged}; {known}", cause)
        print(f"evoopt: diverged: {ended}", file=sys.stderr, flush=True)
        raise SystemExit(1)
    return reason


def _report(run: Any, tuned: Any, evaluator: Any) -> None:
    """Say how a run went. After SIGTERM, only what is known at once."""
    result = tuned.result
    print(f"{result.generations} steps, {result.evaluations} forward passes of a batch, {result.seconds:.1f} s")
    if evaluator is not None:
        print(f"evaluated by {evaluator.status()}")
    if result.reason in STATUS:
        print(f"`evoopt resume {run.path}` continues it", flush=True)
    if result.reason == "terminated":
        return
    if tuned.skipped:
        print(f"{tuned.skipped} steps had no finite loss and were skipped")
    if result.reason == "callback":
        print("stopped early; the last good weights are kept")
    if tuned.evaluations:
        best = next(row for row in tuned.evaluations if row["generation"] == tuned.generation)
        for word, row in (("before", tuned.evaluations[0]), (f"after {tuned.generation} steps", best)):
            print(f"held-out, {word}: {_shown(row)}")


def _shown(row: dict[str, Any]) -> str:
    shares = [f"{name} {100 * row[name]:.1f}%" for name in ("accuracy", "f1") if name in row]
    shares += [f"metric {row['metric']:.4g}"] if "metric" in row else []
    return "  ".join([*shares, f"loss {row['loss']:.4f}" if math.isfinite(row["loss"]) else "loss not finite"])


def _file_digest(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_results(run: Any, base: Base, tuned: Any) -> None:
    """Write model, trajectory and curves into the run folder."""
    from evoopt.run import trajectory

    write(run.path / "model", base, tuned.params)
    print(f"model: {run.path / 'model'}")
    if tuned.trajectory is not None:
        path = trajectory.write(run.path / TRAJECTORY, tuned.trajectory)
        print(f"trajectory: {path} ({path.stat().st_size:,} bytes)")
    shared.draw_curves(run)


def write(path: Path, base: Base, x: Any) -> None:
    """Write the model as a Hugging Face folder, replacing an earlier one. A prefix goes into a subfolder, as for PEFT.

    base: the model and its `merge`.
    x: the trained part.
    """
    import shutil

    from evoopt.envs import language

    shutil.rmtree(path, ignore_errors=True)
    params = base.merge(x)
    prefix = params.pop("prefix", None) if "prefix" in params else None
    language.save(path, base.model, params, base.tokenizer)
    if prefix is not None:  # a Hugging Face folder has no place for it
        language.save_prefix(path / "prefix", base.model, prefix, str(path.resolve()))


def replay_trajectory(options: argparse.Namespace) -> None:
    """Rebuild the weights of a fine-tuning run from its trajectory and the base model."""
    from evoopt.envs import language
    from evoopt.run import checkpoint, trajectory

    if Path(options.out).exists():
        raise error(f"no '{options.out}' yet", "it exists", "rebuilt before; choose another name", FileExistsError)
    found = trajectory.read(options.trajectory)
    config = {**found.settings, "model": os.path.abspath(options.base)}
    shared.checked(config, parts.KINDS | {"base": (str,)}, options.trajectory)
    shared.one_of("a task", config["task"], TASKS)
    chosen = parts.choose(config, getattr(language.data, config["task"]))
    base = parts.load(config, chosen)
    if (digest := checkpoint.digest(base.params)) != config["base"]:
        cause = "another model or revision, or one that was fine-tuned since"
        expected = f"the base model of the trajectory, sha256 {config['base'][:16]}"
        raise error(expected, f"sha256 {digest[:16]} in '{options.base}'", cause)
    strategy = parts.make_strategy(config, parts.starting(config, chosen["strategy"]))
    x = trajectory.replay(found, strategy, base.x, other_versions=options.any_version)
    write(Path(options.out), base, x)
    print(f"{len(found.values)} steps replayed from {Path(options.trajectory).stat().st_size:,} bytes: {options.out}")
    print(json.dumps({"sha256": trajectory.digest(x)}))
