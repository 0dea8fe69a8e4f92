"""The command `evoopt`: reads the command line, calls what it names, turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from evoopt.cli.names import LANGUAGE, PACKAGES, STATUS
from evoopt.cli.parser import parser


def main(arguments: list[str] | None = None) -> None:
    """Run one command. An error is one message and status 2; Ctrl-C ends with 130, SIGTERM with 143."""
    options = parser().parse_args(arguments)
    try:
        _say(options)
        status = STATUS.get(_command(options.command)(options), 0)
    except KeyboardInterrupt:  # while it loads, at its end, or pressed twice
        print("evoopt: interrupted", file=sys.stderr)
        status = STATUS["interrupted"]
    except (ValueError, TypeError, OSError, ImportError) as problem:
        print(f"evoopt: {problem}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def _say(options: argparse.Namespace) -> None:
    """The first line, before JAX is imported, which takes a second or more."""
    about = next((getattr(options, name) for name in ("environment", "run", "what") if hasattr(options, name)), "")
    print(f"evoopt {options.command} {about}".rstrip() + ": loading ...", file=sys.stderr, flush=True)


def _command(name: str) -> Callable[[argparse.Namespace], Any]:
    """What runs the command `name`. It is imported here, because with it comes JAX."""
    if name == "list":
        return _list
    if name == "resume":
        return _resume
    if name == "explain":
        return _explain
    from evoopt.cli import evolve, finetune

    return {
        "evolve": evolve.evolve,
        "replay": evolve.replay,
        "finetune": finetune.finetune,
        "replay-trajectory": finetune.replay_trajectory,
    }[name]


def _resume(options: argparse.Namespace) -> str:
    from evoopt.cli import evolve, finetune
    from evoopt.run.folder import Run

    run = Run.open(options.run, force=options.force)
    config = {**run.config, **({"budget": options.budget} if options.budget else {})}
    return (finetune if finetune.is_finetuning(config) else evolve).resume(run, config, options)


def _explain(options: argparse.Namespace) -> None:
    import numpy as np

    from evoopt.automatic import TABLE, auto

    about = auto(
        parallel=options.parallel,
        noisy=options.noisy,
        constraints=options.constraints,
        several=options.several,
    )
    choice = about.chosen(np.zeros(options.numbers), options.evaluations)
    for rule in TABLE:
        print(f"{'->' if rule is choice.rule else '  '} {rule.when}: {rule.what}")
    print(f"\n{choice.why}")


def _list(options: argparse.Namespace) -> None:
    if options.what == "strategies":
        _list_strategies()
    else:
        _list_environments()


def _list_strategies() -> None:
    from evoopt import strategies

    names = [name for name in strategies.__all__ if name != "from_evosax"]
    control = [name for name in names if name not in LANGUAGE]
    for head, group in (("search and control", control), ("fine-tuning of language models", LANGUAGE)):
        print(f"{head}:")
        for name in group:
            first_line = (inspect.getdoc(getattr(strategies, name)) or "").split("\n")[0]
            print(f"  {name:24} {first_line}")
    print("evosax:NAME stands for an algorithm of evosax, if that is installed")


def _list_environments() -> None:
    for package in PACKAGES:
        try:
            names = importlib.import_module(f"evoopt.envs.{package}").names()
        except ImportError:
            print(f"{package}: not installed (pip install evoopt-jax[{package}])")
        else:
            print("\n".join(f"{package}:{name}" for name in names))


if __name__ == "__main__":
    main()
