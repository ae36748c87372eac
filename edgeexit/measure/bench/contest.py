"""`Options` of a measurement, and `Contest`: the two sides that are compared."""

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
    """Options of a measurement.

    Attributes:
        mode: ``latency``: one row at a time. ``throughput``: batches of `batch` rows. Texts support
            only ``latency``; prefill and decoding are reported separately.
        engine: As for `edgeexit.runtime.load`.
        policy: Path of a policy; None: the bundle's default. With texts it needs `data`, and
            applies to mode ``fast``, measured only with a policy, and to chains before the text.
        data: Real data (see `edgeexit.measure.data`). None: rows are the bundle's samples, without
            natural exits; texts are random prompts, in mode ``full`` only, because exits give no
            meaningful scores for noise.
        batch: Rows of a batch, for throughput.
        seconds: Duration of the timed part; warm-up and the search for thread settings are extra.
        threads: Thread setting of both sides; None: search the best setting of each.
        seed: Seed of the order of rows, and of random prompts.
        launch_ahead: As for `edgeexit.runtime.load`; rows only.
        prompt_tokens: Length of random prompts.
        new_tokens: New tokens per prompt.
        energy: Whether to measure energy, too, which takes ten seconds or more for every case.
        soak_s: Seconds of a long run of the chain, to see drift; None: no such run.
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
    energy: bool = False
    soak_s: float | None = None

    def check(self, bundle: Bundle) -> None:
        """Raises `UsageError` for options that are out of range or that the bundle does not
        support."""
        if not 0 < self.seconds <= 86400:
            raise UsageError(
                f"--time {self.seconds:g}s is out of range", fix="Use a time from 5s to 1h."
            )
        if self.soak_s is not None and not 1 <= self.soak_s <= 86400:
            raise UsageError(
                f"--soak {self.soak_s:g}s is out of range", fix="Use a time from 1s to 24h."
            )
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is less than 1", fix="Use 1 or more.")
        if bundle.manifest.decoding is None:
            return
        if self.mode != "latency":
            raise UsageError(
                f"{bundle.path} is a language model, and --mode {self.mode} is for rows",
                fix="Leave out --mode: tokens per second are reported.",
            )
        if self.policy is not None and self.data is None:
            raise UsageError(
                "--policy has no effect on random prompts, on which scores mean nothing",
                fix="Give prompts with --data, or leave out --policy.",
            )
        if self.launch_ahead != "never":
            raise UsageError(
                f"{bundle.path} is a language model, and --launch-ahead is for rows",
                fix="Leave out --launch-ahead.",
            )


@dataclass(frozen=True)
class Contest:
    """The two sides of a measurement, ready to run.

    Attributes:
        inputs: Inputs of both sides.
        unsplit, chain: The sides, each with its best thread setting.
        chosen: Side -> its thread setting.
        searched: Side -> every setting's time relative to the first setting.
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
    def same_threads(self) -> bool:
        """Whether both sides have the same thread setting."""
        return self.chosen["unsplit"] == self.chosen["chain"]

    @property
    def engine(self) -> dict[str, str]:
        """Engine, library and version."""
        return {key: self.chain.facts[key] for key in ("engine", "library", "version")}
