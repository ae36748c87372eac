"""Reads and writes ``policy.json``."""

from __future__ import annotations

import codecs
import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgeexit.bundle.documents import convert, decode
from edgeexit.bundle.paths import shown
from edgeexit.bundle.rules import ALWAYS, NEVER, Policy, Rule
from edgeexit.errors import PolicyError

POLICY_FORMAT = "2.0"


def read_policy(path: str | os.PathLike[str]) -> Policy:
    """Reads ``policy.json``. Raises `PolicyError` with the cause if it is not a valid policy."""
    path = Path(path)
    fix = "Give the file that `edgeexit calibrate -o` wrote."
    try:
        raw: Any = decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), object)
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        version = str(raw.pop("format", "missing"))
        if version.split(".")[0] != POLICY_FORMAT.split(".")[0]:
            raise PolicyError(
                f"{path}: policy format {version}, this edgeexit reads {POLICY_FORMAT}", fix=fix
            )
        _read_thresholds(raw.get("rules"))
        return convert(raw, Policy)
    except OSError as error:
        raise PolicyError(f"{shown(path)}: cannot be read ({error.strerror})", fix=fix) from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise PolicyError(f"{path}: not a policy ({error})", fix=fix) from error


def write_policy(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Writes a policy as JSON, atomically.

    JSON has no infinity, so such thresholds are written as "never" and "always".
    """
    raw: dict[str, Any] = {"format": POLICY_FORMAT} | msgspec.to_builtins(policy)
    raw["rules"] = rules_to_json(policy.rules)
    path, partial, fix = Path(path), None, "Choose another -o."
    try:
        path = path.resolve()  # keep links: replace their target
        if path.exists() and not path.is_file():
            raise PolicyError(f"{path} exists and is not a regular file", fix=fix)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(raw), indent=1) + b"\n")
        os.replace(partial, path)
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, null bytes
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()
        reason = getattr(error, "strerror", error)
        raise PolicyError(f"{shown(path)}: cannot be written ({reason})", fix=fix) from error


def rules_to_json(rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Rules as values of JSON, which has no infinity."""
    return {
        name: msgspec.to_builtins(rule) | {"thresholds": _to_json(rule.thresholds)}
        for name, rule in rules.items()
    }


def rules_from_json(raw: Any) -> dict[str, Rule]:
    """Rules from values that `rules_to_json` made. Raises `ValueError` for others."""
    _read_thresholds(raw)
    return convert(raw, dict[str, Rule])


def _read_thresholds(rules: Any) -> None:
    for rule in rules.values() if isinstance(rules, dict) else ():
        if isinstance(rule, dict) and "thresholds" in rule:
            rule["thresholds"] = _from_json(rule["thresholds"])


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_json(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_to_json(one) for one in value]
    if math.isnan(value):
        raise PolicyError("a threshold is NaN", fix="Use a number, inf or -inf.")
    return {NEVER: "never", ALWAYS: "always"}.get(value, value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_json(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    if isinstance(value, str):
        named = {"never": NEVER, "always": ALWAYS}
        if value not in named:
            raise ValueError(f'the threshold {value!r} is neither a number, "never" nor "always"')
        return named[value]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a threshold")
    return float(value)
