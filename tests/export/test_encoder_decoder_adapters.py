"""Adapters in encoder-decoders: layers of exits that read the encoder's output, too."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from edgeexit.bundle.manifest import PromptState, StateForm
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.export import export
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.exits.origins import note_origins
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.runtime import Model, Policy, Rule, Sampling, load
from tests.encoder_decoders import FAMILIES, LAYERS, layers_of, save_checkpoint

ONE, SEVERAL = ["abcj"], ["abc", "jihgfed", "c"]
NEW = 12
ADAPTERS = {1: 1, 2: 2}
ALWAYS = float("-inf")


@pytest.fixture(scope="module", params=["bart", "t5-1.1"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(FAMILIES[family](), tmp_path_factory.mktemp(family) / "checkpoint")


@pytest.fixture(scope="module")
def split(folder: Path) -> ExitEncoderDecoder:
    return adapted(folder)


@pytest.fixture(scope="module")
def bundle(split: ExitEncoderDecoder, folder: Path) -> Bundle:
    return export(split.split_model(), folder.parent / "bundle")


@pytest.fixture
def model(bundle: Bundle) -> Iterator[Model]:
    with load(bundle) as model:
        yield model


def adapted(folder: Path) -> ExitEncoderDecoder:
    split = from_pretrained(
        folder, exits=[*ADAPTERS], encoder_exits=[1], adapters=ADAPTERS, untrained=True
    )
    assert isinstance(split, ExitEncoderDecoder)
    return split


@functools.cache
def cut_and_copied(folder: Path, layer: int) -> transformers.PreTrainedModel:
    """The model whose decoder has the layers in front of an exit, and behind them those that a new
    adapter of that exit is a copy of."""
    model = copy.deepcopy(whole(folder))
    layers = layers_of(model.get_decoder())
    copied = copy.deepcopy(layers[LAYERS - ADAPTERS[layer] :])
    del layers[layer:]
    layers.extend(copied)
    return model


def written_by(folder: Path, texts: list[str], layer: int | None = None) -> list[list[int]]:
    """What the adapter of an exit writes greedily in transformers, or (None) the whole model."""
    return [list(_written_by(folder, text, layer)) for text in texts]


@functools.cache
@torch.no_grad()
def _written_by(folder: Path, text: str, layer: int | None) -> tuple[int, ...]:
    model = whole(folder) if layer is None else cut_and_copied(folder, layer)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    written, end = [model.config.decoder_start_token_id], model.config.eos_token_id
    while len(written) <= NEW and end not in written[1:]:
        tokens = torch.tensor([written])  # as a whole, because copied layers would share a cache
        logits = model(input_ids=ids, decoder_input_ids=tokens, use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return tuple(token for token in written[1:] if token != end)


@functools.cache
def whole(folder: Path) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    return model.eval()


def policy(thresholds: dict[str, float]) -> Policy:
    return Policy(rules={"encoder": Rule(score="saturation"), "main": Rule(thresholds=thresholds)})


def test_a_new_adapter_is_the_layers_that_it_copies(
    split: ExitEncoderDecoder, folder: Path
) -> None:
    inputs = split.split_model().example(3)
    found = {name: x for part in split._reference(inputs) for name, x in part.items()}
    for layer in ADAPTERS:
        with torch.no_grad():
            expected = cut_and_copied(folder, layer)(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=inputs["tokens"],
                use_cache=False,
            ).logits
        torch.testing.assert_close(found[f"exit_{layer}"], expected, atol=1e-4, rtol=1e-4)


def test_each_adapter_has_states_and_a_maker_of_its_own(bundle: Bundle) -> None:
    components = bundle.manifest.components
    for layer, count in ADAPTERS.items():
        states = components[f"adapter_{layer}"].states
        reads = [state for state in states if isinstance(state, PromptState)]
        assert len(states) == 4 * count and len(reads) == 2 * count
        assert {state.maker for state in reads} == {f"cross_adapter_{layer}"}
        made = [tensor.name for tensor in components[f"cross_adapter_{layer}"].outputs]
        assert made == [state.tensor.name for state in reads]


def test_the_bundle_says_what_the_model_says(bundle: Bundle) -> None:
    with load(bundle) as model:
        report = check(model, policy=policy({"exit_1": 0.2, "exit_2": 0.2}))
    report.require()
    drafted = {
        one.what.split(" drafted by ")[-1] for one in report.comparisons if "drafted" in one.what
    }
    assert {name.split(",")[0] for name in drafted} == {"exit_1", "exit_2"}


@pytest.mark.parametrize("states", ["in-place", "fixed", "append"])
def test_every_form_of_states_writes_what_transformers_writes(
    bundle: Bundle, folder: Path, states: StateForm
) -> None:
    with load(bundle, states=states) as model:
        for texts in (ONE, SEVERAL):
            expected = written_by(folder, texts)
            model.policy = policy({})
            assert model.generate(texts, max_new_tokens=NEW).finish().tokens == expected
            for layer in ADAPTERS:
                found = model.generate(
                    texts, max_new_tokens=NEW, mode="exact", draft_exit=f"exit_{layer}", drafts=3
                )
                assert found.finish().tokens == expected
                model.policy = policy({f"exit_{layer}": ALWAYS})
                left = model.generate(texts, max_new_tokens=NEW, mode="fast").finish()
                assert left.tokens == written_by(folder, texts, layer)
                assert set(left.statistics.exits) == {f"exit_{layer}"}


def test_texts_in_one_session_read_their_own_source(model: Model, folder: Path) -> None:
    """The prompt states of an adapter are made anew, for sources of other lengths, too."""
    model.policy = policy({"exit_1": ALWAYS})
    for text in ("abc", "j", "cba", "abcdefghij", "abc"):
        found = model.generate(text, max_new_tokens=NEW, mode="fast").finish().tokens
        assert found == written_by(folder, [text], 1)
        full = model.generate(text, max_new_tokens=NEW).finish().tokens
        exact = model.generate(text, max_new_tokens=NEW, mode="exact", drafts=2).finish().tokens
        assert exact == full


def test_an_adapter_that_nobody_asks_computes_nothing_of_the_source(model: Model) -> None:
    model.policy = policy({"exit_2": ALWAYS})
    model.generate("abc", max_new_tokens=4, mode="fast").finish()
    session = model._session
    assert session is not None
    assert "adapter_2/layer_1/cross_key" in session.handed.bound
    assert "adapter_1/layer_1/cross_key" not in session.handed.bound
    assert session.gates.pending  # segments behind the exit have not run


def test_sampled_texts_follow_the_seed_alone(model: Model) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    made = [
        model.generate("abc", max_new_tokens=NEW, mode="exact", sampling=sampling).finish().tokens
        for _ in range(2)
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize("family", ["bart"], indirect=True)
def test_half_precision_holds(split: ExitEncoderDecoder, tmp_path: Path) -> None:
    with load(export(split.split_model(), tmp_path / "half", dtype="float16")) as model:
        check(model).require()
        [state, *_] = model.bundle.manifest.components["cross_adapter_1"].outputs
        assert state.dtype == "float16"


def test_adapters_are_saved_and_read_again(split: ExitEncoderDecoder, tmp_path: Path) -> None:
    assert split.exit_origins["exit_1"] == "untrained"
    split.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert isinstance(again, ExitEncoderDecoder)
    assert again.adapter_sizes == ADAPTERS and again.encoder_exit_layers == [1]
    assert again.provenance["adapters"] == "untrained"
    pairs = zip(again.adapters.parameters(), split.adapters.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    note_origins(again, {"exit_1": "trained", "exit_2": "trained"})
    again.save_pretrained(tmp_path / "trained")
    read = from_pretrained(tmp_path / "trained", adapters=[1])
    assert read.adapter_sizes == {1: 1} and read.provenance["adapters"] == "trained"  # type: ignore[union-attr]
    without = from_pretrained(tmp_path / "trained", adapters=[])
    assert not without.adapter_sizes and "adapters" not in without.provenance  # type: ignore[union-attr]


def test_adapters_that_cannot_be_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="no early exit behind layer 2"):
        from_pretrained(folder, exits=[1], adapters=[2], untrained=True)
    with pytest.raises(UsageError, match=r"9 layers .* out of range \(1 to 3\)"):
        from_pretrained(folder, exits=[1], adapters={1: 9}, untrained=True)
    with pytest.raises(UsageError, match=r"no adapter of 1 layer\(s\) .* layer 1"):
        from_pretrained(folder, exits=[1], adapters=[1])
