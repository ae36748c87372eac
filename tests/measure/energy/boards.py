"""Files and lines as boards have them, for the tests of sensors. Values are of no real board."""

from __future__ import annotations

from pathlib import Path

CHIPS: dict[str, list[tuple[str, dict[str, tuple[int, int]]]]] = {
    "orin-nano": [
        ("ina3221", {"VDD_IN": (5000, 1000), "VDD_CPU_GPU_CV": (5000, 300), "VDD_SOC": (5000, 250)})
    ],
    "agx-orin": [
        (
            "ina3221",
            {"VDD_GPU_SOC": (19000, 200), "VDD_CPU_CV": (19000, 100), "VIN_SYS_5V0": (5000, 800)},
        ),
        ("ina3221", {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5000, 150)}),
    ],
    "thor": [
        (
            "ina3221",
            {
                "VDD_GPU": (12000, 400),
                "VDD_CPU_SOC_MSS": (12000, 500),
                "VIN_SYS_5V0": (5000, 1000),
            },
        ),
        ("ina238", {"VIN": (20000, 1500)}),
    ],
}
"""Board -> chips with their rails, each in millivolts and milliamperes."""
WATTS = {"orin-nano": 5.0, "agx-orin": 3.8 + 1.9 + 4.0, "thor": 30.0}
"""What the rails of `CHIPS` come to."""
LINES = {
    "orin-nano": "05-05-2025 10:00:00 RAM 2448/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB) CPU "
    "[1%@729,0%@729,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] cpu@47.5C soc2@46.7C tj@47.5C "
    "VDD_IN 4970mW/4951mW VDD_CPU_GPU_CV 480mW/483mW VDD_SOC 1460mW/1457mW",
    "agx-orin": "RAM 3242/30697MB (lfb 6416x4MB) CPU [2%@729,1%@729] GR3D_FREQ 0% cpu@47C "
    "VDD_GPU_SOC 3600mW/3600mW VDD_CPU_CV 800mW/800mW VIN_SYS_5V0 4000mW/4100mW "
    "VDDQ_VDD2_1V8AO 600mW/600mW",
    "thor": "RAM 5000/125772MB (lfb 1x4MB) CPU [0%@972,0%@972] GR3D_FREQ @[0,0,0] tj@41.0C "
    "VDD_GPU 3955mW/3955mW VDD_CPU_SOC_MSS 5145mW/5145mW VIN_SYS_5V0 5146mW/5146mW "
    "VIN 25456mW/25456mW",
}
LINE_WATTS = {"orin-nano": 4.97, "agx-orin": 3.6 + 0.8 + 4.0, "thor": 25.456}


def write_board(root: Path, board: str) -> Path:
    """Writes the hwmon files of a board. Returns `root`."""
    for number, (chip, rails) in enumerate(CHIPS[board]):
        device = root / "sys/class/hwmon" / f"hwmon{number}"
        device.mkdir(parents=True)
        (device / "name").write_text(f"{chip}\n")
        for place, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
            if chip == "ina238":  # its driver gives no label
                (device / "power1_input").write_text(f"{millivolts * milliamperes}\n")
                continue
            (device / f"in{place}_label").write_text(f"{label}\n")
            (device / f"in{place}_input").write_text(f"{millivolts}\n")
            (device / f"curr{place}_input").write_text(f"{milliamperes}\n")
    return root


def write_program(path: Path, line: str, *, ends: bool = False) -> Path:
    """Writes a program that prints a line again and again, as tegrastats does, or once."""
    loop = f"echo '{line}'" if ends else f"while :; do echo '{line}'; sleep 0.05; done"
    path.write_text(f"#!/bin/sh\n{loop}\n")
    path.chmod(0o755)
    return path
