"""`Generation.reasons`: why each row of a text ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeexit.runtime import load
from tests.decoder_toys import make_decoder_toy, write_decoder_toy
from tests.decoder_words import write_with_words


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_rows_end_by_length_or_by_a_token(tmp_path: Path, mode: str) -> None:
    endless = write_decoder_toy(make_decoder_toy(stop_tokens=()), tmp_path / "endless")
    with load(endless) as model:
        made = model.generate([[1, 2, 3], [4, 5]], max_new_tokens=12, mode=mode)
        next(made)
        assert made.reasons == ["", ""]
        made.finish()
        assert made.reasons == ["length", "length"]
        rows = made.tokens
        closed = model.generate([1, 2, 3], max_new_tokens=12, mode=mode)
        next(closed)
        closed.close()
        assert closed.reasons == [""]
    end = rows[0][4]
    ending = write_decoder_toy(make_decoder_toy(stop_tokens=(end,)), tmp_path / "ending")
    with load(ending) as model:
        made = model.generate([[1, 2, 3], [4, 5]], max_new_tokens=12, mode=mode).finish()
    assert made.reasons == ["stop", "length" if end not in rows[1] else "stop"]
    assert made.tokens[0] == rows[0][: rows[0].index(end)]


def test_a_stop_string_at_the_last_token_is_a_stop(tmp_path: Path) -> None:
    bundle = write_with_words(make_decoder_toy(stop_tokens=()), tmp_path / "words")
    with load(bundle) as model:
        [whole] = model.generate("w1 w2", max_new_tokens=6).finish().texts
        word = whole.split()[-1]
        most = whole.split().index(word) + 1
        made = model.generate("w1 w2", max_new_tokens=most, stop=f" {word}").finish()
        assert made.reasons == ["stop"] and made.texts == [whole[: whole.index(f" {word}")]]
        assert model.generate("w1 w2", max_new_tokens=most).finish().reasons == ["length"]
