"""`Call`: the options of a call of `Model.generate`, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeexit.bundle.manifest import Timestamps
from edgeexit.runtime.programs.arguments import ModeName
from edgeexit.runtime.programs.generation import Piece
from edgeexit.runtime.programs.modes.choose import Drafting
from edgeexit.runtime.programs.sampling import Sampling


@dataclass(frozen=True)
class Call:
    """The options of a call, as `Model.generate` takes them.

    Attributes:
        most: Most new tokens of a row; None: the default.
        stops: Strings that end a row.
        times: Tokens that say times, if the texts have them.
    """

    mode: ModeName
    drafting: Drafting
    sampling: Sampling
    most: int | None
    stops: Sequence[str]
    on_piece: Callable[[Piece], object] | None
    audit: bool
    text: bool
    ignore_eos: bool
    reuse: bool
    times: Timestamps | None


__all__ = ["Call"]
