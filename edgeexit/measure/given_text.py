"""What a policy does on texts that are given (teacher forcing): agreement and perplexity.

The audit of mode ``fast`` asks the last exit about a text that early exits have begun. A model goes
along with a bad beginning, so exits that write nonsense still find agreement there. On a given text
every exit reads the same words, which somebody else wrote: what it says there is what it is worth.
Catch-up keeps the states of ``fast`` exact, so these are the exits that ``fast`` takes on this
text; of ``approximate`` they are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.policy import Policy, Rule
from edgeexit.measure.texts import Text, as_data
from edgeexit.measure.trace import Trace, record, replay
from edgeexit.runtime import Model

FEW_TOKENS = 200
"""Below so many tokens, figures are no more than a hint."""


@dataclass(frozen=True)
class GivenText:
    """A policy on given texts.

    Attributes:
        tokens: Tokens that another one follows.
        exits: Exit -> how many of them it answers.
        agreement: Share of the tokens that leave early for which the last exit predicts the same
            token; None: none leaves early.
        agreement_of_all_tokens: The same of all tokens; those that do not leave early agree.
        perplexity: Of the texts, by the exits that the policy takes.
        perplexity_full: Of the texts, by the last exit.
    """

    tokens: int
    exits: dict[str, int]
    agreement: float | None
    agreement_of_all_tokens: float
    perplexity: float
    perplexity_full: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, rounded, for a report; None in place of infinity."""

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
        few = f" (only {self.tokens} tokens: a hint)" if self.tokens < FEW_TOKENS else ""
        return (
            f"on given text{few}: {early / self.tokens:.0%} of tokens leave early{agrees}; "
            f"perplexity {self.perplexity:.4g}, at full depth {self.perplexity_full:.4g}"
        )


def judge(trace: Trace, policy: Policy | Rule) -> GivenText | None:
    """A policy, or the rule of the chain that writes, on the texts of a trace. None: its rows are
    no tokens, or none of them has another one behind it."""
    if trace.next_log_probs is None:
        return None
    return of_exits(trace, replay(trace, policy))


def of_exits(trace: Trace, taken: NDArray[np.int64]) -> GivenText | None:
    """The same for exits that were chosen already, one per row of the trace."""
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
        perplexity=_perplexity(chosen),
        perplexity_full=_perplexity(trace.next_log_probs[-1, rows]),
    )


def on_given_texts(
    model: Model,
    texts: Sequence[Sequence[int]],
    inputs: Sequence[Mapping[str, NDArray]] | None = None,
) -> GivenText | None:
    """The model's policy on texts, as token ids.

    Args:
        model: One that writes. It opens its components again with every score, if they were not
            opened so, and keeps them: time it before.
        texts: Each at least one token.
        inputs: Per text, what earlier chains take, with one row.

    Returns:
        None if no text has a second token.
    """
    others = inputs or [{} for _ in texts]
    pairs = zip(texts, others, strict=True)
    given = [Text(list(text), dict(other)) for text, other in pairs if len(text) > 1]
    if not given:
        return None
    data = as_data(given, model.bundle, "given texts")
    return judge(record(model, data, 1, token_times=False), model.policy)


def _perplexity(log_probs: NDArray[np.float32]) -> float:
    mean = float(log_probs.mean(dtype=np.float64))
    return math.exp(-mean) if mean > -700 else math.inf


__all__ = ["FEW_TOKENS", "GivenText", "judge", "of_exits", "on_given_texts"]
