"""The training loop that every method shares: AdamW, warm-up and cosine decay, and a state file
from which an interrupted training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from edgeexit.errors import ExportError, UsageError

Progress = Callable[[int, int, float], None]
"""Called as ``progress(steps done, of, loss)`` after every step."""

STATE_FORMAT = 1
GRADIENT_NORM_LIMIT = 1.0


def train(
    model: nn.Module,
    part: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup: int,
    settings: str,
    state_file: str | os.PathLike[str] | None,
    save_every: int,
    progress: Progress | None,
) -> list[float]:
    """Minimises ``loss_at(step)`` with AdamW, linear warm-up, cosine decay and clipped gradients.

    Args:
        model: What is trained, in place; its state dict is what the state file holds. Left in eval
            mode.
        part: What of it the optimizer moves, the model itself or a module in it. The rest runs as
            it will on the device, without dropout and with its batch statistics fixed.
        loss_at: The loss of a step's batch; a function of the step, so that a resumed training sees
            what an uninterrupted one would have seen.
        settings: What besides these arguments makes two trainings the same.

    Returns:
        The loss of each step made by this call.
    """
    if steps < 1 or save_every < 1 or not 0 <= warmup <= steps:
        raise UsageError(
            f"steps {steps}, warmup {warmup}, save_every {save_every} cannot be meant",
            fix="steps and save_every are at least 1, warmup at most steps.",
        )
    parameters = list(part.parameters())
    optimizer = torch.optim.AdamW(_groups(parameters, weight_decay), lr=learning_rate)
    names = sorted(name for name, _ in model.named_parameters())
    settings += f" {steps} {learning_rate} {weight_decay} {warmup} {names}"
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()
    path = None if state_file is None else Path(state_file)
    start = 0
    if path is not None and path.exists():
        start = _resume(path, model, optimizer, fingerprint)
    losses = []
    with _moved(part, model):
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(step, steps, warmup)
            loss = loss_at(step)
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
                _save(path, model, optimizer, step + 1, fingerprint)
            if progress is not None:
                progress(step + 1, steps, losses[-1])
    return losses


@contextlib.contextmanager
def _moved(part: nn.Module, model: nn.Module) -> Iterator[None]:
    """Only the part is in train mode and takes gradients; afterwards all is as it was, in eval
    mode."""
    parameters = set(map(id, part.parameters()))
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in parameters]
    model.eval()
    part.train()
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)


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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    done: int,
    fingerprint: str,
) -> None:
    state = {
        "format": STATE_FORMAT,
        "fingerprint": fingerprint,
        "done": done,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str
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
    model.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return int(state["done"])


__all__ = ["Progress", "train"]
