"""The engine cache: keys, complete sets only, and folders that are private."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EngineError, IntegrityError, OutputBusyError
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.engine_cache import (
    building,
    key_of,
    list_engines,
    read_index,
    write_index,
)
from tests.runtime.engines.tensorrt.engine_sets import MADE_FROM, PLAN, write_set


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.update(weights="1" * 64),
        lambda one: one.update(version="1.7.2"),
        lambda one: one.update(library="tensorrt"),
        lambda one: one["target"].update(compute_capability=89),
        lambda one: one["options"].update(opt_level=3),
        lambda one: one["engines"][0]["profiles"][0].update(x=[[1, 6], [1, 6], [9, 6]]),
    ],
)
def test_the_key_changes_when_one_thing_that_makes_engines_does(
    change: Callable[[dict[str, Any]], object],
) -> None:
    other = copy.deepcopy(MADE_FROM)
    change(other)
    assert key_of(other) != key_of(MADE_FROM)


def test_a_set_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a" * 64)
    assert read_index(folder).made_from == MADE_FROM
    assert [one for one, _ in list_engines(tmp_path, "a" * 64)] == [folder]
    assert list_engines(tmp_path, "b" * 64) == []
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a" * 64)
    folder.chmod(0o777)
    with pytest.raises(EngineError, match=r"other users can write to this folder.*chmod"):
        list_engines(tmp_path, "a" * 64)


def test_a_second_build_in_one_place_is_refused(tmp_path: Path) -> None:
    folder, match = tmp_path / "one", "another build"
    with building(folder), pytest.raises(OutputBusyError, match=match), building(folder):
        pass
    with building(folder):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_place_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EngineError, match="--engine-dir"), building(tmp_path / "one"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_place_below_a_file_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="--engine-dir"), building(tmp_path / "file" / "one"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    (tmp_path / f"engines.json.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(EngineError, match=r"the disk is full.*--engine-dir"):
        engine_cache.write_whole(tmp_path / "engines.json", b"x")
    assert not (tmp_path / "engines.json").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "link", "key", "name", "json", "source"])
def test_a_damaged_set_is_refused(damage: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a" * 64)
    plan, index = folder / "s0.plan", folder / engine_cache.INDEX
    raw = index.read_bytes()
    if damage == "truncate":
        plan.write_bytes(PLAN[:-1])
    elif damage == "remove":
        plan.unlink()
    elif damage == "link":
        plan.rename(tmp_path / "elsewhere")
        plan.symlink_to(tmp_path / "elsewhere")
    elif damage == "key":
        index.write_bytes(raw.replace(b'"compute_capability": 86', b'"compute_capability": 89'))
    elif damage == "source":
        found = read_index(folder)
        source = {"target": "abc"}
        key = key_of(source)
        write_index(folder, msgspec.structs.replace(found, made_from=source, key=key))
    elif damage == "name":
        index.write_bytes(raw.replace(b'"s0.plan"', b'"../../s0.plan"'))
    else:
        index.write_bytes(raw[:-9])
    with pytest.raises(IntegrityError):
        read_index(folder)


def test_a_set_of_another_bundle_or_a_damaged_one_is_left_out(
    toy_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_set(tmp_path, toy_bundle.digest)
    foreign = write_set(tmp_path / "other", "b" * 64, weights="2" * 64)
    shutil.copytree(foreign, good.parent / foreign.name)
    broken = write_set(tmp_path, toy_bundle.digest, weights="3" * 64)
    (broken / "s0.plan").unlink()
    assert [folder for folder, _ in list_engines(tmp_path, toy_bundle.digest)] == [good]
    assert len(caplog.messages) == 2 and "another bundle or key" in " ".join(caplog.messages)


def test_folders_are_private_whatever_the_umask(toy_bundle: Bundle, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        write_set(tmp_path / "new" / "cache", toy_bundle.digest)
    finally:
        os.umask(before)
    assert len(list_engines(tmp_path / "new" / "cache", toy_bundle.digest)) == 1


def test_nothing_is_built_or_signed_where_others_write(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(EngineError, match="other users can write to this folder"):
        write_set(tmp_path / "shared", "a" * 64)
    assert not list((tmp_path / "shared").iterdir())
