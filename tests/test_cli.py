"""The command line before anything is loaded: help, usage, and the first line of every command."""

import argparse
import importlib
import subprocess
import sys
import time

import pytest

from evoopt.cli import evolve, finetune, names
from evoopt.cli.parser import parser

COMMANDS = ["evolve", "finetune", "resume", "replay", "replay-trajectory", "explain", "list"]


def actions(command=None):
    """The options of the command line, or of one command."""
    found = parser()._actions
    if command is not None:
        of_commands = next(a for a in found if isinstance(a, argparse._SubParsersAction))
        found = of_commands.choices[command]._actions
    return [a for a in found if not isinstance(a, argparse._SubParsersAction) and a.dest not in ("help", "version")]


def test_every_command_is_there():
    of_commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert list(of_commands.choices) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_is_a_sentence_that_says_the_default(command):
    assert actions(command)
    for action in actions(command):
        text = action.help or ""
        assert text[:1].isupper(), action.dest
        assert text.endswith("."), action.dest
        assert not text.startswith("Of "), action.dest
        if action.default not in (None, False, []):
            assert "(default %(default)" in text, action.dest


def test_the_names_in_help_are_those_that_are_known():
    from evoopt import strategies
    from evoopt.envs import policies
    from evoopt.envs.language import data

    assert set(names.LANGUAGE) <= set(strategies.__all__)
    for module, known in ((policies, names.POLICIES), (data, names.TASKS)):
        assert all(callable(getattr(module, name)) for name in known)
    for package in names.PACKAGES:
        assert importlib.util.find_spec(f"evoopt.envs.{package}")
    assert callable(evolve.resume)
    assert callable(finetune.resume)


def test_help_and_usage_do_without_jax():
    code = "import sys\nfrom evoopt.cli.main import main\n"
    for given in (["--help"], ["evolve", "--help"], ["finetune"], ["evolve", "brax:hopper", "--popsize", "x"]):
        code += f"try: main({given})\nexcept SystemExit: pass\n"
    code += "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["evolve", "brax:hopper"], "evoopt evolve brax:hopper: loading ..."),
        (["finetune", "--model", "m", "--data", "d"], "evoopt finetune: loading ..."),
        (["resume", "runs/x"], "evoopt resume runs/x: loading ..."),
        (["list", "strategies"], "evoopt list strategies: loading ..."),
    ],
)
def test_the_first_line_is_said_before_jax_is_imported(given, said):
    """JAX is not there at all in this process, so the command fails; its first line was said before."""
    code = f"import sys\nsys.modules['jax'] = None\nfrom evoopt.cli.main import main\nmain({given})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 2
    assert out.stderr.splitlines()[0] == said


def test_the_version_is_said_at_once():
    quick = []
    for _ in range(5):  # the best of five: other processes run on this machine too
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "evoopt", "--version"], check=True, capture_output=True)
        quick.append(time.perf_counter() - start)
    assert min(quick) < 0.3
