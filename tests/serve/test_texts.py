"""Texts over HTTP are those of `Model.generate`, as OpenAI's client reads them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.runtime import Model, Rule, Sampling, load
from tests.serve.conftest import Start
from tests.serve.servers import Server
from tests.vision_models import make_images

PROMPT = "def f("
TURN = [{"role": "user", "content": "What is it?"}]


@pytest.fixture
def client(talker: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{talker.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(chat_bundle: Bundle) -> Iterator[Model]:
    with load(chat_bundle) as model:
        yield model


def test_a_completion_is_what_the_model_writes(client: openai.OpenAI, model: Model) -> None:
    found = client.completions.create(model="talker", prompt=PROMPT, max_tokens=20)
    made = model.generate(PROMPT, max_new_tokens=20).finish()
    [choice] = found.choices
    assert choice.text == made.texts[0] and choice.finish_reason == "length"
    assert found.object == "text_completion" and found.model == "talker"
    assert found.usage is not None and found.usage.prompt_tokens == len(model.encode(PROMPT))
    assert found.usage.completion_tokens == 20
    about: Any = found.edgeexit  # type: ignore[attr-defined]
    assert sum(about["exits"].values()) == 20 and about["mode"] == "exact"


def test_without_a_limit_completions_are_short_and_chats_fill_the_capacity(
    client: openai.OpenAI, model: Model
) -> None:
    short = client.completions.create(model="talker", prompt=PROMPT)
    assert short.usage is not None and short.usage.completion_tokens == 16
    chat = client.chat.completions.create(model="talker", messages=TURN)  # type: ignore[arg-type]
    assert chat.usage is not None and chat.usage.total_tokens == model.capacity
    assert chat.choices[0].finish_reason == "length"


def test_a_stream_has_the_same_text_and_its_usage(client: openai.OpenAI, model: Model) -> None:
    stream = client.chat.completions.create(
        model="talker",
        messages=TURN,  # type: ignore[arg-type]
        max_completion_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    made = model.chat(TURN, max_new_tokens=24).finish()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == made.texts[0]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert len(chunks) > 3 and len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_has_none(talker: Server) -> None:
    events = talker.complete(PROMPT, stream=True, max_tokens=5).events
    assert all("usage" not in event for event in events)
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("streams", [False, True])
def test_stop_strings_end_a_text_and_are_not_part_of_it(
    client: openai.OpenAI, model: Model, streams: bool
) -> None:
    whole = model.generate(PROMPT, max_new_tokens=20).finish().texts[0]
    stop = whole[6:8]
    found: Any = client.completions.create(
        model="talker", prompt=PROMPT, max_tokens=20, stop=["no such", stop], stream=streams
    )
    texts = [choice for one in (found if streams else [found]) for choice in one.choices]
    assert "".join(one.text for one in texts) == whole[: whole.index(stop)]
    assert texts[-1].finish_reason == "stop"


def test_a_stop_string_at_the_last_token_is_a_stop(talker: Server, model: Model) -> None:
    made = model.generate(PROMPT, max_new_tokens=8).finish()
    last = made.texts[0][-1]
    length = made.texts[0].index(last) + 1  # of single-byte tokens
    found = talker.complete(PROMPT, max_tokens=length, stop=last).json["choices"][0]
    assert found["finish_reason"] == "stop" and found["text"] == made.texts[0][: length - 1]


def test_sampling_is_that_of_the_model_for_a_seed(client: openai.OpenAI, model: Model) -> None:
    settings = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
    found = client.completions.create(
        model="talker",
        prompt=PROMPT,
        max_tokens=20,
        extra_body={"top_k": 40, "repetition_penalty": 1.1},
        **settings,  # type: ignore[arg-type]
    )
    sampling = Sampling(**settings, top_k=40, repetition_penalty=1.1)  # type: ignore[arg-type]
    made = model.generate(PROMPT, max_new_tokens=20, sampling=sampling, mode="exact").finish()
    assert found.choices[0].text == made.texts[0]


def test_without_a_seed_every_text_is_another(talker: Server) -> None:
    texts = {talker.complete(PROMPT, temperature=2.0).json["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("streams", [False, True])
def test_several_prompts_have_a_choice_each(talker: Server, model: Model, streams: bool) -> None:
    prompts = [PROMPT, "class A", "x = 1"]
    found = talker.complete(prompts, max_tokens=9, stream=streams)
    answers = found.events if streams else [found.json]
    texts = ["", "", ""]
    for choice in (choice for answer in answers for choice in answer["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == [
        model.generate(prompt, max_new_tokens=9).finish().texts[0] for prompt in prompts
    ]


def test_token_ids_are_prompts_too(talker: Server, model: Model) -> None:
    ids = model.encode(PROMPT)
    one = talker.complete(ids, max_tokens=9).json
    assert one["choices"] == talker.complete(PROMPT, max_tokens=9).json["choices"]
    assert len(talker.complete([ids, ids[:2]], max_tokens=9).json["choices"]) == 2


def test_a_conversation_computes_only_what_is_new(talker: Server, model: Model) -> None:
    def answer(turns: list[dict[str, str]]) -> Any:
        return talker.ask("/v1/chat/completions", {"messages": turns, "max_tokens": 3}).json

    system = {"role": "system", "content": "I"}
    first_turns = [system, {"role": "user", "content": "abcdefghijklmnop?"}]
    first = answer(first_turns)
    answer([system, {"role": "user", "content": "zz?"}])
    said = first["choices"][0]["message"]
    before = [*first_turns, {"role": "assistant", "content": said["content"]}]
    second = answer([*before, {"role": "user", "content": "?"}])
    reused = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert reused >= first["usage"]["prompt_tokens"] > 20
    made = model.chat([*before, {"role": "user", "content": "?"}], max_new_tokens=3).finish()
    assert second["choices"][0]["message"]["content"] == made.texts[0]


def test_messages_come_as_clients_send_them(talker: Server, model: Model) -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    developer = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    body = {"messages": developer, "max_tokens": 6, "tools": None, "n": 1, "user": "me"}
    found = talker.ask("/v1/chat/completions", body).json
    plain = [{"role": "system", "content": "Be kind."}, *TURN]
    made = model.chat(plain, max_new_tokens=6).finish()
    assert found["choices"][0]["message"]["content"] == made.texts[0]
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    found = talker.ask("/v1/chat/completions", {"messages": TURN, "max_tokens": 6} | thinking).json
    made = model.chat(TURN, variables={"enable_thinking": False}, max_new_tokens=6).finish()
    assert found["choices"][0]["message"]["content"] == made.texts[0]


def test_the_model_is_listed(client: openai.OpenAI, talker: Server) -> None:
    [one] = client.models.list().data
    assert one.id == "talker" and client.models.retrieve("talker").id == "talker"
    assert talker.ask("/v1/models/other").json["error"]["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="talker"):
        client.completions.create(model="gpt-4", prompt=PROMPT)


def test_fast_stops_by_the_threshold_of_the_command_line(serve: Start, chat_bundle: Bundle) -> None:
    threshold = 0.05
    server = serve(chat_bundle, "--mode", "fast", "--threshold", str(threshold))
    found = server.complete(PROMPT, max_tokens=20).json
    with load(chat_bundle, policy=Rule(thresholds=threshold)) as model:
        made = model.generate(PROMPT, max_new_tokens=20, mode="fast").finish()
    assert found["choices"][0]["text"] == made.texts[0]
    assert found["edgeexit"]["exits"] == made.statistics.exits
    assert len(made.statistics.exits) > 1
    for name, tokens in made.statistics.exits.items():
        assert server.metric(f'edgeexit_exits_total{{exit="{name}"}}') == tokens
    assert "not calibrated" in server.stop()[1]


def test_images_come_in_messages(serve: Start, vision_bundle: Callable[[str], Bundle]) -> None:
    bundle = vision_bundle("llava")
    server = serve(bundle)
    raw = io.BytesIO()
    [image] = make_images(1)
    image.save(raw, "PNG")
    address = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()

    def ask(url: str) -> Any:
        content = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}
        return server.ask("/v1/chat/completions", {"messages": [turn], "max_tokens": 6})

    found = ask(address)
    assert found.status == 200, found.body
    with load(bundle) as model:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
        made = model.chat([{"role": "user", "content": content}], max_new_tokens=6).finish()
    assert found.json["choices"][0]["message"]["content"] == made.texts[0]
    assert found.json["usage"]["prompt_tokens"] > 5  # the image has tokens, too
    for wrong in ("/etc/passwd", "file:///etc/passwd", "https://example.com/cat.png"):
        refused = ask(wrong)
        assert refused.status == 400 and "only images in the request" in refused.message
    for wrong in ("data:image/png;base64,!!!", "data:image/png;base64,AAAA"):
        assert ask(wrong).status == 400
    parts = [{"type": "image", "path": "/etc/passwd"}]
    refused = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert refused.status == 400 and refused.json["error"]["param"] == "messages"
