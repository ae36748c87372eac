"""A vision tower with exits: layers over the patches of an image, and a projector that makes image
tokens of their state.

It runs once per image, before the language model. An exit behind layer k hands on what its own
projector makes of that layer's state; its score is `saturation`, high if the last layer changed the
state little. A projector runs only where an image leaves, so exits that are not taken cost no more
than their score. New projectors start as copies of the model's own and must be trained.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edgeexit.bundle.manifest import Axis, Call, Chain, Exit, Tensor
from edgeexit.export.contract import Component, Form, Values
from edgeexit.export.exits.encoder import saturation
from edgeexit.export.exits.saved import check_layers

CHAIN = "vision"
PIXELS = "pixel_values"
IMAGE_FEATURES = "image_features"


@dataclass(frozen=True)
class TowerTrunk:
    """A family's description of its vision tower.

    Attributes:
        pixels: ``[channels, height, width]`` of an image.
        stem: ``pixels [batch, channels, height, width] -> state``.
        layers: Each ``state -> state``; without those behind the last one that is read. If a layer
            changes the state's shape first, it is an ``nn.Sequential`` of that and the rest, whose
            input and output are compared for the score.
        state_axes: Axes of the state behind the stem and behind each layer (``layers + 1``
            entries).
        projector: ``(*states) -> image tokens [batch, tokens, width]``; takes the states behind the
            layers of `reads`.
        tokens: Image tokens per image.
        width: Of an image token: that of the language model's embeddings.
        reads: Layers whose states the projector takes (0 = the stem); empty: the last one. At an
            exit behind layer k, deeper ones are replaced by layer k.
        projector_at: ``layer -> `` the module that a new projector behind that layer starts as;
            None: `projector`, which then takes the state of any layer.
    """

    pixels: tuple[int, int, int]
    stem: nn.Module
    layers: Sequence[nn.Module]
    state_axes: Sequence[Sequence[Axis]]
    projector: nn.Module
    tokens: int
    width: int
    reads: tuple[int, ...] = ()
    projector_at: Callable[[int], nn.Module] | None = None


class ExitTower(nn.Module):
    """A vision tower with exits behind some layers.

    Args:
        trunk: Its description; modules are shared with the model that owns the weights.
        exits: Layers (1 = behind the first) with an exit; the last one always has one.

    Attributes:
        projectors: Exit name -> its projector.
    """

    def __init__(self, trunk: TowerTrunk, exits: Iterable[int] = ()) -> None:
        super().__init__()
        self.trunk = trunk
        self.depth = len(trunk.layers)
        self.exit_layers = check_layers(exits, self.depth, "tower")
        self.projectors = nn.ModuleDict(
            {
                exit_name(layer): copy.deepcopy(
                    trunk.projector if trunk.projector_at is None else trunk.projector_at(layer)
                )
                for layer in self.exit_layers
            }
        )

    def forward(self, pixel_values: torch.Tensor, *, layers: int | None = None) -> torch.Tensor:
        """Image tokens ``[batch, tokens, width]`` of images ``[batch, channels, height, width]``.

        Args:
            layers: The exit layer to leave at; None: the last layer.
        """
        trunk, last = self.trunk, self.depth if layers is None else layers
        states = [state for _, state in _walk(trunk.stem, trunk.layers[:last], pixel_values)]
        projector = trunk.projector if last == self.depth else self.projectors[exit_name(last)]
        return projector(*(states[layer] for layer in self._read_at(last)))

    def each_exit(self, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        """Image tokens ``[batch, tokens, width]`` of every exit, the last layer included, in one
        pass: layer -> image tokens."""
        return {layer: made[IMAGE_FEATURES] for layer, made in self.answers(pixel_values)}

    def answers(self, pixel_values: torch.Tensor) -> Iterator[tuple[int, Values]]:
        """What every exit hands on for images, and its score, by name: ``(layer, answers)``."""
        trunk, states = self.trunk, []
        for number, (before, state) in enumerate(_walk(trunk.stem, trunk.layers, pixel_values)):
            states.append(state)
            if number not in self._borders()[1:]:
                continue
            last = number == self.depth
            projector = trunk.projector if last else self.projectors[exit_name(number)]
            features = projector(*(states[read] for read in self._read_at(number)))
            scores = {} if last else {"saturation": saturation(before, state, None)}
            yield number, {IMAGE_FEATURES: features} | scores

    def components(self) -> list[Component]:
        """Segments, projectors and the unsplit tower."""
        return [*self._segments(), *self._projectors(), self._unsplit()]

    def chain(self) -> Chain:
        """The chain of the segments, with an exit behind each."""
        names = [f"tower_{number}" for number in range(len(self._borders()) - 1)]
        exits = [
            Exit(
                name=exit_name(stop),
                behind=name,
                outputs={IMAGE_FEATURES: f"{exit_name(stop)}/{IMAGE_FEATURES}"},
                scores={"saturation": f"{name}/saturation"} if stop < self.depth else {},
                path=[Call(component=_projector_name(stop))],
            )
            for name, stop in zip(names, self._borders()[1:], strict=True)
        ]
        return Chain(
            components=names,
            outputs=[self._features(IMAGE_FEATURES)],
            exits=exits,
            unsplit=["tower_unsplit"],
        )

    @property
    def pixels(self) -> Tensor:
        """The program's input of images."""
        return Tensor(name=PIXELS, dtype="float32", axes=["batch", *self.trunk.pixels])

    def _borders(self) -> list[int]:
        return [0, *self.exit_layers, self.depth]

    def _read_at(self, layer: int) -> list[int]:
        """The layers whose states the projector of an exit takes."""
        return [min(layer, read) for read in self.trunk.reads or (self.depth,)]

    def _segments(self) -> list[Component]:
        segments = []
        borders = self._borders()
        later = sorted({layer for stop in borders[1:] for layer in self._read_at(stop)})
        for number, (start, stop) in enumerate(itertools.pairwise(borders)):
            name, last = f"tower_{number}", stop == self.depth
            first = 0 if start == 0 else start + 1
            handed = [layer for layer in later if first <= layer < stop]
            score = Tensor(name=f"{name}/saturation", dtype="float32", axes=["batch"])
            body = _Segment(self.trunk, start, stop, handed, scored=not last)
            segments.append(
                Component(
                    name=name,
                    inputs=(self.pixels if start == 0 else self._state(start),),
                    outputs=(
                        self._state(stop),
                        *map(self._state, handed),
                        *(() if last else (score,)),
                    ),
                    forms=(Form(body.eval()),),
                )
            )
        return segments

    def _projectors(self) -> list[Component]:
        components = []
        for stop in self._borders()[1:]:
            read = self._read_at(stop)
            taken = list(dict.fromkeys(read))
            own = self.trunk.projector if stop == self.depth else self.projectors[exit_name(stop)]
            body = _Projector(own, [taken.index(layer) for layer in read])
            components.append(
                Component(
                    name=_projector_name(stop),
                    inputs=tuple(map(self._state, taken)),
                    outputs=(self._features(f"{exit_name(stop)}/{IMAGE_FEATURES}"),),
                    forms=(Form(body.eval()),),
                )
            )
        return components

    def _unsplit(self) -> Component:
        body = _Whole(self)
        outputs = (self._features(IMAGE_FEATURES),)
        return Component("tower_unsplit", (self.pixels,), outputs, (Form(body.eval()),))

    def _state(self, layer: int) -> Tensor:
        axes = list(self.trunk.state_axes[layer])
        return Tensor(name=f"tower_state_{layer}", dtype="float32", axes=axes)

    def _features(self, name: str) -> Tensor:
        axes: list[Axis] = ["batch", self.trunk.tokens, self.trunk.width]
        return Tensor(name=name, dtype="float32", axes=axes)


def exit_name(layer: int) -> str:
    """Name of the exit behind a layer of the tower."""
    return f"tower_exit_{layer}"


def _projector_name(layer: int) -> str:
    return f"projector_{layer}"


class _Segment(nn.Module):
    """Layers of the tower; hands on the states of some of them and the last one's `saturation`."""

    def __init__(
        self, trunk: TowerTrunk, start: int, stop: int, handed: Sequence[int], *, scored: bool
    ) -> None:
        super().__init__()
        self.stem = trunk.stem if start == 0 else nn.Identity()
        self.layers = nn.ModuleList(trunk.layers[start:stop])
        self.handed, self.start, self.scored = list(handed), start, scored

    def forward(self, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        walked = list(_walk(self.stem, self.layers, given))
        handed = [walked[layer - self.start][1] for layer in self.handed]
        before, last = walked[-1]
        return (last, *handed, *([saturation(before, last, None)] if self.scored else []))


def _walk(
    stem: nn.Module, layers: Iterable[nn.Module], given: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The state behind the stem and each layer, and before it the one that a score compares it
    with."""
    state = stem(given)
    yield state, state
    for layer in layers:
        *reshape, rest = layer if isinstance(layer, nn.Sequential) else [layer]
        before = reshape[0](state) if reshape else state
        state = rest(before)
        yield before, state


class _Projector(nn.Module):
    """A projector that takes each state once."""

    def __init__(self, projector: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.projector, self.order = projector, list(order)

    def forward(self, *states: torch.Tensor) -> torch.Tensor:
        return self.projector(*(states[number] for number in self.order))


class _Whole(nn.Module):
    """The tower and its last projector."""

    def __init__(self, tower: ExitTower) -> None:
        super().__init__()
        self.stem, self.projector = tower.trunk.stem, tower.trunk.projector
        self.layers = nn.ModuleList(tower.trunk.layers)
        self.reads = tower._read_at(tower.depth)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = [state for _, state in _walk(self.stem, self.layers, pixel_values)]
        return self.projector(*(states[layer] for layer in self.reads))


__all__ = ["CHAIN", "IMAGE_FEATURES", "PIXELS", "ExitTower", "TowerTrunk", "exit_name"]
