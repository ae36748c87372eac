"""The files that users bring, by kind, and what reads each as a user's own call would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image

from edgeexit.bundle.reader import MANIFEST, open_bundle
from edgeexit.cli.conversations import read_conversations
from edgeexit.export import export_onnx
from edgeexit.export.describe import check as check_split
from edgeexit.export.pretrained import from_pretrained
from edgeexit.export.text_files import write_text_files
from edgeexit.measure.calibrate import calibrate, default_score
from edgeexit.measure.check import check
from edgeexit.measure.data import open_data
from edgeexit.measure.trace import record
from edgeexit.measure.trace_file import read_trace, write_trace
from edgeexit.runtime import Policy, Rule, load, write_policy
from tests.chats import save_chat
from tests.checkpoints import save_checkpoint
from tests.decoder_toys import make_decoder_toy, write_decoder_toy
from tests.decoders import make_decoder, save_decoder
from tests.encoder_decoders import make_bart, make_t5
from tests.encoder_decoders import save_checkpoint as save_encoder_decoder
from tests.export.cut.test_cut import STRAIGHT, write
from tests.toys import make_inputs, make_toy, write_toy


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        make: Writes them into a folder.
        read: Reads them from a copy of that folder. `damaged` is the file that was damaged.
        files: Which of them are damaged, as a pattern.
    """

    make: Callable[[Path], object]
    read: Callable[[Path, Path], object]
    files: str = "*"


def _read_checkpoint(folder: Path, damaged: Path, **options: Any) -> None:
    """As far as ``export`` goes before it traces."""
    model = from_pretrained(folder, **{"exits": [1, 2], "untrained": True} | options)
    split = model.split_model()
    check_split(split)
    if split.tokenizer_folder is not None:
        (folder / "bundle").mkdir(exist_ok=True)
        write_text_files(Path(split.tokenizer_folder), folder / "bundle")


def _read_saved(folder: Path, damaged: Path) -> None:
    _read_checkpoint(folder, damaged, exits=None, untrained=False)


def _with_exits(folder: Path) -> None:
    save_checkpoint("bert", folder)
    model = from_pretrained(folder, exits=[1, 2], untrained=True)
    model.save_pretrained(folder)


def _sharded(folder: Path) -> None:
    save_decoder("llama", folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    about = json.loads((folder / "generation_config.json").read_text())
    about |= {"do_sample": True, "temperature": 0.7, "top_k": 5, "suppress_tokens": [3, 4]}
    about |= {"repetition_penalty": 1.2}
    (folder / "generation_config.json").write_text(json.dumps(about))


def _pickled(folder: Path) -> None:
    from safetensors.torch import load_file

    save_decoder("llama", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _old_text(folder: Path) -> None:
    """A BERT as it was saved before there was ``tokenizer.json``."""
    save_checkpoint("bert", folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "##s", "was", "."]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer.json").unlink()
    about = {"do_lower_case": True, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))


def _external(folder: Path) -> None:
    folder.mkdir()
    model = onnx.load(write(folder / "model.onnx", STRAIGHT))
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="w.data",
        size_threshold=0,
    )


def _read_onnx(folder: Path, damaged: Path) -> None:
    export_onnx(folder / "model.onnx", folder / "bundle", exits=["a", "b", "c"])


def _toy(folder: Path) -> None:
    write_toy(make_toy(), folder)
    _writable(folder)


def _writable(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def _writer(folder: Path) -> None:
    write_decoder_toy(make_decoder_toy(), folder)
    _writable(folder)


def _read_bundle(folder: Path, damaged: Path) -> None:
    with load(folder) as model:
        check(model)


def _read_relisted(folder: Path, damaged: Path) -> None:
    """A bundle whose manifest was made to fit the damaged file: no digest protects it."""
    manifest = folder / MANIFEST
    name = damaged.relative_to(folder).as_posix()
    if damaged != manifest and damaged.is_file():
        about = json.loads(manifest.read_text())
        raw = damaged.read_bytes()
        about["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
        manifest.write_text(json.dumps(about))
    _read_bundle(folder, damaged)


def _results(folder: Path) -> None:
    """A policy, a trace and data of a bundle beside them."""
    folder.mkdir()
    bundle = write_toy(make_toy(), folder / "bundle")
    np.savez(folder / "data.npz", **make_inputs(23), label=np.arange(23) % 3)
    with load(bundle) as model:
        trace = record(model, open_data(folder / "data.npz", bundle), 7)
        exits = [exit_.name for exit_ in model.exits[:-1]]
        rule = Rule(thresholds=dict.fromkeys(exits, 0.5), score="margin")
        rules = dict.fromkeys(model.chains, rule)
    write_trace(trace, folder / "trace.npz")
    policy, _, _ = calibrate(trace, max_risk=1.0, score=default_score(trace, None))
    write_policy(policy, folder / "calibrated.json")
    write_policy(Policy(rules=rules), folder / "policy.json")


def _read_result(folder: Path, damaged: Path) -> None:
    bundle = folder / "bundle"
    if damaged.name == "data.npz":
        with load(bundle) as model:
            for batch in open_data(damaged, model.bundle).batches(8):
                model(batch.inputs)
    elif damaged.name == "trace.npz":
        trace = read_trace(damaged)
        calibrate(trace, max_risk=0.5, score=default_score(trace, None))
    else:
        with load(bundle, policy=damaged) as model:
            model(make_inputs(3))


def make_pictures(folder: Path) -> None:
    """Files of pictures; beside them a bundle that takes them."""
    folder.mkdir()
    noise = np.random.RandomState(0).randint(0, 255, (40, 30, 3)).astype(np.uint8)
    picture = Image.fromarray(noise)
    for ending in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm"):
        picture.save(folder / f"p.{ending}")
    picture.save(folder / "p2.jpg", progressive=True, exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0")
    picture.quantize(16).save(folder / "p2.png")


def read_pictures(bundle: Path) -> Callable[[Path, Path], object]:
    """What reads pictures for a bundle."""
    opened = open_bundle(bundle)

    def read(folder: Path, damaged: Path) -> None:
        lines = folder / "pictures.jsonl"
        lines.write_text(json.dumps({"image": damaged.name}))
        for _ in open_data(lines, opened).batches(4):
            pass

    return read


def make_texts(folder: Path) -> None:
    """Lines of texts, and conversations."""
    folder.mkdir()
    lines = [{"text": f"w1 w{n} ü", "label": n % 3} for n in range(5)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (folder / "talk.json").write_text(json.dumps({"messages": turns[:1], "tools": None}))
    (folder / "talks.jsonl").write_text(f"{json.dumps(turns)}\n{json.dumps(turns[:1])}\n")


def read_texts(classifier: Path, talker: Path) -> Callable[[Path, Path], object]:
    """What reads texts for a classifier, and conversations for a model that holds them."""
    opened = open_bundle(classifier)
    model = load(talker)

    def read(folder: Path, damaged: Path) -> None:
        if damaged.name == "texts.jsonl":
            for _ in open_data(damaged, opened).batches(4):
                pass
            return
        for one in read_conversations(damaged):
            model.chat_prompt(one.messages, tools=one.tools)

    return read


def _adapter(folder: Path) -> None:
    """An adapter beside the folder of its base."""
    import peft

    save_decoder("llama", folder / "base")
    adapted = peft.get_peft_model(
        make_decoder("llama"),
        peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)


def _read_adapter(folder: Path, damaged: Path) -> None:
    from_pretrained(folder / "base", exits=[1], adapter=folder / "adapter")


KINDS: dict[str, Kind] = {
    "classifier with exits": Kind(_with_exits, _read_saved),
    "checkpoint with vocab.txt": Kind(_old_text, _read_checkpoint),
    "image checkpoint": Kind(lambda f: save_checkpoint("vit", f), _read_checkpoint),
    "ResNet checkpoint": Kind(lambda f: save_checkpoint("resnet", f), _read_checkpoint),
    "language model in shards": Kind(_sharded, _read_checkpoint),
    "pickled language model": Kind(_pickled, _read_checkpoint),
    "chat checkpoint": Kind(save_chat, _read_checkpoint),
    "T5": Kind(lambda f: save_encoder_decoder(make_t5("t5"), f), _read_checkpoint),
    "encoder-decoder": Kind(lambda f: save_encoder_decoder(make_bart(), f), _read_checkpoint),
    "adapter": Kind(_adapter, _read_adapter, "adapter/adapter_*"),
    "ONNX file": Kind(_external, _read_onnx),
    "bundle": Kind(_toy, _read_bundle, "**/*"),
    "bundle, relisted": Kind(_toy, _read_relisted, "**/*"),
    "writing bundle, relisted": Kind(_writer, _read_relisted, "**/*"),
    "policy, trace, data": Kind(_results, _read_result),
}

__all__ = ["KINDS", "Kind", "make_pictures", "make_texts", "read_pictures", "read_texts"]
