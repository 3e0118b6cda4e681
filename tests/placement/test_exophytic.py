"""Exophytic tumours: where they grow beyond the organ, and what is painted there."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from phantoms import shared_phantom

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.geometry import Box
from tumorsynth.intensity import BONE_HU
from tumorsynth.phantom import LABELS
from tumorsynth.placement.exophytic import (
    FAT_HU_RANGE,
    MAX_BULGE,
    ExophyticRegion,
    check_bulge,
    sample_bulge,
)
from tumorsynth.placement.organ_priors import PRIORS

KIDNEYS = (LABELS["left_kidney"], LABELS["right_kidney"])
TUMOR = 60


@pytest.fixture(scope="module")
def ct():
    return shared_phantom((2.0, 2.0, 3.0))


def synthesizer(generator="hu2023", **options):
    options = {"count": 1, "size_mm": (16, 26), "bulge": (0.3, 0.6), **options}
    return ts.SynthesizeTumor(generator, KIDNEYS, TUMOR, **options)


def made(ct, seed, **options):
    synth = synthesizer(**options)
    image, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=seed)
    return image, label, synth


def beyond(ct, label):
    return (label == TUMOR) & ~torch.isin(ct.label, torch.tensor(KIDNEYS))


# -- the share beyond the organ --------------------------------------------------------------------


def test_shares_follow_the_prior_or_the_range():
    for name in ("kidney", "cyst"):
        shares = np.array([sample_bulge(PRIORS[name], 25.0, seed) for seed in range(400)])
        mean, sd = PRIORS[name].bulge
        middle = 1 / (1 + np.exp(-(mean + PRIORS[name].bulge_slope * np.log(25 / 15))))
        assert abs(np.median(shares) - middle) < 0.06
        assert 0 <= shares.min() and shares.max() <= MAX_BULGE and shares.std() > 0.1
    assert sample_bulge(PRIORS["liver"], 25.0, 1) == 0.0 == sample_bulge(None, 25.0, 1)
    within = [sample_bulge((0.2, 0.4), 25.0, seed) for seed in range(50)]
    assert 0.2 <= min(within) < 0.25 < 0.35 < max(within) <= 0.4


@pytest.mark.parametrize("wrong", [1.5, -0.1, (0.5, 0.2), "kidney", (0.1, 0.2, 0.3), float("nan")])
def test_invalid_share_raises(wrong):
    with pytest.raises(ValueError, match="bulge must be the share"):
        synthesizer(bulge=wrong)


def test_true_needs_a_prior_fitted_to_masks():
    for size in ("liver", "pancreas", "lung", (10, 20)):
        with pytest.raises(ValueError, match=r'needs size_mm="kidney" or "cyst"'):
            synthesizer(size_mm=size, bulge=True)
    assert check_bulge(True, "cyst") is PRIORS["cyst"]
    for nothing in (False, None, 0, 0.0, (0, 0)):
        assert check_bulge(nothing, "kidney") is None


def test_by_default_labels_change_in_the_organ_alone(ct):
    synth = ts.SynthesizeTumor("hu2023", KIDNEYS, TUMOR, count=3, size_mm="kidney")
    for seed in range(3):
        _, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=seed)
        assert not beyond(ct, label).any()
        assert all(r["outside_share"] == 0 for r in synth.report if r["applied"])


# -- where tumours grow to -------------------------------------------------------------------------


def test_tumours_grow_into_fat_alone_by_about_the_sampled_share(ct):
    off, applied = [], 0
    hu = ct.image[0]
    for seed in range(12):
        _, label, synth = made(ct, seed)
        (record,) = synth.report
        if not record["applied"]:
            continue
        applied += 1
        out = beyond(ct, label)
        share = float(out.sum() / (label == TUMOR).sum())
        assert share == pytest.approx(record["outside_share"], abs=1e-6)
        off.append(share - synth.params[0]["tumors"][0]["bulge"])
        assert (ct.label[out] == 0).all()  # no other organ
        assert hu[out[0]].max() < BONE_HU and hu[out[0]].min() > -300
        assert -150 < float(hu[out[0]].median()) < 0  # fat
    assert applied >= 10 and np.median(np.abs(off)) < 0.12


def test_region_does_not_depend_on_the_box(ct):
    image, label = ct.image[0], ct.label[0]
    region = ExophyticRegion(image, label, KIDNEYS, ct.spacing, ts.HU())
    whole = region.mask_in(Box.whole(label.shape))
    assert 0.02 < float(whole.float().mean()) < 0.6
    rng = np.random.default_rng(0)
    for _ in range(6):
        start = [int(rng.integers(0, n - 9)) for n in label.shape]
        box = Box.at(start, (9, 9, 9))
        assert torch.equal(region.mask_in(box), whole[box.slices])
    assert not (whole & (label != 0)).any()


def test_region_excludes_air_bone_muscle_and_non_finite_voxels():
    hu = torch.full((40, 40, 40), -100.0)
    hu[:12], hu[28:] = -1000.0, 600.0
    hu[20, 20, 20] = float("nan")
    label = torch.zeros(hu.shape, dtype=torch.uint8)
    room = ExophyticRegion(hu, label, (1,), (1.0, 1.0, 1.0), ts.HU()).mask_in(Box.whole(hu.shape))
    assert not room[:14].any() and not room[26:].any() and not room[20, 20, 20]
    assert room[16:18].all()
    # muscle is excluded, but thin strands in fat are included
    hu = torch.full((40, 40, 40), -100.0)
    hu[:20], hu[30, 10:30] = 50.0, 60.0
    room = ExophyticRegion(hu, label, (1,), (1.0, 1.0, 1.0), ts.HU()).mask_in(Box.whole(hu.shape))
    assert not room[:16].any() and room[24:38].all()


def test_region_includes_noisy_fat_but_not_air_clipped_to_fat():
    rng = torch.Generator().manual_seed(0)
    hu = -150 + 20 * torch.randn(32, 32, 32, generator=rng)
    label = torch.zeros(hu.shape, dtype=torch.uint8)
    region = ExophyticRegion(hu, label, (1,), (1.0, 1.0, 1.0), ts.HU())
    assert region.mask_in(Box.whole(hu.shape)).float().mean() > 0.98
    hu[:16] = -1000.0
    region = ExophyticRegion(hu.clamp(min=-150.0), label, (1,), (1.0, 1.0, 1.0), ts.HU())
    room = region.mask_in(Box.whole(hu.shape))
    assert not room[:15].any() and room[20:].all()


def test_scale_that_clips_fat_keeps_tumours_inside(ct):
    scale = ts.Scaled(-20, 250, 0, 1)
    image = ((ct.image + 20) / 270).clamp(0, 1)
    synth = synthesizer(intensity=scale)
    _, label = synth(image, ct.label, spacing=ct.spacing, seed=1)
    assert not beyond(ct, label).any()


# -- what is painted there -------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
def test_tumour_is_even_on_both_sides_of_the_surface_and_fat_is_unchanged(ct, generator):
    image, label, synth = made(ct, 3, generator=generator, contrast_hu=-40, bulge=0.5)
    (record,) = synth.report
    out = beyond(ct, label)
    assert record["applied"] and record["outside_share"] > 0.3
    inner = ~torch.nn.functional.max_pool3d((~(label == TUMOR)).float(), 3, 1, 1).bool()
    organ = torch.isin(ct.label, torch.tensor(KIDNEYS))
    level = float(ct.image[organ].median())
    both = [image[inner & out].mean(), image[inner & ~out].mean()]
    for part in both:  # the requested contrast on either side of the organ's surface
        assert float(part) == pytest.approx(level - 40, abs=20)
    assert float((both[0] - both[1]).abs()) < 15
    # no dark rim around it
    shell = torch.nn.functional.max_pool3d((label == TUMOR).float(), 5, 1, 2).bool()
    fat = shell & (label == 0) & (ct.image < FAT_HU_RANGE[1])
    assert float((image - ct.image)[fat].min()) > -5
    near = (label == TUMOR).float()
    for size in ((17, 1, 1), (1, 17, 1), (1, 1, 17)):  # as one of 17^3, and sooner
        near = torch.nn.functional.max_pool3d(near, size, 1, [n // 2 for n in size])
    far = near.bool()
    assert torch.equal(image[~far], ct.image[~far])


def test_noise_beyond_the_organ_is_the_scan_s(ct):
    image, label, _ = made(ct, 3, contrast_hu=-40, bulge=0.5)
    inner = ~torch.nn.functional.max_pool3d((~(label == TUMOR)).float(), 3, 1, 1).bool()
    out = beyond(ct, label) & inner

    def noise(values, where):
        rough = values - torch.nn.functional.avg_pool3d(values, 3, 1, 1)
        return float(rough[where].std())

    organ = torch.isin(ct.label, torch.tensor(KIDNEYS))
    core = ~torch.nn.functional.max_pool3d((~organ).float(), 5, 1, 2).bool()
    assert 0.6 < noise(image, out) / noise(ct.image, core) < 1.5


# -- rules of every transform ----------------------------------------------------------------------


def test_input_is_unchanged_and_params_replay_through_json(ct):
    before = ct.image.clone(), ct.label.clone()
    image, label, synth = made(ct, 4)
    assert torch.equal(ct.image, before[0]) and torch.equal(ct.label, before[1])
    assert synth.report[0]["outside_share"] > 0
    params = json.loads(json.dumps(synth.params))
    other = ts.SynthesizeTumor("hu2023", KIDNEYS, TUMOR)  # the share is in the params
    again = other(ct.image, ct.label, spacing=ct.spacing, params=params)
    assert torch.equal(again[0], image) and torch.equal(again[1], label)


def test_batch_equals_its_samples_and_bulge_changes_no_other_draw(ct):
    synth = synthesizer(count=2)
    batch = synth(
        torch.stack([ct.image] * 2), torch.stack([ct.label] * 2), spacing=ct.spacing, seed=5
    )
    drawn = [p["tumors"] for p in synth.params]
    for k in range(2):
        alone = synth(ct.image, ct.label, spacing=ct.spacing, seed=5 + k)
        assert torch.equal(alone[0], batch[0][k]) and torch.equal(alone[1], batch[1][k])
    inside = synthesizer(count=2, bulge=False)
    inside(ct.image, ct.label, spacing=ct.spacing, seed=5)
    for one, other in zip(drawn[0], inside.params[0]["tumors"], strict=True):
        for name in ("drawn_mm", "axes", "rotation", "shape_seed", "seed", "sigma_mm"):
            assert one[name] == other[name]


@pytest.mark.parametrize(
    "options",
    [
        {"blend": "difftumor", "sigma_mm": 1.0},
        {"gate": True},
        {"mass_effect": 0.4},
        {"contrast_hu": "kidney-portal"},
        {"count": 3, "merge": True},
        {"size_mm": "kidney", "bulge": True},
    ],
)
def test_bulge_works_with_every_other_option(ct, options):
    image, label, synth = made(ct, 2, **options)
    assert image.isfinite().all()
    assert any(r["applied"] for r in synth.report)
    again = synth(ct.image, ct.label, spacing=ct.spacing, params=synth.params)
    assert torch.equal(again[0], image) and torch.equal(again[1], label)


def test_scaled_image_gets_the_same_tumour(ct):
    image, label, _ = made(ct, 6)
    scale = ts.Scaled(-1200, 1200, 0, 1)
    synth = synthesizer(intensity=scale)
    scaled, same = synth((ct.image + 1200) / 2400, ct.label, spacing=ct.spacing, seed=6)
    assert float((same != label).float().sum() / (label == TUMOR).sum()) < 0.02
    assert float((scaled * 2400 - 1200 - image).abs().median()) < 0.01


def test_separate_organ_map_raises():
    with pytest.raises(ValueError, match="bulge must be off"):
        Adapter(separate_organ=True, bulge=0.3)


def test_out_of_range_params_raise(ct):
    _, _, synth = made(ct, 4)
    bad = json.loads(json.dumps(synth.params))
    bad[0]["tumors"][0]["bulge"] = 2.0
    with pytest.raises(ValueError, match="bulge"):
        synth(ct.image, ct.label, spacing=ct.spacing, params=bad)


def test_custom_prior_may_bulge():
    prior = replace(PRIORS["liver"], bulge=(0.0, 0.5))
    assert check_bulge(True, prior) is prior
