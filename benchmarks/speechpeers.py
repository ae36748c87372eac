"""Other software that transcribes with the same weights, as subjects for the workers of
`whisper.py`, and the unsplit model with the checkpoint's own rules on tokens.

A prompt is ``input_features`` ``[1, mels, frames]`` and the decoder's first tokens. Records are
like those of `edgeexit.measure.bench.cases.read_generation`; peers' ``decode_s`` is all of the time
behind the encoder, whose time does not count.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit import runtime
from edgeexit.measure.bench.cases import read_generation, read_inputs
from edgeexit.measure.bench.worker import Case, Subject


def unsplit(bundle: str, prompts: str, new_tokens: int, threads: Any, capacity: int) -> Subject:
    """The model as one graph per chain. Case ``unsplit``."""
    model = runtime.load(bundle, threads=threads, capacity=capacity, unsplit=True)
    rows = read_inputs(Path(prompts))

    def call(number: int) -> Any:
        inputs = dict(rows[number])
        tokens = [int(token) for token in inputs.pop("tokens").reshape(-1)]
        made = model.generate(
            [tokens], inputs=inputs, max_new_tokens=new_tokens, text=False, reuse=False
        )
        return made.finish()

    case = Case(call, read_generation)
    return Subject({"unsplit": case}, len(rows), model.describe_engine(), model.close)


def transformers(folder: str, prompts: str, new_tokens: int, threads: Any) -> Subject:
    """transformers' own generation, in float32. Case ``transformers``."""
    import torch
    from transformers import WhisperForConditionalGeneration, __version__
    from transformers.modeling_outputs import BaseModelOutput

    torch.set_num_threads(int(threads))
    model = WhisperForConditionalGeneration.from_pretrained(folder).float().eval()
    rows = read_inputs(Path(prompts))
    given = model.generation_config.decoder_start_token_id

    @torch.no_grad()
    def call(number: int) -> dict[str, Any]:
        features = torch.from_numpy(rows[number]["input_features"])
        states = BaseModelOutput(model.get_encoder()(features).last_hidden_state)
        started = time.perf_counter()
        made = model.generate(
            encoder_outputs=states, do_sample=False, num_beams=1, max_new_tokens=new_tokens
        )
        took = time.perf_counter() - started
        return _record(made[0].tolist(), took, given, model.generation_config.eos_token_id)

    facts = {"library": "transformers", "version": __version__, "threads": str(threads)}
    return Subject({"transformers": Case(call, lambda record: record)}, len(rows), facts)


def ctranslate2(folder: str, prompts: str, new_tokens: int, threads: Any) -> Subject:
    """CTranslate2, the engine of faster-whisper, on the file that the checkpoint was converted
    from, in float32. Case ``ctranslate2``."""
    import ctranslate2 as library

    model = library.models.Whisper(
        folder, device="cpu", compute_type="float32", intra_threads=int(threads)
    )
    rows = read_inputs(Path(prompts))

    def call(number: int) -> dict[str, Any]:
        features = library.StorageView.from_array(
            np.ascontiguousarray(rows[number]["input_features"])
        )
        states = model.encode(library.StorageView.from_array(features))
        start = [int(token) for token in rows[number]["tokens"].reshape(-1)]
        started = time.perf_counter()
        [made] = model.generate(
            states, [start], beam_size=1, max_length=len(start) + new_tokens, return_scores=False
        )
        took = time.perf_counter() - started
        return _record([int(token) for token in made.sequences_ids[0]], took)

    facts = {"library": "ctranslate2", "version": library.__version__, "threads": str(threads)}
    return Subject({"ctranslate2": Case(call, lambda record: record)}, len(rows), facts)


def _record(
    tokens: list[int], took_s: float, start: int | None = None, end: int | None = None
) -> dict[str, Any]:
    """The record of a text without the start token and what ends it."""
    tokens = tokens[1:] if tokens[:1] == [start] else tokens
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    return {"first_token_s": 0.0, "earlier_s": 0.0, "decode_s": took_s, "tokens": tokens}
