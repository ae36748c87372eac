"""Prompts with images in float64: what is kept of every token after catch-up, and what is left when
image tokens leave.

The reference runs a whole text in one pass, with rows removed where image tokens leave. A text is
greedy if the reference's likeliest token behind each of its tokens is the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeexit.bundle.policy import ALWAYS, Policy, Rule, policy_for
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, PolicyError
from edgeexit.runtime import load
from edgeexit.runtime.model import Model
from tests.vision_models import (
    DECODERS,
    EXITS,
    FAMILIES,
    LAYERS,
    PLACEHOLDER,
    load_split,
)
from tests.vision_reference import Asked, asked_of, prompts_of, random_pixels

KINDS = ["start", "two", "none", "middle"]
Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="session")
def asked(vision_folder: Callable[[str], Path]) -> Callable[[str], Asked]:
    return functools.cache(
        lambda family: asked_of(load_split(family, vision_folder(family)), KINDS)
    )


def leaving(model: Model, asked: Asked) -> dict[str, float]:
    """Thresholds that half of the tokens reach."""
    texts, scores = asked.generate(model).tokens, []
    for row, text in enumerate(texts):
        prompt, images = asked.prompts[row], asked.images[row]
        ids, given = torch.tensor([prompt + text]), {}
        source: Any = ()
        if asked.encodes:
            read, own = torch.tensor([prompt]), () if images is None else (images,)
            source = asked.split.encode(read, torch.ones_like(read), images=own)
            ids = torch.tensor([[2, *text]])
        elif images is not None:
            given = {"pixel_values": images}
        with torch.no_grad():
            exits = asked.split(ids, exits=EXITS, source=source, **given)
        best = [exits[layer][0, -len(text) - 1 :].softmax(-1).amax(-1) for layer in EXITS]
        scores.append(torch.stack(best))
    medians = torch.cat(scores, 1).median(1).values.tolist()
    return {f"exit_{layer}": score for layer, score in zip(EXITS, medians, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_after_catching_up_are_those_of_a_whole_run(
    asked: Callable[[str], Asked], vision_bundle: Bundles, family: str
) -> None:
    """Prompts as a batch, and each alone: then more tokens wait for the last layers at the end."""
    whole = asked(family)
    with load(vision_bundle(family)) as model:
        rules = dict.fromkeys(model.chains, Rule())
        rules["main"] = Rule(thresholds=leaving(model, whole), score="max_prob")
        model.policy = Policy(rules=rules)
        waited, exits, catch_ups = 0, set(), 0
        for own in (whole, *map(whole.alone, range(len(KINDS)))):
            texts = own.generate(model, mode="fast")
            waited += waiting(model)
            exits |= texts.statistics.exits.keys()
            catch_ups += texts.statistics.catch_ups
            audited = own.generate(model, mode="fast", audit=True)
            assert audited.tokens == texts.tokens and not waiting(model)
            own.assert_states(model, texts.tokens)
        assert waited and catch_ups and exits >= {"exit_1", f"exit_{LAYERS}"}


def waiting(model: Model) -> int:
    """Tokens that have not reached the last component."""
    session = model._session
    assert session is not None
    first, last = session.parts[0].states.lengths, session.parts[-1].states.lengths
    return sum(first) - sum(last)


@pytest.mark.parametrize(("decoder", "chunk"), [*((d, 256) for d in DECODERS), ("blip2", 7)])
def test_image_tokens_that_leave_are_not_read_behind_any_layer(
    asked: Callable[[str], Asked],
    vision_bundle: Bundles,
    decoder: str,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind every layer, in every mode; and in mode fast what is kept of every token."""
    monkeypatch.setattr("edgeexit.runtime.programs.text_program.CHUNK", chunk)
    own = asked(decoder)
    with load(vision_bundle(decoder)) as model:
        early = leaving(model, own)
        for layer in range(1, LAYERS):
            drop = {f"drop_{layer}": ALWAYS}
            model.policy = Policy(rules={"vision": Rule(), "main": Rule(thresholds=drop)})
            texts = own.generate(model).tokens
            own.assert_greedy(texts, layer)
            own.assert_states(model, texts, layer)
            for mode in ("exact", "fast"):
                assert own.generate(model, mode=mode).tokens == texts, mode
            rule = Rule(thresholds={**early, **drop}, score="max_prob")
            model.policy = Policy(rules={"vision": Rule(), "main": rule})
            fast = own.generate(model, mode="fast", audit=True)
            assert len(fast.statistics.exits) > 1
            own.assert_states(model, fast.tokens, layer)


@pytest.mark.parametrize("chunk", [256, 3])
def test_a_trace_answers_behind_dropped_tokens_as_generation_does(
    asked: Callable[[str], Asked],
    vision_bundle: Bundles,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgeexit.runtime.programs.text_program.CHUNK", chunk)
    split = asked("llava").split
    rules = {"vision": Rule(), "main": Rule(thresholds={"drop_1": ALWAYS})}
    [prompt] = prompts_of(split.whole.tower.tokens, ["middle"])
    inputs = {"pixel_values": random_pixels(split, 1).numpy()}
    with load(vision_bundle("llava"), policy=Policy(rules=rules)) as model:
        [written] = model.generate(prompt, inputs=inputs, max_new_tokens=6).finish().tokens
        whole = np.array([prompt + written])
        trace = model.trace({model.bundle.manifest.decoding.tokens: whole, **inputs})
    gone = whole == PLACEHOLDER
    last = trace.outputs[-1]
    np.testing.assert_array_equal(last["token"][0, len(prompt) - 1 : -1], written)
    np.testing.assert_array_equal(last["token"] == -1, gone)
    assert np.isnan(last["next_log_prob"][gone]).all()
    assert last["logits"][0].argmax() == last["token"][0, -1]
    assert all(np.isnan(own[gone]).all() for own in trace.scores[-1].values())


def test_a_prompt_that_ends_with_an_image_cannot_drop_it(
    asked: Callable[[str], Asked], vision_bundle: Bundles
) -> None:
    split = asked("llava").split
    rules = {"vision": Rule(), "main": Rule(thresholds={"drop_1": ALWAYS})}
    [prompt] = prompts_of(split.whole.tower.tokens, ["end"])
    inputs = {"pixel_values": random_pixels(split, 1).numpy()}
    with load(vision_bundle("llava"), policy=Policy(rules=rules)) as model:
        with pytest.raises(InputError, match="ends with tokens of that group"):
            model.generate(prompt, inputs=inputs, max_new_tokens=4).finish()
        model.policy = Policy(rules={"vision": Rule(), "main": Rule()})
        assert model.generate(prompt, inputs=inputs, max_new_tokens=4).finish().tokens[0]


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"drop_2": 0.5}, "the threshold of drop_2 is 0.5, but this drop is a schedule"),
        ({"drop_9": ALWAYS}, "name 'drop_9'; the early exits are .*, the drops drop_1, drop_2, dr"),
        ({"drop_2": "always"}, "the threshold of drop_2 is 'always', not a number"),
    ],
)
def test_thresholds_that_no_drop_can_have_are_refused(
    vision_bundle: Bundles, thresholds: Any, message: str
) -> None:
    rules = {"vision": Rule(), "main": Rule(thresholds=thresholds)}
    with pytest.raises(PolicyError, match=message):
        policy_for(Policy(rules=rules), vision_bundle("llava"))
