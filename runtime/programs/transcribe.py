"""Writes the text of sounds window by window (`edgeexit.runtime.programs.sounds.Windows`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

from edgeexit.runtime.programs.generation import Generation, Piece
from edgeexit.runtime.programs.sounds import Windows
from edgeexit.runtime.programs.times import WrittenTimes
from edgeexit.runtime.text.tokenizer import Stream


def read_windows(
    generation: Generation,
    windows: Windows,
    begin: Callable[[Sequence[int]], Generation],
    streams: Sequence[Stream] | None,
    written: Sequence[WrittenTimes],
    on_piece: Callable[[Piece], object] | None,
) -> Generator[Piece, None, None]:
    """Yields the pieces of all windows. A piece has only tokens that are kept: those before the
    last two times in a row, and the rest when its window has ended. Where the next window reads
    again what this one's end cut, the second of those times is not written, as in transformers.

    Args:
        generation: Receives tokens, texts, counts and times of all windows.
        begin: Begins the texts of the windows of some sounds.
        streams: Per sound, converts tokens to text; None: no text.
        written: Per sound, how its text says times.
        on_piece: Called with every piece before it is yielded.
    """
    started = time.perf_counter()

    def piece_of(row: int, tokens: Sequence[int], *, last: bool = False, cut: int = 0) -> Piece:
        text = ""
        if streams is not None:
            for number, token in enumerate(tokens):
                written[row].muted = number >= len(tokens) - cut
                text += streams[row].add(token)
            written[row].muted = False
            text += streams[row].end() if last else ""
        generation.tokens[row] += tokens
        generation.texts[row] += text
        generation.decode_s = time.perf_counter() - started - generation.first_token_s
        piece = Piece(row, list(tokens), text)
        if on_piece is not None:
            on_piece(piece)
        return piece

    first = True
    while rows := windows.rows:
        for row in rows:
            written[row].offset_s = windows.offset_s(row)
        sent = [0] * len(rows)
        inner = begin(rows)
        for new in inner:
            if first:
                generation.first_token_s, first = inner.first_token_s, False
            own, number = inner.tokens[new.row], new.row
            if (complete := windows.complete(own)) > sent[number]:
                yield piece_of(rows[number], own[sent[number] : complete])
                sent[number] = complete
        _count(generation, inner)
        for number, row in enumerate(rows):
            kept, cut = windows.close(row, inner.tokens[number])
            tokens, last = inner.tokens[number][sent[number] : kept], row not in windows.rows
            if tokens or last:
                yield piece_of(row, tokens, last=last, cut=int(cut and not last))


def _count(generation: Generation, window: Generation) -> None:
    """Adds the counts and times of a window."""
    generation.statistics.add(window.statistics)
    generation.earlier_s += window.earlier_s
    for chain, seconds in window.chains_s.items():
        generation.chains_s[chain] = generation.chains_s.get(chain, 0.0) + seconds


__all__ = ["read_windows"]
