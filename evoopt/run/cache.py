"""Compiled programs on disk: JAX's persistent cache, in the user's cache folder unless they say otherwise."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path

import jax

MOST = 2000  # entries; the oldest half goes when there are more
VARIABLE = "EVOOPT_CACHE"  # a folder, or `off`


@functools.cache
def enable() -> Path | None:
    """Let JAX keep compiled programs between processes; nothing happens where the user has set JAX's cache up.

    The folder is `EVOOPT_CACHE`, or `evoopt` in the user's cache folder; `EVOOPT_CACHE=off` keeps nothing. Any number
    of processes may use it. An entry that is damaged is compiled again.

    Returns:
        The folder, None where evoopt keeps nothing.
    """
    said = os.environ.get(VARIABLE, "")
    if said.lower() in ("off", "0", "no", "none", "false") or getattr(jax.config, "jax_compilation_cache_dir", None):
        return None
    base = Path(said).expanduser() if said else _cache_home() / "evoopt"
    folder = base / f"programs-{_machine()}"
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder)
    except OSError:  # a home that cannot be written
        return None
    if new:
        print(f"evoopt: compiled programs are kept in '{folder}'; {VARIABLE}=off keeps none", file=sys.stderr)
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # JAX looks for a folder once, and may have done so
    for verb in ("reading", "writing"):
        warnings.filterwarnings("ignore", f"Error {verb} persistent compilation cache entry", UserWarning)
    return folder


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _machine() -> str:
    """Eight letters for this kind of machine: programs of one processor may not run on another, in a shared home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]


def _prune(folder: Path) -> None:
    entries = [entry for entry in os.scandir(folder) if entry.is_file()]
    if len(entries) <= MOST:
        return

    def age(entry: os.DirEntry[str]) -> float:
        try:
            return entry.stat().st_mtime
        except OSError:  # another process removed it
            return 0.0

    for entry in sorted(entries, key=age)[: len(entries) // 2]:
        Path(entry.path).unlink(missing_ok=True)
