"""Figures of language models: prefill and decoding separately, every mode relative to the unsplit
graph.

The writers take turns: every prompt is continued by all of them, one after the other in random
order. Figures are computed from turns of the same prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeexit.bundle.policy import Rule, decisions_of, drop_thresholds, policy_for
from edgeexit.errors import MeasurementError
from edgeexit.measure.bench.cases import BY_POLICY
from edgeexit.measure.bench.contest import Contest
from edgeexit.measure.bench.paired import Side, spread
from edgeexit.measure.bench.vision_cases import vision_settings

MIN_TURNS = 5
FEW_PROMPTS = 5
"""With fewer prompts, shares of tokens say nothing about other prompts."""


@dataclass
class Writer:
    """One case that generates text, with one record per turn
    (`edgeexit.measure.bench.cases.read_generation`).

    Attributes:
        lead: Whether each turn begins with another prompt, whose time does not count.
    """

    name: str
    side: Side
    case: str
    records: list[dict[str, Any]] = field(default_factory=list)
    lead: bool = False

    def write(self, number: int) -> None:
        """Continues a prompt."""
        numbers = [(number + 1) % self.side.inputs, number] if self.lead else [number]
        record = self.side.run(self.case, numbers, lead=False)["records"][-1]
        self.records.append(record | {"prompt": number})

    def usual(self) -> list[dict[str, Any]]:
        """One record per prompt: the record with the median time (of two, the shorter), so that a
        disturbed turn has no effect."""
        of_prompt: dict[int, list[dict[str, Any]]] = {}
        for record in self.records:
            of_prompt.setdefault(record["prompt"], []).append(record)
        return [
            sorted(records, key=whole_s)[(len(records) - 1) // 2] for records in of_prompt.values()
        ]

    def seconds(self) -> float:
        """Time of all `usual` turns together."""
        return sum(map(whole_s, self.usual()))

    def prefill_ms(self) -> list[float]:
        """Time to the first token, per turn."""
        return [1e3 * record["first_token_s"] for record in self.records]

    def tokens_per_s(self) -> list[float | None]:
        """Tokens per second after the first token, per turn; None if there is only one token."""
        return [
            decoded(record) / record["decode_s"] if decoded(record) else None
            for record in self.records
        ]

    def total_tokens_per_s(self) -> float:
        """Tokens per second after the first tokens, over all `usual` turns together."""
        long = [record for record in self.usual() if decoded(record)]
        if not long:
            raise MeasurementError(
                f"{self.name}: no text has more than one token, so decoding cannot be measured",
                fix="Give prompts that the model continues with more tokens.",
            )
        return sum(map(decoded, long)) / sum(record["decode_s"] for record in long)


def _blind(contest: Contest) -> list[str]:
    """Why there are no figures of a vision tower that the model has."""
    if contest.bundle.manifest.vision_chain is None or contest.inputs.seeing:
        return []
    return ["not every prompt has an image: tower and image tokens were not measured"]


def whole_s(record: dict[str, Any]) -> float:
    """Seconds of a whole text."""
    return float(record["first_token_s"] + record["decode_s"])


def decoded(record: dict[str, Any]) -> int:
    """Tokens that a record's `decode_s` covers: all but the first."""
    return max(0, len(record["tokens"]) - 1)


def measure(contest: Contest) -> dict[str, Any]:
    """Measures prefill and decoding; of vision-language models also the tower."""
    from edgeexit.measure.bench.vision import figures  # it computes with this module's functions

    inputs, options = contest.inputs, contest.options
    left = _left_early(contest)
    modes = _modes(contest, left)
    baseline = Writer("unsplit", contest.unsplit, "unsplit")
    settings = vision_settings(contest.bundle.manifest) if inputs.seeing else {}
    seen = [Writer(name, contest.chain, name) for name in settings]
    writers = [baseline, *(Writer(mode, contest.chain, mode) for mode in modes), *seen]
    turns = _write(contest, writers)
    full = writers[1]
    by_policy = next((writer for writer in writers if writer.name == BY_POLICY), None)
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
        "sampling": "greedy",
        "stop_tokens": "end texts" if inputs.real else "ignored",
        "turns": turns,
        "threads": _by_side(contest.chosen),
        "thread_search": _by_side(contest.searched),
        "unsplit": summary(baseline),
        "modes": {
            writer.name: summary(writer)
            | {
                "time_against_unsplit": time_against(writer, baseline),
                "time_against_full": time_against(writer, full),
                "turns_with_other_tokens_than_full": differences(writer, full),
                "turns_with_other_tokens_than_unsplit": differences(writer, baseline),
            }
            for writer in writers[1 : len(modes) + 1]
        },
        "vision": figures(contest, baseline, full, seen, by_policy) if inputs.seeing else None,
        "earlier_exits": {} if by_policy is None else _earlier_exits(contest, by_policy, left),
        "dropped": {} if by_policy is None else _dropped(contest, by_policy),
        "fast_on_given_text": given,
        "split_tax": time_against(full, baseline)["decode"],
        "same_threads": contest.same_threads,
        "warnings": (few_prompts(inputs.count) if inputs.real else []) + _blind(contest),
    }


def _modes(contest: Contest, left: Sequence[str]) -> list[str]:
    """The modes that the bundle has and the data can show; `left`: chains left early."""
    decoding = contest.bundle.manifest.decoding
    assert decoding is not None
    modes = ["full"]
    if set(left) - {decoding.chain} or _drops(contest):
        modes.append(BY_POLICY)
    if contest.inputs.real and len(contest.bundle.manifest.chains[decoding.chain].stops) > 1:
        modes.append("exact")
    return [*modes, "fast"] if decoding.chain in left else modes


def _left_early(contest: Contest) -> list[str]:
    """Chains that the policy may leave early; none without a policy."""
    if contest.options.policy is None:
        return []
    policy = policy_for(contest.options.policy, contest.bundle)
    return [
        name
        for name, chain in contest.bundle.manifest.chains.items()
        if any(decision.consult for decision in decisions_of(policy, chain, name)[:-1])
    ]


def _drops(contest: Contest) -> list[str]:
    """Gates and scheduled drops that the policy uses."""
    manifest, policy = contest.bundle.manifest, contest.options.policy
    if policy is None or manifest.decoding is None:
        return []
    name = manifest.decoding.chain
    rule = policy_for(policy, contest.bundle).rules.get(name, Rule())
    return [*drop_thresholds(rule, manifest.chains[name])]


def _dropped(contest: Contest, writer: Writer) -> dict[str, float]:
    """Gate or scheduled drop -> share of prompts whose tokens it dropped."""
    usual = writer.usual()
    return {
        name: round(sum(name in one["dropped"] for one in usual) / len(usual), 4)
        for name in _drops(contest)
    }


def _earlier_exits(contest: Contest, writer: Writer, left: Sequence[str]) -> dict[str, Any]:
    """Of each chain before the text that may be left early: exit -> share of prompts."""
    manifest = contest.bundle.manifest
    found = {}
    for name in left:
        taken = [one["earlier"][name] for one in writer.usual() if name in one["earlier"]]
        if taken:
            found[name] = {
                exit_.name: round(taken.count(exit_.name) / len(taken), 4)
                for exit_ in manifest.chains[name].stops
            }
    return found


def _by_side(values: dict[str, Any]) -> dict[str, Any]:
    return {"unsplit": values["unsplit"], "modes": values["chain"]}


def _write(contest: Contest, writers: Sequence[Writer]) -> int:
    """Lets the writers take turns for about the requested time. Returns the number of turns."""
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
    """Lets every writer continue each of these prompts, one after the other. The order is random
    for each prompt (with a fixed seed), so that no writer always follows the same writer."""
    rng = np.random.default_rng(0)
    for turn, number in enumerate(numbers):
        for place in rng.permutation(len(writers)):
            writers[place].write(number)
        if tick is not None:
            tick(turn + 1)


def few_prompts(count: int) -> list[str]:
    """A warning if there are too few prompts to say something about others."""
    if count >= FEW_PROMPTS:
        return []
    prompts = "1 prompt" if count == 1 else f"{count} prompts"
    return [
        f"accepted drafts, agreement and equal tokens are of {prompts} only, and say nothing about "
        f"others: give at least {FEW_PROMPTS}"
    ]


def time_against(writer: Writer, baseline: Writer) -> dict[str, float]:
    """Time relative to a baseline with the same turns, as `compare`; below 1 is faster. ``decode``
    is the time per token after the first, ``prefill`` the time to the first token."""
    return compare(baseline, writer)


def compare(writer: Writer, baseline: Writer) -> dict[str, float]:
    """Speed relative to a baseline with the same turns; above 1 is faster.

    ``decode`` and ``prefill`` are medians over turns. ``decode_total`` is the ratio of tokens per
    second over all prompts together (`Writer.usual`). Spreads are between turns.
    """
    total = writer.total_tokens_per_s() / baseline.total_tokens_per_s()
    pairs = zip(writer.tokens_per_s(), baseline.tokens_per_s(), strict=True)
    decode = [ours / theirs for ours, theirs in pairs if ours and theirs]
    if not decode:
        raise MeasurementError(
            f"{writer.name}: in no turn did both it and {baseline.name} write more than one token",
            fix="Give prompts that the model continues with more tokens.",
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
    """Figures of a writer over all turns."""
    records = writer.records
    figures: dict[str, Any] = {
        "prefill_ms": round(statistics.median(writer.prefill_ms()), 3),
        "tokens_per_s": round(writer.total_tokens_per_s(), 2),
        "tokens": sum(len(record["tokens"]) for record in records),
    }
    if "exits" not in records[0]:
        return figures

    def total(key: str) -> int:
        return sum(record[key] for record in records)

    exits: dict[str, int] = {}
    for record in records:
        for name, count in record["exits"].items():
            exits[name] = exits.get(name, 0) + count
    figures["exits"] = exits
    if total("drafted"):
        figures["accepted_of_drafted"] = round(total("accepted") / total("drafted"), 4)
        figures["alpha"] = round(total("accepted") / total("tested"), 4)
    if total("audited"):
        figures["agreement"] = round(total("agreed") / total("audited"), 4)
        wrong = total("audited") - total("agreed")
        figures["agreement_of_all_tokens"] = round(1 - wrong / figures["tokens"], 4)
        figures["catch_ups"] = total("catch_ups")
    return figures


def differences(writer: Writer, baseline: Writer) -> int:
    """Number of turns in which the writer's tokens differ from the baseline's."""
    pairs = zip(writer.records, baseline.records, strict=False)
    return sum(ours["tokens"] != theirs["tokens"] for ours, theirs in pairs)
