"""The published JSON Schema, and the structs it describes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import msgspec
import pytest

import edgeexit
from edgeexit.bundle.manifest import FORMAT_MAJOR, FORMAT_MINOR, Manifest, Tensor, json_schema
from edgeexit.bundle.reader import MANIFEST, Bundle, decode_manifest

SCHEMA = Path(edgeexit.__file__).parent.parent / "docs/manifest.schema.json"


def test_published_schema_is_that_of_the_structs() -> None:
    assert json.loads(SCHEMA.read_text()) == json_schema(), "run: make docs/manifest.schema.json"


def test_published_schema_is_valid_and_accepts_a_written_manifest(toy_bundle: Bundle) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((toy_bundle.path / MANIFEST).read_text()), schema)


def test_published_schema_refuses_a_manifest_without_files(toy_bundle: Bundle) -> None:
    raw = json.loads((toy_bundle.path / MANIFEST).read_text())
    del raw["files"]
    with pytest.raises(jsonschema.ValidationError, match="files"):
        jsonschema.validate(raw, json.loads(SCHEMA.read_text()))


def test_manifest_survives_writing_and_reading(toy_bundle: Bundle) -> None:
    manifest = toy_bundle.manifest
    assert decode_manifest(msgspec.json.encode(manifest)) == manifest


def test_written_manifest_carries_the_format_of_this_version(toy_bundle: Bundle) -> None:
    assert toy_bundle.manifest.format == f"{FORMAT_MAJOR}.{FORMAT_MINOR}"


def test_structs_cannot_be_changed_nor_filled_by_position() -> None:
    tensor = Tensor(name="x", dtype="float32", axes=["batch"])
    with pytest.raises(AttributeError):
        tensor.name = "y"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Tensor("x", "float32", ["batch"])  # type: ignore[misc]


def test_defaults_are_left_out_of_the_json() -> None:
    raw = json.loads(msgspec.json.encode(Tensor(name="x", dtype="float32", axes=["batch"])))
    assert raw == {"name": "x", "dtype": "float32", "axes": ["batch"]}


def test_every_field_of_the_manifest_has_a_place_in_the_schema() -> None:
    described = json_schema()["$defs"]["Manifest"]["properties"]  # type: ignore[index]
    assert list(described) == [field.name for field in msgspec.structs.fields(Manifest)]
