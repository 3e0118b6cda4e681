from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from tumorsynth import masks
from tumorsynth._tumor_shape import BALL, BALL_LEVEL, MAX_LEVEL
from tumorsynth.masks import Box, LocalMask, Skip, TumorParams, draw, organ_box, place

ONE = (1.0, 1.0, 1.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ellipsoid(shape, spacing, half_mm, value=1, dtype=torch.uint8) -> torch.Tensor:
    """An organ in the middle of the volume."""
    axes = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    inside = (x / half_mm[0]) ** 2 + (y / half_mm[1]) ** 2 + (z / half_mm[2]) ** 2 < 1
    return (inside * value).to(dtype)


def tube(radius_mm: float, spacing=ONE) -> torch.Tensor:
    """A bent thin organ, like a pancreas."""
    shape = [round(n / s) for n, s in zip((90, 60, 40), spacing, strict=True)]
    axes = [torch.arange(n) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    bend = 30 + 12 * torch.sin(x / 15)
    inside = (y - bend) ** 2 + (z - 20) ** 2 < radius_mm**2
    return (inside & (x > 8) & (x < 82)).to(torch.uint8)


def one(label, spacing=ONE, seed=0, **kwargs) -> LocalMask | Skip:
    kwargs.setdefault("size_mm", (8, 20))
    return place(label, 1, organ_box(label, 1), spacing, rng=rng(seed), **kwargs)[0]


def full(tumor: LocalMask, shape) -> np.ndarray:
    out = np.zeros(tuple(shape), bool)
    out[tumor.slices] = tumor.mask.numpy()
    return out


def check(tumor: LocalMask, label: torch.Tensor, spacing, lo: float, hi: float) -> None:
    """What every tumour must be."""
    count = int(tumor.mask.sum())
    assert count == tumor.voxels > 0
    assert bool((label[tumor.slices][tumor.mask] == 1).all())
    assert ndimage.label(tumor.mask.numpy(), np.ones((3, 3, 3)))[1] == 1
    for axis in range(3):  # the box is tight
        line = tumor.mask.numpy().any(tuple(a for a in range(3) if a != axis))
        assert line[0] and line[-1]
    volume = count * math.prod(spacing)
    assert tumor.diameter_mm == pytest.approx((6 * volume / math.pi) ** (1 / 3))
    # half a voxel of volume to either side is what a grid allows
    asked = math.pi / 6 * tumor.params.diameter_mm**3
    assert abs(volume - asked) <= max(0.51 * math.prod(spacing), math.prod(spacing) - asked)
    grid = math.prod(spacing) / (math.pi / 6 * lo**3)
    assert lo * (1 - grid) <= tumor.diameter_mm <= hi * (1 + grid)


# --- the organ's box -----------------------------------------------------------------------------


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


# --- one tumour ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [ONE, (0.7, 0.7, 5.0), (3.0, 2.5, 0.5), (0.5, 0.5, 0.5)])
def test_every_tumour_lies_inside_the_organ_and_has_the_volume_asked_for(spacing):
    shape = [round(80 / s) for s in spacing]
    label = ellipsoid(shape, spacing, (35, 32, 30))
    for seed in range(40):
        tumor = one(label, spacing, seed, size_mm=(5, 25))
        assert isinstance(tumor, LocalMask), tumor
        check(tumor, label, spacing, 5, 25)


@pytest.mark.parametrize("radius", [3.0, 5.0, 9.0])
def test_a_thin_organ_gets_a_smaller_tumour_or_a_reason(radius):
    label = tube(radius)
    made = 0
    for seed in range(40):
        tumor = one(label, seed=seed, size_mm=(5, 20), prior="pancreas")
        if isinstance(tumor, Skip):
            assert "no room for a tumour of 5 mm or more" in tumor.reason
        else:
            made += 1
            check(tumor, label, ONE, 5, 20)
    assert made >= 36


def test_what_does_not_fit_is_a_skip_that_says_what_would():
    tumor = one(tube(3.0), size_mm=(18, 20))
    assert isinstance(tumor, Skip)
    found = re.fullmatch(
        r"no room for a tumour of 18 mm or more in the organ; largest that fits: (.*) mm",
        tumor.reason,
    )
    assert found and 6 < float(found[1]) < 18
    label = torch.zeros(9, 9, 9, dtype=torch.int16)
    label[4, 4, 4] = 1
    assert isinstance(one(label, size_mm=(5, 20)), Skip)
    assert isinstance(one(label, size_mm=1.0), LocalMask)


def test_no_organ_is_a_skip():
    label = torch.zeros(9, 9, 9)
    (result,) = place(label, (1, 3), organ_box(label, (1, 3)), ONE, size_mm=5, rng=rng())
    assert isinstance(result, Skip)
    assert "[1, 3]" in result.reason


def test_a_hollow_organ_gets_no_sickle():
    label = ellipsoid((70, 70, 70), ONE, (30, 30, 30)) - ellipsoid((70, 70, 70), ONE, (24, 24, 24))
    for seed in range(30):
        tumor = one(label, seed=seed, size_mm=(6, 30))
        if isinstance(tumor, LocalMask):
            middle = tumor.mask.nonzero().double().mean(0).round().long().tolist()
            assert bool(tumor.mask[tuple(middle)])


def test_no_slivers_where_the_organ_cuts_a_tumour():
    """A bowl of 9 mm: most centres would leave a strip or a disc."""
    label = ellipsoid((80, 80, 60), ONE, (36, 36, 26))
    label[:, :, 26:] = 0
    label &= ~(ellipsoid((80, 80, 60), ONE, (27, 27, 17)).bool()).to(torch.uint8)
    found = [one(label, seed=seed, size_mm=(8, 16)) for seed in range(60)]
    made = [t for t in found if isinstance(t, LocalMask)]
    assert len(made) > 40
    for tumor in made:
        drawn = tumor.params.axes[2] / tumor.params.axes[0]
        assert masks.flatness(tumor.mask, ONE) >= min(masks.MIN_FLATNESS, 0.7 * drawn)


def test_flatness_is_in_mm():
    box = torch.ones(12, 12, 3, dtype=torch.bool)
    assert masks.flatness(box, ONE) == pytest.approx(3 / 12)
    assert masks.flatness(box, (1.0, 1.0, 4.0)) == pytest.approx(1.0)
    assert masks.flatness(torch.ones(1, 1, 1, dtype=torch.bool), (1.0, 2.0, 4.0)) == 0.25


def test_a_round_smooth_tumour_is_a_ball_in_mm_whatever_the_voxels():
    spacing = (0.5, 1.0, 2.0)
    label = torch.ones(100, 50, 25, dtype=torch.uint8)
    params = TumorParams((50, 25, 12), 20.0, ONE, (1.0, 0.0, 0.0, 0.0), 0.0, 5, 0, 1.0, 20.0)
    tumor = draw(params, label, 1, spacing)
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
    tumor = draw(params, label, 1, ONE)  # a quarter turn about z: the long axis along y
    assert isinstance(tumor, LocalMask)
    x, y, z = tumor.mask.shape
    assert (y, x, z) == pytest.approx((32, 16, 8), abs=2)


def test_large_tumours():
    label = ellipsoid((150, 150, 130), ONE, (72, 70, 62))
    for size in (50.0, 90.0):
        tumor = one(label, size_mm=size)
        assert isinstance(tumor, LocalMask)
        check(tumor, label, ONE, size, size)


def test_tumours_touch_the_capsule_as_often_as_the_prior_says():
    label = ellipsoid((96, 96, 96), ONE, (45, 42, 40))
    outside = label.numpy() == 0
    edge = ndimage.binary_dilation(outside, np.ones((3, 3, 3)))
    for size, expected in ((7.0, 0.26), (30.0, 0.79)):
        touching = 0
        for seed in range(80):
            tumor = one(label, seed=seed, size_mm=size)
            assert isinstance(tumor, LocalMask)
            touching += bool((edge & full(tumor, label.shape)).any())
        assert touching / 80 == pytest.approx(expected, abs=0.15)


# --- several tumours -----------------------------------------------------------------------------


def test_tumours_keep_their_distance():
    spacing = (1.0, 1.5, 2.0)
    label = ellipsoid((70, 50, 36), spacing, (33, 33, 33))
    results = place(
        label, 1, organ_box(label, 1), spacing, size_mm=(6, 14), count=6, gap_mm=3.0, rng=rng(2)
    )
    tumors = [r for r in results if isinstance(r, LocalMask)]
    assert len(tumors) >= 4
    for i, tumor in enumerate(tumors):
        check(tumor, label, spacing, 6, 14)
        distance = ndimage.distance_transform_edt(~full(tumor, label.shape), sampling=spacing)
        for other in tumors[i + 1 :]:
            assert distance[full(other, label.shape)].min() > 3.0


def test_those_that_do_not_fit_are_skips_and_merging_makes_room():
    label = ellipsoid((40, 40, 40), ONE, (14, 14, 14))
    box = organ_box(label, 1)
    apart = place(label, 1, box, ONE, size_mm=(12, 14), count=12, rng=rng(1))
    merged = place(label, 1, box, ONE, size_mm=(12, 14), count=12, rng=rng(1), merge=True)
    assert len(apart) == len(merged) == 12
    skips = [r for r in apart if isinstance(r, Skip)]
    assert 0 < len(skips) < 12
    assert all("no room" in s.reason for s in skips)
    assert all(isinstance(r, LocalMask) for r in merged)


def test_count_is_drawn_inclusively():
    label = torch.zeros(4, 4, 4)
    counts = {
        len(place(label, 1, None, ONE, size_mm=5, count=(1, 3), rng=rng(s))) for s in range(40)
    }
    assert counts == {1, 2, 3}
    assert place(label, 1, None, ONE, size_mm=5, count=0, rng=rng()) == []


def test_forbidden_voxels_stay_free():
    label = ellipsoid((60, 60, 60), ONE, (28, 28, 28))
    forbid = torch.zeros(60, 60, 60, dtype=torch.bool)
    forbid[:, :, 30:] = True
    for seed in range(20):
        tumor = one(label, seed=seed, forbid=forbid)
        assert isinstance(tumor, LocalMask)
        assert not bool(forbid[tumor.slices][tumor.mask].any())
    assert "no room" in one(label, forbid=torch.ones_like(forbid)).reason


# --- the same again ------------------------------------------------------------------------------


def test_params_replay_through_json():
    spacing = (0.8, 0.8, 2.5)
    label = tube(9.0, spacing)
    results = place(label, 1, organ_box(label, 1), spacing, size_mm=(5, 15), count=4, rng=rng(3))
    done: list[LocalMask] = []
    for result in results:
        if isinstance(result, Skip):
            continue
        params = TumorParams.from_dict(json.loads(json.dumps(result.params.to_dict())))
        assert params == result.params
        again = draw(params, label, 1, spacing, others=done)
        assert isinstance(again, LocalMask)
        assert again.start == result.start
        assert torch.equal(again.mask, result.mask)
        done.append(again)
    assert len(done) >= 2


def test_params_of_another_label_are_refused_or_skipped():
    label = ellipsoid((60, 60, 60), ONE, (28, 28, 28))
    tumor = one(label)
    assert isinstance(draw(tumor.params, torch.zeros_like(label), 1, ONE), Skip)
    with pytest.raises(ValueError, match="outside the label"):
        draw(tumor.params, label[:5], 1, ONE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float32])
def test_the_label_s_type_and_layout_do_not_matter(dtype):
    label = ellipsoid((60, 50, 40), ONE, (25, 22, 18))
    expected = one(label, seed=4)
    got = one(label.to(dtype).permute(2, 1, 0).contiguous().permute(2, 1, 0), seed=4)
    assert got.params == expected.params
    assert torch.equal(got.mask, expected.mask)


def test_a_part_of_a_label_and_one_that_repeats_itself_in_memory_are_as_good_as_a_copy():
    """Voxels are looked up in the label's own memory, of which these have more or less."""
    whole = torch.zeros(70, 64, 58, dtype=torch.int16)
    whole[6:66, 7:57, 9:49] = ellipsoid((60, 50, 40), ONE, (25, 22, 18), dtype=torch.int16)
    part = whole[6:66, 7:57, 9:49]
    bar = ellipsoid((60, 50, 1), ONE, (25, 22, 1)).expand(60, 50, 40)
    for label in (part, part[::2, :, ::2], bar, bar.permute(2, 0, 1)):
        assert not label.is_contiguous()
        for seed in range(6):
            given = {"size_mm": (5, 12), "count": 3, "rng": rng(seed)}
            found = place(label, 1, organ_box(label, 1), ONE, **given)
            given["rng"] = rng(seed)
            copied = label.contiguous()
            for a, b in zip(
                found, place(copied, 1, organ_box(copied, 1), ONE, **given), strict=True
            ):
                if isinstance(a, Skip):
                    assert a == b
                else:
                    assert (a.params, a.start) == (b.params, b.start)
                    assert torch.equal(a.mask, b.mask)
                    assert bool((copied[a.slices][a.mask] == 1).all())


def test_the_volume_around_the_organ_does_not_matter():
    label = ellipsoid((60, 60, 60), ONE, (22, 22, 22))
    far = torch.nn.functional.pad(label, (30, 5, 40, 0, 12, 70))
    small, large = one(label, seed=6), one(far, seed=6)
    assert [b - a for a, b in zip(small.start, large.start, strict=True)] == [12, 40, 30]
    assert torch.equal(small.mask, large.mask)


def test_only_the_given_generator_is_used():
    label = ellipsoid((40, 40, 40), ONE, (18, 18, 18))
    before = torch.random.get_rng_state()
    first, again, other = one(label, seed=1), one(label, seed=1), one(label, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.params == again.params != other.params


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same():
    label = tube(9.0)
    box = organ_box(label, 1)
    kwargs = {"size_mm": (5, 15), "count": 4}
    here = place(label, 1, box, ONE, rng=rng(3), **kwargs)
    there = place(label.cuda(), 1, organ_box(label.cuda(), 1), ONE, rng=rng(3), **kwargs)
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
        ({"forbid": torch.zeros(3, 3, 3, dtype=torch.bool)}, "forbid must be bool"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "label": torch.ones(8, 8, 8),
        "organ_labels": 1,
        "box": Box((0, 0, 0), (8, 8, 8)),
        "spacing": ONE,
        "size_mm": 4,
        "rng": rng(),
    }
    given.update(change)
    with pytest.raises(ValueError, match=message):
        place(**given)


# --- real organs and time ------------------------------------------------------------------------


def test_real_organs(shared: Path):
    nibabel = pytest.importorskip("nibabel")
    files = sorted((shared / "data" / "organ_masks").glob("*.nii.gz"))
    assert len(files) == 12
    for file in files:
        image = nibabel.load(file)
        label = torch.from_numpy(np.ascontiguousarray(np.asanyarray(image.dataobj)))
        spacing = tuple(float(s) for s in image.header.get_zooms())
        box = organ_box(label, 1)
        for seed in range(10):
            (result,) = place(label, 1, box, spacing, size_mm=(5, 20), rng=rng(seed))
            if isinstance(result, LocalMask):
                check(result, label, spacing, 5, 20)
            else:
                assert result.reason


def test_a_tumour_takes_milliseconds_in_a_volume_of_any_size():
    """In CPU time; tests/test_placing_cost.py counts what it does, which no machine alters."""
    part = ellipsoid((96, 96, 96), ONE, (45, 42, 40))
    whole = torch.zeros(256, 256, 256, dtype=torch.uint8)
    whole[:96, :96, :96] = part
    boxes = [organ_box(label, 1) for label in (part, whole)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[int, list[float]] = {96: [], 256: []}
    try:
        for seed in range(30):
            for label, box in zip((part, whole), boxes, strict=True):
                start = time.process_time()
                place(label, 1, box, ONE, size_mm=(8, 20), rng=rng(seed))
                times[len(label)].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    # The quickest third: other work on the machine slows the rest.
    small, large = (sorted(spent)[10] for spent in times.values())
    assert large < 2 * small and large < 0.06, (small, large)


def test_a_prior_s_tumour_takes_a_quarter_of_one_of_two_organs_at_most():
    """Two kidneys of 52 ml in a coarse scan, one label: the prior alone would draw up to 150 mm."""
    spacing = (3.0, 3.0, 5.0)
    one = ellipsoid((20, 20, 20), spacing, (20, 20, 31))
    label = torch.cat([one, torch.zeros_like(one), one])
    box, part = organ_box(label, 1), int(one.sum())
    for seed in range(12):
        (found,) = place(label, 1, box, spacing, size_mm="kidney", rng=rng(seed))
        assert isinstance(found, LocalMask), found
        assert found.voxels <= 1.1 * masks.MAX_ORGAN_SHARE * part
    (asked,) = place(label, 1, box, spacing, size_mm=38.0, rng=rng(0))
    assert isinstance(asked, Skip) or asked.voxels > masks.MAX_ORGAN_SHARE * part  # as asked


def test_attempts_are_bounded(monkeypatch):
    calls = []
    monkeypatch.setattr(masks, "voxels", lambda *a: calls.append(a) or 3)
    label = ellipsoid((60, 60, 60), ONE, (28, 28, 28))
    assert isinstance(one(label), Skip)
    assert len(calls) == masks.TRIES_PER_SIZE * masks.SIZE_STEPS


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_organ_box_is_the_same_in_every_memory_layout(order):
    """NIfTI arrays come with their axes in the reverse order of memory."""
    label = torch.zeros(7, 11, 13, dtype=torch.int16)
    label[2:4, 5:9, 1:12] = 3
    label[1, 6, 6] = 3
    laid = label.permute(order).contiguous().permute([order.index(a) for a in range(3)])
    assert torch.equal(laid, label)
    box = masks.organ_box(laid, 3)
    assert (box.start, box.stop) == ((1, 5, 1), (4, 9, 12))
    assert masks.organ_box(laid[:, :, :1], 3) is None


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.uint8, 257), (torch.uint8, -255), (torch.float16, 2049), (torch.bool, 2)],
)
def test_a_value_that_the_dtype_cannot_hold_is_nowhere(dtype, value):
    """torch compares with what it wraps or rounds to: 1 and 2048."""
    label = torch.tensor([0, 1, 2048]).to(dtype).view(3, 1, 1)
    assert organ_box(label, value) is None
    assert organ_box(label, (value, 1)) is not None


@pytest.mark.parametrize("gap", [0.0, 1.0, 2.5, 4.0, 7.0, 100.0])
def test_a_dilation_reaches_as_far_as_the_gap(gap):
    mask = torch.zeros(23, 1, 9, dtype=torch.bool)
    mask[5, 0, 4] = True
    grown = masks.dilate(mask, gap, (1.0, 1.0, 0.5)).nonzero()
    x, z = max(1, math.ceil(gap)), max(1, math.ceil(2 * gap))
    assert (grown[:, 0].min(), grown[:, 0].max()) == (max(0, 5 - x), min(22, 5 + x))
    assert (grown[:, 2].min(), grown[:, 2].max()) == (max(0, 4 - z), min(8, 4 + z))
    assert len(grown) == (min(22, 5 + x) - max(0, 5 - x) + 1) * (min(8, 4 + z) - max(0, 4 - z) + 1)


def test_a_grown_box_stays_in_the_volume_and_reaches_far_enough():
    box = masks.Box((1, 5, 1), (4, 9, 12))
    assert box.grown(2.0, (1.0, 4.0, 0.5)) == (slice(0, 7), slice(3, 11), slice(0, 17))


def test_voxels_longer_than_the_tumour_by_far():
    """No voxel's middle may lie near the shape: no room, or a tumour, and no error of torch's."""
    label = torch.ones(1, 12, 9, dtype=torch.uint8)
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        spacing = (0.01, 17.0, 0.01)
        box = masks.organ_box(label, 1)
        for made in masks.place(label, 1, box, spacing, size_mm=(2, 6), count=2, rng=rng):
            assert isinstance(made, masks.Skip) or made.voxels >= 1


@pytest.mark.parametrize("level", [0.6, 1.0, 1.2, MAX_LEVEL])
def test_places_are_judged_all_around(level):
    inside = BALL_LEVEL <= level
    points = (BALL * BALL_LEVEL[:, None])[inside] / level
    assert float(points.mean(0).norm()) < 0.06
    assert (points.square().mean(0) - 0.2).abs().max() < 0.03  # of a full ball: a fifth each
    share = float(inside.double().mean()) * (MAX_LEVEL / level) ** 3
    assert share == pytest.approx(1, abs=0.06)
