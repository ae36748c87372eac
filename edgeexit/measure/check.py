"""Checks a bundle on this device: compares its outputs with the reference samples.

The samples are outputs of the original model for a few rows or texts. Rows run as a batch, one by
one, and with policies that stop them at different exits. Texts run whole, token by token and in
pieces, and are generated in the modes ``full`` and ``exact``. This checks splitting, binding and
compaction as well as the graphs. The unsplit graphs and the preprocessing are compared too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.compare import spread
from edgeexit.bundle.manifest import Chain, ImagePreprocessing, PromptState
from edgeexit.bundle.policy import Policy, Rule, policy_for, rule_of
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError, EngineError, InputError
from edgeexit.measure.batches import read_npz, row_count, take_rows
from edgeexit.measure.judge import Judge, Report, tolerances
from edgeexit.measure.probe import ask, ask_in_batches, chains_before
from edgeexit.preprocessing.images import image_from_array, preprocess_images
from edgeexit.runtime import Model, Sampling, load
from edgeexit.runtime.engines.base import Threads
from edgeexit.runtime.text.tokenizer import encode_batch

REFERENCE = "samples/reference.npz"
PREPROCESSING = "samples/preprocessing.npz"
GREY_LEVELS = 2.0
"""Tolerance for resized pixels: image libraries differ by one grey level, at borders by two."""

NEW_TOKENS = 8
"""Number of tokens to compare between modes."""

LOGITS_SIZE = 10
"""Magnitude of logits: two tokens are equally likely if their logits differ by less than the
rounding error of a number of this size."""


@dataclass(frozen=True)
class _Checked:
    """A model, its samples, and the comparisons so far."""

    model: Model
    samples: Mapping[str, NDArray]
    inputs: Mapping[str, NDArray]
    judge: Judge

    @property
    def rows(self) -> int:
        """Number of rows, or texts, in the sample."""
        return row_count(self.model.bundle, self.inputs)


def check(
    model: Model,
    *,
    policy: Policy | Rule | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    threads: Threads | None = None,
    closing: bool = False,
) -> Report:
    """Compares a loaded bundle with its samples.

    Args:
        model: The bundle; open it with ``verify="full"`` to hash the weights. Its policy is
            restored afterwards.
        policy: A policy to check in addition to those made here, if the model does not write text.
        atol: Tolerance relative to the spread of an exit's outputs (scores: absolute); None = by
            precision (`edgeexit.bundle.compare.TOLERANCES`).
        rtol: Tolerance relative to the value; None = by precision.
        threads: Threads of the unsplit graphs; None: the default of `load`.
        closing: Close the model before the unsplit graphs are opened, so that memory holds the
            weights only once.

    Raises:
        BundleError: There are no samples, or they do not fit the manifest.
        PolicyError: `policy` does not fit the bundle.
    """
    bundle, before = model.bundle, model.policy
    given = None if policy is None else policy_for(policy, bundle)
    default_atol, default_rtol = tolerances(bundle)
    judge = Judge(default_atol if atol is None else atol, default_rtol if rtol is None else rtol)
    samples = _samples(model)
    inputs = {t.name: samples[f"input/{t.name}"] for t in bundle.manifest.inputs}
    one = _Checked(model, samples, inputs, judge)
    for name, chain in chains_before(model).items():
        _check_rows(one, name, chain)
    try:
        if model.writes:
            _check_texts(one)
            _check_drafting(one)
        else:
            _check_rows(one, model.chain_name, model.chain)
            _check_decisions(one, given)
    finally:
        model.policy = before
    notes = _check_unsplit(one, threads, closing=closing)
    if PREPROCESSING in bundle.manifest.samples:
        try:
            _check_preprocessing(bundle, judge)
        except EngineError as error:  # a device may have no image or text library
            notes.append(f"preprocessing was not compared: {error}")
    return Report(judge.comparisons, one.rows, judge.atol, judge.rtol, [*judge.notes, *notes])


def _samples(model: Model) -> Mapping[str, NDArray]:
    """Reads the reference samples. Raises `BundleError` if an array is missing."""
    bundle = model.bundle
    if REFERENCE not in bundle.manifest.samples:
        raise BundleError(
            f"{REFERENCE}: the bundle has no reference samples", fix="Export the bundle again."
        )
    samples = read_npz(bundle.file(REFERENCE))
    expected = [f"input/{tensor.name}" for tensor in bundle.manifest.inputs]
    for exit_ in model.exits:
        expected += [f"{exit_.name}/{name}" for name in [*exit_.outputs, *exit_.scores]]
    if not model.writes:
        expected += [f"unsplit/{tensor.name}" for tensor in bundle.manifest.outputs]
    for name in expected:
        if name not in samples:
            raise BundleError(f"{REFERENCE}: there is no {name}", fix="Export the bundle again.")
    return samples


def _check_rows(one: _Checked, name: str, chain: Chain) -> None:
    """Compares exits that the samples have, of a chain that runs once per request."""
    made = ask(one.model, one.inputs, chain=name).arrays
    _compare_exits(one, chain, made, f"batch of {one.rows}")
    # If exits apply to the whole batch, its rows may depend on each other.
    if not one.model.writes and chain.rows == "independent":
        alone = ask_in_batches(one.model, one.inputs, 1, chain=name)
        _compare_exits(one, chain, alone, "rows alone")


def _check_texts(one: _Checked) -> None:
    """Compares exits on whole texts, token by token and in pieces."""
    chain = one.model.chain
    _compare_exits(one, chain, ask(one.model, one.inputs).arrays, "whole texts")
    if _reads_whole_prompts(one.model):
        return
    for step, how in ((1, "token by token"), (5, "in pieces")):
        _compare_exits(one, chain, ask(one.model, one.inputs, step=step).arrays, how)


def _reads_whole_prompts(model: Model) -> bool:
    """Whether a state depends on all tokens of a prompt, so that a prompt cannot run in pieces."""
    components = model.bundle.manifest.components
    calls = [call.component for exit_ in model.chain.exits for call in exit_.path]
    return any(
        isinstance(state, PromptState)
        and any("new" in tensor.axes for tensor in components[state.maker].inputs)
        for name in [*model.chain.components, *calls]
        for state in components[name].states
    )


def _compare_exits(one: _Checked, chain: Chain, made: Mapping[str, NDArray], how: str) -> None:
    """Compares every exit's outputs and scores with the samples."""
    for exit_ in chain.stops:
        for name in [*exit_.outputs, *exit_.scores]:
            key = f"{exit_.name}/{name}"
            expected = one.samples.get(key)
            if expected is None:
                continue
            if name == "token":
                gap = one.samples.get(f"{exit_.name}/gap", math.inf)
                clear = gap > one.judge.atol + one.judge.rtol * LOGITS_SIZE
                wrong = int((clear & (made[key] != expected)).sum())
                one.judge.count(exit_.name, f"greedy token, {how}", wrong)
                continue
            if name in exit_.outputs:
                one.judge.compare(exit_.name, f"{name}, {how}", made[key], expected)
            else:
                one.judge.compare_score(exit_.name, f"score {name}, {how}", made[key], expected)


def _check_decisions(one: _Checked, given: Policy | None) -> None:
    """Runs policies and compares the exits taken and their outputs with the reference."""
    model = one.model
    every = np.arange(one.rows)
    orders = [every, every[::-1].copy()] + ([every[1:]] if one.rows > 2 else [])
    for name, chain in {**chains_before(model), model.chain_name: model.chain}.items():
        for title, rule in _rules(one, name, chain, given).items():
            model.policy = Policy(rules={n: Rule() for n in model.chains} | {name: rule})
            for subset in orders if chain.rows == "independent" else orders[:1]:
                _compare_decisions(one, name, rule, subset, f"{title}, {len(subset)} rows")


def _rules(one: _Checked, name: str, chain: Chain, given: Policy | None) -> dict[str, Rule]:
    """Title -> rule of a chain whose decisions the samples determine."""
    early = chain.stops[:-1]
    known = [
        {score for score in exit_.scores if f"{exit_.name}/{score}" in one.samples}
        for exit_ in early
    ]
    scores = sorted(set.intersection(*known)) if known else []
    rules = {
        f"{score} at its median": Rule(
            thresholds=[_middle(one.samples[f"{exit_.name}/{score}"]) for exit_ in early],
            score=score,
        )
        for score in scores
    }
    if given is not None:
        rule = rule_of(given, chain, name)
        if not early or rule.score in scores:
            rules = {"the given policy": rule} | rules
    return rules


def _compare_decisions(
    one: _Checked, name: str, rule: Rule, subset: NDArray[np.int64], label: str
) -> None:
    """Runs some rows with the rule of a chain and compares exits and outputs with the reference."""
    model, chain = one.model, one.model.chains[name]
    names = [exit_.name for exit_ in chain.stops]
    result = model(take_rows(model.bundle, one.inputs, subset))
    answering = name == model.chain_name
    taken = result.exits if answering else np.array([names.index(e) for e in result.earlier[name]])
    wanted, sure = _decided(one, chain, rule, subset)
    wrong = sure & (taken != wanted)
    where = names[int(wanted[wrong][0])] if wrong.any() else "decisions"
    one.judge.count(where, f"exit taken ({label})", int(wrong.sum()))
    for output, made in result.outputs.items() if answering else ():
        expected = [
            one.samples[f"{names[k]}/{output}"][row] for k, row in zip(taken, subset, strict=True)
        ]
        atol = one.judge.atol * max(spread(one.samples[f"{n}/{output}"]) for n in names)
        one.judge.compare("decisions", f"{output} ({label})", made, np.stack(expected), atol=atol)


def _decided(
    one: _Checked, chain: Chain, rule: Rule, subset: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The exits that rows take by the samples' scores, and whether rounding may not change them.

    It does not use the runtime's code for rules, so that the reference is independent.
    """
    samples, independent = one.samples, chain.rows == "independent"
    early = [exit_.name for exit_ in chain.stops[:-1]]
    wanted = np.full(len(subset), len(early))
    alive = np.ones(len(subset), np.bool_)
    open_question = np.zeros(len(subset), np.bool_)
    previous, streak = np.full(len(subset), -1), np.zeros(len(subset), np.int64)
    first = early.index(rule.first) if rule.first else 0
    last = early.index(rule.last) if rule.last else len(early) - 1
    for number in range(first, last + 1):
        scores = samples[f"{early[number]}/{rule.score}"][subset].astype(np.float64)
        threshold = _threshold(rule, early, number)
        open_question |= alive & one.judge.near(scores, threshold)
        fires = alive & (scores >= threshold)
        if rule.patience:
            predicted = samples[f"{early[number]}/logits"][subset].argmax(-1)
            streak = np.where(predicted == previous, streak + 1, 0)
            previous = predicted
            fires &= streak >= rule.patience
        if not independent:
            fires &= fires.all()
        wanted[fires] = number
        alive &= ~fires
    return wanted, ~open_question if independent else ~open_question & ~open_question.any()


def _threshold(rule: Rule, early: list[str], number: int) -> float:
    if isinstance(rule.thresholds, dict):
        return rule.thresholds.get(early[number], math.inf)
    if isinstance(rule.thresholds, list):
        return rule.thresholds[number]
    return rule.thresholds


def _middle(scores: NDArray) -> float:
    """A threshold between the two scores around the median, so that no score equals it."""
    ordered = np.sort(scores[np.isfinite(scores)].astype(np.float64))
    if not len(ordered):
        return math.inf
    half = len(ordered) // 2
    return float(ordered[max(half - 1, 0)] + ordered[half]) / 2


def _check_drafting(one: _Checked) -> None:
    """Checks that the mode ``exact`` writes the same texts as ``full``."""
    model, others = one.model, dict(one.inputs)
    decoding = model.bundle.manifest.decoding
    assert decoding is not None
    tokens = others.pop(decoding.tokens)
    prompts = [decoding.start_tokens or row.tolist() for row in tokens]
    count = max(1, min(NEW_TOKENS, model.capacity - max(map(len, prompts))))
    options: dict[str, Any] = {"inputs": others, "max_new_tokens": count, "text": False}
    options["sampling"] = Sampling()  # greedy, not the checkpoint's settings
    full = model.generate(prompts, **options).finish().tokens
    # Only drafting keeps the states of an adapter, so each exit drafts once.
    early = model.exits[:-1]
    drafting = [exit_.name for n, exit_ in enumerate(early) if n == 0 or len(exit_.path) > 1]
    for name in drafting:
        made = model.generate(prompts, mode="exact", draft_exit=name, **options).finish().tokens
        wrong = sum(_written_apart(one, prompts, full, row, text) for row, text in enumerate(made))
        what = f"{len(prompts)} texts of {count} tokens drafted by {name}, as full"
        one.judge.count("exact", what, wrong)


def _written_apart(
    one: _Checked,
    prompts: Sequence[list[int]],
    full: Sequence[list[int]],
    row: int,
    exact: list[int],
) -> bool:
    """Whether a text differs from that of the mode ``full`` at a token where the two candidates
    were not equally likely: kernels for one row and for several round differently."""
    if full[row] == exact:
        return False
    decoding = one.model.bundle.manifest.decoding
    assert decoding is not None
    pairs = list(zip(full[row], exact, strict=False))
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    # The other rows run too: inputs of earlier chains may be for all texts.
    texts = [[*p, *f[:place]] for p, f in zip(prompts, full, strict=True)]
    texts = [text + text[-1:] * (len(texts[row]) - len(text)) for text in texts]
    try:
        made = one.model.trace({**one.inputs, decoding.tokens: np.array(texts)}).outputs[-1]
    except InputError:  # the model wrote a placeholder token, for which there is no data
        return True
    logits = made["logits"][row]
    likely, other = (
        # A shorter text ended with a stop token, which its tokens do not include.
        logits[text[place : place + 1] or decoding.stop_tokens].max()
        for text in (full[row], exact)
    )
    return bool(abs(likely - other) > one.judge.atol + one.judge.rtol * abs(likely))


def _check_unsplit(one: _Checked, threads: Threads | None, *, closing: bool) -> list[str]:
    """Compares the unsplit graphs with the last exits. Returns notes on what was not compared."""
    model = one.model
    if without := [name for name, chain in model.chains.items() if not chain.unsplit]:
        return [f"the unsplit graphs were not compared: the chain {without[0]} has none"]
    engine = model.describe_engine()["engine"]
    texts: dict[str, Any] = {}
    if model.writes:
        texts = {"capacity": model.capacity, "states": model.state_form}
    if closing:
        model.close()
    with load(model.bundle, engine, threads=threads, unsplit=True, **texts) as unsplit:
        for name, chain in {**chains_before(model), model.chain_name: model.chain}.items():
            [made] = unsplit.trace(one.inputs, chain=name).outputs
            how = "whole texts" if "token" in made else f"batch of {one.rows}"
            for output, expected in _unsplit_reference(one, chain):
                one.judge.compare("unsplit", f"{output}, {how}", made[output], expected)
    return []


def _unsplit_reference(one: _Checked, chain: Chain) -> Iterator[tuple[str, NDArray]]:
    for name in chain.stops[-1].outputs:
        keys = (f"unsplit/{name}", f"{chain.stops[-1].name}/{name}")
        expected = next((one.samples[key] for key in keys if key in one.samples), None)
        if name != "token" and expected is not None:
            yield name, expected


def _check_preprocessing(bundle: Bundle, judge: Judge) -> None:
    arrays = read_npz(bundle.file(PREPROCESSING))
    preprocessing = bundle.manifest.preprocessing
    prefix = "expected/"
    expected = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if isinstance(preprocessing, ImagePreprocessing):
        if "image" not in arrays or preprocessing.input not in expected:
            raise BundleError(f"{PREPROCESSING}: no image or no answer", fix="Export again.")
        image = image_from_array(arrays["image"])
        made = {preprocessing.input: preprocess_images(preprocessing, [image])}
        levels = GREY_LEVELS * preprocessing.scale / min(abs(value) for value in preprocessing.std)
        atol = max(judge.atol, levels)
    else:
        if "text" not in arrays:
            raise BundleError(f"{PREPROCESSING}: no text in it", fix="Export again.")
        texts = [str(text) for text in np.atleast_1d(arrays["text"])]
        made, atol = encode_batch(bundle, texts), 0.0
    for name, value in expected.items():
        found = made.get(name, np.empty(0))
        if value.ndim == found.ndim - 1:
            value = value[None]
        judge.compare("preprocessing", name, found, value, atol=atol)


__all__ = ["REFERENCE", "check"]
