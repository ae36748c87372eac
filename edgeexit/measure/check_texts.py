"""Checks a model that writes text against its reference samples.

Texts run whole, token by token and in pieces, and again behind every early exit of an earlier chain
(an encoder). They are written in the modes ``full`` and ``exact``, and, with a policy, in mode
``fast``, whose tokens must be those of the exits that the policy takes. Mode ``approximate`` is not
compared: its states are approximations, for which there is no reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Decoding, Place, PromptState
from edgeexit.bundle.policy import (
    OUT_OF_REACH,
    Policy,
    Rule,
    decisions_of,
    drop_thresholds,
    rule_of,
)
from edgeexit.errors import InputError
from edgeexit.measure.check_exits import (
    Checked,
    compare_exits,
    decided,
    forced_rules,
    likelier,
    only,
    reference,
    rules_of,
)
from edgeexit.measure.probe import ask, chains_before
from edgeexit.runtime import Model, Sampling

NEW_TOKENS = 8
"""Number of tokens to compare between modes."""

GIVEN = "the given policy"
GATE = "gate"
"""Score of a gate."""


def check_texts(checked: Checked, given: Policy | None) -> None:
    """Compares exits and written texts. The model's policy must not stop early; it is changed.

    Args:
        given: A policy to check in addition.
    """
    model = checked.model
    _check_tokens(checked)
    _check_drafting(checked)
    _check_gates(checked)
    for name, chain in chains_before(model).items():
        for title, rule in {**forced_rules(chain), **rules_of(checked, name, chain, given)}.items():
            _check_earlier(checked, name, chain, title, rule)
    if given is not None:
        _check_policy(checked, given)


def _check_tokens(checked: Checked) -> None:
    """Compares exits on whole texts, token by token and in pieces."""
    chain = checked.model.chain
    compare_exits(checked, chain, ask(checked.model, checked.inputs).arrays, "whole texts")
    if _reads_whole_prompts(checked.model):
        return
    for step, how in ((1, "token by token"), (5, "in pieces")):
        compare_exits(checked, chain, ask(checked.model, checked.inputs, step=step).arrays, how)


def _check_gates(checked: Checked) -> None:
    """Compares the scores of gates, none of which drops anything meanwhile."""
    model, samples = checked.model, checked.samples
    gates = [
        exit_
        for exit_ in model.chain.exits
        if exit_.action == "drop" and exit_.path and f"{exit_.name}/{GATE}" in samples
    ]
    if not gates:
        return
    rule = Rule(thresholds={gate.name: OUT_OF_REACH for gate in gates})
    before, model.policy = model.policy, only(model, model.chain_name, rule)
    scores = _write(checked, _starts(checked), 1, mode="full").statistics.gates
    model.policy = before
    for gate in gates:
        expected = samples[f"{gate.name}/{GATE}"]
        found = np.array(scores.get(gate.name, np.full(len(expected), np.nan)), np.float32)
        checked.judge.compare_score(gate.name, "score gate, whole prompts", found, expected)


def _reads_whole_prompts(model: Model) -> bool:
    """Whether a state depends on all tokens of a prompt, so that a prompt cannot run in pieces."""
    components = model.bundle.manifest.components
    calls = [call.component for exit_ in model.chain.stops for call in exit_.path]
    readers = {
        state.maker
        for name in [*model.chain.components, *calls]
        for state in components[name].states
        if isinstance(state, PromptState)
    }  # a component's own states among them
    return any("new" in tensor.axes for name in readers for tensor in components[name].inputs)


def _check_earlier(checked: Checked, name: str, chain: Chain, title: str, rule: Rule) -> None:
    """Compares the exits that an earlier chain takes with a rule, and the answers behind them."""
    model = checked.model
    if not chain.stops[:-1]:
        return
    model.policy = only(model, name, rule)
    names = [exit_.name for exit_ in chain.stops]
    taken = np.array([names.index(exit_) for exit_ in _earlier_exits(checked)[name]])
    if all(f"{exit_}/{rule.score}" in checked.samples for exit_ in names[:-1]):
        independent = chain.rows == "independent"
        wanted, sure = decided(checked.judge, checked.samples, chain, rule, independent=independent)
        wrong = sure & (taken != wanted)
        where = names[int(wanted[wrong][0])] if wrong.any() else "decisions"
        checked.judge.count(where, f"exit taken ({title}, {len(taken)} rows)", int(wrong.sum()))
    exits = [names[number] for number in taken]
    behind = _referenced(checked, {name: exits}, f"answers behind exits of {name} ({title})")
    if behind is None:
        return
    answers = ask(model, checked.inputs).arrays
    compare_exits(checked, model.chain, answers, f"whole texts, {name}: {title}", behind)


def _earlier_exits(checked: Checked) -> Mapping[str, list[str]]:
    """Earlier chain -> per row, the exit that it takes under the model's policy."""
    return _write(checked, _starts(checked), 1, mode="full").statistics.earlier


def _behind(checked: Checked, earlier: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Per text, the early exit at which an earlier chain stopped for it; empty: none. None if no
    sample can be for that: two chains stopped early, or the images of a text at different exits."""
    model = checked.model
    manifest = model.bundle.manifest
    placed = {step.source for step in manifest.steps if isinstance(step, Place)}
    found = [""] * checked.rows
    for name, exits in earlier.items():
        chain = model.chains[name]
        names = ["" if exit_ == chain.stops[-1].name else exit_ for exit_ in exits]
        if {tensor.name for tensor in chain.outputs} & placed:  # its rows are not those of texts
            if len(set(names)) > 1:
                return None
            names = names[:1] * checked.rows
        if any(names) and any(found):
            return None
        found = names if any(names) else found
    return found


def _referenced(
    checked: Checked, earlier: Mapping[str, Sequence[str]], what: str
) -> list[str] | None:
    """`_behind`, if the bundle has samples for it. None: it has none; a note says so."""
    behind, key = _behind(checked, earlier), f"{checked.model.exits[-1].name}/logits"
    if behind is not None and reference(checked.samples, key, behind) is not None:
        return behind
    if behind is not None:
        checked.note(f"{what} were not compared: the bundle has no reference; export it again")
    elif GIVEN in what:
        checked.note(
            f"{what} were not compared: references are for one early exit of earlier chains a text"
        )
    return None


def _check_policy(checked: Checked, given: Policy) -> None:
    """Compares the exits that tokens take under a policy, and the texts of its modes."""
    model = checked.model
    name, chain = model.chain_name, model.chain
    early = {
        n for n, c in model.chains.items() if any(d.consult for d in decisions_of(given, c, n)[:-1])
    }
    drops = drop_thresholds(given.rules.get(name, Rule()), chain)
    model.policy = given
    if early - {name} or drops:
        _check_drafting(checked, f", {GIVEN}")
    if drops:
        checked.note(
            f"tokens of mode fast were not compared: the policy may drop tokens at {min(drops)}"
        )
    elif name in early:
        _check_tokens_taken(checked, rule_of(given, chain, name))
        _check_fast(checked, rule_of(given, chain, name))


def _check_tokens_taken(checked: Checked, rule: Rule) -> None:
    """Compares the exits that all tokens of the samples take, and the first token that mode
    ``fast`` then writes, with the reference."""
    model, chain, judge = checked.model, checked.model.chain, checked.judge
    behind = _referenced(checked, _earlier_exits(checked), f"decisions of tokens ({GIVEN})")
    if behind is None:
        return
    keys = [f"{e.name}/{n}" for e in chain.stops for n in (rule.score, "token", "gap")]
    samples = {key: reference(checked.samples, key, behind) for key in keys}
    expected = {key: value for key, value in samples.items() if value is not None}
    here = ask(model, checked.inputs).arrays
    shape = here[f"{chain.stops[0].name}/token"].shape
    wanted, sure = decided(judge, _flat(expected), chain, rule)
    taken, _ = decided(
        judge, _flat({key: here[key] for key in expected if key in here}), chain, rule
    )
    wrong = int((sure & (taken != wanted)).sum())
    judge.count("decisions", f"exit taken ({GIVEN}, {wanted.size} tokens)", wrong)
    decoding = _decoding(model)
    tokens = checked.inputs[decoding.tokens].tolist()
    written = _write(checked, tokens, 1, mode="fast").tokens
    exits, sure = wanted.reshape(shape)[:, -1], sure.reshape(shape)[:, -1]
    wrong = 0
    for row, text in enumerate(written):
        exit_ = chain.stops[int(exits[row])].name
        clear = bool(sure[row] and likelier(judge, expected[f"{exit_}/gap"][row, -1]))
        answers = text or decoding.stop_tokens  # a stop token is not part of the text
        wrong += clear and int(expected[f"{exit_}/token"][row, -1]) not in answers
    judge.count("fast", f"first token of {len(written)} texts, {GIVEN}", wrong)


def _check_fast(checked: Checked, rule: Rule) -> None:
    """Checks that mode ``fast`` writes the tokens of the exits that the policy takes, which all
    exits say of the written text as a given one."""
    chain, judge = checked.model.chain, checked.judge
    prompts = _starts(checked)
    count = _new_tokens(checked, prompts)
    written = _write(checked, prompts, count, mode="fast").tokens
    length = max(len(p) + len(text) for p, text in zip(prompts, written, strict=True))
    texts = [[*p, *text] for p, text in zip(prompts, written, strict=True)]
    try:
        answers = _ask_texts(checked, texts, length)
    except InputError:  # the model wrote a placeholder token, for which there is no data
        checked.note("tokens of mode fast were not compared: a placeholder is among them")
        return
    taken, sure = decided(judge, _flat(answers), chain, rule)
    taken, sure = taken.reshape(len(texts), -1), sure.reshape(len(texts), -1)
    wrong = 0
    for row, text in enumerate(written):
        for place, token in enumerate(text, start=len(prompts[row])):
            exit_ = chain.stops[int(taken[row, place - 1])].name
            differs = sure[row, place - 1] and answers[f"{exit_}/token"][row, place - 1] != token
            if differs and not _as_likely(checked, texts, row, place, exit_):
                wrong += 1
                break
    what = f"{len(prompts)} texts of {count} tokens, {GIVEN}, as its exits answer token by token"
    judge.count("fast", what, wrong)


def _as_likely(
    checked: Checked, texts: Sequence[list[int]], row: int, place: int, exit_: str
) -> bool:
    """Whether an exit finds the token at a place of a text about as likely as the likeliest."""
    judge = checked.judge
    answers = _ask_texts(checked, [text[:place] for text in texts], place)
    logits = answers[f"{exit_}/logits"][row]
    best, other = float(logits.max()), float(logits[texts[row][place]])
    return best - other <= judge.atol + judge.rtol * abs(best)


def _ask_texts(
    checked: Checked, texts: Sequence[Sequence[int]], length: int
) -> Mapping[str, NDArray]:
    """Runs every exit over texts, which are filled up to one length with their last tokens."""
    filled = [[*text, *[text[-1]] * (length - len(text))] for text in texts]
    tokens = _decoding(checked.model).tokens
    return ask(checked.model, {**checked.inputs, tokens: np.array(filled, np.int64)}).arrays


def _flat(arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Scores of tokens ``[text, seq]`` as ``[token]``."""
    return {key: value.reshape(-1) for key, value in arrays.items()}


def _check_drafting(checked: Checked, how: str = "") -> None:
    """Checks that the mode ``exact`` writes the same texts as ``full``."""
    model, prompts = checked.model, _starts(checked)
    count = _new_tokens(checked, prompts)
    full = _write(checked, prompts, count, mode="full").tokens
    # Only drafting keeps the states of an adapter, so each exit drafts once.
    early = model.exits[:-1]
    drafting = [exit_.name for n, exit_ in enumerate(early) if n == 0 or len(exit_.path) > 1]
    for name in drafting:
        drafted = _write(checked, prompts, count, mode="exact", draft_exit=name).tokens
        wrong = sum(
            _written_apart(checked, prompts, full, row, text) for row, text in enumerate(drafted)
        )
        what = f"{len(prompts)} texts of {count} tokens drafted by {name}, as full{how}"
        checked.judge.count("exact", what, wrong)


def _written_apart(
    checked: Checked,
    prompts: Sequence[list[int]],
    full: Sequence[list[int]],
    row: int,
    exact: list[int],
) -> bool:
    """Whether a text differs from that of the mode ``full`` at a token where the two candidates
    were not equally likely: kernels for one row and for several round differently."""
    if full[row] == exact:
        return False
    decoding = _decoding(checked.model)
    pairs = list(zip(full[row], exact, strict=False))
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    # The other rows run too: inputs of earlier chains may be for all texts.
    texts = [[*p, *f[:place]] for p, f in zip(prompts, full, strict=True)]
    try:
        answers = _ask_texts(checked, texts, len(texts[row]))
    except InputError:  # the model wrote a placeholder token, for which there is no data
        return True
    logits = answers[f"{checked.model.exits[-1].name}/logits"][row]
    likely, other = (
        # A shorter text ended with a stop token, which its tokens do not include.
        logits[text[place : place + 1] or decoding.stop_tokens].max()
        for text in (full[row], exact)
    )
    return bool(abs(likely - other) > checked.judge.atol + checked.judge.rtol * abs(likely))


def _starts(checked: Checked) -> list[list[int]]:
    """What the written texts begin with: the samples, or the start tokens behind an encoder."""
    decoding = _decoding(checked.model)
    return [decoding.start_tokens or row.tolist() for row in checked.inputs[decoding.tokens]]


def _new_tokens(checked: Checked, prompts: Sequence[list[int]]) -> int:
    return max(1, min(NEW_TOKENS, checked.model.capacity - max(map(len, prompts))))


def _write(checked: Checked, prompts: Sequence[list[int]], count: int, **options: Any) -> Any:
    """Writes so many tokens, greedily and not by the checkpoint's settings."""
    others = dict(checked.inputs)
    others.pop(_decoding(checked.model).tokens)
    options |= {"inputs": others, "max_new_tokens": count, "text": False, "sampling": Sampling()}
    options["reuse"] = False
    return checked.model.generate(prompts, **options).finish()


def _decoding(model: Model) -> Decoding:
    decoding = model.bundle.manifest.decoding
    assert decoding is not None
    return decoding


__all__ = ["check_texts"]
