"""Damaged and forged copies of a file, from a seed, and what a reader may answer to them.

`mutations` knows nothing of the format. `json_mutations` keeps to JSON and changes what it says: for text whose
checksum or length is then made to fit, so that nothing but the structure is left to be checked.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PARTS = ("expected ", "\ngot ", "\nusual cause: ")
# Numbers beyond every type and size, names that lead elsewhere, containers in place of values, and values of others.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**32, 2**53, 2**63, 2**64,
    -(2**63), 10**11, 10**30, 10**400, "", "0", "1", "x", "nan", "Infinity", "../x", "../../../../etc/passwd",
    "/etc/passwd", "/dev/zero", "a\0b", "\ud800", "os:system", "this:d", "é" * 300, "x" * 10_000,
    [], {}, [[]], [0], [-1], [1e9, 1e9], [10**6, 10**6, 10**6], {"a": 1}, [None] * 3, list(range(2000)),
)  # fmt: skip


def mutations(data: bytes, seed: int, count: int = 300) -> Iterator[bytes]:
    """`count` damaged copies: a bit, a byte, a stretch or the end of it is another, missing or too much."""
    rng = random.Random(seed)
    for _ in range(count):
        at = rng.randrange(len(data) + 1)
        at = rng.choice((at, min(at, 64)))  # half of them near the start, where headers are
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 16, 100)))
        kind = rng.randrange(9)
        if kind == 0:
            yield data[:at]
        elif kind == 1:
            yield data[:at] + data[end:]
        elif kind == 2:
            yield data[:at] + rng.randbytes(end - at or 1) + data[at:]
        elif kind == 3:
            yield data[:at] + rng.randbytes(end - at) + data[end:]
        elif kind == 4:
            yield data[:at] + rng.choice((b"\0", b"\xff", b"9", b"[", b'{"')) * rng.choice((1, 8, 5000)) + data[at:]
        elif kind == 5:
            yield data[:at] + (b"\xff" * 7 + b"\x7f")[: end - at] + data[end:]  # a length as large as can be
        elif kind == 6:
            yield data[:end] + data[at:]  # a stretch twice
        elif kind == 7:
            yield data[:at] + data[at:].upper()
        else:
            wrong = bytearray(data or b"\0")
            for _ in range(rng.choice((1, 1, 3))):
                wrong[rng.randrange(len(wrong))] ^= 1 << rng.randrange(8)
            yield bytes(wrong)


def json_mutations(text: str | bytes, seed: int, count: int = 300) -> Iterator[bytes]:
    """`count` copies of a JSON document, each still JSON, in which one or two places are others."""
    rng = random.Random(seed)
    for _ in range(count):
        document = json.loads(text)
        for _ in range(rng.choice((1, 1, 1, 2))):
            document = _mutated(document, rng)
        if rng.random() < 0.02:
            yield _deep(json.dumps(document), rng)
        else:
            yield json.dumps(document).replace(_TWICE, "").encode("utf-8", "surrogatepass")


_TWICE = "\\u0001twice"  # taken out of the written text, it leaves a key that is there twice


def _mutated(document: Any, rng: random.Random) -> Any:
    places = list(_places(document))
    if not places:
        return _odd(rng)
    parent, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{key}\1twice"] = rng.choice((parent[key], _odd(rng)))
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice((key.upper(), key + "_", "", "../" + key))] = parent.pop(key)
    elif kind == 3:
        other, place = rng.choice(places)
        parent[key], other[place] = json.loads(json.dumps([other[place], parent[key]]))  # copies: no circles
    elif kind == 4:
        parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, str(parent[key]), [parent[key]] * 50))
    elif kind == 5 and type(parent[key]) in (int, float):
        number = parent[key]
        parent[key] = rng.choice((-number, number + 1, number * 2, str(number), number + 1e-9 if number < 1e300 else 0))
    else:
        parent[key] = _odd(rng)
    return document


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


def _places(x: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
        yield x, key
        yield from _places(x[key])


def _deep(text: str, rng: random.Random) -> bytes:
    """One number of it nested so deep that a parser that calls itself runs out of stack."""
    at = rng.choice([i for i, c in enumerate(text) if c.isdigit()] or [0])
    return (text[:at] + "[" * 100_000 + "]" * 100_000 + text[at + 1 :]).encode()


def answered_or_refused(read: Callable[[], Any]) -> Any:
    """What `read()` returns; None where it refuses in three parts. Any other exception fails the test."""
    try:
        return read()
    except (ValueError, TypeError, OSError) as reason:
        said = str(reason)
    if not all(part in said for part in PARTS) or len(said) > 3000:
        pytest.fail(f"no error in three parts, or a long one: {said[:2000]}", pytrace=False)
    return None
