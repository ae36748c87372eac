"""Writes the results of benchmarks, and prints progress and figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRATCH = ROOT / "local" / "bench"
RESULTS = HERE / "results"


def save(name: str, result: dict[str, Any], *, quick: bool) -> Path:
    """Writes a result. A quick result goes to the scratch folder, because it has no meaning."""
    folder = SCRATCH / "quick" if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {path.relative_to(ROOT)}")
    return path


def say(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def verdict(figures: list[tuple[str, float, str, float, float]]) -> list[dict[str, Any]]:
    """Compares figures with their goals: ``(name, value, "<=" or ">=", must, aim)``."""
    found = []
    for name, value, sign, must, aim in figures:
        holds = [value <= goal if sign == "<=" else value >= goal for goal in (must, aim)]
        level = "aim" if holds[1] else "must" if holds[0] else "missed"
        found.append(
            {
                "figure": name,
                "value": round(value, 4),
                "must": f"{sign} {must}",
                "aim": f"{sign} {aim}",
            }
            | {"reached": level}
        )
        say(f"  {name}: {value:.3f} (must {sign} {must}, aim {sign} {aim}): {level}")
    return found
