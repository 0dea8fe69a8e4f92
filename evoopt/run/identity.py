"""A run's identity, in a form that another process can compare: strategy, key, versions, device.

A description has only JSON's types. Functions are named along with the values they close over, so that two optimizers
with different learning rates differ here too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import types
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.core import Tracer

from evoopt.run.checkpoint import versions

DEPTH = 16  # depth of a description; deeper parts are named by their type


def describe(x: Any, depth: int = DEPTH) -> Any:
    """`x` in JSON's types, equal for equal configurations in any process.

    >>> from evoopt.strategies import snes
    >>> describe(snes(16)) == describe(snes(16)), describe(snes(16)) == describe(snes(32))
    (True, False)
    """
    inner = functools.partial(describe, depth=depth - 1)
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return float(x).hex() if not x.is_integer() else x
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _array(x)
    if depth == 0:
        return _name(type(x))
    if isinstance(x, type):
        return _name(x)
    if dataclasses.is_dataclass(x):
        fields = {f.name: inner(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return {"type": _name(type(x)), **fields}
    if isinstance(x, tuple) and (names := getattr(x, "_fields", ())):
        return {"type": _name(type(x)), **{name: inner(value) for name, value in zip(names, x, strict=True)}}
    if isinstance(x, (list, tuple)):
        return [inner(value) for value in x]
    if isinstance(x, dict):
        return {str(key): inner(value) for key, value in x.items()}
    if isinstance(x, functools.partial):
        return {"function": inner(x.func), "arguments": inner(x.args), "named": inner(x.keywords)}
    if isinstance(x, types.MethodType):
        return {"function": _name(x.__func__), "of": inner(x.__self__)}
    if isinstance(x, types.FunctionType):
        cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
        held = {name: inner(_held(cell)) for name, cell in cells}
        defaults = inner([x.__defaults__, x.__kwdefaults__]) if x.__defaults__ or x.__kwdefaults__ else None
        more = {"holds": held, "defaults": defaults}
        return {"function": _name(x), "code": _code(x.__code__)[:12], **{name: y for name, y in more.items() if y}}
    return {"type": _name(type(x)), **({"name": _name(x)} if hasattr(x, "__qualname__") else {})}


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """The differences between two descriptions, one line each."""
    if isinstance(then, dict) and isinstance(now, dict):
        names = [*then, *(name for name in now if name not in then)]
        parts = [(f"{path}.{name}" if path else name, then.get(name), now.get(name)) for name in names]
        return [line for name, a, b in parts for line in differences(a, b, name)]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        parts = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(then, now, strict=True))]
        return [line for name, a, b in parts for line in differences(a, b, name)]
    return [] if then == now else [f"{path}: {_shown(then)} then, {_shown(now)} now"]


def of_run(strategy: Any, key: Any, x0: Any) -> dict[str, Any]:
    """Everything that must stay the same for a run to continue with the same bits."""
    device = jax.devices()[0]
    return {
        "strategy": describe(strategy),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "parameters": {
            str(i): [list(np.shape(x)), str(np.asarray(x).dtype)] for i, x in enumerate(jax.tree.leaves(x0))
        },
        "versions": {**versions(), "jaxlib": jaxlib.__version__},
        "device": {"platform": device.platform, "kind": device.device_kind},
        "x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
    }


def _code(code: types.CodeType) -> str:
    """A digest of a function's behaviour: its instructions, and the names and numbers they use."""
    used = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, used)).encode()).hexdigest()


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _array(x: Any) -> Any:
    if isinstance(x, Tracer):
        return {"array": str(x.aval)}
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    if x.size == 1 and x.dtype.kind in "fiub":
        return {"number": repr(x.item()), "dtype": str(x.dtype)}
    data = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]
    return {"array": [list(x.shape), str(x.dtype), data]}


def _name(x: Any) -> str:
    return f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', type(x).__qualname__)}"


def _shown(x: Any) -> str:
    if isinstance(x, str) and x.startswith(("0x", "-0x")):
        with contextlib.suppress(ValueError, OverflowError):  # then it is text of another kind
            return repr(float.fromhex(x))
    text = str(x["number"] if isinstance(x, dict) and "number" in x else x)
    return text if len(text) <= 60 else text[:57] + "..."
