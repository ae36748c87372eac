"""``edgeexit inspect``: what is in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeexit.cli.common import (
    bundle_argument,
    json_option,
    print_json,
    print_table,
    size,
    verbosity_options,
)
from edgeexit.errors import EngineError, UsageError


@click.command("inspect")
@bundle_argument
@click.option(
    "--axis",
    "axes",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of an axis, as in seq=128; default: that of the samples, batch 1.",
)
@json_option
@verbosity_options
def command(bundle: Path, axes: tuple[str, ...], as_json: bool, verbose: int, quiet: bool) -> None:
    """Show what is in a bundle, the bytes that cross each boundary, and the TensorRT engines that
    the cache holds of it (of those that fit a device, the last one is used).

    \b
    edgeexit inspect bundle
    edgeexit inspect bundle --axis seq=128 --json
    """
    from edgeexit.bundle.reader import open_bundle
    from edgeexit.measure.engine_list import describe_cache
    from edgeexit.measure.inspect import axis_sizes, describe

    opened = open_bundle(bundle)
    known = {axis for t in opened.manifest.inputs for axis in t.axes if isinstance(axis, str)}
    found = describe(opened, axis_sizes(opened, _sizes(axes, known)))
    try:
        found["engines"] = describe_cache(opened)
    except EngineError as error:  # the bundle is none the worse
        found["engines"] = []
        click.echo(f"engines are not shown: {error}", err=True)
    if as_json:
        print_json(found)
    else:
        _show(found, bundle)


def _sizes(axes: tuple[str, ...], known: set[str]) -> dict[str, int]:
    sizes = {}
    for text in axes:
        name, _, number = text.partition("=")
        if name not in known or not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise UsageError(
                f"--axis {text}: not the size of an axis of this bundle",
                fix=f"Its axes are {', '.join(sorted(known))}; write --axis {sorted(known)[0]}=4.",
            )
        sizes[name] = int(number)
    return sizes


def _show(found: dict[str, Any], path: Path) -> None:
    click.echo(
        f"{found['name']} ({found['task']}, program {found['program']}), format {found['format']}"
    )
    click.echo(f"{path}, digest {found['digest'][:16]}…")
    for kind in ("inputs", "outputs"):
        click.echo(f"{kind}: " + ", ".join(_tensor(t) for t in found[kind]))
    if found["limits"]:
        click.echo("limits: " + ", ".join(f"{k} <= {v}" for k, v in found["limits"].items()))
    labels = found["labels"]
    if labels:
        click.echo(
            f"labels: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''} ({len(labels)})"
        )
    if found["preprocessing"]:
        parts = found["preprocessing"].items()
        click.echo("preprocessing: " + ", ".join(f"{k} {v}" for k, v in parts))
    if found["tokenizer"]:
        click.echo(f"tokenizer: {found['tokenizer']}")
    if found["chat"]:
        tokens = [f"{k} {v!r}" for k, v in found["chat"].get("tokens", {}).items()]
        named = ", ".join(found["chat"]["templates"])
        click.echo(f"chat templates: {named}" + (f" (with {', '.join(tokens)})" if tokens else ""))
    axes = ", ".join(f"{k} {v}" for k, v in found["axis_sizes"].items())
    for name, chain in found["chains"].items():
        cached = any(segment["cache_bytes_per_token"] for segment in chain["segments"])
        rows = []
        for segment in chain["segments"]:
            first = segment["graphs"][0]
            crossing = segment["boundary_bytes"]
            rows.append(
                (
                    segment["name"],
                    first["precision"],
                    ", ".join(leave["name"] for leave in segment["exits"]),
                    ", ".join(segment["exits"][0]["scores"]) if segment["exits"] else "",
                    size(first["weights_bytes"]),
                    ", ".join(_tensor(t) for t in segment["boundary"]) or "-",
                    "?" if crossing is None else size(crossing),
                    *([_caches(segment)] if cached else []),
                )
            )
        columns = [
            "segment",
            "precision",
            "exit",
            "scores",
            "weights",
            "crosses its boundary",
            "bytes",
            *(["caches a token"] if cached else []),
        ]
        click.echo("")
        print_table(
            f"chain {name} (rows leave {_rows(chain['rows'])}; sizes at {axes})", columns, rows
        )
        for leave in [leave for segment in chain["segments"] for leave in segment["exits"]]:
            if adapter := leave["adapter"]:
                click.echo(
                    f"{leave['name']} has an adapter: {adapter['graphs'][0]['graph']}, weights "
                    f"{size(adapter['graphs'][0]['weights_bytes'])}, caches "
                    f"{size(adapter['cache_bytes_per_token'])} a token"
                )
    click.echo("")
    for graph in found["unsplit"]:
        click.echo(f"unsplit: {graph['graph']}, weights {size(graph['weights_bytes'])}")
    click.echo(
        f"bundle {size(found['bundle_bytes'])} in {found['files']} files, "
        f"weights {size(found['weights_bytes'])}"
    )
    for number, one in enumerate(found["engines"]):
        click.echo(("engines: " if number == 0 else "         ") + _engines(one))
    click.echo("made by: " + ", ".join(f"{k} {v}" for k, v in found["provenance"].items()))


def _engines(one: dict[str, Any]) -> str:
    about = f"{one['for']}, {one['library']} {one['version']}, {one['sizes']}, {size(one['bytes'])}"
    return f"{about} ({one['path']})"


def _tensor(tensor: dict[str, Any]) -> str:
    axes = ", ".join("?" if axis is None else str(axis) for axis in tensor["axes"])
    return f"{tensor['name']} {tensor['dtype']}[{axes}]"


def _caches(segment: dict[str, Any]) -> str:
    forms = ", ".join(graph["caches"] for graph in segment["graphs"] if "caches" in graph)
    return f"{size(segment['cache_bytes_per_token'])} ({forms})"


def _rows(rows: str) -> str:
    return "on their own" if rows == "independent" else "together"
