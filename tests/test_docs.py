"""What the documents say is so: commands parse, Python runs, links lead somewhere, options exist.

Python blocks run in order, one document at a time, in a folder with small bundles under the names
that the documents use.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgeexit
from edgeexit.bundle.reader import Bundle
from edgeexit.cli import VERBS, cli
from edgeexit.export import export_onnx
from edgeexit.runtime import Policy, Rule, write_policy
from tests.command_lines import find_commands, parse
from tests.speech_models import make_sound, write_wav
from tests.vision_models import make_images

ROOT = Path(edgeexit.__file__).parent.parent
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    ROOT / "benchmarks/README.md",
    *ROOT.glob("examples/*/README.md"),
]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"--[a-z][a-z-]*")
EVERY_PROGRAM = {"--help", "--version"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Code of a document that is in this language; shell has none."""
    return [code for found, code in BLOCK.findall(read(name)) if found == language]


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as repositories on the web make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(words)
    return found


def test_every_document_is_looked_at() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/decoding.md", "benchmarks/README.md"} <= set(
        NAMES
    )
    assert len(NAMES) > 12


def test_the_front_page_is_a_page() -> None:
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("name", NAMES)
def test_links_and_their_anchors_lead_somewhere(name: str) -> None:
    text = BLOCK.sub("", read(name))
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str) -> None:
    with warnings.catch_warnings():
        for block in blocks(name, ""):
            for command in find_commands(block):
                try:
                    parse(command)
                except click.UsageError as error:
                    pytest.fail(f"{command}: {error.format_message()}")


def test_commands_of_every_verb_are_shown() -> None:
    shown = [
        command for name in NAMES for block in blocks(name, "") for command in find_commands(block)
    ]
    verbs = {command.split()[1] for command in shown}
    assert verbs >= VERBS.keys()
    assert len(shown) > 30


@pytest.mark.parametrize("name", NAMES)
def test_options_that_are_named_in_sentences_exist(name: str) -> None:
    known = {verb: set(OPTION.findall(" ".join(options_of(verb)))) for verb in VERBS}
    every = set().union(*known.values()) | EVERY_PROGRAM
    for script in (ROOT / "benchmarks", ROOT / "examples"):
        for path in script.rglob("*.py"):
            every |= set(re.findall(r'"(--[a-z][a-z-]*)"', path.read_text()))
    wrong = []
    for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", read(name))):
        words = code.removeprefix("edgeexit ").split()
        options = set(OPTION.findall(code))
        wrong += [f"{code}: {one}" for one in options - known.get(words[0], every)]
    assert wrong == []


def options_of(verb: str) -> list[str]:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    return [option for one in command.params for option in one.opts]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    decoder_bundle: Callable[[str], Bundle],
    vision_bundle: Callable[[str], Bundle],
    chat_bundle: Bundle,
    speech_bundle: Bundle,
) -> Path:
    """A folder with the bundles and the policy that documents name, small and untrained."""
    folder = tmp_path_factory.mktemp("documents")
    export_onnx(save_digits(folder / "digits.onnx"), folder / "digits", exits=DIGITS_EXITS)
    write_policy(Policy(rules={"main": Rule(thresholds=0.9)}), folder / "policy.json")
    (folder / "writer").symlink_to(decoder_bundle("llama").path)
    (folder / "talker").symlink_to(chat_bundle.path)
    (folder / "vlm").symlink_to(vision_bundle("llava").path)
    (folder / "speech").symlink_to(speech_bundle.path)
    for seed, name in enumerate(("speech.wav", "more.wav")):
        write_wav(folder / name, make_sound(0.8, seed)[:, None])
    for name, image in zip(("cat.jpg", "dog.png"), make_images(2), strict=True):
        image.save(folder / name)
    return folder


DIGITS_EXITS = ["exit_1", "exit_2", "exit_12"]


def save_digits(path: Path) -> Path:
    """A classifier of pictures like those of the digits example, as an ONNX file with exits."""
    nodes, weights = [helper.make_node("Flatten", ["pixel_values"], ["state_0"])], []
    for number, exit_ in enumerate(DIGITS_EXITS):
        layer, head = f"layer_{number}", f"head_{number}"
        weights += [
            numpy_helper.from_array(np.full((size, 64), 0.01, np.float32).T, name)
            for name, size in ((layer, 64), (head, 10))
        ]
        nodes += [
            helper.make_node("MatMul", [f"state_{number}", layer], [f"sum_{number}"]),
            helper.make_node("Tanh", [f"sum_{number}"], [f"state_{number + 1}"]),
            helper.make_node("MatMul", [f"state_{number + 1}", head], [exit_]),
        ]
    values = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "digits",
        [values("pixel_values", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [values(name, TensorProto.FLOAT, ["batch", 10]) for name in DIGITS_EXITS],
        weights,
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_python_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for code in blocks(name, "python"):
        exec(compile(code, name, "exec"), names)
    said = capsys.readouterr().out
    assert said or "print(" not in "".join(blocks(name, "python"))
    if name == "README.md":
        assert "['exit_" in said  # as the sentence behind the block says


BENCHMARKS, FRONT = "benchmarks/README.md", "README.md"
FIGURES = [
    (BENCHMARKS, "split tax: every", "split-small", "small/split_tax", "1.061"),
    (BENCHMARKS, "split tax: every", "split-large", "large/split_tax", "1.021"),
    (BENCHMARKS, "bundle on disk", "split-small", "small/export/bundle_of_weights", "1.003"),
    (BENCHMARKS, "batch 32, natural", "split-small", "small/batch_32/of_ideal", "0.90"),
    (BENCHMARKS, "batch 32, natural", "split-large", "large/batch_32/of_ideal", "1.10"),
    (BENCHMARKS, "loading all segments", "loading", "small/loading/ratio", "1.11"),
    (BENCHMARKS, "loading all segments", "loading", "large/loading/ratio", "0.67"),
    (BENCHMARKS, "peak memory ÷", "loading", "small/peak_memory/ratio", "0.97"),
    (BENCHMARKS, "peak memory ÷", "loading", "large/peak_memory/ratio", "0.92"),
    (BENCHMARKS, "natural exits, mean", "digits", "summary/accuracy/mean", "97.1 %"),
    (BENCHMARKS, "natural exits, mean", "digits", "summary/mean_ratio_to_unsplit/mean", "0.17"),
    (BENCHMARKS, "the same exit rates", "digits", "summary/random_exits_accuracy/mean", "95.5 %"),
    (BENCHMARKS, "oracle: the", "digits", "summary/oracle_ratio_to_unsplit/mean", "0.12"),
    (BENCHMARKS, "decode: tokens", "decode", "prompts/64/chain/against_genai/decode", "0.92"),
    (BENCHMARKS, "split tax in", "decode", "prompts/64/chain/split_tax", "1.06"),
    (BENCHMARKS, "split tax in", "decode", "prompts/600/chain/split_tax", "1.03"),
    (BENCHMARKS, "`exact` | ", "codelm", "speeds/modes/exact/of_full", "1.42"),
    (BENCHMARKS, "prompt lookup", "codelm", "speeds/modes/lookup/of_full", "1.64"),
    (BENCHMARKS, "`fast`, 96 % of early", "codelm", "speeds/modes/fast/of_full", "1.44"),
    (BENCHMARKS, "`fast`, 96 % of early", "codelm", "speeds/modes/audit/agreement", "95.3 %"),
    (BENCHMARKS, "`fast`, 96 % of all", "codelm", "speeds/modes/fast_loose/of_full", "1.54"),
    (BENCHMARKS, "`approximate`", "codelm", "speeds/modes/approximate/of_full", "1.20"),
    (BENCHMARKS, "`approximate`", "codelm", "quality/fast/as_last_exit", "96.1 %"),
    (BENCHMARKS, "a model of 7", "codelm", "smaller/modes/truncated_7/of_full", "1.82"),
    (BENCHMARKS, "a model of 7", "codelm", "quality/truncated_7/right", "36.9 %"),
    (FRONT, "What does splitting", "split-large", "large/split_tax", "1.02 x"),
    (FRONT, "What does splitting", "split-small", "small/split_tax", "1.06 x"),
    (FRONT, "Do exits pay on", "digits", "summary/mean_ratio_to_unsplit/mean", "0.17 x"),
    (FRONT, "Do exits pay on", "digits", "summary/accuracy/mean", "97.1 %"),
    (FRONT, "Do exits pay for", "codelm", "speeds/modes/exact/of_full", "1.42 x"),
    (FRONT, "Do exits pay for", "codelm", "speeds/modes/fast/of_full", "1.44 x"),
    (FRONT, "Do exits pay for", "codelm", "quality/fast/as_last_exit", "96.1 %"),
    (FRONT, "Do exits pay for", "codelm", "quality/full/right", "34.0 %"),
    (FRONT, "Do exits pay for", "codelm", "speeds/modes/lookup/of_full", "1.64 x"),
    (FRONT, "Do exits pay for", "codelm", "smaller/modes/truncated_7/of_full", "1.82 x"),
    (FRONT, "Do exits pay for", "codelm", "smaller/modes/exact/of_full", "1.62 x"),
    (FRONT, "How fast is", "decode", "prompts/64/chain/against_genai/decode", "0.92"),
    (FRONT, "How fast is", "decode", "memory/ratio", "1.02 x"),
]
"""Document, beginning of a table's row, result, where in it, and the figure as it is written."""


@pytest.mark.parametrize("name, row, result, place, figure", FIGURES)
def test_figures_are_those_of_the_results(
    name: str, row: str, result: str, place: str, figure: str
) -> None:
    value = json.loads((ROOT / f"benchmarks/results/{result}.json").read_text())
    for key in place.split("/"):
        value = value[key]
    number, _, unit = figure.partition(" ")
    digits = len(number.partition(".")[2])
    assert f"{value * (100 if unit == '%' else 1):.{digits}f}" == number
    [line] = [line for line in read(name).splitlines() if line.startswith(f"| {row}")]
    assert figure in line


def test_tests_that_a_document_names_exist() -> None:
    """docs/compatibility.md says which test holds a promise."""
    named = set(re.findall(r"`(test_\w+)`", read("docs/compatibility.md")))
    sources = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_blocks_are_shell_or_python() -> None:
    found: Iterator[str] = (language for name in NAMES for language, _ in BLOCK.findall(read(name)))
    assert set(found) == {"", "python"}
