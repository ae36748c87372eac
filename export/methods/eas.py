"""EAS ("Not All Attention is Needed", IJCV 2026): finds attentions that a task does not need, and
removes them before export.

    found = search(range(1, 17), remove=8, loss=loss, train=train, steps=400)
    rewrite(model, found.chosen)
    ExitTrainer(model, Eas(), arguments, train_dataset=rows).train()
    fold(model, batches)          # optional: no cost, but an approximation
    model.save_pretrained("my-llama-eas")

An adapter stands in place of a removed attention (`edgeexit.export.exits.skipped_attention.Pia`).
The search knows nothing of the task: a function gives it the loss without some attentions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.skipped_attention import RANK, SkippedAttention, check_removed
from edgeexit.export.methods.images import further_inputs, prompts_of
from edgeexit.export.methods.layerskip import check_decoder, checked_tokens, token_loss
from edgeexit.export.methods.method import Batch, Forward, Loss, Method

Trained = Literal["adapters", "decoder"]
LARGEST, LARGEST_LOSS = 100.0, 20.0
"""Of scores and of gains, and of losses, beyond which an exponential means nothing."""


def rewrite(model: ExitDecoder, layers: Iterable[int], rank: int | None = RANK) -> None:
    """Removes the attention of some layers of a model, in place.

    The removed attentions' last projections become 0, so that a checkpoint which transformers
    itself reads computes the model without adapters, not another one.

    Args:
        model: A model of the Llama or Qwen families, alone or behind a vision tower.
        layers: 1 = the first; at least one layer must keep its attention.
        rank: Of the new adapters, which change nothing until they are trained; None: no adapters.

    Raises:
        UsageError: Layers or rank are out of range, the family is not supported, or attentions were
            removed before.
    """
    check_decoder("EAS", model)
    removed = _whole_numbers("layers", layers)
    if gone := model.skipped.removed:
        raise _removed_before(gone)
    check_removed(removed, model.depth)
    check_rank(rank)
    ranks = {} if rank is None else dict.fromkeys(removed, rank)
    skipped = SkippedAttention(model.layers, model.trunk.width, ranks, removed)
    model.skipped = skipped.to(next(model.model.parameters()))
    for layer in removed:
        model.layers[layer - 1].silence()  # type: ignore[operator]


def search_model(model: ExitDecoder, rank: int = RANK) -> SkippedAttention:
    """Makes a model that a `search` can train: every layer gets an adapter, and nothing else has
    gradients. The model is for the search only; `rewrite` a fresh one.

    Args:
        model: As for `rewrite`; it is changed.
        rank: Of the adapters.

    Returns:
        The adapters (parameters ``.pia``), whose ``remove(layers)`` leaves these layers, and only
        these, without attention.

    Raises:
        UsageError: The rank is out of range, the family is not supported, or attentions were
            removed before.
    """
    check_decoder("EAS", model)
    check_rank(rank)
    if gone := model.skipped.removed:
        raise _removed_before(gone)
    ranks = dict.fromkeys(range(1, model.depth + 1), rank)
    skipped = SkippedAttention(model.layers, model.trunk.width, ranks)
    model.requires_grad_(False)
    model.skipped = skipped.to(next(model.model.parameters()))
    model.skipped.pia.requires_grad_(True)
    return model.skipped


def _removed_before(layers: Sequence[int]) -> UsageError:
    return UsageError(
        f"EAS: the attentions of layers {', '.join(map(str, layers))} are removed already",
        fix="Name all layers at once, for the model as it was.",
    )


def check_rank(rank: int | None) -> None:
    """Raises `UsageError` for a rank that an adapter cannot have."""
    if rank is not None and (type(rank) is not int or rank < 2 or rank % 2):
        raise UsageError(
            f"EAS: an adapter cannot have the rank {rank!r}",
            fix="Give an even number, as in rank=32, or None for no adapters.",
        )


@dataclass(frozen=True)
class Eas(Method):
    """Trains a model without some of its attentions (`rewrite`), on the labels of its last layer.

    Batches hold ``input_ids`` and ``labels`` ``[batch, seq]``; labels are -100 up to the first
    answer. That part of a row is its prompt, which adapters summarise. Vision-language models also
    read ``pixel_values``. The paper trains the adapters alone.

    Attributes:
        trained: ``adapters``: those in place of attentions, with everything else frozen.
            ``decoder``: all layers of the decoder, its embedding and its head as well.
        first: With ``decoder``, the first layer that is trained. With 2 or more, the layers before
            it, the embedding and the head stay as they are, and so do exits and gates there.
    """

    trained: Trained = "adapters"
    first: int = 1
    left_out: ClassVar[str] = "it trains the last layer's answers"

    def check(self, model: Any) -> None:
        check_decoder("Eas", model)
        if self.trained not in get_args(Trained):
            raise UsageError(
                f"Eas: trained {self.trained!r} is not known",
                fix=f"Use one of {', '.join(get_args(Trained))}.",
            )
        if type(self.first) is not int or not 1 <= self.first <= model.depth:
            raise UsageError(
                f"Eas: the model has no layer {self.first!r} to train from",
                fix=f"Give a layer from 1 to {model.depth}.",
            )
        if self.trained == "adapters" and not len(model.skipped.pia):
            raise UsageError(
                "Eas: no attention of the model has an adapter in its place",
                fix="Remove some first: eas.rewrite(model, [3, 4]), with the layers that "
                'eas.search found; or train the whole decoder: Eas(trained="decoder").',
            )

    def part(self, model: ExitDecoder) -> nn.Module:
        if self.trained == "adapters":
            return model.skipped.pia
        own = nn.ModuleList([model.skipped.pia, *model.layers[self.first - 1 :]])
        if self.first == 1:
            own.append(model.trunk.head)
            own.register_parameter("embedding", model.trunk.embedding)  # type: ignore[arg-type]
        return own

    def inputs(self, model: ExitDecoder) -> list[str]:
        return ["input_ids", "attention_mask", *model.read_by_embed]

    def loss(self, model: ExitDecoder, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        tokens, targets = checked_tokens(model, inputs, step)
        logits = forward(tokens, exits=[model.depth], **further_inputs(model, inputs, step))
        last = logits[model.depth]
        return token_loss(last, targets), {f"exit_{model.depth}": last}

    def count(self, model: ExitDecoder, inputs: Batch) -> torch.Tensor:
        return (inputs["labels"][:, 1:] >= 0).sum()

    def trains(self, model: ExitDecoder) -> list[str]:
        return []


@torch.no_grad()
def fold(model: ExitDecoder, batches: Iterable[Batch]) -> None:
    """Folds the adapters into the weights of their layers: each reads one fixed summary from now
    on, the mean over the prompts of these batches.

    Give prompts of the kind that the model will see: all with an image, or all without.

    Args:
        batches: As for a training with `Eas`; or prompts alone, whose labels are all -100.

    Raises:
        UsageError: There are no adapters or no batches, or a summary is not finite.
    """
    if not model.skipped.ranks:
        raise UsageError(
            "EAS: no attention of the model has an adapter in its place, so there is none to fold",
            fix="Remove some first: eas.rewrite(model, [3, 4]).",
        )
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise UsageError(
            f"EAS: batches are a {type(batches).__name__}", fix="Give a list of batches."
        )
    sums: dict[int, torch.Tensor] = {}
    rows = 0
    for batch in batches:
        if not isinstance(batch, Mapping) or not all(torch.is_tensor(v) for v in batch.values()):
            raise UsageError(
                f"EAS: a batch is a {type(batch).__name__} of something else than tensors",
                fix='Give batches as for a training: {"input_ids": ..., "labels": ...}.',
            )
        checked_tokens(model, batch, None)
        others = further_inputs(model, batch, None)
        tokens = batch["input_ids"]
        found = model.summaries(tokens, **{"prompts": prompts_of(batch), **others})
        for layer, own in found.items():
            sums[layer] = sums.get(layer, torch.zeros(())) + own.double().sum(dim=0)
        rows += len(tokens)
    if not rows:
        raise UsageError(
            "EAS: folding needs prompts of the task, and there are no batches",
            fix="Give batches of the data that the model was trained on.",
        )
    for layer, total in sums.items():
        pia = model.skipped.adapter(layer)
        assert pia is not None
        parts = [*pia.parameters(), total]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise UsageError(
                f"EAS: the adapter of layer {layer}, or its summary, is not finite",
                fix="Check the model's weights for NaN, or train it again.",
            )
        pia.fixed.copy_(total / rows)


@dataclass
class Search:
    """What a search for unneeded attentions found.

    Attributes:
        scores: Layer -> score; the higher, the less its attention is needed.
        tried: Layers without attention, and the loss, in the order of the search.
        remove: How many attentions to remove.
    """

    scores: dict[int, float]
    remove: int
    tried: list[tuple[tuple[int, ...], float]] = field(default_factory=list)

    @property
    def chosen(self) -> list[int]:
        """The layers with the highest scores, in order."""
        ranked = sorted(self.scores, key=lambda layer: (-self.scores[layer], layer))
        return sorted(ranked[: self.remove])

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "chosen": self.chosen,
            "scores": {str(layer): round(score, 5) for layer, score in self.scores.items()},
            "tried": [[list(layers), round(loss, 6)] for layers, loss in self.tried],
        }


def search(
    layers: Iterable[int],
    remove: int,
    loss: Callable[[Sequence[int]], float],
    *,
    train: Callable[[Sequence[int]], None] | None = None,
    steps: int = 200,
    warm_up: int = 0,
    turn: int = 10,
    subsets: int = 3,
    rate: float = 1.0,
    seed: int = 0,
) -> Search:
    """Looks for attentions that can be removed together (the paper's bandit over subsets).

    In every step, `remove` layers are drawn without replacement, in proportion to the sigmoids of
    their scores, and `train` makes a training step without their attentions. Every `turn` steps
    behind the warm-up, `subsets` sets of layers are drawn and their losses compared, and the
    scores of the layers in a set rise or fall with exp(-loss).

    Args:
        layers: Candidates.
        remove: Attentions to remove.
        loss: The loss without the attentions of some layers, on a batch that is held out.
        train: A training step without the attentions of some layers; None: nothing is trained.
        steps: Training steps.
        turn, subsets, rate: In the paper 10 or 3 steps, 3 or 5 sets, and 1 to 2.
        seed: Of all draws.

    Raises:
        UsageError: A number is out of range, or a loss is not finite or too large.
    """
    scores = dict.fromkeys(_whole_numbers("layers", layers), 0.0)
    _whole_numbers("numbers", [remove, steps, warm_up, turn, subsets, seed])
    if not callable(loss) or not (train is None or callable(train)):
        raise UsageError("EAS: loss or train is no function", fix="Give loss(layers).")
    if not 0 < remove < len(scores):
        raise UsageError(
            f"EAS: {remove} of {len(scores)} attentions cannot be removed",
            fix="Remove at least one, and leave at least one.",
        )
    compared = range(max(turn, 1), steps + 1, max(turn, 1))
    finite = isinstance(rate, (int, float)) and 0 < rate < math.inf
    if turn < 1 or subsets < 2 or seed < 0 or not finite or not compared or compared[-1] <= warm_up:
        raise UsageError(
            f"EAS: {steps} steps with {subsets} subsets every {turn} steps behind {warm_up} at a "
            f"rate of {rate} compare nothing",
            fix="Give more steps than warm_up and than turn, two subsets or more, and a rate above "
            "0.",
        )
    found = Search(scores, remove)
    random = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        if train is not None:
            train(_draw(scores, remove, random))
        if step > warm_up and step % turn == 0:
            _learn(found, [_draw(scores, remove, random) for _ in range(subsets)], loss, rate)
    return found


def _learn(
    found: Search,
    subsets: Sequence[tuple[int, ...]],
    loss: Callable[[Sequence[int]], float],
    rate: float,
) -> None:
    """Compares subsets and changes the scores."""
    try:
        losses = [float(loss(subset)) for subset in subsets]
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"EAS: a loss is no number ({error})", fix="Return a float from loss(layers)."
        ) from error
    found.tried += zip(subsets, losses, strict=True)
    if not all(-LARGEST < loss <= LARGEST_LOSS for loss in losses):
        raise UsageError(
            f"EAS: losses of subsets are {losses}, and scores change with exp(-loss)",
            fix=f"Return losses up to {LARGEST_LOSS:.0f}; a mean of cross-entropies in nats is "
            "usual, a sum over a batch is too large.",
        )
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    before = dict(found.scores)
    for subset, reward in zip(subsets, rewards, strict=True):
        for layer in subset:
            chance = _sigmoid(before[layer])
            found.scores[layer] += rate * (reward - mean) * chance * (1 - chance)


def _draw(scores: Mapping[int, float], count: int, random: np.random.Generator) -> tuple[int, ...]:
    """Layers drawn without replacement, in proportion to the sigmoids of their scores."""
    chances = np.array([_sigmoid(score) for score in scores.values()])
    drawn = random.choice(list(scores), count, replace=False, p=chances / chances.sum())
    return tuple(sorted(int(layer) for layer in drawn))


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-max(min(score, LARGEST), -LARGEST)))


def _whole_numbers(what: str, given: object) -> list[int]:
    """A list of whole numbers. Raises `UsageError` for anything else."""
    found: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if wrong := [one for one in found if type(one) is not int]:
        raise UsageError(f"EAS: {what}: {wrong[0]!r} is no whole number", fix="Give ints.")
    return found


__all__ = ["Eas", "Search", "check_rank", "fold", "rewrite", "search", "search_model"]
