"""What is measured how: the options of a measurement, and the two sides that are compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.measure.bench.cases import NEW_TOKENS
from edgeexit.measure.bench.inputs import Inputs
from edgeexit.measure.bench.paired import Side
from edgeexit.runtime.executor.launch_ahead import LaunchAhead

Mode = Literal["latency", "throughput"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        mode: ``latency``: one row at a time. ``throughput``: batches of `batch` rows. Texts have
            only the first: prefill and decoding are reported apart.
        engine: As for `edgeexit.runtime.load`.
        policy: Path of a policy; None: the bundle's default. Of texts: that of mode ``fast``, which
            is measured if there is one.
        data: Real data (see `edgeexit.measure.data`). None: the bundle's samples and no natural
            exits; random prompts and no mode but ``full``, for what exits say to noise means
            nothing.
        batch: Rows of a batch, for throughput.
        seconds: How long the timed part shall take; warm-up and the search for settings are extra.
        threads: A setting for both sides; None: search the best one for each.
        seed: Of the order of rows, and of random prompts.
        launch_ahead: As for `edgeexit.runtime.load`; rows only.
        prompt_tokens: Length of random prompts.
        new_tokens: Tokens that continue each prompt.
    """

    mode: Mode = "latency"
    engine: str = "cpu"
    policy: str | os.PathLike[str] | None = None
    data: str | os.PathLike[str] | None = None
    batch: int = 32
    seconds: float = 30.0
    threads: Any = None
    seed: int = 0
    launch_ahead: LaunchAhead = "never"
    prompt_tokens: int = 64
    new_tokens: int = NEW_TOKENS

    def check(self, bundle: Bundle) -> None:
        """Refuses options that are out of range, or that the bundle has nothing for."""
        if not 0 < self.seconds <= 86400:
            raise UsageError(
                f"--time {self.seconds:g}s is not a time to measure for", fix="Use 5s to an hour."
            )
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is less than 1", fix="Use 1 or more.")
        if bundle.manifest.decoding is None:
            return
        if self.mode != "latency":
            raise UsageError(
                f"{bundle.path} is a language model, and --mode {self.mode} counts rows",
                fix="Leave --mode out: tokens per second are reported.",
            )
        if self.launch_ahead != "never":
            raise UsageError(
                f"{bundle.path} is a language model, and --launch-ahead is for models of one pass",
                fix="Leave it out.",
            )


@dataclass(frozen=True)
class Contest:
    """The two sides of a measurement, ready to run.

    Attributes:
        inputs: What both run.
        unsplit, chain: The sides, each in its best thread setting.
        chosen: Side -> that setting.
        searched: Side -> every setting's time relative to the first one's.
        tell: Called with the progress.
    """

    bundle: Bundle
    options: Options
    inputs: Inputs
    unsplit: Side
    chain: Side
    chosen: dict[str, str]
    searched: dict[str, dict[str, float]]
    tell: Progress

    @property
    def engine(self) -> dict[str, str]:
        """What computes."""
        return {key: self.chain.facts[key] for key in ("engine", "library", "version")}
