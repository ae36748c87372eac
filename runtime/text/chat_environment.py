"""The sandbox of chat templates: Jinja's, with the functions that transformers offers to templates.

This module imports jinja2, so `edgeexit.runtime.text.chat` imports it when a template is first
used.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from edgeexit.errors import EngineError, InputError

OLDEST_JINJA = (3, 1, 6)
"""Templates can escape the sandbox of older versions (CVE-2025-27516)."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the model's answers, for training; it has no effect here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that start with an underscore: Jinja calls those unchecked."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace cannot contain {name!r}")
        super().__setitem__(name, value)


def make_environment(path: str) -> jinja2.Environment:
    """The sandbox for the template in the bundle's file `path`, which its errors name.

    Raises:
        EngineError: jinja2 is too old to be safe.
    """
    version = importlib.metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST_JINJA:
        raise EngineError(
            f"chat templates need jinja2 {'.'.join(map(str, OLDEST_JINJA))} or newer for its "
            f"sandbox; {version} is installed",
            fix='Install it: pip install "edgeexit[text]".',
        )

    def raise_exception(message: object) -> None:
        raise InputError(
            f"{path}: the chat template rejects the messages: {message}",
            fix="Use the message format that the model was trained with.",
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        namespace=Namespace,
        dict=_make_dict,
        raise_exception=raise_exception,
        strftime_now=_strftime_now,
    )
    return environment


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # not the type, which has methods that change dictionaries


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter also escapes HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


__all__ = ["make_environment"]
