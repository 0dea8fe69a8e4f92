"""The commands `evoopt evolve` and `evoopt replay`, and `evoopt resume` of such a run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evoopt.cli import settings, shared
from evoopt.cli.names import PACKAGES, POLICIES, STATUS
from evoopt.cli.shared import one_of
from evoopt.reading import short
from evoopt.types import error

EPISODES_OF_A_TEST = 16
# The entries of a run's config.json.
KINDS: shared.Kinds = {
    "objective": (str,), "strategy": (str,), "popsize": (int,), "policy": (str,), "budget": (str,),
    "target": (float, None), "seed": (int,), "settings": (dict,), "display": (str,),
}  # fmt: skip
GIVEN = {  # settings that other options give
    "popsize": "--popsize", "name": "the environment's own name, gymnax:NAME", "policy": "--policy",
    "algorithm": "--strategy evosax:NAME", "observation_size": "the environment", "action_size": "the environment",
}  # fmt: skip


def evolve(options: argparse.Namespace) -> str:
    """Start a run. Returns why it ended."""
    shared.budget(options.budget)  # a bad budget is an error before anything is compiled
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
        "settings": settings.read(options.set),
        "display": "return",
    }
    if options.micro_batch is not None or shared.is_spread(options):
        config["micro_batch"] = options.micro_batch or max(1, min(16, options.popsize // 8))
    task, strategy = build(config)
    _try(task, strategy)
    from evoopt.run.folder import Run

    with (
        Run.create(options.runs, options.name, config) as run,
        shared.evaluator(options, config.get("micro_batch")) as evaluator,
    ):
        return _go(run, config, task, strategy, replay=not options.no_replay, evaluator=evaluator)


def resume(run: Any, config: dict[str, Any], options: argparse.Namespace) -> str:
    """Continue a run. Returns why it ended."""
    shared.checked(config, KINDS, f"{run.path}/config.json")
    task, strategy = build(config)
    with run, shared.evaluator(options, config.get("micro_batch")) as evaluator:
        run.lock()
        return _go(run, config, task, strategy, replay=not options.no_replay, evaluator=evaluator)


def replay(options: argparse.Namespace) -> None:
    """Write the replay of a run's policy."""
    import jax

    from evoopt import noise as noises
    from evoopt.run.continuing import restore
    from evoopt.run.folder import Run

    run = Run.open(options.run)
    shared.checked(run.config, KINDS, f"{run.path}/config.json")
    if not run.config["objective"].startswith("brax:"):
        raise error("a run in a Brax environment", short(run.config["objective"]), "only Brax has a viewer")
    task, strategy = build(run.config)
    key_policy, key_context, *_ = jax.random.split(noises.replayable(run.config["seed"]), 4)
    carry = restore(run, task, task.init(key_policy), strategy, context=task.context(key_context))
    out = Path(options.out) if options.out else run.path / "replay.html"
    params = strategy.recommend(carry.state)
    print(f"replay: {_write_replay(run, run.config, task, params, carry.context, out, options.seed)}")


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
    others = {f"--policy {name}": getattr(policies, name) for name in POLICIES}
    others |= {f"--strategy {name}": recipe for name, recipe in shared.recipes().items()}
    chosen = settings.chosen(config["settings"], functions, others, GIVEN)
    task = envs.make(name, **chosen["env"])
    if task.environment.discrete:  # the largest logit acts
        chosen["policy"].setdefault("squash", None)
    policy = make_policy(task.observation_size, task.action_size, **chosen["policy"])
    return dataclasses.replace(task, policy=policy), recipe(**popsize, **chosen["strategy"])


def _recipe(name: str, popsize: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A strategy's recipe, and the popsize as arguments for it."""
    if name.startswith("evosax:"):
        from evoopt import strategies

        return strategies.from_evosax, {"algorithm": name.removeprefix("evosax:"), "popsize": popsize}
    recipes = shared.recipes()
    recipe = recipes[one_of("a strategy", name, recipes)]
    return recipe, {"popsize": popsize} if "popsize" in inspect.signature(recipe).parameters else {}


def _try(task: Any, strategy: Any) -> None:
    """Trace the first population, so that an impossible setting is an error before a folder is made."""
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


def _go(run: Any, config: dict[str, Any], task: Any, strategy: Any, *, replay: bool, evaluator: Any) -> str:
    """Run, report, and leave curves and a replay in the folder. Returns why it ended."""
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
    run.about = shared.about(config)
    result = minimize(
        task, task.init(key_policy), strategy,
        key=key_run, context=task.context(key_context), update=task.update,
        each=None if task.common_random_numbers else task.each,
        summarize=per_generation, totals=("steps",), **shared.budget(config["budget"]),
        target=None if config["target"] is None else -config["target"], stop=None,
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
        return result.reason  # whoever sent SIGTERM does not wait for long
    _test(task, result, key_policy, key_test)
    shared.draw_curves(run)
    if replay and config["objective"].startswith("brax:") and task.environment.system is not None:
        out = run.path / "replay.html"
        print(f"replay: {_write_replay(run, config, task, result.recommended, result.context, out, 0)}")
    return result.reason


def _test(task: Any, result: Any, key_policy: Any, key_test: Any) -> None:
    """Report the returns of the result in new episodes, beside those of random policies."""
    import jax

    from evoopt.noise import gaussian

    def returns(params: Any, context: Any) -> Any:
        return task.evaluate(params, context, key_test, episodes=EPISODES_OF_A_TEST)["returns"]

    recommended = returns(result.recommended, result.context)
    random = [
        returns(gaussian.draw(key, task.init(key)), result.context).mean()
        for key in jax.random.split(key_policy, EPISODES_OF_A_TEST)
    ]
    if result.best is not None and result.generations:
        best = returns(result.best, result.best_context)
        print(f"best candidate over {EPISODES_OF_A_TEST} new episodes: {float(best.mean()):.1f}")
    print(
        f"return over {EPISODES_OF_A_TEST} new episodes: {float(recommended.mean()):.1f}; "
        f"{len(random)} random policies: mean {float(sum(random)) / len(random):.1f}, best {float(max(random)):.1f}"
    )


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
