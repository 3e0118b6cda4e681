"""A report is enough to make its tumours again, voxel by voxel; what does not fit is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import tiny_generator

from tumorsynth.commands.main import main

nib = pytest.importorskip("nibabel")


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture
def pair(tmp_path):
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, 32)] * 3, indexing="ij")
    organ = x**2 + y**2 + z**2 < 0.8
    ct = np.where(organ, 100, -100) + np.random.default_rng(0).normal(0, 10, organ.shape)
    paths = [tmp_path / "a_ct.nii", tmp_path / "a_label.nii"]
    for path, array in zip(paths, (ct.astype(np.int16), organ.astype(np.uint8)), strict=True):
        nib.save(nib.Nifti1Image(array, np.diag([2, 2, 2, 1])), path)
    return paths


def voxels(out):
    return {key: np.asarray(nib.load(out / f"a_{key}.nii.gz").dataobj) for key in ("ct", "label")}


@pytest.mark.parametrize(
    "options",
    [
        ("--generator", "hu2023", "--count", 2, "--seed", 3),
        ("--generator", "hu2023", "--contrast-hu", -60, -40, "--blend", "difftumor"),
        ("--generator", "folder", "--count", 1),
        ("--generator", "hu2023", "--p", 0),
        ("--generator", "hu2023", "--contrast-prior", "kidney-arterial", "--bulge", "0.2-0.4"),
    ],
)
def test_the_same_tumours_again(pair, tmp_path, capsys, options):
    folder = tmp_path / "gen"
    if "folder" in options:
        tiny_generator().save(folder)
    options = [folder if word == "folder" else word for word in options]
    assert run("synthesize", *pair, "-o", tmp_path / "one", *options) == 0
    again = ("--generator", folder) if folder in options else ()
    report = tmp_path / "one/a_report.json"
    assert run("replay", report, *pair, "-o", tmp_path / "two", *again) == 0
    assert "every voxel is as in the report" in capsys.readouterr().out
    one, two = voxels(tmp_path / "one"), voxels(tmp_path / "two")
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    # and so a replay's report replays
    assert (tmp_path / "two/a_report.json").read_bytes() == report.read_bytes()


def test_a_replay_that_differs_says_so(pair, tmp_path, capsys):
    assert run("synthesize", *pair, "-o", tmp_path / "one", "--generator", "hu2023") == 0
    report = tmp_path / "one/a_report.json"
    told = json.loads(report.read_text())
    told["tumorsynth"] = "0.0.1"
    told["params"][0]["tumors"][0]["seed"] += 1
    report.write_text(json.dumps(told))
    capsys.readouterr()
    assert run("replay", report, *pair, "-o", tmp_path / "two") == 1
    error = capsys.readouterr().err
    assert "version 0.0.1" in error and "not the report's to the last voxel" in error


def test_what_does_not_fit_is_refused(pair, tmp_path, capsys):
    folder, other = tiny_generator(0).save(tmp_path / "g0"), tiny_generator(1).save(tmp_path / "g1")
    out, two = tmp_path / "one", tmp_path / "two"
    assert run("synthesize", *pair, "-o", out, "--generator", folder, "--count", 1) == 0
    report = out / "a_report.json"
    told = json.loads(report.read_text())

    def changed(**entries):
        path = tmp_path / f"changed_{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({**told, **entries}))
        return path

    text = tmp_path / "text.json"
    text.write_text("text")
    mine = ("--generator", folder)
    for words, says in [
        ((tmp_path / "no.json", *pair), "no such file"),
        ((text, *pair), "must be JSON"),
        ((changed(params=None), *pair), "must hold 'params'"),
        ((report, *pair), "'tiny-0' does not ship with the package"),
        ((changed(generator={"name": "who/ever"}), *pair), "'who/ever' does not ship"),
        ((report, *pair, "--generator", other), "has name tiny-0, this one has tiny-1"),
        ((report, out / "a_ct.nii.gz", pair[1], *mine), "must have the voxels"),
        ((report, pair[0], out / "a_label.nii.gz", *mine), "must have the voxels"),
        ((changed(options={"evil": 1}), *pair, *mine), "must be those of this version"),
        ((changed(options={**told["options"], "intensity": 5}), *pair, *mine), "this version"),
        ((changed(params=[]), *pair, *mine), "params must hold one record"),
        ((changed(params=[5]), *pair, *mine), "params must hold one record"),
    ]:
        capsys.readouterr()
        assert run("replay", *words, "-o", two) == 2, says
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
        assert not two.exists() or not list(two.iterdir())


def resaved(pair, folder, affine=None, shape=None):
    folder.mkdir()
    paths = []
    for path in pair:
        image = nib.load(path)
        data = np.asarray(image.dataobj)
        data = data if shape is None else data[tuple(slice(n) for n in shape)]
        paths.append(folder / path.name)
        nib.save(nib.Nifti1Image(data, image.affine if affine is None else affine), paths[-1])
    return paths


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"affine": np.diag([1, 1, 1, 1])}, "of voxels of 2 x 2 x 2 mm, got one of 1 x 1 x 1 mm"),
        ({"affine": np.diag([2, 2, 5, 1])}, "got one of 2 x 2 x 5 mm"),
        ({"affine": np.diag([-2, 2, 2, 1])}, "with axes RAS, got one with axes LAS"),
        ({"affine": np.diag([2, 2, 2, 1]) + np.eye(4, k=3) * 9}, "up to 4.5 voxels away"),
        ({"shape": (32, 32, 30)}, "of 32 x 32 x 32 voxels, got one of 32 x 32 x 30"),
    ],
)
def test_the_same_voxels_in_another_place_are_refused(pair, tmp_path, capsys, change, says):
    """A header that another program wrote; the hashes are of the voxels alone."""
    assert run("synthesize", *pair, "-o", tmp_path / "one", "--generator", "hu2023") == 0
    report = json.loads((tmp_path / "one/a_report.json").read_text())
    assert report["params"][0]["grid"]["shape"] == [32, 32, 32]
    if "shape" in change:
        del report["voxels_sha256"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    capsys.readouterr()
    others = resaved(pair, tmp_path / "other", **change)
    assert run("replay", path, *others, "-o", tmp_path / "two") == 2
    error = capsys.readouterr().err
    assert "params must be replayed on the grid" in error and says in error
    assert error.count("\n") == 1 and not (tmp_path / "two").exists()
    same = resaved(pair, tmp_path / "same")
    assert run("replay", path, *same, "-o", tmp_path / "two") == 0
