"""The process of one side of a measurement. It runs cases of a subject on request.

`main` runs in a process that `edgeexit.runtime.child` starts, and exchanges JSON lines with
`edgeexit.measure.bench.paired` over pipes. A subject is a ``module:function`` that takes keyword
arguments and returns a `Subject`. Each case of a subject runs one input. The process is idle
between requests: after a block it waits until its thread pools have stopped spinning, as far as its
own account shows, and only then answers. The parent then stops it by a signal until the next one.
"""

from __future__ import annotations

import ctypes
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
"""Warm-up ends when the medians of consecutive windows differ by at most this share, twice in a
row."""

SLOW_NS, VERY_SLOW_NS = 50_000_000, 1_000_000_000
"""Cases slower than the first have windows of two runs instead of five, and those slower than the
second of one."""

CALM_STEP_S, CALM_LIMIT_S, CALM_SHARE = 0.005, 1.0, 0.1
"""A process is calm when it used less than this share of one core during a step."""

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent dies."""


@dataclass(frozen=True)
class Case:
    """A function to time.

    Attributes:
        call: Runs input number `n`. Only this is timed.
        read: Converts the result to a small JSON record; not timed.
        enter: Called once before a block of this case.
    """

    call: Callable[[int], Any]
    read: Callable[[Any], Any] | None = None
    enter: Callable[[], None] | None = None


@dataclass
class Subject:
    """What one side of a measurement can run.

    Attributes:
        cases: Cases by name.
        inputs: Number of inputs; cases take smaller numbers.
        facts: Settings and versions.
        close: Called at the end.
    """

    cases: dict[str, Case]
    inputs: int
    facts: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] | None = None


def main() -> None:
    """Answers requests from stdin until it is closed. Output of libraries goes to stderr."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole process group; the parent ends this process
    _go_on_alone()
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


def _go_on_alone() -> None:
    """Lets this process go on, and so end, if its parent dies while it is stopped."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


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
    subject = maker(**arguments)
    assert isinstance(subject, Subject), f"{name} gives a {type(subject).__name__}, not a Subject"
    return subject


def warm_up(subject: Subject, *, case: str, seconds: float, seed: int) -> dict[str, Any]:
    """Runs a case until the median of its time settles, or for `seconds`."""
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
            if times[-1] > VERY_SLOW_NS:
                break
        runs += len(times)
        windows.append(statistics.median(times))
        if len(windows) > 1:
            close = abs(windows[-1] / windows[-2] - 1) <= SETTLED_WITHIN
            agreed = agreed + 1 if close else 0
    return {"runs": runs, "settled": agreed >= 2, "median_ms": windows[-1] / 1e6}


def run_block(
    subject: Subject, *, case: str, numbers: list[int], lead: bool = True
) -> dict[str, Any]:
    """Runs the given inputs and times each. `records` are the records of `Case.read`.

    `lead` first runs one input untimed, because the first run after a pause is slow: caches are
    cold and threads asleep.
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
    entered = subject.cases[case]
    if entered.enter is not None:
        entered.enter()
    return entered


def _calm_down() -> bool:
    """Waits until the threads of the process sleep. False if they do not within `CALM_LIMIT_S`."""
    until = time.perf_counter() + CALM_LIMIT_S
    while time.perf_counter() < until:
        before = time.process_time()
        time.sleep(CALM_STEP_S)
        if time.process_time() - before < CALM_SHARE * CALM_STEP_S:
            return True
    return False


def _cpu_s() -> float:
    return time.process_time()
