"""Every format in every layout; CTs without a label and labels without a CT in every layout."""

from __future__ import annotations

import pytest
from test_layouts import listed, touch, write_dataset

from tumorsynth.scans.layouts import find_scans

# CT and label of a case, and of a second one, without suffixes
LAYOUTS = {
    "NAME": [("a_ct", "a_label"), ("b_ct", "b_label")],
    "nnU-Net": [(f"imagesTr/{k}_0000", f"labelsTr/{k}") for k in "ab"],
    "FLARE22": [(f"images/{k}_0000", f"labels/{k}") for k in "ab"],
    "equal names": [(f"images/{k}", f"labels/{k}") for k in "ab"],
    "TotalSegmentator": [(f"s{k}/ct", f"s{k}/segmentations/liver") for k in "ab"],
    "AbdomenAtlas": [(f"Mini/{k}/ct", f"Mini/{k}/segmentations/aorta") for k in "ab"],
    "LiTS": [(f"volume-{k}", f"segmentation-{k}") for k in (0, 10)],
    "BTCV": [(f"img/img000{k}", f"label/label000{k}") for k in (1, 2)],
    "KiTS": [(f"data/case_{k}/imaging", f"data/case_{k}/segmentation") for k in "ab"],
    "Decathlon": [(f"imagesTr/{k}", f"labelsTr/{k}") for k in "ab"],
}
# suffixes of CT and label, and of what is written
FORMATS = [
    (".nii", ".nii"),
    (".nrrd", ".nrrd"),
    (".nhdr", ".nhdr"),
    (".mha", ".mha"),
    (".mhd", ".mhd"),
    (".NRRD", ".nrrd"),
    (".hdr", ".nii.gz"),
    (".NII.GZ", ".nii.gz"),
]


def make(root, layout, suffixes, *, cases=2, labels=2):
    """Touch the files of a layout. cases, labels: how many have a CT, and a label."""
    files = [ct + suffixes[0] for ct, _ in LAYOUTS[layout][:cases]]
    files += [label + suffixes[1] for _, label in LAYOUTS[layout][-labels:]]
    touch(root, *files)
    if layout == "Decathlon":
        listed = [
            {"image": f"./{ct}{suffixes[0]}", "label": f"./{label}{suffixes[1]}"}
            for ct, label in LAYOUTS[layout]
        ]
        write_dataset(root, training=listed, labels={"0": "background", "1": "liver"})
    return root


def is_of_masks(layout):
    return layout in ("TotalSegmentator", "AbdomenAtlas")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("suffix", "written"), FORMATS)
def test_every_format_in_every_layout(tmp_path, layout, suffix, written):
    root = make(tmp_path / "set", layout, (suffix, suffix))
    found = listed(find_scans(root), root)
    assert len(found) == 2
    for (_, ct, label, places), (ct_name, label_name) in zip(found, LAYOUTS[layout], strict=True):
        expected = label_name.rpartition("/")[0] if is_of_masks(layout) else label_name + suffix
        assert (ct, label) == (ct_name + suffix, expected)
        if layout == "NAME":
            assert places is None
        elif is_of_masks(layout):
            assert places == (ct_name + written, expected)
        else:
            assert places == (ct_name + written, label_name + written)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ct_and_label_of_two_formats(tmp_path, layout):
    found = find_scans(make(tmp_path / "set", layout, (".nrrd", ".mha"))).pairs
    assert len(found) == 2 and all(pair.label.exists() for pair in found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".nii.gz"])
def test_a_ct_without_its_label_is_listed_with_the_name_it_should_have(tmp_path, layout, suffix):
    root = make(tmp_path / "set", layout, (suffix, suffix), labels=1)
    first, second = find_scans(root).pairs
    assert not first.label.exists() and second.label.exists()
    name = LAYOUTS[layout][0][1]
    name = name.rpartition("/")[0] if is_of_masks(layout) else name + suffix
    assert first.label == root / name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "Decathlon"])
def test_a_label_without_its_ct_is_named(tmp_path, layout):
    root = make(tmp_path / "set", layout, (".nrrd", ".nrrd"), cases=1)
    found = find_scans(root)
    assert len(found.pairs) == 1 and len(found.alone) == 1
    name = LAYOUTS[layout][1][1]
    assert name.rpartition("/")[0 if is_of_masks(layout) else 2] in found.about_alone
    assert "1 label has no CT" in found.about_alone
    whole = find_scans(make(tmp_path / "whole", layout, (".nii.gz", ".nii.gz")))
    assert whole.about_alone is None and whole.about_channels is None


def test_labels_without_their_ct_in_two_folders_and_with_a_pattern(tmp_path):
    root = touch(tmp_path, "cts/a.nii.gz", "gt/a.nii.gz", "gt/b.mha", "gt/c.nii.gz", "gt/d.nii.gz",
                 "gt/e.nii.gz", "gt/notes.txt")  # fmt: skip
    found = find_scans(root / "cts", root / "gt")
    assert "4 labels have no CT" in found.about_alone and found.about_alone.endswith(", ...")
    found = find_scans(root, pattern=("cts/{name}.nii.gz", "gt/{name}.nii.gz"))
    assert [path.name for path in found.alone] == ["c.nii.gz", "d.nii.gz", "e.nii.gz"]
    touch(tmp_path, "masks/a/liver.nii.gz", "masks/b/liver.nii.gz")
    assert [path.name for path in find_scans(root / "cts", root / "masks").alone] == ["b"]


@pytest.mark.parametrize(
    ("files", "pairs"),
    [
        (["A/CT.nii.gz", "A/Segmentations/Liver.nii.gz"], [("A/CT.nii.gz", "A/Segmentations")]),
        (["c/Imaging.nrrd", "c/Segmentation.nrrd"], [("c/Imaging.nrrd", "c/Segmentation.nrrd")]),
        (["Volume-0.NII", "Segmentation-0.nii"], [("Volume-0.NII", "Segmentation-0.nii")]),
        (["ImagesTr/a_0000.mha", "LabelsTr/A.mha"], [("ImagesTr/a_0000.mha", "LabelsTr/A.mha")]),
        (["images/Case1.nii.gz", "labels/case1.nii.gz"],
         [("images/Case1.nii.gz", "labels/case1.nii.gz")]),
        (["A_CT.nii.gz", "a_LABEL.nii.gz"], [("A_CT.nii.gz", "a_LABEL.nii.gz")]),
        # which of two is meant is not guessed
        (["images/A.nii.gz", "images/a.nii.gz", "labels/a.nii.gz"],
         [("images/A.nii.gz", "labels/A.nii.gz"), ("images/a.nii.gz", "labels/a.nii.gz")]),
    ],
)  # fmt: skip
def test_capital_letters(tmp_path, files, pairs):
    root = touch(tmp_path / "set", *files)
    assert [one[1:3] for one in listed(find_scans(root), root)] == pairs


def test_the_preferred_one_of_several_files_of_a_name(tmp_path):
    root = touch(tmp_path / "set", *(f"a/ct{suffix}" for suffix in (".nii", ".nii.gz", ".nrrd")),
                 "a/ct_notes.txt", "a/segmentations/liver.nii.gz")  # fmt: skip
    assert find_scans(root).pairs[0].ct.name == "ct.nii.gz"


def test_dicom_slices_in_layouts_of_cases(tmp_path):
    header = b"\0" * 128 + b"DICM"
    for ct, label in (("a/ct", "a/segmentations/liver.nrrd"), ("b/imaging", "b/segmentation.mha")):
        root = touch(tmp_path / ct[0], label)
        (root / ct).mkdir(parents=True)
        (root / ct / "1.dcm").write_bytes(header)
        (pair,) = find_scans(root).pairs
        assert pair.ct == root / ct and pair.places.ct == f"{ct}.nii.gz" and pair.label.exists()
