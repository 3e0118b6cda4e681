"""NIfTI headers that contradict themselves or each other: every command refuses, names, chooses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import tumorsynth as ts
from tumorsynth.commands.main import main
from tumorsynth.nifti_header import is_default, read_affine
from tumorsynth.scans.nifti import Reading, read_volume
from tumorsynth.scans.volume_files import read_pair

nib = pytest.importorskip("nibabel")

AFFINE = np.array([[-2.0, 0, 0, 60.5], [0, -2, 0, 50], [0, 0, 2, -400], [0, 0, 0, 1]])
SHAPE = (40, 40, 36)


def header(sform=AFFINE, qform=None, pixdim=None, unit=None):
    """A header with these sources."""
    out = nib.Nifti1Header()
    out.set_data_shape(SHAPE)
    if qform is not None:
        out.set_qform(qform, code=1)
    elif sform is not None:
        out["pixdim"][1:4] = np.linalg.norm(sform[:3, :3], axis=0)
    if sform is not None:
        out.set_sform(sform, code=1)
    if pixdim is not None:
        out["pixdim"][1:4] = pixdim
    if unit is not None:
        out["xyzt_units"] = unit
    return out


def rotated(degrees, axis=2):
    a = math.radians(degrees)
    i, j = (k for k in range(3) if k != axis)
    turn = np.eye(4)
    turn[[i, i, j, j], [i, j, i, j]] = math.cos(a), -math.sin(a), math.sin(a), math.cos(a)
    return turn @ AFFINE


def sheared(degrees):
    out = AFFINE.copy()
    out[1, 2] = 2 * math.tan(math.radians(degrees))
    return out


def moved(*by):
    out = AFFINE.copy()
    out[:3, 3] += by
    return out


def scan():
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    organ = x**2 + y**2 + z**2 < 0.8
    ct = np.where(organ, 100, -90) + np.random.default_rng(0).normal(0, 10, SHAPE)
    ct[0, 0, 0], ct[-1, -1, -1] = 1500, -1024
    return ct.astype(np.int16), organ.astype(np.uint8)


def save(path, array, its_header):
    """Write the header as it is: nibabel would make its sources agree."""
    own = its_header.copy()
    own.set_data_dtype(array.dtype)
    own.set_data_shape(array.shape)
    own["vox_offset"], own["magic"] = 352, b"n+1"
    path.write_bytes(own.binaryblock + bytes(4) + array.tobytes(order="F"))
    return path


@pytest.fixture
def pair(tmp_path):
    def write(ct_header, label_header=None):
        ct, label = scan()
        label_header = ct_header if label_header is None else label_header
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        return (
            save(folder / "a_ct.nii", ct, ct_header),
            save(folder / "a_label.nii", label, label_header),
        )

    return write


def run(*words):
    return main([str(word) for word in words])


CONTRADICTIONS = [
    (header(pixdim=(1, 1, 1)), "voxels of 2x2x2 mm and its pixdim of 1x1x1 mm"),
    (header(pixdim=(2, 2, 5)), "voxels of 2x2x2 mm and its pixdim of 2x2x5 mm"),
    (header(pixdim=(2, 2, 2.06)), "voxels of 2x2x2 mm and its pixdim of 2x2x2.06 mm"),
    (header(qform=np.diag([1.0, 1, 1, 1])), "voxels of 2x2x2 mm and its pixdim of 1x1x1 mm"),
    (header(qform=AFFINE @ np.diag([-1, 1, 1, 1])), "axes"),
    (header(qform=rotated(10)), "axes"),
    (header(qform=moved(0, 0, 30)), r"origin \(60.5, 50.0, -400.0\) .* \(60.5, 50.0, -370.0\)"),
    (header(unit=1), r"voxels of 2x2x2 metres \(xyzt_units\)"),
    (header(unit=3), r"voxels of 2x2x2 micrometres \(xyzt_units\)"),
]


@pytest.mark.parametrize(("its_header", "says"), CONTRADICTIONS)
def test_a_header_that_contradicts_itself_is_refused_with_both_values(its_header, says):
    with pytest.raises(ValueError, match=f"a.nii must say one voxel size.*{says}.*; choose with"):
        read_affine("a.nii", its_header)
    assert np.array_equal(read_affine("a.nii", its_header, "sform"), AFFINE)


@pytest.mark.parametrize(
    "its_header",
    [
        header(),
        header(qform=AFFINE),
        header(sform=None, qform=AFFINE),
        header(sform=None, pixdim=(2, 2, 5)),
        header(pixdim=(2.004, 2, 1.996)),
        header(pixdim=(0, 2, 2)),  # none, where the sform says all
        header(pixdim=(np.nan, 2, 2)),
        header(unit=0),
        header(unit=2),
        header(unit=10),  # mm, and seconds
        header(qform=moved(0.01, 0, 0.3)),
        header(qform=rotated(0.2)),
        *(header(sheared(tilt), qform=sheared(tilt)) for tilt in (5, 20, 30)),
        # the distance of slices, not the length of the sheared axis
        header(sheared(30), qform=sheared(30), pixdim=(2, 2, 2)),
    ],
)
def test_rounding_shears_and_missing_sources_are_no_contradiction(its_header):
    for geometry in (None, "sform", "qform", "pixdim"):
        found = read_affine("a.nii", its_header, geometry)
        assert np.array_equal(found, its_header.get_best_affine())


@pytest.mark.parametrize("degrees", [0, 1, 45, 90, 135, 179, 179.99, 180])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_rotation_survives_the_quaternion(degrees, axis):
    affine = rotated(degrees, axis) @ np.diag([0.35, 0.35, 0.4, 1])
    read_affine("a.nii", header(affine, qform=affine))


def test_each_source_can_be_chosen():
    qform = moved(0, 0, 30)
    qform[:3, :3] /= 2
    both = header(qform=qform)
    assert np.array_equal(read_affine("a", both, "sform"), AFFINE)
    np.testing.assert_allclose(read_affine("a", both, "qform"), qform, atol=1e-5)
    chosen = read_affine("a", both, "pixdim")  # sizes alone
    np.testing.assert_allclose(chosen, np.c_[qform[:, :3], AFFINE[:, 3]])
    with pytest.raises(ValueError, match="--geometry qform must name a source .* a has no qform"):
        read_affine("a", header(pixdim=(1, 1, 1)), "qform")
    with pytest.raises(ValueError, match="--geometry must be sform, qform or pixdim, got 'afine'"):
        Reading("afine")


@pytest.mark.parametrize(("size", "unit"), [(0.0008, "metres, multiply"), (800, "micrometres")])
def test_sizes_that_no_ct_has_are_named_with_the_file(pair, size, unit, capsys, tmp_path):
    affine = AFFINE.copy()
    affine[:3, :3] = np.eye(3) * size
    ct, label = pair(header(affine))
    with pytest.raises(ValueError, match=f"a_ct.nii must have voxels of 0.01 to 25.*{unit}"):
        read_volume(ct)
    assert run("synthesize", ct, label, "-o", tmp_path / "out", "--generator", "hu2023") == 2
    assert run("evaluate", label, label) == 2
    err = capsys.readouterr().err
    assert "a_ct.nii must have voxels of" in err and "a_label.nii must have voxels of" in err


def synthesize(pair, out, *more):
    return run("synthesize", *pair, "-o", out, "--generator", "hu2023", "--count", 1,
               "--size-mm", 16, 16.1, "--overwrite", *more)  # fmt: skip


def diameter(out, voxel_mm3):
    voxels = int((np.asarray(nib.load(out / "a_label.nii.gz").dataobj) == 2).sum())
    return (6 / np.pi * voxels * voxel_mm3) ** (1 / 3)


def test_synthesize_refuses_and_takes_the_source_that_was_chosen(pair, tmp_path, capsys):
    files, out = pair(header(pixdim=(1, 1, 1))), tmp_path / "out"
    assert synthesize(files, out) == 2
    assert "a_ct.nii must say one voxel size" in capsys.readouterr().err
    before = files[0].read_bytes()[:348]
    for geometry, voxel in (("sform", 8), ("pixdim", 1)):
        assert synthesize(files, out, "--geometry", geometry) == 0
        assert diameter(out, voxel) == pytest.approx(16, rel=0.06)
        report = json.loads((out / "a_report.json").read_text())
        assert report["geometry"] == geometry
        written = nib.load(out / "a_ct.nii.gz").header
        for field in ("pixdim", "sform_code", "qform_code", "srow_x", "srow_z"):  # as it was
            theirs = nib.Nifti1Header(before)[field]
            assert np.array_equal(written[field], theirs), field
        replayed = tmp_path / f"again_{geometry}"
        assert run("replay", out / "a_report.json", *files, "-o", replayed) == 0
    assert synthesize(files, out, "--geometry", "affine") == 2
    assert "--geometry must be" in capsys.readouterr().err


def test_a_folder_run_with_another_geometry_is_not_resumed(pair, tmp_path, capsys):
    files = pair(header(pixdim=(1, 1, 1)))
    folder, out = files[0].parent, tmp_path / "out"
    words = ("synthesize", folder, "-o", out, "--generator", "hu2023", "--count", 1)
    assert run(*words) == 2
    assert run(*words, "--geometry", "sform") == 0
    assert run(*words, "--geometry", "sform") == 0
    capsys.readouterr()
    for other in (("--geometry", "pixdim"), ()):
        assert run(*words, *other) == 2
        assert "geometry" in capsys.readouterr().err


def test_evaluate_and_healthy_take_the_source_that_was_chosen(pair, capsys, tmp_path):
    _, label = pair(header(pixdim=(1, 1, 1)))
    assert run("evaluate", label, label, "--tumor-label", 1, "--organ-label", 2) == 2
    assert "a_label.nii must say one voxel size" in capsys.readouterr().err
    volumes = []
    for geometry in ("sform", "pixdim"):
        more = ("--geometry", geometry)
        assert run("evaluate", label, label, "--tumor-label", 1, "--organ-label", 2, *more) == 0
        folder = tmp_path / "labels"
        folder.mkdir(exist_ok=True)
        (folder / "a.nii").write_bytes(label.read_bytes())
        assert run("healthy", folder, "-o", tmp_path / "h.json", "--overwrite", *more) == 0
        volumes.append(json.loads((tmp_path / "h.json").read_text())["scans"][0]["organ_ml"])
    assert volumes[0] == pytest.approx(8 * volumes[1], rel=0.01)
    assert run("healthy", tmp_path / "labels") == 1


def test_train_pack_takes_the_source_that_was_chosen(pair, tmp_path, capsys):
    """MONAI's reader would take the qform where it agrees with pixdim, other commands the sform."""
    pytest.importorskip("monai")
    from tumorsynth.training.reading import load_data

    qform = AFFINE.copy()
    qform[:3, :3] /= 2
    files = pair(header(qform=qform))
    folder = files[0].parent
    assert run("train", "pack", folder, "-o", tmp_path / "a.npz") == 2
    assert "a_ct.nii must say one voxel size" in capsys.readouterr().err
    for geometry, mm in (("sform", 2), ("qform", 1), ("pixdim", 1)):
        (case,) = load_data(folder, reading=Reading(geometry))
        organ = int((case.label == 1).sum())
        assert organ == pytest.approx(int(scan()[1].sum()) * mm**3, rel=0.1)
    more = ("--geometry", "sform")
    assert run("train", "pack", folder, "-o", tmp_path / "a.npz", *more) == 0


def test_the_reader_study_takes_the_source_that_was_chosen(pair):
    pytest.importorskip("uvicorn", reason="needs the extra reader-study")
    from tumorsynth.reader_study.blinding import Scan, blind

    ct, label = pair(header(pixdim=(1, 1, 1)))
    of = Scan("real", ct, label)
    with pytest.raises(ValueError, match="a_ct.nii must say one voxel size"):
        blind(of, tumor_label=1)
    (case,) = blind(of, tumor_label=1, reading=Reading("pixdim"))
    assert case.traits.spacing == (1, 1, 1)


def test_masks_for_shapes_are_checked_too(tmp_path):
    mask = save(tmp_path / "m.nii", scan()[1], header(pixdim=(1, 1, 4)))
    with pytest.raises(ValueError, match="m.nii must say one voxel size.*; repair its header"):
        ts.SynthesizeTumor("hu2023", shapes=[mask])
    ts.SynthesizeTumor("hu2023", shapes=[save(tmp_path / "n.nii", scan()[1], header())])


# -- CT and label ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [(0.01, 0.01, 0.01), (0.15, 0, 0)])
def test_a_share_of_a_voxel_is_no_other_grid(pair, by, tmp_path):
    pytest.importorskip("monai")
    files = pair(header(), header(moved(*by)))
    assert synthesize(files, tmp_path / "out") == 0
    assert run("evaluate", files[1], save(tmp_path / "b.nii", scan()[1], header())) == 0
    assert run("train", "pack", files[0].parent, "-o", tmp_path / "a.npz") == 0


@pytest.mark.parametrize(
    "other", [moved(0.4, 0, 0), moved(0, 0, -80), AFFINE @ np.diag([-1, 1, 1, 1]), rotated(1)]
)
def test_another_grid_is_refused_and_same_grid_is_the_way_out(pair, other, tmp_path, capsys):
    pytest.importorskip("monai")
    ct, label = files = pair(header(), header(other))
    true = save(tmp_path / "b.nii", scan()[1], header())
    commands = [
        lambda *more: synthesize(files, tmp_path / "out", *more),
        lambda *more: run("evaluate", label, true, *more),
        lambda *more: run("train", "pack", ct.parent, "-o", tmp_path / "a.npz", *more),
    ]
    for command in commands:
        assert command() in (1, 2)
        assert "add --same-grid if voxel lies on voxel" in capsys.readouterr().err
        assert command("--same-grid") == 0
        capsys.readouterr()
    report = tmp_path / "out/a_report.json"
    assert run("replay", report, *files, "-o", tmp_path / "again") == 0


def test_same_grid_does_not_excuse_another_shape(pair, tmp_path):
    ct, _ = pair(header())
    smaller = save(tmp_path / "s.nii", scan()[1][:-1], header())
    with pytest.raises(ValueError, match="shape 40x40x36 against 39x40x36 voxels; resample .* CT$"):
        read_pair(ct, smaller, Reading(same_grid=True))


# -- headers that know nothing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("its_header", "default"),
    [
        (header(np.eye(4)), True),  # nibabel, for np.eye(4)
        (header(np.diag([-1.0, -1, 1, 1])), True),  # ITK, for an array
        (header(None, pixdim=(1, 1, 1)), True),  # nibabel, for None
        (header(), False),
        (header(None, pixdim=(1, 1, 2)), False),
        (header(np.eye(4), qform=np.eye(4)), True),
        (header(None, qform=np.eye(4)), True),
    ],
)
def test_headers_that_libraries_write_without_knowing_a_size(its_header, default):
    assert is_default(its_header) is default


def test_1_mm_at_a_place_is_a_size():
    affine = np.eye(4)
    affine[:3, 3] = (-120, -90, 300)
    assert not is_default(header(affine))


def test_a_default_header_gives_one_note_a_run(tmp_path, capsys):
    for name in "ab":
        ct, label = scan()
        for ending, array in (("ct", ct), ("label", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}_{ending}.nii.gz")
    words = ("synthesize", tmp_path, "--generator", "hu2023", "--count", 1)
    assert run(*words, "-o", tmp_path / "one") == 0
    err = capsys.readouterr().err
    assert err.count("says voxels of 1 mm and no position") == 1 and "a_ct.nii.gz" in err
    assert run(*words, "-o", tmp_path / "two", "--geometry", "pixdim") == 0
    assert "no position" not in capsys.readouterr().err


def test_train_warns_of_default_headers(tmp_path):
    pytest.importorskip("monai")
    from tumorsynth.training.reading import load_data

    nib.save(nib.Nifti1Image(scan()[0], np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.warns(UserWarning, match="a.nii.gz says voxels of 1 mm and no position"):
        load_data(tmp_path)


def test_real_scans_do_not_contradict_themselves(shared):
    """No false alarm on any public scan or mask."""
    files = sorted((shared / "data").rglob("*.nii.gz"))
    assert len(files) > 20
    for file in files:
        found = nib.load(file).header
        read_affine(file.name, found)
        assert not is_default(found), file
