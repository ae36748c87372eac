"""Small causal language models, made from a configuration, and the plainest way to run them.

Weights are drawn wide, so that positions and masks matter; `reference` recomputes everything from
the beginning for every token, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.families.llama import trunk as llama_trunk
from edgeexit.export.families.opt import trunk as opt_trunk

VOCABULARY, LAYERS, POSITIONS = 300, 4, 96
FAMILIES = ("llama", "qwen3", "opt")
EXITS = [1, 2]
ADAPTERS = {1: 1, 2: 2}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make_decoder(family: str) -> transformers.PreTrainedModel:
    """A causal language model of four layers with random weights."""
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(
            **_SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
        )
        model = transformers.LlamaForCausalLM(config)
    elif family == "qwen3":
        config = transformers.Qwen3Config(
            **_SIZES, intermediate_size=48, num_key_value_heads=1, head_dim=16
        )
        model = transformers.Qwen3ForCausalLM(config)
    else:
        config = transformers.OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=48)
        model = transformers.OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def make_adapted(family: str, noise: float = 0.06) -> ExitDecoder:
    """The same with adapters: copies of the last layers, with some noise. That of exit 2 has as
    many layers as the model has behind it, so what it drafts is often right, and always without
    noise."""
    model = make_decoder(family)
    trunk = (opt_trunk if family == "opt" else llama_trunk)(model)  # type: ignore[arg-type]
    decoder = ExitDecoder(model, trunk, EXITS, ADAPTERS)
    with torch.no_grad():
        for parameter in decoder.adapters.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return decoder.eval()


def save_decoder(family: str, folder: Path) -> Path:
    """Writes a checkpoint with a byte-level tokenizer."""
    make_decoder(family).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: n for n, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Reference:
    """The model in float64, without caches, through transformers' own layers.

    An exit with an adapter is the model with its later layers replaced by the adapter's.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, adapters: Mapping[int, list[nn.Module]] = {}
    ) -> None:
        self.model = model.double().eval()
        self.adapted = {layer: _shortened(model, layer, own) for layer, own in adapters.items()}

    @classmethod
    def of(cls, decoder: ExitDecoder) -> Reference:
        """That of a decoder with adapters."""
        assert isinstance(decoder.model, transformers.PreTrainedModel)
        own = {
            layer: [one.layer for one in decoder.adapters[f"exit_{layer}"]]  # type: ignore[union-attr]
            for layer in decoder.adapter_sizes
        }
        return cls(decoder.model, own)  # type: ignore[arg-type]

    @torch.no_grad()
    def caches(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Keys and values ``[heads, seq, size]`` of every layer, adapters included, by the names
        that bundles give them."""
        ids = torch.tensor([list(tokens)])
        models = {"": (self.model, 0)}
        models |= {f"adapter_{n}/": (model, n) for n, model in self.adapted.items()}
        found = {}
        for prefix, (model, first) in models.items():
            held = model(ids, use_cache=True).past_key_values.layers[first:]
            for number, layer in enumerate(held, start=1):
                found[f"{prefix}layer_{number}/key"] = layer.keys[0].numpy()
                found[f"{prefix}layer_{number}/value"] = layer.values[0].numpy()
        return found

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], layer: int | None = None) -> np.ndarray:
        """Logits ``[seq, vocabulary]`` of the last layer, or through the head from an earlier
        one."""
        ids = torch.tensor([list(tokens)])
        if layer in self.adapted:
            return self.adapted[layer](ids).logits[0].numpy()
        made = self.model(ids, output_hidden_states=True)
        if layer is None or layer == LAYERS:
            return made.logits[0].numpy()
        state = made.hidden_states[layer]
        base = self.model.model
        if hasattr(base, "norm"):
            return self.model.lm_head(base.norm(state))[0].numpy()
        narrow = base.decoder.project_out(base.decoder.final_layer_norm(state))
        return self.model.lm_head(narrow)[0].numpy()

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Tokens, and how far the largest logit was above the second."""
        tokens, margins = list(prompt), []
        for _ in range(count):
            logits = self.logits(tokens)[-1]
            ordered = np.sort(logits)
            margins.append(float(ordered[-1] - ordered[-2]))
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :], margins


def _shortened(
    model: transformers.PreTrainedModel, layer: int, own: Sequence[nn.Module]
) -> transformers.PreTrainedModel:
    """The model in which these layers follow the given one."""
    short = copy.deepcopy(model)
    base = getattr(short.model, "decoder", short.model)
    base.layers = nn.ModuleList([*base.layers[:layer], *copy.deepcopy(list(own))])
    for number, one in enumerate(base.layers):
        one.self_attn.layer_idx = number
    short.config.num_hidden_layers = len(base.layers)
    return short.double().eval()


def random_prompts(count: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens (none of them the end)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, lengths[n % len(lengths)]).tolist() for n in range(count)]


@torch.no_grad()
def approximate(
    model: transformers.PreTrainedModel, prompt: Sequence[int], count: int, threshold: float
) -> tuple[list[int], list[int], list[float]]:
    """What CALM's propagation of skipped states gives, one layer and one token at a time, float64.

    Returns:
        Tokens, the layer that answered each, and how far its largest logit was above the second.
    """
    from edgeexit.export.trace.attention import join_heads, split_heads
    from edgeexit.export.trace.rotary import rotate

    describe = opt_trunk if model.config.model_type == "opt" else llama_trunk
    trunk = describe(model.double().eval())  # type: ignore[arg-type]
    heads = trunk.heads
    past: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in trunk.layers]

    def project(layer: int, state: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        q, k, v = trunk.layers[layer].before(state)
        sizes = (heads.queries, heads.keys, heads.keys)
        q, k, v = (split_heads(x, n, heads.size) for x, n in zip((q, k, v), sizes, strict=True))
        if heads.rotary is not None:
            cos, sin = (table.double() for table in heads.rotary)
            q, k = rotate(q, cos, sin, place), rotate(k, cos, sin, place)
        past[layer].append((k, v))
        return q

    tokens, layers, margins = list(prompt), [], []
    place = 0
    while len(tokens) < len(prompt) + count:
        where = torch.tensor([[place]])
        embedded = torch.nn.functional.embedding(torch.tensor([[tokens[place]]]), trunk.embedding)
        state = embedded if trunk.stem is None else trunk.stem(embedded, where)
        left = None
        for layer in range(LAYERS):
            q = project(layer, state, where)
            if left is not None:
                continue
            k, v = (torch.cat(x, dim=2) for x in zip(*past[layer], strict=True))
            k, v = (x.repeat_interleave(heads.queries // heads.keys, dim=1) for x in (k, v))
            shares = torch.softmax(q @ k.transpose(-1, -2) * heads.size**-0.5, dim=-1)
            state = trunk.layers[layer].after(state, join_heads(shares @ v))
            logits = trunk.head(state[:, -1])[0]
            chances = torch.softmax(logits, dim=-1)
            early = layer + 1 in EXITS and place >= len(prompt)
            if layer + 1 == LAYERS or (early and float(chances.max()) >= threshold):
                left = layer + 1
                largest = logits.topk(2).values
        place += 1
        if place >= len(prompt):
            assert left is not None
            tokens.append(int(logits.argmax()))
            layers.append(left)
            margins.append(float(largest[0] - largest[1]))
    return tokens[len(prompt) :], layers, margins
