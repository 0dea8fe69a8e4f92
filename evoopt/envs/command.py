"""A program as the objective: a candidate becomes its command line, its output the value."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evoopt.types import error

LOG = logging.getLogger("evoopt.envs")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|inf\b|nan\b)")


@dataclasses.dataclass(frozen=True)
class Command:
    """A program as an objective; see `command`."""

    arguments: tuple[str, ...] | Callable[[Any], Sequence[str]]
    parse: Callable[[str], Any]
    timeout: float | None
    environment: tuple[tuple[str, str], ...]

    def line(self, candidate: Any) -> list[str]:
        """The command line of a candidate."""
        if callable(self.arguments):
            return [str(word) for word in self.arguments(candidate)]
        values = candidate if isinstance(candidate, dict) else {"x": candidate}
        shown = {name: _shown(value) for name, value in values.items()}
        try:
            return [word.format(**shown) for word in self.arguments]
        except (KeyError, IndexError) as missing:
            cause = "a name misspelt, or a variable that does not exist under a condition: give a function instead"
            raise error(f"a value for every name in {self.arguments}", f"none for {missing}", cause) from None

    def __call__(self, candidate: Any) -> Any:
        """What `parse` makes of the output; NaN, with a line in the log, for a program that fails or takes too long."""
        line = self.line(candidate)
        try:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **dict(self.environment)}, start_new_session=True,
            )  # fmt: skip
        except OSError as reason:
            raise error("a program that can be started", f"{line[0]}: {reason}", "a path misspelt") from reason
        try:
            out, err = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            LOG.warning("no value for %s: longer than %g s", " ".join(line), self.timeout)
            return math.nan
        finally:  # with all that it started, whatever ended it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        if process.returncode != 0:
            last = (err.strip().splitlines() or ["no message"])[-1]
            LOG.warning("no value for %s: status %d, %s", " ".join(line), process.returncode, last)
            return math.nan
        return self.parse(out)


def command(
    arguments: Sequence[str] | Callable[[Any], Sequence[str]],
    parse: Callable[[str], Any] | None = None,
    *,
    timeout: float | None = None,
    environment: dict[str, str] | None = None,
) -> Command:
    """An objective that runs a program, for `minimize(..., jit=False)`; in parallel by `ThreadEvaluator(8)`.

    Args:
        arguments: the command line, in which "{name}" is the candidate's value of that name, of a candidate that is no
            dict "{x}" (numbers in full precision, arrays with commas); or a function candidate -> command line. There
            is no shell.
        parse: the program's output -> a number, or None for no answer. None: the last number in it.
        timeout: seconds; then the program is killed with all that it started, and its candidate has no value (NaN).
        environment: variables of the program, besides this one's.

    Raises:
        ValueError: a program that can't be started, or a name that the candidate does not have.

    >>> f = command(["expr", "{n}", "*", "{n}"])
    >>> f({"n": 7}), f.line({"n": np.int32(3)})
    (49.0, ['expr', '3', '*', '3'])
    """
    words = arguments if callable(arguments) else tuple(str(word) for word in arguments)
    return Command(words, parse or last_number, timeout, tuple((environment or {}).items()))


def last_number(text: str) -> float:
    """The last number in a text.

    Raises:
        ValueError: if there is none.

    >>> last_number("step 1000: loss = -1.5e-3, done")
    -0.0015
    """
    found = NUMBER.findall(text)
    if not found:
        raise error("a number in the program's output", repr(text[-80:]), "an output of another form: give `parse`")
    return float(found[-1])


def _shown(x: Any) -> str:
    if isinstance(x, (list, tuple)) or np.ndim(x) > 0:
        return ",".join(_shown(one) for one in (x if isinstance(x, (list, tuple)) else np.ravel(x)))
    x = x.item() if isinstance(x, (np.ndarray, np.generic)) else x
    return repr(x) if isinstance(x, float) else str(x)
