"""Figures of a model that writes: prefill and decode apart, every mode against the unsplit graph.

The writers take turns: every prompt is continued by all of them, one after the other, in a drawn
order, and a figure is made of neighbouring turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeexit.errors import MeasurementError
from edgeexit.measure.bench.contest import Contest
from edgeexit.measure.bench.paired import Side, spread

MIN_TURNS = 5


@dataclass
class Writer:
    """One way to write, and what it wrote: records of
    `edgeexit.measure.bench.cases.read_generation`, one per turn."""

    name: str
    side: Side
    case: str
    records: list[dict[str, Any]] = field(default_factory=list)

    def write(self, number: int) -> None:
        """Continues a prompt."""
        [record] = self.side.run(self.case, [number], lead=False)["records"]
        self.records.append(record | {"prompt": number})

    def usual(self) -> list[dict[str, Any]]:
        """One record per prompt: of those that continued it, the one of median time (the shorter of
        two), so that what disturbed a single turn does not weigh."""
        of_prompt: dict[int, list[dict[str, Any]]] = {}
        for record in self.records:
            of_prompt.setdefault(record["prompt"], []).append(record)
        return [
            sorted(records, key=lambda one: one["first_token_s"] + one["decode_s"])[
                (len(records) - 1) // 2
            ]
            for records in of_prompt.values()
        ]

    def prefill_ms(self) -> list[float]:
        """Time to the first token, of every turn."""
        return [1e3 * record["first_token_s"] for record in self.records]

    def tokens_per_s(self) -> list[float | None]:
        """Tokens per second behind the first, of every turn; None where nothing came behind it."""
        return [
            decoded(record) / record["decode_s"] if decoded(record) else None
            for record in self.records
        ]

    def total_tokens_per_s(self) -> float:
        """All tokens behind the first ones, by all the time they took, of `usual` turns."""
        long = [record for record in self.usual() if decoded(record)]
        if not long:
            raise MeasurementError(
                f"{self.name}: no text got longer than a token, so there is no decoding to measure",
                fix="Give prompts that the model continues.",
            )
        return sum(map(decoded, long)) / sum(record["decode_s"] for record in long)


def decoded(record: dict[str, Any]) -> int:
    """Tokens that a record's `decode_s` was spent on."""
    return max(0, len(record["tokens"]) - 1)


def measure(contest: Contest) -> dict[str, Any]:
    """Measures prefill and decoding."""
    inputs, options = contest.inputs, contest.options
    modes = ["full", *(["exact"] if inputs.real else [])]
    modes += ["fast"] if inputs.real and options.policy is not None else []
    baseline = Writer("unsplit", contest.unsplit, "unsplit")
    writers = [baseline, *(Writer(mode, contest.chain, mode) for mode in modes)]
    turns = _write(contest, writers)
    full = writers[1]
    given = None
    if "fast" in modes:
        [given] = contest.chain.run("given text", [0], lead=False)["records"]
    return {
        "mode": "decode",
        "data": {
            "name": inputs.name,
            "prompts": inputs.count,
            "tokens": [min(inputs.lengths), max(inputs.lengths)],
        },
        "new_tokens": options.new_tokens,
        "turns": turns,
        "threads": _by_side(contest.chosen),
        "thread_search": _by_side(contest.searched),
        "unsplit": summary(baseline),
        "modes": {
            writer.name: summary(writer)
            | {
                "against_unsplit": compare(writer, baseline),
                "against_full": compare(writer, full),
                "turns_with_other_tokens_than_full": differences(writer, full),
            }
            for writer in writers[1:]
        },
        "fast_on_given_text": given,
        "split_tax": round(1 / compare(full, baseline)["decode"], 4),
        "warnings": [],
    }


def _by_side(values: dict[str, Any]) -> dict[str, Any]:
    return {"unsplit": values["unsplit"], "modes": values["chain"]}


def _write(contest: Contest, writers: Sequence[Writer]) -> int:
    """Lets the writers take turns for about the time that was asked for; returns how many."""
    options, count = contest.options, contest.inputs.count
    took = 0.0
    for writer in writers:
        warm = writer.side.run(writer.case, [0, 0], lead=False)
        took += warm["times_ms"][-1] / 1e3
    turns = max(MIN_TURNS, round(options.seconds / max(took, 1e-3)))
    order = np.random.default_rng(options.seed).permutation(count).tolist()
    numbers = [order[turn % len(order)] for turn in range(turns)]
    take_turns(writers, numbers, tick=lambda done: contest.tell("turns", done, turns))
    return turns


def take_turns(
    writers: Sequence[Writer],
    numbers: Sequence[int],
    *,
    tick: Callable[[int], None] | None = None,
) -> None:
    """Lets every writer continue each of these prompts, side by side, in an order drawn anew each
    time (with one seed), so that none always comes behind the same other."""
    rng = np.random.default_rng(0)
    for turn, number in enumerate(numbers):
        for place in rng.permutation(len(writers)):
            writers[place].write(number)
        if tick is not None:
            tick(turn + 1)


def compare(writer: Writer, baseline: Writer) -> dict[str, float]:
    """Speed relative to a baseline that took the same turns; above 1 is faster.

    ``decode`` and ``prefill`` are medians over turns, ``decode_total`` is the ratio of tokens per
    second over all prompts together (`Writer.usual`); spreads are those between turns.
    """
    total = writer.total_tokens_per_s() / baseline.total_tokens_per_s()
    pairs = zip(writer.tokens_per_s(), baseline.tokens_per_s(), strict=True)
    decode = [ours / theirs for ours, theirs in pairs if ours and theirs]
    if not decode:
        raise MeasurementError(
            f"{writer.name}: in no turn both it and {baseline.name} wrote more than a token",
            fix="Give prompts that the model continues.",
        )
    both = zip(writer.prefill_ms(), baseline.prefill_ms(), strict=True)
    prefill = [theirs / ours for ours, theirs in both]
    return {
        "decode": round(statistics.median(decode), 4),
        "decode_spread": round(spread(decode), 4),
        "decode_total": round(total, 4),
        "prefill": round(statistics.median(prefill), 4),
        "prefill_spread": round(spread(prefill), 4),
    }


def summary(writer: Writer) -> dict[str, Any]:
    """What a writer did over all turns."""
    records = writer.records
    found: dict[str, Any] = {
        "prefill_ms": round(statistics.median(writer.prefill_ms()), 3),
        "tokens_per_s": round(writer.total_tokens_per_s(), 2),
        "tokens": sum(len(record["tokens"]) for record in records),
    }
    if "exits" not in records[0]:
        return found

    def total(key: str) -> int:
        return sum(record[key] for record in records)

    exits: dict[str, int] = {}
    for record in records:
        for name, count in record["exits"].items():
            exits[name] = exits.get(name, 0) + count
    found["exits"] = exits
    if total("drafted"):
        found["accepted_of_drafted"] = round(total("accepted") / total("drafted"), 4)
        found["alpha"] = round(total("accepted") / total("tested"), 4)
    if total("audited"):
        found["agreement"] = round(total("agreed") / total("audited"), 4)
        wrong = total("audited") - total("agreed")
        found["agreement_of_all_tokens"] = round(1 - wrong / found["tokens"], 4)
        found["catch_ups"] = total("catch_ups")
    return found


def differences(writer: Writer, baseline: Writer) -> int:
    """In how many of the turns that both took the tokens were not those of the baseline."""
    pairs = zip(writer.records, baseline.records, strict=False)
    return sum(ours["tokens"] != theirs["tokens"] for ours, theirs in pairs)
