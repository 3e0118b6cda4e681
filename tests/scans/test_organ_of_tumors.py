"""Which organ's file the voxels of a tumour belong to."""

from __future__ import annotations

import numpy as np

from tumorsynth.scans.organ_of_tumors import organ_of_tumors

SHAPE = (12, 8, 4)


def block(*slices):
    mask = np.zeros(SHAPE, bool)
    mask[slices] = True
    return mask


def test_tumours_belong_to_the_organ_that_they_grew_from():
    before = np.zeros(SHAPE, np.int16)
    before[:4], before[8:] = 1, 2
    left, right = block(slice(3, 6), slice(2, 5)), block(slice(7, 10), slice(2, 5))
    found = organ_of_tumors(left | right, before, before, (1, 2))
    assert (found == 1).sum() == left.sum() and (found[left] == 1).all()
    assert (found == 2).sum() == right.sum() and (found[right] == 2).all()


def test_voxels_that_hang_on_by_a_corner_belong_to_it_too():
    before = np.zeros(SHAPE, np.int16)
    before[4, 4, 1], before[-1] = 2, 1
    tumor = block(4, 4, 1) | block(5, 5, 2) | block(6, 6, 3)
    assert (organ_of_tumors(tumor, before, before, (1, 2))[tumor] == 2).all()


def test_each_organ_keeps_the_voxels_that_it_had():
    before = np.ones(SHAPE, np.int16)
    before[6:] = 2
    tumor = block(slice(4, 9), slice(2, 5))
    found = organ_of_tumors(tumor, before, before, (1, 2))
    np.testing.assert_array_equal(found, np.where(tumor, before, 0))


def test_a_tumour_beyond_its_organ_belongs_to_the_one_beside_it():
    after = np.zeros(SHAPE, np.int16)
    after[:3], after[9:] = 1, 2
    tumor = block(slice(5, 9))  # touches only what tissue was pushed to
    assert (organ_of_tumors(tumor, after * 0, after, (1, 2))[tumor] == 2).all()
    alone = block(slice(4, 8), slice(3, 5))
    assert (organ_of_tumors(alone, after * 0, after, (2, 1))[alone] == 2).all()
    assert not organ_of_tumors(alone & False, after, after, (1, 2)).any()
