"""Reports hardware, packages and problems of a machine, with the commands that fix them.

It installs and changes nothing. It imports no reported library into this process. A problem is an
installed package that cannot work; a missing extra is not a problem.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from edgeexit import __version__
from edgeexit.measure.device_state import read_state
from edgeexit.measure.energy.find import find_source
from edgeexit.measure.environment import processor, read_text

PACKAGES = (
    "numpy",
    "msgspec",
    "click",
    "rich",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "tokenizers",
    "jinja2",
    "pillow",
    "soundfile",
    "soxr",
    "matplotlib",
    "fastapi",
    "uvicorn",
    "prometheus-client",
    "nvidia-ml-py",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "safetensors",
    "gguf",
)
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("run bundles on the processor", ("onnxruntime",)),
    "cuda": ("run bundles on an NVIDIA GPU", ("onnxruntime-gpu", "cuda-bindings")),
    "rtx": (
        "TensorRT engines on desktop GPUs, and ahead of time for them",
        ("tensorrt-rtx", "cuda-bindings"),
    ),
    "tensorrt": ("TensorRT engines on servers", ("tensorrt", "cuda-bindings")),
    "text": ("texts as data and prompts", ("tokenizers", "jinja2")),
    "images": ("images as data", ("pillow",)),
    "audio": ("sounds other than plain WAV, and other rates", ("soundfile", "soxr")),
    "plot": ("plots of calibrate and bench", ("matplotlib",)),
    "serve": ("edgeexit serve: HTTP", ("fastapi", "uvicorn", "prometheus-client")),
    "energy": ("energy of NVIDIA GPUs", ("nvidia-ml-py",)),
    "export": (
        "export bundles",
        (
            "torch",
            "transformers",
            "accelerate",
            "peft",
            "onnx",
            "onnx-ir",
            "onnxscript",
            "safetensors",
            "tokenizers",
            "pillow",
        ),
    ),
}
"""Extra -> its purpose and its packages."""

GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvmap", "/dev/nvhost-ctrl-gpu")
"""What CUDA opens, on desktops and on a Jetson."""

_ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu")


@dataclass
class Diagnosis:
    """The report.

    Attributes:
        machine: Processor, cores, memory, GPU, system.
        packages: Package -> version, None if it is not installed.
        providers: Execution providers of ONNX Runtime.
        extras: Extra -> its purpose, whether it is complete, and the command that installs it.
        problems: What is broken, each with the command that fixes it.
        energy: The sensor that ``bench --energy`` reads, what it adds up and its power now or None;
            and why others cannot be used.
        state: `edgeexit.measure.device_state.read_state`.
    """

    machine: dict[str, Any]
    packages: dict[str, str | None]
    providers: list[str] = field(default_factory=list)
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    energy: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def diagnose() -> Diagnosis:
    """Inspects this machine and this Python environment."""
    found = Diagnosis(machine=_machine(), packages={name: _version(name) for name in PACKAGES})
    found.energy, found.state = _energy(gpu=bool(found.machine["gpus"])), read_state()
    _check_devices(found)
    _check_onnxruntime(found)
    for extra, (adds, packages) in EXTRAS.items():
        missing = [name for name in packages if found.packages[name] is None]
        found.extras[extra] = {
            "adds": adds,
            "complete": not missing,
            "missing": missing,
            "command": f'{_pip()} install "edgeexit[{extra}]"',
        }
    return found


def _check_onnxruntime(found: Diagnosis) -> None:
    installed = [name for name in _ORT_PACKAGES if found.packages[name] is not None]
    if len(installed) > 1:
        wanted = "cuda" if found.machine["gpus"] else "cpu"
        found.problems.append(
            {
                "what": "onnxruntime and onnxruntime-gpu are both installed and overwrite each "
                "other's files",
                "fix": f"{_pip()} uninstall -y {' '.join(_ORT_PACKAGES)} && "
                f'{_pip()} install --force-reinstall --no-deps "{_keep(wanted)}"',
            }
        )
    if importlib.util.find_spec("onnxruntime") is None:
        return
    # In a separate process: a broken library may crash it.
    asked = subprocess.run(
        [
            sys.executable,
            "-c",
            "import onnxruntime as o; o.InferenceSession; print(*o.get_available_providers())",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if asked.returncode == 0:
        found.providers = asked.stdout.split()
        return
    last = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
    package = installed[0] if installed else "onnxruntime"
    found.problems.append(
        {
            "what": f"onnxruntime cannot be imported: {last[:300]}",
            "fix": f"{_pip()} install --force-reinstall --no-deps {package}",
        }
    )


def _check_devices(found: Diagnosis) -> None:
    """Devices of a GPU that this user may not open."""
    for path in GPU_DEVICES:
        if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
            found.problems.append(
                {
                    "what": f"{path} may not be opened by this user, so no GPU can be used",
                    "fix": "sudo usermod -aG video,render $USER, then log in again",
                }
            )


def _energy(*, gpu: bool) -> dict[str, Any]:
    source, reasons = find_source(gpu=gpu)
    if source is None:
        return {"sensor": None, "parts": [], "watts": None, "reasons": reasons}
    watts = round(source.read(), 3) if source.kind == "watts" else None
    about = {"sensor": source.name, "parts": list(source.parts), "watts": watts}
    source.close()
    return about | {"reasons": reasons}


def _keep(extra: str) -> str:
    return "onnxruntime-gpu" if extra == "cuda" else "onnxruntime"


def _pip() -> str:
    return "python -m pip"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    return {
        "edgeexit": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "cores_usable": len(os.sched_getaffinity(0)),
        "cgroup_cores": _cgroup_cores(),
        "cgroup_memory_bytes": _cgroup_memory_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available_bytes": _available_memory(),
        "disk_free_bytes": shutil.disk_usage(os.getcwd()).free,
        "board": _board(),
        "gpus": _gpus(),
        "jetson": _first_line("/etc/nv_tegra_release"),
    }


def _available_memory() -> int | None:
    """Memory that programs can still take; None: the kernel does not tell."""
    for line in read_text("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _board() -> str | None:
    """The board by its device tree, or by its firmware; None: neither is there."""
    for path in ("/proc/device-tree/model", "/sys/class/dmi/id/product_name"):
        if name := (_first_line(path) or "").strip("\0 "):
            return name
    return None


def _cgroup_cores() -> float | None:
    """CPU limit of the control group in cores; None without a limit."""
    quota = (_first_line("/sys/fs/cgroup/cpu.max") or "max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        return int(quota[0]) / int(quota[1])
    old = _first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = _first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if old and period and old.isdigit() and period.isdigit():
        return int(old) / int(period)
    return None


def _cgroup_memory_bytes() -> int | None:
    unlimited = 1 << 60
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        line = _first_line(path)
        if line and line.isdigit() and int(line) < unlimited:
            return int(line)
    return None


def _first_line(path: str) -> str | None:
    lines = read_text(path).splitlines()
    return lines[0].strip() if lines else None


def _gpus() -> list[dict[str, str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = subprocess.run(
        [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if asked.returncode != 0:
        return []
    rows = [line.split(", ") for line in asked.stdout.strip().splitlines()]
    return [{"name": row[0], "driver": row[1], "memory": row[2]} for row in rows if len(row) == 3]
