"""The hand-crafted generator: HU, noise kept, vessels gone, determinism, bad input."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tumorsynth.generators.filters import blobs, blur, distance_mm
from tumorsynth.generators.handcrafted import HandcraftedConfig, HandcraftedGenerator

N = 48


def to_unit(hu):
    return (hu + 175) / 425


def ball(diameter, centre=(N // 2,) * 3, n=N):
    grid = torch.stack(torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij"))
    squared = (grid - torch.tensor(centre).view(3, 1, 1, 1)).square().sum(0)
    return (squared <= (diameter / 2) ** 2)[None, None]


def organ(hu=110.0, noise=12.0, seed=0, n=N):
    """A homogeneous organ with CT-like (correlated) noise, in HU, (1, 1, n, n, n)."""
    rng = torch.Generator().manual_seed(seed)
    field = blur(torch.randn(n, n, n, generator=rng), 0.6)
    return hu + noise * (field / field.std())[None, None]


def change_hu(hu, mask, seed=0, config=None):
    return 425 * HandcraftedGenerator(config).change(to_unit(hu), mask, seed)


def noise_sd(hu, where):
    return float((hu[0, 0] - blur(hu[0, 0], 1.5))[where[0, 0]].std())


def test_interface():
    generator = HandcraftedGenerator()
    assert generator.name == generator.card["name"] == "hu2023"
    assert generator.card["kind"] == "handcrafted"
    assert generator.card["licence"] == "Apache-2.0"
    assert "CVPR 2023" in generator.card["source"]
    assert (generator.crop_size, generator.crop_multiple) == (64, 1)
    assert generator.to("cpu") is generator
    assert generator.device == torch.device("cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        generator.config.floor_hu = 3.0  # type: ignore[misc]


@pytest.mark.parametrize("parenchyma", [95.0, 110.0, 130.0, 160.0, 220.0])
@pytest.mark.parametrize("diameter", [5, 10, 20])
def test_enhanced_organ_contrast_is_10_to_60_hu_and_more_in_a_kidney(parenchyma, diameter):
    mask, hu = ball(diameter), organ(parenchyma)
    means = [float(change_hu(hu, mask, seed)[mask].mean()) for seed in range(12)]
    assert -60 * max(1, parenchyma / 130) < min(means) and max(means) < -10
    assert max(means) - min(means) > 5  # drawn per tumour, not a constant


@pytest.mark.parametrize("parenchyma", [40.0, 50.0, 60.0])
def test_contrast_shrinks_in_an_unenhanced_organ(parenchyma):
    mask, hu = ball(14), organ(parenchyma, noise=8.0)
    for seed in range(8):
        after = hu + change_hu(hu, mask, seed)
        drop = float(hu[mask].mean() - after[mask].mean())
        assert 7 < drop < 32
        assert after[mask].mean() > 10


@pytest.mark.parametrize("parenchyma", [-20.0, 5.0, 12.0, 17.0, 25.0])
@pytest.mark.parametrize("noise", [0.0, 5.0, 40.0])
def test_a_fatty_organ_gets_no_brighter_tumour_by_accident(parenchyma, noise):
    mask, hu = ball(14), organ(parenchyma, noise=noise)
    least = HandcraftedConfig().min_contrast_hu
    for seed in range(4):
        assert -25 < change_hu(hu, mask, seed)[mask].mean() < -0.7 * least


def test_mean_contrast_is_the_sampled_one():
    config = HandcraftedConfig(contrast_hu=(30.0, 30.0), capsule_probability=0.0)
    mask = ball(16)
    change = change_hu(organ(110.0, noise=0.0), mask, 3, config)
    assert float(change[mask].mean()) == pytest.approx(-30.0, abs=0.05)
    assert 1.5 < float(change[mask].std()) < 7  # texture_hu is 2 to 5


def test_parenchyma_is_measured_beside_fat_bone_and_another_organ():
    mask = ball(12, (24, 24, 24))
    hu = organ(110.0)
    config = HandcraftedConfig(capsule_probability=0.0)
    alone = float(change_hu(hu, mask, 5, config)[mask].mean())
    for slab in (-100.0, 250.0, 50.0, 200.0):  # 3 mm from the tumour, a third of the shell
        beside = hu.clone()
        beside[..., 34:] = slab
        beside[:, :, 34:] = slab
        assert float(change_hu(beside, mask, 5, config)[mask].mean()) == pytest.approx(alone, abs=3)


def test_vessel_inside_is_replaced():
    mask, hu = ball(20), organ(110.0)
    x, y = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    tube = ((x - 24) ** 2 + (y - 25) ** 2 <= 2.5**2)[None, None, :, :, None].expand_as(mask)
    # A vessel as a scanner shows it, blurred by 0.6 mm.
    with_vessel = hu + 70.0 * blur(tube[0, 0].float(), 0.6)
    after = with_vessel + change_hu(with_vessel, mask, 1)
    inside, rest = mask & tube, mask & ~tube
    assert float(with_vessel[inside].mean() - with_vessel[rest].mean()) > 50
    assert abs(float(after[inside].mean() - after[rest].mean())) < 15


@pytest.mark.parametrize("noise", [4.0, 12.0, 25.0])
def test_noise_inside_stays_like_noise_outside(noise):
    mask, hu = ball(18), organ(110.0, noise)
    before = noise_sd(hu, mask)
    for seed in range(4):
        after = noise_sd(hu + change_hu(hu, mask, seed), mask)
        assert 0.9 * before < after < 1.15 * before + 2.0


def test_change_continues_beyond_the_mask_and_ends():
    mask = ball(10)
    config = HandcraftedConfig(texture_hu=(0.0, 0.0), capsule_probability=0.0)
    change = change_hu(organ(110.0, noise=0.0), mask, 2, config)
    distance = distance_mm(mask[0, 0])[None, None]
    contrast = float(change[mask].mean())
    assert -60 < contrast < -10
    torch.testing.assert_close(
        change[distance < 8], torch.full_like(change[distance < 8], contrast), atol=0.01, rtol=0
    )
    assert torch.count_nonzero(change[distance > 12.5]) == 0
    # It fades out smoothly between: no step of more than half the contrast from voxel to voxel.
    steps = torch.cat([change.diff(dim=axis).abs().flatten() for axis in (2, 3, 4)])
    assert float(steps.max()) < -contrast / 2


def test_fat_lung_and_bone_beside_the_tumour_stay():
    hu = organ(110.0)
    mask = ball(14)
    mask[..., 30:] = False
    for outside in (-100.0, -175.0, 250.0):
        beside = hu.clone()
        beside[..., 30:] = outside
        change = change_hu(beside, mask, 4)
        assert float(change[..., 32:].abs().max()) < 1
        assert float(change[mask].mean()) < -15


def test_capsule_is_a_bright_rim_of_large_tumors_only():
    base = HandcraftedConfig(texture_hu=(0.0, 0.0), capsule_hu=(15.0, 15.0))
    hu = organ(110.0, noise=0.0)
    for diameter, rim in ((30, 15.0), (12, 0.0)):
        mask = ball(diameter)
        with_rim, without = (
            change_hu(hu, mask, 7, dataclasses.replace(base, capsule_probability=p)) for p in (1, 0)
        )
        extra = with_rim - without
        assert float(extra.max()) == pytest.approx(rim, abs=1.5)
        assert float(extra[0, 0, 24, 24, 24]) == pytest.approx(0.0, abs=0.1)


def test_texture_correlation_length():
    for length in (2.0, 3.0, 4.0):
        field = blobs(torch.Size((60, 60, 60)), length, torch.Generator().manual_seed(0))
        assert float(field.mean()) == pytest.approx(0, abs=1e-3)
        assert float(field.std()) == pytest.approx(1, abs=1e-3)
        lags = [float((field[k:] * field[: 60 - k]).mean()) for k in range(8)]
        first = next(k for k, value in enumerate(lags) if value < np.exp(-1))
        assert length - 1 <= first <= length + 1.5


def test_distance_is_right_to_half_a_millimetre():
    for radius in (2, 6, 12):
        true = (
            torch.stack(torch.meshgrid(*[torch.arange(N) - 24.0] * 3, indexing="ij"))
            .square()
            .sum(0)
            .sqrt()
            - radius
        )
        shell = (true > 3) & (true < 11)
        # A ball of voxel centres ends up to half a voxel below its radius.
        error = distance_mm(ball(2 * radius)[0, 0])[shell] - true[shell]
        assert -0.5 < float(error.min()) and float(error.max()) < 1.0


def test_inpaint_pastes_with_a_soft_edge_and_keeps_the_rest():
    generator, mask, crop = HandcraftedGenerator(), ball(14), to_unit(organ())
    out = generator.inpaint(crop, mask, 3)
    hu_change = 425 * (out - crop)
    assert -60 < float(hu_change[mask].mean()) < -10
    far = distance_mm(mask[0, 0])[None, None] > 12.5
    assert torch.equal(out[far], crop[far])
    profile = hu_change[0, 0, 24, 24, 24:44].abs()
    assert float(profile[:4].mean()) > 15 and float(profile[12:].max()) < 1


def test_deterministic_and_seeded():
    generator, mask, crop = HandcraftedGenerator(), ball(12), to_unit(organ())
    for method in (generator.change, generator.inpaint):
        torch.manual_seed(1)
        first = method(crop, mask, 11)
        torch.manual_seed(2)
        assert torch.equal(first, method(crop, mask, 11))
        assert torch.equal(first, method(crop, mask, np.int64(11)))
        assert not torch.equal(first, method(crop, mask, 12))


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    HandcraftedGenerator().change(to_unit(organ()), ball(12), 11)
    assert torch.equal(before, torch.get_rng_state())


def test_batch_equals_singles_bitwise():
    generator = HandcraftedGenerator()
    crops = torch.cat([to_unit(organ(hu, seed=k)) for k, hu in enumerate((110, 55, 130, 90))])
    masks = torch.cat([ball(12), ball(6, (10, 40, 20)), ball(20), ball(9, (3, 24, 24))])
    seeds = [5, 6, 7, 8]
    for method in (generator.change, generator.inpaint):
        batch = method(crops, masks, seeds)
        for k in range(4):
            single = method(crops[k : k + 1], masks[k : k + 1], seeds[k])
            assert torch.equal(batch[k : k + 1], single)
        order = [2, 0, 3, 1]
        assert torch.equal(
            method(crops[order], masks[order], [seeds[k] for k in order]), batch[order]
        )


def test_autocast_changes_nothing():
    generator, mask, crop = HandcraftedGenerator(), ball(12), to_unit(organ())
    plain = generator.change(crop, mask, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(generator.change(crop, mask, 1), plain)


def test_same_in_another_process():
    code = (
        "import torch; from tumorsynth.generators.handcrafted import HandcraftedGenerator;"
        "x = torch.linspace(0.6, 0.7, 32**3).view(1, 1, 32, 32, 32);"
        "m = torch.zeros_like(x, dtype=torch.bool); m[..., 12:20, 12:20, 12:20] = True;"
        "total = HandcraftedGenerator().change(x, m, 9).double().sum().item().hex()"
    )
    here: dict[str, str] = {}
    exec(code, here)
    there = subprocess.run(
        [sys.executable, "-c", code + "; print(total)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ).stdout.strip()
    assert here["total"] == there and float.fromhex(there) < 0


def test_empty_mask_changes_nothing():
    crop = to_unit(organ())
    generator, empty = HandcraftedGenerator(), torch.zeros_like(crop, dtype=torch.bool)
    assert torch.count_nonzero(generator.change(crop, empty, 0)) == 0
    assert torch.equal(generator.inpaint(crop, empty, 0), crop)
    both = generator.change(crop.repeat(2, 1, 1, 1, 1), torch.cat([empty, ball(10)]), 0)
    assert torch.count_nonzero(both[0]) == 0 and torch.count_nonzero(both[1]) > 0


def test_nan_and_inf_stay_and_do_not_spread():
    crop, mask = to_unit(organ()), ball(14)
    generator = HandcraftedGenerator()
    clean = generator.change(crop, mask, 0)
    bad = torch.rand(crop.shape, generator=torch.Generator().manual_seed(0)) < 0.02
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = torch.where(bad, value, crop)
        change = generator.change(broken, mask, 0)
        assert change.isfinite().all()
        assert float((change - clean)[mask].mean().abs()) * 425 < 2
        out = generator.inpaint(broken, mask, 0)
        assert out[~bad].isfinite().all() and not out[bad].isfinite().any()
    assert generator.change(torch.full_like(crop, float("nan")), mask, 0).isfinite().all()


@pytest.mark.parametrize("value", [-5.0, 0.0, 1.0, 40.0])
def test_values_without_tissue_give_a_finite_change(value):
    crop = torch.full((1, 1, 32, 32, 32), value)
    change = HandcraftedGenerator().change(crop, ball(10, (16, 16, 16), 32), 0)
    assert change.isfinite().all() and float(change.abs().max()) * 425 < 300


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 40, 23), (1, 30, 30)])
def test_any_crop_size_and_a_tumor_at_the_border(shape):
    crop = torch.full((1, 1, *shape), to_unit(110.0))
    mask = torch.zeros_like(crop, dtype=torch.bool)
    mask[..., :4, :4] = True
    change = 425 * HandcraftedGenerator().change(crop, mask, 0)
    assert change.shape == crop.shape and -60 < float(change[mask].mean()) < -10
    one = torch.zeros_like(mask)
    one[0, 0, 0, 0, 0] = True
    assert float(425 * HandcraftedGenerator().change(crop, one, 0)[one]) < -10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    crop, mask = to_unit(organ()), ball(10)
    change = HandcraftedGenerator().change(crop.to(dtype), mask, 0)
    reference = HandcraftedGenerator().change(crop, mask, 0)
    assert change.dtype == dtype
    assert float((change.float() - reference)[mask].mean().abs()) * 425 < 2


def test_inputs_are_not_written_and_no_graph_is_kept():
    crop, mask = to_unit(organ()).requires_grad_(), ball(10)
    kept, kept_mask = crop.detach().clone(), mask.clone()
    assert not HandcraftedGenerator().change(crop, mask, 0).requires_grad
    HandcraftedGenerator().inpaint(crop, mask, 0)
    assert torch.equal(crop, kept) and torch.equal(mask, kept_mask)


@pytest.mark.parametrize(
    ("crop", "mask", "seed", "error", "match"),
    [
        (torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16), None, 0, TypeError, "crop must be"),
        (torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8), 0, TypeError, "must be a bool"),
        (torch.zeros(1, 8, 8, 8), None, 0, ValueError, r"\(1, 8, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8, 8), None, 0, ValueError, "B, 1, X, Y, Z"),
        (torch.zeros(1, 1, 8, 8, 8), torch.ones(1, 1, 8, 8, 9).bool(), 0, ValueError, "cut alike"),
        (torch.zeros(2, 1, 8, 8, 8), None, [1], ValueError, "got 1 for 2 samples"),
    ],
)
def test_bad_input_is_named(crop, mask, seed, error, match):
    mask = torch.ones_like(crop, dtype=torch.bool) if mask is None else mask
    with pytest.raises(error, match=match):
        HandcraftedGenerator().change(crop, mask, seed)


@pytest.mark.parametrize(
    "setting",
    [
        {"contrast_hu": (40.0, 20.0)},
        {"contrast_hu": (-5.0, 20.0)},
        {"texture_mm": (0.0, 2.0)},
        {"capsule_probability": 1.5},
        {"reference_hu": 0.0},
    ],
)
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        HandcraftedConfig(**setting)


def test_real_enhanced_liver(shared):
    """Contrast and noise on a real scan (3D-IRCADb-01 patient 1), away from its real tumours."""
    nibabel = pytest.importorskip("nibabel")
    folder = shared / "data" / "ct"
    image = nibabel.load(folder / "ircadb_p01_ct.nii.gz")
    label = np.asarray(nibabel.load(folder / "ircadb_p01_label.nii.gz").dataobj)
    # x, y by 0.57 mm and z by 1.6 mm to the 1 mm grid.
    spacing = [float(v) for v in image.header.get_zooms()[:3]]
    liver = torch.from_numpy((label == 1) & True).float()[None, None]
    hu = torch.from_numpy(np.asarray(image.dataobj).astype(np.float32))[None, None]
    size = [round(n * s) for n, s in zip(hu.shape[2:], spacing, strict=True)]
    hu = torch.nn.functional.interpolate(hu, size, mode="trilinear")[0, 0]
    liver = torch.nn.functional.interpolate(liver, size, mode="nearest")[0, 0] > 0
    # Centres with 64 mm of scan and 20 mm of liver (along the axes) around them.
    clear = liver.clone()
    for axis in range(3):
        for step in range(-20, 21, 4):
            clear &= liver.roll(step, axis)
    border = torch.zeros_like(clear)
    border[32:-32, 32:-32, 32:-32] = True
    centres = (clear & border).nonzero()
    assert len(centres) > 100
    for k, diameter in enumerate((8, 12, 16, 20)):
        centre = centres[len(centres) * (k + 1) // 5].tolist()
        cut = tuple(slice(c - 32, c + 32) for c in centre)
        crop, organ_crop = hu[cut][None, None], liver[cut][None, None]
        mask = ball(diameter, (32, 32, 32), 64) & organ_crop
        after = crop + change_hu(crop, mask, k)
        distance = distance_mm(mask[0, 0])[None, None]
        shell = organ_crop & (distance > 3) & (distance < 10)
        parenchyma = crop[shell].median()
        assert 10 < float(parenchyma - after[mask].mean()) < 60
        # Vessels in the shell are no noise.
        shell &= (crop - parenchyma).abs() < 50
        assert 0.7 < noise_sd(after, mask) / noise_sd(crop, shell) < 1.4
