"""From the configuration of a fine-tuning run to its parts: model, data, task and strategy."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from evoopt.cli import settings, shared
from evoopt.cli.names import METRICS, SCHEDULES, TASKS, TRAINED, UPDATES
from evoopt.cli.shared import one_of
from evoopt.types import error

# MeZO's numbers for a part of a model (Malladi et al. 2023, appendix D), as multiples of those for the whole model: of
# sigma and of the learning rate. For biases no paper has numbers; they take those of the whole model.
LARGER = {"lora": (10.0, 100.0), "prefix": (100.0, 10_000.0)}
WHOLE = 1e-3  # the default sigma of the strategies that start from MeZO's numbers for the whole model
# What other programs call our settings.
THEIRS = {"lr": "learning_rate", "step_size": "learning_rate", "zo_eps": "sigma", "eps": "sigma", "epsilon": "sigma",
          "lora_r": "rank", "r": "rank", "lora_alpha": "alpha", "num_prefix": "length", "max_length": "length",
          "target_modules": "targets"}  # fmt: skip
GIVEN = {  # settings that other options give, or that are made here
    "model": "--model", "tokenizer": "--model", "rows": "--data", "params": "--model", "key": "--seed",
    "prompt": "--prompt", "candidates": "--candidate", "popsize": "--popsize",
}  # fmt: skip
# The entries of a run's config.json.
KINDS: shared.Kinds = {
    "objective": (str,), "model": (str,), "data": (str,), "eval": (str, None), "task": (str,), "prompt": (str, None),
    "candidates": (dict,), "metric": (str,), "train": (str,), "strategy": (str,), "popsize": (int, None),
    "budget": (str,), "batch_size": (int,), "micro_batch": (int, None), "dtype": (str,), "update": (str,),
    "schedule": (str,), "eval_every": (int,), "patience": (int,), "seed": (int,), "settings": (dict,),
    "display": (str,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Base:
    """A model, and the part of it that is trained."""

    model: Any
    params: Any
    tokenizer: Any
    x: Any
    merge: Any
    seen: Any  # x in the dtypes that the model sees


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that a configuration describes."""

    base: Base
    task: Any
    held_out: Any
    strategy: Any
    score: Callable[[dict[str, Any]], Any] | None


def build(config: dict[str, Any]) -> Parts:
    """Load the model and the data and make the strategy of a configuration.

    Raises:
        ValueError: whatever may be wrong with them.
    """
    from evoopt.envs import language
    from evoopt.recipes import finetune
    from evoopt.strategies.zeroth_order import probes

    one_of("a task", config["task"], TASKS)
    one_of("a part of the model", config["train"], TRAINED)
    if config.get("members", 1) < 1:
        raise error("--members of at least 1", str(config["members"]), "1 for one at a time")
    if config["eval_every"] < 1 or config["patience"] < 1:
        got = f"--eval-every {config['eval_every']}, --patience {config['patience']}"
        raise error("numbers of steps of at least 1", got, "0 for never; leave --eval out instead")
    rows = {name: language.data.read(config[name]) for name in ("data", "eval") if config[name]}
    make = getattr(language.data, config["task"])
    chosen = choose(config, make)
    base = load(config, chosen)
    strategy = make_strategy(config, starting(config, chosen["strategy"]))
    options = _data_options(config, chosen["data"])
    train = make(base.model, base.tokenizer, rows["data"], **options)
    held_out = make(base.model, base.tokenizer, rows["eval"], **options) if "eval" in rows else None
    if held_out is not None and train.labels and held_out.labels and train.labels != held_out.labels:
        got = f"{', '.join(train.labels)} and {', '.join(held_out.labels)}"
        raise error("the same labels in --data and --eval", got, "candidates that each file brings itself")
    if base.seen is not base.x and (sigma := own_number(strategy, "sigma")) is not None:
        probes.movable(base.seen, sigma)  # masters are float32, but what is probed is not
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


def choose(config: dict[str, Any], make: Any) -> dict[str, dict[str, Any]]:
    """The settings by the part that they belong to: strategy, data (which `make` makes) or train."""
    from evoopt.envs.language import trainable

    function = {"lora": trainable.lora, "prefix": trainable.prefix}.get(config["train"], trainable.full)
    functions = {"strategy": _recipe(config), "data": make, "train": function}
    known = {name for f in functions.values() for name in settings.names(f)}
    for key, text in config["settings"].items():
        name = key.rpartition(".")[2]
        if name in THEIRS and name not in known:
            raise error(f"a setting such as {THEIRS[name]}={text}", key, f"another program's name of '{THEIRS[name]}'")
    others = {"--train lora": trainable.lora, "--train prefix": trainable.prefix}
    others |= {f"--strategy {name}": recipe for name, recipe in shared.recipes().items()}
    return settings.chosen(config["settings"], functions, others, GIVEN)


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
    if dtype != jnp.float32 and one_of("an update", config["update"], UPDATES) == "masters":
        x, merge = _masters(x, merge)
    return Base(model, params, tokenizer, x, merge, seen)


def _masters(x: Any, merge: Any) -> tuple[Any, Any]:
    """`x` in float32, and a `merge` that gives the model the dtypes it had."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    dtypes = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), x)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x), Partial(_narrowed, merge, dtypes)


def _narrowed(merge: Any, dtypes: Any, x: Any) -> Any:
    import jax

    return merge(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x, dtypes))


def starting(config: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """The strategy's settings; sigma and learning rate that were not chosen suit the part that is trained."""
    usual = inspect.signature(_recipe(config)).parameters
    larger = LARGER.get(config["train"])
    if larger is None or not {"sigma", "learning_rate"} <= usual.keys() or usual["sigma"].default != WHOLE:
        return chosen
    suited = {name: usual[name].default * by for name, by in zip(("sigma", "learning_rate"), larger, strict=True)}
    return suited | chosen


def make_strategy(config: dict[str, Any], chosen: dict[str, Any]) -> Any:
    """The strategy, with its schedule and, for half-precision weights, stochastic rounding."""
    from evoopt import wrappers

    recipe, name = _recipe(config), config["schedule"]
    takes = settings.names(recipe)
    options = dict(chosen)
    budget = shared.budget(config["budget"])
    if config["popsize"] is not None:
        if "popsize" not in takes:
            raise error("no --popsize", str(config["popsize"]), f"{config['strategy']} has its own number of probes")
        options["popsize"] = config["popsize"]
    if "steps" in takes and "steps" not in options and "generations" in budget:
        options["steps"] = budget["generations"]  # ZO-AdaMU's borders are shares of the run
    strategy = recipe(**options)
    if one_of("a schedule", name, SCHEDULES) != "constant":
        import optax

        if "generations" not in budget:
            raise error("a budget in steps", config["budget"], f"a {name} schedule needs to know how many there are")
        if not hasattr(strategy, "learning_rate"):
            raise error("a strategy with a learning rate", config["strategy"], "a schedule for one that has none")
        make = {"cosine": optax.cosine_decay_schedule, "linear": _linear}[name]
        strategy = wrappers.scheduled(strategy, learning_rate=make(strategy.learning_rate, budget["generations"]))
    if config["dtype"] != "float32" and config["update"] == "stochastic":
        strategy = wrappers.rounded(strategy)
    return strategy


def own_number(strategy: Any, name: str) -> Any:
    """A field of a strategy or of the one that it wraps; None where neither has it."""
    while not hasattr(strategy, name) and hasattr(strategy, "strategy"):
        strategy = strategy.strategy
    return getattr(strategy, name, None)


def _linear(value: float, steps: int) -> Any:
    import optax

    return optax.linear_schedule(value, 0.0, steps)


def _recipe(config: dict[str, Any]) -> Callable[..., Any]:
    name = config["strategy"]
    if name.startswith("optax:"):
        return _gradient(name.removeprefix("optax:"))
    recipes = shared.recipes()
    return recipes[one_of("a strategy", name, recipes)]


def _gradient(name: str) -> Callable[..., Any]:
    import optax

    from evoopt import strategies

    families = ("ada", "sgd", "lion", "rms", "lamb")
    names = [n for n in dir(optax) if callable(getattr(optax, n)) and n.startswith(families)]
    optimizer = getattr(optax, one_of("an optimizer of optax", name, names))

    def gradient(*, learning_rate: float = 1e-4, weight_decay: float | None = None) -> Any:
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        return strategies.gradient(optimizer(learning_rate, **decay))

    return gradient


def _data_options(config: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
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
        return one_of("a metric", name, METRICS)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as reason:
        cause = "a misspelt name, or a module that is in no folder of PYTHONPATH"
        raise error("a metric MODULE:FUNCTION that can be imported", f"{name}: {reason}", cause) from reason
