"""``edgeexit bench``: measures a bundle against the same model unsplit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeexit.cli.bench_notes import direction, gpu_notes, print_more, threads
from edgeexit.cli.common import (
    add_current_directory,
    print_json,
    print_table,
    progress_bar,
    share,
    size,
)
from edgeexit.cli.comparison import print_comparison, write_json
from edgeexit.cli.options import (
    engine_option,
    output_options,
    overwrite_option,
    read_threads,
)
from edgeexit.cli.units import seconds_option
from edgeexit.errors import UsageError


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--compare",
    nargs=2,
    metavar="A.json B.json",
    type=click.Path(path_type=Path),
    help="Measure nothing: compare two results that -o wrote.",
)
@click.option(
    "--mode",
    type=click.Choice(["latency", "throughput"]),
    default="latency",
    show_default=True,
    help="Latency: one row at a time; throughput: full batches (not for language models).",
)
@click.option("--data", metavar="DATA", help="Real inputs (and labels), or prompts.")
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    help="policy.json; default: no early exits. Language models: only with --data.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=32, show_default=True, help="Rows, for throughput."
)
@click.option(
    "--time",
    "seconds",
    default="30s",
    show_default=True,
    callback=seconds_option,
    metavar="TIME",
    help="Length of the timed part: a number and ms, s, m or h. Warm-up and the search for thread "
    "settings take additional time.",
)
@click.option(
    "--threads",
    callback=read_threads,
    metavar="N|brief|blocking|spinning|process",
    help="Threads of bundle and unsplit model; default: the fastest for each, from a short search.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Language models without --data: length of the random prompts, in tokens.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    help="Language models: new tokens for each prompt.",
)
@click.option(
    "--launch-ahead",
    type=click.Choice(["never", "measured", "always"]),
    default="never",
    show_default=True,
    help="On a GPU: launch the next segment while a score is read back; measured: only where that "
    "saves time. Not for language models.",
)
@click.option(
    "--energy",
    is_flag=True,
    help="Also measure joules of every exit: ten seconds or more for each. Needs a sensor "
    "(edgeexit doctor).",
)
@click.option(
    "--soak",
    "soak_s",
    callback=seconds_option,
    metavar="TIME",
    help="Also run the chain for that long, as in 10min, and show whether it gets slower.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random order of rows.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Also write the result to this file."
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also plot the result to this file (.png or .svg; needs matplotlib).",
)
@engine_option
@overwrite_option
@output_options
def command(
    bundle: Path | None,
    compare: tuple[Path, Path] | None,
    output: Path | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure BUNDLE against the same model unsplit.

    Bundle and unsplit model run in separate processes, each with its fastest thread setting. They
    run in turns, and ratios compare runs of the same turn.

    Examples:

    \b
    edgeexit bench bundle --data test.npz --policy policy.json
    edgeexit bench bundle --data test.npz --mode throughput --batch 32 --time 2m -o bench.json
    edgeexit bench writer --data prompts.jsonl --new-tokens 64 --plot bench.svg
    edgeexit bench --compare before.json after.json
    """
    from edgeexit.bundle.files import check_output
    from edgeexit.measure.bench.bench import Options, bench
    from edgeexit.measure.plots import check_plot, plot_bench

    if compare is not None:
        if bundle or plot or options["data"] or options["policy"]:
            what = "--compare reads results; a bundle, --data, --policy and --plot have no effect"
            raise UsageError(what, fix="Leave them out.")
        print_comparison(compare, output, overwrite=overwrite, as_json=as_json)
        return
    if bundle is None:
        raise UsageError("BUNDLE is missing", fix="Give one, or --compare A.json B.json.")
    if options["engine"] == "cpu" and options["launch_ahead"] != "never":
        raise UsageError(
            "--launch-ahead is for GPUs: on a CPU there is no wait for a score",
            fix="Leave it out, or use --engine cuda or tensorrt.",
        )
    add_current_directory()
    if output is not None:
        check_output(output, overwrite=overwrite)
    if plot is not None:
        check_plot(plot, output, options["data"], options["policy"], overwrite=overwrite)
    with progress_bar(quiet, lines=True) as progress:
        result = bench(bundle, Options(**options), progress=progress)
    if output is not None:
        write_json(output, result, overwrite=overwrite)
    if plot is not None:
        plot_bench(plot, result, overwrite=overwrite)
    if as_json:
        print_json(result)
    elif "modes" in result:
        _print_texts(result)
        if result["vision"] is not None:
            _print_vision(result["vision"])
    else:
        _print(result)
    if not as_json:
        print_more(result)


def _print_texts(result: dict[str, Any]) -> None:
    machine, data = result["environment"], result["data"]
    most = "" if result["stop_tokens"] == "ignored" else "at most "
    columns = ["mode", "first token ms", "x unsplit", "tokens/s", "x unsplit", "x full", "notes"]
    unsplit = result["unsplit"]
    first, speed = f"{unsplit['prefill_ms']:.2f}", f"{unsplit['tokens_per_s']:.1f}"
    rows = [["unsplit", first, "1.000", speed, "1.000", "-", ""]]
    for name, found in result["modes"].items():
        ours, full = found["time_against_unsplit"], found["time_against_full"]
        rows.append(
            [
                name,
                f"{found['prefill_ms']:.2f}",
                f"{ours['prefill']:.3f}",
                f"{found['tokens_per_s']:.1f}",
                f"{ours['decode']:.3f}",
                f"{full['decode']:.3f}",
                _remark(name, found, result["turns"]),
            ]
        )
    print_table(
        f"{machine['bundle']['name']} on {data['name']}, {most}{result['new_tokens']} tokens each",
        columns,
        rows,
        notes=[
            "",
            "x unsplit, x full: time to the first token, then time per token, relative to the "
            "unsplit model and to mode full; below 1 is faster",
            f"split tax of decoding {result['split_tax']:.3f} (full depth)",
            threads(result["threads"]["unsplit"], result["threads"]["modes"]),
            f"{machine['processor']}, {machine['cores']} cores, "
            f"{machine['engine']['library']} {machine['engine']['version']}",
            _how_texts_are_written(result),
            *(_earlier(*item) for item in result["earlier_exits"].items()),
            *([_earlier("dropped", result["dropped"])] if result["dropped"] else []),
            *_given_text(result["fast_on_given_text"]),
            *(f"warning: {text}" for text in result["warnings"]),
        ],
    )


def _how_texts_are_written(result: dict[str, Any]) -> str:
    said = "texts are greedy, whatever the checkpoint's sampling settings are"
    if result["stop_tokens"] != "ignored":
        return f"{said}, and end where the model ends them"
    return f"{said}, and no token ends them; for modes with exits, give prompts with --data"


def _earlier(chain: str, shares: dict[str, float]) -> str:
    """The exits of a chain before the text, or the gates that dropped tokens."""
    return f"{chain}, of prompts: " + ", ".join(f"{k} {share(v)}" for k, v in shares.items())


def _print_vision(found: dict[str, Any]) -> None:
    """Tower, prefill and decoding apart."""
    named = {"unsplit": found["unsplit"], "full": found["full"], **found["cases"]}
    if found["by_policy"] is not None:
        named |= {"full+policy": found["by_policy"]}
    encodes = found["full"]["encoder_ms"] > 0.1 * found["full"]["prefill_ms"]
    parts = ["tower", *(["encoder"] if encodes else []), "prefill", "first_token"]
    columns = ["case", *(f"{part.replace('_', ' ')} ms" for part in parts), "x unsplit", "floor"]
    columns += ["predicted ms", "ms/token", "x unsplit", "answer ms", "x unsplit"]
    rows = []
    for name, own in named.items():
        numbers = [own[f"{part}_ms"] for part in parts]
        rows.append(
            [
                name,
                *(f"{number:.2f}" for number in numbers),
                _ratio(own.get("time_to_first_token_against_unsplit")),
                _ratio(own.get("floor_of_first_token")),
                f"{own['predicted_first_token_ms']:.2f}" if name in found["cases"] else "-",
                f"{own['ms_per_token']:.2f}",
                _ratio(own.get("time_per_token_against_unsplit")),
                f"{own['answer_ms']:.1f}",
                _ratio(own.get("answer_against_unsplit")),
            ]
        )
    full = found["full"]
    click.echo("")
    print_table(
        f"{found['image_tokens']} image tokens per image",
        columns,
        rows,
        notes=[
            "",
            f"split tax: tower {full['tower_against_unsplit']:.3f}, prefill "
            f"{full['prefill_against_unsplit']:.3f}",
            "floor: the share of the unsplit time to the first token that the case cannot touch; "
            "predicted: tower and prefill of the whole model in the same turn, less what is saved",
            *_memory(found["memory"]),
        ],
    )


def _memory(found: dict[str, Any]) -> list[str]:
    """Memory by part."""
    weights = ", ".join(f"{name} {size(own)}" for name, own in found["weights"].items())
    passed = [f"{name} {size(own)}" for name, own in found["passed_on"].items() if own is not None]
    peaks = [f"{name} {size(found[name]['peak_bytes'])}" for name in ("unsplit", "full")]
    return [
        f"weights: {weights}, embeddings {size(found['tables'])}",
        f"states: {size(found['states_per_token'])} per token; {', '.join(passed)}",
        f"peak memory of the process: {', '.join(peaks)}",
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _given_text(found: dict[str, Any] | None) -> list[str]:
    from edgeexit.measure.given_text import GivenText

    return [] if found is None else [f"fast {GivenText(**found).describe()}"]


def _remark(name: str, found: dict[str, Any], turns: int) -> str:
    baseline = "unsplit" if name == "full" else "full"
    other = found[f"turns_with_other_tokens_than_{baseline}"]
    same = f"{other} of {turns} turns differ from {baseline}" if other else f"texts as {baseline}"
    said = [same]
    if "alpha" in found:
        said.insert(0, f"{share(found['accepted_of_drafted'])} of drafts accepted")
    if "agreement" in found:
        said.insert(0, f"last exit agrees with {share(found['agreement'])} of early tokens")
    return "; ".join(said)


def _print(result: dict[str, Any]) -> None:
    machine = result["environment"]
    throughput = result["mode"] == "throughput"
    columns = [
        "path",
        "rows/s" if throughput else "p50 ms",
        "p90 ms",
        "p99 ms",
        "x unsplit",
        "rate",
        "accuracy",
    ]
    rows = [_row("unsplit", result["unsplit"], throughput, ratio=1.0)]
    if throughput:
        rows.append(_row("chain", result["chain"], throughput))
    for exit_ in result["exits"]:
        rows.append(_row(exit_["name"], exit_, throughput))
    if result["natural"] is not None:
        rows.append(_row("natural", result["natural"], throughput))
    notes = [
        "",
        *direction(result),
        f"split tax {result['split_tax']:.3f} (all scores compared, no early exit)",
        threads(result["unsplit"]["threads"], result["chain"]["threads"]),
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{result['chain']['engine']['library']} {result['chain']['engine']['version']}",
    ]
    natural = result["natural"]
    if natural is not None and not throughput:
        notes.append(
            f"expected of natural by the rows of the exits (sum of rate x median): "
            f"{natural['expected_ms']:.3f} ms, {natural['expected_ratio']:.3f} x unsplit"
        )
    if natural is not None and throughput:
        notes.append(
            f"natural exits reach {share(natural['of_ideal'])} of the ideal throughput, in which a "
            "row takes time only in the segments that it passes"
        )
    if natural is None:
        notes.append("for natural exits, give real inputs with --data")
    notes += gpu_notes(result["gpu"], [exit_["name"] for exit_ in result["exits"]])
    notes += [f"warning: {text}" for text in result["warnings"]]
    print_table(
        f"{machine['bundle']['name']} on {result['data']['name']}, {result['mode']}",
        columns,
        rows,
        notes=notes,
    )


def _row(
    name: str, found: dict[str, Any], throughput: bool, ratio: float | None = None
) -> list[str]:
    def number(key: str, form: str = ".3f") -> str:
        return format(found[key], form) if found.get(key) is not None else "-"

    return [
        name,
        number("rows_per_s", ".1f") if throughput else number("p50_ms"),
        number("p90_ms"),
        number("p99_ms"),
        f"{ratio:.3f}" if ratio is not None else number("ratio_to_unsplit"),
        share(found["rate"]) if found.get("rate") is not None else "-",
        share(found["accuracy"]) if found.get("accuracy") is not None else "-",
    ]
