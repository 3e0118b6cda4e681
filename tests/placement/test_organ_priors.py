"""Size priors: sampled sizes, shapes and counts agree with those of real masks."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from organs import ISO, make_rng
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.stats import ks_2samp

from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.organ_priors import MAX_ROUGHNESS, MIN_AXIS_RATIO, PRIORS, get_prior
from tumorsynth.placement.place import place_from_params
from tumorsynth.placement.types import LocalMask, TumorParams


def voxels(diameter: float, axes, roughness: float, seed: int) -> np.ndarray:
    """One tumour, turned at random, on a 1 mm grid that is all organ."""
    side = int(2.6 * diameter) + 9
    gen = make_rng(seed)
    w, x, y, z = torch.nn.functional.normalize(torch.randn(4, generator=gen), dim=0).tolist()
    centre = (side // 2,) * 3
    params = TumorParams(centre, diameter, axes, (w, x, y, z), roughness, seed, 0, 1.0, diameter)
    region = OrganRegion.of_label(torch.ones(side, side, side, dtype=torch.bool), 1)
    tumor = place_from_params(params, region, ISO)
    assert isinstance(tumor, LocalMask)
    return tumor.mask.numpy()


def measure(mask: np.ndarray) -> tuple[float, float, float]:
    """Elongation, flatness and sphericity; the area by the coarea formula on a smoothed mask."""
    where = np.argwhere(mask).astype(float)
    variance = np.linalg.eigvalsh(np.cov(where.T, bias=True)) + 1 / 12
    short, middle, long = np.sqrt(variance)
    smooth = ndimage.gaussian_filter(np.pad(mask, 5).astype(float), 1.0)
    area = np.sqrt(sum(g**2 for g in np.gradient(smooth))).sum()
    sphericity = math.pi ** (1 / 3) * (6 * mask.sum()) ** (2 / 3) / area
    return middle / long, short / long, sphericity


def test_unknown_name_raises_and_lists_the_known_ones():
    for name in ("spleen", 3, None):
        with pytest.raises(ValueError, match="cyst, kidney, liver, lung, pancreas"):
            get_prior(name)
    assert get_prior("liver") is PRIORS["liver"]
    mine = replace(PRIORS["liver"], name="mine")
    assert get_prior(mine) is mine


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_samples_stay_within_bounds(name):
    prior, gen = PRIORS[name], make_rng()
    lo, hi = prior.range_mm
    for _ in range(300):
        diameter = prior.draw_diameter(lo, hi, gen)
        assert lo <= diameter <= hi
        (a, b, c), roughness = prior.draw_shape(diameter, gen)
        assert a >= b >= c > 0
        assert a * b * c == pytest.approx(1)
        assert c / a >= MIN_AXIS_RATIO - 1e-9
        assert 0 < roughness <= MAX_ROUGHNESS * c + 1e-9
        assert 0 <= prior.touch_probability(diameter) <= 1
        assert 1 <= prior.draw_count(gen) <= len(prior.count)


def test_range_in_the_prior_s_far_tail_gives_sizes_in_it():
    gen = make_rng()
    for lo, hi in ((0.01, 0.02), (900.0, 1000.0), (7.0, 7.0)):
        assert all(lo <= PRIORS["lung"].draw_diameter(lo, hi, gen) <= hi for _ in range(20))


def test_larger_liver_tumours_touch_the_capsule_as_often_as_measured():
    # of 227 real ones: 30 % under 10 mm (median 7.4), 40 % at 10-15, 76 % at 20-30, 90 % at 30-50
    liver = PRIORS["liver"]
    for diameter, share in ((7.4, 0.30), (12.0, 0.42), (25.0, 0.76), (38.0, 0.88)):
        assert liver.touch_probability(diameter) == pytest.approx(share, abs=0.05)


def test_counts_per_case_match_real_cases():
    gen = make_rng()
    for name, mean in (("kidney", 1.13), ("cyst", 3.0)):
        drawn = np.mean([PRIORS[name].draw_count(gen) for _ in range(2000)])
        assert drawn == pytest.approx(mean, rel=0.12)


@pytest.mark.parametrize(
    ("name", "file", "source"),
    [
        ("liver", "msd_liver_components_clean.csv", "msd_liver_tumor"),
        ("kidney", "kits23_components.csv", "kits23_tumor"),
        ("cyst", "kits23_components.csv", "kits23_cyst"),
    ],
)
def test_diameters_match_real_tumours(shared: Path, name, file, source):
    prior, gen = PRIORS[name], make_rng()
    lo, hi = prior.range_mm
    with open(shared / "data" / "tumor_shapes" / file) as f:
        real = [float(r["eq_diam_mm"]) for r in csv.DictReader(f) if r["source"] == source]
    real = [d for d in real if lo <= d <= hi]
    drawn = [prior.draw_diameter(lo, hi, gen) for _ in range(1000)]
    assert len(real) > 200
    assert ks_2samp(real, drawn).statistic <= 0.12


@pytest.mark.parametrize("name", ["liver", "kidney", "pancreas"])
def test_shapes_match_real_tumours(shared: Path, name):
    """Kolmogorov-Smirnov distance at most 0.12, plus what 120 against 240 scatter by chance.

    Drawn tumours have the real ones' sizes and are taken through the real ones' slices.
    """
    measures = pytest.importorskip(
        "benchmarks.realism.shape_measures", reason="needs the benchmarks beside the tests"
    )
    prior = PRIORS[name]
    tumors = measures.read_real(name, shared / "data" / "tumor_shapes")
    fits = np.flatnonzero((tumors.diameters >= measures.SMALLEST) & (tumors.diameters <= 45))
    chosen = fits[np.linspace(0, len(fits) - 1, 120).astype(int)]
    real, drawn = [], []
    for k in chosen.tolist():
        real.append(measure(tumors.masks[k]))
        diameter, spacing = float(tumors.diameters[k]), tumors.spacings[k].tolist()
        for seed in (k, 1000 + k):
            shape = prior.draw_shape(diameter, make_rng(10_000 + seed))
            mask = measures.drawn_mask(shape, diameter, seed, spacing)
            way = measures.FILES[name].interpolation
            drawn.append(measure(measures.through_slices(mask, spacing, way)))
    for feature in range(3):
        distance = ks_2samp([r[feature] for r in real], [d[feature] for d in drawn]).statistic
        assert distance <= 0.12 + 0.05, ("elongation", "flatness", "sphericity")[feature]


def convexity(plane: np.ndarray) -> float:
    """Area of a bool plane over that of its convex hull, by the corners of its pixels."""
    corners = np.argwhere(plane)
    corners = np.concatenate([corners + shift for shift in ((0, 0), (0, 1), (1, 0), (1, 1))])
    return plane.sum() / ConvexHull(corners).volume


@pytest.mark.parametrize(("name", "most"), [("pancreas", 0.12), ("lung", 0.15)])
def test_diameters_match_real_masks(shared: Path, name, most):
    """The lung's 65 tumours scatter more by chance."""
    prior, gen = PRIORS[name], make_rng()
    lo, hi = prior.range_mm
    data = np.load(
        shared
        / "data"
        / "tumor_shapes"
        / {"pancreas": "msd_pancreas_tumor.npz"}.get(name, "uls23_msd_lung.npz")
    )
    real = (6000 * data["volume_ml"] / math.pi) ** (1 / 3)
    real = real[(real >= lo) & (real <= hi)]
    assert len(real) >= 0.9 * len(data["volume_ml"])
    drawn = [prior.draw_diameter(lo, hi, gen) for _ in range(2000)]
    assert ks_2samp(real, drawn).statistic <= most


@pytest.mark.parametrize(("name", "lowest"), [("liver", 0.91), ("kidney", 0.91), ("cyst", 0.91)])
def test_outlines_are_ovals_not_stars(name, lowest):
    """In slices of 12 to 20 mm; the bound separates smooth from jagged surfaces."""
    found = []
    for k in range(40):
        diameter = 12.0 + 0.2 * k
        mask = voxels(diameter, *PRIORS[name].draw_shape(diameter, make_rng(k)), seed=k)
        found.append(convexity(mask[:, :, mask.sum((0, 1)).argmax()]))
    assert np.median(found) >= lowest
    assert np.percentile(found, 10) >= lowest - 0.07


def test_rougher_tumours_are_less_spherical():
    smooth = np.mean([measure(voxels(24.0, (1, 1, 1), 0.02, k))[2] for k in range(6)])
    rough = np.mean([measure(voxels(24.0, (1, 1, 1), 0.2, k))[2] for k in range(6)])
    assert smooth > 0.95 > rough + 0.01
