"""What we call is there, under that name and with those parameters, in the libraries that are
installed: their Python interface can be asked without a GPU."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgeexit.runtime.engines.tensorrt import api

CLASSES = [
    (name, value)
    for name, value in vars(api).items()
    if inspect.isclass(value)
    and value.__module__ == api.__name__
    and not name.startswith("_")
    and name != "TensorRt"
]


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def library(request: pytest.FixtureRequest) -> ModuleType:
    name: str = request.param
    pytest.importorskip(name)
    return importlib.import_module(name)


def test_every_class_and_what_is_called_of_it_is_there(library: ModuleType) -> None:
    assert len(CLASSES) > 15
    for name, ours in CLASSES:
        if name in api.RTX_CLASSES and library.__name__ != "tensorrt_rtx":
            continue
        theirs = getattr(library, name)
        for attribute in inspect.get_annotations(ours):
            assert hasattr(theirs, attribute), f"{name}.{attribute}"
        for method, function in vars(ours).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                require_parameters(name, method, function, getattr(theirs, method))


def require_parameters(name: str, method: str, ours: Any, theirs: Any) -> None:
    """Our parameters, in order, are the first of one of the signatures that the library tells."""
    wanted = list(inspect.signature(ours).parameters)[1:]
    known = []
    for line in (theirs.__doc__ or "").splitlines():
        if found := re.match(rf"\s*(?:\d+\. )?{method}\((self: [^,)]*.*)\) ->", line):
            known.append(re.findall(r"(?:^|, )(\w+): ", found[1])[1:])
    assert any(one[: len(wanted)] == wanted for one in known), f"{name}.{method}{wanted}: {known}"


def test_every_member_of_an_enumeration_that_is_asked_for_is_there(library: ModuleType) -> None:
    asked = dict(api.ENUMERATIONS)
    if library.__name__ == "tensorrt_rtx":
        asked |= api.RTX_ENUMERATIONS
    for name, members in asked.items():
        for member in members:
            assert hasattr(getattr(library, name), member), f"{name}.{member}"
    for name in inspect.get_annotations(api.TensorRt):
        if name in asked or name not in api.RTX_ENUMERATIONS:
            assert hasattr(library, name), name
    assert hasattr(library.DataType, "itemsize") or hasattr(library.DataType.HALF, "itemsize")


def test_what_is_asked_of_the_library_is_spelled_out() -> None:
    """Enumerations are not type-checked, so what the sources name of them is held against api.py's
    lists, which the tests above hold against the library."""
    folder = Path(api.__file__).parent
    listed = {**api.ENUMERATIONS, **api.RTX_ENUMERATIONS}
    for path in folder.glob("*.py"):
        for name, member in re.findall(r"\btrt\.(\w+)\.([A-Z][A-Z_0-9]+)\b", path.read_text()):
            if name not in ("Logger", "NetworkDefinitionCreationFlag"):
                assert member in listed[name], f"{path.name}: {name}.{member}"
