"""Reading untrusted files: nothing blocks, no link leads elsewhere, no code runs.

A bad file raises a plain `ValueError` with a short reason; the caller, who knows what the file should have been, turns
it into a three-part error.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from evoopt.types import error

LIMIT = 1 << 25  # most bytes of a JSON document; parsed, it may take twenty times as much memory


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` while `path` is written into a three-part `OSError`."""
    try:
        yield
    except OSError as reason:
        cause = "a full disk, or a folder that does not exist, is read-only or belongs to someone else"
        raise error(f"to write '{path}'", f"{type(reason).__name__}: {reason}", cause, OSError) from reason


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """As `writing`, while `path` is read."""
    try:
        yield
    except OSError as reason:
        if isinstance(reason, (FileNotFoundError, NotADirectoryError)) or "\nusual cause: " in str(reason):
            raise
        cause = "a file that belongs to someone else, or a failing disk"
        raise error(f"to read '{path}'", f"{type(reason).__name__}: {reason}", cause, OSError) from reason


@contextlib.contextmanager
def understood(expected: str, cause: str) -> Iterator[None]:
    """Turn whatever a library raises on untrusted bytes into a three-part error.

    That includes a panic in a Rust library, which is not an `Exception`.
    """
    try:
        yield
    except BaseException as reason:
        panic = type(reason).__name__ == "PanicException"
        if not (panic or isinstance(reason, Exception)) or "\nusual cause: " in str(reason):
            raise
        if isinstance(reason, ImportError):
            raise
        raise error(expected, f"{type(reason).__name__}: {short(reason, 200)}", cause) from reason


def opened(path: str | Path, *, link: bool = False) -> BinaryIO:
    """The regular file `path`, open for reading.

    link: whether it may be a symbolic link. Pass True for a path that the user named, and False for a file found in a
        folder, where a link could lead anywhere.

    Raises:
        OSError: if it does not exist, is a link, or is not a file: a pipe would block forever, a device never end.
    """
    if not link and os.path.islink(path):
        cause = "someone else's folder, whose links could lead anywhere; put the file itself there"
        raise error(f"a file at '{path}'", f"a link to '{os.readlink(path)}'", cause, OSError)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if link else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        cause = "a folder, a pipe or a device with that name"
        raise error(f"a file at '{path}'", "something else", cause, OSError)
    return os.fdopen(descriptor, "rb")


def contents(path: str | Path, limit: int = LIMIT, *, link: bool = False) -> bytes:
    """All bytes of a regular file of at most `limit` bytes. See `opened`."""
    with opened(path, link=link) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{os.path.basename(path)} is longer than {limit:,} bytes")
    return data


def document(data: bytes) -> Any:
    """The JSON document in `data`. It may hold NaN and infinities, but nothing that readers would disagree on.

    >>> document(b'{"a": [1, NaN]}')
    {'a': [1, nan]}
    >>> document(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: no JSON: the key 'a' is there twice
    """
    if len(data) > LIMIT:
        raise ValueError(f"JSON of more than {LIMIT:,} bytes")
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once)
        if b"\\ud" in data.lower():  # half of a surrogate pair is not text and could not be printed
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("no JSON: nested too deeply") from None
    except ValueError as reason:
        raise ValueError(f"no JSON: {short(reason, 200)}") from None
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {short(twice)} is there twice")
    return found


def field(found: Any, name: str, *kinds: type | None, default: Any = ...) -> Any:
    """`found[name]`, which must be of one of `kinds`: a bool is not an int here, an int may serve as a float, and None
    stands for null.

    Raises:
        ValueError: if it is missing or of another kind.

    >>> field({"step": 3}, "step", int), field({}, "rank", int, default=8)
    (3, 8)
    >>> field({"step": True}, "step", int)
    Traceback (most recent call last):
    ValueError: "step" is True, not int
    """
    if type(found) is not dict:
        raise ValueError(f"{short(found)} instead of an object")
    if name not in found:
        if default is not ...:
            return default
        raise ValueError(f'"{name}" is missing')
    value = found[name]
    if type(value) is int and float in kinds and int not in kinds and abs(value) < 2**1023:
        value = float(value)
    if (None if value is None else type(value)) not in kinds:
        names = " or ".join("null" if k is None else k.__name__ for k in kinds)
        raise ValueError(f'"{name}" is {short(value)}, not {names}')
    return value


def short(x: Any, length: int = 60) -> str:
    """`x` for a message: as it would be typed, cut if long."""
    if type(x) in (dict, list) and len(x) > 10:
        return f"a {type(x).__name__} of {len(x)} entries"
    text = str(x) if isinstance(x, BaseException) else repr(x)
    return text if len(text) <= length else text[: length - 3] + "..."
