"""Trains the entailment example's models in stages, each resumable.

    python examples/entailment/train.py --form florence   # goes on where it was interrupted
    python examples/entailment/train.py --form bart
    python examples/entailment/train.py --smoke --state DIR    # two steps of each stage

The stages are ``encoder`` (what follows each digit), ``hops`` (where steps lead from it), ``words``
(all questions, on image tokens that are made from what lies in a scene), ``tower`` (image tokens
from pixels) and ``pixels`` (all of it). The result is a model that
variants.py trains on. Needs ``edgeexit[export]`` and scikit-learn. Only pictures of the training
split are trained on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.families import bart, florence2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
from batches import (  # noqa: E402
    FIRST_STEP,
    IGNORED,
    PARTS,
    Asked,
    HopsAsked,
    Level,
    cover_of,
    draw_questions,
    following_in_words,
    following_of,
    listed_ids,
    padded,
)
from model import (  # noqa: E402
    IDS,
    LAYERS,
    WIDTH,
    class_vectors,
    ideal_tokens,
    make_bart,
    make_florence,
    make_image_processor,
)

SCENES = 16
READ, LONG, SHORT = ("read",), ("walk", "rings"), ("go", "go", "check", "check")
"""Kinds of questions about each scene of a step, those of one length together."""
PAIRED = 2
"""The encoder layer that should know what is read behind each digit."""
WEIGHTS = {"read": 4.0}
"""Of the losses of `PARTS`; of others 1."""
FOLLOWING = 5.0
"""Weight of that loss."""
ENCODER_RATE, ENCODER_STEPS, ENCODER_BATCH = 2e-3, 200, 32
HOPS_RATE, HOPS_STEPS, HOPS_BATCH = 1.5e-3, 250, 48
WORDS_RATE, WORDS_STEPS = 1.5e-3, 450
TOWER_RATE, TOWER_STEPS, TOWER_BATCH = 2e-3, 600, 48
PIXELS_RATE, PIXELS_STEPS = 1e-3, 250
SAVE_EVERY = 100


def split_of(form: str, layers: int = LAYERS, width: int = WIDTH) -> ExitEncoderDecoder:
    """A model with exits behind every layer."""
    exits = range(1, layers)
    if form == "bart":
        plain = make_bart(layers, width)
        return ExitEncoderDecoder(plain, *bart.trunk(plain), exits, exits)
    seeing = make_florence(layers, width)
    trunk = florence2.trunk(seeing, (data.SIZE, data.SIZE))
    return ExitDecomposed(seeing, trunk, exits, exits, exits)


def logits_of(
    split: ExitEncoderDecoder, asked: Asked | HopsAsked, image: torch.Tensor | None
) -> dict[int, torch.Tensor]:
    """Decoder layer -> logits. `image`: the image branch's states ``[scenes, TOKENS, width]``."""
    read = asked.mask.bool()
    embedded = ExitEncoderDecoder.embed_source(split, asked.ids)
    state = split.encoder(embedded, read)
    if image is not None:
        image = image.repeat_interleave(len(asked.ids) // len(image), 0)
        state = torch.cat([image, state], 1)
        read = torch.cat([read.new_ones(len(read), image.shape[1]), read], 1)
    return split(asked.tokens, source=(state, read))


def answer_loss(
    logits: dict[int, torch.Tensor], asked: Asked
) -> tuple[torch.Tensor, dict[str, float]]:
    """The sum over layers from `FIRST_STEP` on, and over `PARTS`, of the mean cross-entropy of a
    part's words, and the shares of right words of the last layer. An early layer must say where as
    many steps lead as it can have followed; the last says the answer."""
    depth = max(logits)
    loss, shares = torch.zeros(()), {}
    for layer in range(FIRST_STEP, depth + 1):
        way = min(layer - FIRST_STEP, data.MOST_STEPS - 1)
        targets = asked.targets if layer == depth else asked.paths[..., way]
        each = functional.cross_entropy(
            logits[layer].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)
        for number, part in enumerate(PARTS):
            chosen = asked.parts == number
            if chosen.any():
                loss = loss + WEIGHTS.get(part, 1.0) * each[chosen].mean()
    right = logits[depth].argmax(-1) == asked.targets
    for number, part in enumerate(PARTS):
        of_part = asked.parts == number
        if part == "answer":
            for steps in asked.steps[of_part].unique().tolist():
                chosen = of_part & (asked.steps == steps)
                shares[f"{part} {steps}"] = right[chosen].float().mean().item()
        elif of_part.any():
            shares[part] = right[of_part].float().mean().item()
    return loss, shares


def following_loss(
    split: ExitEncoderDecoder,
    probe: nn.Module,
    scenes: Sequence[Any],
    features: torch.Tensor | None,
    layer: int,
) -> tuple[torch.Tensor, float]:
    """What the encoder's state behind a layer must say of each digit: itself, to the head of the
    decoder, and what is read behind it, to a probe. Returns the sum of both cross-entropies, and
    the share of right guesses of the latter.

    Args:
        features: Image tokens ``[scenes, TOKENS, width]``; None: the encoder reads words.
    """
    if features is not None:
        assert isinstance(split, ExitDecomposed)
        own, following = following_of(scenes)
        state = split.image_encoder(features, None, layers=layer)[:, 1:]
    else:
        ids, mask = padded([listed_ids(scene) for scene in scenes])
        embedded = ExitEncoderDecoder.embed_source(split, ids)
        own, following = following_in_words(scenes, ids.shape[1])
        state = split.encoder(embedded, mask.bool(), layers=layer)
    known = own != IGNORED
    digits = split.trunk.embedding[[IDS[word] for word in data.DIGITS]]
    guess, targets = probe(state[known]), following[known]
    loss = functional.cross_entropy(guess, targets)
    loss = loss + functional.cross_entropy(state[known] @ digits.T, own[known])
    return loss, (guess.argmax(-1) == targets).float().mean().item()


class Stage:
    """A training that stores itself.

    Args:
        parts: What is trained, by name.
        rate: Learning rate.
        file: Where it is stored.
        before: State of an earlier stage with these parts, to begin with.
    """

    def __init__(
        self,
        parts: dict[str, nn.Module],
        rate: float,
        steps: int,
        file: Path,
        before: Path | None = None,
    ) -> None:
        self.parts, self.steps, self.file = parts, steps, file
        self.weights = list({id(w): w for p in parts.values() for w in p.parameters()}.values())
        groups = [
            {"params": [w for w in self.weights if w.ndim > 1], "weight_decay": 0.02},
            {"params": [w for w in self.weights if w.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
        warm = min(50, steps // 4 + 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm, max(0.02, min(1.0, 3 * (1 - step / steps)))),
        )
        self.level, self.step = Level(), 0
        self.started = time.monotonic()
        if file.exists():
            known = torch.load(file, weights_only=True)
            for name, part in self._all().items():
                part.load_state_dict(known[name])
            self.level, self.step = Level(**known["level"]), known["step"]
        elif before is not None:
            known = torch.load(before, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(known[name])

    def _all(self) -> dict[str, Any]:
        return self.parts | {"optimizer": self.optimizer, "schedule": self.schedule}

    def take(self, loss: torch.Tensor, said: str = "") -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        if self.step % 25 == 0:
            shares = " ".join(f"{n}:{s:.2f}" for n, s in sorted(self.level.shares.items()))
            print(
                f"{self.file.stem} step {self.step} {time.monotonic() - self.started:.0f} s loss "
                f"{loss.item():.3f} level {self.level.cards},{self.level.steps} {shares} {said}",
                file=sys.stderr,
                flush=True,
            )
        if self.step % SAVE_EVERY == 0 or self.step == self.steps:
            state = {name: part.state_dict() for name, part in self._all().items()}
            partial = self.file.with_suffix(".partial")
            torch.save(state | {"level": asdict(self.level), "step": self.step}, partial)
            partial.replace(self.file)


def train_language(
    split: ExitEncoderDecoder,
    pixels: Pictures | None,
    rate: float,
    steps: int,
    file: Path,
    before: Path,
) -> None:
    """Trains the language model, on image tokens made from what lies in a scene; with `pixels`
    the whole model on pictures. A BART reads the scenes in words."""
    seeing = isinstance(split, ExitDecomposed)
    width = split.trunk.width
    probe, vectors = nn.Linear(width, data.BLANK + 1), class_vectors(width)
    stage = Stage({"split": split, "probe": probe}, rate, steps, file, before)
    if not stage.step:
        stage.level = Level(cards=data.CARDS, steps=data.MOST_STEPS)
    while stage.step < steps:
        rng = np.random.default_rng([1 if pixels is None else 3, stage.step])
        scenes = stage.level.draw_scenes(rng, SCENES)
        loss, image, features = torch.zeros(()), None, None
        shares: dict[str, float] = {}
        if seeing:
            assert isinstance(split, ExitDecomposed)
            ideal = ideal_tokens(cover_of(scenes), vectors)
            features = ideal if pixels is None else split.tower(pixels(scenes, rng))
            image = split.image_encoder(features, None)
        apart, shares["following"] = following_loss(split, probe, scenes, features, PAIRED)
        loss = loss + FOLLOWING * apart
        for kinds in (READ[:seeing], LONG, SHORT):
            if not kinds:
                continue
            questions = draw_questions(scenes, kinds, stage.level, rng)
            asked = Asked(scenes, questions, in_words=not seeing)
            own, found = answer_loss(logits_of(split, asked, image), asked)
            loss = loss + own
            shares |= found
        stage.level.note(shares, len(scenes[0].cards))
        stage.take(loss)


def train_encoder(split: ExitEncoderDecoder, steps: int, file: Path) -> None:
    """The encoder learns what is read behind each digit, behind layer `PAIRED` and the last."""
    width, depth = split.trunk.width, split.encoder.depth
    probe, vectors = nn.Linear(width, data.BLANK + 1), class_vectors(width)
    stage = Stage({"split": split, "probe": probe}, ENCODER_RATE, steps, file)
    while stage.step < steps:
        rng = np.random.default_rng([0, stage.step])
        scenes = [data.make_scene(rng) for _ in range(ENCODER_BATCH)]
        seeing = isinstance(split, ExitDecomposed)
        features = ideal_tokens(cover_of(scenes), vectors) if seeing else None
        each = [following_loss(split, probe, scenes, features, layer) for layer in (PAIRED, depth)]
        stage.take(torch.stack([one for one, _ in each]).sum(), f"following {each[0][1]:.3f}")


def train_hops(split: ExitEncoderDecoder, steps: int, file: Path, before: Path) -> None:
    """The decoder reads digits in random order; each of its layers from `FIRST_STEP` on learns
    where one step more leads from each of them."""
    depth, width = split.depth, split.trunk.width
    probe, vectors = nn.Linear(width, data.BLANK + 1), class_vectors(width)
    stage = Stage({"split": split, "probe": probe}, HOPS_RATE, steps, file, before)
    layers = range(FIRST_STEP, depth + 1)
    while stage.step < steps:
        rng = np.random.default_rng([6, stage.step])
        cards = int(rng.integers(data.scenes.FEWEST, data.CARDS + 1))
        scenes = [data.make_scene(rng, cards) for _ in range(HOPS_BATCH)]
        seeing = isinstance(split, ExitDecomposed)
        features = ideal_tokens(cover_of(scenes), vectors) if seeing else None
        asked = HopsAsked(scenes, rng, in_words=not seeing)
        image = split.image_encoder(features, None) if seeing else None  # type: ignore[attr-defined]
        logits, losses, shares = logits_of(split, asked, image), [], []
        for number, layer in enumerate(layers):
            targets, said = asked.leads[..., number], logits[layer][:, 1:]
            losses.append(functional.cross_entropy(said.flatten(0, 1), targets.flatten()))
            shares.append((said.argmax(-1) == targets).float().mean().item())
        for layer in (PAIRED, split.encoder.depth):
            losses.append(following_loss(split, probe, scenes, features, layer)[0])
        stage.take(torch.stack(losses).sum(), " ".join(f"{share:.2f}" for share in shares))


class Pictures:
    """Scenes of a split as pixels ``[scenes, channels, height, width]``."""

    def __init__(self, split: str = "train") -> None:
        self.split, self.processor = split, make_image_processor()

    def __call__(self, scenes: Sequence[Any], rng: np.random.Generator) -> torch.Tensor:
        drawn = [data.scenes.draw(scene, self.split, rng) for scene in scenes]
        return self.processor(drawn, return_tensors="pt")["pixel_values"]


def tower_of(split: ExitDecomposed) -> nn.ModuleList:
    """The tower's parts, with its projector."""
    trunk = split.tower.trunk
    return nn.ModuleList([trunk.stem, *trunk.layers, trunk.projector])


def train_tower(split: ExitDecomposed, steps: int, file: Path) -> None:
    """The tower learns to make the image tokens that the language model reads."""
    pixels, width = Pictures(), split.trunk.width
    vectors, probe = class_vectors(width), nn.Linear(width, data.BLANK + 1)
    stage = Stage({"tower": tower_of(split), "probe": probe}, TOWER_RATE, steps, file)
    while stage.step < steps:
        rng = np.random.default_rng([2, stage.step])
        scenes = [data.make_scene(rng) for _ in range(TOWER_BATCH)]
        cover = cover_of(scenes)
        made, wanted = split.tower(pixels(scenes, rng)), ideal_tokens(cover, vectors)
        guess = probe(made[:, 1:] * width**0.5)
        named = functional.cross_entropy(guess.flatten(0, 1), cover.flatten())
        apart = (made - wanted).square().mean() / wanted.var()
        lies = cover != data.BLANK
        share = (guess.argmax(-1) == cover)[lies].float().mean()
        stage.take(named + apart, f"named {share:.3f} apart {apart:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--form", choices=["florence", "bart"], default="florence")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--only", choices=["encoder", "hops", "words", "tower", "pixels"])
    parser.add_argument("--state", type=Path)
    parser.add_argument("--steps", type=int, help="of each stage; default: as many as it needs")
    parser.add_argument("--smoke", action="store_true", help="two steps a stage; needs --state")
    options = parser.parse_args()
    if options.smoke:
        if options.state is None:
            parser.error("give --state: it would replace the stages of a training")
        options.steps = 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    state = options.state or HERE.parents[1] / f"local/entailment/{options.form}-{options.width}"
    state.mkdir(parents=True, exist_ok=True)
    split = split_of(options.form, options.layers, options.width)
    encoder, hops, words, tower, pixels = (
        state / f"{stage}.pt" for stage in ("encoder", "hops", "words", "tower", "pixels")
    )
    if options.only in (None, "encoder"):
        train_encoder(split, options.steps or ENCODER_STEPS, encoder)
    if options.only in (None, "hops"):
        train_hops(split, options.steps or HOPS_STEPS, hops, encoder)
    if options.only in (None, "words"):
        train_language(split, None, WORDS_RATE, options.steps or WORDS_STEPS, words, hops)
    if options.form == "bart":
        return
    assert isinstance(split, ExitDecomposed)
    if options.only in (None, "tower"):
        train_tower(split, options.steps or TOWER_STEPS, tower)
    if options.only in (None, "pixels"):
        both = state / "both.pt"  # the language model with the tower
        if not pixels.exists():
            known = torch.load(words, weights_only=True)
            split.load_state_dict(known["split"])
            tower_of(split).load_state_dict(torch.load(tower, weights_only=True)["tower"])
            torch.save({"split": split.state_dict(), "probe": known["probe"]}, both)
        steps = options.steps or PIXELS_STEPS
        train_language(split, Pictures(), PIXELS_RATE, steps, pixels, both)


if __name__ == "__main__":
    main()
