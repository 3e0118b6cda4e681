"""DICOM series: SimpleITK's geometry, HU as stored, and series that do not fit together."""

from __future__ import annotations

import numpy as np
import pytest

sitk = pytest.importorskip("SimpleITK", reason="needs the extra itk")

from dicom import AXIAL, positions_along, write_series  # noqa: E402

from tumorsynth.itk_formats.reading import read_itk  # noqa: E402

HU = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 8)).astype(np.int16)
Z = np.array([0, 0, 1.0])
SLOPE = b"\x28\x00\x53\x10\x02\x00\x00\x00"  # the tag of the rescale slope, and its length
EVEN = 2.5 * np.arange(8)


def series(folder, at=EVEN, hu=HU, **options):
    return write_series(folder, hu[:, :, : len(at)], positions=positions_along(Z, at), **options)


def oblique(seed):
    rows = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return rows[:2], np.cross(*rows[:2])


@pytest.mark.parametrize("seed", range(4))
def test_voxels_and_their_places_are_those_of_simpleitk(tmp_path, seed, capfd):
    directions, normal = (AXIAL, Z) if seed == 0 else oblique(seed)
    write_series(
        tmp_path / "ct",
        HU,
        pixel_mm=(0.7, 0.9),
        positions=positions_along(normal, 1.25 * np.arange(8)),
        directions=directions,
    )
    (tmp_path / "ct" / "README.txt").write_text("about this series")
    read = read_itk(tmp_path / "ct")
    assert read.stored.dtype == np.int16
    np.testing.assert_array_equal(read.stored, HU)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
    image = reader.Execute()
    for index in [(0, 0, 0), (5, 4, 7), (1, 2, 3)]:
        assert read.stored[index] == image[index]
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(read.affine @ [*index, 1], [-x, -y, z, 1], atol=1e-5)


def test_slope_and_intercept_are_those_of_each_slice(tmp_path):
    paths = series(tmp_path, intercept=0)
    for k in (2, 5):  # the same stored numbers mean other HU here
        whole = paths[k].read_bytes()
        paths[k].write_bytes(whole.replace(SLOPE + b"1 ", SLOPE + b".5"))
    expected = HU.astype(np.float32)
    expected[:, :, [2, 5]] /= 2
    np.testing.assert_array_equal(read_itk(tmp_path).stored, expected)

    paths[2].write_bytes(paths[2].read_bytes().replace(SLOPE + b".5", SLOPE + b"0 "))
    with pytest.raises(ValueError, match=f"rescale slope of {paths[2].name} .* got '0'"):
        read_itk(tmp_path)


@pytest.mark.parametrize(
    "at",
    [
        [0, 2.5, 5, 10, 12.5],  # one is missing
        [0, 2.5, 5, 7.5, 12.5],
        [0, 5, 7.5, 10, 12.5],
        [0, 2.5, 5, 8, 10.5],
        [0, 2.5, 5, 7.5, 10.2],
        [0, 2, 4, 7],  # whole numbers, which could be rounded
        [0, 2, 5],
        [0, 1, 2, 3, 5, 7],
        [0, 1, 2, 3, 4.2, 5.2, 6.2],
        [0, 1, 2, 3, 4, 5.05, 6.1, 7.15],
    ],
)
def test_unequal_distances_are_refused_with_the_positions(tmp_path, at):
    series(tmp_path / "ct", at)
    gaps = np.diff(at)
    odd = int(np.argmax(abs(gaps - np.median(gaps))))
    start, end = -300 + at[odd], -300 + at[odd + 1]
    with pytest.raises(ValueError, match="must lie at equal distances, but in .*ct") as error:
        read_itk(tmp_path / "ct")
    assert f"{start:.6g} to {end:.6g} mm" in str(error.value)


@pytest.mark.parametrize("step, digits", [(0.625, 1), (1.25, 1), (2.5, 0), (3.0, 0), (0.7, 3)])
def test_positions_rounded_to_few_digits_are_even(tmp_path, step, digits):
    at = np.round(step * np.arange(8), digits)
    if (step, digits) == (2.5, 0):
        at = at[::2]
    series(tmp_path, at)
    affine = read_itk(tmp_path).affine
    np.testing.assert_allclose(affine[2, 2], np.diff(at).mean(), atol=1e-9)


def test_two_slices_at_one_place_are_refused(tmp_path):
    series(tmp_path)
    series(tmp_path, EVEN[2:3], first=20)
    with pytest.raises(ValueError, match=r"IM\d+.dcm and IM\d+.dcm lie both at -295 mm"):
        read_itk(tmp_path)


def test_two_series_in_one_folder_are_refused_and_named(tmp_path):
    series(tmp_path / "ct")
    series(tmp_path / "ct", EVEN[:3], uid="1.2.3.4", first=20, tags={"0008|103e": "Scout"})
    with pytest.raises(ValueError, match="holds 2: 8 slices .*, 3 slices 'Scout' .*; move each"):
        read_itk(tmp_path / "ct")


@pytest.mark.parametrize("degrees", [1.0, -12.0, 25.0])
def test_a_tilted_gantry_is_refused(tmp_path, degrees):
    tilt = np.radians(degrees)
    directions = np.array([[1, 0, 0], [0, np.cos(tilt), np.sin(tilt)]])
    at = 5 * np.arange(8) / np.cos(tilt)
    write_series(tmp_path, HU, positions=positions_along(Z, at), directions=directions)
    with pytest.raises(ValueError, match=f"gantry tilted by {abs(degrees):g} degrees"):
        read_itk(tmp_path)


def test_slices_that_do_not_belong_together_are_refused(tmp_path):
    cases = {
        "size in pixels": {"hu": HU[:4]},
        "pixel spacing": {"pixel_mm": (0.75, 0.8)},
        "orientation": {"directions": np.array([[0, 1.0, 0], [0, 0, 1]])},
    }
    for what, options in cases.items():
        folder = tmp_path / what
        series(folder)
        series(folder, [20.0], first=20, **options)
        with pytest.raises(ValueError, match=f"one {what}, but .* IM"):
            read_itk(folder)


def test_damaged_slices_and_other_objects_are_named(tmp_path, capfd):
    whole = series(tmp_path)[3]
    content = whole.read_bytes()
    for broken in (content[:-20], content[:300], content[:132] + bytes(200)):
        whole.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{whole.name} (is cut short|lacks)"):
            read_itk(tmp_path)
    whole.write_bytes(content)
    assert read_itk(tmp_path) is not None
    assert capfd.readouterr() == ("", "")


def test_other_modalities_single_files_and_single_slices_are_refused(tmp_path):
    paths = series(tmp_path / "mr", modality="MR")
    with pytest.raises(ValueError, match="must be CT, but .* of the modality MR"):
        read_itk(tmp_path / "mr")
    with pytest.raises(
        ValueError, match=f"must be the folder of its slices, got the file {paths[0].name}"
    ):
        read_itk(paths[0])
    series(tmp_path / "one", [0.0])
    with pytest.raises(ValueError, match="2 slices or more, but .*one holds 1"):
        read_itk(tmp_path / "one")


def test_a_folder_without_slices_is_none_of_ours(tmp_path):
    series(tmp_path / "ct")
    assert read_itk(tmp_path) is None and read_itk(tmp_path / "nowhere") is None
