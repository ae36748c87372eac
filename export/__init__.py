"""The workstation side: a torch model with exits, or an ONNX graph with exit outputs, becomes a
bundle.

`contract` defines a model that can be exported. `pretrained` makes it from a checkpoint: `families`
has one file per architecture, `exits` attaches exits, `methods` trains them. `trace` turns torch
modules into ONNX, `cut` splits an ONNX graph at its exits, `passes` rewrites graphs, `weights`
stores every tensor once, `samples` computes reference outputs. `write` combines them (`export`);
`cut.export_onnx` exports ONNX files. All modules here may import torch; `edgeexit.runtime` must not
import them.
"""

from __future__ import annotations

from edgeexit.export.contract import Component, Form, Layer, SplitModel, Stack, Table
from edgeexit.export.cut.export_onnx import export_onnx
from edgeexit.export.write import export

__all__ = ["Component", "Form", "Layer", "SplitModel", "Stack", "Table", "export", "export_onnx"]
