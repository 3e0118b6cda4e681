from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from tumorsynth.phantom import LABELS, Phantom, make_phantom


@pytest.fixture(scope="module")
def whole() -> Phantom:
    return make_phantom(spacing=(2.0, 2.0, 2.0), seed=3)


@pytest.fixture(scope="module")
def crop() -> Phantom:
    """96 mm of the upper right abdomen at 1 mm."""
    return make_phantom(shape=(96, 96, 96), seed=0)


def core(phantom: Phantom, name: str, depth: int = 1) -> torch.Tensor:
    """HU of an organ's voxels at least depth voxels from its surface."""
    outside = (phantom.label != LABELS[name]).float()[None]
    return phantom.image[F.max_pool3d(outside, 2 * depth + 1, 1, depth)[0] == 0]


def largest_share(mask: torch.Tensor) -> float:
    """Share of a mask (1, X, Y, Z) in its largest 26-connected component."""
    parts, _ = ndimage.label(mask[0].numpy(), np.ones((3, 3, 3)))
    return np.bincount(parts.ravel())[1:].max() / int(mask.sum())


def at_mm(phantom: Phantom, points: np.ndarray) -> torch.Tensor:
    """Labels at the voxels nearest to RAS positions (N, 3)."""
    homogeneous = np.c_[points, np.ones(len(points))]
    index = np.rint(homogeneous @ np.linalg.inv(phantom.affine).T)[:, :3].astype(int)
    return phantom.label[0][tuple(torch.from_numpy(index).T)]


def test_shape_type_and_affine(whole: Phantom) -> None:
    assert whole.image.shape == whole.label.shape == (1, 160, 130, 80)
    assert whole.image.dtype == torch.float32 and whole.label.dtype == torch.uint8
    assert whole.spacing == (2.0, 2.0, 2.0)
    assert whole.affine.dtype == np.float64
    np.testing.assert_array_equal(whole.affine[:3, :3], np.diag([2.0, 2.0, 2.0]))
    centre = whole.affine @ [79.5, 64.5, 39.5, 1]
    np.testing.assert_allclose(centre, [0, 0, 0, 1], atol=1e-9)
    assert torch.isfinite(whole.image).all() and whole.image.min() >= -1024


def test_same_seed_same_bits_other_seed_other_patient() -> None:
    first, again, other = (make_phantom(spacing=(5, 5, 5), seed=s) for s in (5, 5, 6))
    assert torch.equal(first.image, again.image) and torch.equal(first.label, again.label)
    assert not torch.equal(first.image, other.image)
    assert 0.02 < (first.label != other.label).float().mean() < 0.5


def test_global_random_state_is_neither_used_nor_changed() -> None:
    before = torch.random.get_rng_state()
    make_phantom(shape=(16, 16, 16))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_same_place_holds_the_same_tissue_at_any_spacing(whole: Phantom) -> None:
    """A grid of which every voxel's centre is also one of the other grid's."""
    sparse = make_phantom(spacing=(6.0, 2.0, 6.0), shape=(54, 130, 28), seed=3)
    np.testing.assert_allclose(sparse.affine[:3, 3], whole.affine[:3, 3] - [0, 0, 2])
    ours, theirs = sparse.label[0, :53, :, 1:27], whole.label[0, :159:3, :, 2:80:3]
    assert (ours == theirs).float().mean() > 0.9999
    assert (ours > 0).float().mean() > 0.2


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 2.5), (1.6, 1.6, 5.0)])
def test_organs_keep_their_shape_at_any_spacing(
    whole: Phantom, spacing: tuple[float, float, float]
) -> None:
    other = make_phantom(spacing=spacing, seed=3)
    grid = np.meshgrid(*(np.arange(-m, m, 4.0) for m in (140, 110, 72)), indexing="ij")
    points = np.stack([g.ravel() for g in grid], 1)
    a, b = at_mm(whole, points), at_mm(other, points)
    for name, least in {"liver": 0.95, "spleen": 0.9, "left_kidney": 0.9}.items():
        in_a, in_b = a == LABELS[name], b == LABELS[name]
        assert 2 * (in_a & in_b).sum() / (in_a.sum() + in_b.sum()) > least, name


def test_anatomy_does_not_depend_on_the_field(whole: Phantom) -> None:
    small = make_phantom(spacing=(2.0, 2.0, 2.0), shape=(30, 30, 30), seed=3)
    start = np.linalg.solve(whole.affine, small.affine[:, 3])[:3]
    i, j, k = np.rint(start).astype(int)
    same = whole.label[:, i : i + 30, j : j + 30, k : k + 30] == small.label
    assert same.float().mean() > 0.85  # the grids are shifted by less than half a voxel


def test_small_fields_show_the_liver(crop: Phantom) -> None:
    assert (crop.label == LABELS["liver"]).float().mean() > 0.4
    smaller = make_phantom(shape=(24, 24, 24), seed=1)
    assert (smaller.label == LABELS["liver"]).float().mean() > 0.5


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("liver", 104, 118),
        ("spleen", 113, 123),
        ("left_kidney", 140, 185),
        ("right_kidney", 140, 185),
        ("pancreas", 80, 105),
        ("aorta", 160, 170),
        ("vena_cava", 145, 155),
        ("gallbladder", 3, 15),
        ("spine", 150, 500),
        ("lungs", -900, -800),
    ],
)
def test_hounsfield_units_by_organ(whole: Phantom, name: str, low: float, high: float) -> None:
    assert low < core(whole, name).mean() < high


def test_air_fat_and_bone(whole: Phantom) -> None:
    assert -1010 < whole.image[:, :6, :6].mean() < -985
    unlabelled = whole.image[whole.label == 0]
    fat = (unlabelled > -130) & (unlabelled < -75)
    assert fat.float().mean() > 0.15
    assert whole.image.max() > 450


def test_liver_vessels_are_brighter_and_belong_to_the_liver(crop: Phantom) -> None:
    smooth = F.avg_pool3d(crop.image[None], 3, 1, 1)[0]
    outside = (crop.label != LABELS["liver"]).float()[None]
    liver = smooth[F.max_pool3d(outside, 9, 1, 4)[0] == 0]
    assert 0.005 < (liver > 140).float().mean() < 0.2


def test_noise_is_like_a_scanner(crop: Phantom) -> None:
    quiet = core(crop, "liver", 4)
    middle = quiet.median()
    deviation = 1.4826 * (quiet - middle).abs().median()  # vessels do not count
    assert 12 < deviation < 18


def test_noise_correlates_over_a_millimetre_or_two() -> None:
    fine = make_phantom(spacing=(0.5, 0.5, 1.5), shape=(120, 120, 24), seed=2)
    image = fine.image[0]
    quiet = (fine.label[0] == LABELS["liver"]) & ((image - 108).abs() < 45)
    x = torch.where(quiet, image - image[quiet].mean(), 0)

    def correlation(dim: int, steps: int) -> float:
        n = x.shape[dim] - steps
        both = quiet.narrow(dim, 0, n) & quiet.narrow(dim, steps, n)
        product = (x.narrow(dim, 0, n) * x.narrow(dim, steps, n))[both].mean()
        return float(product / x[quiet].square().mean())

    for dim in (0, 1):
        assert correlation(dim, 1) > 0.5  # 0.5 mm
        assert 0.1 < correlation(dim, 2) < 0.5  # 1 mm
        assert abs(correlation(dim, 8)) < 0.15  # 4 mm
    assert 0.05 < correlation(2, 1) < 0.45  # the next slice, 1.5 mm away


def test_every_organ_is_there(whole: Phantom) -> None:
    millilitres = torch.bincount(whole.label.flatten().long(), minlength=17) * 8e-3
    for name, low, high in [
        ("liver", 800, 1800),
        ("spleen", 70, 300),
        ("left_kidney", 90, 220),
        ("right_kidney", 90, 220),
        ("pancreas", 25, 120),
        ("stomach", 100, 500),
        ("gallbladder", 12, 60),
    ]:
        assert low < millilitres[LABELS[name]] < high, name
    assert (millilitres[1:] > 4).all() and len(millilitres) == 17


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_organs_are_connected(seed: int) -> None:
    label = make_phantom(spacing=(2.5, 2.5, 2.5), seed=seed).label
    for name in ("liver", "spleen", "left_kidney", "right_kidney", "pancreas", "stomach", "aorta",
                 "vena_cava", "gallbladder", "lungs"):  # fmt: skip
        assert largest_share(label == LABELS[name]) > 0.97, name


def test_the_patient_stands_in_ras(whole: Phantom) -> None:
    def middle(name: str) -> np.ndarray:
        index = torch.nonzero(whole.label[0] == LABELS[name]).double().mean(0).numpy()
        return (whole.affine @ [*index, 1])[:3]

    assert middle("liver")[0] > 30 > -30 > middle("spleen")[0]  # x to the right
    assert middle("right_kidney")[0] > 0 > middle("left_kidney")[0]
    assert middle("stomach")[1] > middle("aorta")[1] > middle("spine")[1]  # y to the front
    assert middle("lungs")[2] > middle("liver")[2] > middle("colon")[2]  # z to the head


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((1, 1, 1), (0.5, 0.5, 0.5)),
        ((1, 1, 1), (5.0, 5.0, 5.0)),
        ((16, 16, 16), (0.5, 0.5, 0.5)),
        ((16, 16, 16), (1, 2, 4)),
        ((20, 9, 2), (0.8, 0.8, 2.5)),
        ((20, 9, 2), (5.0, 5.0, 5.0)),
    ],
)
def test_any_grid(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    phantom = make_phantom(spacing=spacing, shape=shape, seed=1)
    assert phantom.image.shape == (1, *shape) and torch.isfinite(phantom.image).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": (0.0, 1, 1)}, "spacing must be three positive numbers"),
        ({"spacing": (1, 1)}, "spacing must be three"),
        ({"spacing": (1, float("nan"), 1)}, "spacing must be three"),
        ({"spacing": (1, float("inf"), 1)}, "spacing must be three"),
        ({"spacing": 1.0}, "spacing must be three"),
        ({"spacing": "abc"}, "spacing must be three"),
        ({"shape": (0, 10, 10)}, "shape must be three positive whole numbers"),
        ({"shape": (10.5, 10, 10)}, "shape must be three"),
        ({"shape": (10, 10)}, "shape must be three"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
    ],
)
def test_an_invalid_grid_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_phantom(**arguments)
