"""`train bank` on public data sets as they are downloaded: which is the organ, and the tumour."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_cli import refused, run

pytest.importorskip("nibabel")

import tumorsynth as ts
from tumorsynth.scans.nifti import new_volume
from tumorsynth.scans.volume_files import write_volume


@pytest.fixture(scope="module")
def annotated():
    ct = ts.make_phantom(spacing=(3, 3, 4), shape=(44, 44, 28))
    label = (ct.label == 1).byte()
    synth = ts.SynthesizeTumor("hu2023", 1, 2, count=1, size_mm=18, contrast_hu=-60)
    image, label = synth(ct.image, label, affine=ct.affine, seed=0)
    assert (label == 2).sum() > 50
    return image[0].round().short().numpy(), label[0].numpy(), ct.affine


def save(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, new_volume(path.name, array, affine), array)


def lesions(*words, out):
    assert run("train", "bank", *words, "-o", out) == 0
    return ts.CopyPaste.load(out).lesions


@pytest.mark.parametrize(
    ("ct_name", "label_name", "values", "words"),
    [
        ("volume-0.nii", "segmentation-0.nii", (1, 2), ["--organ", "liver"]),
        ("c/imaging.nii.gz", "c/segmentation.nii.gz", (1, 2), ["--organ", "kidney"]),
        ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", (4, 7), ["--organ", "liver"]),
        ("imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz", (4, 7), ["--organ-label", 4]),
        ("images/a.nii.gz", "labels/a.nii.gz", (1, 5), ["--tumor-label", 5]),
    ],
)
def test_label_maps(tmp_path, annotated, ct_name, label_name, values, words):
    image, label, affine = annotated
    organ, tumor = values
    save(tmp_path / "set" / ct_name, image, affine)
    map_ = np.where(label == 1, organ, np.where(label == 2, tumor, 0)).astype(np.uint8)
    save(tmp_path / "set" / label_name, map_, affine)
    if "imagesTr" in ct_name:
        about = {"channel_names": {"0": "CT"}, "labels": {"Liver": organ, "Lesion": tumor}}
        (tmp_path / "set/dataset.json").write_text(json.dumps(about))
    (lesion,) = lesions(tmp_path / "set", *words, out=tmp_path / "b.safetensors")
    assert abs(lesion.diameter_mm - 18) < 2 and lesion.contrast_hu < -30


def test_one_file_per_organ(tmp_path, annotated, capsys):
    image, label, affine = annotated
    masks = {"Liver": label > 0, "liver_tumor": label == 2, "spleen": label > 9}
    for case, names in (("s1", masks), ("s2", ["Liver"]), ("s3", ["spleen", "liver_tumor"])):
        save(tmp_path / f"set/{case}/ct.nii.gz", image, affine)
        for name in names:
            mask = masks[name].astype(np.uint8)
            save(tmp_path / f"set/{case}/segmentations/{name}.nii.gz", mask, affine)
    out = tmp_path / "b.safetensors"
    (lesion,) = lesions(tmp_path / "set", "--organ", "liver", out=out)
    assert abs(lesion.diameter_mm - 18) < 2 and lesion.contrast_hu < -30
    assert "2 of 3 scans have no file liver_tumor" in capsys.readouterr().err
    words = "train", "bank", tmp_path / "set", "-o", tmp_path / "c.safetensors"
    assert "give --organ NAME" in refused(capsys, *words)
    assert "--tumor-label is for label maps" in refused(
        capsys, *words, "--organ", "liver", "--tumor-label", 2
    )
    assert run(*words, "--organ", "spleen") == 2
    assert "spleen_tumor" in capsys.readouterr().err


def test_an_image_that_shows_nothing_is_no_source(annotated):
    image, label, _ = annotated
    with pytest.raises(ValueError, match="scan 0 must show tissue, but every voxel is 40"):
        ts.CopyPaste.from_scans([(np.full_like(image, 40), label, (3, 3, 4))], 2, 1)


def test_the_tumours_need_a_value_of_their_own(tmp_path, annotated, capsys):
    image, label, affine = annotated
    save(tmp_path / "set/a_ct.nii.gz", image, affine)
    save(tmp_path / "set/a_label.nii.gz", label, affine)
    words = "train", "bank", tmp_path / "set", "-o", tmp_path / "b.safetensors"
    assert "must differ from organ_labels" in refused(capsys, *words, "--organ-label", 2)
    assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(ValueError, match="must differ from organ_labels"):
        ts.CopyPaste.from_scans([(image, label, affine)], tumor_label=2, organ_labels=(1, 2))
    with pytest.raises(ValueError, match="tumor_label must be a whole number"):
        ts.CopyPaste.from_scans([(image, label, affine)], tumor_label=2.5, organ_labels=1)


def test_scans_without_a_lesion_are_named(tmp_path, annotated, capsys):
    image, label, affine = annotated
    for name, value in (("a", 9), ("b", 2)):
        save(tmp_path / f"set/{name}_ct.nii.gz", image, affine)
        map_ = np.where(label == 2, value, label).astype(np.uint8)
        save(tmp_path / f"set/{name}_label.nii.gz", map_, affine)
    out = tmp_path / "b.safetensors"
    assert len(lesions(tmp_path / "set", "--tumor-label", 9, out=out)) == 1
    said = capsys.readouterr()
    assert "left out: b holds no 9 = tumor_label" in said.err
    assert ts.CopyPaste.load(out).card["left_out"] == ["b holds no 9 = tumor_label"]
    assert "mm, core -" in said.out
