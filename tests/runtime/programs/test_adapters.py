"""Exits with adapters: every mode, and every row of every cache, against a reference in float64
that recomputes everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from edgeexit.bundle.policy import Decision
from edgeexit.bundle.reader import Bundle
from edgeexit.measure.check import check
from edgeexit.runtime import Model, Rule, Sampling, load
from edgeexit.runtime.executor.components import token_states
from edgeexit.runtime.executor.parts import Part
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.modes.early import Fast
from tests.decoders import (
    ADAPTERS,
    EXITS,
    LAYERS,
    Reference,
    make_adapted,
    random_prompts,
)

Bundles = Callable[[str], Bundle]
NEW = 14
ROUNDING = 1e-3
"""Two logits closer than that may change places between float32 and float64."""

LENGTHS = [6, 3, 11, 1]
NUMBERS = {layer: number for number, layer in enumerate([*EXITS, LAYERS])}


@pytest.fixture(scope="module", params=["llama", "opt"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Unsuited(Exception):
    """A text on which float32 and float64 may part, or that does not try what a test is about."""


class Answers:
    """What the reference says of texts, each computed once."""

    def __init__(self, family: str) -> None:
        self.reference = Reference.of(make_adapted(family))
        self.logits = functools.cache(self._logits)

    def _logits(self, text: tuple[int, ...], layer: int) -> np.ndarray:
        return self.reference.logits(text, layer)

    def token(self, text: Sequence[int], layer: int) -> int:
        """The greedy token behind a text."""
        logits = self.logits(tuple(text), layer)[-1]
        ordered = np.sort(logits)
        if ordered[-1] - ordered[-2] < ROUNDING:
            raise Unsuited
        return int(logits.argmax())

    def score(self, text: Sequence[int], layer: int) -> float:
        """max_prob behind a text."""
        logits = self.logits(tuple(text), layer)[-1]
        return float(1 / np.exp(logits - logits.max()).sum())

    def greedy(self, prompt: Sequence[int]) -> list[int]:
        """What the whole model writes, up to a stop token."""
        text = list(prompt)
        while len(text) < len(prompt) + NEW and (token := self.token(text, LAYERS)):
            text.append(token)
        return text[len(prompt) :]

    def drafted(self, prompts: list[list[int]], layer: int, drafts: int) -> tuple[int, int]:
        """Tokens drafted and accepted while texts are written side by side, by the plainest account
        of drafting: every draft is the exit's answer to the whole text before it, and none goes
        beyond where the shortest text may."""
        texts = [[*prompt, self.token(prompt, LAYERS)] for prompt in prompts]
        made = kept = 0
        while True:
            written = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
            active = [n for n, new in enumerate(written) if len(new) < NEW and 0 not in new]
            if not active:
                return made, kept
            most = NEW - min(len(written[n]) for n in active)
            for text in (texts[n] for n in active):
                told = list(text)
                for _ in range(min(drafts, most - 1)):
                    told.append(self.token(told, layer))
                made += len(told) - len(text)
                for token in told[len(text) :]:
                    if token != self.token(text, LAYERS):
                        break
                    text.append(token)
                    kept += 1
                text.append(self.token(text, LAYERS))

    def fast(
        self, prompt: list[int], threshold: float, asked: Sequence[int]
    ) -> tuple[list[int], list[int], int]:
        """Tokens, the layer that each left at, and how many of early ones the last layer agrees
        with; a stop token counts, but is not given out."""
        text, layers, agreed = list(prompt), [], 0
        while len(layers) < NEW:
            scores = {layer: self.score(text, layer) for layer in asked}
            if any(abs(score - threshold) < 1e-5 for score in scores.values()):
                raise Unsuited
            leaves = [layer for layer, score in scores.items() if score >= threshold]
            layers.append(min(leaves, default=LAYERS))
            token = self.token(text, layers[-1])
            agreed += layers[-1] != LAYERS and token == self.token(text, LAYERS)
            if token == 0:
                break
            text.append(token)
        if len(set(layers)) == 1:
            raise Unsuited
        return text[len(prompt) :], layers, agreed

    def prompts(
        self, needed: Callable[[list[int]], object], lengths: Sequence[int] = LENGTHS
    ) -> list[list[int]]:
        """Random prompts of these lengths for which `needed` can be computed."""
        found: list[list[int]] = []
        for number, length in enumerate(lengths):
            for seed in range(50):
                [prompt] = random_prompts(1, [length], seed=50 * number + seed)
                try:
                    needed(prompt)
                except Unsuited:
                    continue
                found.append(prompt)
                break
        assert len(found) == len(lengths), "no prompt is suited"
        return found


@pytest.fixture(scope="module")
def answers(family: str) -> Answers:
    return Answers(family)


@pytest.fixture(params=["in-place", "append"])
def decoder(
    request: pytest.FixtureRequest, family: str, adapted_bundle: Bundles
) -> Iterator[Model]:
    """Two forms of the caches, on an engine that can run both."""
    with load(adapted_bundle(family), states=request.param) as loaded:
        session = loaded.session(1)
        assert sorted(adapters_of(session)) == [NUMBERS[layer] for layer in ADAPTERS]
        assert {part.variant.states for part in session.stateful} == {request.param}
        yield loaded


def adapters_of(session: Session) -> dict[int, Part]:
    """Component -> what stands between it and the head of its exit."""
    found = {number: session.adapters[number] for number in range(len(session.parts))}
    return {number: part for number, part in found.items() if part is not None}


def session_of(decoder: Model) -> Session:
    assert decoder._session is not None
    return decoder._session


@pytest.mark.parametrize("drafts", [1, 3, 8])
@pytest.mark.parametrize("batch", [1, 4])
def test_exact_decoding_drafts_what_the_adapter_says_of_the_whole_text(
    decoder: Model, answers: Answers, drafts: int, batch: int
) -> None:
    """A row missing from an adapter's caches, or one too many, would change what is drafted."""

    def account(prompt: list[int]) -> None:
        counts = [answers.drafted([prompt], layer, drafts) for layer in ADAPTERS]
        if not any(kept for _, kept in counts):
            raise Unsuited

    prompts = answers.prompts(account, LENGTHS[:batch])
    accepted = []
    for layer in ADAPTERS:
        made = decoder.generate(
            prompts,
            max_new_tokens=NEW,
            mode="exact",
            drafts=drafts,
            draft_exit=f"exit_{layer}",
        ).finish()
        assert made.tokens == [answers.greedy(prompt) for prompt in prompts]
        statistics = made.statistics
        found = (statistics.drafted, statistics.accepted)
        assert found == answers.drafted(prompts, layer, drafts)
        accepted.append(statistics.accepted / statistics.drafted)
    assert 0 < max(accepted) < 1, "some drafts should hold, and some not"


def test_drafts_adapted_to_acceptance_give_the_same_tokens(
    decoder: Model, answers: Answers
) -> None:
    prompts = answers.prompts(answers.greedy)
    for layer in ADAPTERS:
        made = decoder.generate(
            prompts, max_new_tokens=NEW, mode="exact", draft_exit=f"exit_{layer}"
        ).finish()
        assert made.tokens == [answers.greedy(prompt) for prompt in prompts]


@pytest.mark.parametrize("batch", [1, 4])
def test_drafting_that_stops_early_leaves_no_hole(
    decoder: Model, answers: Answers, batch: int
) -> None:
    """At the median of the exit's scores about half of the drafts stop for want of certainty."""
    prompts = answers.prompts(answers.greedy, LENGTHS[:batch])
    scores = [
        answers.score([*prompt, *answers.greedy(prompt)[:n]], 2)
        for prompt in prompts
        for n in range(1, 8)
    ]
    made = decoder.generate(
        prompts,
        max_new_tokens=NEW,
        mode="exact",
        drafts=4,
        draft_exit="exit_2",
        draft_threshold=float(np.median(scores)),
    ).finish()
    assert made.tokens == [answers.greedy(prompt) for prompt in prompts]
    compare_caches(decoder, answers, prompts, made.tokens, adapters=[2])


def compare_caches(
    decoder: Model,
    answers: Answers,
    prompts: list[list[int]],
    made: list[list[int]],
    adapters: Sequence[int],
    *,
    all_rows: bool = False,
) -> None:
    """Every row of every cache equals the reference's; caches of other adapters are empty."""
    session = session_of(decoder)
    asked = [NUMBERS[layer] for layer in adapters]
    compared = 0
    for row, (prompt, tokens) in enumerate(zip(prompts, made, strict=True)):
        text = [*prompt, *tokens]
        expected = answers.reference.caches(text)
        parts = [*session.parts, *(adapters_of(session)[number] for number in asked)]
        for part in parts:
            length = part.states.lengths[row]
            waiting = session.parts[0].states.lengths[row] - length
            assert waiting in (0, 1, 2), "a last draft, and a last round without, may wait"
            if all_rows:
                assert length == len(text) - 1
            compared += length
            for cache in token_states(part.component):
                found = part.states.rows(cache.name)[row, :, :length]
                known = min(length, len(text))
                np.testing.assert_allclose(
                    found[:, :known], expected[cache.name][:, :known], atol=2e-4, rtol=2e-4
                )
    assert compared, "rows that ended are emptied; one should be left"
    for number, part in adapters_of(session).items():
        assert number in asked or not any(part.states.lengths)


@pytest.mark.parametrize("drafts", [1, 4])
def test_caches_after_exact_decoding_are_those_of_the_whole_text(
    decoder: Model, answers: Answers, drafts: int
) -> None:
    [prompt] = answers.prompts(answers.greedy, [9])
    for layer in ADAPTERS:
        made = decoder.generate(
            prompt, max_new_tokens=NEW, mode="exact", drafts=drafts, draft_exit=f"exit_{layer}"
        ).finish()
        compare_caches(decoder, answers, [prompt], made.tokens, [layer])


def median_score(answers: Answers, layers: Sequence[int]) -> float:
    prompts = random_prompts(8, [12], seed=9)
    scores = [answers.score(p[:n], k) for p in prompts for n in (4, 12) for k in layers]
    return float(np.median(scores))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("asked", [[1, 2], [2]])
def test_fast_decoding_leaves_where_the_adapters_score_says_and_leaves_no_hole(
    decoder: Model, answers: Answers, batch: int, asked: list[int]
) -> None:
    """Token for token; then all caches, those of adapters that were asked too, row for row."""
    threshold = median_score(answers, asked)
    prompts = answers.prompts(lambda p: answers.fast(p, threshold, asked), LENGTHS[:batch])
    decoder.policy = Rule(
        thresholds=[threshold if layer in asked else float("inf") for layer in EXITS]
    )
    made = decoder.generate(prompts, max_new_tokens=NEW, mode="fast", audit=True).finish()
    expected = [answers.fast(prompt, threshold, asked) for prompt in prompts]
    assert made.tokens == [tokens for tokens, _, _ in expected]
    layers = [layer for _, left, _ in expected for layer in left]
    assert made.statistics.exits == {f"exit_{n}": layers.count(n) for n in sorted(set(layers))}
    assert made.statistics.agreed == sum(agreed for _, _, agreed in expected)
    whole = all(len(tokens) == NEW for tokens in made.tokens)
    compare_caches(decoder, answers, prompts, made.tokens, asked, all_rows=whole)


def test_states_that_wait_enter_adapters_when_a_full_ring_is_caught_up(
    decoder: Model, answers: Answers
) -> None:
    """All leave at the first exit; a ring of few places makes the second adapter catch up often."""
    prompts = answers.prompts(answers.greedy)
    session = decoder.session(len(prompts))
    decisions = [Decision(True, -np.inf), Decision(True, 0.5), Decision(True, -np.inf)]
    mode = Fast(session, ["exit_1", "exit_2", "exit_4"], decisions, pending=3)
    tokens = [[int(token)] for token in mode.prefill([np.array(prompt) for prompt in prompts])]
    for _ in range(NEW):
        for made, found in zip(tokens, mode.step([True] * len(prompts)), strict=True):
            made += found
    assert list(mode.statistics.exits) == ["exit_1"]
    assert mode.statistics.catch_ups > 2
    mode.flush()
    compare_caches(decoder, answers, prompts, tokens, EXITS, all_rows=True)


def test_a_prompt_waits_behind_the_exit_that_answers(decoder: Model, answers: Answers) -> None:
    """No deeper component runs at all, and the adapter holds the prompt as well as the text."""
    prompts = answers.prompts(answers.greedy)
    decoder.policy = Rule(thresholds=[float("-inf"), float("inf")])
    made = decoder.generate(prompts, max_new_tokens=NEW, mode="fast").finish()
    assert list(made.statistics.exits) == ["exit_1"] and not made.statistics.catch_ups
    session = session_of(decoder)
    first, *deeper = (part.states.lengths for part in session.parts)
    adapter = adapters_of(session)[0].states.lengths
    assert adapter == first and min(first) > 1 and not any(map(any, deeper))


def test_prompts_pass_by_an_adapter_of_one_layer(
    decoder: Model, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last token of a prompt runs through it; one of two layers processes all of them."""
    prompts = answers.prompts(answers.greedy, LENGTHS[2:3])
    runs: list[tuple[str, int]] = []
    run = Part.run

    def noted(part: Part, new: int, **more: Any) -> None:
        runs.append((part.name, new))
        run(part, new, **more)

    monkeypatch.setattr(Part, "run", noted)
    session = decoder.session(1)
    adapters = {part.name: part for part in adapters_of(session).values()}
    assert {n for n, p in adapters.items() if p.component.projections} == {"adapter_1"}
    decisions = [Decision(True, np.inf), Decision(True, np.inf), Decision(True, -np.inf)]
    mode = Fast(session, ["exit_1", "exit_2", "exit_4"], decisions)
    mode.prefill([np.array(prompt) for prompt in prompts])
    found = [(name, new) for name, new in runs if name in adapters]
    assert sorted(found) == [("adapter_1", 1), ("adapter_2", LENGTHS[2])]
    assert all(part.states.lengths == [LENGTHS[2]] for part in adapters.values())


def test_full_decoding_asks_no_adapter(decoder: Model, answers: Answers) -> None:
    prompts = answers.prompts(answers.greedy, LENGTHS[:2])
    made = decoder.generate(prompts, max_new_tokens=NEW).finish()
    assert made.tokens == [answers.greedy(prompt) for prompt in prompts]
    compare_caches(decoder, answers, prompts, made.tokens, [])
    decoder.policy = Rule()  # nor does `fast` where no threshold is given
    made = decoder.generate(prompts, max_new_tokens=NEW, mode="fast", audit=True).finish()
    assert made.tokens == [answers.greedy(prompt) for prompt in prompts]
    compare_caches(decoder, answers, prompts, made.tokens, [])


def test_a_prompt_longer_than_a_chunk_enters_adapters_in_pieces(
    decoder: Model, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeexit.runtime.programs.text_program.CHUNK", 8)
    prompts = answers.prompts(answers.greedy, [29, 8])
    for layer in ADAPTERS:
        made = decoder.generate(
            prompts, max_new_tokens=NEW, mode="exact", drafts=3, draft_exit=f"exit_{layer}"
        ).finish()
        assert made.tokens == [answers.greedy(prompt) for prompt in prompts]
        compare_caches(decoder, answers, prompts, made.tokens, [layer])
    decoder.policy = Rule(thresholds=2.0)  # asked always, never certain enough
    made = decoder.generate(prompts, max_new_tokens=NEW, mode="fast", audit=True).finish()
    assert made.tokens == [answers.greedy(prompt) for prompt in prompts]
    compare_caches(decoder, answers, prompts, made.tokens, EXITS)


def test_texts_may_fill_the_capacity_to_the_last_place(
    family: str, adapted_bundle: Bundles, answers: Answers
) -> None:
    prompts = answers.prompts(answers.greedy, [10, 9, 2])
    with load(adapted_bundle(family), capacity=10 + NEW) as decoder:
        for layer in ADAPTERS:
            made = decoder.generate(
                prompts, max_new_tokens=NEW, mode="exact", drafts=8, draft_exit=f"exit_{layer}"
            ).finish()
            assert made.tokens == [answers.greedy(prompt) for prompt in prompts]


def test_drawn_tokens_are_those_of_the_greedy_mode_when_nothing_is_left_to_chance(
    decoder: Model, answers: Answers
) -> None:
    prompts = answers.prompts(answers.greedy, LENGTHS[:2])
    made = decoder.generate(
        prompts,
        max_new_tokens=NEW,
        mode="exact",
        drafts=3,
        draft_exit="exit_2",
        sampling=Sampling(temperature=1.0, top_k=1),
    ).finish()
    assert made.tokens == [answers.greedy(prompt) for prompt in prompts]


def test_check_drafts_with_every_adapter_and_all_of_it_holds(decoder: Model) -> None:
    report = check(decoder)
    report.require()
    drafting = [one.what for one in report.comparisons if one.where == "exact"]
    assert all(f"exit_{layer}" in what for layer, what in zip(ADAPTERS, drafting, strict=True))
    assert {"exit_1", "exit_2", "unsplit"} <= {one.where for one in report.comparisons}


def test_unsplit_is_the_model_without_adapters(
    family: str, adapted_bundle: Bundles, answers: Answers
) -> None:
    [prompt] = answers.prompts(answers.greedy, [9])
    with load(adapted_bundle(family), unsplit=True) as whole:
        made = whole.generate(prompt, max_new_tokens=NEW).finish()
    assert made.tokens == [answers.greedy(prompt)]
