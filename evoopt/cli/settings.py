"""What `--set KEY=VALUE` may say: whose setting it is, and whether the value is of its kind."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from evoopt.cli.shared import one_of
from evoopt.types import error

Function = Callable[..., Any]
BY_NAME = {"noise": "evoopt.noise", "utility": "evoopt.shaping", "optimizer": "optax"}  # a function of this module
WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "None": "none", "str": "text",
    "Any": "a number, or several with commas", "Array": "a number, or several with commas",
}  # fmt: skip


def pair(text: str, form: str = "--set KEY=VALUE") -> tuple[str, str]:
    """The two sides of the first = in `text`, as they are.

    Raises:
        ValueError: there is no =; the error names `form`.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise error(form, repr(text), "a space instead of the =")
    return key, value


def read(texts: list[str]) -> dict[str, str]:
    """The settings of a command line by key, as text.

    >>> read(["sigma=0.1", "strategy.noise = rademacher"])
    {'sigma': '0.1', 'strategy.noise': 'rademacher'}
    """
    pairs = map(pair, texts)
    return {key.strip(): value.strip() for key, value in pairs}


def chosen(
    settings: Mapping[str, str], functions: Mapping[str, Function], others: Mapping[str, Function],
    given: Mapping[str, str],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The settings as arguments: part of the run -> its function's keyword arguments.

    settings: key -> text. A key is `strategy.sigma`, or `sigma` where only one part has it.
    functions: part of the run -> the function that makes it.
    others: functions that were not chosen; an error names those that have the setting.
    given: settings that another option gives -> that option.

    Raises:
        ValueError: a setting that no part has, that several have, or a value of another kind.
    """
    places = {place: [name for name in names(f) if name not in given] for place, f in functions.items()}
    found: dict[str, dict[str, Any]] = {place: {} for place in places}
    for key, text in settings.items():
        name = key.rpartition(".")[2]
        if not any(name in here for here in places.values()):
            _refuse(key, name, others, given)
        place, name = _place(key, places)
        found[place][name] = (
            _by_name(name, text) if name in BY_NAME else converted(name, text, _literal(text), functions[place])
        )
    return found


def names(function: Function) -> list[str]:
    """The settings that `function` takes."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]


def _refuse(key: str, name: str, others: Mapping[str, Function], given: Mapping[str, str]) -> None:
    """Refuse a setting that another option gives, or that belongs to what was not chosen."""
    if name in given:
        raise error(f"{name} by {given[name]}", f"--set {name}=...", "a setting that has an option of its own")
    if owners := [other for other, function in others.items() if name in names(function)]:
        raise error("a setting of what was chosen", f"--set {key}", f"it is one of {', '.join(owners[:6])}")


def _place(key: str, places: dict[str, list[str]]) -> tuple[str, str]:
    """(part, setting) that `key` means."""
    place, dot, rest = key.partition(".")
    if dot:
        one_of("a part of the run", place, places)
        return place, one_of(f"a setting of the {place}", rest, places[place])
    having = [place for place, here in places.items() if key in here]
    if len(having) > 1:
        raise error(f"one of {', '.join(f'{p}.{key}' for p in having)}", key, "several parts have this setting")
    if not having:
        one_of("a setting", key, sorted({name for here in places.values() for name in here}))
    return having[0], key


def _by_name(key: str, text: str) -> Any:
    """The noise, utility or optax transformation called `text`."""
    module = importlib.import_module(BY_NAME[key])
    if key == "optimizer" and hasattr(module, f"scale_by_{text}"):
        return getattr(module, f"scale_by_{text}")()
    if not text.startswith("_") and hasattr(module, text):
        return getattr(module, text)
    raise error(f"a name in {module.__name__}", repr(text), "a misspelt name")


def _literal(text: str) -> Any:
    """`text` as a Python literal; itself where it is none."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: brackets too deep
        return text


def converted(key: str, text: str, value: Any, function: Function) -> Any:
    """`value`, read from `text`, as the argument `key` of `function`.

    >>> def make(steps: int, hidden: tuple[int, ...] = (32,), names: Sequence[str] = ()): ...
    >>> converted("steps", "1e3", 1000.0, make), converted("hidden", "64", 64, make)
    (1000, (64,))
    >>> converted("names", "q,v", "q,v", make)
    ('q', 'v')

    Raises:
        ValueError: it is of another kind, or has no form on a command line.
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
    raise error(f"{key}=VALUE, {' or '.join(words)}", f"{key}={text}", f"{name} takes another kind of value")


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
