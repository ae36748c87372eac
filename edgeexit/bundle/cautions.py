"""Warnings about the early answers that a policy gives, and about tokens that it drops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgeexit.bundle.manifest import Chain
from edgeexit.bundle.policy import ALWAYS, Policy, Rule, decisions_of, drop_thresholds
from edgeexit.bundle.reader import Bundle


def cautions(
    policy: Policy,
    bundle: Bundle,
    chains: Iterable[str] | None = None,
    batch_size: int | None = None,
) -> list[str]:
    """Warnings about early answers: untrained exits, thresholds without calibration, with doubts
    about it, or from another batch size. Empty if none applies, or if the policy never stops early.

    Args:
        policy: A policy that fits the bundle.
        chains: Chains to look at; None: all.
        batch_size: Rows per batch; None: unknown (`edgeexit.runtime.Model` warns at the call).
    """
    every, provenance = bundle.manifest.chains, bundle.manifest.provenance
    names = list(every if chains is None else chains)
    early = [name for name in names if _stops_early(policy, every[name], name)]
    gates = [gate for name in names for gate in _gates_in_use(policy, every[name], name)]
    if not early and not gates:
        return []
    found = []
    if early and bundle.exits_untrained:
        found.append(
            "the early exits of this bundle are untrained: times are valid, answers are meaningless"
        )
    elif provenance.get("tower_exits") == "untrained" and any(
        exit_.name.startswith("tower_") for name in early for exit_ in every[name].exits
    ):
        found.append("the exits of the vision tower are untrained: answers after them mean nothing")
    if gates and provenance.get("gates") == "untrained":
        found.append("the gates of this bundle are untrained: what they drop means nothing")
    found += [doubt for name in names for doubt in _doubts_about_gates(policy, every[name], name)]
    if not policy.calibration:
        if early and bundle.exits_unknown:
            found.append("nothing says that the early exits of this bundle were trained")
        if any(not _by_hand(policy, every[name], name) for name in names):
            found.append(
                "the thresholds are not calibrated: the share of early answers that differ from "
                "the last exit's is unknown; edgeexit trace and edgeexit calibrate find thresholds "
                "for an accepted risk"
            )
    doubts = policy.calibration.get("warnings", [])
    found += [f"calibration of the policy: {doubt}" for doubt in doubts]
    calibrated = calibrated_rows(policy, {name: bundle.manifest.chains[name] for name in early})
    if None not in (batch_size, calibrated) and batch_size != calibrated:
        found.append(other_batch_size(calibrated, batch_size))
    return found


def _stops_early(policy: Policy, chain: Chain, name: str) -> bool:
    return any(decision.consult for decision in decisions_of(policy, chain, name)[:-1])


def _gates_in_use(policy: Policy, chain: Chain, name: str) -> dict[str, float]:
    """Gates that may drop tokens -> thresholds; drops by a schedule are no gates."""
    gates = {exit_.name for exit_ in chain.exits if exit_.action == "drop" and exit_.path}
    used = drop_thresholds(policy.rules.get(name, Rule()), chain)
    return {gate: value for gate, value in used.items() if gate in gates}


def _doubts_about_gates(policy: Policy, chain: Chain, name: str) -> list[str]:
    """Gates that are never asked, or whose threshold no score or every score reaches."""
    used = drop_thresholds(policy.rules.get(name, Rule()), chain)
    gates, found = _gates_in_use(policy, chain, name), []
    always: dict[str | None, str] = {}  # token group -> what drops it from every prompt
    for exit_ in chain.exits:
        if exit_.name in used and not exit_.path:
            always.setdefault(exit_.tokens, exit_.name)
        if exit_.name not in gates:
            continue
        if (drop := always.get(exit_.tokens)) is not None:
            found.append(f"{exit_.name} is never asked: {drop} drops the tokens of every prompt")
        elif gates[exit_.name] != ALWAYS and not 0 < gates[exit_.name] <= 1:
            does = "never drops" if gates[exit_.name] > 1 else "drops always"
            value = f"{gates[exit_.name]:.4g}"
            found.append(f"{exit_.name} {does}: its scores are from 0 to 1, its threshold {value}")
    return found


def _by_hand(policy: Policy, chain: Chain, name: str) -> bool:
    """Whether a rule compares no score: it never stops early, or it always takes an exit that
    predicts nothing (of an encoder or a tower)."""
    decisions = [d for d in decisions_of(policy, chain, name)[:-1] if d.consult]
    if any(value != ALWAYS for value in _gates_in_use(policy, chain, name).values()):
        return False
    silent = any("logits" not in exit_.outputs for exit_ in chain.stops)
    return not decisions or (silent and all(d.threshold == ALWAYS for d in decisions))


def calibrated_rows(policy: Policy, chains: Mapping[str, Chain]) -> int | None:
    """Rows per batch in the calibration of a policy, if its risk depends on them: it stops early in
    a chain whose exits apply to the whole batch. Fewer rows then agree to stop more often."""
    rows = policy.calibration.get("batch_size")
    together = any(
        chain.rows == "together" and any(d.consult for d in decisions_of(policy, chain, name)[:-1])
        for name, chain in chains.items()
    )
    return rows if together and isinstance(rows, int) else None


def other_batch_size(calibrated: int | None, rows: int | None) -> str:
    """The warning about batches of another size than the policy was calibrated on."""
    return (
        f"the policy was calibrated on batches of {_rows(calibrated)}, this batch has "
        f"{_rows(rows)}: exits of this bundle apply to the whole batch, so its risk is not valid "
        f"here (edgeexit trace --batch-size {rows} and edgeexit calibrate measure it)"
    )


def _rows(count: int | None) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


__all__ = ["calibrated_rows", "cautions", "other_batch_size"]
