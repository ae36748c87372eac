"""Prompts of four kinds for a small chat model (questions, code to continue, texts to rewrite that
quote their prompt, and stories to continue): some to measure with, others to train exits with
(`training_prompts`); and texts to quantise with.

Code and texts come from Python's standard library, so another Python gives others.

    edgeexit export -m smollm2 --exits 6 --weights int4 --weights-method gptq \\
        --calibration-data examples/smollm/data.py:calibration -o smol4
    edgeexit bench smol4 --data examples/smollm/data.py:every_prompt
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

QUESTIONS = (
    "Why is the sky blue?",
    "How do I boil an egg so that the yolk stays soft?",
    "What is the difference between weather and climate?",
    "Give me three ideas for a birthday present for my grandmother.",
    "Explain to a ten year old how a refrigerator works.",
    "What should I pack for a weekend in the mountains?",
    "Write a short email to my landlord about a dripping tap.",
    "Which countries border Switzerland?",
    "How can I fall asleep faster?",
    "What does a transformer do in an electric grid?",
    "Is it better to learn the piano or the guitar first?",
    "Tell me about the history of the bicycle.",
    "What are the advantages of public transport?",
)
FUNCTIONS = (
    "textwrap.dedent",
    "shlex.split",
    "textwrap.shorten",
    "fnmatch.filter",
    "heapq.merge",
    "statistics.median_grouped",
    "difflib.get_close_matches",
    "calendar.timegm",
    "colorsys.rgb_to_hls",
    "random.shuffle",
    "string.capwords",
    "functools.update_wrapper",
)
TEXTS = (
    "argparse",
    "tempfile",
    "cmd",
    "shelve",
    "timeit",
    "unittest",
    "fileinput",
    "csv",
    "subprocess",
    "copy",
    "random",
    "logging.Formatter",
)
STORIES = (
    "The lighthouse keeper had not spoken to anyone for three weeks when",
    "On the morning of the festival, the baker discovered that",
    "Nobody in the village remembered who had built the bridge, but",
    "The old train stopped between two stations, and",
    "My grandfather kept a locked box under his bed. One day",
    "When the snow melted, the children found",
    "The captain looked at the map again and sighed, because",
    "In a small town by the sea there lived a clockmaker who",
    "The letter arrived ten years too late. It said that",
    "Far beyond the last farm, where the road ends,",
    "She opened the door of the library and",
    "The dog waited at the station every evening until",
    "It was the hottest summer in a hundred years, and",
)
ASKED = (
    "What is {}?",
    "Explain {} to a beginner.",
    "Give me three facts about {}.",
    "Why does {} matter?",
)
SUBJECTS = (
    "photosynthesis", "a compass", "inflation", "the water cycle", "a haiku", "sourdough bread",
    "electricity", "a glacier", "the immune system", "recycling", "chess", "a black hole",
    "the metric system", "a volcano", "good sleep", "a contract", "gravity", "the printing press",
    "a balanced diet", "first aid", "a search engine", "public speaking", "the ozone layer",
    "time zones", "a sonnet", "compound interest", "a lighthouse", "democracy", "yoga", "coffee",
)  # fmt: skip
PLACES = (
    "In the mountains",
    "On a small island",
    "At the edge of the desert",
    "In the old harbour",
)
PEOPLE = ("a young teacher", "two brothers", "a retired sailor", "the new doctor", "a lost tourist")
EVENTS = (
    "found a key that",
    "heard a sound and",
    "decided to leave because",
    "met a stranger who",
)
REWRITE = "Rewrite this text. Keep its words, and correct only mistakes.\n\n"
WORDS = 90
"""Of a text to rewrite."""
PASSAGE, PASSAGES = 120, 128
"""Words of a passage to quantise with, and their number."""
HELD_OUT = 64


def prompts() -> list[dict[str, Any]]:
    """Objects with a ``kind`` and either ``messages`` or a ``prompt`` that is continued."""
    asked = [{"kind": "chat", "messages": _said(question)} for question in QUESTIONS]
    code = [{"kind": "code", "prompt": _beginning(name)} for name in FUNCTIONS]
    quoting = [{"kind": "quoting", "messages": _said(REWRITE + _words(name))} for name in TEXTS]
    free = [{"kind": "free", "prompt": text} for text in STORIES]
    return [*asked, *code, *quoting, *free]


def training_prompts() -> list[dict[str, Any]]:
    """The same kinds about other things, equally many of each, in a random order: none of them is
    one of `prompts`."""
    asked = [form.format(subject) for subject in SUBJECTS for form in ASKED]
    found: list[dict[str, Any]] = [{"kind": "chat", "messages": _said(text)} for text in asked]
    measured = {_words(name) for name in TEXTS}
    for tree in _modules():
        documented = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in documented:
            words = " ".join((ast.get_docstring(node) or "").split()[:WORDS])
            if len(words.split()) >= WORDS // 2 and words not in measured:
                found.append({"kind": "quoting", "messages": _said(REWRITE + words)})
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name not in _names(FUNCTIONS):
                lines = ast.unparse(node).splitlines(keepends=True)
                if len(lines) >= 12:
                    found.append({"kind": "code", "prompt": "".join(lines[: len(lines) // 2][:20])})
    for place, person, event in itertools.product(PLACES, PEOPLE, EVENTS):
        found.append({"kind": "free", "prompt": f"{place}, {person} {event}"})
    random.Random(0).shuffle(found)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        kinds.setdefault(one["kind"], []).append(one)
    return [one for some in zip(*kinds.values(), strict=False) for one in some]


def every_prompt() -> list[dict[str, Any]]:
    """The same, with messages as plain text: for ``--data``."""
    return [{"prompt": one.get("prompt") or one["messages"][0]["content"]} for one in prompts()]


def calibration() -> list[str]:
    """Passages of the documentation of modules and classes, in a random order."""
    return _passages()[:PASSAGES]


def held_out() -> list[str]:
    """The passages behind those of `calibration`: for perplexities."""
    return _passages()[PASSAGES : PASSAGES + HELD_OUT]


def _passages() -> list[str]:
    texts = []
    for tree in _modules():
        documented = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in documented:
            words = (ast.get_docstring(node) or "").split(" ")
            texts += [
                " ".join(words[start : start + PASSAGE])
                for start in range(0, len(words) - PASSAGE // 2, PASSAGE)
            ]
    random.Random(0).shuffle(texts)
    return texts


def _modules() -> list[ast.Module]:
    """Modules of the standard library."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [ast.parse(path.read_text(encoding="utf-8", errors="replace")) for path in paths]


def _names(functions: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in functions}


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _find(name: str) -> Any:
    module, _, attribute = name.partition(".")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def _beginning(name: str) -> str:
    """The first half of a function's source."""
    lines = inspect.getsource(_find(name)).splitlines(keepends=True)
    return "".join(lines[: max(4, len(lines) // 2)])


def _words(name: str) -> str:
    return " ".join(str(inspect.getdoc(_find(name))).split()[:WORDS])
