"""Figures of vision-language models: tower, prefill and decoding apart, for every exit of the tower
and every layer behind which image tokens can leave.

Beside every ratio stands its floor: the share of the unsplit model's time that the measure cannot
touch. A time to the first token is also predicted from parts: tower and prefill of the whole model
in the same turn, less what segments behind an exit of the tower take, or what segments of the
decoder save without image tokens; both are measured apart. A measured time that differs from that
sum has a cost that the parts do not show.
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

PARTS_RUNS = 9
"""Runs in which the segments of tower and decoder are measured apart."""


def figures(contest: Contest, baseline: Writer, full: Writer, others: list[Writer]) -> Any:
    """The parts of each case, its ratios to the unsplit model, floors and predictions; None for a
    model without a vision tower."""
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
        saved, layer = _Saved(), int(writer.name.partition(":")[2])
        if writer.name.partition(":")[0] == TOWER:
            saved = _Saved(tower_ms=segments.saved_by_exit_ms(layer))
            kept = unsplit["first_token_ms"] - unsplit["tower_ms"]
        else:
            saved = _Saved(prefill_ms=segments.saved_by_drop_ms(layer))
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
class Segments:
    """Times of segments, each measured apart.

    Attributes:
        behind: Layer behind which image tokens can leave -> number of the first segment without
            them.
        with_images, without: Milliseconds of each segment of the decoder, for a prompt with its
            image tokens and without.
        stops: Layer of an exit of the tower -> number of the segment before it.
        tower, tower_exits: Milliseconds of each segment of the tower with its exit, and of the
            exit (its projector) alone.
    """

    behind: dict[int, int]
    stops: dict[int, int]
    with_images: list[float]
    without: list[float]
    tower: list[float]
    tower_exits: list[float]

    @classmethod
    def of(cls, contest: Contest, tower: str) -> Segments:
        """Measures them."""
        manifest = contest.bundle.manifest
        decoder, vision = manifest.last_chain, manifest.chains[tower]
        parts = [
            contest.chain.run("parts", [0], lead=False)["records"][0] for _ in range(PARTS_RUNS)
        ]
        medians = (
            [statistics.median(times) for times in zip(*(part[key] for part in parts), strict=True)]
            for key in ("with_images_ms", "without_images_ms", "tower_ms", "tower_exits_ms")
        )
        return cls(
            {
                layer_of(exit_.name): decoder.components.index(exit_.behind) + 1
                for exit_ in decoder.exits
                if exit_.action == "drop"
            },
            {layer_of(exit_.name): vision.components.index(exit_.behind) for exit_ in vision.stops},
            *medians,
        )

    def saved_by_drop_ms(self, layer: int) -> float:
        """What segments of the decoder behind a layer save without image tokens."""
        first = self.behind[layer]
        return sum(self.with_images[first:]) - sum(self.without[first:])

    def saved_by_exit_ms(self, layer: int) -> float:
        """What an exit of the tower saves: the segments behind it, with the last exit's projector
        in exchange for its own."""
        return self._tower_ms(len(self.tower) - 1) - self._tower_ms(self.stops[layer])

    def _tower_ms(self, last: int) -> float:
        """The tower's time up to a segment, and to no exit but the one behind it."""
        return sum(self.tower[: last + 1]) - sum(self.tower_exits[:last])

    def share_behind(self, layer: int) -> float:
        """Share of the decoder's time that is behind a layer."""
        return sum(self.with_images[self.behind[layer] :]) / sum(self.with_images)

    def to_dict(self) -> dict[str, list[float]]:
        """The times, rounded."""
        named = {
            "with_images": self.with_images,
            "without_images": self.without,
            "tower": self.tower,
            "tower_exits": self.tower_exits,
        }
        return {name: [round(ms, 3) for ms in times] for name, times in named.items()}


@dataclass(frozen=True)
class _Saved:
    """What a case should save, in milliseconds."""

    tower_ms: float = 0.0
    prefill_ms: float = 0.0


def _predicted(writer: Writer, full: Writer, saved: _Saved, tower: str) -> dict[str, float]:
    """Medians over turns of the predicted times, and of their ratios to the measured ones.

    Each part should take what it takes without the case, in the same turn, less what it saves; the
    time to the first token is their sum.
    """
    pairs = list(zip(writer.records, full.records, strict=True))

    def of_tower(record: dict[str, Any]) -> float:
        return _chain_s(record, tower)

    def predicted(part: Callable[[dict[str, Any]], float], saved_ms: float) -> list[float]:
        return [part(other) - saved_ms / 1e3 for _, other in pairs]

    def ratio(times: list[float], measured: Callable[[dict[str, Any]], float]) -> float:
        found = [time / measured(own) for time, (own, _) in zip(times, pairs, strict=True)]
        return round(statistics.median(found), 4)

    def first_token_s(record: dict[str, Any]) -> float:
        return float(record["first_token_s"])

    first = predicted(first_token_s, saved.tower_ms + saved.prefill_ms)
    return {
        "predicted_first_token_ms": round(1e3 * statistics.median(first), 3),
        "predicted_over_measured": ratio(first, first_token_s),
        "predicted_tower_over_measured": ratio(predicted(of_tower, saved.tower_ms), of_tower),
        "predicted_prefill_over_measured": ratio(predicted(_prompt_s, saved.prefill_ms), _prompt_s),
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


__all__ = ["Segments", "figures"]
