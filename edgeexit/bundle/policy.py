"""When to stop: the policy, its file, and what it decides at each exit.

A policy is made for one bundle (`calibrate` binds it to the digest) and stands beside it, never in
it. At an exit a row stops when its score is at least the exit's threshold, and, with patience t,
the last t + 1 exits that were consulted predict the same class (PABEE's count). NaN is at least
nothing.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeexit.bundle.manifest import Exit
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import PolicyError

POLICY_FORMAT = "1.0"
NEVER, ALWAYS = math.inf, -math.inf
OUT_OF_REACH = 3.4028234663852886e38
"""The largest float32: a threshold that is compared with, and met by no score. For measurements."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """When rows stop.

    Attributes:
        thresholds: Stop when score >= threshold: one number for all exits, one per exit in order
            (the last exit, which always answers, left out), or a mapping from exit names. ``inf``
            = never, ``-inf`` = always; exits a mapping leaves out never fire.
        score: Which of the exits' scores counts.
        patience: 0, or how many further exits must have predicted the same before a row stops.
        first: Name of the first exit where rows may stop; None = the first there is.
        last: Name of the last exit where rows may stop early; None = the last but one.
        bundle: Digest of the bundle it was made for; None = for any bundle it fits.
        engine: What it was calibrated on, by name and version; for people and certificates.
        calibration: How it was made: data, risk, measured figures.
    """

    thresholds: float | list[float] | dict[str, float] = NEVER
    score: str = "max_prob"
    patience: int = 0
    first: str | None = None
    last: str | None = None
    bundle: str | None = None
    engine: dict[str, str] = {}
    calibration: dict[str, Any] = {}


@dataclass(frozen=True)
class Decision:
    """What a policy says at one exit: whether to consult it, and the threshold there.

    An exit that never fires is not consulted: its score is not computed at all. Only with patience
    it is, if the policy allows it, for its prediction counts.
    """

    consult: bool
    threshold: float


def decide(policy: Policy, exits: Sequence[Exit], *, digest: str | None = None) -> list[Decision]:
    """Resolves a policy against the exits of a chain, in order; the last one always answers.

    Raises:
        PolicyError: It was made for another bundle, names an unknown exit or score, or has the
        wrong
            number of thresholds.
    """
    for field, value in (("score", policy.score), ("bundle", policy.bundle or "")):
        if not isinstance(value, str):
            raise PolicyError(f"{field} is {value!r}, not a text", fix="Give a name.")
    if policy.bundle is not None and digest is not None and policy.bundle != digest:
        raise PolicyError(
            f"the policy was made for the bundle {policy.bundle[:12]}…, this one is {digest[:12]}…",
            fix="Calibrate again on this bundle; thresholds do not carry over.",
        )
    early = [leave.name for leave in exits[:-1]]
    thresholds = _by_name(policy.thresholds, early)
    if not isinstance(policy.patience, int) or policy.patience < 0:
        raise PolicyError(f"patience {policy.patience!r} is no count", fix="Use 0, 1, 2 or more.")
    low = _position(policy.first, early, "first", 0)
    high = _position(policy.last, early, "last", len(early) - 1)
    if early and low > high:
        raise PolicyError(
            f"the first exit allowed ({policy.first}) lies behind the last ({policy.last})",
            fix="Swap them.",
        )
    decisions = []
    for number, leave in enumerate(exits[:-1]):
        threshold = thresholds.get(leave.name, NEVER)
        allowed = low <= number <= high
        if allowed and policy.score not in leave.scores:
            raise PolicyError(
                f"exit {leave.name} has no score {policy.score!r} (it has "
                f"{', '.join(sorted(leave.scores)) or 'none'})",
                fix="Choose one of those.",
            )
        threshold = _float32_above(threshold)
        consult = allowed and (threshold != NEVER or policy.patience > 0)
        decisions.append(Decision(consult=consult, threshold=threshold))
    return [*decisions, Decision(consult=True, threshold=ALWAYS)] if exits else []


def _float32_above(threshold: float) -> float:
    """The smallest float32 that is no less: scores are float32, so it decides alike, and however
    it is compared."""
    with np.errstate(over="ignore"):
        rounded = np.float32(threshold)
    if float(rounded) < threshold:  # numpy alone would round the threshold first
        rounded = np.nextafter(rounded, np.float32(np.inf))
    return float(rounded)


def forced(exits: Sequence[Exit], name: str) -> Policy:
    """The policy under which every row leaves at the exit `name` and no other is consulted."""
    if name == exits[-1].name:
        return Policy(thresholds=NEVER)
    return Policy(thresholds={name: ALWAYS}, first=name, last=name)


def _position(name: str | None, early: list[str], field: str, default: int) -> int:
    if name is None:
        return default
    if name not in early:
        raise PolicyError(
            f"{field} names the exit {name!r}; the early exits are {', '.join(early) or 'none'}",
            fix="Use one of those names.",
        )
    return early.index(name)


def _by_name(
    thresholds: float | list[float] | dict[str, float], early: list[str]
) -> dict[str, float]:
    if isinstance(thresholds, dict):
        if unknown := sorted(map(str, set(thresholds) - set(early))):
            raise PolicyError(
                f"thresholds name the exit {unknown[0]!r}; the early exits are "
                f"{', '.join(early) or 'none'}",
                fix="Use those names; the last exit always answers and has no threshold.",
            )
        found = dict(thresholds)
    elif isinstance(thresholds, list):
        if len(thresholds) != len(early):
            raise PolicyError(
                f"{len(thresholds)} thresholds for {len(early)} early exits ({', '.join(early)})",
                fix="Give one per early exit, in order, or a single number for all.",
            )
        found = dict(zip(early, thresholds, strict=True))
    else:
        found = dict.fromkeys(early, thresholds)
    for name, value in found.items():
        huge = isinstance(value, int) and abs(value) > 2**53
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or huge:
            raise PolicyError(
                f"the threshold of {name} is {value!r}, not a number",
                fix="Use a number, inf or -inf.",
            )
        if math.isnan(value):
            raise PolicyError(f"the threshold of {name} is NaN", fix="Use a number, inf or -inf.")
    return {name: float(value) for name, value in found.items()}


def read_policy(path: str | os.PathLike[str]) -> Policy:
    """Reads ``policy.json``. Raises `PolicyError` naming what is wrong with it."""
    path = Path(path)
    fix = "Give the file that `edgeexit calibrate -o` wrote."
    try:
        raw = msgspec.json.decode(path.read_bytes())
        if not isinstance(raw, dict):
            raise msgspec.ValidationError("not a JSON object")
        version = str(raw.pop("format", "missing"))
        if version.split(".")[0] != POLICY_FORMAT.split(".")[0]:
            raise PolicyError(
                f"{path}: policy format {version}, this edgeexit reads {POLICY_FORMAT}", fix=fix
            )
        raw["thresholds"] = _from_json(raw.get("thresholds"))
        return msgspec.convert(raw, Policy)
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror})", fix=fix) from error
    except (
        msgspec.MsgspecError,
        UnicodeDecodeError,
        RecursionError,
        ValueError,
        OverflowError,
    ) as error:
        raise PolicyError(f"{path}: not a policy ({error})", fix=fix) from error


def write_policy(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Writes a policy as JSON, whole or not at all.

    JSON has no infinity, so the thresholds never and always are spelled out.
    """
    raw = {"format": POLICY_FORMAT} | msgspec.to_builtins(policy)
    raw["thresholds"] = _to_json(policy.thresholds)
    path = Path(path).resolve()  # through links, so that they stay
    if path.exists() and not path.is_file():
        raise PolicyError(
            f"{path} is not a file, and would be replaced by one", fix="Choose another -o."
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(raw), indent=1) + b"\n")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise PolicyError(
            f"{path}: cannot be written ({error.strerror})", fix="Choose another -o."
        ) from error


def bound_to(policy: Policy, bundle: Bundle) -> Policy:
    """The same policy, valid for this bundle only."""
    return msgspec.structs.replace(policy, bundle=bundle.digest)


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
