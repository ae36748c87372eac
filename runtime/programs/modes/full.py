"""Mode ``full``, and what all modes share. The other modes are in `exact` and `early` (``fast``,
``approximate``).

A mode is a class with `prefill` (prompts in, first tokens out) and `step` (one round: one or more
tokens per row). All modes follow four rules:

- A token that has passed a boundary, but not the component behind it, waits in the boundary's ring.
- Running a component empties its ring first.
- The adapter of an exit that is used processes every token that passes the exit (`Adapters`).
- Contents of states beyond their lengths are ignored.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.engines.base import Array
from edgeexit.runtime.executor.blocks import Block, even_chunk
from edgeexit.runtime.executor.head import Answers
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.sampling import Sampler

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]


@dataclass
class Statistics:
    """Counts of a generation.

    Attributes:
        tokens: New tokens over all rows.
        exits: Exit name -> tokens that it answered (``exact``: accepted drafts; the other tokens
            are the last exit's).
        drafted: Drafted tokens (``exact``).
        accepted: Drafts that the full model accepted.
        tested: Drafts that were compared: those up to and including the first rejected draft.
        proposed: Drafts that the text itself gave (``exact``).
        looked_up: Those of them that the last exit accepted; they count as its tokens.
        catch_ups: Runs in which a component processed more than one waiting token (``fast``).
        audited: Tokens of early exits for which the full model's token was computed.
        agreed: Audited tokens that equal the full model's greedy token.
        earlier: Earlier chain -> per row, the exit at which it stopped.
        gates: Gate -> per row, its score. Gates behind which no row had tokens to drop are missing.
        dropped: Gate, or scheduled drop -> per row, whether it dropped its token group.
    """

    tokens: int = 0
    exits: dict[str, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    tested: int = 0
    proposed: int = 0
    looked_up: int = 0
    catch_ups: int = 0
    audited: int = 0
    agreed: int = 0
    earlier: dict[str, list[str]] = field(default_factory=dict)
    gates: dict[str, list[float]] = field(default_factory=dict)
    dropped: dict[str, list[bool]] = field(default_factory=dict)

    def count(self, exit_name: str, tokens: int) -> None:
        """Counts tokens answered at an exit."""
        self.tokens += tokens
        if tokens:
            self.exits[exit_name] = self.exits.get(exit_name, 0) + tokens

    def add(self, other: Statistics) -> None:
        """Adds the counts of another generation; lists per row get its rows behind theirs."""
        for each in dataclasses.fields(self):
            own, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(more, dict):
                for key, value in more.items():
                    own[key] = own[key] + value if key in own else value
            else:
                setattr(self, each.name, own + more)

    @property
    def acceptance(self) -> float | None:
        """Accepted ÷ drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def alpha(self) -> float | None:
        """Probability that a draft is accepted if all drafts before it were: accepted ÷ tested."""
        return self.accepted / self.tested if self.tested else None

    @property
    def agreement(self) -> float | None:
        """Share of audited tokens that equal the full model's: agreed ÷ audited."""
        return self.agreed / self.audited if self.audited else None


class Mode(Protocol):
    """A decoding mode."""

    statistics: Statistics
    sampler: Sampler | None

    @property
    def asked(self) -> Collection[int]:
        """Early exits whose adapters must have processed every token."""

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        """Processes prompts, one per row. Returns the first token of every row, ``[batch]``."""

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        """Runs one round. Returns the new tokens of every row; inactive rows get none."""

    def force(self, tokens: Ints) -> None:
        """Replaces the last tokens by these, ``[batch]``."""


class Full:
    """Mode ``full``: every component runs for every token. Also runs the unsplit graph.

    Args:
        asked: Indices of early exits that another mode uses later; their adapters process the
            prompt.
    """

    def __init__(
        self,
        session: Session,
        exits: Sequence[str],
        sampler: Sampler | None = None,
        *,
        asked: Collection[int] = (),
    ) -> None:
        self.session, self.exits, self.sampler = session, exits, sampler
        self._asked = [number for number in sorted(asked) if session.adapters[number] is not None]
        self.statistics = Statistics()
        self._current: Ints = np.zeros((session.batch, 1), np.int64)
        self._own = session.answers_itself
        self._head = None if self._own else session.head(len(session.parts) - 1)

    @property
    def asked(self) -> Collection[int]:
        return self._asked

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        last = last_states(self.session, prompts, self._pass)
        self._current[:, 0] = self._answer(last)
        self.statistics.count(self.exits[-1], self.session.batch)
        return self._current[:, 0].copy()

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        session = self.session
        session.embed(self._current)
        states = session.run_all(0, len(session.parts), 1)
        self._current[:, 0] = self._answer(states if self._own else states[:, 0])
        self.statistics.count(self.exits[-1], sum(active))
        tokens = self._current[:, 0].tolist()
        return [[token] if on else [] for token, on in zip(tokens, active, strict=True)]

    def force(self, tokens: Ints) -> None:
        self._current[:, 0] = tokens

    def _pass(self, block: Block) -> tuple[Array, Sequence[int]]:
        """Runs every component, and the adapters of the exits in `asked`."""
        session = self.session
        start, last = 0, len(session.parts)
        for number in self._asked:
            block = session.run_through(start, number + 1, block)
            session.adapters.pass_by(number, block)
            start = number + 1
        block = session.run_through(start, last, block)
        return session.boundary(last, block.new), block.counts

    def _answer(self, states: Array) -> Ints:
        """Tokens for states ``[batch, width]``; the unsplit graph outputs tokens itself."""
        head = self._head
        answers = self.session.parts[-1].answers if head is None else head(states)
        return choose(answers, self.sampler)


def choose(answers: Answers, sampler: Sampler | None) -> Ints:
    """One token per row of a head's answers: the most likely token, or a sampled one."""
    if sampler is None:
        return answers["token"]
    return np.array([pick(answers, row, sampler) for row in range(len(answers["token"]))])


def pick(answers: Answers, row: int, sampler: Sampler | None) -> int:
    """The token of one row of a head's answers."""
    if sampler is None:
        return int(answers["token"][row])
    if sampler.greedy:
        return sampler.likeliest(row, answers["logits"][row])
    return int(sampler.draw(row, sampler.chances(row, answers["logits"][row])))


def last_states(
    session: Session,
    prompts: Sequence[Ints],
    take: Callable[[Block], tuple[Array, Sequence[int]]],
) -> Array:
    """Processes prompts in chunks, without what the states hold of them. Returns the state of each
    row's last token, ``[batch, width]``; the next call overwrites it.

    Args:
        take: Runs a block whose embeddings are at the first boundary. Returns states
            ``[batch, new, width]``, and the number of real tokens per row.
    """
    last: Array | None = None
    prompts = [row[kept:] for row, kept in zip(prompts, session.texts.kept, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    chunk = even_chunk(max(lengths), session.chunk)
    for start in range(0, max(lengths), chunk):
        tokens, counts = part_of(prompts, start, chunk)
        session.embed(tokens, start)
        states, left = take(Block(tokens.shape[1], counts))
        if session.answers_itself:
            continue
        if last is None:
            last = session.row_states("last of the prompts", states)
        for row, length in enumerate(lengths):
            if start < length <= start + chunk:
                last[row] = states[row, left[row] - 1]
    if last is None:
        return states
    if isinstance(last, np.ndarray):
        for row in np.flatnonzero(~np.isfinite(last).all(1)):
            logger.warning(
                "prompt %d: the states are not numbers (NaN or infinity), so the text means "
                "nothing",
                row + 1,
            )
    return last


def has_numbers(session: Session) -> bool:
    """Whether the last states of a session are numbers. If not, it must not be used again: what a
    text leaves in memory is masked for the next one, and 0 times NaN is NaN."""
    tensor = session.bindings.tensors[session.boundaries[-1]]
    last = session.boundary(len(session.parts), session.chunk if "new" in tensor.axes else 1)
    return not isinstance(last, np.ndarray) or bool(np.isfinite(last).all())


def part_of(prompts: Sequence[Ints], start: int, size: int) -> tuple[Ints, list[int]]:
    """Part of every prompt, padded to the longest: tokens ``[batch, new]``, and the number of real
    tokens per row."""
    parts = [prompt[start : start + size] for prompt in prompts]
    counts = [len(part) for part in parts]
    tokens = np.zeros((len(parts), max(counts)), np.int64)
    for row, part in enumerate(parts):
        tokens[row, : len(part)] = part
    return tokens, counts
