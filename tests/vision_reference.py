"""What vision-language models must answer: transformers' own texts, and a plain run in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeexit.runtime.executor.components import token_states
from edgeexit.runtime.model import Model
from edgeexit.runtime.programs.prompts import pad_source
from tests.vision_models import LAYERS, PLACEHOLDER

COUNT = 20
Drops = int | Sequence[int | None] | None
"""The layer behind which image tokens leave: of all texts, or of each."""


def prompts_of(tokens: int, kinds: Sequence[str]) -> list[list[int]]:
    """Prompts of token ids with images at these places, each of so many tokens."""
    image = [PLACEHOLDER] * tokens
    prompts = {
        "none": [5, 6, 7, 8, 9, 10, 11],
        "start": [*image, 12, 13],
        "middle": [14, 15, *image, 16],
        "end": [17, 18, 19, *image],
        "two": [14, *image, 15, 16, *image, 17],
        "three": [18, *image, *image, 19, 20, *image],
    }
    return [prompts[kind] for kind in kinds]


def random_pixels(split: Any, count: int) -> torch.Tensor:
    """Images for a tower."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *split.whole.tower.pixels, generator=generator)


def reference_text(
    model: Any, ids: Sequence[int], pixels: torch.Tensor | None, count: int
) -> list[int]:
    """The greedy tokens of transformers' `generate` for one prompt, up to the stop token."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
    kind = type(model).__name__
    if pixels is not None:
        smolvlm = kind.startswith(("SmolVLM", "Idefics3"))
        inputs["pixel_values"] = pixels[None] if smolvlm else pixels
    elif kind.startswith("Blip2"):
        model = model.language_model  # `generate` of the whole needs an image
    encodes = model.config.is_encoder_decoder
    model.generation_config.forced_eos_token_id = None
    made = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0].tolist()
    new, stop = made[1 if encodes else len(ids) :], 2 if encodes else 0
    return new[: new.index(stop)] if stop in new else new


def in_float64(split: Any) -> Any:
    """A copy of a model with exits that computes in float64; kept while the model lives."""
    made = getattr(split, "float64", None)
    if made is None:
        made = copy.deepcopy(split)
        made.double()
        object.__setattr__(split, "float64", made)  # not a part of the model
    return made


@torch.no_grad()
def run_in_float64(
    split: Any,
    prompt: Sequence[int],
    text: Sequence[int],
    pixels: torch.Tensor | None,
    dropped_behind: int | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Runs a prompt and the text that was made of it through all layers in float64, every token in
    one pass.

    Args:
        dropped_behind: The layer behind which the prompt's image tokens are left out; all others
            keep their positions.

    Returns:
        The states of every layer by name, ``[heads, tokens, size]``, keys turned by their
        positions; and the logits behind the last token of the prompt and behind each of the text.
    """
    split, pixels = in_float64(split), None if pixels is None else pixels.double()
    images = () if pixels is None else (pixels,)
    source: tuple[torch.Tensor, ...] = ()
    if split.model.config.is_encoder_decoder:  # the encoder reads the prompt
        ids = torch.tensor([list(prompt)])
        source, prompt = split.encode(ids, torch.ones_like(ids), images=images), [2]
    tokens, given = torch.tensor([[*prompt, *text]]), len(prompt)
    parts = [tokens[:, :given], tokens[:, given:]]
    places = torch.arange(tokens.shape[1])
    state = torch.cat(
        [split.embed(parts[0], *(() if source else images)), split.embed(parts[1])], 1
    )
    if split.trunk.stem is not None:
        state = split.trunk.stem(state, places[None])
    states: dict[str, np.ndarray] = {}
    for number, layer in enumerate(split.layers, start=1):
        for kind, value in zip(("key", "value"), layer.before(state)[1:], strict=True):
            heads = value[0].unflatten(-1, (split.trunk.heads.keys, split.trunk.heads.size))
            heads = heads.transpose(0, 1)
            if kind == "key" and split.trunk.heads.rotary is not None:
                heads = _turned(heads, places)
            states[f"layer_{number}/{kind}"] = heads.numpy()
        state = split._through_layer(layer, state, places[None], *source)
        if number == dropped_behind:
            kept = (tokens[0, places] != PLACEHOLDER) | (places >= given)
            state, places = state[:, kept], places[kept]
    assert state.dtype == torch.float64
    return states, split.trunk.head(state[0, places >= given - 1]).numpy()


def _turned(keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Keys ``[heads, tokens, size]`` turned by their positions (RoPE, arXiv:2104.09864)."""
    half = keys.shape[-1] // 2
    angles = places[:, None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    first, second = keys[..., :half], keys[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass
class Asked:
    """Prompts of unlike lengths and places, with their images."""

    split: Any
    prompts: list[list[int]]
    images: list[torch.Tensor | None]

    def alone(self, row: int) -> Asked:
        return Asked(self.split, [self.prompts[row]], [self.images[row]])

    @property
    def encodes(self) -> bool:
        return bool(self.split.model.config.is_encoder_decoder)

    def generate(self, model: Model, **options: Any) -> Any:
        pixels = [images for images in self.images if images is not None]
        inputs = {"pixel_values": torch.cat(pixels).numpy()} if pixels else {}
        prompts: list[Any] = self.prompts
        if self.encodes:
            inputs, prompts = inputs | pad_source(model.bundle, prompts), []
        return model.generate(
            prompts, inputs=inputs or None, max_new_tokens=COUNT, **options
        ).finish()

    def reference(
        self, row: int, text: Sequence[int], drop: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        prompt, images = self.prompts[row], self.images[row]
        return run_in_float64(self.split, prompt, text, images, drop)

    def assert_greedy(self, texts: Sequence[list[int]], drop: Drops = None) -> None:
        """Every text is what the reference writes."""
        stops = (0, 2) if self.encodes else (0,)
        for row, text in enumerate(texts):
            _, logits = self.reference(row, text, _of_row(drop, row))
            best = logits.argmax(-1).tolist()
            assert best[: len(text)] == text, (row, drop)
            assert len(text) == COUNT or best[len(text)] in stops

    def assert_states(self, model: Model, texts: Sequence[list[int]], drop: Drops = None) -> None:
        """The states of every layer are those of a whole run over the same tokens."""
        session = model._session
        assert session is not None
        for row, text in enumerate(texts):
            # The last token has been chosen, and nothing has run over it yet; a text that ended
            # early ran over its last one to find the stop token.
            states, _ = self.reference(row, text[: COUNT - 1], _of_row(drop, row))
            layers = 0
            for part in session.parts:
                for state in token_states(part.component):
                    expected = states[state.name]
                    length = part.states.lengths[row]
                    assert length == expected.shape[1], (row, state.name)
                    found = np.asarray(part.states.rows(state.name))[row, :, :length]
                    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-3)
                    layers += 1
            assert layers == 2 * LAYERS


def _of_row(drop: Drops, row: int) -> int | None:
    return drop if drop is None or isinstance(drop, int) else drop[row]


def asked_of(split: Any, kinds: Sequence[str]) -> Asked:
    """Prompts with images at these places (`prompts_of`), for a model."""
    tokens = int(split.whole.tower.tokens)
    prompts = prompts_of(tokens, kinds)
    counts = [prompt.count(PLACEHOLDER) // tokens for prompt in prompts]
    images = random_pixels(split, sum(counts)).split(counts)
    return Asked(split, prompts, [own if len(own) else None for own in images])
