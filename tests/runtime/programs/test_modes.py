"""What drafting is planned by, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest

from edgeexit.runtime.programs.modes.full import Statistics
from edgeexit.runtime.programs.modes.pace import Pace


def rounds(pace: Pace, count: int, alpha: float, draft_s: float, behind_s: float) -> list[int]:
    """Lets a pace plan rounds of a model with that chance of acceptance and these times."""
    planned = []
    for _ in range(count):
        drafts = pace.best[0]
        planned.append(drafts)
        tested = sum(alpha**n for n in range(drafts))
        kept = alpha * tested
        behind = behind_s * (1 + 0.05 * drafts)
        took_s = (drafts + 1) * draft_s + behind
        pace.tell(drafts, tested, kept, 1, took_s)  # type: ignore[arg-type]
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
    pace = Pace(share=0.25, timed=False)
    pace.guess(1.0)
    alpha = Pace.ACCEPTANCE

    def rate(drafts: int) -> float:
        tokens = sum(alpha**n for n in range(drafts + 1))
        return tokens / (1 + drafts * (0.25 + Pace.HEAD_SHARE + 0.75 * Pace.SLOPE))

    best = max(range(Pace.MOST_DRAFTS + 1), key=rate)
    assert pace.best == (best, pytest.approx(rate(best)))


def test_a_new_text_keeps_times_and_forgets_some_of_the_acceptance() -> None:
    pace = Pace(share=1 / 6)
    pace.guess(1.0)
    rounds(pace, 50, alpha=0.95, draft_s=0.1, behind_s=1.0)
    before = pace.full_s
    pace.next_text()
    assert pace.full_s == before
    pace.tell(4, 4, 0, 1, 1.7)
    assert pace.best[0] <= 4, "four refusals should weigh against what another text told"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("draft_s", "slope"), [(0.05, 0.05), (0.4, 0.3), (0.9, 1.0)])
def test_drafts_never_cost_more_than_they_may(alpha: float, draft_s: float, slope: float) -> None:
    """Whatever exits and verifying cost: after 300 tokens at most what is allowed is lost."""
    random = np.random.default_rng(0)
    pace, tokens, spent_s = Pace(share=0.05), 0, 0.0
    pace.guess(1.0)
    while tokens < 300:
        drafts = pace.best[0]
        agreeing = random.random(drafts) < alpha
        kept = drafts if agreeing.all() else int(np.argmin(agreeing))
        took_s = (1.0 + drafts * (draft_s + slope)) * random.uniform(0.97, 1.03)
        pace.tell(drafts, min(kept + 1, drafts), kept, 1, took_s)
        tokens, spent_s = tokens + kept + 1, spent_s + took_s
    assert spent_s < 1.03 * tokens
    if alpha == 0.9 and draft_s == 0.05:
        assert spent_s < 0.5 * tokens


def test_a_round_that_was_disturbed_is_tried_again() -> None:
    pace = Pace(share=0.1)
    pace.guess(1.0)
    planned = []
    for number in range(60):
        drafts = pace.best[0]
        planned.append(drafts)
        slow = 50.0 if number == planned.index(drafts) and drafts else 0.0
        pace.tell(drafts, drafts, drafts, 1, 1.0 + 0.1 * drafts + slow)
    assert min(planned[-10:]) >= 4


def test_statistics_divide_by_what_was_drafted_and_tested() -> None:
    counts = Statistics(drafted=10, accepted=6, tested=8, audited=4, agreed=3)
    assert (counts.acceptance, counts.alpha, counts.agreement) == (0.6, 0.75, 0.75)
    counts.count("exit_2", 3)
    counts.count("exit_2", 0)
    assert counts.exits == {"exit_2": 3} and counts.tokens == 3
    assert Statistics().acceptance is None
