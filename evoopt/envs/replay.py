"""A trajectory of a Brax environment as one HTML file that plays in a browser without a network.

`brax.io.html` loads its viewer from public hosts and stays blank without them. Here everything is in the page: three.js
and lil-gui from `viewer/`, Brax's own viewer from the installed Brax, the trajectory; a content security policy in
the page forbids the browser to fetch anything else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from evoopt.reading import writing
from evoopt.types import error

# The name that others import a module by, and its file: of this package, and of Brax. Each needs only those before it.
_OURS = {
    "three": "three.module.min.js",
    "three/addons/controls/OrbitControls.js": "OrbitControls.js",
    "lilgui": "lil-gui.esm.min.js",
}
_BRAX = {
    "./animator.js": "animator.js",
    "./selector.js": "selector.js",
    "./system.js": "system.js",
    "viewer": "viewer.js",
}


def render(
    system: Any,
    states: Any,
    *,
    title: str,
    caption: Mapping[str, str] | None = None,
    dt: float | None = None,
    height: int | None = None,
) -> str:
    """The HTML page that replays `states`, in a loop and from the start.

    system: `env.sys` of a Brax environment.
    states: the pipeline states of one episode, as a sequence of T states or as one state whose leaves have leading axis
        T (what `lax.scan` stacks). Only `x` is read: positions (T, links, 3) in metres, rotations (T, links, 4).
    title: plain text, for the tab and the line under the picture.
    caption: shown after the title as "name value", in this order; plain text.
    dt: seconds between two states. Pass `env.dt`: without it, a frame lasts one physics step, which is how Brax's own
        viewer plays, several times too fast where an environment takes several physics steps per action.
    height: of the picture, in CSS pixels; by default the picture and the caption fill the window.

    The replay ends before the first state that has a NaN or an infinity, and the caption says so.
    Raises ImportError without Brax, ValueError for states that are not one episode of this system.

    >>> page = render(env.sys, states, title="hopper", caption={"return": "1042.7"}, dt=env.dt)  # doctest: +SKIP
    """
    trajectory, finite, total = _trajectory(system, states, dt)
    caption = dict(caption or {})
    if finite < total:
        caption["stopped"] = f"no finite state after frame {finite} of {total}"
    bundle = json.dumps({"modules": _modules(), "system": trajectory}, separators=(",", ":"))
    viewer = resources.files("evoopt.envs") / "viewer"
    page = (viewer / "page.html").read_text("utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    parts = {
        # The policy names the one inline script by its hash, so no other text of the page can run as one.
        "hash": "sha256-" + base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode(),
        "title": html.escape(title),
        "caption": "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in caption.items()
        ),
        "flex": "1 0 240px" if height is None else f"0 0 {height:d}px",
        "bundle": base64.b64encode(zlib.compress(bundle.encode(), 9)).decode(),
        "licences": (viewer / "LICENSES.md").read_text("utf-8").strip(),
    }
    return re.sub(r"@(\w+)@", lambda mark: parts[mark[1]], page)


def write(
    path: str | Path,
    system: Any,
    states: Any,
    *,
    title: str,
    caption: Mapping[str, str] | None = None,
    dt: float | None = None,
    height: int | None = None,
) -> Path:
    """Write `render(...)` to `path`, making its directory, and return the path. A link of that name is replaced.

    Raises OSError where it cannot be written.

    >>> write("runs/hopper.html", env.sys, states, title="hopper", dt=env.dt)  # doctest: +SKIP
    PosixPath('runs/hopper.html')
    """
    page = render(system, states, title=title, caption=caption, dt=dt, height=height)
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():  # in a run folder of somebody else it could lead to any file
            path.unlink()
        path.write_text(page, encoding="utf-8", newline="\n")  # the hash in the policy is that of "\n"
    return path


def _modules() -> list[tuple[str, str]]:
    """(name, source) of the viewer's modules, each after those that it imports."""
    ours = resources.files("evoopt.envs") / "viewer"
    brax = resources.files("brax") / "visualizer" / "js"
    return [(name, (ours / file).read_text("utf-8")) for name, file in _OURS.items()] + [
        (name, (brax / file).read_text("utf-8")) for name, file in _BRAX.items()
    ]


def _trajectory(system: Any, states: Any, dt: float | None) -> tuple[dict[str, Any], int, int]:
    """What Brax's viewer plays, the number of states in it, and the number that came."""
    try:
        from brax.base import Transform
        from brax.io import json as brax_json
    except ImportError as missing:
        raise error(
            "the package brax", str(missing), "it is an extra: pip install evoopt-jax[brax]", kind=ImportError
        ) from missing
    if hasattr(states, "x"):
        pos, rot = np.asarray(states.x.pos), np.asarray(states.x.rot)
    else:
        states = list(states)
        pos, rot = np.array([s.x.pos for s in states]), np.array([s.x.rot for s in states])
    links = len(system.link_names)
    if pos.ndim != 3 or pos.shape[0] == 0 or pos.shape[1:] != (links, 3) or rot.shape != (*pos.shape[:2], 4):
        raise error(
            f"positions (T, {links}, 3) and rotations (T, {links}, 4) with T >= 1, for the {links} links of the system",
            f"positions {pos.shape}, rotations {rot.shape}",
            "states of a batch of episodes (take one), or of another environment",
        )
    finite = np.isfinite(pos).all((1, 2)) & np.isfinite(rot).all((1, 2))
    stop = int(np.append(finite, False).argmin())
    if stop == 0:
        raise error("a finite first state", "NaN or infinity", "the simulation had diverged before the first frame")
    frames: Any = [SimpleNamespace(x=Transform(pos=p, rot=r)) for p, r in zip(pos[:stop], rot[:stop], strict=True)]
    # float32 printed as a double has 17 digits; a hundredth of a millimetre is enough to look at.
    trajectory = json.loads(brax_json.dumps(system, frames), parse_float=lambda digits: round(float(digits), 5))
    trajectory["opt"]["timestep"] = float(system.opt.timestep if dt is None else dt)
    # The viewer sets names as innerHTML, and three.js gives some characters of a node's name a meaning.
    geoms: dict[str, Any] = {}
    for name, parts in trajectory["geoms"].items():
        name = re.sub(r"[^\w -]", "_", name)
        while name in geoms:
            name += "_"
        # A plane without a size is drawn as a checkerboard up to the horizon, on which one sees the robot travel. The
        # simulation's planes have no edge either: the size in the model is only how much of them to draw.
        geoms[name] = [part | {"size": [0.0, 0.0, 0.0]} if part["name"] == "Plane" else part for part in parts]
    return trajectory | {"geoms": geoms}, stop, len(pos)
