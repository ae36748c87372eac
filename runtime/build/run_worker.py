"""Runs the build of one engine in a child process, and returns its result or raises its error."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import msgspec

from edgeexit.errors import EngineError
from edgeexit.runtime.build.work_list import Work
from edgeexit.runtime.build.worker import Built, Failed, Job
from edgeexit.runtime.child import child_command
from edgeexit.runtime.memory import available_bytes


def run_worker(job: Job, work: Work, say: Callable[[float, str], None]) -> Built:
    """Runs a job in a child process.

    Args:
        job: What to build.
        work: The engine, for messages.
        say: Called with the finished share (0 to 1) and the phase.

    Raises:
        EngineError: The library rejected the graph, or the process failed or was killed.
    """
    free = available_bytes()
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as complaints:
        with subprocess.Popen(
            child_command(f"{__package__}.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
        ) as child:
            try:
                assert child.stdin is not None and child.stdout is not None
                with contextlib.suppress(BrokenPipeError):  # it ended; its exit code says why
                    child.stdin.write(msgspec.json.encode(job))
                    child.stdin.close()
                outer: str | None = None
                for line in child.stdout:
                    last = msgspec.json.decode(line)
                    if "phase" in last:
                        outer = outer or last["phase"]  # later phases are parts of the first
                        if last["phase"] == outer and last["of"]:
                            say(last["done"] / last["of"], last["phase"])
                code = child.wait()
            except BaseException:
                child.kill()
                raise
        complaints.seek(0)
        said = complaints.read().decode(errors="replace").strip().splitlines()
    if "built" in last:
        return msgspec.convert(last["built"], Built)
    if "failed" in last:
        raise _failure(msgspec.convert(last["failed"], Failed), work, free)
    if code == -signal.SIGKILL:
        raise EngineError(
            f"{work.where}: the build was killed (signal 9); the usual cause is that memory ran "
            f"out. {_mib(free)} were free at the start",
            fix=_LESS_MEMORY,
        )
    reason = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise EngineError(
        f"{work.where}: the build ended with {reason}: {said[-1][:300] if said else 'no message'}",
        fix="Run it again: finished engines are kept. If it fails again, please report it.",
    )


_LESS_MEMORY = (
    "Close other programs, or use less memory: --memory-limit 512MiB (scratch memory), smaller "
    "--max-shapes, or --opt-level 1. Finished engines are kept."
)


def _failure(failed: Failed, work: Work, free: int) -> EngineError:
    """The error for a failed build; `free` is the free memory at its start, in bytes."""
    graph = work.variant.graph
    if failed.fix is not None:
        return EngineError(f"{work.where}: {failed.what}", fix=failed.fix)
    if failed.memory:
        return EngineError(
            f"{work.where} ({graph}): not enough memory ({failed.what[:200]}); "
            f"{_mib(free)} were free at the start",
            fix=_LESS_MEMORY,
        )
    if failed.nodes:
        name, operator, reason = map(plain_text, failed.nodes[0])
        module = name.rpartition("/")[0]  # export names nodes after their torch modules
        came = f", from the torch module {module}" if module else ""
        return EngineError(
            f"{work.where} ({graph}): TensorRT rejects the node {name} ({operator}{came}): "
            f"{reason[:300]}",
            fix="Run this bundle with ONNX Runtime (--engine cuda), or export it without that "
            "operator.",
        )
    return EngineError(
        f"{work.where} ({graph}): TensorRT cannot build it: {plain_text(failed.what)[:400]}",
        fix="If a precision is not supported, export with --dtype fp16. If memory is missing, use "
        "a larger --memory-limit or smaller --max-shapes. Or run this bundle with ONNX Runtime "
        "(--engine cuda).",
    )


def plain_text(text: str) -> str:
    """A library's message, or a name from a graph, as one line without control characters.

    >>> plain_text("a\\n  b" + chr(27) + "[2J")
    'a b?[2J'
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"


__all__ = ["plain_text", "run_worker"]
