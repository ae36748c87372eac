"""Creates the decoder that `decode.py` measures: a Llama with random weights and a tokenizer, which
onnxruntime-genai's builder requires.

    python benchmarks/decodermodels.py FOLDER CONFIG      # fields of a LlamaConfig, as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Command line of the child process."""
    import torch
    import transformers

    folder, fields = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **fields, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of single bytes, whose token 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<end>": 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
