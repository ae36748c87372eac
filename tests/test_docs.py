"""What the documents say is so: commands parse, Python runs, links lead somewhere, options exist.

Python blocks run in order, one document at a time, in a folder with small bundles under the names
that the documents use.
"""

from __future__ import annotations

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
    chat_bundle: Bundle,
) -> Path:
    """A folder with the bundles and the policy that documents name, small and untrained."""
    folder = tmp_path_factory.mktemp("documents")
    export_onnx(save_digits(folder / "digits.onnx"), folder / "digits", exits=DIGITS_EXITS)
    write_policy(Policy(rules={"main": Rule(thresholds=0.9)}), folder / "policy.json")
    (folder / "writer").symlink_to(decoder_bundle("llama").path)
    (folder / "talker").symlink_to(chat_bundle.path)
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
        assert "['exit_12']" in said  # as the sentence behind the block says


def test_tests_that_a_document_names_exist() -> None:
    """docs/compatibility.md says which test holds a promise."""
    named = set(re.findall(r"`(test_\w+)`", read("docs/compatibility.md")))
    sources = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_blocks_are_shell_or_python() -> None:
    found: Iterator[str] = (language for name in NAMES for language, _ in BLOCK.findall(read(name)))
    assert set(found) == {"", "python"}
