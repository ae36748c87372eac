"""Streamed text is the text of the whole, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeexit.errors import UsageError
from edgeexit.runtime.text.tokenizer import Stream, special_stops

SPECIAL = "<|end|>"
PIECES = ["the", "film", "was", "a", "é", "東", "s", ".", ",", "!", "'", "-", "1"]


def byte_level() -> Tokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a")]
    vocabulary |= {a + b: len(vocabulary) + n for n, (a, b) in enumerate(pairs)}
    made = Tokenizer(models.BPE(vocabulary, pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def words_marked(*, prefix: str) -> Tokenizer:
    """SentencePiece's way: a word begins with a mark, which is a space but for the first one."""
    pieces = [f"▁{piece}" for piece in PIECES] + PIECES + ["▁"]
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in ["[U]", *pieces]], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    made.decoder = decoders.Metaspace(prepend_scheme=prefix)
    return made


def bytes_fall_back() -> Tokenizer:
    """Llama's way: what no piece has is spelled in bytes."""
    pieces = [f"▁{piece}" for piece in PIECES] + PIECES + ["▁"]
    vocabulary = ["<unk>", *(f"<0x{number:02X}>" for number in range(256)), *pieces]
    model = models.BPE(
        {piece: number for number, piece in enumerate(vocabulary)},
        [],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = Tokenizer(model)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return made


def word_pieces() -> Tokenizer:
    pieces = ["[UNK]", *PIECES, *(f"##{piece}" for piece in PIECES)]
    made = Tokenizer(models.WordPiece({p: n for n, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    return made


def words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({p: n for n, p in enumerate(["[U]", *PIECES])}, "[U]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "words marked, the first too": lambda: words_marked(prefix="always"),
    "words marked, the first not": lambda: words_marked(prefix="never"),
    "bytes fall back": bytes_fall_back,
    "word pieces": word_pieces,
    "words": words,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made = KINDS[request.param]()
    made.add_special_tokens([SPECIAL])
    return made


@given(data=st.data())
def test_the_prompt_and_what_is_given_are_the_text_of_all_tokens(
    data: st.DataObject, tokenizer: Tokenizer
) -> None:
    ids = st.integers(0, tokenizer.get_vocab_size() - 1)
    prompt, new = data.draw(st.lists(ids, max_size=12)), data.draw(st.lists(ids, max_size=12))
    whole = tokenizer.decode([*prompt, *new])
    stream = Stream(tokenizer, (), prompt)
    given_ = "".join(map(stream.add, new)) + stream.end()
    assert stream.text == given_
    if "\ufffd" in whole:  # bytes that are no text: broken characters may come in other numbers
        return
    # Where bytes fall back, an unfinished character breaks the finished ones before it, too.
    finished = prompt
    while finished and tokenizer.decode(finished).endswith("\ufffd"):
        finished = finished[:-1]
    assert tokenizer.decode(finished) + given_ == whole


def test_the_space_between_prompt_and_continuation_is_given(tokenizer: Tokenizer) -> None:
    prompt, both = tokenizer.encode("the").ids, tokenizer.encode("the a").ids
    assert both[: len(prompt)] == prompt
    stream = Stream(tokenizer, (), prompt)
    assert "".join(map(stream.add, both[len(prompt) :])) + stream.end() == " a"


def test_a_stop_string_that_is_a_special_token_ends_the_text(tokenizer: Tokenizer) -> None:
    [end] = tokenizer.encode(SPECIAL).ids
    ids = tokenizer.encode("the a").ids
    stream = Stream(tokenizer, [SPECIAL, "!"])
    for token in ids:
        stream.add(token)
    stream.add(end)
    assert stream.stopped and stream.text == tokenizer.decode(ids)
    assert stream.add(ids[0]) == "" and stream.end() == ""


def test_a_stop_string_that_holds_a_special_token_and_more_is_refused(
    tokenizer: Tokenizer,
) -> None:
    with pytest.raises(UsageError, match=r"contains the special token.*Stop at"):
        special_stops(tokenizer, [f"{SPECIAL}\n"])
