"""The workstation side: a torch model with exits, or an ONNX graph with exit outputs, becomes a
bundle.

`contract` is what a model must offer; `models` holds one adapter per architecture family and
`methods` trains exits. `graphs` turns segments into ONNX, and `stack` the layers of a decoder, each
kind of them traced once, in the forms of `attention`; `cut` splits an ONNX graph at its exits,
`store` keeps every tensor once; `package`, `decode`, `onnxbundle`, `quantise` and `quantisedecode`
write the bundle. Everything here may import torch; nothing in `edgeexit.runtime` may
import anything here.
"""

from __future__ import annotations

from edgeexit.export.contract import DecodeModel, Exit, ExitModel, Segment
from edgeexit.export.decode import export_decoder
from edgeexit.export.onnxbundle import export_onnx
from edgeexit.export.package import export_model
from edgeexit.export.quantise import export_int8
from edgeexit.export.quantisedecode import export_int8_decoder

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
