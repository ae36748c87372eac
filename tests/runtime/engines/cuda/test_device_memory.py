"""Models whose tensors stay on the device, in memory that the host cannot touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeexit.bundle.reader import Bundle
from tests.runtime.engines.cuda import host_decoder_toys, host_gpu, host_tensorrt
from tests.runtime.engines.cuda.conftest import RunOnDriver, cases_of

ONE_PASS = [
    "rows_of_one_pass_cost_the_host_four_bytes_a_boundary",
    "a_row_leaves_where_it_should_though_segments_are_launched_ahead",
    "segments_are_launched_ahead_where_that_pays",
]


@pytest.mark.parametrize("name", [name for name in cases_of(host_gpu) if name not in ONE_PASS])
def test_decoders(
    name: str, run_on_driver: RunOnDriver, decoder_bundle: Callable[[str], Bundle]
) -> None:
    run_on_driver(host_gpu.__name__, name, str(decoder_bundle("llama").path))


@pytest.mark.parametrize("eager", [False, True], ids=["late", "at-once"])
@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass(
    name: str,
    eager: bool,
    run_on_driver: RunOnDriver,
    toy_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Streams that execute as late as possible, or at once."""
    if eager:
        monkeypatch.setenv("FAKE_EAGER", "1")
    run_on_driver(host_gpu.__name__, name, str(toy_bundle.path))


@pytest.mark.parametrize(
    "name",
    [
        "one_pass_on_tensorrt",
        "a_row_launched_ahead_on_tensorrt",
        "plans_that_are_not_as_built_are_not_loaded",
    ],
)
def test_the_tensorrt_engine(
    name: str, run_on_driver: RunOnDriver, toy_bundle: Bundle, tmp_path: Path
) -> None:
    """On the stand-in for the library: profiles, contexts, scratch memory, recordings."""
    run_on_driver(host_tensorrt.__name__, name, str(toy_bundle.path), str(tmp_path / "engines"))


def test_decoders_on_the_tensorrt_engine(
    run_on_driver: RunOnDriver, decoder_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = str(decoder_bundle("llama").path)
    folder = str(tmp_path / "engines")
    run_on_driver(host_tensorrt.__name__, "decoders_on_tensorrt", bundle, folder)


@pytest.mark.parametrize("kind", host_decoder_toys.KINDS)
def test_every_kind_of_text_program_on_the_tensorrt_engine(
    kind: str, run_on_driver: RunOnDriver, tmp_path: Path
) -> None:
    run_on_driver(host_decoder_toys.__name__, kind, str(tmp_path))
