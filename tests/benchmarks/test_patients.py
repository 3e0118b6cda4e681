"""benchmarks/realism/patients.py: pairs that match, a judge that never saw the patient."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from livers import SPACING, write_livers

pytest.importorskip("benchmarks.realism.patients", reason="needs the benchmarks beside the tests")

import tumorsynth as ts
from benchmarks.realism import generators, paired, patients, real_or_synthetic, scans


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_livers(tmp_path_factory.mktemp("scans"))


def read(folder, **options):
    return list(scans.liver_scans(folder, annotations=None, **options))


# -- scans ----------------------------------------------------------------------------------------


def test_scans_of_one_patient_share_it_and_other_organs_are_left_out(tmp_path):
    write_livers(tmp_path, ("anna_ap", "anna_eqp", "bert", "lung_carl"))
    assert [s.patient for s in read(tmp_path)] == ["anna", "anna", "bert"]
    assert [s.name for s in read(tmp_path, only=["bert"])] == ["bert"]
    with pytest.raises(SystemExit, match="nobody"):
        read(tmp_path, only=["nobody"])


def test_labels_of_the_annotations_come_first(tmp_path):
    ours = write_livers(tmp_path / "ours", ("anna",), diameter_mm=20)
    theirs = write_livers(tmp_path / "theirs", ("anna", "bert"), diameter_mm=10)
    anna, bert = scans.liver_scans(theirs, annotations=ours)
    assert paired.real_tumors(anna)[0].diameter_mm == pytest.approx(20, abs=1)
    assert paired.real_tumors(bert)[0].diameter_mm == pytest.approx(10, abs=1)


# -- pairs ----------------------------------------------------------------------------------------


def test_real_tumours_are_found_and_measured_at_1_mm(folder):
    real = paired.real_tumors(read(folder)[0])
    assert len(real) == 2
    for tumor in real:
        assert tumor.diameter_mm == pytest.approx(14, abs=0.7)
        assert tumor.contrast_hu == pytest.approx(-40, abs=5)
        volume = math.pi / 6 * tumor.diameter_mm**3
        assert tumor.lesion.tumor.sum() == pytest.approx(volume, rel=0.1)
        assert not (tumor.lesion.tumor & tumor.lesion.organ).any()


@pytest.mark.parametrize(("diameter", "contrast"), [(9.0, -35.0), (14.0, 25.0)])
def test_a_synthetic_tumour_has_the_size_and_contrast_and_keeps_off_real_ones(
    folder, diameter, contrast
):
    (scan, *_) = read(folder)
    made = paired.make("hu2023", scan, diameter, contrast, seed=3)
    assert isinstance(made, paired.Made)
    assert made.tumor.diameter_mm == pytest.approx(diameter, rel=0.15)
    assert made.tumor.contrast_hu == pytest.approx(contrast, abs=6)
    assert abs(made.sham.contrast_hu) < 6
    assert scan.from_real_mm[made.tumor.mask].min() >= paired.GAP_MM
    assert (scan.label.numpy()[made.tumor.mask] == scans.LIVER).all()
    assert (made.sham.hu == scan.hu).all() and (made.sham.mask == made.tumor.mask).all()


def test_no_taken_voxel_becomes_tumour(folder):
    (scan, *_) = read(folder)
    first = paired.make("hu2023", scan, 12.0, -40.0, seed=5)
    taken = first.tumor.mask
    again = paired.make("hu2023", scan, 12.0, -40.0, seed=5, taken=taken)
    assert isinstance(again, paired.Made) and not (again.tumor.mask & taken).any()
    assert isinstance(paired.make("hu2023", scan, 12.0, -40.0, 5, np.ones_like(taken)), str)


def test_two_generators_paint_into_the_same_outlines(folder):
    (scan, *_) = read(folder)
    one = paired.make("hu2023", scan, 12.0, -40.0, seed=5)
    other = paired.make("liver-early", scan, 12.0, -40.0, seed=5)
    assert (one.tumor.mask == other.tumor.mask).all()
    assert not torch.equal(one.tumor.hu, other.tumor.hu)


def test_no_room_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(paired, "TRIES", 3)
    write_livers(tmp_path, ("anna",))
    (scan,) = read(tmp_path)
    reason = paired.make("hu2023", scan, 70.0, -40.0, seed=0)
    assert isinstance(reason, str) and "10 mm" in reason


def scan_of(hu):
    return scans.Scan("a", hu, torch.ones(hu.shape).short(), (1.0, 1.0, 1.0), ("L", "P", "S"))


@pytest.mark.parametrize("step", [1.0, 8.0])
def test_what_is_painted_has_the_steps_of_the_scan(step):
    rng = torch.Generator().manual_seed(0)
    scan = torch.randint(-20, 20, (12, 12, 12), generator=rng) * step
    image = scan.clone()
    image[3:8, 3:8, 3:8] = scan[3:8, 3:8, 3:8] * 0.5 - 7.3
    stored = paired.as_stored(image, scan_of(scan))
    assert ((stored / step) == (stored / step).round()).all()
    assert (stored - image).abs().max() <= step / 2 + 1e-4
    outside = image == scan
    assert torch.equal(stored[outside], scan[outside])


def test_a_tumour_may_be_darker_than_anything_around_it():
    scan = torch.full((12, 12, 12), 100.0)
    scan[0, 0, :10] = torch.arange(101.0, 111.0)
    image = scan.clone()
    image[5:8, 5:8, 5:8] -= 40.3
    assert paired.as_stored(image, scan_of(scan))[6, 6, 6] == 60


# -- the classifier -------------------------------------------------------------------------------


def patients_of(counts):
    return [f"p{k}" for k, n in enumerate(counts) for _ in range(n)]


def test_a_common_difference_is_found_in_patients_never_seen():
    rng = np.random.default_rng(0)
    real, made = patients_of([3] * 6), patients_of([6] * 6)
    aucs, chance = real_or_synthetic.classify_patients(
        rng.normal(2, 1, (18, 4)), rng.normal(0, 1, (36, 4)), real, made, permutations=50
    )
    assert set(aucs) == set(chance) == {f"p{k}" for k in range(6)}
    assert np.mean(list(aucs.values())) > 0.9
    assert np.mean(list(chance.values())) == pytest.approx(0.5, abs=0.06)


def test_what_tells_them_apart_in_one_patient_alone_does_not_count():
    """Each patient's tumours differ in a feature of their own: nothing that others show."""
    rng = np.random.default_rng(0)
    real, made = patients_of([4] * 8), patients_of([8] * 8)
    a, b = rng.normal(size=(32, 8)), rng.normal(size=(64, 8))
    for k, name in enumerate(real):
        a[k, int(name[1:])] += 4
    found = []
    for seed in range(3):
        aucs, _ = real_or_synthetic.classify_patients(a, b, real, made, seed=seed, permutations=0)
        found.append(np.mean(list(aucs.values())))
    assert np.mean(found) < 0.65
    pooled = real_or_synthetic.classify(a, b, permutations=1)["auc"]
    assert pooled > 0.75  # without leaving patients out it would count


def test_missing_values_and_patients_with_one_kind_alone():
    rng = np.random.default_rng(1)
    real, made = ["a", "a", "b", "c"], ["a", "b", "b", "d"]
    x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    x[0, 0] = y[1, 1] = np.nan
    x[:, 2] = np.nan
    aucs, _ = real_or_synthetic.classify_patients(x, y, real, made, permutations=2)
    assert set(aucs) == {"a", "b"} and all(0 <= auc <= 1 for auc in aucs.values())
    assert real_or_synthetic.classify_patients(x[:1], y[:1], ["a"], ["a"]) == ({}, {})


# -- generators -----------------------------------------------------------------------------------


def test_what_a_generator_was_trained_on_is_known_or_asked_for():
    (shipped, hand) = generators.load(["v6=liver-early", "hu2023"], [])
    assert shipped.trained_on == ("crlm_1006", "crlm_1100", "hcc_015") and hand.trained_on == ()
    (told,) = generators.load(["x=hu2023"], ["x=anna,bert"])
    assert told.trained_on == ("anna", "bert")
    with pytest.raises(SystemExit, match="LABEL="):
        generators.load(["hu2023", "hu2023"], [])
    with pytest.raises(SystemExit, match="--trained-on lung="):
        generators.load(["lung"], [])
    with pytest.raises(SystemExit, match="nobody"):
        generators.load(["hu2023"], ["nobody=anna"])


def test_the_shipped_generator_is_known():
    card = ts.load_generator("liver-early").card
    assert (card["name"], str(card["version"])) in generators.TRAINED_ON


# -- the run --------------------------------------------------------------------------------------


def test_the_run_reports_unseen_patients_apart(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.common.HERE", tmp_path)
    arguments = [str(folder), "--annotations", str(tmp_path), "--each", "1", "--permutations", "9"]
    arguments += ["--generator", "one=hu2023", "--generator", "two=hu2023"]
    arguments += ["--trained-on", "one=none", "--trained-on", "two=anna"]
    monkeypatch.setenv("BENCHMARK_COMMIT", "1234567")  # the folder above is no repository
    results = patients.main(arguments)
    assert results["patients"] == 3 and results["tumours"] == 6
    groups = results["groups"]
    assert groups["sham"]["all"]["patients"] == ["anna", "bert", "carl"]
    assert groups["one"]["unseen"]["patients"] == ["anna", "bert", "carl"]
    assert groups["one"]["unseen by all"]["patients"] == ["bert", "carl"]
    assert groups["two"]["unseen"]["patients"] == ["bert", "carl"]
    assert groups["two"]["trained on"]["patients"] == ["anna"]
    figures = groups["one"]["unseen"]["figures"]
    assert figures["core_contrast_hu"]["real"][0] == pytest.approx(-40, abs=5)
    assert abs(figures["core_contrast_hu"]["difference"][0]) < 6
    middle, low, high = figures["noise_ratio"]["difference"]
    assert low <= middle <= high
    assert groups["sham"]["all"]["auc"]["all but shape"]["auc"][0] > 0.9
    assert results["per_patient"]["anna"]["trained_on_by"] == ["two"]
    assert results["per_patient"]["bert"]["one"]["tumours"] == 2

    text = (tmp_path / "results" / "patients.json").read_text()
    assert json.loads(text)["environment"]["commit"]
    assert str(folder) not in text and str(tmp_path) not in text
    assert "| contrast, HU: difference | " in capsys.readouterr().out
    assert SPACING == tuple(results["scans"][0]["spacing_mm"])


def test_only_tumours_of_a_size_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.HERE", tmp_path)
    write_livers(tmp_path, ("anna",), diameter_mm=10)
    write_livers(tmp_path, ("bert",), diameter_mm=18)
    arguments = [str(tmp_path), "--annotations", str(tmp_path), "--each", "1", "--generator"]
    results = patients.main([*arguments, "hu2023", "--permutations", "1", "--size-mm", "0", "15"])
    assert [about["scan"] for about in results["scans"]] == ["anna"]
    with pytest.raises(SystemExit, match="no annotated"):
        patients.main([*arguments, "hu2023", "--size-mm", "30", "40"])


def test_intervals_are_of_patients():
    rng = np.random.default_rng(0)
    assert patients.over_patients([2.0, 2.0, float("nan")], rng) == [2.0, 2.0, 2.0]
    middle, low, high = patients.over_patients([0.0, 1.0] * 8, rng)
    assert middle == 0.5 and low == pytest.approx(0.25, abs=0.07) and high > 0.65
    assert patients.over_patients([float("nan")], rng) is None
