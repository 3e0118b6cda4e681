"""Shapes of real masks: placed tumours look like them, replay, and their outlines fit in params."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from organs import place_in
from phantoms import shared_phantom
from scipy.stats import ks_2samp

import tumorsynth as ts
from tumorsynth.placement.types import LocalMask
from tumorsynth.placement.user_shapes import outline_of, read_shapes


def ellipsoid(half_mm=(14.0, 9.0, 6.0), spacing=(1.0, 1.0, 1.0), side_mm=36) -> torch.Tensor:
    axes = [(torch.arange(round(side_mm / s)) + 0.5) * s - side_mm / 2 for s in spacing]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return (x / half_mm[0]) ** 2 + (y / half_mm[1]) ** 2 + (z / half_mm[2]) ** 2 <= 1


def place_shaped(outlines, size=20.0, seed=0, spacing=(1.0, 1.0, 1.0)) -> LocalMask:
    label = torch.ones(tuple(round(64 / s) for s in spacing), dtype=torch.uint8)
    (tumor,) = place_in(label, spacing, seed, size_mm=size, outlines=outlines)
    assert isinstance(tumor, LocalMask)
    return tumor


def ratios(mask: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> tuple[float, float]:
    """Elongation and flatness."""
    at = np.argwhere(mask) * np.array(spacing)
    short, middle, long = np.sqrt(np.linalg.eigvalsh(np.cov(at.T, bias=True)) + 1 / 12)
    return middle / long, short / long


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 3.0)])
def test_shape_is_kept_at_any_size_and_spacing(spacing):
    outline = outline_of(ellipsoid(spacing=spacing), spacing)
    for seed in range(4):
        tumor = place_shaped([outline], 24.0, seed)
        assert tumor.diameter_mm == pytest.approx(24, rel=0.01)
        elongation, flatness = ratios(tumor.mask.numpy())
        assert elongation == pytest.approx(9 / 14, abs=0.08)
        assert flatness == pytest.approx(6 / 14, abs=0.08)


def test_one_shape_is_turned_mirrored_and_bent_differently_for_each_tumour():
    outline = outline_of(ellipsoid(), (1, 1, 1))
    found = [place_shaped([outline], 20.0, seed).mask for seed in range(6)]
    for k, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:k])


def test_concave_mask_gives_a_tumour():
    mask = ellipsoid((14, 14, 14)) & ~ellipsoid((14, 14, 14)).roll((9, 0, 0), (0, 1, 2))  # a sickle
    tumor = place_shaped([outline_of(mask, (1, 1, 1))], 16.0)
    assert tumor.voxels > 0


def test_shapes_are_read_from_folders_files_and_arrays(tmp_path):
    nib = pytest.importorskip("nibabel")
    spacing = (1.0, 1.0, 2.0)
    mask = ellipsoid(spacing=spacing)
    for name in ("b.nii.gz", "a.nii"):
        image = nib.Nifti1Image(mask.numpy().astype(np.uint8), np.diag([*spacing, 1]))
        nib.save(image, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no mask")
    wanted = outline_of(mask, spacing)
    assert read_shapes(tmp_path) == read_shapes(str(tmp_path)) == (wanted, wanted)
    assert (
        read_shapes([tmp_path / "a.nii", (mask, spacing), (mask.numpy(), spacing)]) == (wanted,) * 3
    )
    assert read_shapes(None) == ()


def test_unusable_masks_are_named(tmp_path):
    two = torch.zeros(40, 40, 40)
    two[4:12, 4:12, 4:12] = two[20:30, 20:30, 20:30] = 1
    (tmp_path / "bad.nii").write_text("no image")
    good = (1.0, 1.0, 1.0)
    for given, says in (
        ([(two, good)], "shape 0 must hold one tumour, but 34% of its voxels lie apart"),
        ([(torch.zeros(5, 5, 5), good)], "shape 0 must hold a tumour of 30 voxels or more, got 0"),
        ([(torch.ones(5, 5), good)], "shape 0 must be"),
        ([(ellipsoid(), (1, 1))], "spacing of shape 0 must be three numbers above 0"),
        ([(ellipsoid(), good), 7], "shape 1 must be a file or"),
        ([], "at least one mask"),
        (7, "must be a folder, or a list"),
        (tmp_path, "bad.nii must be a NIfTI mask"),
    ):
        with pytest.raises(ValueError, match=says):
            ts.SynthesizeTumor("hu2023", shapes=given)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_shapes(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no file .*; leave it out"):
        read_shapes([tmp_path / "none.nii"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no .nii"):
        read_shapes(tmp_path / "empty")


def test_outlines_are_small_and_replay_without_the_masks():
    ct = shared_phantom((2.0, 2.0, 3.0))
    shapes = [(ellipsoid(), (1, 1, 1)), (ellipsoid((10, 10, 10)), (1, 1, 1))]
    synth = ts.SynthesizeTumor(
        "hu2023", organ_labels=1, tumor_label=20, size_mm=(12, 20), shapes=shapes
    )
    assert len(pickle.dumps(synth.settings.shapes)) < 2000
    image, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=4)
    assert any(r["applied"] for r in synth.report)
    params = json.loads(json.dumps(synth.params))
    again = pickle.loads(pickle.dumps(synth))(ct.image, ct.label, spacing=ct.spacing, seed=4)
    other = ts.SynthesizeTumor("hu2023", organ_labels=1, tumor_label=20)
    replayed = other(ct.image, ct.label, spacing=ct.spacing, params=params)
    for new in (again, replayed):
        assert torch.equal(new[0], image) and torch.equal(new[1], label)
    params[0]["tumors"][0]["outline"] = "!"
    with pytest.raises(ValueError, match="outline must be"):
        other(ct.image, ct.label, spacing=ct.spacing, params=params)


def test_shapes_change_no_other_draw():
    plain, shaped = place_shaped([]), place_shaped([outline_of(ellipsoid(), (1, 1, 1))])
    assert plain.params.seed == shaped.params.seed and plain.params.outline == ""
    assert plain.params.drawn_mm == shaped.params.drawn_mm


def test_placed_tumours_are_shaped_like_the_real_ones(shared: Path):
    """Kolmogorov-Smirnov distance at most 0.15, plus what 60 against 60 scatter by chance."""
    data = np.load(shared / "data" / "tumor_shapes" / "msd_liver_tumor.npz")
    real, outlines, sizes = [], [], []
    for k, shape in enumerate(data["shape"]):
        bits = np.unpackbits(data["bits"][data["offset"][k] : data["offset"][k + 1]])
        mask = bits[: np.prod(shape)].reshape(shape).astype(bool)
        size = (6 * mask.sum() / math.pi) ** (1 / 3)
        if 10 < size < 28 and len(real) < 60:
            real.append(ratios(mask))
            outlines.append(outline_of(torch.from_numpy(mask), (1, 1, 1)))
            sizes.append(float(size))
    made = [
        ratios(place_shaped([one], size, k).mask.numpy())
        for k, (one, size) in enumerate(zip(outlines, sizes, strict=True))
    ]
    assert len(real) == 60
    for feature in range(2):
        distance = ks_2samp([r[feature] for r in real], [m[feature] for m in made]).statistic
        assert distance <= 0.15 + 0.07
