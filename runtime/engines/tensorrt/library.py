"""The two TensorRT libraries with one API: ``tensorrt`` (Jetson, servers) and ``tensorrt_rtx``
(desktop GPUs; it also builds on machines without a GPU).

This module holds all differences between them and between their versions.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass

from edgeexit.errors import EngineError, UsageError
from edgeexit.runtime.engines.tensorrt.api import TensorRt

SUPPORTED: dict[str, tuple[tuple[int, int], int]] = {
    "tensorrt": ((10, 3), 11),
    "tensorrt_rtx": ((1, 4), 1),
}
"""Library -> oldest supported version, newest supported major version. JetPack 6.1 and 6.2 have
10.3, 7.2 has 10.16."""

DESKTOP_TARGETS = {75: "Turing", 80: "A100", 86: "Ampere", 89: "Ada", 120: "Blackwell", 121: "GB10"}
"""Compute capabilities that TensorRT-RTX builds for ahead of time."""
JETSONS = {72: "Xavier", 87: "Orin", 101: "Thor", 110: "Thor"}


@dataclass(frozen=True)
class Library:
    """An installed engine library.

    Attributes:
        name: Name of its module.
        module: The module.
        version: Its full version.
    """

    name: str
    module: TensorRt
    version: str

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX. It does not time kernels during a build, so it has no timing
        cache; it compiles plans for the GPU when they are loaded."""
        return self.name == "tensorrt_rtx"

    @property
    def tunes(self) -> bool:
        """Whether a build times kernels for the usual shape of every profile. TensorRT-RTX compiles
        kernels at run time, for the shapes that occur."""
        return not self.rtx

    @property
    def has_typing_flag(self) -> bool:
        """Whether strong typing is an option. From version 11 on, networks are always strongly
        typed."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def features(self) -> frozenset[str]:
        """Features that graphs may use (`edgeexit.bundle.manifest.Variant`). Before version 10.15,
        binding the same pointer as input and output gives wrong results."""
        if self.rtx or release(self.version) >= (10, 15):
            return frozenset({"blocked-weights", "opset-24", "cache-update"})
        return frozenset({"blocked-weights"})


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version.

    >>> release("10.16.1.11")
    (10, 16)
    """
    numbers = re.match(r"(\d{1,6})(?:\.(\d{1,6}))?", version)
    return (int(numbers[1]), int(numbers[2] or 0)) if numbers else (0, 0)


def supported_versions() -> str:
    """The supported versions, for messages."""
    lines = []
    for name, (oldest, major) in SUPPORTED.items():
        lines.append(f"{name} {oldest[0]}.{oldest[1]} to {major}.x")
    return " or ".join(lines)


def find_library(*, rtx: bool | None = None) -> Library:
    """The library to use: TensorRT-RTX if `rtx` is True, TensorRT if it is False, the installed one
    if it is None.

    Raises:
        EngineError: It is not installed, or its version is not supported.
    """
    names = ["tensorrt", "tensorrt_rtx"]
    if rtx is not None:
        names = names[rtx : rtx + 1]
    for name in names:
        if importlib.util.find_spec(name) is not None:
            return import_library(name)
    raise EngineError(
        f"{' or '.join(names)} is not installed",
        fix='Desktop GPUs: pip install "edgeexit[rtx]". Jetson: TensorRT comes with JetPack; '
        "create the environment with --system-site-packages.",
    )


def import_library(name: str) -> Library:
    """Imports a library and checks its version against `SUPPORTED`.

    Raises:
        EngineError: It cannot be imported, or its version is not supported.
    """
    try:
        module: TensorRt = importlib.import_module(name)
        version = str(module.__version__)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise EngineError(
            f"{name} cannot be imported ({error})",
            fix="`edgeexit doctor` shows what is installed.",
        ) from error
    oldest, newest = SUPPORTED[name]
    if not (release(version) >= oldest and release(version)[0] <= newest):
        raise EngineError(
            f"{name} {version} is not supported by this edgeexit",
            fix=f"Use {supported_versions()}.",
        )
    return Library(name, module, version)


def parse_targets(text: str) -> list[int]:
    """Reads ``sm86,sm89`` (or ``8.6``): the targets of a build for other machines.

    >>> parse_targets("sm86,12.0")
    [86, 120]

    Raises:
        UsageError: A name is not a target, or its engines can only be built on the device.
    """
    targets = []
    for target in text.split(","):
        name = target.strip().lower()
        digits = name.removeprefix("sm").removeprefix("_").replace(".", "")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 6):
            raise UsageError(
                f"--target {target[:40]}: not a compute capability",
                fix=f"Use one or more of {', '.join(f'sm{known}' for known in DESKTOP_TARGETS)}.",
            )
        number = int(digits)
        if number in JETSONS:
            raise UsageError(
                f"--target {target}: engines for Jetson {JETSONS[number]} can only be built on the "
                "Jetson. TensorRT-RTX, which builds without a GPU, is for desktops; JetPack's "
                "TensorRT times every kernel on the GPU that it builds for",
                fix="Copy the bundle to the device and run edgeexit build there.",
            )
        if number not in DESKTOP_TARGETS:
            raise UsageError(
                f"--target {target}: TensorRT-RTX cannot build for it without that GPU",
                fix=f"Use one or more of {', '.join(f'sm{known}' for known in DESKTOP_TARGETS)}.",
            )
        if number not in targets:
            targets.append(number)
    return targets


__all__ = [
    "DESKTOP_TARGETS", "Library", "find_library", "import_library", "parse_targets", "release",
    "supported_versions",
]  # fmt: skip
