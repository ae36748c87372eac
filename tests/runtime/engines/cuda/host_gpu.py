"""An engine that computes with ONNX Runtime on "device" memory of driver.c: what a GPU engine does
around its graphs, on a machine without a GPU. Code that touches that memory from the host, as no
program may on a GPU, ends the process.

Run by test_device_memory.py in processes of its own:

    LD_LIBRARY_PATH=folder-of-libcuda python -m tests.runtime.engines.cuda.host_gpu NAME BUNDLE
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit.bundle.policy import OUT_OF_REACH
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.runtime import Model, Rule, load
from edgeexit.runtime.engines.base import Bound, Slot
from edgeexit.runtime.engines.cuda.device import Counts, Device
from edgeexit.runtime.engines.cuda.driver import ask
from edgeexit.runtime.engines.cuda.replay import Replays
from edgeexit.runtime.engines.cuda.staging import Staging
from edgeexit.runtime.engines.host import HostSlot, Window
from edgeexit.runtime.engines.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeGraph
from edgeexit.runtime.programs.arguments import ModeName
from edgeexit.runtime.programs.sampling import Sampling
from tests.runtime.engines.cuda.on_engine import model_on
from tests.toys import CLASSES, make_inputs

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
CALLBACKS: list[Any] = []
PROMPTS = [[5, 9, 2, 250, 31, 7, 7, 80], [100, 3], list(range(20, 50))]
NEW = 40


class HostGpu(OnnxRuntimeEngine):
    """ONNX Runtime's CPU provider over device memory."""

    def __init__(self, features: frozenset[str] = frozenset()) -> None:
        super().__init__("cpu")
        self._host = OnnxRuntimeEngine("cpu")
        self.features = features
        self.device = self.gpu = Device()
        self.replays = Replays(self.device)
        self.open_memory: Callable[[int], None] = ctypes.CDLL("libcuda.so.1").device_memory

    def open(self, path: Path, outputs: Collection[str] | None = None) -> Any:
        return HostGpuGraph(self, self._host.open(path, outputs))

    def allocate(self, size_bytes: int, *, sparse: bool = False) -> Slot:
        return self.device.allocate(size_bytes)

    def allocate_host(self, size_bytes: int) -> HostSlot:
        return self.device.allocate_host(size_bytes)

    def settle(self) -> None:
        self.device.settle()


class HostGpuGraph:
    """A session whose tensors are all in device memory."""

    def __init__(self, engine: HostGpu, graph: OnnxRuntimeGraph) -> None:
        self._engine, self._graph, self._staging = engine, graph, Staging(engine.device)

    def bind(
        self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]
    ) -> Callable[[], object]:
        layout = self._staging.lay_out(inputs, outputs)

        def inside(tensors: Mapping[str, Bound]) -> dict[str, Bound]:
            places = layout.addresses
            return {name: (Window("cpu", places[name]), *tensors[name][1:]) for name in tensors}

        compute = self._graph.bind(inside(inputs), inside(outputs))

        def work(_: object) -> None:
            self._engine.open_memory(1)
            compute()
            self._engine.open_memory(0)

        device, driver = self._engine.device, self._engine.device.driver
        callback = CALLBACK(work)
        CALLBACKS.append(callback)  # streams may reach it when the run is no longer referenced
        address = ctypes.cast(callback, ctypes.c_void_p).value

        def execute() -> None:
            ask(driver.cuLaunchHostFunc(device.raw_stream, driver.CUhostFn(address), 0))

        return self._staging.around(layout, execute, self._engine.replays.of)

    def output_shapes(self, inputs: Mapping[str, Bound]) -> dict[str, tuple[int, ...]]:
        raise AssertionError("no shape of these bundles is open")


def _on_device(bundle: Bundle, features: frozenset[str], rule: Rule) -> tuple[Model, Counts]:
    engine = HostGpu(features)
    return model_on(bundle, engine, rule), engine.device.counts


def _compare(bundle: Bundle, features: frozenset[str], mode: ModeName) -> None:
    rule = Rule(thresholds=0.05)
    decoder, counts = _on_device(bundle, features, rule)
    form = decoder.describe_engine()["states"]
    assert form == ("fixed" if features else "append")
    with decoder, load(bundle, policy=rule, states=form) as host:  # type: ignore[arg-type]
        for prompts in ([PROMPTS[0]], PROMPTS):
            for sampling in (None, Sampling(temperature=1.0, top_k=20, seed=3)):
                arguments: dict[str, Any] = {
                    "max_new_tokens": NEW, "mode": mode, "sampling": sampling, "text": False,
                    "audit": mode == "fast",
                }  # fmt: skip
                if mode == "exact":
                    arguments |= {"drafts": 3}
                ours = decoder.generate(prompts, **arguments).finish()
                theirs = host.generate(prompts, **arguments).finish()
                assert ours.tokens == theirs.tokens
                assert ours.statistics.exits == theirs.statistics.exits
            # Once all sizes have occurred, the same text again allocates nothing on the device.
            warm = counts.allocations
            decoder.generate(prompts, **arguments).finish()
            assert counts.allocations == warm


def full_with_appended_caches(bundle: Bundle) -> None:
    _compare(bundle, frozenset(), "full")


def exact_with_appended_caches(bundle: Bundle) -> None:
    _compare(bundle, frozenset(), "exact")


def fast_with_appended_caches(bundle: Bundle) -> None:
    _compare(bundle, frozenset(), "fast")


def approximate_with_appended_caches(bundle: Bundle) -> None:
    _compare(bundle, frozenset(), "approximate")


def exact_with_caches_in_place(bundle: Bundle) -> None:
    _compare(bundle, frozenset({"opset-24", "cache-update", "float32-attention"}), "exact")


def fast_with_caches_in_place(bundle: Bundle) -> None:
    _compare(bundle, frozenset({"opset-24", "cache-update", "float32-attention"}), "fast")


def a_greedy_token_costs_the_host_eight_bytes(bundle: Bundle) -> None:
    """Logits stay on the device unless tokens are sampled."""
    decoder, counts = _on_device(bundle, frozenset(), Rule())
    with decoder:
        decoder.generate([PROMPTS[0]], max_new_tokens=2).finish()
        before = counts.to_host_bytes
        decoder.generate([PROMPTS[0]], max_new_tokens=NEW).finish()
        assert counts.to_host_bytes - before == NEW * 8
        before = counts.to_host_bytes
        sampling = Sampling(temperature=1.0)
        decoder.generate([PROMPTS[0]], max_new_tokens=1, sampling=sampling).finish()
        assert counts.to_host_bytes - before > 4 * 300


def rows_of_one_pass_cost_the_host_four_bytes_a_boundary(bundle: Bundle) -> None:
    engine, rule = HostGpu(), Rule(thresholds=0.8)
    inputs = make_inputs(16)
    model = model_on(bundle, engine, rule, all_scores=True)
    with load(bundle, policy=rule) as host, model:
        theirs, ours = host(inputs), model(inputs)
        np.testing.assert_array_equal(ours.exits, theirs.exits)
        for name, value in theirs.outputs.items():
            np.testing.assert_allclose(ours.outputs[name], value, rtol=1e-5)
        taken = ours.exits.tolist()
        assert len(set(taken)) > 1 and max(taken) == 3
        counts = engine.device.counts
        allocations, before = counts.allocations, counts.to_host_bytes
        model(inputs)
        assert counts.allocations == allocations
        # A score of every row that reaches an exit, and answers only where some row leaves.
        rows = [sum(at >= number for at in taken) for number in range(4)]
        answers = sum(rows[number] * CLASSES * 4 for number in set(taken))
        assert counts.to_host_bytes - before == 4 * sum(rows) + answers


def a_row_leaves_where_it_should_though_segments_are_launched_ahead(bundle: Bundle) -> None:
    engine = HostGpu()
    rules = [
        Rule(thresholds=0.6),
        Rule(thresholds={"exit_2": 0.7}),
        Rule(thresholds={"exit_1": 0.8, "exit_3": 0.3}),
        Rule(),
    ]
    model = model_on(bundle, engine, Rule(), launch_ahead="always", all_scores=True)
    rows = [make_inputs(1, seed=seed) for seed in range(24)]
    counts = engine.device.counts
    with load(bundle) as host, model:
        for rule in rules:
            host.policy = model.policy = rule  # type: ignore[assignment]
            for inputs in rows:
                theirs, ours = host(inputs), model(inputs)
                assert ours.exit_names == theirs.exit_names
                np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-6)
                for name, value in theirs.outputs.items():
                    np.testing.assert_allclose(ours.outputs[name], value, rtol=1e-5)
        model.policy = rules[0]  # type: ignore[assignment]
        allocations = counts.allocations
        for inputs in rows:
            model(inputs)  # after speculative runs, whole batches and traces are right too
        assert counts.allocations == allocations
        batch, traced = make_inputs(8), make_inputs(1)
        host.policy = model.policy
        np.testing.assert_array_equal(model(batch).exits, host(batch).exits)
        model(rows[0])
        for ours, theirs in zip(model.trace(traced).scores, host.trace(traced).scores, strict=True):
            np.testing.assert_allclose(ours["max_prob"], theirs["max_prob"], rtol=1e-5)
        about = model.boundaries
        assert [one["launched_ahead"] for one in about] == [True] * 3
        assert 0 < about[0]["left"] < about[0]["asked"]


def segments_are_launched_ahead_where_that_pays(bundle: Bundle) -> None:
    from edgeexit.measure.bench.cases import gpu_facts

    engine = HostGpu()
    rule = Rule(thresholds={"exit_1": OUT_OF_REACH, "exit_3": -np.inf})
    inputs = make_inputs(1)
    with model_on(bundle, engine, rule, launch_ahead="measured", all_scores=True) as model:
        model(inputs)
        found = gpu_facts(model, inputs)
        assert not any(one["launched_ahead"] for one in found["boundaries"])
        assert found["a_call"]["allocations"] == 0
        sent = 4 * (inputs["x"].size + inputs["shift"].size + inputs["scale"].size)
        assert found["a_call"]["to_device_bytes"] >= sent
        # Two scores are asked for, and the answer of one exit is fetched.
        assert found["a_call"]["to_host_bytes"] == 2 * 4 + CLASSES * 4
        for _ in range(3000):
            assert model(inputs).exit_names == ["exit_3"]
        first, second, third = model.boundaries
        assert first["launched_ahead"] and first["left"] == 0 and first["gap_ms"] > 0
        assert second["asked"] == 0 and not second["launched_ahead"]
        assert third["left"] == third["asked"] and not third["launched_ahead"]
        model.policy = Rule(thresholds={"exit_1": -np.inf})  # type: ignore[assignment]
        assert model(inputs).exit_names == ["exit_1"]
        assert [one["asked"] for one in model.boundaries] == [1, 0, 0]


if __name__ == "__main__":
    globals()[sys.argv[1]](open_bundle(sys.argv[2]))
