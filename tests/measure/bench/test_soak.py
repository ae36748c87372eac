"""Drift over a long run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.cli.bench_notes import print_more
from edgeexit.errors import UsageError
from edgeexit.measure.bench import soak
from edgeexit.measure.bench.bench import Options, bench
from tests.toys import make_inputs


def test_windows_cover_the_run(
    toy_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(soak, "SHORTEST_S", 0.2)
    np.savez(tmp_path / "rows.npz", **make_inputs(20))
    options = Options(data=tmp_path / "rows.npz", seconds=0.2, threads="blocking", soak_s=2.0)
    result = bench(toy_bundle, options)
    found = result["soak"]
    windows = found["windows"]
    assert found["case"] == "natural" and found["seconds"] >= 2 and result["energy"] is None
    assert 2 <= len(windows) <= 11
    assert sum(own["runs"] for own in windows) == found["runs"]
    starts = [own["from_s"] for own in windows]
    assert starts == sorted(starts) and starts[0] < 0.1
    assert all(own["p50_ms"] > 0 and own["state"]["unknown"] is not None for own in windows)
    assert found["drift"] == pytest.approx(windows[-1]["p50_ms"] / windows[0]["p50_ms"], rel=1e-3)
    print_more(result)
    assert "soak, natural" in capsys.readouterr().out


def test_drift_is_warned_of() -> None:
    assert soak.doubts({"drift": 1.04}) == []
    assert "20% slower" in soak.doubts({"drift": 1.2})[0]
    assert "10% faster" in soak.doubts({"drift": 0.9})[0]


def test_a_soak_has_a_length(toy_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="--soak 0.5s is out of range"):
        bench(toy_bundle, Options(soak_s=0.5))
