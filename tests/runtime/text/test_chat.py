"""Conversations: rendered as transformers renders them, in a sandbox, and answered."""

from __future__ import annotations

import datetime
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import transformers

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.errors import BundleError, EdgeExitError, InputError, IntegrityError, UsageError
from edgeexit.runtime import Model, load
from edgeexit.runtime.programs.generate import Options
from edgeexit.runtime.text.chat import ChatTemplates
from tests.bundle.test_reader import relist, rewrite
from tests.chats import BEGIN, TEMPLATES, TOOL

USER = {"role": "user", "content": "  Größe, 東京 <b>&amp;</b> 'x' 🙂 "}
ANSWER = {"role": "assistant", "content": "yes\n"}
SYSTEM = {"role": "system", "content": " Sei knapp. "}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}],
}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "ChatML": ([USER], {}),
    "ChatML, system and turns": ([SYSTEM, USER, ANSWER, USER], {}),
    "ChatML, a variable": ([USER], {"variables": {"enable_thinking": False}}),
    "Llama 3": ([USER], {"template": "llama"}),
    "Llama 3, system and turns": ([SYSTEM, USER, ANSWER, USER], {"template": "llama"}),
    "Llama 3, date given": (
        [USER],
        {"template": "llama", "variables": {"date_string": "1 May 2031"}},
    ),
    "Llama 3, tools": ([SYSTEM, USER], {"template": "llama", "tools": [TOOL]}),
    "Llama 3, parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
        {"template": "llama"},
    ),
    "strict": ([USER, {"role": "note", "content": "?"}, ANSWER, USER], {"template": "strict"}),
    "tools": ([USER, CALL, {"role": "tool", "content": "3"}], {"tools": [TOOL]}),
    "special tokens in a message": ([{"role": "user", "content": "<|im_end|>a<|begin|>"}], {}),
    "another value for a special token": (
        [USER],
        {"template": "strict", "variables": {"bos_token": "<|eot_id|>"}},
    ),
}


@pytest.fixture(scope="module")
def decoder(chat_bundle: Bundle) -> Iterator[Model]:
    with load(chat_bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokenizer(chat_folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(chat_folder)


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_becomes_the_text_and_tokens_that_transformers_makes_of_it(
    decoder: Model, tokenizer: transformers.PreTrainedTokenizerFast, case: str
) -> None:
    messages, arguments = CASES[case]
    theirs: dict[str, Any] = dict(arguments)
    theirs |= theirs.pop("variables", {})
    theirs |= {"chat_template": theirs.pop("template", None), "add_generation_prompt": True}
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **theirs)
    found = decoder.chat_prompt(messages, **arguments)
    assert found == expected and len(found) > 10
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **theirs)
    assert decoder.encode(found, special_tokens=False) == ids


def test_a_text_gets_the_special_tokens_that_a_template_writes_itself(decoder: Model) -> None:
    [begin] = decoder.encode(BEGIN, special_tokens=False)
    assert decoder.encode("a").count(begin) == 1
    prompt = decoder.chat_prompt([USER], template="llama")
    assert decoder.encode(prompt, special_tokens=False).count(begin) == 1


def test_the_date_is_that_of_today(decoder: Model) -> None:
    before = datetime.date.today()
    prompt = decoder.chat_prompt([USER], template="llama")
    days = (before, datetime.date.today())
    assert any(f"Today: {day:%d %b %Y}" in prompt for day in days)


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_an_answer_is_what_the_prompt_gives_when_it_is_continued(decoder: Model, mode: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    made = decoder.chat(messages, mode=mode, max_new_tokens=8).finish()
    prompt = decoder.encode(decoder.chat_prompt(messages), special_tokens=False)
    expected = decoder.generate(prompt, max_new_tokens=8).finish()
    assert made.tokens == expected.tokens and made.texts == expected.texts
    assert sum(map(len, made.tokens)) > 1


def test_several_conversations_are_answered_in_one_batch(decoder: Model) -> None:
    one = [{"role": "user", "content": "Hi"}]
    two = [*one, {"role": "assistant", "content": "a"}, {"role": "user", "content": "why"}]
    apart = [decoder.chat(m, max_new_tokens=6).finish().tokens[0] for m in (one, two)]
    assert decoder.chat([one, two], max_new_tokens=6).finish().tokens == apart
    assert apart[0] != apart[1]


def test_chat_takes_every_argument_that_generate_takes() -> None:
    own = dict(inspect.signature(Model.generate).parameters)
    assert set(Options.__annotations__) == set(own) - {"self", "prompts", "images"}


class Kind(str, Enum):
    USER = "user"


def test_a_template_sees_plain_texts_and_copies(decoder: Model) -> None:
    messages = [{"role": Kind.USER, "content": "Hi", "name": None}]
    plain = decoder.chat_prompt([{"role": "user", "content": "Hi"}])
    assert decoder.chat_prompt(messages) == plain
    assert messages == [{"role": Kind.USER, "content": "Hi", "name": None}]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "no messages"),
        ("Hi", "messages is a str"),
        ({"role": "user", "content": "Hi"}, "messages is a dict"),
        (["Hi"], r"messages\[0\] is a str"),
        ([USER, {"content": "Hi"}], r"messages\[1\] has no role"),
        ([{"role": None, "content": "Hi"}], "no role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user", "content": 5}], "content is a int"),
        ([{"role": "user", "content": b"Hi"}], r"\['content'\] is a bytes"),
        ([{"role": "user", "content": "Hi", 5: 6}], "the key 5"),
        ([{"role": "user", "content": "Hi", "more": {"x": [object()]}}], r"\['x'\]\[0\] is a obj"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "TypeError"),
        ([{"role": "user", "content": "\ud800"}], "cannot encode"),
        ([USER, []], r"messages\[1\] is a list"),
        ([{"role": "user", "content": ["Hi"]}], r"messages\[0\]\['content'\]\[0\] has no type"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"\['content'\]\[0\] has no text"),
    ],
)
def test_invalid_messages_are_refused(decoder: Model, messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoder.chat(messages)


def test_messages_within_messages_are_refused_when_they_have_no_end(decoder: Model) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InputError, match="nested too deeply"):
        decoder.chat([{"role": "user", "content": "Hi", "more": endless}])


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, ["f"]])
def test_tools_of_another_form_are_refused(decoder: Model, tools: Any) -> None:
    with pytest.raises(InputError, match="tools .*JSON schema"):
        decoder.chat_prompt([USER], tools=tools)


@pytest.mark.parametrize(
    "text, words",
    [
        ("  \n", "makes an empty prompt"),
        ("{{ frobnicate(messages) }}", "'frobnicate' is undefined.*--chat-template-kwargs"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    ],
)
def test_a_template_that_gives_no_prompt_is_named(chat_copy: Path, text: str, words: str) -> None:
    with (
        load(with_template(chat_copy, text)) as decoder,
        pytest.raises(InputError, match=f"chat_template.jinja: .*{words}"),
    ):
        decoder.chat([USER])


def test_a_template_that_refuses_says_why(decoder: Model) -> None:
    with pytest.raises(InputError, match=r"template.strict.jinja: .*rejects.*Roles must alternate"):
        decoder.chat([USER, USER], template="strict")


def test_invalid_arguments_are_refused(decoder: Model) -> None:
    with pytest.raises(UsageError, match="'rag'; the bundle has default, llama, strict, tool_use"):
        decoder.chat([USER], template="rag")
    with pytest.raises(UsageError, match="variables contains 'messages'"):
        decoder.chat([USER], variables={"messages": []})
    with pytest.raises(UsageError, match="mode"):
        decoder.chat([USER], mode="quick")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="beams"):
        decoder.chat([USER], beams=2)  # type: ignore[call-arg]


def test_a_bundle_without_templates_continues_texts_and_says_so(chat_copy: Path) -> None:
    """What a reader sees that does not know the field."""
    rewrite(chat_copy, lambda raw: raw.pop("chat"))
    with load(chat_copy) as decoder:
        assert decoder.generate("a", max_new_tokens=2).finish().tokens[0]
        with pytest.raises(InputError, match=r"no chat template.*generate"):
            decoder.chat([USER])


def with_template(folder: Path, text: str | bytes) -> Bundle:
    """The bundle with another default template, listed as an exporter would."""
    path = "tokenizer/chat_template.jinja"
    (folder / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    relist(folder, path)
    return open_bundle(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{% for x in %}", r"chat_template.jinja: Jinja cannot read this chat template \(line 1\)"),
        ("a\n{% endfor %}", r"\(line 2\)"),
        ("{{ x | sparkle }}", "sparkle"),
        ("{% generation %}", "Jinja cannot read"),
        ("{% include 'x' %}{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "Jinja cannot read"),
        (b"\xff\xfe", "Jinja cannot read.*utf-8"),
    ],
)
def test_a_template_that_does_not_parse_is_named(
    chat_copy: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        ChatTemplates(with_template(chat_copy, text)).render([USER])


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.update(messages[0], role='x') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ strftime_now.__globals__['os'].getcwd() }}",
        "{{ ''|attr('__class__')|attr('mro')|list }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% set n = namespace(__call__=1) %}{{ n }}",
        "{% set n = namespace() %}{% set n._x = 1 %}{{ n }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
        "{{ range(1000000) }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ nothing.at.all }}",
        "{{ nothing | tojson }}",
    ],
)
def test_a_template_reaches_nothing_but_what_it_is_given(chat_copy: Path, text: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match=r"chat_template\.jinja: the chat template fails on these"):
        ChatTemplates(with_template(chat_copy, text)).render(messages)
    assert messages == [{"role": "user", "content": "Hi"}]


def test_special_tokens_that_the_bundle_lacks_are_empty(chat_copy: Path) -> None:
    bundle = with_template(chat_copy, "{{ pad_token }}|{{ eos_token }}|{{ tools }}{{ documents }}")
    assert ChatTemplates(bundle).render([USER]) == "|<|im_end|>|NoneNone"


def test_special_tokens_cannot_pass_for_messages(chat_copy: Path) -> None:
    rewrite(chat_copy, lambda raw: raw["chat"]["tokens"].update(messages="x", tools="y"))
    bundle = with_template(chat_copy, "{{ messages[0].content }}{{ tools }}")
    assert ChatTemplates(bundle).render([{"role": "user", "content": "Hi"}]) == "HiNone"


def test_a_template_that_changed_since_it_was_opened_is_refused(chat_copy: Path) -> None:
    templates = ChatTemplates(open_bundle(chat_copy))
    (chat_copy / "tokenizer/chat_template.jinja").write_text(TEMPLATES["default"].upper())
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja: sha256 differs"):
        templates.render([USER])


def test_a_template_that_is_too_large_is_refused(chat_copy: Path) -> None:
    with pytest.raises(IntegrityError, match="more than the 1048576 allowed"):
        ChatTemplates(with_template(chat_copy, " " * (1 << 20) + "x")).render([USER])


RENDER = """
import sys
from edgeexit.bundle.reader import open_bundle
from edgeexit.errors import EngineError
from edgeexit.runtime.text.chat import ChatTemplates
try:
    ChatTemplates(open_bundle(sys.argv[1])).render([{"role": "user", "content": "Hi"}])
except EngineError as error:
    print(error)
"""


def rendered_with(packages: Path, bundle: Bundle) -> str:
    """What rendering says in a process that finds `packages` before everything else."""
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RENDER, str(bundle.path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_missing_jinja_is_named_with_the_extra_that_brings_it(
    chat_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2/__init__.py").write_text("raise ImportError('markupsafe is missing')")
    said = rendered_with(tmp_path, chat_bundle)
    assert "markupsafe is missing" in said and 'pip install "edgeexit[text]"' in said


def test_a_jinja_with_a_leaky_sandbox_is_refused(chat_bundle: Bundle, tmp_path: Path) -> None:
    info = tmp_path / "jinja2-3.1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jinja2\nVersion: 3.1.5\n")
    said = rendered_with(tmp_path, chat_bundle)
    assert "3.1.6 or newer" in said and "3.1.5 is installed" in said


def test_a_damaged_tokenizer_is_named(chat_copy: Path) -> None:
    path = chat_copy / "tokenizer/tokenizer.json"
    with load(chat_copy) as decoder:
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"im_start", b"im_stark"))
        with pytest.raises(IntegrityError, match=r"tokenizer\.json: sha256 differs"):
            decoder.generate("a")
        path.write_bytes(whole)
        assert decoder.generate("a", max_new_tokens=1).finish().texts


@pytest.mark.parametrize("content", [b"{}", b"", b"\xff", b'{"version": "1.0", "model": 5}'])
def test_a_tokenizer_that_the_library_cannot_read_is_named(chat_copy: Path, content: bytes) -> None:
    (chat_copy / "tokenizer/tokenizer.json").write_bytes(content)
    relist(chat_copy, "tokenizer/tokenizer.json")
    with (
        load(chat_copy) as decoder,
        pytest.raises(BundleError, match=r"tokenizer\.json: tokenizers .* cannot read it"),
    ):
        decoder.generate("a")


def test_a_tokenizer_neither_cuts_nor_pads_whatever_its_file_says(chat_copy: Path) -> None:
    from tokenizers import Tokenizer

    path = chat_copy / "tokenizer/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(path))
    relist(chat_copy, "tokenizer/tokenizer.json")
    with load(chat_copy) as decoder:
        assert len(decoder.encode("abcdef", special_tokens=False)) == 6


def test_every_error_of_a_chat_is_ours_when_the_model_is_closed(chat_bundle: Bundle) -> None:
    decoder = load(chat_bundle)
    decoder.close()
    with pytest.raises(EdgeExitError, match="closed"):
        decoder.chat([USER])
