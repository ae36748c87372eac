"""Warnings about the early answers that a policy gives."""

from __future__ import annotations

from collections.abc import Iterable

from edgeexit.bundle.policy import Policy, decisions_of
from edgeexit.bundle.reader import Bundle


def cautions(policy: Policy, bundle: Bundle, chains: Iterable[str] | None = None) -> list[str]:
    """Warnings about early answers: untrained exits, thresholds without calibration or with doubts
    about it. Empty if none applies, or if the policy never stops early.

    Args:
        policy: A policy that fits the bundle.
        chains: Chains to look at; None: all.
    """
    names = bundle.manifest.chains if chains is None else chains
    early = [
        name
        for name in names
        if any(d.consult for d in decisions_of(policy, bundle.manifest.chains[name], name)[:-1])
    ]
    if not early:
        return []
    found = []
    if bundle.exits_untrained:
        found.append(
            "the early exits of this bundle are untrained: times are valid, answers are meaningless"
        )
    if not policy.calibration:
        if bundle.exits_unknown:
            found.append("nothing says that the early exits of this bundle were trained")
        found.append(
            "the thresholds are not calibrated: the share of early answers that differ from the "
            "last exit's is unknown; edgeexit trace and edgeexit calibrate find thresholds for an "
            "accepted risk"
        )
    if isinstance(doubts := policy.calibration.get("warnings"), list):
        found += [f"calibration of the policy: {doubt}" for doubt in doubts]
    return found


__all__ = ["cautions"]
