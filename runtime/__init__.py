"""The device side: opens a bundle, chains its segments, stops when an exit's score says so.

`load` gives a `Model`; calling it runs the ``forward`` program and returns a `Result`. `Policy`
says when to stop. Needs numpy and one engine library, which is imported when a model is loaded,
never before.

    with edgeexit.runtime.load("bundle", policy="policy.json") as model:
        result = model({"pixel_values": images})   # result.outputs["logits"], result.exit_names
"""

from __future__ import annotations

from edgeexit.runtime.forward import Model, Result
from edgeexit.runtime.load import load, load_unsplit
from edgeexit.runtime.policy import Policy, read_policy, write_policy

__all__ = ["Model", "Policy", "Result", "load", "load_unsplit", "read_policy", "write_policy"]
