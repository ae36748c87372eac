"""The weight store: one file with the tensors of all graphs, each tensor once.

`WeightStore` appends tensors of 1 KiB and more to the file and makes the graphs refer to it. Its
key is the SHA-256 of a tensor's bytes without the dtype, so a tensor of several graphs (segments
and the unsplit graph, tied weights) is stored once. Only the keys stay in memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgeexit.bundle.reader import WEIGHTS

INLINE_LIMIT_BYTES = 1024
_SMALL_ALIGNMENT, _PAGE = 64, 4096


class WeightStore:
    """Appends tensors to ``weights.bin`` and remembers their offsets."""

    def __init__(self, bundle_folder: Path) -> None:
        self.path = bundle_folder / WEIGHTS
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0
        self.path.touch()

    def externalize(self, graph: ir.Graph) -> None:
        """Moves initializers of 1 KiB and more into the store, also those of subgraphs."""
        with self.path.open("r+b") as file:
            for owner in [graph, *graph.subgraphs()]:
                for value in owner.initializers.values():
                    tensor = value.const_value
                    if tensor is None:
                        continue
                    if tensor.nbytes < INLINE_LIMIT_BYTES:
                        if isinstance(tensor, ir.ExternalTensor):
                            array = np.array(tensor.numpy())
                            value.const_value = ir.Tensor(array, tensor.dtype, name=tensor.name)
                        continue
                    offset, length = self._place(tensor, file)
                    value.const_value = ir.ExternalTensor(
                        self.path.name,
                        offset,
                        length,
                        tensor.dtype,
                        shape=tensor.shape,  # type: ignore[arg-type]
                        name=value.name or "",
                        base_dir=str(self.path.parent),
                    )

    def place(self, tensor: ir.TensorProtocol) -> int:
        """Adds a tensor to the store, unless it is there. Returns its offset in bytes."""
        with self.path.open("r+b") as file:
            return self._place(tensor, file)[0]

    def _place(self, tensor: ir.TensorProtocol, file: object) -> tuple[int, int]:
        data = _bytes_of(tensor)
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            alignment = _PAGE if data.nbytes >= 16 * _PAGE else _SMALL_ALIGNMENT
            offset = -(-self._end // alignment) * alignment
            file.seek(offset)  # type: ignore[attr-defined]
            file.write(data)  # type: ignore[attr-defined]
            self._places[key] = (offset, data.nbytes)
            self._end = offset + data.nbytes
        return self._places[key]


def _bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    """A tensor's bytes, as the file has them; those in memory are not copied."""
    if tensor.dtype.bitwidth < 8:  # numpy has one element in a byte
        return memoryview(tensor.tobytes())
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
