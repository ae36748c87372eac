"""`load`: the front door, with everything that can be wrong at it."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest

from edgeexit.bundle.manifest import Manifest
from edgeexit.bundle.reader import MANIFEST, Bundle, open_bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import BundleError, EngineError, PolicyError, UsageError
from edgeexit.runtime import Policy, Rule, load, write_policy
from edgeexit.runtime.load import check_capacity
from tests.bundle.test_reader import edit_graph
from tests.decoder_toys import batch_inputs, make_decoder_toy, make_rows, write_decoder_toy
from tests.toys import Toy, fill_toy, make_inputs


def write_changed(toy: Toy, output: Path, **changes: object) -> Bundle:
    """A bundle whose manifest differs from the toy's."""
    with BundleWriter(output) as writer:
        manifest: Manifest = msgspec.structs.replace(fill_toy(toy, writer.folder), **changes)
        return writer.commit(manifest)


def test_load_takes_a_path_a_string_and_an_opened_bundle(toy_bundle: Bundle) -> None:
    for path in (toy_bundle.path, str(toy_bundle.path), open_bundle(toy_bundle.path)):
        with load(path) as model:
            assert model.bundle.digest == toy_bundle.digest
            assert [leave.name for leave in model.exits] == ["exit_1", "exit_2", "exit_3", "exit_4"]


def of(**fields: object) -> Policy:
    """A policy with one rule."""
    return Policy(rules={"forward": Rule(**fields)})  # type: ignore[arg-type]


def policy_of(engine: dict[str, str]) -> Policy:
    """One that was calibrated on this engine."""
    return Policy(rules={"forward": Rule(thresholds=0.5)}, engine=engine)


def test_load_without_a_policy_sends_every_row_to_the_last_exit(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model:
        assert model.policy == of()
        assert set(model(make_inputs(5)).exit_names) == {"exit_4"}


def test_load_takes_a_policy_or_its_path(toy_bundle: Bundle, tmp_path: Path) -> None:
    policy = of(thresholds=[0.1, 0.2, 0.3], score="entropy")
    write_policy(policy, tmp_path / "policy.json")
    for given in (policy, tmp_path / "policy.json", str(tmp_path / "policy.json")):
        with load(toy_bundle, policy=given) as model:
            assert model.policy == policy
    with pytest.raises(PolicyError, match="policy is a float"):
        load(toy_bundle, policy=0.5)  # type: ignore[arg-type]


def test_load_refuses_an_unknown_engine(toy_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"no engine 'abacus'.*cpu, cuda"):
        load(toy_bundle, engine="abacus")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is here"
)
@pytest.mark.parametrize("engine", ["cuda", "tensorrt-provider"])
def test_load_names_the_remedy_when_the_provider_is_missing(
    toy_bundle: Bundle, engine: str
) -> None:
    with pytest.raises(EngineError, match=r"this onnxruntime has no .*edgeexit\[cuda\]"):
        load(toy_bundle, engine=engine)


def test_load_names_the_extra_when_onnxruntime_is_missing(toy_bundle: Bundle) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from edgeexit.runtime import load\n"
        "from edgeexit.errors import EngineError\n"
        "try:\n    load(sys.argv[1])\n"
        "except EngineError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(toy_bundle.path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 'pip install "edgeexit[cpu]"' in done.stdout


def test_load_refuses_a_component_without_a_usable_variant(toy: Toy, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_toy(toy, writer.folder)
        variants = manifest.components["s1"].variants
        variants[:] = [msgspec.structs.replace(variants[0], requires=["abacus"])]
        bundle = writer.commit(manifest)
    with pytest.raises(EngineError, match="s1 has no form for this engine"):
        load(bundle)


def test_load_names_the_graph_that_the_engine_refuses(toy_copy: Path) -> None:
    edit_graph(toy_copy, lambda model: setattr(model.graph.node[0], "op_type", "NoSuchOperator"))
    with pytest.raises(EngineError, match=r"graphs/s1\.onnx: ONNX Runtime .* cannot load it"):
        load(toy_copy)


def test_load_with_full_verification_hashes_the_weights(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeexit.bundle.reader.HASHED_AT_LOAD_BYTES", 0)
    data = bytearray((toy_copy / "graphs/weights.bin").read_bytes())
    data[0] ^= 1
    (toy_copy / "graphs/weights.bin").write_bytes(bytes(data))
    load(toy_copy).close()
    with pytest.raises(BundleError, match="sha256 differs"):
        load(toy_copy, verify="full")


def test_load_refuses_a_bundle_that_was_changed(toy_copy: Path) -> None:
    raw = json.loads((toy_copy / MANIFEST).read_text())
    raw["format"] = "3.0"
    (toy_copy / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="format is 3.0"):
        load(toy_copy)


def test_model_describes_what_executes_it(toy_bundle: Bundle) -> None:
    with load(toy_bundle, threads=1) as model:
        described = model.describe_engine()
    assert described["engine"] == "cpu"
    assert described["version"] == onnxruntime.__version__
    assert described["threads"] == "1"


def test_answers_match_the_samples_of_the_bundle(toy_bundle: Bundle) -> None:
    with np.load(toy_bundle.file("samples/reference.npz")) as sample, load(toy_bundle) as model:
        inputs = {n.removeprefix("input/"): sample[n] for n in sample if n.startswith("input/")}
        trace = model.trace(inputs)
        for leave, outputs in zip(model.exits, trace.outputs, strict=True):
            np.testing.assert_allclose(outputs["logits"], sample[f"{leave.name}/logits"], atol=1e-4)


@pytest.mark.parametrize("capacity, built, fixed, message", [
    (None, 64, True, None), (64, 64, True, None), (32, 64, False, None), (96, None, False, None),
    (97, None, False, r"\(2 to 96\)"), (1, None, False, r"\(2 to 96\)"),
    (65, 64, False, "built for at most 64 tokens. Leave .* --capacity 65"),
    (32, 64, True, "built for exactly 64 tokens"),
])  # fmt: skip
def test_a_capacity_out_of_range_is_refused(
    capacity: int | None, built: int | None, fixed: bool, message: str | None
) -> None:
    if message is None:
        check_capacity(capacity, 96, built, fixed=fixed)
        return
    with pytest.raises(UsageError, match=message):
        check_capacity(capacity, 96, built, fixed=fixed)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is an NVIDIA driver")
def test_another_engine_is_used_only_when_asked_for_and_says_so(
    toy_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EngineError):
        load(toy_bundle, "tensorrt")
    assert not caplog.records
    with load(toy_bundle, "tensorrt", fallback="cpu") as model, load(toy_bundle) as usual:
        about = model.describe_engine()
        assert about == usual.describe_engine() | {"instead_of": "tensorrt"}
        np.testing.assert_array_equal(
            model(make_inputs(3)).outputs["logits"], usual(make_inputs(3)).outputs["logits"]
        )
    (said,) = caplog.messages
    assert said.startswith("the engine tensorrt cannot be used, using cpu: ")
    assert re.search("no NVIDIA driver|cuda-bindings cannot be imported", said)
    with load(toy_bundle, "cpu", fallback="tensorrt") as model:
        assert "instead_of" not in model.describe_engine()
    with pytest.raises(EngineError):
        load(toy_bundle, "tensorrt", fallback="tensorrt")
    with pytest.raises(UsageError, match="no engine 'gpu'"):
        load(toy_bundle, "cpu", fallback="gpu")
    assert len(caplog.records) == 1


def test_what_is_wrong_with_the_bundle_is_not_fallen_back_from(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        load(tmp_path / "nowhere", "tensorrt", fallback="cpu")


def test_a_policy_of_another_engine_is_used_with_a_warning(
    toy_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with load(toy_bundle) as model:
        here = model.describe_engine()
    with load(toy_bundle, policy=policy_of(here)):
        assert not caplog.records
    there = {"engine": "tensorrt", "engines": "ab12", "library": "tensorrt", "version": "10.3.0"}
    with load(toy_bundle, policy=policy_of(there)):
        (said,) = caplog.messages
    assert "calibrated on tensorrt ab12, this is cpu" in said


def live_sessions() -> int:
    return sum(type(one) is onnxruntime.InferenceSession for one in gc.get_objects())


@pytest.mark.parametrize("unsplit", [False, True])
def test_closing_frees_the_engines_at_once(
    toy_bundle: Bundle, tmp_path: Path, unsplit: bool
) -> None:
    writer = write_decoder_toy(make_decoder_toy(encoder=True), tmp_path / "writer")
    rows = make_rows(make_decoder_toy(encoder=True), [4, 4])
    gc.collect()
    gc.disable()
    try:
        before = live_sessions()
        with load(toy_bundle, unsplit=unsplit) as model:
            model(make_inputs(3))
            assert live_sessions() > before
        assert live_sessions() == before
        with load(writer, unsplit=unsplit) as model:
            for count in (1, 2):  # a number of texts has a session of its own
                prompts = [row.prompt for row in rows[:count]]
                model.generate(
                    prompts, inputs=batch_inputs(rows[:count]), max_new_tokens=2
                ).finish()
            assert live_sessions() > before
        assert live_sessions() == before
    finally:
        gc.enable()
