"""peft's adapters become part of the weights: bundles answer as transformers and peft do together,
and what does not fit is refused with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli import cli
from edgeexit.errors import ExportError, UsageError
from edgeexit.export import export
from edgeexit.export.peft_adapters import read_adapter_config
from edgeexit.export.pretrained import from_pretrained
from edgeexit.runtime import load
from tests.checkpoints import make_model, save_checkpoint
from tests.decoders import VOCABULARY, random_prompts
from tests.encoder_decoders import FAMILIES as ENCODER_DECODERS


def save_adapter(
    model: transformers.PreTrainedModel, folder: Path, config: peft.PeftConfig, seed: int = 3
) -> peft.PeftModel:
    """Puts an adapter of random weights on a model and saves it."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
                assert "lora" in name or "modules_to_save" in name or "ia3" in name
    adapted.save_pretrained(folder)
    return adapted.eval()


def make_llama() -> transformers.PreTrainedModel:
    """Two layers with random weights drawn wide; the embedding is the head, too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, eos_token_id=0, **sizes, **heads
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def of_llama(**options: Any) -> peft.LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "base"
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "adapter"
    save_adapter(make_llama(), folder, of_llama())
    return folder


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_writer_with_two_adapters_writes_as_peft_does(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    mlp = of_llama(r=2, target_modules=["up_proj", "q_proj"], use_rslora=True)
    save_adapter(make_llama(), second, mlp, seed=4)
    model = from_pretrained(llama, exits=[1], adapter=[adapter, second])
    bundle = export(model.split_model(), tmp_path / "bundle")
    beside = peft.PeftModel.from_pretrained(make_llama(), str(adapter), "a")
    beside.load_adapter(str(second), "b")
    beside.base_model.set_adapter(["a", "b"])
    prompts = random_prompts(3, [5, 9])
    with load(bundle) as loaded:
        made = loaded.generate(prompts, max_new_tokens=12).finish()
    expected = [greedy(beside.eval(), prompt, 12) for prompt in prompts]
    assert made.tokens == expected
    plain = make_llama()
    assert expected != [greedy(plain, prompt, 12) for prompt in prompts]
    said = bundle.manifest.provenance["merged_adapters"]
    assert said == "adapter (LORA), second (LORA)"


def export_on_command_line(base: Path, adapter: Path, output: Path) -> Bundle:
    arguments = ["export", "-m", str(base), "--adapter", str(adapter), "--untrained-exits", "1"]
    cli.main([*arguments, "-o", str(output), "-q"], standalone_mode=False)
    return open_bundle(output)


def classify(bundle: Bundle, ids: torch.Tensor) -> np.ndarray:
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    feeds["token_type_ids"] = np.zeros(ids.shape, np.int64)
    with load(bundle) as loaded:
        return loaded(feeds).outputs["logits"]


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_classifier_gets_the_head_that_was_trained_with_its_adapter(
    tmp_path: Path, kind: str
) -> None:
    """The usual base: an encoder without a head of its own."""
    base = tmp_path / "base"
    make_model("bert").bert.save_pretrained(base)
    whole = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=5)
    given: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    config = (
        peft.LoraConfig(r=4, use_dora=True, modules_to_save=["classifier"], **given)
        if kind == "lora"
        else peft.IA3Config(feedforward_modules=[], **given)
    )
    adapted = save_adapter(whole, tmp_path / "adapter", config)
    with pytest.raises(ExportError, match=r"no weights for classifier"):
        from_pretrained(base, exits=[1])
    torch.manual_seed(0)
    bundle = export_on_command_line(base, tmp_path / "adapter", tmp_path / "bundle")
    ids = torch.randint(0, 60, (4, 7))
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits.numpy()
    assert expected.shape == (4, 5) and len(bundle.manifest.labels) == 5
    np.testing.assert_allclose(classify(bundle, ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_adapter_of_an_encoder_decoder_is_merged_into_both_halves(
    tmp_path: Path, family: str
) -> None:
    ENCODER_DECODERS[family]().save_pretrained(tmp_path / "base")
    modules = ["q_proj", "v_proj"] if family == "bart" else ["q", "v"]
    config = peft.LoraConfig(r=2, target_modules=modules, task_type="SEQ_2_SEQ_LM")
    adapted = save_adapter(ENCODER_DECODERS[family](), tmp_path / "adapter", config)
    made = from_pretrained(tmp_path / "base", exits=[1], adapter=tmp_path / "adapter")
    ids = torch.arange(4, 10)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids, decoder_input_ids=ids[:, :3]).logits
        found = made.model(input_ids=ids, decoder_input_ids=ids[:, :3]).logits  # type: ignore[operator]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_that_an_adapter_was_saved_with_goes_into_the_bundle(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (folder / "tokenizer.json").write_text("{}")
    assert from_pretrained(llama, exits=[1], adapter=folder).tokenizer_folder == folder  # type: ignore[union-attr]
    assert from_pretrained(llama, exits=[1], adapter=adapter).tokenizer_folder == llama  # type: ignore[union-attr]


def spoil(adapter: Path, folder: Path, **about: Any) -> Path:
    """A copy of an adapter that says something else of itself."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))
    return folder


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "is not there"),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10\0\0"),
        "adapter_model.safetensors is incomplete",
    ),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "no kind": (lambda f: (f / "adapter_config.json").write_text("{}"), "names no peft_type"),
    "not an adapter": (lambda f: (f / "adapter_config.json").unlink(), "not a peft adapter"),
    "gone": (lambda f: shutil.rmtree(f), "does not exist"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_damaged_adapter_is_named(llama: Path, adapter: Path, tmp_path: Path, kind: str) -> None:
    change, words = SPOILT[kind]
    change(folder := spoil(adapter, tmp_path / "spoilt"))
    with pytest.raises(ExportError, match=words) as caught:
        from_pretrained(llama, exits=[1], adapter=folder)
    assert str(folder) in caught.value.what and caught.value.fix


def test_an_adapter_of_another_base_is_refused(llama: Path, adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    folder = spoil(adapter, tmp_path / "deep")
    more = {name.replace("layers.1.", "layers.9."): value for name, value in weights.items()}
    save_file(more, folder / "adapter_model.safetensors")
    with pytest.raises(
        ExportError, match=r"does not have: model\.layers\.9\..*base_model_name_or_path"
    ):
        from_pretrained(llama, exits=[1], adapter=folder)
    folder = spoil(adapter, tmp_path / "wide")
    wide = {name: torch.ones(value.shape[0], 96) for name, value in weights.items() if "_A" in name}
    save_file(weights | wide, folder / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="cannot put this LORA adapter on LlamaForCausalLM"):
        from_pretrained(llama, exits=[1], adapter=folder)
    with pytest.raises(ExportError, match="cannot put this LORA adapter on BertFor"):
        from_pretrained(
            save_checkpoint("bert", tmp_path / "bert"),
            exits=[1],
            adapter=spoil(adapter, tmp_path / "any task", task_type=None),
            untrained=True,
        )


def test_an_adapter_that_lacks_weights_is_refused(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    folder = spoil(adapter, tmp_path / "less")
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"the adapter has no weights for model\.layers\.0\."):
        from_pretrained(llama, exits=[1], adapter=folder)


def test_an_adapter_that_adds_inputs_is_refused(llama: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(make_llama(), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ExportError, match="PROMPT_TUNING adapter adds inputs or layers"):
        from_pretrained(llama, exits=[1], adapter=tmp_path / "prompt")


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_weights_is_refused(
    llama: Path, tmp_path: Path, module: str
) -> None:
    """Merged, it would change the other, too."""
    save_adapter(make_llama(), tmp_path / "tied", of_llama(target_modules=[module]))
    with pytest.raises(ExportError, match="differ from those of the separate.*share"):
        from_pretrained(llama, exits=[1], adapter=tmp_path / "tied")


@pytest.mark.parametrize("model", ["model.onnx", "module:function"])
def test_the_command_line_merges_adapters_of_checkpoints_alone(
    adapter: Path, tmp_path: Path, model: str
) -> None:
    arguments = ["export", "-o", str(tmp_path / "bundle"), "--adapter", str(adapter), "-m", model]
    with pytest.raises(UsageError, match="--adapter is for checkpoints"):
        cli.main(arguments, standalone_mode=False)


def test_an_adapter_alone_says_how_it_is_given(adapter: Path) -> None:
    with pytest.raises(ExportError, match=rf"-m BASE --adapter {adapter}"):
        from_pretrained(adapter, exits=[1])


@pytest.mark.parametrize(
    ("named", "warns"),
    [
        ("some/other", True),
        ("/elsewhere/BASE", False),
        ("org/talker", False),
        ("hub/models--org--talker/snapshots/0a1b", False),
        ("", False),
    ],
)
def test_an_adapter_that_names_another_base_gives_a_warning_with_both(
    llama: Path,
    adapter: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    named: str,
    warns: bool,
) -> None:
    """The base is known by its folder, and by the name that its config.json has."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    about = json.loads((base / "config.json").read_text()) | {"_name_or_path": "org/talker"}
    (base / "config.json").write_text(json.dumps(about))
    folder = spoil(adapter, tmp_path / "adapter", base_model_name_or_path=named)
    from_pretrained(base, exits=[1], adapter=folder)
    assert ("unless both have the same weights" in caplog.text) == warns
    assert not warns or (named in caplog.text and str(base) in caplog.text)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM"])
def test_an_adapter_for_another_task_is_refused(
    llama: Path, adapter: Path, tmp_path: Path, task: str
) -> None:
    folder = spoil(adapter, tmp_path / "adapter", task_type=task)
    with pytest.raises(ExportError, match=f"adapter for {task}.* read as LlamaForCausalLM"):
        from_pretrained(llama, exits=[1], adapter=folder)


def test_adapters_that_both_bring_a_classifier_are_told_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_checkpoint("bert", tmp_path / "bert")
    folders = []
    for name, classes in (("a", 3), ("b", 3), ("c", 7)):
        model = transformers.BertForSequenceClassification.from_pretrained(
            base, num_labels=classes, ignore_mismatched_sizes=True
        )
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        save_adapter(model, tmp_path / name, config, seed=classes + len(folders))
        folders.append(tmp_path / name)
    made = from_pretrained(base, exits=[1], adapter=folders[:2], untrained=True)
    assert f"{folders[1]}: classifier.bias replaces that of {folders[0]}" in caplog.text
    last = load_file(folders[1] / "adapter_model.safetensors")
    [bias] = [value for name, value in last.items() if name.endswith("classifier.bias")]
    torch.testing.assert_close(made.model.classifier.bias.detach(), bias)  # type: ignore[union-attr,operator,arg-type]
    with pytest.raises(ExportError, match="a classifier for 3 classes, .* one for 7"):
        from_pretrained(base, exits=[1], adapter=folders[1:], untrained=True)


def test_an_adapter_that_repeats_layers_is_refused_with_that_cause(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "layer_replication": [[0, 2], [1, 3]]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="repeats layers of its base .layer_replication"):
        read_adapter_config(tmp_path, tmp_path)
