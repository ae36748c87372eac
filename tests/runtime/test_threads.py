"""Thread settings: the library leaves the process alone unless asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.runtime import load
from tests.toys import Toy, make_inputs, reference


@pytest.mark.parametrize("threads", [None, "brief", "blocking", "spinning", 1, 2])
def test_answers_do_not_depend_on_the_thread_setting(
    toy: Toy, toy_bundle: Bundle, threads: Any
) -> None:
    inputs = make_inputs(5)
    with load(toy_bundle, threads=threads) as model:
        np.testing.assert_allclose(
            model(inputs).outputs["logits"], reference(toy, inputs)[-1]["logits"], atol=1e-4
        )


@pytest.mark.parametrize("threads", [0, -1, True, "many", 1.5])
def test_a_thread_setting_that_is_none_is_refused(toy_bundle: Bundle, threads: Any) -> None:
    with pytest.raises(UsageError, match="is invalid"):
        load(toy_bundle, threads=threads)


def test_more_threads_than_a_machine_can_use_are_refused(toy_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"threads=1000000000 is out of range \(1 to [0-9]+\)"):
        load(toy_bundle, threads=10**9)


def test_default_sessions_of_others_work_beside_a_loaded_model(toy_bundle: Bundle) -> None:
    for threads in ("brief", "blocking"):
        assert run(PLAIN_SESSION_BESIDE.format(threads=threads), toy_bundle.path) == "both ran"


def test_the_default_is_a_pool_that_spins_briefly(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model:
        assert model.describe_engine()["threads"] == "brief"


def test_the_process_pool_is_installed_when_asked_and_once(toy_bundle: Bundle) -> None:
    assert run(PROCESS_POOL, toy_bundle.path) == "ran twice"


def test_other_thread_settings_are_refused_after_the_process_pool(toy_bundle: Bundle) -> None:
    said = run(OTHER_SETTING, toy_bundle.path)
    assert "threads='brief' is not possible" in said
    assert 'Load with threads="process"' in said


PLAIN_SESSION_BESIDE = """
import sys, onnxruntime, numpy as np
from edgeexit.runtime import load
from pathlib import Path
x = dict(x=np.zeros((2, 6), np.float32), shift=np.zeros((2, 1), np.float32),
         scale=np.ones(1, np.float32))
with load(sys.argv[1], threads="{threads}") as model:
    model(x)
    session = onnxruntime.InferenceSession(str(Path(sys.argv[1]) / "graphs/unsplit.onnx"))
    session.run(None, x)
    model(x)
print("both ran")
"""

PROCESS_POOL = """
import sys, numpy as np
from edgeexit.runtime import load
x = dict(x=np.zeros((2, 6), np.float32), shift=np.zeros((2, 1), np.float32),
         scale=np.ones(1, np.float32))
for _ in range(2):
    with load(sys.argv[1], threads="process") as model:
        model(x)
print("ran twice")
"""

OTHER_SETTING = """
import sys
from edgeexit.errors import EngineError
from edgeexit.runtime import load
load(sys.argv[1], threads="process").close()
try:
    load(sys.argv[1])
except EngineError as error:
    print(error)
"""


def run(code: str, path: Path) -> str:
    """Runs code in a process of its own, for what happens once per process."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
