"""States of a model's layers, computed once and kept on disk, to train adapters on.

A frozen model says the same of a text in every epoch. `keep_states` lets it read all texts once and
writes what adapters and their loss need: the states in front of the adapters and behind the last
layer, and what an encoder gave. Training then runs the adapters and the head alone
(`edgeexit.export.methods.adapters.AdapterDistillation`).

    kept = keep_states(model, batches, "states")
    ExitTrainer(model, AdapterDistillation(), arguments, train_dataset=kept, data_collator=collate)
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.encoder_decoder import ENCODED, READ, ExitEncoderDecoder
from edgeexit.export.methods.method import IGNORED, Batch
from edgeexit.export.methods.sources import decoder_batch, has_states, state_column

logger = logging.getLogger(__name__)

Row = dict[str, torch.Tensor]
TEXT, LABELS, MASK = "input_ids", "labels", "attention_mask"


def keep_states(
    model: ExitDecoder,
    batches: Iterable[Batch],
    folder: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
) -> KeptStates:
    """Lets a model read texts, and keeps its states in float16, a file for each batch. Files that
    are there already, of the same texts, are not computed again.

    Args:
        model: It stays as it is, and so must its layers during the training; it is put into eval
            mode.
        batches: As for the training, padded on the right.
        folder: Is created. A token takes 2 bytes per layer and width.
        layers: Layers behind which states are kept; None: those with an adapter. States behind the
            last layer are always kept.

    Raises:
        UsageError: There is no batch, a batch is none of this model, or states exceed float16.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sorted({*(model.adapter_sizes if layers is None else layers), model.depth})
    device = next(model.parameters()).device
    model.eval()
    of = f"{wanted} of {_fingerprint(model)}"
    names = []
    for number, batch in enumerate(batches):
        path = folder / f"{number:06}.safetensors"
        names.append(path)
        known = _digest(batch, of)
        if not _holds(path, known):
            rows = _read(model, {n: t.to(device) for n, t in batch.items()}, wanted)
            _write(path, rows, known)
        if number % 20 == 0:
            logger.info("states of %d batches are kept in %s", number + 1, folder)
    if not names:
        raise UsageError(
            "keep_states: there is no batch",
            fix="Give batches of texts, as a torch DataLoader with your data collator makes them.",
        )
    return KeptStates(names)


class KeptStates(Dataset[Row]):
    """Rows of texts with a model's states, one text each: token ids or labels ``[seq]``, and
    ``state_N`` ``[seq, width]``, float16; `collate` makes batches of them.

    Args:
        paths: The files of `keep_states`.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._rows: list[tuple[Path, int]] = []
        for path in paths:
            with safe_open(path, "pt") as file:
                self._rows += [(path, row) for row in range(int(file.metadata()["rows"]))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        path, row = self._rows[number]
        with safe_open(path, "pt") as file:
            own = [name for name in file.keys() if name.startswith(f"{row}/")]  # noqa: SIM118
            return {name.partition("/")[2]: file.get_tensor(name) for name in own}


def collate(rows: Sequence[Row]) -> Row:
    """A batch of rows, padded on the right; states become float32."""
    batch = {}
    for name in rows[0]:
        fill = IGNORED if name == LABELS else 0
        values = [row[name].float() if row[name].is_floating_point() else row[name] for row in rows]
        batch[name] = pad_sequence(values, batch_first=True, padding_value=fill)
    if TEXT in batch:
        lengths = torch.tensor([len(row[TEXT]) for row in rows])
        batch[MASK] = (torch.arange(batch[TEXT].shape[1]) < lengths[:, None]).long()
    return batch


def kept_of(batch: Batch, layers: Sequence[int], length: int) -> dict[int, torch.Tensor] | None:
    """The states of a batch, for `DecoderPass.forward`; None: it has none.

    Args:
        batch: With the column ``state_N`` ``[batch, seq, width]`` of every layer, or of none.
        layers: Those that the training needs.
        length: Tokens that the model reads of each row.

    Raises:
        UsageError: Some layers' states are missing, or they are of other texts.
    """
    if not has_states(batch):
        return None
    found = {}
    for layer in layers:
        state = batch.get(state_column(layer))
        if state is None or state.shape[1] < length:
            what = "no" if state is None else f"{list(state.shape)} of"
            raise UsageError(
                f"training: a batch has {what} {state_column(layer)} for texts of {length} tokens",
                fix="Keep states with keep_states and this model, with all its adapters.",
            )
        found[layer] = state[:, :length]
    return found


@torch.no_grad()
def _read(model: ExitDecoder, batch: Batch, layers: Sequence[int]) -> list[Row]:
    """Rows of a batch with its states."""
    tokens, targets, others = decoder_batch(model, batch, None)
    source: tuple[torch.Tensor, ...] = ()
    if isinstance(model, ExitEncoderDecoder):
        others["source"] = source = model.source_of(others.pop("columns"))
    states = model.states(tokens, layers, **others)
    for layer, state in states.items():
        if not float(state.abs().max()) < torch.finfo(torch.float16).max:
            raise UsageError(
                f"keep_states: states behind layer {layer} exceed what float16 holds",
                fix="Train on texts instead, without keep_states.",
            )
    rows = []
    for row, counted in enumerate(targets != IGNORED):
        length = int(counted.nonzero().max()) + 1 if bool(counted.any()) else 0
        own = {state_column(layer): state[row, :length].half() for layer, state in states.items()}
        labels = targets[row, :length]
        if source:
            own |= {LABELS: labels, ENCODED: source[0][row].half()}
            own |= {READ: source[1][row]} if len(source) > 1 else {}
        else:
            own[TEXT] = batch[TEXT][row, : length + 1]
            own[LABELS] = torch.cat([labels.new_full((1,), IGNORED), labels])
        rows.append(own)
    return rows


def _write(path: Path, rows: Sequence[Row], known: str) -> None:
    named = {
        f"{number}/{name}": value.contiguous().cpu()
        for number, row in enumerate(rows)
        for name, value in row.items()
    }
    partial = path.with_suffix(".partial")
    save_file(named, partial, {"rows": str(len(rows)), "of": known})
    partial.replace(path)


def _holds(path: Path, known: str) -> bool:
    """Whether a file is there, complete, of the same model and texts."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            return bool(file.metadata().get("of") == known)
    except SafetensorError:
        return False


def _digest(batch: Batch, of: str) -> str:
    """Tells batches from each other. `of`: the model and its layers."""
    found = zlib.crc32(of.encode())
    for name in sorted(batch):
        found = zlib.crc32(name.encode() + batch[name].cpu().numpy().tobytes(), found)
    return f"{found:08x}"


def _fingerprint(model: ExitDecoder) -> str:
    """Tells models from each other, by their frozen weights."""
    weights = (p for name, p in model.named_parameters() if not name.startswith("adapters."))
    return str([float(weight.detach().double().abs().sum()) for weight in weights])


__all__ = ["KeptStates", "collate", "keep_states", "kept_of"]
