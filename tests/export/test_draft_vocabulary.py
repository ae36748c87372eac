"""Draft vocabularies: heads of early exits over some tokens, held against float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgeexit.bundle.reader import Bundle
from edgeexit.cli.options import draft_vocabularies
from edgeexit.errors import ExportError, UsageError
from edgeexit.export import export
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.draft_vocabulary import ShortHead, frequent_tokens
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.families import bart, llama, opt, t5
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.runtime import Model, Policy, Rule, Sampling, load
from edgeexit.runtime.programs.sampling import Sampler
from tests import encoder_decoders
from tests.decoders import make_decoder

WITH_ADAPTER = 2
NEW = 10
ALWAYS = float("-inf")
KINDS: dict[str, Any] = {"llama": llama, "opt": opt, "bart": bart, "t5": t5}
"""t5 scales states in front of the projection, bart adds a bias of logits behind it."""


def make_model(kind: str) -> Any:
    made = encoder_decoders.FAMILIES.get(kind)
    return make_decoder(kind) if made is None else made()


def make(kind: str) -> ExitDecoder:
    model = make_model(kind)
    parts = KINDS[kind].trunk(model)
    if isinstance(parts, tuple):
        return ExitEncoderDecoder(model, *parts, [1, 2], adapters=[WITH_ADAPTER])
    return ExitDecoder(model, parts, [1, 2], adapters=[WITH_ADAPTER])


def chosen(split: ExitDecoder) -> dict[int, list[int]]:
    """Few tokens behind the first layer, every other one behind the second."""
    size = split.trunk.embedding.shape[0]
    return {1: [9, 3, 17, 40, 5, 6], 2: [*range(0, size, 2)]}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    split = make(kind)
    split.set_draft_vocabularies(chosen(split))
    return export(split.split_model(), tmp_path_factory.mktemp(kind) / "bundle")


@pytest.fixture
def model(bundle: Bundle) -> Iterator[Model]:
    with load(bundle) as model:
        yield model


def policy(model: Model, thresholds: dict[str, float]) -> Policy:
    rules = {"main": Rule(thresholds=thresholds)}
    return Policy(
        rules=rules | ({"encoder": Rule(score="saturation")} if "encoder" in model.chains else {})
    )


def inputs_of(kind: str, rows: int = 2) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in make(kind).split_model().example(rows).items()}


def written(model: Model, kind: str, rows: int, **options: Any) -> Any:
    inputs = inputs_of(kind, rows)
    tokens = inputs.pop("tokens")
    prompts = tokens[:, :1] if inputs else tokens[:, :5]
    options = {"max_new_tokens": NEW, "sampling": Sampling(), **options}
    return model.generate(prompts.tolist(), inputs=inputs or None, **options).finish()


def test_tokens_logits_and_scores_are_those_of_float64(model: Model, kind: str) -> None:
    inputs, split = inputs_of(kind), make(kind).double()
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    source: Any = ()
    if isinstance(split, ExitEncoderDecoder):
        source = split.encode(given["input_ids"], given["attention_mask"])
    with torch.no_grad():
        everywhere = split(given["tokens"], source=source)
    trace = model.trace(inputs)
    for (layer, ids), outputs, scores in zip(
        chosen(split).items(), trace.outputs, trace.scores, strict=False
    ):
        z = everywhere[layer].numpy()[..., sorted(ids)]
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        top = np.sort(p, -1)
        np.testing.assert_array_equal(outputs["token"], np.array(sorted(ids))[z.argmax(-1)])
        expected = np.full((len(z), everywhere[layer].shape[-1]), -np.inf)
        expected[:, sorted(ids)] = z[:, -1]
        np.testing.assert_allclose(outputs["logits"], expected, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(scores["max_prob"], top[..., -1], atol=1e-4)
        np.testing.assert_allclose(scores["margin"], top[..., -1] - top[..., -2], atol=1e-4)
        entropy = 1 + (p * np.log(p)).sum(-1) / np.log(len(ids))
        np.testing.assert_allclose(scores["entropy"], entropy, atol=1e-4)
    last = trace.outputs[-1]["logits"]
    np.testing.assert_allclose(last, everywhere[split.depth].numpy()[:, -1], atol=2e-4, rtol=1e-4)


def test_the_bundle_agrees_with_its_samples(bundle: Bundle) -> None:
    with load(bundle) as model:
        report = check(model, policy=policy(model, {"exit_1": 0.5, "exit_2": 0.3}))
    report.require()
    assert not [note for note in report.notes if "infinite" in note]


@pytest.mark.parametrize("rows", [1, 3])
def test_exact_writes_the_full_models_text(model: Model, kind: str, rows: int) -> None:
    full = written(model, kind, rows).tokens
    for exit_ in ("exit_1", "exit_2"):
        found = written(model, kind, rows, mode="exact", draft_exit=exit_, drafts=3)
        assert found.tokens == full and found.statistics.drafted


def test_fast_answers_with_tokens_of_the_vocabulary(model: Model, kind: str) -> None:
    for layer, ids in chosen(make(kind)).items():
        model.policy = policy(model, {f"exit_{layer}": ALWAYS})
        found = written(model, kind, 2, mode="fast")
        assert set(found.statistics.exits) == {f"exit_{layer}"}
        assert {token for row in found.tokens for token in row} <= set(ids)
        sampled = written(model, kind, 2, mode="fast", sampling=Sampling(temperature=2.0, top_k=20))
        assert {token for row in sampled.tokens for token in row} <= set(ids)


def test_only_what_is_asked_is_computed(bundle: Bundle, kind: str) -> None:
    with load(bundle) as model:

        def opened() -> set[str]:
            assert model._components is not None
            return {name.removeprefix("head_1/") for name in model._components["head_1"].outputs}

        written(model, kind, 1)
        assert not opened()
        written(model, kind, 1, mode="exact", draft_exit="exit_1")
        assert opened() == {"token"}
        model.policy = policy(model, {"exit_1": 0.5})
        written(model, kind, 1, mode="fast")
        assert opened() == {"token", "max_prob"}
        full = written(model, kind, 1, sampling=Sampling(temperature=1.0)).tokens
        assert opened() == {"token", "max_prob"}
        sampled = {"mode": "exact", "draft_exit": "exit_1", "sampling": Sampling(temperature=1.0)}
        assert (
            written(model, kind, 1, **sampled).tokens == written(model, kind, 1, **sampled).tokens
        )
        assert opened() == {"token", "max_prob", "logits"} and full


def test_the_head_holds_the_rows_of_its_tokens_alone(bundle: Bundle, kind: str) -> None:
    path = bundle.file(bundle.manifest.components["head_1"].variants[0].graph)
    graph = onnx.load(path, load_external_data=False).graph
    split = make(kind)
    size = split.trunk.embedding.shape[0]
    assert any(len(chosen(split)[1]) in one.dims for one in graph.initializer)
    assert not any(size in one.dims for one in graph.initializer)


def test_sampling_with_drafts_of_few_tokens_keeps_the_distribution() -> None:
    """Tokens that cannot be drafted come from the verification alone."""
    random = np.random.default_rng(0)
    p = [random.dirichlet(np.ones(8)) for _ in range(2)]
    q = np.where(np.arange(8) < 3, random.random(8), 0.0)
    q /= q.sum()
    sampler, counts, rounds = Sampler(Sampling(temperature=1.0), [[]]), np.zeros(8), 40000
    for _ in range(rounds):
        draft = sampler.draw(0, q)
        kept, after = sampler.verify(0, [draft], [q], p)
        counts[draft if kept else after] += 1
    np.testing.assert_allclose(counts / rounds, p[0], atol=4 * np.sqrt(0.25 / rounds))


def test_half_precision_holds(tmp_path: Path) -> None:
    split = make("bart")
    split.set_draft_vocabularies(chosen(split))
    with load(export(split.split_model(), tmp_path / "half", dtype="float16")) as model:
        check(model).require()
        outputs = model.bundle.manifest.components["head_1"].outputs
        assert {tensor.dtype for tensor in outputs} == {"float32", "int64"}


def test_int8_keeps_the_heads(tmp_path: Path) -> None:
    split = make("llama")
    split.set_draft_vocabularies(chosen(split))

    def calibration(_: Bundle) -> Iterator[dict[str, np.ndarray]]:
        for seed in range(24):
            yield {"tokens": np.random.default_rng(seed).integers(1, 60, (2, 8))}

    made = export(split.split_model(), tmp_path / "int8", dtype="int8", calibration=calibration)
    with load(made) as model:
        check(model).require()


def test_vocabularies_are_saved_and_read_again(tmp_path: Path) -> None:
    encoder_decoders.save_checkpoint(make_model("bart"), tmp_path / "checkpoint")
    read = functools.partial(from_pretrained, exits=[1, 2])
    split = read(tmp_path / "checkpoint", draft_vocabularies={2: [7, 5, 9]})
    assert split.draft_vocabularies == {2: (5, 7, 9)}  # type: ignore[union-attr]
    split.save_pretrained(tmp_path / "saved")
    assert from_pretrained(tmp_path / "saved").draft_vocabularies == {2: (5, 7, 9)}  # type: ignore[union-attr]
    assert not read(tmp_path / "saved", draft_vocabularies={}).draft_vocabularies  # type: ignore[union-attr]
    fewer = from_pretrained(tmp_path / "saved", exits=[1])
    assert not fewer.draft_vocabularies  # type: ignore[union-attr]


def test_trained_weights_are_those_of_the_head(tmp_path: Path) -> None:
    """The rows are taken when the model is exported, not when the vocabulary is set."""
    split = make("llama")
    split.set_draft_vocabularies({1: [3, 5, 9]})
    with torch.no_grad():
        split.trunk.head.projection.weight.mul_(2)  # type: ignore[union-attr,operator]
    [head] = [c for c in split.split_model().components if c.name == "head_1"]
    body = head.forms[0].body
    assert isinstance(body, ShortHead)
    state = torch.randn(2, split.trunk.width)
    expected = split.trunk.head(state)[:, [3, 5, 9]]
    torch.testing.assert_close(body(state)[0], expected)


class Scaled(nn.Module):
    """A head that multiplies all logits, and another that looks at all of them."""

    def __init__(self, *, together: bool) -> None:
        super().__init__()
        self.projection, self.together = nn.Linear(6, 9), together

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        logits = self.projection(state) * 0.25
        return logits.log_softmax(-1) if self.together else logits


def test_a_head_says_whether_it_can_be_shortened() -> None:
    state = torch.randn(4, 6)
    head = Scaled(together=False)
    short = ShortHead(head, [1, 4], 6, 9)
    torch.testing.assert_close(short(state)[0], head(state)[:, [1, 4]])
    assert head.projection.out_features == 9 and head(state).shape == (4, 9)
    with pytest.raises(ExportError, match="its logits depend on those of other tokens"):
        ShortHead(Scaled(together=True), [1, 4], 6, 9)
    with pytest.raises(ExportError, match="no linear `projection` to the vocabulary"):
        ShortHead(nn.Sequential(nn.Linear(6, 9)), [1, 4], 6, 9)


WRONG: dict[str, tuple[Any, str]] = {
    "no exit": ({3: [1, 2]}, r"no early exit behind layer 3 \(exits: 1,2\)|exits: 1, 2"),
    "last layer": ({4: [1, 2]}, "no early exit behind layer 4"),
    "outside": ({1: [1, 100000]}, "100000 is not a token id of the model"),
    "negative": ({1: [-1, 2]}, "-1 is not a token id"),
    "twice": ({1: [5, 2, 5]}, "the token 5 is given twice"),
    "empty": ({1: []}, r"it has 0 token\(s\). Give 2 or more"),
    "one": ({1: [7]}, r"it has 1 token\(s\)"),
    "texts": ({1: "abc"}, "'abc', not token ids"),
    "number": ({1: 4096}, "it is 4096, not token ids"),
    "floats": ({1: [1.0, 2.0]}, "1.0 is not a token id"),
}


@pytest.mark.parametrize("case", WRONG)
def test_vocabularies_that_cannot_be_are_refused(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        make("llama").set_draft_vocabularies(given)


def test_tokens_are_chosen_by_their_counts() -> None:
    counts = {4: 10, 5: 10, 6: 1, 7: 0}
    assert frequent_tokens(counts, 2) == (4, 5)
    assert frequent_tokens(counts, 9) == (4, 5, 6)
    assert frequent_tokens(counts, 3, always=[0, 6]) == (0, 4, 6)
    for size, always in ((1, []), (2, [1, 2, 3]), (2.0, [])):
        with pytest.raises(UsageError, match="frequent_tokens: size is"):
            frequent_tokens(counts, size, always)  # type: ignore[arg-type]


def test_every_token_of_a_vocabulary_may_not_be_suppressed(tmp_path: Path) -> None:
    split = make("llama")
    split.set_draft_vocabularies({1: [3, 5]})
    with load(export(split.split_model(), tmp_path / "bundle")) as model:
        options: dict[str, Any] = {"mode": "exact", "draft_exit": "exit_1", "max_new_tokens": 3}
        one = model.generate([[1, 2]], sampling=Sampling(suppressed=(3,)), **options).finish()
        assert 3 not in one.tokens[0]
        with pytest.raises(UsageError, match="those that an exit can answer with"):
            model.generate([[1, 2]], sampling=Sampling(suppressed=(3, 5)), **options).finish()


def test_the_command_line_reads_ids_from_files(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[3, 5, 9]")
    (tmp_path / "text.json").write_text('["a"]')
    file = tmp_path / "ids.json"
    assert draft_vocabularies(()) is None
    assert draft_vocabularies((f"exit_2={file}", f"3={file}")) == {2: [3, 5, 9], 3: [3, 5, 9]}
    for given, message in (
        ([f"{file}"], "is not EXIT=FILE"),
        ([f"last={file}"], "is not EXIT=FILE"),
        ([f"exit_1={tmp_path / 'none.json'}"], "cannot be read"),
        ([f"exit_1={tmp_path / 'text.json'}"], "cannot be read"),
        ([f"exit_1={file}", f"1={file}"], "given twice"),
    ):
        with pytest.raises(UsageError, match=message):
            draft_vocabularies(given)
