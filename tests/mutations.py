"""Breaks the runtime on purpose, one line at a time, and says which test notices.

``python tests/mutations.py`` copies the tree, changes one line of the copy, runs the tests of the
hand-written toys there until the first fails, and prints the table of ``tests/mutations.md``. It
exits with 1 if a change is not noticed, or if its line is no longer there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = [
    "tests/runtime/programs/test_every_program.py",
    "tests/runtime/programs/test_forward.py",
]


@dataclass(frozen=True)
class Mutation:
    """One change: the first place of `old` in a file becomes `new`."""

    what: str
    file: str
    old: str
    new: str


ROWS, SESSION = "runtime/executor/rows.py", "runtime/executor/session.py"
GATES, EXITS = "runtime/executor/gates.py", "runtime/executor/exits.py"
EARLY = "runtime/programs/modes/early.py"
MUTATIONS = [
    Mutation(
        "threshold comparison, a batch of rows: > for >=",
        ROWS,
        "fires = step.score >= decision.threshold",
        "fires = step.score > decision.threshold",
    ),
    Mutation(
        "threshold comparison, a single row: > for >=",
        ROWS,
        "first_score[0] >= threshold:",
        "first_score[0] > threshold:",
    ),
    Mutation(
        "threshold comparison, tokens: > for >=",
        EXITS,
        ">= decision.threshold",
        "> decision.threshold",
    ),
    Mutation(
        "compaction: the first rows are kept, not those that stay",
        "runtime/executor/plans.py",
        "keep_rows(name, plan.sizes, stays)",
        "keep_rows(name, plan.sizes, np.arange(len(stays)))",
    ),
    Mutation(
        "crop per component: only the first component takes drafts back",
        SESSION,
        "for part in self.stateful:\n            part.states.crop",
        "for part in self.stateful[:1]:\n            part.states.crop",
    ),
    Mutation(
        "cross states, written once per prompt: those of the last prompt are kept",
        GATES,
        "self._made.clear()",
        "pass",
    ),
    Mutation(
        "gate at the prompt only: it is asked at every token",
        GATES,
        "and gate.name not in self.dropped and self._has_tokens(gate):",
        ":",
    ),
    Mutation(
        "positions after a drop: they follow the states' lengths",
        "runtime/executor/states.py",
        "self.gaps[row] = end - self.lengths[row]",
        "self.gaps[row] = 0",
    ),
    Mutation(
        "adapter: tokens that were not drafted leave gaps in its states",
        SESSION,
        "return [*self.parts, *(part for path in self._paths for part in path)]",
        "return [*self.parts]",
    ),
    Mutation(
        "flush: the last component does not catch up",
        EARLY,
        "for number in range(1, len(self.session.parts)):\n            self._drain",
        "for number in range(1, len(self.session.parts) - 1):\n            self._drain",
    ),
]


def main() -> int:
    """Tries every mutation; prints the table. 1 if one survives."""
    survived = 0
    print("| change | where | noticed by | s |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".*", "local", "results", "checkpoint", "__pycache__")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        for mutation in MUTATIONS:
            noticed, took_s = _try(copy, mutation)
            survived += noticed is None
            row = (mutation.what, f"`{mutation.file}`", f"`{noticed}`", f"{took_s:.0f}")
            print(f"| {' | '.join(row)} |", flush=True)
    return int(survived > 0)


def _try(copy: Path, mutation: Mutation) -> tuple[str | None, float]:
    """The first test that fails, or None, and how long it took."""
    path = copy / mutation.file
    whole = path.read_text()
    if mutation.old not in whole:
        sys.exit(f"{mutation.what}: {mutation.file} has no {mutation.old!r} any more")
    path.write_text(whole.replace(mutation.old, mutation.new, 1))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    took_s = time.perf_counter() - started
    path.write_text(whole)
    failed = re.search(r"^FAILED \S+?::(\w+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed is not None:
        return failed[1], took_s
    if done.returncode != 0:
        sys.exit(f"{mutation.what}: the tests did not run\n{done.stdout[-2000:]}{done.stderr}")
    return None, took_s


if __name__ == "__main__":
    sys.exit(main())
