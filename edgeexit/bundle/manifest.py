"""What a bundle says about itself: the structs of ``manifest.json`` (format 2).

Everything that runs is a `Component`: a graph with named inputs, outputs and states. A `Chain` is
components in order with the exits behind them; the program is a list of steps that run chains,
look rows up in tables and place rows of one tensor among the tokens of another. All steps share one
namespace of tensors.

Plain data. The exporter fills them in, the runtime reads them; nothing here opens a file. The
bundle on disk, with its checks, is `edgeexit.bundle.reader`. Unknown fields of a newer minor format
are ignored; ``requires`` names features that a reader must know (docs/compatibility.md).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FORMAT_MAJOR = 2
FORMAT_MINOR = 0
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Values of ``requires`` that this reader understands. Format 2.0 needs none."""

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
    "prompt": ("int64", ["batch"]),
}
"""What a graph may ask to be told, as dtype and axes of its input ``lengths/KIND``: how many tokens
of each row are cached (past), the place of each row's last new token (last = past + new - 1), the
largest number of tokens in any row, the new ones included (most), and how many of each row's new
tokens are of its prompt (prompt)."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}$")]
Axis = str | Annotated[int, Meta(ge=1, le=2**31 - 1)] | None
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
When = Literal["input", "token"]
StateForm = Literal["append", "in-place", "fixed"]


class Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the manifest's structs: defaults left out of the JSON.

    Each struct says `frozen` and `kw_only` itself: msgspec does not hand the second one down, and
    type checkers neither.
    """


class Tensor(Struct, frozen=True, kw_only=True):
    """A named tensor that enters or leaves a graph.

    `axes` gives a name for an axis of any size, a number for a fixed one, and null for one whose
    size follows from the others in a way the manifest does not say. ``batch`` counts rows, ``new``
    the tokens of a row that one run takes. `row_axis` is the axis along which rows (inputs of a
    batch) lie; null for a tensor that is the same for all rows.
    """

    name: Name
    dtype: DType
    axes: list[Axis]
    row_axis: Annotated[int, Meta(ge=0)] | None = 0


class Variant(Struct, frozen=True, kw_only=True):
    """One form of a graph, for engines that offer every feature in `requires`.

    Forms with token states differ in what they do with them: ``append`` gives what the new tokens
    add, and the runtime appends it; ``in-place`` gives the whole state, and past and present are
    one buffer; ``fixed`` does the same for engines whose capacity (the axis ``past``) is a number
    when they are built. `lengths` are the kinds (`LENGTHS`) that the graph takes besides its
    inputs.

    Features: ``onnxruntime-operators`` (operators of ONNX Runtime's own), ``opset-24`` (the
    standard ones up to that opset), ``cache-update`` (TensorScatter may write into the buffer it
    reads), ``float32-attention`` (fused attention takes float32), ``attention-bias`` (and adds a
    bias to its scores).

    `precision` is what the graph computes in; of a graph whose weights alone have 4 bits ``int4``,
    for engines choose what they multiply them in.
    """

    graph: str
    requires: list[str] = []
    precision: Literal["float32", "float16", "bfloat16", "int8", "int4"] = "float32"
    states: StateForm = "append"
    lengths: list[Literal["past", "last", "most", "prompt"]] = []


class TokenState(Struct, frozen=True, kw_only=True, tag="token"):
    """What a component keeps of every token: keys or values of a layer.

    It grows by what each run adds and has a length per row. `axes` are ``[batch, heads, past,
    size]``, of which ``past`` grows; `past` and `present` are the graph's input and output.
    """

    name: Name
    dtype: DType
    axes: list[Axis]
    past: Name
    present: Name
    row_axis: Annotated[int, Meta(ge=0)] = 0


class PromptState(Struct, frozen=True, kw_only=True, tag="prompt"):
    """What is made once for a prompt and then only read: cross keys and values, statistics of a
    prompt's states.

    `maker` names the component that makes it, before the component that reads it first runs over a
    prompt; `tensor` is the maker's output and this component's input.
    """

    tensor: Tensor
    maker: Name


class Component(Struct, frozen=True, kw_only=True):
    """A graph, in one or more variants: a segment, a head, an adapter, a gate, a maker of states.

    Its inputs are tensors that come before it by name; a component whose inputs have no axis
    ``new``, given a tensor that has one, takes chosen tokens as its rows. `projection` is a graph
    that takes the same inputs, no lengths, and gives only what the token states keep of the new
    tokens: for tokens that skip the component.
    """

    variants: Annotated[list[Variant], Meta(min_length=1)]
    inputs: list[Tensor]
    outputs: list[Tensor]
    states: list[TokenState | PromptState] = []
    projection: Variant | None = None


class Call(Struct, frozen=True, kw_only=True):
    """A component on the path of an exit. `inputs` gives a component's input -> the tensor that it
    takes, where their names differ."""

    component: Name
    inputs: dict[Name, Name] = {}


class Exit(Struct, frozen=True, kw_only=True):
    """A place where the model may answer, or let a group of tokens go.

    It stands behind the component `behind`, and is asked by running the components of `path` in
    order (an adapter, then a head; a gate). `outputs` maps each output of the chain to the tensor
    that holds it at this exit, `scores` each score to its float32 tensor ``[batch]``: outputs of
    the last component of the path, or of `behind` where there is no path. `action` is ``stop``, or
    ``drop`` for the token group `tokens`.
    """

    name: Name
    behind: Name
    outputs: dict[Name, Name] = {}
    scores: dict[Name, Name] = {}
    path: list[Call] = []
    action: Literal["stop", "drop"] = "stop"
    tokens: Name | None = None


class Chain(Struct, frozen=True, kw_only=True):
    """Components in order, and the exits behind them; the last exit always answers.

    `outputs` is what every exit that stops gives: the program's answer, or what later steps take.
    `unsplit` names the components that are the same chain without exits, for measurements; the last
    of them makes the outputs under their names. `rows` says whether rows of a batch may leave at
    different exits.
    """

    components: Annotated[list[Name], Meta(min_length=1)]
    outputs: Annotated[list[Tensor], Meta(min_length=1)]
    exits: Annotated[list[Exit], Meta(min_length=1)]
    unsplit: list[Name] = []
    rows: Literal["independent", "together"] = "independent"

    @property
    def stops(self) -> list[Exit]:
        """Exits that answer, in order; the last one always does."""
        return [exit_ for exit_ in self.exits if exit_.action == "stop"]


class Run(Struct, frozen=True, kw_only=True, tag="run"):
    """A step that runs a chain: once per request (``input``), or for a prompt and every token after
    it (``token``; only the chain that writes the text)."""

    chain: Name
    when: When = "input"


class Gather(Struct, frozen=True, kw_only=True, tag="gather"):
    """A step that looks ids up in a table: an embedding.

    The runtime gathers the rows from the weight store, where the table ``[size, width]`` of the
    output's dtype begins at byte `offset`.
    """

    ids: Name
    output: Tensor
    size: Annotated[int, Meta(ge=1)]
    offset: Annotated[int, Meta(ge=0)]
    when: When = "token"


class Place(Struct, frozen=True, kw_only=True, tag="place"):
    """A step that puts rows of one tensor ``[batch, tokens, width]`` in the place of a token
    group's tokens in another: image features among the embeddings of a prompt."""

    source: Name
    target: Name
    group: Name


Step = Run | Gather | Place


class TokenGroup(Struct, frozen=True, kw_only=True):
    """Tokens of a prompt that something else than text stands for.

    `token` is the id that marks their places. `mask` names the feed, bool ``[batch, new]``, that
    says which of the new tokens belong to the group, for components that take it.
    """

    token: Annotated[int, Meta(ge=0)]
    mask: Name | None = None


class GenerationDefaults(Struct, frozen=True, kw_only=True):
    """How tokens are chosen where the caller does not say: what a checkpoint's
    ``generation_config.json`` asks for.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave none out. Tokens that
    occurred before have positive logits divided and negative ones multiplied by
    `repetition_penalty`; those in `suppressed` are never made.
    """

    temperature: Annotated[float, Meta(ge=0)] = 0.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    suppressed: list[int] = []


class Decoding(Struct, frozen=True, kw_only=True):
    """How a program writes text token by token.

    `chain` runs for every token and gives ``token`` and ``logits``. `tokens` is the program's input
    of ids ``[batch, new]``, `positions` the int64 feed ``[batch, new]`` that says where each token
    stands. Where `start_tokens` are given, a text begins with them, and the prompt is the
    program's other input (an encoder's). `capacity` is how many tokens a text can have where nobody
    asks for another number; None: the limit ``positions``, which a model with relative positions
    does not have.
    """

    chain: Name
    tokens: Name
    positions: Tensor
    capacity: Annotated[int, Meta(ge=2)] | None = None
    start_tokens: list[int] = []
    stop_tokens: list[int] = []
    groups: dict[Name, TokenGroup] = {}
    generation: GenerationDefaults | None = None


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


class File(Struct, frozen=True, kw_only=True):
    """A file of the bundle as it was when exported."""

    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0)]


class Manifest(Struct, frozen=True, kw_only=True):
    """The whole of ``manifest.json``.

    `inputs` is what a caller gives, `outputs` what the program's last chain answers with. `limits`
    gives the largest size of a symbolic axis that the model was made for (positions of a text
    model, say); `files` lists every other file of the bundle. There is no policy in it: thresholds
    are calibrated on the bundle as it is, so they cannot be a part of it.
    """

    format: Annotated[str, Meta(pattern=r"^[0-9]{1,6}\.[0-9]{1,6}$")]
    name: str
    task: str
    inputs: Annotated[list[Tensor], Meta(min_length=1)]
    components: dict[Name, Component]
    chains: Annotated[dict[Name, Chain], Meta(min_length=1)]
    steps: Annotated[list[Step], Meta(min_length=1)]
    files: dict[str, File]
    decoding: Decoding | None = None
    limits: dict[str, int] = {}
    requires: list[str] = []
    labels: list[str] = []
    preprocessing: Preprocessing | None = None
    tokenizer: str | None = None
    chat: Chat | None = None
    samples: list[str] = []
    provenance: dict[str, str] = {}

    @property
    def last_chain(self) -> Chain:
        """The chain that answers: of the last step that runs one."""
        runs = [step.chain for step in self.steps if isinstance(step, Run)]
        return self.chains[runs[-1]]

    @property
    def outputs(self) -> list[Tensor]:
        """What the program answers with."""
        return self.last_chain.outputs


def json_schema() -> dict[str, object]:
    """JSON Schema of the manifest, as published in docs/manifest.schema.json."""
    return msgspec.json.schema(Manifest)
