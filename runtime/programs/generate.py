"""Text generation, token by token, in one of several modes.

`Writer` is the part of `edgeexit.runtime.model.Model` that generates text. `generate` continues
prompts and `chat` answers conversations; `edgeexit.runtime.programs.arguments` checks the
arguments. Both return a `Generation`: an iterator over pieces, with statistics that are updated
while it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgeexit.errors import StateError, UsageError
from edgeexit.preprocessing.audio import Floats
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.executor.tables import check_ids
from edgeexit.runtime.programs.arguments import (
    ModeName,
    Options,
    Prompt,
    check_alone,
    check_options,
    check_room,
    stop_strings,
)
from edgeexit.runtime.programs.call import Call
from edgeexit.runtime.programs.generation import Generation, Piece, Rounds
from edgeexit.runtime.programs.images import Image, fill_images, take_images
from edgeexit.runtime.programs.modes.choose import Drafting, check_mode, make_mode
from edgeexit.runtime.programs.modes.early import Approximate, Fast
from edgeexit.runtime.programs.modes.full import Mode, Statistics
from edgeexit.runtime.programs.prompts import Prompts, check_alike, read_prompts
from edgeexit.runtime.programs.sampling import Sampler, Sampling, sampler_of
from edgeexit.runtime.programs.saved_prefixes import SavedPrefixes
from edgeexit.runtime.programs.sounds import (
    Audio,
    Windows,
    audio_input,
    check_windows,
    features_of,
    is_long,
    read_sounds,
)
from edgeexit.runtime.programs.start_tokens import check_choices, start_tokens
from edgeexit.runtime.programs.times import WrittenTimes
from edgeexit.runtime.programs.transcribe import read_windows
from edgeexit.runtime.text.chat import Message, conversations
from edgeexit.runtime.text.tokenizer import Stream

if TYPE_CHECKING:
    from typing import Unpack  # from Python 3.11 on

logger = logging.getLogger(__name__)

NEW_TOKENS = 128
"""Default of `max_new_tokens`."""


class Writer(SavedPrefixes):
    """Generation and chat of a `edgeexit.runtime.model.Model`."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] = (),
        *,
        images: Image | Sequence[Image] | Sequence[Sequence[Image]] | None = None,
        audio: Audio | list[Audio] | None = None,
        choices: Mapping[str, str] | None = None,
        timestamps: bool = False,
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
        ignore_eos: bool = False,
        reuse: bool = True,
        on_piece: Callable[[Piece], object] | None = None,
    ) -> Generation:
        """Continues prompts.

        Args:
            prompts: A text or a list of token ids; or a batch of either.
            images: Images for the prompts: paths, images of Pillow, or uint8 arrays. One image, or
                several in the order of the placeholders that the prompts have for them; or a list
                for each prompt.
            audio: A sound, or a list of sounds, in place of prompts: paths, or ``(samples, rate)``.
                A sound that is longer than the model's window is read window by window.
            choices: What a text begins with, by name, as in ``{"language": "en"}``; missing ones
                have the checkpoint's defaults.
            timestamps: Whether a text says times, where the model can write them.
            inputs: Inputs of earlier chains, by name. Encoders: one row per prompt (without inputs,
                the prompt text is encoded). Images and the like: one row per item, in the order of
                the placeholders in the prompts.
            max_new_tokens: Most new tokens per row, or per window of a sound; None: 128, or fewer
                if the capacity is smaller; sounds: as many as the capacity allows.
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
            ignore_eos: Write on where the model would end its text, for measurements.
            reuse: Compute nothing again that earlier texts began with (`prefixes`), and let later
                ones do the same. The tokens are those of a text from the beginning, but for the
                rounding of other shapes. Texts only: not behind images, sounds or encoders.
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
            ignore_eos=ignore_eos,
            reuse=reuse,
        )
        self._check_usable()
        decoding = self._decoding()
        check_choices(decoding, choices, timestamps=timestamps)
        call = Call(
            mode=mode,
            drafting=Drafting(draft_exit, drafts, draft_threshold),
            sampling=self.default_sampling if sampling is None else sampling,
            most=max_new_tokens,
            stops=stop_strings(stop),
            on_piece=on_piece,
            audit=audit,
            text=text,
            ignore_eos=ignore_eos,
            reuse=reuse,
            times=decoding.timestamps if timestamps else None,
        )
        self._check_mode(mode, call.drafting)
        if audio is not None:
            check_alone(prompts, images, inputs)
            return self._hear(read_sounds(self.bundle, audio), choices, call)
        if choices and inputs is not None and len(prompts):
            raise UsageError(
                "choices and token ids that the text begins with exclude each other",
                fix="Give one of them.",
            )
        if images is not None:
            if inputs is not None:
                raise UsageError("images and inputs exclude each other", fix="Give one of them.")
            prompts, inputs = self.prompts_with_images(prompts, images)
        start = functools.partial(start_tokens, decoding, choices, timestamps=timestamps)
        return self._begin(read_prompts(self.bundle, prompts, inputs, self.encode, start), call)

    def _begin(self, given: Prompts, call: Call) -> Generation:
        """Begins to write; `generate` says what is checked."""
        most = call.most
        if most is None:
            most = max(1, min(NEW_TOKENS, self.capacity - max(given.lengths)))
        limit = self.bundle.manifest.limits.get("positions")
        for row, length in zip(given.tokens, given.lengths, strict=True):
            check_ids(self._text_table(), row)
            check_room(length, most, self.capacity, limit)
        if self.unsplit:
            check_alike(given.tokens)
        if given.asks_earlier:
            self._checked.sizes(given.inputs)
        rows = len(given.tokens)
        generation = Generation([[] for _ in range(rows)], [""] * rows, Statistics())
        sampler = sampler_of(call.sampling, given.tokens, self._text_table().size, call.times)
        # A weak reference: with a cycle, a generation that is deleted before its end would block
        # the model until garbage collection.
        generation._pieces = self._write(
            weakref.proxy(generation),
            given,
            lambda session: self._mode(
                session, call.mode, sampler, call.drafting, audit=call.audit
            ),
            most,
            call,
        )
        return generation

    def _hear(
        self, sounds: Sequence[Floats], choices: Mapping[str, str] | None, call: Call
    ) -> Generation:
        """Begins to write what was said in sounds."""
        decoding, preprocessing = self._decoding(), audio_input(self.bundle)
        times, long = decoding.timestamps, is_long(preprocessing, sounds)
        in_windows = long or call.times is not None
        start = start_tokens(decoding, choices, timestamps=in_windows and times is not None)
        call = dataclasses.replace(call, most=call.most or max(1, self.capacity - len(start)))

        def begin(inputs: Mapping[str, NDArray[Any]], call: Call) -> Generation:
            rows = [start] * len(inputs[preprocessing.input])
            return self._begin(read_prompts(self.bundle, rows, inputs, None), call)

        if not in_windows:
            return begin(features_of(preprocessing, sounds), call)
        check_windows(preprocessing, sounds, call.stops, times)
        assert times is not None
        windows = Windows(preprocessing, times, sounds)
        written = [WrittenTimes(times, call.times is not None) for _ in sounds]
        streams = None
        if call.text and self.bundle.manifest.tokenizer is not None:
            tokenizer = self._tokenizers()
            streams = [Stream(tokenizer, (), start, own.text) for own in written]
        each = dataclasses.replace(call, times=times, text=False, on_piece=None)
        count = len(sounds)
        generation = Generation([[] for _ in range(count)], [""] * count, Statistics())
        generation._pieces = read_windows(
            weakref.proxy(generation),
            windows,
            lambda rows: begin(windows.inputs(rows), each),
            streams,
            written,
            call.on_piece,
        )
        return generation

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        images: Image | Sequence[Image] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Answers a conversation, or a batch of conversations.

        To continue a conversation, append the answer as a message of the assistant, then the next
        question; what the model has read already is not computed again.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``, or a list of such lists. A content
                may be a list of ``{"type": "text", "text": "..."}`` and ``{"type": "image", "path":
                "cat.jpg"}`` (or ``"image"``: an image as `generate` takes it).
            images: Images for items ``{"type": "image"}`` that have none, in order.
            tools, template, variables: As for `chat_prompt`.
            options: Arguments of `generate`. There are no `inputs` with images, as in `generate`.

        Raises:
            EdgeExitError: What `chat_prompt` and `generate` raise.
        """
        self._decoding()
        taken = [take_images(conversation) for conversation in conversations(messages)]
        with_images = images is not None or any(own for _, own in taken)
        if with_images and options.get("inputs") is not None:
            raise UsageError(
                "images and inputs exclude each other, also images in messages",
                fix="Give one of them. Preprocessed images: generate(token_ids, inputs={...}).",
            )
        prompts = [
            self.chat_prompt(conversation, tools=tools, template=template, variables=variables)
            for conversation, _ in taken
        ]
        found = fill_images([own for _, own in taken], images)
        rows: list[Any] = [self.encode(prompt, special_tokens=False) for prompt in prompts]
        if any(found):  # the template has added the special tokens
            rows, options["inputs"] = self.prompts_with_images(prompts, found, special_tokens=False)
        return self.generate(rows, **options)

    def _write(
        self,
        generation: Generation,
        prompts: Prompts,
        make_mode: Callable[[Session], Mode],
        most: int,
        call: Call,
    ) -> Generator[Piece, None, None]:
        """Runs the rounds. Holds the lock until the iterator ends or is deleted."""
        self._check_usable()
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "the model is writing another text",
                fix="Finish or close the other generation first, or load a second model.",
            )
        try:
            ends, times = set(self._decoding().stop_tokens), self._decoding().timestamps
            ends = set() if call.ignore_eos else ends
            streams = None
            if (call.text and self.bundle.manifest.tokenizer is not None) or call.stops:
                tokenizer = self._tokenizers()
                label = None if times is None else WrittenTimes(times, call.times is not None).text
                before = zip(prompts.tokens, prompts.lengths, strict=True)
                streams = [
                    Stream(tokenizer, call.stops, row[:n].tolist(), label) for row, n in before
                ]
            started = time.perf_counter()
            session = self._session_of(len(prompts.tokens))
            mode = make_mode(session)
            generation.statistics = mode.statistics
            kept = self._fetch(session, mode, prompts) if call.reuse else []
            generation.reused_tokens = sum(kept)
            self._hand_on(session, prompts, generation, kept=kept)
            rounds = Rounds(generation, mode, streams, ends, most, call.on_piece)
            reusable = call.reuse and not prompts.inputs and not isinstance(mode, Approximate)
            for piece in rounds.run(prompts.tokens, prompts.forced, started, self._check_usable):
                session.texts.whole = reusable  # from here on the iterator may be closed
                yield piece
                session.texts.whole = False
            if isinstance(mode, Fast) and mode.audit:
                mode.flush()
            session.texts.whole = reusable
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


__all__ = ["Writer"]
