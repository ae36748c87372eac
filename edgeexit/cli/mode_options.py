"""Which options of ``edgeexit run`` have an effect in a decoding mode, and what a mode needs.

`edgeexit.cli.writing` reads the options and asks here before anything is loaded. Errors of the
runtime name arguments of Python; `in_options` names the options instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.common import warn
from edgeexit.errors import EdgeExitError, UsageError

if TYPE_CHECKING:
    from edgeexit.bundle.policy import Policy
    from edgeexit.bundle.reader import Bundle
    from edgeexit.runtime import Sampling

MODE_OPTIONS = (
    click.option(
        "--mode",
        type=click.Choice(["full", "exact", "fast", "approximate"]),
        help="Language models. full: every layer for every token (the default); exact: the same "
        "tokens, drafted by an early exit; fast, approximate: early exits by score.",
    ),
    click.option(
        "--capacity",
        type=click.IntRange(min=2),
        help="Language models: maximum tokens of a text with its prompt; default: the model's "
        "limit.",
    ),
    click.option(
        "--draft-exit",
        metavar="NAME",
        help="--mode exact: the exit that drafts; default: adaptive.",
    ),
    click.option(
        "--drafts",
        type=click.IntRange(min=1),
        help="--mode exact: tokens per draft; default: adaptive.",
    ),
)
"""Options of a decoding mode, for `edgeexit.cli.writing` and ``edgeexit serve``."""

EARLY = ("fast", "approximate")
"""Modes in which early exits answer tokens."""

_PYTHON = re.compile(
    r"\b(max_new_tokens|draft_exit|top_k|top_p)\b"
    r"|^(drafts|temperature|seed|capacity)\b"
)
"""Arguments of Python in messages of the runtime, which are options of the command line."""


def check_mode_options(options: Mapping[str, Any], given: set[str], bundle: Bundle) -> None:
    """Refuses options without effect in the mode, modes that the bundle does not have, and early
    modes without thresholds.

    Args:
        options: All options of ``edgeexit run``.
        given: Names of the given options of models that write text.
        bundle: A model that writes text.
    """
    mode = options["mode"] or "full"
    of_modes = {
        "threshold": (options["threshold"] is not None, EARLY),
        "audit": ("audit" in given, ("fast",)),
        "draft-exit": ("draft_exit" in given, ("exact",)),
        "drafts": ("drafts" in given, ("exact",)),
    }
    early = [exit_.name for exit_ in bundle.manifest.last_chain.stops[:-1]]
    if not early and mode != "full":
        raise UsageError(
            f"--mode {mode}: {bundle.path} has no early exits in the decoder",
            fix=f"Leave out --mode{_for_encoder(bundle)}",
        )
    for option, (is_given, modes) in of_modes.items():
        if is_given and mode not in modes:
            fix = f"Add --mode {' or '.join(modes)}."
            if not early:
                fix = f"Leave it out: the decoder has no early exits{_for_encoder(bundle)}"
            raise UsageError(f"--{option} has no effect in mode {mode}", fix=fix)
    if options["draft_exit"] not in (None, *early):
        raise UsageError(
            f"--draft-exit {options['draft_exit']}: no such early exit",
            fix=f"It has {', '.join(early)}.",
        )
    if "" in options["stops"]:
        raise UsageError(
            "--stop: the string is empty", fix="Give a string that ends a text, as in --stop END."
        )
    if mode in EARLY and options["threshold"] is None and options["policy"] is None:
        raise UsageError(
            f"--mode {mode} needs thresholds for the decoder", fix=_to_thresholds(options, bundle)
        )


def _for_encoder(bundle: Bundle) -> str:
    """How the encoder stops early, as the end of a sentence."""
    early = any(
        len(chain.stops) > 1 and chain is not bundle.manifest.last_chain
        for chain in bundle.manifest.chains.values()
    )
    return "; the encoder stops early with --encoder-threshold, in every mode." if early else "."


def _to_thresholds(options: Mapping[str, Any], bundle: Bundle) -> str:
    """How to get thresholds of the decoder."""
    if options["encoder_threshold"] is not None:
        return (
            "Add --threshold 0.6 for experiments; or, in place of --encoder-threshold, give a "
            "--policy with a rule for each chain."
        )
    return (
        f"Calibrate them: edgeexit trace {bundle.path} --data TEXTS -o tokens.npz, then "
        "edgeexit calibrate tokens.npz --max-risk 5% -o fast.json, then --policy fast.json."
    )


def check_policy_used(bundle: Bundle, policy: Policy | None, mode: str, quiet: bool) -> None:
    """Refuses a policy without effect in the mode; warns if only a part of it has an effect."""
    from edgeexit.bundle.policy import Rule, decisions_of, drop_thresholds

    decoding = bundle.manifest.decoding
    if policy is None or decoding is None or mode in EARLY:
        return
    early = {
        name
        for name, chain in bundle.manifest.chains.items()
        if any(d.consult for d in decisions_of(policy, chain, name)[:-1])
    }
    if decoding.chain not in early:
        return
    rule, chain = policy.rules.get(decoding.chain, Rule()), bundle.manifest.chains[decoding.chain]
    what = f"--policy: the thresholds of the chain {decoding.chain} have no effect in mode {mode}"
    if early == {decoding.chain} and not drop_thresholds(rule, chain):
        raise UsageError(what, fix=f"Add --mode {' or '.join(EARLY)}, or leave out --policy.")
    if not quiet:
        warn(f"{what}; the rest of the policy applies")


def check_drawing(given: Mapping[str, Any], sampling: Sampling) -> None:
    """Refuses sampling options without effect."""
    draws = [name for name in given if name != "temperature"]
    if draws and sampling.temperature == 0:
        raise UsageError(
            f"--{draws[0].replace('_', '-')} has no effect with greedy decoding",
            fix="Use a --temperature above 0."
            if "temperature" in given
            else "Add --temperature, as in --temperature 0.8.",
        )


@contextmanager
def in_options() -> Iterator[None]:
    """Errors that are raised inside name options of the command line, not Python's arguments."""
    try:
        yield
    except EdgeExitError as error:
        error.what, error.fix = _in_options(error.what), _in_options(error.fix)
        raise


def _in_options(text: str) -> str:
    """A message of the runtime with the command line's names.

    >>> _in_options('max_new_tokens is 9, but 5 fit'), _in_options('Use mode="full".')
    ('--max-new-tokens is 9, but 5 fit', 'Use --mode full.')
    """
    text = re.sub(r'mode="(\w+)"', r"--mode \1", text)
    return _PYTHON.sub(lambda found: f"--{found[0].replace('_', '-')}", text)


__all__ = [
    "EARLY",
    "MODE_OPTIONS",
    "check_drawing",
    "check_mode_options",
    "check_policy_used",
    "in_options",
]
