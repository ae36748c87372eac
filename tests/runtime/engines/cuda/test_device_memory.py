"""Chains and decoders whose tensors stay on the device, on memory that the host cannot touch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgeexit.bundle import Bundle
from tests.runtime.engines.cuda import host_gpu
from tests.runtime.engines.cuda.conftest import RunOnDriver, cases_of

ONE_PASS = "rows_of_one_pass_cost_the_host_four_bytes_a_boundary"


@pytest.mark.parametrize("name", [name for name in cases_of(host_gpu) if name != ONE_PASS])
def test_decoders(
    name: str, run_on_driver: RunOnDriver, decoder_bundle: Callable[[str], Bundle]
) -> None:
    run_on_driver(host_gpu.__name__, name, str(decoder_bundle("llama").path))


def test_one_pass(run_on_driver: RunOnDriver, toy_bundle: Bundle) -> None:
    run_on_driver(host_gpu.__name__, ONE_PASS, str(toy_bundle.path))
