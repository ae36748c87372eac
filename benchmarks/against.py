"""Compares this checkout with another checkout of the project: the effect of a change on speed.

    python benchmarks/against.py --base ../before
    python benchmarks/against.py --base ../before --quick    # tiny shapes: does the script run?

The other checkout, the base, is the commit before the unification of runtime and export. Both
export the same checkpoints with their own code and run in separate processes, which take turns.
A second process of the base repeats everything: its difference from the first is noise.
benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import codelm
import decode
import digits
import models
import numpy as np
from results import HERE, RESULTS, ROOT, SCRATCH, save, say
from split import even_thresholds, tokens

from edgeexit.bundle.policy import OUT_OF_REACH
from edgeexit.bundle.reader import open_bundle
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import write_inputs
from edgeexit.measure.bench.paired import Lane, Side, alternate, spread, warm
from edgeexit.measure.bench.rows import THROUGHPUT_BLOCKS
from edgeexit.measure.bench.texts import Writer, take_turns
from edgeexit.measure.calibrate import calibrate
from edgeexit.measure.data import open_data
from edgeexit.measure.trace import record
from edgeexit.runtime import load

FOLDER = SCRATCH / "against"
PLACES = ("base", "new", "again")
"""Processes of a comparison: the base, this checkout, and the base again."""

PACKAGES = ("edgeexit", "export", "runtime")
BATCH, BATCH_ROWS = 32, 128
IMPORT = (
    "import time; t = time.perf_counter(); import edgeexit.runtime; "
    "print('{\"seconds\": %f}' % (time.perf_counter() - t))"
)


@dataclass(frozen=True)
class Checkout:
    """A checkout of the project.

    Attributes:
        name: ``new`` or ``base``: its folder below `FOLDER`.
        root: Its folder.
        worker: Module whose ``main`` is the worker.
        subjects: Kind -> ``module:function``.
        prompts: The argument that names the file of prompts.
    """

    name: str
    root: Path
    worker: str
    subjects: dict[str, str]
    prompts: str

    @property
    def folder(self) -> Path:
        """Folder of its results."""
        return FOLDER / self.name

    def run(self, command: Sequence[str]) -> dict[str, float]:
        """Runs Python in this checkout. Returns the JSON object in the last line of its output."""
        made = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"PYTHONPATH": str(self.root)},
            cwd=self.root,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            sys.exit(f"{self.name}: {' '.join(command)} failed:\n{made.stderr[-4000:]}")
        found: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
        return found

    def job(self, *arguments: object) -> dict[str, float]:
        """Runs a job of `either` in a new process of this checkout."""
        return self.run([str(HERE / "either.py"), str(self.root), *map(str, arguments)])

    def policy(self, name: str, thresholds: Any, score: str = "max_prob") -> Path:
        """Writes a policy in this checkout's format."""
        path = self.folder / f"{name}.policy.json"
        self.job("policy", path, json.dumps(thresholds), score)
        return path

    def describe(self) -> dict[str, Any]:
        """Its commit, whether there are uncommitted changes, the bundle format, and the size of its
        code."""
        bundle = json.loads((self.folder / "digits/manifest.json").read_text())
        return {
            "commit": self._git("rev-parse", "HEAD"),
            "changed": bool(self._git("status", "--porcelain", "--", *PACKAGES)),
            "format": bundle["format"],
            "lines": {package: lines_of(self.root / package) for package in PACKAGES},
        }

    def _git(self, *arguments: str) -> str | None:
        made = subprocess.run(
            ["git", "-C", str(self.root), *arguments], capture_output=True, text=True
        )
        return None if made.returncode else made.stdout.strip()


def this_checkout() -> Checkout:
    """The checkout of this file."""
    cases = "edgeexit.measure.bench.cases"
    return Checkout(
        "new",
        ROOT,
        "edgeexit.measure.bench.worker",
        {"chain": f"{cases}:chain", "unsplit": f"{cases}:unsplit"}
        | {"modes": f"{cases}:chain", "plain": f"{cases}:unsplit"},
        "inputs",
    )


def base_checkout(root: Path) -> Checkout:
    """The commit before the unification."""
    rows, texts = "edgeexit.measure.subjects", "edgeexit.measure.decodesubjects"
    return Checkout(
        "base",
        root,
        "edgeexit.measure.worker",
        {"chain": f"{rows}:chain", "unsplit": f"{rows}:unsplit"}
        | {"modes": f"{texts}:modes", "plain": f"{texts}:unsplit"},
        "prompts",
    )


class CheckoutSide(Side):
    """A subject in a process of a checkout. ``chain`` and ``unsplit`` take rows; ``modes`` and
    ``plain`` (the unsplit graph) take prompts."""

    def __init__(
        self, checkout: Checkout, kind: str, arguments: dict[str, Any], *, name: str
    ) -> None:
        self._checkout = checkout
        super().__init__(checkout.subjects[kind], arguments, name=name)

    def _command(self) -> tuple[list[str], str | None]:
        code = f"import sys; sys.path[:] = sys.argv[1:]; from {self._checkout.worker} import main"
        ours = {str(ROOT), str(HERE), ""}
        path = [str(self._checkout.root), *(place for place in sys.path if place not in ours)]
        return [sys.executable, "-I", "-c", f"{code}; main()", *path], str(self._checkout.root)


@dataclass(frozen=True)
class Effort:
    """Number and duration of measurements.

    Attributes:
        seconds: Seconds per case of rows and launch.
        launches: Launches (sets of processes) for rows.
        text_launches, turns: Launches for texts, and turns of each case in a launch.
        loads, imports, exports: Number of new processes for each.
    """

    seconds: float
    launches: int
    text_launches: int
    turns: int
    loads: int
    imports: int
    exports: int


EFFORTS = {
    "full": Effort(12, 3, 3, 16, 9, 15, 3),
    "quick": Effort(0.5, 1, 1, 2, 2, 2, 1),
}


@dataclass
class Figure:
    """Ratios new ÷ base and base ÷ base, one per pair of blocks or turns, launch by launch.

    Attributes:
        better: Ratios that are an improvement: ``below`` 1 or ``above`` 1.
        values: Values in `unit`, per place.
        differing: Per input that new and base both answered, whether the answers differ.
    """

    unit: str
    better: str = "below"
    new: list[list[float]] = field(default_factory=list)
    again: list[list[float]] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {place: [] for place in PLACES})
    differing: list[bool] = field(default_factory=list)

    def add(self, values: dict[str, list[float]]) -> None:
        """Adds a launch; values with the same index are paired."""
        for place, ratios in (("new", self.new), ("again", self.again)):
            pairs = zip(values[place], values["base"], strict=True)
            ratios.append([ours / theirs for ours, theirs in pairs])
        for place in PLACES:
            self.values[place] += values[place]

    def summary(self) -> dict[str, Any]:
        """The figure as it is written to the result."""
        new, again = (list(chain.from_iterable(one)) for one in (self.new, self.again))
        found: dict[str, Any] = {
            "new_of_base": round(statistics.median(new), 4),
            "base_of_base": round(statistics.median(again), 4),
            "better": f"{self.better} 1",
            "spread": round(spread(new), 4),
            "base_spread": round(spread(again), 4),
            "pairs": len(new),
            "unit": self.unit,
            "new": round(statistics.median(self.values["new"]), 4),
            "base": round(statistics.median(self.values["base"]), 4),
        }
        if len(self.new) > 1:
            for name, launches in (("launches", self.new), ("base_launches", self.again)):
                found[name] = [round(statistics.median(one), 4) for one in launches]
        if self.differing:
            found["answered_differently"] = f"{sum(self.differing)} of {len(self.differing)}"
        return found


def main() -> None:
    """Measures the parts and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="the other checkout")
    parser.add_argument("--quick", action="store_true", help="tiny models, few rounds")
    parser.add_argument(
        "--threads", default="blocking", help="for every process: blocking, spinning or a number"
    )
    parser.add_argument("--cores", type=int, default=2, help="shared by all processes")
    parser.add_argument("--only", metavar="PARTS", help=f"measure only these of {','.join(PARTS)}")
    given = parser.parse_args()
    parts = list(PARTS) if given.only is None else given.only.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: the parts are {', '.join(PARTS)}")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= given.cores <= len(cores):
        parser.error(f"--cores {given.cores}: there are only {len(cores)}")
    base = base_checkout(given.base.resolve())
    if not (base.root / f"{base.worker.replace('.', '/')}.py").is_file():
        parser.error(f"--base {given.base}: not a checkout of the commit before the unification")
    os.sched_setaffinity(0, cores[: given.cores])
    match = Match(
        this_checkout(),
        base,
        int(given.threads) if given.threads.isdigit() else given.threads,
        EFFORTS["quick" if given.quick else "full"],
        quick=given.quick,
    )
    watch = environment.Watch()
    command = ["against.py", "--base", "BASE", *(["--quick"] if given.quick else [])]
    result: dict[str, Any] = {
        "threads": given.threads,
        "effort": dataclasses.asdict(match.effort),
        "shapes": {
            **{shape.name: dataclasses.asdict(shape) for shape in match.shapes},
            "decode": match.decoder | {"layers": decode.LAYERS, "exits": decode.EXITS},
        },
        "figures": {},
    }
    before = RESULTS / "against.json"
    if given.only is not None and before.is_file() and not given.quick:
        result |= json.loads(before.read_text())
    for name in parts:
        say(f"{name}:")
        result["figures"][name] = PARTS[name](match)
        if (match.new.folder / "digits").is_dir():
            described = {one.name: one.describe() for one in match.checkouts.values()}
            result.setdefault("measured", {})[name] = described["new"]["commit"]
            result["checkouts"] = described
        result["environment"] = environment.describe(command=command)
        result["environment"]["machine"] = watch.stop(0.0)
        result["environment"]["machine"].pop("other_load_cores")  # it would include our children
        save("against", result, quick=given.quick)


@dataclass(frozen=True)
class Match:
    """Both checkouts, and the options of the measurement."""

    new: Checkout
    base: Checkout
    threads: Any
    effort: Effort
    quick: bool

    @property
    def checkouts(self) -> dict[str, Checkout]:
        """Name -> checkout."""
        return {"new": self.new, "base": self.base}

    @property
    def places(self) -> dict[str, Checkout]:
        """Place -> the checkout of its process."""
        return {place: self.new if place == "new" else self.base for place in PLACES}

    @property
    def shapes(self) -> list[models.Shape]:
        """Shapes of the classifiers."""
        return list((models.QUICK if self.quick else models.SHAPES).values())

    @property
    def decoder(self) -> dict[str, int]:
        """Shape of the language model."""
        return decode.QUICK_SHAPE if self.quick else decode.SHAPE

    def in_turns(self, number: int) -> list[str]:
        """Places in an order that rotates with every round, so that no place is always first."""
        turn = number % len(PLACES)
        return [*PLACES[turn:], *PLACES[:turn]]

    def fresh(
        self, rounds: int, job: Callable[[str, Checkout], dict[str, float]]
    ) -> dict[str, dict[str, list[float]]]:
        """Runs a job in a new process of every place, in turns. Returns key -> place -> values."""
        found: dict[str, dict[str, list[float]]] = {}
        for number in range(rounds):
            for place in self.in_turns(number):
                for key, value in job(place, self.places[place]).items():
                    found.setdefault(key, {one: [] for one in PLACES})[place].append(value)
        return found

    def open_sides(
        self,
        stack: ExitStack,
        launch: int,
        kind: str,
        arguments: Callable[[Checkout], dict[str, Any]],
    ) -> dict[str, Side]:
        """Opens a process per place."""
        sides: dict[str, Side] = {}
        for place in self.in_turns(launch):
            checkout = self.places[place]
            own = arguments(checkout) | {"threads": self.threads}
            sides[place] = stack.enter_context(CheckoutSide(checkout, kind, own, name=place))
        return sides

    def rows(
        self,
        kind: str,
        arguments: Callable[[Checkout], dict[str, Any]],
        cases: Sequence[str],
        *,
        means: bool = False,
        **blocks: Any,
    ) -> dict[str, dict[str, Any]]:
        """Measures cases of rows, in pairs of blocks.

        Args:
            means: Compare the mean times of blocks, for rows that stop at different exits.
            blocks: Arguments of `alternate`.
        """
        figures = {case: Figure("ms") for case in cases}
        for launch in range(self.effort.launches):
            with ExitStack() as stack:
                sides = self.open_sides(stack, launch, kind, arguments)
                for case, figure in figures.items():
                    lanes = {place: Lane(place, side, case) for place, side in sides.items()}
                    warm(list(lanes.values()), seconds=min(2.0, self.effort.seconds))
                    alternate(
                        lanes["base"],
                        [lanes["new"], lanes["again"]],
                        seconds=self.effort.seconds,
                        seed=launch,
                        **blocks,
                    )
                    for place, ratios in (("new", figure.new), ("again", figure.again)):
                        lane = lanes[place]
                        ratios.append(lane.mean_ratios if means else lane.ratios)
                    for place, lane in lanes.items():
                        middle = statistics.fmean if means else statistics.median
                        figure.values[place].append(middle(lane.times_ms))
                    figure.differing += differing(lanes["new"], lanes["base"])
        return summaries(figures)

    def texts(
        self,
        kind: str,
        arguments: Callable[[Checkout], dict[str, Any]],
        cases: Sequence[str],
        prompts: int,
    ) -> dict[str, dict[str, Any]]:
        """Measures cases of texts, turn by turn: tokens per second after the first token, and time
        to the first token."""
        figures: dict[str, Figure] = {}
        for launch in range(self.effort.text_launches):
            with ExitStack() as stack:
                sides = self.open_sides(stack, launch, kind, arguments)
                for case in cases:
                    writers = {place: Writer(place, side, case) for place, side in sides.items()}
                    for writer in writers.values():
                        writer.side.run(case, [0, min(1, prompts - 1)], lead=False)
                    numbers = [turn % prompts for turn in range(self.effort.turns)]
                    take_turns(list(writers.values()), numbers)
                    self._add(figures, case, writers)
        return summaries(figures)

    def _add(self, figures: dict[str, Figure], case: str, writers: dict[str, Writer]) -> None:
        speed = figures.setdefault(f"{case}, decode", Figure("tokens/s", "above"))
        prefill = figures.setdefault(f"{case}, prefill", Figure("ms"))
        turns = zip(*(writers[place].tokens_per_s() for place in PLACES), strict=True)
        long = [turn for turn in turns if all(turn)]  # a text may end at its first token
        speed.add(dict(zip(PLACES, map(list, zip(*long, strict=True)), strict=True)))
        prefill.add({place: writer.prefill_ms() for place, writer in writers.items()})
        pairs = zip(writers["new"].records, writers["base"].records, strict=True)
        speed.differing += [ours["tokens"] != theirs["tokens"] for ours, theirs in pairs]


def differing(ours: Lane, theirs: Lane) -> list[bool]:
    """Per input that both lanes ran: whether their answers (exits and labels) differ."""
    found = [
        dict(zip(lane.numbers, lane.records, strict=False)) if lane.records else {}
        for lane in (ours, theirs)
    ]
    return [found[0][number] != found[1][number] for number in sorted(found[0].keys() & found[1])]


def summaries(figures: dict[str, Figure]) -> dict[str, dict[str, Any]]:
    """Summaries of figures. Prints each."""
    found = {name: figure.summary() for name, figure in figures.items()}
    for name, one in found.items():
        say(
            f"  {name}: {one['new_of_base']} ({one['better']} is better; "
            f"base ÷ base {one['base_of_base']}), {one['new']} {one['unit']}"
        )
    return found


def of_processes(unit: str, values: dict[str, list[float]]) -> Figure:
    """A figure from new processes."""
    figure = Figure(unit)
    figure.add(values)
    return figure


def lines_of(folder: Path) -> int:
    """Lines of a package's modules, without linked folders, which are other packages."""
    return sum(
        len((Path(place) / name).read_text(encoding="utf-8").splitlines())
        for place, _, names in os.walk(folder, followlinks=False)
        for name in names
        if name.endswith(".py")
    )


def measure_lines(match: Match) -> dict[str, Any]:
    """Compares the lines of product code."""
    lines = {
        checkout.name: sum(lines_of(checkout.root / package) for package in PACKAGES)
        for checkout in match.checkouts.values()
    }
    say(f"  {lines}")
    return lines | {"new_of_base": round(lines["new"] / lines["base"], 4)}


def measure_imports(match: Match) -> dict[str, Any]:
    """Times ``import edgeexit.runtime`` in a new interpreter. Sources are compiled before, as pip
    does at installation."""
    for checkout in match.checkouts.values():
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", *PACKAGES], cwd=checkout.root, check=True
        )
    found = match.fresh(match.effort.imports, lambda _, checkout: checkout.run(["-c", IMPORT]))
    return summaries({"import edgeexit.runtime": of_processes("s", found["seconds"])})


def measure_export(match: Match) -> dict[str, Any]:
    """Creates the checkpoints and exports them with both checkouts. The exports of one classifier
    and one language model are timed, several times."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for checkout in match.checkouts.values():
        checkout.folder.mkdir(parents=True)
    checkpoints = {
        "digits": digits.EXAMPLE / "checkpoint",
        "codelm": codelm.EXAMPLE / "checkpoint",
        **make_checkpoints(match),
    }
    figures = {}
    for name, checkpoint in checkpoints.items():
        exits = [json.dumps(decode.EXITS)] if name == "decode" else []

        def export(
            place: str,
            checkout: Checkout,
            name: str = name,
            checkpoint: Path = checkpoint,
            exits: list[str] = exits,
        ) -> dict[str, float]:
            folder = FOLDER / "again" if place == "again" else checkout.folder
            return checkout.job("export", checkpoint, folder / name, *exits)

        if name in ("decode", match.shapes[0].name):
            found = match.fresh(match.effort.exports, export)
            figures[name] = of_processes("s", found["seconds"])
            shutil.rmtree(FOLDER / "again")
        else:
            for checkout in match.checkouts.values():
                export(checkout.name, checkout)
    return summaries(figures)


def make_checkpoints(match: Match) -> dict[str, Path]:
    """Creates checkpoints with random weights, each in its own process. Returns shape name ->
    checkpoint."""
    found = {}
    for shape in match.shapes:
        found[shape.name] = FOLDER / "checkpoints" / shape.name
        script = [str(HERE / "models.py"), "checkpoint", str(found[shape.name])]
        decode.run([sys.executable, *script, "--shape", models.as_json(shape)])
    found["decode"] = FOLDER / "checkpoints/decode"
    config = match.decoder | {
        "num_hidden_layers": decode.LAYERS,
        "max_position_embeddings": decode.POSITIONS,
    }
    script = [str(HERE / "decodermodels.py"), str(found["decode"]), json.dumps(config)]
    decode.run([sys.executable, *script])
    for length in decode.LENGTHS:
        rng = np.random.default_rng(length)
        drawn = rng.integers(1, match.decoder["vocab_size"], (decode.PROMPTS, length))
        write_inputs(FOLDER / f"prompts-{length}.npz", [{"tokens": row} for row in drawn])
    for shape in match.shapes:
        rows = [tokens(shape, 1, seed) for seed in range(16)]
        write_inputs(FOLDER / f"{shape.name}.npz", rows)
    return found


def measure_loading(match: Match) -> dict[str, Any]:
    """Measures loading time, and the peak memory of a process that loads and runs a few inputs."""
    figures = {}
    policies = {
        one.name: one.policy("out of reach", OUT_OF_REACH) for one in match.checkouts.values()
    }
    for shape in match.shapes:
        inputs = FOLDER / f"{shape.name}.npz"
        found = match.fresh(
            match.effort.loads,
            lambda _, checkout, shape=shape, inputs=inputs: checkout.job(
                "load", checkout.folder / shape.name, inputs, policies[checkout.name], match.threads
            ),
        )
        figures[f"{shape.name}, loading"] = of_processes("s", found["load_s"])
        figures[f"{shape.name}, peak memory"] = of_processes("bytes", found["peak_bytes"])
    prompts = FOLDER / f"prompts-{decode.LENGTHS[-1]}.npz"
    found = match.fresh(
        match.effort.loads,
        lambda _, checkout: checkout.job(
            "write", checkout.folder / "decode", prompts, decode.CAPACITY, match.threads
        ),
    )
    figures["decode, loading"] = of_processes("s", found["load_s"])
    figures["decode, peak memory"] = of_processes("bytes", found["peak_bytes"])
    return summaries(figures)


def measure_forward(match: Match) -> dict[str, Any]:
    """Measures classifiers with random weights: one row on every kind of path, the unsplit graph,
    and batches whose rows stop at all exits equally often."""
    found = {}
    for shape in match.shapes:
        say(f"  {shape.name}")
        inputs = FOLDER / f"{shape.name}.npz"

        def single(
            checkout: Checkout, shape: models.Shape = shape, inputs: Path = inputs
        ) -> dict[str, Any]:
            return {"bundle": str(checkout.folder / shape.name), "inputs": str(inputs)}

        paths = [f"path:exit_{n}" for n in (1, shape.layers // 2, shape.layers)]
        found[shape.name] = match.rows("chain", single, ["all", *paths])
        found[shape.name] |= match.rows("unsplit", single, ["unsplit"])
        made = match.rows(
            "chain", batches(match, shape), ["natural"], means=True, **THROUGHPUT_BLOCKS
        )
        found[shape.name][f"natural, {BATCH} rows"] = made["natural"]
    return found


def batches(match: Match, shape: models.Shape) -> Callable[[Checkout], dict[str, Any]]:
    """Batches, and policies with which about the same number of rows stops at every exit."""
    whole = tokens(shape, BATCH_ROWS, 7)
    parts = [
        {name: value[start : start + BATCH] for name, value in whole.items()}
        for start in range(0, BATCH_ROWS, BATCH)
    ]
    inputs = FOLDER / f"{shape.name}-batches.npz"
    write_inputs(inputs, parts)
    thresholds = even_thresholds(open_bundle(match.new.folder / shape.name), whole)
    policies = {
        one.name: str(one.policy(f"{shape.name} even", thresholds))
        for one in match.checkouts.values()
    }
    return lambda checkout: {
        "bundle": str(checkout.folder / shape.name),
        "inputs": str(inputs),
        "policy": policies[checkout.name],
    }


def measure_digits(match: Match) -> dict[str, Any]:
    """Measures the digits example row by row, with a threshold calibrated on its validation
    images."""
    rows, labels = digits.held_out()
    data, inputs = FOLDER / "digits-rows.npz", FOLDER / "digits.npz"
    np.savez(data, **rows, label=labels)
    bundle = open_bundle(match.new.folder / "digits")
    validation, test = digits.split(len(labels), 0)
    with load(bundle, all_scores=True) as model:
        trace = record(model, open_data(data, bundle), 1)
    made, _, _ = calibrate(
        digits.take(trace, validation),
        max_risk=digits.AIMED_DROP,
        score="max_prob",
        risk="performance",
    )
    [rule] = made.rules.values()
    write_inputs(inputs, [{k: v[n : n + 1] for k, v in rows.items()} for n in test.tolist()])
    policies = {
        one.name: str(one.policy("digits", rule.thresholds)) for one in match.checkouts.values()
    }
    found = {}
    for name, means in (("natural", True), ("natural, the commonest exit", False)):
        made = match.rows(
            "chain",
            lambda checkout: {
                "bundle": str(checkout.folder / "digits"),
                "inputs": str(inputs),
                "policy": policies[checkout.name],
            },
            ["natural"],
            means=means,
        )
        found |= {name: made["natural"]}
    return found


def measure_decode(match: Match) -> dict[str, Any]:
    """Measures a Llama with random weights at full depth, split and unsplit, with prompts of two
    lengths."""
    found = {}
    for length in decode.LENGTHS:
        say(f"  behind {length} tokens")
        for kind, case in (("modes", "full"), ("plain", "unsplit")):
            made = match.texts(
                kind,
                lambda checkout, length=length: {
                    "bundle": str(checkout.folder / "decode"),
                    checkout.prompts: str(FOLDER / f"prompts-{length}.npz"),
                    "new_tokens": decode.NEW_TOKENS,
                    "capacity": decode.CAPACITY,
                },
                [case],
                decode.PROMPTS,
            )
            found |= {f"{name}, {length} tokens": one for name, one in made.items()}
    return found


def measure_codelm(match: Match) -> dict[str, Any]:
    """Measures the codelm example on test prompts; `fast` has the thresholds of
    benchmarks/codelm.py."""
    tokenizer = codelm.EXAMPLE / "checkpoint/tokenizer.json"
    prompts = codelm.data.prompts("test", tokenizer, min(codelm.PROMPTS, match.effort.turns))
    inputs = FOLDER / "codelm.npz"
    write_inputs(inputs, [{"tokens": np.array(row)} for row in prompts])
    chosen = json.loads((RESULTS / "codelm.json").read_text())["chosen"]["strict"]
    policies = {
        one.name: str(one.policy("codelm", chosen["thresholds"], chosen["score"]))
        for one in match.checkouts.values()
    }
    return match.texts(
        "modes",
        lambda checkout: {
            "bundle": str(checkout.folder / "codelm"),
            checkout.prompts: str(inputs),
            "new_tokens": codelm.NEW_TOKENS,
            "capacity": codelm.CAPACITY,
            "policy": policies[checkout.name],
        },
        ["full", "exact", "fast"],
        len(prompts),
    )


PARTS: dict[str, Callable[[Match], dict[str, Any]]] = {
    "lines": measure_lines,
    "import": measure_imports,
    "export": measure_export,
    "loading": measure_loading,
    "forward": measure_forward,
    "digits": measure_digits,
    "decode": measure_decode,
    "codelm": measure_codelm,
}


if __name__ == "__main__":
    main()
