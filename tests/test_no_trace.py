"""No shortcuts: voxels away from a tumour do not tell a synthesised patch from an untouched one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from phantoms import shared_phantom
from scipy import ndimage
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.blend import feather_reach
from tumorsynth.phantom import LABELS
from tumorsynth.subvoxels import subvoxel_factors

ORGANS = {
    "pancreas": LABELS["pancreas"],
    "kidneys": (LABELS["left_kidney"], LABELS["right_kidney"]),
}
SPACING = (2.0, 2.0, 3.0)
SIDE = 4


@pytest.fixture(scope="module")
def phantom():
    return shared_phantom(SPACING)


def features(image: torch.Tensor, away: np.ndarray, corners: list) -> np.ndarray:
    """Mean, spread and roughness of patches of 4 x 4 x 4 voxels, as a classifier would see them."""
    rows = []
    for x, y, z in corners:
        patch = image[0, x : x + SIDE, y : y + SIDE, z : z + SIDE].numpy()
        if away[x : x + SIDE, y : y + SIDE, z : z + SIDE].all():
            rough = [np.abs(np.diff(patch, axis=a)).mean() for a in range(3)]
            rows.append([patch.mean(), patch.std(), *rough])
    return np.array(rows)


def told_apart(a: np.ndarray, b: np.ndarray) -> float:
    """How often Fisher's discriminant of one half of the patches is right on the other half."""

    def fit(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
        within = np.cov(a.T) + np.cov(b.T) + 1e-3 * np.eye(a.shape[1])
        weights = np.linalg.solve(within, a.mean(0) - b.mean(0))
        return weights, float(weights @ (a.mean(0) + b.mean(0)) / 2)

    weights, middle = fit(a[::2], b[::2])
    right = (a[1::2] @ weights >= middle).sum() + (b[1::2] @ weights < middle).sum()
    return float(right) / (len(a[1::2]) + len(b[1::2]))


@pytest.mark.parametrize("organ", ORGANS)
@pytest.mark.parametrize("blend", ["change", "difftumor"])
@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["hu2023", "tiny"])
def test_patches_of_the_phantom_away_from_tumours(phantom, organ, generator, blend):
    synth = ts.SynthesizeTumor(
        generator, ORGANS[organ], tumor_label=20, count=2, size_mm=(8, 12), blend=blend
    )
    image, label = synth(phantom.image, phantom.label, spacing=SPACING, seed=11)
    made = [r for r in synth.report if r["applied"]]
    assert made
    tumors = ((label != phantom.label)[0]).numpy()
    far = feather_reach(max(r["sigma_mm"] for r in made), SPACING, blend)
    # of coarse voxels the next ones may hold less than half a voxel of tumour, unlabelled
    coarse = subvoxel_factors(SPACING, min(r["true_diameter_mm"] for r in made))
    far = [f + (k > 1) for f, k in zip(far, coarse, strict=True)]
    away = ~ndimage.maximum_filter(tumors, [2 * f + 1 for f in far])
    # bit for bit, which no classifier gets around
    kept = torch.from_numpy(away)
    assert torch.equal(image[0][kept], phantom.image[0][kept])
    assert torch.equal(
        label[0][~torch.from_numpy(tumors)], phantom.label[0][~torch.from_numpy(tumors)]
    )
    assert float((image != phantom.image).float().mean()) < 0.02

    corners = [
        tuple(max(0, int(c) + d) for c, d in zip(r["centre_voxel"], shift, strict=True))
        for r in made
        for shift in np.ndindex(7, 7, 5)
        for shift in [np.array(shift) * SIDE - (14, 14, 10)]
    ]  # all within the crops that went through the generator
    before, after = features(phantom.image, away, corners), features(image, away, corners)
    assert len(after) > 16
    assert told_apart(before, after) == 0.5
    if generator != "hu2023" and blend == "change":
        # what the same classifier finds where a whole decoded crop is written back
        pasted = ndimage.gaussian_filter(phantom.image[0].numpy(), 0.6)
        assert told_apart(before, features(torch.from_numpy(pasted)[None], away, corners)) > 0.7
