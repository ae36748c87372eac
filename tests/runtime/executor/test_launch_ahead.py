"""When a segment is launched before the exit in front of it has been asked: the rule alone. What
comes of it is tested on a driver (tests/runtime/engines/cuda)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.bundle.policy import Decision
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.runtime import load
from edgeexit.runtime.executor.launch_ahead import (
    MEASURED_AGAIN,
    POLICIES_KEPT,
    REMEMBERED,
    SAMPLES,
    Ahead,
    Share,
    Times,
    pays,
)

MS = st.floats(0.001, 100)


@given(asked=st.integers(0, 5000), left=st.integers(0, 5000), gap=MS, segment=MS)
def test_it_pays_when_the_expected_waste_is_below_the_expected_gain(
    asked: int, left: int, gap: float, segment: float
) -> None:
    left = min(left, asked)
    times = Times()
    for _ in range(SAMPLES - 1):
        times.add(gap, segment)
    assert not pays(Share(asked, 0), times)
    for _ in range(SAMPLES):  # the first one of all is forgotten
        times.add(gap, segment)
    share = Share(asked, left)
    waste, gain = (left + 1) * segment, (asked - left + 1) * gap
    if abs(waste - gain) > 1e-9 * gain:
        assert pays(share, times) == (waste < gain)


def test_some_rows_wait_so_that_times_are_taken_anew() -> None:
    ahead = Ahead(2, "measured")
    for _ in range(SAMPLES):
        ahead.times[0].add(1.0, 0.1)
    shares = ahead.shares([Decision(True, 0.9)] * 2)
    launched = []
    for _ in range(3 * MEASURED_AGAIN):
        launched.append(ahead.launches(0, shares))
        shares[0].count(False)
    assert launched.count(False) == 3


def test_shares_follow_the_data() -> None:
    share = Share()
    for _ in range(3 * REMEMBERED):
        share.count(False)
    assert share.left == 0 and share.asked <= REMEMBERED
    for _ in range(REMEMBERED):
        share.count(True)
    assert share.left > share.asked / 2


def test_every_policy_has_shares_of_its_own_and_old_ones_are_forgotten() -> None:
    ahead = Ahead(3, "measured")
    strict, loose = [Decision(True, 0.9)] * 3, [Decision(True, 0.1)] * 3
    ahead.shares(strict)[0].count(True)
    assert ahead.shares(list(strict))[0].left == 1
    other = [Decision(d.consult, d.threshold, "entropy") for d in strict]
    assert ahead.shares(loose)[0].asked == ahead.shares(other)[0].asked == 0
    for number in range(POLICIES_KEPT):
        ahead.shares([Decision(True, float(number))] * 3)
    assert ahead.shares(strict)[0].left == 0


def test_a_host_has_nothing_to_launch_on(toy_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="launch_ahead: the engine cpu has no GPU stream"):
        load(toy_bundle, launch_ahead="always")
    with pytest.raises(UsageError, match="launch_ahead='sometimes'"):
        load(toy_bundle, launch_ahead="sometimes")  # type: ignore[arg-type]
    with load(toy_bundle) as model:
        assert model.boundaries == []
