"""Real files of every kind that users bring, damaged at many places: what reads them works, or
raises an error of ours that says what helps. Nothing else comes out, and no process dies.

`make test` runs a share; ``pytest -m slow -s tests/test_damaged_files.py`` runs all of it, and
prints how many examples of each kind were read and refused.
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeexit.errors import EdgeExitError
from tests.damage import damage
from tests.damaged_kinds import (
    KINDS,
    Kind,
    make_pictures,
    make_texts,
    read_pictures,
    read_texts,
)

SHARE, ALL = 15, 150
"""Examples of each kind."""

PICTURES, TEXTS = "pictures", "texts and conversations"
NAMES = (*KINDS, PICTURES, TEXTS)

Check = Callable[[str, range], Counter[str]]


@pytest.fixture
def check(
    request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Check:
    """Damages files of a kind and reads them; counts what came out."""

    def bundle(name: str) -> Path:
        return Path(request.getfixturevalue(name).path)

    def kind_of(name: str) -> Kind:
        """Pictures and texts are read for bundles that take them."""
        if name == PICTURES:
            return Kind(make_pictures, read_pictures(bundle("vit_bundle")))
        if name == TEXTS:
            return Kind(make_texts, read_texts(bundle("bert_bundle"), bundle("chat_bundle")))
        return KINDS[name]

    def run(name: str, seeds: range) -> Counter[str]:
        kind, whole, copy = kind_of(name), tmp_path / "whole", tmp_path / "copy"
        kind.make(whole)
        found: Counter[str] = Counter()
        for seed in seeds:
            shutil.copytree(whole, copy)
            draw = random.Random(f"{name} {seed}")
            file = draw.choice(sorted(path for path in copy.glob(kind.files) if path.is_file()))
            what = f"{name} {seed}: {file.name} {damage(file, draw)}"
            found[_read(kind, copy, file, what)] += 1
            shutil.rmtree(copy)
            assert "Traceback" not in "".join(capfd.readouterr()), what
        return found

    return run


def _read(kind: Kind, folder: Path, file: Path, what: str) -> str:
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kind.read(folder, file)
    except EdgeExitError as error:
        assert error.what and error.fix, what
        assert len(str(error)) < 1500, what
        return "refused"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    ours = [one for one in said if "edgeexit" in Path(one.filename).parts]
    assert not ours, f"{what}: {ours[0].message}"
    return "read"


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused(name: str, check: Check) -> None:
    found = check(name, range(SHARE))
    assert found.total() == SHARE and found["refused"] > SHARE // 4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files_are_read_or_refused(
    name: str, check: Check, capfd: pytest.CaptureFixture[str]
) -> None:
    found = check(name, range(SHARE, SHARE + ALL))
    with capfd.disabled():
        print(f"\n{name}: {found['read']} read, {found['refused']} refused")
    assert found.total() == ALL
