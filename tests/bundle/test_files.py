"""Result files are written whole, and a file that must not exist is never replaced."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from click.testing import CliRunner

from edgeexit.bundle.files import write_atomic
from edgeexit.bundle.reader import Bundle
from edgeexit.cli import cli
from edgeexit.errors import OutputExistsError
from tests.toys import make_inputs


def test_a_file_that_appeared_meanwhile_is_kept_unless_it_may_be_overwritten(
    tmp_path: Path,
) -> None:
    path = tmp_path / "result.json"

    def write(file: BinaryIO) -> None:
        path.write_text("the other's")
        file.write(b"ours")

    with pytest.raises(OutputExistsError, match="result.json exists"):
        write_atomic(path, write, overwrite=False)
    assert path.read_text() == "the other's"
    write_atomic(path, write)
    assert path.read_text() == "ours"
    assert [one.name for one in tmp_path.iterdir()] == ["result.json"]


def test_of_two_traces_to_one_file_the_first_that_is_done_stays(
    toy_bundle: Bundle, tmp_path: Path
) -> None:
    """The data's function stands in for the other process: it writes the file during the trace."""
    np.savez(tmp_path / "rows.npz", **make_inputs(3))
    (tmp_path / "rows.py").write_text(
        "from pathlib import Path\nimport numpy as np\n"
        "def make():\n"
        "    here = Path(__file__).parent\n"
        "    (here / 'trace.npz').write_text('first')\n"
        "    return dict(np.load(here / 'rows.npz')), None\n"
    )
    output = tmp_path / "trace.npz"
    given = ("--data", f"{tmp_path / 'rows.py'}:make", "-o", output, "--threads", "1")
    ran = CliRunner().invoke(cli, [str(one) for one in ("trace", toy_bundle.path, *given)])
    assert isinstance(ran.exception, OutputExistsError) and "--overwrite" in str(ran.exception)
    assert output.read_text() == "first"
