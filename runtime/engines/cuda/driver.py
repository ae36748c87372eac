"""The CUDA driver: imports and checks it, and describes the GPU of this device."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from edgeexit.errors import EngineError

L4T = Path("/etc/nv_tegra_release")


def import_driver() -> Any:
    """The interface of the CUDA driver (``cuda.bindings.driver``), initialised.

    Raises:
        EngineError: cuda-bindings, the driver or a GPU is missing, or their versions do not match.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EngineError(
            f"cuda-bindings cannot be imported ({error}); engines on GPUs need it",
            fix='TensorRT-RTX: pip install "edgeexit[rtx]"; ONNX Runtime: "edgeexit[cuda]"; '
            'JetPack 6: "edgeexit[jetson6]"; JetPack 7: "edgeexit[jetson7]".',
        ) from error
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # cuda-bindings has its own exceptions for a missing library
        raise EngineError(
            "there is no NVIDIA driver (libcuda is not found)",
            fix="Install the driver of your GPU, or use --engine cpu. To build for other machines: "
            "edgeexit build --target sm86 -o DIR.",
        ) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(
            f"the NVIDIA driver cannot be used ({status.name})",
            fix="`nvidia-smi` (on a Jetson: tegrastats) shows its state.",
        )
    require_fitting(importlib.metadata.version("cuda-bindings"), ask(driver.cuDriverGetVersion()))
    return driver


def require_fitting(bindings: str, driver: int) -> None:
    """Checks that the driver supports a version of cuda-bindings.

    Args:
        bindings: Version of cuda-bindings.
        driver: The driver's CUDA version; 12060 is 12.6.

    Raises:
        EngineError: The driver's major version is older.
    """
    major = driver // 1000
    if int(bindings.split(".")[0]) > major:
        raise EngineError(
            f"cuda-bindings {bindings} needs a newer driver: this one supports CUDA "
            f"{major}.{driver % 1000 // 10}",
            fix=f'pip install "cuda-bindings>={major},<{major + 1}", or install a newer driver.',
        )


def ask(answer: tuple[Any, ...]) -> Any:
    """The values that a driver call returned. Raises `EngineError` if the call failed."""
    status, *values = answer
    if int(status) != 0:
        raise EngineError(
            f"the NVIDIA driver failed: {status.name}",
            fix="Run again. If it fails again, `edgeexit doctor` shows the driver's version.",
        )
    return values[0] if len(values) == 1 else tuple(values)


def describe_device(number: int = 0) -> dict[str, Any]:
    """Everything that engines built on this device depend on: GPU, multiprocessors, compute
    capability, driver and, on a Jetson, the L4T release."""
    driver = import_driver()
    device = ask(driver.cuDeviceGet(number))
    attribute = driver.CUdevice_attribute

    def get(name: str) -> int:
        return int(ask(driver.cuDeviceGetAttribute(getattr(attribute, name), device)))

    capability = 10 * get("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR")
    capability += get("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
    name = ask(driver.cuDeviceGetName(128, device))
    return {
        "ahead_of_time": False,
        "gpu": name.split(b"\0")[0].decode(),
        "multiprocessors": get("CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT"),
        "compute_capability": capability,
        "cuda": int(ask(driver.cuDriverGetVersion())),
        "l4t": L4T.read_text().splitlines()[0] if L4T.is_file() else None,
    }


__all__ = ["describe_device", "import_driver", "require_fitting"]
