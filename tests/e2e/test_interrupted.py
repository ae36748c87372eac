"""Exports that do not come to their end: Ctrl-C, a full disk, a second one to the same place."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from edgeexit.bundle.reader import open_bundle
from tests.e2e.conftest import Cli

PATIENCE_S = 300


@pytest.fixture
def quiet_cli(cli: Cli) -> Cli:
    """Without caches of compiled modules, so that the folder shows only what an export leaves."""
    cli.environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    return cli


def wait_for_partial(folder: Path, process: subprocess.Popen[str]) -> None:
    """Waits until an export has begun to write."""
    end = time.monotonic() + PATIENCE_S
    while not list(folder.glob(".bundle.*.partial/graphs/*.onnx")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_export_leaves_nothing_when_it_is_interrupted(
    quiet_cli: Cli, torch_model: str, number: signal.Signals, code: int
) -> None:
    process = quiet_cli.start("export", "-m", torch_model, "-o", "bundle")
    wait_for_partial(quiet_cli.folder, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert out == ""
    assert left_in(quiet_cli.folder) == ["user_model.py"]


def test_export_leaves_nothing_when_the_disk_is_full(quiet_cli: Cli, torch_model: str) -> None:
    """A limit on file sizes stands in for the disk: the weights do not fit, the graphs do."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ran = quiet_cli("export", "-m", torch_model, "-o", "bundle", preexec_fn=limit)
    assert ran.code == 1, ran.err
    assert "Traceback" not in ran.err
    assert "bundle: the disk is full; no partial files remain. Free some space" in ran.err
    assert left_in(quiet_cli.folder) == ["user_model.py"]


def test_one_export_wins_when_two_go_to_the_same_place(quiet_cli: Cli, torch_model: str) -> None:
    both = [quiet_cli.start("export", "-m", torch_model, "-o", "bundle") for _ in range(2)]
    done = [process.communicate(timeout=PATIENCE_S) for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 2], done
    loser = done[0] if both[0].returncode else done[1]
    assert "error: bundle" in loser[1]
    assert "--overwrite" in loser[1]
    assert "Traceback" not in loser[1]
    open_bundle(quiet_cli.folder / "bundle", verify="full")
    assert left_in(quiet_cli.folder) == ["bundle", "user_model.py"]


def test_trace_leaves_nothing_when_the_disk_is_full(
    quiet_cli: Cli, toy_bundle: object, toy_data: Path
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))

    path = toy_bundle.path  # type: ignore[attr-defined]
    ran = quiet_cli("trace", path, "--data", toy_data, "-o", "trace.npz", preexec_fn=limit)
    assert ran.code == 1, ran.err
    assert "trace.npz: cannot be written (File too large); no partial file remains" in ran.err
    assert os.listdir(quiet_cli.folder) == [toy_data.name]
