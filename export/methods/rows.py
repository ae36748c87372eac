"""Data sets of a training: what `edgeexit.export.methods.training.ExitTrainer` accepts, and a data
collator whose exceptions say what to change in the rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import transformers

from edgeexit.errors import UsageError, first_line

LABELS = ("labels", "label", "label_ids")
"""Columns that transformers' collators read as labels."""
ROWS = "Give rows, each a dictionary of columns, as datasets.load_dataset reads them"


class ClearCollator:
    """A data collator whose exceptions say what can be done."""

    def __init__(self, inner: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        try:
            batch = self.inner(rows)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            _check_labels(rows)
            raise UsageError(
                f"training: rows cannot be put into one batch ({first_line(error)})",
                fix="Give rows with the same columns and shapes, or a data_collator that pads: "
                "transformers.DataCollatorWithPadding(tokenizer).",
            ) from error
        if "labels" not in batch:
            _check_labels(rows)
        return batch


def is_empty(rows: Any) -> bool:
    return hasattr(rows, "__len__") and len(rows) == 0


def check_data_sets(args: transformers.TrainingArguments, others: Mapping[str, Any]) -> None:
    """Raises `UsageError` for data sets that cannot be read, or that are missing."""
    for name in ("train_dataset", "eval_dataset"):
        rows = others.get(name)
        if isinstance(rows, (str, os.PathLike)):
            raise UsageError(
                f"training: {name} is {str(rows)[:60]!r}, not a data set", fix=f"{ROWS}."
            )
        if isinstance(rows, Iterator):
            raise UsageError(
                f"training: {name} is a {type(rows).__name__}, which can be read only once",
                fix="Give a list of rows, a datasets.Dataset or a torch IterableDataset.",
            )
        if isinstance(rows, Mapping) and name == "train_dataset":
            raise UsageError(
                f"training: train_dataset is a dictionary ({', '.join(map(str, rows))[:60]}), not "
                "a list of rows",
                fix='Give one split, as in splits["train"].',
            )
        readable = hasattr(rows, "__getitem__") or hasattr(rows, "__iter__")
        if rows is not None and (isinstance(rows, Set) or not readable):
            raise UsageError(
                f"training: {name} is a {type(rows).__name__}, not a data set", fix=f"{ROWS}."
            )
    if args.eval_strategy != "no" and others.get("eval_dataset") is None:
        raise UsageError(
            f"training: eval_strategy is {args.eval_strategy.value!r}, but there is no "
            "eval_dataset",
            fix='Give one: ExitTrainer(..., eval_dataset=rows), or eval_strategy="no".',
        )


def _check_labels(rows: list[Any]) -> None:
    """Raises `UsageError` for labels that collators cannot read, or silently leave out."""
    for row in rows:
        for name in LABELS if isinstance(row, Mapping) else ():
            if name in row and (row[name] is None or isinstance(row[name], str)):
                what = "missing (None)" if row[name] is None else f"the text {row[name]!r:.40}"
                raise UsageError(
                    f"training: {name} of a row is {what}, not a number",
                    fix="Give class numbers (names.index(text)); leave out rows without a label.",
                )


__all__ = ["LABELS", "ClearCollator", "check_data_sets", "is_empty"]
