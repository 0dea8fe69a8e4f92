"""The commands `evoopt finetune` and `evoopt replay-trajectory`: strings to a task, a strategy and a run."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evoopt.cli import main as cli
from evoopt.types import error

TASKS = ("completion", "classification", "similarity")
TRAINED = ("full", "bitfit", "lora", "prefix")
METRICS = ("loss", "accuracy", "f1")
SCHEDULES = ("constant", "linear", "cosine")
UPDATES = ("stochastic", "masters", "nearest")
TRAJECTORY = "model.trajectory"
# MeZO's numbers for a part of a model (Malladi et al. 2023, appendix D), for strategies that begin with its numbers for
# the whole: by how much sigma and the rate are larger. No paper has them for biases, which take the whole's.
LARGER = {"lora": (10.0, 100.0), "prefix": (100.0, 10_000.0)}
WHOLE = 1e-3  # sigma of these strategies for all parameters
# Other programs' names of settings.
THEIRS = {"lr": "learning_rate", "step_size": "learning_rate", "zo_eps": "sigma", "eps": "sigma", "epsilon": "sigma",
          "lora_r": "rank", "r": "rank", "lora_alpha": "alpha", "num_prefix": "length", "max_length": "length",
          "target_modules": "targets"}  # fmt: skip
# What config.json says of a fine-tuning, see `cli.KINDS`.
KINDS: dict[str, tuple[type | None, ...]] = {
    "objective": (str,), "model": (str,), "data": (str,), "eval": (str, None), "task": (str,), "prompt": (str, None),
    "candidates": (dict,), "metric": (str,), "train": (str,), "strategy": (str,), "popsize": (int, None),
    "budget": (str,), "batch_size": (int,), "micro_batch": (int, None), "dtype": (str,), "update": (str,),
    "schedule": (str,), "eval_every": (int,), "patience": (int,), "seed": (int,), "settings": (dict,),
    "display": (str,),
}  # fmt: skip


def add_commands(commands: Any) -> None:
    """Add both to the command line's subparsers."""
    tune = commands.add_parser("finetune", help="fine-tune a language model without backpropagation")
    tune.add_argument("--model", required=True, help="a Hugging Face folder, or a GGUF file")
    tune.add_argument("--data", required=True, help="the rows to train on, a JSON object a line")
    tune.add_argument("--eval", help="held-out rows; the best parameters on them are kept")
    tune.add_argument("--task", default="completion", help=f"{', '.join(TASKS)} (default: %(default)s)")
    tune.add_argument("--prompt", help='a template of the row\'s fields, as in "{text} It was"')
    tune.add_argument(
        "--candidate", action="append", default=[], metavar="LABEL=TEXT",
        help='what stands for a label, once for each, as in "1= great"',
    )  # fmt: skip
    tune.add_argument(
        "--metric", default="loss", help=f"{', '.join(METRICS)}, or MODULE:FUNCTION of (predictions, labels) -> score"
    )
    tune.add_argument("--train", default="full", help=f"{', '.join(TRAINED)} (default: %(default)s)")
    tune.add_argument("--strategy", default="mezo", help="see `evoopt list strategies`; optax:NAME for backpropagation")
    tune.add_argument("--popsize", type=int, help="forward passes a step; by default the strategy's own")
    tune.add_argument("--budget", default="1000", help="1000 (steps), 2000e (forward passes), 90s, 10m or 2h")
    tune.add_argument("--batch-size", type=int, default=16, help="rows a step (default: %(default)s)")
    tune.add_argument("--micro-batch", type=int, help="rows in the model at once; all by default")
    tune.add_argument(
        "--members", type=int, default=1,
        help="candidates evaluated at once: faster for many small ones, in as many times the memory (%(default)s)",
    )  # fmt: skip
    tune.add_argument("--dtype", default="float32", help="of the weights: float32 or bfloat16 (default: %(default)s)")
    tune.add_argument(
        "--update", default="stochastic", help=f"of half-precision weights: {', '.join(UPDATES)} (default: %(default)s)"
    )
    tune.add_argument("--schedule", default="constant", help=f"of the learning rate: {', '.join(SCHEDULES)}")
    tune.add_argument("--eval-every", type=int, default=100, help="steps between evaluations (default: %(default)s)")
    tune.add_argument(
        "--patience", type=int, default=20, help="steps in a row without a finite loss that end the run (%(default)s)"
    )
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument("--name", help="the run folder's name; made from the settings by default")
    tune.add_argument("--runs", default="runs", help="where run folders are (default: %(default)s)")
    tune.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the strategy, the task's data or what is trained, as in learning_rate=1e-6, rank=4",
    )  # fmt: skip
    cli._add_workers(tune)
    tune.set_defaults(command=_finetune)

    again = commands.add_parser("replay-trajectory", help="rebuild fine-tuned weights from the base model, bit for bit")
    again.add_argument("trajectory", help=f"a file that a fine-tuning wrote, RUN/{TRAJECTORY}")
    again.add_argument("--base", required=True, help="the model that was fine-tuned")
    again.add_argument("--out", required=True, help="the folder to write")
    again.add_argument("--any-version", action="store_true", help="try with another version of jax than recorded it")
    again.set_defaults(command=_replay)


def _finetune(options: argparse.Namespace) -> str:
    cli.budget(options.budget)
    here = lambda path: None if path is None else os.path.abspath(path)
    config = {
        "objective": f"finetune-{Path(options.model).stem}",
        "model": here(options.model),
        "data": here(options.data),
        "eval": here(options.eval),
        "prompt": options.prompt,
        "candidates": dict(_candidate(text) for text in options.candidate),
        **{name: getattr(options, name) for name in (
            "task", "metric", "train", "strategy", "popsize", "budget", "batch_size", "micro_batch", "dtype", "update",
            "schedule", "eval_every", "patience", "seed",
        )},
        "settings": dict(cli._setting(text) for text in options.set),
        "display": "value",
    }  # fmt: skip
    config["members"] = options.members  # candidates evaluated at once, by each worker if there are some
    if cli._is_spread(options):
        config["devices"] = options.devices is not None
    parts = build(config)
    if config.get("devices") and config["micro_batch"] is None and (rows := _grid(options, parts)[1]) > 1:
        config["micro_batch"] = max(1, config["batch_size"] // rows)
        parts = build(config)
    from evoopt.run.folder import Run

    with _evaluator(options, config, parts) as evaluator, Run.create(options.runs, options.name, config) as run:
        return go(run, config, parts, evaluator)


def _evaluator(options: argparse.Namespace, config: dict[str, Any], parts: Parts) -> Any:
    if not config.get("devices"):
        return cli._evaluator(options, {"micro_batch": config["members"]} if "members" in config else {})
    if cli._is_spread(options) and options.devices is None:
        raise error("--devices, or neither", "workers", "a run that was begun with --devices continues with them")
    from evoopt.distributed import ShardedEvaluator

    devices, rows = _grid(options, parts)
    return ShardedEvaluator(devices, rows=rows)


def _grid(options: argparse.Namespace, parts: Parts) -> tuple[list[Any], int]:
    """The devices, and how many of them share a candidate: as few as keep all of them busy."""
    import jax

    devices = cli._devices(options.devices or "1")
    key = jax.random.key(0)
    n = len(jax.eval_shape(parts.strategy.ask, parts.strategy.init(parts.base.x, key), key))
    return devices, len(devices) // math.gcd(len(devices), n)


def is_finetuning(config: dict[str, Any]) -> bool:
    """Whether a run's configuration is one of `evoopt finetune`."""
    return str(config.get("objective", "")).startswith("finetune-")


def resume(run: Any, config: dict[str, Any], options: argparse.Namespace) -> str:
    """Continue a run of `evoopt finetune`."""
    metric = config["metric"]
    if options.metric not in (None, metric) or (":" in metric and options.metric is None):
        got = "no --metric" if options.metric is None else f"--metric {options.metric}"
        cause = "a function runs code, and a run folder may be somebody else's; a resumed run keeps its metric"
        raise error(f"--metric {metric}, the metric of this run, said again", got, cause)
    parts = build(config)
    with run, _evaluator(options, config, parts) as evaluator:
        run.lock()
        return go(run, config, parts, evaluator)


@dataclasses.dataclass(frozen=True)
class Base:
    """A model with what is trained of it."""

    model: Any
    params: Any
    tokenizer: Any
    x: Any
    merge: Any
    seen: Any  # x in the dtypes that the model sees


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that a configuration stands for."""

    base: Base
    task: Any
    held_out: Any
    strategy: Any
    score: Callable[[dict[str, Any]], Any] | None


def build(config: dict[str, Any]) -> Parts:
    """The model, the data, the strategy of a configuration; everything that may be wrong with them is said here."""
    from evoopt.envs import language
    from evoopt.recipes import finetune
    from evoopt.strategies.zeroth_order import probes

    cli.one_of("a task", config["task"], TASKS)
    cli.one_of("a part of the model", config["train"], TRAINED)
    if config.get("members", 1) < 1:
        raise error("--members of at least 1", str(config["members"]), "1 for one at a time")
    if config["eval_every"] < 1 or config["patience"] < 1:
        got = f"--eval-every {config['eval_every']}, --patience {config['patience']}"
        raise error("numbers of steps of at least 1", got, "0 for never; leave --eval out instead")
    rows = {name: language.data.read(config[name]) for name in ("data", "eval") if config[name]}
    make = getattr(language.data, config["task"])
    chosen = settings(config, make)
    base = load(config, chosen)
    strategy = make_strategy(config, starting(config, chosen["strategy"]))
    options = _data_options(config, chosen["data"], base)
    train = make(base.model, base.tokenizer, rows["data"], **options)
    held_out = make(base.model, base.tokenizer, rows["eval"], **options) if "eval" in rows else None
    if held_out is not None and train.labels and held_out.labels and train.labels != held_out.labels:
        got = f"{', '.join(train.labels)} and {', '.join(held_out.labels)}"
        raise error("the same labels in --data and --eval", got, "candidates that each file brings itself")
    if base.seen is not base.x and (sigma := _own_number(strategy, "sigma")) is not None:
        probes.start(base.seen, sigma)  # masters are float32, but what is probed is not
    task = language.Task(
        base.model, train, base.merge, batch_size=config["batch_size"], micro_batch=config["micro_batch"],
        metric=_metric(config["metric"]), rows_over="rows" if config.get("devices") else None,
    )  # fmt: skip
    score = None  # left to `finetune`: a metric of the user, or the accuracy
    if config["metric"] == "f1":
        score = lambda row: (-row["f1"], row["loss"])
    elif config["task"] == "completion" and not callable(task.metric):
        score = finetune.lowest_loss
    return Parts(base, task, held_out, strategy, score)


def settings(config: dict[str, Any], make: Any) -> dict[str, dict[str, Any]]:
    """The settings, by whose they are: strategy, data, train."""
    from evoopt.envs.language import trainable

    function = {"lora": trainable.lora, "prefix": trainable.prefix}.get(config["train"], trainable.full)
    functions = {"strategy": _recipe(config), "data": make, "train": function}
    known = {name for f in functions.values() for name in cli._settings(f)}
    for key, text in config["settings"].items():
        name = key.rpartition(".")[2]
        if name in THEIRS and name not in known:
            raise error(f"a setting such as {THEIRS[name]}={text}", key, f"another program's name of '{THEIRS[name]}'")
    others = {"--train lora": trainable.lora, "--train prefix": trainable.prefix} | cli._strategies()
    return cli.chosen_settings(config["settings"], functions, others, OURS)


# What other arguments say, or what is made here.
OURS = {
    "model": "--model", "tokenizer": "--model", "rows": "--data", "params": "--model", "key": "--seed",
    "prompt": "--prompt", "candidates": "--candidate", "popsize": "--popsize",
}  # fmt: skip


def load(config: dict[str, Any], chosen: dict[str, dict[str, Any]]) -> Base:
    """The base model, and the part of it that is trained."""
    import jax
    import jax.numpy as jnp

    from evoopt.envs import language
    from evoopt.envs.language import trainable

    if config["dtype"] not in (dtypes := ("float32", "bfloat16")):
        cause = "float16 rounds a probe's small steps away and overflows; bfloat16 has the range of float32"
        raise error(f"--dtype {' or '.join(dtypes)}", repr(config["dtype"]), cause)
    dtype = jnp.dtype(config["dtype"])
    model, params, tokenizer = language.load(config["model"], dtype=dtype)
    key = jax.random.fold_in(jax.random.key(config["seed"], impl="threefry2x32"), 1)
    train = config["train"]
    if train == "full":
        x, merge = trainable.full(params)
    elif train == "bitfit":
        x, merge = trainable.biases_and_norms(params)
    elif train == "lora":
        x, merge = trainable.lora(params, key, **chosen["train"])
    else:
        x, merge = trainable.prefix(model, params, key, **chosen["train"])
    seen = x
    if dtype != jnp.float32 and cli.one_of("an update", config["update"], UPDATES) == "masters":
        x, merge = trainable_masters(x, merge)
    return Base(model, params, tokenizer, x, merge, seen)


def starting(config: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """The strategy's settings, with sigma and the rate that suit what is trained where nothing was chosen."""
    usual = inspect.signature(_recipe(config)).parameters
    larger = LARGER.get(config["train"])
    if (
        larger is None
        or any(name not in usual for name in ("sigma", "learning_rate"))
        or (usual["sigma"].default != WHOLE)
    ):
        return chosen
    suited = {name: usual[name].default * by for name, by in zip(("sigma", "learning_rate"), larger, strict=True)}
    return suited | chosen


def _own_number(strategy: Any, name: str) -> Any:
    """A field of a strategy, or of the one that it wraps."""
    while not hasattr(strategy, name) and hasattr(strategy, "strategy"):
        strategy = strategy.strategy
    return getattr(strategy, name, None)


def trainable_masters(x: Any, merge: Any) -> tuple[Any, Any]:
    """`x` in float32, of which the model sees the dtypes it had."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    dtypes = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), x)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x), Partial(_narrowed, merge, dtypes)


def _narrowed(merge: Any, dtypes: Any, x: Any) -> Any:
    import jax

    return merge(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x, dtypes))


def make_strategy(config: dict[str, Any], chosen: dict[str, Any]) -> Any:
    """The strategy, with its schedule and with random rounding of half-precision weights."""
    from evoopt import wrappers

    recipe, name = _recipe(config), config["schedule"]
    takes = cli._settings(recipe)
    options = dict(chosen)
    budget = cli.budget(config["budget"])
    if config["popsize"] is not None:
        if "popsize" not in takes:
            raise error("no --popsize", str(config["popsize"]), f"{config['strategy']} has its own number of probes")
        options["popsize"] = config["popsize"]
    if "steps" in takes and "steps" not in options and "generations" in budget:
        options["steps"] = budget["generations"]  # ZO-AdaMU's borders are shares of the run
    strategy = recipe(**options)
    if cli.one_of("a schedule", name, SCHEDULES) != "constant":
        import optax

        if "generations" not in budget:
            raise error("a budget in steps", config["budget"], f"a {name} schedule has to know how many there will be")
        if not hasattr(strategy, "learning_rate"):
            raise error("a strategy with a learning rate", config["strategy"], "a schedule for one that has none")
        make = {"cosine": optax.cosine_decay_schedule, "linear": _linear}[name]
        strategy = wrappers.scheduled(strategy, learning_rate=make(strategy.learning_rate, budget["generations"]))
    if config["dtype"] != "float32" and config["update"] == "stochastic":
        strategy = wrappers.rounded(strategy)
    return strategy


def _linear(value: float, steps: int) -> Any:
    import optax

    return optax.linear_schedule(value, 0.0, steps)


def _recipe(config: dict[str, Any]) -> Callable[..., Any]:
    from evoopt import strategies

    name = config["strategy"]
    if name.startswith("optax:"):
        return _gradient(name.removeprefix("optax:"))
    return getattr(strategies, cli.one_of("a strategy", name, [n for n in strategies.__all__ if n != "from_evosax"]))


def _gradient(name: str) -> Callable[..., Any]:
    import optax

    from evoopt import strategies

    names = [
        n for n in dir(optax) if callable(getattr(optax, n)) and n.startswith(("ada", "sgd", "lion", "rms", "lamb"))
    ]
    optimizer = getattr(optax, cli.one_of("an optimizer of optax", name, names))

    def gradient(*, learning_rate: float = 1e-4, weight_decay: float | None = None) -> Any:
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        return strategies.gradient(optimizer(learning_rate, **decay))

    return gradient


def _data_options(config: dict[str, Any], chosen: dict[str, Any], base: Base) -> dict[str, Any]:
    options = dict(chosen)
    if config["prompt"] is not None:
        options["text" if config["task"] == "similarity" else "prompt"] = config["prompt"]
    if config["candidates"]:
        if config["task"] == "completion":
            raise error("candidates with a task that has labels", "--task completion", "classification was meant")
        options["candidates"] = config["candidates"]
    if config["task"] == "classification" and "prompt" not in options:
        raise error('--prompt "..." for a classification', "none", "the template that the candidates continue")
    if config["task"] == "similarity" and "candidates" not in options:
        raise error("--candidate LABEL=TEXT for each label", "none", "the sentences that stand for the labels")
    return options


def _metric(name: str) -> Any:
    module, colon, function = name.partition(":")
    if not colon:
        return cli.one_of("a metric", name, METRICS)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as reason:
        cause = "a misspelt name, or a module that is in no folder of PYTHONPATH"
        raise error("a metric MODULE:FUNCTION that can be imported", f"{name}: {reason}", cause) from reason


def _candidate(text: str) -> tuple[str, str]:
    label, equals, candidate = text.partition("=")
    if not equals:
        raise error("--candidate LABEL=TEXT", repr(text), "a blank in the place of the =")
    return label, candidate  # blanks matter to a tokenizer


def go(run: Any, config: dict[str, Any], parts: Parts, evaluator: Any) -> str:
    """Run, say how it went, write the model and the trajectory. Why it ended."""
    from evoopt import trees
    from evoopt.recipes.finetune import finetune
    from evoopt.run import checkpoint, trajectory

    base, task = parts.base, parts.task
    sizes = f"{trees.size(base.x):,} of {trees.size(base.params):,} parameters"
    print(f"{config['objective']} by {config['strategy']}: {sizes}, {len(task.data)} rows; run folder {run.path}")
    numbers = {name: _own_number(parts.strategy, name) for name in ("sigma", "learning_rate")}
    numbers = ", ".join(f"{name} {float(x):g}" for name, x in numbers.items() if isinstance(x, (int, float)))
    if numbers:
        print(f"{numbers}, for --train {config['train']} (--set changes them)")
    if run.steps():
        print(f"continuing after step {run.steps()[-1]}", flush=True)
    digest = checkpoint.digest(base.params)
    run.about = {
        **cli.about({name: value for name, value in config.items() if name not in ("model", "data", "eval")}),
        "base model": digest,
        **{name: _file_digest(config[name]) for name in ("data", "eval")},
    }
    tuned = finetune(
        task, base.x, parts.strategy, key=config["seed"], held_out=parts.held_out, every=config["eval_every"],
        score=parts.score, patience=config["patience"], run=run, progress=True, label=config["objective"],
        settings={**config, "base": digest}, evaluator=evaluator,
        batch_size=config.get("members"), **cli.budget(config["budget"]),
    )  # fmt: skip
    result = tuned.result
    print(f"{result.generations} steps, {result.evaluations} forward passes of a batch, {result.seconds:.1f} s")
    if evaluator is not None:
        print(f"evaluated by {evaluator.status()}")
    if result.reason in cli.STATUS:
        print(f"`evoopt resume {run.path}` continues it", flush=True)
    if result.reason == "terminated":
        return result.reason  # whoever sent it does not wait for long
    if tuned.skipped:
        print(f"{tuned.skipped} steps had no finite loss and were skipped")
    if result.reason == "callback":
        print("stopped early; the last good weights are kept")
    if tuned.evaluations:
        best = next(row for row in tuned.evaluations if row["generation"] == tuned.generation)
        for word, row in (("before", tuned.evaluations[0]), (f"after {tuned.generation} steps", best)):
            print(f"held-out, {word}: {_shown(row)}")
    write(run.path / "model", base, tuned.params)
    print(f"model: {run.path / 'model'}")
    if tuned.trajectory is not None:
        path = trajectory.write(run.path / TRAJECTORY, tuned.trajectory)
        print(f"trajectory: {path} ({path.stat().st_size:,} bytes)")
    try:
        print(f"curves: {run.plot()}")
    except ImportError as missing:
        print(f"no curves: {missing}")
    if tuned.diverged:
        known = "what is known of the best is written" if tuned.evaluations else "its weights may be ruined"
        cause = "a learning rate or sigma that is too high; smaller steps: --set learning_rate=..."
        raise SystemExit(_said(f"a loss that falls, in run folder {run.path}", f"{tuned.diverged}; {known}", cause))
    return result.reason


def _file_digest(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _said(expected: str, got: str, cause: str) -> int:
    """Say that a run diverged; the exit status."""
    print(f"evoopt: diverged: {error(expected, got, cause)}", file=sys.stderr, flush=True)
    return 1


def _shown(row: dict[str, Any]) -> str:
    shares = [f"{name} {100 * row[name]:.1f}%" for name in ("accuracy", "f1") if name in row]
    shares += [f"metric {row['metric']:.4g}"] if "metric" in row else []
    return "  ".join([*shares, f"loss {row['loss']:.4f}" if math.isfinite(row["loss"]) else "loss not finite"])


def write(path: Path, base: Base, x: Any) -> None:
    """The model as a Hugging Face folder in the place of an earlier one; a prefix in PEFT's form in a folder in it."""
    import shutil

    from evoopt.envs import language

    shutil.rmtree(path, ignore_errors=True)
    params = base.merge(x)
    prefix = params.pop("prefix", None) if "prefix" in params else None
    language.save(path, base.model, params, base.tokenizer)
    if prefix is not None:  # such a folder has no place for it
        language.save_prefix(path / "prefix", base.model, prefix, str(path.resolve()))


def _replay(options: argparse.Namespace) -> None:
    from evoopt.run import checkpoint, trajectory

    if Path(options.out).exists():
        raise error(f"no '{options.out}' yet", "it exists", "rebuilt before; choose another name", FileExistsError)
    found = trajectory.read(options.trajectory)
    config = {**found.settings, "model": os.path.abspath(options.base)}
    cli.checked(config, KINDS | {"base": (str,)}, options.trajectory)
    cli.one_of("a task", config["task"], TASKS)
    from evoopt.envs import language

    chosen = settings(config, getattr(language.data, config["task"]))
    base = load(config, chosen)
    if (digest := checkpoint.digest(base.params)) != config["base"]:
        cause = "another model or revision, or one that was fine-tuned since"
        expected = f"the base model of the trajectory, sha256 {config['base'][:16]}"
        raise error(expected, f"sha256 {digest[:16]} in '{options.base}'", cause)
    strategy = make_strategy(config, starting(config, chosen["strategy"]))
    x = trajectory.replay(found, strategy, base.x, other_versions=options.any_version)
    write(Path(options.out), base, x)
    print(f"{len(found.values)} steps replayed from {Path(options.trajectory).stat().st_size:,} bytes: {options.out}")
    print(json.dumps({"sha256": trajectory.digest(x)}))
