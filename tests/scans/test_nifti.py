"""What is not changed is written back bit for bit; what cannot be read says why in one line."""

from __future__ import annotations

import gzip
import os

import numpy as np
import pytest

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.scans.nifti import (
    new_volume,
    read_volume,
    write_volume,
)
from tumorsynth.scans.volume_files import check_same_grid, read_pair

nib = pytest.importorskip("nibabel")

OBLIQUE = np.array(
    [[-0.7, 0.05, 0.1, 90.0], [0.04, -0.69, 0.3, -40.0], [0.02, 0.1, 2.4, 1200.5], [0, 0, 0, 1]]
)


def save(path, array, affine=OBLIQUE, *, slope=None, inter=0.0, kind=nib.Nifti1Image):
    header = kind.header_class(endianness=">" if array.dtype.byteorder == ">" else "<")
    header.set_data_dtype(array.dtype)
    image = kind(array, np.eye(4), header)
    image.header["sform_code"] = 1
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = affine[:3]
    image.header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    image = kind(array, image.header.get_best_affine(), image.header)
    image.header["descrip"] = b"kept as it is"
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 250
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


def patch(path, offset, numbers):
    """A small image whose header holds other numbers at ``offset``."""
    data = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), OBLIQUE).to_bytes())
    data[offset : offset + numbers.nbytes] = numbers.tobytes()
    path.write_bytes(bytes(data))
    return path


def raw_header(path):
    data = gzip.open(path).read() if path.name.endswith(".gz") else path.read_bytes()
    return data[:348]


@pytest.mark.parametrize(
    "dtype", ["int16", "uint16", "uint8", "int32", "float32", "float64", ">i2"]
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_unchanged_volume_is_written_back_bit_for_bit(tmp_path, dtype, suffix):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 200, (7, 6, 5)).astype(dtype)
    source = save(tmp_path / f"a{suffix}", array)
    volume = read_volume(source)
    out = tmp_path / "out.nii.gz"
    write_volume(out, volume, volume.stored)

    assert raw_header(out) == raw_header(source)
    again = nib.load(out)
    assert again.get_data_dtype() == np.dtype(dtype)
    np.testing.assert_array_equal(again.affine, nib.load(source).affine)
    np.testing.assert_array_equal(np.asarray(again.dataobj.get_unscaled()), array)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_only_changed_voxels_change_under_a_scale(tmp_path, kind):
    rng = np.random.default_rng(1)
    array = rng.integers(0, 4000, (6, 5, 4)).astype(np.uint16)
    volume = read_volume(save(tmp_path / "a.nii.gz", array, slope=0.5, inter=-1024, kind=kind))
    np.testing.assert_array_equal(volume.values(), array * np.float32(0.5) - 1024)

    changed = np.zeros(array.shape, bool)
    changed[2, 3, 1] = changed[0, 0, 0] = True
    write_volume(tmp_path / "b.nii.gz", volume, volume.with_changes(changed, [-100.2, 60.3]))
    back = nib.load(tmp_path / "b.nii.gz")
    raw = np.asarray(back.dataobj.get_unscaled())
    assert type(back) is kind
    assert (back.dataobj.slope, back.dataobj.inter) == (0.5, -1024)
    np.testing.assert_array_equal(raw[~changed], array[~changed])
    # C order of the changed voxels, nearest step of 0.5 HU
    assert back.dataobj[0, 0, 0] == -100.0 and back.dataobj[2, 3, 1] == 60.5


def test_integers_are_rounded_to_nearest_and_clipped():
    volume = new_volume("a", np.zeros((2, 2, 2), np.int16), np.eye(4))
    stored = volume.store(np.array([-0.6, 1.4, 1.6, 1e9, -1e9]))
    assert stored.tolist() == [-1, 1, 2, 32767, -32768]


def test_nan_in_a_float_ct_survives(tmp_path):
    array = np.zeros((3, 3, 3), np.float32)
    array[1, 1, 1], array[0, 0, 0] = np.nan, np.inf
    volume = read_volume(save(tmp_path / "a.nii.gz", array))
    write_volume(tmp_path / "b.nii.gz", volume, volume.stored)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "b.nii.gz").dataobj), array)


def test_trailing_axes_of_one_are_read_as_3d_and_written_back(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    volume = read_volume(save(tmp_path / "a.nii.gz", array))
    assert volume.stored.shape == (2, 3, 4)
    write_volume(tmp_path / "b.nii.gz", volume, volume.stored)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "b.nii.gz").dataobj), array)


def test_equal_volumes_give_equal_files(tmp_path):
    volume = new_volume("a", np.arange(60, dtype=np.int16).reshape(3, 4, 5), OBLIQUE)
    write_volume(tmp_path / "a.nii.gz", volume, volume.stored)
    write_volume(tmp_path / "b.nii.gz", volume, volume.stored)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b""), "not a NIfTI file"),
        (lambda p: p.write_text("hello, this is a text file " * 40), "not a NIfTI file"),
        (lambda p: p.write_bytes(gzip.compress(b"\0" * 4000)), "not a NIfTI file"),
        (lambda p: p.write_bytes((348).to_bytes(4, "little") + b"\0" * 400), "not a readable"),
        (lambda p: p.write_bytes((348).to_bytes(4, "little")), "not a readable"),
        (lambda p: save(p, np.zeros((4, 4, 4, 2), np.int16)), "3-D image, got shape 4x4x4x2"),
        (lambda p: save(p, np.zeros((4, 4), np.int16)), "must be one 3-D image"),
        (lambda p: save(p, np.zeros((4, 4, 4), np.complex64)), "must hold real numbers"),
        (lambda p: save(p, np.zeros((4, 4, 4), np.int16), np.diag([1.0, 0, 1, 1])), "affine"),
        (lambda p: patch(p, 280, np.array([np.nan], "<f4")), "affine"),
        (lambda p: patch(p, 40, np.array([3, -4, 4, 4], "<i2")), "not a readable"),
        (lambda p: patch(p, 70, np.array([1234], "<i2")), "not a readable"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, make, says):
    path = tmp_path / "scan_ct.nii.gz"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        read_volume(path)
    assert "scan_ct.nii.gz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, suffix):
    rng = np.random.default_rng(2)
    path = save(tmp_path / f"a{suffix}", rng.integers(-1000, 1000, (16, 16, 8)).astype(np.int16))
    whole = path.read_bytes()
    for keep in (5, 300, 360, len(whole) // 2, len(whole) - 20, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=f"a{suffix}"):
            read_volume(path)


def test_a_flipped_byte_in_a_gzip_is_noticed(tmp_path):
    rng = np.random.default_rng(3)
    path = save(tmp_path / "a.nii.gz", rng.integers(-1000, 1000, (16, 16, 8)).astype(np.int16))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="damaged"):
        read_volume(path)


def test_a_header_that_declares_more_than_there_is_memory(tmp_path):
    path = patch(tmp_path / "a.nii", 40, np.array([3, 32767, 32767, 32767], "<i2"))
    with pytest.raises(ValueError, match="a.nii"):
        read_volume(path)


def shifted(affine, **changes):
    out = affine.copy()
    for key, value in changes.items():
        out[int(key[1]), int(key[2])] += value
    return out


@pytest.mark.parametrize(
    ("shape", "affine", "says"),
    [
        ((4, 5, 7), OBLIQUE, "shape 4x5x6 against 4x5x7 voxels"),
        ((4, 5, 6), OBLIQUE @ np.diag([1, 1, 2, 1]), "spacing"),
        ((4, 5, 6), OBLIQUE @ np.diag([-1, 1, 1, 1]), "orientation"),
        ((4, 5, 6), shifted(OBLIQUE, a03=0.3), "origin"),
    ],
)
def test_another_grid_is_named(tmp_path, shape, affine, says):
    ct = save(tmp_path / "x_ct.nii.gz", np.zeros((4, 5, 6), np.int16))
    label = save(tmp_path / "x_label.nii.gz", np.zeros(shape, np.uint8), affine)
    with pytest.raises(ValueError, match=says) as caught:
        read_pair(ct, label)
    assert "x_ct.nii.gz and x_label.nii.gz" in str(caught.value)


def test_rounding_of_an_affine_is_no_difference():
    a = new_volume("a", np.zeros((4, 5, 6), np.int16), OBLIQUE)
    b = new_volume("b", np.zeros((4, 5, 6), np.uint8), OBLIQUE + 5e-4)
    check_same_grid(a, b)


def test_labels_are_whole_numbers(tmp_path):
    array = np.array([0, 1, 2, 300], np.float32).reshape(2, 2, 1)
    volume = read_volume(save(tmp_path / "a.nii.gz", array))
    assert volume.integers().ravel().tolist() == [0, 1, 2, 300]
    for wrong in (0.5, np.nan, np.inf):
        array[0, 0, 0] = wrong
        with pytest.raises(ValueError, match="whole numbers, but b.nii.gz holds"):
            read_volume(save(tmp_path / "b.nii.gz", array)).integers()
    array[0, 0, 0] = -1  # what nnU-Net has beyond a scan
    assert read_volume(save(tmp_path / "c.nii.gz", array)).integers().min() == -1
    array[0, 0, 0] = -1000
    with pytest.raises(ValueError, match="c.nii.gz holds -1000; give the label map, not the CT"):
        read_volume(save(tmp_path / "c.nii.gz", array)).integers()


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [("uint8", 255, True), ("uint8", 256, False), ("uint8", -1, False), ("int16", 300, True),
     ("float32", 2, True), ("float32", 2**24 + 1, True), ("int8", 200, False)],
)  # fmt: skip
def test_tumour_label_must_fit_the_file(dtype, value, fits):
    volume = new_volume("l", np.zeros((2, 2, 2), dtype), np.eye(4))
    if fits:
        volume.check_label_fits(value)
    else:
        with pytest.raises(ValueError, match=f"holds {dtype} .* tumour label is {value}"):
            volume.check_label_fits(value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fails(file):
        file.write(b"half of the new ")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        write_atomic(path, fails)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"


def test_real_scan_round_trip(shared, tmp_path):
    source = shared / "data/ct/totalseg_example_ct.nii.gz"
    volume = read_volume(source)
    write_volume(tmp_path / "out.nii.gz", volume, volume.stored)
    assert gzip.open(tmp_path / "out.nii.gz").read() == gzip.open(source).read()


@pytest.mark.parametrize("length", [0.0, np.nan, np.inf])
def test_a_voxel_size_that_is_none_is_refused(tmp_path, length, capfd):
    """Where the header has no affine of its own the size is all there is; 1 mm would be a guess."""
    path = patch(tmp_path / "a.nii", 84, np.float32([length]))
    data = bytearray(path.read_bytes())
    assert read_volume(path).stored.shape == (4, 4, 4)  # with its affine, the size is not needed
    data[252:256] = bytes(4)  # neither qform nor sform
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="no usable voxel size.*repair its header"):
        read_volume(path)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("offset", [np.inf, -1e30, 1.37e16, 3e38])
def test_voxels_that_begin_nowhere_are_refused(tmp_path, offset):
    path = patch(tmp_path / "a.nii", 108, np.float32([offset]))
    with pytest.raises(ValueError, match="a.nii"):
        read_volume(path)
