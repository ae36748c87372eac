"""Training of exits: all of the model together, or the exit heads alone on a frozen backbone.

`train_joint` minimises a weighted sum of the exits' cross-entropies (BranchyNet, arXiv:1709.01686),
`train_heads` the same over the heads only. With distillation each early exit also learns from the
last one's softened answers (arXiv:1905.08094). Both are functions that a script calls: it brings
the batches, they bring optimizer, schedule and a state file from which an interrupted training goes
on.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.models.classifier import ExitClassifier

Batch = tuple[Mapping[str, torch.Tensor], torch.Tensor]
Batches = Callable[[int], Batch]
"""``batches(step)`` gives that step's inputs and labels ``[batch]``. A function of the step, not an
iterator: a resumed training asks for the very batches that an uninterrupted one would have seen."""
Progress = Callable[[int, int, float], None]
"""Called as ``progress(steps done, of, loss)`` after every step."""

STATE_FORMAT = 1
GRADIENT_NORM_LIMIT = 1.0


def train_joint(
    classifier: ExitClassifier,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: int = 0,
    weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    temperature: float = 2.0,
    state_file: str | os.PathLike[str] | None = None,
    save_every: int = 200,
    progress: Progress | None = None,
) -> list[float]:
    """Trains backbone and exits together with AdamW, linear warm-up and cosine decay.

    Args:
        classifier: What to train, in place; left in eval mode with `trained` set.
        batches: ``batches(step) -> (inputs, labels)``.
        steps: Optimizer steps in all, those of earlier runs included.
        learning_rate: Peak, reached after `warmup` steps.
        weight_decay: For matrices; biases, norms and embeddings of one row have none.
        warmup: Steps of linear warm-up.
        weights: One per exit, shallow to deep, the last exit included. None: equal.
        distillation: Share of the early exits' loss that comes from the last exit's answers,
            from 0 to 1.
        temperature: Softens both sides of the distillation.
        state_file: Where training is saved every `save_every` steps and resumed from. Delete it to
            start anew.
        progress: Told of every step.

    Returns:
        The loss of each step made by this call.

    Raises:
        UsageError: An argument that cannot be meant.
        ExportError: `state_file` is not of this training, or the loss is not finite.
    """
    return _train(
        classifier,
        list(classifier.parameters()),
        batches,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        loss_of=_loss(classifier, weights, distillation, temperature, last=True),
        settings=f"joint {weights} {distillation} {temperature}",
        prepare=classifier.train,
        state_file=state_file,
        save_every=save_every,
        progress=progress,
    )


def train_heads(
    classifier: ExitClassifier,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: int = 0,
    weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    temperature: float = 2.0,
    state_file: str | os.PathLike[str] | None = None,
    save_every: int = 200,
    progress: Progress | None = None,
) -> list[float]:
    """Trains the exit heads alone; backbone and last head stay bit for bit as they are.

    The backbone runs as it will on the device, without dropout and with its batch statistics fixed.
    The arguments are those of `train_joint`; `weights` has one entry per early exit.
    """
    if not len(classifier.heads):
        raise UsageError(
            "train_heads: the classifier has no exit heads", fix="Read it with exits=[...]."
        )

    def prepare() -> None:
        classifier.eval()
        classifier.heads.train()

    frozen = [p for p in classifier.model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return _train(
            classifier,
            list(classifier.heads.parameters()),
            batches,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            loss_of=_loss(classifier, weights, distillation, temperature, last=False),
            settings=f"heads {weights} {distillation} {temperature}",
            prepare=prepare,
            state_file=state_file,
            save_every=save_every,
            progress=progress,
        )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def exit_loss(
    logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    temperature: float = 2.0,
) -> torch.Tensor:
    """Weighted mean of the exits' losses.

    With a = `distillation`, T = `temperature`, z = logits of an exit, y = those of the last one
    held constant: an early exit's loss is (1 - a) CE(z, label) + a T² KL(softmax(y / T) ||
    softmax(z / T)), the last one's is CE(y, label). T² keeps gradients comparable
    (arXiv:1503.02531).

    Args:
        logits: Of every exit, shallow to deep, each ``[batch, classes]``.
        labels: ``[batch]``, class numbers.
        weights: One per exit; 0 leaves an exit's own loss out.
    """
    weights = [1.0] * len(logits) if weights is None else weights
    target = functional.log_softmax(logits[-1].detach() / temperature, dim=-1)
    total = logits[-1].new_zeros(())
    for number, (z, weight) in enumerate(zip(logits, weights, strict=True)):
        if weight == 0:
            continue
        loss = functional.cross_entropy(z, labels)
        if distillation and number < len(logits) - 1:
            soft = functional.log_softmax(z / temperature, dim=-1)
            distance = functional.kl_div(soft, target, reduction="batchmean", log_target=True)
            loss = (1 - distillation) * loss + distillation * temperature**2 * distance
        total = total + weight * loss
    return total / sum(weights)


def _loss(
    classifier: ExitClassifier,
    weights: Sequence[float] | None,
    distillation: float,
    temperature: float,
    *,
    last: bool,
) -> Callable[[Batch], torch.Tensor]:
    """The loss of a batch, once the arguments were found to make sense."""
    early = len(classifier.heads)
    count = early + 1 if last else early
    chosen = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(chosen) != count:
        raise UsageError(
            f"weights: {len(chosen)} for {count} exits", fix="Give one per exit, shallow to deep."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in chosen) or not sum(chosen):
        raise UsageError(
            f"weights: {chosen} cannot weigh losses", fix="Give numbers >= 0, not all of them 0."
        )
    if not 0 <= distillation <= 1 or not temperature > 0:
        raise UsageError(
            f"distillation {distillation}, temperature {temperature} cannot be meant",
            fix="distillation lies between 0 and 1, temperature above 0.",
        )
    all_weights = chosen if last else [*chosen, 0.0]

    def loss_of(batch: Batch) -> torch.Tensor:
        inputs, labels = batch
        return exit_loss(
            classifier(**inputs),
            labels,
            weights=all_weights,
            distillation=distillation,
            temperature=temperature,
        )

    return loss_of


def _train(
    classifier: ExitClassifier,
    parameters: list[nn.Parameter],
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup: int,
    loss_of: Callable[[Batch], torch.Tensor],
    settings: str,
    prepare: Callable[[], object],
    state_file: str | os.PathLike[str] | None,
    save_every: int,
    progress: Progress | None,
) -> list[float]:
    if steps < 1 or save_every < 1 or not 0 <= warmup <= steps:
        raise UsageError(
            f"steps {steps}, warmup {warmup}, save_every {save_every} cannot be meant",
            fix="steps and save_every are at least 1, warmup at most steps.",
        )
    optimizer = torch.optim.AdamW(_groups(parameters, weight_decay), lr=learning_rate)
    names = sorted(name for name, _ in classifier.named_parameters())
    settings += f" {steps} {learning_rate} {weight_decay} {warmup} {names}"
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()
    path = None if state_file is None else Path(state_file)
    start = 0
    if path is not None and path.exists():
        start = _resume(path, classifier, optimizer, fingerprint)
    losses = []
    prepare()
    try:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(step, steps, warmup)
            loss = loss_of(batches(step))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ExportError(
                    f"training: the loss of step {step + 1} is {losses[-1]}",
                    fix="Lower the learning rate or warm up longer; check inputs for NaN.",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM_LIMIT)
            optimizer.step()
            if path is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                _save(path, classifier, optimizer, step + 1, fingerprint)
            if progress is not None:
                progress(step + 1, steps, losses[-1])
    finally:
        classifier.eval()
    classifier.trained = True
    classifier.provenance["exits"] = "trained"
    return losses


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms, class tokens and positions (whose first axis is 1) do not."""
    decays: list[nn.Parameter] = []
    stays: list[nn.Parameter] = []
    for parameter in parameters:
        (decays if parameter.ndim > 1 and parameter.shape[0] > 1 else stays).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decays, "weight_decay": weight_decay},
        {"params": stays, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _save(
    path: Path,
    classifier: ExitClassifier,
    optimizer: torch.optim.Optimizer,
    done: int,
    fingerprint: str,
) -> None:
    state = {
        "format": STATE_FORMAT,
        "fingerprint": fingerprint,
        "done": done,
        "weights": classifier.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(
    path: Path, classifier: ExitClassifier, optimizer: torch.optim.Optimizer, fingerprint: str
) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["format"] == STATE_FORMAT and state["fingerprint"] == fingerprint
    except Exception as error:  # torch.load raises whatever its readers raise
        raise ExportError(
            f"{path}: not a training state ({type(error).__name__})",
            fix="Delete it to start the training anew, or name another state_file.",
        ) from error
    if not known:
        raise ExportError(
            f"{path}: the state of another training (other steps, rates, weights or model)",
            fix="Use the arguments it was made with, or delete it to start anew.",
        )
    classifier.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return int(state["done"])


__all__ = ["Batch", "Batches", "exit_loss", "train_heads", "train_joint"]
