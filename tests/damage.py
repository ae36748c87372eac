"""Damage to files, drawn from a seed: cut off, bits flipped, values of other types, other files in
their place. `tests/test_damaged_files.py` says which files, and what reads them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD = 4000
"""Bytes at a file's beginning that say what the rest is: half of all flips hit them."""

OTHERS = (
    b"",
    b"\0" * 64,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
    b"<!doctype html><html><body>404 Not Found</body></html>",
    b"PK\x05\x06" + b"\0" * 18,
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x02",
    b"\x80\x04\x95\x0a\0\0\0\0\0\0\0\x8c\x06posix",
    b"[]",
    b"{}",
    b"null",
    b'"text"',
    b"[" * 5000,
    b"\xff\xfe{\0}\0",
)
"""What lies in a file's place after a failed download, a forgotten `git lfs pull`, a mix-up."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, -(2**63), 10**30, 0.5, 1e308, float("nan")),
    *("", "text", "\ud800", "../../elsewhere", "0", [], [0], ["text"], [[]], {}, {"text": 1}),
)
"""What a value of JSON is exchanged for."""

Damage = Callable[[Path, random.Random], str]


def damage(file: Path, draw: random.Random) -> str:
    """Damages a file. Returns what was done to it."""
    kinds: list[Damage] = [_cut, _flip, _flip, _other, _gone]
    if file.suffix in (".json", ".jsonl", ".safetensors"):
        kinds += [_exchange, _exchange, _exchange]
    return draw.choice(kinds)(file, draw)


def _cut(file: Path, draw: random.Random) -> str:
    raw = file.read_bytes()
    end = draw.randrange(len(raw))
    file.write_bytes(raw[:end])
    return f"cut at {end} of {len(raw)}"


def _flip(file: Path, draw: random.Random) -> str:
    raw = bytearray(file.read_bytes())
    places = []
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(raw), HEAD) if draw.random() < 0.5 else len(raw))
        raw[at] ^= 1 << draw.randrange(8)
        places.append(at)
    file.write_bytes(raw)
    return f"flipped a bit at {places}"


def _other(file: Path, draw: random.Random) -> str:
    """Another file, a neighbour, a folder, or a link to nothing."""
    beside = sorted(one for one in file.parent.iterdir() if one.is_file() and one != file)
    number = draw.randrange(len(OTHERS) + 4)
    if number < len(OTHERS):
        file.write_bytes(OTHERS[number])
        return f"replaced by {OTHERS[number][:20]!r}"
    if number < len(OTHERS) + 2 and beside:
        other = draw.choice(beside)
        shutil.copyfile(other, file)
        return f"replaced by {other.name}"
    file.unlink()
    if number == len(OTHERS) + 2:
        file.mkdir()
        return "replaced by a folder"
    file.symlink_to(file.parent / "nowhere")
    return "replaced by a link to nothing"


def _gone(file: Path, draw: random.Random) -> str:
    file.unlink()
    return "removed"


def _exchange(file: Path, draw: random.Random) -> str:
    """A value of JSON becomes another, goes, or gets another name."""
    raw = file.read_bytes()
    if file.suffix == ".jsonl":
        lines = raw.splitlines()
        number = draw.randrange(len(lines))
        document = [json.loads(lines[number])]
        done = exchange(document, draw)
        lines[number] = json.dumps(document[0] if document else "").encode()
        file.write_bytes(b"\n".join(lines))
    elif file.suffix == ".safetensors":
        size = int.from_bytes(raw[:8], "little")
        head = json.loads(raw[8 : 8 + size])
        done = exchange(head, draw)
        made = json.dumps(head).encode()
        file.write_bytes(len(made).to_bytes(8, "little") + made + raw[8 + size :])
    else:
        document = json.loads(raw)
        done = exchange(document, draw)
        file.write_text(json.dumps(document))
    return done


def exchange(document: Any, draw: random.Random) -> str:
    """Changes one value somewhere in a JSON document."""
    place, path = document, ""
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return "nothing to exchange"
        key = draw.choice(keys)
        path += f"/{key}"
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
            place = place[key]
            continue
        action = draw.choice(["exchange", "exchange", "exchange", "remove", "rename"])
        if action == "remove":
            del place[key]
        elif action == "rename" and isinstance(place, dict):
            place[f"{key}_"] = place.pop(key)
        else:
            place[key] = value = draw.choice(VALUES)
            action = f"exchange for {value!r}"
        return f"{path}: {action}"


__all__ = ["damage", "exchange"]
