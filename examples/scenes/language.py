"""The first stage of training: the language model alone, on scenes whose image tokens are made from
what lies there.

A small language model learns to follow cards only from few cards and few steps on, and needs many
thousand scenes for it. `SoftImages` therefore stands in for the tower: a token per patch that says
which class lies there, and where. The tower then learns to make the same tokens from pixels
(`train`), and both are trained together at the end.

It begins with text alone, where a description stands first: conversations are shorter, and what is
learnt there serves for pictures. `Level` makes scenes harder, and `path_loss` says what each layer
should have found out. Without it, the first step is found in the last layer, where no second one
can follow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
from model import ASSISTANT, END, IMAGE, PATCHES, USER, WORDS

IGNORED, SAVE_EVERY = -100, 100
FIRST_STEP = 3
"""The layer that should have followed a card; the next one has followed two."""
FEWEST = 2
"""Cards of the first scenes."""
IDS = {word: number for number, word in enumerate(WORDS)}
KINDS = ("read", "go", "follow", "after")
"""What a token of an answer belongs to: the cards, an answer at once, behind a description, or in
a turn after a description."""


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


@dataclass
class Level:
    """How hard questions are by now: cards in a scene, steps at once, steps behind a description.
    Each rises when the last questions were answered right."""

    cards: int = FEWEST
    go: int = 1
    after: int = 1
    shares: dict[str, float] = field(default_factory=dict)

    RISES = 0.9

    def note(self, shares: dict[str, float], cards: int) -> None:
        """Takes the share of right answers of a step by ``kind steps``, on scenes of so many
        cards; only those of the hardest scenes count."""
        if cards < self.cards:
            return
        for name, share in shares.items():
            self.shares[name] = 0.9 * self.shares.get(name, 0.0) + 0.1 * share
        known = {kind for kind in ("go", "after") if f"{kind} 1" in self.shares}
        if not known or min(self._least(kind) for kind in known) < self.RISES:
            return
        if self.cards < data.CARDS:
            self.cards += 1
            self.shares = {name: 0.5 * share for name, share in self.shares.items()}
            return
        for kind in known:
            setattr(self, kind, min(getattr(self, kind) + 1, data.MOST_STEPS))

    def _least(self, kind: str) -> float:
        """The share of right answers to the questions of a kind that are answered worst."""
        most = min(getattr(self, kind), self.cards - 1)
        return min(self.shares.get(f"{kind} {steps}", 0.0) for steps in range(1, most + 1))


class Turns:
    """Conversations about scenes as token ids: questions at once, then one that describes the scene
    first, then more. All rows of a batch have one length.

    Attributes:
        ids: ``[batch, seq]``; image tokens first, if there are any.
        labels: ``[batch, seq]``, `IGNORED` but for answers.
        kinds: ``[batch, seq]``, 1 + the number in `KINDS` of an answer's token; else 0.
        steps: ``[batch, seq]``, the steps of the question that a token answers.
        paths: ``[batch, seq, MOST_STEPS]``, where 1, 2, ... of these steps lead, for a token that
            names where all of them lead; else `IGNORED`.
    """

    def __init__(
        self,
        scenes: Sequence[data.Scene],
        rng: np.random.Generator,
        level: Level,
        before: int,
        after: int,
        image: bool = True,
        of: str = "digits",
    ) -> None:
        rows = [self._row(s, rng, level, before, after, image, data.WORDS[of]) for s in scenes]
        self.ids, self.labels, self.kinds, self.steps, self.paths = (
            torch.tensor([row[column] for row in rows]) for column in range(5)
        )

    @staticmethod
    def _row(scene, rng, level, before, after, image, words):  # type: ignore[no-untyped-def]
        ids: list[int] = [IDS[USER]]
        if image:
            ids += [IDS[IMAGE]] * PATCHES
        labels, kinds, hops = [IGNORED] * len(ids), [0] * len(ids), [0] * len(ids)
        nowhere = [IGNORED] * data.MOST_STEPS
        paths = [nowhere] * len(ids)

        def add(text: str, kind: int = 0, steps: int = 0, learn: bool = True) -> None:
            new = [IDS[word] for word in text.split()]
            ids.extend(new)
            labels.extend(new if kind and learn else [IGNORED] * len(new))
            kinds.extend([kind] * len(new))
            hops.extend([steps] * len(new))
            paths.extend([nowhere] * len(new))

        def steps_of(most: int) -> int:
            most = min(most, len(scene.cards) - 1)
            return most if rng.random() < 0.4 else int(rng.integers(1, most + 1))

        if not image:
            add(f"read the cards {ASSISTANT} {data.listing(scene, words)} {END} {USER}")
        for turn in range(before + 1 + after):
            if turn:
                add(USER)
            late = turn >= before
            steps = steps_of(level.after if late else level.go)
            start = int(rng.choice(scene.cards[:, 0]))
            describes = turn == before
            kind = "follow" if describes else "go"
            question, answer = data.ask(scene, kind, start, steps, words)
            add(f"{question} {ASSISTANT}")
            if describes:
                cards, asked, answer = answer.split(" : ")
                add(f"{cards} :", 1 + KINDS.index("read"), 0, image)
                add(f"{asked} :", 1 + KINDS.index("read"))
                kind = "follow"
            elif late:
                kind = "after"
            path = [scene.go(start, min(steps, n)) for n in range(1, data.MOST_STEPS + 1)]
            add(f"{answer} {END}", 1 + KINDS.index(kind), steps)
            paths[-2] = [IDS[words[place]] for place in path]
        return ids, labels, kinds, hops, paths


def make_scenes(rng: np.random.Generator, count: int, level: Level) -> list[data.Scene]:
    """Scenes with the same number of cards."""
    cards = level.cards if rng.random() < 0.5 else int(rng.integers(FEWEST, level.cards + 1))
    return [data.make_scene(rng, cards) for _ in range(count)]


def cover_of(scenes: Sequence[data.Scene]) -> torch.Tensor:
    """The class at each patch ``[batch, patches]``; a cell has 2 x 2 patches."""
    cells = np.stack([scene.cover() for scene in scenes])
    return torch.from_numpy(cells.repeat(2, 1).repeat(2, 2).reshape(len(scenes), PATCHES))


def answer_loss(
    logits: torch.Tensor, turns: Turns, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> tuple[torch.Tensor, dict[str, float]]:
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
        loss = loss + weights[number - 1] * each[of_kind].mean()
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
    layer where two lead.

    Args:
        states: ``[batch, seq, width]``, behind the embedding and each layer.
        read: State -> logits: final norm and head.
    """
    answers = turns.paths[:, 1:, 0] != IGNORED
    targets = turns.paths[:, 1:][answers]
    losses = []
    for number in range(len(states) - 1 - FIRST_STEP):
        said = read(states[FIRST_STEP + number][:, :-1][answers])
        losses.append(functional.cross_entropy(said, targets[:, min(number, targets.shape[1] - 1)]))
    return torch.stack(losses).sum()


@dataclass
class Settings:
    """How the language model is trained.

    Attributes:
        steps: Of the whole stage; of these, the first `text` are without images.
        path: Weight of `path_loss`.
        rate: Highest learning rate. It rises over `warm_up` steps and falls in the last third.
    """

    steps: int = 5000
    text: int = 2500
    path: float = 1.0
    batch: int = 32
    rate: float = 2e-3
    warm_up: int = 100

    def rate_at(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warm_up)
        falling = min(1.0, max(0.05, (self.steps - step) / (0.3 * self.steps)))
        return self.rate * rising * falling


def train_language(
    model: LlavaForConditionalGeneration, soft: SoftImages, settings: Settings, file: Path
) -> None:
    """Trains a language model and the image tokens that it reads. Goes on from `file`, where it
    stores itself every `SAVE_EVERY` steps."""
    language, head = model.model.language_model, model.lm_head
    weights = [*language.parameters(), *soft.parameters()]
    matrices = [weight for weight in weights if weight.ndim > 1]
    others = [weight for weight in weights if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98))
    level, first = Level(), 0
    if file.exists():
        known = torch.load(file, weights_only=True)
        language.load_state_dict(known["lm"])
        soft.load_state_dict(known["soft"])
        optimizer.load_state_dict(known["opt"])
        level, first = Level(**known["level"]), known["step"]
    started = time.monotonic()
    for step in range(first, settings.steps):
        rng = np.random.default_rng([1, step])
        image = step >= settings.text
        if step == settings.text:
            level = Level(cards=data.FEWEST)
        scenes = make_scenes(rng, settings.batch, level)
        before, after = (6, 6) if image else (0, 10)
        turns = Turns(scenes, rng, level, before, after, image)
        embedded = language.embed_tokens(turns.ids)
        if image:
            embedded = torch.cat(
                [embedded[:, :1], soft(cover_of(scenes)), embedded[:, 1 + PATCHES :]], dim=1
            )
        made = language(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
        loss, shares = answer_loss(head(made.last_hidden_state), turns)

        def read(state: torch.Tensor) -> torch.Tensor:
            return head(language.norm(state))

        loss = loss + settings.path * path_loss(made.hidden_states, read, turns)
        level.note(shares, len(scenes[0].cards))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 25 == 24:
            say("language", step, started, loss, level)
        if step % SAVE_EVERY == SAVE_EVERY - 1 or step == settings.steps - 1:
            store(
                file,
                lm=language.state_dict(),
                soft=soft.state_dict(),
                opt=optimizer.state_dict(),
                level=asdict(level),
                step=step + 1,
            )


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
