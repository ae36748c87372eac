"""`Model`: a loaded bundle. A classifier is called; a language model generates text and chats
(`edgeexit.runtime.programs.generate`).

Only one thread may use a model at a time. Several models can run in parallel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgeexit.bundle.cautions import calibrated_rows, other_batch_size
from edgeexit.bundle.manifest import Chain, Exit, StateForm
from edgeexit.bundle.policy import Decision, Policy, Rule, decisions_of, policy_for, rule_of
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, StateError, UsageError
from edgeexit.runtime.executor.components import (
    EVERY_SCORE,
    NO_SCORE,
    Components,
    opened_early,
    outputs_asked,
    unsplit_chain,
)
from edgeexit.runtime.executor.launch_ahead import LaunchAhead
from edgeexit.runtime.executor.parts import release
from edgeexit.runtime.executor.tables import Tables
from edgeexit.runtime.loaded import Loaded
from edgeexit.runtime.programs.forward import CheckedInputs, InputSteps, Result, Trace
from edgeexit.runtime.programs.generate import Writer

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Counts

logger = logging.getLogger(__name__)

_NO_INPUTS: Mapping[str, NDArray[Any]] = {}


class Model(Writer, Loaded):
    """A loaded bundle. Created by `edgeexit.runtime.load`.

    Attributes:
        bundle: The bundle.
        chain: The chain that gives the answers; `chain_name` is its name in the bundle.
        exits: Its exits with the action ``stop``, in order. The last exit always answers.
        capacity: Language models: the largest number of tokens of a text, prompt included.
    """

    def __init__(
        self,
        bundle: Bundle,
        components: Components,
        policy: Policy,
        *,
        unsplit: bool = False,
        all_scores: bool = False,
        launch_ahead: LaunchAhead = "never",
        capacity: int = 0,
    ) -> None:
        Loaded.__init__(self)
        self.bundle, self.capacity, self.unsplit = bundle, capacity, unsplit
        manifest = bundle.manifest
        chains = manifest.chains
        if unsplit:
            chains = {name: unsplit_chain(chain) for name, chain in chains.items()}
            policy = Policy(rules={})
        self.chains: Mapping[str, Chain] = chains
        self.chain_name = next(n for n, c in manifest.chains.items() if c is manifest.last_chain)
        self.chain = chains[self.chain_name]
        self.exits: list[Exit] = self.chain.stops
        self._components: Components | None = components
        self._engine = components.engine
        self._lock = threading.Lock()
        self._policy = policy
        self._decisions: dict[str, list[Decision]] = {}
        self._patience: dict[str, int] = {}
        self._set_policy(policy)
        asked = {
            name: [EVERY_SCORE] * len(decisions)
            if all_scores
            else [d.score if d.consult else None for d in decisions]
            for name, decisions in self._decisions.items()
        }
        tables = Tables(bundle)
        if manifest.decoding is not None:
            name = manifest.decoding.chain
            heads = opened_early(chains[name], [ask or NO_SCORE for ask in asked.pop(name)])
            components.open(outputs_asked(manifest, chains[name], heads))
        self._steps = InputSteps(components, chains, tables, asked, launch_ahead)
        steps = self._steps
        self._checked = CheckedInputs(steps.takes, manifest.limits, steps.placed)
        self._begin_texts(tables)

    @property
    def policy(self) -> Policy:
        """When rows stop. Assign another policy, or a rule for the only chain with exits."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | Rule) -> None:
        self.features.clear()
        self._set_policy(Policy(rules={}) if self.unsplit else policy_for(policy, self.bundle))

    def _set_policy(self, policy: Policy) -> None:
        decisions = {n: decisions_of(policy, chain, n) for n, chain in self.chains.items()}
        self._patience = {n: rule_of(policy, chain, n).patience for n, chain in self.chains.items()}
        self._policy, self._decisions = policy, decisions
        self._calibrated_rows = calibrated_rows(policy, self.chains) if policy.rules else None
        self._rows_before: int | None = None

    @property
    def decisions(self) -> list[Decision]:
        """The policy's decision at each of `exits`."""
        return self._decisions[self.chain_name]

    @property
    def writes(self) -> bool:
        """Whether it is a language model: it writes text token by token."""
        return self.bundle.manifest.decoding is not None

    @property
    def device_counts(self) -> Counts | None:
        """Allocations and copied bytes on the GPU so far. None on the host."""
        gpu = self._engine.gpu
        return None if gpu is None else gpu.counts

    @property
    def largest(self) -> Mapping[str, int]:
        """Named axis -> largest size that the engine accepts. Other axes are not limited."""
        return self._engine.largest

    @property
    def boundaries(self) -> list[dict[str, float | int | bool]]:
        """Measurements per exit except the last, for single rows under this policy: rows that were
        scored (``asked``) and that stopped (``left``), the GPU's idle time and the next component's
        time in ms, and whether that is launched ahead. Empty unless loaded with `launch_ahead`."""
        row_pass = self._steps.passes.get(self.chain_name)
        if row_pass is None or row_pass.ahead is None:
            return []
        return row_pass.ahead.facts(row_pass.ahead.shares(self.decisions))

    @property
    def state_form(self) -> StateForm | None:
        """The requested form of token states; None: the fastest."""
        return self._check_usable().form

    def __call__(
        self,
        inputs: Mapping[str, NDArray[Any]] = _NO_INPUTS,
        *,
        timed: bool = False,
        **named: object,
    ) -> Result:
        """Runs a batch.

        Args:
            inputs: Input name -> array, as in the manifest's `inputs`: exact dtypes, at least one
                row.
            timed: Measure the time of every component.

        Raises:
            InputError: An input is missing, unknown, or of the wrong type or shape.
            UsageError: The model is a language model, or inputs were given as keywords.
            StateError: The model is closed, in use by another thread, or was loaded before a fork.
        """
        if self.bundle.manifest.decoding is not None:
            raise UsageError(
                f"{self.bundle.path} writes text: it cannot be called with inputs",
                fix="Use model.generate(prompt) (edgeexit run --prompt).",
            )
        if named:
            raise UsageError(
                f"{next(iter(named))} is not a keyword of a model",
                fix="Give the inputs as one dictionary: model(inputs), not model(**inputs).",
            )
        self._enter()
        try:
            sizes = self._checked.sizes(inputs)
            answers = self._steps.answer(
                inputs, sizes, self._decisions, patience=self._patience, timed=timed
            )
        finally:
            self._lock.release()
        last = answers.pop(self.chain_name)
        if self._calibrated_rows is not None:
            self._warn_of_batch_size(len(last.exits))
        return Result(
            last.outputs,
            last.exits,
            [self.exits[number].name for number in last.exits.tolist()],
            last.scores,
            [time_ns / 1e6 for time_ns in last.times_ns],
            {
                name: [self.chains[name].stops[number].name for number in earlier.exits.tolist()]
                for name, earlier in answers.items()
            },
        )

    def _warn_of_batch_size(self, rows: int) -> None:
        """Warns once if batches differ from those of the policy's calibration. A smaller batch
        after one of that size is taken for the last one of a data set."""
        calibrated, before = self._calibrated_rows, self._rows_before
        self._rows_before = rows
        last_of_data = calibrated is not None and rows < calibrated == before
        if rows != calibrated and not last_of_data:
            logger.warning("%s", other_batch_size(calibrated, rows))
            self._calibrated_rows = None

    def trace(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        chain: str | None = None,
        step: int | None = None,
        asked: Sequence[int] | None = None,
    ) -> Trace:
        """Runs every component for every row and returns the outputs and scores of every exit.

        A model that was loaded without ``all_scores`` opens its components again with every score
        and keeps them: later calls are then some percent slower in small models.

        Args:
            inputs: Every input. For a language model also token ids ``[batch, seq]``; all texts
                have the same length.
            chain: The chain whose exits are traced; None: the chain that gives the answers.
                Earlier chains use their last exit; those of a language model stop where the
                policy says.
            step: Tokens per run; None: as many as possible.
            asked: ``[batch]``, how many of a text's tokens are its prompt, which gates read; the
                others are an answer. 0 or None: all are.
        """
        name = self.chain_name if chain is None else chain
        if name not in self.chains:
            raise UsageError(
                f"there is no chain {name!r}", fix=f"Use one of {', '.join(self.chains)}."
            )
        self._enter()
        try:
            decoding = self.bundle.manifest.decoding
            if decoding is None:
                self._checked.sizes(inputs)
                return self._steps.trace(inputs, name)
            given = dict(inputs)
            tokens = given.pop(decoding.tokens, None)
            self._checked.sizes(given)
            if name != decoding.chain:
                return self._steps.trace(given, name)
            if tokens is None:
                raise InputError(
                    f"input {decoding.tokens} is missing", fix="Give token ids [batch, seq]."
                )
            return self._trace_texts(tokens, given, step, asked)
        finally:
            self._lock.release()

    def _describe_engine(self) -> dict[str, str]:
        about = self._engine.describe()
        return about | self._describe_states() if self.writes else about

    def close(self) -> None:
        if self._forked:
            return  # a thread of the parent may have held the lock at the fork
        if self._components is None:
            return
        if self.writes:
            session, self._components, self._session = self._session, None, None
            if self._lock.acquire(blocking=False):
                release(session)
                self._lock.release()
            # Otherwise a generation is running: it ends at its next token.
        else:
            with self._lock:
                self._components = None
        self._steps.passes.clear()

    def _check_usable(self) -> Components:
        self._check_process()
        if self._components is None:
            raise self._closed()
        return self._components

    def _enter(self) -> None:
        """Takes the model for one call; the caller releases the lock."""
        self._check_process()
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "the model is in use: by another thread, or it is writing a text",
                fix="Finish or close the text first; give each thread a model of its own, or put a "
                "lock around the calls.",
            )
        if self._components is None:
            self._lock.release()
            raise self._closed()


__all__ = ["Model"]
