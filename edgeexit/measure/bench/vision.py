"""Figures of vision-language models: tower, prefill and decoding apart, for every exit of the tower
and every layer behind which image tokens can leave.

Beside every ratio stands its floor: the share of the unsplit model's time that the measure cannot
touch, however early it acts. A time to the first token is also predicted from parts: the tower's
time in this run, and the prefill of the whole model in the same turn less what its segments save
without image tokens, which is measured apart. A measured time that differs from that sum has a cost
that the parts do not show.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeexit.measure.bench.contest import Contest
from edgeexit.measure.bench.texts import Writer, decoded, time_against
from edgeexit.measure.bench.vision_cases import TOWER
from edgeexit.measure.inspect import bytes_by_part

PARTS_RUNS = 9
"""Runs in which the segments' times with and without image tokens are measured."""


def figures(contest: Contest, baseline: Writer, full: Writer, others: list[Writer]) -> Any:
    """The parts of each case, its ratios to the unsplit model, floors and predictions; None for a
    model without a vision tower."""
    tower = contest.bundle.manifest.vision_chain
    if tower is None:
        return None
    whole: dict[str, Any] = _parts(full, tower)
    unsplit = _parts(baseline, tower)
    drops = _Drops.of(contest) if any(not _of_tower(writer) for writer in others) else None
    cases: dict[str, dict[str, Any]] = {}
    for writer in others:
        own: dict[str, Any] = _parts(writer, tower)
        saved_ms = 0.0
        if _of_tower(writer):
            kept = unsplit["first_token_ms"] - unsplit["tower_ms"]
        else:
            assert drops is not None
            layer = int(writer.name.partition(":")[2])
            saved_ms = drops.saved_ms(layer)
            kept = unsplit["first_token_ms"] - unsplit["prefill_ms"] * drops.share_behind(layer)
        cases[writer.name] = own | {
            **_against(writer, baseline),
            "floor_of_first_token": round(kept / unsplit["first_token_ms"], 4),
            **_predicted(writer, full, saved_ms / 1e3),
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
        "segments_ms": None if drops is None else drops.to_dict(),
        "cases": cases,
        "memory": bytes_by_part(contest.bundle)
        | {
            writer.name: writer.side.run("memory", [0], lead=False)["records"][0]
            for writer in (baseline, full)
        },
    }


def _against(writer: Writer, baseline: Writer) -> dict[str, float | None]:
    """Times relative to the baseline's."""
    against = time_against(writer, baseline)
    return {
        "time_to_first_token_against_unsplit": against["prefill"],
        "time_per_token_against_unsplit": against["decode"],
        "answer_against_unsplit": _answer_ratio(writer, baseline),
    }


@dataclass(frozen=True)
class _Drops:
    """Times of the decoder's segments for a prompt with its image tokens and without.

    Attributes:
        behind: Layer behind which image tokens can leave -> number of the first segment without
            them.
        with_images, without: Milliseconds of each segment.
    """

    behind: dict[int, int]
    with_images: list[float]
    without: list[float]

    @classmethod
    def of(cls, contest: Contest) -> _Drops:
        """Measures them."""
        manifest = contest.bundle.manifest
        chain = manifest.last_chain
        behind = {
            int(exit_.name.removeprefix("drop_")): chain.components.index(exit_.behind) + 1
            for exit_ in chain.exits
            if exit_.action == "drop"
        }
        parts = [
            contest.chain.run("parts", [0], lead=False)["records"][0] for _ in range(PARTS_RUNS)
        ]
        medians = (
            [statistics.median(times) for times in zip(*(part[key] for part in parts), strict=True)]
            for key in ("with_images_ms", "without_images_ms")
        )
        return cls(behind, *medians)

    def saved_ms(self, layer: int) -> float:
        """What segments behind a layer save without image tokens."""
        first = self.behind[layer]
        return sum(self.with_images[first:]) - sum(self.without[first:])

    def share_behind(self, layer: int) -> float:
        """Share of the segments' time that is behind a layer."""
        return sum(self.with_images[self.behind[layer] :]) / sum(self.with_images)

    def to_dict(self) -> dict[str, list[float]]:
        """The times, rounded."""
        return {
            "with_images": [round(ms, 3) for ms in self.with_images],
            "without_images": [round(ms, 3) for ms in self.without],
        }


def _predicted(writer: Writer, full: Writer, saved_s: float) -> dict[str, float]:
    """Medians over turns of the predicted times, and of their ratios to the measured ones.

    The prefill should take what it takes without the case, in the same turn, less what segments
    save without image tokens; the time to the first token adds the steps before.
    """
    pairs = list(zip(writer.records, full.records, strict=True))
    prefill = [_prompt_s(other) - saved_s for _, other in pairs]
    first = [own["earlier_s"] + s for (own, _), s in zip(pairs, prefill, strict=True)]

    def ratio(times: list[float], measured: Callable[[dict[str, Any]], float]) -> float:
        found = [time / measured(own) for time, (own, _) in zip(times, pairs, strict=True)]
        return round(statistics.median(found), 4)

    return {
        "predicted_first_token_ms": round(1e3 * statistics.median(first), 3),
        "predicted_over_measured": ratio(first, lambda record: record["first_token_s"]),
        "predicted_prefill_over_measured": ratio(prefill, _prompt_s),
    }


def _of_tower(writer: Writer) -> bool:
    return writer.name.partition(":")[0] == TOWER


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


__all__ = ["figures"]
