"""Calls into libraries of environments: imported without noise, with clear errors where they or a name are missing."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from evoopt.checks import nearest
from evoopt.reading import short
from evoopt.types import error

# Known warnings of these libraries, which say nothing about the caller's code.
_WARNINGS = (
    ("JAXopt is no longer maintained", DeprecationWarning),
    ("Brax System, piplines and environments are not actively", UserWarning),
    ("Accessing `.*` directly from `Data` is deprecated", DeprecationWarning),
)


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Wraps calls of these libraries: drops their known warnings, and lets JAX promote types the way they expect."""
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        for message, category in _WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


def load(module: str, install: str | None = None) -> Any:
    """Import a module of another library, without what it prints while it is imported.

    Args:
        module: its name.
        install: what pip calls it, where that is no extra of evoopt.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    extra = module.split(".")[0]
    how = f"not needed otherwise: pip install {install}" if install else f"an extra: pip install evoopt-jax[{extra}]"
    said = io.StringIO()
    try:
        with foreign(), contextlib.redirect_stdout(said):
            return importlib.import_module(module)
    except ImportError as missing:
        raise error(f"the package {extra}", f"{missing}", f"it is {how}", ImportError) from missing
    finally:  # MuJoCo prints that the optional package warp is missing; anything else passes
        lines = said.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if not line.startswith("Failed to import")))


def known(what: str, name: str, names: Iterable[str]) -> None:
    """Raise ValueError, with the nearest names, unless `name` is one of `names`."""
    names = sorted(names)
    if name not in names:
        near = nearest(name, names)
        raise error(
            f"{what}, one of {', '.join(names)}",
            short(name),
            f"a misspelling of {' or '.join(map(repr, near))}" if near else "a name of another package or version",
        )
