"""Contrast by organ and phase: sampling, painting, replay."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.appearance.contrast import FLUID_HU, core
from tumorsynth.appearance.contrast_priors import (
    CONTRAST_PRIORS,
    ContrastPrior,
    add_structure,
    get_contrast_prior,
)


def ball(radius, side=48):
    axes = torch.meshgrid(*[torch.arange(side) - side // 2] * 3, indexing="ij")
    return sum(a.square() for a in axes) <= radius**2


def scan(level=110.0, side=64):
    rng = torch.Generator().manual_seed(1)
    image = level + 8 * torch.randn(1, side, side, side, generator=rng)
    label = torch.zeros(1, side, side, side, dtype=torch.uint8)
    label[:, 4:-4, 4:-4, 4:-4] = 1
    return image, label


# -- sampling --------------------------------------------------------------------------------------


def test_kinds_are_as_frequent_as_their_shares():
    prior = ContrastPrior(hypo=(-50, -20), iso=(-5, 5), hyper=(15, 30), shares=(2, 1, 1))
    contrasts = [prior.sample(seed, 15.0, 100.0).contrast_hu for seed in range(400)]
    for low, high, share in ((-50, -20, 0.5), (-5, 5, 0.25), (15, 30, 0.25)):
        frequency = sum(low <= hu <= high for hu in contrasts) / len(contrasts)
        assert frequency == pytest.approx(share, abs=0.07)


def test_rims_and_cores_are_as_frequent_as_their_shares_and_cores_need_large_tumours():
    prior = ContrastPrior(rim_share=0.5, core_share=1.0)
    small = [prior.sample(seed, 29.0, 100.0).structure_hu for seed in range(200)]
    large = [prior.sample(seed, 30.0, 100.0).structure_hu for seed in range(200)]
    assert all(core_hu == 0 for _, core_hu in small)
    assert all(-35 <= core_hu <= -15 for _, core_hu in large)
    assert 0.4 < sum(rim > 0 for rim, _ in small) / 200 < 0.6
    assert {rim for rim, _ in small} == {rim for rim, _ in large}  # independent of the size


@pytest.mark.parametrize("name", CONTRAST_PRIORS)
@pytest.mark.parametrize("level", [25.0, 60.0, 110.0, 180.0])
def test_no_tumour_is_as_dark_as_fluid_in_any_tissue(name, level):
    prior = CONTRAST_PRIORS[name]
    levels = [level + prior.sample(seed, 40.0, level).contrast_hu for seed in range(100)]
    assert min(levels) >= FLUID_HU and max(levels) < 270
    fatty = [prior.sample(seed, 12.0, -20.0).contrast_hu for seed in range(50)]
    assert min(fatty) >= 0 or max(fatty) > 0 or max(map(abs, fatty)) < 1  # never darker than fat


def test_fainter_where_the_organ_is_less_enhanced():
    prior = get_contrast_prior("liver")
    assert prior is CONTRAST_PRIORS["liver-portal"]
    unenhanced, enhanced = (prior.sample(3, 15, level).contrast_hu for level in (55.0, 110.0))
    assert unenhanced == pytest.approx(0.5 * enhanced)


def test_invalid_names_and_ranges_are_refused():
    words = "must be one of .*kidney-arterial.*got 'spleen'.*a tumorsynth.ContrastPrior"
    with pytest.raises(ValueError, match=words):
        ts.SynthesizeTumor(contrast_hu="spleen")
    with pytest.raises(ValueError, match="hypo must be"):
        ContrastPrior(hypo=(-20, -50))
    with pytest.raises(ValueError, match="shares must be"):
        ContrastPrior(shares=(0, 0, 0))
    with pytest.raises(ValueError, match="rim_share must lie"):
        ContrastPrior(rim_share=2)


# -- painting --------------------------------------------------------------------------------------


def test_a_rim_is_bright_a_core_dark_and_the_mean_stays():
    mask = ball(17)
    change = -40.0 * mask.float()
    structured = add_structure(change, mask, (20.0, -30.0), seed=3)
    inside = core(mask[None, None])[0, 0]
    assert float(structured[inside].mean()) == pytest.approx(-40, abs=0.1)
    rim = ball(16) & ~ball(14)
    body, middle = ball(11) & ~ball(10), ball(4)
    assert float(structured[rim].mean()) > float(structured[body].mean()) + 8
    assert float(structured[middle].mean()) < float(structured[body].mean()) - 14
    assert torch.equal(add_structure(change, mask, (0.0, 0.0), seed=3), change)
    assert float((structured - change)[~ball(21)].abs().max()) < 1e-3
    assert not torch.equal(structured, add_structure(change, mask, (20.0, -30.0), seed=4))


def test_lumps_vary_a_tumour_by_what_is_asked_and_leave_its_mean():
    mask = ball(17)
    change = -40.0 * mask.float()
    inside = core(mask[None, None])[0, 0]
    for asked in (5.0, 15.0):
        lumpy = add_structure(change, mask, (0.0, 0.0), 3, asked, diameter_mm=34.0)
        assert float(lumpy[inside].mean()) == pytest.approx(-40, abs=0.1)
        assert float(lumpy[inside].std()) == pytest.approx(asked, rel=0.35)
        slow = gaussian_filter(lumpy - change, [2.0] * 3)
        assert float(slow[inside].std()) > 0.6 * float(lumpy[inside].std())  # they are no noise
    again = add_structure(change, mask, (0.0, 0.0), 3, 15.0, diameter_mm=34.0)
    other = add_structure(change, mask, (0.0, 0.0), 4, 15.0, diameter_mm=34.0)
    assert torch.equal(again, lumpy) and not torch.equal(other, lumpy)


def test_large_tumours_are_more_heterogeneous_and_other_numbers_stay():
    prior = ContrastPrior(heterogeneity=(6.0, 12.0))
    for seed in range(20):
        sizes = [prior.sample(seed, mm, 100.0).heterogeneity_hu for mm in (10.0, 30.0, 60.0)]
        assert 6 <= sizes[1] == sizes[2] <= 12 and sizes[0] == pytest.approx(sizes[1] / 3)
        assert prior.sample(seed, 40.0, 100.0)[:2] == ContrastPrior().sample(seed, 40.0, 100.0)[:2]
    assert ContrastPrior().sample(0, 40.0, 100.0).heterogeneity_hu == 0
    with pytest.raises(ValueError, match="heterogeneity must be .low, high. in HU, .* 0 to 500"):
        ContrastPrior(heterogeneity=(-1, 4))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heterogeneity", 5),
        ("heterogeneity", None),
        ("heterogeneity", ("3", "12")),
        ("heterogeneity", (400, 600)),
        ("rim", 10),
        ("hypo", (-20, -50)),
        ("iso", (math.nan, 1)),
        ("shares", 3),
        ("shares", (1, 0, math.inf)),
        ("rim_share", "1"),
        ("core_share", None),
        ("core_from_mm", -5),
        ("core_from_mm", None),
        ("reference_hu", 0),
        ("reference_hu", math.nan),
        ("floor_hu", "x"),
    ],
)
def test_bad_values_are_named_with_a_fix(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*; (pass|leave)"):
        ContrastPrior(**{name: value})


def test_ranges_may_be_tensors_or_arrays_and_params_stay_json():
    prior = ContrastPrior(hypo=np.array([-50.0, -20.0]), rim=torch.tensor([8.0, 20.0]).tolist())
    assert prior.hypo == (-50.0, -20.0) and type(prior.hypo[0]) is float
    json.dumps(prior.sample(0, 20.0, 110.0))


def test_a_bright_tissue_does_not_scale_a_contrast_beyond_what_params_hold():
    prior = ContrastPrior(
        hyper=(1400, 1500), shares=(0, 0, 1), rim=(1400, 1500), rim_share=1, reference_hu=50
    )
    sampled = prior.sample(0, 40.0, 110.0)
    assert sampled.contrast_hu == 1500 and sampled.structure_hu[0] == 1500
    most = ContrastPrior(heterogeneity=(500, 500), reference_hu=50).sample(0, 40.0, 110.0)
    assert most.heterogeneity_hu == 500


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["hu2023", "tiny"])
def test_a_call_with_a_prior_repeats_and_replays(generator):
    image, label = scan()
    prior = ContrastPrior(
        shares=(1, 0, 1),
        rim_share=1.0,
        core_share=1.0,
        core_from_mm=15.0,
        heterogeneity=(5.0, 15.0),
    )
    synth = ts.SynthesizeTumor(generator, count=2, size_mm=(12, 24), contrast_hu=prior)
    new, new_label = synth(image, label, seed=3)
    twice, _ = synth(image, label, seed=3)
    assert torch.equal(new, twice)
    contrasts = [r["contrast_hu"] for r in synth.report if r["applied"]]
    assert contrasts and all(-50 <= hu <= -20 or 10 <= hu <= 35 for hu in contrasts)
    structures = [tumor["structure_hu"] for tumor in synth.params[0]["tumors"]]
    assert all(rim > 0 for rim, _ in structures)
    params = json.loads(json.dumps(synth.params))
    other = ts.SynthesizeTumor(generator, count=2, contrast_hu=10)
    again, again_label = other(image, label, params=params)
    assert torch.equal(again, new) and torch.equal(again_label, new_label)


def test_a_rim_and_a_core_that_cancel_are_visible_all_the_same():
    image, label = scan()
    seen = {}
    for name, share in {"even": 0.0, "structured": 1.0}.items():
        prior = ContrastPrior(
            shares=(0, 1, 0),
            iso=(-1.0, 1.0),
            rim=(24.0, 25.0),
            rim_share=share,
            core_hu=(-35.0, -34.0),
            core_share=share,
            core_from_mm=15.0,
        )
        synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=26, contrast_hu=prior)
        synth(image, label, seed=3)
        (seen[name],) = synth.report
    even, structured = seen["even"], seen["structured"]
    by_mean = even["visibility"] * structured["hu_change"] / even["hu_change"]
    assert structured["visibility"] > 1.4 * by_mean


def test_the_masks_do_not_depend_on_the_prior():
    image, label = scan()
    _, plain = ts.SynthesizeTumor("hu2023", count=2)(image, label, seed=5)
    _, prior = ts.SynthesizeTumor("hu2023", count=2, contrast_hu="liver-arterial")(
        image, label, seed=5
    )
    assert torch.equal(plain, prior)


def test_a_batch_is_its_samples_with_a_prior_too():
    image, label = scan(side=48)
    both = torch.stack([image, image + 5]), torch.stack([label, label])
    synth = ts.SynthesizeTumor("hu2023", contrast_hu="kidney", size_mm=12)
    batch, _ = synth(*both, seed=[7, 8])
    for k in range(2):
        single, _ = synth(both[0][k], both[1][k], seed=7 + k)
        assert torch.equal(single, batch[k])


def test_the_gate_samples_the_contrast_again():
    image, label = scan()
    gate = ts.Gate(contrast_hu=(0.0, 100.0), visibility=None, noise_ratio=None, tries=10)
    prior = ContrastPrior(shares=(1, 0, 1))
    synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=14, contrast_hu=prior, gate=gate)
    for seed in range(4):
        new, _ = synth(image, label, seed=seed)
        (record,) = synth.report
        assert record["applied"] and record["contrast_hu"] > 0
        again, _ = synth(image, label, params=synth.params)
        assert torch.equal(again, new)
