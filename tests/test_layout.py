"""What may be imported where: the device side stays light, the command line starts fast."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgeexit

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "scipy", "PIL"}
HEAVY |= {"jinja2", "matplotlib", "tokenizers"}
ENGINES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}


@pytest.mark.parametrize(
    "module",
    [
        "edgeexit",
        "edgeexit.bundle.reader",
        "edgeexit.errors",
        "edgeexit.bundle.manifest",
        "edgeexit.bundle.onnx_wire",
        "edgeexit.runtime",
        "edgeexit.runtime.engines.onnxruntime",
        "edgeexit.runtime.build.build",
        "edgeexit.runtime.build.worker",
        "edgeexit.runtime.engines.cuda.driver",
        "edgeexit.measure",
        "edgeexit.measure.plots",
        "edgeexit.cli",
    ],
)
def test_import_loads_no_engine_and_nothing_of_the_workstation(module: str) -> None:
    loaded = _loaded_by(f"import {module}")
    assert not loaded & (HEAVY | ENGINES)


def test_device_side_needs_numpy_and_msgspec_only() -> None:
    third_party = _loaded_by("import edgeexit.runtime") - set(sys.stdlib_module_names)
    found = {name for name in third_party if not name.startswith("_")} - {"edgeexit"}
    found -= {"typing_extensions"}  # msgspec takes it where it happens to be installed
    assert found - _loaded_by("pass") == {"numpy", "msgspec"}


def test_folders_are_imported_under_the_name_of_the_package_only() -> None:
    root = Path(edgeexit.__file__).parent.parent
    for path in _sources(root):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in ("export", "runtime"), f"{path}: {line}"


def _sources(root: Path) -> list[Path]:
    return [p for room in ("edgeexit", "export", "runtime") for p in root.glob(f"{room}/**/*.py")]


def _loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_functions_and_files_are_short() -> None:
    """A function's docstring does not count: those of `load` and `generate` list many arguments."""
    root = Path(edgeexit.__file__).parent.parent
    long = []
    for path in _sources(root):
        text = path.read_text()
        if len(text.splitlines()) > 400:
            long.append(f"{path.relative_to(root)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                if ast.get_docstring(node) is not None:
                    first = node.body[1] if len(node.body) > 1 else first
                lines = node.end_lineno - first.lineno + 1  # type: ignore[operator]
                if lines > 60:
                    long.append(f"{path.relative_to(root)}, {node.name}: {lines} lines")
    assert not long
