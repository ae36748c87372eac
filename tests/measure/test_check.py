"""`check` passes on what is right and fails, naming the exit, on each thing that can be wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import BundleError, CheckError, PolicyError
from edgeexit.measure.check import check, describe, tolerances
from edgeexit.runtime import Policy, load
from tests.toys import Toy, fill_toy, make_toy, write_toy


def spoilt_toy(toy: Toy, output: Path, *, sample: str, change: float | None) -> Bundle:
    """A bundle that is whole, with one reference changed, or taken out (None)."""
    with BundleWriter(output) as writer:
        manifest = fill_toy(toy, writer.folder)
        path = writer.folder / "samples/reference.npz"
        with np.load(path) as file:
            arrays = dict(file)
        if change is None:
            del arrays[sample]
        else:
            arrays[sample] = arrays[sample] + np.float32(change)
        np.savez(path, **arrays)
        return writer.commit(manifest)


def test_check_passes_and_restores_the_policy_when_a_bundle_is_right(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model:
        before = Policy(thresholds=0.5)
        model.policy = before
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
    with load(bundle) as model:
        assert check(model, atol=0.3).passed
        assert not check(model, atol=0.2, rtol=0).passed


def test_check_fails_when_the_reference_is_nan(toy: Toy, tmp_path: Path) -> None:
    bundle = spoilt_toy(toy, tmp_path / "bundle", sample="exit_2/logits", change=np.nan)
    with load(bundle) as model, pytest.raises(CheckError, match="exit_2"):
        check(model).require()


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
        Policy(thresholds=0.7, score="margin", patience=1),
        Policy(thresholds={"exit_2": -np.inf}, first="exit_2", last="exit_2"),
        Policy(thresholds=[0.9, 0.8, 0.7], first="exit_2"),
    ],
)
def test_check_compares_the_decisions_of_a_given_policy(policy: Policy, toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model:
        report = check(model, policy=policy)
    report.require()
    assert any("the given policy" in one.what for one in report.comparisons)


def test_check_refuses_a_policy_when_it_is_of_another_bundle(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model, pytest.raises(PolicyError, match="made for the bundle"):
        check(model, policy=Policy(bundle="0" * 64))


def test_check_notices_when_a_score_in_the_graph_is_wrong(toy: Toy, tmp_path: Path) -> None:
    """Exits swapped in the manifest: every tensor is right, and none is where it should be."""
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_toy(toy, writer.folder)
        (chain,) = manifest.chains.values()
        segments = list(chain.segments)
        leave = segments[1].exits[0]
        swapped = leave.scores | {
            "margin": leave.scores["entropy"],
            "entropy": leave.scores["margin"],
        }
        wrong = msgspec.structs.replace(leave, scores=swapped)
        segments[1] = msgspec.structs.replace(segments[1], exits=[wrong])
        chains = {"forward": msgspec.structs.replace(chain, segments=segments)}
        bundle = writer.commit(msgspec.structs.replace(manifest, chains=chains))
    with load(bundle) as model, pytest.raises(CheckError, match=r"exit_2: (score|exit taken)"):
        check(model).require()


def test_tolerances_follow_the_lowest_precision(toy_bundle: Bundle) -> None:
    assert tolerances(toy_bundle) == (1e-4, 1e-3)
    (variant,) = toy_bundle.manifest.unsplit
    half = msgspec.structs.replace(variant, precision="float16")
    manifest = msgspec.structs.replace(toy_bundle.manifest, unsplit=[half])
    assert tolerances(Bundle(toy_bundle.path, manifest, toy_bundle.digest)) == (2e-2, 2e-2)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_check_compares_preprocessing_when_the_exporter_left_a_sample(
    kind: str, request: pytest.FixtureRequest
) -> None:
    with load(request.getfixturevalue(f"{kind}_bundle")) as model:
        report = check(model)
    report.require()
    assert "preprocessing" in {one.where for one in report.comparisons}
