"""Gradient-free and evolutionary optimization in JAX: one ask/tell protocol for all of it."""

import importlib
import importlib.util
import sys
from types import ModuleType as _ModuleType  # `types` is a module of ours
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evoopt.loop import Loop as Loop
    from evoopt.minimize import Result as Result
    from evoopt.minimize import minimize as minimize
    from evoopt.population import Population as Population
    from evoopt.strategy import Strategy as Strategy

__version__ = "0.1.0"
__all__ = ["Loop", "Population", "Result", "Strategy", "minimize"]
_WHERE = {"Loop": "loop", "Result": "minimize", "minimize": "minimize", "Population": "population"}
_WHERE["Strategy"] = "strategy"


def __getattr__(name: str) -> Any:
    """Names and modules are imported when they are used: `evoopt --version` does without JAX."""
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        setattr(sys.modules[__name__], name, value)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(_ModuleType):
    """`evoopt.minimize` is the function, though a module has the name too: importing that must not hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        own = name == "minimize" and isinstance(value, _ModuleType)
        super().__setattr__(name, value.minimize if own else value)


sys.modules[__name__].__class__ = _Package
