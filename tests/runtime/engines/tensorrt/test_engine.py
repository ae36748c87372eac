"""Which engines a device takes, and why not the others."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EngineError
from edgeexit.runtime import load
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet, list_engines
from edgeexit.runtime.engines.tensorrt.library import (
    Library,
    import_library,
    parse_targets,
    supported_versions,
)
from edgeexit.runtime.engines.tensorrt.selection import choose, misfit
from tests.runtime.engines.tensorrt.engine_sets import MADE_FROM, write_set

RTX = Library("tensorrt_rtx", None, "1.7.1")
HERE = {
    "ahead_of_time": False,
    "gpu": "GeForce RTX 3090",
    "multiprocessors": 82,
    "compute_capability": 86,
    "cuda": 13000,
    "l4t": None,
}


def engines(tmp_path: Path, **changed: Any) -> EngineSet:
    write_set(tmp_path, "a" * 64, **copy.deepcopy(changed))
    return list_engines(tmp_path, "a" * 64)[-1][1]


def test_engines_ahead_of_time_fit_every_gpu_of_their_capability(tmp_path: Path) -> None:
    made = engines(tmp_path)
    assert misfit(made, RTX, HERE) is None
    assert misfit(made, RTX, HERE | {"gpu": "RTX A4000", "multiprocessors": 48}) is None
    assert (
        misfit(made, RTX, HERE | {"compute_capability": 89}) == "is for sm86, this device is sm89"
    )


def test_engines_built_on_a_device_fit_only_one_like_it(tmp_path: Path) -> None:
    made = engines(tmp_path, target=HERE)
    assert misfit(made, RTX, HERE) is None
    for name, value in (
        ("gpu", "RTX A4000"),
        ("cuda", 13010),
        ("l4t", "# R36"),
        ("multiprocessors", 1),
    ):
        assert str(misfit(made, RTX, HERE | {name: value})).startswith(f"is for {name} ")


def test_engines_of_another_library_do_not_fit(tmp_path: Path) -> None:
    made = engines(tmp_path)
    assert "this device has tensorrt 10.3" in str(
        misfit(made, Library("tensorrt", None, "10.3.0"), HERE)
    )
    newer = Library("tensorrt_rtx", None, "1.8.0")
    assert (
        misfit(made, newer, HERE)
        == "was built by tensorrt_rtx 1.7.1, this device has tensorrt_rtx 1.8.0"
    )


def test_the_newest_that_fits_is_taken_and_none_says_why(tmp_path: Path) -> None:
    for capability in (86, 89):
        write_set(
            tmp_path, "a" * 64, target=MADE_FROM["target"] | {"compute_capability": capability}
        )
    sets = list_engines(tmp_path, "a" * 64)
    folder, _ = choose(sets, RTX, HERE, tmp_path, Path("b"))
    assert folder == sets[0][0]
    with pytest.raises(
        EngineError, match=r"is for sm89, this device is sm75.*is for sm86.*edgeexit build"
    ):
        choose(sets, RTX, HERE | {"compute_capability": 75}, tmp_path, Path("b"))
    with pytest.raises(EngineError, match=r"there are none.*edgeexit build b;"):
        choose([], RTX, HERE, tmp_path, Path("b"))


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is an NVIDIA driver")
def test_without_a_driver_the_error_says_what_to_install(toy_bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="no NVIDIA driver|cuda-bindings cannot be imported"):
        load(toy_bundle, "tensorrt")


@pytest.mark.parametrize("version, taken", [
    ("10.2.0", False), ("10.3.0", True), ("10.16.1.11", True), ("11.4.0", True), ("12.0", False),
    ("11.0rc1", True), ("dev", False),
])  # fmt: skip
def test_versions_outside_the_list_are_refused_with_the_list(
    version: str, taken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text(f"__version__ = {version!r}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    if taken:
        assert import_library("tensorrt").version == version
    else:
        with pytest.raises(EngineError, match=r"tensorrt 10\.3 to 11\.x or tensorrt_rtx"):
            import_library("tensorrt")
    sys.modules.pop("tensorrt", None)  # monkeypatch would put it back
    assert supported_versions() == "tensorrt 10.3 to 11.x or tensorrt_rtx 1.4 to 1.x"


def test_targets_are_read_in_both_spellings() -> None:
    assert parse_targets("sm86, 8.9,SM_120,86") == [86, 89, 120]
