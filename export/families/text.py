"""Shared code of the text classifiers' families: masks, pooling of a token, an example input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

EXAMPLE_TOKENS = 32


class AdditiveMask(nn.Module):
    """Maps ones (tokens) and zeros (padding) ``[batch, seq]`` to 0 and -max ``[batch, 1, 1, seq]``.

    The stem computes the mask once and segments pass it on, which saves four nodes in every later
    segment. It has a row axis, so rows that exit are removed from it as from the state.
    """

    def forward(self, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        dropped = 1.0 - attention_mask[:, None, None, :].to(dtype)
        return dropped * torch.finfo(dtype).min


class KeptMask(nn.Module):
    """Casts ones (tokens) and zeros (padding) ``[batch, seq]`` to the state's type.

    For layers that take such a mask.
    """

    def forward(self, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return attention_mask.to(dtype)


def first_token(state: torch.Tensor) -> torch.Tensor:
    """State of the first token ([CLS], <s>): ``[batch, seq, hidden] -> [batch, hidden]``."""
    return state[:, 0]


def text_example(
    names: Sequence[str], vocabulary: int, pad_id: int
) -> Callable[[int], dict[str, torch.Tensor]]:
    """Returns a function that makes random token ids; rows differ in length, with padding on the
    right."""

    def example(rows: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(rows)
        shape = (rows, EXAMPLE_TOKENS)
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        # No tokenizer puts padding among the tokens, and RoBERTa's positions depend on it.
        ids = torch.where(ids == pad_id, (pad_id + 1) % vocabulary, ids)
        lengths = torch.tensor(
            [EXAMPLE_TOKENS - (3 * row) % (EXAMPLE_TOKENS - 2) for row in range(rows)]
        )
        mask = (torch.arange(EXAMPLE_TOKENS)[None, :] < lengths[:, None]).to(torch.int64)
        ids = torch.where(mask.bool(), ids, torch.full_like(ids, pad_id))
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return {name: made[name] for name in names}

    return example
