"""Params of one phase in another phase of the same patient: the same voxels, its own contrast."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from phantoms import shared_phantom
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.generators.config import ContrastConfig

TUMOR = 20

CONTRASTS = ("contrast_hu", "structure_hu", "heterogeneity_hu")  # which scale with the tissue


def phases(seed=0):
    """A portal and an arterial phase: the arterial has a darker liver, bright vessels and noise of
    its own; here and there a value that is no tissue."""
    ct = shared_phantom((3.0, 3.0, 3.0))
    rng = torch.Generator().manual_seed(seed)
    liver = ct.label == 1
    arterial = ct.image + 8 * torch.randn(ct.image.shape, generator=rng)
    arterial[liver] -= 40
    outliers = liver & (torch.rand(ct.image.shape, generator=rng) < 0.02)
    arterial[outliers] = 700.0
    arterial[~liver & (ct.label != 3) & (ct.image > 100) & (ct.image < 240)] += 150
    return ct, arterial


@pytest.mark.parametrize(
    "settings",
    [
        {"generator": "hu2023"},
        {"generator": "hu2023", "mass_effect": 0.5},
        {"generator": "hu2023", "organ_labels": 3, "bulge": 0.4, "size_mm": 14},
        {"generator": "liver-early", "count": 1},
        {"generator": "liver-early", "count": 1, "contrast_hu": "liver-portal", "mass_effect": 0.4},
        {"generator": tiny_generator(contrast=ContrastConfig())},
    ],
)
def test_the_same_voxels_with_the_other_phases_contrast(settings):
    if settings["generator"] == "liver-early":
        from tumorsynth.generators.store import bundled_names

        if "liver-early" not in bundled_names():
            pytest.skip("needs the weights of liver-early")
    ct, arterial = phases()
    defaults = {"organ_labels": 1, "tumor_label": TUMOR, "count": 2, "size_mm": (10, 18)}
    settings = {**defaults, **settings}
    synth = ts.SynthesizeTumor(**settings)
    _, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=3)
    params = json.loads(json.dumps(synth.params))
    assert (label == TUMOR).any()
    image, other = synth(
        arterial,
        ct.label,
        spacing=ct.spacing,
        params=params,
        contrast_hu=(30, 35),
        first_phase=ct.image,
    )
    assert other.equal(label)  # the tumours, and what mass effect moved
    for record in synth.report:
        # hu_change counts the values that were covered, as it does vessels
        assert 30 <= record["contrast_hu"] <= 35 and record["visible_contrast_hu"] > 10
    assert not image.equal(arterial)
    seeds = [one["seed"] for one in params[0]["tumors"]]
    assert [one["seed"] for one in synth.params[0]["tumors"]] == seeds
    # what the call gives repeats it, with the same first phase
    again, label_again = synth(
        arterial, ct.label, spacing=ct.spacing, params=synth.params, first_phase=ct.image
    )
    assert again.equal(image) and label_again.equal(label)


def test_priors_depend_on_the_other_phase():
    ct, arterial = phases()
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1, size_mm=16, contrast_hu="liver-portal")
    signs = set()
    for seed in range(14):
        synth(ct.image, ct.label, spacing=ct.spacing, seed=seed)
        params = synth.params
        call = {"spacing": ct.spacing, "params": params, "first_phase": ct.image}
        synth(arterial, ct.label, contrast_hu="liver-arterial", **call)
        (one,), (first,) = synth.params[0]["tumors"], params[0]["tumors"]
        assert one["contrast_hu"] != first["contrast_hu"]
        kept = {k: v for k, v in first.items() if k not in CONTRASTS}
        assert {k: one[k] for k in kept} == kept
        signs.add(one["contrast_hu"] > 8)
    assert signs == {True, False}  # some arterial tumours are brighter


def test_a_raised_contrast_does_not_stay():
    ct, arterial = phases()
    synth = ts.SynthesizeTumor(tiny_generator(), 1, TUMOR, count=1, size_mm=12)
    synth(ct.image, ct.label, spacing=ct.spacing, seed=1)
    params = synth.params
    params[0]["tumors"][0]["raised_hu"] = -44.0
    call = {"spacing": ct.spacing, "params": params, "first_phase": ct.image}
    synth(arterial, ct.label, contrast_hu=-20, **call)
    assert "raised_hu" not in synth.params[0]["tumors"][0]
    assert synth.report[0]["contrast_hu"] == -20


def test_growth_and_phase_go_together():
    ct, arterial = phases()
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1, size_mm=12)
    synth(ct.image, ct.label, spacing=ct.spacing, seed=1)
    grown = synth.grow(synth.params, 1.4)
    _, label = synth(ct.image, ct.label, spacing=ct.spacing, params=grown)
    call = {"spacing": ct.spacing, "params": grown, "first_phase": ct.image}
    _, other = synth(arterial, ct.label, contrast_hu=25, **call)
    growth = synth.report[0]["growth"]
    assert other.equal(label) and growth["requested_factor"] == pytest.approx(1.4)
    assert growth["reached_factor"] == pytest.approx(1.4, abs=0.1)


def test_first_phase_stays_as_it_is():
    ct, arterial = phases()
    before = ct.image.clone(), arterial.clone(), ct.label.clone()
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=2, size_mm=16, mass_effect=0.5)
    synth(ct.image, ct.label, spacing=ct.spacing, seed=1)
    call = {"spacing": ct.spacing, "params": synth.params, "first_phase": ct.image}
    synth(arterial, ct.label, contrast_hu=25, **call)
    assert all(map(torch.equal, before, (ct.image, arterial, ct.label)))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"contrast_hu": -30}, "contrast_hu of a call must go with params"),
        ({"first_phase": "image"}, "first_phase of a call must go with params"),
        ({"params": True, "contrast_hu": "liver-atrial"}, "a contrast prior must be one of"),
        ({"params": True, "contrast_hu": (5, -5)}, "contrast_hu must be"),
        ({"params": True, "first_phase": "ct.nii.gz"}, "first_phase must be a floating-point"),
        ({"params": True, "first_phase": torch.zeros(1, 4, 4, 4)}, "must have the image's shape"),
        ({"params": True, "first_phase": np.zeros(3)}, "first_phase must be a floating-point"),
    ],
)
def test_bad_calls_are_named(call, error):
    ct, _ = phases()
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1, size_mm=14)
    synth(ct.image, ct.label, spacing=ct.spacing, seed=0)
    if call.get("params"):
        call = {**call, "params": synth.params}
    with pytest.raises((ValueError, TypeError), match=error):
        synth(ct.image, ct.label, spacing=ct.spacing, **call)


def test_phases_on_different_grids_are_refused():
    data = pytest.importorskip("monai.data", reason="needs MONAI's MetaTensor")
    ct, arterial = phases()
    near, far = np.diag([3.0, 3, 3, 1]), np.diag([2.0, 2, 2, 1])
    image = data.MetaTensor(ct.image, affine=near)
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1, size_mm=14)
    synth(image, ct.label, seed=0)
    other = data.MetaTensor(arterial, affine=far)
    with pytest.raises(ValueError, match="first_phase"):
        synth(other, ct.label, params=synth.params, contrast_hu=20, first_phase=image)


def test_monai_transforms_replay_growth_and_phases():
    monai = pytest.importorskip("tumorsynth.monai", reason="needs MONAI")
    ct, arterial = phases()
    settings = {"organ_labels": 1, "tumor_label": TUMOR, "count": 1, "size_mm": 14}
    settings |= {"generator": "hu2023", "spacing": ct.spacing}
    array = monai.RandSynthesizeTumor(prob=1.0, **settings).set_random_state(0)
    image, label = array(ct.image.numpy(), ct.label.numpy())
    params = array.params
    again = array.replay(ct.image.numpy(), ct.label.numpy(), params=params)
    assert (again[0] == image).all() and isinstance(again[0], np.ndarray)
    _, later = array.replay(ct.image.numpy(), ct.label.numpy(), params=array.grow(params, 1.5))
    assert ((later == TUMOR) >= (label == TUMOR)).all() and (later != label).any()
    transform = monai.RandSynthesizeTumord("ct", "seg", prob=0.0, **settings)
    data = {"ct": arterial.short(), "seg": ct.label}
    made = transform.replay(
        data, params=params, contrast_hu="liver-arterial", first_phase=ct.image.numpy()
    )
    assert (made["seg"].numpy() == label).all() and not made["ct"].equal(data["ct"])
    batch = monai.BatchSynthesizeTumord("ct", "seg", prob=0.0, **settings)
    both = {"ct": torch.stack([ct.image] * 2), "seg": torch.stack([ct.label] * 2)}
    grown = batch.replay(both, params=batch.grow(params * 2, 1.5))
    assert all((one.numpy() == later).all() for one in grown["seg"])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"generator": tiny_generator()}, None),
        ({"generator": "hu2023"}, "tissue_range"),
        ({"mass_effect": 0.5}, "mass_effect"),
        ({"organ_labels": 3, "bulge": 0.4, "size_mm": 14}, "bulge"),
    ],
)
def test_the_first_phase_is_required_where_voxels_depend_on_it(settings, word):
    ct, arterial = phases()
    defaults = {"generator": "hu2023", "organ_labels": 1, "count": 1, "size_mm": 14}
    synth = ts.SynthesizeTumor(**defaults | settings, tumor_label=TUMOR, any_tissue=True)
    _, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=0)
    call = {"spacing": ct.spacing, "params": synth.params, "contrast_hu": 20}
    if word is None:
        assert synth(arterial, ct.label, **call)[1].equal(label)
        return
    with pytest.raises(ValueError, match=f"first_phase must be given .*{word}"):
        synth(arterial, ct.label, **call)
