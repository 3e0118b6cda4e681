"""benchmarks/downstream: comparing arms is fair, resumes, and its scores cannot be fooled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

pack = pytest.importorskip(
    "benchmarks.downstream.pack", reason="needs the benchmarks beside the tests"
)
from benchmarks.downstream import job as jobs  # noqa: E402
from benchmarks.downstream import patches, run, table, training, versions  # noqa: E402
from benchmarks.downstream.arms import ARMS, Arm  # noqa: E402
from benchmarks.downstream.compare import PRIMARY, compare  # noqa: E402
from benchmarks.downstream.experiments import EARLY_MM, jobs_of  # noqa: E402
from benchmarks.downstream.exposure import ANNOTATED, crops_of, view  # noqa: E402
from tumorsynth.evaluation.detection import ScanMatches, TumorMatch  # noqa: E402

ROOT = Path(jobs.__file__).parents[2]
LISTED = json.loads((ROOT / "benchmarks" / "downstream" / "liver.json").read_text())["scans"]
DIAMETERS = {  # of the real scans; the balls below are smaller
    "ircadb_p01": (54.4, 9.1, 24.3),
    "lits000": (9.1, 8.6, 17.2),
    "radcttace_0697_eqp": (16.5,),
    "crlm_1006": (9.8, 24.1),
    "chaos_set3": (),
    "crlm_1004": (),
}
TINY = {"steps": 4, "side": [32, 32, 16], "channels": 2, "versions": 2, "save_every": 2}
NO_MONAI = (
    "import sys\nfor name in 'monai nibabel typer lightning'.split(): sys.modules[name] = None"
)


def ball(shape, centre, radius_mm, spacing):
    squares = [
        ((np.arange(n) - c) * mm) ** 2 for n, c, mm in zip(shape, centre, spacing, strict=True)
    ]
    return sum(np.ix_(*squares)) <= radius_mm**2


def make_scan(name, patient, number=0):
    """A liver of noise around 110 HU with dark balls."""
    shape, spacing = (56, 56, 32), (1.5, 1.5, 2.5)
    organ = ball(shape, (28, 28, 16), 34.0, spacing)
    hu = np.random.default_rng(number).normal(-80, 10, shape)
    hu[organ] += 190
    lesions = np.zeros(shape, np.uint8)
    diameters = DIAMETERS.get(name, (43.0, 22.0))
    for k in range(len(diameters)):
        own = ball(shape, (16 + 12 * k, 28, 12 + 4 * k), 5.0, spacing)
        lesions[own], hu[own] = k + 1, hu[own] - 50
    return pack.Scan(
        name, patient, "", spacing, hu.round().astype(np.int16), organ, lesions, diameters
    )


@pytest.fixture(scope="module")
def scans():
    return {
        entry["name"]: make_scan(entry["name"], entry.get("patient", entry["name"]), k)
        for k, entry in enumerate(LISTED)
    }


@pytest.fixture(scope="module")
def packed(scans, tmp_path_factory):
    path = tmp_path_factory.mktemp("pack") / "pack.npz"
    pack.save_pack(list(scans.values()), path)
    return path


def jobs_for(scans, experiment="large-to-small", arms=("real",), **entry):
    return jobs_of(
        {"runs": [{"experiment": experiment, "seeds": [0], "arms": arms, **entry}]}, scans
    )


def write_plan(folder, arms, settings=TINY, **entry):
    path = folder / "plan.json"
    one = {"experiment": "large-to-small", "seeds": [0], "arms": arms, **entry}
    path.write_text(json.dumps({"settings": settings, "runs": [one]}))
    return path


def words(plan, packed, out):
    return [str(plan), "--pack", str(packed), "--out", str(out)]


def test_a_pack_keeps_what_it_holds(scans, packed):
    held = pack.load_pack(packed)
    assert list(held) == list(scans)
    for name, scan in scans.items():
        assert held[name].diameters_mm == scan.diameters_mm and held[name].spacing == scan.spacing
        for part in ("hu", "organ", "lesions"):
            assert (getattr(held[name], part) == getattr(scan, part)).all()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_a_file_of_any_orientation_is_packed_alike(codes, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

    scan = make_scan("a", "a")
    label = np.where(scan.lesions > 0, 2, scan.organ).astype(np.uint8)
    label[scan.lesions == 2] = 1  # one tumour, not in the middle
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    for kind, values in (("ct", scan.hu), ("label", label)):
        turned = nibabel.orientations.apply_orientation(values, turn)
        affine = np.diag([*scan.spacing, 1.0]) @ inv_ornt_aff(turn, values.shape)
        nibabel.save(nibabel.Nifti1Image(turned, affine), tmp_path / f"a_{kind}.nii.gz")
    read = pack.read_scan({"name": "a"}, [tmp_path], [1], [2], scan.spacing)
    assert len(read.diameters_mm) == 1 and read.patient == "a"
    assert abs(read.diameters_mm[0] - 10.0) < 0.5
    (box,) = ndimage.find_objects(scan.organ.astype(int))
    margin = [int(np.ceil(pack.MARGIN_MM / mm)) for mm in scan.spacing]
    where = tuple(slice(max(0, b.start - m), b.stop + m) for b, m in zip(box, margin, strict=True))
    assert (read.lesions == (scan.lesions == 1)[where]).all()
    assert (read.hu == scan.hu[where]).all()
    coarse = pack.read_scan({"name": "a"}, [tmp_path], [1], [2], (3.0, 3.0, 5.0))
    low, fine = (ndimage.center_of_mass(s.lesions) for s in (coarse, read))
    assert np.allclose((np.array(low) + 0.5) * (3, 3, 5), (np.array(fine) + 0.5) * (1.5, 1.5, 2.5),
                       atol=1.5)  # fmt: skip


EXPERIMENTS = {
    "few-1": [0, 1, 2],
    "few-2": [0, 1, 2],
    "few-4": [0, 1, 2],
    "large-to-small": [0],
    "portal-to-arterial": [0],
    "none-annotated": [0],
    "folds-4": [0, 1, 2, 3],
    "folds-3-2": [0, 1, 2],
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_patient_is_on_both_sides(scans, experiment):
    arms = [n for n, arm in ARMS.items() if arm.others != "more"]
    if experiment not in ("portal-to-arterial", "folds-4"):
        arms.append("upper-bound")
    listed = jobs_for(scans, experiment, arms, folds=EXPERIMENTS[experiment], seeds=[0, 1])
    assert len({one.name for one in listed}) == len(listed)
    for one in listed:
        taught = {scans[n].patient for n in (*one.annotated, *one.healthy, *one.more)}
        tested = {scans[n].patient for n in (*one.tests, *one.healthy_tests)}
        assert one.tests and not taught & tested
        assert not set(one.arm.trained_on) & tested
        same = [o for o in listed if (o.fold, o.seed) == (one.fold, one.seed)]
        assert all(o.annotated == one.annotated for o in same)  # equal exposure
    bound = [one for one in listed if one.arm.others == "more" and (one.fold, one.seed) == (0, 0)]
    if bound:
        real = next(one for one in listed if one.arm.name == "real" and one.fold == one.seed == 0)
        assert {n for one in bound for n in one.tests} == set(real.tests)
        assert all(one.parts == len(bound) for one in bound)


def test_from_large_to_small_teaches_only_large_and_tests_only_small(scans):
    (one,) = jobs_for(scans)
    for name, taught in one.annotated.items():
        assert all(scans[name].diameters_mm[k - 1] >= EARLY_MM for k in taught)
    for name, tested in one.tests.items():
        assert all(scans[name].diameters_mm[k - 1] < EARLY_MM for k in tested)
    assert one.tests["crlm_1006"] == (1,)


def test_a_tumour_that_is_not_annotated_is_not_taught_as_healthy(scans):
    scan = scans["crlm_1006"]
    shown = view(scan, (2,))
    assert (shown.tumor == (scan.lesions == 2)).all()
    assert not shown.counted[scan.lesions == 1].any() and shown.counted[scan.lesions == 2].all()
    whole = view(scan, (1, 2))
    assert whole.counted[scan.lesions == 1].all()
    outside = ndimage.distance_transform_edt(~scan.organ, scan.spacing)
    assert not whole.counted[outside > 6.1].any()


def test_crops_repeat_and_differ_by_seed_step_and_slot(scans):
    views = {n: [view(scans[n], (1,))] for n in ("ircadb_p01", "lits000")}
    made = [
        crops_of(seed, step, ANNOTATED, 2, views, (32, 32, 16))
        for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert all(a.equal(b) for a, b in zip(made[0], made[1], strict=True))
    assert not made[0][0].equal(made[0][1])
    assert not made[0][0].equal(made[2][0]) and not made[0][0].equal(made[3][0])
    for crop in made[0]:
        assert crop.shape == (3, 32, 32, 16) and crop.isfinite().all()


def test_a_crop_shows_the_tumour_where_it_is_labelled(scans):
    views = {"lits000": [view(scans["lits000"], (1, 2, 3))]}
    seen = 0
    for step in range(12):
        ((image, tumor, counted),) = crops_of(3, step, ANNOTATED, 1, views, (32, 32, 16))
        liver = (counted > 0) & (tumor == 0) & (image > -0.2)
        if tumor.sum() > 30:
            seen += 1
            assert image[tumor > 0].mean() < image[liver].mean() - 0.15
    assert seen >= 4


@pytest.fixture(scope="module")
def version(scans):
    scan = scans["chaos_set3"]
    options = {"size_mm": (10, 14), "count": (2, 2)}
    (made,) = versions.synthesize("hu2023", options, scan, 1, 5, "cpu")
    return scan, made


def test_a_version_is_the_scan_with_its_tumours(version):
    scan, made = version
    assert made.count == 2
    shown = versions.apply(scan, view(scan, ()), made)
    import tumorsynth as ts

    synth = ts.SynthesizeTumor("hu2023", count=(2, 2), size_mm=(10, 14))
    label = torch.from_numpy(scan.organ.astype(np.uint8))[None]
    image, label = synth(
        torch.from_numpy(scan.hu.astype(np.float32))[None], label, spacing=scan.spacing, seed=5
    )
    assert (shown.hu == image[0].round().numpy()).all()
    assert (shown.tumor == (label[0] == 2).numpy()).all() and len(shown.lesions) == 2


def test_a_tumour_left_out_of_a_version_leaves_the_scan_as_it_was(version):
    scan, made = version
    one = versions.apply(scan, view(scan, ()), made.only([1]))
    both = versions.apply(scan, view(scan, ()), made)
    assert 0 < one.tumor.sum() < both.tumor.sum() and (both.tumor | ~one.tumor).all()
    gone = both.tumor & ~one.tumor
    assert (one.hu[gone] == scan.hu[gone]).all() and (both.hu[gone] != scan.hu[gone]).any()
    none = versions.apply(scan, view(scan, ()), made.only([]))
    assert (none.hu == scan.hu).all() and not none.tumor.any()


def test_an_interrupted_training_ends_as_one_that_was_not(scans, tmp_path):
    views = {"lits000": [view(scans["lits000"], (1, 2, 3))]}
    settings = training.Settings(**{**TINY, "side": (32, 32, 16), "steps": 6})
    whole, told = training.train(views, None, settings, 1, tmp_path / "whole.pt")

    class Stop(Exception):
        pass

    def stop(network):
        raise Stop

    with pytest.raises(Stop):
        training.train(views, None, settings, 1, tmp_path / "part.pt", at={5: stop})
    resumed, again = training.train(views, None, settings, 1, tmp_path / "part.pt")
    assert told["losses"] == again["losses"] and len(told["losses"]) == 3
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert a.equal(b)
    other, _ = training.train(views, None, settings, 2, tmp_path / "other.pt")
    assert not all(a.equal(b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_windows_cover_the_organ_of_any_size(scans):
    class Same(torch.nn.Module):
        def forward(self, image):
            return image

    for shape in ((20, 70, 33), (64, 64, 32), (65, 90, 16)):
        hu = np.random.default_rng(0).integers(-40, 240, shape).astype(np.int16)
        organ = np.ones(shape, bool)
        organ[:5] = False
        found = training.predict(Same(), hu, organ, (32, 32, 16))
        expected = 1 / (1 + np.exp(-((hu + 50) / 150 - 1)))
        assert np.allclose(found[5:], expected[5:], atol=1e-5) and not found[:5].any()


def test_scores_count_what_is_tested_and_nothing_else(scans):
    (one,) = jobs_for(scans)
    scan = scans["crlm_1006"]  # tumour 1 is tested, tumour 2 is too large
    perfect = jobs.score(one, scan, (scan.lesions > 0).astype(np.float32))
    assert [t.diameter_mm for t in perfect.tumors] == [9.8] and perfect.tumors[0].score == 1
    assert perfect.false_scores == () and perfect.outside == 1 and not perfect.is_healthy
    only_large = jobs.score(one, scan, (scan.lesions == 2).astype(np.float32))
    assert only_large.tumors[0].score is None and only_large.false_scores == ()
    everything = jobs.score(one, scan, scan.organ.astype(np.float32))
    assert everything.tumors[0].score is None and everything.false_scores == (1.0,)
    outside = np.where(scan.organ, 0, 1).astype(np.float32)
    assert jobs.score(one, scan, outside).false_scores == ()


def test_each_tumour_keeps_its_own_diameter(scans):
    (one,) = jobs_for(scans, "few-1")
    scan = scans["lits000"]
    for number in (1, 2, 3):
        found = jobs.score(one, scan, (scan.lesions == number).astype(np.float32))
        hit = [t.diameter_mm for t in found.tumors if t.score]
        assert hit == [scan.diameters_mm[number - 1]]


def matches(scores, false=(), diameter=9.0):
    tumors = tuple(TumorMatch(diameter, s, s and 0.5, s and 0.5) for s in scores)
    return ScanMatches(tumors, tuple(sorted(false, reverse=True)), 0.5, 0.5)


def cells_of(arms, seeds=(0, 1)):
    """Cells in which an arm finds the same in every seed."""
    return {
        (0, seed): {
            arm: {"tests": {n: [m] for n, m in tests.items()}, "healthy": {}}
            for arm, tests in arms.items()
        }
        for seed in seeds
    }


def test_equal_arms_differ_by_nothing_and_a_better_one_by_what_it_finds():
    worse = {n: matches([0.9, None], [0.3]) for n in "abcd"}
    better = {n: matches([0.9, 0.8], [0.3]) for n in "abcd"}
    cells = cells_of({"real": worse, "same": worse, "better": better})
    found = compare(cells, {n: n for n in "abcd"}, ("real",), 100)
    assert found["arms"]["real"][PRIMARY]["value"] == 0.5
    assert found["differences"]["same - real"][PRIMARY] == {"value": 0, "ci95": [0, 0]}
    gain = found["differences"]["better - real"][PRIMARY]
    assert gain["value"] == 0.5 and 0 <= gain["ci95"][0] < 0.5 < gain["ci95"][1] <= 1


def test_arms_are_compared_at_equal_false_positives():
    """More candidates of a higher score are no gain where false ones come along."""
    quiet = {n: matches([0.6, None], [0.2]) for n in "abc"}
    loud = {n: matches([0.6, 0.3], [0.95, 0.9, 0.8, 0.7]) for n in "abc"}
    cells = cells_of({"real": quiet, "loud": loud})
    found = compare(cells, {n: n for n in "abc"}, ("real",), 20)
    assert found["differences"]["loud - real"][PRIMARY]["value"] == -0.5
    assert found["differences"]["loud - real"]["sensitivity_at_8"]["value"] == 0.5


def test_two_scans_of_one_patient_are_drawn_together():
    """Two patients are too few for an interval, however many scans they have."""
    tests = {n: matches([0.9, None], [0.3]) for n in "abcd"}
    cells = cells_of({"real": tests, "other": tests})
    found = compare(cells, {"a": "p", "b": "p", "c": "q", "d": "q"}, ("real",), 20)
    assert found["arms"]["real"][PRIMARY]["ci95"] is None


ALL_ARMS = ["real", "real-and-healthy", "upper-bound", "hu2023"]


@pytest.fixture(scope="module")
def finished(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    filtered = {"name": "seen", "generator": "hu2023", "keep": "seen"}
    alone = {"name": "alone", "generator": "hu2023", "alone": True}
    plan = write_plan(out, [*ALL_ARMS, filtered, alone])
    run.main(words(plan, packed, out))
    return plan, out


def test_all_arms_end_to_end(finished, packed, capsys):
    plan, out = finished
    names = {path.stem for path in (out / "jobs").glob("*.json")}
    assert len(names) == 7 and not list((out / "checkpoints").glob("*.pt"))
    assert "large-to-small_fold0_seed0_upper-bound_b" in names
    held = {name: json.loads((out / "jobs" / f"{name}.json").read_text()) for name in names}
    made = {one["job"]["arm"]["name"]: one["synthetic_tumors"] for one in held.values()}
    assert made["real"] == made["real-and-healthy"] == made["upper-bound"] == 0
    assert 0 < made["seen"] < made["hu2023"] and 0 < made["alone"] < made["hu2023"]
    assert len({tuple(one["losses"]) for one in held.values()}) == 7  # arms do differ

    before = {path: path.stat().st_mtime_ns for path in (out / "jobs").glob("*.json")}
    run.main(words(plan, packed, out))
    assert "7 jobs, 7 finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (out / "jobs").glob("*.json")}


def test_scores_can_be_computed_again_from_what_a_job_leaves(finished, packed):
    plan, out = finished
    path = out / "jobs" / "large-to-small_fold0_seed0_real.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "scans": {}}))
    run.main([*words(plan, packed, out), "--rescore"])
    after = json.loads(path.read_text())["scans"]
    assert after.keys() == before["scans"].keys()
    for name, scan in after.items():
        wanted = before["scans"][name]
        assert len(scan["tumors"]) == len(wanted["tumors"])
        assert len(scan["false_scores"]) == len(wanted["false_scores"])


def test_other_settings_need_another_folder(finished, packed, tmp_path):
    _, out = finished
    plan = write_plan(tmp_path, ["real"], {**TINY, "steps": 5})
    with pytest.raises(ValueError, match="other settings"):
        run.main(words(plan, packed, out))
    with pytest.raises(ValueError, match="unknown settings"):
        run.main(words(write_plan(tmp_path, ["real"], {"stepz": 5}), packed, tmp_path))


def test_a_job_that_another_process_has_is_left_to_it(packed, tmp_path):
    from benchmarks.downstream.files import locked

    plan, name = write_plan(tmp_path, ["real"]), "large-to-small_fold0_seed0_real"
    with locked(
        tmp_path / "jobs" / f".{name}.lock"
    ):  # a lock is the open file's, not the process's
        run.main(words(plan, packed, tmp_path))
    assert not (tmp_path / "jobs" / f"{name}.json").is_file()


def test_a_run_needs_no_framework(packed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_MONAI)
    plan = write_plan(tmp_path, ["hu2023"], {**TINY, "steps": 2})
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.downstream.run", *words(plan, packed, tmp_path)]
    subprocess.run(command, check=True, env=env, cwd=ROOT)
    assert (tmp_path / "jobs" / "large-to-small_fold0_seed0_hu2023.json").is_file()


def test_the_table_compares_what_is_finished(finished, capsys):
    _, out = finished
    table.main([str(out), "--draws", "20", "--arms", *ALL_ARMS])
    found = json.loads((out / "results.json").read_text())["experiments"]["large-to-small"]
    assert list(found["arms"]) == ALL_ARMS and found["cpu_hours"] >= 0
    assert found["tumors"] == 6 and set(found["scans"]) == {
        "lits000", "crlm_1006", "radcttace_0697_eqp", "ircadb_p01"}  # fmt: skip
    assert "hu2023 - real-and-healthy" in found["differences"]
    assert (out / "table.md").read_text().count("|") > 100
    (out / "jobs" / "large-to-small_fold0_seed0_upper-bound_b.json").rename(out / "half.json")
    table.main([str(out), "--draws", "20", "--arms", *ALL_ARMS])
    assert "no fold and seed is finished" in capsys.readouterr().out
    (out / "half.json").rename(out / "jobs" / "large-to-small_fold0_seed0_upper-bound_b.json")


def test_an_arm_that_may_not_be_tested_on_a_patient_takes_it_out_of_the_comparison(scans):
    own = Arm.from_dict({"name": "own", "generator": "hu2023", "trained_on": ["ircadb_p01"]})
    results = []
    for one in jobs_for(scans, arms=("real", vars(own))):
        found = {n: matches([0.9] * len(t)).as_dict() for n, t in one.tests.items()}
        found |= {n: matches([]).as_dict() for n in one.healthy_tests}
        results.append({"job": jobs.describe(one), "scans": found})
    assert "ircadb_p01" in results[0]["scans"] and "ircadb_p01" not in results[1]["scans"]
    (cell,) = table.complete_cells(results).values()
    assert "ircadb_p01" not in cell["real"]["tests"]
    assert set(cell["real"]["tests"]) == set(cell["own"]["tests"])


def test_patches_teach_middles_and_are_scored_by_area(scans, packed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(patches, "PLACES", 20)
    views = {"lits000": [view(scans["lits000"], (1, 2, 3))]}
    _, truths = patches.patches_of(0, 0, ANNOTATED, views)
    assert torch.stack(truths[::2]).max() == 1  # on tumours
    plan = write_plan(tmp_path, ["real", "real-and-healthy", "hu2023"])
    patches.main([*words(plan, packed, tmp_path), "--steps", "3"])
    assert "| large-to-small | hu2023 |" in capsys.readouterr().out
    scan = {"tumors": [2.0, 0.0], "healthy": [-1.0, 1.0]}
    assert patches.shares(scan).tolist() == [1.0, 0.5] and patches.area({"a": scan}) == 0.75


def test_an_arm_with_a_mistake_is_refused():
    with pytest.raises(ValueError, match="others"):
        Arm.from_dict({"name": "x", "others": "helthy"})
    with pytest.raises(ValueError, match="generator"):
        Arm.from_dict({"name": "x"})
    learned = ("crlm_1004", "crlm_1006", "crlm_1100_lowres", "hcc_015_pv")
    assert Arm.from_dict({"name": "x", "generator": "liver-early"}).trained_on == learned
    assert replace(ARMS["liver-early"], name="y").trained_on == learned
