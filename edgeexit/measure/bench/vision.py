"""Figures of vision-language models: tower, prefill and decoding apart, for every exit of the tower
and every layer behind which image tokens can leave.

Beside every ratio stands its floor: the share of the unsplit model's time that the measure cannot
touch, however early it acts. A time to the first token is also predicted from parts that were
measured in other turns: the tower's time, the prefill's, and the segments' times with and without
image tokens. A measured time that differs from that sum has a cost that the parts do not show.
"""

from __future__ import annotations

import statistics
from typing import Any

from edgeexit.bundle.manifest import Chain
from edgeexit.measure.bench.contest import Contest
from edgeexit.measure.bench.texts import Writer, decoded, time_against
from edgeexit.measure.bench.vision_cases import TOWER, vision_chain


def figures(contest: Contest, baseline: Writer, full: Writer, others: list[Writer]) -> Any:
    """The parts of each case, its ratios to the unsplit model, floors and predictions."""
    decoding = contest.bundle.manifest.decoding
    assert decoding is not None
    chain = contest.bundle.manifest.chains[decoding.chain]
    parts = [contest.chain.run("parts", [0], lead=False)["records"][0] for _ in range(5)]
    with_images, without = (
        [statistics.median(times) for times in zip(*(part[key] for part in parts), strict=True)]
        for key in ("with_images_ms", "without_images_ms")
    )
    whole: dict[str, Any] = _parts(full)
    unsplit = _parts(baseline)
    cases: dict[str, dict[str, Any]] = {}
    for writer in others:
        kind, _, layer = writer.name.partition(":")
        own: dict[str, Any] = _parts(writer)
        if kind == TOWER:
            predicted = own["tower_ms"] + whole["prefill_ms"]
            floor = unsplit["prefill_ms"] / unsplit["first_token_ms"]
        else:
            behind = _segments_behind(chain, int(layer))
            saved = sum(with_images[n] - without[n] for n in behind)
            predicted = whole["first_token_ms"] - saved
            rest = sum(with_images[n] for n in behind) / sum(with_images)
            kept = unsplit["tower_ms"] + unsplit["prefill_ms"] * (1 - rest)
            floor = kept / unsplit["first_token_ms"]
        against = time_against(writer, baseline)
        cases[writer.name] = own | {
            "time_to_first_token_against_unsplit": against["prefill"],
            "time_per_token_against_unsplit": against["decode"],
            "answer_against_unsplit": _answer_ratio(writer, baseline),
            "floor_of_first_token": round(floor, 4),
            "predicted_first_token_ms": round(predicted, 3),
            "predicted_over_measured": round(predicted / own["first_token_ms"], 4),
        }
    return {
        "image_tokens": image_tokens(contest),
        "unsplit": unsplit,
        "full": whole
        | {
            "tower_against_unsplit": _ratio(full, baseline, "earlier_s"),
            "prefill_against_unsplit": _ratio(full, baseline, "prompt_s"),
            "answer_against_unsplit": _answer_ratio(full, baseline),
        },
        "segments_ms": {
            "with_images": [round(ms, 3) for ms in with_images],
            "without_images": [round(ms, 3) for ms in without],
        },
        "cases": cases,
    }


def image_tokens(contest: Contest) -> int | None:
    """Image tokens of one image (or tile)."""
    name = vision_chain(contest.bundle.manifest)
    if name is None:
        return None
    [features] = contest.bundle.manifest.chains[name].outputs
    return features.axes[1] if isinstance(features.axes[1], int) else None


def _parts(writer: Writer) -> dict[str, float]:
    """Medians over turns."""
    records = writer.records

    def median_ms(values: list[float]) -> float:
        return round(1e3 * statistics.median(values), 3)

    per_token = [record["decode_s"] / decoded(record) for record in records if decoded(record)]
    return {
        "tower_ms": median_ms([record["earlier_s"] for record in records]),
        "prefill_ms": median_ms([_prompt_s(record) for record in records]),
        "first_token_ms": median_ms([record["first_token_s"] for record in records]),
        "ms_per_token": median_ms(per_token) if per_token else 0.0,
        "answer_ms": median_ms([_answer_s(record) for record in records]),
    }


def _prompt_s(record: dict[str, Any]) -> float:
    return float(record["first_token_s"] - record["earlier_s"])


def _answer_s(record: dict[str, Any]) -> float:
    return float(record["first_token_s"] + record["decode_s"])


def _ratio(writer: Writer, baseline: Writer, part: str) -> float:
    """Median over turns of a part's time relative to the baseline's."""

    def seconds(record: dict[str, Any]) -> float:
        return _prompt_s(record) if part == "prompt_s" else float(record[part])

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


def _segments_behind(chain: Chain, layer: int) -> list[int]:
    """Numbers of the components behind the place where image tokens leave."""
    [behind] = [exit_.behind for exit_ in chain.exits if exit_.name == f"drop_{layer}"]
    return list(range(chain.components.index(behind) + 1, len(chain.components)))


__all__ = ["figures", "image_tokens"]
