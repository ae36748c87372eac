"""Checks of the tensors in a manifest: their row axis, and whether two tensors match."""

from __future__ import annotations

from collections.abc import Mapping

from edgeexit.bundle.layout import EXPORT_AGAIN
from edgeexit.bundle.manifest import Chain, Tensor, TokenState
from edgeexit.errors import BundleError

Tensors = dict[str, Tensor]


def describe(tensor: Tensor) -> str:
    """A tensor as messages show it.

    >>> describe(Tensor(name="state", dtype="float32", axes=["batch", "new", 64]))
    "state float32['batch', 'new', 64]"
    """
    return f"{tensor.name} {tensor.dtype}{tensor.axes}"


def check_rows(where: str, tensor: Tensor | TokenState) -> None:
    """Refuses a tensor whose row axis is not the axis named batch."""
    found = [number for number, axis in enumerate(tensor.axes) if axis == "batch"]
    if found != ([] if tensor.row_axis is None else [tensor.row_axis]):
        raise BundleError(
            f"{where} has the axes {tensor.axes}, so its row_axis cannot be {tensor.row_axis}",
            fix="The row axis is the axis named batch. Export again.",
        )


def same_form(given: Tensor, promised: Tensor) -> bool:
    """Whether the tensors match: only axes of open size may differ."""
    return (given.dtype, given.row_axis, len(given.axes)) == (
        promised.dtype,
        promised.row_axis,
        len(promised.axes),
    ) and not any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(given.axes, promised.axes, strict=True)
    )


def check_answer(
    where: str, chain: Chain, outputs: Mapping[str, str], given: Mapping[str, Tensor]
) -> None:
    """Checks that an exit gives exactly the outputs of its chain.

    Args:
        where: The exit, for messages.
        chain: Its chain.
        outputs: Output of the chain -> the tensor that holds it.
        given: The tensors that the exit has.
    """
    promised = {tensor.name: tensor for tensor in chain.outputs}
    if outputs.keys() != promised.keys():
        raise BundleError(
            f"{where} gives {sorted(outputs)}, the chain has the outputs {sorted(promised)}",
            fix=EXPORT_AGAIN,
        )
    for name, output in promised.items():
        made = given.get(outputs[name])
        if made is None:
            raise BundleError(f"{where} does not compute {name}", fix=EXPORT_AGAIN)
        if not same_form(made, output):
            raise BundleError(
                f"{where} gives {describe(made)}, the chain has the output {describe(output)}",
                fix=EXPORT_AGAIN,
            )


__all__ = ["Tensors", "check_answer", "check_rows", "describe", "same_form"]
