"""Manifests that contradict themselves: each way is refused, and the message names it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeexit.bundle.manifest import File, Manifest
from edgeexit.bundle.reader import WEIGHTS, Bundle, decode_manifest
from edgeexit.bundle.validate import check_structure, graph_signatures
from edgeexit.errors import BundleError
from tests.bundle.mutations import mutate
from tests.decoder_toys import fill_decoder_toy, make_decoder_toy

Raw = dict[str, Any]
Cases = dict[str, tuple[Callable[[Raw], object], str]]


@pytest.fixture(scope="session")
def manifests(toy_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Raw]:
    """Manifests that are sound: a classifier, a decoder with every part but an encoder, one behind
    an encoder, and a plain one."""
    found = {"classifier": toy_bundle.manifest}
    options: dict[str, dict[str, Any]] = {
        "decoder": {"gate": True, "prefix": True, "stateless": True, "adapter": 0},
        "encoder": {"encoder": True, "adapter": 1, "adapter_reads": True},
        "plain": {},
    }
    for name, chosen in options.items():
        folder = tmp_path_factory.mktemp(name)
        manifest = fill_decoder_toy(make_decoder_toy(**chosen), folder)
        found[name] = msgspec.structs.replace(manifest, files=listed(folder))
    return {name: json.loads(msgspec.json.encode(one)) for name, one in found.items()}


def listed(folder: Path) -> dict[str, File]:
    """Every file of a folder, as manifests list them."""
    return {
        path.relative_to(folder).as_posix(): File(sha256="0" * 64, bytes=path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def check(raw: Raw) -> Manifest:
    manifest = decode_manifest(json.dumps(raw).encode())
    check_structure(manifest)
    return manifest


@pytest.mark.parametrize("name", ["classifier", "decoder", "encoder", "plain"])
def test_a_sound_manifest_passes(manifests: dict[str, Raw], name: str) -> None:
    assert check(manifests[name]).steps


def refused(raw: Raw, cases: Cases, case: str) -> None:
    change, message = cases[case]
    raw = copy.deepcopy(raw)
    change(raw)
    with pytest.raises(BundleError) as caught:
        check(raw)
    assert message in str(caught.value)
    assert str(caught.value).startswith("manifest.json")


def component(raw: Raw, name: str) -> Raw:
    found: Raw = raw["components"][name]
    return found


def chain(raw: Raw, name: str = "forward") -> Raw:
    found: Raw = raw["chains"][name]
    return found


def exit_(raw: Raw, name: str) -> Raw:
    exits = [one for each in raw["chains"].values() for one in each["exits"]]
    return next(one for one in exits if one["name"] == name)


def add_component(raw: Raw, name: str, like: str, **changes: Any) -> None:
    raw["components"][name] = copy.deepcopy(component(raw, like)) | changes


def tensor(name: str, *axes: str | int | None, dtype: str = "float32") -> Raw:
    row_axis = axes.index("batch") if "batch" in axes else None
    return {"name": name, "dtype": dtype, "axes": list(axes), "row_axis": row_axis}


def token_state(**changes: Any) -> Raw:
    state = {"type": "token", "name": "key", "dtype": "float32", "axes": ["batch", 1, "past", 4]}
    return state | {"past": "past_key", "present": "present_key"} | changes


def other_chain(raw: Raw, takes: str, *, before: bool = True) -> None:
    """A chain of one component that takes a tensor ``[batch, 6]`` and hands on ``other``."""
    add_component(raw, "o", "s0", inputs=[tensor(takes, "batch", 6)],
                  outputs=[tensor("o/state", "batch", 6)])  # fmt: skip
    raw["chains"]["second"] = {
        "components": ["o"],
        "outputs": [tensor("other", "batch", 6)],
        "exits": [{"name": "second_1", "behind": "o", "outputs": {"other": "o/state"}}],
    }
    raw["steps"].insert(0 if before else 1, {"type": "run", "chain": "second"})


def test_what_a_chain_hands_on_is_known_to_later_steps(manifests: dict[str, Raw]) -> None:
    raw = copy.deepcopy(manifests["classifier"])
    other_chain(raw, "x")
    component(raw, "s0")["inputs"].append(tensor("other", "batch", 6))
    check(raw)


def chains_that_need_each_other(raw: Raw) -> None:
    other_chain(raw, "logits")
    component(raw, "o")["inputs"] = chain(raw)["outputs"]
    component(raw, "s0")["inputs"].append(tensor("other", "batch", 6))


def chain_that_takes_a_later_output(raw: Raw) -> None:
    other_chain(raw, "x", before=False)
    component(raw, "s0")["inputs"].append(tensor("other", "batch", 6))


def output_that_is_an_input(raw: Raw) -> None:
    chain(raw)["outputs"][0]["name"] = "x"
    for one in chain(raw)["exits"]:
        one["outputs"] = {"x": one["outputs"]["logits"]}
    component(raw, "unsplit")["outputs"][0]["name"] = "boxes"
    chain(raw)["unsplit"] = []
    del raw["components"]["unsplit"]


NAMES: Cases = {
    "no chain": (lambda raw: raw["chains"].clear(), "length"),
    "no step": (lambda raw: raw["steps"].clear(), "length"),
    "graph not listed": (
        lambda raw: component(raw, "s0")["variants"][0].update(graph="graphs/none.onnx"),
        "graphs/none.onnx is used but not listed",
    ),
    "sample not listed": (
        lambda raw: raw["samples"].append("samples/none.npz"),
        "samples/none.npz is used but not listed",
    ),
    "no input with rows": (
        lambda raw: raw.update(inputs=[tensor("x", 6)]),
        "no input has an axis named batch",
    ),
    "input twice": (lambda raw: raw["inputs"].append(raw["inputs"][0]), "x is made twice"),
    "limit that is no size": (
        lambda raw: raw.update(limits={"batch": 0}), "the limit of batch is 0",
    ),
    "component that is not there": (
        lambda raw: chain(raw)["components"].append("s9"),
        "there is no component s9",
    ),
    "unsplit component that is not there": (
        lambda raw: chain(raw)["unsplit"].insert(0, "s9"),
        "there is no component s9",
    ),
    "head that is not there": (
        lambda raw: exit_(raw, "exit_2").update(path=[{"component": "shared"}]),
        "exit exit_2: there is no component shared",
    ),
    "maker that is not there": (
        lambda raw: component(raw, "s1").update(
            states=[{"type": "prompt", "maker": "nobody", "tensor": tensor("made", "batch")}]
        ),
        "component s1: there is no component nobody",
    ),
    "component that nobody uses": (
        lambda raw: add_component(raw, "idle", "s1"),
        "nothing uses the component idle",
    ),
    "component twice": (
        lambda raw: chain(raw)["components"].insert(0, "s0"),
        "chain forward names s0 twice",
    ),
    "unsplit component twice": (
        lambda raw: chain(raw)["unsplit"].append("unsplit"),
        "unsplit names unsplit twice",
    ),
    "component of the chain on a path": (
        lambda raw: exit_(raw, "exit_2").update(path=[{"component": "s0"}]),
        "s0 is a component of the chain and is on the path of an exit",
    ),
    "two inputs of one name": (
        lambda raw: component(raw, "s1")["inputs"].append(component(raw, "s1")["inputs"][0]),
        "two inputs are named h0",
    ),
    "two outputs of one name": (
        lambda raw: component(raw, "s1")["outputs"].append(component(raw, "s1")["outputs"][0]),
        "two outputs are named h1",
    ),
    "projection of nothing": (
        lambda raw: component(raw, "s1").update(projections=component(raw, "s1")["variants"][:1]),
        "has a projection, but no token states",
    ),
    "rows along an axis that is not there": (
        lambda raw: component(raw, "s0")["outputs"][0].update(row_axis=2),
        "row_axis cannot be 2",
    ),
    "rows along another axis": (
        lambda raw: raw["inputs"][0].update(row_axis=1),
        "row_axis cannot be 1",
    ),
    "rows in a tensor that has none": (
        lambda raw: raw["inputs"][2].update(row_axis=0),
        "row_axis cannot be 0",
    ),
    "exit twice": (
        lambda raw: exit_(raw, "exit_2").update(name="exit_1"),
        "two exits are named exit_1",
    ),
    "last component without exit": (
        lambda raw: chain(raw)["exits"].pop(),
        "does not end with an exit that answers",
    ),
    "last exit lets tokens go": (
        lambda raw: chain(raw)["exits"][-1].update(action="drop", tokens="image"),
        "does not end with an exit that answers",
    ),
    "exits out of order": (
        lambda raw: chain(raw)["exits"].insert(0, chain(raw)["exits"].pop(1)),
        "not in the order",
    ),
    "exit behind what is not in the chain": (
        lambda raw: exit_(raw, "exit_2").update(behind="unsplit"),
        "exit exit_2 is behind unsplit, which is not in the chain",
    ),
    "two exits behind one component": (
        lambda raw: chain(raw)["exits"].insert(1, exit_(raw, "exit_1") | {"name": "other"}),
        "two exits answer behind s0",
    ),
    "step without a chain": (
        lambda raw: raw["steps"].append({"type": "run", "chain": "main"}),
        "main, which is not a chain",
    ),
    "chain that no step runs": (
        lambda raw: other_chain(raw, "x") or raw["steps"].pop(0),
        "0 steps run the chain second",
    ),
    "chain that runs twice": (
        lambda raw: raw["steps"].append(raw["steps"][0]),
        "2 steps run the chain forward",
    ),
    "text without tokenizer": (
        lambda raw: raw.update(preprocessing=[{"type": "text", "max_length": 8, "ids": "x"}]),
        "needs a tokenizer",
    ),
    "preprocessing for no input": (
        lambda raw: raw.update(
            preprocessing=[{"type": "image", "input": "pixels", "height": 2, "width": 2}]
        ),
        "preprocessing makes pixels, which is not an input",
    ),
    "chat without tokenizer": (
        lambda raw: raw.update(chat={"templates": {"default": raw["samples"][0]}}),
        "chat templates need a tokenizer",
    ),
    "chat template not listed": (
        lambda raw: raw.update(
            tokenizer=raw["samples"][0], chat={"templates": {"default": "tokenizer/none.jinja"}}
        ),
        "tokenizer/none.jinja is used but not listed",
    ),
    "chat without templates": (
        lambda raw: raw.update(tokenizer=raw["samples"][0], chat={"templates": {}}),
        "length",
    ),
}  # fmt: skip

TENSORS: Cases = {
    "input that nothing makes": (
        lambda raw: component(raw, "s2")["inputs"][0].update(name="h7"),
        "component s2 takes h7, which nothing computes before",
    ),
    "input that is made later": (
        lambda raw: component(raw, "s1")["inputs"][0].update(name="h2"),
        "component s1 takes h2, which the chain computes only later",
    ),
    "input that stays inside another chain": (
        lambda raw: other_chain(raw, "x") or component(raw, "s0")["inputs"][0].update(
            name="o/state"
        ),
        "takes o/state, which is not an output of the chain second",
    ),
    "input that a later chain makes": (
        chain_that_takes_a_later_output,
        "component s0 takes other, which the later chain second computes",
    ),
    "the chains depend on each other": (
        chains_that_need_each_other,
        "chain second, component o takes logits, which the chain forward computes from an output "
        "of second: the chains depend on each other",
    ),
    "input of another size": (
        lambda raw: component(raw, "s2")["inputs"][0].update(axes=["batch", 7]),
        "component s2 takes h1 float32['batch', 7], but h1 float32['batch', 6] is given",
    ),
    "input of another dtype": (
        lambda raw: component(raw, "s2")["inputs"][0].update(dtype="float16"),
        "takes h1 float16",
    ),
    "input with other rows": (
        lambda raw: component(raw, "s2")["inputs"][0].update(axes=[6, "batch"], row_axis=1),
        "takes h1 float32[6, 'batch']",
    ),
    "tensor made twice": (
        lambda raw: component(raw, "s1")["outputs"][0].update(name="h0"),
        "component s1: h0 is made twice",
    ),
    "tensor that is an input": (
        lambda raw: component(raw, "s1")["outputs"][0].update(name="shift"),
        "component s1: shift is made twice",
    ),
    "output that is an input": (
        output_that_is_an_input, "chain forward: x is made twice",
    ),
    "exit without the output promised": (
        lambda raw: exit_(raw, "exit_2").update(outputs={"boxes": "logits_1"}),
        "exit exit_2 gives ['boxes'], the chain has the outputs ['logits']",
    ),
    "exit with another number of classes": (
        lambda raw: component(raw, "s1")["outputs"][1].update(axes=["batch", 9]),
        "the chain has the output logits",
    ),
    "exit that names no output": (
        lambda raw: exit_(raw, "exit_2").update(outputs={"logits": "logits_0"}),
        "not an output of s1",
    ),
    "score that is no score": (
        lambda raw: exit_(raw, "exit_2").update(scores={"max_prob": "logits_1"}),
        "the score max_prob is logits_1",
    ),
    "exit that answers and lets tokens go": (
        lambda raw: exit_(raw, "exit_2").update(tokens="image"),
        "answers, so it cannot drop the token group image",
    ),
    "one output for all rows": (
        lambda raw: chain(raw)["outputs"][0].update(axes=[1, 3], row_axis=None)
        or [
            component(raw, name)["outputs"][place].update(axes=[1, 3], row_axis=None)
            for name, place in [("s0", 1), ("s1", 1), ("s2", 1), ("s3", 0), ("unsplit", 0)]
        ],
        "rows are independent, but logits has no row axis",
    ),
    "unsplit that gives something else": (
        lambda raw: component(raw, "unsplit")["outputs"][0].update(name="boxes"),
        "unsplit does not compute logits",
    ),
    "unsplit that takes what only the chain makes": (
        lambda raw: component(raw, "unsplit")["inputs"].append(tensor("h0", "batch", 6)),
        "unsplit, component unsplit takes h0, which nothing computes before",
    ),
    "step for tokens without text": (
        lambda raw: raw["steps"][0].update(when="token"),
        "the program writes no text",
    ),
    "token group without text": (
        lambda raw: exit_(raw, "exit_1").update(action="drop", tokens="image", outputs={}),
        "no token group image",
    ),
    "state that grows without tokens": (
        lambda raw: component(raw, "s1").update(states=[token_state()]),
        "grows with every token, but the chain runs once per request",
    ),
    "state of a prompt without one": (
        lambda raw: component(raw, "s1").update(
            states=[{"type": "prompt", "maker": "unsplit", "tensor": tensor("logits", "batch", 3)}]
        ),
        "logits is made of a prompt, but the chain runs once per request",
    ),
    "lengths without texts": (
        lambda raw: component(raw, "s1")["variants"][0].update(lengths=["past"]),
        "takes lengths of texts, but its chain runs once per request",
    ),
    "ids that are none": (
        lambda raw: raw["steps"].insert(
            0, gather(ids="x", output=tensor("embedded", "batch", 6, 8), when="input")
        ),
        "no input of ids is named x",
    ),
    "rows for no group": (
        lambda raw: raw["steps"].append(
            {"type": "place", "source": "logits", "target": "x", "group": "image", "when": "input"}
        ),
        "no token group image",
    ),
}  # fmt: skip


def gather(**fields: Any) -> Raw:
    return {"type": "gather", "size": 24, "offset": 0} | fields


@pytest.mark.parametrize("case", NAMES)
def test_names_that_do_not_fit_are_refused(manifests: dict[str, Raw], case: str) -> None:
    refused(manifests["classifier"], NAMES, case)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(manifests: dict[str, Raw], case: str) -> None:
    refused(manifests["classifier"], TENSORS, case)


def step(raw: Raw, kind: str) -> Raw:
    """The first step of a kind."""
    return next(one for one in raw["steps"] if one["type"] == kind)


def run_of(raw: Raw, name: str) -> Raw:
    return next(one for one in raw["steps"] if one.get("chain") == name)


def cross_head(raw: Raw) -> None:
    """A head that takes a second tensor, which has the axis new."""
    component(raw, "head")["inputs"].append(tensor("h0", "batch", "new", 8))


def second_text_chain(raw: Raw) -> None:
    """A chain before the decoder that runs for every token, too."""
    state = tensor("embedded", "batch", "new", 8)
    raw["components"]["p"] = {
        "variants": component(raw, "gate")["variants"],
        "inputs": [state],
        "outputs": [tensor("p/state", "batch", "new", 8)],
    }
    raw["chains"]["front"] = {
        "components": ["p"],
        "outputs": [tensor("seen", "batch", "new", 8)],
        "exits": [{"name": "front_1", "behind": "p", "outputs": {"seen": "p/state"}}],
    }
    raw["steps"].insert(-1, {"type": "run", "chain": "front", "when": "token"})


def second_state(raw: Raw, name: str) -> None:
    """A component that makes one more tensor of each token."""
    component(raw, name)["outputs"].append(tensor("more", "batch", "new", 8))


TEXTS: Cases = {
    "state without past": (
        lambda raw: component(raw, "s1")["states"][0].update(axes=["batch", 1, 4]),
        "the state layer1/keys has the axes ['batch', 1, 4]",
    ),
    "state with two pasts": (
        lambda raw: component(raw, "s1")["states"][0].update(axes=["batch", "past", "past", 4]),
        "the state layer1/keys has the axes",
    ),
    "state of an open size": (
        lambda raw: component(raw, "s1")["states"][0].update(axes=["batch", 1, "past", "size"]),
        "Axes of states are [batch, heads, past, size] with numbers for heads and size",
    ),
    "state with rows along another axis": (
        lambda raw: component(raw, "s1")["states"][0].update(row_axis=1),
        "the state layer1/keys has the axes",
    ),
    "two states of one name": (
        lambda raw: component(raw, "s1")["states"][1].update(name="layer1/keys"),
        "two states are named layer1/keys",
    ),
    "two pasts of one name": (
        lambda raw: component(raw, "s1")["states"][1].update(past="h0"),
        "two inputs are named h0",
    ),
    "two presents of one name": (
        lambda raw: component(raw, "s1")["states"][1].update(present="h1"),
        "two outputs are named h1",
    ),
    "maker that makes something else": (
        lambda raw: component(raw, "mean")["outputs"][0].update(name="prompt_sum"),
        "mean does not make prompt_mean",
    ),
    "maker that makes another form": (
        lambda raw: component(raw, "mean")["outputs"][0].update(axes=["batch", 7]),
        "mean does not make prompt_mean float32['batch', 6]",
    ),
    "maker that takes what does not come into the component": (
        lambda raw: component(raw, "mean")["inputs"][0].update(name="h0"),
        "maker mean takes h0, which is not an input of the component",
    ),
    "maker that takes what is made later": (
        lambda raw: component(raw, "mean")["inputs"][0].update(name="h3"),
        "maker mean takes h3, which the chain computes only later",
    ),
    "maker with states": (
        lambda raw: component(raw, "mean").update(states=[token_state()]),
        "maker mean: it has states of its own",
    ),
    "maker in the chain": (
        lambda raw: component(raw, "s2")["states"][0].update(maker="s1"),
        "s1 is a component of the chain and makes states",
    ),
    "maker on a path": (
        lambda raw: component(raw, "s2")["states"][0].update(maker="gate"),
        "gate makes states and is a component of its own",
    ),
    "maker that makes a tensor again": (
        lambda raw: component(raw, "mean")["outputs"].append(tensor("h0", "batch", 6)),
        "maker mean: h0 is made twice",
    ),
    "prompt state of every token": (
        lambda raw: [
            one.update(axes=["batch", "new", 6])
            for one in (
                component(raw, "mean")["outputs"][0],
                component(raw, "s2")["states"][0]["tensor"],
                component(raw, "unsplit")["states"][0]["tensor"],
            )
        ],
        "is kept for a whole text and has the axis new",
    ),
    "head with states that runs for a request": (
        lambda raw: component(raw, "projector").update(states=[token_state()]),
        "exit vision_1, projector: the state key grows with every token",
    ),
    "adapter before the last head": (
        lambda raw: exit_(raw, "exit_4")["path"].insert(
            0, {"component": "adapter", "inputs": {"state": "h3"}}
        ),
        "the last exit, exit_4, has an adapter",
    ),
    "adapter twice": (
        lambda raw: exit_(raw, "exit_1")["path"].insert(0, exit_(raw, "exit_1")["path"][0]),
        "exit exit_1 names adapter twice",
    ),
    "path input that the component does not have": (
        lambda raw: exit_(raw, "exit_2")["path"][0].update(inputs={"states": "h1"}),
        "exit exit_2, head has no input states",
    ),
    "path that takes what nothing makes": (
        lambda raw: exit_(raw, "exit_2")["path"][0].update(inputs={"state": "h9"}),
        "exit exit_2, head takes h9, which nothing computes before",
    ),
    "path that takes what is made behind the exit": (
        lambda raw: exit_(raw, "exit_2")["path"][0].update(inputs={"state": "h3"}),
        "exit exit_2, head takes h3, which the chain computes only later",
    ),
    "path that takes another exit's tensor": (
        lambda raw: exit_(raw, "exit_2")["path"][0].update(inputs={"state": "adapted"}),
        "exit exit_2, head takes adapted, which nothing computes before",
    ),
    "head of another width": (
        lambda raw: component(raw, "head")["inputs"][0].update(axes=["batch", 9]),
        "head takes state float32['batch', 9], but adapted float32['batch', 'new', 8] is given",
    ),
    "head of another dtype": (
        lambda raw: component(raw, "head")["inputs"][0].update(dtype="float16"),
        "head takes state float16",
    ),
    "head that takes all tokens and chosen ones": (
        cross_head, "head takes state float32['batch', 8], but adapted",
    ),
    "path that makes a tensor of the chain": (
        lambda raw: component(raw, "adapter")["outputs"][0].update(name="h2")
        or exit_(raw, "exit_1")["path"][1].update(inputs={"state": "h2"}),
        "component s2: h2 is made twice",
    ),
    "path that makes a known tensor": (
        lambda raw: component(raw, "adapter")["outputs"][0].update(name="positions"),
        "exit exit_1, adapter: positions is made twice",
    ),
    "gate for no group": (
        lambda raw: exit_(raw, "gate").update(tokens="sound"),
        "exit gate: there is no token group sound",
    ),
    "gate without a group": (
        lambda raw: exit_(raw, "gate").update(tokens=None),
        "exit gate: there is no token group None",
    ),
    "gate without a score": (
        lambda raw: exit_(raw, "gate").update(scores={}),
        "an exit that drops tokens has a path and one score, or neither, and no outputs",
    ),
    "gate with two scores": (
        lambda raw: exit_(raw, "gate")["scores"].update(more="gate/score"),
        "an exit that drops tokens has a path and one score, or neither, and no outputs",
    ),
    "gate that answers": (
        lambda raw: exit_(raw, "gate").update(outputs={"token": "gate/score"}),
        "an exit that drops tokens has a path and one score, or neither, and no outputs",
    ),
    "gate in a chain without a prompt": (
        lambda raw: exit_(raw, "vision_1").update(
            action="drop", tokens="image", outputs={}
        ),
        "drops tokens of a prompt, but the chain runs once per request",
    ),
    "table outside the store": (
        lambda raw: step(raw, "gather").update(offset=raw["files"][WEIGHTS]["bytes"]),
        "outside the weight store",
    ),
    "table without a store": (lambda raw: raw["files"].pop(WEIGHTS), "there is no graphs/weights"),
    "table without a width": (
        lambda raw: step(raw, "gather")["output"].update(axes=["batch", "new", None]),
        "the output has the axes of the ids and a fixed width".capitalize(),
    ),
    "table without axes": (
        lambda raw: step(raw, "gather")["output"].update(axes=[], row_axis=None),
        "do not give embedded",
    ),
    "table of a chain's output": (
        lambda raw: step(raw, "gather").update(ids="features"),
        "no input of ids is named features",
    ),
    "table before there are tokens": (
        lambda raw: step(raw, "gather").update(when="input"),
        "runs once per request, but tokens is made for every token",
    ),
    "table that makes a known tensor": (
        lambda raw: step(raw, "gather")["output"].update(name="features"),
        "step 2: features is made twice",
    ),
    "two tables for tokens": (
        lambda raw: raw["steps"].append(
            gather(ids="tokens", output=tensor("more", "batch", "new", 8))
        ),
        "2 steps look up tokens, not one for every token",
    ),
    "placed rows that nothing makes": (
        lambda raw: step(raw, "place").update(source="frames"),
        "step 3: no earlier chain has the output frames",
    ),
    "placed rows that no chain makes": (
        lambda raw: step(raw, "place").update(source="pixel_values"),
        "step 3: no earlier chain has the output pixel_values",
    ),
    "rows placed in what is no table's": (
        lambda raw: step(raw, "place").update(target="features"),
        "features is not the output of an earlier table",
    ),
    "rows placed before the table": (
        lambda raw: raw["steps"].insert(1, raw["steps"].pop(2)),
        "embedded is not the output of an earlier table",
    ),
    "rows placed too late": (
        lambda raw: raw["steps"].append(raw["steps"].pop(2)),
        "changes embedded after a chain has taken it",
    ),
    "placed rows of another width": (
        lambda raw: [
            one.update(axes=["batch", 2, 9])
            for one in (
                chain(raw, "vision")["outputs"][0],
                component(raw, "projector")["outputs"][0],
                component(raw, "vision_unsplit")["outputs"][0],
            )
        ],
        "rows of features float32['batch', 2, 9] do not fit into embedded",
    ),
    "placed rows without tokens": (
        lambda raw: [
            one.update(axes=["batch", 8])
            for one in (
                chain(raw, "vision")["outputs"][0],
                component(raw, "projector")["outputs"][0],
                component(raw, "vision_unsplit")["outputs"][0],
            )
        ],
        "rows of features float32['batch', 8] do not fit into embedded",
    ),
    "group outside the vocabulary": (
        lambda raw: raw["decoding"]["groups"]["image"].update(token=24),
        "the token of the group image 24 is outside the vocabulary",
    ),
    "groups of one token": (
        lambda raw: raw["decoding"]["groups"].update(sound={"token": 1}),
        "two token groups have the token 1",
    ),
    "mask that is known by another name": (
        lambda raw: raw["decoding"]["groups"]["image"].update(mask="positions"),
        "positions is made twice",
    ),
    "mask that nothing feeds": (
        lambda raw: raw["decoding"]["groups"]["image"].update(mask=None),
        "gate takes tokens/image, which nothing computes before",
    ),
    "stop token outside the vocabulary": (
        lambda raw: raw["decoding"].update(stop_tokens=[2, 24]),
        "the stop token 24 is outside the vocabulary (0 to 23)",
    ),
    "start token below the vocabulary": (
        lambda raw: raw["decoding"].update(start_tokens=[-1]),
        "the start token -1 is outside the vocabulary",
    ),
    "decoding of no chain": (
        lambda raw: raw["decoding"].update(chain="vision"),
        "decoding names the chain vision, but the last step that runs a chain runs decoder",
    ),
    "decoding before another chain": (
        lambda raw: raw["steps"].append(raw["steps"].pop(0)) or raw["steps"].pop(1),
        "decoding names the chain decoder, but the last step that runs a chain runs vision",
    ),
    "no token": (
        lambda raw: [
            chain(raw, "decoder")["outputs"][0].update(name="word"),
            component(raw, "unsplit")["outputs"][0].update(name="word"),
            *(
                one["outputs"].update(word=one["outputs"].pop("token"))
                for one in chain(raw, "decoder")["exits"]
                if one.get("outputs")
            ),
        ],
        "the chain decoder does not give token int64 [batch]",
    ),
    "no logits": (
        lambda raw: [
            chain(raw, "decoder")["outputs"].pop(),
            *(one.get("outputs", {}).pop("logits", 0) for one in chain(raw, "decoder")["exits"]),
        ],
        "the chain decoder does not give logits",
    ),
    "tokens that are no input": (
        lambda raw: raw["decoding"].update(tokens="ids"),
        "no input is named ids",
    ),
    "positions of another form": (
        lambda raw: raw["decoding"]["positions"].update(dtype="int32"),
        "positions are int32['batch', 'new'], not int64 [batch, new]",
    ),
    "no limit of positions": (
        lambda raw: raw.update(limits={}),
        "neither limits.positions nor decoding.capacity",
    ),
    "tokens of another form": (
        lambda raw: raw["inputs"][0].update(axes=["batch", 5]),
        "tokens are int64['batch', 5], not int64 [batch, new]",
    ),
    "text that no decoding explains": (
        lambda raw: raw.pop("decoding"),
        "step 3: there is no token group image",
    ),
    "step for the prompt alone": (
        lambda raw: run_of(raw, "decoder").update(when="prompt"),
        "Invalid enum value 'prompt'",
    ),
    "two chains for every token": (
        second_text_chain,
        "the chain front runs for every token, but writes no text",
    ),
    "two states of each token": (
        lambda raw: second_state(raw, "s0"),
        "component s0 passes on h0, more per token, not one state",
    ),
    "two states of each token, unsplit": (
        lambda raw: second_state(raw, "unsplit_front"),
        "unsplit, component unsplit_front passes on h1, more per token, not one state",
    ),
    "two states of each token, adapted": (
        lambda raw: second_state(raw, "adapter"),
        "exit exit_1, adapter passes on adapted, more per token, not one state",
    ),
    "state from farther back": (
        lambda raw: component(raw, "s2")["inputs"].append(tensor("h0", "batch", "new", 8)),
        "component s2 takes h0 per token, which the component before does not pass on",
    ),
    "state from farther back, adapted": (
        lambda raw: component(raw, "adapter")["inputs"].append(
            tensor("embedded", "batch", "new", 8)
        ),
        "adapter takes embedded per token, which the component before does not pass on",
    ),
    "head that takes a whole prompt's tensor": (
        lambda raw: component(raw, "head")["inputs"].append(tensor("pixel_values", "batch", 3)),
        "head takes adapted, pixel_values",
    ),
    "logits of an open vocabulary": (
        lambda raw: [
            one["outputs"][1].update(axes=["batch", None])
            for one in (
                chain(raw, "decoder"), component(raw, "head"), component(raw, "unsplit")
            )
        ],
        "the chain decoder does not give logits [batch, vocabulary]",
    ),
    "projection with lengths": (
        lambda raw: component(raw, "s1")["projections"][0].update(lengths=["past"]),
        "component s1 has a projection that takes lengths",
    ),
    "positions before there are tokens": (
        lambda raw: component(raw, "v0")["inputs"].append(
            tensor("positions", "batch", "new", dtype="int64")
        ),
        "runs once per request, but positions is made for every token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_parts_of_a_decoder_that_do_not_fit_are_refused(
    manifests: dict[str, Raw], case: str
) -> None:
    refused(manifests["decoder"], TEXTS, case)


ENCODERS: Cases = {
    "encoder behind the decoder": (
        lambda raw: raw["steps"].insert(2, raw["steps"].pop(1)) or raw["steps"].append(
            raw["steps"].pop(2)
        ),
        "maker cross_0 takes encoder_state, which the later chain encoder computes",
    ),
    "encoder that needs the decoder": (
        lambda raw: component(raw, "e0")["inputs"].append(
            tensor("token", "batch", dtype="int64")
        ),
        "component e0 takes token, which the later chain decoder computes",
    ),
    "cross keys that come from inside the encoder": (
        lambda raw: component(raw, "cross_0")["inputs"][0].update(name="read2"),
        "maker cross_0 takes read2, which is not an output of the chain encoder",
    ),
    "states of an exit that are made of tokens": (
        lambda raw: component(raw, "cross_adapter")["inputs"].append(
            tensor("h1", "batch", "new", 6)
        ),
        "cross_adapter makes states for the path of an exit of h1, the tokens of a prompt",
    ),
    "decoder that runs once per request": (
        lambda raw: run_of(raw, "decoder").update(when="input"),
        "component s0 runs once per request, but embedded is made for every token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODERS)
def test_steps_of_an_encoder_and_a_decoder_that_do_not_fit_are_refused(
    manifests: dict[str, Raw], case: str
) -> None:
    refused(manifests["encoder"], ENCODERS, case)


def test_graphs_take_inputs_lengths_past_and_what_makers_made(manifests: dict[str, Raw]) -> None:
    manifest = check(manifests["encoder"])
    found = {name: (inputs, outputs) for name, inputs, outputs in graph_signatures(manifest)}
    past = {"past/layer1/keys", "past/layer1/values"}
    present = {"present/layer1/keys", "present/layer1/values"}
    own = {"h0", "positions", "source_mask"}
    made = {"layer1/cross_keys", "layer1/cross_values"}
    assert found["graphs/s1.onnx"] == (own | past | made | {"lengths/past"}, {"h1"} | present)
    assert found["graphs/s1_projection.onnx"] == (own, present)
    assert found["graphs/cross_1.onnx"] == ({"encoder_state"}, made)


def test_start_tokens_without_another_input_are_refused(manifests: dict[str, Raw]) -> None:
    raw = copy.deepcopy(manifests["plain"])
    raw["decoding"]["start_tokens"] = [2]
    with pytest.raises(BundleError, match="texts begin with start tokens, but there is no input"):
        check(raw)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_passes_or_raises_ours(
    data: st.DataObject, manifests: dict[str, Raw]
) -> None:
    raw = copy.deepcopy(manifests[data.draw(st.sampled_from(["decoder", "encoder"]))])
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(raw, data)
    try:
        manifest = check(raw)
    except BundleError as error:
        assert error.what
    else:
        assert manifest.last_chain.exits
