"""Checks that a bundle supports a decoding mode, and creates the mode for a session."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from edgeexit.bundle.manifest import Chain
from edgeexit.bundle.policy import Decision
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.runtime.executor.components import token_states
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.arguments import ModeName
from edgeexit.runtime.programs.modes.early import Approximate, Fast
from edgeexit.runtime.programs.modes.exact import Exact
from edgeexit.runtime.programs.modes.full import Full, Mode
from edgeexit.runtime.programs.modes.pace import Pace
from edgeexit.runtime.programs.sampling import Sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drafting:
    """Options of mode ``exact``, as `Model.generate` takes them."""

    exit: str | None = None
    length: int | None = None
    threshold: float = 0.0


def by_component(exits: Sequence[str], decisions: Sequence[Decision]) -> list[Decision]:
    """A decision behind each component.

    Args:
        exits: Name of the exit behind each component; empty where there is none.
        decisions: At the exits, in order.
    """
    behind = dict(zip((name for name in exits if name), decisions, strict=True))
    never = Decision(consult=False, threshold=float("inf"))
    return [behind.get(name, never) for name in exits]


def make_mode(
    session: Session,
    mode: ModeName,
    decisions: Sequence[Decision],
    drafting: Drafting,
    sampler: Sampler | None,
    paces: dict[int, Pace],
    *,
    audit: bool,
) -> Mode:
    """Creates a mode for new texts.

    Args:
        decisions: The policy's decisions at the exits with the action ``stop``, in order.
        paces: Measurements of drafting so far, for this number of texts.
    """
    names = ["" if exit_ is None else exit_.name for exit_ in session.exits]
    if mode == "full":
        return Full(session, names, sampler)
    if mode == "exact":
        return Exact(
            session,
            names,
            None if drafting.exit is None else names.index(drafting.exit),
            drafts=drafting.length,
            threshold=drafting.threshold,
            score=decisions[-1].score,
            sampler=sampler,
            paces=paces,
        )
    if not session.gates.thresholds and not any(d.consult for d in decisions[:-1]):
        logger.warning(
            "mode %s: %s, so every token runs through all layers",
            mode,
            "the policy uses no early exit; set thresholds"
            if len(decisions) > 1
            else "the chain that writes has no early exits",
        )
    own = by_component(names, decisions)
    if mode == "approximate":
        return Approximate(session, names, own, sampler=sampler)
    return Fast(session, names, own, audit=audit, sampler=sampler)


def check_mode(bundle: Bundle, chain: Chain, mode: ModeName, drafting: Drafting) -> None:
    """Raises `UsageError` for modes and options that a bundle does not support."""
    early = [exit_.name for exit_ in chain.stops[:-1]]
    if drafting.exit is not None and drafting.exit not in early:
        raise UsageError(
            f"draft_exit is {drafting.exit!r}; the early exits are {', '.join(early)}",
            fix="Use one of these names.",
        )
    if mode == "exact" and not early:
        raise UsageError("the bundle has no early exit to draft", fix='Use mode="full".')
    if mode == "approximate" and (reason := _unskippable(bundle, chain)):
        raise UsageError(
            f"{bundle.path} does not support mode approximate: {reason}",
            fix="Use another mode.",
        )


def _unskippable(bundle: Bundle, chain: Chain) -> str:
    """Why tokens cannot skip components; empty if they can."""
    components = bundle.manifest.components
    if any(len(exit_.path) > 1 for exit_ in chain.stops):
        return "its exits have adapters, whose states would lack the tokens that stopped earlier"
    for name in chain.components[1:]:
        if token_states(components[name]) and not components[name].projections:
            return "it has no projections for tokens that skip a component"
    return ""


__all__ = ["Drafting", "check_mode", "make_mode"]
