"""Which affines of files say nothing about the size of a voxel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tumorsynth.default_affines import stands_for_none
from tumorsynth.pipeline.lost_affines import lost_affines

SHAPE = (64, 50, 31)


def made(linear, origin=(0, 0, 0)):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, origin
    return affine


def turns():
    """Every matrix that permutes and flips three axes."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            yield np.eye(3)[list(order)] * signs


TURNS = list(turns())
RAS, LPS, LAS = np.eye(3), np.diag([-1, -1, 1]), np.diag([-1, 1, 1])


def turned(affine, turn, shape=SHAPE):
    """The same volume in space, its axes permuted and flipped by `turn`; its new shape."""
    order = np.abs(turn).argmax(0)
    voxels = np.eye(4)
    voxels[:3, :3] = turn
    for column, row in enumerate(order):
        if turn[row, column] < 0:
            voxels[row, 3] = shape[row] - 1
    return affine @ voxels, [shape[k] for k in order]


@pytest.mark.parametrize("linear", TURNS, ids=str)
def test_1_mm_at_the_origin_says_nothing_whatever_the_axes(linear):
    affine = made(linear)
    assert stands_for_none(affine, SHAPE) and lost_affines(affine, SHAPE) == [True]
    for turn in TURNS:
        assert stands_for_none(*turned(affine, turn))
    assert not stands_for_none(made(linear * 1.5), SHAPE)
    assert not stands_for_none(made(linear @ np.diag([1, 1, 2])), SHAPE)


@pytest.mark.parametrize("linear", TURNS, ids=str)
@pytest.mark.parametrize("cut", [(3, 0, 7), (120, 80, 300), (-8, -4, 0)])
def test_crops_and_pads_of_such_an_array_say_nothing_either(linear, cut):
    assert stands_for_none(made(linear, linear @ cut), SHAPE)


def test_an_array_that_nibabel_centres_says_nothing_either():
    centred = made(LAS, (31.5, -24.5, -15))
    for turn in TURNS:
        assert stands_for_none(*turned(centred, turn))
    assert not stands_for_none(made(LAS, (31.5, -24.5, -14)), SHAPE)


@pytest.mark.parametrize(
    ("affine", "shape"),
    [
        (made(LPS, (123.4, 56.7, -890)), SHAPE),
        (made(RAS, (-123.4, 56.7, -890)), SHAPE),
        (made(RAS, (-98, -134, -72)), (193, 229, 193)),  # MNI152, in both of its forms
        (made(LAS, (90, -126, -72)), (182, 218, 182)),
        (made(RAS, (-90, -126, -72)), (40, 40, 40)),  # crops of it
        (made(LAS, (90, -126, -72)), (64, 64, 56)),
        (made(RAS, (-120, -90, 300)), (200, 200, 100)),  # a scan that a tool put on whole mm
        (made(LPS, (250, 250, -700)), (500, 500, 400)),
        (made(LPS, (0.5, 0.5, 0.5)), SHAPE),
    ],
)
def test_a_place_of_its_own_says_that_1_mm_is_meant(affine, shape):
    assert not stands_for_none(affine, shape)


def test_real_places_say_that_1_mm_is_meant(shared):
    """No false alarm on a public scan, nor if its voxels had 1 mm, but where it says no place."""
    nib = pytest.importorskip("nibabel", reason="needs nibabel")
    files = sorted((shared / "data").rglob("*.nii.gz"))
    assert len(files) > 20
    placed = 0
    for file in files:
        found = nib.load(file)
        one_mm = found.affine / np.append(np.linalg.norm(found.affine[:3, :3], axis=0), 1)
        has_place = bool(found.affine[:3, 3].any())
        placed += has_place
        for affine in (found.affine, one_mm) if has_place else (found.affine,):
            for shape in (found.shape[:3], (96, 96, 96)):
                assert not stands_for_none(affine, shape), file
                assert lost_affines(affine, shape) == [False], file
    assert placed > 20
