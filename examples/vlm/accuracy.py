"""Counts the questions about unseen digits that a bundle answers word for word: in full, at every
exit of the tower, and where image tokens leave.

    python examples/vlm/accuracy.py vlm

Needs ``edgeexit[cpu,text,images]`` and scikit-learn, not torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeexit.runtime import Model, Policy, Rule, load

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402

ALWAYS = float("-inf")
QUESTIONS, ROWS, LONGEST = 1000, 8, 20
"""Questions, texts that are written together, and most tokens of an answer."""


def policies(model: Model) -> Iterator[tuple[str, Policy]]:
    """What is measured: a name, and the policy that does it."""
    chains = model.bundle.manifest.chains
    yield "full", Policy(rules={"vision": Rule(), "main": Rule()})
    for exit_ in chains["vision"].stops[:-1]:
        tower = Rule(thresholds={exit_.name: ALWAYS}, score="saturation")
        yield exit_.name, Policy(rules={"vision": tower, "main": Rule()})
    for exit_ in chains["main"].exits:
        if exit_.action == "drop":
            rule = Rule(thresholds={exit_.name: ALWAYS})
            yield exit_.name, Policy(rules={"vision": Rule(), "main": rule})


def right(model: Model, examples: Sequence[data.Example]) -> dict[str, float]:
    """Share of right answers for every kind of question, and for all."""
    found: dict[str, list[bool]] = {}
    for start in range(0, len(examples), ROWS):
        few = examples[start : start + ROWS]
        asked = [message(one) for one in few]
        texts = model.chat(asked, max_new_tokens=LONGEST).finish().texts
        for one, text in zip(few, texts, strict=True):
            for kind in (one.kind, "all"):
                found.setdefault(kind, []).append(text == one.answer)
    return {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(found.items())}


def message(example: data.Example) -> list[dict[str, Any]]:
    """A conversation that asks about a picture."""
    picture = {"type": "image", "image": example.picture}
    return [{"role": "user", "content": [picture, {"type": "text", "text": example.question}]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("-o", "--output", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    examples = data.examples(options.split, options.questions, 0)
    shares: dict[str, dict[str, float]] = {}
    with load(options.bundle) as model:
        for name, policy in policies(model):
            model.policy = policy
            shares[name] = right(model, examples)
            said = [f"{kind} {share:.1%}" for kind, share in shares[name].items()]
            print(f"{name}: {', '.join(said)}")
    if options.output is not None:
        found = {"split": options.split, "questions": options.questions, "right": shares}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
