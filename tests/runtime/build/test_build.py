"""Real engines, built by TensorRT-RTX for desktop GPUs on a machine that needs none."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import EngineError
from edgeexit.runtime.build.build import (
    Options,
    build_engines,
    estimate,
    made_from,
    missing_works,
)
from edgeexit.runtime.build.profiles import Asked
from edgeexit.runtime.build.work_list import Work, sample_sizes, work_of
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.library import Library, find_library
from tests.decoder_toys import make_decoder_toy, write_decoder_toy
from tests.toys import Toy, fill_toy, write_toy

NOTHING = Asked({}, {}, {})
SM86 = {"ahead_of_time": True, "compute_capability": 86}
PLAIN: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx")
    return find_library(rtx=True)


def test_every_component_and_the_baseline_become_engines_once(
    toy_bundle: Bundle, rtx: Library, tmp_path: Path
) -> None:
    works = work_of(toy_bundle.manifest, rtx.features, NOTHING, sample_sizes(toy_bundle))
    assert [work.where for work in works] == ["s0", "s1", "s2", "s3", "unsplit"]
    told: list[tuple[int, int]] = []
    folder, made = build_engines(
        toy_bundle, works, rtx, SM86, tmp_path, progress=lambda _, done, of: told.append((done, of))
    )
    assert engine_cache.read_index(folder) == made
    engine_cache.check_plans(folder, made)
    assert made.bundle == toy_bundle.digest and made.made_from["version"] == rtx.version
    for work, plan in zip(works, made.plans, strict=True):
        assert plan.graph == work.variant.graph and plan.outputs == list(work.outputs)
        assert [profile["shift"] for profile in plan.profiles] == [[[1, 1], [1, 1], [8, 1]]]
        assert set(plan.precision["MATRIX_MULTIPLY"]) == {"FLOAT"}
        assert plan.seconds > 0 and plan.peak_memory_bytes > plan.bytes
    assert told[-1][0] == told[-1][1] and [done for done, _ in told[:-1]] == sorted(
        done for done, _ in told[:-1]
    )
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build_engines(toy_bundle, works, rtx, SM86, tmp_path) == (folder, made)
    newer = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    index = folder / engine_cache.INDEX
    assert newer.pop(index) > times.pop(index)  # the set that was requested last
    assert newer == times
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".json", *[".plan"] * 5]


def test_what_building_takes_is_known_beforehand_to_a_factor_of_three(
    toy_bundle: Bundle, rtx: Library, tmp_path: Path
) -> None:
    works = work_of(toy_bundle.manifest, rtx.features, NOTHING, {})
    expected = estimate(toy_bundle, works, rtx)
    assert expected is not None
    _, made = build_engines(toy_bundle, works, rtx, SM86, tmp_path)
    most = max(plan.peak_memory_bytes for plan in made.plans)
    assert most / 3 < expected.peak_memory_bytes < 3 * most
    assert expected.seconds > len(works) * 0.5  # each starts a process
    assert estimate(toy_bundle, works, Library("tensorrt", None, "10.3.0")) is None


def test_a_build_goes_on_where_it_stopped(toy_bundle: Bundle, rtx: Library, tmp_path: Path) -> None:
    works = work_of(toy_bundle.manifest, rtx.features, NOTHING, {}, unsplit=False)

    def stop(what: str, done: int, of: int) -> None:
        if what == "s2 (3 of 4)":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(toy_bundle, works, rtx, SM86, tmp_path, progress=stop)
    [folder] = tmp_path.glob("*/*")
    assert engine_cache.list_engines(tmp_path, toy_bundle.digest) == []
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.plan")}
    assert set(first) == {"s0.plan", "s1.plan"}
    # What was torn, or is not what was noted, is built again.
    (folder / "s1.plan").write_bytes((folder / "s1.plan").read_bytes()[:-1])
    again, made = build_engines(toy_bundle, works, rtx, SM86, tmp_path)
    assert again == folder and len(made.plans) == 4
    assert (folder / "s0.plan").stat().st_mtime_ns == first["s0.plan"]
    assert (folder / "s1.plan").stat().st_mtime_ns > first["s1.plan"]
    engine_cache.check_plans(folder, made)


@pytest.mark.parametrize("damage", ["gone", "torn", "other", "index", "foreign"])
def test_what_is_damaged_is_built_again(
    damage: str, toy_bundle: Bundle, rtx: Library, tmp_path: Path
) -> None:
    works = work_of(toy_bundle.manifest, rtx.features, NOTHING, {}, unsplit=False)[:2]
    folder, made = build_engines(toy_bundle, works, rtx, SM86, tmp_path)
    missing = functools.partial(missing_works, toy_bundle, works, rtx, SM86, tmp_path, Options())
    assert missing() == []
    (folder / engine_cache.SIGNATURE).write_text("of the plans as they were")
    plan, index = folder / "s1.plan", folder / engine_cache.INDEX
    raw = plan.read_bytes()
    if damage == "gone":
        plan.unlink()
    elif damage == "torn":
        plan.write_bytes(raw[:-1])
    elif damage == "other":
        plan.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "index":
        index.write_bytes(b"{}")
    else:  # what was built for somebody else's bundle
        index.write_bytes(index.read_bytes().replace(made.bundle.encode(), b"0" * 64))
    whole = 0 if damage in ("index", "foreign") else 1
    assert missing() == works[whole:]
    first = (folder / "s0.plan").stat().st_mtime_ns
    again, mended = build_engines(toy_bundle, works, rtx, SM86, tmp_path)
    assert (again, mended.bundle) == (folder, toy_bundle.digest)
    engine_cache.check_plans(folder, engine_cache.read_index(folder))
    assert ((folder / "s0.plan").stat().st_mtime_ns == first) == bool(whole)
    assert not (folder / engine_cache.SIGNATURE).exists()


def test_the_worker_imports_nothing_from_the_current_directory(
    toy_bundle: Bundle, rtx: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("msgspec", "json", "edgeexit"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from where we are')")
    monkeypatch.chdir(tmp_path)
    works = work_of(toy_bundle.manifest, rtx.features, NOTHING, {}, unsplit=False)[:1]
    _, made = build_engines(toy_bundle, works, rtx, SM86, tmp_path / "engines")
    assert len(made.plans) == 1


def test_a_disk_that_is_full_is_said_to_be_full(toy_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = f"ulimit -f 100; exec {sys.executable} -m edgeexit build {toy_bundle.path} " + (
        f"--target sm86 -o {tmp_path / 'engines'}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "s0: " in done.stderr, done.stderr
    assert "the disk is full" in done.stderr and "Free some space" in done.stderr
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "change", ["weights", "profile", "library", "version", "target", "option", "outputs"]
)
def test_one_changed_thing_makes_another_key(
    change: str, toy: Toy, toy_bundle: Bundle, tmp_path: Path
) -> None:
    library = Library("tensorrt_rtx", None, "1.7.1")
    works = work_of(toy_bundle.manifest, PLAIN, NOTHING, {})
    bundle, target, options = toy_bundle, SM86, Options()
    before = engine_cache.key_of(made_from(bundle, works, library, target, options))
    if change == "weights":
        weights = toy.layers[0][0].copy()
        weights[0, 0] = np.nextafter(weights[0, 0], np.float32(9))
        other = Toy([(weights, toy.layers[0][1]), *toy.layers[1:]])
        bundle = write_toy(other, tmp_path / "other")
        graphs = [
            {k: v.sha256 for k, v in b.manifest.files.items() if k.endswith(".onnx")}
            for b in (bundle, toy_bundle)
        ]
        assert graphs[0] == graphs[1]
    elif change == "profile":
        works = work_of(toy_bundle.manifest, PLAIN, Asked({}, {}, {"batch": 9}), {})
    elif change == "library":
        library = Library("tensorrt", None, "1.7.1")
    elif change == "version":
        library = Library("tensorrt_rtx", None, "1.7.2")
    elif change == "target":
        target = {"ahead_of_time": True, "compute_capability": 89}
    elif change == "option":
        options = Options(opt_level=2)
    else:
        works = works[:-1]
    assert engine_cache.key_of(made_from(bundle, works, library, target, options)) != before


def test_a_refused_node_is_named_with_its_component_and_module(
    toy: Toy, rtx: Library, tmp_path: Path
) -> None:
    with BundleWriter(tmp_path / "odd") as writer:
        manifest = fill_toy(toy, writer.folder)
        path = writer.folder / "graphs/s1.onnx"
        model = onnx.load(path, load_external_data=False)
        [node] = [node for node in model.graph.node if node.op_type == "Tanh"]
        node.op_type, node.domain, node.name = "Strange", "com.example", "layers.1.act/Strange_3"
        model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
        path.write_bytes(model.SerializeToString())
        bundle = writer.commit(manifest)
    works = work_of(bundle.manifest, rtx.features, NOTHING, {}, unsplit=False)
    with pytest.raises(EngineError) as refused:
        build_engines(bundle, works, rtx, SM86, tmp_path / "engines")
    text = str(refused.value)
    for part in ("s1 (graphs/s1.onnx)", "layers.1.act/Strange_3 (Strange", "module layers.1.act"):
        assert part in text
    assert len(list((tmp_path / "engines").glob("*/*/*.plan"))) == 1  # s0 is kept


@pytest.fixture(scope="module")
def decoder(decoder_bundle: Callable[[str], Bundle]) -> Bundle:
    return decoder_bundle("llama")


def test_a_decoder_in_float32_has_engines_for_steps_and_prefill(
    decoder: Bundle, rtx: Library, tmp_path: Path
) -> None:
    asked = Asked({}, {}, {"batch": 4}, capacity=64)
    works = work_of(decoder.manifest, rtx.features, asked, {}, chunk=32, unsplit=False)
    assert {work.variant.states for work in works} == {"append"}
    wheres = [work.where for work in works]
    assert _head(decoder) in wheres and any(where.startswith("projection of") for where in wheres)
    first = works[0]
    assert [p["embedded"] for p in first.profiles] == [
        ((1, 1, 64), (1, 1, 64), (4, 16, 64)),
        ((1, 1, 64), (1, 32, 64), (4, 32, 64)),
    ]
    assert first.profiles[0]["lengths/past"] == ((1,), (1,), (4,))
    _, made = build_engines(decoder, works, rtx, SM86, tmp_path)
    assert all(set(p.precision["MATRIX_MULTIPLY"]) == {"FLOAT"} for p in made.plans)


def test_libraries_that_tune_get_rows_in_buckets(
    toy_bundle: Bundle, decoder: Bundle, rtx: Library, tmp_path: Path
) -> None:
    def rows(work: Work, name: str) -> list[tuple[int, ...]]:
        return [tuple(shape[0] for shape in profile[name]) for profile in work.profiles]

    sizes = sample_sizes(toy_bundle)
    works = work_of(toy_bundle.manifest, PLAIN, NOTHING, sizes, tunes=True)
    assert all(rows(work, "shift") == [(1, 1, 2), (3, 4, 4), (5, 8, 8)] for work in works)
    usual = Asked({}, {"batch": 4}, {})
    for work in work_of(toy_bundle.manifest, PLAIN, usual, sizes, tunes=True):
        assert rows(work, "shift") == [(1, 4, 8)]
    _, made = build_engines(toy_bundle, works[:1], rtx, SM86, tmp_path)
    assert [profile["shift"][2][0] for profile in made.plans[0].profiles] == [2, 4, 8]
    asked = Asked({}, {}, {"batch": 4}, capacity=64)
    first, *others = work_of(decoder.manifest, PLAIN, asked, {}, chunk=32, tunes=True)
    assert rows(first, "embedded") == [(1, 1, 2), (3, 4, 4), (1, 1, 4)]
    (head,) = (work for work in others if work.where == _head(decoder))
    assert rows(head, next(iter(head.profiles[0]))) == [(1, 1, 2), (3, 64, 64)]
    projections = [one for one in others if one.where.startswith("projection of")]
    assert projections and all(len(work.profiles) == 1 for work in projections)


@pytest.mark.parametrize("form", ["fixed", "append"])
def test_a_decoder_in_float16_computes_in_it(
    form: Any, half_decoder: Bundle, rtx: Library, tmp_path: Path
) -> None:
    asked = Asked({}, {}, {"batch": 2}, capacity=64)
    works = work_of(
        half_decoder.manifest, rtx.features, asked, {}, chunk=32, unsplit=False, form=form
    )[:1]
    assert works[0].variant.states == form
    assert works[0].fixed == ({"past": 64} if form == "fixed" else {})
    _, made = build_engines(half_decoder, works, rtx, SM86, tmp_path)
    [plan] = made.plans
    assert plan.precision["MATRIX_MULTIPLY"].get("HALF", 0) >= 7  # of its two layers' products


@pytest.mark.parametrize(
    "options",
    [{"encoder": True, "adapter": 1}, {"gate": True, "prefix": True, "stateless": True}],
    ids=["encoder", "gate"],
)
def test_every_component_of_a_program_that_writes_becomes_an_engine(
    options: dict[str, Any], rtx: Library, tmp_path: Path
) -> None:
    bundle = write_decoder_toy(make_decoder_toy(**options), tmp_path / "bundle")
    asked = Asked({}, {}, {"batch": 4})
    works = work_of(bundle.manifest, rtx.features, asked, sample_sizes(bundle), unsplit=False)
    chains = bundle.manifest.chains.values()
    unsplit = {name for chain in chains for name in chain.unsplit}
    assert {work.where for work in works} >= bundle.manifest.components.keys() - unsplit
    _, made = build_engines(bundle, works, rtx, SM86, tmp_path / "engines")
    assert len(made.plans) == len(works)


def _head(bundle: Bundle) -> str:
    """The component that all exits of a decoder share."""
    return bundle.manifest.last_chain.stops[0].path[-1].component
