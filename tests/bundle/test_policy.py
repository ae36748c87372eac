"""Policies: what they decide at each exit, and their files."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgeexit.bundle.manifest import Call, Chain, Exit
from edgeexit.bundle.policy import ALWAYS, NEVER, Decision, decide, drop_thresholds, forced
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EdgeExitError, PolicyError
from edgeexit.runtime import Policy, Rule, Schedule, load, read_policy, write_policy

EXITS = [
    Exit(name=name, behind=name, outputs={"logits": f"{name}/l"}, scores={"max_prob": f"{name}/p"})
    for name in ("a", "b", "c", "d")
]
ANSWERS = Decision(consult=True, threshold=ALWAYS)
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)


def of(**fields: Any) -> Policy:
    """A policy with one rule."""
    return Policy(rules={"forward": Rule(**fields)})


def in_a_rule(text: str) -> str:
    """A file's text with this rule in it."""
    return f'{{"format": "2.0", "rules": {{"forward": {text}}}}}'


def thresholds(rule: Rule) -> list[float]:
    return [d.threshold if d.consult else NEVER for d in decide(rule, EXITS)[:-1]]


def test_a_schedule_lowers_thresholds_from_token_to_token_as_in_the_papers() -> None:
    calm = decide(Rule(thresholds=0.8, schedule=Schedule(length=10)), EXITS)[0]
    found = [calm.threshold_at(token) for token in (1, 5, 10)]
    expected = [0.9 * 0.8 + 0.1 * math.exp(-4 * token / 10) for token in (1, 5, 10)]
    assert found == pytest.approx(expected, rel=1e-6)
    longest, threshold = 20, 0.95  # MuE's own code, whose steps begin with 0
    mue = Schedule(length=longest + 1, temperature=1, warm_up=1 / 3)
    decision = decide(Rule(thresholds=threshold, schedule=mue), EXITS)[0]
    for step in range(longest):
        theirs = 0.9 * threshold + 0.1 * math.exp(-(step + 1) / (longest + 1))
        if step < (longest + 1) / 3:
            theirs = NEVER
        assert decision.threshold_at(step + 1) == pytest.approx(theirs, rel=1e-6)
    always = decide(Rule(thresholds=ALWAYS, schedule=mue), EXITS)[0]
    assert always.threshold_at(7) == NEVER and always.threshold_at(8) == ALWAYS


@pytest.mark.parametrize(
    "given_, expected",
    [
        (NEVER, [NEVER] * 3),
        (0.5, [0.5] * 3),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ({"b": 0.4}, [NEVER, 0.4, NEVER]),
        ({}, [NEVER] * 3),
        (1, [1.0] * 3),
    ],
)
def test_thresholds_reach_their_exits(given_: Any, expected: list[float]) -> None:
    rule = Rule(thresholds=given_)
    assert thresholds(rule) == pytest.approx(expected, rel=1e-6)
    assert decide(rule, EXITS)[-1] == ANSWERS


@pytest.mark.parametrize(
    "first, last, consulted",
    [
        (None, None, [True, True, True]),
        ("b", None, [False, True, True]),
        (None, "b", [True, True, False]),
        ("b", "b", [False, True, False]),
    ],
)
def test_first_and_last_bound_the_exits_consulted(
    first: str | None, last: str | None, consulted: list[bool]
) -> None:
    decisions = decide(Rule(thresholds=0.5, first=first, last=last), EXITS)
    assert [decision.consult for decision in decisions] == [*consulted, True]


@pytest.mark.parametrize(
    "rule, message",
    [
        (Rule(thresholds=[0.5]), "1 thresholds for 3 early exits"),
        (Rule(thresholds=[0.5] * 4), "4 thresholds for 3"),
        (Rule(thresholds={"z": 0.5}), "name the exit 'z'"),
        (Rule(thresholds={"d": 0.5}), "name the exit 'd'"),
        (Rule(thresholds=math.nan), "NaN"),
        (Rule(thresholds=[0.1, math.nan, 0.2]), "threshold of b is NaN"),
        (Rule(thresholds="0.5"), "not a number"),  # type: ignore[arg-type]
        (Rule(thresholds=["x", 1, 2]), "not a number"),  # type: ignore[list-item]
        (Rule(thresholds=None), "not a number"),  # type: ignore[arg-type]
        (Rule(score="luck", thresholds=0.5), "no score 'luck'"),
        (Rule(patience=-1), "patience -1"),
        (Rule(schedule=Schedule(length=0)), "length is 0"),
        (Rule(schedule=Schedule(length=1.5)), "length is 1.5"),  # type: ignore[arg-type]
        (Rule(schedule=Schedule(length=9, temperature=-1.0)), "temperature is -1.0"),
        (Rule(schedule=Schedule(length=9, warm_up=float("nan"))), "warm_up is nan"),
        (Rule(schedule="calm"), "schedule is 'calm'"),  # type: ignore[arg-type]
        (Rule(patience="two"), "patience 'two'"),  # type: ignore[arg-type]
        (Rule(first="z"), "first names the exit 'z'"),
        (Rule(last="d"), "last names the exit 'd'"),
        (Rule(first="c", last="a"), "is after"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule: Rule, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        decide(rule, EXITS)


def test_one_number_for_a_chain_that_has_gates_alone_is_refused() -> None:
    """It is for exits that answer, so it would be followed nowhere."""
    gate = Exit(
        name="gate_1",
        behind="a",
        scores={"gate": "g"},
        path=[Call(component="gate_1")],
        action="drop",
        tokens="image",
    )
    chain = Chain(components=["a", "d"], outputs=[], exits=[gate, EXITS[-1]], unsplit=[])
    for value in (0.5, math.nan):
        with pytest.raises(PolicyError, match=f"the threshold {value} is for exits that answer"):
            drop_thresholds(Rule(thresholds=value), chain)
    with pytest.raises(PolicyError, match="the threshold of all exits is NaN"):
        decide(Rule(thresholds=math.nan), chain.stops)
    assert drop_thresholds(Rule(thresholds=NEVER), chain) == {}
    assert drop_thresholds(Rule(thresholds={"gate_1": 0.5}), chain) == {"gate_1": 0.5}


def test_a_model_with_one_exit_takes_any_single_threshold() -> None:
    assert decide(Rule(thresholds=0.5), EXITS[-1:]) == [ANSWERS]
    with pytest.raises(PolicyError, match="early exits are none"):
        decide(Rule(first="a"), EXITS[-1:])


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_forced_stops_every_row_at_that_exit_only(name: str) -> None:
    decisions = decide(forced(EXITS, name), EXITS)
    fires = [one.consult and one.threshold == ALWAYS for one in decisions]
    assert fires.index(True) == ["a", "b", "c", "d"].index(name)
    assert sum(fires[:-1]) == (name != "d")


numbers = st.floats(allow_nan=False, width=32) | st.sampled_from([NEVER, ALWAYS])
rules = st.builds(
    Rule,
    thresholds=numbers
    | st.lists(numbers, min_size=1, max_size=5)
    | st.dictionaries(st.text(max_size=5), numbers, max_size=4),
    score=st.text(max_size=8),
    patience=st.integers(0, 9),
    first=st.none() | st.text(max_size=5),
    last=st.none() | st.text(max_size=5),
)
policies = st.builds(
    Policy,
    rules=st.dictionaries(st.text(max_size=5), rules, max_size=3),
    bundle=st.none() | st.just("ab" * 32),
    engine=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
    calibration=st.dictionaries(st.text(max_size=4), st.integers(0, 9) | st.booleans(), max_size=2),
)


@in_tmp
@given(policy=policies)
def test_files_give_back_the_policy_that_was_written(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "new/policy.json"
    write_policy(policy, path)
    assert read_policy(path) == policy
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_never_and_always_are_words_in_the_file(tmp_path: Path) -> None:
    write_policy(of(thresholds=[NEVER, ALWAYS, 0.5]), tmp_path / "policy.json")
    raw = json.loads((tmp_path / "policy.json").read_text())
    assert raw["rules"]["forward"]["thresholds"] == ["never", "always", 0.5]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a policy"),
        ("[]", "not a JSON object"),
        ("{}", "policy format missing"),
        ('{"format": "1.0", "thresholds": 1}', "policy format 1.0"),
        ('{"format": "2.0"}', "rules"),
        (in_a_rule('{"thresholds": "sometimes"}'), "sometimes"),
        (in_a_rule('{"thresholds": true}'), "not a threshold"),
        (in_a_rule('{"thresholds": [1, null]}'), "not a threshold"),
        (in_a_rule('{"thresholds": [[1]]}'), "not a policy"),
        (in_a_rule('{"thresholds": 1, "patience": 1.5}'), "patience"),
        (in_a_rule('{"thresholds": 1, "patients": 1}'), "patients"),
        (in_a_rule('{"thresholds": 1' + "0" * 400 + "}"), "not a policy"),
    ],
)
def test_a_file_that_is_no_policy_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        read_policy(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_policy_that_cannot_be_read_or_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        read_policy(tmp_path / "missing.json")
    with pytest.raises(PolicyError, match="cannot be read"):
        read_policy(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match="cannot be written"):
        write_policy(of(), tmp_path / "file/policy.json")
    with pytest.raises(PolicyError, match="NaN"):
        write_policy(of(thresholds=[0.5, math.nan]), tmp_path / "policy.json")
    assert not (tmp_path / "policy.json").exists()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@in_tmp
@given(
    data=st.binary(max_size=60)
    | st.fixed_dictionaries(
        {
            "format": st.just("2.0"),
            "rules": st.fixed_dictionaries(
                {},
                optional={
                    "forward": st.fixed_dictionaries(
                        {}, optional={f.name: json_values for f in msgspec.structs.fields(Rule)}
                    )
                    | json_values
                },
            ),
        },
        optional={f.name: json_values for f in msgspec.structs.fields(Policy)[1:]},
    ).map(lambda raw: json.dumps(raw).encode())
)
@example(data=b"[" * 100_000)
def test_any_file_and_any_policy_in_it_is_used_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(data)
    try:
        policy = read_policy(path)
        decisions = decide(policy.rules.get("forward", Rule()), EXITS)
    except EdgeExitError:
        return
    assert len(decisions) == len(EXITS)


def test_a_policy_bound_to_one_bundle_is_refused_by_another(
    toy_bundle: Bundle, tmp_path: Path
) -> None:
    policy = msgspec.structs.replace(of(thresholds=0.5), bundle=toy_bundle.digest)
    write_policy(policy, tmp_path / "policy.json")
    with load(toy_bundle, policy=tmp_path / "policy.json") as model:
        assert model.policy == policy
        with pytest.raises(PolicyError, match=r"Calibrate again"):
            model.policy = msgspec.structs.replace(policy, bundle="0" * 64)
        assert model.policy == policy


@pytest.mark.parametrize("value", [0.9998312006459961, 1.00000001, 1e300, -1e300, 0.1])
def test_thresholds_are_float32_that_are_no_less(value: float) -> None:
    """So a score is compared alike as a float32 and as a double."""
    [decision, *_] = decide(Rule(thresholds=value), EXITS)
    assert decision.threshold >= value
    assert decision.threshold == float(np.float32(decision.threshold))
    with np.errstate(over="ignore"):
        below = np.nextafter(np.float32(decision.threshold), np.float32(-np.inf))
    assert float(below) < value
    assert decision.consult == (value < 1e300)


def test_a_policy_is_written_through_a_link_and_not_onto_a_device(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("real.json")
    write_policy(of(thresholds=0.5), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert read_policy(tmp_path / "real.json") == of(thresholds=0.5)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PolicyError, match="not a regular file"):
        write_policy(of(), tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_rule_alone_is_for_the_one_chain_that_has_exits(toy_bundle: Bundle) -> None:
    rule = Rule(thresholds=0.5)
    with load(toy_bundle, policy=rule) as model:
        assert model.policy == Policy(rules={"forward": rule})
        model.policy = Rule()
        assert model.policy == Policy(rules={"forward": Rule()})


@pytest.mark.parametrize(
    "policy, message",
    [
        (Policy(rules={}), "no rule for the chain forward, which has exits"),
        (Policy(rules={"main": Rule()}), "a rule for the chain 'main'; the bundle has forward"),
        (of(score="luck", thresholds=0.5), "no score 'luck'"),
        (Policy(rules={"forward": Rule()}, bundle="0" * 64), "made for the bundle 000000000000"),
        ("a text", "cannot be read"),
        (3, "policy is a int"),
    ],
)
def test_a_policy_that_does_not_fit_the_bundle_is_refused(
    toy_bundle: Bundle, policy: Any, message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        load(toy_bundle, policy=policy)


def test_a_policy_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    write_policy(Policy(rules={"main": Rule(thresholds=0.5)}), path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_policy(path).rules == {"main": Rule(thresholds=0.5)}
