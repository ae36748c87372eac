"""The subjects that `bench` measures: a bundle's chains, and the same model unsplit.

Both read their inputs from one file (`write_inputs`), keep them in memory, and use the public API:
`Model.__call__` with numpy arrays, which returns copies; for language models `Model.generate`,
whose own times are used instead of the worker's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit import runtime
from edgeexit.bundle.policy import ALWAYS, OUT_OF_REACH, Policy, Rule, drops_of, forced
from edgeexit.measure.bench.vision_cases import vision_settings
from edgeexit.measure.bench.worker import Case, Subject
from edgeexit.measure.given_text import GivenText, on_given_texts
from edgeexit.measure.probe import times_to_exits
from edgeexit.runtime import Generation, Model, Result, Sampling
from edgeexit.runtime.engines.base import Threads
from edgeexit.runtime.executor.launch_ahead import LaunchAhead
from edgeexit.runtime.memory import peak_bytes, resident_bytes
from edgeexit.runtime.programs.arguments import ModeName

Inputs = Mapping[str, NDArray]

BY_POLICY = "full+policy"
"""The case of texts in which the policy decides once per prompt only."""
NEW_TOKENS, SEARCH_TOKENS = 64, 32
"""New tokens per prompt: the default, and in the search for thread settings."""


def write_inputs(path: Path, inputs: Sequence[Inputs]) -> None:
    """Writes inputs (each a whole batch, or a prompt; shapes may differ) to a file for workers."""
    arrays = {f"{number}/{name}": a for number, own in enumerate(inputs) for name, a in own.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_inputs(path: str | Path) -> list[dict[str, NDArray]]:
    """Reads the file of `write_inputs`, in the same order."""
    inputs: dict[int, dict[str, NDArray]] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            number, _, name = key.partition("/")
            inputs.setdefault(int(number), {})[name] = file[key]
    return [inputs[number] for number in sorted(inputs)]


def unsplit(
    bundle: str,
    inputs: str,
    engine: str = "cpu",
    threads: Threads = "brief",
    new_tokens: int = NEW_TOKENS,
    capacity: int | None = None,
    ignore_eos: bool = False,
) -> Subject:
    """The model as one graph per chain, without exits. Its case is ``unsplit``; language models
    also have ``search``, with few tokens.

    Args:
        new_tokens, capacity: Language models: new tokens per prompt, and the capacity.
        ignore_eos: Language models: no token ends a text.
    """
    model = runtime.load(bundle, engine, threads=threads, capacity=capacity, unsplit=True)
    model.features.limit_bytes = 0  # a known image would not run
    return subject_of_unsplit(model, inputs, new_tokens, ignore_eos=ignore_eos)


def subject_of_unsplit(
    model: Model, inputs: str, new_tokens: int = NEW_TOKENS, *, ignore_eos: bool = False
) -> Subject:
    """`unsplit` from a loaded model."""
    rows = read_inputs(inputs)
    if model.writes:
        cases = _text_cases(model, rows, new_tokens, {"unsplit": {"ignore_eos": ignore_eos}})
    else:
        cases = {"unsplit": Case(call=lambda number: model(rows[number]), read=read_answers)}
    return Subject(cases, len(rows), model.describe_engine(), model.close)


def chain(
    bundle: str,
    inputs: str,
    engine: str = "cpu",
    threads: Threads = "brief",
    policy: str | None = None,
    all_scores: bool = False,
    launch_ahead: LaunchAhead = "never",
    new_tokens: int = NEW_TOKENS,
    capacity: int | None = None,
    ignore_eos: bool = False,
    settings: dict[str, dict[str, Any]] | None = None,
) -> Subject:
    """The model split at its exits, opened with the policy's scores or with every score.

    Cases of rows:

    - ``all``: every exit's score is evaluated, no row stops early.
    - ``path:EXIT``: the scores up to EXIT are evaluated, every row stops at EXIT.
    - ``forced:EXIT``: only EXIT is evaluated, every row stops there.
    - ``natural``: the policy decides.
    - ``segments``: as ``all``; the record is the time of each segment.
    - ``gpu`` (GPUs only): as ``natural``; the record is `gpu_facts`.

    All except ``natural`` and ``gpu`` apply to the chain that gives the answers; earlier chains use
    their last exit.

    Cases of texts: the modes by name, of which only ``fast`` and ``approximate`` follow the policy;
    `BY_POLICY`: as ``full``, with what the policy decides once per prompt; ``search``: as ``full``,
    with few tokens; ``given text``: the policy evaluated on all prompts as given texts. This opens
    every score, so it must run after timed cases.

    Args:
        new_tokens, capacity, ignore_eos: As for `unsplit`.
        settings: Further cases of texts: name -> arguments of `Model.generate`, and optionally
            ``thresholds`` that replace the policy's.
    """
    model = runtime.load(
        bundle,
        engine,
        threads=threads,
        policy=policy,
        all_scores=all_scores,
        launch_ahead=launch_ahead,
        capacity=capacity,
    )
    model.features.limit_bytes = 0  # a known image would not run
    rows = read_inputs(inputs)
    facts = model.describe_engine()
    if model.writes:
        modes: dict[str, dict[str, Any]] = {mode: {"mode": mode} for mode in get_args(ModeName)}
        plain = _once_per_prompt_never(model)
        for name in ("full", "exact"):
            modes[name]["rules"] = plain
        modes[BY_POLICY] = {"mode": "full"}
        for name, own in vision_settings(model.bundle.manifest).items():
            modes[name] = {"rules": plain | own["rules"]}
        ends: dict[str, Any] = {"ignore_eos": ignore_eos}
        every = {name: ends | own for name, own in (modes | (settings or {})).items()}
        cases = _text_cases(model, rows, new_tokens, every)
    else:
        cases = _row_cases(model, rows)
        rule = model.policy.rules.get(model.chain_name, Rule())
        facts |= {"score": rule.score, "thresholds": str(rule.thresholds)}
    return Subject(cases, len(rows), facts, model.close)


def _once_per_prompt_never(model: Model) -> dict[str, Rule]:
    """The policy's rules without those that apply once per prompt: exits of earlier chains, and
    gates."""
    rules = {name: Rule() for name in model.chains}
    own, drops = model.policy.rules.get(model.chain_name, Rule()), drops_of(model.chain)
    if isinstance(own.thresholds, dict):
        left = {name: value for name, value in own.thresholds.items() if name not in drops}
        own = msgspec.structs.replace(own, thresholds=left)
    return rules | {model.chain_name: own}


def _row_cases(model: Model, rows: Sequence[Inputs]) -> dict[str, Case]:
    given, name = model.policy, model.chain_name
    score = given.rules.get(name, Rule()).score
    names = [exit_.name for exit_ in model.exits]

    def case(rule: Rule) -> Case:
        rules = {chain: Rule() for chain in model.chains}
        own = msgspec.structs.replace(rule, score=score)
        return policy_case(model, rows, Policy(rules=rules | {name: own}))

    cases = {"all": case(Rule(thresholds=OUT_OF_REACH)), "natural": policy_case(model, rows, given)}
    for place, exit_ in enumerate(names):
        cases[f"path:{exit_}"] = case(on_its_way(names, place))
        cases[f"forced:{exit_}"] = case(forced(model.exits, exit_))
    cases["segments"] = Case(
        call=lambda number: model(rows[number], timed=True),
        read=lambda result: times_to_exits(model.chain, result.times_ms),
        enter=cases["all"].enter,
    )
    if model.device_counts is not None:
        cases["gpu"] = Case(
            call=lambda number: gpu_facts(model, rows[number]),
            read=lambda facts: facts,
            enter=cases["natural"].enter,
        )
    return cases


def policy_case(model: Model, rows: Sequence[Inputs], policy: Policy | Rule) -> Case:
    """The case of a model under a policy."""

    def enter() -> None:
        model.policy = policy

    def call(number: int) -> Result:
        return model(rows[number])

    return Case(call=call, read=read_answers, enter=enter)


def on_its_way(names: Sequence[str], place: int) -> Rule:
    """A rule that evaluates the exits up to `place` and stops every row at `place`."""
    if place == len(names) - 1:
        return Rule(thresholds=OUT_OF_REACH)
    stops = dict.fromkeys(names[:place], OUT_OF_REACH) | {names[place]: ALWAYS}
    return Rule(thresholds=stops, last=names[place])


def read_answers(result: Result) -> dict[str, list[int] | None]:
    """Exit index and predicted label of every row of a result."""
    logits = result.outputs.get("logits")
    labels = None if logits is None else [int(label) for label in logits.argmax(-1)]
    return {"exits": [int(number) for number in result.exits], "labels": labels}


def gpu_facts(model: Model, inputs: Inputs) -> dict[str, Any]:
    """Allocations and copied bytes of one warm call on the GPU, and measurements of the gaps
    between components (`Model.boundaries`)."""
    counts = model.device_counts
    assert counts is not None
    before = dataclasses.asdict(counts)
    model(inputs)
    after = dataclasses.asdict(counts)
    return {
        "a_call": {name: after[name] - before[name] for name in after},
        "boundaries": model.boundaries,
    }


def _text_cases(
    model: Model, rows: Sequence[Inputs], new_tokens: int, settings: dict[str, dict[str, Any]]
) -> dict[str, Case]:
    decoding = model.bundle.manifest.decoding
    assert decoding is not None
    prompts = [list(map(int, row[decoding.tokens].reshape(-1))) for row in rows]
    others = [{k: v for k, v in row.items() if k != decoding.tokens} for row in rows]
    given, chain = model.policy, model.chain_name

    def case(arguments: dict[str, Any], count: int) -> Case:
        arguments = dict(arguments)
        thresholds = arguments.pop("thresholds", None)
        policy = msgspec.structs.replace(given, rules=given.rules | arguments.pop("rules", {}))
        if thresholds is not None:
            rule = msgspec.structs.replace(given.rules.get(chain, Rule()), thresholds=thresholds)
            policy = msgspec.structs.replace(given, rules=given.rules | {chain: rule})

        def enter() -> None:
            if not model.unsplit:
                model.policy = policy

        def call(number: int) -> Generation:
            options = {"max_new_tokens": count, "text": False, "reuse": False, **arguments}
            options.setdefault("sampling", Sampling())  # so that both sides write the same text
            return model.generate([prompts[number]], inputs=others[number], **options).finish()

        return Case(call, read_generation, enter)

    def on_prompts(_: int) -> GivenText | None:
        return on_given_texts(model, prompts, others)

    cases = {name: case(arguments, new_tokens) for name, arguments in settings.items()}
    full = settings["unsplit" if model.unsplit else "full"]
    cases["search"] = case(full, min(new_tokens, SEARCH_TOKENS))
    enter = case(full, 1).enter
    cases["memory"] = dataclasses.replace(memory_case(), enter=enter)
    if tokens := {group.token for group in decoding.groups.values()}:

        def parts(_: int) -> dict[str, list[float]]:
            shown, hidden = prompts[0], [token for token in prompts[0] if token not in tokens]
            tower = model.trace(others[0], chain=model.bundle.manifest.vision_chain)
            return {
                "with_images_ms": model.segment_times(shown, others[0]),
                "without_images_ms": model.segment_times(hidden),
                "tower_ms": tower.times_ms,
                "tower_exits_ms": tower.exit_times_ms,
            }

        cases["parts"] = Case(parts, lambda times: times, enter)
    cases["given text"] = Case(
        on_prompts, lambda given: given and given.to_dict(), case({}, 1).enter
    )
    return cases


def memory_case() -> Case:
    """Its record is the memory of the process, in bytes."""
    memory = {"peak_bytes": peak_bytes, "resident_bytes": resident_bytes}
    return Case(lambda _: {name: of() for name, of in memory.items()}, lambda found: found)


def read_generation(generation: Generation) -> dict[str, Any]:
    """The record of one prompt's generation: ``first_token_s``, ``decode_s`` (tokens after the
    first), ``tokens``, the exits of earlier chains, what dropped tokens, and the statistics."""
    counts = generation.statistics
    return {
        "first_token_s": generation.first_token_s,
        "earlier_s": generation.earlier_s,
        "chains_s": generation.chains_s,
        "decode_s": generation.decode_s,
        "tokens": generation.tokens[0],
        "exits": counts.exits,
        "earlier": {name: exits[0] for name, exits in counts.earlier.items()},
        "dropped": [name for name, rows in counts.dropped.items() if rows[0]],
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "tested": counts.tested,
        "catch_ups": counts.catch_ups,
        "audited": counts.audited,
        "agreed": counts.agreed,
    }


def settings(engine: str, cores: int) -> list[Any]:
    """Thread settings to try for an engine. With a GPU, the host's threads only wait.

    >>> settings("cpu", 4), settings("tensorrt", 4)
    (['brief', 'blocking', 'process', 'spinning', 1, 2], ['spinning', 'blocking'])
    """
    if engine != "cpu":
        return ["spinning", "blocking"]
    counts = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    return ["brief", "blocking", "process", "spinning", *counts]


__all__ = [
    "NEW_TOKENS",
    "chain",
    "gpu_facts",
    "memory_case",
    "on_its_way",
    "policy_case",
    "read_answers",
    "read_generation",
    "read_inputs",
    "settings",
    "subject_of_unsplit",
    "unsplit",
    "write_inputs",
]
