"""Other software that generates text with the same weights, as subjects for the workers of
`decode.py`, `codelm.py` and `visionpeers.py`.

Every case returns records like `edgeexit.measure.bench.cases.read_generation`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from subjects import session_options

from edgeexit.measure.bench.cases import memory_case, read_inputs
from edgeexit.measure.bench.worker import Case, Subject
from edgeexit.runtime.engines.onnxruntime import SLOW_FUSIONS

LOOKED_UP = (2, 10)
"""Most tokens of drafts that llama.cpp looks up; 2 is what its Python package advises for a CPU."""


def genai(
    folder: str,
    prompts: str,
    new_tokens: int,
    threads: Any,
    capacity: int | None = None,
    ignore_eos: bool = False,
) -> Subject:
    """onnxruntime-genai with the model of its own builder. Cases ``genai`` and ``memory``.

    `threads` is ``default`` (its own choice), ``blocking`` (the pool does not spin), or a number.
    """
    import onnxruntime_genai as og

    config = og.Config(folder)
    options: dict[str, Any] = {}
    if threads == "blocking":
        options["session.intra_op.allow_spinning"] = "0"
    elif threads != "default":
        options["intra_op_num_threads"] = threads
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    rows = _rows(prompts)

    def call(number: int) -> dict[str, Any]:
        params = og.GeneratorParams(model)
        length = len(rows[number]) + new_tokens
        params.set_search_options(
            do_sample=False,
            max_length=max(length, capacity or 0),
            min_length=length if ignore_eos else 0,
        )
        generator = og.Generator(model, params)  # not timed: our caches are not either
        started = time.perf_counter()
        generator.append_tokens(np.array([rows[number]], np.int32))
        generator.generate_next_token()
        made = [int(generator.get_next_tokens()[0])]
        first = time.perf_counter()
        while len(made) < new_tokens and not generator.is_done():
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        ended = time.perf_counter()
        return {"first_token_s": first - started, "decode_s": ended - first, "tokens": made}

    facts = {"library": "onnxruntime-genai", "version": og.__version__, "threads": str(threads)}
    cases = {"genai": Case(call, lambda record: record), "memory": memory_case()}
    return Subject(cases, len(rows), facts)


def llama_cpp(
    file: str, prompts: str, new_tokens: int, threads: Any, capacity: int | None = None
) -> Subject:
    """llama.cpp with a GGUF file, by its C functions; no token ends a text. Cases ``llama.cpp``,
    ``lookup N`` (drafts of up to N tokens from the text, as its Python package looks them up; a
    number of `LOOKED_UP`) and ``memory``."""
    import llama_cpp as library
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    count = len(os.sched_getaffinity(0)) if threads == "default" else int(threads)
    rows = _rows(prompts)
    size = capacity or max(map(len, rows)) + new_tokens
    model = library.Llama(
        file, n_ctx=size, n_batch=size, n_threads=count, n_threads_batch=count, verbose=False
    )
    context = model.ctx
    vocabulary = model.n_vocab()

    def read(tokens: list[int]) -> int:
        """Runs tokens. Returns the likeliest next one."""
        array = (library.llama_token * len(tokens))(*tokens)
        if library.llama_decode(context, library.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = library.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def call(number: int) -> dict[str, Any]:
        model.reset()
        library.llama_memory_clear(library.llama_get_memory(context), True)
        started = time.perf_counter()
        made = [read(rows[number])]
        first = time.perf_counter()
        while len(made) < new_tokens:
            made.append(read(made[-1:]))
        ended = time.perf_counter()
        return {"first_token_s": first - started, "decode_s": ended - first, "tokens": made}

    batch, memory = library.llama_batch_init(size, 0, 1), library.llama_get_memory(context)

    def read_all(tokens: list[int], at: int) -> list[int]:
        """Runs tokens from a position on. Returns the likeliest token behind each."""
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, at + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if library.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = library.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, (len(tokens), vocabulary)).argmax(-1).tolist()

    def looked_up(number: int, most: int) -> dict[str, Any]:
        drafts = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=most)
        model.reset()
        library.llama_memory_clear(memory, True)
        started = time.perf_counter()
        made = [read(rows[number])]
        first = time.perf_counter()
        while len(made) < new_tokens:
            text = [*rows[number], *made]
            drafted = drafts(np.array(text, np.intc))[: new_tokens - len(made) - 1].tolist()
            said = read_all([made[-1], *drafted], len(text) - 1)
            right = next((n for n, d in enumerate(drafted) if d != said[n]), len(drafted))
            made += said[: right + 1]
            if right < len(drafted):
                library.llama_memory_seq_rm(memory, 0, len(text) + right, -1)
        ended = time.perf_counter()
        return {"first_token_s": first - started, "decode_s": ended - first, "tokens": made}

    facts = {"library": "llama.cpp", "version": library.__version__, "threads": str(threads)}
    cases = {"llama.cpp": Case(call, lambda record: record), "memory": memory_case()}
    for most in LOOKED_UP:
        own = functools.partial(looked_up, most=most)
        cases[f"lookup {most}"] = Case(own, lambda record: record)
    return Subject(cases, len(rows), facts)


def exporters(
    folder: str, prompts: str, new_tokens: int, threads: Any, image_token: int
) -> Subject:
    """The graphs of `transformers.exporters` (`visionpeers.py`) in ONNX Runtime. Case
    ``exporters``; no token ends a text.

    What the exporter leaves to its caller is done here, in the fastest way that was found: image
    features replace their tokens' embeddings, which are read from the decoder's own table, the head
    runs on the last state only, and caches are passed on without a copy.
    """
    import onnxruntime as ort

    graphs = {
        path.stem: ort.InferenceSession(
            path,
            session_options(threads),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=SLOW_FUSIONS,  # as on our side
        )
        for path in sorted(Path(folder).glob("*.onnx"))
    }
    names = {name: [made.name for made in graph.get_outputs()] for name, graph in graphs.items()}
    table = _embeddings(Path(folder) / "decode.onnx")
    rows = read_inputs(Path(prompts))

    def run(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        given = {
            key: ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
            for key, value in inputs.items()
        }
        made = graphs[name].run_with_ort_values(names[name], given)
        return dict(zip(names[name], made, strict=True))

    def caches(made: dict[str, Any]) -> dict[str, Any]:
        """A graph's caches, named as inputs of the next."""
        return {
            f"input.{name.removeprefix('output.')}": value
            for name, value in made.items()
            if "past_key_values" in name
        }

    def call(number: int) -> dict[str, Any]:
        tokens = rows[number]["tokens"].reshape(1, -1)
        images = [value for name, value in rows[number].items() if name != "tokens"]
        started = time.perf_counter()
        features = [run("image_features", {"pixel_values": image}) for image in images]
        behind_tower = time.perf_counter()
        states = table[tokens]
        if features:
            [[image]] = [made.values() for made in features]
            states[tokens == image_token] = image.numpy().reshape(-1, states.shape[-1])
        position = np.arange(tokens.size)[None]
        made = run("language_model", {"inputs_embeds": states, "position_ids": position})
        past = caches(made)
        [logits] = run("lm_head", {"input": made["last_hidden_state"].numpy()[:, -1:]}).values()
        text = [int(logits.numpy().argmax())]
        first = time.perf_counter()
        while len(text) < new_tokens:
            place = np.array([[tokens.size + len(text) - 1]])
            step = {"input_ids": np.array([text[-1:]]), "position_ids": place, **past}
            made = run("decode", step)
            past = caches(made)
            text.append(int(made["logits"].numpy().argmax()))
        ended = time.perf_counter()
        return {
            "first_token_s": first - started,
            "earlier_s": behind_tower - started,
            "decode_s": ended - first,
            "tokens": text,
        }

    facts = {"library": "onnxruntime", "version": ort.__version__, "threads": str(threads)}
    return Subject({"exporters": Case(call, lambda record: record)}, len(rows), facts)


def _embeddings(path: Path) -> Any:
    """The table from which a graph takes the embeddings of ``input_ids``, mapped from its file."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    [ids] = [value for value in graph.inputs if value.name == "input_ids"]
    [lookup] = [node for node in ids.consumers() if node.op_type == "Gather"]
    return lookup.inputs[0].const_value.numpy()


def transformers_generate(
    checkpoint: str,
    prompts: str,
    new_tokens: int,
    threads: int,
    early_exits: list[int],
    drafts: list[int],
) -> Subject:
    """The checkpoint in transformers with PyTorch. Cases ``plain``, ``early_exit_LAYER`` (its
    self-speculation with default settings, which drafts up to 20 tokens) and, for other draft
    lengths, ``early_exit_LAYER_N``.

    ``decode_s`` is the time of the whole text.
    """
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()
    rows = _rows(prompts)

    usual = model.generation_config.num_assistant_tokens

    def case(length: int | None = usual, **options: Any) -> Case:
        def enter() -> None:
            model.generation_config.num_assistant_tokens = length

        def call(number: int) -> dict[str, Any]:
            ids = torch.tensor([rows[number]])
            started = time.perf_counter()
            with torch.inference_mode():
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    **options,
                )
            took = time.perf_counter() - started
            tokens = made[0, ids.shape[1] :].tolist()
            return {"first_token_s": 0.0, "decode_s": took, "tokens": tokens}

        return Case(call, lambda record: record, enter)

    facts = {"library": "transformers", "version": transformers.__version__}
    cases = {"plain": case()}
    for layer in early_exits:
        cases[f"early_exit_{layer}"] = case(assistant_early_exit=layer)
        for length in drafts:
            cases[f"early_exit_{layer}_{length}"] = case(length, assistant_early_exit=layer)
    return Subject(cases, len(rows), facts)


def alternatives(
    bundle: str,
    prompts: str,
    new_tokens: int,
    threads: Any,
    capacity: int,
    cases: dict[str, dict[str, Any]],
    own_sampling: bool = False,
) -> Subject:
    """One loaded chain under several policies, in the runtime's modes and in those of
    `alternatives`.

    Args:
        cases: Name -> ``rules`` (as `rules_to_json` made them; default: nothing stops), ``mode``
            (the runtime's, or a name in `alternatives.MODES`), and arguments of `Model.generate`
            or of that mode.
        own_sampling: Tokens are chosen as the checkpoint says, such as without suppressed ones;
            else greedily.
    """
    from alternatives import MODES

    from edgeexit import runtime
    from edgeexit.bundle.policy import decisions_of
    from edgeexit.bundle.policy_file import rules_from_json
    from edgeexit.measure.bench.cases import read_generation
    from edgeexit.runtime.programs.modes.choose import by_component

    model = runtime.load(bundle, threads=threads, capacity=capacity)
    model.features.limit_bytes = 0  # a known image would not run
    rows = read_inputs(Path(prompts))
    own = type(model)._mode

    def case(mode: str, rules: Any = None, **options: Any) -> Case:
        # A rule for every chain, so that none asks for one.
        never = {name: runtime.Rule() for name in model.chains}
        policy = runtime.Policy(rules=never | rules_from_json(rules or {}))
        decisions = decisions_of(policy, model.chain, model.chain_name)
        maker = MODES.get(mode)

        def make(session: Any, *_: Any, **__: Any) -> Any:
            assert maker is not None
            names = ["" if exit_ is None else exit_.name for exit_ in session.exits]
            return maker(session, names, by_component(names, decisions), **options)

        def enter() -> None:
            model.policy = policy
            bound = own.__get__(model) if maker is None else make
            model._mode = bound  # type: ignore[method-assign]

        def call(number: int) -> Any:
            arguments = {"mode": mode, **options} if maker is None else {}
            inputs = dict(rows[number])
            tokens = [int(token) for token in inputs.pop("tokens").reshape(-1)]
            return model.generate(
                [tokens],
                inputs=inputs,
                max_new_tokens=new_tokens,
                sampling=None if own_sampling else runtime.Sampling(),
                text=False,
                reuse=False,
                **arguments,
            ).finish()

        return Case(call, read_generation, enter)

    made = {name: case(**options) for name, options in cases.items()}
    return Subject(made, len(rows), model.describe_engine(), model.close)


def peak_bytes(what: str, bundle: str, prompts: str, threads: str, capacity: str) -> int:
    """Peak resident memory of this process for loading and one text, above that of imports."""
    import onnxruntime  # noqa: F401, its import is not part of it

    from edgeexit import runtime
    from edgeexit.runtime.memory import peak_bytes as largest

    row = _rows(prompts)[0]
    setting: Any = int(threads) if threads.isdigit() else threads
    before = largest()
    with runtime.load(
        bundle, threads=setting, capacity=int(capacity), unsplit=what == "unsplit"
    ) as model:
        model.generate(row, max_new_tokens=32, reuse=False).finish()
        return largest() - before


def _rows(prompts: str) -> list[list[int]]:
    return [list(map(int, row["tokens"])) for row in read_inputs(Path(prompts))]


if __name__ == "__main__":
    assert sys.argv[1] == "--peak"
    print(peak_bytes(*sys.argv[2:]))
