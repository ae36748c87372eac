"""Language models on the command line: export, check, inspect, text in and out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeexit.bundle.policy import Policy, Rule, write_policy
from edgeexit.bundle.reader import Bundle, open_bundle
from tests.chats import TEMPLATES
from tests.decoder_toys import make_decoder_toy, write_decoder_toy
from tests.decoder_words import write_with_words
from tests.e2e.conftest import Cli, Ran

Here = Callable[..., Ran]


@pytest.fixture
def writer(decoder_bundle: Callable[[str], Bundle]) -> Path:
    return decoder_bundle("llama").path


def test_a_checkpoint_becomes_a_bundle_when_layers_are_named(
    cli: Cli, run_here: Here, chat_folder: Path, tmp_path: Path
) -> None:
    folder = chat_folder
    refused = run_here("export", "-m", folder, "-o", tmp_path / "bundle")
    assert refused.code == 1 and "as in 1,2 (--exits)" in refused.err
    assert not (tmp_path / "bundle").exists()
    made = run_here(
        *("export", "-m", folder, "--exits", "2", "--dtype", "fp16"),
        *("-o", tmp_path / "bundle", "--json"),
    )
    assert made.code == 0
    assert made.json["exits"] == ["exit_2", "exit_4"]
    manifest = open_bundle(tmp_path / "bundle", verify="full").manifest
    assert manifest.chat is not None and set(manifest.chat.templates) == set(TEMPLATES)
    assert all(path in manifest.files for path in manifest.chat.templates.values())
    # The model's own end, and the tokenizer's, which ends a turn.
    assert manifest.decoding is not None and manifest.decoding.stop_tokens == [0, 259]
    checked = cli("check", tmp_path / "bundle", "--json")
    assert checked.code == 0 and checked.json["passed"]
    assert checked.json["atol"] == 4e-2
    written = cli("run", tmp_path / "bundle", "--prompt", "def f(", "--max-new-tokens", "4")
    assert written.code == 0 and written.out.startswith("def f(")


def test_check_compares_every_exit_and_inspect_shows_the_caches(cli: Cli, writer: Path) -> None:
    checked = cli("check", writer, "--json")
    assert checked.code == 0 and checked.json["passed"]
    places = {one["where"] for one in checked.json["comparisons"]}
    assert places == {"exit_1", "exit_2", "exit_4", "exact", "unsplit"}
    shown = cli("inspect", writer, "--json").json
    components = shown["chains"]["main"]["components"]
    assert [one["state_bytes_per_token"] for one in components] == [256, 256, 512]
    for one in components:
        assert [form["states"] for form in one["graphs"]] == ["in-place", "fixed", "append"]
    assert checked.json["engine"]["states"] == "in-place"
    assert "512 B (in-place, fixed, append)" in cli("inspect", writer).out


def test_inspect_tells_what_a_text_costs(cli: Cli, run_here: Here, writer: Path) -> None:
    shown = cli("inspect", writer, "--capacity", "64", "--axis", "batch=2")
    assert shown.code == 0 and "2 texts of 64 tokens (--capacity):" in shown.out
    assert "states 128.0 KiB (1.0 KiB per token)" in shown.out
    assert "prompt of 63 tokens: " in shown.out and "next token behind 63 tokens: " in shown.out
    text = run_here("inspect", writer, *("--capacity", "64", "--threads", "brief", "--json")).json[
        "text"
    ]
    assert text["memory"]["states_bytes"] == 64 * 1024 and text["time"]["prefill_ms"] > 0
    refused = run_here("inspect", writer, "--capacity", "0")
    assert refused.code == 2 and "capacity 0 is out of range (2 to " in refused.err
    assert not refused.out


def test_what_only_draws_are_for_is_refused_where_none_are(cli: Cli, writer: Path) -> None:
    refused = cli("run", writer, "--prompt", "a", "--top-k", "5")
    assert refused.code == 2 and "Add --temperature" in refused.err and not refused.out


def test_what_the_checkpoint_says_of_sampling_is_done_and_said(
    cli: Cli, run_here: Here, decoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(decoder_folder("llama"), tmp_path / "checkpoint"))
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    made = run_here("export", "-m", folder, "--exits", "2", "-o", tmp_path / "bundle")
    assert made.code == 0
    run = ("run", tmp_path / "bundle", "--prompt", "a", "--max-new-tokens", "12", "--json")
    own = cli(*run, "--seed", "3")
    assert "sampling settings of the checkpoint: temperature 0.7, top_k 50, top_p 0.9" in own.err
    again = cli(*run, "--seed", "3", "--temperature", "0.7")
    assert again.json["texts"] == own.json["texts"] and "temperature" not in again.err
    greedy = cli(*run, "--temperature", "0")
    assert greedy.code == 0 and greedy.json["texts"] != own.json["texts"]
    assert greedy.json["texts"] == cli(*run, "--temperature", "1e-9").json["texts"]
    assert "temperature" not in greedy.err
    first = cli(*run, "--seed", "0")
    assert "seed" not in first.err and first.json["texts"] == cli(*run).json["texts"]


def test_exits_with_adapters_are_exported_checked_and_shown(
    cli: Cli, run_here: Here, decoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, bundle = decoder_folder("llama"), tmp_path / "bundle"
    refused = run_here("export", "-m", folder, "--exits", "1,2", "--adapters", "2", "-o", bundle)
    assert refused.code == 2 and "--untrained-exits" in refused.err and not bundle.exists()
    wrong = run_here("export", "-m", folder, "--exits", "1,2", "--adapters", "all", "-o", bundle)
    assert wrong.code == 2 and '"none"' in wrong.err
    made = run_here(
        "export", "-m", folder, "--untrained-exits", "1,2", "--adapters", "2", "-o", bundle
    )
    assert made.code == 0 and "the exits are untrained" in made.err
    checked = cli("check", bundle, "--json")
    assert checked.code == 0 and checked.json["passed"]
    assert any("drafted by exit_2" in one["what"] for one in checked.json["comparisons"])
    components = cli("inspect", bundle, "--json").json["chains"]["main"]["components"]
    [one], [two], [last] = ([e["path"] for e in c["exits"]] for c in components)
    assert len(one) == len(last) == 1
    assert two[0]["name"] == "adapter_2" and two[0]["state_bytes_per_token"] == 256
    shown = cli("inspect", bundle)
    assert "exit_2 has an adapter" in shown.out and "256 B per token" in shown.out
    ran = cli(
        "run", bundle, "--prompt", "def f(", "--mode", "exact", "--draft-exit", "exit_2", "--json"
    )
    full = cli("run", bundle, "--prompt", "def f(", "--json")
    assert ran.code == 0 and ran.json["texts"] == full.json["texts"]
    assert "untrained" not in full.err
    fast = cli("run", bundle, "--prompt", "def f(", "--mode", "fast", "--threshold", "0")
    assert "the early exits of this bundle are untrained" in fast.err
    assert "the thresholds are not calibrated" in fast.err


def test_the_modes_write_text_and_say_where_it_came_from(cli: Cli, writer: Path) -> None:
    common = ("run", writer, "--prompt", "def f(", "--max-new-tokens", "12", "--json")
    full = cli(*common)
    assert full.code == 0
    exact = cli(*common, "--mode", "exact", "--drafts", "2")
    assert exact.json["texts"] == full.json["texts"]
    assert exact.json["statistics"]["acceptance"] is not None
    fast = cli(*common, "--mode", "fast", "--threshold", "0", "--audit")
    assert list(fast.json["statistics"]["exits"]) == ["exit_1"]
    assert fast.json["statistics"]["agreement"] is not None
    drawn = [cli(*common, "--temperature", "1", "--seed", "7").json["texts"] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_chat_answers_and_shows_the_answer_alone(cli: Cli, chat_bundle: Bundle) -> None:
    common = ("run", chat_bundle.path, "--prompt", "Hi", "--chat", "--max-new-tokens", "8")
    whole, stream, data = cli(*common), cli(*common, "--stream"), cli(*common, "--json")
    assert whole.code == stream.code == data.code == 0, whole.err
    [made] = data.json["texts"]
    assert whole.out == stream.out == made["text"] + "\n"
    assert made["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    told = cli(*common, "--system-prompt", "Go.", "--json").json["texts"][0]
    assert told["prompt"].startswith("<|im_start|>system\nGo.<|im_end|>\n<|im_start|>user\nHi")
    exact = cli(*common, "--mode", "exact", "--json").json["texts"]
    assert exact == data.json["texts"]
    variables = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert cli(*common, *variables, "--json").json["texts"][0]["prompt"].endswith("</think>\n\n")
    named = cli(*common, "--chat-template", "strict", "--json").json["texts"][0]
    assert "[ASK] Hi [/ASK]" in named["prompt"]


def test_conversations_are_read_from_files(cli: Cli, chat_bundle: Bundle) -> None:
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]
    turns.append({"role": "user", "content": "c"})
    (cli.folder / "one.json").write_text(json.dumps(turns))
    objects = [{"messages": turns, "id": 7}, {"messages": turns[:1], "tools": [{"name": "f"}]}]
    lines = "\n\n".join(json.dumps(one, ensure_ascii=False) for one in objects)
    (cli.folder / "two.jsonl").write_text(lines + "\n")
    common = ("run", chat_bundle.path, "--max-new-tokens", "4", "--json", "--messages")
    [one] = cli(*common, "one.json").json["texts"]
    two = cli(*common, "two.jsonl").json["texts"]
    assert one["prompt"] == two[0]["prompt"] and one["tokens"] == two[0]["tokens"]
    assert "<|im_start|>assistant\nb<|im_end|>" in one["prompt"]
    assert '{"name": "f"}' in two[1]["prompt"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.json", None, "none.json: cannot be read (No such file"),
        ("a.json", b"{", "a.json: not JSON"),
        ("a.json", b"5", "a.json: neither a list of messages"),
        ("a.json", b'{"message": []}', "a.json: neither a list of messages"),
        ("a.json", b"[" * 100000, "a.json: not JSON"),
        ("a.json", b"\xff", "a.json: cannot be read (it is not UTF-8)"),
        ("a.json", b"[]", "there are no messages"),
        ("a.json", b'[{"role": "user"}]', "a.json: messages[0] has no content"),
        ("a.jsonl", b"\n", "a.jsonl: it has no conversation"),
        ("a.jsonl", b"[]\n\n{", "a.jsonl: line 3: not JSON"),
    ],
)
def test_files_that_hold_no_conversation_are_named(
    cli: Cli, chat_bundle: Bundle, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (cli.folder / name).write_bytes(content)
    ran = cli("run", chat_bundle.path, "--messages", name)
    assert ran.code == 1 and message in ran.err
    assert "Traceback" not in ran.err and ran.out == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--chat",), "one kind of input"),
        (("--prompt", "x", "--messages", "x.json"), "one kind of input"),
        (("--prompt", "x", "--system-prompt", "y"), "--system-prompt is for conversations"),
        (
            ("--messages", "x.json", "--system-prompt", "y"),
            "--messages and --system-prompt exclude",
        ),
        (("--text", "x", "--chat"), "writes text. Give --prompt or --messages"),
        (("--prompt", "x", "--capacity", "100000"), "capacity 100000 is out of range"),
        (("--prompt", "x", "--chat", "--chat-template", "rag"), "no chat template 'rag'"),
        (("--prompt", "x", "--chat", "--chat-template-kwargs", "[]"), "not a JSON object"),
        (("--prompt", "x", "--chat", "--chat-template-kwargs", "{"), "not a JSON object"),
    ],
)
def test_invalid_arguments_of_chats_are_wrong_usage(
    cli: Cli, chat_bundle: Bundle, arguments: tuple[str, ...], message: str
) -> None:
    ran = cli("run", chat_bundle.path, *arguments)
    assert ran.code == 2 and message in ran.err
    assert "Traceback" not in ran.err and ran.out == ""


def test_inspect_shows_the_chat_templates(cli: Cli, chat_bundle: Bundle, writer: Path) -> None:
    shown = cli("inspect", chat_bundle.path)
    assert "chat templates: default, llama, strict, tool_use (with" in shown.out
    assert "bos_token '<|begin|>'" in shown.out
    found = cli("inspect", chat_bundle.path, "--json").json
    assert found["tokenizer"] == "tokenizer/tokenizer.json"
    assert found["chat"]["templates"]["default"] == "tokenizer/chat_template.jinja"
    assert cli("inspect", writer, "--json").json["chat"] is None
    assert "chat" not in cli("inspect", writer).out


def test_a_stream_shows_what_the_whole_shows(cli: Cli, writer: Path) -> None:
    common = ("run", writer, "--prompt", "def f(", "--max-new-tokens", "12")
    whole, stream = cli(*common), cli(*common, "--stream")
    assert whole.code == stream.code == 0
    assert stream.out == whole.out
    assert "tokens, first after" in stream.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--prompt", "x" * 200), "exceed the capacity of 96"),
        (("--prompt", ""), "a prompt is empty"),
        (("--prompt", "x", "--exit", "exit_1"), "--draft-exit"),
        (("--prompt", "x", "--chat"), "no chat template"),
        (("--prompt", b"\xff"), "cannot encode"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (
            ("--prompt", "x", "--mode", "exact", "--draft-exit", "exit_9"),
            "--draft-exit exit_9: no such early exit. It has exit_1, exit_2.",
        ),
        (("--prompt", "x", "--stop", ""), "--stop: the string is empty"),
        (
            ("--prompt", "x", "--max-new-tokens", "500"),
            "--max-new-tokens is 500, but a text has 96 tokens at most",
        ),
        (("--prompt", "x", "--temperature", "1", "--top-k", "-2"), "--top-k -2 is out of range"),
        (("--data", "x.npz", "--mode", "exact"), "writes text. Give --prompt."),
        (("--prompt", "x", "--seed", "0"), "--seed has no effect with greedy decoding"),
        (("--prompt", "x", "--temperature", "0", "--top-k", "0"), "--temperature above 0"),
        (("--prompt", "x", "--mode", "fast", "--encoder-threshold", "1"), "no encoder with exits"),
        (("--text", "x", "--mode", "exact"), "--prompt"),
        (("--text", "x"), "writes text. Give --prompt."),
    ],
)
def test_invalid_arguments_are_refused(
    cli: Cli, writer: Path, arguments: tuple[str | bytes, ...], message: str
) -> None:
    ran = cli("run", writer, *map(os.fsdecode, arguments))
    assert ran.code in (1, 2) and message in ran.err
    assert "Traceback" not in ran.err and ran.out == ""


def test_an_audit_is_told_as_json(cli: Cli, writer: Path) -> None:
    fast = ("--mode", "fast", "--threshold", "0.01", "--audit", "--max-new-tokens", "6")
    ran = cli("run", writer, "--prompt", "def f(x):", *fast, "--json")
    assert ran.code == 0 and 0 <= ran.json["statistics"]["agreement"] <= 1
    given = ran.json["statistics"]["on_given_text"]
    assert given["tokens"] == len("def f(x):") - 1  # its tokens are bytes
    assert given["perplexity"] > 1 and given["perplexity_full"] > 1
    shown = cli("run", writer, "--prompt", "def f(x):", *fast)
    assert "on given text (only 8 tokens: imprecise)" in shown.err
    short = cli("run", writer, "--prompt", "d", *fast)
    assert "on given text: not measured, because no prompt has more than one token" in short.err


def test_fast_without_thresholds_names_the_way_to_them(cli: Cli, writer: Path) -> None:
    ran = cli("run", writer, "--prompt", "x", "--mode", "fast")
    assert ran.code == 2 and "edgeexit calibrate" in ran.err and ran.out == ""


def test_bench_tells_prefill_and_decode_of_every_mode(
    cli: Cli, writer: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f(x):"}\n')
    quick = ("--data", prompts, "--new-tokens", "4", "--time", "10ms", "--threads", "1")
    told = cli("bench", writer, *quick, "-o", tmp_path / "bench.json")
    assert told.code == 0
    assert all(word in told.out for word in ("unsplit", "full", "exact", "split tax"))
    assert (tmp_path / "bench.json").is_file()
    refused = cli("bench", writer, *quick, "--mode", "throughput")
    assert refused.code == 2 and "language model" in refused.err


def test_trace_calibrate_and_run_follow_each_other(cli: Cli, writer: Path) -> None:
    texts = ["def f(x): return x", "import os", "for line in lines: print(line)"]
    (cli.folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    traced = cli("trace", writer, "--data", "texts.jsonl", "-o", "trace.npz", "--json")
    assert traced.code == 0, traced.err
    assert (traced.json["chain"], traced.json["texts"]) == ("main", 3)
    assert traced.json["rows"] == sum(map(len, texts))  # its tokens are bytes
    shown = cli("trace", writer, "--data", "texts.jsonl", "--batch-size", 2, "-o", "batches.npz")
    assert f"{traced.json['rows']} tokens of 3 texts, 3 exits" in shown.out
    options = ("--max-risk", "60%", "-o", "policy.json")
    calibrated = cli("calibrate", "trace.npz", *options, "--json")
    assert calibrated.code == 0, calibrated.err
    assert calibrated.json["calibration"]["texts"] == 3
    assert calibrated.json["calibration"]["perplexity_full"] > 1
    assert calibrated.json["exits"][0]["accuracy"] is not None
    again = cli("calibrate", "trace.npz", *options, "--per-exit", "--overwrite")
    # With the measured times, which threshold is chosen varies: whether texts lose anything, too.
    assert ("Of 3 texts, " in again.out) != ("of 3 texts have no loss" in again.err)
    checked = cli("check", writer, "--policy", "policy.json")
    assert checked.code == 0, checked.err
    fast = ("--mode", "fast", "--policy", "policy.json", "--max-new-tokens", "12", "--json")
    ran = cli("run", writer, "--prompt", "def f(", *fast)
    assert ran.code == 0, ran.err
    assert set(ran.json["statistics"]["exits"]) <= {"exit_1", "exit_2", "exit_4"}
    assert "not calibrated" not in ran.err
    refused = cli("run", writer, "--prompt", "def f(", "--policy", "policy.json")
    assert refused.code == 2 and refused.out == ""
    assert "--policy: the thresholds of the chain main have no effect in mode full" in refused.err
    (cli.folder / "one.jsonl").write_text('{"prompt": "def f(x): return"}')
    quick = ("--data", "one.jsonl", "--new-tokens", "4", "--time", "10ms", "--threads", "1")
    measured = cli("bench", writer, *quick, "--policy", "policy.json")
    assert measured.code == 0 and "fast on given text" in measured.out


def test_a_prompt_for_an_encoder_is_encoded_and_not_shown(cli: Cli, tmp_path: Path) -> None:
    bundle = write_with_words(make_decoder_toy(encoder=True), tmp_path / "bundle").path
    ran = cli("run", bundle, "--prompt", "w5 w6", "--prompt", "w7", "--max-new-tokens", 4, "--json")
    assert ran.code == 0, ran.err
    assert [text["prompt"] for text in ran.json["texts"]] == ["w5 w6", "w7"]
    assert ran.json["statistics"]["earlier"] == {"encoder": ["encoder_3"] * 2}
    rules = {"encoder": Rule(score="saturation", thresholds=-np.inf), "decoder": Rule(thresholds=0)}
    write_policy(Policy(rules=rules), cli.folder / "both.json")
    given = ("--max-new-tokens", 4, "--policy", "both.json", "--json")
    ran = cli("run", bundle, "--prompt", "w5 w6", *given)
    assert ran.json["statistics"]["earlier"] == {"encoder": ["encoder_1"]}
    assert "thresholds of the chain decoder have no effect in mode full; the rest" in ran.err
    shown = cli("run", bundle, "--prompt", "w5 w6", "--max-new-tokens", 4)
    assert not shown.out.startswith("w5 w6") and "encoder: encoder_3" in shown.err
    exact = cli("run", bundle, "--prompt", "w5 w6", "--max-new-tokens", 4, "--mode", "exact")
    assert exact.out == shown.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("run", "--data", "x.npz"), "writes text. Give --prompt."),
        (("run", "--prompt", b"\xff"), "cannot encode one of the texts"),
        (("run",), "one kind of input. Give --prompt."),
        (
            ("run", "--prompt", "w5", "--max-new-tokens", "6000"),
            "--max-new-tokens is 6000, but a text",
        ),
        (("trace", "--data", "x", "-o", "t.npz"), "x: unsupported format"),
        (("trace", "--data", "d.npz", "-o", "t.npz"), "writes text: give token ids as"),
        (("trace", "--data", "x.npz", "-o", "t.npz"), "x.npz does not exist"),
        (("trace", "--data", "x.jsonl", "-o", "t.npz", "--chain", "side"), "no chain 'side'"),
        (
            ("trace", "--data", "x.jsonl", "-o", "t.npz", "--max-new-tokens", "2"),
            "--max-new-tokens 2: nothing is written for this trace",
        ),
        (("trace", "--data", "x.jsonl", "-o", "t.npz"), "line 1: there is no 'target'"),
    ],
)
def test_invalid_arguments_for_an_encoder_and_a_decoder_are_refused(
    cli: Cli, tmp_path: Path, arguments: tuple[str | bytes, ...], message: str
) -> None:
    bundle = write_with_words(make_decoder_toy(encoder=True), tmp_path / "bundle").path
    target = {} if "target" in message else {"target": [5, 6]}
    (cli.folder / "x.jsonl").write_text(json.dumps({"tokens": [5, 6]} | target))
    (cli.folder / "x").mkdir()
    np.savez(cli.folder / "d.npz", pixels=np.zeros((2, 3, 8, 8), np.float32))
    ran = cli(arguments[0], bundle, *map(os.fsdecode, arguments[1:]))
    assert ran.code in (1, 2) and message in ran.err
    assert "Traceback" not in ran.err and ran.out == ""


def test_a_prompt_needs_a_tokenizer(cli: Cli, tmp_path: Path) -> None:
    bundle = write_decoder_toy(make_decoder_toy(), tmp_path / "bundle").path
    ran = cli("run", bundle, "--prompt", "x")
    assert ran.code == 1 and "no tokenizer" in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--audit"], "has no effect in mode full"),
        (["--threshold", "1", "--mode", "exact"], "mode exact"),
        (["--drafts", "2", "--mode", "fast"], "--mode exact"),
        (["--rows", "5"], "--rows is for --data"),
    ],
)
def test_options_without_effect_are_refused(
    cli: Cli, writer: Path, options: list[str], message: str
) -> None:
    ran = cli("run", writer, "--prompt", "a", *options)
    assert ran.code == 2 and ran.out == "" and message in ran.err
