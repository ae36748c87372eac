"""The sizes that an engine is built for: ranges of axes, from the user's options and the manifest.

TensorRT takes a smallest, a usual and a largest shape of every input, once per profile. The user
gives shapes of the *program's* inputs, as for trtexec or Polygraphy; the shapes of all other
tensors follow from the names of their axes. All functions are pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgeexit.bundle.manifest import Axis, Manifest, PromptState, Tensor
from edgeexit.errors import UsageError

Sizes = Mapping[str, int]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input -> smallest, usual and largest shape: a profile as TensorRT takes it."""

USUAL_ROWS, MOST_ROWS = 1, 8
"""Default rows of a batch."""
DRAFTED = 16
"""Most new tokens per row in a decoding step: drafts to verify, or tokens that waited for a
component. Steps with more tokens use the prefill profile."""

_SHAPE = re.compile(
    r"""\s*(?P<name>[A-Za-z_][A-Za-z0-9_.:/-]*?)\s*:\s*
        (?:\[(?P<list>[0-9,\s]+)\]|(?P<cross>[0-9]+(?:x[0-9]+)*))\s*(?:,|\s|$)""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of an axis."""

    min: int
    opt: int
    max: int


Ranges = Mapping[str, Range]
"""Axis -> its range: a profile, before it is applied to tensors."""


@dataclass(frozen=True)
class Asked:
    """What the user requests: smallest, usual and largest sizes of axes, and the most tokens of a
    text."""

    min: Sizes
    opt: Sizes
    max: Sizes
    capacity: int | None = None


def parse_shapes(text: str, option: str) -> dict[str, tuple[int, ...]]:
    """Reads shapes in the syntax of trtexec or Polygraphy.

    >>> parse_shapes("ids:1x128,mask:1x128", "--min-shapes")
    {'ids': (1, 128), 'mask': (1, 128)}
    >>> parse_shapes("ids:[1,128] mask:[1,128]", "--min-shapes")
    {'ids': (1, 128), 'mask': (1, 128)}

    Raises:
        UsageError: The text cannot be read, a size is 0, or a name is given twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    place = 0
    fix = f"Write {option} pixel_values:1x3x224x224 or {option} 'pixel_values:[1,3,224,224]'."
    while place < len(text):
        match = _SHAPE.match(text, place)
        if match is None:
            raise UsageError(f"{option} {text}: not a shape: {text[place:]!r}", fix=fix)
        numbers = re.findall(r"[0-9]+", match["list"] or match["cross"])
        if max(map(len, numbers), default=0) > 10:
            raise UsageError(f"{option} {text[:60]}...: a size with too many digits", fix=fix)
        shape = tuple(int(number) for number in numbers)
        if not shape or 0 in shape or max(shape) >= 1 << 31:
            raise UsageError(f"{option} {text}: {list(shape)} is not a shape", fix=fix)
        if match["name"] in shapes:
            raise UsageError(f"{option} {text}: {match['name']} is given twice", fix=fix)
        shapes[match["name"]] = shape
        place = match.end()
    if not shapes:
        raise UsageError(f"{option}: no shapes", fix=fix)
    return shapes


def axis_sizes(
    shapes: Mapping[str, Sequence[int]], tensors: Sequence[Tensor], option: str
) -> dict[str, int]:
    """Sizes of the named axes, from the shapes of a program's inputs.

    >>> ids = Tensor(name="ids", dtype="int64", axes=["batch", "seq"])
    >>> axis_sizes({"ids": (2, 128)}, [ids], "--opt-shapes")
    {'batch': 2, 'seq': 128}

    Raises:
        UsageError: There is no such input, or its axes differ.
    """
    known = {tensor.name: tensor for tensor in tensors}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise UsageError(
                f"{option}: there is no input {name!r}",
                fix=f"The bundle takes {', '.join(known)}.",
            )
        axes = known[name].axes
        if len(axes) != len(shape):
            raise UsageError(
                f"{option}: {name} has {len(axes)} axes, not {len(shape)}",
                fix=f"Its axes are {spelled(axes)}.",
            )
        for axis, size in zip(axes, shape, strict=True):
            expected = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            if expected is not None and expected != size:
                given = "x".join(map(str, shape))
                if isinstance(axis, int):
                    what = f"{name} is {given}, but its axes are {spelled(axes)}"
                else:
                    what = f"{name} is {given}, but {axis} is {expected} elsewhere"
                raise UsageError(
                    f"{option}: {what}",
                    fix="Axes with a number have that size; axes with the same name have the same "
                    "size.",
                )
    return sizes


def spelled(axes: Sequence[Axis]) -> str:
    """Axes as text, for messages.

    >>> spelled(["batch", 3, None])
    'batch x 3 x ?'
    """
    return " x ".join("?" if axis is None else str(axis) for axis in axes)


def usual_ranges(manifest: Manifest, asked: Asked, sample: Sizes) -> dict[str, Range]:
    """The range of every named axis of a program's inputs, and of inner axes with a limit.

    By default, an axis ranges from 1 to the model's limit (batch: `MOST_ROWS` rows), and its usual
    size is that of the sample (batch: one row). For an axis without a limit, the user must give the
    largest size.

    Raises:
        UsageError: A size is missing or exceeds the model's limit, or smallest, usual and largest
            are not in that order.
    """
    axes = [axis for tensor in manifest.inputs for axis in tensor.axes]
    inner = {axis for tensor in _component_inputs(manifest) for axis in tensor.axes}
    axes += [axis for axis in manifest.limits if axis in inner]
    ranges = {}
    for axis in dict.fromkeys(axes):
        if isinstance(axis, str):
            ranges[axis] = _range(axis, manifest.limits.get(axis), asked, sample)
    return ranges


def _component_inputs(manifest: Manifest) -> Iterator[Tensor]:
    for component in manifest.components.values():
        yield from component.inputs
        yield from (state.tensor for state in component.states if isinstance(state, PromptState))


def _range(axis: str, limit: int | None, asked: Asked, sample: Sizes) -> Range:
    """The range of one axis."""
    largest = asked.max.get(axis, MOST_ROWS if axis == "batch" else limit)
    if largest is None:
        raise UsageError(
            f"the bundle gives no limit for the axis {axis}",
            fix="Give the largest shapes: --max-shapes INPUT:SIZExSIZE.",
        )
    if axis == "batch" and axis not in asked.max:
        largest = max(largest, asked.opt.get(axis, 1), asked.min.get(axis, 1))
    if limit is not None and largest > limit:
        raise UsageError(
            f"--max-shapes: {axis} is {largest}, the model takes at most {limit}",
            fix=f"Give at most {limit}.",
        )
    smallest = asked.min.get(axis, 1)
    usual = USUAL_ROWS if axis == "batch" else sample.get(axis, largest)
    usual = asked.opt.get(axis, min(max(usual, smallest), largest))
    if not smallest <= usual <= largest:
        raise UsageError(
            f"{axis}: smallest {smallest}, usual {usual} and largest {largest} are not in order",
            fix="Use --min-shapes <= --opt-shapes <= --max-shapes.",
        )
    return Range(smallest, usual, largest)


def row_buckets(rows: Range) -> list[Range]:
    """Row counts in buckets up to 2, 4, 8, ..., for libraries that tune: the best kernels differ
    between one row and many, and a batch shrinks as rows stop.

    The first bucket is tuned for one row but accepts two: a bucket of exactly one row has its own
    weights in the plan, which doubles its size (seen with TensorRT-RTX 1.7). The other buckets
    share weights.

    >>> [(rows.min, rows.opt, rows.max) for rows in row_buckets(Range(1, 1, 12))]
    [(1, 1, 2), (3, 4, 4), (5, 8, 8), (9, 12, 12)]
    """
    buckets, smallest = [], rows.min
    while smallest <= rows.max:
        largest = min(rows.max, max(2, 1 << (smallest - 1).bit_length()))
        buckets.append(Range(smallest, 1 if smallest == 1 else largest, largest))
        smallest = largest + 1
    return buckets


def few_or_many(rows: Range) -> list[Range]:
    """The first bucket of `row_buckets`, and the others merged into one: for components that have
    profiles for other axes, too.

    >>> [(rows.min, rows.opt, rows.max) for rows in few_or_many(Range(1, 1, 8))]
    [(1, 1, 2), (3, 8, 8)]
    """
    first, *others = row_buckets(rows)
    return [first, *([Range(others[0].min, rows.max, rows.max)] if others else [])]


def decode_profiles(
    rows: Range, buckets: Sequence[Range], chunk: int, capacity: int
) -> list[dict[str, Range]]:
    """The profiles of a component that runs for every token: decoding steps (few new tokens after
    a long past) for each bucket of rows, and prefill (many new tokens).

    They are separate because kernels are tuned for the usual size.
    """
    past = Range(1, max(1, capacity // 2), capacity)
    step = min(DRAFTED, capacity)
    profiles = [{"batch": own, "new": Range(1, 1, step), "past": past} for own in buckets]
    if chunk > step:
        profiles.append({"batch": rows, "new": Range(1, chunk, chunk), "past": past})
    return profiles


def shapes_of(tensors: Mapping[str, Sequence[Axis]], ranges: Ranges, where: str) -> Shapes:
    """A profile as TensorRT takes it: shapes of the inputs that have an axis without a fixed size.

    Args:
        tensors: Input -> its axes.
        ranges: Range of every named axis.
        where: Name of the component, for errors.

    Raises:
        UsageError: An axis has neither a fixed size nor a name with a range.
    """
    shapes: Shapes = {}
    for name, axes in tensors.items():
        if all(isinstance(axis, int) for axis in axes):
            continue
        low, usual, high = [], [], []
        for axis in axes:
            if axis is None or (isinstance(axis, str) and axis not in ranges):
                raise UsageError(
                    f"{where}: the bundle gives no limit for the axis {axis or '?'} of {name} "
                    f"({spelled(axes)})",
                    fix="Export with fixed sizes, or run this bundle with ONNX Runtime.",
                )
            own = Range(axis, axis, axis) if isinstance(axis, int) else ranges[axis]
            low.append(own.min)
            usual.append(own.opt)
            high.append(own.max)
        shapes[name] = (tuple(low), tuple(usual), tuple(high))
    return shapes


__all__ = [
    "Asked", "Range", "Ranges", "Shapes", "axis_sizes", "decode_profiles", "few_or_many",
    "parse_shapes", "row_buckets", "shapes_of", "spelled", "usual_ranges",
]  # fmt: skip
