"""What each way of choosing 4-bit and 8-bit numbers costs a real language model: perplexity on
held-out text beside that in float32, bytes and seconds of exporting.

    python benchmarks/quantisers.py                 # after peers_llm.py, whose checkpoint it reads
    python benchmarks/quantisers.py --only float32 k-quant

Texts are the passages of documentation that examples/smollm/data.py holds out; those that ``gptq``
measures on are others. Every row is a bundle as ``edgeexit export`` writes it, run by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import ROOT, SCRATCH, save, say, verdict
from thresholds import opened

from edgeexit.measure import environment
from edgeexit.measure.given_text import on_given_texts

EXAMPLE = ROOT / "examples" / "smollm"
CAPACITY = 1024
SYMMETRIC = "--weights-symmetric"
CALIBRATION = ["--calibration-data", f"{EXAMPLE / 'data.py'}:calibration"]
WAYS: dict[str, list[str]] = {
    "float32": [],
    "int8 k-quant": ["--weights", "int8"],
    "int4 rtn, symmetric": ["--weights", "int4", SYMMETRIC],
    "int4 rtn": ["--weights", "int4", "--weights-method", "rtn"],
    "int4 hqq": ["--weights", "int4", "--weights-method", "hqq"],
    "int4 k-quant": ["--weights", "int4"],
    "int4 k-quant, blocks of 16": ["--weights", "int4", "--weights-block", "16"],
    "int4 k-quant, head in 8 bits": ["--weights", "int4", "--head-weights", "int8"],
    "int4 gptq": ["--weights", "int4", "--weights-method", "gptq", *CALIBRATION],
}


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, default=SCRATCH / "peers_llm" / "checkpoint")
    parser.add_argument("--only", nargs="+", default=[*WAYS], help="ways that contain one of these")
    parser.add_argument("--quick", action="store_true", help="few texts: does the script run?")
    given = parser.parse_args()
    sys.path.insert(0, str(EXAMPLE))
    from data import held_out

    texts = held_out()[: 4 if given.quick else None]
    found: dict[str, dict[str, Any]] = {}
    for way, options in WAYS.items():
        if any(one in way for one in given.only):
            found[way] = measured(given.model, options, texts)
            say(f"  {way}: {found[way]}")
    figures = []
    if base := found.get("float32"):
        for one in found.values():
            one["of_float32"] = round(one["perplexity"] / base["perplexity"], 4)
        best = {
            bits: min(own["of_float32"] for way, own in found.items() if way.startswith(bits))
            for bits in ("int4", "int8")
            if any(way.startswith(bits) for way in found)
        }
        figures = [
            (f"perplexity ÷ float32, best in {bits}", value, "<=", 1.05, 1.05)
            for bits, value in best.items()
        ]
    result = {"texts": len(texts), "ways": found, "verdicts": verdict(figures)}
    save("quantisers", result | {"environment": environment.describe()}, quick=given.quick)


def measured(model: Path, options: list[str], texts: list[str]) -> dict[str, Any]:
    """Exports a bundle, reads the texts with it and removes it."""
    bundle = SCRATCH / "quantisers"
    shutil.rmtree(bundle, ignore_errors=True)
    command = [sys.executable, "-m", "edgeexit", "export", "-m", str(model), "--exits", "6"]
    started = time.perf_counter()
    subprocess.run([*command, *options, "--overwrite", "-o", str(bundle), "--quiet"], check=True)
    took = time.perf_counter() - started
    with opened(bundle, CAPACITY) as opened_model:
        rows = [opened_model.encode(text) for text in texts]
        said = on_given_texts(opened_model, rows, [{} for _ in rows])
    assert said is not None
    weights = (bundle / "graphs" / "weights.bin").stat().st_size
    shutil.rmtree(bundle)
    return {
        "perplexity": round(said.perplexity_full, 4),
        "tokens": sum(map(len, rows)),
        "weights_mib": round(weights / 2**20, 1),
        "export_s": round(took, 1),
    }


if __name__ == "__main__":
    main()
