"""Paths that lead nowhere are refused with the reason, by everything that opens one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeexit.bundle.files import check_output
from edgeexit.bundle.paths import not_a_file, not_a_folder
from edgeexit.bundle.policy import read_policy
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EdgeExitError, UsageError
from edgeexit.measure.data import open_data
from edgeexit.measure.trace_file import read_trace
from edgeexit.runtime import Policy, load, write_policy


def broken(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link"


def loop(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def in_file(folder: Path) -> Path:
    (folder / "file").write_text("text")
    return folder / "file" / "inside"


ODD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "long": (lambda folder: Path("o" * 5000), "File name too long"),
    "long part": (lambda folder: folder / ("o" * 300), "File name too long"),
    "broken link": (broken, "is a link to .*gone, which is missing"),
    "loop of links": (loop, "Too many levels of symbolic links"),
    "inside a file": (in_file, "a part of its path is a file"),
    "null byte": (lambda folder: Path("a\0b"), "is not a path"),
}


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    make, reason = ODD[request.param]
    return make(tmp_path), reason


def test_reason_is_told_when_a_path_leads_nowhere(
    odd: tuple[Path, str], toy_bundle: Bundle
) -> None:
    path, reason = odd
    for opens in (load, read_trace, lambda path: open_data(path, toy_bundle)):
        with pytest.raises(EdgeExitError, match=reason) as caught:
            opens(path)
        assert len(caught.value.what) < 400


def test_no_raw_error_when_a_policy_or_an_output_has_an_odd_path(odd: tuple[Path, str]) -> None:
    path, _ = odd
    with pytest.raises(EdgeExitError):
        read_policy(path)
    if path.name == "link":  # a link to a file that is not there yet is a place to write to
        check_output(path)
        return
    with pytest.raises(UsageError):
        check_output(path)
    with pytest.raises(EdgeExitError):
        write_policy(Policy(rules={}), path)


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert not_a_file(tmp_path) == "is a directory"
    assert not_a_folder(tmp_path / "file") == "is a file, not a directory"
    assert not_a_file(Path("/dev/null")) == "is a device or a pipe, not a file"


def test_an_output_is_refused_before_the_work_when_nothing_can_be_written_there() -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        check_output(Path("/proc/nowhere/plot.svg"))
