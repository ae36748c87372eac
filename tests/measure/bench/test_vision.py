"""What exits of a tower and image tokens that leave should save, from times of segments."""

from __future__ import annotations

import dataclasses

import pytest

from edgeexit.measure.bench.vision import Apart, Segments

RUN = Apart(
    with_images=[40.0, 30.0, 20.0, 10.0],
    without=[15.0, 10.0, 5.0, 10.0],
    tower=[105.0, 57.0, 43.0],  # segments of 100, 50 and 40 ms, projectors of 5, 7 and 3 ms
    tower_exits=[5.0, 7.0, 3.0],
)
SLOWER = Apart(*([2 * ms for ms in times] for times in dataclasses.astuple(RUN)))
SEGMENTS = Segments({4: 1, 8: 2}, {6: 0, 9: 1, 12: 2}, [RUN, SLOWER, RUN])


@pytest.mark.parametrize(("layer", "saved_ms"), [(6, 193 - 105), (9, 193 - 157), (12, 0)])
def test_an_exit_of_the_tower_saves_the_segments_behind_it_and_exchanges_the_projector(
    layer: int, saved_ms: float
) -> None:
    assert SEGMENTS.saved_by_exit(layer) == pytest.approx(saved_ms / 193)


@pytest.mark.parametrize(("layer", "saved_ms", "share"), [(4, 35, 50 / 100), (8, 15, 20 / 100)])
def test_a_drop_saves_only_behind_its_layer(layer: int, saved_ms: float, share: float) -> None:
    assert SEGMENTS.saved_by_drop(layer) == pytest.approx(saved_ms / 100)
    assert SEGMENTS.share_behind(layer) == pytest.approx(share)


def test_times_are_medians_over_runs() -> None:
    assert SEGMENTS.to_dict()["tower_exits"] == RUN.tower_exits
