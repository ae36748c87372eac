"""Is a decoder's bundle right on this device? Every exit against the reference samples, over whole
texts and token by token; the modes against each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import BundleError
from edgeexit.measure.check import REFERENCE, Comparison, Judge, Report, Threads, tolerances
from edgeexit.measure.data import read_npz
from edgeexit.runtime import Decoder, load_decoder
from edgeexit.runtime.executor.session import CHUNK, Session

NEW_TOKENS = 8


def check_decoder(
    model: Decoder,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    threads: Threads = "blocking",
) -> Report:
    """Compares a loaded decoder with its samples. Arguments and errors as for
    `edgeexit.measure.check.check`."""
    bundle = model.bundle
    default_atol, default_rtol = tolerances(bundle)
    judge = Judge(default_atol if atol is None else atol, default_rtol if rtol is None else rtol)
    if REFERENCE not in bundle.manifest.samples:
        raise BundleError(
            f"{REFERENCE}: the bundle holds no reference samples", fix="Export it again."
        )
    samples = read_npz(bundle.file(REFERENCE))
    names = [leave.name for leave in model.exits]
    for key in [
        "input/tokens",
        *(f"{n}/{k}" for n in names for k in ("logits", "token", "margin")),
    ]:
        if key not in samples:
            raise BundleError(f"{REFERENCE}: there is no {key}", fix="Export the bundle again.")
    tokens = samples["input/tokens"]
    rows, length = tokens.shape
    for step, how in ((length, "whole texts"), (1, "token by token"), (5, "in pieces")):
        found = _every_exit(model, tokens, step)
        for name, (logits, greedy) in zip(names, found, strict=True):
            judge.compare(name, f"logits, {how}", logits, samples[f"{name}/logits"])
            # Where two logits lie closer than rounding moves them, either token is right;
            # logits are of the order of ten.
            clear = samples[f"{name}/margin"] > judge.atol + judge.rtol * 10
            wrong = int((clear & (greedy != samples[f"{name}/token"])).sum())
            judge.comparisons.append(
                Comparison(name, f"greedy token, {how}", float(wrong), not wrong)
            )
    prompts = [row.tolist() for row in tokens]
    count = max(1, min(NEW_TOKENS, model.capacity - length))
    full = model.generate(prompts, max_new_tokens=count).finish().tokens
    # An adapter's caches are kept by drafting alone, so each drafts once.
    drafting = [leave.name for n, leave in enumerate(model.exits) if n == 0 or leave.adapter]
    for name in drafting:
        exact = model.generate(prompts, max_new_tokens=count, mode="exact", draft_exit=name)
        apart = sum(
            _differ(model, prompt, one, other, judge)
            for prompt, one, other in zip(prompts, full, exact.finish().tokens, strict=True)
        )
        what = f"{rows} texts of {count} tokens drafted by {name}, as full"
        judge.comparisons.append(Comparison("exact", what, float(apart), not apart))
    engine = model.describe_engine()["engine"]
    with load_decoder(
        bundle,
        engine,
        threads=threads,
        capacity=model.capacity,
        caches=model.caches,
        unsplit=True,
    ) as whole:
        session = whole.session(rows)
        session.embed(tokens)
        session.run(0, length)
        made = session.parts[0].answers["logits"]
    judge.compare("unsplit", "logits, whole texts", made, samples[f"{names[-1]}/logits"])
    return Report(judge.comparisons, rows, judge.atol, judge.rtol, [])


def _differ(
    model: Decoder, prompt: list[int], full: list[int], exact: list[int], judge: Judge
) -> bool:
    """Whether two texts part at a place where the model's two tokens were not as good as equal:
    kernels for one row and for several round differently."""
    if full == exact:
        return False
    pairs = list(zip(full, exact, strict=False))
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    [logits], _ = _every_exit(model, np.array([[*prompt, *full[:place]]]), CHUNK)[-1]
    decoding = model.bundle.manifest.decoding
    assert decoding is not None
    one, other = (
        # A text that is shorter ended with a stop token, which is not among its tokens.
        logits[text[place : place + 1] or decoding.stop_tokens].max()
        for text in (full, exact)
    )
    return bool(abs(one - other) > judge.atol + judge.rtol * abs(one))


def _every_exit(
    model: Decoder, tokens: NDArray[np.int64], step: int
) -> list[tuple[NDArray, NDArray]]:
    """Per exit, logits of each row's last token ``[rows, vocabulary]`` and greedy tokens ``[rows,
    seq]``, with so many tokens in a run."""
    session: Session = model.session(len(tokens))
    head = session.head()
    greedy: list[list[NDArray]] = [[] for _ in session.parts]
    logits: list[NDArray] = [np.empty(0)] * len(session.parts)
    for start in range(0, tokens.shape[1], step):
        part = np.ascontiguousarray(tokens[:, start : start + step])
        session.embed(part)
        for number in range(len(session.parts)):
            session.run(number, part.shape[1])
            states = session.adapt(number, part.shape[1])
            answers = head(states.reshape(-1, states.shape[-1]))
            greedy[number].append(answers["token"].reshape(part.shape).copy())
            logits[number] = answers["logits"].reshape(*part.shape, -1)[:, -1].copy()
    return [(z, np.concatenate(g, axis=1)) for z, g in zip(logits, greedy, strict=True)]
