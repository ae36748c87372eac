"""``edgeexit run`` for models that write text: continues prompts and answers conversations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeexit.cli.common import in_exit_order, print_json
from edgeexit.cli.conversations import Conversation, asked, read_conversations, template_variables
from edgeexit.cli.mode_options import (
    MODE_OPTIONS,
    check_drawing,
    check_mode_options,
    check_policy_used,
    in_options,
)
from edgeexit.cli.speech import read_speech
from edgeexit.errors import InputError, UsageError

if TYPE_CHECKING:
    from edgeexit.bundle.reader import Bundle
    from edgeexit.measure.given_text import GivenText
    from edgeexit.runtime import Generation, Model, Sampling
    from edgeexit.runtime.programs.modes.full import Statistics

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        help="A text to continue, or for the encoder to read (language models); may be given "
        "several times.",
    ),
    click.option("--chat", is_flag=True, help="Language models: --prompt is a message to answer."),
    click.option("--system-prompt", metavar="TEXT", help="--chat: the system message."),
    click.option(
        "--messages",
        type=click.Path(path_type=Path),
        help="Language models: a conversation to answer (.json), or one per line (.jsonl).",
    ),
    click.option("--chat-template", metavar="NAME", help="--chat, --messages: a named template."),
    click.option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="--chat, --messages: variables of the template, as in '{\"enable_thinking\": false}'.",
    ),
    *MODE_OPTIONS,
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        help="Language models: maximum new tokens of a text; default: 128.",
    ),
    click.option("--stream", is_flag=True, help="Language models: print text as it is generated."),
    click.option(
        "--audit",
        is_flag=True,
        help="--mode fast: show how often the last exit agrees with early tokens, in the generated "
        "text and in the prompts.",
    ),
    click.option(
        "--stop",
        "stops",
        multiple=True,
        help="Language models: a string that ends the text; it is not printed.",
    ),
    click.option(
        "--temperature",
        type=float,
        help="Language models: sampling temperature; 0: greedy; default: the checkpoint's.",
    ),
    click.option("--top-k", type=int, help="Language models: sample from this many tokens."),
    click.option(
        "--top-p",
        type=float,
        help="Language models: sample from the likeliest tokens of this total probability (0 to "
        "1).",
    ),
    click.option("--seed", type=int, help="Language models: random seed of sampling."),
)
GENERATING = ("mode", "max_new_tokens", "draft_exit", "drafts", "audit")
DRAWING = ("temperature", "top_k", "top_p", "seed")
TALKING = ("system_prompt", "chat_template", "chat_template_kwargs")


def writing_options(function: F) -> F:
    """Adds the options of models that write text. The function gets them by name; `read_writing`
    reads them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True)
class Writing:
    """The options of a model that writes text.

    Attributes:
        inputs: Prompts, or conversations.
        templates: Arguments of `Model.chat_prompt`.
        generating: Arguments of `Model.generate`.
        drawing: Arguments of `Sampling` that replace the model's defaults.
        stream: Whether to print the text as it is generated.
        images: Image files of the only prompt.
        speech: Arguments of `Model.generate` for sounds.
    """

    inputs: list[str] | list[Conversation]
    templates: dict[str, Any] = field(default_factory=dict)
    generating: dict[str, Any] = field(default_factory=dict)
    drawing: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    images: tuple[Path, ...] = ()
    speech: dict[str, Any] = field(default_factory=dict)


def writing_given(options: Mapping[str, Any]) -> list[str]:
    """The given options of models that write text, without prompts and messages."""
    names = [*GENERATING, "stops", *DRAWING, *TALKING, "capacity", "stream", "chat"]
    names += ["language", "task", "timestamps"]
    # 0 is a value, as in --temperature 0, and it equals False.
    return [
        name
        for name in names
        if options[name] is not None and options[name] is not False and options[name] != ()
    ]


def read_writing(options: Mapping[str, Any], bundle: Bundle, *, as_json: bool) -> Writing:
    """Reads the options. Raises `UsageError` for options that exclude each other or have no
    effect."""
    given = set(writing_given(options))
    generating = {name: options[name] for name in GENERATING if name in given}
    drawing = {name: options[name] for name in DRAWING if name in given}
    check_mode_options(options, given, bundle)
    talks = options["chat"] or options["messages"] is not None
    if (talking := [name for name in TALKING if name in given]) and not talks:
        raise UsageError(
            f"--{talking[0].replace('_', '-')} is for conversations", fix="Add --chat."
        )
    if options["messages"] is not None and "system_prompt" in given:
        raise UsageError(
            "--messages and --system-prompt exclude each other",
            fix='Put {"role": "system", "content": "..."} first in the file of --messages.',
        )
    templates = {
        "template": options["chat_template"],
        "variables": template_variables(options["chat_template_kwargs"]),
    }
    images: tuple[Path, ...] = options["images"]
    if images and len(options["prompts"]) > 1:
        raise UsageError("--image is for one prompt", fix="Give one --prompt.")
    speech = read_speech(options, bundle)
    inputs: list[str] | list[Conversation] = list(options["prompts"])
    if speech:
        inputs = [str(path) for path in options["sounds"]]
    if options["messages"] is not None:
        inputs = read_conversations(options["messages"])
    elif options["chat"]:
        inputs = asked(options["prompts"], options["system_prompt"], images)
    if options["stream"] and (as_json or len(inputs) > 1):
        what = "--audio" if speech else "--prompt"
        raise UsageError("--stream is for one text", fix=f"Give one {what}, and no --json.")
    if options["stops"]:
        generating["stop"] = options["stops"]
    images = () if options["chat"] else images  # the message has them
    return Writing(inputs, templates, generating, drawing, options["stream"], images, speech)


def write(
    bundle: Bundle,
    writing: Writing,
    loading: dict[str, Any],
    capacity: int | None,
    *,
    as_json: bool,
    quiet: bool = False,
) -> None:
    """Continues prompts or answers conversations, and shows which exits gave the tokens."""
    import msgspec

    from edgeexit.runtime import load

    check_policy_used(bundle, loading["policy"], writing.generating.get("mode", "full"), quiet)
    with in_options(), load(bundle, capacity=capacity, **loading) as model:
        rows, prompts, before = _rows(model, writing)
        rows, images = ([], None) if writing.speech else _with_images(model, writing, rows)
        sampling = msgspec.structs.replace(model.default_sampling, **writing.drawing)
        check_drawing(writing.drawing, sampling)
        if not quiet and (said := _own_settings(model.default_sampling, writing.drawing)):
            click.echo(said, err=True)
        options = {"inputs": images, "sampling": sampling} | writing.speech | writing.generating
        made = model.generate(rows, **options)
        if writing.stream:
            click.echo(before[0], nl=False)
            for piece in made:
                click.echo(piece.text, nl=False)
            click.echo()
        else:
            made.finish()
        about = model.describe_engine()
        given = _on_prompts(model, rows, images) if writing.generating.get("audit") else None
    if as_json:
        texts = [
            {"prompt": prompt, "text": text, "tokens": tokens}
            for prompt, text, tokens in zip(prompts, made.texts, made.tokens, strict=True)
        ]
        head = {"bundle": str(bundle.path), "engine": about}
        statistics = _statistics(made) | {"on_given_text": given and given.to_dict()}
        print_json(head | {"texts": texts, "statistics": statistics})
        return
    if not writing.stream:
        for number, (start, text) in enumerate(zip(before, made.texts, strict=True), start=1):
            if len(before) > 1:
                click.echo(f"== {number} of {len(before)}")
            click.echo(start + text)
    click.echo(_summary(made), err=True)
    if given is not None:
        click.echo(f"{given.describe()} (prompts only; for more text: edgeexit trace)", err=True)
    elif writing.generating.get("audit"):
        click.echo(_why_no_prompts(bundle), err=True)


def _on_prompts(
    model: Model, rows: Sequence[str | list[int]], images: Mapping[str, Any] | None
) -> GivenText | None:
    """Evaluates the policy on the prompts as given texts. None if an encoder reads the prompts, or
    if every prompt has a single token."""
    from edgeexit.measure.given_text import on_given_texts

    decoding = model.bundle.manifest.decoding
    if decoding is None or decoding.start_tokens:
        return None
    texts = [model.encode(row) if isinstance(row, str) else row for row in rows]
    return on_given_texts(model, texts, None if images is None else _of_each(model, texts, images))


def _of_each(
    model: Model, texts: Sequence[Sequence[int]], images: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The images of each prompt; each has as many placeholders as its images have tokens."""
    manifest = model.bundle.manifest
    assert manifest.decoding is not None and manifest.vision_chain is not None
    [group] = manifest.decoding.groups.values()
    tokens: Any = manifest.chains[manifest.vision_chain].outputs[0].axes[1]
    ends = list(itertools.accumulate(text.count(group.token) // tokens for text in texts))
    return [
        {name: pixels[start:end] for name, pixels in images.items()} if end > start else {}
        for start, end in itertools.pairwise([0, *ends])
    ]


def _why_no_prompts(bundle: Bundle) -> str:
    """Why `_on_prompts` has no figures."""
    decoding = bundle.manifest.decoding
    if decoding is not None and decoding.start_tokens:
        return (
            "on given text: not measured, because the encoder reads the prompt; edgeexit trace "
            "and calibrate take texts with targets"
        )
    return "on given text: not measured, because no prompt has more than one token"


def _own_settings(own: Sampling, given: Mapping[str, Any]) -> str:
    """The checkpoint's sampling settings that the options do not replace."""
    plain = type(own)()
    found = [
        f"{name} {value if not isinstance(value, tuple) else f'{len(value)} tokens'}"
        for name in own.__struct_fields__
        if (value := getattr(own, name)) != getattr(plain, name) and name not in given
    ]
    return f"sampling settings of the checkpoint: {', '.join(found)}" if found else ""


def _rows(model: Model, writing: Writing) -> tuple[list[Any], list[str], list[str]]:
    """The model's inputs, the prompts as texts, and the text to print before each answer."""
    rows: list[str] = []
    prompts: list[str] = []
    before: list[str] = []
    decoding = model.bundle.manifest.decoding
    for one in writing.inputs:
        if isinstance(one, str):
            prompts.append(one)
            rows.append(one)
            # The text that an encoder reads is not continued.
            before.append("" if decoding is not None and decoding.start_tokens else one)
        else:
            try:
                prompt = model.chat_prompt(one.messages, tools=one.tools, **writing.templates)
            except InputError as error:
                if not one.where:
                    raise
                raise InputError(f"{one.where}: {error.what}", fix=error.fix) from error
            prompts.append(prompt)
            rows.append(prompt)
            before.append("")  # do not print the template's prompt
    return rows, prompts, before


def _with_images(
    model: Model, writing: Writing, rows: list[Any]
) -> tuple[list[Any], dict[str, Any] | None]:
    """Prompts as the model takes them, with the placeholders of their images, and the images as an
    input; None: there are no images. A prompt that says nothing of its images has them in
    front."""
    from edgeexit.runtime.programs.images import image_input, marked, take_images

    found = [[] if isinstance(one, str) else take_images(one.messages)[1] for one in writing.inputs]
    if writing.images:
        written, _ = image_input(model.bundle)
        found = [[str(path) for path in writing.images]]
        rows = [marked(written, rows[0], len(writing.images))]
    plain = all(isinstance(one, str) for one in writing.inputs)  # else a template has added them
    if any(found):
        return model.prompts_with_images(rows, found, special_tokens=plain)
    return [row if plain else model.encode(row, special_tokens=False) for row in rows], None


def _statistics(made: Generation) -> dict[str, Any]:
    statistics = made.statistics
    return {
        "tokens": sum(map(len, made.tokens)),
        "tokens_per_s": made.tokens_per_s,
        "first_token_ms": made.first_token_s * 1000,
        "exits": statistics.exits,
        "earlier": statistics.earlier,
        "gates": statistics.gates,
        "dropped": statistics.dropped,
        "acceptance": statistics.acceptance,
        "alpha": statistics.alpha,
        "proposed": statistics.proposed,
        "looked_up": statistics.looked_up,
        "catch_ups": statistics.catch_ups,
        "agreement": statistics.agreement,
    }


def _dropping(gate: str, statistics: Statistics) -> str:
    """What a gate decided: ``gate_2 0.93: tokens dropped``."""
    scores = ", ".join(f"{score:.2f}" for score in statistics.gates.get(gate, ()))
    did = "dropped" if any(statistics.dropped[gate]) else "kept"
    return f"{gate}{' ' * bool(scores)}{scores}: tokens {did}"


def _summary(made: Generation) -> str:
    statistics, count = made.statistics, sum(map(len, made.tokens))
    said = [f"{count} tokens, first after {made.first_token_s * 1000:.0f} ms"]
    if made.tokens_per_s is not None:
        said.append(f"then {made.tokens_per_s:.1f} tokens/s")
    said += [f"{chain}: {', '.join(exits)}" for chain, exits in statistics.earlier.items()]
    said += [_dropping(gate, statistics) for gate in statistics.dropped]
    said.append("exits " + ", ".join(f"{k} {v}" for k, v in in_exit_order(statistics.exits)))
    if statistics.acceptance is not None:
        said.append(f"{statistics.acceptance:.0%} of drafts accepted")
    if statistics.looked_up:
        said.append(f"{statistics.looked_up} tokens drafted from the text itself")
    if statistics.agreement is not None:
        said.append(
            f"the last exit agrees with {statistics.agreement:.1%} of early tokens in this text"
        )
    return "; ".join(said)
