"""Small encoder-decoders with random weights, a BART that was taught to write its source backwards,
and their checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY, LAYERS, POSITIONS = 64, 3, 64
PAD, START, END = 1, 2, 2
LETTERS = "abcdefghij"
"""A letter a token, from 4 on."""


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


def make_t5(name: str) -> transformers.PreTrainedModel:
    """T5 as it was (``t5``), of version 1.1 or Flan (``t5-1.1``), or mT5 (``mt5``). Heads are as
    wide in all as the model, or wider; distances share buckets from the fourth on, and all do from
    the twelfth."""
    torch.manual_seed(0)
    plain = name == "t5"
    kind = "MT5" if name == "mt5" else "T5"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=2 if plain else 3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="relu" if plain else "gated-gelu",
        tie_word_embeddings=plain,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model: transformers.PreTrainedModel
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with torch.no_grad():
        if not plain:  # which newer versions of transformers tie whatever they are told
            model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(VOCABULARY, 32))
        for key, parameter in model.named_parameters():
            if "relative_attention_bias" in key:
                parameter.add_(2 * torch.randn(parameter.shape))
            elif "layer_norm" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif key.endswith((".o.weight", ".wo.weight")):
                parameter.mul_(6 if plain else 2)
    return model.eval()


FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "bart": make_bart,
    "t5": functools.partial(make_t5, "t5"),
    "t5-1.1": functools.partial(make_t5, "t5-1.1"),
    "mt5": functools.partial(make_t5, "mt5"),
}
"""What a model is called in tests -> what makes it."""


def save_checkpoint(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Writes a checkpoint with a tokenizer of letters."""
    model.save_pretrained(folder)
    letters = {letter: n for n, letter in enumerate(LETTERS, start=4)}
    config = model.config
    special = {"<pad>": config.pad_token_id, "</s>": config.eos_token_id, "<unk>": 3}
    begins = config.model_type == "bart"
    if begins:
        special["<s>"] = config.bos_token_id
    vocabulary = special | letters
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>" if begins else "$A </s>", special_tokens=list(special.items())
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if begins else None,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
    )
    fast.save_pretrained(folder)
    return folder


def layers_of(half: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of an encoder or decoder of any family."""
    found = half.block if hasattr(half, "block") else half.layers
    assert isinstance(found, torch.nn.ModuleList)
    return found


def shortened(
    model: transformers.PreTrainedModel, *, encoder: int = LAYERS, decoder: int = LAYERS
) -> transformers.PreTrainedModel:
    """The model with the first layers of each only; changes it."""
    del layers_of(model.get_encoder())[encoder:]
    del layers_of(model.get_decoder())[decoder:]
    return model
