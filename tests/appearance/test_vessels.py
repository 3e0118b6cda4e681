"""Vessels do not show through a tumour, and noise stays what it was."""

from __future__ import annotations

import pytest
import torch

import tumorsynth as ts
from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.appearance.noise import measure_noise
from tumorsynth.appearance.vessels import cover_vessels

ISO = (1.0, 1.0, 1.0)


def liver(shape=(48, 48, 48), sigmas=(0.5, 0.5, 0.5), sd=10.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    noise = gaussian_filter(torch.randn(shape, generator=rng), sigmas)
    return 110 + sd * noise / noise.std()


def cover(hu, organ=None, spacing=ISO):
    organ = torch.ones(hu.shape, dtype=torch.bool) if organ is None else organ
    grain_mm = measure_noise(hu, organ, spacing).grain_mm
    return cover_vessels(hu, organ, spacing, grain_mm, shape_seed=3)


def vessel_of(shape, spacing, radius_mm=2.5, every_mm=1e3):
    """A tube along x through the middle, and more of them so far apart along y and z."""
    y, z = (
        (s * (torch.arange(n) - n // 2) + every_mm / 2) % every_mm - every_mm / 2
        for n, s in zip(shape[1:], spacing[1:], strict=True)
    )
    tube = (y[:, None] ** 2 + z**2) <= radius_mm**2
    return tube.expand(shape).clone()


@pytest.mark.parametrize(
    ("shape", "spacing", "sigmas", "sd"),
    [
        ((48, 48, 48), ISO, (0.5, 0.5, 0.5), 10.0),
        ((48, 48, 48), ISO, (0.0, 0.0, 0.0), 25.0),
        ((60, 60, 14), (0.8, 0.8, 3.0), (0.8, 0.8, 0.0), 10.0),
        ((48, 48, 48), ISO, (1.3, 1.3, 1.0), 5.0),
    ],
)
def test_a_vessel_becomes_tissue_as_noisy_as_the_rest(shape, spacing, sigmas, sd):
    hu, tube = liver(shape, sigmas, sd), vessel_of(shape, spacing)
    tissue = hu.clone()
    hu[tube] += 60.0
    covered = hu + cover(hu, spacing=spacing)
    assert float(covered[tube].mean()) == pytest.approx(110, abs=0.4 * sd)
    steps = (tube[1:] & tube[:-1]).nonzero(as_tuple=True)
    assert float(covered.diff(dim=0)[steps].std()) == pytest.approx(
        float(tissue.diff(dim=0)[steps].std()), rel=0.2
    )


def test_noise_is_drawn_where_no_tissue_lends_its_own():
    """Of a vessel as wide as the region, as in a hilum."""
    hu = liver((40, 40, 40))
    tube = vessel_of(hu.shape, ISO, 13.0)
    hu[tube] += 60.0
    covered = hu + cover(hu)
    middle = vessel_of(hu.shape, ISO, 8.0)
    steps = (middle[1:] & middle[:-1]).nonzero(as_tuple=True)
    assert 0.7 < float(covered.diff(dim=0)[steps].std() / hu.diff(dim=0)[steps].std()) < 1.3


def test_tissue_without_vessels_stays_as_it_is():
    hu = liver()
    change = cover(hu)
    assert float(change.square().mean().sqrt()) < 0.2 * 10
    even = torch.full((20, 20, 20), 110.0)
    assert not cover(even).any()


def test_only_the_organ_changes_and_only_finite_voxels():
    hu, organ = liver(), torch.ones(48, 48, 48, dtype=torch.bool)
    tube = vessel_of(hu.shape, ISO)
    hu[tube] += 60.0
    organ[:24] = False
    hu[30, 24, 24] = torch.nan
    change = cover(hu, organ)
    assert change.isfinite().all() and not change[:24].any() and change[30, 24, 24] == 0
    assert float(change[34:44][tube[34:44]].mean()) < -45
    nothing = cover(hu, torch.zeros_like(organ))
    assert not nothing.any()


def test_what_is_darker_than_the_organ_stays():
    hu, tube = liver(), vessel_of((48, 48, 48), ISO)
    hu[tube] -= 60.0
    change = cover(hu)
    assert float(change[tube].abs().mean()) < 3


@pytest.mark.parametrize("contrast_hu", [-40.0, 30.0])
@pytest.mark.parametrize("unit", [1.0, 0.001])
def test_a_tumour_cuts_a_vessel_off(contrast_hu, unit):
    """In a call, in HU and in another scale; what lies beyond the tumour stays."""
    shape = (64, 64, 64)
    hu, tube = liver(shape), vessel_of(shape, ISO, 3.0, every_mm=14.0)
    hu[tube] += 80.0
    intensity = ts.HU() if unit == 1.0 else ts.Scaled(-1000, 1000, -1, 1)
    synth = ts.SynthesizeTumor(
        "liver-early",
        count=1,
        size_mm=20,
        contrast_hu=contrast_hu,
        intensity=intensity,
    )
    organ = torch.ones(1, *shape, dtype=torch.uint8)
    image, label = synth(unit * hu[None], organ, spacing=ISO, seed=5)
    made, mask = image[0] / unit, label[0] == 2
    deep = gaussian_filter(mask.float(), [2.0] * 3) > 0.9
    crossed, beside = deep & tube, deep & ~tube
    assert crossed.sum() > 60
    assert float(made[crossed].mean() - made[beside].mean()) == pytest.approx(0, abs=9)
    assert float(made[beside].mean()) == pytest.approx(110 + contrast_hu, abs=8)
    away = ~(gaussian_filter(mask.float(), [2.0] * 3) > 1e-3)
    assert torch.equal(image[0][away], (unit * hu)[away])
    assert synth.report[0]["hu_change"] == pytest.approx(float((made - hu)[mask].mean()), abs=0.5)


def test_handcrafted_tumours_leave_vessels_as_published():
    shape = (56, 56, 56)
    hu, tube = liver(shape), vessel_of(shape, ISO, 3.0, every_mm=14.0)
    hu[tube] += 80.0
    organ = torch.ones(1, *shape, dtype=torch.uint8)
    synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=20)
    image, label = synth(hu[None], organ, spacing=ISO, seed=5)
    deep = gaussian_filter((label[0] == 2).float(), [2.0] * 3) > 0.9
    crossed, beside = image[0][deep & tube], image[0][deep & ~tube]
    assert float(crossed.mean() - beside.mean()) > 15
