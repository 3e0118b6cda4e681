"""Annotated outlines drawn tighter: to where a tumour can be seen."""

from __future__ import annotations

import pytest
import torch

from tumorsynth.training.data import Case, find_tumors
from tumorsynth.training.outlines import tighten_outlines

SIDE = 56
TISSUE = (20.0, 220.0)


def far(at=(28, 28, 28)):
    axes = torch.meshgrid(*[torch.arange(SIDE) - c for c in at], indexing="ij")
    return sum(a.square() for a in axes).sqrt()


def case(contrast=-45.0, drawn=12.0, seen=9.0, level=100.0, noise=8.0):
    """A tumour of radius ``seen``, annotated with radius ``drawn``."""
    rng = torch.Generator().manual_seed(0)
    hu = level + noise * torch.randn(SIDE, SIDE, SIDE, generator=rng)
    hu[far() <= seen] += contrast
    label = torch.ones(SIDE, SIDE, SIDE, dtype=torch.uint8)
    label[far() <= drawn] = 2
    return Case("one", hu.round().short(), label)


def tightened(one, tissue=TISSUE):
    tumors = find_tumors([one], 2)
    (new,), found = tighten_outlines([one], tumors, 2, tissue)
    return new, found


@pytest.mark.parametrize("contrast", [-45.0, 40.0])
def test_a_generous_outline_comes_in_to_the_visible_edge(contrast):
    one = case(contrast)
    new, (tumor,) = tightened(one)
    assert tumor.diameter_mm == pytest.approx(18, abs=0.8)
    inside = new.label == 2
    truth = far() <= 9
    assert 2 * int((inside & truth).sum()) / int(inside.sum() + truth.sum()) > 0.95
    # one piece, no holes, and the tumour's box is that of its voxels
    assert len(find_tumors([new], 2)) == 1
    assert tumor.low == find_tumors([new], 2)[0].low
    assert bool(inside[far() < 6].all())


def test_what_was_annotated_becomes_nothing_and_the_rest_stays():
    one = case()
    before = one.label.clone()
    new, _ = tightened(one)
    gone = (before == 2) & (new.label != 2)
    assert bool((new.label[gone] == 0).all())
    assert torch.equal(new.label[~gone], before[~gone])
    assert torch.equal(one.label, before)


def test_a_tumour_that_cannot_be_seen_keeps_its_outline():
    one = case(contrast=-4.0)
    new, found = tightened(one)
    assert torch.equal(new.label, one.label)
    assert found == find_tumors([one], 2)


def test_a_tight_outline_stays():
    one = case(drawn=9.0)
    new, (tumor,) = tightened(one)
    assert tumor.diameter_mm == pytest.approx(18, abs=0.6)


def test_a_small_bright_spot_in_a_large_tumour_does_not_become_the_tumour():
    """A quarter of what was annotated at least, or the outline stays as it is."""
    one = case(contrast=-12.0, drawn=12.0, seen=12.0)
    one.hu[far((28, 28, 28)) <= 3] = -60
    new, (tumor,) = tightened(one)
    assert tumor.diameter_mm > 20


def test_tumours_left_out_for_their_size_are_left_as_they_are():
    one = case()
    one.label[2:5, 2:5, 2:5] = 2
    (new,), _ = tighten_outlines([one], find_tumors([one], 2, min_diameter_mm=10), 2, TISSUE)
    assert bool((new.label[2:5, 2:5, 2:5] == 2).all())


def test_scans_without_labels_pass():
    one, plain = case(), Case("plain", case().hu, None)
    cases, _ = tighten_outlines([plain, one], find_tumors([plain, one], 2), 2, TISSUE)
    assert cases[0].label is None
