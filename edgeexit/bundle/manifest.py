"""The manifest of a bundle: the structs of ``manifest.json`` (format 2).

Everything that runs is a `Component`: a graph with named inputs, outputs and states. A `Chain` is
components in order with the exits behind them. The program is a list of steps that run chains,
look up rows in tables and place rows of one tensor among the tokens of another. All steps share one
namespace of tensors.

The structs are plain data: the exporter writes them, the runtime reads them, and nothing here opens
a file (see `edgeexit.bundle.reader`). Readers ignore unknown fields of a newer minor format;
``requires`` names features that a reader must support (docs/compatibility.md).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeexit.bundle.raw_inputs import AudioPreprocessing as AudioPreprocessing
from edgeexit.bundle.raw_inputs import Chat as Chat
from edgeexit.bundle.raw_inputs import ImagePreprocessing as ImagePreprocessing
from edgeexit.bundle.raw_inputs import ImageText as ImageText
from edgeexit.bundle.raw_inputs import Name as Name
from edgeexit.bundle.raw_inputs import Preprocessing as Preprocessing
from edgeexit.bundle.raw_inputs import TextPreprocessing as TextPreprocessing
from edgeexit.bundle.raw_inputs import Tiles as Tiles
from edgeexit.bundle.special_tokens import StartChoice as StartChoice
from edgeexit.bundle.special_tokens import Timestamps as Timestamps

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
"""Dtype and axes of the optional graph inputs ``lengths/KIND``. past: number of cached tokens of
each row. last: position of each row's last new token (past + new - 1). most: largest number of
tokens in any row, new ones included. prompt: how many of each row's new tokens belong to its
prompt."""

Axis = str | Annotated[int, Meta(ge=1, le=2**31 - 1)] | None
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
When = Literal["input", "token"]
StateForm = Literal["append", "in-place", "fixed"]


class Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the manifest's structs. The JSON omits defaults.

    Each struct repeats `frozen` and `kw_only`: neither msgspec nor type checkers inherit `kw_only`.
    """


class Tensor(Struct, frozen=True, kw_only=True):
    """A named input or output of a graph.

    `axes` has a name for an axis of any size, a number for a fixed axis, and null for an axis whose
    size depends on the others in a way that the manifest does not state. ``batch`` is the number of
    rows, ``new`` the number of tokens per row in one run. `row_axis` is the index of the row
    (batch) axis; null for a tensor that all rows share.
    """

    name: Name
    dtype: DType
    axes: list[Axis]
    row_axis: Annotated[int, Meta(ge=0)] | None = 0


class Variant(Struct, frozen=True, kw_only=True):
    """One form of a graph, for engines that offer every feature in `requires`.

    `states` says how the graph updates token states. ``append``: it outputs the entries of the new
    tokens, and the runtime appends them. ``in-place``: it outputs the whole state; past and present
    share a buffer. ``fixed``: like ``in-place``, for engines that fix the capacity (the axis
    ``past``) when they are built. `lengths` are the kinds (`LENGTHS`) that the graph takes besides
    its inputs.

    Features: ``onnxruntime-operators`` (operators of ONNX Runtime's own), ``blocked-weights``
    (DequantizeLinear of opset 21 with unsigned numbers of 4 or 8 bits in blocks), ``opset-24`` (the
    standard operators up to that opset), ``cache-update`` (TensorScatter may write into the buffer
    that it reads), ``float32-attention`` (fused attention takes float32), ``attention-bias`` (fused
    attention adds a bias to its scores).

    `precision` is the precision that the graph computes in. It is ``int4`` for a graph with 4-bit
    weights; the engine chooses the precision of their products.
    """

    graph: str
    requires: list[str] = []
    precision: Literal["float32", "float16", "bfloat16", "int8", "int4"] = "float32"
    states: StateForm = "append"
    lengths: list[Literal["past", "last", "most", "prompt"]] = []


class TokenState(Struct, frozen=True, kw_only=True, tag="token"):
    """A state that a component keeps for every token: keys or values of a layer.

    Each run adds entries for its new tokens; each row has its own length. `axes` are ``[batch,
    heads, past, size]``, of which ``past`` grows. `past` and `present` name the graph's input and
    output.
    """

    name: Name
    dtype: DType
    axes: list[Axis]
    past: Name
    present: Name
    row_axis: Annotated[int, Meta(ge=0)] = 0


class PromptState(Struct, frozen=True, kw_only=True, tag="prompt"):
    """A state that is computed once for a prompt and then only read: cross keys and values,
    statistics of a prompt's states.

    The component `maker` computes it before this component first runs on a prompt. `tensor` is the
    maker's output and this component's input.

    With `made`, the maker is this component itself: its graph takes ``lengths/prompt`` and outputs
    `made`, the state of rows that have prompt tokens in this run, and what it was given for others.
    """

    tensor: Tensor
    maker: Name
    made: Name | None = None


class Component(Struct, frozen=True, kw_only=True):
    """A graph, in one or more variants: a segment, a head, an adapter, a gate, a maker of states.

    Its inputs are earlier tensors, by name. If its inputs have no axis ``new`` and it receives a
    tensor that has one, selected tokens become its rows. `projections` are forms of a graph for
    tokens that skip the component: it takes the same inputs without lengths and outputs only the
    token states of the new tokens. On the path of an exit these are what the component itself would
    give.
    """

    variants: Annotated[list[Variant], Meta(min_length=1)]
    inputs: list[Tensor]
    outputs: list[Tensor]
    states: list[TokenState | PromptState] = []
    projections: list[Variant] = []


class Call(Struct, frozen=True, kw_only=True):
    """A component on the path of an exit. `inputs` maps inputs of the component to tensors whose
    names differ."""

    component: Name
    inputs: dict[Name, Name] = {}


class Exit(Struct, frozen=True, kw_only=True):
    """A place where the model may answer, or drop a group of tokens.

    The exit follows the component `behind`; the components of `path` (an adapter, then a head; a
    gate) compute its answer in order. `outputs` maps each output of the chain to its tensor at this
    exit, `scores` each score to its float32 tensor ``[batch]``. These tensors are outputs of the
    last component of the path, or of `behind` if the path is empty. In a chain that runs once per
    request, scores may be outputs of `behind` although there is a path, which then runs only where
    rows stop. `action` is ``stop``, or ``drop`` for the token group `tokens`. An exit that drops
    has one score; or neither path nor score: it drops whenever the policy allows it.
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

    Every exit that stops gives `outputs`: the program's answer, or inputs of later steps.
    `unsplit` names components that compute the same chain without exits, for measurements; the last
    of them gives the outputs under the same names. `rows` says whether rows of a batch may take
    different exits.
    """

    components: Annotated[list[Name], Meta(min_length=1)]
    outputs: Annotated[list[Tensor], Meta(min_length=1)]
    exits: Annotated[list[Exit], Meta(min_length=1)]
    unsplit: list[Name] = []
    rows: Literal["independent", "together"] = "independent"

    @property
    def stops(self) -> list[Exit]:
        """The exits that answer, in order; the last exit always answers."""
        return [exit_ for exit_ in self.exits if exit_.action == "stop"]


class Run(Struct, frozen=True, kw_only=True, tag="run"):
    """A step that runs a chain: once per request (``input``), or for the prompt and every later
    token (``token``; only the chain that writes the text)."""

    chain: Name
    when: When = "input"


class TableBlocks(Struct, frozen=True, kw_only=True):
    """How a table in 4 or 8 bits is stored (`edgeexit.bundle.blocks`).

    Its numbers are uint8 ``[size, blocks, block * bits / 8]``. At byte `scales` of the weight store
    begin scales, float32 ``[size, blocks]``, at byte `zero_points` zero points, uint8 ``[size,
    blocks * bits / 8]``; null: half of the range. `block` divides the width of a row.
    """

    bits: Literal[4, 8]
    block: Annotated[int, Meta(ge=2)]
    scales: Annotated[int, Meta(ge=0)]
    zero_points: Annotated[int, Meta(ge=0)] | None = None


class Gather(Struct, frozen=True, kw_only=True, tag="gather"):
    """A step that looks up ids in a table: an embedding.

    The runtime gathers the rows from the weight store, where the table ``[size, width]`` of the
    output's dtype begins at byte `offset`; with `blocks`, the table's numbers.
    """

    ids: Name
    output: Tensor
    size: Annotated[int, Meta(ge=1)]
    offset: Annotated[int, Meta(ge=0)]
    blocks: TableBlocks | None = None
    when: When = "token"


class Place(Struct, frozen=True, kw_only=True, tag="place"):
    """A step that replaces the tokens of a token group in one tensor with rows of another
    ``[batch, tokens, width]``: image features among the embeddings of a prompt."""

    source: Name
    target: Name
    group: Name


Step = Run | Gather | Place


class TokenGroup(Struct, frozen=True, kw_only=True):
    """Placeholder tokens of a prompt, which are replaced with other data than text.

    `token` is the id of the placeholder. `mask` names the feed, bool ``[batch, new]``, that marks
    the new tokens of the group for components that take it. `image` says how a prompt is written if
    the data are images.
    """

    token: Annotated[int, Meta(ge=0)]
    mask: Name | None = None
    image: ImageText | None = None


class GenerationDefaults(Struct, frozen=True, kw_only=True):
    """Default sampling settings, from the checkpoint's ``generation_config.json``.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 exclude no token. For tokens
    that occurred before, `repetition_penalty` divides positive logits and multiplies negative ones.
    Tokens in `suppressed` are never chosen, those in `suppressed_first` not as the first token.
    """

    temperature: Annotated[float, Meta(ge=0)] = 0.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    suppressed: list[int] = []
    suppressed_first: list[int] = []


class Decoding(Struct, frozen=True, kw_only=True):
    """How a program writes text token by token.

    `chain` runs for every token and gives ``token`` and ``logits``. `tokens` is the program's input
    of ids ``[batch, new]``, `positions` the int64 feed ``[batch, new]`` with each token's position.
    With `start_tokens`, the prompt is the program's other input (an encoder's), and a text begins
    with them: the first is not part of the result, the others are its first tokens. Behind a single
    start token stand those of `choices`, in order, and the token of `timestamps` for a text without
    times; none of them is part of the result. `capacity` is the default for the largest number of
    tokens of a text; None: the limit ``positions``, which a model with relative positions does not
    have.
    """

    chain: Name
    tokens: Name
    positions: Tensor
    capacity: Annotated[int, Meta(ge=2)] | None = None
    start_tokens: list[int] = []
    choices: dict[Name, StartChoice] = {}
    timestamps: Timestamps | None = None
    stop_tokens: list[int] = []
    groups: dict[Name, TokenGroup] = {}
    generation: GenerationDefaults | None = None


class File(Struct, frozen=True, kw_only=True):
    """A file of the bundle as it was when exported."""

    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0)]


class Manifest(Struct, frozen=True, kw_only=True):
    """The whole of ``manifest.json``.

    `inputs` are the program's inputs, `outputs` the outputs of its last chain. `limits` maps a
    symbolic axis to the largest size that the model supports (positions of a text model, for
    example). `files` lists every other file of the bundle. The manifest has no policy: thresholds
    are calibrated on a finished bundle.
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
    preprocessing: list[Preprocessing] = []
    tokenizer: str | None = None
    chat: Chat | None = None
    samples: list[str] = []
    provenance: dict[str, str] = {}

    @property
    def last_chain(self) -> Chain:
        """The chain that answers: that of the last `Run` step."""
        runs = [step.chain for step in self.steps if isinstance(step, Run)]
        return self.chains[runs[-1]]

    @property
    def vision_chain(self) -> str | None:
        """Name of the chain that makes image tokens, whose exits are named ``tower_exit_LAYER``;
        None: there is none."""
        for name, chain in self.chains.items():
            if any(exit_.name.startswith("tower_exit_") for exit_ in chain.stops):
                return name
        return None

    @property
    def image_preprocessing(self) -> ImagePreprocessing | None:
        """How images become an input, if the bundle says so."""
        return next((p for p in self.preprocessing if isinstance(p, ImagePreprocessing)), None)

    @property
    def audio_preprocessing(self) -> AudioPreprocessing | None:
        """How sounds become an input, if the bundle says so."""
        return next((p for p in self.preprocessing if isinstance(p, AudioPreprocessing)), None)

    @property
    def text_preprocessing(self) -> TextPreprocessing | None:
        """How texts become inputs, if the bundle says so; prompts need only the tokenizer."""
        return next((p for p in self.preprocessing if isinstance(p, TextPreprocessing)), None)

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs of the program."""
        return self.last_chain.outputs


def json_schema() -> dict[str, object]:
    """JSON Schema of the manifest, as published in docs/manifest.schema.json."""
    return msgspec.json.schema(Manifest)
