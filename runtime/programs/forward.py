"""The ``forward`` program: one pass, each row answered at the exit where its own score says so.

`Model` is what `load` returns. It checks inputs against the manifest, runs the chain, and hands out
copies. One model is used by one thread at a time; several models may run side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Exit, Tensor
from edgeexit.bundle.policy import Decision, Policy, decide
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, PolicyError, StateError
from edgeexit.runtime.engines.base import Engine
from edgeexit.runtime.executor.chain import Chain
from edgeexit.runtime.loaded import Loaded

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Counts

FORMS_KEPT = 1024
"""Forms of inputs (dtypes and shapes) that a model remembers having checked."""


@dataclass(slots=True)
class Result:
    """What a call gives. All arrays are copies, in the caller's order of rows.

    Attributes:
        outputs: Output name -> ``[batch, ...]``, each row from the exit where it left.
        exits: ``[batch]``, index of the exit taken.
        exit_names: Name of that exit, per row.
        scores: ``[batch]`` float32, the policy's score at that exit.
        times_ms: Milliseconds of each segment that ran, in order; empty unless asked for.
    """

    outputs: dict[str, NDArray[Any]]
    exits: NDArray[np.int64]
    exit_names: list[str]
    scores: NDArray[np.float32]
    times_ms: list[float]


@dataclass(frozen=True)
class Trace:
    """Every exit's answer for every row, from `Model.trace`.

    Attributes:
        outputs: Per exit, output name -> ``[batch, ...]``.
        scores: Per exit, score name -> ``[batch]`` float32.
        times_ms: Milliseconds of each segment.
    """

    outputs: list[dict[str, NDArray[Any]]]
    scores: list[dict[str, NDArray[Any]]]
    times_ms: list[float]


class Model(Loaded):
    """A loaded bundle with a ``forward`` program. Made by `edgeexit.runtime.load`.

    Attributes:
        bundle: The bundle it was loaded from.
        exits: Its exits in order; the last one always answers.
        policy: The policy in force; assign another to change it.
    """

    def __init__(self, bundle: Bundle, chain: Chain, engine: Engine, policy: Policy) -> None:
        super().__init__()
        self.bundle = bundle
        self.exits: list[Exit] = chain.exits
        self._chain: Chain | None = chain
        self._engine = engine
        self._inputs = {tensor.name: tensor for tensor in bundle.manifest.inputs}
        self._forms: dict[Any, dict[str, int]] = {}
        self._lock = threading.Lock()
        self._policy = policy
        self._decisions: list[Decision] = []
        self.policy = policy

    @property
    def policy(self) -> Policy:
        """When rows stop."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise PolicyError(
                f"policy is a {type(policy).__name__}",
                fix="Assign a Policy; read_policy reads one.",
            )
        decisions = decide(policy, self.exits, digest=self.bundle.digest)
        if policy.patience and any("logits" not in leave.outputs for leave in self.exits):
            raise PolicyError(
                "patience compares predicted classes, and an exit of this bundle has no logits",
                fix="Use a policy without patience.",
            )
        self._policy, self._decisions = policy, decisions

    @property
    def device_counts(self) -> Counts | None:
        """What the GPU was asked for so far: allocations and bytes copied. None on the host."""
        gpu = self._engine.gpu
        return None if gpu is None else gpu.counts

    @property
    def largest(self) -> Mapping[str, int]:
        """The largest sizes of named axes that its engine takes; what is not there is not limited
        by it."""
        return self._engine.largest

    @property
    def boundaries(self) -> list[dict[str, float | int | bool]]:
        """Per exit but the last, of rows that came alone: how many were asked and left there under
        this policy, the milliseconds that the GPU stood still behind it and that the next segment
        took, and whether that is launched ahead. Empty unless loaded with `launch_ahead`."""
        ahead = None if self._chain is None else self._chain.ahead
        if ahead is None:
            return []
        return ahead.facts(ahead.shares(self._decisions, self._policy.score))

    def __call__(self, inputs: Mapping[str, NDArray[Any]], *, timed: bool = False) -> Result:
        """Answers a batch.

        Args:
            inputs: Input name -> array, as the manifest's `inputs` say: exact dtypes, at least one
                row.
            timed: Report the time of every segment.

        Raises:
            InputError: An input is missing, unknown, or of the wrong type or shape.
            StateError: The model is closed, in use by another thread, or was carried over a fork.
        """
        chain = self._enter()
        try:
            answers = chain.run(
                inputs,
                self._sizes(inputs),
                self._decisions,
                score=self._policy.score,
                patience=self._policy.patience,
                timed=timed,
            )
        finally:
            self._lock.release()
        return Result(
            answers.outputs,
            answers.exits,
            [self.exits[number].name for number in answers.exits.tolist()],
            answers.scores,
            [time_ns / 1e6 for time_ns in answers.times_ns],
        )

    def trace(self, inputs: Mapping[str, NDArray[Any]]) -> Trace:
        """Runs every segment for every row and returns what every exit says.

        A model that was loaded without ``all_scores`` opens its segments again for this, and keeps
        them so: later calls compute every score, which costs small models some percent.
        """
        chain = self._enter()
        try:
            records, times_ns = chain.run_all(inputs, self._sizes(inputs), timed=True)
        finally:
            self._lock.release()
        prefix = "score/"
        return Trace(
            outputs=[{k: v for k, v in r.items() if not k.startswith(prefix)} for r in records],
            scores=[
                {k.removeprefix(prefix): v for k, v in r.items() if k.startswith(prefix)}
                for r in records
            ],
            times_ms=[time_ns / 1e6 for time_ns in times_ns],
        )

    def _describe_engine(self) -> dict[str, str]:
        return self._engine.describe()

    def close(self) -> None:
        if self._forked:
            return  # a thread of the parent may have held the lock at the fork, for ever
        with self._lock:
            self._chain = None

    def _sizes(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """`check_inputs`, remembered for forms seen before."""
        try:
            form: Any = tuple([(inputs[name].dtype, inputs[name].shape) for name in self._inputs])
            known = self._forms.get(form) if len(inputs) == len(self._inputs) else None
        except (AttributeError, LookupError, TypeError):
            form = known = None
        if known is None:
            known = check_inputs(self._inputs, inputs, self.bundle.manifest.limits)
            if len(self._forms) < FORMS_KEPT:
                self._forms[form] = known
        return known

    def _enter(self) -> Chain:
        """Takes the model for one call; the caller releases the lock."""
        self._check_process()
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "the model is in use by another thread",
                fix="Give each thread a model of its own, or put a lock around the calls.",
            )
        if self._chain is None:
            self._lock.release()
            raise self._closed()
        return self._chain


def check_inputs(
    expected: Mapping[str, Tensor], inputs: Mapping[str, NDArray[Any]], limits: Mapping[str, int]
) -> dict[str, int]:
    """Checks inputs against a signature. Returns the size of every symbolic axis.

    Raises:
        InputError: Naming the input, what is wrong, and what was expected.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs are a {type(inputs).__name__}, not a mapping",
            fix=f"Call model({{{', '.join(f'{name!r}: array' for name in expected)}}}).",
        )
    if inputs.keys() != expected.keys():
        missing = sorted(expected.keys() - inputs.keys())
        unknown = sorted(str(name) for name in inputs.keys() - expected.keys())
        what = f"input {missing[0]} is missing" if missing else f"there is no input {unknown[0]}"
        raise InputError(what, fix=f"The model takes {', '.join(expected)}.")
    sizes: dict[str, int] = {}
    for name, tensor in expected.items():
        value = inputs[name]
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
                fix="Batches have a leading axis for rows, also when there is only one.",
            )
        for axis, size in zip(tensor.axes, value.shape, strict=True):
            known = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            if size == 0:
                raise InputError(
                    f"input {name} is empty (shape {list(value.shape)})",
                    fix="Give at least one row.",
                )
            if known is not None and known != size:
                raise InputError(
                    f"input {name} has the shape {list(value.shape)}, expected {tensor.axes}"
                    + (f" with {axis} = {known}" if isinstance(axis, str) else ""),
                    fix="All inputs share the sizes of axes of the same name.",
                )
            if isinstance(axis, str) and size > limits.get(axis, size):
                raise InputError(
                    f"input {name}: {axis} is {size}, the model takes at most {limits[axis]}",
                    fix="Truncate the input.",
                )
    return sizes
