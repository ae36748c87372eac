"""`check` passes on what is right and fails, naming the exit, on each thing that can be wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeexit.bundle.compare import spread
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import BundleError, CheckError, PolicyError
from edgeexit.measure.check import check
from edgeexit.measure.judge import Judge, describe, tolerances
from edgeexit.measure.quantisation_effect import count_flips
from edgeexit.runtime import Policy, Rule, load
from tests.decoder_toys import (
    fill_decoder_toy,
    make_decoder_toy,
    toy_policy,
    write_decoder_toy,
)
from tests.toys import Toy, fill_toy, make_inputs, make_toy, reference, write_toy
from tests.two_chains import write_two_chains


def spoilt_toy(toy: Toy, output: Path, *, sample: str, change: float | None) -> Bundle:
    """A bundle that is whole, with one reference changed, or taken out (None)."""
    with BundleWriter(output) as writer:
        manifest = fill_toy(toy, writer.folder)
        change_sample(writer.folder, sample, change)
        return writer.commit(manifest)


def change_sample(folder: Path, sample: str, change: float | None) -> None:
    path = folder / "samples/reference.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if change is None:
        del arrays[sample]
    else:
        arrays[sample] = arrays[sample] + np.asarray(change).astype(arrays[sample].dtype)
    np.savez(path, **arrays)


def test_check_passes_and_restores_the_policy_when_a_bundle_is_right(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model:
        model.policy = Rule(thresholds=0.5)
        before = model.policy
        report = check(model)
        assert model.policy is before
    report.require()
    assert report.passed
    assert report.rows == 4
    places = {one.where for one in report.comparisons}
    assert places == {"exit_1", "exit_2", "exit_3", "exit_4", "decisions", "unsplit"}
    assert all(one.difference < 1e-4 for one in report.comparisons)


def test_check_says_what_it_could_not_compare_when_pillow_is_missing(
    vit_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with load(vit_bundle) as model:
        report = check(model)
    assert report.passed
    assert len(report.notes) == 1
    assert "edgeexit[images]" in report.notes[0]
    assert "preprocessing" not in {one.where for one in report.comparisons}


@pytest.mark.parametrize(
    "options", [{"rows": "together"}, {"rows_last": True}, {"open_axes": True}]
)
def test_check_passes_when_states_have_other_forms(options: dict, tmp_path: Path) -> None:
    with load(write_toy(make_toy(**options), tmp_path / "bundle")) as model:
        check(model).require()


@pytest.mark.parametrize(
    "sample,where",
    [
        ("exit_2/logits", "exit_2"),
        ("exit_3/margin", "exit_3"),
        ("exit_4/logits", "exit_4"),
        ("unsplit/logits", "unsplit"),
    ],
)
def test_check_names_the_exit_when_one_reference_differs(
    toy: Toy, tmp_path: Path, sample: str, where: str
) -> None:
    bundle = spoilt_toy(toy, tmp_path / "bundle", sample=sample, change=0.25)
    with load(bundle) as model:
        report = check(model)
    with pytest.raises(CheckError, match=f"{where}: .*differs from the reference by 0.25"):
        report.require()
    assert not describe(report)["passed"]


def test_check_passes_when_the_tolerance_allows_the_difference(toy: Toy, tmp_path: Path) -> None:
    bundle = spoilt_toy(toy, tmp_path / "bundle", sample="exit_2/logits", change=0.25)
    with np.load(bundle.file("samples/reference.npz")) as file:
        logits = spread(file["exit_2/logits"])
    with load(bundle) as model:
        assert check(model, atol=0.3 / logits).passed
        assert not check(model, atol=0.2 / logits, rtol=0).passed


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_check_is_as_strict_when_logits_are_small(size: float, tmp_path: Path) -> None:
    """The same relative error is seen at every size of logits."""
    toy = make_toy()
    for _, head in toy.layers:
        head *= np.float32(size)
    bundle = write_toy(toy, tmp_path / "bundle")
    with load(bundle) as model:
        check(model).require()
    with np.load(bundle.file("samples/reference.npz")) as file:
        change = 1e-3 * spread(file["exit_2/logits"])
    spoilt = spoilt_toy(toy, tmp_path / "spoilt", sample="exit_2/logits", change=change)
    with load(spoilt) as model, pytest.raises(CheckError, match="exit_2: logits"):
        check(model).require()


def test_check_fails_when_the_reference_is_nan(toy: Toy, tmp_path: Path) -> None:
    bundle = spoilt_toy(toy, tmp_path / "bundle", sample="exit_2/logits", change=np.nan)
    with load(bundle) as model, pytest.raises(CheckError, match="exit_2"):
        check(model).require()


def test_check_fails_when_the_model_and_its_reference_are_nan(tmp_path: Path) -> None:
    toy = make_toy()
    toy.layers[1][1][:] = np.nan
    with load(write_toy(toy, tmp_path / "bundle")) as model:
        report = check(model)
    assert {one.where for one in report.comparisons if one.reason} == {"exit_2"}
    with pytest.raises(CheckError, match=r"exit_2: logits.*the reference itself is NaN \(12 of 12"):
        report.require()
    assert "exit_2: score entropy: the reference itself is NaN; use another score" in report.notes


def test_check_notes_infinite_logits_and_passes(tmp_path: Path) -> None:
    """A class that a model never answers has a logit of -inf."""
    toy = make_toy()
    bundle = spoilt_toy(toy, tmp_path / "bundle", sample="exit_1/logits", change=0.0)
    made = reference(toy, make_inputs(4))[0]["logits"]
    judge = Judge(*tolerances(bundle))
    masked = np.where([True, True, False], made, -np.inf)
    judge.compare("exit_1", "logits, batch of 4", masked, masked)
    judge.compare("exit_1", "logits, rows alone", masked, made)
    assert [one.passed for one in judge.comparisons] == [True, False]
    assert judge.notes == ["exit_1: logits: the reference itself is infinite for some classes"]


def test_check_refuses_a_bundle_when_a_reference_is_missing(toy: Toy, tmp_path: Path) -> None:
    bundle = spoilt_toy(toy, tmp_path / "bundle", sample="exit_2/entropy", change=None)
    with load(bundle) as model, pytest.raises(BundleError, match="no exit_2/entropy"):
        check(model)


def test_check_refuses_a_bundle_when_it_has_no_samples(toy: Toy, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_toy(toy, writer.folder)
        bundle = writer.commit(msgspec.structs.replace(manifest, samples=[]))
    with load(bundle) as model, pytest.raises(BundleError, match="no reference samples"):
        check(model)


@pytest.mark.parametrize(
    "policy",
    [
        Rule(thresholds=0.7, score="margin", patience=1),
        Rule(thresholds={"exit_2": -np.inf}, first="exit_2", last="exit_2"),
        Rule(thresholds=[0.9, 0.8, 0.7], first="exit_2"),
    ],
)
def test_check_compares_the_decisions_of_a_given_policy(policy: Rule, toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model:
        report = check(model, policy=policy)
    report.require()
    assert any("the given policy" in one.what for one in report.comparisons)


def test_check_refuses_a_policy_when_it_is_of_another_bundle(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model, pytest.raises(PolicyError, match="made for the bundle"):
        check(model, policy=Policy(rules={"forward": Rule()}, bundle="0" * 64))


def test_check_notices_when_a_score_in_the_graph_is_wrong(toy: Toy, tmp_path: Path) -> None:
    """Exits swapped in the manifest: every tensor is right, and none is where it should be."""
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_toy(toy, writer.folder)
        exits = manifest.last_chain.exits
        scores = exits[1].scores
        swapped = scores | {"margin": scores["entropy"], "entropy": scores["margin"]}
        exits[1] = msgspec.structs.replace(exits[1], scores=swapped)
        bundle = writer.commit(manifest)
    with load(bundle) as model, pytest.raises(CheckError, match=r"exit_2: (score|exit taken)"):
        check(model).require()


def test_tolerances_follow_the_lowest_precision(toy_bundle: Bundle) -> None:
    assert tolerances(toy_bundle) == (1e-4, 1e-5)
    components = toy_bundle.manifest.components
    (variant,) = components["unsplit"].variants
    half = msgspec.structs.replace(variant, precision="float16")
    whole = msgspec.structs.replace(components["unsplit"], variants=[half])
    changed = components | {"unsplit": whole}
    manifest = msgspec.structs.replace(toy_bundle.manifest, components=changed)
    assert tolerances(Bundle(toy_bundle.path, manifest, toy_bundle.digest)) == (4e-2, 2e-2)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_check_compares_preprocessing_when_the_exporter_left_a_sample(
    kind: str, request: pytest.FixtureRequest
) -> None:
    with load(request.getfixturevalue(f"{kind}_bundle")) as model:
        report = check(model)
    report.require()
    assert "preprocessing" in {one.where for one in report.comparisons}


@pytest.mark.parametrize(
    "options,places",
    [
        ({}, set()),
        ({"layers": (1, 2, 1), "adapter": 1}, set()),
        ({"gate": True, "prefix": True, "stateless": True, "adapter": 1}, {"vision_1", "vision_2"}),
        ({"gate": True}, set()),
        ({"encoder": True, "stateless": True}, {"encoder_1", "encoder_2", "encoder_3"}),
        ({"encoder": True}, {"encoder_1", "encoder_2", "encoder_3"}),
    ],
)
def test_check_passes_when_a_model_writes(options: dict, places: set[str], tmp_path: Path) -> None:
    toy = make_decoder_toy(**options)
    with load(write_decoder_toy(toy, tmp_path / "bundle")) as model:
        report = check(model)
    report.require()
    told = {"decisions"} if places else set()
    told |= places | {*toy.stops, "exact", "unsplit"}
    assert {one.where for one in report.comparisons} == told
    assert not report.notes
    said = {one.what for one in report.comparisons}
    assert "score entropy, whole texts" in said
    # What a layer reads of a whole prompt is something else when the prompt comes in pieces.
    assert ("greedy token, token by token" in said) != bool(options.get("stateless"))
    drafts = [one.what for one in report.comparisons if one.where == "exact"]
    assert len(drafts) == 1 + ("adapter" in options)


@pytest.mark.parametrize(
    "sample,change,where",
    [
        ("exit_2/logits", 0.25, "exit_2: logits, "),
        ("exit_1/token", 1, "exit_1: greedy token, "),
        ("exit_4/margin", 0.25, "exit_4: score margin, "),
        ("encoder_2/encoder_state", 0.25, "encoder_2: encoder_state, "),
        ("encoder_1/saturation", 0.25, "encoder_1: score saturation, "),
        ("unsplit/logits", 0.25, "unsplit: logits, whole texts"),
    ],
)
def test_check_names_what_differs_when_a_model_writes(
    sample: str, change: float, where: str, tmp_path: Path
) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_decoder_toy(make_decoder_toy(encoder=True), writer.folder)
        change_sample(writer.folder, sample, change)
        bundle = writer.commit(manifest)
    with load(bundle) as model:
        failed = [f"{c.where}: {c.what}" for c in check(model).comparisons if not c.passed]
    assert any(one.startswith(where) for one in failed)


def test_check_takes_a_token_that_is_as_likely_as_the_next(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_decoder_toy(make_decoder_toy(), writer.folder)
        change_sample(writer.folder, "exit_1/token", 1)
        change_sample(writer.folder, "exit_1/gap", -1e6)
        bundle = writer.commit(manifest)
    with load(bundle) as model:
        check(model).require()


def test_check_compares_exits_and_decisions_of_earlier_chains(tmp_path: Path) -> None:
    policy = Policy(rules={"front": Rule(thresholds=0.6), "back": Rule(thresholds=0.5)})
    with load(write_two_chains(tmp_path / "bundle")) as model:
        before = model.policy
        report = check(model, policy=policy)
        assert model.policy is before
    report.require()
    compared = [(one.where, one.what) for one in report.comparisons]
    assert ("front_1", "h1, rows alone") in compared
    assert ("front_2", "score entropy, batch of 4") in compared
    assert ("unsplit", "h1, batch of 4") in compared
    assert compared.count(("decisions", "exit taken (margin at its median, 3 rows)")) == 2
    assert compared.count(("decisions", "exit taken (the given policy, 3 rows)")) == 2


def test_check_names_an_earlier_exit_when_its_score_is_wrong(tmp_path: Path) -> None:
    whole = write_two_chains(tmp_path / "whole")
    with BundleWriter(tmp_path / "bundle") as writer:
        shutil.copytree(whole.path, writer.folder, dirs_exist_ok=True)
        (writer.folder / "manifest.json").unlink()
        change_sample(writer.folder, "front_1/max_prob", -0.5)
        bundle = writer.commit(whole.manifest)
    with load(bundle) as model:
        failed = {one.where for one in check(model).comparisons if not one.passed}
    assert failed == {"front_1", "front_2"}  # rows that stayed by the changed score leave by it


def test_check_notes_that_a_chain_has_no_unsplit_graph(toy: Toy, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_toy(toy, writer.folder)
        (writer.folder / "graphs/unsplit.onnx").unlink()
        chain = msgspec.structs.replace(manifest.chains["forward"], unsplit=[])
        components = {k: v for k, v in manifest.components.items() if k != "unsplit"}
        manifest = msgspec.structs.replace(
            manifest, chains={"forward": chain}, components=components, files={}
        )
        bundle = writer.commit(manifest)
    with load(bundle) as model:
        report = check(model)
    assert report.passed
    assert report.notes == ["the unsplit graphs were not compared: the chain forward has none"]


def encoder_policy(encoder: float, decoder: float = np.inf) -> Policy:
    rules = {
        "encoder": Rule(score="saturation", thresholds=encoder),
        "decoder": Rule(thresholds=decoder),
    }
    return Policy(rules=rules)


@pytest.mark.parametrize("threshold", [-np.inf, 0.6, np.inf])
def test_check_holds_under_a_policy_that_leaves_the_encoder_early(
    threshold: float, tmp_path: Path
) -> None:
    policy = encoder_policy(threshold, decoder=0.4)
    bundle = write_decoder_toy(make_decoder_toy(encoder=True), tmp_path / "bundle")
    with load(bundle, policy=policy, all_scores=True) as model:
        report = check(model, policy=policy)
        assert model.policy == policy
    report.require()
    assert not report.notes
    compared = {(one.where, one.what) for one in report.comparisons}
    assert ("exit_4", "logits, whole texts, encoder: all at encoder_1") in compared
    assert ("exit_1", "greedy token, whole texts, encoder: all at encoder_2") in compared
    assert ("exit_2", "logits, whole texts, encoder: saturation at its median") in compared
    assert ("exit_4", "logits, whole texts, encoder: the given policy") in compared
    assert ("decisions", "exit taken (the given policy, 21 tokens)") in compared
    assert ("fast", "first token of 3 texts, the given policy") in compared
    drafted = "3 texts of 8 tokens drafted by exit_1, as full, the given policy"
    assert (("exact", drafted) in compared) == np.isfinite(threshold) or threshold < 0


@pytest.mark.parametrize("options", [{}, {"adapter": 1}, {"prefix": True}, {"stateless": True}])
def test_check_compares_the_tokens_that_a_policy_takes(options: dict, tmp_path: Path) -> None:
    toy = make_decoder_toy(**options)
    bundle = write_decoder_toy(toy, tmp_path / "bundle")
    policy = toy_policy(toy, {"exit_1": 0.4, "exit_2": 0.4, "vision_1": 0.5})
    with load(bundle, policy=policy) as model:
        report = check(model, policy=policy)
    report.require()
    where = {one.where for one in report.comparisons if "given policy" in one.what}
    assert {"decisions", "fast"} <= where


def test_check_says_what_a_policy_that_drops_tokens_leaves_out(tmp_path: Path) -> None:
    toy = make_decoder_toy(gate=True, prefix=True)
    policy = toy_policy(toy, {"gate": 0.0, "exit_1": 0.4})
    with load(write_decoder_toy(toy, tmp_path / "bundle"), policy=policy) as model:
        report = check(model, policy=policy)
    report.require()
    assert report.notes == [
        "tokens of mode fast were not compared: the policy may drop tokens at gate"
    ]


@pytest.mark.parametrize(
    "sample,change,where",
    [
        ("encoder_1/exit_2/logits", 0.25, "exit_2: logits, whole texts, encoder: all at encoder_1"),
        ("encoder_2/exit_1/token", 1, "exit_1: greedy token, whole texts, encoder: all at"),
    ],
)
def test_check_names_what_differs_behind_an_exit_of_the_encoder(
    sample: str, change: float, where: str, tmp_path: Path
) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_decoder_toy(make_decoder_toy(encoder=True), writer.folder)
        change_sample(writer.folder, sample, change)
        bundle = writer.commit(manifest)
    with load(bundle) as model:
        failed = [f"{c.where}: {c.what}" for c in check(model).comparisons if not c.passed]
    assert failed and failed[0].startswith(where)


def test_check_notes_what_a_bundle_has_no_reference_for(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_decoder_toy(make_decoder_toy(encoder=True), writer.folder)
        change_sample(writer.folder, "encoder_1/exit_4/logits", None)
        bundle = writer.commit(manifest)
    with load(bundle) as model:
        report = check(model)
    report.require()
    assert any("(all at encoder_1) were not compared: the bundle" in n for n in report.notes)


@pytest.mark.parametrize("sample", ["exit_1/max_prob", "exit_2/token"])
def test_check_notices_a_token_that_leaves_elsewhere(sample: str, tmp_path: Path) -> None:
    """The exits' own comparisons notice it, too; these are the decisions and the mode's token."""
    toy = make_decoder_toy()
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_decoder_toy(toy, writer.folder)
        change_sample(writer.folder, sample, -1 if "token" in sample else -0.9)
        bundle = writer.commit(manifest)
    with load(bundle) as model:
        report = check(model, policy=toy_policy(toy, {"exit_1": 0.5, "exit_2": 0.0}))
    failed = {one.where for one in report.comparisons if not one.passed}
    assert ("decisions" if "prob" in sample else "fast") in failed


def test_flips_are_those_of_the_precision_where_the_policy_leaves_the_encoder_early(
    tmp_path: Path,
) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_decoder_toy(make_decoder_toy(encoder=True), writer.folder)
        shutil.copy(writer.folder / "samples/reference.npz", writer.folder / "samples/float32.npz")
        samples = [*manifest.samples, "samples/float32.npz"]
        bundle = writer.commit(msgspec.structs.replace(manifest, samples=samples))
    policy = encoder_policy(-np.inf, decoder=0.4)
    with load(bundle, policy=policy, all_scores=True) as model:
        flips = count_flips(model, policy)
        assert model.policy == policy
    assert [one.answers for one in flips] == [0, 0, 0]
    assert all(one.score < 1e-4 for one in flips)
