"""Small Whisper models with random weights, their checkpoints, and sounds."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS, MELS, POSITIONS, WINDOW_S = 3, 16, 50, 1
"""50 positions are 100 frames, a window of one second."""
TARGETS = 64
BYTES = 256
"""Ordinary tokens are bytes; the others stand behind them."""
END, START, ENGLISH, GERMAN, TRANSCRIBE, TRANSLATE, BEFORE, NO_TIMES = range(BYTES, BYTES + 8)
FIRST_TIME = NO_TIMES + 1
TIMES = WINDOW_S * 50 + 1
VOCABULARY = FIRST_TIME + TIMES
NAMES = (
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>"),
    *("<|translate|>", "<|startofprev|>", "<|notimestamps|>"),
)
RATE = 16_000


def make_whisper(seed: int = 1, **settings: object) -> transformers.WhisperForConditionalGeneration:
    """Three layers on each side, random weights drawn wide.

    Args:
        settings: Generation settings that differ.
    """
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=MELS,
        d_model=32,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=POSITIONS,
        max_target_positions=TARGETS,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = transformers.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 0.15 if parameter.dim() > 1 else 0.05
            parameter.add_(wide * torch.randn(parameter.shape))
            if "decoder.embed_positions" in name:  # else random weights make one word for ever
                parameter.mul_(20)
            if "encoder_attn.out_proj" in name or "encoder_attn.v_proj" in name:
                parameter.mul_(3)
    model.generation_config = transformers.GenerationConfig(
        **{
            "bos_token_id": END,
            "eos_token_id": END,
            "pad_token_id": END,
            "decoder_start_token_id": START,
            "max_length": TARGETS,
            "suppress_tokens": [5, 77, START, BEFORE],
            "begin_suppress_tokens": [32, END],
            "is_multilingual": True,
            "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
            "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
            "no_timestamps_token_id": NO_TIMES,
            "max_initial_timestamp_index": 10,
            "prev_sot_token_id": BEFORE,
            "return_timestamps": False,
            "language": "en",
            "task": "transcribe",
            **settings,
        }
    )
    return model.eval()


def make_tokenizer() -> transformers.WhisperTokenizerFast:
    """Bytes as tokens, and Whisper's special tokens behind them; times are no tokens of it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(NAMES))
    return transformers.WhisperTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=NAMES[0],
        bos_token=NAMES[0],
        eos_token=NAMES[0],
        additional_special_tokens=list(NAMES[1:]),
        model_max_length=TARGETS,
    )


def make_extractor(**options: object) -> transformers.WhisperFeatureExtractor:
    return transformers.WhisperFeatureExtractor(
        **{"feature_size": MELS, "chunk_length": WINDOW_S, **options}
    )


def save_checkpoint(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Writes a checkpoint with tokenizer and feature extractor."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    make_extractor().save_pretrained(folder)
    return folder


def make_sound(seconds: float = 0.8, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Tones that come and go, and a little noise; ``[samples]`` float32."""
    random = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * rate)) / rate
    sound = random.standard_normal(len(time_s)) * 0.01
    for _ in range(4):
        start, length = random.uniform(0, seconds), random.uniform(0.1, 0.5)
        loud = (time_s >= start) & (time_s < start + length)
        sound += loud * 0.2 * np.sin(2 * np.pi * random.uniform(100, 3000) * time_s)
    return sound.astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, *, width: int = 2, rate: int = RATE) -> Path:
    """Writes ``[samples, channels]`` float32 as whole numbers of that many bytes."""
    most = 2.0 ** (8 * width - 1)
    whole = np.clip(np.round(samples.astype(np.float64) * most), -most, most - 1).astype("<i4")
    raw = np.ascontiguousarray(whole).view(np.uint8).reshape(-1, 4)[:, :width]
    if width == 1:
        raw = raw + np.uint8(128)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw.tobytes())
    return path
