"""One pass with exits, against a reference in float64: who leaves where, and with which answer."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeexit.bundle.policy import ALWAYS, NEVER, forced
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import InputError, IntegrityError, PolicyError, StateError, UsageError
from edgeexit.runtime import Model, Result, Rule, load
from edgeexit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.toys import SCORE_NAMES, Toy, fill_toy, make_inputs, make_toy, reference, write_toy

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "open axes": {"open_axes": True},
    "rows last": {"rows_last": True},
    "rows last, open axes": {"rows_last": True, "open_axes": True},
    "together": {"rows": "together"},
    "growing": {"widths": (5, 40, 300, 7), "open_axes": True},
    "shrinking": {"widths": (300, 40, 5, 7), "rows_last": True},
}
EXITS = ["exit_1", "exit_2", "exit_3", "exit_4"]
Loaded = dict[str, tuple[Toy, Model]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """One model per kind of bundle. Shared by every example: bindings and buffers get reused."""
    folder = tmp_path_factory.mktemp("kinds")
    found = {}
    for kind, options in KINDS.items():
        toy = make_toy(**options)
        found[kind] = (toy, load(write_toy(toy, folder / kind)))
    yield found
    for _, model in found.values():
        model.close()


def test_a_first_call_with_one_row_is_right_when_states_of_open_size_grow(tmp_path: Path) -> None:
    toy = make_toy((5, 400, 30_000, 7), open_axes=True)
    inputs = make_inputs(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # scores saturate; logits matter here
        bundle = write_toy(toy, tmp_path / "bundle")
        expected = reference(toy, inputs)[-1]["logits"]
    with load(bundle) as fresh:
        made = fresh(inputs).outputs["logits"]
    np.testing.assert_allclose(made, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def model(toy_bundle: Bundle) -> Iterator[Model]:
    with load(toy_bundle) as opened:
        yield opened


def expected_exits(
    records: list[dict[str, NDArray]], policy: Rule, together: bool
) -> NDArray[np.int64]:
    """Where each row leaves, in the plainest code: one row at a time, one exit at a time."""
    rows, early = len(records[0]["logits"]), EXITS[:-1]
    low = early.index(policy.first) if policy.first else 0
    high = early.index(policy.last) if policy.last else len(early) - 1
    fired = np.zeros((rows, len(early)), bool)
    for row in range(rows):
        streak, previous = 0, None
        for number in range(low, high + 1):
            thresholds = policy.thresholds
            if isinstance(thresholds, dict):
                threshold = thresholds.get(early[number], NEVER)
            elif isinstance(thresholds, list):
                threshold = thresholds[number]
            else:
                threshold = thresholds
            predicted = int(np.argmax(records[number]["logits"][row]))
            streak = streak + 1 if predicted == previous else 0
            previous = predicted
            sure = records[number][policy.score][row] >= threshold
            fired[row, number] = sure and streak >= policy.patience
    found = np.full(rows, len(early))
    for row in range(rows):
        for number in range(len(early)):
            if fired[:, number].all() if together else fired[row, number]:
                found[row] = number
                break
    return found


def check(result: Result, records: list[dict[str, NDArray]], score: str) -> None:
    """Each row's answer and score are those of the exit it says it took."""
    for row, number in enumerate(result.exits):
        expected = records[number]
        # Four layers in float32 against float64: hypothesis found 6e-5 of the value.
        np.testing.assert_allclose(
            result.outputs["logits"][row], expected["logits"][row], rtol=2e-4, atol=1e-4
        )
        np.testing.assert_allclose(result.scores[row], expected[score][row], atol=1e-4)
    assert result.exit_names == [EXITS[number] for number in result.exits]
    assert result.scores.dtype == np.float32


thresholds = st.floats(0, 1) | st.sampled_from([NEVER, ALWAYS])
policies = st.builds(
    Rule,
    thresholds=thresholds
    | st.lists(thresholds, min_size=3, max_size=3)
    | st.dictionaries(st.sampled_from(EXITS[:-1]), thresholds),
    score=st.sampled_from(SCORE_NAMES),
    patience=st.integers(0, 3),
    first=st.none() | st.sampled_from(EXITS[:-1]),
    last=st.none() | st.sampled_from(EXITS[:-1]),
)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    policy=policies,
    rows=st.integers(1, 5),
    seed=st.integers(0, 50),
)
def test_rows_leave_where_the_reference_says_under_any_policy(
    models: Loaded, kind: str, policy: Rule, rows: int, seed: int
) -> None:
    toy, model = models[kind]
    inputs = make_inputs(rows, seed=seed)
    records = reference(toy, inputs)
    assume(clear_cut(records, policy))
    try:
        model.policy = policy
    except PolicyError as error:
        assert "is after" in str(error)
        return
    result = model(inputs)
    np.testing.assert_array_equal(
        result.exits, expected_exits(records, policy, toy.rows == "together")
    )
    check(result, records, policy.score)


def clear_cut(records: list[dict[str, NDArray]], policy: Rule) -> bool:
    """Whether float32 and float64 must agree: no score near a threshold, no two equal logits."""
    given_ = policy.thresholds
    levels = (
        list(given_.values())
        if isinstance(given_, dict)
        else given_
        if isinstance(given_, list)
        else [given_]
    )
    scores = np.concatenate([record[policy.score] for record in records])
    margins = np.concatenate([record["margin"] for record in records])
    finite = [level for level in levels if np.isfinite(level)]
    return bool(margins.min() > 1e-4) and all(np.abs(scores - x).min() > 1e-4 for x in finite)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stay_right_when_batch_sizes_change_between_calls(
    models: Loaded, kind: str
) -> None:
    toy, model = models[kind]
    model.policy = Rule(thresholds=0.75)
    for rows in (3, 1, 7, 2, 16, 1, 33, 7, 3):
        inputs = make_inputs(rows, seed=rows)
        check(model(inputs), reference(toy, inputs), "max_prob")


@pytest.mark.parametrize("name", EXITS)
def test_every_row_leaves_at_a_forced_exit(models: Loaded, name: str) -> None:
    toy, model = models["plain"]
    model.policy = forced(model.exits, name)
    inputs = make_inputs(5)
    result = model(inputs)
    assert result.exit_names == [name] * 5
    check(result, reference(toy, inputs), "max_prob")


def test_exits_that_the_policy_never_consults_are_not_computed_until_one_does(
    toy: Toy, toy_bundle: Bundle
) -> None:
    inputs = make_inputs(3)
    records = reference(toy, inputs)
    only_third = Rule(thresholds={"exit_3": ALWAYS})
    with load(toy_bundle, policy=only_third) as model:
        assert made_by_engine(model) == [0, 0, 2, 2]  # answers and scores
        check(model(inputs), records, "max_prob")
        model.policy = Rule(thresholds=0.75, score="margin")
        result = model(inputs)
        assert made_by_engine(model) == [2, 2, 2, 2]
        check(result, records, "margin")
        model.policy = only_third
        check(model(inputs), records, "max_prob")
        model.policy = Rule(thresholds=NEVER, patience=1)
        check(model(inputs), records, "max_prob")


def made_by_engine(model: Model) -> list[int]:
    """Per segment, how many answers and scores its opened graph makes."""
    found = []
    for leave in model.exits:
        graph = model._check_usable().graph(leave.behind)
        own = {*leave.outputs.values(), *leave.scores.values()}
        found.append(len(own.intersection(graph._outputs)))  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("rows", [1, 5])
def test_a_threshold_that_equals_the_score_leaves(models: Loaded, rows: int) -> None:
    _, model = models["plain"]
    inputs = make_inputs(rows)
    scores = model.trace(inputs).scores[1]["max_prob"]
    for score in scores:
        above = np.nextafter(score, np.float32(2))
        for threshold, leaves in ((score, scores >= score), (above, scores > score)):
            model.policy = Rule(thresholds={"exit_2": float(threshold)})
            expected = ["exit_2" if one else "exit_4" for one in leaves]
            assert model(inputs).exit_names == expected


@pytest.mark.parametrize("kind", KINDS)
def test_trace_gives_what_every_exit_says(models: Loaded, kind: str) -> None:
    toy, model = models[kind]
    inputs = make_inputs(5, seed=3)
    trace = model.trace(inputs)
    for record, outputs, scores in zip(
        reference(toy, inputs), trace.outputs, trace.scores, strict=True
    ):
        assert outputs.keys() == {"logits"}
        assert scores.keys() == set(SCORE_NAMES)
        np.testing.assert_allclose(outputs["logits"], record["logits"], atol=1e-4)
        for name in SCORE_NAMES:
            np.testing.assert_allclose(scores[name], record[name], atol=1e-4)
    assert len(trace.times_ms) == len(EXITS)


def test_a_second_call_leaves_the_first_result_intact(models: Loaded) -> None:
    _, model = models["plain"]
    for policy in (Rule(), Rule(thresholds=0.75), Rule(thresholds=ALWAYS)):
        model.policy = policy
        first = model(make_inputs(4, seed=1))
        kept = copy.deepcopy(first)
        trace = model.trace(make_inputs(4, seed=1))
        kept_trace = copy.deepcopy(trace)
        model(make_inputs(4, seed=2))
        model.trace(make_inputs(4, seed=3))
        np.testing.assert_array_equal(first.outputs["logits"], kept.outputs["logits"])
        np.testing.assert_array_equal(first.scores, kept.scores)
        np.testing.assert_array_equal(first.exits, kept.exits)
        for one, other in zip(trace.outputs, kept_trace.outputs, strict=True):
            np.testing.assert_array_equal(one["logits"], other["logits"])


def test_inputs_are_left_as_they_were(models: Loaded) -> None:
    _, model = models["plain"]
    model.policy = Rule(thresholds=0.75)
    inputs = make_inputs(5)
    kept = copy.deepcopy(inputs)
    model(inputs)
    for name, value in kept.items():
        np.testing.assert_array_equal(inputs[name], value)


@pytest.mark.parametrize("threshold", [0.0, 0.75, ALWAYS])
def test_a_row_with_nan_goes_to_the_last_exit_and_others_do_not_mind(
    models: Loaded, threshold: float
) -> None:
    _, model = models["plain"]
    model.policy = Rule(thresholds=threshold)
    inputs = make_inputs(4)
    clean = model(inputs)
    spoilt = {name: value.copy() for name, value in inputs.items()}
    spoilt["x"][2, 3] = np.nan
    result = model(spoilt)
    assert result.exit_names[2] == "exit_4"
    assert np.isnan(result.scores[2])
    others = [0, 1, 3]
    np.testing.assert_array_equal(result.exits[others], clean.exits[others])
    np.testing.assert_allclose(
        result.outputs["logits"][others], clean.outputs["logits"][others], atol=1e-6
    )


def test_times_are_given_for_the_segments_that_ran_when_asked(models: Loaded) -> None:
    _, model = models["plain"]
    model.policy = forced(model.exits, "exit_2")
    assert len(model(make_inputs(2), timed=True).times_ms) == 2
    assert model(make_inputs(2)).times_ms == []


def test_strided_and_swapped_inputs_are_read_rightly(models: Loaded) -> None:
    toy, model = models["plain"]
    model.policy = Rule(thresholds=0.75)
    inputs = make_inputs(4)
    wide = np.repeat(inputs["x"], 2, axis=1)[:, ::2]
    swapped = inputs["shift"].astype(">f4")
    result = model({**inputs, "x": wide, "shift": swapped})
    check(result, reference(toy, inputs), "max_prob")


def spoil(**changes: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = make_inputs(3)
    for name, value in changes.items():
        if value is None:
            del inputs[name]
        else:
            inputs[name] = value
    return inputs


@pytest.mark.parametrize(
    "inputs, message",
    [
        (spoil(x=None), "input x is missing"),
        (spoil(y=np.zeros(3)), "no input y"),
        (spoil(x=[[0.0] * 6]), "input x is a list"),
        (spoil(x=np.zeros((3, 6))), "float64, the model takes float32"),
        (spoil(x=np.zeros((3, 6), np.int64)), "int64, the model takes float32"),
        (spoil(x=np.zeros(6, np.float32)), r"shape \[6\]"),
        (spoil(x=np.zeros((3, 7), np.float32)), r"shape \[3, 7\]"),
        (spoil(x=np.zeros((2, 6), np.float32)), "batch = 2"),
        (spoil(x=np.zeros((0, 6), np.float32)), "is empty"),
        (spoil(scale=np.ones(2, np.float32)), "input scale has the shape"),
        ({}, "is missing"),
        ([1, 2], "not a mapping"),
        (np.zeros((3, 6), np.float32), "not a mapping"),
        (None, "not a mapping"),
        ({**make_inputs(3), 7: np.zeros(3)}, "no input 7"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(
    model: Model, inputs: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model(inputs)
    with pytest.raises(InputError, match=message):
        model.trace(inputs)
    assert len(model(make_inputs(3)).exits) == 3


def test_inputs_beyond_the_limits_are_refused(toy: Toy, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill_toy(toy, writer.folder)
        manifest.limits["batch"] = 4
        writer.commit(manifest)
    with load(tmp_path / "bundle") as model:
        model(make_inputs(4))
        with pytest.raises(InputError, match="batch is 5, .* at most 4"):
            model(make_inputs(5))


def test_a_policy_that_does_not_fit_is_refused_and_the_old_one_stays(model: Model) -> None:
    model.policy = Rule(thresholds=0.5)
    with pytest.raises(PolicyError, match="2 thresholds for 3"):
        model.policy = Rule(thresholds=[0.5, 0.5])
    assert model.policy.rules["forward"] == Rule(thresholds=0.5)


def test_a_closed_model_says_so(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model:
        model(make_inputs(1))
    with pytest.raises(StateError, match=r"closed.*Load the bundle again"):
        model(make_inputs(1))
    with pytest.raises(StateError, match="closed"):
        model.trace(make_inputs(1))
    model.close()


def test_a_model_cannot_be_pickled_or_copied(model: Model) -> None:
    with pytest.raises(StateError, match="pickled"):
        pickle.dumps(model)
    with pytest.raises(StateError, match="copied"):
        copy.copy(model)


def test_a_model_carried_over_a_fork_says_so(model: Model) -> None:
    model(make_inputs(1))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here: say what happened and go
        try:
            model(make_inputs(1))
            said = b"it ran"
        except StateError as error:
            said = str(error).encode()
        os.write(write, said)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    assert "before this process forked" in said
    assert len(model(make_inputs(2)).exits) == 2


def test_a_second_thread_is_refused_while_the_first_is_inside(model: Model) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(dict[str, NDArray]):
        """Inputs that keep the model busy until told otherwise."""

        def __getitem__(self, name: str) -> NDArray:
            entered.set()
            assert leave.wait(30)
            return super().__getitem__(name)

    results: list[Result] = []
    worker = threading.Thread(target=lambda: results.append(model(Slow(make_inputs(2)))))
    worker.start()
    try:
        assert entered.wait(30)
        with pytest.raises(StateError, match=r"another thread.*model of its own"):
            model(make_inputs(1))
    finally:
        leave.set()
        worker.join()
    assert len(results[0].exits) == 2
    assert len(model(make_inputs(1)).exits) == 1


def test_models_of_their_own_run_side_by_side(toy: Toy, toy_bundle: Bundle) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with load(toy_bundle, policy=Rule(thresholds=0.75)) as model:
                for rows in range(1, 20):
                    inputs = make_inputs(rows, seed=seed)
                    check(model(inputs), reference(toy, inputs), "max_prob")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_unsplit_answers_as_the_last_exit_does(toy: Toy, toy_bundle: Bundle) -> None:
    inputs = make_inputs(5)
    with load(toy_bundle, unsplit=True) as unsplit, load(toy_bundle) as chain:
        result = unsplit(inputs)
        assert result.exit_names == ["unsplit"] * 5
        assert np.isnan(result.scores).all()
        np.testing.assert_allclose(
            result.outputs["logits"], chain(inputs).outputs["logits"], atol=1e-5
        )
    np.testing.assert_allclose(
        result.outputs["logits"], reference(toy, inputs)[-1]["logits"], atol=1e-4
    )


def test_a_bundle_that_changed_after_loading_is_not_read_again(
    toy: Toy, toy_copy: Path, tmp_path: Path
) -> None:
    """Policies that need other graphs open them then; what was loaded before still answers."""
    inputs = make_inputs(3)
    records = reference(toy, inputs)
    with load(toy_copy) as model:
        check(model(inputs), records, "max_prob")
        weights = toy_copy / "graphs/weights.bin"
        other = tmp_path / "weights.bin"
        other.write_bytes(weights.read_bytes()[::-1])
        os.replace(other, weights)
        model.policy = Rule(thresholds=0.75)
        with pytest.raises(IntegrityError, match=r"weights.bin: changed since .* Load .* again"):
            model(inputs)
        model.policy = Rule()
        check(model(inputs), records, "max_prob")
        shutil.rmtree(toy_copy)
        model.policy = Rule(thresholds=0.75)
        with pytest.raises(IntegrityError, match="missing since"):
            model(inputs)
        model.policy = Rule()
        check(model(inputs), records, "max_prob")


def test_a_model_loaded_from_a_relative_path_does_not_mind_another_directory(
    toy: Toy, toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy_copy.parent)
    inputs = make_inputs(3)
    with load(toy_copy.name) as model:
        monkeypatch.chdir("/")
        model.policy = Rule(thresholds=0.75)
        check(model(inputs), reference(toy, inputs), "max_prob")


def test_unsplit_is_opened_once(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = OnnxRuntimeEngine.open

    def counting(self: OnnxRuntimeEngine, path: Path, outputs: Any = None) -> Any:
        opened.append(path)
        return real(self, path, outputs)

    monkeypatch.setattr(OnnxRuntimeEngine, "open", counting)
    with load(toy_bundle, unsplit=True) as model:
        model(make_inputs(2))
        model(make_inputs(1))
    assert len(opened) == 1


def test_one_row_decides_as_a_batch_does_when_a_threshold_lies_between_two_floats(
    models: Loaded,
) -> None:
    _, model = models["plain"]
    inputs = make_inputs(1)
    score = model.trace(inputs).scores[0]["max_prob"][0]
    between = (float(score) + float(np.nextafter(score, np.float32(2)))) / 2
    model.policy = Rule(thresholds={"exit_1": between})
    pair = {k: v if k == "scale" else np.repeat(v, 2, axis=0) for k, v in inputs.items()}
    alone, timed, both = model(inputs), model(inputs, timed=True), model(pair)
    assert alone.exits[0] == timed.exits[0] == both.exits[0] == both.exits[1] != 0


def test_inputs_as_keywords_are_refused_with_the_form_to_give_them_in(toy_bundle: Bundle) -> None:
    with load(toy_bundle) as model, pytest.raises(UsageError, match=r"model\(inputs\), not"):
        model(**make_inputs(2))
