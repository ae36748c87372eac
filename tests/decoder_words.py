"""The toy decoder with a tokenizer of as many words as it has tokens."""

from __future__ import annotations

from pathlib import Path

import msgspec
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edgeexit.bundle.manifest import TextPreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from tests.decoder_toys import VOCABULARY, DecoderToy, fill_decoder_toy


def write_with_words(toy: DecoderToy, output: Path, first: str = "") -> Bundle:
    """The toy with a tokenizer: ``w5`` is the token 5. It puts `first` before every text."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if first:
        special = [(first, int(first[1:]))]
        words.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=special
        )
    with BundleWriter(output) as writer:
        manifest = fill_decoder_toy(toy, writer.folder)
        (writer.folder / "tokenizer").mkdir()
        words.save(str(writer.folder / "tokenizer/tokenizer.json"))
        manifest = msgspec.structs.replace(manifest, tokenizer="tokenizer/tokenizer.json")
        if toy.encoder:
            preprocessing = TextPreprocessing(
                max_length=12, ids="source_ids", mask="source_mask", pad_token="w0"
            )
            manifest = msgspec.structs.replace(manifest, preprocessing=[preprocessing])
        return writer.commit(manifest)
