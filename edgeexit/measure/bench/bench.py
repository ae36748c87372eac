"""`bench`: compares a bundle with the same model unsplit, on this machine.

Each side runs in its own process, with its fastest thread setting
(`edgeexit.measure.bench.paired`). Rows and texts have different cases
(`edgeexit.measure.bench.cases`) and figures (`rows`, `texts`). The result is one JSON object, with
the environment of the measurement and warnings about its quality.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from edgeexit.bundle.cautions import cautions
from edgeexit.bundle.policy import policy_for
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.measure import environment
from edgeexit.measure.bench import energy, rows, soak, texts
from edgeexit.measure.bench.cases import settings
from edgeexit.measure.bench.compare import SCHEMA
from edgeexit.measure.bench.contest import Contest, Options, Progress
from edgeexit.measure.bench.inputs import Inputs, prepare_rows, prepare_texts
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.device_state import throttled
from edgeexit.runtime.engines.onnxruntime import available_cores

MAX_OTHER_CORES = 0.10
MAX_STEAL = 0.01
"""Above these limits, a result has a warning."""

TEXT_SEARCH_S = 2.0
"""Warm-up of each thread setting in the search with texts, in seconds."""

ROW_SEARCH_S = (1.0, 5.0)
"""The same with rows: a sixth of ``--time``, but within these limits. With less than a second, the
search chose by chance, and unlike settings looked like gains of splitting."""


def bench(
    bundle: str | os.PathLike[str] | Bundle,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a bundle.

    Args:
        bundle: The bundle.
        options: Options of the measurement; None: the defaults.
        progress: Called as ``progress(what, done, of)``.

    Returns:
        The object that ``edgeexit bench --json`` prints; the documentation describes its fields.

    Raises:
        MeasurementError, UsageError: With the cause and the fix.
    """
    options = options or Options()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    options.check(opened)
    warnings = _cautions(opened, options)
    tell = progress or (lambda what, done, of: None)
    watch = environment.Watch()
    with ExitStack() as stack:
        source = energy.open_source(options.engine) if options.energy else None
        if source is not None:
            stack.callback(source.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeexit-bench-"))
        inputs = _prepare(opened, options, folder)
        sides = _Sides(opened, options, inputs, tell)
        unsplit = stack.enter_context(sides.open("unsplit"))
        chain = stack.enter_context(sides.open("chain"))
        contest = Contest(
            opened, options, inputs, unsplit, chain, sides.chosen, sides.searched, tell
        )
        result = (texts if inputs.lengths else rows).measure(contest)
        result["energy"] = None if source is None else energy.measure(contest, source)
        result["soak"] = None if options.soak_s is None else soak.measure(contest, options.soak_s)
        own_cpu_s = sides.cpu_s + unsplit.cpu_s + chain.cpu_s + sum(os.times()[:2])
        restless = [side.name for side in (unsplit, chain) if side.restless]
        engine = contest.engine
    machine = watch.stop(own_cpu_s)
    result["schema"] = SCHEMA
    result["environment"] = {
        **environment.describe(),
        "bundle": {"name": opened.manifest.name, "digest": opened.digest},
        "engine": engine,
        "machine": machine,
    }
    result["warnings"] += doubts(machine, restless)
    result["warnings"] += warnings
    if result["soak"] is not None:
        result["warnings"] += soak.doubts(result["soak"])
    return result


def _cautions(bundle: Bundle, options: Options) -> list[str]:
    """Warnings about the answers from which the figures are computed."""
    if options.policy is not None:
        batch_size = 1 if options.mode == "latency" else options.batch
        return cautions(policy_for(options.policy, bundle), bundle, batch_size=batch_size)
    if bundle.exits_untrained:
        return ["the early exits were never trained: times are valid, their answers are not"]
    return []


def _prepare(bundle: Bundle, options: Options, folder: str) -> Inputs:
    if bundle.manifest.decoding is None:
        batch = 1 if options.mode == "latency" else options.batch
        return prepare_rows(bundle, options.data, batch, folder, options.seed)
    return prepare_texts(
        bundle, options.data, options.prompt_tokens, options.new_tokens, folder, options.seed
    )


class _Sides:
    """Opens the two sides, each with its best thread setting.

    Attributes:
        chosen, searched: As in `Contest`.
        cpu_s: CPU seconds of sides that were closed after the search.
    """

    def __init__(self, bundle: Bundle, options: Options, inputs: Inputs, tell: Progress) -> None:
        self._options, self._tell = options, tell
        paths = {"bundle": str(bundle.path), "inputs": inputs.path}
        common: dict[str, Any] = paths | {"engine": options.engine}
        own: dict[str, Any] = {}
        if options.policy is not None:
            own["policy"] = os.fspath(options.policy)
        if inputs.lengths:
            common |= {"new_tokens": options.new_tokens, "capacity": inputs.capacity}
            common["ignore_eos"] = not inputs.real
            self._cases = {"unsplit": "search", "chain": "search"}
        else:
            own["launch_ahead"] = options.launch_ahead
            self._cases = {"unsplit": "unsplit", "chain": "all"}
        self._arguments = {"unsplit": common, "chain": common | own}
        self._seconds = TEXT_SEARCH_S if inputs.lengths else _within(options.seconds / 6)
        self.chosen: dict[str, str] = {}
        self.searched: dict[str, dict[str, float]] = {}
        self.cpu_s = 0.0

    def open(self, kind: str) -> Side:
        """Opens ``unsplit`` or ``chain``."""
        self._tell(f"thread settings: {kind}", 0, 0)
        threads, engine = self._options.threads, self._options.engine
        tried = settings(engine, available_cores()) if threads is None else [threads]
        opened: list[Side] = []

        def make(setting: Any) -> Side:
            arguments = self._arguments[kind] | {"threads": setting}
            opened.append(Side(f"edgeexit.measure.bench.cases:{kind}", arguments, name=kind))
            return opened[-1]

        side, best, relative = best_setting(make, self._cases[kind], tried, seconds=self._seconds)
        self.chosen[kind], self.searched[kind] = str(best), relative
        self.cpu_s += sum(other.cpu_s for other in opened if other is not side)
        return side


def _within(seconds: float) -> float:
    shortest, longest = ROW_SEARCH_S
    return min(longest, max(shortest, seconds))


def doubts(machine: dict[str, Any], restless: Sequence[str]) -> list[str]:
    """Warnings about other load on the machine."""
    warnings = []
    other, steal = machine["other_load_cores"], machine["steal_share"]
    if other is not None and other > MAX_OTHER_CORES:
        warnings.append(
            f"other processes kept {other:.2f} cores busy; close them and measure "
            "again for absolute times"
        )
    if steal is not None and steal > MAX_STEAL:
        warnings.append(f"the host gave {steal:.1%} of this machine's time to other guests")
    warnings += [f"{name}: its threads kept spinning between blocks" for name in restless]
    if (state := machine.get("state")) is not None:
        warnings += [
            f"the device was throttled meanwhile ({name}: {count} times): times are those of a hot "
            "device"
            for name, count in throttled(state["before"], state["after"]).items()
        ]
    return warnings


__all__ = ["Options", "bench", "doubts"]
