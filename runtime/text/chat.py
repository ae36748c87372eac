"""Converts conversations to prompts, with the bundle's chat templates in a sandbox.

A template is a small Jinja program from the checkpoint, so it is not trusted: it runs in Jinja's
immutable sandbox on copies of the messages, without access to files or Python. It can use the
functions that transformers offers, so that both give the same prompt for a conversation. jinja2 is
imported when a template is first used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeexit.bundle.reader import CHAT_TEMPLATE_LIMIT_BYTES, Bundle
from edgeexit.errors import BundleError, EdgeExitError, EngineError, InputError, UsageError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``; the template may use further keys (``tool_calls``)."""

DEFAULT, TOOL_USE = "default", "tool_use"

_AS_IMAGE = 'Give images as {"type": "image", "path": "cat.jpg"}'
_AS_FRAMES = f"{_AS_IMAGE}: some frames of the video, for example."
_UNREAD = {
    "video": _AS_FRAMES,
    "video_url": _AS_FRAMES,
    "audio": "Give its text.",
    "audio_url": "Give its text.",
    "input_audio": "Give its text.",
    "image_url": f"{_AS_IMAGE}; they are not downloaded.",
    "input_image": f"{_AS_IMAGE}; they are not downloaded.",
}
"""What to give instead of parts of a message that no model here reads."""

_FORM = 'Give a list of {"role": "user", "content": "..."}.'


def conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> Sequence[Sequence[Message]]:
    """A list of conversations, from one conversation or several."""
    several = isinstance(messages, Sequence) and bool(messages)
    several = several and all(isinstance(message, (list, tuple)) for message in messages)
    return messages if several else [messages]  # type: ignore[return-value,list-item]


class ChatTemplates:
    """A bundle's chat templates. Each is compiled when it is first used."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation; see `Model.chat_prompt`."""
        chat = self._bundle.manifest.chat
        if chat is None:
            raise InputError(
                f"{self._bundle.path}: the bundle has no chat template",
                fix="Give prompts instead (generate, --prompt without --chat), or export a "
                "checkpoint whose tokenizer has one.",
            )
        for name in variables or ():
            if name in ("messages", "tools"):
                raise UsageError(
                    f"variables contains {name!r}, which is a separate argument",
                    fix=f"Use the argument {name}.",
                )
        values = {
            **chat.tokens,
            "documents": None,
            "add_generation_prompt": True,
            **{name: _plain(value, name) for name, value in (variables or {}).items()},
            "messages": _checked(messages),
            "tools": None if tools is None else _checked_tools(tools),
        }
        name = _choose(chat.templates, template, with_tools=tools is not None)
        compiled = self._compile(name, chat.templates[name])
        try:
            prompt = compiled.render(values)
        except EdgeExitError:
            raise
        except Exception as error:  # a template can raise any exception of Python's operators
            fix = "Use the message format that the model was trained with; `edgeexit inspect` "
            fix += "lists the templates."
            if type(error).__name__ == "UndefinedError":
                fix += " Further variables: variables={...} (--chat-template-kwargs)."
            raise InputError(
                f"{chat.templates[name]}: the chat template fails on these messages "
                f"({type(error).__name__}: {error})",
                fix=fix,
            ) from error
        if not prompt.strip():
            raise InputError(
                f"{chat.templates[name]}: the chat template makes an empty prompt of these "
                "messages",
                fix="Name another template, or correct the checkpoint's and export again.",
            )
        return prompt

    def _compile(self, name: str, path: str) -> jinja2.Template:
        if name not in self._compiled:
            environment = _environment(path)
            raw = self._bundle.read(path, limit_bytes=CHAT_TEMPLATE_LIMIT_BYTES)
            try:
                self._compiled[name] = environment.from_string(raw.decode())
            except Exception as error:  # Jinja's exceptions, and those of Python's compiler
                where = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
                raise BundleError(
                    f"{path}: Jinja cannot read this chat template{where}: {error}",
                    fix="Correct the checkpoint's chat template, then export again.",
                ) from error
        return self._compiled[name]


def _choose(templates: Mapping[str, str], wanted: str | None, *, with_tools: bool) -> str:
    """The template to use, chosen as transformers does."""
    if wanted is None:
        wanted = TOOL_USE if with_tools and TOOL_USE in templates else DEFAULT
    if wanted not in templates:
        raise UsageError(
            f"there is no chat template {wanted!r}; the bundle has {', '.join(sorted(templates))}",
            fix="Use one of them: template=... (--chat-template).",
        )
    return wanted


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies of messages, without keys whose value is None. Raises `InputError` for invalid
    messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InputError(f"messages is a {type(messages).__name__}", fix=_FORM)
    if not messages:
        raise InputError("there are no messages", fix=_FORM)
    copies = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{where} is a {type(message).__name__}, not a message", fix=_FORM)
        copy = {k: v for k, v in _plain(message, where).items() if v is not None}
        if not isinstance(copy.get("role"), str) or not copy["role"]:
            raise InputError(f"{where} has no role", fix=_FORM)
        if "content" not in copy and "tool_calls" not in copy:
            raise InputError(f"{where} has no content", fix=_FORM)
        if not isinstance(copy.get("content", ""), (str, list)):
            raise InputError(
                f"{where}: its content is a {type(copy['content']).__name__}, not a text", fix=_FORM
            )
        _check_parts(copy.get("content"), where)
        copies.append(copy)
    return copies


def _check_parts(content: Any, where: str) -> None:
    """Raises `InputError` for a part of a message that is neither a text nor an image. A template
    would leave it out, or write it without what it means."""
    for number, part in enumerate(content if isinstance(content, list) else ()):
        fix = f'Give parts as {{"type": "text", "text": "..."}}. {_AS_IMAGE}.'
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            what = "has no type"
        elif part["type"] == "text" and not isinstance(part.get("text"), str):
            what = "has no text"
        elif part["type"] not in ("text", "image"):
            what = f"is of type {part['type'][:60]!r}, which is not supported"
            fix = _UNREAD.get(part["type"], fix)
        else:
            continue
        raise InputError(f"{where}['content'][{number}] {what}", fix=fix)


def _checked_tools(tools: Any) -> Any:
    """Copies of tools. Raises `InputError` unless they are a list of JSON schemas."""
    if not isinstance(tools, (list, tuple)) or not all(isinstance(t, Mapping) for t in tools):
        kind = type(tools).__name__
        raise InputError(
            f"tools is a {kind}, not a list of JSON schemas"
            if not isinstance(tools, (list, tuple))
            else "tools has an entry that is not a JSON schema",
            fix='Give [{"type": "function", "function": {"name": "...", ...}}].',
        )
    return _plain(tools, "tools")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in Python's built-in types, so that templates get no objects with other methods."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if depth < 32 and isinstance(value, Mapping):
        return {
            _key(key, where): _plain(v, f"{where}[{key!r}]", depth + 1) for key, v in value.items()
        }
    if depth < 32 and isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{n}]", depth + 1) for n, item in enumerate(value)]
    what = "is nested too deeply" if depth == 32 else f"is a {type(value).__name__}"
    raise InputError(
        f"{where[:200]} {what}", fix="Use JSON values: texts, numbers, lists, dictionaries."
    )


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"{where} has the key {key!r}, not a text", fix="Use texts as keys.")
    return str.__str__(key)


def _environment(path: str) -> jinja2.Environment:
    """The sandbox that a template runs in."""
    try:
        from edgeexit.runtime.text.chat_environment import make_environment
    except ImportError as error:
        raise EngineError(
            f"chat templates need jinja2, which cannot be imported ({error})",
            fix='Install it: pip install "edgeexit[text]".',
        ) from error
    return make_environment(path)
