"""Allowed voxels and the dilation that keeps tumours apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from organs import ISO, ellipsoid, place_in

from tumorsynth.geometry import Box
from tumorsynth.placement.allowed import AllowedVoxels, dilate
from tumorsynth.placement.organ import OrganRegion, organ_box


@pytest.mark.parametrize("gap", [0.0, 1.0, 2.5, 4.0, 7.0, 100.0])
def test_dilation_reaches_as_far_as_the_gap(gap):
    mask = torch.zeros(23, 1, 9, dtype=torch.bool)
    mask[5, 0, 4] = True
    grown = dilate(mask, gap, (1.0, 1.0, 0.5)).nonzero()
    x, z = max(1, math.ceil(gap)), max(1, math.ceil(2 * gap))
    assert (grown[:, 0].min(), grown[:, 0].max()) == (max(0, 5 - x), min(22, 5 + x))
    assert (grown[:, 2].min(), grown[:, 2].max()) == (max(0, 4 - z), min(8, 4 + z))
    assert len(grown) == (min(22, 5 + x) - max(0, 5 - x) + 1) * (min(8, 4 + z) - max(0, 4 - z) + 1)


def test_points_and_boxes_get_the_same_answer_also_from_a_part_of_the_sample():
    label = ellipsoid((40, 38, 36), ISO, (17, 16, 15))
    forbidden = torch.zeros(label.shape, dtype=torch.bool)
    forbidden[:, 20:24] = True
    whole = OrganRegion.of_label(label, 1, forbidden)
    box = organ_box(label, 1).grown(1)
    part = OrganRegion(
        label[box.slices], (1,), whole.organ_box, forbidden[box.slices], box, whole.sample_shape
    )
    tumors = place_in(label, size_mm=8.0, count=2, forbidden=forbidden)
    index = np.stack(np.meshgrid(*[np.arange(-2, n + 2) for n in label.shape], indexing="ij"))
    sample = Box.whole(label.shape)
    for region in (whole, part):
        allowed = AllowedVoxels(region, ISO, gap_mm=2.0)
        expected = (label == 1) & ~forbidden
        for tumor in tumors:
            allowed.keep_clear_of(tumor)
            near = torch.zeros(label.shape, dtype=torch.bool)
            near[tumor.slices] = tumor.mask
            expected &= ~dilate(near, 2.0, ISO)
            assert np.array_equal(allowed.mask_in(sample), expected.numpy())
            found = allowed.lookup(index)
            inner = (slice(2, -2),) * 3
            assert np.array_equal(found.allowed[inner], expected.numpy())
            assert int(found.allowed.sum()) == int(expected.sum())  # nothing outside the sample
            assert not (found.allowed & ~found.unobstructed).any()
        assert np.array_equal(allowed.is_organ_at(index)[inner], label.numpy() == 1)
