"""Series in time, and other phases, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_cli import LPS, run, scan, synthesize, write

from tumorsynth.commands.follow_up import join_factors, parse_factors
from tumorsynth.scans.follow_up import expand
from tumorsynth.scans.pairing import Pair


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "in", "case", *scan())


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def report_of(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("effect", ["0", "0.5"])
def test_a_series_grows_and_its_reports_are_linked(pair, tmp_path, effect):
    out = tmp_path / "out"
    words = ("--seed", 5, "--count", 1, "--size-mm", 10, 12, "--mass-effect", effect)
    assert synthesize(*pair, "-o", out, *words, "--follow-up", 1, 1.3, 1.7) == 0
    masks = [voxels(out / f"case_t{k}_label.nii.gz") == 2 for k in range(3)]
    assert masks[0].any()
    for smaller, larger in zip(masks, masks[1:], strict=False):
        assert not (smaller & ~larger).any() and larger.sum() > 1.5 * smaller.sum()
    reports = [report_of(out / f"case_t{k}_report.json") for k in range(3)]
    links = [report["follow_up"] for report in reports]
    assert [one["requested_factor"] for one in links] == [1, 1.3, 1.7]
    assert [one["previous"] for one in links] == [
        None,
        "case_t0_report.json",
        "case_t1_report.json",
    ]
    assert {one["first"] for one in links} == {"case_t0_report.json"}
    assert len({report["seed"] for report in reports}) == 1
    assert (out / "case_t2_preview.png").is_file()
    # the first point is what the same command makes without the option
    assert synthesize(*pair, "-o", tmp_path / "plain", *words) == 0
    plain = voxels(tmp_path / "plain" / "case_ct.nii.gz")
    assert np.array_equal(plain, voxels(out / "case_t0_ct.nii.gz"))
    # a replay repeats any point
    again = tmp_path / "again"
    assert run("replay", out / "case_t2_report.json", *pair, "-o", again) == 0
    assert np.array_equal(voxels(again / "case_ct.nii.gz"), voxels(out / "case_t2_ct.nii.gz"))


def test_a_folder_resumes_with_the_same_seeds(tmp_path, capsys):
    for k, name in enumerate(("a", "b")):
        write(tmp_path / "in", name, *scan(k))
    words = ("--count", 1, "--size-mm", 8, 10, "--follow-up", "1,1.4")
    out = tmp_path / "out"
    assert synthesize(tmp_path / "in", "-o", out, *words) == 0
    seeds = {name: report_of(out / f"{name}_report.json")["seed"] for name in ("a_t0", "b_t1")}
    assert seeds == {"a_t0": 0, "b_t1": 1}
    before = {path.name: path.read_bytes() for path in out.glob("*_ct.nii.gz")}
    (out / "b_t1_report.json").unlink()
    (out / ".b_t1_unfinished").touch()
    capsys.readouterr()
    assert synthesize(tmp_path / "in", "-o", out, *words) == 0
    assert "3 of 4 scans are finished already" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in out.glob("*_ct.nii.gz")}
    assert synthesize(tmp_path / "in", "-o", out, *words[:-1], "1,1.5") == 2
    assert "follow_up requested_factor 1.4, now 1.5" in capsys.readouterr().err
    assert synthesize(tmp_path / "in", "-o", out, *words, "--workers", 2, "--overwrite") == 0
    assert before == {path.name: path.read_bytes() for path in out.glob("*_ct.nii.gz")}


def test_a_tumour_without_room_is_named(tmp_path, capsys):
    ct, label = scan()
    small = np.zeros_like(label)
    small[12:26, 20:34, 12:22] = 1
    pair = write(tmp_path / "in", "case", ct, small)
    words = ("--count", 1, "--size-mm", 10, 11, "--follow-up", 1, 3)
    assert synthesize(*pair, "-o", tmp_path / "out", *words) == 0
    assert "case_t1: 1 tumour" in (printed := capsys.readouterr().out)
    assert "1 without room for the new size" in printed
    grown = voxels(tmp_path / "out" / "case_t1_label.nii.gz") == 2
    assert (small[grown] == 1).all()


@pytest.mark.parametrize(
    "factors", [["0"], ["-1"], ["big"], ["1", "nan"], ["1,50"], [","], [], ["--seed", "3"]]
)
def test_bad_factors_end_with_2(pair, tmp_path, capsys, factors):
    assert synthesize(*pair, "-o", tmp_path / "out", "--follow-up", *factors) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--follow-up must be" in line and not (tmp_path / "out").exists()


def test_points_have_names_of_their_own():
    pairs = [Pair(name, Path(name), Path(name)) for name in ("a", "b")]
    names = [pair.name for pair, _ in expand(pairs, (1.0, 2.0))]
    assert names == ["a_t0", "a_t1", "b_t0", "b_t1"]
    assert [pair.name for pair, _ in expand(pairs, ())] == ["a", "b"]


def test_a_layout_is_kept_for_each_point(tmp_path):
    """nnU-Net raw: each point in time is a data set of its own."""
    folder = tmp_path / "in"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    ct, label = scan()
    nib.save(nib.Nifti1Image(ct, LPS), folder / "imagesTr" / "liver_0_0000.nii.gz")
    nib.save(
        nib.Nifti1Image((label == 1).astype(np.uint8), LPS), folder / "labelsTr/liver_0.nii.gz"
    )
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumor": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    words = ("--count", 1, "--size-mm", 8, 9, "--follow-up", 1, 1.5)
    assert synthesize(folder, "-o", out, *words) == 0
    masks = []
    for point in ("t0", "t1"):
        assert report_of(out / point / "dataset.json")["numTraining"] == 1
        assert (out / point / "imagesTr" / "liver_0_0000.nii.gz").is_file()
        masks.append(voxels(out / point / "labelsTr" / "liver_0.nii.gz") == 2)
    assert masks[0].any() and not (masks[0] & ~masks[1]).any() and masks[1].sum() > masks[0].sum()
    assert report_of(out / "liver_0_t1_report.json")["follow_up"]["number"] == 1


def test_the_words_of_the_option():
    words = ["synthesize", "a", "--follow-up", "1", "1.3", "1.7", "--seed", "3"]
    assert join_factors(words) == [
        "synthesize", "a", "--follow-up", "1,1.3,1.7", "--seed", "3",
    ]  # fmt: skip
    assert join_factors(["--follow-up", "1", "b"]) == ["--follow-up", "1", "b"]
    assert join_factors(["--follow-up=1,2", "3"]) == ["--follow-up=1,2", "3"]
    assert join_factors(["--follow-up"]) == ["--follow-up", ""]
    assert join_factors(["--follow-up", "--seed", "3"]) == ["--follow-up", "", "--seed", "3"]
    assert parse_factors("1, 1.3 2") == (1.0, 1.3, 2.0) and parse_factors(None) == ()


# -- another phase ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portal")
    pair = write(folder / "in", "case", *scan())
    words = ("--count", 2, "--size-mm", 8, 12, "--contrast-prior", "liver-portal", "--seed", 2)
    assert synthesize(*pair, "-o", folder / "out", *words) == 0
    ct, _ = scan(9)
    arterial = np.where(ct > 60, ct - 30, ct).astype(np.int16)
    nib.save(nib.Nifti1Image(arterial, LPS), folder / "late_ct.nii.gz")
    return folder / "out" / "case_report.json", pair, folder / "late_ct.nii.gz"


def test_another_phase_has_the_same_label(portal, tmp_path, capsys):
    report, pair, other = portal
    words = ("--other-phase", other, "--contrast-hu", 20, 30)
    assert run("replay", report, *pair, "-o", tmp_path / "late", *words) == 0
    assert "the label is as in the report" in capsys.readouterr().out
    first = voxels(report.parent / "case_label.nii.gz")
    assert np.array_equal(first, voxels(tmp_path / "late" / "late_label.nii.gz"))
    made, before = voxels(tmp_path / "late" / "late_ct.nii.gz"), voxels(other)
    tumor = first == 2
    assert (made.astype(float) - before)[tumor].mean() > 8
    late = report_of(tmp_path / "late" / "late_report.json")
    assert late["phase_of"] == {
        "report": "case_report.json",
        "ct": "case_ct.nii.gz",
        "contrast_hu": [20.0, 30.0],
    }
    assert late["ct"] == "late_ct.nii.gz"
    again = ("replay", tmp_path / "late" / "late_report.json", other, pair[1], "-o", tmp_path / "x")
    assert run(*again) == 2
    assert "needs the report of the first phase" in capsys.readouterr().err
    prior = ("--other-phase", other, "--contrast-prior", "liver-arterial")
    assert run("replay", report, *pair, "-o", tmp_path / "prior", *prior) == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--contrast-prior", "liver-arterial"), "go with --other-phase"),
        (("--other-phase", "{other}", "--contrast-prior", "liver-atrial"), "must be one of"),
        (("--other-phase", "missing.nii.gz"), "missing.nii.gz"),
        (("--other-phase", "{small}", "--contrast-hu", "20", "30"), "resample it to that CT"),
        (("--other-phase", "{moved}", "--contrast-hu", "20", "30"), "resample it to that CT"),
        (
            ("--other-phase", "{other}", "--contrast-hu", "1", "2", "--contrast-prior", "liver"),
            "exclude each other",
        ),
    ],
)
def test_bad_phases_end_with_2(portal, tmp_path, capsys, words, error):
    report, pair, other = portal
    small = tmp_path / "small_ct.nii.gz"
    nib.save(nib.Nifti1Image(voxels(other)[:-4], LPS), small)
    moved = tmp_path / "moved_ct.nii.gz"
    nib.save(nib.Nifti1Image(voxels(other), LPS @ np.diag([1.0, 1, 1.1, 1])), moved)
    words = [word.format(other=other, small=small, moved=moved) for word in words]
    capsys.readouterr()
    assert run("replay", report, *pair, "-o", tmp_path / "late", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert error in line and not (tmp_path / "late").exists()
