"""The command that runs a module in a child process."""

from __future__ import annotations

import sys


def child_command(module: str) -> list[str]:
    """The command that runs a module's ``main`` with this process's import path. ``python -m``
    is not used: it would search the current directory first.

    >>> child_command("edgeexit.measure.bench.worker")[1:3]
    ['-I', '-c']
    """
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main()"
    return [sys.executable, "-I", "-c", code, *sys.path]


__all__ = ["child_command"]
