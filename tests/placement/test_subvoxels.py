"""Tumours in coarse voxels: how much of each voxel they fill, against balls and ellipsoids."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from organs import ellipsoid, least_labelled_share, make_rng, place_in

from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place, place_from_params
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.shape import Shape
from tumorsynth.placement.types import LocalMask, TumorParams
from tumorsynth.subvoxels import (
    average_subvoxels,
    refine_box,
    repeat_voxels,
    subvoxel_factors,
)

THICK = [(0.8, 0.8, 2.5), (0.8, 0.8, 5.0), (0.8, 0.8, 8.0), (5.0, 0.7, 0.7), (3.0, 3.0, 3.0)]
RATIO = (1.3, 1.0, 1 / 1.3)  # of an ellipsoid's axes


def params(diameter_mm: float, shape_seed: int, axes=(1.0, 1.0, 1.0)) -> TumorParams:
    """A smooth ellipsoid, turned by 40 degrees; the seed decides its place within its voxel."""
    half = math.radians(20)
    rotation = (math.cos(half), 0.6 * math.sin(half), 0.0, 0.8 * math.sin(half))
    return TumorParams((0, 0, 0), diameter_mm, axes, rotation, 0.0, shape_seed, 0, 0.0, diameter_mm)


def placed(spacing, wanted: TumorParams) -> LocalMask:
    shape = [max(3, round(70 / s)) for s in spacing]
    middle = tuple(n // 2 for n in shape)
    region = OrganRegion.of_label(torch.ones(shape, dtype=torch.uint8), 1)
    tumor = place_from_params(replace(wanted, centre=middle), region, spacing)
    assert isinstance(tumor, LocalMask)
    return tumor


def true_share(tumor: LocalMask, spacing, steps: int = 24) -> np.ndarray:
    """Share of each voxel of the box inside the ellipsoid, by points much finer than subvoxels."""
    shape = Shape(tumor.params)
    count = [1 if s < 1 else steps for s in spacing]
    count = [max(n, 4) for n in count]
    axes = []
    for axis, n in enumerate(count):
        voxels = tumor.mask.shape[axis]
        at = (np.arange(voxels * n) + 0.5) / n - 0.5 + tumor.start[axis]
        centre = tumor.params.centre[axis] + float(shape.offset[axis])
        axes.append((at - centre) * spacing[axis])
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    inside = (np.square(points @ (shape.rotation / shape.half_axes).numpy()).sum(-1) < 1) * 1.0
    x, y, z = tumor.mask.shape
    a, b, c = count
    return inside.reshape(x, a, y, b, z, c).mean((1, 3, 5))


@pytest.mark.parametrize("spacing", THICK)
@pytest.mark.parametrize("diameter_mm", [5.0, 9.0, 20.0])
@pytest.mark.parametrize("axes", [(1.0, 1.0, 1.0), RATIO], ids=["ball", "ellipsoid"])
def test_the_share_of_each_voxel_is_that_of_the_shape(spacing, diameter_mm, axes):
    for shape_seed in range(4 if diameter_mm < 20 else 2):
        tumor = placed(spacing, params(diameter_mm, shape_seed, axes))
        volume = float(tumor.share.sum(dtype=torch.float64)) * math.prod(spacing)
        assert volume == pytest.approx(math.pi / 6 * diameter_mm**3, rel=0.02)
        error = np.abs(tumor.share.numpy() - true_share(tumor, spacing))
        # along axes that are not divided, a voxel is in or out
        assert error.sum() < (0.3 if diameter_mm < 9 else 0.15) * float(tumor.share.sum())


@pytest.mark.parametrize("spacing", THICK)
def test_the_label_is_at_least_half_a_voxel_and_never_none(spacing):
    for shape_seed in range(8):
        for diameter_mm in (2.0, 4.0, 12.0, 25.0):
            tumor = placed(spacing, params(diameter_mm, shape_seed))
            share = tumor.share
            labelled = share >= least_labelled_share(tumor) - 1e-6
            assert not (tumor.mask & ~labelled).any()
            assert int(tumor.mask.sum()) >= 0.9 * int(labelled.sum())  # without loose voxels
            assert int(tumor.mask.sum()) == tumor.voxels >= 1


@pytest.mark.parametrize(
    ("spacing", "diameter_mm"),
    [
        ((0.8, 0.8, 12.0), 16.0),
        ((0.8, 0.8, 12.0), 13.5),
        ((12.0, 0.8, 0.8), 20.0),
        ((0.8, 0.8, 5.0), 7.0),
        ((0.8, 0.8, 8.0), 12.0),
    ],
)
def test_labels_of_tumours_thicker_than_a_slice_are_not_larger_than_the_tumours(
    spacing, diameter_mm
):
    """Wherever the tumour lies between the slices."""
    voxels = math.pi / 6 * diameter_mm**3 / math.prod(spacing)
    ratios = [placed(spacing, params(diameter_mm, seed)).voxels / voxels for seed in range(32)]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.12) and max(ratios) < 1.25, ratios


SLICES = [(0.8, 0.8, 6.0), (6.0, 2.0, 2.0), (3.0, 3.0, 3.0), (1.0, 4.0, 4.0)]


def label_ratios(spacing, diameter_mm: float, axes=(1.0, 1.0, 1.0), seeds: int = 10) -> list[float]:
    """A label's volume over the tumour's, wherever the tumour lies between the slices."""
    tumors = [placed(spacing, params(diameter_mm, seed, axes)) for seed in range(seeds)]
    return [t.voxels / float(t.share.sum(dtype=torch.float64)) for t in tumors]


@pytest.mark.parametrize("spacing", SLICES)
@pytest.mark.parametrize("thickness", [1.0, 1.1, 1.25, 1.5, 2.0])
def test_no_label_holds_less_than_half_of_its_tumour(spacing, thickness):
    for axes in ((1.0, 1.0, 1.0), RATIO):
        ratios = label_ratios(spacing, thickness * max(spacing), axes)
        assert min(ratios) >= 0.5, ratios
        if thickness > 1.2 and axes == (1.0, 1.0, 1.0):
            assert np.mean(ratios) == pytest.approx(1.0, abs=0.2), ratios


@pytest.mark.parametrize("spacing", SLICES[:2])
def test_labels_shrink_gradually_from_outline_to_volume(spacing):
    thickness = np.linspace(0.8, 1.25, 7)
    means = [np.mean(label_ratios(spacing, k * max(spacing), seeds=20)) for k in thickness]
    assert means[0] > 1.4 and means[-1] < 1.2
    assert max(np.diff(means)) < 0.15 and min(np.diff(means)) > -0.45, means


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 5.0), (0.8, 0.8, 8.0), (8.0, 0.8, 0.8)])
def test_the_widest_slice_shows_the_ball_s_own_width(spacing):
    thick = spacing.index(max(spacing))
    widths = []
    for shape_seed in range(12):
        tumor = placed(spacing, params(5.0, shape_seed))
        across = tuple(axis for axis in range(3) if axis != thick)
        area = float(tumor.mask.sum(across).max()) * 0.64
        widths.append(2 * math.sqrt(area / math.pi))
    assert min(widths) > 3.6 and 4.0 < np.mean(widths) < 5.2


@pytest.mark.parametrize("spacing", THICK)
def test_labels_of_large_tumours_are_no_larger_than_the_tumours(spacing):
    found = [placed(spacing, params(25.0, seed)).voxels * math.prod(spacing) for seed in range(8)]
    assert np.mean(found) == pytest.approx(math.pi / 6 * 25.0**3, rel=0.03)


def test_fine_voxels_stay_whole():
    for spacing in [(1.0, 1.0, 1.0), (0.7, 0.7, 1.5), (1.5, 1.5, 1.5)]:
        assert subvoxel_factors(spacing, 5.0) == (1, 1, 1)
    assert subvoxel_factors((0.7, 0.7, 5.0), 20.0) == (1, 1, 5)
    assert subvoxel_factors((0.7, 5.0, 2.0), 8.0) == (1, 5, 3)
    x, y, z = subvoxel_factors((25.0, 25.0, 25.0), 0.1)
    assert x == y == z == 15  # bounded
    tumor = placed((1.0, 1.0, 1.0), params(9.0, 0))
    assert tumor.subvoxels is None and tumor.fine_mask is tumor.mask and tumor.mean_share == 1.0


def test_no_subvoxel_lies_beyond_the_organ_and_tumours_keep_clear_of_each_other():
    spacing = (0.8, 0.8, 5.0)
    label = ellipsoid((90, 80, 16), spacing, (34, 30, 36))
    taken = torch.zeros(label.shape, dtype=torch.float32)
    found = place_in(label, spacing, seed=3, size_mm=(5, 14), count=6, gap_mm=2.0)
    tumors = [tumor for tumor in found if isinstance(tumor, LocalMask)]
    assert len(tumors) >= 4
    for tumor in tumors:
        assert (label[tumor.slices][tumor.share > 0] == 1).all()
        assert not taken[tumor.slices][tumor.share > 0].any()
        taken[tumor.slices] += tumor.share


def test_a_single_slice_of_organ_has_room():
    label = torch.zeros(60, 60, 9, dtype=torch.uint8)
    label[5:55, 5:55, 4] = 1
    found = [place_in(label, (0.8, 0.8, 8.0), seed, size_mm=5)[0] for seed in range(20)]
    tumors = [tumor for tumor in found if isinstance(tumor, LocalMask)]
    assert len(tumors) >= 16  # some shapes' centres lie at a face of their slice
    assert all(t.mask.shape[2] == 1 and t.params.diameter_mm == 5 for t in tumors)


def test_params_place_the_same_subvoxels_again():
    spacing = (0.7, 0.7, 6.0)
    label = ellipsoid((90, 80, 14), spacing, (30, 26, 36))
    region, settings = OrganRegion.of_label(label, 1), PlacementSettings(size_mm=(5, 20))
    for seed in range(6):
        (tumor,) = place(region, spacing, settings, make_rng(seed))
        assert isinstance(tumor, LocalMask)
        again = place_from_params(TumorParams.from_dict(tumor.params.to_dict()), region, spacing)
        assert isinstance(again, LocalMask)
        assert again.start == tumor.start and torch.equal(again.mask, tumor.mask)
        assert torch.equal(again.fine_mask, tumor.fine_mask)


def test_averages_undo_repeats():
    volume = torch.randn(3, 4, 5)
    fine = repeat_voxels(volume, (3, 1, 5))
    assert fine.shape == (9, 4, 25)
    assert torch.allclose(average_subvoxels(fine, (3, 1, 5)), volume, atol=1e-6)
    assert average_subvoxels(volume, (1, 1, 1)) is volume
    tumor = placed((0.8, 0.8, 5.0), params(9.0, 0))
    assert refine_box(tumor.box, tumor.factors).shape == tuple(tumor.fine_mask.shape)
