"""Background fill under tumours in fat and in lungs; tissue beyond a generator's window."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import max_pool3d

import tumorsynth as ts
from tumorsynth.appearance.background import (
    MAX_SHARE_OUTSIDE_WINDOW,
    fill_background,
    measure_tissue,
)
from tumorsynth.fetching import run_alone
from tumorsynth.placement.types import TumorParams

PARAMS = TumorParams((24, 24, 24), 15.0, (1.0,) * 3, (1.0, 0, 0, 0), 0.0, 0, 0, 1.0, 15.0)
EXOPHYTIC = TumorParams(
    (24, 24, 24), 15.0, (1.0,) * 3, (1.0, 0, 0, 0), 0.0, 0, 0, 1.0, 15.0, bulge=0.5
)


def fill(hu, label, inside, params, window):
    tissue = run_alone(measure_tissue(hu, label, (1,), inside, window))
    return fill_background(hu, tissue, inside, (1.0,) * 3, (0.5,) * 3, params, window)


def halves(organ_hu, other_hu, noise=12.0, side=64, seed=0):
    """An organ (label 1) below x = 0 and something else above, a voxel of each half way."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.arange(side)[:, None, None] - side / 2 + 0.5
    share = (0.5 - x / 3).clamp(0, 1)
    hu = share * organ_hu + (1 - share) * other_hu + noise * torch.randn((side,) * 3, generator=rng)
    return hu[None], (x < 0).expand(side, side, side).to(torch.uint8)[None].clone()


def depth_of(inside):
    """Voxels from the outline, by erosion, up to 6."""
    depth = torch.zeros_like(inside, dtype=torch.float32)
    for _ in range(6):
        depth += inside
        inside = ~max_pool3d((~inside).float(), 3, 1, 1).bool()
    return depth


# -- towards fat -----------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
def test_an_exophytic_tumour_has_no_rind_of_the_organs_level(generator):
    image, label = halves(180.0, -100.0)
    synth = ts.SynthesizeTumor(generator, count=1, size_mm=26, bulge=0.5, contrast_hu=-60)
    synthetic, new = synth(image, label, spacing=1.0, seed=1)
    assert synth.report[0]["outside_share"] > 0.3
    beyond = (new == 2) & (label == 0)
    depth = depth_of(new == 2)
    near = beyond & (depth >= 2) & (depth <= 3)  # the outermost voxels are half fat
    rind = synthetic[near].median() - synthetic[beyond & (depth >= 5)].median()
    assert abs(float(rind)) < 5


def test_the_organs_old_surface_does_not_show():
    image, label = halves(200.0, -100.0, noise=20.0)
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)
    inside[16:48, 16:48, 16:48] = True
    even = fill(image[0], label[0], inside, EXOPHYTIC, (-175.0, 250.0))
    level = (image[0] + even.change_hu)[20:44, 20:44, 20:44]
    rows = level.mean((1, 2))
    assert float((rows - rows.mean()).abs().max()) < 4  # noise alone: 1
    noise = level.std((1, 2))
    assert 0.8 < float(noise.min()) / 20 and float(noise.max()) / 20 < 1.2


# -- lungs -----------------------------------------------------------------------------------------


def lung():
    """Lung of -850 HU with a vessel of 40 HU through it, and its label."""
    hu = -850 + 30 * torch.randn(1, 48, 48, 48, generator=torch.Generator().manual_seed(0))
    hu[:, :, 22:25, 22:25] = 40.0
    return hu, torch.ones(hu.shape, dtype=torch.uint8)


def test_vessels_do_not_shine_through_a_tumour_in_a_lung():
    hu, label = lung()
    synth = ts.SynthesizeTumor("lung", 1, 2, count=1, size_mm=18, gate=None)
    for seed in range(20):
        image, new = synth(hu, label, spacing=(1, 1, 1), seed=seed)
        inner = ~max_pool3d((new != 2).float(), 5, 1, 2).bool()
        vessel = inner & (hu > 0)
        if vessel.sum() > 30:
            break
    assert float(image[vessel].median() - image[inner & ~vessel].median()) < 80  # 890 in the scan
    assert float(image[vessel].max()) < 300


def test_only_lungs_are_filled_and_only_for_generators_that_see_them():
    hu, label = lung()
    inside = torch.zeros(hu.shape[1:], dtype=torch.bool)
    inside[15:32, 15:32, 15:32] = True
    even = fill(hu[0], label[0], inside, PARAMS, (-1000.0, 400.0))
    assert float((hu[0] + even.change_hu)[17:30, 17:30, 17:30].max()) < -650
    assert not even.change_hu[:8].any()
    assert fill(hu[0], label[0], inside, PARAMS, (-175.0, 250.0)) is None
    assert fill(hu[0] + 950, label[0], inside, PARAMS, (-1000.0, 400.0)) is None


@pytest.mark.parametrize("end", [31, 32])
def test_no_gap_between_a_nodule_and_the_chest_wall(end):
    """Also where the label ends a voxel or two before the wall."""
    image, label = halves(-850.0, 40.0)
    label[:, end:] = 0
    wall = 33
    for seed in range(30):
        synth = ts.SynthesizeTumor("lung", count=1, size_mm=18, contrast_hu=850)
        synthetic, new = synth(image, label, spacing=1.0, seed=seed)
        nodule = new[0] == 2
        middle = nodule[end - 1].nonzero()
        if len(middle) > 60:
            break
    y, z = middle.double().mean(0).round().long().tolist()
    line = synthetic[0, 24 : wall + 6, y - 2 : y + 3, z - 2 : z + 3].mean((1, 2))
    assert float(line.min()) > -150
    assert float(line.max()) < 150
    assert torch.equal(synthetic[0, wall + 6 :], image[0, wall + 6 :])
    assert not (new[label == 0] == 2).any()


# -- fat that the organ's label covers -------------------------------------------------------------


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
def test_a_tumour_over_a_kidneys_sinus_is_solid(generator):
    rng = torch.Generator().manual_seed(0)
    image = -100 + 8 * torch.randn(1, 48, 48, 48, generator=rng)
    axes = torch.meshgrid(*[torch.arange(48) - 24] * 3, indexing="ij")
    far = sum(a.square() for a in axes)[None].float().sqrt()
    image[far < 17] += 260.0
    image[far < 5] -= 240.0  # the sinus, under the organ's label
    label = (far < 17).to(torch.uint8)
    synth = ts.SynthesizeTumor(generator, count=1, size_mm=24.0)
    synthetic, new = synth(image, label, spacing=1.0, seed=1)
    inside = new == 2
    assert (inside & (far < 5)).sum() > 100  # it lies over the sinus
    assert float((image[inside] < -20).float().mean()) > 0.05
    assert float((synthetic[inside] < -20).float().mean()) < 0.01
    params = json.loads(json.dumps(synth.params))
    assert torch.equal(synth(image, label, spacing=1.0, params=params)[0], synthetic)


def test_a_little_fat_needs_no_fill():
    image = torch.full((1, 48, 48, 48), 160.0)
    image[:, 24, 24, 24] = -100.0
    label = torch.ones(1, 48, 48, 48, dtype=torch.uint8)
    inside = torch.zeros(48, 48, 48, dtype=torch.bool)
    inside[18:30, 18:30, 18:30] = True
    args = (inside, PARAMS, (-175.0, 250.0))
    assert fill(image[0], label[0], *args) is None
    image[:, 20:26, 20:26, 20:26] = -100.0
    assert fill(image[0], label[0], *args) is not None


@pytest.mark.parametrize("shape", [(5, 4, 5), (1, 1, 1), (2, 30, 3)])
def test_volumes_smaller_than_the_filters(shape):
    image = torch.full((1, *shape), -850.0)  # lung, which is filled first
    label = torch.ones(1, *shape, dtype=torch.uint8)
    synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=1.5, contrast_hu=300.0)
    synthetic, _ = synth(image, label, spacing=0.5, seed=0)
    assert synthetic.isfinite().all() and len(synth.report) == 1


# -- tissue beyond a generator's window ------------------------------------------------------------


@pytest.mark.parametrize(("generator", "mass_effect"), [("hu2023", 0.5), ("liver-early", 0.0)])
def test_a_lung_beyond_the_window_is_skipped_with_a_reason(generator, mass_effect):
    hu, label = lung()
    synth = ts.SynthesizeTumor(generator, count=2, size_mm=12, mass_effect=mass_effect)
    synthetic, new = synth(hu, label, spacing=1.0, seed=0)
    assert torch.equal(synthetic, hu) and torch.equal(new, label)
    for record in synth.report:
        for words in ("-175 to 250 HU", "median -8", 'generator="lung"'):
            assert words in record["reason"]
    again = synth(hu, label, spacing=1.0, params=json.loads(json.dumps(synth.params)))
    assert torch.equal(again[0], hu)


def test_a_lung_within_the_window_is_not_skipped():
    hu, label = lung()
    wide = ts.SynthesizeTumor("lung", count=2, size_mm=12)
    wide(hu, label, spacing=1.0, seed=0)
    assert all(record["applied"] for record in wide.report)


def test_fat_around_and_a_few_bright_voxels_are_no_reason():
    image, label = halves(200.0, -1000.0, noise=40.0)  # a tenth of the organ above 250 HU
    synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=14)
    synth(image, label, spacing=1.0, seed=3)
    assert synth.report[0]["applied"]
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)
    inside[20:30, 20:30, 20:30] = True
    tissue = run_alone(measure_tissue(image[0], label[0], (1,), inside, (-175.0, 250.0)))
    assert 0.03 < tissue.share_outside_window < MAX_SHARE_OUTSIDE_WINDOW
    assert tissue.outside_window((-175.0, 250.0)) is None
