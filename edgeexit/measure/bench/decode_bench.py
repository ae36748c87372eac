"""``edgeexit bench`` of a decoder: prefill and decode apart, every mode against the unsplit graph.

Each side writes in a process of its own (`edgeexit.measure.bench.worker`). They take turns: every
prompt is continued by all of them, one after the other, in a drawn order, and a figure is made of
what lies side by side.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.errors import DataError, MeasurementError, UsageError
from edgeexit.measure import environment
from edgeexit.measure.bench.bench import doubts
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting, spread
from edgeexit.measure.data import load_function
from edgeexit.runtime.engines.onnxruntime import available_cores
from edgeexit.runtime.text.tokenizer import open_tokenizer

SUBJECTS = "edgeexit.measure.bench.decode_cases"
RANDOM_PROMPTS = 8
SEARCH_TOKENS = 32
MIN_TURNS = 5


@dataclass
class Writer:
    """One way to write, and what it wrote: records of
    `edgeexit.measure.bench.decode_cases.read_generation`, one per turn."""

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
                fix="Give prompts that the model goes on from.",
            )
        return sum(map(decoded, long)) / sum(record["decode_s"] for record in long)


def decoded(record: dict[str, Any]) -> int:
    """Tokens that a record's `decode_s` was spent on."""
    return max(0, len(record["tokens"]) - 1)


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
            fix="Give prompts that the model goes on from.",
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


def bench_decoder(
    path: str | Path | Bundle,
    *,
    engine: str = "cpu",
    policy: str | Path | None = None,
    data: str | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    seconds: float = 30.0,
    threads: Any = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures a decoder's modes against the same model unsplit.

    Args:
        path: The bundle.
        policy: Of ``fast``; None: the bundle's own.
        data: Prompts, as `read_prompts` takes them. None: random tokens, with which only ``full``
            is compared, for what exits say to noise means nothing.
        prompt_tokens: Length of random prompts.
        new_tokens: Tokens written behind each prompt.
        seconds: About how long the turns take.
        threads: A setting for both sides; None: the best of each.

    Returns:
        What ``edgeexit bench --json`` prints.
    """
    if not 0 < seconds <= 86400:
        raise UsageError(
            f"--time {seconds:g}s is not a time to measure for", fix="Use 5s to an hour."
        )
    bundle = path if isinstance(path, Bundle) else open_bundle(path)
    watch = environment.Watch()
    tell = progress or (lambda what, done, of: None)
    prompts = (
        read_prompts(data, bundle) if data else random_prompts(bundle, prompt_tokens, seed=seed)
    )
    longest = max(map(len, prompts))
    limit = bundle.manifest.limits["positions"]
    if longest + new_tokens > limit:
        raise MeasurementError(
            f"a prompt of {longest} tokens and {new_tokens} new ones are more than the model was "
            f"made for ({limit})",
            fix="Lower --new-tokens, or leave out such prompts.",
        )
    wanted = ["full", *(["exact"] if data else []), *(["fast"] if data and policy else [])]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_inputs(folder / "prompts.npz", [{"tokens": np.array(row)} for row in prompts])
        common = {
            "bundle": str(bundle.path),
            "prompts": str(folder / "prompts.npz"),
            "engine": engine,
            "capacity": longest + new_tokens,
        }
        own = {"policy": None if policy is None else str(policy)}

        def search(what: str, case: str) -> tuple[Any, dict[str, float]]:
            if threads is not None:
                return threads, {}
            extra = own if what == "modes" else {}

            def make(setting: Any) -> Side:
                arguments = {
                    **common,
                    **extra,
                    "new_tokens": min(new_tokens, SEARCH_TOKENS),
                    "threads": setting,
                }
                return Side(f"{SUBJECTS}:{what}", arguments, name=what)

            tell(f"thread settings: {what}", 0, 0)
            side, best, relative = best_setting(
                make, case, settings(engine, available_cores()), seconds=2.0
            )
            side.close()
            return best, relative

        found = {"unsplit": search("unsplit", "unsplit"), "modes": search("modes", "full")}
        sides = {
            what: stack.enter_context(
                Side(
                    f"{SUBJECTS}:{what}",
                    {**common, **extra, "new_tokens": new_tokens, "threads": found[what][0]},
                    name=what,
                )
            )
            for what, extra in (("unsplit", {}), ("modes", own))
        }
        baseline = Writer("unsplit", sides["unsplit"], "unsplit")
        writers = [baseline, *(Writer(mode, sides["modes"], mode) for mode in wanted)]
        took = 0.0
        for writer in writers:
            warm = writer.side.run(writer.case, [0, 0], lead=False)
            took += warm["times_ms"][-1] / 1e3
        turns = max(MIN_TURNS, round(seconds / max(took, 1e-3)))
        order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
        numbers = [order[turn % len(order)] for turn in range(turns)]
        take_turns(writers, numbers, tick=lambda done: tell("turns", done, turns))
        full = writers[1]
        own_cpu_s = sum(side.cpu_s for side in sides.values()) + sum(os.times()[:2])
        machine = watch.stop(own_cpu_s)
        facts = sides["modes"].facts
        about = {key: facts[key] for key in ("engine", "library", "version")}
        return {
            "mode": "decode",
            "environment": {
                **environment.describe(),
                "bundle": {"name": bundle.manifest.name, "digest": bundle.digest},
                "engine": about,
                "machine": machine,
            },
            "data": {
                "name": f"{len(prompts)} random prompts" if data is None else Path(data).name,
                "prompts": len(prompts),
                "tokens": [min(map(len, prompts)), longest],
            },
            "new_tokens": new_tokens,
            "turns": turns,
            "threads": {what: str(best) for what, (best, _) in found.items()},
            "thread_search": {what: relative for what, (_, relative) in found.items()},
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
            "split_tax": round(1 / compare(full, baseline)["decode"], 4),
            "warnings": doubts(machine, [side.name for side in sides.values() if side.restless]),
        }


def read_prompts(source: str, bundle: Bundle) -> list[list[int]]:
    """Prompts as token ids.

    Args:
        source: A ``.jsonl`` file whose lines have ``prompt`` or ``text``, or ``tokens`` (ids), or
            ``module:function`` that gives a list of texts or lists of ids.
    """
    rows: list[Any]
    if source.endswith(".jsonl"):
        rows = [_line(source, n, text) for n, text in enumerate(_lines(source), start=1)]
    else:
        rows = list(load_function(source, "--data")())
    if not rows:
        raise DataError(f"{source}: there are no prompts", fix="Give at least one.")
    tokenizer = open_tokenizer(bundle) if any(isinstance(row, str) for row in rows) else None
    vocabulary = bundle.manifest.decoding.embedding.vocabulary  # type: ignore[union-attr]
    found = []
    for number, row in enumerate(rows, start=1):
        ids = tokenizer.encode(row).ids if tokenizer and isinstance(row, str) else row
        known = isinstance(ids, (list, tuple)) and len(ids) > 0
        if not known or not all(isinstance(n, int) and 0 <= n < vocabulary for n in ids):
            raise DataError(
                f"{source}: prompt {number} is empty or holds what is no token id",
                fix=f"Give texts, or lists of ids from 0 to {vocabulary - 1}.",
            )
        found.append(list(ids))
    return found


def _lines(source: str) -> list[str]:
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read ({error})", fix="Check the path.") from error
    return [line for line in text.splitlines() if line.strip()]


def _line(source: str, number: int, text: str) -> Any:
    try:
        row = json.loads(text)
        for name in ("prompt", "text"):
            if name in row:
                return row[name]
        return [int(n) for n in row["tokens"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source}: line {number} is no JSON object with prompt, text or tokens",
            fix='Write lines like {"prompt": "def main("}.',
        ) from error


def random_prompts(bundle: Bundle, length: int, *, seed: int) -> list[list[int]]:
    """Prompts of random tokens."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    rng = np.random.default_rng(seed)
    shape = (RANDOM_PROMPTS, length)
    return rng.integers(1, decoding.embedding.vocabulary, shape).tolist()


__all__ = ["Writer", "bench_decoder", "compare", "differences", "summary", "take_turns"]
