"""Chooses thresholds for the benchmarks of trained models (`scenes.py`, `entailment.py`): on
questions of a validation split, by the share of answers that they lose.

A rule is for one chain: exits of tokens by the tokens that change, exits of earlier chains and
gates by whole answers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from placement import TOKEN_RISKS
from results import say
from typing_extensions import Self

from edgeexit import runtime
from edgeexit.bundle.policy import ALWAYS, NEVER
from edgeexit.errors import CheckError
from edgeexit.measure.bench.vision_cases import layer_of
from edgeexit.measure.calibrate import calibrate, cumulative_ms
from edgeexit.measure.calibrate import figures as exit_figures
from edgeexit.measure.texts import Text, as_data
from edgeexit.measure.threshold_search import search
from edgeexit.measure.trace import Trace, record, replay
from edgeexit.measure.trace_answers import record_answers

LOST = 0.005
"""Share of the answers that thresholds may get wrong on the validation split: those of token exits,
beyond those that the whole model gets wrong; else when answers that become right are deducted."""
SCORES = ("max_prob", "margin", "entropy")
MAIN = "main"
Rules = dict[str, runtime.Rule]


class Asked:
    """Questions with their right answers, as a bundle's inputs.

    Attributes:
        items: Questions, which have a ``kind`` and ``steps``.
        texts: Prompts.
        answers: Token ids of the right answers, without the token that ends them.
        kinds: Kinds of questions.
        new_tokens: Most tokens of an answer.
    """

    kinds: Sequence[str]
    new_tokens: int

    def __init__(self, items: list[Any], texts: list[Text], answers: list[list[int]]) -> None:
        self.items, self.texts, self.answers = items, texts, answers

    def answered_right(self, model: runtime.Model) -> Self:
        """Those that the model answers right at full depth. Of these, answers that an exit changes
        are right answers that it loses."""
        written = [
            model.generate(
                t.tokens, inputs=t.inputs, max_new_tokens=self.new_tokens, text=False, reuse=False
            )
            .finish()
            .tokens[0]
            for t in self.texts
        ]
        return self._only(np.flatnonzero(self.right(written)).tolist())

    def first(self, count: int) -> Self:
        """The first questions."""
        return self._only(range(min(count, len(self.items))))

    def with_targets(self) -> list[Text]:
        """The prompts with their right answers."""
        return [
            Text([*text.tokens, *answer], text.inputs, len(text.tokens))
            for text, answer in zip(self.texts, self.answers, strict=True)
        ]

    def right(self, written: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """Which answers are right, word for word."""
        pairs = zip(written, self.answers, strict=True)
        return np.array([list(made) == answer for made, answer in pairs])

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        """Which questions are of a kind, or of ``all``."""
        return np.array([kind in (item.kind, "all") for item in self.items])

    def _only(self, numbers: Iterable[int]) -> Self:
        chosen, found = list(numbers), copy.copy(self)
        for name in ("items", "texts", "answers"):
            setattr(found, name, [getattr(self, name)[number] for number in chosen])
        return found


def digest(checkpoint: str | Path) -> str:
    """SHA-256 over a checkpoint's weights, the first 16 digits."""
    found = hashlib.sha256()
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def opened(bundle: Path, capacity: int) -> runtime.Model:
    """A bundle for choosing thresholds; nothing stops early."""
    model = runtime.load(bundle, threads="process", capacity=capacity, all_scores=True)
    model.policy = runtime.Policy(rules={name: runtime.Rule() for name in model.chains})
    return model


def exported(checkpoint: str | Path, bundle: Path, more: Sequence[str], *, keep: bool) -> None:
    """Exports a checkpoint, unless its bundle of the last run is to be kept, which must be of the
    same weights and options."""
    note = bundle.with_suffix(".txt")
    source = " ".join([digest(checkpoint), *more])
    if keep and bundle.is_dir() and note.is_file() and note.read_text() == source:
        return
    command = [sys.executable, "-m", "edgeexit", "export", "-m", str(checkpoint)]
    note.unlink(missing_ok=True)
    subprocess.run([*command, *more, "--overwrite", "-o", str(bundle)], check=True)
    note.write_text(source)


def trace_of_answers(model: runtime.Model, questions: Asked) -> Trace:
    """What every exit says in the model's own answers, under its policy."""
    texts = []
    for text in questions.texts:
        made = model.generate(
            text.tokens, inputs=text.inputs, max_new_tokens=questions.new_tokens, text=False
        )
        [written] = made.finish().tokens
        texts.append(Text([*text.tokens, *written], text.inputs, len(text.tokens)))
    return record(model, as_data(texts, model.bundle, "answers"), 1)


class Thresholds:
    """Chooses rules for a bundle.

    Args:
        everything: Questions, for what changes answers as a whole.
        known: Those that the whole model answers right, for exits of tokens.
        lost: As `LOST`.

    Attributes:
        exits: Kind of exits -> exit -> how many answers stay the same if all leave there, and how
            well its score tells them.
    """

    def __init__(
        self, model: runtime.Model, everything: Asked, known: Asked, *, lost: float = LOST
    ) -> None:
        self._model, self._everything, self._questions = model, everything, known
        self._lost = lost
        self.exits: dict[str, dict[str, dict[str, float]]] = {}

    def use(self, rules: Rules) -> None:
        """Loads a policy of these rules."""
        never = {name: runtime.Rule() for name in self._model.chains}
        self._model.policy = runtime.Policy(rules=never | rules)

    def of_tokens(self, before: Rules, scores: Sequence[str] = SCORES) -> Rules:
        """Token exits behind the rules `before`: the fewest layers with which at most
        `lost` of the answers change."""
        self.use(before)
        trace = trace_of_answers(self._model, self._questions)
        best: tuple[float, Rules] = (np.inf, before)
        for score in scores:
            for risk in TOKEN_RISKS:
                try:
                    policy, _, _ = calibrate(trace, max_risk=risk, score=score, per_exit=True)
                except CheckError:
                    continue
                changed, layers = effect(trace, policy.rules[MAIN])
                if changed <= self._lost and layers < best[0]:
                    best = (layers, before | policy.rules)
        say(f"  token exits: {best}")
        return best[1]

    def of_answers(self, before: Rules, chain: str | None) -> Rules:
        """Exits of an earlier chain, or gates (None), behind the rules `before`: the fastest
        thresholds with which the share of right answers falls by at most `lost`."""
        kind = {None: "gates", "vision": "tower"}.get(chain, chain)
        self.use(before)
        trace = record_answers(
            self._model,
            self._everything.with_targets(),
            name="questions",
            chain=chain,
            max_new_tokens=self._everything.new_tokens,
        )
        [score] = trace.scores
        assert kind is not None
        if kind not in self.exits:
            self.exits[kind] = {
                one.name: {"same_answers": round(one.agreement, 4), "auroc": round(one.auroc, 4)}
                for one in exit_figures(trace, score)[:-1]
            }
            say(f"  {kind}: {self.exits[kind]}")
        usable = trace.scores[score][:-1].astype(np.float64)
        wrong = (trace.predictions != trace.labels).astype(np.float64)
        found = search(usable, wrong - wrong[-1], cumulative_ms(trace), self._lost, NEVER)
        thresholds = dict(zip(trace.exits[:-1], found, strict=True))
        taken = replay(trace, runtime.Rule(thresholds=thresholds, score=score))
        shares = np.bincount(taken, minlength=len(trace.exits)) / trace.rows
        say(f"  {kind}: {dict(zip(trace.exits, shares.round(3).tolist(), strict=True))}")
        if chain is None:
            own = before.get(MAIN, runtime.Rule())
            return before | {MAIN: msgspec.structs.replace(own, thresholds=thresholds)}
        return before | {chain: runtime.Rule(thresholds=thresholds, score=score)}


def effect(trace: Trace, rule: runtime.Rule) -> tuple[float, float]:
    """The share of texts that a rule changes, and the mean layer of a token."""
    taken = replay(trace, rule)
    said = trace.predictions[taken, np.arange(trace.rows)]
    assert trace.groups is not None
    wrong = said != trace.predictions[-1]
    changed = len(np.unique(trace.groups[wrong])) / len(np.unique(trace.groups))
    layers = np.array([layer_of(name) for name in trace.exits])
    return changed, float(layers[taken].mean())


def always_left(exit_name: str) -> runtime.Rule:
    """The rule by which every row leaves a tower at an exit."""
    return runtime.Rule(thresholds={exit_name: ALWAYS}, score="saturation")


__all__ = [
    "LOST", "MAIN", "SCORES", "Asked", "Rules", "Thresholds", "always_left", "digest", "effect",
    "exported", "opened", "trace_of_answers",
]  # fmt: skip


def kept_choice(
    path: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]], *, keep: bool
) -> dict[str, Any]:
    """Thresholds and what was seen as they were chosen, as JSON: made, or those of the last run
    where they are to be kept and its `key`, what they follow from, is the same."""
    if keep and path.exists():
        held: dict[str, Any] = json.loads(path.read_text())
        if held["key"] == key:
            return held
    path.write_text(json.dumps({"key": key} | make()))
    made: dict[str, Any] = json.loads(path.read_text())
    return made
