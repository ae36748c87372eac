"""``edgeexit run``: answers, and the exits that gave them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli.common import (
    ENGINES,
    add_current_directory,
    bundle_argument,
    engine_option,
    json_option,
    print_json,
    print_table,
    threads_option,
    verbosity_options,
)
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.cli.conversations import Conversation
    from edgeexit.measure.data import Batch


@click.command("run")
@bundle_argument
@click.option(
    "--data", metavar="DATA", help=".npz, .jsonl, a folder of images, or module:function."
)
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="An image file."
)
@click.option("--text", "texts", multiple=True, help="A text.")
@click.option("--policy", type=click.Path(path_type=Path), help="When to stop; from calibrate.")
@click.option(
    "--threshold", type=float, help="Stop where max_prob is at least this, without a policy."
)
@click.option("--exit", "exit_name", metavar="NAME", help="Let this exit answer everything.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="A text to go on with (decoders); may be given several times.",
)
@click.option("--chat", is_flag=True, help="Decoders: --prompt is a message, to be answered.")
@click.option("--system-prompt", metavar="TEXT", help="--chat: what the model is told first.")
@click.option(
    "--messages",
    type=click.Path(path_type=Path),
    help="Decoders: a conversation to answer (.json), or one per line (.jsonl).",
)
@click.option("--chat-template", metavar="NAME", help="--chat, --messages: not the default one.")
@click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    help="--chat, --messages: more for the template, as in '{\"enable_thinking\": false}'.",
)
@click.option(
    "--mode",
    type=click.Choice(["full", "exact", "fast", "approximate"]),
    help="Decoders: every layer for every token (the default); the same tokens, drafted by an "
    "early exit; or exits by score.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="Decoders; default: 128 at most."
)
@click.option(
    "--capacity",
    type=click.IntRange(min=2),
    help="Decoders: the most tokens of a text, prompt included; default: what the model can.",
)
@click.option("--stream", is_flag=True, help="Decoders: print the text while it comes.")
@click.option("--draft-exit", metavar="NAME", help="--mode exact: who drafts; default: what pays.")
@click.option("--drafts", type=click.IntRange(min=1), help="--mode exact: tokens of a draft.")
@click.option("--audit", is_flag=True, help="--mode fast: how often the last exit agrees.")
@click.option(
    "--stop",
    "stops",
    multiple=True,
    help="Decoders: a string that ends the text and is not printed.",
)
@click.option("--temperature", type=float, help="Decoders: draw tokens; default: the likeliest.")
@click.option("--top-k", type=int, help="Decoders: draw among that many.")
@click.option("--top-p", type=float, help="Decoders: draw among the likeliest with that chance.")
@click.option("--seed", type=int, help="Decoders: of the draws.")
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of the data.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@engine_option
@click.option(
    "--fallback",
    type=click.Choice(ENGINES),
    help="What computes if the engine cannot be used here; said on stderr. Default: an error.",
)
@threads_option
@json_option
@verbosity_options
def command(
    bundle: Path,
    data: str | None,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    policy: Path | None,
    threshold: float | None,
    exit_name: str | None,
    prompts: tuple[str, ...],
    chat: bool,
    system_prompt: str | None,
    messages: Path | None,
    chat_template: str | None,
    chat_template_kwargs: str | None,
    mode: str | None,
    max_new_tokens: int | None,
    capacity: int | None,
    stream: bool,
    draft_exit: str | None,
    drafts: int | None,
    audit: bool,
    stops: tuple[str, ...],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    rows: int | None,
    batch_size: int,
    engine: str,
    fallback: str | None,
    threads: int | str,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Answer inputs, and tell which exit answered.

    \b
    edgeexit run bundle --image digit.png --policy policy.json
    edgeexit run bundle --text "a fine film" --threshold 0.9 -v
    edgeexit run bundle --data test.npz --rows 10 --json
    edgeexit run bundle --prompt "def main(" --mode exact --stream
    edgeexit run bundle --prompt "Why is the sky blue?" --chat --stream
    """
    from edgeexit.bundle.policy import forced
    from edgeexit.cli.conversations import asked, read_conversations, template_variables
    from edgeexit.runtime import Policy, load

    kinds = {"data": data, "image": images, "text": texts, "prompt": prompts, "messages": messages}
    kind = _only_kind([kind for kind, value in kinds.items() if value])
    if sum(choice is not None for choice in (policy, threshold, exit_name)) > 1:
        raise UsageError(
            "--policy, --threshold and --exit contradict each other", fix="Give one of them."
        )
    add_current_directory()
    if threshold is not None and not (0 <= threshold <= 1 or math.isinf(threshold)):
        raise UsageError(
            f"--threshold {threshold:g}: max_prob is a probability",
            fix="Give one from 0 to 1, as in --threshold 0.9; inf never stops.",
        )
    chosen = policy if threshold is None else Policy(thresholds=threshold)
    draws = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in draws.items() if value is not None}
    writing: dict[str, Any] = {
        "mode": mode,
        "max_new_tokens": max_new_tokens,
        "draft_exit": draft_exit,
        "drafts": drafts,
        "audit": audit or None,
        "stop": stops or None,
    }
    writing = {name: value for name, value in writing.items() if value is not None}
    talking = {
        "system_prompt": system_prompt,
        "chat_template": chat_template,
        "chat_template_kwargs": chat_template_kwargs,
    }
    talking = {name: value for name, value in talking.items() if value is not None}
    room = [] if capacity is None else ["capacity"]
    if prompts or messages:
        if exit_name is not None:
            raise UsageError(
                "--exit is for models of one pass",
                fix="--mode exact --draft-exit NAME drafts with one exit; a policy with a "
                "threshold for that exit alone lets it answer.",
            )
        _check_mode(mode or "full", writing, given, threshold)
        if rows is not None:
            raise UsageError("--rows is for --data", fix="Leave it out.")
        if talking and not (chat or messages):
            raise UsageError(
                f"--{next(iter(talking)).replace('_', '-')} is for conversations", fix="Add --chat."
            )
        if messages and system_prompt is not None:
            raise UsageError(
                "--messages brings its own messages, --system-prompt is for --chat",
                fix='Put {"role": "system", "content": "..."} first in the file.',
            )
        templates = {
            "template": chat_template,
            "variables": template_variables(chat_template_kwargs),
        }
        inputs: list[str] | list[Conversation] = list(prompts)
        if chat or messages:
            inputs = read_conversations(messages) if messages else asked(prompts, system_prompt)
        loading: dict[str, Any] = {
            "engine": engine,
            "fallback": fallback,
            "policy": chosen,
            "threads": threads,
        }
        if capacity is not None:
            loading["capacity"] = capacity
        opened = _open_for(kind, bundle)
        _write(opened, inputs, templates, loading, writing, given, stream=stream, as_json=as_json)
        return
    if writing or given or talking or room or stream or chat:
        options = [*writing, *given, *talking, *room, *(["stream"] if stream else []), "chat"]
        raise UsageError(
            f"--{options[0].replace('_', '-')} is for text that is written", fix="Give a --prompt."
        )
    opened = _open_for(kind, bundle)
    with load(
        opened,
        engine,
        policy=chosen,
        threads=threads,  # type: ignore[arg-type]
        fallback=fallback,
    ) as model:
        if exit_name is not None:
            names = [leave.name for leave in model.exits]
            if exit_name not in names:
                raise UsageError(
                    f"--exit {exit_name}: no such exit", fix=f"It has {', '.join(names)}."
                )
            model.policy = forced(model.exits, exit_name)
        found: list[dict[str, Any]] = []
        for batch in _batches(model.bundle, data, images, texts, batch_size):
            if not found and (verbose or as_json):
                model(batch.inputs)  # the first call also binds buffers, which its times would show
            result = model(batch.inputs, timed=True)
            found += _answers(model.bundle, batch, result, first=len(found))
            if rows is not None and len(found) >= rows:
                break
        found = found[:rows]
        about = model.describe_engine()
        score = model.policy.score
    if as_json:
        print_json({"bundle": str(bundle), "engine": about, "score": score, "rows": found})
        return
    columns = ["row", "answer", "exit", score]
    if verbose:
        columns.append("ms per segment")
    if any("label" in row for row in found):
        columns.append("label")
    print_table("", columns, [_cells(row, columns) for row in found])
    labelled = [row for row in found if "label" in row]
    if labelled and not quiet:
        right = sum(row["label"] == row["class"] for row in labelled)
        click.echo(f"{right} of {len(labelled)} right")


OF_ONE_PASS, OF_TEXT = ("data", "image", "text"), ("prompt", "messages")
"""Kinds of input that models take which answer, and which write."""


def _only_kind(given: list[str]) -> str:
    """The one kind of input that was given."""
    if len(given) == 1:
        return given[0]
    what = f"--{given[0]} and --{given[1]} contradict each other: " if given else ""
    answers, writes = (" or ".join(f"--{kind}" for kind in k) for k in (OF_ONE_PASS, OF_TEXT))
    raise UsageError(
        f"{what}run needs one kind of input", fix=f"Give {answers}; a language model: {writes}."
    )


def _open_for(kind: str, bundle: Path) -> Bundle:
    """Opens the bundle; refuses an input that it does not take."""
    opened = open_bundle(bundle)
    writes = opened.manifest.program == "decode"
    takes = OF_TEXT if writes else OF_ONE_PASS
    if kind not in takes:
        does = "writes text" if writes else "answers inputs, it does not write text"
        raise UsageError(
            f"--{kind}: {bundle} {does}", fix=f"Give {' or '.join(f'--{one}' for one in takes)}."
        )
    return opened


def _check_mode(
    mode: str, writing: dict[str, Any], draws: dict[str, Any], threshold: float | None
) -> None:
    """Refuses options that the mode would pass over in silence."""
    early = ("fast", "approximate")
    of_modes = {
        "threshold": (threshold is not None, early),
        "audit": ("audit" in writing, ("fast",)),
        "draft-exit": ("draft_exit" in writing, ("exact",)),
        "drafts": ("drafts" in writing, ("exact",)),
    }
    for option, (given, modes) in of_modes.items():
        if given and mode not in modes:
            raise UsageError(
                f"--{option} does nothing in mode {mode}", fix=f"Add --mode {' or '.join(modes)}."
            )
    if draws and "temperature" not in draws:
        raise UsageError(
            f"--{next(iter(draws)).replace('_', '-')} does nothing where the likeliest token is "
            "taken",
            fix="Add --temperature.",
        )


def _write(
    bundle: Bundle,
    inputs: list[str] | list[Conversation],
    templates: dict[str, Any],
    loading: dict[str, Any],
    writing: dict[str, Any],
    draws: dict[str, Any],
    *,
    stream: bool,
    as_json: bool,
) -> None:
    """Goes on with prompts or answers conversations, and tells where the tokens came from."""
    from edgeexit.runtime import Sampling, load_decoder

    if stream and (as_json or len(inputs) > 1):
        raise UsageError("--stream shows one text as it comes", fix="Give one --prompt, no --json.")
    with load_decoder(bundle, **loading) as model:
        sampling = Sampling(**draws) if draws else None
        prompts: list[str] = []
        rows: list[str | list[int]] = []
        for one in inputs:
            if isinstance(one, str):
                prompts.append(one)
                rows.append(one)
            else:
                prompts.append(model.chat_prompt(one.messages, tools=one.tools, **templates))
                rows.append(model.encode(prompts[-1], special_tokens=False))
        # Of a conversation only the answer is shown: the prompt is the template's.
        before = [one if isinstance(one, str) else "" for one in inputs]
        made = model.generate(rows, sampling=sampling, **writing)
        if stream:
            click.echo(before[0], nl=False)
            for piece in made:
                click.echo(piece.text, nl=False)
            click.echo()
        else:
            made.finish()
        about = model.describe_engine()
    statistics = made.statistics
    facts = {
        "tokens": sum(map(len, made.tokens)),
        "tokens_per_s": made.tokens_per_s,
        "first_token_ms": made.first_token_s * 1000,
        "exits": statistics.exits,
        "acceptance": statistics.acceptance,
        "alpha": statistics.alpha,
        "catch_ups": statistics.catch_ups,
        "agreement": statistics.agreement,
    }
    if as_json:
        texts = [
            {"prompt": prompt, "text": text, "tokens": tokens}
            for prompt, text, tokens in zip(prompts, made.texts, made.tokens, strict=True)
        ]
        print_json(
            {"bundle": str(bundle.path), "engine": about, "texts": texts, "statistics": facts}
        )
        return
    if not stream:
        for number, (start, text) in enumerate(zip(before, made.texts, strict=True), start=1):
            if len(before) > 1:
                click.echo(f"== {number} of {len(before)}")
            click.echo(start + text)
    said = [f"{facts['tokens']} tokens, first after {facts['first_token_ms']:.0f} ms"]
    if made.tokens_per_s is not None:
        said.append(f"then {made.tokens_per_s:.1f} tokens/s")
    said.append("exits " + ", ".join(f"{k} {v}" for k, v in sorted(statistics.exits.items())))
    if statistics.acceptance is not None:
        said.append(f"{statistics.acceptance:.0%} of drafts accepted")
    if statistics.agreement is not None:
        said.append(f"the last exit agrees with {statistics.agreement:.1%}")
    click.echo("; ".join(said), err=True)


def _batches(
    bundle: Bundle, data: str | None, images: tuple[Path, ...], texts: tuple[str, ...], size: int
) -> Iterator[Batch]:
    from edgeexit.bundle.manifest import ImagePreprocessing
    from edgeexit.errors import DataError
    from edgeexit.measure.data import Batch, open_data
    from edgeexit.measure.preprocess import TextSource, encode_texts, open_image, preprocess_images

    if data is not None:
        yield from open_data(data, bundle).batches(size)
        return
    for start in range(0, len(images), size):
        preprocessing = bundle.manifest.preprocessing
        if not isinstance(preprocessing, ImagePreprocessing):
            raise DataError(
                "--image: the bundle has no image preprocessing", fix="Use --data with .npz."
            )
        opened = [open_image(path, str(path)) for path in images[start : start + size]]
        yield Batch(
            {preprocessing.input: preprocess_images(preprocessing, opened)}, None, len(opened)
        )
    for start in range(0, len(texts), size):
        sources = [TextSource(text) for text in texts[start : start + size]]
        yield Batch(encode_texts(bundle, sources), None, len(sources))


def _answers(bundle: Bundle, batch: Batch, result: Any, *, first: int) -> list[dict[str, Any]]:
    labels = bundle.manifest.labels
    found = []
    for row in range(batch.rows):
        answer: dict[str, Any] = {
            "row": first + row,
            "exit": result.exit_names[row],
            "score": float(result.scores[row]),
        }
        if "logits" in result.outputs:
            predicted = int(result.outputs["logits"][row].argmax())
            answer["class"] = predicted
            answer["answer"] = labels[predicted] if predicted < len(labels) else str(predicted)
        else:
            answer["outputs"] = {name: value[row] for name, value in result.outputs.items()}
        if batch.labels is not None:
            answer["label"] = int(batch.labels[row])
        answer["batch_times_ms"] = result.times_ms
        found.append(answer)
    return found


def _cells(row: dict[str, Any], columns: list[str]) -> list[str]:
    cells = [str(row["row"]), str(row.get("answer", "-")), row["exit"], f"{row['score']:.4f}"]
    if "ms per segment" in columns:
        cells.append(" ".join(f"{time_ms:.3f}" for time_ms in row["batch_times_ms"]))
    if "label" in columns:
        cells.append(str(row.get("label", "-")))
    return cells
