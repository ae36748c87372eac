"""Every form of data gives the same rows, and every bad form an error that names file and row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeexit.bundle.manifest import ImagePreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, UsageError
from edgeexit.measure.data import Batch, open_data
from edgeexit.preprocessing.images import preprocess_images
from tests.toys import make_inputs

TEXTS = ["w1 w2 w3", "w4", "w5 w6 nothing", "w7 w8 w9 w10 w11"]


def read(source: Path | str, bundle: Bundle, size: int = 2) -> list[Batch]:
    return list(open_data(source, bundle).batches(size))


def labels_of(batches: list[Batch]) -> list[int]:
    return [int(label) for batch in batches for label in batch.labels]


def test_npz_gives_batches_in_order_when_rows_do_not_divide(
    toy_bundle: Bundle, tmp_path: Path
) -> None:
    inputs = make_inputs(5)
    np.savez(tmp_path / "d.npz", **inputs, label=np.array([0, 1, 2, 1, 0], np.uint8))
    batches = read(tmp_path / "d.npz", toy_bundle)
    assert [batch.rows for batch in batches] == [2, 2, 1]
    assert np.array_equal(np.concatenate([b.inputs["x"] for b in batches]), inputs["x"])
    assert all(batch.inputs["scale"].shape == (1,) for batch in batches)
    assert labels_of(batches) == [0, 1, 2, 1, 0]


def test_npz_takes_label_names_when_the_bundle_has_them(
    bert_bundle: Bundle, tmp_path: Path
) -> None:
    ids = np.ones((3, 5), np.int64)
    names = ("input_ids", "attention_mask", "token_type_ids")
    np.savez(tmp_path / "d.npz", **dict.fromkeys(names, ids), label=["good", "bad", "fair"])
    assert labels_of(read(tmp_path / "d.npz", bert_bundle)) == [2, 0, 1]


def _spoil(arrays: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    changes = {
        "missing": lambda a: {k: v for k, v in a.items() if k != "shift"},
        "unknown": lambda a: a | {"y": a["x"]},
        "type": lambda a: a | {"x": a["x"].astype(np.float64)},
        "rank": lambda a: a | {"x": a["x"][..., None]},
        "shape": lambda a: a | {"x": a["x"][:, :-1]},
        "rows": lambda a: a | {"shift": a["shift"][:-1]},
        "empty": lambda a: {k: v if k == "scale" else v[:0] for k, v in a.items()},
        "labels": lambda a: a | {"label": a["label"][:-1]},
        "label value": lambda a: a | {"label": np.array([0, 1, 3, 0, 0])},
        "label name": lambda a: a | {"label": np.array(["a", "b", "c", "d", "e"])},
        "label nan": lambda a: a | {"label": np.array([np.nan, 1.0, 2.0, 0.0, 0.0])},
        "label kind": lambda a: a | {"label": np.array([0.0, 1.0, 2.0, 0.0, 0.0])},
    }
    return changes[what](arrays)


@pytest.mark.parametrize(
    "what,message",
    [
        ("missing", "input shift is missing"),
        ("unknown", "there is no input y"),
        ("type", "input x is float64, the model takes float32"),
        ("rank", r"input x has the shape \[5, 6, 1\]"),
        ("shape", r"input x has the shape \[5, 5\]"),
        ("rows", r"input shift has the shape \[4, 1\]"),
        ("empty", "is empty"),
        ("labels", r"label has the shape \[4\], the inputs have 5 rows"),
        ("label value", "row 2: the label 3 is out of range"),
        ("label name", "row 0: 'a' is not a label"),
        ("label nan", "row 0: the label is NaN, a missing value"),
        ("label kind", "row 0: the label 0.0 is a floating-point number"),
    ],
)
def test_npz_is_refused_with_its_name_when_it_does_not_fit(
    toy_bundle: Bundle, tmp_path: Path, what: str, message: str
) -> None:
    arrays = make_inputs(5) | {"label": np.array([0, 1, 2, 1, 0])}
    np.savez(tmp_path / "bad.npz", **_spoil(arrays, what))
    with pytest.raises(DataError, match=rf"bad\.npz: .*{message}"):
        read(tmp_path / "bad.npz", toy_bundle)


def test_npz_is_refused_when_it_holds_pickles(toy_bundle: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", x=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"bad\.npz: .*pickled"):
        read(tmp_path / "bad.npz", toy_bundle)


def test_npz_is_refused_when_it_is_a_single_array(toy_bundle: Bundle, tmp_path: Path) -> None:
    with (tmp_path / "bad.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"bad\.npz: .*one array"):
        read(tmp_path / "bad.npz", toy_bundle)


def test_jsonl_pads_texts_to_their_batch_when_lengths_differ(
    bert_bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    rows = [
        {"text": text, "label": label}
        for text, label in zip(TEXTS, [0, 1, "good", "bad"], strict=True)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    first, second = read(path, bert_bundle)
    assert first.inputs["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]
    assert first.inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert second.inputs["input_ids"].tolist() == [
        [2, 9, 10, 1, 3, 0, 0],
        [2, 11, 12, 13, 14, 15, 3],
    ]
    assert all(value.dtype == np.int64 for value in first.inputs.values())
    assert labels_of([first, second]) == [0, 1, 2, 0]


def test_jsonl_marks_the_second_text_when_rows_are_pairs(
    bert_bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "w1", "text_pair": "w2 w3"}))
    (batch,) = read(path, bert_bundle)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert batch.labels is None


def test_texts_are_cut_when_they_are_longer_than_the_model_takes(
    bert_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "w1 " * 200}))
    (batch,) = read(tmp_path / "d.jsonl", bert_bundle)
    assert batch.inputs["input_ids"].shape == (1, 40)


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"label": 0}', "line 2: there is no 'text'"),
        ('{"text": 3}', "line 2: 'text' is not a string"),
        ('{"text": "w1", "label": "fine"}', "line 2: 'fine' is not a label"),
        ('{"text": "w1", "label": 3}', "line 2: the label 3"),
        ('{"text": "w1", "label": -1}', "line 2: the label -1"),
        ('{"text": "w1", "label": true}', "line 2: 'True' is not a label"),
        ('{"text": "w1"}', "line 2: the label is missing"),
        ('{"text": "w1", "label": 0, "text_pair": 1}', "line 2: 'text_pair' is not a string"),
    ],
)
def test_jsonl_is_refused_with_its_line_when_a_row_is_bad(
    bert_bundle: Bundle, tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "w1", "label": 0}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl: {message}"):
        read(path, bert_bundle)


def test_jsonl_is_refused_when_labels_begin_in_a_later_batch(
    bert_bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "w1"}\n{"text": "w2"}\n{"text": "w1", "label": 0}\n')
    with pytest.raises(DataError, match="row 2 has a label"):
        read(path, bert_bundle)


def test_jsonl_is_refused_when_it_is_empty(bert_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read(tmp_path / "bad.jsonl", bert_bundle)


def test_jsonl_is_refused_when_the_bundle_has_no_preprocessing(
    toy_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"as \.npz: x, shift, scale"):
        read(tmp_path / "bad.jsonl", toy_bundle)


def save_image(
    path: Path, seed: int, *, mode: str = "RGB", size: tuple[int, int] = (24, 20)
) -> None:
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def test_folders_give_labels_when_images_lie_in_them(vit_bundle: Bundle, tmp_path: Path) -> None:
    for number, folder in enumerate(["owl", "cat", "cat"]):
        save_image(tmp_path / folder / f"{number}.png", number)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    batches = read(tmp_path, vit_bundle)
    assert labels_of(batches) == [0, 0, 2]
    assert batches[0].inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert batches[0].inputs["pixel_values"].dtype == np.float32


def test_folder_and_jsonl_give_the_same_pixels_when_images_are_the_same(
    vit_bundle: Bundle, tmp_path: Path
) -> None:
    for number, mode in enumerate(["RGB", "L", "RGBA", "P"]):
        save_image(tmp_path / "images" / f"{number}.png", number, mode=mode)
    rows = [{"image": f"images/{number}.png", "label": "dog"} for number in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flat = read(tmp_path / "images", vit_bundle)
    listed = read(tmp_path / "d.jsonl", vit_bundle)
    assert flat[0].labels is None
    assert labels_of(listed) == [1] * 4
    for one, other in zip(flat, listed, strict=True):
        assert np.array_equal(one.inputs["pixel_values"], other.inputs["pixel_values"])


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda folder: None, "no images"),
        (lambda folder: save_image(folder / "bird/1.png", 0), "folder bird: 'bird' is not a label"),
        (lambda folder: save_image(folder / "7/1.png", 0), "folder 7: the label 7"),
        (
            lambda folder: (save_image(folder / "1.png", 0), save_image(folder / "cat/1.png", 0)),
            "both images and folders",
        ),
        (
            lambda folder: (folder / "broken.png").write_bytes(b"\x89PNG"),
            "broken.png: not an image",
        ),
    ],
)
def test_folder_is_refused_when_it_does_not_fit(
    vit_bundle: Bundle, tmp_path: Path, spoil: object, message: str
) -> None:
    (tmp_path / "data").mkdir()
    spoil(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data", vit_bundle)


@pytest.mark.parametrize(
    "name,content", [("cut.png", b"\x89PNG\r\n\x1a\n"), ("missing.png", None), ("empty.jpg", b"")]
)
def test_jsonl_names_line_and_image_when_an_image_cannot_be_read(
    vit_bundle: Bundle, tmp_path: Path, name: str, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"image": name}))
    with pytest.raises(DataError, match=rf"bad\.jsonl: line 1: {name}"):
        read(tmp_path / "bad.jsonl", vit_bundle)


@pytest.mark.parametrize("mode,size", [("RGB", (30, 20)), ("L", (20, 30)), ("RGB", (12, 9))])
@pytest.mark.parametrize("edge", [None, 18])
def test_images_are_scaled_and_normalised_as_declared(
    mode: str, size: tuple[int, int], edge: int | None
) -> None:
    channels = 1 if mode == "L" else 3
    declared = ImagePreprocessing(
        input="x",
        height=14,
        width=16,
        mode=mode,
        shortest_edge=edge,
        scale=1 / 255,
        mean=[0.1, 0.2, 0.3][:channels],
        std=[0.5, 0.6, 0.7][:channels],
    )
    random = np.random.default_rng(0)
    grey = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    found = preprocess_images(declared, [grey])
    image = grey.convert(mode)
    if edge is None:
        image = image.resize((16, 14), Image.Resampling.BILINEAR)
    else:
        factor = edge / min(size)
        whole = image.resize(
            (int(size[0] * factor), int(size[1] * factor)), Image.Resampling.BILINEAR
        )
        left, top = (whole.width - 16) // 2, (whole.height - 14) // 2
        image = whole.crop((left, top, left + 16, top + 14))
    pixels = np.asarray(image, np.float64).reshape(14, 16, channels)
    assert found.shape == (1, channels, 14, 16)
    for channel in range(channels):
        expected = (pixels[..., channel] / 255 - declared.mean[channel]) / declared.std[channel]
        np.testing.assert_allclose(found[0, channel], expected, atol=1e-5)


MODULE = """
import numpy as np
from tests.toys import make_inputs

def whole():
    return make_inputs(5), np.array([0, 1, 2, 1, 0])

def stream():
    for seed in range(3):
        yield make_inputs(3, seed=seed), None

def nothing():
    return iter(())

def number():
    return 3

def bad():
    yield make_inputs(2)

def wrong_label():
    yield make_inputs(2), np.array([0, 1])
    yield make_inputs(2), np.array([0, 9])

value = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "edgeexit_test_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "edgeexit_test_data"
    sys.modules.pop("edgeexit_test_data", None)


def test_function_gives_rows_when_it_returns_a_pair(toy_bundle: Bundle, module: str) -> None:
    batches = read(f"{module}:whole", toy_bundle, size=4)
    assert [batch.rows for batch in batches] == [4, 1]
    assert labels_of(batches) == [0, 1, 2, 1, 0]


def test_function_streams_when_it_yields_pairs(toy_bundle: Bundle, module: str) -> None:
    batches = read(f"{module}:stream", toy_bundle, size=2)
    assert [batch.rows for batch in batches] == [2, 1, 2, 1, 2, 1]


def test_function_is_found_when_a_file_is_named(toy_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "some_data.py").write_text(MODULE)
    assert len(read(f"{tmp_path}/some_data.py:whole", toy_bundle, size=5)) == 1


def test_function_is_found_when_its_file_has_a_dataclass(
    toy_bundle: Bundle, tmp_path: Path
) -> None:
    """Dataclasses with annotations as text look their module up in `sys.modules`."""
    given = "@dataclasses.dataclass\nclass Given:\n    rows: int = 0\n"
    heading = "from __future__ import annotations\nimport dataclasses\n"
    (tmp_path / "some_data.py").write_text(heading + MODULE + given)
    assert len(read(f"{tmp_path}/some_data.py:whole", toy_bundle, size=5)) == 1


@pytest.mark.parametrize(
    "name,kind,message",
    [
        ("nothing", DataError, "no rows"),
        ("number", DataError, "returned a int"),
        ("bad", DataError, r"batch 0: not a pair"),
        ("wrong_label", DataError, r"batch 1: row 1: the label 9"),
        ("value", UsageError, "has no function value"),
        ("absent", UsageError, "has no absent"),
        ("not a name", UsageError, "not of the form"),
    ],
)
def test_function_is_refused_when_it_does_not_fit(
    toy_bundle: Bundle, module: str, name: str, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        read(f"{module}:{name}", toy_bundle)


@pytest.mark.parametrize(
    "source,kind,message",
    [
        ("nowhere.npz", DataError, "nowhere.npz does not exist"),
        ("no_such_module:make", UsageError, "no module no_such_module"),
        ("no_such_file.py:make", UsageError, "no_such_file.py does not exist"),
    ],
)
def test_data_is_refused_when_it_is_not_there(
    toy_bundle: Bundle, source: str, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        read(source, toy_bundle)


def test_data_is_refused_when_its_ending_is_unknown(toy_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(DataError, match="unsupported format"):
        read(tmp_path / "d.csv", toy_bundle)
