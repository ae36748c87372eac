"""``edgeexit inspect``: shows the contents of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.common import print_json, print_table, size
from edgeexit.cli.options import bundle_argument, output_options, threads_option
from edgeexit.errors import EngineError, UsageError

if TYPE_CHECKING:
    from edgeexit.runtime.engines.base import Threads


@click.command("inspect")
@bundle_argument
@click.option(
    "--axis",
    "axes",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of an axis, as in seq=128; default: its size in the samples, batch 1.",
)
@click.option(
    "--capacity",
    type=int,
    metavar="TOKENS",
    help="Language models: also show what a text of that many tokens costs, in memory and, on ONNX "
    "Runtime's CPU engine, in time; --axis batch=4: four texts at a time.",
)
@threads_option
@output_options
def command(
    bundle: Path,
    axes: tuple[str, ...],
    capacity: int | None,
    threads: Threads,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Show what is in a bundle: its parts, the bytes that cross each boundary, its engines.

    The engines are those in the TensorRT engine cache. If several fit a device, the last is used.
    Only --capacity runs the model, for a few short runs; --threads is for these.

    Examples:

    \b
    edgeexit inspect bundle
    edgeexit inspect bundle --axis seq=128 --json
    edgeexit inspect writer --capacity 4096
    """
    from edgeexit.bundle.reader import open_bundle
    from edgeexit.measure.engine_list import describe_cache
    from edgeexit.measure.inspect import axis_sizes, describe

    opened = open_bundle(bundle)
    known = {axis for t in opened.manifest.inputs for axis in t.axes if isinstance(axis, str)}
    sizes = axis_sizes(opened, _sizes(axes, known))
    found = describe(opened, sizes)
    if capacity is not None:
        from edgeexit.measure.text_cost import text_cost

        found["text"] = text_cost(opened, capacity, sizes, threads=threads)
    try:
        found["engines"] = describe_cache(opened)
    except EngineError as error:  # show the bundle without its engines
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
                f"--axis {text}: not NAME=SIZE of an axis of this bundle",
                fix=f"Axes: {', '.join(sorted(known))}. Example: --axis {sorted(known)[0]}=4.",
            )
        sizes[name] = int(number)
    return sizes


def _show(found: dict[str, Any], path: Path) -> None:
    _show_program(found, path)
    axes = ", ".join(f"{k} {v}" for k, v in found["axis_sizes"].items())
    for name, chain in found["chains"].items():
        click.echo("")
        _show_chain(name, chain, axes)
    click.echo("")
    click.echo(
        f"bundle {size(found['bundle_bytes'])} in {found['files']} files, "
        f"weights {size(found['weights_bytes'])}"
    )
    for number, one in enumerate(found["engines"]):
        click.echo(("engines: " if number == 0 else "         ") + _engines(one))
    if "text" in found:
        _show_text(found["text"])
    click.echo("made by: " + ", ".join(f"{k} {v}" for k, v in found["provenance"].items()))


def _show_program(found: dict[str, Any], path: Path) -> None:
    """Shows inputs, outputs, steps and limits, labels, preprocessing and text files."""
    writes = ", writes text" if found["writes"] else ""
    click.echo(f"{found['name']} ({found['task']}{writes}), format {found['format']}")
    click.echo(f"{path}, digest {found['digest'][:16]}…")
    for kind in ("inputs", "outputs"):
        click.echo(f"{kind}: " + ", ".join(_tensor(t) for t in found[kind]))
    if len(found["steps"]) > 1:
        click.echo("steps: " + "; ".join(found["steps"]))
    if found["limits"]:
        click.echo("limits: " + ", ".join(f"{k} <= {v}" for k, v in found["limits"].items()))
    if found["capacity"]:
        click.echo(f"capacity: {found['capacity']} tokens (default of --capacity)")
    if found["layers_without_attention"]:
        layers = ", ".join(map(str, found["layers_without_attention"]))
        click.echo(f"layers without attention: {layers}")
    labels = found["labels"]
    if labels:
        click.echo(
            f"labels: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''} ({len(labels)})"
        )
    for preprocessing in found["preprocessing"]:
        parts = preprocessing.items()
        click.echo("preprocessing: " + ", ".join(f"{k} {v}" for k, v in parts))
    if found["images"]:
        click.echo(_images(found["images"]))
    for name, choice in found["choices"].items():
        default = choice["default"] or "none"
        click.echo(f"{name}: {', '.join(choice['options'])} (default: {default})")
    if found["tokenizer"]:
        click.echo(f"tokenizer: {found['tokenizer']}")
    if found["chat"]:
        tokens = [f"{k} {v!r}" for k, v in found["chat"].get("tokens", {}).items()]
        named = ", ".join(found["chat"]["templates"])
        click.echo(f"chat templates: {named}" + (f" (with {', '.join(tokens)})" if tokens else ""))


def _images(images: dict[str, Any]) -> str:
    """How many tokens an image has, and how a prompt names it."""
    said = f"images: {images['tokens']} image tokens each"
    if images["most_tiles"] > 1:
        most = images["most_tiles"]
        said += (
            f" or per tile (at most {most} tiles and an overview, {images['most_tokens']} tokens)"
        )
    if images["placeholder"] is None:
        place = "one image with each prompt"
    else:
        place = "in front of the prompt" if images["in_front"] else f"at {images['placeholder']}"
    return f"{said}, {place}"


def _show_chain(name: str, chain: dict[str, Any], axes: str) -> None:
    """Shows a chain's components, the tensors that cross their boundaries, and the exits."""
    keeps = any(one["state_bytes_per_token"] for one in chain["components"])
    rows = []
    for component in chain["components"]:
        first, crossing = component["graphs"][0], component["boundary_bytes"]
        scores = [score for exit_ in component["exits"] for score in exit_["scores"]]
        rows.append(
            (
                component["name"],
                first["precision"],
                ", ".join(exit_["name"] for exit_ in component["exits"]),
                ", ".join(dict.fromkeys(scores)),
                size(first["weights_bytes"]),
                ", ".join(_tensor(t) for t in component["boundary"]) or "-",
                "?" if crossing is None else size(crossing),
                *([_states(component)] if keeps else []),
            )
        )
    columns = ["component", "precision", "exit", "scores", "weights", "crosses its boundary"]
    columns += ["bytes", *(["states per token"] if keeps else [])]
    exits = "per row" if chain["rows"] == "independent" else "for the whole batch"
    print_table(f"chain {name} (exits {exits}; sizes at {axes})", columns, rows)
    for component in chain["components"]:
        for maker in dict.fromkeys(state["made_by"] for state in component["prompt_states"]):
            made = [s["name"] for s in component["prompt_states"] if s["made_by"] == maker]
            click.echo(f"{component['name']} reads {', '.join(made)}, made once by {maker}")
        for exit_ in component["exits"]:
            for line in _path(exit_):
                click.echo(line)
    for graph in chain["unsplit"]:
        click.echo(f"unsplit: {graph['graph']}, weights {size(graph['weights_bytes'])}")


def _path(exit_: dict[str, Any]) -> list[str]:
    """Lines about the adapter or gate of an exit, if it has one."""
    drops = exit_["action"] == "drop"
    if drops and not exit_["path"]:
        return [f"{exit_['name']} drops {exit_['tokens']} tokens where the policy says so"]
    found = []
    for part in exit_["path"][: None if drops else -1]:
        what = f"drops {exit_['tokens']} tokens, its gate" if drops else "has an adapter"
        graph, keeps = part["graphs"][0], part["state_bytes_per_token"]
        line = f"{exit_['name']} {what}: {graph['graph']}, weights {size(graph['weights_bytes'])}"
        found.append(line + (f", states {size(keeps)} per token" if keeps else ""))
    return found


def _show_text(text: dict[str, Any]) -> None:
    """Shows what texts of some length cost."""
    memory, time, rows = text["memory"], text["time"], text["rows"]
    click.echo("")
    click.echo(f"{_count(rows, 'text')} of {text['capacity_tokens']} tokens (--capacity):")
    states = f"{size(memory['states_bytes'])} ({size(memory['state_bytes_per_token'])} per token)"
    parts = [f"weights {size(memory['weights_bytes'])} in the files", f"states {states}"]
    once = memory["prompt_states_bytes"]
    if once != 0:
        parts.append("states of the prompt " + ("?" if once is None else size(once)))
    parts.append(
        f"hidden states {size(memory['hidden_states_bytes'])} ({memory['chunk_tokens']} tokens)"
    )
    if memory["logits_bytes"] is not None:
        parts.append(f"logits {size(memory['logits_bytes'])}")
    click.echo("memory: " + ", ".join(parts))
    if time is None:
        click.echo(f"time is not told: {text['no_time']}")
        return
    held = f"measured: {size(time['engine_bytes'])} more when the model is open"
    if time["peak_bytes"] is not None:
        held += f", {size(time['peak_bytes'])} at the peak"
    click.echo(f"        {held}")
    engine = time["engine"]
    click.echo(
        f"time ({engine['library']} {engine['version']}, {engine['engine']}, threads "
        f"{engine['threads']}, states {engine['states']}; runs behind states of zeros):"
    )
    if time["prefill_ms"] is None:
        click.echo(f"  prompt: not told: {time['no_prefill']}")
    else:
        runs = _count(time["prompt_runs"], "run")
        click.echo(
            f"  prompt of {_count(time['prompt_tokens'], 'token')}: {time['prefill_ms']:.1f} ms in "
            f"{runs}, estimated from {len(time['measured'])}"
        )
    for step in time["steps"]:
        behind = _count(step["past_tokens"], "token")
        click.echo(f"  next token behind {behind}: {step['ms']:.2f} ms")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _engines(one: dict[str, Any]) -> str:
    about = f"{one['for']}, {one['library']} {one['version']}, {one['sizes']}, {size(one['bytes'])}"
    return f"{about} ({one['path']})"


def _tensor(tensor: dict[str, Any]) -> str:
    axes = ", ".join("?" if axis is None else str(axis) for axis in tensor["axes"])
    return f"{tensor['name']} {tensor['dtype']}[{axes}]"


def _states(component: dict[str, Any]) -> str:
    if not component["state_bytes_per_token"]:
        return "-"
    forms = ", ".join(graph["states"] for graph in component["graphs"])
    return f"{size(component['state_bytes_per_token'])} ({forms})"
