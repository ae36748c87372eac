"""Copies between host and GPU before and after the runs of a graph on the GPU.

This is the same for every engine: only tensors that the caller binds on the host are copied, and
only runs with outputs on the host wait. If the GPU shares the host's memory (a Jetson), pinned
memory is used without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgeexit.runtime.engines.base import Bound, Place
from edgeexit.runtime.engines.cuda.device import Device, DeviceSlot, PinnedSlot


@dataclass
class Layout:
    """Addresses of a graph's tensors for one set of shapes.

    Attributes:
        addresses: Tensor -> its address on the GPU.
        held: Memory that must stay allocated while the layout, or a recording of it, is used.
        before, behind: Copies before and after a run: target, source, bytes.
        reads: An output goes to the host, so a run waits for it.
        writes: An input comes from the host. It must not change until the run has read it.
    """

    addresses: dict[str, int] = field(default_factory=dict)
    before: list[tuple[int, int, int]] = field(default_factory=list)
    behind: list[tuple[int, int, int]] = field(default_factory=list)
    reads: bool = False
    writes: bool = False
    held: list[DeviceSlot] = field(default_factory=list)


class Staging:
    """GPU memory for those tensors of a graph that the caller binds on the host."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slots: dict[str, DeviceSlot] = {}

    def lay_out(self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]) -> Layout:
        """Gives every tensor an address, and lists the copies."""
        layout = Layout()
        for name, (place, dtype, shape) in inputs.items():
            size = size_of(dtype, shape)
            address = self._address(layout, name, place, size)
            if self._crosses(place):
                layout.before.append((address, place.pointer, size))
            layout.writes |= place.device == "cpu"
        for name, (place, dtype, shape) in outputs.items():
            size = size_of(dtype, shape)
            address = self._address(layout, name, place, size)
            if self._crosses(place):
                layout.behind.append((place.pointer, address, size))
            layout.reads |= place.device == "cpu"
        return layout

    def around(
        self,
        layout: Layout,
        execute: Callable[[], object],
        record: Callable[[Callable[[], object]], Callable[[], object]] | None = None,
    ) -> DeviceRun:
        """A run: copies, the graph, copies, and a wait if an output is on the host.

        Args:
            layout: Addresses and copies.
            execute: Puts the graph on the stream.
            record: Turns a function that only uses the stream into its recording (`Replays.of`).
                None: do not record.
        """
        device, before, behind = self._device, layout.before, layout.behind

        def launch() -> None:
            for target, source, size in before:
                device.to_device(target, source, size)
            execute()
            for target, source, size in behind:
                device.to_host(target, source, size)

        return DeviceRun(device, layout, launch if record is None else record(launch))

    def _crosses(self, place: Place) -> bool:
        """Whether a tensor is copied between host and device."""
        mapped = self._device.shares_memory and isinstance(place, PinnedSlot)
        return place.device == "cpu" and not mapped

    def _address(self, layout: Layout, name: str, place: Place, size: int) -> int:
        """The address that the graph uses for a tensor: the tensor's own, or that of its copy."""
        if not self._crosses(place):
            address = place.mapped if isinstance(place, PinnedSlot) else place.pointer
        else:
            held = self._slots.get(name)
            if held is None or held.bytes < size:
                held = self._slots[name] = self._device.allocate(size)
            layout.held.append(held)  # earlier layouts keep the memory that they copy to
            address = held.pointer
        layout.addresses[name] = address
        return address


class DeviceRun:
    """A run of a graph on the GPU. A call returns when all outputs on the host are written."""

    __slots__ = ("_device", "_layout", "_put")

    def __init__(self, device: Device, layout: Layout, put: Callable[[], object]) -> None:
        self._device, self._layout, self._put = device, layout, put

    def put(self) -> None:
        """Puts the run on the stream, without waiting."""
        self._device.enter()
        self._put()
        if self._layout.writes:
            self._device.busy = True

    def __call__(self) -> None:
        self.put()
        if self._layout.reads:
            self._device.wait()


def size_of(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Size of a tensor in bytes."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


__all__ = ["DeviceRun", "Layout", "Staging", "size_of"]
