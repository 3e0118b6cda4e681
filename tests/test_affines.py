"""How far apart two affines put a volume, and what counts as rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tumorsynth.affines import directions_agree, is_identity, largest_shift, sizes_agree, to_array

OBLIQUE = np.array(
    [[-0.7, 0.05, 0.1, 90.0], [0.04, -0.69, 0.3, -40.0], [0.02, 0.1, 2.4, 1200.5], [0, 0, 0, 1]]
)


@pytest.mark.parametrize("by", [(1, 0, 0), (0, -0.3, 0), (0.02, 0.01, 2)])
def test_a_shift_is_counted_in_voxels_along_the_axes(by):
    other = OBLIQUE.copy()
    other[:3, 3] += OBLIQUE[:3, :3] @ by
    assert largest_shift(OBLIQUE, other, (5, 6, 7)) == pytest.approx(np.abs(by).max())
    assert largest_shift(OBLIQUE, OBLIQUE, (5, 6, 7)) == 0


def test_a_difference_in_size_grows_over_the_volume():
    other = OBLIQUE @ np.diag([1, 1.001, 1, 1])
    assert largest_shift(OBLIQUE, other, (512, 512, 40)) == pytest.approx(0.511)
    assert largest_shift(OBLIQUE, other, (20, 20, 20)) == pytest.approx(0.019)


def test_the_farthest_voxel_is_found_among_all():
    rng = np.random.default_rng(0)
    shape = (6, 5, 4)
    voxels = np.array([[*index, 1] for index in np.ndindex(shape)])
    for _ in range(20):
        other = OBLIQUE.copy()
        other[:3] += rng.normal(0, 0.05, (3, 4))
        mm = (voxels @ (other - OBLIQUE).T)[:, :3]
        farthest = np.abs(mm @ np.linalg.inv(OBLIQUE[:3, :3]).T).max()
        assert largest_shift(OBLIQUE, other, shape) == pytest.approx(farthest)


def test_what_is_no_number_is_infinitely_far():
    other = OBLIQUE.copy()
    other[0, 3] = np.nan
    assert largest_shift(OBLIQUE, other, (4, 4, 4)) == np.inf


def test_only_the_exact_identity_counts_as_one():
    moved = np.eye(4)
    moved[:3, 3] = (3, -4, 5)
    assert is_identity(np.eye(4)) and is_identity(moved)
    for other in (np.eye(4) * (1 + 1e-12), np.diag([-1, 1, 1, 1]), np.eye(4)[[1, 0, 2, 3]]):
        assert not is_identity(other)


def test_rounding_of_sizes_and_directions():
    assert sizes_agree((0.7031, 0.7031, 2.5), (0.7, 0.703125, 2.5))
    assert not sizes_agree((0.7, 0.7, 2.5), (0.7, 0.7, 2.53))
    tilt = np.eye(4)
    for degrees, same in ((0.5, True), (3, False)):
        a = np.radians(degrees)
        tilt[1:3, 1:3] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
        assert directions_agree(OBLIQUE, tilt @ OBLIQUE) is same
    assert not directions_agree(OBLIQUE, OBLIQUE @ np.diag([-1, 1, 1, 1]))


def test_tensors_and_lists_become_arrays():
    for kind in (torch.from_numpy, np.asarray, lambda a: a.tolist()):
        assert np.array_equal(to_array(kind(OBLIQUE)), OBLIQUE)
