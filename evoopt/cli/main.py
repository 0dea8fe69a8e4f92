"""The command `evoopt`: evolve a policy, fine-tune a model, resume a run, write its replay, list what there is."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from evoopt import __version__
from evoopt.checks import nearest
from evoopt.cli import settings as kinds
from evoopt.reading import field, short
from evoopt.types import error

EPISODES_OF_A_TEST = 16
PACKAGES = ("brax", "gymnax")
POLICIES = ("linear", "mlp", "gru")
# What config.json says of a run, and of what kind each is; None where it may be null.
KINDS: dict[str, tuple[type | None, ...]] = {
    "objective": (str,), "strategy": (str,), "popsize": (int,), "policy": (str,), "budget": (str,),
    "target": (float, None), "seed": (int,), "settings": (dict,), "display": (str,),
}  # fmt: skip
UNITS = {
    "": "generations", "g": "generations", "generations": "generations",
    "e": "evaluations", "evals": "evaluations", "evaluations": "evaluations",
    "s": "seconds", "m": "minutes", "h": "hours",
}  # fmt: skip
GIVEN = {  # settings that other options give
    "popsize": "--popsize", "name": "the environment's own name, gymnax:NAME", "policy": "--policy",
    "algorithm": "--strategy evosax:NAME", "observation_size": "the environment", "action_size": "the environment",
}  # fmt: skip
NO_BITS = ("budget", "target", "display", "eval_every", "patience")  # may be others when a run goes on
STATUS = {"interrupted": 130, "terminated": 143}  # of a run that was stopped by Ctrl-C or SIGTERM, as shells know them
LANGUAGE = (  # strategies made for fine-tuning
    "comparison_descent", "fzoo", "gradient", "hizoo", "lozo", "lozo_m", "mezo", "mezo_adam", "mezo_momentum",
    "mezo_svrg", "one_point", "sparse_mezo", "spsa", "subzero", "zo_adamm", "zo_adamu", "zo_conservative",
    "zo_sign_sgd",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors end with one message and status 2, Ctrl-C with 130, SIGTERM with 143."""
    options = _parser().parse_args(arguments)
    try:
        status = STATUS.get(options.command(options), 0)
    except KeyboardInterrupt:  # before the run began, at its end, or a second time
        print("evoopt: interrupted", file=sys.stderr)
        status = STATUS["interrupted"]
    except (ValueError, TypeError, OSError, ImportError) as problem:
        print(f"evoopt: {problem}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evoopt",
        description="Evolve control policies, fine-tune language models; every run can be watched and resumed.",
    )
    parser.add_argument("--version", action="version", version=f"evoopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    from evoopt.cli import finetune as cli_finetune  # which imports this module

    evolve = commands.add_parser("evolve", help="evolve a policy in an environment")
    evolve.add_argument("environment", help="brax:NAME or gymnax:NAME, as in brax:hopper")
    evolve.add_argument(
        "--strategy", default="openai_es", help="see `evoopt list strategies`; evosax:NAME for those of evosax"
    )
    evolve.add_argument("--popsize", type=int, default=128, help="candidates a generation (default: %(default)s)")
    evolve.add_argument(
        "--budget", default="100", help="100 (generations), 50000e (evaluations), 90s, 10m or 2h (default: %(default)s)"
    )
    evolve.add_argument("--policy", default="linear", help=f"{', '.join(POLICIES)} (default: %(default)s)")
    evolve.add_argument(
        "--target", type=float, help="stop once a candidate has this return, confirmed in 16 new episodes"
    )
    evolve.add_argument("--seed", type=int, default=0)
    evolve.add_argument("--name", help="the run folder's name; made from the settings by default")
    evolve.add_argument("--runs", default="runs", help="where run folders are (default: %(default)s)")
    evolve.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the strategy, environment or policy, as in sigma=0.05, episode_length=300, hidden=64,64",
    )  # fmt: skip
    evolve.add_argument("--no-replay", action="store_true", help="do not write the HTML replay at the end")
    evolve.add_argument(
        "--micro-batch", type=int,
        help="candidates a worker evaluates at once; it fixes the bits, whatever the workers (default: popsize / 8, "
        "at most 16)",
    )  # fmt: skip
    _add_workers(evolve)
    evolve.set_defaults(command=_evolve)

    cli_finetune.add_commands(commands)

    resume = commands.add_parser("resume", help="continue a run from its last checkpoint, bit for bit")
    resume.add_argument("run", help="the run folder")
    resume.add_argument("--budget", help="a new budget, counted from the start of the run")
    resume.add_argument(
        "--force", action="store_true", help="go on as another run: other settings, version or device, so other bits"
    )
    resume.add_argument(
        "--metric", help="of a fine-tuning whose metric is MODULE:FUNCTION: the same again, to trust it"
    )
    resume.add_argument("--no-replay", action="store_true", help="do not write the HTML replay at the end")
    _add_workers(resume)
    resume.set_defaults(command=_resume)

    replay = commands.add_parser("replay", help="write replay.html of a run's policy")
    replay.add_argument("run", help="the run folder")
    replay.add_argument("--out", help="the file (default: RUN/replay.html)")
    replay.add_argument("--seed", type=int, default=0, help="of the episode that is shown")
    replay.set_defaults(command=_replay)

    table = commands.add_parser("list", help="what there is")
    table.add_argument("what", choices=("strategies", "envs"))
    table.set_defaults(command=_list)
    return parser


def _add_workers(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("evaluation by Ray workers", "see docs/cluster.md")
    group.add_argument("--workers", type=int, help="how many; with --address alone, as many as there is room for")
    group.add_argument("--address", help="of a running Ray cluster, HOST:PORT or auto; otherwise one is started here")
    group.add_argument("--worker-cpus", type=float, default=1.0, help="of each worker (default: %(default)s)")
    group.add_argument("--worker-gpus", type=float, default=0.0, help="of each worker (default: %(default)s)")
    command.add_argument("--devices", help="of this machine, that share the evaluation: a number, or all")


def _evolve(options: argparse.Namespace) -> str:
    budget(options.budget)  # a bad budget is said before anything is compiled
    if options.micro_batch is not None and options.micro_batch < 1:
        raise error("--micro-batch of at least 1", str(options.micro_batch), "leave it out for the default")
    config = {
        "objective": options.environment,
        "strategy": options.strategy,
        "popsize": options.popsize,
        "policy": options.policy,
        "budget": options.budget,
        "target": options.target,
        "seed": options.seed,
        "settings": dict(_setting(text) for text in options.set),
        "display": "return",
    }
    if options.micro_batch is not None or _is_spread(options):
        config["micro_batch"] = options.micro_batch or max(1, min(16, options.popsize // 8))
    task, strategy = build(config)
    _try(task, strategy)
    from evoopt.run.folder import Run

    with Run.create(options.runs, options.name, config) as run, _evaluator(options, config) as evaluator:
        return _go(run, config, task, strategy, replay=not options.no_replay, evaluator=evaluator)


def _try(task: Any, strategy: Any) -> None:
    """Trace the first population, so that a setting that cannot be is said before a folder is made."""
    import jax

    key = jax.random.key(0)
    try:
        jax.eval_shape(lambda key: strategy.ask(strategy.init(task.init(key), key), key).genomes, key)
    except Exception as reason:
        if "\nusual cause: " in str(reason):
            raise
        got = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
        cause = "a setting of the strategy or policy that is out of its range"
        raise error("settings that a first population can be made with", got, cause) from reason


def _is_spread(options: argparse.Namespace) -> bool:
    """Whether devices or workers were asked for."""
    workers = options.workers is not None or options.address is not None
    if options.devices is not None and workers:
        raise error("either --devices or workers", "both", "workers have devices of their own: --worker-gpus")
    return options.devices is not None or workers


def _evaluator(options: argparse.Namespace, config: dict[str, Any]) -> Any:
    """Who evaluates: nobody else for a run that never had workers, this process where it has none today."""
    spread = _is_spread(options)
    if "micro_batch" not in config:
        if spread:
            cause = "workers evaluate micro-batches of a fixed shape, which rounds differently; start a run with them"
            raise error("workers for a run that was begun with some", "a run that was begun without", cause)
        return contextlib.nullcontext()
    from evoopt.distributed import LocalEvaluator, RayEvaluator, ShardedEvaluator

    if options.devices is not None:
        return ShardedEvaluator(_devices(options.devices))
    if options.workers is None and options.address is None:
        return LocalEvaluator()
    return RayEvaluator(options.workers, options.address, cpus=options.worker_cpus, gpus=options.worker_gpus)


def _devices(count: str) -> list[Any]:
    import jax

    there = jax.devices()
    if count == "all":
        return there
    if not count.isdigit() or not 1 <= int(count) <= len(there):
        cause = "more than this machine has, or jax without its CUDA plugin, which sees the CPU alone"
        raise error(f"--devices 1 to {len(there)}, or all", f"--devices {count}", cause)
    return there[: int(count)]


def _resume(options: argparse.Namespace) -> str:
    from evoopt.run.folder import Run

    run = Run.open(options.run, force=options.force)
    config = {**run.config, **({"budget": options.budget} if options.budget else {})}
    from evoopt.cli import finetune as cli_finetune

    if cli_finetune.is_finetuning(config):
        checked(config, cli_finetune.KINDS, f"{run.path}/config.json")
        return cli_finetune.resume(run, config, options)
    checked(config, KINDS, f"{run.path}/config.json")
    task, strategy = build(config)
    with run, _evaluator(options, config) as evaluator:
        run.lock()
        return _go(run, config, task, strategy, replay=not options.no_replay, evaluator=evaluator)


def _go(run: Any, config: dict[str, Any], task: Any, strategy: Any, *, replay: bool, evaluator: Any) -> str:
    """Run, then say how it went, and leave curves and replay in the folder. Why it ended."""
    import jax
    import jax.numpy as jnp

    from evoopt import noise as noises
    from evoopt.run.minimize import minimize

    print(f"{config['objective']} by {config['strategy']}, run folder {run.path}", flush=True)
    done = run.steps()[-1] if run.steps() else 0
    if done:
        print(f"continuing after generation {done}", flush=True)
    key_policy, key_context, key_run, key_test = jax.random.split(noises.replayable(config["seed"]), 4)
    per_generation = lambda values, aux: {
        "length": jnp.nanmean(aux["length"]),
        "steps": aux["steps"].sum(),
    }
    run.about = about(config)
    result = minimize(
        task, task.init(key_policy), strategy,
        key=key_run, context=task.context(key_context), update=task.update,
        each=None if task.common_random_numbers else task.each,
        summarize=per_generation, totals=("steps",), **budget(config["budget"]),
        target=None if config["target"] is None else -config["target"],
        progress=True, label=config["objective"], display="return", run=run,
        evaluator=evaluator, batch_size=config.get("micro_batch"),
    )  # fmt: skip
    if evaluator is not None:
        print(f"evaluated by {evaluator.status()}")
    print(
        f"{result.generations} generations, {result.evaluations} evaluations, {result.seconds:.1f} s; "
        f"stopped by {result.reason}"
    )
    if result.reason in STATUS:
        print(f"`evoopt resume {run.path}` continues it", flush=True)
    if result.reason == "terminated":
        return result.reason  # whoever sent it does not wait for long
    returns = task.evaluate(result.recommended, result.context, key_test, episodes=EPISODES_OF_A_TEST)["returns"]
    random = [
        task.evaluate(_random(task, key), result.context, key_test, episodes=EPISODES_OF_A_TEST)["returns"].mean()
        for key in jax.random.split(key_policy, EPISODES_OF_A_TEST)
    ]
    if result.best is not None and result.generations:
        best = task.evaluate(result.best, result.best_context, key_test, episodes=EPISODES_OF_A_TEST)["returns"]
        print(f"best candidate over {EPISODES_OF_A_TEST} new episodes: {float(best.mean()):.1f}")
    print(
        f"return over {EPISODES_OF_A_TEST} new episodes: {float(returns.mean()):.1f}; "
        f"{len(random)} random policies: mean {float(sum(random)) / len(random):.1f}, best {float(max(random)):.1f}"
    )
    try:
        print(f"curves: {run.plot()}")
    except ImportError as missing:
        print(f"no curves: {missing}")
    if replay and config["objective"].startswith("brax:") and task.environment.system is not None:
        out = run.path / "replay.html"
        print(f"replay: {_write_replay(run, config, task, result.recommended, result.context, out, 0)}")
    return result.reason


def about(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that its bits depend on; a larger budget is no other run."""
    return {"config": {name: value for name, value in config.items() if name not in NO_BITS}}


def _random(task: Any, key: Any) -> Any:
    """A policy of the task with standard normal parameters."""
    from evoopt.noise import gaussian

    return gaussian.draw(key, task.init(key))


def _replay(options: argparse.Namespace) -> None:
    import jax

    from evoopt import noise as noises
    from evoopt.run.folder import Run
    from evoopt.run.minimize import restore

    run = Run.open(options.run)
    checked(run.config, KINDS, f"{run.path}/config.json")
    if not run.config["objective"].startswith("brax:"):
        raise error("a run in a Brax environment", short(run.config["objective"]), "only Brax has a viewer")
    task, strategy = build(run.config)
    key_policy, key_context, *_ = jax.random.split(noises.replayable(run.config["seed"]), 4)
    carry = restore(run, task, task.init(key_policy), strategy, context=task.context(key_context))
    out = Path(options.out) if options.out else run.path / "replay.html"
    params = strategy.recommend(carry.state)
    print(f"replay: {_write_replay(run, run.config, task, params, carry.context, out, options.seed)}")


def _write_replay(run: Any, config: dict[str, Any], task: Any, params: Any, context: Any, out: Path, seed: int) -> Path:
    import jax

    from evoopt.envs import replay

    system, states, returns = task.trajectory(params, context, jax.random.key(seed))
    caption = {
        "environment": config["objective"].split(":")[1],
        "backend": str(task.environment.options.get("backend")),
        "return": f"{float(returns[-1]):.1f}",
        "episode length": f"{len(states) - 1} steps",
        "strategy": config["strategy"],
    }
    return replay.write(out, system, states, title=run.path.name, caption=caption, dt=task.dt)


def _list(options: argparse.Namespace) -> None:
    if options.what == "strategies":
        from evoopt import strategies

        names = [name for name in strategies.__all__ if name != "from_evosax"]
        control = [name for name in names if name not in LANGUAGE]
        for head, group in (("search and control", control), ("fine-tuning of language models", LANGUAGE)):
            print(f"{head}:")
            print("\n".join(f"  {name:24} {_first_line(getattr(strategies, name))}" for name in group))
        print("evosax:NAME stands for an algorithm of evosax, where that is installed")
        return
    for package in PACKAGES:
        try:
            names = importlib.import_module(f"evoopt.envs.{package}").names()
        except ImportError:
            print(f"{package}: not installed (pip install evoopt-jax[{package}])")
        else:
            print("\n".join(f"{package}:{name}" for name in names))


def _first_line(recipe: Any) -> str:
    return (inspect.getdoc(recipe) or "").split("\n")[0]


def budget(text: str) -> dict[str, Any]:
    """The argument of `minimize` that `text` means.

    >>> budget("90s"), budget("200"), budget("1e6e")
    ({'seconds': 90.0}, {'generations': 200}, {'evaluations': 1000000})

    Raises:
        ValueError: for another form.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE]\d+)?)\s*([a-z]*)\s*", text)
    unit = UNITS.get(match[2]) if match else None
    try:
        amount = float(match[1]) if match else 0.0
    except ValueError:
        unit, amount = None, 0.0
    if unit is None or not 0 < amount < math.inf:
        raise error(
            "a budget like 100 (generations), 50000e (evaluations), 90s, 10m or 2h", short(text), "an unknown unit"
        )
    if unit in ("seconds", "minutes", "hours"):
        return {"seconds": amount * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]}
    return {unit: int(amount)}


def build(config: dict[str, Any]) -> tuple[Any, Any]:
    """(task, strategy) of a run's configuration."""
    package, _, name = config["objective"].partition(":")
    if not name:
        raise error("PACKAGE:NAME, as in brax:hopper", short(config["objective"]), "the package was left out")
    envs = importlib.import_module(f"evoopt.envs.{one_of('a package of environments', package, PACKAGES)}")
    policies = importlib.import_module("evoopt.envs.policies")
    make_policy = getattr(policies, one_of("a policy", config["policy"], POLICIES))
    recipe, popsize = _recipe(config["strategy"], config["popsize"])

    functions = {"strategy": recipe, "env": envs.make, "policy": make_policy}
    others = {f"--policy {name}": getattr(policies, name) for name in POLICIES} | _strategies()
    chosen = chosen_settings(config["settings"], functions, others, GIVEN)
    task = envs.make(name, **chosen["env"])
    if task.environment.discrete:  # the largest logit acts
        chosen["policy"].setdefault("squash", None)
    policy = make_policy(task.observation_size, task.action_size, **chosen["policy"])
    return dataclasses.replace(task, policy=policy), recipe(**popsize, **chosen["strategy"])


def checked(config: dict[str, Any], kinds: dict[str, tuple[type | None, ...]], where: str) -> None:
    """Whether a configuration that was read somewhere says all that a run needs, each of its kind.

    Raises:
        ValueError: what is missing, or of another kind.
    """
    try:
        for name, kind in kinds.items():
            value = field(config, name, *kind)
            if type(value) is int and name != "seed" and not 0 < value < 2**31:
                raise ValueError(f'"{name}" is {short(value)}, no size')
        field(config, "micro_batch", int, None, default=None)
        for texts in (config["settings"], config.get("candidates", {})):
            for name in texts:
                field(texts, name, str)
    except ValueError as reason:
        cause = "edited by hand, or a run that was not started by this command"
        raise error(f"the settings of a run in '{where}'", str(reason), cause) from reason


def chosen_settings(
    settings: dict[str, str], functions: dict[str, Callable[..., Any]], others: dict[str, Callable[..., Any]],
    given: Mapping[str, str],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The settings by whose they are, each of its kind. `others` are named where a setting is one of theirs."""
    places = {place: [n for n in _settings(f) if n not in given] for place, f in functions.items()}
    chosen: dict[str, dict[str, Any]] = {place: {} for place in places}
    for key, text in settings.items():
        name = key.rpartition(".")[2]
        if not any(name in names for names in places.values()):
            kinds.given(name, given)
            if having := kinds.owners(name, others):
                cause = f"it is one of {', '.join(having[:6])}"
                raise error("a setting of what was chosen", f"--set {key}", cause)
        place, name = _place(key, places)
        value = _value(name, text)
        if name not in kinds.BY_NAME:
            value = kinds.converted(name, text, value, functions[place])
        chosen[place][name] = value
    return chosen


def _strategies() -> dict[str, Callable[..., Any]]:
    from evoopt import strategies

    return {f"--strategy {name}": getattr(strategies, name) for name in strategies.__all__ if name != "from_evosax"}


def _recipe(name: str, popsize: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    from evoopt import strategies

    if name.startswith("evosax:"):
        return strategies.from_evosax, {"algorithm": name.removeprefix("evosax:"), "popsize": popsize}
    recipe = getattr(strategies, one_of("a strategy", name, [n for n in strategies.__all__ if n != "from_evosax"]))
    return recipe, {"popsize": popsize} if "popsize" in inspect.signature(recipe).parameters else {}


def _settings(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise error("--set KEY=VALUE", repr(text), "a blank in the place of the =")
    return key.strip(), value.strip()


def _place(key: str, places: dict[str, list[str]]) -> tuple[str, str]:
    """Whose setting `key` is: `strategy.sigma`, or `sigma` where only one has it."""
    place, dot, rest = key.partition(".")
    if dot:
        one_of("a part of the run", place, places)
        return place, one_of(f"a setting of the {place}", rest, places[place])
    having = [place for place, names in places.items() if key in names]
    if len(having) > 1:
        raise error(f"one of {', '.join(f'{p}.{key}' for p in having)}", key, "several parts have this setting")
    if not having:
        one_of("a setting", key, sorted({n for names in places.values() for n in names}))
    return having[0], key


def _value(key: str, text: str) -> Any:
    """`text` as a Python literal; names of noise, utilities and optax transformations where those are asked for."""
    if key in ("noise", "utility", "optimizer"):
        module = importlib.import_module(
            {"noise": "evoopt.noise", "utility": "evoopt.shaping", "optimizer": "optax"}[key]
        )
        if key == "optimizer" and hasattr(module, f"scale_by_{text}"):
            return getattr(module, f"scale_by_{text}")()
        if not text.startswith("_") and hasattr(module, text):
            return getattr(module, text)
        raise error(f"a name in {module.__name__}", repr(text), "a misspelt name")
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: brackets too deep
        return text


def one_of(what: str, name: str, names: Iterable[str]) -> str:
    """`name`, if it is one of `names`; otherwise an error with the nearest known ones."""
    names = list(names)
    if name in names:
        return name
    close = nearest(name, names) if len(names) > 4 else []
    close = close or names
    raise error(f"{what}: {', '.join(close[:12])}", short(name), "a misspelt name; `evoopt list` shows all there are")


if __name__ == "__main__":
    main()
