"""``synthesize --segment``, with a program of TotalSegmentator's command line in its place."""

from __future__ import annotations

import json
import os
import shlex
import sys

import numpy as np
import pytest
from phantoms import shared_phantom
from test_cli import load, refused, run

import tumorsynth as ts

nib = pytest.importorskip("nibabel")

# The options of TotalSegmentator 2 that are used, as its parser declares them.
STAND_IN = """#!{python}
import argparse, sys
parser = argparse.ArgumentParser()
parser.add_argument("-i", dest="input")
parser.add_argument("-o", dest="output")
parser.add_argument("-ml", "--ml", action="store_true")
parser.add_argument("-f", "--fast", action="store_true")
parser.add_argument("-ta", "--task", choices=["total", "body"], default="total")
parser.add_argument("-d", "--device", choices=["gpu", "cpu", "gpu:1"], default="gpu")
parser.add_argument("-q", "--quiet", action="store_true")
parser.add_argument("--version", action="version", version="{version}")
args = parser.parse_args()
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
import nibabel as nib
image = nib.load(args.input)
if image.shape[0] < 40:
    sys.exit("RuntimeError: out of memory")
assert args.ml and args.output.endswith(".nii.gz")
labels, affine = nib.load({labels!r}).get_fdata().astype("uint8"), image.affine.copy()
{fault}
nib.save(nib.Nifti1Image(labels, affine), args.output)
"""


@pytest.fixture(scope="module")
def ct():
    return shared_phantom((2.0, 2.0, 2.0), (64, 64, 48))


@pytest.fixture
def program(tmp_path, monkeypatch, ct):
    """Puts the stand-in on PATH; returns what it was called with, and how to change it."""
    folder, log, labels = tmp_path / "bin", tmp_path / "log", tmp_path / "labels.nii.gz"
    folder.mkdir()
    held = (ct.label[0] == ts.phantom.LABELS["liver"]).byte().numpy() * 5
    nib.save(nib.Nifti1Image(held, ct.affine), labels)
    log.touch()

    def install(version="2.18.0", fault=""):
        words = {"python": sys.executable, "version": version, "fault": fault}
        text = STAND_IN.format(**words, log=str(log), labels=str(labels))
        (folder / "TotalSegmentator").write_text(text)
        (folder / "TotalSegmentator").chmod(0o755)

    install()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    install.calls = lambda: log.read_text().splitlines()
    return install


def save(path, array, affine):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def synthesize(*words):
    return run("synthesize", *words, "--generator", "hu2023", "--count", 1)


def test_a_scan_without_a_label_gets_one(tmp_path, ct, program, capsys):
    scan = save(tmp_path / "in/a_ct.nii.gz", ct.image[0].short().numpy(), ct.affine)
    out = tmp_path / "out"
    assert synthesize(scan, "-o", out, "--segment", "--organ", "liver") == 0
    label = load(out / "a_label.nii.gz")[0]
    assert (label == 118).any() and set(np.unique(label)) == {0, 5, 118}
    kept = load(out / "segmentations/a.nii.gz")[0]
    np.testing.assert_array_equal(np.where(label == 118, 5, label), kept)
    report = json.loads((out / "a_report.json").read_text())
    about = report["segmentation"]
    assert (about["program"], about["version"], about["task"], about["fast"]) == (
        "TotalSegmentator", "2.18.0", "total", False,
    )  # fmt: skip
    assert report["organs"] == {"label_map": "totalsegmentator", "liver": 5}
    (call,) = program.calls()
    assert "--ml" in call and "--task total" in call and "--device cpu" in call


def test_the_label_map_is_made_once_for_a_scan_a_version_and_a_model(tmp_path, ct, program):
    image = ct.image[0].short().numpy()
    scan = save(tmp_path / "in/a_ct.nii.gz", image, ct.affine)
    words = scan, "-o", tmp_path / "out", "--segment", "--organ", "liver", "--overwrite"
    assert synthesize(*words) == 0 and synthesize(*words) == 0
    assert len(program.calls()) == 1
    assert synthesize(*words, "--segment-fast") == 0
    assert len(program.calls()) == 2 and "--fast" in program.calls()[1]
    program("2.19.0")
    assert synthesize(*words, "--segment-fast") == 0
    assert len(program.calls()) == 3
    save(scan, image + 1, ct.affine)
    assert synthesize(*words, "--segment-fast") == 0
    assert len(program.calls()) == 4
    kept = sorted(path.name for path in (tmp_path / "out/segmentations").iterdir())
    assert kept == ["a.json", "a.nii.gz"]


GARBAGE = "open(args.output, 'wb').write(b'xx'); sys.exit()"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (GARBAGE, "the segmentation is not a NIfTI file"),
        ("sys.exit()", "TotalSegmentator failed for ü a_ct.nii.gz (it said nothing)"),
        ("labels = labels[..., :-1]", "the segmentation differ in shape 64x64x48 against 64x64x47"),
        ("affine[0, 3] += 5", "the segmentation differ in affine: origin"),
        ("labels = labels + 0.5", "it must hold whole numbers, but the segmentation holds 0.5"),
        ("labels = labels * 40", "the segmentation holds 200, which is no value of the task"),
    ],
)
def test_a_bad_map_is_not_kept(tmp_path, ct, program, capsys, fault, says):
    scan = save(tmp_path / "in/ü a_ct.nii.gz", ct.image[0].short().numpy(), ct.affine)
    words = scan, "-o", tmp_path / "out", "--segment", "--organ", "liver"
    program(fault=fault)
    line = refused(capsys, "synthesize", *words)
    assert says in line and "unfinished" not in line
    alone = shlex.split(line.partition("run it alone to see why: ")[2])
    assert alone[1:] == ["-i", str(scan), "-o", "masks"] and os.access(alone[0], os.X_OK)
    assert not list((tmp_path / "out/segmentations").iterdir())
    program()
    assert synthesize(*words) == 0
    assert len(program.calls()) == 2


@pytest.mark.parametrize("fault", ["garbage", "cut short", "another grid", "another task"])
def test_a_kept_map_that_does_not_fit_is_made_again(tmp_path, ct, program, fault):
    scan = save(tmp_path / "in/a_ct.nii.gz", ct.image[0].short().numpy(), ct.affine)
    words = scan, "-o", tmp_path / "out", "--segment", "--organ", "liver", "--overwrite"
    assert synthesize(*words) == 0
    kept = tmp_path / "out/segmentations/a.nii.gz"
    good = kept.read_bytes()
    label, affine = load(kept)[0], ct.affine
    if fault == "garbage":
        kept.write_bytes(b"xx")
    elif fault == "cut short":
        kept.write_bytes(good[: len(good) // 2])
    elif fault == "another grid":
        save(kept, label[1:], affine)
    else:
        save(kept, label * 40, affine)
    assert synthesize(*words) == 0
    assert len(program.calls()) == 2
    np.testing.assert_array_equal(load(kept)[0], label)


def test_in_a_folder_a_scan_that_it_fails_on_is_named(tmp_path, ct, program, capsys):
    image = ct.image[0].short().numpy()
    save(tmp_path / "in/a_ct.nii.gz", image, ct.affine)
    save(tmp_path / "in/b.nii.gz", image[:30], ct.affine)
    words = tmp_path / "in", "-o", tmp_path / "out", "--segment", "--organ", "liver"
    assert synthesize(*words) == 1
    said = capsys.readouterr()
    assert "b: TotalSegmentator failed for b.nii.gz (RuntimeError: out of memory)" in said.err
    assert (tmp_path / "out/a_report.json").exists()
    assert synthesize(*words) == 1  # resumes: a is finished
    assert len([call for call in program.calls() if "a_ct.nii.gz" in call.split()[1]]) == 1


def test_a_folder_of_cts_alone_is_told_of_labels(tmp_path, ct, capsys):
    for name in "ab":
        save(tmp_path / f"in/{name}_ct.nii.gz", ct.image[0].short().numpy(), ct.affine)
    line = refused(capsys, "synthesize", tmp_path / "in", "-o", tmp_path / "out")
    assert "has none, such as a_label.nii.gz for a_ct.nii.gz" in line and "--segment" in line
    assert not (tmp_path / "out").exists()


def test_without_the_program_the_message_says_how_to_get_a_label(tmp_path, ct, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    scan = save(tmp_path / "in/a.nii.gz", ct.image[0].short().numpy(), ct.affine)
    words = "synthesize", scan, "-o", tmp_path / "out", "--segment", "--organ", "liver"
    line = refused(capsys, *words)
    assert "not installed" in line and "pip install TotalSegmentator" in line and "1 in" in line
    line = refused(capsys, "synthesize", scan, "-o", tmp_path / "out")
    assert "--segment" in line


@pytest.mark.parametrize(
    ("version", "words", "says"),
    [
        ("1.5.7", ["--organ", "liver"], "must have version 2 or later, got 1.5.7"),
        ("unknown", ["--organ", "liver"], "must say its version"),
        ("2.18.0", [], "give for example --organ liver"),
        ("2.18.0", ["--organ-label", "5"], "give for example --organ liver"),
        ("2.18.0", ["--organ", "livr"], "did you mean liver"),
        ("2.18.0", ["--organ", "spleen"], "no 1 (spleen) of totalsegmentator; it holds 5 (liver)"),
    ],
)
def test_what_does_not_fit(tmp_path, ct, program, capsys, version, words, says):
    program(version)
    scan = save(tmp_path / "in/a.nii.gz", ct.image[0].short().numpy(), ct.affine)
    line = refused(capsys, "synthesize", scan, "-o", tmp_path / "out", "--segment", *words)
    assert says in line


@pytest.mark.parametrize("kind", ["dicom", ".nrrd"])
def test_scans_in_other_formats_are_segmented_on_their_own_grid(tmp_path, program, ct, kind):
    pytest.importorskip("SimpleITK", reason="needs the extra itk")
    import SimpleITK as sitk
    from dicom import positions_along, write_series

    hu, scan = ct.image[0].short().numpy(), tmp_path / "in" / f"a{kind}"
    if kind == "dicom":
        at = positions_along(np.array([0, 0, 1.0]), 2.0 * np.arange(hu.shape[2]))
        write_series(scan, hu, pixel_mm=(2.0, 2.0), positions=at)
    else:
        scan.parent.mkdir()
        image = sitk.GetImageFromArray(np.ascontiguousarray(hu.T))
        image.SetSpacing((2.0, 2.0, 2.0))
        sitk.WriteImage(image, str(scan))
    words = ("synthesize", scan, "-o", tmp_path / "out", "--segment", "--organ", "liver")
    assert run(*words, "--generator", "hu2023", "--count", 1) == 0
    kept = {p.name for p in (tmp_path / "out" / "segmentations").iterdir()}
    assert len(kept) == 2 and all(name.startswith("a") for name in kept)
    assert len(program.calls()) == 1
    assert run(*words, "--generator", "hu2023", "--count", 1, "--overwrite") == 0
    assert len(program.calls()) == 1  # its label map is kept
