"""Label files as users have them: a CT's scale, a value that is taken, other formats and names."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from test_cli import LPS, load, refused, run, scan, synthesize, write

nib = pytest.importorskip("nibabel")


def lits(seed=0):
    """A CT and its label: liver 1, an annotated tumour 2 in it."""
    ct, label = scan(seed)
    label = (label > 0).astype(np.uint8) * (label != 3)
    label[18:23, 26:31, 16:20] = 2
    return ct, label


def test_a_label_with_the_header_of_its_ct_is_read_and_written_whole(tmp_path, capsys):
    ct, label = scan()
    pair = write(tmp_path, "case", ct, label)
    header = nib.load(pair[0]).header
    nib.save(nib.Nifti1Image(label.astype(np.float64), LPS, header), pair[1])
    assert np.abs(load(pair[1])[0] - np.rint(load(pair[1])[0])).max() > 1e-5
    assert synthesize(*pair, "-o", tmp_path / "out", "--count", 1, "--tumor-label", 5) == 0
    new, image = load(tmp_path / "out/case_label.nii.gz")
    tumor = new == 5
    assert tumor.any() and image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(new[~tumor], label[~tumor])
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    # replay finds the same scan again
    out = tmp_path / "again"
    assert run("replay", tmp_path / "out/case_report.json", *pair, "-o", out) == 0
    assert "every voxel is as in the report" in capsys.readouterr().out


@pytest.mark.parametrize("words", [(), ("--organ-label", 1)])
def test_a_map_that_holds_the_default_value_is_refused(tmp_path, capsys, words):
    pair = write(tmp_path / "in", "case", *lits())
    out = tmp_path / "out"
    line = refused(capsys, "synthesize", *pair, "-o", out, "--generator", "hu2023", *words)
    assert "--tumor-label 2 must be free in the label map, but case_label.nii.gz holds 100" in line
    assert "--tumor-label 3" in line and "--add-to-label" in line
    assert not list(out.iterdir())


def test_tumours_are_added_to_annotated_ones_when_told(tmp_path, capsys):
    ct, label = lits()
    pair = write(tmp_path / "in", "case", ct, label)
    assert synthesize(*pair, "-o", tmp_path / "a", "--count", 1, "--add-to-label") == 0
    assert not capsys.readouterr().err
    new = load(tmp_path / "a/case_label.nii.gz")[0]
    assert (new == 2).sum() > 100 and (new[label == 2] == 2).all()
    # the value itself says so too where it is the organ's tumours, with a note
    assert synthesize(*pair, "-o", tmp_path / "b", "--count", 1, "--tumor-label", 2) == 0
    assert "holds 100 voxels of --tumor-label 2 already" in capsys.readouterr().err
    np.testing.assert_array_equal(load(tmp_path / "b/case_label.nii.gz")[0], new)


@pytest.mark.parametrize("workers", [1, 2])
def test_in_a_folder_the_maps_that_hold_it_fail_by_name(tmp_path, capsys, workers):
    folder = tmp_path / "in"
    write(folder, "a", *scan())
    write(folder, "b", *lits(1))
    write(folder, "c", *scan(2))
    words = folder, "-o", tmp_path / "out", "--workers", workers
    assert synthesize(*words) == 1
    said = capsys.readouterr()
    assert "b: --tumor-label 2 must be free" in said.err and "1 of 3 scans failed" in said.err
    assert "wrote 2 scans" in said.out
    assert synthesize(*words, "--add-to-label") == 0  # and the folder is completed
    assert "2 of 3 scans are finished already" in capsys.readouterr().out


def test_names_and_formats_of_all_kinds_in_one_folder(tmp_path, capsys):
    folder, (ct, label) = tmp_path / "in", scan()
    write(folder, "upper", ct, label, endings=("_ct.nii", "_label.nii"))
    (folder / "upper_ct.nii").rename(folder / "UPPER_CT.Nii")
    (folder / "upper_label.nii").rename(folder / "UPPER_LABEL.NII")
    twice = write(folder, "twice", ct, label)
    for path in twice:
        path.write_bytes(gzip.compress(path.read_bytes()))
    write(folder, "plain", ct, label, endings=("_ct.nii", "_label.nii"))
    (folder / "plain_ct.nii").rename(folder / "plain_ct.nii.gz")
    halves = write(folder, "pair", ct, label, endings=("_ct.nii", "_label.nii.gz"))
    image = nib.load(halves[0])
    nib.save(nib.Nifti1Pair(ct, LPS, image.header), folder / "pair_ct.img")
    halves[0].unlink()
    lfs = write(folder, "lfs", ct, label)
    lfs[0].write_text("version https://git-lfs.github.com/spec/v1")
    (folder / "nrrd_ct.nrrd").write_bytes(b"NRRD0004\n")
    write(folder, "nrrd", ct, label)[0].unlink()
    assert synthesize(folder, "-o", tmp_path / "out", "--count", 1) == 1
    said = capsys.readouterr()
    assert "lfs: lfs_ct.nii.gz is not a NIfTI file but a Git LFS pointer" in said.err
    assert "nrrd: nrrd_ct.nrrd is cut short or damaged" in said.err
    assert "2 of 6 scans failed" in said.err and "wrote 4 scans" in said.out
    labels = [load(tmp_path / f"out/{n}_label.nii.gz")[0] for n in ("UPPER", "twice", "pair")]
    for one in labels:
        assert (one == 2).any() and (one[one != 2] == label[one != 2]).all()


@pytest.mark.parametrize("command", ["evaluate", "replay", "reader-study", "pack"])
def test_every_command_names_a_stranger(tmp_path, capsys, command):
    ct, label = lits()
    pair = write(tmp_path / "in", "case", ct, label)
    page = tmp_path / "page"
    write(page, "case", ct, label)[0].write_text("<!DOCTYPE html>")
    (page / "case_label.nii.gz").write_text("<!DOCTYPE html>")
    if command == "evaluate":
        assert run("evaluate", page / "case_label.nii.gz", pair[1]) == 2
        assert run("evaluate", page, tmp_path / "in") == 1
    elif command == "replay":
        assert synthesize(*pair, "-o", tmp_path / "out", "--count", 1, "--add-to-label") == 0
        report = tmp_path / "out/case_report.json"
        assert run("replay", report, page / "case_ct.nii.gz", pair[1], "-o", tmp_path / "b") == 2
    elif command == "reader-study":
        pytest.importorskip("starlette", reason="needs the extra reader-study")
        words = "--real", page, "--synthetic", tmp_path / "in", "--db", tmp_path / "a.sqlite"
        assert run("reader-study", "serve", *words, "--port", 0) == 2
    else:
        pytest.importorskip("monai", reason="needs the extra train")
        data = tmp_path / "dataset.json"
        entry = {"image": "page/case_ct.nii.gz", "label": "in/case_label.nii.gz"}
        data.write_text(json.dumps({"training": [entry]}))
        assert run("train", "pack", data, "-o", tmp_path / "pack.npz") == 2
    assert "is not a NIfTI file but an HTML page" in capsys.readouterr().err


def test_pack_takes_a_label_with_a_scale(tmp_path):
    pytest.importorskip("monai", reason="needs the extra train")
    from tumorsynth.training.data import load_pack

    ct, label = lits()
    pair = write(tmp_path / "in", "case", ct, label)
    entry = {"image": "in/case_ct.nii.gz", "label": "in/case_label.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry]}))
    packs = []
    for name in ("whole", "scaled"):
        assert run("train", "pack", tmp_path / "dataset.json", "-o", tmp_path / f"{name}.npz") == 0
        packs += load_pack(tmp_path / f"{name}.npz")
        header = nib.load(pair[0]).header
        nib.save(nib.Nifti1Image(label.astype(np.float64), LPS, header), pair[1])
    assert packs[0].label.equal(packs[1].label) and (packs[0].label == 2).any()
    assert packs[0].hu.equal(packs[1].hu)


def test_evaluate_takes_the_folders_that_synthesize_wrote(tmp_path, capsys):
    pytest.importorskip("monai", reason="needs the extra evaluation")
    folder, out = tmp_path / "in", tmp_path / "out"
    for k, name in enumerate("ab"):
        write(folder, name, *scan(k))
    assert synthesize(folder, "-o", out, "--count", 1) == 0
    capsys.readouterr()
    assert run("evaluate", out, out) == 0
    said = capsys.readouterr()
    assert not said.err and "1.000" in said.out and "2 tumours" in said.out
    # predictions named as the scans, against the folder with CTs in it
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for name in "ab":
        content = (out / f"{name}_label.nii.gz").read_bytes()
        (predictions / f"{name}.nii.gz").write_bytes(content)
    assert run("evaluate", predictions, out) == 0
    assert run("healthy", out, "--organ-ml", 0) == 0
    assert "0 of 2 scans are healthy" in capsys.readouterr().out


def test_evaluate_says_that_no_label_holds_the_tumours_value(tmp_path, capsys):
    pytest.importorskip("monai", reason="needs the extra evaluation")
    pair = write(tmp_path / "in", "case", *scan())
    assert run("evaluate", pair[1], pair[1], "--tumor-label", 20) == 0
    said = capsys.readouterr()
    assert "no label holds 20 = --tumor-label" in said.err
    assert "case_label.nii.gz holds 0, 1, 3, 7" in said.err
    assert run("evaluate", pair[1], pair[1], "--tumor-label", 7) == 0
    assert not capsys.readouterr().err


def test_evaluate_says_that_no_prediction_holds_the_tumours_value(tmp_path, capsys):
    """A mask of 0 and 1 for labels where tumours are 2."""
    pytest.importorskip("monai", reason="needs the extra evaluation")
    label = lits()[1]
    labels, folder = tmp_path / "labels", tmp_path / "predictions"
    for path in (labels, folder):
        path.mkdir()
    for name in "ab":
        nib.save(nib.Nifti1Image(label, LPS), labels / f"{name}.nii.gz")

    def said(*predictions, more=()):
        for name, values in zip("ab", predictions, strict=True):
            nib.save(nib.Nifti1Image(values, LPS), folder / f"{name}.nii.gz")
        assert run("evaluate", folder, labels, *more) == 0
        return capsys.readouterr().err

    mask, none = (label == 2).astype(label.dtype), np.zeros_like(label)
    found = said(mask, mask)
    assert found.count("no prediction holds 2 = --tumor-label") == 1
    assert "a.nii.gz holds 0, 1" in found
    assert "b.nii.gz holds 0, 1" in said(none, mask)
    assert not said(none, none)  # nothing was found
    assert not said(label, mask)  # the organ alone was found in one of them
    assert not said(mask.astype(np.float32), mask.astype(np.float32), more=("--probabilities",))
    assert "no label holds 7" in (both := said(mask, mask, more=("--tumor-label", 7)))
    assert "no prediction" not in both


def test_evaluate_takes_labels_with_a_scale(tmp_path, capsys):
    pytest.importorskip("monai", reason="needs the extra evaluation")
    ct, label = lits()
    pair = write(tmp_path / "in", "case", ct, label)
    scaled = tmp_path / "scaled.nii.gz"
    header = nib.load(pair[0]).header
    nib.save(nib.Nifti1Image(label.astype(np.float64), LPS, header), scaled)
    for words in ((scaled, pair[1]), (pair[1], scaled), (scaled, scaled)):
        assert run("evaluate", *words) == 0
        said = capsys.readouterr()
        assert not said.err and "1 tumour" in said.out and "1.000" in said.out
