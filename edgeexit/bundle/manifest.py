"""What a bundle says about itself: the structs of ``manifest.json`` (format 1).

Plain data. The exporter fills them in, the runtime reads them; nothing here opens a file. The
bundle on disk, with its checks, is `edgeexit.bundle.reader`. Unknown fields of a newer minor format
are ignored; ``requires`` names features that a reader must know (docs/compatibility.md).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FORMAT_MAJOR = 1
FORMAT_MINOR = 1
KNOWN_FEATURES: frozenset[str] = frozenset({"decode", "adapters"})
"""Values of ``requires`` that this reader understands. Format 1.0 needs none."""

DType = Literal[
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "bool"
]
ITEM_BYTES = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
SCORES = ("max_prob", "margin", "entropy")
"""Scores that every classifying exit emits; higher = safer to stop."""
LENGTHS: dict[str, tuple[str, list[str]]] = {
    "past": ("int64", ["batch"]),
    "last": ("int32", ["batch"]),
    "most": ("int32", []),
}
"""What a graph with caches may ask to be told, as dtype and axes of its input ``lengths/KIND``: how
many tokens of each row are cached (past), the place of each row's last new token (last = past + new
- 1), and the largest number of tokens in any row, the new ones included (most)."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}$")]
Axis = str | Annotated[int, Meta(ge=1, le=2**31 - 1)] | None
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the manifest's structs: defaults left out of the JSON.

    Each struct says `frozen` and `kw_only` itself: msgspec does not hand the second one down, and
    type checkers neither.
    """


class Tensor(Struct, frozen=True, kw_only=True):
    """A named tensor that enters or leaves a graph.

    `axes` gives a name for an axis of any size, a number for a fixed one, and null for one whose
    size follows from the others in a way the manifest does not say. `row_axis` is the axis along
    which rows (inputs of a batch) lie; null for a tensor that is the same for all rows.
    """

    name: Name
    dtype: DType
    axes: list[Axis]
    row_axis: Annotated[int, Meta(ge=0)] | None = 0


class Variant(Struct, frozen=True, kw_only=True):
    """One form of a graph, for engines that offer every feature in `requires`.

    Forms with caches differ in what they do with them: ``append`` gives the new keys and values
    only, and the runtime appends them; ``in-place`` gives the whole cache, and past and present are
    one buffer; ``fixed`` does the same for engines whose capacity (the axis ``past``) is a number
    when they are built. `lengths` are the kinds (`LENGTHS`) that the graph takes besides its
    inputs.

    Features: ``onnxruntime-operators`` (operators of ONNX Runtime's own), ``opset-24`` (the
    standard ones up to that opset), ``cache-update`` (TensorScatter may write into the buffer it
    reads), ``float32-attention`` (fused attention takes float32).
    """

    graph: str
    requires: list[str] = []
    precision: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    caches: Literal["append", "in-place", "fixed"] = "append"
    lengths: list[Literal["past", "last", "most"]] = []


class Cache(Struct, frozen=True, kw_only=True):
    """Keys or values of a layer, which a segment keeps from token to token.

    `axes` names the axis that grows (``past``); `row_axis` is as in `Tensor`. `past` and `present`
    are the graph's input and output.
    """

    name: Name
    dtype: DType
    axes: list[Axis]
    past: str
    present: str
    row_axis: Annotated[int, Meta(ge=0)] = 0


class Exit(Struct, frozen=True, kw_only=True):
    """A place where the model may answer.

    `outputs` maps each program output to the tensor that holds it at this exit, `scores` maps each
    score to its float32 tensor ``[batch]``. `head` names a graph of its own in ``heads`` when
    several exits share one; then the tensors are that graph's, and `state` is the segment's output
    that it looks at. `adapter` names a part of ``heads`` that stands between the two for this exit
    alone: with caches of its own, from `state` and the positions to a state of the same form.
    `action` is ``stop``, or ``drop`` for the token group `tokens`.
    """

    name: Name
    outputs: dict[str, str]
    scores: dict[str, str]
    action: Literal["stop", "drop"] = "stop"
    tokens: str | None = None
    head: str | None = None
    state: str | None = None
    adapter: str | None = None


class Segment(Struct, frozen=True, kw_only=True):
    """The layers between two boundaries: one graph (in one or more variants), one engine.

    `projection` is a graph that takes the same inputs and gives only the new keys and values of the
    caches, all of them made from the state that comes in: for tokens that skip the segment.
    """

    name: Name
    variants: Annotated[list[Variant], Meta(min_length=1)]
    inputs: list[Tensor]
    outputs: list[Tensor]
    caches: list[Cache] = []
    exits: list[Exit] = []
    projection: Variant | None = None


class Chain(Struct, frozen=True, kw_only=True):
    """Segments run in order. `rows` says whether rows of a batch may leave at different exits."""

    segments: Annotated[list[Segment], Meta(min_length=1)]
    rows: Literal["independent", "together"] = "independent"


class ImagePreprocessing(Struct, frozen=True, kw_only=True, tag="image"):
    """Image to tensor: decode, resize, crop, scale, normalise; channels first.

    With `shortest_edge` the image is resized so that its shorter side has that many pixels and its
    centre of `height` x `width` is cut out; without it the image is resized to `height` x `width`.
    value = (pixel * scale - mean[channel]) / std[channel]
    """

    input: str
    height: Annotated[int, Meta(ge=1)]
    width: Annotated[int, Meta(ge=1)]
    mode: Literal["RGB", "L"] = "RGB"
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    shortest_edge: Annotated[int, Meta(ge=1)] | None = None
    scale: float = 1 / 255
    mean: list[float] = msgspec.field(default_factory=lambda: [0.0])
    std: list[float] = msgspec.field(default_factory=lambda: [1.0])


class TextPreprocessing(Struct, frozen=True, kw_only=True, tag="text"):
    """Text (or a pair of texts) to token ids with the bundle's tokenizer, padded to the batch."""

    max_length: Annotated[int, Meta(ge=1)]
    ids: str
    mask: str | None = None
    types: str | None = None
    pad_id: int = 0
    pad_token: str = "[PAD]"


Preprocessing = ImagePreprocessing | TextPreprocessing


class Chat(Struct, frozen=True, kw_only=True):
    """How a conversation becomes a prompt: the checkpoint's own chat templates (Jinja).

    `templates` maps a name to a file in UTF-8; ``default`` is used where none is named, and
    ``tool_use``, where there is one, when tools are given. `tokens` gives the special tokens that
    templates name: variable (``bos_token``) -> text. A reader may ignore all of it: it then
    continues texts, but cannot hold conversations.
    """

    templates: Annotated[dict[Name, str], Meta(min_length=1)]
    tokens: dict[Name, str] = {}


class Embedding(Struct, frozen=True, kw_only=True):
    """A table whose rows the runtime gathers from the weight store: token id -> row.

    `output` is what the first segment takes, ``[batch, new, width]``; `offset` is where the table
    begins in the store, ``[vocabulary, width]`` of the output's dtype.
    """

    tokens: Name
    output: Tensor
    vocabulary: Annotated[int, Meta(ge=1)]
    offset: Annotated[int, Meta(ge=0)]


class Decoding(Struct, frozen=True, kw_only=True):
    """What a ``decode`` program needs besides its chain.

    `positions` is the int64 input ``[batch, new]`` of segments that says where each token stands;
    `head` names the head that all exits share. `stop_tokens` end a text.
    """

    embedding: Embedding
    positions: Tensor
    head: Name
    stop_tokens: list[int] = []


class DefaultPolicy(Struct, frozen=True, kw_only=True):
    """The policy used when the user gives none. It carries no promise: nobody calibrated it."""

    score: str
    threshold: float | Literal["never", "always"]


class File(Struct, frozen=True, kw_only=True):
    """A file of the bundle as it was when exported."""

    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0)]


class Manifest(Struct, frozen=True, kw_only=True):
    """The whole of ``manifest.json``.

    `limits` gives the largest size of a symbolic axis that the model was made for (positions of a
    text model, say); `files` lists every other file of the bundle.
    """

    format: Annotated[str, Meta(pattern=r"^[0-9]{1,6}\.[0-9]{1,6}$")]
    name: str
    task: str
    program: Literal["forward", "decode", "encode-decode"]
    inputs: Annotated[list[Tensor], Meta(min_length=1)]
    outputs: Annotated[list[Tensor], Meta(min_length=1)]
    chains: dict[Name, Chain]
    unsplit: Annotated[list[Variant], Meta(min_length=1)]
    files: dict[str, File]
    heads: dict[Name, Segment] = {}
    decoding: Decoding | None = None
    limits: dict[str, int] = {}
    requires: list[str] = []
    labels: list[str] = []
    preprocessing: Preprocessing | None = None
    tokenizer: str | None = None
    chat: Chat | None = None
    policy: DefaultPolicy | None = None
    samples: list[str] = []
    provenance: dict[str, str] = {}


def json_schema() -> dict[str, object]:
    """JSON Schema of the manifest, as published in docs/manifest.schema.json."""
    return msgspec.json.schema(Manifest)
