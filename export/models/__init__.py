"""Architecture families: one short file each, which says what a model's stem, layers and head are.

`from_pretrained` reads a checkpoint directory (or hub id) with transformers and gives a classifier
or a causal language model with exits. To add a family: write a function ``trunk(model) -> Trunk``
in a new file (for images ``trunk(model, size)``, with the height and width that preprocessing
gives) and list its model type in `FAMILIES`; `bert` and `vit` are the examples to follow. For a
language model the function is ``trunk(model) -> DecoderTrunk``, the list `DECODERS` and the
example `opt`.
"""

from __future__ import annotations

from edgeexit.export.models.classifier import ExitClassifier, Trunk
from edgeexit.export.models.decoder import DecoderTrunk, ExitDecoder
from edgeexit.export.models.pretrained import DECODERS, FAMILIES, from_pretrained

__all__ = [
    "DECODERS",
    "FAMILIES",
    "DecoderTrunk",
    "ExitClassifier",
    "ExitDecoder",
    "Trunk",
    "from_pretrained",
]
