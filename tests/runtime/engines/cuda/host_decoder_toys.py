"""Toys of every kind that write text, on the stand-in for TensorRT: engines for encoders, makers of
prompt states, gates, adapters and images among the tokens, compared with ONNX Runtime.

Run by test_device_memory.py in processes of its own, as host_gpu.py is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit.runtime import load
from edgeexit.runtime.build.profiles import Asked
from tests.decoder_toys import (
    batch_inputs,
    make_decoder_toy,
    make_rows,
    toy_policy,
    write_decoder_toy,
)
from tests.runtime.engines.cuda.host_tensorrt import built
from tests.runtime.engines.cuda.on_engine import model_on

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"adapter": 1},
    "stateless": {"stateless": True},
    "gate": {"gate": True, "prefix": True},
    "encoder": {"encoder": True},
}
THRESHOLDS = {
    "exit_1": 0.5, "exit_2": 0.5, "gate": 0.5, "vision_1": 0.6, "encoder_1": 0.6, "encoder_2": 0.6,
}  # fmt: skip


def compare(kind: str, folder: Path) -> None:
    """Tokens and exits of a toy of that kind, in every mode, alone and in batches."""
    toy = make_decoder_toy(**KINDS[kind])
    bundle = write_decoder_toy(toy, folder / "bundle")
    engine = built(bundle, folder / "engines", Asked({}, {}, {"batch": 6}))
    policy = toy_policy(toy, THRESHOLDS)
    modes = ["full", "exact", "fast"] + ["approximate"] * (kind != "adapter")
    with (
        model_on(bundle, engine, policy) as model,
        load(bundle, policy=policy, states="append") as host,
    ):
        assert model.describe_engine()["states"] == "append"
        for mode in modes:
            for lengths in ([9], [9, 12, 5]):
                rows = make_rows(toy, lengths)
                arguments: dict[str, Any] = {
                    "inputs": batch_inputs(rows), "max_new_tokens": 12, "mode": mode, "text": False,
                }  # fmt: skip
                if mode == "exact":
                    arguments |= {"drafts": 3, "draft_exit": model.exits[0].name}
                prompts = [row.prompt for row in rows]
                ours = model.generate(prompts, **arguments).finish()
                theirs = host.generate(prompts, **arguments).finish()
                assert ours.tokens == theirs.tokens, (mode, lengths)
                assert ours.statistics == theirs.statistics, (mode, lengths)
    with (
        model_on(bundle, engine, policy, unsplit=True) as model,
        load(bundle, policy=policy, unsplit=True, states="append") as host,
    ):
        rows = make_rows(toy, [9, 9])
        prompts, inputs = [row.prompt for row in rows], batch_inputs(rows)
        ours = model.generate(prompts, inputs=inputs, max_new_tokens=8, text=False).finish()
        theirs = host.generate(prompts, inputs=inputs, max_new_tokens=8, text=False).finish()
        assert ours.tokens == theirs.tokens
        np.testing.assert_equal(ours.statistics.exits, theirs.statistics.exits)


if __name__ == "__main__":
    compare(sys.argv[1], Path(sys.argv[2]))
