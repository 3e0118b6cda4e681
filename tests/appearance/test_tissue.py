"""The range on a generator's card, and the tissue that is compared with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tumorsynth as ts
from tumorsynth.appearance.tissue import (
    SOFT_TISSUE,
    Tissue,
    TissueRange,
    holds_air,
    measure_averages,
)

WEIGHTS = Path(__file__).parents[2] / "weights"
LUNG = TissueRange.of_card(json.loads((WEIGHTS / "lung" / "card.json").read_text()))
assert LUNG is not None


def noise(shape=(24, 24, 24), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_card_keeps_its_range():
    entry = json.loads(json.dumps(SOFT_TISSUE.to_card()))
    assert TissueRange.of_card({"name": "x", "tissue_range": entry}) == SOFT_TISSUE
    assert TissueRange.of_card({"name": "x"}) is None


@pytest.mark.parametrize(
    "entry",
    [
        "liver",
        {},
        {"level_hu": [0, 100]},
        {"level_hu": [0, 100], "local_hu": [-50, 150], "voxel_hu": [-200]},
        {"level_hu": [100, 0], "local_hu": [-50, 150], "voxel_hu": [-200, 500]},
        {"level_hu": [0, 100], "local_hu": [10, 150], "voxel_hu": [-200, 500]},
        {"level_hu": [0, 100], "local_hu": [-50, 150], "voxel_hu": [-200, float("inf")]},
        {"level_hu": [0, 100], "local_hu": [-50, 150], "voxel_hu": [float("nan"), 500]},
        {"level_hu": [False, True], "local_hu": [-50, 150], "voxel_hu": [-200, 500]},
    ],
)
def test_a_card_with_another_range_is_refused(entry):
    with pytest.raises(ValueError, match="tissue_range"):
        TissueRange.of_card({"name": "x", "tissue_range": entry})


@pytest.mark.parametrize("noise_hu", [5.0, 40.0])
@pytest.mark.parametrize("spacing", [(0.7, 0.7, 1.0), (1.0, 1.0, 5.0), (3.0, 3.0, 3.0)])
def test_noise_and_resolution_change_the_measured_tissue_little(noise_hu, spacing):
    tissue = measure_averages(100 + noise_hu * noise(), spacing)
    assert tissue is not None
    assert tissue.level_hu == pytest.approx(100, abs=5)
    assert tissue.bright_hu - tissue.dark_hu < 0.6 * 2.6 * noise_hu + 1


def test_two_tissues_show_in_the_tenths():
    hu = -850 + 40 * noise()
    hu[:, :, 18:] = 30
    tissue = measure_averages(hu, (1.0, 1.0, 1.0))
    assert tissue is not None
    assert tissue.level_hu < -800 and tissue.bright_hu == pytest.approx(30, abs=1)
    assert LUNG.objection(tissue, "lung")


def test_voxels_that_do_not_count_are_left_out():
    hu = torch.full((20, 20, 20), torch.nan)
    assert measure_averages(hu, (1.0, 1.0, 1.0)) is None
    hu[3:9, 4, 5] = 80.0
    assert measure_averages(hu, (1.0, 1.0, 1.0)) == Tissue(80.0, 80.0, 80.0)


@pytest.mark.parametrize(
    ("level", "suits"),
    [(-200, False), (-30, True), (0, True), (110, True), (240, True), (320, False)],
)
def test_soft_tissue_is_a_fatty_liver_to_an_arterial_kidney(level, suits):
    reason = SOFT_TISSUE.objection(Tissue(level, level - 20, level + 20), "liver-early")
    assert (reason is None) == suits
    assert reason is None or (f"{level} HU" in reason and "any_tissue=True" in reason)


def test_values_that_all_lie_within_need_no_averages():
    for seed in range(20):
        hu = 110 + 30 * noise(seed=seed)
        hu[3, 4, 5] = torch.nan
        for shift in (-80, -30, 0, 40, 110):
            if SOFT_TISSUE.holds_all(hu + shift):
                tissue = measure_averages(hu + shift, (1.0, 1.0, 1.0))
                assert tissue is not None and SOFT_TISSUE.objection(tissue, "liver-early") is None
    assert SOFT_TISSUE.holds_all(torch.tensor([[[torch.nan, 0.0, 250.0]]]))
    for end in (-31.0, 251.0, torch.inf, -torch.inf):
        assert not SOFT_TISSUE.holds_all(torch.tensor([[[torch.nan, 0.0, end]]]))


def test_compact_air_is_told_from_the_noise_of_a_lung():
    inside = torch.zeros(24, 24, 24, dtype=torch.bool)
    inside[6:18, 6:18, 6:18] = True
    lung = (-880 + 80 * noise()).clamp(min=-1024)
    assert bool((lung[inside] <= -1000).any()) and not holds_air(lung, inside)
    lung[4:9, 4:9, 4:9] = -1024
    assert holds_air(lung, inside)
    assert not holds_air(lung, inside & (torch.arange(24) > 12))


def test_a_clipped_scale_shows_gas_as_its_end():
    for intensity in (ts.Scaled(-175, 250, 0, 1), ts.ZScore(100, 40, low=-160, high=240)):
        low, high = SOFT_TISSUE.voxel_range(intensity)
        assert intensity.limits is not None
        end, bright_end = intensity.limits
        assert end < low < end + 3 / intensity.hu_per_unit and high > bright_end
    assert SOFT_TISSUE.voxel_range(ts.HU()) == SOFT_TISSUE.voxel_hu
    # an end that may be fat is no gas
    low, _ = SOFT_TISSUE.voxel_range(ts.ZScore(100, 40, low=-60, high=240))
    assert low * 40 + 100 == pytest.approx(-250)
    for darkest in (-1000, -1024):  # to which the noise of a lung is clipped
        assert LUNG.voxel_range(ts.Scaled(darkest, 400, 0, 1))[0] < 0


def test_shipped_and_converted_generators_name_their_tissue():
    assert TissueRange.of_card(ts.load_generator("hu2023").card) == SOFT_TISSUE
    for folder in ("liver-early", "lung"):
        assert TissueRange.of_card(json.loads((WEIGHTS / folder / "card.json").read_text()))
        assert "tissue range" in (WEIGHTS / folder / "CARD.md").read_text()
