"""The outlines of benchmarks/realism/annotations: what the files hold, and how they are made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

nibabel = pytest.importorskip("nibabel")
outline = pytest.importorskip(
    "benchmarks.realism.annotations.outline", reason="needs the benchmarks beside the tests"
)
FOLDER = Path(outline.__file__).parent
SCANS = Path(__file__).parents[3] / "shared" / "data" / "ct"
TUMOURS = {"crlm_1004": 0, "crlm_1006": 4, "hcc_015_pv": 1}


def read(name):
    image = nibabel.load(FOLDER / f"{name}_label.nii.gz")
    return np.asarray(image.dataobj), image


def ball(shape, centre, radius):
    squares = [((np.arange(n) - c) ** 2) for n, c in zip(shape, centre, strict=True)]
    return sum(np.ix_(*squares)) <= radius**2


@pytest.mark.parametrize("name", TUMOURS)
def test_labels_are_small_files_of_a_liver_with_its_tumours(name):
    label, image = read(name)
    assert label.dtype == np.uint8 and set(np.unique(label)) <= {0, 1, 2}
    assert (FOLDER / f"{name}_label.nii.gz").stat().st_size < 150_000
    assert 700 < (label > 0).sum() * np.prod(image.header.get_zooms()) / 1000 < 2500  # ml
    assert ndimage.label(label == 2, np.ones((3, 3, 3)))[1] == TUMOURS[name]


@pytest.mark.parametrize("name", ["crlm_1006", "hcc_015_pv"])
def test_tumours_are_darker_than_the_liver_around_them(name):
    path = SCANS / f"{name}_ct.nii.gz"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of the shared data")
    hu, (label, _) = np.asarray(nibabel.load(path).dataobj), read(name)
    parts, count = ndimage.label(label == 2, np.ones((3, 3, 3)))
    for k in range(1, count + 1):
        tumor = parts == k
        far = ndimage.binary_dilation(tumor, iterations=8)
        near = ndimage.binary_dilation(tumor, iterations=3)
        around = far & ~near & (label == 1)
        assert np.median(hu[around]) - np.median(hu[tumor]) > 10


def test_a_dark_ball_in_an_even_liver_is_found_and_its_ellipse_is_not():
    shape, spacing = (90, 90, 12), (0.8, 0.8, 5.0)
    hu = np.random.default_rng(0).normal(-100, 8, shape).astype(np.float32)
    organ = ball(shape[:2], (45, 45), 35)
    hu[organ] += 210
    lesion = ball(shape[:2], (50, 40), 8)
    hu[..., 5:8][lesion] -= 40
    regions = {
        "liver": {"range_hu": [85, 150], "bone_hu": 250, "seed": [45, 60, 6], "slices": [2, 10]},
        "lesions": [{str(z): [51, 41, 14, 14] for z in (5, 6, 7)}],
    }
    regions["liver"]["cut"] = [[0, 11, [[0, 0], [89, 0], [89, 15], [0, 15]]]]
    label = outline.outline(hu, spacing, regions)
    tumor = label[..., 6] == 2
    assert (tumor & lesion).sum() / (tumor | lesion).sum() > 0.85
    assert not label[:, :12].any() and not label[..., :2].any()
    assert (label[..., 4] > 0).sum() > 0.85 * organ[:, 16:].sum()
