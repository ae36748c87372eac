"""The workstation side: a torch model with exits, or an ONNX graph with exit outputs, becomes a
bundle.

`contract` is what a model must offer. `pretrained` makes it of a checkpoint: `families` holds one
file per architecture, `exits` attaches exits to what that describes, `methods` trains them.
`trace` turns torch modules into ONNX, `cut` splits an ONNX graph at its exits, `passes` rewrites
graphs, `weights` keeps every tensor once, `samples` says what the model answers. `write` puts all
of it together (`export`), `cut.export_onnx` does so for ONNX files. Everything here may import
torch; nothing in `edgeexit.runtime` may import anything here.
"""

from __future__ import annotations

from edgeexit.export.contract import Component, Form, Layer, SplitModel, Stack, Table
from edgeexit.export.cut.export_onnx import export_onnx
from edgeexit.export.write import export

__all__ = ["Component", "Form", "Layer", "SplitModel", "Stack", "Table", "export", "export_onnx"]
