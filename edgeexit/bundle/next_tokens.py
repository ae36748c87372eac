"""How likely a model finds the tokens of a text, from which perplexity is computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEXT_LOG_PROB = "next_log_prob"
"""Name of the log-probabilities among an exit's outputs."""
NO_TOKEN = -1
"""Instead of a token: none follows, or the token was dropped and nothing answers behind it."""


def next_tokens(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The token behind each of texts ``[batch, seq]``; `NO_TOKEN` behind the last."""
    return np.concatenate([tokens[:, 1:], np.full((len(tokens), 1), NO_TOKEN)], axis=1)


def log_probs(logits: NDArray[Any], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Log-probabilities ``[batch, seq]`` (natural logarithm) of tokens, from logits ``[batch, seq,
    vocabulary]``; NaN for `NO_TOKEN`. Computed token by token, because a copy of all logits may not
    fit in memory."""
    found = np.full(tokens.shape, np.nan, np.float32)
    for row, place in np.argwhere(tokens != NO_TOKEN):
        own = logits[row, place].astype(np.float32)
        own -= own.max()
        found[row, place] = own[tokens[row, place]] - np.log(np.exp(own).sum())
    return found


def perplexity(log_probs: NDArray[np.float32]) -> float:
    """Of tokens with these log-probabilities, NaN left out; infinite if one is impossible."""
    mean = float(-np.nanmean(log_probs, dtype=np.float64))
    return math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else math.inf


__all__ = ["NEXT_LOG_PROB", "NO_TOKEN", "log_probs", "next_tokens", "perplexity"]
