"""The example's conversion: a small Whisper, written as CTranslate2 writes it, comes back whole."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import pytest
import torch
import transformers

import edgeexit
from tests.speech_models import make_tokenizer, make_whisper

CONVERT = Path(edgeexit.__file__).parent.parent / "examples/whisper/convert.py"


@pytest.fixture(scope="module")
def convert() -> ModuleType:
    spec = importlib.util.spec_from_file_location("whisper_convert", CONVERT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays_of(model: transformers.WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The weights by CTranslate2's names."""
    found: dict[str, np.ndarray] = {}
    base = model.model

    def put(name: str, *layers: torch.nn.Module) -> None:
        weights = [layer.weight for layer in layers]
        biases = [
            torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers
        ]
        found[f"{name}/weight"] = torch.cat(weights).detach().numpy()  # type: ignore[arg-type]
        found[f"{name}/bias"] = torch.cat(biases).detach().numpy()  # type: ignore[arg-type]

    def norm(name: str, layer: torch.nn.Module) -> None:
        found[f"{name}/gamma"] = layer.weight.detach().numpy()  # type: ignore[operator,union-attr]
        found[f"{name}/beta"] = layer.bias.detach().numpy()  # type: ignore[operator,union-attr]

    for half, stack in (("encoder", base.encoder), ("decoder", base.decoder)):
        found[f"{half}/position_encodings/encodings"] = (
            stack.embed_positions.weight.detach().numpy()
        )
        found[f"{half}/num_heads"] = np.array(2, np.int16)
        norm(f"{half}/layer_norm", stack.layer_norm)
        for number, layer in enumerate(stack.layers):
            at, own = f"{half}/layer_{number}", layer.self_attn
            norm(f"{at}/self_attention/layer_norm", layer.self_attn_layer_norm)
            norm(f"{at}/ffn/layer_norm", layer.final_layer_norm)
            put(f"{at}/self_attention/linear_0", own.q_proj, own.k_proj, own.v_proj)
            put(f"{at}/self_attention/linear_1", own.out_proj)
            put(f"{at}/ffn/linear_0", layer.fc1)
            put(f"{at}/ffn/linear_1", layer.fc2)
            if half == "decoder":
                cross = layer.encoder_attn
                norm(f"{at}/attention/layer_norm", layer.encoder_attn_layer_norm)
                put(f"{at}/attention/linear_0", cross.q_proj)
                put(f"{at}/attention/linear_1", cross.k_proj, cross.v_proj)
                put(f"{at}/attention/linear_2", cross.out_proj)
    put("encoder/conv1", base.encoder.conv1)
    put("encoder/conv2", base.encoder.conv2)
    found["decoder/embeddings/weight"] = base.decoder.embed_tokens.weight.detach().numpy()
    return found


def write_model(path: Path, arrays: dict[str, np.ndarray], *, version: int = 6) -> None:
    def text(file: BinaryIO, value: str) -> None:
        file.write(struct.pack("<H", len(value) + 1) + value.encode() + b"\0")

    kinds = {"float32": 0, "int16": 2}
    with path.open("wb") as file:
        file.write(struct.pack("<I", version))
        text(file, "WhisperSpec")
        file.write(struct.pack("<II", 3, len(arrays)))
        for name, value in arrays.items():
            text(file, name)
            file.write(struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape))
            file.write(struct.pack("<BI", kinds[value.dtype.name], value.nbytes) + value.tobytes())
        file.write(struct.pack("<I", 1))
        text(file, "decoder/projection/weight")
        text(file, "decoder/embeddings/weight")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder / "model.bin", arrays_of(make_whisper()))
    make_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"alignment_heads": [], "suppress_ids": [5], "suppress_ids_begin": [32]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_the_converted_model_is_the_original(
    convert: ModuleType, source: Path, tmp_path: Path
) -> None:
    convert.convert(source, tmp_path / "checkpoint")
    made = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    for name, value in make_whisper().state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, msg=name)
    assert made.generation_config.suppress_tokens == [5]


def test_other_files_are_refused(convert: ModuleType, source: Path, tmp_path: Path) -> None:
    write_model(source / "model.bin", arrays_of(make_whisper()), version=9)
    with pytest.raises(SystemExit, match="format 9 is not known"):
        convert.convert(source, tmp_path / "checkpoint")
    arrays = arrays_of(make_whisper())
    arrays["encoder/layer_0/self_attention/linear_0/bias"] = np.ones(96, np.float32)
    write_model(source / "model.bin", arrays)
    with pytest.raises(SystemExit, match="keys have a bias"):
        convert.convert(source, tmp_path / "checkpoint")
