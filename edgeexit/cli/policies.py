"""The policy that options of ``edgeexit run`` and ``serve`` ask for, and warnings about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from edgeexit.bundle.manifest import Chain
from edgeexit.bundle.reader import Bundle
from edgeexit.cli.mode_options import EARLY
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.bundle.policy import Policy, Rule


F = TypeVar("F", bound=Callable[..., Any])

_STOPPING = (
    click.option(
        "--policy",
        type=click.Path(path_type=Path),
        help="When to stop: a file from calibrate; default: no early exits.",
    ),
    click.option(
        "--threshold", type=float, help="Stop where max_prob is at least this (0 to 1); no policy."
    ),
    click.option(
        "--encoder-threshold",
        type=float,
        help="Encoder-decoders: stop the encoder where saturation, the cosine of consecutive "
        "states, is at least this (-1 to 1); no policy.",
    ),
    click.option(
        "--tower-exit",
        type=int,
        metavar="LAYER",
        help="Vision-language models: leave the vision tower behind this layer; no policy.",
    ),
    click.option(
        "--drop-image-tokens",
        "image_drop",
        type=int,
        metavar="LAYER",
        help="Vision-language models: leave image tokens out behind this layer; no policy.",
    ),
    click.option(
        "--gate-threshold",
        type=float,
        metavar="P",
        help="Vision-language models: leave image tokens out behind the first gate whose score is "
        "at least P; no policy.",
    ),
)


def stopping_options(function: F) -> F:
    """Adds the options that say when rows and tokens stop. `check_stopping` and `chosen_policy`
    read them."""
    for option in reversed(_STOPPING):
        function = option(function)
    return function


def check_stopping(options: Mapping[str, Any]) -> None:
    """Refuses stopping options that exclude each other or are out of range."""
    threshold = options["threshold"]
    choices = (options["policy"], threshold, options["exit_name"])
    if sum(choice is not None for choice in choices) > 1:
        raise UsageError(
            "--policy, --threshold and --exit exclude each other", fix="Give one of them."
        )
    if threshold is not None and not (0 <= threshold <= 1 or math.isinf(threshold)):
        raise UsageError(
            f"--threshold {threshold:g} is out of range (0 to 1)",
            fix="Give a probability, as in --threshold 0.9; inf never stops.",
        )
    alone = {
        "--drop-image-tokens": "image_drop",
        "--gate-threshold": "gate_threshold",
        "--tower-exit": "tower_exit",
    }
    if options["policy"] is not None and (
        given := [option for option, name in alone.items() if options[name] is not None]
    ):
        raise UsageError(
            f"--policy and {given[0]} exclude each other", fix="Put it into the policy."
        )
    gate = options["gate_threshold"]
    if gate is not None and not 0 <= gate <= 1:
        raise UsageError(
            f"--gate-threshold {gate:g} is out of range (0 to 1)",
            fix="Give a probability, as in --gate-threshold 0.5.",
        )
    encoder = options["encoder_threshold"]
    if encoder is not None and not (-1 <= encoder <= 1 or math.isinf(encoder)):
        raise UsageError(
            f"--encoder-threshold {encoder:g} is out of range (-1 to 1)",
            fix="Give a cosine, as in --encoder-threshold 0.98; inf never stops.",
        )
    if encoder is not None and options["policy"] is not None:
        raise UsageError(
            "--policy and --encoder-threshold exclude each other",
            fix="Leave one out; a policy may have a rule for the encoder.",
        )


def chosen_policy(bundle: Bundle, options: Mapping[str, Any]) -> Policy | None:
    """The policy that the options ask for; None: no early exits."""
    from edgeexit.bundle.policy import Policy, Rule, forced, policy_for

    if options["policy"] is not None:
        return policy_for(options["policy"], bundle)
    threshold, encoder = options["threshold"], options["encoder_threshold"]
    drop, gate, tower = (options[n] for n in ("image_drop", "gate_threshold", "tower_exit"))
    if all(one is None for one in (threshold, encoder, drop, gate, tower)):
        return None
    thresholds = _thresholds(bundle, threshold, drop, gate)
    rules = dict(of_last_chain(bundle, Rule(thresholds=thresholds)).rules)
    if encoder is not None:
        rule = Rule(score="saturation", thresholds=encoder)
        rules |= dict.fromkeys(encoders(bundle), rule)
    if tower is not None:
        name, chain = _tower(bundle)
        names = [exit_.name for exit_ in chain.stops]
        wanted = f"tower_exit_{tower}"
        if wanted not in names:
            raise UsageError(
                f"--tower-exit {tower}: the tower has no exit behind layer {tower}",
                fix=f"It has {', '.join(one.rpartition('_')[2] for one in names)}.",
            )
        rules[name] = msgspec.structs.replace(forced(chain.stops, wanted), score="saturation")
    return Policy(rules=rules)


def _thresholds(
    bundle: Bundle, threshold: float | None, drop: int | None, gate: float | None
) -> float | dict[str, float]:
    """Thresholds of the last chain: of its exits, of the layer where image tokens leave, and of
    gates."""
    from edgeexit.bundle.policy import ALWAYS, NEVER

    if drop is None and gate is None:
        return NEVER if threshold is None else threshold
    chain = bundle.manifest.last_chain
    stops = {} if threshold is None else {exit_.name: threshold for exit_ in chain.stops[:-1]}
    drops = [exit_ for exit_ in chain.exits if exit_.action == "drop"]
    places = [exit_.name for exit_ in drops if not exit_.path]
    gates = [exit_.name for exit_ in drops if exit_.path]
    if gate is not None and not gates:
        raise UsageError(
            f"--gate-threshold {gate:g}: the bundle has no gates",
            fix="Leave it out, or export with --gates.",
        )
    if drop is not None and f"drop_{drop}" not in places:
        layers = [name.removeprefix("drop_") for name in places]
        raise UsageError(
            f"--drop-image-tokens {drop}: image tokens cannot leave behind layer {drop}",
            fix=f"Give one of {', '.join(layers)}; others: edgeexit export --drop-image-tokens."
            if places
            else "Leave it out: the bundle has no image tokens, or was exported without exits.",
        )
    always = {} if drop is None else {f"drop_{drop}": ALWAYS}
    return {**stops, **always, **({} if gate is None else dict.fromkeys(gates, gate))}


def encoders(bundle: Bundle) -> list[str]:
    """Chains of encoders with exits. Raises `UsageError` if there is none."""
    found = [
        name
        for name, chain in bundle.manifest.chains.items()
        if chain is not bundle.manifest.last_chain
        if len(chain.exits) > 1 and all("saturation" in exit_.scores for exit_ in chain.exits)
    ]
    if not found:
        raise UsageError(
            f"--encoder-threshold: {bundle.path} has no encoder with exits",
            fix="Leave it out, or export an encoder-decoder with --encoder-exits.",
        )
    return found


def _tower(bundle: Bundle) -> tuple[str, Chain]:
    """The chain of a vision tower."""
    name = bundle.manifest.vision_chain
    if name is None:
        raise UsageError(f"--tower-exit: {bundle.path} has no vision tower", fix="Leave it out.")
    return name, bundle.manifest.chains[name]


def of_last_chain(bundle: Bundle, rule: Rule) -> Policy:
    """A policy with a rule for the chain that answers; earlier chains run to their last exits."""
    from edgeexit.bundle.policy import Policy, Rule

    last = bundle.manifest.last_chain
    chains = bundle.manifest.chains
    return Policy(rules={n: rule if chain is last else Rule() for n, chain in chains.items()})


def say_cautions(bundle: Bundle, policy: Policy | None, options: Mapping[str, Any]) -> None:
    """Prints warnings about untrained exits and uncalibrated thresholds on stderr."""
    from edgeexit.bundle.cautions import cautions

    manifest, found = bundle.manifest, []
    last = manifest.last_chain.stops[-1].name
    chains = set(manifest.chains)
    if manifest.decoding is not None and options["mode"] not in EARLY:
        chains.remove(manifest.decoding.chain)  # this mode does not use its policy
    if policy is not None:
        found = cautions(policy, bundle, chains)
    elif bundle.exits_untrained and options["exit_name"] not in (None, last):
        found = [f"the exit {options['exit_name']} is untrained: its answers are meaningless"]
    for caution in found:
        click.echo(f"warning: {caution}", err=True)
