"""Architecture families: one short file each, which says what a model's stem, layers and head are.

`from_pretrained` reads a checkpoint directory (or hub id) with transformers and gives a classifier
with exits. To add a family: write a function ``trunk(model) -> Trunk`` in a new file (for images
``trunk(model, size)``, with the height and width that preprocessing gives) and list its model type
in `FAMILIES`; `bert` and `vit` are the examples to follow.
"""

from __future__ import annotations

from edgeexit.export.models.classifier import ExitClassifier, Trunk
from edgeexit.export.models.pretrained import FAMILIES, from_pretrained

__all__ = ["FAMILIES", "ExitClassifier", "Trunk", "from_pretrained"]
