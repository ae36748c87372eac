"""The first stage of training: the language model alone, on scenes whose image tokens are made from
what lies there.

A small language model learns to follow cards only from few steps on, and needs many thousand scenes
for it. `SoftImages` therefore stands in for the tower: a token per patch that says which class lies
there, and where. The tower then learns to make the same tokens from pixels (`train`), and both are
trained together at the end.

It begins with text alone, where a description stands first: conversations are shorter, and what is
learnt there serves for pictures. What helps it (README.md says how much):

- walks: in an answer such as ``5 7 1 3`` each token follows one card, so steps are learnt from many
  tokens at once;
- `preceding_loss`: behind layer 2 a digit in the picture must know which one is read before it, and
  the place of an answer where it starts;
- `path_loss` says what each layer should have found out. Without it, the first step is found in the
  last layer, where no second one can follow;
- `hidden_images`: in half of the turns, layers behind those that should have read a picture do not
  see it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Blip2ForConditionalGeneration, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
from conversations import FIRST_STEP, IDS, IGNORED, KINDS, Level, Turns, cover_of, make_scenes
from model import END, IMAGE, PATCHES, WORDS, language_of

SAVE_EVERY = 100
TURNS = 9
"""Questions about a scene, besides that which describes it."""
PAIRED = 2
"""The layer that should know what precedes each digit."""


class SoftImages(nn.Module):
    """Image tokens ``[batch, patches, width]`` from the class in each cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.what = nn.Embedding(data.BLANK + 1, width)
        self.where = nn.Embedding(PATCHES, width)
        for table in (self.what, self.where):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, cover: torch.Tensor) -> torch.Tensor:
        """cover ``[batch, patches]``: the class at each patch."""
        return self.what(cover) + self.where.weight


def answer_loss(logits: torch.Tensor, turns: Turns) -> tuple[torch.Tensor, dict[str, float]]:
    """The sum over kinds of the mean cross-entropy of a kind's tokens, and the share of right
    answers by ``kind steps``."""
    targets, kinds = turns.labels[:, 1:], turns.kinds[:, 1:]
    each = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    learnt = targets != IGNORED
    right = (logits[:, :-1].argmax(-1) == targets) & learnt
    loss, shares = logits.new_zeros(()), {}
    for number, kind in enumerate(KINDS, start=1):
        of_kind = learnt & (kinds == number)
        if not of_kind.any():
            continue
        loss = loss + each[of_kind].mean()
        said = of_kind & (targets != IDS[END])
        for steps in turns.steps[:, 1:][said].unique().tolist():
            asked = said & (turns.steps[:, 1:] == steps)
            shares[f"{kind} {steps}"] = right[asked].float().mean().item()
    return loss, shares


def path_loss(
    states: Sequence[torch.Tensor], read: Callable[[torch.Tensor], torch.Tensor], turns: Turns
) -> torch.Tensor:
    """Sum over the layers from `FIRST_STEP` on, the last one left out, of the cross-entropy in nats
    of a step of an answer: the first one's state must say where one step leads, that of the next
    layer where two lead. Tokens that are read or copied must be known from the first one on.

    Args:
        states: ``[batch, seq, width]``, behind the embedding and each layer.
        read: State -> logits: final norm and head.
    """
    answers = turns.paths[:, 1:, 0] != IGNORED
    targets = turns.paths[:, 1:][answers]
    reads = turns.kinds[:, 1:][answers] == 1 + KINDS.index("read")
    losses = []
    for number in range(len(states) - 1 - FIRST_STEP):
        said = read(states[FIRST_STEP + number][:, :-1][answers]).float()
        wanted = targets[:, min(number, targets.shape[1] - 1)]
        each = functional.cross_entropy(said, wanted, reduction="none")
        losses += [each[one].mean() for one in (reads, ~reads) if one.any()]
    return torch.stack(losses).sum()


def describing_turn(rng: np.random.Generator) -> int:
    """Which turn describes the scene: often the first."""
    return 0 if rng.random() < 0.4 else int(rng.integers(TURNS + 1))


def preceding_loss(states: torch.Tensor, probe: nn.Module, turns: Turns) -> torch.Tensor:
    """Cross-entropy in nats of what precedes digits and answers (`Turns.preceding`), as a probe
    reads it from states ``[batch, seq, width]``."""
    known = turns.preceding != IGNORED
    return functional.cross_entropy(probe(states[known]), turns.preceding[known])


def losses(
    model: PreTrainedModel,
    embedded: torch.Tensor,
    turns: Turns,
    probe: nn.Module,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The losses of a batch, and `answer_loss`'s shares.

    Args:
        embedded: ``[batch, seq, width]``, the language model's input.
    """
    language, norm, head = language_of(model)
    with autocast(), hidden_images(language.layers, turns):
        made = language(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
        logits = head(made.last_hidden_state)
    loss, shares = answer_loss(logits.float(), turns)
    loss = loss + path_loss(made.hidden_states, lambda state: head(norm(state)), turns)
    loss = loss + preceding_loss(made.hidden_states[PAIRED].float(), probe, turns)
    return loss, shares


@contextmanager
def hidden_images(layers: nn.ModuleList, turns: Turns) -> Iterator[None]:
    """Image tokens are hidden from each token behind its layer (`Turns.leaves`), as if they had
    left there. Attention must be ``eager``."""
    image = (turns.ids == IDS[IMAGE])[:, None, None]

    def hide(number: int, arguments: dict[str, Any]) -> dict[str, Any]:
        hidden = (turns.leaves <= number)[:, None, :, None] & image
        mask = arguments["attention_mask"]
        return arguments | {"attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, positional, named, number=number: (positional, hide(number, named)),
            with_kwargs=True,
        )
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Settings:
    """How the language model is trained.

    Attributes:
        text: Steps without images, at most; they end when all questions are answered.
        image: Steps with images, at most.
        rate: Learning rate. It rises over `warm_up` steps.
        most_steps: Of questions.
    """

    text: int = 3000
    image: int = 750
    batch: int = 32
    rate: float = 2e-3
    warm_up: int = 50
    most_steps: int = data.MOST_STEPS


class LanguageStage:
    """The language model with what is trained beside it, and how far it got."""

    def __init__(self, model: PreTrainedModel, soft: SoftImages, settings: Settings) -> None:
        self.model, self.soft, self.settings = model, soft, settings
        self.language, _, _ = language_of(model)
        self.probe = nn.Linear(model.config.text_config.hidden_size, len(WORDS))
        parts = (self.language, self.soft, self.probe)
        self.weights = [weight for part in parts for weight in part.parameters()]
        groups = [
            {"params": [w for w in self.weights if w.ndim > 1], "weight_decay": 0.05},
            {"params": [w for w in self.weights if w.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98))
        self.level, self.step, self.images_since = Level(most=settings.most_steps), 0, -1

    def done(self) -> bool:
        """Turns from text to images when it is time; whether the images are done, too."""
        begun = self.images_since if self.images_since >= 0 else 0
        most = self.settings.image if self.images_since >= 0 else self.settings.text
        if self.step - begun < most and not self.level.passed():
            return False
        if self.images_since >= 0:
            return True
        self.images_since, self.level = self.step, Level(most=self.settings.most_steps)
        with torch.no_grad():  # an image token begins as the word of what it shows
            words = [IDS[word] for word in data.DIGITS]
            self.soft.what.weight[: len(words)] = self.language.embed_tokens.weight[words]
        return False

    def take(self) -> torch.Tensor:
        """One step of training. Returns the loss."""
        rng = np.random.default_rng([1, self.step])
        image = self.images_since >= 0
        scenes = make_scenes(rng, self.settings.batch, self.level)
        before = describing_turn(rng) if image else 0
        in_front = isinstance(self.model, Blip2ForConditionalGeneration)
        turns = Turns(scenes, rng, self.level, before, TURNS - before, image, in_front=in_front)
        with autocast():
            embedded = self.language.embed_tokens(turns.ids)
            if image:
                seen = self.soft(cover_of(scenes))
                places = (turns.ids == IDS[IMAGE])[..., None]
                embedded = embedded.masked_scatter(places, seen.to(embedded.dtype))
        loss, shares = losses(self.model, embedded, turns, self.probe)
        self.level.note(shares, len(scenes[0].cards))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * min(1.0, (self.step + 1) / self.settings.warm_up)
        take(loss, self.optimizer, self.weights)
        self.step += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {"level": asdict(self.level), "at": [self.step, self.images_since]}

    def load_state_dict(self, known: dict[str, Any]) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(known[name])
        self.level = Level(**known["level"])
        self.step, self.images_since = known["at"]

    PARTS = ("language", "soft", "probe", "optimizer")


def autocast() -> torch.autocast:
    """Products in bfloat16 on processors that have instructions for them: half of the time."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def train_language(
    model: PreTrainedModel, soft: SoftImages, settings: Settings, file: Path
) -> None:
    """Trains a language model and the image tokens that it reads. Goes on from `file`, where it
    stores itself every `SAVE_EVERY` steps."""
    stage = LanguageStage(model, soft, settings)
    if file.exists():
        stage.load_state_dict(torch.load(file, weights_only=True))
    # On processors its gradients take a third of the time of the fused form's in bfloat16.
    model.set_attn_implementation({"text_config": "eager"})
    started, first = time.monotonic(), stage.step
    while not stage.done():
        loss = stage.take()
        if stage.step % 25 == 0:
            say("language", stage.step, started, loss, stage.level)
        if stage.step % SAVE_EVERY == 0:
            store(file, **stage.state_dict())
    if stage.step > first:
        store(file, **stage.state_dict())


def take(loss: torch.Tensor, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    """One step of an optimizer, with clipped gradients."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def store(file: Path, **state: object) -> None:
    """Writes a stage's state whole or not at all."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def say(what: str, step: int, started: float, loss: torch.Tensor, level: Level) -> None:
    shares = " ".join(f"{name}:{share:.2f}" for name, share in sorted(level.shares.items()))
    print(
        f"{what} step {step} {time.monotonic() - started:.0f} s loss {loss.item():.3f} "
        f"level {level.cards},{level.go},{level.after} {shares}",
        file=sys.stderr,
        flush=True,
    )
