"""The device side: opens a bundle, chains its segments, stops when an exit's score says so.

`load` gives a `Model`; calling it runs the ``forward`` program and returns a `Result`.
`load_decoder` gives a `Decoder`, whose `generate` continues texts and whose `chat` answers
conversations. `Policy` says when to stop. Needs numpy and one engine library, which is imported
when a model is loaded, never before.

    with edgeexit.runtime.load("bundle", policy="policy.json") as model:
        result = model({"pixel_values": images})   # result.outputs["logits"], result.exit_names
"""

from __future__ import annotations

from edgeexit.bundle.policy import Policy, read_policy, write_policy
from edgeexit.runtime.load import load, load_decoder, load_unsplit
from edgeexit.runtime.programs.forward import Model, Result
from edgeexit.runtime.programs.generate import Decoder, Generation, Piece
from edgeexit.runtime.programs.sampling import Sampling

__all__ = [
    "Decoder",
    "Generation",
    "Model",
    "Piece",
    "Policy",
    "Result",
    "Sampling",
    "load",
    "load_decoder",
    "load_unsplit",
    "read_policy",
    "write_policy",
]
