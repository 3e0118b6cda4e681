"""Which CTs and label maps belong together."""

from __future__ import annotations

import pytest

from tumorsynth.scans.pairing import find_pairs


def names(pairs):
    return [(p.name, p.ct.name, p.label.name) for p in pairs]


def touch(folder, *files):
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file).touch()
    return folder


def test_pairs_of_two_files(tmp_path):
    touch(tmp_path, "a_ct.nii.gz", "b.c.nii", "mask.nii")
    mask = tmp_path / "mask.nii"
    assert names(find_pairs(tmp_path / "a_ct.nii.gz", mask)) == [("a", "a_ct.nii.gz", "mask.nii")]
    assert names(find_pairs(tmp_path / "b.c.nii", mask)) == [("b.c", "b.c.nii", "mask.nii")]


def test_pairs_of_one_folder(tmp_path):
    touch(tmp_path, "b_ct.nii", "b_label.nii.gz", "a_ct.nii.gz", "x.nii.gz", "y_label.nii.gz",
          ".c_ct.nii.gz", "d_ct.txt")  # fmt: skip
    # a has no label map: listed, so that it is reported and not silently passed over
    assert names(find_pairs(tmp_path, None)) == [
        ("a", "a_ct.nii.gz", "a_label.nii.gz"),
        ("b", "b_ct.nii", "b_label.nii.gz"),
    ]


def test_pairs_of_two_folders(tmp_path):
    cts = touch(tmp_path / "cts", "b.nii.gz", "a_ct.nii.gz", "c.nii.gz")
    labels = touch(tmp_path / "labels", "b.nii.gz", "a_label.nii", "z.nii.gz")
    assert names(find_pairs(cts, labels)) == [
        ("a", "a_ct.nii.gz", "a_label.nii"),
        ("b", "b.nii.gz", "b.nii.gz"),
        ("c", "c.nii.gz", "c.nii.gz"),
    ]


def test_pairs_that_cannot_be_found_say_why(tmp_path):
    folder = touch(tmp_path / "f", "a.nii.gz", "a_ct.nii.gz", "a_ct.nii", "scan.dcm")
    empty = touch(tmp_path / "empty", "notes.txt")
    for ct, label, says in [
        (tmp_path / "no.nii.gz", None, "no such file or folder"),
        (folder / "a.nii.gz", tmp_path / "no.nii.gz", "no such file or folder"),
        (folder / "a.nii.gz", None, "needs its label file"),
        (folder / "a.nii.gz", folder, "needs its label file"),
        (folder, folder / "a.nii.gz", "must be one too"),
        (folder, None, "both 'a'"),
        (empty, None, "holds no NAME_ct.nii.gz"),
        (empty, empty, "holds no .nii.gz"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            find_pairs(ct, label)
