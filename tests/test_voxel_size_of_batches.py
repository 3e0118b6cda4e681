"""Voxel sizes of batches that torch collated: one affine for all, and spacings axis by axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ways import SETTINGS, TWO_MM, Core, Lightning, MonaiDict, diameter, scan, warnings_of

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


@pytest.mark.parametrize("kind", [Core, StackedLightning])
@pytest.mark.parametrize("sizes", [[(2.0, 2.0, 2.0), (3.0, 3.0, 3.0)], [(2, 2, 4), (3, 3, 3)]])
def test_spacings_as_default_collate_leaves_tuples(kind, sizes):
    """Three tensors (B,), one for each axis."""
    collated = torch.utils.data.default_collate([{"spacing": one} for one in sizes])["spacing"]
    assert isinstance(collated, list) and len(collated) == 3
    image, label = (torch.stack([x] * 2) for x in scan())
    if kind is Core:
        made = Core(spacing=collated)(image, label)
    else:
        callback = pytest.importorskip("tumorsynth.lightning", reason="needs Lightning")
        callback = callback.TumorSynthCallback(spacing="spacing", seed=0, **SETTINGS)
        batch = {"image": image, "label": label, "spacing": collated}
        callback.on_train_batch_start(Lightning.Trainer(), None, batch, 0)
        made = batch["label"]
    volumes = [float(np.prod(one)) for one in sizes]
    assert diameters(made, volumes) == pytest.approx([12, 12], rel=0.08)


@pytest.mark.parametrize(
    "wrong", [[torch.ones(2)] * 2, [torch.ones(3)] * 3, [torch.ones(2, 1)] * 3]
)
def test_other_lists_of_tensors_are_no_spacing(wrong):
    image, label = (torch.stack([x] * 2) for x in scan())
    with pytest.raises(ValueError, match=r"spacing must be \(dx, dy, dz\) in mm or \(B, 3\)"):
        Core(spacing=wrong)(image, label)
