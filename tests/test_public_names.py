"""The public lists are complete, and every module says what it is for."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import edgeexit

FRONT_DOORS = {
    "edgeexit": {"__version__"},
    "edgeexit.runtime": {
        "Model",
        "Generation",
        "Piece",
        "Policy",
        "Result",
        "Rule",
        "Sampling",
        "Schedule",
        "Trace",
        "load",
        "read_policy",
        "write_policy",
    },
    "edgeexit.export": {
        "Component",
        "Form",
        "Layer",
        "SplitModel",
        "Stack",
        "Table",
        "export",
        "export_onnx",
    },
}
MODULES = [
    found.name
    for found in pkgutil.walk_packages(edgeexit.__path__, "edgeexit.")
    if not found.name.endswith("__main__")
]


@pytest.mark.parametrize("name", sorted(FRONT_DOORS))
def test_front_door_offers_exactly_the_public_names(name: str) -> None:
    module = importlib.import_module(name)
    expected = FRONT_DOORS[name]
    assert {one for one in expected if hasattr(module, one)} == expected
    if name != "edgeexit":
        assert set(module.__all__) == expected
        assert {
            one for one in _public(module) if not isinstance(getattr(module, one), ModuleType)
        } == (expected)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_says_what_it_is_for(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    missing = [one for one in getattr(module, "__all__", ()) if not hasattr(module, one)]
    assert not missing, f"{name}.__all__ names what is not there"


@pytest.mark.parametrize(
    "name", ["edgeexit.errors", "edgeexit.bundle.reader", "edgeexit.bundle.writer"]
)
def test_list_names_every_public_definition_of_the_shared_modules(name: str) -> None:
    module = importlib.import_module(name)
    own = {
        one for one in _public(module) if getattr(getattr(module, one), "__module__", "") == name
    }
    # Helpers of those who read and write files of the same kind.
    hidden = {"check_relative", "read_regular", "regular_size", "reporting_full_disk"}
    assert own - hidden <= set(module.__all__)


def test_version_is_that_of_the_installed_distribution() -> None:
    assert importlib.metadata.version("edgeexit") == edgeexit.__version__


def _public(module: ModuleType) -> set[str]:
    return {name for name in vars(module) if not name.startswith("_")} - {"annotations"}
