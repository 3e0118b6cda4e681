"""Frames and boxes, and crops cut and carried back, against nibabel and functions of mm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tumorsynth.crop_grid import plan_crop
from tumorsynth.geometry import Box, Frame, bounding_box, frame_from_affine, frame_from_spacing

nib = pytest.importorskip("nibabel")

ORIENTATIONS = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def make_affine(axes, signs, spacing=(0.7, 1.0, 2.5), origin=(-12.0, 30.5, 7.0)) -> np.ndarray:
    """Tensor axis ``axes[i]`` runs along RAS axis i, in direction signs[i]."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for ras, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[ras, axis] = sign * spacing[axis]
    affine[:3, 3] = origin
    return affine


def rotation(degrees: float, axis: int) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    out = np.eye(4)
    i, j = [a for a in range(3) if a != axis]
    out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def crop_around(frame: Frame, shape, tumor: Box, min_side=32, multiple=8, margin=8.0):
    return plan_crop(frame, shape, tumor, min_side=min_side, multiple=multiple, margin_mm=margin)


# -- frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [(0, 0), (12, 0), (-8, 1), (15, 2)])
def test_frame_agrees_with_nibabel_for_all_48_orientations(tilt):
    degrees, about = tilt
    for axes, signs in ORIENTATIONS:
        affine = rotation(degrees, about) @ make_affine(axes, signs)
        frame = frame_from_affine(affine)
        ornt = nib.io_orientation(affine)  # for each tensor axis: RAS axis, direction
        for tensor_axis, (ras, direction) in enumerate(ornt):
            assert frame.axes[int(ras)] == tensor_axis
            assert frame.flips[int(ras)] == (direction < 0)
        assert frame.spacing == pytest.approx(nib.affines.voxel_sizes(affine))
        codes = "".join(nib.aff2axcodes(affine))
        names = {0: "LR", 1: "PA", 2: "IS"}
        mine = [""] * 3
        for ras in range(3):
            mine[frame.axes[ras]] = names[ras][0 if frame.flips[ras] else 1]
        assert "".join(mine) == codes


def test_to_mm_is_the_affine_or_voxels_times_spacing():
    affine = rotation(10, 2) @ make_affine((2, 0, 1), (1, -1, 1))
    voxel = (3, 4.5, 7)
    expected = nib.affines.apply_affine(affine, voxel)
    assert frame_from_affine(affine).to_mm(voxel) == pytest.approx(expected)
    assert frame_from_spacing((0.5, 1, 3)).to_mm((2, 3, 4)) == (1.0, 3.0, 12.0)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, np.ndarray.tolist])
def test_affine_of_any_container(kind):
    affine = make_affine((1, 0, 2), (-1, 1, 1))
    assert frame_from_affine(kind(affine)) == frame_from_affine(affine)


@pytest.mark.parametrize(
    "spacing",
    [0, -1, 0.0, (1, 1), (1, 1, 1, 1), (1, 0, 1), (1, 1, float("nan")), (1, 1, float("inf")),
     (1, 1, 1e-9), (1, 1, 1e4), "large", None, [[1, 1, 1]] * 2, ({}, 1, 1)],
)  # fmt: skip
def test_bad_spacing_names_rule_value_and_fix(spacing):
    with pytest.raises(ValueError, match="spacing must be three numbers in mm") as error:
        frame_from_spacing(spacing)
    assert repr(spacing) in str(error.value) and "pass spacing=" in str(error.value)


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(3),
        np.zeros((4, 4)),
        np.full((4, 4), np.nan),
        np.diag([1, 1, 0, 1]),
        np.diag([1, np.inf, 1, 1]),
        make_affine((0, 1, 2), (1, 1, 1)).T,  # the translation in the last row
        np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),  # parallel columns
        "affine",
        None,
        [[1, 2], [3]],
        5.0,
    ],
)
def test_bad_affine_names_rule_value_and_fix(affine):
    with pytest.raises(ValueError, match="affine must"):
        frame_from_affine(affine)


def test_an_affine_with_impossible_voxel_sizes_is_refused():
    with pytest.raises(ValueError, match="spacing must be"):
        frame_from_affine(np.diag([1, 1, 500.0, 1]))


# -- boxes -------------------------------------------------------------------------------------


def test_bounding_box_has_a_margin_and_stays_in_the_volume():
    mask = torch.zeros(12, 10, 8, dtype=torch.bool)
    assert bounding_box(mask) is None
    mask[3, 4, 7] = mask[6, 4, 2] = True
    assert bounding_box(mask) == Box((3, 4, 2), (7, 5, 8))
    assert bounding_box(mask, margin=3) == Box((0, 1, 0), (10, 8, 8))


# -- the crop's place ----------------------------------------------------------------------------

spacings = st.tuples(*[st.floats(0.5, 5.0) for _ in range(3)])
boxes = st.tuples(*[st.tuples(st.integers(16, 90), st.floats(0, 1), st.integers(1, 12))] * 3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spacings, boxes)
def test_a_crop_holds_the_tumour_and_lies_in_the_sample_where_it_can(spacing, box):
    shape = tuple(n for n, _, _ in box)
    low = tuple(int(place * (n - min(size, n))) for n, place, size in box)
    high = tuple(a + min(size, n) for a, (n, _, size) in zip(low, box, strict=True))
    grid = crop_around(frame_from_spacing(spacing), shape, Box(low, high))
    assert grid.side % 8 == 0 and grid.side >= 32
    for axis, (s, n, a, b) in enumerate(zip(spacing, shape, low, high, strict=True)):
        first, last = grid.origin[axis], grid.origin[axis] + grid.side - 1
        extent = (n - 1) * s
        # to half a voxel, since a crop starts at a voxel's centre
        if extent >= grid.side - 1:
            assert first >= -1e-6 and last <= extent + s / 2 + 1e-6
        else:
            assert first <= 1e-6 and last >= extent - 1e-6  # all of the sample
        assert first <= a * s + 1e-6 and (b - 1) * s <= last + s / 2 + 1e-6
        # surroundings on both sides, or up to the border
        assert first <= max(0.0, a * s - 8 + s) + 1e-6
        assert last >= min(extent, (b - 1) * s + 8 - s) - s / 2 - 1e-6
        assert first / s == pytest.approx(round(first / s), abs=1e-6)
        assert 0 <= grid.source.start[axis] <= a and b <= grid.source.stop[axis] <= n


def test_at_1_mm_a_crop_of_the_samples_size_is_the_sample():
    volume = torch.randn(96, 96, 96)
    for low, high in (((0, 0, 0), (3, 3, 3)), ((40, 50, 60), (55, 60, 66)), ((90,) * 3, (96,) * 3)):
        grid = crop_around(frame_from_spacing(1.0), (96,) * 3, Box(low, high), 96, 32, 16.0)
        whole = Box.whole(volume.shape)
        assert grid.side == 96 and grid.source == whole
        assert torch.equal(grid.cut(volume[grid.source.slices]), volume)
        assert torch.equal(grid.carry_back(volume, whole), volume)


@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 40, 70), (24, 100, 17)])
def test_patches_smaller_than_the_crop_are_repeated_at_the_border(shape):
    volume = torch.randn(shape)
    grid = crop_around(frame_from_spacing(1.0), shape, Box((2, 3, 4), (8, 9, 10)))
    crop = grid.cut(volume[grid.source.slices])
    assert crop.shape == (32, 32, 32)
    index = [
        np.clip(np.arange(32) + round(o), 0, n - 1) for o, n in zip(grid.origin, shape, strict=True)
    ]
    assert torch.equal(crop, volume[np.ix_(*index)])


# -- there and back ------------------------------------------------------------------------------


def test_at_1_mm_there_and_back_is_bit_exact_in_any_orientation():
    volume = torch.randn(40, 44, 50)
    region = Box((10, 12, 20), (22, 25, 33))
    for axes, signs in ORIENTATIONS:
        frame = frame_from_affine(make_affine(axes, signs, (1.0, 1.0, 1.0)))
        grid = crop_around(frame, (40, 44, 50), Box((14, 16, 24), (18, 21, 29)))
        crop = grid.cut(volume[grid.source.slices])
        assert torch.equal(grid.carry_back(crop, region), volume[region.slices])


def wave(x, y, z):
    """A smooth function of patient mm that tells the three axes and their directions apart."""
    return np.sin(x / 11) + 0.7 * np.cos(y / 13 + 0.4) + 0.5 * np.sin(z / 9 + 1) + 0.01 * (x - z)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 0.5, 0.5), (0.7, 1.0, 2.5), (1.5, 0.6, 4.0)])
@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
def test_the_crop_samples_the_patient_at_1_mm_in_ras_order(spacing, orientation):
    affine = make_affine(*orientation, spacing)
    shape = tuple(round(60 / s) for s in spacing)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mm = nib.affines.apply_affine(affine, index)
    volume = torch.from_numpy(wave(*np.moveaxis(mm, -1, 0)).astype(np.float32))

    frame = frame_from_affine(affine)
    middle = tuple(n // 2 for n in shape)
    grid = crop_around(frame, shape, Box.at(middle, (1, 1, 1)))
    crop = grid.cut(volume[grid.source.slices])

    # position of the crop's corner towards L, P, I
    corners = [
        frame.to_mm((np.array(grid.origin) + np.array(ends) * (grid.side - 1)) / spacing)
        for ends in itertools.product((0, 1), repeat=3)
    ]
    start = np.min(corners, axis=0)
    points = np.stack(np.meshgrid(*[np.arange(grid.side)] * 3, indexing="ij"), -1) + start
    expected = torch.from_numpy(wave(*np.moveaxis(points, -1, 0)).astype(np.float32))
    inner = (slice(3, -3),) * 3  # at the very border a wide filter is one-sided
    assert (crop - expected)[inner].abs().max() < 0.006 * max(spacing) ** 2 + 1e-4

    # and back, onto the user's voxels
    region = Box.at(middle, (1, 1, 1)).grown(3).within(Box.whole(shape))
    back = grid.carry_back(crop, region)
    assert back.shape == region.shape
    assert (back - volume[region.slices]).abs().max() < 0.02 * max(spacing) ** 2 + 1e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.tuples(*[st.floats(0.75, 5.0)] * 3), st.integers(0, 2))
def test_positions_are_exact(spacing, axis):
    """Linear interpolation gives a coordinate itself, to a tenth of a micrometre."""
    shape = (50, 50, 50)
    grid = crop_around(frame_from_spacing(spacing), shape, Box((24, 24, 24), (26, 26, 26)))
    ramp = torch.arange(50.0) * spacing[axis]
    volume = ramp.reshape([-1 if a == axis else 1 for a in range(3)]).expand(shape)
    crop = grid.cut(volume[grid.source.slices])
    expected = grid.origin[axis] + torch.arange(grid.side)
    inside = (expected >= 0) & (expected <= ramp[-1])
    positions = crop.movedim(axis, 0)[:, 16, 16]
    assert (positions - expected)[inside].abs().max() < 1e-4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(spacings, st.sampled_from(ORIENTATIONS), st.floats(-1000, 3000))
def test_a_constant_stays_constant_and_nothing_overshoots(spacing, orientation, value):
    frame = frame_from_affine(make_affine(*orientation, spacing))
    shape = (30, 24, 20)
    grid = crop_around(frame, shape, Box((10, 10, 10), (14, 13, 12)))
    crop = grid.cut(torch.full(shape, value)[grid.source.slices])
    assert torch.allclose(crop, torch.full_like(crop, value), rtol=1e-5, atol=1e-3)
    noise = torch.rand(shape)
    crop = grid.cut(noise[grid.source.slices])
    assert crop.min() >= -1e-6 and crop.max() <= 1 + 1e-6
    back = grid.carry_back(crop, Box((8, 8, 8), (16, 15, 14)))
    assert back.shape == (8, 7, 6) and back.min() >= -1e-6 and back.max() <= 1 + 1e-6


@pytest.mark.parametrize("s", [0.1, 0.2, 0.25, 0.4, 0.5, 0.57, 1, 1.3, 2, 3, 5])
def test_every_voxel_of_the_tumour_counts_in_the_crop(s):
    """A tumour of one voxel must not fall between the points of the crop, wherever it lies."""
    shape = (24, 24, 24)
    frame = frame_from_spacing(s)
    for at in itertools.product((0, 7, 12, 23), (11, 12, 13), (12,)):
        grid = crop_around(frame, shape, Box.at(at, (1, 1, 1)), margin=4.0)
        volume = torch.zeros(shape)
        volume[at] = 1
        assert grid.cut(volume[grid.source.slices]).max() > 1e-4


def test_default_dtype_and_half_precision_input_are_kept():
    volume = torch.rand(40, 40, 40)
    grid = crop_around(frame_from_spacing((0.8, 1, 2)), (40,) * 3, Box((18,) * 3, (20,) * 3))
    expected = grid.cut(volume[grid.source.slices])
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(grid.cut(volume[grid.source.slices]), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert grid.cut(volume.double()[grid.source.slices]).dtype == torch.float64
