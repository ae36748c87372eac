"""The engine cache: keys, whole sets only, and what may come in from elsewhere."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EngineError, IntegrityError, OutputBusyError, UsageError
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.engine_cache import (
    EngineSet,
    PlanFile,
    building,
    folder_of,
    import_engines,
    key_of,
    list_engines,
    read_index,
    sign,
    write_index,
)

MADE_FROM: dict[str, Any] = {
    "builder": 1,
    "library": "tensorrt_rtx",
    "version": "1.7.1",
    "target": {"ahead_of_time": True, "compute_capability": 86},
    "weights": "0" * 64,
    "options": {"opt_level": None},
    "engines": [{"graph": "graphs/s0.onnx", "profiles": [{"x": [[1, 6], [1, 6], [8, 6]]}]}],
}
PLAN = b"not a plan, but the store does not look inside"


def write_set(root: Path, digest: str, **changed: Any) -> Path:
    """A set of one engine."""
    source = MADE_FROM | changed
    key = key_of(source)
    plan = PlanFile(
        graph="graphs/s0.onnx",
        file="s0.plan",
        sha256=hashlib.sha256(PLAN).hexdigest(),
        bytes=len(PLAN),
        outputs=["logits"],
        profiles=[],
        precision={},
        largest={},
        seconds=0.1,
        peak_memory_bytes=1,
    )
    with building(folder_of(root, digest, key)) as folder:
        (folder / plan.file).write_bytes(PLAN)
        engines = EngineSet(format=1, bundle=digest, key=key, made_from=source, plans=[plan])
        write_index(folder, engines)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """SSH keys by name."""
    root = tmp_path_factory.mktemp("keys")

    def get(name: str) -> Path:
        if not (root / name).exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", root / name]
            subprocess.run(command, check=True)
        return root / name

    return get


@pytest.fixture
def signers(keys: Callable[[str], Path], tmp_path: Path) -> Path:
    """A file that allows the builder to sign."""
    public = keys("builder").with_suffix(".pub").read_text()
    path = tmp_path / "signers"
    path.write_text(f'builder@example.org namespaces="{engine_cache.NAMESPACE}" {public}')
    return path


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
    with pytest.raises(EngineError, match=r"others can write there.*chmod"):
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


def test_signed_engines_come_in_and_are_whole(
    toy_bundle: Bundle, keys: Callable[[str], Path], signers: Path, tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "there", toy_bundle.digest)
    sign(folder, keys("builder"))
    [made] = import_engines(tmp_path / "there", tmp_path / "here", toy_bundle, signers=signers)
    assert made == folder_of(tmp_path / "here", toy_bundle.digest, key_of(MADE_FROM))
    assert read_index(made) == read_index(folder)
    assert (made / "s0.plan").read_bytes() == PLAN
    # The folder itself may be given too, and again.
    again = import_engines(folder, tmp_path / "here", toy_bundle, signers=signers)
    assert again == {made: "builder@example.org"}


def test_unsigned_engines_come_in_only_by_trust(
    toy_bundle: Bundle, signers: Path, tmp_path: Path
) -> None:
    folder, here = write_set(tmp_path / "there", toy_bundle.digest), tmp_path / "here"
    with pytest.raises(IntegrityError, match=r"no signature.*--trust"):
        import_engines(folder, here, toy_bundle, signers=signers)
    assert not here.exists()
    assert import_engines(folder, here, toy_bundle, trust="anything")


def test_a_signature_by_another_key_or_for_another_purpose_does_not_count(
    toy_bundle: Bundle, keys: Callable[[str], Path], signers: Path, tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "there", toy_bundle.digest)
    sign(folder, keys("stranger"))
    with pytest.raises(IntegrityError, match="nobody in"):
        import_engines(folder, tmp_path / "here", toy_bundle, signers=signers)
    (folder / engine_cache.SIGNATURE).unlink()
    command = ["ssh-keygen", "-Y", "sign", "-q", "-n", "file", "-f", keys("builder")]
    subprocess.run([*command, folder / engine_cache.INDEX], check=True)
    with pytest.raises(IntegrityError, match=r"nobody in|does not fit"):
        import_engines(folder, tmp_path / "here", toy_bundle, signers=signers)
    with pytest.raises(IntegrityError, match="no file of allowed signers"):
        import_engines(folder, tmp_path / "here", toy_bundle, signers=tmp_path / "none")


@pytest.mark.parametrize("what", ["plan", "index"])
def test_what_was_changed_after_signing_stays_out(
    what: str, toy_bundle: Bundle, keys: Callable[[str], Path], signers: Path, tmp_path: Path
) -> None:
    folder, here = write_set(tmp_path / "there", toy_bundle.digest), tmp_path / "here"
    sign(folder, keys("builder"))
    if what == "plan":
        (folder / "s0.plan").write_bytes(PLAN[::-1])
    else:
        found = read_index(folder)
        plan = msgspec.structs.replace(found.plans[0], seconds=9.0)
        write_index(folder, msgspec.structs.replace(found, plans=[plan]))
    with pytest.raises(IntegrityError, match=r"not as it was built|does not fit"):
        import_engines(folder, here, toy_bundle, signers=signers)
    assert not here.exists()


def test_engines_of_another_bundle_stay_out(toy_bundle: Bundle, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "there", "a" * 64)
    with pytest.raises(IntegrityError, match="were built from the bundle aaaaaaaaaaaa"):
        import_engines(folder, tmp_path / "here", toy_bundle, trust="anything")
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="there are no engines"):
        import_engines(tmp_path / "there", tmp_path / "here", toy_bundle)
    with pytest.raises(UsageError, match="there are no engines"):
        import_engines(tmp_path / "nowhere", tmp_path / "here", toy_bundle)


def test_what_changes_while_it_is_imported_does_not_come_in(
    toy_bundle: Bundle,
    keys: Callable[[str], Path],
    signers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else exchanges a plan between the check and the copy."""
    folder = write_set(tmp_path / "there", toy_bundle.digest)
    sign(folder, keys("builder"))
    here = tmp_path / "here"
    [made] = import_engines(folder, here, toy_bundle, signers=signers)
    copy = shutil.copyfile

    def exchanged(source: Path, target: Path) -> None:
        source.write_bytes(PLAN[::-1])
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", exchanged)
    with pytest.raises(IntegrityError, match="changed while it was imported"):
        import_engines(folder, here, toy_bundle, signers=signers)
    [(_, engines)] = list_engines(here, toy_bundle.digest)
    engine_cache.check_plans(made, engines)
    assert not list(made.glob("*.partial"))


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
    with pytest.raises(EngineError, match="others can write there"):
        write_set(tmp_path / "shared", "a" * 64)
    assert not list((tmp_path / "shared").iterdir())


def test_only_whole_engines_are_signed_and_a_failure_keeps_the_signature(
    toy_bundle: Bundle, keys: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "there", toy_bundle.digest)
    sign(folder, keys("builder"))
    signature = (folder / engine_cache.SIGNATURE).read_bytes()
    (tmp_path / "rubbish").write_text("no key")
    for failing in (
        lambda: engine_cache.try_key(tmp_path / "rubbish"),
        lambda: sign(folder, tmp_path / "rubbish"),
    ):
        with pytest.raises(UsageError, match="ssh-keygen refused it"):
            failing()
    engine_cache.try_key(keys("builder"))
    (folder / "s0.plan").write_bytes(PLAN[::-1])
    with pytest.raises(IntegrityError, match="not as it was built"):
        sign(folder, keys("builder"))
    assert (folder / engine_cache.SIGNATURE).read_bytes() == signature
