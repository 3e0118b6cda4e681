"""benchmarks/realism/lesions.py: figures known beforehand; real_or_synthetic.py: an honest one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from benchmarks.realism import lesions, real_or_synthetic


def ball(radius: float, side: int = 48) -> np.ndarray:
    grid = np.indices((side,) * 3) - side // 2
    return np.sqrt((grid**2).sum(0)) < radius


def lesion(blur_mm: float, radius: float = 8, noise: float = 10.0) -> np.ndarray:
    """A ball 40 HU below an organ of 100 HU, its edge blurred, then noise."""
    hu = 100 - 40 * ndimage.gaussian_filter(ball(radius).astype(float), blur_mm)
    return hu + np.random.default_rng(0).normal(0, noise, hu.shape)


@pytest.mark.parametrize("blur_mm", [0.8, 1.5])
def test_contrast_edge_and_noise_are_found(blur_mm):
    tumor = ball(8)
    row = lesions.measure(lesion(blur_mm), tumor, ~tumor)
    assert row["deep_contrast_hu"] == pytest.approx(-40, abs=3)
    assert row["edge_width_mm"] == pytest.approx(2.563 * blur_mm, abs=0.8)
    assert row["edge_offset_mm"] == pytest.approx(0, abs=0.5)
    assert row["noise_ratio"] == pytest.approx(1, abs=0.15)
    assert row["diameter_mm"] == pytest.approx(16, abs=0.5)
    assert row["sphericity"] == pytest.approx(1, abs=0.05)
    assert row["elongation"] == pytest.approx(1, abs=0.02)


def test_a_generous_outline_moves_the_offset_and_not_the_width():
    hu, tumor, generous = lesion(1.0), ball(8), ball(10)
    tight = lesions.measure(hu, tumor, ~tumor)
    wide = lesions.measure(hu, generous, ~generous)
    assert wide["edge_offset_mm"] - tight["edge_offset_mm"] == pytest.approx(-2, abs=0.5)
    assert wide["edge_width_mm"] == pytest.approx(tight["edge_width_mm"], abs=0.5)


def test_the_profile_is_dark_inside_and_level_outside():
    tumor = ball(8)
    profile = lesions.radial_profile(lesion(0.5), tumor, ~tumor)
    assert {-7, -1, 0, 7} <= set(profile)
    assert profile[-5] == pytest.approx(-40, abs=3) and profile[3] == pytest.approx(0, abs=2)
    assert -40 < profile[-1] < profile[0] < 2


def test_texture_tells_smooth_from_grainy():
    tumor, rng = ball(8), np.random.default_rng(1)
    grain = rng.normal(0, 10, tumor.shape)
    smooth = ndimage.gaussian_filter(grain, 1.0)
    smooth *= 10 / smooth.std()
    inner = ndimage.binary_erosion(tumor, iterations=1)
    rows = [
        lesions.measure(100 + np.where(inner, inside, grain), tumor, ~tumor)
        for inside in (grain, smooth)
    ]
    assert rows[1]["noise_length_mm"] > 1.3 * rows[0]["noise_length_mm"]
    assert rows[1]["glcm_correlation"] > rows[0]["glcm_correlation"] + 0.3
    assert rows[1]["glcm_contrast"] < rows[0]["glcm_contrast"]
    assert rows[1]["lumps_ratio"] > 1.3 * rows[0]["lumps_ratio"]


def test_cores_are_of_one_size_and_in_the_middle():
    for radius in (4, 12):
        core = lesions.deepest(ball(radius))
        assert core.sum() == 100
        assert (core & ~ball(3.5)).sum() == 0
    assert (lesions.deepest(ball(2)) == ball(2)).all()  # all there is


def test_a_speck_in_the_middle_is_not_the_contrast_of_a_large_lesion():
    tumor = ball(16, 56)
    hu = np.where(tumor, 60.0, 100.0) + 100.0 * ball(4, 56)
    assert lesions.core_contrast(hu, tumor, ~tumor) == pytest.approx(-40)
    assert lesions.measure(hu, tumor, ~tumor)["deep_contrast_hu"] == pytest.approx(60)
    assert np.isnan(lesions.core_contrast(hu, tumor, np.zeros_like(tumor)))


def test_no_organ_around_gives_nan_and_no_edge_gives_none():
    tumor = ball(8)
    row = lesions.measure(lesion(1.0), tumor, np.zeros_like(tumor))
    assert np.isnan(row["contrast_hu"]) and "edge_width_mm" not in row
    flat = lesions.measure(100 + np.random.default_rng(0).normal(0, 10, (48,) * 3), tumor, ~tumor)
    assert np.isnan(flat["edge_width_mm"]) and abs(flat["deep_contrast_hu"]) < 3


def test_probes_are_disjoint_and_only_where_they_fit():
    hu, small, large = lesion(1.0), ball(4), ball(14)
    assert lesions.probes(hu, small, ~small) == []
    assert len(lesions.probes(hu, large, ~large)) > 3
    assert len(lesions.probes(hu, large, ~large, most=2)) == 2


def test_the_classifier_finds_a_difference_and_only_a_difference():
    rng = np.random.default_rng(0)
    same = [
        real_or_synthetic.classify(
            rng.normal(size=(7, 5)), rng.normal(size=(40, 5)), permutations=2
        )["auc"]
        for _ in range(25)
    ]
    assert np.mean(same) == pytest.approx(0.5, abs=0.08)  # pooled leave-one-out lies far below
    apart = real_or_synthetic.classify(rng.normal(2, 1, (7, 5)), rng.normal(size=(40, 5)))
    assert apart["auc"] > 0.95 and apart["p_value"] < 0.05
    low, high = apart["auc_p5_p95"]
    assert low <= apart["auc"] <= high


def test_samples_of_one_tumour_do_not_vouch_for_each_other():
    """Four tumours, each recognisable by itself, but as a class like the synthetic ones."""
    rng = np.random.default_rng(0)
    alone, grouped = [], []
    for _ in range(10):
        real = np.repeat(rng.normal(size=(4, 12)), 10, 0) + rng.normal(0, 0.01, (40, 12))
        synthetic = rng.normal(size=(40, 12))
        whose = np.repeat(np.arange(4), 10)
        alone.append(real_or_synthetic.classify(real, synthetic, permutations=2)["auc"])
        grouped.append(real_or_synthetic.classify(real, synthetic, whose, permutations=2)["auc"])
    assert np.mean(alone) > 0.8
    assert np.mean(grouped) < 0.65


def test_missing_values_and_too_few_tumours():
    rng = np.random.default_rng(0)
    real, synthetic = rng.normal(2, 1, (5, 3)), rng.normal(size=(20, 3))
    real[0, 0] = np.nan
    real[:, 1] = np.nan  # compares nothing
    assert real_or_synthetic.classify(real, synthetic, permutations=5)["auc"] > 0.7
    assert real_or_synthetic.classify(real[:1], synthetic)["auc"] is None
    assert real_or_synthetic.classify(np.full((5, 1), np.nan), synthetic[:, :1])["auc"] is None
