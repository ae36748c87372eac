"""Checkpoints as users bring them: what is damaged is named, what would be left out is said."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgeexit.errors import ExportError
from edgeexit.export.pretrained import from_pretrained
from tests.checkpoints import make_model, save_checkpoint
from tests.decoders import save_decoder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder("llama", tmp_path_factory.mktemp("llama") / "checkpoint")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "checkpoint"))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ExportError) as caught:
        from_pretrained(folder, exits=[1, 2])
    for word in words:
        assert word in str(caught.value)


def test_weights_that_were_cut_off_are_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(copy, "model.safetensors is incomplete", "Download the file again")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_in_the_place_of_a_file_is_named(copy: Path, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
    (copy / name).write_text(pointer)
    refused(copy, f"{name} is a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": ["llama"]}', "\ufeff{}"])
def test_a_configuration_that_is_none_is_named(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    refused(copy, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 4.5},
        {"rope_scaling": {"rope_type": "none of them", "factor": 2.0}},
        {"hidden_act": "nothing"},
        {"vocab_size": -1},
        {"vocab_size": 299},
    ],
)
def test_a_configuration_that_cannot_be_is_an_error_of_ours(
    copy: Path, changes: dict[str, Any]
) -> None:
    configure(copy, **changes)
    refused(copy, str(copy))


QUANTISED: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "hyper4": {"quant_method": "hyper4"},
    "quantization_config": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_by_their_kind(copy: Path, kind: str) -> None:
    configure(copy, quantization_config=QUANTISED[kind])
    refused(copy, "already quantised", kind, "--weights int4 or int8")


def write_adapter(folder: Path) -> None:
    weights = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(size)
        for part, size in (("A", (4, 64)), ("B", (64, 4)))
    }
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "somebody/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def test_an_adapter_beside_the_weights_is_not_left_out_in_silence(copy: Path) -> None:
    write_adapter(copy)
    refused(copy, "LORA adapter would be ignored", "--adapter FOLDER")


def test_an_adapter_alone_names_the_weights_that_it_belongs_to(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    refused(tmp_path / "adapter", "LORA adapter without the weights", "somebody/llama")


def test_weights_that_the_model_has_no_place_for_are_said(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configure(copy, num_hidden_layers=3)
    with caplog.at_level(logging.WARNING):
        from_pretrained(copy, exits=[1, 2])
    assert "9 weights of the checkpoint are not used" in caplog.text
    assert "model.layers.3." in caplog.text


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    configure(copy, intermediate_size=50)
    refused(copy, "mlp")


def test_a_weight_that_is_missing_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, "no weights for model.layers.2.mlp.up_proj.weight")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_checkpoint_damaged_anywhere_gives_an_error_of_ours_or_is_read(
    data: st.DataObject, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path_factory.mktemp("damaged") / "checkpoint"))
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    raw = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    else:  # the beginning says what the rest is
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, min(len(raw), 4000) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        from_pretrained(folder, exits=[1, 2])
    except ExportError as error:
        assert error.what and error.fix
    finally:
        shutil.rmtree(folder.parent)


def classifier(folder: Path, **changes: Any) -> Path:
    save_checkpoint("bert", folder)
    configure(folder, **changes)
    return folder


def test_a_multi_label_classifier_is_refused(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "m", problem_type="multi_label_classification")
    with pytest.raises(ExportError, match=r"multi-label.*problem_type"):
        from_pretrained(folder, exits=[1], untrained=True)


@pytest.mark.parametrize("changes", [{"problem_type": "regression"}, {}])
def test_a_regression_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = make_model("bert")
    model.config.num_labels = 1
    model.classifier = torch.nn.Linear(32, 1)
    model.save_pretrained(tmp_path)
    configure(tmp_path, **changes)
    with pytest.raises(ExportError, match="regression"):
        from_pretrained(tmp_path, exits=[1], untrained=True)


LABELS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "from 1": ({"1": "a", "2": "b", "3": "c"}, ("0", "a", "b"), "no name for class 0 of 3"),
    "twice": ({"0": "same", "1": "same", "2": "other"}, ("same", "same", "other"), "twice"),
    "numbers": ({"0": 10, "1": 2, "2": 0}, ("10", "2", "0"), ""),
    "empty": ({"0": "", "1": "b", "2": "c"}, ("0", "b", "c"), "no name for class 0"),
    "gap": ({"0": "a", "1": "b", "5": "c"}, ("a", "b", "2"), "and one for class 5"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_names_of_classes_stand_at_their_logits(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    given_, expected, said = LABELS[kind]
    folder = classifier(tmp_path / "m", id2label=given_)
    with caplog.at_level(logging.WARNING):
        made = from_pretrained(folder, exits=[1], untrained=True)
    assert made.labels == expected  # type: ignore[union-attr]
    assert said in caplog.text if said else not caplog.text


class Code:
    """Runs something where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "edgeexit-ran-code"),)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Code()}, folder / "pytorch_model.bin")


def _shards(folder: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "model.safetensors").rename(folder / names["a"])


def _packed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {k: v.to(torch.int8) if "mlp" in k else v for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _instead(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        if name:
            (folder / name).write_bytes(b"GGUF")

    return change


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "code in a pickle": (_pickled, "code in it is not run.*safetensors"),
    "a shard missing": (_shards, r"model-00002-of-00002\.safetensors is not there"),
    "8 bits": (_packed, "mlp.*is stored as I8"),
    "GGUF": (_instead("m.gguf"), "m.gguf is a GGUF file.*-m .*m.gguf"),
    "ONNX": (_instead("m.onnx"), "m.onnx is an ONNX file.*Give the file itself"),
    "nothing": (_instead(""), "the folder is empty"),
    "code of its own": (
        lambda f: configure(f, auto_map={"AutoConfig": "x.Y"}, model_type="new"),
        "custom Python code.*not run",
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", OTHERS)
def test_a_folder_that_cannot_be_read_says_what_it_is(copy: Path, kind: str) -> None:
    change, words = OTHERS[kind]
    change(copy)
    with pytest.raises(ExportError, match=words):
        from_pretrained(copy, exits=[1])
    assert not (Path(tempfile.gettempdir()) / "edgeexit-ran-code").exists()


def test_a_head_that_the_checkpoint_lacks_is_said_to_be_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model("bert").bert.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        made = from_pretrained(tmp_path, exits=[1], untrained=True)
    assert "no weights for classifier.bias, classifier.weight; they are random" in caplog.text
    assert made.provenance["head"] == "untrained"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["with space, ünïcode 東京", "slash/", "link"])
def test_any_name_of_a_folder_will_do(llama: Path, tmp_path: Path, name: str) -> None:
    if name == "link":
        (tmp_path / name).symlink_to(llama)
    else:
        shutil.copytree(llama, tmp_path / name)
    assert from_pretrained(f"{tmp_path}/{name}", exits=[1]).split_model()
