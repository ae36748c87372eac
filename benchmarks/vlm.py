"""Vision-language models at real shapes: split tax of tower, prefill and decoding; what exits of
the tower and image tokens that leave save, beside floor and sum of parts; export's time and memory.

    python benchmarks/vlm.py                     # both shapes
    python benchmarks/vlm.py --shape smolvlm-500m
    python benchmarks/vlm.py --peers             # against other software instead
    python benchmarks/vlm.py --quick             # a tiny model: does the script run?

``--peers`` needs ``pip install onnxruntime-genai``. Weights are random: times mean something,
answers do not. benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from results import HERE, SCRATCH, save, say, verdict
from visionmodels import SHAPES, layers_of
from visionpeers import LAUNCHES, compare_peers, made_peers, peer_figures

from edgeexit.measure import environment
from edgeexit.measure.bench.bench import Options, bench

WORDS, NEW_TOKENS = 32, 32
THREADS = "brief"
"""Setting of both sides (the default of `load`): searching the best takes half an hour here."""
SECONDS = {"full": 120.0, "quick": 3.0}
TURNS = {"full": 6, "quick": 2}


def main() -> None:
    """Measures each shape and writes one result for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "quick"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", action="store_true", help="reuse the models of the last run")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--peers", action="store_true", help="compare with other software instead")
    parser.add_argument("--turns", type=int, help="turns per peer and launch")
    given = parser.parse_args()
    if given.peers and find_spec("onnxruntime_genai") is None:
        parser.error("--peers needs: pip install onnxruntime-genai")
    names = ["quick"] if given.quick else [given.shape] if given.shape else list(SHAPES)[:2]
    size = "quick" if given.quick else "full"
    for name in names:
        if given.peers:
            turns = given.turns or TURNS[size]
            measure_peers(name, turns, keep=given.keep, quick=given.quick)
        else:
            seconds = given.seconds or SECONDS[size]
            measure(name, seconds, keep=given.keep, quick=given.quick)


def measure(name: str, seconds: float, *, keep: bool, quick: bool) -> None:
    """Measures one shape and writes its result."""
    folder = SCRATCH / f"vlm-{name}"
    exported = made_models(name, folder, keep=keep)
    options = Options(seconds=seconds, threads=THREADS, prompt_tokens=WORDS, new_tokens=NEW_TOKENS)
    found = bench(folder / "bundle", options)
    result: dict[str, Any] = {
        "shape": {key: SHAPES[name][key] for key in ("family", "vision", "text")},
        "layers": layers_of(SHAPES[name]),
        "words": WORDS,
        "export": exported,
        **{key: found[key] for key in ("vision", "new_tokens", "turns", "threads")},
        "split_tax_of_decoding": found["split_tax"],
        "same_threads": found["same_threads"],
        "warnings": found["warnings"],
    }
    result["verdicts"] = verdict(figures(name, result))
    result["environment"] = found["environment"]
    save(f"vlm-{name}", result, quick=quick)


def measure_peers(name: str, turns: int, *, keep: bool, quick: bool) -> None:
    """Compares one shape with other software and writes its result."""
    folder = SCRATCH / f"vlm-{name}"
    exported = made_models(name, folder, keep=keep)
    seconds = {"bundle": exported["seconds"]} | made_peers(folder, keep=keep)
    watch = environment.Watch()
    result: dict[str, Any] = {
        "shape": {key: SHAPES[name][key] for key in ("family", "vision", "text")},
        "layers": layers_of(SHAPES[name]),
        "words": WORDS,
        "new_tokens": NEW_TOKENS,
        "turns": turns * LAUNCHES,
        "export_s": seconds,
        **compare_peers(folder, WORDS, NEW_TOKENS, turns),
    }
    result["verdicts"] = verdict(peer_figures(name, result))
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")
    save(f"vlm-peers-{name}", result, quick=quick)


def made_models(name: str, folder: Path, *, keep: bool) -> dict[str, Any]:
    """Creates checkpoint and bundle, or keeps those of the last run. Returns figures of the
    export."""
    if keep and (folder / "export.json").is_file():
        exported = dict(json.loads((folder / "export.json").read_text()))
    else:
        exported = make_models(name, folder)
    say(f"  {name}: exported in {exported['seconds']} s")
    return exported


def make_models(name: str, folder: Path) -> dict[str, Any]:
    """Creates checkpoint and bundle, each in its own process. Returns figures of the export."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for job in ("checkpoint", "export"):
        command = [sys.executable, str(HERE / "visionmodels.py"), job, name, str(folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{made.stderr[-4000:]}")
    exported = made.stdout.splitlines()[-1]
    (folder / "export.json").write_text(exported)
    return dict(json.loads(exported))


def figures(name: str, result: dict[str, Any]) -> list[tuple[str, float, str, float, float]]:
    """Figures and their goals."""
    full, cases = result["vision"]["full"], result["vision"]["cases"]
    found = [
        (f"{name}: split tax of the tower", full["tower_against_unsplit"], "<=", 1.03, 1.01),
        (f"{name}: split tax of prefill", full["prefill_against_unsplit"], "<=", 1.03, 1.01),
        (f"{name}: split tax of decoding", result["split_tax_of_decoding"], "<=", 1.03, 1.01),
    ]
    for case, own in cases.items():
        apart = round(abs(own["predicted_over_measured"] - 1), 4)
        found.append((f"{name}: {case}, apart from the sum of parts", apart, "<=", 0.03, 0.01))
        for part in ("tower", "prefill"):
            apart = round(abs(own[f"predicted_{part}_over_measured"] - 1), 4)
            found.append((f"{name}: {case}, its {part} alone", apart, "<=", 0.03, 0.01))
    exported = result["export"]
    found.append((f"{name}: export, s", exported["seconds"], "<=", 360, 180))
    memory = exported["peak_above_imports_of_weights"]
    found.append((f"{name}: export, peak ÷ weights", memory, "<=", 2.5, 1.5))
    return found


if __name__ == "__main__":
    main()
