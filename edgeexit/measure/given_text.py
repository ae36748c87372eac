"""Evaluates a policy on given texts (teacher forcing): agreement and perplexity.

The audit of mode ``fast`` compares exits on the text that early exits have generated. A model tends
to continue a bad text, so agreement there can be high even if the exits are bad. On a given text,
all exits read the same words, so the figures show their quality. The exits taken are those of mode
``fast``, whose states are exact; mode ``approximate`` may take others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.next_tokens import perplexity
from edgeexit.bundle.policy import Policy, Rule, rule_of
from edgeexit.measure.texts import Text, as_data
from edgeexit.measure.trace import Trace, record, replay
from edgeexit.runtime import Model

FEW_TOKENS = 200
"""With fewer tokens, figures are only a rough estimate."""


@dataclass(frozen=True)
class GivenText:
    """A policy on given texts.

    Attributes:
        tokens: Number of tokens that have a next token.
        exits: Exit -> number of tokens that it answers.
        agreement: Share of early tokens for which the last exit predicts the same token; None if
            no token is early.
        agreement_of_all_tokens: The same for all tokens; tokens of the last exit count as agreeing.
        perplexity: Perplexity of the texts with the exits that the policy takes.
        perplexity_full: Perplexity of the texts at the last exit.
    """

    tokens: int
    exits: dict[str, int]
    agreement: float | None
    agreement_of_all_tokens: float
    perplexity: float
    perplexity_full: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, rounded, for a report; infinity becomes None."""

        def plain(value: Any) -> Any:
            if not isinstance(value, float):
                return value
            return round(value, 4) if math.isfinite(value) else None

        return {name: plain(value) for name, value in asdict(self).items()}

    def describe(self) -> str:
        """One line for people."""
        early = self.tokens - self.exits.get(list(self.exits)[-1], 0)
        agrees = ""
        if self.agreement is not None:
            agrees = f", and the last exit agrees with {self.agreement:.1%} of those"
        few = f" (only {self.tokens} tokens: imprecise)" if self.tokens < FEW_TOKENS else ""
        return (
            f"on given text{few}: {early / self.tokens:.0%} of tokens exit early{agrees}; "
            f"perplexity {self.perplexity:.4g}, at full depth {self.perplexity_full:.4g}"
        )


def judge(trace: Trace, policy: Policy | Rule) -> GivenText | None:
    """Evaluates a policy, or a rule of the chain that writes, on the texts of a trace. None if its
    rows are not tokens, or if no token has a next token."""
    if trace.next_log_probs is None:
        return None
    return of_exits(trace, replay(trace, policy))


def of_exits(trace: Trace, taken: NDArray[np.int64]) -> GivenText | None:
    """The same for given exits, one per row of the trace."""
    assert trace.next_log_probs is not None
    known = ~np.isnan(trace.next_log_probs[-1])
    if not known.any():
        return None
    taken, rows = taken[known], np.flatnonzero(known)
    predicted = trace.predictions[:, rows]
    agrees = predicted[taken, np.arange(len(rows))] == predicted[-1]
    last = len(trace.exits) - 1
    early = taken < last
    chosen = trace.next_log_probs[taken, rows]
    counts = np.bincount(taken, minlength=last + 1).tolist()
    return GivenText(
        tokens=len(rows),
        exits=dict(zip(trace.exits, counts, strict=True)),
        agreement=float(agrees[early].mean()) if early.any() else None,
        agreement_of_all_tokens=float(agrees.mean()),
        perplexity=perplexity(chosen),
        perplexity_full=perplexity(trace.next_log_probs[-1, rows]),
    )


def on_given_texts(
    model: Model,
    texts: Sequence[Sequence[int]],
    inputs: Sequence[Mapping[str, NDArray]] | None = None,
) -> GivenText | None:
    """Evaluates the model's policy on texts given as token ids.

    Args:
        model: A model that writes text. It reopens its components with all scores, if it has not
            done so, and keeps them: measure times before.
        texts: Token ids, at least one per text.
        inputs: Per text, the inputs of earlier chains, with one row.

    Returns:
        None if every text has a single token.
    """
    others = inputs or [{} for _ in texts]
    pairs = zip(texts, others, strict=True)
    given = [Text(list(text), dict(other)) for text, other in pairs if len(text) > 1]
    if not given:
        return None
    data = as_data(given, model.bundle, "given texts")
    rule = rule_of(model.policy, model.chain, model.chain_name)  # drops are in the trace already
    return judge(record(model, data, 1, token_times=False), rule)


__all__ = ["FEW_TOKENS", "GivenText", "judge", "of_exits", "on_given_texts"]
