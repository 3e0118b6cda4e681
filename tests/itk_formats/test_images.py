"""NRRD and MetaImage: SimpleITK's geometry, voxel for voxel, and headers that it reads wrongly."""

from __future__ import annotations

import builtins
import itertools
import re

import numpy as np
import pytest

sitk = pytest.importorskip("SimpleITK", reason="needs the extra itk")

from tumorsynth.itk_formats.images import ItkImage, read_grid, write_image  # noqa: E402
from tumorsynth.itk_formats.reading import read_itk  # noqa: E402

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
DTYPES = ("int16", "uint8", "int32", "float32", "float64", "uint16")
ARRAY = np.random.default_rng(0).integers(-1000, 1000, (7, 6, 5)).astype(np.int16)  # Z, Y, X


def rotation(seed: int) -> np.ndarray:
    """A rotation, with some axes flipped or swapped."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0] if seed % 2 else np.eye(3)
    order = list(itertools.permutations(range(3)))[seed % 6]
    return axes[:, order] * rng.choice([-1, 1], 3)


def image_of(array=ARRAY, direction=None, spacing=(0.7, 0.8, 2.5), origin=(-90.5, 41.25, -1200)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    return image


def ras(point):
    return np.array([-point[0], -point[1], point[2]])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("seed", range(8))
def test_voxels_and_their_places_are_those_of_simpleitk(tmp_path, suffix, seed):
    path = tmp_path / f"a{suffix}"
    image = image_of(ARRAY.astype(DTYPES[seed % 6]), rotation(seed))
    sitk.WriteImage(image, str(path), useCompression=bool(seed % 2))
    read = read_itk(path)
    assert read.stored.dtype == DTYPES[seed % 6]
    for index in [(0, 0, 0), (4, 5, 6), (1, 2, 3)]:
        assert read.stored[index] == image[index]
        place = ras(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose(read.affine @ [*index, 1], [*place, 1], atol=1e-9)
    format_ = "NRRD" if suffix in (".nrrd", ".nhdr") else "MetaImage"
    affine, shape = read_grid(path, format_)
    np.testing.assert_array_equal(affine, read.affine)
    assert shape == read.stored.shape

    out = tmp_path / "out" / f"b{suffix}"
    out.parent.mkdir()
    write_image(out, read)
    again = sitk.ReadImage(str(out))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), sitk.GetArrayFromImage(image))
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(again, get)(), getattr(image, get)(), atol=1e-12)
    assert again.GetPixelID() == image.GetPixelID()
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]
    one = [p.read_bytes() for p in sorted(out.parent.iterdir())]
    write_image(out, read_itk(out))
    assert [p.read_bytes() for p in sorted(out.parent.iterdir())] == one


def test_an_nrrd_of_another_space_keeps_its_places(tmp_path):
    path = tmp_path / "a.nrrd"
    sitk.WriteImage(image_of(), str(path), useCompression=False)
    lps = read_itk(path).affine
    text = path.read_bytes()
    path.write_bytes(text.replace(b"left-posterior-superior", b"right-anterior-superior"))
    np.testing.assert_allclose(read_itk(path).affine, np.diag([-1, -1, 1, 1]) @ lps, atol=1e-9)


def test_further_entries_of_a_header_are_written_back_but_no_segments(tmp_path):
    image = image_of()
    image.SetMetaData("note", "kept")
    image.SetMetaData("Segment0_Name", "liver")
    for suffix in (".nrrd", ".mha"):
        sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
        read = read_itk(tmp_path / f"a{suffix}")
        write_image(tmp_path / f"b{suffix}", read)
        again = sitk.ReadImage(str(tmp_path / f"b{suffix}"))
        assert again.GetMetaData("note") == "kept" and not again.HasMetaDataKey("Segment0_Name")


def test_a_fourth_axis_of_one_is_left_out(tmp_path):
    image = sitk.JoinSeries([image_of(direction=rotation(1))])
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    sitk.WriteImage(image_of(direction=rotation(1)), str(tmp_path / "b.mha"))
    four, three = (read_itk(tmp_path / name) for name in ("a.mha", "b.mha"))
    np.testing.assert_array_equal(four.stored, three.stored)
    np.testing.assert_allclose(four.affine, three.affine)


def written(tmp_path, suffix, image=None, **options):
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(image_of() if image is None else image, str(path), **options)
    return path


def test_several_channels_or_times_are_refused(tmp_path):
    channels = sitk.Compose([image_of(), image_of()])
    times = sitk.JoinSeries([image_of(), image_of()])
    flat = sitk.GetImageFromArray(ARRAY[0])
    for suffix in (".nrrd", ".mha"):
        for image, words in (
            (channels, "5x6x7 with 2 channels"),
            (times, "5x6x7x2"),
            (flat, "5x6"),
        ):
            with pytest.raises(ValueError, match=f"one 3-D image, got shape {words}; write one"):
                read_itk(written(tmp_path, suffix, image))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("damage", ["cut", "short", "flipped"])
def test_damage_anywhere_is_named_and_nothing_else_is_printed(
    tmp_path, capfd, suffix, compressed, damage
):
    if damage == "flipped" and not compressed:
        pytest.skip("numbers without a checksum")
    path = written(tmp_path, suffix, useCompression=compressed)
    voxels = next((p for p in tmp_path.iterdir() if "raw" in p.name), path)
    whole = bytearray(voxels.read_bytes())
    if damage == "flipped":
        whole[-60] ^= 0xFF
    voxels.write_bytes(whole[: {"cut": -30, "short": -1, "flipped": len(whole)}[damage]])
    with pytest.raises(ValueError, match=r"scan\S* is cut short or damaged"):
        read_itk(path)
    assert capfd.readouterr() == ("", "")


def test_a_header_without_its_voxels_is_named(tmp_path):
    for suffix in (".mhd", ".nhdr"):
        path = written(tmp_path, suffix, useCompression=False)
        (tmp_path / "scan.raw").unlink()
        with pytest.raises(ValueError, match=f"scan{suffix} .*scan.raw"):
            read_itk(path)


@pytest.mark.parametrize(
    "suffix, old, new, words",
    [
        (".nrrd", b"left-posterior-superior", b"scanner-xyz", "its space is scanner-xyz; write"),
        (".nrrd", b"space: left-posterior-superior", b"space dimension: 3", "its space is none"),
        (".nrrd", b"endian", b'space units: "um" "um" "um"\nendian', "in mm, but .* 'um'"),
        (".nrrd", b"(0,0,2.5)", b"(0,0,nan)", "finite voxel sizes"),
        (".nrrd", b"(0,0,2.5)", b"(0,0,0)", "damaged|no usable affine"),
        (".nrrd", b"(0,0,2.5)", b"(0,0,0.0025)", "multiply it by 1000"),
        (".mha", b"DimSize", b"DistanceUnits = cm\nDimSize", "in mm, but .* 'cm'"),
        (".mha", b"DimSize", b"ElementToIntensityFunctionSlope = 2\nDimSize", "slope of 2 and"),
        (".mha", b"DimSize", b"ElementToIntensityFunctionOffset = -1024\nDimSize", "-1024"),
        (".mha", b"ElementSpacing = 0.69999999999999996 0.80000000000000004 2.5",
         b"ElementSpacing = 0.7 0.8 0", "damaged|no usable affine|must have voxels"),
    ],
)  # fmt: skip
def test_headers_that_simpleitk_reads_wrongly_are_refused(tmp_path, suffix, old, new, words):
    path = written(tmp_path, suffix, useCompression=False)
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(ValueError, match=words):
        read_itk(path)


def test_what_the_name_says_does_not_matter(tmp_path):
    path = written(tmp_path, ".nrrd").rename(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_itk(path).stored, ARRAY.transpose(2, 1, 0))


def test_a_sheared_affine_is_refused_where_it_cannot_be_written(tmp_path):
    affine = np.eye(4)
    affine[1, 2] = 0.3
    with pytest.raises(ValueError, match="a.nrrd needs axes at right angles"):
        write_image(tmp_path / "a.nrrd", ItkImage(ARRAY, affine))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path, ".mha")
    before = path.read_bytes()

    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(sitk, "WriteImage", fail)
    with pytest.raises(OSError, match="could not be written"):
        write_image(path, ItkImage(ARRAY, np.eye(4)))
    assert [p.name for p in tmp_path.iterdir()] == ["scan.mha"] and path.read_bytes() == before


def test_without_simpleitk_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path, ".nrrd")
    real = builtins.__import__

    def missing(name, *rest):
        if name == "SimpleITK":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    words = re.escape('install it with: pip install "tumorsynth[itk]"')
    with pytest.raises(ModuleNotFoundError, match=words):
        read_itk(path)
