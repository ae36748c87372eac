"""``edgeexit build``: TensorRT engines of a bundle, for this device or ahead of time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli.common import (
    bundle_argument,
    json_option,
    print_json,
    print_table,
    progress_bar,
    size,
    verbosity_options,
)
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.runtime.build.build import Estimate
    from edgeexit.runtime.executor.session import Form

SHAPES = "INPUT:SIZExSIZE,..."


@click.command("build")
@bundle_argument
@click.option("--min-shapes", metavar=SHAPES, help="Smallest shapes of the bundle's inputs.")
@click.option("--opt-shapes", metavar=SHAPES, help="Shapes that engines are tuned for.")
@click.option(
    "--max-shapes", metavar=SHAPES, help="Largest shapes; default: the model's limits, 8 rows."
)
@click.option(
    "--capacity", type=click.IntRange(min=2), help="Most tokens of a text; language models only."
)
@click.option(
    "--caches",
    type=click.Choice(["fixed", "append"]),
    help="Form of the caches; language models only. Default: fixed where it can be built.",
)
@click.option(
    "--target",
    metavar="SM86,...",
    help="Build ahead of time, without a GPU, for these desktop GPUs (TensorRT-RTX); with -o.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where engines for targets go."
)
@click.option(
    "--engine-dir", type=click.Path(path_type=Path), help="The engine cache, if not the user's."
)
@click.option("--memory-limit", metavar="SIZE", help="Scratch memory an engine may use, as 512MiB.")
@click.option("--opt-level", type=click.IntRange(0, 5), help="How hard to search, 0 to 5.")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), help="Keep timings of kernels in this file."
)
@click.option("--without-unsplit", is_flag=True, help="Leave out the baseline, which bench needs.")
@click.option("--sign", type=click.Path(path_type=Path), help="Sign engines with this SSH key.")
@click.option(
    "--import",
    "source",
    type=click.Path(path_type=Path),
    help="Take engines that were built elsewhere; signed ones, or with --trust.",
)
@click.option(
    "--allowed-signers", type=click.Path(path_type=Path), help="Who may sign, as for ssh-keygen."
)
@click.option("--trust", is_flag=True, help="Import without a signature: you answer for them.")
@json_option
@verbosity_options
def command(bundle: Path, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Build TensorRT engines of a bundle: one per segment and head.

    Engines are kept in a cache (~/.cache/edgeexit), under a key of everything that made them; what
    is there already is not built again, what is damaged is. Of several sets that fit a device the
    one that was built or asked for last is used. Shapes are spelled as for trtexec (ids:1x128) or
    Polygraphy (ids:[1,128]).

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
    from edgeexit.runtime.engines.tensorrt import engine_cache

    if trust and allowed_signers is not None:
        raise UsageError(
            "--trust and --allowed-signers contradict each other", fix="Give one of them."
        )
    for name, value in others.items():
        if value is not None and value is not False:
            raise UsageError(
                f"--{name.replace('_', '-')} does not go with --import",
                fix="Engines that were built are taken as they are.",
            )
    root = engine_cache.default_root() if engine_dir is None else engine_dir
    folders = engine_cache.import_engines(
        source, root, bundle, trust="anything" if trust else "signature", signers=allowed_signers
    )
    return [
        _described(folder)
        | {"imported": "taken without a signature" if who is None else f"signed by {who}"}
        for folder, who in folders.items()
    ]


def _build(
    bundle: Bundle,
    *,
    quiet: bool,
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
    capacity: int | None,
    caches: Form | None,
    target: str | None,
    output: Path | None,
    engine_dir: Path | None,
    memory_limit: str | None,
    opt_level: int | None,
    timing_cache: Path | None,
    without_unsplit: bool,
    sign: Path | None,
    **others: Any,
) -> list[dict[str, Any]]:
    from edgeexit.runtime.build.build import (
        Options,
        build_engines,
        estimate,
        missing_works,
        sample_sizes,
        work_of,
    )
    from edgeexit.runtime.build.profiles import Asked, axis_sizes, parse_shapes
    from edgeexit.runtime.engines.cuda.driver import describe_device
    from edgeexit.runtime.engines.tensorrt import engine_cache
    from edgeexit.runtime.engines.tensorrt.library import find_library, parse_targets

    if others["trust"] or others["allowed_signers"]:
        raise UsageError("--trust and --allowed-signers are for --import", fix="Add --import DIR.")
    targets = [] if target is None else parse_targets(target)
    if bool(targets) != (output is not None):
        raise UsageError(
            "--target and -o go together: engines for other machines do not belong in this one's "
            "cache",
            fix="Give both, or neither to build for this device.",
        )
    if sign is not None and not targets:
        raise UsageError("--sign is for engines that go elsewhere", fix="Add --target and -o.")
    if output is not None and engine_dir is not None:
        raise UsageError(
            "-o and --engine-dir name two places", fix="Leave --engine-dir out: -o is for targets."
        )
    if sign is not None and not sign.is_file():
        raise UsageError(
            f"--sign {sign}: there is no such key", fix="Make one: ssh-keygen -t ed25519."
        )
    if sign is not None:
        engine_cache.try_key(sign)
    manifest = bundle.manifest
    if (capacity or caches) and manifest.program != "decode":
        raise UsageError("--capacity and --caches are for language models", fix="Use --max-shapes.")
    given = {
        option: axis_sizes(parse_shapes(text, option), manifest.inputs, option)
        for option, text in (
            ("--min-shapes", min_shapes),
            ("--opt-shapes", opt_shapes),
            ("--max-shapes", max_shapes),
        )
        if text is not None
    }
    asked = Asked(
        min=given.get("--min-shapes", {}),
        opt=given.get("--opt-shapes", {}),
        max=given.get("--max-shapes", {}),
        capacity=capacity,
    )
    options = Options(
        memory_limit_bytes=None if memory_limit is None else parse_bytes(memory_limit),
        opt_level=opt_level,
        timing_cache=timing_cache,
    )
    library = find_library(rtx=True if targets else None)
    if timing_cache is not None and library.rtx:
        raise UsageError(
            "--timing-cache: TensorRT-RTX times nothing when it builds", fix="Leave it out."
        )
    works = work_of(
        manifest,
        library.features,
        asked,
        sample_sizes(bundle),
        unsplit=not without_unsplit,
        form=caches,
        tunes=library.tunes,
    )
    root = output or engine_dir or engine_cache.default_root()
    wanted = [{"ahead_of_time": True, "compute_capability": one} for one in targets]
    wanted = wanted or [describe_device()]
    new = [missing_works(bundle, works, library, one, root, options) for one in wanted]
    if any(new):
        _foretell([estimate(bundle, some, library) for some in new if some], quiet)
    made = []
    with progress_bar(quiet) as progress:
        for about, some in zip(wanted, new, strict=True):
            try:
                folder, _ = build_engines(
                    bundle, works, library, about, root, options=options, progress=progress
                )
            except KeyboardInterrupt:
                click.echo("what was built is kept: run it again, and it goes on there", err=True)
                raise
            made.append(_described(folder) | {"built": len(some)})
    if sign is not None:
        for one in made:
            engine_cache.sign(Path(one["path"]), sign)
    return made


def _foretell(foretold: Sequence[Estimate | None], quiet: bool) -> None:
    """Says on stderr what building will take; warns where memory is short."""
    from edgeexit.runtime.memory import available_bytes

    known = [one for one in foretold if one is not None]
    if not known:
        if not quiet:
            click.echo("TensorRT times kernels on this GPU: minutes per engine", err=True)
        return
    needed, free = max(one.peak_memory_bytes for one in known), available_bytes()
    if not quiet:
        seconds = sum(one.seconds for one in known)
        click.echo(
            f"building takes about {seconds:.0f} s, and {size(needed)} of memory for its largest "
            "engine",
            err=True,
        )
    if needed > free and not quiet:
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
            f"--memory-limit {text[:40]}: not an amount of memory",
            fix="Give it as 512MiB or 2GiB.",
        )
    return int(amount)
