"""How long a prompt and a token behind it take on ONNX Runtime's CPU engine, from a few runs.

The runtime reads a prompt in chunks, and the time of a chunk is linear in the tokens that it
attends to. So a few chunks are run, behind states whose lengths are set, and the others are
interpolated. States behind which a run is timed hold zeros: time does not depend on what they hold,
but their memory is written, because pages that nobody wrote are read from the CPU caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Tensor
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import MeasurementError
from edgeexit.runtime import Model, load
from edgeexit.runtime.engines.base import Threads
from edgeexit.runtime.engines.onnxruntime import import_onnxruntime
from edgeexit.runtime.executor.blocks import CHUNK, even_chunk
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.executor.slots import dtype_of, shape_of
from edgeexit.runtime.executor.states import extents
from edgeexit.runtime.memory import peak_bytes, resident_bytes

ENOUGH_MS, MOST_RUNS = 1000.0, 20
"""Runs of a kind end when they took that long together, or at that number."""


def time_text(
    bundle: Bundle, capacity: int, sizes: Mapping[str, int], *, threads: Threads = "brief"
) -> dict[str, Any]:
    """Times of a prompt of ``capacity - 1`` tokens and of single tokens, in mode ``full``.

    Args:
        bundle: The opened bundle; it writes text.
        capacity: Tokens of each text.
        sizes: Size of every symbolic axis; ``batch`` is the number of texts at a time.
        threads: As for `edgeexit.runtime.load`.

    Returns:
        ``engine``: as in `Model.describe_engine`. ``prompt_tokens``, ``prompt_runs``,
        ``prefill_ms``: the prompt, in how many chunks, and how long it takes; None if that cannot
        be told, with the reason in ``no_prefill``. ``steps``: milliseconds of a decoding step,
        behind one token and behind the prompt. ``measured``: the chunks that were timed, each
        with ``past_tokens``, ``new_tokens`` and ``ms``. ``engine_bytes``: growth of this process's
        memory when the model was opened; ``peak_bytes``: at the peak of all this, None if this
        process needed more before.

    Raises:
        EngineError: ONNX Runtime is missing, or cannot run the bundle.
        MeasurementError: The size of an axis is not known.
    """
    import_onnxruntime()
    before, peak_before = resident_bytes(), peak_bytes()
    with load(bundle, "cpu", capacity=capacity, threads=threads) as model:
        opened = resident_bytes()
        found = {"engine": model.describe_engine(), **_times(model, sizes)}
    peak = peak_bytes()
    return found | {
        "engine_bytes": max(0, opened - before),
        "peak_bytes": peak - before if peak > peak_before else None,
    }


def _times(model: Model, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The figures of `time_text` that do not concern memory."""
    runs, prompt = _Runs(model, sizes), model.capacity - 1
    why = _why_no_prefill(model, runs.session)
    chunk = even_chunk(prompt, runs.session.chunk)
    chunks, prefill_ms = [], None
    if why is None:
        pasts = pasts_to_time(prompt, chunk)
        chunks = [(past, runs.chunk_ms(past, chunk)) for past in pasts]
        prefill_ms = runs.head_ms() + sum(
            _interpolated(runs.session, chunks, start) * min(chunk, prompt - start) / chunk
            for start in range(0, prompt, chunk)
        )
    pasts = list(dict.fromkeys([1, prompt]))
    steps = [{"past_tokens": past, "ms": runs.step_ms(past)} for past in pasts]
    runs.session.empty()
    return {
        "prompt_tokens": prompt,
        "prompt_runs": None if why else -(-prompt // chunk),
        "prefill_ms": prefill_ms,
        "no_prefill": why,
        "steps": steps,
        "measured": [
            {"past_tokens": past, "new_tokens": chunk, "ms": time_ms} for past, time_ms in chunks
        ],
    }


def _why_no_prefill(model: Model, session: Session) -> str | None:
    """Why the time of a prompt cannot be told without reading one; None: it can be."""
    decoding = model.bundle.manifest.decoding
    if decoding is not None and decoding.start_tokens:
        return "an encoder reads the prompt; the text itself begins with start tokens"
    if session.gates.may_read_whole and model.capacity - 1 > CHUNK:
        return (
            f"this model may read a prompt in one run; one of more than {CHUNK} tokens is not run "
            "for an estimate"
        )
    return None


def pasts_to_time(prompt: int, chunk: int) -> list[int]:
    """Tokens behind which a chunk is timed: none, about half of the prompt, and as many as the
    prompt's last whole chunk has in front of it.

    >>> pasts_to_time(1000, 334), pasts_to_time(3999, 364), pasts_to_time(100, 100)
    ([0, 333, 666], [0, 1820, 3635], [0])
    """
    last = prompt - chunk
    starts = range(0, last + 1, chunk)
    middle = starts[len(starts) // 2] if len(starts) > 2 else last // 2 if last > chunk else 0
    return list(dict.fromkeys([0, middle, last]))


def interpolate(attended: Sequence[int], times_ms: Sequence[float], tokens: int) -> float:
    """Milliseconds of a chunk that attends to that many tokens.

    Args:
        attended: Of each timed chunk. Those that attend to as many count as one.
        times_ms: Their times.
        tokens: Of the chunk in question.

    >>> [interpolate([0, 100, 100], [1.0, 2.0, 4.0], tokens) for tokens in (0, 50, 100)]
    [1.0, 2.0, 3.0]
    """
    known = sorted(set(attended))
    pairs = list(zip(attended, times_ms, strict=True))
    means = [statistics.fmean(ms for own, ms in pairs if own == one) for one in known]
    return float(np.interp(tokens, known, means))


def _interpolated(session: Session, chunks: Sequence[tuple[int, float]], past: int) -> float:
    """Milliseconds of a chunk behind `past` tokens, from timed ones (past, milliseconds)."""
    attended = [_attended(session, own) for own, _ in chunks]
    return interpolate(attended, [time_ms for _, time_ms in chunks], _attended(session, past))


def _attended(session: Session, past: int) -> int:
    """Tokens that a run behind so many attends to, in the form of states that the engine runs."""
    forms = {part.variant.states for part in session.parts if part.states.token_bytes}
    if "append" in forms:
        return next(extent for extent in extents(session.capacity) if extent >= past)
    return session.capacity if "fixed" in forms else past


class _Runs:
    """Timed runs of a model's session.

    Args:
        model: Writes text.
        sizes: Size of every symbolic axis; ``batch`` is the number of texts.
    """

    def __init__(self, model: Model, sizes: Mapping[str, int]) -> None:
        self._rows = sizes["batch"]
        self.session = model.session(self._rows)
        self._handed = _handed(model, self.session, sizes)

    def chunk_ms(self, past: int, new: int) -> float:
        """Milliseconds of `new` prompt tokens per row behind `past` tokens."""
        session, rows = self.session, self._rows
        tokens = np.zeros((rows, new), np.int64)

        def prepare() -> None:
            self._begin(past + new)
            self._fill(past)

        def run() -> None:
            session.embed(tokens, past)
            session.run_all(0, len(session.parts), new)

        return _median_ms(run, prepare)

    def step_ms(self, past: int) -> float:
        """Milliseconds of a decoding step behind `past` tokens, from a token to its successor."""
        session, rows = self.session, self._rows
        token = np.zeros((rows, 1), np.int64)
        self._begin(1)
        session.embed(token, 0)
        session.run_all(0, len(session.parts), 1)  # makes the prompt's states
        self._fill(past)
        head = session.head(len(session.parts) - 1)

        def run() -> None:
            session.embed(token)
            head(session.run_all(0, len(session.parts), 1)[:, 0])

        return _median_ms(run, lambda: session.crop([past] * rows))

    def head_ms(self) -> float:
        """Milliseconds of the last exit's head for one token per row."""
        session = self.session
        states, head = (
            session.boundary(len(session.parts), 1)[:, 0],
            session.head(len(session.parts) - 1),
        )
        return _median_ms(lambda: head(states), lambda: None)

    def _begin(self, prompt: int) -> None:
        """Starts texts with prompts of that many tokens, none of which belongs to a group."""
        none = [np.zeros(prompt, np.bool_)] * self._rows
        groups = dict.fromkeys(self.session.decoding.groups, none)
        self.session.begin([prompt] * self._rows, groups=groups, handed=self._handed)

    def _fill(self, past: int) -> None:
        """Makes all states hold `past` tokens, of zeros."""
        for part in self.session.parts:
            zeros = [
                np.broadcast_to(np.zeros((), dtype), shape)
                for dtype, shape in part.states.forms(past)
            ]
            for row in range(self._rows):
                part.states.write(row, past, zeros)


def _median_ms(run: Callable[[], object], prepare: Callable[[], object]) -> float:
    """The median time of runs. The first binds memory and does not count, unless it alone took
    `ENOUGH_MS`.

    Args:
        run: What is timed.
        prepare: Called before each run.
    """
    times: list[float] = []
    while len(times) < MOST_RUNS and sum(times) < ENOUGH_MS:
        prepare()
        started = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - started) / 1e6)
    return statistics.median(times[1:] or times)


def _handed(model: Model, session: Session, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Ones in place of the tensors that chains before the text pass to it.

    Raises:
        MeasurementError: The size of an axis is not known.
    """
    manifest = model.bundle.manifest
    earlier = [chain for name, chain in manifest.chains.items() if name != model.chain_name]
    tensors: list[Tensor] = [*manifest.inputs, *(t for chain in earlier for t in chain.outputs)]
    handed = {}
    for tensor in tensors:
        if tensor.name not in session.takes:
            continue
        shape = shape_of(tensor, sizes)
        if shape is None:
            raise MeasurementError(
                f"{tensor.name}: the size of an axis of {tensor.axes} is not known",
                fix="Give it, as in --axis source=100.",
            )
        handed[tensor.name] = np.ones(shape, dtype_of(tensor))
    return handed


__all__ = ["interpolate", "pasts_to_time", "time_text"]
