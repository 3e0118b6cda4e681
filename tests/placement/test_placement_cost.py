"""The cost of placing a tumour, counted in torch operators and voxels read instead of time."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from organs import ISO, make_rng
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tumorsynth.placement.allowed import AllowedVoxels
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.shape import CHUNK_VOXELS, Shape
from tumorsynth.placement.types import LocalMask

MAX_OPERATORS = 110  # of torch, for one tumour
MAX_OPERATORS_PER_RETRY = 50  # for levels farther out, or at another centre


class OperatorCount(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def work(monkeypatch) -> Counter[str]:
    """How many voxels were looked up in the label, and for how many the level was computed."""
    counts: Counter[str] = Counter()
    lookup, level = AllowedVoxels.lookup, Shape.level

    def counted_lookup(self, index, *args):
        counts["lookups"] += index[0].size
        return lookup(self, index, *args)

    def counted_level(self, grid_mm, squares, where):
        counts["level calls"] += 1
        counts["levels"] += int(where.sum())
        return level(self, grid_mm, squares, where)

    monkeypatch.setattr(AllowedVoxels, "lookup", counted_lookup)
    monkeypatch.setattr(Shape, "level", counted_level)
    return counts


def organ(side: int, radius: float = 40.0) -> Tensor:
    """A ball around the middle of the first 96 voxels."""
    line = (torch.arange(side) - 47.5).square()
    near = line[:, None, None] + line[:, None] + line < radius**2
    return near.to(torch.uint8)


def placed(label: Tensor, seed: int, **kwargs: Any) -> tuple[list[LocalMask], int]:
    region, settings = OrganRegion.of_label(label, 1), PlacementSettings(**kwargs)
    with OperatorCount() as seen:
        found = place(region, ISO, settings, make_rng(seed))
    return [t for t in found if isinstance(t, LocalMask)], seen.count


@pytest.mark.parametrize("size", [10.0, 18.0])
@pytest.mark.parametrize("side", [96, 160])
def test_one_tumour_takes_few_operators_in_any_volume(work, size, side):
    label = organ(side)
    for seed in range(30):
        work.clear()
        (tumor,), operators = placed(label, seed, size_mm=size)
        assert tumor.voxels > 500
        parts = work["levels"] // CHUNK_VOXELS
        assert (
            operators
            <= MAX_OPERATORS + MAX_OPERATORS_PER_RETRY * (work["level calls"] - 1) + 8 * parts
        ), seed


def test_few_voxels_are_read(work):
    """The median over tumours at the capsule and away from it."""
    labels, levels = [], []
    for seed in range(40):
        work.clear()
        (tumor,), _ = placed(organ(96), seed, size_mm=12.0)
        labels.append(work["lookups"])
        levels.append(work["levels"] / tumor.voxels)
    assert np.median(labels) <= 12_000  # all of 256 centres would be 58,000
    assert np.median(levels) <= 3.2  # a box around the tumour has 6, the ball that it may reach 4


def test_ten_tumours_cost_at_most_ten_times_one(work):
    (_,), one = placed(organ(96), 3, size_mm=9.0)
    alone = work["lookups"]
    work.clear()
    found, all_ = placed(organ(96), 3, size_mm=9.0, count=10)
    assert len(found) == 10
    # plus keeping clear of the tumour before, which does not accumulate
    assert all_ <= 10 * one + 9 * 60 + MAX_OPERATORS_PER_RETRY * (work["level calls"] - 10)
    assert work["lookups"] <= 10 * max(alone, 20_000)


def test_one_tumour_allocates_no_array_as_large_as_the_label():
    """In a whole scan it would cost more than the tumour."""
    label = organ(200)
    region, settings = OrganRegion.of_label(label, 1), PlacementSettings(size_mm=12.0)
    tracemalloc.start()
    (found,) = place(region, ISO, settings, make_rng())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, LocalMask) and peak < label.numel() / 8
