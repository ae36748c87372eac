"""The toy of `tests.toys` as two chains: the first two segments hand on their state, the other two
answer with it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from edgeexit.bundle.manifest import Chain, Exit, Run
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from tests.toys import fill_toy, make_toy


def write_two_chains(output: Path) -> Bundle:
    """Writes the bundle: chains ``front`` (exits ``front_1``, ``front_2``) and ``back``
    (``exit_3``, ``exit_4``)."""
    with BundleWriter(output) as writer:
        toy = make_toy()
        manifest = fill_toy(toy, writer.folder)
        whole = manifest.chains["forward"]
        exits = [
            Exit(
                name=f"front_{number + 1}",
                behind=f"s{number}",
                outputs={"h1": f"h{number}"},
                scores=whole.exits[number].scores,
            )
            for number in range(2)
        ]
        handed = next(t for t in manifest.components["s1"].outputs if t.name == "h1")
        front = Chain(components=["s0", "s1"], outputs=[handed], exits=exits, unsplit=["s0", "s1"])
        back = msgspec.structs.replace(whole, components=["s2", "s3"], exits=whole.exits[2:])
        path = writer.folder / "samples/reference.npz"
        with np.load(path) as file:
            arrays = dict(file)
        state = arrays["input/x"].astype(np.float64)
        for number, (weights, _) in enumerate(toy.layers[:2]):
            state = np.tanh(state @ weights * arrays["input/scale"] + arrays["input/shift"])
            arrays[f"front_{number + 1}/h1"] = state.astype(np.float32)
            for score in exits[number].scores:
                arrays[f"front_{number + 1}/{score}"] = arrays[f"exit_{number + 1}/{score}"]
        # Behind front_1 the other segments read the state of the first one.
        state = arrays["front_1/h1"].astype(np.float64)
        for number, (weights, head) in enumerate(toy.layers[2:], start=3):
            state = np.tanh(state @ weights * arrays["input/scale"] + arrays["input/shift"])
            arrays[f"front_1/exit_{number}/logits"] = (state @ head).astype(np.float32)
        np.savez(path, **arrays)
        return writer.commit(
            msgspec.structs.replace(
                manifest,
                chains={"front": front, "back": back},
                steps=[Run(chain="front"), Run(chain="back")],
            )
        )
