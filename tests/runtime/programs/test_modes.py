"""What drafting is planned by, and what is counted."""

from __future__ import annotations

import pytest

from edgeexit.runtime.programs.modes.exact import Pace
from edgeexit.runtime.programs.modes.full import Statistics


def rounds(pace: Pace, count: int, alpha: float, draft_s: float, behind_s: float) -> list[int]:
    """Lets a pace plan rounds of a model with that chance of acceptance and these times."""
    planned = []
    for _ in range(count):
        drafts = pace.best[0]
        planned.append(drafts)
        tested = sum(alpha**n for n in range(drafts))
        kept = alpha * tested
        behind = behind_s * (1 + 0.05 * drafts)
        pace.tell(drafts, tested, kept, ((drafts + 1) * draft_s, behind))  # type: ignore[arg-type]
    return planned


def test_drafts_grow_where_they_are_accepted_and_cheap() -> None:
    pace = Pace(share=1 / 6)
    pace.guess(1.0)
    assert rounds(pace, 60, alpha=0.97, draft_s=0.1, behind_s=1.0)[-1] >= 6


def test_drafting_stops_where_it_does_not_pay_and_is_tried_again() -> None:
    pace = Pace(share=1 / 2)
    pace.guess(1.0)
    planned = rounds(pace, 400, alpha=0.1, draft_s=0.5, behind_s=0.5)
    assert planned[0] > 0 and planned.count(0) > 300
    first_stop = planned.index(0)
    assert max(planned[first_stop:]) > 0, "never tried again"


def test_the_best_plan_is_that_of_the_cost_model() -> None:
    """decoding.md: tokens of a round over its cost, by brute force."""
    pace = Pace(share=0.25)
    pace.guess(1.0)
    alpha = Pace.ACCEPTANCE

    def rate(drafts: int) -> float:
        tokens = sum(alpha**n for n in range(drafts + 1))
        behind = (0.75 + Pace.HEAD_SHARE) * (1 + Pace.SLOPE * drafts)
        return tokens / ((drafts + 1) * (0.25 + Pace.HEAD_SHARE) + behind)

    best = max(range(Pace.MOST_DRAFTS + 1), key=rate)
    assert pace.best == (best, pytest.approx(rate(best)))


def test_a_new_text_keeps_times_and_forgets_some_of_the_acceptance() -> None:
    pace = Pace(share=1 / 6)
    pace.guess(1.0)
    rounds(pace, 50, alpha=0.95, draft_s=0.1, behind_s=1.0)
    before = pace.full_s
    pace.next_text()
    assert pace.full_s == before
    pace.tell(4, 4, 0, (0.5, 1.2))
    assert pace.best[0] <= 4, "four refusals should weigh against what another text told"


def test_statistics_divide_by_what_was_drafted_and_tested() -> None:
    counts = Statistics(drafted=10, accepted=6, tested=8, audited=4, agreed=3)
    assert (counts.acceptance, counts.alpha, counts.agreement) == (0.6, 0.75, 0.75)
    counts.count("exit_2", 3)
    counts.count("exit_2", 0)
    assert counts.exits == {"exit_2": 3} and counts.tokens == 3
    assert Statistics().acceptance is None
