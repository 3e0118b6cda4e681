"""Public data sets through the command line, made of the phantom in the layout they come in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from phantoms import shared_phantom
from test_cli import load, refused, run

import tumorsynth as ts

nib = pytest.importorskip("nibabel")

ORGANS = ("liver", "stomach", "spleen")


@pytest.fixture(scope="module")
def ct():
    return shared_phantom((2.0, 2.0, 2.0), (64, 64, 48))


def save(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array), affine), path)


def image(ct):
    return ct.image[0].short().numpy()


def liver(ct, seed=0):
    """The liver alone, as in LiTS and the Decathlon."""
    return (ct.label[0] == ts.phantom.LABELS["liver"]).byte().numpy()


def write_masks(folder, ct):
    save(folder / "ct.nii.gz", image(ct), ct.affine)
    for organ in ORGANS:
        mask = (ct.label[0] == ts.phantom.LABELS[organ]).byte().numpy()
        save(folder / "segmentations" / f"{organ}.nii.gz", mask, ct.affine)


def synthesize(*words):
    words = [*words, "--generator", "hu2023", "--count", 1]
    return run("synthesize", *words)


def check_result(source, made, *, tumor=2, changed=True):
    """A result has tumours, at the place and of the type of its source."""
    (old, first), (new, second) = load(source), load(made)
    assert new.shape == old.shape and new.dtype == old.dtype
    np.testing.assert_array_equal(first.affine, second.affine)
    assert ((new == tumor) & (old != tumor)).any() == changed
    return new


@pytest.mark.parametrize(
    ("ct_name", "label_name"),
    [
        ("imagesTr/liver_0_0000.nii.gz", "labelsTr/liver_0.nii.gz"),
        ("volume-0.nii", "segmentation-0.nii"),
        ("Training Batch 1/volume-0.nii", "Training Batch 1/segmentation-0.nii"),
        ("img/img0001.nii.gz", "label/label0001.nii.gz"),  # BTCV has 13 organs
        ("case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz"),
    ],
)
def test_label_maps_keep_their_layout(tmp_path, ct, ct_name, label_name):
    source, out = tmp_path / "set", tmp_path / "out"
    save(source / ct_name, image(ct), ct.affine)
    save(source / label_name, liver(ct), ct.affine)
    assert synthesize(source, "-o", out) == 0
    value = 14 if label_name.startswith("label/") else 2
    tumor = check_result(source / label_name, out / label_name, tumor=value) == value
    assert (load(out / ct_name)[0] != load(source / ct_name)[0])[tumor].mean() > 0.5
    (report,) = out.glob("*_report.json")
    assert json.loads(report.read_text())["tumors"][0]["applied"]
    # and the results are found in their turn
    assert synthesize(out, "-o", tmp_path / "again", "--tumor-label", 3) == 0


@pytest.mark.parametrize(
    ("ct_name", "label_name", "organ", "value"),
    [
        ("volume-0.nii", "segmentation-0.nii", "liver", 2),
        ("img/img0001.nii.gz", "label/label0001.nii.gz", "liver", 14),
        ("case_0/imaging.nii.gz", "case_0/segmentation.nii.gz", "kidney", 2),
    ],
)
def test_a_sets_own_layout_tells_its_label_map(tmp_path, ct, ct_name, label_name, organ, value):
    source, out = tmp_path / "set", tmp_path / "out"
    save(source / ct_name, image(ct), ct.affine)
    save(source / label_name, liver(ct) * (6 if value == 14 else 1), ct.affine)
    assert synthesize(source, "-o", out, "--organ", organ) == 0
    check_result(source / label_name, out / label_name, tumor=value)


def test_own_labels_under_a_sets_names_get_a_value_that_is_free(tmp_path, ct, capsys):
    source, out = tmp_path / "set", tmp_path / "out"
    aorta = (ct.label[0] == ts.phantom.LABELS["aorta"]).byte().numpy()
    save(source / "img/img0001.nii.gz", image(ct), ct.affine)
    save(source / "label/label0001.nii.gz", liver(ct) + 14 * aorta, ct.affine)
    assert synthesize(source, "-o", out, "--organ-label", 1) == 0
    check_result(source / "label/label0001.nii.gz", out / "label/label0001.nii.gz", tumor=2)
    assert "tumours get 14" not in capsys.readouterr().err


def test_btcv_as_downloaded(tmp_path, ct, capsys):
    """Its tests have no labels, and tumours get the value after the 13 organs."""
    source, out = tmp_path / "RawData", tmp_path / "out"
    for k in (1, 2):  # the second has organs that the first lacks
        save(source / f"Training/img/img000{k}.nii.gz", image(ct), ct.affine)
        label = liver(ct) + 12 * (ct.label[0] == ts.phantom.LABELS["aorta"]).byte().numpy()
        where = source / f"Training/label/label000{k}.nii.gz"
        save(where, liver(ct) if k == 1 else label, ct.affine)
    save(source / "Testing/img/img0061.nii.gz", image(ct), ct.affine)
    assert synthesize(source, "-o", out, "--organ-label", 1) == 0
    said = capsys.readouterr().err
    assert "note: 1 scan without label in" in said and "tumours get 14" in said
    assert "no organ is named" not in said
    check_result(source / "Training/label/label0002.nii.gz",
                 out / "Training/label/label0002.nii.gz", tumor=14)  # fmt: skip
    assert not (out / "Testing").exists()
    assert synthesize(source, "-o", tmp_path / "default") == 0
    assert (
        "no organ is named, so that tumours go into 1, which is spleen" in capsys.readouterr().err
    )
    # a scan that should have a label still fails
    save(source / "Training/img/img0003.nii.gz", image(ct), ct.affine)
    assert synthesize(source, "-o", tmp_path / "third") == 1
    assert "img0003: no such file" in capsys.readouterr().err


def test_nnunets_regions_leave_the_tumours_out(tmp_path, ct, capsys):
    content = {"labels": {"background": 0, "whole": [1, 2], "tumour": 2}}
    root = write_nnunet(tmp_path / "D1", ct, cases=1, regions_class_order=[1, 2], **content)
    out = tmp_path / "D2"
    assert synthesize(root / "dataset.json", "-o", out, "--organ", "whole") == 0
    check_result(root / "labelsTr/a_0.nii.gz", out / "labelsTr/a_0.nii.gz", tumor=2)
    assert json.loads((out / "dataset.json").read_text())["labels"] == content["labels"]
    line = refused(capsys, "synthesize", root, "-o", tmp_path / "D3", "--organ", "tumour")
    assert "--tumor-label must differ from the values of --organ" in line
    line = refused(capsys, "synthesize", root, "-o", tmp_path / "D3", "--organ", "spleen")
    assert "--organ must be names of --label-map" in line and "organ_labels" not in line


def test_a_case_with_one_kidney_is_named(tmp_path, ct, capsys):
    for k, sides in enumerate((("left", "right"), ("right",))):
        case = tmp_path / f"set/BDMAP_{k}"
        save(case / "ct.nii.gz", image(ct), ct.affine)
        for side in sides:
            mask = (ct.label[0] == ts.phantom.LABELS[f"{side}_kidney"]).byte().numpy()
            save(case / f"segmentations/kidney_{side}.nii.gz", mask, ct.affine)
    words = tmp_path / "set", "-o", tmp_path / "out", "--organ", "kidney", "--bulge", 0.3
    assert synthesize(*words, "--size-mm", 12, 14) == 0
    assert "note: BDMAP_1 has no kidney_left: tumours" in capsys.readouterr().err
    for case in (tmp_path / "out").glob("BDMAP_?"):  # also of a tumour that grows beyond it
        masks = {p.name: load(p)[0] > 0 for p in (case / "segmentations").iterdir()}
        tumor = masks.pop("kidney_tumor.nii.gz")
        assert tumor.any() and np.logical_or.reduce(list(masks.values()))[tumor].all()


def test_a_run_resumes_and_a_pattern_keeps_names(tmp_path, ct, capsys):
    for k in range(2):
        save(tmp_path / f"set/p{k}/scan.nii.gz", image(ct), ct.affine)
        save(tmp_path / f"set/p{k}/gt.nii.gz", liver(ct), ct.affine)
    words = tmp_path / "set", "-o", tmp_path / "set/out", "--pattern", "{name}/scan.nii.gz"
    words = *words, "{name}/gt.nii.gz"
    assert synthesize(*words) == 0
    check_result(tmp_path / "set/p1/gt.nii.gz", tmp_path / "set/out/p1/gt.nii.gz")
    assert synthesize(*words) == 0
    assert "2 of 2 scans are finished already" in capsys.readouterr().out


def test_in_a_folder_others_are_done_and_the_failing_ones_named(tmp_path, ct, capsys):
    for k in range(3):
        save(tmp_path / f"set/case_{k}/imaging.nii.gz", image(ct), ct.affine)
        if k != 1:
            save(tmp_path / f"set/case_{k}/segmentation.nii.gz", liver(ct), ct.affine)
    (tmp_path / "set/case_2/imaging.nii.gz").write_bytes(b"no scan")
    assert synthesize(tmp_path / "set", "-o", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "case_1: no such file" in said.err and "segmentation.nii.gz" in said.err
    assert "case_2: imaging.nii.gz is not a NIfTI" in said.err and "2 of 3 scans failed" in said.err
    check_result(tmp_path / "set/case_0/segmentation.nii.gz",
                 tmp_path / "out/case_0/segmentation.nii.gz")  # fmt: skip


def write_nnunet(root, ct, cases=2, **content):
    for k in range(cases):
        save(root / f"imagesTr/a_{k}_0000.nii.gz", image(ct), ct.affine)
        save(root / f"labelsTr/a_{k}.nii.gz", liver(ct), ct.affine)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **content,
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_nnunet_raw_gets_a_dataset_json_with_the_tumour(tmp_path, ct):
    root, out = write_nnunet(tmp_path / "D1", ct, cases=3), tmp_path / "D2"
    (root / "labelsTr/a_1.nii.gz").unlink()  # fails, and so does not count
    assert synthesize(root, "-o", out, "--organ", "liver") == 1
    made = json.loads((out / "dataset.json").read_text())
    assert made["labels"] == {"background": 0, "liver": 1, "tumor": 2}
    assert made["numTraining"] == 2 and made["channel_names"] == {"0": "CT"}
    assert sorted(p.name for p in (out / "labelsTr").iterdir()) == ["a_0.nii.gz", "a_2.nii.gz"]
    check_result(root / "labelsTr/a_0.nii.gz", out / "labelsTr/a_0.nii.gz")
    report = json.loads((out / "a_0_report.json").read_text())
    assert report["organs"] == {"label_map": "dataset.json", "liver": 1}


def test_further_channels_come_along(tmp_path, ct):
    root, out = tmp_path / "D1", tmp_path / "D2"
    write_nnunet(root, ct, cases=1, channel_names={"0": "CT", "1": "PET"})
    save(root / "imagesTr/a_0_0001.nii.gz", image(ct), ct.affine)
    assert synthesize(root, "-o", out) == 0
    other = "imagesTr/a_0_0001.nii.gz"
    assert (out / other).read_bytes() == (root / other).read_bytes()


def test_a_case_without_one_of_the_channels_is_named(tmp_path, ct, capsys):
    root, out = tmp_path / "D1", tmp_path / "D2"
    write_nnunet(root, ct, cases=2, channel_names={"0": "CT", "1": "PET"})
    save(root / "imagesTr/a_0_0001.nii.gz", image(ct), ct.affine)
    assert synthesize(root, "-o", out) == 1
    said = capsys.readouterr().err
    assert "a_1 has no a_1_0001.nii.gz" in said and "a_0:" not in said
    assert "the tumours go into imagesTr/a_0_0000.nii.gz and the like alone" in said
    assert [path.name for path in (out / "labelsTr").iterdir()] == ["a_0.nii.gz"]
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 1
    # without a dataset.json, what one case has the others must have
    (root / "dataset.json").unlink()
    assert synthesize(root, "-o", tmp_path / "D3", "--channel", 0) == 1
    assert "a_1 has no a_1_0001.nii.gz" in capsys.readouterr().err


def test_the_decathlon_lists_the_results(tmp_path, ct):
    root, out = tmp_path / "Task03", tmp_path / "out"
    save(root / "imagesTr/l_0.nii.gz", image(ct), ct.affine)
    save(root / "labelsTr/l_0.nii.gz", liver(ct), ct.affine)
    cases = [{"image": "./imagesTr/l_0.nii.gz", "label": "./labelsTr/l_0.nii.gz"}]
    content = {"training": cases, "test": ["./imagesTs/l_9.nii.gz"], "numTest": 1}
    content |= {"numTraining": 1, "labels": {"0": "background", "1": "liver"}}
    (root / "dataset.json").write_text(json.dumps(content))
    assert synthesize(root / "dataset.json", "-o", out, "--organ", "liver") == 0
    made = json.loads((out / "dataset.json").read_text())
    assert made["labels"] == {"0": "background", "1": "liver", "2": "tumor"}
    assert made["training"] == cases and made["test"] == [] and made["numTest"] == 0
    check_result(root / "labelsTr/l_0.nii.gz", out / "labelsTr/l_0.nii.gz")


def test_a_list_of_files_without_labels_is_enough(tmp_path, ct):
    save(tmp_path / "a.nii.gz", image(ct), ct.affine)
    save(tmp_path / "b.nii.gz", liver(ct), ct.affine)
    cases = [{"image": "a.nii.gz", "label": "b.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": cases}))
    assert synthesize(tmp_path / "dataset.json", "-o", tmp_path / "out") == 0
    check_result(tmp_path / "b.nii.gz", tmp_path / "out/b.nii.gz")
    made = json.loads((tmp_path / "out/dataset.json").read_text())
    assert made == {"training": [{"image": "./a.nii.gz", "label": "./b.nii.gz"}]}


@pytest.mark.parametrize(
    ("content", "words", "says"),
    [
        ({}, ["--tumor-label", 5], "--tumor-label 2"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, [], "ignore label"),
        ({"labels": {"background": 0, "liver": [1]}, "regions_class_order": [1]}, [], "regions"),
        (
            {"labels": {"background": 0, "liver": 1, "spleen": 2}},
            ["--tumor-label", 2],
            "2 is spleen",
        ),
        ({}, ["--organ", "spleen"], "did you mean|it has liver"),
        ({"channel_names": {"0": "MR"}}, [], None),  # one channel: it is the CT
    ],
)
def test_what_nnunet_would_refuse_is_refused_before(tmp_path, ct, capsys, content, words, says):
    import re

    root = write_nnunet(tmp_path / "D1", ct, cases=1, **content)
    words = root, "-o", tmp_path / "out", *words
    if says is None:
        assert synthesize(*words) == 0
        return
    line = refused(capsys, "synthesize", *words, "--generator", "hu2023")
    assert re.search(says, line) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("single", [True, False])
def test_one_file_per_organ(tmp_path, ct, capsys, single):
    root, out = tmp_path / "set", tmp_path / "out"
    case = root if single else root / "s0001"
    write_masks(case, ct)
    given = [case / "ct.nii.gz", case / "segmentations"] if single else [root]
    line = refused(capsys, "synthesize", *given, "-o", out, "--generator", "hu2023")
    assert "--organ NAME" in line and "liver" in line
    assert synthesize(*given, "-o", out, "--organ", "liver") == 0
    made = out / ("segmentations" if single else "s0001/segmentations")
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted([*(f"{o}.nii.gz" for o in ORGANS), "liver_tumor.nii.gz"])
    old, new = load(case / "segmentations/liver.nii.gz")[0], load(made / "liver.nii.gz")[0]
    np.testing.assert_array_equal(old, new)
    tumor, file = load(made / "liver_tumor.nii.gz")
    assert set(np.unique(tumor)) == {0, 1} and old[tumor == 1].all()
    np.testing.assert_array_equal(file.affine, nib.load(case / "ct.nii.gz").affine)
    changed = load(made.parent / "ct.nii.gz")[0] != image(ct)
    assert changed[tumor == 1].mean() > 0.5
    (report,) = out.glob("*_report.json")
    again = tmp_path / "again"
    words = report, case / "ct.nii.gz", case / "segmentations", "-o", again
    capsys.readouterr()
    assert run("replay", *words) == 0
    assert "every voxel is as in the report" in capsys.readouterr().out
    np.testing.assert_array_equal(load(again / "segmentations/liver_tumor.nii.gz")[0], tumor)


def test_another_organ_is_another_run(tmp_path, ct, capsys):
    write_masks(tmp_path / "set/s1", ct)
    words = tmp_path / "set", "-o", tmp_path / "out"
    assert synthesize(*words, "--organ", "liver") == 0
    assert synthesize(*words, "--organ", "liver") == 0
    assert "1 of 1 scans are finished" in capsys.readouterr().out
    line = refused(capsys, "synthesize", *words, "--organ", "stomach", "--generator", "hu2023")
    assert "masks organs ['liver'], now ['stomach']" in line


def test_mass_effect_moves_all_masks_and_bulges_respect_them(tmp_path, ct, capsys):
    write_masks(tmp_path / "set/s1", ct)
    words = tmp_path / "set", "--organ", "liver", "--size-mm", 25, 25, "--mass-effect", 0.5
    assert synthesize(*words, "-o", tmp_path / "out") == 0
    made = tmp_path / "out/s1/segmentations"
    masks = {name: load(made / f"{name}.nii.gz")[0] > 0 for name in (*ORGANS, "liver_tumor")}
    old = {name: load(tmp_path / f"set/s1/segmentations/{name}.nii.gz")[0] > 0 for name in ORGANS}
    assert (masks["liver"] != old["liver"]).any()
    others = masks["stomach"] | masks["spleen"]
    assert not (others & (masks["liver"] | masks["liver_tumor"])).any()
    assert masks["liver_tumor"].any() and masks["liver"][masks["liver_tumor"]].all()
    # masks that overlap cannot be moved as one label map
    whole = tmp_path / "set/s1/segmentations/body.nii.gz"
    save(whole, np.ones(image(ct).shape, np.uint8), ct.affine)
    assert synthesize(*words, "-o", tmp_path / "again") == 2
    assert "must not overlap" in capsys.readouterr().err


def test_tumours_that_are_there_stay_or_are_refused(tmp_path, ct, capsys):
    write_masks(tmp_path / "set/s1", ct)
    annotated = np.zeros(image(ct).shape, np.uint8)
    inside = np.argwhere(liver(ct))
    annotated[tuple(inside[len(inside) // 2])] = 1
    save(tmp_path / "set/s1/segmentations/liver_tumor.nii.gz", annotated, ct.affine)
    words = tmp_path / "set", "-o", tmp_path / "out", "--organ", "liver"
    assert synthesize(*words) == 2
    assert "liver_tumor in it holds 1 voxels" in capsys.readouterr().err
    assert synthesize(*words, "--add-to-label") == 0
    made = load(tmp_path / "out/s1/segmentations/liver_tumor.nii.gz")[0]
    assert made[annotated == 1].all() and made.sum() > 20


def test_one_organ_file_is_enough(tmp_path, ct, capsys):
    write_masks(tmp_path / "s1", ct)
    pair = tmp_path / "s1/ct.nii.gz", tmp_path / "s1/segmentations/liver.nii.gz"
    assert synthesize(*pair, "-o", tmp_path / "a", "--organ", "liver") == 0
    assert synthesize(*pair, "-o", tmp_path / "b") == 0
    first, second = (load(tmp_path / f"{o}/ct_label.nii.gz")[0] for o in "ab")
    np.testing.assert_array_equal(first, second)
    line = refused(capsys, "synthesize", *pair, "-o", tmp_path / "c", "--organ", "stomach")
    assert "'stomach'" in line and "--label-map" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--organ", "livr", "--label-map", "amos"], "did you mean liver"),
        (["--organ", "liver", "--label-map", "amoss"], "did you mean amos"),
        (["--organ", "liver", "--organ-label", 1], "exclude each other"),
        (["--label-map", "amos"], "--organ liver"),
        (["--organ", "liver", "--label-map", "lits"], "'lits' must be that of case_label.nii.gz"),
        (["--organ", "liver", "--label-map", "totalsegmentator", "--tumor-label", 3],
         "3 is kidney_left"),
        (["--organ", "sternum", "--label-map", "totalsegmentator"],
         "no 116 (sternum) of totalsegmentator; it holds"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit(tmp_path, ct, capsys, words, says):
    save(tmp_path / "case_ct.nii.gz", image(ct), ct.affine)
    save(tmp_path / "case_label.nii.gz", ct.label[0].numpy(), ct.affine)
    pair = tmp_path / "case_ct.nii.gz", tmp_path / "case_label.nii.gz"
    words = *pair, "-o", tmp_path / "out", "--generator", "hu2023", *words
    assert says in refused(capsys, "synthesize", *words)


def test_names_with_a_map_choose_a_free_tumour_label(tmp_path, ct):
    save(tmp_path / "in/case_ct.nii.gz", image(ct), ct.affine)
    label = np.where(liver(ct), 6, (ct.label[0].numpy() == 3) * 2).astype(np.uint8)
    save(tmp_path / "in/case_label.nii.gz", label, ct.affine)
    words = tmp_path / "in", "-o", tmp_path / "out", "--organ", "liver", "--label-map", "amos"
    assert synthesize(*words) == 0
    check_result(tmp_path / "in/case_label.nii.gz", tmp_path / "out/case_label.nii.gz", tumor=16)
    report = json.loads((tmp_path / "out/case_report.json").read_text())
    assert report["organs"] == {"label_map": "amos", "liver": 6}
    assert report["options"]["organ_labels"] == [6]


def test_the_other_commands_take_names(tmp_path, ct):
    labels = liver(ct) * 6
    labels[24:28, 30:34, 20:24] = 2
    save(tmp_path / "a.nii.gz", labels.astype(np.uint8), ct.affine)
    words = "--organ", "liver", "--label-map", "amos", "--tumor-label", 2
    out = tmp_path / "scores.json"
    assert run("evaluate", tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", *words, "-o", out) == 0
    assert json.loads(out.read_text())["settings"]["organ_labels"] == [6]


@pytest.mark.parametrize("layout", ["lits", "masks", "masks without a name", "nnunet"])
def test_train_pack_takes_the_layouts(tmp_path, ct, layout):
    pytest.importorskip("monai", reason="needs the extra train")
    from tumorsynth.training.data import load_pack

    root, words = tmp_path / "set", []
    if layout == "lits":
        save(root / "volume-0.nii", image(ct), ct.affine)
        save(root / "segmentation-0.nii", liver(ct), ct.affine)
    elif layout == "nnunet":
        write_nnunet(root, ct, cases=1)
    else:
        write_masks(root / "s1", ct)
        words = ["--organ", "liver"] if layout == "masks" else []
    if layout == "masks without a name":
        with pytest.warns(UserWarning, match="one file per organ, and no label is read"):
            assert run("train", "pack", root, "-o", tmp_path / "p.npz", *words) == 0
    else:
        assert run("train", "pack", root, "-o", tmp_path / "p.npz", *words) == 0
    (case,) = load_pack(tmp_path / "p.npz")
    if layout == "masks without a name":
        assert case.label is None
    else:
        assert abs(int((case.label == 1).sum()) / (liver(ct).sum() * 8) - 1) < 0.05
