"""Texts that begin like an earlier one: they compute only what is new, and are what they would be
from the beginning, whatever ran before."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeexit.bundle.manifest import StateForm
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, EdgeExitError, InputError, StateError, UsageError
from edgeexit.runtime import Model, Rule, Sampling, load
from edgeexit.runtime.programs.prefix_cache import LEAST
from tests.decoder_graphs import VOCABULARY
from tests.decoder_toys import batch_inputs, make_decoder_toy, make_rows, write_decoder_toy

CAPACITY, NEW = 96, 9
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"adapter": 1},
    "adapter of the first": {"adapter": 0},
    "two layers a component": {"layers": (2, 1, 1)},
    "saturation": {"saturated": True, "layers": (1, 2, 1)},
    "stateless": {"stateless": True},
    "own mean": {"stateless": True, "own_mean": True, "layers": (1, 3), "exits": (0,)},
    "encoder": {"encoder": True},
    "gate": {"gate": True, "prefix": True},
}
"""Of toys; of the last four, states depend on more than the tokens before."""
ALONE = [*OPTIONS][:5]
Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    @functools.cache
    def make(kind: str) -> Bundle:
        toy = make_decoder_toy(**OPTIONS[kind], capacity=CAPACITY)
        return write_decoder_toy(toy, tmp_path_factory.mktemp("toy") / "bundle")

    return make


@pytest.fixture
def model(bundles: Bundles) -> Iterator[Model]:
    with load(bundles("plain")) as loaded:
        yield loaded


def random_text(random: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in random.integers(3, VOCABULARY, length)]


def write(model: Model, prompt: Any, **options: Any) -> tuple[list[list[int]], int]:
    made = model.generate(prompt, max_new_tokens=NEW, **options).finish()
    return made.tokens, made.reused_tokens


@pytest.mark.parametrize("kind", ALONE)
def test_texts_are_those_from_the_beginning(kind: str, bundles: Bundles) -> None:
    take_turns(bundles(kind), kind)


@pytest.mark.parametrize("form", ["in-place", "fixed", "append"])
def test_every_form_of_states_goes_on(form: StateForm, decoder_bundle: Bundles) -> None:
    take_turns(decoder_bundle("llama"), "llama", states=form)


def take_turns(bundle: Bundle, kind: str, **options: Any) -> None:
    """Random turns in all modes: prompts that go on behind the last text, or part from it anywhere;
    texts that are closed early, thresholds that change, several texts at a time."""
    random = np.random.default_rng(7)
    score = "saturation" if kind == "saturation" else "max_prob"
    modes = ["full", "exact", "fast"] + ["approximate"] * ("adapter" not in kind)
    with load(bundle, **options) as model, load(bundle, **options) as fresh:
        known: list[list[int]] = [random_text(random, 20) for _ in range(3)]
        reused = 0
        for _ in range(40):
            rows = []
            for _ in range(int(random.choice([1, 1, 1, 2]))):
                before = known[random.integers(len(known))]
                kept = before[: int(random.integers(len(before) // 2, len(before) + 1))]
                rows.append([*kept, *random_text(random, int(random.integers(1, 6)))][-60:])
            rule = Rule(score=score, thresholds=float(random.choice([-2.0, 0.2, 0.6, 2.0])))
            model.policy = fresh.policy = rule
            mode = str(random.choice(modes))
            how: dict[str, Any] = {"mode": mode, "max_new_tokens": int(random.integers(1, NEW))}
            expected = fresh.generate(rows, reuse=False, **how).finish()
            assert expected.reused_tokens == 0
            made = model.generate(rows, **how)
            if random.random() < 0.3:
                next(made, None)
                made.close()
                for tokens, whole in zip(made.tokens, expected.tokens, strict=True):
                    assert tokens == whole[: len(tokens)]
            else:
                assert made.finish().tokens == expected.tokens, (mode, rows)
            reused += made.reused_tokens
            texts = zip(rows, made.tokens, strict=True)
            known = [*known, *([*row, *tokens] for row, tokens in texts)][-6:]
        assert reused > 200


@pytest.mark.parametrize("mode", ["full", "exact", "fast"])
def test_a_second_turn_computes_only_what_is_new(model: Model, mode: Any) -> None:
    model.policy = Rule(thresholds=0.3)
    first = random_text(np.random.default_rng(1), 30)
    [answer], reused = write(model, first, mode=mode)
    assert reused == 0
    turn = [*first, *answer, 5, 6, 7]
    [tokens], reused = write(model, turn, mode=mode)
    assert reused in (len(turn) - 4, len(turn) - 3)  # the answer's last token may not have run
    assert [tokens] == write(model, turn, mode=mode, reuse=False)[0]
    assert write(model, turn, mode=mode)[1] == 0  # and that was not kept
    assert write(model, turn, mode=mode)[1] == len(turn) - 1


def test_a_text_that_needed_no_later_layer_still_does_not(model: Model) -> None:
    """Tokens that wait in front of layers go on waiting there."""
    model.policy = Rule(thresholds=float("-inf"))
    prompt = random_text(np.random.default_rng(1), 30)
    made = model.generate(prompt, max_new_tokens=NEW, mode="fast").finish()
    turn = [*prompt, *made.tokens[0], 9]
    again = model.generate(turn, max_new_tokens=NEW, mode="fast").finish()
    assert again.reused_tokens == len(turn) - 2
    assert again.statistics.catch_ups == 0
    assert write(model, turn, mode="fast", reuse=False)[0] == again.tokens
    # A mode that needs all layers finds nothing in the last ones.
    write(model, turn, mode="fast")
    assert write(model, turn, mode="full")[1] == 0


def test_approximate_states_are_not_used_again(model: Model) -> None:
    model.policy = Rule(thresholds=float("-inf"))
    prompt = random_text(np.random.default_rng(1), 30)
    write(model, prompt, mode="approximate")
    tokens, reused = write(model, prompt)
    assert reused == 0
    assert write(model, prompt) == (tokens, len(prompt) - 1)


def test_conversations_that_take_turns_are_kept_up_to_a_bound(model: Model) -> None:
    random = np.random.default_rng(2)
    talks = [random_text(random, 30) for _ in range(3)]
    for talk in talks:
        assert write(model, talk)[1] == 0
    assert model.prefixes.bytes > 0
    for turn in range(2):
        for number, talk in enumerate(talks):
            [answer], reused = write(model, talk)
            assert reused >= len(talk) - 3 - turn
            assert [answer] == write(model, talk)[0]
            talks[number] = [*talk, *answer, 4, 5]
    one = model.prefixes.bytes // 3
    assert model.prefixes.hits > 6
    model.prefixes.limit_bytes = one // 2
    for talk in (talks[0], talks[1], talks[0]):
        write(model, talk)
    assert model.prefixes.bytes <= one // 2
    model.prefixes.clear()
    assert model.prefixes.bytes == 0


def test_a_bound_that_is_full_keeps_what_was_loaded(model: Model, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    path, system = tmp_path / "system.npz", random_text(random, 40)
    model.save_prefix(path, system)
    for _ in range(3):
        model.load_prefix(path)
    one = model.prefixes.bytes
    model.prefixes.limit_bytes = 2 * one + 100
    talks = [random_text(random, 40) for _ in range(3)]
    for _ in range(2):
        for talk in talks:
            write(model, talk)
            assert one <= model.prefixes.bytes <= 2 * one + 100
    assert write(model, [*system, 3])[1] == len(system)


def test_rows_of_which_unlike_parts_are_kept_still_fit(model: Model) -> None:
    """Rows run side by side: a long new part stands behind the longest kept one."""
    random = np.random.default_rng(6)
    a, b, c = (random_text(random, 80) for _ in range(3))
    for mode in ("full", "exact", "fast"):
        write(model, [a, b], mode=mode)
        prompts = [[*a, 5], c]
        assert write(model, prompts, mode=mode)[0] == write(model, prompts, reuse=False)[0]


def test_an_error_in_the_middle_leaves_nothing_behind(model: Model) -> None:
    prompt = random_text(np.random.default_rng(1), 30)

    def fail(_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(prompt, max_new_tokens=NEW, on_piece=fail).finish()
    assert write(model, prompt)[1] == 0
    with pytest.raises(InputError):
        write(model, [*prompt, 10**6])
    assert write(model, prompt)[1] == len(prompt) - 1


def test_sampled_texts_go_on_too(model: Model) -> None:
    prompt = random_text(np.random.default_rng(1), 30)
    sampling = Sampling(temperature=1.0, seed=4)
    wanted, _ = write(model, prompt, sampling=sampling, reuse=False)
    write(model, prompt)
    assert write(model, prompt, sampling=sampling) == (wanted, len(prompt) - 1)


def test_the_unsplit_model_goes_on_too(bundles: Bundles) -> None:
    prompt = random_text(np.random.default_rng(1), 30)
    with load(bundles("plain"), unsplit=True) as unsplit:
        wanted, _ = write(unsplit, prompt)
        assert write(unsplit, prompt) == (wanted, len(prompt) - 1)
        write(unsplit, [prompt, prompt[:20] + prompt[:10]])
        assert write(unsplit, [prompt, prompt])[1] == 0


@pytest.mark.parametrize("kind", [*OPTIONS][6:])
def test_states_that_depend_on_more_are_not_kept(kind: str, bundles: Bundles) -> None:
    toy = make_decoder_toy(**OPTIONS[kind], capacity=CAPACITY)
    rows = make_rows(toy, [12])
    inputs = batch_inputs(rows) or None
    with load(bundles(kind)) as model:
        prompts = [row.prompt for row in rows]
        texts = [write(model, prompts, inputs=inputs) for _ in range(2)]
        assert texts[0] == texts[1] and texts[1][1] == 0
        assert model.prefixes.bytes == 0


@pytest.mark.parametrize("kind", ["plain", "adapter"])
@pytest.mark.parametrize("mode", ["full", "exact", "fast"])
def test_a_saved_prefix_is_what_would_be_computed(
    kind: str, mode: Any, bundles: Bundles, tmp_path: Path
) -> None:
    system = random_text(np.random.default_rng(3), 40)
    prompt = [*system, 4, 5, 6]
    with load(bundles(kind)) as model:
        model.policy = Rule(thresholds=0.3)
        wanted, _ = write(model, prompt, mode=mode)
        assert model.save_prefix(tmp_path / "system.npz", system) == len(system)
    with load(bundles(kind)) as model:
        model.policy = Rule(thresholds=0.3)
        assert model.load_prefix(tmp_path / "system.npz") == len(system)
        other = random_text(np.random.default_rng(4), 20)
        assert write(model, prompt, mode=mode) == (wanted, len(system))
        write(model, other, mode=mode)
        tokens, reused = write(model, prompt, mode=mode)
        assert tokens == wanted and reused >= len(system)
        write(model, other, mode=mode)
        model.prefixes.clear()
        assert write(model, prompt[:-1], mode=mode)[1] < LEAST


def test_a_prefix_of_something_else_is_refused(
    bundles: Bundles, model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "system.npz"
    system = random_text(np.random.default_rng(3), 40)
    model.save_prefix(path, system)
    with load(bundles("adapter")) as other, pytest.raises(StateError, match="of another bundle"):
        other.load_prefix(path)
    with np.load(path) as file:
        held = dict(file)
    about = json.loads(bytes(held["about"]))
    about["engine"]["engine"] = "cuda"
    held["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "cuda.npz", **held)  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"of another engine \(cuda"):
        model.load_prefix(tmp_path / "cuda.npz")
    with load(model.bundle, capacity=40) as other, pytest.raises(StateError, match="larger cap"):
        other.load_prefix(path)
    model.prefixes.limit_bytes = 100
    with pytest.raises(StateError, match="0 of 100 are taken.*limit_bytes"):
        model.load_prefix(path)
    assert model.prefixes.bytes == 0
    raw = path.read_bytes()
    entry = raw.index(b"PK\x01\x02")  # whose seventh byte is the version that is needed
    flipped = raw[: entry + 6] + b"\xd7" + raw[entry + 7 :]
    model.prefixes.limit_bytes = None
    for damaged in (raw[: len(raw) // 2], b"", b"no archive", flipped):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read as saved states"):
            model.load_prefix(path)
    with pytest.raises(DataError, match="No such file"):
        model.load_prefix(tmp_path / "none.npz")
    with pytest.raises(UsageError, match="path is a NoneType"):
        model.load_prefix(None)  # type: ignore[arg-type]
    for name, value in {
        "tokens": np.array([1.0, 2.0]),
        "about": np.frombuffer(b'{"format": 1, "bundle": null, "engine": {}}', np.uint8),
        "states/0/0": np.full_like(held["states/0/0"], np.nan),
    }.items():
        np.savez(path, **(held | {name: value}))  # type: ignore[arg-type]
        with pytest.raises((DataError, StateError)):
            model.load_prefix(path)


@pytest.mark.parametrize("prompt", [[], [10**6], list(range(3, 20)) * 6, [[3, 4], [5, 6]]])
def test_prompts_that_cannot_be_saved_are_refused(
    model: Model, prompt: Any, tmp_path: Path
) -> None:
    with pytest.raises(EdgeExitError):
        model.save_prefix(tmp_path / "system.npz", prompt)
    assert not list(tmp_path.iterdir())


def test_states_that_depend_on_more_are_not_saved(bundles: Bundles, tmp_path: Path) -> None:
    with load(bundles("encoder")) as model, pytest.raises(StateError, match="cannot be saved"):
        model.save_prefix(tmp_path / "system.npz", [1, 4, 5])


def test_bounds_are_whole_numbers(model: Model) -> None:
    with pytest.raises(UsageError, match="limit_bytes is -1"):
        model.prefixes.limit_bytes = -1


def test_ignore_eos_writes_on(bundles: Bundles, tmp_path: Path) -> None:
    toy = make_decoder_toy(capacity=CAPACITY, stop_tokens=tuple(range(VOCABULARY)))
    with load(write_decoder_toy(toy, tmp_path / "bundle")) as model:
        prompt = random_text(np.random.default_rng(1), 5)
        assert write(model, prompt)[0] == [[]]
        for mode in ("full", "exact", "fast"):
            [tokens], _ = write(model, prompt, mode=mode, ignore_eos=True)
            assert len(tokens) == NEW


@pytest.mark.parametrize("given", [{"ignore_eos": "no"}, {"reuse": None}, {"reuse": 1}])
def test_flags_are_true_or_false(model: Model, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Use True or False"):
        write(model, random_text(np.random.default_rng(1), 5), **given)
