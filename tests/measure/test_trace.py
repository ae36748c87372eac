"""A trace is written and read strictly, and its replay is what really running the policy does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, MeasurementError, PolicyError, UsageError
from edgeexit.measure.calibrate import calibrate
from edgeexit.measure.data import open_data
from edgeexit.measure.token_times import MIN_RUNS
from edgeexit.measure.trace import Trace, record, replay
from edgeexit.measure.trace_file import read_trace, write_trace
from edgeexit.runtime import Model, Policy, Rule, load
from tests.decoder_reference import Reference, Row
from tests.decoder_toys import VOCABULARY, make_decoder_toy, write_decoder_toy
from tests.toys import make_inputs, make_toy, write_toy
from tests.two_chains import write_two_chains

ROWS = 23


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **make_inputs(ROWS), label=np.arange(ROWS) % 3)
    return path


@pytest.fixture(scope="module")
def model(toy_bundle: Bundle):
    with load(toy_bundle) as model:
        yield model


@pytest.fixture(scope="module")
def trace(model: Model, data_file: Path) -> Trace:
    return record(model, open_data(data_file, model.bundle), 7)


@st.composite
def policies(draw: st.DrawFn, trace: Trace) -> Rule:
    """Any policy of the toy, with thresholds between scores: equal up to rounding is not equal."""
    early = trace.exits[:-1]
    score = draw(st.sampled_from(sorted(trace.scores)))
    values = np.unique(trace.scores[score][:-1])
    middles = ((values[1:] + values[:-1]) / 2).tolist()
    threshold = st.sampled_from([*middles, np.inf, -np.inf])
    thresholds = draw(
        st.one_of(
            threshold,
            st.lists(threshold, min_size=len(early), max_size=len(early)),
            st.dictionaries(st.sampled_from(early), threshold),
        )
    )
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(early) - 1)] * 2)))
    return Rule(
        thresholds=thresholds,
        score=score,
        patience=draw(st.integers(0, 3)),
        first=draw(st.sampled_from([None, early[first]])),
        last=draw(st.sampled_from([None, early[last]])),
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_replay_takes_the_same_exits_when_the_policy_is_really_run(
    data: st.DataObject, trace: Trace, model: Model
) -> None:
    policy = data.draw(policies(trace))
    model.policy = policy
    assert replay(trace, policy).tolist() == model(make_inputs(ROWS)).exits.tolist()


@pytest.mark.parametrize("patience", [0, 1])
def test_replay_takes_the_same_exits_when_rows_leave_together(
    patience: int, tmp_path: Path, data_file: Path
) -> None:
    bundle = write_toy(make_toy(rows="together"), tmp_path / "bundle")
    with load(bundle) as model:
        trace = record(model, open_data(data_file, bundle), 3)
        scores = np.unique(trace.scores["max_prob"][:-1])
        found = set()
        for threshold in (scores[1:] + scores[:-1])[::3] / 2:
            policy = Rule(thresholds=float(threshold), patience=patience)
            model.policy = policy
            batches = open_data(data_file, bundle).batches(3)
            taken = np.concatenate([model(batch.inputs).exits for batch in batches])
            assert replay(trace, policy).tolist() == taken.tolist()
            found |= set(taken.tolist())
    assert found == {0, 1, 2, 3} if patience == 0 else found >= {1, 3}


def test_trace_holds_what_every_exit_says_when_it_is_recorded(trace: Trace, model: Model) -> None:
    whole = model.trace(make_inputs(ROWS))
    for number, (outputs, scores) in enumerate(zip(whole.outputs, whole.scores, strict=True)):
        assert trace.predictions[number].tolist() == outputs["logits"].argmax(-1).tolist()
        for name, values in scores.items():
            np.testing.assert_allclose(trace.scores[name][number], values, rtol=1e-5, atol=1e-6)
    assert trace.labels is not None
    assert trace.labels.tolist() == [row % 3 for row in range(ROWS)]
    assert trace.batch_rows.tolist() == [7, 7, 7, 2]
    assert trace.times_ms.shape == (4, 4)
    assert (trace.times_ms > 0).all()


def test_trace_is_the_same_when_written_and_read(trace: Trace, tmp_path: Path) -> None:
    write_trace(trace, tmp_path / "trace.npz")
    again = read_trace(tmp_path / "trace.npz")
    for field in dataclasses.fields(Trace):
        one, other = getattr(trace, field.name), getattr(again, field.name)
        if isinstance(one, dict) and all(isinstance(v, np.ndarray) for v in one.values()):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)
        else:
            assert np.array_equal(one, other), field.name
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_data_digest_is_the_same_when_batches_are_not(model: Model, data_file: Path) -> None:
    digests = {
        record(model, open_data(data_file, model.bundle), size).data["digest"]
        for size in (1, 5, 23)
    }
    assert len(digests) == 1


def test_replay_refuses_a_policy_when_it_is_of_another_bundle(trace: Trace) -> None:
    with pytest.raises(PolicyError, match="made for the bundle 000000000000"):
        replay(trace, Policy(rules={"forward": Rule()}, bundle="0" * 64))


def test_replay_refuses_a_policy_when_thresholds_are_too_many(trace: Trace) -> None:
    with pytest.raises(PolicyError, match="5 thresholds for 3 early exits"):
        replay(trace, Rule(thresholds=[0.5] * 5))


def test_nan_score_never_exits_when_replayed(trace: Trace) -> None:
    scores = {name: values.copy() for name, values in trace.scores.items()}
    scores["max_prob"][:, 4] = np.nan
    spoilt = dataclasses.replace(trace, scores=scores)
    taken = replay(spoilt, Rule(thresholds=-np.inf))
    assert taken[4] == len(trace.exits) - 1
    assert (np.delete(taken, 4) == 0).all()


def _spoil(arrays: dict[str, np.ndarray], what: str) -> None:
    if what == "no predictions":
        del arrays["predictions"]
    elif what == "a pickle":
        arrays["labels"] = np.array([{"a": 1}], dtype=object)
    elif what == "wrong rows":
        arrays["labels"] = arrays["labels"][:-1]
    elif what == "wrong dtype":
        arrays["score/max_prob"] = arrays["score/max_prob"].astype(np.float64)
    elif what == "negative time":
        arrays["times_ms"] = -arrays["times_ms"]
    elif what == "wrong batches":
        arrays["batch_rows"] = arrays["batch_rows"] + 1
    elif what == "not JSON":
        arrays["about"] = np.asarray("{")
    elif what == "newer format":
        arrays["about"] = np.asarray(str(arrays["about"]).replace('"2.0"', '"3.0"', 1))
    elif what == "another JSON":
        arrays["about"] = np.asarray("[]")


@pytest.mark.parametrize(
    "what,message",
    [
        ("no predictions", "there is no 'predictions'"),
        ("a pickle", "pickled objects"),
        ("wrong rows", r"labels has the shape \[22\], expected \[23\]"),
        ("wrong dtype", "score/max_prob is float64"),
        ("negative time", "invalid times"),
        ("wrong batches", "27 rows"),
        ("not JSON", "not a trace"),
        ("newer format", "trace format 3.0"),
        ("another JSON", "not a trace"),
    ],
)
def test_read_trace_refuses_a_file_when_it_is_spoilt(
    trace: Trace, tmp_path: Path, what: str, message: str
) -> None:
    path = tmp_path / "trace.npz"
    write_trace(trace, path)
    with np.load(path) as file:
        arrays = dict(file)
    _spoil(arrays, what)
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        read_trace(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no archive", b"text"])
def test_read_trace_refuses_a_file_when_it_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"trace\.npz: cannot be read"):
        read_trace(path)


def test_write_trace_refuses_a_place_when_it_is_inside_a_bundle(
    trace: Trace, toy_copy: Path
) -> None:
    with pytest.raises(UsageError, match="inside the bundle"):
        write_trace(trace, toy_copy / "samples" / "trace.npz")
    assert not list(toy_copy.rglob("*trace*"))


LENGTHS = [9, 1, 5, 9, 5, 9, 7]
TEXTS = [
    np.random.default_rng(number).integers(3, VOCABULARY, length).tolist()
    for number, length in enumerate(LENGTHS)
]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory):
    bundle = write_decoder_toy(make_decoder_toy(), tmp_path_factory.mktemp("writer") / "bundle")
    with load(bundle, all_scores=True) as model:
        yield model


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"tokens": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_trace_of_texts_holds_what_every_exit_says_of_every_token(
    writer: Model, text_file: Path, batch_size: int
) -> None:
    trace = record(writer, open_data(text_file, writer.bundle), batch_size)
    assert (trace.chain, trace.other_chains, trace.texts) == ("decoder", {}, len(TEXTS))
    assert trace.groups is not None and trace.labels is not None
    reference = Reference(make_decoder_toy())
    for number, text in enumerate(TEXTS):
        own = trace.groups == number
        assert trace.labels[own].tolist() == [*text[1:], -1]
        for place, (name, said) in enumerate(reference.trace(Row(text)).items()):
            assert trace.exits[place] == name
            assert trace.predictions[place, own].tolist() == said["token"].tolist()
            for score, values in trace.scores.items():
                np.testing.assert_allclose(values[place, own], said[score], atol=1e-5)
    assert trace.batch_rows.sum() == trace.rows == sum(LENGTHS)
    assert trace.segment_ms().shape == (3,) and trace.rows_per_run == min(batch_size, 3)
    assert len(trace.times_ms) >= MIN_RUNS and (trace.times_ms > 0).all()


def test_trace_of_texts_is_the_same_when_written_and_read(
    writer: Model, text_file: Path, tmp_path: Path
) -> None:
    trace = record(writer, open_data(text_file, writer.bundle), 2)
    write_trace(trace, tmp_path / "trace.npz")
    again = read_trace(tmp_path / "trace.npz")
    for name in ("groups", "labels", "timed_rows", "times_ms", "predictions"):
        assert np.array_equal(getattr(trace, name), getattr(again, name))
    assert again.texts == len(TEXTS)


def test_a_policy_from_texts_decides_what_mode_fast_does(writer: Model, text_file: Path) -> None:
    trace = record(writer, open_data(text_file, writer.bundle), 1)
    policy, _, _ = calibrate(trace, max_risk=0.4, score="margin", per_exit=True)
    taken = replay(trace, policy)
    assert 0 < (taken < 2).mean() < 1
    assert policy.calibration["risk_of_texts"]["largest"] >= policy.calibration["measured_risk"]
    writer.policy = policy
    thresholds = policy.rules["decoder"].thresholds
    assert isinstance(thresholds, dict)
    written = writer.generate([TEXTS[0]], max_new_tokens=12, mode="fast").finish()
    expected = Reference(make_decoder_toy(), thresholds, "margin").fast(Row(TEXTS[0]), 12)
    assert written.tokens[0] == expected.tokens
    assert written.statistics.exits == {e: expected.exits.count(e) for e in set(expected.exits)}


def test_texts_are_cut_when_they_are_longer_than_the_model_takes(
    writer: Model, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"tokens": [5] * 60}))
    assert record(writer, open_data(path, writer.bundle), 1).rows == writer.capacity == 48


def test_a_trace_of_one_chain_names_the_others_and_its_policy_has_a_rule_for_them(
    tmp_path: Path, data_file: Path
) -> None:
    with load(write_two_chains(tmp_path / "bundle")) as model:
        trace = record(model, open_data(data_file, model.bundle), 5)
        assert (trace.chain, trace.other_chains) == ("back", {"front": "max_prob"})
        policy, _, _ = calibrate(trace, max_risk=0.5, score="max_prob")
        assert policy.rules["front"] == Rule()
        model.policy = policy
        result = model(make_inputs(ROWS))
        assert replay(trace, policy).tolist() == result.exits.tolist()
        assert set(result.earlier["front"]) == {"front_2"}
        with pytest.raises(MeasurementError, match="front_1 of the chain front gives no logits"):
            record(model, open_data(data_file, model.bundle), 5, chain="front")
        with pytest.raises(UsageError, match="no chain 'side'"):
            record(model, open_data(data_file, model.bundle), 5, chain="side")
