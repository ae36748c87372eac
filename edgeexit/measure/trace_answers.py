"""Traces of exits that a model that writes text takes once per prompt: those of an earlier chain (a
vision tower, an encoder), and gates that drop tokens.

What such an exit changes is the answer. So `record_answers` writes the answer to every prompt in
full and again with each exit forced, and keeps the exits' scores. A row is a prompt, a prediction
the number of its answer, and two answers are the same if all of their tokens are. The label of a
prompt with a target is the number of the answer that is the target. Because the exit
is chosen before the first token, `edgeexit.measure.trace.replay` is exact for such a trace.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Exit
from edgeexit.bundle.policy import ALWAYS, NEVER, OUT_OF_REACH, Policy, Rule, forced
from edgeexit.errors import DataError, MeasurementError
from edgeexit.measure.probe import ask, chain_named
from edgeexit.measure.texts import Text
from edgeexit.measure.trace import NO_LABEL, Trace
from edgeexit.runtime import Model

STAY = "no gate"
"""Where a trace of gates has a prompt whose tokens are not dropped."""


@dataclass(frozen=True)
class _Choice:
    """Exits of which one is taken per prompt, and the rule that takes each.

    Attributes:
        chain: The chain.
        scores: Scores that all but the last have.
        rules: Exit -> the rule for the chain that takes it; the last runs to full depth.
        asking: The rule with which scores are computed and no exit is taken.
    """

    chain: str
    scores: list[str]
    rules: Mapping[str, Rule]
    asking: Rule


def record_answers(
    model: Model,
    texts: Sequence[Text],
    *,
    name: str,
    chain: str | None = None,
    max_new_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Trace:
    """Writes the answer to every prompt in mode ``full``, once for every exit.

    Other chains and exits follow the model's policy. Prompts on which the exits have no effect
    (texts without an image) are left out.

    Args:
        model: The bundle, preferably loaded with all scores.
        texts: Prompts, with or without targets.
        name: Name of the data set.
        chain: The chain; None: the gates of the chain that writes the text.
        max_new_tokens: As for `Model.generate`.

    Returns:
        A trace whose rows are prompts. `Trace.times_ms` are those to the first token.

    Raises:
        MeasurementError: There is nothing to choose.
        DataError: No prompt is affected, or one runs the chain for several rows (images).
    """
    choice = _gates(model) if chain is None else _stops(model, chain)
    before, rows = model.policy, []
    digest = hashlib.sha256()
    try:
        for number, text in enumerate(texts, start=1):
            _hash(digest, text)
            if (row := _row(model, choice, text, before, max_new_tokens, number)) is not None:
                rows.append(row)
            if progress is not None:
                progress("prompts", number, len(texts))
    finally:
        model.policy = before
    if not rows:
        raise DataError(
            f"{name}: no prompt has anything that {choice.chain} reads (an image)",
            fix='Give prompts with images: {"image": "cat.jpg", "prompt": "..."}.',
        )
    exits, early = list(choice.rules), len(choice.rules) - 1
    scores = {score: np.ones((early + 1, len(rows)), np.float32) for score in choice.scores}
    for score, values in scores.items():  # the last exit always answers
        values[:early] = np.array([row.scores[score] for row in rows]).T
    times = np.array([row.first_token_ms for row in rows])
    return Trace(
        bundle=model.bundle.digest,
        engine=model.describe_engine(),
        data={"name": name, "digest": digest.hexdigest()},
        exits=exits,
        scores=scores,
        predictions=np.array([row.answers for row in rows], np.int64).T.copy(),
        labels=_labels([row.label for row in rows]),
        batch_rows=np.ones(len(rows), np.int64),
        times_ms=np.diff(np.maximum.accumulate(times, axis=1), axis=1, prepend=0.0),
        batch_size=1,
        chain=choice.chain,
        of_answers=True,
        gates=chain is None,
        policy=before.rules | ({choice.chain: choice.rules[STAY]} if chain is None else {}),
    )


@dataclass(frozen=True)
class _Row:
    scores: dict[str, list[float]]
    answers: list[int]
    first_token_ms: list[float]
    label: int


def _row(
    model: Model,
    choice: _Choice,
    text: Text,
    before: Policy,
    most: int | None,
    number: int,
) -> _Row | None:
    """What every exit answers to a prompt; None: the exits do not concern it."""
    prompt = text.tokens[: text.asked or None]

    def write(rule: Rule) -> tuple[list[int], float, dict[str, list[float]]]:
        model.policy = _with(before, choice.chain, rule)
        model.features.clear()
        started = time.perf_counter()
        made = model.generate(
            prompt, inputs=text.inputs or None, max_new_tokens=most, text=False, reuse=False
        )
        pieces = iter(made)
        next(pieces, None)
        first_ms = (time.perf_counter() - started) * 1000
        made.finish()
        return made.tokens[0], first_ms, made.statistics.gates

    *early, _ = choice.rules
    if choice.chain == model.chain_name:
        _, _, gates = write(choice.asking)
        if not gates:
            return None
        scores = {"gate": [gates[gate][0] for gate in early]}
    else:
        if not text.inputs:
            return None
        model.policy = _with(before, choice.chain, choice.asking)
        arrays = ask(model, text.inputs, chain=choice.chain).arrays
        scores = {}
        for score in choice.scores:
            values = [arrays[f"{exit_}/{score}"] for exit_ in early]
            if any(len(value) != 1 for value in values):
                raise DataError(
                    f"prompt {number}: the chain {choice.chain} runs for {len(values[0])} rows, "
                    "each with an exit of its own",
                    fix="Trace prompts with one image each.",
                )
            scores[score] = [float(value[0]) for value in values]
    _check_scores(scores, early, number)
    known: dict[tuple[int, ...], int] = {}
    answers, times = [], []
    for rule in reversed(list(choice.rules.values())):  # the answer at full depth is number 0
        tokens, first_ms, _ = write(rule)
        answers.append(known.setdefault(tuple(tokens), len(known)))
        times.append(first_ms)
    label = known.get(_target(model, text), len(known)) if text.asked else NO_LABEL
    return _Row(scores, answers[::-1], times[::-1], label)


def _check_scores(scores: Mapping[str, list[float]], exits: Sequence[str], number: int) -> None:
    """Raises `MeasurementError` for scores that are NaN: no threshold could be chosen for them."""
    for score, values in scores.items():
        for exit_, value in zip(exits, values, strict=True):
            if math.isnan(value):
                raise MeasurementError(
                    f"prompt {number}: the score {score} of {exit_} is NaN",
                    fix="Run `edgeexit check` on the bundle; if it passes, look for numbers in the "
                    "inputs that are too large.",
                )


def _target(model: Model, text: Text) -> tuple[int, ...]:
    """The tokens of a text's target, without the one that ends it."""
    decoding = model.bundle.manifest.decoding
    assert decoding is not None
    target = text.tokens[text.asked :]
    return tuple(target[:-1] if target[-1] in decoding.stop_tokens else target)


def _labels(labels: list[int]) -> NDArray[np.int64] | None:
    return np.array(labels, np.int64) if set(labels) != {NO_LABEL} else None


def _with(before: Policy, chain: str, rule: Rule) -> Policy:
    return Policy(rules=before.rules | {chain: rule})


def _stops(model: Model, name: str) -> _Choice:
    """The exits of a chain that runs before the text."""
    chain = chain_named(model, name)
    early = chain.stops[:-1]
    scores = sorted(set.intersection(*(set(exit_.scores) for exit_ in early))) if early else []
    if not scores:
        raise MeasurementError(
            f"the chain {name} has no early exits with a score in common",
            fix="Export it with exits (--tower-exits, --encoder-exits).",
        )
    rules = {
        exit_.name: msgspec.structs.replace(forced(chain.stops, exit_.name), score=scores[0])
        for exit_ in chain.stops
    }
    return _Choice(name, scores, rules, rules[chain.stops[-1].name])


def _gates(model: Model) -> _Choice:
    """The gates of the chain that writes the text."""
    chain = model.chain
    gates = [exit_ for exit_ in chain.exits if exit_.action == "drop" and exit_.path]
    if not gates:
        raise MeasurementError(
            f"the chain {model.chain_name} has no gates",
            fix="Export a model with trained gates (--gates), or leave --gates out.",
        )
    before = model.policy.rules.get(model.chain_name, Rule())
    drops = {exit_.name for exit_ in chain.exits if exit_.action == "drop"}
    kept = {name: value for name, value in _named(before, chain).items() if name not in drops}
    rules = {
        gate.name: _with_thresholds(before, {**kept, _scheduled(chain, gate): ALWAYS})
        for gate in gates
    }
    never = {gate.name: OUT_OF_REACH for gate in gates}
    asking = _with_thresholds(before, {**kept, **never})
    stay = before if before.thresholds == NEVER else _with_thresholds(before, kept)
    return _Choice(model.chain_name, ["gate"], {**rules, STAY: stay}, asking)


def _named(rule: Rule, chain: Chain) -> dict[str, float]:
    """Thresholds of a rule, by the names of the exits."""
    if isinstance(rule.thresholds, dict):
        return rule.thresholds
    early = [exit_.name for exit_ in chain.stops[:-1]]
    if isinstance(rule.thresholds, list):
        return dict(zip(early, rule.thresholds, strict=True))
    return {} if rule.thresholds == NEVER else dict.fromkeys(early, rule.thresholds)


def _with_thresholds(rule: Rule, thresholds: dict[str, float]) -> Rule:
    return msgspec.structs.replace(rule, thresholds=thresholds)


def _scheduled(chain: Chain, gate: Exit) -> str:
    """The drop without a score at a gate's place, which costs no gate; or the gate itself."""
    return next(
        (
            exit_.name
            for exit_ in chain.exits
            if exit_.action == "drop" and exit_.behind == gate.behind and not exit_.path
        ),
        gate.name,
    )


def _hash(digest: hashlib._Hash, text: Text) -> None:
    for name, value in _arrays(text):
        digest.update(f"{name} {value.dtype.str} {value.shape} ".encode() + value.tobytes())


def _arrays(text: Text) -> Iterator[tuple[str, NDArray]]:
    yield "tokens", np.array(text.tokens, np.int64)
    yield from sorted(text.inputs.items())


__all__ = ["STAY", "record_answers"]
