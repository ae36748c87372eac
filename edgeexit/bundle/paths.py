"""Why a path given by the user cannot be used, in words; the standard library answers False, or
raises OSError, for a path that is too long, a loop of links or a folder without permission."""

from __future__ import annotations

import os
import stat
from pathlib import Path

SHOWN = 200
"""Longest path that messages show whole."""


def shown(path: str | os.PathLike[str]) -> str:
    """A path for messages; a very long one is cut.

    >>> shown("o" * 5000)[-24:]
    'oooooo... (5000 letters)'
    """
    text = os.fspath(path)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}... ({len(text)} letters)"


def not_a_folder(path: Path) -> str:
    """Why a path is not a readable folder, to follow its name; empty if it is one.

    >>> not_a_folder(Path("nowhere")), not_a_folder(Path("."))
    ('does not exist', '')
    """
    reason, mode = _mode(path)
    if not reason and not stat.S_ISDIR(mode):
        reason = "is a file, not a directory"
    return reason


def not_a_file(path: Path) -> str:
    """Why a path is not a readable file; empty if it is one."""
    reason, mode = _mode(path)
    if not reason and not stat.S_ISREG(mode):
        reason = "is a directory" if stat.S_ISDIR(mode) else "is a device or a pipe, not a file"
    return reason


def is_there(path: Path) -> bool:
    """Whether there is anything at a path; False if that cannot be found out."""
    return not _mode(path)[0]


def _mode(path: Path) -> tuple[str, int]:
    """Why the path leads nowhere, and the mode of what it leads to."""
    try:
        mode = path.stat().st_mode
        readable = os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0))
        return ("" if readable else "cannot be opened (Permission denied)"), mode
    except FileNotFoundError:
        link = path.is_symlink()
        return (
            f"is a link to {shown(os.readlink(path))}, which is missing"
            if link
            else "does not exist"
        ), 0
    except NotADirectoryError:
        return "does not exist: a part of its path is a file", 0
    except OSError as error:
        return f"cannot be opened ({error.strerror})", 0
    except ValueError as error:  # a null byte
        return f"is not a path ({error})", 0


__all__ = ["is_there", "not_a_file", "not_a_folder", "shown"]
