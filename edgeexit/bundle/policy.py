"""Policies: when rows stop. Reads and writes ``policy.json`` and resolves rules at exits.

A policy has a rule for every chain with exits. `calibrate` binds it to one bundle by its digest;
its file is stored beside the bundle, never in it. A row stops at an exit when its score is at least
the exit's threshold and, with patience t, the last t + 1 exits that ran predict the same class
(PABEE's count). A NaN score never stops a row.
"""

from __future__ import annotations

import codecs
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

from edgeexit.bundle.documents import convert, decode
from edgeexit.bundle.manifest import Chain, Exit
from edgeexit.bundle.paths import shown
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import PolicyError

POLICY_FORMAT = "2.0"
NEVER, ALWAYS = math.inf, -math.inf
OUT_OF_REACH = 3.4028234663852886e38
"""The largest float32: a threshold that no score reaches, for measurements of the comparison."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When rows stop in one chain.

    Attributes:
        thresholds: Stop when score >= threshold: one number for all exits, one per exit in order
            (the last exit, which always answers, left out), or a mapping from exit names. ``inf``
            = never, ``-inf`` = always; exits missing from a mapping never stop a row. Only a
            mapping can have thresholds of exits that drop token groups.
        score: Name of the score to compare.
        patience: 0, or how many further exits must have predicted the same before a row stops.
        first: Name of the first exit where rows may stop; None = the first exit.
        last: Name of the last exit where rows may stop early; None = the last but one.
    """

    thresholds: float | list[float] | dict[str, float] = NEVER
    score: str = "max_prob"
    patience: int = 0
    first: str | None = None
    last: str | None = None


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When rows stop, chain by chain.

    Attributes:
        rules: Chain -> its rule.
        bundle: Digest of the bundle that it was made for; None = any bundle that it fits.
        engine: Name and version of the engine used for calibration; informational.
        calibration: Data, risk and measured figures of the calibration.
    """

    rules: dict[str, Rule]
    bundle: str | None = None
    engine: dict[str, str] = {}
    calibration: dict[str, Any] = {}


@dataclass(frozen=True)
class Decision:
    """A rule at one exit: whether to run the exit, its threshold, and the score to compare.

    An exit that never stops a row does not run. With patience it runs, if the rule allows the exit,
    because its prediction counts.
    """

    consult: bool
    threshold: float
    score: str = "max_prob"


def decide(rule: Rule, exits: Sequence[Exit]) -> list[Decision]:
    """Resolves a rule against the exits of a chain that stop, in order; the last always answers.

    Raises:
        PolicyError: The rule has an unknown exit or score, or the wrong number of thresholds.
    """
    if not isinstance(rule.score, str):
        raise PolicyError(f"score is {rule.score!r}, not a string", fix="Give a score's name.")
    early = [exit_.name for exit_ in exits[:-1]]
    thresholds = _by_name(rule.thresholds, early)
    if not isinstance(rule.patience, int) or rule.patience < 0:
        raise PolicyError(f"patience {rule.patience!r} is not a count", fix="Use 0, 1, 2 or more.")
    if rule.patience and any("logits" not in exit_.outputs for exit_ in exits):
        raise PolicyError(
            "patience compares predicted classes, and an exit of this chain has no logits",
            fix="Use a policy without patience.",
        )
    low = _position(rule.first, early, "first", 0)
    high = _position(rule.last, early, "last", len(early) - 1)
    if early and low > high:
        raise PolicyError(
            f"the first allowed exit ({rule.first}) is after the last ({rule.last})",
            fix="Swap them.",
        )
    decisions = []
    for number, exit_ in enumerate(exits[:-1]):
        allowed = low <= number <= high
        threshold = _float32_above(thresholds.get(exit_.name, NEVER))
        consult = allowed and (threshold != NEVER or rule.patience > 0)
        if consult and rule.score not in exit_.scores:
            raise PolicyError(
                f"exit {exit_.name} has no score {rule.score!r} (it has "
                f"{', '.join(sorted(exit_.scores)) or 'none'})",
                fix="Choose one of those.",
            )
        decisions.append(Decision(consult, threshold, rule.score))
    return [*decisions, Decision(True, ALWAYS, rule.score)] if exits else []


def drop_thresholds(rule: Rule, chain: Chain) -> dict[str, float]:
    """Exits of a chain that may drop a token group -> thresholds; exits without one never drop.

    Raises:
        PolicyError: A threshold is not a number, or compares a score that the exit does not have.
    """
    drops = {exit_.name: exit_ for exit_ in chain.exits if exit_.action == "drop"}
    if not isinstance(rule.thresholds, dict):
        return {}
    chosen = _checked({name: value for name, value in rule.thresholds.items() if name in drops})
    for name, value in chosen.items():
        if not drops[name].path and value not in (ALWAYS, NEVER):
            raise PolicyError(
                f"the threshold of {name} is {value}, but this drop is a schedule: it has no score",
                fix=f"Use -inf to drop the group {drops[name].tokens} there always, or leave it "
                "out.",
            )
    return {name: _float32_above(value) for name, value in chosen.items() if value != NEVER}


def decisions_of(policy: Policy, chain: Chain, name: str) -> list[Decision]:
    """The decisions of a policy at a chain's stopping exits.

    Raises:
        PolicyError: The policy has no rule for a chain with early exits, or the rule does not fit.
    """
    return decide(rule_of(policy, chain, name), chain.stops)


def rule_of(policy: Policy, chain: Chain, name: str) -> Rule:
    """The rule for a chain. Raises `PolicyError` if a chain with early exits has no rule."""
    rule = policy.rules.get(name)
    if rule is None:
        if len(chain.exits) > 1:
            raise PolicyError(
                f"the policy has no rule for the chain {name}, which has exits "
                f"({', '.join(exit_.name for exit_ in chain.exits[:-1])})",
                fix=f'Add "{name}" to its rules; a rule without thresholds never stops.',
            )
        rule = Rule()
    drops = [exit_.name for exit_ in chain.exits if exit_.action == "drop"]
    if drops and isinstance(rule.thresholds, dict):
        stops = {n: value for n, value in rule.thresholds.items() if n not in drops}
        early = [exit_.name for exit_ in chain.stops[:-1]]
        if unknown := sorted(map(str, set(stops) - set(early))):
            raise PolicyError(
                f"thresholds name {unknown[0]!r}; the early exits are "
                f"{', '.join(early) or 'none'}, the drops {', '.join(drops)}",
                fix="Use these names; the last exit always answers and has no threshold.",
            )
        rule = msgspec.structs.replace(rule, thresholds=stops)
    return rule


def policy_for(given: Policy | Rule | str | os.PathLike[str] | None, bundle: Bundle) -> Policy:
    """Makes a policy for a bundle and checks that it fits.

    Args:
        given: A policy, its file, or a rule for the only chain with exits. None: no row stops
            early, because a bundle has no thresholds.

    Raises:
        PolicyError: It was made for another bundle, or does not fit its chains.
    """
    if isinstance(given, (str, os.PathLike)):
        read = read_policy(given)
        try:
            return policy_for(read, bundle)
        except PolicyError as error:
            raise PolicyError(f"{os.fspath(given)}: {error.what}", fix=error.fix) from error
    chains = bundle.manifest.chains
    if given is None:
        given = Policy(rules={name: Rule() for name in chains})
    elif isinstance(given, Rule):
        given = Policy(rules={_only_chain(chains): given})
    elif not isinstance(given, Policy):
        raise PolicyError(
            f"policy is a {type(given).__name__}",
            fix="Give a Policy, a Rule, or the path of a policy.json.",
        )
    if not isinstance(given.rules, dict) or not all(
        isinstance(rule, Rule) for rule in given.rules.values()
    ):
        raise PolicyError(
            f"the rules of the policy are {given.rules!r}",
            fix=f"Give a Rule for each chain: {', '.join(chains)}.",
        )
    if not isinstance(given.engine, dict):
        raise PolicyError(f"engine is {given.engine!r}, not a mapping", fix="Leave it out.")
    _check_calibration(given.calibration)
    if not isinstance(given.bundle, (str, type(None))):
        raise PolicyError(f"bundle is {given.bundle!r}, not a string", fix="Give a digest.")
    if given.bundle is not None and given.bundle != bundle.digest:
        raise PolicyError(
            f"the policy was made for the bundle {given.bundle[:12]}…, this one is "
            f"{bundle.digest[:12]}…",
            fix="Calibrate again on this bundle; thresholds are valid for one bundle only.",
        )
    if unknown := sorted(given.rules.keys() - chains.keys()):
        raise PolicyError(
            f"the policy has a rule for the chain {unknown[0]!r}; the bundle has "
            f"{', '.join(sorted(chains))}",
            fix="Use these chain names.",
        )
    decoding = bundle.manifest.decoding
    for name, chain in chains.items():
        decisions_of(given, chain, name)
        if decoding is not None and name == decoding.chain and rule_of(given, chain, name).patience:
            raise PolicyError(
                f"patience is not supported for the chain {name}, which writes text",
                fix="Use a policy without patience.",
            )
        drop_thresholds(given.rules.get(name, Rule()), chain)
    return given


def _check_calibration(calibration: Any) -> None:
    """Raises `PolicyError` if the calibration's entries that are read are of another kind."""
    if not isinstance(calibration, dict):
        raise PolicyError(f"calibration is {calibration!r:.60}, not a mapping", fix="Leave it out.")
    doubts = calibration.get("warnings", [])
    if not isinstance(doubts, list) or not all(isinstance(doubt, str) for doubt in doubts):
        raise PolicyError(
            f"calibration: warnings is {doubts!r:.60}, not a list of texts", fix="Leave it out."
        )


def _only_chain(chains: Mapping[str, Chain]) -> str:
    """The chain of a rule that is given without a chain name."""
    with_exits = [name for name, chain in chains.items() if len(chain.exits) > 1]
    if len(with_exits) > 1:
        raise PolicyError(
            f"one rule for several chains with exits ({', '.join(with_exits)})",
            fix="Give a rule for each: Policy(rules={...}).",
        )
    return (with_exits or list(chains))[-1]


def _float32_above(threshold: float) -> float:
    """The smallest float32 that is not below `threshold`. Scores are float32, so decisions are the
    same in any precision of the comparison."""
    with np.errstate(over="ignore"):
        rounded = np.float32(threshold)
    if float(rounded) < threshold:  # without float(), numpy rounds the threshold first
        rounded = np.nextafter(rounded, np.float32(np.inf))
    return float(rounded)


def forced(exits: Sequence[Exit], name: str) -> Rule:
    """The rule with which every row stops at the exit `name` and no other exit runs."""
    if name == exits[-1].name:
        return Rule(thresholds=NEVER)
    return Rule(thresholds={name: ALWAYS}, first=name, last=name)


def _position(name: str | None, early: list[str], field: str, default: int) -> int:
    if name is None:
        return default
    if name not in early:
        raise PolicyError(
            f"{field} names the exit {name!r}; the early exits are {', '.join(early) or 'none'}",
            fix="Use one of these names.",
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
                fix="Use these names; the last exit always answers and has no threshold.",
            )
        return _checked(thresholds)
    if isinstance(thresholds, list):
        if len(thresholds) != len(early):
            raise PolicyError(
                f"{len(thresholds)} thresholds for {len(early)} early exits ({', '.join(early)})",
                fix="Give one per early exit, in order, or a single number for all.",
            )
        return _checked(dict(zip(early, thresholds, strict=True)))
    return _checked(dict.fromkeys(early, thresholds))


def _checked(thresholds: Mapping[str, float]) -> dict[str, float]:
    for name, value in thresholds.items():
        huge = isinstance(value, int) and abs(value) > 2**53
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or huge:
            raise PolicyError(
                f"the threshold of {name} is {value!r}, not a number",
                fix="Use a number, inf or -inf.",
            )
        if math.isnan(value):
            raise PolicyError(f"the threshold of {name} is NaN", fix="Use a number, inf or -inf.")
    return {name: float(value) for name, value in thresholds.items()}


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
        rules = raw.get("rules")
        for rule in rules.values() if isinstance(rules, dict) else ():
            if isinstance(rule, dict) and "thresholds" in rule:
                rule["thresholds"] = _from_json(rule["thresholds"])
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
    for name, rule in policy.rules.items():
        raw["rules"][name]["thresholds"] = _to_json(rule.thresholds)
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
