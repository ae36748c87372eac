"""`Gate`: decides once per prompt whether its image tokens have been read and can leave (DyVTE,
NeurIPS 2025).

A gate stands behind a layer of a decoder. It reads the states of a prompt's text there and gives
the probability that the answer would be the same without the image tokens in deeper layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional

from edgeexit.bundle.manifest import Call, Exit, Tensor
from edgeexit.errors import UsageError
from edgeexit.export.contract import Component, Form
from edgeexit.export.exits.saved import check_repeated, name_layers

GATE_WIDTH = 128
"""Of a new gate's hidden layer. The paper's 2048 is for models of 7 billion weights, in which the
gates of all layers have 537 million."""


class Gate(nn.Module):
    """softmax(GELU([mean text; last text] W1) W2), of which the second class means: leave.

    Args:
        width: Size of a state.
        inner: Size of the hidden layer.
    """

    def __init__(self, width: int, inner: int = GATE_WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(2 * width, inner, bias=False)
        self.second = nn.Linear(inner, 2, bias=False)

    @property
    def inner(self) -> int:
        """Size of the hidden layer."""
        return self.first.out_features

    def forward(
        self, state: torch.Tensor, image: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """Probability ``[batch]``, float32, that the image tokens can leave.

        Args:
            state: ``[batch, new, width]``.
            image: bool ``[batch, new]``: which tokens are image tokens.
            prompt: int64 ``[batch]``: tokens of each row's prompt; the rest is padding.
        """
        hidden = self._hidden(state, image, prompt)
        difference = functional.linear(hidden, self.second.weight.diff(dim=0))
        return torch.sigmoid(difference.float())[:, 0]

    def logits(
        self, state: torch.Tensor, image: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """Logits ``[batch, 2]``: stay, leave."""
        return self.second(self._hidden(state, image, prompt))

    def _hidden(
        self, state: torch.Tensor, image: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """The hidden layer ``[batch, inner]``."""
        places = torch.arange(state.shape[1], device=state.device)
        behind = (image * (places + 1)).amax(dim=1, keepdim=True)  # the last image token
        end = prompt[:, None] - 1
        text, last = (places >= behind) & (places < end), places == end
        chosen = torch.stack([text, last], dim=1).float()
        shares = chosen / chosen.sum(dim=2, keepdim=True).clamp(min=1)
        # One product, as a sum over tokens: each operation takes long beside this little work.
        read = (shares @ state.float()).flatten(1).to(state.dtype)
        return functional.gelu(self.first(read))


def gate_name(layer: int) -> str:
    """Name of the gate behind a layer."""
    return f"gate_{layer}"


def gate_sizes(given: Iterable[int] | Mapping[int, int]) -> dict[int, int]:
    """Layer -> size of its gate's hidden layer. Raises `UsageError` if a layer is given twice."""
    if isinstance(given, Mapping):
        return dict(given)
    layers = list(given)
    check_repeated(layers, "gates")
    return dict.fromkeys(layers, GATE_WIDTH)


def make_gates(given: Iterable[int] | Mapping[int, int], width: int, depth: int) -> dict[int, Gate]:
    """New gates by layer.

    Args:
        given: Layers; as a mapping: layer -> size of the hidden layer.
        width: Size of a state.
        depth: Layers of the decoder.

    Raises:
        UsageError: A layer or a size is out of range.
    """
    sizes = gate_sizes(given)
    for layer, inner in sizes.items():
        if not isinstance(layer, int) or not 1 <= layer < depth:
            raise UsageError(
                f"gates: no gate can stand behind layer {layer!r}; the decoder has layers 1 to "
                f"{depth}",
                fix=f"{name_layers(depth)}: behind the last, nothing reads the image.",
            )
        if type(inner) is not int or inner < 1:
            raise UsageError(
                f"gates: the width {inner!r} of the gate behind layer {layer} is out of range",
                fix="Give a number from 1 on.",
            )
    return {layer: Gate(width, sizes[layer]) for layer in sorted(sizes)}


def gate_component(layer: int, gate: Gate, state: Tensor, mask: Tensor) -> Component:
    """The component of a gate that reads a segment's state."""
    score = Tensor(name=f"{gate_name(layer)}/score", dtype="float32", axes=["batch"])
    form = Form(gate.eval(), lengths=("prompt",))
    return Component(gate_name(layer), (state, mask), (score,), (form,))


def gate_exit(layer: int, behind: str, group: str) -> Exit:
    """The exit at which a gate drops a token group."""
    name = gate_name(layer)
    return Exit(
        name=name,
        behind=behind,
        scores={"gate": f"{name}/score"},
        path=[Call(component=name)],
        action="drop",
        tokens=group,
    )


__all__ = [
    "GATE_WIDTH",
    "Gate",
    "gate_component",
    "gate_exit",
    "gate_name",
    "gate_sizes",
    "make_gates",
]
