"""Energy or power of an NVIDIA GPU, by the library NVML (package nvidia-ml-py).

On a Jetson the library opens and then refuses each query, so every query is tried. The figure is
that of the GPU's board alone, not of the computer.
"""

from __future__ import annotations

from typing import Any

from edgeexit.measure.energy.source import Source, Unusable


class Nvml(Source):
    """The energy counter of a GPU; where it has none, its power.

    Args:
        device: Number of the GPU.

    Raises:
        Unusable: The package or the library is not there, or refuses both queries.
    """

    name = "nvml"

    def __init__(self, device: int = 0) -> None:
        try:
            import pynvml
        except ImportError:
            raise Unusable(
                "the package nvidia-ml-py is missing: pip install nvidia-ml-py"
            ) from None
        self._library: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise Unusable(f"NVML cannot be opened ({error})") from None
        refusals = []
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(device)
            for query, self.kind, self._unit, self.interval_s in (
                (pynvml.nvmlDeviceGetTotalEnergyConsumption, "joules", 1e-3, 0.05),
                (pynvml.nvmlDeviceGetPowerUsage, "watts", 1e-3, 0.05),
            ):
                try:
                    query(self._handle)
                except pynvml.NVMLError as error:
                    refusals.append(f"{self.kind}: {error}")
                else:
                    self._query = query
                    self.parts = (f"GPU {device}",)
                    return
        except pynvml.NVMLError as error:
            refusals.append(f"GPU {device}: {error}")
        pynvml.nvmlShutdown()
        raise Unusable(f"NVML refuses {'; '.join(refusals)}")

    def read(self) -> float:
        try:
            return float(self._query(self._handle)) * self._unit
        except self._library.NVMLError as error:
            raise Unusable(f"NVML refuses {self.kind} now: {error}") from None

    def close(self) -> None:
        self._library.nvmlShutdown()


__all__ = ["Nvml"]
