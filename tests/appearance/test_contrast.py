"""Contrast of a tumour: measured as defined, sampled as configured, painted as requested."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tiny import tiny_crop, tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.contrast import (
    FLUID_HU,
    MIN_DARKER_HU,
    ContrastConfig,
    check_contrast,
    contrast_of,
    core,
    requested_contrast,
    sample_contrast,
    sampled_contrast,
    shift_to_contrast,
)
from tumorsynth.appearance.surroundings import (
    MAX_LEVEL_BIAS_HU,
    Surroundings,
    grown,
    level_around,
    similar_level_around,
)

TISSUE = (20.0, 220.0)
SIDE = 40


def volume(level=100.0, noise=0.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return level + noise * torch.randn(1, 1, SIDE, SIDE, SIDE, generator=rng)


def tumor(radius=8.0):
    axes = torch.meshgrid(*[torch.arange(SIDE) - SIDE // 2] * 3, indexing="ij")
    return (sum(a.square() for a in axes) <= radius**2)[None, None]


# -- measuring ------------------------------------------------------------------------------------


def test_level_ignores_the_tumour_and_other_tissue_nearby():
    hu, mask = volume(100.0, noise=10.0), tumor()
    hu[..., : SIDE // 2 - 9] = -100.0  # fat on one side, right beside the tumour
    hu[mask] = 20.0
    hu[0, 0, 0] = 1000.0  # bone, far away
    assert float(level_around(hu, mask, TISSUE)) == pytest.approx(100, abs=1)


def test_level_outside_the_tissues_range_is_still_the_surroundings():
    hu = volume(-820.0)
    assert float(level_around(hu, tumor(), TISSUE)) == pytest.approx(-820)


def test_level_of_a_crop_that_the_tumour_fills_is_finite():
    hu = volume(60.0)
    assert math.isfinite(float(level_around(hu, tumor(40.0), TISSUE)))


def test_every_sample_is_measured_on_its_own():
    hu = torch.cat([volume(100.0), volume(50.0)])
    mask = torch.cat([tumor(8.0), tumor(4.0)])
    levels = level_around(hu, mask, TISSUE)
    assert levels.tolist() == [100.0, 50.0]
    hu[mask] -= 30.0
    assert contrast_of(hu, mask, levels).tolist() == pytest.approx([-30.0, -30.0])


def test_core_is_the_tumour_without_its_rim_unless_little_would_be_left():
    big, small = tumor(8.0), tumor(2.0)
    assert int(core(big).sum()) < int(big.sum())
    assert bool((core(big) <= big).all())
    assert torch.equal(core(small), small)


def test_box_dilation_is_that_of_all_axes_at_once():
    mask = tumor(3.0).float()
    at_once = torch.nn.functional.max_pool3d(mask, 5, stride=1, padding=2)
    assert torch.equal(grown(mask, 2), at_once)


# -- sampling -------------------------------------------------------------------------------------


def test_sampled_contrasts_fill_the_range_and_repeat_with_the_seed():
    config = ContrastConfig(-60, -20, reference_hu=None)
    contrasts = sample_contrast(config, torch.full((500,), 100.0), list(range(500)))
    assert -60 <= float(contrasts.min()) < -57
    assert -23 < float(contrasts.max()) <= -20
    again = sample_contrast(config, torch.full((1,), 100.0), [17])
    assert float(again) == float(contrasts[17])


def test_fainter_in_tissue_that_is_less_enhanced_and_never_fluid():
    config = ContrastConfig(-60, -40, reference_hu=110.0)
    enhanced, fainter = sample_contrast(config, torch.tensor([110.0, 55.0]), [3, 3])
    assert float(fainter) == pytest.approx(float(enhanced) / 2)
    fatty = float(sample_contrast(config, torch.tensor([22.0]), [3]))
    assert 22.0 + fatty >= FLUID_HU - 1e-4
    below = float(sample_contrast(config, torch.tensor([5.0]), [3]))
    assert below == -MIN_DARKER_HU  # darker than fluid already, and still to be seen


def test_shift_sets_the_requested_contrast_and_ends_two_voxels_beyond():
    hu, mask = volume(100.0, noise=5.0), tumor()
    level = level_around(hu, mask, TISSUE)
    change = shift_to_contrast(hu, mask, level, torch.tensor([-37.0]))
    assert float(contrast_of(hu + change, mask, level)) == pytest.approx(-37, abs=1e-3)
    assert not bool(change[~(grown(mask.float(), 2) > 0)].any())


def test_a_tumour_in_a_bright_kidney_has_no_bright_rim():
    rng = torch.Generator().manual_seed(0)
    image = 215 + 12 * torch.randn(1, 64, 64, 64, generator=rng)
    label = torch.ones(image.shape, dtype=torch.uint8)
    synth = ts.SynthesizeTumor("liver-early", count=1, size_mm=18, contrast_hu=-60)
    for seed in range(3):
        synthetic, new = synth(image, label, spacing=1.0, seed=seed)
        inside = (new == 2).float()
        around = (grown(inside[None], 2) > 0)[0] & (new != 2)
        assert float((synthetic - image)[around].mean()) < 5
        inner = (grown(1 - inside[None], 1) == 0)[0]
        assert float((synthetic - image)[inner].mean()) == pytest.approx(-60, abs=8)


@pytest.mark.parametrize("wrong", [float("nan"), "dark", (1, 2, 3), 5000, [], True, (None, 3)])
def test_an_invalid_contrast_is_refused(wrong):
    with pytest.raises(ValueError, match="contrast_hu must be"):
        check_contrast(wrong)


def test_contrast_may_be_a_number_or_a_pair_the_darker_first():
    assert check_contrast(None) is None
    assert check_contrast(-30) == (-30.0, -30.0)
    assert check_contrast((-50, -20)) == (-50.0, -20.0)
    with pytest.raises(ValueError, match=r"the darker first, got \(-20, -50\)"):
        check_contrast((-20, -50))


def test_an_invalid_config_is_refused():
    with pytest.raises(ValueError, match="low <= high"):
        ContrastConfig(-10, -20)


# -- generators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("method", ["change", "inpaint"])
def test_a_generator_paints_the_requested_contrast(method, conditioned):
    """Even random weights, which paint anything."""
    generator = tiny_generator(contrast=ContrastConfig() if conditioned else None)
    crop, mask = tiny_crop(2)
    output = getattr(generator, method)(crop, mask, seed=[1, 2], contrast_hu=[-40.0, 25.0])
    painted = (crop + output if method == "change" else output) * 425 - 175
    level = level_around(crop * 425 - 175, mask, TISSUE)
    assert contrast_of(painted, mask, level).tolist() == pytest.approx([-40.0, 25.0], abs=2)


def test_a_conditioned_generator_samples_its_own_contrast():
    generator = tiny_generator(contrast=ContrastConfig(-60, -50, None))
    crop, mask = tiny_crop()
    level = level_around(crop * 425 - 175, mask, TISSUE)
    own = contrast_of((crop + generator.change(crop, mask, 5)) * 425 - 175, mask, level)
    assert -60.5 < float(own) < -49.5
    # another contrast changes the condition, so that the shift is not alone
    a, b = (generator.condition(crop, mask, torch.tensor([c])) for c in (-50.0, 50.0))
    assert torch.equal(a[:, :9], b[:, :9])
    assert torch.equal(a[:, 9:], -b[:, 9:])
    assert bool(a[:, 9:].any())


def test_a_batch_is_its_samples():
    generator = tiny_generator(contrast=ContrastConfig())
    crop, mask = tiny_crop(2)
    both = generator.change(crop, mask, [4, 9])
    for k, seed in enumerate((4, 9)):
        one = generator.change(crop[k : k + 1], mask[k : k + 1], seed)
        assert torch.allclose(both[k : k + 1], one, atol=1e-5)


def test_a_generator_folder_holds_the_contrast_config(tmp_path):
    generator = tiny_generator(contrast=ContrastConfig(-700, -300, None, (-950, -600)))
    loaded = ts.load_generator(generator.save(tmp_path / "g"))
    assert loaded.sampler == generator.sampler
    crop, mask = tiny_crop()
    assert torch.equal(loaded.change(crop, mask, 1), generator.change(crop, mask, 1))


def test_a_contrast_for_each_sample_or_one_for_all():
    crop, mask = tiny_crop()
    with pytest.raises(ValueError, match="one for each of the 1 samples"):
        tiny_generator().change(crop, mask, 0, contrast_hu=[1.0, 2.0])


def test_a_generators_own_window_gives_the_crop_other_hu():
    """The same crop in [0, 1] is lung in a lung generator's window."""
    lung_contrast = ContrastConfig(600, 700, None, (-950, -600))
    wide = tiny_generator(window=(-1000.0, 250.0), contrast=lung_contrast)
    crop = torch.full((1, 1, 32, 32, 32), 0.15)  # -812 HU
    _, mask = tiny_crop()
    painted = (crop + wide.change(crop, mask, 3)) * 1250 - 1000
    assert 590 < float(contrast_of(painted, mask, torch.tensor([-812.5]))) < 710


# -- in a call -----------------------------------------------------------------------------------


def scan(level=100.0):
    rng = torch.Generator().manual_seed(1)
    image = level + 8 * torch.randn(1, 64, 64, 64, generator=rng)
    label = torch.zeros(1, 64, 64, 64, dtype=torch.uint8)
    label[:, 8:56, 8:56, 8:56] = 1
    return image, label


@pytest.mark.parametrize("generator", ["hu2023", "tiny"])
def test_a_call_with_a_contrast(generator):
    image, label = scan()
    synth = ts.SynthesizeTumor(
        tiny_generator() if generator == "tiny" else generator,
        count=1,
        size_mm=14,
        contrast_hu=(-45, -35),
        sigma_mm=0.5,
    )
    new, new_label = synth(image, label, seed=3)
    (record,) = synth.report
    assert -45 <= record["contrast_hu"] <= -35
    mask = (new_label == 2)[None]
    level = level_around(new[None], mask, TISSUE)
    assert float(contrast_of(new[None], mask, level)) == pytest.approx(record["contrast_hu"], abs=6)


def test_contrast_changes_nothing_else_and_replays():
    image, label = scan()
    plain = ts.SynthesizeTumor("hu2023", count=2)
    requested = ts.SynthesizeTumor("hu2023", count=2, contrast_hu=(-80, -20))
    _, label_plain = plain(image, label, seed=5)
    new, label_requested = requested(image, label, seed=5)
    assert torch.equal(label_plain, label_requested)
    contrasts = [t["contrast_hu"] for t in requested.params[0]["tumors"]]
    assert len(set(contrasts)) == 2
    # params override another transform's contrast
    other = ts.SynthesizeTumor("hu2023", count=2, contrast_hu=10)
    again, _ = other(image, label, params=requested.params)
    assert torch.equal(again, new)


def test_params_without_a_contrast_still_replay():
    image, label = scan()
    synth = ts.SynthesizeTumor("hu2023", count=1)
    new, _ = synth(image, label, seed=2)
    for tumor_params in synth.params[0]["tumors"]:
        del tumor_params["contrast_hu"]
    again, _ = synth(image, label, params=synth.params)
    assert torch.equal(again, new)


def test_a_requested_contrast_is_relative_to_the_tissue_that_is_replaced():
    """A fatty pancreas, with solid neighbours around."""
    crop, mask = tiny_crop()
    hu = torch.full_like(crop, 60.0)
    hu[..., 8:24, 8:24, 8:24] = -10.0
    crop = (hu + 175) / 425
    change = tiny_generator().change(crop, mask, 0, contrast_hu=-30.0) * 425
    assert float(change[core(mask)].mean()) == pytest.approx(-30, abs=1)


@pytest.mark.parametrize("tissue", [60.0, 110.0, 230.0])
def test_a_requested_contrast_is_relative_to_similar_tissue_around(tissue):
    """In a bright kidney beside fat, neither its darker half nor the fat counts."""
    torch.manual_seed(0)
    hu = torch.full((1, 1, 40, 40, 40), tissue) + 20 * torch.randn(1, 1, 40, 40, 40)
    mask = torch.zeros(1, 1, 40, 40, 40, dtype=torch.bool)
    mask[..., 14:26, 14:26, 14:26] = True
    hu[..., 28:, :, :] = -90.0
    assert float(similar_level_around(hu, mask)) == pytest.approx(tissue, abs=3)
    lonely = torch.where(mask, hu, torch.tensor(-1000.0))
    assert float(similar_level_around(lonely, mask)) == pytest.approx(tissue, abs=3)


def test_the_three_measures_of_contrast_agree_in_an_even_organ():
    """The crop's, the gate's and the training reports', as contrast.py says."""
    from tumorsynth.appearance.gate import measure
    from tumorsynth.training.measures import tumor_statistics

    rng = torch.Generator().manual_seed(0)
    hu = 110 + 12 * torch.randn(40, 40, 40, generator=rng)
    axes = torch.meshgrid(*[torch.arange(40) - 20.0] * 3, indexing="ij")
    tumor = sum(a.square() for a in axes).sqrt() < 8
    hu[tumor] -= 40
    organ = torch.ones_like(tumor) & ~tumor
    batch, mask = hu[None, None], tumor[None, None]
    contrasts = [
        float(contrast_of(batch, mask, level_around(batch, mask, (20.0, 220.0)))),
        measure(hu, tumor, organ, (1.0, 1.0, 1.0))["contrast_hu"],
        tumor_statistics(hu, tumor, organ)[0],
    ]
    assert contrasts == pytest.approx([-40.0] * 3, abs=1.5)


@pytest.mark.parametrize("level", [-20.0, 0.0, 15.0, 30.0, 45.0, 110.0])
@pytest.mark.parametrize("noise_hu", [8.0, 30.0, 60.0])
def test_the_level_of_a_fatty_or_noisy_organ_is_its_own(level, noise_hu):
    rng = torch.Generator().manual_seed(0)
    hu = level + noise_hu * torch.randn(1, 1, 48, 48, 48, generator=rng)
    mask = torch.zeros(hu.shape, dtype=torch.bool)
    mask[..., 18:28, 18:28, 18:28] = True
    found = float(Surroundings.of(hu, mask).healthy_level((20.0, 220.0)))
    assert found == pytest.approx(level, abs=MAX_LEVEL_BIAS_HU + 2)


def test_the_level_of_an_enhanced_organ_beside_fat_is_as_before():
    rng = torch.Generator().manual_seed(0)
    hu = 110 + 12 * torch.randn(1, 1, 48, 48, 48, generator=rng)
    hu[..., 30:] = -100
    mask = torch.zeros(hu.shape, dtype=torch.bool)
    mask[..., 18:28, 18:28, 18:28] = True
    tissue = (20.0, 220.0)
    found = Surroundings.of(hu, mask).healthy_level(tissue)
    assert torch.equal(found, level_around(hu, mask, tissue))


def beside_a_brighter_organ(level, other, noise_hu=8.0):
    """A dark organ that ends 3 mm from a tumour's place, and the place."""
    rng = torch.Generator().manual_seed(0)
    hu = torch.full((1, 1, 48, 48, 48), float(level))
    hu[..., 26:] = other
    hu[..., :15] = other
    mask = torch.zeros(hu.shape, dtype=torch.bool)
    mask[..., 18:28, 18:28, 17:24] = True
    return hu + noise_hu * torch.randn(hu.shape, generator=rng), mask


@pytest.mark.parametrize("noise_hu", [3.0, 8.0, 25.0])
@pytest.mark.parametrize(("level", "other"), [(10, 50), (0, 60), (30, 65), (75, 180), (110, 55)])
@pytest.mark.parametrize(("low", "high"), [(-80.0, -19.0), (-59.0, -8.0)])
def test_a_generator_that_darkens_makes_darker_what_it_replaces(noise_hu, level, other, low, high):
    """Also where another, brighter organ next to it makes up the tissue around."""
    hu, mask = beside_a_brighter_organ(level, other, noise_hu)
    config = ContrastConfig(low, high)
    for seed in range(8):
        found = sampled_contrast(hu, mask, config, [seed])
        painted = float(found.level + found.contrast)
        assert painted <= float(hu[mask].median()) - MIN_DARKER_HU + 1e-3
        assert painted > min(level - MIN_DARKER_HU, FLUID_HU) - 6


def test_a_place_darker_than_all_around_keeps_the_level_around():
    """It is no part of the organ. Finishing skips the tumour."""
    hu, mask = volume(160.0, noise=5.0), tumor()
    hu[grown(mask.float(), 1) > 0] -= 70
    found = sampled_contrast(hu, mask, ContrastConfig(-30, -20), [0])
    assert float(found.level) == pytest.approx(160, abs=2)


@pytest.mark.parametrize("contrast_hu", [-30.0, -12.0, 12.0, 30.0])
@pytest.mark.parametrize(("level", "other"), [(10, 50), (110, 65), (75, 120)])
def test_a_requested_contrast_keeps_its_sign_beside_another_organ(contrast_hu, level, other):
    hu, mask = beside_a_brighter_organ(level, other)
    found = requested_contrast(hu, mask, torch.tensor([contrast_hu]))
    change = float(found.level + found.contrast - hu[mask].median())
    assert change * contrast_hu > 0


def test_requests_that_keep_their_sign_are_relative_to_the_same_level():
    hu, mask = beside_a_brighter_organ(100, 115)
    found = requested_contrast(hu, mask, torch.tensor([-30.0]))
    assert torch.equal(found.level, similar_level_around(hu, mask))


def test_the_least_contrast_of_a_generator_that_darkens():
    levels = torch.tensor([-20.0, 0.0, 20.0, 40.0, 110.0])
    for seed in range(20):
        contrasts = sample_contrast(ContrastConfig(-59, -8), levels, [seed] * 5)
        assert float(contrasts.max()) <= -MIN_DARKER_HU
    both = sample_contrast(ContrastConfig(-40, 40), levels, list(range(5)))
    assert float(both.max()) > 0  # one that also brightens is not held back


# -- requests that no tumour has -------------------------------------------------------------------


def fat_warnings(level, contrast_hu, generator="hu2023", seeds=(0, 1), **settings):
    """The warnings of calls with this contrast, in an organ of this level."""
    synth = ts.SynthesizeTumor(
        generator, 1, 2, count=1, size_mm=14, contrast_hu=contrast_hu, **settings
    )
    image = volume(level, noise=5.0)[0]
    label = torch.ones(image.shape, dtype=torch.int16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in seeds:
            synth(image, label, spacing=(1.0, 1.0, 1.0), seed=seed)
    assert synth.report[0]["applied"]
    return [str(one.message) for one in said if "contrast_hu asks" in str(one.message)]


def test_a_contrast_that_makes_fat_of_soft_tissue_is_named_once():
    (words,) = fat_warnings(60.0, (-200, -150))
    assert "any_tissue=True" in words and "in tissue of 60 HU" in words


@pytest.mark.parametrize(
    ("level", "contrast_hu", "settings"),
    [
        (60.0, (-50, -20), {}),
        (110.0, -140, {}),  # as dark as fluid with a little fat
        (-820.0, -100, {"generator": "lung"}),  # an organ below 0 HU
        (60.0, 200, {}),
        (60.0, -150, {"any_tissue": True}),  # meant
    ],
)
def test_other_contrasts_give_no_alarm(level, contrast_hu, settings):
    assert fat_warnings(level, contrast_hu, **settings) == []


@pytest.mark.parametrize("size_mm", [8, 12, 20])
def test_the_requested_contrast_is_that_of_the_core(size_mm):
    ct = ts.make_phantom(spacing=(1.0, 1.0, 1.0), shape=(96, 96, 64), seed=0)
    synth = ts.SynthesizeTumor("hu2023", 1, 20, count=1, size_mm=size_mm, contrast_hu=-60)
    image, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=1)
    mask = (label == 20)[None]
    level = requested_contrast(ct.image[None].float(), mask, torch.tensor([-60.0])).level
    assert float(contrast_of(image[None].float(), mask, level)) == pytest.approx(-60, abs=8)
    whole = synth.report[0]["hu_change"]
    assert -54 < whole < -36  # the soft edge counts there
