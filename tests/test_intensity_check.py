"""Images that are not in HU are refused by name; whatever can be HU passes, everywhere."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.commands.main import main
from tumorsynth.intensity_check import (
    MAX_SAMPLED,
    find_fault,
    sample_organ,
    sample_voxels,
)
from tumorsynth.intensity_check.check import check_intensity, scale_problem

SETTINGS = {"generator": "hu2023", "organ_labels": 1, "tumor_label": 20, "count": 1, "size_mm": 15}
SHAPE = (48, 48, 48)
RANGES = [(-1, 1), (0, 1), (0, 100), (0, 255)]  # of scaled images
SPACING = (3.0, 3.0, 4.0)


def windowed(hu, low, high, to_low, to_high):
    return (hu.clip(low, high) - low) / (high - low) * (to_high - to_low) + to_low


WRONG = {
    "HU/10": lambda hu: hu / 10,
    "HU/100": lambda hu: hu / 100,
    "HU/1000": lambda hu: hu / 1000,
    "0-255": lambda hu: windowed(hu, -160, 240, 0, 255).floor(),
    "0-255 ": lambda hu: windowed(hu, -175, 250, 0, 255),
    "0-255  ": lambda hu: windowed(hu, -1000, 1000, 0, 255).floor(),
    "[0, 1]": lambda hu: windowed(hu, -175, 250, 0, 1),
    "[-1, 1]": lambda hu: windowed(hu, -175, 250, -1, 1),
    "z-scores": lambda hu: (hu - hu.mean()) / hu.std(),
    "z-scores ": lambda hu: (hu.clip(-160, 240) - 100) / 40,
    "HU+1024": lambda hu: hu + 1024,
    "HU+1024 ": lambda hu: hu.clip(-1000) + 1000,
    "HU+32768": lambda hu: hu + 32768,
    "unsigned": lambda hu: torch.where(hu < -0.5, hu.round() + 65536, hu.round()),
    "sign": lambda hu: -hu,
    "sign ": lambda hu: -hu.clip(-1000, 1000),
    "no CT": lambda hu: torch.where(hu < -900, 10.0, (hu.clip(-150, 300) + 150) * 2),
}
WRONG_WHOLE = {  # that a whole scan shows, and a crop only where it has air or fat
    "HU/2": lambda hu: hu / 2,
    "HU x 2": lambda hu: hu * 2,
    "HU-1024": lambda hu: hu - 1024,
    "0 to 100": lambda hu: windowed(hu, -160, 240, 0, 100),
    "0 to 1000": lambda hu: windowed(hu, -160, 240, 0, 1000),
    "-128 to 127": lambda hu: windowed(hu, -160, 240, 0, 255).floor() - 128,
    "scaled": lambda hu: (hu + 160) / 400 * 255,
    "scaled ": lambda hu: hu + 100,
    "scaled  ": lambda hu: hu.clip(-1024) + 100,
    "scaled   ": lambda hu: hu / 3,
    "0-255": lambda hu: (hu + 1024) / 3072 * 255,
    "0-255 ": lambda hu: windowed(hu, -1000, 400, 0, 255).floor(),
}
SHOWN_IN_ORGAN = {  # what a crop of the organ and some fat shows; the others are in doubt there
    kind for kind in WRONG if kind.strip() in ("[0, 1]", "[-1, 1]", "z-scores", "HU+32768")
}


@pytest.fixture(scope="module")
def ct():
    return ts.make_phantom(spacing=SPACING, seed=0)


def kind_of(image) -> str | None:
    fault = find_fault(sample_voxels(torch.as_tensor(image, dtype=torch.float32)))
    return None if fault is None else fault.kind


def around_organ(ct, half: int) -> tuple[Tensor, Tensor]:
    """Image and label, (1, X, Y, Z), of the middle of the liver and what is near."""
    middle = (ct.label[0] == 1).nonzero().float().mean(0).round().long().tolist()
    part = (slice(None), *(slice(max(0, m - half), m + half) for m in middle))
    return ct.image[part], ct.label[part]


def with_bright_voxel(image: Tensor, value: float = 3000.0) -> Tensor:
    """One bright voxel in the middle of each of the 8 octants, which the sample may hold or not."""
    image = image.clone()
    x, y, z = ([n // 4, 3 * n // 4] for n in image.shape[-3:])
    for a, b, c in np.array(np.meshgrid(x, y, z)).reshape(3, -1).T.tolist():
        image[..., a, b, c] = value
    return image


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("part", ["whole", "48", "32"])
def test_wrong_scales_are_named_in_the_whole_image_and_in_crops(ct, kind, part):
    hu = ct.image if part == "whole" else around_organ(ct, int(part) // 2)[0]
    image = WRONG[kind](hu)
    found = kind_of(image[0])
    assert found in ({kind.strip()} if part == "whole" else {kind.strip(), None, "no tissue"})
    if kind in SHOWN_IN_ORGAN or part == "48" and kind not in ("no CT",):
        assert found is not None
    assert kind_of(with_bright_voxel(image)[0]) == found
    flat = sample_voxels(image[0])
    assert len(flat) <= MAX_SAMPLED


@pytest.mark.parametrize("kind", WRONG_WHOLE)
def test_scales_that_a_whole_image_shows_are_named(ct, kind):
    image = WRONG_WHOLE[kind](ct.image)
    assert kind_of(image[0]) == kind.strip()
    assert kind_of(with_bright_voxel(image)[0]) == kind.strip()
    synth = ts.SynthesizeTumor(**SETTINGS)
    with pytest.raises(ValueError, match="must be in Hounsfield units") as error:
        synth(image, ct.label, spacing=SPACING, seed=0)
    numbers = re.search(r"(ts\.Scaled\(-4000, 4000, [-\d., ]+\))$", str(error.value))
    if kind.strip() == "scaled":
        hu = eval(numbers[1], {"ts": ts}).to_hu(image)  # estimated
        assert ((hu - ct.image).abs() < 30 + 0.05 * ct.image.abs()).all()


@pytest.mark.parametrize("kind", ["HU/2", "HU x 2", "HU-1024", "HU+1024", "HU/10", "unclipped"])
def test_real_scans_in_a_wrong_scale_are_refused(shared, kind):
    nib = pytest.importorskip("nibabel")
    changes = {**WRONG, **WRONG_WHOLE, "unclipped": WRONG_WHOLE["scaled"]}
    for name in ("totalseg_example", "crlm_1100_lowres", "lung1_003"):
        scan = np.asanyarray(nib.load(shared / f"data/ct/{name}_ct.nii.gz").dataobj)
        image = changes[kind](torch.from_numpy(scan.astype(np.float32)))
        assert kind_of(image) is not None, name


def kind_with_organ(image: Tensor, label: Tensor, organ: int = 1) -> str | None:
    fault = find_fault(sample_voxels(image[0]), lambda: sample_organ(image[0], label[0], (organ,)))
    return None if fault is None else fault.kind


@pytest.mark.parametrize("kind", ["HU/10", "0-255", "0-255 ", "0-255  ", "no CT"])
@pytest.mark.parametrize("half", [16, 20, 24])
def test_the_organ_shows_the_scale_of_a_crop(ct, kind, half):
    hu, label = around_organ(ct, half)
    if (kind, half) == ("no CT", 16):
        pytest.skip("nothing dark in the crop: the tumour is skipped")
    assert kind_with_organ(WRONG[kind](hu), label) is not None
    for name, image in prepared(hu).items():
        if image.shape == hu.shape:
            assert kind_with_organ(image, label) is None, name
    for organ in (1, 2, 3):  # masked, as some pipelines do
        masked = torch.where(label == organ, hu, 0)
        assert kind_with_organ(masked, label, organ) is None


@pytest.mark.parametrize("kind", ["no CT", "sign", "HU-1024"])
def test_what_the_check_lets_through_is_skipped_with_the_scale_as_the_first_advice(ct, kind):
    hu, label = around_organ(ct, 10)
    synth = ts.SynthesizeTumor(**{**SETTINGS, "size_mm": 8})
    try:
        synth({**WRONG, **WRONG_WHOLE}[kind](hu), label, spacing=SPACING, seed=0)
    except ValueError as error:
        assert "Hounsfield" in str(error)
        return
    (record,) = synth.report
    assert not record["applied"]
    first = min(record["reason"].find(w) for w in ("intensity=", "MR") if w in record["reason"])
    assert 0 < first and "any_tissue" not in record["reason"][:first]


def ball(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(n) - n / 2 for n in SHAPE), indexing="ij")
    return np.where(sum(g**2 for g in grid) < 18**2, inside, outside)


def normal(mean: float, sd: float) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, sd, SHAPE)


CAN_BE_HU = {
    "liver": normal(110, 12),
    "liver, denoised": normal(110, 1),
    "fatty liver": normal(5, 12),
    "air": normal(-1000, 15),
    "air, denoised": normal(-1000, 0.5),
    "lung": normal(-850, 60),
    "fat": normal(-100, 10),
    "bone": np.abs(normal(400, 250)),
    "vessel": normal(350, 20),
    "water": normal(0, 10),
    "water, denoised": normal(0, 1.5),
    "water, denoised, whole numbers": normal(0, 1).round(),
    "water phantom": ball(normal(0, 8), normal(-1000, 8)),
    "water phantom, denoised": ball(normal(0, 0.5), np.full(SHAPE, -1000.0)),
    "water phantom, cropped to its wall": ball(normal(0, 4), normal(120, 4)),
    "low dose": normal(50, 120),
    "bile in liver, denoised": ball(normal(15, 3), normal(110, 4)),
    "brain": ball(normal(37, 4), normal(28, 4)),
    "metal": ball(normal(3071, 1), normal(50, 200)),
    "contrast in the bladder": ball(normal(1200, 40), normal(40, 10)),
    "all 0": np.zeros(SHAPE),
    "all -1024": np.full(SHAPE, -1024.0),
    "two values": ball(np.full(SHAPE, 110.0), np.full(SHAPE, 40.0)),
    "NaN": np.full(SHAPE, np.nan),
    **{f"liver in {padding}": ball(normal(110, 15), np.full(SHAPE, padding)) for padding in
       (0.0, -1000.0, -1024.0, -2000.0, -3024.0)},
}  # fmt: skip


ONE_TISSUE_IN_A_CROP = {"metal", "contrast in the bladder"}  # that no crop of an organ shows


@pytest.mark.parametrize("name", CAN_BE_HU)
@pytest.mark.parametrize("shape", [SHAPE, (16, 48, 48), (32, 32, 32), (8, 8, 8)])
def test_what_can_be_hu_passes(name, shape):
    if name in ONE_TISSUE_IN_A_CROP and shape != SHAPE:
        pytest.skip("nothing but metal or contrast is left")
    x, y, z = ((n - s) // 2 for n, s in zip(SHAPE, shape, strict=True))
    part = CAN_BE_HU[name][x : x + shape[0], y : y + shape[1], z : z + shape[2]]
    assert kind_of(part) is None
    assert kind_of(with_bright_voxel(torch.as_tensor(part), 3071.0)) is None


def prepared(hu: Tensor) -> dict[str, Tensor]:
    """The same HU as people prepare them."""
    padded, resampled = torch.nn.functional.pad, torch.nn.functional.interpolate
    return {
        "HU": hu,
        **{f"clipped to {a}..{b}": hu.clip(a, b) for a, b in
           ((-175, 250), (-200, 300), (-160, 240), (-100, 240), (-1000, 1000), (-1024, 600),
            (-500, 500), (-1000, 400), (0, 80), (-57, 164))},
        **{f"padded with {value}": padded(hu, (0, 9, 5, 0, 8, 8), value=value) for value in
           (0.0, -1000.0, -1024.0, -2000.0, -3024.0)},
        "noise": hu + torch.from_numpy(np.random.default_rng(0).normal(0, 60, hu.shape)).float(),
        "denoised": torch.nn.functional.avg_pool3d(hu[None], 3, stride=1)[0],
        "resampled": resampled(hu[None], scale_factor=1.4, mode="trilinear")[0],
        "int16": hu.round().short().float(),
        "bfloat16": hu.bfloat16().float(),
    }  # fmt: skip


def test_no_crop_of_the_phantom_raises_an_alarm(ct):
    rng = np.random.default_rng(0)
    sides = [(16, 40, 40), (32, 32, 32), (40, 40, 40)]
    for k in range(60):
        size = rng.permutation(sides[k % 3]).tolist()
        sizes = [min(a, b) for a, b in zip(size, ct.image.shape[1:], strict=True)]
        at = [
            int(rng.integers(0, n - s + 1)) for n, s in zip(ct.image.shape[1:], sizes, strict=True)
        ]
        part = ct.image[(slice(None), *(slice(a, a + s) for a, s in zip(at, sizes, strict=True)))]
        for name, image in prepared(part).items():
            assert kind_of(image[0]) is None, (name, at, sizes)


def test_no_crop_of_a_real_scan_raises_an_alarm(shared):
    nib = pytest.importorskip("nibabel")
    scan = np.asanyarray(nib.load(shared / "data/ct/totalseg_aorta_crop_ct.nii.gz").dataobj)
    rng = np.random.default_rng(0)
    for k in range(40):
        sizes = rng.permutation([(16, 64, 64), (32, 32, 32), (64, 64, 64)][k % 3]).tolist()
        at = [int(rng.integers(0, n - s + 1)) for n, s in zip(scan.shape, sizes, strict=True)]
        part = scan[tuple(slice(a, a + s) for a, s in zip(at, sizes, strict=True))]
        for name, image in prepared(torch.from_numpy(part.astype(np.float32))[None]).items():
            assert kind_of(image[0]) is None, (name, at, sizes)


@pytest.mark.parametrize("window", [(-160, 240), (-175, 250), (-1000, 1000)])
def test_crops_of_real_scans_are_in_the_range_that_is_said_and_in_no_other(shared, window):
    nib = pytest.importorskip("nibabel")
    rng, refused, shown = np.random.default_rng(0), 0, 0
    for name in ("totalseg_aorta_crop", "totalseg_example", "ibsi_lung_p1"):
        scan = np.asanyarray(nib.load(shared / f"data/ct/{name}_ct.nii.gz").dataobj)
        for _ in range(12):
            at = [int(rng.integers(0, max(1, n - 63))) for n in scan.shape]
            part = scan[tuple(slice(a, a + 64) for a in at)].astype(np.float32)
            hu, label = torch.from_numpy(part), torch.zeros(part.shape, dtype=torch.uint8)
            for made in RANGES:
                image = windowed(hu, *window, *made)
                check_intensity(image, ts.Scaled(*window, *made), label, (1,))
            shown += 1
            try:
                check_intensity((image / 255), ts.Scaled(*window, -1, 1), label, (1,))
            except ValueError:
                refused += 1
    assert window[0] < -900 or refused > 0.8 * shown


@pytest.mark.parametrize("factor", [1.5, 1.8, 1 / 2.5, 1 / 3])
def test_a_factor_is_not_named_as_another(ct, factor):
    fault = find_fault(sample_voxels(ct.image[0] * factor))
    assert fault.kind == "scaled" and f"HU times about {factor:.2g}" in fault.found


@pytest.mark.parametrize("factor", [0.1, 0.2, 0.3, 0.5, 2.0])
def test_images_like_mr_are_refused_at_any_scale(ct, factor):
    noise = torch.from_numpy(np.random.default_rng(0).normal(5, 12, ct.image.shape)).float()
    tissue = torch.where(ct.image < -40, 900.0, 420 + ct.image / 2)
    image = (torch.where(ct.image < -300, 0.0, tissue) + noise).abs() * factor
    assert kind_of(image[0]) == "no CT"
    assert kind_of(with_bright_voxel(image)[0]) == "no CT"


def equalised(hu: Tensor) -> Tensor:
    """The values' ranks from 0 to 255; equal values have one rank."""
    ordered = hu.flatten().sort().values
    return torch.searchsorted(ordered, hu.contiguous()).float() / (hu.numel() - 1) * 255


def equalised_in_bins(hu: Tensor) -> Tensor:
    """As scikit-image: the lowest value has the share of its voxels."""
    counts, edges = np.histogram(hu.numpy(), 256)
    shares = counts.cumsum() / hu.numel() * 255
    return torch.from_numpy(np.interp(hu.numpy(), (edges[:-1] + edges[1:]) / 2, shares)).float()


def equalised_bytes(hu: Tensor) -> Tensor:
    """As OpenCV: a windowed picture, whose lowest value stays 0."""
    window = windowed(hu, -160, 240, 0, 255).round().long()
    summed = window.flatten().bincount().cumsum(0).float()
    return ((summed[window] - summed[0]) / (hu.numel() - summed[0]) * 255).round()


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("equalise", [equalised, equalised_in_bins, equalised_bytes])
def test_pictures_with_an_equalised_histogram_are_named(ct, equalise, rounded):
    hu, organ = ct.image[0], (ct.label[0] == 1).nonzero().float().mean(0).long().tolist()
    for half in {equalised: (8, 12, 16, 60), equalised_bytes: (12, 16, 60)}.get(equalise, (12, 60)):
        part = tuple(slice(max(0, at - half), at + half) for at in organ)
        image = equalise(hu[part])
        image = image.round() if rounded else image
        assert kind_of(image) == kind_of(with_bright_voxel(image)) == "equalised"
        assert kind_of(hu[part].clip(0, 255)) != "equalised"


def mixed(**parts: tuple[float, np.ndarray]) -> np.ndarray:
    """A volume with a share of each part's values."""
    count = np.prod(SHAPE)
    values = [v.ravel()[: round(share * count)] for share, v in parts.values()]
    return np.concatenate(values)[:count].reshape(-1, 48)[None]


def even(low: float, high: float) -> np.ndarray:
    """As many voxels of each value, as at the edges of organs."""
    return np.random.default_rng(1).uniform(low, high, SHAPE)


ZERO = np.zeros(SHAPE)
HU_WITH_EDGES = {
    "an organ's edges, cut out": mixed(zero=(0.86, ZERO), edges=(0.14, even(0, 255))),
    "fat beside fluid, clipped at -100": mixed(
        fat=(0.35, normal(-105, 10)), edges=(0.27, even(-100, -10)), fluid=(0.38, normal(-2, 8))
    ).clip(-100, 240),
    "fat and muscle, padded with 0": mixed(
        zero=(0.5, ZERO), fat=(0.24, normal(-90, 12)), edges=(0.12, even(-60, 20)),
        muscle=(0.14, normal(45, 12)),
    ),
    "dense lung, heart and contrast": mixed(
        lung=(0.1, normal(-430, 110)), heart=(0.4, normal(15, 22)), contrast=(0.4, even(60, 260)),
        edges=(0.1, even(-250, 0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HU_WITH_EDGES)
def test_hu_with_edges_pass(name):
    """As in crops that were resampled to 1 mm."""
    assert kind_of(torch.from_numpy(HU_WITH_EDGES[name])) is None


def test_an_equalised_scan_is_refused_with_its_name(ct):
    with pytest.raises(ValueError, match="equalised histogram; no scale undoes that"):
        image = equalised(ct.image[:, 8:-8, 8:-8, 4:-4])
        ts.SynthesizeTumor(**SETTINGS)(image, ct.label[:, 8:-8, 8:-8, 4:-4], spacing=SPACING)


def test_a_label_map_of_many_organs_is_no_ct(ct):
    assert kind_of(ct.label[0]) == "label map"


@pytest.mark.parametrize("low_noise", [3, 8, 14])
def test_hu_clipped_at_0_pass_with_and_without_the_label_of_an_organ(low_noise):
    rng = np.random.default_rng(0)
    for organ, muscle in ((110, 60), (120, 45), (150, 60)):
        part = np.kron(rng.choice(3, (12, 12, 12), p=(0.4, 0.3, 0.3)), np.ones((4, 4, 4), int))
        hu = np.array([organ, -100, muscle])[part] + rng.normal(0, low_noise, part.shape)
        label = torch.from_numpy((part == 0).astype(np.int16))[None]
        for image in (hu.clip(0), hu.clip(0, 200), hu.clip(0, 400), np.where(hu < -30, 0, hu)):
            one = torch.from_numpy(image).float()[None]
            assert kind_of(one[0]) is None and kind_with_organ(one, label) is None


@pytest.mark.parametrize(("fluid", "wall"), [(5, 32), (5, 30), (12, 3), (8, 36)])
def test_a_fluid_under_the_label_is_no_hu_by_10(fluid, wall):
    image = ball(normal(fluid, 5), normal(wall, 5))
    label = torch.from_numpy(ball(np.ones(SHAPE), np.zeros(SHAPE)))[None]
    assert kind_with_organ(torch.from_numpy(image)[None], label) is None


def test_noise_of_air_below_the_end_of_a_scan_passes(ct):
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 100, ct.image.shape)).float()
    image = ct.image.clip(-1024) + noise
    for part in (image[0], image[0, :20, :20]):
        assert kind_of(part) is None


# -- the core -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRONG)
def test_the_core_refuses_and_says_what_to_pass(ct, kind):
    image = WRONG[kind](ct.image)
    synth = ts.SynthesizeTumor(**SETTINGS)
    with pytest.raises(ValueError, match="must be in Hounsfield units") as error:
        synth(with_bright_voxel(image), ct.label, spacing=SPACING, seed=0)
    assert "lung" not in str(error.value)
    fix = re.search(r"pass intensity=(ts\.Scaled\(-?[\d., -]+\))$", str(error.value))
    if kind.strip() in ("HU/10", "HU/100", "HU/1000", "HU+1024", "HU+32768"):
        scaled = ts.SynthesizeTumor(**SETTINGS, intensity=eval(fix[1], {"ts": ts}))
        after, label = scaled(image, ct.label, spacing=SPACING, seed=0)
        expected, its_label = synth(ct.image, ct.label, spacing=SPACING, seed=0)
        assert torch.equal(label, its_label) and scaled.report[0]["applied"]
        if kind[-1] != " ":
            change = scaled.intensity.to_hu(after) - scaled.intensity.to_hu(image)
            assert (change - (expected - ct.image)).abs().max() < 0.5


def test_the_answer_does_not_depend_on_where_the_tumours_come_to_lie(ct):
    image = with_bright_voxel(WRONG["0-255"](ct.image))
    for seed in range(5):
        with pytest.raises(ValueError, match="windowed to 0 to 255"):
            ts.SynthesizeTumor(**SETTINGS)(image, ct.label, spacing=SPACING, seed=seed)


def test_one_sample_of_a_batch_is_enough(ct):
    images = torch.stack([ct.image, ct.image / 10])
    labels = torch.stack([ct.label] * 2)
    with pytest.raises(ValueError, match="divided by 10"):
        ts.SynthesizeTumor(**SETTINGS)(images, labels, spacing=SPACING, seed=0)


def test_an_image_without_a_tumour_to_paint_is_not_looked_at(ct):
    for settings in ({"p": 0.0}, {"organ_labels": 99}):
        synth = ts.SynthesizeTumor(**{**SETTINGS, **settings})
        assert synth(ct.image / 10, ct.label, spacing=SPACING, seed=0)[0] is not None


IMAGES = {
    "window": lambda hu: windowed(hu, -175, 250, 0, 1),
    "wide": lambda hu: windowed(hu, -1000, 1000, 0, 1),
    "lung window": lambda hu: windowed(hu, -1000, 400, 0, 1),
    "nnU-Net": lambda hu: (hu.clip(-160, 240) - 100) / 40,
    "bytes": lambda hu: windowed(hu, -160, 240, 0, 255),
}
SAID = {
    "window": ts.Scaled(-175, 250, 0, 1),
    "wide": ts.Scaled(-1000, 1000, 0, 1),
    "lung window": ts.Scaled(-1000, 400, 0, 1),
    "nnU-Net": ts.ZScore(100, 40, -160, 240),
    "bytes": ts.Scaled(-160, 240, 0, 255),
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("image", IMAGES)
def test_another_scale_than_said_is_not_painted(ct, image, said):
    synth = ts.SynthesizeTumor(**SETTINGS, intensity=SAID[said])
    values = IMAGES[image](ct.image)
    if image == said:
        synth(values, ct.label, spacing=SPACING, seed=0)
        assert synth.report[0]["applied"]
        return
    try:
        synth(values, ct.label, spacing=SPACING, seed=0)
    except ValueError as error:
        assert "must be in the scale of intensity=" in str(error)
    else:  # no soft tissue either
        assert not synth.report[0]["applied"] and "intensity=" in synth.report[0]["reason"]


def test_values_beyond_the_ends_of_a_scale_are_refused_but_padding_and_noise_are_not(ct):
    synth = ts.SynthesizeTumor(**SETTINGS, intensity=ts.Scaled(-175, 250, 0, 1))
    image = windowed(ct.image, -175, 250, 0, 1)
    with pytest.raises(ValueError, match="lie beyond the 0 to 1 to which it clips"):
        synth(1.3 * image - 0.1, ct.label, spacing=SPACING, seed=0)
    padded = torch.nn.functional.pad(image, (0, 0, 6, 6, 6, 6), value=-1.0)
    label = torch.nn.functional.pad(ct.label, (0, 0, 6, 6, 6, 6))
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.01, image.shape)).float()
    for one, its_label in ((padded, label), (image + noise, ct.label)):
        synth(one, its_label, spacing=SPACING, seed=0)
        assert synth.report[0]["applied"]


@pytest.mark.parametrize("window", [(-160, 240), (-175, 250), (-200, 300), (-100, 240)])
def test_an_image_that_fills_another_range_than_said_is_refused(ct, window):
    """The right window with the wrong numbers of the result: [0, 1] for [-1, 1]."""
    part, part_label = ct.image[..., 20:60, 20:60, 10:40], ct.label[..., 20:60, 20:60, 10:40]
    for image, label in ((ct.image, ct.label), (part, part_label)):
        for made, said in itertools.product(RANGES, RANGES):
            values, scale = windowed(image, *window, *made)[0], ts.Scaled(*window, *said)
            if made == said:
                check_intensity(values, scale, label[0], (1,))
                continue
            with pytest.raises(ValueError, match="must be in the scale of intensity=Scaled"):
                check_intensity(values, scale, label[0], (1,))


@pytest.mark.parametrize("said", [(-160, 240, -1, 1), (-175, 250, -1, 1), (-1000, 1000, -1, 1)])
def test_padding_with_0_and_organs_cut_out_are_in_the_range_that_is_said(ct, said):
    values, organ = windowed(ct.image, *said)[0], ct.label[0] == 1
    cut_out = torch.where(organ, values, 0)
    around = around_organ(ct, 16)
    part = torch.nn.functional.pad(windowed(around[0], *said)[0], [6] * 6)
    part_label = torch.nn.functional.pad(around[1][0], [6] * 6)
    for image, label in ((cut_out, ct.label[0]), (part, part_label)):
        check_intensity(image, ts.Scaled(*said), label, (1,))


def test_a_range_of_another_end_says_what_shows_it(ct):
    half, tiny = ts.Scaled(-160, 240, -1, 1), ts.Scaled(-160, 240, 0, 255)
    unit = windowed(ct.image, -160, 240, 0, 1)
    hundred = 100 * unit
    synth = {scale: ts.SynthesizeTumor(**SETTINGS, intensity=scale) for scale in (half, tiny)}
    for scale, image, says in [
        (half, unit, "would be 40 HU and more, clipped above the level of fluids"),
        (tiny, hundred, "HU and less, clipped below the level of organs"),
        (tiny, unit, "HU"),
    ]:
        with pytest.raises(ValueError, match=f"{says}.*; pass intensity=HU"):
            synth[scale](image, ct.label, spacing=SPACING, seed=0)


@pytest.mark.parametrize("said", SAID)
def test_no_crop_in_the_scale_that_is_said_raises_an_alarm(ct, said):
    rng = np.random.default_rng(1)
    for k in range(40):
        sizes = [min(a, b) for a, b in zip((32, 32, 24), ct.image.shape[1:], strict=True)]
        at = [
            int(rng.integers(0, n - s + 1)) for n, s in zip(ct.image.shape[1:], sizes, strict=True)
        ]
        part = ct.image[(slice(None), *(slice(a, a + s) for a, s in zip(at, sizes, strict=True)))]
        noisy = part + torch.from_numpy(rng.normal(0, 15, part.shape)).float()
        for hu in (part, noisy):
            problem = scale_problem(sample_voxels(IMAGES[said](hu)[0]), SAID[said])
            assert problem is None, (k, at)


@pytest.mark.parametrize("crop", [None, 24, 12])
@pytest.mark.parametrize(
    "intensity",
    [ts.Scaled(-175, 250, 0, 1), ts.Scaled(-1000, 1000, -1, 1), ts.ZScore(100, 40, -160, 240),
     ts.ZScore(100, 40), ts.Scaled(-4000, 4000, -400, 400)],
    ids=str,
)  # fmt: skip
def test_hu_under_another_scale_are_refused(ct, intensity, crop):
    image, label = (ct.image, ct.label) if crop is None else around_organ(ct, crop)
    if crop is not None and intensity == ts.Scaled(-4000, 4000, -400, 400):
        pytest.skip("a liver of 1000 HU in doubt")
    synth = ts.SynthesizeTumor(**SETTINGS, intensity=intensity)
    for one in (image, with_bright_voxel(image, 0.5)):
        with pytest.raises(ValueError, match=r"must be in the scale of intensity=.*HU\(\)"):
            synth(one, label, spacing=SPACING, seed=0)
    scaled = (image - intensity.to_hu(torch.zeros(()))) / intensity.hu_per_unit
    if intensity.limits is not None:
        scaled = scaled.clip(*intensity.limits)
    for one in (scaled, with_bright_voxel(scaled, 3000.0)):
        synth(one, label, spacing=SPACING, seed=0)


def test_hu_clipped_to_a_byte_are_told_the_way_out(ct):
    image = ct.image.clip(0, 255)
    with pytest.raises(ValueError, match=r"if HU were clipped .*, ts.Scaled\(0, 255, 0, 255\)$"):
        ts.SynthesizeTumor(**SETTINGS)(image, ct.label, spacing=SPACING, seed=0)
    synth = ts.SynthesizeTumor(**SETTINGS, intensity=ts.Scaled(0, 255, 0, 255))
    new, _ = synth(image, ct.label, spacing=SPACING, seed=0)
    assert synth.report[0]["applied"] and 0 <= float(new.min()) and float(new.max()) <= 255


def test_the_identity_as_a_scale_is_the_way_out(ct):
    """For images that are HU and look like none."""
    same = ts.SynthesizeTumor(**SETTINGS, intensity=ts.Scaled(-4000, 4000, -4000, 4000))
    same(ct.image, ct.label, spacing=SPACING, seed=0)
    same(-ct.image, ct.label, spacing=SPACING, seed=0)


# -- the adapters ---------------------------------------------------------------------------------


INTEGER = {"0-255": torch.uint8, "HU+1024": torch.int16, "sign": torch.int16, "HU/10": torch.int16}


def stored(ct, kind: str) -> Tensor:
    """The image in a wrong scale, as a reader of integers gives it."""
    image = WRONG[kind](ct.image).round()
    return image.clamp(0).to(torch.uint8) if kind == "0-255" else image.to(INTEGER[kind])


@pytest.mark.parametrize("kind", INTEGER)
def test_integers_through_the_adapter(ct, kind):
    adapter = Adapter(**SETTINGS)
    with pytest.raises(ValueError, match="must be in Hounsfield units"):
        adapter(stored(ct, kind), ct.label, spacing=SPACING, seed=0)


@pytest.mark.skipif(not hasattr(torch, "uint16"), reason="needs torch 2.3")
def test_uint16_through_the_adapter(ct):
    unsigned = torch.from_numpy(ct.image.round().numpy().astype(np.int16).view(np.uint16).copy())
    with pytest.raises(ValueError, match="signed numbers read as unsigned ones"):
        Adapter(**SETTINGS)(unsigned, ct.label, spacing=SPACING, seed=0)
    offset = torch.from_numpy((ct.image + 1024).clamp(0).round().numpy().astype(np.uint16))
    with pytest.raises(ValueError, match=r"HU \+ 1024"):
        Adapter(**SETTINGS)(offset, ct.label, spacing=SPACING, seed=0)


@pytest.mark.parametrize("kind", INTEGER)
def test_monai(ct, kind):
    pytest.importorskip("monai")
    from tumorsynth.monai import BatchSynthesizeTumord, RandSynthesizeTumord

    data = {"image": stored(ct, kind), "label": ct.label}
    keys = {"keys": "image", "label_key": "label", "spacing": SPACING}
    with pytest.raises((ValueError, RuntimeError), match="must be in Hounsfield units"):
        RandSynthesizeTumord(**keys, prob=1.0, **SETTINGS)(data)
    batch = {"image": stored(ct, kind)[None], "label": ct.label[None]}
    with pytest.raises((ValueError, RuntimeError), match="must be in Hounsfield units"):
        BatchSynthesizeTumord(**keys, **SETTINGS)(batch)


@pytest.mark.parametrize("kind", INTEGER)
def test_torchio(ct, kind):
    tio = pytest.importorskip("torchio")
    from tumorsynth.torchio import RandomSynthesizeTumor

    subject = tio.Subject(
        image=tio.ScalarImage(tensor=stored(ct, kind), affine=ct.affine),
        label=tio.LabelMap(tensor=ct.label, affine=ct.affine),
    )
    with pytest.raises(ValueError, match="must be in Hounsfield units"):
        RandomSynthesizeTumor(**SETTINGS)(subject)


@pytest.mark.parametrize("kind", ["0-255", "HU/10"])
def test_lightning(ct, kind):
    pytest.importorskip("lightning")
    from test_lightning import as_dicts, fit

    from tumorsynth.lightning import TumorSynthCallback

    data = as_dicts([(WRONG[kind](ct.image), ct.label.long())])
    with pytest.raises(ValueError, match="must be in Hounsfield units"):
        fit(data, TumorSynthCallback(**SETTINGS, spacing=SPACING))


# -- files ----------------------------------------------------------------------------------------


def write_pair(folder: Path, image: Tensor, ct) -> tuple[Path, Path]:
    nib = pytest.importorskip("nibabel")
    paths = folder / "a_ct.nii.gz", folder / "a_label.nii.gz"
    for path, voxels in zip(paths, (image, ct.label), strict=True):
        nib.save(nib.Nifti1Image(voxels[0].numpy(), ct.affine), path)
    return paths


@pytest.mark.parametrize("kind", ["HU/10", "HU/100", "0-255", "z-scores", "sign", "no CT"])
def test_the_command_line_names_file_and_option(ct, kind, tmp_path, capsys):
    image = with_bright_voxel(WRONG[kind](ct.image), 250.0 if kind == "0-255" else 3000.0)
    image = image.to(torch.uint8) if kind == "0-255" else image
    words = [*map(str, write_pair(tmp_path, image, ct)), "--generator", "hu2023", "-o"]
    words += [str(tmp_path / "out"), "--tumor-label", "20", "--count", "1"]
    assert main(["synthesize", *words]) == 2
    said = capsys.readouterr().err
    assert "a CT must be in HU" in said and "a_ct.nii.gz" in said and "lung" not in said
    option = re.search(r"give (--intensity=-4000,4000,\S+)\n", said)
    if kind in ("HU/10", "HU/100"):
        assert main(["synthesize", *words, option[1]]) == 0
    else:
        assert option is None
        assert ("--intensity" in said) == (kind in ("0-255", "z-scores"))


@pytest.mark.parametrize("numbers", ["-160,240,-1,1", "-160,240,0,255"])
def test_the_command_line_refuses_another_range_than_the_files(ct, numbers, tmp_path, capsys):
    pair = write_pair(tmp_path, windowed(ct.image, -160, 240, 0, 1), ct)
    words = [*map(str, pair), "--generator", "hu2023", "--tumor-label", "20", "--count", "1"]
    assert main(["synthesize", *words, "-o", str(tmp_path / "a"), f"--intensity={numbers}"]) == 2
    assert "must be in the scale of intensity=Scaled" in capsys.readouterr().err
    assert not list((tmp_path / "a").glob("*"))
    assert main(["synthesize", *words, "-o", str(tmp_path / "b"), "--intensity=-160,240,0,1"]) == 0


@pytest.mark.parametrize("kind", ["HU/10", "HU/100", "0-255", "z-scores", "sign", "HU+1024"])
def test_training_names_the_conversion(ct, kind, tmp_path, capsys):
    pytest.importorskip("monai")
    image = with_bright_voxel(WRONG[kind](ct.image), 250.0 if kind == "0-255" else 3000.0)
    image_path, label_path = write_pair(tmp_path, image, ct)
    dataset = tmp_path / "dataset.json"
    dataset.write_text(
        json.dumps({"training": [{"image": image_path.name, "label": label_path.name}]})
    )
    assert main(["train", "pack", str(dataset), "-o", str(tmp_path / "p.npz")]) == 2
    said = capsys.readouterr().err
    assert find_fault(sample_voxels(image[0])).conversion in said


@pytest.mark.parametrize("value", [0.0, -1024.0])
def test_a_whole_scan_of_one_value_is_refused(ct, value, tmp_path, capsys):
    paths = map(str, write_pair(tmp_path, torch.full_like(ct.image, value), ct))
    assert main(["synthesize", *paths, "--generator", "hu2023", "-o", str(tmp_path / "o"),
                 "--tumor-label", "20"]) == 2  # fmt: skip
    assert f"every voxel of a_ct.nii.gz is {value:g}" in capsys.readouterr().err
