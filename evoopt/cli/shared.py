"""What the commands share: budgets, checks of a run that is read back, workers and devices."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from evoopt.checks import nearest
from evoopt.reading import field, short
from evoopt.types import error

Kinds = dict[str, tuple[type | None, ...]]  # of the entries of a configuration; None where null is allowed
OPTIONAL: Kinds = {"micro_batch": (int, None), "members": (int,), "devices": (bool,)}  # entries that may be missing
UNITS = {
    "": "generations", "g": "generations", "generations": "generations",
    "e": "evaluations", "evals": "evaluations", "evaluations": "evaluations",
    "s": "seconds", "m": "minutes", "h": "hours",
}  # fmt: skip
NO_BITS = ("budget", "target", "display", "eval_every", "patience")  # entries that may change when a run continues


def one_of(what: str, name: str, names: Iterable[str]) -> str:
    """`name`, if it is one of `names`; otherwise an error that suggests the nearest ones."""
    names = list(names)
    if name in names:
        return name
    close = nearest(name, names) if len(names) > 4 else []
    close = close or names
    raise error(f"{what}: {', '.join(close[:12])}", short(name), "a misspelt name; `evoopt list` shows all there are")


def recipes() -> dict[str, Callable[..., Any]]:
    """All strategies by name, without the adapter to evosax."""
    from evoopt import strategies

    return {name: getattr(strategies, name) for name in strategies.__all__ if name != "from_evosax"}


def budget(text: str) -> dict[str, Any]:
    """The argument of `minimize` that `text` means.

    >>> budget("90s"), budget("200"), budget("1e6e")
    ({'seconds': 90.0}, {'generations': 200}, {'evaluations': 1000000})

    Raises:
        ValueError: `text` has another form.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE]\d+)?)\s*([a-z]*)\s*", text)
    unit = UNITS.get(match[2]) if match else None
    try:
        amount = float(match[1]) if match else 0.0
    except ValueError:
        unit, amount = None, 0.0
    if unit is None or not 0 < amount < math.inf:
        raise error(
            "a budget like 100 (generations), 50000e (evaluations), 90s, 10m or 2h", short(text), "an unknown unit"
        )
    if unit in ("seconds", "minutes", "hours"):
        return {"seconds": amount * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]}
    return {unit: int(amount)}


def checked(config: dict[str, Any], kinds: Kinds, where: str) -> None:
    """Check that a configuration read from `where` has every entry that a run needs, each of its kind.

    Raises:
        ValueError: an entry is missing or of another kind; the message names it.
    """
    try:
        for name, kind in (OPTIONAL | kinds).items():
            if name not in kinds and name not in config:
                continue
            value = field(config, name, *kind)
            if type(value) is int and name != "seed" and not 0 < value < 2**31:
                raise ValueError(f'"{name}" is {short(value)}, no size')
        for texts in (config["settings"], config.get("candidates", {})):
            for name in texts:
                field(texts, name, str)
    except ValueError as reason:
        cause = "edited by hand, or a run that was not started by this command"
        raise error(f"the settings of a run in '{where}'", str(reason), cause) from reason


def about(config: dict[str, Any]) -> dict[str, Any]:
    """The entries that decide the bits of a run: with a larger budget it is still the same run."""
    return {"config": {name: value for name, value in config.items() if name not in NO_BITS}}


def is_spread(options: argparse.Namespace) -> bool:
    """Whether devices or workers were asked for."""
    workers = options.workers is not None or options.address is not None
    if options.devices is not None and workers:
        raise error("either --devices or workers", "both", "workers have devices of their own: --worker-gpus")
    return options.devices is not None or workers


def evaluator(options: argparse.Namespace, micro_batch: int | None) -> Any:
    """The evaluator that was asked for, as a context.

    micro_batch: of the run; None for one that was started without workers or devices, and has no evaluator. A run that
        was started with some and is given none now is evaluated by this process, with the same bits.
    """
    spread = is_spread(options)
    if micro_batch is None:
        if spread:
            cause = "workers evaluate micro-batches of a fixed shape, which rounds differently; start a run with them"
            raise error("workers for a run that was started with some", "a run that was started without", cause)
        return contextlib.nullcontext()
    from evoopt.distributed import LocalEvaluator, RayEvaluator, ShardedEvaluator

    if options.devices is not None:
        return ShardedEvaluator(devices(options.devices))
    if options.workers is None and options.address is None:
        return LocalEvaluator()
    return RayEvaluator(options.workers, options.address, cpus=options.worker_cpus, gpus=options.worker_gpus)


def devices(count: str) -> list[Any]:
    """The first `count` devices of this machine, or all."""
    import jax

    there = jax.devices()
    if count == "all":
        return there
    if not count.isdigit() or not 1 <= int(count) <= len(there):
        cause = "more than this machine has, or jax without its CUDA plugin, which sees only the CPU"
        raise error(f"--devices 1 to {len(there)}, or all", f"--devices {count}", cause)
    return there[: int(count)]


def draw_curves(run: Any) -> None:
    """Draw the curves of a run and say where; without matplotlib, say how to install it."""
    try:
        print(f"curves: {run.plot()}")
    except ImportError as missing:
        print(f"no curves: {missing}")
