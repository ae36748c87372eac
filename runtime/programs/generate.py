"""Text generation, token by token, in one of several modes.

`TextProgram` is the part of `edgeexit.runtime.model.Model` that generates text. `generate`
continues prompts and `chat` answers conversations; `edgeexit.runtime.programs.arguments` checks the
arguments. Both return a `Generation`: an iterator over pieces, with statistics that are updated
while it runs.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Decoding, Exit, Gather
from edgeexit.bundle.policy import Decision, Policy, Rule, drop_thresholds
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, StateError, UsageError
from edgeexit.runtime.executor.components import Components, token_states
from edgeexit.runtime.executor.parts import release
from edgeexit.runtime.executor.session import CHUNK, Session
from edgeexit.runtime.executor.tables import Tables, check_ids
from edgeexit.runtime.programs.arguments import (
    ModeName,
    Options,
    Prompt,
    check_options,
    check_room,
    stop_strings,
)
from edgeexit.runtime.programs.every_exit import trace_texts
from edgeexit.runtime.programs.forward import CheckedInputs, InputSteps, Trace, check_inputs
from edgeexit.runtime.programs.generation import Generation, Piece, Rounds
from edgeexit.runtime.programs.modes.choose import Drafting, check_mode, make_mode
from edgeexit.runtime.programs.modes.early import Fast
from edgeexit.runtime.programs.modes.exact import Pace
from edgeexit.runtime.programs.modes.full import Mode, Statistics
from edgeexit.runtime.programs.prompts import Prompts, check_alike, read_prompts
from edgeexit.runtime.programs.sampling import Sampler, Sampling, own_sampling, sampler_of
from edgeexit.runtime.text.chat import ChatTemplates, Message, conversations
from edgeexit.runtime.text.tokenizer import Stream, encode, open_tokenizer

if TYPE_CHECKING:
    from typing import Unpack  # from Python 3.11 on

logger = logging.getLogger(__name__)

NEW_TOKENS = 128
"""Default of `max_new_tokens`."""


class TextProgram:
    """Text generation of a `edgeexit.runtime.model.Model`, which is its only subclass."""

    bundle: Bundle
    capacity: int
    unsplit: bool
    chain: Chain
    exits: list[Exit]
    policy: Policy
    chain_name: str
    _components: Components | None
    _decisions: dict[str, list[Decision]]
    _patience: dict[str, int]
    _steps: InputSteps
    _checked: CheckedInputs
    _lock: threading.Lock
    _check_usable: Callable[[], Components]

    def _begin_texts(self, tables: Tables) -> None:
        """Sets up text generation; called by `Model`."""
        self._tables = tables
        self._session: Session | None = None
        self._paces: dict[int, dict[int, Pace]] = {}
        self._tokenizer: Any = None
        self._chat = ChatTemplates(self.bundle)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        inputs: Mapping[str, NDArray[Any]] | None = None,
        max_new_tokens: int | None = None,
        mode: ModeName = "full",
        draft_exit: str | None = None,
        drafts: int | None = None,
        draft_threshold: float = 0.0,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        audit: bool = False,
        text: bool = True,
        on_piece: Callable[[Piece], object] | None = None,
    ) -> Generation:
        """Continues prompts.

        Args:
            prompts: A text or a list of token ids; or a batch of either.
            inputs: Inputs of earlier chains, by name. Encoders: one row per prompt (without inputs,
                the prompt text is encoded). Images and the like: one row per item, in the order of
                the placeholders in the prompts.
            max_new_tokens: Most new tokens per row; None: 128, or fewer if the capacity is smaller.
            mode: ``full``: every layer runs for every token. ``exact``: the same tokens, but an
                early exit drafts them and the last exit verifies them. ``fast``: a token stops at
                the first exit whose score reaches the policy's threshold; later layers catch up
                afterwards. ``approximate``: as ``fast``, but later layers never catch up: their
                projections compute keys and values from the exit's state.
            draft_exit: The exit that drafts (``exact``); None: the most profitable exit.
            drafts: Tokens per draft (``exact``); None: adapted to the acceptance rate.
            draft_threshold: Stop drafting when the drafting exit's score is below this.
            sampling: How tokens are chosen; None: the checkpoint's setting (`default_sampling`).
                ``Sampling()`` takes the most likely token.
            stop: Strings that end a row; they are not part of the result.
            audit: Also compute the last exit's token wherever an early exit answered, given the
                text so far (``fast``).
            text: Return text as well as tokens, if the bundle has a tokenizer. False saves time.
            on_piece: Called with every piece before it is yielded.

        Raises:
            InputError: A prompt is empty, too long for the capacity, or has unknown token ids; or
                its number of placeholders differs from the number of rows for them.
            UsageError: Invalid arguments; prompts of different lengths for the unsplit graph; the
                model does not write text.
            StateError: The model is closed, in use, or was loaded before a fork.
        """
        max_new_tokens = check_options(
            mode,
            max_new_tokens,
            draft_exit=draft_exit,
            drafts=drafts,
            draft_threshold=draft_threshold,
            sampling=sampling,
            audit=audit,
            on_piece=on_piece,
        )
        self._check_usable()
        self._decoding()
        drafting = Drafting(draft_exit, drafts, draft_threshold)
        self._check_mode(mode, drafting)
        stops = stop_strings(stop)
        given = read_prompts(self.bundle, prompts, inputs, self.encode)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(NEW_TOKENS, self.capacity - max(given.lengths)))
        limit = self.bundle.manifest.limits.get("positions")
        for row, length in zip(given.tokens, given.lengths, strict=True):
            check_ids(self._text_table(), row)
            check_room(length, max_new_tokens, self.capacity, limit)
        if self.unsplit:
            check_alike(given.tokens)
        if given.asks_earlier:
            self._checked.sizes(given.inputs)
        rows = len(given.tokens)
        generation = Generation([[] for _ in range(rows)], [""] * rows, Statistics())
        sampling = self.default_sampling if sampling is None else sampling
        sampler = sampler_of(sampling, given.tokens, self._text_table().size)
        # A weak reference: with a cycle, a generation that is deleted before its end would block
        # the model until garbage collection.
        generation._pieces = self._write(
            weakref.proxy(generation),
            given,
            lambda session: self._mode(session, mode, sampler, drafting, audit=audit),
            max_new_tokens,
            stops,
            on_piece,
            text=text,
        )
        return generation

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Answers a conversation, or a batch of conversations.

        Calls are independent. To continue a conversation, append the answer as a message of the
        assistant, then the next question.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``, or a list of such lists.
            tools, template, variables: As for `chat_prompt`.
            options: Arguments of `generate`.

        Raises:
            EdgeExitError: What `chat_prompt` and `generate` raise.
        """
        self._decoding()
        prompts = [
            self.chat_prompt(conversation, tools=tools, template=template, variables=variables)
            for conversation in conversations(messages)
        ]
        # The template has already added the special tokens.
        return self.generate([self.encode(p, special_tokens=False) for p in prompts], **options)

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
        return self._chat.render(messages, tools=tools, template=template, variables=variables)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as `generate` takes them.

        Args:
            text: Any text.
            special_tokens: Add the special tokens that the model expects around a prompt, such as
                a start token. The result of `chat_prompt` already has them.
        """
        return encode(self._tokenizers(), text, special_tokens=special_tokens)

    def _write(
        self,
        generation: Generation,
        prompts: Prompts,
        make_mode: Callable[[Session], Mode],
        most: int,
        stops: Sequence[str],
        on_piece: Callable[[Piece], object] | None,
        *,
        text: bool,
    ) -> Generator[Piece, None, None]:
        """Runs the rounds. Holds the lock until the iterator ends or is deleted."""
        self._check_usable()
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "the model is writing another text",
                fix="Finish or close the other generation first, or load a second model.",
            )
        try:
            ends = set(self._decoding().stop_tokens)
            streams = None
            if (text and self.bundle.manifest.tokenizer is not None) or stops:
                tokenizer = self._tokenizers()
                before = zip(prompts.tokens, prompts.lengths, strict=True)
                streams = [Stream(tokenizer, stops, row[:n].tolist()) for row, n in before]
            started = time.perf_counter()
            session = self.session(len(prompts.tokens))
            mode = make_mode(session)
            generation.statistics = mode.statistics
            self._hand_on(session, prompts, generation)
            rounds = Rounds(generation, mode, streams, ends, most, on_piece)
            yield from rounds.run(prompts.tokens, prompts.forced, started, self._check_usable)
            if isinstance(mode, Fast) and mode.audit:
                mode.flush()
        finally:
            self._lock.release()

    def _mode(
        self,
        session: Session,
        mode: ModeName,
        sampler: Sampler | None,
        drafting: Drafting,
        *,
        audit: bool,
    ) -> Mode:
        decisions = self._decisions[self.chain_name]
        paces = self._paces.setdefault(session.batch, {})
        return make_mode(session, mode, decisions, drafting, sampler, paces, audit=audit)

    def _check_mode(self, mode: ModeName, drafting: Drafting) -> None:
        """Raises `UsageError` for modes and options that the bundle does not support."""
        if mode != "full" and self.unsplit:
            raise UsageError("the unsplit graph has no exits", fix='Use mode="full".')
        check_mode(self.bundle, self.chain, mode, drafting)

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
        components, decoding = self._check_usable(), self._decoding()
        session = self._session
        if session is None or session.batch != batch:
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
        session.empty()
        rule = self.policy.rules.get(self.chain_name, Rule())
        session.gates.thresholds = {} if self.unsplit else drop_thresholds(rule, self.chain)
        return session

    def _hand_on(self, session: Session, prompts: Prompts, generation: Generation) -> None:
        """Runs the steps before the text, and starts the session with their outputs."""
        handed: dict[str, NDArray[Any]] = {}
        if prompts.asks_earlier and self._steps.passes:
            self._checked.sizes(prompts.inputs)
            handed, answers = self._steps.run(
                prompts.inputs, self._decisions, patience=self._patience
            )
            generation.statistics.earlier = {
                name: [self._steps.passes[name].exits[k].name for k in earlier.exits.tolist()]
                for name, earlier in answers.items()
            }
        for key in session.takes & handed.keys():
            if len(handed[key]) != len(prompts.tokens):
                raise InputError(
                    f"{key} has {len(handed[key])} rows for {len(prompts.tokens)} texts",
                    fix="Give one row of inputs for each text.",
                )
        session.begin(
            [len(row) for row in prompts.tokens],
            prompts.prefix(handed),
            prompts.groups,
            {key: value for key, value in handed.items() if key in session.takes},
        )

    def _trace_texts(
        self, tokens: NDArray[np.int64], inputs: Mapping[str, NDArray[Any]], step: int | None
    ) -> Trace:
        [tensor] = [t for t in self.bundle.manifest.inputs if t.name == self._decoding().tokens]
        check_inputs({tensor.name: tensor}, {tensor.name: tokens}, {})
        check_ids(self._text_table(), tokens)
        given = read_prompts(self.bundle, [row.tolist() for row in tokens], inputs, None)
        session = self.session(len(tokens))
        self._hand_on(session, given, Generation([], [], Statistics()))
        return trace_texts(session, tokens, step)

    def _describe_states(self) -> dict[str, str]:
        components = self._check_usable()
        forms = dict.fromkeys(
            components[name].variant.states
            for name in self.chain.components
            if token_states(self.bundle.manifest.components[name])
        )
        return {"states": ", ".join(forms)}


__all__ = ["TextProgram"]
