"""Small multi-exit models as users export them: several logits outputs in one ONNX file."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

TEXT_EXITS = ["exit_1", "exit_2", "logits"]
IMAGE_EXITS = ["early", "middle", "final"]


class TextLayer(nn.Module):
    """Self-attention as BERT writes it (view, transpose), and a feed-forward block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm_1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm_2 = nn.LayerNorm(width)

    def forward(self, state: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, seq, width = state.shape

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = (
            split(self.query(state)),
            split(self.key(state)),
            split(self.value(state)),
        )
        weights = (query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5 + mask).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, seq, width)
        state = self.norm_1(state + self.out(mixed))
        return self.norm_2(state + self.down(torch.relu(self.up(state))))


class TextModel(nn.Module):
    """Token ids and a mask to logits behind each of three layers."""

    def __init__(self, vocabulary: int = 500, width: int = 32, classes: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(64, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(TextLayer(width, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(3))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        positions = torch.arange(input_ids.shape[1])
        state = self.norm(self.tokens(input_ids) + self.positions(positions)[None])
        mask = (1 - attention_mask[:, None, None, :].to(state.dtype)) * -1e4
        found = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            state = layer(state, mask)
            found.append(head(torch.tanh(state[:, 0])))
        return tuple(found)


class ImageModel(nn.Module):
    """A convolutional classifier with a pooled head behind each of three stages."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        widths = [3, 8, 16, 16]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, stride=2), nn.BatchNorm2d(after), nn.ReLU()
            )
            for before, after in itertools.pairwise(widths)
        )
        self.heads = nn.ModuleList(nn.Linear(width, classes) for width in widths[1:])

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, found = pixels, []
        for stage, head in zip(self.stages, self.heads, strict=True):
            state = stage(state)
            found.append(head(state.mean((2, 3))))
        return tuple(found)


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files made once for all tests of this folder."""
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="session", params=["dynamo", "torchscript"])
def text_onnx(request: pytest.FixtureRequest, onnx_folder: Path) -> Path:
    """The text model, written by torch's newer and by its older exporter."""
    torch.manual_seed(0)
    path = onnx_folder / f"text_{request.param}.onnx"
    export_text(TextModel().eval(), path, dynamo=request.param == "dynamo")
    return path


@pytest.fixture(scope="session", params=["dynamo", "torchscript"])
def image_onnx(request: pytest.FixtureRequest, onnx_folder: Path) -> Path:
    """The image model, written by torch's newer and by its older exporter."""
    torch.manual_seed(0)
    path = onnx_folder / f"image_{request.param}.onnx"
    model = ImageModel().eval()
    with quiet():
        if request.param == "dynamo":
            torch.onnx.export(
                model,
                (torch.randn(2, 3, 16, 16),),
                path,
                dynamo=True,
                opset_version=20,
                input_names=["pixels"],
                output_names=IMAGE_EXITS,
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                verbose=False,
            )
        else:
            torch.onnx.export(
                model,
                (torch.randn(2, 3, 16, 16),),
                path,
                dynamo=False,
                opset_version=14,
                input_names=["pixels"],
                output_names=IMAGE_EXITS,
                dynamic_axes={name: {0: "n"} for name in ["pixels", *IMAGE_EXITS]},
            )
    return path


def export_text(model: nn.Module, path: Path, *, dynamo: bool, external_data: bool = False) -> None:
    """Writes a text model with a dynamic batch and sequence."""
    example = (torch.randint(0, 500, (2, 5)), torch.ones(2, 5, dtype=torch.int64))
    names = ["input_ids", "attention_mask"]
    with quiet():
        if dynamo:
            dims = {
                0: torch.export.Dim("rows", min=1),
                1: torch.export.Dim("tokens", min=1, max=64),
            }
            torch.onnx.export(
                model,
                example,
                path,
                dynamo=True,
                opset_version=20,
                input_names=names,
                output_names=TEXT_EXITS,
                dynamic_shapes=(dims, dims),
                external_data=external_data,
                verbose=False,
            )
        else:
            axes = {name: {0: "rows", 1: "tokens"} for name in names}
            torch.onnx.export(
                model,
                example,
                path,
                dynamo=False,
                opset_version=17,
                input_names=names,
                output_names=TEXT_EXITS,
                dynamic_axes=axes | {name: {0: "rows"} for name in TEXT_EXITS},
            )


@contextlib.contextmanager
def quiet():
    """Silences torch's exporters."""
    logging.getLogger("torch.onnx").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
