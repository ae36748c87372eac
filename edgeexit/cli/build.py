"""``edgeexit build``: builds TensorRT engines of a bundle, for this device or ahead of time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli.common import print_json, print_table, progress_bar, size
from edgeexit.cli.options import bundle_argument, json_option, verbosity_options
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.bundle.manifest import StateForm
    from edgeexit.runtime.build.build import Estimate, Options
    from edgeexit.runtime.build.profiles import Asked
    from edgeexit.runtime.build.work_list import Work
    from edgeexit.runtime.engines.tensorrt.library import Library

SHAPES = "INPUT:SIZExSIZE,..."


@click.command("build")
@bundle_argument
@click.option("--min-shapes", metavar=SHAPES, help="Smallest shapes of the bundle's inputs.")
@click.option("--opt-shapes", metavar=SHAPES, help="Shapes that engines are tuned for.")
@click.option(
    "--max-shapes", metavar=SHAPES, help="Largest shapes; default: the model's limits and 8 rows."
)
@click.option(
    "--capacity",
    type=click.IntRange(min=2),
    help="Language models: maximum tokens of a text with its prompt; default: the model's limit.",
)
@click.option(
    "--states",
    type=click.Choice(["fixed", "append"]),
    help="Language models: form of the KV caches; default: fixed where possible.",
)
@click.option(
    "--target",
    metavar="SM86,...",
    help="Build ahead of time, without a GPU, for these desktop GPUs (TensorRT-RTX); needs -o. "
    "Default: build for the GPU of this device.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for engines of --target."
)
@click.option(
    "--engine-dir",
    type=click.Path(path_type=Path),
    help="Engine cache; default: EDGEEXIT_ENGINE_DIR, or ~/.cache/edgeexit.",
)
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Largest scratch memory of an engine, as in 512MiB or 2GiB.",
)
@click.option(
    "--opt-level", type=click.IntRange(0, 5), help="Optimisation level; default: the library's."
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    help="File that keeps kernel timings (TensorRT only).",
)
@click.option(
    "--without-unsplit",
    is_flag=True,
    help="Do not build the engine of the unsplit model (used by bench).",
)
@click.option("--sign", type=click.Path(path_type=Path), help="Sign engines with this SSH key.")
@click.option(
    "--import",
    "source",
    type=click.Path(path_type=Path),
    help="Import engines built on another machine: signed ones, or any with --trust.",
)
@click.option(
    "--allowed-signers",
    type=click.Path(path_type=Path),
    help="Allowed signers (ssh-keygen format); default: ~/.config/edgeexit/allowed_signers.",
)
@click.option("--trust", is_flag=True, help="Import without checking signatures.")
@json_option
@verbosity_options
def command(bundle: Path, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Build TensorRT engines of a bundle: one per component.

    Engines are stored in a cache (~/.cache/edgeexit), under a key of everything that determines
    them. Cached engines are not built again unless they are damaged. If several sets fit a device,
    the set built or requested last is used. Write shapes as for trtexec (ids:1x128) or Polygraphy
    (ids:[1,128]).

    Examples:

    \b
    edgeexit build bundle --max-shapes pixel_values:8x3x224x224
    edgeexit build bundle --target sm86,sm89 -o engines --sign ~/.ssh/id_ed25519
    edgeexit build bundle --import engines --allowed-signers signers
    """
    opened = open_bundle(bundle, verify="full")
    if options["source"] is not None:
        made = _import(opened, **options)
    else:
        made = _build(opened, quiet=quiet, **options)
    if as_json:
        print_json({"bundle": str(bundle), "digest": opened.digest, "engines": made})
    elif not quiet:
        for one in made:
            came = one.get("imported") or f"{one['built'] or 'nothing'} built"
            rows = [
                (plan["graph"], size(plan["bytes"]), plan["seconds"], plan["computes_in"])
                for plan in one["plans"]
            ]
            made_by = f"{one['library']} {one['version']}"
            title = f"{one['path']}\n{one['for']}, {made_by}, {one['sizes']}: "
            title += f"{len(one['plans'])} engines, {size(one['bytes'])}, {came}"
            print_table(title, ("graph", "plan", "built in s", "products in"), rows)
    odd = [plan for one in made for plan in one["plans"] if plan["built_otherwise"]]
    for plan in odd if not quiet else []:
        click.echo(
            f"warning: {plan['graph']}: the graph multiplies in {plan['computes_in']}, but the "
            f"inspector finds float32 products in the engine: {plan['inspected']}",
            err=True,
        )


def _import(
    bundle: Bundle,
    *,
    source: Path,
    engine_dir: Path | None,
    trust: bool,
    allowed_signers: Path | None,
    **others: Any,
) -> list[dict[str, Any]]:
    from edgeexit.runtime.engines.tensorrt.engine_cache import default_root
    from edgeexit.runtime.engines.tensorrt.importing import import_engines

    if trust and allowed_signers is not None:
        raise UsageError(
            "--trust and --allowed-signers exclude each other", fix="Give one of them."
        )
    for name, value in others.items():
        if value is not None and value is not False:
            raise UsageError(
                f"--{name.replace('_', '-')} cannot be used with --import",
                fix="Leave it out: imported engines are used as they were built.",
            )
    folders = import_engines(
        source,
        default_root() if engine_dir is None else engine_dir,
        bundle,
        trust="anything" if trust else "signature",
        signers=allowed_signers,
    )
    return [
        _described(folder)
        | {"imported": "imported without a signature" if who is None else f"signed by {who}"}
        for folder, who in folders.items()
    ]


def _build(
    bundle: Bundle,
    *,
    quiet: bool,
    target: str | None,
    output: Path | None,
    engine_dir: Path | None,
    without_unsplit: bool,
    sign: Path | None,
    **options: Any,
) -> list[dict[str, Any]]:
    from edgeexit.runtime.build.build import Options
    from edgeexit.runtime.build.work_list import sample_sizes, work_of
    from edgeexit.runtime.engines.cuda.driver import describe_device
    from edgeexit.runtime.engines.tensorrt import signing
    from edgeexit.runtime.engines.tensorrt.engine_cache import default_root
    from edgeexit.runtime.engines.tensorrt.library import find_library, parse_targets

    if options["trust"] or options["allowed_signers"]:
        raise UsageError("--trust and --allowed-signers are for --import", fix="Add --import DIR.")
    targets = [] if target is None else parse_targets(target)
    _check_destination(targets, output, engine_dir, sign)
    if sign is not None:
        signing.try_key(sign)
    limit, timing_cache = options["memory_limit"], options["timing_cache"]
    asked = _asked(bundle, **options)
    library = find_library(rtx=True if targets else None)
    if timing_cache is not None and library.rtx:
        raise UsageError("--timing-cache: TensorRT-RTX has no timing cache", fix="Leave it out.")
    works = work_of(
        bundle.manifest,
        library.features,
        asked,
        sample_sizes(bundle),
        unsplit=not without_unsplit,
        form=options["states"],
        tunes=library.tunes,
    )
    made = _build_sets(
        bundle,
        works,
        library,
        [{"ahead_of_time": True, "compute_capability": one} for one in targets]
        or [describe_device()],
        output or engine_dir or default_root(),
        Options(None if limit is None else parse_bytes(limit), options["opt_level"], timing_cache),
        quiet=quiet,
    )
    if sign is not None:
        for one in made:
            signing.sign(Path(one["path"]), sign)
    return made


def _check_destination(
    targets: Sequence[int], output: Path | None, engine_dir: Path | None, sign: Path | None
) -> None:
    """Refuses conflicting options for the destination of engines."""
    if bool(targets) != (output is not None):
        raise UsageError(
            "--target and -o require each other: engines for other machines are not stored in this "
            "machine's cache",
            fix="Give both, or neither to build for this device.",
        )
    if sign is not None and not targets:
        raise UsageError("--sign is for engines for other machines", fix="Add --target and -o.")
    if output is not None and engine_dir is not None:
        raise UsageError("-o and --engine-dir exclude each other", fix="Leave out --engine-dir.")
    if sign is not None and not sign.is_file():
        raise UsageError(
            f"--sign {sign}: key not found", fix="Create a key: ssh-keygen -t ed25519."
        )


def _asked(
    bundle: Bundle,
    *,
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
    capacity: int | None,
    states: StateForm | None,
    **others: Any,
) -> Asked:
    """Reads the sizes that the options request."""
    from edgeexit.runtime.build.profiles import Asked, axis_sizes, parse_shapes

    if (capacity or states) and bundle.manifest.decoding is None:
        raise UsageError(
            "--capacity and --states are for models that write text", fix="Use --max-shapes."
        )

    def sizes(option: str, text: str | None) -> dict[str, int]:
        if text is None:
            return {}
        return axis_sizes(parse_shapes(text, option), bundle.manifest.inputs, option)

    return Asked(
        min=sizes("--min-shapes", min_shapes),
        opt=sizes("--opt-shapes", opt_shapes),
        max=sizes("--max-shapes", max_shapes),
        capacity=capacity,
    )


def _build_sets(
    bundle: Bundle,
    works: Sequence[Work],
    library: Library,
    targets: Sequence[Mapping[str, Any]],
    root: Path,
    options: Options,
    *,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Builds one set of engines per target; returns their descriptions."""
    from edgeexit.runtime.build.build import build_engines, estimate, missing_works

    missing = [missing_works(bundle, works, library, one, root, options) for one in targets]
    if any(missing):
        _announce([estimate(bundle, some, library) for some in missing if some], quiet)
    made = []
    with progress_bar(quiet) as progress:
        for target, some in zip(targets, missing, strict=True):
            try:
                folder, _ = build_engines(
                    bundle, works, library, target, root, options=options, progress=progress
                )
            except KeyboardInterrupt:
                click.echo("finished engines are kept; run the command again to continue", err=True)
                raise
            made.append(_described(folder) | {"built": len(some)})
    return made


def _announce(estimates: Sequence[Estimate | None], quiet: bool) -> None:
    """Prints time and memory of the build on stderr; warns where memory is short."""
    from edgeexit.runtime.memory import available_bytes

    if quiet:
        return
    known = [one for one in estimates if one is not None]
    if not known:
        click.echo("TensorRT times kernels on this GPU: minutes per engine", err=True)
        return
    needed, free = max(one.peak_memory_bytes for one in known), available_bytes()
    seconds = sum(one.seconds for one in known)
    click.echo(
        f"building takes about {seconds:.0f} s, and {size(needed)} of memory for the largest "
        "engine",
        err=True,
    )
    if needed > free:
        click.echo(
            f"warning: {size(free)} of memory are free, the largest engine takes about "
            f"{size(needed)} to build; smaller --max-shapes or --without-unsplit lower that",
            err=True,
        )


def _described(folder: Path) -> dict[str, Any]:
    from edgeexit.measure.engine_list import describe_engines
    from edgeexit.runtime.engines.tensorrt.engine_cache import read_index

    return describe_engines(folder, read_index(folder))


def parse_bytes(text: str) -> int:
    """Reads ``512MiB``.

    >>> parse_bytes("512MiB"), parse_bytes("1.5GiB")
    (536870912, 1610612736)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(KiB|MiB|GiB)", text.strip())
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    amount = 0.0 if found is None else float(found[1]) * units[found[2]]
    if not 1 <= amount < 1 << 60:
        raise UsageError(
            f"--memory-limit {text[:40]}: not a memory size",
            fix="Give it as 512MiB or 2GiB.",
        )
    return int(amount)
