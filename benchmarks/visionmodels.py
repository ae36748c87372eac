"""Creates and exports the vision-language models that `vlm.py` measures: the shapes of real ones
with random weights, so only their times mean something.

    python benchmarks/visionmodels.py checkpoint SHAPE FOLDER
    python benchmarks/visionmodels.py export SHAPE FOLDER      # prints time and peak memory
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from edgeexit.runtime.memory import peak_bytes

_INTERNVL: dict[str, Any] = {
    "vision": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    },
    "text": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151674,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
_SMOLVLM: dict[str, Any] = {
    "vision": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 512,
        "patch_size": 16,
    },
    "text": {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
        "vocab_size": 49280,
        "max_position_embeddings": 8192,
    },
}
_SMALL_VISION = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}
_SMALL_VISION |= {"intermediate_size": 128}
_SMALL_TEXT = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4}
_SMALL_TEXT |= {"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512}
SHAPES: dict[str, dict[str, Any]] = {
    "internvl3-1b": _INTERNVL | {"family": "internvl"},
    "smolvlm-500m": _SMOLVLM | {"family": "smolvlm"},
    "quick": {
        "family": "internvl",
        "vision": _INTERNVL["vision"] | _SMALL_VISION | {"image_size": [112, 112]},
        "text": _INTERNVL["text"] | _SMALL_TEXT,
    },
}
"""Name -> family, and fields of the configurations (InternVL3-1B, SmolVLM-500M-Instruct)."""


def layers_of(shape: dict[str, Any]) -> dict[str, list[int]]:
    """Where the exits are: half and three quarters of the tower; a quarter, a third and half of the
    language model."""
    text, vision = (shape[part]["num_hidden_layers"] for part in ("text", "vision"))
    return {
        "exits": [text // 2],
        "image_drops": sorted({text // 4, text // 3}),
        "tower_exits": [vision // 2, 3 * vision // 4],
    }


def make_checkpoint(shape: dict[str, Any], folder: Path) -> None:
    """Saves a checkpoint with random weights."""
    import torch
    import transformers
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    t: Any = transformers
    torch.manual_seed(0)
    text = shape["text"] | {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    placeholder = text["vocab_size"] - 1
    if shape["family"] == "internvl":
        config = t.InternVLConfig(
            vision_config=t.InternVLVisionConfig(**shape["vision"]),
            text_config=t.Qwen2Config(**text),
            image_token_id=placeholder,
            downsample_ratio=0.5,
        )
        model = t.InternVLForConditionalGeneration(config)
    else:
        config = t.SmolVLMConfig(
            vision_config=SmolVLMVisionConfig(**shape["vision"]),
            text_config=t.LlamaConfig(**text),
            image_token_id=placeholder,
            scale_factor=4,
            tie_word_embeddings=False,
        )
        model = t.SmolVLMForConditionalGeneration(config)
    with torch.no_grad():  # zero as created, and software that sees that leaves them out
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)


def export(shape: dict[str, Any], folder: Path) -> dict[str, float]:
    """Exports the checkpoint. Returns seconds, and peak bytes above the memory of imports."""
    from models import warm_exporter

    from edgeexit.export import export as write_bundle
    from edgeexit.export.pretrained import from_pretrained

    warm_exporter()
    before = peak_bytes()
    started = time.perf_counter()
    split = from_pretrained(folder / "checkpoint", untrained=True, **layers_of(shape))  # type: ignore[arg-type]
    written = write_bundle(split.split_model(), folder / "bundle", overwrite=True)
    files = [path for path in written.path.rglob("*") if path.is_file()]
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_above_imports_of_weights": round((peak_bytes() - before) / written.weights_bytes, 3),
        "weights_bytes": written.weights_bytes,
        "bundle_bytes": sum(path.stat().st_size for path in files),
    }


def main() -> None:
    """Command line of the child process."""
    job, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if job == "checkpoint":
        make_checkpoint(SHAPES[name], folder / "checkpoint")
    else:
        print(json.dumps(export(SHAPES[name], folder)))


if __name__ == "__main__":
    main()
