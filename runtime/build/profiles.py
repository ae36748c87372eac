"""Which sizes an engine is built for: ranges of axes, from what the user asks and the bundle knows.

TensorRT takes a smallest, a usual and a largest shape of every input, once per profile. The user
gives shapes of the *program's* inputs, as for trtexec or Polygraphy; the shapes of all other
tensors follow from the names of their axes. Everything here is a pure function.
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
"""Rows of a batch where the user gives none."""
DRAFTED = 16
"""New tokens per row that a step of decoding takes at most: drafts under verification, or tokens
that waited for a component. Steps with more tokens use the profile of prefill."""

_ONE = re.compile(
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
"""Axis -> its range: a profile, whatever the tensors."""


@dataclass(frozen=True)
class Asked:
    """What the user asks for: smallest, usual and largest sizes of axes, and the most tokens of a
    text."""

    min: Sizes
    opt: Sizes
    max: Sizes
    capacity: int | None = None


def parse_shapes(text: str, option: str) -> dict[str, tuple[int, ...]]:
    """Reads shapes as trtexec or Polygraphy spell them.

    >>> parse_shapes("ids:1x128,mask:1x128", "--min-shapes")
    {'ids': (1, 128), 'mask': (1, 128)}
    >>> parse_shapes("ids:[1,128] mask:[1,128]", "--min-shapes")
    {'ids': (1, 128), 'mask': (1, 128)}

    Raises:
        UsageError: The text cannot be read, a size is 0, or a name is given twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    place = 0
    fix = f"Spell it {option} pixel_values:1x3x224x224 or {option} 'pixel_values:[1,3,224,224]'."
    while place < len(text):
        one = _ONE.match(text, place)
        if one is None:
            raise UsageError(f"{option} {text}: not a shape: {text[place:]!r}", fix=fix)
        numbers = re.findall(r"[0-9]+", one["list"] or one["cross"])
        if max(map(len, numbers), default=0) > 10:
            raise UsageError(f"{option} {text[:60]}...: a size with too many digits", fix=fix)
        shape = tuple(int(number) for number in numbers)
        if not shape or 0 in shape or max(shape) >= 1 << 31:
            raise UsageError(f"{option} {text}: {list(shape)} is not a shape", fix=fix)
        if one["name"] in found:
            raise UsageError(f"{option} {text}: {one['name']} is given twice", fix=fix)
        found[one["name"]] = shape
        place = one.end()
    if not found:
        raise UsageError(f"{option}: no shapes", fix=fix)
    return found


def axis_sizes(
    shapes: Mapping[str, Sequence[int]], tensors: Sequence[Tensor], option: str
) -> dict[str, int]:
    """Sizes of the named axes, from shapes of a program's inputs.

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
                fix=f"They are {spelled(axes)}.",
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
                    fix="Numbers there are fixed, and axes of one name have one size.",
                )
    return sizes


def spelled(axes: Sequence[Axis]) -> str:
    """Axes as a user reads them.

    >>> spelled(["batch", 3, None])
    'batch x 3 x ?'
    """
    return " x ".join("?" if axis is None else str(axis) for axis in axes)


def usual_ranges(manifest: Manifest, asked: Asked, sample: Sizes) -> dict[str, Range]:
    """The range of every named axis of a program's inputs, and of the axes inside that the model
    has a limit for.

    Where the user gives nothing, an axis goes from 1 to the model's limit (`MOST_ROWS` rows), and
    its usual size is that of the sample (one row). The user must give an axis without a limit.

    Raises:
        UsageError: A size is missing or exceeds the model's limit, or smallest, usual and largest
            are not in that order.
    """
    axes = [axis for tensor in manifest.inputs for axis in tensor.axes]
    inner = {axis for tensor in _component_inputs(manifest) for axis in tensor.axes}
    axes += [axis for axis in manifest.limits if axis in inner]
    found = {}
    for axis in dict.fromkeys(axes):
        if isinstance(axis, str):
            found[axis] = _range(axis, manifest.limits.get(axis), asked, sample)
    return found


def _component_inputs(manifest: Manifest) -> Iterator[Tensor]:
    for component in manifest.components.values():
        yield from component.inputs
        yield from (one.tensor for one in component.states if isinstance(one, PromptState))


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
            fix="Each of --min-shapes, --opt-shapes and --max-shapes must be at least the one "
            "before.",
        )
    return Range(smallest, usual, largest)


def row_buckets(rows: Range) -> list[Range]:
    """Rows in buckets up to 2, 4, 8, ..., for libraries that tune: the best kernels for one row are
    not the best for many, and a batch that rows leave moves from bucket to bucket.

    The first is tuned for one row but takes two: a bucket of exactly one row has its own weights in
    the plan, which doubles its size (seen with TensorRT-RTX 1.7); the others share theirs.

    >>> [(one.min, one.opt, one.max) for one in row_buckets(Range(1, 1, 12))]
    [(1, 1, 2), (3, 4, 4), (5, 8, 8), (9, 12, 12)]
    """
    found, smallest = [], rows.min
    while smallest <= rows.max:
        largest = min(rows.max, max(2, 1 << (smallest - 1).bit_length()))
        found.append(Range(smallest, 1 if smallest == 1 else largest, largest))
        smallest = largest + 1
    return found


def few_or_many(rows: Range) -> list[Range]:
    """The first of these buckets, and all others in one: for components that have profiles for
    other axes too.

    >>> [(one.min, one.opt, one.max) for one in few_or_many(Range(1, 1, 8))]
    [(1, 1, 2), (3, 8, 8)]
    """
    first, *others = row_buckets(rows)
    return [first, *([Range(others[0].min, rows.max, rows.max)] if others else [])]


def decode_profiles(
    rows: Range, buckets: Sequence[Range], chunk: int, capacity: int
) -> list[dict[str, Range]]:
    """The profiles of a component that runs for every token: a step (few new tokens behind a long
    past) in each bucket of rows, and prefill (many new tokens).

    Kernels are tuned for the usual size, and those sizes have nothing in common.
    """
    past = Range(1, max(1, capacity // 2), capacity)
    step = min(DRAFTED, capacity)
    profiles = [{"batch": own, "new": Range(1, 1, step), "past": past} for own in buckets]
    if chunk > step:
        profiles.append({"batch": rows, "new": Range(1, chunk, chunk), "past": past})
    return profiles


def shapes_of(tensors: Mapping[str, Sequence[Axis]], ranges: Ranges, where: str) -> Shapes:
    """A profile as TensorRT takes it: shapes of the inputs that have an axis of no fixed size.

    Args:
        tensors: Input -> its axes.
        ranges: Range of every named axis.
        where: What is built, for the error.

    Raises:
        UsageError: An axis has no name and no fixed size, or no range.
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
            one = Range(axis, axis, axis) if isinstance(axis, int) else ranges[axis]
            low.append(one.min)
            usual.append(one.opt)
            high.append(one.max)
        shapes[name] = (tuple(low), tuple(usual), tuple(high))
    return shapes


__all__ = [
    "Asked", "Range", "Ranges", "Shapes", "axis_sizes", "decode_profiles", "few_or_many",
    "parse_shapes", "row_buckets", "shapes_of", "spelled", "usual_ranges",
]  # fmt: skip
