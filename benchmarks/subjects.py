"""Subjects for the workers of `split.py`: several ways to run the same early-exit model.

Each takes the bundle, the file of inputs and a thread setting. It has the cases ``path:EXIT`` (all
exits up to EXIT are evaluated, every row stops at EXIT) or a single case of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import graphs
import numpy as np

from edgeexit import runtime
from edgeexit.bundle.policy import OUT_OF_REACH, forced
from edgeexit.bundle.reader import open_bundle
from edgeexit.measure.bench.cases import (
    chain,
    on_its_way,
    policy_case,
    read_answers,
    read_inputs,
    subject_of_unsplit,
)
from edgeexit.measure.bench.worker import Case, Subject
from edgeexit.runtime import Model, Rule
from edgeexit.runtime.engines import onnxruntime

Threads = Any


def graph(bundle: str, folder: str, name: str, inputs: str, threads: Threads) -> Subject:
    """One of the graphs of `graphs.build`, bound like the bundle's unsplit graph."""
    opened = graphs.open_graph(bundle, folder, name)
    model = runtime.load(opened, threads=threads, unsplit=True)
    return subject_of_unsplit(model, inputs)


def without(bundle: str, inputs: str, threads: Threads, choice: str) -> Subject:
    """The chain with one of the runtime's choices undone: case ``all``."""
    if choice == "compiled session":
        onnxruntime._runner = lambda session, binding, options: functools.partial(
            session.run_with_iobinding, binding, options
        )
    elif choice == "shared arena":
        onnxruntime._share_arena = functools.cache(lambda: False)
    elif choice == "fusions left out":
        onnxruntime.SLOW_FUSIONS = []
    return chain(bundle, inputs, threads=threads, all_scores=choice == "one score")


def first(bundle: str, folder: str, inputs: str, threads: Threads) -> Subject:
    """The models truncated after K layers: cases ``forced:EXIT``."""
    rows = read_inputs(inputs)
    cases, models = {}, []
    for number, exit_ in enumerate(open_bundle(bundle).manifest.last_chain.stops[:-1], start=1):
        opened = graphs.open_graph(bundle, folder, f"first_{number}")
        model = runtime.load(opened, threads=threads, unsplit=True)
        models.append(model)
        cases[f"forced:{exit_.name}"] = Case(lambda row, model=model: model(rows[row]))
    return Subject(cases, len(rows), close=lambda: [model.close() for model in models])


def forced_exits(bundle: str, inputs: str, threads: Threads) -> Subject:
    """The chain, loaded for each exit with the policy that forces it: cases ``forced:EXIT``."""
    rows = read_inputs(inputs)
    opened = open_bundle(bundle)
    exits = opened.manifest.last_chain.stops
    loaded: dict[str, Model] = {}

    def case(name: str) -> Case:
        def enter() -> None:
            if name not in loaded:
                for other in loaded.values():
                    other.close()
                loaded.clear()
                policy = forced(exits, name)
                loaded[name] = runtime.load(opened, policy=policy, threads=threads)

        return Case(lambda row: loaded[name](rows[row]), read_answers, enter)

    return Subject({f"forced:{exit_.name}": case(exit_.name) for exit_ in exits}, len(rows))


def nested(bundle: str, folder: str, inputs: str, threads: Threads) -> Subject:
    """One graph with an ``If`` behind every exit."""
    opened = graphs.open_graph(bundle, folder, "nested")
    model = runtime.load(opened, threads=threads, unsplit=True)
    rows = read_inputs(inputs)
    exits = opened.manifest.last_chain.stops
    cases = {}
    for place, exit_ in enumerate(exits):
        thresholds = np.full(len(exits) - 1, np.inf, np.float32)
        if place < len(exits) - 1:
            thresholds[place] = -np.inf
        fed = [row | {graphs.THRESHOLDS: thresholds} for row in rows]
        cases[f"path:{exit_.name}"] = Case(
            lambda row, fed=fed: model(fed[row]), lambda result: result.outputs["logits"].tolist()
        )
    return Subject(cases, len(rows), close=model.close)


def naive(bundle: str, inputs: str, threads: Threads) -> Subject:
    """A naive chain of sessions: ``run`` with numpy arrays, and all outputs fetched."""
    import onnxruntime as ort

    opened = open_bundle(bundle)
    chain = opened.manifest.last_chain
    parts = []
    for name, exit_ in zip(chain.components, chain.stops, strict=True):
        options = session_options(threads)
        path = str(opened.file(opened.manifest.components[name].variants[0].graph))
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        made = [value.name for value in session.get_outputs()]
        parts.append((session, names, made, exit_))
    rows = read_inputs(inputs)

    def run(row: int, thresholds: list[float]) -> np.ndarray:
        known = dict(rows[row])
        for (session, names, made, exit_), threshold in zip(parts, thresholds, strict=True):
            found = session.run(None, {name: known[name] for name in names})
            known |= dict(zip(made, found, strict=True))
            if known[exit_.scores["max_prob"]][0] >= threshold:
                break
        return known[exit_.outputs["logits"]]

    return _paths(run, [part[3].name for part in parts], len(rows))


def session_options(threads: Threads) -> Any:
    """Options of a plain ONNX Runtime session with one of the runtime's thread settings."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads == "process":
        onnxruntime.install_process_pool()
        options.use_per_session_threads = False
    elif threads == "brief":
        for entry, value in onnxruntime.BRIEF.items():
            options.add_session_config_entry(entry, value)
    elif threads != "spinning":
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads != "blocking":
            options.intra_op_num_threads = threads
    return options


def eager(bundle: str, checkpoint: str, inputs: str, threads: list[Any]) -> Subject:
    """The same model in PyTorch with a Python ``if`` behind every layer. `threads`: thread count
    and attention implementation."""
    import torch

    from edgeexit.export.pretrained import from_pretrained

    count, attention = threads
    torch.set_num_threads(count)
    names = [exit_.name for exit_ in open_bundle(bundle).manifest.last_chain.stops]
    depth = len(names)
    torch.manual_seed(0)
    model = from_pretrained(checkpoint, exits=range(1, depth), untrained=True)
    model.model.set_attn_implementation(attention)
    trunk, heads = model.trunk, model.heads
    wanted = [tensor.name for tensor in trunk.inputs]
    rows = [{k: torch.from_numpy(v) for k, v in row.items()} for row in read_inputs(inputs)]

    @torch.inference_mode()
    def run(row: int, thresholds: list[float]) -> np.ndarray:
        state, *context = trunk.stem(*(rows[row][name] for name in wanted))
        for number, layer in enumerate(trunk.layers):
            state = layer(state, *context)
            head = heads[names[number]] if number < depth - 1 else trunk.head
            logits = head(state)
            if torch.softmax(logits, -1).amax(-1).item() >= thresholds[number]:
                break
        return logits.numpy()

    return _paths(run, names, len(rows))


def _paths(run: Any, names: list[str], rows: int) -> Subject:
    cases = {}
    for place, name in enumerate(names):
        thresholds = [np.inf] * place + [-np.inf] * (len(names) - place)
        cases[f"path:{name}"] = Case(
            lambda row, thresholds=thresholds: run(row, thresholds), lambda logits: logits.tolist()
        )
    return Subject(cases, rows)


def policies(bundle: str, inputs: str, policies: list[str], threads: Threads) -> Subject:
    """The chain under several policies: cases ``policy:N``, and ``path:EXIT``."""
    model = runtime.load(bundle, threads=threads)
    rows = read_inputs(inputs)
    names = [exit_.name for exit_ in model.exits]
    cases = {"all": policy_case(model, rows, Rule(thresholds=OUT_OF_REACH))}
    for number, path in enumerate(policies):
        cases[f"policy:{number}"] = policy_case(model, rows, runtime.read_policy(path))
    for place, name in enumerate(names):
        cases[f"path:{name}"] = policy_case(model, rows, on_its_way(names, place))
    return Subject(cases, len(rows), model.describe_engine(), model.close)
