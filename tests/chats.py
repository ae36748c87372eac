"""A small language model that was taught to chat: chat templates in the styles that are about, the
special tokens they name, and a checkpoint that carries them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from tests.decoders import save_decoder

CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set told = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + told }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=1) + "\\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

STRICT = """\
{# Blocks on lines of their own, a namespace, loop controls, marks for training, a refusal. #}
{{ bos_token }}
{% set seen = namespace(count=0, facts=dict(model='small')) %}
{% for message in messages %}
    {% if message.role == 'note' %}
        {% continue %}
    {% endif %}
    {% if (message.role == 'user') != (seen.count % 2 == 0) %}
        {{ raise_exception('Roles must alternate: user, assistant, user') }}
    {% endif %}
    {% set seen.count = seen.count + 1 %}
    {% if message.role == 'user' %}
[ASK] {{ message.content }} [/ASK]
    {% else %}
        {% generation %}
 {{ message.content }}{{ eos_token }}
        {% endgeneration %}
    {% endif %}
{% endfor %}
{{ seen.facts | tojson }}
"""

WITH_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content %}{{ message.content }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + ' ' + call.function.arguments | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}
"""

TEMPLATES = {"default": CHATML, "llama": LLAMA, "strict": STRICT, "tool_use": WITH_TOOLS}
SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BEGIN, END = "<|begin|>", "<|im_end|>"
TOOL = {
    "type": "function",
    "function": {"name": "naïve<add>", "parameters": {"b": "int", "a": ["x", None, 1.5, True]}},
}


def save_chat_tokenizer(folder: Path) -> None:
    """Gives a checkpoint of `save_decoder` the special tokens of chats. Its tokenizer puts the
    first of them before every prompt."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    tokenizer.save(str(path))


def save_chat(folder: Path, **config: Any) -> Path:
    """Writes a checkpoint that chats, with named templates in ``tokenizer_config.json``; `config`
    replaces what that says."""
    save_decoder("llama", folder)
    save_chat_tokenizer(folder)
    named = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    given = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": {"__type": "AddedToken", "content": END, "special": True},
        "chat_template": named,
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder
