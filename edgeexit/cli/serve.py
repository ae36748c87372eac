"""``edgeexit serve``: answers over HTTP, in OpenAI's form where the model writes text."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli.common import add_current_directory, print_json, warn
from edgeexit.cli.input_kinds import reads_sound
from edgeexit.cli.mode_options import (
    MODE_OPTIONS,
    check_mode_options,
    check_policy_used,
    in_options,
)
from edgeexit.cli.options import ENGINES, bundle_argument, engine_options, output_options
from edgeexit.cli.policies import (
    check_stopping,
    chosen_policy,
    encoders,
    say_cautions,
    stopping_options,
)
from edgeexit.cli.units import bytes_option, seconds_option
from edgeexit.errors import EngineError, UsageError

if TYPE_CHECKING:
    from edgeexit.serve.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

TOKEN_VARIABLE = "EDGEEXIT_TOKEN"
LEAST_TOKEN = 16
LOOPBACK = "127.0.0.1"
OF_MODES = ("mode", "draft_exit", "drafts")
OF_TEXTS = (*OF_MODES, "capacity", "max_new_tokens")


def _mode_options(function: F) -> F:
    for option in reversed(MODE_OPTIONS):
        function = option(function)
    return function


@click.command("serve")
@bundle_argument
@click.option(
    "--host",
    default=LOOPBACK,
    show_default=True,
    help="Address to listen on; one that other machines reach needs a token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0: a free one.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File with the token that requests must carry; default: the environment variable "
    f"{TOKEN_VARIABLE}, or none.",
)
@click.option("--name", help="The model's name in requests; default: the bundle's folder.")
@click.option(
    "--queue",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Most requests that wait while another one runs.",
)
@click.option(
    "--deadline",
    default="60s",
    show_default=True,
    callback=seconds_option,
    metavar="TIME",
    help="Time from a request's arrival after which it is refused, or its text ends.",
)
@click.option(
    "--grace",
    default="30s",
    show_default=True,
    callback=seconds_option,
    metavar="TIME",
    help="Time that a running request may take after SIGTERM.",
)
@click.option(
    "--max-body",
    default="16MiB",
    show_default=True,
    callback=bytes_option,
    metavar="SIZE",
    help="Largest body of a request.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Language models: new tokens where a request gives no limit; default: 16 for completions, "
    "what the capacity holds for chats.",
)
@click.option(
    "--prefix-memory",
    callback=bytes_option,
    metavar="SIZE",
    help="Language models: memory for states of earlier texts, which conversations continue; "
    "default: 64MiB.",
)
@_mode_options
@stopping_options
@engine_options
@click.option(
    "--fallback",
    type=click.Choice(ENGINES),
    help="Engine to fall back to, with a warning, if --engine cannot be used; default: an error.",
)
@output_options
def command(bundle: Path, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Answer requests over HTTP until SIGTERM or Ctrl-C.

    Models that write text answer /v1/completions and /v1/chat/completions in OpenAI's form, others
    /v1/predict. /metrics is for Prometheus, / is a page to try it. --json prints the address as
    one object when requests are taken.

    Examples:

    \b
    edgeexit serve bundle --policy policy.json
    edgeexit serve bundle --mode exact --port 8080 --deadline 2min
    edgeexit serve bundle --host 0.0.0.0 --token-file token
    """
    _check_installed()
    from edgeexit.serve.server import bind, is_loopback, serve, url_of

    options |= {"exit_name": None, "stops": ()}
    check_stopping(options)
    opened = _open(bundle, options)
    token = _token(options["token_file"])
    with bind(options["host"], options["port"]) as bound:
        if token is None and not is_loopback(bound):
            raise UsageError(
                f"--host {options['host']}: other machines reach it, so requests need a token",
                fix="openssl rand -hex 32 > token; chmod 600 token; then --token-file token "
                f"(or the environment variable {TOKEN_VARIABLE}).",
            )
        settings = _settings(opened, options, token, bound.getsockname()[0])
        add_current_directory()
        with _load(opened, options, quiet=quiet) as model:
            url = url_of(bound)

            def ready() -> None:
                if as_json:
                    print_json(
                        {"url": url, "model": settings.name, "engine": model.describe_engine()}
                    )
                elif not quiet:
                    click.echo(f"{settings.name} answers at {url} (Ctrl-C ends it)", err=True)

            serve(model, settings, bound, ready)


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"serve needs packages that cannot be imported ({error})",
            fix='Install them: pip install "edgeexit[serve]".',
        ) from error


def _open(path: Path, options: Mapping[str, Any]) -> Bundle:
    """Opens the bundle; refuses options that it has no use for."""
    opened = open_bundle(path)
    if opened.manifest.decoding is None:
        names = [*OF_TEXTS, "prefix_memory"]
        if given := [name for name in names if options[name] is not None]:
            raise UsageError(
                f"--{given[0].replace('_', '-')} is for models that write text, and {path} does "
                "not",
                fix="Leave it out.",
            )
        return opened
    if reads_sound(opened):
        raise UsageError(
            f"{path} reads sounds, which serve does not take yet",
            fix="Use edgeexit run --audio, or generate(audio=...) from Python.",
        )
    if opened.manifest.tokenizer is None:
        raise UsageError(
            f"{path}: the bundle has no tokenizer, so it can neither read nor write text",
            fix="Export a checkpoint that has tokenizer.json.",
        )
    given_modes = {name for name in OF_MODES if options[name] is not None}
    check_mode_options(options, given_modes, opened)
    if options["encoder_threshold"] is not None:
        encoders(opened)
    return opened


def _settings(opened: Bundle, options: Mapping[str, Any], token: str | None, host: str) -> Settings:
    from edgeexit.serve.settings import Settings

    name = options["name"] or opened.path.resolve().name
    generating = {name: options[name] for name in OF_MODES if options[name] is not None}
    return Settings(
        name=name,
        hosts=tuple(dict.fromkeys((host, "127.0.0.1", "::1", "localhost"))),
        token=token,
        queue=options["queue"],
        deadline_s=options["deadline"],
        grace_s=options["grace"],
        body_bytes=options["max_body"],
        new_tokens=options["max_new_tokens"],
        generating=generating,
    )


def _load(opened: Bundle, options: Mapping[str, Any], *, quiet: bool) -> Any:
    from edgeexit.runtime import load

    policy = chosen_policy(opened, options)
    if not quiet:
        say_cautions(opened, policy, options)
    check_policy_used(opened, policy, options["mode"] or "full", quiet)
    loading = {name: options[name] for name in ("engine", "threads", "fallback", "capacity")}
    with in_options():
        model = load(opened, policy=policy, **loading)
    if options["prefix_memory"] is not None:
        model.prefixes.limit_bytes = options["prefix_memory"]
    return model


def _token(file: Path | None) -> str | None:
    """The token, from a file or the environment: a command line is shown to every user of the
    machine."""
    if file is None:
        found, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if found is None:
            return None
    else:
        where = f"--token-file {file}"
        try:
            found = file.read_text(encoding="utf-8")
            shared = stat.S_IMODE(file.stat().st_mode) & 0o077
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UsageError(
                f"{where}: cannot be read ({reason})", fix="Give a readable file with one token."
            ) from error
        if shared:
            warn(f"{where}: other users may read or change it. Run chmod 600 {file}.")
    found = found.strip()
    if len(found) < LEAST_TOKEN or not found.isascii() or any(c.isspace() for c in found):
        raise UsageError(
            f"{where}: not a token of at least {LEAST_TOKEN} ASCII characters without spaces",
            fix="Make one: openssl rand -hex 32.",
        )
    return found
