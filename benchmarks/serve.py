"""Measures what ``edgeexit serve`` adds to a request and to the tokens of a text.

    python benchmarks/serve.py --digits BUNDLE --writer BUNDLE     # five minutes

The server runs in a process of its own, as a user starts it, with one client on a connection that
stays open. The same work is done by calls in this process; both sides take turns, in blocks, and a
ratio or difference is that of neighbouring blocks. Each launch starts both sides anew.

- a row: ``POST /v1/predict`` with the inputs of one row, against reading that JSON and `Model`
- a text of one token: ``POST /v1/completions``, against `Model.generate`
- a long text: tokens per second of a stream, first token to last, against iterating over
  `Model.generate`
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import save, say, verdict

from edgeexit.measure import environment
from edgeexit.runtime import Model, Sampling, load

PROMPT = "def load(path, engine, policy=None):\n    "
KEPT = 1 << 10
"""Bytes of earlier texts: both sides keep only the last text."""

JSON_TYPE = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Amount:
    """How much is measured: blocks of short calls, calls of a block, long texts, their tokens."""

    blocks: int = 24
    calls: int = 25
    texts: int = 14
    new_tokens: int = 96


class Client:
    """One connection to a server."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"))

    def ask(self, path: str, body: bytes) -> bytes:
        """The body of an answer."""
        self._connection.request("POST", path, body, JSON_TYPE)
        answer = self._connection.getresponse()
        found = answer.read()
        assert answer.status == 200, found
        return found

    def stream(self, path: str, body: bytes) -> tuple[float, int]:
        """Seconds from a stream's first text to its last, and its number of tokens."""
        self._connection.request("POST", path, body, JSON_TYPE)
        answer = self._connection.getresponse()
        first, last, tokens = 0.0, 0.0, 0
        while line := answer.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["text"]:
                last = time.perf_counter()
                first = first or last
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
        return last - first, tokens


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Client]:
    """A server of a bundle."""
    command = [sys.executable, "-m", "edgeexit", "serve", str(bundle), "--port", "0", "--json"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line == "}\n":
                break
        yield Client(json.loads(said)["url"])
    finally:
        process.terminate()
        process.wait()


Figures = list[float]
Side = Callable[[], Figures]


def in_turns(sides: dict[str, Side], blocks: int) -> dict[str, list[Figures]]:
    """The figures of each block; the sides take turns, in an order that changes."""
    for side in sides.values():
        side()
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    for number in range(blocks):
        names = list(sides) if number % 2 else list(reversed(sides))
        for name in names:
            found[name].append(sides[name]())
    return found


def per_call(call: Callable[[], object], calls: int) -> Side:
    """Milliseconds of each call of a block."""

    def block() -> Figures:
        times = []
        for _ in range(calls):
            started = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - started))
        return times

    return block


def compared(found: dict[str, list[Figures]], *, ratio: bool) -> dict[str, Any]:
    """What the server adds (ms), or leaves (ratio): the median over pairs of blocks, its quartiles,
    and the same of each side's best figure, which other programs on the machine disturb least."""
    blocks = {side: [statistics.median(own) for own in every] for side, every in found.items()}
    most = max if ratio else min
    best = {side: most(itertools.chain(*every)) for side, every in found.items()}
    pairs = zip(blocks["serve"], blocks["direct"], strict=True)
    each = [s / d if ratio else s - d for s, d in pairs]
    of_best = best["serve"] / best["direct"] if ratio else best["serve"] - best["direct"]
    name = "ratio" if ratio else "added_ms"
    medians = {side: round(statistics.median(own), 4) for side, own in blocks.items()}
    return {
        **medians,
        name: round(statistics.median(each), 4),
        "quartiles": [round(float(q), 4) for q in np.percentile(each, [25, 75])],
        f"{name}_of_best": round(of_best, 4),
        "best": {side: round(value, 4) for side, value in best.items()},
        "blocks": len(each),
    }


def measure_rows(bundle: Path, threads: Any, amount: Amount) -> dict[str, Any]:
    """One row."""
    with load(bundle, threads=threads) as model, serving(bundle, "--threads", threads) as client:
        samples = np.load(model.bundle.file("samples/reference.npz"))
        row = {t.name: samples[f"input/{t.name}"][:1] for t in model.bundle.manifest.inputs}
        given = {name: value.tolist() for name, value in row.items()}
        body = json.dumps({"inputs": given}).encode()
        sides = {
            "direct": per_call(lambda: model(row), amount.calls),
            "serve": per_call(lambda: client.ask("/v1/predict", body), amount.calls),
        }
        return compared(in_turns(sides, amount.blocks), ratio=False)


def measure_short(model: Model, client: Client, amount: Amount) -> dict[str, Any]:
    """A text of one token, most of whose prompt is known."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1, "temperature": 0}).encode()
    likeliest = Sampling()
    sides = {
        "direct": per_call(
            lambda: model.generate(PROMPT, max_new_tokens=1, sampling=likeliest).finish(),
            amount.calls,
        ),
        "serve": per_call(lambda: client.ask("/v1/completions", body), amount.calls),
    }
    return compared(in_turns(sides, amount.blocks), ratio=False)


def measure_stream(model: Model, client: Client, amount: Amount) -> dict[str, Any]:
    """Tokens per second of a text that streams."""
    most = amount.new_tokens
    asked = {"prompt": PROMPT, "max_tokens": most, "temperature": 0, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()

    def direct() -> Figures:
        first, last, tokens = 0.0, 0.0, 0
        for piece in model.generate(PROMPT, max_new_tokens=most, sampling=Sampling()):
            tokens += len(piece.tokens)
            if piece.text:
                last = time.perf_counter()
                first = first or last
        return [(tokens - 1) / (last - first)]

    def served() -> Figures:
        seconds, tokens = client.stream("/v1/completions", body)
        return [(tokens - 1) / seconds]

    return compared(in_turns({"direct": direct, "serve": served}, amount.texts), ratio=True)


def measure_texts(bundle: Path, threads: Any, amount: Amount) -> dict[str, Any]:
    """Short and long texts."""
    options = ("--threads", threads, "--prefix-memory", "1KiB")  # KEPT
    with load(bundle, threads=threads) as model, serving(bundle, *options) as client:
        model.prefixes.limit_bytes = KEPT
        return {
            "short": measure_short(model, client, amount),
            "stream": measure_stream(model, client, amount),
        }


def main() -> None:
    """Measures every case and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--digits", type=Path, required=True, help="a bundle of examples/digits")
    parser.add_argument("--writer", type=Path, required=True, help="a bundle of examples/codelm")
    parser.add_argument("--larger", type=Path, help="a bundle of a larger language model")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--threads", default="process", help="of both sides, as for edgeexit run")
    parser.add_argument("--quick", action="store_true", help="few calls: to see that it runs")
    options = parser.parse_args()
    amount = Amount(2, 3, 2, 24) if options.quick else Amount()
    watch = environment.Watch()
    launches = []
    for number in range(1 if options.quick else options.launches):
        found = {"row": measure_rows(options.digits, options.threads, amount)}
        found |= measure_texts(options.writer, options.threads, amount)
        if options.larger is not None:
            larger = measure_texts(options.larger, options.threads, amount)
            found |= {f"{name}_larger": case for name, case in larger.items()}
        launches.append(found)
        say(f"launch {number + 1}: {json.dumps(found)}")
    cases = [("row", "added_ms"), ("short", "added_ms"), ("stream", "ratio")]
    if options.larger is not None:
        cases += [("short_larger", "added_ms"), ("stream_larger", "ratio")]
    names = [(f"{case}_{name}", case, name) for case, name in cases]
    names += [(f"{case}_{name}_of_best", case, f"{name}_of_best") for case, name in cases]
    median = {
        key: statistics.median(launch[case][name] for launch in launches)
        for key, case, name in names
    }
    goals = {"added_ms": ("<=", 2.0, 1.0), "ratio": (">=", 0.97, 0.99)}
    figures = [(f"{case} {name}", median[f"{case}_{name}"], *goals[name]) for case, name in cases]
    result = {
        "threads": options.threads,
        "new_tokens": amount.new_tokens,
        "median": median,
        "verdict": verdict(figures),
        "launches": launches,
        "environment": environment.describe() | {"machine": watch.stop(0.0)},
    }
    save("serve", result, quick=options.quick)


if __name__ == "__main__":
    main()
