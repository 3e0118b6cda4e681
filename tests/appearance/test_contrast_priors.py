"""Contrast by organ and phase: what is drawn, what is painted, and that params repeat it."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.contrast import FLOOR_HU, core
from tumorsynth.appearance.contrast_priors import (
    CONTRAST_PRIORS,
    ContrastPrior,
    get_contrast_prior,
    structured,
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


# -- drawing ---------------------------------------------------------------------------------------


def test_kinds_come_as_often_as_their_shares():
    prior = ContrastPrior(hypo=(-50, -20), iso=(-5, 5), hyper=(15, 30), shares=(2, 1, 1))
    drawn = [prior.draw(seed, 15.0, 100.0)[0] for seed in range(400)]
    for low, high, share in ((-50, -20, 0.5), (-5, 5, 0.25), (15, 30, 0.25)):
        found = sum(low <= d <= high for d in drawn) / len(drawn)
        assert found == pytest.approx(share, abs=0.07)


def test_rims_and_cores_as_often_as_asked_and_cores_in_large_tumours_alone():
    prior = ContrastPrior(rim_share=0.5, core_share=1.0)
    small = [prior.draw(seed, 29.0, 100.0)[1] for seed in range(200)]
    large = [prior.draw(seed, 30.0, 100.0)[1] for seed in range(200)]
    assert all(core_hu == 0 for _, core_hu in small)
    assert all(-35 <= core_hu <= -15 for _, core_hu in large)
    assert 0.4 < sum(rim > 0 for rim, _ in small) / 200 < 0.6
    assert {rim for rim, _ in small} == {rim for rim, _ in large}  # the size draws nothing


@pytest.mark.parametrize("name", CONTRAST_PRIORS)
@pytest.mark.parametrize("level", [25.0, 60.0, 110.0, 180.0])
def test_never_fluid_dark_whatever_the_tissue(name, level):
    prior = CONTRAST_PRIORS[name]
    drawn = [level + prior.draw(seed, 40.0, level)[0] for seed in range(100)]
    assert min(drawn) >= FLOOR_HU and max(drawn) < 270
    fatty = [prior.draw(seed, 12.0, -20.0)[0] for seed in range(50)]
    assert min(fatty) >= 0 or max(fatty) > 0 or max(map(abs, fatty)) < 1  # never darker than fat


def test_fainter_where_the_organ_is_less_enhanced():
    prior = get_contrast_prior("liver")
    assert prior is CONTRAST_PRIORS["liver-portal"]
    assert prior.draw(3, 15, 55.0)[0] == pytest.approx(0.5 * prior.draw(3, 15, 110.0)[0])


def test_names_and_ranges_that_are_none():
    with pytest.raises(ValueError, match="must be one of .*kidney-arterial.*got 'spleen'"):
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
    made = structured(change, mask, (20.0, -30.0), seed=3)
    inside = core(mask[None, None])[0, 0]
    assert float(made[inside].mean()) == pytest.approx(-40, abs=0.1)
    rim = ball(16) & ~ball(14)
    body, middle = ball(11) & ~ball(10), ball(4)
    assert float(made[rim].mean()) > float(made[body].mean()) + 8
    assert float(made[middle].mean()) < float(made[body].mean()) - 14
    assert torch.equal(structured(change, mask, (0.0, 0.0), seed=3), change)
    assert float((made - change)[~ball(21)].abs().max()) < 1e-3
    assert not torch.equal(made, structured(change, mask, (20.0, -30.0), seed=4))


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["hu2023", "tiny"])
def test_one_line_with_a_prior_repeats_and_replays(generator):
    image, label = scan()
    prior = ContrastPrior(shares=(1, 0, 1), rim_share=1.0, core_share=1.0, core_from_mm=15.0)
    synth = ts.SynthesizeTumor(generator, count=2, size_mm=(12, 24), contrast_hu=prior)
    new, new_label = synth(image, label, seed=3)
    twice, _ = synth(image, label, seed=3)
    assert torch.equal(new, twice)
    made = [r for r in synth.report if r["applied"]]
    assert made and all(
        -50 <= r["contrast_hu"] <= -20 or 10 <= r["contrast_hu"] <= 35 for r in made
    )
    drawn = [tumor["structure_hu"] for tumor in synth.params[0]["tumors"]]
    assert all(rim > 0 for rim, _ in drawn)
    params = json.loads(json.dumps(synth.params))
    other = ts.SynthesizeTumor(generator, count=2, contrast_hu=10)
    again, again_label = other(image, label, params=params)
    assert torch.equal(again, new) and torch.equal(again_label, new_label)


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
    made, _ = synth(*both, seed=[7, 8])
    for k in range(2):
        single, _ = synth(both[0][k], both[1][k], seed=7 + k)
        assert torch.equal(single, made[k])


def test_the_gate_draws_the_contrast_anew():
    image, label = scan()
    gate = ts.gate.Gate(contrast_hu=(0.0, 100.0), visibility=None, noise_ratio=None, tries=10)
    prior = ContrastPrior(shares=(1, 0, 1))
    synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=14, contrast_hu=prior, gate=gate)
    for seed in range(4):
        new, _ = synth(image, label, seed=seed)
        (record,) = synth.report
        assert record["applied"] and record["contrast_hu"] > 0
        again, _ = synth(image, label, params=synth.params)
        assert torch.equal(again, new)
