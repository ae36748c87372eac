"""Creates the models that `split.py` measures: the shape of BERT with random weights, and an exit
behind every layer.

It runs as a child process, ``python benchmarks/models.py checkpoint|export ...``, so that its
memory can be measured separately.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeexit.runtime.memory import peak_bytes


@dataclass(frozen=True)
class Shape:
    """A BERT classifier and the inputs it is measured with."""

    name: str
    layers: int
    width: int
    heads: int
    tokens: int
    vocabulary: int = 30522
    labels: int = 4


SHAPES = {
    "large": Shape("large", layers=12, width=768, heads=12, tokens=128),
    "small": Shape("small", layers=12, width=256, heads=4, tokens=32),
}
QUICK = {
    "large": Shape("large-quick", layers=4, width=256, heads=4, tokens=64, vocabulary=1000),
    "small": Shape("small-quick", layers=4, width=64, heads=2, tokens=16, vocabulary=1000),
}


def make_checkpoint(shape: Shape, folder: Path) -> None:
    """Saves a checkpoint with random weights and random exits."""
    import torch
    import transformers

    from edgeexit.export.pretrained import from_pretrained

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        vocab_size=shape.vocabulary,
        num_labels=shape.labels,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    from_pretrained(folder, exits=range(1, shape.layers), untrained=True).save_pretrained(folder)


def export(checkpoint: Path, bundle: Path) -> dict[str, float]:
    """Exports a checkpoint. Returns seconds, and peak bytes above the memory of imports."""
    import torch  # noqa: F401

    from edgeexit.export import export as write_bundle
    from edgeexit.export.pretrained import from_pretrained

    warm_exporter()
    before = peak_bytes()
    started = time.perf_counter()
    model = from_pretrained(checkpoint).split_model()
    written = write_bundle(model, bundle, overwrite=True)
    seconds = time.perf_counter() - started
    weights = written.weights_bytes
    return {
        "seconds": round(seconds, 2),
        "memory_above_imports_bytes": peak_bytes() - before,
        "memory_above_imports_of_weights": round((peak_bytes() - before) / weights, 3),
        "bundle_bytes": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        "weights_bytes": weights,
    }


def warm_exporter() -> None:
    """Exports one Linear, because the first export imports torch.onnx and its dependencies."""
    import torch

    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        torch.nn.Linear(2, 2),
        (torch.zeros(2, 2),),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )


def main() -> None:
    """Command line of the child process; ``export`` prints a JSON object as its last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["checkpoint", "export"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--shape", type=json.loads, help="fields of a Shape, as JSON")
    given = parser.parse_args()
    if given.job == "checkpoint":
        make_checkpoint(Shape(**given.shape), given.checkpoint)
    else:
        print(json.dumps(export(given.checkpoint, given.bundle)))


def as_json(shape: Shape) -> str:
    """A shape as an argument of `main`."""
    return json.dumps(asdict(shape))


if __name__ == "__main__":
    main()
