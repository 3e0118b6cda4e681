"""Which CTs and labels belong together in the layouts of public data sets, and by a pattern."""

from __future__ import annotations

import json

import pytest

from tumorsynth.scans.layouts import NothingPaired, find_scans, find_unlabelled


def touch(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def listed(found, root):
    """Name, CT, label, and where they go, of each scan."""
    return [
        (
            pair.name,
            pair.ct.relative_to(root).as_posix(),
            pair.label.relative_to(root).as_posix(),
            pair.places and (pair.places.ct, pair.places.label),
        )
        for pair in found.pairs
    ]


LIVER_FILES = "imagesTr/l_1_0000.nii.gz", "imagesTr/l_2_0000.nii.gz", "labelsTr/l_1.nii.gz"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            ["a_ct.nii.gz", "a_label.nii.gz"],
            [("a", "a_ct.nii.gz", "a_label.nii.gz", None)],
            id="NAME_ct",
        ),
        pytest.param(
            [*LIVER_FILES, "labelsTr/l_2.nii.gz", "imagesTs/l_3_0000.nii.gz"],
            [(f"l_{k}", f"imagesTr/l_{k}_0000.nii.gz", f"labelsTr/l_{k}.nii.gz") for k in (1, 2)],
            id="nnU-Net",
        ),
        pytest.param(
            ["images/T_0001_0000.nii.gz", "labels/T_0001.nii.gz"],
            [("T_0001", "images/T_0001_0000.nii.gz", "labels/T_0001.nii.gz")],
            id="FLARE22",
        ),
        pytest.param(
            ["images/a.nii.gz", "labels/a.nii.gz"],
            [("a", "images/a.nii.gz", "labels/a.nii.gz")],
            id="equal names",
        ),
        pytest.param(
            ["s1/ct.nii.gz", "s1/segmentations/liver.nii.gz", "s0/ct.nii.gz",
             "s0/segmentations/liver.nii.gz", "meta.csv"],
            [(s, f"{s}/ct.nii.gz", f"{s}/segmentations") for s in ("s0", "s1")],
            id="TotalSegmentator",
        ),
        pytest.param(
            ["ct.nii.gz", "segmentations/liver.nii.gz"],
            None,
            id="one case of TotalSegmentator",
        ),
        pytest.param(
            ["Mini/BDMAP_1/ct.nii.gz", "Mini/BDMAP_1/segmentations/aorta.nii.gz",
             "Mini/BDMAP_1/combined_labels.nii.gz"],
            [("BDMAP_1", "Mini/BDMAP_1/ct.nii.gz", "Mini/BDMAP_1/segmentations")],
            id="AbdomenAtlas, one folder above",
        ),
        pytest.param(
            ["volume-0.nii", "volume-10.nii", "segmentation-0.nii", "segmentation-10.nii"],
            [(f"volume-{k}", f"volume-{k}.nii", f"segmentation-{k}.nii") for k in (0, 10)],
            id="LiTS, one folder",
        ),
        pytest.param(
            ["Training Batch 1/volume-0.nii", "Training Batch 1/segmentation-0.nii",
             "Training Batch 2/volume-1.nii", "Training Batch 2/segmentation-1.nii"],
            [(f"volume-{k}", f"Training Batch {k + 1}/volume-{k}.nii",
              f"Training Batch {k + 1}/segmentation-{k}.nii") for k in (0, 1)],
            id="LiTS, batches",
        ),
        pytest.param(
            ["img/img0001.nii.gz", "label/label0001.nii.gz", ".DS_Store"],
            [("img0001", "img/img0001.nii.gz", "label/label0001.nii.gz")],
            id="BTCV",
        ),
        pytest.param(
            ["data/case_00000/imaging.nii.gz", "data/case_00000/segmentation.nii.gz",
             "data/case_00000/instances/kidney_instance-1_annotation-1.nii.gz",
             "data/case_00001/imaging.nii.gz", "data/kits.json"],
            [(f"case_0000{k}", f"data/case_0000{k}/imaging.nii.gz",
              f"data/case_0000{k}/segmentation.nii.gz") for k in (0, 1)],
            id="KiTS, with a case that has no label",
        ),
    ],
)  # fmt: skip
def test_one_folder(tmp_path, files, expected):
    root = touch(tmp_path / "set", *files)
    found = listed(find_scans(root), root)
    if expected is None:  # named after the folder
        expected = [("set", "ct.nii.gz", "segmentations")]
    assert [one[:3] for one in found] == [one[:3] for one in expected]
    for one, wanted in zip(found, expected, strict=True):
        assert one[3] == (None if len(wanted) == 4 else (one[1], one[2]))


@pytest.mark.parametrize(
    ("cts", "labels", "places"),
    [
        (["x_0000.nii.gz"], ["x.nii.gz"], ("cts/x_0000.nii.gz", "labels/x.nii.gz")),
        (["volume-3.nii"], ["segmentation-3.nii"],
         ("cts/volume-3.nii", "labels/segmentation-3.nii")),
        (["img0003.NII.GZ"], ["label0003.nii"], ("cts/img0003.nii.gz", "labels/label0003.nii")),
        (["a.nii.gz"], ["a/liver.nii.gz"], ("cts/a.nii.gz", "labels/a")),
        (["b/ct.nii.gz"], ["b/segmentations/liver.nii.gz"],
         ("cts/b/ct.nii.gz", "labels/b/segmentations")),
        (["same.nii.gz"], ["same.nii.gz"], None),
        (["n_ct.nii.gz"], ["n_label.nii.gz"], None),
    ],
)  # fmt: skip
def test_two_folders(tmp_path, cts, labels, places):
    touch(tmp_path / "cts", *cts), touch(tmp_path / "labels", *labels)
    (pair,) = find_scans(tmp_path / "cts", tmp_path / "labels").pairs
    assert (pair.places and (pair.places.ct, pair.places.label)) == places
    assert pair.ct.exists() and pair.label.exists()


def write_dataset(root, **content):
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))


def test_the_decathlon_lists_its_cases(tmp_path):
    root = touch(tmp_path / "Task03", "imagesTr/l_0.nii.gz", "labelsTr/l_0.nii.gz",
                 "imagesTr/._l_0.nii.gz", "imagesTs/l_9.nii.gz")  # fmt: skip
    cases = [{"image": "./imagesTr/l_0.nii.gz", "label": "./labelsTr/l_0.nii.gz"}]
    write_dataset(root, training=cases, test=["./imagesTs/l_9.nii.gz"], labels={"1": "liver"})
    places = "imagesTr/l_0.nii.gz", "labelsTr/l_0.nii.gz"
    for given in (root, root / "dataset.json"):
        found = find_scans(given)
        assert listed(found, root) == [("l_0", *places, places)]
        assert found.dataset == root / "dataset.json"
    # the same folders by name, as nnU-Net and MONAI users give them
    found = find_scans(root / "imagesTr", root / "labelsTr")
    assert listed(found, root) == [("l_0", *places, places)] and found.dataset is not None


def test_the_first_nnunet_lists_images_without_their_channel(tmp_path):
    root = touch(tmp_path / "Task003", "imagesTr/l_0_0000.nii.gz", "labelsTr/l_0.nii.gz")
    cases = [{"image": "./imagesTr/l_0.nii.gz", "label": "./labelsTr/l_0.nii.gz"}]
    write_dataset(root, training=cases, modality={"0": "CT"}, labels={"1": "liver"})
    (pair,) = find_scans(root).pairs
    assert pair.ct.name == "l_0_0000.nii.gz"


def test_the_ct_is_the_channel_that_dataset_json_names(tmp_path):
    root = touch(tmp_path / "D1", "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz",
                 "labelsTr/a.nii.gz")  # fmt: skip
    with pytest.raises(
        ValueError, match="channels 0, 1 must be the CT, but there is no dataset.json.*--channel 0"
    ):
        find_scans(root)
    write_dataset(root, channel_names={"0": "PET", "1": "CT"}, labels={"liver": 1})
    (pair,) = find_scans(root).pairs
    assert pair.ct.name == "a_0001.nii.gz"
    assert pair.places.copies == ((root / "imagesTr/a_0000.nii.gz", "imagesTr/a_0000.nii.gz"),)
    for channels, says in (
        (
            {"0": "PET", "1": "MR"},
            r"0 \(PET\), 1 \(MR\) must be the CT, but dataset.json calls none",
        ),
        (
            {"0": "CT", "1": "ct late"},
            r"0 \(CT\), 1 \(ct late\) must be the CT, but dataset.json calls 2 of them CT",
        ),
        ({"0": "PET", "7": "CT"}, r"0 \(PET\), 1 must be the CT, but dataset.json calls none"),
    ):
        write_dataset(root, channel_names=channels, labels={"liver": 1})
        with pytest.raises(ValueError, match=says):
            find_scans(root)


@pytest.mark.parametrize(
    ("wanted", "number"),
    [("0", 0), ("0001", 1), ("arterial", 0), (" Venous ", 1), ("2", 1), ("CT", None), ("5", None),
     ("x", None)],
)  # fmt: skip
def test_one_of_several_cts_is_chosen_by_number_or_name(tmp_path, wanted, number):
    root = touch(tmp_path / "D1", *(f"imagesTr/a_000{k}.nii.gz" for k in range(4)),
                 "labelsTr/a.nii.gz")  # fmt: skip
    names = {"0": "Arterial", "1": "venous", "2": "CT", "3": "CT"}
    if wanted == "2":
        names = {"0": "CT", "1": "2", "2": "late", "3": "CT"}  # a name goes first
    write_dataset(root, channel_names=names, labels={"liver": 1})
    if number is None:
        with pytest.raises(ValueError, match=r"one of the channels 0 \(Arterial\), 1 \(venous\)"):
            find_scans(root, channel=wanted)
        return
    found = find_scans(root, channel=wanted)
    (pair,) = found.pairs
    assert pair.ct.name == f"a_000{number}.nii.gz" and len(pair.places.copies) == 3
    others = [k for k in range(4) if k != number]
    assert all(f"a_000{k}.nii.gz" in found.about_channels for k in others)


def test_a_channel_is_for_files_with_channels(tmp_path):
    touch(tmp_path, "a_ct.nii.gz", "a_label.nii.gz")
    with pytest.raises(ValueError, match="--channel is for the channels of nnU-Net.*a_ct.nii.gz"):
        find_scans(tmp_path, channel="1")


def test_a_ct_with_its_folder_of_masks_and_one_mask_alone(tmp_path):
    touch(tmp_path, "ct.nii.gz", "segmentations/liver.nii.gz")
    found = find_scans(tmp_path / "ct.nii.gz", tmp_path / "segmentations")
    assert found.has_masks and found.pairs[0].places.label == "segmentations"
    alone = find_scans(tmp_path / "ct.nii.gz", tmp_path / "segmentations/liver.nii.gz")
    assert not alone.has_masks and alone.pairs[0].places is None


def test_equal_names_in_several_folders_get_the_folders_name(tmp_path):
    root = touch(tmp_path / "k", "a/case_0/imaging.nii.gz", "b/case_0/imaging.nii.gz")
    assert [p.name for p in find_scans(root).pairs] == ["a_case_0", "b_case_0"]
    touch(tmp_path / "l", "a/volume-0.nii", "a/segmentation-0.nii", "b/volume-0.nii",
          "b/segmentation-0.nii")  # fmt: skip
    pairs = find_scans(tmp_path / "l").pairs
    assert [(p.name, p.label.parent.name) for p in pairs] == [
        ("a_volume-0", "a"),
        ("b_volume-0", "b"),
    ]


def test_the_folder_of_the_results_is_not_searched(tmp_path):
    root = touch(tmp_path / "l", "volume-0.nii", "segmentation-0.nii", "out/volume-0.nii",
                 "out/segmentation-0.nii")  # fmt: skip
    assert len(find_scans(root, without=root / "out").pairs) == 1


@pytest.mark.parametrize(
    ("pattern", "files", "names"),
    [
        (("img/{name}.nii.gz", "gt/{name}_mask.nii.gz"),
         ["img/a.nii.gz", "img/b.nii.gz", "gt/a_mask.nii.gz"], ["a", "b"]),
        (("{name}/{name}.nii.gz", "{name}/organ.nii.gz"),
         ["p1/p1.nii.gz", "p1/organ.nii.gz", "p2/p3.nii.gz"], ["p1"]),
        (("{name}/CT*.nii.gz", "{name}/liver.nii.gz"), ["p/CT_01.nii.gz", "p/liver.nii.gz"], ["p"]),
        (("{name}*ct.nii.gz", "gt/{name}*_mask.nii.gz"),
         ["a_ct.nii.gz", "gt/a_x_mask.nii.gz"], ["a"]),
    ],
)  # fmt: skip
def test_a_pattern_of_the_users_own(tmp_path, pattern, files, names):
    found = find_scans(touch(tmp_path / "x", *files), pattern=pattern)
    assert [pair.name for pair in found.pairs] == names
    assert found.pairs[0].label.exists() and found.pairs[0].places.ct in files


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (("img/*.nii.gz", "{name}.nii.gz"), "{name} in each, got 'img/"),
        (("../{name}.nii", "{name}.nii"), "below the folder"),
        (("ct/{name}.nii", "img/{name}.nii"), "matches no file"),
        (("img/{name}.nii.gz", "gt/{name}.nii.gz"), "matches a and 'gt/{name}.nii.gz' a_mask"),
        (("*/{name}.nii.gz", "gt/{name}.nii.gz"), "both 'a_mask'"),
    ],
)
def test_patterns_that_do_not_fit(tmp_path, pattern, says):
    root = touch(tmp_path / "x", "img/a.nii.gz", "gt/a_mask.nii.gz", "more/a_mask.nii.gz")
    with pytest.raises(ValueError, match=says.replace("{", r"\{").replace("*", r"\*")):
        find_scans(root, pattern=pattern)


def test_what_cannot_be_paired_says_which_pairs_were_looked_for(tmp_path):
    root = touch(tmp_path / "x", "patient1.nii.gz", "patient1_seg.nii.gz")
    with pytest.raises(
        NothingPaired, match="patient1.nii.gz.*volume-0 with segmentation-0.*--pattern"
    ):
        find_scans(root)
    touch(tmp_path, "cts/a.nii.gz", "labels/b.nii.gz")
    with pytest.raises(ValueError, match="a.nii.gz against b.nii.gz.*equal names.*name files so"):
        find_scans(tmp_path / "cts", tmp_path / "labels")


def test_a_label_that_two_folders_hold_is_not_guessed(tmp_path):
    root = touch(tmp_path / "l", "ct/volume-0.nii", "a/segmentation-0.nii", "b/segmentation-0.nii")
    with pytest.raises(ValueError, match="must have one label"):
        find_scans(root)


def test_cts_without_labels_for_segmentation(tmp_path):
    root = touch(tmp_path / "x", "a.nii.gz", "b_ct.nii.gz")
    assert [(p.name, p.label.name) for p in find_unlabelled(root, None, tmp_path).pairs] == [
        ("a", "a.nii.gz"),
        ("b", "b.nii.gz"),
    ]
    with pytest.raises(ValueError, match="leave one of them out"):
        find_unlabelled(root, root, tmp_path)
    with pytest.raises(ValueError, match="holds no .nii.gz"):
        find_unlabelled(touch(tmp_path / "y", "a.txt"), None, tmp_path)
