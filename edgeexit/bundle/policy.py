"""Resolves policies at the exits of a bundle: when rows stop.

A policy has a rule for every chain with exits. `calibrate` binds it to one bundle by its digest;
its file is stored beside the bundle, never in it. A row stops at an exit when its score is at least
the exit's threshold and, with patience t, the last t + 1 exits that ran predict the same class
(PABEE's count). A NaN score never stops a row.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from edgeexit.bundle.manifest import Chain, Exit
from edgeexit.bundle.policy_file import read_policy as read_policy
from edgeexit.bundle.policy_file import write_policy as write_policy
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.rules import ALWAYS as ALWAYS
from edgeexit.bundle.rules import NEVER as NEVER
from edgeexit.bundle.rules import OUT_OF_REACH as OUT_OF_REACH
from edgeexit.bundle.rules import Policy as Policy
from edgeexit.bundle.rules import Rule as Rule
from edgeexit.bundle.rules import Schedule as Schedule
from edgeexit.errors import PolicyError


@dataclass(frozen=True)
class Decision:
    """A rule at one exit: whether to run the exit, its threshold, and the score to compare.

    An exit that never stops a row does not run. With patience it runs, if the rule allows the exit,
    because its prediction counts.
    """

    consult: bool
    threshold: float
    score: str = "max_prob"
    schedule: Schedule | None = None

    def threshold_at(self, token: int) -> float:
        """The threshold for token number `token` of a text (1 = the first)."""
        if self.schedule is None:
            return self.threshold
        return _float32_above(self.schedule.threshold(self.threshold, token))


def decide(rule: Rule, exits: Sequence[Exit]) -> list[Decision]:
    """Resolves a rule against the exits of a chain that stop, in order; the last always answers.

    Raises:
        PolicyError: The rule has an unknown exit or score, or the wrong number of thresholds.
    """
    if not isinstance(rule.score, str):
        raise PolicyError(f"score is {rule.score!r}, not a string", fix="Give a score's name.")
    if rule.schedule is not None:
        _check_schedule(rule.schedule)
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
        decisions.append(Decision(consult, threshold, rule.score, rule.schedule))
    return [*decisions, Decision(True, ALWAYS, rule.score)] if exits else []


def _check_schedule(schedule: Schedule) -> None:
    if not isinstance(schedule, Schedule):
        raise PolicyError(f"schedule is {schedule!r}", fix="Give a Schedule, or leave it out.")
    numbers_ = {
        "length": (type(schedule.length) is int and schedule.length > 0, "1 or more tokens"),
        "temperature": (_within(schedule.temperature, 0, 1e6), "a number from 0 up"),
        "warm_up": (_within(schedule.warm_up, 0, 1), "a share from 0 to 1"),
    }
    for name, (good, kind) in numbers_.items():
        if not good:
            raise PolicyError(
                f"the schedule's {name} is {getattr(schedule, name)!r}", fix=f"Use {kind}."
            )


def _within(value: object, low: float, high: float) -> bool:
    return isinstance(value, numbers.Real) and low <= float(value) <= high


def drops_of(chain: Chain) -> dict[str, Exit]:
    """The exits of a chain that may drop a token group, by name."""
    return {exit_.name: exit_ for exit_ in chain.exits if exit_.action == "drop"}


def drop_thresholds(rule: Rule, chain: Chain) -> dict[str, float]:
    """Exits of a chain that may drop a token group -> thresholds; exits without one never drop.

    Raises:
        PolicyError: A threshold is not a number, or compares a score that the exit does not have.
    """
    drops = drops_of(chain)
    if not isinstance(rule.thresholds, dict):
        if drops and len(chain.stops) == 1 and rule.thresholds not in (NEVER, []):
            raise PolicyError(
                f"the threshold {rule.thresholds} is for exits that answer, of which this chain "
                f"has none but the last; it has {', '.join(drops)}",
                fix=f'Give thresholds by name, as in {{"{next(iter(drops))}": -inf}}.',
            )
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
        rule, writes = rule_of(given, chain, name), decoding is not None and name == decoding.chain
        if writes and rule.patience:
            raise PolicyError(
                f"patience is not supported for the chain {name}, which writes text",
                fix="Use a policy without patience.",
            )
        if rule.schedule is not None and not writes:
            raise PolicyError(
                f"the rule for the chain {name} has a schedule over the tokens of a text, which "
                "this chain does not write",
                fix="Leave its schedule out.",
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
    [threshold] = _checked({"all exits": thresholds}).values()
    return dict.fromkeys(early, threshold)


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
