"""`PlacementSettings`: which priors apply, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from organs import make_rng

from tumorsynth.placement.organ_priors import PRIORS
from tumorsynth.placement.settings import PlacementSettings


def test_named_size_brings_its_own_shapes_counts_and_range():
    settings = PlacementSettings(size_mm="kidney", count=None)
    assert settings.size_prior is settings.shape_prior is PRIORS["kidney"]
    assert settings.size_range == PRIORS["kidney"].range_mm
    assert PlacementSettings(size_mm="kidney", prior="cyst").shape_prior is PRIORS["cyst"]
    counts = {settings.draw_count(make_rng(seed)) for seed in range(100)}
    assert 1 in counts and counts <= {1, 2, 3}


def test_size_in_mm_is_log_uniform_with_liver_shapes_by_default():
    settings = PlacementSettings(size_mm=12)
    assert settings.size_prior is None and settings.size_range == (12, 12)
    assert settings.shape_prior is PRIORS["liver"]
    mine = replace(PRIORS["liver"], name="mine")
    assert PlacementSettings(size_mm=(5, 20), prior=mine).shape_prior is mine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": "spleen"}, "cyst, kidney, liver, lung, pancreas"),
        ({"size_mm": True}, "size_mm must be"),
        ({"count": True}, "count must be"),
        ({"count": 101}, "count must be"),
        ({"gap_mm": 1000.0}, "gap_mm must be"),
    ],
)
def test_unusable_settings_are_refused_when_they_are_made(change, message):
    with pytest.raises(ValueError, match=message):
        PlacementSettings(**{"size_mm": (5, 20), **change})
