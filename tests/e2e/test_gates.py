"""Gates on the command line: from a trace to a policy to an answer; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from tests.decoder_toys import batch_inputs, make_decoder_toy, make_rows, write_decoder_toy
from tests.e2e.conftest import Ran
from tests.vision_models import make_images

Run = Callable[..., Ran]
THREADS = ["--threads", "1"]  # other tests of this process load models, too


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Questions about two images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(make_images(2)):
        image.save(f"{number}.png")
    lines = [{"image": f"{n % 2}.png", "prompt": f"{'what ' * n}is it?"} for n in range(4)]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_gates_are_traced_calibrated_and_asked(
    run_here: Run, gated_bundle: Callable[[str], Bundle], folder: Path
) -> None:
    bundle = str(gated_bundle("llava").path)
    given = ["trace", bundle, "--data", "questions.jsonl", "--max-new-tokens", "3", *THREADS]
    traced = run_here(*given, "--gates", "-o", "trace.npz")
    assert traced.code == 0 and "4 prompts, answered at every exit, 3 exits" in traced.out, traced
    made = run_here("calibrate", "trace.npz", "--max-risk", "99%", "-o", "policy.json")
    assert made.code == 0 and "AUROC gate" in made.out, made
    rules = json.loads(Path("policy.json").read_text())["rules"]
    assert set(rules["main"]["thresholds"]) == {"gate_1", "gate_3"}
    ask = ["run", bundle, "--image", "0.png", "--prompt", "is it?", "--max-new-tokens", "3"]
    ask += THREADS
    for options in (["--policy", "policy.json"], ["--gate-threshold", "0.000001"]):
        asked = run_here(*ask, *options, "--json")
        assert asked.code == 0, asked
        said = asked.json["statistics"]
        assert list(said["dropped"].values())[-1] == [True]
        assert all(0 < score < 1 for [score] in said["gates"].values())
    spoken = run_here(*ask, "--gate-threshold", "1")
    assert "gate_1 0." in spoken.err and "tokens kept" in spoken.err, spoken


def test_invalid_options_are_refused(
    run_here: Run,
    gated_bundle: Callable[[str], Bundle],
    vision_bundle: Callable[[str], Bundle],
    folder: Path,
) -> None:
    bundle, plain = str(gated_bundle("llava").path), str(vision_bundle("llava").path)
    trace = ["trace", bundle, "--data", "questions.jsonl", "-o", "trace.npz", *THREADS]
    ask = ["run", bundle, "--image", "0.png", "--prompt", "is it?", *THREADS]
    for arguments, code, message in (
        ([*trace, "--gates", "--chain", "vision"], 2, "--gates and --chain exclude each other"),
        ([*trace, "--gates", "--batch-size", "2"], 2, "answers are written one prompt at a time"),
        ([*trace, "--max-new-tokens", "4"], 2, "nothing is written for this trace"),
        ([*ask, "--gate-threshold", "2"], 2, "--gate-threshold 2 is out of range (0 to 1)"),
        (["run", plain, *ask[2:], "--gate-threshold", "0.5"], 2, "the bundle has no gates"),
    ):
        ran = run_here(*arguments)
        assert ran.code == code and message in ran.err, ran
        assert not Path("trace.npz").exists()


def test_an_encoder_is_traced_without_targets(run_here: Run, tmp_path: Path) -> None:
    """Its prompts have no answers beside them; the model writes these."""
    toy = make_decoder_toy(encoder=True)
    bundle, data = write_decoder_toy(toy, tmp_path / "bundle").path, tmp_path / "prompts.npz"
    np.savez(data, **batch_inputs(make_rows(toy, [9, 9])))  # type: ignore[arg-type]
    given = ["trace", str(bundle), "--data", str(data), "--chain", "encoder", *THREADS]
    made = run_here(*given, "--max-new-tokens", "3", "-o", str(tmp_path / "trace.npz"))
    assert made.code == 0 and "2 prompts, answered at every exit, 3 exits" in made.out, made
