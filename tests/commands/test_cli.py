"""The commands on small scans: what they write, what they refuse, and how they say it."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import typer
from scipy.ndimage import distance_transform_edt

from tumorsynth.commands import main as commands
from tumorsynth.commands.main import main
from tumorsynth.commands.outcomes import lacks_tumors

nib = pytest.importorskip("nibabel")

ROOT = Path(__file__).parents[2]
SPACING = (1.5, 1.6, 2.5)
LPS = np.array([[-1.5, 0, 0, 80.5], [0, -1.6, 0, 60], [0, 0, 2.5, -400], [0, 0, 0, 1]])


def scan(seed=0, shape=(64, 56, 36)):
    """A CT with noise, int16, and labels: organ 1, organ 3 beside it, and a structure 7 in 1."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    ct = np.where((x / 0.95) ** 2 + (y / 0.9) ** 2 < 1, -90.0, -1000.0)
    label = np.zeros(shape, np.uint8)
    one = ((x + 0.35) / 0.45) ** 2 + (y / 0.6) ** 2 + (z / 0.85) ** 2 < 1
    three = ((x - 0.5) / 0.3) ** 2 + (y / 0.4) ** 2 + (z / 0.6) ** 2 < 1
    seven = ((x + 0.35) ** 2 + y**2 < 0.01) & one
    ct[one], ct[three], ct[seven] = 110, 140, 180
    label[one], label[three], label[seven] = 1, 3, 7
    ct += rng.normal(0, 12, shape)
    ct[0, 0, 0], ct[-1, -1, -1] = 3071, -1024
    return np.rint(ct).astype(np.int16), label


def write(folder, name, ct, label, affine=LPS, *, endings=("_ct.nii.gz", "_label.nii.gz")):
    folder.mkdir(exist_ok=True)
    paths = []
    for array, ending in zip((ct, label), endings, strict=True):
        image = nib.Nifti1Image(array, affine, dtype=array.dtype)
        image.header["descrip"] = b"a scan"
        nib.save(image, folder / f"{name}{ending}")
        paths.append(folder / f"{name}{ending}")
    return paths


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "in", "case", *scan())


def run(*words):
    return main([str(word) for word in words])


def synthesize(*words):
    return run("synthesize", *words, "--generator", "hu2023")


def load(path):
    image = nib.load(path)
    return np.asarray(image.dataobj), image


def refused(capsys, *words, code=2):
    """The one line on stderr with which a command was refused."""
    assert run(*words) == code
    err = capsys.readouterr().err
    assert err.startswith("tumorsynth: ") and err.count("\n") == 1, err
    return err


def test_writes_image_label_report_and_picture(pair, tmp_path, capsys):
    out = tmp_path / "out"
    # fmt: off
    assert synthesize(*pair, "-o", out, "--organ-label", 1, "--tumor-label", 2, "--count", 3,
                      "--size-mm", 8, 16, "--seed", 4) == 0
    # fmt: on
    assert "case: 3 tumours" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "case_ct.nii.gz",
        "case_label.nii.gz",
        "case_preview.png",
        "case_report.json",
    ]
    (ct, ct_file), (label, label_file) = load(pair[0]), load(pair[1])
    (new_ct, new_ct_file), (new_label, new_label_file) = (
        load(out / "case_ct.nii.gz"),
        load(out / "case_label.nii.gz"),
    )
    for old, new in ((ct_file, new_ct_file), (label_file, new_label_file)):
        assert gzip.open(new.get_filename()).read(348) == gzip.open(old.get_filename()).read(348)
    assert new_ct.dtype == np.int16 and new_label.dtype == np.uint8

    tumor = new_label != label
    assert (new_label[tumor] == 2).all() and (label[tumor] == 1).all()
    changed = new_ct != ct
    assert changed[tumor].mean() > 0.8  # rounding may hide a change of less than 0.5 HU
    report = json.loads((out / "case_report.json").read_text())
    placed = [t for t in report["tumors"] if t["applied"]]
    assert len(placed) == 3
    assert sum(t["label_voxels"] for t in placed) == tumor.sum()
    for t in placed:
        assert 8 * 0.7 <= t["diameter_mm"] <= 16 * 1.1
        assert label[tuple(t["centre_voxel"])] == 1
    far = distance_transform_edt(~tumor, sampling=SPACING) > 20
    assert far.any() and not changed[far].any()
    assert report["seed"] == 4 and report["generator"]["name"] == "hu2023"
    assert report["ct"] == "case_ct.nii.gz" and report["params"]
    assert report["options"]["organ_labels"] == [1] and report["options"]["count"] == [3, 3]


def test_same_seed_same_files_in_another_process(pair, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    assert synthesize(*pair, "-o", a, "--seed", 1) == 0
    words = ["synthesize", *pair, "-o", b, "--seed", 1, "--generator", "hu2023"]
    done = subprocess.run(
        [sys.executable, "-m", "tumorsynth.commands.main", *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")  # off a terminal: no bar, no noise
    assert synthesize(*pair, "-o", c, "--seed", 2) == 0
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name
        assert path.read_bytes() != (c / path.name).read_bytes(), path.name


def test_several_organ_labels(pair, tmp_path):
    out = tmp_path / "out"
    hit = set()
    for seed in range(4):
        # fmt: off
        assert synthesize(*pair, "-o", out, "--organ-label", 3, "--organ-label", 7, "--seed", seed,
                          "--tumor-label", 9, "--size-mm", 4, 6, "--overwrite") == 0
        # fmt: on
        label, new = load(pair[1])[0], load(out / "case_label.nii.gz")[0]
        assert set(new[new != label]) <= {9}
        hit |= set(label[new != label])
    assert hit and hit <= {3, 7}


def test_scaled_storage_keeps_its_raw_numbers(tmp_path):
    ct, label = scan()
    paths = write(tmp_path / "in", "case", ct, label)
    image = nib.Nifti1Image((ct.astype(int) * 2 + 2048).astype(np.uint16), LPS)
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, paths[0])
    raw = np.asarray(nib.load(paths[0]).dataobj.get_unscaled())
    assert synthesize(*paths, "-o", tmp_path / "out", "--count", 1) == 0
    new = nib.load(tmp_path / "out/case_ct.nii.gz")
    assert (new.dataobj.slope, new.dataobj.inter) == (0.5, -1024)
    again = np.asarray(new.dataobj.get_unscaled())
    assert again.dtype == np.uint16
    changed = again != raw
    assert 0 < changed.sum() < 0.2 * changed.size
    assert np.abs(np.asarray(new.dataobj)[changed]).max() < 400


def test_float_ct_with_nan_and_inf_keeps_them(tmp_path):
    ct, label = scan()
    ct = ct.astype(np.float32) + np.float32(0.25)
    ct[20, 28, 18], ct[22, 28, 18] = np.nan, np.inf
    paths = write(tmp_path / "in", "case", ct, label)
    assert synthesize(*paths, "-o", tmp_path / "out", "--count", 2) == 0
    new, image = load(tmp_path / "out/case_ct.nii.gz")
    assert image.get_data_dtype() == np.float32
    assert np.isnan(new[20, 28, 18]) and np.isinf(new[22, 28, 18])
    assert np.isfinite(new).sum() == ct.size - 2
    same = new == ct
    assert 0.8 < same.mean() < 1


def test_trailing_axis_of_one_is_kept(tmp_path):
    ct, label = scan()
    paths = write(tmp_path / "in", "case", ct[..., None], label)
    assert synthesize(*paths, "-o", tmp_path / "out") == 0
    assert nib.load(tmp_path / "out/case_ct.nii.gz").shape == (*ct.shape, 1)


@pytest.mark.parametrize("axes", list(permutations(range(3)))[1::2])
def test_the_same_patient_in_another_orientation(tmp_path, axes):
    ct, label = scan()
    affine = LPS[:, [*axes, 3]] @ np.diag([-1, 1, 1, 1])
    affine[:3, 3] = LPS[:3, 3]
    paths = write(tmp_path / "in", "case", ct.transpose(axes), label.transpose(axes), affine)
    assert synthesize(*paths, "-o", tmp_path / "out", "--count", 1) == 0
    new, image = load(tmp_path / "out/case_label.nii.gz")
    np.testing.assert_array_equal(image.affine, nib.load(paths[0]).affine)
    assert (new == 2).any()


def test_a_scan_without_the_organ_is_written_as_it_was(pair, tmp_path, capsys):
    """In a folder: of a single scan it is an error, see below."""
    out = tmp_path / "out"
    assert synthesize(pair[0].parent, "-o", out, "--organ-label", 5) == 1
    said = capsys.readouterr().out
    assert "case: 0 tumours; " in said
    for name, source in zip(("ct", "label"), pair, strict=True):
        assert gzip.open(out / f"case_{name}.nii.gz").read() == gzip.open(source).read()
    report = json.loads((out / "case_report.json").read_text())
    assert [t["applied"] for t in report["tumors"]] == [False]
    assert report["tumors"][0]["reason"] in said
    assert (out / "case_preview.png").is_file()


def test_size_prior_and_scaled_intensity(pair, tmp_path):
    ct, label = scan()
    scaled = np.clip((ct + 175) / 425, 0, 1).astype(np.float32)
    paths = write(tmp_path / "in", "case", scaled, label)
    # fmt: off
    assert synthesize(*paths, "-o", tmp_path / "out", "--size-prior", "liver",
                      "--intensity", "-175,250,0,1") == 0
    # fmt: on
    new = load(tmp_path / "out/case_ct.nii.gz")[0]
    assert (new != scaled).any() and new.min() >= 0 and new.max() <= 1


# folders ------------------------------------------------------------------------------------


def test_folder_of_pairs_and_two_folders_agree(tmp_path):
    one, cts, labels = tmp_path / "one", tmp_path / "cts", tmp_path / "labels"
    for i, name in enumerate(("b", "a")):
        ct, label = scan(seed=i)
        write(one, name, ct, label)
        for source, folder in (("ct", cts), ("label", labels)):
            folder.mkdir(exist_ok=True)
            shutil.copy(one / f"{name}_{source}.nii.gz", folder / f"{name}.nii.gz")
    assert synthesize(one, "-o", tmp_path / "o1", "--seed", 10) == 0
    assert synthesize(cts, labels, "-o", tmp_path / "o2", "--seed", 10) == 0
    for name, seed in (("a", 10), ("b", 11)):  # sorted by name, whatever order they were made in
        report = json.loads((tmp_path / f"o1/{name}_report.json").read_text())
        assert report["seed"] == seed
        # one scan alone, given that seed, is the same
        pair = one / f"{name}_ct.nii.gz", one / f"{name}_label.nii.gz"
        assert synthesize(*pair, "-o", tmp_path / f"alone_{name}", "--seed", seed) == 0
        for ending in ("ct.nii.gz", "label.nii.gz"):
            files = [tmp_path / f / f"{name}_{ending}" for f in ("o1", "o2", f"alone_{name}")]
            assert len({gzip.open(f).read() for f in files}) == 1


def test_a_bad_scan_among_many_is_reported_and_passed_over(tmp_path, capsys):
    folder = tmp_path / "in"
    for name in "abcd":
        write(folder, name, *scan())
    (folder / "a_label.nii.gz").unlink()
    whole = (folder / "c_ct.nii.gz").read_bytes()
    (folder / "c_ct.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert synthesize(folder, "-o", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "wrote 2 scans" in said.out
    lines = said.err.splitlines()
    assert len(lines) == 3
    assert "a: no such file" in lines[0] and "a_label.nii.gz" in lines[0]
    assert "c: c_ct.nii.gz is cut short" in lines[1]
    assert "2 of 4 scans failed" in lines[2]
    done = {p.name.split("_")[0] for p in (tmp_path / "out").iterdir()}
    assert done == {"b", "d"}
    # the others have the seeds they would have had
    assert json.loads((tmp_path / "out/d_report.json").read_text())["seed"] == 3


# what is refused -----------------------------------------------------------------------------


def test_bad_input_is_one_line_and_exit_code_2(pair, tmp_path, capsys):
    ct, label = scan()
    folder = tmp_path / "bad"
    text = folder / "text_ct.nii.gz"
    shorter = write(folder, "shorter", ct[:-1], label[:-1])
    moved = write(folder, "moved", ct, label, LPS + np.eye(4, k=3))
    half = write(folder, "half", ct, label * np.float32(0.5))
    unit = write(folder, "unit", np.clip((ct + 175) / 425, 0, 1).astype(np.float32), label)
    shifted = write(folder, "shifted", (ct + 1024).astype(np.uint16), label)
    slices = folder / "1.dcm"
    series = write(folder, "series", np.stack([ct, ct], -1), label)
    cut = write(folder, "cut", ct, label)
    cut[0].write_bytes(cut[0].read_bytes()[:-3000])
    text.write_text("not a scan")
    slices.write_bytes(bytes(128) + b"DICM" + bytes(400))
    missing = folder / "missing_ct.nii.gz"
    for words, says in [
        ((missing, pair[1]), ["no such file", "missing_ct.nii.gz"]),
        ((pair[0], missing), ["no such file", "missing_ct.nii.gz"]),
        ((text, pair[1]), ["text_ct.nii.gz is not a NIfTI file"]),
        ((cut[0], pair[1]), ["cut_ct.nii.gz is cut short"]),
        ((pair[0], shorter[1]), ["shape 64x56x36 against 63x56x36"]),
        ((pair[0], moved[1]), ["case_ct.nii.gz and moved_label.nii.gz", "origin"]),
        (half, ["whole numbers", "half_label.nii.gz holds 0.5"]),
        (
            unit,
            ["must be in HU", "unit_ct.nii.gz", "lie in [0, 1]", "--intensity=HU_LOW,HU_HIGH,0,1"],
        ),
        (shifted, ["shifted_ct.nii.gz", "HU + 1024", "--intensity=-1024,3071,0,4095"]),
        ((pair[1], pair[0]), ["case_ct.nii.gz holds -10", "the label map, not the CT"]),
        (
            (slices, pair[1]),
            ["a scan in DICOM must be the folder of its slices, got the file 1.dcm", "dcm2niix"],
        ),
        (("", pair[1]), ["an argument is empty"]),
        (series, ["series_ct.nii.gz must be one 3-D image", "64x56x36x2"]),
        ((pair[0],), ["needs its label file"]),
        ((*pair, "--tumor-label", 300), ["tumour label", "uint8 (0 to 255)", "300"]),
        ((*pair, "--tumor-label", 1), ["1"]),
        (
            (*pair, "--tumor-label", 3),  # the other organ
            ["--tumor-label 3 must be free", "case_label.nii.gz holds", "--tumor-label 8"],
        ),
        ((*pair, "--count", "many"), ["--count must be N or LOW-HIGH", "'many'"]),
        ((*pair, "--count", "3-1"), ["count"]),
        ((*pair, "--size-mm", 20, 8), ["size_mm"]),
        ((*pair, "--size-mm", 8, 20, "--size-prior", "liver"), ["exclude each other"]),
        ((*pair, "--size-prior", "moon"), ["moon", "liver"]),
        (
            (*pair, "--contrast-hu", "liver-portal"),
            ["--contrast-prior", "see tumorsynth synthesize --help"],
        ),
        ((*pair, "--contrast-hu", "liver-portal", "--seed", 1), ["--contrast-prior"]),
        ((*pair, "--contrast-prior", "moon"), ["moon", "liver-portal"]),
        (
            (*pair, "--contrast-prior", "liver-portal", "--contrast-hu", -50, -20),
            ["exclude each other"],
        ),
        ((*pair, "--bulge", "moon"), ["--bulge", "moon"]),
        ((*pair, "--bulge", "prior"), ["bulge=True", "kidney"]),
        ((*pair, "--bulge", "0.1-2"), ["bulge", "0.9"]),
        ((*pair, "--p", 2), ["p", "2"]),
        ((*pair, "--blend", "cream"), ["blend", "cream"]),
        ((*pair, "--device", "toaster"), ["--device", "toaster"]),
        ((*pair, "--device", "cuda:99"), ["no such GPU", "--device cpu"]),
        ((*pair, "--intensity", "low"), ["--intensity", "'low'"]),
        ((*pair, "--intensity", "5,1,0,1"), ["a_min < a_max"]),
        ((*pair, "--generator", "no-such"), ["'no-such'", "hu2023"]),
        ((*pair, "--generator", folder), ["card.json"]),
        ((tmp_path,), ["holds no NAME_ct.nii.gz"]),
        ((*pair, "--siez", 3), ["--siez", "tumorsynth synthesize --help"]),
        ((*pair, "--seed", "x"), ["--seed"]),
    ]:
        out = tmp_path / "out"
        given = words if "--generator" in words else (*words, "--generator", "hu2023")
        line = refused(capsys, "synthesize", *given, "-o", out)
        for part in says:
            assert part in line, (words, line)
        assert not out.exists() or not list(out.iterdir()), words


def test_missing_option_and_unknown_command(pair, capsys):
    assert "--out" in refused(capsys, "synthesize", *pair)
    assert "synthesise" in refused(capsys, "synthesise", *pair)


def test_results_are_replaced_only_when_asked(pair, tmp_path, capsys):
    out = tmp_path / "out"
    assert synthesize(*pair, "-o", out, "--seed", 1) == 0
    before = (out / "case_ct.nii.gz").read_bytes()
    line = refused(capsys, "synthesize", *pair, "-o", out, "--seed", 2)
    assert "case_ct.nii.gz and 3 more exist" in line and "--overwrite" in line
    assert (out / "case_ct.nii.gz").read_bytes() == before
    assert synthesize(*pair, "-o", out, "--seed", 2, "--overwrite") == 0
    assert (out / "case_ct.nii.gz").read_bytes() != before


def test_an_input_is_never_replaced(pair, capsys):
    before = pair[0].read_bytes()
    line = refused(capsys, "synthesize", *pair, "-o", pair[0].parent, "--overwrite")
    assert "is an input" in line
    assert pair[0].read_bytes() == before


def test_out_that_is_a_file(pair, capsys):
    assert "must be a folder" in refused(capsys, "synthesize", *pair, "-o", pair[0])
    assert "must be a folder" in refused(capsys, "demo", "--generator", "hu2023", "-o", pair[0])


def test_debug_shows_the_traceback(pair, tmp_path):
    with pytest.raises(FileNotFoundError):
        run("synthesize", tmp_path / "no_ct.nii.gz", pair[1], "-o", tmp_path / "out", "--debug")


# the other commands ---------------------------------------------------------------------------


def test_the_demo_says_where_its_pictures_are_and_how_to_replay_it(tmp_path, capsys):
    out = tmp_path / "a demo"
    for _ in range(2):  # again, over its own results
        assert run("demo", "-o", out, "--generator", "hu2023", "--count", 2) == 0
        said = capsys.readouterr().out
        assert str(out / "phantom_preview.png") in said and "hu2023" in said
    label = load(out / "phantom_label.nii.gz")[0]
    report = json.loads((out / "phantom_report.json").read_text())
    tumor_label = report["options"]["tumor_label"]
    assert sum(t["label_voxels"] for t in report["tumors"]) == (label == tumor_label).sum() > 0
    assert f"tumours have the value {tumor_label} in phantom_label.nii.gz" in said
    before, after = load(out / "healthy/phantom_ct.nii.gz")[0], load(out / "phantom_ct.nii.gz")[0]
    assert (before != after).any()
    (line,) = (x for x in said.splitlines() if "tumorsynth replay" in x)
    assert run(*shlex.split(line.partition("tumorsynth ")[2])) == 0
    assert "every voxel is as in the report" in capsys.readouterr().out


def test_info_lists_and_describes(capsys):
    assert run("info") == 0
    assert "hu2023" in capsys.readouterr().out
    assert run("info", "hu2023") == 0
    said = capsys.readouterr().out
    assert "name: hu2023" in said and "licence" in said
    assert "hu2023" in refused(capsys, "info", "no-such")


def test_convert_makes_a_folder_that_info_and_synthesize_take(shared, pair, tmp_path, capsys):
    pytest.importorskip("omegaconf")
    script = shared / "reference/make_checkpoints.py"
    subprocess.run([sys.executable, script, tmp_path / "published", "--seed", "1"], check=True)
    files = [tmp_path / "published" / f for f in ("AutoencoderModel.ckpt", "liver_early.pt")]
    folder = tmp_path / "liver"
    assert run("convert", *files, "-o", folder) == 0
    capsys.readouterr()
    assert "holds a generator" in refused(capsys, "convert", *files, "-o", folder)
    assert run("info", folder) == 0
    said = capsys.readouterr().out
    assert "sha256" in said and "parameters" in said and "MB" in said
    out = tmp_path / "out"
    assert run("synthesize", *pair, "-o", out, "--generator", folder, "--count", 1) == 0
    assert (load(out / "case_label.nii.gz")[0] == 2).any()


def test_convert_refuses_what_is_not_a_checkpoint(tmp_path, capsys):
    missing = tmp_path / "AutoencoderModel.ckpt"
    assert "no such file" in refused(capsys, "convert", missing, missing, "-o", tmp_path / "o")
    missing.write_text("text")
    assert "AutoencoderModel.ckpt" in refused(
        capsys, "convert", missing, missing, "-o", tmp_path / "o"
    )


def test_help_is_quick_and_names_the_commands(capsys):
    code = (
        "import sys; from tumorsynth.commands.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("synthesize", "demo", "convert", "info", "bench"):
        assert command in done.stdout
    assert run() == 0 and "synthesize" in capsys.readouterr().out
    assert run("--version") == 0 and capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("module", "extra"),
    [("typer", "cli"), ("rich", "cli"), ("nibabel", "io"), ("matplotlib", "viz")],
)
def test_a_missing_package_is_named_with_its_extra(module, extra, tmp_path):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from tumorsynth.commands.main import main; "
        f"sys.exit(main(['demo', '-o', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert module in done.stderr and f"tumorsynth[{extra}]" in done.stderr
    assert not (tmp_path / "out").exists()


# -- exit codes ------------------------------------------------------------------------------------


def test_a_wrong_organ_label_is_an_error_and_writes_nothing(pair, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("synthesize", *pair, "-o", out, "--generator", "hu2023", "--tumor-label", 20)
    err = refused(capsys, *words, "--organ-label", 5, "--organ-label", 6)
    assert (
        "--organ-label 5 6 must be in the label map, but case_label.nii.gz holds 0, 1, 3, 7" in err
    )
    assert list(out.iterdir()) == []


def test_no_tumour_anywhere_is_said_and_exits_with_one(tmp_path, capsys):
    ct, label = scan()
    for name, organ in (("a", 1), ("b", 5)):
        write(tmp_path / "in", name, ct, np.where(label == 1, organ, 0).astype(np.uint8))
    words = ("synthesize", tmp_path / "in", "--generator", "hu2023", "--tumor-label", 20)
    assert run(*words, "-o", tmp_path / "both", "--count", 1) == 0  # b has none, and a has
    said = capsys.readouterr()
    assert "b: 0 tumours; no organ: no voxel has a label of (1,)" in said.out and not said.err
    assert len(list((tmp_path / "both").iterdir())) == 8  # the scan without is written as it was
    assert run(*words, "-o", tmp_path / "none", "--organ-label", 9) == 1
    assert "no scan got a tumour; see the reasons above" in capsys.readouterr().err
    huge = ("--size-mm", 150, 200, "--count", 1)
    assert run(*words, "-o", tmp_path / "huge", *huge) == 1
    # chance is no failure
    assert run(*words, "-o", tmp_path / "chance", "--p", 0) == 0
    assert run(*words, "-o", tmp_path / "zero", "--count", 0) == 0


def test_what_counts_as_a_scan_that_lacks_tumours():
    """The code decides, whatever the words; earlier versions' records have words alone."""
    chance = {"applied": False, "code": "not_selected", "reason": "p = 0"}
    full = {"applied": False, "code": "no_room", "reason": "left alone: no room"}
    old_chance = {"applied": False, "reason": "left alone (p = 0)"}
    old_full = {"applied": False, "reason": "no room"}
    done = {"applied": True}
    assert [lacks_tumors([one]) for one in (chance, full, old_chance, old_full, done)] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert not lacks_tumors([]) and not lacks_tumors([full, done]) and lacks_tumors([chance, full])


def test_scans_with_nan(tmp_path, capsys):
    ct, label = scan()
    full = ct.astype(np.float32)
    around, half, organ = full.copy(), full.copy(), full.copy()
    around[:3] = np.nan  # outside of the body
    half[: len(half) // 4] = np.nan
    organ[label == 1] = np.inf
    words = ("--generator", "hu2023", "--count", 1, "--tumor-label", 20)
    codes, said = {}, {}
    for name, image in (
        ("around", around),
        ("half", half),
        ("organ", organ),
        ("all", full * np.nan),
    ):
        pair = write(tmp_path / name, "x", image, label)
        codes[name] = run("synthesize", *pair, "-o", tmp_path / f"{name}-out", *words)
        said[name] = capsys.readouterr()
    assert codes == {"around": 0, "half": 0, "organ": 1, "all": 2}
    assert "x: 1 tumour" in said["around"].out and not said["around"].err
    assert "x: 1 tumour" in said["half"].out
    assert (
        "of the organ's voxels in x_ct.nii.gz are NaN or infinite; no tumour goes"
        in said["half"].err
    )
    assert "100% of the organ's voxels in the image are NaN or infinite" in said["organ"].out
    assert "every voxel of x_ct.nii.gz is NaN or infinite; export it again" in said["all"].err
    for name, image in (("around", around), ("half", half)):
        new = np.asarray(nib.load(tmp_path / f"{name}-out" / "x_ct.nii.gz").dataobj)
        assert (np.isfinite(new) == np.isfinite(image)).all()


# -- visibility and the gate -----------------------------------------------------------------------


def faint_scan(folder, name="case"):
    """An organ of 50 HU under noise of 12 HU in thick voxels."""
    ct, label = scan()
    ct = ct.astype(np.float32)
    ct[label == 1] -= 60
    return write(folder, name, np.rint(ct).astype(np.int16), label)


def test_a_summary_counts_the_tumours_that_are_hardly_visible(tmp_path, capsys):
    for name in ("a", "b"):
        faint_scan(tmp_path / "in", name)
    words = ("--contrast-hu", -3, -2, "--count", 2, "-o", tmp_path / "out")
    assert synthesize(tmp_path / "in", *words) == 0
    out, err = capsys.readouterr()
    assert out.count(", 2 hardly visible") == 2
    assert "4 of 4 tumours are hardly visible" in err and "visibility must be 5 or more" in err
    assert "--gate" in err and "FaintTumorWarning" not in err
    report = json.loads((tmp_path / "out" / "a_report.json").read_text())
    assert all(0 <= record["visibility"] < 5 for record in report["tumors"])
    # visible ones bring no word
    words = ("--contrast-hu", -60, -50, "--size-mm", 12, 16, "-o", tmp_path / "more")
    assert synthesize(tmp_path / "in", *words) == 0
    out, err = capsys.readouterr()
    assert "hardly" not in out + err


def test_default_tumours_are_visible_in_the_report(tmp_path, capsys):
    paths = faint_scan(tmp_path / "in")
    assert synthesize(*paths, "--count", 3, "-o", tmp_path / "out") == 0
    assert "hardly" not in "".join(capsys.readouterr())
    report = json.loads((tmp_path / "out" / "case_report.json").read_text())
    assert all(r["visibility"] >= 5 for r in report["tumors"] if r["applied"])
    words = (*paths, "-o", tmp_path / "again")
    assert run("replay", tmp_path / "out" / "case_report.json", *words) == 0


def strict(path):
    """JSON as other programs read it: without NaN and Infinity."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))


def test_the_gate_skips_tumours_and_resumes_and_replays(tmp_path, capsys):
    paths = faint_scan(tmp_path / "in")
    out = tmp_path / "out"
    words = ("--contrast-hu", -3, -2, "--gate")
    assert synthesize(tmp_path / "in", *words, "-o", out) == 1
    assert "the gate: visibility" in capsys.readouterr().out
    report = strict(out / "case_report.json")
    assert {r["code"] for r in report["tumors"]} == {"gate"}
    assert report["options"]["gate"]["visibility"] == [5.0, None]
    assert synthesize(tmp_path / "in", *words, "-o", out) == 1  # finished already
    said = capsys.readouterr()
    assert "finished already" in said.out and "no scan got a tumour" in said.err
    assert "made with" in refused(
        capsys, "synthesize", tmp_path / "in", "--generator", "hu2023", "--contrast-hu", -3, -2,
        "-o", out,
    )  # fmt: skip
    limits = ("--gate-limits", "visibility=none, noise_ratio=0.1:9,tries=2")
    assert synthesize(*paths, *words, *limits, "-o", tmp_path / "open") == 0
    gate = strict(tmp_path / "open" / "case_report.json")["options"]["gate"]
    assert gate["visibility"] is None and gate["tries"] == 2 and gate["noise_ratio"] == [0.1, 9.0]
    words = (*paths, "-o", tmp_path / "again")
    assert run("replay", tmp_path / "open" / "case_report.json", *words) == 0


@pytest.mark.parametrize(
    "limits",
    [" ", "visible=5:", "visibility=5", "visibility=a:b", "tries=many", "visibility=1:2:3"],
)
def test_gate_limits_that_are_none_are_refused(pair, tmp_path, capsys, limits):
    err = refused(capsys, "synthesize", *pair, "-o", tmp_path / "out", "--gate-limits", limits)
    assert f"got {limits!r}" in err and "give for example visibility=8:" in err
    err = refused(
        capsys, "synthesize", *pair, "-o", tmp_path / "out", "--gate-limits", "visibility=9:2"
    )
    assert "low <= high" in err


def test_a_typer_below_the_floor_is_named(monkeypatch, capsys):
    declared = re.search(r'"typer>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert declared and declared[1] == commands.TYPER_FLOOR
    monkeypatch.setattr(typer, "__version__", "0.15.1")
    # typer 0.15.1 with click 8.2 calls its own method with an argument that it does not take
    monkeypatch.setattr(typer.main, "get_command", lambda app: app.make_metavar(None))
    assert run("evaluate", "--help") == 1
    assert "typer 0.15.1 is installed, but the commands need typer 0.20" in capsys.readouterr().err
