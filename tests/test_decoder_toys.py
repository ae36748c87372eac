"""The graphs of the toy decoder, replayed by hand without the project's runtime: they give what the
reference computes from the beginning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Exit, Gather, PromptState, TokenState
from edgeexit.bundle.policy import policy_for
from edgeexit.bundle.reader import WEIGHTS, Bundle
from tests.decoder_reference import Reference, Row
from tests.decoder_toys import (
    IMAGE,
    VOCABULARY,
    WIDTH,
    DecoderToy,
    batch_inputs,
    make_decoder_toy,
    make_rows,
    toy_policy,
    write_decoder_toy,
)
from tests.toys import SCORE_NAMES, score_values

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "components of two layers": {"layers": (1, 2, 1), "adapter": 1},
    "stateless": {"stateless": True, "adapter": 0},
    "gate in front": {"gate": True, "gate_behind": 0, "adapter": 0},
    "gate and prefix": {"gate": True, "prefix": True, "stateless": True, "adapter": 1},
    "prefix": {"prefix": True, "layers": (2, 2), "exits": (0,)},
    "encoder": {"encoder": True},
    "encoder and stateless": {"encoder": True, "stateless": True, "adapter": 1},
}
NEW = 6
TOLERANCE = 1e-4
GARBAGE = 3.5
"""What stands where nothing counts."""


class Graphs:
    """A bundle's graphs on ONNX Runtime."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def __call__(
        self, name: str, feeds: Mapping[str, NDArray], *, projection: bool = False
    ) -> dict[str, NDArray]:
        """Runs a component's graph on the feeds that it takes."""
        component = self._bundle.manifest.components[name]
        variant = (component.projections if projection else component.variants)[0]
        if variant.graph not in self._sessions:
            path = self._bundle.file(variant.graph)
            self._sessions[variant.graph] = onnxruntime.InferenceSession(path)
        session = self._sessions[variant.graph]
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, taken), strict=True))


class Replay:
    """The decoder of a toy for a batch of texts.

    Args:
        thresholds: As for the reference, which gives what earlier chains hand on.

    Attributes:
        said: Exit -> per row, place of a token in the text -> logits.
        kept: Token state -> ``[batch, 1, capacity, size]``.
        counts: Component -> per row, how many tokens its states have.
    """

    def __init__(
        self, toy: DecoderToy, bundle: Bundle, rows: Sequence[Row], thresholds: Mapping[str, float]
    ) -> None:
        self.manifest, self.rows, self.graphs = bundle.manifest, rows, Graphs(bundle)
        self.reference, self._thresholds = Reference(toy, thresholds), thresholds
        self.said: dict[str, list[dict[int, NDArray]]] = {}
        self.kept: dict[str, NDArray] = {}
        self.counts: dict[str, list[int]] = {}
        self.known: dict[str, NDArray] = _handed(self.reference, rows) if toy.encoder else {}
        self._made: set[str] = set()

    def feed(self, texts: Sequence[Sequence[int]], start: Sequence[int]) -> None:
        """Takes what every text has from its place `start` on through all components, and asks
        every exit about it."""
        self.stand(texts, start)
        for name in self.manifest.chains["decoder"].components:
            self.run(name)
            for exit_ in self.manifest.chains["decoder"].exits:
                if exit_.behind == name and exit_.action == "drop":
                    self._ask_gate(exit_, max(start) == 0)
                elif exit_.behind == name:
                    self._ask(exit_)

    def stand(self, texts: Sequence[Sequence[int]], start: Sequence[int]) -> None:
        """Gives what every text has from its place `start` on to the first component."""
        self._stand([list(range(a, len(text))) for a, text in zip(start, texts, strict=True)])
        pairs = zip(self.rows, texts, start, strict=True)
        embedded = [self.reference.embedded(row, text)[a:] for row, text, a in pairs]
        self.known["embedded"] = self._filled(embedded)

    def _filled(self, rows: Sequence[NDArray]) -> NDArray:
        """Rows of unlike length in one array."""
        found = np.full((len(rows), max(map(len, rows)), WIDTH), GARBAGE, np.float32)
        for number, row in enumerate(rows):
            found[number, : len(row)] = row
        return found

    def _stand(self, places: list[list[int]]) -> None:
        """Says where the tokens of this run stand."""
        self._places = places
        shape = (len(places), max(map(len, places)))
        positions, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        prompt = np.zeros(len(places), np.int64)
        for number, (row, own) in enumerate(zip(self.rows, places, strict=True)):
            positions[number, : len(own)] = own
            prompt[number] = sum(place < len(row.prompt) for place in own)
            marks = [place < len(row.prompt) and row.prompt[place] == IMAGE for place in own]
            mask[number, : len(own)] = marks
        self.known |= {"positions": positions, "tokens/image": mask, "lengths/prompt": prompt}

    def run(self, name: str, renamed: Mapping[str, str] | None = None) -> dict[str, NDArray]:
        """Runs a component with its states."""
        component, batch = self.manifest.components[name], len(self.rows)
        before = self.counts.setdefault(name, [0] * batch)
        for state in component.states:
            if isinstance(state, PromptState) and state.maker not in self._made:
                self._made.add(state.maker)
                self.known |= self.graphs(state.maker, self.known)
            elif isinstance(state, TokenState):
                capacity, size = self.manifest.limits["positions"], state.axes[-1]
                assert isinstance(size, int)
                empty = np.full((batch, 1, capacity, size), GARBAGE, np.float32)
                self.known[state.past] = self.kept.setdefault(state.name, empty)
        more = {own: self.known[other] for own, other in (renamed or {}).items()}
        lengths = {"lengths/past": np.array(before, np.int64)}
        made = self.graphs(name, {**self.known, **lengths, **more})
        for state in component.states:
            for row, own in enumerate(self._places if isinstance(state, TokenState) else []):
                added = made[state.present][row, :, : len(own)]  # type: ignore[union-attr]
                self.kept[state.name][row, :, before[row] : before[row] + len(own)] = added  # type: ignore[union-attr]
        self.counts[name] = [a + len(b) for a, b in zip(before, self._places, strict=True)]
        self.known |= made
        return made

    def _ask(self, exit_: Exit) -> None:
        *adapters, head = exit_.path
        for call in adapters:
            self.run(call.component, call.inputs)
        state = self.known[head.inputs["state"]]
        made = self.graphs(head.component, {"state": state.reshape(-1, WIDTH)})
        logits = made[exit_.outputs["logits"]].reshape(*state.shape[:2], VOCABULARY)
        np.testing.assert_array_equal(
            made[exit_.outputs["token"]].reshape(state.shape[:2]), logits.argmax(-1)
        )
        for name, values in score_values(logits.astype(np.float64)).items():
            found = made[exit_.scores[name]].reshape(state.shape[:2])
            np.testing.assert_allclose(found, values, atol=TOLERANCE)
        said = self.said.setdefault(exit_.name, [{} for _ in self.rows])
        for row, own in enumerate(self._places):
            said[row] |= {place: logits[row, n] for n, place in enumerate(own)}

    def _ask_gate(self, exit_: Exit, prompt: bool) -> None:
        """Lets the image tokens of a prompt go where the gate says so."""
        [call] = exit_.path
        state = call.inputs["state"]
        made = self.graphs(call.component, {**self.known, "state": self.known[state]})
        if not prompt:
            return
        scores = made[exit_.scores["drop"]]
        expected = [self.reference.run(row).gate for row in self.rows]
        np.testing.assert_allclose(scores, expected, atol=TOLERANCE)  # type: ignore[arg-type]
        gone = scores >= self._thresholds.get(exit_.name, np.inf)
        stays = [
            [n for n, place in enumerate(own) if not (gone[row] and mask[place])]
            for row, (own, mask) in enumerate(
                zip(self._places, self.known["tokens/image"], strict=True)
            )
        ]
        rows = [self.known[state][row, own] for row, own in enumerate(stays)]
        self._stand([[p[n] for n in own] for p, own in zip(self._places, stays, strict=True)])
        self.known[state] = self._filled(rows)


def _handed(reference: Reference, rows: Sequence[Row]) -> dict[str, NDArray]:
    """What the encoder hands on, padded, and the mask."""
    mask = batch_inputs(rows)["source_mask"]
    states = np.full((*mask.shape, WIDTH), GARBAGE, np.float32)
    for number, row in enumerate(rows):
        state = reference.encoder(row)[reference.encoder_exit(row)]["encoder_state"]
        states[number, : len(state)] = state
    return {"encoder_state": states, "source_mask": mask}


@pytest.fixture(scope="module", params=OPTIONS)
def toy(request: pytest.FixtureRequest) -> DecoderToy:
    return make_decoder_toy(**OPTIONS[request.param])


@pytest.fixture(scope="module")
def bundle(toy: DecoderToy, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_decoder_toy(toy, tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="module")
def rows(toy: DecoderToy) -> list[Row]:
    return make_rows(toy, [9, 3, 12, 8])


@pytest.fixture(scope="module")
def thresholds(toy: DecoderToy, rows: list[Row]) -> dict[str, float]:
    """Thresholds at which rows take different exits of earlier chains, and some leave at a gate."""
    reference = Reference(toy)
    found = {}
    if toy.gate:
        found["gate"] = _between([reference.run(row).gate for row in rows if IMAGE in row.prompt])
    if toy.prefix:
        said = [value for row in rows for value in reference.vision(row)[0]["confidence"]]
        found["vision_1"] = _between(said)
    if toy.encoder:
        found["encoder_1"] = _between([reference.encoder(row)[0]["saturation"] for row in rows])
    return found


def _between(values: Sequence[Any]) -> float:
    low, high = np.sort(np.array(values, np.float64))[len(values) // 2 - 1 :][:2]
    assert high - low > 1e-3
    return float(low + high) / 2


def test_graphs_pass_the_checker(bundle: Bundle) -> None:
    for component in bundle.manifest.components.values():
        for variant in [*component.variants, *component.projections]:
            onnx.checker.check_model(str(bundle.file(variant.graph)), full_check=True)


@pytest.mark.parametrize("piece", [0, 4], ids=["prompt in one run", "prompt in two runs"])
def test_replay_gives_what_the_reference_gives(
    toy: DecoderToy,
    bundle: Bundle,
    rows: list[Row],
    thresholds: dict[str, float],
    piece: int,
) -> None:
    if piece and (toy.stateless or toy.gate):
        pytest.skip("something looks at the whole prompt")
    replay = Replay(toy, bundle, rows, thresholds)
    reference = replay.reference
    texts = [[*row.prompt, *reference.full(row, NEW).tokens] for row in rows]
    ends = [len(row.prompt) for row in rows]
    first = [min(piece, end) for end in ends] if piece else ends
    replay.feed([text[:end] for text, end in zip(texts, first, strict=True)], [0] * len(rows))
    if first != ends:
        replay.feed([text[:end] for text, end in zip(texts, ends, strict=True)], first)
    for step in range(NEW):
        now = [end + step for end in ends]
        replay.feed([text[: end + 1] for text, end in zip(texts, now, strict=True)], now)
    for name in toy.stops:
        for row, text, said in zip(rows, texts, replay.said[name], strict=True):
            expected = reference.logits(row, text, name)
            assert sorted(said) == np.flatnonzero(~np.isnan(expected[:, 0])).tolist()
            for place, logits in said.items():
                np.testing.assert_allclose(logits, expected[place], atol=TOLERANCE)
    for name, kept in replay.kept.items():
        for row, text, own in zip(rows, texts, kept, strict=True):
            expected = reference.run(row, text).kept[name]
            np.testing.assert_allclose(own[0, : len(expected)], expected, atol=TOLERANCE)
            assert (own[0, len(expected) :] == GARBAGE).all()


def test_unsplit_gives_what_the_last_exit_gives(
    toy: DecoderToy, bundle: Bundle, rows: list[Row], thresholds: dict[str, float]
) -> None:
    earlier = {name: value for name, value in thresholds.items() if name != "gate"}
    for row in rows:
        replay = Replay(toy, bundle, [row], earlier)
        text = [*row.prompt, *replay.reference.full(row, 3).tokens]
        start = 0
        for end in range(len(row.prompt), len(text) + 1):
            replay.stand([text[:end]], [start])
            for name in bundle.manifest.chains["decoder"].unsplit:
                made = replay.run(name)
            expected = replay.reference.logits(row, text[:end])[-1]
            np.testing.assert_allclose(made["logits"], expected[None], atol=TOLERANCE)
            assert made["token"].tolist() == [expected.argmax()]
            start = end


def test_projections_give_what_the_reference_keeps(
    toy: DecoderToy, bundle: Bundle, rows: list[Row]
) -> None:
    reference, graphs = Reference(toy), Graphs(bundle)
    behind = toy.exits[0]
    row = rows[0]
    text, place = row.prompt, len(row.prompt) - 1
    passed = reference.run(row, text, {place: behind})
    state = passed.states[behind][-1:].astype(np.float32)
    for number in range(behind + 1, len(toy.layers)):
        component = bundle.manifest.components[f"s{number}"]
        tokens = [state for state in component.states if isinstance(state, TokenState)]
        assert bool(component.projections) == bool(tokens)
        if not component.projections:
            continue
        feeds = {f"h{number - 1}": state[None], "positions": np.array([[place]])}
        if toy.encoder:
            feeds |= _handed(reference, [row])
        made = graphs(f"s{number}", feeds, projection=True)
        for one in tokens:
            expected = passed.kept[one.name][-1]
            np.testing.assert_allclose(made[one.present][0, 0, 0], expected, atol=TOLERANCE)


def test_tower_gives_what_the_reference_gives(
    toy: DecoderToy, bundle: Bundle, rows: list[Row]
) -> None:
    if not toy.prefix:
        pytest.skip("it has no tower")
    graphs, known = Graphs(bundle), batch_inputs(rows)
    said = [reference for row in rows for reference in [Reference(toy).vision(row)]]
    for number in range(2):
        known |= graphs(f"v{number}", known)
        made = graphs("projector", {"state": known[f"seen{number}"]})
        for key in ("features", "confidence"):
            expected = np.concatenate([one[number][key] for one in said])
            np.testing.assert_allclose(made[f"projector/{key}"], expected, atol=TOLERANCE)
    whole = graphs("vision_unsplit", known)["features"]
    np.testing.assert_allclose(whole, made["projector/features"], atol=TOLERANCE)


def test_encoder_gives_what_the_reference_gives(
    toy: DecoderToy, bundle: Bundle, rows: list[Row]
) -> None:
    if not toy.encoder:
        pytest.skip("it has no encoder")
    graphs, known = Graphs(bundle), batch_inputs(rows)
    known["source_embedded"] = toy.weights["source_embedding"][known["source_ids"]]
    said = [Reference(toy).encoder(row) for row in rows]
    for number in range(3):
        known |= graphs(f"e{number}", known)
        for row, one in enumerate(said):
            state = one[number]["encoder_state"]
            made = known[f"read{number}"][row, : len(state)]
            np.testing.assert_allclose(made, state, atol=TOLERANCE)
            saturation = known[f"e{number}/saturation"][row]
            np.testing.assert_allclose(saturation, one[number]["saturation"], atol=TOLERANCE)
    whole = graphs("encoder_unsplit", known)["encoder_state"]
    np.testing.assert_allclose(whole, known["read2"], atol=TOLERANCE)


def test_tables_are_where_the_steps_say(toy: DecoderToy, bundle: Bundle) -> None:
    raw = bundle.file(WEIGHTS).read_bytes()
    names = {"tokens": "embedding", "source_ids": "source_embedding"}
    for step in bundle.manifest.steps:
        if isinstance(step, Gather):
            flat = np.frombuffer(raw, np.float32, step.size * WIDTH, step.offset)
            expected = toy.weights[names[step.ids]]
            np.testing.assert_array_equal(flat.reshape(-1, WIDTH), expected)


def test_samples_are_what_the_reference_says(toy: DecoderToy, bundle: Bundle) -> None:
    samples = np.load(bundle.file("samples/reference.npz"))
    tokens = samples["input/tokens"].tolist()
    images = len(samples["input/pixel_values"]) // len(tokens) if toy.prefix else 0
    for number, text in enumerate(tokens):
        source = samples["input/source_ids"][number] if toy.encoder else None
        own = slice(number * images, (number + 1) * images)
        pixels = samples["input/pixel_values"][own] if toy.prefix else None
        said = Reference(toy).trace(Row(text, source, pixels))
        for name, one in said.items():
            logits = samples[f"{name}/logits"][number]
            np.testing.assert_allclose(logits, one["logits"][-1], atol=TOLERANCE)
            assert samples[f"{name}/token"][number].tolist() == one["token"].tolist()
            assert samples[f"{name}/gap"][number].shape == (len(text),)
            for score in SCORE_NAMES:
                found = samples[f"{name}/{score}"][number]
                np.testing.assert_allclose(found, one[score], atol=TOLERANCE)


def test_every_token_and_place_matters(toy: DecoderToy, rows: list[Row]) -> None:
    reference = Reference(toy)
    changes = []
    for row in rows:
        text = [*row.prompt, *reference.full(row, NEW).tokens]
        before = reference.logits(row, text)[-1]
        for place in range(len(text) - 1):
            if text[place] == IMAGE or (toy.encoder and place == 0):
                continue
            other = [*text]
            other[place] = 3 + (text[place] + 4) % (VOCABULARY - 3)
            changed = Row(other[: len(row.prompt)], row.source, row.pixels)
            changes.append(np.abs(reference.logits(changed, other)[-1] - before).max())
    assert np.min(changes) > TOLERANCE and np.median(changes) > 0.3
    for row in rows:
        said = reference.trace(row, [*row.prompt, *reference.full(row, NEW).tokens])
        spread = [np.ptp(said[name][score]) for name in said for score in SCORE_NAMES]
        assert min(spread) > 0.05


def test_modes_differ_under_a_policy(toy: DecoderToy, rows: list[Row]) -> None:
    name = next(iter(toy.stops))
    said = [Reference(toy).trace(row)[name]["max_prob"] for row in rows]
    reference = Reference(toy, {name: float(np.median(np.concatenate(said)))})
    fast = [reference.fast(row, 10) for row in rows]
    assert {name, [*toy.stops][-1]} <= {exit_ for one in fast for exit_ in one.exits}
    full = [reference.full(row, 10) for row in rows]
    approximate = [reference.approximate(row, 10) for row in rows]
    assert [one.tokens for one in fast] != [one.tokens for one in full]
    assert [one.tokens for one in fast] != [one.tokens for one in approximate]
    never = Reference(toy)
    for row, one in zip(rows, full, strict=True):
        assert never.fast(row, 10).tokens == never.approximate(row, 10).tokens == one.tokens


def test_policy_has_a_rule_for_every_chain(toy: DecoderToy, bundle: Bundle) -> None:
    name = next(iter(toy.stops))
    policy = toy_policy(toy, {name: 0.5, "gate": 0.5, "vision_1": 0.5, "encoder_1": 0.5})
    assert policy_for(policy, bundle).rules.keys() == bundle.manifest.chains.keys()


def test_weights_do_not_depend_on_options() -> None:
    one, other = make_decoder_toy(), make_decoder_toy(gate=True, prefix=True, stateless=True)
    for name, array in one.weights.items():
        np.testing.assert_array_equal(array, other.weights[name])
