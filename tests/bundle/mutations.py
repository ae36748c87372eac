"""Changes to JSON documents, for properties: whatever is changed, only our errors are raised."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(
        [
            "..",
            "/",
            "graphs/weights.bin",
            "h0",
            "batch",
            "forward",
            "2.0",
            "drop",
            "new",
            "prompt",
            "token",
        ]
    ),
    st.lists(st.integers(0, 3) | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(0, 3) | st.text(max_size=4), max_size=3),
)


def mutate(raw: dict[str, Any], data: st.DataObject) -> None:
    """Replaces, removes or repeats one value somewhere in a JSON document."""
    place: Any = raw
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        action = data.draw(st.sampled_from(["replace", "replace", "remove", "repeat", "rename"]))
        if action == "replace":
            place[key] = data.draw(WEIRD)
        elif action == "remove":
            del place[key]
        elif isinstance(place, list):
            place.append(place[key])
        else:
            place[data.draw(st.text(max_size=6))] = place[key]
        return
