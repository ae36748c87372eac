"""Cuts the trained model behind a layer, and trains what is left on in the same way: what exits are
compared with, since it takes as little time for every question.

    python examples/scenes/truncate.py --layers 10 -o local/scenes/10    # resumable
    python examples/scenes/truncate.py --layers 10 --steps 0 -o DIR      # cut, and no more

Needs ``edgeexit[export]`` and scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from edgeexit.export.exits.origins import note_origins
from edgeexit.export.exits.vision_language import ExitVisionLanguage
from edgeexit.export.families import llava
from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
from model import LAYERS, make_model, make_processor  # noqa: E402
from small_llava import save  # noqa: E402
from train import TOWER_EXITS, Pixels, hardest, train_both  # noqa: E402

STEPS = 300


def cut(checkpoint: Path, layers: int) -> ExitVisionLanguage:
    """The model of a checkpoint with its language model's first layers only."""
    whole: Any = from_pretrained(checkpoint, exits=None).float()
    model = make_model(layers)
    split = ExitVisionLanguage(model, llava.trunk(model), [], TOWER_EXITS)
    kept = split.state_dict().keys()
    split.load_state_dict(
        {name: value for name, value in whole.state_dict().items() if name in kept}
    )
    return split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--layers", type=int, required=True, help=f"less than {LAYERS}")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    split, processor = cut(options.model, options.layers), make_processor()
    if options.steps:
        split.model.set_attn_implementation({"text_config": "eager"})
        level, state = hardest(data.MOST_STEPS), options.output / "state.pt"
        train_both(split, Pixels(processor), level, options.steps, state)
    note_origins(split, dict.fromkeys(split.exit_origins, "trained"))
    save(split, processor, options.output)


if __name__ == "__main__":
    main()
