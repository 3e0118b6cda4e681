"""What placing a tumour costs, counted in operators and in voxels looked at, not by the clock."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tumorsynth.placement.allowed import Field
from tumorsynth.placement.place import LocalMask, organ_box, place
from tumorsynth.placement.shape import _CHUNK, Shape

ISO = (1.0, 1.0, 1.0)
OPERATORS = 110  # of torch, that a tumour may take: 424 of them took 5 ms
AGAIN = 50  # that one more look at levels may take: further out, or at another centre


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def looked(monkeypatch) -> Counter[str]:
    """Voxels looked up in the label, and those whose level was worked out, in how many looks."""
    counts: Counter[str] = Counter()
    at, level = Field.at, Shape.level

    def at_(self, index, *args):
        counts["label"] += index[0].size
        return at(self, index, *args)

    def level_(self, millimetres, given, where):
        counts["looks"] += 1
        counts["level"] += int(where.sum())
        return level(self, millimetres, given, where)

    monkeypatch.setattr(Field, "at", at_)
    monkeypatch.setattr(Shape, "level", level_)
    return counts


def organ(side: int, radius: float = 40.0) -> Tensor:
    """A ball, about the first 96 voxels' middle."""
    line = (torch.arange(side) - 47.5).square()
    near = line[:, None, None] + line[:, None] + line < radius**2
    return near.to(torch.uint8)


def placed(label: Tensor, seed: int, **kwargs: Any) -> tuple[list[LocalMask], int]:
    box, rng = organ_box(label, 1), torch.Generator().manual_seed(seed)
    with Operators() as seen:
        found = place(label, 1, box, ISO, rng=rng, **kwargs)
    return [t for t in found if isinstance(t, LocalMask)], seen.count


@pytest.mark.parametrize("size", [10.0, 18.0])
@pytest.mark.parametrize("side", [96, 160])
def test_a_tumour_takes_few_operators_whatever_the_volume(looked, size, side):
    label = organ(side)
    for seed in range(30):
        looked.clear()
        (tumor,), operators = placed(label, seed, size_mm=size)
        assert tumor.voxels > 500
        parts = looked["level"] // _CHUNK
        assert operators <= OPERATORS + AGAIN * (looked["looks"] - 1) + 8 * parts, seed


def test_few_voxels_are_looked_at(looked):
    """Half of the tumours lie away from the capsule, where every other voxel of the organ does."""
    labels, levels = [], []
    for seed in range(40):
        looked.clear()
        (tumor,), _ = placed(organ(96), seed, size_mm=12.0)
        labels.append(looked["label"])
        levels.append(looked["level"] / tumor.voxels)
    assert np.median(labels) <= 12_000  # all of 256 centres would be 58,000
    assert np.median(levels) <= 3.2  # a box around the tumour has 6, the ball that it may reach 4


def test_ten_tumours_cost_as_much_as_ten_times_one(looked):
    (_,), one = placed(organ(96), 3, size_mm=9.0)
    alone = looked["label"]
    looked.clear()
    found, all_ = placed(organ(96), 3, size_mm=9.0, count=10)
    assert len(found) == 10
    # keeping away from the one before is all that is added: it does not add up
    assert all_ <= 10 * one + 9 * 60 + AGAIN * (looked["looks"] - 10)
    assert looked["label"] <= 10 * max(alone, 20_000)


def test_no_memory_as_large_as_the_label_for_one_tumour():
    """In a whole scan it would cost more than the tumour."""
    label, rng = organ(200), torch.Generator().manual_seed(0)
    box = organ_box(label, 1)
    tracemalloc.start()
    (found,) = place(label, 1, box, ISO, rng=rng, size_mm=12.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, LocalMask) and peak < label.numel() / 8
