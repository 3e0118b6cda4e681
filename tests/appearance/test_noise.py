"""A change takes the scan's sharpness and evenness, and keeps its contrast."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.blend import feather, gaussian_filter
from tumorsynth.appearance.contrast import ContrastConfig, core
from tumorsynth.appearance.noise import WIDER, grain, match, softening
from tumorsynth.pipeline.finish import keeps_detail

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
    """Steepest change from voxel to voxel along x through the middle, as a width."""
    line = change[:, 20, 20]
    return float(line.abs().max() / line.diff().abs().max())


# -- how sharp a scan is ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigmas", [(0.6, 0.6, 0.6), (0.5, 1.0, 1.3)])
def test_grain_is_the_filters_width_along_each_axis(sigmas):
    found = grain(noisy(sigmas), ball(18), ISO)
    for width, sigma in zip(found, sigmas, strict=True):
        assert width == pytest.approx(WIDER * sigma, rel=0.12, abs=0.15)


def test_grain_is_in_mm_and_at_least_a_voxels_width():
    white = grain(noisy(), ball(18), (0.6, 0.6, 5.0))
    assert white[0] < 0.5 and white[2] == pytest.approx(0.29 * 5, abs=0.6)
    assert grain(noisy((0.8, 0.8, 0.0)), ball(18), (0.6, 0.6, 5.0))[0] == pytest.approx(
        WIDER * 0.8 * 0.6, rel=0.12
    )


def test_vessels_and_slopes_do_not_make_a_scan_smooth():
    hu = noisy((0.6, 0.6, 0.6))
    hu[::9, :, 10:13] += 60.0
    hu += torch.linspace(-8, 8, 40)
    assert grain(hu, ball(18), ISO)[0] == pytest.approx(WIDER * 0.6, rel=0.25)


def test_grain_that_cannot_be_measured_softens_nothing():
    for hu, organ in (
        (torch.full((20, 20, 20), 100.0), ball(9, 20)),  # no noise
        (noisy(), ball(1.0)),  # hardly any organ
        (torch.full((20, 20, 20), math.nan), ball(9, 20)),
        (torch.randn(1, 60, 60), torch.ones(1, 60, 60, dtype=torch.bool)),  # one slice
    ):
        assert all(0.28 < g < 0.5 for g in grain(hu, organ, ISO))


# -- what is made of a change ----------------------------------------------------------------------


def test_a_change_is_no_sharper_than_its_scan_and_keeps_its_contrast():
    mask = ball()
    change = -40.0 * gaussian_filter(mask.float(), [0.8] * 3)
    sharp = match(noisy(), change, mask, SHARP, even=False)
    assert sharp is change
    last = edge_width(change, mask)
    for width in (1.0, 1.5, 2.0):
        soft = match(noisy(), change, mask, (width,) * 3, even=False)
        assert edge_width(soft, mask) > 1.1 * last
        assert core_mean(soft, mask) == pytest.approx(core_mean(change, mask), rel=0.01)
        last = edge_width(soft, mask)
    across = match(noisy(), change, mask, (0.3, 0.3, 2.0), even=False)
    assert edge_width(across, mask) < 1.2 * edge_width(change, mask)  # thick slices lie along z
    assert edge_width(across.movedim(2, 0), mask) > 1.5 * edge_width(change, mask)


def slow_spread(values, mask):
    inside = gaussian_filter(mask.float(), [1.0] * 3) > 0.99
    return float(gaussian_filter(values, [1.5] * 3)[inside].std())


def test_lumps_give_way_to_the_scans_own_variation():
    mask = ball(11)
    hu = noisy()
    lumps = noisy((2.5, 2.5, 2.5), seed=1, sd=10.0) - 110
    change = (lumps - 40) * gaussian_filter(mask.float(), [1.0] * 3)
    even = match(hu, change, mask, SHARP, even=True)
    was, before, after = (slow_spread(v, mask) for v in (hu, hu + change, hu + even))
    assert before > 3 * was and after < 0.6 * before
    assert core_mean(even, mask) == pytest.approx(core_mean(change, mask), rel=0.02)
    assert torch.equal(match(hu, change, mask, SHARP, even=False), change)
    # beyond the outline, and its fine noise, it is as it was
    assert torch.allclose(even[~mask], change[~mask], atol=0.5)


def test_evening_keeps_a_dark_middle_and_takes_vessels_away():
    """What depends on the depth alone is the tumour's own; a vessel in it is not."""
    mask = ball(12)
    depth = gaussian_filter(mask.float(), [3.0] * 3)
    change = -60 * depth
    hu = noisy((0.5, 0.5, 0.5), sd=4.0)
    even = match(hu, change, mask, SHARP, even=True)
    assert float((even - change)[mask].abs().mean()) < 2.0
    vessel = hu.clone()
    vessel[:, 18:22, 18:22] += 50.0
    swept = match(vessel, change, mask, SHARP, even=True)
    assert float((vessel + swept)[17:24, 19:21, 19:21].mean()) < float(
        (vessel + change)[17:24, 19:21, 19:21].mean() - 12
    )


@pytest.mark.parametrize("radius", [0.4, 1.2, 2.5, 19.0])
def test_any_size(radius):
    mask = ball(radius)
    change = -30.0 * mask.float()
    made = match(noisy(), change, mask, (1.5, 1.5, 2.0), even=True)
    assert made.isfinite().all() and float(made.abs().max()) < 120
    assert core_mean(made, mask) == pytest.approx(-30.0, rel=0.1)
    nothing = torch.zeros_like(mask)
    assert match(noisy(), change, nothing, (2.0,) * 3, even=True) is change


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


def test_a_published_generator_keeps_its_own_texture():
    assert tiny_generator(contrast=ContrastConfig()).even
    assert not tiny_generator(contrast=ContrastConfig(even=False)).even
    assert not tiny_generator().even and not ts.load_generator("hu2023").even


def test_published_blending_is_left_as_it_is():
    _, _, record = call(noisy((1.2, 1.2, 0.0)), blend="difftumor", sigma_mm=2.0)
    assert record["sigma_mm"] == 2.0 and record["grain_mm"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
def test_voxels_finer_than_a_generators_keep_their_noise_in_published_blending(generator):
    rng = torch.Generator().manual_seed(0)
    image = 110 + 15 * torch.randn(1, 80, 80, 40, generator=rng)
    label = torch.ones(image.shape, dtype=torch.uint8)
    synth = ts.SynthesizeTumor(generator, count=1, size_mm=18, blend="difftumor", sigma_mm=1.0)
    made, new = synth(image, label, spacing=(0.6, 0.6, 1.5), seed=0)
    core = ~torch.nn.functional.max_pool3d((new != 2).float(), 5, 1, 2).bool()
    assert float((made - image)[core].mean()) < -15

    def rough(values):
        return float((values - torch.nn.functional.avg_pool3d(values, 3, 1, 1))[core].std())

    assert 0.75 < rough(made) / rough(image) < 1.1  # it was 0.3 and 0.5


def test_what_a_published_generator_blurs_stays_blurred():
    published = tiny_generator()
    assert not keeps_detail(published)
    assert keeps_detail(ts.load_generator("liver-early"))


def test_a_softened_change_is_the_sharp_one_seen_softly():
    """Softened and feathered, its edge is that of the sharp change blurred as the scan is."""
    mask = ball()
    change = -40.0 * gaussian_filter(mask.float(), [0.8] * 3)
    blurred = gaussian_filter(mask.float(), [0.8] * 3)
    outline = (blurred > 0.3) & (blurred < 0.7)

    def wide(values):
        slope = torch.stack(torch.gradient(values)).square().sum(0).sqrt()
        return abs(core_mean(values, mask)) / float(slope[outline].mean())

    sharp = change * feather(mask, 0.8, ISO, "change", True)
    for grain_mm in ((1.2, 1.2, 1.2), (0.5, 0.5, 2.0)):
        softer = softening(grain_mm)
        seen = gaussian_filter(sharp, softer)
        sigma = [math.hypot(0.8, s) for s in softer]
        weight = feather(mask, sigma, ISO, "change", True, softened_mm=softer)
        made = match(noisy(), change, mask, grain_mm, even=False) * weight
        assert wide(made) == pytest.approx(wide(seen), rel=0.12)
        assert wide(made) > 1.1 * wide(sharp)
        cut = match(noisy(), change, mask, grain_mm, even=False)
        cut = cut * feather(mask, sigma, ISO, "change", True)
        assert wide(cut) < 0.95 * wide(made)  # as it was when the feather stayed at the outline
