"""`TokenScores`: scores of exits that the component in front computes for every token.

Such a score (`saturation`) is known before the head runs. So where it decides, the head runs only
for tokens that stop; a vocabulary projection often costs as much as several layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.engines.host import fetch
from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.components import scored_before_path

if TYPE_CHECKING:
    from edgeexit.runtime.executor.session import Session


class TokenScores:
    """The scores per token of a session. Exits are counted by the component in front of them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        known = session.components.bundle.manifest.components
        self._tensors = [
            {}
            if exit_ is None
            else {name: exit_.scores[name] for name in scored_before_path(exit_, known)}
            for exit_ in session.exits
        ]

    @property
    def tensors(self) -> set[str]:
        """Names of all their tensors."""
        return {name for tensors in self._tensors for name in tensors.values()}

    def of(self, number: int) -> set[str]:
        """Names of the scores of an exit that are known before its head runs."""
        return set(self._tensors[number])

    def open(self, number: int, scores: Iterable[str]) -> bool:
        """Lets the component in front of an exit compute those of the scores that it can.

        Returns:
            Whether it computes any of them.
        """
        wanted = {self._tensors[number][name] for name in scores if name in self._tensors[number]}
        if not wanted:
            return False
        part, components = self._session.parts[number], self._session.components
        outputs = components[part.name].outputs
        if not wanted <= outputs:
            components.open({part.name: outputs | wanted})
            part.forget_bindings()
        return True

    def every(self, number: int, new: int) -> dict[str, NDArray[np.float32]]:
        """All scores of an exit that are open, ``[batch, new]``, of a run of so many tokens."""
        session = self._session
        outputs = session.components[session.parts[number].name].outputs
        return {
            score: fetch(session.tensor(name, new))
            for score, name in self._tensors[number].items()
            if name in outputs
        }

    def newest(self, number: int, score: str, block: Block) -> NDArray[np.float32]:
        """A score of the newest token of each row, ``[batch]``, of a block that the component has
        just run over; undefined for rows without tokens."""
        scores = fetch(self._session.tensor(self._tensors[number][score], block.new))
        if block.new == 1:
            return scores[:, 0]
        last = np.array([max(count - 1, 0) for count in block.counts])
        newest: NDArray[np.float32] = scores[np.arange(len(last)), last]
        return newest


__all__ = ["TokenScores"]
