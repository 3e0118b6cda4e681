"""The outlines of benchmarks/realism/lung, and what the recipe of `lung` 3 makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

nibabel = pytest.importorskip("nibabel")
outline = pytest.importorskip(
    "benchmarks.realism.lung.outline", reason="needs the benchmarks beside the tests"
)
from benchmarks.realism.lung.data import enlarged  # noqa: E402 (after the skip)
from tumorsynth.training.data import Case  # noqa: E402

LABEL = Path(outline.__file__).with_name("lidc_enhanced_chest_base_label.nii.gz")


def lung_with_a_nodule(shape=(70, 70, 70), radius=5.0):
    """A nodule of 40 HU on a vessel of 2 mm, edges of one voxel, in lung of -850 HU."""
    at = np.indices(shape)
    distance = np.sqrt(sum((a - 35) ** 2 for a in at))
    tube = np.hypot(at[0] - 35, at[2] - 35)
    share = np.maximum((radius + 0.5 - distance).clip(0, 1), (1.5 - tube).clip(0, 1))
    return -850 + 890 * share, distance


def test_a_nodule_is_outlined_without_the_vessel_that_it_hangs_on():
    hu, distance = lung_with_a_nodule()
    mask = outline.nodule(hu.astype(np.float32), [1.0, 1.0, 1.0], [34, 36, 35, 12.0])
    assert mask[distance <= 4].all() and not mask[distance > 7.5].any()
    assert mask.sum() == pytest.approx(4 / 3 * np.pi * 5**3, rel=0.2)


def test_the_file_holds_six_nodules_of_their_sizes():
    image = nibabel.load(LABEL)
    label = np.asarray(image.dataobj)
    assert label.dtype == np.uint8 and set(np.unique(label)) == {0, 2}
    parts, count = ndimage.label(label, np.ones((3, 3, 3)))
    volumes = np.bincount(parts.ravel())[1:] * np.prod(image.header.get_zooms())
    sizes = (6 * volumes / np.pi) ** (1 / 3)
    assert count == 6 and sizes.min() > 5 and 10 < sizes.max() < 12


def test_an_enlarged_nodule_has_the_edge_and_the_density_of_the_first():
    hu, distance = lung_with_a_nodule()
    hu = hu + np.random.default_rng(0).normal(0, 20, hu.shape)
    label = 2 * (distance <= 5).astype(np.uint8)
    case = Case("a", torch.from_numpy(hu).short(), torch.from_numpy(label))
    (large,) = enlarged(case, 2.0)
    assert large.hu.dtype == case.hu.dtype
    found = (large.label == 2).numpy()
    assert found.sum() == pytest.approx(8 * (label == 2).sum(), rel=0.1)

    def ramp(volume):  # voxels between a quarter and three quarters of the way, by its surface
        inside = volume > -400
        surface = inside & ~ndimage.binary_erosion(inside)
        return ((volume > -627) & (volume < -182)).sum() / surface.sum()

    middle = [n // 2 for n in large.hu.shape]
    cut = tuple(slice(m - 16, m + 16) for m in middle)
    wider = ndimage.zoom(hu[26:44, 26:44, 26:44], 2.0, order=1)
    assert ramp(large.hu[cut].numpy()) < 0.75 * ramp(wider)
    assert np.median(large.hu.numpy()[found]) == pytest.approx(40, abs=15)
