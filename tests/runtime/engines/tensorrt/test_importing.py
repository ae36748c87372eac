"""Engines from elsewhere: signatures, trust, and what changes on the way."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import IntegrityError, UsageError
from edgeexit.runtime.engines.tensorrt.engine_cache import (
    INDEX,
    SIGNATURE,
    check_plans,
    folder_of,
    key_of,
    list_engines,
    read_index,
    write_index,
)
from edgeexit.runtime.engines.tensorrt.importing import import_engines
from edgeexit.runtime.engines.tensorrt.signing import NAMESPACE, sign, try_key
from tests.runtime.engines.tensorrt.engine_sets import MADE_FROM, PLAN, write_set


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
    path.write_text(f'builder@example.org namespaces="{NAMESPACE}" {public}')
    return path


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
    with pytest.raises(IntegrityError, match="is not listed in"):
        import_engines(folder, tmp_path / "here", toy_bundle, signers=signers)
    (folder / SIGNATURE).unlink()
    command = ["ssh-keygen", "-Y", "sign", "-q", "-n", "file", "-f", keys("builder")]
    subprocess.run([*command, folder / INDEX], check=True)
    with pytest.raises(IntegrityError, match=r"is not listed in|does not match"):
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
    with pytest.raises(IntegrityError, match=r"was changed after the build|does not match"):
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
    check_plans(made, engines)
    assert not list(made.glob("*.partial"))


def test_only_whole_engines_are_signed_and_a_failure_keeps_the_signature(
    toy_bundle: Bundle, keys: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "there", toy_bundle.digest)
    sign(folder, keys("builder"))
    signature = (folder / SIGNATURE).read_bytes()
    (tmp_path / "rubbish").write_text("no key")
    for failing in (
        lambda: try_key(tmp_path / "rubbish"),
        lambda: sign(folder, tmp_path / "rubbish"),
    ):
        with pytest.raises(UsageError, match="ssh-keygen refused the key"):
            failing()
    try_key(keys("builder"))
    (folder / "s0.plan").write_bytes(PLAN[::-1])
    with pytest.raises(IntegrityError, match="was changed after the build"):
        sign(folder, keys("builder"))
    assert (folder / SIGNATURE).read_bytes() == signature
