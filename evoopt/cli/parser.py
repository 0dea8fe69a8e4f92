"""The options of every command. Importing this module does not import JAX."""

from __future__ import annotations

import argparse

from evoopt import __version__
from evoopt.cli.names import METRICS, POLICIES, SCHEDULES, TASKS, TRAINED, TRAJECTORY, UPDATES


def parser() -> argparse.ArgumentParser:
    """The parser. What it returns has the command's name in `command`."""
    whole = argparse.ArgumentParser(
        prog="evoopt",
        description="Evolve control policies and fine-tune language models. Every run can be watched and resumed.",
        epilog="`evoopt COMMAND --help` explains the options of a command.",
    )
    whole.add_argument("--version", action="version", version=f"evoopt {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _evolve(commands.add_parser("evolve", help="Evolve a policy in an environment."))
    _finetune(commands.add_parser("finetune", help="Fine-tune a language model without backpropagation."))
    _resume(commands.add_parser("resume", help="Continue a run from its last checkpoint, bit for bit."))
    _replay(commands.add_parser("replay", help="Write an HTML replay of an evolved policy."))
    _replay_trajectory(
        commands.add_parser("replay-trajectory", help="Rebuild fine-tuned weights from the base model, bit for bit.")
    )
    _explain(commands.add_parser("explain", help="Say which strategy is taken if none is given, and why."))
    table = commands.add_parser("list", help="List the strategies or the environments.")
    table.add_argument("what", choices=("strategies", "envs"), help="What to list.")
    return whole


def _explain(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--numbers", type=int, default=10, metavar="D", help="Numbers that are searched (default %(default)s).")
    add("--evaluations", type=int, metavar="N", help="The budget (default 1000 for each number).")
    add("--parallel", type=int, default=1, metavar="N", help="Evaluations at once (default %(default)s).")
    add("--noisy", action="store_true", help="The same candidate has another value the next time.")
    add("--constraints", type=int, default=0, metavar="K", help="Violations that the objective answers.")
    add("--several", action="store_true", help="Several good solutions are wanted.")


def _evolve(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("environment", help="Environment as brax:NAME or gymnax:NAME, for example brax:hopper.")
    add(
        "--strategy", default="openai_es", metavar="NAME",
        help="Search strategy (default %(default)s). `evoopt list strategies` shows all of them; evosax:NAME takes one "
        "from evosax.",
    )  # fmt: skip
    add("--popsize", type=int, default=128, metavar="N", help="Candidates in each generation (default %(default)s).")
    add(
        "--budget", default="100",
        help="When to stop: 100 (generations), 50000e (evaluations), 90s, 10m or 2h (default %(default)s).",
    )  # fmt: skip
    add("--policy", default="linear", help=f"Policy to evolve: {_either(POLICIES)} (default %(default)s).")
    add(
        "--target", type=float, metavar="RETURN",
        help="Stop as soon as a candidate reaches this return, confirmed in 16 new episodes.",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="Seed of all random numbers (default %(default)s).")
    _folder(command)
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="Change one setting of the strategy, environment or policy, for example sigma=0.05, episode_length=300 or "
        "hidden=64,64. This option may be repeated.",
    )  # fmt: skip
    _no_replay(command)
    add(
        "--micro-batch", type=int, metavar="N",
        help="Candidates that each worker evaluates at once (default popsize / 8, at most 16). This number affects the "
        "last bits of the result; the number of workers does not.",
    )  # fmt: skip
    _workers(command)


def _finetune(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, help="Model to fine-tune: a Hugging Face folder or a GGUF file.")
    add("--data", required=True, metavar="FILE", help="Training rows: a file with one JSON object per line.")
    add(
        "--eval", metavar="FILE",
        help="Held-out rows, in the same form as --data. The parameters that score best on them are kept.",
    )  # fmt: skip
    add("--task", default="completion", help=f"Kind of task: {_either(TASKS)} (default %(default)s).")
    add("--prompt", help='Template that is filled from the fields of a row, for example "{text} It was".')
    add(
        "--candidate", action="append", default=[], metavar="LABEL=TEXT",
        help='Text that stands for a label, for example "1= great". Give this option once for each label.',
    )  # fmt: skip
    add(
        "--metric", default="loss",
        help=f"What to optimize: {_either(METRICS)}, or MODULE:FUNCTION, a function of (predictions, labels) that "
        "returns a score (default %(default)s).",
    )  # fmt: skip
    add("--train", default="full", help=f"Part of the model to train: {_either(TRAINED)} (default %(default)s).")
    add(
        "--strategy", default="mezo", metavar="NAME",
        help="Search strategy (default %(default)s). `evoopt list strategies` shows all of them; optax:NAME uses "
        "backpropagation.",
    )  # fmt: skip
    add("--popsize", type=int, metavar="N", help="Forward passes in each step (by default the strategy decides).")
    add(
        "--budget", default="1000",
        help="When to stop: 1000 (steps), 2000e (forward passes), 90s, 10m or 2h (default %(default)s).",
    )  # fmt: skip
    add("--batch-size", type=int, default=16, metavar="N", help="Rows in each step (default %(default)s).")
    add(
        "--micro-batch", type=int, metavar="N",
        help="Rows that the model reads at once (by default the whole batch). A smaller number takes less memory.",
    )  # fmt: skip
    add(
        "--members", type=int, default=1, metavar="N",
        help="Candidates evaluated at once (default %(default)s). More are faster for a small model, but take as many "
        "times the memory.",
    )  # fmt: skip
    add("--dtype", default="float32", help="Type of the weights: float32 or bfloat16 (default %(default)s).")
    add(
        "--update", default="stochastic",
        help=f"How bfloat16 weights are updated: {_either(UPDATES)} (default %(default)s). The first rounds at random, "
        "the second keeps a float32 copy of the weights.",
    )  # fmt: skip
    add(
        "--schedule", default="constant",
        help=f"Schedule of the learning rate: {_either(SCHEDULES)} (default %(default)s).",
    )  # fmt: skip
    add("--eval-every", type=int, default=100, metavar="N", help="Steps between two evaluations (default %(default)s).")
    add(
        "--patience", type=int, default=20, metavar="N",
        help="Stop after this many steps in a row without a finite loss (default %(default)s).",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="Seed of all random numbers (default %(default)s).")
    _folder(command)
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="Change one setting of the strategy, the task or the trained part, for example learning_rate=1e-6 or "
        "rank=4. This option may be repeated.",
    )  # fmt: skip
    _workers(command)


def _resume(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="Run folder to continue.")
    command.add_argument("--budget", help="New budget, in the form given at the start and counted from there.")
    command.add_argument(
        "--force", action="store_true",
        help="Continue although settings, versions or the device have changed. The result then differs from that of an "
        "uninterrupted run.",
    )  # fmt: skip
    command.add_argument(
        "--metric", metavar="MODULE:FUNCTION",
        help="Name the metric of a fine-tuning run again if it is a function of your own. This confirms that its code "
        "may run.",
    )  # fmt: skip
    _no_replay(command)
    _workers(command)


def _replay(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="Run folder of `evoopt evolve`.")
    command.add_argument("--out", metavar="FILE", help="HTML file to write (default RUN/replay.html).")
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="Seed of the episode to show (default %(default)s)."
    )


def _replay_trajectory(command: argparse.ArgumentParser) -> None:
    command.add_argument("trajectory", help=f"Trajectory file of a fine-tuning run: RUN/{TRAJECTORY}.")
    command.add_argument("--base", required=True, metavar="MODEL", help="Model that was fine-tuned.")
    command.add_argument("--out", required=True, metavar="FOLDER", help="New folder for the rebuilt model.")
    command.add_argument(
        "--any-version", action="store_true",
        help="Try with a version of jax other than the one that made the recording.",
    )  # fmt: skip


def _folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", help="Name of the run folder (by default made from the settings).")
    command.add_argument(
        "--runs", default="runs", metavar="FOLDER", help="Parent of run folders (default %(default)s)."
    )


def _no_replay(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-replay", action="store_true", help="Do not write the HTML replay at the end.")


def _workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--devices", metavar="N", help="Share the evaluation among N devices of this machine; `all` takes every device."
    )
    add = command.add_argument_group("evaluation by Ray workers", "docs/cluster.md describes clusters.").add_argument
    add(
        "--workers", type=int, metavar="N",
        help="Number of Ray workers. With --address alone there are as many as the cluster has room for.",
    )  # fmt: skip
    add(
        "--address", metavar="HOST:PORT",
        help="Address of a running Ray cluster, or auto to find it. Without an address a cluster starts here.",
    )  # fmt: skip
    add(
        "--worker-cpus", type=float, default=1.0, metavar="N",
        help="CPU cores for each worker (default %(default)g).",
    )  # fmt: skip
    add("--worker-gpus", type=float, default=0.0, metavar="N", help="GPUs for each worker (default %(default)g).")


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
