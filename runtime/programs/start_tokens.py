"""The tokens that a text begins with, by the choices of a call
(`edgeexit.bundle.manifest.StartChoice`)."""

from __future__ import annotations

from collections.abc import Mapping

from edgeexit.bundle.manifest import Decoding, StartChoice
from edgeexit.errors import InputError, UsageError

MOST_NAMED = 12
"""Options that a message lists."""


def start_tokens(
    decoding: Decoding, choices: Mapping[str, str] | None = None, *, timestamps: bool = False
) -> list[int]:
    """The start token, the tokens of the choices, and the one of a text without times.

    Args:
        choices: Choice -> option; missing ones have their defaults.
        timestamps: Whether the text has times.

    Raises:
        UsageError: The model does not have the choice, the option or times.
        InputError: A choice without a default is missing.
    """
    check_choices(decoding, choices, timestamps=timestamps)
    given = dict(choices or {})
    tokens = list(decoding.start_tokens)
    for name, choice in decoding.choices.items():
        option = given.get(name, choice.default)
        if option is None:
            raise InputError(
                f"the model must be told the {name}, for which its checkpoint has no default",
                fix=f'Choose it: choices={{"{name}": "{next(iter(choice.options))}"}} (--{name}); '
                f"it has {_options(choice)}.",
            )
        tokens += choice.options[_known(name, choice, option)]
    if decoding.timestamps is not None and not timestamps:
        tokens.append(decoding.timestamps.without)
    return tokens


def check_choices(
    decoding: Decoding, choices: Mapping[str, str] | None, *, timestamps: bool
) -> None:
    """Raises `UsageError` for choices and options that the model does not have."""
    if choices is not None and not isinstance(choices, Mapping):
        raise UsageError(
            f"choices are a {type(choices).__name__}, not a mapping",
            fix='Give options by name: choices={"language": "en"}.',
        )
    for name, option in (choices or {}).items():
        if name not in decoding.choices:
            has = ", ".join(decoding.choices) or "none"
            raise UsageError(
                f"the model has no choice of {name!r} (it has {has})", fix="Leave it out."
            )
        _known(name, decoding.choices[name], option)
    if timestamps and decoding.timestamps is None:
        raise UsageError("timestamps: the model writes no times", fix="Leave it out.")


def _known(name: str, choice: StartChoice, option: object) -> str:
    """An option's name. Raises `UsageError` if there is no such option."""
    plain = option.lower().strip("<|>") if isinstance(option, str) else ""
    plain = choice.aliases.get(plain, plain)
    if plain not in choice.options:
        raise UsageError(f"{option!r} is no {name} of the model", fix=f"Use {_options(choice)}.")
    return plain


def _options(choice: StartChoice) -> str:
    names = list(choice.options)
    more = f" and {len(names) - MOST_NAMED} more; `edgeexit inspect` lists them"
    return ", ".join(names[:MOST_NAMED]) + more * (len(names) > MOST_NAMED)


__all__ = ["check_choices", "start_tokens"]
