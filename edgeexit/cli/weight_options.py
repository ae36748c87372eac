"""Options of ``edgeexit export`` for weights in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.export.passes.weight_bits import WeightBits

F = TypeVar("F", bound=Callable[..., Any])

BITS = {"int4": 4, "int8": 8, "float32": 32}


def weight_options(function: F) -> F:
    """Adds the options that `weight_bits` reads."""
    for option in (
        click.option(
            "--weights",
            type=click.Choice(list(BITS)),
            help="Checkpoints: store weights in 4 or 8 bits; everything else is in --dtype. "
            "Default: as the checkpoint has them.",
        ),
        click.option(
            "--head-weights",
            type=click.Choice(list(BITS)),
            help="With --weights: those of exit heads and of the embedding; default: as --weights.",
        ),
        click.option(
            "--weights-block",
            type=int,
            help="With --weights: number of weights that share a scale (16, 32, 64, 128 or 256); "
            "default: 32, or 16 where rows cannot be divided by 32.",
        ),
        click.option(
            "--weights-method",
            type=click.Choice(["rtn", "hqq", "k-quant", "gptq"]),
            help="With --weights: how numbers are chosen; gptq needs --calibration-data. Default: "
            "k-quant.",
        ),
        click.option(
            "--weights-symmetric",
            is_flag=True,
            help="With --weights: no zero points (method rtn).",
        ),
    )[::-1]:
        function = option(function)
    return function


def weight_bits(options: Mapping[str, Any]) -> WeightBits | Literal["float32"] | None:
    """How weights are stored, as the options say; None: as the checkpoint has them."""
    from edgeexit.export.passes.weight_bits import WeightBits

    named = {
        "head": options["head_weights"] and BITS[options["head_weights"]],
        "block": options["weights_block"],
        "method": options["weights_method"],
        "symmetric": options["weights_symmetric"] or None,
    }
    given = {name: value for name, value in named.items() if value is not None}
    if options["weights"] in (None, "float32"):
        if given:
            name = next(iter(given))
            option = "--head-weights" if name == "head" else f"--weights-{name}"
            raise UsageError(f"{option} needs --weights", fix="Add --weights int4 or int8.")
        return "float32" if options["weights"] else None
    if given.get("symmetric") and "method" not in given:
        given["method"] = "rtn"
    return WeightBits(bits=BITS[options["weights"]], **given)


__all__ = ["weight_bits", "weight_options"]
