"""Damages files as time, transport and malice do; the same seed damages in the same way."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import yaml

Mutation = Callable[[bytes, Random], bytes]

_RAW = "\0raw {}\0"
"""Stands in a document for text that a JSON writer would not write."""

_RAW_VALUES = ("[" * 100_000 + "]" * 100_000, '{"a":' * 5_000 + "0" + "}" * 5_000, "9" * 5_000)

_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    2**31 - 1,
    2**31,
    2**40,
    2**63,
    2**64 - 1,
    10**30,
    0.5,
    1e308,
    math.nan,
    -math.inf,
    "",
    "x",
    "float32",
    "x" * 10_000,
    "\ud800",
    "a\0b",
    "../../etc/passwd",
    "{{ 9 ** 9 ** 9 }}",
    [],
    [0],
    [[]],
    [2**40, 2**40],
    [None] * 1000,
    {},
    {"": None},
)
_EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """Flips, overwrites, removes, repeats or adds bytes, near the beginning half of the time."""
    reach = len(content) if random.random() < 0.5 else min(len(content), 4096)
    start = random.randrange(max(reach, 1))
    span = min(2 ** random.randrange(13), max(len(content) - start, 1))
    before, middle, after = content[:start], content[start : start + span], content[start + span :]
    match random.randrange(8):
        case 0:
            flipped = bytearray(content)
            for _ in range(2 ** random.randrange(5)):
                if flipped:
                    flipped[random.randrange(max(reach, 1))] ^= 1 << random.randrange(8)
            return bytes(flipped)
        case 1:
            return before
        case 2:
            return before + random.randbytes(len(middle)) + after
        case 3:
            return before + after
        case 4:
            return before + middle + middle + after
        case 5:
            return before + bytes(len(middle)) + after
        case 6:
            number = random.choice(_EXTREMES).to_bytes(8, "little")[: random.choice((4, 8))]
            return before + number + content[start + len(number) :]
        case _:
            return content + random.randbytes(span)


def mutate_json(content: bytes, random: Random) -> bytes:
    """Changes one to three values or keys of a document, or its bytes."""
    if random.random() < 0.2:
        return mutate_bytes(content, random)
    document = json.loads(content)
    for _ in range(random.randrange(1, 4)):
        document = _mutate_value(document, random)
    return _dump(document, random)


def mutate_yaml(content: bytes, random: Random) -> bytes:
    """As `mutate_json`: almost all JSON is YAML. Or multiplies by aliases."""
    choice = random.random()
    if choice < 0.3:
        return mutate_bytes(content, random)
    if choice < 0.4:
        lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(20)]
        return content + "\n".join(lines).encode()
    document = _mutate_value(yaml.safe_load(content), random)
    return _dump(document, random)


def mutate_safetensors(content: bytes, random: Random) -> bytes:
    """Changes the header, keeping its length true or not, or the bytes."""
    if random.random() < 0.3:
        return mutate_bytes(content, random)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    for _ in range(random.randrange(1, 3)):
        entry = random.choice(tensors)
        match random.randrange(4):
            case 0:
                shift = random.choice((-64, -1, 1, 64, 2**40))
                entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
            case 1:
                entry["shape"] = [random.choice(_EXTREMES), *entry["shape"]]
            case 2:
                kinds = ("F64", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "F4", "")
                entry["dtype"] = random.choice(kinds)
            case _:
                header = _mutate_value(header, random)
                break
    text = _dump(header, random)
    told = len(text) if random.random() < 0.8 else random.choice(_EXTREMES)
    return told.to_bytes(8, "little") + text + content[8 + length :]


def _mutate_value(document: Any, random: Random) -> Any:
    """A copy of a document with one value, key or element changed."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places:
        return random.choice(_VALUES)
    container, key = random.choice(places)
    match random.randrange(7):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[str(key) + random.choice(("x", "_type", "\0"))] = container.pop(key)
        case 2:
            other, other_key = random.choice(places)
            container[key] = copy.deepcopy(other[other_key])
        case 3 if isinstance(container[key], (int, float)):
            container[key] = container[key] * random.choice((-1, 2, 3, 1000, 10**9, 0.5))
        case 4:
            container[key] = _RAW.format(random.randrange(len(_RAW_VALUES)))
        case _:
            container[key] = random.choice(_VALUES)
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys: Any = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(min(len(value), 50))
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _dump(document: Any, random: Random) -> bytes:
    text = json.dumps(document, indent=1)
    for i, raw in enumerate(_RAW_VALUES):
        text = text.replace(json.dumps(_RAW.format(i)), raw)
    if isinstance(document, dict) and document and random.random() < 0.1:  # a key that stands twice
        key = json.dumps(random.choice(list(document)))
        text = text.replace("{", f"{{{key}: 0, ", 1)
    return text.encode()
