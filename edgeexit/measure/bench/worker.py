"""One side of a measurement: a process of its own that runs cases of a subject when it is told to.

`main`, in a process that `edgeexit.runtime.child` starts, speaks JSON lines over its pipes;
`edgeexit.measure.bench.paired` is the other end. A subject is ``module:function``: called with
keyword arguments, it gives a `Subject`, whose cases each run one input. Between two orders the
process sleeps, and it says so: after a block it waits until its own thread pools have stopped
spinning before it answers.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgeexit.errors import EdgeExitError, UsageError

SETTLED_WITHIN = 0.05
"""Warm-up ends when the median of a window is that close to the one before, twice in a row."""

SLOW_NS = 50_000_000
"""Windows of slower cases are shorter: two runs for five."""

CALM_STEP_S, CALM_LIMIT_S, CALM_SHARE = 0.005, 1.0, 0.1
"""A process is calm when it used less than that share of one core during one step."""


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        call: Runs input number `n`; the only thing inside the clock.
        read: What to remember of its result, outside the clock: small and JSON.
        enter: Called once before a block of this case.
    """

    call: Callable[[int], Any]
    read: Callable[[Any], Any] | None = None
    enter: Callable[[], None] | None = None


@dataclass
class Subject:
    """What one side of a measurement can run.

    Attributes:
        cases: By name.
        inputs: How many inputs there are; cases take numbers below that.
        facts: What is known of it beforehand: settings, versions.
        close: Called at the end.
    """

    cases: dict[str, Case]
    inputs: int
    facts: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] | None = None


def main() -> None:
    """Answers orders from standard input until it ends. Whatever libraries print goes to stderr."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends us
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    subject: Subject | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "start":
                started = time.perf_counter()
                subject = make_subject(order["subject"], order["folder"], order["arguments"])
                answer = {
                    "cases": list(subject.cases),
                    "inputs": subject.inputs,
                    "facts": subject.facts,
                    "start_s": time.perf_counter() - started,
                }
            else:
                assert subject is not None, "the first order is start"
                answer = ORDERS[order.pop("do")](subject, **order)
            answer |= {"calm": _calm_down(), "cpu_s": _cpu_s()}
        except EdgeExitError as error:
            answer = {"error": error.what, "fix": error.fix}
        except Exception:
            answer = {"bug": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
    if subject is not None and subject.close is not None:
        subject.close()


def make_subject(name: str, folder: str | None, arguments: dict[str, Any]) -> Subject:
    """Imports ``module:function``, from `folder` where given, and calls it."""
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    module, _, function = name.partition(":")
    try:
        maker = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"subject {name}: cannot be imported ({error})", fix="Give module:function."
        ) from error
    made = maker(**arguments)
    assert isinstance(made, Subject), f"{name} gives a {type(made).__name__}, not a Subject"
    return made


def warm_up(subject: Subject, *, case: str, seconds: float, seed: int) -> dict[str, Any]:
    """Runs a case until its running median settles, or for `seconds`."""
    call = _enter(subject, case).call
    order = random.Random(seed)
    windows: list[float] = []
    until = time.perf_counter() + seconds
    runs = agreed = 0
    while agreed < 2 and (len(windows) < 3 or time.perf_counter() < until):
        times = []
        for _ in range(5 if not windows or windows[-1] < SLOW_NS else 2):
            number = order.randrange(subject.inputs)
            started = time.perf_counter_ns()
            call(number)
            times.append(time.perf_counter_ns() - started)
        runs += len(times)
        windows.append(statistics.median(times))
        if len(windows) > 1:
            close = abs(windows[-1] / windows[-2] - 1) <= SETTLED_WITHIN
            agreed = agreed + 1 if close else 0
    return {"runs": runs, "settled": agreed >= 2, "median_ms": windows[-1] / 1e6}


def run_block(
    subject: Subject, *, case: str, numbers: list[int], lead: bool = True
) -> dict[str, Any]:
    """Runs the given inputs, timing each; `records` are what the case reads from its results.

    `lead` runs one untimed first: after a pause it pays for cold caches and sleeping threads.
    """
    entered = _enter(subject, case)
    call, read = entered.call, entered.read
    times, results = [], []
    if lead:
        call(numbers[0])
    for number in numbers:
        started = time.perf_counter_ns()
        result = call(number)
        times.append(time.perf_counter_ns() - started)
        if read is not None:
            results.append(read(result))
    return {"times_ms": [time_ns / 1e6 for time_ns in times], "records": results}


ORDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "warm_up": warm_up,
    "run": run_block,
}


def _enter(subject: Subject, case: str) -> Case:
    found = subject.cases[case]
    if found.enter is not None:
        found.enter()
    return found


def _calm_down() -> bool:
    """Waits until the process's threads sleep. False when they have not after `CALM_LIMIT_S`."""
    until = time.perf_counter() + CALM_LIMIT_S
    while time.perf_counter() < until:
        before = time.process_time()
        time.sleep(CALM_STEP_S)
        if time.process_time() - before < CALM_SHARE * CALM_STEP_S:
            return True
    return False


def _cpu_s() -> float:
    return time.process_time()
