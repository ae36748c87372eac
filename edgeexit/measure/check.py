"""Checks a bundle on this device: compares its outputs with the reference samples.

The samples are outputs of the original model for a few rows or texts. Rows run as a batch, one by
one, and with policies that stop them at different exits; texts as `edgeexit.measure.check_texts`
says. This checks splitting, binding and compaction as well as the graphs. The unsplit graphs and
the preprocessing are compared too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.compare import outliers, spread
from edgeexit.bundle.files import read_npz
from edgeexit.bundle.manifest import Chain
from edgeexit.bundle.policy import Policy, Rule, policy_for
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError, EngineError
from edgeexit.measure.batches import take_rows
from edgeexit.measure.check_exits import Checked, compare_exits, decided, only, rules_of
from edgeexit.measure.check_texts import check_texts
from edgeexit.measure.judge import Judge, Report, tolerances
from edgeexit.measure.probe import ask, ask_in_batches, chains_before, full_depth
from edgeexit.preprocessing.audio import log_mel
from edgeexit.preprocessing.images import image_from_array, preprocess_images
from edgeexit.runtime import Model, load
from edgeexit.runtime.engines.base import Threads
from edgeexit.runtime.text.tokenizer import encode_batch

REFERENCE = "samples/reference.npz"
PREPROCESSING = "samples/preprocessing.npz"
FEATURES_APART = 1e-3
"""Largest difference of a sound's features: transformers computes them in float32."""
GREY_LEVELS = 2.0
"""Tolerance for resized pixels: image libraries differ by one grey level, at borders by two."""


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
        policy: A policy to check in addition to those made here.
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
    bundle = model.bundle
    given = None if policy is None else policy_for(policy, bundle)
    default_atol, default_rtol = tolerances(bundle)
    few = outliers(bundle.manifest) if atol is None and rtol is None else 0.0
    atol, rtol = default_atol if atol is None else atol, default_rtol if rtol is None else rtol
    judge = Judge(atol, rtol, few)
    samples = _samples(model)
    inputs = {t.name: samples[f"input/{t.name}"] for t in bundle.manifest.inputs}
    checked = Checked(model, samples, inputs, judge)
    with full_depth(model):
        for name, chain in chains_before(model).items():
            _check_rows(checked, name, chain)
        if model.writes:
            check_texts(checked, given)
        else:
            _check_rows(checked, model.chain_name, model.chain)
            _check_decisions(checked, given)
    notes = checked.notes
    notes += _check_unsplit(checked, threads, closing=closing)
    if PREPROCESSING in bundle.manifest.samples:
        try:
            _check_preprocessing(bundle, judge)
        except EngineError as error:  # a device may have no image or text library
            notes.append(f"preprocessing was not compared: {error}")
    return Report(judge.comparisons, checked.rows, judge.atol, judge.rtol, [*judge.notes, *notes])


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


def _check_rows(checked: Checked, name: str, chain: Chain) -> None:
    """Compares exits that the samples have, of a chain that runs once per request."""
    answers = ask(checked.model, checked.inputs, chain=name).arrays
    compare_exits(checked, chain, answers, f"batch of {checked.rows}")
    # If exits apply to the whole batch, its rows may depend on each other.
    if not checked.model.writes and chain.rows == "independent":
        alone = ask_in_batches(checked.model, checked.inputs, 1, chain=name)
        compare_exits(checked, chain, alone, "rows alone")


def _check_decisions(checked: Checked, given: Policy | None) -> None:
    """Runs policies and compares the exits taken and their outputs with the reference."""
    model = checked.model
    every = np.arange(checked.rows)
    orders = [every, every[::-1].copy()] + ([every[1:]] if checked.rows > 2 else [])
    for name, chain in {**chains_before(model), model.chain_name: model.chain}.items():
        for title, rule in rules_of(checked, name, chain, given).items():
            model.policy = only(model, name, rule)
            for subset in orders if chain.rows == "independent" else orders[:1]:
                _compare_decisions(checked, name, rule, subset, f"{title}, {len(subset)} rows")


def _compare_decisions(
    checked: Checked, name: str, rule: Rule, subset: NDArray[np.int64], label: str
) -> None:
    """Runs some rows with the rule of a chain and compares exits and outputs with the reference."""
    model, chain = checked.model, checked.model.chains[name]
    names = [exit_.name for exit_ in chain.stops]
    result = model(take_rows(model.bundle, checked.inputs, subset))
    answering = name == model.chain_name
    taken = result.exits if answering else np.array([names.index(e) for e in result.earlier[name]])
    keys = [f"{exit_}/{n}" for exit_ in names[:-1] for n in (rule.score, "logits")]
    samples = {key: checked.samples[key][subset] for key in keys if key in checked.samples}
    independent = chain.rows == "independent"
    wanted, sure = decided(checked.judge, samples, chain, rule, independent=independent)
    wrong = sure & (taken != wanted)
    where = names[int(wanted[wrong][0])] if wrong.any() else "decisions"
    checked.judge.count(where, f"exit taken ({label})", int(wrong.sum()))
    for output, made in result.outputs.items():
        if answering:
            sources = [f"{names[k]}/{output}" for k in taken]
        else:
            early = ["" if k == len(names) - 1 else f"{names[k]}/" for k in taken]
            sources = [f"{prefix}{model.exits[-1].name}/{output}" for prefix in early]
        if missing := [key for key in sources if key not in checked.samples]:
            checked.note(f"{missing[0]} was not compared: the bundle has no reference for it")
            continue
        expected = [checked.samples[key][row] for key, row in zip(sources, subset, strict=True)]
        atol = checked.judge.atol * max(spread(checked.samples[key]) for key in set(sources))
        what = f"{output} ({label})"
        checked.judge.compare("decisions", what, made, np.stack(expected), atol=atol)


def _check_unsplit(checked: Checked, threads: Threads | None, *, closing: bool) -> list[str]:
    """Compares the unsplit graphs with the last exits. Returns notes on what was not compared."""
    model = checked.model
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
            [made] = unsplit.trace(checked.inputs, chain=name).outputs
            how = "whole texts" if "token" in made else f"batch of {checked.rows}"
            for output, expected in _unsplit_reference(checked, chain):
                checked.judge.compare("unsplit", f"{output}, {how}", made[output], expected)
    return []


def _unsplit_reference(checked: Checked, chain: Chain) -> Iterator[tuple[str, NDArray]]:
    for name in chain.stops[-1].outputs:
        keys = (f"unsplit/{name}", f"{chain.stops[-1].name}/{name}")
        expected = next((checked.samples[key] for key in keys if key in checked.samples), None)
        if name != "token" and expected is not None:
            yield name, expected


def _check_preprocessing(bundle: Bundle, judge: Judge) -> None:
    arrays = read_npz(bundle.file(PREPROCESSING))
    manifest, prefix = bundle.manifest, "expected/"
    expected = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    made: dict[str, NDArray] = {}
    atol: dict[str, float] = {}
    if (images := manifest.image_preprocessing) is not None:
        if "image" not in arrays or images.input not in expected:
            raise BundleError(f"{PREPROCESSING}: no image or no answer", fix="Export again.")
        made[images.input] = preprocess_images(images, [image_from_array(arrays["image"])])
        levels = GREY_LEVELS * images.scale / min(abs(value) for value in images.std)
        atol[images.input] = max(judge.atol, levels)
    if (sounds := manifest.audio_preprocessing) is not None:
        if "sound" not in arrays or sounds.input not in expected:
            raise BundleError(f"{PREPROCESSING}: no sound or no answer", fix="Export again.")
        made[sounds.input] = log_mel(sounds, arrays["sound"])[None]
        atol[sounds.input] = FEATURES_APART
    if manifest.text_preprocessing is not None:
        if "text" not in arrays:
            raise BundleError(f"{PREPROCESSING}: no text in it", fix="Export again.")
        made |= encode_batch(bundle, [str(text) for text in np.atleast_1d(arrays["text"])])
    for name, value in expected.items():
        found = made.get(name, np.empty(0))
        if value.ndim == found.ndim - 1:
            value = value[None]
        judge.compare("preprocessing", name, found, value, atol=atol.get(name, 0.0))


__all__ = ["REFERENCE", "check"]
