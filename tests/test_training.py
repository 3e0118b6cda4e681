"""Training, first version: from a pack to a generator folder, tiny."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tumorsynth as ts
from tumorsynth.training import autoencoder, denoiser
from tumorsynth.training.data import Case, load_case, load_pack, random_patch, save_pack
from tumorsynth.weights import read_folder


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """A noisy organ with two dark balls in it, and an unannotated scan."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(48)] * 3, indexing="ij"), -1).astype(float)
    label = np.ones((48, 48, 48), np.uint8)
    for centre, radius in (((16, 16, 16), 6), ((34, 30, 30), 5)):
        label[np.linalg.norm(grid - np.array(centre), axis=-1) < radius] = 2
    noise = rng.normal(0, 10, label.shape)
    hu = torch.from_numpy(np.where(label == 2, 60, 100) + noise).round().short()
    return [
        Case("annotated", hu, torch.from_numpy(label)),
        Case("plain", (hu.flip(0) - 20).contiguous(), None),
    ]


def test_pack_round_trip(cases, tmp_path):
    save_pack(cases, tmp_path / "pack.npz")
    back = load_pack(tmp_path / "pack.npz")
    assert [c.name for c in back] == ["annotated", "plain"]
    assert torch.equal(back[0].hu, cases[0].hu) and torch.equal(back[0].label, cases[0].label)
    assert back[1].label is None


def test_patch_of_a_case_smaller_than_the_patch(cases):
    small = Case("small", cases[0].hu[:10, :40], None)
    assert random_patch(small, 32, np.random.default_rng(0)).shape == (32, 32, 32)


def test_load_case_brings_a_scan_to_the_grid(tmp_path):
    nib = pytest.importorskip("nibabel")
    array = np.full((20, 30, 10), -1000, np.int16)
    array[4:16, 5:25, 2:8] = 400
    label = (array > 0).astype(np.uint8)
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "ct.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "label.nii.gz")
    case = load_case(tmp_path / "ct.nii.gz", tmp_path / "label.nii.gz")
    # cropped to the body: 12 x 20 x 6 voxels of 2, 2 and 3 mm
    assert all(abs(n - m) <= 2 for n, m in zip(case.hu.shape, (24, 40, 18), strict=True))
    assert case.hu.max() == 250 and case.label is not None and case.label.shape == case.hu.shape
    assert case.label.float().mean() > 0.8


def test_find_tumors(cases):
    tumors = denoiser.find_tumors(cases, 2)
    assert sorted(t.low for t in tumors) == [(11, 11, 11), (30, 26, 26)]
    with pytest.raises(ValueError, match="no voxels of tumour label 9.*pass --tumor-label"):
        denoiser.find_tumors(cases, 9)


def test_both_stages_make_a_generator_that_works(cases, tmp_path, capsys):
    autoencoder.train(cases, tmp_path / "ae", steps=200, side=16, batch=2, seed=0)
    printed = capsys.readouterr().out.splitlines()
    losses = [float(line.split("L1 ")[1].split()[0]) for line in printed if "L1" in line]
    assert losses[-1] < 0.8 * losses[0]

    trained = denoiser.load_autoencoder(tmp_path / "ae")
    generator = denoiser.train(
        cases,
        trained,
        tmp_path / "gen",
        name="tiny",
        tumor_label=2,
        steps=3,
        side=32,
        batch=2,
        config=denoiser.ConvUNetConfig(widths=(16, 32), blocks=1),
    )
    again = read_folder(tmp_path / "gen")
    assert again.name == "tiny" and again.card["training"]["tumours"] == 2
    crop, mask = torch.rand(1, 1, 32, 32, 32), torch.zeros(1, 1, 32, 32, 32, dtype=torch.bool)
    mask[..., 12:20, 12:20, 12:20] = True
    assert torch.equal(generator.inpaint(crop, mask, seed=1), again.inpaint(crop, mask, seed=1))
    synth = ts.SynthesizeTumor(tmp_path / "gen", tumor_label=3, count=1, size_mm=8)
    image, label = synth(cases[0].hu.float()[None], cases[0].label[None], seed=0)
    assert synth.report[0]["applied"] and int((label == 3).sum()) > 100
