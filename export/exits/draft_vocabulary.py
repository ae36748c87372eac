"""Draft vocabularies: heads of early exits over the frequent tokens only.

With a large vocabulary most of a draft's time is the head's. An exit may have a head over some
tokens (FR-Spec, arXiv:2502.14856): its other logits are -inf, so it never drafts those tokens, and
mode ``exact`` still writes the full model's text. `frequent_tokens` chooses tokens by their counts,
`ExitDecoder.set_draft_vocabularies` gives them to exits, and `ShortHead` is such a head.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from edgeexit.errors import ExportError, UsageError

_FEWEST = 2
"""Tokens of a draft vocabulary at least: scores compare the likeliest with the next."""


def frequent_tokens(
    counts: Mapping[int, int], size: int, always: Iterable[int] = ()
) -> tuple[int, ...]:
    """The most frequent tokens of some texts, in the order of their ids.

    Args:
        counts: Token id -> how often it occurs, as ``collections.Counter`` counts.
        size: Number of tokens; fewer if fewer occur.
        always: Tokens to include whatever their counts are, such as stop tokens.

    Raises:
        UsageError: `size` is no number of tokens, or is smaller than `always`.

    >>> frequent_tokens({7: 2, 3: 9, 5: 4, 8: 1}, size=3, always=[8])
    (3, 5, 8)
    """
    kept = dict.fromkeys(always)
    if type(size) is not int or size < max(_FEWEST, len(kept)):
        raise UsageError(
            f"frequent_tokens: size is {size!r}",
            fix=f"Give a number of tokens from {max(_FEWEST, len(kept))} on.",
        )
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    occurring = [token for token in ordered if counts[token] > 0 and token not in kept]
    return tuple(sorted([*kept, *occurring[: size - len(kept)]]))


def check_vocabularies(
    given: Mapping[int, Iterable[int]], exits: Sequence[int], vocabulary: int
) -> dict[int, tuple[int, ...]]:
    """Draft vocabularies by exit layer, from shallow to deep, with ids in order. Raises
    `UsageError` for invalid ones.

    Args:
        exits: Layers with an early exit.
        vocabulary: Tokens of the model.
    """
    found = {}
    for layer, ids in given.items():
        if layer not in exits:
            raise UsageError(
                f"draft vocabularies: there is no early exit behind layer {layer!r} (exits: "
                f"{', '.join(map(str, exits)) or 'none'})",
                fix="Give layers that have an exit.",
            )
        found[layer] = _checked(
            f"draft vocabulary of the exit behind layer {layer}", ids, vocabulary
        )
    return {layer: found[layer] for layer in exits if layer in found}


def _checked(what: str, ids: Iterable[int], vocabulary: int) -> tuple[int, ...]:
    fix = "Give token ids of the model, each once, as frequent_tokens returns them."
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise UsageError(f"{what}: it is {ids!r:.40}, not token ids", fix=fix)
    tokens: list[int] = []
    for token in ids:
        number = isinstance(token, numbers.Integral) and not isinstance(token, bool)
        if not number or not 0 <= token < vocabulary:
            raise UsageError(
                f"{what}: {token!r} is not a token id of the model (0 to {vocabulary - 1})", fix=fix
            )
        tokens.append(int(token))
    if len(set(tokens)) < len(tokens):
        twice = next(token for n, token in enumerate(tokens) if token in tokens[:n])
        raise UsageError(f"{what}: the token {twice} is given twice", fix=fix)
    if len(tokens) < _FEWEST:
        raise UsageError(
            f"{what}: it has {len(tokens)} token(s)",
            fix=f"Give {_FEWEST} or more; some thousands are usual.",
        )
    return tuple(sorted(tokens))


class ShortHead(nn.Module):
    """A head over some tokens: ``state [rows, width] -> (logits [rows, tokens], logits [rows,
    vocabulary] with -inf elsewhere, token [rows])``. It has a copy of these tokens' weights.

    Args:
        head, width: As in `edgeexit.export.exits.decoder_trunk.DecoderTrunk`.
        ids: The tokens, in order.
        vocabulary: Tokens of the model.

    Raises:
        ExportError: The head is no projection to the vocabulary with, at most, a bias behind it.
    """

    def __init__(self, head: nn.Module, ids: Sequence[int], width: int, vocabulary: int) -> None:
        super().__init__()
        self.head = head_over(head, ids, width, vocabulary)
        self.vocabulary = vocabulary
        self.ids = nn.Buffer(torch.tensor(ids, dtype=torch.int64, device=_weight(head).device))

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.head(state)
        everywhere = logits.new_full((logits.shape[0], self.vocabulary), float("-inf"))
        places = self.ids.expand(logits.shape[0], -1)
        return logits, everywhere.scatter(1, places, logits), self.ids[logits.argmax(-1)]


@torch.no_grad()
def head_over(head: nn.Module, ids: Sequence[int], width: int, vocabulary: int) -> nn.Module:
    """The head over some tokens only. It shares everything with the head but its projection's and
    its bias's rows; what it computes is compared with the head.

    Raises:
        ExportError: Tokens cannot be taken from the head.
    """
    projection = _projection(head)
    if projection is None or projection.out_features != vocabulary:
        raise _not_separable(head, "it has no linear `projection` to the vocabulary")
    own = copy.copy(head)
    for part in ("_modules", "_parameters", "_buffers"):  # a copy shares them
        setattr(own, part, dict(getattr(head, part)))
    rows = torch.tensor(ids, device=projection.weight.device)
    biased = projection.bias is not None
    short = nn.Linear(projection.in_features, len(ids), bias=biased, device="meta")
    short.weight = _fixed(projection.weight[rows])
    if biased:
        short.bias = _fixed(projection.bias[rows])
    own.projection = short
    bias = getattr(head, "bias", None)
    if isinstance(bias, torch.Tensor):
        del own.bias
        own.bias = nn.Buffer(bias[rows])
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(3, width, generator=generator).to(rows.device, projection.weight.dtype)
    try:
        found, expected = own(state).float(), head(state)[:, rows].float()
        rounding = 1e3 * torch.finfo(projection.weight.dtype).eps * float(expected.abs().max())
        alike = found.shape == expected.shape and torch.allclose(found, expected, 0.0, rounding)
    except RuntimeError as error:
        raise _not_separable(head, "it does not run with fewer tokens") from error
    if not alike:
        raise _not_separable(head, "its logits depend on those of other tokens")
    return own.eval()


def _projection(head: nn.Module) -> nn.Linear | None:
    projection = getattr(head, "projection", None)
    return projection if isinstance(projection, nn.Linear) else None


def _weight(head: nn.Module) -> torch.Tensor:
    projection = _projection(head)
    return torch.empty(0) if projection is None else projection.weight


def _fixed(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def _not_separable(head: nn.Module, why: str) -> ExportError:
    return ExportError(
        f"{type(head).__name__}: this head has no draft vocabulary: {why}",
        fix="Leave draft vocabularies out, or describe the head in the family's file as a module "
        "with a linear `projection` and, if there is one, a `bias` of logits.",
    )


def described(vocabularies: Mapping[int, Collection[int]]) -> str:
    """Draft vocabularies in words.

    >>> described({2: [5, 6, 7]})
    '3 tokens behind layer 2'
    """
    found = [f"{len(ids)} tokens behind layer {layer}" for layer, ids in vocabularies.items()]
    return ", ".join(found) or "none"


__all__ = ["ShortHead", "check_vocabularies", "described", "frequent_tokens", "head_over"]
