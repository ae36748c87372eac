"""What a text of some length costs, before one is written: memory, and time on this machine.

Memory follows from the manifest and the files; time comes from a few short runs
(`edgeexit.measure.text_times`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeexit.bundle.manifest import (
    ITEM_BYTES,
    Chain,
    Decoding,
    Gather,
    PromptState,
    Tensor,
    TokenState,
)
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EngineError, InputError, MeasurementError, UsageError
from edgeexit.measure.inspect import tensor_bytes, weights_bytes
from edgeexit.measure.text_times import time_text
from edgeexit.runtime.engines.base import Threads
from edgeexit.runtime.executor.blocks import CHUNK, even_chunk
from edgeexit.runtime.executor.gates import whole_readers
from edgeexit.runtime.executor.slots import assign_slots, shape_of, stages
from edgeexit.runtime.load import check_capacity
from edgeexit.runtime.memory import available_bytes


def text_cost(
    bundle: Bundle, capacity: int, sizes: Mapping[str, int], *, threads: Threads = "brief"
) -> dict[str, Any]:
    """Memory and time of texts of `capacity` tokens, prompt included, in mode ``full``.

    Args:
        bundle: The opened bundle.
        capacity: Tokens of each text, as for `edgeexit.runtime.load`.
        sizes: Size of every symbolic axis, from `edgeexit.measure.inspect.axis_sizes`; ``batch``
            is the number of texts at a time.
        threads: As for `edgeexit.runtime.load`.

    Returns:
        ``memory`` (`text_memory`); ``time`` (`edgeexit.measure.text_times.time_text`), None if it
        cannot be measured here; ``no_time``, why not.

    Raises:
        UsageError: The bundle does not write text, or the capacity is out of range.
        InputError: The bundle does not take that many rows.
    """
    decoding = bundle.manifest.decoding
    if decoding is None:
        raise UsageError(
            f"{bundle.path} does not write text: its task is {bundle.manifest.task}, so no text "
            "has a cost",
            fix="Leave out the capacity (--capacity).",
        )
    check_capacity(capacity, bundle.manifest.limits.get("positions"), None)
    rows, most = sizes["batch"], bundle.manifest.limits.get("batch")
    if most is not None and rows > most:
        raise InputError(
            f"{bundle.path}: it takes at most {most} rows at a time, not {rows}",
            fix=f"Use batch={most} (--axis batch={most}).",
        )
    memory = text_memory(bundle, decoding, capacity, sizes)
    found = {"capacity_tokens": capacity, "rows": rows, "memory": memory}
    try:
        _check_room(bundle, memory)
        time = time_text(bundle, capacity, sizes, threads=threads)
    except (EngineError, MeasurementError) as error:  # memory is known without an engine
        return found | {"time": None, "no_time": str(error)}
    return found | {"time": time, "no_time": None}


def text_memory(
    bundle: Bundle, decoding: Decoding, capacity: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Bytes that texts of `capacity` tokens need, as far as the manifest and the files tell.

    Returns:
        ``weights_bytes``: of all parts, as in the files. ``state_bytes_per_token``: of one row.
        ``states_bytes``: of all tokens of all rows. ``prompt_states_bytes``: states that are
        computed once per prompt, of all rows; None if an axis size is unknown. ``chunk_tokens``:
        prompt tokens of a row in one run. ``hidden_states_bytes``: what components pass to each
        other in such a run. ``logits_bytes``: of the last token of all rows.
    """
    manifest = bundle.manifest
    chain, rows = manifest.chains[decoding.chain], sizes["batch"]
    states = [state for name in chain.components for state in manifest.components[name].states]
    per_token = sum(
        tensor_bytes(Tensor(name=s.name, dtype=s.dtype, axes=s.axes), {"batch": 1, "past": 1}) or 0
        for s in states
        if isinstance(s, TokenState)
    )
    prompt = {
        s.tensor.name: tensor_bytes(s.tensor, sizes) for s in states if isinstance(s, PromptState)
    }
    known = [size for size in prompt.values() if size is not None]
    whole = whole_readers(chain, manifest.components).any
    chunk = even_chunk(capacity - 1, capacity if whole else CHUNK)
    return {
        "weights_bytes": weights_bytes(bundle),
        "state_bytes_per_token": per_token,
        "states_bytes": per_token * capacity * rows,
        "prompt_states_bytes": sum(known) if len(known) == len(prompt) else None,
        "chunk_tokens": chunk,
        "hidden_states_bytes": _hidden_bytes(bundle, chain, decoding, rows, chunk),
        "logits_bytes": _logits_bytes(bundle, chain, rows),
    }


def _hidden_bytes(bundle: Bundle, chain: Chain, decoding: Decoding, rows: int, new: int) -> int:
    """Bytes of the states that a chain's components pass to each other, with the scores that they
    compute of every token, for that many tokens per row. States that are not needed at the same
    time share memory, as in `edgeexit.runtime.executor.bindings.Bindings`."""
    manifest = bundle.manifest
    [feed] = [
        s.output for s in manifest.steps if isinstance(s, Gather) and s.ids == decoding.tokens
    ]
    slots = assign_slots([feed], stages(chain, manifest.components), {feed.name})
    tensors = {feed.name: feed} | {
        tensor.name: tensor
        for name in chain.components
        for tensor in manifest.components[name].outputs
    }
    largest: dict[int, int] = {}
    for name, tensor in tensors.items():
        shape = shape_of(tensor, {"batch": rows, "new": new})
        if "new" in tensor.axes and shape is not None:
            size = math.prod(shape) * ITEM_BYTES[tensor.dtype]
            largest[slots[name]] = max(size, largest.get(slots[name], 0))
    return sum(largest.values())


def _logits_bytes(bundle: Bundle, chain: Chain, rows: int) -> int | None:
    """Bytes of the last exit's logits for one token of each row; None if it has none."""
    exit_ = chain.stops[-1]
    giver = exit_.path[-1].component if exit_.path else exit_.behind
    outputs = {tensor.name: tensor for tensor in bundle.manifest.components[giver].outputs}
    logits = outputs.get(exit_.outputs.get("logits", ""))
    if logits is None:
        return None
    width = logits.axes[-1]
    return rows * width * ITEM_BYTES[logits.dtype] if isinstance(width, int) else None


def _check_room(bundle: Bundle, memory: Mapping[str, Any]) -> None:
    """Refuses to measure what this machine's memory does not hold."""
    parts = ("weights_bytes", "states_bytes", "hidden_states_bytes")
    needed, free = sum(memory[part] for part in parts), available_bytes()
    if needed > free:
        raise MeasurementError(
            f"{bundle.path}: weights, states and hidden states need {needed} bytes, and this "
            f"machine has {free} bytes free",
            fix="Give a smaller capacity or fewer rows, or export in a smaller precision.",
        )


__all__ = ["text_cost", "text_memory"]
