"""Runs the steps of a program that run once per request: checks inputs and runs chains over rows,
each row up to the exit at which it stops.

For a classifier this is the whole program. For a language model these are the encoders and vision
towers, whose outputs the chain that writes text reads.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Call, Chain, Gather, Manifest, Place, Run, Tensor
from edgeexit.bundle.policy import Decision
from edgeexit.errors import InputError
from edgeexit.runtime.executor.components import Components, exit_calls, inputs_taken
from edgeexit.runtime.executor.launch_ahead import LaunchAhead
from edgeexit.runtime.executor.rows import Answers, RowPass
from edgeexit.runtime.executor.tables import Tables
from edgeexit.runtime.programs.features import FeatureCache

FORMS_KEPT = 1024
"""Combinations of input dtypes and shapes whose checks a model remembers."""


@dataclass(slots=True)
class Result:
    """The result of a call. All arrays are copies, with rows in the order of the inputs.

    Attributes:
        outputs: Output name -> ``[batch, ...]``, each row from the exit at which it stopped.
        exits: ``[batch]``, index of that exit.
        exit_names: Per row, the name of that exit.
        scores: ``[batch]`` float32, the policy's score at that exit.
        times_ms: Milliseconds of each component that ran, in order; empty unless ``timed``.
        earlier: Earlier chain -> per row, the name of the exit at which it stopped.
    """

    outputs: dict[str, NDArray[Any]]
    exits: NDArray[np.int64]
    exit_names: list[str]
    scores: NDArray[np.float32]
    times_ms: list[float]
    earlier: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """Outputs and scores of every exit for every row (texts: for every token), from `Model.trace`.

    Attributes:
        exits: Names, in order.
        outputs: Per exit, output name -> ``[batch, ...]``. For texts: ``token`` and
            ``next_log_prob`` ``[batch, seq]``, and ``logits`` ``[batch, vocabulary]`` of each row's
            last token.
        scores: Per exit, score name -> ``[batch]`` float32; for texts ``[batch, seq]``.
        times_ms: Milliseconds of each component with the exit behind it.
        exit_times_ms: Of these, the exit's own components (a projector, a head); empty for texts.
        step_times_ms: For texts: per run of `step` tokens, the same as `times_ms`.
    """

    exits: list[str]
    outputs: list[dict[str, NDArray[Any]]]
    scores: list[dict[str, NDArray[Any]]]
    times_ms: list[float]
    exit_times_ms: list[float] = field(default_factory=list)
    step_times_ms: list[list[float]] = field(default_factory=list)


class InputSteps:
    """The steps of a program that run once per request.

    Args:
        components: The bundle's components on an engine.
        chains: Chains by name; for the baseline, their unsplit form.
        asked: Chain -> per exit, the score that it is opened with.
        launch_ahead: As for `RowPass`.

    Attributes:
        passes: Chain -> its `RowPass`.
        takes: The program inputs that these steps read.
        images: Chains that read nothing but an input of images -> that input.
        placed: Inputs of images that become nothing but rows for placeholders. Their rows are not
            those of the other inputs, and there may be none.
    """

    def __init__(
        self,
        components: Components,
        chains: Mapping[str, Chain],
        tables: Tables,
        asked: Mapping[str, Sequence[str | None]],
        launch_ahead: LaunchAhead,
    ) -> None:
        manifest = components.bundle.manifest
        tables_read = [step for step in manifest.steps if isinstance(step, Gather)]
        self._ids = {step.output.name: step.ids for step in tables_read if step.when == "input"}
        self._steps = [
            step
            for step in manifest.steps
            if (step.target in self._ids if isinstance(step, Place) else step.when == "input")
        ]
        self._groups = {} if manifest.decoding is None else manifest.decoding.groups
        self._tables = tables
        self.passes: dict[str, RowPass] = {}
        self._feeds: dict[str, list[Tensor]] = {}
        for step in self._steps:
            if isinstance(step, Run):
                chain = chains[step.chain]
                feeds = self._feeds[step.chain] = chain_feeds(manifest, chain)
                self.passes[step.chain] = RowPass(
                    components, chain, feeds, asked[step.chain], launch_ahead
                )
        taken = {t.name for feeds in self._feeds.values() for t in feeds}
        taken |= {step.ids for step in self._steps if isinstance(step, Gather)}
        self.takes = {t.name: t for t in manifest.inputs if t.name in taken}
        self.images: dict[str, str] = {}
        self.placed: set[str] = set()
        self._of_images(manifest, chains)
        self._single = next(iter(self.passes)) if len(self._steps) == len(self.passes) == 1 else ""

    def _of_images(self, manifest: Manifest, chains: Mapping[str, Chain]) -> None:
        """Sets `images` and `placed`."""
        feeds = {chain: {tensor.name for tensor in own} for chain, own in self._feeds.items()}
        read = {name for names in feeds.values() for name in names}
        read |= {step.ids for step in self._steps if isinstance(step, Gather)}
        if manifest.decoding is not None:
            read |= inputs_taken(manifest, chains[manifest.decoding.chain])
        placed = {step.source for step in manifest.steps if isinstance(step, Place)}
        preprocessing = manifest.image_preprocessing
        for chain, names in feeds.items():
            [first, *others] = names
            if others or first not in self.takes:
                continue
            made = {tensor.name for tensor in chains[chain].outputs}
            if made & placed or (preprocessing is not None and first == preprocessing.input):
                self.images[chain] = first
            if made <= placed - read and sum(first in own for own in feeds.values()) == 1:
                self.placed.add(first)

    def answer(
        self,
        inputs: Mapping[str, NDArray[Any]],
        sizes: Mapping[str, int],
        decisions: Mapping[str, Sequence[Decision]],
        *,
        patience: Mapping[str, int],
        timed: bool = False,
    ) -> dict[str, Answers]:
        """Runs the steps. Returns every chain's answers."""
        if name := self._single:  # a single chain and no other steps
            only = self.passes[name]
            return {
                name: only.run(inputs, sizes, decisions[name], patience=patience[name], timed=timed)
            }
        return self.run(inputs, decisions, patience=patience, timed=timed)[1]

    def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        decisions: Mapping[str, Sequence[Decision]],
        *,
        patience: Mapping[str, int],
        timed: bool = False,
        features: FeatureCache | None = None,
        seconds: dict[str, float] | None = None,
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Answers]]:
        """Runs the steps. Returns all tensors (inputs and outputs), and the answers of every chain
        that ran: one for placeholders runs only if there are images.

        Args:
            features: Answers of `images` chains for images that were seen before.
            seconds: Receives the time of each chain.
        """
        known, answers = dict(inputs), {}

        def run(name: str, values: Mapping[str, NDArray[Any]]) -> Answers:
            sizes = sizes_of(self._feeds[name], values)
            return self.passes[name].run(
                values, sizes, decisions[name], patience=patience[name], timed=timed
            )

        for step in self._steps:
            if not isinstance(step, Run):
                self._fill(step, known)
                continue
            name, read = step.chain, self.images.get(step.chain)
            if read in self.placed and read not in known:
                continue
            started = time.perf_counter()
            if read is None or features is None:
                answers[name] = run(name, known)
            else:
                tower, most = functools.partial(run, name), self.passes[name].largest_batch
                answers[name] = features.answers(name, read, known[read], tower, together=most)
            known |= answers[name].outputs
            if seconds is not None:
                seconds[name] = time.perf_counter() - started
        return known, answers

    def trace(self, inputs: Mapping[str, NDArray[Any]], chain: str) -> Trace:
        """Runs every component of a chain for every row. Earlier chains use their last exit."""
        known = dict(inputs)
        for step in self._steps:
            if not isinstance(step, Run):
                self._fill(step, known)
                continue
            read = self.images.get(step.chain)
            if read in self.placed and read not in known:
                if step.chain == chain:
                    raise InputError(f"input {read} is missing", fix=f"The chain {chain} reads it.")
                continue
            row_pass = self.passes[step.chain]
            sizes = sizes_of(self._feeds[step.chain], known)
            answers, times_ns = row_pass.run_all(known, sizes)
            if step.chain == chain:
                return Trace(
                    [exit_.name for exit_ in row_pass.exits],
                    [outputs for outputs, _ in answers],
                    [scores for _, scores in answers],
                    [sum(both_ns) / 1e6 for both_ns in times_ns],
                    [exit_ns / 1e6 for _, exit_ns in times_ns],
                )
            known |= answers[-1][0]
        raise AssertionError(f"no step runs {chain}")

    def _fill(self, step: Gather | Place, known: dict[str, NDArray[Any]]) -> None:
        """Looks up embeddings, or replaces those of placeholders."""
        if isinstance(step, Gather):
            known[step.output.name] = self._tables.look_up(step, known[step.ids])
            return
        places = known[self._ids[step.target]] == self._groups[step.group].token
        source = known.get(step.source)
        rows = None if source is None else source.reshape(-1, source.shape[-1])
        check_placeholders(step, int(places.sum()), 0 if rows is None else len(rows))
        if rows is not None:
            known[step.target][places] = rows


def check_placeholders(step: Place, placeholders: int, rows: int) -> None:
    """Raises `InputError` if there are more placeholders than rows to replace them, or fewer."""
    if placeholders != rows:
        raise InputError(
            f"the prompts have {placeholders} tokens of the group {step.group}, "
            f"{'more' if placeholders > rows else 'fewer'} than the {rows} rows that "
            f"{step.source} has for them",
            fix="Write one placeholder token per row, in the order of the rows.",
        )


def chain_feeds(manifest: Manifest, chain: Chain) -> list[Tensor]:
    """Inputs of a chain's components and exits that the chain does not make itself."""
    feeds: dict[str, Tensor] = {}
    made: set[str] = set()
    behind = exit_calls(chain)
    for name in chain.components:
        calls = [Call(component=name), *(c for e in behind[name] for c in e.path)]
        for call in calls:
            component = manifest.components[call.component]
            taken = {call.inputs.get(t.name, t.name): t for t in component.inputs}
            feeds |= {
                key: msgspec.structs.replace(t, name=key)
                for key, t in taken.items()
                if key not in made and key not in feeds
            }
            made |= {tensor.name for tensor in component.outputs}
    return list(feeds.values())


def sizes_of(tensors: Sequence[Tensor], values: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Size of every symbolic axis."""
    return {
        axis: size
        for tensor in tensors
        for axis, size in zip(tensor.axes, values[tensor.name].shape, strict=True)
        if isinstance(axis, str)
    }


class CheckedInputs:
    """Checks inputs against a signature. Remembers the dtypes and shapes that it has checked.

    Args:
        expected, limits, placed: As for `check_inputs`.
    """

    def __init__(
        self,
        expected: Mapping[str, Tensor],
        limits: Mapping[str, int],
        placed: Collection[str] = (),
    ) -> None:
        self._expected, self._limits, self._placed = expected, limits, placed
        self._forms: dict[Any, dict[str, int]] = {}

    def sizes(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """`check_inputs`, cached."""
        expected = self._expected
        try:
            form: Any = tuple([(inputs[name].dtype, inputs[name].shape) for name in expected])
            known = self._forms.get(form) if len(inputs) == len(expected) else None
        except (AttributeError, LookupError, TypeError):
            form = known = None
        if known is None:
            known = check_inputs(expected, inputs, self._limits, self._placed)
            if len(self._forms) < FORMS_KEPT:
                self._forms[form] = known
        return known


def check_inputs(
    expected: Mapping[str, Tensor],
    inputs: Mapping[str, NDArray[Any]],
    limits: Mapping[str, int],
    placed: Collection[str] = (),
) -> dict[str, int]:
    """Checks inputs against a signature. Returns the size of every symbolic axis.

    Args:
        expected: Input name -> what it is.
        limits: Symbolic axis -> the largest size.
        placed: Inputs that may be missing, and whose rows are not those of the others.

    Raises:
        InputError: An input is wrong; the message names it and says what is expected.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs are a {type(inputs).__name__}, not a mapping",
            fix=f"Call model({{{', '.join(f'{name!r}: array' for name in expected)}}}).",
        )
    missing = sorted(expected.keys() - inputs.keys() - set(placed))
    if missing or not inputs.keys() <= expected.keys():
        unknown = sorted(str(name) for name in inputs.keys() - expected.keys())
        what = f"input {missing[0]} is missing" if missing else f"there is no input {unknown[0]}"
        takes = f"The model takes {', '.join(expected)}." if expected else "Leave inputs out."
        if missing == ["token_type_ids"] and "input_ids" in inputs:
            takes += " For single texts it is zeros: numpy.zeros_like(input_ids)."
        raise InputError(what, fix=takes)
    sizes: dict[str, int] = {}
    for name, tensor in expected.items():
        if name not in inputs:
            continue
        value, own = inputs[name], {} if name in placed else sizes
        if not isinstance(value, np.ndarray):
            raise InputError(
                f"input {name} is a {type(value).__name__}, not a numpy array",
                fix=f"Pass numpy.asarray(value, {tensor.dtype!r}).",
            )
        if value.dtype.name != tensor.dtype:
            raise InputError(
                f"input {name} is {value.dtype.name}, the model takes {tensor.dtype}",
                fix=f'Convert it: {name}.astype("{tensor.dtype}").',
            )
        if value.ndim != len(tensor.axes):
            raise InputError(
                f"input {name} has the shape {list(value.shape)}, the model takes {tensor.axes}",
                fix="Inputs have an axis for rows, even for a single row.",
            )
        for axis, size in zip(tensor.axes, value.shape, strict=True):
            known = own.setdefault(axis, size) if isinstance(axis, str) else axis
            if size == 0:
                raise InputError(
                    f"input {name} is empty (shape {list(value.shape)})",
                    fix="Give at least one row."
                    if axis == "batch"
                    else f"The axis {axis} has the size 0: give rows that are not empty.",
                )
            if known is not None and known != size:
                raise InputError(
                    f"input {name} has the shape {list(value.shape)}, expected {tensor.axes}"
                    + (f" with {axis} = {known}" if isinstance(axis, str) else ""),
                    fix="Axes with the same name must have the same size in all inputs.",
                )
            if isinstance(axis, str) and size > limits.get(axis, size):
                raise InputError(
                    f"input {name}: {axis} is {size}, the model takes at most {limits[axis]}",
                    fix="Give fewer rows at a time." if axis == "batch" else "Truncate the input.",
                )
    return sizes
