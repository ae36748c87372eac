"""What is measured of a decoder: its modes, and the same model unsplit, as subjects of a worker.

A case continues one prompt. What counts is not the worker's clock but what the generation says of
itself: seconds to the first token, seconds for the others, and how many they were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from edgeexit import runtime
from edgeexit.measure.bench.cases import read_inputs
from edgeexit.measure.bench.worker import Case, Subject
from edgeexit.runtime.load import Threads
from edgeexit.runtime.programs.arguments import ModeName
from edgeexit.runtime.programs.generate import Generation


def modes(
    bundle: str,
    prompts: str,
    new_tokens: int,
    engine: str = "cpu",
    threads: Threads = "blocking",
    policy: str | None = None,
    capacity: int | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
) -> Subject:
    """The chain of segments. Cases: its modes by name, and those of `settings`: name ->
    arguments of `Decoder.generate`, with ``thresholds`` in place of the policy's if they are given.
    """
    model = runtime.load_decoder(bundle, engine, policy=policy, threads=threads, capacity=capacity)
    wanted: dict[str, dict[str, Any]] = {mode: {"mode": mode} for mode in get_args(ModeName)}
    return _subject(model, prompts, new_tokens, wanted | (settings or {}))


def unsplit(
    bundle: str,
    prompts: str,
    new_tokens: int,
    engine: str = "cpu",
    threads: Threads = "blocking",
    capacity: int | None = None,
) -> Subject:
    """The model as one graph without exits, with the same operators and caches: ``unsplit``."""
    model = runtime.load_decoder(bundle, engine, threads=threads, capacity=capacity, unsplit=True)
    return _subject(model, prompts, new_tokens, {"unsplit": {}})


def _subject(
    model: runtime.Decoder, prompts: str, new_tokens: int, settings: dict[str, dict[str, Any]]
) -> Subject:
    rows = [list(map(int, row["tokens"])) for row in read_inputs(Path(prompts))]
    given = model.policy

    def case(arguments: dict[str, Any]) -> Case:
        arguments = dict(arguments)
        thresholds = arguments.pop("thresholds", None)

        def enter() -> None:
            model.policy = (
                given
                if thresholds is None
                else runtime.Policy(thresholds=thresholds, score=given.score)
            )

        def call(number: int) -> Generation:
            return model.generate(
                rows[number], max_new_tokens=new_tokens, text=False, **arguments
            ).finish()

        return Case(call, read_generation, enter)

    cases = {name: case(arguments) for name, arguments in settings.items()}
    return Subject(cases, len(rows), model.describe_engine(), model.close)


def read_generation(generation: Generation) -> dict[str, Any]:
    """What one prompt's continuation took: ``first_token_s``, ``decode_s`` for the tokens behind
    the first, the ``tokens`` themselves, and the statistics."""
    counts = generation.statistics
    return {
        "first_token_s": generation.first_token_s,
        "decode_s": generation.decode_s,
        "tokens": generation.tokens[0],
        "exits": counts.exits,
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "tested": counts.tested,
        "catch_ups": counts.catch_ups,
        "audited": counts.audited,
        "agreed": counts.agreed,
    }


__all__ = ["modes", "read_generation", "unsplit"]
