"""Loads user functions given on the command line as ``module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeexit.errors import UsageError


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """Imports ``module:function`` or ``file.py:function``; `what` names the option in errors."""
    module_name, _, name = spec.rpartition(":")
    fix = "Give module:function or path/to/file.py:function; the current directory is importable."
    if not module_name or not name.isidentifier():
        raise UsageError(f"{what} {spec}: not of the form module:function", fix=fix)
    try:
        if module_name.endswith(".py"):
            module = _load_file(Path(module_name))
        else:
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module may be missing inside the user's module, not the user's module itself.
        if error.name is None:
            raise
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{what} {spec}: it needs the module {error.name}, which is not installed",
                fix=f"Install {error.name} in this environment.",
            ) from error
        raise UsageError(f"{what} {spec}: there is no module {error.name}", fix=fix) from error
    except FileNotFoundError as error:
        raise UsageError(f"{what} {spec}: {module_name} does not exist", fix=fix) from error
    found = getattr(module, name, None)
    if not callable(found):
        kind = "has no" if found is None else "has no function"
        raise UsageError(f"{what} {spec}: {module_name} {kind} {name}", fix=fix)
    return found


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    name = f"edgeexit_given_{path.stem}"  # not the name of any other module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
