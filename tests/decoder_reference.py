"""What `tests.decoder_toys` computes, in float64 by the plainest code: no caches, no batches, every
text from its beginning for every token.

A text is one row: `Row` says what it begins with, a list of token ids what it is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.policy import Schedule
from tests.decoder_graphs import ENCODERS, EPSILON, FEATURES, IMAGE
from tests.toys import score_values

if TYPE_CHECKING:
    from tests.decoder_toys import DecoderToy

NEVER = float("inf")


@dataclass(frozen=True)
class Row:
    """What one text is made of.

    Attributes:
        prompt: Its first tokens.
        source: What the encoder reads, ``[source]`` without padding.
        pixels: Images ``[images, PIXELS]``, in the order of their placeholders.
    """

    prompt: list[int]
    source: NDArray | None = None
    pixels: NDArray | None = None


@dataclass
class Pass:
    """A text that went through all components.

    Attributes:
        places: Per component, where the tokens that are left behind it stand in the text.
        states: Per component, their states ``[left, WIDTH]``.
        saturation: Per component, the cosine of its last layer's input and output, of the tokens
            that came into it ``[came]``.
        came: Per component, where those stand in the text.
        kept: Token state (``layer0/keys``, ``adapter/values``) -> ``[tokens, HEAD]``.
        gate: What the gate says; None: there is none.
        dropped: Whether the image tokens left there.
        source: What the encoder hands on ``[source, WIDTH]``; None: there is none.
    """

    places: list[NDArray] = field(default_factory=list)
    states: list[NDArray] = field(default_factory=list)
    saturation: list[NDArray] = field(default_factory=list)
    came: list[NDArray] = field(default_factory=list)
    kept: dict[str, NDArray] = field(default_factory=dict)
    gate: float | None = None
    dropped: bool = False
    source: NDArray | None = None


@dataclass
class Written:
    """A text that was written.

    Attributes:
        tokens: The new tokens.
        exits: The exit that answered each.
        closest: How near the closest decision was: of a score to its threshold, of a logit to the
            largest. Below the rounding of float32, another text is as right.
    """

    tokens: list[int] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    closest: float = NEVER


class Reference:
    """The toy under a policy.

    Args:
        toy: The toy.
        thresholds: Exit (of any chain; ``gate`` too) -> what its score must reach; missing: never.
        score: Which of the decoder's scores counts; empty: the toy's own.
        schedule: Of the decoder's thresholds.
    """

    def __init__(
        self,
        toy: DecoderToy,
        thresholds: Mapping[str, float] | None = None,
        score: str = "",
        schedule: Schedule | None = None,
    ) -> None:
        self._toy, self._thresholds, self._score = toy, thresholds or {}, score or toy.score
        self._schedule = schedule
        self._weights = {name: w.astype(np.float64) for name, w in toy.weights.items()}

    def vision(self, row: Row) -> list[dict[str, NDArray]]:
        """Per exit of the tower, ``features`` ``[images, FEATURES, WIDTH]`` and ``confidence``
        ``[images]``."""
        w = self._weights
        assert row.pixels is not None
        first = np.tanh(row.pixels.astype(np.float64) @ w["pixels"])
        first = first.reshape(len(first), FEATURES, len(w["tower"]))
        found = []
        for state in (first, np.tanh(first @ w["tower"])):
            confidence = np.abs(state).mean((1, 2))
            found.append({"features": state @ w["projector"], "confidence": confidence})
        return found

    def features(self, row: Row) -> NDArray:
        """What the tower hands on: rows ``[images * FEATURES, WIDTH]``, each image from the exit it
        takes."""
        first, last = self.vision(row)
        leaves = first["confidence"] >= self._thresholds.get("vision_1", NEVER)
        chosen = np.where(leaves[:, None, None], first["features"], last["features"])
        return chosen.reshape(-1, chosen.shape[-1])

    def encoder(self, row: Row) -> list[dict[str, NDArray]]:
        """Per exit of the encoder, ``encoder_state`` ``[source, WIDTH]`` and ``saturation``."""
        w = self._weights
        assert row.source is not None
        state = w["source_embedding"][row.source]
        found = []
        for number in range(ENCODERS):
            name, before = f"encoder{number}", state
            seen = _norm(state) + w[f"{name}/positions"][: len(state)]
            every = np.ones((len(state), len(state)), bool)
            state = state + self._attend(name, seen, seen, every)
            state = self._feed_forward(name, state)
            inner = (before * state).sum()
            cosine = inner / np.sqrt((before**2).sum() * (state**2).sum())
            found.append({"encoder_state": state, "saturation": cosine})
        return found

    def encoder_exit(self, row: Row) -> int:
        """The exit that the row takes in the encoder."""
        scores = [one["saturation"] for one in self.encoder(row)[:-1]]
        taken = [s >= self._thresholds.get(f"encoder_{n + 1}", NEVER) for n, s in enumerate(scores)]
        return [*taken, True].index(True)

    def embedded(self, row: Row, tokens: Sequence[int]) -> NDArray:
        """What the decoder begins with: embeddings, and features at placeholders of the prompt."""
        found = self._weights["embedding"][list(tokens)]
        if self._toy.prefix and row.pixels is not None and len(row.pixels):
            places = self._image_places(row)
            places = places[places < len(found)]
            found[places] = self.features(row)[: len(places)]
        return found

    def run(
        self, row: Row, tokens: Sequence[int] | None = None, left: Mapping[int, int] | None = None
    ) -> Pass:
        """Takes a text through all components.

        Args:
            tokens: The text; None: the prompt.
            left: Place of a token -> the component behind which it left for good: those that
                follow keep what their projections make of its state, and do not change it.
        """
        toy, found, left = self._toy, Pass(), left or {}
        tokens = row.prompt if tokens is None else tokens
        source = self.encoder(row)[self.encoder_exit(row)] if toy.encoder else {}
        state, places = self.embedded(row, tokens), np.arange(len(tokens))
        for number in range(len(toy.layers)):
            stays = np.array([left.get(place, number) >= number for place in places.tolist()])
            before = state
            for layer in toy.layers_of(number):
                into = state
                mean = state[places < len(row.prompt)].mean(0) @ self._weights["mean"]
                made = self._layer(layer, state, places, found, mean, source.get("encoder_state"))
                state = np.where(stays[:, None], made, before)
            lengths = np.linalg.norm(into, axis=-1) * np.linalg.norm(state, axis=-1)
            found.saturation.append((into * state).sum(-1) / lengths)
            found.came.append(places)
            if toy.gate and number == toy.gate_behind:
                state, places = self._ask_gate(row, state, places, found)
            found.states.append(state)
            found.places.append(places)
            found.source = source.get("encoder_state")
            if number == toy.adapter:
                self._adapted(found)
        return found

    def logits(self, row: Row, tokens: Sequence[int] | None = None, exit: str = "") -> NDArray:
        """What an exit says of every token of a text, ``[seq, VOCABULARY]``; of tokens that left
        before it, NaN.

        Args:
            tokens: The text; None: the prompt.
            exit: Name of the exit; empty: the last one.
        """
        tokens = row.prompt if tokens is None else tokens
        return self._logits(self.run(row, tokens), exit or [*self._toy.stops][-1], len(tokens))

    def trace(self, row: Row, tokens: Sequence[int] | None = None) -> dict[str, dict[str, NDArray]]:
        """Per exit that answers: ``token`` ``[seq]``, ``logits`` ``[seq, VOCABULARY]``, and the
        scores ``[seq]``."""
        tokens = row.prompt if tokens is None else tokens
        passed, found = self.run(row, tokens), {}
        for name in self._toy.stops:
            logits = self._logits(passed, name, len(tokens))
            found[name] = {"token": logits.argmax(-1), "logits": logits, **score_values(logits)}
            if self._toy.saturated:
                found[name]["saturation"] = self._saturation(passed, name, len(tokens))
        return found

    def full(self, row: Row, count: int) -> Written:
        """So many tokens of the last exit, each the likeliest."""
        written = self._begin(row)
        for _ in range(count):
            passed = self.run(row, [*row.prompt, *written.tokens])
            self._write(written, passed, [*self._toy.stops][-1])
        return written

    def fast(self, row: Row, count: int) -> Written:
        """So many tokens, each of the first exit whose score is high enough; what is kept of
        earlier tokens is exact."""
        written = self._begin(row)
        for _ in range(count):
            passed = self.run(row, [*row.prompt, *written.tokens])
            self._write(written, passed, self._taken(passed, written))
        return written

    def approximate(self, row: Row, count: int) -> Written:
        """So many tokens as `fast` gives them, except that the first one is the last exit's, and
        that components behind an exit keep of a token what their projections make of the state
        that it left with."""
        written = self.full(row, 1)
        left: dict[int, int] = {}
        for _ in range(count - 1):
            text = [*row.prompt, *written.tokens]
            passed = self.run(row, text, left)
            name = self._taken(passed, written)
            left[len(text) - 1] = self._toy.stops[name]
            self._write(written, passed, name)
        return written

    def samples(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What every exit says of rows whose prompts, sources and images are of one size, by the
        names that reference samples have: of the decoder's the logits of each row's last token, and
        for all of them the greedy token and how far its logit is above the next; again with each
        early exit of an earlier chain before the names, what the decoder says behind it."""
        found: dict[str, list[NDArray]] = {}
        for row in rows:
            said = self._said(row)
            last = said[[*self._toy.stops][-1]]
            said["unsplit"] = {"logits": last["logits"], "token": last["token"][-1]}
            if self._toy.encoder:
                said |= {f"encoder_{n + 1}": one for n, one in enumerate(self.encoder(row))}
                said["unsplit"]["encoder_state"] = said[f"encoder_{ENCODERS}"]["encoder_state"]
            early = [f"encoder_{n + 1}" for n in range(ENCODERS - 1)] if self._toy.encoder else []
            for exit_ in [*early, *(["vision_1"] if self._toy.prefix else [])]:
                behind = Reference(self._toy, {exit_: -NEVER})._said(row)
                said |= {f"{exit_}/{name}": one for name, one in behind.items()}
            for name, one in said.items():
                for key, value in one.items():
                    found.setdefault(f"{name}/{key}", []).append(value)
        arrays = {key: np.stack(values) for key, values in found.items()}
        if self._toy.prefix:
            seen = [self.vision(row) for row in rows]
            for n in range(2):
                for key in ("features", "confidence"):
                    own = np.concatenate([exits[n][key] for exits in seen])
                    arrays[f"vision_{n + 1}/{key}"] = own
            arrays["unsplit/features"] = arrays["vision_2/features"]
        return {k: v if v.dtype.kind == "i" else v.astype(np.float32) for k, v in arrays.items()}

    def _said(self, row: Row) -> dict[str, dict[str, Any]]:
        """Per exit that answers, what its samples of a row hold."""
        said = {}
        for name, one in self.trace(row).items():
            top = np.sort(one["logits"], -1)
            gap = top[:, -1] - top[:, -2]
            said[name] = {**one, "logits": one["logits"][-1], "gap": gap}
        return said

    def _layer(
        self,
        layer: int,
        state: NDArray,
        places: NDArray,
        found: Pass,
        mean: NDArray,
        source: NDArray | None,
    ) -> NDArray:
        w, name = self._weights, f"layer{layer}"
        if not self._toy.attends(layer):
            return self._feed_forward(name, state, mean @ w[f"{name}/mean"])
        state = state + self._attend_before(name, state, places, found)
        if source is not None:
            every = np.ones((len(state), len(source)), bool)
            state = state + self._attend(name, _norm(state), source, every, "cross_")
        return self._feed_forward(name, state)

    def _attend_before(self, name: str, state: NDArray, places: NDArray, found: Pass) -> NDArray:
        """Attention of every token to those before it and itself; notes what is kept of them."""
        w = self._weights
        seen = _norm(state) + w[f"{name}/positions"][places]
        found.kept[f"{name}/keys"] = seen @ w[f"{name}/key"]
        found.kept[f"{name}/values"] = seen @ w[f"{name}/value"]
        return self._attend(name, seen, seen, np.tri(len(state), dtype=bool))

    def _attend(
        self, name: str, own: NDArray, other: NDArray, mask: NDArray, kind: str = ""
    ) -> NDArray:
        query, key, value, out = (
            self._weights[f"{name}/{kind}{one}"] for one in ("query", "key", "value", "out")
        )
        scores = (own @ query) @ (other @ key).T / np.sqrt(query.shape[1])
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ (other @ value) @ out

    def _feed_forward(self, name: str, state: NDArray, more: NDArray | float = 0.0) -> NDArray:
        w = self._weights
        return state + np.tanh(_norm(state) @ w[f"{name}/up"] + more) @ w[f"{name}/down"]

    def _image_places(self, row: Row) -> NDArray:
        return np.flatnonzero(np.array(row.prompt) == IMAGE)

    def _ask_gate(
        self, row: Row, state: NDArray, places: NDArray, found: Pass
    ) -> tuple[NDArray, NDArray]:
        """Asks the gate; the image tokens may leave."""
        image = np.isin(places, self._image_places(row))
        text = state[(places < len(row.prompt)) & ~image].mean(0)
        found.gate = float(1 / (1 + np.exp(-(text @ self._weights["gate"])[0])))
        found.dropped = bool(image.any()) and found.gate >= self._thresholds.get("gate", NEVER)
        return (state[~image], places[~image]) if found.dropped else (state, places)

    def _adapted(self, found: Pass) -> NDArray:
        """What the adapter makes of the states behind its component."""
        number = self._toy.adapter
        assert number is not None
        state, places = found.states[number], found.places[number]
        state = state + self._attend_before("adapter", state, places, found)
        if self._toy.adapter_reads:
            assert found.source is not None
            every = np.ones((len(state), len(found.source)), bool)
            state = state + self._attend("adapter", _norm(state), found.source, every, "cross_")
        return self._feed_forward("adapter", state)

    def _logits(self, passed: Pass, exit: str, length: int) -> NDArray:
        number = self._toy.stops[exit]
        states = self._adapted(passed) if number == self._toy.adapter else passed.states[number]
        found = np.full((length, self._weights["head"].shape[1]), np.nan)
        found[passed.places[number]] = _norm(states) @ self._weights["head"]
        return found

    def _saturation(self, passed: Pass, exit: str, length: int) -> NDArray:
        """How little the last layer in front of an exit changed each token of a text, ``[seq]``."""
        number, found = self._toy.stops[exit], np.full(length, np.nan)
        found[passed.came[number]] = passed.saturation[number]
        gone = np.setdiff1d(passed.came[number], passed.places[number])
        found[gone] = np.nan
        return found

    def _last(self, passed: Pass, exit: str) -> NDArray:
        """What an exit says of a text's last token."""
        length = int(passed.places[0][-1]) + 1
        return self._logits(passed, exit, length)[-1]

    def _taken(self, passed: Pass, written: Written) -> str:
        """The exit that answers to the last token."""
        *early, last = self._toy.stops
        for name in early:
            threshold = self._thresholds.get(name, NEVER)
            if self._schedule is not None:
                threshold = self._schedule.threshold(threshold, len(written.tokens) + 1)
            length = int(passed.places[0][-1]) + 1
            score = float(
                self._saturation(passed, name, length)[-1]
                if self._score == "saturation"
                else score_values(self._last(passed, name))[self._score]
            )
            written.closest = min(written.closest, abs(score - threshold))
            if score >= threshold:
                return name
        return last

    def _begin(self, row: Row) -> Written:
        """A text without tokens: the decisions that are taken once for it."""
        said: dict[str, Any] = {"gate": self.run(row).gate} if self._toy.gate else {}
        if self._toy.encoder:
            scores = [one["saturation"] for one in self.encoder(row)]
            said |= {f"encoder_{n + 1}": score for n, score in enumerate(scores)}
        if self._toy.prefix:
            said["vision_1"] = self.vision(row)[0]["confidence"]
        apart = [np.abs(said[n] - t) for n, t in self._thresholds.items() if n in said]
        return Written(closest=min((float(np.min(a, initial=NEVER)) for a in apart), default=NEVER))

    def _write(self, written: Written, passed: Pass, exit: str) -> None:
        logits = self._last(passed, exit)
        second, first = np.sort(logits)[-2:]
        written.closest = min(written.closest, float(first - second))
        written.tokens.append(int(logits.argmax()))
        written.exits.append(exit)


def _norm(state: NDArray) -> NDArray:
    return state / np.sqrt((state**2).mean(-1, keepdims=True) + EPSILON)


__all__ = ["Pass", "Reference", "Row", "Written"]
