"""What `bench` measures: a bundle's chain, and the same model unsplit, as subjects of a worker.

Both take their inputs from one file (`write_inputs`), hold them in memory, and are called as a
user calls them: `Model.__call__` with numpy arrays, answers copied out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit import runtime
from edgeexit.bundle.policy import ALWAYS, OUT_OF_REACH, Policy, forced
from edgeexit.measure.bench.worker import Case, Subject
from edgeexit.runtime.executor.launch_ahead import LaunchAhead
from edgeexit.runtime.load import Threads
from edgeexit.runtime.programs.forward import Model, Result

Inputs = Mapping[str, NDArray]


def write_inputs(path: Path, inputs: Sequence[Inputs]) -> None:
    """Writes inputs (each a whole batch, shapes may differ) where workers read them."""
    arrays = {f"{number}/{name}": a for number, one in enumerate(inputs) for name, a in one.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_inputs(path: str | Path) -> list[dict[str, NDArray]]:
    """Reads what `write_inputs` wrote, in the same order."""
    found: dict[int, dict[str, NDArray]] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            number, _, name = key.partition("/")
            found.setdefault(int(number), {})[name] = file[key]
    return [found[number] for number in sorted(found)]


def unsplit(
    bundle: str, inputs: str, engine: str = "cpu", threads: Threads = "blocking"
) -> Subject:
    """The model as one graph without exits. Its one case is ``unsplit``."""
    return subject_of_unsplit(runtime.load_unsplit(bundle, engine, threads=threads), inputs)


def subject_of_unsplit(model: Model, inputs: str) -> Subject:
    """A subject with the one case ``unsplit`` from a loaded model."""
    rows = read_inputs(inputs)
    case = Case(call=lambda number: model(rows[number]), read=read_answers)
    return Subject({"unsplit": case}, len(rows), model.describe_engine(), model.close)


def chain(
    bundle: str,
    inputs: str,
    engine: str = "cpu",
    threads: Threads = "blocking",
    policy: str | None = None,
    all_scores: bool = False,
    launch_ahead: LaunchAhead = "never",
) -> Subject:
    """The chain of segments, opened with the policy's score or with every one.

    Cases: ``all``: every exit's score consulted, none fires; ``path:EXIT``: the exits before EXIT
    consulted, EXIT fires, as a row on its way; ``forced:EXIT``: only EXIT consulted; ``natural``:
    the policy decides; ``segments``: as ``all``, and the result is each segment's time; ``gpu``, on
    one: as ``natural``, and the result is what the call asked of it (`gpu_facts`).
    """
    model = runtime.load(
        bundle,
        engine,
        threads=threads,
        policy=policy,
        all_scores=all_scores,
        launch_ahead=launch_ahead,
    )
    given = model.policy
    rows = read_inputs(inputs)
    score = given.score
    names = [leave.name for leave in model.exits]

    def case(policy: Policy) -> Case:
        return policy_case(model, rows, policy)

    cases = {"all": case(Policy(thresholds=OUT_OF_REACH, score=score)), "natural": case(given)}
    for place, name in enumerate(names):
        cases[f"path:{name}"] = case(msgspec.structs.replace(on_its_way(names, place), score=score))
        alone = msgspec.structs.replace(forced(model.exits, name), score=score)
        cases[f"forced:{name}"] = case(alone)
    cases["segments"] = Case(
        call=lambda number: model(rows[number], timed=True),
        read=lambda result: result.times_ms,
        enter=cases["all"].enter,
    )
    if model.device_counts is not None:
        cases["gpu"] = Case(
            call=lambda number: gpu_facts(model, rows[number]),
            read=lambda found: found,
            enter=cases["natural"].enter,
        )
    facts = {**model.describe_engine(), "score": score, "thresholds": str(given.thresholds)}
    return Subject(cases, len(rows), facts, model.close)


def gpu_facts(model: Model, inputs: Inputs) -> dict[str, Any]:
    """What one warm call asks of the GPU: allocations, and bytes that cross or move there; and what
    is known of the gaps between segments (`Model.boundaries`)."""
    counts = model.device_counts
    assert counts is not None
    before = dataclasses.asdict(counts)
    model(inputs)
    after = dataclasses.asdict(counts)
    return {
        "a_call": {name: after[name] - before[name] for name in after},
        "boundaries": model.boundaries,
    }


def on_its_way(names: Sequence[str], place: int) -> Policy:
    """The policy under which every exit before `place` is consulted in vain, and that one fires."""
    if place == len(names) - 1:
        return Policy(thresholds=OUT_OF_REACH)
    stops = dict.fromkeys(names[:place], OUT_OF_REACH) | {names[place]: ALWAYS}
    return Policy(thresholds=stops, last=names[place])


def read_answers(result: Result) -> dict[str, list[int] | None]:
    """Exit index and predicted label of every row of a result."""
    logits = result.outputs.get("logits")
    labels = None if logits is None else [int(label) for label in logits.argmax(-1)]
    return {"exits": [int(number) for number in result.exits], "labels": labels}


def policy_case(model: Model, rows: Sequence[Inputs], policy: Policy) -> Case:
    """A model called under a policy."""

    def enter() -> None:
        model.policy = policy

    def call(number: int) -> Result:
        return model(rows[number])

    return Case(call=call, read=read_answers, enter=enter)


def settings(engine: str, cores: int) -> list[Any]:
    """Thread settings worth trying for an engine: on GPUs the host's threads only wait.

    >>> settings("cpu", 4), settings("tensorrt", 4)
    (['blocking', 'process', 'spinning', 1, 2], ['spinning', 'blocking'])
    """
    if engine != "cpu":
        return ["spinning", "blocking"]
    counts = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    return ["blocking", "process", "spinning", *counts]


__all__ = [
    "chain",
    "gpu_facts",
    "on_its_way",
    "policy_case",
    "read_answers",
    "read_inputs",
    "settings",
    "subject_of_unsplit",
    "unsplit",
    "write_inputs",
]
