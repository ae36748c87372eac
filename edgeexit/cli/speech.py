"""Options of ``edgeexit run`` for models that write what was said in a sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeexit.cli.input_kinds import advice, reads_sound
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.bundle.reader import Bundle

F = TypeVar("F", bound=Callable[..., Any])

CHOICES = ("language", "task")
"""Options that are choices of start tokens, by the names that manifests use."""
_OPTIONS = (
    click.option(
        "--audio",
        "sounds",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Speech models: a sound file; may be given several times.",
    ),
    click.option(
        "--language", help="--audio: what is spoken, as in en; default: the checkpoint's."
    ),
    click.option(
        "--task", help="--audio: transcribe or translate (to English); default: the checkpoint's."
    ),
    click.option("--timestamps", is_flag=True, help="--audio: print when something was said."),
)


def speech_options(function: F) -> F:
    """Adds the options of speech models. `read_speech` reads them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def read_speech(options: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
    """Arguments of `Model.generate` from the options; empty without ``--audio``.

    Raises:
        UsageError: An option is given that the model does not have.
    """
    choices = {name: options[name] for name in CHOICES if options[name] is not None}
    given = [*choices, *(["timestamps"] if options["timestamps"] else [])]
    if not options["sounds"]:
        if given:
            raise UsageError(f"--{given[0]} is for --audio", fix="Leave it out, or add --audio.")
        return {}
    decoding = bundle.manifest.decoding
    if bundle.manifest.audio_preprocessing is None or decoding is None:
        reads = "takes sounds only as features" if reads_sound(bundle) else "takes no sounds"
        raise UsageError(f"--audio: {bundle.path} {reads}", fix=advice(bundle))
    for name in choices:
        if name not in decoding.choices:
            raise UsageError(
                f"--{name}: {bundle.path} has no choice of it: it is a model of one {name}",
                fix="Leave it out.",
            )
    return {
        "audio": list(options["sounds"]),
        "choices": choices or None,
        "timestamps": options["timestamps"],
    }


__all__ = ["read_speech", "speech_options"]
