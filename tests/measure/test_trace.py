"""A trace is written and read strictly, and its replay is what really running the policy does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, PolicyError, UsageError
from edgeexit.measure.data import open_data
from edgeexit.measure.trace import Trace, read_trace, record, replay, write_trace
from edgeexit.runtime import Model, Policy, load
from tests.toys import make_inputs, make_toy, write_toy

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
def policies(draw: st.DrawFn, trace: Trace) -> Policy:
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
    return Policy(
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
            policy = Policy(thresholds=float(threshold), patience=patience)
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
        replay(trace, Policy(bundle="0" * 64))


def test_replay_refuses_a_policy_when_thresholds_are_too_many(trace: Trace) -> None:
    with pytest.raises(PolicyError, match="5 thresholds for 3 early exits"):
        replay(trace, Policy(thresholds=[0.5] * 5))


def test_nan_score_never_exits_when_replayed(trace: Trace) -> None:
    scores = {name: values.copy() for name, values in trace.scores.items()}
    scores["max_prob"][:, 4] = np.nan
    spoilt = dataclasses.replace(trace, scores=scores)
    taken = replay(spoilt, Policy(thresholds=-np.inf))
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
        arrays["about"] = np.asarray(str(arrays["about"]).replace('"1.0"', '"2.0"', 1))
    elif what == "another JSON":
        arrays["about"] = np.asarray("[]")


@pytest.mark.parametrize(
    "what,message",
    [
        ("no predictions", "there is no 'predictions'"),
        ("a pickle", "pickled objects"),
        ("wrong rows", r"labels has the shape \[22\], expected \[23\]"),
        ("wrong dtype", "score/max_prob is float64"),
        ("negative time", "not times"),
        ("wrong batches", "27 rows"),
        ("not JSON", "not a trace"),
        ("newer format", "trace format 2.0"),
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
