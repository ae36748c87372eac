"""The score `saturation` of models that write text: transformers' own states in float64, and texts
whose tokens stop where that score says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from edgeexit.bundle.reader import Bundle
from edgeexit.export.exits.encoder import saturation
from edgeexit.measure.check import check
from edgeexit.runtime import Rule, Schedule, load
from tests.decoders import EXITS, LAYERS, random_prompts

NEW = 10


class States:
    """States of a checkpoint's layers in float64, a text at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self._states: list[torch.Tensor] = []
        layers = self.model.model.layers
        layers[0].register_forward_pre_hook(
            lambda _, given, named: self._states.append((*given, *named.values())[0]),
            with_kwargs=True,
        )
        for layer in layers:
            layer.register_forward_hook(
                lambda _, given, made: self._states.append(
                    made[0] if isinstance(made, tuple) else made
                )
            )

    @torch.no_grad()
    def of(self, tokens: list[int]) -> list[torch.Tensor]:
        """What comes into the first layer, and out of each, ``[seq, width]``."""
        self._states.clear()
        self.model(torch.tensor([tokens]))
        return [state[0] for state in self._states]

    def saturation(self, tokens: list[int], layer: int) -> np.ndarray:
        """Cosine of a layer's input and output, ``[seq]``."""
        before, after = (self.of(tokens)[n].numpy() for n in (layer - 1, layer))
        lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        return (before * after).sum(-1) / lengths

    @torch.no_grad()
    def token(self, tokens: list[int], layer: int) -> int:
        """The next token by the states of a layer."""
        state = self.model.model.norm(self.of(tokens)[layer][-1])
        return int(self.model.lm_head(state).argmax())


def test_a_row_has_its_own_score_unless_the_batch_is_flattened_as_in_mue() -> None:
    before, after = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    read = torch.arange(5) < torch.tensor([[5], [2], [4]])
    alone = [saturation(b[None, r], a[None, r], None) for b, a, r in zip(before, after, read)]  # noqa: B905
    torch.testing.assert_close(saturation(before, after, read), torch.cat(alone))
    # MuE's published formula, for a batch with its padding
    one, other = before.reshape(-1).double(), after.reshape(-1).double()
    theirs = (one @ other / (one.norm() * other.norm())).float()
    flat = saturation(before, after, read, flatten=True)
    torch.testing.assert_close(flat, theirs.expand(3))
    beside = torch.stack([before[0], after[1], after[2]])
    assert saturation(beside, after, read, flatten=True)[0] != flat[0]
    assert saturation(beside, after, read)[0] == saturation(before, after, read)[0]


@pytest.mark.parametrize("step", [None, 4])
def test_saturation_is_the_cosine_of_a_layers_input_and_output(
    decoder_bundle: Callable[[str], Bundle], decoder_folder: Callable[[str], Path], step: int | None
) -> None:
    states, prompts = States(decoder_folder("llama")), random_prompts(2, [11, 11])
    with load(decoder_bundle("llama")) as model:
        assert check(model).passed
        trace = model.trace({"tokens": np.array(prompts)}, step=step)
    for layer, scores in zip([*EXITS, LAYERS], trace.scores, strict=True):
        expected = np.stack([states.saturation(list(prompt), layer) for prompt in prompts])
        np.testing.assert_allclose(scores["saturation"], expected, atol=1e-5)


@pytest.mark.parametrize("schedule", [None, Schedule(length=8, temperature=1)])
def test_tokens_stop_where_their_state_no_longer_changes(
    decoder_bundle: Callable[[str], Bundle],
    decoder_folder: Callable[[str], Path],
    schedule: Schedule | None,
) -> None:
    states, seen = States(decoder_folder("llama")), set()
    with load(decoder_bundle("llama")) as model:
        prompts = map(list, random_prompts(3, [9, 5, 14]))
        for prompt, more in zip(prompts, (-0.02, 0.02, 0.3), strict=True):
            own = [states.saturation(prompt, layer)[-1] for layer in EXITS]
            thresholds = {"exit_1": own[0] + 0.02, "exit_2": own[1] + more}
            model.policy = Rule(score="saturation", thresholds=thresholds, schedule=schedule)
            text, exits, closest = list(map(int, prompt)), [], 1.0
            for number in range(1, NEW + 1):
                taken = LAYERS
                for layer, threshold in zip(EXITS, thresholds.values(), strict=True):
                    score = states.saturation(text, layer)[-1]
                    at = threshold if schedule is None else schedule.threshold(threshold, number)
                    closest = min(closest, abs(score - at))
                    if score >= at:
                        taken = layer
                        break
                exits.append(f"exit_{taken}")
                text.append(states.token(text, taken))
            made = model.generate([prompt], max_new_tokens=NEW, mode="fast").finish()
            assert closest > 1e-5
            assert made.tokens == [text[len(prompt) :]]
            assert made.statistics.exits == {name: exits.count(name) for name in {*exits}}
            seen |= {*exits}
    assert len(seen) == (3 if schedule is None else 2)
