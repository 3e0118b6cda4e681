"""Whole commands on NRRD, MetaImage and DICOM: the tumours of the arrays, at the same places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

sitk = pytest.importorskip("SimpleITK", reason="needs the extra itk")
nib = pytest.importorskip("nibabel")

from dicom import write_series  # noqa: E402
from test_cli import refused, run, scan, synthesize  # noqa: E402

import tumorsynth as ts  # noqa: E402
from tumorsynth.placement.user_shapes import read_shapes  # noqa: E402
from tumorsynth.scans.volume_files import (  # noqa: E402
    file_lacks_geometry,
    lacks_geometry,
    read_pair,
    read_volume,
    write_volume,
)
from tumorsynth.training.reading import find_sources, read_cases  # noqa: E402

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING = (1.5, 1.6, 2.5)
SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")


def oblique(seed=0, flipped=True):
    """An ITK geometry: direction, origin."""
    rng = np.random.default_rng(seed)
    x, y, z = np.radians(rng.uniform(-15, 15, 3))
    rotations = [
        [[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]],
        [[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]],
        [[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]],
    ]
    direction = np.linalg.multi_dot([np.array(r) for r in rotations])
    return direction * ([-1, 1, -1] if flipped else [1, 1, 1]), rng.uniform(-400, 400, 3)


def image_of(array, direction, origin):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(SPACING)
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(origin.tolist())
    return image


def affine_of(direction, origin):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * SPACING, origin
    return FLIP @ affine


def pair_in(folder: Path, suffix, name="case", seed=0, geometry=None):
    """A CT and its label in a format; "dicom" is a folder of slices and a NIfTI label."""
    folder.mkdir(exist_ok=True, parents=True)
    ct, label = scan(seed)
    direction, origin = geometry or oblique()
    paths = [folder / f"{name}_ct{suffix}", folder / f"{name}_label{suffix}"]
    if suffix == "dicom":
        paths = [folder / f"{name}_ct", folder / f"{name}_label.nii.gz"]
        steps = np.arange(ct.shape[2])[:, None] * direction[:, 2] * SPACING[2]
        write_series(
            paths[0], ct, pixel_mm=SPACING[:2], positions=origin + steps, directions=direction.T[:2]
        )
    for path, array in zip(paths, (ct, label), strict=True):
        if path.name.endswith(".nii.gz"):
            nib.save(nib.Nifti1Image(array, affine_of(direction, origin), dtype=array.dtype), path)
        elif path.suffix:
            sitk.WriteImage(image_of(array, direction, origin), str(path), useCompression=False)
    return paths


@pytest.mark.parametrize("kind", [*SUFFIXES, "dicom"])
def test_a_scan_gets_the_tumours_of_its_arrays_and_keeps_its_format(tmp_path, kind):
    given = pair_in(tmp_path / "in", kind, geometry=oblique(1, flipped=kind != "dicom"))
    out = tmp_path / "out"
    assert synthesize(*given, "-o", out, "--count", 2) == 0
    ct_suffix, label_suffix = (".nii.gz",) * 2 if kind == "dicom" else (kind,) * 2
    before = read_pair(*given)
    after = read_pair(out / f"case_ct{ct_suffix}", out / f"case_label{label_suffix}")
    synth = ts.SynthesizeTumor("hu2023", organ_labels=1, count=2, size_mm=(8, 20))
    arrays = [torch.from_numpy(a.copy())[None] for a in scan()]
    image, label = synth(arrays[0].float(), arrays[1], affine=before[0].affine, seed=0)
    np.testing.assert_array_equal(after[0].stored, image[0].round().numpy())
    np.testing.assert_array_equal(after[1].stored, label[0].numpy())
    for one, other in zip(before, after, strict=True):
        assert one.stored.dtype == other.stored.dtype
        np.testing.assert_allclose(one.affine, other.affine, atol=1e-4)
    report = json.loads((out / "case_report.json").read_text())
    assert report["ct"] == given[0].name and len(report["tumors"]) == 2
    for record in report["tumors"]:  # where SimpleITK finds that voxel
        image = sitk.ReadImage(str(out / f"case_label{label_suffix}"))
        x, y, z = image.TransformIndexToPhysicalPoint(record["centre_voxel"])
        np.testing.assert_allclose(record["centre_mm"], [-x, -y, z], atol=2e-2)
        assert image[record["centre_voxel"]] == 2
    again = tmp_path / "again"
    assert run("replay", out / "case_report.json", *given, "-o", again) == 0
    replayed = read_volume(again / f"case_ct{ct_suffix}")
    np.testing.assert_array_equal(replayed.stored, after[0].stored)


@pytest.mark.parametrize(
    ("kind", "folders"), [(".nrrd", 1), (".mhd", 2), ("dicom", 1), ("dicom", 2)]
)
def test_folders_of_them_are_paired_resumed_and_evaluated(tmp_path, capsys, kind, folders):
    for seed, name in enumerate(("a", "b")):
        paths = pair_in(tmp_path / "ct", kind, name, seed)
        if folders == 2:
            (tmp_path / "label").mkdir(exist_ok=True)
            for path in (tmp_path / "ct").glob(f"{name}_label*"):
                path.rename(tmp_path / "label" / path.name)
    given = [tmp_path / "ct", *([tmp_path / "label"] if folders == 2 else [])]
    out = tmp_path / "out"
    assert synthesize(*given, "-o", out) == 0
    assert synthesize(*given, "-o", out) == 0
    assert "2 of 2 scans are finished already" in capsys.readouterr().out
    suffix = ".nii.gz" if kind == "dicom" else kind
    assert (out / f"b_ct{suffix}").is_file() and (out / f"a_label{suffix}").is_file()
    assert paths[0].exists()
    assert run("evaluate", out, given[-1], "--organ-label", 1) == 0


@pytest.mark.parametrize("kind", [".nrrd", ".mha", "dicom"])
def test_banks_shapes_and_training_read_them(tmp_path, kind):
    pytest.importorskip("monai", reason="needs the extra train")
    files = []
    for suffix, name in ((kind, "given"), (".nii.gz", "nifti")):
        ct, label = pair_in(tmp_path / name, suffix, geometry=oblique(2, flipped=False))
        organ = read_volume(label)
        mask = np.zeros_like(organ.stored)
        mask[16:24, 24:32, 14:20] = 2
        write_volume(label, organ, np.where(mask, mask, organ.stored))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask_path = tmp_path / "masks" / f"{name}{label.name.removeprefix('case_label')}"
        write_volume(mask_path, organ, mask)
        files.append((ct, label, mask_path))
    banks = [ts.CopyPaste.from_scans([f[:2]], organ_labels=1, tumor_label=2) for f in files]
    first, second = (bank.lesions[0] for bank in banks)
    np.testing.assert_allclose(first.diameter_mm, second.diameter_mm, rtol=1e-5)
    alone = [read_shapes([f[2]]) for f in files]
    assert alone[0] == alone[1] and read_shapes(tmp_path / "masks") == alone[0] + alone[1]
    cases = [read_cases(find_sources(tmp_path / name)) for name in ("given", "nifti")]
    for one, other in zip(*cases, strict=True):
        assert one.name == other.name and one.hu.shape == other.hu.shape
        for value in (1, 2):  # the last digits of an affine decide where a grid of 1 mm starts
            counts = [int((case.label == value).sum()) for case in (one, other)]
            np.testing.assert_allclose(*counts, rtol=0.02)
            means = [float(case.hu[case.label == value].float().mean()) for case in (one, other)]
            np.testing.assert_allclose(*means, atol=4)


def test_input_that_does_not_fit_ends_with_one_line(tmp_path, capsys):
    ct, label = pair_in(tmp_path / "in", ".nrrd")
    _, moved = pair_in(tmp_path / "moved", ".mha", geometry=oblique(3))
    out = ("-o", tmp_path / "out", "--generator", "hu2023")
    words = refused(capsys, "synthesize", ct, moved, *out)
    assert "case_ct.nrrd and case_label.mha differ in affine: orientation" in words
    assert "case_label.nrrd" not in words and "--same-grid" in words
    slices, mask = pair_in(tmp_path / "dicom", "dicom")
    words = refused(capsys, "synthesize", slices, *out)
    assert "CT case_ct needs its label file as second argument" in words
    assert "--out must not be a folder of slices" in refused(
        capsys, "synthesize", slices, mask, "-o", slices, "--generator", "hu2023"
    )
    (slices / "IM003.dcm").unlink()
    assert "must lie at equal distances" in refused(capsys, "synthesize", slices, mask, *out)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_one_bad_scan_of_a_folder_is_named_and_the_others_done(tmp_path, capsys):
    for seed, name in enumerate(("a", "b")):
        pair_in(tmp_path / "in", "dicom", name, seed)
    (tmp_path / "in" / "a_ct" / "IM009.dcm").unlink()
    assert synthesize(tmp_path / "in", "-o", tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "a: the slices of a series must lie at equal distances" in told.err
    assert (tmp_path / "out" / "b_report.json").is_file()


def test_two_files_of_one_name_are_refused_and_slices_come_after_nifti(tmp_path, capsys):
    pair_in(tmp_path / "in", ".nrrd")
    pair_in(tmp_path / "in", ".mha")
    words = refused(capsys, "synthesize", tmp_path / "in", "-o", tmp_path / "out")
    assert "are both 'case'; rename or move one" in words


def test_a_nifti_in_other_clothes_is_converted(tmp_path):
    """What counts is the content; what is written is what the name says."""
    ct, label = pair_in(tmp_path / "in", ".nii.gz")
    ct, label = (
        p.rename(tmp_path / "in" / p.name.replace(".nii.gz", ".nrrd")) for p in (ct, label)
    )
    assert synthesize(ct, label, "-o", tmp_path / "out") == 0
    written = sitk.ReadImage(str(tmp_path / "out" / "case_ct.nrrd"))
    np.testing.assert_allclose(written.GetSpacing(), SPACING, atol=1e-5)
    np.testing.assert_allclose(read_volume(tmp_path / "out" / "case_ct.nrrd").affine,
                               read_volume(ct).affine, atol=1e-4)  # fmt: skip


def test_voxels_of_1_mm_without_a_position_are_noted(tmp_path, capsys):
    ct, label = scan()
    for name, array in (("case_ct", ct), ("case_label", label)):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        sitk.WriteImage(image, str(tmp_path / f"{name}.mha"))
    assert (
        synthesize(tmp_path / "case_ct.mha", tmp_path / "case_label.mha", "-o", tmp_path / "o") == 0
    )
    assert "says voxels of 1 mm and no position" in capsys.readouterr().err


def test_slices_of_1_mm_are_not_noted(tmp_path):
    ct, _ = scan()
    at = np.array([-10.0, -20, -30]) + np.arange(ct.shape[2])[:, None] * [0, 0, 1.0]
    write_series(tmp_path, ct, pixel_mm=(1.0, 1.0), positions=at)
    assert not lacks_geometry(read_volume(tmp_path)) and not file_lacks_geometry(tmp_path)


def test_one_file_per_organ_in_nrrd(tmp_path):
    ct, label = pair_in(tmp_path / "in", ".nrrd")
    organs = read_volume(label)
    masks = tmp_path / "masks"
    masks.mkdir()
    for value, name in ((1, "liver"), (3, "spleen")):
        mask = (organs.stored == value).astype(np.uint8)
        write_volume(masks / f"{name}.nrrd", organs, mask)
    assert synthesize(ct, masks, "-o", tmp_path / "out", "--organ", "liver", "--count", 1) == 0
    written = {p.name for p in (tmp_path / "out" / "masks").iterdir()}
    assert written == {"liver.nrrd", "spleen.nrrd", "liver_tumor.nrrd"}
    tumor = read_volume(tmp_path / "out" / "masks" / "liver_tumor.nrrd")
    assert tumor.stored.dtype == np.uint8 and tumor.stored.any()
    np.testing.assert_allclose(tumor.affine, organs.affine)


def test_an_nnunet_set_in_another_format_keeps_it(tmp_path):
    root = tmp_path / "Dataset001_A"
    for seed, name in enumerate(("a", "b")):
        ct, label = pair_in(tmp_path / "in", ".mha", name, seed)
        for path, folder, ending in ((ct, "imagesTr", "_0000"), (label, "labelsTr", "")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            path.rename(root / folder / f"{name}{ending}.mha")
    labels = {"background": 0, **{f"organ{k}": k for k in range(1, 8)}}
    about = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": 2,
        "file_ending": ".mha",
    }
    (root / "dataset.json").write_text(json.dumps(about))
    out = tmp_path / "out"
    assert synthesize(root, "-o", out, "--organ-label", 1, "--tumor-label", 8) == 0
    assert (out / "imagesTr" / "a_0000.mha").is_file() and (out / "labelsTr" / "b.mha").is_file()
    assert json.loads((out / "dataset.json").read_text())["file_ending"] == ".mha"
