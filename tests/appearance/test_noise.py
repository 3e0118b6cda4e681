"""Changes match the sharpness, noise and evenness of their scan, and keep their contrast."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.blend import feather, gaussian_filter
from tumorsynth.appearance.contrast import ContrastConfig, core
from tumorsynth.appearance.noise import (
    GRAIN_PER_NOISE_SIGMA,
    grain_region,
    match_to_scan,
    measure_noise,
    sample_edge_mm,
    sample_own_variation,
    softening_mm,
)
from tumorsynth.geometry import Box

ISO = (1.0, 1.0, 1.0)
SHARP = (0.3, 0.3, 0.3)


def noisy(sigmas=(0.0, 0.0, 0.0), side=40, seed=0, sd=12.0):
    """An organ of 110 HU with noise of this grain, in voxels."""
    rng = torch.Generator().manual_seed(seed)
    noise = gaussian_filter(torch.randn(side, side, side, generator=rng), sigmas)
    return 110 + sd * noise / noise.std()


def ball(radius=9.0, side=40):
    axes = torch.meshgrid(*[torch.arange(side) - side // 2] * 3, indexing="ij")
    return sum(a.square() for a in axes) <= radius**2


def core_mean(values, mask):
    return float(values[core(mask[None, None])[0, 0]].mean())


def edge_width(change, mask):
    """Width of the edge along x through the middle, from the steepest slope."""
    line = change[:, 20, 20]
    return float(line.abs().max() / line.diff().abs().max())


# -- the grain of a scan ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigmas", [(0.6, 0.6, 0.6), (0.5, 1.0, 1.3)])
def test_grain_is_the_filters_width_along_each_axis(sigmas):
    grain_mm = measure_noise(noisy(sigmas), ball(18), ISO).grain_mm
    for width, sigma in zip(grain_mm, sigmas, strict=True):
        assert width == pytest.approx(GRAIN_PER_NOISE_SIGMA * sigma, rel=0.12, abs=0.15)


def test_grain_is_in_mm_and_at_least_a_voxels_width():
    white = measure_noise(noisy(), ball(18), (0.6, 0.6, 5.0)).grain_mm
    assert white[0] < 0.5 and white[2] == pytest.approx(0.29 * 5, abs=0.6)
    assert measure_noise(noisy((0.8, 0.8, 0.0)), ball(18), (0.6, 0.6, 5.0)).grain_mm[
        0
    ] == pytest.approx(GRAIN_PER_NOISE_SIGMA * 0.8 * 0.6, rel=0.12)


def test_vessels_and_slopes_do_not_make_a_scan_smooth():
    hu = noisy((0.6, 0.6, 0.6))
    hu[::9, :, 10:13] += 60.0
    hu += torch.linspace(-8, 8, 40)
    assert measure_noise(hu, ball(18), ISO).grain_mm[0] == pytest.approx(
        GRAIN_PER_NOISE_SIGMA * 0.6, rel=0.25
    )


def test_grain_that_cannot_be_measured_softens_nothing():
    for hu, organ in (
        (torch.full((20, 20, 20), 100.0), ball(9, 20)),  # no noise
        (noisy(), ball(1.0)),  # hardly any organ
        (torch.full((20, 20, 20), math.nan), ball(9, 20)),
        (torch.randn(1, 60, 60), torch.ones(1, 60, 60, dtype=torch.bool)),  # one slice
    ):
        assert all(0.28 < g < 0.5 for g in measure_noise(hu, organ, ISO).grain_mm)


def test_grain_is_measured_around_the_tumours_middle_inside_the_sample():
    tumor = Box((2, 20, 30), (6, 30, 31))
    region = grain_region(tumor, (1.0, 1.0, 5.0), (60, 60, 32))
    assert region == Box((0, 11, 27), (19, 40, 32))
    fine = grain_region(tumor, (0.1, 0.1, 0.1), (60, 60, 60))
    assert fine == Box((0, 1, 6), (29, 50, 55))  # no more than 24 voxels to each side


# -- matching a change -----------------------------------------------------------------------------


def test_a_change_is_no_sharper_than_its_scan_and_keeps_its_contrast():
    mask = ball()
    change = -40.0 * gaussian_filter(mask.float(), [0.8] * 3)
    sharp = match_to_scan(noisy(), change, mask, SHARP, own_variation=None)
    assert sharp is change
    last = edge_width(change, mask)
    for width in (1.0, 1.5, 2.0):
        soft = match_to_scan(noisy(), change, mask, (width,) * 3, own_variation=None)
        assert edge_width(soft, mask) > 1.1 * last
        assert core_mean(soft, mask) == pytest.approx(core_mean(change, mask), rel=0.01)
        last = edge_width(soft, mask)
    across = match_to_scan(noisy(), change, mask, (0.3, 0.3, 2.0), own_variation=None)
    assert edge_width(across, mask) < 1.2 * edge_width(change, mask)  # thick slices lie along z
    assert edge_width(across.movedim(2, 0), mask) > 1.5 * edge_width(change, mask)


def slow_spread(values, mask):
    inside = gaussian_filter(mask.float(), [1.0] * 3) > 0.99
    return float(gaussian_filter(values, [1.5] * 3)[inside].std())


def test_evening_replaces_lumps_by_the_scans_own_variation():
    mask = ball(11)
    hu = noisy()
    lumps = noisy((2.5, 2.5, 2.5), seed=1, sd=10.0) - 110
    change = (lumps - 40) * gaussian_filter(mask.float(), [1.0] * 3)
    even = match_to_scan(hu, change, mask, SHARP, own_variation=0.0)
    was, before, after = (slow_spread(v, mask) for v in (hu, hu + change, hu + even))
    assert before > 3 * was and after < 0.6 * before
    assert core_mean(even, mask) == pytest.approx(core_mean(change, mask), rel=0.02)
    assert torch.equal(match_to_scan(hu, change, mask, SHARP, own_variation=None), change)
    # beyond the outline it stays, apart from fine noise
    assert torch.allclose(even[~mask], change[~mask], atol=0.5)


def test_evening_keeps_a_dark_middle():
    """A profile over depth is the tumour's own."""
    mask = ball(12)
    depth = gaussian_filter(mask.float(), [3.0] * 3)
    change = -60 * depth
    hu = noisy((0.5, 0.5, 0.5), sd=4.0)
    even = match_to_scan(hu, change, mask, SHARP, own_variation=0.0)
    assert float((even - change)[mask].abs().mean()) < 2.0


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_large_tumour_is_not_paler_in_the_middle(sign):
    mask = ball(17)
    reached = gaussian_filter(mask.float(), [1.0] * 3)
    middle = gaussian_filter(ball(13).float(), [2.0] * 3)
    change = sign * 40.0 * reached * (1 - 0.3 * middle)
    even = sign * match_to_scan(noisy(sd=1.0), change, mask, SHARP, own_variation=0.0)
    shell = ball(14) & ~ball(11)
    assert sign * float(change[ball(8)].mean() - change[shell].mean()) < -5
    assert float(even[ball(8)].mean()) > float(even[shell].mean()) - 1.5
    assert core_mean(even, mask) == pytest.approx(abs(core_mean(change, mask)), rel=0.02)


def deep(mask, spacing=ISO):
    """Where no edge is seen."""
    return gaussian_filter(mask.float(), [2.5 / s for s in spacing]) > 0.98


def fine_spread(values, where):
    return float((values - gaussian_filter(values, [1.5] * 3))[where].std())


@pytest.mark.parametrize("sigmas", [(0.0, 0.0, 0.0), (0.6, 0.6, 1.5), (1.2, 1.2, 1.2)])
@pytest.mark.parametrize("sd", [4.0, 12.0, 30.0])
def test_a_tumour_is_as_noisy_as_its_scan(sigmas, sd):
    """Whatever part of the scan's noise a change takes away, and however little it brings."""
    mask = ball(11)
    hu, other = noisy(sigmas, sd=sd), noisy(sigmas, seed=1, sd=0.3 * sd)
    soft = gaussian_filter(mask.float(), [1.0] * 3)
    change = (-40.0 - 0.8 * (hu - 110) + (other - 110)) * soft
    inside = deep(mask)
    quiet = fine_spread(hu + change, inside) / fine_spread(hu, inside)
    matched = match_to_scan(hu, change, mask, SHARP, own_variation=0.0)
    assert quiet < 0.6
    assert fine_spread(hu + matched, inside) / fine_spread(hu, inside) == pytest.approx(1, abs=0.05)
    assert core_mean(matched, mask) == pytest.approx(core_mean(change, mask), abs=1.0)


def test_a_tumour_has_as_much_variation_of_its_own_as_it_is_given():
    mask = ball(11)
    hu = noisy((0.6, 0.6, 0.6))
    lumps = noisy((2.5, 2.5, 2.5), seed=1, sd=10.0) - 110
    change = (lumps - 40) * gaussian_filter(mask.float(), [1.0] * 3)
    spreads = [
        slow_spread(hu + match_to_scan(hu, change, mask, SHARP, own_variation=own), mask)
        for own in (0.0, 1.0, 2.0, 100.0)
    ]
    assert spreads[0] < 0.9 * spreads[1] < 0.8 * spreads[2]
    assert spreads[3] < 15  # a quarter of the change at most
    drawn = [sample_own_variation(seed) for seed in range(300)]
    assert 0 <= min(drawn) < 0.01 and 0.4 < sorted(drawn)[150] < 1.2 and 2 < max(drawn) <= 3


def test_only_large_tumours_get_softer_edges():
    assert sample_edge_mm(1, 15.0) == 0.0
    drawn = [sample_edge_mm(seed, 45.0) for seed in range(300)]
    assert min(drawn) < 0.1 and 1.0 < sorted(drawn)[150] < 2.0 and 2.5 < max(drawn) < 3.0
    assert softening_mm(SHARP, 2.0) == (2.0, 2.0, 2.0)
    mask = ball(15)
    change = -40.0 * gaussian_filter(mask.float(), [0.8] * 3)
    soft = match_to_scan(noisy(), change, mask, SHARP, None, edge_mm=2.0)
    assert edge_width(soft, mask) > 1.7 * edge_width(change, mask)
    assert core_mean(soft, mask) == pytest.approx(core_mean(change, mask), rel=0.01)


def test_a_large_tumour_as_bright_as_the_tissue_stays_so():
    mask = ball(17)
    change = noisy((2.5, 2.5, 2.5), seed=1, sd=4.0) - 110
    change = (change - change[mask].mean() + 0.5) * gaussian_filter(mask.float(), [1.0] * 3)
    even = match_to_scan(noisy(), change, mask, SHARP, own_variation=0.0)
    assert core_mean(even, mask) == pytest.approx(core_mean(change, mask), abs=1.0)


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator(contrast=ContrastConfig())])
def test_a_wide_feather_makes_an_infiltrating_margin(generator):
    """Of generators whose changes have a soft edge of their own as well; the label stays."""
    hu, widths, masks = noisy(sd=2.0, side=56), [], []
    for sigma in (1.5, 3.0):
        settings = {"contrast_hu": -60, "size_mm": 20, "sigma_mm": sigma}
        change, mask, _ = call(hu, generator=generator, **settings)
        depth = gaussian_filter(mask.float(), [2.0] * 3)
        share = float(change[mask & (depth < 0.6)].mean() / change[depth > 0.95].mean())
        beyond = float(change[~mask & (depth > 0.3)].mean() / change[depth > 0.95].mean())
        widths.append(share - beyond)
        masks.append(mask)
    assert torch.equal(*masks)
    assert 0 < widths[1] < 0.75 * widths[0]


@pytest.mark.parametrize("radius", [0.4, 1.2, 2.5, 19.0])
def test_tumours_of_any_size_keep_their_contrast(radius):
    mask = ball(radius)
    change = -30.0 * mask.float()
    matched = match_to_scan(noisy(), change, mask, (1.5, 1.5, 2.0), own_variation=0.0)
    assert matched.isfinite().all() and float(matched.abs().max()) < 120
    assert core_mean(matched, mask) == pytest.approx(-30.0, rel=0.1)
    nothing = torch.zeros_like(mask)
    assert match_to_scan(noisy(), change, nothing, (2.0,) * 3, own_variation=0.0) is change


# -- in a call -------------------------------------------------------------------------------------


def call(hu, spacing=ISO, generator="hu2023", **options):
    label = torch.ones(1, *hu.shape, dtype=torch.uint8)
    options = {"count": 1, "size_mm": 14, "sigma_mm": 0.5, **options}
    synth = ts.SynthesizeTumor(generator, **options)
    image, new = synth(hu[None], label, spacing=spacing, seed=4)
    return (image[0] - hu), new[0] == 2, synth.report[0]


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator(contrast=ContrastConfig())])
def test_edges_follow_the_scan(generator):
    side = 56
    steep = {}
    for name, sigmas in {"sharp": (0.0, 0.0, 0.0), "soft": (1.2, 1.2, 0.0)}.items():
        change, mask, record = call(noisy(sigmas, side), generator=generator, contrast_hu=-60)
        assert record["sigma_mm"] == max(0.5, *record["grain_mm"])
        steep[name] = float(change.diff(dim=0).abs().amax() / change[mask].abs().mean())
    assert steep["soft"] < 0.8 * steep["sharp"]


@pytest.mark.parametrize(
    ("sigmas", "spacing", "sd", "differences"),
    [
        ((0.5, 0.5, 0.5), (0.8, 0.8, 1.5), 12.0, 1),
        ((0.5, 0.5, 0.0), (0.8, 0.8, 5.0), 12.0, 1),  # thick slices
        # a smooth kernel, in whose faint noise first differences show the tumour's own profile
        ((1.3, 1.3, 0.5), (0.8, 0.8, 2.0), 7.0, 2),
        ((0.3, 0.3, 0.3), (1.0, 1.0, 1.0), 30.0, 1),
    ],
)
def test_liver_early_is_as_noisy_as_the_tissue_was(sigmas, spacing, sd, differences):
    hu = noisy(sigmas, side=64, sd=sd)
    settings = {"size_mm": 22, "contrast_hu": -40.0, "generator": "liver-early"}
    change, mask, _ = call(hu, spacing, **settings)
    inside = deep(mask, spacing)
    for axis in (0, 1):
        both = inside.narrow(axis, 1, 64 - differences)
        rough = [float(v.diff(differences, axis)[both].std()) for v in (hu, hu + change)]
        assert rough[1] / rough[0] == pytest.approx(1, abs=0.07)


def test_a_published_generator_keeps_its_own_texture():
    assert tiny_generator(contrast=ContrastConfig()).even
    assert not tiny_generator(contrast=ContrastConfig(even=False)).even
    assert not tiny_generator().even and not ts.load_generator("hu2023").even


def test_published_blending_is_not_matched():
    _, _, record = call(noisy((1.2, 1.2, 0.0)), blend="difftumor", sigma_mm=2.0)
    assert record["sigma_mm"] == 2.0 and record["grain_mm"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
def test_voxels_finer_than_a_generators_keep_their_noise_in_published_blending(generator):
    rng = torch.Generator().manual_seed(0)
    image = 110 + 15 * torch.randn(1, 80, 80, 40, generator=rng)
    label = torch.ones(image.shape, dtype=torch.uint8)
    synth = ts.SynthesizeTumor(generator, count=1, size_mm=18, blend="difftumor", sigma_mm=1.0)
    synthetic, new = synth(image, label, spacing=(0.6, 0.6, 1.5), seed=0)
    core = ~torch.nn.functional.max_pool3d((new != 2).float(), 5, 1, 2).bool()
    assert float((synthetic - image)[core].mean()) < -15

    def rough(values):
        return float((values - torch.nn.functional.avg_pool3d(values, 3, 1, 1))[core].std())

    assert 0.75 < rough(synthetic) / rough(image) < 1.1


def test_only_autoencoders_with_a_detail_path_keep_detail():
    published = tiny_generator()
    assert not published.keeps_detail
    assert ts.load_generator("liver-early").keeps_detail


def test_a_softened_change_is_as_wide_as_the_blurred_sharp_one():
    """Its edge, once feathered, is that of the sharp change blurred like the scan."""
    mask = ball()
    change = -40.0 * gaussian_filter(mask.float(), [0.8] * 3)
    blurred = gaussian_filter(mask.float(), [0.8] * 3)
    outline = (blurred > 0.3) & (blurred < 0.7)

    def wide(values):
        slope = torch.stack(torch.gradient(values)).square().sum(0).sqrt()
        return abs(core_mean(values, mask)) / float(slope[outline].mean())

    sharp = change * feather(mask, 0.8, ISO, "change", True)
    for grain_mm in ((1.2, 1.2, 1.2), (0.5, 0.5, 2.0)):
        softer = softening_mm(grain_mm)
        blurred_sharp = gaussian_filter(sharp, softer)
        sigma = [math.hypot(0.8, s) for s in softer]
        weight = feather(mask, sigma, ISO, "change", True, softened_mm=softer)
        matched = match_to_scan(noisy(), change, mask, grain_mm, own_variation=None) * weight
        assert wide(matched) == pytest.approx(wide(blurred_sharp), rel=0.12)
        assert wide(matched) > 1.1 * wide(sharp)
        cut = match_to_scan(noisy(), change, mask, grain_mm, own_variation=None)
        cut = cut * feather(mask, sigma, ISO, "change", True)
        assert wide(cut) < 0.95 * wide(matched)  # with the feather at the outline the edge is cut
