"""Gates that drop image tokens: their score, what is left behind them, and rows that disagree.

The references run a whole text in one pass in float64, with the image tokens removed behind the
layer at which a text's gate fired.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeexit.bundle.policy import ALWAYS, Policy, Rule
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import ExportError, InputError, MeasurementError, UsageError
from edgeexit.export import SplitModel, export
from edgeexit.export.exits.gates import Gate, make_gates
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.measure.texts import Text
from edgeexit.measure.trace_answers import record_answers
from edgeexit.runtime import load
from edgeexit.runtime.model import Model
from tests.vision_models import DECODERS, GATES, LAYERS, PLACEHOLDER, PLAIN, gated, with_fewer_forms
from tests.vision_reference import Asked, asked_of, in_float64

KINDS = ["start", "two", "none", "middle", "start"]

SOME_SLOW = [
    pytest.param(family, marks=() if family == "llava" else pytest.mark.slow) for family in DECODERS
]
TWO = [SOME_SLOW[DECODERS.index(family)] for family in ("llava", "blip2")]
"""One family whose image tokens stand where the prompt says, and one where they stand in front."""


@pytest.fixture(scope="session")
def asked(vision_folder: Callable[[str], Path]) -> Callable[[str], Asked]:
    return functools.cache(lambda family: asked_of(gated(family, vision_folder(family)), KINDS))


def policy(thresholds: dict[str, float]) -> Policy:
    return Policy(rules={"vision": Rule(), "main": Rule(thresholds=thresholds)})


@torch.no_grad()
def expected_scores(own: Asked, layer: int, dropped: Sequence[int | None]) -> list[float]:
    """The score of a gate for each prompt, in float64, by the plainest code; `dropped`: the layer
    behind which a prompt's image tokens have left already."""
    split, scores = in_float64(own.split), []
    for prompt, images, gone in zip(own.prompts, own.images, dropped, strict=True):
        ids = torch.tensor([prompt])
        state = split.embed(ids, *(() if images is None else (images.double(),)))
        places = torch.arange(len(prompt))
        if split.trunk.stem is not None:
            state = split.trunk.stem(state, places[None])
        for number, one in enumerate(split.layers[:layer], start=1):
            state = split._through_layer(one, state, places[None])
            if number == gone:
                kept = ids[0] != PLACEHOLDER
                ids, state, places = ids[:, kept], state[:, kept], places[kept]
        image = (ids[0] == PLACEHOLDER).nonzero()[:, 0].tolist()
        text = state[0, (image[-1] + 1 if image else 0) :]
        mean = text[:-1].mean(0) if len(text) > 1 else torch.zeros(text.shape[1]).double()
        gate = split.gates[f"gate_{layer}"]
        read = torch.cat([mean, text[-1]])
        hidden = gate.first.weight @ read
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        scores.append((gate.second.weight @ hidden).softmax(0)[1].item())
    return scores


def threshold_between(own: Asked, layer: int) -> float:
    """A threshold that some prompts with images reach, and others do not."""
    scores = expected_scores(own, layer, [None] * len(own.prompts))
    seeing = sorted(s for s, images in zip(scores, own.images, strict=True) if images is not None)
    middle = len(seeing) // 2
    assert seeing[middle] - seeing[middle - 1] > 1e-3
    return (seeing[middle] + seeing[middle - 1]) / 2


@pytest.mark.parametrize("family", SOME_SLOW)
def test_rows_that_disagree_run_as_each_row_alone(
    asked: Callable[[str], Asked], gated_bundle: Callable[[str], Bundle], family: str
) -> None:
    """Logits and states are those of a plain run from which the image tokens were removed."""
    own = asked(family)
    threshold = threshold_between(own, 1)
    scores = expected_scores(own, 1, [None] * len(KINDS))
    drops = [
        1 if score >= threshold and images is not None else None
        for score, images in zip(scores, own.images, strict=True)
    ]
    assert 0 < sum(drop is not None for drop in drops) < len(KINDS) - 1
    with load(gated_bundle(family), policy=policy({"gate_1": threshold})) as model:
        texts = own.generate(model).tokens
        own.assert_greedy(texts, drops)
        own.assert_states(model, texts, drops)
        assert gates_of(model)["gate_1"] == [drop is not None for drop in drops]
        for mode in ("exact", "fast"):
            assert own.generate(model, mode=mode).tokens == texts, mode
        for row in range(len(KINDS)):
            alone = own.alone(row)
            assert alone.generate(model).tokens == [texts[row]]
            alone.assert_states(model, [texts[row]], [drops[row]])


@pytest.mark.parametrize("family", TWO)
def test_a_later_gate_decides_for_the_rows_that_stayed(
    asked: Callable[[str], Asked], gated_bundle: Callable[[str], Bundle], family: str
) -> None:
    own = asked(family)
    first = threshold_between(own, 1)
    with load(gated_bundle(family), policy=policy({"gate_1": first, "gate_3": ALWAYS})) as model:
        texts = own.generate(model).tokens
        early = gates_of(model)["gate_1"]
        later = gates_of(model)["gate_3"]
        assert later == [not e and i is not None for e, i in zip(early, own.images, strict=True)]
        drops = [1 if e else 3 if late else None for e, late in zip(early, later, strict=True)]
        own.assert_greedy(texts, drops)
        own.assert_states(model, texts, drops)


def test_gates_read_the_prompt_of_a_text_that_is_traced_with_its_answer(
    asked: Callable[[str], Asked], gated_bundle: Callable[[str], Bundle]
) -> None:
    """In a trace they decide as they did when the answer was written."""
    own = asked("llava").alone(0)
    [prompt] = own.prompts
    with load(gated_bundle("llava"), policy=policy({"gate_1": 2.0})) as model:
        [written] = own.generate(model).tokens
        session = model._session
        assert session is not None
        known = session.gates.scores["gate_1"]
        tokens = np.array([[*prompt, *written]])
        given = {model.bundle.manifest.decoding.tokens: tokens}
        given |= {"pixel_values": own.images[0].numpy()}
        scores = {}
        for count in (len(prompt), 0):
            model.trace(given, asked=[count])
            scores[count] = model._session.gates.scores["gate_1"]
        for wrong in ([1, 1], [tokens.size + 1], [-1]):
            with pytest.raises(InputError, match=r"asked is \[.* for 1 texts of \d+ tokens"):
                model.trace(given, asked=wrong)
    np.testing.assert_allclose(scores[len(prompt)], known, atol=1e-6)
    assert abs(scores[0][0] - known[0]) > 1e-4


def test_gates_are_not_asked_when_nothing_is_left_to_drop(
    asked: Callable[[str], Asked], gated_bundle: Callable[[str], Bundle]
) -> None:
    """A prompt without an image, and rows that all dropped theirs at the first gate."""
    own = asked("llava")
    both = {"gate_1": ALWAYS, "gate_3": ALWAYS}
    with load(gated_bundle("llava"), policy=policy(both)) as model:
        texts = own.generate(model).tokens
        own.assert_greedy(texts, [None if images is None else 1 for images in own.images])
        assert gates_of(model) == {"gate_1": [images is not None for images in own.images]}
        blind = own.alone(KINDS.index("none"))
        blind.assert_greedy(blind.generate(model).tokens)
        assert gates_of(model) == {}
        model.policy = policy({"drop_1": ALWAYS, "gate_3": ALWAYS})
        assert own.generate(model).tokens == texts
        assert gates_of(model) == {"drop_1": [images is not None for images in own.images]}


def gates_of(model: Model) -> dict[str, list[bool]]:
    session = model._session
    assert session is not None
    return session.gates.dropped


def changed_reference(
    model: SplitModel, change: Callable[[torch.Tensor], torch.Tensor]
) -> SplitModel:
    """The model with other scores of gates in its reference."""

    def reference(inputs: Any) -> Any:
        for values in model.reference(inputs):  # type: ignore[misc]
            yield {k: change(v) if k.endswith("/gate") else v for k, v in values.items()}

    return dataclasses.replace(model, reference=reference)


def test_a_score_that_is_not_a_number_never_drops(
    vision_folder: Callable[[str], Path],
    asked: Callable[[str], Asked],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And it is said, and no threshold is chosen for it."""
    split = gated("llava", vision_folder("llava"))
    with torch.no_grad():
        split.gate(1).second.weight.fill_(math.nan)
    with pytest.raises(ExportError, match="gate_1: gate hold NaN"):
        export(split.split_model(), tmp_path / "bundle")
    own, hidden = asked("llava"), changed_reference(split.split_model(), torch.zeros_like)
    export(with_fewer_forms(hidden, PLAIN), tmp_path / "bundle")
    with load(tmp_path / "bundle", policy=policy({"gate_1": ALWAYS})) as model:
        own.assert_greedy(own.generate(model).tokens)
        assert gates_of(model) == {"gate_1": [False] * len(KINDS)}
        assert "gate_1: a score is NaN, so it drops nothing" in caplog.text
        text = Text(list(own.prompts[0]), {"pixel_values": own.images[0].numpy()}, 0)
        with pytest.raises(MeasurementError, match="prompt 1: the score gate of gate_1 is NaN"):
            record_answers(model, [text], name="questions", max_new_tokens=2)


def test_the_score_reads_the_text_behind_the_last_image_alone() -> None:
    torch.manual_seed(0)
    gate, state = Gate(8, 16), torch.randn(1, 7, 8)
    image = torch.tensor([[False, True, True, False, False, False, False]])
    prompt = torch.tensor([6])
    score = gate(state, image, prompt)
    changed = state.clone()
    changed[:, [0, 1, 2, 6]] = 100.0  # text before the image, the image, padding
    assert torch.equal(gate(changed, image, prompt), score)
    for place in (3, 4, 5):
        changed = state.clone()
        changed[:, place] += 1.0
        assert not torch.isclose(gate(changed, image, prompt), score)


def test_gates_are_read_back_as_they_were_saved(
    vision_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    split = gated("llava", vision_folder("llava"))
    split.save_pretrained(tmp_path)
    read = from_pretrained(tmp_path)
    assert read.gate_layers == GATES  # type: ignore[union-attr]
    pairs = zip(read.gates.parameters(), split.gates.parameters(), strict=True)  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in pairs)
    assert read.exit_origins["gate_1"] == "untrained"
    assert from_pretrained(tmp_path, gates=[3]).gate_layers == [3]  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"no trained gate behind layer 2 \(trained: 1,3\)"):
        from_pretrained(tmp_path, gates=[2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0], "no gate can stand behind layer 0; the decoder has layers 1 to 4"),
        ([LAYERS], "no gate can stand behind layer 4"),
        ({2: 0}, "the width 0 of the gate behind layer 2 is out of range"),
    ],
)
def test_places_and_widths_that_no_gate_can_have_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_gates(given, 8, LAYERS)


def test_gates_of_a_language_model_are_refused(decoder_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="has no vision tower"):
        from_pretrained(decoder_folder("llama"), exits=[1], gates=[1])


def test_all_gates_have_scores_that_the_reference_computes(
    asked: Callable[[str], Asked], gated_bundle: Callable[[str], Bundle]
) -> None:
    """Each just reaches a threshold right below its reference, and not one right above."""
    own = asked("llava")
    for row, images in enumerate(own.images):
        if images is None:
            continue
        alone = own.alone(row)
        [score] = expected_scores(alone, 3, [None])
        for threshold, drops in ((score - 1e-4, True), (score + 1e-4, False)):
            with load(gated_bundle("llava"), policy=policy({"gate_3": threshold})) as model:
                alone.generate(model)
                assert gates_of(model) == {"gate_3": [drops]}
    assert np.isfinite(score)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_check_compares_the_scores_of_gates(
    vision_folder: Callable[[str], Path],
    gated_bundle: Callable[[str], Bundle],
    tmp_path: Path,
    dtype: str,
) -> None:
    bundle = gated_bundle("llava").path
    if dtype != "float32":
        bundle = tmp_path / "bundle"
        export(gated("llava", vision_folder("llava")).split_model(), bundle, dtype=dtype)
    with load(bundle, all_scores=True) as model:
        report = check(model)
    assert report.passed, [c for c in report.comparisons if not c.passed]
    compared = [c.where for c in report.comparisons if c.what.startswith("score gate")]
    assert compared == ["gate_1", "gate_3"]
    assert any(c.what.endswith("in pieces") for c in report.comparisons)


def test_check_fails_for_gates_with_other_scores(
    vision_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    split = with_fewer_forms(gated("llava", vision_folder("llava")).split_model(), PLAIN)
    export(changed_reference(split, lambda scores: 1 - scores), tmp_path / "wrong")
    with load(tmp_path / "wrong", all_scores=True) as model:
        found = [c.where for c in check(model).comparisons if not c.passed]
    assert found == ["gate_1", "gate_3"]
