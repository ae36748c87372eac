"""Lines below the tables of ``edgeexit bench``."""

from __future__ import annotations

from typing import Any

import click

from edgeexit.cli.common import print_table


def direction(result: dict[str, Any]) -> list[str]:
    """What the ratios are."""
    said = "x unsplit: time relative to the unsplit model; below 1 is faster"
    if result["mode"] != "latency":
        return [said, "p90, p99: of a batch; chain: all segments, no early exit"]
    if result["natural"] is not None:
        said += "; of natural: the median of its runs at each exit, weighted by the exit's rate"
    return [said]


def threads(unsplit: str, chain: str) -> str:
    """The thread settings of both sides, and whether ratios compare like with like."""
    said = f"threads: unsplit {unsplit}, chain {chain}"
    if unsplit == chain:
        return said
    return (
        f"{said}: each its fastest in the search, so ratios include the difference of the settings "
        f"(same for both: --threads {unsplit})"
    )


def gpu_notes(found: dict[str, Any] | None, names: list[str]) -> list[str]:
    """Transfers and allocations of a warm call on a GPU, and idle times between segments."""
    if found is None:
        return []
    call = found["a_call"]
    notes = [
        f"a call: {call['to_device_bytes']} bytes to the GPU, {call['to_host_bytes']} back, "
        f"{call['allocations']} allocations"
    ]
    for name, about in zip(names, found["boundaries"], strict=False):
        if "gap_ms" in about:
            ahead = "launched ahead" if about["launched_ahead"] else "not launched ahead"
            notes.append(
                f"behind {name}: the GPU is idle for {1e3 * about['gap_ms']:.0f} us, the next "
                f"segment takes {about['segment_ms']:.3f} ms and is {ahead}"
            )
    return notes


def print_more(result: dict[str, Any]) -> None:
    """Energy and the long run, where they were measured."""
    if result["energy"] is not None:
        click.echo("")
        print_energy(result["energy"])
    if result["soak"] is not None:
        click.echo("")
        print_soak(result["soak"])


def print_soak(found: dict[str, Any]) -> None:
    """Times of a long run by window."""
    rows = []
    for own in found["windows"]:
        heat = own["state"]["temperatures_c"]
        clock = own["state"]["cpu_mhz"]
        rows.append(
            [
                f"{own['from_s']:.0f}",
                f"{own['p50_ms']:.3f}",
                "-" if own["p99_ms"] is None else f"{own['p99_ms']:.3f}",
                "-" if heat is None else f"{max(heat.values()):.0f}",
                "-" if clock is None else str(max(clock["now"])),
            ]
        )
    hot = ", ".join(f"{name} {count} times" for name, count in found["throttled"].items())
    notes = ["", f"last window / first: {found['drift']:.3f}; throttled: {hot or 'not seen'}"]
    columns = ["from s", "p50 ms", "p99 ms", "hottest °C", "CPU MHz"]
    print_table(f"soak, {found['case']}, {found['runs']} runs", columns, rows, notes=notes)


def print_energy(found: dict[str, Any]) -> None:
    """Joules of every case, and relative to the unsplit model."""
    base = found["cases"]["unsplit"]["joules"]
    texts = found["per"] == "text"
    columns = ["case", f"J per {found['per']}", "x unsplit", "above idle"]
    columns += [*(["J per token"] if texts else []), "W", "readings"]
    rows = [
        [
            name,
            f"{own['joules']:.4g}",
            f"{own['joules'] / base:.3f}" if base > 0 else "-",
            f"{own['joules_above_idle']:.4g}",
            *([f"{own['joules_per_token']:.4g}"] if texts else []),
            f"{own['watts']:.2f}",
            str(own["samples"]),
        ]
        for name, own in found["cases"].items()
    ]
    parts = " + ".join(found["parts"])
    notes = ["", f"{found['sensor']}: {parts}; idle {found['idle_watts']:.2f} W"]
    print_table("energy", columns, rows, notes=notes)


__all__ = ["direction", "gpu_notes", "print_energy", "print_more", "print_soak", "threads"]
