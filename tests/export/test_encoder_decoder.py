"""Encoder-decoders with exits in both, held against transformers' own generation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from edgeexit.bundle.manifest import StateForm
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, PolicyError, UsageError
from edgeexit.export import export
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.families.t5 import CAPACITY
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.runtime import Model, Policy, Rule, load
from edgeexit.runtime.programs.generate import ModeName
from tests.encoder_decoders import (
    FAMILIES,
    LAYERS,
    layers_of,
    save_checkpoint,
    shortened,
    trained_bart,
)

KINDS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    **{name: FAMILIES[name] for name in ("bart", "t5", "t5-1.1")},
    "trained": trained_bart,
}
TIMELY = [
    "bart",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("t5", "trained")),
    "t5-1.1",
]
"""These kinds; those that are much like another one take part in the slow tests only."""
BART, T5 = "bart", "t5-1.1"
"""Families that are exported in lower precision, too."""
ONE, SEVERAL = ["abcj"], ["abc", "jihgfed", "c"]
NEW = 12
ALWAYS, NEVER = float("-inf"), float("inf")


def references(
    split: ExitEncoderDecoder, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The logits, states and scores that the model gives as its reference."""
    return {name: value for part in split._reference(inputs) for name, value in part.items()}


@pytest.fixture(scope="module", params=TIMELY)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(KINDS[kind](), tmp_path_factory.mktemp(kind) / "checkpoint")


@pytest.fixture(scope="module")
def split(folder: Path) -> ExitEncoderDecoder:
    split = from_pretrained(folder, exits=[1, 2], encoder_exits=[1, 2])
    assert isinstance(split, ExitEncoderDecoder)
    return split


@pytest.fixture(scope="module")
def bundle(split: ExitEncoderDecoder, folder: Path) -> Bundle:
    return export(split.split_model(), folder.parent / "bundle")


@pytest.fixture
def model(bundle: Bundle) -> Iterator[Model]:
    with load(bundle) as model:
        yield model


def read(folder: Path) -> transformers.PreTrainedModel:
    """What transformers makes of a checkpoint."""
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def expected(
    folder: Path, texts: Sequence[str], *, encoder: int = LAYERS, decoder: int = LAYERS
) -> list[list[int]]:
    """What transformers writes greedily with so many layers of each, ends left out."""
    model = shortened(read(folder), encoder=encoder, decoder=decoder)
    made = transformers.AutoTokenizer.from_pretrained(folder)(
        list(texts), return_tensors="pt", padding=True
    )
    found = model.generate(
        input_ids=made.input_ids,
        attention_mask=made.attention_mask,
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=1,
    )
    end = model.config.eos_token_id
    rows = [row[1:] for row in found.tolist()]
    return [row[: row.index(end)] if end in row else row for row in rows]


def policy(encoder: float | dict[str, float] = NEVER, decoder: float = NEVER) -> Policy:
    rules = {
        "encoder": Rule(score="saturation", thresholds=encoder),
        "main": Rule(thresholds=decoder),
    }
    return Policy(rules=rules)


@pytest.mark.parametrize("texts", [ONE, SEVERAL])
@pytest.mark.parametrize("mode", ["full", "exact", "fast", "approximate"])
def test_every_mode_writes_what_transformers_writes_where_no_exit_is_taken(
    model: Model, folder: Path, texts: list[str], mode: ModeName
) -> None:
    model.policy = policy()
    found = model.generate(texts, max_new_tokens=NEW, mode=mode).finish()
    assert found.tokens == expected(folder, texts)


@pytest.mark.slow
def test_the_trained_one_has_learnt_its_task(tmp_path: Path) -> None:
    folder = save_checkpoint(trained_bart(), tmp_path / "checkpoint")
    letters = [[4, 5, 6], [13, 12, 11, 10, 9, 8, 7], [6]]
    assert expected(folder, SEVERAL) == [row[::-1] for row in letters]


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("mode", ["full", "exact"])
def test_an_exit_of_the_encoder_hands_its_state_on(
    model: Model, folder: Path, layer: int, mode: ModeName
) -> None:
    model.policy = policy({f"encoder_exit_{layer}": ALWAYS})
    for texts in (ONE, SEVERAL):
        found = model.generate(texts, max_new_tokens=NEW, mode=mode).finish()
        assert found.tokens == expected(folder, texts, encoder=layer)
        assert found.statistics.earlier == {"encoder": [f"encoder_exit_{layer}"] * len(texts)}


def test_rows_leave_the_encoder_where_their_own_score_says(
    model: Model, folder: Path, split: ExitEncoderDecoder
) -> None:
    scores = saturations(folder, SEVERAL)[:, 0]
    threshold = float(np.sort(scores)[1:].mean())  # one of the three is above
    model.policy = policy({"encoder_exit_1": threshold})
    found = model.generate(SEVERAL, max_new_tokens=NEW).finish()
    for row, (text, score) in enumerate(zip(SEVERAL, scores, strict=True)):
        layers = 1 if score >= threshold else LAYERS
        assert found.statistics.earlier["encoder"][row] == f"encoder_exit_{layers}"
        assert found.tokens[row] == expected(folder, [text], encoder=layers)[0]


@pytest.mark.parametrize("layer", [1, 2])
def test_leaving_at_an_exit_of_the_decoder_is_the_decoder_cut_there(
    model: Model, folder: Path, layer: int
) -> None:
    rules = {
        "encoder": Rule(score="saturation"),
        "main": Rule(thresholds={f"exit_{layer}": ALWAYS}),
    }
    model.policy = Policy(rules=rules)
    found = model.generate(SEVERAL, max_new_tokens=NEW, mode="fast").finish()
    assert found.tokens == expected(folder, SEVERAL, decoder=layer)


def saturations(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Cosines ``[rows, layers]`` of consecutive states of transformers' encoder, one row at a time,
    in float64."""
    encoder = read(folder).double().get_encoder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    states: list[torch.Tensor] = []
    first, *_ = layers_of(encoder)
    first.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    for layer in layers_of(encoder):  # what the last one gives: `hidden_states` has it normed
        layer.register_forward_hook(
            lambda _, given, made: states.append(made[0] if isinstance(made, tuple) else made)
        )
    found = []
    with torch.no_grad():
        for text in texts:
            states.clear()
            encoder(tokenizer(text, return_tensors="pt").input_ids)
            flat = [state.flatten().numpy() for state in states]
            pairs = itertools.pairwise(flat)
            found.append([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs])
    return np.array(found)


def test_saturation_is_the_cosine_of_consecutive_states_without_padding(
    model: Model, folder: Path, split: ExitEncoderDecoder
) -> None:
    made = transformers.AutoTokenizer.from_pretrained(folder)(
        SEVERAL, return_tensors="np", padding=True
    )
    inputs = {name: made[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    inputs["tokens"] = np.full((len(SEVERAL), 1), start_of(model), np.int64)
    trace = model.trace(inputs, chain="encoder")
    found = np.stack([scores["saturation"] for scores in trace.scores], axis=1)
    np.testing.assert_allclose(found, saturations(folder, SEVERAL), atol=1e-5)


def test_torch_and_transformers_agree_on_every_exit(
    split: ExitEncoderDecoder, folder: Path
) -> None:
    inputs = split.split_model().example(3)
    with torch.no_grad():
        found = references(split, inputs)
        for layer in range(1, LAYERS + 1):
            logits = shortened(read(folder), decoder=layer)(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=inputs["tokens"],
            ).logits
            torch.testing.assert_close(found[f"exit_{layer}"], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [1, 2])
def test_torch_and_transformers_agree_behind_every_exit_of_the_encoder(
    split: ExitEncoderDecoder, folder: Path, layer: int
) -> None:
    inputs = split.split_model().example(3)
    with torch.no_grad():
        found = references(split, inputs)
        expected = shortened(read(folder), encoder=layer)(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=inputs["tokens"],
        ).logits
    name = f"encoder_exit_{layer}/exit_{LAYERS}"
    torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-4)


def test_the_bundle_says_what_the_model_says(bundle: Bundle) -> None:
    with load(bundle) as model:
        report = check(model, policy=policy(encoder=0.9, decoder=0.3))
    report.require()
    assert not report.notes
    compared = {(one.where, one.what) for one in report.comparisons}
    assert ("encoder_exit_1", "encoder_state, batch of 4") in compared
    behind = "logits, whole texts, encoder: all at encoder_exit_2"
    assert {("exit_1", behind), (f"exit_{LAYERS}", behind)} <= compared
    assert "fast" in {one.where for one in report.comparisons}


def test_unsplit_writes_the_same(bundle: Bundle, folder: Path) -> None:
    with load(bundle, unsplit=True) as model:
        for texts in (ONE, SEVERAL):
            found = model.generate(texts, max_new_tokens=NEW).finish().tokens
            assert found == expected(folder, texts)


@pytest.mark.parametrize("states", ["in-place", "fixed", "append"])
def test_every_form_of_states_writes_the_same(
    bundle: Bundle, folder: Path, states: StateForm
) -> None:
    with load(bundle, states=states) as model:
        model.policy = policy()
        for mode in ("full", "exact"):
            found = model.generate(SEVERAL, max_new_tokens=NEW, mode=mode).finish().tokens
            assert found == expected(folder, SEVERAL)


@pytest.mark.parametrize("kind", [TIMELY[1], TIMELY[3]], indirect=True)
def test_a_text_may_be_of_any_length_where_positions_are_relative(
    bundle: Bundle, folder: Path
) -> None:
    with load(bundle) as model:
        assert model.capacity == CAPACITY
        with pytest.raises(InputError, match=r"512 tokens at most.*load with a larger capacity"):
            model.generate("a", max_new_tokens=CAPACITY)
    with load(bundle, capacity=CAPACITY + 40) as model:
        model.policy = policy()
        long = [[4 + n % 10 for n in range(300)]]
        found = model.generate(long, max_new_tokens=NEW).finish().tokens
    made = read(folder).generate(torch.tensor(long), max_new_tokens=NEW, do_sample=False)
    assert found[0] == made[0, 1 : 1 + len(found[0])].tolist()
    with pytest.raises(UsageError, match="capacity 1 is out of range .2 or more"):
        load(bundle, capacity=1)


def split_of(
    family: str, folder: Path, model: transformers.PreTrainedModel | None = None
) -> ExitEncoderDecoder:
    checkpoint = save_checkpoint(model or FAMILIES[family](), folder / "checkpoint")
    split = from_pretrained(checkpoint, exits=[1, 2], encoder_exits=[1])
    assert isinstance(split, ExitEncoderDecoder)
    return split


@pytest.mark.slow
@pytest.mark.parametrize("family", [BART, T5])
def test_half_precision_holds(family: str, tmp_path: Path) -> None:
    whole = FAMILIES[family]()
    for name, parameter in whole.named_parameters():
        if name.endswith("wo.weight"):  # T5's, whose outputs are more than float16 holds
            parameter.data.mul_(1e5)
    split = split_of(family, tmp_path, whole)
    with load(export(split.split_model(), tmp_path / "half", dtype="float16")) as model:
        check(model).require()
        types = {
            tensor.name: tensor.dtype
            for tensor in model.bundle.manifest.components["segment_0"].outputs
        }
        assert types.pop("segment_0/saturation") == "float32"  # a score, whatever the state
        assert set(types.values()) == {"float16" if family == "bart" else "float32"}


def test_exits_are_saved_and_read_again(split: ExitEncoderDecoder, tmp_path: Path) -> None:
    split.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert isinstance(again, ExitEncoderDecoder)
    assert (again.exit_layers, again.encoder_exit_layers) == ([1, 2], [1, 2])
    assert again.exit_origins == split.exit_origins


def test_what_cannot_be_had_is_refused(folder: Path, model: Model) -> None:
    with pytest.raises(UsageError, match="there is no layer 9"):
        from_pretrained(folder, exits=[1], encoder_exits=[9])
    with pytest.raises(PolicyError, match="no rule for the chain encoder"):
        model.policy = Policy(rules={"main": Rule(thresholds=0.5)})
    with pytest.raises(PolicyError, match="chains"):
        model.policy = Rule(thresholds=0.5)
    if "source" in model.bundle.manifest.limits:
        with pytest.raises(InputError, match="source is 200, the model takes at most 64"):
            model.generate([[5] * 200], max_new_tokens=NEW).finish()
    with pytest.raises(InputError, match="tokens, the model reads at most 64"):
        model.generate("a" * 200, max_new_tokens=NEW)
    for wrong in (-1, 64):
        with pytest.raises(InputError, match=f"token id {wrong} is outside the vocabulary"):
            model.generate([[wrong]], max_new_tokens=NEW).finish()
    with pytest.raises(InputError, match="some prompts are texts, others token ids"):
        model.generate(["a", [4, 5]], max_new_tokens=NEW)


def start_of(model: Model) -> int:
    """What the decoder's text begins with."""
    decoding = model.bundle.manifest.decoding
    assert decoding is not None
    return decoding.start_tokens[0]


def inputs_of(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    ids = np.array(rows, np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_inputs_may_be_given_and_what_the_text_begins_with(model: Model) -> None:
    inputs = inputs_of([model.encode(text) for text in ("ab", "cd")])
    made = model.generate([], inputs=inputs, max_new_tokens=NEW).finish().tokens
    assert made == model.generate(["ab", "cd"], max_new_tokens=NEW).finish().tokens
    begun = [[start_of(model), *row[:1]] for row in made]
    again = model.generate(begun, inputs=inputs, max_new_tokens=NEW - 1).finish().tokens
    assert again == [row[1:NEW] for row in made]


def test_inputs_and_texts_must_be_as_many(model: Model) -> None:
    inputs = inputs_of([[0, 4, 5, 2]])
    with pytest.raises(InputError, match="both a text and inputs are given"):
        model.generate("ab", inputs=inputs)
    with pytest.raises(InputError, match="has 1 rows for 2 texts"):
        model.generate([[2], [2]], inputs=inputs).finish()
    tokens = np.array([[2, 5], [2, 6]], np.int64)
    with pytest.raises(InputError, match="has 1 rows for 2 texts"):
        model.trace({"tokens": tokens, **inputs})
    with pytest.raises(InputError, match="token id 99 is outside"):
        model.trace({"tokens": np.array([[2, 99]], np.int64), **inputs})


def test_what_is_not_heeded_of_a_checkpoints_settings_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = read(folder)
    model.generation_config.no_repeat_ngram_size = 3
    model.save_pretrained(tmp_path)
    from_pretrained(tmp_path, exits=[1])
    assert "have no effect: no_repeat_ngram_size=3" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("family", [BART, T5])
def test_int8_is_exported_and_checked(family: str, tmp_path: Path) -> None:
    split = split_of(family, tmp_path)

    def calibration(_: Bundle) -> Iterator[dict[str, np.ndarray]]:
        for seed in range(24):
            random = np.random.default_rng(seed)
            ids = random.integers(4, 14, (2, 8))
            yield {**inputs_of(ids.tolist()), "tokens": random.integers(4, 14, (2, 6))}

    made = export(split.split_model(), tmp_path / "int8", dtype="int8", calibration=calibration)
    with load(made) as model:
        report = check(model)
    report.require()
    assert "logits, whole texts, encoder: all at encoder_exit_1" in {
        one.what for one in report.comparisons
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_and_transformers_agree_for_every_family(family: str, tmp_path: Path) -> None:
    model, split = FAMILIES[family](), split_of(family, tmp_path)
    inputs = split.split_model().example(3)
    with torch.no_grad():
        expected = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=inputs["tokens"],
        ).logits
        found = references(split, inputs)[f"exit_{LAYERS}"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
