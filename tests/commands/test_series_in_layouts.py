"""Series in time in every layout and format: written so that they are found in their turn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_cli import run, synthesize

pytest.importorskip("nibabel")

import tumorsynth as ts
from tumorsynth.commands.main import app
from tumorsynth.scans.layouts import find_scans
from tumorsynth.scans.nifti import new_volume
from tumorsynth.scans.volume_files import read_volume, write_volume

SIZE = "--count", 1, "--size-mm", 14, 16
SERIES = *SIZE, "--follow-up", 1, 1.3


@pytest.fixture(scope="module")
def ct():
    return ts.make_phantom(spacing=(3, 3, 4), shape=(44, 44, 28))


def save(path, tensor, ct):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(tensor)[0]
    write_volume(path, new_volume(path.name, array, ct.affine), array)


def organ(ct, name="liver", value=1):
    return (ct.label == ts.phantom.LABELS[name]).byte() * value


def write_case(root, ct, ct_name, label_names, suffixes):
    save(root / f"{ct_name}{suffixes[0]}", ct.image.round().short(), ct)
    for k, name in enumerate(label_names):
        save(root / f"{name}{suffixes[1]}", organ(ct, ("liver", "stomach")[k]), ct)


def needs_itk(suffixes):
    if set(suffixes) & {".nrrd", ".mha", ".mhd", ".nhdr"}:
        pytest.importorskip("SimpleITK", reason="needs the extra itk")


MASKS = ["s1/segmentations/liver", "s1/segmentations/stomach"]


@pytest.mark.parametrize(
    ("ct_name", "label_names", "suffixes", "tumor"),
    [
        ("s1/ct", MASKS, (".nrrd", ".mhd"), "s1/segmentations/liver_tumor.mhd"),
        ("s1/CT", [MASKS[0]], (".nii.gz", ".nhdr"), "s1/segmentations/liver_tumor.nhdr"),
        ("case_1/imaging", ["case_1/segmentation"], (".nrrd", ".nrrd"), None),
        ("volume-1", ["segmentation-1"], (".nii", ".nii"), None),
        ("volume-1", ["segmentation-1"], (".mha", ".mhd"), None),
        ("img/img0001", ["label/label0001"], (".nhdr", ".nii.gz"), None),
        ("imagesTr/l_1", ["labelsTr/l_1"], (".nrrd", ".nrrd"), None),
        ("images/l_1", ["labels/l_1"], (".mha", ".mha"), None),
    ],
)
def test_a_series_in_a_layout_and_a_format(tmp_path, ct, ct_name, label_names, suffixes, tumor):
    needs_itk(suffixes)
    root, out = tmp_path / "set", tmp_path / "out"
    write_case(root, ct, ct_name, label_names, suffixes)
    if ct_name == "imagesTr/l_1":  # the Decathlon
        cases = [{"image": f"./{ct_name}{suffixes[0]}", "label": f"./{label_names[0]}.nrrd"}]
        labels = {"0": "background", "1": "liver"}
        (root / "dataset.json").write_text(json.dumps({"training": cases, "labels": labels}))
    words = ["--organ", "liver"] if tumor else ["--tumor-label", 2]
    assert synthesize(root, "-o", out, *SERIES, *words) == 0
    masks = []
    for point in ("t0", "t1"):
        (pair,) = find_scans(out / point).pairs  # a data set in the layout that it came in
        assert pair.ct == out / point / f"{ct_name}{suffixes[0]}"
        image = read_volume(pair.ct)
        np.testing.assert_allclose(image.affine, ct.affine, atol=1e-5)
        assert image.stored.dtype == np.int16
        if tumor:
            masks.append(read_volume(out / point / tumor).stored > 0)
            for name in label_names:
                made, old = (read_volume(p / f"{name}{suffixes[1]}") for p in (out / point, root))
                np.testing.assert_array_equal(made.stored, old.stored)
        else:
            assert pair.label == out / point / f"{label_names[0]}{suffixes[1]}"
            masks.append(read_volume(pair.label).stored == 2)
        changed = image.stored != ct.image.round().short()[0].numpy()
        assert masks[-1].any() and changed[masks[-1]].mean() > 0.5
    assert not (masks[0] & ~masks[1]).any() and masks[1].sum() > 1.5 * masks[0].sum()
    if (root / "dataset.json").exists():
        for point in ("t0", "t1"):
            made = json.loads((out / point / "dataset.json").read_text())
            assert made["training"] == cases and made["labels"]["2"] == "tumor"


@pytest.mark.parametrize("names", [("s1/ct", MASKS), ("imagesTr/l_1", ["labelsTr/l_1"])])
def test_what_a_series_writes_can_be_trained_on(tmp_path, ct, names):
    pytest.importorskip("monai", reason="needs the extra train")
    from tumorsynth.training.data import load_pack

    root, out, pack = tmp_path / "set", tmp_path / "out", tmp_path / "p.npz"
    write_case(root, ct, *names, (".nii.gz", ".nii.gz"))
    words = ["--organ", "liver"] if names[0] == "s1/ct" else []
    assert synthesize(root, "-o", out, *SERIES, *words) == 0
    assert run("train", "pack", out / "t1", "-o", pack, *words) == 0
    (case,) = load_pack(pack)
    assert (case.label == 2).sum() > 1000 and (case.label == 1).any()  # voxels of 1 mm


def test_dicom_slices_beside_the_masks(tmp_path, ct):
    pytest.importorskip("SimpleITK", reason="needs the extra itk")
    from dicom import positions_along, write_series

    hu = ct.image.round().short()[0].numpy()
    at = positions_along(np.array([0, 0, 1]), np.arange(hu.shape[2]) * 4.0)
    write_series(tmp_path / "set/s1/ct", hu, pixel_mm=(3.0, 3.0), positions=at)
    image = read_volume(tmp_path / "set/s1/ct")
    mask = organ(ct)[0].numpy()
    (tmp_path / "set/s1/segmentations").mkdir()
    target = tmp_path / "set/s1/segmentations/liver.nrrd"
    write_volume(target, new_volume("liver", mask, image.affine), mask)
    assert synthesize(tmp_path / "set", "-o", tmp_path / "out", "--organ", "liver", *SIZE) == 0
    made = read_volume(tmp_path / "out/s1/ct.nii.gz")
    np.testing.assert_allclose(made.affine, image.affine, atol=1e-5)
    tumor = read_volume(tmp_path / "out/s1/segmentations/liver_tumor.nrrd").stored > 0
    assert tumor.any() and (made.values()[tumor] != image.values()[tumor]).mean() > 0.5


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr", ".hdr", ".NII", ".nii.gz"])
def test_further_channels_come_along_whole(tmp_path, ct, suffix):
    needs_itk([suffix])
    root, out = tmp_path / "set", tmp_path / "out"
    write_case(root, ct, "imagesTr/a_0000", ["labelsTr/a"], (".nii.gz", ".nii.gz"))
    other = root / f"imagesTr/a_0001{suffix}"
    if suffix == ".hdr":
        import nibabel as nib

        nib.save(nib.Nifti1Pair(np.asarray(ct.image)[0], ct.affine), other)
    else:
        save(other, ct.image + 1, ct)
    assert synthesize(root, "-o", out, "--channel", 0, *SIZE) == 0
    kept = {".hdr": ".nii.gz", ".NII": ".nii.gz"}.get(suffix, suffix)
    made = read_volume(out / f"imagesTr/a_0001{kept}")
    np.testing.assert_array_equal(made.stored, read_volume(other).stored)
    np.testing.assert_allclose(made.affine, ct.affine, atol=1e-5)


def test_a_channel_is_chosen_and_the_others_are_named(tmp_path, ct, capsys):
    root, out = tmp_path / "set", tmp_path / "out"
    for k in range(2):
        write_case(root, ct, f"imagesTr/a_000{k}", ["labelsTr/a"], (".nii.gz", ".nii.gz"))
    names = {"0": "CT arterial", "1": "CT venous"}
    about = {"channel_names": names, "labels": {"background": 0, "liver": 1}, "numTraining": 1}
    (root / "dataset.json").write_text(json.dumps({**about, "file_ending": ".nii.gz"}))
    assert synthesize(root, "-o", out) == 2
    assert "0 (CT arterial), 1 (CT venous)" in capsys.readouterr().err and not out.exists()
    assert synthesize(root, "-o", out, "--channel", "ct venous", *SIZE) == 0
    assert "not into imagesTr/a_0000.nii.gz" in capsys.readouterr().err
    old = ct.image.round().short()[0].numpy()
    first, second = (read_volume(out / f"imagesTr/a_000{k}.nii.gz").stored for k in range(2))
    assert (first == old).all() and (second != old).any()
    assert json.loads((out / "dataset.json").read_text())["channel_names"] == names


def test_labels_without_a_ct_are_named(tmp_path, ct, capsys):
    write_case(tmp_path / "in", ct, "a_ct", ["a_label"], (".nii.gz", ".nii.gz"))
    save(tmp_path / "in/b_label.nii.gz", organ(ct), ct)
    assert synthesize(tmp_path / "in", "-o", tmp_path / "out", *SIZE) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "note: 1 label has no CT and is left out" in line and "b_label.nii.gz" in line


@pytest.mark.parametrize("points", [(), ("--follow-up", 1, 1.5)])
def test_a_run_that_fails_leaves_no_dataset_json(tmp_path, ct, points):
    """The Decathlon has images of several channels in one file, which are refused."""
    import nibabel as nib

    root, out = tmp_path / "set", tmp_path / "out"
    cases = []
    for name in ("l_1", "l_2"):
        write_case(root, ct, f"imagesTr/{name}", [f"labelsTr/{name}"], (".nii.gz", ".nii.gz"))
        files = f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz"
        two = np.stack([np.asarray(ct.image)[0]] * 2, -1)
        nib.save(nib.Nifti1Image(two, ct.affine), root / files[0])
        cases.append(dict(zip(("image", "label"), files, strict=True)))
    about = {"training": cases, "numTraining": 2, "labels": {"0": "background", "1": "liver"}}
    (root / "dataset.json").write_text(json.dumps(about))
    assert synthesize(root, "-o", out, *points) == 1
    assert not list(out.rglob("dataset.json"))
    # an earlier one does not stay as it was
    save(root / "imagesTr/l_1.nii.gz", ct.image.round().short(), ct)
    assert synthesize(root, "-o", out, *SIZE) == 1
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 1
    (root / "imagesTr/l_1.nii.gz").write_bytes((root / "imagesTr/l_2.nii.gz").read_bytes())
    assert synthesize(root, "-o", out, *SIZE, "--overwrite") == 1
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 0


def test_the_command_takes_a_series_also_as_an_app(tmp_path, ct):
    write_case(tmp_path, ct, "a_ct", ["a_label"], (".nii.gz", ".nii.gz"))
    words = f"synthesize {tmp_path}/a_ct.nii.gz {tmp_path}/a_label.nii.gz -o {tmp_path}/out"
    words += " --generator hu2023 --count 1 --size-mm 12 14 --follow-up 1 1.2 1.4 --seed 3"
    app(words.split(), standalone_mode=False)
    names = {path.name for path in (tmp_path / "out").glob("*_report.json")}
    assert names == {f"a_t{k}_report.json" for k in range(3)}


def test_the_last_line_counts_the_faint_tumours_of_all_points(tmp_path, ct, capsys):
    write_case(tmp_path, ct, "a_ct", ["a_label"], (".nii.gz", ".nii.gz"))
    words = "--count", 1, "--size-mm", 5, 6, "--contrast-hu", -8, -7, "--follow-up", 1, 1.2, 6
    pair = tmp_path / "a_ct.nii.gz", tmp_path / "a_label.nii.gz"
    assert synthesize(*pair, "-o", tmp_path / "out", *words) == 0
    reports = [
        json.loads((tmp_path / f"out/a_t{k}_report.json").read_text())["tumors"] for k in range(3)
    ]
    faint = sum(one["visibility"] < 5 for records in reports for one in records)
    assert faint >= 2
    said = capsys.readouterr()
    assert f"{faint} of 3 tumours are hardly visible" in said.err.splitlines()[-1]
    assert said.out.count("1 hardly visible") == faint
