"""The device side: opens a bundle, runs its components, and stops at an exit whose score is enough.

`load` returns a `Model`. Classifiers are called; language models `generate` and `chat`. `Policy`,
`Rule` and `Schedule` set the thresholds. The package needs numpy and one engine library, which is
imported when a model is loaded.

    with edgeexit.runtime.load("bundle", policy="policy.json") as model:
        result = model({"pixel_values": images})   # result.outputs["logits"], result.exit_names
"""

from __future__ import annotations

from edgeexit.bundle.policy import Policy, Rule, Schedule, read_policy, write_policy
from edgeexit.runtime.load import load
from edgeexit.runtime.model import Model
from edgeexit.runtime.programs.forward import Result, Trace
from edgeexit.runtime.programs.generation import Generation, Piece
from edgeexit.runtime.programs.sampling import Sampling

__all__ = [
    "Generation",
    "Model",
    "Piece",
    "Policy",
    "Result",
    "Rule",
    "Sampling",
    "Schedule",
    "Trace",
    "load",
    "read_policy",
    "write_policy",
]
