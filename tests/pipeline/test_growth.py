"""The same tumours at another size: place and shape stay, and each mask lies within the next."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from phantoms import shared_phantom
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.phantom import LABELS
from tumorsynth.placement.growth import take_lowest

FACTORS = (0.3, 0.7, 0.9, 1.0, 1.1, 1.3, 1.7, 2.4)
TUMOR = 20
FRAMES = {
    "fine": (2.0, 2.0, 3.0),
    "isotropic": (3.0, 3.0, 3.0),
    "thick": (2.0, 2.0, 8.0),
    "coarse": (4.0, 4.0, 4.0),
}


@pytest.fixture(scope="module")
def phantoms():
    return {name: shared_phantom(spacing) for name, spacing in FRAMES.items()}


def series(synth, ct, seed, factors=FACTORS, organ_label=None, **call):
    """Masks and reports for each factor, all from the params of the first call."""
    call = {"spacing": ct.spacing, **call}
    label = ct.label if organ_label is None else organ_label
    first = synth(ct.image, label, seed=seed, **call)
    params = json.loads(json.dumps(synth.params))  # as in a file
    made = []
    for factor in factors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image, new = synth(ct.image, label, params=synth.grow(params, factor), **call)
        if factor == 1:
            assert image.equal(first[0]) and new.equal(first[1])
        made.append((image, new, list(synth.report)))
    return made


def assert_nested(made):
    masks = [new == TUMOR for _, new, _ in made]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any(), (smaller & ~larger).sum()
    counts = [int(mask.sum()) for mask in masks]
    assert counts == sorted(counts)
    return masks


ORGANS = ["liver", "left_kidney", "pancreas"]
EFFECTS = [0.0, 0.5, "auto", ts.MassEffect(0.6, capsule="fixed")]


def check_nested(ct, organ, mass_effect, seeds, factors=FACTORS):
    """Several tumours in one organ, which meet as they grow."""
    synth = ts.SynthesizeTumor(
        "hu2023", LABELS[organ], TUMOR, count=2, size_mm=(6, 22), mass_effect=mass_effect
    )
    for seed in seeds:
        masks = assert_nested(series(synth, ct, seed, factors))
        if mass_effect == 0.0:
            assert all((ct.label[mask] == LABELS[organ]).all() for mask in masks)


@pytest.mark.parametrize(
    ("frame", "organ", "mass_effect"),
    [
        *[(frame, ORGANS[k % 3], 0.0) for k, frame in enumerate(FRAMES)],
        *[(frame, ORGANS[k % 3], EFFECTS[1 + k % 3]) for k, frame in enumerate(FRAMES)],
    ],
)
def test_masks_are_nested(phantoms, frame, organ, mass_effect):
    check_nested(phantoms[frame], organ, mass_effect, [0], (0.6, 1.0, 1.3, 1.7))


@pytest.mark.slow
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("organ", ORGANS)
@pytest.mark.parametrize("mass_effect", EFFECTS)
def test_masks_are_nested_for_many_seeds(phantoms, frame, organ, mass_effect):
    check_nested(phantoms[frame], organ, mass_effect, range(1, 4))


@pytest.mark.parametrize("settings", [
    {"bulge": (0.2, 0.6), "organ_labels": LABELS["left_kidney"], "size_mm": (10, 20)},
    {"bulge": 0.4, "organ_labels": LABELS["left_kidney"], "size_mm": 16, "mass_effect": 0.4},
    {"merge": True, "count": 4, "size_mm": (8, 16)},
    {"merge": True, "count": 3, "size_mm": 14, "mass_effect": 0.5},
    {"gap_mm": 8.0, "count": 3, "size_mm": (8, 16)},
    {"size_mm": (2, 5), "count": 3},
    {"contrast_hu": "liver-portal", "size_mm": "liver", "count": 2},
])  # fmt: skip
@pytest.mark.parametrize("frame", ["fine", "thick"])
def test_masks_are_nested_with_every_option(phantoms, frame, settings):
    settings = {"organ_labels": LABELS["liver"], "count": 1, **settings}
    synth = ts.SynthesizeTumor("hu2023", tumor_label=TUMOR, **settings)
    assert_nested(series(synth, phantoms[frame], 1, (0.6, 1.0, 1.3, 2.0)))


def test_masks_are_nested_on_sheared_axes(phantoms):
    ct = phantoms["isotropic"]
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])
    affine[1, 2] = 0.9  # a tilted gantry
    for mass_effect in (0.0, 0.5):
        synth = ts.SynthesizeTumor(
            "hu2023", 1, TUMOR, count=2, size_mm=(10, 20), mass_effect=mass_effect
        )
        made = series(synth, ct, 3, (0.6, 1.0, 1.5), spacing=None, affine=affine)
        assert_nested(made)


def test_size_place_and_texture(phantoms):
    ct = phantoms["fine"]
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1, size_mm=14)
    made = series(synth, ct, 5, (0.8, 1.0, 1.3, 1.7))
    (first,) = made[1][2]
    for factor, (_, _, report) in zip((0.8, 1.0, 1.3, 1.7), made, strict=True):
        (record,) = report
        assert record["diameter_mm"] == pytest.approx(14 * factor, rel=0.05)
        assert record["requested_diameter_mm"] == pytest.approx(14 * factor)
        assert record["seed"] == first["seed"]
        assert math.dist(record["centre_mm"], first["centre_mm"]) < 4
        assert record["hu_change"] == pytest.approx(first["hu_change"], abs=12)
        if factor == 1:
            assert "growth" not in record
        else:
            growth = record["growth"]
            assert growth["requested_first_diameter_mm"] == pytest.approx(14)
            assert growth["requested_factor"] == pytest.approx(factor) and growth["has_room"]
            assert growth["first_diameter_mm"] == first["diameter_mm"]
            assert growth["reached_factor"] == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("mass_effect", [0.0, 0.5, "auto"])
@pytest.mark.parametrize("frame", ["isotropic", "thick", "coarse"])
def test_the_report_holds_what_the_labels_hold(phantoms, frame, mass_effect):
    """Also where few voxels are all that there are to tell one size from another."""
    ct = phantoms[frame]
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1, size_mm=12, mass_effect=mass_effect)
    factors = (0.6, 1.0, 1.7, 2.0)
    made = series(synth, ct, 9, factors)
    voxels = {
        factor: int((new == TUMOR).sum()) for factor, (_, new, _) in zip(factors, made, strict=True)
    }
    (first,) = made[factors.index(1.0)][2]
    for factor, (_, _, report) in zip(factors, made, strict=True):
        if factor == 1:
            continue
        (record,) = report
        growth = record["growth"]
        assert growth["first_diameter_mm"] == first["diameter_mm"]
        reached = (voxels[factor] / voxels[1.0]) ** (1 / 3)
        assert growth["reached_factor"] == pytest.approx(reached)
        assert record["diameter_mm"] == pytest.approx(first["diameter_mm"] * reached)


def test_the_shape_stays(phantoms):
    """Scaled back, a grown tumour covers the first one but for the rounding to voxels."""
    ct = ts.make_phantom(spacing=(1.0, 1.0, 1.0), shape=(96, 96, 96))
    label = torch.ones_like(ct.label)
    image = 100 + 5 * torch.randn(ct.image.shape, generator=torch.Generator().manual_seed(0))
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1, size_mm=18)
    _, small = synth(image, label, spacing=(1, 1, 1), seed=1)
    centre = torch.tensor(synth.params[0]["tumors"][0]["centre"]).float()
    _, large = synth(image, label, spacing=(1, 1, 1), params=synth.grow(synth.params, 2.0))
    at = ((large[0] == TUMOR).nonzero() - centre) / 2 + centre
    back = torch.zeros_like(small[0], dtype=torch.bool)
    x, y, z = at.round().long().unbind(1)
    back[x, y, z] = True
    both = (back & (small[0] == TUMOR)).sum() * 2 / (back.sum() + (small[0] == TUMOR).sum())
    assert both > 0.85


def test_growing_twice_is_growing_once(phantoms):
    ct = phantoms["isotropic"]
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=2, size_mm=(8, 14), mass_effect="auto")
    image, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=2)
    params = synth.params
    once = synth(ct.image, ct.label, spacing=ct.spacing, params=synth.grow(params, 1.5))
    steps = synth.grow(synth.grow(params, 3.0), 0.5)
    twice = synth(ct.image, ct.label, spacing=ct.spacing, params=steps)
    assert once[1].equal(twice[1])
    back = synth.grow(synth.grow(params, 1.7), 1 / 1.7)
    again = synth(ct.image, ct.label, spacing=ct.spacing, params=back)
    assert again[1].equal(label) and again[0].equal(image)
    assert synth.grow(params, 1) == params
    replay = synth(ct.image, ct.label, spacing=ct.spacing, params=steps)
    assert replay[0].equal(twice[0]) and synth.params == steps


def test_a_tumour_without_room_stays_in_the_organ_and_says_so():
    label = torch.zeros(1, 48, 48, 48, dtype=torch.int16)
    label[0, 12:36, 12:36, 12:36] = 1
    image = torch.where(label == 1, 110.0, -90.0)
    image = image + 5 * torch.randn(label.shape, generator=torch.Generator().manual_seed(0))
    synth = ts.SynthesizeTumor("hu2023", 1, 2, count=1, size_mm=16)
    _, first = synth(image, label, spacing=(1, 1, 1), seed=0)
    params = synth.params
    with pytest.warns(UserWarning, match="has no room for 3 times its diameter of 16.0 mm"):
        _, large = synth(image, label, spacing=(1, 1, 1), params=synth.grow(params, 3))
    (record,) = synth.report
    growth = record["growth"]
    assert (
        growth["requested_factor"] == 3
        and 1 < growth["reached_factor"] < 2.9
        and not growth["has_room"]
    )
    assert (label[large == 2] == 1).all() and not ((first == 2) & (large != 2)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a transform
        synth(image, label, spacing=(1, 1, 1), params=synth.grow(params, 3))


def test_tumours_keep_their_gap_as_they_grow():
    label = torch.ones(1, 64, 64, 40, dtype=torch.int16)
    image = 110 + 5 * torch.randn(label.shape, generator=torch.Generator().manual_seed(0))
    synth = ts.SynthesizeTumor("hu2023", 1, 2, count=3, size_mm=10, gap_mm=3.0)
    synth(image, label, spacing=(1, 1, 1), seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, large = synth(image, label, spacing=(1, 1, 1), params=synth.grow(synth.params, 2.5))
    from scipy import ndimage

    parts, count = ndimage.label((large[0] == 2).numpy(), np.ones((3, 3, 3)))
    assert count == sum(record["applied"] for record in synth.report) == 3
    for k in range(1, 4):
        far = ndimage.distance_transform_cdt(parts != k, "chessboard")
        assert far[(parts > 0) & (parts != k)].min() > 3


def test_a_diffusion_generator_and_a_batch(phantoms):
    ct = phantoms["isotropic"]
    synth = ts.SynthesizeTumor(tiny_generator(), 1, TUMOR, count=1, size_mm=(10, 16))
    image = torch.stack([ct.image, ct.image + 1])
    label = torch.stack([ct.label, ct.label])
    _, first = synth(image, label, spacing=ct.spacing, seed=0)
    _, later = synth(image, label, spacing=ct.spacing, params=synth.grow(synth.params, 1.4))
    for b in range(2):
        assert not ((first[b] == TUMOR) & (later[b] != TUMOR)).any()
        assert (later[b] == TUMOR).sum() > 1.5 * (first[b] == TUMOR).sum()


def test_what_the_gate_rejected_stays_rejected(phantoms):
    ct = phantoms["isotropic"]
    settings = {"organ_labels": 1, "tumor_label": TUMOR, "count": 4, "size_mm": (8, 12)}
    free = ts.SynthesizeTumor("hu2023", **settings, gate=ts.Gate(tries=1, visibility=None))
    free(ct.image, ct.label, spacing=ct.spacing, seed=1)
    levels = sorted(record["scores"]["contrast_hu"] for record in free.report)
    gate = ts.Gate(tries=1, visibility=None, contrast_hu=(-1000, sum(levels[1:3]) / 2))
    synth = ts.SynthesizeTumor("hu2023", **settings, gate=gate)
    synth(ct.image, ct.label, spacing=ct.spacing, seed=1)
    before = [record["applied"] for record in synth.report]
    assert 0 < sum(before) < 4
    synth(ct.image, ct.label, spacing=ct.spacing, params=synth.grow(synth.params, 1.3))
    assert [record["applied"] for record in synth.report] == before


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf, True, "1.3", None, (1, 2), 50])
def test_bad_factors_are_named(phantoms, factor):
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1)
    with pytest.raises(ValueError, match="factor must be the new diameter over the old one"):
        synth.grow([], factor)


def test_bad_params_are_named(phantoms):
    ct = phantoms["coarse"]
    synth = ts.SynthesizeTumor("hu2023", 1, TUMOR, count=1, size_mm=20)
    for wrong in (None, "params", [3], [{"applied": True}]):
        with pytest.raises(ValueError, match="params must hold one record"):
            synth.grow(wrong, 1.3)
    synth(ct.image, ct.label, spacing=ct.spacing, seed=0)
    params = synth.params
    for _ in range(3):
        if params[0]["tumors"][0]["diameter_mm"] * 10 > 1000:
            break
        params = synth.grow(params, 10)
    with pytest.raises(ValueError, match="a tumour must have 0.001 to 1000 mm, but factor=10"):
        synth.grow(params, 10)
    empty = [{"seed": 3, "applied": False, "code": "no_organ", "reason": "no organ", "tumors": []}]
    assert synth.grow(empty, 1.3) == empty


def test_take_lowest_is_a_beginning_of_one_sequence():
    """Any level, with minima anywhere: the sizes are nested, and connected."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    for trial in range(12):
        level = ndimage.gaussian_filter(rng.normal(size=(14, 15, 16)), 0.3 * trial % 2)
        level[rng.random(level.shape) < 0.2] = np.inf
        start = np.zeros(level.shape, bool)
        start[6:8, 6:8, 6:8] = True
        level[start] = np.inf
        before = start
        for n in (1, 8, 9, 20, 60, 200, 900, 10_000):
            mask = take_lowest(level, start, n)
            assert not (before & ~mask).any()
            assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1
            assert mask.sum() == max(n, 8) or n > 900
            assert np.isfinite(level[mask & ~start]).all()
            before = mask
