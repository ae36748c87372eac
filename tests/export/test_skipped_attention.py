"""Decoders without some of their attentions: the adapters in their place against the paper's
formulas, folded weights against adapters, and bundles against a float64 model without states."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from edgeexit.bundle.manifest import PromptState, TokenState
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import ExportError, UsageError
from edgeexit.export import export
from edgeexit.export.contract import Stack
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.skipped_attention import Pia, deployed
from edgeexit.export.families import llama, opt
from edgeexit.export.methods.eas import Eas, fold, rewrite, search, search_model
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.passes.weight_bits import WeightBits
from edgeexit.export.pretrained import from_pretrained
from edgeexit.export.trace.without_attention import FoldedLayer, prompt_of
from edgeexit.measure.check import check
from edgeexit.runtime import Policy, Rule, load
from tests.decoders import LAYERS, VOCABULARY, make_decoder, random_prompts
from tests.training import arguments
from tests.vision_models import with_fewer_forms

KINDS: dict[str, tuple[list[int], int | None, bool]] = {
    "lost": ([1, 3], None, False),
    "adapters": ([1, 3], 8, False),
    "folded": ([1, 3], 8, True),
    "a whole segment": ([2, 4], 4, False),
}
"""Removed attentions, rank of the adapters, whether they are folded; exits are behind 1 and 2."""
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("lost", "a whole segment")]
EARLY = ["exit_1", "exit_2"]
NEW = 12


def make(kind: str, family: str = "llama") -> ExitDecoder:
    """A decoder without some attentions, with random adapters."""
    removed, rank, folded = KINDS[kind]
    model = make_decoder(family)
    decoder = ExitDecoder(model, llama.trunk(model), [1, 2])  # type: ignore[arg-type]
    rewrite(decoder, removed, rank)
    draw(decoder)
    if folded:
        fold(decoder, [batch(6, 9, 5)])
    return decoder.eval()


def draw(decoder: ExitDecoder) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in decoder.skipped.pia.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


def batch(rows: int, length: int, prompt: int) -> dict[str, torch.Tensor]:
    """Random rows whose labels begin behind so many tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def greedy(decoder: ExitDecoder, prompt: Sequence[int], count: int) -> list[int]:
    """Tokens of the last layer, each from the beginning, in float64."""
    decoder = copy.deepcopy(decoder).double()
    tokens = list(prompt)
    for _ in range(count):
        logits = decoder(torch.tensor([tokens]), prompts=torch.tensor([len(prompt)]))[LAYERS]
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[ExitDecoder, Bundle]]:
    made: dict[str, tuple[ExitDecoder, Bundle]] = {}

    def get(kind: str) -> tuple[ExitDecoder, Bundle]:
        if kind not in made:
            decoder = make(kind)
            first = 0 if kind == "adapters" else 2  # every form once, else the plain one
            split = with_fewer_forms(decoder.split_model(), first)
            made[kind] = decoder, export(split, tmp_path_factory.mktemp("eas") / "bundle")
        return made[kind]

    return get


def test_the_adapter_is_the_papers_formula() -> None:
    """Token by token, with B and D as two groups each, and the mean over prompt tokens only."""
    pia = Pia(width=6, rank=4, scale=0.7).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in pia.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    h = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    for row, prompt in enumerate((3, 5)):
        of_prompt = h[row, :prompt]
        m = torch.stack([pia.mean(x) for x in of_prompt]).mean(0)
        w = torch.softmax(pia.choose(of_prompt.mean(0)) / 10, dim=0)
        summary = pia.summary(of_prompt.mean(0)[None])
        found = pia(h[row : row + 1], summary)[0]
        for n in range(5):
            z = 0.5 * (m + pia.enter(h[row, n]))
            expected = h[row, n].clone()
            for k in range(2):  # B, then D
                halves = [z[2 * g : 2 * g + 2] @ pia.leave[k, g] for g in range(2)]
                expected = expected + 0.7 * w[k] * (torch.cat(halves) + pia.leave_bias[k])
            torch.testing.assert_close(found[n], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_folded_layer_is_the_adapted_one_with_its_summary_fixed(
    dtype: torch.dtype, most: float
) -> None:
    decoder = make("adapters").to(dtype)
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(2, 7, decoder.trunk.width, generator=generator).to(dtype)
    for layer in decoder.skipped.removed:
        rest, pia = decoder.skipped.rest(layer), decoder.skipped.adapter(layer)
        assert pia is not None
        pia.fixed.copy_(torch.randn(pia.fixed.shape, generator=generator))
        x = rest.normed(state)
        expected = rest.add(state, rest.scale * pia(x, pia.fixed.expand(2, -1)))
        folded = deployed(rest, pia)
        assert isinstance(folded, FoldedLayer)
        if dtype == torch.float64:  # transformers' norm computes in float32
            folded.norm = torch.nn.RMSNorm(decoder.trunk.width, rest.epsilon, dtype=dtype)
        size = (expected - state).abs().max()
        assert (folded(state) - expected).abs().max() < most * size
        # The published code adds the bias with the new weight in place of the old one.
        turn, bias = pia.folded(pia.fixed)
        wrong = copy.deepcopy(folded)
        for linear, one in ((wrong.gate, rest.gate), (wrong.up, rest.up)):
            new = one.weight * rest.scale @ turn
            linear.bias = torch.nn.Parameter(new @ (rest.scale * bias))
        assert (wrong(state) - expected).abs().max() > 1e-3 * size


def test_the_exported_adapter_summarises_each_rows_prompt() -> None:
    """Rows with prompts of other lengths, and one that goes on behind its own."""
    decoder = make("adapters").double()
    layer = decoder.skipped.removed[1]
    module = decoder.skipped.deployed(layer).double()
    generator = torch.Generator().manual_seed(4)
    state = torch.randn(3, 6, decoder.trunk.width, generator=generator, dtype=torch.float64)
    counts = torch.tensor([6, 4, 0])
    belongs = torch.arange(6) < counts[:, None]
    held = torch.randn(3, 1, module.width or 0, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        first, made = module(state, held, *prompt_of(counts, state))
        expected = decoder.skipped.through(layer, state[:2], belongs[:2])
        torch.testing.assert_close(first[:2], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(made[2], held[2]) and not torch.equal(made[:2], held[:2])
        later, kept = module(state, made, *prompt_of(0 * counts, state))
        assert torch.equal(kept, made)
        torch.testing.assert_close(later[:2], first[:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["adapters", "folded", *SLOW])
def test_a_bundle_writes_what_the_rewritten_model_does(
    kind: str, bundles: Callable[[str], tuple[ExitDecoder, Bundle]]
) -> None:
    decoder, bundle = bundles(kind)
    prompts = random_prompts(2, [9, 5])
    expected = [greedy(decoder, prompt, NEW) for prompt in prompts]
    with load(bundle) as model:
        assert check(model).passed
        for mode in ("full", "exact"):
            assert (
                model.generate(prompts, max_new_tokens=NEW, mode=mode).finish().tokens == expected
            )
        alone = [
            model.generate([p], max_new_tokens=NEW, mode="exact").finish().tokens[0]
            for p in prompts
        ]
        assert alone == expected
    with load(bundle, unsplit=True) as model:
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert model.generate([prompt], max_new_tokens=NEW).finish().tokens == [tokens]


@pytest.mark.parametrize("kind", ["adapters", SLOW[1]])
def test_tokens_that_left_early_are_summarised_when_deeper_layers_run(
    kind: str, bundles: Callable[[str], tuple[ExitDecoder, Bundle]]
) -> None:
    """In mode fast the prompt reaches deeper layers only when a token needs them."""
    decoder, bundle = bundles(kind)
    exact, taken = copy.deepcopy(decoder).double(), set()
    with load(bundle, all_scores=True) as model:
        trace = model.trace({"tokens": np.array(random_prompts(8, [9]))})
    scores = [np.asarray(own["max_prob"]) for own in trace.scores]
    often = {name: float(np.quantile(scores[n], 0.8)) for n, name in enumerate(EARLY)}
    policy = Policy(rules={"main": Rule(thresholds=often)})
    for prompt in random_prompts(4, [9, 5, 7], seed=5):
        with load(bundle, policy=policy) as model:
            made = model.generate([prompt], max_new_tokens=NEW, mode="fast")
            tokens, exits, before = [], [], Counter[str]()
            for piece in made:
                tokens += piece.tokens
                after = Counter(made.statistics.exits)
                exits += [*(after - before).elements()]
                before = after
            taken |= set(exits)
        seen = list(prompt)
        for token, name in zip(tokens, exits, strict=True):
            with torch.no_grad():
                logits = exact(torch.tensor([seen]), prompts=torch.tensor([len(prompt)]))
            own = logits[int(name.removeprefix("exit_"))][0, -1]
            assert own[token] >= own.max() - 1e-3
            seen.append(token)
    assert taken > {"exit_4"}


def test_only_layers_with_attention_keep_something_per_token(
    bundles: Callable[[str], tuple[ExitDecoder, Bundle]],
) -> None:
    for kind in ("adapters", "folded"):
        removed, rank, folded = KINDS[kind]
        _, bundle = bundles(kind)
        states = bundle.manifest.components["unsplit"].states
        of_tokens = {s.name.split("/")[0] for s in states if isinstance(s, TokenState)}
        of_prompts = {s.tensor.name.split("/")[0] for s in states if isinstance(s, PromptState)}
        gone = {f"layer_{layer}" for layer in removed}
        assert of_tokens == {f"layer_{n}" for n in range(1, LAYERS + 1)} - gone
        assert of_prompts == (gone if rank and not folded else set())


def test_a_prompt_cannot_be_read_in_pieces(
    bundles: Callable[[str], tuple[ExitDecoder, Bundle]],
) -> None:
    _, bundle = bundles("adapters")
    tokens = np.array(random_prompts(2, [8]))
    with load(bundle, all_scores=True) as model:
        assert model.trace({"tokens": tokens}).exits
        with pytest.raises(UsageError, match="must read all 8 tokens of a text in one run"):
            model.trace({"tokens": tokens}, step=3)


def test_a_rewritten_checkpoint_is_read_back_and_stays_safe_for_transformers(
    tmp_path: Path,
) -> None:
    """Which does not know the adapters, and must not answer with attentions that were removed."""
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    prompts = torch.tensor([5, 9])
    for kind in ("adapters", "folded"):
        decoder = make(kind)
        decoder.save_pretrained(tmp_path / kind)
        for options in ({}, {"exits": [1], "saved_exits": False}):
            again = from_pretrained(tmp_path / kind, **options)  # type: ignore[arg-type]
            assert isinstance(again, ExitDecoder) and again.skipped.removed == (1, 3)
            with torch.no_grad():
                made, expected = again(ids, prompts=prompts), decoder(ids, prompts=prompts)
            assert torch.equal(made[LAYERS], expected[LAYERS])
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        plain = ExitDecoder(stock, llama.trunk(stock), [])
        rewrite(plain, [1, 3], rank=None)
        with torch.no_grad():
            torch.testing.assert_close(stock(ids).logits, plain(ids)[LAYERS], rtol=0, atol=1e-5)


def test_training_changes_the_adapters_alone_or_the_decoder(tmp_path: Path) -> None:
    rows = [
        dict(zip(("input_ids", "labels"), row, strict=True))
        for row in zip(*batch(32, 9, 4).values(), strict=True)
    ]
    for method in (Eas(), Eas(trained="decoder"), Eas(trained="decoder", first=2)):
        decoder = make("adapters")
        before = copy.deepcopy(decoder.state_dict())
        args = arguments(tmp_path, max_steps=3, learning_rate=1e-2)
        ExitTrainer(decoder, method, args, train_dataset=rows).train()
        names = {name for name in before if not name.endswith(".fixed")}
        pia = {name for name in names if name.startswith("skipped.pia.")}
        after = decoder.state_dict()
        changed = {name for name in names if not torch.equal(after[name], before[name])}
        assert pia <= changed
        assert (changed == pia) == (method.trained == "adapters")
        if method.trained == "decoder":
            assert "model.model.layers.1.mlp.up_proj.weight" in changed
            before_it = (
                "model.model.embed_tokens.weight",
                "model.model.layers.0.mlp.up_proj.weight",
            )
            assert all((name in changed) == (method.first == 1) for name in before_it)


def test_an_export_has_the_weights_of_its_time() -> None:
    decoder = make("adapters")

    def leaving() -> torch.Tensor:
        body = decoder.split_model().component("unsplit").forms[-1].body
        assert isinstance(body, Stack)
        return body.layers[0].weights["leave"]

    before = leaving()
    draw(decoder)
    assert not torch.equal(leaving(), before)


def test_training_summarises_what_stands_before_the_first_label(tmp_path: Path) -> None:
    decoder, method = make("adapters"), Eas()
    given = batch(4, 9, 4)
    loss, _ = method.loss(decoder, decoder, given, 0)
    logits = decoder(given["input_ids"][:, :-1], prompts=torch.full((4,), 4))[LAYERS]
    expected = functional.cross_entropy(
        logits[:, 3:].flatten(0, 1), given["labels"][:, 4:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    with pytest.raises(UsageError, match="a batch has no 'labels'"):
        method.loss(decoder, decoder, {"input_ids": given["input_ids"]}, 0)


def test_folding_takes_the_mean_summary_of_prompts() -> None:
    decoder = make("adapters")
    given = batch(6, 9, 5)
    found = decoder.summaries(given["input_ids"][:, :-1], prompts=torch.full((6,), 5))
    other = copy.deepcopy(decoder)
    fold(other, [{k: v[:2] for k, v in given.items()}, {k: v[2:] for k, v in given.items()}])
    for layer, summaries in found.items():
        pia = other.skipped.adapter(layer)
        assert pia is not None
        torch.testing.assert_close(pia.fixed, summaries.mean(0), rtol=1e-5, atol=1e-6)


def test_prompts_alone_are_summarised_whole_without_their_padding() -> None:
    decoder = make("adapters")
    ids = batch(1, 9, 9)["input_ids"]
    expected = decoder.summaries(ids)
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1),
        "labels": torch.full((1, 13), -100),
        "attention_mask": (torch.arange(13) < 9).long()[None],
    }
    alone = {"input_ids": ids, "labels": torch.full((1, 9), -100)}
    for given in (alone, padded):
        other = copy.deepcopy(decoder)
        fold(other, [given])
        for layer, summary in expected.items():
            pia = other.skipped.adapter(layer)
            assert pia is not None
            torch.testing.assert_close(pia.fixed, summary[0], rtol=1e-5, atol=1e-6)
    padded["attention_mask"] = padded["attention_mask"].flip(1)
    with pytest.raises(UsageError, match="padding before a token"):
        fold(decoder, [padded])


def test_what_is_not_finite_is_not_folded() -> None:
    decoder = make("adapters")
    pia = decoder.skipped.adapter(3)
    assert pia is not None
    with torch.no_grad():
        pia.leave_bias[0, 0] = torch.nan
    with pytest.raises(UsageError, match="adapter of layer 3, or its summary, is not finite"):
        fold(decoder, [batch(2, 6, 3)])
    for wrong in ([1, 2], [{"input_ids": np.ones((1, 3)), "labels": np.ones((1, 3))}]):
        with pytest.raises(UsageError, match="something else than tensors"):
            fold(decoder, wrong)  # type: ignore[list-item]


def test_adapters_stay_in_floats_where_weights_have_few_bits(tmp_path: Path) -> None:
    """A matrix of an adapter has rows of 2 * rank + 2, which no block divides."""
    made = export(make("adapters").split_model(), tmp_path / "b", weights=WeightBits(4, block=16))
    assert made.manifest.components["segment_0"].variants[0].precision == "int4"
    with load(made, threads=1, all_scores=True) as model:
        check(model).require()


def test_a_search_finds_the_attentions_that_cost_least() -> None:
    """Each layer has a cost of its own; the search sees the sum of those that are missing."""
    costs = {layer: 0.4 if layer in (3, 5, 6) else 0.0 for layer in range(1, 9)}
    trained: list[Sequence[int]] = []
    found = search(
        costs,
        remove=5,
        loss=lambda layers: sum(costs[layer] for layer in layers),
        train=trained.append,
        steps=600,
        warm_up=20,
        turn=2,
        rate=2.0,
    )
    assert found.chosen == [1, 2, 4, 7, 8]
    assert len(trained) == 600 and all(len(set(layers)) == 5 for layers in trained)
    assert len(found.tried) == 3 * 290 and found.to_dict()["chosen"] == found.chosen
    assert search(costs, 5, lambda layers: 0.0).scores == dict.fromkeys(costs, 0.0)


def test_a_search_trains_a_model_with_adapters_everywhere() -> None:
    model = make_decoder("llama")
    decoder = ExitDecoder(model, llama.trunk(model), [1])  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters, method, rows = search_model(decoder, rank=4), Eas(), batch(4, 9, 5)
    optimizer = torch.optim.AdamW(adapters.pia.parameters(), lr=1e-2)
    losses: dict[tuple[int, ...], list[float]] = {}

    def loss(layers: Sequence[int]) -> float:
        adapters.remove(layers)
        with torch.no_grad():
            value = float(method.loss(decoder, decoder, rows, None)[0])
        losses.setdefault(tuple(layers), []).append(value)
        return value

    def train(layers: Sequence[int]) -> None:
        adapters.remove(layers)
        optimizer.zero_grad()
        method.loss(decoder, decoder, rows, 0)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    found = search(range(1, LAYERS + 1), 2, loss, train=train, steps=60)
    assert len(found.chosen) == 2
    assert all(values[-1] < values[0] for values in losses.values() if len(values) > 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UsageError, match="removed already"):
        search_model(make("adapters"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda decoder: rewrite(decoder, [0]), "cannot be removed from layer 0; .* layers 1 to 4"),
        (lambda decoder: rewrite(decoder, [5]), "cannot be removed from layer 5"),
        (lambda decoder: rewrite(decoder, [2, 2]), "2,2 name a layer twice"),
        (lambda decoder: rewrite(decoder, [1, 2, 3, 4]), "all 4 layers are named"),
        (lambda decoder: rewrite(decoder, [1], rank=3), "cannot have the rank 3"),
        (lambda decoder: fold(decoder, []), "there is none to fold"),
        (lambda decoder: Eas().check(decoder), "no attention of the model has an adapter"),
        (lambda decoder: Eas(trained="x").check(decoder), "trained 'x' is not known"),  # type: ignore[arg-type]
        (lambda decoder: Eas(first=5).check(decoder), "no layer 5 to train from"),
        (lambda decoder: search([1, 2], 2, lambda _: 0.0), "2 of 2 attentions cannot be removed"),
        (lambda decoder: search([1, 2], 1, lambda _: 0.0, subsets=1), "compare nothing"),
        (lambda decoder: search([1, 2], 1, lambda _: 0.0, steps=5), "compare nothing"),
        (lambda decoder: search([1, 2], 1, lambda _: 0.0, warm_up=200), "compare nothing"),
        (lambda decoder: search([1, 2], 1, lambda _: 0.0, rate=float("inf")), "compare nothing"),
        (lambda decoder: search([1, 2], 1.5, lambda _: 0.0), "1.5 is no whole number"),  # type: ignore[arg-type]
        (lambda decoder: search([1, 2], 1, None), "loss or train is no function"),  # type: ignore[arg-type]
        (lambda decoder: search([1, 2], 1, lambda _: float("nan")), r"losses of subsets are \[nan"),
        (lambda decoder: search([1, 2], 1, lambda _: -1e4), r"losses of subsets are \[-10000"),
        (lambda decoder: search([1, 2], 1, lambda _: 900.0), "a sum over a batch is too large"),
        (lambda decoder: search([1, 2], 1, lambda _: None), "a loss is no number"),  # type: ignore[arg-type,return-value]
        (lambda decoder: search([1, 2], 1, lambda _: 0.0, rate="1"), "compare nothing"),  # type: ignore[arg-type]
        (lambda decoder: rewrite(decoder, None), "None is no whole number"),  # type: ignore[arg-type]
        (lambda decoder: rewrite(decoder, [True]), "True is no whole number"),
    ],
)
def test_what_cannot_be_removed_is_refused(
    change: Callable[[ExitDecoder], Any], message: str
) -> None:
    model = make_decoder("llama")
    decoder = ExitDecoder(model, llama.trunk(model), [1])  # type: ignore[arg-type]
    before = copy.deepcopy(decoder.state_dict())
    with pytest.raises(UsageError, match=message):
        change(decoder)
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())


def test_attentions_are_removed_once() -> None:
    """A second rewrite would leave those of the first without anything in their place."""
    decoder = make("adapters")
    with pytest.raises(UsageError, match="attentions of layers 1, 3 are removed already"):
        rewrite(decoder, [2])
    assert decoder.skipped.removed == (1, 3)


def test_folding_without_data_and_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folding needs prompts of the task"):
        fold(make("adapters"), [])
    for wrong in (None, batch(2, 5, 3)):
        with pytest.raises(UsageError, match="Give a list of batches"):
            fold(make("adapters"), wrong)  # type: ignore[arg-type]
    model = make_decoder("opt")
    decoder = ExitDecoder(model, opt.trunk(model), [1])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="from models of the Llama and Qwen families only"):
        rewrite(decoder, [2])
    make("adapters").save_pretrained(tmp_path)
    config = tmp_path / "edgeexit.json"
    config.write_text(
        config.read_text().replace(
            '"removed_attention": [\n  1,\n  3', '"removed_attention": [\n  9,\n  3'
        )
    )
    with pytest.raises((ExportError, UsageError), match="names layer 1|layer 9"):
        from_pretrained(tmp_path)
