"""Requests that cannot be answered: what is wrong is said, in OpenAI's form, and nothing breaks."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from edgeexit.bundle.reader import Bundle
from tests.serve.conftest import Start
from tests.serve.servers import Server

CHATS = "/v1/chat/completions"
TURN = {"messages": [{"role": "user", "content": "a"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}

COMPLETIONS = {
    "no prompt": ({}, "prompt: Field required"),
    "an empty prompt": ({"prompt": []}, "1 to 64"),
    "too many prompts": ({"prompt": ["a"] * 65}, "1 to 64"),
    "a number": ({"prompt": 5}, "prompt"),
    "unknown tokens": ({"prompt": [5, 4000]}, "4000"),
    "negative tokens": ({"prompt": [-1]}, "-1"),
    "no tokens": ({"prompt": [[]]}, "empty"),
    "max_tokens 0": ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    "max_tokens as text": ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    "max_tokens true": ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature"),
    "top_p": ({"prompt": "a", "top_p": 1.5}, "top_p"),
    "top_k": ({"prompt": "a", "top_k": 1.5}, "top_k"),
    "seed": ({"prompt": "a", "seed": -3}, "seed"),
    "an empty stop": ({"prompt": "a", "stop": ""}, "stop"),
    "many stops": ({"prompt": "a", "stop": ["b"] * 17}, "17 strings"),
    "a special stop": ({"prompt": "a", "stop": "x<|im_end|>"}, "special token"),
    "half a character": ({"prompt": "\ud800"}, "Unicode"),
    "an endless prompt": ({"prompt": "ab" * 50_000}, "100000 characters"),
    "n": ({"prompt": "a", "n": 2}, "n is not supported"),
    "echo": ({"prompt": "a", "echo": True}, "echo is not supported"),
    "logprobs": ({"prompt": "a", "logprobs": 0}, "logprobs is not supported"),
    "penalty": ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty is not supported"),
    "a slip": ({"prompt": "a", "max_token": 5}, "max_token: unknown parameter"),
    "deadline": ({"prompt": "a", "deadline_s": -1}, "deadline_s"),
    "stream_options": ({"prompt": "a", "stream_options": 1}, "stream_options"),
}

CONVERSATIONS = {
    "no messages": ({}, "messages: Field required"),
    "empty": ({"messages": []}, "messages"),
    "no role": ({"messages": [{"content": "a"}]}, "messages.0.role"),
    "no content": ({"messages": [{"role": "user"}]}, "no content"),
    "a number": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    "audio": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "input_audio",
    ),
    "no images here": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image"),
    "tools": (TURN | {"tools": [{"type": "function"}]}, "tools is not supported"),
    "json": (TURN | {"response_format": {"type": "json_object"}}, "response_format is not"),
    "logprobs": (TURN | {"logprobs": True}, "logprobs is not supported"),
    "a template that fails": (TURN | {"chat_template_kwargs": {"messages": 1}}, "messages"),
}


@pytest.fixture
def client(talker: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{talker.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_that_cannot_be(talker: Server, name: str, streams: bool) -> None:
    body, said = COMPLETIONS[name]
    refused = talker.ask("/v1/completions", {**body, "stream": streams})
    assert refused.status == 400 and refused.json["error"]["type"] == "invalid_request_error"
    assert said in refused.message and refused.message.endswith(".")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_that_cannot_be(talker: Server, name: str) -> None:
    body, said = CONVERSATIONS[name]
    refused = talker.ask(CHATS, body)
    assert refused.status == 400, refused.body
    assert said in refused.message and refused.message.endswith(".")


def test_parameters_that_ask_for_nothing_are_taken(talker: Server) -> None:
    neutral = {
        "n": 1,
        "best_of": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "store": False,
        "seed": None,
        "stop": None,
    }
    assert talker.complete("a", max_tokens=1, **neutral).status == 200
    assert talker.ask(CHATS, TURN | {"max_tokens": 1, "tools": [], "tool_choice": "none"}).status


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="96 tokens at most") as raised:
        client.completions.create(model="talker", prompt="a", max_tokens=500)
    assert raised.value.code == "context_length_exceeded" and raised.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="Shorten the prompt"):
        client.completions.create(model="talker", prompt="a" * 200, stream=True)


def test_other_methods_paths_and_bodies(talker: Server) -> None:
    assert talker.ask("/v1/completions").status == 405
    missing = talker.ask("/v1/embeddings", {"input": "a"})
    assert missing.status == 404 and "/v1/chat/completions" in missing.message
    json_type = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"prompt": 1e999}'):
        assert talker.ask("/v1/completions", body, json_type).status == 400
    assert talker.ask("/v1/completions", b'{"prompt": "a"}').status == 400
    assert talker.complete("a", max_tokens=1).status == 200


def test_without_chat_templates_completions_still_work(
    serve: Start, decoder_bundle, chat_bundle: Bundle
) -> None:
    server = serve(decoder_bundle("llama"))
    refused = server.ask(CHATS, TURN)
    assert refused.status == 400 and "no chat template" in refused.message
    assert server.complete("a", max_tokens=2).status == 200
    assert server.ask("/v1/models").json["data"][0]["edgeexit"]["chats"] is False


def test_the_log_has_no_texts(serve: Start, chat_bundle: Bundle) -> None:
    server = serve(chat_bundle, "-v")
    server.complete("a secret", max_tokens=2)
    server.complete("a secret", max_tokens=2000)
    _, errors = server.stop()
    assert "POST '/v1/completions' 200" in errors and "400" in errors and "secret" not in errors
