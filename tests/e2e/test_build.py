"""TensorRT engines on the command line: ahead of time, signed, imported, interrupted."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from edgeexit.bundle.reader import Bundle
from tests.e2e.conftest import Cli

pytest.importorskip("tensorrt_rtx")
NO_DRIVER = pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="there is an NVIDIA driver"
)


def test_engines_are_built_signed_and_imported(
    cli: Cli, toy_bundle: Bundle, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me", "-f", str(key)]
    subprocess.run(command, check=True)
    bundle, engines = toy_bundle.path, tmp_path / "engines"
    made = cli(
        *("build", bundle, "--target", "sm86,8.9,sm120", "--max-shapes", "x:4x6", "--json"),
        *("-o", engines, "--sign", key),
    )
    assert made.code == 0, made.err
    sets = made.json["engines"]
    assert [one["for"] for one in sets] == ["sm86", "sm89", "sm120"]
    assert len({one["key"] for one in sets}) == 3
    assert all(len(one["plans"]) == 5 for one in sets)
    signers = tmp_path / "signers"
    signers.write_text(f"me {key.with_suffix('.pub').read_text()}")
    taken = ("build", bundle, "--import", engines, "--engine-dir", tmp_path / "cache", "--json")
    refused = cli(*taken)
    assert refused.code == 1 and "--allowed-signers" in refused.err
    assert not (tmp_path / "cache").exists()
    came = cli(*taken, "--allowed-signers", signers)
    assert came.code == 0 and [one["key"] for one in came.json["engines"]] == sorted(
        one["key"] for one in sets
    )
    cli.environment["EDGEEXIT_ENGINE_DIR"] = str(tmp_path / "cache")
    shown = cli("inspect", bundle, "--json").json["engines"]
    assert sorted(one["for"] for one in shown) == ["sm120", "sm86", "sm89"]
    assert "sm86, tensorrt_rtx" in cli("inspect", bundle).out
    del cli.environment["EDGEEXIT_ENGINE_DIR"]
    again = cli("build", bundle, "--target", "sm86", "--max-shapes", "x:4x6", "-o", engines)
    assert again.code == 0 and "s0.onnx" in again.out
    assert "nothing built" in again.out and again.err == ""
    new = cli("build", bundle, "--target", "sm86", "--max-shapes", "x:2x6", "-o", engines)
    assert new.code == 0 and "5 built" in new.out
    assert "of memory" in new.err  # said before anything is built


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--target", "orin", "-o", "e"], 2, "not a compute capability"),
        (["--target", "sm87", "-o", "e"], 2, "Jetson Orin can only be built on the Jetson"),
        (["--target", "sm110", "-o", "e"], 2, "Jetson Thor can only be built on the Jetson"),
        (["--target", "sm90", "-o", "e"], 2, "cannot build for it without that GPU"),
        (["--target", "sm86"], 2, "--target and -o require each other"),
        (["-o", "e"], 2, "--target and -o require each other"),
        (["--sign", "key"], 2, "Add --target and -o"),
        (["--target", "sm86", "-o", "e", "--sign", "key"], 2, "key not found"),
        (["--trust"], 2, "Add --import DIR"),
        (["--import", "none"], 2, "there are no engines"),
        (["--import", "none", "--target", "sm86"], 2, "--target cannot be used with --import"),
        (["--target", "sm86", "-o", "e", "--max-shapes", "y:1x6"], 2, "no input 'y'"),
        (["--target", "sm86", "-o", "e", "--max-shapes", "x:1"], 2, "x has 2 axes, not 1"),
        (["--target", "sm86", "-o", "e", "--memory-limit", "1"], 2, "Give it as 512MiB"),
        (["--target", "sm86", "-o", "e", "--memory-limit", f"{'9' * 400}GiB"], 2, "512MiB"),
        (["--target", "sm86", "-o", "e", "--max-shapes", f"x:{'9' * 5000}x6"], 2, "digits"),
        (["--target", "sm\u00b2", "-o", "e"], 2, "not a compute capability"),
        (["--target", "sm86", "-o", "e", "--engine-dir", "d"], 2, "-o and --engine-dir exclude"),
        (["--import", "none", "--opt-level", "0"], 2, "--opt-level cannot be used with --import"),
        (
            ["--target", "sm86", "-o", "e", "--timing-cache", "t"],
            2,
            "TensorRT-RTX has no timing cache",
        ),
        (["--target", "sm86", "-o", "e", "--capacity", "9"], 2, "for models that write text"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_writes_nothing(
    cli: Cli, toy_bundle: Bundle, arguments: list[str], code: int, message: str
) -> None:
    ran = cli("build", toy_bundle.path, *arguments)
    assert ran.code == code and message in ran.err, ran.err
    assert not (cli.folder / "e").exists()


@NO_DRIVER
def test_building_for_this_device_needs_a_driver(cli: Cli, toy_bundle: Bundle) -> None:
    ran = cli("build", toy_bundle.path, "--engine-dir", "cache")
    assert ran.code == 1 and "no NVIDIA driver" in ran.err and "--target" in ran.err


@pytest.mark.parametrize("victim", ["worker", "build"])
def test_a_killed_build_says_why_and_goes_on_later(
    cli: Cli, toy_bundle: Bundle, victim: str
) -> None:
    arguments = ("build", toy_bundle.path, "--target", "sm86", "-o", "engines")
    process = cli.start(*arguments)
    parent, deadline = psutil.Process(process.pid), time.monotonic() + 60
    while not list(cli.folder.glob("engines/*/*/s1.plan.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children: list[psutil.Process] = []
    while not children and time.monotonic() < deadline:
        children = parent.children()
    (children[0] if victim == "worker" else parent).kill()
    _, complaint = process.communicate(timeout=60)
    if victim == "worker":
        assert process.returncode == 1
        assert (
            "the build was killed (signal 9); the usual cause is that memory ran out." in complaint
        )
        assert "--memory-limit" in complaint
    first = next(cli.folder.glob("engines/*/*/s0.plan")).stat().st_mtime_ns
    again = cli(*arguments)
    assert again.code == 0, again.err
    assert next(cli.folder.glob("engines/*/*/s0.plan")).stat().st_mtime_ns == first
