"""Random damage and malice for JSON, YAML, safetensors and plain bytes, each from a seeded generator."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

DEEP = 50_000


def junk(rng: Random, outside: Path) -> Any:
    """A value of any of JSON's types, at its limits, or a name that leads elsewhere."""
    numbers = [0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**40, 0.5, -1e300, 1e308, -0.0]
    names = [
        "",
        "x",
        "\0",
        "\x1b[2J\x1b]0;owned\x07",
        "../../../outside/precious.txt",
        "..",
        "/etc/hostname",
    ]
    names += [str(outside / "precious.txt"), "shard-00000.safetensors/..", "é🐈‮", "a" * 5000]
    code = ["helpers:load", "helpers.load", "os:system", "builtins:eval", "__import__('helpers')"]
    nested = [[], [[]], [None], ["x"], [-1], [2**62, 2**62], {}, {"a": []}, {"file": 3}, [{}] * 3]
    return rng.choice([None, True, False, *numbers, *names, *code, *nested])


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found, stack = [], [value]
    while stack:
        item = stack.pop()
        keys = (
            item.keys()
            if isinstance(item, dict)
            else range(len(item))
            if isinstance(item, list)
            else ()
        )
        for key in keys:
            found.append((item, key))
            stack.append(item[key])
    return found


def edited(rng: Random, value: Any, outside: Path) -> Any:
    """A copy of a JSON value with one to three edits."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = nodes(value)
        if not places:
            return junk(rng, outside)
        holder, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.55:
            holder[key] = junk(rng, outside)
        elif kind < 0.7:
            del holder[key]
        elif kind < 0.8:
            holder[key] = [holder[key], holder[key]]
        elif kind < 0.9 and isinstance(holder, dict):
            holder[str(junk(rng, outside))] = junk(rng, outside)
        else:
            other, name = rng.choice(places)
            taken = json.loads(json.dumps(other[name])) if name in _keys(other) else None
            holder[key] = taken
    return value


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def json_text(rng: Random, value: Any, outside: Path) -> bytes:
    """JSON of an edited value, one in five times not even well-formed."""
    text = json.dumps(edited(rng, value, outside))
    kind = rng.randrange(20)
    if kind > 5:
        return text.encode()
    return (
        text[: rng.randrange(len(text) + 1)].encode(),
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP,
        text.replace("0", rng.choice(("NaN", "-Infinity", "1e999", "0" * 5000)), 1).encode(),
        b"\xff\xfe" + text.encode("utf-16-le"),
        damaged(rng, text.encode()),
    )[kind]


def damaged(rng: Random, data: bytes) -> bytes:
    """Bytes cut, flipped, filled with zeros, repeated, or gone."""
    at = rng.randrange(len(data) + 1)
    length = rng.randrange(1, 64)
    return rng.choice(
        (
            b"",
            data[:at],
            data[:at] + bytes(length) + data[at + length :],
            data[:at] + bytes(rng.randrange(256) for _ in range(length)) + data[at + length :],
            data[:at] + bytes(len(data) - at),
            data[:at]
            + data[at : at + 1].translate(bytes(255 - i for i in range(256)))
            + data[at + 1 :],
            data + data[:at],
            data + b"\0" * length,
        )
    )


def tensors_file(rng: Random, data: bytes, outside: Path) -> bytes:
    """A safetensors file whose header lies, or whose bytes are damaged."""
    if rng.random() < 0.25:
        return damaged(rng, data)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        size = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_000))
        return struct.pack("<Q", size) + data[8:]
    name = rng.choice([key for key in header if key != "__metadata__"])
    if kind < 0.35:
        side = rng.choice((2**40, 2**62, 2**63, 0, -1, 1))
        header[name]["shape"] = [side] * rng.choice((1, 2, 3))
        if rng.random() < 0.5:
            header[name]["data_offsets"] = [0, abs(side) * 4]
    elif kind < 0.45:
        header[name]["dtype"] = rng.choice(
            ("F64", "I64", "BOOL", "F8_E4M3", "C64", "X", "", None, 3)
        )
    elif kind < 0.55:
        header[f"../{name}"] = header.pop(name)
    elif kind < 0.65 and len(header) > 1:
        del header[name]
    text = json_text(rng, header, outside) if kind >= 0.65 else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
