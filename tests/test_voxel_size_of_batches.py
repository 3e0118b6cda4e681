"""Voxel sizes of batches that torch collated: one affine for all, and spacings axis by axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ways import SETTINGS, SHAPE, TWO_MM, Core, Lightning, MonaiDict, diameter, scan, warnings_of

from tumorsynth.pipeline.frames import find_frames

THREE_MM = np.diag([3.0, 3, 3, 1])


class StackedMonai(MonaiDict):
    """Takes a batch that is collated already."""

    kind = "BatchSynthesizeTumord"


class StackedLightning(Lightning):
    def __call__(self, image, label):
        batch = {"image": image, "label": label}
        self.callback.on_train_batch_start(self.Trainer(), None, batch, 0)
        return batch["label"]


STACKED = [Core, StackedMonai, StackedLightning]


def stacked(*affines):
    parts = [scan("meta", affine) for affine in affines]
    return [torch.stack(part) for part in zip(*parts, strict=True)]


def diameters(labels, voxels_mm3):
    return [diameter(one, mm3) for one, mm3 in zip(labels, voxels_mm3, strict=True)]


@pytest.mark.parametrize("kind", STACKED)
def test_torch_stack_keeps_one_affine_which_gives_one_warning(kind):
    batch = stacked(TWO_MM, THREE_MM)
    transform = kind()
    said = warnings_of(lambda: [transform(*batch) for _ in range(2)])
    assert len(said) == 1
    assert "'image' has 2 samples and one affine" in said[0] and "taken as 2 mm in all" in said[0]
    assert "list_data_collate" in said[0]
    assert not warnings_of(lambda: kind()(*stacked(TWO_MM)))
    assert len(warnings_of(lambda: kind()(*stacked(np.eye(4), TWO_MM)))) == 1


@pytest.mark.parametrize("kind", STACKED)
def test_a_spacing_of_each_sample_is_taken_for_a_stacked_batch(kind):
    batch, made = stacked(TWO_MM, THREE_MM), []
    told = kind(spacing=[[2, 2, 2], [3, 3, 3]])
    assert not warnings_of(lambda: made.append(told(*batch)))
    assert diameters(made[0], [8, 27]) == pytest.approx([12, 12], rel=0.08)
    with pytest.raises(ValueError, match="3 x 3 x 3 mm and that affine of 2 x 2 x 2 mm"):
        kind(spacing=3.0)(*batch)


@pytest.mark.parametrize("kind", STACKED)
def test_a_stacked_batch_that_monai_resampled_has_one_size(kind):
    transforms = pytest.importorskip("monai.transforms", reason="needs MONAI")
    data = pytest.importorskip("monai.data")
    resample = transforms.Spacingd(
        ["image", "label"], (2.5, 2.5, 2.5), mode=("bilinear", "nearest")
    )
    crop = transforms.CenterSpatialCropd(["image", "label"], (32, 32, 32))
    parts = [
        dict(zip(("image", "label"), scan("meta", a), strict=True)) for a in (TWO_MM, THREE_MM)
    ]
    parts = [crop(resample(part)) for part in parts]
    batch = [torch.stack([part[name] for part in parts]) for name in ("image", "label")]
    assert not warnings_of(lambda: kind()(*batch))
    batch = data.list_data_collate([{"image": a, "label": b} for a, b in zip(*batch, strict=True)])
    assert not warnings_of(lambda: kind()(batch["image"], batch["label"]))


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("name", ["flip", "rotate", "pad", "zoom", "resize", "affine"])
def test_what_changes_sizes_after_the_resampling_differs_by_sample(kind, name):
    transforms = pytest.importorskip("monai.transforms", reason="needs MONAI")
    keys, nearest = ["image", "label"], ["nearest"] * 2
    change = {
        "flip": lambda: transforms.Flipd(keys, 0),
        "rotate": lambda: transforms.RandRotated(keys, 0.2, prob=1, mode=nearest),
        "pad": lambda: transforms.SpatialPadd(keys, (70, 70, 70), mode="edge"),
        "zoom": lambda: transforms.RandZoomd(keys, 1.0, 1.1, 1.3, mode=nearest),
        "resize": lambda: transforms.Resized(keys, (40, 40, 40), mode=nearest),
        "affine": lambda: transforms.RandAffined(
            keys, prob=1, scale_range=((0.2, 0.3),) * 3, mode=nearest
        ),
    }[name]()
    chain = [transforms.Spacingd(keys, (2.5, 2.5, 2.5), mode=nearest), change]
    chain.append(transforms.ResizeWithPadOrCropd(keys, (40, 40, 40), mode="edge"))
    parts = [dict(zip(keys, scan("meta", affine), strict=True)) for affine in (TWO_MM, THREE_MM)]
    parts = [transforms.Compose(chain)(part) for part in parts]
    batch = [torch.stack([part[key] for part in parts]) for key in keys]
    resized = name in ("zoom", "resize", "affine")
    assert len(warnings_of(lambda: kind()(*batch))) == resized


SIZES = [(2.0, 2.0, 2.0), (3.0, 3.0, 3.0), (2.0, 2.0, 4.0), (1.5, 2.0, 3.0)]
COLLATED = {
    "tuples": lambda sizes: torch.utils.data.default_collate(sizes),
    "lists": lambda sizes: torch.utils.data.default_collate([list(one) for one in sizes]),
    "numpy's tuples": lambda sizes: torch.utils.data.default_collate(
        [tuple(np.float32(one)) for one in sizes]
    ),
    "arrays": lambda sizes: torch.utils.data.default_collate([np.array(one) for one in sizes]),
    "tensors": lambda sizes: torch.utils.data.default_collate([torch.tensor(s) for s in sizes]),
    "no collating": list,
    "a list of tensors": lambda sizes: [torch.tensor(one) for one in sizes],
    "a tuple of arrays": lambda sizes: tuple(np.array(one, np.float32) for one in sizes),
    "arrays by axis": lambda sizes: [np.array(one) for one in zip(*sizes, strict=True)],
    "reversed arrays by axis": lambda sizes: [
        np.array(one[::-1])[::-1] for one in zip(*sizes, strict=True)
    ],
    "isotropic": lambda sizes: torch.tensor(sizes)[:, :1],
}
VECTORS = (list, tuple)  # of tensors or arrays


class KeyedLightning(Lightning):
    """The spacing is an entry of the batch."""

    def __init__(self, spacing):
        module = pytest.importorskip("tumorsynth.lightning", reason="needs Lightning")
        self.callback = module.TumorSynthCallback(spacing="spacing", seed=0, **SETTINGS)
        self.spacing = spacing

    def __call__(self, image, label):
        batch = {"image": image, "label": label, "spacing": self.spacing}
        self.callback.on_train_batch_start(self.Trainer(), None, batch, 0)
        return batch["label"]


def batch_of(count):
    return [torch.stack([x] * count) for x in scan()]


def sizes_taken(spacing, count):
    frames, _ = find_frames(SHAPE[1:], count, [], spacing=spacing)
    return [frame.spacing for frame in frames]


@pytest.mark.parametrize("form", COLLATED)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_sample_has_its_own_size_or_the_spacing_is_refused(form, count):
    sizes = [(size[0],) * 3 for size in SIZES] if form == "isotropic" else SIZES
    spacing = COLLATED[form](sizes[:count])
    vectors = isinstance(spacing, VECTORS) and not isinstance(spacing[0], VECTORS)
    if count == 3 and vectors:  # by sample or by axis?
        with pytest.raises(ValueError, match=r"batch of three .* got .*(tensor|array)"):
            sizes_taken(spacing, count)
    else:
        assert sizes_taken(spacing, count) == sizes[:count]


@pytest.mark.parametrize("kind", [Core, KeyedLightning])
@pytest.mark.parametrize("form", ["tuples", "a list of tensors"])
def test_lists_of_tensors_in_a_call(kind, form):
    made = kind(spacing=COLLATED[form](SIZES[1:3]))(*batch_of(2))
    assert diameters(made, [27, 16]) == pytest.approx([12, 12], rel=0.08)
    with pytest.raises(ValueError, match="batch of three"):
        kind(spacing=COLLATED[form](SIZES[:3]))(*batch_of(3))


def test_a_list_that_means_the_same_by_sample_and_by_axis_is_taken():
    for same in ([(2, 2, 3), (2, 2, 3), (3, 3, 4)], [(2, 2, 2)] * 3):
        assert sizes_taken([torch.tensor(one) for one in same], 3) == same


def test_what_a_refused_list_is_told_to_become_is_taken():
    by_axis = [torch.tensor(one) for one in zip(*SIZES[1:], strict=True)]
    for told in (torch.stack([torch.tensor(one) for one in SIZES[1:]]), torch.stack(by_axis, 1)):
        assert sizes_taken(told, 3) == SIZES[1:]


def test_one_size_a_sample_is_no_spacing_of_a_batch_of_three():
    """As default_collate makes of isotropic sizes: no (dx, dy, dz)."""
    sizes = torch.utils.data.default_collate([2.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"three numbers for three samples .* got tensor"):
        KeyedLightning(sizes)(*batch_of(3))
    for told, count in ((torch.full((3,), 2.0), 3), (torch.tensor([2.0, 2.0, 3.0]), 2)):
        made = KeyedLightning(told)(*batch_of(count))
        assert diameters(made, [float(told.prod())] * count) == pytest.approx(
            [12] * count, rel=0.08
        )


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.ones(2)] * 2,
        [torch.ones(3)] * 4,
        [torch.ones(2, 1)] * 3,
        [torch.ones(2), [1.0, 1.0], [1.0, 1.0]],
        [torch.ones(2, dtype=torch.bool)] * 3,
        [torch.ones(2, dtype=torch.complex64)] * 3,
    ],
)
def test_other_lists_of_tensors_are_no_spacing(wrong):
    with pytest.raises(ValueError, match=r"spacing must be \(dx, dy, dz\) in mm or \(B, 3\)"):
        sizes_taken(wrong, 2)
