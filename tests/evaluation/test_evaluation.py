"""Scores on predictions made by hand, whose answers are known; the commands on real files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tumorsynth.commands.main import main

pytest.importorskip("monai", reason="needs the extra evaluation")
nib = pytest.importorskip("nibabel")

from tumorsynth.evaluation.metrics import CaseScores, scores, summary  # noqa: E402

MM = (1.0, 1.0, 1.0)


def blocks(*boxes, organ=1, tumor=2, shape=(24, 24, 24)):
    """The organ with tumours in it: boxes of (low, high) voxels along each axis, high left out."""
    out = np.full(shape, organ, np.uint8)
    for box in boxes:
        out[tuple(slice(*ends) for ends in box)] = tumor
    return out


def cube(at, side):
    return tuple((a, a + side) for a in at)


# -- one case -------------------------------------------------------------------------------------


def test_a_perfect_prediction_scores_best():
    label = blocks(cube((2, 2, 2), 5), cube((12, 12, 12), 3))
    got = scores(label, label, (0.7, 0.7, 2.5))
    assert (got.dsc, got.nsd, got.hd95_mm, got.organ_dsc) == (1, 1, 0, 1)
    assert (got.tumors, got.detected, got.false_positives) == (2, 2, 0)


def test_dice_is_counted_by_hand():
    label, guess = blocks(cube((5, 5, 5), 4)), blocks(((5, 9), (5, 9), (5, 7)))
    assert scores(guess, label, MM).dsc == pytest.approx(2 * 32 / (64 + 32), abs=1e-6)


@pytest.mark.parametrize("axis", range(3))
def test_distances_are_mm_along_their_own_axis(axis):
    spacing = [0.8, 0.8, 0.8]
    spacing[axis] = 5.0
    label = blocks(cube((8, 8, 8), 6))
    guess = np.roll(label, 1, axis)
    got = scores(guess, label, spacing)
    assert got.hd95_mm == pytest.approx(5.0)
    assert scores(guess, label, MM).hd95_mm == pytest.approx(1.0)
    # what is 5 mm off is outside a tolerance of 2 mm and inside one of 5
    assert got.nsd < 0.95
    assert scores(guess, label, spacing, tolerance_mm=5.0).nsd == 1
    assert scores(guess, label, MM).nsd == 1


def test_surface_dice_weighs_surface_by_its_area():
    # the two faces across a 20 mm long box are small; half of them, misplaced, is little surface
    label = blocks(((2, 22), (10, 14), (10, 14)))
    guess = blocks(((2, 18), (10, 14), (10, 14)))
    long, short = (scores(guess, label, s).nsd for s in ((1, 1, 1), (1, 4, 4)))
    assert 0.8 < long < 1 and short < long


def test_touching_lesions_are_one_unless_numbered():
    label = blocks(cube((4, 4, 4), 4), cube((8, 8, 8), 4))  # a corner in common
    guess = blocks(cube((4, 4, 4), 4))
    assert (scores(guess, label, MM).tumors, scores(guess, label, MM).detected) == (1, 1)
    numbered = np.zeros(label.shape, np.int16)
    numbered[4:8, 4:8, 4:8], numbered[8:12, 8:12, 8:12] = 7, 3
    got = scores(guess, label, MM, instances=numbered)
    assert (got.tumors, got.detected, got.false_positives) == (2, 1, 0)
    assert got.found == (True, False)
    with pytest.raises(ValueError, match="instances must be 0 but where label is 2"):
        scores(guess, label, MM, instances=np.roll(numbered, 1))


def test_one_prediction_over_two_lesions_finds_both_but_not_strictly():
    label = blocks(cube((4, 4, 4), 3), cube((12, 4, 4), 3))
    guess = blocks(((4, 15), (4, 7), (4, 7)))
    assert scores(guess, label, MM).detected == 2
    strict = scores(guess, label, MM, least_iou=0.5)  # 27 of 99 voxels each
    assert (strict.detected, strict.false_positives) == (0, 1)


@pytest.mark.parametrize("side, found", [(3, False), (4, True), (5, True)])
def test_the_overlap_a_detection_needs(side, found):
    label, guess = blocks(cube((5, 5, 5), 5)), blocks(cube((5, 5, 5), side))
    got = scores(guess, label, MM, least_iou=0.5)  # 27, 64 and 125 of 125 voxels
    assert (got.detected == 1) is found and got.false_positives == (not found)
    assert scores(guess, label, MM).detected == 1


def test_one_voxel_lesions_count_both_ways():
    label, guess = blocks(cube((3, 3, 3), 1), cube((20, 20, 20), 1)), blocks(cube((3, 3, 3), 1))
    guess[12, 12, 12] = 2
    got = scores(guess, label, (2, 2, 2))
    assert (got.tumors, got.detected, got.false_positives) == (2, 1, 1)
    assert got.dsc == pytest.approx(0.5)
    assert got.diameters_mm == pytest.approx([(6 * 8 / math.pi) ** (1 / 3)] * 2)
    alone = scores(guess, guess, MM)
    assert (alone.dsc, alone.nsd, alone.hd95_mm) == (1, 1, 0)


def test_empty_cases():
    nothing, tumor = blocks(), blocks(cube((3, 3, 3), 3), cube((12, 12, 12), 3))
    both = scores(nothing, nothing, MM)
    assert (both.dsc, both.nsd, both.hd95_mm, both.tumors, both.false_positives) == (
        None, None, None, 0, 0,
    )  # fmt: skip
    healthy = scores(tumor, nothing, MM)
    assert (healthy.dsc, healthy.tumors, healthy.false_positives) == (None, 0, 2)
    missed = scores(nothing, tumor, MM)
    assert (missed.dsc, missed.nsd, missed.hd95_mm, missed.detected) == (0, 0, None, 0)
    unlabelled = scores(tumor, blocks(organ=0), MM)
    assert unlabelled.organ_dsc is None


def test_early_is_by_volume_in_mm():
    # 8^3 voxels: 9.9 mm at 1 mm, 19.85 mm at 2 mm, 24.8 mm at 2.5 mm
    label = blocks(cube((2, 2, 2), 8))
    for spacing, early in ((1.0, 1), (2.0, 1), (2.5, 0)):
        got = scores(label, label, (spacing,) * 3)
        assert (got.tumors, got.early_tumors, got.early_detected) == (1, early, early)
    assert scores(label, label, MM, early_mm=9).early_tumors == 0
    false = scores(blocks(cube((2, 2, 2), 8), cube((14, 14, 14), 2)), blocks(), (2.5,) * 3)
    assert (false.false_positives, false.early_false_positives) == (2, 1)


def test_the_organ_holds_its_tumours():
    label = blocks(cube((5, 5, 5), 4), organ=0)
    label[2:12, 2:12, 2:12] = np.where(label[2:12, 2:12, 2:12] == 2, 2, 3)
    guess = np.where(label == 2, 3, label)  # tumour missed, organ whole
    got = scores(guess, label, MM, organ_labels=(3,))
    assert got == scores(guess, label, MM, organ_labels=3)
    assert (got.organ_dsc, got.dsc) == (1, 0)


def test_the_border_of_the_scan_and_the_frame_change_nothing():
    label = blocks(cube((0, 0, 0), 4))
    guess = blocks(((0, 4), (0, 4), (0, 5)))
    moved = [np.pad(m, 3, constant_values=1) for m in (guess, label)]
    assert scores(guess, label, (1, 2, 3)) == scores(*moved, (1, 2, 3))
    turned = [np.flip(m.transpose(2, 0, 1), 1) for m in (guess, label)]
    first, second = scores(guess, label, (1, 2, 3)), scores(*turned, (3, 1, 2))
    assert first.dsc == second.dsc and first.hd95_mm == second.hd95_mm
    assert first.nsd == pytest.approx(second.nsd)


def test_tensors_and_arrays_alike():
    import torch

    label, guess = blocks(cube((3, 3, 3), 3)), blocks(cube((4, 3, 3), 3))
    assert scores(torch.tensor(guess), torch.tensor(label), MM) == scores(guess, label, MM)
    quantised = [m * np.float32(0.99998) for m in (guess, label)]
    assert scores(*quantised, MM) == scores(guess, label, MM)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prediction": np.ones((24, 24, 23), int)}, "must share one grid.*resample the pred"),
        ({"spacing": (1, 1)}, "three positive numbers of mm"),
        ({"spacing": (1, 1, 0)}, "three positive numbers of mm"),
        ({"prediction": np.ones((1, 24, 24, 24), int)}, r"prediction must be .*\(X, Y, Z\)"),
        ({"least_iou": 2}, r"least_iou must lie in \[0, 1\]"),
        ({"prediction": blocks() * 0.98}, "prediction must hold whole numbers, got 0.98; give a"),
        ({"label": blocks() * np.nan}, "label must hold whole numbers, got nan"),
    ],
)
def test_what_cannot_be_scored(changes, message):
    given = {"prediction": blocks(), "label": blocks(), "spacing": MM, **changes}
    with pytest.raises(ValueError, match=message):
        scores(**given)


# -- the summary ----------------------------------------------------------------------------------


def case(tumors=0, detected=0, false=0, **known) -> CaseScores:
    empty = {"dsc": None, "nsd": None, "hd95_mm": None, "organ_dsc": None} | known
    early = {"early_tumors": 0, "early_detected": 0, "early_false_positives": 0}
    return CaseScores(
        tumors=tumors, detected=detected, false_positives=false,
        diameters_mm=(), found=(), **{**early, **empty},
    )  # fmt: skip


def test_sensitivity_is_pooled_and_undefined_scores_are_left_out():
    told = summary([case(9, 3, dsc=0.2), case(1, 1, 2, dsc=0.8), case(false=1), case()])
    assert told["sensitivity"]["value"] == 4 / 10  # not the mean of 1/3 and 1
    assert (told["dsc"]["value"], told["dsc"]["n"]) == (0.5, 2)
    assert told["false_positives_per_scan"]["value"] == 3 / 4
    assert (told["specificity"]["value"], told["specificity"]["n"]) == (0.5, 2)
    assert told["hd95_mm"] == {"value": None, "ci95": None, "n": 0, "of": "cases"}
    assert (told["cases"], told["cases_with_tumor"]) == (4, 2)
    json.dumps(told, allow_nan=False)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(200):
        told = summary([case(1, 1, dsc=v) for v in rng.normal(0.6, 0.1, 40)], 400, seed=k)
        low, high = told["dsc"]["ci95"]
        hits += low <= 0.6 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_intervals_resample_cases_and_not_tumours():
    # ten patients with 20 tumours each, all found or none: the patients are the sample of ten
    told = summary([case(20, 20 * (k < 5)) for k in range(10)])
    low, high = told["sensitivity"]["ci95"]
    assert low <= 0.3 and high >= 0.7  # 200 independent tumours would give 0.43 to 0.57


def test_the_same_seed_gives_the_same_interval():
    cases = [case(3, k % 4, dsc=k / 10) for k in range(8)]
    assert summary(cases, seed=4) == summary(cases, seed=4) != summary(cases, seed=5)
    assert summary(cases, bootstrap=0)["dsc"]["ci95"] is None
    assert summary(cases[:1])["dsc"]["ci95"] is None
    assert summary([])["dsc"]["value"] is None


# -- the commands ---------------------------------------------------------------------------------


def save(path, values, spacing=(1, 1, 1)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([-spacing[0], -spacing[1], spacing[2], 1])), path)


@pytest.fixture
def folders(tmp_path):
    """Found; missed beside a false alarm; healthy; and a label that nothing was predicted for."""
    label = blocks(cube((5, 5, 5), 5))
    save(tmp_path / "pred" / "a.nii.gz", label, (1, 1, 3))
    save(tmp_path / "pred" / "b.nii.gz", blocks(cube((15, 15, 15), 2)))
    save(tmp_path / "pred" / "c.nii", blocks())
    for name, values in (("a", label), ("b", label), ("c", blocks()), ("unseen", label)):
        spacing = (1, 1, 3) if name == "a" else (1, 1, 1)
        save(tmp_path / "labels" / f"{name}_label.nii.gz", values, spacing)
    return tmp_path


def run(*words):
    return main([str(word) for word in words])


def test_evaluate_prints_a_table_and_writes_json(folders, capsys):
    out = folders / "scores.json"
    words = ("evaluate", folders / "pred", folders / "labels", "-o", out, "--bootstrap", 50)
    assert run(*words, "--each") == 0
    said = capsys.readouterr()
    assert "sensitivity, by tumour" in said.out and "2 tumours" in said.out
    assert "1 scan without tumour" in said.out
    assert "1 of the labels have no prediction (unseen" in said.err
    told = json.loads(out.read_text())
    assert told["summary"]["sensitivity"]["value"] == 0.5
    assert told["summary"]["false_positives_per_scan"]["value"] == pytest.approx(1 / 3)
    assert told["summary"]["specificity"]["value"] == 1
    assert told["cases"]["a"]["dsc"] == 1 and told["cases"]["c"]["dsc"] is None
    assert told["cases"]["a"]["diameters_mm"] == pytest.approx([(6 * 375 / math.pi) ** (1 / 3)])
    assert told["labels_without_prediction"] == ["unseen"]
    assert run(*words) == 2 and "--overwrite" in capsys.readouterr().err
    assert run(*words, "--overwrite") == 0


def test_evaluate_passes_over_what_lies_on_another_grid(folders, capsys):
    save(folders / "pred" / "b.nii.gz", blocks(), (1, 1, 2))
    out = folders / "scores.json"
    assert run("evaluate", folders / "pred", folders / "labels", "-o", out) == 1
    err = capsys.readouterr().err
    assert "b: label and prediction must share one grid" in err
    assert "resample the prediction onto the label" in err and "1 of 3 scans failed" in err
    told = json.loads(out.read_text())
    assert set(told["cases"]) == {"a", "c"} and set(told["failed"]) == {"b"}


def test_evaluate_refuses_bad_input(folders, capsys):
    save(folders / "pred" / "other.nii.gz", blocks())
    assert run("evaluate", folders / "pred", folders / "labels") == 2
    assert "holds none for other.nii.gz" in capsys.readouterr().err
    assert run("evaluate", folders / "no", folders / "labels") == 2
    assert run("evaluate", folders / "pred" / "a.nii.gz", folders / "labels") == 2
    (folders / "empty").mkdir()
    assert run("evaluate", folders / "empty", folders / "labels") == 2
    capsys.readouterr()
    one = folders / "pred" / "a.nii.gz", folders / "labels" / "a_label.nii.gz"
    assert run("evaluate", *one) == 0


def test_healthy_scans_are_picked_and_ready_for_synthesis(folders, capsys):
    from monai.data import load_decathlon_datalist

    for name in "abc":
        save(folders / "cts" / f"{name}_0000.nii.gz", np.full((24, 24, 24), 50, np.int16))
    out, dataset = folders / "healthy.json", folders / "lists" / "dataset.json"
    dataset.parent.mkdir()
    words = ("healthy", folders / "pred", folders / "cts", "--organ-ml", 10)
    assert run(*words, "-o", out, "--dataset", dataset) == 0
    assert "1 of 3 scans are healthy" in capsys.readouterr().out
    told = json.loads(out.read_text())
    assert told["healthy"] == ["c"]
    a, b, c = told["scans"]
    assert a["tumor_ml"] == pytest.approx(0.375) and c["organ_ml"] == pytest.approx(13.824)
    assert a["reason"] == "tumour predicted" and c["reason"] is None
    (entry,) = load_decathlon_datalist(str(dataset), True, "training")
    assert nib.load(entry["image"]).get_fdata().max() == 50 and entry["healthy"] is True
    assert nib.load(entry["label"]).shape == (24, 24, 24)

    out.unlink()
    assert run(*words, "-o", out, "--tumor-ml", 0.1) == 0  # b's is 0.008 ml
    assert json.loads(out.read_text())["healthy"] == ["b", "c"]
    assert run("healthy", folders / "pred", "--organ-ml", 20) == 0
    assert "0 of 3 scans are healthy" in capsys.readouterr().out
    assert run("healthy", folders / "pred", "--dataset", dataset) == 2
    assert "folder of the CTs is needed" in capsys.readouterr().err


# -- probability maps and FROC --------------------------------------------------------------------


@pytest.fixture
def probabilities(tmp_path):
    """Tumours at 0.9 and 0.3 with a false alarm of 0.6 outside the organ; a healthy scan."""
    label = blocks(cube((2, 2, 2), 4), cube((14, 14, 14), 6))
    label[2:4, 14:16, 2:4] = 0
    guess = np.full(label.shape, 0.05, np.float32)
    for at, side, value in (((2, 2, 2), 3, 0.9), ((15, 15, 15), 4, 0.3), ((2, 14, 2), 2, 0.6)):
        guess[tuple(slice(*ends) for ends in cube(at, side))] = value
    save(tmp_path / "pred" / "a.nii.gz", guess, (1, 1, 3))
    save(tmp_path / "labels" / "a.nii.gz", label, (1, 1, 3))
    quiet = np.zeros(label.shape, np.float32)
    quiet[1, 1, 1] = 0.2
    save(tmp_path / "pred" / "b.nii.gz", quiet)
    save(tmp_path / "labels" / "b.nii.gz", blocks())
    return tmp_path


def froc_of(folder, *words):
    out = folder / "scores.json"
    paths = folder / "pred", folder / "labels"
    assert run("evaluate", *paths, "-o", out, "--overwrite", "--bootstrap", 20, *words) == 0
    told = json.loads(out.read_text())
    return {row["rate"]: row for row in told["froc"]["rates"]}, told


def test_froc_of_probability_maps(probabilities, capsys):
    plot = probabilities / "froc.png"
    rows, told = froc_of(probabilities, "--probabilities", "--froc-plot", plot, "--each")
    assert ">=20 mm" in capsys.readouterr().out
    found = {rate: row["sensitivity"]["value"] for rate, row in rows.items()}
    # two scans: the alarm of 0.6 is half a false positive a scan, with that of 0.2 it is one
    assert found == {0.25: 0.5, 0.5: 1, 1: 1, 2: 1, 4: 1, 8: 1}
    assert rows[0.5]["threshold"] == pytest.approx(0.3)
    assert rows[1]["healthy_false_positives_per_scan"]["value"] == 1
    # equivalent diameters: 64 and 216 voxels of 3 mm3
    assert told["froc"]["tumors_by_size"] == {"<10 mm": 1, "10-20 mm": 1, ">=20 mm": 0}
    assert rows[0.25]["by_size"]["10-20 mm"]["value"] == 0
    # the mask at 0.5 finds one of two, beside a false alarm
    case = told["cases"]["a"]
    assert (case["found"], case["false_positives"], case["organ_dsc"]) == ([True, False], 1, None)
    assert case["dsc"] == case["matches"]["dsc"]
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_scores_inside_the_organ(probabilities, capsys):
    words = ("--probabilities", "--inside-organ")
    rows, told = froc_of(probabilities, *words)
    assert rows[0.25]["sensitivity"]["value"] == 1 and told["cases"]["a"]["false_positives"] == 0
    for name in "ab":
        organ = blocks()
        organ[12:] = 0  # the first tumour alone
        save(probabilities / "organs" / f"{name}.nii.gz", organ, (1, 1, 3 if name == "a" else 1))
    rows, told = froc_of(probabilities, "--probabilities", "--inside", probabilities / "organs")
    assert "1 tumours lie outside" in capsys.readouterr().err
    assert (told["froc"]["tumors"], told["froc"]["tumors_outside"]) == (1, 1)
    assert told["cases"]["a"]["tumors"] == 1
    paths = probabilities / "pred", probabilities / "labels"
    assert run("evaluate", *paths, *words, "--inside", probabilities / "organs") == 2
    assert "give one of them" in capsys.readouterr().err
    assert run("evaluate", *paths, *words, "--organ-label", 7, "--tumor-label", 9) == 1
    assert "b.nii.gz must hold the organ that counts, but none of 7, 9" in capsys.readouterr().err
    (probabilities / "organs" / "b.nii.gz").unlink()
    assert run("evaluate", *paths, "--inside", probabilities / "organs") == 2
    err = capsys.readouterr().err
    assert "needs one organ map" in err and "b.nii.gz" in err


def test_label_maps_are_probabilities_of_one(folders):
    rows, _ = froc_of(folders, "--fp-rate", 0.1, "--fp-rate", 0.5, "--size-edge", 8.5)
    # a false alarm in three scans comes with every threshold
    assert {rate: row["sensitivity"]["value"] for rate, row in rows.items()} == {0.1: 0, 0.5: 0.5}
    assert set(rows[0.5]["by_size"]) == {"<8.5 mm", ">=8.5 mm"}
    for file in (folders / "pred").iterdir():
        image = nib.load(file)
        save_like = (np.asarray(image.dataobj) == 2).astype(np.float32)
        nib.save(nib.Nifti1Image(save_like, image.affine), file)
    again, _ = froc_of(
        folders, "--probabilities", "--fp-rate", 0.1, "--fp-rate", 0.5, "--size-edge", 8.5
    )
    assert again == rows


def test_probabilities_stored_as_scaled_bytes_are_taken(probabilities):
    before, _ = froc_of(probabilities, "--probabilities")
    file = probabilities / "pred" / "a.nii.gz"
    image = nib.load(file)
    image.header.set_data_dtype(np.uint8)
    values = image.get_fdata()
    values[0, 0, 0] = 1  # so that the scale ends there
    nib.save(nib.Nifti1Image(values, image.affine, image.header), file)
    again, _ = froc_of(probabilities, "--probabilities")
    assert again[8]["sensitivity"] == before[8]["sensitivity"]


def test_what_froc_refuses(probabilities, capsys):
    paths = probabilities / "pred" / "a.nii.gz", probabilities / "labels" / "a.nii.gz"
    assert run("evaluate", *paths) != 0
    assert "add --probabilities" in capsys.readouterr().err
    assert run("evaluate", paths[1], paths[1], "--probabilities") != 0
    assert "must be a probability of tumour in [0, 1], got 0 to 2" in capsys.readouterr().err
    for words, message in (
        (("--threshold", 0), "threshold must lie in (0, 1]"),
        (("--candidate-threshold", 2), "candidate_threshold must lie in (0, 1]"),
        (("--fp-rate", -1), "rates must be false positives a scan"),
        (("--size-edge", 20, "--size-edge", 10), "size_edges must ascend"),
        (("--froc-plot", probabilities / "froc.gif"), "the plot must be a .png"),
    ):
        assert run("evaluate", *paths, "--probabilities", *words) == 2
        assert message in capsys.readouterr().err
