"""``edgeexit bench --compare``: prints two results beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeexit.cli.common import print_json, print_table


def write_json(path: Path, result: dict[str, Any], *, overwrite: bool) -> None:
    """Writes a result as JSON."""
    import json

    from edgeexit.bundle.files import write_atomic

    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()), overwrite=overwrite)


def print_comparison(
    paths: tuple[Path, Path], output: Path | None, *, overwrite: bool, as_json: bool
) -> None:
    """Compares two results of ``bench``, prints the figures that both have, and writes them to a
    file if one is given."""
    from edgeexit.bundle.files import check_output
    from edgeexit.measure.bench.compare import compare_results, comparison_to_json, read_result

    if output is not None:
        check_output(output, overwrite=overwrite)
    found = compare_results(*map(read_result, paths))
    if output is not None:
        write_json(output, comparison_to_json(found), overwrite=overwrite)
    if as_json:
        print_json(comparison_to_json(found))
        return
    rows = []
    for one in found.figures:
        pair = one.against_unsplit
        rows.append(
            [
                one.name,
                *(f"{value:.3f}" for value in one.ms),
                f"{one.ratio:.3f}",
                *(["-", "-"] if pair is None else [f"{value:.3f}" for value in pair]),
                "-" if one.ratio_against_unsplit is None else f"{one.ratio_against_unsplit:.3f}",
                one.verdict or "",
            ]
        )
    columns = ["path", "A ms", "B ms", "B / A", "A x unsplit", "B x unsplit", "B / A", ""]
    notes = ["", "below 1: B is faster; the right half is relative to each run's own unsplit model"]
    notes += [f"only in one of them: {', '.join(found.missing)}"] if found.missing else []
    notes += [f"differs: {text}" for text in found.differences]
    print_table(f"A: {paths[0]}, B: {paths[1]}", columns, rows, notes=notes)


__all__ = ["print_comparison", "write_json"]
