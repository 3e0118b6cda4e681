"""Finding the organ in a label: `organ_box`, `is_organ`, `OrganRegion`."""

from __future__ import annotations

import pytest
import torch

from tumorsynth.geometry import Box
from tumorsynth.placement.organ import OrganRegion, organ_box


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_box_is_tight(dtype):
    label = torch.zeros(20, 30, 25, dtype=dtype)
    label[3:7, 10:21, 24] = 2
    label[5, 2, 8] = 4
    assert organ_box(label, 2) == Box((3, 10, 24), (7, 21, 25))
    assert organ_box(label, (2, 4)) == Box((3, 2, 8), (7, 21, 25))
    assert organ_box(label, [9]) is None
    assert organ_box(label.permute(2, 0, 1), (2,)) == Box((24, 3, 10), (25, 7, 21))


def test_box_of_a_bool_label():
    label = torch.zeros(5, 5, 5, dtype=torch.bool)
    assert organ_box(label, 1) is None
    label[1, 2, 3] = True
    assert organ_box(label, 1) == Box((1, 2, 3), (2, 3, 4))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_box_does_not_depend_on_memory_layout(order):
    """NIfTI arrays have their axes in the reverse order of memory."""
    label = torch.zeros(7, 11, 13, dtype=torch.int16)
    label[2:4, 5:9, 1:12] = 3
    label[1, 6, 6] = 3
    laid = label.permute(order).contiguous().permute([order.index(a) for a in range(3)])
    assert torch.equal(laid, label)
    assert organ_box(laid, 3) == Box((1, 5, 1), (4, 9, 12))
    assert organ_box(laid[:, :, :1], 3) is None


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.uint8, 257), (torch.uint8, -255), (torch.float16, 2049), (torch.bool, 2)],
)
def test_value_that_the_dtype_cannot_hold_is_not_found(dtype, value):
    """torch compares with the wrapped or rounded value: 1 and 2048."""
    label = torch.tensor([0, 1, 2048]).to(dtype).view(3, 1, 1)
    assert organ_box(label, value) is None
    assert organ_box(label, (value, 1)) is not None


def test_region_of_a_label_covers_the_sample():
    label = torch.zeros(6, 7, 8, dtype=torch.int16)
    label[2:4, 1:3, 5] = 3
    region = OrganRegion.of_label(label, (3, 9))
    assert region.organ_labels == (3, 9) and region.organ_box == Box((2, 1, 5), (4, 3, 6))
    assert region.part == Box.whole(label.shape) and region.sample_shape == (6, 7, 8)
    assert region.to_cpu() is region  # nothing to copy
