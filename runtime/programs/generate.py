"""The ``decode`` program: text that grows token by token, in one of several modes.

`Decoder` is what `load_decoder` returns. `Decoder.generate` continues prompts and `Decoder.chat`
answers conversations; `edgeexit.runtime.programs.arguments` refuses what they cannot be given. Both
return a `Generation`: an iterator over pieces as they come, with statistics that fill while it
runs.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from edgeexit.bundle.manifest import Exit
from edgeexit.bundle.policy import Policy, decide
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, StateError, UsageError
from edgeexit.runtime.executor.session import CHUNK, Form, Opened, Session, check_tokens
from edgeexit.runtime.loaded import Loaded
from edgeexit.runtime.programs.arguments import (
    ModeName,
    Prompt,
    check_options,
    stop_strings,
    token_rows,
)
from edgeexit.runtime.programs.modes.early import Approximate, Fast
from edgeexit.runtime.programs.modes.exact import Exact, Pace
from edgeexit.runtime.programs.modes.full import Full, Ints, Mode, Statistics
from edgeexit.runtime.programs.sampling import Sampler, Sampling
from edgeexit.runtime.text.chat import ChatTemplates, Message
from edgeexit.runtime.text.tokenizer import Stream, encode, open_tokenizer

if TYPE_CHECKING:
    from typing import Unpack  # from Python 3.11 on

logger = logging.getLogger(__name__)

NEW_TOKENS = 128
"""Tokens made where the caller names no number."""


class Options(TypedDict, total=False):
    """The arguments of `Decoder.generate` besides the prompts, which `Decoder.chat` takes too."""

    max_new_tokens: int | None
    mode: ModeName
    draft_exit: str | None
    drafts: int | None
    draft_threshold: float
    sampling: Sampling | None
    stop: str | Sequence[str]
    audit: bool
    text: bool
    on_piece: Callable[[Piece], object] | None


@dataclass(frozen=True)
class Piece:
    """What came at once for one row: tokens, and the text that they make certain."""

    row: int
    tokens: list[int]
    text: str


@dataclass
class Generation:
    """Texts being written. Iterate over it, or call `finish`; closing or dropping it ends it early.

    Attributes:
        tokens: Per row, the tokens made so far; a stop token is not among them.
        texts: Per row, the text given out so far; empty strings without a tokenizer.
        statistics: What happened so far.
        first_token_s: Seconds to the first token, the prompt included.
        decode_s: Seconds from the first token to the last.
    """

    tokens: list[list[int]]
    texts: list[str]
    statistics: Statistics
    first_token_s: float = 0.0
    decode_s: float = 0.0
    _pieces: Generator[Piece, None, None] = field(default_factory=lambda: _no_pieces(), repr=False)
    _failed: str | None = field(default=None, repr=False)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second over all rows, from the second token on."""
        made = sum(map(len, self.tokens)) - len(self.tokens)
        return made / self.decode_s if self.decode_s and made > 0 else None

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Piece:
        if self._failed is not None:
            raise StateError(
                f"this text ended with an error ({self._failed}); it is not whole",
                fix="Generate it again.",
            )
        try:
            return next(self._pieces)
        except StopIteration:
            raise
        except BaseException as error:
            self._failed = type(error).__name__
            raise

    def finish(self) -> Generation:
        """Runs to the end and returns itself."""
        for _ in self:
            pass
        return self

    def close(self) -> None:
        """Ends it where it is; the model is free for the next text."""
        self._pieces.close()


def _no_pieces() -> Generator[Piece, None, None]:
    yield from ()


class Decoder(Loaded):
    """A loaded decoder. Made by `edgeexit.runtime.load_decoder`.

    Attributes:
        bundle: The bundle it was loaded from.
        exits: Its exits in order; the last one always answers.
        policy: The policy of ``fast`` decoding.
        capacity: The most tokens of a text, prompt included.
    """

    def __init__(self, bundle: Bundle, opened: Opened, policy: Policy, capacity: int) -> None:
        super().__init__()
        self.bundle = bundle
        self.exits: list[Exit] = bundle.exits()
        self.policy = policy
        self.capacity = capacity
        self._opened: Opened | None = opened
        self._session: Session | None = None
        self._paces: dict[int, dict[int, Pace]] = {}
        self._tokenizer: Any = None
        self._chat = ChatTemplates(bundle)
        self._lock = threading.Lock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
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
            prompts: A text or a list of token ids, or several of either: a batch.
            max_new_tokens: The most tokens to make per row; None: 128, or as many as the capacity
                has room for.
            mode: ``full``: every layer for every token. ``exact``: the same tokens, drafted by an
                early exit and verified. ``fast``: a token leaves at the exit where the policy says
                so, and the layers behind it catch up later. ``approximate``: the same, but they
                never do: they keep what their projections make of the exit's state.
            draft_exit: The exit that drafts (``exact``); None: the one that pays most.
            drafts: Tokens of a draft (``exact``); None: adapted to what is accepted.
            draft_threshold: Stop drafting when the drafting exit's score is below.
            sampling: How tokens are drawn; None: the likeliest one is taken.
            stop: Strings that end a row; they are not given out.
            audit: Compute what the last exit says to tokens of early exits (``fast``).
            text: Give out text as well as tokens, where the bundle has a tokenizer; False saves
                the time that takes.
            on_piece: Called with every piece before it is yielded.

        Raises:
            InputError: A prompt is empty, too long for the capacity, or holds unknown token ids.
            UsageError: Arguments that cannot be meant; prompts of unlike length for the unsplit
                graph.
            StateError: The model is closed, in use, or was carried over a fork.
        """
        max_new_tokens = check_options(
            mode,
            max_new_tokens,
            draft_exit=draft_exit,
            drafts=drafts,
            draft_threshold=draft_threshold,
            sampling=sampling,
            audit=audit,
        )
        opened = self._check_usable()
        stops = stop_strings(stop)
        rows = token_rows(prompts, self.encode)
        longest = max(len(row) for row in rows)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(NEW_TOKENS, self.capacity - longest))
        for row in rows:
            check_tokens(opened, row)
            if len(row) + max_new_tokens > self.capacity:
                larger = (
                    f", or load with a larger capacity (up to {opened.limit})"
                    if self.capacity < opened.limit
                    else " (the model was made for no more)"
                )
                raise InputError(
                    f"a prompt of {len(row)} token{'s' * (len(row) != 1)} and {max_new_tokens} new "
                    f"one{'s' * (max_new_tokens != 1)} need {len(row) + max_new_tokens} places, "
                    f"the capacity is {self.capacity}",
                    fix=f"Shorten the prompt or lower max_new_tokens{larger}.",
                )
        self._position(draft_exit, [leave.name for leave in self.exits])
        if mode != "full" and opened.head is None:
            raise UsageError("the unsplit graph has no exits", fix='Use mode="full".')
        if mode == "approximate" and not opened.skippable:
            raise UsageError(
                f"{self.bundle.path} cannot be run in mode approximate: "
                + (
                    "its exits have adapters, whose caches would miss the tokens that left"
                    if opened.adapters
                    else "it has no projections for tokens that skip a segment"
                ),
                fix="Use another mode.",
            )
        # It answers for the last place of a run, which rows of unlike length do not share.
        if opened.head is None and len(lengths := {len(row) for row in rows}) > 1:
            raise UsageError(
                "the unsplit graph takes prompts of one length, these have from "
                f"{min(lengths)} to {longest} tokens",
                fix="Give them one at a time, or load without unsplit.",
            )
        generation = Generation([[] for _ in rows], ["" for _ in rows], Statistics())
        sampler = None
        if sampling is not None and sampling.temperature > 0:
            sampler = Sampler(sampling, [row.tolist() for row in rows])
        # Weak, or the text and its rounds would hold each other: one that is dropped in the middle
        # shall free the model at once.
        generation._pieces = self._write(
            weakref.proxy(generation),
            rows,
            lambda session: self._mode(
                session, mode, sampler, draft_exit, drafts, draft_threshold, audit=audit
            ),
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
        """Answers a conversation, or several: a batch.

        Nothing is kept from one call to the next: to go on, add the answer as a message of the
        assistant, then the next question.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``, or a list of such lists.
            tools, template, variables: As for `chat_prompt`.
            options: Arguments of `generate`.

        Raises:
            EdgeExitError: What `chat_prompt` and `generate` raise.
        """
        several = isinstance(messages, Sequence) and bool(messages)
        several = several and all(isinstance(one, (list, tuple)) for one in messages)
        conversations: Any = messages if several else [messages]
        prompts = [
            self.chat_prompt(one, tools=tools, template=template, variables=variables)
            for one in conversations
        ]
        # The template has written the special tokens already.
        return self.generate([self.encode(p, special_tokens=False) for p in prompts], **options)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that `chat` gives the model for a conversation, made by its chat template.

        Special tokens are part of it, so encode it without adding any. They count as such wherever
        they stand, in a message too: remove them from texts that you do not trust.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``.
            tools: Functions that the model may call, as JSON schemas.
            template: Name of the bundle's chat template; None: its default, or the one for tools.
            variables: More for the template, as in ``{"enable_thinking": False}``.

        Raises:
            InputError: The bundle has no template, the messages are none, or the template fails
                on them or refuses them.
            BundleError: The template is damaged.
            EngineError: jinja2 is missing, or too old to be safe.
            UsageError: There is no template of that name.
        """
        return self._chat.render(messages, tools=tools, template=template, variables=variables)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as `generate` takes them.

        Args:
            text: Any text.
            special_tokens: Add those that the model expects around a prompt (a first one, say);
                what `chat_prompt` gives has them already.
        """
        return encode(self._tokenizers(), text, special_tokens=special_tokens)

    def _write(
        self,
        generation: Generation,
        prompts: list[Ints],
        make_mode: Callable[[Session], Mode],
        most: int,
        stops: Sequence[str],
        on_piece: Callable[[Piece], object] | None,
        *,
        text: bool,
    ) -> Generator[Piece, None, None]:
        """Runs the rounds. The lock is held while the iterator lives."""
        opened = self._check_usable()
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "the model is writing another text",
                fix="Finish or close that generation first, or load a second model.",
            )
        try:
            ends = set(opened.decoding.stop_tokens)
            streams = None
            if (text and self.bundle.manifest.tokenizer is not None) or stops:
                tokenizer = self._tokenizers()
                streams = [Stream(tokenizer, stops) for _ in prompts]
            started = time.perf_counter()
            session = self.session(len(prompts))
            mode = make_mode(session)
            generation.statistics = mode.statistics
            active = [True] * len(prompts)
            new = [[int(token)] for token in mode.prefill(prompts)]
            first = time.perf_counter()
            generation.first_token_s = first - started
            while True:
                for row, tokens in enumerate(new):
                    if not active[row] or not tokens:
                        continue
                    kept, written = [], ""
                    for token in tokens:
                        if token in ends:
                            active[row] = False
                            break
                        kept.append(token)
                        generation.tokens[row].append(token)
                        if mode.sampler is not None:
                            mode.sampler.histories[row].append(token)
                        if streams is not None:
                            written += streams[row].add(token)
                        full = len(generation.tokens[row]) == most
                        if full or (streams is not None and streams[row].stopped):
                            active[row] = False
                            break
                    if not active[row] and streams is not None:
                        written += streams[row].end()
                    generation.texts[row] += written
                    generation.decode_s = time.perf_counter() - first
                    piece = Piece(row, kept, written)
                    if on_piece is not None:
                        on_piece(piece)
                    yield piece
                if not any(active):
                    break
                self._check_usable()  # it may have been closed since the last piece
                done = [len(t) for t, on in zip(generation.tokens, active, strict=True) if on]
                new = mode.step(active, most - min(done))
            if isinstance(mode, Fast) and mode.audit:
                mode.flush()
        finally:
            self._lock.release()

    def _mode(
        self,
        session: Session,
        mode: ModeName,
        sampler: Sampler | None,
        draft_exit: str | None,
        drafts: int | None,
        draft_threshold: float,
        *,
        audit: bool,
    ) -> Mode:
        names = [leave.name for leave in self.exits]
        if mode == "full":
            return Full(session, names, sampler)
        if mode == "exact":
            return Exact(
                session,
                names,
                self._position(draft_exit, names),
                drafts=drafts,
                threshold=draft_threshold,
                score=self.policy.score,
                sampler=sampler,
                paces=self._paces.setdefault(session.batch, {}),
            )
        decisions = decide(self.policy, self.exits, digest=self.bundle.digest)
        if not any(decision.consult for decision in decisions[:-1]):
            logger.warning(
                "mode %s: the policy takes no early exit, so every token passes all layers; give "
                "one that does (--policy, --threshold)",
                mode,
            )
        thresholds = [d.threshold if d.consult else float("inf") for d in decisions[:-1]]
        score = self.policy.score
        if mode == "approximate":
            return Approximate(session, names, thresholds, score=score, sampler=sampler)
        return Fast(session, names, thresholds, score=score, audit=audit, sampler=sampler)

    @staticmethod
    def _position(name: str | None, names: list[str]) -> int | None:
        if name is None:
            return None
        if name not in names[:-1]:
            raise UsageError(
                f"draft_exit names {name!r}; the early exits are {', '.join(names[:-1])}",
                fix="Use one of those names.",
            )
        return names.index(name)

    def _tokenizers(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.bundle)
        return self._tokenizer

    def session(self, batch: int) -> Session:
        """The state of a batch of so many texts, emptied; kept while the number stays the same."""
        opened = self._check_usable()
        session = self._session
        if session is None or session.batch != batch:
            self._session = None
            largest = opened.engine.largest
            if batch > largest.get("batch", batch):
                raise InputError(
                    f"{batch} texts at a time: the engines were built for {largest['batch']}",
                    fix="Give fewer, or build for more: edgeexit build --max-shapes.",
                )
            chunk = min(CHUNK, self.capacity, largest.get("new", CHUNK))
            session = Session(opened, batch, self.capacity, chunk)
            self._session = session
        session.empty()
        return session

    def _describe_engine(self) -> dict[str, str]:
        opened = self._check_usable()
        forms = dict.fromkeys(variant.caches for variant in opened.variants)
        return {**opened.engine.describe(), "caches": ", ".join(forms)}

    @property
    def caches(self) -> Form | None:
        """The form of the caches that was asked for; None: the fastest."""
        return self._check_usable().form

    def close(self) -> None:
        """Releases engines and buffers."""
        if not self._forked:
            self._opened = self._session = None

    def _check_usable(self) -> Opened:
        self._check_process()
        if self._opened is None:
            raise self._closed()
        return self._opened
