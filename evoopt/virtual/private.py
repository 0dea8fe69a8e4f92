"""Every private part of jax and quax that virtual leaves use, and the one change to a class of quax.

Nothing else in the package imports a private name of another one. It was tested with the versions in `TESTED`; where
another version lacks one of these names, importing this module raises an error that says so.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from evoopt.types import error

TESTED = "jax 0.10.2 and quax 0.4.6"

try:
    import quax
    from jax._src.core import ShapedArray, set_current_trace
    from jax._src.source_info_util import current, user_frames
    from quax._compat import unpack_scan_args
    from quax._primitives import scan_quax
    from quax._trace import _QuaxTrace
except ImportError as missing:
    version = importlib.metadata.version
    raise error(
        f"the private parts of {TESTED}, with which virtual leaves were tested",
        f"jax {version('jax')} and quax {version('quax')}: {missing}",
        "one of them was upgraded; install the tested versions",
        ImportError,
    ) from missing

__all__ = ["TESTED", "ShapedArray", "line_of_the_model", "scan_quax", "unpack_scan_args"]


def line_of_the_model(*folders: str) -> str:
    """File, line and function that are being traced, where the file is neither part of quax nor in `folders`."""
    for f in user_frames(current().traceback):
        if not f.file_name.startswith((*folders, *quax.__path__)):
            return f"{f.file_name}:{f.start_line} ({f.function_name})"
    return "unknown"


def _primal(self: Any, primitive: Any, function: Any, fwd: Any, bwd: Any, tracers: Any, **params: Any) -> Any:
    """The function itself: nothing is differentiated through virtual leaves."""
    del primitive, fwd, bwd, params
    with set_current_trace(self):
        return function.call_wrapped(*tracers)


if "process_custom_vjp_call" not in vars(_QuaxTrace):  # quax 0.4 refuses functions with a derivative of their own
    _QuaxTrace.process_custom_vjp_call = _primal  # type: ignore[method-assign]
