"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from filelock import FileLock
from hypothesis import settings

from edgeexit.bundle.reader import MANIFEST, Bundle, open_bundle
from edgeexit.bundle.writer import BundleWriter
from tests.toys import Toy, make_toy, write_toy

if TYPE_CHECKING:
    from edgeexit.export.exits.classifier import ExitClassifier

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of torch that wait for each other only take them away.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch's tracer logs every step to pytest's capture, which buries the reason of a failure.
logging.getLogger("torch.__trace").setLevel(logging.WARNING)
settings.register_profile("edgeexit", deadline=None, print_blob=True)
settings.load_profile("edgeexit")


@pytest.fixture(autouse=True)
def _settings_of_the_command_line() -> Iterator[None]:
    """The command line sets up its process: logging to its stderr, warnings, what SIGTERM does. A
    test that runs it here leaves the next one its own."""
    root, ours = logging.getLogger(), logging.getLogger("edgeexit")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    terminate = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    if signal.getsignal(signal.SIGTERM) is not terminate:
        signal.signal(signal.SIGTERM, terminate)


SLOW_FILES = (
    "test_vision_language.py",
    "test_generate.py",
    "test_adapters.py",
    "test_models.py",
    "test_decode.py",
)
"""Files that take a minute or more: where they come last, one worker ends long after the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    rank = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def toy() -> Toy:
    """A model of four segments, each with an exit."""
    return make_toy()


@pytest.fixture(scope="session")
def toy_bundle(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy as a bundle. Shared: never change it; `toy_copy` gives one to spoil."""
    return write_toy(toy, tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def toy_copy(toy_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the toy's bundle with writable files."""
    return _writable_copy(toy_bundle.path, tmp_path / "copy")


@pytest.fixture(scope="session")
def copy_toy(toy_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes such copies, for property tests that need one per example."""
    return lambda: _writable_copy(toy_bundle.path, tmp_path_factory.mktemp("copies") / "copy")


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)``: a folder that ``make(path)`` writes once for all processes of a run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / "once" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial = folder.with_name(f"{folder.name}.partial")
                make(partial)
                partial.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def decoder_folder(once: Once) -> Callable[[str], Path]:
    """A small checkpoint of a family of language models, made when it is first asked for."""
    from tests.decoders import save_decoder

    return lambda family: once(family, lambda folder: save_decoder(family, folder))


@pytest.fixture(scope="session")
def decoder_bundle(decoder_folder: Callable[[str], Path], once: Once) -> Callable[[str], Bundle]:
    """The same as a bundle with exits. Shared: never change it."""
    from tests.decoders import EXITS

    def make(family: str, folder: Path) -> None:
        from edgeexit.export import export
        from edgeexit.export.pretrained import from_pretrained

        export(from_pretrained(decoder_folder(family), exits=EXITS).split_model(), folder)

    return functools.cache(
        lambda family: open_bundle(once(f"{family}-bundle", functools.partial(make, family)))
    )


@pytest.fixture(scope="session")
def speech_bundle(once: Once) -> Bundle:
    """A small Whisper as a bundle with exits. Shared: never change it."""
    from tests.speech_models import make_whisper, save_checkpoint

    def make(folder: Path) -> None:
        from edgeexit.export import export
        from edgeexit.export.pretrained import from_pretrained

        checkpoint = save_checkpoint(make_whisper(), folder.with_name("speech-checkpoint"))
        split = from_pretrained(checkpoint, exits=[1, 2], encoder_exits=[1, 2])
        export(split.split_model(), folder)

    return open_bundle(once("speech-bundle", make))


@pytest.fixture(scope="session")
def half_decoder(decoder_folder: Callable[[str], Path], once: Once) -> Bundle:
    """The Llama in float16 as a bundle. Shared: never change it."""
    from tests.decoders import EXITS

    def make(folder: Path) -> None:
        from edgeexit.export import export
        from edgeexit.export.pretrained import from_pretrained

        model = from_pretrained(decoder_folder("llama"), exits=EXITS).split_model()
        export(model, folder, dtype="float16")

    return open_bundle(once("llama-half", make))


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of a language model with chat templates."""
    from tests.chats import save_chat

    return save_chat(tmp_path_factory.mktemp("chat") / "talker")


@pytest.fixture(scope="session")
def chat_bundle(chat_folder: Path, decoder_bundle: Callable[[str], Bundle]) -> Bundle:
    """The same as a bundle, on the graphs of its twin without templates, for exporting takes long.
    Shared: never change it; `chat_copy` gives one to spoil."""
    from edgeexit.export.text_files import write_text_files

    twin = decoder_bundle("llama")
    with BundleWriter(chat_folder.with_name("talker-bundle")) as writer:
        other = shutil.ignore_patterns(MANIFEST, "tokenizer")
        shutil.copytree(twin.path, writer.folder, dirs_exist_ok=True, ignore=other)
        text = write_text_files(chat_folder, writer.folder)
        return writer.commit(
            msgspec.structs.replace(twin.manifest, tokenizer=text.tokenizer, chat=text.chat)
        )


@pytest.fixture
def chat_copy(chat_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of that bundle with writable files."""
    return _writable_copy(chat_bundle.path, tmp_path / "copy")


@pytest.fixture(scope="session")
def adapted_bundle(once: Once) -> Callable[[str], Bundle]:
    """A family's decoder with adapters as a bundle. Shared: never change it."""
    from tests.decoders import make_adapted

    def make(family: str, folder: Path) -> None:
        from edgeexit.export import export

        export(make_adapted(family).split_model(), folder)

    return functools.cache(
        lambda family: open_bundle(once(f"{family}-adapted", functools.partial(make, family)))
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of every family."""
    from tests.checkpoints import FAMILIES, save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: save_checkpoint(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def classifiers(checkpoints: dict[str, Path]) -> dict[str, ExitClassifier]:
    """These checkpoints read back, with untrained exits."""
    import torch

    from edgeexit.export.pretrained import from_pretrained
    from tests.checkpoints import EXITS

    found = {}
    for family, folder in checkpoints.items():
        torch.manual_seed(1)
        found[family] = from_pretrained(folder, exits=EXITS[family], untrained=True)
    return found


@pytest.fixture(scope="session")
def family_bundle(
    classifiers: dict[str, ExitClassifier], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """The bundle of a family, exported once (it takes seconds) and shared: never change it."""
    from edgeexit.export import export

    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def exported(family: str) -> Bundle:
        return export(classifiers[family].split_model(), folder / family)

    return exported


def _writable_copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


@pytest.fixture(scope="session")
def bert_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT classifier of four layers with an exit behind each, and a tokenizer of 60 words."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from edgeexit.export.exits.classifier import ExitClassifier
    from edgeexit.export.families.bert import trunk

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
        max_position_embeddings=40,
        initializer_range=0.3,
        id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2},
    )
    model = BertForSequenceClassification(config).eval()
    folder = tmp_path_factory.mktemp("bert") / "checkpoint"
    _save_with_exits(ExitClassifier(model, trunk(model), exits=[1, 2, 3]), folder)
    _save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bert_bundle(bert_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """That BERT as a bundle. Shared: never change it."""
    return _export(bert_checkpoint, tmp_path_factory.mktemp("bert") / "bundle")


@pytest.fixture(scope="session")
def vit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT classifier of three layers for 16 x 16 images, with an exit behind each."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from edgeexit.export.exits.classifier import ExitClassifier
    from edgeexit.export.families.vit import trunk

    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
        id2label={0: "cat", 1: "dog", 2: "owl"},
        label2id={"cat": 0, "dog": 1, "owl": 2},
    )
    model = ViTForImageClassification(config).eval()
    folder = tmp_path_factory.mktemp("vit") / "checkpoint"
    _save_with_exits(ExitClassifier(model, trunk(model), exits=[1, 2]), folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.6],
        "image_std": [0.5, 0.3, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def vit_bundle(vit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """That ViT as a bundle. Shared: never change it."""
    return _export(vit_checkpoint, tmp_path_factory.mktemp("vit") / "bundle")


def _save_with_exits(classifier: Any, folder: Path) -> None:
    """Saves a classifier whose exits differ from row to row, as trained ones do."""
    import torch

    for head in classifier.heads.values():
        torch.nn.init.normal_(head.classifier.weight, std=0.5)
    folder.mkdir()
    classifier.save_pretrained(folder)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(60))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=40, **special
    ).save_pretrained(folder)


def _export(checkpoint: Path, output: Path) -> Bundle:
    from edgeexit.export import export
    from edgeexit.export.pretrained import from_pretrained

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's exporter says about itself
        return export(from_pretrained(checkpoint).split_model(), output)


@pytest.fixture(scope="session")
def vision_folder(once: Once) -> Callable[[str], Path]:
    """A small checkpoint of a family of vision-language models, made when it is first asked for."""
    from tests.vision_models import save_checkpoint

    return lambda family: once(family, lambda folder: save_checkpoint(family, folder))


@pytest.fixture(scope="session")
def vision_bundle(vision_folder: Callable[[str], Path], once: Once) -> Callable[[str], Bundle]:
    """The same as a bundle with exits in all of its parts. Shared: never change it."""
    from tests.vision_models import FIRST_FORM, PLAIN, load_split, with_fewer_forms

    def make(family: str, folder: Path) -> None:
        from edgeexit.export import export

        split = load_split(family, vision_folder(family)).split_model()
        export(with_fewer_forms(split, FIRST_FORM.get(family, PLAIN)), folder)

    return functools.cache(
        lambda family: open_bundle(once(f"{family}-bundle", functools.partial(make, family)))
    )


@pytest.fixture(scope="session")
def gated_bundle(vision_folder: Callable[[str], Path], once: Once) -> Callable[[str], Bundle]:
    """The same with gates behind two layers, and one exit (`tests.vision_models.gated`)."""
    from tests.vision_models import FIRST_FORM, PLAIN, gated, with_fewer_forms

    def make(family: str, folder: Path) -> None:
        from edgeexit.export import export

        split = gated(family, vision_folder(family)).split_model()
        export(with_fewer_forms(split, FIRST_FORM.get(family, PLAIN)), folder)

    return functools.cache(
        lambda family: open_bundle(once(f"{family}-gated", functools.partial(make, family)))
    )
