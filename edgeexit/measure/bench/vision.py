"""Figures of vision-language models: tower, prefill and decoding apart, for every exit of the tower
and every layer behind which image tokens can leave.

Beside every ratio stands its floor: the share of the unsplit model's time that the measure cannot
touch. A time to the first token is also predicted from parts: tower and prefill of the whole model
in the same turn, less the share that segments behind an exit of the tower take, or that segments of
the decoder save without image tokens; both are measured apart. A measured time that differs from
that sum has a cost that the parts do not show.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeexit.measure.bench.contest import Contest
from edgeexit.measure.bench.texts import Writer, decoded, time_against
from edgeexit.measure.bench.vision_cases import TOWER, layer_of
from edgeexit.measure.inspect import bytes_by_part

PARTS_RUNS = 15
"""Runs in which the segments of tower and decoder are measured apart."""


def figures(
    contest: Contest,
    baseline: Writer,
    full: Writer,
    others: list[Writer],
    by_policy: Writer | None = None,
) -> Any:
    """The parts of each case, its ratios to the unsplit model, floors and predictions; None for a
    model without a vision tower.

    Args:
        by_policy: The case in which the policy decides per prompt; it has no prediction.
    """
    tower = contest.bundle.manifest.vision_chain
    if tower is None:
        return None
    whole: dict[str, Any] = _parts(full, tower)
    unsplit = _parts(baseline, tower)
    memory = {
        writer.name: writer.side.run("memory", [0], lead=False)["records"][0]
        for writer in (baseline, full)
    }
    segments = Segments.of(contest, tower) if others else None  # opens every score: after the rest
    cases: dict[str, dict[str, Any]] = {}
    for writer in others:
        assert segments is not None
        own: dict[str, Any] = _parts(writer, tower)
        kind, _, place = writer.name.partition(":")
        layer = int(place)
        if kind == TOWER:
            saved = _Saved(tower=segments.saved_by_exit(layer))
            kept = unsplit["first_token_ms"] - unsplit["tower_ms"]
        else:
            saved = _Saved(prefill=segments.saved_by_drop(layer))
            kept = unsplit["first_token_ms"] - unsplit["prefill_ms"] * segments.share_behind(layer)
        cases[writer.name] = own | {
            **_against(writer, baseline),
            "floor_of_first_token": round(kept / unsplit["first_token_ms"], 4),
            **_predicted(writer, full, saved, tower),
        }
    return {
        "image_tokens": contest.bundle.manifest.chains[tower].outputs[0].axes[1],
        "unsplit": unsplit,
        "full": whole
        | {
            "tower_against_unsplit": _ratio(full, baseline, lambda r: _chain_s(r, tower)),
            "prefill_against_unsplit": _ratio(full, baseline, _prompt_s),
            **_against(full, baseline),
        },
        "by_policy": None
        if by_policy is None
        else _parts(by_policy, tower) | _against(by_policy, baseline),
        "segments_ms": None if segments is None else segments.to_dict(),
        "cases": cases,
        "memory": bytes_by_part(contest.bundle) | memory,
    }


def _against(writer: Writer, baseline: Writer) -> dict[str, float | None]:
    """Times relative to the baseline's; spreads are between turns."""
    against = time_against(writer, baseline)
    return {
        "time_to_first_token_against_unsplit": against["prefill"],
        "time_to_first_token_spread": against["prefill_spread"],
        "time_per_token_against_unsplit": against["decode"],
        "time_per_token_spread": against["decode_spread"],
        "answer_against_unsplit": _answer_ratio(writer, baseline),
    }


@dataclass(frozen=True)
class Apart:
    """Times of segments, each measured apart, in milliseconds.

    Attributes:
        with_images, without: Each segment of the decoder, for a prompt with its image tokens and
            without; and the last exit's head.
        tower: Each segment of the tower with its exit.
        tower_exits: The exits (projectors) alone.
    """

    with_images: list[float]
    without: list[float]
    tower: list[float]
    tower_exits: list[float]


@dataclass(frozen=True)
class Segments:
    """What segments take, as shares of all of them at the same moment: a machine's speed changes
    within minutes.

    Attributes:
        behind: Layer behind which image tokens can leave -> number of the first segment without
            them.
        stops: Layer of an exit of the tower -> number of the segment before it.
        runs: Their times.
    """

    behind: dict[int, int]
    stops: dict[int, int]
    runs: list[Apart]

    @classmethod
    def of(cls, contest: Contest, tower: str) -> Segments:
        """Measures them."""
        manifest = contest.bundle.manifest
        decoder, vision = manifest.last_chain, manifest.chains[tower]
        runs = []
        for _ in range(PARTS_RUNS):
            [part] = contest.chain.run("parts", [0], lead=False)["records"]
            runs.append(
                Apart(
                    part["with_images_ms"],
                    part["without_images_ms"],
                    part["tower_ms"],
                    part["tower_exits_ms"],
                )
            )
        behind = {
            layer_of(exit_.name): decoder.components.index(exit_.behind) + 1
            for exit_ in decoder.exits
            if exit_.action == "drop"
        }
        stops = {layer_of(e.name): vision.components.index(e.behind) for e in vision.stops}
        return cls(behind, stops, runs)

    def saved_by_drop(self, layer: int) -> float:
        """Share of the prefill that segments of the decoder behind a layer save without image
        tokens."""
        first = self.behind[layer]

        def saved_ms(run: Apart) -> float:
            return sum(run.with_images[first:]) - sum(run.without[first:])

        return statistics.median(saved_ms(run) / sum(run.with_images) for run in self.runs)

    def saved_by_exit(self, layer: int) -> float:
        """Share of the tower's time that an exit of it saves: the segments behind it, with the
        last exit's projector in exchange for its own."""

        def up_to(run: Apart, last: int) -> float:
            return sum(run.tower[: last + 1]) - sum(run.tower_exits[:last])

        last = len(self.stops) - 1
        return statistics.median(
            1 - up_to(run, self.stops[layer]) / up_to(run, last) for run in self.runs
        )

    def share_behind(self, layer: int) -> float:
        """Share of the prefill that segments behind a layer take."""
        first = self.behind[layer]
        return statistics.median(
            sum(run.with_images[first:-1]) / sum(run.with_images) for run in self.runs
        )

    def to_dict(self) -> dict[str, list[float]]:
        """Medians of the times."""
        return {
            name: [
                round(statistics.median(times), 3)
                for times in zip(*(getattr(run, name) for run in self.runs), strict=True)
            ]
            for name in ("with_images", "without", "tower", "tower_exits")
        }


@dataclass(frozen=True)
class _Saved:
    """What a case should save, as shares of tower and prefill."""

    tower: float = 0.0
    prefill: float = 0.0


def _predicted(writer: Writer, full: Writer, saved: _Saved, tower: str) -> dict[str, float]:
    """Medians over turns of the predicted times, and of their ratios to the measured ones.

    Each part should take what it takes without the case, in the same turn, less the share that it
    saves, and so should the time to the first token.
    """
    pairs = list(zip(writer.records, full.records, strict=True))

    def of_tower(record: dict[str, Any]) -> float:
        return _chain_s(record, tower)

    def first_token_s(record: dict[str, Any]) -> float:
        return float(record["first_token_s"])

    def ratio(times: list[float], measured: Callable[[dict[str, Any]], float]) -> float:
        found = [time / measured(own) for time, (own, _) in zip(times, pairs, strict=True)]
        return round(statistics.median(found), 4)

    towers = [of_tower(other) * (1 - saved.tower) for _, other in pairs]
    prefills = [_prompt_s(other) * (1 - saved.prefill) for _, other in pairs]
    first = [
        first_token_s(other) - of_tower(other) * saved.tower - _prompt_s(other) * saved.prefill
        for _, other in pairs
    ]
    return {
        "predicted_first_token_ms": round(1e3 * statistics.median(first), 3),
        "predicted_over_measured": ratio(first, first_token_s),
        "predicted_tower_over_measured": ratio(towers, of_tower),
        "predicted_prefill_over_measured": ratio(prefills, _prompt_s),
    }


def _parts(writer: Writer, tower: str) -> dict[str, float]:
    """Medians over turns. ``encoder_ms`` is the time of other steps before the prefill."""
    records = writer.records

    def median_ms(values: list[float]) -> float:
        return round(1e3 * statistics.median(values), 3)

    per_token = [record["decode_s"] / decoded(record) for record in records if decoded(record)]
    return {
        "tower_ms": median_ms([_chain_s(record, tower) for record in records]),
        "encoder_ms": median_ms([r["earlier_s"] - _chain_s(r, tower) for r in records]),
        "prefill_ms": median_ms([_prompt_s(record) for record in records]),
        "first_token_ms": median_ms([record["first_token_s"] for record in records]),
        "ms_per_token": median_ms(per_token) if per_token else 0.0,
        "answer_ms": median_ms([_answer_s(record) for record in records]),
    }


def _chain_s(record: dict[str, Any], chain: str) -> float:
    return float(record["chains_s"][chain])


def _prompt_s(record: dict[str, Any]) -> float:
    return float(record["first_token_s"] - record["earlier_s"])


def _answer_s(record: dict[str, Any]) -> float:
    return float(record["first_token_s"] + record["decode_s"])


def _ratio(writer: Writer, baseline: Writer, seconds: Callable[[dict[str, Any]], float]) -> float:
    """Median over turns of a part's time relative to the baseline's."""
    pairs = zip(writer.records, baseline.records, strict=True)
    return round(statistics.median(seconds(a) / seconds(b) for a, b in pairs), 4)


def _answer_ratio(writer: Writer, baseline: Writer) -> float | None:
    """Median over turns of the whole answer's time relative to the baseline's, where both have the
    same number of tokens; None: in no turn."""
    found = [
        _answer_s(ours) / _answer_s(theirs)
        for ours, theirs in zip(writer.records, baseline.records, strict=True)
        if len(ours["tokens"]) == len(theirs["tokens"])
    ]
    return round(statistics.median(found), 4) if found else None


__all__ = ["Apart", "Segments", "figures"]
