"""The sample points with which candidate centres are judged."""

from __future__ import annotations

import pytest

from tumorsynth.placement.shape import BALL, BALL_LEVEL, MAX_LEVEL


@pytest.mark.parametrize("level", [0.6, 1.0, 1.2, MAX_LEVEL])
def test_sample_points_of_every_level_fill_a_ball_evenly(level):
    inside = BALL_LEVEL <= level
    points = (BALL * BALL_LEVEL[:, None])[inside] / level
    assert float(points.mean(0).norm()) < 0.06
    assert (points.square().mean(0) - 0.2).abs().max() < 0.03  # of a full ball: a fifth each
    share = float(inside.double().mean()) * (MAX_LEVEL / level) ** 3
    assert share == pytest.approx(1, abs=0.06)
