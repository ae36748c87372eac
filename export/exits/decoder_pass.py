"""`DecoderPass`: a decoder's layers over whole sequences in torch, for training and as a reference.

Attention, its states and its masks are not part of a trunk's layers: here attention is torch's own,
in an exported graph it has a form for the engine (`edgeexit.export.trace.attention`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from edgeexit.export.exits.decoder_trunk import DecoderTrunk, scaled
from edgeexit.export.exits.draft_vocabulary import head_over
from edgeexit.export.exits.saved import check_adapters, check_layers
from edgeexit.export.exits.skipped_attention import SkippedAttention
from edgeexit.export.trace.attention import causal_attention
from edgeexit.export.trace.layer_stacks import CutLayer, Saturation

_PART_TOKENS = 32  # whose logits `DecoderPass.each_exit` returns at a time


class DecoderPass(nn.Module):
    """A causal language model and its exits, as a torch module.

    Args:
        model: The transformers model that owns the weights.
        trunk: Its description; modules are shared with `model`, not copied.
        exits: Layers (1 = behind the first) with an exit; the last layer always has one.
        adapters: Exit layers with an adapter of one layer; as a mapping: exit layer -> number of
            adapter layers. A new adapter is a copy of the model's last layers (EE-Tuning,
            arXiv:2402.00518, starts so too); it must be trained.

    Attributes:
        adapters: Exit name -> its adapter's layers.
        skipped: The layers without attention, and the adapters in its place.
        read_by_embed: Further inputs of `embed`, which training passes on.
    """

    read_by_embed: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        trunk: DecoderTrunk,
        exits: Iterable[int],
        adapters: Iterable[int] | Mapping[int, int] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.trunk = trunk
        # Not registered as submodules: their weights are in the model and would be saved twice.
        self.layers = list(trunk.layers)
        self.depth = len(trunk.layers)
        self.exit_layers = check_layers(exits, self.depth)
        self.skipped = SkippedAttention(self.layers, trunk.width)
        self.adapters = nn.ModuleDict()
        for layer, count in check_adapters(adapters, self.exit_layers, self.depth).items():
            copies = [copy.deepcopy(last) for last in trunk.layers[self.depth - count :]]
            self.adapters[f"exit_{layer}"] = nn.ModuleList(copies)
        self._layer = self._through_layer
        self._head = trunk.head.__call__
        self._heads = trunk.heads
        # The module and attribute of the embedding: FSDP replaces a module's parameters.
        self._embedding = next(
            (
                (module, name)
                for module in model.modules()
                for name, weight in module.named_parameters(recurse=False)
                if weight is trunk.embedding
            ),
            None,
        )

    def compile(self, **options: Any) -> None:
        """Compiles one layer and the head (`torch.compile` with these options) instead of the whole
        pass: all layers share that code, with any choice of exits and dropped layers."""
        self._layer = torch.compile(self._through_layer, **options)
        self._head = torch.compile(self.trunk.head, **options)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        exits: Sequence[int] | None = None,
        skipped: Sequence[int] = (),
        source: Sequence[torch.Tensor] = (),
        finish: Callable[[dict[int, torch.Tensor], dict[int, torch.Tensor]], Any] | None = None,
        prompts: torch.Tensor | None = None,
        kept: Mapping[int, torch.Tensor] | None = None,
        over: Sequence[int] | None = None,
        **inputs: torch.Tensor,
    ) -> Any:
        """Logits of exits for whole sequences, for training and as a reference.

        Args:
            input_ids: ``[batch, seq]``, no padding.
            exits: Layers whose logits to return; None: all exits and the last layer.
            skipped: Layers (1 = the first) left out of this pass (layer dropout).
            source: The encoder's output, if there is one
                (`edgeexit.export.exits.encoder_decoder.ExitEncoderDecoder.encode`).
            finish: ``finish(logits, features)`` gives what is returned instead; features are layer
                -> what the vocabulary projection takes, behind the final norm ``[batch, seq,
                width]``. Data parallel training needs modules that are trained beside the model to
                be used within this call.
            prompts: Tokens of each row's prompt ``[batch]``, which layers without attention
                summarise; None: all tokens.
            kept: What `states` gave for these tokens; the layers then do not run, only adapters do.
            over: Tokens whose logits to compute, in this order; None: all. No gradient flows into
                the head then.
            inputs: Further inputs of `embed`.

        Returns:
            Layer -> logits ``[batch, seq, vocabulary]``.
        """
        states: Iterable[tuple[int, torch.Tensor]]
        if kept is None:
            options: Any = {"exits": exits, "skipped": skipped, "source": source, **inputs}
            each = self._each_state(input_ids, prompts=prompts, **options)
            states = ((layer, state) for layer, state, _, _ in each)
        else:
            wanted = list(kept) if exits is None else exits
            self._heads = self._heads.on(input_ids.device)
            states = ((layer, self._adapted(layer, kept[layer], *source)) for layer in wanted)
        head, width, size = self.trunk.head, self.trunk.width, self.trunk.embedding.shape[0]
        short = None if over is None else head_over(head, over, width, size)
        logits, features = {}, {}
        for layer, state in states:
            logits[layer] = self._logits(state) if short is None else short(state)
            if finish is not None:
                norm = getattr(self.trunk.head, "norm", None)
                features[layer] = state if norm is None else norm(state)
        return logits if finish is None else finish(logits, features)

    def each_exit(
        self, input_ids: torch.Tensor, **options: Any
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """As `forward`, in parts: ``(layer, logits [batch, part, vocabulary], saturation [batch,
        part])``, the tokens of an exit in order. Logits of a large vocabulary take more memory than
        the layers."""
        score = Saturation()
        for layer, *states in self._each_state(input_ids, **options):
            for part, before, after in zip(
                *(state.split(_PART_TOKENS, dim=1) for state in states), strict=True
            ):
                yield layer, self._logits(part), score(before, after)

    def _each_state(
        self,
        input_ids: torch.Tensor,
        *,
        exits: Sequence[int] | None = None,
        skipped: Sequence[int] = (),
        source: Sequence[torch.Tensor] = (),
        prompts: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """At each exit: its layer, what the head takes ``[batch, seq, width]``, and the layer's
        input and output."""
        wanted = [*self.exit_layers, self.depth] if exits is None else list(exits)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.expand_as(input_ids)
        self._heads = self._heads.on(input_ids.device)
        state = self._first_state(input_ids, positions, **inputs)
        belongs = None if prompts is None else positions < prompts[:, None]
        for number in range(1, self.depth + 1):
            before = state
            if number not in skipped:
                state = self._past_layer(number, state, positions, belongs, *source)
            if number in wanted:
                yield number, self._adapted(number, state, *source), before, state

    def _adapted(self, number: int, state: torch.Tensor, *source: torch.Tensor) -> torch.Tensor:
        """What the head takes of the state ``[batch, seq, width]`` behind a layer."""
        positions = torch.arange(state.shape[1], device=state.device).expand(state.shape[:2])
        for layer in self._adapter(number):
            state = self._layer(layer, state, positions, *source)
        return state

    @torch.no_grad()
    def states(
        self, input_ids: torch.Tensor, layers: Sequence[int], **options: Any
    ) -> dict[int, torch.Tensor]:
        """States behind layers, without their exits' adapters: layer -> ``[batch, seq, width]``.
        Options: as for `forward`."""
        return {
            number: state
            for number, _, _, state in self._each_state(input_ids, exits=layers, **options)
        }

    def summaries(
        self, input_ids: torch.Tensor, prompts: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """What the adapters in place of attentions read of prompts: layer -> ``[batch, 2 + rank]``
        (`edgeexit.export.exits.skipped_attention.Pia.summary`). Arguments: as for `forward`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.expand_as(input_ids)
        belongs = None if prompts is None else positions < prompts[:, None]
        self._heads = self._heads.on(input_ids.device)
        state = self._first_state(input_ids, positions, **inputs)
        found = {}
        for number in range(1, self.depth + 1):
            if number in self.skipped.ranks:
                found[number] = self.skipped.summaries(number, state, belongs)
            state = self._past_layer(number, state, positions, belongs)
        return found

    def _first_state(
        self, input_ids: torch.Tensor, positions: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        embedded = self.embed(input_ids, **inputs)
        return embedded if self.trunk.stem is None else self.trunk.stem(embedded, positions)

    def _through(
        self,
        first: int,
        last: int,
        state: torch.Tensor,
        positions: torch.Tensor,
        belongs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The state ``[batch, seq, width]`` behind layer `last`, of that behind layer `first`.
        `belongs`: which tokens are of the prompt, bool ``[batch, seq]``; None: all."""
        for number in range(first + 1, last + 1):
            state = self._past_layer(number, state, positions, belongs)
        return state

    def _past_layer(
        self,
        number: int,
        state: torch.Tensor,
        positions: torch.Tensor,
        belongs: torch.Tensor | None,
        *source: torch.Tensor,
    ) -> torch.Tensor:
        if number in self.skipped.removed:
            return self.skipped.through(number, state, belongs)
        return self._layer(cast("CutLayer", self.layers[number - 1]), state, positions, *source)

    def _logits(self, state: torch.Tensor) -> torch.Tensor:
        return self._head(state.reshape(-1, self.trunk.width)).unflatten(0, state.shape[:2])

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[batch, seq, width]`` of token ids ``[batch, seq]``."""
        place = self._embedding
        embedding = self.trunk.embedding if place is None else getattr(*place)
        return scaled(functional.embedding(input_ids, embedding), self.trunk.embedding_scale)

    def _through_layer(
        self,
        layer: CutLayer,
        state: torch.Tensor,
        positions: torch.Tensor,
        *source: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = layer.before(state)
        return layer.after(state, causal_attention(q, k, v, self._heads, positions))

    def _adapter(self, layer: int) -> list[CutLayer]:
        """Adapter layers of the exit behind a layer; empty if it has no adapter."""
        name = f"exit_{layer}"
        return list(typed(self.adapters[name])) if name in self.adapters else []  # type: ignore[arg-type]


def typed(layers: Iterable[nn.Module]) -> Iterator[CutLayer]:
    """Layers of a trunk, with their type."""
    return (cast("CutLayer", layer) for layer in layers)


__all__ = ["DecoderPass", "typed"]
