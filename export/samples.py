"""Samples of a bundle: inputs, and the original model's outputs for them.

`torch_reference` computes them with the model's own reference, or else by running its modules;
`reference_sample` names the arrays; `write_samples` writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import SCORES, Manifest, Run
from edgeexit.errors import ExportError
from edgeexit.export.contract import SplitModel, Values
from edgeexit.export.trace.scores import reference_scores
from edgeexit.export.trace.torch_graph import TORCH_DTYPES
from edgeexit.export.walk import Walk

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
SAMPLE_ROWS = 4
REFERENCE = "reference"
DERIVED = frozenset({"token", "gap", *SCORES})
"""Names of what `reference_sample` computes from logits."""
_LOGITS_AT_A_TIME = 1 << 18  # 2 MiB in float64


def write_samples(folder: Path, name: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Writes a file of samples. Returns its path in the bundle."""
    (folder / "samples").mkdir(exist_ok=True)
    path = f"samples/{name}.npz"
    np.savez(folder / path, **arrays)  # type: ignore[arg-type]
    return path


def reference_sample(
    inputs: Mapping[str, NDArray[Any]],
    answers: Mapping[str, Mapping[str, NDArray[Any]]],
    *,
    every_token: bool,
    probabilities: bool = False,
) -> Arrays:
    """The reference sample of a bundle.

    Args:
        inputs: Inputs of the program.
        answers: Exit (or ``unsplit``) -> its outputs and the scores that modules compute. What an
            exit answers behind an early exit of an earlier chain is named ``EARLIER_EXIT/EXIT``.
        every_token: Whether logits are those of every token, ``[rows, seq, classes]``. Then the
            sample has the last token's logits, and, ``[rows, seq]``, the greedy ``token``, the
            difference of its logit to the next (``gap``), and scores.
        probabilities: Whether the logits are probabilities instead.
    """
    sample = {f"input/{name}": value for name, value in inputs.items()}
    for exit_, outputs in answers.items():
        logits = outputs.get("logits")
        derived: dict[str, NDArray[Any]] = {}
        if logits is not None and every_token:
            last = logits[:, -1].copy()  # a view would keep the logits of all tokens in memory
            derived = {"logits": last} | _of_every_token(logits)
        elif logits is not None and exit_ != "unsplit":
            derived = dict(reference_scores(logits, probabilities=probabilities))
        sample |= {f"{exit_}/{name}": value for name, value in {**outputs, **derived}.items()}
    return sample


def _of_every_token(logits: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Greedy token, gap and scores ``[rows, seq]``, computed for a few tokens at a time: float64
    copies of all logits of a large vocabulary take a multiple of the model's memory, and copies
    that fit a core's cache are made ten times as fast. Tokens beyond a draft vocabulary, whose
    logits are all -inf, are left out."""
    flat = logits.reshape(-1, logits.shape[-1])
    known = np.flatnonzero(~np.isneginf(flat).all(0))
    if 0 < len(known) < flat.shape[-1]:
        of_known = _of_every_token(np.ascontiguousarray(logits[..., known]))
        return of_known | {"token": known[of_known["token"]]}
    found: list[dict[str, NDArray[Any]]] = []
    step = max(1, _LOGITS_AT_A_TIME // logits.shape[-1])
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        largest = np.partition(part, -2, axis=-1)[:, -2:]
        own = {"token": part.argmax(-1), "gap": largest[:, 1] - largest[:, 0]}
        found.append({**own, **reference_scores(part)})
    shape = logits.shape[:-1]
    return {name: np.concatenate([own[name] for own in found]).reshape(shape) for name in found[0]}


def check_finite(
    sample: Mapping[str, NDArray[Any]], what: str, fix: str = "Check the model's weights."
) -> None:
    """Refuses outputs that choose no answer: with NaN or +inf, or with -inf for every class. Warns
    of others with -inf.

    Args:
        sample: ``EXIT/OUTPUT`` -> values; inputs (``input/NAME``) and derived values are ignored.
        what: The model, for messages.
        fix: The error's fix.
    """
    for key, value in sample.items():
        exit_, _, output = key.rpartition("/")
        if exit_ == "input" or output in DERIVED or value.dtype.kind != "f" or not value.size:
            continue
        rows = value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1)
        bad = np.isnan(rows).any(-1) | np.isposinf(rows).any(-1) | np.isneginf(rows).all(-1)
        if bad.any():
            kind = "NaN" if np.isnan(rows[bad]).any() else "infinity"
            raise ExportError(
                f"{what}: exit {exit_}: {output} hold {kind} in {int(bad.sum())} of {len(rows)} "
                "sample rows",
                fix=fix,
            )
        if f"{exit_}/token" in sample:  # beyond a draft vocabulary all are -inf
            rows = rows[:, ~np.isneginf(rows).all(0)]
        if np.isneginf(rows).any():
            logger.warning(
                "%s: exit %s gives -inf for some classes, so its score entropy is NaN; use "
                "max_prob or margin",
                what,
                exit_,
            )


def torch_reference(model: SplitModel, manifest: Manifest) -> tuple[Arrays, dict[str, Values]]:
    """The reference sample of a model, computed by torch, and the inputs of its modules: component
    -> values, empty for a model that has its own reference."""
    inputs = model.example(SAMPLE_ROWS)
    _check_example(model, inputs)
    given = {name: value.numpy() for name, value in inputs.items()}
    if model.reference is not None:
        known = model.reference(inputs)
        sample = reference_sample(given, {}, every_token=True)
        found: dict[str, list[NDArray[Any]]] = {}
        for part in [known] if isinstance(known, Mapping) else known:
            own = reference_sample({}, _by_exit(model, part), every_token=True)
            for name, value in own.items():
                found.setdefault(name, []).append(value)
        return sample | {name: _joined(name, parts) for name, parts in found.items()}, {}
    examples: dict[str, Values] = {}

    def evaluate(name: str, feeds: list[Values]) -> list[Values]:
        examples.setdefault(name, feeds[0])
        component = model.component(name)
        outputs = component.forms[-1].body(*feeds[0].values())  # type: ignore[operator]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [{t.name: x for t, x in zip(component.outputs, outputs, strict=True)}]

    walks = {"": Walk(manifest, [inputs], evaluate)}
    answers: dict[str, Values] = {}
    for chain in (model.chains[step.chain] for step in model.steps if isinstance(step, Run)):
        alone = walks[""].branch()
        for name in chain.unsplit:
            alone.run(name)
        for name in chain.components:
            exits = [exit_ for exit_ in chain.stops if exit_.behind == name]
            for behind, walk in walks.items():
                walk.run(name)
                answers |= {f"{behind}{exit_.name}": walk.ask(exit_)[0] for exit_ in exits}
        if chain is not model.last_chain:
            early = {f"{exit_.name}/": walks[""].behind(chain, exit_) for exit_ in chain.stops[:-1]}
            for walk in walks.values():
                walk.hand_on(chain)
            walks |= early
    if model.last_chain.unsplit:
        [known] = alone.known
        answers["unsplit"] = {t.name: known[t.name] for t in model.last_chain.outputs}
    arrays = {name: {k: v.numpy() for k, v in values.items()} for name, values in answers.items()}
    return reference_sample(given, arrays, every_token=False), examples


def _joined(name: str, parts: list[NDArray[Any]]) -> NDArray[Any]:
    """An array of a sample, of parts of its tokens; logits are those of the last one."""
    if len(parts) == 1 or name.endswith("/logits"):
        return parts[-1]
    return np.concatenate(parts, axis=1)


def _by_exit(model: SplitModel, reference: Values) -> dict[str, dict[str, NDArray[Any]]]:
    """Exit -> output -> value, of the values by name that `SplitModel.reference` returns."""
    found: dict[str, dict[str, NDArray[Any]]] = {}
    answering = {exit_.name for exit_ in model.last_chain.stops}
    for name, value in reference.items():
        exit_, _, last = name.rpartition("/")
        exit_, output = (name, "logits") if last in answering else (exit_, last)
        found.setdefault(exit_, {})[output] = value.numpy()
    return found


def _check_example(model: SplitModel, inputs: Values) -> None:
    for tensor in model.inputs:
        value = inputs.get(tensor.name)
        if value is None:
            raise ExportError(
                f"{model.name}: example() does not return {tensor.name}",
                fix="Return an example for every input.",
            )
        expected = TORCH_DTYPES.get(tensor.dtype)
        if value.dtype != expected or value.ndim != len(tensor.axes):
            raise ExportError(
                f"{model.name}: example() returns {tensor.name} as {value.dtype} with {value.ndim} "
                f"axes, but the contract has {tensor.dtype}{tensor.axes}",
                fix="Correct example() or the contract's inputs.",
            )


__all__ = [
    "REFERENCE",
    "SAMPLE_ROWS",
    "check_finite",
    "reference_sample",
    "torch_reference",
    "write_samples",
]
