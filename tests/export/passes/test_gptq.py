"""GPTQ: against the paper's algorithm in its plainest form, and in bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.errors import UsageError
from edgeexit.export import export
from edgeexit.export.passes.gptq import DAMPING, Grid, round_in_turn
from edgeexit.export.passes.weight_bits import Quantiser, WeightBits
from edgeexit.export.pretrained import from_pretrained
from edgeexit.runtime import load
from tests.decoders import EXITS, VOCABULARY, random_prompts

Folders = Callable[[str], Path]
ROWS, WIDTH, BLOCK = 24, 64, 16


def correlated(rows: int = 400) -> np.ndarray:
    """Inputs ``[rows, WIDTH]`` that a few causes explain, one of which never comes."""
    random = np.random.default_rng(5)
    causes = random.normal(0, 1, (rows, 8)) @ random.normal(0, 1, (8, WIDTH))
    inputs = (causes + 0.2 * random.normal(0, 1, (rows, WIDTH))).astype(np.float32)
    inputs[:, 7] = 0.0
    return inputs


def range_of(part: np.ndarray) -> Grid:
    """The plainest grid: from the smallest to the largest number, 0 included."""
    low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
    scale = (high - low) / 15
    return scale, np.rint(-low / scale)


def plain(weight: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The algorithm without lazy updates, in float64: the rounded weight."""
    left, made = weight.astype(np.float64), np.zeros(weight.shape)
    moments = moments.copy()
    dead = np.diag(moments) == 0
    moments[dead, dead] = 1
    left[:, dead] = 0
    moments += DAMPING * np.diag(moments).mean() * np.eye(len(moments))
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    for column in range(weight.shape[1]):
        if column % BLOCK == 0:
            scale, zero = range_of(left[:, column : column + BLOCK])
        number = np.clip(np.rint(left[:, column] / scale) + zero, 0, 15)
        made[:, column] = (number - zero) * scale
        error = (left[:, column] - made[:, column]) / upper[column, column]
        left[:, column:] -= np.outer(error, upper[column, column:])
    return made


def test_it_is_the_papers_algorithm() -> None:
    weight = np.random.default_rng(1).normal(0, 1, (ROWS, WIDTH)).astype(np.float32)
    inputs = correlated()
    moments = (inputs.T @ inputs).astype(np.float64)
    numbers, scales, zero = round_in_turn(weight, moments, 4, BLOCK, range_of)
    found = ((numbers - zero[..., None].astype(np.float32)) * scales[..., None]).reshape(ROWS, -1)
    expected = plain(weight, moments)
    # Where a number is between two, float32 may take the other one.
    assert (np.abs(found - expected) > 1e-3).mean() < 0.02


def test_products_come_closer_than_by_rounding_alone() -> None:
    weight = np.random.default_rng(2).normal(0, 1, (ROWS, WIDTH)).astype(np.float32)
    inputs, others = np.split(correlated(800), 2)
    moments = (inputs.T @ inputs).astype(np.float64)

    def error(method: str, given: np.ndarray | None) -> float:
        settings = WeightBits(4, block=BLOCK, method=method)  # type: ignore[arg-type]
        made = Quantiser(settings).blocks(weight, 4, "weight", given).floats()
        return float(np.square(others @ (made - weight).T).mean())

    assert error("gptq", moments) < 0.5 * error("k-quant", None)
    assert error("gptq", None) == error("k-quant", None)


def made(folder: Path, output: Path, method: str) -> Bundle:
    random = np.random.default_rng(0)
    batches = [{"tokens": random.integers(1, VOCABULARY, (1, 20))} for _ in range(70)]
    split = from_pretrained(folder, exits=EXITS)
    settings = WeightBits(4, block=16, method=method)  # type: ignore[arg-type]
    return export(split.split_model(), output, weights=settings, calibration=lambda bundle: batches)


def test_a_bundle_has_each_weight_once(decoder_folder: Folders, tmp_path: Path) -> None:
    folder = decoder_folder("llama")
    ours, theirs = (made(folder, tmp_path / name, name) for name in ("gptq", "k-quant"))
    assert ours.weights_bytes == theirs.weights_bytes
    files = [one.file(WEIGHTS).read_bytes() for one in (ours, theirs)]
    assert files[0] != files[1]
    prompts = random_prompts(2, [12])
    texts = []
    for unsplit in (False, True):
        with load(ours, threads=1, unsplit=unsplit) as model:
            texts.append(model.generate(prompts, max_new_tokens=8).finish().tokens)
    assert texts[0] == texts[1]


def test_without_data_it_is_refused(decoder_folder: Folders, tmp_path: Path) -> None:
    split = from_pretrained(decoder_folder("llama"), exits=EXITS)
    settings = WeightBits(4, block=16, method="gptq")
    with pytest.raises(UsageError, match="gptq measures on data") as refused:
        export(split.split_model(), tmp_path / "b", weights=settings)
    assert "--calibration-data" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_ids_that_the_model_does_not_have_are_refused(
    decoder_folder: Folders, tmp_path: Path, wrong: int
) -> None:
    tokens = np.full((1, 12), 3)
    tokens[0, 5] = wrong
    split = from_pretrained(decoder_folder("llama"), exits=EXITS)
    with pytest.raises(UsageError, match=f"has the id {wrong}; the model has 0 to") as refused:
        export(
            split.split_model(),
            tmp_path / "b",
            weights=WeightBits(4, block=16, method="gptq"),
            calibration=lambda bundle: [{"tokens": tokens}],
        )
    assert "tokenizer" in str(refused.value)
    assert not (tmp_path / "b").exists()
