"""A small decoder with exits, written as ONNX by hand: bundles in milliseconds, without torch.

Every layer adds a learnt position to what it attends with, so that a token at a wrong place is seen
everywhere, and weights are drawn wide, so that every token before the last one matters. Options of
`make_decoder_toy` add what a format of components must carry: a layer without keys and values that
reads a mean of the prompt, a gate where image tokens leave, a vision tower whose features stand at
placeholders, an encoder that the decoder attends to. `tests.decoder_reference` computes the same in
float64, from the beginning for every token.

    toy, thresholds = make_decoder_toy(gate=True, prefix=True), {"gate": 0.5, "exit_1": 0.4}
    bundle = write_decoder_toy(toy, folder / "bundle")
    rows = make_rows(toy, [9, 12])
    with load(bundle, policy=toy_policy(toy, thresholds)) as model:
        model.generate([row.prompt for row in rows], inputs=batch_inputs(rows), mode="fast")
    Reference(toy, thresholds).fast(rows[0], 10).tokens
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import (
    Call,
    Chain,
    Decoding,
    Exit,
    Gather,
    Manifest,
    Place,
    Run,
    Step,
    Tensor,
    TokenGroup,
)
from edgeexit.bundle.policy import Policy, Rule
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from tests.decoder_graphs import (
    ANSWERS,
    EMBEDDED,
    ENCODER_STATE,
    ENCODERS,
    FEATURES,
    HEAD,
    HIDDEN,
    IMAGE,
    IMAGE_FEATURES,
    IMAGE_MASK,
    LAYERS,
    MEAN,
    PIXEL_VALUES,
    PIXELS,
    POSITIONS,
    SEEN,
    SOURCE,
    SOURCE_EMBEDDED,
    SOURCE_MASK,
    START,
    STATELESS,
    VOCABULARY,
    WIDTH,
    Components,
    Store,
)
from tests.decoder_reference import Reference, Row
from tests.toys import SCORE_NAMES

TOKENS = Tensor(name="tokens", dtype="int64", axes=["batch", "new"])
SOURCE_IDS = Tensor(name="source_ids", dtype="int64", axes=["batch", "source"])


@dataclass(frozen=True)
class DecoderToy:
    """Weights of the model and how its bundle describes it.

    Attributes:
        weights: By name (`weight_shapes`), float32.
        layers: How many layers each component has.
        exits: Components behind which early exits stand; behind the last one there always is one.
        adapter: The component whose exit has an adapter: a layer with keys and values of its own.
        adapter_reads: The adapter, too, attends to what the encoder hands on.
        stateless: The third layer has no attention. It reads a vector made of the mean of the
            states of the prompt's tokens that come into it.
        own_mean: The component that reads the mean makes it in its own run.
        gate: Behind component `gate_behind` stands the exit ``gate``, where the group ``image``
            may leave.
        prefix: A chain ``vision`` with two exits makes `FEATURES` rows of an image, which stand at
            its placeholders.
        encoder: A chain ``encoder`` with three exits reads a source, and every layer with attention
            attends to what it hands on; texts begin with `START`.
        projections: Components have projections, for mode ``approximate``.
        capacity: Tokens of the longest text.
        stop_tokens: As in `edgeexit.bundle.manifest.Decoding`.
        saturated: Components compute the score ``saturation`` of every token, which decides.
    """

    weights: Mapping[str, NDArray]
    layers: tuple[int, ...] = (1,) * LAYERS
    exits: tuple[int, ...] = (0, 1)
    adapter: int | None = None
    adapter_reads: bool = False
    stateless: bool = False
    own_mean: bool = False
    gate: bool = False
    gate_behind: int = 1
    prefix: bool = False
    encoder: bool = False
    projections: bool = True
    capacity: int = 48
    saturated: bool = False
    stop_tokens: tuple[int, ...] = ()

    @property
    def score(self) -> str:
        """The score of the decoder that decides."""
        return "saturation" if self.saturated else "max_prob"

    @property
    def groups(self) -> bool:
        """Whether prompts have image tokens."""
        return self.gate or self.prefix

    def layers_of(self, number: int) -> list[int]:
        """The layers of a component."""
        first = sum(self.layers[:number])
        return list(range(first, first + self.layers[number]))

    def attends(self, layer: int) -> bool:
        """Whether a layer has keys and values."""
        return not (self.stateless and layer == STATELESS)

    def component_of(self, layer: int) -> int:
        """The component that has a layer."""
        return next(n for n in range(len(self.layers)) if layer in self.layers_of(n))

    @property
    def stops(self) -> dict[str, int]:
        """Name of every exit that answers -> the component it is behind."""
        return {f"exit_{n + 1}": n for n in (*self.exits, len(self.layers) - 1)}


def make_decoder_toy(*, seed: int = 0, **options: Any) -> DecoderToy:
    """Random weights; those of a name are the same whatever the options are.

    Args:
        options: Attributes of `DecoderToy`.
    """
    weights = {}
    for name, (scale, shape) in weight_shapes(int(options.get("capacity", 48))).items():
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        weights[name] = random.normal(0, scale, shape).astype(np.float32)
    toy = DecoderToy(weights, **options)
    assert sum(toy.layers) == LAYERS and all(n < len(toy.layers) - 1 for n in toy.exits)
    assert toy.adapter is None or toy.adapter in toy.exits
    assert not toy.adapter_reads or (toy.encoder and toy.adapter is not None)
    assert not (toy.encoder and toy.groups)  # an encoder prompts, and has no placeholders
    if toy.stateless and not toy.own_mean:  # what comes into the layer comes into a component
        assert STATELESS in [toy.layers_of(n)[0] for n in range(len(toy.layers))]
    return toy


def weight_shapes(capacity: int) -> dict[str, tuple[float, tuple[int, ...]]]:
    """Every weight: how wide it is drawn, and its shape."""
    shapes: dict[str, tuple[float, tuple[int, ...]]] = {
        "embedding": (1.4, (VOCABULARY, WIDTH)),
        "source_embedding": (1.0, (VOCABULARY, WIDTH)),
        "head": (0.9, (WIDTH, VOCABULARY)),
        "gate": (0.7, (WIDTH, 1)),
        "mean": (0.8, (WIDTH, MEAN)),
        "pixels": (0.9, (PIXELS, FEATURES * SEEN)),
        "tower": (0.9, (SEEN, SEEN)),
        "projector": (0.6, (SEEN, WIDTH)),
    }
    places = {f"layer{n}": capacity for n in range(LAYERS)} | {"adapter": capacity}
    for name, length in (places | {f"encoder{n}": SOURCE for n in range(ENCODERS)}).items():
        shapes[f"{name}/positions"] = (1.0, (length, WIDTH))
        for kind in ("", "cross_"):
            shapes |= {f"{name}/{kind}{one}": (0.6, (WIDTH, HEAD)) for one in ("query", "key")}
            shapes[f"{name}/{kind}value"] = (0.7, (WIDTH, HEAD))
            shapes[f"{name}/{kind}out"] = (0.5 if kind else 0.7, (HEAD, WIDTH))
        shapes[f"{name}/mean"] = (0.8, (MEAN, HIDDEN))
        shapes[f"{name}/up"] = (0.5, (WIDTH, HIDDEN))
        shapes[f"{name}/down"] = (0.4, (HIDDEN, WIDTH))
    return shapes


def make_rows(toy: DecoderToy, lengths: Sequence[int], *, seed: int = 1) -> list[Row]:
    """Prompts of these many tokens, with what else the toy takes for them.

    With `DecoderToy.encoder` they are lengths of sources, and every prompt is `START`. With image
    tokens every prompt of at least four tokens has one image, every one of at least ten a second;
    it ends with text.
    """
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        text = random.integers(3, VOCABULARY, length).tolist()
        images = min(2, (length + 2) // 6) if toy.groups else 0
        for place in random.choice(length - 1, images * FEATURES, replace=False) if images else ():
            text[place] = IMAGE
        pixels = random.normal(size=(images, PIXELS)).astype(np.float32) if toy.prefix else None
        if toy.encoder:
            rows.append(Row([START], np.array(text, np.int64), pixels))
        else:
            rows.append(Row(text, None, pixels))
    return rows


def batch_inputs(rows: Sequence[Row]) -> dict[str, NDArray]:
    """What the chains before the text take for these rows, as `Model.generate` wants it."""
    found: dict[str, NDArray] = {}
    sources = [row.source for row in rows if row.source is not None]
    if sources:
        longest = max(len(source) for source in sources)
        # Padding is a token that means something, so that a mask that is not kept to is seen.
        found["source_ids"] = np.full((len(sources), longest), 5, np.int64)
        found["source_mask"] = np.zeros((len(sources), longest), np.int64)
        for number, source in enumerate(sources):
            found["source_ids"][number, : len(source)] = source
            found["source_mask"][number, : len(source)] = 1
    pixels = [row.pixels for row in rows if row.pixels is not None]
    if pixels and sum(map(len, pixels)):
        found["pixel_values"] = np.concatenate(pixels)
    return found


def toy_policy(toy: DecoderToy, thresholds: Mapping[str, float], score: str = "") -> Policy:
    """The policy that `tests.decoder_reference.Reference` follows with the same arguments."""
    names = {"decoder": [*toy.stops][:-1] + ["gate"] * toy.gate}
    names |= {"vision": ["vision_1"]} if toy.prefix else {}
    names |= {"encoder": ["encoder_1", "encoder_2"]} if toy.encoder else {}
    scores = {"decoder": score or toy.score, "vision": "confidence", "encoder": "saturation"}
    rules = {
        chain: Rule(
            thresholds={name: thresholds[name] for name in own if name in thresholds},
            score=scores[chain],
        )
        for chain, own in names.items()
    }
    return Policy(rules=rules)


def write_decoder_toy(toy: DecoderToy, output: Path, *, overwrite: bool = False) -> Bundle:
    """Writes the toy as a bundle."""
    with BundleWriter(output, overwrite=overwrite) as writer:
        return writer.commit(fill_decoder_toy(toy, writer.folder))


def fill_decoder_toy(toy: DecoderToy, folder: Path) -> Manifest:
    """Writes graphs, weights and samples into `folder`; returns the manifest to commit."""
    (folder / "samples").mkdir(exist_ok=True)
    np.savez(folder / "samples/reference.npz", **_samples(toy))
    written = Components(toy, folder / "graphs")
    components = written.write()
    chains = {"decoder": _decoder_chain(toy)}
    chains |= {"vision": _vision_chain()} if toy.prefix else {}
    chains |= {"encoder": _encoder_chain()} if toy.encoder else {}
    mask = IMAGE_MASK.name if toy.gate else None
    return Manifest(
        format="2.0",
        name="decoder-toy",
        task="text-generation",
        inputs=_inputs(toy),
        components=components,
        chains=chains,
        steps=_steps(toy, written.store),
        files={},
        decoding=Decoding(
            chain="decoder",
            tokens="tokens",
            positions=POSITIONS,
            start_tokens=[START] if toy.encoder else [],
            stop_tokens=list(toy.stop_tokens),
            groups={"image": TokenGroup(token=IMAGE, mask=mask)} if toy.groups else {},
        ),
        limits={"positions": toy.capacity} | ({"source": SOURCE} if toy.encoder else {}),
        samples=["samples/reference.npz"],
    )


def _inputs(toy: DecoderToy) -> list[Tensor]:
    inputs = [TOKENS]
    inputs += [PIXEL_VALUES] if toy.prefix else []
    inputs += [SOURCE_IDS, SOURCE_MASK] if toy.encoder else []
    return inputs


def _steps(toy: DecoderToy, store: Store) -> list[Step]:
    steps: list[Step] = []
    if toy.encoder:
        offset = store.places["source_embedding"]
        ids, output = "source_ids", SOURCE_EMBEDDED
        steps.append(Gather(ids=ids, output=output, size=VOCABULARY, offset=offset, when="input"))
        steps.append(Run(chain="encoder", when="input"))
    if toy.prefix:
        steps.append(Run(chain="vision", when="input"))
    offset = store.places["embedding"]
    steps.append(Gather(ids="tokens", output=EMBEDDED, size=VOCABULARY, offset=offset))
    if toy.prefix:
        steps.append(Place(source="features", target="embedded", group="image"))
    steps.append(Run(chain="decoder", when="token"))
    return steps


def _decoder_chain(toy: DecoderToy) -> Chain:
    names = [f"s{number}" for number in range(len(toy.layers))]
    behind: list[list[Exit]] = [[] for _ in names]
    if toy.gate:
        state = {"state": f"h{toy.gate_behind}"}
        gate = Exit(
            name="gate",
            behind=names[toy.gate_behind],
            scores={"drop": "gate/score"},
            path=[Call(component="gate", inputs=state)],
            action="drop",
            tokens="image",
        )
        behind[toy.gate_behind].append(gate)
    for name, number in toy.stops.items():
        behind[number].append(_stop(toy, name, number))
    return Chain(
        components=names,
        outputs=ANSWERS,
        exits=[exit_ for own in behind for exit_ in own],
        unsplit=["unsplit"] if toy.own_mean or not toy.stateless else ["unsplit_front", "unsplit"],
    )


def _stop(toy: DecoderToy, name: str, number: int) -> Exit:
    """An exit that answers, behind a component."""
    state, path = f"h{number}", []
    own = {"saturation": f"s{number}/saturation"} if toy.saturated else {}
    if number == toy.adapter:
        path.append(Call(component="adapter", inputs={"state": state}))
        state = "adapted"
    path.append(Call(component="head", inputs={"state": state}))
    return Exit(
        name=name,
        behind=f"s{number}",
        outputs={tensor.name: f"head/{tensor.name}" for tensor in ANSWERS},
        scores={score: f"head/{score}" for score in SCORE_NAMES} | own,
        path=path,
    )


def _vision_chain() -> Chain:
    exits = [
        Exit(
            name=f"vision_{number + 1}",
            behind=f"v{number}",
            outputs={"features": "projector/features"},
            scores={"confidence": "projector/confidence"},
            path=[Call(component="projector", inputs={"state": f"seen{number}"})],
        )
        for number in range(2)
    ]
    return Chain(
        components=["v0", "v1"],
        outputs=[IMAGE_FEATURES],
        exits=exits,
        unsplit=["vision_unsplit"],
    )


def _encoder_chain() -> Chain:
    exits = [
        Exit(
            name=f"encoder_{number + 1}",
            behind=f"e{number}",
            outputs={"encoder_state": f"read{number}"},
            scores={"saturation": f"e{number}/saturation"},
        )
        for number in range(ENCODERS)
    ]
    return Chain(
        components=[f"e{number}" for number in range(ENCODERS)],
        outputs=[ENCODER_STATE],
        exits=exits,
        unsplit=["encoder_unsplit"],
    )


def _samples(toy: DecoderToy) -> dict[str, Any]:
    """What the reference says of a few texts, all of whose tokens count as their prompt."""
    rows = make_rows(toy, [9, 9, 9], seed=7)
    if toy.encoder:
        more = np.random.default_rng(8).integers(3, VOCABULARY, (3, 6)).tolist()
        rows = [
            Row([START, *text], row.source, row.pixels)
            for text, row in zip(more, rows, strict=True)
        ]
    arrays: dict[str, Any] = {"input/tokens": np.array([row.prompt for row in rows], np.int64)}
    arrays |= {f"input/{name}": value for name, value in batch_inputs(rows).items()}
    return arrays | Reference(toy).samples(rows)
