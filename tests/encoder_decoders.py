"""A small BART, with random weights or taught to write its source backwards, and its checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY, LAYERS, POSITIONS = 64, 3, 64
PAD, START, END = 1, 2, 2
LETTERS = "abcdefghij"


def make_bart(*, scaled: bool = True) -> transformers.BartForConditionalGeneration:
    """Three layers on each side, random weights drawn wide."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=POSITIONS,
        scale_embedding=scaled,
        dropout=0.0,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=END,
        decoder_start_token_id=START,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = 0.1 if parameter.dim() > 1 else 0.05
            parameter.add_(wide * torch.randn(parameter.shape))
        decoder = model.model.decoder  # of which random weights make one word for ever
        decoder.embed_positions.weight.mul_(20)
        for layer in decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(0.5)
        model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape))
    return model.eval()


@functools.cache
def trained_bart() -> transformers.BartForConditionalGeneration:
    """The same, taught to write its source backwards, which takes half a minute."""
    torch.manual_seed(1)
    model = transformers.BartForConditionalGeneration(make_bart().config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(2)
    steps = 1500
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        length = int(torch.randint(1, 8, (1,), generator=generator))
        words = torch.randint(4, 4 + len(LETTERS), (64, length), generator=generator)
        end = torch.full((64, 1), END)
        labels = torch.cat([words.flip(1), end], dim=1)
        ids = torch.cat([torch.zeros_like(end), words, end], dim=1)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def save_bart(model: transformers.BartForConditionalGeneration, folder: Path) -> Path:
    """Writes a checkpoint with a tokenizer of letters."""
    model.save_pretrained(folder)
    letters = {letter: n for n, letter in enumerate(LETTERS, start=4)}
    vocabulary = {"<s>": 0, "<pad>": PAD, "</s>": END, "<unk>": 3} | letters
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", END)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
    )
    fast.save_pretrained(folder)
    return folder
