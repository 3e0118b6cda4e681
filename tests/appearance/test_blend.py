"""Blend weights: the published filter, and the default that reaches 1 in every tumour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tumorsynth.appearance import blend as module
from tumorsynth.appearance import contrast
from tumorsynth.appearance.blend import BLENDS, feather, feather_reach

ndimage = pytest.importorskip("scipy.ndimage")

SPACINGS = [(1, 1, 1), (0.5, 0.5, 0.5), (0.7, 0.7, 2.5), (5, 0.6, 1.2), (3, 3, 3)]


def ball(shape, centre, radius_mm, spacing=(1, 1, 1)) -> torch.Tensor:
    grids = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    far = sum(((g - c) * s) ** 2 for g, c, s in zip(grids, centre, spacing, strict=True))
    return torch.from_numpy(far <= radius_mm**2)


def padded(mask: torch.Tensor, margin) -> torch.Tensor:
    return torch.from_numpy(np.pad(mask.numpy(), [(m, m) for m in margin]))


# -- as published --------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.4, 0.9, 1.0, 2.0, 2.6, 4.0])
def test_difftumor_is_scipys_gaussian_filter(sigma):
    volume = ball((56, 56, 56), (26, 28, 30), 6)
    expected = ndimage.gaussian_filter(volume.numpy().astype(float), sigma)
    m = feather_reach(sigma, (1, 1, 1), "difftumor")
    region = tuple(slice(c - 6 - r, c + 7 + r) for c, r in zip((26, 28, 30), m, strict=True))
    weight = feather(volume[region], sigma, (1, 1, 1), "difftumor")
    assert weight.dtype == torch.float32
    np.testing.assert_allclose(weight, expected[region], atol=1e-6)
    outside = expected.copy()
    outside[region] = 0
    assert outside.max() == 0  # the published weight ends at the reach


@pytest.mark.parametrize("centre", [(0, 0, 0), (0, 20, 47), (3, 46, 25), (47, 47, 47)])
def test_difftumor_mirrors_at_the_border_like_scipy(centre):
    volume = ball((48, 48, 48), centre, 5)
    for sigma in (1.0, 3.0, 4.0):
        expected = ndimage.gaussian_filter(volume.numpy().astype(float), sigma)
        m = feather_reach(sigma, (1, 1, 1), "difftumor")
        region = tuple(
            slice(max(0, c - 5 - r), min(48, c + 6 + r)) for c, r in zip(centre, m, strict=True)
        )
        weight = feather(volume[region], sigma, (1, 1, 1), "difftumor")
        np.testing.assert_allclose(weight, expected[region], atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 3), (1, 5, 9), (2, 16, 1)])
def test_difftumor_in_a_region_smaller_than_the_filter(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, -1, 0] = True
    expected = ndimage.gaussian_filter(mask.numpy().astype(float), 4.0)
    np.testing.assert_allclose(feather(mask, 4.0, (1, 1, 1), "difftumor"), expected, atol=1e-6)


def test_difftumor_on_anisotropic_voxels_has_its_sigma_in_mm():
    mask = ball((40, 40, 24), (20, 20, 12), 5, (0.8, 0.8, 2.0))
    expected = ndimage.gaussian_filter(mask.numpy().astype(float), [2 / 0.8, 2 / 0.8, 1.0])
    np.testing.assert_allclose(
        feather(mask, 2.0, (0.8, 0.8, 2.0), "difftumor"), expected, atol=1e-6
    )


# -- the default ---------------------------------------------------------------------------------

any_spacing = st.tuples(*[st.floats(0.5, 5.0) for _ in range(3)])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(any_spacing, st.floats(0, 6), st.floats(0.3, 20), st.integers(0, 2**31 - 1))
def test_change_has_a_core_covers_the_label_and_ends_at_the_reach(spacing, sigma, diameter, seed):
    """For any mask: peak 1, above 0 at every label voxel, 0 beyond the reach."""
    shape = tuple(min(24, max(1, round(diameter / s))) for s in spacing)
    mask = ball(shape, [(n - 1) / 2 for n in shape], diameter / 2, spacing)
    if seed % 3 == 0:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[tuple(n // 2 for n in shape)] = True
    m = feather_reach(sigma, spacing, "change")
    # with two voxels more than the reach, whose weights must be 0
    weight = feather(padded(mask, [r + 2 for r in m]), sigma, spacing, "change")
    region = tuple(slice(r + 2, r + 2 + n) for r, n in zip(m, shape, strict=True))
    assert weight.dtype == torch.float32 and weight.isfinite().all()
    assert weight.min() >= 0 and weight.max() == 1
    assert weight[region][mask].max() == 1
    assert weight[region][mask].min() > 0
    beyond = weight.clone()
    beyond[2:-2, 2:-2, 2:-2] = 0
    assert beyond.max() == 0
    # the region that the synthesizer takes gives the same weights
    tight = feather(padded(mask, m), sigma, spacing, "change")
    np.testing.assert_allclose(tight, weight[2:-2, 2:-2, 2:-2], atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.5, 6.0])
def test_a_tumour_of_one_voxel_has_weight_1(spacing, sigma):
    m = feather_reach(sigma, spacing, "change")
    mask = padded(torch.ones(1, 1, 1, dtype=torch.bool), m)
    weight = feather(mask, sigma, spacing, "change")
    assert weight[mask] == 1
    assert (weight[~mask] < 0.6).all()


def test_a_thin_spike_keeps_a_weight():
    """A needle of single voxels on a large tumour is labelled, so it must be painted."""
    mask = ball((80, 48, 48), (24, 24, 24), 16)
    mask[40:70, 24, 24] = True
    weight = feather(mask, 5.0, (0.5, 0.5, 0.5), "change")
    assert weight[mask].min() > 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_most_of_a_tumour_takes_the_whole_change(spacing):
    shape = tuple(round(40 / s) for s in spacing)
    mask = ball(shape, [(n - 1) / 2 for n in shape], 7.5, spacing)
    weight = feather(mask, 1.0, spacing, "change")
    assert weight[mask].mean() > 0.8
    assert (weight[mask] > 0.1).all()  # a flat edge has a half, the tip of a cap less
    # seen from outside: half of it is gone within a voxel or two sigma
    ring = ball(shape, [(n - 1) / 2 for n in shape], 7.5 + 3 + 2 * max(spacing), spacing)
    assert weight[~ring].max() == 0


def test_an_empty_mask_gives_no_weight():
    for blend in BLENDS:
        assert feather(torch.zeros(5, 6, 7, dtype=torch.bool), 1.0, (1, 1, 1), blend).max() == 0


def test_weights_do_not_depend_on_the_position():
    mask = ball((30, 30, 30), (11, 12, 13), 4)
    moved = torch.roll(mask, (5, 3, 2), (0, 1, 2))
    for blend in BLENDS:
        a = feather(mask, 1.3, (1, 1, 1.5), blend)
        b = feather(moved, 1.3, (1, 1, 1.5), blend)
        assert torch.allclose(torch.roll(a, (5, 3, 2), (0, 1, 2)), b, atol=1e-7)


# -- a generator that paints the edge itself ------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_own_edge_has_full_weight_to_the_outline_and_the_same_reach(sigma, spacing):
    shape = [max(8, round(60 / s)) for s in spacing]
    mask = ball(shape, [n // 2 for n in shape], 12, spacing)
    margin = feather_reach(sigma, spacing, "change")
    mask = padded(mask, margin)
    soft, own = (feather(mask, sigma, spacing, "change", own_edge=own) for own in (False, True))
    assert bool((own >= soft).all())
    # curved outlines lie a little below one half of the filtered mask
    assert float(own[mask].quantile(0.02)) > 0.75
    assert float(own[mask].mean()) > float(soft[mask].mean()) + 0.02
    assert float(own.max()) == 1
    assert float(own[~mask].mean()) < 0.5  # and falls off


# -- kept matrices --------------------------------------------------------------------------------


@pytest.fixture
def kept():
    module._kept_matrix.cache_clear()
    return module._kept_matrix.cache_info


def test_a_filters_matrix_is_made_once_for_its_size_and_width(kept):
    volume = torch.rand(9, 9, 11)
    first = module.gaussian_filter(volume, [1.5, 1.5, 1.5])
    assert (kept().misses, kept().hits) == (2, 1)
    assert (
        torch.equal(module.gaussian_filter(volume, [1.5, 1.5, 1.5]), first) and kept().misses == 2
    )
    module.gaussian_filter(volume, [1.5, 1.6, 0.0])
    module.gaussian_filter(volume, [1.5, 0.0, 0.0], cutoff=4.0)
    assert kept().misses == 4


def test_kept_matrices_are_bounded(kept):
    for n in range(300):
        module.gaussian_filter(torch.rand(5), [1.0 + n / 100])
    assert kept().currsize == kept().maxsize == 256
    before = kept().currsize
    module.gaussian_filter(torch.rand(module.MAX_KEPT_COUNT + 1), [7.0])
    assert kept().misses == 300 and kept().currsize == before


def test_a_matrix_kept_in_inference_mode_is_good_for_gradients(kept):
    with torch.inference_mode():
        module.gaussian_filter(torch.rand(9), [1.5])
    volume = torch.rand(9, requires_grad=True)
    module.gaussian_filter(volume, [1.5]).sum().backward()
    assert volume.grad is not None and kept().hits == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_softens_a_shift_is_kept_too(dtype):
    contrast._soft_kernel.cache_clear()
    volume = torch.rand(1, 1, 9, 9, 11, dtype=dtype)
    first = contrast._soften(volume, 4)
    assert torch.equal(contrast._soften(volume, 4), first) and first.dtype == dtype
    info = contrast._soft_kernel.cache_info()
    assert (info.misses, info.hits) == (1, 1) and info.maxsize is not None
