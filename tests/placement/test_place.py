"""Placing tumours in an organ: what every tumour must be, skips, replay, bad input."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from organs import ISO, ellipsoid, least_labelled_share, make_rng, place_in, place_one, tube
from scipy import ndimage

from tumorsynth.geometry import Box
from tumorsynth.placement import place as place_module
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import (
    CENTRES_PER_SIZE,
    MAX_ORGAN_SHARE,
    MIN_FLATNESS,
    SIZE_STEPS,
    place,
    place_from_params,
)
from tumorsynth.placement.rasterize import flatness
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import LocalMask, Skip, SkipCode, TumorParams


def full(tumor: LocalMask, shape) -> np.ndarray:
    out = np.zeros(tuple(shape), bool)
    out[tumor.slices] = tumor.mask.numpy()
    return out


def check(tumor: LocalMask, label: torch.Tensor, spacing, lo: float, hi: float) -> None:
    """Assert what holds for every tumour."""
    count = int(tumor.mask.sum())
    assert count == tumor.voxels > 0
    assert bool((label[tumor.slices][tumor.mask] == 1).all())
    assert ndimage.label(tumor.mask.numpy(), np.ones((3, 3, 3)))[1] == 1
    share = tumor.share.numpy()
    for axis in range(3):  # the box is tight
        line = share.any(tuple(a for a in range(3) if a != axis))
        assert line[0] and line[-1]
    assert (label[tumor.slices][tumor.share > 0] == 1).all()
    labelled = share >= least_labelled_share(tumor)
    assert not (tumor.mask.numpy() & ~labelled).any() and count >= 0.9 * labelled.sum()
    volume = count * math.prod(spacing)
    assert tumor.diameter_mm == pytest.approx((6 * volume / math.pi) ** (1 / 3))
    # a grid allows half a voxel, or subvoxel, of volume to either side
    asked, cell = math.pi / 6 * tumor.params.diameter_mm**3, math.prod(spacing)
    cell /= math.prod(tumor.factors)
    true_volume = int(tumor.fine_mask.sum()) * cell
    assert abs(true_volume - asked) <= max(0.51 * cell, cell - asked)
    grid = cell / (math.pi / 6 * lo**3)
    true_diameter = (6 * true_volume / math.pi) ** (1 / 3)
    assert lo * (1 - grid) <= true_diameter <= hi * (1 + grid)
    if tumor.factors == (1, 1, 1):
        assert tumor.diameter_mm == pytest.approx(true_diameter)


# --- one tumour ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [ISO, (0.7, 0.7, 5.0), (3.0, 2.5, 0.5), (0.5, 0.5, 0.5)])
def test_every_tumour_lies_inside_the_organ_and_has_the_volume_asked_for(spacing):
    shape = [round(80 / s) for s in spacing]
    label = ellipsoid(shape, spacing, (35, 32, 30))
    for seed in range(40):
        tumor = place_one(label, spacing, seed, size_mm=(5, 25))
        assert isinstance(tumor, LocalMask), tumor
        check(tumor, label, spacing, 5, 25)


@pytest.mark.parametrize("radius", [3.0, 5.0, 9.0])
def test_thin_organ_gets_a_smaller_tumour_or_a_skip(radius):
    label = tube(radius)
    made = 0
    for seed in range(40):
        tumor = place_one(label, seed=seed, size_mm=(5, 20), prior="pancreas")
        if isinstance(tumor, Skip):
            assert "no room for a tumour of 5 mm or more" in tumor.reason
        else:
            made += 1
            check(tumor, label, ISO, 5, 20)
    assert made >= 36


def test_skip_says_which_size_would_fit():
    tumor = place_one(tube(3.0), size_mm=(18, 20))
    assert isinstance(tumor, Skip)
    found = re.fullmatch(
        r"no room for a tumour of 18 mm or more in the organ; largest that fits: (.*) mm",
        tumor.reason,
    )
    assert found and 6 < float(found[1]) < 18
    label = torch.zeros(9, 9, 9, dtype=torch.int16)
    label[4, 4, 4] = 1
    assert isinstance(place_one(label, size_mm=(5, 20)), Skip)
    assert isinstance(place_one(label, size_mm=1.0), LocalMask)


def test_no_organ_is_a_skip():
    label = torch.zeros(9, 9, 9)
    (result,) = place_in(label, organ_labels=(1, 3), size_mm=5)
    assert isinstance(result, Skip) and result.code is SkipCode.NO_ORGAN
    assert result.reason == "no organ: no voxel has a label of (1, 3)"


def test_hollow_organ_gets_no_sickle():
    label = ellipsoid((70, 70, 70), ISO, (30, 30, 30)) - ellipsoid((70, 70, 70), ISO, (24, 24, 24))
    for seed in range(30):
        tumor = place_one(label, seed=seed, size_mm=(6, 30))
        if isinstance(tumor, LocalMask):
            middle = tumor.mask.nonzero().double().mean(0).round().long().tolist()
            assert bool(tumor.mask[tuple(middle)])


def test_organ_cuts_no_tumour_to_a_sliver():
    """In a bowl with a wall of 9 mm most centres would leave a strip or a disc."""
    label = ellipsoid((80, 80, 60), ISO, (36, 36, 26))
    label[:, :, 26:] = 0
    label &= ~(ellipsoid((80, 80, 60), ISO, (27, 27, 17)).bool()).to(torch.uint8)
    found = [place_one(label, seed=seed, size_mm=(8, 16)) for seed in range(60)]
    made = [t for t in found if isinstance(t, LocalMask)]
    assert len(made) > 40
    for tumor in made:
        drawn = tumor.params.axes[2] / tumor.params.axes[0]
        assert flatness(tumor.mask, ISO) >= min(MIN_FLATNESS, 0.7 * drawn)


def test_flatness_is_in_mm():
    box = torch.ones(12, 12, 3, dtype=torch.bool)
    assert flatness(box, ISO) == pytest.approx(3 / 12)
    assert flatness(box, (1.0, 1.0, 4.0)) == pytest.approx(1.0)
    assert flatness(torch.ones(1, 1, 1, dtype=torch.bool), (1.0, 2.0, 4.0)) == 0.25


def test_round_smooth_tumour_is_a_ball_in_mm_at_any_voxel_size():
    spacing = (0.5, 1.0, 2.0)
    label = torch.ones(100, 50, 25, dtype=torch.uint8)
    params = TumorParams((50, 25, 12), 20.0, ISO, (1.0, 0.0, 0.0, 0.0), 0.0, 5, 0, 1.0, 20.0)
    tumor = place_from_params(params, OrganRegion.of_label(label, 1), spacing)
    assert isinstance(tumor, LocalMask)
    where = tumor.mask.nonzero().double() * torch.tensor(spacing)
    radius = (where - where.mean(0)).norm(dim=1)
    assert float(radius.max()) < 10.0 + 1.2
    assert int((radius < 8.8).sum()) == pytest.approx(math.pi / 6 * 17.6**3, rel=0.02)


def test_axes_and_rotation_turn_the_tumour():
    half = 0.5**0.5
    label = torch.ones(60, 60, 60, dtype=torch.uint8)
    params = TumorParams(
        (30, 30, 30), 16.0, (2.0, 1.0, 0.5), (half, 0.0, 0.0, half), 0.0, 1, 0, 1.0, 16.0
    )
    # a quarter turn about z: the long axis along y
    tumor = place_from_params(params, OrganRegion.of_label(label, 1), ISO)
    assert isinstance(tumor, LocalMask)
    x, y, z = tumor.mask.shape
    assert (y, x, z) == pytest.approx((32, 16, 8), abs=2)


def test_large_tumours():
    label = ellipsoid((150, 150, 130), ISO, (72, 70, 62))
    for size in (50.0, 90.0):
        tumor = place_one(label, size_mm=size)
        assert isinstance(tumor, LocalMask)
        check(tumor, label, ISO, size, size)


def test_tumours_touch_the_capsule_as_often_as_the_prior_says():
    label = ellipsoid((96, 96, 96), ISO, (45, 42, 40))
    outside = label.numpy() == 0
    edge = ndimage.binary_dilation(outside, np.ones((3, 3, 3)))
    for size, expected in ((7.0, 0.26), (30.0, 0.79)):
        touching = 0
        for seed in range(80):
            tumor = place_one(label, seed=seed, size_mm=size)
            assert isinstance(tumor, LocalMask)
            touching += bool((edge & full(tumor, label.shape)).any())
        assert touching / 80 == pytest.approx(expected, abs=0.15)


# --- several tumours -----------------------------------------------------------------------------


def test_tumours_keep_their_distance():
    spacing = (1.0, 1.5, 2.0)
    label = ellipsoid((70, 50, 36), spacing, (33, 33, 33))
    results = place_in(label, spacing, seed=2, size_mm=(6, 14), count=6, gap_mm=3.0)
    tumors = [r for r in results if isinstance(r, LocalMask)]
    assert len(tumors) >= 4
    for i, tumor in enumerate(tumors):
        check(tumor, label, spacing, 6, 14)
        distance = ndimage.distance_transform_edt(~full(tumor, label.shape), sampling=spacing)
        for other in tumors[i + 1 :]:
            assert distance[full(other, label.shape)].min() > 3.0


def test_tumours_that_do_not_fit_apart_are_skipped_unless_they_may_merge():
    label = ellipsoid((40, 40, 40), ISO, (14, 14, 14))
    apart = place_in(label, seed=1, size_mm=(12, 14), count=12)
    merged = place_in(label, seed=1, size_mm=(12, 14), count=12, merge=True)
    assert len(apart) == len(merged) == 12
    skips = [r for r in apart if isinstance(r, Skip)]
    assert 0 < len(skips) < 12
    assert all("no room" in s.reason for s in skips)
    assert all(isinstance(r, LocalMask) for r in merged)


def test_count_is_drawn_inclusively():
    label = torch.zeros(4, 4, 4)
    counts = {len(place_in(label, seed=s, size_mm=5, count=(1, 3))) for s in range(40)}
    assert counts == {1, 2, 3}
    assert place_in(label, size_mm=5, count=0) == []


def test_forbidden_voxels_stay_free():
    label = ellipsoid((60, 60, 60), ISO, (28, 28, 28))
    forbidden = torch.zeros(60, 60, 60, dtype=torch.bool)
    forbidden[:, :, 30:] = True
    for seed in range(20):
        tumor = place_one(label, seed=seed, forbidden=forbidden)
        assert isinstance(tumor, LocalMask)
        assert not bool(forbidden[tumor.slices][tumor.mask].any())
    assert "no room" in place_one(label, forbidden=torch.ones_like(forbidden)).reason


# --- beyond the organ ----------------------------------------------------------------------------


class HalfSpace:
    """A minimal `GrowthRegion`: every voxel from x = 30 on."""

    def likely_at(self, index: torch.Tensor) -> torch.Tensor:
        return index[0] >= 30

    def mask_in(self, box: Box) -> torch.Tensor:
        x = torch.arange(box.start[0], box.stop[0])[:, None, None]
        return (x >= 30).expand(box.shape)


def test_any_growth_region_lets_tumours_grow_beyond_the_organ_and_no_farther():
    label = torch.zeros(60, 60, 60, dtype=torch.uint8)
    label[10:30, 10:50, 10:50] = 1
    region, settings = OrganRegion.of_label(label, 1), PlacementSettings(14, bulge=(0.3, 0.5))
    shares = []
    for seed in range(12):
        (inside,) = place(region, ISO, settings, make_rng(seed))
        assert isinstance(inside, LocalMask) and inside.params.bulge == 0
        check(inside, label, ISO, 14, 14)
        (tumor,) = place(region, ISO, settings, make_rng(seed), HalfSpace())
        if isinstance(tumor, LocalMask):
            beyond = (label[tumor.slices] == 0) & tumor.mask
            assert not bool((beyond.nonzero()[:, 0] + tumor.start[0] < 30).any())
            shares.append(float(beyond.sum()) / tumor.voxels - tumor.params.bulge)
    assert len(shares) >= 8 and np.median(np.abs(shares)) < 0.12


# --- repeatable results ---------------------------------------------------------------------------


def test_params_replay_through_json():
    spacing = (0.8, 0.8, 2.5)
    label = tube(9.0, spacing)
    results = place_in(label, spacing, seed=3, size_mm=(5, 15), count=4)
    region = OrganRegion.of_label(label, 1)
    done: list[LocalMask] = []
    for result in results:
        if isinstance(result, Skip):
            continue
        params = TumorParams.from_dict(json.loads(json.dumps(result.params.to_dict())))
        assert params == result.params
        again = place_from_params(params, region, spacing, earlier=done)
        assert isinstance(again, LocalMask)
        assert again.start == result.start
        assert torch.equal(again.mask, result.mask)
        done.append(again)
    assert len(done) >= 2


def test_params_of_another_label_raise_or_skip():
    label = ellipsoid((60, 60, 60), ISO, (28, 28, 28))
    tumor = place_one(label)
    empty = OrganRegion.of_label(torch.zeros_like(label), 1)
    assert isinstance(place_from_params(tumor.params, empty, ISO), Skip)
    with pytest.raises(ValueError, match="outside the label"):
        place_from_params(tumor.params, OrganRegion.of_label(label[:5], 1), ISO)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float32])
def test_label_dtype_and_layout_do_not_matter(dtype):
    label = ellipsoid((60, 50, 40), ISO, (25, 22, 18))
    expected = place_one(label, seed=4)
    got = place_one(label.to(dtype).permute(2, 1, 0).contiguous().permute(2, 1, 0), seed=4)
    assert got.params == expected.params
    assert torch.equal(got.mask, expected.mask)


def test_strided_and_expanded_labels_give_the_same_tumours_as_a_copy():
    """Placement looks voxels up in the label's own memory, whatever its strides."""
    whole = torch.zeros(70, 64, 58, dtype=torch.int16)
    whole[6:66, 7:57, 9:49] = ellipsoid((60, 50, 40), ISO, (25, 22, 18), dtype=torch.int16)
    part = whole[6:66, 7:57, 9:49]
    bar = ellipsoid((60, 50, 1), ISO, (25, 22, 1)).expand(60, 50, 40)
    for label in (part, part[::2, :, ::2], bar, bar.permute(2, 0, 1)):
        assert not label.is_contiguous()
        for seed in range(6):
            copied = label.contiguous()
            found = place_in(label, seed=seed, size_mm=(5, 12), count=3)
            expected = place_in(copied, seed=seed, size_mm=(5, 12), count=3)
            for a, b in zip(found, expected, strict=True):
                if isinstance(a, Skip):
                    assert a == b
                else:
                    assert (a.params, a.start) == (b.params, b.start)
                    assert torch.equal(a.mask, b.mask)
                    assert bool((copied[a.slices][a.mask] == 1).all())


def test_volume_around_the_organ_does_not_matter():
    label = ellipsoid((60, 60, 60), ISO, (22, 22, 22))
    far = torch.nn.functional.pad(label, (30, 5, 40, 0, 12, 70))
    small, large = place_one(label, seed=6), place_one(far, seed=6)
    assert [b - a for a, b in zip(small.start, large.start, strict=True)] == [12, 40, 30]
    assert torch.equal(small.mask, large.mask)


def test_only_the_given_generator_is_used():
    label = ellipsoid((40, 40, 40), ISO, (18, 18, 18))
    before = torch.random.get_rng_state()
    first, again, other = (place_one(label, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.params == again.params != other.params


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_places_the_same_tumours():
    label = tube(9.0)
    here = place_in(label, seed=3, size_mm=(5, 15), count=4)
    there = place_in(label.cuda(), seed=3, size_mm=(5, 15), count=4)
    for a, b in zip(here, there, strict=True):
        if isinstance(a, LocalMask):
            assert a.params == b.params
            assert torch.equal(a.mask, b.mask.cpu())
        else:
            assert a == b


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_mm": (0, 5)}, "size_mm must be a number .* with 0.1 <= lo"),
        ({"size_mm": (9, 5)}, "size_mm must be a number or"),
        ({"size_mm": -1}, "size_mm must be"),
        ({"size_mm": float("nan")}, "size_mm must be"),
        ({"size_mm": "spleen"}, "cyst, kidney, liver, lung, pancreas"),
        ({"spacing": (1, 0, 1)}, "spacing must be three positive"),
        ({"spacing": (1, 1)}, "spacing must be three positive"),
        ({"spacing": (1, 1, float("inf"))}, "spacing must be three positive"),
        ({"count": (3, 1)}, "count must be"),
        ({"count": -1}, "count must be"),
        ({"count": 1.5}, "count must be"),
        ({"organ_labels": ()}, "organ_labels must be"),
        ({"label": torch.ones(1, 8, 8, 8)}, r"label must be \(X, Y, Z\)"),
        ({"sigma_mm": -2.0}, "sigma_mm must be"),
        ({"gap_mm": -1.0}, "gap_mm must be"),
        ({"forbidden": torch.zeros(3, 3, 3, dtype=torch.bool)}, "forbidden must be bool"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "label": torch.ones(8, 8, 8),
        "organ_labels": 1,
        "forbidden": None,
        "spacing": ISO,
        "size_mm": 4,
    }
    given.update(change)
    with pytest.raises(ValueError, match=message):
        place_in(**given)


# --- real organs and time ------------------------------------------------------------------------


def test_real_organs(shared: Path):
    nibabel = pytest.importorskip("nibabel")
    files = sorted((shared / "data" / "organ_masks").glob("*.nii.gz"))
    assert len(files) == 12
    for file in files:
        image = nibabel.load(file)
        label = torch.from_numpy(np.ascontiguousarray(np.asanyarray(image.dataobj)))
        spacing = tuple(float(s) for s in image.header.get_zooms())
        region, settings = OrganRegion.of_label(label, 1), PlacementSettings(size_mm=(5, 20))
        for seed in range(10):
            (result,) = place(region, spacing, settings, make_rng(seed))
            if isinstance(result, LocalMask):
                check(result, label, spacing, 5, 20)
            else:
                assert result.reason


def test_placing_takes_as_long_in_a_volume_of_any_size():
    """In CPU time; test_placing_cost.py counts the operations, which no machine alters."""
    part = ellipsoid((96, 96, 96), ISO, (45, 42, 40))
    whole = torch.zeros(256, 256, 256, dtype=torch.uint8)
    whole[:96, :96, :96] = part
    regions = {len(label): OrganRegion.of_label(label, 1) for label in (part, whole)}
    settings = PlacementSettings(size_mm=(8, 20))
    times: dict[int, list[float]] = {side: [] for side in regions}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in range(30):
            for side, region in regions.items():
                start = time.process_time()
                place(region, ISO, settings, make_rng(seed))
                times[side].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    # the fastest third, since a busy machine slows down the others
    small, large = (sorted(spent)[10] for spent in times.values())
    assert large < 2 * small and large < 0.06, (small, large)


def test_a_prior_s_tumour_takes_at_most_a_quarter_of_one_of_two_kidneys():
    """Two kidneys of 52 ml with one label; the prior alone would sample up to 150 mm."""
    spacing = (3.0, 3.0, 5.0)
    kidney = ellipsoid((20, 20, 20), spacing, (20, 20, 31))
    label = torch.cat([kidney, torch.zeros_like(kidney), kidney])
    part = int(kidney.sum())
    for seed in range(12):
        (found,) = place_in(label, spacing, seed, size_mm="kidney")
        assert isinstance(found, LocalMask), found
        assert found.voxels <= 1.1 * MAX_ORGAN_SHARE * part
    (asked,) = place_in(label, spacing, size_mm=38.0)
    assert isinstance(asked, Skip) or asked.voxels > MAX_ORGAN_SHARE * part  # as asked


def test_number_of_attempts_is_bounded(monkeypatch):
    calls = []
    monkeypatch.setattr(place_module, "rasterize", lambda *a: calls.append(a) or 3)
    label = ellipsoid((60, 60, 60), ISO, (28, 28, 28))
    assert isinstance(place_one(label), Skip)
    assert len(calls) == CENTRES_PER_SIZE * SIZE_STEPS


def test_voxels_much_longer_than_the_tumour_give_a_tumour_or_a_skip():
    """No voxel's middle may lie near the shape."""
    label = torch.ones(1, 12, 9, dtype=torch.uint8)
    for seed in range(40):
        for made in place_in(label, (0.01, 17.0, 0.01), seed, size_mm=(2, 6), count=2):
            assert isinstance(made, Skip) or made.voxels >= 1
