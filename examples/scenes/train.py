"""Trains the scenes example in stages, each resumable: a small LLaVA that describes cards and
follows them.

    python examples/scenes/train.py                     # goes on where it was interrupted
    python examples/scenes/train.py --layers 4 -o DIR   # a model that exits compete with
    python examples/scenes/train.py --family blip2 -o DIR
    python examples/scenes/train.py --smoke -o DIR      # a few steps of each stage

The stages are ``language`` (`language`), ``tower`` (image tokens from pixels, with a projector at
each exit), and ``both`` (all of it on pixels). Their states are stored in local/scenes; the result
is a checkpoint as hubs have them. The exits of the language model and its gates are trained by
exits.py. Needs ``edgeexit[export]`` and scikit-learn. Only pictures of the training split are
trained on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaProcessor

from edgeexit.export.exits.origins import note_origins
from edgeexit.export.exits.tower import exit_name
from edgeexit.export.exits.vision_language import ExitVisionLanguage
from edgeexit.export.families import blip2, llava

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
import language  # noqa: E402
from conversations import Level, Turns, cover_of, make_scenes  # noqa: E402
from language import TURNS, autocast, describing_turn, store, take  # noqa: E402
from model import (  # noqa: E402
    FAMILIES,
    LAYERS,
    PATCHES,
    TOWER_WIDTH,
    WIDTH,
    WORDS,
    make_processor,
)
from small_llava import save  # noqa: E402

TOWER_EXITS = [2, 4]
TOWER_STEPS, TOWER_BATCH, TOWER_RATE = 1000, 48, 4e-3
STEPS, BATCH, RATE = 1600, 24, 6e-4
EARLY = 0.4
SMOKE = 3
TRUNKS = {"llava": llava.trunk, "blip2": blip2.trunk}


def hardest(most_steps: int) -> Level:
    """All cards, and questions of up to so many steps."""
    return Level(cards=data.CARDS, go=most_steps, after=most_steps)


class Pixels:
    """Scenes of the training split as pixels. Fashion-MNIST's garments: ``of="garments"``."""

    def __init__(self, processor: LlavaProcessor, of: str = "digits") -> None:
        self.processor, self.of = processor.image_processor, of

    def __call__(
        self, scenes: Sequence[data.Scene], rng: np.random.Generator, split: str = "train"
    ) -> torch.Tensor:
        """``[scenes, channels, height, width]``."""
        drawn = [data.draw(scene, split, rng, self.of) for scene in scenes]
        return self.processor(drawn, return_tensors="pt")["pixel_values"]


def train_tower(
    split: ExitVisionLanguage, soft: language.SoftImages, pixels: Pixels, steps: int, file: Path
) -> None:
    """The tower's exits learn to name the class at each patch, and to make the image tokens that
    the language model reads."""
    tower = split.tower
    layers = [*tower.exit_layers, tower.depth]
    probes = nn.ModuleList(nn.Linear(TOWER_WIDTH, data.BLANK + 1) for _ in layers)
    trunk = tower.trunk
    trained = [trunk.stem, *trunk.layers, trunk.projector, tower.projectors, probes]
    weights = list(dict.fromkeys(one for part in trained for one in part.parameters()))
    optimizer = torch.optim.AdamW(weights, lr=TOWER_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TOWER_RATE, total_steps=steps, pct_start=0.1
    )
    parts = {"split": split, "probes": probes, "optimizer": optimizer, "schedule": schedule}
    first, started = resume(parts, file), time.monotonic()
    for step in range(first, steps):
        rng = np.random.default_rng([2, step])
        counts = rng.integers(data.FEWEST, data.CARDS + 1, TOWER_BATCH)
        scenes = [data.make_scene(rng, int(count)) for count in counts]
        cover = cover_of(scenes)
        with torch.no_grad():
            wanted = soft(cover)
        seen = pixels(scenes, rng)
        with autocast():
            states = dict(enumerate(states_of(split, seen)))
        losses, named = [], []
        for probe, layer in zip(probes, layers, strict=True):
            last = layer == tower.depth
            projector = tower.trunk.projector if last else tower.projectors[exit_name(layer)]
            state = states[layer].float()
            guess = probe(state[:, -PATCHES:])  # BLIP-2's has one more token, in front
            losses.append(functional.cross_entropy(guess.flatten(0, 1), cover.flatten()))
            apart = (projector(state) - wanted).square().mean() / wanted.var()
            losses.append(apart)
            lies = cover != data.BLANK
            named.append(f"{(guess.argmax(-1) == cover)[lies].float().mean():.3f} {apart:.3f}")
        take(torch.stack(losses).sum(), optimizer, weights)
        schedule.step()
        if step % 50 == 49:
            seconds = time.monotonic() - started
            print(
                f"tower step {step} {seconds:.0f} s {', '.join(named)}", file=sys.stderr, flush=True
            )
        if step % 250 == 249 or step == steps - 1:
            store(file, step=step + 1, **{name: part.state_dict() for name, part in parts.items()})


def states_of(split: ExitVisionLanguage, pixels: torch.Tensor) -> list[torch.Tensor]:
    """States behind the tower's stem and each layer."""
    trunk = split.tower.trunk
    states = [trunk.stem(pixels)]
    for layer in trunk.layers:
        states.append(layer(states[-1]))
    return states


def train_both(
    split: ExitVisionLanguage, pixels: Pixels, level: Level, steps: int, file: Path
) -> None:
    """The whole model learns on pixels. Projectors of the tower's exits follow its image tokens;
    in a share of `EARLY` of the steps the language model reads those of an exit."""
    probe = nn.Linear(split.model.config.text_config.hidden_size, len(WORDS))
    weights = [*split.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.05
    )
    parts = {"split": split, "probe": probe, "optimizer": optimizer, "schedule": schedule}
    first, started = resume(parts, file), time.monotonic()
    for step in range(first, steps):
        rng = np.random.default_rng([3, step])
        scenes = make_scenes(rng, BATCH, level)
        before = describing_turn(rng)
        turns = Turns(
            scenes, rng, level, before, TURNS - before, in_front=split.whole.prompt.in_front
        )
        seen = pixels(scenes, rng)
        with autocast():
            features = split.tower.each_exit(seen)
            whole = features.pop(split.tower.depth)
            early = rng.choice(split.tower.exit_layers) if rng.random() < EARLY else None
            read = whole if early is None else features[early]
            embedded = split.embed(turns.ids, image_features=read)
        loss, shares = language.losses(split.model, embedded, turns, probe)
        level.note(shares, len(scenes[0].cards))
        wanted = whole.detach()
        apart = sum((made - wanted).float().square().mean() for made in features.values())
        apart = apart / wanted.float().var()
        take(loss + apart, optimizer, weights)
        schedule.step()
        if step % 25 == 24:
            language.say("both", step, started, loss, level)
        if step % 100 == 99 or step == steps - 1:
            store(file, step=step + 1, **{name: part.state_dict() for name, part in parts.items()})


def resume(parts: dict[str, nn.Module], file: Path) -> int:
    """Loads a stage's state, if it was stored. Returns the steps that it has made."""
    if not file.exists():
        return 0
    known = torch.load(file, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(known[name])
    return int(known["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="default: checkpoint/ here")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llava")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the language model")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--most-steps", type=int, default=data.MOST_STEPS, help="of questions")
    parser.add_argument("--state", type=Path, help="default: local/scenes/FAMILY-LAYERS-WIDTH")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE} steps a stage; needs -o")
    parser.add_argument("--stop-after", choices=["language", "tower", "both"])
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    plain = (options.family, options.layers, options.width) == ("llava", LAYERS, WIDTH)
    if options.output is None and (options.smoke or not plain):
        parser.error("give -o: it would replace the checkpoint of the example")
    if options.threads:
        torch.set_num_threads(options.threads)
    name = f"{options.family}-{options.layers}-{options.width}"
    state = options.state or HERE.parents[1] / f"local/scenes/{name}"
    if options.smoke:
        state = options.output / "state"
    state.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = FAMILIES[options.family](options.layers, options.width)
    processor = make_processor(options.family)
    soft, pixels = language.SoftImages(options.width), Pixels(processor)
    split = ExitVisionLanguage(model, TRUNKS[options.family](model), [], TOWER_EXITS)
    settings = language.Settings(most_steps=options.most_steps)
    if options.smoke:
        settings = language.Settings(text=SMOKE, image=SMOKE, batch=2)
    language.train_language(model, soft, settings, state / "language.pt")
    if options.stop_after == "language":
        return
    steps = SMOKE if options.smoke else TOWER_STEPS
    train_tower(split, soft, pixels, steps, state / "tower.pt")
    if options.stop_after == "tower":
        return
    level = hardest(options.most_steps)
    train_both(split, pixels, level, SMOKE if options.smoke else STEPS, state / "both.pt")
    note_origins(split, dict.fromkeys(split.exit_origins, "trained"))
    save(split, processor, options.output or HERE / "checkpoint")


if __name__ == "__main__":
    main()
