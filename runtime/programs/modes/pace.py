"""`Pace`: how much drafting at an exit is worth, measured while texts are written (``exact``)."""

from __future__ import annotations


class Pace:
    """Measured benefit and cost of drafting at one exit.

    A round of d drafts gives (1 - a^(d+1)) / (1 - a) tokens; a is the probability that a draft is
    accepted if all drafts before it were. How long it takes is measured for each d. Until then it
    is estimated: from the share of layers at first, so the cheapest exits are tried first, later
    from the numbers of drafts that were measured. A number is tried when half of it was.

    Drafting must not cost more than it is allowed to: the time that rounds took beyond that of as
    many tokens without drafts is kept in an account. When `ALLOWED` of all time is lost, no drafts
    are made until that share is smaller again, so texts that suit no exit are written nearly as
    fast as by mode ``full``.

    Args:
        share: Share of the layers in front of the exit.
        timed: Whether rounds are timed.

    Attributes:
        best: The fastest number of drafts, and its tokens per second.
    """

    MOST_DRAFTS = 8
    ACCEPTANCE = 0.75
    """Initial estimate of a. While no drafts are tested, a slowly returns to it."""

    HEAD_SHARE, SLOPE = 0.08, 0.05
    """Estimates: the time of the head as a share of all layers, and the slowdown of the layers
    behind the exit per additional row."""

    FADING, RETURN = 0.9, 0.005
    ALLOWED, AT_FIRST, SAVED = 0.01, 1.0, 2.0
    """Of all time, what drafts may lose; what they may lose before that, and what counts at most of
    what they saved, in tokens without drafts."""
    DISTURBED = 1.5
    """A number of drafts that takes more than this times what is expected is measured again: it may
    have been the first run of a graph on so many rows."""

    AGAIN = 64
    """Rounds with drafts after which the time of a round without drafts is measured again."""

    def __init__(self, share: float, *, timed: bool = True) -> None:
        self._share = share
        self._seen, self._kept = 4.0, 4.0 * self.ACCEPTANCE
        self._measured: dict[int, float] = {}
        self._guessed_s = 0.0
        self._lost_s = self._spent_s = 0.0
        self._drafted_rounds = 0
        self._warm = False
        self._doubted: set[int] = set()
        self._timed = timed
        self.best = (0, 0.0)

    @property
    def full_s(self) -> float:
        """Seconds of a round without drafts; 0 until the first measurement."""
        return self._measured.get(0, 0.0)

    def guess(self, full_s: float) -> None:
        """Estimates times from the share of layers; `full_s` is the time of a full step."""
        self._guessed_s = full_s
        self._choose()

    def tell(self, drafts: int, tested: int, kept: int, rows: int, took_s: float | None) -> None:
        """Adds a round.

        Args:
            drafts: Its number of drafts.
            tested, kept: Drafts that were compared, and accepted, over all rows.
            rows: Rows that got tokens.
            took_s: Its time; None: times do not count.
        """
        if tested:
            self._seen = self.FADING * self._seen + tested
            self._kept = self.FADING * self._kept + kept
        else:
            self._kept += self.RETURN * (self.ACCEPTANCE * self._seen - self._kept)
        if took_s is not None:
            self._add(drafts, 1 + kept / max(rows, 1), took_s)
        self._choose()

    def _add(self, drafts: int, tokens: float, took_s: float) -> None:
        """Adds the time of a round that gave so many tokens per row."""
        if not self._warm:  # the first round also opens graphs
            self._warm = True
            return
        known, most = self._measured.get(drafts), self.DISTURBED * self.seconds(drafts)
        if known is not None:
            self._measured[drafts] = _smooth(known, took_s)
        elif self.full_s and took_s > most and drafts not in self._doubted:
            self._doubted.add(drafts)
            took_s = most
        else:
            self._measured[drafts] = took_s
        self._spent_s += took_s
        if drafts and self.full_s:
            lost = took_s - tokens * self.full_s
            self._lost_s = max(self._lost_s + lost, -self.SAVED * self.full_s)
        self._drafted_rounds = self._drafted_rounds + 1 if drafts else 0

    def tell_full(self, took_s: float) -> None:
        """Adds the time of a round without drafts that was measured elsewhere."""
        if self._timed and took_s < self.DISTURBED * (self.full_s or took_s):
            self._measured[0] = _smooth(self.full_s or took_s, took_s)
            self._spent_s += took_s
            self._choose()

    def next_text(self) -> None:
        """Keeps the times, but reduces the weight of the acceptance, because texts differ."""
        fewer = min(1.0, 4.0 / self._seen)
        self._seen, self._kept = self._seen * fewer, self._kept * fewer
        self._choose()

    def seconds(self, drafts: int) -> float:
        """Of a round, measured or estimated."""
        known = self._measured
        if drafts in known:
            return known[drafts]
        full = self.full_s or self._guessed_s
        slope = full * (self._share + self.HEAD_SHARE + self.SLOPE * (1 - self._share))
        if not known:
            return full + drafts * slope
        below = max((d for d in known if d < drafts), default=None)
        above = min((d for d in known if d > drafts), default=None)
        if below is None or above is None:
            nearest = above if below is None else below
            assert nearest is not None
            others = [d for d in known if d != nearest]
            if others:
                other = min(others, key=lambda d: abs(d - nearest))
                slope = max((known[nearest] - known[other]) / (nearest - other), 0.0)
            return max(known[nearest] + (drafts - nearest) * slope, 0.0)
        share = (drafts - below) / (above - below)
        return known[below] + share * (known[above] - known[below])

    def _choose(self) -> None:
        """The best number of drafts; 0 where the account forbids drafts, or the time without drafts
        must be measured."""
        alpha = min(self._kept / self._seen, 0.99)
        self.best = (0, 0.0)
        tokens, power = 0.0, 1.0
        most = min(self.MOST_DRAFTS, max(1, 2 * max(self._measured, default=0)))
        for drafts in range((most if self._timed else self.MOST_DRAFTS) + 1):
            tokens += power
            power *= alpha
            took = self.seconds(drafts)
            if took and tokens / took > self.best[1]:
                self.best = (drafts, tokens / took)
        if self._warm and (not self.full_s or self._drafted_rounds >= self.AGAIN):
            self.best = (0, self.best[1])
        elif self._lost_s > self.ALLOWED * self._spent_s + self.AT_FIRST * self.full_s:
            self.best = (0, 1 / self.full_s if self.full_s else self.best[1])


def _smooth(known_s: float, seen_s: float) -> float:
    """A smoothed time that decreases faster than it increases: a single slow run was probably
    disturbed."""
    return known_s + (0.5 if seen_s < known_s else 0.1) * (seen_s - known_s)


__all__ = ["Pace"]
