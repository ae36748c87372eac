"""Decoding: every mode against a reference in float64 that recomputes everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgeexit.bundle.manifest import StateForm as Form
from edgeexit.bundle.manifest import TokenState
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import (
    EdgeExitError,
    EngineError,
    InputError,
    PolicyError,
    StateError,
    UsageError,
)
from edgeexit.runtime import Model, Piece, Rule, load
from edgeexit.runtime.engines.onnxruntime import OnnxRuntimeEngine, features_of
from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.components import choose_variant, token_states
from edgeexit.runtime.executor.states import TokenStates
from edgeexit.runtime.programs.arguments import ModeName
from edgeexit.runtime.text.tokenizer import Stream
from tests.decoders import (
    EXITS,
    FAMILIES,
    Reference,
    approximate,
    make_decoder,
    random_prompts,
)

Bundles = Callable[[str], Bundle]
FORMS: tuple[Form, ...] = ("in-place", "fixed", "append")
NEW = 20
ROUNDING = 1e-3
"""Two logits closer than that may change places between float32 and float64."""
HALF_ROUNDING = 0.1
"""The same for float16."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(family: str) -> Reference:
    return Reference(make_decoder(family))


@pytest.fixture(params=FORMS)
def decoder(
    request: pytest.FixtureRequest, family: str, decoder_bundle: Bundles
) -> Iterator[Model]:
    """All forms of the caches, on the engine that can run all of them."""
    with load(decoder_bundle(family), states=request.param) as loaded:
        assert loaded.describe_engine()["states"] == request.param
        yield loaded


@pytest.fixture(scope="module")
def expected(reference: Reference) -> Callable[[list[int]], tuple[list[int], list[float]]]:
    known: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def greedy(prompt: list[int]) -> tuple[list[int], list[float]]:
        key = tuple(prompt)
        if key not in known:
            known[key] = reference.greedy(prompt, NEW)
        return known[key]

    return greedy


Expected = Callable[[list[int]], tuple[list[int], list[float]]]


def check(
    tokens: list[int], prompt: list[int], expected: Expected, rounding: float = ROUNDING
) -> None:
    """Equal until a place where the two largest logits are as good as equal, or a stop token."""
    wanted, margins = expected(prompt)
    for place, (found, right) in enumerate(zip(tokens, wanted, strict=False)):
        if found != right:
            assert margins[place] < rounding, f"token {place}: {found} for {right}"
            return
    if len(tokens) < NEW:
        assert wanted[len(tokens)] == 0, "ended without a stop token"


def test_full_decoding_gives_the_reference_tokens(decoder: Model, expected: Expected) -> None:
    for prompt in random_prompts(3, [1, 5, 17]):
        made = decoder.generate(prompt, max_new_tokens=NEW).finish()
        check(made.tokens[0], prompt, expected)


@pytest.mark.parametrize("drafts", [1, 3, 8, None])
@pytest.mark.parametrize("batch", [1, 4])
def test_exact_decoding_gives_the_reference_tokens(
    decoder: Model, expected: Expected, drafts: int | None, batch: int
) -> None:
    prompts = random_prompts(batch, [6, 3, 11, 1])
    for draft_exit in ("exit_1", "exit_2"):
        made = decoder.generate(
            prompts, max_new_tokens=NEW, mode="exact", drafts=drafts, draft_exit=draft_exit
        ).finish()
        for tokens, prompt in zip(made.tokens, prompts, strict=True):
            check(tokens, prompt, expected)
        statistics = made.statistics
        assert statistics.drafted >= statistics.tested >= statistics.accepted


def test_exact_decoding_drafts_no_further_than_the_text_goes(decoder: Model) -> None:
    [prompt] = random_prompts(1, [6])
    for most in (1, 2, 3):
        made = decoder.generate(prompt, max_new_tokens=most, mode="exact", drafts=8).finish()
        assert len(made.tokens[0]) <= most
        assert sum(made.statistics.exits.values()) <= most
        assert made.statistics.drafted < most


def test_exact_decoding_may_stop_drafting_early(decoder: Model, expected: Expected) -> None:
    [prompt] = random_prompts(1, [6])
    always = decoder.generate(
        prompt, max_new_tokens=NEW, mode="exact", drafts=4, draft_threshold=2.0
    ).finish()
    check(always.tokens[0], prompt, expected)
    never = decoder.generate(prompt, max_new_tokens=NEW, mode="exact", drafts=4).finish()
    assert always.statistics.drafted < never.statistics.drafted


@pytest.mark.parametrize("batch", [1, 3])
def test_fast_decoding_without_exits_gives_the_reference_tokens(
    decoder: Model, expected: Expected, batch: int
) -> None:
    prompts = random_prompts(batch, [6, 3, 11])
    decoder.policy = Rule()
    made = decoder.generate(prompts, max_new_tokens=NEW, mode="fast").finish()
    for tokens, prompt in zip(made.tokens, prompts, strict=True):
        check(tokens, prompt, expected)


def test_a_float16_decoder_keeps_states_and_caches_in_half_and_answers_in_float32(
    half_decoder: Bundle, decoder_bundle: Bundles
) -> None:
    whole = decoder_bundle("llama")
    assert half_decoder.weights_bytes < 0.52 * whole.weights_bytes
    components = half_decoder.manifest.components
    for name in half_decoder.manifest.last_chain.components:
        segment = components[name]
        state, saturation = segment.outputs
        states = [segment.inputs[0], state, *token_states(segment)]
        assert {tensor.dtype for tensor in states} == {"float16"}
        assert saturation.dtype == "float32"
        assert {variant.precision for variant in segment.variants} == {"float16"}
    answers = {tensor.dtype for tensor in components["head"].outputs if tensor.name != "token"}
    assert answers == {"float32"}
    fixed = next(one for one in components["segment_0"].variants if one.states == "fixed")
    assert fixed.requires == ["opset-24", "cache-update"]
    segment = whole.manifest.components["segment_0"]
    fixed = next(one for one in segment.variants if one.states == "fixed")
    assert fixed.requires == ["opset-24", "cache-update", "float32-attention"]


@pytest.mark.parametrize("form", FORMS)
def test_a_float16_decoder_writes_the_tokens_of_float64_where_they_are_clear(
    half_decoder: Bundle, form: Form
) -> None:
    reference = Reference(make_decoder("llama"))
    prompts = random_prompts(3, [6, 3, 11])
    with load(half_decoder, states=form) as decoder:
        for mode in ("full", "exact", "fast"):
            made = decoder.generate(prompts, max_new_tokens=NEW, mode=mode).finish()
            for tokens, prompt in zip(made.tokens, prompts, strict=True):
                check(tokens, prompt, lambda p: reference.greedy(p, NEW), HALF_ROUNDING)
        decoder.policy = Rule(thresholds=0.0)  # everything leaves at the first exit
        for prompt in prompts:
            made = decoder.generate(prompt, max_new_tokens=NEW, mode="approximate").finish()
            plain = approximate(reference.model, prompt, NEW, 0.0)
            check(
                made.tokens[0], prompt, lambda _, plain=plain: (plain[0], plain[2]), HALF_ROUNDING
            )  # type: ignore[misc]
        assert decoder._session is not None
        rows = [part.states.rows(s.name) for part in decoder._session.parts
                for s in token_states(part.component)]  # fmt: skip
        assert {row.dtype for row in rows} == {np.dtype(np.float16)}


def max_prob(logits: np.ndarray) -> float:
    return float(1 / np.exp(logits - logits.max()).sum())


def middling(reference: Reference) -> float:
    """A threshold on max_prob that about half of the tokens reach at the first exit."""
    scores = [max_prob(z) for p in random_prompts(8, [12], seed=9) for z in reference.logits(p, 1)]
    return float(np.median(scores))


@pytest.mark.parametrize("batch", [1, 3])
def test_fast_decoding_leaves_where_the_score_says_and_keeps_caches_exact(
    decoder: Model, reference: Reference, batch: int
) -> None:
    """Token for token: the exit's own answer where its score, in float64, reaches the threshold."""
    prompts = random_prompts(batch, [6, 3, 11])
    threshold = middling(reference)
    decoder.policy = Rule(thresholds=threshold)
    made = decoder.generate(prompts, max_new_tokens=NEW, mode="fast", audit=True).finish()
    exits: dict[str, int] = {}
    audited = agreed = 0
    for tokens, prompt in zip(made.tokens, prompts, strict=True):
        text = list(prompt)
        for place, token in enumerate(tokens):
            for layer in [*EXITS, 4]:
                logits = reference.logits(text, layer)[-1]
                score = max_prob(logits)
                assert layer == 4 or abs(score - threshold) > 1e-5, "choose another threshold"
                if layer == 4 or score >= threshold:
                    break
            ordered = np.sort(logits)
            if token != int(logits.argmax()):
                assert ordered[-1] - ordered[-2] < ROUNDING, f"token {place}"
            exits[f"exit_{layer}"] = exits.get(f"exit_{layer}", 0) + 1
            if layer != 4:
                audited += 1
                agreed += token == int(reference.logits(text)[-1].argmax())
            text.append(token)
    assert len(exits) > 1, "the threshold should let some tokens leave and others not"
    assert made.statistics.exits == exits
    assert made.statistics.audited == audited
    assert abs(made.statistics.agreed - agreed) <= 1


@pytest.mark.parametrize("batch", [1, 3])
def test_approximate_decoding_projects_the_state_that_a_token_left_with(
    decoder: Model, reference: Reference, batch: int
) -> None:
    prompts = random_prompts(batch, [6, 3, 11])
    threshold = middling(reference)
    decoder.policy = Rule(thresholds=threshold)
    made = decoder.generate(prompts, max_new_tokens=NEW, mode="approximate").finish()
    exits: dict[str, int] = {}
    for tokens, prompt in zip(made.tokens, prompts, strict=True):
        wanted, layers, margins = approximate(reference.model, prompt, NEW, threshold)
        for place, (found, right) in enumerate(zip(tokens, wanted, strict=False)):
            if found != right:
                assert margins[place] < ROUNDING, f"token {place}: {found} for {right}"
        for layer in layers[: len(tokens)]:
            exits[f"exit_{layer}"] = exits.get(f"exit_{layer}", 0) + 1
    assert len(exits) > 1, "the threshold should let some tokens leave and others not"
    assert made.statistics.exits == exits


def test_approximate_decoding_without_exits_gives_the_reference_tokens(
    decoder: Model, expected: Expected
) -> None:
    prompts = random_prompts(3, [6, 3, 11])
    decoder.policy = Rule()
    made = decoder.generate(prompts, max_new_tokens=NEW, mode="approximate").finish()
    for tokens, prompt in zip(made.tokens, prompts, strict=True):
        check(tokens, prompt, expected)


def test_caches_after_catching_up_are_those_of_full_decoding(
    decoder: Model, reference: Reference
) -> None:
    [prompt] = random_prompts(1, [9])
    decoder.policy = Rule(thresholds=middling(reference))
    made = decoder.generate(prompt, max_new_tokens=NEW, mode="fast", audit=True).finish()
    session = decoder._session
    assert session is not None
    text = [*prompt, *made.tokens[0]]
    kept = [
        {s.name: part.states.rows(s.name).copy() for s in token_states(part.component)}
        for part in session.parts
    ]
    lengths = [part.states.lengths[0] for part in session.parts]
    assert lengths == [len(text) - 1] * len(session.parts)
    decoder.generate(text[:-1], max_new_tokens=1).finish()
    for part, before in zip(session.parts, kept, strict=True):
        for cache in token_states(part.component):
            now = part.states.rows(cache.name)
            np.testing.assert_allclose(
                now[:, :, : len(text) - 1], before[cache.name][:, :, : len(text) - 1], atol=2e-4
            )


def test_a_prompt_longer_than_a_chunk_is_taken_in_pieces(
    decoder: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeexit.runtime.programs.text_program.CHUNK", 8)
    prompts = random_prompts(2, [29, 8])
    for mode in ("full", "exact", "fast"):
        decoder._session = None
        decoder.policy = Rule()
        made = decoder.generate(prompts, max_new_tokens=NEW, mode=mode).finish()  # type: ignore[arg-type]
        for tokens, prompt in zip(made.tokens, prompts, strict=True):
            check(tokens, prompt, expected)
    decoder._session = None


@pytest.mark.parametrize("form", FORMS)
def test_texts_may_fill_the_capacity_to_the_last_place(
    decoder_bundle: Bundles, family: str, reference: Reference, form: Form
) -> None:
    prompts = random_prompts(2, [12, 4])
    with load(decoder_bundle(family), capacity=32, states=form) as decoder:
        decoder.policy = Rule(thresholds=middling(reference))
        for mode in ("full", "exact", "fast"):
            made = decoder.generate(prompts, max_new_tokens=NEW, mode=mode).finish()  # type: ignore[arg-type]
            assert all(len(tokens) == NEW or 0 not in tokens for tokens in made.tokens)
        with pytest.raises(InputError, match=r"12 tokens and 21 new tokens .* capacity of 32"):
            decoder.generate(prompts, max_new_tokens=NEW + 1)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_capacity_has_no_room_for_is_refused_before_anything_is_written(
    decoder_bundle: Bundles, form: Form
) -> None:
    [fits, fills, over] = random_prompts(3, [11, 12, 13])
    with load(decoder_bundle("llama"), capacity=12, states=form) as decoder:
        assert len(decoder.generate(fits).finish().tokens[0]) <= 1
        session = decoder.session(1)
        before = {
            s.name: part.states.rows(s.name).copy()
            for part in session.parts
            for s in token_states(part.component)
        }
        for prompt in (fills, over):
            for prompts in (prompt, [fits, prompt]):
                with pytest.raises(InputError, match="capacity of 12.*larger capacity"):
                    decoder.generate(prompts)
        session.run(0, Block(10, [10]))
        with pytest.raises(InputError, match="segment_0: .* 10 tokens and 3 more .* 12"):
            session.run(0, Block(3, [3]))
        assert session.parts[0].states.lengths == [10]
        session.run(0, Block(2, [2]))
        for part in session.parts[1:]:
            for cache in token_states(part.component):
                np.testing.assert_array_equal(part.states.rows(cache.name), before[cache.name])


def test_caches_that_memory_has_no_room_for_are_refused() -> None:
    axes: list[str | int | None] = ["batch", 2, "past", 16]
    state = TokenState(name="k", dtype="float16", axes=axes, past="i", present="o")
    with pytest.raises(EngineError, match=r"k: .* caches of 3 rows .* smaller capacity"):
        TokenStates([state], 3, 2**50, OnnxRuntimeEngine())


def test_an_unavailable_form_is_refused(decoder_bundle: Bundles) -> None:
    bundle = decoder_bundle("llama")
    with pytest.raises(
        UsageError, match=r"no states of the form 'paged' .*in-place, fixed, append"
    ):
        load(bundle, states="paged")  # type: ignore[arg-type]
    engine = OnnxRuntimeEngine()
    engine.features = frozenset({"opset-24"})  # as of an engine that copies what it updates
    segment = bundle.manifest.components["segment_0"]
    assert choose_variant("segment_0", segment, engine).states == "append"
    with pytest.raises(EngineError, match=r"segment_0 has no form .*cache-update"):
        choose_variant("segment_0", segment, engine, "fixed")


@pytest.mark.parametrize(
    "name, version, known",
    [
        ("cpu", "1.31.1", True),
        ("cpu", "1.25.0", True),
        ("cpu", "1.24.4", False),
        ("cpu", "1.23.2", False),
        ("cuda", "1.31.1", False),
    ],
)
def test_the_fixed_form_is_for_versions_that_have_its_operators(
    name: str, version: str, known: bool
) -> None:
    found = features_of(name, version)
    assert "onnxruntime-operators" in found
    assert ("float32-attention" in found) is (name == "cpu")
    assert ("cache-update" in found) is ("opset-24" in found) is known


@pytest.fixture(scope="module")
def llama(decoder_bundle: Bundles) -> Iterator[Model]:
    with load(decoder_bundle("llama")) as loaded:
        yield loaded


@pytest.mark.parametrize("form", FORMS)
def test_unsplit_gives_the_same_tokens(decoder_bundle: Bundles, llama: Model, form: Form) -> None:
    [prompt] = random_prompts(1, [9])
    chained = llama.generate(prompt, max_new_tokens=NEW).finish()
    with load(decoder_bundle("llama"), unsplit=True, states=form) as whole:
        assert whole.generate(prompt, max_new_tokens=NEW).finish().tokens == chained.tokens
        with pytest.raises(UsageError, match="no exits"):
            whole.generate(prompt, mode="exact")


def test_unsplit_refuses_prompts_of_unlike_length_before_any_work(decoder_bundle: Bundles) -> None:
    with load(decoder_bundle("llama"), unsplit=True) as whole:
        with pytest.raises(UsageError, match=r"one length, these have from 4 to 9 tokens"):
            whole.generate(random_prompts(3, [9, 4, 9]), max_new_tokens=2)
        assert whole._session is None
        alike = random_prompts(2, [9])
        made = whole.generate(alike, max_new_tokens=2).finish()
        apart = [whole.generate(one, max_new_tokens=2).finish().tokens[0] for one in alike]
        assert made.tokens == apart


def test_pieces_come_as_they_are_made_and_say_what_the_result_says(llama: Model) -> None:
    seen: list[Piece] = []
    [prompt] = random_prompts(1, [9])
    made = llama.generate(prompt, max_new_tokens=NEW, on_piece=seen.append)
    pieces = list(made)
    assert pieces == seen
    assert [t for piece in pieces for t in piece.tokens] == made.tokens[0]
    assert "".join(piece.text for piece in pieces) == made.texts[0]
    assert made.tokens_per_s is not None and made.first_token_s > 0


def test_text_goes_in_and_comes_out(llama: Model) -> None:
    made = llama.generate("def f(x):", max_new_tokens=8).finish()
    assert made.tokens[0] and isinstance(made.texts[0], str)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompt"),
        ("", "a prompt is empty"),
        ([[]], "a prompt is empty"),
        ([5, 300], "300 is outside the vocabulary"),
        ([-1], "-1 is outside"),
        ([[0.5]], "not a list of token ids"),
        ([[[5, 6], [7]]], "not a list of token ids"),
        (5, "the prompts are a int"),
        (None, "the prompts are a NoneType"),
        (list(range(1, 95)), "capacity of 96"),
        ("a\ud800", r"cannot encode the text 'a\\ud800'"),
    ],
)
def test_invalid_prompts_are_refused(llama: Model, prompts: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        llama.generate(prompts, max_new_tokens=8)  # type: ignore[arg-type]


def test_invalid_options_are_refused(llama: Model, decoder_bundle: Bundles) -> None:
    for wrong in (
        {"mode": "quick"},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"mode": "exact", "drafts": 2.5},
        {"mode": "exact", "drafts": 0},
        {"mode": "exact", "drafts": -5},
        {"mode": "exact", "drafts": True},
        {"mode": "exact", "draft_threshold": -1.0},
        {"mode": "exact", "draft_exit": "nope"},
        {"mode": "exact", "audit": True},
        {"mode": "fast", "drafts": 3},
        {"draft_exit": "exit_1"},
        {"draft_threshold": float("nan")},
        {"sampling": {"temperature": 0.8}},
        {"stop": 5},
        {"stop": ["end", 5]},
        {"stop": ""},
    ):
        with pytest.raises(UsageError):
            llama.generate([5], **wrong)  # type: ignore[arg-type]
    with pytest.raises(EdgeExitError, match="exit_9"):
        llama.generate([5], mode="exact", draft_exit="exit_9").finish()
    for capacity in (1000, 1, 0, -5, 12.5, "12"):
        with pytest.raises(UsageError, match=rf"capacity {capacity} .* \(2 to 96\)"):
            load(decoder_bundle("llama"), capacity=capacity)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="writes text"):
        llama({"tokens": np.array([[5, 6]])})


def test_a_score_that_the_head_does_not_have_spoils_no_later_text(llama: Model) -> None:
    [prompt] = random_prompts(1, [5])
    expected = llama.generate(prompt, max_new_tokens=NEW).finish().tokens
    known = llama.policy
    with pytest.raises(PolicyError, match="unheard-of"):
        llama.policy = Rule(score="unheard-of", thresholds=0.5)
    with pytest.raises(PolicyError, match="patience"):
        llama.policy = Rule(patience=1)
    assert llama.policy == known
    with pytest.raises(PolicyError, match="unheard-of"):
        llama.session(1).head(0, ["unheard-of"])
    assert llama.generate(prompt, max_new_tokens=NEW).finish().tokens == expected


def test_a_forward_bundle_is_no_decoder(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model, pytest.raises(UsageError, match="does not write text"):
        model.generate([5])
    with pytest.raises(UsageError, match="does not write text"):
        load(toy_bundle, capacity=12)


def test_one_text_at_a_time(llama: Model) -> None:
    first = llama.generate([5, 6], max_new_tokens=4)
    next(iter(first))
    with pytest.raises(StateError, match="another text"):
        llama.generate([5, 6], max_new_tokens=4).finish()
    first.close()
    llama.generate([5, 6], max_new_tokens=4).finish()


@pytest.mark.parametrize("mode", ["full", "exact", "fast", "approximate"])
def test_a_text_left_in_the_middle_changes_nothing_for_the_next(
    llama: Model, mode: ModeName
) -> None:
    llama.policy = Rule(thresholds=0.02)
    [prompt, other] = random_prompts(2, [9, 14])
    before = llama.generate(prompt, max_new_tokens=12, mode=mode).finish().tokens
    for done, _ in enumerate(llama.generate(other, max_new_tokens=12, mode=mode), start=1):
        if done == 3:
            break
    assert llama.generate(prompt, max_new_tokens=12, mode=mode).finish().tokens == before


def test_without_text_only_tokens_come(llama: Model) -> None:
    silent = llama.generate("def f(x):", max_new_tokens=6, text=False).finish()
    spoken = llama.generate("def f(x):", max_new_tokens=6).finish()
    assert silent.tokens == spoken.tokens and silent.texts == [""] and spoken.texts != [""]


def test_a_callback_that_raises_leaves_the_model_usable(llama: Model, expected: Expected) -> None:
    def fail(piece: Piece) -> None:
        raise RuntimeError("mine")

    [prompt] = random_prompts(1, [9])
    before = llama.generate(prompt, max_new_tokens=6).finish().tokens
    failed = llama.generate(prompt, max_new_tokens=6, on_piece=fail)
    with pytest.raises(RuntimeError, match="mine"):
        failed.finish()
    with pytest.raises(StateError, match="ended with an error"):
        failed.finish()
    assert llama.generate(prompt, max_new_tokens=6).finish().tokens == before


def test_a_closed_decoder_says_so(decoder_bundle: Bundles) -> None:
    decoder = load(decoder_bundle("llama"))
    decoder.close()
    with pytest.raises(StateError, match="closed"):
        decoder.generate([5])


def test_a_decoder_closed_while_it_writes_ends_the_text(decoder_bundle: Bundles) -> None:
    decoder = load(decoder_bundle("llama"))
    writing = decoder.generate([5], max_new_tokens=6)
    next(writing)
    decoder.close()
    with pytest.raises(StateError, match="closed"):
        next(writing)


def tokens_of(decoder: Model, text: str) -> list[int]:
    return decoder.encode(text)


def test_characters_that_span_tokens_are_held_until_they_are_whole(llama: Model) -> None:
    ids = tokens_of(llama, "aé🙂b")
    assert len(ids) == 1 + 2 + 4 + 1  # one token per byte
    stream = Stream(llama._tokenizers())
    assert [stream.add(token) for token in ids] == ["a", "", "é", "", "", "", "🙂", "b"]


def test_bytes_that_are_no_text_come_out_broken_but_come_out(llama: Model) -> None:
    broken = tokens_of(llama, "🙂")[1:3]
    stream = Stream(llama._tokenizers())
    text = "".join(stream.add(token) for token in [*broken, *tokens_of(llama, "ab")])
    assert (text + stream.end()).endswith("ab")
    assert "\ufffd" in stream.text


def test_a_stop_string_across_tokens_ends_the_text_before_it(llama: Model) -> None:
    stream = Stream(llama._tokenizers(), ["END", "xy"])
    given = [stream.add(token) for token in tokens_of(llama, "aEbENDc")]
    assert given == ["a", "", "Eb", "", "", "", ""]
    assert stream.stopped and stream.text == "aEb" and stream.end() == ""


def test_text_held_for_a_stop_string_comes_at_the_end(llama: Model) -> None:
    stream = Stream(llama._tokenizers(), ["END"])
    assert [stream.add(token) for token in tokens_of(llama, "aEN")] == ["a", "", ""]
    assert stream.end() == "EN"


def test_stop_strings_end_a_generation(llama: Model) -> None:
    [prompt] = random_prompts(1, [9], seed=4)
    free = llama.generate(prompt, max_new_tokens=NEW).finish()
    stop = free.texts[0][4:7]
    made = llama.generate(prompt, max_new_tokens=NEW, stop=stop).finish()
    assert made.texts[0] == free.texts[0][: free.texts[0].index(stop)]
