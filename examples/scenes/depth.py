"""How often each exit is right if it answers alone, by its layer, for four ways to train adapters:
with labels or from the last layer's predictions, each with an adversary and without.

    python examples/scenes/depth.py -o local/scenes/depth         # depth.json; resumable

With a frozen model this need not rise with the layer (FREE's mid-crisis, and overthinking), so
exits are placed by what is measured. Needs ``edgeexit[export]`` and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from accuracy import table  # noqa: E402
from model import LAYERS  # noqa: E402

SETTINGS = {
    "labels": ["--supervision", "labels", "--adversary", "0.1"],
    "distillation": ["--supervision", "distillation", "--adversary", "0.1"],
    "labels, no adversary": ["--supervision", "labels"],
    "distillation, no adversary": ["--supervision", "distillation"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="for the checkpoints")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--questions", type=int, default=50, help="of each kind and steps")
    options = parser.parse_args()
    exits = ",".join(str(layer) for layer in range(1, LAYERS))
    found: dict[str, Any] = {"steps": options.steps, "questions": options.questions, "right": {}}
    for name, setting in SETTINGS.items():
        folder = options.output / name.replace(", ", "-").replace(" ", "-")
        if not (folder / "config.json").exists():
            command = [sys.executable, str(HERE / "exits.py"), "--part", "free", "--exits", exits]
            command += ["--steps", str(options.steps), "-o", str(folder), *setting]
            subprocess.run(command, check=True)
        model: Any = from_pretrained(folder, exits=None).float().eval()
        shares = table(model, "validation", options.questions, layers=False)
        found["right"][name] = {n: own for n, own in shares.items() if n.startswith("exit_")}
    (HERE / "depth.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
