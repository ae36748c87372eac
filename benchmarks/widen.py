"""Writes a trained encoder-decoder with its width multiplied, which computes the same function.

    python benchmarks/widen.py CHECKPOINT OUTPUT --by 8

Every channel of a state occurs several times: rows of weights are repeated, and columns repeated
and divided by their number. Norms, attention (its heads are repeated), exits and scores then give
what they gave before. So a model that was trained narrow takes its decisions at the cost of layers
as wide as real ones: times of a benchmark then are those of the wide model, qualities those of the
narrow one. It says nothing about a model that needs its width.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TABLES = ("shared.weight", "embed_positions.weight")


def widened(name: str, weight: torch.Tensor, by: int) -> torch.Tensor:
    """A weight of the wide model."""
    if "vision_tower" in name or "final_logits_bias" in name or "_embed." in name:
        return weight
    if name.endswith("image_projection.weight"):  # its inputs are the tower's
        return weight.repeat(by, 1)
    if name.endswith(TABLES):
        return weight.repeat(1, by)
    if weight.ndim == 1:
        return weight.repeat(by)
    return weight.repeat(by, by) / by


def main() -> None:
    """Widens a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--by", type=int, default=8)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for path in given.checkpoint.iterdir():
        if path.is_file():
            shutil.copy(path, given.output)
    config = json.loads((given.checkpoint / "config.json").read_text())
    text = config.get("text_config", config)
    for key in ("d_model", "encoder_ffn_dim", "decoder_ffn_dim"):
        text[key] *= given.by
    for key in ("encoder_attention_heads", "decoder_attention_heads"):
        text[key] *= given.by
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = False  # logits keep their scale
    if "vision_config" in config:
        config["vision_config"]["projection_dim"] = text["d_model"]
    (given.output / "config.json").write_text(json.dumps(config, indent=2))
    weights = load_file(given.checkpoint / "model.safetensors")
    made = {name: widened(name, weight, given.by) for name, weight in weights.items()}
    [shared] = [name for name in weights if name.endswith("shared.weight")]
    for half in ("encoder", "decoder"):
        made[shared.replace("shared", f"{half}.embed_tokens")] = made[shared].clone()
    made["lm_head.weight"] = made[shared] / given.by
    whole = {name: weight.contiguous() for name, weight in made.items()}
    save_file(whole, given.output / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
