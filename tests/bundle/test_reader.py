"""The bundle on disk: nothing is trusted when reading, nothing is half there when writing."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgeexit.bundle.reader import MANIFEST, WEIGHTS, Bundle, decode_manifest, open_bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import (
    BundleError,
    EdgeExitError,
    FormatError,
    IntegrityError,
    OutputBusyError,
    OutputExistsError,
    UsageError,
)
from tests.bundle.mutations import mutate
from tests.toys import Toy, fill_toy, make_toy, write_toy

Raw = dict[str, Any]


def rewrite(bundle: Path, change: Callable[[Raw], object]) -> None:
    """Changes a manifest as a person with an editor would."""
    raw = json.loads((bundle / MANIFEST).read_text())
    change(raw)
    (bundle / MANIFEST).write_text(json.dumps(raw))


def relist(bundle: Path, name: str) -> None:
    """Makes the manifest agree with a file again: only what the file says is wrong then."""
    data = (bundle / name).read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite(bundle, lambda raw: raw["files"].update({name: entry}))


# Reading


def test_a_file_is_held_against_its_digest_whenever_it_is_read(toy_copy: Path) -> None:
    bundle = open_bundle(toy_copy)
    name = bundle.manifest.components["unsplit"].variants[0].graph
    whole = (toy_copy / name).read_bytes()
    assert bundle.read(name, limit_bytes=len(whole)) == whole
    with pytest.raises(IntegrityError, match=f"{name}: .* bytes, more than the 8 allowed"):
        bundle.read(name, limit_bytes=8)
    with pytest.raises(IntegrityError, match="not listed"):
        bundle.read("graphs/other.onnx", limit_bytes=8)
    (toy_copy / name).write_bytes(whole[::-1])
    with pytest.raises(IntegrityError, match=f"{name}: sha256 differs"):
        bundle.read(name, limit_bytes=len(whole))


def test_open_gives_the_manifest_digest_and_exits_when_whole(toy_bundle: Bundle) -> None:
    bundle = open_bundle(toy_bundle.path, verify="full")
    raw = (toy_bundle.path / MANIFEST).read_bytes()
    assert bundle.digest == hashlib.sha256(raw).hexdigest()
    exits = [exit_.name for exit_ in bundle.manifest.last_chain.exits]
    assert exits == ["exit_1", "exit_2", "exit_3", "exit_4"]
    assert bundle.weights_bytes == (toy_bundle.path / WEIGHTS).stat().st_size
    assert bundle.file(WEIGHTS).is_file()
    with pytest.raises(IntegrityError, match="not listed"):
        bundle.file("graphs/other.onnx")


def test_open_refuses_a_path_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is a file"):
        open_bundle(tmp_path / "file")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        open_bundle(tmp_path)
    (tmp_path / "graphs").mkdir()
    with pytest.raises(IntegrityError, match=r"manifest\.json: missing"):
        open_bundle(tmp_path)


def test_open_refuses_an_unknown_way_to_verify(toy_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="'some'"):
        open_bundle(toy_bundle.path, verify="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["graphs/s1.onnx", WEIGHTS, "samples/reference.npz", "graphs/unsplit.onnx"]
)
def test_open_names_the_file_when_missing_truncated_or_altered(toy_copy: Path, name: str) -> None:
    path = toy_copy / name
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{name}: missing"):
        open_bundle(toy_copy)
    path.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=f"{name}: {len(data) - 1} bytes"):
        open_bundle(toy_copy)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(IntegrityError, match=f"{name}: sha256 differs"):
        open_bundle(toy_copy, verify="full")
    path.write_bytes(data)
    assert open_bundle(toy_copy, verify="full")


def test_large_files_are_hashed_with_full_only(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeexit.bundle.reader.HASHED_AT_LOAD_BYTES", 16)
    data = bytearray((toy_copy / WEIGHTS).read_bytes())
    data[5] ^= 1
    (toy_copy / WEIGHTS).write_bytes(bytes(data))
    open_bundle(toy_copy)
    with pytest.raises(IntegrityError, match=f"{WEIGHTS}: sha256 differs"):
        open_bundle(toy_copy, verify="full")


@pytest.mark.parametrize("name", ["graphs/extra.onnx", "samples/new.npz", "graphs/deep/in.bin"])
def test_open_refuses_an_unlisted_file(toy_copy: Path, name: str) -> None:
    (toy_copy / name).parent.mkdir(exist_ok=True)
    (toy_copy / name).write_bytes(b"x")
    with pytest.raises(IntegrityError, match=f"{name}: in the bundle but not in its manifest"):
        open_bundle(toy_copy)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "graphs/../../x", "graphs//x", "./x", "a\\b", "c:x", "a\nb", ""],
)
def test_open_refuses_a_name_that_could_leave_the_bundle(toy_copy: Path, name: str) -> None:
    (toy_copy.parent / "outside").write_bytes(b"x")
    entry = {"sha256": "0" * 64, "bytes": 1}
    rewrite(toy_copy, lambda raw: raw["files"].update({name: entry}))
    with pytest.raises(IntegrityError, match="may point outside"):
        open_bundle(toy_copy)


@pytest.mark.parametrize("name", ["graphs/s1.onnx", WEIGHTS, MANIFEST])
def test_open_refuses_a_link_even_to_the_same_bytes(toy_copy: Path, name: str) -> None:
    elsewhere = toy_copy.parent / "elsewhere"
    (toy_copy / name).rename(elsewhere)
    (toy_copy / name).symlink_to(elsewhere)
    with pytest.raises(IntegrityError, match=f"{name}: .* is a link"):
        open_bundle(toy_copy)


def test_open_refuses_a_linked_folder(toy_copy: Path) -> None:
    (toy_copy / "graphs").rename(toy_copy.parent / "elsewhere")
    (toy_copy / "graphs").symlink_to(toy_copy.parent / "elsewhere")
    with pytest.raises(IntegrityError, match="graphs is a link"):
        open_bundle(toy_copy)


def test_open_refuses_an_unlisted_link_to_a_folder(toy_copy: Path) -> None:
    (toy_copy / "graphs/more").symlink_to("/")
    with pytest.raises(IntegrityError, match="graphs/more: in the bundle but not"):
        open_bundle(toy_copy)


def test_open_refuses_what_is_not_a_regular_file(toy_copy: Path) -> None:
    (toy_copy / WEIGHTS).unlink()
    os.mkfifo(toy_copy / WEIGHTS)
    with pytest.raises(IntegrityError, match="not a regular file"):
        open_bundle(toy_copy)


@pytest.mark.parametrize("version", ["1.1", "0.9", "3.0"])
def test_open_refuses_another_major_format(toy_copy: Path, version: str) -> None:
    rewrite(toy_copy, lambda raw: raw.update(format=version, chains="of another shape"))
    with pytest.raises(FormatError, match=f"format is {version}"):
        open_bundle(toy_copy)


@pytest.mark.parametrize("version", ["1", "", "one.two", "1.0.0", "-1.0", "1٠.0"])
def test_open_refuses_a_format_that_is_no_version(toy_copy: Path, version: str) -> None:
    rewrite(toy_copy, lambda raw: raw.update(format=version))
    with pytest.raises(FormatError, match="major.minor"):
        open_bundle(toy_copy)


def test_open_ignores_unknown_fields_of_a_newer_minor_format(toy_copy: Path) -> None:
    def change(raw: Raw) -> None:
        raw["format"] = "2.999"
        raw["colour"] = "blue"
        raw["components"]["s0"]["mood"] = [1, 2]

    rewrite(toy_copy, change)
    assert open_bundle(toy_copy).manifest.name == "toy"


def test_open_refuses_a_feature_it_does_not_know(toy_copy: Path) -> None:
    rewrite(toy_copy, lambda raw: raw.update(requires=["time-travel"]))
    with pytest.raises(FormatError, match=r"requires time-travel.*newer edgeexit"):
        open_bundle(toy_copy)


def edit_graph(bundle: Path, change: Callable[[onnx.ModelProto], object], number: int = 1) -> None:
    name = f"graphs/s{number}.onnx"
    model = onnx.load(bundle / name, load_external_data=False)
    change(model)
    (bundle / name).write_bytes(model.SerializeToString())
    relist(bundle, name)


def external(tensor: onnx.TensorProto, **entries: object) -> None:
    """Rewrites where a tensor's data lies."""
    found = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in found.items():
        tensor.external_data.add(key=key, value=str(value))


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../../secret"},
        {"location": "/etc/passwd"},
        {"location": "s1.onnx"},
        {"location": "./weights.bin"},
        {"location": ""},
        {"offset": 10**9},
        {"length": 10**9},
        {"offset": "-1"},
        {"offset": "0x10"},
        {"length": "٣"},
    ],
)
def test_open_refuses_a_weight_outside_the_store(toy_copy: Path, entries: Raw) -> None:
    edit_graph(toy_copy, lambda model: external(model.graph.initializer[0], **entries))
    with pytest.raises(IntegrityError, match=r"graphs/s1\.onnx: "):
        open_bundle(toy_copy)


def test_open_refuses_a_weight_outside_the_store_in_a_nested_graph(toy_copy: Path) -> None:
    def hide(model: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto(name="inner", data_type=1, dims=[1])
        external(tensor, location="../elsewhere", offset=0, length=4)
        constant = onnx.helper.make_node("Constant", [], ["made"], value=tensor)
        branch = onnx.helper.make_graph(
            [constant], "branch", [], [onnx.helper.make_tensor_value_info("made", 1, [1])]
        )
        model.graph.node.append(
            onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
        )

    edit_graph(toy_copy, hide)
    with pytest.raises(IntegrityError, match=r"'inner' is outside the weight store"):
        open_bundle(toy_copy)


def test_open_refuses_a_graph_whose_inputs_or_outputs_differ(toy_copy: Path) -> None:
    original = (toy_copy / "graphs/s1.onnx").read_bytes()

    def rename(model: onnx.ModelProto) -> None:
        model.graph.input[0].name = "other"

    edit_graph(toy_copy, rename)
    with pytest.raises(IntegrityError, match=r"graphs/s1\.onnx: its inputs are .*'other'"):
        open_bundle(toy_copy)
    (toy_copy / "graphs/s1.onnx").write_bytes(original)
    edit_graph(toy_copy, lambda model: model.graph.output.pop())
    with pytest.raises(IntegrityError, match=r"graphs/s1\.onnx: its outputs are"):
        open_bundle(toy_copy)


def test_open_refuses_a_graph_that_is_not_onnx(toy_copy: Path) -> None:
    (toy_copy / "graphs/s1.onnx").write_bytes(b"GIF89a")
    relist(toy_copy, "graphs/s1.onnx")
    with pytest.raises(IntegrityError, match=r"graphs/s1\.onnx: not an ONNX graph"):
        open_bundle(toy_copy)


def test_open_refuses_a_manifest_that_contradicts_itself(toy_copy: Path) -> None:
    rewrite(toy_copy, lambda raw: raw["inputs"][0].update(row_axis=1))
    with pytest.raises(BundleError, match="row_axis cannot be 1"):
        open_bundle(toy_copy)


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"format": "2.0", "requires": null}')
@example(b'{"format": "2.0", "name": "\\ud800"}')
def test_decoding_any_bytes_raises_a_bundle_error(data: bytes) -> None:
    with pytest.raises(BundleError):
        decode_manifest(data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_opening_a_mutated_manifest_works_or_raises_ours(
    data: st.DataObject, copy_toy: Callable[[], Path], spoilt: list[Path]
) -> None:
    if not spoilt:
        spoilt += [copy_toy()]
    original = spoilt[0] / "../original.json"
    if not original.exists():
        original.write_bytes((spoilt[0] / MANIFEST).read_bytes())
    raw = json.loads(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(raw, data)
    (spoilt[0] / MANIFEST).write_text(json.dumps(raw))
    try:
        bundle = open_bundle(spoilt[0])
    except EdgeExitError as error:
        assert error.what
    else:
        assert bundle.manifest.last_chain.exits


@pytest.fixture(scope="session")
def spoilt() -> list[Path]:
    """One copy of the bundle whose manifest every example overwrites."""
    return []


@settings(max_examples=200)
@given(data=st.data())
def test_opening_altered_graph_bytes_raises_ours_or_leaves_the_store_alone(
    data: st.DataObject, toy_bundle: Bundle, copy_toy: Callable[[], Path], spoilt_graph: list[Path]
) -> None:
    if not spoilt_graph:
        spoilt_graph += [copy_toy()]
    bundle = spoilt_graph[0]
    raw = bytearray((toy_bundle.path / "graphs/s1.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 30))]
        else:
            raw[at:at] = data.draw(st.binary(max_size=10))
        if not raw:
            break
    (bundle / "graphs/s1.onnx").write_bytes(bytes(raw))
    relist(bundle, "graphs/s1.onnx")
    try:
        open_bundle(bundle)
    except BundleError:
        return
    model = onnx.ModelProto()
    try:
        model.ParseFromString(bytes(raw))
    except Exception:  # an engine refuses it too: nothing can be read through it
        return
    size = (bundle / WEIGHTS).stat().st_size
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            assert entry.key != "location" or entry.value == "weights.bin"
            assert entry.key not in ("offset", "length") or int(entry.value) <= size


@pytest.fixture(scope="session")
def spoilt_graph() -> list[Path]:
    """One copy of the bundle whose second graph every example overwrites."""
    return []


# Writing


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writer_leaves_a_read_only_bundle_and_nothing_else(toy: Toy, tmp_path: Path) -> None:
    bundle = write_toy(toy, tmp_path / "deep/down/bundle")
    assert files_in(tmp_path / "deep/down") == ["bundle"]
    assert open_bundle(bundle.path, verify="full").digest == bundle.digest
    modes = {path.stat().st_mode & 0o777 for path in bundle.path.rglob("*") if path.is_file()}
    assert modes == {0o444}


def test_the_same_model_gives_the_same_digest(toy: Toy, tmp_path: Path) -> None:
    one, other = write_toy(toy, tmp_path / "one"), write_toy(toy, tmp_path / "other")
    assert one.manifest.files[WEIGHTS] == other.manifest.files[WEIGHTS]
    different = write_toy(make_toy(seed=9), tmp_path / "different")
    assert different.digest != one.digest


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_writer_leaves_nothing_when_interrupted(
    toy: Toy, tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "bundle") as writer:
        fill_toy(toy, writer.folder)
        raise error
    assert files_in(tmp_path) == []


def test_writer_leaves_nothing_when_what_was_written_is_wrong(toy: Toy, tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match="exit exit_9|names"),
        BundleWriter(tmp_path / "bundle") as writer,
    ):
        manifest = fill_toy(toy, writer.folder)
        exits = manifest.chains["forward"].exits
        exits[0] = msgspec.structs.replace(exits[0], name="exit_9", outputs={"logits": "missing"})
        writer.commit(manifest)
    assert files_in(tmp_path) == []


def test_writer_says_so_when_the_disk_is_full(toy: Toy, tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"the disk is full.*Free some space"),
        BundleWriter(tmp_path / "bundle") as writer,
    ):
        fill_toy(toy, writer.folder)
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    assert files_in(tmp_path) == []


def test_writer_refuses_a_place_that_cannot_be_written(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="cannot be written"):
        write_toy(toy, tmp_path / "file/bundle")


def test_writer_refuses_an_output_that_exists_unless_told_to_overwrite(
    toy: Toy, tmp_path: Path
) -> None:
    old = write_toy(toy, tmp_path / "bundle")
    with pytest.raises(OutputExistsError, match=r"exists.*--overwrite"):
        write_toy(toy, tmp_path / "bundle")
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"has notes.txt.*would be lost"):
        write_toy(make_toy(seed=3), tmp_path / "bundle", overwrite=True)
    (tmp_path / "bundle" / "notes.txt").unlink()
    new = write_toy(make_toy(seed=3), tmp_path / "bundle", overwrite=True)
    assert new.digest != old.digest
    assert open_bundle(tmp_path / "bundle", verify="full").digest == new.digest
    assert files_in(tmp_path) == ["bundle"]


def test_overwriting_keeps_the_old_bundle_until_the_new_one_is_whole(
    toy: Toy, tmp_path: Path
) -> None:
    old = write_toy(toy, tmp_path / "bundle")
    with (
        pytest.raises(KeyboardInterrupt),
        BundleWriter(tmp_path / "bundle", overwrite=True) as writer,
    ):
        fill_toy(make_toy(seed=3), writer.folder)
        assert open_bundle(tmp_path / "bundle", verify="full").digest == old.digest
        raise KeyboardInterrupt
    assert open_bundle(tmp_path / "bundle", verify="full").digest == old.digest
    assert files_in(tmp_path) == ["bundle"]


def test_overwriting_puts_the_old_bundle_back_when_interrupted_between_the_renames(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_toy(toy, tmp_path / "bundle")
    rename, calls = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_toy(make_toy(seed=3), tmp_path / "bundle", overwrite=True)
    assert open_bundle(tmp_path / "bundle", verify="full").digest == old.digest
    assert files_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_overwriting_refuses_what_is_not_a_bundle(toy: Toy, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    if kind == "file":
        output.write_text("precious")
    else:
        folder = output if kind == "folder" else tmp_path / "target"
        folder.mkdir()
        (folder / "thesis.txt").write_text("precious")
        if kind == "link":
            output.symlink_to(folder)
    with pytest.raises(OutputExistsError):
        write_toy(toy, output, overwrite=True)
    kept = output if kind == "file" else output / "thesis.txt"
    assert kept.read_text() == "precious"


def killed_while_writing(output: Path, toy: Toy) -> None:
    """Runs in a child that dies in the middle of an export."""
    with BundleWriter(output) as writer:
        fill_toy(toy, writer.folder)
        os._exit(9)


def test_writer_removes_what_a_killed_export_left(toy: Toy, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=killed_while_writing, args=(tmp_path / "bundle", toy)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    (left,) = files_in(tmp_path)
    assert left.endswith(".partial")
    write_toy(toy, tmp_path / "bundle")
    assert files_in(tmp_path) == ["bundle"]


def test_writer_leaves_the_partial_files_of_a_living_export_alone(toy: Toy, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as first:
        manifest = fill_toy(toy, first.folder)
        with pytest.raises(RuntimeError), BundleWriter(tmp_path / "bundle"):
            assert len(files_in(tmp_path)) == 2
            raise RuntimeError
        first.commit(manifest)
    assert files_in(tmp_path) == ["bundle"]


def test_writer_leaves_a_living_export_alone_when_it_cannot_see_its_process(
    toy: Toy, tmp_path: Path
) -> None:
    """A process of another namespace is like one that /proc does not list."""
    with BundleWriter(tmp_path / "bundle") as first:
        manifest = fill_toy(toy, first.folder)
        unseen = first.folder.with_name(
            first.folder.name.replace(f".{os.getpid()}-", ".4194303999-")
        )
        first._folder = first.folder.rename(unseen)
        write_toy(toy, tmp_path / "bundle")
        assert unseen.is_dir()
        with pytest.raises(OutputBusyError):
            first.commit(manifest)


def test_writer_says_so_when_its_folder_vanishes(toy: Toy, tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"\.partial was removed while this export"),
        BundleWriter(tmp_path / "bundle") as writer,
    ):
        manifest = fill_toy(toy, writer.folder)
        shutil.rmtree(writer.folder)
        writer.commit(manifest)


def test_writer_puts_back_an_old_bundle_whose_successor_never_came(
    toy: Toy, tmp_path: Path
) -> None:
    old = write_toy(toy, tmp_path / "bundle")
    (tmp_path / "bundle").rename(tmp_path / ".bundle.0123456789abcdef.old")
    with pytest.raises(OutputExistsError):
        write_toy(toy, tmp_path / "bundle")
    assert open_bundle(tmp_path / "bundle", verify="full").digest == old.digest
    assert files_in(tmp_path) == ["bundle"]


def test_the_second_of_two_writers_is_told_that_the_place_is_taken(
    toy: Toy, tmp_path: Path
) -> None:
    with (
        pytest.raises(OutputBusyError, match="another export"),
        BundleWriter(tmp_path / "bundle") as slow,
    ):
        manifest = fill_toy(toy, slow.folder)
        fast = write_toy(make_toy(seed=3), tmp_path / "bundle")
        slow.commit(manifest)
    assert open_bundle(tmp_path / "bundle", verify="full").digest == fast.digest
    assert files_in(tmp_path) == ["bundle"]


def test_the_last_of_two_overwriting_writers_wins_whole(toy: Toy, tmp_path: Path) -> None:
    write_toy(toy, tmp_path / "bundle")
    with BundleWriter(tmp_path / "bundle", overwrite=True) as slow:
        manifest = fill_toy(make_toy(seed=4), slow.folder)
        write_toy(make_toy(seed=3), tmp_path / "bundle", overwrite=True)
        last = slow.commit(manifest)
    assert open_bundle(tmp_path / "bundle", verify="full").digest == last.digest
    assert files_in(tmp_path) == ["bundle"]


def test_writer_has_no_folder_outside_its_with_block(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="outside its with block"):
        _ = BundleWriter(tmp_path / "bundle").folder
