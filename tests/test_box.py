"""`Box`: part of a volume."""

from __future__ import annotations

import pytest
import torch

from tumorsynth.geometry import Box


def test_slices_and_shape_select_the_same_voxels():
    volume = torch.arange(4 * 5 * 6).reshape(4, 5, 6)
    box = Box((1, 0, 2), (3, 5, 4))
    assert volume[box.slices].shape == torch.Size(box.shape) == (2, 5, 2)
    assert torch.equal(volume[box.slices], volume[1:3, 0:5, 2:4])
    assert Box.of_slices(box.slices) == Box.at((1, 0, 2), (2, 5, 2)) == box
    assert torch.equal(volume[Box.whole(volume.shape).slices], volume)


def test_grown_box_may_leave_the_volume_and_within_brings_it_back():
    grown = Box((1, 5, 1), (4, 9, 12)).grown((2, 1, 3))
    assert grown == Box((-1, 4, -2), (6, 10, 15))
    assert grown.within(Box.whole((5, 20, 13))) == Box((0, 4, 0), (5, 10, 13))
    assert Box((1, 5, 1), (4, 9, 12)).grown(1) == Box((0, 4, 0), (5, 10, 13))
    with pytest.raises(ValueError, match="must start inside its volume"):
        _ = grown.slices


def test_grown_mm_rounds_up_and_adds_a_voxel():
    box = Box((1, 5, 1), (4, 9, 12))
    grown = box.grown_mm(2.0, (1.0, 4.0, 0.5))
    assert grown.within(Box.whole((7, 11, 17))).slices == (slice(0, 7), slice(3, 11), slice(0, 17))
    assert box.grown_mm(2.1, (1.0, 4.0, 0.5)) == box.grown((4, 2, 6))


def test_boxes_that_share_no_voxel_have_an_empty_common_part():
    first, second = Box((0, 0, 0), (4, 4, 4)), Box((6, 1, 1), (8, 3, 3))
    for common in (first.within(second), second.within(first)):
        assert common.is_empty and 0 in common.shape and min(common.shape) >= 0
    assert first.within(Box((3, 3, 3), (9, 9, 9))) == Box((3, 3, 3), (4, 4, 4))
    assert not first.is_empty


def test_hull_contains_all_boxes():
    boxes = [Box((5, 0, 2), (6, 1, 3)), Box((1, 4, 2), (2, 9, 8))]
    assert Box.hull(boxes) == Box((1, 0, 2), (6, 9, 8))
    assert Box.hull(iter(boxes[:1])) == boxes[0]


def test_relative_box_selects_the_same_voxels_in_the_part():
    volume = torch.arange(512).reshape(8, 8, 8)
    part, box = Box((2, 1, 3), (8, 7, 8)), Box((4, 2, 5), (6, 6, 7))
    inner = box.relative_to(part)
    assert torch.equal(volume[part.slices][inner.slices], volume[box.slices])
