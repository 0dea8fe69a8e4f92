"""Packages whose names are imported when they are first used (PEP 562): `evoopt --version` does without JAX."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazily(package: str, modules: Mapping[str, Iterable[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        modules: the names that each module below it offers; a module with no names is offered itself.
    """
    where = {name: module for module, names in modules.items() for name in names}
    own = {module for module, names in modules.items() if not names}

    def get(name: str) -> Any:
        if name in where:
            value = getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        elif name in own:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *where, *own})
