"""benchmarks/realism/shape_measures.py and shape_fit.py: measures of known shapes, and fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
measures = pytest.importorskip(
    "benchmarks.realism.shape_measures", reason="needs the benchmarks beside the tests"
)
fits = pytest.importorskip("benchmarks.realism.shape_fit")

from tumorsynth.placement.organ_priors import PRIORS  # noqa: E402


def ellipsoid(half_axes, spacing=(1.0, 1.0, 1.0)):
    """A mask on a grid of this spacing."""
    reach = [int(a / s) + 3 for a, s in zip(half_axes, spacing, strict=True)]
    grid = np.meshgrid(
        *[np.arange(-r, r + 1) * s for r, s in zip(reach, spacing, strict=True)], indexing="ij"
    )
    return sum((g / a) ** 2 for g, a in zip(grid, half_axes, strict=True)) <= 1


def tumors(cases):
    count = len(cases)
    masks = [ellipsoid((5, 5, 5))] * count
    return measures.RealTumors(masks, np.full(count, 10.0), cases, np.ones((count, 3)))


def test_a_ball_is_spherical_by_both_measures_and_a_rod_by_neither():
    pytest.importorskip("skimage")
    for of in (measures.sphericity, measures.sphericity_mesh):
        assert of(ellipsoid((12, 12, 12))) == pytest.approx(1, abs=0.04)
        assert of(ellipsoid((20, 6, 6))) < 0.9


def test_axis_ratios_are_those_of_the_ellipsoid():
    assert measures.axis_ratios(ellipsoid((16, 12, 8))) == pytest.approx((0.75, 0.5), abs=0.02)


@pytest.mark.parametrize("way", ["distance", "linear"])
@pytest.mark.parametrize("spacing", [(0.8, 0.8, 3.0), (0.7, 0.7, 5.0), (1.0, 1.0, 1.0)])
def test_slices_keep_volume_and_axes(way, spacing):
    axes = (16.0, 13.0, 11.0)
    through = measures.through_slices(ellipsoid(axes, spacing), spacing, way)
    volume = 4 / 3 * np.pi * np.prod(axes)
    assert through.sum() == pytest.approx(volume, rel=0.12)
    assert measures.axis_ratios(through) == pytest.approx((13 / 16, 11 / 16), abs=0.06)


def test_linear_interpolation_leaves_steps_and_that_of_the_distance_does_not():
    spacing = (0.8, 0.8, 5.0)
    mask = ellipsoid((17.0, 14.0, 15.0), spacing)
    steps = {
        way: measures.step_share(measures.through_slices(mask, spacing, way), 5.0)
        for way in ("distance", "linear")
    }
    assert steps["linear"] > 0.6 > 0.4 > steps["distance"]


def test_halves_are_fixed_split_no_case_and_share_the_tumours():
    real = tumors([f"case_{k}" for k in range(30) for _ in range(1 + k % 4)])
    first = measures.first_half(real)
    assert (first == measures.first_half(real)).all()
    of_case = {}
    for case, chosen in zip(real.cases, first.tolist(), strict=True):
        of_case.setdefault(case, set()).add(chosen)
    assert all(len(sides) == 1 for sides in of_case.values())
    assert sum(sides == {True} for sides in of_case.values()) == 15
    assert first.mean() == pytest.approx(0.5, abs=0.1)


def test_sizes_of_a_truncated_log_normal_are_found_again():
    prior, gen = PRIORS["pancreas"], torch.Generator().manual_seed(0)
    lo, hi = prior.range_mm
    sizes = np.array([prior.draw_diameter(lo, hi, gen) for _ in range(1500)])
    fitted = fits.fit_sizes(sizes, replace(prior, log_diameter=(1.0, 1.0)))
    assert fitted.log_diameter == pytest.approx(prior.log_diameter, abs=0.05)


def test_a_fit_takes_a_prior_to_the_measures_of_tumours_from_another():
    pytest.importorskip("skimage")
    flat = replace(
        PRIORS["liver"], elongation=(0.8, 0.6), flatness=(1.4, 0.8), roughness=(-1.3, 0.3)
    )
    sizes = np.linspace(9, 15, 100)
    spacings = np.tile((1.0, 1.0, 1.0), (100, 1))
    masks = [
        measures.drawn_mask(flat.draw_shape(d, torch.Generator().manual_seed(k)), float(d), k)
        for k, d in enumerate(sizes)
    ]
    real = measures.RealTumors(masks, sizes, [str(k) for k in range(100)], spacings)
    measured = np.array([measures.features(mask) for mask in masks])
    pool, everything = fits.draw_pool(real, "linear", 500), np.ones(100, dtype=bool)
    fitted = fits.fit_shape(pool, measured, everything, PRIORS["kidney"])
    before = fits.weighted_distances(pool, measured, everything, PRIORS["kidney"])
    after = fits.weighted_distances(pool, measured, everything, fitted)
    assert max(after.values()) < 0.16 < max(before.values())
