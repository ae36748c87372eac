"""Traces: scores and predictions of every exit for a data set, to replay with any policy.

`record` runs every component for every row and keeps the scores and prediction per row and exit,
the labels, and the time of every segment. `replay` computes in milliseconds at which exit each row
would stop with a policy. This is exact for a classifier, as an exit does not change earlier
results. For a model that writes text, rows are tokens of given texts and labels the next tokens;
the effect of an early token on later tokens is not replayed. Tokens that are followed by a
placeholder (of an image) are no rows: no model predicts placeholders. `edgeexit.measure.trace_file`
reads and writes trace files.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Exit
from edgeexit.bundle.next_tokens import NEXT_LOG_PROB, NO_TOKEN
from edgeexit.bundle.policy import Policy, Rule, decide
from edgeexit.errors import DataError, MeasurementError, PolicyError
from edgeexit.measure.batches import Batch, DataSet, naming_rows
from edgeexit.measure.probe import Answers, ask, chain_named, predictions
from edgeexit.measure.token_times import TIMED_TEXTS, measure_token_times
from edgeexit.runtime import Model

logger = logging.getLogger(__name__)

NO_LABEL = -1
"""Label of a token without a next token."""
NOT_SCORED = -2
"""Label of a token whose next one belongs to a prompt before a target; traces have no such rows."""


@dataclass(frozen=True)
class Trace:
    """A recorded data set.

    Attributes:
        bundle: Digest of the bundle.
        engine: Engine and version (`Model.describe_engine`).
        data: ``name`` and ``digest`` of the data set.
        exits: Names in order; the last one always answers.
        scores: Score name -> ``[exit, row]`` float32.
        predictions: ``[exit, row]``, the class or token with the largest logit.
        labels: ``[row]`` classes or tokens, `NO_LABEL` for rows without; None: no labels.
        batch_rows: ``[batch]``, rows of each batch.
        times_ms: ``[run, segment]`` milliseconds; segment k ends at exit k.
        batch_size: Requested rows per batch; the last batch may have fewer.
        independent: Whether rows of a batch may take different exits.
        chain: The traced chain.
        other_chains: Other chains of the bundle with exits -> one of their scores.
        groups: ``[row]``, index of the text of each token in the data; None: rows are not tokens.
        timed_rows: ``[run]``, rows of each run of `times_ms`; None: those of the batches.
        next_log_probs: ``[exit, row]``, log-probability of the next token at an exit (NaN without
            a next token); None: rows are not tokens.
        of_answers: Whether rows are prompts whose answers were written once per exit
            (`edgeexit.measure.trace_answers`).
        gates: Whether the exits are gates that drop tokens.
        policy: The rules that other chains and exits followed.
    """

    bundle: str
    engine: dict[str, str]
    data: dict[str, str]
    exits: list[str]
    scores: dict[str, NDArray[np.float32]]
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    batch_rows: NDArray[np.int64]
    times_ms: NDArray[np.float64]
    batch_size: int
    independent: bool = True
    chain: str = "main"
    other_chains: Mapping[str, str] = field(default_factory=dict)
    groups: NDArray[np.int64] | None = None
    timed_rows: NDArray[np.int64] | None = None
    next_log_probs: NDArray[np.float32] | None = None
    of_answers: bool = False
    gates: bool = False
    policy: Mapping[str, Rule] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.predictions.shape[1])

    @property
    def texts(self) -> int | None:
        """Number of texts; None: rows are not tokens."""
        return None if self.groups is None else len(np.unique(self.groups))

    @property
    def rows_per_run(self) -> int:
        """Rows of the runs that `segment_ms` uses."""
        return int(self._timed_rows.max())

    @property
    def _timed_rows(self) -> NDArray[np.int64]:
        return self.batch_rows if self.timed_rows is None else self.timed_rows

    def segment_ms(self) -> NDArray[np.float64]:
        """Median time of each segment over full-size runs, in ms per run."""
        full = self._timed_rows == self._timed_rows.max()
        return np.asarray(np.median(self.times_ms[full], axis=0), np.float64)

    def labelled(self) -> Trace:
        """The trace with only the rows that have a label.

        Raises:
            DataError: No row has a label.
        """
        if self.labels is None:
            raise DataError(
                f"the trace of {self.data.get('name', 'this data')} has no labels; the risk "
                '"performance" needs them',
                fix="Trace data with labels, or use --risk consistency, which needs none.",
            )
        kept = self.labels != NO_LABEL
        if kept.all():
            return self
        return dataclasses.replace(
            self,
            scores={name: values[:, kept] for name, values in self.scores.items()},
            predictions=self.predictions[:, kept],
            labels=self.labels[kept],
            batch_rows=np.array([kept.sum()]),
            timed_rows=self._timed_rows,
            groups=None if self.groups is None else self.groups[kept],
            next_log_probs=None if self.next_log_probs is None else self.next_log_probs[:, kept],
        )


def record(
    model: Model,
    data: DataSet,
    batch_size: int,
    *,
    chain: str | None = None,
    token_times: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Trace:
    """Runs every component for every row of a data set.

    The first batch runs twice, and the first run is a warm-up. The times of a model that writes
    text are those of single tokens.

    Args:
        model: The bundle, preferably loaded with all scores.
        data: From `edgeexit.measure.data.open_data`.
        batch_size: Rows, or texts, per batch.
        chain: The chain to trace; None: the chain that answers.
        token_times: For a model that writes text, also run some texts token by token for the
            times; without, `times_ms` are those of whole texts.

    Raises:
        MeasurementError: An exit has no logits, or the exits have no score in common.
        DataError: The data cannot be read or does not fit.
    """
    name = model.chain_name if chain is None else chain
    exits, scores = _traceable(name, chain_named(model, chain))
    decoding = model.bundle.manifest.decoding
    tokens = decoding.tokens if decoding is not None and decoding.chain == name else None
    placeholders = [] if decoding is None else [g.token for g in decoding.groups.values()]
    batches: list[dict[str, NDArray]] = []
    times: list[list[float]] = []
    count, rows_timed = 0, 0
    meaningless: list[int] = []
    timed: list[dict[str, NDArray]] = []
    for batch in data.batches(batch_size):
        inputs = dict(batch.inputs)
        if tokens is not None:
            inputs[tokens] = inputs[tokens][:, : model.capacity]
        asked = None
        if tokens is not None and batch.asked is not None:
            asked = np.minimum(batch.asked, inputs[tokens].shape[1]).tolist()
        with naming_rows(count, batch.rows):
            if not batches:
                ask(model, inputs, chain=name, asked=asked)
            answers = ask(model, inputs, chain=name, asked=asked)
        own = None if tokens is None else inputs[tokens]
        rows_timed = rows_timed or batch.rows
        if tokens is not None and len(timed) < TIMED_TEXTS and batch.rows == rows_timed:
            timed.append(inputs)
        said = _said(answers, exits, scores) | _about_rows(batch, own)
        batches.append(said if own is None else _without(said, placeholders))
        numbers = np.arange(count, count + batch.rows) if batch.numbers is None else batch.numbers
        meaningless += numbers[_are_no_numbers(answers, exits, scores)].tolist()
        times.append(answers.times_ms)
        count += batch.rows
        if progress is not None:
            progress("rows" if tokens is None else "texts", count, data.rows or 0)
    if meaningless:
        _warn_of_no_numbers(data.name, sorted(meaningless))
    timed_rows = None
    if tokens is not None and token_times:
        times, timed_rows = measure_token_times(model, timed, tokens)
    return _joined(
        model,
        name,
        exits,
        batches,
        data={"name": data.name, "digest": data.digest},
        times_ms=np.asarray(times, np.float64),
        timed_rows=timed_rows,
        batch_size=batch_size,
        independent=tokens is not None or model.chains[name].rows == "independent",
    )


def _traceable(name: str, chain: Chain) -> tuple[list[str], list[str]]:
    """Exits of a chain, and the scores that they have in common. Raises `MeasurementError`."""
    exits = chain.stops
    if missing := [exit_.name for exit_ in exits if "logits" not in exit_.outputs]:
        raise MeasurementError(
            f"exit {missing[0]} of the chain {name} gives no logits, so it predicts no class",
            fix="Trace a chain whose exits have logits. Thresholds of other chains can be chosen "
            "in a model that writes text (trace --chain), by comparing its answers.",
        )
    scores = sorted(set.intersection(*(set(exit_.scores) for exit_ in exits)))
    if not scores:
        raise MeasurementError("the exits have no score in common", fix="Export again with scores.")
    return [exit_.name for exit_ in exits], scores


def _said(answers: Answers, exits: list[str], scores: list[str]) -> dict[str, NDArray]:
    """Predictions and scores of a batch, ``[exit, row]``."""
    arrays = answers.arrays

    def stacked(name: str) -> NDArray:
        return np.stack([arrays[f"{exit_}/{name}"].reshape(-1) for exit_ in exits])

    said = {"predictions": np.stack([predictions(arrays, exit_).reshape(-1) for exit_ in exits])}
    if f"{exits[-1]}/{NEXT_LOG_PROB}" in arrays:
        said["next_log_probs"] = stacked(NEXT_LOG_PROB)
    return said | {f"score/{score}": stacked(score) for score in scores}


def _about_rows(batch: Batch, tokens: NDArray | None) -> dict[str, NDArray]:
    """Labels of a batch, if it has any; for tokens also the index of their text."""
    if tokens is None:
        return {} if batch.labels is None else {"labels": batch.labels}
    assert batch.numbers is not None
    following = np.full_like(tokens, NO_LABEL)
    following[:, :-1] = tokens[:, 1:]
    if batch.asked is not None:
        places = np.arange(1, tokens.shape[1] + 1)
        following[places < batch.asked[:, None]] = NOT_SCORED
    groups = np.repeat(batch.numbers, tokens.shape[1])
    return {"labels": following.reshape(-1), "groups": groups}


def _without(said: Mapping[str, NDArray], placeholders: Sequence[int]) -> dict[str, NDArray]:
    """The rows whose label is no placeholder and no token of a prompt before a target, and whose
    token reached every exit."""
    kept = ~np.isin(said["labels"], [*placeholders, NOT_SCORED])
    kept &= (said["predictions"] != NO_TOKEN).all(axis=0)
    return {name: values[..., kept] for name, values in said.items()}


def _are_no_numbers(answers: Answers, exits: list[str], scores: list[str]) -> NDArray[np.bool_]:
    """Which rows, or texts, have NaN or infinity. A logit may be -inf: that rules a class out."""
    found: NDArray[np.bool_] | None = None
    for name in (f"{exit_}/{what}" for exit_ in exits for what in ("logits", *scores)):
        values = answers.arrays[name]
        wrong = np.isnan(values) | np.isposinf(values)
        token = answers.arrays.get(f"{name.partition('/')[0]}/token")
        if token is not None and token.shape == wrong.shape:
            wrong &= token != NO_TOKEN
        wrong = wrong.reshape(len(values), -1).any(axis=1)
        found = wrong if found is None else found | wrong
    assert found is not None
    return found


def _warn_of_no_numbers(where: str, numbers: Sequence[int]) -> None:
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    logger.warning(
        "%s: row %d%s: the answers are not numbers (NaN or infinity), so figures of them mean "
        "nothing; a NaN score never stops a row",
        where,
        numbers[0],
        more,
    )


def _joined(
    model: Model,
    chain: str,
    exits: list[str],
    batches: Sequence[Mapping[str, NDArray]],
    **run: Any,
) -> Trace:
    """Joins the batches to a trace; `run` has the fields of the run as a whole."""
    found = {key: np.concatenate([one[key] for one in batches], axis=-1) for key in batches[0]}
    prefix = "score/"
    return Trace(
        bundle=model.bundle.digest,
        engine=model.describe_engine(),
        exits=exits,
        scores={k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)},
        predictions=found["predictions"].astype(np.int64),
        labels=found.get("labels"),
        batch_rows=np.array([one["predictions"].shape[1] for one in batches]),
        chain=chain,
        other_chains={
            name: next(iter(one.stops[0].scores), "max_prob")
            for name, one in model.chains.items()
            if name != chain and len(one.exits) > 1
        },
        groups=found.get("groups"),
        next_log_probs=found.get("next_log_probs"),
        policy=dict(model.policy.rules),
        **run,
    )


def _of_traced(trace: Trace, rule: Rule) -> Rule:
    """The part of a rule that is about the traced exits. A chain may have others (gates beside
    exits that stop), which followed the trace's own policy; and a rule names the score of those
    that stop, while gates have one of their own."""
    if trace.gates:
        [score] = trace.scores
        rule = msgspec.structs.replace(rule, score=score)
    followed = trace.policy.get(trace.chain, Rule()).thresholds
    if isinstance(rule.thresholds, dict) and isinstance(followed, dict):
        others = followed.keys() - set(trace.exits)
        own = {name: value for name, value in rule.thresholds.items() if name not in others}
        rule = msgspec.structs.replace(rule, thresholds=own)
    return rule


def replay(trace: Trace, policy: Policy | Rule) -> NDArray[np.int64]:
    """Index of the exit ``[row]`` where each row stops with a policy, or a rule for the chain.

    Raises:
        PolicyError: The policy does not fit the bundle of the trace.
    """
    if isinstance(policy, Policy):
        if policy.bundle not in (None, trace.bundle):
            raise PolicyError(
                f"the policy was made for the bundle {str(policy.bundle)[:12]}…, the trace with "
                f"{trace.bundle[:12]}…",
                fix="Calibrate again on this trace.",
            )
        policy = policy.rules.get(trace.chain, Rule())
    policy = _of_traced(trace, policy)
    if policy.schedule is not None:
        raise PolicyError(
            "the rule has a schedule over the tokens of a text, and a trace does not say how long "
            "its texts were",
            fix="Leave the schedule out, and measure the policy on texts that are written.",
        )
    exits = [
        Exit(
            name=name,
            behind=name,
            outputs={"logits": name},
            scores=dict.fromkeys(trace.scores, name),
        )
        for name in trace.exits
    ]
    decisions = decide(policy, exits)
    taken = np.full(trace.rows, len(exits) - 1, np.int64)
    alive = np.ones(trace.rows, np.bool_)
    previous, streak = np.full(trace.rows, -1, np.int64), np.zeros(trace.rows, np.int64)
    for number, decision in enumerate(decisions[:-1]):
        if not decision.consult:
            continue
        fires = alive & (trace.scores[policy.score][number] >= decision.threshold)
        if policy.patience:
            predicted = trace.predictions[number]
            streak = np.where(predicted == previous, streak + 1, 0)
            previous = predicted
            fires &= streak >= policy.patience
        if not trace.independent:
            starts = np.cumsum(trace.batch_rows) - trace.batch_rows
            fires = np.repeat(np.logical_and.reduceat(fires, starts), trace.batch_rows)
        taken[fires] = number
        alive &= ~fires
    return taken
