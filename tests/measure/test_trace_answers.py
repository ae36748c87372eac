"""Traces of exits that are chosen once per prompt, and policies that are calibrated on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeexit.bundle.policy import ALWAYS, Policy, Rule
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import CheckError, DataError, MeasurementError
from edgeexit.measure.calibrate import calibrate, losses
from edgeexit.measure.texts import Text
from edgeexit.measure.trace import NO_LABEL, replay
from edgeexit.measure.trace_answers import STAY, record_answers
from edgeexit.measure.trace_file import read_trace, write_trace
from edgeexit.runtime import Model, load
from tests.decoder_graphs import START
from tests.decoder_toys import batch_inputs, make_decoder_toy, make_rows, write_decoder_toy
from tests.vision_models import PLACEHOLDER, SIZE

PROMPTS, COUNT = 12, 6


def questions(bundle: Bundle) -> list[Text]:
    """An image each, but for the last two."""
    random, tokens = np.random.default_rng(5), 16
    texts = []
    for number in range(PROMPTS):
        words = random.integers(5, 200, 3 + number % 4).tolist()
        if number >= PROMPTS - 2:
            texts.append(Text(words))
            continue
        pixels = random.normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
        texts.append(Text([*[PLACEHOLDER] * tokens, *words], {"pixel_values": pixels}))
    return texts


@pytest.fixture
def model(gated_bundle: Callable[[str], Bundle]) -> Any:
    with load(gated_bundle("llava"), all_scores=True) as loaded:
        yield loaded


def answer(model: Model, text: Text, mode: str = "full") -> list[int]:
    made = model.generate(
        text.tokens,
        inputs=text.inputs or None,
        max_new_tokens=COUNT,
        mode=mode,
        text=False,  # type: ignore[arg-type]
    )
    return made.finish().tokens[0]


def test_replay_of_a_gates_trace_is_what_the_policy_does(model: Model) -> None:
    """Thresholds that some prompts reach: the same answer, and the same gate."""
    texts = questions(model.bundle)
    trace = record_answers(model, texts, name="some", max_new_tokens=COUNT)
    assert trace.exits == ["gate_1", "gate_3", STAY] and trace.rows == PROMPTS - 2
    assert trace.gates and trace.of_answers
    assert (losses(trace, "consistency") > 0).any()
    full = [answer(model, text) for text in texts[: PROMPTS - 2]]
    for threshold in np.quantile(trace.scores["gate"][:-1], [0.2, 0.5, 0.8]):
        rule = Rule(thresholds=float(threshold), score="gate")
        taken = replay(trace, rule)
        model.policy = Policy(
            rules={
                "vision": Rule(),
                "main": Rule(thresholds=dict.fromkeys(["gate_1", "gate_3"], float(threshold))),
            }
        )
        assert replay(trace, model.policy).tolist() == taken.tolist()
        for number, text in enumerate(texts[: PROMPTS - 2]):
            made = model.generate(text.tokens, inputs=text.inputs, max_new_tokens=COUNT).finish()
            fired = [gate for gate, rows in made.statistics.dropped.items() if rows[0]]
            assert fired == ([] if taken[number] == 2 else [trace.exits[taken[number]]])
            same = trace.predictions[taken[number], number] == trace.predictions[-1, number]
            assert (made.tokens[0] == full[number]) == same


def test_replay_of_a_towers_trace_is_what_the_policy_does(model: Model) -> None:
    texts = questions(model.bundle)[: PROMPTS - 2]
    trace = record_answers(model, texts, name="some", chain="vision", max_new_tokens=COUNT)
    assert trace.exits == ["tower_exit_1", "tower_exit_3"] and not trace.gates
    threshold = float(np.median(trace.scores["saturation"][0]))
    taken = replay(trace, Rule(thresholds=threshold, score="saturation"))
    full = [answer(model, text) for text in texts]
    rule = Rule(thresholds=threshold, score="saturation")
    model.policy = Policy(rules={"vision": rule, "main": Rule()})
    assert 0 < taken.sum() < len(taken)
    for number, text in enumerate(texts):
        made = model.generate(text.tokens, inputs=text.inputs, max_new_tokens=COUNT).finish()
        assert made.statistics.earlier["vision"] == [trace.exits[taken[number]]]
        same = trace.predictions[taken[number], number] == trace.predictions[-1, number]
        assert (made.tokens[0] == full[number]) == same


def test_replay_of_an_encoders_trace_is_what_the_policy_does(tmp_path: Path) -> None:
    toy = make_decoder_toy(encoder=True)
    rows = make_rows(toy, [9, 12, 7, 10, 11, 8, 6, 12])
    texts = [Text([START], batch_inputs([row])) for row in rows]
    with load(write_decoder_toy(toy, tmp_path / "bundle"), all_scores=True) as model:
        trace = record_answers(model, texts, name="toy", chain="encoder", max_new_tokens=COUNT)
        assert trace.exits == ["encoder_1", "encoder_2", "encoder_3"]
        threshold = float(np.median(trace.scores["saturation"][1]))
        taken = replay(trace, Rule(thresholds=threshold, score="saturation"))
        full = [answer(model, text) for text in texts]
        rule = Rule(thresholds=threshold, score="saturation")
        model.policy = Policy(rules={"encoder": rule, "decoder": Rule()})
        assert len(set(taken.tolist())) > 1
        for number, text in enumerate(texts):
            made = model.generate(
                [text.tokens], inputs=text.inputs, max_new_tokens=COUNT, text=False
            ).finish()
            assert made.statistics.earlier["encoder"] == [trace.exits[taken[number]]]
            same = trace.predictions[taken[number], number] == trace.predictions[-1, number]
            assert (made.tokens[0] == full[number]) == same


def test_a_calibration_adds_to_the_policy_that_was_traced(model: Model, tmp_path: Path) -> None:
    """Gates, then exits of the language model beside them: the second policy has both."""
    base = Policy(rules={"vision": Rule(score="saturation", thresholds=0.5), "main": Rule()})
    model.policy = base
    texts = questions(model.bundle)
    trace = record_answers(model, texts, name="some", max_new_tokens=COUNT)
    write_trace(trace, tmp_path / "gates.npz")
    trace = read_trace(tmp_path / "gates.npz")
    assert trace.gates and trace.of_answers and trace.policy == base.rules
    policy, _, _ = calibrate(trace, max_risk=0.9, score="gate")
    assert policy.rules["vision"] == base.rules["vision"]
    thresholds = policy.rules["main"].thresholds
    assert isinstance(thresholds, dict) and set(thresholds) == {"gate_1", "gate_3"}
    model.policy = policy
    written = [Text(text.tokens + answer(model, text), text.inputs) for text in texts]
    from edgeexit.measure.texts import as_data
    from edgeexit.measure.trace import record

    tokens = record(model, as_data(written, model.bundle, "x"), 1)
    assert model.policy == policy
    both, _, _ = calibrate(tokens, max_risk=1.0, score="max_prob")
    found = both.rules["main"].thresholds
    assert isinstance(found, dict) and set(found) == {"gate_1", "gate_3", "exit_2"}
    assert {name: found[name] for name in thresholds} == thresholds
    alone = Rule(thresholds={"exit_2": found["exit_2"]})
    assert replay(tokens, both).tolist() == replay(tokens, alone).tolist()
    assert both.rules["main"].score == "max_prob" and both.rules["vision"] == base.rules["vision"]
    model.policy = both
    assert answer(model, texts[0], "fast")


def test_targets_are_labels(model: Model) -> None:
    """Right in full, right at a gate only, never right, and a prompt without a target."""
    texts = questions(model.bundle)[: PROMPTS - 2]
    plain = record_answers(model, texts, name="some", max_new_tokens=COUNT)
    assert plain.labels is None
    [changed, *_] = np.flatnonzero(plain.predictions[0] != plain.predictions[-1])
    [kept, other, without] = [n for n in range(len(texts)) if n != changed][:3]
    model.policy = Policy(rules={"vision": Rule(), "main": Rule(thresholds={"gate_1": ALWAYS})})
    targets = {changed: answer(model, texts[changed])}
    model.policy = Policy(rules={"vision": Rule(), "main": Rule()})
    [stop, *_] = model.bundle.manifest.decoding.stop_tokens or [None]  # type: ignore[union-attr]
    ends = [] if stop is None else [stop]
    targets |= {kept: [*answer(model, texts[kept]), *ends], other: [3]}
    asked = [
        Text(text.tokens + targets[n], text.inputs, len(text.tokens)) if n in targets else text
        for n, text in enumerate(texts)
    ]
    trace = record_answers(model, asked, name="some", max_new_tokens=COUNT)
    assert np.array_equal(trace.predictions, plain.predictions)
    assert trace.labels is not None and trace.labels[without] == NO_LABEL
    right = trace.predictions == trace.labels
    assert right[0, changed] and not right[-1, changed]
    assert right[-1, kept] and not right[:, other].any()


def test_no_threshold_is_an_answer(model: Model) -> None:
    trace = record_answers(model, questions(model.bundle), name="some", max_new_tokens=COUNT)
    with pytest.raises(CheckError, match="no threshold keeps the risk"):
        calibrate(trace, max_risk=0.0, score="gate")


def test_prompts_that_no_exit_concerns_are_refused(model: Model) -> None:
    blind = questions(model.bundle)[-2:]
    for chain in (None, "vision"):
        with pytest.raises(DataError, match="no prompt has anything that"):
            record_answers(model, blind, name="blind", chain=chain, max_new_tokens=2)
    two = questions(model.bundle)[0]
    pixels = np.repeat(two.inputs["pixel_values"], 2, axis=0)
    both = Text([*two.tokens, *two.tokens], {"pixel_values": pixels})
    with pytest.raises(DataError, match="prompt 1: the chain vision runs for 2 rows"):
        record_answers(model, [both], name="two", chain="vision", max_new_tokens=2)


def test_bundles_without_gates_are_refused(vision_bundle: Callable[[str], Bundle]) -> None:
    with (
        load(vision_bundle("llava"), all_scores=True) as model,
        pytest.raises(MeasurementError, match="has no gates"),
    ):
        record_answers(model, questions(model.bundle), name="some")
