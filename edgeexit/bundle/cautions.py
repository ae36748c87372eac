"""Warnings about the early answers that a policy gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgeexit.bundle.manifest import Chain
from edgeexit.bundle.policy import Policy, decisions_of
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
    elif bundle.manifest.provenance.get("tower_exits") == "untrained" and any(
        exit_.name.startswith("tower_")
        for name in early
        for exit_ in bundle.manifest.chains[name].exits
    ):
        found.append("the exits of the vision tower are untrained: answers after them mean nothing")
    if not policy.calibration:
        if bundle.exits_unknown:
            found.append("nothing says that the early exits of this bundle were trained")
        found.append(
            "the thresholds are not calibrated: the share of early answers that differ from the "
            "last exit's is unknown; edgeexit trace and edgeexit calibrate find thresholds for an "
            "accepted risk"
        )
    doubts = policy.calibration.get("warnings", [])
    found += [f"calibration of the policy: {doubt}" for doubt in doubts]
    calibrated = calibrated_rows(policy, {name: bundle.manifest.chains[name] for name in early})
    if None not in (batch_size, calibrated) and batch_size != calibrated:
        found.append(other_batch_size(calibrated, batch_size))
    return found


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
