"""Thick slices: contrast is averaged over them, noise is not, and results still repeat."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tumorsynth as ts
from tumorsynth.fetching import run_alone
from tumorsynth.geometry import frame_from_affine
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.finish import paint_and_finish
from tumorsynth.pipeline.place_batch import PlacedSample
from tumorsynth.pipeline.records import Sample, SampleParams, TumorId
from tumorsynth.pipeline.requests import request_painting
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place, place_from_params
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import TumorParams

NOISE_HU = 12.0


class Darker:
    """Darkens everything by 40 HU; the feather limits it to the tumour."""

    name, window, crop_size, crop_multiple = "darker", (-175.0, 250.0), 64, 1
    own_edge, even, keeps_detail = False, False, True
    device, card = torch.device("cpu"), {"name": "darker"}

    def to(self, device):
        self.device = torch.device(device)
        return self

    def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return torch.full_like(crop, -40 / 425)

    def inpaint(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return crop + tumor_mask * self.change(crop, tumor_mask, seed)


def scan(spacing, side_mm=64.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy organ of 100 HU that fills the volume."""
    shape = [max(4, round(side_mm / s)) for s in spacing]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return (100 + NOISE_HU * noise)[None], torch.ones(1, *shape, dtype=torch.int16)


def synth(generator="hu2023", **kwargs) -> ts.SynthesizeTumor:
    return ts.SynthesizeTumor(generator, **{"count": 1, "sigma_mm": 0.0, **kwargs})


def test_a_tumour_s_total_change_does_not_depend_on_the_slices():
    totals = {}
    for z in (1.0, 2.5, 5.0, 8.0):
        spacing = (0.8, 0.8, z)
        image, label = scan(spacing)
        found = []
        for seed in range(6):
            transform = synth(Darker(), size_mm=10)
            made, _ = transform(image, label, spacing=spacing, seed=seed)
            record = transform.report[0]
            assert record["true_volume_mm3"] == pytest.approx(math.pi / 6 * 1000, rel=0.02)
            assert record["true_diameter_mm"] == pytest.approx(10, rel=0.01)
            found.append(float((made - image).sum()) * math.prod(spacing) / -40)
        totals[z] = np.mean(found) / (math.pi / 6 * 1000)
    assert all(total == pytest.approx(totals[1.0], abs=0.06) for total in totals.values()), totals


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 5.0), (0.8, 0.8, 8.0), (8.0, 0.8, 0.8)])
@pytest.mark.parametrize("size_mm", [5, 8, 16])
def test_visible_contrast_is_the_share_of_the_true_one(spacing, size_mm):
    image, label = scan(spacing)
    for seed in range(6):
        transform = synth(Darker(), size_mm=size_mm, contrast_hu=-40)  # none is too faint
        made, made_label = transform(image, label, spacing=spacing, seed=seed)
        record = transform.report[0]
        change = (made - image)[made_label == 2]
        assert record["hu_change"] == pytest.approx(float(change.mean()), abs=0.01)
        assert record["visible_contrast_hu"] == pytest.approx(record["hu_change"], abs=0.01)
        samples = transform.params[0]["tumors"]
        region = OrganRegion.of_label(label[0], 1)
        (tumor,) = [
            place_from_params(TumorParams.from_dict(one), region, spacing) for one in samples
        ]
        # the feather lowers the true contrast at the outline, and lends some to voxels around
        expected = record["true_contrast_hu"] * tumor.mean_share
        assert record["visible_contrast_hu"] == pytest.approx(
            expected, rel=0.3 if size_mm == 5 else 0.2
        )
        assert -40.5 < record["true_contrast_hu"] < -25


def test_fine_voxels_show_all_of_the_contrast():
    image, label = scan((1.0, 1.0, 1.0))
    transform = synth(Darker(), size_mm=9)
    transform(image, label, spacing=1.0, seed=0)
    record = transform.report[0]
    assert record["true_contrast_hu"] == record["visible_contrast_hu"]
    assert record["true_diameter_mm"] == record["diameter_mm"]
    assert record["true_volume_mm3"] == record["volume_mm3"]


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
@pytest.mark.parametrize("blend", ["change", "difftumor"])
def test_noise_in_tumours_is_as_in_thin_slices(generator, blend):
    """Averaging over slices would lower what is drawn at 1 mm, and leave a smooth tumour."""
    thin, thick = noise_ratio(generator, blend, 1.0), noise_ratio(generator, blend, 5.0)
    assert 0.7 < thin < 1.5 and 0.8 * thin < thick < 1.25 * thin


def noise_ratio(generator: str, blend: str, slice_mm: float) -> float:
    """Noise within slices inside a tumour, over that of the organ."""
    spacing = (0.8, 0.8, slice_mm)
    image, label = scan(spacing)
    # smooth within planes, as a reconstruction kernel makes it
    image = 100 + 2.5 * torch.nn.functional.avg_pool3d(image - 100, (3, 3, 1), 1, (1, 1, 0))
    transform = synth(generator, size_mm=24, blend=blend, contrast_hu=-30)
    made, made_label = transform(image, label, spacing=spacing, seed=1)
    outside = (made_label != 2).float()[None]  # without the edge, whose slope is no noise
    core = torch.nn.functional.max_pool3d(outside, (9, 9, 1), 1, (4, 4, 0))[0, 0] == 0
    organ = made_label[0] != 2
    steps = made[0, 1:] - made[0, :-1]
    inside, around = (steps[part[1:] & part[:-1]].std() for part in (core, organ))
    return float(inside / around)


@pytest.mark.parametrize("kwargs", [
    {},
    {"generator": "liver-early", "count": 1},
    {"generator": "liver-early", "blend": "difftumor", "count": 1},
    {"mass_effect": 0.5},
    {"gate": True},
    {"contrast_hu": "liver-portal", "size_mm": (8, 14)},
], ids=["hu2023", "network", "difftumor", "mass effect", "gate", "prior"])  # fmt: skip
def test_replays_and_batches_are_bit_identical(kwargs):
    spacing = (0.8, 0.8, 5.0)
    image, label = scan(spacing)
    transform = synth(**{"size_mm": (6, 12), "count": 2, **kwargs})
    alone, alone_label = transform(image, label, spacing=spacing, seed=4)
    params = json.loads(json.dumps(transform.params))
    again, again_label = transform(image, label, spacing=spacing, params=params)
    assert torch.equal(again, alone) and torch.equal(again_label, alone_label)
    pair = torch.stack([image, image + 3]), torch.stack([label, label])
    made, made_label = transform(*pair, spacing=spacing, seed=[4, 9])
    assert torch.equal(made[0], alone) and torch.equal(made_label[0], alone_label)


def test_params_of_earlier_versions_still_replay():
    """They hold no word of subvoxels; the same shape is drawn by today's rule."""
    spacing = (0.8, 0.8, 8.0)
    image, label = scan(spacing)
    old = {
        "seed": 0, "applied": True, "tumors": [{
            "centre": [40, 40, 4], "diameter_mm": 5.0, "axes": [1.0, 1.0, 1.0],
            "rotation": [1.0, 0.0, 0.0, 0.0], "roughness": 0.0, "shape_seed": 3, "seed": 5,
            "sigma_mm": 0.8, "drawn_mm": 5.0, "contrast_hu": -40.0,
        }],
    }  # fmt: skip
    transform = synth()
    _, made_label = transform(image, label, spacing=spacing, params=[old])
    assert transform.report[0]["applied"]
    assert transform.report[0]["true_diameter_mm"] == pytest.approx(5, rel=0.02)
    assert (made_label == 2).any()


def test_the_array_s_orientation_does_not_matter():
    """One tumour of a thick-sliced scan, in all 48 orientations of the array: painted alike."""
    spacing = (0.8, 1.2, 5.0)
    image, label = scan(spacing)
    transform = synth(size_mm=9)
    generator = transform.handle.get("cpu")
    region, rng = OrganRegion.of_label(label[0], 1), torch.Generator().manual_seed(1)
    (tumor,) = place(region, spacing, PlacementSettings(size_mm=9), rng)
    whole = torch.zeros(label.shape[1:], dtype=torch.bool)
    whole[tumor.slices] = tumor.mask
    fine = torch.zeros(
        [n * k for n, k in zip(whole.shape, tumor.factors, strict=True)], dtype=torch.bool
    )
    fine[tumor.fine_box.slices] = tumor.fine_mask

    def turned(x, axes, flips):
        return x.permute(axes).flip([i for i in range(3) if flips[i]])

    def paint(axes, flips):
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for i, (a, flip) in enumerate(zip(axes, flips, strict=True)):
            affine[a, i] = -spacing[a] if flip else spacing[a]
        factors = tuple(tumor.factors[a] for a in axes)
        share = turned(fine, axes, flips)
        index = share.nonzero()
        start = [int(v) // k for v, k in zip(index.amin(0), factors, strict=True)]
        stop = [int(v) // k + 1 for v, k in zip(index.amax(0), factors, strict=True)]
        part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        fine_part = tuple(slice(a * k, b * k) for a, b, k in zip(start, stop, factors, strict=True))
        local = replace(
            tumor, start=tuple(start), mask=turned(whole, axes, flips)[part],
            factors=factors, subvoxels=share[fine_part],
        )  # fmt: skip
        frame = frame_from_affine(affine)
        new_image = turned(image[0], axes, flips).clone()
        new_label = turned(label[0], axes, flips).clone()
        sample = Sample(0, new_image, new_label, frame)
        request = run_alone(
            request_painting(transform.settings, generator, TumorId(0, 0, 0), sample, local)
        )
        call = Call(transform.settings, generator, transform.painter)
        placed = [PlacedSample(SampleParams(0), [], {})]
        paint_and_finish(call, [request], [sample], placed)
        back = [axes.index(a) for a in range(3)]
        flip = [i for i in range(3) if flips[i]]
        return new_image.flip(flip).permute(back), new_label.flip(flip).permute(back)

    expected = paint((0, 1, 2), (False,) * 3)
    assert not torch.equal(expected[0], image[0])
    change = expected[0] - image[0]
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            made, made_label = paint(axes, flips)
            assert torch.equal(made_label, expected[1])
            # flips move the crop's points, which start at a voxel, within the tissue
            assert float((made - image[0] - change).abs().max()) < 12
            assert float((made - image[0]).sum() / change.sum()) == pytest.approx(1, abs=0.1)
