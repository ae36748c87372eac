"""Compares the speed of two or more sides, each in its own process, in alternating blocks.

A machine's speed changes from second to second, so only times that are close together are compared.
`alternate` runs a block of the baseline and a block of a candidate over the same inputs, one right
after the other; the order alternates from round to round. Figures are computed from the ratios of
such pairs. The waiting side is idle (`edgeexit.measure.bench.worker`), and stopped by a signal:
threads of a pool that spin for a while would take cores from the side that is measured.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from edgeexit.errors import MeasurementError
from edgeexit.runtime.child import child_command

WARM_UP_S = 5.0
SEARCH_ROUNDS, DUEL_S = 5, 5.0
"""Most rounds in which two thread settings are compared, and the time after which none begins."""

MIN_BLOCK_RUNS = 3
MIN_ROUNDS = 5
SLOW_MS, VERY_SLOW_MS = 50.0, 1000.0
END_S = 2.0
"""Time that a process has to end by itself, before it is killed."""

ANSWER_S = 900.0
"""A process that does not answer within this time hangs: blocks last milliseconds, loading minutes
at most."""

OVERTIME = 3.0
"""Rounds end after this many times the asked duration, if inputs are slower than in the warm-up."""

LEAD_MS = 500.0
"""Cases slower than this run no untimed input before a block: the wake-up time is negligible."""

MIN_RUNS = 20
"""Fewest runs of a case: fewer do not support a median (n (1 - p) >= 10)."""


class Side:
    """A subject in its own process. As a context manager, it ends the process on exit.

    Args:
        subject: ``module:function`` that returns the `edgeexit.measure.bench.worker.Subject`.
        arguments: Its keyword arguments; JSON values.
        folder: Folder that is put first on the process's import path.
        name: Name for messages.
        answer_s: Longest time for an answer, in seconds.
    """

    def __init__(
        self,
        subject: str,
        arguments: dict[str, Any],
        *,
        folder: str | None = None,
        name: str = "",
        answer_s: float = ANSWER_S,
    ) -> None:
        self.name = name or subject
        self._answer_s = answer_s
        self.cpu_s = 0.0
        self.restless = 0
        command, place = self._command()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place
        )
        try:
            started = self._ask(do="start", subject=subject, arguments=arguments, folder=folder)
        except BaseException:
            self.close()
            raise
        self.cases: list[str] = started["cases"]
        self.inputs: int = started["inputs"]
        self.facts: dict[str, Any] = started["facts"]
        self.start_s: float = started["start_s"]

    def warm_up(self, case: str, *, seconds: float = WARM_UP_S, seed: int = 0) -> dict[str, Any]:
        """Runs a case until its median settles: ``{"runs", "settled", "median_ms"}``."""
        return self._ask(do="warm_up", case=case, seconds=seconds, seed=seed)

    def run(self, case: str, numbers: Sequence[int], *, lead: bool = True) -> dict[str, Any]:
        """Runs the given inputs (`lead`: one untimed first): ``{"times_ms": [...], "records":
        [...]}``."""
        return self._ask(do="run", case=case, numbers=list(numbers), lead=lead)

    def close(self) -> None:
        """Ends the process."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        self._send(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        self._end()
        process.stdout.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self) -> int:
        """Waits for the process to end, and kills it if it does not. Returns its status."""
        try:
            return self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _command(self) -> tuple[list[str], str | None]:
        """The command that starts the worker, and its working folder; None: the current folder."""
        return child_command("edgeexit.measure.bench.worker"), None

    def _send(self, number: int) -> None:
        """Stops the process between its turns, or lets it go on."""
        self._process.send_signal(number)

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        hangs = threading.Timer(self._answer_s, self._process.kill)
        hangs.daemon = True
        hangs.start()
        started = time.monotonic()
        self._send(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            hangs.cancel()
        if not line and time.monotonic() - started >= self._answer_s:
            raise MeasurementError(
                f"{self.name}: its process did not answer within {self._answer_s:g} s during "
                f"{order['do']}, and was killed",
                fix="Run it again; if it hangs again, try another thread setting (--threads 1), "
                "and please report it.",
            )
        if not line:
            status = self._end()
            raise MeasurementError(
                f"{self.name}: its process ended with status {status} during {order['do']}",
                fix="If it was killed (-9), memory ran out: close other programs or use "
                "a smaller batch.",
            )
        self._send(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MeasurementError(f"{self.name}: {answer['error']}", fix=answer["fix"])
        if "bug" in answer:
            raise RuntimeError(f"{self.name} failed:\n{answer['bug']}")
        self.cpu_s = answer.pop("cpu_s")
        self.restless += not answer.pop("calm")
        return answer


@dataclass
class Lane:
    """A case of a side, with its name and its measurements.

    Attributes:
        times_ms: Time of every timed run.
        ratios: Per block, median time ÷ the baseline's median over the same inputs.
        mean_ratios: Per block, the same with means.
        relative: Every run's time ÷ the median of the paired block of the baseline.
        numbers: Input number of every run; `records` holds the records of `Case.read`.
    """

    name: str
    side: Side
    case: str
    times_ms: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    mean_ratios: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    settled: bool = True
    expected_ms: float = 0.0

    def add(self, numbers: Sequence[int], block: dict[str, Any]) -> None:
        """Adds a block."""
        self.times_ms += block["times_ms"]
        self.numbers += numbers
        self.records += block["records"]


def warm(lanes: Sequence[Lane], *, seconds: float = WARM_UP_S) -> None:
    """Warms up every lane until its time settles."""
    for lane in lanes:
        result = lane.side.warm_up(lane.case, seconds=seconds)
        lane.settled, lane.expected_ms = result["settled"], result["median_ms"]


def alternate(
    baseline: Lane,
    lanes: Sequence[Lane],
    *,
    seconds: float,
    block_ms: float = 60.0,
    min_block_runs: int = MIN_BLOCK_RUNS,
    min_runs: int = MIN_RUNS,
    seed: int = 0,
    whole: Lane | None = None,
    tick: Callable[[float], None] | None = None,
) -> int:
    """Runs rounds of paired blocks for about `seconds` and fills the lanes.

    Args:
        baseline: The lane that every other lane is paired with; it gets the times of all its
            blocks.
        lanes: The other lanes, warmed up.
        seconds: Duration. There are at least `min_runs` runs of every lane and `MIN_ROUNDS`
            rounds; other rounds end at `OVERTIME` times the duration.
        block_ms: Length of a block; a block has at least `min_block_runs` runs.
        seed: Seed of the random order of inputs.
        whole: A lane that runs every input once before it repeats any.
        tick: Called with the finished share (0 to 1).

    Returns:
        The number of rounds.
    """
    runs = {
        lane.name: max(min_block_runs, round(block_ms / max(lane.expected_ms, 1e-3)))
        for lane in lanes
    }
    runs = {name: min(count, 200) for name, count in runs.items()}
    round_ms = sum(
        runs[lane.name] * (lane.expected_ms + baseline.expected_ms) for lane in lanes
    ) + 12.0 * len(lanes)
    needed = max(-(-min_runs // min(runs.values())), MIN_ROUNDS)
    rounds = max(needed, int(seconds * 1000 / max(round_ms, 1e-3)))
    order = random.Random(seed)
    inputs = baseline.side.inputs
    shared: list[int] = []
    own: list[int] = []
    until = time.monotonic() + OVERTIME * seconds
    for done in range(rounds):
        if done >= needed and time.monotonic() > until:
            rounds = done
            break
        for lane in lanes:
            numbers: list[int] = []
            deck = own if lane is whole else shared
            for _ in range(runs[lane.name]):
                if not deck:
                    deck += order.sample(range(inputs), inputs)
                numbers.append(deck.pop())
            _run_pair(lane, baseline, numbers, first=lane if done % 2 else baseline)
        if tick is not None:
            tick((done + 1) / rounds)
    return rounds


def _run_pair(lane: Lane, baseline: Lane, numbers: list[int], *, first: Lane) -> None:
    """Runs a block of a lane and one of the baseline over the same inputs."""
    blocks = {
        own.name: own.side.run(own.case, numbers, lead=own.expected_ms < LEAD_MS)
        for own in ([lane, baseline] if first is lane else [baseline, lane])
    }
    lane.add(numbers, blocks[lane.name])
    baseline.add(numbers, blocks[baseline.name])
    ours, theirs = blocks[lane.name]["times_ms"], blocks[baseline.name]["times_ms"]
    reference = statistics.median(theirs)
    lane.ratios.append(statistics.median(ours) / reference)
    lane.relative += [time_ms / reference for time_ms in ours]
    lane.mean_ratios.append(statistics.fmean(ours) / statistics.fmean(theirs))


def best_setting(
    make: Callable[[Any], Side], case: str, settings: Sequence[Any], *, seconds: float = WARM_UP_S
) -> tuple[Side, Any, dict[str, float]]:
    """Finds the thread setting with which a case is fastest. The best setting so far is compared
    with every other.

    Settings are compared by mean time: thread pools that sometimes conflict have a good median but
    a bad mean. At most two sides are open; the slower is closed.

    Returns:
        The fastest side, its setting, and every setting's time relative to the first setting.
    """
    champion, best = make(settings[0]), settings[0]
    relative = {str(settings[0]): 1.0}
    try:
        for setting in settings[1:]:
            challenger = make(setting)
            loser = challenger
            try:
                pair = Lane("champion", champion, case), Lane("challenger", challenger, case)
                warm(pair, seconds=seconds)
                if pair[1].expected_ms > 2 * pair[0].expected_ms:
                    ratio = pair[1].expected_ms / pair[0].expected_ms
                else:
                    ratio = _duel(*pair)
                relative[str(setting)] = ratio * relative[str(best)]
                if ratio < 1:
                    champion, loser, best = challenger, champion, setting
            finally:
                loser.close()
    except BaseException:
        champion.close()
        raise
    return champion, best, {name: round(value, 4) for name, value in relative.items()}


def _duel(champion: Lane, challenger: Lane) -> float:
    """Ratio of mean times, challenger to champion: median of alternating blocks."""
    lead = champion.expected_ms < VERY_SLOW_MS
    count = max(MIN_BLOCK_RUNS, min(200, round(60.0 / champion.expected_ms))) if lead else 1
    order = random.Random(0)
    until = time.monotonic() + DUEL_S
    for done in range(SEARCH_ROUNDS if champion.expected_ms < SLOW_MS else 3):
        if done and time.monotonic() > until:
            break
        numbers = [order.randrange(champion.side.inputs) for _ in range(count)]
        pair = [champion, challenger] if done % 2 else [challenger, champion]
        times = {
            lane.name: lane.side.run(lane.case, numbers, lead=lead)["times_ms"] for lane in pair
        }
        challenger.ratios.append(
            statistics.fmean(times["challenger"]) / statistics.fmean(times["champion"])
        )
    return statistics.median(challenger.ratios)


def percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    """The percentiles that the number of runs supports: those with n (1 - p) >= 10.

    >>> percentiles([float(n) for n in range(1, 101)])
    {'p50': 50.5, 'p90': 90.1}
    """
    ordered = sorted(times_ms)
    values = {}
    for percent in (50, 90, 95, 99, 99.9):
        if round(len(ordered) * (100 - percent), 6) >= 1000:
            place = percent / 100 * (len(ordered) - 1)
            low = int(place)
            high = min(low + 1, len(ordered) - 1)
            value = ordered[low] + (place - low) * (ordered[high] - ordered[low])
            values[f"p{percent:g}"] = round(value, 4)
    return values


def middle_mean(values: Sequence[float]) -> float:
    """Mean of the middle half: robust against outliers, and less affected by skew than a median.

    >>> middle_mean([1.0, 2.0, 3.0, 100.0])
    2.5
    """
    ordered = sorted(values)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def spread(ratios: Sequence[float]) -> float:
    """Interquartile range of ratios, relative to their median."""
    if len(ratios) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (high - low) / middle
