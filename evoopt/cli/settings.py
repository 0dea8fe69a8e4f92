"""What `--set KEY=VALUE` may say: whose setting it is, and whether the value is of its kind."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from evoopt.types import error

Function = Callable[..., Any]
BY_NAME = ("noise", "utility", "optimizer")  # settings whose value is the name of a function
WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "None": "none", "str": "text",
    "Any": "a number, or several with commas", "Array": "a number, or several with commas",
}  # fmt: skip


def converted(key: str, text: str, value: Any, function: Function) -> Any:
    """`value`, which was read from `text`, as the argument `key` of `function`.

    >>> def make(steps: int, hidden: tuple[int, ...] = (32,), names: Sequence[str] = ()): ...
    >>> converted("steps", "1e3", 1000.0, make), converted("hidden", "64", 64, make)
    (1000, (64,))
    >>> converted("names", "q,v", "q,v", make)
    ('q', 'v')

    Raises:
        ValueError: it is of another kind, or cannot be said on a command line.
    """
    kinds = str(inspect.signature(function).parameters[key].annotation).split(" | ")
    for kind in kinds:
        found = _as(kind, text, value)
        if found is not NotImplemented:
            return found
    words = [word for kind in kinds if (word := _words(kind))]
    if not [word for word in words if word != "none"]:
        raise error(f"--set {key} from Python only", f"{key}={text}", "a function, which has no form on a command line")
    name = function.__name__
    raise error(f"{key}=VALUE, {' or '.join(words)}", f"{key}={text}", f"a value that {name} has another kind for")


def given(name: str, words: Mapping[str, str]) -> None:
    """Refuse a setting that another option gives."""
    if name in words:
        raise error(f"{name} by {words[name]}", f"--set {name}=...", "a setting that has an option of its own")


def owners(key: str, others: Mapping[str, Function]) -> list[str]:
    """Which of `others` has a setting `key`."""
    return [name for name, function in others.items() if key in inspect.signature(function).parameters]


def _as(kind: str, text: str, value: Any) -> Any:
    """`value` as one `kind`; NotImplemented where it is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "None" and value is None:
        return None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and number and value == value and abs(value) < 2**63 and value == int(value):
        return int(value)
    if kind == "float" and number:
        return float(value) if abs(value) < 2**1000 else NotImplemented
    if kind == "str":
        return text
    if kind == "Sequence[str]":
        parts = value if isinstance(value, (tuple, list)) else text.split(",")
        return tuple(str(part).strip() for part in parts)
    if match := re.fullmatch(r"tuple\[(.*)\]", kind):
        inner = match[1].split(", ")
        parts = list(value) if isinstance(value, (tuple, list)) else [value]
        inner = inner[:1] * len(parts) if inner[1:] == ["..."] else inner
        found = [_as(k, text, part) for k, part in zip(inner, parts, strict=False)]
        return tuple(found) if parts and len(parts) == len(inner) and NotImplemented not in found else NotImplemented
    if kind in ("Any", "Array") and (value is None or number or isinstance(value, (bool, tuple, list))):
        return value
    return NotImplemented


def _words(kind: str) -> str:
    if kind.startswith("tuple["):
        some = kind[6:-1].split(", ")
        count = "one or more" if some[-1] == "..." else str(len(some))
        return f"{count} {'whole numbers' if some[0] == 'int' else 'numbers'} with commas"
    return "names with commas" if kind == "Sequence[str]" else WORDS.get(kind, "")
