"""Every mode of every program against float64: prefixes of embeddings, dropped tokens, components
without states, prompt states, encoders; in all combinations that the hand-written toy has."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, PolicyError
from edgeexit.runtime import Model, Policy, Rule, Schedule, load
from edgeexit.runtime.executor.components import token_states
from edgeexit.runtime.programs.every_exit import NEXT_LOG_PROB
from tests.decoder_reference import Reference, Row, Written
from tests.decoder_toys import (
    DecoderToy,
    batch_inputs,
    make_decoder_toy,
    make_rows,
    toy_policy,
    write_decoder_toy,
)

NEW = 9
ROUNDING = 2e-4
"""Two numbers closer than that may change places between float32 and float64."""
LENGTHS = [9, 4, 12]

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "adapter": {"adapter": 1},
    "two layers a component": {"layers": (2, 1, 1)},
    "stateless": {"stateless": True},
    "gate": {"gate": True},
    "gate behind the first": {"gate": True, "gate_behind": 0},
    "gate and adapter": {"gate": True, "gate_behind": 0, "adapter": 1},
    "prefix": {"prefix": True},
    "prefix, gate and stateless": {"prefix": True, "gate": True, "stateless": True},
    "gate before the mean": {"gate": True, "gate_behind": 0, "stateless": True},
    "encoder": {"encoder": True},
    "own mean": {"stateless": True, "own_mean": True, "layers": (1, 3), "exits": (0,)},
    "own mean, gate": {"stateless": True, "own_mean": True, "gate": True, "prefix": True},
    "own mean, adapter": {"stateless": True, "own_mean": True, "adapter": 1, "layers": (2, 1, 1)},
    "encoder, own mean": {"encoder": True, "stateless": True, "own_mean": True},
    "encoder, adapter that reads": {"encoder": True, "adapter": 1, "adapter_reads": True},
    "encoder, reading adapter of the first": {"encoder": True, "adapter": 0, "adapter_reads": True},
    "encoder, stateless, adapter": {"encoder": True, "stateless": True, "adapter": 0},
    "saturation": {"saturated": True, "layers": (1, 2, 1)},
    "saturation, gate and adapter": {
        "saturated": True,
        "gate": True,
        "gate_behind": 0,
        "adapter": 1,
        "prefix": True,
    },
    "saturation, encoder": {"saturated": True, "encoder": True, "stateless": True},
}
Toys = Callable[[str], tuple[DecoderToy, Bundle]]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    @functools.cache
    def make(kind: str) -> tuple[DecoderToy, Bundle]:
        toy = make_decoder_toy(**OPTIONS[kind])
        return toy, write_decoder_toy(toy, tmp_path_factory.mktemp("toy") / "bundle")

    return make


def between(scores: Sequence[float] | np.ndarray) -> float:
    """A threshold that about half of the scores reach, and none of them meets."""
    ordered = np.sort(np.asarray(scores, np.float64))
    ordered = ordered[np.isfinite(ordered)]
    half = max(len(ordered) // 2, 1)
    return float(ordered[half - 1 : half + 1].mean())


def thresholds(toy: DecoderToy, rows: Sequence[Row]) -> dict[str, float]:
    """At every exit one that some reach and others do not."""
    plain = Reference(toy)
    found = {}
    for name in [*toy.stops][:-1]:
        found[name] = between(np.concatenate([plain.trace(r)[name][toy.score] for r in rows]))
    if toy.gate:
        said = [plain.run(row).gate for row in rows]
        found["gate"] = between([score for score in said if score is not None])
    if toy.prefix:
        sure = [plain.vision(row)[0]["confidence"] for row in rows if row.pixels is not None]
        found["vision_1"] = between(np.concatenate(sure))
    if toy.encoder:
        for number in range(2):
            sure = [plain.encoder(row)[number]["saturation"] for row in rows]
            found[f"encoder_{number + 1}"] = between(np.array(sure))
    return found


def compare(made: list[int], expected: Written) -> bool:
    """Whether texts are equal; where a decision was too close, they need not be."""
    if made != expected.tokens:
        assert expected.closest < ROUNDING, f"{made} for {expected.tokens}"
        return False
    return True


def generate(model: Model, rows: Sequence[Row], **options: object) -> list[list[int]]:
    inputs = batch_inputs(rows)
    prompts = [row.prompt for row in rows]
    made = model.generate(prompts, inputs=inputs or None, max_new_tokens=NEW, **options)  # type: ignore[arg-type]
    return made.finish().tokens


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_full_and_exact_write_the_reference_texts(toys: Toys, kind: str, batch: int) -> None:
    toy, bundle = toys(kind)
    with load(bundle) as model:
        sure = 0
        for seed in range(3):
            rows = make_rows(toy, LENGTHS[:batch], seed=seed)
            for limits in ({}, thresholds(toy, make_rows(toy, LENGTHS, seed=seed))):
                model.policy = toy_policy(toy, limits)
                reference = Reference(toy, limits)
                expected = [reference.full(row, NEW) for row in rows]
                for made, row in zip(generate(model, rows), expected, strict=True):
                    sure += compare(made, row)
                for draft_exit, drafts in itertools.product([*toy.stops][:-1], (1, 3, None)):
                    texts = generate(
                        model, rows, mode="exact", draft_exit=draft_exit, drafts=drafts
                    )
                    for made, row in zip(texts, expected, strict=True):
                        compare(made, row)
        assert sure


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("mode", ["fast", "approximate"])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_leave_where_the_reference_says(
    toys: Toys, kind: str, mode: str, batch: int
) -> None:
    toy, bundle = toys(kind)
    if mode == "approximate" and toy.adapter is not None:
        pytest.skip("an adapter would miss the tokens that left")
    with load(bundle) as model:
        sure, exits = 0, set()
        for seed in range(4):
            limits = thresholds(toy, make_rows(toy, LENGTHS, seed=seed))
            rows = make_rows(toy, LENGTHS[:batch], seed=seed)
            model.policy = toy_policy(toy, limits)
            reference = Reference(toy, limits)
            expected = [getattr(reference, mode)(row, NEW) for row in rows]
            for made, row in zip(generate(model, rows, mode=mode), expected, strict=True):
                if compare(made, row):
                    sure += 1
                    exits |= set(row.exits)
        assert sure and len(exits) > 1


@pytest.mark.parametrize("kind", OPTIONS)
def test_states_after_catching_up_are_those_of_the_reference(toys: Toys, kind: str) -> None:
    """In every component: as many tokens as reached it, in their order, and nothing else."""
    toy, bundle = toys(kind)
    with load(bundle) as model:
        rows = make_rows(toy, LENGTHS, seed=5)
        limits = thresholds(toy, rows)
        model.policy = toy_policy(toy, limits)
        made = generate(model, rows, mode="fast", audit=True)
        session = model._session
        assert session is not None
        for number, (row, tokens) in enumerate(zip(rows, made, strict=True)):
            text = [*row.prompt, *tokens][:-1]
            kept = Reference(toy, limits).run(row, text).kept
            for part in session.stateful:
                for state in token_states(part.component):
                    expected = kept[state.name]
                    length = part.states.lengths[number]
                    assert length == len(expected), state.name
                    found = np.asarray(part.states.rows(state.name))[number, 0, :length]
                    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_trace_says_what_every_exit_says_of_every_token(toys: Toys, kind: str) -> None:
    toy, bundle = toys(kind)
    rows = make_rows(toy, [11, 11], seed=3)
    reference = Reference(toy)
    with load(bundle) as model:
        inputs = {"tokens": np.array([row.prompt for row in rows]), **batch_inputs(rows)}
        for step in (None, 1, 4):
            if step and model.session(2).gates.whole_prompts:
                continue
            trace = model.trace(inputs, step=step)
            for name, outputs, scores in zip(trace.exits, trace.outputs, trace.scores, strict=True):
                said = [reference.trace(row)[name] for row in rows]
                np.testing.assert_array_equal(outputs["token"], [one["token"] for one in said])
                following = inputs["tokens"][:, 1:, None]
                logits = np.array([one["logits"][:-1] for one in said])
                expected = np.take_along_axis(logits, following, 2)[..., 0]
                expected -= np.log(np.exp(logits).sum(-1))
                found = outputs[NEXT_LOG_PROB]
                np.testing.assert_allclose(found[:, :-1], expected, atol=1e-4)
                assert np.isnan(found[:, -1]).all()
                for score, values in scores.items():
                    expected = [one[score] for one in said]
                    np.testing.assert_allclose(values, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "encoder", "prefix"])
def test_unsplit_writes_the_texts_of_full(toys: Toys, kind: str) -> None:
    toy, bundle = toys(kind)
    rows = make_rows(toy, [9, 9], seed=2)
    with load(bundle) as model, load(bundle, unsplit=True) as whole:
        assert generate(model, rows) == generate(whole, rows)


def test_rows_that_disagree_at_the_gate_keep_their_own_tokens(toys: Toys) -> None:
    toy, bundle = toys("gate")
    for seed in range(20):
        rows = make_rows(toy, LENGTHS, seed=seed)
        limits = thresholds(toy, rows)
        dropped = [Reference(toy, limits).run(row).dropped for row in rows]
        if any(dropped) and not all(dropped):
            break
    with load(bundle, policy=toy_policy(toy, {"gate": limits["gate"]})) as model:
        generate(model, rows)
        session = model._session
        assert session is not None
        assert session.gates.dropped == {"gate": dropped}
        images = [sum(token == 1 for token in row.prompt) for row in rows]
        for number, part in enumerate(session.parts):
            behind = number > toy.gate_behind
            expected = [
                n if left and behind else 0 for n, left in zip(images, dropped, strict=True)
            ]
            assert part.states.gaps == expected


def test_placeholders_and_rows_that_come_for_them_must_be_as_many(toys: Toys) -> None:
    toy, bundle = toys("prefix")
    [row] = make_rows(toy, [12])
    assert row.pixels is not None and len(row.pixels) == 2
    with load(bundle) as model:
        for pixels, message in (
            (row.pixels[:1], "more than the 2 rows"),
            (None, "no inputs are given"),
        ):
            given = None if pixels is None else {"pixel_values": pixels}
            with pytest.raises(InputError, match=message):
                model.generate([row.prompt], inputs=given, max_new_tokens=2).finish()
        more = np.concatenate([row.pixels, row.pixels])
        with pytest.raises(InputError, match="fewer than the 8 rows"):
            model.generate([row.prompt], inputs={"pixel_values": more}, max_new_tokens=2).finish()
        text = [token for token in row.prompt if token != 1]
        assert len(model.generate([text], max_new_tokens=2).finish().tokens[0]) == 2


def test_a_prompt_that_ends_with_tokens_that_leave_is_refused(toys: Toys) -> None:
    toy, bundle = toys("gate")
    always = toy_policy(toy, {"gate": -np.inf})
    with load(bundle, policy=always) as model:
        with pytest.raises(
            InputError, match="cannot drop the group .* ends with tokens of that group"
        ):
            model.generate([[5, 6, 1]], max_new_tokens=2).finish()
        assert len(model.generate([[5, 1, 6]], max_new_tokens=2).finish().tokens[0]) == 2


@pytest.mark.parametrize("mode", ["fast", "approximate"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "saturation"])
def test_a_schedule_moves_thresholds_from_token_to_token(
    toys: Toys, kind: str, batch: int, mode: str
) -> None:
    toy, bundle = toys(kind)
    schedule = Schedule(length=12, temperature=2, warm_up=0.25)
    with load(bundle) as model:
        sure, early = 0, 0
        for seed in range(4):
            rows = make_rows(toy, LENGTHS[:batch], seed=seed)
            limits = thresholds(toy, rows)
            rule = Rule(thresholds=limits, score=toy.score, schedule=schedule)
            model.policy = Policy(rules={"decoder": rule})
            reference = Reference(toy, limits, schedule=schedule)
            expected = [getattr(reference, mode)(row, NEW) for row in rows]
            for made, row in zip(generate(model, rows, mode=mode), expected, strict=True):
                sure += compare(made, row)
                assert row.exits[:3] == [[*toy.stops][-1]] * 3
                early += len(set(row.exits)) > 1
        assert sure and early


def test_a_schedule_is_for_chains_that_write(toys: Toys) -> None:
    _, bundle = toys("encoder")
    rules = {"encoder": Rule(schedule=Schedule(length=9)), "decoder": Rule()}
    with pytest.raises(PolicyError, match="chain encoder has a schedule over the tokens"):
        load(bundle, policy=Policy(rules=rules))


def test_a_threshold_that_equals_the_score_leaves_alone_and_in_batches(tmp_path: Path) -> None:
    toy = make_decoder_toy()
    bundle = write_decoder_toy(toy, tmp_path / "bundle")
    rows = make_rows(toy, [9, 9, 9])
    with load(bundle, all_scores=True) as model:
        inputs = {"tokens": np.array([row.prompt for row in rows])}
        scores = model.trace(inputs).scores[0]["max_prob"][:, -1]
        for row in range(3):
            own = float(scores[row])
            for threshold, leaves in (
                (own, True),
                (float(np.nextafter(np.float32(own), np.float32(2))), False),
            ):
                model.policy = toy_policy(toy, {"exit_1": threshold})
                for batch in (rows[row : row + 1], rows):
                    prompts = [one.prompt for one in batch]
                    made = model.generate(prompts, max_new_tokens=1, mode="fast").finish()
                    at_first = made.statistics.exits.get("exit_1", 0)
                    expected = sum(
                        float(scores[n]) >= threshold
                        for n in ([row] if len(batch) == 1 else range(3))
                    )
                    assert at_first == expected
                    assert len(batch) == 3 or bool(at_first) is leaves


def test_fast_warns_where_nothing_may_leave(toys: Toys, caplog: pytest.LogCaptureFixture) -> None:
    toy, bundle = toys("gate")
    rows = make_rows(toy, LENGTHS[:1], seed=0)
    with load(bundle) as model:
        model.policy = toy_policy(toy, {"gate": 0.0})
        generate(model, rows, mode="fast")
        assert not caplog.messages
        model.policy = toy_policy(toy, {})
        generate(model, rows, mode="fast")
    assert "every token runs through all layers" in caplog.text
