"""The workstation side: a torch model with exits, or an ONNX graph with exit outputs, becomes a
bundle.

`contract` is what a model must offer. `pretrained` makes it of a checkpoint: `families` holds one
adapter per architecture, `exits` attaches exits to what that describes, `methods` trains them.
`trace` turns torch modules into ONNX, `cut` splits an ONNX graph at its exits, `passes` rewrites
graphs, `weights` keeps every tensor once. Bundles are written by `write`, `write_decode`,
`cut.export_onnx`, `passes.quantise` and `passes.quantise_decode`. Everything here may import torch;
nothing in `edgeexit.runtime` may import anything here.
"""

from __future__ import annotations

from edgeexit.export.contract import DecodeModel, Exit, ExitModel, Segment
from edgeexit.export.cut.export_onnx import export_onnx
from edgeexit.export.passes.quantise import export_int8
from edgeexit.export.passes.quantise_decode import export_int8_decoder
from edgeexit.export.write import export_model
from edgeexit.export.write_decode import export_decoder

__all__ = [
    "DecodeModel",
    "Exit",
    "ExitModel",
    "Segment",
    "export_decoder",
    "export_int8",
    "export_int8_decoder",
    "export_model",
    "export_onnx",
]
