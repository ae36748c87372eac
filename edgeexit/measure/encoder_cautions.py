"""Warnings about a policy's early exits, with advice that its chains can follow.

`edgeexit.bundle.cautions` sends users to ``trace`` and ``calibrate``. Those need exits that predict
something. The exits of an encoder or a vision tower do not, so their thresholds are chosen by
trial.
"""

from __future__ import annotations

from collections.abc import Iterable

from edgeexit.bundle.cautions import cautions
from edgeexit.bundle.policy import ALWAYS, Policy, decisions_of
from edgeexit.bundle.reader import Bundle

NOT_CALIBRATED = "the thresholds are not calibrated"
"""Begin of the warning of `cautions` that advises ``trace`` and ``calibrate``."""


def cautions_of(
    policy: Policy,
    bundle: Bundle,
    chains: Iterable[str] | None = None,
    batch_size: int | None = None,
) -> list[str]:
    """Warnings as `edgeexit.bundle.cautions.cautions`, with other advice for chains whose exits
    predict nothing.

    Args:
        policy: A policy that fits the bundle.
        chains: Chains to look at; None: all.
        batch_size: Rows per batch; None: unknown.
    """
    manifest = bundle.manifest
    names = list(manifest.chains if chains is None else chains)
    silent = [
        name
        for name in names
        if any("logits" not in exit_.outputs for exit_ in manifest.chains[name].stops)
    ]
    found = cautions(policy, bundle, [name for name in names if name not in silent], batch_size)
    for name in silent:
        decisions = decisions_of(policy, manifest.chains[name], name)[:-1]
        if not any(decision.consult for decision in decisions):
            continue
        own = cautions(policy, bundle, [name], batch_size)
        found += [text for text in own if not text.startswith(NOT_CALIBRATED)]
        if all(decision.threshold == ALWAYS for decision in decisions if decision.consult):
            continue  # an exit that was chosen by hand
        found.append(
            f"the exits of the chain {name} predict nothing by themselves, so calibrate cannot "
            "choose their thresholds: compare the texts with and without them"
        )
    return list(dict.fromkeys(found))


__all__ = ["cautions_of"]
