"""What all uses of a model that writes text share: its tokenizer and chat templates, its sessions,
what they keep of earlier texts, and the steps that run before the text, such as encoders and vision
towers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Decoding, Exit, Gather
from edgeexit.bundle.policy import Decision, Policy, Rule, drop_thresholds
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, UsageError
from edgeexit.runtime.executor.blocks import CHUNK
from edgeexit.runtime.executor.components import Components, token_states
from edgeexit.runtime.executor.parts import release
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.executor.tables import Tables, check_ids
from edgeexit.runtime.programs.arguments import Prompt
from edgeexit.runtime.programs.every_exit import segment_times, trace_texts
from edgeexit.runtime.programs.features import FeatureCache
from edgeexit.runtime.programs.forward import CheckedInputs, InputSteps, Trace, check_inputs
from edgeexit.runtime.programs.generation import Generation
from edgeexit.runtime.programs.images import Image, take_images, write_images
from edgeexit.runtime.programs.modes.early import Fast
from edgeexit.runtime.programs.modes.full import Mode, Statistics, has_numbers
from edgeexit.runtime.programs.modes.pace import Pace
from edgeexit.runtime.programs.prefix_cache import PrefixCache
from edgeexit.runtime.programs.prompts import Prompts, pad_source, read_prompts
from edgeexit.runtime.programs.sampling import Sampling, own_sampling
from edgeexit.runtime.text.chat import ChatTemplates, Message
from edgeexit.runtime.text.tokenizer import encode, open_tokenizer


class TextProgram:
    """Text generation of a `edgeexit.runtime.model.Model`, which is its only subclass."""

    bundle: Bundle
    capacity: int
    unsplit: bool
    chain: Chain
    exits: list[Exit]
    policy: Policy
    chain_name: str
    chains: Mapping[str, Chain]
    _components: Components | None
    _decisions: dict[str, list[Decision]]
    _patience: dict[str, int]
    _steps: InputSteps
    _checked: CheckedInputs
    _lock: threading.Lock
    _check_usable: Callable[[], Components]
    _enter: Callable[[], None]
    describe_engine: Callable[[], dict[str, str]]
    features: FeatureCache
    prefixes: PrefixCache

    def _begin_texts(self, tables: Tables) -> None:
        """Sets up text generation; called by `Model`."""
        self._tables = tables
        self._session: Session | None = None
        self._paces: dict[int, dict[int, Pace]] = {}
        self._tokenizer: Any = None
        self._chat = ChatTemplates(self.bundle)
        self.features = FeatureCache()
        self.prefixes = PrefixCache()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as `generate` takes them.

        Args:
            text: Any text.
            special_tokens: Add the special tokens that the model expects around a prompt, such as
                a start token. The result of `chat_prompt` already has them.
        """
        return encode(self._tokenizers(), text, special_tokens=special_tokens)

    def prompts_with_images(
        self,
        prompts: Prompt | Sequence[Prompt],
        images: Image | Sequence[Image] | Sequence[Sequence[Image]],
        *,
        special_tokens: bool = True,
    ) -> tuple[list[Any], dict[str, NDArray[Any]]]:
        """Prompts and inputs as `generate` takes them, for prompts with images.

        Args:
            prompts, images: As for `generate`.
            special_tokens: As for `encode`.

        Raises:
            InputError: The number of images is not that of the placeholders; the model takes none.
            DataError: An image cannot be read.
        """

        def encode(text: str) -> list[int]:
            return self.encode(text, special_tokens=special_tokens)

        rows, inputs = write_images(self.bundle, prompts, images, encode)
        if self._decoding().start_tokens:  # an encoder reads the prompts
            return [], inputs | pad_source(self.bundle, rows)
        return rows, inputs

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that `chat` creates from a conversation, with the bundle's chat template.

        It contains the special tokens, so encode it without adding any. Special tokens inside a
        message have their special meaning, too: remove them from texts that you do not trust.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``.
            tools: Functions that the model may call, as JSON schemas.
            template: Name of a chat template; None: the default, or the template for tools.
            variables: Further variables of the template, as in ``{"enable_thinking": False}``.

        Raises:
            InputError: The bundle has no template, the messages are invalid, or the template fails
                on them or rejects them.
            BundleError: The template is damaged.
            EngineError: jinja2 is missing, or too old to be safe.
            UsageError: There is no template with that name.
        """
        plain, _ = take_images(messages)
        return self._chat.render(plain, tools=tools, template=template, variables=variables)

    def _decoding(self) -> Decoding:
        manifest = self.bundle.manifest
        if manifest.decoding is None:
            raise UsageError(
                f"{self.bundle.path} does not write text: its task is {manifest.task}",
                fix="Call the model with its inputs: model({...}) (edgeexit run --data).",
            )
        return manifest.decoding

    def _text_table(self) -> Gather:
        """The step that looks up the embeddings of a text's tokens."""
        tokens, steps = self._decoding().tokens, self.bundle.manifest.steps
        return next(step for step in steps if isinstance(step, Gather) and step.ids == tokens)

    @property
    def default_sampling(self) -> Sampling:
        """The sampling of calls without ``sampling``: the checkpoint's setting."""
        return own_sampling(self._decoding())

    def _tokenizers(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.bundle)
        return self._tokenizer

    def session(self, batch: int) -> Session:
        """An empty session for that many texts, under the current policy. The session is reused
        while the number of texts stays the same."""
        session = self._session_of(batch)
        session.empty()
        return session

    def _session_of(self, batch: int) -> Session:
        """As `session`, but it may still hold the last texts."""
        components, decoding = self._check_usable(), self._decoding()
        session = self._session
        if session is None or session.batch != batch or not has_numbers(session):
            release(session)
            self._session = None
            largest = components.engine.largest
            if batch > largest.get("batch", batch):
                raise InputError(
                    f"{batch} texts at a time: the engines were built for {largest['batch']}",
                    fix="Give fewer texts, or build for more: edgeexit build --max-shapes.",
                )
            chunk = min(CHUNK, self.capacity, largest.get("new", CHUNK))
            table = self._text_table()
            session = Session(
                components,
                self.chain,
                table,
                self._tables.table(table),
                decoding,
                batch,
                self.capacity,
                chunk,
            )
            self._session = session
        rule = self.policy.rules.get(self.chain_name, Rule())
        session.gates.thresholds = {} if self.unsplit else drop_thresholds(rule, self.chain)
        if session.ragged or session.gates.thresholds:
            session.empty()
        return session

    def _fetch(self, session: Session, mode: Mode, prompts: Prompts) -> list[int]:
        """How many of each prompt's first tokens need not be computed again; empty: all must be."""
        alike = not session.answers_itself or session.batch == 1  # else one length for all
        if prompts.inputs or not alike or not self._reusable(session):
            return []
        waiting = isinstance(mode, Fast)
        kept = [
            self.prefixes.fetch(session, row, tokens, mode.asked, waiting=waiting)
            for row, tokens in enumerate(prompts.tokens)
        ]
        # Rows run side by side, so the longest new part is padded behind the longest kept one.
        new = max(len(row) - count for row, count in zip(prompts.tokens, kept, strict=True))
        return kept if max(kept) + new < self.capacity else [min(kept)] * len(kept)

    def _reusable(self, session: Session) -> bool:
        """Whether what a token becomes depends on the tokens before it alone: not on an encoder's
        output, on gates, or on states of the whole prompt."""
        others = [chain for name, chain in self.chains.items() if name != self.chain_name]
        handed = {tensor.name for chain in others for tensor in chain.outputs}
        reads = any(part.reads_prompt for part in session.stateful)
        return not (session.takes & handed or session.ragged or reads)

    def _hand_on(
        self,
        session: Session,
        prompts: Prompts,
        generation: Generation,
        asked: Sequence[int] | None = None,
        kept: Sequence[int] = (),
    ) -> None:
        """Runs the steps before the text, and starts the session with their outputs. `asked`: as
        for `Model.trace`; `kept`: as for `Session.begin`."""
        handed: dict[str, NDArray[Any]] = {}
        if prompts.asks_earlier and self._steps.passes:
            self._checked.sizes(prompts.inputs)
            started = time.perf_counter()
            handed, generation.statistics.earlier = self._run_earlier(prompts, generation.chains_s)
            generation.earlier_s = time.perf_counter() - started
        for key in session.takes & handed.keys():
            if len(handed[key]) != len(prompts.tokens):
                raise InputError(
                    f"{key} has {len(handed[key])} rows for {len(prompts.tokens)} texts",
                    fix="Give one row of inputs for each text.",
                )
        lengths = [len(row) for row in prompts.tokens]
        session.begin(
            [n or length for n, length in zip(asked or lengths, lengths, strict=True)],
            prompts.prefix(handed),
            prompts.groups,
            {key: value for key, value in handed.items() if key in session.takes},
            kept,
        )
        gates, statistics = session.gates, generation.statistics
        statistics.gates, statistics.dropped = gates.scores, gates.dropped

    def _run_earlier(
        self, prompts: Prompts, seconds: dict[str, float]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, list[str]]]:
        """Runs the steps before the text. Returns all tensors, and the exit of each row of each
        chain. Images that were seen before do not run again. `seconds` receives the time of each
        chain."""
        known, answers = self._steps.run(
            prompts.inputs,
            self._decisions,
            patience=self._patience,
            features=self.features,
            seconds=seconds,
        )
        return known, {
            name: [self._steps.passes[name].exits[k].name for k in earlier.exits.tolist()]
            for name, earlier in answers.items()
        }

    def _trace_texts(
        self,
        tokens: NDArray[np.int64],
        inputs: Mapping[str, NDArray[Any]],
        step: int | None,
        asked: Sequence[int] | None,
    ) -> Trace:
        [tensor] = [t for t in self.bundle.manifest.inputs if t.name == self._decoding().tokens]
        check_inputs({tensor.name: tensor}, {tensor.name: tokens}, {})
        check_ids(self._text_table(), tokens)
        rows, length = tokens.shape
        if asked is not None and not (len(asked) == rows and all(0 <= n <= length for n in asked)):
            raise InputError(
                f"asked is {list(asked)} for {rows} texts of {length} tokens",
                fix=f"Give a number from 0 to {length} for each text.",
            )
        given = read_prompts(self.bundle, [row.tolist() for row in tokens], inputs, None)
        session = self.session(len(tokens))
        self._hand_on(session, given, Generation([], [], Statistics()), asked)
        return trace_texts(session, tokens, step)

    def segment_times(
        self, tokens: Sequence[int], inputs: Mapping[str, NDArray[Any]] | None = None
    ) -> list[float]:
        """Milliseconds of each component for one prompt, without exits, and of the last exit's head
        for its last token; for measurements.

        Args:
            tokens: Token ids of the prompt.
            inputs: Inputs of earlier chains, which are not timed.
        """
        self._enter()
        try:
            given = read_prompts(self.bundle, [list(tokens)], inputs, None)
            session = self.session(1)
            self._hand_on(session, given, Generation([], [], Statistics()))
            return segment_times(session, given.tokens[0])
        finally:
            self._lock.release()

    def _describe_states(self) -> dict[str, str]:
        components = self._check_usable()
        forms = dict.fromkeys(
            components[name].variant.states
            for name in self.chain.components
            if token_states(self.bundle.manifest.components[name])
        )
        return {"states": ", ".join(forms)}


__all__ = ["TextProgram"]
